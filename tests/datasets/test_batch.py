"""Batches of every kind get the attributions of the explainer, whatever engine maps over them."""

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap.datasets import BatchExplainer
from fxshap.datasets.columns import shaped_column
from fxshap.errors import AdditivityError, InputError, OptionError
from fxshap.runtime.attributions import PairBatches

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype("float32")
BACKGROUND = RNG.normal(size=(9, 4)).astype("float32")
FEATURES = ["a", "b", "c", "d"]


def net(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, outputs)).eval()


def expected(outputs=None) -> np.ndarray:
    return fxshap.DeepExplainer(net(), BACKGROUND).shap_values(X, outputs=outputs)


def frame() -> pd.DataFrame:
    return pd.DataFrame(X, columns=FEATURES).assign(id=[f"r{i}" for i in range(len(X))])


def as_frame_background() -> pd.DataFrame:
    return pd.DataFrame(BACKGROUND, columns=FEATURES)


def values_of(batch, name: str = "shap_values", shape=(4, 3)) -> np.ndarray:
    if isinstance(batch, pa.Table):
        return shaped_column(batch, name)
    if isinstance(batch, pd.DataFrame):
        return np.stack(batch[name]).reshape(-1, *shape)
    return np.asarray(batch[name])


BATCHES = {
    "frame": frame(),
    "frame of lists": pd.DataFrame({"x": list(X), "id": frame()["id"]}),
    "dict of arrays": {"x": X, "id": np.arange(40)},
    "dict of lists": {"x": X.tolist(), "id": list(range(40))},
    "dict of tensors": {"x": torch.from_numpy(X)},
    "dict of features": {name: X[:, i] for i, name in enumerate(FEATURES)},
    "table": pa.Table.from_pandas(frame()),
    "table of lists": pa.table({"x": X.tolist()}),
    "table of tensors": pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(X)}),
    "record batch": pa.RecordBatch.from_pandas(frame()),
}


@pytest.mark.parametrize("name", BATCHES)
def test_every_kind_of_batch(name):
    batch = BATCHES[name]
    result = BatchExplainer(net(), BACKGROUND, id_column="id")(batch)
    if isinstance(batch, pa.RecordBatch):
        result = pa.Table.from_batches([result])
    np.testing.assert_allclose(values_of(result), expected(), rtol=0, atol=1e-6)
    error = np.asarray(result["additivity_error"])
    assert error.dtype == np.float32 and error.shape == (40,) and error.max() < 1e-5
    if not isinstance(batch, pa.RecordBatch):
        assert type(result) is type(batch)


def test_the_columns_add_up_as_they_are_stored():
    for dtype, limit in (("float32", 1e-6), ("float16", 5e-3)):
        result = BatchExplainer(net(), BACKGROUND, dtype=dtype)({"x": X})
        assert all(result[n].dtype == dtype for n in ("shap_values", "base_values", "model_output"))
        sums = result["shap_values"].sum(1, dtype=float) + result["base_values"]
        assert np.abs(sums - result["model_output"]).max() < limit
        found = result["additivity_error"]
        assert (found > 1e-4).any() == (dtype == "float16")
        with torch.no_grad():
            output = net()(torch.from_numpy(X)).numpy()
        np.testing.assert_allclose(result["model_output"], output, atol=limit)


def test_arrow_fields_have_the_shape_of_a_row():
    table = BatchExplainer(net(), BACKGROUND)(pa.table({"x": X.tolist()}))
    field = table.schema.field("shap_values")
    assert field.type == pa.list_(pa.float32(), 12) and field.metadata == {b"shape": b"[4, 3]"}


def test_features_are_found_by_name_whatever_their_order():
    shuffled = frame()[["d", "id", "b", "a", "c"]]
    result = BatchExplainer(net(), as_frame_background())(shuffled)
    np.testing.assert_allclose(values_of(result), expected(), atol=1e-6)
    result = BatchExplainer(net(), BACKGROUND, inputs=[FEATURES])(shuffled)
    np.testing.assert_allclose(values_of(result), expected(), atol=1e-6)


