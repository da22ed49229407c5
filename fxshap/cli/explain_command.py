"""``fxshap explain``: explain a data set on disk, and write the attributions in parts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from fxshap.cli.common import ADDITIVE, build_model, configure_logging, exit_on_error
from fxshap.cli.options import (
    model_options,
    parse_argument,
    parse_columns,
    parse_integers,
    parse_output,
    parse_size,
    printing_options,
)

if TYPE_CHECKING:
    from fxshap.datasets import Summary

#: Exit status of a job that is done, but has rows that are not explained.
ROWS_REFUSED = 3
#: How many of these rows are printed.
MAX_PRINTED = 10


@click.command()
@model_options
@click.option(
    "--background",
    "backgrounds",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    required=True,
    help="The references: a .npy file for every input, a .npz file with the inputs by column, or a "
    ".parquet file with the features of one input.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="The samples: .parquet files or a folder of them, .npy, or .zarr.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A folder for the result. The suffixes .zarr and .npy choose the format.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["parquet", "numpy", "zarr"]),
    help="Format of the result.  [default: by the suffix, or parquet]",
)
@click.option(
    "--inputs",
    type=parse_columns,
    metavar="COLUMNS",
    multiple=True,
    help="The column of an input, or its features as in age,income. Repeat it for every input.",
)
@click.option(
    "--argument",
    "arguments",
    type=parse_argument,
    metavar="NAME=COLUMN",
    multiple=True,
    help="A column with another argument of the model, one row for each sample.",
)
@click.option("--id", "id_column", metavar="COLUMN", help="The column that names rows in messages.")
@click.option(
    "--keep",
    metavar="COLUMNS",
    help="Columns of the data to write, as in id,age.  [default: all for parquet, else none]",
)
@click.option(
    "--outputs",
    type=parse_integers,
    metavar="NUMBERS",
    help="Columns of that output to explain, as in 0,3.  [default: all]",
)
@click.option(
    "--ranked-outputs",
    type=click.IntRange(1),
    help="Explain this many of the largest outputs of every sample instead.",
)
@click.option(
    "--on-error",
    type=click.Choice(["raise", "record"]),
    default="raise",
    show_default=True,
    help="Stop at a row that cannot be explained, or record the reason and go on.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Dtype of the result.",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Number of workers; 0 explains in this process, without Ray.  [default: one for each "
    "processor or share of a GPU]",
)
@click.option(
    "--gpus",
    type=click.FloatRange(0),
    default=0,
    show_default=True,
    help="GPUs of one worker.",
)
@click.option(
    "--batch-size",
    type=parse_size,
    default="auto",
    show_default=True,
    help="Number of samples that go through the model together.",
)
@click.option(
    "--rows-per-part",
    type=parse_size,
    default="auto",
    show_default=True,
    help="Number of rows that are written together.",
)
@click.option("--resume", is_flag=True, help="Continue a job that was stopped.")
@printing_options
def explain(
    factory: str,
    backgrounds: tuple[Path, ...],
    data: tuple[Path, ...],
    out: Path,
    format_: Any,
    inputs: tuple[str | tuple[str, ...], ...],
    arguments: tuple[tuple[str, str], ...],
    id_column: str | None,
    keep: str | None,
    output: str | None,
    outputs: list[int] | None,
    ranked_outputs: int | None,
    layer: str | None,
    rule: Literal["rescale", "variance"],
    on_error: Any,
    dtype: Any,
    workers: int | None,
    gpus: float,
    batch_size: Any,
    rows_per_part: Any,
    resume: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Explain a data set, on all processors of this machine or of a Ray cluster.

    Imports PACKAGE.MODULE, which runs its code, and calls FACTORY without arguments. FACTORY may
    also be a model itself. The current folder comes first on the import path.

    The result is written in parts. A job that was stopped continues with --resume, and gives the
    same result. RAY_ADDRESS names a cluster, whose machines share the folders.

    Exits with 0 if all rows are explained and add up, 1 if the attributions of a row do not add up,
    2 with the reason if the job cannot run or a row cannot be explained, and 3 if such rows are
    recorded.

    \b
    Examples:
      fxshap explain my_project.models:net --background b.npy \\
        --data in.parquet --out out.parquet --outputs 0,3
      fxshap explain my_project.models:net --background b.npy \\
        --data in.parquet --out out.parquet --outputs 0,3 --resume
    """  # noqa: D301, click reads \b
    configure_logging(verbose)
    with exit_on_error(as_json, verbose):
        from fxshap.datasets import write_explanations  # imports SHAP, which takes seconds

        model = build_model(factory)
        start = time.perf_counter()
        rows: list[int] = []
        options: dict[str, Any] = {"output": parse_output(output), "layer": layer, "rule": rule}
        defaults = {"output": None, "layer": None, "rule": "rescale"}
        options = {name: value for name, value in options.items() if value != defaults[name]}
        try:
            summary = write_explanations(
                list(data),
                out,
                model,
                read_background(backgrounds),
                concurrency=workers,
                num_gpus=gpus,
                resume=resume,
                format=format_,
                keep_columns=None if keep is None else keep.split(","),
                rows_per_part=rows_per_part,
                batch_size=batch_size,
                on_error=on_error,
                dtype=dtype,
                on_part=lambda record: rows.append(record.rows),
                inputs=inputs or None,
                arguments=dict(arguments),
                id_column=id_column,
                outputs=outputs,
                ranked_outputs=ranked_outputs,
                **options,
            )
        except KeyboardInterrupt:
            click.echo(f"Stopped. Continue {out} with --resume.", err=True)
            sys.exit(130)
    print_summary(summary, out, sum(rows), time.perf_counter() - start, as_json)
    sys.exit(ROWS_REFUSED if summary.refused else ADDITIVE)


