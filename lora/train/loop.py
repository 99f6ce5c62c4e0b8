"""The training loop: epochs of steps, a validation after each, early stopping, the best state on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora.backend import Array
from lora.backend.process_memory import peak_memory
from lora.data.batches import epoch_batches
from lora.data.packed import split
from lora.data.packing import longest_first
from lora.errors import DivergedError
from lora.model.model import Model
from lora.train.callbacks import Callback, EpochDone, StepDone
from lora.train.config import FinetuneConfig
from lora.train.examples import Examples
from lora.train.optimizer import AdamW
from lora.train.schedule import warmup_cosine
from lora.train.step import StepReport, train_step

KEPT_EPOCHS = 5  # runs of up to this many epochs keep every epoch's state, longer ones every fifth


@dataclass
class Progress:
    """Where a run stands."""

    epochs: list[EpochDone] = field(default_factory=list)
    best: EpochDone | None = None
    step: int = 0
    stopped_early: bool = False


@dataclass
class Loop:
    """Trains `model` on `train`; calls `save(name)` for the best and the periodic states."""

    model: Model
    config: FinetuneConfig
    train: Examples
    validation: Examples
    class_weights: Array | None
    micro_tokens: int
    callbacks: Sequence[Callback]
    save: Callable[[str], None]
    progress: Progress = field(default_factory=Progress)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; the last may hold fewer batches."""
        batches = math.ceil(len(self.train) / self.config.batch_size)
        return math.ceil(batches / self.config.grad_accum)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, unless it stops early."""
        return self.config.epochs * self.steps_per_epoch

    def run(self) -> Progress:
        """Train until the last epoch, or until `patience` epochs have brought no better validation loss."""
        optimizer = AdamW(self.model, self.config.learning_rate, weight_decay=self.config.weight_decay)
        for epoch in range(1, self.config.epochs + 1):
            done = self._epoch(epoch, optimizer)
            self._remember(done)
            if done.epoch - self._best_epoch() >= self.config.patience and epoch < self.config.epochs:
                self.progress.stopped_early = True
                break
        return self.progress

    def _epoch(self, epoch: int, optimizer: AdamW) -> EpochDone:
        start = time.perf_counter()
        reports = []
        for rows in self._steps(epoch):
            reports.append(self._step(epoch, optimizer, rows))
        seconds = time.perf_counter() - start
        counted = sum(report.counted for report in reports)
        val_loss, val_accuracy = evaluate_loss(
            self.model, self.validation, self.config.batch_size, self.micro_tokens, self.class_weights
        )
        if not math.isfinite(val_loss):
            raise DivergedError(
                f"the validation loss after epoch {epoch} is {val_loss}: lower the learning rate"
            )
        return EpochDone(
            epoch=epoch,
            train_loss=sum(report.loss * report.counted for report in reports) / counted,
            val_loss=val_loss,
            train_accuracy=sum(report.correct for report in reports) / counted,
            val_accuracy=val_accuracy,
            learning_rate=self._learning_rate(self.progress.step - 1),
            epoch_time_ms=round(1000 * (time.perf_counter() - start)),
            samples_per_sec=len(self.train) / seconds,
            best=self.progress.best is None or val_loss < self.progress.best.val_loss,
        )

    def _steps(self, epoch: int) -> Sequence[Sequence[Array]]:
        """Return the batches of row indices of each step; the run's first step takes the most memory."""
        batches = epoch_batches(len(self.train), self.config.batch_size, self.config.seed, epoch)
        accum = self.config.grad_accum
        steps = [batches[first : first + accum] for first in range(0, len(batches), accum)]
        return longest_first(steps, self.train.lengths, self.micro_tokens) if epoch == 1 else steps

    def _step(self, epoch: int, optimizer: AdamW, rows: Sequence[Array]) -> StepReport:
        start, lr = time.perf_counter(), self._learning_rate(self.progress.step)
        report = train_step(
            self.model,
            optimizer,
            [self.train.batch(batch) for batch in rows],
            lr=lr,
            clip=self.config.clip,
            micro_tokens=self.micro_tokens,
            packing=self.config.packing,
            class_weights=self.class_weights,
            label_smoothing=self.config.label_smoothing,
        )
        self.progress.step += 1
        rate = report.tokens / (time.perf_counter() - start)
        event = StepDone(
            self.progress.step,
            epoch,
            report.loss,
            lr,
            report.gradient_norm,
            report.tokens,
            rate,
            peak_memory(),
        )
        for callback in self.callbacks:
            callback.step_done(event)
        return report

    def _remember(self, done: EpochDone) -> None:
        self.progress.epochs.append(done)
        if done.best:
            self.progress.best = done
            self.save("best")
        every = self.config.save_every or (1 if self.config.epochs <= KEPT_EPOCHS else KEPT_EPOCHS)
        if done.epoch % every == 0:
            self.save(f"epoch-{done.epoch}")
        for callback in self.callbacks:
            callback.epoch_done(done)

    def _best_epoch(self) -> int:
        return self.progress.best.epoch if self.progress.best is not None else 0

    def _learning_rate(self, step: int) -> float:
        return warmup_cosine(
            step, self.total_steps, peak=self.config.learning_rate, warmup=self.config.warmup
        )


def evaluate_loss(
    model: Model, examples: Examples, batch_size: int, micro_tokens: int, class_weights: Array | None = None
) -> tuple[float, float]:
    """Return (loss per counted token or row in nats, accuracy) over all examples, in their own order."""
    loss, correct, counted, weight = 0.0, 0, 0, 0.0
    for first in range(0, len(examples), batch_size):
        batch = examples.batch(np.arange(first, min(first + batch_size, len(examples))))
        for part in split(batch, max(micro_tokens, int(batch.lengths.max()))):
            hidden = model.hidden_states(part)
            outcome = model.head.score(model.ops, model.parameters, hidden, part, class_weights=class_weights)
            loss, correct = loss + outcome.loss, correct + outcome.correct
        counted += batch.counted
        weight += model.head.normalizer(batch, class_weights)
    return loss / weight, correct / counted
