"""Capture: the two graphs, when they are made, and the weights that they share."""

import contextlib
import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxshap
from fxshap.errors import CaptureError
from fxshap.graph.provenance import is_user_file, user_module
from fxshap.passes.insert_rescale import original_operator
from tests.helpers import (
    assert_exact,
    assert_same_state,
    assert_same_values,
    explain,
    rewritten,
    state_of,
)


class Blocks(nn.Module):
    """Functions and modules, in nested blocks."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(size, 8), nn.GELU())
        self.second = nn.ModuleDict({"linear": nn.Linear(8, 8), "act": nn.Tanh()})
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second["act"](self.second["linear"](self.first(x)))
        return self.head(F.silu(h) * h)


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().eval()


BACKGROUND, SAMPLES = [torch.randn(5, 4)], [torch.randn(2, 4)]


# --- the graphs ---------------------------------------------------------------------------------


def test_both_graphs_can_be_read():
    explainable = fxshap.make_explainable(blocks(), BACKGROUND[0])
    assert isinstance(explainable.tapped_graph, fx.GraphModule)
    assert isinstance(explainable.rescaled_graph, fx.GraphModule)
    assert "rescale" not in explainable.tapped_graph.code
    assert "aten.gelu" in explainable.tapped_graph.code
    code = explainable.rescaled_graph.code
    assert code.count("rescale_rescale(") == 4
    assert "'gelu in first.1, " in code and f"'tanh in second.act, {__file__}:" in code


def test_rewritten_nodes_name_the_users_module():
    explainable = fxshap.make_explainable(blocks(), BACKGROUND[0])
    found = [(original_operator(node), user_module(node)) for node in rewritten(explainable)]
    aten = torch.ops.aten
    assert found == [
        (aten.gelu.default, "first.1"),
        (aten.tanh.default, "second.act"),
        (aten.silu.default, ""),
        (aten.mul.Tensor, ""),
    ]


@pytest.mark.parametrize(
    "dropout", [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_in_evaluation_is_left_out(dropout, in_place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), dropout(0.5, in_place), nn.Linear(8, 2))
    explainable = fxshap.make_explainable(model.eval())
    assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-6)
    assert "dropout" not in explainable.tapped_graph.code


# --- when ---------------------------------------------------------------------------------------


def test_capture_waits_for_the_first_explanation():
    explainable = fxshap.make_explainable(blocks())
    explainable(SAMPLES[0])
    with pytest.raises(CaptureError, match="captured at the first explanation"):
        print(explainable.rescaled_graph)
    explain(explainable, BACKGROUND, SAMPLES)
    assert rewritten(explainable)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_example_inputs_capture_at_once_for_any_number_of_rows(rows):
    explainable = fxshap.make_explainable(blocks(), example_inputs=torch.zeros(rows, 4))
    graph = explainable.rescaled_graph
    for references in (5, 1, 3):
        background = [torch.randn(references, 4)]
        assert_exact(explainable.original_model, explainable, background, SAMPLES, 1e-5)
    assert explainable.rescaled_graph is graph


def test_capturing_in_training_mode_is_for_evaluation_and_leaves_the_modes():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(), nn.Linear(6, 2)
    )
    model[1].eval()
    before = state_of(model)
    explainable = fxshap.make_explainable(model, BACKGROUND[0])
    assert_same_state(model, before)
    graph = explainable.rescaled_graph
    assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-5)
    assert explainable.rescaled_graph is graph


def test_another_shape_or_dtype_is_captured_separately():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 3, 3), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    explainable = fxshap.make_explainable(model)
    graphs = set()
    for size in (5, 9, 5):
        background, samples = [torch.randn(4, 1, size)], [torch.randn(2, 1, size)]
        assert_exact(model.eval(), explainable, background, samples, 1e-5)
        graphs.add(explainable.rescaled_graph)
    assert len(graphs) == 2

    background, samples = ([x.double() for x in end] for end in (background, samples))
    assert_exact(model.double(), explainable.double(), background, samples, 1e-12)
    assert explainable.rescaled_graph not in graphs


def test_a_replaced_module_is_captured_again():
    model = blocks()
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-5)
    model.first[1] = nn.ReLU()
    assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-5)


@pytest.mark.parametrize(
    "reshape", [lambda h: h.view(len(h), -1), lambda h: h.reshape(h.size(0), -1)]
)
def test_a_number_of_rows_fixed_in_python_is_captured_for_each(reshape):
    class Fixed(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(reshape(self.first(x).unsqueeze(1)))

    model = Fixed().eval()
    explainable = fxshap.make_explainable(model)
    for rows in (5, 1, 4, 5):
        assert_exact(model, explainable, [torch.randn(rows, 4)], SAMPLES, 1e-5)


def test_rows_that_are_counted_and_not_put_into_a_shape():
    class Assigned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out = x.cos()
            out[torch.arange(len(x))[:, None], torch.tensor([0, 2])] = x[:, 1:3].sin()
            return out

    explainable = fxshap.make_explainable(Assigned())
    for rows in (5, 1, 2):
        assert_exact(Assigned(), explainable, [torch.randn(rows, 4)], SAMPLES, 1e-5)


def test_attention_of_one_tensor_and_of_three_of_its_size():
    """Two calls whose arguments are one tensor and three tensors are not decomposed alike."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(-1, 2, 2)
            x = F.scaled_dot_product_attention(x, x, x)
            x = F.scaled_dot_product_attention(*(part(x) for part in self.parts))
            return self.head(x.flatten(1))

    torch.manual_seed(0)
    model = Twice().eval()
    assert_exact(model, fxshap.make_explainable(model), BACKGROUND, SAMPLES, 1e-5)


