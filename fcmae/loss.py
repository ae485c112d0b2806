"""The loss both families share: mean squared error on (normalized) pixels of the masked patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fcmae.errors import UsageError


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to (B, L, p*p*C): patches row-major, pixels of a patch in the order (p, p, C)."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, L, p*p*C) to (B, C, H, W) with (H, W) = size."""
    b, gh, gw = patches.shape[0], size[0] // patch, size[1] // patch
    x = patches.reshape(b, gh, gw, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, *size)


def window_stats(images: Tensor, window: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased var + eps) of every `window` x `window` square over its pixels and channels.

    images: (B, C, H, W). Returns two (B, L, 1) tensors, windows row-major (MAE §3 "reconstruction target"). A window of
    a single value has no unbiased variance: UsageError.
    """
    pixels = patchify(images, window)
    if pixels.shape[-1] < 2:
        raise UsageError("norm_pix needs more than one value a window; raise loss.norm_window or patch size")
    return pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + eps).sqrt()


def normalize_windows(images: Tensor, window: int, eps: float = 1e-6) -> Tensor:
    """Images (B, C, H, W) with every window brought to mean 0 and variance 1; see `window_stats`."""
    mean, std = window_stats(images, window, eps)
    return unpatchify((patchify(images, window) - mean) / std, window, tuple(images.shape[-2:]))


def check_window(image_size: tuple[int, int], window: int) -> None:
    """Raises UsageError unless squares of `window` pixels tile an image of (H, W) pixels."""
    h, w = image_size
    if h % window or w % window:
        raise UsageError(f"loss.norm_window={window} does not divide the image size {h}x{w}")


def target_patches(images: Tensor, patch: int, norm_pix: bool, norm_window: int | None) -> Tensor:
    """What is to be predicted, (B, L, p*p*C) of images (B, C, H, W): the pixels, normalized per window if norm_pix."""
    return patchify(normalize_windows(images, norm_window or patch) if norm_pix else images, patch)


def spread(mask: Tensor, times: int) -> Tensor:
    """A mask (B, gh, gw) of units as one of patches (B, gh*times, gw*times), `times` patches along a unit's side."""
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch: int,
    norm_pix: bool = True,
    norm_window: int | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Mean over a patch's pixels, then over the masked patches of the whole batch; a scalar in fp32 (fp64 for fp64).

    pred: (B, L, p*p*C), pixel order (p, p, C). images: (B, C, H, W), the target. mask: (B, gh, gw) bool, True = masked,
    one entry for every mask unit (a multiple of the patch). norm_window: side in pixels of the windows that norm_pix
    normalizes, the patch by default; both sides of an image must be multiples of it. project: what makes the target of
    a patch's pixels, (B, L, p*p*C) to (B, L, k), where pred is (B, L, k) and the mean one over k numbers.
    Raises UsageError when a window does not divide the image.
    """
    h = images.shape[-2]
    if norm_pix:
        check_window(tuple(images.shape[-2:]), norm_window or patch)
    with torch.autocast(images.device.type, enabled=False):
        wide = torch.promote_types(pred.dtype, torch.float32)
        images = images.to(wide)
        target = target_patches(images, patch, norm_pix, norm_window)
        if project is not None:
            target = project(target)
        per_patch = (pred.to(wide) - target).square().mean(-1)  # (B, L)
        masked = spread(mask, h // patch // mask.shape[1]).flatten(1).to(wide)
        return (per_patch * masked).sum() / masked.sum()
