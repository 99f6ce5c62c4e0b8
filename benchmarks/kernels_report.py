"""What `kernels` prints of an operation."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import MEASURED, Record
from benchmarks.table import figure, table, times

_HEADER = ("case", "contestant", "µs", "TB/s", "TFLOP/s", "share %", "of the", "ours is faster")


def print_operation(operation: str, records: Sequence[Record]) -> None:
    """Print the table of one operation and what must be known to read it."""
    print(f"\n{operation}")
    measured = [record for record in records if record["status"] == MEASURED]
    if measured:
        cases = list(dict.fromkeys(record["case"] for record in measured))
        by_case = sorted(measured, key=lambda record: cases.index(record["case"]))
        print(table(_HEADER, [_row(record) for record in by_case], texts=2))
        common = measured[0]
        print(
            f"copy {figure(common['copy_bytes_per_second'] / 1e12)} TB/s, "
            f"product {figure(common['gemm_flops'] / 1e12)} TFLOP/s, in the same run; L2 {common['l2']}"
        )
        if common["disturbed"]:
            print(
                f"DISTURBED: the rates moved by {100 * common['drift']:.0f} %, other work took "
                f"{100 * (common['foreign_share'] or 0):.0f} % of the processor; measure again"
            )
    reasons = {r["contestant"]: r["status"] for r in records if r["status"] != MEASURED}
    for contestant, status in reasons.items():
        print(f"{contestant}: {status}")


def _row(record: Record) -> list[str]:
    return [
        record["case"].partition(" ")[2],
        record["contestant"],
        figure(record["seconds"]["median"] * 1e6),
        figure(record["bytes_per_second"] / 1e12),
        figure(record["flops_per_second"] / 1e12),
        figure(100 * record["share"]),
        record["bound"],
        times(record.get("ours", {}).get("times_faster")),
    ]
