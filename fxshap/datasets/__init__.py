"""Explain data sets that are larger than a machine, with the engine that holds them.

:class:`BatchExplainer` is a callable for any engine that maps functions over batches.
:func:`explain` and :func:`write_explanations` use Ray Data.
"""

from fxshap.datasets.batch import BatchExplainer
from fxshap.datasets.jobs import write_explanations
from fxshap.datasets.manifest import read_summary
from fxshap.datasets.ray import explain
from fxshap.datasets.summary import Summary

__all__ = ["BatchExplainer", "Summary", "explain", "read_summary", "write_explanations"]
