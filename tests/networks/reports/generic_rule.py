"""Operators without a rule of their own: custom ones, and factorisations of matrices."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.networks.mlp import MLP, Between
from tests.networks.reports.report import Report

report = partial(Report, family="generic rule")


@torch.library.custom_op("fxshap_tests::snake", mutates_args=())
def snake(x: Tensor) -> Tensor:
    """x + sin(3x)^2, an activation that is one operator (Ziyin et al. 2020)."""
    return x + torch.sin(3 * x) ** 2


@snake.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep_input(ctx: Any, inputs: Any, output: Any) -> None:
    """Save the arguments for the backward pass."""
    ctx.save_for_backward(*inputs)


def snake_backward(ctx: Any, grad: Tensor) -> Tensor:
    """Multiply by 1 + 3 sin(6x)."""
    (x,) = ctx.saved_tensors
    return grad * (1 + 3 * torch.sin(6 * x))


snake.register_autograd(snake_backward, setup_context=keep_input)


@torch.library.custom_op("fxshap_tests::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x sigmoid(gate) as one operator of two arguments."""
    return x * torch.sigmoid(gate)


@gated.register_fake
def _(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


def gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply by the derivatives of both factors."""
    x, gate = ctx.saved_tensors
    s = torch.sigmoid(gate)
    return grad * s, grad * x * s * (1 - s)


gated.register_autograd(gated_backward, setup_context=keep_input)


def gated_halves(h: Tensor) -> Tensor:
    return gated(*(half.contiguous() for half in h.chunk(2, 1)))


def two_matrices(h: Tensor) -> Tensor:
    return h[:, :12].reshape(-1, 2, 3, 2)


def orthogonal(h: Tensor) -> Tensor:
    q, r = torch.linalg.qr(two_matrices(h))
    return torch.cat([q.flatten(1).abs(), r.diagonal(dim1=-2, dim2=-1).abs().flatten(1)], 1)


def symmetric(h: Tensor) -> Tensor:
    """A symmetric positive definite matrix, as covariances of signals are."""
    a = h[:, :9].reshape(-1, 3, 3)
    return a @ a.mT + 0.5 * torch.eye(3).to(h)


def factors(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(symmetric(h)).flatten(1)


def spectrum(h: Tensor) -> Tensor:
    """The logarithms of the eigenvalues (Huang and Van Gool 2017)."""
    return torch.linalg.eigvalsh(symmetric(h)).log()


def log_eig(h: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric(h))
    return (vectors @ torch.diag_embed(values.log()) @ vectors.mT).flatten(1)


def exponential(h: Tensor) -> Tensor:
    a = torch.tanh(h[:, :9]).reshape(-1, 3, 3)
    return torch.matrix_exp(a - a.mT).flatten(1)


def pseudo_inverse(h: Tensor) -> Tensor:
    return torch.tanh(torch.linalg.pinv(two_matrices(h))).flatten(1)


def solved(h: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(symmetric(h))
    return torch.cholesky_solve(h[:, 9:12, None], factor).tanh().flatten(1)


def log_volume(h: Tensor) -> Tensor:
    return torch.stack([torch.logdet(symmetric(h)), torch.linalg.slogdet(symmetric(h))[1]], 1)


def finite_differences(h: Tensor) -> Tensor:
    (slope,) = torch.gradient(h.tanh(), spacing=0.5, dim=1)
    return slope * h


def strided_windows(h: Tensor) -> Tensor:
    """Overlapping windows by ``as_strided`` of a copy."""
    windows = h.contiguous().as_strided((h.shape[0], 5, 4), (h.shape[1], 2, 1))
    return torch.softmax(windows, -1).flatten(1)


REPORTS = [
    report("custom_snake", architecture=lambda: MLP(snake, snake), source="torch.library"),
    report("custom_gate", architecture=lambda: Between(gated_halves), source="torch.library"),
    report("orthogonal", architecture=lambda: Between(orthogonal), source="torch.linalg.qr"),
    report("cholesky_factors", architecture=lambda: Between(factors), source="torch.linalg"),
    report("log_eigenvalues", architecture=lambda: Between(spectrum), source="SPDNet"),
    report("log_eig", architecture=lambda: Between(log_eig), source="SPDNet"),
    report("matrix_exponential", architecture=lambda: Between(exponential), source="rotations"),
    report("pseudo_inverse", architecture=lambda: Between(pseudo_inverse), source="ELM"),
    report("cholesky_solved", architecture=lambda: Between(solved), source="Gaussian processes"),
    report("log_volume", architecture=lambda: Between(log_volume), source="flows"),
    report(
        "finite_differences",
        architecture=lambda: Between(finite_differences),
        source="torch.gradient",
    ),
    report("strided_windows", architecture=lambda: Between(strided_windows), source="as_strided"),
]
