"""Jobs that explain a data set on disk, and continue where they were stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fxshap.datasets.batch import BatchExplainer, Model, OnError, StoredDtype
from fxshap.datasets.manifest import Manifest, describe_job
from fxshap.datasets.parts import Part, divide, rows_per_part_of
from fxshap.datasets.ray import worker_count, write_with_ray
from fxshap.datasets.sinks import Format, open_sink
from fxshap.datasets.sources import open_source
from fxshap.datasets.summary import SAMPLE_ROWS, Summary
from fxshap.datasets.writer import PartWriter, Record
from fxshap.errors import InputError, OptionError
from fxshap.runtime.progress import samples_bar


def write_explanations(
    data: Any,
    out: str | Path,
    model: Model,
    background: Any,
    *,
    concurrency: int | None = None,
    num_gpus: float = 0,
    resume: bool = False,
    format: Format | None = None,
    keep_columns: Sequence[str] | None = None,
    rows_per_part: int | Literal["auto"] = "auto",
    batch_size: int | Literal["auto"] = "auto",
    on_error: OnError = "raise",
    dtype: StoredDtype = "float32",
    progress: bool = True,
    on_part: Callable[[Record], None] | None = None,
    **options: Any,
) -> Summary:
    """Explain a data set on disk with Ray Data, and write the result in parts.

    A job that was stopped continues where it was, with the same result.

    Parameters
    ----------
    data : path or sequence of paths
        The samples: Parquet, NumPy or Zarr.
    out : path
        A folder, on a disk that all workers share. A job that is done has its summary there; see
        :func:`read_summary`.
    model, background
        As :class:`BatchExplainer` takes them.
    concurrency : int, optional
        How many workers there are; see :func:`explain`. With 0, this process does all, without Ray.
    num_gpus : float
        The GPUs of one worker.
    resume : bool
        Whether to continue the job of `out`, if there is one.
    format : "parquet", "numpy" or "zarr", optional
        What is written: files of Parquet with the data and the attributions, arrays of NumPy with
        all rows, or a group of Zarr. By default the format follows from the suffix of `out`.
    keep_columns : sequence of str, optional
        Which columns of the data are written with the attributions: by default all for Parquet, and
        none for the others.
    rows_per_part : int or "auto"
        How many rows are written together. A worker that is stopped loses at most those.
    batch_size, on_error, dtype, **options
        As :class:`BatchExplainer` takes them.
    progress : bool
        Whether to show a progress bar on a terminal or in a notebook.
    on_part : callable, optional
        Is called with the record of every part, after it is written.

    Returns
    -------
    Summary

    Raises
    ------
    InputError
        If the data does not match the background, or, with ``on_error="raise"``, a row cannot be
        explained.
    OptionError
        If `out` exists, and is not continued or belongs to another job.
    AdditivityError
        If the attributions of a row do not sum to the difference of the outputs.
    MissingExtraError
        If Ray is not installed.

    Examples
    --------
    >>> import numpy, tempfile, torch
    >>> from pathlib import Path
    >>> from fxshap.datasets import write_explanations
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    >>> samples = numpy.random.default_rng(0).normal(size=(500, 3)).astype("float32")
    >>> folder = Path(tempfile.mkdtemp())
    >>> numpy.save(folder / "x.npy", samples)
    >>> summary = write_explanations(
    ...     folder / "x.npy", folder / "out.npy", model, samples[:10], concurrency=0
    ... )
    >>> summary.rows, summary.refused, summary.largest_error < 1e-5
    (500, 0, True)
    >>> numpy.load(folder / "out.npy" / "shap_values.npy").shape
    (500, 3, 2)
    """
    source = open_source(data)
    explainer = BatchExplainer(
        model, background, batch_size=batch_size, on_error=on_error, dtype=dtype, **options
    )
    workers = 0 if concurrency == 0 else worker_count(concurrency, num_gpus)
    if rows_per_part == "auto":
        rows_per_part = rows_per_part_of(source.rows, explainer.background.row_bytes, workers)
    if rows_per_part < 1:
        raise OptionError(f"rows_per_part is a number of rows or 'auto', not {rows_per_part!r}")
    out = Path(out).absolute()
    job = describe_job(
        explainer,
        data=source.fingerprint(),
        rows=source.rows,
        format=format,
        keep_columns=None if keep_columns is None else list(keep_columns),
        rows_per_part=rows_per_part,
    )
    open_sink(out, format, source.rows, rows_per_part, keep_columns)
    manifest, rows_per_part = Manifest.open(out, job, resume)
    sink = open_sink(out, format, source.rows, rows_per_part, keep_columns)
    parts = divide(source.rows, rows_per_part)
    missing = manifest.missing(parts, sink)
    below = min(2 * SAMPLE_ROWS / source.rows, 1.0)
    writer = PartWriter(explainer, source, sink, manifest, below)
    digests = set()
    done = source.rows - sum(part.stop - part.start for part in missing)
    with samples_bar(source.rows, progress, initial=done) as bar:
        for record in run_parts(writer, missing, workers, num_gpus):
            bar.update(record.rows)
            digests.add(record.model)
            if len(digests) > 1:
                raise InputError(
                    "workers have models of different weights; the function that returns the "
                    "model must load its weights, or seed them"
                )
            if on_part is not None:
                on_part(record)
    sink.clean()
    return manifest.summary(parts, below=below)


def run_parts(
    writer: PartWriter, parts: Sequence[Part], workers: int, num_gpus: float
) -> Iterator[Record]:
    """Yield the records of parts as they are written."""
    if not parts:
        return iter(())
    if workers == 0:
        return map(writer, parts)
    return write_with_ray(writer, parts, workers=workers, num_gpus=num_gpus)
