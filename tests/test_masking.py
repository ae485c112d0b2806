"""Mask strategies: exact counts, their shapes, and reproducibility."""

import numpy as np
import pytest
import torch

from fcmae.masking import STRATEGIES, draw_mask, keep_count, mask_from_noise


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [(7, 7), (3, 3), (1, 9), (14, 14), (5, 12), (2, 1)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6, 0.75, 0.9])
def test_every_mask_keeps_exactly_k(strategy, grid, ratio):
    regions = grid[0] * grid[1]
    keep = int(regions * (1 - ratio))
    if keep == 0 or keep == regions:
        with pytest.raises(ValueError, match="keeps none|masks none"):
            keep_count(regions, ratio)
        return
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = draw_mask(rng, grid, ratio, strategy)
        assert mask.dtype == bool and mask.shape == grid and (~mask).sum() == keep


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_vary_and_follow_the_generator(strategy):
    one, two = np.random.default_rng(1), np.random.default_rng(1)
    drawn = [draw_mask(one, (7, 7), 0.6, strategy) for _ in range(30)]
    assert len({m.tobytes() for m in drawn}) > 25
    assert all((m == draw_mask(two, (7, 7), 0.6, strategy)).all() for m in drawn)
    # every region is sometimes hidden and sometimes seen
    assert np.stack(drawn).any(0).all() and not np.stack(drawn).all(0).any()


def neighbours(mask):
    """Pairs of adjacent regions of which one is masked and the other not."""
    return (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()


def test_block_hides_in_larger_pieces_and_grid_in_smaller():
    rng = np.random.default_rng(0)
    borders = {s: sum(neighbours(draw_mask(rng, (14, 14), 0.5, s)) for _ in range(50)) for s in STRATEGIES}
    assert borders["block"] < 0.6 * borders["random"] < borders["random"] < 0.8 * borders["grid"]


def test_grid_at_three_quarters_keeps_one_of_every_four():
    mask = draw_mask(np.random.default_rng(3), (14, 14), 0.75, "grid")
    assert ((~mask).reshape(7, 2, 7, 2).sum((1, 3)) == 1).all()


def test_noise_keeps_the_smallest():
    noise = torch.tensor([[[0.9, 0.1], [0.5, 0.3]], [[0.2, 0.8], [0.4, 0.6]]])
    assert mask_from_noise(noise, 2).tolist() == [[[True, False], [True, False]], [[False, True], [False, True]]]


def test_unknown_strategy_names_the_nearest():
    with pytest.raises(ValueError, match="'block'"):
        draw_mask(np.random.default_rng(0), (7, 7), 0.6, "blok")
