"""The project's folder: a params.yaml, every path of the run, and the objects that its factories name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from kdpipe import durable
from kdpipe.config import Bound, Factory, bind, load_module, load_yaml, parse, resolve, save_yaml
from kdpipe.data.prepared import PreparedData, PreparedInputs
from kdpipe.errors import ConfigError, DataError, at
from kdpipe.fingerprint import canonical_json, digest_path, joined, source_digests
from kdpipe.preprocess import Preprocess
from kdpipe.preprocess.named import NamedPreprocess
from kdpipe.random_numbers import derived_seed
from kdpipe.tasks.base import Task
from kdpipe.views import CLEAN, MixingTransform, PartnerPlan, Transform, ViewSpec, is_transform
from kdpipe_stages.params import (
    Params,
    TargetsSection,
    TeacherSection,
    differing,
    first_difference,
    prepared_sections,
    views_identity,
    with_loss_arguments,
)
from kdpipe_stages.params_checks import check_finite, check_params


class Project:
    """A params.yaml and the folder it stands in: every path of the run, and the objects its factories name."""

    def __init__(self, params_file: Path) -> None:
        """Read and check params.yaml. Raises `ConfigError` naming each wrong key."""
        self.params_file = params_file.resolve()
        self.root = self.params_file.parent
        raw = load_yaml(self.params_file) or {}
        if not isinstance(raw, Mapping):
            raise ConfigError(
                f"{self.params_file.name} holds {json.dumps(raw, default=str)}; expected sections by name: data, …"
            )
        self.params = parse(Params, with_loss_arguments(raw), self.params_file.name)
        check_params(self.params)
        check_finite(raw)

    @property
    def prepared(self) -> Path:
        """data/prepared."""
        return self.root / "data" / "prepared"

    def split_file(self, split: str) -> Path:
        """data/prepared/splits/<split>.json: a digest of the split's rows and labels."""
        return self.prepared / "splits" / f"{split}.json"

    @property
    def prepared_settings(self) -> Path:
        """The settings that data/prepared was made with; beside the labels, as both change together."""
        return self.prepared / "labels" / "settings.json"

    @property
    def student_models(self) -> Path:
        """data/models/student/<arm>/seed-<n>."""
        return self.root / "data" / "models" / "student"

    @property
    def plots(self) -> Path:
        """data/plots."""
        return self.root / "data" / "plots"

    def teacher_model(self, name: str) -> Path:
        """data/models/teachers/<name>."""
        return self.root / "data" / "models" / "teachers" / name

    def store(self, name: str) -> Path:
        """data/targets/<name>."""
        return self.root / "data" / "targets" / name

    def work(self, fingerprint: str) -> Path:
        """data/.work/<fingerprint>: work in progress, and what earlier runs finished."""
        return self.root / "data" / ".work" / fingerprint

    def publish(self, parts: Mapping[str, Path], destination: Path) -> None:
        """Make an output folder hold exactly `parts`, in one rename."""
        staging = self.root / "data" / ".work" / "staging" / destination.relative_to(self.root / "data")
        durable.publish(parts, destination, staging)

    @property
    def timings(self) -> Path:
        """Seconds of the stages on this machine; they are no output, so that outputs stay deterministic."""
        return self.root / "data" / ".work" / "timings"

    def write_timings(self, stage: str, name: str, seconds: Mapping[str, Any]) -> None:
        """Note what a stage took for one teacher or one arm."""
        path = self.timings / stage / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, canonical_json(seconds) + "\n")

    def only_writer(self, name: str, doing: str) -> AbstractContextManager[None]:
        """The lock of one thing that is written."""
        return durable.only_writer(self.root / "data" / ".work" / "locks" / name, doing)

    def teacher(self, name: str) -> TeacherSection:
        """One teacher's section. Raises `ConfigError` with the names that exist."""
        if name not in self.params.teachers:
            raise ConfigError(f"there is no teacher {name!r}; params.yaml has {', '.join(self.params.teachers)}")
        return self.params.teachers[name]

    def teacher_names(self, name: str | None) -> list[str]:
        """The named teacher, or all of them."""
        if name is None:
            return list(self.params.teachers)
        self.teacher(name)
        return [name]

    def targets(self, name: str) -> TargetsSection:
        """What is stored of a teacher."""
        return self.params.targets.get(name, TargetsSection())

    def bind(
        self,
        factory: Factory,
        where: str,
        beside: Sequence[str] = (),
        elsewhere: Mapping[str, str] = MappingProxyType({}),
        /,
        **offered: Any,
    ) -> Bound:
        """Check a factory against its signature, without calling it."""
        return bind(factory, self.root, where, beside, elsewhere, **offered)

    def sources(self, factory: Factory, where: str) -> dict[str, str]:
        """Digests of the code that a factory reaches, and of what its `reads(arguments, root)` adds, if it has one."""
        module, target = load_module(factory.path, self.root, where), resolve(factory.path, self.root, where)
        reads = getattr(target, "reads", None)
        named_in_arguments = reads(factory.arguments, self.root) if reads else {}
        return joined(source_digests(target, module.__name__), named_in_arguments)

    def sources_and_files(self, factory: Factory, where: str) -> dict[str, str]:
        """`sources`, and digests of the files that arguments of code of one's own name."""
        named = _files_named(factory.path, factory.arguments, self.root)
        files = {each: digest_path(self.root / each) for each in named if not holds_data(self.root, each)}
        return joined(self.sources(factory, where), files)

    def task(self) -> Task:
        """The task."""
        task = self.bind(self.params.task, "task", root=self.root).make()
        if not isinstance(task, Task):
            raise ConfigError(f"task: {self.params.task.path} is no Task (kdpipe.tasks.base.Task says what one has)")
        return task

    def preprocess(self, factory: Factory | None, task: Task, where: str) -> Preprocess:
        """A model's own preprocess, or the task's default; its own errors name it."""
        if factory is None:
            return NamedPreprocess(f"{where}: the default of {self.params.task.path}", task.default_preprocess())
        preprocess = self.bind(factory, where, root=self.root, **getattr(task, "offers", {})).make()
        if not isinstance(preprocess, Preprocess):
            raise ConfigError(f"{where}: {factory.path} is no Preprocess (see kdpipe.preprocess.Preprocess)")
        return NamedPreprocess(f"{where}: {factory.path}", preprocess)

    def views(self) -> ViewSpec:
        """The augmented views that teacher and student see."""
        section = self.params.views
        transform = None if section.transform is None else self.transform(section.transform, "views.transform")
        return ViewSpec(count=section.count, seed=section.seed, transform=transform)

    def views_ingredient(self) -> dict[str, Any] | None:
        """What changes the augmented views, with digests of the code of their transform."""
        transform, views = self.params.views.transform, views_identity(self.params.views)
        if transform is None or views is None:
            return None
        return {**views, "sources": self.sources_and_files(transform, "views.transform")}

    def views_of_training(self, name: str) -> ViewSpec:
        """What a teacher that is trained here is shown: one view for each epoch, of a seed that no store has."""
        plan, where = self.teacher(name).train, f"teachers.{name}.train.transform"
        if plan is None or plan.transform is None:
            return CLEAN
        seed = derived_seed(plan.seed, "views of training")
        return ViewSpec(count=plan.epochs, seed=seed, transform=self.transform(plan.transform, where), where=where)

    def transform(self, factory: Factory, where: str) -> Transform | MixingTransform:
        """What `factory`, the key `where` of params.yaml, makes. Raises `ConfigError` where that is no transform."""
        bound = self.bind(factory, where, root=self.root, where=where)
        with at(where):
            made: Transform | MixingTransform = bound.make()
        if not is_transform(made):
            raise ConfigError(
                f"{where}: {factory.path} is no Transform: it must take (columns, keys, seed), see "
                "kdpipe.views.Transform"
            )
        return made

    def views_of(self, inputs: PreparedInputs) -> ViewSpec:
        """The augmented views of prepared rows, with the partners where the transform mixes them: of the same split.

        Rows without views have the split "".
        """
        views = self.views()
        if not (views.count and views.mixes):
            return views
        data = self.prepared_data()
        names = data.split_names if self.params.views.splits is None else self.params.views.splits
        splits = np.full(len(inputs), "", f"<U{max(map(len, names), default=1)}")
        for name in names:
            splits[data.rows_of([name])] = name
        return replace(views, partners=PartnerPlan(inputs.sample_ids, splits))

    def prepared_data(self) -> PreparedData:
        """The prepared rows. Raises `DataError` when they are absent or of other settings, naming the command."""
        data = PreparedData(self.prepared)
        self._check_prepared()
        return data

    def prepared_inputs(self) -> PreparedInputs:
        """The prepared rows without labels and splits. Raises as `prepared_data` does."""
        inputs = PreparedInputs(self.prepared / "inputs")
        self._check_prepared()
        return inputs

    def _check_prepared(self) -> None:
        then = json.loads(self.prepared_settings.read_text()) if self.prepared_settings.is_file() else {}
        today = self.prepared_with()
        code, code_then = today.pop("sources"), then.pop("sources", None)
        difference = first_difference(then, today)
        if not difference and code_then not in (None, code):
            difference = f"{', '.join(differing(code_then, code))} changed"
        if difference:
            raise DataError(f"{self.prepared} was made with other settings: {difference}. Run `kdpipe prepare-data`.")

    def prepared_with(self) -> dict[str, Any]:
        """What data/prepared is made with: settings, and digests of the code and files that the task reaches.

        Not the source's: who learns from prepared rows need not be able to import it.
        """
        code = self.sources(self.params.task, "task")
        own = {name: each for name, each in code.items() if name != "kdpipe"}  # a newer one keeps its word
        return {**prepared_sections(self.params), "sources": own}


