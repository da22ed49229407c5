"""Errors: what cannot be explained raises early and clearly, and the model stays as it was."""

import re
from dataclasses import dataclass

import pytest
import shap
import torch
import torch.nn.functional as F
from captum.attr import DeepLiftShap
from torch import Tensor, nn

import fxshap
from fxshap.errors import (
    BatchMixingError,
    CaptureError,
    InputError,
    ModelError,
    OutputError,
)
from tests.error_cases import REFERENCES, SAMPLES, Model, assert_raises, assert_works_as_new
from tests.helpers import (
    assert_exact,
    assert_no_shap_hooks,
    assert_same_state,
    assert_same_values,
    explain,
    state_of,
)

# --- the model and the inputs --------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda x: x, torch.tanh, nn.Linear, "model", None])
def test_model_must_be_a_module(model):
    with pytest.raises(ModelError, match="takes a torch.nn.Module, not a"):
        fxshap.make_explainable(model)


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.uint8])
def test_inputs_must_be_floating_point(dtype):
    integers = REFERENCES.to(dtype)
    explainable = fxshap.make_explainable(Model())
    with pytest.raises(InputError, match=f"input 0 is of {dtype}; only floating-point"):
        shap.DeepExplainer(explainable, integers)
    with pytest.raises(InputError, match=f"input 0 is of {dtype}; only floating-point"):
        fxshap.make_explainable(Model(), integers)
    explainer = shap.DeepExplainer(explainable, REFERENCES)
    with pytest.raises((InputError, RuntimeError)):
        explainer.shap_values(integers[:2])
    assert_works_as_new(explainable)


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
    assert_works_as_new(explainable)


@pytest.mark.parametrize("wrong", ["samples", "background", "both"])
def test_dtype_must_be_that_of_the_weights(wrong):
    explainable = fxshap.make_explainable(Model())
    references = REFERENCES if wrong == "samples" else REFERENCES.double()
    samples = SAMPLES if wrong == "background" else SAMPLES.double()
    with pytest.raises(InputError, match=r"torch.float64, but the model's weights torch.float32"):
        shap.DeepExplainer(explainable, references).shap_values(samples)
    assert_works_as_new(explainable)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["sample", "references"])
def test_inputs_must_be_finite(where, value):
    explainable = fxshap.make_explainable(Model())
    references, samples = REFERENCES.clone(), SAMPLES.clone()
    (samples if where == "sample" else references)[1, 2] = value
    with pytest.raises(InputError, match=f"input 0 of the {where} contains NaN or infinity"):
        shap.DeepExplainer(explainable, references).shap_values(samples, check_additivity=False)
    assert_works_as_new(explainable)


def test_inputs_must_have_equally_many_rows():
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * b

    with pytest.raises(InputError, match=r"shapes \(5, 4\), \(1, 4\); each needs as many rows"):
        shap.DeepExplainer(fxshap.make_explainable(Two()), [REFERENCES, REFERENCES[:1]])


# --- the output ---------------------------------------------------------------------------------


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
    end, output, expected = RESULTS[name]
    message = assert_raises(Model(end), OutputError, expected)
    assert "output=" in message

    chosen = fxshap.make_explainable(Model(end), output=output)

    plain = Model()
    assert torch.equal(chosen(SAMPLES), plain(SAMPLES))
    values = assert_exact(plain, chosen, [REFERENCES], [SAMPLES], 1e-5)
    expected = explain(fxshap.make_explainable(plain), [REFERENCES], [SAMPLES])
    assert_same_values(values, expected)


@pytest.mark.parametrize(
    "end, expected",
    [
        (lambda y, h: y[:, None].expand(-1, 2, -1), r"of shape \(5, 2, 3\)"),
        (lambda y, h: y.sum(), r"of shape \(\)"),
        (lambda y, h: y.argmax(1), "torch.int64, which has no attributions"),
        (lambda y, h: y > 0, "torch.bool, which has no attributions"),
        (lambda y, h: None, "a NoneType"),
        (lambda y, h: y[:1], "returns 1 rows for inputs of 5"),
        (lambda y, h: y.mean(0, keepdim=True), "returns 1 rows for inputs of 5"),
    ],
)
def test_output_must_be_rows_of_numbers(end, expected):
    assert_raises(Model(end), OutputError, expected)


