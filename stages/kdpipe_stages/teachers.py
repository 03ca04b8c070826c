"""A `Teacher` from params.yaml: a module with trained or ready weights, or any other by its factory.

It is fitted here too, where it learns from rows (`fit_on`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.checkpoint import load_weights, num_parameters
from kdpipe.config import Bound, Factory
from kdpipe.data.columns import Columns
from kdpipe.data.prepared import PreparedInputs
from kdpipe.errors import ConfigError, StaleStoreError, StoreError, TeacherError, naming
from kdpipe.fingerprint import digest, digest_file, joined
from kdpipe.inputs import LOGITS, kind
from kdpipe.preprocess import Preprocess
from kdpipe.store import TargetStore
from kdpipe.store.classifier import TeacherClassifier
from kdpipe.store.remote import url_of
from kdpipe.tasks.base import Task, token_labels
from kdpipe.teachers.asking import OfCountedTokens
from kdpipe.teachers.base import Learner, Teacher, abstains
from kdpipe.teachers.torch import Form, TorchTeacher
from kdpipe_stages.building import WEIGHTS, ModelSpec, describe_model, fit_preprocess, teacher_fingerprint
from kdpipe_stages.params import TeacherSection, to_json
from kdpipe_stages.project import Project
from kdpipe_stages.terminal import say

_FIT_ROWS = 4096
_OF_A_TEACHER = ("outputs", "fingerprint", "predict")
_OF_A_LEARNER = ("fit", "save", "load")
_TOLD = ("num_classes", "class_names", "task", "precision")


def build_teacher(
    project: Project, name: str, inputs: PreparedInputs, above: Sequence[str] = ()
) -> tuple[Teacher, dict[str, object]]:
    """The teacher, ready to speak, and what its store says about it; `above` are the teachers that are made of it."""
    if section_with_model(project, name).teacher is not None:
        teacher, about = _by_factory(project, name, inputs, above)
    else:
        teacher, about = _module(project, name, inputs)
    return (teacher if above else of_what_counts(teacher, project.task())), about


def of_what_counts(teacher: Teacher, task: Task) -> Teacher:
    """The teacher, unheard about tokens that do not count."""
    labels = token_labels(task)
    return teacher if labels is None else OfCountedTokens(teacher, labels)


def section_with_model(project: Project, name: str) -> TeacherSection:
    """The section of a teacher that can be shown rows. Raises `ConfigError` where there is only a table."""
    section = project.teacher(name)
    if section.table is not None:
        raise ConfigError(f"teachers.{name}: what it said is in {section.table}; there is no model to show rows to")
    return section


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A teacher that has learnt, and its preprocess."""

    where: str
    teacher: Learner
    preprocess: Preprocess

    def save(self, folder: Path) -> None:
        """Write what the teacher learnt."""
        with _its_own_errors(f"{self.where}: save"):
            self.teacher.save(folder)


