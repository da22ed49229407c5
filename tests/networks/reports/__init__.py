"""Models as people really write them: what was reported, and habits that many share.

One file a kind. ``REPORTS`` maps the name of every model to its :class:`Report`.
"""

from tests.networks.reports import (
    calling,
    checks,
    complex_numbers,
    decisions,
    derivatives,
    experts,
    fixed_rows,
    generic_rule,
    graphs,
    packing,
    published,
    sequences,
    squeezing,
)
from tests.networks.reports.report import Report

KINDS = (
    calling,
    checks,
    complex_numbers,
    decisions,
    derivatives,
    experts,
    fixed_rows,
    generic_rule,
    graphs,
    packing,
    published,
    sequences,
    squeezing,
)

REPORTS: dict[str, Report] = {report.name: report for kind in KINDS for report in kind.REPORTS}

__all__ = ["REPORTS", "Report"]
