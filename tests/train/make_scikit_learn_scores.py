"""Makes scikit_learn_scores.json with scikit-learn; run by hand where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import sklearn
from sklearn import metrics


def case(seed: int, rows: int, classes: int) -> dict:
    rng = np.random.default_rng(seed)
    p, labels = rng.dirichlet(np.ones(classes), rows), rng.integers(0, classes, rows)
    guesses, every = p.argmax(axis=1), list(range(classes))
    scores = {
        "accuracy": metrics.accuracy_score(labels, guesses),
        "macro_f1": metrics.f1_score(labels, guesses, average="macro", zero_division=0),
        "cohen_kappa": metrics.cohen_kappa_score(labels, guesses),
        "mcc": metrics.matthews_corrcoef(labels, guesses),
        "log_loss": metrics.log_loss(labels, p, labels=every),
        "brier_score": float(((p - np.eye(classes)[labels]) ** 2).sum(axis=1).mean()),
    }
    if classes > 2:
        scores["top2_accuracy"] = metrics.top_k_accuracy_score(labels, p, k=2, labels=every)
    return {"probabilities": p.tolist(), "labels": labels.tolist(), "scores": scores}


if __name__ == "__main__":
    cases = [case(0, 12, 2), case(1, 30, 3), case(2, 25, 5)]
    path = Path(__file__).parent / "scikit_learn_scores.json"
    path.write_text(json.dumps({"scikit_learn": sklearn.__version__, "cases": cases}) + "\n")
