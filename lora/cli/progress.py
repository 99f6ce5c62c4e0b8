"""How a run shows itself while it runs, on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora.cli.output import listed, note, note_truncated, print_facts, size
from lora.train.callbacks import Callback, EpochDone, Started, StepDone
from lora.train.duration import duration

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress(*, quiet: bool = False, after_interrupt: str) -> Iterator[Callback]:
    """Give the callback for this process's stderr, and leave the terminal as it was.

    Args:
        quiet: say only what the user must know.
        after_interrupt: what can be done after Ctrl-C, said there.
    """
    try:
        with _shown(quiet=quiet) as callback, warnings.catch_warnings():
            # what is not finite ends a run, in an error that says where: NumPy's lines about it say less
            warnings.filterwarnings("ignore", ".* encountered in ", RuntimeWarning)
            yield callback
    except KeyboardInterrupt:
        note(after_interrupt)
        raise


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Callback]:
    if quiet:
        yield Notes()
    elif not sys.stderr.isatty():
        yield ProgressLines()
    else:
        bar = _bar()
        try:
            yield ProgressBar(bar)
        finally:
            bar.stop()


class Notes(Callback):
    """Says only what the user must know."""

    def started(self, event: Started) -> None:
        """Say what another program would read otherwise, and what was cut."""
        # a GPU's memory is another, which this figure says nothing of
        self._where = "" if event.device == "cpu" else " of host memory"
        if event.note:
            note(event.note)
        note_truncated(event.truncated_rows, event.max_seq_len)

    def said(self, message: str) -> None:
        """Say it."""
        note(message)


class ProgressLines(Notes):
    """A line at the start, every few seconds, and after each epoch: for log files."""

    def started(self, event: Started) -> None:
        """Say what is trained on what."""
        print_facts(_facts(event), err=True)
        super().started(event)
        self._steps, self._begin, self._last = event.total_steps, time.monotonic(), float("-inf")
        self._done = 0  # here: a run that goes on has done others before

    def step_done(self, event: StepDone) -> None:
        """Say where the run stands, unless the last line is fresh."""
        now = time.monotonic()
        self._done += 1
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = duration((now - self._begin) / self._done * (self._steps - event.step))
        click.echo(f"step {event.step}/{self._steps}  {_state(event, self._where)}  {left} left", err=True)

    def epoch_done(self, event: EpochDone) -> None:
        """Say what the epoch brought."""
        click.echo(_epoch_line(event), err=True)


class ProgressBar(Notes):
    """A bar with loss, learning rate, speed, peak memory and time left, and a line above it for an epoch."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def started(self, event: Started) -> None:
        """Say what is trained on what, and draw the bar."""
        print_facts(_facts(event), err=True)
        super().started(event)
        for finished in self._bar.task_ids:  # of an adapter that was trained before this one
            self._bar.remove_task(finished)
        done, total = event.done_steps, event.total_steps
        self._task = self._bar.add_task("", total=total, completed=done, epoch=1, state="")
        self._bar.start()

    def step_done(self, event: StepDone) -> None:
        """Move the bar."""
        self._bar.update(
            self._task, completed=event.step, epoch=event.epoch, state=_state(event, self._where)
        )

    def epoch_done(self, event: EpochDone) -> None:
        """Write a line above the bar."""
        self._bar.console.print(_epoch_line(event), highlight=False, markup=False)

    def said(self, message: str) -> None:
        """Take the bar away and say it."""
        self._bar.stop()
        super().said(message)


def _bar() -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _state(event: StepDone, where: str) -> str:
    parts = [
        f"loss {event.loss:.4f}",
        f"lr {event.learning_rate:.2e}",
        f"{event.tokens_per_second:,.0f} tokens/s",
        None if event.peak_memory is None else f"{size(event.peak_memory)}{where}",
    ]
    return "  ".join(part for part in parts if part is not None)


def _epoch_line(event: EpochDone) -> str:
    best = "  best so far" if event.best else ""
    return (
        f"epoch {event.epoch}: train loss {event.train_loss:.4f}, validation loss {event.val_loss:.4f}, "
        f"validation accuracy {event.val_accuracy:.2%}, {duration(event.epoch_time_ms / 1000)}{best}"
    )


def _facts(event: Started) -> dict[str, Any]:
    classes, weights = event.class_names, event.class_weights
    done = f" ({event.done_steps:,} of them done before)" if event.done_steps else ""
    repeats = f" ({event.repeated_rows:,} of them repeats of rare classes)" if event.repeated_rows else ""
    return {
        "Task": event.task,
        "Classes": f"{len(classes)}: {listed(classes)}" if classes else None,
        "Class weights": listed([f"{weight:.3f}" for weight in weights]) if weights else None,
        "Rows": f"{event.train_rows:,} to train on{repeats}, {event.validation_rows:,} to validate",
        "Method": f"{event.method}, {event.trainable_parameters:,} trainable parameters",
        "Steps": f"{event.total_steps:,}{done}",
        "Operations": _operations(event),
        "Output": event.output,
    }


def _operations(event: Started) -> str:
    """Return the names of the operations by what runs them."""
    by_implementation: dict[str, list[str]] = {}
    for choice in event.operations:
        by_implementation.setdefault(choice.implementation, []).append(choice.operation)
    return "; ".join(f"{name} runs {', '.join(names)}" for name, names in sorted(by_implementation.items()))
