"""``fxshap check``: whether the attributions of a model add up, on random inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import click

from fxshap.cli.common import (
    ADDITIVE,
    NOT_ADDITIVE,
    build_model,
    configure_logging,
    exit_on_error,
)
from fxshap.cli.options import (
    FLOATING,
    InputSpec,
    model_options,
    parse_bound,
    parse_input,
    parse_output,
    parse_refinement,
    parse_shape,
    printing_options,
)


@click.command()
@model_options
@click.option(
    "--shape",
    "shapes",
    type=parse_shape,
    metavar="SIZES",
    multiple=True,
    help="Shape of one row of a floating-point input, as in 3,224,224. Repeat it for every input.",
)
@click.option(
    "--input",
    "named",
    type=parse_input,
    metavar="NAME=[DTYPE:]SIZES",
    multiple=True,
    help="An input by the name of its parameter, as in pixels=3,224,224 or ids=int64:16. Integers "
    "are not explained; explain a layer that embeds them.",
)
@click.option(
    "--bind",
    "bound",
    type=parse_bound,
    metavar="NAME=VALUE",
    multiple=True,
    help="Another argument of the model, the same in all calls, as in scale=0.5, use_cache=False "
    "or edges=edges.npy.",
)
@click.option(
    "--integers-below",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Limit of the random integers, such as the size of a vocabulary.",
)
@click.option(
    "--dtype",
    type=click.Choice(FLOATING),
    default="float32",
    show_default=True,
    help="Dtype of the weights and the inputs. NumPy has no bfloat16: a model with such weights "
    "takes and returns float32.",
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
    help="Number of rows to explain. With --layer it is one.",
)
@click.option(
    "--ranked-outputs",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="How many columns of the output to explain, such as classes: the largest of every "
    "sample. --output chooses the output.",
)
@click.option(
    "--refine",
    type=parse_refinement,
    default="0",
    metavar="PAIRS|exact|auto",
    show_default=True,
    help="Number of complementary pairs of random coalitions for every reference, 'exact' for all "
    "coalitions, or 'auto' for what one second allows.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Seed of random weights and of the inputs."
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the graph to this file: .svg, .png, .pdf or .dot.",
)
@printing_options
def check(
    factory: str,
    shapes: tuple[tuple[int, ...], ...],
    named: tuple[InputSpec, ...],
    bound: tuple[tuple[str, Any], ...],
    integers_below: int,
    layer: str | None,
    dtype: str,
    references: int,
    samples: int,
    output: str | None,
    ranked_outputs: int,
    refine: int | Literal["exact", "auto"],
    rule: Literal["rescale", "variance"],
    seed: int,
    draw: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Check that SHAP's attributions of a model add up, on random inputs.

    Imports PACKAGE.MODULE, which runs its code, and calls FACTORY without arguments. FACTORY may
    also be a model itself, and PACKAGE.MODULE the path of a file. The current folder comes first on
    the import path.

    Exits with 0 if the attributions add up, 1 if they do not, and 2 with the reason if the model
    cannot be built, captured or explained, or an argument is wrong.

    \b
    Examples:
      fxshap check torchvision.models:resnet18 --shape 3,224,224
      fxshap check path/to/model.py:Net --shape 10 --dtype float64
      fxshap check my_project.models:two_towers --shape 10 --shape 16,384
      fxshap check my_project.models:bert --input input_ids=int64:16 \\
          --layer bert.embeddings --output logits --bind return_dict=True
    """  # noqa: D301, click reads \b
    specs = [*map(InputSpec, shapes), *named]
    if not specs:
        raise click.UsageError("Give the shape of every input, with --shape or --input.")
    if layer is None and not any(spec.explained for spec in specs):
        raise click.UsageError(
            "Integers have no attributions. Explain the layer that embeds them, with --layer."
        )
    if layer is not None and samples > 1:
        raise click.UsageError("--layer explains one sample; leave out --samples.")
    if layer is not None and dtype == "bfloat16":
        raise click.UsageError("--layer returns bfloat16, which NumPy lacks; leave out --dtype.")
    configure_logging(verbose)
    with exit_on_error(as_json, verbose):
        import torch

        from fxshap.cli.inputs import convert_weights, explainable_with_inputs
        from fxshap.verification.verify import verify

        torch.manual_seed(seed)
        model, input_dtype = convert_weights(build_model(factory), dtype)
        explainable, background, rows = explainable_with_inputs(
            model,
            specs,
            (references, samples),
            input_dtype,
            integers_below,
            layer,
            dict(bound),
            output=parse_output(output),
            rule=rule,
            refine=refine,
        )
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
        verdict = "PASS" if result.additive else "FAIL"
        figures = (
            f"additivity error {result.additivity_error:.1e}, tolerance {result.tolerance:.0e}"
        )
        click.echo(f"{result}\n\n{verdict}: {figures}")
    sys.exit(ADDITIVE if result.additive else NOT_ADDITIVE)
