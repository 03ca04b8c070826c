"""How strongly each term pulls, as the log has it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdpipe import training
from kdpipe.errors import TrainingError
from kdpipe.gradients import pulls
from kdpipe.losses import LossTerm
from kdpipe.models.mlp import MLP
from kdpipe.terms import DistillTerm
from kdpipe.training import TrainPlan, fit
from toy_rows import NUM_CLASSES, NUM_FEATURES, distill_term, label_term, lesson, prepared, stream_of

NO_CHECKPOINT = Path("/no such folder/checkpoint")
PLAN = TrainPlan(steps=20, seed=5, optimizer="sgd", learning_rate=0.05, warmup_fraction=0.1)
KL = "teacher.ForwardKL T=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("gradients"), 36)


def small_model(dtype=torch.float64, dropout=0.0) -> nn.Module:
    torch.manual_seed(0)
    return MLP((NUM_FEATURES,), NUM_CLASSES, hidden=[8], dropout=dropout).to(dtype)


def trained(rows, plan=PLAN, terms=None, model=None, batch_size=12):
    model = model or small_model()
    terms = terms or [distill_term(0.9), label_term(0.1)]
    fitted = fit(model, stream_of(rows, batch_size), terms, plan, NO_CHECKPOINT)
    return torch.cat([each.detach().flatten() for each in model.parameters()]), list(fitted.history)


def norm_of(model, loss) -> float:
    return float(torch.cat([each.flatten() for each in torch.autograd.grad(loss, model.parameters())]).norm())


def by_hand(rows, batch_size=12) -> dict[str, float]:
    """Norms of the first step's two gradients, and their ratio."""
    model = small_model()
    (batch,) = stream_of(rows, batch_size).from_step(0, 1)
    kl, label = distill_term(), label_term()
    norms = []
    for term, weight in ((kl, 0.9), (label, 0.1)):
        valid = term.valid(batch)
        loss = weight * term.values(model(batch.inputs), batch)[valid].mean()
        norms.append(norm_of(model, loss))
    return {f"{KL} gradient": norms[0], f"{KL} gradient ratio": norms[0] / norms[1], "label gradient": norms[1]}


def measured(entry) -> dict[str, float]:
    return {name: value for name, value in entry.items() if "gradient" in name}


@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
def test_the_log_has_the_norm_of_each_terms_gradient(data, micro_batch_size):
    rows = lesson(data)
    _, history = trained(rows, replace(PLAN, micro_batch_size=micro_batch_size))
    assert measured(history[0]) == pytest.approx(by_hand(rows), rel=1e-6)


def test_a_scaled_loss_has_the_same_norms(data):
    rows = lesson(data, dtype=np.float32)
    found = {}
    for precision in ("float32", "float16"):
        plan, terms = replace(PLAN, precision=precision, steps=1), [distill_term(1e-3), label_term(1e-3)]
        found[precision] = measured(trained(rows, plan, terms, small_model(torch.float32))[1][0])
    assert len(found["float16"]) == 3
    assert found["float16"] == pytest.approx(found["float32"], rel=0.02)


def test_measuring_changes_no_bit(data):
    rows = lesson(data, num_labelled=3, dtype=np.float32)
    for settings in ({}, {"micro_batch_size": 5, "clip_norm": 1.0, "optimizer": "adamw"}, {"precision": "float16"}):
        plan = replace(PLAN, **settings)
        with_them, history = trained(rows, plan, model=small_model(torch.float32, dropout=0.5))
        plain_plan = replace(plan, log_gradients=False)
        without, plain = trained(rows, plain_plan, model=small_model(torch.float32, dropout=0.5))
        assert torch.equal(with_them, without)
        assert any(measured(each) for each in history)
        names = [set(each) - set(measured(each)) for each in history]
        assert [{name: each[name] for name in of} for each, of in zip(history, names, strict=True)] == plain


@pytest.mark.parametrize(
    ("steps", "entries"), [(20, [0, 10]), (100, [*range(0, 100, 10)]), (250, [*range(0, 125, 10)])]
)
def test_a_tenth_of_the_entries_has_them(data, steps, entries):
    _, history = trained(lesson(data), replace(PLAN, steps=steps))
    assert [index for index, each in enumerate(history) if measured(each)] == entries


def test_one_term_alone_is_compared_with_nothing(data):
    _, history = trained(lesson(data), terms=[label_term()])
    assert not any(measured(each) for each in history)


class Dead:
    """A loss that does not depend on the student."""

    temperature = 1.0

    def __call__(self, logits, targets):
        return targets.log_probs().amax(dim=-1)

    def unscaled(self, values):
        return values


def test_a_dead_loss_shows(data):
    dead = DistillTerm(term=LossTerm(teacher="teacher", output="logits", loss=Dead(), weight=1.0))
    _, history = trained(lesson(data), terms=[label_term(), dead])
    assert history[0]["teacher.Dead T=1 gradient"] == 0
    assert history[0]["teacher.Dead T=1 gradient ratio"] == 0
    assert history[0]["teacher.Dead T=1"] != 0


def test_without_labels_the_first_term_is_what_others_are_compared_with(data):
    rows = lesson(data)
    terms = [distill_term(0.2), distill_term(0.6)]
    _, history = trained(rows, terms=terms)
    assert history[0][f"{KL} #2 gradient ratio"] == pytest.approx(3)
    assert f"{KL} gradient ratio" not in history[0]


def test_a_batch_without_labels_has_no_ratio(data):
    _, history = trained(lesson(data, num_labelled=0))
    assert history[0]["label gradient"] == 0
    assert history[0][f"{KL} gradient"] > 0
    assert f"{KL} gradient ratio" not in history[0]


def test_what_overflows_is_left_out():
    assert pulls({"a": math.inf, "b": 2.0, "label": 1.0}, "label") == {
        "b gradient": 2.0,
        "label gradient": 1.0,
        "b gradient ratio": 2.0,
    }
    assert pulls({"a": 2.0, "label": math.nan}, "label") == {"a gradient": 2.0}


def test_frozen_parameters_do_not_count(data):
    """A frozen first layer: the norm is of the others."""
    model = small_model()
    next(model.parameters()).requires_grad_(requires_grad=False)
    rows = lesson(data)
    _, history = trained(rows, model=model)
    assert 0 < history[0][f"{KL} gradient"] < by_hand(rows)[f"{KL} gradient"]


class Once(torch.autograd.Function):
    """A backward pass that runs a single time."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.times = 0
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.times += 1
        if ctx.times > 1:
            raise RuntimeError("the graph was freed")
        return gradient


class RunsOnce(MLP):
    def forward(self, inputs):
        return Once.apply(super().forward(inputs))


def test_a_model_that_goes_backward_once_only_names_the_way_out(data):
    rows, model = lesson(data, dtype=np.float32), RunsOnce((NUM_FEATURES,), NUM_CLASSES, hidden=[8])
    with pytest.raises(TrainingError, match=r"train\.log_gradients: false\. RuntimeError: the graph was freed"):
        trained(rows, model=model)
    trained(rows, replace(PLAN, log_gradients=False), model=model)


def test_every_entry_has_values_weights_and_summands(data, monkeypatch):
    monkeypatch.setattr(training, "LOGS_PER_FIT", 5)
    _, history = trained(lesson(data))
    assert len(history) == 5
    for each in history:
        assert (each[f"{KL} weight"], each["label weight"]) == (pytest.approx(0.9), pytest.approx(0.1))
        assert each[f"{KL} weighted"] == pytest.approx(0.9 * each[KL])
        assert each["loss"] == pytest.approx(each[f"{KL} weighted"] + each["label weighted"])
