"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from typing import Any

from fxshap.errors import MissingExtraError


def import_extra(module: str, requirement: str) -> Any:
    """Import a module of an optional package.

    Raises
    ------
    MissingExtraError
        If the package is not installed; the message has the requirement to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"this needs {package}, which is not installed: pip install '{requirement}'"
        ) from error
