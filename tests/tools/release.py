"""Install a wheel into a clean environment, and run the example of the README there.

``python -m tests.tools.release dist`` takes the wheel of the folder. It exits with 1 if the example
fails or prints something else than the README shows, or the command ``fxshap`` does not work.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Figures of rounding, which differ between machines.
ROUNDING = re.compile(r"\d\.\de[-+]\d\d")


def readme_example(text: str) -> tuple[str, str]:
    """Return the code of the first example of the README, and what it prints."""
    (code, shown), *_ = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    return code, shown


def without_rounding(text: str) -> str:
    """Return a text with a mark in place of each figure of rounding."""
    return ROUNDING.sub("#", text)


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel with its command line into a new environment; return its programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [str(programs / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    constraints = ROOT / "constraints.txt"
    subprocess.run([*pip, "-c", constraints, "torch"], check=True)
    subprocess.run([*pip, "-c", constraints, f"{wheel.resolve()}[cli]"], check=True)
    return programs


def main(arguments: list[str] | None = None) -> int:
    """Try the wheel; return 1 if the README's example prints something else."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.release", description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    (wheel,) = options.folder.glob("*.whl")
    code, shown = readme_example((ROOT / "README.md").read_text())
    with tempfile.TemporaryDirectory() as folder:
        programs = install(wheel, Path(folder) / "environment")
        run = [str(programs / "python"), "-c", code]
        printed = subprocess.run(run, cwd=folder, check=True, capture_output=True, text=True).stdout
        check = [str(programs / "fxshap"), "check", "torch.nn:GELU", "--shape", "4"]
        subprocess.run(check, cwd=folder, check=True)
    if without_rounding(printed) != without_rounding(shown):
        print(f"The README shows\n\n{shown}\nbut its example prints\n\n{printed}", file=sys.stderr)
        return 1
    print(f"{wheel.name}: the example of the README prints what it shows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
