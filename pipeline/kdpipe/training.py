"""One loop for teacher and student: `fit`.

Means run over the valid rows of the whole effective batch, so that accumulation and ranks change nothing.
Shapes: B batch, T tokens, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdpipe.batches import Batch, BatchStream
from kdpipe.checkpoint import load_training, save_training
from kdpipe.data.prepared import MISSING_LABEL
from kdpipe.distributed import cpu_threads, join_peers
from kdpipe.errors import TrainingError
from kdpipe.fingerprint import digest
from kdpipe.inputs import Head, call, trimmed
from kdpipe.losses import LabelLoss, LossTerm, valid_rows, values_of
from kdpipe.targets import Targets

Precision = Literal["float32", "bfloat16", "float16"]
_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGS_PER_FIT = 100
LOGITS_ALONE = Head()
"""For a model that gives its logits, or names them so."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How to optimise. `micro_batch_size` rows at a time go through the model (null: the whole batch at once)."""

    steps: int
    seed: int
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = 0.05
    clip_norm: float | None = None
    precision: Precision = "float32"
    micro_batch_size: int | None = None
    threads: int | None = None
    checkpoint_every_s: float = 20.0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant or a cosine to 0 (Loshchilov and Hutter 2017)."""
        warmup = max(1, round(self.steps * self.warmup_fraction))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class TrainingTerm(Protocol):
    """One summand of the training loss."""

    @property
    def name(self) -> str:
        """How logs call it."""

    @property
    def weight(self) -> float:
        """What its mean is multiplied with."""

    def valid(self, batch: Batch) -> Tensor:
        """Which rows count, bool `[B]`; or which tokens, `[B, T]`."""

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        """One value per row `[B]` or token `[B, T]`; those that do not count may hold anything finite."""

    def unscaled(self, values: Tensor) -> Tensor:
        """The values without the term's own factor, for the log."""


@dataclass(frozen=True, kw_only=True)
class LabelTerm:
    """The task's loss on labels, on labelled rows only."""

    loss: LabelLoss
    weight: float
    smoothing: float = 0.0
    name: str = "label"

    def valid(self, batch: Batch) -> Tensor:
        """Rows that have a label."""
        return batch.labels != MISSING_LABEL

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        """The task's label loss, shaped as the labels."""
        return self.loss(logits, batch.labels, self.smoothing)

    def unscaled(self, values: Tensor) -> Tensor:
        """As they are."""
        return values


