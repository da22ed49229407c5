"""The coverage table: a page to read, the same as data, and what has become worse since."""

from __future__ import annotations

import csv
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.coverage.measure import Measurement
from tests.tools.pages import COMMIT

#: The largest additivity error of an explained network.
LIMITS = {"float32": 1e-4, "float64": 1e-9}
#: The same in float64 for a network that computes in float32 inside.
NARROW_LIMIT = 1e-6
#: The largest difference of the paired from the plain output.
OUTPUT_LIMIT = 1e-5

#: Rounding differs between machines: an error has grown when it is this many times the published
#: one, and that is taken as no smaller than so many units in the last place.
GROWTH, UNITS = 10, 4

#: What has been found out about networks outside the limits.
CAUSES = {
    "InformerModel.encoder": "It draws the keys that its attention looks at, in evaluation too: "
    "there is no single output to explain.",
    "AutoformerModel.encoder": "PyTorch cannot export it in any of the ways that capture tries: "
    "under export transformers builds an attention mask, which this model cannot take; in float64 "
    "it does not run by itself.",
}

Key = tuple[str, str, str]


# --- judging ------------------------------------------------------------------------------------


def limit(found: Measurement) -> float:
    """Return the largest additivity error that counts as explained."""
    return NARROW_LIMIT if is_narrow(found) else LIMITS[found.dtype]


def is_narrow(found: Measurement) -> bool:
    """Return True if a network measured in float64 computes in a less precise type inside."""
    return found.narrow and found.dtype == "float64"


def explained(found: Measurement) -> bool:
    """Return True if a network is explained, in one type, within the limits."""
    exact = found.additivity_error <= limit(found)  # not so if it is not a number
    return not found.failure and exact and found.output_difference <= OUTPUT_LIMIT


def regressions(measured: Iterable[Measurement], published: Iterable[Measurement]) -> list[str]:
    """Return which measurements are worse than the published ones.

    A network is worse if it was explained and is not, if its additivity error has grown, or if it
    is new and not explained.
    """
    before = {key(m): m for m in published}
    return [
        f"{m.zoo} {m.name}, {m.dtype}: {describe(m)}, published {describe(before.get(key(m)))}"
        for m in measured
        if is_worse(m, before.get(key(m)))
    ]


def is_worse(found: Measurement, before: Measurement | None) -> bool:
    """Compare one measurement with the published one."""
    if before is None or explained(before) != explained(found):
        return not explained(found)
    if found.failure or before.failure:
        return bool(found.failure) and not before.failure
    narrow = "float32" if found.narrow else found.dtype
    least = UNITS * torch.finfo(getattr(torch, narrow)).eps
    return not found.additivity_error <= GROWTH * max(before.additivity_error, least)


def key(found: Measurement) -> Key:
    """Return what identifies a measurement."""
    return found.zoo, found.name, found.dtype


def describe(found: Measurement | None) -> str:
    """Return the error or the failure of a measurement."""
    if found is None:
        return "nothing"
    if found.failure or found.output_difference <= OUTPUT_LIMIT:
        return found.failure or f"{found.additivity_error:.1e}"
    return f"{found.additivity_error:.1e}, paired output off by {found.output_difference:.1e}"


# --- the data -----------------------------------------------------------------------------------


def write_data(path: Path, measurements: Sequence[Measurement]) -> None:
    """Write all measurements as comma-separated values."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Measurement))
        for found in measurements:
            writer.writerow(map(as_text, found.record().values()))


def as_text(value: object) -> str:
    """Write one value of a measurement."""
    if isinstance(value, float):
        return f"{value:.2e}"
    return " ".join(value) if isinstance(value, list) else str(value)


def read_data(path: Path) -> list[Measurement]:
    """Read the measurements back; none if they were never written."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [from_text(row) for row in csv.DictReader(file)]


def from_text(row: dict[str, str]) -> Measurement:
    """Make a measurement of the texts of one row."""
    known = {field.name: field.type for field in fields(Measurement)}
    read = {"float": float, "bool": "True".__eq__, "list[str]": str.split, "str": str}
    given = {name: kind for name, kind in known.items() if name in row}  # there were fewer once
    return Measurement(**{name: read[str(kind)](row[name]) for name, kind in given.items()})


# --- the page -----------------------------------------------------------------------------------

