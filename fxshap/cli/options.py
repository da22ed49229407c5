"""The options that the commands share, and the values of options.

The modules that declare commands import no PyTorch, so that help and completion take no seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import click

Command = TypeVar("Command", bound=Callable[..., Any])

#: Dtypes of weights and of explained inputs.
FLOATING = ("float16", "bfloat16", "float32", "float64")
#: Dtypes of inputs that are not explained.
INTEGERS = ("int32", "int64", "bool")


def model_options(command: Command) -> Command:
    """Add the model to a command, and the options that say what of it is explained, and how."""
    for decorate in reversed(
        (
            click.argument("factory", metavar="PACKAGE.MODULE:FACTORY"),
            click.option(
                "--output",
                help="Which output to explain if the model returns several: a key, an attribute or "
                "an index, as in logits or 0. --ranked-outputs chooses among its columns.",
            ),
            click.option(
                "--layer",
                help="Explain what this layer returns, as in bert.embeddings, instead of the "
                "inputs.",
            ),
            click.option(
                "--rule",
                type=click.Choice(("rescale", "variance")),
                default="rescale",
                show_default=True,
                help="Rule for activations: rescale is DeepLIFT's, variance also uses the "
                "variances of the sums before them.",
            ),
        )
    ):
        command = decorate(command)
    return command


def printing_options(command: Command) -> Command:
    """Add the options that say what a command prints."""
    verbose = click.option(
        "--verbose", is_flag=True, help="Log to standard error, with tracebacks."
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
    return as_json(verbose(command))


def parse_output(output: str | None) -> str | int | None:
    """Return the selector of an output, an integer if it is the text of one."""
    return int(output) if output and output.lstrip("-").isdecimal() else output


def parse_integers(text: str) -> list[int]:
    """Return integers, given as ``0,3``."""
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise click.BadParameter(f"{text!r} is not like 0,3")
    return [int(number) for number in numbers]


def parse_columns(text: str) -> str | tuple[str, ...]:
    """Return one column, or several, given as ``age,income``."""
    names = tuple(name.strip() for name in text.split(","))
    return names if len(names) > 1 else names[0]


def parse_argument(text: str) -> tuple[str, str]:
    """Return an argument of the model and its column, given as ``mask=attention_mask``."""
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise click.BadParameter(f"{text!r} is not like argument=column")
    return name, column


def parse_size(text: str) -> Any:
    """Return a number, or ``auto``."""
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise click.BadParameter(f"{text!r} is not a number or 'auto'")
    return text if text == "auto" else int(text)


def parse_refinement(refine: str) -> int | Literal["exact", "auto"]:
    """Return what ``--refine`` gives, an integer if it is the text of one."""
    if refine in ("exact", "auto"):
        return cast(Literal["exact", "auto"], refine)
    if not refine.isdecimal():
        raise click.BadParameter(f"{refine!r} is not a number from 0, 'exact' or 'auto'")
    return int(refine)


@dataclass(frozen=True)
class InputSpec:
    """An input of the model: its shape without the rows, and what is known of it.

    Attributes
    ----------
    shape : tuple of int
        The shape of one row.
    name : str, optional
        The parameter of ``forward``; by default the next one.
    dtype : str, optional
        By default that of the weights.
    """

    shape: tuple[int, ...]
    name: str | None = None
    dtype: str | None = None

    @property
    def explained(self) -> bool:
        """Whether the input is floating point."""
        return self.dtype not in INTEGERS


def parse_shape(shape: str) -> tuple[int, ...]:
    """Return the shape of one row of an input, given as ``3,224,224``."""
    sizes = shape.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise click.BadParameter(f"{shape!r} is not like 3,224,224")
    return tuple(map(int, sizes))


def parse_input(text: str) -> InputSpec:
    """Return an input, given as ``name=3,224,224`` or ``name=int64:16``."""
    name, equals, rest = text.partition("=")
    dtype, colon, shape = rest.rpartition(":")
    dtypes = (*FLOATING, *INTEGERS)
    if not (name.isidentifier() and equals) or (colon and dtype not in dtypes):
        raise click.BadParameter(
            f"{text!r} is not like name=3,224,224 or name=int64:16; dtypes are {', '.join(dtypes)}"
        )
    return InputSpec(parse_shape(shape), name, dtype if colon else None)


def parse_bound(text: str) -> tuple[str, Any]:
    """Return an argument of the model and its value, given as ``scale=0.5`` or ``mask=mask.npy``.

    A value that is no Python literal is a text. The path of a ``.npy`` file stays a path.
    """
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise click.BadParameter(f"{text!r} is not like scale=0.5 or mask=mask.npy")
    if value.endswith(".npy"):
        if not Path(value).is_file():
            raise click.BadParameter(f"there is no file {value}")
        return name, Path(value)
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value