def test_columns_that_could_be_anything_are_an_error():
    wide = frame().assign(age=1.0)
    with pytest.raises(InputError, match="name the columns of every input with inputs="):
        BatchExplainer(net(), BACKGROUND)(wide)
    with pytest.raises(InputError, match="no column 'd'"):
        BatchExplainer(net(), as_frame_background())(frame()[["a", "b", "c"]])
    with pytest.raises(OptionError, match="of 2 inputs, but the background has 1"):
        BatchExplainer(net(), BACKGROUND, inputs=["a", "b"])
    with pytest.raises(InputError, match="holds no numbers"):
        BatchExplainer(net(), BACKGROUND, inputs="id")(frame())
    with pytest.raises(InputError, match=r"have the shape \(5,\), and rows of the background"):
        BatchExplainer(net(), BACKGROUND)({"x": np.ones((3, 5))})
    with pytest.raises(InputError, match="a batch is a mapping"):
        BatchExplainer(net(), BACKGROUND)(X)


class Towers(nn.Module):
    """Two inputs, and other arguments with a row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor, unit: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.left(x)) * self.right((y * mask).flatten(1))
        return hidden if unit is None else hidden * unit[:, None]


def test_several_inputs_and_arguments_of_each_sample():
    y, y0 = RNG.normal(size=(40, 2, 3)).astype("float32"), np.zeros((9, 2, 3), "float32")
    mask, unit = (RNG.random((40, 2, 3)) > 0.3).astype("float32"), RNG.random(40)
    explainer = BatchExplainer(
        Towers(),
        {"x": BACKGROUND, "y": y0},
        arguments={"mask": "keep", "unit": "scale"},
        forward_kwargs={"mask": torch.ones(1, 2, 3)},
        outputs=[2, 0],
    )
    direct = fxshap.DeepExplainer(
        Towers(), [BACKGROUND, y0], forward_kwargs={"mask": torch.ones(1, 2, 3)}
    )
    given = {"mask": torch.from_numpy(mask), "unit": torch.from_numpy(unit)}
    wanted = direct.shap_values([X, y], outputs=[2, 0], **given)
    columns = {"x": X, "y": y, "keep": mask, "scale": unit, "id": np.arange(40)}
    result = explainer(columns)
    for name, value in zip(("shap_values_x", "shap_values_y"), wanted, strict=True):
        np.testing.assert_allclose(result[name], value, atol=1e-6)
    assert result["shap_values_y"].shape == (40, 2, 3, 2) and "id" in result
    flat = pa.table(
        {n: v.reshape(40, -1).tolist() if v.ndim > 1 else v for n, v in columns.items()}
    )
    with pytest.raises(InputError, match="row 0 of the batch cannot be explained"):
        explainer(flat)  # the mask has lost its shape
    flat = flat.drop(["keep"]).append_column("keep", pa.array(mask.tolist()))
    result = explainer(flat)
    np.testing.assert_allclose(values_of(result, "shap_values_y"), wanted[1], atol=1e-6)


def test_outputs_of_each_row():
    chosen = np.arange(40) % 3
    for column in (chosen, chosen[:, None], chosen.tolist()):
        result = BatchExplainer(net(), BACKGROUND, outputs="target")({"x": X, "target": column})
        wanted = np.take_along_axis(expected(), chosen[:, None, None], 2)
        np.testing.assert_allclose(result["shap_values"], wanted, atol=1e-6)
        np.testing.assert_array_equal(result["explained_outputs"], chosen[:, None])
    result = BatchExplainer(net(), BACKGROUND, ranked_outputs=2)({"x": X})
    wanted, ranked = fxshap.DeepExplainer(net(), BACKGROUND).shap_values(X, ranked_outputs=2)
    np.testing.assert_allclose(result["shap_values"], wanted, atol=1e-6)
    np.testing.assert_array_equal(result["explained_outputs"], ranked)
    explainer = BatchExplainer(net(), BACKGROUND, outputs="target", on_error="record")
    result = explainer({"x": X[:4], "target": [0, 7, None, 1.5]})
    assert result["error"][0] is None and "outputs 0 to 2" in result["error"][1]
    assert result["error"][2:] == ["target is missing", "target is no integer"]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.last = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.embedding(ids)).sum(1))


def test_layers_and_ids_of_tokens():
    ids, padding = RNG.integers(1, 10, (6, 5)), np.zeros((1, 5), dtype=int)
    explainer = BatchExplainer(Bag(), padding, layer="embedding", on_error="record")
    wanted = fxshap.DeepExplainer(Bag(), padding, layer="embedding").shap_values(ids)
    batch = {"ids": ids}
    np.testing.assert_allclose(explainer(batch)["shap_values"], wanted, atol=1e-6)
    wrong = ids.copy()
    wrong[2, 3] = 99
    result = explainer({"ids": wrong})
    assert "index out of range" in result["error"][2]
    good = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(result["shap_values"][good], wanted[good], atol=1e-6)
    assert np.isnan(result["shap_values"][2]).all()
    model = Bag()
    pair = BatchExplainer((model, model.last), padding)
    wanted = fxshap.DeepExplainer((model, model.last), padding).shap_values(ids)
    np.testing.assert_allclose(pair(batch)["shap_values"], wanted, atol=1e-6)


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x).sum(1, keepdim=True) * x


REFUSED = {
    "nan": ([np.nan, 1, 1, 1], "x contains NaN or infinity"),
    "infinity": ([1, np.inf, 1, 1], "x contains NaN or infinity"),
    "missing": (None, "x is missing"),
    "missing number": ([1, None, 1, 1], "x contains NaN or infinity"),
    "ragged": ([1, 1, 1], "x has the shape (3,), not (4,)"),
    "text": (["one"] * 4, "x is no number"),
    "no output": ([-1, 1, 1, 1], "output"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_row_that_cannot_be_explained_is_recorded_or_stops(name, position):
    row, reason = REFUSED[name]
    rows = [list(x) for x in np.abs(X[:8]).astype(float)]
    rows[position] = row
    good = [i for i in range(8) if i != position]
    background = np.abs(BACKGROUND)
    wanted = fxshap.DeepExplainer(Root(), background).shap_values(np.abs(X[:8]))
    batch = {"x": rows, "id": [f"r{i}" for i in range(8)]}
    result = BatchExplainer(Root(), background, on_error="record", id_column="id")(batch)
    assert reason in result["error"][position]
    assert [text for text in result["error"] if text] == [result["error"][position]]
    assert np.isnan(result["shap_values"][position]).all()
    assert np.isnan(result["additivity_error"][position])
    np.testing.assert_allclose(result["shap_values"][good], wanted[good], rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=rf"row {position} of the batch \(id r{position}\)"):
        BatchExplainer(Root(), background, id_column="id")(batch)


def test_batches_of_refused_rows_only_or_of_none():
    explainer = BatchExplainer(net(), BACKGROUND, on_error="record")
    result = explainer({"x": np.full((2, 4), np.nan)})
    assert result["shap_values"].shape == (2, 4, 3) and None not in result["error"]
    assert explainer({"x": X[:0]})["shap_values"].shape == (0, 4, 3)
    assert len(explainer(frame()[:0])) == 0
    lists = BatchExplainer(net(), {"x": BACKGROUND}, outputs="k")
    empty = pa.table({"x": pa.array([], pa.list_(pa.float32())), "k": pa.array([], pa.int64())})
    assert lists(empty)["shap_values"].type.list_size == 4
    assert len(lists(pd.DataFrame({"x": [], "k": []}))) == 0
    table = explainer(pa.Table.from_pandas(frame()[:0]))
    assert table.schema.field("shap_values").type == pa.list_(pa.float32(), 12)


def test_a_model_that_fails_for_every_row_is_no_error_of_a_row():
    class Broken(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return torch.tanh(x) if mask is None else torch.tanh(x) + mask.no_such_attribute

    explainer = BatchExplainer(Broken(), BACKGROUND, arguments={"mask": "m"}, on_error="record")
    with pytest.raises(InputError, match="no_such_attribute"):
        explainer({"x": X, "m": np.ones(40)})
    explainer = BatchExplainer(net(), BACKGROUND, arguments={"mask": "m"}, on_error="record")
    with pytest.raises(Exception, match="mask"):
        explainer({"x": X, "m": np.ones(40)})


def test_attributions_that_do_not_add_up_stop_even_where_errors_are_recorded(monkeypatch):
    mean = PairBatches._mean
    monkeypatch.setattr(PairBatches, "_mean", lambda *args: 1.01 * mean(*args))
    explainer = BatchExplainer(net(), BACKGROUND, on_error="record", id_column="id")
    with pytest.raises(AdditivityError, match=r"of row \d+ of the batch \(id \d+\) do"):
        explainer({"x": X, "id": np.arange(40)})


def test_values_that_do_not_fit_the_dtype_are_an_error():
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e6 * torch.tanh(x)

    with pytest.raises(
        OptionError, match=r"row \d+ of the batch has values that are too large for float16"
    ):
        BatchExplainer(Large(), BACKGROUND, dtype="float16")({"x": X})


def test_options_are_checked():
    for option in (
        {"on_error": "skip"},
        {"dtype": "float64"},
        {"outputs": [0], "ranked_outputs": 1},
    ):
        with pytest.raises(OptionError):
            BatchExplainer(net(), BACKGROUND, **option)
    with pytest.raises(OptionError, match="column 'base_values' already"):
        BatchExplainer(net(), BACKGROUND)({"x": X, "y": X, "base_values": X}) if False else (
            BatchExplainer(net(), BACKGROUND, inputs="x")({"x": X, "base_values": X})
        )
    result = BatchExplainer(net(), BACKGROUND, inputs="x", prefix="fx_")({"x": X, "error": X})
    assert "fx_shap_values" in result and "fx_base_values" in result


def test_it_is_pickled_and_built_once_in_a_process(monkeypatch):
    built = []
    explainer = BatchExplainer(partial(counted, built), BACKGROUND)
    assert not built
    for _ in range(3):
        explainer({"x": X})
    assert built == [1]
    explainer = BatchExplainer(net(), BACKGROUND)
    first = explainer.row_explainer()
    for _ in range(2):
        copied = pickle.loads(pickle.dumps(explainer))
        np.testing.assert_allclose(copied({"x": X})["shap_values"], expected(), atol=1e-6)
        assert copied.row_explainer() is first


def counted(built: list[int]) -> nn.Module:
    built.append(1)
    return net()


def test_iterators_of_batches():
    batches = [frame()[:15], frame()[15:]]
    results = BatchExplainer(net(), BACKGROUND)(iter(batches))
    assert not isinstance(results, list)
    np.testing.assert_allclose(values_of(pd.concat(results)), expected(), atol=1e-6)


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    explainer = BatchExplainer(net(), BACKGROUND, inputs=[FEATURES], on_error="record")
    data = datasets.Dataset.from_pandas(frame())
    for kind in (None, "numpy", "torch", "pandas", "arrow"):
        mapped = data.with_format(kind).map(explainer, batched=True, batch_size=16)
        mapped = mapped.with_format("numpy")
        found = np.asarray(list(mapped["shap_values"])).reshape(40, 4, 3)
        np.testing.assert_allclose(found, expected(), atol=1e-6)
        assert list(mapped["id"]) == list(frame()["id"])
    images = datasets.Dataset.from_dict({"x": X.tolist()}).map(
        BatchExplainer(net(), BACKGROUND), batched=True
    )
    np.testing.assert_allclose(np.asarray(images["shap_values"]), expected(), atol=1e-6)
    mapped = data.map(explainer, batched=True, batch_size=16, num_proc=2).with_format("numpy")
    found = np.asarray(list(mapped["shap_values"])).reshape(40, 4, 3)
    np.testing.assert_allclose(found, expected(), atol=1e-6)
    stream = data.to_iterable_dataset().map(explainer, batched=True, batch_size=16)
    np.testing.assert_allclose([row["shap_values"] for row in stream], expected(), atol=1e-6)


def test_dask_dataframes():
    dataframe = pytest.importorskip("dask.dataframe")
    explainer = BatchExplainer(net(), BACKGROUND, inputs=[FEATURES])
    data = dataframe.from_pandas(frame(), npartitions=3)
    for meta in ({}, {"meta": explainer(data._meta)}):
        found = data.map_partitions(explainer, **meta).compute(scheduler="threads")
        np.testing.assert_allclose(values_of(found), expected(), atol=1e-6)
        assert list(found["id"]) == list(frame()["id"])


def test_the_import_needs_no_other_package():
    code = """
import sys
for name in ("ray", "pyarrow", "zarr", "datasets", "dask"):
    sys.modules[name] = None
import numpy, torch
from fxshap.datasets import BatchExplainer, explain
from fxshap.errors import MissingExtraError
x = numpy.ones((3, 4), "float32")
print(BatchExplainer(torch.nn.GELU(), x)({"x": 2 * x})["shap_values"].shape)
try:
    explain("in.parquet", torch.nn.GELU(), x)
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "(3, 4, 4)",
        "this needs ray, which is not installed: pip install 'ray[data]'",
    ]
