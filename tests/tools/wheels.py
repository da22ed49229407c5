"""Download what a machine with a CUDA GPU but without a network lacks, as wheels.

Such a machine has PyTorch, NumPy, SciPy, pandas, scikit-learn, Numba, Matplotlib, pytest with
pytest-xdist, hypothesis, mpmath and tabulate. ``python -m tests.tools.wheels .whl`` fetches the
rest here, in the versions of ``constraints.txt``. There,
``python3 -m pip install --no-index --no-deps --target DIR .whl/*.whl`` installs it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

#: Packages without their dependencies: SHAP, Captum, tangermeme, and what they import besides.
PACKAGES = ("shap", "captum", "tangermeme", "slicer", "memelite", "pyfaidx", "figwig")
PYTHON = "3.12"
PLATFORMS = ("2_28", "2_27", "2_17", "2014", "1")
#: The most bytes of all wheels together.
LIMIT = 40 * 2**20


def command(packages: tuple[str, ...], constraints: Path, folder: Path) -> list[str]:
    """Return the command line of pip that downloads wheels for Linux on x86-64."""
    platforms = [
        f"--platform=manylinux{'' if name in ('1', '2014') else '_'}{name}_x86_64"
        for name in PLATFORMS
    ]
    return [
        *(sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--implementation=cp"),
        *(f"--python-version={PYTHON}", f"--constraint={constraints}", f"--dest={folder}"),
        *platforms,
        *packages,
    ]


def main(arguments: list[str] | None = None) -> int:
    """Download the wheels into an empty folder; return 1 if they are too large."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob("*.whl"):
        old.unlink()
    subprocess.run(command(PACKAGES, options.constraints, options.folder), check=True)
    wheels = sorted(options.folder.glob("*.whl"))
    sizes = [wheel.stat().st_size for wheel in wheels]
    for wheel, size in zip(wheels, sizes, strict=True):
        print(f"{size / 2**20:6.2f} MiB  {wheel.name}")
    print(f"{sum(sizes) / 2**20:6.2f} MiB  in all")
    return int(sum(sizes) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
