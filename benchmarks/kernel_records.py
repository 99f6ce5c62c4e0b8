"""The records of `kernels`: who competes, who is refused a time, and what a time is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.agreement import Disagreement
from benchmarks.device_time import FLUSHED_BYTES
from benchmarks.machine import circumstances, disturbed
from benchmarks.registry import OPERATIONS, Work, bench
from benchmarks.results import MEASURED, Record, not_measured
from benchmarks.summary import median, spread

OURS = "lora"
PEERS = {
    "rmsnorm": ("torch", "liger"),
    "rope": ("torch", "liger"),
    "swiglu": ("torch", "liger"),
    "embedding": ("torch",),
    "softmax_xent": ("torch", "liger"),
    "attention": ("sdpa-flash", "sdpa-cudnn"),
    "cached_attention": ("sdpa",),
    "lowrank_linear": ("torch",),
    "adamw": ("torch",),
}
# largest ‖a - b‖ / ‖b‖ of an output: what the tests of `lora.cuda` allow
TOLERANCE = {"bfloat16": 6e-3, "float32": 1e-5}
# peers round in between where we do not: this shows that they compute the same thing at all
PEERS_TOLERANCE = 5e-2
_DRIFT = 0.05  # of a rate between the beginning and the end of an operation, before it counts as disturbed


class Job(NamedTuple):
    """One contestant on one shape."""

    operation: str
    shape: Mapping[str, int]  # by axis
    seed: int
    contestant: str
    expected: str  # .npz of the reference's outputs

    @property
    def sizes(self) -> Any:
        """The shape as its own bench file has it."""
        return type(bench(self.operation).SHAPES[0])(**self.shape)

    def case(self, call: str) -> str:
        """Return how records name one call of it."""
        return f"{self.operation} {' '.join(f'{axis}={size}' for axis, size in self.shape.items())} {call}"


def check(job: Job, apart: Mapping[str, float]) -> dict[str, float]:
    """Return `apart`, how far each output is from the reference.

    Raises:
        Disagreement: one is farther than allowed.
    """
    allowed = TOLERANCE[OPERATIONS[job.operation]] if job.contestant == OURS else PEERS_TOLERANCE
    far = {output: distance for output, distance in apart.items() if not distance <= allowed}
    if far:
        found = ", ".join(f"{output} {distance:.1e}" for output, distance in far.items())
        raise Disagreement(f"{job.case(job.contestant)}: {found} from the reference, allowed {allowed:.0e}")
    return dict(apart)


def unmeasured(job: Job, reason: str | None) -> list[Record]:
    """Return a record without figures for every call."""
    return [_identity(job, call, not_measured(str(reason))) for call in bench(job.operation).work(job.sizes)]


def timed(
    job: Job, call: str, seconds: Sequence[float], apart: Mapping[str, float], facts: Mapping[str, Any]
) -> Record:
    """Return the record of one call, which `finished` completes."""
    work: Work = bench(job.operation).work(job.sizes)[call]
    return {
        **_identity(job, call, MEASURED),
        "agreement": {output: apart[output] for output in apart if output.startswith(f"{call} ")},
        "seconds": spread(seconds),
        "l2": f"flushed by {FLUSHED_BYTES // 2**20} MiB or more before every run",
        **work._asdict(),
        "bytes_per_second": work.bytes / median(seconds),
        "flops_per_second": work.flops / median(seconds),
        **facts,
    }


def finished(
    records: Sequence[Record], rates: Sequence[Mapping[str, float]], foreign_share: float | None
) -> list[Record]:
    """Return the records of an operation with what its times are worth.

    Args:
        records: of all its shapes, calls and contestants.
        rates: {"copy": bytes/s, "gemm": FLOP/s} before and after.
        foreign_share: of the processor, that others had meanwhile.
    """
    copy, gemm = (median([rate[name] for rate in rates]) for name in ("copy", "gemm"))
    moved = max(max(r[name] for r in rates) / min(r[name] for r in rates) - 1 for name in ("copy", "gemm"))
    ours = {
        record["case"]: record["seconds"]["median"]
        for record in records
        if record["contestant"] == OURS and record["status"] == MEASURED
    }
    common = {
        "copy_bytes_per_second": copy,
        "gemm_flops": gemm,
        "drift": moved,
        "foreign_share": foreign_share,
        "disturbed": disturbed(foreign_share) or moved > _DRIFT,
    }
    return [
        {**record, **common, **_worth(record, copy, gemm), **_beside(record, ours)}
        if record["status"] == MEASURED
        else dict(record)
        for record in records
    ]


def _worth(record: Record, copy: float, gemm: float) -> dict[str, Any]:
    """Return what bounds a call, and the least time that its bytes or FLOP take by that, over its own."""
    least = {"copy": record["bytes"] / copy, "gemm": record["flops"] / gemm}
    bound = max(least, key=lambda name: least[name])
    return {"bound": bound, "share": least[bound] / record["seconds"]["median"]}


def _beside(record: Record, ours: Mapping[str, float]) -> dict[str, Any]:
    if record["contestant"] == OURS or record["case"] not in ours:
        return {}
    return {"ours": {"times_faster": record["seconds"]["median"] / ours[record["case"]]}}


def _identity(job: Job, call: str, status: str) -> Record:
    return {
        "benchmark": "kernels",
        "case": job.case(call),
        "contestant": job.contestant,
        "device": "cuda",
        "status": status,
        "operation": job.operation,
        "shape": dict(job.shape),
        "call": call,
        "dtype": OPERATIONS[job.operation],
        "seed": job.seed,
        **circumstances(),
    }
