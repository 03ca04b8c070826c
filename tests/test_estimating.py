"""What an encoding costs and loses: against formulas, against the bytes of a real store, and the rule that chooses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.encodings import Dense, Int8, Sampled, TopK
from kdpipe.errors import ConfigError
from kdpipe.estimating import (
    Fidelity,
    Measured,
    Needs,
    Offer,
    Sample,
    candidates,
    kl_to_targets,
    made_up_student,
    measure,
    profiled,
    recommend,
    shard_rows_of,
    stored_bytes,
    title_of,
)
from kdpipe.store import TargetStore
from kdpipe.store.manifest import Manifest
from kdpipe.targets import DenseTargets, OutputSpec

TEMPERATURES = (1.0, 2.0, 4.0)


def logits_of(num_rows=64, num_classes=10, scale=4.0, seed=0):
    return scale * torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed))


def sample_of(logits, temperatures=TEMPERATURES):
    keys = np.random.default_rng(0).integers(0, 2**63, len(logits)).astype(np.uint64)
    return Sample(logits, keys, temperatures)


def at(measured, temperature):
    (found,) = [each for each in measured.at if each.temperature == temperature]
    return found


def test_dense_float32_loses_nothing_and_topk_of_every_class_neither():
    sample = sample_of(logits_of())
    for encoding in (Dense(dtype="float32"), TopK(k=10, temperatures=TEMPERATURES)):
        measured = measure(encoding, sample, 64)
        assert measured.top1_agreement == 1
        for each in measured.at:
            assert each.kl < 1e-6
            assert each.gradient_error < 1e-3
    assert at(measure(Dense(dtype="float32"), sample, 64), 1).gradient_error < 1e-6


@pytest.mark.parametrize("encoding", [Dense(), Int8(), TopK(k=3, temperatures=TEMPERATURES)])
def test_what_float64_adds_to_all_classes_changes_nothing(encoding):
    logits = logits_of().double()
    near, far = (measure(encoding, sample_of(logits + offset), 64) for offset in (0, 2.0**30))
    assert near.top1_agreement == far.top1_agreement
    for one, other in zip(near.at, far.at, strict=True):
        assert other.kl == pytest.approx(one.kl, rel=1e-3, abs=1e-12)
        assert other.gradient_error == pytest.approx(one.gradient_error, rel=1e-3)


@given(st.integers(2, 40), st.integers(0, 10), st.floats(0.1, 30))
def test_int8_is_within_its_bound(num_classes, seed, scale):
    """T^2 KL <= scale^2 / 8 per row (Hoeffding), with the scale of the widest row."""
    logits = logits_of(8, num_classes, scale, seed)
    step = float((logits.amax(dim=-1) - logits.amin(dim=-1)).max()) / 255
    for each in measure(Int8(), sample_of(logits), 8).at:
        assert each.temperature**2 * each.kl <= step**2 / 8 + 1e-9


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_error_of_topk_is_the_formula_of_its_tail(temperature):
    """In k + 1 buckets the gradient is q - p on the head, and q (1 - r / (1 - Q)) on the tail."""
    logits = logits_of(32, 12).double()
    student = made_up_student(logits.float())
    p, q = torch.softmax(logits / temperature, -1), torch.softmax(student / temperature, -1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, logits.topk(3).indices, True)
    tail_p, tail_q = (each.masked_fill(kept, 0).sum(-1, keepdim=True) for each in (p, q))
    expected = torch.where(kept, q - p, q * (1 - tail_p / tail_q))
    error = float((expected - (q - p)).norm() / (q - p).norm())
    measured = measure(TopK(k=3, temperatures=(1, 4)), sample_of(logits.float(), (1.0, 4.0)), 32)
    assert at(measured, temperature).gradient_error == pytest.approx(error, rel=1e-3)
    assert at(measured, temperature).head_mass == pytest.approx(float(1 - tail_p.mean()), rel=1e-6)


def test_more_classes_kept_lose_less():
    sample = sample_of(logits_of(64, 30, 2.0))
    measured = [measure(TopK(k=k, temperatures=TEMPERATURES), sample, 64) for k in (1, 3, 10, 30)]
    for temperature in TEMPERATURES:
        errors = [at(each, temperature).gradient_error for each in measured]
        masses = [at(each, temperature).head_mass for each in measured]
        assert errors == sorted(errors, reverse=True)
        assert masses == sorted(masses)
        assert masses[-1] == pytest.approx(1)


@pytest.mark.parametrize("draws", [2, 8, 50])
def test_the_gradient_error_of_draws_is_their_variance(draws):
    """E |p' - p|^2 = sum p (1 - p) / draws."""
    logits = logits_of(400, 8, 1.0)
    p = torch.softmax(logits.double(), -1)
    g = torch.softmax(made_up_student(logits), -1) - p
    expected = math.sqrt(float((p * (1 - p)).sum()) / draws / float(g.square().sum()))
    measured = measure(Sampled(draws=draws), sample_of(logits), 256)
    assert at(measured, 1).gradient_error == pytest.approx(expected, rel=0.05)


