"""Products of rows with a constant matrix, by the fastest library of the processor.

PyTorch multiplies float32 matrices on x86 by MKL, which runs AVX2 kernels on AMD processors, also
where they have AVX-512. oneDNN, which PyTorch contains for convolutions, is twice as fast there.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fxshap.ops.library import LIBRARY

#: The fewest multiplications for which oneDNN is faster despite its longer setup.
MIN_MULTIPLICATIONS = 2**20


def multiply_rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return ``rows @ matrix``.

    Parameters
    ----------
    rows : Tensor
        Shape (..., n).
    matrix : Tensor
        Shape (n, m); no gradient of it is computed.
    """
    if not runs_by_onednn(rows, matrix):
        return rows @ matrix
    product: Tensor = MULTIPLY_ROWS(rows, matrix)
    return product


def runs_by_onednn(rows: Tensor, matrix: Tensor) -> bool:
    """Return True if oneDNN is faster and may be used: its product has no derivative."""
    return (
        rows.is_cpu
        and rows.dtype == matrix.dtype == torch.float32
        and rows.numel() * matrix.shape[1] >= MIN_MULTIPLICATIONS
        and not (torch.is_grad_enabled() and (rows.requires_grad or matrix.requires_grad))
        and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """Return True on AMD processors with AVX-512, if PyTorch has both libraries."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and is_amd()
    )


def is_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True if AMD has made the processor."""
    if cpuinfo.exists():
        return "AuthenticAMD" in cpuinfo.read_text()
    return "AuthenticAMD" in platform.processor()  # on Windows


def multiply_by_onednn(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return ``rows @ matrix`` by oneDNN."""
    flat = rows.reshape(-1, rows.shape[-1]).contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(flat, matrix.t(), None, "none", [], "")
    return product.view(*rows.shape[:-1], matrix.shape[1])


def shape_of_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return an empty tensor like the product, for fake tensors."""
    return rows.new_empty(*rows.shape[:-1], matrix.shape[1])


# One operator, which compiled code calls as it is.
LIBRARY.define("multiply_rows(Tensor rows, Tensor matrix) -> Tensor")
LIBRARY.impl("multiply_rows", multiply_by_onednn, "CPU")
LIBRARY.impl("multiply_rows", shape_of_product, "Meta")
MULTIPLY_ROWS = torch.ops.fxshap.multiply_rows.default
