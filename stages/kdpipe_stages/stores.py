"""`kdpipe inspect` and `kdpipe verify`: what a target store is, and whether its bytes are those committed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.errors import CorruptStoreError
from kdpipe.store import TargetStore
from kdpipe.store.manifest import COVERED


def inspect(path: Path | str) -> dict[str, Any]:
    """What a store is: rows, bytes, encoding, fingerprint, and a summary of what the teacher said (view 0)."""
    store = TargetStore.open(path)
    manifest, missing = store.manifest, store.missing()
    description = {
        "path": str(path),
        "fingerprint": store.fingerprint,
        "teacher": dict(manifest.teacher),
        "encodings": {name: dict(each) for name, each in manifest.encodings.items()},
        "temperatures": list(manifest.temperatures),
        "num_classes": manifest.num_classes,
        "num_rows": store.num_rows,
        "num_views": store.num_views,
        "shard_rows": manifest.shard_rows,
        "missing_shards": len(missing),
        "num_bytes": store.num_bytes,
        "num_bytes_with_ids_and_log": sum(store.file_size(name) or 0 for name in store.file_names()),
        "bytes_per_row": store.num_bytes / max(1, store.num_answers),
        "recorded": dict(manifest.recorded),
    }
    if not missing:
        rows = np.arange(store.num_rows)
        said = store.statistics(rows)
        if manifest.coverage:
            spoken = store.read_arrays(rows, 0, [COVERED])[COVERED]
            description["covered"] = float(spoken.mean())
            said = {name: values[spoken] for name, values in said.items()}
        for name in ("confidence", "entropy") if len(said["entropy"]) else ():
            quantiles = np.quantile(said[name], [0.05, 0.5, 0.95])
            description[name] = {
                "mean": float(said[name].mean()),
                "p5": float(quantiles[0]),
                "median": float(quantiles[1]),
                "p95": float(quantiles[2]),
            }
    return description


def verify(path: Path | str) -> Sequence[str]:
    """Read every byte of a store. Raises `CorruptStoreError` listing each bad shard; returns what was checked."""
    store = TargetStore.open(path)
    problems = store.verify()
    if problems:
        raise CorruptStoreError(
            f"{path}: {len(problems)} problem{'s'[: len(problems) != 1]}\n  "
            + "\n  ".join(map(str, problems))
            + "\nRun `kdpipe cache-teacher NAME --repair` to compute those again, or fetch the store again."
        )
    return [f"{store.num_rows} rows x {store.num_views} views, {store.num_bytes:,} bytes: every checksum matches"]
