"""A student as an arm trains and uses it: the module, where its logits are, the loss terms with their projectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kdpipe.errors import ConfigError
from kdpipe.fingerprint import digest
from kdpipe.inputs import LOGITS, Head, Inputs, Outputs
from kdpipe.losses import LossTerm, make_projector, reuses_classifier
from kdpipe.models.reusing import PROJECTED, ReusesClassifier, check_reusable
from kdpipe.models.reusing import STUDENT as WITHIN
from kdpipe.terms import DistillTerm
from kdpipe_stages.lesson import STUDENT, Lesson
from kdpipe_stages.terms import Shape


@dataclass(frozen=True, kw_only=True)
class Pupil:
    """`terms` are those of distillation: none in a baseline."""

    model: nn.Module
    head: Head
    terms: Sequence[DistillTerm]


def pupil_of(lesson: Lesson, arm: str, model: nn.Module, inputs: Inputs, seed: int) -> Pupil:
    """A freshly built student as `arm` trains it; `inputs` is one row as the student takes it.

    Raises `ConfigError` where an output of the student does not exist or does not fit.
    """
    head = lesson.spec.head(lesson.task)
    if arm != STUDENT:
        return Pupil(model=model, head=head, terms=[])
    heard = shapes_heard(lesson.terms, model, head, inputs)
    terms = [_with_projector(lesson, index, heard, seed) for index in range(len(lesson.terms))]
    reusing = next((each for each in terms if reuses_classifier(each.term.loss)), None)
    if reusing is None:
        return Pupil(model=model, head=head, terms=terms)
    model = _reusing(lesson, terms.index(reusing), model, head, reusing.projector)
    return Pupil(
        model=model,
        head=Head(LOGITS, lesson.task.num_classes),
        terms=[_heard_within(each, is_reusing=each is reusing) for each in terms],
    )


def shapes_heard(terms: Sequence[LossTerm], student: nn.Module, head: Head, inputs: Inputs) -> dict[str, Shape]:
    """Shape per row of every `student_output` of the terms, the logits' by an empty name; `inputs` is one row.

    Empty where all terms are about the logits: the student need not be asked. Raises `ConfigError` with the outputs
    that there are.
    """
    named = {term.student_output: index for index, term in enumerate(terms) if term.student_output}
    if not named:
        return {}
    outputs = Outputs(student.eval(), named, head)
    with torch.no_grad():
        said = outputs.named(outputs(inputs))
    where = "student.losses.{}.student_output: the output {!r} of the student"
    shapes = {name: outputs.shape(name, said, where.format(index, name)) for name, index in named.items()}
    return {**shapes, "": tuple(said[LOGITS].shape[1:])}


def _with_projector(lesson: Lesson, index: int, heard: Mapping[str, Shape], seed: int) -> DistillTerm:
    term = lesson.terms[index]
    outputs = lesson.stores[term.teachers[0]].outputs
    shape = heard[term.student_output] if term.student_output else outputs[LOGITS].shape
    if term.student_output:
        lesson.check_heard(index, shape)
    if term.projector is None:
        return DistillTerm(term=term)
    own_seed = int(digest(["projector", seed, index])[:15], 16)
    return DistillTerm(term=term, projector=make_projector(term.projector, shape, outputs[term.output].shape, own_seed))


def _reusing(lesson: Lesson, index: int, model: nn.Module, head: Head, projector: nn.Module | None) -> nn.Module:
    """The student with the last layer of a term's teacher instead of its own."""
    term = lesson.terms[index]
    (teacher,) = term.teachers
    store = lesson.stores[teacher]
    classifier = store.classifier()
    assert classifier is not None  # the lesson has looked
    try:
        check_reusable(store.outputs[term.output].shape, tuple(classifier.weight.shape), lesson.task.num_classes)
    except ConfigError as error:
        raise ConfigError(f"student.losses.{index}: on {term.output} of {teacher}: {error}") from None
    return ReusesClassifier(model, head, term.student_output, projector, classifier.weight, classifier.bias)


def _heard_within(each: DistillTerm, *, is_reusing: bool) -> DistillTerm:
    """A term on the student that is within another module, which has the projector of the term that reuses."""
    if is_reusing:
        return DistillTerm(term=replace(each.term, student_output=PROJECTED))
    output = each.student_output and f"{WITHIN}.{each.student_output}"
    return replace(each, term=replace(each.term, student_output=output))
