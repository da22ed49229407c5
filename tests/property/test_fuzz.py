"""Random networks through unmodified SHAP: 200 of them, the same in every run.

``make fuzz`` goes through 10,000, of more steps and on more data.
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
SMOOTHLY, CLAMPED = ({"variant": 0, "how": how} for how in ("smoothly", "clamped"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_networks_are_explained_exactly(chunk: int) -> None:
    """Additive to 1e-9 in float64, the plain forward untouched, every node in the report."""
    outcomes: list[str] = []

    @seed(chunk)
    @settings(
        max_examples=SIZE,
        phases=[Phase.generate],  # make fuzz shrinks
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(networks(small=True), datasets())
    def check(network: Network, data: Data) -> None:
        outcomes.extend(check_exact(network, [data], variances=network.seed % 4 == 0))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what the networks are made of
        check()
    assert len(outcomes) == SIZE
    assert outcomes.count("exact") >= SIZE / 2


# --- what it has found ----------------------------------------------------------------------------


def test_what_batch_norm_returns_for_training_is_empty() -> None:
    """It was taken for the output where a network used both."""
    step = Step("op _native_batch_norm_legit_no_training", options=SMOOTHLY)
    assert check_exact(Network((step,)), [Data(rows=1)]) == ["exact"]


def test_what_a_computed_mask_fills_in_lies_below_any_logit() -> None:
    """-1e30 stood for -inf, among logits of 1e150."""
    network = Network((Step("softmax, mask computed", layout="tokens"),), outputs=2, seed=3)
    data = Data("one feature", "random", rows=3, scale=1e150, seed=1)
    assert check_exact(network, [data]) == ["exact"]


def test_gates_behind_gates_hold_their_digits_beside_huge_numbers() -> None:
    """What the inner gate holds back was huge, and the slope of the outer one 1 / 4."""
    steps = (
        Step("two: gate", of=(1, 3), layout="one_dimension", join="gating", mixed=True),
        Step("all", of=(2,), layout="time_folded", times=3, mixed=True),
    )
    network = Network(steps, ((1, 4, 5),), outputs=2, head="raw", seed=969)
    data = Data(reference="zeros", rows=1, scale=1e30, seed=505)
    assert check_exact(network, [data]) == ["exact"]


def test_a_token_like_the_others_leaves_attention_its_digits() -> None:
    """All logits of a row moved together, by 1e12."""
    step = Step("decoder layer", of=(0, 0), times=2)
    network = Network((step,), ((3, 4),), seed=415)
    data = Data("one feature", "constant", rows=1, scale=1e6, seed=154)
    assert check_exact(network, [data]) == ["exact"]


def test_integers_that_no_type_holds_are_not_asked_for() -> None:
    """PyTorch leaves it undefined what 1e30 is as an integer."""
    network = Network((Step("truncated"),), head="raw")
    assert check_exact(network, [Data(scale=1e30), Data()]) == ["overflow", "exact"]


def test_remainders_of_numbers_whose_digits_end_before_them_are_not_asked_for() -> None:
    """1e30 is a multiple of 8, like all numbers near it: random errors changed nothing."""
    step = Step("op fmod.Tensor", options=CLAMPED)
    near, ordinary = Data("near", scale=1e30, rows=1), Data()
    assert check_exact(Network((step,), seed=100), [near, ordinary]) == ["overflow", "exact"]


def test_memory_that_nothing_is_written_to_yet_is_no_result() -> None:
    """RReLU takes some, and a network overflowed in one run and not in the next."""
    network = Network((Step("op rrelu", options=SMOOTHLY),))
    samples, references = Data().draw(network.inputs)
    torch.use_deterministic_algorithms(True)  # which fills such memory with NaN
    try:
        _, overflow = condition_number(network.build(), samples, references)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not overflow


def test_logcumsumexp_of_huge_numbers_before_something_bounded() -> None:
    """What little of it counted was lost among numbers of 1e30."""
    steps = (Step("cumulative logsumexp"), Step("two: atan2", of=(0, 1)))
    data = Data("one feature", "random", rows=2, scale=1e30, seed=500)
    assert check_exact(Network(steps, seed=128), [data]) == ["exact"]


def test_a_quotient_of_two_huge_numbers_that_both_shrink() -> None:
    """1e10 / 1.5 is what neither end has."""
    steps = (
        Step("op grid_sampler 0 2 True", of=(1,), join="interleaved", mixed=True, options=CLAMPED),
        Step("op sinh", (2,), "image", "where positive", mixed=True, options=SMOOTHLY),
        Step("op max.other and a constant", options=SMOOTHLY),
        Step("two: floor_divide", of=(0, 0), layout="one_dimension", times=3),
    )
    network = Network(steps, ((5,), (2, 3, 2), (3, 4)), outputs=2, seed=197)
    data = Data("close", "zeros", rows=1, scale=1000.0, seed=103)
    assert check_exact(network, [data]) == ["exact"]


def test_a_product_of_four_whose_factors_change_places() -> None:
    """Of factors of 1e30 at either end, products of 1e114 cancelled where both ends had 1e86."""
    steps = (Step("gelu by tanh"), Step("prod", of=(0,)))
    data = Data("random", "constant", rows=3, scale=1e30, seed=998)
    assert check_exact(Network(steps, ((5,),), seed=999), [data]) == ["exact"]


def test_the_last_of_what_is_written_to_one_place_stays() -> None:
    """Scatter was rewritten as a sum, of everything that goes to a place."""
    step = Step("op scatter.src", of=(1,), times=2, mixed=True, options=SMOOTHLY)
    network = Network((step,), ((1,), (2, 3, 2)), outputs=2, head="raw", seed=178)
    data = Data("zeros", "alike", rows=2, seed=169)
    assert check_exact(network, [data]) == ["exact"]


def test_attention_to_what_is_not_huge_keeps_its_digits_beside_what_is() -> None:
    """A weight was 1/3 where a value was 1e-3, and 0 where it was 1e14."""
    steps = (
        Step("op sqrt", mixed=True, options=SMOOTHLY),
        Step("cross attention", of=(1, 0), layout="time_folded", times=3),
    )
    network = Network(steps, outputs=1, head="raw", seed=727)
    data = Data("constant", "random", rows=3, scale=1e30, seed=120)
    assert check_exact(network, [data]) == ["exact"]
