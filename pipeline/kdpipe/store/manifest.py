"""What made a store's targets; written before the first shard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdpipe.encodings import ArraySpec, encoding_from_json
from kdpipe.errors import ConfigError, CorruptStoreError, StoreError
from kdpipe.fingerprint import canonical_json, digest
from kdpipe.store.folder import no_store
from kdpipe.store.layout import ArrayLayout
from kdpipe.store.shard_file import REPAIR
from kdpipe.targets import OutputSpec

FORMAT_VERSION = 2
_FREE = ("sections", "teacher", "recorded", "temperatures", "class_names")
STATISTICS = ("top1", "confidence", "entropy")
"""Last axis of the array `statistics`: the teacher's class, its probability, entropy in nats; all at T = 1."""
COVERED = "covered"
"""Name of the array that says about which rows (and tokens) the teacher spoke."""
_TAKEN = {"statistics", COVERED, *STATISTICS, "commits", "sample_id", "view", "temperatures", "kdpipe"}
_FILES = (".json", ".parquet", ".sha256", ".safetensors")


def check_output_names(names: Iterable[str]) -> None:
    """Refuse names of other things in a store, names of columns of exported tables, and what is no name."""
    for name in names:
        if name in _TAKEN or name.endswith(_FILES) or name.startswith(".") or not re.fullmatch(r"[\w.\- ]+", name):
            raise ConfigError(
                f"output {name!r} cannot be stored under this name: the store or its tables use it otherwise, or it is "
                "no name of a file. Give it another key in the dict that the teacher's forward returns"
            )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store is.

    `ingredients` is what `fingerprint` digests: whatever changes numbers. `sections` are the parts of params.yaml that
    the store was made from; `recorded` are versions that may only change last bits; `teacher` describes the model.
    `coverage`: the teacher may abstain (or tokens are masked), and the array `covered` says where it spoke.
    """

    ingredients: Mapping[str, Any]
    outputs: Sequence[OutputSpec]
    encodings: Mapping[str, Mapping[str, Any]]
    temperatures: Sequence[float]
    num_classes: int
    class_names: Sequence[str] | None
    shard_rows: int
    coverage: bool = False
    sections: Mapping[str, Any] = field(default_factory=dict)
    teacher: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Digest (64 hex digits) of whatever changes the targets."""
        return digest({**self.ingredients, "format_version": FORMAT_VERSION})

    @property
    def classifier(self) -> Mapping[str, Any] | None:
        """What classifier.safetensors is: `submodule`, `shape` and `sha256`; None where there is none."""
        return self.teacher.get("classifier")

    def identity(self) -> str:
        """Digest of all that the arrays depend on; what may change without new targets is left out."""
        return digest({key: value for key, value in self._value().items() if key not in _FREE})

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array of the store: those of each output's encoding, and the teacher's statistics."""
        specs = {
            output.name + suffix: spec
            for output in self.outputs
            for suffix, spec in encoding_from_json(self.encodings[output.name]).arrays(output).items()
        }
        (logits,) = [output for output in self.outputs if output.name == "logits"]
        specs["statistics"] = ArraySpec(dtype="float32", shape=(*logits.shape[:-1], len(STATISTICS)))
        return {**specs, COVERED: ArraySpec(dtype="bool", shape=logits.shape[:-1])} if self.coverage else specs

    def check_outputs(self) -> None:
        """Refuse outputs without numbers, names of other things in a store, and arrays of two outputs that collide."""
        check_output_names([output.name for output in self.outputs])
        names = [
            output.name + suffix
            for output in self.outputs
            for suffix in encoding_from_json(self.encodings[output.name]).arrays(output)
        ]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(
                f"outputs {', '.join(output.name for output in self.outputs)} would be stored in arrays of one name, "
                f"{doubled[0]!r}; give them other names (keys of the dict that the teacher's forward returns)"
            )
        for output in self.outputs:
            if 0 in output.shape or (output.kind == "features" and not output.shape):
                raise ConfigError(
                    f"output {output.name!r} has shape {list(output.shape)} per row; expected at least one number "
                    "along each axis, and one axis ([B, 1] for a single number)"
                )

    def layouts(self) -> dict[str, ArrayLayout]:
        """Where each array lies."""
        return {name: ArrayLayout.of(name, spec, self.shard_rows) for name, spec in self.arrays().items()}

    def to_text(self) -> str:
        """Content of manifest.json."""
        value = {**self._value(), "digest": digest(self._value())}
        return json.dumps(json.loads(canonical_json(value)), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def _value(self) -> dict[str, Any]:
        return {
            "format": "kdpipe-targets",
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "ingredients": self.ingredients,
            "outputs": [{"name": each.name, "shape": list(each.shape), "kind": each.kind} for each in self.outputs],
            "encodings": self.encodings,
            "temperatures": list(self.temperatures),
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "shard_rows": self.shard_rows,
            "coverage": self.coverage,
            "arrays": [layout.to_json() for layout in self.layouts().values()],
            "statistics": list(STATISTICS),
            "sections": self.sections,
            "teacher": self.teacher,
            "recorded": self.recorded,
        }

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read manifest.json. Raises `StoreNotFoundError`, `StoreError` (another format), `CorruptStoreError`."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise no_store(folder)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            version = value["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptStoreError(f"{path} is damaged: {error}. {REPAIR}") from None
        if version != FORMAT_VERSION:
            raise StoreError(f"{path} has format version {version}; this kdpipe reads version {FORMAT_VERSION}")
        stated = value.pop("digest", None)
        if stated != digest(value):
            raise CorruptStoreError(f"{path} differs from its own digest. {REPAIR}")
        return cls._from_value(path, value)

    @classmethod
    def _from_value(cls, path: Path, value: dict[str, Any]) -> Manifest:
        try:
            outputs = [OutputSpec(**{**each, "shape": tuple(each["shape"])}) for each in value["outputs"]]
            taken = ("ingredients", "encodings", "temperatures", "num_classes", "class_names", "shard_rows", "coverage")
            described = ("sections", "teacher", "recorded")
            manifest = cls(outputs=outputs, **{key: value[key] for key in (*taken, *described)})
            intact = manifest.to_text() == path.read_text(encoding="utf-8")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptStoreError(f"{path} is damaged: {error}. {REPAIR}") from None
        if not intact:
            raise CorruptStoreError(f"{path} was changed after it was written. {REPAIR}")
        return manifest