def _files_named(path: str, arguments: Any, root: Path) -> Iterator[str]:
    """What arguments of the factory `path` name: files, and folders by a name that shows it.

    kdpipe's own factories tell of their files themselves; arguments of others may stand among theirs.
    """
    is_own = re.split(r"[.:]", path)[0] != "kdpipe"
    items = arguments.items() if isinstance(arguments, Mapping) else enumerate(arguments)
    for key, value in items:
        if isinstance(value, Mapping | list | tuple):
            inner = value.get("factory") if isinstance(value, Mapping) else None
            yield from _files_named(inner if isinstance(inner, str) else path, value, root)
        for each in (key, value):
            if not is_own or key == "factory" or not isinstance(each, str) or not exists(root / each):
                continue
            if (root / each).is_file() or key == "path" or "/" in each:
                yield each


def exists(path: Path) -> bool:
    """Whether there is a file or folder; not where a text is too long for a path, or it may not be looked at."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def holds_data(root: Path, name: str) -> bool:
    """Whether a folder below `root` holds what the stages make, or is it."""
    return (root / "data").resolve().is_relative_to((root / name).resolve())


def write_project(params: Mapping[str, Any], folder: Path, files: Iterable[Path] = ()) -> Project:
    """A project of these sections in a folder of its own, which is made where there is none, beside copies of `files`.

    For comparisons, which run the stages again and again with other settings. Raises `ConfigError` as `Project` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    save_yaml(dict(params), folder / "params.yaml")
    return Project(folder / "params.yaml")
