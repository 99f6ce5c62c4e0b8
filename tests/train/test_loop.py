"""Attempts to falsify contracts/training/loop.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.train.loop
from lora.contracts import training_contract
from lora.data.batches import epoch_batches
from lora.model.model import Model
from lora.train.config import FinetuneConfig
from lora.train.examples import Examples
from lora.train.loop import Loop, evaluate_loss
from lora.train.optimizer import AdamW
from tests.harness.bounds import relative
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.train.tiny import CLASSES, VOCABULARY, trained

CONTRACT = training_contract("loop")
TOKENS = 1000  # of a micro-batch: none is cut


@dataclass(frozen=True)
class Watched(Examples):
    """Examples that remember which rows were asked for."""

    asked: list[list[int]] = field(default_factory=list)

    def batch(self, rows: Any) -> Any:
        self.asked.append(list(rows))
        return super().batch(rows)


class Case(NamedTuple):
    losses: list[int]  # the validation loss after each epoch; small integers, so that equals occur
    patience: int
    rows: int
    batch_size: int
    grad_accum: int
    classify: bool
    seed: int

    def examples(self) -> Watched:
        rng = np.random.default_rng(self.seed)
        sequences = tuple(rng.integers(0, VOCABULARY, rng.integers(2, 7)) for _ in range(self.rows))
        labels = rng.integers(0, CLASSES, self.rows) if self.classify else None
        return Watched(sequences, labels, truncated=0)

    def config(self, **changes: Any) -> FinetuneConfig:
        settings = {"batch_size": self.batch_size, "grad_accum": self.grad_accum, "seed": self.seed % 1000}
        return FinetuneConfig(**settings | changes)

    def model(self) -> Model:
        return trained(classify=self.classify, dtype="float32", targets=["v_proj"])


class Outcome(NamedTuple):
    saved: list[tuple[int, str]]  # (epoch, name) of every state that was written
    epochs: int
    stopped_early: bool


def run(losses: list[float], patience: int) -> Outcome:
    """Run the loop with a validation that gives `losses`, one an epoch."""
    case, saved, script = Case([], patience, 2, 2, 1, True, 0), list[tuple[int, str]](), iter(losses)
    model = case.model()
    loop = Loop(
        model,
        case.config(epochs=len(losses), patience=patience),
        case.examples(),
        case.examples(),
        None,
        TOKENS,
        [],
        save=lambda name: saved.append((len(loop.progress.epochs), name)),
        optimizer=AdamW(model, lr=0.1),
        records=[],
        checkpoint=lambda: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora.train.loop, "evaluate_loss", lambda *args, **kwargs: (next(script), 0.5))
        progress = loop.run()
    return Outcome(saved, len(progress.epochs), progress.stopped_early)


def train(batches: Any, case: Case, epochs: int = 2) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """Run the loop in the order that `batches` gives; return the rows of every batch, and the arrays."""
    model, examples = case.model(), case.examples()
    config = case.config(epochs=epochs, learning_rate=0.01)
    loop = Loop(
        model,
        config,
        examples,
        case.examples(),
        None,
        TOKENS,
        [],
        save=lambda name: None,
        optimizer=AdamW(model, config.learning_rate, weight_decay=config.weight_decay),
        records=[],
        checkpoint=lambda: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora.train.loop, "epoch_batches", batches)
        progress = loop.run()
    assert progress.step == loop.total_steps
    return examples.asked, {name: array.copy() for name, array in model.trainable().items()}


def check_best(system: Any, case: Case) -> None:
    outcome = system.run([float(loss) for loss in case.losses], len(case.losses))
    best = [epoch for epoch, name in outcome.saved if name == "best"]
    lowest = list(accumulate(case.losses, min))
    assert best == [1] + [epoch + 1 for epoch in range(1, len(lowest)) if lowest[epoch] < lowest[epoch - 1]]


def check_patience(system: Any, case: Case) -> None:
    losses = [float(loss) for loss in case.losses]
    best, end = 0, len(losses)
    for epoch, loss in enumerate(losses):
        best = epoch if loss < losses[best] else best
        if epoch - best >= case.patience:
            end = epoch + 1
            break
    outcome = system.run(losses, case.patience)
    assert outcome.epochs == end
    assert outcome.stopped_early == (end < len(losses))


def check_every_row(system: Any, case: Case) -> None:
    epochs = 2 if case.rows < 7 else 4  # of 7 rows, two equal orders in four are no accident
    asked, _ = train(system.batches, case, epochs)
    per_epoch = -(-case.rows // case.batch_size)
    orders = [list(chain(*asked[i : i + per_epoch])) for i in range(0, len(asked), per_epoch)]
    assert len(orders) == epochs
    assert all(sorted(order) == list(range(case.rows)) for order in orders)
    assert case.rows < 7 or len({tuple(order) for order in orders}) > 1


def check_seed(system: Any, case: Case) -> None:
    (rows, arrays), (again, same) = train(system.batches, case), train(system.batches, case)
    assert rows == again
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, same[name], err_msg=name)
    orders = {str(epoch_rows(system.batches, 9, seed)) for seed in range(4)}
    assert len(orders) > 1


def epoch_rows(batches: Any, rows: int, seed: int) -> list[list[int]]:
    return [list(batch) for batch in batches(rows, 4, seed, 1)]


def check_validation(system: Any, case: Case) -> None:
    model, examples = case.model(), case.examples()
    before = {name: array.copy() for name, array in model.trainable().items()}
    loss, accuracy = system.evaluate(model, examples, case.batch_size, TOKENS)
    single = [model.step(examples.batch([row])) for row in range(case.rows)]
    counts = [examples.batch([row]).counted for row in range(case.rows)]
    mean = sum(part.loss * count for part, count in zip(single, counts, strict=True)) / sum(counts)
    assert relative(loss, mean) < 1e-5
    assert accuracy == pytest.approx(sum(part.correct for part in single) / sum(counts))
    for name, array in model.trainable().items():
        np.testing.assert_array_equal(array, before[name])


CHECKS = {
    "LOOP-001": check_best,
    "LOOP-002": check_patience,
    "LOOP-003": check_every_row,
    "LOOP-004": check_seed,
    "LOOP-005": check_validation,
}
AXES = CONTRACT.domain
CASES = st.builds(
    Case,
    st.lists(st.integers(0, 3), min_size=AXES["epochs"][0], max_size=AXES["epochs"][1]),
    *(st.integers(*AXES[axis]) for axis in ("patience", "rows", "batch_size", "grad_accum")),
    st.booleans(),
    seeds,
)
LIBRARY = SimpleNamespace(run=run, batches=epoch_batches, evaluate=evaluate_loss)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(LIBRARY, case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(LIBRARY) | changes)


def _whole_batches(n: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    batches = epoch_batches(n, size, seed, epoch)
    return [batch for batch in batches if len(batch) == size] or batches


def _with_replacement(n: int, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, epoch])
    return [rng.integers(0, n, len(batch)) for batch in epoch_batches(n, size, seed, epoch)]  # type: ignore[return-value]


def _average(model: Model, examples: Any, batch_size: int, micro_tokens: int) -> tuple[float, float]:
    parts = [
        evaluate_loss(model, examples.subset(np.arange(first, min(first + batch_size, len(examples)))), 9, 99)
        for first in range(0, len(examples), batch_size)
    ]
    return tuple(np.mean(parts, axis=0).tolist())  # type: ignore[return-value]


def _without_rest(model: Model, examples: Any, batch_size: int, micro_tokens: int) -> tuple[float, float]:
    whole = max(1, len(examples) // batch_size * batch_size)
    return evaluate_loss(model, examples.subset(np.arange(whole)), batch_size, micro_tokens)


def _trains(model: Model, examples: Any, batch_size: int, micro_tokens: int) -> tuple[float, float]:
    outcome = evaluate_loss(model, examples, batch_size, micro_tokens)
    gradients = model.step(examples.batch([0])).gradients
    for name, array in model.trainable().items():
        array -= 0.1 * gradients[name]
    return outcome


MUTANTS = {
    "keeps_the_last": _bug(
        run=lambda losses, patience: run([-float(i) for i in range(len(losses))], patience)
    ),
    "keeps_the_worst": _bug(run=lambda losses, patience: run([-loss for loss in losses], patience)),
    "keeps_the_later_of_equals": _bug(
        run=lambda losses, patience: run([loss - 1e-6 * i for i, loss in enumerate(losses)], patience)
    ),
    "never_stops": _bug(run=lambda losses, patience: run(losses, 1000)),
    "stops_one_epoch_late": _bug(run=lambda losses, patience: run(losses, patience + 1)),
    "stops_at_the_first_worse": _bug(run=lambda losses, patience: run(losses, 1)),
    "drops_the_uneven_rest": _bug(batches=_whole_batches),
    "repeats_one_order": _bug(batches=lambda n, size, seed, epoch: epoch_batches(n, size, 0, 0)),
    "draws_with_replacement": _bug(batches=_with_replacement),
    "draws_from_the_clock": _bug(
        batches=lambda n, size, seed, epoch: epoch_batches(
            n, size, int(np.random.default_rng().integers(2**32)), epoch
        )
    ),
    "averages_the_batches": _bug(evaluate=_average),
    "leaves_out_the_rest": _bug(evaluate=_without_rest),
    "trains_on_validation": _bug(evaluate=_trains),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
