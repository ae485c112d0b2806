"""Principal components as the target, and mask tokens in the ViT's encoder."""

import numpy as np
import pytest
import torch

from fcmae import FCMAE, MAE
from fcmae.loss import masked_pixel_loss, normalize_windows, patchify, spread, target_patches
from fcmae.pca import PrincipalComponents, principal_components
from fcmae.pictures import reconstruct
from helpers import TOLERANCE, close, masks, shake

SMALL = dict(
    image_size=(32, 48), patch_size=8, dim=24, depth=2, heads=3, decoder_dim=16, decoder_depth=1, decoder_heads=2
)


def images(batch, size=(32, 48, 3), seed=0):
    """Smooth, so that some directions matter more than others. size: height, width, channels."""
    noise = torch.randn(batch, size[2], *size[:2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.cumsum(-1).cumsum(-2) / 10


def fitted(model, seed=3):
    """The model with the basis of other images' patches."""
    x = images(40, (*model.image_size, model.in_chans), seed)
    patches = target_patches(x, model.patch_size, model.norm_pix, model.norm_window)
    model.target.set(*principal_components([part.flatten(0, 1) for part in patches.split(7)], model.predicted)[:2])
    return model


def test_directions_are_those_of_the_svd():
    patches = torch.randn(500, 12, dtype=torch.float64) @ torch.diag(torch.arange(12.0, 0, -1).double())
    patches = patches @ torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0] + torch.arange(12)
    mean, basis, share, n = principal_components(patches.split(64), 5)
    centred = patches.numpy() - patches.numpy().mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    close(mean, patches.mean(0), 1e-12)
    close((basis @ torch.from_numpy(directions[:5]).T).abs(), torch.eye(5, dtype=torch.float64), 1e-9)
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()
    assert n == 500 and share == pytest.approx((singular[:5] ** 2).sum() / (singular**2).sum(), rel=1e-9)


def test_all_directions_give_the_patches_back_and_fewer_the_nearest():
    patches = images(30)[:, :1].reshape(-1, 16)
    for count in (16, 6):
        target = PrincipalComponents(16, count).double()
        assert not target.fitted
        target.set(*principal_components([patches], count)[:2])
        assert target.fitted
        restored = target.restore(target.project(patches))
        centred = patches - patches.mean(0)
        u, s, v = torch.linalg.svd(centred, full_matrices=False)
        expected = (u[:, :count] * s[:count]) @ v[:count] + patches.mean(0)
        close(restored, expected, 1e-9)
    assert (restored - patches).abs().max() > 1e-3


@pytest.mark.parametrize("norm_pix,window", [(False, None), (True, None), (True, 16)])
@pytest.mark.parametrize("family", [MAE, FCMAE])
def test_the_loss_is_the_mean_over_the_components_of_masked_patches(family, norm_pix, window):
    convnet = dict(image_size=(64, 96), in_chans=1, depths=(1,) * 4, dims=(8,) * 4, decoder_dim=8)
    settings = SMALL if family is MAE else convnet
    model = shake(family(**settings, pca=7, norm_pix=norm_pix, norm_window=window).double())
    unit, patch = model.mask_unit, model.patch_size
    x = images(2, (*model.image_size, model.in_chans))
    mask = masks(2, [s // unit for s in model.image_size], 0.5)
    assert torch.isnan(model(x, mask)[0])  # not fitted yet
    fitted(model)
    loss, pred, _ = model(x, mask)
    pixels = patchify(normalize_windows(x, window or patch) if norm_pix else x, patch)
    wanted = (pixels - model.target.mean) @ model.target.basis.T
    close(loss[None], (pred - wanted)[mask.flatten(1)].square().mean()[None], 1e-12)
    assert pred.shape[-1] == 7 and masked_pixel_loss(
        wanted, x, mask, patch, norm_pix, window, model.target.project
    ) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("norm_pix,window", [(False, None), (True, 16)])
def test_a_perfect_prediction_gives_the_image_back(norm_pix, window):
    """Of as many components as a patch has numbers; of fewer the best picture that they allow."""
    x, mask = images(2), masks(2, (4, 6), 0.5)
    hidden = spread(mask, 8)[:, None].expand_as(x)
    for count in (192, 20):
        model = fitted(MAE(**SMALL, pca=count, norm_pix=norm_pix, norm_window=window).double())
        target = model.target.project(target_patches(x, 8, norm_pix, window))
        model.predict = lambda *_, target=target: target
        masked, filled = reconstruct(model, x, mask)
        assert torch.isnan(masked[hidden]).all()
        close(filled[~hidden], x[~hidden].float(), 1e-6)
        error = (filled - x).abs().max() / x.abs().max()
        assert error < 1e-4 if count == 192 else 1e-3 < error < 0.8


def test_the_basis_is_no_parameter_and_stays_in_the_state_dict():
    model = fitted(MAE(**SMALL, pca=5))
    assert not [name for name, _ in model.named_parameters() if name.startswith("target")]
    again = MAE(**SMALL, pca=5)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.target.fitted and torch.equal(again.target.basis, model.target.basis)
    assert "target.mean" not in MAE(**SMALL).state_dict()


@pytest.mark.parametrize("count", [0, 193])
def test_refused_counts(count):
    with pytest.raises(ValueError, match=f"loss.pca={count} must lie between 1 and the 192 numbers"):
        MAE(**SMALL, pca=count)


def test_fewer_patches_than_directions():
    with pytest.raises(ValueError, match="loss.pca=9 needs as many patches .* has 8"):
        principal_components([torch.randn(8, 12)], 9)


def with_tokens(**settings):
    return shake(MAE(**{**SMALL, "encoder_mask_tokens": True, **settings}).double())


@pytest.mark.parametrize("unit", [8, 16])
def test_mask_tokens_in_the_encoder_by_hand(unit):
    model, x, mask = with_tokens(mask_unit=unit, mask_ratio=0.5), images(2), masks(2, (32 // unit, 48 // unit), 0.5)
    tokens = model.patch_embed(x.permute(0, 2, 3, 1)).flatten(1, 2)
    tokens[spread(mask, unit // 8).flatten(1)] = model.encoder_mask_token.flatten()
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1) + model.pos_embed
    for block in model.blocks:
        tokens = block(tokens)
    tokens = model.norm(tokens)
    close(model.encode(x, mask), tokens, TOLERANCE[torch.float64])
    decoded = model.decoder_embed(tokens) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        decoded = block(decoded)
    expected = model.decoder_pred(model.decoder_norm(decoded))[:, 1:]
    close(model(x, mask)[1], expected, TOLERANCE[torch.float64])


def test_mask_tokens_hide_what_is_masked_and_use_every_parameter():
    model, x, mask = with_tokens(), images(2), masks(2, (4, 6), 0.75)
    hidden = spread(mask, 8)[:, None]
    other = torch.where(hidden, images(2, seed=9), x)
    assert torch.equal(model.encode(other, mask), model.encode(x, mask))
    assert torch.equal(model(other, mask)[1], model(x, mask)[1])
    model(x, mask)[0].backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())
    names = dict(model.named_parameters())
    assert names["encoder_mask_token"].shape == (1, 1, 24) and "mask_token" not in names
    assert any(p is names["encoder_mask_token"] for p in model.encoder_parameters())


def test_without_a_mask_it_is_the_same_encoder():
    model, plain, x = with_tokens(), shake(MAE(**SMALL).double()), images(2)
    shared = {k: v for k, v in model.state_dict().items() if "mask_token" not in k}
    plain.load_state_dict(plain.state_dict() | shared)
    assert torch.equal(model.encode(x), plain.encode(x))
    close(model.encode(x, torch.zeros(2, 4, 6, dtype=torch.bool)), plain.encode(x), TOLERANCE[torch.float64])
