"""A weight matrix in the layout in which its device multiplies fastest.

On CPUs that is oneDNN's blocked layout. Measured with the small model's matrices on two cores of an AMD EPYC (AVX-512,
GB/s of weights read for one row, before and after): float32 11 to 15 with one thread and 11.6 to 24 with two (torch's
own product of a matrix and one row does not use the second), bfloat16 8.7 to 15 and 12 to 25. It is also the faster one
for 2 to 64 rows. Only one of the two layouts is kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional


class Matrix:
    """`x @ weight.T + bias` for x [n, columns], weight [rows, columns], bias [rows] or None."""

    __slots__ = ("_weight", "bias", "packed", "shape")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.bias = bias
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.packed = weight.device.type == "cpu" and weight.numel() > 0 and packs(weight.dtype)
        self._weight = _pack(weight) if self.packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return product
        return functional.linear(x, self._weight, self.bias)

    def dense(self) -> torch.Tensor:
        """The weight as a plain tensor [rows, columns]: a copy where it is packed."""
        return self._weight.to_dense() if self.packed else self._weight

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.shape[0] * self.shape[1] * self._weight.element_size() + bias


def _pack(weight: torch.Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this build and this CPU multiply packed matrices of this dtype, and get them right."""
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if not available or dtype not in (torch.float32, torch.bfloat16):
        return False
    weight = torch.arange(-64, 64, dtype=dtype).reshape(8, 16) / 64
    x = torch.arange(16, dtype=dtype).reshape(1, 16) / 16
    try:
        product = torch.ops.mkldnn._linear_pointwise(x, _pack(weight), None, "none", [], "")
    except (RuntimeError, AttributeError):  # no such operator, or the CPU lacks the instructions
        return False
    return torch.allclose(product, functional.linear(x, weight), atol=1e-2)
