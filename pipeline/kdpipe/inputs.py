"""What a preprocess makes and a model takes; the logits and other outputs in what the model gives back.

Shapes: B batch, T tokens, C classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from kdpipe.errors import ConfigError

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""One tensor `[B, …]`, or several by the names of `forward`'s arguments."""
LOGITS = "logits"
ATTENTION_MASK = "attention_mask"
_NAMES_SHOWN = 20
SURE_ROWS = 256
"""So many single logits tell a sigmoid's output from logits that happen to be small."""
_CLOSE = 0.05


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What a model gives for its inputs."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The same inputs with every tensor changed."""
    return {name: change(each) for name, each in inputs.items()} if isinstance(inputs, Mapping) else change(inputs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Every tensor."""
    return list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]


def num_rows(inputs: Inputs) -> int:
    """B."""
    return len(tensors_of(inputs)[0])


def described(inputs: Inputs) -> str:
    """Shapes, for a message."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {list(each.shape)}" for name, each in inputs.items())
    return str(list(inputs.shape))


def trimmed(inputs: Inputs) -> Inputs:
    """Without the last columns that `attention_mask [B, T]` hides in every row; at least one column is left."""
    if not isinstance(inputs, Mapping) or ATTENTION_MASK not in inputs:
        return inputs
    mask = inputs[ATTENTION_MASK]
    seen = mask.any(dim=0).nonzero()
    length = int(seen[-1]) + 1 if len(seen) else 1
    return {name: each[:, :length] if each.shape[:2] == mask.shape else each for name, each in inputs.items()}


def by_name(returned: Any) -> dict[str, Any]:
    """What a model gave, by name: a tensor is `logits`, parts of tuples go by position (`1`, `hidden_states.2`)."""
    return {LOGITS: returned} if isinstance(returned, Tensor) else parts_of(returned)


def parts_of(value: Any, prefix: str = "") -> dict[str, Any]:
    """The parts of nested dicts and tuples by dotted name, below `prefix`."""
    if isinstance(value, Mapping):
        items = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", range(len(value)))
        items = [(str(key), each) for key, each in zip(fields, value, strict=True)]
    else:
        return {prefix: value} if prefix else {}
    parts: dict[str, Any] = {}
    for key, each in items:
        parts |= parts_of(each, f"{prefix}.{key}" if prefix else key)
    return parts


def class_logits(logits: Tensor, num_classes: int) -> Tensor:
    """Logits `[B, …, C]`; the single logit z of a sigmoid head, `[B]` or `[B, 1]`, is two classes `[0, z]`."""
    if num_classes != 2 or (logits.ndim > 1 and logits.shape[-1] != 1):
        return logits
    single = logits if logits.ndim > 1 else logits.unsqueeze(-1)
    return torch.cat([torch.zeros_like(single), single], dim=-1)


def look_like_probabilities(logits: Tensor) -> bool:
    """Whether logits `[B, …, C]` are what a softmax gives: from 0 to 1, with a sum of 1, and not all 0 or 1."""
    values = logits.detach().double()
    is_sure = bool((values == values.round()).all())
    if values.shape[-1] < 2 or is_sure or not bool(((values >= 0) & (values <= 1)).all()):
        return False
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    return bool(((values.sum(dim=-1) - 1).abs() < tolerance).all())


def look_like_a_sigmoids(logits: Tensor) -> bool:
    """Whether single logits, `[0, z]` of two classes (`class_logits`), are what a sigmoid gives.

    `SURE_ROWS` or more numbers from 0 to 1, some of them close to 0 and some to 1: logits would go beyond.
    """
    if logits.shape[-1] != 2 or logits[..., 0].numel() < SURE_ROWS or bool(logits[..., 0].any()):
        return False
    single = logits[..., 1].detach().double()
    low, high = (float(each) for each in single.aminmax())
    return 0 <= low < _CLOSE and 1 - _CLOSE < high <= 1 and not bool((single == single.round()).all())


def about_classes(shape: Sequence[int], num_classes: int) -> str:
    """What to do about logits of `shape` that are not of `num_classes`, for the end of a message."""
    about = f"task.num_classes is {num_classes}"
    if len(shape) > 2 and shape[-1] > num_classes:
        about += (
            f"; where a vocabulary is padded, set it to the model's number of outputs, {shape[-1]}, which teacher and "
            "student must share"
        )
    return f" ({about})"


