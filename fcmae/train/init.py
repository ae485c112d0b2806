"""Starting from weights that something else trained."""

from __future__ import annotations

from torch import Tensor

from fcmae.errors import UsageError
from fcmae.layouts import LAYOUTS
from fcmae.layouts.positions import fixed_grid, grid_of, resampled
from fcmae.layouts.sizes import Told
from fcmae.layouts.spec import read_spec
from fcmae.layouts.vit_spec import VitSpec
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.weights import Weights, read_weights


def start_from(model: MaskedAutoencoder, path: str) -> str:
    """Load the encoder of any file that `fcmae.convert` reads, and its decoder where both have the same one.

    A ViT of another image size keeps its own positions where the file's are the fixed ones of MAE; trained ones are
    resampled. Returns a line that says what was taken. Raises UsageError when the encoder is of another size.
    """
    weights = read_weights(path)
    own = LAYOUTS["minkowski"].to_fcmae(model.state_dict())
    told = Told(getattr(model, "heads", None), model.decoder_heads, model.image_size)
    here, there = read_spec(own, "the model", told), weights.spec
    if (here.in_chans, here.encoder) != (there.in_chans, there.encoder):
        hint = (
            f"python -m fcmae.convert {path} DST --in-chans {here.in_chans} makes a stem for it"
            if here.encoder == there.encoder
            else "set model.name, or what is under model., to what the file holds"
        )
        raise UsageError(f"init={path} holds {there}; the model is {here}: {hint}")
    same_heads = weights.told.decoder_heads in (None, here.decoder_heads) or here.decoder_heads is None
    whole = here.pretraining == there.pretraining and same_heads
    said, positions = "", {key: own[key] for key in ("decoder_pos_embed",) if key in own}  # fixed, of its own size
    if isinstance(here, VitSpec):
        _check_heads(weights, here)
        positions, said = _positions(weights, here, own)
    wanted = {key: x for key, x in weights.ours.items() if key in own and (whole or here.part(key) == "encoder")}
    model.load_state_dict(own | wanted | positions, strict=True)
    if isinstance(there, VitSpec) and there.fc_norm:
        said += "; its last norm starts anew, there it follows the mean of the tokens"
    if whole:
        return f"encoder and decoder from {path}{said}"
    return (
        f"encoder from {path}{said}; the decoder starts anew, there {'it is another' if there.decoder else 'is none'}"
    )


def _check_heads(weights: Weights, here: VitSpec) -> None:
    """Raises UsageError when the file says that its attention has other heads, which no tensor shows."""
    there = weights.told.heads
    if there not in (None, here.heads):
        raise UsageError(f"init={weights.path} has {there} heads of attention, the model {here.heads}; set model.heads")


def _positions(weights: Weights, here: VitSpec, own: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The positions of encoder and decoder that are not the file's, and words for that; own: the model's tensors."""
    there, found = weights.spec, weights.ours["pos_embed"]
    fixed = fixed_grid(found)
    if here.size == there.size or (there.size is None and here.tokens == there.tokens):
        return {}, "" if fixed else " with the positions it was trained with"
    sizes = f"for {here.size[0]} x {here.size[1]} pixels"
    kept = {key: own[key] for key in ("pos_embed", "decoder_pos_embed")}
    if fixed:
        return kept, f" with the model's own fixed positions {sizes}"
    if there.size is None:
        raise UsageError(
            f"init={weights.path}: no tensor tells the sides of the {there.tokens} patches it has positions for; "
            f"python -m fcmae.convert {weights.path} DST --image-size {here.size[0]} {here.size[1]} asks for them"
        )
    grids = (grid_of(size, here.patch_size) for size in (there.size, here.size))
    return kept | {"pos_embed": resampled(found, *grids)}, f" with its trained positions resampled {sizes}"
