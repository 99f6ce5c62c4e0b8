"""`lora inspect`: what a folder or a file is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora.cli.learned import print_learned
from lora.cli.options import given, length_option, output_options
from lora.cli.output import LISTED, listed, one_line, print_facts, print_json
from lora.errors import DataError, MissingFileError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@click.command(short_help="Say what a checkpoint, an adapter or a data file holds.")
@click.argument("path", metavar="[data] PATH")
@click.argument("file", metavar="", required=False)
@click.option(
    "--task",
    type=click.Choice(["classify", "causal", "instruct"]),
    help="Read the rows of data as this task's.",
)
@click.option("--model", metavar="MODEL", help="Show rows of data as this model would learn them.")
@click.option("--rows", "-n", type=click.IntRange(1), default=3, help="How many rows --model shows.")
@length_option
@output_options
def inspect(
    path: str,
    file: str | None,
    task: str | None,
    model: str | None,
    rows: int,
    max_seq_len: int,
    as_json: bool,
) -> None:
    """Say what PATH is: a checkpoint, an adapter, a run, a .safetensors or .apr file, a recipe, or data.

    `lora inspect data FILE` reads FILE as rows of --task, or of the task that their fields name. With
    --model, rows of texts or instructions are shown as that model would learn them: what is learned stands
    between 【 and 】.
    """
    if file is not None and path != "data":
        raise UsageError(f"expected one PATH, or `data FILE`; found {path} {file}")
    if model is None and (given("rows") or given("max_seq_len")):
        raise UsageError("--rows and --max-seq-len belong to --model")
    if file is None and (model is not None or task is not None):
        raise UsageError(f"--model and --task belong to data: lora inspect data {path}")
    if file is not None and model is not None:
        print_learned(Path(file), task, model, rows, max_seq_len, as_json=as_json)
        return
    found = _describe(Path(path)) if file is None else _rows_of(Path(file), task)
    if as_json:
        print_json({"status": "inspected", "path": file or path, **found})
    else:
        print_facts({name.replace("_", " ").capitalize(): _shown(value) for name, value in found.items()})


def _describe(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or folder")
    if path.is_file():
        return _FILES.get(path.suffix.lower(), _other_file)(path)
    from lora.io.peft import CONFIG

    if (path / CONFIG).is_file():
        return _adapter(path)
    return _run(path) if (path / "run.json").is_file() else _checkpoint(path)


def _checkpoint(folder: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from lora.io.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    sizes = {name: value for name, value in asdict(checkpoint.spec).items() if value not in (0, None)}
    layers = Counter(sizes.pop("layer_types"))
    return {
        "kind": "checkpoint",
        "layout": checkpoint.layout,
        **_contents(checkpoint.tensors),
        "tied_embeddings": sizes.pop("tie_word_embeddings"),
        **sizes,
        "layers": dict(layers),
        "labels": checkpoint.config.get("id2label"),
        "files": sorted(file.name for file in folder.iterdir() if file.is_file()),
    }


def _adapter(folder: Path) -> dict[str, Any]:
    from lora.io.peft import load_adapter

    config, tensors, metadata = load_adapter(folder)
    return {
        "kind": "adapter",
        "base": config.base_model_name_or_path,
        "task_type": config.task_type,
        "rank": config.r,
        "alpha": config.alpha,
        "target_modules": config.target_modules,
        "modules_to_save": list(config.saved_modules) or None,
        **_contents(tensors),
        **metadata,
    }


def _run(folder: Path) -> dict[str, Any]:
    from lora.io.checkpoint import read_json_object

    facts = read_json_object(folder / "run.json")
    facts.pop("operations", None)  # a table, which `lora doctor` shows better
    states = sorted(part.name for part in folder.iterdir() if part.is_dir())
    return {"kind": "run", "states": states, **facts}


def _weights_file(path: Path) -> dict[str, Any]:
    from lora.io.safetensors_file import read_tensors

    tensors = read_tensors(path)
    return {"kind": "weights", **_contents(tensors), "names": sorted(tensors)}


def _apr_file(path: Path) -> dict[str, Any]:
    from lora.io.apr import read_apr

    metadata, tensors = read_apr(path)
    short = {key: value for key, value in metadata.items() if isinstance(value, str | int | float)}
    return {
        "kind": "APR v2",
        **_contents(tensors),
        "names": sorted(tensors),
        "metadata": {
            key: one_line(value) if isinstance(value, str) else value for key, value in short.items()
        },
        "other_metadata": sorted(metadata.keys() - short.keys()),
    }


def _recipe_file(path: Path) -> dict[str, Any]:
    from lora.train.recipe import read_recipe

    return {"kind": "recipe", **read_recipe(path)}


def _other_file(path: Path) -> dict[str, Any]:
    from lora.data.rows import scan_jsonl

    rows, _ = scan_jsonl(path)
    if not rows:
        raise DataError(
            f"{path}: expected rows of data (JSON Lines), weights (.safetensors, .apr), a recipe (.yaml), or "
            "the folder of a checkpoint, an adapter or a run; found a file without a row"
        )
    return _data_file(path)


def _contents(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": sum(array.size for array in tensors.values()),
        "dtypes": dict(Counter(str(array.dtype) for array in tensors.values())),
    }


def _rows_of(path: Path, task: str | None) -> dict[str, Any]:
    """Describe a data file of which every row has been read as its task's."""
    from lora.train.examples import detect_task, read_data

    task = task or detect_task(path)
    read_data(path, task)
    return {**_data_file(path), "task": task}


def _data_file(path: Path) -> dict[str, Any]:
    from lora.data.rows import read_jsonl

    rows = [row.fields for row in read_jsonl(path)]
    labels = [label for row in rows for label in _labels(row) if isinstance(label, str | int)]
    texts = [value for row in rows for key in ("input", "text") if isinstance(value := row.get(key), str)]
    return {
        "kind": "data",
        "rows": len(rows),
        "fields": _most_common(name for row in rows for name in row),
        "classes": _most_common(map(str, labels)) if labels else None,
        "characters": _spread([len(text) for text in texts]) if texts else None,
    }


def _labels(row: Mapping[str, Any]) -> list[Any]:
    """Return the label of a row, or its labels."""
    several = row.get("labels")
    return several if isinstance(several, list) else [row.get("label")]


def _most_common(values: Iterable[str]) -> dict[str, int]:
    counts = Counter(values)
    shown = dict(counts.most_common(LISTED))
    rest = sum(counts.values()) - sum(shown.values())
    return shown | ({f"{len(counts) - LISTED} more": rest} if rest else {})


def _spread(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {"shortest": ordered[0], "median": ordered[len(ordered) // 2], "longest": ordered[-1]}


def _shown(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        parts = [_shown(part) if isinstance(part, dict) else part for part in value]
        return listed(parts, ", " if parts == list(value) else "; ") or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else None if value is None else str(value)


_FILES = {
    ".safetensors": _weights_file,
    ".apr": _apr_file,
    ".yaml": _recipe_file,
    ".yml": _recipe_file,
}