def test_non_contiguous_inputs():
    model = blocks()
    explainable = fxshap.make_explainable(model, torch.randn(4, 3).T)
    assert_exact(model, explainable, [torch.randn(4, 5).T], [torch.randn(8, 2).T[:, ::2]], 1e-5)


# --- weights ------------------------------------------------------------------------------------


def test_weights_are_shared_not_copied():
    model = blocks().requires_grad_(False)
    model.first.requires_grad_(True)
    explainable = fxshap.make_explainable(model, BACKGROUND[0])
    explain(explainable, BACKGROUND, SAMPLES)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for graph in (explainable.tapped_graph, explainable.rescaled_graph):
        names = [node.target for node in graph.graph.nodes if node.op == "get_attr"]
        assert {getattr(graph, name).data_ptr() for name in names} == own
        assert not any(getattr(graph, name).requires_grad for name in names)
    assert sum(p.numel() for p in explainable.parameters()) == sum(
        p.numel() for p in model.parameters()
    )


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 8), nn.Linear(8, 4)
            self.decode.weight = nn.Parameter(torch.randn(4, 8))
            self.again = nn.Linear(4, 8)
            self.again.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(torch.tanh(self.again(self.decode(F.gelu(self.encode(x))))))

    torch.manual_seed(0)
    model = Tied().eval()
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-5)
    with torch.no_grad():
        model.encode.weight.mul_(1.5)
    values = assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-5)
    assert_same_values(values, explain(fxshap.make_explainable(model), BACKGROUND, SAMPLES))
    assert model.again.weight is model.encode.weight


@pytest.mark.parametrize("tie", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_reparametrised_weights_are_followed(tie):
    torch.manual_seed(0)
    model = nn.Sequential(tie(nn.Linear(4, 6)), nn.GELU(), nn.Linear(6, 2)).eval()
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-5)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    values = assert_exact(model, explainable, BACKGROUND, SAMPLES, 1e-5)
    assert_same_values(values, explain(fxshap.make_explainable(model), BACKGROUND, SAMPLES))


def test_capture_does_not_change_state_that_forward_changes():
    class Counting(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.python_calls = 0
            self.last = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.python_calls += 1
            self.last = super().forward(x)
            return self.last

    model = Counting().eval()
    explainable = fxshap.make_explainable(model)
    plain = model(SAMPLES[0])
    explainable.capture(*BACKGROUND)
    assert (model.calls, model.python_calls) == (1, 1)
    assert model.last is plain
    explain(explainable, BACKGROUND, SAMPLES)
    assert (model.calls, model.python_calls) == (1, 1)
    assert model.last is plain


def test_the_model_is_freed_with_the_explainable():
    model = blocks()
    explainable = fxshap.make_explainable(model, BACKGROUND[0])
    explain(explainable, BACKGROUND, SAMPLES)
    gone = weakref.ref(explainable), weakref.ref(model)
    del explainable, model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_only_the_latest_captures_are_cached(monkeypatch):
    monkeypatch.setattr("fxshap.runtime.captures.MAX_CAPTURES", 2)
    explainable = fxshap.make_explainable(nn.Tanh().eval())
    shapes = [(3, size) for size in (2, 3, 4)]
    for shape in shapes:
        explainable.capture(torch.randn(shape))
    graphs = [
        engine.program.captured.module.graph
        for engine in explainable._calls.captures.engines.values()
    ]
    sizes = [next(iter(graph.nodes)).meta["val"].shape[1] for graph in graphs]
    assert sizes == [3, 4]


class Slices(nn.Module):
    """A list of layers, called in slices."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.GELU() for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers[:1], *self.layers[1:4:2], *self.layers[4:]):
            x = layer(x)
        return x


def test_modules_of_a_slice_of_a_list_have_their_own_names():
    report = fxshap.make_explainable(Slices(), torch.randn(2, 3)).report().to_dict()
    (gelu,) = report["operations"]
    assert gelu["modules"] == ["layers.0", "layers.1", "layers.3", "layers.4"]


def test_lines_of_torch_and_of_python_are_not_the_users():
    installed = Path(torch.__file__).parents[1]
    for file in (torch.__file__, fxshap.__file__, contextlib.__file__, "<string>"):
        assert not is_user_file(file)
    for file in (__file__, str(installed / "torchvision" / "ops" / "misc.py")):
        assert is_user_file(file)
