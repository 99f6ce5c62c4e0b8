"""The training loop: epochs of steps, a validation after each, early stopping, the best state on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
from lora.train.interrupts import Held
from lora.train.optimizer import AdamW
from lora.train.schedule import warmup_cosine
from lora.train.step import StepReport, train_step


@dataclass
class EpochSums:
    """What the steps of the epoch that runs now add up to."""

    steps: int = 0
    loss: float = 0.0  # times counted, in nats
    correct: int = 0
    counted: int = 0
    seconds: float = 0.0  # in steps

    def add(self, report: StepReport, seconds: float) -> None:
        """Add a step's share."""
        self.steps += 1
        self.loss += report.loss * report.counted
        self.correct += report.correct
        self.counted += report.counted
        self.seconds += seconds


@dataclass
class Progress:
    """Where a run stands: with the trained arrays and their moments, all that the rest of it depends on."""

    epochs: list[EpochDone] = field(default_factory=list)
    best: EpochDone | None = None
    step: int = 0
    stopped_early: bool = False
    seconds: float = 0.0  # of all processes that have trained it, up to the last state that was written
    sums: EpochSums = field(default_factory=EpochSums)
    unsaved: list[str] = field(default_factory=list)  # states of the last epoch that are to be kept

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Progress:
        """Return the progress that `as_dict` described."""
        epochs = [EpochDone(**epoch) for epoch in fields["epochs"]]
        best = None if fields["best"] is None else EpochDone(**fields["best"])
        sums = EpochSums(**fields["sums"])
        return cls(**{**fields, "epochs": epochs, "best": best, "sums": sums})


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
    optimizer: AdamW
    records: Sequence[Callback]  # files that the state counts on: a step and its row are there, or neither
    checkpoint: Callable[[], None]  # writes the state that a killed run goes on from
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
        self._save_kept()
        while not self._is_over():
            self._finish(self._epoch(len(self.progress.epochs) + 1))
        return self.progress

    def _is_over(self) -> bool:
        done = len(self.progress.epochs)
        if done < self.config.epochs and done - self._best_epoch() >= self.config.patience:
            self.progress.stopped_early = True
        return done == self.config.epochs or self.progress.stopped_early

    def _epoch(self, epoch: int) -> EpochDone:
        # a run that goes on in the middle of an epoch has its first steps behind it
        for rows in self._steps(epoch)[self.progress.sums.steps :]:
            self._step(epoch, rows)
            if self.progress.step % self.config.save_steps == 0:
                self.checkpoint()
        start, sums = time.perf_counter(), self.progress.sums
        val_loss, val_accuracy = evaluate_loss(
            self.model, self.validation, self.config.batch_size, self.micro_tokens, self.class_weights
        )
        if not math.isfinite(val_loss):
            raise DivergedError(f"epoch {epoch}: the validation loss is {val_loss}; {self._what_to_lower()}")
        return EpochDone(
            epoch=epoch,
            train_loss=sums.loss / sums.counted,
            val_loss=val_loss,
            train_accuracy=sums.correct / sums.counted,
            val_accuracy=val_accuracy,
            learning_rate=self._learning_rate(self.progress.step - 1),
            epoch_time_ms=round(1000 * (sums.seconds + time.perf_counter() - start)),
            samples_per_sec=len(self.train) / sums.seconds,
            best=self.progress.best is None or val_loss < self.progress.best.val_loss,
        )

    def _steps(self, epoch: int) -> Sequence[Sequence[Array]]:
        """Return the batches of row indices of each step; the run's first step takes the most memory."""
        batches = epoch_batches(len(self.train), self.config.batch_size, self.config.seed, epoch)
        accum = self.config.grad_accum
        steps = [batches[first : first + accum] for first in range(0, len(batches), accum)]
        return longest_first(steps, self.train.lengths, self.micro_tokens) if epoch == 1 else steps

    def _step(self, epoch: int, rows: Sequence[Array]) -> None:
        start, lr = time.perf_counter(), self._learning_rate(self.progress.step)
        with Held() as held:
            report = self._moved(rows, lr, held)
            seconds = time.perf_counter() - start
            self.progress.step += 1
            self.progress.sums.add(report, seconds)
            event = StepDone(
                self.progress.step,
                epoch,
                report.loss,
                lr,
                report.gradient_norm,
                report.tokens,
                report.tokens / seconds,
                peak_memory(),
            )
            for record in self.records:
                record.step_done(event)
        for callback in self.callbacks:
            callback.step_done(event)

    def _moved(self, rows: Sequence[Array], lr: float, held: Held) -> StepReport:
        try:
            return train_step(
                self.model,
                self.optimizer,
                [self.train.batch(batch) for batch in rows],
                lr=lr,
                clip=self.config.clip,
                micro_tokens=self.micro_tokens,
                packing=self.config.packing,
                class_weights=self.class_weights,
                label_smoothing=self.config.label_smoothing,
                before_move=held.begin,
            )
        except DivergedError as error:
            step = self.progress.step + 1
            raise DivergedError(f"step {step}: {error}; {self._what_to_lower()}") from error

    def _what_to_lower(self) -> str:
        """Return what a user can do about a loss or a gradient that is not finite."""
        if self.progress.step == 0:
            return (
                f"nothing is trained yet: check the base's weights, and dtype, which is {self.config.dtype}"
            )
        limit = ", or set clip, which is 0" if self.config.clip == 0 else ""
        lower = f"lower learning_rate, which is {self.config.learning_rate:g}{limit}"
        return f"{lower}, and begin anew in another output"

    def _finish(self, done: EpochDone) -> None:
        with Held() as held:
            held.begin()
            self.progress.epochs.append(done)
            self.progress.sums = EpochSums()
            if done.best:
                self.progress.best = done
            self.progress.unsaved = self._kept_states(done)
            for record in self.records:
                record.epoch_done(done)
        # first: a run that is killed over the states that are kept can write them again
        self.checkpoint()
        self._save_kept()
        for callback in self.callbacks:
            callback.epoch_done(done)

    def _kept_states(self, done: EpochDone) -> list[str]:
        every = self.config.epochs_between_states()
        periodic = [f"epoch-{done.epoch}"] if done.epoch % every == 0 else []
        return ["best", *periodic] if done.best else periodic

    def _save_kept(self) -> None:
        if self.progress.unsaved:
            for name in self.progress.unsaved:
                self.save(name)
            self.progress.unsaved = []
            self.checkpoint()

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
            outcome = model.score(part, class_weights)
            loss, correct = loss + outcome.loss, correct + outcome.correct
        counted += batch.counted
        weight += model.head.normalizer(batch, class_weights)
    return loss / weight, correct / counted
