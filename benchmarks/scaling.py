"""`python -m benchmarks scaling`: what a step costs as one size grows and the others stay.

The exponent is that of what the axis adds: where sizes double, y = a + b·x^p grows by b·(2^p - 1)·x^p, so p
is the slope of log(growth) over log(x), whatever the constant a. The arithmetic (FLOP, and the bytes that the
plan counts) is fitted at the same sizes in the same way; a measurement may not grow faster.

A point that other work disturbed is measured again. Where it stays disturbed the seconds of its axis are not
judged: a first point that took too long makes all that follow look as if they grew faster than they do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.machine import Watch, circumstances, disturbed
from benchmarks.plots import plot_scaling
from benchmarks.processes import ROOT, clean_environment
from benchmarks.results import FOLDER, MEASURED, Record, write
from benchmarks.summary import fit_power
from benchmarks.table import figure, table
from lora.estimate.memory import memory
from lora.estimate.workload import Workload
from lora.io.lora_config import LoraConfig
from lora.spec import adaptable_modules, read_spec

# what a measured exponent may exceed the arithmetic's by: caches overflow as sizes grow; bytes do not vary
SLACK = {"seconds": 0.3, "bytes": 0.1}
ATTEMPTS = 3  # at a point that others disturb
PROCESSES = 2  # a point: some are a sixth slower as long as they run, which would pass for growth


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement: a Qwen2.5 of 64 wide heads, all linears adapted."""

    rows: int = 4
    tokens: int = 128  # of a row
    layers: int = 4
    rank: int = 16
    vocabulary: int = 4096

    def config(self) -> dict[str, Any]:
        """Return the model's config.json."""
        return models.config("qwen2.5-0.5b", "causal") | {
            "hidden_size": 256,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 704,
            "vocab_size": self.vocabulary,
            "eos_token_id": self.vocabulary - 1,
            "pad_token_id": self.vocabulary - 1,
        }

    def job(self) -> dict[str, Any]:
        """Return what the worker reads."""
        return {"config": self.config(), "rank": self.rank, "rows": self.rows, "tokens": self.tokens}


