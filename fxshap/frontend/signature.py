"""The signature of a model's ``forward``, of Python or of TorchScript."""

from __future__ import annotations

import inspect

import torch
from torch import nn


def signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a model's ``forward``.

    A module that ``torch.jit.trace`` made has no Python signature; it is read from the schema.
    """
    try:
        return inspect.signature(model.forward)
    except ValueError:
        if not isinstance(model.forward, torch.ScriptMethod):
            raise
    _, *arguments = model.forward.schema.arguments  # the first is `self`
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value
                if argument.has_default_value()
                else inspect.Parameter.empty,
            )
            for argument in arguments
        ]
    )
