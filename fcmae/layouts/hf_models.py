"""transformers' own models of state dicts in the `hf` layouts, and the folders that they load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.sizes import Spec
from fcmae.layouts.vit_spec import VitSpec
from fcmae.masking import keep_count, mask_from_noise

# "features", of ConvNets (B, C, H/32, W/32), of ViTs (B, 1 + patches, D); and where the model has what they need
# "pooled" (B, D) after the last norm, "logits" (B, classes), "predictions" (B, patches, p*p*C) under a fixed mask.
Outputs = dict[str, Tensor]
RATIO = 0.5  # of that mask: it fits any number of patches


def classes(spec: Spec) -> list[str]:
    """Names of the classes that load such a folder without a missing key, the one that holds all of it first."""
    if isinstance(spec, ConvNextSpec):
        return ["ConvNextV2ForImageClassification", "ConvNextV2Model"] if spec.classes else ["ConvNextV2Model"]
    if spec.decoder:
        return ["ViTMAEForPreTraining", "ViTMAEModel"]
    return ["ViTForImageClassification", "ViTModel"] if spec.classes else ["ViTModel", "ViTMAEModel"]


def file_keys(state: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """The state dict under the names that the first of these classes reads and writes."""
    inner = {"convnext": "convnextv2.", "vit": "vit."}[spec.family] if "For" in classes(spec)[0] else ""
    outer = ("classifier.", "decoder.")
    return {key if key.startswith(outer) else f"{inner}{key}": x for key, x in state.items()}


def config_of(spec: Spec):
    """transformers' configuration of these sizes. Raises UsageError without transformers, or for what it cannot be."""
    transformers = _transformers()
    sizes = {"num_channels": spec.in_chans, "image_size": _side(spec.image_size)}
    if spec.classes:
        sizes["num_labels"] = spec.classes
    # transformers' own norms have another eps than the authors' and timm's, unless told.
    sizes["layer_norm_eps"] = 1e-6
    if isinstance(spec, ConvNextSpec):
        config = transformers.ConvNextV2Config(depths=list(spec.depths), hidden_sizes=list(spec.dims), **sizes)
    else:
        sizes |= {
            "hidden_size": spec.dim, "num_hidden_layers": spec.depth, "num_attention_heads": spec.running_heads,
            "intermediate_size": 4 * spec.dim, "patch_size": spec.patch_size,
        }  # fmt: skip
        config = _vit_config(spec, sizes)
    config.architectures = classes(spec)[:1]
    return config


def _vit_config(spec: VitSpec, sizes: dict):
    transformers = _transformers()
    if not spec.decoder:
        return transformers.ViTConfig(**sizes)
    if spec.classes:
        raise UsageError("transformers has no ViT with a decoder and a classifier; leave --with-decoder out")
    if spec.image_size[0] != spec.image_size[1]:
        raise UsageError("transformers' ViTMAE decoder is for squares; without the decoder a rectangle will do")
    width, blocks = spec.decoder
    return transformers.ViTMAEConfig(
        **sizes, decoder_hidden_size=width, decoder_num_hidden_layers=blocks, decoder_intermediate_size=4 * width,
        decoder_num_attention_heads=spec.running_decoder_heads, norm_pix_loss=True,
    )  # fmt: skip


def load(name: str, source: Path | None, **settings) -> nn.Module:
    """A model by the name of its class from a folder, or from a `state_dict` and `config` in memory.

    In evaluation mode, float32. Raises UsageError if a key is missing, or, from memory, unexpected.
    """
    if name == "ViTModel":
        settings["add_pooling_layer"] = False  # a layer that nothing pretrains
    with _quiet():
        cls = getattr(_transformers(), name)
        model, info = cls.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **settings)
    wrong = {*info["missing_keys"], *info["mismatched_keys"], *(() if source else info["unexpected_keys"])}
    if wrong:
        raise UsageError(f"transformers' {name} does not fit {', '.join(map(str, sorted(wrong, key=str)))}")
    return model.eval()


@torch.no_grad()
def outputs_of(model: nn.Module, spec: Spec, images: Tensor) -> Outputs:
    """What one of these models makes of images (B, C, H, W)."""
    name = type(model).__name__
    base = model.base_model if "For" in name else model
    if "ViTMAE" not in name:
        found = base(images)
        made = {"features": found.last_hidden_state}
        if isinstance(spec, ConvNextSpec):
            made["pooled"] = found.pooler_output
        return made | ({"logits": model(images).logits} if "For" in name else {})
    model.config.mask_ratio = 0.0
    in_order = torch.arange(spec.tokens).expand(len(images), -1).float()
    made = {"features": base(images, noise=in_order).last_hidden_state}
    if base is not model:
        model.config.mask_ratio = RATIO
        made["predictions"] = model(images, noise=noise(spec, len(images))).logits
    return made


def noise(spec: VitSpec, batch: int) -> Tensor:
    """(B, patches) numbers, of which the smallest tell the patches that stay visible."""
    return torch.rand(batch, spec.tokens, generator=torch.Generator().manual_seed(1))


def hidden(spec: VitSpec, batch: int) -> Tensor:
    """The mask (B, gh, gw), True = masked, under which decoders are compared."""
    rows, columns = (side // spec.patch_size for side in spec.image_size)
    return mask_from_noise(noise(spec, batch).view(batch, rows, columns), keep_count(spec.tokens, RATIO))


def _side(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _transformers():
    try:
        import transformers
    except ImportError:
        raise UsageError("transformers is not installed: pip install transformers, or fcmae[hf]") from None
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars, and without its report of keys, which is checked here."""
    _transformers()
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
