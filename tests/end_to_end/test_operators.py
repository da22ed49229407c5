"""A sample of PyTorch's operators, each as a small model: ``make operators`` tries them all.

It runs in a process of its own, because PyTorch's test database changes global settings.
"""

from __future__ import annotations

import json
import subprocess
import sys

#: Of every family some, those first that were wrong.
SAMPLE = (
    "linalg.qr", "matrix_exp", "linalg.eigvalsh", "linalg.cholesky", "cholesky_solve",
    "as_strided", "diagonal_scatter", "select_scatter", "var_mean", "std",
    "linalg.vector_norm", "div.no_rounding_mode", "sgn", "angle", "polar", "stft",
    "nn.functional.bilinear", "nn.functional.conv1d", "fft.rfft", "fft.hfft", "logsumexp",
    "nn.functional.gelu", "nn.functional.softmin", "amax", "sort", "cumprod", "einsum",
)  # fmt: skip


def test_operators_add_up_and_give_dummies_nothing():
    command = [sys.executable, "-m", "tests.tools.operators", *SAMPLE]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {verdict["operator"] for verdict in found} == set(SAMPLE)
    assert [verdict for verdict in found if verdict["outcome"] != "additive"] == []
    assert {verdict["dtype"] for verdict in found} == {"float64", "complex128"}
