"""Log-probs of an OpenAI-compatible server (vLLM, say): the model runs anywhere, what it says is stored here.

Shapes: B rows, T positions of a block, k classes.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from kdpipe.config import package
from kdpipe.data.columns import Columns
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.inputs import LOGITS
from kdpipe.targets import OutputSpec
from kdpipe.teachers.base import CLASS_IDS, COVERED, LOG_PROBS, TAIL_LOG_MASS

_TRY_AGAIN = (408, 409, 429, 500, 502, 503, 504)
_SHOWN = 300
_SLACK = 1e-3


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ServerSection:
    """Where the server is, and how hard it may be asked.

    Up to `at_once` requests run at a time; what fails for now is tried again, later each time. The key comes from the
    environment variable `api_key_env`, and is written nowhere.
    """

    url: str
    at_once: int = Field(default=8, gt=0)
    requests_per_minute: float | None = Field(default=None, gt=0)
    retries: int = Field(default=6, ge=0)
    timeout_s: float = Field(default=120.0, gt=0)
    api_key_env: str | None = None


class _Server:
    """`POST {url}/completions`. A server that says when to come back (Retry-After) is believed."""

    def __init__(self, section: ServerSection, model: str) -> None:
        requests, adapters = package("requests", "server"), package("requests.adapters", "server")
        self._errors = requests.RequestException
        self._broken_off = (
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ConnectionError,
            requests.exceptions.JSONDecodeError,
        )
        self._again = package("urllib3.util", "server").Retry(
            total=section.retries,
            backoff_factor=0.5,
            backoff_jitter=0.5,
            status_forcelist=_TRY_AGAIN,
            allowed_methods=["POST"],
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapters.HTTPAdapter(max_retries=self._again, pool_maxsize=section.at_once))
        if section.api_key_env is not None:
            key = os.environ.get(section.api_key_env)
            if not key:
                raise ConfigError(f"server.api_key_env: the environment variable {section.api_key_env} holds no key")
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._url, self._model, self._timeout = (
            f"{section.url.rstrip('/')}/completions",
            model,
            section.timeout_s,
        )
        self._at_once, self._pace = section.at_once, _Pace(section.requests_per_minute)

    def ask(self, questions: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The first choice of each completion, in order. Raises `TeacherError` naming what the server said."""
        with ThreadPoolExecutor(self._at_once, "server") as threads:
            yield from threads.map(self._ask, questions)

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        self._pace.wait()
        try:
            answer, said = self._answer({"model": self._model, **question})
        except self._errors as error:
            raise TeacherError(
                f"{self._url} does not answer ({type(error).__name__}). What was committed stays: start the server, or "
                "correct url, and run again"
            ) from None
        text = answer.text[:_SHOWN]
        if not answer.ok:
            raise TeacherError(
                f"{self._url} answered {answer.status_code}: {text}. What was committed stays: mend it and run again"
            )
        try:
            choice = said["choices"][0]
        except (LookupError, TypeError):
            choice = None
        if not isinstance(choice, dict):
            raise TeacherError(f"{self._url} gives no completions: {text!r}")
        return choice

    def _answer(self, question: Mapping[str, Any]) -> tuple[Any, Any]:
        """The whole answer, and its JSON where it is an object.

        One that breaks off is asked for again, `retries` times. Where the server does not say how long an answer is,
        JSON that does not end is one that broke off.
        """
        again = self._again
        while True:
            with self._session.post(self._url, json=question, timeout=self._timeout, stream=True) as answer:
                try:
                    is_json = answer.content.lstrip()[:1] in (b"", b"{") and answer.ok
                    return answer, answer.json() if is_json else None
                except self._broken_off as error:
                    if not again.total:
                        raise
                    again = again.increment("POST", self._url, error=error)
            again.sleep()


