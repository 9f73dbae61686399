"""``python -m edge_tokcomp``: the command, where scripts are not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
