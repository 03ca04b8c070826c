"""What holds for every encoding of the closed set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdpipe.encodings import (
    ENCODINGS,
    Dense,
    Features,
    FeaturesInt8,
    Int8,
    Sampled,
    TargetEncoding,
    TopK,
    encoding_from_json,
)
from kdpipe.errors import ConfigError
from kdpipe.targets import OutputSpec

LOGITS = OutputSpec(name="logits", shape=(4, 30))
FEATURES = OutputSpec(name="hidden", shape=(4, 30), kind="features")
KEYS = np.arange(6, dtype=np.uint64)
EVERY = [
    Dense(),
    Dense(dtype="float32", compact=True),
    Int8(),
    Int8(masked_classes=True, compact=True),
    TopK(k=5),
    TopK(k=5, values="int8", temperatures=(2, 4), top_p=0.9, min_k=2, compact=True),
    Sampled(draws=7),
    Sampled(draws=7, head=3, seed=5, stratified=True, compact=True),
    Features(),
    Features(dtype="float32", compact=True),
    FeaturesInt8(),
    FeaturesInt8(whole_row=True),
]
each_encoding = pytest.mark.parametrize("encoding", EVERY, ids=str)


def output_of(encoding: TargetEncoding) -> OutputSpec:
    return FEATURES if isinstance(encoding, Features | FeaturesInt8) else LOGITS


def test_the_set_is_closed():
    assert list(ENCODINGS) == ["dense", "int8", "topk", "sampled", "features", "features_int8"]
    assert {type(encoding) for encoding in EVERY} == set(ENCODINGS.values())


@each_encoding
def test_json_names_the_encoding(encoding):
    value = encoding.to_json()
    assert encoding_from_json(value) == encoding
    assert ENCODINGS[value["name"]] is type(encoding)
    assert ("compact" in value) == encoding.compact


@each_encoding
def test_arrays_are_those_announced(encoding):
    output = output_of(encoding)
    encoding.check(output)
    encoded = encoding.encode(torch.randn(6, 4, 30), KEYS)
    announced = encoding.arrays(output)
    assert {name: (str(each.dtype), each.shape[1:]) for name, each in encoded.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in announced.items()
    }
    assert all(spec.compressed == encoding.compact for spec in announced.values())
    assert sum(each.nbytes for each in encoded.values()) == 6 * sum(spec.row_bytes for spec in announced.values())


@each_encoding
def test_a_row_does_not_depend_on_the_others(encoding):
    values = torch.randn(6, 4, 30, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 5])
    together, apart = encoding.encode(values, KEYS), encoding.encode(values[order], KEYS[order.numpy()])
    assert all(np.array_equal(together[suffix][order.numpy()], apart[suffix]) for suffix in apart)


@each_encoding
def test_arrays_of_zeros_decode_to_finite_targets(encoding):
    """What a store holds for a row that the teacher did not answer."""
    output = output_of(encoding)
    zeros = {name: np.zeros((2, *spec.shape), spec.dtype) for name, spec in encoding.arrays(output).items()}
    targets = encoding.decode(zeros, output)
    tensors = [each for each in vars(targets).values() if isinstance(each, torch.Tensor)]
    assert all(torch.isfinite(each).all() for each in tensors)


@each_encoding
def test_refuses_the_other_kind_of_output(encoding):
    wrong = LOGITS if output_of(encoding) is FEATURES else FEATURES
    with pytest.raises(ConfigError, match="the choices for it are"):
        encoding.check(wrong)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "dens"}, "'dens' is unknown; the choices are dense, int8, topk, sampled"),
        ({"name": "dense", "dtype": "bfloat16"}, "choices are float16, float32"),
        ({"name": "dense", "bits": 8}, "bits"),
        ({"name": "topk"}, "k"),
        ({"name": "topk", "k": 0}, "k is 0"),
        ({"name": "topk", "k": 3, "min_k": 4}, "min_k 4"),
        ({"name": "topk", "k": 3, "values": "int4"}, "choices are float16, int8"),
        ({"name": "topk", "k": 3, "top_p": 1.5}, "top_p is 1.5"),
        ({"name": "topk", "k": 3, "temperatures": [0]}, "temperatures are"),
        ({"name": "sampled", "draws": 0}, "draws is 0"),
        ({"name": "sampled", "draws": 2**16}, "draws is 65536"),
        ({"name": "sampled", "draws": 5, "head": -1}, "head is -1"),
        ({"name": "sampled", "draws": 5, "seed": -1}, "seed is -1"),
    ],
)
def test_refuses_what_it_does_not_know(value, message):
    with pytest.raises(ConfigError, match=message):
        encoding_from_json(value)


@pytest.mark.parametrize(
    ("encoding", "num_classes", "message"),
    [
        (TopK(k=11), 10, "k is 11, but the output 'logits' has 10"),
        (Sampled(draws=5, head=10), 10, "head is 10, but the output 'logits' has 10"),
        (TopK(k=5), 2**31 + 1, "up to 2,147,483,648"),
        (Sampled(draws=5), 2**31 + 1, "up to 2,147,483,648"),
    ],
)
def test_refuses_outputs_that_it_cannot_hold(encoding, num_classes, message):
    with pytest.raises(ConfigError, match=message):
        encoding.check(OutputSpec(name="logits", shape=(num_classes,)))


@pytest.mark.parametrize(
    ("num_classes", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**31, "uint32")]
)
@pytest.mark.parametrize("encoding", [TopK(k=5), Sampled(draws=5)])
def test_ids_are_as_narrow_as_the_classes_allow(encoding, num_classes, dtype):
    output = OutputSpec(name="logits", shape=(num_classes,))
    encoding.check(output)
    assert encoding.arrays(output)[".ids"].dtype == dtype
