"""What encoding and decoding cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.encodings.measures import TEMPERATURES, Arrays, layouts
from benchmarks.encodings.printing import table
from benchmarks.encodings.sizes import Sizes
from benchmarks.encodings.teachers import image_classes, next_words
from benchmarks.measuring import cpu_s, shown
from kdpipe.encodings import Dense, Int8, Sampled, TargetEncoding, TopK
from kdpipe.store.layout import CRC_BYTES
from kdpipe.store.shard_file import ShardFile, StoredFile, encode_shard
from kdpipe.targets import OutputSpec


def speed(sizes: Sizes, folder: Path) -> None:
    """CPU us per row: to encode and write the shards' bytes, and to read them (page cache warm) and decode."""
    few, vocabulary = sizes.vision_classes[0], sizes.vocabularies[0]
    images = torch.cat([said.logits for said in image_classes(sizes.speed_rows, few, 1.0, 12.0)])
    words = torch.cat([said.logits for said in next_words(sizes.speed_rows, vocabulary)])
    k = sizes.kept[0]
    cases: dict[str, tuple[TargetEncoding, Tensor]] = {}
    for compact in (False, True):
        end = ", compact" if compact else ""
        topk = TopK(k=k, values="int8", temperatures=TEMPERATURES, compact=compact)
        cases |= {
            f"dense, C = {few:,}{end}": (Dense(compact=compact), images),
            f"int8, C = {few:,}{end}": (Int8(compact=compact), images),
            f"topk, k = {k} of {vocabulary:,}{end}": (topk, words),
            f"sampled, n = 50 of {vocabulary:,}{end}": (Sampled(draws=50, compact=compact), words),
            f"sampled, head 12 + 8{end}": (Sampled(draws=8, head=12, compact=compact), words),
        }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    keys = np.random.default_rng(0).integers(0, 2**64, sizes.speed_rows, dtype=np.uint64)
    for number in range(-1, sizes.rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            cost = written_and_read(*cases[name], keys, folder)
            if number >= 0:  # the first round warms up
                found[name].append(cost)
    print(f"{sizes.speed_rows:,} rows, {sizes.rounds} interleaved rounds; CPU us/row: median (min-max)\n")
    header = ["encoding", "encode and write", "read and decode"]
    table(header, [[name, *(shown(costs) for costs in zip(*each, strict=True))] for name, each in found.items()])


def written_and_read(encoding: TargetEncoding, logits: Tensor, keys: np.ndarray, folder: Path) -> tuple[float, float]:
    """CPU us per row of each way; files are written between them."""
    num_rows, num_classes = logits.shape
    plan = layouts(encoding, num_classes, num_rows)
    began = cpu_s()
    arrays = encoding.encode(logits, keys)
    shards = {
        suffix: b"".join(
            piece.data for part in encode_shard(array[: plan[suffix].shard_rows], plan[suffix]) for piece in part
        )
        for suffix, array in arrays.items()
    }
    wrote = cpu_s() - began
    for suffix, content in shards.items():
        (folder / f"shard{suffix}").write_bytes(content)
    began = cpu_s()
    read: Arrays = {}
    for suffix, layout in plan.items():
        file = ShardFile(folder / f"shard{suffix}", layout, num_rows, StoredFile(len(shards[suffix]), sha256=""))
        read[suffix] = np.empty((num_rows, *layout.shape), layout.numpy_dtype)
        scratch = np.empty(layout.chunk_bytes + CRC_BYTES, np.uint8)
        for chunk in range(layout.num_chunks):
            rows = slice(chunk * layout.chunk_rows, (chunk + 1) * layout.chunk_rows)
            read[suffix][rows] = file.read_chunk(chunk, scratch)
    encoding.decode(read, OutputSpec(name="logits", shape=(num_classes,)))
    return wrote / num_rows * 1e6, (cpu_s() - began) / num_rows * 1e6
