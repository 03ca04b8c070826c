from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdpipe import training
from kdpipe.errors import TrainingError
from kdpipe.losses import DKD, LossTerm, Schedule
from kdpipe.models.mlp import MLP
from kdpipe.terms import DistillTerm
from kdpipe.training import TrainPlan, fit
from toy_rows import NUM_CLASSES, NUM_FEATURES, distill_term, label_term, lesson, prepared, stream_of

NUM_ROWS = 36
PLAN = TrainPlan(steps=20, seed=5, optimizer="sgd", learning_rate=0.05, warmup_fraction=0.1, weight_decay=0.01)
NO_CHECKPOINT = Path("/no such folder/checkpoint")


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """`fit` ends with a garbage collection, which would look through all that was imported: 0.2 s each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("training"), NUM_ROWS)


@pytest.fixture(scope="module")
def rows(data):
    """Float64 rows with a teacher and 3 labels."""
    return lesson(data, num_labelled=3)


def small_model(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return MLP((NUM_FEATURES,), NUM_CLASSES, hidden=[8], dropout=dropout).to(dtype)


def both_terms():
    return [distill_term(0.9), label_term(0.1)]


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(rows, plan, terms=None, *, batch_size=12, checkpoint=NO_CHECKPOINT, dtype=torch.float64, **settings):
    """Weights, history and what was logged on the way."""
    model = settings.pop("model", None) or small_model(dtype, **settings)
    progress = []
    fitted = fit(model, stream_of(rows, batch_size), terms or both_terms(), plan, checkpoint, progress.append)
    return weights_of(model), list(fitted.history), progress


# Schedules


@given(
    steps=st.integers(1, 500),
    warmup_fraction=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
    rate=st.floats(1e-5, 10),
)
def test_learning_rate_rises_then_never_again(steps, warmup_fraction, schedule, rate):
    plan = TrainPlan(steps=steps, seed=0, schedule=schedule, learning_rate=rate, warmup_fraction=warmup_fraction)
    rates = [plan.learning_rate_at(step) for step in range(steps)]
    warmup = max(1, round(steps * warmup_fraction))
    assert all(0 < each <= rate * (1 + 1e-12) for each in rates)
    assert rates[:warmup] == pytest.approx([rate * (step + 1) / warmup for step in range(warmup)])
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(rates[warmup - 1 :]))
    assert schedule == "cosine" or set(rates[warmup:]) <= {rate}


def test_cosine_ends_at_zero():
    plan = TrainPlan(steps=110, seed=0, learning_rate=2.0, warmup_fraction=10 / 110)
    found = [plan.learning_rate_at(step) for step in (0, 4, 9, 10, 35, 60, 85, 110)]
    half = math.sqrt(0.5)
    assert found == pytest.approx([0.2, 1.0, 2.0, 2.0, 1 + half, 1.0, 1 - half, 0.0])


def test_the_schedule_is_what_trains(rows):
    _, history, _ = trained(rows, PLAN)
    assert [each["learning_rate"] for each in history] == [PLAN.learning_rate_at(step) for step in range(20)]


def scheduled_terms():
    """A distillation loss that comes, labels that go."""
    term = distill_term(0.9).term
    come, go = Schedule(kind="warmup", fraction=0.5), Schedule(kind="cosine", to=0.0)
    return [DistillTerm(term=replace(term, schedule=come)), replace(label_term(0.4), schedule=go)]


def test_weights_of_terms_follow_their_schedules(rows):
    _, history, _ = trained(rows, PLAN, scheduled_terms())
    come, go = ([each[f"{name} weight"] for each in history] for name in ("teacher.ForwardKL T=2", "label"))
    assert come == pytest.approx([0.9 * min(1, (step + 1) / 10) for step in range(20)])
    assert go == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 19)) for step in range(20)])
    for each in history:
        parts = each["teacher.ForwardKL T=2 weighted"], each["label weighted"]
        assert parts == pytest.approx(
            (each["teacher.ForwardKL T=2 weight"] * each["teacher.ForwardKL T=2"], each["label weight"] * each["label"])
        )
        assert each["loss"] == pytest.approx(sum(parts))


def test_a_schedule_is_what_trains(rows):
    """Weights are what the gradients are multiplied with: SGD's first two steps, against terms of those weights."""
    plan = replace(PLAN, steps=4, momentum=0.0, weight_decay=0.0)
    linear = Schedule(kind="linear", to=0.0)
    term = replace(distill_term(0.9).term, schedule=linear)
    found, _, _ = trained(rows, plan, [DistillTerm(term=term)])
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters())
    for step, batch in enumerate(stream_of(rows, 12).from_step(0, 4)):
        optimizer.param_groups[0]["lr"] = plan.learning_rate_at(step)
        optimizer.zero_grad()
        (0.9 * (1 - step / 3) * distill_term().values(model(batch.inputs), batch).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(found, weights_of(model), rtol=0, atol=1e-12)


# The loop against a loop written out


def optimizer_of(plan: TrainPlan, model: nn.Module) -> torch.optim.Optimizer:
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=plan.learning_rate, momentum=0.9, nesterov=True, weight_decay=plan.weight_decay
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fit_is_the_plain_loop(rows, optimizer):
    plan = replace(PLAN, optimizer=optimizer)
    model = small_model()
    expert = optimizer_of(plan, model)
    losses = []
    teacher = rows.targets["teacher"].targets.logits()
    for step, batch in enumerate(stream_of(rows, 12).from_step(0, plan.steps)):
        for group in expert.param_groups:
            group["lr"] = plan.learning_rate_at(step)
        logits = model(batch.inputs)
        p = torch.softmax(teacher[torch.from_numpy(batch.rows)] / 2, dim=-1)
        loss = 0.9 * 4 * (p * (p.log() - torch.log_softmax(logits / 2, dim=-1))).sum(dim=-1).mean()
        labelled = batch.labels >= 0
        if labelled.any():
            label_loss = nn.functional.cross_entropy(logits[labelled].float(), batch.labels[labelled])
            loss = loss + 0.1 * label_loss
        expert.zero_grad()
        loss.backward()
        expert.step()
        losses.append(loss.item())
    found, history, _ = trained(rows, plan)
    torch.testing.assert_close(found, weights_of(model), rtol=0, atol=1e-6)
    assert [each["loss"] for each in history] == pytest.approx(losses, rel=1e-6)


def test_fit_reduces_the_loss_and_leaves_the_model_ready(data):
    model = small_model(torch.float32, dropout=0.1)
    plan = TrainPlan(steps=150, seed=0, learning_rate=0.02)
    _, history, progress = trained(lesson(data, dtype=np.float32), plan, model=model)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert [each.step for each in progress] == list(range(1, 151))
    assert {each.steps for each in progress} == {150}
    assert all(each.rows_per_s > 0 for each in progress)


def test_the_log_holds_means_over_its_intervals(rows, monkeypatch):
    monkeypatch.setattr(training, "LOGS_PER_FIT", 6)
    _, history, progress = trained(rows, PLAN)
    assert [each["step"] for each in history] == [3, 6, 9, 12, 15, 18, 20]
    losses = [each.loss for each in progress]
    means = [sum(losses[start : start + 3]) / len(losses[start : start + 3]) for start in range(0, 20, 3)]
    assert [each["loss"] for each in history] == pytest.approx(means)
    kl = [each["teacher.ForwardKL T=2"] for each in history]
    assert kl == pytest.approx([4 * each["teacher.ForwardKL T=2 unscaled"] for each in history])
    assert [each["loss"] for each in history] == pytest.approx(
        [0.9 * each["teacher.ForwardKL T=2"] + 0.1 * each["label"] for each in history]
    )


def test_the_same_seed_trains_the_same_model(rows):
    first, history, _ = trained(rows, PLAN, dropout=0.5)
    torch.rand(3)
    again, history_again, _ = trained(rows, PLAN, model=small_model(dropout=0.5).eval())
    other, _, _ = trained(rows, replace(PLAN, seed=6), dropout=0.5)
    assert torch.equal(first, again)
    assert history == history_again
    assert not torch.equal(first, other)


class Drawing(MLP):
    """Remembers one random number per pass."""

    def __init__(self) -> None:
        super().__init__((NUM_FEATURES,), NUM_CLASSES, hidden=[8])
        self.drawn = []

    def forward(self, inputs):
        self.drawn.append(torch.rand(()).item())
        return super().forward(inputs)


def test_every_step_draws_anew_and_every_run_the_same(data):
    rows, first, second = lesson(data, dtype=np.float32), Drawing(), Drawing()
    trained(rows, replace(PLAN, micro_batch_size=6), model=first)
    trained(rows, replace(PLAN, micro_batch_size=6), model=second)
    assert len(set(first.drawn)) == 40
    assert first.drawn == second.drawn


# Means over the valid rows of the whole batch


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(36, 1), (36, 5), (17, 5), (36, 50)])
def test_micro_batches_change_nothing(rows, batch_size, micro_batch_size):
    terms = [distill_term(0.5), label_term(1.0)]
    plan = replace(PLAN, clip_norm=0.5)
    whole, history, _ = trained(rows, plan, terms, batch_size=batch_size)
    plan = replace(plan, micro_batch_size=micro_batch_size)
    parts, parts_history, _ = trained(rows, plan, terms, batch_size=batch_size)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    assert [each["label"] for each in parts_history] == pytest.approx([each["label"] for each in history], abs=1e-6)


