"""Figures name their commits, and stale ones are reported."""

import subprocess
from pathlib import Path

import pytest

from tests.tools import pages, stamps

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one source, one commit and no pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stamps, "CORE", ("library",))
    monkeypatch.setattr(stamps, "MAKERS", {"speed": ("maker.py",)})
    stamps.digest_at.cache_clear()
    (tmp_path / "docs").mkdir()
    (tmp_path / "library").mkdir()
    (tmp_path / "maker.py").write_text("print(1)\n")
    run("init", "-q")
    yield tmp_path
    stamps.digest_at.cache_clear()


def run(*command):
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *names, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder, source):
    (folder / "library" / "rules.py").write_text(source)
    run("add", ".")
    run("commit", "-qm", "Change a rule")
    stamps.digest_at.cache_clear()
    return run("rev-parse", "--short", "HEAD")


def page(folder, text):
    (folder / "docs" / "speed.md").write_text(f"# Speed\n\n<!-- times -->\n{text}\n<!-- end -->\n")


def test_figures_are_stale_once_a_statement_of_their_sources_changes(repository, capsys):
    measured = commit(repository, "def f(x):\n    return x\n")
    page(repository, f"3 ms\n\nMeasured on commit {measured}.")
    assert stamps.main(["--strict"]) == 0
    commit(
        repository, "import math\n\n\ndef f(x):\n    '''Return x.'''\n    return x  # the same\n"
    )
    assert stamps.main(["--strict"]) == 0
    commit(repository, "def f(x):\n    return 2 * x\n")
    assert stamps.main([]) == 0
    assert (
        f"Warning: docs/speed.md, times: measured on commit {measured}; 2"
        in capsys.readouterr().err
    )
    assert stamps.main(["--strict"]) == 1


def test_figures_without_a_commit_or_of_an_unknown_one_are_stale(repository, capsys):
    commit(repository, "x = 1\n")
    page(repository, "3 ms")
    assert stamps.main(["--strict"]) == 1
    assert "does not name the commit" in capsys.readouterr().err
    page(repository, "3 ms, commit 0123abc.")
    assert stamps.main(["--strict"]) == 1
    assert "commit 0123abc is not in this repository" in capsys.readouterr().err


def test_a_section_that_is_written_gets_the_commit(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- times -->\n<!-- end -->\n")
    pages.replace_section(path, "times", "3 ms")
    assert pages.read_section(path, "times") == f"3 ms\n\n{pages.STAMP}\n"


@pytest.mark.parametrize("name", stamps.MAKERS)
def test_every_page_of_figures_names_its_commits(name):
    figures = stamps.figures_of(name, (ROOT / "docs" / f"{name}.md").read_text())
    assert all(section.commits for section in figures)


def test_every_page_with_figures_is_known():
    written = {
        path.stem for path in (ROOT / "docs").glob("*.md") if "<!-- end -->" in path.read_text()
    }
    assert written <= set(stamps.MAKERS)


def test_the_sources_of_every_page_exist():
    paths = [*stamps.CORE, *(path for makers in stamps.MAKERS.values() for path in makers)]
    assert all((ROOT / path).exists() for path in paths)
