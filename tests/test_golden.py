"""The authors' recorded outputs: encoder, prediction, loss and every gradient."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from fcmae import FCMAE
from fcmae.convert import read_checkpoint
from fcmae.layouts import LAYOUTS
from fcmae.layouts import timm as timm_layout
from fcmae.models.support import BACKENDS
from helpers import close, golden, section

CASES = [("fcmae_b1_128px", "per_image"), ("fcmae_b1_128px", "batch"), ("fcmae_b3_96px", "batch")]


def load(name, tmp_path, **settings):
    tensors, meta = golden(name)
    save_file(section(tensors, "checkpoint."), tmp_path / "official.safetensors")
    model = FCMAE(
        image_size=meta["img"], depths=meta["depths"], dims=meta["dims"], decoder_dim=meta["decoder_dim"],
        decoder_depth=meta["decoder_depth"], mask_ratio=meta["mask_ratio"], **settings,
    )  # fmt: skip
    model.load_state_dict(read_checkpoint(tmp_path / "official.safetensors"), strict=True)
    side = meta["img"] // 32
    return model, tensors, tensors["mask"].view(-1, side, side).bool()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name,grn", CASES)
def test_outputs_and_gradients(name, grn, backend, tmp_path):
    model, tensors, mask = load(name, tmp_path, grn=grn, backend=backend)
    loss, pred, used = model(tensors["image"], mask)
    loss.backward()
    assert torch.equal(used, mask)
    close(loss[None], tensors["loss"], 1e-5)
    close(pred, tensors["pred"].flatten(2).transpose(1, 2), 1e-5)
    close(model.encode(tensors["image"], mask), tensors["encoder_out"], 1e-5)
    expected = LAYOUTS["official"].to_fcmae(section(tensors, "grad."))
    assert set(expected) == {n for n, _ in model.named_parameters()}
    for key, parameter in model.named_parameters():
        close(parameter.grad, expected[key], 1e-4)


def test_per_image_grn_differs_where_it_should(tmp_path):
    model, tensors, mask = load("fcmae_b3_96px", tmp_path, grn="per_image")
    out = model.encode(tensors["image"], mask)
    assert (out - tensors["encoder_out"]).abs().max() > 1e-3 * tensors["encoder_out"].abs().max()


def test_dense_features_through_timm(tmp_path):
    model, tensors, _ = load("fcmae_b1_128px", tmp_path)
    state = timm_layout.from_model(model.state_dict())
    dense = timm.models.convnext.ConvNeXt(
        depths=model.encoder.depths, dims=model.encoder.dims, use_grn=True, ls_init_value=None
    )
    dense.reset_classifier(0)
    dense.load_state_dict(state, strict=True)
    close(dense.eval()(tensors["image"]), tensors["dense_features"], 1e-5)
    features = model.encode(tensors["image"]).mean((2, 3))
    close(torch.nn.functional.layer_norm(features, (features.shape[1],), eps=1e-6), tensors["dense_features"], 1e-5)
