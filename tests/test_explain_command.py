"""``fxshap explain``, as a user calls it."""

import json
import logging
import sys

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from fxshap.cli import cli
from fxshap.runtime.attributions import PairBatches

MODELS = '''
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 4)).eval()

class Two(nn.Module):
    """Two inputs, another argument and several outputs."""

    def forward(self, x, y, unit):
        return {"logits": torch.tanh(x) * torch.tanh(y) * unit[:, None], "rest": x}

def two():
    from fxshap import make_explainable
    return make_explainable(Two(), output="logits", forward_kwargs={"unit": torch.ones(1)})
'''
X = np.random.default_rng(0).normal(size=(300, 3)).astype("float32")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a model and data, and no trace of it afterwards."""
    (tmp_path / "explained_models.py").write_text(MODELS)
    data = pd.DataFrame(X, columns=list("abc")).assign(id=[f"r{i}" for i in range(300)])
    data.to_parquet(tmp_path / "in.parquet")
    data.assign(a=data["a"].where(data.index != 7)).to_parquet(tmp_path / "nan.parquet")
    np.save(tmp_path / "b.npy", X[:10])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    levels = {name: logging.getLogger(name).level for name in ("torch", "fxshap")}
    yield tmp_path
    sys.modules.pop("explained_models", None)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def explain(*arguments: str, data: str = "in.parquet", background: str = "b.npy", model="net"):
    command = ["explain", f"explained_models:{model}", "--background", background, "--data", data]
    command += ["--workers", "0", "--inputs", "a,b,c", *arguments]
    return CliRunner().invoke(cli, command, prog_name="fxshap", catch_exceptions=False)


def test_a_job_that_explains_all_rows_exits_with_0():
    result = explain("--out", "out.parquet", "--outputs", "0,3", "--rule", "variance")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("300 samples in ")
    assert "samples per second, into out.parquet" in result.stdout
    assert "Adds up: the largest error is" in result.stdout
    assert not result.stderr
    assert len(pd.read_parquet("out.parquet")["shap_values"][0]) == 6
    again = explain("--out", "out.parquet", "--outputs", "0,3", "--rule", "variance")
    assert again.exit_code == 2 and "--resume" in again.stderr
    other = explain("--out", "out.parquet", "--outputs", "0", "--resume")
    assert other.exit_code == 2 and "another options" in other.stderr


def test_rows_that_are_not_explained_exit_with_2_or_3():
    result = explain("--out", "out", "--id", "id", data="nan.parquet")
    assert result.exit_code == 2
    assert "row 7 (id r7) cannot be explained: a contains NaN" in result.stderr
    more = ["--out", "out", "--id", "id", "--on-error", "record", "--resume"]
    result = explain(*more, data="nan.parquet")
    assert result.exit_code == 2 and "another options" in result.stderr
    more[1] = "other"
    result = explain(*more, data="nan.parquet")
    assert result.exit_code == 3
    assert "1 of 300 rows are not explained:\n  row 7 (id r7): a contains NaN" in result.stdout


def test_json():
    result = explain("--out", "out.npy", "--dtype", "float16", "--json", "--ranked-outputs", "2")
    printed = json.loads(result.stdout)
    assert printed["rows"] == 300 and printed["refused"] == 0 and printed["out"] == "out.npy"
    assert printed["largest_error"] < 5e-3 and printed["samples_per_second"] > 0
    assert np.load("out.npy/shap_values.npy").shape == (300, 3, 2)


def test_attributions_that_do_not_add_up_exit_with_1(monkeypatch):
    mean = PairBatches._mean
    monkeypatch.setattr(PairBatches, "_mean", lambda *args: 1.01 * mean(*args))
    result = explain("--out", "out")
    assert result.exit_code == 1
    assert "do not sum to the difference of the outputs" in result.stderr


def test_several_inputs_and_arguments(folder):
    table = {"x": list(X), "y": list(X[::-1]), "scale": np.arange(300, dtype="float32")}
    pd.DataFrame(table).to_parquet("two.parquet")
    np.savez("two.npz", x=X[:10], y=X[:10])
    command = ["explain", "explained_models:two", "--background", "two.npz", "--data"]
    command += ["two.parquet", "--workers", "0", "--out", "out.zarr", "--argument", "unit=scale"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    import zarr

    arrays = dict(zarr.open_group("out.zarr", mode="r").arrays())
    assert arrays["shap_values_x"].shape == arrays["shap_values_y"].shape == (300, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--out", "o", "--outputs", "0,x"], "'0,x' is not like 0,3"),
        (["--out", "o", "--argument", "mask"], "'mask' is not like argument=column"),
        (["--out", "o", "--batch-size", "0"], "'0' is not a number or 'auto'"),
        (["--out", "o", "--background", "in.parquet"], "several files are .npy files"),
        (["--out", "o", "--outputs", "9"], "the model has the outputs 0 to 3"),
        (["--out", "o", "--inputs", "a"], "of 2 inputs, but the background has 1"),
        (["--out", "o", "--data", "nothing.parquet"], "there is no data at nothing.parquet"),
        ([], "Missing option '--out'"),
    ],
)
def test_an_error_exits_with_2_and_the_reason(arguments, reason):
    result = explain(*arguments)
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_stopped_job_tells_how_to_continue(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxshap.datasets.write_explanations", interrupted)
    result = explain("--out", "out")
    assert result.exit_code == 130 and "Continue out with --resume" in result.stderr


def test_without_ray_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["explain", "explained_models:net", "--background", "b.npy", "--data", "in.parquet"]
    result = CliRunner().invoke(cli, [*command, "--inputs", "a,b,c", "--out", "out"])
    assert result.exit_code == 2 and "pip install 'ray[data]'" in result.stderr
