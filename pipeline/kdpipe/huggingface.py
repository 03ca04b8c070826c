"""Models and tokenizers of Hugging Face Transformers: a folder here, or a repository of the Hub at one commit.

Weights are read from safetensors, nothing is unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from kdpipe.config import package
from kdpipe.errors import ConfigError
from kdpipe.fingerprint import digest_file

_COMMIT = re.compile(r"(?P<name>[^@]+)@(?P<commit>[0-9a-f]{40})")
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.txt", "*.model", "*.spm", "*.codes", "emoji.json", "byte_maps.json")
"""What the tokenizers of Transformers call their files."""


def library() -> Any:
    """The package transformers. Raises `ConfigError` naming the extra that brings it."""
    return package("transformers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `save_pretrained` wrote: in the folder `path`, or `hub`, "name@commit" of the Hugging Face Hub."""

    path: Path | None = None
    hub: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise ConfigError("give path (a folder) or hub (a repository of the Hugging Face Hub): one of the two")
        if self.path is not None and not self.path.exists():
            raise ConfigError(f"there is no {self.path}")
        if self.hub is not None and not _COMMIT.fullmatch(self.hub):
            raise ConfigError(
                f"hub is {self.hub!r}; expected the name and the commit, 40 digits, such as "
                "google/bert_uncased_L-2_H-128_A-2@<commit>: a branch may be another model tomorrow"
            )

    def __str__(self) -> str:
        return str(self.path or self.hub)

    def tokenizer(self) -> Any:
        """Its tokenizer; `path` may be a tokenizer.json too. Raises `ConfigError` where there is none."""
        if self.path is not None and self.path.is_file():
            return self._read("PreTrainedTokenizerFast", tokenizer_file=str(self.path))
        if not self.tokenizer_identity():
            # Of a folder that has a model only, Transformers makes an empty tokenizer.
            raise ConfigError(f"{self.path} holds no tokenizer, such as a tokenizer.json")
        return self._load("AutoTokenizer")

    def tokenizer_identity(self) -> dict[str, str]:
        """Which tokenizer it is: digests of its files by name, or the commit."""
        if self.path is None:
            return {"hub": str(self.hub)}
        files = [self.path] if self.path.is_file() else [each for each in self.path.iterdir() if _is_tokenizers(each)]
        return {path.name: digest_file(path) for path in sorted(files)}

    def model(self, auto: str, dtype: str, **settings: Any) -> tuple[Any, list[str]]:
        """A model by the name of its Auto class, and the names of weights that it lacked: they are random.

        Raises `ConfigError` where weights have other shapes, or are no safetensors.
        """
        pickled = [] if self.path is None else [path.name for path in sorted(self.path.glob("*.bin"))]
        if self.path is not None and pickled and not list(self.path.glob("*.safetensors")):
            raise ConfigError(
                f"{self.path} has its weights in {pickled[0]}, which would have to be unpickled; expected safetensors. "
                "Save them so: model.save_pretrained(folder)"
            )
        model, report = self._load(
            auto,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=getattr(torch, dtype),
            **settings,
        )
        if report["mismatched_keys"]:
            wrong = [
                f"{name} has shape {list(found)} there, {list(wanted)} in this model"
                for name, found, wanted in sorted(report["mismatched_keys"])
            ]
            raise ConfigError(f"{self} does not fit: {'; '.join(wrong)}. Is it of other classes?")
        return model, sorted(report["missing_keys"])

    def _load(self, auto: str, **arguments: Any) -> Any:
        name, revision = str(self.path), None
        if self.hub is not None:
            name, _, revision = self.hub.partition("@")
        only_here = self.hub is None
        return self._read(
            f"{auto}.from_pretrained",
            name,
            revision=revision,
            local_files_only=only_here,
            trust_remote_code=False,
            **arguments,
        )

    def _read(self, function: str, *arguments: Any, **settings: Any) -> Any:
        with quietly() as transformers:
            try:
                return attrgetter(function)(transformers)(*arguments, **settings)
            except Exception as error:  # transformers raises whatever its backends raise
                name = function.removesuffix(".from_pretrained")
                why = first_line(error) + _cause(error) + _advice(error)
                raise ConfigError(f"{self} cannot be read as {name}: {why}") from error


def _cause(error: Exception) -> str:
    """What it was first, such as a connection that broke, which Transformers leaves out."""
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    return "" if cause is error else f" ({first_line(cause)})"


def _advice(error: BaseException | None) -> str:
    """What to do where the Hub cannot be reached and has not left a copy here; nothing for other errors."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    if error is None:
        return ""
    return (
        " Give a folder on this machine in place of hub (path), or set HF_HOME to a cache that was filled where there "
        "is a network."
    )


@contextmanager
def quietly() -> Iterator[Any]:
    """The package transformers, without bars and tables of weights on stderr."""
    transformers = library()
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _is_tokenizers(path: Path) -> bool:
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in _TOKENIZER_FILES)


def check_text_fits(model: Any, vocab_size: int | None, max_length: int | None) -> None:
    """Raise `ConfigError` where a tokenizer makes more tokens, or longer rows, than the model has embeddings for."""
    # Asked of models of text only: some of images, such as ResNet, raise.
    known = None if vocab_size is None else getattr(model.get_input_embeddings(), "num_embeddings", None)
    if vocab_size is not None and known is not None and vocab_size > known:
        raise ConfigError(
            f"the model has embeddings for {known} tokens, its tokenizer makes {vocab_size}. Take the tokenizer that "
            "the model was trained with, or a model of that vocabulary (more embeddings than tokens are fine)"
        )
    positions = _positions(model)
    if max_length is not None and 0 < positions < max_length:
        raise ConfigError(
            f"the model has embeddings for {positions} positions, its preprocess makes rows of {max_length} tokens. "
            "Lower the preprocess's max_length (of language modelling: task.block_tokens), or set "
            "max_position_embeddings in the model's config"
        )


def _positions(model: Any) -> int:
    """How many tokens a row may have; -1 where positions are relative, as in XLNet."""
    positions: int = getattr(model.config, "max_position_embeddings", None) or -1
    for name, module in model.named_modules():
        first: int | None = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:  # RoBERTa counts from behind its padding
            return positions - first - 1
    return positions


def pad_with(model: Any, pad_id: int | None) -> None:
    """Say which token rows are padded with: by it, models such as GPT-2 find the last token of a row.

    The preprocess knows; a configuration may name another one, or none, or have a part about text that does.
    """
    if pad_id is not None:
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_id


def check_same_tokens(checkpoint: Checkpoint, tokens: Mapping[str, int]) -> None:
    """Raise `ConfigError` where rows are tokenised otherwise than by the tokenizer that comes with a model, if any."""
    if not checkpoint.tokenizer_identity():
        return
    own = checkpoint.tokenizer().get_vocab()
    others = [token for token, number in tokens.items() if own.get(token) != number]
    if others:
        other = min(others, key=lambda token: tokens[token])
        raise ConfigError(
            f"{checkpoint} comes with another tokenizer than the one that makes its tokens: {other!r} is "
            f"{own.get(other, 'unknown')} there and {tokens[other]} here. Take the model's own (path or hub of the "
            "preprocess, task.tokenizer of language modelling)"
        )


def first_line(error: Exception) -> str:
    """An error of Transformers, which may be pages long, for a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
