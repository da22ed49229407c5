"""Jobs write every row of every format, and continue to the result of an uninterrupted run."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from sklearn.datasets import load_digits
from torch import nn

import fxshap
from fxshap.datasets import read_summary, write_explanations
from fxshap.datasets.columns import shaped_column
from fxshap.datasets.parts import divide, rows_per_part_of
from fxshap.datasets.sinks import ParquetSink
from fxshap.datasets.writer import Record
from fxshap.errors import AdditivityError, InputError, OptionError
from fxshap.runtime.attributions import PairBatches

IMAGES = (load_digits().images[:, None] / 16).astype("float32")[:300]
BACKGROUND = IMAGES[-10:]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    ).eval()


def images_with_nan() -> np.ndarray:
    images = IMAGES.copy()
    images[[5, 130]] = np.nan
    return images


@pytest.fixture
def data(tmp_path) -> Path:
    """Images as lists in Parquet, in two files of several row groups."""
    folder = tmp_path / "in"
    folder.mkdir()
    images = images_with_nan()
    table = pa.table(
        {
            "image": pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), 64),
            "id": [f"digit {i}" for i in range(300)],
        }
    )
    pq.write_table(table[:170], folder / "a.parquet", row_group_size=50)
    pq.write_table(table[170:], folder / "b.parquet", row_group_size=1000)
    return folder


OPTIONS = {
    "concurrency": 0,
    "on_error": "record",
    "inputs": "image",
    "id_column": "id",
    "rows_per_part": 64,
}


def job(data, out, **options):
    return write_explanations(data, out, net(), BACKGROUND, **{**OPTIONS, **options})


def wanted() -> np.ndarray:
    values = fxshap.DeepExplainer(net(), BACKGROUND).shap_values(IMAGES)
    values[[5, 130]] = np.nan
    return values


def read(out: Path) -> pa.Table:
    return pq.read_table(out)


def assert_equal(a: pa.Table, b: pa.Table) -> None:
    """Assert that tables have the same rows, bit for bit."""
    assert a.schema.equals(b.schema, check_metadata=True)
    pd.testing.assert_frame_equal(a.to_pandas(), b.to_pandas(), check_exact=True)


def test_parquet(data, tmp_path):
    out = tmp_path / "out.parquet"
    summary = job(data, out)
    table = read(out)
    assert table["id"].to_pylist() == [f"digit {i}" for i in range(300)]
    found = shaped_column(table, "shap_values")
    assert found.shape == (300, 1, 8, 8, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted(), rtol=0, atol=1e-6)
    errors = table["error"].to_pylist()
    assert [i for i, text in enumerate(errors) if text] == [5, 130]
    assert (summary.rows, summary.refused) == (300, 2)
    row = summary.refused_rows[0]
    assert (row.row, row.name) == (5, "row 5 (id digit 5)")
    assert "image contains NaN" in row.reason
    assert 0 < summary.largest_error < 1e-5
    assert summary.largest_error == pytest.approx(np.nanmax(table["additivity_error"].to_numpy()))
    assert summary.explanation().shape == (298, 1, 8, 8, 3)
    np.testing.assert_allclose(
        read_summary(out).mean_abs[0], np.nanmean(np.abs(wanted()), 0), atol=1e-6
    )
    assert sorted(p.name for p in out.iterdir())[1:] == [f"part-{i:06d}.parquet" for i in range(5)]


def test_parquet_of_float16_with_some_columns(data, tmp_path):
    summary = job(data, tmp_path / "out", dtype="float16", keep_columns=["id"], outputs=[2])
    table = read(tmp_path / "out")
    assert table.column_names[:2] == ["id", "shap_values"]
    assert table.schema.field("shap_values").type == pa.list_(pa.field("element", pa.float16()), 64)
    found = shaped_column(table, "shap_values")
    assert found.dtype == np.float16 and found.shape == (300, 1, 8, 8, 1)
    np.testing.assert_allclose(found, wanted()[..., 2:], rtol=0, atol=1e-3)
    sums = found.sum((1, 2, 3), dtype=float) + shaped_column(table, "base_values")
    error = np.abs(sums - shaped_column(table, "model_output")).max(1)
    assert summary.largest_error == pytest.approx(np.nanmax(table["additivity_error"].to_numpy()))
    assert 1e-4 < np.nanmax(error) < 1e-2  # that of the values as they are stored


@pytest.mark.parametrize("format", ["numpy", "zarr"])
@pytest.mark.parametrize("source", ["parquet", "npy", "folder", "zarr", "group"])
def test_arrays(data, tmp_path, source, format):
    paths = {name: tmp_path / name for name in ("x.npy", "folder", "x.zarr", "g.zarr")}
    images, ids = images_with_nan(), np.arange(300)
    np.save(paths["x.npy"], images)
    paths["folder"].mkdir()
    np.save(paths["folder"] / "image.npy", images)
    np.save(paths["folder"] / "number.npy", ids)
    zarr.save_array(paths["x.zarr"], images)
    zarr.save_group(paths["g.zarr"], image=images, number=ids)
    kinds = {
        "parquet": (data, {}),
        "npy": (paths["x.npy"], {"inputs": None, "id_column": None}),
        "folder": (paths["folder"], {"id_column": "number", "keep_columns": ["number"]}),
        "zarr": (paths["x.zarr"], {"inputs": None, "id_column": None}),
        "group": (paths["g.zarr"], {"id_column": "number", "keep_columns": ["number"]}),
    }
    path, options = kinds[source]
    out = tmp_path / {"numpy": "out.npy", "zarr": "out.zarr"}[format]
    summary = job(path, out, dtype="float16", **options)
    if format == "numpy":
        arrays = {file.stem: np.load(file) for file in out.glob("*.npy")}
    else:
        arrays = {name: array[:] for name, array in zarr.open_group(out, mode="r").arrays()}
    assert arrays["shap_values"].dtype == np.float16
    np.testing.assert_allclose(arrays["shap_values"], wanted(), rtol=0, atol=1e-3)
    assert arrays["base_values"].shape == (300, 3)
    assert np.isnan(arrays["additivity_error"]).sum() == summary.refused == 2
    if "keep_columns" in options:
        np.testing.assert_array_equal(arrays["number"], ids)


def test_an_output_is_not_overwritten(data, tmp_path):
    out = tmp_path / "out.parquet"
    out.mkdir()
    (out / "letters.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OptionError, match="exists already, and it is not that of a job"):
            job(data, out, resume=resume)
    job(data, tmp_path / "done.parquet", resume=True)  # none to continue: it begins
    with pytest.raises(OptionError, match="--resume"):
        job(data, tmp_path / "done.parquet")


class Stop(Exception):
    pass


@pytest.mark.parametrize("format", ["parquet", "numpy", "zarr"])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_job_that_was_stopped_continues(data, tmp_path, monkeypatch, format, parts):
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = job(data, whole, format=format)
    count = []

    def stop(record):
        count.append(record.index)
        if len(count) == parts:
            raise Stop

    if parts:
        with pytest.raises(Stop):
            job(data, out, format=format, on_part=stop)
        with pytest.raises(OptionError, match="not the output of a job that is done"):
            read_summary(out)
    else:  # stopped while the first part is written
        with monkeypatch.context() as patch:
            patch.setattr("fxshap.datasets.writer.Summary.save", lambda *_: stop_now())
            with pytest.raises(Stop):
                job(data, out, format=format)
    done = []
    found = job(data, out, format=format, resume=True, on_part=lambda r: done.append(r.index))
    assert done == list(range(parts, 5))
    if format == "parquet":
        assert_equal(read(out), read(whole))
    elif format == "numpy":
        for file in whole.glob("*.npy"):
            np.testing.assert_array_equal(np.load(out / file.name), np.load(file))
    else:
        for name, array in zarr.open_group(whole, mode="r").arrays():
            np.testing.assert_array_equal(zarr.open_group(out, mode="r")[name][:], array[:])
    np.testing.assert_array_equal(found.mean_abs[0], expected.mean_abs[0])
    np.testing.assert_array_equal(found.explanation().values, expected.explanation().values)
    assert found.refused_rows == expected.refused_rows


def stop_now():
    raise Stop


def test_a_part_whose_file_is_gone_is_written_again(data, tmp_path):
    out = tmp_path / "out.parquet"
    job(data, out)
    before = read(out)
    (out / "part-000002.parquet").unlink()
    job(data, out, resume=True)
    assert_equal(read(out), before)


def other_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.GELU())


OTHERS = {
    "model": {"model": other_net()},
    "background": {"background": BACKGROUND[:5]},
    "options": {"outputs": [0]},
    "data": {},
    "format": {"format": "zarr"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_only_the_same_job_continues(data, tmp_path, name):
    out = tmp_path / "out"
    job(data, out)
    if name == "data":
        table = pq.read_table(data / "b.parquet")
        pq.write_table(
            table.set_column(0, "image", table["image"].take([0] * 130)), data / "b.parquet"
        )
    given = {"model": net(), "background": BACKGROUND, **OPTIONS, **OTHERS[name]}
    model, background = given.pop("model"), given.pop("background")
    with pytest.raises(OptionError, match=f"belongs to a job with another {name}"):
        write_explanations(data, out, model, background, resume=True, **given)


def test_data_that_is_written_again_is_read_again(data, tmp_path):
    """Sizes and ranges of the columns, which the footers hold, stay the same."""
    values = np.random.default_rng(0).normal(size=(300, 4)).astype("float32")
    model, names = nn.Linear(4, 1), list("abcd")
    frame = pd.DataFrame(values, columns=names)
    options = {"concurrency": 0, "keep_columns": [], "progress": False, "inputs": [names]}
    written = []
    for order, out in ((slice(None), "first"), (slice(None, None, -1), "second")):
        frame[order].to_parquet(tmp_path / "x.parquet", index=False, compression=None)
        write_explanations(tmp_path / "x.parquet", tmp_path / out, model, values[:5], **options)
        parts = sorted((tmp_path / out).glob("*.parquet"))
        written.append(np.concatenate(
            [shaped_column(pq.read_table(part), "shap_values") for part in parts]
        ))  # fmt: skip
    assert np.allclose(written[0], written[1][::-1])
    with pytest.raises(OptionError, match="another data"):
        write_explanations(
            tmp_path / "x.parquet", tmp_path / "first", model, values[:5], resume=True, **options
        )


def test_the_job_stops_at_a_row_that_cannot_be_explained(data, tmp_path):
    with pytest.raises(
        InputError, match=r"row 5 \(id digit 5\) cannot be explained: image contains"
    ):
        job(data, tmp_path / "out", on_error="raise")


def test_the_job_stops_where_attributions_do_not_add_up(data, tmp_path, monkeypatch):
    mean = PairBatches._mean
    monkeypatch.setattr(PairBatches, "_mean", lambda *args: 1.01 * mean(*args))
    with pytest.raises(AdditivityError, match=r"row \d+ \(id digit \d+\) do not sum"):
        job(data, tmp_path / "out")


def test_workers_with_different_weights_are_an_error(data, tmp_path, monkeypatch):
    records = [Record(i, 64, 0, digest, 1.0, 1.0, 1, 1) for i, digest in enumerate("aab")]
    monkeypatch.setattr("fxshap.datasets.jobs.run_parts", lambda *_: iter(records))
    with pytest.raises(InputError, match="workers have models of different weights"):
        job(data, tmp_path / "out")


def test_no_data_and_no_such_columns(tmp_path, data):
    with pytest.raises(InputError, match="there is no data at"):
        job(tmp_path / "nothing.parquet", tmp_path / "out")
    pq.write_table(pq.read_table(data)[:0], tmp_path / "empty.parquet")
    with pytest.raises(InputError, match="has no rows"):
        job(tmp_path / "empty.parquet", tmp_path / "out")
    np.save(tmp_path / "x.npy", IMAGES)
    with pytest.raises(InputError, match="only Parquet may be in several files"):
        job([tmp_path / "x.npy", tmp_path / "x.npy"], tmp_path / "out")
    with pytest.raises(InputError, match="no column 'age' to keep"):
        job(data, tmp_path / "other", keep_columns=["age"])
    with pytest.raises(OptionError, match="rows_per_part is a number"):
        job(data, tmp_path / "more", rows_per_part=0)


def test_the_parts_cover_the_rows():
    for rows in (1, 63, 64, 5000, 200_000, 10**9):
        size = rows_per_part_of(rows, 80)
        parts = divide(rows, size)
        assert parts[0].start == 0 and parts[-1].stop == rows
        assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
        assert len(parts) <= 8192 and size & (size - 1) == 0
    assert rows_per_part_of(10**6, 3 * 224 * 224 * 4) == 256
    assert len(divide(10**6, rows_per_part_of(10**6, 80, workers=1000))) > 8000
    assert len(divide(10**8, rows_per_part_of(10**8, 80, workers=1000))) > 8000


def test_memory_is_that_of_a_chunk(data, tmp_path, monkeypatch):
    chunks = []
    monkeypatch.setattr("fxshap.datasets.batch.CHUNK_BYTES", 64 * 3 * 4 * 10)
    write = ParquetSink.write
    monkeypatch.setattr(
        ParquetSink, "write", lambda self, part, given: write(self, part, counted(given, chunks))
    )
    job(data, tmp_path / "out")
    assert chunks == [10] * 6 + [4] + [10] * 6 + [4] + [10] * 6 + [4] + [10] * 6 + [4] + [
        10
    ] * 4 + [4]
    job(data, tmp_path / "whole", rows_per_part=300)
    a, b = read(tmp_path / "out"), read(tmp_path / "whole")
    np.testing.assert_allclose(
        shaped_column(a, "shap_values"), shaped_column(b, "shap_values"), atol=1e-6
    )


def counted(chunks, sizes):
    for chunk in chunks:
        sizes.append(len(chunk.columns["error"]))
        yield chunk


def test_the_manifest_is_json(data, tmp_path):
    job(data, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "_fxshap" / "manifest.json").read_text())
    assert manifest["rows"] == 300 and manifest["fxshap"] == fxshap.__version__
