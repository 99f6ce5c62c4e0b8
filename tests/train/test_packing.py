"""Attempts to falsify contracts/training/packing.yaml."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.data.packed import Packed, pack, pack_causal, split
from lora.data.packing import best_fit_decreasing, longest_first, micro_batches
from lora.io.lora_config import LoraConfig
from lora.io.save_checkpoint import save_checkpoint
from lora.model.loading import load
from lora.model.model import Model
from lora.ops.adamw import joint_norm
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.harness.models import FAMILIES, random_weights
from tests.train.tiny import BOUNDS, CLASSES, VOCABULARY

CONTRACT = training_contract("packing")


class Case(NamedTuple):
    lengths: list[int]
    max_tokens: int
    classify: bool
    family: str
    dtype: str
    seed: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def batches(self) -> list[Packed]:
        """Return the rows in one to three batches; no two rows are likely to be equal."""
        rng, groups = self.rng(), np.array_split(self.lengths, 1 + self.seed % min(3, len(self.lengths)))
        rows = [[rng.integers(0, VOCABULARY, length) for length in group] for group in groups]
        if self.classify:
            return [pack(group, rng.integers(0, CLASSES, len(group))) for group in rows]
        return [pack_causal(group) for group in rows]

    def model(self) -> Model:
        model = load(base(self.family), dtype=self.dtype, num_labels=CLASSES if self.classify else None)
        model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
        for name, array in model.trainable().items():
            if "lora_B" in name:
                array[...] = 0.05 * self.rng().standard_normal(array.shape)
        return model

    def steps(self) -> list[list[np.ndarray]]:
        order = self.rng().permutation(len(self.lengths))
        return [
            [order[i : i + 2], *([order[i + 2 : i + 3]] if i + 2 < len(order) else [])]
            for i in range(0, len(order), 3)
        ]


@cache
def base(family: str) -> Path:
    """Return a checkpoint so tame that float32 keeps 5 digits of a gradient."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = FAMILIES[family]
    tame = {name: array if array.ndim == 1 else array / 2 for name, array in random_weights(config).items()}
    save_checkpoint(folder / "base", tame, config)
    return folder / "base"


def rows_of(batches: Sequence[Packed]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (ids, targets) of every row, sorted."""
    rows = []
    for batch in batches:
        assert batch.targets is not None
        per_row = len(batch.targets) == batch.num_sequences
        for row, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
            targets = batch.targets[row : row + 1] if per_row else batch.targets[start:end]
            rows.append((tuple(batch.input_ids[start:end]), tuple(targets)))
    return sorted(rows)


def check_every_row(system: Any, case: Case) -> None:
    batches = case.batches()
    for packing in (True, False):
        assert rows_of(system.cut(batches, case.max_tokens, packing=packing)) == rows_of(batches)


def check_budget(system: Any, case: Case) -> None:
    parts = system.cut(case.batches(), case.max_tokens)
    for part in parts:
        assert part.num_tokens <= case.max_tokens or part.num_sequences == 1
    for a, b in combinations(parts, 2):
        assert a.num_tokens + b.num_tokens > case.max_tokens


def check_same_gradients(system: Any, case: Case) -> None:
    model, batches = case.model(), case.batches()
    alone = system.cut(batches, case.max_tokens, packing=False)
    assert [part.num_sequences for part in alone] == [1] * len(case.lengths)
    packed = system.cut(batches, case.max_tokens)
    found, expected = ([model.step(part, normalizer=7.0) for part in parts] for parts in (packed, alone))
    sums = [
        {name: sum(result.gradients[name] for result in results) for name in results[0].gradients}
        for results in (found, expected)
    ]
    difference = joint_norm(sums[0][name] - sums[1][name] for name in sums[1])
    assert difference <= BOUNDS[case.dtype] * joint_norm(sums[1].values())


def check_first_step(system: Any, case: Case) -> None:
    lengths, steps = np.array(case.lengths), case.steps()

    def largest(step: Any) -> int:
        rows = lengths[np.concatenate(step)]
        return max(int(rows[members].sum()) for members in best_fit_decreasing(rows, case.max_tokens))

    found = system.order(steps, lengths, case.max_tokens)
    assert largest(found[0]) == max(map(largest, steps))
    names = [str(step) for step in steps]
    rest = [str(step) for step in found[1:]]
    assert sorted([str(found[0]), *rest]) == sorted(names)
    assert rest == [name for name in names if name != str(found[0])]


CHECKS = {
    "PACKING-001": check_every_row,
    "PACKING-002": check_budget,
    "PACKING-003": check_same_gradients,
    "PACKING-004": check_first_step,
}
AXES = CONTRACT.domain
CASES = st.builds(
    Case,
    st.lists(st.integers(*AXES["tokens"]), min_size=AXES["rows"][0], max_size=AXES["rows"][1]),
    st.integers(*AXES["max_tokens"]),
    st.booleans(),
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(sorted(BOUNDS)),
    seeds,
)
LIBRARY = SimpleNamespace(cut=micro_batches, order=longest_first)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(LIBRARY, case)


def _cutting(change: Any) -> SimpleNamespace:
    def cut(batches: Any, max_tokens: int, *, packing: bool = True) -> list[Packed]:
        return change(micro_batches(batches, max_tokens, packing=packing), packing)

    return SimpleNamespace(cut=cut, order=longest_first)


def _rolled(part: Packed) -> Packed:
    return Packed(part.input_ids, part.cu_seqlens, np.roll(part.targets, 1))


def _in_order(batches: Any, max_tokens: int, **_: Any) -> list[Packed]:
    return [part for batch in batches for part in split(batch, max(max_tokens, int(batch.lengths.max())))]


def _ordering(order: Any) -> SimpleNamespace:
    return SimpleNamespace(cut=micro_batches, order=order)


def _tokens_of(lengths: Any) -> Any:
    return lambda step: -int(lengths[np.concatenate(step)].sum())


def _cuts_a_step(steps: Any, lengths: Any, max_tokens: int) -> Any:
    first, *rest = longest_first(steps, lengths, max_tokens)
    return [first[:1], *rest]


MUTANTS = {
    "loses_a_row": _cutting(lambda parts, _: parts[: max(1, len(parts) - 1)]),
    "runs_a_row_twice": _cutting(lambda parts, _: [*parts, parts[-1]]),
    "keeps_the_targets_of_another": _cutting(lambda parts, _: [_rolled(part) for part in parts]),
    "takes_rows_in_order": SimpleNamespace(cut=_in_order, order=longest_first),
    "overfills": SimpleNamespace(
        cut=lambda batches, max_tokens, packing=True: micro_batches(batches, max_tokens + 2, packing=packing),
        order=longest_first,
    ),
    "runs_every_row_alone": SimpleNamespace(
        cut=lambda batches, max_tokens, packing=True: micro_batches(batches, max_tokens, packing=False),
        order=longest_first,
    ),
    "packs_anyway": SimpleNamespace(
        cut=lambda batches, max_tokens, packing=True: micro_batches(batches, max_tokens), order=longest_first
    ),
    "drops_the_last_part": _cutting(
        lambda parts, packing: parts[: max(1, len(parts) - 1)] if packing else parts
    ),
    "keeps_the_drawn_order": _ordering(lambda steps, lengths, max_tokens: steps),
    "sorts_all_steps": _ordering(lambda steps, lengths, max_tokens: sorted(steps, key=_tokens_of(lengths))),
    "cuts_a_step": _ordering(_cuts_a_step),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
