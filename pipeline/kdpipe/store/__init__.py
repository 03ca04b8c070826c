"""The target store: what one teacher said about one dataset, as Zarr v3 arrays `[view, row, …]` plus a commit log.

manifest.json              what made the targets: fingerprint, teacher, outputs, encoding, settings (written first)
extent.json                how many rows and views, and the digest of rows.parquet
classifier.safetensors     the teacher's last layer, where it was asked for
rows.parquet               sample_id and content digest of every row
zarr.json, <array>/zarr.json   Zarr v3 metadata: any Zarr reader opens the group
<array>/c.<view>.<shard>…  one file per shard
commits.parquet, .sha256   one record per (view, shard); a shard without a valid record does not exist
commits/<view>-<shard>.json    records not yet compacted (work in progress only)
remote.json                the url where the shards are (only in the description of a store in an object store)
"""

from kdpipe.store.dataset import WithTargets
from kdpipe.store.stream import TargetStream
from kdpipe.store.target_store import TargetStore, open_store

__all__ = ["TargetStore", "TargetStream", "WithTargets", "open_store"]
