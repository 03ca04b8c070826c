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
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdpipe.batches import Batch, BatchStream
from kdpipe.checkpoint import load_training, save_training
from kdpipe.distributed import cpu_threads, join_peers
from kdpipe.errors import TrainingError, naming
from kdpipe.fingerprint import digest
from kdpipe.gradients import TermGradients, pulls
from kdpipe.inputs import LOGITS, Head, Inputs, Outputs, described
from kdpipe.terms import LabelTerm, TrainingTerm

Precision = Literal["float32", "bfloat16", "float16"]
_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGS_PER_FIT = 100
GRADIENTS_PER_FIT = 10
LOGITS_ALONE = Head()
"""For a model that gives its logits, or names them so."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How to optimise. `micro_batch_size` rows at a time go through the model (null: the whole batch at once).

    `log_gradients`: of several terms, how strongly each pulls is measured `GRADIENTS_PER_FIT` times, see
    `TermGradients`.
    """

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
    log_gradients: bool = True

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant or a cosine to 0 (Loshchilov and Hutter 2017)."""
        warmup = max(1, round(self.steps * self.warmup_fraction))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands."""

    step: int
    steps: int
    rows_per_s: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished training: the log (one entry per interval) and the seconds of this process's steps.

    An entry holds, of its interval: the mean `loss`; of each term NAME the mean value as `NAME`, without the term's own
    factor as `NAME unscaled`, times its `NAME weight` as `NAME weighted`. Of some entries' last step, see `pulls`: the
    norm of the weighted term's gradient by the parameters, and its ratio to that of the term on labels (else to the
    first term's).
    """

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
        self._terms, self._plan = terms, plan
        self._names = _distinct([term.name for term in terms])
        self._bare = model
        self._heard = _Heard(model, terms, head)
        self._model = self._accelerator.prepare(self._heard)
        # Not prepared: Accelerate's wrapper looks for an uninstalled package at every step, and its scaler and
        # accumulation are done here.
        self._optimizer = _optimizer(self._heard, plan)
        self._optimizer.zero_grad()  # of a step in which a training of this model was stopped
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
        weights = [term.weight_at(self.step, plan.steps) for term in self._terms]
        gradients = TermGradients(self._bare, len(self._terms)) if self._measures_gradients() else None
        parts = []
        micro_batches = list(_micro_batches(batch, plan.micro_batch_size))
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(self._model):
                parts.append(self._backward(micro, counts, weights, gradients))
        totals = self._totals(self._sum_over_ranks(torch.stack(parts).sum(dim=0)).tolist(), weights)
        self._check_finite(totals)
        measured = {} if gradients is None else self._pulls(gradients)
        if plan.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            accelerator.clip_grad_norm_(self._model.parameters(), plan.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.step += 1
        self._log(totals, {"learning_rate": learning_rate, **measured})

    def _backward(
        self, batch: Batch, counts: Tensor, weights: Sequence[float], gradients: TermGradients | None
    ) -> Tensor:
        """Add a micro-batch's gradients; returns its part of the loss and of each term, as it is and unscaled."""
        autocast = _AUTOCAST[self._plan.precision]
        with torch.autocast(self._device.type, autocast, enabled=autocast is not None):
            heard = self._model(batch.inputs)
        loss = heard[0].new_zeros((), dtype=torch.float32)
        parts, summands = [], []
        for term, output, count, weight in zip(self._terms, heard, counts, weights, strict=True):
            values = torch.where(term.valid(batch), term.values(output, batch), 0.0)
            mean = values.sum() / count
            summands.append(weight * mean)
            loss = loss + summands[-1]
            parts += [mean, term.unscaled(values).sum() / count]
        if gradients is not None:
            gradients.add([self._scaler.scale(each) for each in summands])
        # DDP averages gradients over ranks; the counts are already those of all ranks.
        self._scaler.scale(loss * self._accelerator.num_processes).backward()
        return torch.stack([part.detach().float() for part in (loss, *parts)])

    def _totals(self, parts: Sequence[float], weights: Sequence[float]) -> dict[str, float]:
        """What a step gives to the log, by name."""
        totals = {"loss": parts[0]}
        for name, weight, value, unscaled in zip(self._names, weights, parts[1::2], parts[2::2], strict=True):
            totals |= {name: value, f"{name} unscaled": unscaled}
            totals |= {f"{name} weight": weight, f"{name} weighted": weight * value}
        return totals

    def _measures_gradients(self) -> bool:
        """Whether this step ends an interval of the log, and one of those that have gradients; the first has."""
        if len(self._terms) == 1 or not self._plan.log_gradients:
            return False
        intervals, steps_left = divmod(self.step + 1, self._interval)
        return steps_left == 0 and (intervals - 1) % max(1, LOGS_PER_FIT // GRADIENTS_PER_FIT) == 0

    def _pulls(self, gradients: TermGradients) -> dict[str, float]:
        norms = gradients.norms(self._sum_over_ranks, self._scaler.get_scale())
        on_labels = (index for index, term in enumerate(self._terms) if isinstance(term, LabelTerm))
        return pulls(dict(zip(self._names, norms, strict=True)), self._names[next(on_labels, 0)])

    def _check_finite(self, totals: Mapping[str, float]) -> None:
        """The same on every rank, as the totals are."""
        if math.isfinite(totals["loss"]):
            return
        parts = ", ".join(f"{name} {totals[name]:g}" for name in self._names)
        raise TrainingError(
            f"the loss is {totals['loss']} at step {self.step} ({parts}). Lower train.learning_rate, set "
            "train.clip_norm, or use train.precision: float32."
        )

    def _log(self, totals: Mapping[str, float], of_step: Mapping[str, float]) -> None:
        """Note a step's totals, and at the end of an interval their means with what is of this `of_step` alone."""
        for name, value in totals.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.loss = totals["loss"]
        if self.step % self._interval == 0 or self.step == self._plan.steps:
            length = self.step - int(self.history[-1]["step"] if self.history else 0)
            means = {name: value / length for name, value in self._sums.items()}
            self.history.append({"step": self.step, **of_step, **means})
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
            "model": self._bare.state_dict(),
            "projectors": self._heard.projectors.state_dict(),
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
        self._bare.load_state_dict(state["model"])
        self._heard.projectors.load_state_dict(state.get("projectors", {}))
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


class _Heard(nn.Module):
    """A model and what each term hears of it: its logits or another output, through the term's projector."""

    def __init__(self, model: nn.Module, terms: Sequence[TrainingTerm], head: Head) -> None:
        super().__init__()
        self.model = model
        self.projectors = nn.ModuleList([term.projector or nn.Identity() for term in terms])
        self._names = [term.student_output or LOGITS for term in terms]
        self._outputs = Outputs(model, {*self._names} - {LOGITS}, head)

    def forward(self, inputs: Inputs) -> list[Tensor]:
        """One tensor per term, in float32 or wider. Raises `ConfigError` for an output that does not exist."""
        with naming(TrainingError, lambda: f"{type(self.model).__name__} fails on inputs of shape {described(inputs)}"):
            returned = self._outputs(inputs)
        said = self._outputs.named(returned)
        # Once each: several terms hear the same logits, which may be large.
        wide = {
            name: _wide(self._outputs.tensor(name, said, f"the output {name!r} of the student"))
            for name in dict.fromkeys(self._names)
        }
        return [_wide(projector(wide[name])) for name, projector in zip(self._names, self.projectors, strict=True)]


def _wide(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


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


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, a repeated one with its number: `a`, `a #2`."""
    numbers = [names[:index].count(name) + 1 for index, name in enumerate(names)]
    return [name if number == 1 else f"{name} #{number}" for name, number in zip(names, numbers, strict=True)]


def _micro_batches(batch: Batch, size: int | None) -> Iterator[Batch]:
    if size is None or len(batch) <= size:
        yield batch
        return
    for start in range(0, len(batch), size):
        yield batch.part(slice(start, start + size))


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout's seed for one step of one rank: a resumed training draws what an uninterrupted one draws."""
    return int(digest([seed, step, rank])[:15], 16)
