"""``python -m selectkd`` is the command line."""

from __future__ import annotations

import sys

from selectkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
