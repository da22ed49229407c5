"""A release that is too old is named at import, with the remedy, before its own error."""

import ast
import configparser
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fxshap
from fxshap import _requirements
from fxshap._requirements import (
    OLDEST,
    OLDEST_PYTHON,
    check_package,
    check_python,
    dotted,
    release_of,
)

ROOT = Path(fxshap.__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "release"),
    [("2.6.0", (2, 6)), ("2.11.0+cu130", (2, 11)), ("2.13.0a0+git12ab", (2, 13)), ("3.0", (3, 0))],
)
def test_the_release_is_the_first_two_numbers(text, release):
    assert release_of(text) == release


@pytest.mark.parametrize(
    ("name", "installed", "oldest"),
    [
        ("torch", "2.5.1", "2.6"),
        ("torch", "2.4.0+cu121", "2.6"),
        ("torch", "1.13.1", "2.6"),
        ("shap", "0.45.1", "0.46"),
        ("numpy", "1.25.2", "1.26"),
    ],
)
def test_a_package_that_is_too_old_is_named_with_the_remedy(name, installed, oldest):
    message = f"needs {name} {oldest} or newer, and {name} {installed} is installed; "
    with pytest.raises(ImportError, match=re.escape(f"{message}`pip install '{name}>={oldest}'`")):
        check_package(name, installed)


def test_a_python_that_is_too_old_is_named_with_the_remedy():
    with pytest.raises(ImportError, match=r"needs Python 3.10 or newer, and this is Python 3.9; "):
        check_python((3, 9))


@pytest.mark.parametrize("name", OLDEST)
def test_the_oldest_release_is_accepted(name):
    check_package(name, f"{dotted(OLDEST[name])}.0")
    check_python(OLDEST_PYTHON)


def test_the_oldest_releases_are_those_of_the_metadata():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    options = config["options"]
    assert options["python_requires"] == f">={dotted(OLDEST_PYTHON)}"
    required = dict(re.findall(r"(\w+)>=([\d.]+)", options["install_requires"]))
    assert required == {name: dotted(release) for name, release in OLDEST.items()}


OLD_PACKAGE = """
import sys
from importlib import metadata

class Fails:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise RuntimeError("its own error")

sys.meta_path.insert(0, Fails())
installed = metadata.version
metadata.version = lambda name: {version!r} if name == {name!r} else installed(name)
import fxshap
"""


@pytest.mark.parametrize(
    ("name", "version"), [("torch", "1.9.0"), ("shap", "0.41.0"), ("numpy", "1.21.0")]
)
def test_it_is_named_before_the_packages_own_error(name, version):
    code = OLD_PACKAGE.format(name=name, version=version)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "its own error" not in run.stderr
    *_, last = run.stderr.strip().splitlines()
    assert last.startswith(f"ImportError: fxshap needs {name} ") and version in last


def test_older_pythons_can_read_what_runs_first():
    for path in (fxshap.__file__, _requirements.__file__):
        ast.parse(Path(path).read_text(), feature_version=(3, 7))


def test_a_package_without_metadata_is_left_to_its_import(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    _requirements.check_installed()
