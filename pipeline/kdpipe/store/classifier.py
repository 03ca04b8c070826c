"""classifier.safetensors: the teacher's last layer, for students that take it over. Shapes: C classes, D width."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from kdpipe.errors import ConfigError, CorruptStoreError
from kdpipe.fingerprint import digest_file
from kdpipe.store.shard_file import REPAIR

CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class TeacherClassifier:
    """`weight [C, D]` and `bias [C]` (None: there is none) of the layer that a teacher calls `submodule`."""

    submodule: str
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, submodule: str) -> TeacherClassifier:
        """A submodule of a model. Raises `ConfigError` for one that is no `nn.Linear`, naming those that are."""
        layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        if submodule not in layers:
            raise ConfigError(
                f"the teacher has no nn.Linear {submodule!r}; it has {', '.join(layers) or 'none'}. A "
                "classifier that students take over is one such layer"
            )
        weight, bias = layers[submodule].weight, layers[submodule].bias
        return cls(
            submodule=submodule,
            weight=weight.detach().float().cpu().clone(),
            bias=None if bias is None else bias.detach().float().cpu().clone(),
        )

    @property
    def width(self) -> int:
        """D."""
        return self.weight.shape[1]

    @cached_property
    def content(self) -> bytes:
        """Content of classifier.safetensors."""
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return bytes(safetensors.torch.save({name: each.contiguous() for name, each in tensors.items()}))

    def to_json(self) -> dict[str, Any]:
        """What manifest.json says about it, below `teacher`."""
        sha256 = hashlib.sha256(self.content).hexdigest()
        return {"submodule": self.submodule, "shape": list(self.weight.shape), "sha256": sha256}

    @classmethod
    def load(cls, folder: Path, about: Mapping[str, Any]) -> TeacherClassifier:
        """Read what `to_json` tells of. Raises `CorruptStoreError` where the file is absent or another one."""
        if not classifier_intact(folder, about):
            raise CorruptStoreError(
                f"{folder / CLASSIFIER} is absent or differs from its digest in manifest.json. {REPAIR}"
            )
        tensors = safetensors.torch.load((folder / CLASSIFIER).read_bytes())
        return cls(submodule=about["submodule"], weight=tensors["weight"], bias=tensors.get("bias"))


def classifier_intact(folder: Path, about: Mapping[str, Any] | None) -> bool:
    """Whether the file is the one that the manifest tells of; where it tells of none there is none to be."""
    path = folder / CLASSIFIER
    return about is None or (path.is_file() and digest_file(path) == about["sha256"])