@pytest.mark.parametrize("output", ["scores", 2, 0.5, ("logits",)])
@pytest.mark.parametrize("name", ["dict", "tuple", "dataclass"])
def test_output_must_exist(name, output):
    assert_raises(Model(RESULTS[name][0]), OutputError, re.escape(repr(output)), output=output)


# --- models that cannot be captured -------------------------------------------------------------


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


class ToList(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tensor(self.hidden(x).tolist()))  # out of tensors


class Nonzero(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.head(h) + h[h > 0].sum()  # as many as are positive


class Experts(Model):
    """Two experts; the rows are sorted by the one that they choose, and not put back."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        expert, order = (h[:, 0] > 0).int().sort()
        ends = torch.stack([(expert <= e).sum() for e in range(2)]).int()
        rows = F.pad(h[order], (0, 8 - h.shape[1]))  # the kernel takes rows of 16 bytes
        weights = torch.eye(8).expand(2, 8, 8)
        y = torch._grouped_mm(rows.bfloat16(), weights.bfloat16(), offs=ends)  # the groups
        return self.head(y[:, : h.shape[1]].float())


@pytest.mark.parametrize(
    "build, comment, remedy",
    [
        (Branch, "# the branch", "choose with torch.where"),
        (TakesItem, "# the number", "stay in tensors"),
        (Loop, "# the loop", "choose with torch.where"),
        (ToList, "# out of tensors", "stay in tensors"),
        (Nonzero, "# as many as", "a product with a mask"),
        (Experts, "# the groups", 'set_experts_implementation("batched_mm")'),
    ],
)
def test_control_flow_by_values_raises_naming_file_and_line(build, comment, remedy):
    message = assert_raises(build(), CaptureError, "cannot be captured as one graph")
    with open(__file__) as source:
        lines = enumerate(source, 1)
        line = next(number for number, text in lines if text.rstrip().find(comment) > 0)
    assert f"{__file__}:{line} " in message
    assert remedy in message


def test_after_an_error_the_next_explanation_works():
    model = Branch()
    explainable = fxshap.make_explainable(model)
    with pytest.raises(CaptureError):
        shap.DeepExplainer(explainable, REFERENCES).shap_values(SAMPLES)
    model.forward = lambda x: Model.forward(model, x)
    assert_works_as_new(explainable)


def test_an_error_of_the_model_itself_is_raised_with_the_shapes_of_the_inputs():
    message = r"forward\(x: .*\) fails with inputs of shapes \(3, 7\): RuntimeError: mat1 and mat2"
    with pytest.raises(InputError, match=message) as raised:
        fxshap.make_explainable(Model(), torch.randn(3, 7))
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(InputError, match=message):
        shap.DeepExplainer(fxshap.make_explainable(Model()), torch.randn(3, 7))


# --- rows that influence each other -------------------------------------------------------------


class AlwaysTraining(Model):
    """Batch norm that stays in training mode, also after ``eval()``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)
        self.end = lambda y, h: self.norm(y)

    def train(self, mode: bool = True):
        return super().train(True)


