"""Attempts to falsify contracts/training/checkpoint.yaml."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.contracts import training_contract
from lora.errors import LoraWarning
from lora.io.lora_config import LoraConfig
from lora.model.loading import load
from lora.model.model import Model
from tests.harness.bounds import relative
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.train.tiny import VOCABULARY, base

CONTRACT = training_contract("checkpoint")
NAMES = ("no", "maybe", "yes")
MOST_CALLS = 200  # to the file system, in one save


class Killed(BaseException):
    """Stands in for SIGKILL: after the call that it ends with, no other call has an effect."""


class Case(NamedTuple):
    merged: bool  # a whole checkpoint, else an adapter
    classify: bool
    rank: int
    seed: int

    def model(self, shift: float = 0.0) -> Model:
        """Return a model whose trained arrays are random; `shift` moves them to another state."""
        model = load(base(), dtype="float64", class_names=NAMES if self.classify else None)
        model.add_adapter(LoraConfig(r=self.rank), seed=self.seed)
        rng = np.random.default_rng(self.seed)
        for array in model.trainable().values():
            array += (0.1 * rng.standard_normal(array.shape) + shift).astype("float32")
        if self.merged:
            model.merge_adapter()
        return model


def save(model: Model, folder: Path) -> None:
    """Save as a run does: the adapter, or the whole checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraWarning)  # a mean-pooled head; what Transformers makes of it
        if model.parameters.merged is None:
            model.save_adapter(folder)
        else:
            model.save(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def killed_after(call: int) -> Iterator[list[str]]:
    """Kill what runs here after its `call`-th call to the file system; yield the calls that it made."""
    calls: list[str] = []

    def fragile(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if len(calls) >= call:
                raise Killed
            result = function(*args, **kwargs)
            calls.append(name)
            if len(calls) == call:
                if name == "open":
                    result.close()
                raise Killed
            return result

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda descriptor: None
        )  # counted, but the test need not wait for the disk
        for owner, names in (
            (os, ("replace", "rename", "fsync", "unlink", "mkdir")),
            (shutil, ("rmtree", "copyfile", "move")),
            (Path, ("open", "unlink", "mkdir")),
        ):
            for name in names:
                patch.setattr(owner, name, fragile(name, getattr(owner, name)))
        yield calls


def check_killed_anywhere(saving: Any, case: Case) -> None:
    with TemporaryDirectory() as parent:
        folder, old_folder, new_folder = (Path(parent) / name for name in ("state", "old", "new"))
        models = case.model(), case.model(shift=1.0)
        save(models[0], old_folder)
        save(models[1], new_folder)
        old, new = contents(old_folder), contents(new_folder)
        for call in range(1, MOST_CALLS):
            shutil.copytree(old_folder, folder)
            with killed_after(call) as calls, suppress(Killed):
                saving(models[1], folder)
            beside = [path for path in Path(parent).iterdir() if path.name.startswith(".state")]
            left = [contents(path) for path in ([folder] if folder.exists() else beside)]
            assert any(state in (old, new) for state in left), f"neither state is whole after {calls}"
            for path in (folder, *beside):
                shutil.rmtree(path, ignore_errors=True)
            if len(calls) < call:
                assert left == [new]
                return
        pytest.fail("the save never ends")


def check_flushed_first(saving: Any, case: Case) -> None:
    opened: dict[int, str] = {}
    flushed: set[str] = set()
    plain_open, plain_fsync, plain_replace = os.open, os.fsync, os.replace

    def watched_open(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = plain_open(path, *args, **kwargs)
        opened[descriptor] = str(path)
        return descriptor

    def watched_fsync(descriptor: int) -> None:
        plain_fsync(descriptor)
        flushed.add(opened.get(descriptor, ""))

    def watched_replace(source: Any, target: Any) -> None:
        if Path(target) == folder:
            expected = {str(source), *(str(path) for path in Path(source).iterdir())}
            assert expected <= flushed, f"renamed before it was flushed: {sorted(expected - flushed)}"
            renamed.append(str(target))
        plain_replace(source, target)

    renamed: list[str] = []
    with TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        folder = Path(parent).resolve() / "state"
        for name, watched in (("open", watched_open), ("fsync", watched_fsync), ("replace", watched_replace)):
            patch.setattr(os, name, watched)
        saving(case.model(), folder)
    assert renamed == [str(folder)]


def check_round_trip(saving: Any, case: Case) -> None:
    ids = np.random.default_rng(case.seed).integers(0, VOCABULARY, (2, 5))
    model = case.model()
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "state"
        saving(model, folder)
        again = load(folder, dtype="float64")
        for name, array in model.trainable().items():
            np.testing.assert_array_equal(again.trainable()[name], array, err_msg=name)
        assert again.head == model.head
        assert relative(again(ids), model(ids)) < 1e-12


CHECKS = {
    "CHECKPOINT-001": check_killed_anywhere,
    "CHECKPOINT-002": check_flushed_first,
    "CHECKPOINT-003": check_round_trip,
}
CASES = st.builds(Case, st.booleans(), st.booleans(), st.integers(*CONTRACT.domain["rank"]), seeds)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(save, case)


def _elsewhere(model: Model, folder: Path) -> dict[str, bytes]:
    """Return the files that a save of `model` makes."""
    with TemporaryDirectory() as parent:
        save(model, Path(parent) / "state")
        return contents(Path(parent) / "state")


def writes_in_place(model: Model, folder: Path) -> None:
    for name, data in _elsewhere(model, folder).items():
        with (folder / name).open("wb") as file:
            file.write(data)


def removes_before_it_writes(model: Model, folder: Path) -> None:
    shutil.rmtree(folder)
    save(model, folder)


def forgets_to_flush(model: Model, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        save(model, folder)


def rounds_to_half(model: Model, folder: Path) -> None:
    arrays = [*model.trainable().values(), *model.parameters.weights.values()]
    live = [array for array in arrays if array.flags.writeable]
    exact = [array.copy() for array in live]
    for array in live:
        array[...] = array.astype("float16")
    save(model, folder)
    for array, values in zip(live, exact, strict=True):
        array[...] = values


def forgets_the_head(model: Model, folder: Path) -> None:
    save(model, folder)
    for path in (*folder.glob("lora_metadata.json"), *folder.glob("lora_head.json")):
        path.unlink()


def forgets_the_names(model: Model, folder: Path) -> None:
    head = model.head
    if hasattr(head, "class_names"):
        model.head = type(head)(head.pooling, tuple(map(str, range(len(NAMES)))))  # type: ignore[call-arg]
    save(model, folder)
    model.head = head


MUTANTS = {
    "writes_in_place": writes_in_place,
    "removes_before_it_writes": removes_before_it_writes,
    "forgets_to_flush": forgets_to_flush,
    "rounds_to_half": rounds_to_half,
    "forgets_the_head": forgets_the_head,
    "forgets_the_names": forgets_the_names,
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
