"""Attempts to falsify contracts/training/resume.yaml; real processes are killed in test_killed.py."""

from __future__ import annotations

import errno
import json
import re
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora
from lora.backend import bfloat16
from lora.contracts import training_contract
from lora.data.chat_template import CHATML
from lora.errors import FileFormatError, LoraError, LoraWarning, ValidationError
from lora.train import finetune as room
from lora.train import identity as identity_room
from lora.train import loop as loop_room
from lora.train import row_file, run_folder
from lora.train.callbacks import Callback, StepDone
from lora.train.identity import check_same_run
from lora.train.interrupts import Held
from lora.train.metrics_file import MetricsFile
from lora.train.optimizer import AdamW
from lora.train.run_folder import RunFolder
from lora.train.state import STATE_FILE, State, read_state, restore, write_state
from tests.data.files import tokenizer_folder, write_jsonl
from tests.harness.claims import assert_killed, claimed, planted
from tests.harness.models import TINY_QWEN2, write_model

CONTRACT = training_contract("resume")
CONFIG = TINY_QWEN2 | {"num_hidden_layers": 1, "vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
ROWS = {
    "classify": [
        {"input": f"{'good' if i % 2 else 'bad'} {i}", "label": "yes" if i % 3 else "no"} for i in range(14)
    ],
    "causal": [{"text": f"line {i} of {i * i}"} for i in range(14)],
    "instruct": [{"instruction": f"add {i} and 1", "response": str(i + 1)} for i in range(14)],
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"task": "classify", "method": "lora"},
    "head": {"task": "classify", "method": "head"},
    "full": {"task": "classify", "method": "full"},
    "oversample": {"task": "classify", "oversample": True},
    "causal": {"task": "causal"},
    "instruct": {"task": "instruct"},
}
TIMES = ("epoch_time_ms", "samples_per_sec", "tokens_per_second", "peak_memory")
SETTINGS: dict[str, Any] = {
    "epochs": 4, "batch_size": 2, "grad_accum": 2, "save_steps": 2, "learning_rate": 0.1, "patience": 2
}  # fmt: skip


class Killed(BaseException):
    """Ends a run where SIGKILL would, as far as its files go."""


