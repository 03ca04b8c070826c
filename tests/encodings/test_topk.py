from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.encodings import TopK
from kdpipe.encodings.class_ids import restored_ids, stored_ids
from kdpipe.errors import ConfigError
from kdpipe.losses import forward_kl
from kdpipe.targets import DenseTargets, OutputSpec, SparseTargets

BOTH_VALUES = pytest.mark.parametrize("values", ["float16", "int8"])
LAYOUTS = st.booleans()


def decoded(encoding: TopK, logits: Tensor) -> SparseTargets:
    return encoding.decode(encoding.encode(logits), OutputSpec(name="logits", shape=tuple(logits.shape[1:])))


@st.composite
def teachers(draw: st.DrawFn, most: int = 300) -> tuple[Tensor, int]:
    """Logits `[B, C]` in float64 at some scale, sometimes with ties, and a k."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, most)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(shape, generator=random, dtype=torch.float64) * draw(
        st.sampled_from([0.0, 0.1, 1.0, 3.0, 9.0])
    )
    logits = logits.round() if draw(st.booleans()) else logits
    return logits, draw(st.integers(1, shape[1]))


def language_model(num_tokens: int, vocabulary: int, seed: int) -> Tensor:
    """A teacher whose log-probs fall with the log of the rank, about 3 nats at 131,072 tokens."""
    random = torch.Generator().manual_seed(seed)
    slope = 0.9 + 1.3 * torch.rand(num_tokens, 1, generator=random)
    logits = -1.3 * slope * torch.log(torch.arange(vocabulary) + 3.0)
    logits = logits + 0.8 * torch.randn(num_tokens, vocabulary, generator=random)
    return torch.stack([row[torch.randperm(vocabulary, generator=random)] for row in logits])


def image_model(num_rows: int, num_classes: int, seed: int) -> Tensor:
    """A teacher with twelve likely classes among noise, top-1 about 0.8."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_classes, generator=random)
    likely = torch.rand(num_rows, num_classes, generator=random).topk(12).indices
    logits.scatter_add_(1, likely, 3 + 3 * torch.rand(num_rows, 12, generator=random))
    return logits.scatter_add(1, likely[:, :1], torch.full((num_rows, 1), 5.0))


def tail_of(log_probs: Tensor, ids: Tensor, temperature: float) -> Tensor:
    kept = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, ids, True)
    return torch.logsumexp(log_probs.masked_fill(kept, -torch.inf) / temperature, dim=-1)


@given(teacher=teachers(), compact=LAYOUTS)
def test_keeps_the_most_probable_classes_and_the_lower_id_of_equals(teacher, compact):
    logits, k = teacher
    expected = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
    assert torch.equal(decoded(TopK(k=k, compact=compact), logits).ids, expected)


@given(teacher=teachers(), compact=LAYOUTS)
def test_float16_log_probs_are_within_their_bound(teacher, compact):
    logits, k = teacher
    targets = decoded(TopK(k=k, compact=compact), logits)
    exact = torch.log_softmax(logits, dim=-1).gather(-1, targets.ids)
    assert ((targets.head - exact).abs() <= exact.abs() * 2.0**-11 + 2.0**-25).all()


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.017, 0.3, 0.95, 0.999])
@pytest.mark.parametrize("num_classes", [50_304, 1_000_000])
def test_small_classes_count_beside_a_large_one(num_classes, share, noise, values):
    """A sum in float32 of class after class would lose them."""
    logits = noise * torch.randn(1, num_classes, generator=torch.Generator().manual_seed(0))
    logits[0, 7] = torch.logsumexp(logits[0, 8:].double(), dim=-1) + math.log(share / (1 - share))
    targets = decoded(TopK(k=8, values=values), logits)
    exact = torch.log_softmax(logits.double(), dim=-1).gather(-1, targets.ids)
    step = (exact.max() - exact.min()) / 254 + (1 + exact.abs()) * 2.0**-20
    bound = step if values == "int8" else exact.abs() * 2.0**-11 + 2.0**-22
    assert ((targets.head - exact).abs() <= bound).all()


@given(teacher=teachers(), compact=LAYOUTS)
def test_int8_log_probs_are_within_a_step_and_have_the_exact_mass(teacher, compact):
    logits, k = teacher
    targets = decoded(TopK(k=k, values="int8", compact=compact), logits)
    log_probs = torch.log_softmax(logits, dim=-1)
    exact = log_probs.gather(-1, targets.ids)
    step = (exact.amax(dim=-1, keepdim=True) - exact.amin(dim=-1, keepdim=True)) / 254
    tail = tail_of(log_probs, targets.ids, 1.0)
    ill_conditioned = 1e-6 / exact.exp().sum(dim=-1, keepdim=True)
    assert ((targets.head - exact).abs() <= step * (1 + 2.0**-12) + 1e-5 + ill_conditioned).all()
    mass = targets.head.double().exp().sum(dim=-1)
    assert ((mass - (1 - tail.exp())).abs() < 2e-6).all()


