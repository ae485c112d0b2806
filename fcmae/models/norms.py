"""The norm inside a ConvNeXt block, after the GELU, on 4C channels-last features: GRN, or what it was compared with.

ConvNeXt V2 (arXiv 2301.00808 §4) compares feature normalizations in this place. `none` leaves it empty: ConvNeXt V1's
block, which has LayerScale on its output instead (`fcmae.models.layers.Block`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.errors import UsageError, nearest
from fcmae.kernels.reference import response
from fcmae.models.support import Support

GRN_MODES = ("per_image", "batch")


class GRN(nn.Module):
    """Global response normalization (arXiv 2301.00808 §4, algorithm 1), statistics in fp32.

    G(x) = ||x_c||_2 over the visible positions, N(x) = G / (mean_c G + eps) as in the authors' dense code (the text
    says sum), y = x + gamma * x * N + beta. `per_image` pools over each image's own positions; `batch` over the
    positions of the whole (local) batch, as the authors' sparse code does.
    """

    def __init__(self, dim: int, mode: str = "per_image"):
        super().__init__()
        self.mode = mode
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, support: Support) -> Tensor:
        pooled = tuple(range(0 if self.mode == "batch" else 1, x.ndim - 1))
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = support.visible(x).to(wide).square().sum(dim=pooled, keepdim=True)
        _, n, _ = response(squares)
        return x + torch.addcmul(self.bias, self.weight, x * n).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor, support: Support) -> Tensor:
        return super().forward(x)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization (arXiv 1502.03167) over the visible positions of the local batch alone, statistics in fp32.

    In evaluation it uses the running statistics. Raises UsageError in training on a single visible position, which has
    no variance.
    """

    def forward(self, x: Tensor, support: Support) -> Tensor:
        rows = support.rows(x).to(torch.promote_types(x.dtype, torch.float32))  # (positions, C)
        if not self.training:
            y = F.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return support.from_rows(y, x).to(x.dtype)
        if rows.shape[0] < 2:
            raise UsageError("norm=bn needs two visible positions in a batch; this one has a single one at a stage")
        self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            rows, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )
        return support.from_rows(y, x).to(x.dtype)


class LRN(nn.Module):
    """Local response normalization over five neighbouring channels, with AlexNet's constants.

    x / (2 + alpha / 5 * (sum of the neighbours' x^2))^0.75, alpha = 1e-4: `torch.nn.functional.local_response_norm`,
    which like Caffe's AlexNet divides alpha by the number of channels summed. It has no parameters; its constants are a
    buffer, so that weights tell that they are of this norm and not of none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constants", torch.tensor([5, 1e-4, 0.75, 2.0]))

    def forward(self, x: Tensor, support: Support) -> Tensor:
        rows = x.flatten(0, -2)[..., None].to(torch.promote_types(x.dtype, torch.float32))  # (positions, C, 1)
        return F.local_response_norm(rows, 5, alpha=1e-4, beta=0.75, k=2.0).view(x.shape).to(x.dtype)


# Those in the place of GRN, by the setting's name; `none` is no module.
OTHERS = {"ln": LayerNorm, "bn": BatchNorm, "lrn": lambda dim: LRN(), "none": lambda dim: None}
NORMS = ("grn", *OTHERS)


def check_norm(norm: str, grn: str) -> None:
    """Raises UsageError for a norm that is unknown, or GRN's pooling asked for where there is no GRN."""
    if norm not in NORMS:
        raise UsageError(f"unknown model.norm {norm!r}; known: {', '.join(NORMS)}{nearest(norm, NORMS)}")
    if grn not in GRN_MODES:
        raise UsageError(f"unknown sparse.grn {grn!r}; known: {', '.join(GRN_MODES)}")
    if norm != "grn" and grn != GRN_MODES[0]:
        raise UsageError(f"sparse.grn={grn} is of GRN, and model.norm={norm} has none; leave out one of the two")
