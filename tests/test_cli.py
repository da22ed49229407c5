"""The command line, as a user calls it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner

import fxshap
import fxshap.__main__
from fxshap.cli import cli
from fxshap.rules import RULES, Rule

MODELS = '''
import torch
from torch import nn

print("the code of the module runs")

class Tower(nn.Module):
    """Two inputs, several outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, x, y):
        return {"logits": torch.tanh(self.a(x)) * self.b(y.flatten(1)), "rest": x}

class Words(nn.Module):
    """Embeds token ids."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids, mask=None):
        h = torch.tanh(self.embed(ids))
        return self.head((h if mask is None else h * mask[..., None]).sum(1))

class Scaled(nn.Module):
    """Takes arguments that are not explained."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x, scale, weights, mode="once", negative=False):
        assert mode == "twice" and negative
        return torch.tanh(self.a(x)) * scale * weights

class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x  # the branch

class Nothing:
    pass

class Factories:
    small = staticmethod(lambda: nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)))

ready = nn.Sequential(nn.Linear(4, 2), nn.Tanh())

def fails():
    raise KeyError("weights.pt")  # the failure
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a module of models, and no trace of it afterwards."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    levels = {name: logging.getLogger(name).level for name in ("torch", "fxshap")}
    yield tmp_path
    sys.modules.pop("cli_models", None)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def run(*arguments: str):
    return CliRunner().invoke(cli, arguments, prog_name="fxshap", catch_exceptions=False)


def check(model: str, *arguments: str):
    return run("check", f"cli_models:{model}", *arguments)


