"""A run's numbers as TensorBoard event files: `tensorboard --logdir DIR` shows them while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora.errors import UnsupportedError
from lora.train.callbacks import Callback, EpochDone, StepDone

FOLDER = "tensorboard"
EXTRA = "pip install 'lora-numpy[tensorboard]'"


def require_tensorboard() -> Any:
    """Return the class that writes event files.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError(f"tensorboard needs tensorboardX, which is an extra: {EXTRA}") from error
    return SummaryWriter


class TensorBoard(Callback):
    """Writes the scalars of each step and, at the step that it ended with, of each epoch."""

    def __init__(self, folder: Path, *, after_step: int = 0) -> None:
        """Open an event file in `folder`; of those there, TensorBoard drops what came after `after_step`."""
        self._writer = require_tensorboard()(str(folder), purge_step=after_step + 1)
        self._step = after_step

    def step_done(self, event: StepDone) -> None:
        """Write what a step brought."""
        self._step = event.step
        self._add(
            {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/gradient_norm": event.gradient_norm,
                "train/tokens_per_second": event.tokens_per_second,
            }
        )

    def epoch_done(self, event: EpochDone) -> None:
        """Write what an epoch brought, and let a reader see all of it."""
        self._add(
            {
                "epoch/train_loss": event.train_loss,
                "epoch/train_accuracy": event.train_accuracy,
                "epoch/val_loss": event.val_loss,
                "epoch/val_accuracy": event.val_accuracy,
            }
        )
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()

    def _add(self, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, self._step)
