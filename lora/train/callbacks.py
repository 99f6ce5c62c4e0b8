"""What a run tells whoever watches it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora.dispatch import Choice


@dataclass(frozen=True)
class Started:
    """Said once, before the first step."""

    task: str
    method: str
    device: str  # "cpu" or "cuda"
    train_rows: int  # the repeated ones included
    repeated_rows: int  # that oversampling added
    validation_rows: int
    truncated_rows: int
    max_seq_len: int
    total_steps: int
    done_steps: int  # of a run that goes on; 0 of a new one
    trainable_parameters: int
    class_names: tuple[str, ...]
    class_weights: tuple[float, ...] | None
    micro_batch_tokens: int
    note: str | None  # what another program would read otherwise
    output: Path
    operations: tuple[Choice, ...]  # of this training: what runs each of them, and why


@dataclass(frozen=True)
class StepDone:
    """Said after every optimizer step."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # per counted token or row, in nats
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens: int
    tokens_per_second: float
    peak_memory: int | None  # bytes of the host that the process has held at most; None where no one tells


@dataclass(frozen=True)
class EpochDone:
    """Said after every epoch's validation; the fields are those of the metrics file."""

    epoch: int
    train_loss: float
    val_loss: float
    train_accuracy: float
    val_accuracy: float
    learning_rate: float  # of the last step
    epoch_time_ms: int
    samples_per_sec: float
    best: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


class Callback:
    """Receives what a run says; override what you need."""

    def started(self, event: Started) -> None:
        """Before the first step."""

    def step_done(self, event: StepDone) -> None:
        """After every optimizer step."""

    def epoch_done(self, event: EpochDone) -> None:
        """After every epoch."""

    def said(self, message: str) -> None:
        """A sentence that the user should see."""
