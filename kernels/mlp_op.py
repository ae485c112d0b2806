"""The op `fcmae::block_mlp`: everything of a ConvNeXt V2 block after its convolution; schema, fake, autograd, devices.

Its body is `mlp.forward` on the reference's passes, and so the fallback on every device; with `native`, on the device's
own. The gradient is one op again; a gradient of that, which training never asks for, is composed of PyTorch's ops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.kernels import mlp, reference
from fcmae.kernels.devices import kernels_for
from fcmae.kernels.mlp import Weights

SCHEMA = ", ".join(f"Tensor {name}" for name in Weights._fields)


@torch.library.custom_op(
    "fcmae::block_mlp",
    mutates_args=(),
    schema=f"(Tensor shortcut, Tensor y, {SCHEMA}, SymInt groups, bool native) -> ({', '.join(['Tensor'] * 5)})",
)
def block_mlp(shortcut, y, *rest):
    """`mlp.forward`: shortcut, y (R, C), then `Weights`, the number of GRN groups, whether to use native kernels."""
    *weights, groups, native = rest
    w = Weights(*weights)
    with torch.autocast(y.device.type, enabled=False):
        return mlp.forward(kernels_for(y.device, native), shortcut, y, w, groups)


@block_mlp.register_fake
def _(shortcut, y, *rest):
    *weights, groups, _ = rest
    w = Weights(*weights)
    rows, features = y.shape[0], w.w1.shape[0]
    wide = torch.promote_types(y.dtype, torch.float32)
    stat = y.new_empty(rows, 1, dtype=wide)
    h = y.new_empty(rows, features, dtype=w.w1.dtype)
    squares = y.new_empty(groups, features, dtype=torch.promote_types(h.dtype, torch.float32))
    return torch.empty_like(shortcut, memory_format=torch.contiguous_format), h, stat, torch.empty_like(stat), squares


@torch.library.custom_op(
    "fcmae::block_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor y, {SCHEMA}, Tensor h, Tensor mean, Tensor rstd, Tensor squares, bool native) "
    f"-> ({', '.join(['Tensor'] * 9)})",
)
def block_mlp_backward(grad, y, *rest):
    """`mlp.backward`."""
    *weights, h, mean, rstd, squares, native = rest
    w = Weights(*weights)
    with torch.autocast(y.device.type, enabled=False):
        return mlp.backward(kernels_for(y.device, native), grad, y, w, h, mean, rstd, squares)


@block_mlp_backward.register_fake
def _(grad, y, *rest):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, *rest[:8]))


def composed(shortcut: Tensor, y: Tensor, w: Weights, groups: int) -> Tensor:
    """The same of PyTorch's own differentiable ops: what `block_mlp` is tested against."""
    wide = torch.promote_types(y.dtype, torch.float32)
    norm = (p.to(wide) for p in (w.norm_weight, w.norm_bias))
    normed = F.layer_norm(y.to(wide), y.shape[1:], *norm, mlp.LAYER_NORM_EPS)
    a = F.gelu(F.linear(normed.to(w.w1.dtype), w.w1, w.b1)).view(groups, -1, w.w1.shape[0])
    _, response, _ = reference.response(a.to(torch.promote_types(a.dtype, torch.float32)).square().sum(1))
    z = a + torch.addcmul(w.beta, w.gamma, a * response[:, None]).to(a.dtype)
    return shortcut + F.linear(z.flatten(0, 1), w.w2, w.b2)


def _save(ctx, inputs, output):
    _, y, *weights, ctx.groups, ctx.native = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, *weights, *kept)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    grads = block_mlp_backward(grad.contiguous(), *ctx.saved_tensors, ctx.native)
    return grad, *grads, None, None


def _save_backward(ctx, inputs, output):
    grad, y, *weights, _, _, _, squares, _ = inputs
    ctx.groups = squares.shape[0]
    ctx.save_for_backward(grad, y, *weights)


def _backward_of_backward(ctx, *grads):
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        grad, y, *weights = leaves
        out = composed(torch.zeros_like(grad), y, Weights(*weights), ctx.groups)
        first = torch.autograd.grad(out, [y, *weights], grad, create_graph=True)
        second = torch.autograd.grad(first, leaves, grads, allow_unused=True)
    return *second, None, None, None, None, None


block_mlp.register_autograd(_backward, setup_context=_save)
block_mlp_backward.register_autograd(_backward_of_backward, setup_context=_save_backward)