def test_micro_batches_of_distillation_change_nothing_in_float64(rows):
    whole, _, _ = trained(rows, PLAN, [distill_term()], batch_size=36)
    parts, _, _ = trained(rows, replace(PLAN, micro_batch_size=5), [distill_term()], batch_size=36)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)


def test_a_loss_that_needs_labels_counts_labelled_rows_only(data):
    """DKD where most rows have no label, and some micro-batches none at all, is DKD on the labelled rows."""
    rows = lesson(data, num_labelled=5)
    term = DistillTerm(term=LossTerm(teacher="teacher", output="logits", loss=DKD(beta=2.0), weight=0.1))
    whole, history, _ = trained(rows, PLAN, [term], batch_size=36)
    parts, _, _ = trained(rows, replace(PLAN, micro_batch_size=5), [term], batch_size=36)
    labelled = replace(rows, rows=np.flatnonzero(rows.labels >= 0))
    deleted, deleted_history, _ = trained(labelled, PLAN, [term], batch_size=36)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(deleted, whole, rtol=0, atol=1e-12)
    assert [each["loss"] for each in history] == pytest.approx([each["loss"] for each in deleted_history], rel=1e-6)
    assert history[0]["teacher.DKD T=4"] == pytest.approx(16 * history[0]["teacher.DKD T=4 unscaled"])


