"""`fit` with terms on outputs of the student's submodules, through projectors that are trained beside it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdpipe import training
from kdpipe.batches import Batch
from kdpipe.errors import ConfigError
from kdpipe.inputs import Head, Outputs
from kdpipe.losses import RKD, AttentionTransfer, CosineFeature, HintMSE, LossTerm, make_projector
from kdpipe.models.reusing import ReusesClassifier, check_reusable
from kdpipe.targets import FeatureTargets
from kdpipe.terms import DistillTerm
from kdpipe.training import TrainPlan, fit
from test_training import NO_CHECKPOINT, Interrupted, interrupted_at, weights_of
from toy_rows import NUM_CLASSES, NUM_FEATURES, RandomTeacher, distill_term, label_term, lesson, prepared, stream_of

NUM_ROWS, STUDENT_WIDTH, TEACHER_WIDTH = 36, 8, 6
PLAN = TrainPlan(steps=12, seed=5, optimizer="adamw", learning_rate=0.05, warmup_fraction=0.1, weight_decay=0.01)


class FeatureTeacher(RandomTeacher):
    """Random logits and features `[N, 6]` by row number."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        generator = torch.Generator().manual_seed(2)
        self.features = torch.randn(num_rows, TEACHER_WIDTH, generator=generator, dtype=torch.float64)

    def read(self, rows, view=0):
        return super().read(rows, view) | {"hidden": FeatureTargets(values=self.features[torch.from_numpy(rows)])}


class Student(nn.Module):
    """Its activation works in place, so that what the first layer gave is gone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(NUM_FEATURES, STUDENT_WIDTH), nn.ReLU(inplace=True)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(STUDENT_WIDTH, NUM_CLASSES)

    def forward(self, inputs):
        return self.last(self.dropout(self.act(self.first(inputs))))


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """`fit` ends with a garbage collection, which would look through all that was imported: 0.2 s each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("features"), NUM_ROWS)


def rows_of(data, dtype=np.float64):
    return replace(lesson(data, num_labelled=7, dtype=dtype), targets={"teacher": FeatureTeacher(NUM_ROWS)})


