"""Attempts to falsify contracts/training/step.yaml."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.data.packed import IGNORED, Packed, pack, pack_causal, pack_padded
from lora.errors import DataError, DivergedError
from lora.model.model import Model
from lora.train.step import train_step
from tests.harness.bounds import relative
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.train.tiny import BOUNDS, CLASSES, VOCABULARY, Recorder, trained

CONTRACT = training_contract("step")
EVERYTHING = 10**6  # tokens: no micro-batch is cut


class Rows(NamedTuple):
    """Rows with labels: for each a class, or for each token the token that should stand there."""

    sequences: list[np.ndarray]
    labels: list[Any]

    def __getitem__(self, rows: Any) -> Rows:  # type: ignore[override]
        return Rows([self.sequences[row] for row in rows], [self.labels[row] for row in rows])


class Case(NamedTuple):
    lengths: list[int]
    classify: bool
    weighted: bool
    dtype: str
    seed: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def model(self) -> Model:
        return trained(classify=self.classify, dtype=self.dtype)

    def rows(self) -> Rows:
        rng = self.rng()
        sequences = [rng.integers(0, VOCABULARY, length) for length in self.lengths]
        if self.classify:
            return Rows(sequences, list(rng.integers(0, CLASSES, len(sequences))))
        labels = [np.where(rng.random(len(row)) < 0.3, IGNORED, row) for row in sequences]
        for row, label in zip(sequences, labels, strict=True):
            label[-1] = row[-1]  # every row counts for something
        return Rows(sequences, labels)

    def class_weights(self) -> np.ndarray | None:
        return self.rng().uniform(0.5, 2, CLASSES) if self.classify and self.weighted else None

    def batch(self, rows: Rows) -> Packed:
        return pack(*rows) if self.classify else pack_causal(*rows)

    def batches(self, rows: Rows) -> list[Packed]:
        """Return the rows in one to three batches, of any sizes."""
        rng = self.rng()
        cuts = sorted(rng.integers(1, len(self.lengths), 2)) if len(self.lengths) > 1 else []
        groups = np.split(np.arange(len(self.lengths)), cuts)
        return [self.batch(rows[group]) for group in groups if len(group)]


def one_by_one(model: Model, rows: Rows, case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """Return (loss, gradients) of the mean over all rows, each run alone and unpadded."""
    weights = case.class_weights()
    if case.classify:
        count = float(len(rows.labels) if weights is None else sum(weights[label] for label in rows.labels))
    else:
        count = float(sum((label[1:] != IGNORED).sum() for label in rows.labels))
    parts = [
        model.loss_and_gradients(row[None], [label], normalizer=count, class_weights=weights)
        for row, label in zip(*rows, strict=True)
    ]
    gradients = {name: sum(part[1][name] for part in parts) for name in parts[0][1]}
    return sum(part[0] for part in parts), gradients


def assert_same(found: dict[str, Any], expected: dict[str, Any], dtype: str) -> None:
    """Hold the error of each tensor against the norm of the whole gradient.

    Not against its own norm: the gradient of q and k can be an exact zero, of which rounding leaves some.
    """
    assert found.keys() == expected.keys()
    joint = np.linalg.norm([np.linalg.norm(gradient) for gradient in expected.values()])
    for name, gradient in expected.items():
        assert np.linalg.norm(found[name] - gradient) <= BOUNDS[dtype] * joint, name


def run(
    step: Callable[..., Any], case: Case, batches: Sequence[Packed], **settings: Any
) -> tuple[Any, Recorder]:
    recorder = Recorder()
    settings = {
        "lr": 1.0,
        "clip": 0.0,
        "micro_tokens": EVERYTHING,
        "class_weights": case.class_weights(),
    } | settings
    report = step(settings.pop("model", None) or case.model(), recorder, batches, **settings)
    return report, recorder


def check_any_cut(system: Any, case: Case) -> None:
    rows = case.rows()
    loss, gradients = one_by_one(case.model(), rows, case)
    for micro_tokens in (EVERYTHING, 1 + case.seed % 20):
        report, recorder = run(system.step, case, case.batches(rows), micro_tokens=micro_tokens)
        assert relative(report.loss, loss) < BOUNDS[case.dtype]
        assert_same(recorder.gradients or {}, gradients, case.dtype)


def _silent(label: Any) -> Any:
    return np.full_like(label, IGNORED)


def check_padding_and_packing(system: Any, case: Case) -> None:
    rows, model = case.rows(), case.model()
    chosen = case.seed % len(case.lengths)
    loss, gradients = model.loss_and_gradients(
        rows.sequences[chosen][None], [rows.labels[chosen]], normalizer=1.0
    )
    alone = [label if row == chosen else _silent(label) for row, label in enumerate(rows.labels)]
    found = model.step(system.pack(Rows(rows.sequences, alone), case), normalizer=1.0)
    assert relative(found.loss, loss) < BOUNDS[case.dtype]
    assert_same(found.gradients, gradients, case.dtype)


def check_clipping(system: Any, case: Case) -> None:
    batches = case.batches(case.rows())
    report, free = run(train_step, case, batches)
    assert free.gradients is not None
    for limit in (report.gradient_norm * 2, report.gradient_norm / 3):
        _, recorder = run(system.step, case, batches, clip=limit)
        factor = min(1.0, limit / report.gradient_norm)
        for name, gradient in free.gradients.items():
            found = (recorder.gradients or {})[name]
            if factor == 1:
                np.testing.assert_array_equal(found, gradient, err_msg=name)
            else:
                assert relative(found, gradient * factor) < 1e-6, name


def check_nothing_to_count(system: Any, case: Case) -> None:
    if case.classify:
        return  # a row of a classifier always counts
    rows = case.rows()
    silent = pack_causal(rows.sequences, [np.full_like(row, IGNORED) for row in rows.sequences])
    recorder = Recorder()
    with pytest.raises(DataError, match="counted token"):
        system.step(
            case.model(), recorder, [case.batch(rows), silent], lr=1.0, clip=0.0, micro_tokens=EVERYTHING
        )
    assert recorder.gradients is None


def check_stops_where_it_broke(system: Any, case: Case) -> None:
    model, recorder = case.model(), Recorder()
    layer = case.seed % model.spec.num_hidden_layers
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    broken = np.array(model.parameters.weights[name])
    broken[0, 0] = (np.nan, np.inf)[case.seed % 2]
    model.parameters.weights[name] = broken
    with np.errstate(all="ignore"), pytest.raises(DivergedError, match=rf"model\.layers\.{layer}\b"):
        system.step(model, recorder, case.batches(case.rows()), lr=1.0, clip=1.0, micro_tokens=EVERYTHING)
    assert recorder.gradients is None


CHECKS = {
    "STEP-001": check_any_cut,
    "STEP-002": check_padding_and_packing,
    "STEP-003": check_clipping,
    "STEP-004": check_nothing_to_count,
    "STEP-005": check_stops_where_it_broke,
}
CASES = st.builds(
    Case,
    st.lists(st.integers(*CONTRACT.domain["tokens"]), min_size=1, max_size=CONTRACT.domain["rows"][1]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(BOUNDS)),
    seeds,
)


def pad_and_pack(rows: Rows, case: Case) -> Packed:
    """Pad the rows with random ids, as a user's batch comes, and let the library take the padding out."""
    return pack_padded(*_padded(rows, case), kind="classify" if case.classify else "causal")


