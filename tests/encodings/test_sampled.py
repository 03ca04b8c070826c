from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.encodings import Sampled
from kdpipe.errors import ConfigError
from kdpipe.targets import OutputSpec, SampledTargets

SEEDS = st.integers(0, 2**31)
STRATIFIED = pytest.mark.parametrize("stratified", [False, True])
HEADS = pytest.mark.parametrize("head", [0, 3])


def keys_of(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, num_rows, dtype=np.uint64)


def decoded(encoding: Sampled, logits: Tensor, keys: np.ndarray) -> SampledTargets:
    return encoding.decode(encoding.encode(logits, keys), OutputSpec(name="logits", shape=tuple(logits.shape[1:])))


def dense_of(targets: SampledTargets) -> Tensor:
    """The estimate of p, `[B, C]`."""
    empty = torch.zeros(*targets.ids.shape[:-1], targets.num_classes, dtype=torch.float64)
    return empty.scatter_add(-1, targets.ids, targets.weights.double())


@STRATIFIED
@HEADS
def test_estimates_are_unbiased_over_1e5_draws(head, stratified):
    """z-test per class: 25,000 rows of the same logits, four draws each."""
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    num_rows = 25_000
    encoding = Sampled(draws=4, head=head, stratified=stratified)
    estimates = dense_of(decoded(encoding, logits.expand(num_rows, -1), keys_of(num_rows)))
    p = torch.softmax(logits.double(), dim=-1)
    error = estimates.mean(dim=0) - p
    standard_error = (estimates.var(dim=0) / num_rows).sqrt()
    float16 = 2.0**-10 * p * (1 + p.log().abs())
    assert (error.abs() <= 4.5 * standard_error + float16).all()
    kept = p.topk(head).indices if head else []
    assert (standard_error[kept] == 0).all(), "the head is exact"
    r = 1 - p[kept].sum() if head else torch.ones(())
    variance = p * (r - p) / 4
    frequent = p > 0.02
    frequent[kept] = False
    ratio = (estimates.var(dim=0) / variance)[frequent]
    assert (ratio < 1.1).all()
    if not stratified:
        assert (ratio > 0.9).all()


@STRATIFIED
@given(seed=SEEDS, draws=st.integers(1, 300), head=st.integers(0, 5), compact=st.booleans())
def test_ids_are_unique_and_counts_add_up(stratified, seed, draws, head, compact):
    logits = 3 * torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    encoding = Sampled(draws=draws, head=head, stratified=stratified, compact=compact)
    keys = keys_of(3, seed)
    arrays = encoding.encode(logits, keys)
    counts = arrays[".counts"]
    assert counts.dtype == (np.uint8 if draws < 256 else np.uint16)
    assert (counts.sum(axis=-1) == draws).all()
    targets = encoding.decode(arrays, OutputSpec(name="logits", shape=(40,)))
    assert targets.ids.shape == targets.weights.shape == (3, head + draws)
    for ids, weights in zip(targets.ids, targets.weights, strict=True):
        used = ids[weights > 0]
        assert len(used.unique()) == len(used)
    assert (targets.ids[:, :head].diff(dim=-1) > 0).all()
    assert (targets.ids[:, head:].diff(dim=-1) >= 0).all()
    assert (targets.weights.sum(dim=-1) - 1).abs().max() < 5e-3
    p = torch.softmax(logits.double(), dim=-1)
    torch.testing.assert_close(targets.entropy.double(), torch.special.entr(p).sum(dim=-1), rtol=2.0**-10, atol=1e-6)
    if head:
        kept = p.topk(head).indices.sort(dim=-1).values
        assert torch.equal(targets.ids[:, :head], kept)
        torch.testing.assert_close(targets.weights[:, :head].double(), p.gather(-1, kept), rtol=5e-3, atol=1e-7)


