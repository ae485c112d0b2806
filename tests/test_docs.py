"""What docs/ shows is what the code does: the table of layouts, and every Python example."""

import re
from pathlib import Path

import pytest
import torch

from fcmae import create_model
from fcmae.convert import convert
from fcmae.layouts import LAYOUTS

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


def key_table() -> str:
    """The layouts side by side, for an atto encoder with 1,000 classes."""
    with torch.device("meta"):
        state = create_model("fcmae_convnextv2_atto").state_dict()
        state |= {"norm.weight": torch.zeros(320), "head.weight": torch.zeros(1000, 320)}
    held = {"norm": "head", "head": "head"} | dict.fromkeys(("proj", "mask_token", "decoder", "pred"), "decoder")
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for key in ROWS:
        cells = []
        for layout in map(LAYOUTS.get, COLUMNS):
            has = held.get(key.split(".")[0]) in (None, *layout.holds)
            theirs = layout.names.theirs(key)
            cells.append(f"`{theirs}` {tuple(layout.from_fcmae(state)[theirs].shape)}" if has else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_layouts():
    assert key_table() in (DOCS / "weights.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "weights.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save(create_model("fcmae_convnextv2_atto", decoder_dim=8).state_dict(), folder / "atto.pt")
    convert(folder / "atto.pt", folder / "atto.safetensors", "timm")
    convert(folder / "atto.pt", folder / "atto_hf", "hf")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=[code.split("\n")[0][:50] for code in EXAMPLES])
def test_every_example_runs(files, monkeypatch, code):
    monkeypatch.chdir(files)
    names: dict = {}
    exec(compile(code, "weights.md", "exec"), names)
    encoder = torch.load("atto.pt")["encoder.stages.3.blocks.1.conv_dw.weight"]
    if "state" in names:
        assert torch.equal(names["state"]["encoder.stages.3.blocks.1.conv_dw.weight"], encoder)
        return
    model = names.get("model", names.get("backbone")).eval()
    assert any(p.shape == encoder.shape and torch.equal(p, encoder) for p in model.parameters())  # not fresh weights
    with torch.no_grad():
        found = model([torch.rand(3, 96, 128)] if "MaskRCNN" in code else torch.rand(1, 3, 96, 128))
    if "MaskRCNN" in code:
        assert set(found[0]) == {"boxes", "labels", "scores", "masks"}
    elif isinstance(found, list):
        assert [tuple(x.shape) for x in found] == [(1, 40 * 2**i, 24 // 2**i, 32 // 2**i) for i in range(4)]
    else:
        found = getattr(found, "logits", found)
        assert found.shape in ((1, 10), (1, 150, 96, 128)) and torch.isfinite(found).all()