def _padded(rows: Rows, case: Case) -> tuple[np.ndarray, np.ndarray, Any]:
    longest = max(case.lengths) + case.seed % 3
    ids = case.rng().integers(0, VOCABULARY, (len(rows.sequences), longest))
    mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
    for row, sequence in enumerate(rows.sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        labels[row, : len(sequence)] = rows.labels[row]
    return ids, mask, np.array(rows.labels) if case.classify else labels


LIBRARY = SimpleNamespace(step=train_step, pack=pad_and_pack)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(LIBRARY, case)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(LIBRARY) | changes)


def _gradients_of(model: Model, batches: Sequence[Packed], **settings: Any) -> tuple[Any, dict[str, Any]]:
    recorder = Recorder()
    report = train_step(model, recorder, batches, **settings)  # type: ignore[arg-type]
    return report, recorder.gradients or {}


def averages_the_means(model: Model, optimizer: Any, batches: Any, **settings: Any) -> Any:
    parts = [_gradients_of(model, [batch], **settings) for batch in batches]
    optimizer.step({n: sum(p[1][n] for p in parts) / len(parts) for n in parts[0][1]})
    return SimpleNamespace(loss=sum(p[0].loss for p in parts) / len(parts))


def divides_by_all_tokens(model: Model, optimizer: Any, batches: Any, **settings: Any) -> Any:
    report, gradients = _gradients_of(model, batches, **settings)
    share = report.counted / report.tokens
    optimizer.step({name: gradient * share for name, gradient in gradients.items()})
    return SimpleNamespace(loss=report.loss * share)


