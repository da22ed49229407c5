"""Start the command line: ``python -m fxshap``, or ``fxshap`` after installation."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; without click, print what to install and return 2."""
    try:
        from fxshap.cli import cli
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("The command line needs click: pip install click", file=sys.stderr)
        return 2
    cli(prog_name="fxshap")  # click exits by itself
    return 0


if __name__ == "__main__":
    sys.exit(main())
