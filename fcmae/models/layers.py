"""Layers of the ConvNeXt V2 block on channels-last features, under timm's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.kernels.mlp import LAYER_NORM_EPS, Weights
from fcmae.kernels.mlp_op import block_mlp
from fcmae.models.norms import GRN, OTHERS
from fcmae.models.support import Support

LAYER_SCALE = 1e-6  # what ConvNeXt V1's LayerScale begins with


class PatchConv(nn.Conv2d):
    """Convolution whose stride equals its kernel, as one matmul over channels-last patches.

    Input (..., H, W, C), output (..., H/k, W/k, C'). Masks are whole regions, so no patch mixes visible and masked
    pixels and the same matmul serves maps and tiles.
    """

    def __init__(self, in_channels: int, out_channels: int, patch: int):
        super().__init__(in_channels, out_channels, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        *lead, h, w, c = x.shape
        k = self.kernel_size[0]
        x = x.reshape(*lead, h // k, k, w // k, k, c).transpose(-4, -3).flatten(-3)  # (..., h/k, w/k, k*k*C)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class DepthwiseConv(nn.Conv2d):
    """7x7 depthwise convolution on a support: the only operation that looks across tiles."""

    def __init__(self, dim: int, kernel_size: int = 7):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, support: Support) -> Tensor:
        return support.conv(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Pointwise expansion to 4C, GELU, GRN or another norm, pointwise projection back to C."""

    def __init__(self, dim: int, grn: str, norm: str):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim, grn) if norm == "grn" else None
        self.norm = None if norm == "grn" else OTHERS[norm](4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, support: Support) -> Tensor:
        x, norm = F.gelu(self.fc1(x)), self.norm if self.grn is None else self.grn
        return self.fc2(x if norm is None else norm(x, support))


class Block(nn.Module):
    """ConvNeXt V2 block (arXiv 2301.00808 figure 5): depthwise 7x7, LayerNorm, MLP with GRN, residual.

    norm: one of `norms.NORMS` in GRN's place; `none` is ConvNeXt V1's block (arXiv 2201.03545): no norm there, and
    LayerScale on the branch. On packed tiles with native kernels and GRN the modules after the convolution only hold
    parameters: their hooks do not run.
    """

    def __init__(self, dim: int, grn: str = "per_image", norm: str = "grn"):
        super().__init__()
        self.conv_dw = DepthwiseConv(dim)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, grn, norm)
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE)) if norm == "none" else None

    def forward(self, x: Tensor, support: Support) -> Tensor:
        y = self.conv_dw(x, support)
        if support.fused and self.mlp.grn is not None:
            return self._after_conv(x, y)
        y = self.mlp(self.norm(y), support)
        return x + (y if self.gamma is None else self.gamma * y)

    def _after_conv(self, x: Tensor, y: Tensor) -> Tensor:
        """The same as one op, on rows (positions, C); its matmuls run in autocast's dtype where that is on."""
        mlp, kind = self.mlp, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else mlp.fc1.weight.dtype
        linears = [p.to(dtype) for p in (*_parameters(mlp.fc1), *_parameters(mlp.fc2))]
        weights = Weights(*_parameters(self.norm), *linears[:2], *_parameters(mlp.grn), *linears[2:])
        groups = 1 if mlp.grn.mode == "batch" else x.shape[0]
        out, *_ = block_mlp(x.flatten(0, -2), y.flatten(0, -2), *weights, groups, True)
        return out.view(x.shape)


def _parameters(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias
