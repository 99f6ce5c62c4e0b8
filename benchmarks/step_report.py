"""What `step` prints of a case."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.results import MEASURED, Record
from benchmarks.table import figure, table, times

_PARTS = 6  # of a step, the longest

_HEADER = (
    "contestant",
    "tokens/s",
    "ours is faster",
    "GEMM GFLOP/s",
    "MFU %",
    "products %",
    "peak GB",
    "unloaded GB",
    "first step s",
    "ours is sooner",
)


def print_case(case: Case, records: list[Record]) -> None:
    """Print the table of one case and what must be known to read it."""
    lengths = case.lengths
    rows = f"{lengths.rows} x {lengths.tokens}"
    if lengths.sigma is not None:
        rows = (
            f"{lengths.batches} batches of {lengths.rows} rows, log-normal, median {lengths.tokens} tokens, "
            f"sigma {lengths.sigma}, cut at {lengths.longest}"
        )
    print(f"\n{case.name}: {case.model}, {case.task}, {rows}, adapters {case.targets}, {case.device}")
    measured = [record for record in records if record["status"] == MEASURED]
    if measured:
        print(table(_HEADER, [_row(record) for record in measured]))
    for record in measured:
        _print_notes(record)
    for record in records:
        if record["status"] != MEASURED:
            print(f"{record['contestant']}: {record['status']}")


def _row(record: Record) -> list[str]:
    ours = record.get("ours", {})
    return [
        record["contestant"],
        figure(record["tokens_per_second"]),
        times(ours.get("times_faster")),
        figure(record["gemm_flops"] / 1e9),
        figure(100 * record["mfu"]),
        figure(100 * record["products_share"]),
        figure(record["peak_bytes"] / 1e9),
        figure(record["baseline_bytes"] / 1e9),
        figure(record["first_step_seconds"]["median"]),
        times(ours.get("times_sooner")),
    ]


def _print_notes(record: Record) -> None:
    parts = sorted(record["split_seconds"].items(), key=lambda part: -part[1])[:_PARTS]
    print(f"{record['contestant']}: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts))
    if record["padding_share"]:
        print(f"{record['contestant']}: {100 * record['padding_share']:.0f} % of a padded batch is padding")
    if found := record.get("agreement"):
        print(
            f"{record['contestant']}: agrees with ours: loss to {found['loss']:.1e}, "
            f"gradients to {found['gradient']:.1e}"
        )
    if record["disturbed"]:
        print(
            f"{record['contestant']}: DISTURBED: other work took "
            f"{100 * record['foreign_share']:.0f} % of the processor; measure again on a quiet machine"
        )