PAGE = """# Does it work on my model?

{passed} of {total} networks, of {families} families, are explained by unmodified SHAP without a
change to the model.

{summary}

Every network has random weights. One sample is explained against two references, and *explained*
means that SHAP's values sum to the difference of the outputs, to {float32} of the largest output in
float32 and to {float64} in float64, and that the output SHAP sees is the model's own to {output}.
The error is max |sum(phi) - (f(x) - mean f(refs))| / max(|f(x)|, |f(refs)|). Networks that compute
in float32 inside whatever the type of their input ("narrow") have {narrow} for a limit in float64:
where no decision depends on these parts fxshap computes them in float64, and what is left is the
rounding of the networks' own outputs.

![Additivity error of every network](figures/coverage.png)

{date}, {software}, commit {commit}:
`{command}`. Every network is in [coverage.csv](coverage.csv).{older}

In the tables below a row is a family and shows its worst network:

- **float32**, **float64**: the additivity error; `*` marks narrow networks;
- **rounding**: how far the network's own float32 output is from its float64 output, by the same
  scale. No attribution can add up to digits that the network itself does not have;
- **paired**: the difference between the output that SHAP sees and the plain one, of images with
  the channels last in memory, as convolutions go here; in float32, how far the plain output of
  images with the channels first is from that, which is the rounding of other kernels, is in the
  column `layout_difference` of the data, and up to {layout};
- **capture**: seconds of processor time (`time.process_time`), spent once for each kind of input;
- **generic rule**: the operations without a closed rule. They add up as exactly; how they share
  among several inputs is a coarser approximation.

{tables}
{failures}
## How the networks are made

Weights are those that the constructors draw, in small configurations or on images as small as the
network takes. Matrices that are all zero, such as heads before training, are filled with noise, or
nothing would depend on the input. Batch norms get their statistics from {batches} training-mode
forwards of {rows} samples, and weights and biases drawn from (0, 1): with the 1 and 0 that they
begin training with, every block of a deep network magnifies the differences between inputs, and
rounding with them. `python -m benchmarks.coverage --initial-batch-norms --names resnet152` shows
what that comes to. The gains of other norms, vectors of ones, are drawn from (0, 1) as well.

All options are the defaults of the libraries. Mixtures of experts of transformers multiply tokens
in groups (`grouped_mm`), which PyTorch does in float32 and less precise types only: in float64
these networks cannot run so, and are set to `batched_mm`.

Three networks at random magnify rounding a hundred to ten thousand times where this is not so, and
paired and plain output then differ by as much:

- `convmixer_768_32` with statistics of 2 x 8 samples: activations that are rare among these are
  divided by a deviation that is too small, layer after layer, and the output is 1e26;
- `gemma4_vit_167m` with gains of 1: its attention does not divide the products of normed queries
  and keys by the root of their width, and the softmax of every layer is nearly a choice;
- `efficientnet_b7` on images of 64 x 64, made for 600 x 600: the last maps are 2 x 2, smaller than
  its kernels.
"""


def write_page(
    path: Path, measurements: Sequence[Measurement], command: str, calibration: tuple[int, int]
) -> None:
    """Write the page; `calibration` is batches of the forwards of batch norms and rows of each."""
    passed, total = count(measurements)
    page = PAGE.format(
        passed=passed,
        total=total,
        families=len({(m.zoo, m.family) for m in measurements}),
        summary=summary_table(measurements),
        **{dtype: power(value) for dtype, value in LIMITS.items()},
        narrow=power(NARROW_LIMIT),
        output=power(OUTPUT_LIMIT),
        layout=worst(m.layout_difference for m in measurements),
        date=max(m.date for m in measurements),
        older=older_section(measurements),
        software=all_software(measurements),
        command=command,
        commit=COMMIT,
        tables="\n\n".join(zoo_section(*group) for group in grouped(measurements, "zoo")),
        batches=calibration[0],
        rows=calibration[1],
        failures=failure_section(measurements),
    )
    path.write_text(page)


def older_section(measurements: Sequence[Measurement]) -> str:
    """Return which results are from earlier runs; "" if none."""
    latest = max(m.date for m in measurements)
    groups: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for m in measurements:
        groups[m.date].add((m.zoo, m.name))
    parts = [
        f"of {len(networks)} networks from {date}"
        for date, networks in sorted(groups.items())
        if date != latest
    ]
    if not parts:
        return ""
    text = f"The results {' and '.join(parts)} stand; the columns `date` and `sources` say which."
    return "\n\n" + "\n".join(textwrap.wrap(text, 100))


def power(value: float) -> str:
    """Write a power of ten: 1e-4."""
    return f"{value:.0e}".replace("e-0", "e-")


