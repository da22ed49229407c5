"""The messages that the page of errors quotes are raised, word for word."""

import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import shap
import torch
from shap.explainers._deep import deep_pytorch
from torch._inductor import config as inductor_config

import fxshap
from fxshap.rules import RULES, Rule

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
NET = """
import torch
from torch import nn


@torch.library.custom_op("mylib::snake", mutates_args=())
def snake(x: torch.Tensor) -> torch.Tensor:
    return x + torch.sin(x) ** 2


@snake.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.table = torch.arange(100.0)[:, None] / 10


class Checked(Net):
    def forward(self, x):
        assert (x.abs() < 100).all(), "too large"
        return self.head(self.first(x))


class Dictionary(Net):
    def forward(self, x):
        return {"logits": self.head(x), "loss": x.sum()}


class Deep(Net):
    def forward(self, x):
        return self.head(x)[:, None]


class Undefined(Net):
    def forward(self, x):
        return torch.cat([self.head(x), self.head(x), torch.log(x[:, :1] - 5)], 1)


class Branch(Net):
    def forward(self, x):
        if x.sum() > 0:
            return self.head(x)
        return -self.head(x)


class Number(Net):
    def forward(self, x):
        h = self.head(x)
        return h / float(h.norm())


class Softmax(Net):
    def forward(self, x):
        return self.head(torch.softmax(x, 0))


class Position(Net):
    def forward(self, x):
        return self.head(x + self.table[: x.size(0)])


class Rows(Net):
    def forward(self, x):
        return self.head(x / x.size(0))


class Operator(nn.Module):
    def forward(self, x):
        return torch.ops.mylib.snake(x)


class Cast(nn.Module):
    def forward(self, x):
        return (x.long() & 1).float()
"""
X, BACKGROUND = torch.randn(2, 4), torch.randn(5, 4)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory):
    """A module ``net`` of the user."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "net.py").write_text(NET)
    sys.path.insert(0, str(folder))
    import net

    yield net
    sys.path.remove(str(folder))
    del sys.modules["net"]


def explain(model: Any, x: torch.Tensor = X, background: torch.Tensor = BACKGROUND) -> None:
    shap.DeepExplainer(fxshap.make_explainable(model), background).shap_values(x)


def with_nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[0, 0] = torch.nan
    return x


def sequential(*layers: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), *layers)


def explain_with_a_broken_weight(net: Any) -> None:
    model = net.Checked()
    model.norm = torch.nn.LayerNorm(4)
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    explain(model)


def explain_without_hooks(net: Any) -> None:
    """Explain as by a release of SHAP that does not hook the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deep_pytorch.PyTorchDeep, "add_handles", lambda *_: [])
        explain(net.Checked())


def compile_without_compiler(net: Any) -> None:
    explainable = fxshap.make_explainable(sequential(torch.nn.GELU()), compile=True)
    with inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        shap.DeepExplainer(explainable, BACKGROUND).shap_values(X)


def draw_without_graphviz(net: Any) -> None:
    report = fxshap.make_explainable(net.Checked(), X).report()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        report.draw("graph.svg")


def check_a_wrong_rule(net: Any) -> None:
    wrong = Rule("mine", lambda operation, reference, sample, grad: (grad,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, torch.ops.mylib.snake, wrong)
        fxshap.testing.assert_explainable(sequential(net.Operator()), BACKGROUND, X)


def explain_exactly_with_many_features(net: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    explainer = fxshap.DeepExplainer(model, torch.randn(10, 30), refine="exact")
    explainer.shap_values(torch.randn(2, 30))


#: By the first words of a message on the page: what raises it.
RAISES: dict[str, Callable[[Any], Any]] = {
    "make_explainable takes a torch.nn.Module": lambda net: fxshap.make_explainable(len),
    "input 0 is of torch.int64": lambda net: explain(net.Checked(), X.long(), BACKGROUND.long()),
    "the inputs have the dtype": lambda net: explain(
        net.Checked(), X.double(), BACKGROUND.double()
    ),
    "input 0 of the sample contains NaN": lambda net: explain(sequential(), with_nan(X)),
    "the model raises AssertionError": lambda net: explain(net.Checked(), X * 1000),
    "the model returns a dict": lambda net: explain(net.Dictionary()),
    "the model returns a tensor of shape": lambda net: explain(net.Deep()),
    "output 6 of the sample is NaN": lambda net: explain(net.Undefined(), X, BACKGROUND.abs() + 6),
    "the weight 'norm.weight'": explain_with_a_broken_weight,
    "the model cannot be captured as one graph: at net.py (`if": lambda net: explain(net.Branch()),
    "the model cannot be captured as one graph: at net.py (`return": lambda net: explain(
        net.Number()
    ),
    "the model is captured at the first": lambda net: fxshap.make_explainable(
        net.Checked()
    ).report(),
    "the rows of a batch influence": lambda net: explain(net.Softmax()),
    "the position of a row": lambda net: explain(net.Position()),
    "the model computes with the number": lambda net: explain(net.Rows()),
    "mylib.snake.default": lambda net: explain(sequential(net.Operator())),
    "aten._to_copy.default": lambda net: explain(sequential(net.Cast()), X, BACKGROUND * 9),
    "refine counts pairs": lambda net: fxshap.make_explainable(net.Checked(), refine=-1),
    "refine='exact' evaluates": explain_exactly_with_many_features,
    "torch.compile could not": compile_without_compiler,
    "shap RELEASE calls this model": explain_without_hooks,
    "a .svg needs the program": draw_without_graphviz,
    "DOES NOT ADD UP": check_a_wrong_rule,
}


def quoted() -> list[str]:
    """Return the messages on the page."""
    blocks = re.findall(r"(?:^    .*\n)+", PAGE.read_text(), re.MULTILINE)
    return [
        without_circumstances(re.sub(r"^    ", "", block, flags=re.MULTILINE).strip())
        for block in blocks
    ]


def without_circumstances(message: str) -> str:
    """Return a message without numbers of lines, folders, releases, times and rounding errors."""
    message = re.sub(r"(?:\S*/)?(net\.py):\d+", r"\1", message)
    message = re.sub(rf"shap (?:0\.51\.0|{re.escape(version('shap'))})", "shap RELEASE", message)
    message = re.sub(r"about [\d.]+ \w+ for this", "about SOME TIME for this", message)
    message = re.sub(r"\(None, '(?:g\+\+|no-such-compiler)'\)", "COMPILER", message)
    return re.sub(r"error (is )?\d\S*e-\d+", r"error \1SMALL", message)


def test_every_quoted_message_has_a_cause_here() -> None:
    assert [message for message in quoted() if not message.startswith(tuple(RAISES))] == []


@pytest.mark.parametrize("start", RAISES)
@pytest.mark.filterwarnings("ignore")
def test_a_quoted_message_is_raised(start: str, net: Any) -> None:
    torch.manual_seed(0)
    (message,) = [text for text in quoted() if text.startswith(start)]
    with pytest.raises(fxshap.FxshapError) as raised:
        RAISES[start](net)
    shown = without_circumstances(str(raised.value))
    assert message in shown if start == "DOES NOT ADD UP" else message == shown
