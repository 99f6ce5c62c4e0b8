"""The choice of the next token: the likeliest, or one drawn from a sharpened and cut distribution.

    p = softmax(logits / temperature)

cut to the `top_k` likeliest, then to the smallest set of likeliest tokens that holds `top_p` of what is left
(the nucleus: Holtzman et al. 2020, arXiv:1904.09751, eq. 2 and 3), and rescaled to a sum of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lora.backend import named_stream
from lora.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        UsageError: a setting is out of its range; all of them are named.
    """

    temperature: float = 0.0  # 0 for the likeliest token always
    top_p: float = 1.0  # in (0, 1]; 1 cuts nothing
    top_k: int = 0  # 0 cuts nothing
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p}: expected more than 0, at most 1")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k}: expected 0 or more")
        if self.seed < 0:
            problems.append(f"seed {self.seed}: expected 0 or more")
        if problems:
            raise UsageError("; ".join(problems))


def stream_of(sampling: Sampling, prompt: np.ndarray) -> np.random.Generator:
    """Return the random numbers of one prompt [T]: they depend on the seed and on its ids, not on its batch.

    The same prompt twice in a batch is therefore continued twice alike.
    """
    # the length too: the generator's seeding does not tell [3] from [3, 0]
    return named_stream(sampling.seed, "generation", len(prompt), *map(int, prompt))


def choose(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token for `logits` [V]; in a tie the lowest id is the likelier."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, p = distribution(logits, sampling)
    cumulative = p.cumsum()
    # the last sum may round to less than 1, and a draw fall behind it
    place = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    return int(ids[min(int(place), len(ids) - 1)])


def distribution(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, p), both [K], likeliest first: the tokens that may come, and how likely each is.

    Args:
        logits: [V].
        sampling: with a temperature above 0.
    """
    wide = np.asarray(logits, np.float64)
    odds = np.exp((wide - wide.max()) / sampling.temperature)
    ids = np.argsort(-odds, kind="stable")[: sampling.top_k or None]
    p = odds[ids] / odds[ids].sum()
    before = p.cumsum() - p  # what the likelier ones hold; the likeliest always stays
    kept = np.append(True, before[1:] < sampling.top_p)
    return ids[kept], p[kept] / p[kept].sum()
