"""What any module with `reference`'s functions on rows must pass, and the inputs for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fcmae.kernels import reference
from helpers import TOLERANCE, close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS = TOLERANCE[torch.float32]
# Groups, rows and columns: one of each; odd and masked ones; several chunks of several steps, in one group and in more.
SHAPES = [(1, 1, 1), (3, 1, 40), (2, 19, 300), (1, 333, 5), (3, 150, 48)]
ROWS = [(1, 5), (70, 40), (37, 96), (300, 5), (37, 300), (3, 2816)]


def drawn(*shape, dtype=torch.float32, spread=1.0, seed=0, device="cpu"):
    """Normal values, the same for a shape and a seed."""
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=g) * spread).to(dtype).to(device)


def gelu_inputs(shape, dtype, device="cpu", spread=2.0):
    """h, bias, gamma, beta and grad."""
    f = shape[-1]
    vectors = [drawn(f, seed=seed, device=device) for seed in (2, 3, 4)]
    return (
        drawn(*shape, dtype=dtype, spread=spread, device=device),
        *vectors,
        drawn(*shape, dtype=dtype, seed=1, device=device),
    )


def exact(name, *args):
    """A function of the reference on copies in float64; what it fills comes back in the arguments."""
    wide = [a.double() for a in args]
    return getattr(reference, name)(*wide), wide


def run_gelu(kernels, h, bias, gamma, beta, grad):
    """z, squares, gradients of h, bias, gamma and beta, and z as the backward fills it."""
    z, again, dh = torch.empty_like(h), torch.empty_like(h), grad.clone()
    squares = kernels.gelu_grn(h, bias, gamma, beta, z)
    sums = kernels.gelu_grn_backward(h, bias, gamma, beta, squares, dh, again)
    return z, squares, dh, *sums, again


def check_gelu(kernels, h, bias, gamma, beta, grad):
    """Forward and backward of GELU and GRN against the reference in float64."""
    z, squares, dh, d_bias, d_gamma, d_beta, again = run_gelu(kernels, h, bias, gamma, beta, grad)
    theirs, (*_, their_z) = exact("gelu_grn", h, bias, gamma, beta, torch.empty_like(h))
    assert squares.dtype == torch.float32
    close(squares, theirs, SUMS)
    close(z, their_z, TOLERANCE[h.dtype])
    close(again, their_z, TOLERANCE[h.dtype])
    sums, (*_, their_dh, _) = exact("gelu_grn_backward", h, bias, gamma, beta, theirs, grad, torch.empty_like(h))
    close(dh, their_dh, TOLERANCE[h.dtype])
    for ours, theirs in zip((d_bias, d_gamma, d_beta), sums, strict=True):
        assert ours.dtype == torch.float32
        # Sums of stored values, some of them rounded already: gelu and its derivative wait in h's dtype on a CPU.
        close(ours, theirs, TOLERANCE[h.dtype])


def check_tails(kernels, dtype, device="cpu"):
    """Negative up to -20, and positive up to 20: each sign alone, so that the large values do not hide the small."""
    _, bias, gamma, beta, grad = gelu_inputs((1, 64, 64), dtype, device)
    steps = torch.linspace(0, 20, 64 * 64).reshape(1, 64, 64).to(dtype).to(device)
    for h in (steps, -steps):
        check_gelu(kernels, h, torch.zeros_like(bias), gamma, beta, grad)


def check_exactness(kernels, device="cpu"):
    """GELU to fp32's own accuracy, and relatively too in the negative tail, where 1 + erf has lost its digits."""
    h, z = torch.linspace(-11, 11, 2048, device=device).reshape(1, 32, 64), torch.empty(1, 32, 64, device=device)
    zeros = torch.zeros(64, device=device)
    kernels.gelu_grn(h, zeros, zeros, zeros, z)
    wanted = 0.5 * h.double() * torch.erfc(-h.double() / 2**0.5)
    assert ((z - wanted).abs() < 3e-7 * h.abs().clamp(min=1)).all()
    tail, theirs = h < -4, F.gelu(h)
    assert (z / wanted - 1)[tail].abs().max() < 3e-3 < (theirs / wanted - 1)[tail].abs().max()


def check_huge(kernels, size, device="cpu"):
    """Finite values give finite results, and a NaN stays one: a diverged network must look diverged."""
    h, bias, gamma, beta, grad = gelu_inputs((1, 4, 8), torch.float32, device)
    h, zeros = size * h.sign(), torch.zeros_like(bias)
    z, _, dh, *_ = run_gelu(kernels, h, zeros, zeros, beta, grad)
    close(z, h.clamp(min=0) + beta, SUMS)
    close(dh, (h > 0) * grad, SUMS)
    h[0, 1, 2] = torch.nan
    z, squares, *_ = run_gelu(kernels, h, zeros, zeros, beta, grad)
    assert squares.isnan().sum() == 1 and z[0, 1, 2].isnan()


def check_norm(kernels, shape, dtype, device="cpu"):
    """LayerNorm's backward against the reference in float64."""
    n, c = shape
    drawn_y = drawn(n, c, spread=3, device=device) + 5  # a mean well above the deviation
    weight, bias = drawn(c, seed=1, device=device), drawn(c, seed=2, device=device)
    for y, out in ((drawn_y, dtype), (drawn_y.to(dtype), torch.float32)):
        _, mean, rstd = torch.native_layer_norm(y.float(), (c,), weight, bias, 1e-6)
        grad = drawn(n, c, dtype=out, seed=3, device=device)
        dy, normed = torch.empty_like(y), torch.empty_like(grad)
        ours = kernels.layer_norm_backward(grad, y, mean, rstd, weight, bias, dy, normed)
        theirs, (*_, their_dy, their_normed) = exact(
            "layer_norm_backward", grad, y, mean, rstd, weight, bias, dy, normed
        )
        close(dy, their_dy, TOLERANCE[y.dtype])
        close(normed, their_normed, TOLERANCE[out])
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == torch.float32
            close(a, b, SUMS)


def check_repeats(kernels, device="cpu"):
    """Bit for bit, twice."""
    inputs = gelu_inputs((1, 400, 40), torch.bfloat16, device)
    for a, b in zip(run_gelu(kernels, *inputs), run_gelu(kernels, *inputs), strict=True):
        assert torch.equal(a, b)
