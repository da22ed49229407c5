"""tangermeme: attributions of sequences."""

import warnings

import pytest
import tangermeme.deep_lift_shap as tangermeme
import torch
from tangermeme.ersatz import dinucleotide_shuffle, shuffle
from tangermeme.pisa import pisa

from tests.helpers import assert_same_state, state_of
from tests.integrations.cases import EXACT, ONE_HOT, OPTIONS

pytestmark = [
    pytest.mark.usefixtures("unchanged"),
    pytest.mark.filterwarnings(
        "ignore:Setting forward, backward hooks",
        "ignore:Setting backward hooks",
        "ignore:Input Tensor",
    ),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"references": shuffle},
        {"references": dinucleotide_shuffle, "batch_size": 4},
        {"target": 1, "args": (torch.linspace(0, 2, 18).reshape(3, 6).double(),)},
        {"hypothetical": True},
    ],
    ids=["default", "shuffled", "dinucleotides", "args", "hypothetical"],
)
def test_tangermeme(sequences, explained, options):
    before = state_of(sequences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns of convergence deltas that are too high
        found = tangermeme.deep_lift_shap(explained, ONE_HOT, **OPTIONS, **options)
        raw, references = tangermeme.deep_lift_shap(
            explained, ONE_HOT, raw_outputs=True, return_references=True, **OPTIONS, **options
        )
    assert_same_state(sequences, before)
    contributions = tangermeme.hypothetical_attributions(
        (raw.flatten(0, 1),), (ONE_HOT.repeat_interleave(3, 0),), (references.flatten(0, 1),)
    )[0].unflatten(0, (3, 3))
    expected = contributions.mean(1) * (1 if "hypothetical" in options else ONE_HOT)
    torch.testing.assert_close(found, expected)

    args, target = options.get("args", ()), options.get("target", 0)
    with torch.no_grad():
        f_x = sequences(ONE_HOT, *args)[:, None, target]
        repeated = [a.repeat_interleave(3, 0) for a in args]
        f_r = sequences(references.flatten(0, 1), *repeated)[:, target].unflatten(0, (3, 3))
    change = (raw * (ONE_HOT[:, None] - references)).sum((2, 3))
    torch.testing.assert_close(change, f_x - f_r, rtol=0, atol=EXACT)


def test_tangermeme_pisa(sequences, explained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        references = shuffle(ONE_HOT[:1], n=3, random_state=0)
        options = {**OPTIONS, "references": references}
        found = pisa(explained, ONE_HOT[:1], **options)
        one = tangermeme.deep_lift_shap(explained, ONE_HOT[:1], target=1, **options)
    assert found.shape == (1, 2, 4, 20)
    torch.testing.assert_close(found[:, 1], one)
