"""Attempts to falsify contracts/training/read_rows.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.data.packed import IGNORED, Packed, pack, pack_causal
from lora.io.lora_config import LoraConfig
from lora.model import block
from lora.model.head import CausalHead, ClassifierHead
from lora.model.loading import load
from lora.model.model import Model
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.harness.models import FAMILIES, TINY_QWEN2, write_model

CONTRACT = training_contract("read_rows")
CLASSES, VOCABULARY = 3, TINY_QWEN2["vocab_size"]
Bug = Callable[[], AbstractContextManager[Any]]


class Case(NamedTuple):
    family: str
    pooling: str | None  # None: a language model
    lengths: list[int]
    counted: float  # share of the tokens that count in a language model's loss
    seed: int

    def model(self) -> Model:
        return adapted(self.family, self.pooling)

    def batch(self) -> Packed:
        rng = np.random.default_rng(self.seed)
        rows = [rng.integers(0, VOCABULARY, length) for length in self.lengths]
        if self.pooling is not None:
            return pack(rows, rng.integers(0, CLASSES, len(rows)))
        labels = [np.where(rng.random(len(row)) < self.counted, row, IGNORED) for row in rows]
        labels[0][-1] = rows[0][-1]  # something counts
        return pack_causal(rows, labels)


@cache
def adapted(family: str, pooling: str | None) -> Model:
    """Return a model in float64 whose B's are not zero, so that every gradient is alive."""
    with TemporaryDirectory() as folder:
        base = write_model(Path(folder) / "base", FAMILIES[family])
        head: dict[str, Any] = {"num_labels": CLASSES, "pooling": pooling} if pooling is not None else {}
        model = load(base, dtype="float64", **head)
    model.add_adapter(LoraConfig(r=3, target_modules="all-linear"), seed=1)
    rng = np.random.default_rng(2)
    for name, array in model.trainable().items():
        if "lora_B" in name:
            array[...] = 0.2 * rng.standard_normal(array.shape)
    return model


CASES = st.builds(
    Case,
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(["last", "mean", None]),
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda lengths: [lengths[0] + 1, *lengths[1:]]),
    st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    seeds,
)


@contextmanager
def _reading(rule: Callable[[Callable[[Packed], Any], Packed], Any]) -> Iterator[None]:
    """Let both heads read what `rule` makes of their own rule."""
    causal, classifier = CausalHead.reads, ClassifierHead.reads
    with (
        patch.object(CausalHead, "reads", staticmethod(lambda batch: rule(causal, batch))),
        patch.object(ClassifierHead, "reads", lambda self, batch: rule(lambda b: classifier(self, b), batch)),
    ):
        yield


def everything_read() -> AbstractContextManager[None]:
    return _reading(lambda reads, batch: None)


def check_results(bug: Bug, case: Case) -> None:
    model, batch = case.model(), case.batch()
    with everything_read():
        expected, logits = model.step(batch), model.packed_logits(batch)
    with bug():
        found, found_logits = model.step(batch), model.packed_logits(batch)
    assert abs(found.loss - expected.loss) <= 1e-12 * abs(expected.loss)
    assert found.correct == expected.correct
    assert found.gradients.keys() == expected.gradients.keys()
    joint = np.linalg.norm([np.linalg.norm(gradient) for gradient in expected.gradients.values()])
    for name, gradient in expected.gradients.items():
        assert np.linalg.norm(found.gradients[name] - gradient) <= 1e-12 * joint, name
    np.testing.assert_allclose(found_logits, logits, rtol=1e-12, atol=1e-12)


def check_rows(bug: Bug, case: Case) -> None:
    model, batch, seen = case.model(), case.batch(), []
    plain = model.ops

    def forward(gate: Any, up: Any) -> Any:
        seen.append(len(gate))
        return plain.swiglu.forward(gate, up)

    watched = SimpleNamespace(forward=forward, backward=plain.swiglu.backward)
    with bug(), patch.object(model, "ops", plain._replace(swiglu=watched)):
        model.step(batch)
    tokens, last = batch.num_tokens, batch.num_tokens
    if case.pooling == "last":
        last = batch.num_sequences
    elif case.pooling is None and batch.counted <= 7 / 8 * tokens:
        last = batch.counted
    assert seen == [tokens] * (model.spec.num_hidden_layers - 1) + [last]


CHECKS = {"READ-001": check_results, "READ-002": check_rows}


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(nullcontext, case)


def _spreading(change: Callable[[np.ndarray], np.ndarray]) -> Bug:
    plain = block._among_all_rows
    return lambda: patch.object(
        block, "_among_all_rows", lambda rows, places, count: plain(rows, change(places), count)
    )


def _tokens_before(reads: Callable[[Packed], Any], batch: Packed) -> Any:
    places = reads(batch)
    return None if places is None else np.maximum(places - 1, 0)


def _last_of_each(reads: Callable[[Packed], Any], batch: Packed) -> Any:
    per_sequence = batch.targets is not None and len(batch.targets) == batch.num_sequences
    return batch.cu_seqlens[1:] - 1 if per_sequence else reads(batch)


MUTANTS = {
    "reads_the_token_before": lambda: _reading(_tokens_before),
    "spreads_in_another_order": _spreading(lambda places: places[::-1]),
    "spreads_from_the_start": _spreading(lambda places: np.arange(len(places))),
    "reads_everything": everything_read,
    "cuts_under_mean_pooling": lambda: _reading(_last_of_each),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
