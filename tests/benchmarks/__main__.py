"""`make bench`: every benchmark, printed as Markdown."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import read_store

read_store.main()
