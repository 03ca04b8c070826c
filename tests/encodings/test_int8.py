from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.encodings import ArraySpec, Int8
from kdpipe.errors import ConfigError
from kdpipe.targets import DenseTargets, OutputSpec


def decoded(encoding: Int8, logits: Tensor) -> DenseTargets:
    return encoding.decode(encoding.encode(logits), OutputSpec(name="logits", shape=tuple(logits.shape[1:])))


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Logits `[B, C]` of any range up to 1e4, float32 or float64, sometimes with ties or all equal."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 300)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = (2 * torch.rand(shape, generator=random, dtype=torch.float64) - 1) * 10.0 ** draw(st.integers(-4, 4))
    logits = logits.round(decimals=1) if draw(st.booleans()) else logits
    return logits if draw(st.booleans()) else logits.float()


def step_of(logits: Tensor) -> Tensor:
    wide = logits.double()
    return (wide.amax(dim=-1, keepdim=True) - wide.amin(dim=-1, keepdim=True)) / 255


@given(logits=rows())
def test_no_value_is_off_by_more_than_half_a_step(logits):
    targets = decoded(Int8(), logits)
    below = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    step = step_of(logits)
    error = (targets.values.double() - below).abs()
    assert (error <= step / 2 + 255 * step * 2.0**-22).all()
    assert torch.equal(targets.row_max, logits.amax(dim=-1).float())


def test_half_a_step_is_reached_and_nothing_is_clipped():
    logits = torch.cat([torch.zeros(1), -torch.linspace(0, 40, 5001)]).unsqueeze(0)
    error = (decoded(Int8(), logits).values.double() - logits.double()).abs()
    assert error.max() > 0.49 * 40 / 255
    assert error[0, -1] < 1e-5, "the lowest class is where it was, however far below"


@given(logits=rows(), temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_kl_is_within_its_bound_at_every_temperature(logits, temperature):
    exact = torch.log_softmax(logits.double() / temperature, dim=-1)
    stored = torch.log_softmax(decoded(Int8(), logits).values.double() / temperature, dim=-1)
    half = step_of(logits).squeeze(-1) * (1 + 2.0**-12) / 2
    bound = half.square() / (2 * temperature**2) + 1e-12
    for p, q in ((exact, stored), (stored, exact)):
        assert ((p.exp() * (p - q)).sum(dim=-1) <= bound).all()


def test_bytes_per_row():
    specs = Int8().arrays(OutputSpec(name="logits", shape=(1000,)))
    assert sum(spec.row_bytes for spec in specs.values()) == 1008
    masked = Int8(masked_classes=True, compact=True).arrays(OutputSpec(name="logits", shape=(7, 1000)))
    assert masked[".masked"] == ArraySpec(dtype="uint8", shape=(7, 125), compressed=True)
    assert all(spec.compressed for spec in masked.values())


@given(logits=rows(), data=st.data())
def test_a_masked_class_is_a_bit_and_does_not_widen_the_step(logits, data):
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=logits.numel(), max_size=logits.numel())))
    masked = masked.view(logits.shape)
    masked[torch.arange(len(logits)), logits.argmax(dim=-1)] = False
    targets = decoded(Int8(masked_classes=True), logits.masked_fill(masked, -torch.inf))
    assert torch.equal(targets.masked, masked)
    lowest = torch.where(masked, torch.inf, logits.double()).amin(dim=-1, keepdim=True)
    largest = logits.double().amax(dim=-1, keepdim=True)
    allowed = ((largest - lowest) / 510 + (largest - lowest) * 2.0**-22).expand_as(logits)
    error = (targets.values.double() - (logits.double() - largest)).abs()
    assert (error[~masked] <= allowed[~masked]).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [(-torch.inf, "set masked_classes: true"), (torch.finfo(torch.float32).min, "let it say -inf")],
)
def test_a_mask_is_never_quantised(value, message):
    with pytest.raises(ConfigError, match=message):
        Int8().encode(torch.tensor([[1.0, value, 0.0]]))


def test_tokens_are_rows():
    logits = torch.randn(3, 4, 9)
    together, apart = Int8().encode(logits), Int8().encode(logits.flatten(0, 1))
    assert all(np.array_equal(together[suffix].reshape(apart[suffix].shape), apart[suffix]) for suffix in apart)
    assert {name: (str(each.dtype), each.shape[1:]) for name, each in together.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in Int8().arrays(OutputSpec(name="logits", shape=(4, 9))).items()
    }
