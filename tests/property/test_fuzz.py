"""Random networks explained by unmodified SHAP: 200 networks, the same in every run.

``make fuzz`` explains 10,000 networks with more steps and more data.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.property.conditioning import condition_number
from tests.property.exactness import check_exact
from tests.property.networks import Data, Network, Step
from tests.property.strategies import datasets, networks

CHUNKS, SIZE = 20, 10
SMOOTH, CLAMPED = ({"variant": 0, "how": how} for how in ("smoothly", "clamped"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_networks_are_explained_exactly(chunk: int) -> None:
    """Additive to 1e-9 in float64, with the plain output unchanged and every node in the report."""
    outcomes: list[str] = []

    @seed(chunk)
    @settings(
        max_examples=SIZE,
        phases=[Phase.generate],  # make fuzz also shrinks
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(small=True), datasets())
    def check(network: Network, data: Data) -> None:
        outcomes.extend(check_exact(network, [data], variances=network.seed % 4 == 0))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about operations of the networks
        check()
    assert len(outcomes) == SIZE
    assert outcomes.count("exact") >= SIZE / 2


# --- failures that it found -----------------------------------------------------------------------


def test_outputs_of_batch_norm_for_training_are_empty() -> None:
    """They were taken for the output where a network used both."""
    step = Step("op _native_batch_norm_legit_no_training", options=SMOOTH)
    assert check_exact(Network((step,)), [Data(rows=1)]) == ["exact"]


def test_the_fill_value_of_a_computed_mask_is_below_any_logit() -> None:
    """-1e30 replaced -inf, among logits of 1e150."""
    network = Network((Step("softmax, mask computed", layout="tokens"),), outputs=2, seed=3)
    data = Data("one feature", "random", rows=3, scale=1e150, seed=1)
    assert check_exact(network, [data]) == ["exact"]


def test_nested_gates_keep_their_digits_beside_huge_numbers() -> None:
    """The inner gate closed on a huge number, and the slope of the outer gate is 1 / 4."""
    steps = (
        Step("two: gate", of=(1, 3), layout="one_dimension", join="gating", mixed=True),
        Step("all", of=(2,), layout="time_folded", times=3, mixed=True),
    )
    network = Network(steps, ((1, 4, 5),), outputs=2, head="raw", seed=969)
    data = Data(reference="zeros", rows=1, scale=1e30, seed=505)
    assert check_exact(network, [data]) == ["exact"]


def test_attention_keeps_its_digits_if_all_tokens_are_equal() -> None:
    """All logits of a row changed together, by 1e12."""
    step = Step("decoder layer", of=(0, 0), times=2)
    network = Network((step,), ((3, 4),), seed=415)
    data = Data("one feature", "constant", rows=1, scale=1e6, seed=154)
    assert check_exact(network, [data]) == ["exact"]


def test_casts_to_integers_that_overflow_are_excused() -> None:
    """The cast of 1e30 to an integer is undefined in PyTorch."""
    network = Network((Step("truncated"),), head="raw")
    assert check_exact(network, [Data(scale=1e30), Data()]) == ["overflow", "exact"]


def test_remainders_without_digits_are_excused() -> None:
    """1e30 is a multiple of 8, as are all numbers near it: random errors changed nothing."""
    step = Step("op fmod.Tensor", options=CLAMPED)
    near, ordinary = Data("near", scale=1e30, rows=1), Data()
    assert check_exact(Network((step,), seed=100), [near, ordinary]) == ["overflow", "exact"]


def test_uninitialized_memory_is_no_overflow() -> None:
    """RReLU allocates some: a network overflowed in one run and not in the next."""
    network = Network((Step("op rrelu", options=SMOOTH),))
    samples, references = Data().draw(network.inputs)
    torch.use_deterministic_algorithms(True)  # which fills such memory with NaN
    try:
        _, overflow = condition_number(network.build(), samples, references)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not overflow


def test_logcumsumexp_of_huge_numbers_before_a_bounded_function() -> None:
    """The small part that mattered was lost among numbers of 1e30."""
    steps = (Step("cumulative logsumexp"), Step("two: atan2", of=(0, 1)))
    data = Data("one feature", "random", rows=2, scale=1e30, seed=500)
    assert check_exact(Network(steps, seed=128), [data]) == ["exact"]


def test_a_quotient_of_two_huge_numbers_that_both_become_small() -> None:
    """1e10 / 1.5 is a quotient that neither endpoint has."""
    steps = (
        Step("op grid_sampler 0 2 True", of=(1,), join="interleaved", mixed=True, options=CLAMPED),
        Step("op sinh", (2,), "image", "where positive", mixed=True, options=SMOOTH),
        Step("op max.other and a constant", options=SMOOTH),
        Step("two: floor_divide", of=(0, 0), layout="one_dimension", times=3),
    )
    network = Network(steps, ((5,), (2, 3, 2), (3, 4)), outputs=2, seed=197)
    data = Data("close", "zeros", rows=1, scale=1000.0, seed=103)
    assert check_exact(network, [data]) == ["exact"]


def test_a_product_of_four_factors_that_are_huge_at_different_endpoints() -> None:
    """Intermediate products of 1e114 cancelled where both endpoints had 1e86."""
    steps = (Step("gelu by tanh"), Step("prod", of=(0,)))
    data = Data("random", "constant", rows=3, scale=1e30, seed=998)
    assert check_exact(Network(steps, ((5,),), seed=999), [data]) == ["exact"]


def test_the_last_value_written_to_an_index_stays() -> None:
    """Scatter was rewritten as the sum of all values written to an index."""
    step = Step("op scatter.src", of=(1,), times=2, mixed=True, options=SMOOTH)
    network = Network((step,), ((1,), (2, 3, 2)), outputs=2, head="raw", seed=178)
    data = Data("zeros", "alike", rows=2, seed=169)
    assert check_exact(network, [data]) == ["exact"]


def test_attention_to_small_values_keeps_its_digits_beside_huge_values() -> None:
    """A weight was 1/3 where a value was 1e-3, and 0 where it was 1e14."""
    steps = (
        Step("op sqrt", mixed=True, options=SMOOTH),
        Step("cross attention", of=(1, 0), layout="time_folded", times=3),
    )
    network = Network(steps, outputs=1, head="raw", seed=727)
    data = Data("constant", "random", rows=3, scale=1e30, seed=120)
    assert check_exact(network, [data]) == ["exact"]
