"""`python -m pacemark`: the same as the command `pacemark`."""

import sys

from pacemark.command import main

if __name__ == "__main__":
    sys.exit(main())
