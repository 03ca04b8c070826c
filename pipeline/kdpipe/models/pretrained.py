"""Models of Hugging Face Transformers, from a configuration (random weights) or a checkpoint (`kdpipe.huggingface`).

`config` is a mapping with `model_type` ("bert", "vit", "gpt2", …) and the keys of that type's configuration; `path` a
folder that `save_pretrained` wrote; `hub` "name@commit" of the Hugging Face Hub. One of the three. Needs the package
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from kdpipe.config import did_you_mean
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import digest_path
from kdpipe.huggingface import Checkpoint, check_text_fits, first_line, library, pad_with, quietly

Dtype = Literal["float32", "bfloat16", "float16"]
Make = TypeVar("Make", bound=Callable[..., nn.Module])


def _reading(make: Make) -> Make:
    """With `reads(arguments, root)`: the digest of the folder `path`, which a fingerprint covers."""

    def reads(arguments: Mapping[str, Any], root: Path) -> dict[str, str]:
        path = arguments.get("path")
        return {} if path is None else {str(path): digest_path(root / path)}

    make.reads = reads  # type: ignore[attr-defined]
    return make


@_reading
def sequence_classifier(
    num_classes: int,
    config: dict[str, Any] | None = None,
    path: Path | None = None,
    hub: str | None = None,
    vocab_size: int | None = None,
    pad_id: int | None = None,
    max_length: int | None = None,
    dtype: Dtype = "float32",
) -> nn.Module:
    """A text classifier: `input_ids`, `attention_mask` -> `logits [B, C]`. A checkpoint may lack its head.

    Raises `ConfigError` where the tokenizer's `vocab_size` or `max_length` exceeds the model's embeddings.
    """
    model: nn.Module = _model(
        "AutoModelForSequenceClassification",
        (config, path, hub),
        dtype,
        num_labels=num_classes,
        vocab_size=vocab_size,
        pad_token_id=pad_id,
    )
    check_text_fits(model, vocab_size, max_length)
    pad_with(model, pad_id)
    return model


@_reading
def image_classifier(
    num_classes: int,
    config: dict[str, Any] | None = None,
    path: Path | None = None,
    hub: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    dtype: Dtype = "float32",
) -> nn.Module:
    """An image classifier: `[B, channels, H, W]` -> `logits [B, C]`. A checkpoint may lack its head."""
    channels, size = (None, None) if input_shape is None else (input_shape[0], list(input_shape[1:]))
    model: nn.Module = _model(
        "AutoModelForImageClassification",
        (config, path, hub),
        dtype,
        num_labels=num_classes,
        num_channels=channels,
        image_size=size,
    )
    return model


@_reading
def causal_lm(
    num_classes: int,
    config: dict[str, Any] | None = None,
    path: Path | None = None,
    hub: str | None = None,
    max_length: int | None = None,
    dtype: Dtype = "float32",
) -> nn.Module:
    """A causal language model: `input_ids`, `attention_mask` -> `logits [B, T, C]`, C the size of its vocabulary."""
    known = {"vocab_size": num_classes, "use_cache": False}
    model: nn.Module = _model("AutoModelForCausalLM", (config, path, hub), dtype, **known)
    check_text_fits(model, num_classes, max_length)
    return model


def _model(
    auto: str,
    origin: tuple[dict[str, Any] | None, Path | None, str | None],
    dtype: Dtype,
    **known: Any,
) -> Any:
    """A model by its Auto class; `known` are values of its configuration that the pipeline knows, or None."""
    config, path, hub = origin
    if sum(each is not None for each in origin) != 1:
        raise ConfigError("give one of config (of a model with random weights), path and hub (of a checkpoint)")
    known = {key: value for key, value in known.items() if value is not None}
    if config is None:
        return _from_checkpoint(auto, Checkpoint(path=path, hub=hub), dtype, known)
    try:
        with quietly() as transformers:
            model = getattr(transformers, auto).from_config(_configuration(config, known))
    except ConfigError:
        raise
    except Exception as error:  # each model checks its configuration in its own way
        raise ConfigError(f"config makes no {auto}: {first_line(error)}") from error
    return model.to(getattr(torch, dtype))


def _from_checkpoint(auto: str, checkpoint: Checkpoint, dtype: Dtype, known: Mapping[str, Any]) -> Any:
    settings = {key: known[key] for key in ("num_labels", "use_cache") if key in known}
    model, missing = checkpoint.model(auto, dtype, **settings)
    absent = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if absent:
        raise ConfigError(
            f"{checkpoint} has no weights for {', '.join(absent[:3])}{' …' if len(absent) > 3 else ''}, which "
            f"{type(model).__name__} has below its head: they are of another architecture than its config.json says"
        )
    return model


def _configuration(config: dict[str, Any], known: Mapping[str, Any]) -> Any:
    """A Transformers configuration of the given keys and, where it has such, of what the pipeline knows."""
    transformers = library()
    kinds, kind = list(transformers.CONFIG_MAPPING), config.get("model_type")
    if kind not in kinds:
        raise ConfigError(
            f"config.model_type is {kind!r}; expected a type that transformers knows, such as bert, gpt2 or vit"
            f"{did_you_mean(str(kind), kinds)}"
        )
    defaults = transformers.AutoConfig.for_model(kind)
    for key in config:
        if not hasattr(defaults, key):
            raise ConfigError(f"config.{key}: {kind} has no such key{did_you_mean(key, defaults.to_dict())}")
    values = {key: value for key, value in known.items() if hasattr(defaults, key)} | config
    try:
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:
        raise ConfigError(f"config: {' '.join(str(error).split())}") from error
