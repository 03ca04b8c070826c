"""A checkpoint of Hugging Face Transformers as a teacher, ready as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdpipe.data.columns import Columns
from kdpipe.errors import TeacherError
from kdpipe.fingerprint import digest_path
from kdpipe.huggingface import Checkpoint, check_same_tokens, check_text_fits, pad_with
from kdpipe.inputs import LOGITS
from kdpipe.preprocess import Preprocess, offers
from kdpipe.teachers.torch import TorchTeacher

_AUTO = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "causal_lm": "AutoModelForCausalLM",
}


class PretrainedTeacher:
    """A model with its head: in the folder `path` that `save_pretrained` wrote, or of `hub`, "name@commit" of the Hub.

    `auto` says what it does. Its tokenizer is the preprocess (`PretrainedTokenizer`). Among `outputs` may be
    `hidden_states.0` (the embeddings), `hidden_states.1` (after the first layer) and so on. `device_map` (`auto`, a
    device, or a mapping of modules to devices) is that of Transformers: a model too large for one device lies on
    several. Needs the package transformers.
    """

    def __init__(
        self,
        num_classes: int,
        preprocess: Preprocess,
        probe: Columns,
        path: Path | None = None,
        hub: str | None = None,
        auto: Literal["sequence_classification", "image_classification", "causal_lm"] = "sequence_classification",
        outputs: Sequence[str] = (LOGITS,),
        precision: str = "float32",
        device_map: str | Mapping[str, int | str] | None = None,
    ) -> None:
        """Raises `TeacherError` where the checkpoint has no head, `ConfigError` where it does not fit the tokenizer."""
        checkpoint = Checkpoint(path=path, hub=hub)
        settings: dict[str, Any] = {"use_cache": False} if auto == "causal_lm" else {}
        if device_map is not None:
            settings["device_map"] = device_map
        model, missing = checkpoint.model(_AUTO[auto], "float32", **settings)
        if missing:
            raise TeacherError(
                f"{checkpoint} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: it was "
                f"not trained for {auto.replace('_', ' ')}. Train it (teachers.<name>: model and train), or take one "
                "that was"
            )
        tokens = getattr(preprocess, "tokens", None)
        if tokens is not None:
            check_same_tokens(checkpoint, tokens)
        offered = offers(preprocess)
        check_text_fits(model, offered.get("vocab_size"), offered.get("max_length"))
        pad_with(model, offered.get("pad_id"))
        if any(name.startswith("hidden_states.") for name in outputs):
            model.config.output_hidden_states = True
        identity = {"checkpoint": hub if path is None else digest_path(path)}
        self._teacher = TorchTeacher(model, preprocess, num_classes, identity, probe, outputs, precision)
        self.outputs, self.fingerprint = self._teacher.outputs, self._teacher.fingerprint
        self.predict, self.lengths = self._teacher.predict, self._teacher.lengths
        size = sum(each.nbytes for each in model.state_dict().values())
        self.description = {"parameters": model.num_parameters(), "size_bytes": size}
