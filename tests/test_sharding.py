"""A model spread over two ranks trains as one that both hold, and its checkpoints are those of any run."""

import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fcmae.train import sharding
from helpers import close
from small_runs import CONFIG, final_state, make_pictures, metrics, run

MODELS = {
    "fcmae": CONFIG.replace("dims: [8, 12, 16, 24]", "dims: [8, 13, 16, 25]"),  # no two equal parts of 13 or 25
    "mae": CONFIG.replace(
        "name: fcmae_convnextv2_atto, image_size: 64, depths: [1, 1, 1, 1], dims: [8, 12, 16, 24], decoder_dim: 16",
        "name: mae_vit_tiny_patch16, image_size: 64, dim: 24, depth: 2, heads: 2, decoder_dim: 16, decoder_depth: 1, "
        "decoder_heads: 2",
    ),
}
STEPS = 12


@pytest.fixture(scope="module", params=["fcmae", pytest.param("mae", marks=pytest.mark.slow)])
def place(request, tmp_path_factory):
    """Both runs, of two ranks that accumulate, clip and draw."""
    folder = tmp_path_factory.mktemp(request.param)
    make_pictures(folder / "pictures")
    text = MODELS[request.param].replace("steps: 60, batch_size: 8", f"steps: {STEPS}, batch_size: 2, clip_grad: 0.5")
    (folder / "config.yaml").write_text(text)
    train(folder, "replicated", processes=2)
    said = train(folder, "sharded", "train.sharding=full", "log.images=2", processes=2)
    assert re.search(r"sharding  full: 5[0-5]% of the parameters on rank 0", said)
    return folder


def train(place, name, *overrides, processes=1):
    """A run in place/name, with a checkpoint in its middle; what it said."""
    done = run(
        place / "config.yaml", f"data.source={place / 'pictures'}", f"out={place / name}", "train.effective_batch=8",
        f"checkpoint.every={STEPS // 2}", *overrides, processes=processes,
    )  # fmt: skip
    return done.stdout


def assert_follows(place, name, other, steps, tolerance=1e-5):
    """The same losses, gradients and weights."""
    ours, theirs = metrics(place / name), metrics(place / other)[-steps:]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] and len(ours) == steps
    for key in ("loss", "grad_norm"):
        close(torch.tensor([r[key] for r in ours]), torch.tensor([r[key] for r in theirs]), tolerance)
    state, expected = final_state(place / name), final_state(place / other)
    # Of all at once: gradients that are nothing but rounding, such as of a key's bias, are as large as others to Adam,
    # which makes some hundredths of a step of them; a step moves weights by 1e-3.
    for kind, more in (("model", 10), ("exp_avg", 1), ("exp_avg_sq", 1)):
        close(flat(state, kind), flat(expected, kind), more * tolerance)


def flat(state, kind):
    """All tensors of the model, or of one of the optimizer's moments, in one."""
    held = state["optimizer"]["state"]
    tensors = state["model"].values() if kind == "model" else [held[index][kind] for index in sorted(held)]
    return torch.cat([x.flatten() for x in tensors])


def test_sharded_follows_replicated(place):
    assert_follows(place, "sharded", "replicated", STEPS)
    ours, theirs = (load_file(place / name / "encoder.safetensors") for name in ("sharded", "replicated"))
    assert ours.keys() == theirs.keys()
    assert list((place / "sharded" / "reconstructions").glob("*.png"))


@pytest.mark.slow
def test_checkpoint_of_a_sharded_run_goes_on_in_one_process(place):
    held = f"resume={place}/sharded/checkpoints/step_{STEPS // 2:09d}.pt"
    train(place, "one", held)
    assert_follows(place, "one", "replicated", STEPS // 2)


@pytest.mark.slow
def test_checkpoint_of_one_process_goes_on_sharded(place):
    train(place, "alone")
    held = f"resume={place}/alone/checkpoints/step_{STEPS // 2:09d}.pt"
    train(place, "spread", held, "train.sharding=full", processes=2)
    assert_follows(place, "spread", "replicated", STEPS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["mae"], indirect=True)
def test_compiled_it_follows_too(place):
    train(place, "compiled", "train.sharding=full", "train.compile=true", processes=2)
    assert_follows(place, "compiled", "replicated", STEPS, 1e-4)  # compiled kernels round otherwise


def test_a_pass_that_only_accumulates_exchanges_nothing_also_through_the_compilers_wrapper(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 2)
        sharding.shard(model, torch.device("cpu"))
        forward = torch.compile(model, backend="eager")
        found = []
        for last in (False, True):
            with sharding.gradients_exchanged(forward, last):
                forward(torch.ones(4, 3)).sum().backward()
            found.append(None if model.weight.grad is None else model.weight.grad.full_tensor().tolist())
        assert found == [None, [[8.0] * 3] * 2]  # this rank's own sum is kept aside until the exchange
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["fcmae"], indirect=True)
def test_both_ranks_skip_a_step_that_is_not_finite(place):
    """An image of numbers too large to compute with is on one rank alone."""
    pictures = place / "with_huge"
    shutil.copytree(place / "pictures", pictures)
    np.save(pictures / "huge.npy", 3e38 * np.random.default_rng(0).choice([-1, 1], (96, 96, 3)).astype(np.float32))
    more = (f"data.source={pictures}", "train.steps=6")  # of 8 of 41 images
    train(place, "skips", *more, processes=2)
    train(place, "skips_sharded", *more, "train.sharding=full", processes=2)
    ours, theirs = metrics(place / "skips_sharded"), metrics(place / "skips")
    skipped = [row["step"] for row in ours if row.get("skipped")]
    assert skipped and skipped == [row["step"] for row in theirs if row.get("skipped")]
    losses = ([row["loss"] for row in rows if "skipped" not in row] for rows in (ours, theirs))
    close(*map(torch.tensor, losses), 1e-5)
    close(*(flat(final_state(place / name), "model") for name in ("skips_sharded", "skips")), 1e-5)