class _Pace:
    """Lets requests start evenly, so many per minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 0.0 if per_minute is None else 60 / per_minute
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Until it is one's turn."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._seconds
        time.sleep(max(0.0, turn - time.monotonic()))


def _checked(log_probs: Mapping[Any, float]) -> None:
    """Raise `TeacherError` where a log-prob is NaN or above 0."""
    wrong = [each for each in log_probs.values() if not each <= _SLACK]
    if wrong:
        raise TeacherError(
            f"the server gives a log-prob of {wrong[0]:g}; expected 0 or below. Its model overflows, or it gives "
            "logits: mend the server and run again"
        )


class ServedLanguageModel:
    """The k most probable next tokens at each counted position of a block, by vLLM's `prompt_logprobs`.

    Token ids must be those of the server's tokenizer. A server gives no more than k tokens (vLLM: --max-logprobs), at
    T = 1 and no features: store with `encoding: topk`, `temperatures: [1]`. The tail is what is left of 1.
    """

    def __init__(self, num_classes: int, k: int | None, probe: Columns, model: str, server: ServerSection) -> None:
        """`model`: what the server calls it. Raises `ConfigError`, and `TeacherError` where the server cannot do it."""
        if k is None:
            raise ConfigError("a served language model gives its most probable tokens: set encoding: topk and k")
        if "tokens" not in probe:
            raise ConfigError("a served language model speaks about tokens; the task must be language modelling")
        self._server, self._model, self._num_classes = _Server(server, model), model, num_classes
        self.num_kept = k
        positions = np.asarray(probe["counted"]).shape[1]
        self.outputs = (OutputSpec(name=LOGITS, shape=(positions, num_classes)),)
        self.predict(probe)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The model's name and k; where the server is changes nothing."""
        return {"served_model": self._model, "k": self.num_kept}

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """`class_ids`, `log_probs` `[B, T, k]` and `tail_log_mass` `[B, T]`; nothing of positions that do not count."""
        tokens, counted = np.asarray(columns["tokens"]), np.asarray(columns["counted"])
        shape = (*counted.shape, self.num_kept)
        ids, head, tail = np.zeros(shape, np.int64), np.full(shape, -np.inf), np.zeros(counted.shape)
        rows = np.flatnonzero(counted.any(axis=1))
        lengths = [int(np.flatnonzero(counted[row])[-1]) + 2 for row in rows]
        questions = [
            {"prompt": tokens[row, :length].tolist(), "max_tokens": 1, "prompt_logprobs": self.num_kept}
            for row, length in zip(rows, lengths, strict=True)
        ]
        for row, length, choice in zip(rows, lengths, self._server.ask(questions), strict=True):
            said = choice.get("prompt_logprobs")
            if not isinstance(said, list) or len(said) != length:
                raise TeacherError(
                    f"the server gives no log-probs of {length} prompt tokens (prompt_logprobs); vLLM does, servers "
                    "that only give those of generated tokens cannot teach a language model"
                )
            for position in np.flatnonzero(counted[row]):
                ids[row, position], head[row, position], tail[row, position] = self._kept(said[position + 1])
        return {
            CLASS_IDS: torch.from_numpy(ids),
            LOG_PROBS: torch.from_numpy(head),
            TAIL_LOG_MASS: torch.from_numpy(tail),
        }

    def _kept(self, said: Any) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
        """Ids ascending, their log-probs and the log of what is left, of {token id: {logprob, …}}."""
        try:
            given = {int(token): float(each["logprob"]) for token, each in said.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise TeacherError(
                f"the server's log-probs of a token are {said!r:.200}; expected {{id: {{logprob: …}}}}"
            ) from None
        _checked(given)
        best = sorted(given, key=lambda token: -given[token])[: self.num_kept]  # the prompt's own token may be one more
        if len(best) < self.num_kept:
            raise TeacherError(
                f"the server gives {len(best)} tokens where {self.num_kept} were asked; lower k, or start the server "
                "with more (vLLM: --max-logprobs)"
            )
        ids = np.array(sorted(best), np.int64)
        if ids[0] < 0 or ids[-1] >= self._num_classes:
            raise TeacherError(
                f"the server names token {ids[-1]}, but there are {self._num_classes} (task.num_classes): another "
                "tokenizer, or a padded vocabulary; set task.num_classes to the model's own number of outputs"
            )
        log_probs = np.array([given[token] for token in ids.tolist()])
        left = -math.expm1(float(np.logaddexp.reduce(log_probs)))
        return ids, log_probs, math.log(left) if left > 0 else -math.inf


class ServedClassifier:
    """A language model asked for a class: the log-probs of the `answers` as the next token after the `prompt`.

    `prompt` names source columns in braces: "Review: {text}\\nSentiment:". `answers` are one token each, a text per
    class; a server gives its most probable tokens only (`top`), so a class that is not among them gets the least of
    what it can have had: the smallest log-prob given, or the log of what is left of 1. Where no class is among them the
    teacher abstains. Probabilities are those among the classes.
    """

    abstains = True

    def __init__(
        self,
        task: Any,
        model: str,
        server: ServerSection,
        prompt: str,
        answers: Sequence[str],
        top: int = 20,
        probe: Columns | None = None,
    ) -> None:
        """`task`: one with `column_values` (see `kdpipe.tasks.base.Task`); `probe`: a prepared row to try at once.

        Raises `ConfigError`, and `TeacherError` where the server cannot do it.
        """
        if len(answers) != task.num_classes or len(set(answers)) != len(answers):
            raise ConfigError(
                f"answers are {list(answers)}; expected {task.num_classes} different texts, one per class"
            )
        values: Callable[[Columns], Mapping[str, Any]] | None = getattr(task, "column_values", None)
        if values is None:
            raise ConfigError(
                f"{type(task).__name__} has no columns by name, so there is nothing to put into the prompt"
            )
        self._values, self._prompt, self._answers, self._top = values, prompt, list(answers), top
        self._server, self._model = _Server(server, model), model
        self.outputs = (OutputSpec(name=LOGITS, shape=(len(answers),)),)
        if probe is not None:
            self.predict(probe)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The model's name, the prompt and the answers."""
        return {"served_model": self._model, "prompt": self._prompt, "answers": self._answers, "top": self._top}

    def predict(self, columns: Columns) -> dict[str, Tensor]:
        """Logits `[B, C]`, and `covered` where at least one class was among the tokens that the server gave."""
        values = self._values(columns)
        rows = len(next(iter(values.values())))
        try:
            prompts = [self._prompt.format(**{name: each[row] for name, each in values.items()}) for row in range(rows)]
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(f"prompt: {error} in {self._prompt!r}; the columns are {', '.join(values)}") from None
        questions = [{"prompt": prompt, "max_tokens": 1, "logprobs": self._top, "temperature": 0} for prompt in prompts]
        logits = np.stack([self._logits(choice) for choice in self._server.ask(questions)])
        covered = np.asarray(np.isfinite(logits).all(axis=1))
        return {
            LOGITS: torch.from_numpy(np.where(covered[:, np.newaxis], logits, 0.0)).float(),
            COVERED: torch.from_numpy(covered),
        }

    def _logits(self, choice: Mapping[str, Any]) -> NDArray[np.float64]:
        """Of one answer `[C]`; NaN where no class is among its tokens."""
        try:
            given = {str(token): float(each) for token, each in choice["logprobs"]["top_logprobs"][0].items()}
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            raise TeacherError(
                f"the server gives no log-probs of the next token (logprobs); it gives {', '.join(choice)}"
            ) from None
        _checked(given)
        found: NDArray[np.float64] = np.array([given.get(answer, np.nan) for answer in self._answers])
        log_probs = list(given.values())
        left = -math.expm1(min(0.0, float(np.logaddexp.reduce(log_probs))))
        absent = np.asarray([each not in given for each in self._answers])
        if absent.all():
            return found
        found[absent] = min(*log_probs, math.log(left) if left > 0 else math.inf)
        return found
