"""Every workaround for an older release does what it says, on whatever release runs the tests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table, decompositions
from torch._export import non_strict_utils
from torch._subclasses.fake_impls import get_fast_op_impls
from torch.export import _trace
from torch.utils import _pytree as pytree

import fxshap
from fxshap import _compat
from fxshap._compat import (
    add_note,
    deny_exporting,
    existing_packets,
    export_workarounds,
    hashable_spec,
    hide_script_objects,
    infer_division_dtypes,
    infer_softmax_of_any_size,
    is_size_constraint,
    parity,
    replace_positions,
    replace_views,
    restore_final_states,
    run_compiled_eagerly,
    skips_contexts,
)
from fxshap.capture.export import capture
from fxshap.state import restore_attributes

aten = torch.ops.aten


def test_only_one_module_asks_for_a_release():
    """After ``_requirements``, which checks the releases before any package is imported."""
    versions = ("torch.__version__", "np.__version__", "sys.version_info", "release_of(")
    for path in Path(fxshap.__file__).parent.rglob("*.py"):
        asks = any(word in path.read_text() for word in versions)
        assert not asks or path.name in ("_compat.py", "_requirements.py"), path


# --- Python and NumPy ---------------------------------------------------------------------------


class Old(Exception):
    """An error as Python 3.10 has it."""

    def __getattribute__(self, name: str) -> object:
        if name == "add_note":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("kind", [ValueError, Old])
def test_notes_are_kept(kind):
    error = kind("it")
    add_note(error, "one")
    add_note(error, "two")
    assert error.__notes__ == ["one", "two"]


def test_parity_is_that_of_the_bits_with_and_without_numpys_count(monkeypatch):
    numbers = np.concatenate([np.arange(300), 2 ** np.arange(63) - 1, [2**62 + 2**33 + 1]])
    expected = [int(number).bit_count() % 2 for number in numbers]
    assert parity(numbers).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert parity(numbers).tolist() == expected


# --- operators ----------------------------------------------------------------------------------


def test_operators_that_a_release_lacks_are_left_out():
    assert existing_packets("relu", "no_such_operator", "tanh") == (aten.relu, aten.tanh)


# --- what export is given -----------------------------------------------------------------------


def test_structures_can_be_keys():
    one, same, other = (pytree.tree_structure(x) for x in ([1, (2,)], [3, (4,)], [1, 2]))
    assert len({hashable_spec(one), hashable_spec(same), hashable_spec(other)}) == 2


def test_structures_without_a_hash_are_told_by_their_text():
    class Unhashable:
        __hash__ = None

        def __repr__(self) -> str:
            return "it"

    assert hashable_spec(Unhashable()) == "it"


def test_export_is_denied_and_then_not(monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True, raising=False)
    with pytest.raises(ZeroDivisionError), deny_exporting():
        assert not torch.compiler._is_exporting_flag
        raise ZeroDivisionError
    assert torch.compiler._is_exporting_flag
    monkeypatch.delattr(torch.compiler, "_is_exporting_flag")
    with deny_exporting():
        pass
    assert not hasattr(torch.compiler, "_is_exporting_flag")


@pytest.mark.parametrize("batch", [1, 3])
def test_final_states_have_the_shape_of_the_first(batch):
    lstm = nn.LSTM(4, 2, bidirectional=True)
    x, before = torch.randn(5, batch, 4), decompositions.one_layer_lstm
    state = torch.zeros(2, batch, 2)
    weights = [getattr(lstm, name) for name in lstm._flat_weights_names]
    with restore_final_states():
        _, *found = decompositions.lstm_impl(
            x, (state, state), weights, True, 1, 0.0, False, True, False
        )
    assert decompositions.one_layer_lstm is before
    _, expected = lstm(x)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_quotients_of_integers_are_inferred_without_the_shortcut():
    shortcut = get_fast_op_impls()[aten.div.Tensor]
    with infer_division_dtypes():
        assert aten.div.Tensor not in get_fast_op_impls()
    assert get_fast_op_impls()[aten.div.Tensor] is shortcut


@pytest.mark.parametrize("softmax", [aten._softmax.default, aten._log_softmax.default])
@pytest.mark.parametrize("half_to_float", [False, True])
def test_softmax_is_inferred_as_it_is_computed(softmax, half_to_float):
    dtype = torch.float16 if half_to_float else torch.float64
    x = torch.empty(3, 4, dtype=dtype, device="meta").T
    before = decomposition_table[softmax]
    with infer_softmax_of_any_size():
        found = decomposition_table[softmax](x, 0, half_to_float)
    expected = before(x, 0, half_to_float)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert decomposition_table[softmax] is before


class Noting(nn.Module):
    """Assigns, deletes and fills attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.calls, self.last, self.gone = 0, None, "there"
        self.seen, self.by_name = [1], {"a": 1}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.new = self.inner(x)
        self.seen.append(x)
        self.by_name["b"] = x
        self.inner.note = "noted"
        del self.gone
        return self.last


def test_attributes_are_put_back():
    model = nn.Sequential(Noting())
    noting = model[0]
    seen, by_name, before = noting.seen, noting.by_name, dict(vars(noting))
    with pytest.raises(ZeroDivisionError), restore_attributes(model):
        model(torch.randn(3, 2))
        assert noting.calls == 1
        raise ZeroDivisionError
    assert vars(noting) == before and not hasattr(noting.inner, "note")
    assert noting.seen is seen and seen == [1]
    assert noting.by_name is by_name and by_name == {"a": 1}


