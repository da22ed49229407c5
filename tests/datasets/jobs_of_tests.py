"""A model and its data, which the processes of the tests import."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

ROOT = Path(__file__).parents[2]
#: For processes that import the package, and the models of tests, from this checkout.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

ROWS = 569
REFUSED = [5, 300]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 16), nn.GELU(), nn.Linear(16, 3)).eval()


def unseeded() -> nn.Module:
    """A model that each worker builds with other weights."""
    torch.seed()
    return nn.Sequential(nn.Linear(30, 3), nn.GELU())


def table() -> pd.DataFrame:
    """Standardized measurements of tumours, two of them missing."""
    data = load_breast_cancer(as_frame=True).data
    data = ((data - data.mean()) / data.std()).astype("float32")
    data.iloc[REFUSED, 3] = np.nan
    return data.assign(patient=[f"p{i}" for i in range(len(data))])


def background() -> pd.DataFrame:
    return table().drop(columns="patient")[100:150]


def write_files(folder: Path) -> None:
    table().to_parquet(folder / "in.parquet", row_group_size=200)
    background().to_parquet(folder / "b.parquet")