def test_masking_labels_is_deleting_rows(rows):
    labelled = np.flatnonzero(rows.labels >= 0)
    assert len(labelled) == 3
    masked, _, _ = trained(rows, PLAN, [label_term()], batch_size=36)
    deleted, _, _ = trained(replace(rows, rows=labelled), PLAN, [label_term()], batch_size=36)
    torch.testing.assert_close(masked, deleted, rtol=0, atol=1e-6)
    assert (masked - weights_of(small_model())).abs().max() > 0.01


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_a_batch_without_labels_is_finite_and_teaches_nothing(data, micro_batch_size):
    rows = lesson(data, num_labelled=0)
    plan = replace(PLAN, weight_decay=0.0, micro_batch_size=micro_batch_size)
    weights, history, _ = trained(rows, plan, [label_term()])
    assert torch.equal(weights, weights_of(small_model()))
    assert [each["loss"] for each in history] == [0.0] * 20
    both, history, _ = trained(rows, plan, both_terms())
    alone, _, _ = trained(rows, plan, [distill_term(0.9)])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-13)
    assert all(math.isfinite(value) for each in history for value in each.values())


# Steps


@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
def test_clip_norm_bounds_the_step_and_keeps_its_direction(rows, clip_norm):
    plan = TrainPlan(
        steps=1, seed=0, optimizer="sgd", momentum=0.0, schedule="constant", learning_rate=1.0, warmup_fraction=0.0
    )
    start = weights_of(small_model())
    free = trained(rows, plan)[0] - start
    clipped = trained(rows, replace(plan, clip_norm=clip_norm))[0] - start
    assert 0.01 < free.norm() < 1e6
    assert clipped.norm().item() == pytest.approx(min(clip_norm, free.norm().item()), rel=1e-3)
    assert torch.cosine_similarity(clipped, free, dim=0) > 1 - 1e-9


def test_clip_norm_bounds_the_step_of_a_scaled_loss(data):
    rows, terms = lesson(data, dtype=np.float32), [distill_term(0.001)]
    plan = replace(PLAN, steps=1, momentum=0.0, warmup_fraction=0.0, weight_decay=0.0, learning_rate=1.0)
    for precision in ("float16", "bfloat16"):
        narrow = replace(plan, precision=precision)
        start = weights_of(small_model(torch.float32))
        free = trained(rows, narrow, terms, dtype=torch.float32)[0] - start
        clipped = trained(rows, replace(narrow, clip_norm=1e-3), terms, dtype=torch.float32)[0] - start
        assert free.norm() > 2e-3
        assert clipped.norm().item() == pytest.approx(1e-3, rel=0.01)


def test_a_diverging_training_stops_with_a_remedy(rows):
    with pytest.raises(TrainingError, match=r"loss is (inf|nan) at step \d+ \(teacher.ForwardKL T=2 .*learning_rate"):
        trained(rows, replace(PLAN, learning_rate=1e200))


