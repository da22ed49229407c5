"""The library prints nothing: it returns, raises, warns and logs."""

import logging
import threading

import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.capture.export import capture, logger

BACKGROUND, SAMPLES = torch.randn(4, 3), torch.randn(2, 3)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()


class Folded(nn.Module):
    """Layers that take the batch and the features as one dimension, the features outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(1, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x.T.reshape(-1, 1)))
        return self.head(h.unflatten(0, (3, -1)).transpose(0, 1).flatten(1))


def use(model: nn.Module) -> None:
    """Go through everything that is public."""
    explainable = fxshap.make_explainable(model, refine=1)
    shap.DeepExplainer(explainable, BACKGROUND).shap_values(SAMPLES)
    explainable(SAMPLES)
    assert str(explainable) and str(explainable.report())
    assert str(fxshap.verify(model, BACKGROUND, SAMPLES))
    fxshap.testing.assert_explainable(model, BACKGROUND, SAMPLES)


@pytest.mark.filterwarnings("error::UserWarning")
def test_nothing_is_printed(capfd):
    use(network())
    assert capfd.readouterr() == ("", "")


def test_a_refusal_prints_nothing(capfd):
    """Not even the graph of it, which torch.export prints."""

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(fxshap.CaptureError):
        fxshap.make_explainable(Branch(), SAMPLES)
    assert capfd.readouterr() == ("", "")


def test_what_is_done_is_logged(caplog):
    caplog.set_level(logging.DEBUG, "fxshap")
    explainable = fxshap.make_explainable(network())
    explainer = shap.DeepExplainer(explainable, BACKGROUND)
    explainer.shap_values(SAMPLES)
    explainer.shap_values(SAMPLES)
    told = [record.getMessage() for record in caplog.records if record.name == "fxshap"]
    captured, layout, free, recorded = told
    assert captured.startswith("captured Sequential for any number of rows: ")
    assert layout == "a sample is run as one row"
    assert "hold" in free
    assert recorded == "recorded 4 references, 4 to a tape"

    with torch.no_grad():
        explainable.original_model[0].weight += 1
    shap.DeepExplainer(explainable, BACKGROUND).shap_values(SAMPLES)
    assert [message for message in caplog.messages if message == recorded] == [recorded] * 2

    caplog.clear()
    shap.DeepExplainer(fxshap.make_explainable(Folded()), BACKGROUND).shap_values(SAMPLES)
    assert "a sample is run as many copies of itself" in caplog.messages


def test_captures_that_are_dropped_are_logged(caplog, monkeypatch):
    monkeypatch.setattr("fxshap.runtime.captures.MAX_CAPTURES", 1)
    caplog.set_level(logging.DEBUG, "fxshap")
    explainable = fxshap.make_explainable(nn.Tanh())
    explainable.capture(torch.randn(2, 3))
    explainable.capture(torch.randn(2, 4))
    assert caplog.messages.count("dropped the least recently used capture") == 1


def test_there_is_one_logger():
    assert logger is logging.getLogger("fxshap")
    others = [name for name in logging.root.manager.loggerDict if name.startswith("fxshap.")]
    assert not others


def test_what_is_tried_in_another_way_is_not_printed(capfd):
    """torch's own log of the first way, in which it cannot take an einsum in autocast apart."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return torch.einsum("bi,bj->bij", self.layer(x), x).flatten(1).float()

    fxshap.make_explainable(Cast(), SAMPLES)
    assert capfd.readouterr() == ("", "")


class Logging(nn.Module):
    """Logs as parts of torch do while they export, in some releases."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.log = logging.getLogger(name)

    def forward(self, x: Tensor) -> Tensor:
        self.log.warning("always_classified is unsupported.")
        self.log.error("failed")
        return torch.tanh(x)


@pytest.mark.parametrize("name", ["torch", "torch.export._trace", "torch._dynamo.new", "torch.fx"])
def test_what_torch_logs_in_a_capture_is_not_printed(capfd, name):
    # torch's handlers hold the standard error of the time when they were made
    torch._logging._internal._init_logs()
    model = Logging(name)
    capture(model, [SAMPLES])  # make_explainable also runs the model as it is
    assert capfd.readouterr() == ("", "")
    model(SAMPLES)
    assert "always_classified" in capfd.readouterr().err


def test_what_torch_logs_in_another_thread_is_printed(capfd):
    torch._logging._internal._init_logs()
    log = logging.getLogger("torch.export")

    class Threaded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=log.warning, args=("from another thread",))
            thread.start()
            thread.join()
            return torch.tanh(x)

    fxshap.make_explainable(Threaded(), SAMPLES)
    assert "from another thread" in capfd.readouterr().err