def student(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    return Student(dropout).to(dtype)


def hint(dtype=torch.float64, output="first", weight=0.7, loss=None, kind="linear"):
    """A term on features, with a projector of its own."""
    term = LossTerm(
        teacher="teacher", output="hidden", loss=loss or HintMSE(), weight=weight, student_output=output, projector=kind
    )
    return DistillTerm(term=term, projector=make_projector(kind, (STUDENT_WIDTH,), (TEACHER_WIDTH,), seed=3).to(dtype))


def terms_of(dtype=torch.float64):
    return [distill_term(0.5), hint(dtype), hint(dtype, "act", 0.3, CosineFeature(), "mlp"), label_term(0.1)]


def fitted(rows, plan, terms, model, checkpoint=NO_CHECKPOINT, batch_size=12):
    history = list(fit(model, stream_of(rows, batch_size), terms, plan, checkpoint).history)
    projectors = [term.projector for term in terms if term.projector is not None]
    return weights_of(nn.ModuleList([model, *projectors])), history


def test_fit_is_the_plain_loop(data):
    rows, model, terms = rows_of(data), student(), terms_of()
    linear, mlp = terms[1].projector, terms[2].projector
    expert = torch.optim.AdamW(
        [*model.parameters(), *linear.parameters(), *mlp.parameters()], lr=0.05, weight_decay=0.01
    )
    teacher = rows.targets["teacher"]
    losses = []
    for step, batch in enumerate(stream_of(rows, 12).from_step(0, PLAN.steps)):
        expert.param_groups[0]["lr"] = PLAN.learning_rate_at(step)
        first = model.first(batch.inputs)
        act = first.relu()
        logits = model.last(act)
        wanted = teacher.features[torch.from_numpy(batch.rows)]
        log_p = torch.log_softmax(teacher.targets.logits()[torch.from_numpy(batch.rows)] / 2, dim=-1)
        kl = (log_p.exp() * (log_p - torch.log_softmax(logits / 2, dim=-1))).sum(dim=-1).mean()
        loss = 0.5 * 4 * kl + 0.7 * ((linear(first) - wanted) ** 2).mean()
        loss = loss + 0.3 * (1 - nn.functional.cosine_similarity(mlp(act), wanted)).mean()
        known = batch.labels >= 0
        if known.any():
            loss = loss + 0.1 * nn.functional.cross_entropy(logits[known], batch.labels[known])
        expert.zero_grad()
        loss.backward()
        expert.step()
        losses.append(loss.item())
    expected = weights_of(nn.ModuleList([model, linear, mlp]))
    found, history = fitted(rows, PLAN, terms_of(), student())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert [each["loss"] for each in history] == pytest.approx(losses, rel=1e-6)
    assert {"teacher.HintMSE first to hidden", "teacher.CosineFeature act to hidden"} <= set(history[0])


@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_micro_batches_change_nothing(data, micro_batch_size):
    rows = rows_of(data)
    whole, _ = fitted(rows, replace(PLAN, optimizer="sgd", clip_norm=0.5), terms_of(), student())
    plan = replace(PLAN, optimizer="sgd", clip_norm=0.5, micro_batch_size=micro_batch_size)
    parts, _ = fitted(rows, plan, terms_of(), student())
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


def test_a_model_is_left_without_hooks_and_with_its_own_weights_alone(data):
    model = student()
    names = set(model.state_dict())
    fitted(rows_of(data), PLAN, terms_of(), model)
    assert set(model.state_dict()) == names
    assert not any(each._forward_hooks for each in model.modules())
    assert not model.training


def test_a_projector_is_trained_and_a_term_without_weight_changes_no_student(data):
    rows, term = rows_of(data), hint(weight=0.0)
    before = weights_of(term.projector).clone()
    plain, with_term = student(), student()
    fitted(rows, PLAN, [distill_term()], plain)
    fitted(rows, PLAN, [distill_term(), term], with_term)
    assert torch.equal(weights_of(plain), weights_of(with_term))
    other = hint()
    fitted(rows, PLAN, [distill_term(), other], student())
    assert (weights_of(other.projector) - before).abs().max() > 0.01


@pytest.mark.parametrize("stop_at", [1, 7])
def test_resumed_is_bitwise_uninterrupted(data, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(training, "LOGS_PER_FIT", 4)
    rows, plan = rows_of(data, np.float32), replace(PLAN, checkpoint_every_s=0.0)
    expected, history = fitted(rows, PLAN, terms_of(torch.float32), student(torch.float32, 0.4))
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(Interrupted):
        fit(
            student(torch.float32, 0.4),
            stream_of(rows, 12),
            terms_of(torch.float32),
            plan,
            checkpoint,
            interrupted_at(stop_at),
        )
    torch.manual_seed(1234)
    found, found_history = fitted(rows, plan, terms_of(torch.float32), Student(0.4), checkpoint)
    assert torch.equal(found, expected)
    assert found_history == history


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_autocast_runs_submodules_and_projectors_narrow_and_losses_wide(data, precision, dtype):
    met = {"projector": set(), "loss": set()}

    class Spying(HintMSE):
        def __call__(self, features, targets):
            met["loss"].add(features.dtype)
            return super().__call__(features, targets)

    term = hint(torch.float32, loss=Spying())
    term.projector.register_forward_hook(lambda _, __, output: met["projector"].add(output.dtype))
    plan = replace(PLAN, precision=precision, steps=40)
    _, history = fitted(rows_of(data, np.float32), plan, [distill_term(), term], student(torch.float32))
    assert met == {"projector": {dtype}, "loss": {torch.float32}}
    name = next(name for name in history[0] if name.endswith("first to hidden"))
    assert history[-1][name] < 0.7 * history[0][name]


def test_an_output_that_does_not_exist_is_named_with_those_that_do(data):
    with pytest.raises(
        ConfigError, match=r"the output 'frist' of the student does not exist: .*logits.*first, act, dropout, last"
    ):
        fitted(rows_of(data), PLAN, [distill_term(), hint(output="frist")], student())


def test_a_relational_loss_on_a_part_of_what_forward_returns(data):
    class Speaking(Student):
        def forward(self, inputs):
            hidden = self.act(self.first(inputs))
            return {"logits": self.last(hidden), "hidden": hidden}

    term = DistillTerm(
        term=LossTerm(teacher="teacher", output="hidden", loss=RKD(), weight=0.1, student_output="hidden")
    )
    torch.manual_seed(0)
    model = Speaking().double()
    _, history = fitted(rows_of(data), replace(PLAN, steps=60), [distill_term(0.1), term], model, batch_size=36)
    name = "teacher.RKD hidden to hidden"
    assert history[-1][name] < 0.8 * history[0][name]


# Which rows and tokens count


@pytest.mark.parametrize("covers_tokens", [False, True])
def test_features_of_tokens_count_by_row_unless_the_teacher_says_by_token(covers_tokens):
    covered = torch.tensor([[True, False, True], [True, True, True]]) if covers_tokens else None
    targets = FeatureTargets(values=torch.randn(2, 3, 4), covered=covered)
    labels = torch.tensor([[1, -1, 2], [0, 1, 2]])
    batch = Batch(rows=np.arange(2), inputs=torch.zeros(2, 3), labels=labels, targets={"teacher": {"hidden": targets}})
    for loss in (HintMSE(), CosineFeature(), *([] if covers_tokens else [AttentionTransfer()])):
        term = DistillTerm(
            term=LossTerm(teacher="teacher", output="hidden", loss=loss, weight=1.0, student_output="hidden")
        )
        valid, values = term.valid(batch), term.values(torch.randn(2, 3, 4), batch)
        assert valid.shape == values.shape == ((2, 3) if covers_tokens else (2,))
        assert torch.equal(valid, covered) if covers_tokens else valid.all()


def test_a_student_is_shown_all_tokens_where_features_are_heard():
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, input_ids, attention_mask):
            return self.head((self.table(input_ids) * attention_mask.unsqueeze(-1)).mean(dim=1))

    model = Embedding()
    inputs = {"input_ids": torch.ones(2, 6, dtype=torch.int64), "attention_mask": torch.eye(2, 6).bool()}
    for names, length in (([], 2), (["table"], 6)):
        lengths = []
        hook = model.table.register_forward_hook(lambda _, __, output, lengths=lengths: lengths.append(output.shape[1]))
        outputs = Outputs(model, names, Head())
        said = outputs.named(outputs(inputs))
        hook.remove()
        assert lengths == [length]
        assert ("table" in said) == bool(names)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_student_that_reuses_a_classifier_averages_maps_before_it(num_classes):
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 1), nn.Linear(4, num_classes)

        def forward(self, image, flag):
            return {"scores": self.head((self.conv(image) * flag.view(-1, 1, 1, 1)).mean(dim=(2, 3)))}

    student, projector = Maps(), nn.Conv2d(4, 6, 1)
    num_logits = 1 if num_classes == 2 else 3
    weight, bias = torch.randn(num_logits, 6), torch.randn(num_logits)
    model = ReusesClassifier(student, Head("scores", num_classes), "conv", projector, weight, bias)
    inputs = {"image": torch.randn(5, 1, 3, 2), "flag": torch.ones(5)}
    said = model(**inputs)
    projected = projector(student.conv(inputs["image"]))
    torch.testing.assert_close(said["projected"], projected)
    expected = projected.mean(dim=(2, 3)) @ weight.T + bias
    torch.testing.assert_close(said["logits"], expected)
    assert torch.equal(said["student"]["scores"], student(**inputs)["scores"])
    logits = Head("logits", num_classes)(said)
    assert logits.shape == (5, num_classes)
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize(
    ("features", "weight", "message"),
    [
        ((6,), (3, 6), None),
        ((7, 6), (3, 6), None),
        ((6, 4, 4), (3, 6), None),
        ((6,), (3, 5), r"takes 5 numbers, its features have shape \[6\]"),
        ((4, 4, 6), (3, 6), r"takes 6 numbers, its features have shape \[4, 4, 6\]"),
        ((6,), (4, 6), "gives 4 logits; expected 3"),
        ((6,), (1, 6), "gives 1 logits; expected 3"),
    ],
)
def test_a_classifier_takes_what_goes_into_it(features, weight, message):
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_reusable(features, weight, num_classes=3)
    check_reusable((6,), (1, 6), num_classes=2)


TWO_RANKS = """
import sys
from dataclasses import replace
from pathlib import Path

folder, tests = map(Path, sys.argv[1:])
sys.path.insert(0, str(tests))
from test_feature_training import *
from accelerate import PartialState
from kdpipe.data.prepared import PreparedData

found, _ = fitted(rows_of(PreparedData(folder / "data")), PLAN, terms_of(), student(), batch_size=6)
if PartialState().is_main_process:
    torch.save({"ranks": PartialState().num_processes, "found": found}, folder / "found")
torch.distributed.destroy_process_group()
"""


def test_two_ranks_train_the_student_and_the_projectors_of_one(tmp_path):
    from test_training import torchrun

    rows = rows_of(prepared(tmp_path / "data", NUM_ROWS))
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    torchrun(script, tmp_path, Path(__file__).parent)
    results = torch.load(tmp_path / "found", weights_only=True)
    assert results["ranks"] == 2
    expected, _ = fitted(rows, PLAN, terms_of(), student(), batch_size=6)
    torch.testing.assert_close(results["found"], expected, rtol=0, atol=1e-9)