def test_what_is_not_served_has_no_numbers():
    sample = sample_of(logits_of())
    sampled, topk = measure(Sampled(draws=4), sample, 64), measure(TopK(k=4, temperatures=(1, 2)), sample, 64)
    nothing = (None, None, None)
    for measured, temperature in ((sampled, 2), (sampled, 4), (topk, 4)):
        found = at(measured, temperature)
        assert (found.kl, found.head_mass, found.gradient_error) == nothing
    assert at(sampled, 1).kl is None
    assert at(topk, 2).kl is not None
    assert sampled.gradient_error([1.0]) is not None
    assert sampled.gradient_error([1.0, 4.0]) is None
    assert topk.gradient_error([1.0, 2.0]) == max(at(topk, each).gradient_error for each in (1, 2))


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100, 1000, 70_000])
@pytest.mark.parametrize("masked", [False, True])
def test_every_candidate_is_legal_and_finite(num_classes, masked):
    logits = logits_of(3, num_classes)
    if masked:
        logits[:, 0] = -torch.inf
    encodings = candidates(num_classes, TEMPERATURES, masked)
    assert len({title_of(each) for each in encodings}) == len(encodings) >= 5
    sample = sample_of(logits)
    for encoding in encodings:
        measured = measure(encoding, sample, shard_rows_of(encoding, sample.output, 10**6))
        assert all(each.gradient_error is None or math.isfinite(each.gradient_error) for each in measured.at)
        assert all(each.kl is None or 0 <= each.kl < 0.01 for each in measured.at)
        assert at(measured, 1).gradient_error is not None


def test_what_cannot_be_encoded_says_why():
    logits = logits_of()
    logits[0, 0] = -1e9
    with pytest.raises(ConfigError, match="masks classes by a large negative number"):
        measure(Int8(), sample_of(logits), 64)