@given(teacher=teachers(), values=st.sampled_from(["float16", "int8"]))
def test_tails_are_the_mass_of_all_other_classes_at_each_temperature(teacher, values):
    logits, k = teacher
    targets = decoded(TopK(k=k, values=values, temperatures=(0.5, 2, 4)), logits)
    assert targets.temperatures == (0.5, 1.0, 2.0, 4.0)
    log_probs = torch.log_softmax(logits, dim=-1)
    for index, temperature in enumerate(targets.temperatures):
        exact = tail_of(log_probs, targets.ids, temperature)
        found = targets.tails[:, index].double()
        assert torch.equal(torch.isneginf(found), torch.isneginf(exact))
        finite = torch.isfinite(exact)
        assert ((found - exact)[finite].abs() <= 2.0**-23 * (1 + exact[finite].abs())).all()


def test_a_tail_far_below_float32_is_no_zero():
    """`log1p(-sum p)` gives -inf or noise here."""
    logits = torch.cat([torch.zeros(1), torch.full((9,), -60.0)]).unsqueeze(0)
    found = decoded(TopK(k=1, temperatures=(4,)), logits).tails
    torch.testing.assert_close(found, torch.tensor([[np.log(9) - 60, np.log(9) - 15]]).float())


@given(teacher=teachers(), temperature=st.sampled_from([1.0, 2.0, 4.0]))
def test_with_every_class_kept_the_kl_is_the_dense_one(teacher, temperature):
    logits, _ = teacher
    student = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    row_max = logits.amax(dim=-1)
    dense = DenseTargets(values=logits - row_max.unsqueeze(-1), row_max=row_max)
    sparse = decoded(TopK(k=logits.shape[-1], temperatures=(2, 4)), logits)
    assert torch.isneginf(sparse.tails).all()
    found, expected = forward_kl(student, sparse, temperature), forward_kl(student, dense, temperature)
    largest = torch.log_softmax(logits, dim=-1).abs().amax(dim=-1) + torch.log_softmax(student, dim=-1).abs().amax(
        dim=-1
    )
    assert ((found - expected).abs() <= 4 * largest * largest * 2.0**-11 + 1e-6).all()


@given(
    teacher=teachers(),
    top_p=st.floats(0.01, 1.0),
    data=st.data(),
    values=st.sampled_from(["float16", "int8"]),
    compact=LAYOUTS,
)
def test_top_p_keeps_the_fewest_classes_that_reach_the_mass(teacher, top_p, data, values, compact):
    logits, k = teacher
    encoding = TopK(k=k, values=values, top_p=top_p, min_k=data.draw(st.integers(1, k)), compact=compact)
    arrays = encoding.encode(logits)
    targets = encoding.decode(arrays, OutputSpec(name="logits", shape=(logits.shape[-1],)))
    used = torch.isfinite(targets.head)
    assert used.sum(dim=-1).tolist() == arrays[".num_kept"].tolist()
    log_probs = torch.log_softmax(logits, dim=-1)
    for row, kept in enumerate(used):
        ids, num_kept = targets.ids[row][kept], int(kept.sum())
        assert encoding.min_k <= num_kept <= k
        assert (ids.diff() > 0).all()
        ordered = log_probs[row].sort(descending=True, stable=True)
        assert torch.equal(ids, ordered.indices[:num_kept].sort().values)
        mass = ordered.values.exp().cumsum(0)
        if num_kept < k:
            assert mass[num_kept - 1] >= top_p - 1e-9
        if num_kept > encoding.min_k:
            assert mass[num_kept - 2] < top_p + 1e-9
        assert tail_of(log_probs[row], ids, 1.0).item() == pytest.approx(targets.tails[row, 0].item(), abs=1e-5)
    assert (targets.ids.diff(dim=-1) >= 0).all()


@BOTH_VALUES
def test_a_masked_class_is_an_unused_place(values):
    logits = torch.tensor([[3.0, -torch.inf, 1.0, -torch.inf, -torch.inf, 0.5]])
    targets = decoded(TopK(k=5, values=values, top_p=1.0), logits)
    used = torch.isfinite(targets.head)
    assert targets.ids[used].tolist() == [0, 2, 5]
    torch.testing.assert_close(
        targets.head[used],
        torch.log_softmax(logits, dim=-1)[0, [0, 2, 5]],
        rtol=0,
        atol=0.02 if values == "int8" else 2e-3,
    )
    assert torch.isneginf(targets.tails).all()


@pytest.mark.parametrize(
    ("num_classes", "k", "values", "expected"), [(151936, 128, "int8", 656), (1000, 10, "float16", 52)]
)
def test_bytes_per_row(num_classes, k, values, expected):
    encoding = TopK(k=k, values=values, temperatures=(2, 4))
    specs = encoding.arrays(OutputSpec(name="logits", shape=(num_classes,)))
    assert sum(spec.row_bytes for spec in specs.values()) == expected


@BOTH_VALUES
def test_tokens_are_rows(values):
    encoding = TopK(k=4, values=values, temperatures=(2,), top_p=0.8)
    logits = torch.randn(3, 5, 20)
    together, apart = encoding.encode(logits), encoding.encode(logits.flatten(0, 1))
    assert all(np.array_equal(together[suffix].reshape(apart[suffix].shape), apart[suffix]) for suffix in apart)


