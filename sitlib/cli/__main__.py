"""`python -m sitlib.cli`, for where the console script `sit` is not on the path."""

import sys

from sitlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
