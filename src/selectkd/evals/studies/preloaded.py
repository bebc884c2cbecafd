"""What a run needs, imported once: the processes of a comparison start from here."""

from __future__ import annotations

import gc

from selectkd.training import run as run

gc.collect()
gc.freeze()  # a run's own collections leave the imports, and with them the memory that all runs share, alone
