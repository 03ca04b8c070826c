"""Makes the golden store of format version 2, which every later kdpipe must read: `python make_golden_store.py`.

It is made once per format version. What it says about a row is simple arithmetic, so that nothing but the format and
the encodings is in it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from kdpipe.encodings import Dense, Features, FeaturesInt8, Int8, Sampled, TopK
from kdpipe.store import TargetStore
from kdpipe.store.manifest import Manifest
from kdpipe.store.statistics import teacher_statistics
from kdpipe.targets import OutputSpec, Targets
from kdpipe.views import row_keys

GOLDEN = Path(__file__).parent / "golden" / "format_2"
NUM_ROWS, NUM_VIEWS, SHARD_ROWS = 12, 2, 8
NUM_CLASSES, MANY_CLASSES, NUM_TOKENS, WIDTH = 11, 300, 2, 6
SAID = {
    "logits": (Dense(dtype="float16"), OutputSpec(name="logits", shape=(NUM_CLASSES,))),
    "tokens": (Dense(dtype="float16", compact=True), OutputSpec(name="tokens", shape=(NUM_TOKENS, NUM_CLASSES))),
    "int8": (Int8(masked_classes=True), OutputSpec(name="int8", shape=(NUM_CLASSES,))),
    "topk": (TopK(k=3, temperatures=(1.0, 4.0)), OutputSpec(name="topk", shape=(NUM_CLASSES,))),
    "topk_compact": (
        TopK(k=5, values="int8", temperatures=(1.0, 2.0, 4.0), top_p=0.9, min_k=2, compact=True),
        OutputSpec(name="topk_compact", shape=(MANY_CLASSES,)),
    ),
    "sampled": (Sampled(draws=8, seed=7), OutputSpec(name="sampled", shape=(NUM_CLASSES,))),
    "sampled_compact": (
        Sampled(draws=6, head=3, seed=7, stratified=True, compact=True),
        OutputSpec(name="sampled_compact", shape=(MANY_CLASSES,)),
    ),
    "features": (Features(dtype="float16"), OutputSpec(name="features", shape=(WIDTH,), kind="features")),
    "features_int8": (
        FeaturesInt8(compact=True),
        OutputSpec(name="features_int8", shape=(WIDTH,), kind="features"),
    ),
}
MASKS = ("logits", "int8")
Said = Callable[[str, int], torch.Tensor]


def sample_ids() -> np.ndarray:
    """Ids with characters beyond ASCII."""
    return np.array([f"zeile-{row:02d}-ä" for row in range(NUM_ROWS)])


def digests() -> np.ndarray:
    """A digest per row, of its id here."""
    hashed = [hashlib.blake2b(each.encode(), digest_size=16).digest() for each in sample_ids().tolist()]
    return np.frombuffer(b"".join(hashed), np.uint8).reshape(NUM_ROWS, 16)


def covered(view: int) -> np.ndarray:
    """The teacher abstains from every seventh row of a view."""
    return (np.arange(NUM_ROWS) + view) % 7 != 3


def in_views() -> np.ndarray:
    """Augmented views are about the first 10 rows only."""
    return np.arange(NUM_ROWS) < 10


def said(name: str, view: int) -> torch.Tensor:
    """Eighths between -10 and 10; classes 2 and 5 of every fourth row are masked where masks are legal."""
    output = SAID[name][1]
    numbers = np.arange(NUM_ROWS * int(np.prod(output.shape))).reshape(NUM_ROWS, *output.shape)
    values = torch.from_numpy(((numbers * 37 + 11 * (numbers // 13) ** 2 + 29 * view) % 161 - 80) / 8)
    if name in MASKS:
        values[::4, [2, 5]] = -torch.inf
    return torch.where(torch.from_numpy(covered(view)).reshape(-1, *[1] * len(output.shape)), values, 0).float()


def make(folder: Path) -> TargetStore:
    """Write the store, through the library's own door."""
    encodings = {name: encoding.to_json() for name, (encoding, _) in SAID.items()}
    manifest = Manifest(
        ingredients={
            "teacher": {"model": {"factory": "golden.py:Teacher"}, "weights": "0" * 64},
            "encodings": encodings,
        },
        outputs=[output for _, output in SAID.values()],
        encodings=encodings,
        temperatures=[1.0, 4.0],
        num_classes=NUM_CLASSES,
        class_names=[f"class {each}" for each in range(NUM_CLASSES)],
        shard_rows=SHARD_ROWS,
        coverage=True,
        sections={"targets": {"encoding": "all of them"}},
        teacher={"name": "golden", "parameters": 0, "size_bytes": 0},
        recorded={"torch": "any"},
    )
    store = TargetStore.create(folder, manifest, sample_ids(), digests(), num_views=NUM_VIEWS)
    store.want_in_views(in_views())
    fill(store, said, covered)
    return TargetStore.open(folder)


def fill(store: TargetStore, said: Said, covered: Callable[[int], np.ndarray]) -> None:
    """Write every shard: `said(output, view)` and `covered(view)` are about all rows."""
    for view, shard in store.missing():
        rows = slice(shard.start, shard.stop)
        arrays = {"statistics": teacher_statistics(said("logits", view)[rows]), "covered": covered(view)[rows]}
        arrays["statistics"][~arrays["covered"]] = 0
        keys = row_keys(store.sample_ids[rows].tolist(), view)
        for name, encoding in store.encodings.items():
            encoded = encoding.encode(said(name, view)[rows], keys)
            arrays |= {name + suffix: values for suffix, values in encoded.items()}
        store.write(view, shard, arrays, batch_size=8)
    store.finish()


def tensors(targets: Mapping[str, Targets]) -> dict[str, torch.Tensor]:
    """`<output>.<field>` -> every tensor of targets by output."""
    return {
        f"{name}.{field.name}": value
        for name, each in targets.items()
        for field in fields(each)
        if isinstance(value := getattr(each, field.name), torch.Tensor)
    }


def decoded(store: TargetStore, view: int) -> dict[str, np.ndarray]:
    """`<output>.<field>` -> what kdpipe reads of a view's rows, and what the teacher said in short."""
    rows = np.flatnonzero(in_views()) if view else np.arange(NUM_ROWS)
    targets = store.read(rows, view)
    found = {name: value.numpy() for name, value in tensors(targets).items() if not name.endswith(".covered")}
    statistics = store.statistics(rows, view)
    return found | statistics | {"covered": targets["logits"].covered.numpy()}


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    made = make(GOLDEN / "store")
    np.savez_compressed(GOLDEN / "expected.npz", allow_pickle=False, **decoded(made, view=0))
