"""The image size that a conversion is for: of a ViT the size of its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fcmae.errors import UsageError
from fcmae.layouts.positions import grid_of, resampled
from fcmae.layouts.vit_spec import VitSpec
from fcmae.masking import grid_size
from fcmae.weights import Weights


def pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width of one number or two."""
    sides = [size] if isinstance(size, int) else list(size or ())
    if len(sides) > 2:
        raise UsageError(f"--image-size takes one number, or height and width; got {len(sides)}")
    return (sides[0], sides[-1]) if sides else None


def with_size(weights: Weights, wanted: tuple[int, int] | None) -> tuple[Weights, tuple[int, int]]:
    """The weights, told the sides of their rectangle where these were not known, and the size of the result."""
    spec = weights.spec
    if not isinstance(spec, VitSpec):
        grid_size(wanted or (224, 224), 32)
        return weights, wanted or (224, 224)
    if wanted is None:
        return weights, spec.image_size
    rows, columns = grid_size(wanted, spec.patch_size)
    if spec.size is None and rows * columns != spec.tokens:
        raise UsageError(
            f"no tensor tells the sides of the {spec.tokens} patches that {weights.path} has positions for: convert it "
            f"first with --image-size H W of as many patches, then to {wanted[0]} {wanted[1]}"
        )
    if spec.size is None:
        told = weights.told._replace(size=wanted)
        return replace(weights, told=told, spec=replace(spec, size=wanted)), wanted
    return weights, wanted


def moved(state: dict[str, Tensor], spec: VitSpec, size: tuple[int, int], with_decoder: bool) -> dict[str, Tensor]:
    """A ViT's weights with its positions resampled."""
    if with_decoder:
        raise UsageError(
            "--image-size leaves a decoder behind, whose positions are of its own size: leave out one of it and "
            "--with-decoder (init= of a run takes both to another size)"
        )
    grids = (grid_of(each, spec.patch_size) for each in (spec.image_size, size))
    return state | {"pos_embed": resampled(state["pos_embed"], *grids)}
