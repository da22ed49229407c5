"""Cached values live as long as their tensors, and cached multipliers are not overwritten."""

import gc
import threading

import torch

from fxshap.rules.core import caching
from fxshap.rules.core.caching import (
    TensorCache,
    cached,
    cached_between,
    cached_values,
    caching_between,
    multiply_in_place,
    with_cached_values,
)
from fxshap.rules.core.operation import Operation

EXP, _ = Operation.bind(torch.ops.aten.exp.default, (torch.zeros(2),))


def entries(cache: TensorCache) -> int:
    """Count the tensors that have an entry."""
    gc.collect()
    assert cache._values.keys() == cache._references.keys()
    return len(cache._values)


def test_values_are_dropped_with_their_tensor():
    cache = TensorCache()
    tensor = torch.ones(2)
    cache.add(tensor)["double"] = tensor * 2
    assert entries(cache) == 1
    del tensor
    assert entries(cache) == 0


def test_a_tensor_that_only_autograd_holds_keeps_its_entry_until_the_graph_is_freed():
    cache = TensorCache()
    leaf = torch.ones(2, requires_grad=True)
    hidden = leaf.exp()
    cache.add(hidden)["key"] = 1
    out = hidden * hidden
    del hidden
    assert entries(cache) <= 1
    del out
    assert entries(cache) == 0


def test_no_tensor_receives_the_values_of_another_whose_id_it_has():
    cache = TensorCache()
    failures = []

    def work() -> None:
        for step in range(5000):
            tensor = torch.empty(1)
            if cache.get(tensor) is not None:
                failures.append(step)
            cache.add(tensor)["step"] = step
            if step % 3:
                cache.discard(tensor)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and entries(cache) == 0


def test_a_value_is_computed_once_for_a_tensor_and_again_for_its_alias():
    calls = []
    tensor = torch.ones(2)
    for value in (tensor, tensor, tensor.detach()):
        cached(value, "double", lambda v: calls.append(v) or v * 2)
    assert len(calls) == 2


def test_an_alias_can_be_given_cached_values():
    tensor = torch.ones(2)
    cached(tensor, "double", lambda v: v * 2)
    cached(tensor, "no tensor", lambda v: "text")
    values = cached_values(tensor)
    assert list(values) == ["double"]
    alias = with_cached_values(tensor, values)
    assert cached(alias, "double", lambda v: 1 / 0) is values["double"]


def test_multipliers_are_cached_only_in_their_context_and_not_overwritten():
    r, x, grad = torch.zeros(2), torch.ones(2), torch.full((2,), 3.0)
    before = [entries(cache) for cache in (caching._BETWEEN, caching._SHARED)]

    def multiplier() -> torch.Tensor:
        return cached_between(EXP, r, x, lambda: x - r)

    assert multiplier() is not multiplier()
    with caching_between([x]):
        slope = multiplier()
        assert multiplier() is slope
        assert multiply_in_place(slope, grad) is not slope
        assert torch.equal(slope, torch.ones(2))
    fresh = multiplier()
    assert multiply_in_place(fresh, grad) is fresh
    del slope
    assert [entries(cache) for cache in (caching._BETWEEN, caching._SHARED)] == before
