"""Correctness, speed and memory on a GPU, each within its own time limit.

Every part runs in a process of its own, which is ended if it does not stop by itself. Rows and
tables are written as they come: ``results.jsonl`` and ``tables.md`` in the output folder.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import subprocess
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.performance.results import Results, tables
from tests.tools.pages import COMMIT, replace_section

PARTS = ("correctness", "speed", "memory")
#: Seconds after its limit until a part is ended.
GRACE = 15
PACKAGES = ("torch", "numpy", "shap", "captum", "tangermeme")
TESTS = "tests/end_to_end/test_cuda.py"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.performance.gpu", description=__doc__
    )
    result.add_argument("--device", default="cuda")
    result.add_argument("--quick", action="store_true", help="a dry run on few and small inputs")
    result.add_argument("--output", type=Path, default=Path("build/gpu"))
    result.add_argument("--page", type=Path, help="write the tables into this page")
    result.add_argument("--from", dest="rendered", type=Path, help="write an earlier run's tables")
    result.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    result.add_argument("--networks", nargs="+", help="the networks to time; all by default")
    result.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    for part, seconds in zip(PARTS, (150.0, 200.0, 60.0), strict=True):
        result.add_argument(f"--{part}-seconds", type=float, default=seconds)
    result.add_argument("--part", choices=PARTS[1:], help=argparse.SUPPRESS)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; return 1 if a test failed or a part did not end by itself."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.part:
        run_part(options)
        return 0
    if options.rendered is None:
        results = Results(options.output)
        start(results, options)
        ended = [run(part, arguments, options, results) for part in options.parts]
        text = results.write_tables()
    else:
        results, ended = Results(options.rendered), [True]
        text = tables(results.rows())
    print(text)
    if options.page:
        replace_section(options.page, "gpu", text, stamp=False)
    failed = any(row.get("outcome") == "failed" for row in results.rows())
    return int(failed or not all(ended))


def start(results: Results, options: argparse.Namespace) -> None:
    """Remove the rows of an earlier run and write what this one runs on."""
    for path in results.folder.glob("results.jsonl"):
        path.unlink()
    device = torch.device(options.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} (no GPU)"
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    results.add(
        "about", date=str(datetime.date.today()), card=card, versions=versions, commit=COMMIT
    )


def run(part: str, arguments: list[str], options: argparse.Namespace, results: Results) -> bool:
    """Run a part in a process of its own; return whether it ended in time and without an error."""
    limit = getattr(options, f"{part}_seconds")
    if part == "correctness":
        command, grace = pytest_command(options), 0
    else:
        module = "benchmarks.performance.gpu"
        command, grace = [sys.executable, "-m", module, *arguments, "--part", part], GRACE
    environment = os.environ | {
        "FXSHAP_TEST_DEVICE": options.device,
        "FXSHAP_GPU_RESULTS": str(options.output.resolve()),
        "FXSHAP_GPU_EVERY": "25" if options.quick else "1",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    }
    print(f"{part}: at most {limit:g} s", flush=True)
    begin = time.monotonic()
    with (options.output / f"{part}.log").open("w") as log:
        # A session of its own, so that the workers of pytest are ended too.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit + grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            results.add("note", text=f"{part} was ended after {limit + grace:g} s.")
            return False
    print(f"{part}: {time.monotonic() - begin:.0f} s, exit status {code}", flush=True)
    ended = code in ((0, 1) if part == "correctness" else (0,))  # 1: some tests failed
    if not ended:
        tail = (options.output / f"{part}.log").read_text().splitlines()[-3:]
        results.add("note", text=f"{part} ended with status {code}: {' '.join(tail)[:300]}")
    return ended


def pytest_command(options: argparse.Namespace) -> list[str]:
    """Return the command that runs the tests, in several processes where pytest-xdist is there."""
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.performance.gpu.pytest_log"]
    brief = ["-q", "--tb=short", "--show-capture=no", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", TESTS, *brief, *plugins]
    if options.workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(options.workers), "--maxschedchunk", "4"]
    return command


def run_part(options: argparse.Namespace) -> None:
    """Time the networks, or measure their memory, in this process."""
    from benchmarks.performance import rates
    from benchmarks.performance.gpu import memory

    warnings.simplefilter("ignore")
    small = {"samples": 4, "turn": 0.2, "rounds": 2, "large": False} if options.quick else {}
    settings = rates.Settings(torch.device(options.device), **small)
    results = Results(options.output)
    with rates.tf32(False):
        if options.part == "speed":
            networks = options.networks or list(rates.NETWORKS)
            rates.measure(settings, results, options.speed_seconds, networks)
        else:
            memory.measure(settings, results, options.memory_seconds)
    results.write_tables()


if __name__ == "__main__":
    sys.exit(main())