@pytest.mark.parametrize("profile", ["fast", "compact"])
@pytest.mark.parametrize("encoding", [Dense(), Int8(), TopK(k=4, values="int8"), Sampled(draws=5, head=2)])
@pytest.mark.parametrize("num_rows", [64, 61])
def test_bytes_are_those_of_a_store(tmp_path, encoding, profile, num_rows):
    """A real store's files of the logits, for whole shards; a last partial one is left out of the mean."""
    shard_rows = 16
    sample, encoding = sample_of(logits_of(num_rows)), profiled(encoding, profile)
    manifest = Manifest(
        ingredients={"teacher": "toy"},
        outputs=[sample.output],
        encodings={"logits": encoding.to_json()},
        temperatures=[1.0],
        num_classes=10,
        class_names=None,
        shard_rows=shard_rows,
    )
    ids, digests = np.array([f"{each:03}" for each in range(num_rows)]), np.zeros((num_rows, 16), np.uint8)
    store = TargetStore.create(tmp_path, manifest, ids, digests)
    written = 0
    for view, shard in store.missing():
        rows = slice(shard.start, shard.stop)
        arrays = {f"logits{key}": each for key, each in encoding.encode(sample.logits[rows], sample.keys[rows]).items()}
        store.write(view, shard, {**arrays, "statistics": np.zeros((shard.num_rows, 3), np.float32)}, 16)
        if shard.num_rows == shard_rows:
            files = store.records[view, shard.index].files
            written += sum(file.num_bytes for name, file in files.items() if name != "statistics")
    assert stored_bytes(encoding, sample, shard_rows) == written / (num_rows // shard_rows * shard_rows)


def test_few_rows_are_measured_as_one_shard():
    assert stored_bytes(Dense(), sample_of(logits_of(1)), 4096) < 24 + 2 * 24 + 1
    assert 24 < stored_bytes(Dense(), sample_of(logits_of(100)), 4096) < 25


@pytest.mark.parametrize("num_rows", [1, 2, 3, 100])
def test_few_rows_stand_for_a_whole_shard(num_rows):
    """Two bytes per class and four for the row's maximum; each of the two arrays has a frame of 24 bytes."""
    assert stored_bytes(Dense(), sample_of(logits_of(num_rows)), 4096) == pytest.approx(24 + 2 * 24 / 4096, rel=1e-12)


@pytest.mark.parametrize("encoding", [TopK(k=5, compact=True), Sampled(draws=10, compact=True)])
def test_few_rows_tell_what_a_compact_shard_of_many_takes(encoding):
    """And a little more: fewer rows compress less."""
    sample = sample_of(logits_of(2048, 1000))
    few = sample_of(sample.logits[:26])
    taken = stored_bytes(encoding, sample, 2048)
    assert taken <= stored_bytes(encoding, few, 2048) < 1.25 * taken


def test_a_class_that_targets_rule_out_and_the_teacher_does_not_costs_infinitely_much():
    logits = logits_of(2, 3)
    values = logits - logits.amax(dim=-1, keepdim=True)
    values[0, 0] = -torch.inf
    kl = kl_to_targets(logits, DenseTargets(values=values, row_max=logits.amax(dim=-1)))
    assert torch.isposinf(kl[0])
    assert kl[1].abs() < 1e-6


def test_a_large_store_chooses_large_shards():
    output = OutputSpec(name="logits", shape=(1000,))
    assert shard_rows_of(Dense(), output, 1_300_000) == 16384
    assert shard_rows_of(Dense(), output, 1_000) == 32


def offer(encoding, error, row_bytes, compact=None, refused=""):
    fidelity = [Fidelity(temperature=4.0, kl=None, head_mass=None, gradient_error=error)]
    sizes = {"fast": row_bytes, "compact": compact or row_bytes}
    measured = Measured(encoding=encoding, bytes_each=sizes, top1_agreement=1.0, at=fidelity)
    return Offer(measured=measured, row_bytes=sizes, refused=refused)


def chosen(offers, num_classes=100, free_bytes=1e9, disk=1e9, rows_per_s=1e3, temperatures=(4.0,), places=1000):
    needs = Needs(
        num_classes=num_classes,
        rows=1000,
        places=places,
        rows_per_s=rows_per_s,
        temperatures=temperatures,
        free_bytes=int(free_bytes),
        write_bytes_per_s=disk,
    )
    return recommend(offers, needs)


OFFERS = [
    offer(Dense(), 0.001, 204, compact=150),
    offer(Dense(dtype="float32"), 0.0, 404, compact=300),
    offer(Int8(), 0.01, 108, compact=100),
    offer(TopK(k=20), 0.04, 84, compact=70),
    offer(TopK(k=2), 0.3, 20, compact=15),
    offer(Sampled(draws=10), None, 32, refused="not linear"),
]


@pytest.mark.parametrize(
    ("settings", "expected", "reason"),
    [
        ({}, Dense(), "few enough to keep every one"),
        ({"disk": 120e3}, Int8(), "few enough"),
        ({"num_classes": 5000}, TopK(k=20), "the smallest with a gradient error within 5 %"),
        ({"free_bytes": 150e3}, Dense(compact=True), "few enough"),
        ({"free_bytes": 105e3}, Int8(compact=True), "few enough"),
        ({"free_bytes": 85e3}, TopK(k=20), "the smallest"),
        ({"free_bytes": 30e3}, TopK(k=2), "no encoding that fits has a gradient error within 5 %"),
        ({"disk": 90e3}, TopK(k=20), "the smallest"),
        ({"disk": 1.0}, TopK(k=20), "though the disk is slower than the teacher"),
        ({"free_bytes": 1e3}, None, "the smallest, topk 2 float16, needs 15.0 kB and 1.0 kB are free"),
        ({"temperatures": (1.0,)}, None, r"no encoding can serve the losses"),
    ],
)
def test_the_rule(settings, expected, reason):
    found = chosen(OFFERS, **settings)
    assert found.encoding == expected
    assert reason in found.reason.replace("5%", "5 %")


def test_rows_without_a_view_take_room_in_the_fast_profile():
    found = chosen(OFFERS, free_bytes=210e3, places=5000)
    assert found.encoding == Dense(compact=True)
    assert "150.0 kB of 210.0 kB free" in found.reason


def test_where_a_student_has_nothing_to_learn_rounding_is_no_error():
    """Teacher and student are sure of the same classes: the gradient is about e^-48."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(200, 10, (64, 10)))
    logits[torch.arange(64), torch.arange(64) % 10] += 60 + logits.amax(dim=-1) - 200
    sample = Sample(logits.float(), np.arange(64, dtype=np.uint64), (1.0,))
    for encoding in (Dense(), Dense(dtype="float32")):
        (at_1,) = measure(encoding, sample, 64).at
        assert at_1.gradient_error is not None
        assert at_1.gradient_error < 1e-3


def test_what_a_loss_refuses_is_never_recommended():
    """However small, exact or alone it is."""
    refused = offer(Sampled(draws=10), 0.0, 1, refused="not linear in the teacher's probabilities")
    assert chosen([refused]).encoding is None
    for num_classes in (10, 10_000):
        assert chosen([refused, offer(TopK(k=2), 0.9, 10**5)], num_classes).encoding == TopK(k=2)
