"""Start the demo: ``python -m fxshap.demo``."""

import sys

from fxshap.demo.run import main

if __name__ == "__main__":
    sys.exit(main())