class KillAfter(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def step_done(self, event: StepDone) -> None:
        if event.step == self._step:
            raise Killed


class Intruding(Callback):
    """Starts a run in the folder of this one after a step."""

    def __init__(self, output: Path, case: Case) -> None:
        self._output, self._case = output, case

    def step_done(self, event: StepDone) -> None:
        if event.step != self._case.step:
            return
        with pytest.MonkeyPatch.context() as patch:
            # as where both have looked before either wrote
            for place in (room, run_folder):
                patch.setattr(place, "refuse_another_run", lambda folder: None)
            for resume in (False, True):
                with pytest.raises(ValidationError, match="another run writes it now"):
                    train(self._output, self._case.kind, resume=resume)


class Case(NamedTuple):
    kind: str
    step: int


@cache
def inputs(task: str = "classify") -> tuple[Path, Path]:
    folder = Path(mkdtemp())
    base = tokenizer_folder(
        write_model(folder / "base", CONFIG | {"torch_dtype": "bfloat16"}, dtype=bfloat16)
    )
    (base / "chat_template.jinja").write_text(CHATML)
    return base, write_jsonl(folder / "rows.jsonl", ROWS[task])


def train(output: Path, kind: str, **more: Any) -> Any:
    base, rows = inputs(KINDS[kind]["task"])
    return lora.finetune(base, rows, output=output, **SETTINGS | KINDS[kind] | more)


def train_until(output: Path, case: Case, **more: Any) -> None:
    with suppress(Killed):
        train(output, case.kind, callbacks=[KillAfter(case.step)], **more)


def written(output: Path) -> dict[str, Any]:
    """Return the bytes of all states, and the rows of the metrics without times."""
    states = {
        str(path.relative_to(output)): path.read_bytes() for path in output.glob("*/*") if path.is_file()
    }
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    return states | {"metrics": rows}


@cache
def uninterrupted(kind: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        train(Path(folder), kind)
        return written(Path(folder))


# where the library looks each of these up
PLACES: dict[str, Any] = {
    "read_state": run_folder,
    "restore": run_folder,
    "MetricsFile": run_folder,
    "_check_best": run_folder,
    "_written_by_runs": run_folder,
    "_rotate": RunFolder,
    "check_same_run": room,
    "FREE": identity_room,
    "Held": loop_room,
    "_hold": row_file,
}
LIBRARY = SimpleNamespace(**{name: getattr(place, name) for name, place in PLACES.items()})


@contextmanager
def planted_in(system: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, place in PLACES.items():
            patch.setattr(place, name, getattr(system, name))
        yield


def check_goes_on(system: Any, case: Case) -> None:
    with TemporaryDirectory() as folder, planted_in(system):
        output = Path(folder)
        train_until(output, case)
        train(output, case.kind, resume=True, save_steps=3)
        assert written(output) == uninterrupted(case.kind)


def check_changes(system: Any, case: Case) -> None:
    base, rows = inputs()
    with TemporaryDirectory() as folder, planted_in(system), pytest.MonkeyPatch.context() as patch:
        output, other = Path(folder) / "run", Path(folder) / "other"
        train_until(output, Case("lora", case.step))
        before = written(output)
        more = write_jsonl(Path(folder) / "more.jsonl", ROWS["classify"][::-1])
        renamed = [row | {"label": row["label"].upper()} for row in ROWS["classify"]]
        classes = write_jsonl(Path(folder) / "classes.jsonl", renamed)
        shutil.copytree(base, other)
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        settings = SETTINGS | KINDS["lora"] | {"output": output, "resume": True}
        allowed = {"allow_data_mismatch": True}
        for args, changed, named in (
            ((base, rows), {"learning_rate": 0.2}, "settings learning_rate: 0.1 then, 0.2 now"),
            ((base, rows), {"seed": 1, **allowed}, "settings seed: 42 then, 1 now"),
            ((base, more), {}, "data sha256"),
            ((base, classes), allowed, "classes names"),
            ((other, rows), allowed, "base model.safetensors"),
        ):
            with pytest.raises(ValidationError, match=named):
                lora.finetune(*args, **settings | changed)
        assert written(output) == before
        facts = identity_room.blas_facts() | {"threads": 99}
        patch.setattr(identity_room, "blas_facts", lambda: facts)
        with pytest.warns(LoraWarning, match=r"BLAS threads: \d+ then, 99 now"):
            lora.finetune(base, more, **settings | allowed)
        parts = json.loads((output / "run.json").read_text())["parts"]
        assert [part["data"]["sha256"] for part in parts] == [*map(identity_room.file_hash, (rows, more))]


def check_corrupt(system: Any, case: Case) -> None:
    with TemporaryDirectory() as folder, planted_in(system):
        output = Path(folder)
        train_until(output, Case("lora", max(case.step, 5)))  # an epoch has three steps
        for path in (
            output / STATE_FILE,
            output / "metrics.jsonl",
            *sorted(set(output.glob("best/*")) - {output / "best" / "README.md"}),
        ):
            for damaged in damages(path.read_bytes(), case.step):
                check_damaged(output, path, damaged)


def check_damaged(output: Path, path: Path, damaged: bytes | None) -> None:
    with whole_again(path):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(LoraError, match=re.escape(path.name)) as caught:
            train(output, "lora", resume=True)
        assert "\n" not in str(caught.value)
        missing = damaged is None and path.name == STATE_FILE
        assert caught.value.exit_code == (3 if missing else 4)


def damages(whole: bytes, step: int) -> tuple[bytes | None, ...]:
    """Return `whole` cut short, with one bit flipped, and gone."""
    flipped = bytearray(whole)
    flipped[len(whole) // 3 + step] ^= 1 << step % 8
    return whole[: len(whole) // 4], bytes(flipped), None


@contextmanager
def whole_again(path: Path) -> Iterator[None]:
    whole = path.read_bytes()
    yield
    path.write_bytes(whole)


def check_rotation(system: Any, case: Case) -> None:
    keep = 1 + case.step % 4
    with TemporaryDirectory() as folder, planted_in(system):
        output = Path(folder)
        train_until(output, Case("head", case.step), keep=keep)
        # a rate that is too small to make any epoch better than the first
        done = train(output, "head", keep=keep, resume=True).epochs
        newest = {f"epoch-{epoch.epoch}" for epoch in done[-keep:]}
        assert {path.name for path in output.iterdir() if path.is_dir()} == {"best", *newest}
        assert any((output / "best").iterdir())


@contextmanager
def handled_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise, also in a process that was started with it ignored, as in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_interrupt(system: Any, case: Case) -> None:
    move, moves = AdamW.step, []
    # before anything is planted: it may be the first to train
    steps = sum(row["kind"] == "step" for row in uninterrupted("lora")["metrics"])

    def interrupted(self: AdamW, *args: Any, **settings: Any) -> float:
        norm = move(self, *args, **settings)
        moves.append(self.steps)
        if len(moves) == case.step:
            signal.raise_signal(signal.SIGINT)  # the arrays have moved, and nothing has counted it yet
        return norm

    with (
        TemporaryDirectory() as folder,
        planted_in(system),
        handled_interrupts(),
        pytest.MonkeyPatch.context() as patch,
    ):
        output = Path(folder)
        patch.setattr(AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt) if case.step <= steps else nullcontext():
            train(output, "lora")
        assert len(moves) == min(case.step, steps)
        facts = read_state(output / STATE_FILE).facts
        assert facts["progress"]["step"] == facts["optimizer_steps"] == len(moves)
        assert case.step > steps or any((output / "last").iterdir())
        train(output, "lora", resume=True)
        assert written(output) == uninterrupted("lora")


def check_alone(system: Any, case: Case) -> None:
    with TemporaryDirectory() as folder, planted_in(system):
        output = Path(folder)
        train(output, case.kind, callbacks=[Intruding(output, case)])
        assert written(output) == uninterrupted(case.kind)


FOREIGN = (
    "metrics.csv",
    "metrics.jsonl",
    "recipe.yaml",
    "best/notes.txt",
    "epoch-7/notes.txt",
    "last/notes.txt",
    "tensorboard/events",
)


def check_foreign(system: Any, case: Case) -> None:
    with TemporaryDirectory() as folder, planted_in(system):
        output, name = Path(folder), FOREIGN[case.step % len(FOREIGN)]
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
        found = re.escape(name.partition("/")[0])
        for resume in (False, True):
            with pytest.raises(
                ValidationError, match=f"a name that a run writes, found {found}; name another"
            ):
                train(output, case.kind, resume=resume)
        assert [path for path in output.rglob("*") if path.is_file()] == [output / name]
        assert (output / name).read_text() == "mine"


CHECKS = {
    "RESUME-001": check_goes_on,
    "RESUME-002": check_changes,
    "RESUME-003": check_corrupt,
    "RESUME-004": check_rotation,
    "RESUME-005": check_interrupt,
    "RESUME-006": check_alone,
    "RESUME-007": check_foreign,
}
CASES = st.builds(Case, st.sampled_from(sorted(KINDS)), st.integers(*CONTRACT.domain["steps"]))


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(LIBRARY, case)


def test_where_nothing_is_to_resume_a_new_run_begins_aloud(tmp_path: Path) -> None:
    with pytest.warns(LoraWarning, match="no run to resume: starting a new one"):
        train(tmp_path, "lora", resume=True)
    assert written(tmp_path) == uninterrupted("lora")


def test_a_run_that_has_ended_is_told_again_and_not_trained_on(tmp_path: Path) -> None:
    first = train(tmp_path, "lora")
    before = written(tmp_path)
    again = train(tmp_path, "lora", resume=True, callbacks=[KillAfter(first.epochs[-1].epoch)])
    assert (again.epochs, again.best_epoch) == (first.epochs, first.best_epoch)
    assert written(tmp_path) == before


def test_a_run_without_resume_leaves_another_alone(tmp_path: Path) -> None:
    train_until(tmp_path, Case("lora", 3))
    (tmp_path / "run.json").unlink()
    before = written(tmp_path)
    with pytest.raises(ValidationError, match="--resume"):
        train(tmp_path, "lora")
    assert written(tmp_path) == before


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValidationError, match="expected a folder, or nothing, found a file"):
        train(tmp_path / "run", "lora")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_that_another_overtook_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "lora")
    before = written(tmp_path)
    monkeypatch.setattr(room, "refuse_another_run", lambda folder: None)  # it ended since this one looked
    with pytest.raises(ValidationError, match="holds another run"):
        train(tmp_path, "lora")
    assert written(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_files_that_no_run_writes_stay_beside_it(tmp_path: Path, resume: bool) -> None:
    for name in ("rows.jsonl", "best.txt", "epoch-7.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.warns(LoraWarning, match="no run to resume") if resume else nullcontext():
        train(tmp_path, "head", resume=resume)
    assert written(tmp_path) == uninterrupted("head")
    assert (tmp_path / "epoch-7.txt").read_text() == "mine"


def test_a_run_that_ended_before_its_first_state_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> None:
        raise Killed

    monkeypatch.setattr(run_folder, "write_state", killed)
    with pytest.raises(Killed):
        train(tmp_path, "lora")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    train(tmp_path, "lora")
    assert written(tmp_path) == uninterrupted("lora")


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlockable(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(row_file.fcntl, "flock", unlockable)
    with pytest.warns(LoraWarning, match="no second run"):
        row_file.RowFile(tmp_path / "rows").close()


def test_a_loaded_model_goes_on_with_its_own_adapter(tmp_path: Path) -> None:
    def model(alpha: float) -> lora.Model:
        loaded = lora.load(inputs()[0], class_names=("no", "yes"))
        loaded.add_adapter(lora.LoraConfig(r=2, lora_alpha=alpha))
        return loaded

    settings = SETTINGS | {"data": inputs()[1], "task": "classify"}
    lora.finetune(model(8), output=tmp_path / "whole", **settings)
    output = tmp_path / "run"
    with suppress(Killed):
        lora.finetune(model(8), output=output, callbacks=[KillAfter(4)], **settings)
    with pytest.raises(ValidationError, match="adapter alpha: 8"):
        lora.finetune(model(9), output=output, resume=True, **settings)
    lora.finetune(model(8), output=output, resume=True, **settings)
    assert written(output) == written(tmp_path / "whole")


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    optimizer = _optimizer({"a": np.ones((2, 3), np.float32)})
    write_state(tmp_path / STATE_FILE, optimizer, {})
    other = _optimizer({"a": np.ones((3, 2), np.float32), "b": np.ones(1, np.float32)})
    with pytest.raises(FileFormatError, match="parameters/a, parameters/b do not fit"):
        restore(read_state(tmp_path / STATE_FILE), other)


def test_a_state_takes_no_memory_of_its_size(tmp_path: Path) -> None:
    optimizer = _optimizer({name: np.ones((2048, 512), np.float32) for name in "abc"})
    optimizer.make_moments()
    optimizer.steps = 1
    tracemalloc.start()
    try:
        write_state(tmp_path / STATE_FILE, optimizer, {})
        restore(read_state(tmp_path / STATE_FILE), optimizer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (tmp_path / STATE_FILE).stat().st_size / 20


def test_a_second_ctrl_c_handler_and_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Held() as held:
            held.begin()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _optimizer(arrays: dict[str, np.ndarray]) -> AdamW:
    return AdamW(SimpleNamespace(trainable=lambda: arrays), lr=0.1)


def _bug(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**vars(LIBRARY) | changes)


def _restoring(change: Callable[[AdamW], None]) -> SimpleNamespace:
    def changed(state: State, optimizer: AdamW) -> None:
        restore(state, optimizer)
        change(optimizer)

    return _bug(restore=changed)


def _reading(change: Callable[[dict[str, Any]], None]) -> SimpleNamespace:
    def changed(path: Path) -> State:
        state = read_state(path)
        change(state.facts["progress"])
        return state

    return _bug(read_state=changed)


def _forgets_count(optimizer: AdamW) -> None:
    optimizer.steps = 0


def _narrows(optimizer: AdamW) -> None:
    for array in optimizer.model.trainable().values():
        array[...] = array.astype(bfloat16).astype(np.float32)


def _comparing(change: Callable[[Any, Any, dict[str, bool]], None]) -> SimpleNamespace:
    """Compare after `change(before, now, more)` has made equal, or allowed, what it should not."""

    def changed(path: Path, before: Any, now: Any, **more: bool) -> None:
        before, now = dict(before), dict(now)
        change(before, now, more)
        check_same_run(path, before, now, **more)

    return _bug(check_same_run=changed)


def _equal(*kinds: str) -> SimpleNamespace:
    return _comparing(lambda before, now, more: before.update({kind: now[kind] for kind in kinds}))


def _allowing(before: Any, now: Any, more: dict[str, bool]) -> None:
    if more["allow_data_mismatch"]:
        before.update(now)


class Repeating(MetricsFile):
    """Goes on at the end of the rows, and not where the state was written."""

    def _keep(self, counted: Any) -> None:
        while self._file.read(2**20):
            pass


class Trusting(MetricsFile):
    def _keep(self, counted: Any) -> None:
        self._file.read(counted["bytes"])
        self._file.truncate(counted["bytes"])


def _trusting(path: Path) -> State:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.train.state._is_whole", lambda tensors: True)
        return read_state(path)


class Unheld(Held):
    def begin(self) -> None:
        pass


class Forgetful(Held):
    def __exit__(self, *raised: Any) -> None:
        self._asked = False
        super().__exit__(*raised)


def _keeps_one_less(self: RunFolder, newest: int) -> None:
    LIBRARY._rotate(self, newest)
    epochs = sorted(self.path.glob("epoch-*"))
    if len(epochs) == self.keep:
        shutil.rmtree(epochs[0])


def _keeps_the_oldest(self: RunFolder, newest: int) -> None:
    for path in sorted(self.path.glob("epoch-*"))[self.keep :]:
        shutil.rmtree(path)


MUTANTS = {
    "forgets_the_moments": _restoring(lambda optimizer: optimizer.moments.clear()),
    "forgets_the_count": _restoring(_forgets_count),
    "restarts_the_schedule": _reading(lambda progress: progress.update(step=0)),
    "restarts_the_epoch": _reading(lambda progress: progress["sums"].update(steps=0)),
    "drops_the_sums": _reading(lambda progress: progress["sums"].update(loss=0.0, correct=0, counted=0)),
    "forgets_the_best": _reading(lambda progress: progress.update(best=None)),
    "restores_narrow_weights": _restoring(_narrows),
    "repeats_rows": _bug(MetricsFile=Repeating),
    "refuses_a_free_setting": _bug(FREE=("save_every", "keep", "tensorboard")),
    "compares_nothing": _bug(check_same_run=lambda *args, **more: None),
    "compares_no_base": _equal("base"),
    "allows_everything": _comparing(_allowing),
    "allows_other_classes": _equal("classes"),
    "is_silent_of_arithmetic": _equal("arithmetic"),
    "trusts_every_bit": _bug(read_state=_trusting),
    "trusts_the_rows": _bug(MetricsFile=Trusting),
    "trusts_the_best": _bug(_check_best=lambda folder, state: None),
    "keeps_everything": _bug(_rotate=lambda self, newest: None),
    "keeps_one_less": _bug(_rotate=_keeps_one_less),
    "keeps_the_oldest": _bug(_rotate=_keeps_the_oldest),
    "interrupts_the_move": _bug(Held=Unheld),
    "forgets_the_interrupt": _bug(Held=Forgetful),
    "looks_for_a_run_alone": _bug(
        _written_by_runs=lambda folder: [n for n in ("run.json", STATE_FILE) if (folder / n).exists()]
    ),
    "overwrites_rows": _bug(
        _written_by_runs=lambda folder: [n for n in LIBRARY._written_by_runs(folder) if "metrics" not in n]
    ),
    "lets_a_second_in": _bug(_hold=lambda file, path: None),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)
