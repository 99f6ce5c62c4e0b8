"""`python -m benchmarks kernels`: every operation on a GPU, alone, beside PyTorch's, cuDNN's and Liger's.

Each shape is computed by the NumPy reference first; a contestant whose outputs are too far from it is not
timed. Then each call is timed by the device's own clock, and held against what the device can do: the rates
of a copy and of a matrix product that were measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.agreement import Disagreement
from benchmarks.kernel_records import OURS, PEERS, Job, check, finished, timed, unmeasured
from benchmarks.kernel_reference import expected
from benchmarks.kernels_report import print_operation
from benchmarks.machine import NO_GPU, Watch, cuda_device
from benchmarks.plots import plot_kernels
from benchmarks.processes import Conversation
from benchmarks.registry import OPERATIONS, bench
from benchmarks.results import FOLDER, NOTHING_MEASURED, Record, not_measured, write


@dataclass
class Sides:
    """The processes that contestants run in: ours, and PyTorch's and Liger's, which may be missing."""

    ours: Conversation
    peer: Conversation | None
    why_no_peer: str | None

    def __post_init__(self) -> None:
        self.facts = {process: process.answer() for process in self.processes()}

    def processes(self) -> list[Conversation]:
        """Return those that run."""
        return [process for process in (self.ours, self.peer) if process]

    def processor_seconds(self) -> float:
        """Return what they and this process have used of the processor so far."""
        return time.process_time() + sum(each.ask(do="used")["seconds"] for each in self.processes())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.add_argument(
        "--operations",
        nargs="+",
        choices=OPERATIONS,
        default=list(OPERATIONS),
        metavar="OP",
        help="default: all",
    )
    parser.add_argument(
        "--peers", type=Path, metavar="DIR", help="their environment, made by `benchmarks peers DIR --cuda`"
    )
    parser.add_argument(
        "--runs", type=int, default=50, help="times that each call is made (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrays")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder of the records (default: %(default)s)"
    )


def main(options: argparse.Namespace) -> int:
    """Measure every operation asked for. Returns 1 where a contestant was refused a time, 5 without a GPU."""
    if (reason := why_not()) is not None:
        print(f"kernels: {not_measured(reason)}")
        return NOTHING_MEASURED
    failed = False
    with ExitStack() as stack:
        sides = start(options.peers, stack)
        for operation in options.operations:
            records, refused = measure(operation, sides, options)
            for disagreement in refused:
                print(f"not timed: {disagreement}", file=sys.stderr)
            failed = failed or bool(refused)
            print_operation(operation, records)
            write(options.output / "kernels.jsonl", records)
    print(plot_kernels(options.output))
    return 1 if failed else 0


def why_not() -> str | None:
    """Return why nothing can be measured here, or None."""
    if cuda_device() is None:
        return NO_GPU
    return None if find_spec("cupy") else "CuPy is missing: pip install 'lora-numpy[cuda13]'"


def start(folder: Path | None, stack: ExitStack) -> Sides:
    """Start our process, and the peers' where `folder` is their environment."""
    home = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def process(python: str, side: str) -> Conversation:
        (home / side).mkdir()
        module = f"benchmarks.workers.kernels_{side}"
        return stack.enter_context(Conversation(python, module, [], home / side))

    why = peers.why_missing(folder, ("torch",))
    peer = None if folder is None or why else process(peers.interpreter(folder), "peer")
    return Sides(process(sys.executable, "ours"), peer, why)


def measure(
    operation: str, sides: Sides, options: argparse.Namespace
) -> tuple[list[Record], list[Disagreement]]:
    """Return a record for every shape, call and contestant of an operation, and who was refused a time."""
    records: list[Record] = []
    refused: list[Disagreement] = []
    watch, used = Watch(), sides.processor_seconds()
    rates = [sides.ours.ask(do="rates")]
    for shape in bench(operation).SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "expected.npz"
            np.savez(path, **expected(operation, shape._asdict(), options.seed))
            for contestant in (OURS, *PEERS.get(operation, ())):
                job = Job(operation, shape._asdict(), options.seed, contestant, str(path))
                try:
                    records += measure_one(job, sides, options.runs)
                except Disagreement as error:
                    refused.append(error)
    rates.append(sides.ours.ask(do="rates"))
    watch.own = sides.processor_seconds() - used
    return finished(records, rates, watch.foreign_share()), refused


def measure_one(job: Job, sides: Sides, runs: int) -> list[Record]:
    """Return the records of one contestant on one shape.

    Raises:
        Disagreement: what it computes is too far from the reference.
    """
    process = sides.ours if job.contestant == OURS else sides.peer
    if process is None:
        return unmeasured(job, sides.why_no_peer)
    answer = process.ask(do="agree", **job._asdict())
    if "refused" in answer:
        return unmeasured(job, answer["refused"])
    apart = check(job, answer["apart"])
    names, facts = bench(job.operation).work(job.sizes).keys(), sides.facts[process]

    def seconds(name: str) -> list[float]:
        return process.ask(do="time", call=name, runs=runs)["seconds"]

    return [timed(job, name, seconds(name), apart, facts) for name in names]
