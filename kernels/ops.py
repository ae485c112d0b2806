"""The ops on packed visible tiles: schema, fake, autograd, and which kernel serves which device.

Two ops are closed under differentiation, so that gradients of any order need no further op:
the input gradient of `tile_conv` is `tile_conv` with the weight flipped, and both gradients of
`tile_conv_weight_grad`, which is bilinear in its inputs, are `tile_conv` again.

An op's body runs the PyTorch reference, or with `native` the device's own kernel where there is one. `mask, keep, slot`
are the fields of `Tiles`. Autocast is off inside: storage is the caller's choice, arithmetic the kernels'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.kernels.devices import kernels_for
from fcmae.kernels.tiles import Tiles


@torch.library.custom_op("fcmae::tile_conv", mutates_args=())
def tile_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, keep: Tensor, slot: Tensor, native: bool
) -> Tensor:
    """Submanifold depthwise convolution; see `reference.tile_conv`."""
    with torch.autocast(x.device.type, enabled=False):
        return kernels_for(x.device, native).tile_conv(x, weight, bias, Tiles(mask, keep, slot))


@tile_conv.register_fake
def _(x, weight, bias, mask, keep, slot, native):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fcmae::tile_conv_weight_grad", mutates_args=())
def tile_conv_weight_grad(
    x: Tensor, grad: Tensor, k: int, mask: Tensor, keep: Tensor, slot: Tensor, native: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias gradients of `tile_conv`; see `reference.tile_conv_weight_grad`."""
    with torch.autocast(x.device.type, enabled=False):
        return kernels_for(x.device, native).tile_conv_weight_grad(x, grad, k, Tiles(mask, keep, slot))


@tile_conv_weight_grad.register_fake
def _(x, grad, k, mask, keep, slot, native):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    c = x.shape[-1]
    return x.new_empty((c, 1, k, k), dtype=wide), x.new_empty((c,), dtype=wide)


def _save_conv(ctx, inputs, output):
    x, weight, bias, *tiles, ctx.native = inputs
    ctx.save_for_backward(x, weight, *tiles)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx, grad):
    x, weight, *tiles = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = tile_conv(grad, weight.flip(-1, -2), None, *tiles, ctx.native)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_bias = tile_conv_weight_grad(x, grad, weight.shape[-1], *tiles, ctx.native)
        grad_weight = grad_weight.to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None, None, None


def _save_weight_grad(ctx, inputs, output):
    x, grad, _, *tiles, ctx.native = inputs
    ctx.save_for_backward(x, grad, *tiles)


def _weight_grad_backward(ctx, weight, bias):
    x, grad, *tiles = ctx.saved_tensors
    grad_x = tile_conv(grad, weight.flip(-1, -2), None, *tiles, ctx.native)
    grad_grad = tile_conv(x, weight, bias, *tiles, ctx.native)
    return grad_x, grad_grad, None, None, None, None, None


tile_conv.register_autograd(_conv_backward, setup_context=_save_conv)
tile_conv_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_weight_grad)
