from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.encodings import Features, FeaturesInt8, encoding_from_json
from kdpipe.errors import ConfigError
from kdpipe.targets import OutputSpec

OUTPUT = OutputSpec(name="pooled", shape=(16,), kind="features")
SEEDS, SCALES = st.integers(0, 2**31), st.integers(-6, 4)


def features(seed: int, scale: int) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) * 10.0**scale


@given(seed=SEEDS, scale=SCALES)
def test_floats_are_within_their_bound(seed, scale):
    values = features(seed, scale)
    assert torch.equal(
        Features(dtype="float32").decode(Features(dtype="float32").encode(values), OUTPUT).values, values
    )
    found = Features().decode(Features().encode(values), OUTPUT).values.double()
    assert ((found - values.double()).abs() <= values.double().abs() * 2.0**-11 + 2.0**-25).all()


@given(seed=SEEDS, scale=SCALES, offset=st.floats(-100, 100))
def test_bytes_are_within_half_a_step(seed, scale, offset):
    values = features(seed, scale) + offset
    wide = values.double()
    found = FeaturesInt8().decode(FeaturesInt8().encode(values), OUTPUT).values.double()
    step = (wide.amax(dim=-1, keepdim=True) - wide.amin(dim=-1, keepdim=True)) / 255
    rounding = 2.0**-22 * wide.abs().amax(dim=-1, keepdim=True)
    assert ((found - wide).abs() <= step / 2 + rounding).all()


@given(seed=SEEDS, scale=SCALES)
def test_bytes_of_maps_have_one_range_per_row(seed, scale):
    output = OutputSpec(name="maps", shape=(8, 2, 3), kind="features")
    values = torch.randn(5, 8, 2, 3, generator=torch.Generator().manual_seed(seed)) * 10.0**scale
    encoding = FeaturesInt8(whole_row=True)
    assert encoding_from_json(encoding.to_json()) == encoding
    assert FeaturesInt8().to_json() == {"name": "features_int8"}
    encoded, announced = encoding.encode(values), encoding.arrays(output)
    assert {name: each.shape[1:] for name, each in encoded.items()} == {"": (8, 2, 3), ".scale": (), ".zero": ()}
    assert sum(np.dtype(each.dtype).itemsize * math.prod(each.shape) for each in announced.values()) == 48 + 8
    found, wide = encoding.decode(encoded, output).values.double(), values.double()
    step = (wide.flatten(1).amax(dim=1) - wide.flatten(1).amin(dim=1)) / 255
    assert ((found - wide).abs() <= (step / 2 + 2.0**-22 * wide.abs().max()).view(-1, 1, 1, 1)).all()


def test_refuses_what_float16_cannot_hold():
    with pytest.raises(ConfigError, match="Set features: float32"):
        Features().encode(torch.tensor([[7e4]]))


def test_refuses_an_unknown_dtype():
    with pytest.raises(ConfigError, match="choices are float16, float32"):
        Features(dtype="bfloat16")


@pytest.mark.parametrize("encoding", [Features(), Features(dtype="float32", compact=True), FeaturesInt8()])
def test_arrays_are_those_announced(encoding):
    output = OutputSpec(name="hidden", shape=(3, 16), kind="features")
    encoded = encoding.encode(torch.randn(2, 3, 16))
    announced = {name: (spec.dtype, spec.shape) for name, spec in encoding.arrays(output).items()}
    assert {name: (str(each.dtype), each.shape[1:]) for name, each in encoded.items()} == announced
    assert encoding.decode(encoded, output).values.shape == (2, 3, 16)
