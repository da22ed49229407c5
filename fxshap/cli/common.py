"""What the commands share: the import of a model, logging, and how they exit."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from fxshap.errors import AdditivityError, FxshapError

if TYPE_CHECKING:
    from torch import nn

#: Exit statuses.
ADDITIVE, NOT_ADDITIVE, NOT_EXPLAINABLE = 0, 1, 2
#: By what messages name in Python: the same on the command line.
FLAGS = {
    r"inputs of shapes": "--shape",
    r"output=|make_explainable\(model, output": "--output",
    r"input_names|forward takes": "--input",
    r"\.bind\b|\bbound\b|forward_kwargs|takes no '": "--bind",
    r"split_at|layer=|the part after": "--layer",
    r"\.to\(torch\.|dtype": "--dtype",
    r"index out of range in self": "--integers-below",
}


def configure_logging(verbose: bool) -> None:
    """Log everything of fxshap to standard error, or nothing of torch."""
    if verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("fxshap").setLevel(logging.DEBUG)
    else:  # torch.export logs its failures at length; our message has them in one line
        logging.getLogger("torch").setLevel(logging.CRITICAL)


def build_model(factory: str) -> nn.Module:
    """Import ``package.module:factory``, or ``file.py:factory``, and return the model.

    Raises
    ------
    click.BadParameter
        If there is no such module or factory, or it returns no ``nn.Module``.
    """
    name, colon, attributes = factory.rpartition(":")
    from torch import nn

    if not (name and colon and attributes):
        raise click.BadParameter(
            f"{factory!r} is not like package.module:factory", param_hint="FACTORY"
        )
    if os.getcwd() not in sys.path:  # as for `python -m`
        sys.path.insert(0, os.getcwd())
    try:
        value: Any = (
            import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        )
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


def import_file(path: Path) -> ModuleType:
    """Import a Python file; its folder comes first on the import path."""
    if not path.is_file():
        raise click.BadParameter(f"there is no file {path}", param_hint="FACTORY")
    sys.path.insert(0, str(path.resolve().parent))
    return importlib.import_module(path.stem)


def hint(error: Exception) -> str:
    """Return a line with the flags of the options that a message recommends, or ''."""
    parameters = click.get_current_context().command.params
    options = {option for parameter in parameters for option in parameter.opts}
    flags = [flag for text, flag in FLAGS.items() if re.search(text, str(error))]
    here = [flag for flag in flags if flag in options]
    return f"\nOn the command line: {', '.join(here)}" if here else ""


@contextmanager
def exit_on_error(as_json: bool, verbose: bool) -> Iterator[None]:
    """Exit with the reason if the model cannot be built, captured or explained.

    Attributions of a data set that do not add up have an exit status of their own.
    """
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:  # the user's code may raise anything
        from fxshap.capture.diagnostics import innermost_user_line
        from fxshap.graph.provenance import UNKNOWN_LINE

        if verbose:
            traceback.print_exc()
        line = innermost_user_line(error.__traceback__)
        located = isinstance(error, FxshapError) or line == UNKNOWN_LINE
        where = "" if located else f", at {line}"
        if as_json:
            reason = {"error": type(error).__name__, "message": f"{error}{where}"}
            click.echo(json.dumps({"explainable": False, **reason}, indent=2))
        click.echo(f"Error: {type(error).__name__}: {error}{where}{hint(error)}", err=True)
        sys.exit(NOT_ADDITIVE if isinstance(error, AdditivityError) else NOT_EXPLAINABLE)
