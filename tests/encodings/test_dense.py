from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.encodings import ArraySpec, Dense
from kdpipe.targets import DenseTargets, OutputSpec

OUTPUT = OutputSpec(name="logits", shape=(5,))
DTYPES = pytest.mark.parametrize("dtype", ["float16", "float32"])


@st.composite
def logits_up_to(draw: st.DrawFn, limit: float) -> Tensor:
    """float32 logits `[B, C]` between -limit and limit, at some scale, sometimes with ties."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 6)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 2 * torch.rand(shape, generator=random) - 1
    logits = logits.round(decimals=1) if draw(st.booleans()) else logits
    return logits * limit * 10.0 ** -draw(st.integers(0, 8))


def decoded(encoding: Dense, logits: Tensor) -> DenseTargets:
    return encoding.decode(encoding.encode(logits), OutputSpec(name="logits", shape=tuple(logits.shape[1:])))


def below_max(logits: Tensor) -> Tensor:
    return logits - logits.amax(dim=-1, keepdim=True)


def float16_bound(below: Tensor) -> Tensor:
    return below.double().abs() * 2.0**-11 + 2.0**-25


@given(logits=logits_up_to(1e4))
def test_float32_is_exact(logits):
    targets = decoded(Dense(dtype="float32"), logits)
    assert torch.equal(targets.values, below_max(logits))
    assert torch.equal(targets.row_max, logits.amax(dim=-1))


@given(logits=logits_up_to(1e4))
def test_float16_is_within_its_bound(logits):
    targets = decoded(Dense(), logits)
    below = below_max(logits)
    assert ((targets.values.double() - below.double()).abs() <= float16_bound(below)).all()
    assert torch.equal(targets.row_max, logits.amax(dim=-1))


def test_the_float16_bound_is_no_looser_than_float16():
    below = -torch.linspace(0.001, 60, 20001)
    logits = torch.cat([torch.zeros(1), below]).unsqueeze(0)
    error = (decoded(Dense(), logits).values[0, 1:].double() - below.double()).abs()
    assert (error / float16_bound(below)).max() > 0.95


@given(logits=logits_up_to(10), temperature=st.floats(0.5, 10))
def test_log_probs_are_exact_at_every_temperature(logits, temperature):
    targets = decoded(Dense(dtype="float32"), logits)
    expected = torch.log_softmax(logits.double() / temperature, dim=-1)
    assert (targets.log_probs(temperature).double() - expected).abs().max() < 1e-5


@given(logits=logits_up_to(1e4), temperature=st.floats(0.5, 10))
def test_log_probs_of_float16_are_within_twice_its_bound(logits, temperature):
    targets = decoded(Dense(), logits)
    expected = torch.log_softmax(logits.double() / temperature, dim=-1)
    bound = 2 * float16_bound(below_max(logits)).amax(dim=-1, keepdim=True) / temperature
    rounding = 1e-6 * (1 + expected.abs())
    assert ((targets.log_probs(temperature).double() - expected).abs() <= bound + rounding).all()


@given(logits=logits_up_to(1e4))
def test_logits_are_restored(logits):
    row_max = logits.amax(dim=-1, keepdim=True).double()
    below = below_max(logits)
    rounding = 2.0**-23 * (below.double().abs() + row_max.abs() + 2.0**-100)
    exact = decoded(Dense(dtype="float32"), logits).logits()
    assert ((exact.double() - logits.double()).abs() <= rounding).all()
    narrow = decoded(Dense(), logits).logits()
    assert ((narrow.double() - logits.double()).abs() <= rounding + float16_bound(below)).all()
    assert torch.equal(narrow.amax(dim=-1), logits.amax(dim=-1))


@DTYPES
@given(logits=logits_up_to(1e4), data=st.data())
def test_masked_classes_stay_masked_and_change_no_other(dtype, logits, data):
    masked = torch.from_numpy(data.draw(hnp.arrays(np.bool_, logits.shape)))
    masked[torch.arange(len(logits)), logits.argmax(dim=-1)] = False
    encoding = Dense(dtype=dtype)
    plain = decoded(encoding, logits)
    targets = decoded(encoding, logits.masked_fill(masked, -torch.inf))
    assert torch.equal(targets.masked, masked)
    assert torch.equal(torch.isneginf(targets.logits()), masked)
    assert torch.equal(targets.values[~masked], plain.values[~masked])
    assert (targets.log_probs(4.0).exp()[masked] == 0).all()


def test_a_class_far_below_is_no_masked_class():
    logits = torch.tensor([[0.0, -65504.0, -65519.0, -65521.0, -1e9, -torch.inf]])
    values = decoded(Dense(), logits).values
    assert values.tolist() == [[0.0, -65504.0, -65504.0, -65504.0, -65504.0, -float("inf")]]


@DTYPES
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("given_as", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arrays_are_those_announced(dtype, shape, given_as):
    encoding = Dense(dtype=dtype)
    encoded = encoding.encode(torch.zeros(2, *shape, dtype=given_as))
    announced = encoding.arrays(OutputSpec(name="logits", shape=shape))
    assert {name: ArraySpec(dtype=str(each.dtype), shape=each.shape[1:]) for name, each in encoded.items()} == announced
    assert sum(each.nbytes for each in encoded.values()) == 2 * sum(spec.row_bytes for spec in announced.values())


def test_decoding_copies_nothing():
    arrays = Dense().encode(torch.randn(4, 3))
    targets = Dense().decode(arrays, OUTPUT)
    arrays[""][0, 0] = -7
    arrays[".row_max"][0] = 9
    assert targets.values[0, 0] == -7
    assert targets.row_max[0] == 9


def test_json_is_the_one_of_older_stores():
    assert Dense().to_json() == {"name": "dense", "dtype": "float16"}
    assert Dense(dtype="float32", compact=True).to_json() == {"name": "dense", "dtype": "float32", "compact": True}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_far_below_the_maximum_is_no_mask(dtype):
    encoding, output = Dense(dtype=dtype), OutputSpec(name="logits", shape=(4,))
    logits = torch.tensor([[3e38, -3e38, 0.0, -torch.inf]])
    values = encoding.decode(encoding.encode(logits), output).values
    assert torch.isneginf(values).tolist() == [[False, False, False, True]]
