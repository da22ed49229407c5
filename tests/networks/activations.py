"""Activations as modules, functions and methods, in place or not, used once or many times."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import MLP
from tests.networks.network import Network

network = partial(Network, family="activations")


def _reused(activation: nn.Module) -> nn.Module:
    return MLP(activation, activation, activation, outputs=1)


def _exponentials(h: Tensor) -> Tensor:
    return torch.exp(h) + 0.5 * torch.expm1(-h)


def _powers(h: Tensor) -> Tensor:
    square = h.square()
    roots = torch.sqrt(0.1 + square) + torch.rsqrt(0.3 + square)
    return roots + 0.02 * h.pow(3) + (1.2 + h**2).reciprocal()


def _logarithms(h: Tensor) -> Tensor:
    return torch.log(0.5 + h.exp()) + 2 * torch.log1p(h.abs())


def _erf_sin_cos(h: Tensor) -> Tensor:
    return torch.erf(h) + torch.sin(2 * h) - h.cos()


def _abs_clamp(h: Tensor) -> Tensor:
    return h.abs() + h.clamp(-0.5, 0.8) - h.clamp(min=0.2)


def _shrink(h: Tensor) -> Tensor:
    return F.softshrink(h, 0.3) + F.hardshrink(h, 0.4) + F.tanhshrink(h)


NETWORKS = [
    network("relu_module", architecture=lambda: MLP(nn.ReLU(), nn.ReLU()), shap_exact=True),
    network("relu_functional", architecture=lambda: MLP(F.relu, torch.relu, Tensor.relu)),
    network(
        "relu_in_place",
        architecture=lambda: MLP(
            nn.ReLU(inplace=True), partial(F.relu, inplace=True), Tensor.relu_
        ),
    ),
    network("relu_reused_one_output", architecture=lambda: _reused(nn.ReLU()), outputs=1),
    network(
        "tanh_sigmoid_modules",
        architecture=lambda: MLP(nn.Tanh(), nn.Sigmoid()),
        shap_exact=True,
        gain=2.5,
    ),
    network(
        "tanh_sigmoid_functional",
        architecture=lambda: MLP(torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid_),
        gain=2.5,
    ),
    network(
        "elu_selu_leaky_relu_softplus_modules",
        architecture=lambda: MLP(nn.ELU(), nn.SELU(), nn.LeakyReLU(0.2), nn.Softplus(beta=2.0)),
        shap_exact=True,
    ),
    network(
        "elu_selu_celu_functional",
        architecture=lambda: MLP(F.elu, F.selu, nn.CELU(0.7), partial(F.celu, inplace=True)),
    ),
    network(
        "leaky_relu_prelu",
        architecture=lambda: MLP(
            partial(F.leaky_relu, negative_slope=0.2), F.leaky_relu_, nn.PReLU(12), nn.PReLU()
        ),
    ),
    network(
        "relu6_hardtanh_abs_clamp",
        architecture=lambda: MLP(
            nn.ReLU6(), F.relu6, nn.Hardtanh(-0.7, 0.9), F.hardtanh_, _abs_clamp
        ),
        gain=3.0,
    ),
    network(
        "silu_mish",
        architecture=lambda: MLP(nn.SiLU(), F.silu, partial(F.mish, inplace=True), nn.Mish()),
        gain=2.5,
    ),
    network(
        "hardswish_hardsigmoid",
        architecture=lambda: MLP(nn.Hardswish(inplace=True), F.hardswish, nn.Hardsigmoid()),
        gain=3.0,
    ),
    network(
        "softplus_softsign_logsigmoid_threshold",
        architecture=lambda: MLP(F.softplus, nn.Softsign(), F.logsigmoid, nn.Threshold(-1.0, -3.0)),
        gain=2.5,
    ),
    network(
        "shrinkages",
        architecture=lambda: MLP(_shrink, nn.Softshrink(), nn.Hardshrink(), nn.Tanhshrink()),
    ),
    network("glu", architecture=lambda: MLP(nn.GLU(), F.glu, width=16, shrink=2), gain=2.5),
    network(
        "exponentials_powers_logarithms",
        architecture=lambda: MLP(_exponentials, _powers, _logarithms),
        gain=1.3,
    ),
    network("erf_sin_cos", architecture=lambda: MLP(_erf_sin_cos, torch.erf)),
]