MIXING = {
    "batch_norm_module": AlwaysTraining,
    "batch_norm_function": lambda: Model(lambda y, h: F.batch_norm(y, None, None, training=True)),
    "softmax_over_rows": lambda: Model(lambda y, h: y.softmax(0)),
    "centred_rows": lambda: Model(lambda y, h: y - y.mean(0)),
    "flipped": lambda: Model(lambda y, h: y.flip(0)),
    "attention_over_rows": lambda: Model(lambda y, h: (h @ h.T).softmax(1) @ y),
    "largest_of_all": lambda: Model(lambda y, h: y / (10 * h).amax()),
    "norm_of_all": lambda: Model(lambda y, h: y / h.norm()),
    "small_mean": lambda: Model(lambda y, h: y + 1e-4 * y.mean(0)),
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_influence_each_other_raise_an_error(name):
    message = assert_raises(
        MIXING[name](), BatchMixingError, "the rows of a batch influence each other"
    )
    assert "model.eval()" in message
    if "batch_norm" not in name:
        assert re.search(r"error_cases\.py:\d+ \(`return self\.end", message)


@pytest.mark.parametrize("first", [0.1, 10.0])
def test_one_row_that_decides_for_all_is_found_whichever_it_is(first):
    """The largest element of all rows is in the first reference, or in the first sample."""
    explainable = fxshap.make_explainable(Model(lambda y, h: y / h.abs().max()))
    with pytest.raises(BatchMixingError):
        DeepLiftShap(explainable).attribute(SAMPLES, first * REFERENCES, target=0)


TABLE = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
FIXED = re.escape("(as in `x + table[:x.size(0)]` where the batch is the first dimension)")

#: By name, what a row's output must not depend on.
MOVED = {
    "table": lambda y, h: y + TABLE[: y.size(0)],
    "table_of_len": lambda y, h: y + TABLE[: len(y)],
    "small_table": lambda y, h: y + 1e-3 * TABLE[: y.size(0)],
    "positions": lambda y, h: y * torch.arange(y.size(0)).unsqueeze(1),
    "positions_of_len": lambda y, h: y + torch.arange(len(y))[:, None] / 10,
    "steps_between": lambda y, h: y * torch.linspace(0, 1, y.size(0))[:, None],
    "cumulative_sum": lambda y, h: y.cumsum(0),
    "causal_attention_over_rows": lambda y, h: (
        (h @ h.T).masked_fill(torch.ones(len(h), len(h)).triu(1).bool(), -torch.inf).softmax(1) @ y
    ),
    "hidden_under_a_tanh": lambda y, h: (y + TABLE[: y.size(0)]).tanh() * 1e-2 + y * 10,
}


@pytest.mark.parametrize("name", MOVED)
def test_rows_whose_position_matters_raise_an_error_with_the_line(name):
    message = assert_raises(Model(MOVED[name]), BatchMixingError, "the position of a row.*" + FIXED)
    assert re.search(r"error_cases\.py:\d+ \(`return self\.end", message)


NUMBER = {
    "factor": lambda y, h: y * y.shape[0],
    "divisor": lambda y, h: y / y.size(0),
    "len": lambda y, h: y / len(y),
    "small": lambda y, h: y * (1 + 1e-4 * y.size(0)),
    "root": lambda y, h: y / len(y) ** 0.5,
    "tensor": lambda y, h: y / torch.full((1,), y.size(0)),
}


@pytest.mark.parametrize("name", NUMBER)
def test_a_model_that_computes_with_the_number_of_rows_raises_an_error_with_the_line(name):
    message = assert_raises(
        Model(NUMBER[name]), BatchMixingError, "computes with the number of row"
    )
    assert re.search(r"error_cases\.py:\d+ \(`return self\.end", message)


ALIKE = {
    "sizes_cancel": lambda y, h: y / (y.numel() / y.size(0)),
    "positions_that_cancel": lambda y, h: y.flatten()[
        torch.arange(y.size(0))[:, None] * 3 + torch.arange(3)
    ],
    "own_position": lambda y, h: y[torch.arange(len(y)), :],
    "reshaped": lambda y, h: y.reshape(1, -1).reshape(y.size(0), 3),
    "masked": lambda y, h: y.masked_fill(torch.eye(3)[1].bool(), -torch.inf).softmax(1),
}


@pytest.mark.parametrize("name", ALIKE)
def test_rows_that_are_computed_alike_raise_no_error(name):
    shap.DeepExplainer(fxshap.make_explainable(Model(ALIKE[name])), REFERENCES).shap_values(SAMPLES)


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
def test_random_outputs_raise_an_error(end):
    state = torch.get_rng_state()
    assert_raises(
        Model(end), CaptureError, "draws random numbers in its forward.*turn the sampling off"
    )
    torch.set_rng_state(state)
