"""The target that a run fits to its own images before it starts: the principal components of their patches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fcmae.data import MaskedImages, SampleStream, make_loader
from fcmae.loss import target_patches
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.pca import principal_components
from fcmae.train.distributed import World

PATCHES = 200_000  # at most so many are looked at
BATCH = 32


def fit_target(model: MaskedAutoencoder, dataset: MaskedImages, workers: int, world: World) -> str:
    """Fit `model.target` to the first images of epoch 0, on rank 0 for all; a line that says so.

    Does nothing, and the line is empty, without such a target or where it came with weights.
    """
    if model.target is None:
        return ""

    def fit() -> tuple[Tensor, Tensor, str] | None:
        if model.target.fitted:
            return None
        count = len(model.target.basis)
        print(f"finding {count} principal components of the images' patches", flush=True)
        mean, basis, share, n = principal_components(_patches(model, dataset, workers), count)
        said = f"target: the top {count} principal components of {n:,} patches, with {share:.1%} of their variance"
        return mean, basis, said

    found = world.on_main(fit)
    if found is None:
        return ""
    model.target.set(*found[:2])
    return found[2]


def _patches(model: MaskedAutoencoder, dataset: MaskedImages, workers: int) -> Iterator[Tensor]:
    h, w = model.image_size
    images = min(len(dataset), max(1, PATCHES // (h * w // model.patch_size**2)))
    batch = min(BATCH, images)
    stream = SampleStream(len(dataset), dataset.seed, batch, end_step=images // batch)
    for items in make_loader(dataset, stream, workers):
        yield target_patches(items["image"], model.patch_size, model.norm_pix, model.norm_window).flatten(0, 1)