def test_attributes_that_stay_are_not_written():
    class Watched(dict):
        def __setitem__(self, *item: object) -> None:
            raise AssertionError(item)

    module = nn.Identity()
    module.kept, module.held = object(), [torch.ones(2), (torch.ones(2),)]
    held = list(module.held)
    module.__dict__ = Watched(vars(module))
    with restore_attributes(module):
        pass
    assert all(a is b for a, b in zip(module.held, held, strict=True))


def test_compiled_modules_run_as_they_were_written():
    def refuse(graph: fx.GraphModule, inputs: object) -> None:
        raise AssertionError("compiled")

    model = torch.compile(nn.Tanh(), backend=refuse)
    with run_compiled_eagerly():
        model(torch.zeros(2))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules_are_no_constants(monkeypatch):
    scripted, constant = torch.jit.script(nn.Tanh()), torch.ones(1)

    def gather(model: nn.Module) -> dict[object, str]:
        return {scripted._c: "layer._c", constant: "constant"}

    for module in (non_strict_utils, _trace):
        monkeypatch.setattr(module, "_gather_constant_attrs", gather)
    with hide_script_objects(scripted):
        for module in (non_strict_utils, _trace):
            assert module._gather_constant_attrs(scripted) == {constant: "constant"}
    assert _trace._gather_constant_attrs is non_strict_utils._gather_constant_attrs is gather


@pytest.mark.parametrize("release", [(2, 6), (2, 7)])
def test_contexts_are_left_out_where_strict_export_cannot_trace_them(monkeypatch, release):
    monkeypatch.setattr(_compat, "TORCH", release)
    assert not skips_contexts()
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert skips_contexts() == (release == (2, 6))


# --- what export returns ------------------------------------------------------------------------


def graph_with(target: object, *args: object) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(target, (x, *args)))
    return graph


@pytest.mark.parametrize("release", [(2, 6), (2, 12), (2, 13)])
def test_views_become_reshapes_where_memory_is_laid_out_anew(monkeypatch, release):
    monkeypatch.setattr(_compat, "TORCH", release)
    graph, bits = graph_with(aten.view.default, [-1]), graph_with(aten.view.dtype, torch.int32)
    replace_views(graph)
    replace_views(bits)
    left = aten.view.default if release == (2, 13) else aten.reshape.default
    assert [node.target for node in graph.nodes][1] is left
    assert [node.target for node in bits.nodes][1] is aten.view.dtype


@pytest.mark.parametrize("release", [(2, 9), (2, 11)])
def test_positions_of_a_mask_are_those_of_nonzero(monkeypatch, release):
    monkeypatch.setattr(_compat, "TORCH", release)
    graph = graph_with(aten.where.default)
    chosen = graph_with(aten.where.ScalarOther, 1.0, 2.0)
    replace_positions(graph)
    replace_positions(chosen)
    left = aten.where.default if release == (2, 11) else aten.nonzero_numpy.default
    assert [node.target for node in graph.nodes][1] is left
    assert [node.target for node in chosen.nodes][1] is aten.where.ScalarOther
    mask = torch.tensor([[True, False], [True, True]])
    for one, other in zip(aten.where.default(mask), left(mask), strict=True):
        assert torch.equal(one, other)


def test_bounds_of_sizes_are_told_from_other_nodes(monkeypatch):
    monkeypatch.setattr(_compat, "TORCH", (2, 6))
    for target in (aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default):
        assert is_size_constraint(list(graph_with(target).nodes)[1])
    assert not is_size_constraint(list(graph_with(aten.relu.default).nodes)[1])


# --- together -----------------------------------------------------------------------------------


def assert_adds_up(model: nn.Module, x: Tensor) -> None:
    explainable = fxshap.make_explainable(model)
    fxshap.testing.assert_explainable(explainable, x[:4], x[4:])


@pytest.mark.parametrize("release", [(2, 9), (2, 12)])
def test_mends_of_older_releases_do_no_harm_where_they_are_not_needed(monkeypatch, release):
    torch.manual_seed(0)
    monkeypatch.setattr(_compat, "TORCH", release)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2)).eval()
    assert_adds_up(model, torch.randn(6, 3, 8))


def test_attention_adds_up():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2)).eval()
    assert_adds_up(model, torch.randn(6, 3, 8))


class FinalStates(nn.Module):
    """The last hidden and cell states of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cell) = self.lstm(x)
        return self.head(torch.cat([*hidden, *cell], dim=1))


def test_final_states_of_an_lstm_add_up():
    torch.manual_seed(0)
    assert_adds_up(FinalStates().eval(), torch.randn(6, 5, 3))


class Quotients(nn.Module):
    """Quotients of integers, by numbers and by each other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        ranks = x.argsort(-1).argsort(-1)
        positive = (x > 0).sum(-1, keepdim=True)
        parts = (
            ranks / 4,
            ranks / (ranks + 1),
            torch.div(positive, 3),
            torch.true_divide(ranks, 2),
        )
        return self.head(sum(parts) * x)


def test_quotients_of_integers_are_floating_and_add_up():
    torch.manual_seed(0)
    model, x = Quotients(), torch.randn(6, 4)
    graph = capture(model, [x]).module.graph
    quotients = [node for node in graph.nodes if "div" in node.name]
    assert len(quotients) == 4
    assert all(node.meta["val"].is_floating_point() for node in quotients)
    assert_adds_up(model, x)


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_left_behind(strict):
    model, before = Noting(), decompositions.one_layer_lstm
    attributes = dict(vars(model))
    with export_workarounds(model, strict):
        pass
    assert decompositions.one_layer_lstm is before and vars(model) == attributes
