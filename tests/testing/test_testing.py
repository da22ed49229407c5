"""Rules for a user's own operators, end to end; wrong rules and leaking models are detected."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap import AdditivityError, CaptureError, RuleError
from fxshap.rules import DECOMPOSITIONS, RULES
from fxshap.testing import EACH, Varying, assert_explainable, check_rule
from tests.helpers import assert_exact

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def rules_as_they_were():
    """Forget the rules that a test declares."""
    with mock.patch.dict(RULES), mock.patch.dict(DECOMPOSITIONS):
        yield


# --- a user's own operators ----------------------------------------------------------------------


@torch.library.custom_op("fxshap_example::snake", mutates_args=())
def snake(x: Tensor, frequency: float) -> Tensor:
    return x + (frequency * x).sin() ** 2 / frequency


@snake.register_fake
def _(x: Tensor, frequency: float) -> Tensor:
    return torch.empty_like(x)


def save_snake(ctx, inputs, output) -> None:
    ctx.x, ctx.frequency = inputs


def snake_backward(ctx, grad: Tensor):
    return grad * (1 + (2 * ctx.frequency * ctx.x).sin()), None


snake.register_autograd(snake_backward, setup_context=save_snake)


@torch.library.custom_op("fxshap_example::scores", mutates_args=())
def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


@scores.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], k.shape[-2])


def save_scores(ctx, inputs, output) -> None:
    ctx.q, ctx.k = inputs


def scores_backward(ctx, grad: Tensor):
    return grad @ ctx.k, grad.mT @ ctx.q


scores.register_autograd(scores_backward, setup_context=save_scores)


@torch.library.custom_op("fxshap_example::mirror", mutates_args=())
def mirror(x: Tensor) -> Tensor:
    return x.flip(-1) - 1


@mirror.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


mirror.register_autograd(lambda ctx, grad: grad.flip(-1))


@torch.library.custom_op("fxshap_example::bare", mutates_args=())
def bare(x: Tensor) -> Tensor:
    return x.sin()


@bare.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    """A function between two layers."""

    def __init__(self, function) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def self_scores(h: Tensor) -> Tensor:
    halves = h.unflatten(1, (2, 3))
    return (scores(halves, 0.5 * halves) @ halves).flatten(1)


def assert_explained(function, operation: str, treatment: str, rule: str) -> None:
    """Check that SHAP explains a network with a function in it, by this rule."""
    background, samples = torch.randn(5, 4), torch.randn(2, 4)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = Custom(function).to(dtype).eval()
        explainable = fxshap.make_explainable(model)
        assert_exact(model, explainable, [background.to(dtype)], [samples.to(dtype)], limit)
    entries = {entry.operation: entry for entry in explainable.report().entries}
    assert (entries[operation].treatment, entries[operation].rule) == (treatment, rule)


SNAKE, SCORES, MIRROR = (f"fxshap_example.{name}.default" for name in ("snake", "scores", "mirror"))
SNAKE_CASE = (snake, [Varying((5,)), 1.5])


@pytest.mark.parametrize("spelled", ["decorated", "overload", "packet"])
def test_one_line_makes_an_operator_elementwise(spelled):
    packet = torch.ops.fxshap_example.snake
    op = {"decorated": snake, "overload": packet.default, "packet": packet}[spelled]
    fxshap.rules.elementwise(op)
    check_rule(*SNAKE_CASE)
    assert_explained(lambda h: snake(h, 1.5), SNAKE, "closed", "elementwise (smooth)")


def test_one_line_makes_an_operator_bilinear():
    fxshap.rules.bilinear(scores)
    check_rule(scores, [Varying((2, 3)), Varying((4, 3))])
    assert_explained(self_scores, SCORES, "closed", "product")


def test_one_line_makes_an_operator_linear():
    fxshap.rules.linear(mirror)
    check_rule(mirror, [Varying((5,))])
    assert_explained(mirror, MIRROR, "linear", "")


@pytest.mark.parametrize("op", [snake, torch.ops.fxshap_example.snake], ids=["op", "packet"])
def test_a_decomposition_takes_the_place_of_an_operator(op):
    @fxshap.rules.decomposition(op)
    def parts(x: Tensor, frequency: float) -> Tensor:
        return x + (frequency * x).sin().square() / frequency

    check_rule(*SNAKE_CASE)
    assert_explained(lambda h: snake(h, 1.5), "aten.sin.default", "closed", "elementwise (sin)")


def test_a_rule_is_a_function():
    @fxshap.rules.rule(snake)
    def divided_difference(operation, reference, sample, grad):
        """1 + sin(a (x + r)) sinc: the difference of two cosines as a product of sines."""
        (r,), (x,), a = reference, sample, operation["frequency"]
        return (grad * (1 + torch.sin(a * (x + r)) * torch.sinc(a * (x - r) / torch.pi)),)

    check_rule(*SNAKE_CASE)
    assert_explained(lambda h: snake(h, 1.5), SNAKE, "closed", "divided_difference")


def test_without_a_rule_the_derivative_is_averaged():
    check_rule(*SNAKE_CASE)
    assert_explained(lambda h: snake(h, 1.5), SNAKE, "generic", "generic")


def test_elementwise_without_a_derivative_says_so():
    fxshap.rules.elementwise(bare)
    with pytest.raises(RuleError, match=r"'elementwise \(smooth\)' failed.*no autograd formula"):
        fxshap.verify(Custom(bare), torch.randn(3, 4), torch.randn(1, 4))


def test_elementwise_without_a_derivative_needs_a_secant():
    def secant(r, x):
        return torch.cos((x + r) / 2) * torch.sinc((x - r) / (2 * torch.pi))

    fxshap.rules.elementwise(bare, secant=secant)
    check_rule(bare, [Varying((5,))])
    assert_explainable(Custom(bare), torch.randn(3, 4), torch.randn(1, 4))


@pytest.mark.parametrize("target", [torch.sin, "aten.sin", nn.GELU, lambda x: x])
@pytest.mark.parametrize("maker", ["elementwise", "bilinear", "linear", "decomposition", "rule"])
def test_a_rule_is_for_an_operator(maker, target):
    with pytest.raises(RuleError, match="a rule is for an operator, not for"):
        declared = getattr(fxshap.rules, maker)(target)
        declared(lambda *arguments: None)


# --- wrong rules --------------------------------------------------------------------------------


def derivative_at(weight: float):
    def backward(operation, reference, sample, grad):
        pairs = zip(reference, sample, strict=True)
        return fxshap.rules.vjp(operation, [torch.lerp(r, x, weight) for r, x in pairs], grad)

    return backward


def quotient(operation, reference, sample, grad):
    (r,), (x,) = reference, sample
    return (grad * (operation(x) - operation(r)) / (x - r),)


def derivative_when_close(bound: float):
    """The switch that SHAP makes, at |d| < `bound`."""

    def backward(operation, reference, sample, grad):
        (r,), (x,) = reference, sample
        (close,) = derivative_at(0.5)(operation, (r,), (x.expand_as(r),), torch.ones_like(r))
        (far,) = quotient(operation, reference, sample, 1.0)
        return (grad * torch.where((x - r).abs() < bound, close, far),)

    return backward


WRONG = {
    "derivative at the midpoint": (snake, derivative_at(0.5), "does not restore"),
    "derivative at the reference": (snake, derivative_at(0.0), "does not restore"),
    "quotient": (aten.square.default, quotient, "not finite"),
    "close too early": (aten.tanh.default, derivative_when_close(0.1), "does not restore"),
    "close at a kink": (aten.relu.default, derivative_when_close(1e-3), "does not restore"),
    "at equal points": (
        aten.square.default,
        lambda operation, r, x, grad: (grad * ((x[0] + r[0]) / (x[0] != r[0])),),
        "not finite",
    ),
    "in double": (
        aten.square.default,
        lambda operation, r, x, grad: (grad.double() * (x[0] + r[0]),),
        "torch.float64 for an argument of shape .* and torch.float32; they must be the same",
    ),
    "half of it": (
        aten.square.default, lambda operation, r, x, grad: (grad * x[0],), "does not restore"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(name):
    op, backward, message = WRONG[name]
    fxshap.rules.rule(op, name="wrong")(backward)
    args = SNAKE_CASE[1] if op is snake else [Varying((5,))]
    with pytest.raises(AdditivityError, match=f"the rule 'wrong' of .*{message}") as caught:
        check_rule(op, args)
    assert isinstance(caught.value, AssertionError)


def test_the_worst_points_are_shown():
    fxshap.rules.rule(aten.square, name="wrong")(WRONG["half of it"][1])
    with pytest.raises(AdditivityError) as caught:
        check_rule(aten.square.default, [Varying((5,))], output_row=EACH)
    at_reference, at_sample = str(caught.value).splitlines()[1:]
    r, x = float(at_reference.removeprefix("  from ")), float(at_sample.removeprefix("    to "))
    assert abs(r - x) > 1


def test_a_rule_for_equally_many_rows_is_caught():
    @fxshap.rules.rule(aten.square)
    def paired(operation, reference, sample, grad):
        (r,), (x,) = reference, sample
        return (grad * (torch.stack([r, x]).sum(0)),)

    with pytest.raises(RuntimeError, match="equal size") as caught:
        check_rule(aten.square.default, [Varying((5,))])
    assert "from many references to one sample row" in caught.value.__notes__[0]


def test_a_false_linear_declaration_is_caught():
    fxshap.rules.linear(snake)
    with pytest.raises(AdditivityError, match="the derivative of .*, declared linear"):
        check_rule(*SNAKE_CASE)
    check_rule(aten.layer_norm.default, [Varying((4,)), [4]])
    fxshap.rules.linear(aten.layer_norm)
    with pytest.raises(AdditivityError, match="declared linear"):
        check_rule(aten.layer_norm.default, [Varying((4,)), [4]])


def test_linear_in_some_arguments_is_checked_for_those():
    fxshap.rules.rule(aten.div, linear_in=((1,),))(derivative_at(0.5))
    with pytest.raises(AdditivityError, match="declared linear"):
        check_rule(aten.div.Tensor, [torch.ones(3), Varying((3,), low=0.5)])


def test_a_wrong_decomposition_is_caught():
    fxshap.rules.decomposition(snake)(lambda x, frequency: x + (frequency * x).sin())
    with pytest.raises(AdditivityError, match="does not return what the operator does"):
        check_rule(*SNAKE_CASE)


# --- models -------------------------------------------------------------------------------------


def test_an_explainable_model_passes():
    result = assert_explainable(Custom(torch.tanh), torch.randn(5, 4), torch.randn(2, 4))
    assert result.additive and result.samples[0].shapley_distance < 0.5


def test_a_model_that_leaks_fails_with_the_operation():
    fxshap.rules.rule(aten.tanh)(derivative_at(0.5))
    with pytest.raises(AssertionError, match=r"(?s)do not add up.*\n  tanh: error \d") as caught:
        assert_explainable(Custom(torch.tanh), torch.randn(5, 4), torch.randn(2, 4))
    assert isinstance(caught.value, AdditivityError)


def test_a_model_that_cannot_be_captured_fails_with_the_reason():
    def branch(h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h

    with pytest.raises(CaptureError, match="choose with torch.where"):
        assert_explainable(Custom(branch), torch.randn(5, 4), torch.randn(2, 4))