@STRATIFIED
@HEADS
def test_a_draw_depends_on_its_key_seed_and_token_only(head, stratified):
    logits = torch.randn(1, 1, 50).expand(4, 6, -1)
    keys = keys_of(4)
    encoding = Sampled(draws=9, head=head, stratified=stratified)
    every = encoding.encode(logits, keys)
    part = encoding.encode(logits[[2], :3], keys[[2]])
    assert all(np.array_equal(every[suffix][[2], :3], part[suffix]) for suffix in part)
    drawn = every[".ids"].reshape(24, -1)
    assert len(np.unique(drawn, axis=0)) == 24, "rows and tokens draw apart"
    other = Sampled(draws=9, head=head, seed=1, stratified=stratified).encode(logits, keys)
    assert not np.array_equal(every[".ids"], other[".ids"])


def test_more_classes_than_fit_at_once_change_nothing(monkeypatch):
    logits, keys = torch.randn(7, 3, 30), keys_of(7)
    together = Sampled(draws=5, head=2).encode(logits, keys)
    monkeypatch.setattr("kdpipe.encodings.sampled._CLASSES_AT_ONCE", 60)
    apart = Sampled(draws=5, head=2).encode(logits, keys)
    assert all(np.array_equal(together[suffix], apart[suffix]) for suffix in together)


@STRATIFIED
def test_a_masked_class_is_never_drawn(stratified):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]]).expand(500, -1)
    estimates = dense_of(decoded(Sampled(draws=8, stratified=stratified), logits, keys_of(500)))
    assert (estimates[:, [0, 2, 4]] == 0).all()
    nothing_left = decoded(Sampled(draws=8, head=2, stratified=stratified), logits, keys_of(500))
    assert (nothing_left.weights[:, 2:] == 0).all()
    torch.testing.assert_close(dense_of(nothing_left)[0], torch.softmax(logits[0].double(), dim=-1), rtol=1e-3, atol=0)


def test_the_last_number_below_one_draws_a_class(monkeypatch):
    monkeypatch.setattr(
        "kdpipe.encodings.sampled.uniform", lambda keys, shape, seed: np.full((len(keys), *shape), 1 - 2.0**-53)
    )
    logits = torch.tensor([[0.0, 0.0, 0.0, -torch.inf]])
    assert decoded(Sampled(draws=1), logits, keys_of(1)).ids.tolist() == [[2]]


def test_an_exact_head_and_stratified_draws_lower_the_gradient_error():
    """||g_hat - g|| of the student's logits, mean over tokens; 12 + 8 places against 20 draws."""
    random = torch.Generator().manual_seed(0)
    logits = -1.9 * torch.log(torch.arange(5000) + 3.0) + 0.8 * torch.randn(200, 5000, generator=random)
    q = torch.softmax((0.8 * logits + torch.randn(logits.shape, generator=random)).double(), dim=-1)
    p = torch.softmax(logits.double(), dim=-1)
    errors = {}
    for name, encoding in {
        "plain": Sampled(draws=20),
        "stratified": Sampled(draws=20, stratified=True),
        "head": Sampled(draws=8, head=12),
    }.items():
        w = dense_of(decoded(encoding, logits, keys_of(200)))
        errors[name] = ((q * w.sum(dim=-1, keepdim=True) - w) - (q - p)).norm(dim=-1).mean()
    assert errors["stratified"] < 0.75 * errors["plain"]
    assert errors["head"] < 0.75 * errors["plain"]


def test_bytes_per_row():
    output = OutputSpec(name="logits", shape=(131072,))
    assert sum(spec.row_bytes for spec in Sampled(draws=50).arrays(output).values()) == 5 * 50 + 2
    assert sum(spec.row_bytes for spec in Sampled(draws=8, head=12).arrays(output).values()) == 5 * 8 + 2 + 6 * 12 + 2


@pytest.mark.parametrize("keys", [None, keys_of(3)])
def test_needs_a_key_per_row(keys):
    with pytest.raises(ConfigError, match=r"one key per row; found (none|3) for 2 rows"):
        Sampled(draws=2).encode(torch.zeros(2, 5), keys)
