"""`lora merge`: add an adapter to its base's weights, and write the sum as a checkpoint."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from lora.cli.options import output_options
from lora.cli.output import listed, print_facts, print_json, size
from lora.errors import AdapterError, UsageError


@click.command(short_help="Merge an adapter into a checkpoint of its own.")
@click.argument("model", required=False)
@click.option("--adapter", required=True, metavar="PATH", help="The adapter: a folder or .apr file.")
@click.option(
    "--output", "-o", required=True, metavar="PATH", help="The merged checkpoint: a folder, or one .apr file."
)
@output_options
def merge(model: str | None, adapter: str, output: str, as_json: bool) -> None:
    """Merge --adapter into MODEL, or without one into the base that the adapter names.

    MODEL is a folder, a hub id or an .apr file.

    Weights are added in float32 and rounded once, to the dtype that they are stored in. The most that this
    changes in a probe batch's logits is shown.
    """
    merged = merge_folders(model, adapter, Path(output))
    if as_json:
        print_json({"status": "merged", **merged.as_dict()})
    else:
        print_merged(merged)


@dataclass(frozen=True)
class Merged:
    """A merge that was written."""

    base_model: str
    adapter: Path
    output: Path
    output_size: int  # bytes of the weights
    merged_layers: int  # modules whose weight took in a product of factors
    replaced_tensors: int  # tensors that the adapter brings whole
    total_layers: int  # modules that could carry an adapter
    rank: int
    alpha: float
    max_logit_difference: float  # merged against adapter, on a probe batch

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**vars(self), "adapter": str(self.adapter), "output": str(self.output)}


def merge_folders(model: str | None, adapter: str | Path, output: Path) -> Merged:
    """Merge an adapter into `model`, or into the base that it names, and write the sum to `output`.

    Each is a folder or an APR file; `model` and the adapter may be hub ids.

    Raises:
        UsageError: `output` is the base or the adapter itself, holds another adapter, or is or holds a file
            that would be overwritten.
        LoraError: a file is not as it must be.
    """
    from lora.io.hub import resolve
    from lora.io.peft import load_adapter
    from lora.model.loading import load
    from lora.spec import adaptable_modules

    folder = resolve(adapter)
    config, _, _ = load_adapter(folder)
    base = model or config.base_model_name_or_path
    if base is None:
        raise AdapterError(f"{folder} names no base: give it as `lora merge MODEL --adapter {folder} ...`")
    _check_output(output, {"the base": Path(resolve(base)), "the adapter": Path(folder)})
    loaded = load(Path(folder), base=base)
    report = loaded.merge_adapter()
    loaded.save(output)
    return Merged(
        base_model=loaded.base_name,
        adapter=Path(folder),
        output=output,
        output_size=sum(file.stat().st_size for file in _weight_files(output)),
        merged_layers=report.merged_modules,
        replaced_tensors=report.replaced_tensors,
        total_layers=len(adaptable_modules(loaded.spec)),
        rank=config.r,
        alpha=config.alpha,
        max_logit_difference=report.max_logit_difference,
    )


def _weight_files(output: Path) -> list[Path]:
    return [output] if output.is_file() else list(output.glob("model*.safetensors"))


def print_merged(merged: Merged) -> None:
    """Print what was merged, what it changed and where it is."""
    print_facts(
        {
            "Base": merged.base_model,
            "Adapter": f"{merged.adapter} (rank {merged.rank}, alpha {merged.alpha:g})",
            "Merged": f"{merged.merged_layers} of {merged.total_layers} modules",
            "Replaced": f"{merged.replaced_tensors} tensors" if merged.replaced_tensors else None,
            "Max |logit difference|": f"{merged.max_logit_difference:.3g} on a probe batch",
            "Written": f"{merged.output} ({size(merged.output_size)})",
        }
    )
    click.echo(f"\nNext:\n  lora eval {shlex.quote(str(merged.output))} --data test.jsonl")


def _check_output(output: Path, sources: dict[str, Path]) -> None:
    from lora.io.apr_folder import is_apr
    from lora.io.peft import CONFIG
    from lora.io.save_checkpoint import replaced

    for what, folder in sources.items():
        if output.resolve() == folder.resolve():
            raise UsageError(
                f"--output {output} is {what} itself, which a merge must not overwrite; name another output"
            )
    if (output / CONFIG).is_file():
        # beside an adapter, the merge would be taken for a part of it
        raise UsageError(f"--output {output} holds an adapter; name another output")
    if is_apr(output) and output.is_dir():
        raise UsageError(f"--output {output} is a folder with the name of an APR file; name another output")
    found = replaced(output)
    if found:
        there = f"holds {listed(found)}" if output.is_dir() else "exists already"
        raise UsageError(
            f"--output {output} {there}, which a merge does not overwrite; name another output, or remove it"
        )
