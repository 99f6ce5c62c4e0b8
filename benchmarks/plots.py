"""Pictures beside the records, where matplotlib (the extra `plots`) is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.results import MEASURED, Record, read
from benchmarks.table import figure as cell

_MISSING = "plot: not drawn, matplotlib is missing: pip install 'lora-numpy[plots]'"
_NOTHING = "plot: not drawn, nothing was measured"


def plot_step(folder: Path) -> str:
    """Draw tokens/s and peak memory of every measured case; return the line to print."""
    records = [record for record in read(folder / "step.jsonl") if record["status"] == MEASURED]
    if (reason := _why_not(records)) is not None:
        return reason
    figure, axes = _figure(1, 2)
    names = list(dict.fromkeys(record["contestant"] for record in records))
    cases = list(dict.fromkeys(record["case"] for record in records))
    for place, name in enumerate(names):
        mine = [record for record in records if record["contestant"] == name]
        rows = [cases.index(r["case"]) + 0.8 * (place - (len(names) - 1) / 2) / len(names) for r in mine]
        axes[0].barh(rows, [r["tokens_per_second"] for r in mine], 0.8 / len(names), label=name)
        axes[1].barh(rows, [r["peak_bytes"] / 1e9 for r in mine], 0.8 / len(names), label=name)
    for axis, title in zip(axes, ("tokens per second", "peak memory, GB"), strict=True):
        axis.set_yticks(range(len(cases)), cases)
        axis.invert_yaxis()
        axis.set_xlabel(title)
    axes[1].set_yticklabels([])
    axes[0].legend(frameon=False)
    figure.suptitle(_origin(records[-1]), fontsize="small")
    return _save(figure, folder / "step")


def plot_scaling(folder: Path) -> str:
    """Draw time and memory along each axis, both logarithmic; return the line to print."""
    records = [record for record in read(folder / "scaling.jsonl") if record["status"] == MEASURED]
    if (reason := _why_not(records)) is not None:
        return reason
    figure, axes = _figure(1, 2)
    for record in records:
        for axis, quantity in zip(axes, ("seconds", "bytes"), strict=True):
            found = record[quantity]
            label = f"{record['case']}: {cell(found['exponent'])} (allowed {cell(found['allowed'])})"
            axis.loglog(record["sizes"], found["values"], "o-", label=label)
    for axis, title in zip(axes, ("seconds a step", "bytes at the peak"), strict=True):
        axis.set_xlabel("size of the axis")
        axis.set_ylabel(title)
        axis.legend(frameon=False, fontsize="small")
    figure.suptitle(_origin(records[-1]), fontsize="small")
    return _save(figure, folder / "scaling")


def plot_kernels(folder: Path) -> str:
    """Draw every measured call's share of what bounds it; return the line to print."""
    records = [record for record in read(folder / "kernels.jsonl") if record["status"] == MEASURED]
    if (reason := _why_not(records)) is not None:
        return reason
    cases = list(dict.fromkeys(record["case"] for record in records))
    figure, axis = _figure(1, 1)
    figure.set_size_inches(9, 1.5 + 0.3 * len(cases))
    for name in dict.fromkeys(record["contestant"] for record in records):
        mine = [record for record in records if record["contestant"] == name]
        places = [cases.index(record["case"]) for record in mine]
        axis.plot([100 * record["share"] for record in mine], places, "o", label=name)
    axis.set_yticks(range(len(cases)), cases, fontsize="small")
    axis.invert_yaxis()
    axis.set_xlim(0, None)
    axis.set_xlabel("% of the copy rate or the product rate, whichever bounds the call")
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.01)
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6, fontsize="small")
    figure.suptitle(_origin(records[-1]), fontsize="small")
    return _save(figure, folder / "kernels")


def _why_not(records: list[Record]) -> str | None:
    if not records:
        return _NOTHING
    return None if find_spec("matplotlib") else _MISSING


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lora"  # the same records give the same file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _save(figure: Any, stem: Path) -> str:
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    return f"plot: {stem.with_suffix('.svg')}"


def _origin(record: Record) -> str:
    machine = record["machine"]
    return f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {record['date'][:10]}"
