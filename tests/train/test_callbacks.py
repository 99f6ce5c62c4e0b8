"""What a user's own callback is told, and that an error in it is not swallowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lora
from lora.train.callbacks import EpochDone, Started, StepDone
from tests.cli.conftest import LABELLED, write_base
from tests.data.files import write_jsonl

SETTINGS = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01}  # 16 rows to train on: two steps an epoch


class Diary(lora.Callback):
    """Writes down every event in its order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def started(self, event: Started) -> None:
        self.events.append(event)

    def step_done(self, event: StepDone) -> None:
        self.events.append(event)

    def epoch_done(self, event: EpochDone) -> None:
        self.events.append(event)


class Broken(lora.Callback):
    """Fails at the second step, as a user's dashboard may."""

    def step_done(self, event: StepDone) -> None:
        if event.step == 2:
            raise RuntimeError("the dashboard is gone")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    base = write_base(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", LABELLED)
    return lambda *callbacks: lora.finetune(
        base, data, output=tmp_path / "run", callbacks=callbacks, **SETTINGS
    )


def test_a_callback_sees_the_start_every_step_and_every_epoch(run) -> None:
    diary = Diary()
    outcome = run(diary)
    kinds = [type(event) for event in diary.events]
    assert kinds == [Started, StepDone, StepDone, EpochDone, StepDone, StepDone, EpochDone]
    assert diary.events[0].total_steps == 4
    steps = [event for event in diary.events if isinstance(event, StepDone)]
    assert [(event.step, event.epoch) for event in steps] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert tuple(event for event in diary.events if isinstance(event, EpochDone)) == outcome.epochs


def test_an_error_in_a_callback_ends_the_run_as_it_is(run, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="the dashboard is gone"):
        run(Broken())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(row["step"] for row in rows if row["kind"] == "step") == 1
    assert not (tmp_path / "run" / "best").exists()  # no epoch was finished
