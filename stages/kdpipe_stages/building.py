"""From params.yaml to models: a module with its own preprocess, trained models on disk, stores that fit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdpipe import durable
from kdpipe.batches import BatchStream, Rows
from kdpipe.checkpoint import num_parameters, save_weights
from kdpipe.config import Factory
from kdpipe.data.columns import Columns
from kdpipe.data.prepared import MISSING_LABEL, PreparedInputs
from kdpipe.distributed import join_peers
from kdpipe.encodings import Features, FeaturesInt8, TargetEncoding
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import canonical_json, digest, digest_file, joined
from kdpipe.inputs import Head, Inputs
from kdpipe.losses import LabelLoss, class_weighted, logit_adjusted
from kdpipe.order import BatchOrder
from kdpipe.preprocess import Preprocess, offers
from kdpipe.targets import OutputSpec
from kdpipe.tasks.base import Task, TokenTask
from kdpipe.training import TrainPlan
from kdpipe_stages.params import FREE_OF_TRAINING, TargetsSection, TrainSection, logits_encoding
from kdpipe_stages.project import Project

WEIGHTS = "model.safetensors"
DESCRIPTION = "model.json"
_FIT_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A module by factory and its preprocess; `where` is its key in params.yaml.

    `logits` says which part of what it gives they are (see `Head`).
    """

    where: str
    model: Factory
    preprocess: Factory | None
    logits: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in params.yaml."""
        factories = {"model": self.model.to_json(), "preprocess": self.preprocess and self.preprocess.to_json()}
        return factories if self.logits is None else {**factories, "logits": self.logits}

    def head(self, task: Task) -> Head:
        """What takes the logits out of what the module gives."""
        return Head(self.logits, task.num_classes)

    def sources(self, project: Project) -> dict[str, str]:
        """Digests of the code that model and preprocess reach, of a teacher's of the files that their arguments name.

        A default preprocess is kdpipe's own. A student's files may be gone once it is trained.
        """
        digests_of = project.sources if self.where == "student" else project.sources_and_files
        model = digests_of(self.model, f"{self.where}.model")
        return joined(model, digests_of(self.preprocess, f"{self.where}.preprocess") if self.preprocess else {})

    def build(
        self, project: Project, task: Task, preprocess: Preprocess, inputs: PreparedInputs, seed: int
    ) -> nn.Module:
        """A freshly initialised module; its factory is offered what `model_offers` says."""
        where = f"{self.where}.model"
        offered = model_offers(preprocess, preprocess(inputs.read(np.zeros(1, np.int64))), task)
        check_vocabulary(self, offered)
        bound = project.bind(self.model, where, **offered)
        torch.manual_seed(seed)
        model = bound.make()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{where}: {self.model.path} gave {type(model).__name__}; expected a torch.nn.Module")
        return model


def model_offers(preprocess: Preprocess, inputs: Inputs, task: Task) -> dict[str, Any]:
    """What a model's factory may ask for: `num_classes`, `input_shape` of one tensor, what the preprocess offers."""
    shape = {"input_shape": tuple(inputs.shape[1:])} if isinstance(inputs, torch.Tensor) else {}
    return {"num_classes": task.num_classes, **shape, **offers(preprocess)}


