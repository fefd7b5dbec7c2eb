"""`python -m recap_cli` is `recap`."""

import sys

from recap_cli import parent
from recap_cli.cli import main

if __name__ == "__main__":
    parent.watch()
    sys.exit(main())