def read_background(paths: tuple[Path, ...]) -> Any:
    """Return the references of a file, or of one file for each input.

    Raises
    ------
    click.BadParameter
        If a file is of another format, or several are not all of NumPy.
    """
    import numpy as np

    first = paths[0]
    if len(paths) > 1 and any(path.suffix != ".npy" for path in paths):
        raise click.BadParameter("several files are .npy files", param_hint="--background")
    if first.suffix == ".npy":
        arrays = [np.load(path) for path in paths]
        return arrays if len(arrays) > 1 else arrays[0]
    if first.suffix == ".npz":
        with np.load(first) as saved:
            return {name: saved[name] for name in saved.files}
    if first.suffix == ".parquet":
        import pandas

        return pandas.read_parquet(first)
    raise click.BadParameter(
        f"{first} is not a .npy, .npz or .parquet file", param_hint="--background"
    )


def print_summary(summary: Summary, out: Path, rows: int, seconds: float, as_json: bool) -> None:
    """Print what the job has done.

    Parameters
    ----------
    summary : Summary
    out : Path
    rows : int
        How many rows were explained now, and not before the job was stopped.
    seconds : float
    as_json : bool
    """
    rate = rows / seconds
    if as_json:
        facts = {
            "rows": summary.rows,
            "refused": summary.refused,
            "refused_rows": [vars(row) for row in summary.refused_rows],
            "largest_error": summary.largest_error,
            "largest_error_row": summary.largest_error_row,
            "seconds": seconds,
            "samples_per_second": rate,
            "out": str(out),
        }
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{rows} samples in {seconds:.1f} s, {rate:.0f} samples per second, into {out}")
    if rows < summary.rows:
        click.echo(f"{summary.rows - rows} samples were explained before")
    if summary.largest_error_row is not None:
        click.echo(
            f"Adds up: the largest error is {summary.largest_error:.1e} of the output, in row "
            f"{summary.largest_error_row}"
        )
    if summary.refused:
        click.echo(f"{summary.refused} of {summary.rows} rows are not explained:")
        for row in summary.refused_rows[:MAX_PRINTED]:
            click.echo(f"  {row.name}: {row.reason}")
        if summary.refused > MAX_PRINTED:
            click.echo(f"  ... and {summary.refused - MAX_PRINTED} more, in the column error")