def test_a_model_that_fails_is_named_with_what_it_was_given(rows):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(NUM_FEATURES + 1, 2))

        def forward(self, inputs):
            return inputs @ self.weight.double()

    with pytest.raises(
        TrainingError, match=rf"Fails fails on inputs of shape \[12, {NUM_FEATURES}\]: RuntimeError: mat1"
    ):
        trained(rows, PLAN, model=Fails())


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_autocast_runs_the_model_narrow_and_the_rest_wide(data, precision, dtype):
    met = {"model": set(), "loss": set()}

    class Spying(MLP):
        def forward(self, inputs):
            logits = super().forward(inputs)
            met["model"].add(logits.dtype)
            return logits

    class SpyingTerm(DistillTerm):
        def values(self, logits, batch):
            met["loss"].add(logits.dtype)
            return super().values(logits, batch)

    torch.manual_seed(0)
    model = Spying((NUM_FEATURES,), NUM_CLASSES, hidden=[8])
    plan = TrainPlan(steps=60, seed=0, learning_rate=0.02, precision=precision, clip_norm=1.0)
    terms = [SpyingTerm(term=distill_term().term), label_term()]
    weights, history, _ = trained(lesson(data, dtype=np.float32), plan, terms, model=model)
    assert met == {"model": {dtype}, "loss": {torch.float32}}
    assert weights.dtype == torch.float32
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_one_process_trains_in_several_precisions(data):
    rows = lesson(data, dtype=np.float32)
    results = {}
    for precision in ("float32", "bfloat16", "float16", "float32", "bfloat16"):
        model = small_model(torch.float32)
        weights = trained(rows, replace(PLAN, precision=precision), model=model)[0]
        assert torch.equal(results.setdefault(precision, weights), weights)
        assert model(torch.ones(1, NUM_FEATURES)).dtype == torch.float32
    assert not torch.equal(results["float32"], results["bfloat16"])
    torch.testing.assert_close(results["float32"], results["bfloat16"], rtol=0, atol=0.05)


def test_a_fitted_model_can_be_fitted_again(data):
    rows = lesson(data, dtype=np.float32)
    model = small_model(torch.float32)
    first, _, _ = trained(rows, PLAN, model=model)
    trained(rows, replace(PLAN, precision="bfloat16"), model=model)
    again, _, _ = trained(rows, PLAN, model=model)
    assert not torch.equal(first, again)
    assert "forward" not in vars(model)


# Interrupted and resumed


class Interrupted(Exception):
    pass


def interrupted_at(step: int):
    def stop(progress: training.Progress) -> None:
        if progress.step == step:
            raise Interrupted

    return stop


ADAMW = replace(PLAN, optimizer="adamw", micro_batch_size=5, clip_norm=1.0)


@pytest.mark.parametrize(
    ("plan", "stop_at"),
    [
        (PLAN, 1),
        (PLAN, 19),
        (ADAMW, 7),
        (ADAMW, 12),
        (replace(ADAMW, precision="bfloat16"), 7),
        (replace(PLAN, precision="float16"), 7),
    ],
)
def test_resumed_is_bitwise_uninterrupted(data, plan, stop_at, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOGS_PER_FIT", 4)
    rows = lesson(data, num_labelled=3, dtype=np.float32)
    settings = {"dtype": torch.float32, "dropout": 0.4}
    expected, history, _ = trained(rows, plan, **settings)

    checkpoint = tmp_path / "checkpoint"
    plan = replace(plan, checkpoint_every_s=0.0)
    model = small_model(**settings)
    with pytest.raises(Interrupted):
        fit(model, stream_of(rows, 12), both_terms(), plan, checkpoint, interrupted_at(stop_at))
    assert not torch.equal(weights_of(model), expected)

    torch.manual_seed(1234)
    resumed = MLP((NUM_FEATURES,), NUM_CLASSES, hidden=[8], dropout=0.4)
    fitted = fit(resumed, stream_of(rows, 12), both_terms(), plan, checkpoint)
    assert fitted.steps_done == 20 - stop_at
    assert torch.equal(weights_of(resumed), expected)
    assert list(fitted.history) == history


def test_a_model_whose_training_was_stopped_within_a_step_takes_no_gradient_of_it_along(data, tmp_path):
    rows = lesson(data, dtype=np.float32)
    plan = replace(PLAN, micro_batch_size=5)
    expected, _, _ = trained(rows, plan, dtype=torch.float32)
    plan = replace(plan, checkpoint_every_s=0.0)
    model = small_model(torch.float32)
    calls = itertools.count()

    def stop(*_):
        if next(calls) == 22:  # three micro-batches a step
            raise KeyboardInterrupt

    stopping = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, stream_of(rows, 12), both_terms(), plan, tmp_path / "checkpoint")
    assert any(parameter.grad is not None for parameter in model.parameters())
    stopping.remove()
    fit(model, stream_of(rows, 12), both_terms(), plan, tmp_path / "checkpoint")
    assert torch.equal(weights_of(model), expected)


