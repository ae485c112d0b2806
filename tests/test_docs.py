"""What docs/ shows is what the code does: the table of layouts, and every Python example."""

import re
from pathlib import Path

import pytest
import torch

from fcmae import create_model
from fcmae.convert import convert
from fcmae.layouts import LAYOUTS, VIT_LAYOUTS

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLUMNS = ("fcmae", "minkowski", "official", "dense", "timm", "hf")
ROWS = (
    "encoder.stem.0.weight",
    "encoder.stem.1.weight",
    "encoder.stages.1.downsample.0.weight",
    "encoder.stages.1.downsample.1.weight",
    "encoder.stages.1.downsample.1.bias",
    "encoder.stages.1.blocks.0.conv_dw.weight",
    "encoder.stages.1.blocks.0.conv_dw.bias",
    "encoder.stages.1.blocks.0.norm.weight",
    "encoder.stages.1.blocks.0.mlp.fc1.weight",
    "encoder.stages.1.blocks.0.mlp.grn.weight",
    "encoder.stages.1.blocks.0.mlp.grn.bias",
    "encoder.stages.1.blocks.0.mlp.fc2.weight",
    "proj.weight",
    "mask_token",
    "decoder.0.conv_dw.weight",
    "decoder.0.mlp.fc1.weight",
    "decoder.0.mlp.grn.weight",
    "pred.weight",
    "norm.weight",
    "head.weight",
)


VIT_ROWS = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "blocks.1.norm1.weight",
    "blocks.1.attn.qkv.weight",
    "blocks.1.attn.qkv.bias",
    "blocks.1.attn.proj.weight",
    "blocks.1.norm2.weight",
    "blocks.1.mlp.fc1.weight",
    "blocks.1.mlp.fc2.weight",
    "norm.weight",
    "mask_token",
    "decoder_pos_embed",
    "decoder_embed.weight",
    "decoder_blocks.0.attn.qkv.weight",
    "decoder_blocks.0.attn.proj.weight",
    "decoder_blocks.0.mlp.fc1.weight",
    "decoder_norm.weight",
    "decoder_pred.weight",
    "fc_norm.weight",
    "head.weight",
)
# What, besides the encoder, a row's first word belongs to.
HELD = {"norm": "head", "head": "head"} | dict.fromkeys(("proj", "mask_token", "decoder", "pred"), "decoder")
VIT_DECODER = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred")
VIT_HELD = {"fc_norm": "average", "head": "head"} | dict.fromkeys(VIT_DECODER, "decoder")


def key_table() -> str:
    """The layouts side by side, for an atto encoder with 1,000 classes."""
    with torch.device("meta"):
        state = create_model("fcmae_convnextv2_atto").state_dict()
        state |= {"norm.weight": torch.zeros(320), "head.weight": torch.zeros(1000, 320)}
    return table([LAYOUTS[name] for name in COLUMNS], ROWS, state, HELD)


def vit_table() -> str:
    """The same for a ViT-tiny."""
    with torch.device("meta"):
        state = create_model("mae_vit_tiny_patch16").state_dict()
        state |= {"fc_norm.weight": torch.zeros(192), "head.weight": torch.zeros(1000, 192)}
    return table([VIT_LAYOUTS[name] for name in COLUMNS if name in VIT_LAYOUTS], VIT_ROWS, state, VIT_HELD)


def table(layouts, rows, state, held) -> str:
    lines = [f"| {' | '.join(layout.name for layout in layouts)} |", f"|{' --- |' * len(layouts)}"]
    for key in rows:
        cells = []
        for layout in layouts:
            has = held.get(key.split(".")[0]) in (None, *layout.holds)
            made, theirs = layout.from_fcmae(state), layout.parts(key)
            cells.append(", ".join(f"`{name}` {tuple(made[name].shape)}" for name in theirs) if has else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("made", [key_table, vit_table])
def test_the_tables_of_layouts(made):
    assert made() in (DOCS / "weights.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "weights.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save(create_model("fcmae_convnextv2_atto", decoder_dim=8).state_dict(), folder / "atto.pt")
    convert(folder / "atto.pt", folder / "atto.safetensors", "timm")
    convert(folder / "atto.pt", folder / "atto_hf", "hf")
    vit = create_model("mae_vit_tiny_patch16", decoder_dim=32, decoder_depth=1).state_dict()
    torch.save(vit, folder / "vit.pt")
    convert(folder / "vit.pt", folder / "vit.safetensors", "timm")
    convert(folder / "vit.pt", folder / "vit_hf", "hf")
    convert(folder / "vit.pt", folder / "vit_mae_hf", "hf", with_decoder=True, decoder_heads=16)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=[code.split("\n")[0][:50] for code in EXAMPLES])
def test_every_example_runs(files, monkeypatch, code):
    monkeypatch.chdir(files)
    names: dict = {}
    exec(compile(code, "weights.md", "exec"), names)
    vit = "vit_" in code
    one = "blocks.3.mlp.fc1.weight" if vit else "encoder.stages.3.blocks.1.conv_dw.weight"
    encoder = torch.load("vit.pt" if vit else "atto.pt")[one]
    if "state" in names:
        assert torch.equal(names["state"]["encoder.stages.3.blocks.1.conv_dw.weight"], encoder)
        return
    model = names.get("model", names.get("backbone")).eval()
    assert any(p.shape == encoder.shape and torch.equal(p, encoder) for p in model.parameters())  # not fresh weights
    with torch.no_grad():
        images = torch.rand(1, 3, *((224, 224) if vit else (96, 128)))
        found = model([images[0]] if "MaskRCNN" in code else images)
    if "MaskRCNN" in code:
        assert set(found[0]) == {"boxes", "labels", "scores", "masks"}
    elif isinstance(found, list):
        assert [tuple(x.shape) for x in found] == [(1, 40 * 2**i, 24 // 2**i, 32 // 2**i) for i in range(4)]
    else:
        found = getattr(found, "logits", found)
        assert found.shape in ((1, 10), (1, 150, 96, 128), (1, 196, 768)) and torch.isfinite(found).all()
