"""Rows of results in a file of JSON lines, and the tables made from them.

Every row is written at once, so that a run that is stopped keeps what it has measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]

ROWS, TABLES = "results.jsonl", "tables.md"
#: Seconds between two writes of the tables.
PAUSE = 2.0
#: Failed tests in the tables.
SHOWN = 12


class Results:
    """The results of one run, in a folder.

    Parameters
    ----------
    folder : Path
        Where the rows and the tables are written; earlier rows are kept.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.written = 0.0

    def rows(self) -> list[Row]:
        """Return all rows that were written so far."""
        path = self.folder / ROWS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, part: str, **row: Any) -> None:
        """Append a row, and write the tables again."""
        with (self.folder / ROWS).open("a") as file:
            file.write(json.dumps({"part": part, **row}) + "\n")
        if time.monotonic() - self.written > PAUSE:
            self.write_tables()

    def write_tables(self) -> str:
        """Write the tables as Markdown and return them."""
        text = tables(self.rows())
        (self.folder / TABLES).write_text(text + "\n")
        self.written = time.monotonic()
        return text


def tables(rows: list[Row]) -> str:
    """Return the tables of all parts that have rows."""
    parts: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
        "about": ("", about),
        "correctness": ("### Correctness", correctness),
        "speed": ("### Speed", speed),
        "memory": ("### Memory", memory),
        "note": ("### Notes", notes),
    }
    texts = []
    for part, (title, table) in parts.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            texts.append("\n\n".join(filter(None, (title, table(own)))))
    return "\n\n".join(texts)


def about(rows: list[Row]) -> str:
    """Return the date, the card and the versions in one sentence."""
    facts = rows[-1]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    commit = facts.get("commit", "unknown")
    return f"{facts['date']}, {facts['card']}, {versions}, commit {commit}."


def correctness(rows: list[Row]) -> str:
    """Return the counts of every group of tests and the first failures."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    outcomes = ("passed", "failed", "skipped")
    counts = {
        name: [sum(row["outcome"] == outcome for row in group) for outcome in outcomes]
        for name, group in groups.items()
    }
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    text = markdown(["tests", *outcomes], [[name, *map(str, c)] for name, c in counts.items()])
    failed = [row for row in rows if row["outcome"] == "failed"]
    lines = [f"- `{row['test']}`: {row['message']}" for row in failed[:SHOWN]]
    return "\n\n".join(filter(None, (text, "\n".join(lines))))


def speed(rows: list[Row]) -> str:
    """Return how many samples per second every method explains."""
    header = ["network", "method", "samples timed", "samples/s", "over stock SHAP", "error"]
    header += ["error, TF32", "waits"]
    body = [
        [row["network"], row["method"], failure(row["error"])]
        if "error" in row
        else [
            row["network"],
            row["method"],
            f"{row['samples']} of {row['of']}",
            f"{row['per_second']:.4g}",
            number(row.get("ratio"), "{:.2f} ({:.2f}-{:.2f})"),
            number(row.get("additivity"), "{:.1e}"),
            number(row.get("additivity_tf32"), "{:.1e}"),
            number(row.get("waits"), "{:.1f}"),
        ]
        for row in rows
    ]
    return markdown(header, body)


def memory(rows: list[Row]) -> str:
    """Return the peak memory of every explanation."""
    header = ["references", "method", "MiB over idle", "seconds"]
    body = [
        [
            str(row["references"]),
            row["method"],
            failure(row["error"]) if "error" in row else f"{row['mebibytes']:.0f}",
            number(row.get("seconds"), "{:.2f}"),
        ]
        for row in rows
    ]
    return markdown(header, body)


def notes(rows: list[Row]) -> str:
    """Return what happened to the run itself, line by line."""
    return "\n".join(f"- {row['text']}" for row in rows)


def failure(message: str) -> str:
    """Return why a method has no figures, without what would end a cell of a table."""
    return message.replace("|", "/")


def number(value: Any, form: str) -> str:
    """Format a number, or several; "-" for none."""
    if value is None:
        return "-"
    return form.format(*value) if isinstance(value, list | tuple) else form.format(value)


def markdown(header: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table; short rows are filled up."""
    full = [row + ["-"] * (len(header) - len(row)) for row in body]
    return str(tabulate(full, header, tablefmt="github", disable_numparse=True))


def short(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"
