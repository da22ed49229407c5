"""The command line: ``fxshap check``, ``fxshap explain`` and ``fxshap demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fxshap._version import __version__
from fxshap.cli.check_command import check
from fxshap.cli.explain_command import explain


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fxshap", message="%(prog)s %(version)s")
def cli() -> None:
    """Make PyTorch models explainable by unmodified SHAP, and check the attributions.

    \b
    Example:
      fxshap check torchvision.models:resnet18 --shape 3,224,224
    """  # noqa: D301, click reads \b


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
    from fxshap.demo.run import run_demo  # imported here because SHAP takes seconds to import

    sys.exit(run_demo(output))


cli.add_command(check)
cli.add_command(explain)
