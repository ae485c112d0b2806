"""The MLP of a ConvNeXt V2 block with its LayerNorm and residual, forward and backward, around the vendor's matmuls.

    out = shortcut + fc2(GRN(gelu(fc1(LayerNorm(y)))))

One 4C tensor is kept for the backward, h = fc1's product without its bias; GELU's and GRN's outputs are computed again,
which costs less than reading them back. Rows are taken in chunks of whole GRN groups, small enough for a CPU's caches.

y, shortcut: (R, C), R = groups * n. weights as in nn.Linear. `kernels` is a module with the functions of `reference`.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """norm: LayerNorm's, (C,). w1 (F, C), b1 (F,), w2 (C, F), b2 (C,) in the dtype of the matmuls. gamma, beta (F,)."""

    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor
    gamma: Tensor
    beta: Tensor
    w2: Tensor
    b2: Tensor


LAYER_NORM_EPS = 1e-6


def forward(
    kernels: ModuleType, shortcut: Tensor, y: Tensor, w: Weights, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out (R, C) in shortcut's dtype, and for the backward: h (R, F), LayerNorm's mean, rstd (R, 1), squares (G, F)."""
    y, (rows, _), features = y.contiguous(), y.shape, w.w1.shape[0]
    n = rows // groups
    shortcut = shortcut.contiguous()
    out, h = torch.empty_like(shortcut), y.new_empty(rows, features, dtype=w.w1.dtype)
    means, rstds, squares = [], [], []
    b1, gamma, beta = (p.to(_wide(h)) for p in (w.b1, w.gamma, w.beta))
    chunks = _chunks(kernels, groups, n, h)
    a = torch.empty_like(h[chunks[0]])  # once for all chunks: it stays in the caches
    for r in chunks:
        hg, z = h[r].view(-1, n, features), a[: r.stop - r.start]
        normed, mean, rstd = _layer_norm(y[r], w)
        torch.mm(normed.to(h.dtype), w.w1.t(), out=h[r])
        squares.append(kernels.gelu_grn(hg, b1, gamma, beta, z.view_as(hg)))
        torch.add(shortcut[r], w.b2, out=out[r])
        _add_product(out[r], z, w.w2.t())
        means.append(mean), rstds.append(rstd)
    return out, h, torch.cat(means), torch.cat(rstds), torch.cat(squares)


def backward(
    kernels: ModuleType,
    grad: Tensor,
    y: Tensor,
    w: Weights,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    squares: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of y and of each weight (the shortcut's is grad itself)."""
    y, (groups, features) = y.contiguous(), squares.shape
    n = h.shape[0] // groups
    b1, gamma, beta = (p.to(_wide(h)) for p in (w.b1, w.gamma, w.beta))
    norm_weight, norm_bias = w.norm_weight.to(_wide(y)), w.norm_bias.to(_wide(y))
    dy, sums = torch.empty_like(y), None
    chunks = _chunks(kernels, groups, n, h)
    a, dh_all = torch.empty_like(h[chunks[0]]), torch.empty_like(h[chunks[0]])
    normed_all = torch.empty_like(y[chunks[0]], dtype=h.dtype)
    for r in chunks:
        size = r.stop - r.start
        g, z, dh, normed = grad[r].to(h.dtype), a[:size], dh_all[:size], normed_all[:size]
        torch.mm(g, w.w2, out=dh)  # the gradient of GRN's output, until it becomes that of h
        hg, zg, dhg = (t.view(-1, n, features) for t in (h[r], z, dh))
        squares_r = squares[r.start // n : r.stop // n]
        db1, d_gamma, d_beta = kernels.gelu_grn_backward(hg, b1, gamma, beta, squares_r, dhg, zg)
        dnw, dnb = kernels.layer_norm_backward(dh @ w.w1, y[r], mean[r], rstd[r], norm_weight, norm_bias, dy[r], normed)
        sums = _add(sums, (dnw, dnb, (dh.t(), normed), db1, d_gamma, d_beta, (g.t(), z), g.sum(0, dtype=_wide(g))))
    return dy, *(s.to(p.dtype) for s, p in zip(sums, w, strict=True))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one pass where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _add(sums: list[Tensor] | None, parts: tuple) -> list[Tensor]:
    """Running sums in chunk order, in fp32 at least; a pair stands for its matrix product."""
    if sums is None:
        first = [p[0] @ p[1] if isinstance(p, tuple) else p for p in parts]
        return [t.to(_wide(t)) for t in first]
    for total, part in zip(sums, parts, strict=True):
        if isinstance(part, tuple):
            _add_product(total, *part)
        else:
            total.add_(part)
    return sums


def _layer_norm(y: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(y)  # torch's kernels for the GPU take one dtype
    return torch.native_layer_norm(
        y.to(wide), y.shape[1:], w.norm_weight.to(wide), w.norm_bias.to(wide), LAYER_NORM_EPS
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(kernels: ModuleType, groups: int, n: int, h: Tensor) -> list[slice]:
    """Rows of whole groups, as many as `kernels` wants in a chunk."""
    count = -(-groups // kernels.mlp_groups(n, h.shape[1], h.element_size()))
    size = -(-groups // count)
    return [slice(g * n, min(g + size, groups) * n) for g in range(0, groups, size)]
