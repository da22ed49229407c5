"""Ray Data as the engine: workers on one machine or a cluster explain parts of a data set."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from fxshap.datasets.batch import BatchExplainer, Model, OnError, StoredDtype
from fxshap.datasets.columns import Batch, add_columns, is_arrow, row_count, table_of, take_rows
from fxshap.datasets.extras import import_extra
from fxshap.datasets.parts import Part, divide, rows_per_part_of
from fxshap.datasets.sources import Source, open_source
from fxshap.datasets.writer import PartWriter, Record, read_chunks
from fxshap.errors import OptionError

#: Ray Data logs its plans, and warns that there is no progress bar, where a job has one of its own.
LOG_LEVELS = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}


def explain(
    data: Any,
    model: Model,
    background: Any,
    *,
    concurrency: int | None = None,
    num_gpus: float = 0,
    batch_size: int | Literal["auto"] = "auto",
    on_error: OnError = "raise",
    dtype: StoredDtype = "float32",
    **options: Any,
) -> Any:
    """Explain a data set with Ray Data.

    Parameters
    ----------
    data : ray.data.Dataset, path or sequence of paths
        The samples. Workers read paths themselves: files of Parquet, NumPy or Zarr.
    model, background
        As :class:`BatchExplainer` takes them.
    concurrency : int, optional
        How many workers there are. By default one for each processor of the cluster, or for each
        share of a GPU.
    num_gpus : float
        The GPUs of one worker, such as 1 or 0.25.
    batch_size : int or "auto"
        How many samples go through the model together.
    on_error, dtype, **options
        As :class:`BatchExplainer` takes them.

    Returns
    -------
    ray.data.Dataset
        The rows with the new columns, which nothing computes until they are used. Ray returns rows
        as they are done; set ``execution_options.preserve_order`` of its ``DataContext`` for the
        order of the data.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.
    InputError
        If there is no data at the path. When rows are used, Ray raises what a worker raises.

    Examples
    --------
    >>> import fxshap.datasets
    >>> explained = fxshap.datasets.explain("in.parquet", model, background)  # doctest: +SKIP
    >>> explained.write_parquet("out.parquet")  # doctest: +SKIP
    """
    ray = start_ray()
    explainer = BatchExplainer(
        model, background, batch_size=batch_size, on_error=on_error, dtype=dtype, **options
    )
    count = worker_count(concurrency, num_gpus)
    shares = {"num_cpus": 1, "num_gpus": num_gpus or None}
    if isinstance(data, ray.data.Dataset):
        return data.map_batches(
            BatchWorker,
            fn_constructor_args=(pickled(explainer),),
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count),  # reading takes some
            **shares,
        )
    source = open_source(data)
    size = rows_per_part_of(source.rows, explainer.background.row_bytes, count)
    parts = divide(source.rows, size)
    return parts_dataset(ray, parts).map_batches(
        SourceWorker,
        fn_constructor_args=(pickled((explainer, source)),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        **shares,
    )


def write_with_ray(
    writer: PartWriter, parts: Sequence[Part], *, workers: int, num_gpus: float
) -> Iterator[Record]:
    """Yield the records of parts as workers write them, in any order."""
    ray = start_ray()
    explained = parts_dataset(ray, parts).map_batches(
        WriteWorker,
        fn_constructor_args=(pickled(writer),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=num_gpus or None,
    )
    explained.context.enable_progress_bars = False  # the caller has one of its own
    with quiet(LOG_LEVELS):
        for row in explained.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            yield Record(**json.loads(row["record"]))


class BatchWorker:
    """Explains the batches of a data set of Ray."""

    def __init__(self, content: bytes) -> None:
        self.explainer: BatchExplainer = pickle.loads(content)

    def __call__(self, batch: Batch) -> Iterator[Any]:
        """Yield tables with attributions, of as many rows as a worker explains at once."""
        count = row_count(batch)
        step = self.explainer.rows_at_once(batch) if count else 1
        for start in range(0, max(count, 1), step):
            yield self.explainer(take_rows(batch, start, start + step))


class SourceWorker:
    """Reads parts of a data set, and explains them."""

    def __init__(self, content: bytes) -> None:
        self.explainer: BatchExplainer
        self.source: Source
        self.explainer, self.source = pickle.loads(content)

    def __call__(self, batch: dict[str, Any]) -> Iterator[Any]:
        """Yield tables with the rows of a part and their attributions."""
        (index,), (start,), (stop,) = batch["index"], batch["start"], batch["stop"]
        part = Part(int(index), int(start), int(stop))
        for first, rows in read_chunks(self.explainer, self.source, part):
            columns = self.explainer.explain(rows, first).columns
            yield add_columns(rows if is_arrow(rows) else table_of(rows), columns)


class WriteWorker:
    """Reads, explains and writes parts of a data set."""

    def __init__(self, content: bytes) -> None:
        self.writer: PartWriter = pickle.loads(content)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the record of a part after it is written, or the error."""
        (index,), (start,), (stop,) = batch["index"], batch["start"], batch["stop"]
        try:
            record = self.writer(Part(int(index), int(start), int(stop)))
        except Exception as error:  # Ray would wrap it in its own, with many lines of text
            return {"record": [""], "error": [as_bytes(error)]}
        return {"record": [json.dumps(vars(record))], "error": [b""]}


def as_bytes(error: Exception) -> bytes:
    """Return an error as bytes; one that cannot be pickled as a RuntimeError with its text."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        content = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return content


def parts_dataset(ray: Any, parts: Sequence[Part]) -> Any:
    """Return parts as a data set of Ray, one task for each."""
    return ray.data.from_items([vars(part) for part in parts], override_num_blocks=len(parts))


@contextmanager
def quiet(levels: Mapping[str, int]) -> Iterator[None]:
    """Log nothing below these levels."""
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def pickled(value: Any) -> bytes:
    """Return a value as bytes, with functions of the main script and models by value."""
    import ray.cloudpickle

    content: bytes = ray.cloudpickle.dumps(value)
    return content


def start_ray() -> Any:
    """Import Ray, and connect to a cluster or start it on this machine, if it does not run.

    Raises
    ------
    MissingExtraError
        If Ray is not installed.
    """
    ray = import_extra("ray", "ray[data]")
    import_extra("ray.data", "ray[data]")
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init()
        else:
            ray.init(include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
    return ray


def worker_count(concurrency: int | None, num_gpus: float) -> int:
    """Return how many workers Ray starts.

    Raises
    ------
    OptionError
        If there can be none.
    """
    ray = start_ray()
    resource, share = ("GPU", num_gpus) if num_gpus else ("CPU", 1.0)
    there = ray.cluster_resources().get(resource, 0)
    if there < share:
        raise OptionError(f"a worker takes {share} of a {resource}, and the cluster has {there}")
    count = int(there // share) if concurrency is None else concurrency
    if count < 1:
        raise OptionError(f"concurrency is a number of workers, not {concurrency}")
    return count
