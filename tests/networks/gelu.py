"""GELU in every spelling: modules, functions and by hand."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import MLP
from tests.networks.network import Network

network = partial(Network, family="gelu")


def gelu_by_erf(x: Tensor) -> Tensor:
    """Return x times the normal distribution function, written with erf."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_by_tanh(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU, as GPT-2 writes it."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoid approximation of GELU, as CLIP writes it."""
    return x * torch.sigmoid(1.702 * x)


def _reused() -> nn.Module:
    gelu = nn.GELU()
    return MLP(gelu, gelu, gelu)


NETWORKS = [
    network("gelu_module", architecture=lambda: MLP(nn.GELU(), nn.GELU()), shap_exact=True),
    network(
        "gelu_module_tanh",
        architecture=lambda: MLP(nn.GELU(approximate="tanh"), nn.GELU(approximate="tanh")),
        shap_exact=True,
    ),
    network(
        "gelu_functional",
        architecture=lambda: MLP(F.gelu, partial(F.gelu, approximate="tanh"), F.gelu),
    ),
    network("gelu_reused", architecture=_reused),
    network("gelu_by_erf", architecture=lambda: MLP(gelu_by_erf, gelu_by_erf)),
    network("gelu_by_tanh", architecture=lambda: MLP(gelu_by_tanh, gelu_by_tanh)),
    network("gelu_by_sigmoid", architecture=lambda: MLP(gelu_by_sigmoid, gelu_by_sigmoid)),
]
