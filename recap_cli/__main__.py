"""`python -m recap_cli` is `recap`."""

import sys

from recap_cli.cli import main
from recap_cli.process import die_with_parent

if __name__ == "__main__":
    die_with_parent.watch()
    sys.exit(main())
