"""`python -m sparsekern` is the command `sparsekern`."""

import sys

from sparsekern.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