class Head:
    """Takes the logits out of what a model gives: the output called `name`, or the only one."""

    def __init__(self, name: str | None = None, num_classes: int | None = None) -> None:
        """`name`: a key or a position (None: `logits`, or the only output)."""
        self._name, self._num_classes = name, num_classes

    def __call__(self, returned: Any) -> Tensor:
        """Logits `[B, C]` or `[B, T, C]`. Raises `ConfigError` with the outputs that there are."""
        parts = by_name(returned)
        name = self._name or (LOGITS if LOGITS in parts else next(iter(parts)) if len(parts) == 1 else LOGITS)
        logits = parts.get(name)
        if logits is None and isinstance(returned, tuple) and name.isdecimal() and int(name) < len(returned):
            logits = returned[int(name)]  # of a named tuple, too
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"the model's forward gives no tensor {name!r}; it gives {', '.join(parts) or type(returned).__name__}."
                " Name the one that holds the logits: `logits: NAME` (or its position) beside `model:`"
            )
        return logits if self._num_classes is None else class_logits(logits, self._num_classes)


class Outputs:
    """What a model gives, by name: parts of what forward returns (`1`, `hidden_states.2`), and outputs of submodules.

    A submodule is named by its dotted path, and is listened to only if it is asked for; of one that is called several
    times the last call counts.
    """

    def __init__(self, model: nn.Module, names: Collection[str], head: Head) -> None:
        """`names` are those that are asked for besides the logits, which `head` takes out."""
        self._model, self._head, self.has_features = model, head, bool(names)
        self._submodules = {name: each for name, each in model.named_modules() if name}
        paths = {path for name in names for path in _paths(name)}
        self._listened = {path: each for path, each in self._submodules.items() if path in paths}
        self._heard: dict[str, Any] = {}

    def __call__(self, inputs: Inputs) -> Any:
        """What forward returns, as it comes."""
        self._heard = {}
        hooks = [each.register_forward_hook(partial(self._hear, path)) for path, each in self._listened.items()]
        try:
            # Features may have a value per token, so that all batches must be as long.
            return call(self._model, inputs if self.has_features else trimmed(inputs))
        finally:
            for hook in hooks:
                hook.remove()

    def named(self, returned: Any) -> dict[str, Any]:
        """Every part by name, `logits` and the outputs of submodules among them. Raises `ConfigError`."""
        logits = self._head(returned)
        heard = {part: each for name, value in self._heard.items() for part, each in parts_of(value, name).items()}
        self._heard = {}
        return heard | by_name(returned) | {LOGITS: logits}

    def tensor(self, name: str, said: Mapping[str, Any], where: str) -> Tensor:
        """One output. Raises `ConfigError` with what exists."""
        value = said.get(name)
        if not isinstance(value, Tensor):
            what = "does not exist"
            if name in said:
                what = f"is {kind(value)} and no tensor"
            elif name in self._submodules and not any(each.startswith(f"{name}.") for each in said):
                what = "is a submodule that forward does not call"
            raise ConfigError(f"{where} {what}: {self._choices(name, said)}")
        return value

    def shape(self, name: str, said: Mapping[str, Any], where: str) -> tuple[int, ...]:
        """Shape per row of an output, from what was said about one row. Raises `ConfigError` with what exists."""
        value = self.tensor(name, said, where)
        if value.ndim == 0 or len(value) != 1:
            raise ConfigError(
                f"{where} is {kind(value)} for one row; expected a tensor of shape [1, …]. Take another one, or give "
                "the part that you mean a key of its own in the dict that forward returns."
            )
        return tuple(value.shape[1:])

    def _hear(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # A copy, as the next module may work in place (ReLU(inplace=True), say).
        self._heard[name] = tree_map_only(Tensor, Tensor.clone, output)

    def _choices(self, name: str, said: Mapping[str, Any]) -> str:
        existing = [*dict.fromkeys([*said, *self._submodules])]
        nearest = difflib.get_close_matches(name, existing, n=_NAMES_SHOWN, cutoff=0)
        shown = existing if len(existing) <= _NAMES_SHOWN else [*nearest, f"… ({len(existing)} in all)"]
        return f"forward gives {', '.join(said)}; all names, with those of submodules: {', '.join(shown)}"


def _paths(name: str) -> list[str]:
    """`a`, `a.b` and `a.b.c` of `a.b.c`."""
    steps = name.split(".")
    return [".".join(steps[:length]) for length in range(1, len(steps) + 1)]


def kind(value: Any) -> str:
    """What a value is, for a message: a tensor's shape (and dtype, unless floating), or its type."""
    if not isinstance(value, Tensor):
        return "nothing" if value is None else type(value).__name__
    return f"{list(value.shape)}" + ("" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}")
