"""The record of a job: what it computes, and which parts are done, so that it can continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fxshap._version import __version__
from fxshap.datasets.batch import BatchExplainer
from fxshap.datasets.columns import Array
from fxshap.datasets.parts import FOLDER, Part
from fxshap.datasets.sinks import Sink
from fxshap.datasets.summary import Summary, write_file
from fxshap.datasets.worker import model_digest
from fxshap.errors import OptionError


def describe_job(explainer: BatchExplainer, **others: Any) -> dict[str, Any]:
    """Return what must be the same when a job continues, as JSON has it.

    Parameters
    ----------
    explainer : BatchExplainer
    **others
        Other facts, such as the fingerprint of the data.
    """
    e = explainer
    options = {
        "inputs": e.background.columns,
        "arguments": e.arguments,
        "outputs": e.outputs,
        "ranked_outputs": e.ranked_outputs,
        "id_column": e.id_column,
        "on_error": e.on_error,
        "dtype": e.dtype,
        "prefix": e.prefix,
        "batch_size": e.batch_size,
        **{name: describe_option(value) for name, value in sorted(e.options.items())},
    }
    facts = {
        "fxshap": __version__,
        "model": describe_option(e.model),
        "background": [digest_array(x) for x in e.background.arrays],
        "options": options,
        **others,
    }
    described: dict[str, Any] = json.loads(json.dumps(facts))
    return described


def describe_option(value: Any) -> Any:
    """Return a description of an option that is the same in every process."""
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {model_digest(value)}"
    if isinstance(value, torch.Tensor):
        return digest_array(value.detach().cpu().numpy())
    if isinstance(value, np.ndarray):
        return digest_array(value)
    if isinstance(value, Mapping):
        return {str(name): describe_option(x) for name, x in sorted(value.items())}
    if isinstance(value, tuple | list):
        return [describe_option(x) for x in value]
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)


def digest_array(array: Array) -> str:
    """Return a digest of an array."""
    content = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + content.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The record of a job, in a folder of its output.

    Attributes
    ----------
    folder : Path
    """

    folder: Path

    @classmethod
    def open(cls, out: Path, job: Mapping[str, Any], resume: bool) -> tuple[Manifest, int]:
        """Begin a job, or continue one.

        Parameters
        ----------
        out : Path
            The folder of the output.
        job : mapping
            What the job computes. `rows_per_part` is that of the first run.
        resume : bool
            Whether to continue a job that is there.

        Returns
        -------
        (Manifest, int)
            With the rows of a part.

        Raises
        ------
        OptionError
            If there is an output, and it is not continued or it is that of another job.
        """
        manifest = cls(out / FOLDER)
        file = manifest.folder / "manifest.json"
        if not file.exists():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise OptionError(f"{out} exists already, and it is not that of a job")
            manifest.folder.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(job, indent=2).encode())
            return manifest, int(job["rows_per_part"])
        if not resume:
            raise OptionError(
                f"{out} exists already; continue its job with resume (--resume), or choose "
                "another path"
            )
        there = json.loads(file.read_text())
        differ = [name for name in job if name != "rows_per_part" and there.get(name) != job[name]]
        if differ:
            raise OptionError(
                f"{out} belongs to a job with another {' and '.join(differ)}; continue it with the "
                "same, or choose another path"
            )
        return manifest, int(there["rows_per_part"])

    def file(self, part: Part) -> Path:
        """Return the file with the summary of a part, which is there when the part is done."""
        return self.folder / f"part-{part.index:06d}.npz"

    def missing(self, parts: list[Part], sink: Sink) -> list[Part]:
        """Return the parts that are not done."""
        return [part for part in parts if not (self.file(part).exists() and sink.has(part))]

    def summary(self, parts: list[Part], **fields: Any) -> Summary:
        """Return the summary of all parts, and write it."""
        total = Summary(**fields)
        for part in parts:
            total.merge(Summary.load(self.file(part)))
        total.save(self.folder / "summary.npz")
        return total


def read_summary(out: str | Path) -> Summary:
    """Return the summary of a job that is done.

    Parameters
    ----------
    out : path
        The output of the job.

    Raises
    ------
    OptionError
        If there is none.
    """
    file = Path(out) / FOLDER / "summary.npz"
    if not file.exists():
        raise OptionError(f"{out} is not the output of a job that is done")
    return Summary.load(file)
