"""Weights and training state on disk: safetensors for weights, `weights_only` for the rest; nothing is unpickled."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from kdpipe import durable
from kdpipe.errors import ConfigError


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state as safetensors, durably; tied weights are written under each of their names."""
    # safetensors refuses tensors that share memory, hence the copy.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    durable.write_bytes(path, safetensors.torch.save(state))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load safetensors, or a PyTorch file of plain tensors, into a model of the same names and shapes.

    Raises `ConfigError` when the file is absent, holds anything but tensors, or does not fit.
    """
    state = read_weights(path)
    check_fit(model, state, path)
    model.load_state_dict(state)


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: Path, *, shapes: bool = True) -> None:
    """Raise `ConfigError` unless tensors of a file have a model's names and, where asked, its shapes.

    And unless they are numbers, of its kind: floating ones for floating ones, none of them NaN.
    """
    own = model.state_dict()
    both = sorted(own.keys() & state.keys())
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in both
        if shapes and own[name].shape != state[name].shape
    ]
    no_numbers = [name for name in both if own[name].is_floating_point() and not _are_numbers(state[name])]
    if missing or unknown or wrong or no_numbers:
        raise ConfigError(
            f"{path} does not fit the model {type(model).__name__}: "
            + "; ".join(
                f"{what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
                for what, names in (
                    ("absent", missing),
                    ("unknown", unknown),
                    ("of another shape", wrong),
                    ("NaN, or no floating numbers", no_numbers),
                )
                if names
            )
        )


def _are_numbers(weights: Tensor) -> bool:
    return weights.is_floating_point() and not bool(weights.isnan().any())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU."""
    if not path.is_file():
        raise ConfigError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load(path.read_bytes())
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # of a file that is refused anyway
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parsers raise their own kinds; each means an unusable file
        first_line = (
            re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split(". ")[0].splitlines()[0]
            if str(error)
            else type(error).__name__
        )
        raise ConfigError(
            f"{path} is no safetensors file and no PyTorch file of plain tensors ({first_line}). Save the weights with "
            "safetensors.torch.save_file(model.state_dict(), …)."
        ) from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(each, Tensor) for name, each in state.items()
    ):
        raise ConfigError(f"{path} does not hold a state dict: a mapping of names to tensors was expected")
    return dict(state)


def num_parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_training(path: Path, state: Mapping[str, Any]) -> None:
    """Write training state (tensors, numbers, strings in dicts and lists), durably."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    durable.write_bytes(path, buffer.getbuffer())


def load_training(path: Path) -> dict[str, Any] | None:
    """What `save_training` wrote, or None where there is nothing."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
