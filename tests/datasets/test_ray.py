"""Ray explains data sets and writes them, also when workers or the driver are killed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import fxshap
from fxshap.datasets import BatchExplainer, explain, read_summary, write_explanations
from fxshap.errors import InputError, OptionError
from tests.datasets import jobs_of_tests
from tests.datasets.jobs_of_tests import (
    ENVIRONMENT,
    REFUSED,
    ROWS,
    background,
    net,
    table,
    write_files,
)

OPTIONS = {"on_error": "record", "id_column": "patient"}


@pytest.fixture
def folder(tmp_path):
    write_files(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    data = table().drop(columns="patient").fillna(0)
    values = fxshap.DeepExplainer(net(), background()).shap_values(data)
    values[REFUSED] = np.nan
    return values


def assert_explained(found: pd.DataFrame, wanted: np.ndarray) -> None:
    found = found.sort_values("patient", key=lambda ids: ids.str[1:].astype(int))
    assert list(found["patient"]) == list(table()["patient"])
    values = np.stack(found["shap_values"]).reshape(ROWS, 30, 3)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-5)
    assert list(np.flatnonzero(found["error"].notna())) == REFUSED
    assert found["additivity_error"].max() < 1e-5


def test_paths_and_data_sets_of_ray(ray, folder, wanted):
    lazy = explain(folder / "in.parquet", net(), background(), concurrency=1, **OPTIONS)
    assert isinstance(lazy, ray.data.Dataset)
    lazy.write_parquet(str(folder / "out.parquet"))
    schema = pq.read_schema(next((folder / "out.parquet").glob("*.parquet")))
    assert schema.field("shap_values").metadata[b"shape"] == b"[30, 3]"
    assert_explained(pd.read_parquet(folder / "out.parquet"), wanted)
    data = ray.data.read_parquet(str(folder / "in.parquet"))
    lazy = explain(data, net(), background(), concurrency=2, batch_size=64, **OPTIONS)
    assert_explained(lazy.to_pandas(), wanted)
    lazy = data.map_batches(BatchExplainer(net(), background(), **OPTIONS), batch_format="numpy")
    assert_explained(lazy.to_pandas(), wanted)


def test_a_killed_worker_costs_no_row(ray, folder, wanted):
    whole, out, killed = folder / "whole", folder / "out", []
    options = {"rows_per_part": 16, **OPTIONS}
    write_explanations(folder / "in.parquet", whole, net(), background(), concurrency=0, **options)

    def kill(record) -> None:
        if not killed:
            os.kill(record.worker, signal.SIGKILL)
            killed.append(record.worker)

    summary = write_explanations(
        folder / "in.parquet", out, net(), background(), concurrency=2, on_part=kill, **options
    )
    assert killed
    a, b = pd.read_parquet(out), pd.read_parquet(whole)
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert_explained(a, wanted)
    np.testing.assert_array_equal(summary.mean_abs[0], read_summary(whole).mean_abs[0])


def test_errors_of_workers_are_those_of_the_library(ray, folder):
    data = folder / "in.parquet"
    with pytest.raises(InputError, match=r"row 5 \(patient p5\) cannot be explained: mean area"):
        write_explanations(
            data, folder / "out", net(), background(), id_column="patient", concurrency=1
        )
    with pytest.raises(InputError, match="models of different weights"):
        write_explanations(
            data, folder / "other", jobs_of_tests.unseeded, background(), rows_per_part=16,
            concurrency=2, **OPTIONS,
        )  # fmt: skip
    with pytest.raises(OptionError, match="takes 1 of a GPU, and the cluster has 0"):
        explain(data, net(), background(), num_gpus=1)
    with pytest.raises(OptionError, match="a number of workers, not -1"):
        explain(data, net(), background(), concurrency=-1)


COMMAND = (
    sys.executable, "-m", "fxshap", "explain", "jobs_of_tests:net", "--background", "b.parquet",
    "--data", "in.parquet", "--out", "out.parquet", "--on-error", "record", "--id", "patient",
    "--rows-per-part", "16",
)  # fmt: skip


def test_a_killed_driver_continues_on_the_command_line(folder, wanted):
    environment = {**os.environ, **ENVIRONMENT}
    driver = subprocess.Popen(
        [*COMMAND, "--workers", "2"], cwd=folder, env=environment, start_new_session=True
    )
    record = folder / "out.parquet" / "_fxshap"
    while driver.poll() is None and len(list(record.glob("part-*.npz"))) < 3:
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(list(record.glob("part-*.npz"))) < 36
    resume = [*COMMAND, "--workers", "1", "--resume"]  # the number of workers may change
    done = subprocess.run(resume, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "samples were explained before" in done.stdout
    assert "2 of 569 rows are not explained" in done.stdout
    options = {"rows_per_part": 16, **OPTIONS}
    write_explanations(
        folder / "in.parquet", folder / "whole", net(), background(), concurrency=0, **options
    )
    found = pd.read_parquet(folder / "out.parquet")
    pd.testing.assert_frame_equal(found, pd.read_parquet(folder / "whole"), check_exact=True)
    assert_explained(found, wanted)
    assert not list((folder / "out.parquet").rglob(".*"))
