"""How good a classifier's probabilities are, and how far its answers agree with the labels beyond chance.

    log loss = -1/n Σ_i ln p_i,label            in nats, p no smaller than float64's epsilon
    Brier    = 1/n Σ_i Σ_c (p_ic - y_ic)²       over all classes, in [0, 2]
    kappa    = (p_o - p_e) / (1 - p_e)
    MCC      = (c s - Σ_k p_k t_k) / √((s² - Σ_k p_k²) (s² - Σ_k t_k²))

where c of s rows are right, and class k is the label of t_k and the prediction of p_k. kappa and MCC are 0
where they would divide by 0: labels and predictions of one class say nothing about agreement. Sources: Brier
1950, Mon. Weather Rev. 78; Cohen 1960, Educ. Psychol. Meas. 20; Gorodkin 2004, Comput. Biol. Chem. 28.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lora.backend import named_stream

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval that holds a score in 95 of 100 samples of rows."""

    low: float
    high: float


def log_loss(p: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of -ln p of the label, in nats; `p` [n, C], `labels` [n]."""
    of_labels = p[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(of_labels, np.finfo(np.float64).eps)).mean())


def brier_score(p: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared distance of `p` [n, C] from the labels' unit vectors, in [0, 2]."""
    distance = p.copy()
    distance[np.arange(len(labels)), labels] -= 1
    return float((distance**2).sum(axis=1).mean())


def top_two_accuracy(p: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows whose label is one of the two most probable classes; ties go to the lower."""
    two = np.argsort(-p, axis=1, kind="stable")[:, :2]
    return float((two == labels[:, None]).any(axis=1).mean())


def cohen_kappa(confusion: np.ndarray) -> float:
    """Return the agreement beyond what the class frequencies alone give, for counts [C, C]; at most 1."""
    shares = confusion / confusion.sum()
    by_chance = float(shares.sum(axis=0) @ shares.sum(axis=1))
    return (float(shares.trace()) - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0


def matthews_correlation(confusion: np.ndarray) -> float:
    """Return Gorodkin's correlation of labels and predictions, for counts [C, C]; in [-1, 1]."""
    # Python integers: the fourth power of a row count passes int64 at 55,000 rows
    counts = confusion.astype(object)
    rows, right = counts.sum(), counts.trace()
    labels, predictions = counts.sum(axis=1), counts.sum(axis=0)
    spread = (rows**2 - (predictions**2).sum()) * (rows**2 - (labels**2).sum())
    covariance = right * rows - (predictions * labels).sum()
    return float(covariance) / float(spread) ** 0.5 if spread else 0.0


def bootstrap_interval(
    confusion: np.ndarray, score: Callable[[np.ndarray], float], *, seed: int = 0
) -> Interval:
    """Return the percentile interval of `score` over 1,000 samples of the rows of `confusion` [C, C].

    Drawing n rows with replacement is drawing n cells of the confusion matrix in proportion to their counts.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    rng, cells, rows = named_stream(seed, "bootstrap"), np.flatnonzero(confusion), int(confusion.sum())
    scores = []
    for counts in rng.multinomial(rows, confusion.ravel()[cells] / rows, RESAMPLES):
        sample = np.zeros_like(confusion)
        sample.ravel()[cells] = counts
        scores.append(score(sample))
    return Interval(*map(float, np.percentile(scores, (2.5, 97.5))))
