"""The dense network for other runtimes: a transformers folder, ONNX, torch.export. Heavy packages are imported here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fcmae.checksum import write_safetensors
from fcmae.errors import UsageError
from fcmae.layouts import hf_models
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.hf_models import Outputs
from fcmae.layouts.running import timm_model
from fcmae.layouts.sizes import Spec
from fcmae.weights import FOLDER_FILES

BATCHES = (1, 3)  # with which a graph of dynamic batch is tried
ONE_FILE_GIB = 1.5  # beyond it torch's exporter puts weights into a second file, whose name the first one holds


class Dense(nn.Module):
    """timm's model of the encoder: logits (B, classes) where it has a classifier, else its features."""

    def __init__(self, state: dict[str, Tensor], spec: Spec):
        super().__init__()
        self.model = timm_model(spec, state)
        self.model.load_state_dict({key: x.float() for key, x in state.items()}, strict=True)
        self.classifies = spec.classes is not None

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.classifies else self.model.forward_features(images)


def to_hf(state: dict[str, Tensor], spec: Spec, folder: Path, size: tuple[int, int]) -> None:
    """Write the folder that the classes of `hf_models.classes` load, and ConvNets' `AutoBackbone`.

    state: in the `hf` layout. The norms that a backbone puts on its feature maps are added as what they begin as.
    """
    config = hf_models.config_of(spec)
    config.image_size = size[0] if size[0] == size[1] else list(size)
    if isinstance(spec, ConvNextSpec):
        for i, width in enumerate(spec.dims, 1):
            norm = f"hidden_states_norms.stage{i}"
            state = state | {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    # Not by `save_pretrained`, which in transformers 5 names a ViTMAE's decoder as transformers 4 does not.
    config.save_pretrained(folder)
    tensors = {key: x.contiguous() for key, x in hf_models.file_keys(state, spec).items()}
    write_safetensors(folder / FOLDER_FILES[0], tensors)


def to_onnx(state: dict[str, Tensor], spec: Spec, path: Path, size: tuple[int, int]) -> None:
    """Write an ONNX graph: input `images` (batch, C, H, W), output `logits` or `features`. state: in timm's layout."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    size_gib = sum(4 * x.numel() for x in state.values()) / 2**30
    if size_gib > ONE_FILE_GIB:
        raise UsageError(
            f"{spec} takes {size_gib:.1f} GiB, and an ONNX file holds {ONE_FILE_GIB} at most: use --to exported"
        )
    model, images = Dense(state, spec).eval(), torch.randn(2, spec.in_chans, *size)
    name = "logits" if spec.classes else "features"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        program = torch.onnx.export(
            model, (images,), dynamo=True, input_names=["images"], output_names=[name],
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    program.save(str(path), external_data=False)


def to_exported(state: dict[str, Tensor], spec: Spec, path: Path, size: tuple[int, int]) -> None:
    """Write a `torch.export` program of images (batch, C, H, W). state: in timm's layout."""
    model, images = Dense(state, spec).eval(), torch.randn(2, spec.in_chans, *size)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, str(path))


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """The output of an ONNX file in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def run_exported(path: Path, images: Tensor) -> Tensor:
    """The output of a program that `to_exported` wrote."""
    return torch.export.load(str(path)).module()(images)


def run_hf(folder: Path, spec: Spec, images: Tensor) -> Outputs:
    """The outputs of a transformers folder, loaded by every class for it. Raises UsageError if one lacks a key."""
    made: Outputs = {}
    for name in reversed(hf_models.classes(spec)):
        made |= hf_models.outputs_of(hf_models.load(name, folder), spec, images)
    return made


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise UsageError(
            f"{package} is not installed: pip install onnx onnxscript onnxruntime, or fcmae[onnx]"
        ) from None


GRAPHS: dict[str, tuple[Callable, Callable, float]] = {
    "onnx": (to_onnx, run_onnx, 1e-4),
    "exported": (to_exported, run_exported, 1e-5),
}
