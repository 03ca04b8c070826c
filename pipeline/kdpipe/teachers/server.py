"""Log-probs of an OpenAI-compatible server (vLLM, say): the model runs anywhere, what it says is stored here.

Shapes: B rows, T positions of a block, k classes.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue
from string import Formatter
from typing import Any, TypeAlias

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
_MOST_MASS = 1.01
_SAID_S = 10.0
_LONGEST_WAIT_S = 3600.0
_PART_BYTES = 2**16

_Choice: TypeAlias = "Future[dict[str, Any]]"
_Questions: TypeAlias = "SimpleQueue[tuple[Mapping[str, Any], _Choice]]"


def _unheard(_: str) -> None:
    """Where nobody wants to be told of a wait."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ServerSection:
    """Where the server is, and how hard it may be asked.

    Up to `at_once` requests run at a time; what fails for now is tried again, later each time. The key comes from the
    environment variable `api_key_env`, and is written nowhere. An answer may take `timeout_s` to begin, and
    as long again to end.
    """

    url: str
    at_once: int = Field(default=8, gt=0)
    requests_per_minute: float | None = Field(default=None, gt=0)
    retries: int = Field(default=6, ge=0)
    timeout_s: float = Field(default=120.0, gt=0)
    api_key_env: str | None = None


