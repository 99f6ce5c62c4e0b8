"""`python -m benchmarks step`: one training step of the same model, ours against Transformers + PEFT.

Each side runs in a process of its own. Both read one checkpoint, one adapter and the same rows. Their first
steps must agree in loss and gradients; then they take turns, A B A B, and every turn is a sample.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, peers
from benchmarks.agreement import Agreement, Disagreement, compare
from benchmarks.cases import CASES, SMOKE, Case, Contestant
from benchmarks.checkpoint import ADAPTER, BATCHES, model_folder
from benchmarks.data import Batch, draw, padding_share
from benchmarks.machine import NO_GPU, Watch, circumstances, cuda_device, disturbed
from benchmarks.plots import plot_step
from benchmarks.processes import ROOT, Worker, clean_environment
from benchmarks.results import FOLDER, MEASURED, Record, not_measured, write
from benchmarks.step_report import print_case
from benchmarks.summary import median, paired_ratio, spread
from benchmarks.workers.serving import Job

_WARM_UP = 1  # batches before the first turn; the first step has been taken by then


@dataclass
class Side:
    """One contestant and what was seen of it."""

    contestant: Contestant
    worker: Worker
    gradients: Path
    first_steps: list[float] = field(default_factory=list)  # seconds from the start of the process
    seconds: list[float] = field(default_factory=list)  # of each turn
    gemm: list[float] = field(default_factory=list)  # FLOP/s
    agreement: Agreement | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    names = [case.name for case in CASES]
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=names,
        default=[name for name in names if name != SMOKE],
        metavar="CASE",
        help=f"{', '.join(names)} (default: all but {SMOKE})",
    )
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="their environment, made by `benchmarks peers`"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns that each side gets (default: %(default)s)"
    )
    parser.add_argument(
        "--starts", type=int, default=3, help="processes started a side (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rows")
    cache = Path(tempfile.gettempdir()) / "lora-benchmarks"
    parser.add_argument(
        "--cache", type=Path, default=cache, help="where checkpoints are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder of the records (default: %(default)s)"
    )


def main(options: argparse.Namespace) -> int:
    """Measure every case asked for. Returns 1 where two sides disagreed, and times none of that case."""
    failed = False
    for case in (case for case in CASES if case.name in options.cases):
        try:
            records = measure(case, options)
        except Disagreement as error:
            print(f"{case.name}: not timed, the sides disagree: {error}", file=sys.stderr)
            failed = True
            continue
        print_case(case, records)
        write(options.output / "step.jsonl", records)
    print(plot_step(options.output))
    return 1 if failed else 0


def measure(case: Case, options: argparse.Namespace) -> list[Record]:
    """Return a record for every contestant of a case, those that cannot run included.

    Raises:
        Disagreement: two sides computed different things.
    """
    absent = {c: reason for c in case.contestants if (reason := why_not(case, c, options.peers))}
    present = [c for c in case.contestants if c not in absent]
    records = []
    if present:
        prepare(case, options)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            sides = start(case, present, options, folder, stack)
            agree(sides)
            foreign = take_turns(case, sides, options.rounds)
            records = [_record(case, side, sides[0], foreign, options) for side in sides]
    return records + [_unmeasured(case, c, reason) for c, reason in absent.items()]


def why_not(case: Case, contestant: Contestant, folder: Path | None) -> str | None:
    """Return why a contestant cannot run here, or None."""
    if case.later is not None:
        return case.later
    if case.device == "cuda" and cuda_device() is None:
        return NO_GPU
    if contestant.library == "lora":
        return None
    liger = ("liger_kernel",) if contestant.library == "peft-liger" else ()
    return peers.why_missing(folder, (*peers.PACKAGES, *liger))


def prepare(case: Case, options: argparse.Namespace) -> None:
    """Write what the contestants read, in a process whose memory no worker inherits."""
    arguments = [case.name, str(options.rounds + 1), str(options.seed), str(options.cache)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoint", *arguments],
        check=True,
        cwd=ROOT,
        env=clean_environment(os.environ),
    )


def start(
    case: Case, contestants: Iterable[Contestant], options: argparse.Namespace, folder: Path, stack: ExitStack
) -> list[Side]:
    """Start every contestant as often as asked, by turns, and keep the last process of each."""
    sides: dict[Contestant, Side] = {}
    first_steps: dict[Contestant, list[float]] = {}
    for turn in range(options.starts):
        for contestant in contestants:
            home = folder / contestant.name
            home.mkdir(exist_ok=True)
            python, module = sys.executable, "benchmarks.workers.ours"
            if contestant.library != "lora":
                python, module = peers.interpreter(options.peers), "benchmarks.workers.peer"
            worker = Worker(python, module, job(case, contestant, options.cache, home), home)
            first_steps.setdefault(contestant, []).append(worker.first_step_seconds)
            if turn < options.starts - 1:
                worker.close()
                continue
            stack.enter_context(worker)
            sides[contestant] = Side(contestant, worker, home / "gradients.npz", first_steps[contestant])
    return list(sides.values())


def job(case: Case, contestant: Contestant, cache: Path, home: Path) -> Job:
    """Return what a worker of `contestant` is told."""
    return Job(
        model=str(model_folder(cache, case)),
        adapter=str(cache / case.name / ADAPTER),
        batches=str(cache / case.name / BATCHES),
        gradients=str(home / "gradients.npz"),
        task=case.task,
        dtype=contestant.dtype,
        device=case.device,
        library=contestant.library,
    )


def agree(sides: list[Side]) -> None:
    """Compare the first step of every other side with ours.

    Raises:
        Disagreement: one is too far away.
    """
    ours, others = sides[0], sides[1:]
    with np.load(ours.gradients) as expected:
        for side in others:
            narrow = "bfloat16" if "bfloat16" in (ours.contestant.dtype, side.contestant.dtype) else "float32"
            losses = (ours.worker.first["loss"], side.worker.first["loss"])
            with np.load(side.gradients) as found:
                side.agreement = compare(losses, dict(expected), dict(found), narrow)


def take_turns(case: Case, sides: list[Side], rounds: int) -> float | None:
    """Time `rounds` turns of every side. Returns the share of the processor that others used meanwhile."""
    for side in sides:
        side.worker.ask(do="round", batches=list(range(_WARM_UP)))
        side.gemm.append(side.worker.ask(do="gemm")["flops"])
    watch = Watch()
    for turn in range(1, rounds + 1):
        batches = list(range(turn * case.lengths.batches, (turn + 1) * case.lengths.batches))
        for side in sides:
            answer = side.worker.ask(do="round", batches=batches)
            side.seconds.append(answer["seconds"])
            watch.own += answer["processor_seconds"]
    foreign = watch.foreign_share()
    for side in sides:
        side.gemm.append(side.worker.ask(do="gemm")["flops"])
    return foreign


def lengths_of_a_turn(case: Case, seed: int) -> tuple[list[int], float]:
    """Return (tokens of each row of a turn, the share of a padded turn that is padding); all are alike."""
    turn: list[Batch] = draw(case.lengths, case.task, 2, 1, seed)
    return [len(row) for batch in turn for row in batch.rows], padding_share(turn)


def _record(case: Case, side: Side, ours: Side, foreign: float | None, options: argparse.Namespace) -> Record:
    lengths, padding = lengths_of_a_turn(case, options.seed)
    tokens, config = sum(lengths), models.config(case.model, case.task)
    peak = side.worker.ask(do="peak")  # before the split, whose instruments take memory themselves
    rate, gemm = tokens / median(side.seconds), median(side.gemm)
    parameters = models.multiplied_parameters(config, case.task)
    flops = 4 * parameters + models.attention_flops(config, lengths) / tokens  # a token
    record = {
        **_identity(case, side.contestant, MEASURED),
        "tokens": tokens,
        "padding_share": padding,
        "seconds": spread(side.seconds),
        "tokens_per_second": rate,
        "gemm_flops": gemm,
        "multiplied_parameters": parameters,
        "mfu": 4 * parameters * rate / gemm,
        "products_share": flops * rate / gemm,
        "first_step_seconds": spread(side.first_steps),
        "peak_bytes": peak["peak_bytes"],
        "device_bytes": peak["device_bytes"],
        "baseline_bytes": side.worker.first["baseline_bytes"],
        "loaded_bytes": side.worker.first["loaded_bytes"],
        "split_seconds": side.worker.ask(do="split", batch=0)["split"],
        "foreign_share": foreign,
        "disturbed": disturbed(foreign),
        **side.worker.facts,
    }
    if side is not ours:
        record["agreement"] = side.agreement._asdict() if side.agreement else None
        record["ours"] = {
            "times_faster": paired_ratio(side.seconds, ours.seconds),
            "times_sooner": median(side.first_steps) / median(ours.first_steps),
        }
    return record


def _unmeasured(case: Case, contestant: Contestant, reason: str) -> Record:
    return _identity(case, contestant, not_measured(reason))


def _identity(case: Case, contestant: Contestant, status: str) -> dict[str, Any]:
    return {
        "benchmark": "step",
        "case": case.name,
        "contestant": contestant.name,
        "device": case.device,
        "status": status,
        "model": case.model,
        "task": case.task,
        "targets": case.targets,
        "dtype": contestant.dtype,
        **circumstances(),
    }
