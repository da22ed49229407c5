"""Run the notebooks of the guides from the first cell to the last, as a reader does.

``python -m tests.tools.notebooks docs/guides/gallery`` runs every notebook in a process of its own.
It exits with 1 if a cell fails, if the first does not install what is missing, or if a text has
directives that a notebook does not render.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

#: Of reStructuredText: directives, and roles that lead to pages of the documentation.
UNRENDERED = re.compile(r"^\.\. \w+::|:(?:doc|ref|class|func|meth):`", re.MULTILINE)
INSTALL = re.compile(r"^( *)%pip install .*$", re.MULTILINE)


def cells_of(path: Path, kind: str) -> list[str]:
    """Return the texts of the cells of one kind, ``code`` or ``markdown``."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def faults(path: Path) -> list[str]:
    """Return what is wrong with a notebook before it runs."""
    found = []
    if not INSTALL.search((cells_of(path, "code") or [""])[0]):
        found.append(f"{path.name}: the first cell installs nothing")
    for text in cells_of(path, "markdown"):
        found += [f"{path.name}: not rendered: {match[0]}" for match in UNRENDERED.finditer(text)]
    return found


def run(path: Path) -> str:
    """Run the code of a notebook in a new process; return its error, or ''."""
    code = "\n\n".join(cells_of(path, "code"))
    script = INSTALL.sub(r"\1raise", code)  # what the first cell would install is there
    there = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": os.getcwd()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{path.stem}.py"
        file.write_text(script, encoding="utf-8")
        command = [sys.executable, "-W", "ignore", file]
        done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def main(arguments: list[str] | None = None) -> int:
    """Check and run the notebooks of a folder; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.notebooks", description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    paths = sorted(options.folder.glob("*.ipynb"))
    wrong = [fault for path in paths for fault in faults(path)]
    for path in paths:
        error = run(path)
        wrong += [f"{path.name} fails:\n{error}"] if error else []
        print(f"{path.name}: {'fails' if error else 'runs'}")
    print(*wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong) or not paths)


if __name__ == "__main__":
    sys.exit(main())
