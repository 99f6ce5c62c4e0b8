"""AdamW over whatever a model trains: PyTorch's update, float32 state, weights moved in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora.backend import Array, array_module
from lora.errors import DivergedError, UsageError, ValidationError


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2).

    State is two float32 arrays for each trained array, made at the first step.
    """

    def __init__(
        self,
        model: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """Prepare to train what `model.trainable()` returns.

        Args:
            model: a `lora` model with something trainable.
            lr: step size; `step` can be given another one by a schedule.
            betas: decay of the first and second moments, each in [0, 1).
            eps: added to the root of the second moment, in the unit of a gradient.
            weight_decay: share of a weight that is taken away at each step, times lr.

        Raises:
            UsageError: a value is outside its range; each one is named.
        """
        problems = [
            f"{name} = {value}, expected {expected}"
            for name, value, valid, expected in (
                ("lr", lr, lr >= 0, "0 or more"),
                ("betas", betas, all(0 <= beta < 1 for beta in betas), "both in [0, 1)"),
                ("eps", eps, eps > 0, "more than 0"),
                ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
            )
            if not valid
        ]
        if problems:
            raise UsageError("AdamW: " + "; ".join(problems))
        self.model = model
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.moments: dict[str, tuple[Array, Array]] = {}

    def step(self, gradients: Mapping[str, Array], lr: float | None = None, *, clip: float = 0.0) -> float:
        """Move every trained array once; return the joint norm of the gradients, before clipping.

        Args:
            gradients: by the names of `model.trainable()`; unchanged.
            lr: this step's size; None for the one given at the start.
            clip: the largest joint norm that the gradients enter with; 0 for no limit.

        Raises:
            ValidationError: gradients and trained arrays differ in name or shape. Nothing was moved.
            DivergedError: a gradient is not finite. Nothing was moved.
        """
        trained = self.model.trainable()
        self._check(trained, gradients)
        self.make_moments()
        norm = self.model.ops.adamw.step(
            tuple(trained.values()),
            tuple(_as_moved(gradients[name], parameter) for name, parameter in trained.items()),
            tuple(self.moments[name] for name in trained),
            step=self.steps + 1,
            lr=self.lr if lr is None else lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip=clip,
        )
        if not math.isfinite(norm):
            raise DivergedError(f"a gradient is not finite: the norm of all of them is {norm}")
        self.steps += 1
        return norm

    def make_moments(self) -> None:
        """Give every trained array that has none moments of zero."""
        for name, parameter in self.model.trainable().items():
            if name not in self.moments:
                zeros = array_module(parameter).zeros_like(parameter)
                self.moments[name] = (zeros, zeros.copy())

    @staticmethod
    def _check(trained: Mapping[str, Array], gradients: Mapping[str, Array]) -> None:
        problems = [f"no gradient for {name}" for name in trained if name not in gradients]
        problems += [f"{name} is not trained" for name in gradients if name not in trained]
        problems += [
            f"{name}: expected {trained[name].shape}, found {gradient.shape}"
            for name, gradient in gradients.items()
            if name in trained and trained[name].shape != gradient.shape
        ]
        if problems:
            raise ValidationError("gradients do not match what the model trains: " + "; ".join(problems))


def _as_moved(gradient: Array, parameter: Array) -> Array:
    """Return `gradient` laid out, and in the dtype, as `parameter` is."""
    return array_module(parameter).ascontiguousarray(gradient, dtype=parameter.dtype)
