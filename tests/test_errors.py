"""What cannot be explained is refused early and clearly, and leaves nothing behind."""

import re
from dataclasses import dataclass

import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.errors import (
    BatchMixingError,
    CaptureError,
    InputError,
    ModelError,
    OutputError,
    RuleError,
)
from fxshap.rules.core.registry import RULES, Rule
from fxshap.runtime.batching import probe_layout
from tests.helpers import (
    assert_exact,
    assert_no_shap_hooks,
    assert_same_state,
    assert_same_values,
    explain,
    state_of,
)

torch.manual_seed(0)
REFERENCES = torch.randn(5, 4)
SAMPLES = torch.randn(2, 4)


class Model(nn.Module):
    """One hidden GELU layer whose result goes through `end`, given the hidden values too."""

    def __init__(self, end=lambda y, h: y) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden = nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)
        self.end = end
        self.eval()

    def forward(self, x: Tensor):
        h = F.gelu(self.hidden(x))
        return self.end(self.head(h), h)


class In(nn.Module):
    """A function as a submodule, to be named in errors."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def assert_as_new(explainable: nn.Module) -> None:
    """Check that it explains, and like a fresh one."""
    found = explain(explainable, [REFERENCES], [SAMPLES])
    assert_same_values(
        found, explain(fxshap.make_explainable(explainable.model), [REFERENCES], [SAMPLES])
    )
    assert_no_shap_hooks(explainable)


def refused(model: nn.Module, error: type[Exception], says: str, **options) -> str:
    """Check that explaining a model raises `error` and leaves it as it was; return the message."""
    explainable = fxshap.make_explainable(model, **options)
    before = state_of(model)
    with pytest.raises(error, match=says) as raised:
        shap.DeepExplainer(explainable, REFERENCES).shap_values(SAMPLES)
    assert_no_shap_hooks(explainable)
    assert_same_state(model, before)
    return str(raised.value)


# --- what is given ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda x: x, torch.tanh, nn.Linear, "model", None])
def test_model_must_be_a_module(model):
    with pytest.raises(ModelError, match="takes a torch.nn.Module, not a"):
        fxshap.make_explainable(model)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.uint8])
def test_inputs_must_be_floating_point(dtype):
    whole = REFERENCES.to(dtype)
    explainable = fxshap.make_explainable(Model())
    with pytest.raises(InputError, match=f"input 0 is of {dtype}; only floating-point"):
        shap.DeepExplainer(explainable, whole)
    with pytest.raises(InputError, match=f"input 0 is of {dtype}; only floating-point"):
        fxshap.make_explainable(Model(), whole)
    explainer = shap.DeepExplainer(explainable, REFERENCES)
    with pytest.raises((InputError, RuntimeError)):
        explainer.shap_values(whole[:2])
    assert_as_new(explainable)


def test_inputs_must_be_tensors():
    with pytest.raises(InputError, match="input 0 is a ndarray, not a torch.Tensor"):
        fxshap.make_explainable(Model(), [REFERENCES.numpy()])


@pytest.mark.parametrize(
    "samples", [torch.randn(2, 5), torch.randn(2, 4, 1), torch.randn(4)], ids=str
)
def test_samples_shaped_unlike_the_background_leave_nothing(samples):
    model = Model()
    explainable = fxshap.make_explainable(model)
    before = state_of(model)
    explainer = shap.DeepExplainer(explainable, REFERENCES)
    with pytest.raises(RuntimeError):  # SHAP's own, before the model is called
        explainer.shap_values(samples)
    assert_same_state(model, before)
    assert torch.equal(explainable(REFERENCES), model(REFERENCES))
    assert_no_shap_hooks(explainable)
    assert_as_new(explainable)


@pytest.mark.parametrize("wrong", ["samples", "background", "both"])
def test_dtype_must_be_that_of_the_weights(wrong):
    explainable = fxshap.make_explainable(Model())
    references = REFERENCES if wrong == "samples" else REFERENCES.double()
    samples = SAMPLES if wrong == "background" else SAMPLES.double()
    with pytest.raises(InputError, match=r"torch.float64 but the model's weights of torch.float32"):
        shap.DeepExplainer(explainable, references).shap_values(samples)
    assert_as_new(explainable)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["sample", "references"])
def test_inputs_must_be_finite(where, value):
    explainable = fxshap.make_explainable(Model())
    references, samples = REFERENCES.clone(), SAMPLES.clone()
    (samples if where == "sample" else references)[1, 2] = value
    with pytest.raises(InputError, match=f"input 0 of the {where} contains NaN or infinity"):
        shap.DeepExplainer(explainable, references).shap_values(samples, check_additivity=False)
    assert_as_new(explainable)


def test_inputs_must_have_equally_many_rows():
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * b

    with pytest.raises(OutputError, match="returns 5 rows for inputs of 5, 1"):
        shap.DeepExplainer(fxshap.make_explainable(Two()), [REFERENCES, REFERENCES[:1]])


# --- what is returned ---------------------------------------------------------------------------


@dataclass
class Result:
    logits: Tensor
    loss: Tensor


RESULTS = {
    "dict": (lambda y, h: {"logits": y, "hidden": h}, "logits", "a dict with keys"),
    "dataclass": (lambda y, h: Result(y, h), "logits", "a Result"),
    "tuple": (lambda y, h: (h, y), 1, r"a tuple of 2 \(Tensor, Tensor\)"),
    "list": (lambda y, h: [h, y], -1, "a list of 2"),
    "nested": (lambda y, h: {"out": (y, h)}, lambda result: result["out"][0], "a dict"),
    "three_dimensions": (
        lambda y, h: y.unsqueeze(1), lambda y: y.flatten(1), r"of shape \(5, 1, 3\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_output_must_be_chosen_and_can_be(name):
    end, output, says = RESULTS[name]
    message = refused(Model(end), OutputError, says)
    assert "output=" in message

    chosen = fxshap.make_explainable(Model(end), output=output)

    plain = Model()
    assert torch.equal(chosen(SAMPLES), plain(SAMPLES))
    values = assert_exact(plain, chosen, [REFERENCES], [SAMPLES], 1e-5)
    expected = explain(fxshap.make_explainable(plain), [REFERENCES], [SAMPLES])
    assert_same_values(values, expected)


@pytest.mark.parametrize(
    "end, says",
    [
        (lambda y, h: y.sum(1), r"of shape \(5,\)"),
        (lambda y, h: y.sum(), r"of shape \(\)"),
        (lambda y, h: y.argmax(1), "torch.int64, which has no attributions"),
        (lambda y, h: y > 0, "torch.bool, which has no attributions"),
        (lambda y, h: None, "a NoneType"),
        (lambda y, h: y[:1], "returns 1 rows for inputs of 5"),
        (lambda y, h: y.mean(0, keepdim=True), "returns 1 rows for inputs of 5"),
    ],
)
def test_output_must_be_rows_of_numbers(end, says):
    refused(Model(end), OutputError, says)


@pytest.mark.parametrize("output", ["scores", 2, 0.5, ("logits",)])
@pytest.mark.parametrize("name", ["dict", "tuple", "dataclass"])
def test_output_must_exist(name, output):
    refused(Model(RESULTS[name][0]), OutputError, re.escape(repr(output)), output=output)


# --- what cannot be captured --------------------------------------------------------------------


class Branch(Model):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the branch
            return self.head(self.hidden(x))
        return super().forward(x)


class TakesItem(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.max().item()  # the number


class Loop(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        for _ in range(int(h.abs().sum()) % 3 + 1):  # the loop
            h = torch.tanh(h)
        return self.head(h)


class Assertion(Model):
    def forward(self, x: Tensor) -> Tensor:
        assert (x.abs() < 100).all()  # the assertion
        return super().forward(x)


class ToList(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tensor(self.hidden(x).tolist()))  # out of tensors


class Nonzero(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.head(h) + h[h > 0].sum()  # as many as are positive


@torch.library.custom_op("fxshap_test::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply every group of rows by its own matrix, as mixtures of experts do."""
    starts = [0, *ends.tolist()]
    groups = zip(starts, starts[1:], weights, strict=False)
    return torch.cat([rows[start:end] @ weight for start, end, weight in groups])


@grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weights.shape[-1])


class Experts(Model):
    """Two experts; the rows are sorted by the one that they choose."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        expert, order = (h[:, 0] > 0).int().sort()
        ends = torch.stack([(expert <= e).sum() for e in range(2)])
        weights = torch.stack([self.head.weight.mT, -self.head.weight.mT])
        y = torch.ops.fxshap_test.grouped_mm(h[order], weights, ends)  # the groups
        return y[order.argsort()]


@pytest.mark.parametrize(
    "build, comment, remedy",
    [
        (Branch, "# the branch", "choose with torch.where"),
        (TakesItem, "# the number", "stay in tensors"),
        (Loop, "# the loop", "choose with torch.where"),
        (Assertion, "# the assertion", "choose with torch.where"),
        (ToList, "# out of tensors", "stay in tensors"),
        (Nonzero, "# as many as", "a product with a mask"),
        (Experts, "# the groups", 'set_experts_implementation("batched_mm")'),
    ],
)
def test_control_flow_by_values_is_refused_by_file_and_line(build, comment, remedy):
    message = refused(build(), CaptureError, "cannot be captured as one graph")
    with open(__file__) as source:
        lines = enumerate(source, 1)
        line = next(number for number, text in lines if text.rstrip().find(comment) > 0)
    assert f"{__file__}:{line} " in message
    assert remedy in message


def test_after_a_refusal_the_next_explanation_works():
    model = Branch()
    explainable = fxshap.make_explainable(model)
    with pytest.raises(CaptureError):
        shap.DeepExplainer(explainable, REFERENCES).shap_values(SAMPLES)
    model.forward = lambda x: Model.forward(model, x)
    assert_as_new(explainable)


def test_an_error_of_the_model_itself_stays_as_it_is():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fxshap.make_explainable(Model(), torch.randn(3, 7))


# --- rows that influence each other -------------------------------------------------------------


class AlwaysTraining(Model):
    """Batch norm that stays in training mode, whatever is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)
        self.end = lambda y, h: self.norm(y)

    def train(self, mode: bool = True):
        return super().train(True)


