"""Layers of the ConvNeXt V2 block on channels-last features, under timm's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.kernels.mlp import LAYER_NORM_EPS, Weights
from fcmae.kernels.mlp_op import block_mlp
from fcmae.kernels.reference import response
from fcmae.models.support import Support

GRN_MODES = ("per_image", "batch")


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


class GRN(nn.Module):
    """Global response normalization (arXiv 2301.00808 §4, algorithm 1), statistics in fp32.

    G(x) = ||x_c||_2 over the visible positions, N(x) = G / (mean_c G + eps) as in the authors' dense code (the text
    says sum), y = x + gamma * x * N + beta. `per_image` pools over each image's own positions; `batch` over the
    positions of the whole (local) batch, as the authors' sparse code does.
    """

    def __init__(self, dim: int, mode: str = "per_image"):
        super().__init__()
        if mode not in GRN_MODES:
            raise UsageError(f"unknown sparse.grn {mode!r}; known: {', '.join(GRN_MODES)}")
        self.mode = mode
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, support: Support) -> Tensor:
        pooled = tuple(range(0 if self.mode == "batch" else 1, x.ndim - 1))
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = support.visible(x).to(wide).square().sum(dim=pooled, keepdim=True)
        _, n, _ = response(squares)
        return x + torch.addcmul(self.bias, self.weight, x * n).to(x.dtype)


class Mlp(nn.Module):
    """Pointwise expansion to 4C, GELU, GRN, pointwise projection back to C."""

    def __init__(self, dim: int, grn: str):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim, grn)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, support: Support) -> Tensor:
        return self.fc2(self.grn(F.gelu(self.fc1(x)), support))


class Block(nn.Module):
    """ConvNeXt V2 block (arXiv 2301.00808 figure 5): depthwise 7x7, LayerNorm, MLP with GRN, residual.

    On packed tiles with native kernels the modules after the convolution only hold parameters: their hooks do not run.
    """

    def __init__(self, dim: int, grn: str = "per_image"):
        super().__init__()
        self.conv_dw = DepthwiseConv(dim)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, grn)

    def forward(self, x: Tensor, support: Support) -> Tensor:
        y = self.conv_dw(x, support)
        if support.fused:
            return self._after_conv(x, y)
        return x + self.mlp(self.norm(y), support)

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
