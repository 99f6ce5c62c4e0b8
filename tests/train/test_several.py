"""Attempts to falsify contracts/training/several.yaml: several adapters on one base that is loaded once."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
from lora.contracts import training_contract
from lora.model import loading
from lora.train.callbacks import Callback
from lora.train.evaluate import evaluate, read_examples_for
from lora.train.recipe import read_recipe
from tests.cli.conftest import LABELLED, TEXTS, write_base
from tests.data.files import write_jsonl
from tests.harness.claims import assert_killed, claimed, planted

QUICK: dict[str, Any] = {"method": "lora", "rank": 2, "epochs": 2, "batch_size": 8, "learning_rate": 0.01}
THREE = [{"input": f"row {i} of three", "label": i % 3} for i in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("several") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two classes, three classes, and texts: each wants another head."""
    folder = tmp_path_factory.mktemp("data")
    kinds = {"two": LABELLED, "three": THREE, "texts": TEXTS}
    return [write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in kinds.items()]


def states(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every adapter that a run kept, by its path in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("adapter_model.safetensors"))
    }


def pairs(data: list[Path], folder: Path) -> list[tuple[Path, Path]]:
    return [(path, folder / path.stem) for path in data]


class Said(Callback):
    """Keeps what was said, and interrupts the run in the folder `fails` at its first step."""

    def __init__(self, fails: Path | None = None) -> None:
        self.messages: list[str] = []
        self._fails = fails

    def started(self, event: Any) -> None:
        self._interrupts = event.output == self._fails

    def step_done(self, event: Any) -> None:
        if self._interrupts:
            raise KeyboardInterrupt

    def said(self, message: str) -> None:
        self.messages.append(message)


def test_the_bytes_are_those_of_runs_of_their_own(
    base: Path, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    right = loading.open_checkpoint
    monkeypatch.setattr(loading, "open_checkpoint", lambda folder: opened.append(folder) or right(folder))
    together = lora.finetune_each(base, pairs(data, tmp_path / "together"), **QUICK)
    assert len(opened) == 1
    assert [run.task for run in together] == ["classify", "classify", "causal"]
    for path, run in zip(data, together, strict=True):
        alone = lora.finetune(base, path, output=tmp_path / "alone" / path.stem, **QUICK)
        assert states(run.output) == states(alone.output)
        assert {"best/adapter_model.safetensors", "epoch-2/adapter_model.safetensors"} <= states(
            run.output
        ).keys()
        recipe = read_recipe(run.output / "recipe.yaml")
        assert (recipe["data"], recipe["output"]) == (str(path), str(run.output))
        assert {name: recipe[name] for name in QUICK} == QUICK


def test_models_on_one_base_share_its_arrays_and_no_head(base: Path) -> None:
    opened = loading.open_base(base)
    first, second = opened.model(num_labels=2), opened.model(num_labels=3, seed=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert first.parameters.weights[name] is second.parameters.weights[name]
    assert (first.parameters["score.weight"].shape[0], second.parameters["score.weight"].shape[0]) == (2, 3)
    assert not opened.model().is_classifier


def test_nothing_is_written_before_every_file_is_checked(
    base: Path, data: list[Path], tmp_path: Path
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"input": "a", "label": "b"}, {"input": "a"}])
    with pytest.raises(lora.DataError, match=r"bad\.jsonl: line 2"):
        lora.finetune_each(base, [*pairs(data, tmp_path / "runs"), (bad, tmp_path / "runs" / "bad")], **QUICK)
    assert not (tmp_path / "runs").exists()


def test_a_failure_says_what_is_done_and_resume_goes_on(base: Path, data: list[Path], tmp_path: Path) -> None:
    runs = pairs(data, tmp_path / "runs")
    two, three, texts = (output for _, output in runs)
    said = Said(fails=three)
    with pytest.raises(KeyboardInterrupt):
        lora.finetune_each(base, runs, callbacks=[said], **QUICK)
    assert said.messages[-1] == f"ended in {three}; complete: {two}; not begun: {texts}"
    assert not texts.exists()
    with pytest.raises(lora.ValidationError, match="holds another run"):
        lora.finetune_each(base, runs, **QUICK)
    with pytest.warns(lora.LoraWarning, match="texts holds no run to resume"):
        lora.finetune_each(base, runs, resume=True, **QUICK)
    alone = lora.finetune_each(base, pairs(data, tmp_path / "alone"), **QUICK)
    assert [states(output) for _, output in runs] == [states(run.output) for run in alone]


@pytest.mark.parametrize("outputs", [[], ["a", "a"], ["a", "a/b"], ["a/b", "a"]])
def test_each_run_needs_a_folder_of_its_own(
    base: Path, data: list[Path], tmp_path: Path, outputs: list[str]
) -> None:
    with pytest.raises(lora.UsageError, match=r"expected at least one|a folder of its own"):
        lora.finetune_each(base, [(data[0], tmp_path / output) for output in outputs], **QUICK)


CONTRACT = training_contract("several")
SAME = (
    "two",
    "others",
    "more",
)  # data sets of the same two classes: a model of one takes the rows of another
CASES = st.permutations(range(len(SAME))).flatmap(
    lambda order: st.integers(*CONTRACT.domain["data_sets"]).map(lambda count: tuple(order[:count]))
)


