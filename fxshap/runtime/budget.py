"""What fits into a time: exact Shapley values, or pairs of coalitions, or one pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxshap.runtime.coalitions import count_passes
from fxshap.runtime.exact import ExactGame
from fxshap.runtime.pairs import SampleReferencePairs
from fxshap.runtime.refinement import BUDGET, ONE_PASS, Refinement

#: The largest number of pairs of coalitions that is chosen.
MAX_PAIRS = 1024


@dataclass(frozen=True)
class Speed:
    """Seconds that the parts of an explanation take.

    Attributes
    ----------
    row : float
        The output for one row, in a large batch.
    run : float
        One run on as many rows as there are references, which stores what operations receive.
    backward : float
        One backward pass to all references, for one output.
    """

    row: float
    run: float
    backward: float


def measure_speed(pairs: SampleReferencePairs, game: ExactGame) -> Speed:
    """Measure the parts of an explanation of one sample.

    Parameters
    ----------
    pairs : SampleReferencePairs
        The sample with all references.
    game : ExactGame
        Of the same pairs.

    Notes
    -----
    Each part runs twice, because the first run is slower.
    """
    references = pairs.references
    grad = torch.zeros_like(references.output)
    grad[:, :1] = 1
    single = SampleReferencePairs(
        pairs.program,
        pairs.layout,
        replace(pairs.options, refinement=ONE_PASS),
        pairs.samples,
        references,
    )
    return Speed(
        game.seconds_per_row(),
        seconds_of_second(lambda: pairs.program.tapped(references.inputs)[0]),
        seconds_of_second(lambda: single.backward(grad)[0]),
    )


def seconds_of_second(call: Callable[[], Tensor]) -> float:
    """Return how long the second of two calls takes, until its result is there."""
    call()
    start = time.perf_counter()
    call()[:1].cpu()
    return time.perf_counter() - start


def refinement_within_budget(refinement: Refinement, speed: Speed, game: ExactGame) -> Refinement:
    """Return the nearest refinement that fits into the budget of ``refine="auto"``.

    Exact values serve all outputs. A backward pass is for one output, so the budget is for one.

    Parameters
    ----------
    refinement : Refinement
        With ``"auto"``.
    speed : Speed
    game : ExactGame
        Of the pairs to explain.
    """
    budget = BUDGET if refinement.budget is None else refinement.budget
    if game.rows * speed.row <= budget:
        return replace(refinement, coalitions="exact", budget=None, seed=0)
    pairs = 0
    following = 1
    while following <= MAX_PAIRS:
        passes, runs = count_passes(following, len(game.players), game.largest)
        if passes * speed.backward + runs * speed.run > budget:
            break
        pairs, following = following, 2 * following
    return replace(refinement, coalitions=pairs, budget=None, seed=refinement.seed if pairs else 0)
