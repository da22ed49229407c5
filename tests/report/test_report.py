"""The contents of `report()`, `print` and `draw`."""

import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap import CaptureError, MissingExtraError, OptionError
from fxshap.report.report import group_numbered_names

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


class Blocks(nn.Module):
    """Every treatment: closed and generic rules, linear operations, operations on weights only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))
        self.shift = nn.Parameter(torch.ones(4))
        self.act = nn.Tanh()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + self.shift.exp()
        running = self.act(self.act(x)).logcumsumexp(1)
        return self.head(F.silu(running))


@pytest.fixture(scope="module")
def explainable():
    return fxshap.make_explainable(Blocks().eval(), torch.randn(3, 4))


@pytest.fixture
def report(explainable):
    return explainable.report()


def test_every_operation_is_in_the_report_with_its_rule_and_modules(report):
    entries = {
        (entry.operation, entry.treatment): (entry.nodes, entry.rule, entry.modules)
        for entry in report.entries
    }
    layers = tuple(f"layers.{i}.0" for i in range(3))
    gelus = tuple(f"layers.{i}.1" for i in range(3))
    assert entries == {
        ("aten.logcumsumexp.default", "generic"): (1, "generic", ("forward",)),
        ("aten.gelu.default", "closed"): (3, "elementwise (gelu)", gelus),
        ("aten.tanh.default", "closed"): (2, "elementwise (tanh)", ("act",)),
        ("aten.silu.default", "closed"): (1, "elementwise (silu)", ("forward",)),
        ("aten.linear.default", "linear"): (4, "", (*layers, "head")),
        ("aten.add.Tensor", "linear"): (3, "", ("forward",)),
        ("aten.exp.default", "folded"): (3, "", ("forward",)),
    }
    assert report.generic == ["aten.logcumsumexp.default"]
    assert [report.nodes(t) for t in ("generic", "closed", "linear", "folded")] == [1, 6, 7, 3]
    assert report.nodes("generic", "closed") == 7


def test_the_report_counts_the_rescaled_nodes(explainable, report):
    code = explainable.rescaled_graph.code
    assert code.count("rescale_rescale(") == report.nodes("generic", "closed")


def test_the_table_fits_eighty_columns(report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = str(report)
    assert repr(report) == text
    assert text.splitlines()[:2] == [
        "Blocks, captured for (*, 4) float32",
        "7 nodes rewritten (6 by closed rules, 1 by the generic rule), 7 linear, 3 folded",
    ]
    rows = [line.split() for line in text.splitlines()[3:]]
    assert rows[0] == ["operation", "nodes", "treatment", "modules"]
    assert ["gelu", "3", "closed:", "elementwise", "(gelu)", "layers.*.1", "(3)"] in rows
    assert ["logcumsumexp", "1", "generic", "forward"] in rows
    assert max(map(len, text.splitlines())) <= 80


def test_data_frames_and_html(report):
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["model"] == "Blocks" and plain["inputs"] == ["(*, 4) float32"]
    assert plain["nodes"] == {"generic": 1, "closed": 6, "linear": 7, "folded": 3}
    frame = report.to_pandas()
    assert list(frame.columns) == ["operation", "nodes", "treatment", "rule", "modules"]
    assert frame["nodes"].sum() == 17
    html = report._repr_html_()
    assert html.count("<tr") == 1 + len(report.entries) and "layers.*.1 (3)" in html


def test_the_repr_of_a_model_has_three_lines(explainable):
    fresh = fxshap.make_explainable(Blocks())
    assert str(fresh).splitlines() == [
        "ExplainableModule of Blocks: 13 modules, 74 parameters",
        "  not captured yet",
        "  the first explanation captures it, or capture(*inputs)",
    ]
    assert str(explainable).splitlines()[1:] == [
        "  captured for (*, 4) float32",
        "  7 nodes rewritten (6 by closed rules, 1 by the generic rule), 7 linear, 3 folded",
    ]


def test_without_a_capture_the_error_names_the_method_to_call():
    with pytest.raises(CaptureError, match=r"call capture\(\*inputs\)"):
        fxshap.make_explainable(Blocks()).report()


def test_batch_norm_in_evaluation_mode_is_linear_in_every_output(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())
    explainable = fxshap.make_explainable(model.eval(), torch.randn(3, 1, 5, 5))
    report = explainable.report()
    treatments = {entry.operation: (entry.treatment, entry.rule) for entry in report.entries}
    assert treatments["aten.batch_norm.default"] == ("linear", "")
    assert treatments["aten.conv2d.default"] == ("linear", "")
    assert report.generic == [] and report.to_dict()["nodes"]["generic"] == 0
    assert "1 node rewritten (1 by closed rules, 0 by the generic rule)" in repr(explainable)
    assert "generic</td>" not in report._repr_html_()
    report.draw(tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text()
    (line,) = [text for text in source.splitlines() if "<b>batch_norm" in text]
    assert 'fillcolor="#f2f2f2"' in line and "#f4a582" not in source


def test_a_model_without_nonlinearities_has_a_report_too():
    linear = fxshap.make_explainable(nn.Linear(4, 2), torch.randn(2, 4)).report()
    assert linear.nodes("closed", "generic") == 0 and "linear" in str(linear)
    identity = fxshap.make_explainable(nn.Identity(), torch.randn(2, 4)).report()
    assert identity.entries == () and "0 nodes rewritten" in str(identity)
    assert identity.to_pandas().empty and "<table" in identity._repr_html_()


def test_names_that_differ_by_number_are_grouped():
    names = ["layers.0.act.1", "head", "layers.1.act.1", "stem1", "stem2", "layers.1.fc2"]
    assert group_numbered_names(names) == [
        "layers.*.act.1 (2)",
        "head",
        "stem1",
        "stem2",
        "layers.1.fc2",
    ]


# --- the picture --------------------------------------------------------------------------------


def test_the_source_of_the_picture_needs_no_graphviz(report, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    report.draw(tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text()
    assert source.startswith("digraph")
    colours = {
        "logcumsumexp": "#f4a582",
        "gelu": "#92c5de",
        "linear": "#f2f2f2",
        "inputs_0": "#d9f0d3",
    }
    for node, colour in colours.items():
        (line,) = [text for text in source.splitlines() if text.strip().startswith(f"{node} [")]
        assert f'fillcolor="{colour}"' in line
    edges = {tuple(line.split(" -> ")) for line in source.split("\n\t") if " -> " in line}
    assert ("inputs_0", "linear") in edges and ("linear", "gelu") in edges
    assert [a for a, b in edges if b.startswith("output")] == ["linear_3"]
    assert 'label="layers.1"' in source


def test_getitem_of_several_outputs_is_drawn_as_linear(tmp_path):
    class Split(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            return a * b

    fxshap.make_explainable(Split(), torch.randn(3, 4)).report().draw(tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text()
    assert source.count("<b>getitem") == 2
    assert all('fillcolor="#f2f2f2"' in x for x in source.splitlines() if "<b>getitem" in x)
    assert "no gradient" not in source


def test_drawing_without_the_graphviz_program_names_it(report, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="needs the program `dot` of Graphviz"):
        report.draw(tmp_path / "graph.svg")
    assert not (tmp_path / "graph.svg").exists()


def test_drawing_without_the_graphviz_package_names_it(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(ImportError, match=r"pip install graphviz"):
        report.draw(tmp_path / "graph.dot")


@pytest.mark.parametrize("name", ["graph", "graph.nothing"])
def test_drawing_rejects_an_unknown_suffix(report, tmp_path, name):
    with pytest.raises(OptionError, match="use .dot, .svg, .png or .pdf"):
        report.draw(tmp_path / name)


@needs_dot
def test_drawing_writes_svg_and_png(report, tmp_path):
    report.draw(tmp_path / "graph.svg")
    report.draw(str(tmp_path / "graph.png"))
    drawn = (tmp_path / "graph.svg").read_text()
    assert "<svg" in drawn and "gelu" in drawn
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
