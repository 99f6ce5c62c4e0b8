"""Every setting of a fine-tuning run, checked together before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora.errors import UnsupportedError, UsageError
from lora.io.lora_config import LoraConfig

Task = Literal["classify", "causal", "instruct"]
Method = Literal["auto", "full", "lora", "head"]
Pooling = Literal["mean", "last"]
Layout = Literal["text", "multimodal"]
ClassWeights = Literal["auto", "uniform", "sqrt_inverse", "inverse_freq"]
NOT_BUILT = {"method": ("qlora",)}
CheckpointFormat = Literal["safetensors", "apr,safetensors"]
KEPT_EPOCHS = 5  # runs of up to this many epochs keep every epoch's state, longer ones every fifth


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of `lora.finetune` and of `lora finetune`: the same names, the same defaults."""

    task: Task | None = None  # None: what the rows' fields say
    method: Method = "auto"
    rank: int = 16
    alpha: float | None = None  # None: 2 · rank
    targets: str | tuple[str, ...] = "qv"
    epochs: int = 3
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    batch_size: int = 32  # rows
    max_seq_len: int = 512  # tokens; a longer text keeps its head
    grad_accum: int = 1  # batches per optimizer step
    packing: bool = True  # rows together up to the plan's tokens; False: every row alone
    val_split: float = 0.2  # share of the rows
    patience: int = 10  # epochs without a better validation loss
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # joint norm of the gradients; 0 for no limit
    seed: int = 42
    num_classes: int | None = None  # None: what the data holds
    pooling: Pooling | None = None  # None: mean, or a classification checkpoint's own
    head_bias: bool | None = None  # None: with a bias, or a classification checkpoint's own
    class_weights: ClassWeights = "auto"
    oversample: bool = False  # repeat training rows of rare classes until all classes are equal
    label_smoothing: float = 0.0  # of the training loss; validation is not smoothed
    save_steps: int = 50  # optimizer steps between the states that a killed run goes on from
    save_every: int | None = None  # epochs; None: each of up to 5, else every 5th
    keep: int = 5  # newest states of save_every; the best one and the one to go on from always stay
    checkpoint_format: CheckpointFormat = "safetensors"  # of each kept state; with apr, as one APR file too
    layout: Layout | None = None  # of the adapter's tensor names; None: the base's own
    model_size: str | None = None  # a published size that the checkpoint must have
    device: str = "cpu"
    dtype: str = "float32"
    tensorboard: bool = False  # event files too, which need the extra `tensorboard`

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UsageError: some are out of range; all of them are named.
            UnsupportedError: a method or task that is not built yet.
        """
        for name, values in NOT_BUILT.items():
            if getattr(self, name) in values:
                raise UnsupportedError(f"{name} {getattr(self, name)!r} is not built in this version")
        problems = [
            f"{name} = {getattr(self, name)!r}: expected {expected}"
            for name, valid, expected in self._rules()
            if not valid
        ]
        if problems:
            raise UsageError("; ".join(problems))

    def _rules(self) -> list[tuple[str, bool, str]]:
        return [
            ("task", self.task in (None, *get_args(Task)), "classify, causal or instruct"),
            ("method", self.method in get_args(Method), "auto, full, lora or head"),
            ("rank", _whole(self.rank, 1), "a whole number of 1 or more"),
            ("alpha", self.alpha is None or self.alpha > 0, "more than 0"),
            ("targets", bool(self.targets), "a shorthand, a regular expression or a list of module names"),
            ("epochs", _whole(self.epochs, 1), "a whole number of 1 or more"),
            ("learning_rate", 0 < self.learning_rate < float("inf"), "more than 0"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or more"),
            ("batch_size", _whole(self.batch_size, 1), "a whole number of 1 or more"),
            ("max_seq_len", _whole(self.max_seq_len, 1), "a whole number of 1 or more"),
            ("grad_accum", _whole(self.grad_accum, 1), "a whole number of 1 or more"),
            ("val_split", 0 < self.val_split <= 0.5, "more than 0, at most 0.5 (SSC-026)"),
            ("patience", _whole(self.patience, 1), "a whole number of 1 or more"),
            ("warmup", 0 <= self.warmup < 1, "0 or more, less than 1"),
            ("clip", 0 <= self.clip < float("inf"), "0 or more"),
            ("seed", _whole(self.seed, 0), "a whole number of 0 or more"),
            ("num_classes", self.num_classes is None or _whole(self.num_classes, 2), "2 or more"),
            ("pooling", self.pooling in (None, *get_args(Pooling)), "mean or last"),
            (
                "class_weights",
                self.class_weights in get_args(ClassWeights),
                ", ".join(get_args(ClassWeights)),
            ),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 or more, less than 1"),
            ("save_steps", _whole(self.save_steps, 1), "a whole number of 1 or more"),
            ("save_every", self.save_every is None or _whole(self.save_every, 1), "1 or more"),
            ("keep", _whole(self.keep, 1), "a whole number of 1 or more"),
            (
                "checkpoint_format",
                self.checkpoint_format in get_args(CheckpointFormat),
                " or ".join(get_args(CheckpointFormat)),
            ),
            ("layout", self.layout in (None, *get_args(Layout)), "text or multimodal"),
            ("device", self.device in ("cpu", "cuda"), "cpu or cuda"),
            ("dtype", self.dtype in ("float64", "float32", "bfloat16"), "float64, float32 or bfloat16"),
        ]

    def epochs_between_states(self) -> int:
        """Return after how many epochs a state is kept."""
        return self.save_every or (1 if self.epochs <= KEPT_EPOCHS else KEPT_EPOCHS)

    def lora_config(self) -> LoraConfig:
        """Return the adapter's configuration."""
        targets = self.targets if isinstance(self.targets, str) else tuple(self.targets)
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