def python(*arguments: str, env=None, **options):
    """Run Python with this copy of the library."""
    path = {"PYTHONPATH": str(Path(fxshap.__file__).parents[1])}
    command = [sys.executable, *arguments]
    env = {**os.environ, **path, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


@pytest.mark.parametrize("model", ["Factories.small", "ready"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_explainable_model_exits_with_0(model, dtype):
    result = check(model, "--shape", "4", "--dtype", dtype, "--samples", "2")
    assert result.exit_code == 0
    assert f"Sequential, captured for (*, 4) {dtype}" in result.stdout
    assert f"Sequential, 2 samples against 4 references, {dtype}" in result.stdout
    assert "Adds up: the error is" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not result.stderr


def test_several_inputs_an_output_and_json():
    result = check(
        "Tower", "--shape", "4", "--shape", "2,3", "--output", "logits", "--references", "3",
        "--refine", "1", "--rule", "variance", "--json",
    )  # fmt: skip
    assert result.exit_code == 0
    printed = json.loads(result.stdout.partition("\n")[2])  # after what the module prints
    assert printed["explainable"] is True
    assert printed["report"]["inputs"] == ["(*, 4) float32", "(*, 2, 3) float32"]
    assert printed["verification"]["references"] == 3
    assert printed["verification"]["samples"][0]["shapley_distance"] < 1


@pytest.mark.parametrize("refine", ["exact", "auto"])
def test_exact_values_are_exact(refine):
    result = check("Tower", "--shape", "4", "--shape", "2,3", "--output", "logits",
                   "--references", "3", "--refine", refine, "--json")  # fmt: skip
    printed = json.loads(result.stdout.partition("\n")[2])
    assert printed["verification"]["near_shapley"] is True
    assert printed["verification"]["samples"][0]["shapley_distance"] < 1e-4


def test_another_refinement_is_refused():
    result = check("ready", "--shape", "4", "--refine", "-1")
    assert result.exit_code == 2 and "is not a number from 0, 'exact' or 'auto'" in result.stderr


def test_a_layer_that_embeds_integers():
    inputs = ["--input", "ids=int64:3", "--input", "mask=bool:3"]
    result = check("Words", *inputs, "--layer", "embed", "--integers-below", "9")
    assert result.exit_code == 0, result.stderr
    assert "PASS: additivity error" in result.stdout


def test_a_named_input_and_a_file(folder):
    arguments = ["--input", "x=4", "--input", "y=2,3", "--output", "logits", "--dtype", "float64"]
    result = run("check", f"{folder / 'cli_models.py'}:Tower", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "float64" in result.stdout and "PASS" in result.stdout


def test_bound_arguments(folder):
    numpy.save(folder / "weights.npy", numpy.ones((1, 3), dtype="float32"))
    bound = ["--bind", "scale=0.5", "--bind", "mode=twice", "--bind", "weights=weights.npy"]
    result = check("Scaled", "--shape", "4", "--seed", "1", *bound, "--bind", "negative=True")
    assert result.exit_code == 0, result.stderr
    assert "PASS" in result.stdout and "forward" in result.stdout


def test_weights_in_bfloat16():
    result = check("ready", "--shape", "4", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    assert "PASS" in result.stdout and "tolerance 2e-01" in result.stdout


def test_help_imports_no_pytorch():
    code = "import sys, fxshap.cli; sys.exit(bool({'torch', 'shap', 'numpy'} & set(sys.modules)))"
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize(
    "words, completed", [("fxshap ", "check"), ("fxshap check --re", "--references")]
)
def test_completion(words, completed):
    position = str(len(words.split(" ")) - 1)
    request = {"_FXSHAP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": position}
    done = python("-m", "fxshap", env=request)
    assert f"plain,{completed}" in done.stdout.splitlines()


def test_rules_are_those_of_the_library():
    from typing import get_args

    from fxshap.runtime.options import RuleName

    (rule,) = [option for option in cli.commands["check"].params if option.name == "rule"]
    assert tuple(rule.type.choices) == get_args(RuleName)


@pytest.mark.parametrize("shared", ["--output", "--layer", "--rule", "--json", "--verbose"])
def test_shared_options_have_one_text(shared):
    one, other = (
        next(option for option in cli.commands[name].params if shared in option.opts)
        for name in ("check", "explain")
    )
    assert one.help == other.help and one.default == other.default


def test_ranked_outputs_is_the_number_of_columns(monkeypatch):
    options = {}
    monkeypatch.setattr(
        "fxshap.verification.verify.verify", lambda *a, **given: options.update(given) or stop()
    )

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    assert check("ready", "--shape", "4", "--ranked-outputs", "2").exit_code == 2
    assert options["ranked_outputs"] == 2


def test_a_leaking_model_exits_with_1(monkeypatch):
    import torch

    def half(operation, reference, sample, grad):
        return (grad / 2,)

    monkeypatch.setitem(RULES, torch.ops.aten.tanh, Rule("half", half))
    result = check("ready", "--shape", "4")
    assert result.exit_code == 1
    assert "DOES NOT ADD UP" in result.stdout and "FAIL: additivity error" in result.stdout
    assert "1.tanh: error" in result.stdout
    result = check("ready", "--shape", "4", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verification"]["leaks"][0]["name"] == "1.tanh"


ERRORS = {
    "no capture": (["cli_models:Branch", "--shape", "4"], "# the branch`"),
    "wrong shape": (
        ["cli_models:ready", "--shape", "5"], "On the command line: --shape"
    ),
    "no output": (
        ["cli_models:Tower", "--shape", "4", "--shape", "6"], "On the command line: --output"
    ),
    "not that output": (
        ["cli_models:Tower", "--shape", "4", "--shape", "6", "--output", "1"], "output=1 is not in"
    ),
    "failing factory": (["cli_models:fails", "--shape", "4"], "# the failure`"),
    "no module": (["cli_nothing:Model", "--shape", "4"], "No module named 'cli_nothing'"),
    "no factory": (["cli_models:nothing", "--shape", "4"], "cli_models has no nothing"),
    "no model": (["cli_models:Nothing", "--shape", "4"], "of type Nothing, not a torch.nn"),
    "no colon": (["cli_models", "--shape", "4"], "is not like package.module:factory"),
    "no shape": (["cli_models:ready"], "Give the shape of every input, with --shape or --input"),
    "no such file": (["other/models.py:ready", "--shape", "4"], "there is no file other/models.py"),
    "no input": (["cli_models:ready", "--input", "x=int8:4"], "is not like name=3,224,224"),
    "only integers": (
        ["cli_models:Words", "--input", "ids=int64:3"], "Explain the layer that embeds them"
    ),
    "no such argument": (
        ["cli_models:Tower", "--shape", "4", "--shape", "6", "--bind", "no=1"],
        "On the command line: --input, --bind",
    ),
    "integers out of range": (
        ["cli_models:Words", "--input", "ids=int64:99", "--layer", "embed"],
        "On the command line: --integers-below",
    ),
    "no file to bind": (
        ["cli_models:ready", "--shape", "4", "--bind", "mask=mask.npy"], "there is no file mask.npy"
    ),
    "no value to bind": (["cli_models:ready", "--bind", "mask"], "is not like scale=0.5"),
    "bfloat16 of a layer": (
        ["cli_models:Words", "--input", "ids=int64:3", "--layer", "embed", "--dtype", "bfloat16"],
        "which NumPy lacks",
    ),
    "samples of a layer": (
        ["cli_models:Words", "--input", "ids=int64:3", "--layer", "embed", "--samples", "2"],
        "--layer explains one sample",
    ),
    "no sizes": (["cli_models:ready", "--shape", "4,-1"], "'4,-1' is not like 3,224,224"),
    "no dtype": (["cli_models:ready", "--shape", "4", "--dtype", "int8"], "'int8' is not one of"),
    "no format": (["cli_models:ready", "--shape", "4", "--draw", "x.y"], "cannot draw to x.y"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_exits_with_2_and_the_reason(name):
    arguments, reason = ERRORS[name]
    result = run("check", *arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_an_error_in_json():
    result = check("fails", "--shape", "4", "--json")
    assert result.exit_code == 2
    printed = json.loads(result.stdout.partition("\n")[2])
    assert printed["explainable"] is False and printed["error"] == "KeyError"
    assert "weights.pt" in printed["message"] and "cli_models.py" in printed["message"]


def test_verbose_logs_and_shows_tracebacks(folder):
    result = check("fails", "--shape", "4", "--verbose")
    assert "Traceback" in result.stderr
    command = ["-m", "fxshap", "check", "cli_models:ready", "--shape", "4", "--verbose"]
    done = python(*command, cwd=folder)
    assert "DEBUG:fxshap:captured Sequential for any number of rows" in done.stderr
    assert "Adds up" in done.stdout


def test_a_picture_is_drawn(folder):
    assert check("ready", "--shape", "4", "--draw", "graph.dot").exit_code == 0
    assert (folder / "graph.dot").read_text().startswith("digraph")


def test_the_demo_command_runs_the_demo(monkeypatch):
    from fxshap.demo import run as demo

    paths = []
    monkeypatch.setattr(demo, "run_demo", lambda path: paths.append(path) or 0)
    assert run("demo", "--output", "digits.png").exit_code == 0
    assert paths == [Path("digits.png")]


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"fxshap {fxshap.__version__}\n")


@pytest.mark.parametrize("command", [[], ["check"], ["explain"], ["demo"]])
def test_help_has_an_example_and_fits(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout and "\n    fxshap " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_warns_that_it_runs_the_users_code():
    printed = " ".join(run("check", "--help").stdout.split())
    assert "Imports PACKAGE.MODULE, which runs its code" in printed
    assert (
        "Exits with 0 if the attributions add up, 1 if they do not, and 2 with the reason"
        in printed
    )


def test_without_click_the_error_names_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fxshap.cli")
    monkeypatch.setitem(sys.modules, "click", None)
    assert fxshap.__main__.main() == 2
    out, err = capsys.readouterr()
    assert not out and "pip install click" in err