@dataclass(frozen=True, kw_only=True)
class DistillTerm:
    """A distillation loss on one teacher's cached targets, on every row that it speaks about.

    A loss that needs labels is left out of rows without one.
    """

    term: LossTerm

    @property
    def name(self) -> str:
        """Teacher, loss and temperature."""
        return f"{self.term.teacher}.{type(self.term.loss).__name__} T={self.term.loss.temperature:g}"

    @property
    def weight(self) -> float:
        """The term's weight."""
        return self.term.weight

    def valid(self, batch: Batch) -> Tensor:
        """Rows that the teacher speaks about, and that have a label where the loss needs one."""
        valid = valid_rows(self.term.loss, self._targets(batch), batch.labels)
        return torch.ones_like(batch.labels, dtype=torch.bool) if valid is None else valid

    def values(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss, one value per row or token."""
        return values_of(self.term.loss, logits, self._targets(batch), batch.labels)

    def unscaled(self, values: Tensor) -> Tensor:
        """Without T^2."""
        return self.term.loss.unscaled(values)

    def _targets(self, batch: Batch) -> Targets:
        return batch.targets[self.term.teacher][self.term.output]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands."""

    step: int
    steps: int
    rows_per_s: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished training: the log (one entry per interval) and the seconds of this process's steps."""

    history: Sequence[Mapping[str, float]]
    seconds: float
    steps_done: int


def fit(
    model: nn.Module,
    stream: BatchStream,
    terms: Sequence[TrainingTerm],
    plan: TrainPlan,
    checkpoint: Path,
    on_progress: Callable[[Progress], None] = lambda _: None,
    head: Head = LOGITS_ALONE,
) -> Fitted:
    """Train `model` in place for `plan.steps` steps; goes on from `checkpoint` where there is one.

    `head` takes the logits out of what the model gives.

    A resumed training ends with the weights of an uninterrupted one (bitwise on a CPU with the same threads). Raises
    `TrainingError` when the loss is no finite number.
    """
    with cpu_threads(plan.threads):
        return _fit(_Loop(model, terms, plan, head), stream, plan, checkpoint, on_progress)


def _fit(
    loop: _Loop, stream: BatchStream, plan: TrainPlan, checkpoint: Path, on_progress: Callable[[Progress], None]
) -> Fitted:
    loop.restore(checkpoint)
    first, started = loop.step, time.perf_counter()
    saved_at = started
    rows_done = 0
    for batch in stream.from_step(first, plan.steps):
        loop.train_on(batch)
        rows_done += len(batch)
        now = time.perf_counter()
        if now - saved_at >= plan.checkpoint_every_s and loop.step < plan.steps:
            loop.save(checkpoint)
            saved_at = now
        on_progress(Progress(step=loop.step, steps=plan.steps, rows_per_s=rows_done / (now - started), loss=loop.loss))
    loop.unwrap()
    return Fitted(history=loop.history, seconds=time.perf_counter() - started, steps_done=plan.steps - first)


class _Loop:
    """The state of one training: model, optimiser, step, log."""

    def __init__(self, model: nn.Module, terms: Sequence[TrainingTerm], plan: TrainPlan, head: Head) -> None:
        self.step = 0
        self.loss = math.nan
        self.history: list[dict[str, float]] = []
        join_peers()
        # Accelerate fixes one mixed precision per process, and a process may train with several: autocast is done here.
        self._accelerator = Accelerator(mixed_precision="no")
        self._terms, self._plan, self._head = terms, plan, head
        self._bare = model
        self._model = self._accelerator.prepare(model)
        # Not prepared: Accelerate's wrapper looks for an uninstalled package at every step, and its scaler and
        # accumulation are done here.
        self._optimizer = _optimizer(self._bare, plan)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=plan.precision == "float16")
        self._model.train()
        self._interval = max(1, plan.steps // LOGS_PER_FIT)
        self._sums: dict[str, float] = {}

    def train_on(self, batch: Batch) -> None:
        """One optimiser step on one effective batch."""
        plan, accelerator = self._plan, self._accelerator
        torch.manual_seed(_step_seed(plan.seed, self.step, accelerator.process_index))
        batch = batch.to(self._device)
        counts = self._sum_over_ranks(torch.stack([term.valid(batch).sum() for term in self._terms])).clamp(min=1)
        learning_rate = plan.learning_rate_at(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        parts = []
        micro_batches = list(_micro_batches(batch, plan.micro_batch_size))
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(self._model):
                parts.append(self._backward(micro, counts))
        totals = dict(zip(self._names, self._sum_over_ranks(torch.stack(parts).sum(dim=0)).tolist(), strict=True))
        self._check_finite(totals)
        if plan.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            accelerator.clip_grad_norm_(self._model.parameters(), plan.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.step += 1
        self._log(totals, learning_rate)

    def _backward(self, batch: Batch, counts: Tensor) -> Tensor:
        """Add a micro-batch's gradients; returns its part of the loss and of each term, in the order of `_names`."""
        autocast = _AUTOCAST[self._plan.precision]
        with torch.autocast(self._device.type, autocast, enabled=autocast is not None):
            logits = self._head(call(self._model, trimmed(batch.inputs)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = logits.new_zeros((), dtype=torch.float32)
        parts = []
        for term, count in zip(self._terms, counts, strict=True):
            values = torch.where(term.valid(batch), term.values(logits, batch), 0.0)
            mean = values.sum() / count
            loss = loss + term.weight * mean
            parts += [mean, term.unscaled(values).sum() / count]
        # DDP averages gradients over ranks; the counts are already those of all ranks.
        self._scaler.scale(loss * self._accelerator.num_processes).backward()
        return torch.stack([part.detach().float() for part in (loss, *parts)])

    @property
    def _names(self) -> list[str]:
        return ["loss", *(name for term in self._terms for name in (term.name, f"{term.name} unscaled"))]

    def _check_finite(self, totals: Mapping[str, float]) -> None:
        """The same on every rank, as the totals are."""
        if math.isfinite(totals["loss"]):
            return
        parts = ", ".join(f"{term.name} {totals[term.name]:g}" for term in self._terms)
        raise TrainingError(
            f"the loss is {totals['loss']} at step {self.step} ({parts}). Lower train.learning_rate, set "
            "train.clip_norm, or use train.precision: float32."
        )

    def _log(self, totals: Mapping[str, float], learning_rate: float) -> None:
        for name, value in totals.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.loss = totals["loss"]
        if self.step % self._interval == 0 or self.step == self._plan.steps:
            length = self.step - int(self.history[-1]["step"] if self.history else 0)
            means = {name: value / length for name, value in self._sums.items()}
            self.history.append({"step": self.step, "learning_rate": learning_rate, **means})
            self._sums = {}

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self._accelerator.num_processes == 1:
            return values
        summed: Tensor = self._accelerator.reduce(values, reduction="sum")
        return summed

    def save(self, path: Path) -> None:
        """Keep everything that the rest of the training depends on."""
        if not self._accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "model": self._accelerator.unwrap_model(self._model).state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "history": self.history,
            "sums": self._sums,
        }
        save_training(path, state)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, where there is one."""
        state = load_training(path)
        if state is None:
            return
        self.step, self.history, self._sums = state["step"], state["history"], state["sums"]
        self._accelerator.unwrap_model(self._model).load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def unwrap(self) -> None:
        """Leave the caller's model as trained, on the CPU, in evaluation mode."""
        self._bare.cpu().eval()
        self._accelerator.free_memory()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._accelerator.device
        return device


def _optimizer(model: nn.Module, plan: TrainPlan) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=plan.learning_rate,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
            nesterov=plan.momentum > 0,
        )
    return torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)


def _micro_batches(batch: Batch, size: int | None) -> Iterator[Batch]:
    if size is None or len(batch) <= size:
        yield batch
        return
    for start in range(0, len(batch), size):
        yield batch.part(slice(start, start + size))


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout's seed for one step of one rank: a resumed training draws what an uninterrupted one draws."""
    return int(digest([seed, step, rank])[:15], 16)
