"""Data as users hold it, converted to tensors: arrays, tables, lists, data sets and loaders."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxshap.errors import InputError
from fxshap.frontend.bound import Shared


def gather(data: Any, inputs: int | None = None) -> list[Any]:
    """Return one array per input of a model.

    Parameters
    ----------
    data : array, list of arrays, Dataset or DataLoader
    inputs : int, optional
        How many inputs the model has. What else a batch of a loader holds, such as targets, is left
        out. Without it the batches must hold inputs only.
    """
    if isinstance(data, torch.utils.data.Dataset):
        data = torch.utils.data.DataLoader(data, batch_size=256)
    if isinstance(data, torch.utils.data.DataLoader):
        batches = [b if isinstance(b, list | tuple) else [b] for b in data]
        if inputs is None and batches and len(batches[0]) > 1:
            raise InputError(
                f"the batches of the background hold {len(batches[0])} tensors, which may be "
                "inputs or targets; give the inputs as a list of tensors"
            )
        return [torch.cat(parts) for parts in zip(*batches, strict=True)][:inputs]
    return list(data) if isinstance(data, list | tuple) else [data]


def column_names(data: Any) -> list[str] | None:
    """Return the names of the columns of a DataFrame, if it is one."""
    return list(map(str, data.columns)) if hasattr(data, "columns") else None


def as_array(data: Any) -> npt.NDArray[Any]:
    """Return data as a NumPy array."""
    return data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)


def as_tensor(data: Any, like: Tensor | None, keep_integers: bool = False) -> Tensor:
    """Return data as a tensor of the dtype and the device of `like`.

    Parameters
    ----------
    data : Tensor, ndarray or DataFrame
    like : Tensor, optional
        A floating-point weight of the model, if it has one.
    keep_integers : bool
        Whether integers stay integers, as token ids must.
    """
    if not isinstance(data, Tensor):
        array = np.asarray(data)
        if array.dtype.kind not in "fiub":
            raise InputError(f"inputs must be numbers, not of dtype {array.dtype}")
        writeable = array if array.flags.writeable else array.copy()
        data = torch.from_numpy(np.ascontiguousarray(writeable))
    if like is None:
        return torch.as_tensor(data)
    integers = not (data.is_floating_point() or data.is_complex())
    dtype = data.dtype if integers and keep_integers else like.dtype
    return torch.as_tensor(data, device=like.device, dtype=dtype)


def convert_argument(value: Any, like: Tensor) -> Any:
    """Return an argument of the model as a tensor of the dtype and the device of an input."""
    if isinstance(value, Shared):
        return Shared(convert_argument(value.value, like))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    convert = value.is_floating_point() and like.is_floating_point()
    return value.to(like.device, like.dtype if convert else value.dtype)
