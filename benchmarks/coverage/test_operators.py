"""The page of operators: what is written about one that is not explained."""

import pytest

from benchmarks.coverage.operators import remark
from tests.tools.operators import Verdict


@pytest.mark.parametrize(
    "message, text",
    [
        (
            "the rule 'generic' failed on aten.svd (svd_1, /any/tools/operators.py:120): no phase",
            "the rule 'generic' failed on aten.svd: no phase",
        ),
        ("no graph: at /a/operators.py:120 (`f(x)`), a size", "no graph: a size"),
        ("no size, at /a/operators.py:120 (`f(x)`), stay", "no size, stay"),
        ("a | b `c` " + "word " * 40, "a / b c " + "word " * 27 + "..."),
    ],
)
def test_a_remark_has_no_line_of_the_model_and_ends_with_a_word(message, text):
    assert remark(Verdict("svd", "float64", "refused", message=message)) == text


def test_a_remark_on_values_is_their_error():
    assert remark(Verdict("svd", "float64", "dummies", 1e-12, 0.05)) == "5e-02"
