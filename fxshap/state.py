"""The state of a model that its own calls change, and how it is restored.

Some models keep a hidden state, a counter or a cache from call to call. An explanation calls the
model several times. All of these calls begin with the state that the model has when the first
begins, and leave it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: An attribute of a module: the module, and the name.
Attribute = tuple[nn.Module, str]

#: The attributes of every module, which torch sets itself.
COMMON_ATTRIBUTES = frozenset(vars(nn.Module()))


@contextmanager
def restore_attributes(model: nn.Module) -> Iterator[set[Attribute]]:
    """Restore the attributes that ``forward`` assigns, and the contents of lists and dicts.

    The context is a set to which these attributes are added at the end.

    Export up to torch 2.10 leaves them changed, and later releases leave the lists of weights that
    recurrent layers keep (``_flat_weights``). Only what has changed is written, because other
    threads may read the attributes.
    """
    before = [
        (module, {k: (v, contents(v)) for k, v in own_attributes(module).items()})
        for module in model.modules()
    ]
    written: set[Attribute] = set()
    try:
        yield written
    finally:
        for module, known in before:
            attributes = vars(module)
            for name, (value, inside) in known.items():
                if attributes.get(name, attributes) is not value:
                    attributes[name] = value
                    written.add((module, name))
                if restore_contents(value, inside):
                    written.add((module, name))
            for name in attributes.keys() - known.keys() - COMMON_ATTRIBUTES:
                del attributes[name]
                written.add((module, name))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a module has in addition to those of every module."""
    return {name: value for name, value in vars(module).items() if name not in COMMON_ATTRIBUTES}


def contents(value: Any) -> list[Any]:
    """Return the elements of a list or the items of a dict; an empty list for other values."""
    if type(value) is dict:
        return list(value.items())
    return list(value) if type(value) is list else []


def restore_contents(value: Any, before: list[Any]) -> bool:
    """Restore the contents of a list or a dict; return True if they had changed."""
    now = contents(value)
    if len(now) == len(before) and all(same(a, b) for a, b in zip(now, before, strict=True)):
        return False
    value.clear()
    (value.update if type(value) is dict else value.extend)(before)
    return True


def same(a: Any, b: Any) -> bool:
    """Return True if two elements of a list, or two items of a dict, are the same objects."""
    pairs = type(a) is tuple and type(b) is tuple and len(a) == len(b)
    return all(x is y for x, y in zip(a, b, strict=True)) if pairs else a is b


@contextmanager
def restore_state(model: nn.Module) -> Iterator[set[Attribute]]:
    """Restore what a call of a model changes: attributes, buffers, and tensors written in place.

    The context is a set to which the changed attributes are added at the end.
    """
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    before = [(x, x._version, x.detach().clone()) for x in state_tensors(model)]
    try:
        with restore_attributes(model) as written:
            yield written
    finally:
        for present, known in buffers:
            for name, value in known.items():
                if present.get(name) is not value:
                    present[name] = value
        with torch.no_grad():
            for x, version, values in before:
                if x._version != version:
                    x.copy_(values)


def state_tensors(model: nn.Module) -> list[Tensor]:
    """Return the buffers of a model, and the tensors in attributes of its modules."""
    values: list[Any] = []
    for module in model.modules():
        values += module._buffers.values()
        for value in own_attributes(module).values():
            values += value if type(value) in (list, tuple) else [value]
    tensors = {id(x): x for x in values if isinstance(x, Tensor) and not x.is_inference()}
    return [x for x in tensors.values() if not isinstance(x, nn.Parameter)]
