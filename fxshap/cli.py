"""The command line: ``fxshap check`` and ``fxshap demo``."""

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
from typing import Any, get_args

import click
import torch
from torch import nn

from fxshap._version import __version__
from fxshap.capture.diagnostics import innermost_user_line
from fxshap.errors import FxshapError
from fxshap.graph.provenance import UNKNOWN_LINE
from fxshap.module import make_explainable
from fxshap.runtime.options import RuleName
from fxshap.verification.verify import verify

DTYPES = {name: getattr(torch, name) for name in ("float16", "float32", "float64")}

#: Exit statuses.
ADDITIVE, NOT_ADDITIVE, NOT_EXPLAINABLE = 0, 1, 2


def parse_shape(shape: str) -> tuple[int, ...]:
    """Return the shape of one row of an input, given as ``3,224,224``."""
    sizes = shape.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{shape!r} is not like 3,224,224")
    return tuple(map(int, sizes))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fxshap", message="%(prog)s %(version)s")
def cli() -> None:
    """Make PyTorch models explainable by unmodified SHAP, and check the attributions.

    \b
    Example:
      fxshap check torchvision.models:resnet18 --shape 3,224,224
    """  # noqa: D301, click reads \b


@cli.command()
@click.argument("factory", metavar="PACKAGE.MODULE:FACTORY")
@click.option(
    "--shape",
    "shapes",
    type=parse_shape,
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
    help="Dtype of the weights and the inputs.",
)
@click.option(
    "--references",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Number of rows of the background.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of rows to explain.",
)
@click.option(
    "--output",
    help="Output to explain if the model returns several: a key, an attribute or an index, as in "
    "logits or 0.",
)
@click.option(
    "--outputs",
    "ranked_outputs",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of columns of that output to explain, the largest of every sample.",
)
@click.option(
    "--refine",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of complementary pairs of random coalitions for every reference.",
)
@click.option(
    "--rule",
    type=click.Choice(get_args(RuleName)),
    default="rescale",
    show_default=True,
    help="Rule for activations: rescale is DeepLIFT's, variance also uses the variances of the "
    "sums before them.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed of random weights and of the inputs."
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the graph to this file: .svg, .png, .pdf or .dot.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
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
    rule: RuleName,
    seed: int,
    draw: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Check that SHAP's attributions of a model add up, on random inputs.

    Imports PACKAGE.MODULE, which runs its code, and calls FACTORY without arguments. FACTORY may
    also be a model itself. The current folder comes first on the import path.

    Exits with 0 if the attributions add up, 1 if they do not, and 2 with the reason if the model
    cannot be built, captured or explained, or an argument is wrong.

    \b
    Examples:
      fxshap check torchvision.models:resnet18 --shape 3,224,224
      fxshap check my_project.models:two_towers --shape 10 --shape 16,384
      fxshap check my_project.models:bert --shape 16,384 --output logits --json
    """  # noqa: D301, click reads \b
    configure_logging(verbose)
    with exit_on_error(as_json, verbose):
        torch.manual_seed(seed)
        model = build_model(factory).to(DTYPES[dtype])
        inputs = [torch.randn(references + samples, *shape).to(DTYPES[dtype]) for shape in shapes]
        background, rows = [x[:references] for x in inputs], [x[references:] for x in inputs]
        explainable = make_explainable(model, output=parse_output(output), rule=rule, refine=refine)
        report = explainable.capture(*background).report()
        if draw:
            report.draw(draw)
        if not as_json:
            click.echo(f"{report}\n")
        result = verify(
            explainable,
            background,
            rows,
            ranked_outputs=ranked_outputs,
            progress=sys.stderr.isatty(),
        )
    if as_json:
        measured = {"report": report.to_dict(), "verification": result.to_dict()}
        click.echo(json.dumps({"explainable": result.additive, **measured}, indent=2))
    else:
        click.echo(result)
    sys.exit(ADDITIVE if result.additive else NOT_ADDITIVE)


@cli.command(short_help="Explain a small network, without and with fxshap.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="fxshap_demo.png",
    show_default=True,
    help="File for the picture of the attributions.",
)
def demo(output: Path) -> None:
    """Train a small network on digits, and explain it with stock SHAP and with fxshap.

    \b
    Example:
      fxshap demo --output digits.png
    """  # noqa: D301, click reads \b
    from fxshap.demo import run_demo  # imported here because SHAP takes seconds to import

    sys.exit(run_demo(output))


# --- helpers of the commands --------------------------------------------------------------------


def configure_logging(verbose: bool) -> None:
    """Log everything of fxshap to standard error, or nothing of torch."""
    if verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("fxshap").setLevel(logging.DEBUG)
    else:  # torch.export logs its failures at length; our message has them in one line
        logging.getLogger("torch").setLevel(logging.CRITICAL)


def build_model(factory: str) -> nn.Module:
    """Import ``package.module:factory`` and return the model that it is or returns.

    Raises
    ------
    click.BadParameter
        If there is no such module or factory, or it returns no ``nn.Module``.
    """
    name, colon, attributes = factory.partition(":")
    if not (name and colon and attributes):
        raise click.BadParameter(
            f"{factory!r} is not like package.module:factory", param_hint="FACTORY"
        )
    if os.getcwd() not in sys.path:  # as for `python -m`
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise click.BadParameter(str(error), param_hint="FACTORY") from error
        raise
    for attribute in attributes.split("."):
        if not hasattr(value, attribute):
            raise click.BadParameter(f"{name} has no {attributes}", param_hint="FACTORY")
        value = getattr(value, attribute)
    model = value if isinstance(value, nn.Module) else value()
    if not isinstance(model, nn.Module):
        raise click.BadParameter(
            f"{factory} returns an object of type {type(model).__name__}, not a torch.nn.Module",
            param_hint="FACTORY",
        )
    return model


def parse_output(output: str | None) -> str | int | None:
    """Return the selector of an output, an integer if it is the text of one."""
    return int(output) if output and output.lstrip("-").isdecimal() else output


@contextmanager
def exit_on_error(as_json: bool, verbose: bool) -> Iterator[None]:
    """Exit with the reason if the model cannot be built, captured or explained."""
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:  # the user's code may raise anything
        if verbose:
            traceback.print_exc()
        line = innermost_user_line(error.__traceback__)
        located = isinstance(error, FxshapError) or line == UNKNOWN_LINE
        where = "" if located else f", at {line}"
        if as_json:
            reason = {"error": type(error).__name__, "message": f"{error}{where}"}
            click.echo(json.dumps({"explainable": False, **reason}, indent=2))
        click.echo(f"Error: {type(error).__name__}: {error}{where}", err=True)
        sys.exit(NOT_EXPLAINABLE)
