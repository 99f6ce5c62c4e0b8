"""Attempts to falsify contracts/training/evaluation.yaml: scores against definitions written out as loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.train import probability_scores
from lora.train.classification_metrics import metrics_from_probabilities
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("evaluation")
GOLDEN = json.loads((Path(__file__).parent / "scikit_learn_scores.json").read_text())


class Case(NamedTuple):
    rows: int
    classes: int
    seed: int

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return probabilities [n, C], labels [n] and confusion [C, C]; some classes are missing."""
        rng = np.random.default_rng(self.seed)
        odds = np.exp(2 * rng.standard_normal((self.rows, self.classes)))
        p, labels = odds / odds.sum(axis=1, keepdims=True), rng.integers(0, self.classes, self.rows)
        confusion = np.zeros((self.classes, self.classes), np.int64)
        np.add.at(confusion, (labels, p.argmax(axis=1)), 1)
        return p, labels, confusion


CASES = st.builds(
    Case, st.integers(*CONTRACT.domain["rows"]), st.integers(*CONTRACT.domain["classes"]), seeds
)


def check_probabilities(scores: Any, case: Case) -> None:
    p, labels, _ = case.arrays()
    rows = list(zip(p.tolist(), labels.tolist(), strict=True))
    expected = sum(-math.log(row[label]) for row, label in rows) / len(rows)
    assert scores.log_loss(p, labels) == pytest.approx(expected)
    expected = sum((q - (c == label)) ** 2 for row, label in rows for c, q in enumerate(row)) / len(rows)
    assert scores.brier_score(p, labels) == pytest.approx(expected)
    expected = sum(sum(q > row[label] for q in row) < 2 for row, label in rows) / len(rows)
    assert scores.top_two_accuracy(p, labels) == pytest.approx(expected)


def check_agreement(scores: Any, case: Case) -> None:
    _, labels, confusion = case.arrays()
    n, classes = len(labels), range(case.classes)
    right = sum(confusion[c, c] for c in classes) / n
    chance = sum(confusion[c].sum() * confusion[:, c].sum() for c in classes) / n**2
    kappa = 0.0 if chance == 1 else (right - chance) / (1 - chance)
    assert scores.cohen_kappa(confusion) == pytest.approx(kappa, abs=1e-12)
    # the correlation of the unit vectors of labels and predictions, which Gorodkin starts from
    pairs = [(i, j) for i in classes for j in classes for _ in range(confusion[i, j])]
    x, y = (np.eye(case.classes)[[pair[side] for pair in pairs]] for side in range(2))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = math.sqrt((x * x).sum() * (y * y).sum())
    expected = 0.0 if spread < 1e-12 else (x * y).sum() / spread
    assert scores.matthews_correlation(confusion) == pytest.approx(expected, abs=1e-12)


def check_interval(scores: Any, case: Case) -> None:
    _, _, confusion = case.arrays()
    n, right = int(confusion.sum()), int(confusion.trace())

    def accuracy(counts: np.ndarray) -> float:
        assert counts.sum() == n
        return counts.trace() / n

    found = scores.bootstrap_interval(confusion, accuracy)
    assert found == scores.bootstrap_interval(confusion, accuracy)
    # the sample's accuracy is binomial: a percentile of 1,000 draws lies between exact ones nearby
    cumulative, below = 0.0, []
    for k in range(n + 1):
        cumulative += math.comb(n, k) * (right / n) ** k * (1 - right / n) ** (n - k)
        below.append(cumulative)

    def quantile(share: float) -> float:
        return next((k for k, c in enumerate(below) if c >= share), n) / n

    assert quantile(0.005) <= found.low <= quantile(0.055)
    assert quantile(0.945) <= found.high <= quantile(0.995)


CHECKS = {
    "EVALUATION-001": check_probabilities,
    "EVALUATION-002": check_agreement,
    "EVALUATION-003": check_interval,
}


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(probability_scores, case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(probability_scores) | changes)


REAL = probability_scores
MUTANTS = {
    "log_in_bits": _bug(log_loss=lambda p, y: REAL.log_loss(p, y) / math.log(2)),
    "sums_the_losses": _bug(log_loss=lambda p, y: REAL.log_loss(p, y) * len(y)),
    "halves_the_brier_score": _bug(brier_score=lambda p, y: REAL.brier_score(p, y) / 2),
    "scores_the_label_alone": _bug(brier_score=lambda p, y: ((1 - p[np.arange(len(y)), y]) ** 2).mean()),
    "counts_the_first_alone": _bug(top_two_accuracy=lambda p, y: (p.argmax(axis=1) == y).mean()),
    "kappa_is_accuracy": _bug(cohen_kappa=lambda m: m.trace() / m.sum()),
    "chance_is_uniform": _bug(cohen_kappa=lambda m: (m.trace() / m.sum() - 1 / len(m)) / (1 - 1 / len(m))),
    "mcc_is_kappa": _bug(matthews_correlation=REAL.cohen_kappa),
    "interval_of_ninety": _bug(
        bootstrap_interval=lambda m, f: REAL.Interval(
            *np.percentile(
                np.random.default_rng(0).binomial(m.sum(), m.trace() / m.sum(), 1000) / m.sum(), (15, 85)
            )
        )
    ),
    "interval_of_a_point": _bug(bootstrap_interval=lambda m, f: REAL.Interval(f(m), f(m))),
    "draws_anew_each_time": _bug(
        bootstrap_interval=lambda m, f: REAL.bootstrap_interval(
            m, f, seed=int(np.random.default_rng().integers(2**31))
        )
    ),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_scikit_learn_says_the_same(case: dict[str, Any]) -> None:
    metrics = metrics_from_probabilities(np.array(case["probabilities"]), np.array(case["labels"]))
    for name, expected in case["scores"].items():
        assert getattr(metrics, name) == pytest.approx(expected, abs=1e-12), name


def test_a_case_worked_by_hand() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.25, 0.25, 0.5]])
    metrics = metrics_from_probabilities(p, np.array([0, 1, 1, 2]), ["a", "b", "c"])
    # predictions 0 2 0 2
    assert metrics.log_loss == pytest.approx(
        -(math.log(0.5) + math.log(0.2) + math.log(0.3) + math.log(0.5)) / 4
    )
    assert metrics.brier_score == pytest.approx((0.38 + 1.14 + 0.86 + 0.375) / 4)
    assert metrics.top2_accuracy == 1.0
    # p_o = 2/4; p_e = (1·2 + 2·0 + 1·2) / 16 = 1/4
    assert metrics.cohen_kappa == pytest.approx(1 / 3)
    # c s - Σ p t = 2·4 - 4; (16 - 8)(16 - 6)
    assert metrics.mcc == pytest.approx(4 / math.sqrt(80))
    assert metrics.random_baseline.accuracy == pytest.approx(6 / 16)
    assert metrics.random_baseline.macro_f1 == pytest.approx(1 / 3)
    found = [(c.label, c.predicted, c.count) for c in metrics.top_confusions]
    assert found == [("b", "a", 1), ("b", "c", 1)]


def test_one_class_everywhere_is_no_agreement() -> None:
    metrics = metrics_from_probabilities(np.array([[1.0, 0.0]] * 3), np.zeros(3, int))
    assert (metrics.cohen_kappa, metrics.mcc, metrics.log_loss, metrics.top_confusions) == (0, 0, 0, ())
    assert metrics.accuracy_interval == probability_scores.Interval(1.0, 1.0)


def test_many_rows_do_not_overflow() -> None:
    confusion = np.array([[2**31, 0], [0, 2**31]])
    assert probability_scores.matthews_correlation(confusion) == pytest.approx(1)