class _Server:
    """`POST {url}/completions`. A server that says when to come back (Retry-After) is believed, up to an hour.

    `say` is told of a wait that somebody at the terminal would wonder about.
    """

    def __init__(self, section: ServerSection, model: str, say: Callable[[str], None]) -> None:
        requests, adapters = package("requests", "server"), package("requests.adapters", "server")
        urllib3 = package("urllib3.exceptions", "server")
        self._too_slow, self._unreadable = requests.exceptions.ReadTimeout, urllib3.InvalidHeader
        self._broken_off = (
            requests.exceptions.ConnectionError,
            requests.exceptions.Timeout,
            urllib3.ProtocolError,
            urllib3.ReadTimeoutError,
            json.JSONDecodeError,
            UnicodeDecodeError,
        )
        self._errors = (requests.RequestException, urllib3.HTTPError, *self._broken_off)
        self._again = package("urllib3.util", "server").Retry(
            total=section.retries, backoff_factor=0.5, backoff_jitter=0.5, allowed_methods=["POST"]
        )
        self._session, self._key = requests.Session(), ""
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapters.HTTPAdapter(pool_maxsize=section.at_once))
        if section.api_key_env is not None:
            self._key = _key_in(section.api_key_env)
            self._session.headers["Authorization"] = f"Bearer {self._key}"
        self._url, self._model, self._timeout = (
            f"{section.url.rstrip('/')}/completions",
            model,
            section.timeout_s,
        )
        self._at_once, self._pace = section.at_once, _Pace(section.requests_per_minute)
        self._say, self._said_until, self._lock = say, 0.0, threading.Lock()

    def ask(self, questions: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The first choice of each completion, in order. Raises `TeacherError` naming what the server said.

        Nobody who stops listening (Ctrl-C, an error) waits for the rest: threads that sleep end, and those that hear
        nothing from the server keep no process alive.
        """
        stop, choices = threading.Event(), deque[_Choice]()
        asked: _Questions = SimpleQueue()
        for question in questions:
            choices.append(Future())
            asked.put((question, choices[-1]))
        for _ in range(min(self._at_once, len(choices))):
            threading.Thread(target=self._work, args=(asked, stop), name="server", daemon=True).start()
        try:
            while choices:
                yield choices.popleft().result()
        finally:
            stop.set()

    def _work(self, asked: _Questions, stop: threading.Event) -> None:
        """One thread: question after question, until there is none or nobody listens."""
        while not stop.is_set():
            try:
                question, choice = asked.get_nowait()
            except Empty:
                return
            try:
                choice.set_result(self._ask(question, stop))
            except BaseException as error:  # raised where the choice is awaited
                choice.set_exception(error)

    def _ask(self, question: Mapping[str, Any], stop: threading.Event) -> dict[str, Any]:
        try:
            answer, text, said = self._answer({"model": self._model, **question}, stop)
        except self._errors as error:
            raise TeacherError(
                f"{self._url} does not answer ({type(error).__name__}). What was committed stays: start the server, or "
                "correct url, and run again"
            ) from None
        if not answer.ok:
            raise TeacherError(
                f"{self._url} answered {answer.status_code}: {text}. What was committed stays: mend it and run again"
            )
        try:
            choice = said["choices"][0]
        except (LookupError, TypeError):
            choice = None
        if not isinstance(choice, dict):
            raise TeacherError(
                f"{self._url} gives no completions: {text!r}; expected {{choices: […]}}. Is url the API's, such as "
                "http://HOST:8000/v1?"
            )
        return choice

    def _answer(self, question: Mapping[str, Any], stop: threading.Event) -> tuple[Any, str, Any]:
        """The answer, the beginning of its text, and its JSON where it is an object.

        What fails for now or breaks off is asked for again, `retries` times in all.
        """
        again = self._again
        while True:
            self._pace.wait(stop)
            try:
                answer, text, said = self._post(question)
                if answer.status_code not in _TRY_AGAIN or not again.total:
                    return answer, text, said
                why, wanted = f"answered {answer.status_code}", self._wanted_wait(answer)
                again = again.increment("POST", self._url, response=answer.raw)
            except self._broken_off as error:
                if not again.total:
                    raise
                why, wanted = f"does not answer ({type(error).__name__})", 0.0
                again = again.increment("POST", self._url, error=error)
            self._wait(wanted or again.get_backoff_time(), why, stop)

    def _post(self, question: Mapping[str, Any]) -> tuple[Any, str, Any]:
        """One try, see `_answer`.

        Where the server does not say how long an answer is, JSON that does not end is one that broke off.
        """
        body = bytearray()
        with self._session.post(self._url, json=question, timeout=self._timeout, stream=True) as answer:
            until = time.monotonic() + self._timeout
            while part := answer.raw.read1(_PART_BYTES, decode_content=True):
                body += part
                if time.monotonic() > until:
                    raise self._too_slow
        is_json = answer.ok and bytes(body[:_PART_BYTES].lstrip()[:1]) in (b"", b"{")
        return answer, self._shown(body), json.loads(body) if is_json else None

    def _shown(self, body: bytearray) -> str:
        """The beginning of an answer, for a message; some servers repeat the key that they refuse."""
        told = body
        for key in {self._key, self._key.replace("/", r"\/")} - {""}:  # as it is, and as JSON may write it
            told = told.replace(key.encode(), b"<key>")
        return told[: 4 * _SHOWN].decode(errors="replace")[:_SHOWN]

    def _wanted_wait(self, answer: Any) -> float:
        """The seconds of an answer's Retry-After, 0 where it names none. Raises `TeacherError` for too many."""
        try:
            seconds: float = self._again.get_retry_after(answer.raw) or 0.0
        except self._unreadable:  # half a second, say
            return 0.0
        if seconds > _LONGEST_WAIT_S:
            raise TeacherError(
                f"{self._url} answered {answer.status_code} and wants to be asked again later (Retry-After: "
                f"{answer.headers['Retry-After']}), more than the {_LONGEST_WAIT_S:,.0f} s that are waited for. What "
                "was committed stays: run again then"
            )
        return seconds

    def _wait(self, seconds: float, why: str, stop: threading.Event) -> None:
        """Wait, and say so where it is long; of threads that wait for the same, one does."""
        until = time.monotonic() + seconds
        with self._lock:
            is_news = seconds > _SAID_S and until > self._said_until + _SAID_S
            if is_news:
                self._said_until = until
        if is_news:
            self._say(f"{self._url} {why}: asking again in {seconds:,.0f} s")
        _sleep(seconds, stop)


def _key_in(variable: str) -> str:
    """The key that an environment variable holds. Raises `ConfigError`."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"server.api_key_env: the environment variable {variable} holds no key")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"server.api_key_env: what the environment variable {variable} holds is no key: expected printable ASCII "
            "in one line"
        )
    return key


class _Pace:
    """Lets requests start evenly, so many per minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 0.0 if per_minute is None else 60 / per_minute
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Until it is one's turn."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._seconds
        _sleep(turn - time.monotonic(), stop)


def _sleep(seconds: float, stop: threading.Event) -> None:
    """Raises `CancelledError` where nobody listens any more."""
    if stop.wait(max(0.0, seconds)):
        raise CancelledError


def _checked(log_probs: Mapping[Any, float]) -> None:
    """Raise `TeacherError` where a log-prob is NaN or above 0, or the probabilities of a position are more than 1."""
    wrong = [each for each in log_probs.values() if not each <= _SLACK]
    if wrong:
        raise TeacherError(
            f"the server gives a log-prob of {wrong[0]:g}; expected 0 or below. Its model overflows, or it gives "
            "logits: mend the server and run again"
        )
    total = math.fsum(math.exp(each) for each in log_probs.values())
    if total > _MOST_MASS:
        raise TeacherError(
            f"the server gives log-probs of one token whose probabilities sum to {total:.4g}; expected 1 at most. They "
            "are not normalised: mend the server and run again"
        )


def _next_token(choice: Mapping[str, Any]) -> dict[str, float]:
    """Token -> log-prob of the one token of a completion. Raises `TeacherError`."""
    said = choice.get("logprobs")
    try:
        top = said["top_logprobs"][0]  # type: ignore[index]
        return {str(token): float(each) for token, each in top.items()}
    except (AttributeError, LookupError, TypeError, ValueError):
        found = f"logprobs is {json.dumps(said):.200}"
    if said is None:
        found = "logprobs is null" if "logprobs" in choice else "there is no logprobs"
    elif isinstance(said, dict) and "content" in said:
        found = "logprobs has the chat format (content)"
    raise TeacherError(
        f"the server gives no log-probs of the next token: {found}; expected {{top_logprobs: [{{token: log-prob}}]}}. "
        "Ask a server that gives log-probs of completions, as vLLM does at /v1/completions"
    )


class ServedLanguageModel:
    """The k most probable next tokens at each counted position of a block, by vLLM's `prompt_logprobs`.

    Token ids must be those of the server's tokenizer. A server gives no more than k tokens (vLLM: --max-logprobs), at
    T = 1 and no features: store with `encoding: topk`, `temperatures: [1]`. The tail is what is left of 1.
    """

    def __init__(
        self,
        num_classes: int,
        k: int | None,
        probe: Columns,
        model: str,
        server: ServerSection,
        say: Callable[[str], None] = _unheard,
    ) -> None:
        """`model`: what the server calls it; `say` is told of long waits.

        Raises `ConfigError`, and `TeacherError` where the server cannot do it.
        """
        if k is None:
            raise ConfigError("a served language model gives its most probable tokens: set encoding: topk and k")
        if "tokens" not in probe:
            raise ConfigError("a served language model speaks about tokens; the task must be language modelling")
        self._server, self._model, self._num_classes = _Server(server, model, say), model, num_classes
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


class _Number(float):
    """A number of float32 in a prompt: in its own digits (`0.1`, `2`), or as a format says (`{price:.2f}`)."""

    def __str__(self) -> str:
        return np.format_float_positional(np.float32(self), trim="-")

    __repr__ = __str__

    def __format__(self, form: str) -> str:
        is_about_digits = (form != "" and form[-1] in "eEfFgGn%,") or "_" in form
        return format(float(self), form) if is_about_digits else format(str(self), form)


class _Missing(str):
    """Nothing, whatever the format."""

    def __format__(self, form: str) -> str:
        return ""


def _written(value: Any) -> Any:
    """A value of a column as a prompt has it."""
    if isinstance(value, np.floating):
        return _Missing() if np.isnan(value) else _Number(value)
    return _Missing() if value is None else value


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
        say: Callable[[str], None] = _unheard,
    ) -> None:
        """`task`: one with `column_values` (see `kdpipe.tasks.base.Task`); `probe`: a prepared row to try at once.

        `say` is told of long waits. Raises `ConfigError`, and `TeacherError` where the server cannot do it.
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
        if top < 1:
            raise ConfigError(
                f"top is {top}; expected how many of its most probable tokens the server gives, such as 20"
            )
        try:
            named = [name for _, name, _, _ in Formatter().parse(prompt) if name]
        except ValueError as error:
            raise ConfigError(
                f"prompt: {error} in {prompt!r}; a column stands in braces, {{text}}, and braces themselves are doubled"
            ) from None
        if not named:
            raise ConfigError(f"prompt is {prompt!r}, the same for every row; name a column in it, such as {{text}}")
        self._values, self._prompt, self._answers, self._top = values, prompt, list(answers), top
        self._server, self._model = _Server(server, model, say), model
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
            prompts = [
                self._prompt.format(**{name: _written(each[row]) for name, each in values.items()})
                for row in range(rows)
            ]
        except (KeyError, IndexError) as error:
            raise ConfigError(f"prompt: {error} in {self._prompt!r}; the columns are {', '.join(values)}") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"prompt: {error} in {self._prompt!r}; expected columns by name, numbers with a format such as "
                "{price:.2f} or none"
            ) from None
        questions = [{"prompt": prompt, "max_tokens": 1, "logprobs": self._top, "temperature": 0} for prompt in prompts]
        logits = np.stack([self._logits(choice) for choice in self._server.ask(questions)])
        covered = np.asarray(np.isfinite(logits).any(axis=1))
        return {
            LOGITS: torch.from_numpy(np.where(covered[:, np.newaxis], logits, 0.0)).float(),
            COVERED: torch.from_numpy(covered),
        }

    def _logits(self, choice: Mapping[str, Any]) -> NDArray[np.float64]:
        """Of one answer `[C]`; NaN where no class is among its tokens."""
        given = _next_token(choice)
        _checked(given)
        found: NDArray[np.float64] = np.array([given.get(answer, np.nan) for answer in self._answers])
        log_probs = [each for each in given.values() if each > -math.inf]
        left = -math.expm1(min(0.0, float(np.logaddexp.reduce(log_probs))))
        absent = np.asarray([each not in given for each in self._answers])
        if absent.all():
            return found
        found[absent] = min([*log_probs, math.log(left) if left > 0 else math.inf])
        return found
