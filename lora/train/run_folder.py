"""The folder that a run writes: its rows, the states that are kept, and the one that it goes on from."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora.errors import FileFormatError, LoraWarning, ValidationError, WriteError
from lora.io.apr_folder import is_apr
from lora.io.atomic import remove_folder, remove_partial
from lora.train.config import FinetuneConfig
from lora.train.identity import file_hashes
from lora.train.loop import Progress
from lora.train.metrics_csv import MetricsCsv
from lora.train.metrics_file import MetricsFile, read_rows
from lora.train.optimizer import AdamW
from lora.train.recipe import RECIPE_FILE
from lora.train.run import RUN_FILE
from lora.train.state import STATE_FILE, State, read_state, restore, write_state
from lora.train.tensorboard import FOLDER, TensorBoard

METRICS_FILE, METRICS_CSV = "metrics.jsonl", "metrics.csv"
BEST, LAST = "best", "last"
MOST_LISTED = 20
_EPOCH = re.compile(r"epoch-(\d+)")
# beside the epochs
_NAMES = (RUN_FILE, STATE_FILE, METRICS_FILE, METRICS_CSV, RECIPE_FILE, FOLDER, BEST, LAST)
# of a kept state; its card may be written anew by an evaluation
_TRAINED = ("*.safetensors", "*.json", "*.apr")


def run_places(output: Path) -> tuple[Path, Path | None]:
    """Return the folder of a run and, where `output` is NAME.apr, that file; the folder is then NAME-run."""
    return (output.with_name(f"{output.stem}-run"), output) if is_apr(output) else (output, None)


def refuse_another_run(folder: Path) -> None:
    """Refuse a folder where another run, or anything else, lies under a name that a run writes.

    A metrics.jsonl without a row is no loss: a run that ended before its first state leaves nothing else.

    Raises:
        ValidationError: what was found, by name.
    """
    if folder.exists() and not folder.is_dir():
        raise ValidationError(f"{folder}: expected a folder, or nothing, found a file; name another output")
    found = _written_by_runs(folder)
    for name in (RUN_FILE, STATE_FILE):
        if name in found:
            raise ValidationError(
                f"{folder} holds another run ({name}); go on with it under --resume, name another output, or "
                "remove it"
            )
    if found:
        raise ValidationError(
            f"{folder}: expected a folder with nothing under a name that a run writes, found "
            f"{', '.join(found[:MOST_LISTED])}; name another output, or move them away"
        )


def _written_by_runs(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    there = {path.name: path for path in folder.iterdir()}
    if METRICS_FILE in there and there[METRICS_FILE].lstat().st_size == 0:
        del there[METRICS_FILE]
    return sorted(name for name in there if name in _NAMES or _EPOCH.fullmatch(name))


def state_to_resume(folder: Path) -> State | None:
    """Return the state in `folder`, or None, said aloud, where no run has begun.

    Raises:
        ValidationError: no run has begun there, and there is something that a new one would write over.
        MissingFileError: the run that began there has lost its state.
        FileFormatError: the state is corrupt, or the best of the kept states is not as the run saved it.
    """
    if not (folder / RUN_FILE).exists() and not (folder / STATE_FILE).exists():
        refuse_another_run(folder)
        warnings.warn(f"{folder} holds no run to resume: starting a new one", LoraWarning, stacklevel=3)
        return None
    state = read_state(folder / STATE_FILE)
    _check_best(folder, state)
    return state


def _check_best(folder: Path, state: State) -> None:
    if BEST in state.facts["progress"]["unsaved"]:
        return  # it will be written anew
    found = file_hashes(folder / BEST, _TRAINED)
    changed = sorted(name for name, known in state.facts["best"].items() if found.get(name) != known)
    if changed:
        raise FileFormatError(
            f"{folder / BEST}: {', '.join(changed)} changed or gone since the run saved its best epoch; "
            "put the folder back, or begin a new run in another output"
        )


def _remove_leftovers(folder: Path) -> None:
    remove_folder(folder / LAST)  # what Ctrl-C left would soon be older than the state
    remove_partial(folder)
    for kept in filter(Path.is_dir, folder.iterdir()):
        remove_partial(kept)


@dataclass
class RunFolder:
    """What stands in the folder of a run that trains now; `begin` opens it."""

    path: Path
    keep: int
    optimizer: AdamW
    identity: Mapping[str, Any]
    write: Callable[[Path], None]  # writes what is trained into a folder
    metrics: MetricsFile
    others: list[MetricsCsv | TensorBoard]  # that tell the same in other forms
    progress: Progress
    best: dict[str, str]  # hashes of the files of the best state
    parts: list[dict[str, Any]]  # what the run stood on, from which step
    began: float

    @classmethod
    def begin(
        cls,
        path: Path,
        config: FinetuneConfig,
        optimizer: AdamW,
        identity: Mapping[str, Any],
        state: State | None,
        *,
        write: Callable[[Path], None],
    ) -> RunFolder:
        """Make the folder, or put everything back in its place as `state` knows it, and write a state.

        Raises:
            FileFormatError: the state is of another model, or rows that it counts on are gone.
            ValidationError: another run writes the folder now, or it is not as it was when `state` was
                looked for.
            WriteError: the folder cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"{path}: the folder cannot be made: {error.strerror}") from error
        progress, best, parts = Progress(), dict[str, str](), list[dict[str, Any]]()
        if state is None:
            refuse_another_run(path)
        else:
            restore(state, optimizer)
            progress = Progress.from_dict(state.facts["progress"])
            best, parts = state.facts["best"], state.facts["parts"]
        metrics = MetricsFile(path / METRICS_FILE, state.facts["rows"] if state else None)
        if state is not None:
            _remove_leftovers(path)
        parts.append({"from_step": progress.step, "data": identity["data"], **identity["arithmetic"]})
        began = time.perf_counter() - progress.seconds
        folder = cls(path, config.keep, optimizer, identity, write, metrics, [], progress, best, parts, began)
        with ExitStack() as opened:
            opened.callback(folder.close)
            # before all else that is written: what lies here without a state is none of ours
            folder.checkpoint()
            folder.others.append(MetricsCsv(path / METRICS_CSV, read_rows(path / METRICS_FILE)))
            if config.tensorboard:
                folder.others.append(TensorBoard(path / FOLDER, after_step=progress.step))
            opened.pop_all()  # all of them could be opened, and stay open
        return folder

    @property
    def records(self) -> list[MetricsFile | MetricsCsv | TensorBoard]:
        """All that rows are written to."""
        return [self.metrics, *self.others]

    def seconds(self) -> float:
        """Return how long the run has trained, in all processes together."""
        return time.perf_counter() - self.began

    def checkpoint(self) -> None:
        """Write the state that the run goes on from.

        Raises:
            WriteError: the disk is full, or else cannot be written; the last state is unharmed.
        """
        self.progress.seconds = self.seconds()
        facts = {
            "progress": self.progress.as_dict(),
            # the rows first: a state must never count on rows that a power cut takes away
            "rows": self.metrics.settled(),
            "best": self.best,
            "identity": self.identity,
            "parts": self.parts,
        }
        write_state(self.path / STATE_FILE, self.optimizer, facts)

    def close(self) -> None:
        """Close the files of rows."""
        for record in self.records:
            record.close()

    def save(self, name: str) -> None:
        """Write what is trained under `name`, and remove the oldest `epoch-N` of more than `keep`."""
        self.write(self.path / name)
        if name == BEST:
            self.best = file_hashes(self.path / BEST, _TRAINED)
        elif found := _EPOCH.fullmatch(name):
            self._rotate(int(found[1]))

    def _rotate(self, newest: int) -> None:
        found = (_EPOCH.fullmatch(path.name) for path in self.path.iterdir())
        epochs = sorted(int(match[1]) for match in found if match)
        for epoch in [epoch for epoch in epochs if epoch <= newest][: -self.keep]:
            remove_folder(self.path / f"epoch-{epoch}")
