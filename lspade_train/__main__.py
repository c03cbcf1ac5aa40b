"""`python -m lspade_train`: the command line by its module, as torchrun wants it."""

import sys

from lspade_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
