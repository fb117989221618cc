"""`python -m hf_hybrid` is `hf-hybrid`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
