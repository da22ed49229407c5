"""What one pair of coalitions costs, part by part: `refine=1` compared with one pass.

A pair of coalitions takes two runs of hybrids, which store what every operation receives, and four
backward passes to all references: to each hybrid, and from it to the sample. Each part is timed on
one thread, in processor time, as the median of some rounds. A profile of the backward pass tells
matrix products and convolutions, which have other numbers in each of the four passes, from the
rest: slopes and elementwise products.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

import fxshap
from benchmarks import adapters
from benchmarks.performance.workloads import WORKLOADS, Workload
from benchmarks.programs import bound_program, coalition_passes
from tests.tools.pages import replace_section

PAGE = Path("docs/refinement.md")
NETWORKS = ("CNN", "transformer")
#: Operations that multiply by weights or by other values.
PRODUCTS = ("conv", "mm", "linear", "mkldnn", "matmul")


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Return the median processor time of a call, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


def share_of_products(call: Callable[[], Any]) -> float:
    """Return the share of the time of a call that products take."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        call()
    times = {event.key: event.self_cpu_time_total for event in measured.key_averages()}
    products = sum(t for name, t in times.items() if any(word in name for word in PRODUCTS))
    return products / sum(times.values())


def measure(workload: Workload, rounds: int) -> list[str]:
    """Return the cells of one network."""
    torch.manual_seed(0)
    model = workload.build().eval()
    references = torch.randn(workload.references, *workload.shape)
    sample = torch.randn(1, *workload.shape)
    explained = {}
    for pairs in (0, 1):
        explain = adapters.with_fxshap(model, [references], 1, refine=pairs)
        explained[pairs] = milliseconds(partial(explain, [sample]), rounds)
    with torch.no_grad():
        outputs = model(references).shape[1]
    program = bound_program(model, [references])
    samples = sample.expand_as(references).contiguous()
    grads = [unit.expand(len(references), -1).clone() for unit in torch.eye(outputs)]
    passes = coalition_passes(program, [samples], [references], grads)
    half = (torch.rand_like(references) < 0.5).to(torch.uint8)
    hybrid = passes.hybrid([half], 0)
    taps = passes.tapped([hybrid])[0]

    def run() -> Any:
        return passes.tapped([hybrid])

    def backward() -> Any:
        return passes.backward(passes.reference, taps)

    each = milliseconds(run, rounds), milliseconds(backward, rounds)
    return [
        f"{explained[0]:.0f} ms",
        f"{explained[1] / explained[0]:.2f}",
        f"2 x {each[0] / explained[0]:.2f}",
        f"4 x {each[1] / explained[0]:.2f}",
        f"{share_of_products(backward):.0%}",
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance.refinement", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [[name, *measure(WORKLOADS[name], options.rounds)] for name in NETWORKS]
    header = ["network", "one pass, all outputs", "`refine=1` / one pass", "runs of hybrids"]
    header += ["backward passes", "products in a backward pass"]
    table = tabulate(rows, header, tablefmt="github", disable_numparse=True)
    print(table)
    when = f"`python -m benchmarks.performance.refinement`, {datetime.date.today()}, torch "
    when += f"{torch.__version__}, fxshap {fxshap.__version__}. Parts are divided by one pass."
    replace_section(PAGE, "parts", f"{when}\n\n{table}")


if __name__ == "__main__":
    main()
