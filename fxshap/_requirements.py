"""The oldest releases of Python and of the required packages that work.

Imported before all other modules, because an old release of PyTorch fails while it is imported,
with an error that does not say why. So this module imports none of these packages, and its syntax
is that of older releases of Python.
"""

from __future__ import annotations

import re
import sys

#: The oldest release of Python that works.
OLDEST_PYTHON = (3, 10)
#: The oldest release of every required package that works, as in ``setup.cfg``.
OLDEST = {"torch": (2, 6), "shap": (0, 46), "numpy": (1, 26)}


def release_of(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version.

    Examples
    --------
    >>> release_of("2.11.0+cu130")
    (2, 11)
    """
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def check_python(release: tuple[int, ...]) -> None:
    """Raise an ImportError if a release of Python is too old.

    Raises
    ------
    ImportError
        The message names the oldest release that works, and this one.
    """
    if release < OLDEST_PYTHON:
        raise ImportError(
            f"fxshap needs Python {dotted(OLDEST_PYTHON)} or newer, and this is Python "
            f"{dotted(release)}; make an environment with a newer Python and install fxshap there"
        )


def check_package(name: str, installed: str) -> None:
    """Raise an ImportError if a release of a required package is too old.

    Raises
    ------
    ImportError
        The message names the oldest release that works, this one, and the command that installs a
        newer one.
    """
    if release_of(installed) < OLDEST[name]:
        oldest = dotted(OLDEST[name])
        raise ImportError(
            f"fxshap needs {name} {oldest} or newer, and {name} {installed} is installed; "
            f"`pip install '{name}>={oldest}'`"
        )


def check_installed() -> None:
    """Check Python and every required package that is installed."""
    check_python(sys.version_info[:2])
    from importlib.metadata import PackageNotFoundError, version  # Python 3.7 lacks it

    for name in OLDEST:
        try:
            installed = version(name)
        except PackageNotFoundError:  # importing it fails, or it is not installed by its name
            continue
        check_package(name, installed)


def dotted(release: tuple[int, ...]) -> str:
    """Return a release as it is written."""
    return ".".join(map(str, release))


check_installed()
