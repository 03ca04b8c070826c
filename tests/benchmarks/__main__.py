"""`make bench`, or `python -m benchmarks NAME ...`: benchmarks by module name, printed as Markdown."""

import argparse
import importlib
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

NAMES = [
    "read_store",
    "write_store",
    "end_to_end",
    "open_and_memory",
    "encodings",
    "preparing",
    "views",
    "loss_cost",
    "offline_online",
    "gradient_log",
]
LONG = [
    "peers",
    "gains.digits",
    "gains.fashion_mnist",
    "gains.cifar10_views",
    "gains.cifar10_unseen",
    "gains.cifar10_augmented",
    "gains.teachers",
    "gains.features",
]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join([*NAMES, *LONG]))
    parser.add_argument("--folder", type=Path, help="where the data are written; removed afterwards")
    arguments = parser.parse_args()
    for name in arguments.names:
        print(f"## {name}\n", flush=True)
        importlib.import_module(f"benchmarks.{name}").main(folder=arguments.folder)
        print(flush=True)
