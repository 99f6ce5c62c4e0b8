"""Attempts to falsify contracts/training/generation.yaml."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.model import sampling
from lora.model.sampling import Sampling
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted

CONTRACT = training_contract("generation")
DRAWS = 400
CLOCK = itertools.count()


class Case(NamedTuple):
    vocabulary: int
    top_k: int
    temperature: float
    top_p: float
    seed: int

    @property
    def settings(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)

    @property
    def logits(self) -> np.ndarray:
        return 3 * np.random.default_rng(self.seed).standard_normal(self.vocabulary)


CASES = st.builds(
    Case,
    st.integers(*CONTRACT.domain["vocabulary"]),
    st.integers(*CONTRACT.domain["top_k"]),
    st.floats(0.1, 3.0),
    st.floats(0.01, 1.0),
    seeds,
)


def by_definition(case: Case) -> dict[int, float]:
    """Return the probability of each token that may come, by loops."""
    weights = {i: math.exp(z / case.temperature) for i, z in enumerate(case.logits.tolist())}
    ranked = sorted(weights, key=lambda i: -weights[i])[: case.top_k or None]
    total = sum(weights[i] for i in ranked)
    kept, share = [], 0.0
    for i in ranked:
        kept.append(i)
        share += weights[i] / total
        if share >= case.top_p:
            break
    return {i: weights[i] / sum(weights[i] for i in kept) for i in kept}


def check_distribution(implementation: Any, case: Case) -> None:
    ids, p = implementation.distribution(case.logits, case.settings)
    expected = by_definition(case)
    assert dict(zip(ids.tolist(), p.tolist(), strict=True)) == pytest.approx(expected, rel=1e-9)


def check_frequencies(implementation: Any, case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    drawn = [implementation.choose(case.logits, case.settings, rng) for _ in range(DRAWS)]
    expected = by_definition(case)
    assert set(drawn) <= expected.keys()
    # tokens too rare for a chi-square term are counted as one
    common = [i for i, p in expected.items() if DRAWS * p >= 5]
    counts = np.array([drawn.count(i) for i in common] + [sum(i not in common for i in drawn)])
    shares = np.array(
        [expected[i] for i in common] + [sum(p for i, p in expected.items() if i not in common)]
    )
    if DRAWS * shares[-1] < 5:
        counts, shares = counts[:-1], shares[:-1]
    statistic = float(((counts - DRAWS * shares) ** 2 / (DRAWS * shares)).sum())
    degrees = len(counts)
    assert statistic <= degrees + 8 * math.sqrt(2 * degrees)


def check_streams(implementation: Any, case: Case) -> None:
    prompt = np.random.default_rng(case.seed).integers(0, 100, case.vocabulary)

    def draws(settings: Sampling, ids: np.ndarray) -> list[float]:
        return implementation.stream_of(settings, ids).random(4).tolist()

    first = draws(case.settings, prompt)
    assert draws(replace(case.settings, temperature=0.7), prompt.astype(np.int32)) == first
    assert draws(replace(case.settings, seed=case.seed + 1), prompt) != first
    for other in (np.append(prompt, 0), np.append(prompt[:-1], prompt[-1] + 1)):
        assert draws(case.settings, other) != first


CHECKS = {
    "GENERATION-001": check_distribution,
    "GENERATION-002": check_frequencies,
    "GENERATION-003": check_streams,
}


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(sampling, case)


def _bug(**changes: Any) -> SimpleNamespace:
    names = ("distribution", "choose", "stream_of")
    return SimpleNamespace(**{name: getattr(sampling, name) for name in names} | changes)


def _settings(change: Any) -> SimpleNamespace:
    return _bug(distribution=lambda z, s: sampling.distribution(z, change(s)))


def _unscaled(logits: Any, settings: Sampling) -> Any:
    ids, _ = sampling.distribution(logits, settings)
    odds = np.exp((logits - logits.max()) / settings.temperature)
    return ids, (odds / odds.sum())[ids]


def _one_more(logits: Any, settings: Sampling) -> Any:
    kept = len(sampling.distribution(logits, settings)[0])
    return sampling.distribution(logits, replace(settings, top_p=1.0, top_k=kept + 1))


def _one_less(logits: Any, settings: Sampling) -> Any:
    kept = len(sampling.distribution(logits, settings)[0])
    return sampling.distribution(logits, replace(settings, top_p=1.0, top_k=max(1, kept - 1)))


def _uniform(logits: Any, settings: Sampling, rng: Any) -> int:
    return int(rng.choice(sampling.distribution(logits, settings)[0]))


MUTANTS = {
    "ignores_the_temperature": _settings(lambda s: replace(s, temperature=1.0)),
    "multiplies_by_the_temperature": _settings(lambda s: replace(s, temperature=1 / s.temperature)),
    "drops_the_token_that_reaches": _bug(distribution=_one_less),
    "keeps_one_too_many": _bug(distribution=_one_more),
    "forgets_to_rescale": _bug(distribution=_unscaled),
    "keeps_the_unlikeliest": _bug(distribution=lambda z, s: sampling.distribution(-z, s)),
    "always_the_likeliest": _bug(choose=lambda z, s, rng: int(z.argmax())),
    "draws_uniformly": _bug(choose=_uniform),
    "repeats_one_number": _bug(choose=lambda z, s, rng: sampling.choose(z, s, np.random.default_rng(s.seed))),
    "ignores_the_seed": _bug(stream_of=lambda s, ids: sampling.stream_of(replace(s, seed=0), ids)),
    "ignores_the_prompt": _bug(stream_of=lambda s, ids: sampling.stream_of(s, ids[:0])),
    "draws_from_the_clock": _bug(
        stream_of=lambda s, ids: sampling.stream_of(replace(s, seed=next(CLOCK)), ids)
    ),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
