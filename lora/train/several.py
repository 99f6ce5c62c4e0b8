"""Several adapters, one after another, on a base that is loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

from lora.errors import UsageError
from lora.model.loading import open_base
from lora.train.callbacks import Callback
from lora.train.finetune import check_run, settings_of_run, train_run
from lora.train.run import Run
from lora.train.run_folder import run_places


def finetune_each(
    model: str | Path,
    runs: Sequence[tuple[str | Path, str | Path]],
    task: str | None = None,
    *,
    resume: bool = False,
    allow_data_mismatch: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> tuple[Run, ...]:
    """Train an adapter for each (data, output), with the same settings, in the bits of runs of their own.

    The files and rows of all of them are checked before the first one trains or anything is written.

    Args:
        model: a checkpoint's folder or a hub id; its weights are loaded once.
        runs: for each adapter its file of rows and its folder, as `finetune` takes them.
        task: of all; None for what the rows of each file say.
        resume: go on with the runs that have begun; one that has ended is left as it is.
        allow_data_mismatch: go on though rows have changed since.
        callbacks: told of each run in turn; where one fails, `said` which have ended.
        **settings: fields of `FinetuneConfig`.

    Raises:
        UsageError: there is no run, two would write into one folder, or the method makes no adapter.
        LoraError: as in `finetune`; what has ended stays complete.
    """
    outputs = [Path(output) for _, output in runs]
    _check_apart([run_places(output)[0] for output in outputs])
    config = settings_of_run(task, settings)
    if config.method not in ("auto", "lora"):
        raise UsageError(
            f"several adapters on one base: expected method auto or lora, found {config.method!r}; "
            "start a run of its own for each file of rows"
        )
    going_on = {"resume": resume, "allow_data_mismatch": allow_data_mismatch}
    checked = [
        check_run(config, model, Path(data), output, **going_on)
        for (data, _), output in zip(runs, outputs, strict=True)
    ]
    base = open_base(model, config.device, config.dtype)
    done: list[Run] = []
    with _saying_what_is_done(done, outputs, callbacks):
        for run in checked:
            done.append(train_run(base, run, callbacks))
    return tuple(done)


def _check_apart(outputs: Sequence[Path]) -> None:
    if not outputs:
        raise UsageError("expected at least one pair of a data file and an output, found none")
    for first, second in combinations([output.resolve() for output in outputs], 2):
        if first == second or first in second.parents or second in first.parents:
            raise UsageError(f"each run needs a folder of its own; found {first} and {second}")


@contextmanager
def _saying_what_is_done(
    done: Sequence[Run], outputs: Sequence[Path], callbacks: Sequence[Callback]
) -> Iterator[None]:
    try:
        yield
    finally:
        if len(done) < len(outputs):
            ended, left = outputs[: len(done)], outputs[len(done) + 1 :]
            message = (
                f"ended in {outputs[len(done)]}; complete: {', '.join(map(str, ended)) or 'none'}; "
                f"not begun: {', '.join(map(str, left)) or 'none'}"
            )
            for callback in callbacks:
                callback.said(message)
