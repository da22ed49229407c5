"""The commands: ``fxshap check`` and ``fxshap demo``."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import fxshap
from fxshap.capture.diagnostics import innermost_user_line
from fxshap.graph.provenance import UNKNOWN_LINE

DTYPES = {name: getattr(torch, name) for name in ("float16", "float32", "float64")}
EXPLAINABLE, NOT_ADDITIVE, NOT_EXPLAINABLE = 0, 1, 2


def sizes_of(shape: str) -> tuple[int, ...]:
    """Read the shape of one row of an input, such as ``3,224,224``."""
    sizes = shape.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{shape!r} is not like 3,224,224")
    return tuple(map(int, sizes))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fxshap.__version__, prog_name="fxshap", message="%(prog)s %(version)s")
def cli() -> None:
    """Make PyTorch models explainable by unmodified SHAP, and check that they are.

    \b
    Example:
      fxshap check torchvision.models:resnet18 --shape 3,224,224
    """  # noqa: D301, click reads \b


@cli.command()
@click.argument("factory", metavar="PACKAGE.MODULE:FACTORY")
@click.option(
    "--shape",
    "shapes",
    type=sizes_of,
    metavar="SIZES",
    multiple=True,
    required=True,
    help="Shape of one row of an input, as in 3,224,224. Repeat it for every input.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="float32",
    show_default=True,
    help="Of the weights and the inputs.",
)
@click.option(
    "--references",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Rows of the background.",
)
@click.option(
    "--samples", type=click.IntRange(1), default=1, show_default=True, help="Rows to explain."
)
@click.option(
    "--output",
    help="Which output to explain of a model that returns several: a key, an attribute or an "
    "index, as in logits or 0.",
)
@click.option(
    "--outputs",
    "ranked_outputs",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Columns of that output to explain, the largest of every sample.",
)
@click.option(
    "--refine",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Pairs of coalitions to walk through for every reference.",
)
@click.option(
    "--variances", is_flag=True, help="Take the variances of sums before activations into account."
)
@click.option("--seed", default=0, show_default=True, help="Of new weights and of the inputs.")
@click.option(
    "--draw",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the graph to this .svg, .png, .pdf or .dot.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")
@click.option("--verbose", is_flag=True, help="Log to standard error, with tracebacks.")
def check(
    factory: str,
    shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    references: int,
    samples: int,
    output: str | None,
    ranked_outputs: int,
    refine: int,
    variances: bool,
    seed: int,
    draw: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Check that SHAP explains a model exactly, on random inputs.

    Imports PACKAGE.MODULE, which runs its code, and calls FACTORY without arguments; a model that
    is there already will do too. The present folder comes first on the import path.

    Exits with 0 if the attributions add up, 1 if they do not, and 2 with the reason if the model
    cannot be built, captured or explained, or an argument is wrong.

    \b
    Examples:
      fxshap check torchvision.models:resnet18 --shape 3,224,224
      fxshap check my_project.models:two_towers --shape 10 --shape 16,384
      fxshap check my_project.models:bert --shape 16,384 --output logits --json
    """  # noqa: D301, click reads \b
    if verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("fxshap").setLevel(logging.DEBUG)
    else:  # what torch.export logs of a failure is in our message, in one line
        logging.getLogger("torch").setLevel(logging.CRITICAL)
    with refusing(as_json, verbose):
        torch.manual_seed(seed)
        model = build(factory).to(DTYPES[dtype])
        inputs = [torch.randn(references + samples, *shape).to(DTYPES[dtype]) for shape in shapes]
        background, rows = [x[:references] for x in inputs], [x[references:] for x in inputs]
        explainable = fxshap.make_explainable(
            model, output=selector(output), refine=refine, variances=variances
        )
        report = explainable.prepare(*background).report()
        if draw:
            report.draw(draw)
        if not as_json:
            click.echo(f"{report}\n")
        found = fxshap.verify(
            explainable,
            background,
            rows,
            ranked_outputs=ranked_outputs,
            progress=sys.stderr.isatty(),
        )
    if as_json:
        result = {"report": report.to_dict(), "verification": found.to_dict()}
        click.echo(json.dumps({"explainable": found.additive, **result}, indent=2))
    else:
        click.echo(found)
    sys.exit(EXPLAINABLE if found.additive else NOT_ADDITIVE)


@cli.command(short_help="Explain a small network before and after.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="fxshap_demo.png",
    show_default=True,
    help="The picture of the attributions.",
)
def demo(output: Path) -> None:
    """Train a small network on digits, and explain it with SHAP before and after.

    \b
    Example:
      fxshap demo --output digits.png
    """  # noqa: D301, click reads \b
    from fxshap.demo import main  # which imports SHAP

    sys.exit(main(["--output", str(output)]))


# --- what the commands need ---------------------------------------------------------------------


def build(factory: str) -> nn.Module:
    """Import ``package.module:factory`` and return the model that it is or makes."""
    name, colon, attributes = factory.partition(":")
    if not (name and colon and attributes):
        raise click.BadParameter(
            f"{factory!r} is not like package.module:factory", param_hint="FACTORY"
        )
    if os.getcwd() not in sys.path:  # as for `python -m`
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise click.BadParameter(str(error), param_hint="FACTORY") from error
        raise
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise click.BadParameter(f"{name} has no {attributes}", param_hint="FACTORY")
        found = getattr(found, attribute)
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise click.BadParameter(
            f"{factory} returns an object of type {type(model).__name__}, not a torch.nn.Module",
            param_hint="FACTORY",
        )
    return model


def selector(output: str | None) -> str | int | None:
    """Read a key or an index."""
    return int(output) if output and output.lstrip("-").isdecimal() else output


@contextmanager
def refusing(as_json: bool, verbose: bool) -> Iterator[None]:
    """End the program with the reason if the model cannot be built, captured or explained."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:  # the user's code may raise anything
        if verbose:
            traceback.print_exc()
        line = innermost_user_line(error.__traceback__)
        ours = isinstance(error, fxshap.FxshapError) or line == UNKNOWN_LINE
        where = "" if ours else f", at {line}"
        if as_json:
            refusal = {"error": type(error).__name__, "message": f"{error}{where}"}
            click.echo(json.dumps({"explainable": False, **refusal}, indent=2))
        click.echo(f"Error: {type(error).__name__}: {error}{where}", err=True)
        sys.exit(NOT_EXPLAINABLE)