def grouped(
    measurements: Iterable[Measurement], attribute: str
) -> list[tuple[str, list[Measurement]]]:
    """Group measurements by zoo or family, in the order of their first."""
    groups: dict[str, list[Measurement]] = defaultdict(list)
    for found in measurements:
        groups[getattr(found, attribute)].append(found)
    return list(groups.items())


def summary_table(measurements: Sequence[Measurement]) -> str:
    """Tabulate the zoos."""
    header = ["zoo", "families", "networks", "explained"]
    header += [f"{statistic}, {dtype}" for dtype in LIMITS for statistic in ("median", "worst")]
    rows = []
    for zoo, members in [*grouped(measurements, "zoo"), ("all", list(measurements))]:
        passed, total = count(members)
        families = len({(m.zoo, m.family) for m in members})
        row = [zoo, families, total, passed]
        for dtype in LIMITS:
            errors = [m.additivity_error for m in with_error(members, dtype) if not is_narrow(m)]
            row += (
                [f"{statistics.median(errors):.0e}", f"{max(errors):.0e}"] if errors else ["", ""]
            )
        row.append(worst(m.additivity_error for m in members if is_narrow(m)))
        rows.append(row)
    header.append("worst, narrow")
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def zoo_section(zoo: str, members: Sequence[Measurement]) -> str:
    """Tabulate the families of one zoo."""
    header = ["family", "networks", "explained", *LIMITS, "rounding", "paired", "capture"]
    rows = [family_row(*group) for group in sorted(grouped(members, "family"), key=first)]
    table = tabulate(rows, [*header, "generic rule"], tablefmt="github", disable_numparse=True)
    return f"## {zoo}\n\n{table}"


def first(group: tuple[str, list[Measurement]]) -> str:
    """Return the name of a group, in lower case, to sort by."""
    return group[0].lower()


def family_row(family: str, members: Sequence[Measurement]) -> list[str]:
    """Show the worst of a family."""
    passed, total = count(members)
    names = dict.fromkeys(m.name for m in members)
    seconds = [m.capture_seconds for m in members if m.capture_seconds == m.capture_seconds]
    return [
        family,
        ", ".join(names),
        {0: "no", total: "yes"}.get(passed, f"{passed} of {total}"),
        *(worst_error(with_error(members, dtype)) for dtype in LIMITS),
        worst(m.rounding for m in members if m.dtype == "float32"),
        worst(m.output_difference for m in members),
        f"{max(seconds):.1f}" if seconds else "",
        ", ".join(sorted({short(name) for m in members for name in m.generic})),
    ]


def short(operation: str) -> str:
    """Name an operation without its namespace and overload: ``gather`` of aten.gather.default."""
    return operation.split(".")[1]


def count(members: Iterable[Measurement]) -> tuple[int, int]:
    """Return how many networks are explained in every type, and how many there are."""
    names = {(m.zoo, m.name) for m in members}
    outside = {(m.zoo, m.name) for m in members if not explained(m)}
    return len(names - outside), len(names)


def with_error(members: Iterable[Measurement], dtype: str) -> list[Measurement]:
    """Return the measurements in one type whose additivity error is a number."""
    return [m for m in members if m.dtype == dtype and m.additivity_error == m.additivity_error]


def worst_error(members: Sequence[Measurement]) -> str:
    """Return the largest additivity error, marked if it is that of a narrow network."""
    if not members:
        return ""
    found = max(members, key=lambda m: m.additivity_error)
    return f"{found.additivity_error:.0e}" + (" *" if is_narrow(found) else "")


def worst(values: Iterable[float]) -> str:
    """Return the largest of the values that are numbers."""
    numbers = [value for value in values if value == value]
    return f"{max(numbers):.0e}" if numbers else ""


def all_software(measurements: Iterable[Measurement]) -> str:
    """Name every version that anything was measured with."""
    return ", ".join(dict.fromkeys(part for m in measurements for part in m.software.split(", ")))


def failure_section(measurements: Iterable[Measurement]) -> str:
    """List the networks outside the limits with what is known of the reason."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for m in measurements:
        if not explained(m):
            reasons[m.zoo, m.name][describe(m)].append(m.dtype)
    lines = [
        f"- **{name}** ({zoo}). {CAUSES.get(name, '')} "
        + " ".join(f"{' and '.join(dtypes)}: {reason}" for reason, dtypes in found.items())
        for (zoo, name), found in reasons.items()
    ]
    return "\n".join(["\n## Outside the limits\n", *lines, ""]) if lines else ""
