"""What both families share: sizes, the mask and its checks, and a forward pass that ends in the one loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.kernels.tiles import Tiles
from fcmae.loss import check_window, masked_pixel_loss
from fcmae.masking import check_mask, grid_size, keep_count, mask_from_noise
from fcmae.pca import PrincipalComponents


class MaskedAutoencoder(nn.Module):
    """A model that predicts the pixels of hidden regions. A family adds:

    `predict(images, tiles)`, the prediction (B, L, p*p*C) of every patch from the visible regions alone, with `pca`
    (B, L, pca): `predicted` numbers each;
    `encode(images, mask=None)`, the encoder's features, without a mask those of the ordinary dense network;
    `describe_encoder(device)`, a line that says what computes the encoder there;
    `encoder_parameters()`, the encoder's own.

    image_size: pixels, one number or (H, W), multiples of mask_unit. patch_size: side in pixels of what one position of
    the prediction covers. mask_unit: side of a region, which is hidden or visible as a whole; a multiple of patch_size.
    mask_ratio: share of regions hidden when no mask is given. norm_pix: normalize the target's pixels per window;
    norm_window: the window's side in pixels, the patch by default. pca: predict so many principal components of a patch
    in place of its pixels; `target` then holds the basis, which is to be fitted once (`fcmae.train.target`), else it is
    None. Raises UsageError for values that do not fit.
    """

    fixed_size = False  # whether positions bind the model to images of image_size

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_chans: int,
        patch_size: int,
        mask_unit: int,
        mask_ratio: float,
        norm_pix: bool,
        norm_window: int | None,
        pca: int | None,
    ):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.in_chans, self.patch_size, self.mask_unit = in_chans, patch_size, mask_unit
        self.mask_ratio, self.norm_pix, self.norm_window = mask_ratio, norm_pix, norm_window
        gh, gw = grid_size(self.image_size, mask_unit)
        keep_count(gh * gw, mask_ratio)
        if norm_pix:
            check_window(self.image_size, norm_window or patch_size)
        pixels = patch_size * patch_size * in_chans
        self.predicted = pixels if pca is None else pca
        self.target = None if pca is None else PrincipalComponents(pixels, pca)

    def forward(self, images: Tensor, mask: Tensor | Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (scalar, fp32), prediction (B, L, p*p*C) in pixel order (p, p, C), and the mask used (B, gh, gw) bool.

        With `pca` the prediction is (B, L, pca); `target.restore` brings it back to pixels.

        images: (B, C, H, W). mask: True = masked, the same number in every image; drawn at random if left out; the
        tables of a mask, `Tiles`, spare the check and its host synchronisation.
        """
        tiles = self.tiles(images, mask)
        if tiles.keep.shape[1] == tiles.mask[0].numel():
            raise UsageError("the mask hides none of the regions, so there is no loss; use encode() for features")
        pred = self.predict(images, tiles)
        project = None if self.target is None else self.target.project
        loss = masked_pixel_loss(pred, images, tiles.mask, self.patch_size, self.norm_pix, self.norm_window, project)
        return loss, pred, tiles.mask

    def tiles(self, images: Tensor, mask: Tensor | Tiles | None = None) -> Tiles:
        """The tables of a mask over these images, drawn if there is none. Raises UsageError if it does not fit."""
        b, grid = images.shape[0], self.grid(images)
        if isinstance(mask, Tiles):
            if tuple(mask.mask.shape) != (b, *grid):
                raise UsageError(f"the tables are of a mask {tuple(mask.mask.shape)}; these images need {(b, *grid)}")
            return mask
        if mask is None:
            keep = keep_count(grid[0] * grid[1], self.mask_ratio)
            mask = mask_from_noise(torch.rand(b, *grid, device=images.device), keep)
        elif torch.compiler.is_compiling():
            # A traced graph needs the count as a constant; that each image keeps it is asserted as the graph runs.
            keep = keep_count(grid[0] * grid[1], self.mask_ratio)
            kept = ((~mask).flatten(1).sum(1) == keep).all()
            torch._assert_async(kept, "under torch.compile a mask must keep what the model's mask_ratio keeps")
        else:
            keep = check_mask(mask, b, grid)
        return Tiles.from_mask(mask, keep)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Regions (gh, gw) of images (B, C, H, W). Raises UsageError if the model cannot take them."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise UsageError(f"images must be (B, {self.in_chans}, H, W); got {tuple(images.shape)}")
        grid = grid_size(tuple(images.shape[-2:]), self.mask_unit)
        if self.fixed_size and tuple(images.shape[-2:]) != self.image_size:
            h, w = self.image_size
            raise UsageError(
                f"images are {images.shape[-2]}x{images.shape[-1]} and this model's positions {h}x{w}; "
                f"build it with the images' image_size"
            )
        return grid

    def timm_arguments(self) -> dict[str, object] | None:
        """What timm's model of the encoder's name must be told to have these weights; None where timm has no such."""
        return {"in_chans": self.in_chans}
