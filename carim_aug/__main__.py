"""`python -m carim_aug`: the same as the command `carim-aug`."""

import sys

from carim_aug.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
