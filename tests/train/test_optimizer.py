"""Attempts to falsify contracts/training/optimizer.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.dispatch import implementations
from lora.errors import DivergedError, UsageError, ValidationError
from lora.train.optimizer import AdamW
from tests.harness.bounds import gamma
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("optimizer")
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.05
ROUNDINGS = 16  # of one step, in float32


class Case(NamedTuple):
    widths: list[int]
    steps: int
    seed: int

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"array {i}": a for i, a in enumerate(self._draw(np.random.default_rng(self.seed)))}

    def gradients(self) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(self.seed + 1)
        return [
            {f"array {i}": a * 10.0 ** rng.integers(-3, 3) for i, a in enumerate(self._draw(rng))}
            for _ in range(self.steps)
        ]

    def rates(self) -> list[float]:
        return np.random.default_rng(self.seed + 2).uniform(1e-4, 1e-1, self.steps).tolist()

    def _draw(self, rng: np.random.Generator) -> list[np.ndarray]:
        return [rng.standard_normal((2, width)).astype("float32") for width in self.widths]


def holder(arrays: dict[str, np.ndarray]) -> Any:
    """Stand in for a model: all that the optimizer asks of one."""
    return SimpleNamespace(trainable=lambda: arrays, ops=implementations("cpu"))


def scalar_adamw(start: np.ndarray, gradients: list[np.ndarray], rates: list[float]) -> np.ndarray:
    """Return where torch.optim.AdamW takes each element, in float64."""
    p, m, v = start.astype("float64"), np.zeros(start.shape), np.zeros(start.shape)
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        p = p - lr * DECAY * p
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g.astype("float64") ** 2
        m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
        p = p - lr * m_hat / (np.sqrt(v_hat) + EPS)
    return p


def check_trajectory(optimizer: Any, case: Case) -> None:
    arrays, gradients, rates = case.arrays(), case.gradients(), case.rates()
    adamw = optimizer(holder(arrays), 1.0, BETAS, EPS, DECAY)
    for step, lr in zip(gradients, rates, strict=True):
        adamw.step(step, lr)
    for name, start in case.arrays().items():
        exact = scalar_adamw(start, [step[name] for step in gradients], rates)
        magnitude = np.abs(start) + 4 * sum(rates)
        error = np.abs(arrays[name] - exact)
        assert (error <= gamma(ROUNDINGS * case.steps, "float32") * magnitude).all(), name


def check_in_place(optimizer: Any, case: Case) -> None:
    arrays, gradients = case.arrays(), case.gradients()[0]
    given_arrays = dict(arrays)
    before = {name: gradient.copy() for name, gradient in gradients.items()}
    optimizer(holder(arrays), 0.1).step(gradients)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, before[name])
        assert arrays[name] is given_arrays[name]
        assert (arrays[name] != case.arrays()[name]).any()


def check_mismatch(optimizer: Any, case: Case) -> None:
    arrays = case.arrays()
    adamw = optimizer(holder(arrays), 0.1)
    right = case.gradients()[0]
    last = f"array {len(case.widths) - 1}"
    missing = {name: gradient for name, gradient in right.items() if name != last}
    for wrong, named in (
        (missing | {"stranger": right[last]}, ("stranger", last)),
        (right | {last: np.zeros((3, 1), "float32")}, (last, "(3, 1)")),
    ):
        with pytest.raises(ValidationError) as caught:
            adamw.step(wrong)
        assert all(name in str(caught.value) for name in named)
    for name, start in case.arrays().items():
        np.testing.assert_array_equal(arrays[name], start)
    assert adamw.steps == 0


def check_settings(optimizer: Any, case: Case) -> None:
    wrong = {"lr": -0.1, "betas": (0.9, 1.0), "eps": 0.0, "weight_decay": -1.0}
    names = [name for i, name in enumerate(wrong) if case.seed >> i & 1] or ["lr"]
    with pytest.raises(UsageError) as caught:
        optimizer(holder(case.arrays()), **({"lr": 0.1} | {name: wrong[name] for name in names}))
    assert all(name in str(caught.value) for name in names)


def check_not_finite(optimizer: Any, case: Case) -> None:
    arrays, gradients = case.arrays(), case.gradients()[0]
    adamw = optimizer(holder(arrays), 0.1)
    last = gradients[f"array {len(case.widths) - 1}"]
    last[0, 0] = (np.nan, np.inf)[case.seed % 2]
    with pytest.raises(DivergedError, match="not finite"):
        adamw.step(gradients)
    for name, start in case.arrays().items():
        np.testing.assert_array_equal(arrays[name], start)
    assert adamw.steps == 0


CHECKS = {
    "OPTIMIZER-001": check_trajectory,
    "OPTIMIZER-002": check_in_place,
    "OPTIMIZER-003": check_mismatch,
    "OPTIMIZER-004": check_settings,
    "OPTIMIZER-005": check_not_finite,
}
CASES = st.builds(
    Case,
    st.lists(st.integers(*CONTRACT.domain["width"]), min_size=1, max_size=CONTRACT.domain["arrays"][1]),
    st.integers(*CONTRACT.domain["steps"]),
    seeds,
)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(AdamW, case)


class RestartsTheCount(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        self.steps = 0
        super().step(gradients, lr)


class IgnoresTheSchedule(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        super().step(gradients)


class SharesOneMoment(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        super().step(gradients, lr)
        first = next(iter(self.moments.values()))
        self.moments = {
            name: first if moments[0].shape == first[0].shape else moments
            for name, moments in self.moments.items()
        }


class MovesOnlyTheFirst(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        start = {name: array.copy() for name, array in self.model.trainable().items()}
        super().step(gradients, lr)
        for name in list(start)[1:]:
            self.model.trainable()[name][...] = start[name]


class ConsumesTheGradients(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        super().step(gradients, lr)
        for gradient in gradients.values():
            gradient[...] = 0


class MovesACopy(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        trained = self.model.trainable()
        for name, array in trained.items():
            trained[name] = array.copy()
        super().step(gradients, lr)


class SkipsWhatIsMissing(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        zeros = {name: np.zeros_like(array) for name, array in self.model.trainable().items()}
        super().step({name: gradients.get(name, zero) for name, zero in zeros.items()}, lr)


class MovesBeforeItChecks(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        for array in self.model.trainable().values():
            array *= 1 - self.lr * self.weight_decay
        super().step(gradients, lr)


class CountsWhatDidNotMove(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        try:
            super().step(gradients, lr)
        except DivergedError:
            self.steps += 1
            raise


class SkipsInSilence(AdamW):
    def step(self, gradients: Mapping[str, Any], lr: float | None = None) -> None:
        with suppress(DivergedError):
            super().step(gradients, lr)


class TakesAnySetting(AdamW):
    def __init__(self, model: Any, lr: float, *settings: Any, **named: Any) -> None:
        super().__init__(model, 0.1)


class NamesOneSetting(AdamW):
    def __init__(self, model: Any, lr: float, *settings: Any, **named: Any) -> None:
        try:
            super().__init__(model, lr, *settings, **named)
        except UsageError as error:
            raise UsageError(str(error).partition(";")[0]) from None


MUTANTS = {
    "restarts_the_count": RestartsTheCount,
    "ignores_the_schedule": IgnoresTheSchedule,
    "shares_one_moment": SharesOneMoment,
    "moves_only_the_first": MovesOnlyTheFirst,
    "consumes_the_gradients": ConsumesTheGradients,
    "moves_a_copy": MovesACopy,
    "skips_what_is_missing": SkipsWhatIsMissing,
    "moves_before_it_checks": MovesBeforeItChecks,
    "counts_what_did_not_move": CountsWhatDidNotMove,
    "skips_in_silence": SkipsInSilence,
    "takes_any_setting": TakesAnySetting,
    "names_one_setting": NamesOneSetting,
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