def drops_the_last_batch(model: Model, optimizer: Any, batches: Any, **settings: Any) -> Any:
    return train_step(model, optimizer, batches[: max(1, len(batches) - 1)], **settings)


def _clipping(rule: Callable[[dict[str, Any], float, float], dict[str, Any]]) -> SimpleNamespace:
    def step(model: Model, optimizer: Any, batches: Any, *, clip: float, **settings: Any) -> Any:
        report, gradients = _gradients_of(model, batches, clip=0.0, **settings)
        optimizer.step(rule(gradients, clip, report.gradient_norm))
        return report

    return _bug(step=step)


def skips_the_batch(model: Model, optimizer: Any, batches: Any, **settings: Any) -> Any:
    return train_step(model, optimizer, [batch for batch in batches if batch.counted], **settings)


def moves_first(model: Model, optimizer: Any, batches: Any, **settings: Any) -> Any:
    optimizer.step({})
    return train_step(model, optimizer, batches, **settings)


def names_no_block(model: Model, optimizer: Any, batches: Any, **settings: Any) -> Any:
    try:
        return train_step(model, optimizer, batches, **settings)
    except DivergedError:
        raise DivergedError("the loss is nan") from None


def computes_on_padding(rows: Rows, case: Case) -> Packed:
    ids, _, labels = _padded(rows, case)
    return pack_padded(ids, None, labels, kind="classify" if case.classify else "causal")


def attends_to_the_neighbour(rows: Rows, case: Case) -> Packed:
    batch = pad_and_pack(rows, case)
    if case.classify:  # there must be a sequence for each class: the boundaries alone are wrong
        shifted = np.minimum(batch.cu_seqlens + 1, batch.num_tokens)
        shifted[0] = 0
        return Packed(batch.input_ids, shifted, batch.targets)
    return Packed(batch.input_ids, np.array([0, batch.num_tokens]), batch.targets)


def shifts_across_rows(rows: Rows, case: Case) -> Packed:
    batch = pad_and_pack(rows, case)
    if case.classify:
        return batch
    targets = np.append(np.concatenate(rows.labels)[1:], IGNORED)
    return Packed(batch.input_ids, batch.cu_seqlens, targets)


MUTANTS = {
    "averages_the_means": _bug(step=averages_the_means),
    "divides_by_all_tokens": _bug(step=divides_by_all_tokens),
    "drops_the_last_batch": _bug(step=drops_the_last_batch),
    "computes_on_padding": _bug(pack=computes_on_padding),
    "attends_to_the_neighbour": _bug(pack=attends_to_the_neighbour),
    "shifts_across_rows": _bug(pack=shifts_across_rows),
    "clips_each_tensor": _clipping(
        lambda g, limit, _: {n: a * min(1.0, limit / np.linalg.norm(a)) for n, a in g.items()}
    ),
    "clips_each_element": _clipping(lambda g, limit, _: {n: a.clip(-limit, limit) for n, a in g.items()}),
    "scales_up_too": _clipping(lambda g, limit, norm: {n: a * (limit / norm) for n, a in g.items()}),
    "never_clips": _clipping(lambda g, limit, norm: g),
    "skips_the_batch": _bug(step=skips_the_batch),
    "moves_first": _bug(step=moves_first),
    "names_no_block": _bug(step=names_no_block),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
