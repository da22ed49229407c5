"""Models as people really write them: what was reported, and habits that many share.

One file a kind. ``REPORTS`` maps the name of every model to its :class:`Report`.
"""

from tests.networks.reports import squeezing
from tests.networks.reports.report import Report

REPORTS: dict[str, Report] = {
    report.name: report for kind in (squeezing,) for report in kind.REPORTS
}

__all__ = ["REPORTS", "Report"]