@cache
def shared() -> Path:
    """Return a folder with a base, and a file of rows for each of `SAME`, written once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_base(folder / "base")
    for number, name in enumerate(SAME):
        write_jsonl(
            folder / f"{name}.jsonl", [{**row, "input": row["input"] * (1 + number)} for row in LABELLED]
        )
    return folder


@cache
def alone(name: str) -> dict[str, bytes]:
    """Return the states of a run of its own."""
    output = shared() / "alone" / name
    lora.finetune(shared() / "base", shared() / f"{name}.jsonl", output=output, **QUICK)
    return states(output)


def runs_of(case: tuple[int, ...], folder: Path) -> list[tuple[Path, Path]]:
    return [(shared() / f"{SAME[i]}.jsonl", folder / SAME[i]) for i in case]


def check_bytes(system: Any, case: tuple[int, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_of(case, Path(folder))
        system(shared() / "base", runs, **QUICK)
        for _, output in runs:
            assert states(output) == alone(output.name)


def check_nothing_before_all_is_checked(system: Any, case: tuple[int, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bad = write_jsonl(folder / "bad.jsonl", [{"input": "a", "label": "b"}, {"input": "a"}])
        runs = [*runs_of(case, folder / "runs"), (bad, folder / "runs" / "bad")]
        refused = None
        try:
            system(shared() / "base", runs, **QUICK)
        except lora.DataError as error:
            refused = error
        assert "line 2" in str(refused)
        assert not (folder / "runs").exists()


def check_failure(system: Any, case: tuple[int, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, failed = Path(name), False
        runs = runs_of(case, folder / "runs")
        ended, (_, broken), left = runs[:1], runs[1], runs[2:]
        said = Said(fails=broken)
        try:
            system(shared() / "base", runs, callbacks=[said], **QUICK)
        except KeyboardInterrupt:
            failed = True
        assert failed
        assert all(states(output) == alone(output.name) for _, output in ended)
        assert not any(output.exists() for _, output in left)
        assert any(f"complete: {ended[0][1]}" in message for message in said.messages)


CHECKS = {
    "SEVERAL-001": check_bytes,
    "SEVERAL-002": check_nothing_before_all_is_checked,
    "SEVERAL-003": check_failure,
}


@pytest.mark.parametrize("check", claimed(CHECKS))
@settings(max_examples=3, deadline=None)
@given(case=CASES)
def test_claim(check: Any, case: tuple[int, ...]) -> None:
    check(lora.finetune_each, case)


def _goes_on_with_the_adapter(base: Path, runs: Any, **named: Any) -> None:
    model = lora.load(base, class_names=["bad", "good"], seed=42)
    for data, output in runs:
        lora.finetune(model, data, output=output, **named)


def _moves_the_seed(base: Path, runs: Any, **named: Any) -> None:
    for number, (data, output) in enumerate(runs):
        lora.finetune(base, data, output=output, seed=42 + number, **named)


def _writes_all_into_the_last(base: Path, runs: Any, **named: Any) -> None:
    lora.finetune_each(
        base, [(data, output) for (data, _), (_, output) in zip(runs, runs[::-1], strict=True)], **named
    )


def _checks_as_it_goes(base: Path, runs: Any, **named: Any) -> None:
    for data, output in runs:
        lora.finetune(base, data, output=output, **named)


def _drops_the_bad_file(base: Path, runs: Any, **named: Any) -> None:
    lora.finetune_each(base, [run for run in runs if run[0].stem != "bad"], **named)


def _goes_on_after_a_failure(base: Path, runs: Any, **named: Any) -> None:
    failure = None
    for data, output in runs:
        try:
            lora.finetune_each(base, [(data, output)], **named)
        except KeyboardInterrupt as error:
            failure = error
    if failure is not None:
        raise failure


MUTANTS = {
    "goes_on_with_the_adapter": _goes_on_with_the_adapter,
    "moves_the_seed": _moves_the_seed,
    "writes_all_into_the_last": _writes_all_into_the_last,
    "checks_as_it_goes": _checks_as_it_goes,
    "drops_the_bad_file": _drops_the_bad_file,
    "goes_on_after_a_failure": _goes_on_after_a_failure,
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)


def test_a_loaded_model_trains_one_named_adapter_after_another(
    base: Path, data: list[Path], tmp_path: Path
) -> None:
    model = lora.load(base)
    texts = data[2]
    others = write_jsonl(tmp_path / "others.jsonl", [{"text": f"another text, {i}"} for i in range(9)])
    for path in (texts, others):
        model.add_adapter(lora.LoraConfig(r=2), seed=42, name=path.stem)
        run = lora.finetune(model, path, output=tmp_path / "one" / path.stem, **QUICK)
        alone = lora.finetune(base, path, output=tmp_path / "alone" / path.stem, **QUICK)
        assert states(run.output) == states(alone.output)
    before = model([[1, 2, 3]])
    model.set_adapter("texts")
    assert np.abs(model([[1, 2, 3]]) - before).max() > 0


def test_a_loaded_head_keeps_the_order_of_its_classes(base: Path, data: list[Path], tmp_path: Path) -> None:
    turned = lora.load(base, class_names=["good", "bad"], pooling="last", head_bias=False)
    learned = {**QUICK, "epochs": 12, "learning_rate": 0.03}
    run = lora.finetune(turned, data[0], output=tmp_path / "turned", **learned)
    model = lora.load(run.best)
    assert run.class_names == model.head.class_names == ("good", "bad")
    # in the order of the file's names, each class would have been trained as the other
    assert evaluate(model, read_examples_for(model, data[0], 512)).accuracy > 0.9
    with pytest.raises(lora.DataError, match="F-CLASS-002: label 'bad' at line 1 is none of"):
        lora.finetune(lora.load(base, num_labels=2), data[0], output=tmp_path / "other", **QUICK)
