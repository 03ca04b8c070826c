from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kdpipe.checkpoint import load_training, load_weights, num_parameters, read_weights, save_training, save_weights
from kdpipe.errors import ConfigError
from kdpipe.models.mlp import MLP
from kdpipe.models.resnet import ResNet


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def resnet(seed: int) -> nn.Module:
    """A small model with parameters, buffers and an integer buffer, all changed from their start."""
    torch.manual_seed(seed)
    model = ResNet((1, 8, 8), 3, depth=8, width=2)
    model(torch.randn(4, 1, 8, 8))
    return model


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor), name


def test_weights_come_back(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(resnet(0), path)
    other = resnet(1)
    load_weights(other, path)
    assert_same_state(other, resnet(0))
    assert not torch.equal(resnet(1).head.weight, resnet(0).head.weight)


def test_weights_are_plain_safetensors(tmp_path):
    save_weights(resnet(0), tmp_path / "model.safetensors")
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found.keys() == resnet(0).state_dict().keys()
    assert torch.equal(found["stem.0.weight"], resnet(0).state_dict()["stem.0.weight"])
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_bits_in_every_dtype(dtype, tmp_path):
    model = MLP((3,), 2, hidden=[4]).to(dtype)
    save_weights(model, tmp_path / "model.safetensors")
    found = read_weights(tmp_path / "model.safetensors")
    assert {each.dtype for each in found.values()} == {dtype}
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_tied_and_transposed_weights_come_back(tmp_path):
    def model() -> nn.Module:
        tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 4))
        tied[1].weight = tied[0].weight
        tied[2].weight = nn.Parameter(torch.randn(2, 4).T)
        return tied

    first, second = model(), model()
    save_weights(first, tmp_path / "model.safetensors")
    load_weights(second, tmp_path / "model.safetensors")
    assert_same_state(second, first)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_pytorch_files_of_plain_tensors_load(wrap, tmp_path):
    torch.save(wrap(resnet(0).state_dict()), tmp_path / "model.pt")
    other = resnet(1)
    load_weights(other, tmp_path / "model.pt")
    assert_same_state(other, resnet(0))


def write_pickle(content, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [torch.save, write_pickle])
@pytest.mark.parametrize("wrap", [lambda code: code, lambda code: {"weight": code}, lambda code: {"state_dict": code}])
@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors"])
def test_code_in_a_weights_file_never_runs(write, wrap, name, tmp_path):
    path, trace = tmp_path / name, tmp_path / "the code ran"
    write(wrap(Code(trace)), path)
    with pytest.raises(ConfigError, match=f"{name} is no safetensors file and no PyTorch file of plain tensors"):
        load_weights(nn.Linear(1, 1), path)
    assert not trace.exists()
    if write is torch.save:
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    else:
        pickle.loads(path.read_bytes())  # noqa: S301
    assert trace.exists(), "the file held no code to begin with"


def test_code_in_a_training_state_never_runs(tmp_path):
    path, trace = tmp_path / "checkpoint", tmp_path / "the code ran"
    torch.save({"step": Code(trace)}, path)
    with pytest.raises(pickle.UnpicklingError):
        load_training(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_refuses_what_is_no_weights_file(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is no safetensors file"):
        read_weights(tmp_path / name)


def test_refuses_a_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(resnet(0), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors file"):
        load_weights(resnet(1), path)


@pytest.mark.parametrize(
    "content", [torch.ones(3), [torch.ones(3)], {"a": 1}, {0: torch.ones(3)}, {"state_dict": {"a": "text"}}]
)
def test_refuses_what_is_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="does not hold a state dict: a mapping of names"):
        load_weights(nn.Linear(1, 1), tmp_path / "model.pt")


def test_refuses_an_absent_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no weights file .*absent\.pt"):
        load_weights(nn.Linear(1, 1), tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.weight": None}, "absent: layers.0.weight"),
        ({"another.weight": torch.ones(2)}, "unknown: another.weight"),
        ({"layers.3.weight": torch.ones(2, 5)}, "of another shape: layers.3.weight [2, 5] for [2, 4]"),
        (
            {"layers.0.weight": None, "another.weight": torch.ones(2), "layers.3.weight": torch.ones(2, 5)},
            "absent: layers.0.weight; unknown: another.weight; of another shape: layers.3.weight [2, 5] for [2, 4]",
        ),
        ({"layers.0.weight": torch.full((4, 3), torch.nan)}, "NaN, or no floating numbers: layers.0.weight"),
        ({"layers.0.weight": torch.ones(4, 3, dtype=torch.int8)}, "NaN, or no floating numbers: layers.0.weight"),
        ({f"extra{index}": torch.ones(1) for index in range(9)}, "unknown: extra0, extra1, extra2, extra3 …"),
    ],
)
def test_refuses_other_names_and_shapes_by_name(changes, message, tmp_path):
    path = tmp_path / "model.safetensors"
    own = MLP((3,), 2, hidden=[4])
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in before.items()} | changes
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(ConfigError) as raised:
        load_weights(own, path)
    assert str(raised.value) == f"{path} does not fit the model MLP: {message}"
    assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in before.items())


def test_training_state_comes_back(tmp_path):
    state = {
        "step": 3,
        "model": resnet(0).state_dict(),
        "history": [{"step": 1, "loss": 0.1 + 0.2}],
        "sums": {"loss": float("inf")},
    }
    path = tmp_path / "checkpoint"
    assert load_training(path) is None
    save_training(path, state)
    found = load_training(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in state["model"].items())
    assert {**found, "model": None} == {**state, "model": None}


def test_num_parameters_counts_frozen_ones_and_no_buffers():
    model = MLP((3,), 2, hidden=[4])
    model.layers[0].weight.requires_grad_(False)
    model.register_buffer("buffer", torch.zeros(100))
    assert num_parameters(model) == (3 + 1) * 4 + (4 + 1) * 2