MIXING = {
    "batch_norm_module": AlwaysTraining,
    "batch_norm_function": lambda: Model(
        lambda y, h: F.batch_norm(y, None, None, training=True)
    ),
    "softmax_over_rows": lambda: Model(lambda y, h: y.softmax(0)),
    "centred_rows": lambda: Model(lambda y, h: y - y.mean(0)),
    "cumulative_sum": lambda: Model(lambda y, h: y.cumsum(0)),
    "flipped": lambda: Model(lambda y, h: y.flip(0)),
    "attention_over_rows": lambda: Model(lambda y, h: (h @ h.T).softmax(1) @ y),
    "number_of_rows": lambda: Model(lambda y, h: y * y.shape[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_influence_each_other_are_refused(name):
    message = refused(MIXING[name](), BatchMixingError, "the rows of a batch influence each other")
    assert "model.eval()" in message


# --- randomness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        lambda y, h: F.dropout(y, 0.5, training=True),
        lambda y, h: F.dropout(y, 0.5, training=True, inplace=True),
        lambda y, h: y + torch.randn_like(y),
        lambda y, h: y + torch.rand(3),
        lambda y, h: torch.bernoulli(y.sigmoid()),
        lambda y, h: F.gumbel_softmax(y),
    ],
    ids=["dropout", "dropout_", "randn_like", "rand", "bernoulli", "gumbel"],
)
def test_random_outputs_are_refused(end):
    state = torch.get_rng_state()
    refused(Model(end), CaptureError, "draws random numbers in its forward.*turn the sampling off")
    torch.set_rng_state(state)


# --- operators without a derivative -------------------------------------------------------------


@torch.library.custom_op("fxshap_test::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


@square.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


LIBRARY = torch.library.Library("fxshap_test", "FRAGMENT")
LIBRARY.define("cube(Tensor x) -> Tensor")
LIBRARY.impl("cube", lambda x: x * x * x, "CPU")
LIBRARY.impl("cube", torch.empty_like, "Meta")


@pytest.mark.parametrize(
    "operator",
    [
        torch.ops.fxshap_test.square,
        torch.ops.fxshap_test.cube,
        lambda x: torch.igamma(x.exp(), x.exp()),
        lambda x: torch.stack([torch.histc(row, 3) for row in x.unbind()]),
    ],
    ids=["custom_op", "library", "igamma", "histc"],
)
def test_operators_without_derivative_and_rule_are_refused(operator):
    model = Model(lambda y, h: model.block(y))
    model.block = nn.Sequential(nn.Identity(), In(operator)).eval()
    message = refused(model, RuleError, "has no derivative and no rule")
    assert re.match(
        r"(fxshap_test\.\w+|aten\.(igamma|histc))\.default \(.* in block\.1, .*\.py:\d+\)", message
    )
    assert "register_autograd" in message and "fxshap.rules" in message


def test_an_operator_without_derivative_needs_only_a_rule(monkeypatch):
    def secant(operation, reference, sample, grad):
        (r,), (x,) = reference, sample
        return (grad * (x + r),)

    monkeypatch.setitem(RULES, torch.ops.fxshap_test.square, Rule("square", secant))
    model = Model(lambda y, h: torch.ops.fxshap_test.square(y))
    assert_exact(model, fxshap.make_explainable(model), [REFERENCES], [SAMPLES], 1e-5)


def test_a_rule_that_fails_names_operator_and_module(monkeypatch):
    def broken(operation, reference, sample, grad):
        raise ZeroDivisionError("the reason")

    monkeypatch.setitem(RULES, torch.ops.aten.tanh, Rule("broken", broken))
    model = Model(lambda y, h: model.block(y))
    model.block = nn.Sequential(nn.Tanh()).eval()
    refused(
        model,
        RuleError,
        r"the rule 'broken' failed on aten.tanh.default \(tanh in block.0, .*:\d+\): the reason",
    )
    monkeypatch.undo()
    assert_as_new(fxshap.make_explainable(model))


@pytest.mark.parametrize(
    "returned, says",
    [
        (lambda grad: grad, "it returned a Tensor, not a tuple of 1"),
        (lambda grad: (grad, grad), "it returned a tuple, not a tuple of 1"),
        (lambda grad: (grad[:, :2],), r"a cotangent of shape \(5, 2\) for the varying argument 0"),
    ],
    ids=["tensor", "too many", "shape"],
)
def test_what_a_rule_returns_is_checked(monkeypatch, returned, says):
    def rule(operation, reference, sample, grad):
        return returned(grad)

    monkeypatch.setitem(RULES, torch.ops.aten.tanh, Rule("mine", rule))
    model = Model(lambda y, h: y.tanh())
    message = refused(model, RuleError, f"the rule 'mine' failed on aten.tanh.default.*{says}")
    assert f"(tanh, {__file__}:" in message


@pytest.mark.parametrize(
    "end",
    [
        lambda y, h: y * (h.argmax(1, keepdim=True) ^ 1).float(),
        lambda y, h: y + torch.arange(108.0).reshape(6, 6, 3)[h.argmax(1), h.argmin(1)],
    ],
    ids=["bits", "two indices"],
)
def test_dependence_through_integers_alone_is_refused(end):
    refused(Model(end), RuleError, "depends on the input only through integers or booleans")


def test_rounding_that_depends_on_the_number_of_rows_is_not_mixing():
    def observe(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x.sum(1, keepdim=True) * (1 + 0.1 * len(x)), (x,)

    assert not probe_layout(observe, [REFERENCES]).tile
    with pytest.raises(BatchMixingError):
        probe_layout(lambda x: (observe(x)[0] * len(x), (x,)), [REFERENCES])