def fit_teacher(project: Project, name: str, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> Fitted:
    """Let a teacher by factory learn from prepared rows and their labels (both `[N]`)."""
    section, task, where = project.teacher(name), project.task(), f"teachers.{name}"
    inputs = project.prepared_inputs()
    preprocess = project.preprocess(section.preprocess, task, f"{where}.preprocess")
    fit_preprocess(preprocess, inputs, rows)
    made = bind_teacher(project, name, task, preprocess, _first_row(inputs), _parts(project, inputs, [name])).make()
    teacher = cast("Learner", checked_teacher(project, name, made))

    def blocks() -> Iterator[tuple[Columns, NDArray[np.int64]]]:
        for start in range(0, len(rows), _FIT_ROWS):
            part = slice(start, start + _FIT_ROWS)
            yield inputs.read(rows[part]), labels[part]

    with _its_own_errors(f"{where}: fit"):
        teacher.fit(blocks())
    return Fitted(where=where, teacher=teacher, preprocess=preprocess)


def bind_teacher(
    project: Project,
    name: str,
    task: Task,
    preprocess: Preprocess,
    probe: Columns | None,
    teacher_of: Callable[[str], Teacher],
) -> Bound:
    """The factory of a teacher with its arguments and what it may ask for."""
    section, targets = project.teacher(name), project.targets(name)
    assert section.teacher is not None
    offered: dict[str, Any] = {
        "root": project.root,
        "num_classes": task.num_classes,
        "class_names": task.class_names,
        "task": task,
        "preprocess": preprocess,
        "probe": probe,
        "outputs": targets.outputs,
        "precision": targets.precision,
        "k": targets.k,
        "teacher_of": teacher_of,
        "say": say,
    }
    runtime = section.runtime or {}
    factory = Factory(path=section.teacher.path, arguments={**section.teacher.arguments, **runtime})
    elsewhere = dict.fromkeys(runtime, f"teachers.{name}.runtime")
    return project.bind(factory, f"teachers.{name}.teacher", (), elsewhere, **offered)


def checked_teacher(project: Project, name: str, made: Any) -> Teacher:
    """What a factory made. Raises `ConfigError` where that is no teacher, or not as the other settings have it."""
    section, where = project.teacher(name), f"teachers.{name}"
    assert section.teacher is not None
    # `dir` runs no code: a fingerprint may not be known before a teacher has learnt.
    lacking = [each for each in _OF_A_TEACHER if each not in dir(made)]
    if lacking:
        raise ConfigError(
            f"{where}.teacher: {section.teacher.path} gave {type(made).__name__}, which is no Teacher (see "
            f"kdpipe.teachers.base.Teacher): it has no {' and no '.join(lacking)}"
        )
    if section.fit_on is not None and not all(each in dir(made) for each in _OF_A_LEARNER):
        raise ConfigError(f"{where}.fit_on: {section.teacher.path} has nothing to learn; leave fit_on out")
    with _its_own_errors(where):
        if section.fit_on is None and isinstance(made, Learner):
            dict(made.fingerprint)  # type: ignore[attr-defined]  # raises where it has not learnt anything
        given = [each.name for each in made.outputs]
    for output in project.targets(name).outputs:
        if output not in given:
            raise ConfigError(f"targets.{name}.outputs: {section.teacher.path} gives no {output!r}; it gives {given}")
    return cast("Teacher", made)


def parts_made_by(make: Callable[[str], Teacher], above: Sequence[str]) -> Callable[[str], Teacher]:
    """What makes a part, by its name, of the last teacher of `above`, each of which is made of the next.

    It raises `ConfigError` where that goes round in a circle.
    """

    def teacher_of(name: str) -> Teacher:
        if name in above:
            raise ConfigError(f"teachers.{name}: it is made of itself: {' of '.join([*above, name])}")
        return make(name)

    return teacher_of


def _by_factory(
    project: Project, name: str, inputs: PreparedInputs, above: Sequence[str]
) -> tuple[Teacher, dict[str, object]]:
    section, task, where = project.teacher(name), project.task(), f"teachers.{name}"
    assert section.teacher is not None
    preprocess = project.preprocess(section.preprocess, task, f"{where}.preprocess")
    learnt = None
    if section.fit_on is not None:
        note = _checked_note(project, name, project.teacher_model(name))
        preprocess.load_state(note["preprocess_state"])
        learnt = note["fingerprint"]
    parts = _parts(project, inputs, [*above, name])
    bound = bind_teacher(project, name, task, preprocess, _first_row(inputs), parts)
    teacher = checked_teacher(project, name, bound.make())
    with _its_own_errors(where):
        if section.fit_on is not None:
            cast("Learner", teacher).load(project.teacher_model(name))
        own = dict(teacher.fingerprint)
    spec = ModelSpec(where=where, model=section.teacher, preprocess=section.preprocess)
    told, sources = _told(project, name, bound)
    identity = {**spec.to_json(), "sources": joined(spec.sources(project), sources), "learnt": learnt, "told": told}
    about = {"name": name, **getattr(teacher, "description", {})}
    return Asked(where, teacher, project.targets(name).outputs, {**identity, "own": own}), about


def _told(project: Project, name: str, bound: Bound) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of other sections that a factory takes, and digests of the code of the task where it takes that.

    With another order of class names, or of a task's columns, it is another teacher, whatever it says of itself.
    """
    section, task = project.teacher(name), project.params.task
    assert section.teacher is not None
    own = {*section.teacher.arguments, *(section.runtime or {})}
    told = {key: bound.arguments[key] for key in _TOLD if key in bound.arguments and key not in own}
    if "task" not in told:
        return told, {}
    return {**told, "task": to_json(task)}, project.sources(task, "task")


def _parts(project: Project, inputs: PreparedInputs, above: Sequence[str]) -> Callable[[str], Teacher]:
    return parts_made_by(lambda name: build_teacher(project, name, inputs, above)[0], above)


class Asked:
    """A teacher by factory that gives what is asked of it; its fingerprint covers its factory, code and arguments.

    What goes wrong in its code is a `TeacherError` that names it.
    """

    def __init__(self, where: str, teacher: Teacher, outputs: Sequence[str], fingerprint: dict[str, Any]) -> None:
        self._where, self._teacher, self.fingerprint = where, teacher, fingerprint
        self.outputs = tuple(each for each in teacher.outputs if each.name in outputs)
        self.abstains = abstains(teacher)
        for optional in ("lengths", "num_kept"):
            if hasattr(teacher, optional):
                setattr(self, optional, getattr(teacher, optional))

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """What the teacher says."""
        with _its_own_errors(f"{self._where}: predict"):
            said: Any = self._teacher.predict(columns)
        answer: dict[str, Tensor] = said
        if not isinstance(said, Mapping) or not all(isinstance(each, Tensor) for each in said.values()):
            held = {} if not isinstance(said, Mapping) else {str(name): kind(each) for name, each in said.items()}
            raise TeacherError(
                f"{self._where}: predict gave {type(said).__name__}; expected a dict of tensors, {LOGITS} among them"
                + (f" (found {', '.join(map(': '.join, held.items()))})" if held else "")
            )
        return answer


def _its_own_errors(what: str) -> AbstractContextManager[None]:
    """Whatever a teacher's code raises, as one message."""
    return naming(TeacherError, f"{what} fails")


def _first_row(inputs: PreparedInputs) -> Columns:
    return inputs.read(np.zeros(1, np.int64))


def _module(project: Project, name: str, inputs: PreparedInputs) -> tuple[Teacher, dict[str, object]]:
    section, task = project.teacher(name), project.task()
    where = f"teachers.{name}"
    assert section.model is not None
    preprocess = project.preprocess(section.preprocess, task, f"{where}.preprocess")
    if section.weights is not None:
        weights = project.root / section.weights
    else:
        weights = project.teacher_model(name) / WEIGHTS
        preprocess.load_state(_checked_note(project, name, weights.parent)["preprocess_state"])
    spec = ModelSpec(where=where, model=section.model, preprocess=section.preprocess, logits=section.logits)
    model = spec.build(project, task, preprocess, inputs, seed=0)
    load_weights(model, weights)
    identity = {**spec.to_json(), "weights": digest_file(weights), "sources": spec.sources(project)}
    targets, probe = project.targets(name), _first_row(inputs)

    def known(fingerprint: Mapping[str, Any]) -> Form | None:
        return _form_in_store(project, name, inputs, fingerprint)

    try:
        teacher = TorchTeacher(
            model,
            preprocess,
            task.num_classes,
            identity,
            probe,
            targets.outputs,
            targets.precision,
            section.logits,
            known,
        )
    except ConfigError as error:
        raise ConfigError(f"targets.{name}.outputs: {error}") from None
    about = {"name": name, "parameters": num_parameters(model), "size_bytes": weights.stat().st_size}
    classifier = classifier_of(project, name, model)
    return teacher, about if classifier is None else {**about, "classifier": classifier}


def _form_in_store(project: Project, name: str, inputs: PreparedInputs, fingerprint: Mapping[str, Any]) -> Form | None:
    """What a teacher gave when the published store was made, which is not asked for again where nothing is to be done.

    None unless that was this very teacher, shown the row that it would be tried on.
    """
    task, path = project.task(), project.store(name)
    try:
        if token_labels(task) is not None or url_of(path) is not None:  # the store does not tell, or lies elsewhere
            return None
        store = TargetStore.open(path)
        is_same = digest(store.manifest.ingredients.get("teacher")) == digest(dict(fingerprint))
        knows_row = is_same and bool((store.digests == inputs.digests[0]).all(axis=1).any())
    except StoreError:
        return None
    form = Form(outputs=store.manifest.outputs, abstains=store.manifest.coverage)
    asked = {LOGITS, *project.targets(name).outputs}
    fits = {each.name for each in form.outputs} == asked and store.manifest.num_classes == task.num_classes
    return form if knows_row and fits else None


def classifier_of(project: Project, name: str, model: nn.Module) -> TeacherClassifier | None:
    """The last layer that a teacher's store is to keep, if any. Raises `ConfigError`."""
    submodule = project.targets(name).classifier
    try:
        return None if submodule is None else TeacherClassifier.of(model, submodule)
    except ConfigError as error:
        raise ConfigError(f"targets.{name}.classifier: {error}") from None


def _checked_note(project: Project, name: str, folder: Path) -> dict[str, Any]:
    """model.json of what was trained here, with today's settings, code and rows."""
    note = describe_model(folder, f"kdpipe train-teacher {name}")
    if note.get("fingerprint") != teacher_fingerprint(project, name):
        raise StaleStoreError(
            f"{folder} was trained with other settings, code or rows than today's. Run `kdpipe train-teacher {name}`."
        )
    return note
