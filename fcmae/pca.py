"""Principal components of patches as the target of reconstruction (arXiv 2111.06377 table 1d, 96 of them)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError


class PrincipalComponents(nn.Module):
    """The mean (N,) and `count` orthonormal directions (count, N) of patches of N numbers, as buffers.

    Until they are fitted or loaded they are NaN, and so is a loss against them. Raises UsageError for a count that is
    not between 1 and N.
    """

    def __init__(self, numbers: int, count: int):
        super().__init__()
        if not 1 <= count <= numbers:
            raise UsageError(f"loss.pca={count} must lie between 1 and the {numbers} numbers of a patch")
        self.register_buffer("mean", torch.full((numbers,), float("nan")))
        self.register_buffer("basis", torch.full((count, numbers), float("nan")))

    @property
    def fitted(self) -> bool:
        """Whether there is a basis."""
        return bool(self.basis.isfinite().all())

    def set(self, mean: Tensor, basis: Tensor) -> None:
        """Take what `principal_components` found."""
        self.mean.copy_(mean)
        self.basis.copy_(basis)

    def project(self, patches: Tensor) -> Tensor:
        """Patches (..., N) to their components (..., count), largest variance first."""
        return (patches - self.mean.to(patches.dtype)) @ self.basis.to(patches.dtype).T

    def restore(self, components: Tensor) -> Tensor:
        """Components (..., count) to the patches (..., N) nearest to them."""
        return components @ self.basis.to(components.dtype) + self.mean.to(components.dtype)


def principal_components(parts: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor, float, int]:
    """Mean (N,) and the top `count` principal directions (count, N) of patches that come in parts (n, N), in float64.

    Also the share of the variance that they hold, and how many patches there were. Memory is that of one part and N x N
    sums. A direction's sign is such that its largest entry is positive. Raises UsageError for fewer patches than
    directions.
    """
    total = products = torch.zeros((), dtype=torch.float64)
    n = 0
    for part in parts:
        part = part.double()
        total, products, n = total + part.sum(0), products + part.T @ part, n + len(part)
    if n < count:
        raise UsageError(f"loss.pca={count} needs as many patches to find directions in; the data has {n}")
    mean = total / n
    variances, vectors = torch.linalg.eigh(products / n - torch.outer(mean, mean))  # ascending
    basis = vectors.T.flip(0)[:count]
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    variances = variances.flip(0).clamp(min=0)
    share = (variances[:count].sum() / variances.sum()).item() if variances.sum() > 0 else 1.0
    return mean, basis * largest.sign(), share, n