def check_vocabulary(spec: ModelSpec, offered: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where params.yaml gives a model fewer tokens than its tokenizer has."""
    given, known = spec.model.arguments.get("vocab_size"), offered.get("vocab_size")
    if known is not None and isinstance(given, int) and given < known:
        raise ConfigError(
            f"{spec.where}.model.vocab_size is {given}, but its tokenizer has {known} tokens; leave it out, or give "
            f"{known} or more"
        )


def fit_preprocess(preprocess: Preprocess, inputs: PreparedInputs, rows: NDArray[np.int64]) -> None:
    """Fit a preprocess on the given rows, in blocks."""

    def blocks() -> Iterator[Columns]:
        for start in range(0, len(rows), _FIT_ROWS):
            yield inputs.read(rows[start : start + _FIT_ROWS])

    preprocess.fit(blocks())


def train_plan(section: TrainSection, steps: int, seed: int) -> TrainPlan:
    """A params.yaml `train` section as the library takes it."""
    taken = set(TrainPlan.__dataclass_fields__) & set(section.__dataclass_fields__) - {"seed"}
    return TrainPlan(steps=steps, seed=seed, **{name: getattr(section, name) for name in taken})


def label_loss(task: Task, section: TrainSection, labels: NDArray[np.int64], where: str) -> LabelLoss:
    """The task's loss on labels, with the class weights and the logit adjustment of a `train` section.

    `labels [N]` are those that the model learns from, -1 where there is none. Raises `ConfigError`.
    """
    loss: LabelLoss = task.label_loss
    weights = section.class_weights
    if weights == "balanced":
        counts = _class_counts(task, labels, f"{where}.class_weights")
        weights = tuple(float(each) for each in counts.sum() / (len(counts) * counts))
    if weights is not None:
        check_class_weights(task, section, where)
        loss = class_weighted(loss, torch.tensor(weights))
    if section.logit_adjustment is not None:
        counts = _class_counts(task, labels, f"{where}.logit_adjustment")
        loss = logit_adjusted(loss, torch.from_numpy(counts), section.logit_adjustment)
    return loss


def balance_of(task: Task, section: TrainSection, labels: NDArray[np.int64], where: str) -> NDArray[np.int64] | None:
    """What `BatchOrder.balance` is for a `train` section: the known labels `[N]` of the rows, -1: there is none."""
    if section.sampling is None:
        return None
    if isinstance(task, TokenTask):
        raise ConfigError(f"{where}.sampling: it is about rows of a class, but here every token has one; leave it out")
    return labels


def check_class_weights(task: Task, section: TrainSection, where: str) -> None:
    """Raise `ConfigError` unless weights that are given are one per class."""
    weights = section.class_weights
    if weights is not None and weights != "balanced" and len(weights) != task.num_classes:
        raise ConfigError(
            f"{where}.class_weights has {len(weights)} numbers, and the task {task.num_classes} classes; expected one "
            "per class, or balanced"
        )


def _class_counts(task: Task, labels: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    """Labelled rows of each class."""
    if isinstance(task, TokenTask):
        raise ConfigError(
            f"{where}: it counts labelled rows per class, but here every token has a label; leave it out, or give "
            "class_weights as a list in its place"
        )
    counts = np.bincount(labels[labels != MISSING_LABEL], minlength=task.num_classes)
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        shown = ", ".join(str(each) for each in absent[:5]) + (", …" if len(absent) > 5 else "")
        raise ConfigError(
            f"{where}: class {shown} has no labelled row to learn from, so its share is unknown; label one, "
            + ("or give a list of weights" if where.endswith("class_weights") else "or leave it out")
        )
    return counts


def stream_of(section: TrainSection, rows: Rows, order: BatchOrder) -> BatchStream:
    """Batches as a `train` section wants them held: in memory, on the device or read ahead."""
    device = join_peers().device if section.keep_on_device else None
    budget = section.ram_budget_mb * 2**20
    return BatchStream(rows, order, num_workers=section.num_workers, ram_budget_bytes=budget, device=device)


def encodings_of(section: TargetsSection, outputs: Iterable[OutputSpec]) -> dict[str, TargetEncoding]:
    """How each output is stored. Raises `ConfigError` for one that cannot be stored so."""
    compact = section.profile == "compact"
    result: dict[str, TargetEncoding] = {}
    for output in outputs:
        if output.kind == "logits":
            result[output.name] = logits_encoding(section)
        elif section.features == "int8":
            result[output.name] = FeaturesInt8(whole_row=len(output.shape) > 2, compact=compact)
        else:
            result[output.name] = Features(dtype=section.features, compact=compact)
        result[output.name].check(output)
    return result


def plan_json(section: TrainSection) -> dict[str, Any]:
    """A `train` section without what changes no number, and without newer keys that it does not have."""
    asked = {key: value for key, value in asdict(section).items() if key not in FREE_OF_TRAINING}
    return {key: value for key, value in asked.items() if value is not None or key not in _NEWER_KEYS}


_NEWER_KEYS = {"class_weights", "logit_adjustment", "sampling", "transform"}
"""Left out where they are null, as an earlier kdpipe took a section."""


def save_model(folder: Path, model: nn.Module, preprocess: Preprocess, description: Mapping[str, Any]) -> None:
    """Write weights, then model.json, whose presence says that the model is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / WEIGHTS)
    content = {
        "weights": WEIGHTS,
        "sha256": digest_file(folder / WEIGHTS),
        "size_bytes": (folder / WEIGHTS).stat().st_size,
        "parameters": num_parameters(model),
        "preprocess_state": dict(preprocess.state()),
        **description,
    }
    durable.write_text(folder / DESCRIPTION, canonical_json(content) + "\n")


def describe_model(folder: Path, command: str) -> dict[str, Any]:
    """Content of a trained model's model.json. Raises `ConfigError` naming the command that makes it."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ConfigError(f"there is no trained model in {folder}. Run `{command}`.")
    description: dict[str, Any] = json.loads(path.read_text())
    return description


def adopt_model(project: Project, published: Path, work: Path, fingerprint: str) -> None:
    """Take over a published model of the same fingerprint (pulled by DVC, say) where the work area does not know it."""
    path = published / DESCRIPTION
    if (work / DESCRIPTION).is_file() or not path.is_file():
        return
    if json.loads(path.read_text()).get("fingerprint") == fingerprint:
        work.parent.mkdir(parents=True, exist_ok=True)
        project.publish({"": published}, work)


def teacher_fingerprint(project: Project, name: str) -> str:
    """Whatever changes what a teacher learns: settings, code, and the rows and labels of its own split."""
    section = project.teacher(name)
    where, split = f"teachers.{name}", section.fit_on
    if section.train is not None:
        split = section.train.split
    assert split is not None
    factory = section.model or section.teacher
    assert factory is not None
    spec = ModelSpec(where=where, model=factory, preprocess=section.preprocess, logits=section.logits)
    sources = joined(spec.sources(project), project.sources(project.params.task, "task"))
    if section.train is not None and section.train.transform is not None:
        transform = section.train.transform
        sources = joined(sources, project.sources_and_files(transform, f"{where}.train.transform"))
    split_file = project.split_file(split)
    if not split_file.is_file():
        names = ", ".join(sorted(path.stem for path in split_file.parent.glob("*.json"))) or "none"
        key = "fit_on" if section.train is None else "train.split"
        raise ConfigError(
            f"{where}.{key}: there is no split {split!r}; prepared are {names}. Run `kdpipe prepare-data`, or name one "
            "of those."
        )
    rows = None
    if project.views_of_training(name).mixes:  # who is mixed with whom is told by their places
        rows = digest(project.prepared_data().rows_of([split]).tolist())
    return digest(
        {
            "kind": "teacher",
            "spec": spec.to_json(),
            "sources": sources,
            "train": plan_json(section.train) if section.train is not None else None,
            "task": project.params.task.to_json(),
            "split": split_file.read_text(),
            **({"rows": rows} if rows else {}),
        }
    )
