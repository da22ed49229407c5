"""The entry point of the explained inputs into the user's model, and the arguments bound to it.

The inputs enter as the first parameters of ``forward``, as parameters that are given by name, or in
the middle of the model, where they replace the tensors at a hook point. All other arguments of the
model are bound: they are the same for samples and references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshap.errors import InputError
from fxshap.frontend.bound import bound_name
from fxshap.frontend.hook_point import (
    HookPoint,
    floating_tensors,
    record_tensors,
    register_hook,
    single_call,
)
from fxshap.frontend.inputs import describe_shapes
from fxshap.frontend.naming import (
    InputPath,
    annotated_type,
    assign_inputs,
    free_parameters,
    packing_type,
    resolve_names,
    takes_any_number,
)
from fxshap.frontend.signature import signature

# --- where the inputs enter ---------------------------------------------------------------------


@dataclass(frozen=True)
class EntryPoint:
    """Where the inputs of an explainable model enter the user's model.

    Attributes
    ----------
    input_paths : tuple of InputPath or None
        The arguments of ``forward`` that the inputs are; ``None`` for the first ones.
    hook_point : HookPoint or None
        The hook point at which the inputs replace the model's own tensors.
    unbatched : bool
        Whether the model takes one sample, without a batch dimension.
    """

    input_paths: tuple[InputPath, ...] | None = None
    hook_point: HookPoint | None = None
    unbatched: bool = False

    def __call__(self, model: nn.Module, *inputs: Any, **bound: Any) -> Any:
        """Call the user's model with these inputs and bound arguments."""
        if self.hook_point is not None:
            with substitute_tensors(model, self.hook_point, inputs):
                return model(**bound)
        if self.unbatched:
            return call_for_rows(model, partial(self.call_model, model, **bound), inputs)
        return self.call_model(model, *inputs, **bound)

    def call_model(self, model: nn.Module, *inputs: Any, **bound: Any) -> Any:
        """Call the user's model with these inputs at their parameters."""
        args, kwargs = self.arguments(model, inputs, bound)
        return model(*args, **kwargs)

    def arguments(
        self, model: nn.Module, inputs: Sequence[Any], bound: Mapping[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments of the user's model.

        Raises
        ------
        InputError
            If there are more inputs than the model takes.
        """
        if self.input_paths is not None and not is_whole(self.input_paths, inputs):
            names = [describe_path(path) for path in self.input_paths]
            check_input_count(model, inputs, names, bound, "leave out the others")
            return (), assign_inputs(self.input_paths, inputs, bound)
        if takes_any_number(model):
            return inputs, dict(bound)
        free = free_parameters(model, bound)
        if pack := packing_type(model, free, inputs):
            return (), {free[0].name: pack(inputs), **bound}
        names = [parameter.name for parameter in free]
        check_input_count(model, inputs, names, bound, remedy_for_inputs(model))
        positional = [p for p in free if p.kind is not p.KEYWORD_ONLY]
        if not bound and len(inputs) <= len(positional):
            return inputs, {}
        if any(p.kind is p.POSITIONAL_ONLY for p in free):
            return inputs, dict(bound)
        return (), {**{p.name: x for p, x in zip(free, inputs, strict=False)}, **bound}


def is_whole(paths: Sequence[InputPath], inputs: Sequence[Any]) -> bool:
    """Return True if the input is the whole container whose entries the paths name."""
    return bool(paths and paths[0].keys) and len(inputs) == 1 and not isinstance(inputs[0], Tensor)


def call_for_rows(model: nn.Module, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """Call a function of one sample for every row, and stack its results.

    ``torch.vmap`` does it for any number of rows. It has no recurrent layers: a loop calls models
    with one, and their graph is for one number of rows.
    """
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        rows = [function(*row) for row in zip(*inputs, strict=True)]
        stacked = pytree.tree_map(lambda *values: torch.stack(values), *rows)
    else:
        stacked = torch.vmap(function, randomness="different")(*inputs)
    return pytree.tree_map(flatten_single, stacked)


def flatten_single(output: Any) -> Any:
    """Return outputs of shape (rows, 1, outputs) as (rows, outputs)."""
    single = isinstance(output, Tensor) and output.dim() == 3 and output.shape[1] == 1
    return output.squeeze(1) if single else output


def describe_path(path: InputPath) -> str:
    """Return the name of an input."""
    return ".".join(map(str, (path.parameter, *path.keys)))


def check_input_count(
    model: nn.Module,
    inputs: Sequence[Any],
    names: Sequence[str],
    bound: Mapping[str, Any],
    remedy: str,
) -> None:
    """Raise an InputError if there are more inputs than the model takes."""
    if len(inputs) <= len(names):
        return
    given = f"{len(inputs)} input{'s were' if len(inputs) > 1 else ' was'} given"
    paths, _ = pytree.tree_flatten_with_path(dict(bound))
    names_bound = ", ".join(bound_name(path) for path, _ in paths)
    besides = f"besides the bound {names_bound} " if bound else ""
    takes = f"takes only {', '.join(names)}" if names else "takes none by position"
    raise InputError(
        f"{given} ({describe_shapes(inputs)}), but {besides}{type(model).__name__}.forward "
        f"{takes}; {remedy}"
    )


def remedy_for_inputs(model: nn.Module) -> str:
    """Return what to do about inputs that a model does not take, for messages."""
    parameters = list(signature(model).parameters.values())
    keywords = any(p.kind is p.VAR_KEYWORD for p in parameters)
    containers = any(annotated_type(model, p) not in (None, Tensor) for p in parameters)
    if keywords or containers:
        return "name them with make_explainable(model, input_names=(...))"
    return "leave out the others, or explain a small nn.Module that takes them all"


def nest_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments by the names of parameters, with entries of containers in a container."""
    paths = resolve_names(model, tuple(arguments))
    return assign_inputs(paths, tuple(arguments.values()), {})


# --- inputs at a hook point ---------------------------------------------------------------------


@torch.no_grad()
def record_layer(model: nn.Module, hook_point: HookPoint, *args: Any, **kwargs: Any) -> Any:
    """Call the model, and return the tensor, or the tuple of tensors, at a hook point."""
    with record_tensors(model, hook_point) as calls:
        model(*args, **kwargs)
    tensors = single_call(hook_point, calls)
    return tensors[0] if len(tensors) == 1 else tensors


@contextmanager
def substitute_tensors(
    model: nn.Module, hook_point: HookPoint, tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Have the model use these tensors in place of its own at a hook point, which it calls once."""
    calls: list[tuple[Tensor, ...]] = []

    def replaced(values: Any) -> Any:
        own = floating_tensors(values)
        calls.append(tuple(own))
        check_same_shapes(hook_point, own, tensors)
        replacements = {id(x): tensor for x, tensor in zip(own, tensors, strict=True)}
        return pytree.tree_map(lambda leaf: replacements.get(id(leaf), leaf), values)

    def input_hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replaced((args, kwargs))

    def output_hook(module: nn.Module, args: Any, output: Any) -> Any:
        return replaced(output)

    with register_hook(model, hook_point, input_hook, output_hook):
        yield
    single_call(hook_point, calls)


def check_same_shapes(
    hook_point: HookPoint, own: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Raise an InputError unless the inputs have the shapes of the model's own tensors."""
    expected, given = ([tuple(x.shape) for x in tensors] for tensors in (own, inputs))
    if expected != given:
        raise InputError(
            f"with the bound arguments {hook_point} has the shapes {expected}, but the inputs that "
            f"replace it have the shapes {given}; bind the arguments that the prefix was called "
            "with"
        )