def test_resumed_by_schedule_is_bitwise_uninterrupted(data, tmp_path):
    rows, plan = lesson(data, dtype=np.float32), replace(PLAN, checkpoint_every_s=0.0)
    expected, history, _ = trained(rows, PLAN, scheduled_terms(), dtype=torch.float32)
    with pytest.raises(Interrupted):
        fit(
            small_model(torch.float32),
            stream_of(rows, 12),
            scheduled_terms(),
            plan,
            tmp_path / "checkpoint",
            interrupted_at(7),
        )
    found, found_history, _ = trained(
        rows, plan, scheduled_terms(), dtype=torch.float32, checkpoint=tmp_path / "checkpoint"
    )
    assert torch.equal(found, expected)
    assert found_history == history


def test_a_checkpoint_is_written_when_it_is_due(data, tmp_path):
    rows = lesson(data)
    for every_s, written in ((3600.0, False), (0.0, True)):
        checkpoint = tmp_path / f"checkpoint-{written}"
        trained(rows, replace(PLAN, checkpoint_every_s=every_s), checkpoint=checkpoint)
        assert checkpoint.is_file() == written


# Two ranks


TWO_RANKS = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

folder, tests = map(Path, sys.argv[1:])
sys.path.insert(0, str(tests))
from accelerate import PartialState
from test_training import *
from kdpipe.data.prepared import PreparedData

rows = lesson(PreparedData(folder / "data"), num_labelled=3, dtype=np.float32)
results = {}
for name, plan in two_rank_plans().items():
    results[name] = trained(rows, plan, dtype=torch.float32, batch_size=5)[:2]
drawing, peers = Drawing(), PartialState()
trained(rows, PLAN, model=drawing)
results["ranks"], results["drawn"] = peers.num_processes, drawing.drawn

plan = replace(PLAN, checkpoint_every_s=0.0)
model = small_model(torch.float32)
try:
    fit(model, stream_of(rows, 5), both_terms(), plan, folder / "checkpoint", interrupted_at(11))
except Interrupted:
    peers.wait_for_everyone()
results["resumed"] = trained(rows, plan, dtype=torch.float32, batch_size=5, checkpoint=folder / "checkpoint")[:2]
torch.save(results, folder / f"rank-{peers.process_index}.pt")
peers.destroy_process_group()
"""


def two_rank_plans() -> dict[str, TrainPlan]:
    """The last batch of an epoch holds 1 of 36 rows: one rank has none."""
    adamw = replace(PLAN, optimizer="adamw", learning_rate=0.01)
    return {"sgd": PLAN, "adamw": replace(adamw, micro_batch_size=2, clip_norm=1.0)}


def pulls_of(history) -> dict[str, float]:
    """How strongly each term pulls, by step and name; of a batch without labels, too."""
    return {f"{each['step']} {name}": each[name] for each in history for name in each if name.endswith(" gradient")}


def torchrun(*arguments: object) -> None:
    """Run a script in two processes on CPUs; SIGTERM, where it is late, lets the launcher end them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, *map(str, arguments)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as launched:
        try:
            _, messages = launched.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            launched.terminate()
            _, messages = launched.communicate()
    assert launched.returncode == 0, messages[-3000:]


def test_two_ranks_train_the_model_of_one(data, tmp_path):
    (tmp_path / "data").symlink_to(data.folder)
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    torchrun(script, tmp_path, Path(__file__).parent)
    rows = lesson(data, num_labelled=3, dtype=np.float32)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    for name, plan in {**two_rank_plans(), "resumed": PLAN}.items():
        expected, history, _ = trained(rows, plan, dtype=torch.float32, batch_size=5)
        for found in ranks:
            assert found["ranks"] == 2
            weights, log = found[name]
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
            assert [each["loss"] for each in log] == pytest.approx([each["loss"] for each in history], rel=1e-4)
            assert pulls_of(log) == pytest.approx(pulls_of(history), rel=1e-3)
            assert len(pulls_of(log)) >= 4
    assert torch.equal(ranks[0]["sgd"][0], ranks[1]["sgd"][0])
    assert not set(ranks[0]["drawn"]) & set(ranks[1]["drawn"])


def test_refuses_peers_that_accelerate_does_not_know(rows, monkeypatch):
    trained(rows, PLAN)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"there are 2 processes .* Accelerate was set up for 1"):
        trained(rows, PLAN)
