"""One case or more for every operation with a rule, one family a file.

:func:`fxshap.testing.rule_check.check` passes on each.
"""

import fxshap.rules  # noqa: F401, it fills the table
from tests.rules.cases.choices import CHOICES
from tests.rules.cases.complex_numbers import COMPLEX
from tests.rules.cases.generic import GENERIC
from tests.rules.cases.indices import INDICES
from tests.rules.cases.maxima import MAXIMA
from tests.rules.cases.multivariate import MULTIVARIATE
from tests.rules.cases.norms import NORMS
from tests.rules.cases.products import PRODUCTS
from tests.rules.cases.recurrent import RECURRENT
from tests.rules.cases.softmax import SOFTMAX
from tests.rules.cases.univariate import CURVES

ALL = [
    *CURVES, *PRODUCTS, *SOFTMAX, *MAXIMA, *NORMS, *INDICES, *GENERIC, *MULTIVARIATE, *RECURRENT,
    *CHOICES, *COMPLEX,
]  # fmt: skip
