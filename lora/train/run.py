"""What a run was, and what came of it: the record beside its output, and what `finetune` returns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora.io.atomic import write_text
from lora.train.callbacks import EpochDone

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Run:
    """The outcome of a fine-tuning run; `as_dict` has the keys that scripts read."""

    output: Path
    best: Path  # the adapter, or under full training the checkpoint, with the lowest validation loss
    task: str
    method: str
    epochs: tuple[EpochDone, ...]
    best_epoch: int
    best_val_loss: float
    stopped_early: bool
    total_time_ms: int
    tokens_per_sec: float
    samples_per_sec: float
    class_names: tuple[str, ...]
    trainable_parameters: int
    truncated_rows: int
    checkpoint_format: str  # of the kept states
    apr: Path | None = None  # the best state once more, as the one APR file that was asked for

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {
            "status": "training_complete",
            "task": self.task,
            "method": self.method,
            "best_epoch": self.best_epoch,
            "best_val_loss": self.best_val_loss,
            "stopped_early": self.stopped_early,
            "total_epochs": len(self.epochs),
            "total_time_ms": self.total_time_ms,
            "wall_time_sec": self.total_time_ms / 1000,
            "final_loss": self.epochs[-1].train_loss,
            "tokens_per_sec": self.tokens_per_sec,
            "samples_per_sec": self.samples_per_sec,
            "trainable_params": self.trainable_parameters,
            "truncated_rows": self.truncated_rows,
            "class_names": list(self.class_names),
            "checkpoint_dir": str(self.output),
            "best_checkpoint": str(self.best),
            "checkpoint_format": self.checkpoint_format,
            "apr_file": None if self.apr is None else str(self.apr),
            "epoch_metrics": [epoch.as_dict() for epoch in self.epochs],
        }


def write_run_file(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json: settings, data, machine; all that a run's bits depend on."""
    write_text(folder / RUN_FILE, json.dumps(facts, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return asdict(value)