AXES: dict[str, list[Point]] = {
    # below 512 tokens the optimizer's arrays, not the activations, are the peak: nothing seems to be added
    "tokens": [Point(rows=rows) for rows in (4, 8, 16, 32)],
    "length": [Point(rows=1, tokens=tokens) for tokens in (512, 1024, 2048, 4096)],
    "layers": [Point(layers=layers) for layers in (2, 4, 8, 16)],
    "rank": [Point(rank=rank) for rank in (16, 32, 64, 128, 256)],
    # below 16,384 logits fit the caches, and growing out of those would pass for a larger exponent
    "vocabulary": [Point(vocabulary=vocabulary) for vocabulary in (16384, 32768, 65536, 131072)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder of the records (default: %(default)s)"
    )


def main(options: argparse.Namespace) -> int:
    """Measure every axis asked for. Returns 1 where something grew faster than the arithmetic."""
    records = [measure_axis(name, AXES[name]) for name in options.axes]
    print_axes(records)
    write(options.output / "scaling.jsonl", records)
    print(plot_scaling(options.output))
    return 1 if any(record["too_fast"] for record in records) else 0


def measure_axis(name: str, points: list[Point]) -> Record:
    """Return the record of one axis."""
    sizes = [size_on(name, point) for point in points]
    measured = [fastest([measure(point) for _ in range(PROCESSES)]) for point in points]
    arithmetic = {"seconds": list(map(flops, points)), "bytes": list(map(planned_bytes, points))}
    foreign = max((each["foreign_share"] or 0.0 for each in measured), default=0.0)
    found = {
        quantity: judge(sizes, [each[quantity] for each in measured], arithmetic[quantity], SLACK[quantity])
        for quantity in SLACK
    }
    return {
        "benchmark": "scaling",
        "case": name,
        "contestant": "lora-float32",
        "device": "cpu",
        "status": MEASURED,
        "sizes": sizes,
        **found,
        "too_fast": [quantity for quantity in judged(foreign) if found[quantity]["too_fast"]],
        "foreign_share": foreign,
        "disturbed": disturbed(foreign),
        **circumstances(),
    }


def judged(foreign_share: float) -> list[str]:
    """Return the quantities that a verdict is passed on; bytes do not depend on what others do."""
    return ["bytes"] if disturbed(foreign_share) else list(SLACK)


def measure(point: Point) -> dict[str, Any]:
    """Return {"seconds", "bytes", "foreign_share"} of one point, again while others disturb it."""
    found: list[dict[str, Any]] = []
    while len(found) < ATTEMPTS:
        found.append(measure_once(point))
        if not disturbed(found[-1]["foreign_share"]):
            return found[-1]
    return fastest(found)


def fastest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest of some measurements of one point, of the undisturbed ones where there are any."""
    return min(found, key=lambda each: (disturbed(each["foreign_share"]), each["seconds"]))


def measure_once(point: Point) -> dict[str, Any]:
    """Return what one process found, with the share of the processor that others had while it ran."""
    watch, before = Watch(), _seconds_of_children()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(point.job()))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.workers.one_size", str(path)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=clean_environment(os.environ),
        )
    watch.own = _seconds_of_children() - before
    return {**json.loads(done.stdout), "foreign_share": watch.foreign_share()}


def _seconds_of_children() -> float:
    """Return the processor's seconds of all processes that this one started and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def size_on(name: str, point: Point) -> int:
    """Return the size of `point` along an axis."""
    if name == "tokens":
        return point.rows * point.tokens
    return point.tokens if name == "length" else getattr(point, name)


def judge(
    sizes: Sequence[float], values: Sequence[float], arithmetic: Sequence[float], slack: float
) -> dict[str, Any]:
    """Return the exponents of measurement and arithmetic, and whether the first is too large."""
    measured, expected = growth_exponent(sizes, values), growth_exponent(sizes, arithmetic)
    allowed = (expected or 0.0) + slack
    return {
        "values": list(values),
        "exponent": measured,
        "arithmetic": expected,
        "allowed": allowed,
        "too_fast": measured is not None and measured > allowed,
    }


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the exponent of what a size adds to `values`, for sizes that double.

    None where it adds nothing that could be told from noise: fewer than two steps up.
    """
    steps = [(size, after - before) for size, before, after in zip(sizes, values, values[1:], strict=False)]
    up = [(size, step) for size, step in steps if step > 0]
    return fit_power(*zip(*up, strict=True)).exponent if len(up) > 1 else None


def flops(point: Point) -> float:
    """Return the FLOP of a step: 4 a parameter of a frozen matrix, 6 of an adapter, and causal attention."""
    config, tokens = point.config(), point.rows * point.tokens
    frozen = models.multiplied_parameters(config, "causal")
    adapted = point.rank * sum(o + i for o, i in adaptable_modules(read_spec(config)).values())
    # two products forward and five backward, half of each hidden by the mask; 2 FLOP a multiplication
    attention = 7 * point.layers * point.tokens * config["num_attention_heads"] * config["head_dim"]
    return tokens * (4 * frozen + 6 * adapted + attention)


def planned_bytes(point: Point) -> float:
    """Return what the plan counts beside the mapped base."""
    adapter = LoraConfig(r=point.rank, target_modules="all-linear")
    plan = memory(
        Workload(read_spec(point.config()), adapter=adapter),
        point.rows * point.tokens,
        longest=point.tokens,
        accumulates=False,
    )
    return plan.resident


def print_axes(records: list[Record]) -> None:
    """Print the exponents, and what grew too fast."""
    rows = [
        [record["case"], quantity, *map(figure, record[quantity]["values"][:: len(record["sizes"]) - 1])]
        + [figure(record[quantity][key]) for key in ("exponent", "arithmetic", "allowed")]
        for record in records
        for quantity in SLACK
    ]
    print(table(("axis", "of", "smallest", "largest", "exponent", "arithmetic", "allowed"), rows, texts=2))
    for record in records:
        for quantity in record["too_fast"]:
            found = record[quantity]
            print(
                f"{record['case']}: {quantity} grow with exponent {found['exponent']:.2f}, "
                f"allowed {found['allowed']:.2f}: TOO FAST"
            )
        if record["disturbed"]:
            print(
                f"{record['case']}: DISTURBED, seconds not judged: other work took "
                f"{100 * record['foreign_share']:.0f} % of the processor; measure again on a quiet machine"
            )
