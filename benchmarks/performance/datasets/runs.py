"""One job in a process of its own, and what is measured of it.

``python -m benchmarks.performance.datasets.runs FOLDER NETWORK ROWS WORKERS`` prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks.performance.workloads import cnn, mlp
from fxshap.datasets import write_explanations
from fxshap.datasets.writer import Record

REFERENCES = {"tabular": 20, "images": 10}
OUTPUTS = {"tabular": [0], "images": [0]}


@dataclass
class Run:
    """What is measured of one job.

    Attributes
    ----------
    network : str
    rows, workers : int
        0 workers are one process without Ray.
    seconds : float
        From the call to the summary.
    first_part : float
        Seconds until every worker has written a part.
    rate : float
        Samples per second after that.
    busy : float
        Seconds of a worker per sample, in its later parts.
    spread : float
        The standard deviation of the seconds of the later parts, over their mean.
    build : float
        Seconds to build the model and the explainer, the longest of all workers.
    driver_bytes, worker_bytes : int
        The most memory of the driver, and of a worker.
    bytes_in, bytes_out : float
        Bytes on disk per sample.
    largest_error : float
    """

    network: str
    rows: int
    workers: int
    seconds: float
    first_part: float
    rate: float
    busy: float
    spread: float
    build: float
    driver_bytes: int
    worker_bytes: int
    bytes_in: float
    bytes_out: float
    largest_error: float


def network(name: str) -> nn.Module:
    """Build a network, always with the same weights."""
    torch.manual_seed(0)
    return (mlp(3, 3) if name == "tabular" else cnn()).eval()


def write_data(folder: Path, name: str, rows: int) -> Path:
    """Write random samples: a table of features in Parquet, or images as an array of NumPy."""
    rng = np.random.default_rng(0)
    if name == "images":
        path = folder / f"images-{rows}.npy"
        if not path.exists():
            np.save(path, rng.normal(size=(rows, 3, 32, 32)).astype("float32"))
        return path
    path = folder / f"tabular-{rows}.parquet"
    if not path.exists():
        values = rng.normal(size=(rows, 30)).astype("float32")
        columns = {f"feature_{i:02d}": values[:, i] for i in range(30)}
        pq.write_table(pa.table({"id": np.arange(rows), **columns}), path, row_group_size=8192)
    return path


def background(name: str) -> Any:
    rng = np.random.default_rng(1)
    count = REFERENCES[name]
    if name == "images":
        return rng.normal(size=(count, 3, 32, 32)).astype("float32")
    return rng.normal(size=(count, 30)).astype("float32")


def run(folder: Path, name: str, rows: int, workers: int) -> Run:
    """Run a job, and return what is measured."""
    torch.set_num_threads(1)
    data = write_data(folder, name, rows)
    out = folder / f"out-{os.getpid()}{'.npy' if name == 'images' else ''}"
    if workers:
        start_ray(workers)
    parts: list[tuple[float, Record]] = []
    start = time.perf_counter()
    columns = None if name == "images" else [[f"feature_{i:02d}" for i in range(30)]]
    summary = write_explanations(
        data,
        out,
        network(name),
        background(name),
        concurrency=workers,
        outputs=OUTPUTS[name],
        inputs=columns,
        id_column=None if name == "images" else "id",
        progress=False,
        on_part=lambda record: parts.append((time.perf_counter() - start, record)),
    )
    seconds = time.perf_counter() - start
    out_bytes = size_of(out)
    shutil.rmtree(out)
    firsts = {record.worker: at for at, record in reversed(parts)}
    begun = max(firsts.values())
    later = [(at, record) for at, record in parts if at > begun]
    busy = [record.seconds / record.rows for at, record in parts if at != firsts[record.worker]]
    return Run(
        name,
        rows,
        workers,
        seconds,
        begun,
        sum(record.rows for _, record in later) / (later[-1][0] - begun),
        float(np.mean(busy)),
        float(np.std(busy) / np.mean(busy)),
        max(record.build_seconds for _, record in parts),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        max(record.peak_bytes for _, record in parts),
        size_of(data) / rows,
        out_bytes / rows,
        summary.largest_error,
    )


def start_ray(workers: int) -> None:
    import ray

    ray.init(
        num_cpus=max(workers, 2),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}},
    )


def size_of(path: Path) -> int:
    """Return the bytes of a file or a folder on disk."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def run_in_process(folder: Path, name: str, rows: int, workers: int) -> Run:
    """Run a job in a process of its own, so that its memory is that of the job."""
    return result_of(start_process(folder, name, rows, workers))


def rate_of_two_processes(folder: Path, name: str, rows: int) -> float:
    """Return the samples per second of two jobs at once, each one process without Ray."""
    processes = [start_process(folder, name, rows, 0) for _ in range(2)]
    return sum(result_of(process).rate for process in processes)


def start_process(folder: Path, name: str, rows: int, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", __name__, str(folder), name, str(rows), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result_of(process: subprocess.Popen[str]) -> Run:
    output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Run(**json.loads(output.splitlines()[-1]))


def task_seconds(count: int = 500) -> float:
    """Return the seconds that the driver takes for a part, from parts that do nothing."""
    import ray

    start_ray(2)
    data = ray.data.from_items([{"index": i} for i in range(count)], override_num_blocks=count)
    data = data.map_batches(
        Nothing, batch_size=1, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1
    )
    data.context.enable_progress_bars = False
    times = [time.perf_counter() for _ in data.iter_rows()]
    ray.shutdown()
    return (times[-1] - times[0]) / (count - 1)


class Nothing:
    def __call__(self, batch: Any) -> Any:
        return batch


if __name__ == "__main__":
    if sys.argv[1] == "tasks":
        print(json.dumps(task_seconds()))
    else:
        folder, name, rows, workers = sys.argv[1:]
        print(json.dumps(asdict(run(Path(folder), name, int(rows), int(workers)))))
