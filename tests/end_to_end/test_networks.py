"""Unmodified SHAP on every network of the collection, on deep ones and on extreme logits."""

import numpy as np
import pytest
import shap
import torch
from shap.explainers._deep.deep_pytorch import op_handler
from torch import Tensor, nn

import fxshap
from fxshap._compat import TORCH
from fxshap.graph.provenance import user_module
from tests.helpers import assert_exact, explain, multipliers, rewritten
from tests.networks import NETWORKS, Network

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", LIMITS, ids=["float64", "float32"])


def data(network: Network, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Six random references and zeros; random samples, a reference, its neighbours and zeros."""
    eps = torch.finfo(dtype).eps
    references = [
        torch.cat([r, torch.zeros_like(r[:1])]) for r in network.inputs(6, seed=1, dtype=dtype)
    ]
    samples = [
        torch.cat([x, r[:1], r[1:2] * (1 + 4 * eps), r[2:3] + 1e-4 * x[:1], 0 * x[:1]])
        for x, r in zip(network.inputs(2, seed=2, dtype=dtype), references, strict=True)
    ]
    return references, samples


class Case:
    """A network, captured for inputs of one type."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.network = NETWORKS[name]
        if TORCH < self.network.oldest_torch:
            pytest.skip(f"torch.export of this release cannot export the network {name}")
        self.dtype = dtype
        self.limit = LIMITS[dtype]
        self.model = self.network.build().to(dtype)
        self.explainable = fxshap.make_explainable(self.model, self.inputs(3))

    def inputs(self, count: int, seed: int = 0) -> tuple[Tensor, ...]:
        return self.network.inputs(count, seed=seed, dtype=self.dtype)


@pytest.fixture(
    scope="module",
    params=[(name, dtype) for name in NETWORKS for dtype in LIMITS],
    ids=lambda param: f"{param[0]}-{str(param[1]).removeprefix('torch.')}",
)
def case(request) -> Case:
    """Every network in both types, captured once for the tests that use it."""
    return Case(*request.param)


def test_attributions_add_up(case):
    background, samples = data(case.network, case.dtype)
    values = assert_exact(case.model, case.explainable, background, samples, case.limit)
    assert [phi.shape for phi in values] == [(*x.shape, case.network.outputs) for x in samples]


def test_every_pair_adds_up_when_the_samples_differ(case):
    references = case.inputs(4, seed=1)
    for seed in (2, 3):
        samples = case.inputs(4, seed=seed)
        outputs, found = multipliers(case.explainable, samples, references, -1)
        f_x, f_r = (case.model(*end).detach() for end in (samples, references))
        error = case.limit * torch.maximum(f_x.abs().max(), f_r.abs().max()).item()
        assert torch.allclose(outputs, torch.cat([f_x, f_r]), rtol=0, atol=error)
        total = sum(
            (m * (x - r)).flatten(1).sum(1)
            for m, x, r in zip(found, samples, references, strict=True)
        )
        assert (total - (f_x - f_r)[:, -1]).abs().max() <= error


def test_every_rewritten_node_has_an_origin(case):
    modules = dict(case.model.named_modules())
    nodes = rewritten(case.explainable)
    for node in nodes:
        assert node.meta["nn_module_stack"]
        assert user_module(node).partition("@")[0] in modules
    code = case.explainable.rescaled_graph.code
    assert code.count(" = fxshap_autograd_rescale_rescale(") == len(nodes)


def leaves(model: nn.Module) -> list[nn.Module]:
    """Return the modules that SHAP hooks."""
    return [module for module in model.modules() if not list(module.children())]


@pytest.mark.parametrize("dtype", LIMITS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", [name for name, net in NETWORKS.items() if net.shap_exact])
def test_agrees_with_shap_where_shap_is_right(name, dtype):
    case = Case(name, dtype)
    unknown = {type(module).__name__ for module in leaves(case.model)} - op_handler.keys()
    if unknown:
        pytest.skip(f"shap {shap.__version__} does not know {', '.join(sorted(unknown))}")
    background, samples = data(case.network, dtype)
    ours = explain(case.explainable, background, samples)
    theirs = explain(case.model, background, samples)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=case.limit * np.abs(b).max())


@pytest.mark.parametrize("ranked", ["max", "min", "max_abs"])
def test_ranked_outputs_are_those_of_all_outputs(ranked):
    network = NETWORKS["gelu_functional"]
    explainable = fxshap.make_explainable(network.build())
    background, samples = data(network, torch.float32)
    (everything,) = explain(explainable, background, samples)
    values, ranks = explain(  # SHAP's check compares unranked outputs with ranked values
        explainable,
        background,
        samples,
        ranked_outputs=2,
        output_rank_order=ranked,
        check_additivity=False,
    )
    expected = np.take_along_axis(everything, ranks.numpy()[:, None, :], axis=-1)
    # Another number of outputs is batched, and matrix products of it round differently.
    bound = 4 * np.finfo(np.float32).eps * np.abs(expected).max()
    np.testing.assert_allclose(values, expected, rtol=0, atol=bound)


# --- deep ---------------------------------------------------------------------------------------


class ResidualGELU(nn.Module):
    """Residual blocks without norms: x + W2 gelu(W1 x)."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(x)))
        return self.head(x)


def transformer(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for parameter in encoder.parameters():  # the layers are copies of one
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(6 * 16, 3))


DEEP = {
    "residual_gelu_20": (lambda: ResidualGELU(20, 32), (32,)),
    "transformer_12": (lambda: transformer(12), (6, 16)),
}


@dtypes
@pytest.mark.parametrize("name", DEEP)
def test_deep_networks_add_up(name, dtype):
    build, shape = DEEP[name]
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    background, samples = (
        [torch.randn(8, *shape, dtype=dtype)],
        [torch.randn(3, *shape, dtype=dtype)],
    )
    assert_exact(model, fxshap.make_explainable(model), background, samples, LIMITS[dtype])


class ScaledAttention(nn.Module):
    """Self-attention whose logits are `scale` times those of a new layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(40, 3)

    def logits(self, x: Tensor) -> Tensor:
        q, k, _ = self.qkv(x).chunk(3, -1)
        return self.scale * (q @ k.transpose(-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        values = self.logits(x).softmax(-1) @ self.qkv(x)[..., 16:]
        return self.head(values.flatten(1))


@dtypes
@pytest.mark.parametrize("scale", [10.0, 50.0, 100.0])
def test_attention_with_large_logits_is_finite_and_adds_up(scale, dtype):
    torch.manual_seed(0)
    model = ScaledAttention().eval().to(dtype)
    background, samples = [torch.randn(8, 5, 8, dtype=dtype)], [torch.randn(3, 5, 8, dtype=dtype)]
    model.scale = scale / model.logits(background[0]).std().item()
    assert_exact(model, fxshap.make_explainable(model), background, samples, LIMITS[dtype])