@pytest.mark.parametrize(("num_classes", "k"), [(2_000_000, 1), (1_000_000, 10), (151_936, 64)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_int8_holds_its_bound_where_the_head_holds_next_to_nothing(num_classes, k, noise):
    logits = noise * torch.randn(1, num_classes, generator=torch.Generator().manual_seed(0))
    targets = decoded(TopK(k=k, values="int8"), logits)
    exact = torch.log_softmax(logits.double(), dim=-1).gather(-1, targets.ids)
    step = float(exact.max() - exact.min()) / 254
    assert float((targets.head - exact).abs().max()) <= step + 1e-5


def test_bounds_where_no_class_is_left():
    targets = decoded(TopK(k=3, temperatures=(2, 4)), torch.tensor([[1.0, 0.0, 2.0]]))
    assert all(torch.isneginf(each).all() for each in targets.tail_bounds(3.0))
    assert torch.isfinite(targets.log_probs(3.0, allow_interpolation=True)[..., :-1]).all()


@pytest.mark.parametrize("temperature", [0, -1, 1e300, 1e-300, float("nan")])
def test_refuses_temperatures_that_mean_nothing(temperature):
    with pytest.raises(ConfigError, match="expected numbers above 0"):
        TopK(k=3, temperatures=(1, temperature))


def test_the_largest_ids_survive_as_steps():
    ids = torch.tensor([[0, 2**31 - 2, 2**31 - 1], [5, 5, 2**31 - 1]])
    for compact in (False, True):
        (stored,) = stored_ids(ids, 2**31, compact).values()
        assert stored.dtype == np.uint32
        assert torch.equal(restored_ids(stored, compact), ids)


def test_int8_costs_little_kl_over_the_buckets():
    """At k = 128 of 50,304 at most 3e-5 nats, mean over tokens: the tail is stored apart and the head rescaled."""
    logits = language_model(48, 50304, seed=3)
    targets = decoded(TopK(k=128, values="int8", temperatures=(2, 4)), logits)
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    for index, temperature in enumerate(targets.temperatures):
        head = log_probs.gather(-1, targets.ids) / temperature
        tail = tail_of(log_probs, targets.ids, temperature)
        exact = torch.log_softmax(torch.cat([head, tail.unsqueeze(-1)], dim=-1), dim=-1)
        stored = targets.log_probs(targets.temperatures[index]).double()
        assert (exact.exp() * (exact - stored)).sum(dim=-1).mean() < 3e-5
        mass, exact_mass = stored[:, :-1].exp().sum(dim=-1), exact[:, :-1].exp().sum(dim=-1)
        assert (mass - exact_mass).abs().max() < 1e-3


@BOTH_VALUES
@pytest.mark.parametrize(
    ("logits", "k"),
    [
        (language_model(32, 131072, seed=1), 64),
        (image_model(128, 1000, seed=2), 10),
        (image_model(64, 21841, seed=4), 100),
    ],
    ids=["language", "1000 classes", "21841 classes"],
)
def test_interpolated_head_mass(values, logits, k):
    """Error below 1e-2 between the stored temperatures 1, 4/3, 2, 4, 10, and always within the bound."""
    targets = decoded(TopK(k=k, values=values, temperatures=(4 / 3, 2, 4, 10)), logits)
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    head = log_probs.gather(-1, targets.ids)
    for temperature in (1.25, 1.5, 1.75, 2.5, 3, 5, 6.5, 8, 9.5):
        tail = tail_of(log_probs, targets.ids, temperature)
        exact = torch.softmax(torch.cat([head / temperature, tail.unsqueeze(-1)], dim=-1), dim=-1)[:, :-1].sum(dim=-1)
        found = targets.log_probs(temperature, allow_interpolation=True)[:, :-1].exp().sum(dim=-1)
        assert (found - exact).abs().max() < 1e-2
        lower, upper = targets.tail_bounds(temperature)
        assert (lower - 1e-4 <= tail).all()
        assert (tail <= upper + 1e-4).all()


@pytest.mark.parametrize("shape", [(10,), (300,), (3, 50)])
@pytest.mark.parametrize("top_p", [None, 0.1, 0.55, 1.0])
@BOTH_VALUES
def test_classes_that_are_all_alike_need_no_number_each(shape, top_p, values):
    encoding = TopK(k=10, values=values, top_p=top_p, min_k=2, temperatures=[1, 4])
    output = OutputSpec(name="logits", shape=shape)
    alike = encoding.decode(encoding.encode_alike(shape), output)
    said = decoded(encoding, torch.zeros(1, *shape, dtype=torch.float64))
    assert alike.ids.equal(said.ids)
    torch.testing.assert_close(alike.head, said.head, rtol=0, atol=1e-3)
    torch.testing.assert_close(alike.tails, said.tails, rtol=1e-5, atol=1e-5)
    huge = encoding.encode_alike((*shape[:-1], 2**31))
    assert {each: array.shape for each, array in huge.items()} == {
        each: (1, *spec.shape) for each, spec in encoding.arrays(output).items()
    }
