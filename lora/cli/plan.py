"""What `lora finetune --plan` says: what a run would train and take, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora.cli.output import print_facts, size
from lora.errors import UsageError

if TYPE_CHECKING:
    from lora.estimate import Plan
    from lora.train.config import FinetuneConfig

SETTINGS = (
    "method",
    "rank",
    "alpha",
    "targets",
    "device",
    "dtype",
    "batch_size",
    "max_seq_len",
    "grad_accum",
    "packing",
    "epochs",
    "learning_rate",
)


def make_plan(config: FinetuneConfig, model: str | None, data: str | None, vram: float | None) -> Plan:
    """Return the plan of the run that the same flags would start.

    Task and number of classes are those of the flags, else of `data`, else to classify into 5.

    Raises:
        LoraError: flags, files, rows or config.json are not as they must be, checked in this order.
    """
    from lora.estimate import plan
    from lora.io.apr_folder import open_folder
    from lora.io.checkpoint import read_config
    from lora.io.hub import require_path
    from lora.spec import check_named_size, read_spec, size_names, size_spec

    target = model if model is not None else config.model_size
    if target is None:
        sizes = ", ".join(dict.fromkeys(size for _, size in size_names().values()))
        raise UsageError(
            "Either model path or --model-size required: a plan expects MODEL (a folder, .apr or hub id) "
            f"or --model-size and nothing else, one of {sizes}; found neither"
        )
    if config.model_size is not None:
        size_spec(config.model_size)  # an unknown size is a wrong flag, and flags are checked first
    if model is not None:
        require_path(model)
    optional = {"head_bias": config.head_bias, "vram_gb": vram, **_of_the_rows(config, data)}
    given = {name: value for name, value in optional.items() if value is not None}
    if model is not None and config.model_size is not None:
        check_named_size(read_spec(read_config(open_folder(model))), config.model_size)
    return plan(target, **{name: getattr(config, name) for name in SETTINGS}, **given)


def _of_the_rows(config: FinetuneConfig, data: str | None) -> dict[str, Any]:
    if data is None:
        return {"task": config.task, "num_classes": config.num_classes}
    from lora.data.classify import ClassifyData
    from lora.train.examples import detect_task, read_data

    task = config.task or detect_task(Path(data))
    rows = read_data(Path(data), task, num_classes=config.num_classes)
    return {"task": task, "num_classes": len(rows.class_names) if isinstance(rows, ClassifyData) else None}


def print_plan(plan: Plan) -> None:
    """Print what would be trained, what it takes by part, and whether it fits."""
    facts = plan.as_dict()
    batch = facts["batch_size"] * facts["max_seq_len"]
    _print_trained(facts)
    percent, share = f"{facts['trainable_percent']:.3g} %", f"{facts['utilization_percent']:.1f} %"
    click.echo("\nRECOMMENDED CONFIGURATION")
    print_facts(
        {
            "Method": facts["recommended_method"],
            "Rank": facts["recommended_rank"],
            "Alpha": facts["recommended_alpha"],
            "Trainable params": f"{facts['trainable_params']:,} ({percent})",
            "Memory required": f"{facts['memory_gb']:.2f} GB ({share} of {facts['vram_gb']:g} GB)",
            "At once": f"{facts['micro_batch_tokens']:,} tokens of a batch of {batch:,}",
        }
    )
    click.echo("\nMEMORY BREAKDOWN")
    print_facts(_breakdown(facts["memory_breakdown"]))
    click.echo(f"\n{_verdict(facts)}")


def _print_trained(facts: dict[str, Any]) -> None:
    hidden, classes = facts["hidden_size"], facts["num_classes"]
    trained = {
        "Model": f"{hidden}h x {facts['num_layers']}L, {facts['model_params']:,} params",
        **(_adapters(facts) if facts["recommended_method"] == "lora" else {}),
        "Classifier": f"{hidden}->{classes} ({facts['head_params']:,} params)" if classes else None,
        "Total trainable": f"{facts['trainable_params']:,} params",
    }
    print_facts(trained)


def _adapters(facts: dict[str, Any]) -> dict[str, str]:
    stored, trained = facts["adapter_params_stored"], facts["adapter_params_trained"]
    rank, alpha, count = facts["lora_rank"], facts["recommended_alpha"], facts["lora_adapters"]
    return {
        "LoRA": f"rank={rank}, alpha={alpha:g}, {count} adapters",
        "Adapter params": f"{stored:,} stored, {trained:,} trained",
    }


def _breakdown(parts: dict[str, Any]) -> dict[str, str]:
    names = {
        "Base model": "model_bytes",
        "Adapter": "adapter_bytes",
        "Gradients": "gradient_bytes",
        "Optimizer states": "optimizer_bytes",
        "Activations": "activation_bytes",
        "Logits": "logits_bytes",
        "TOTAL": "total_bytes",
    }
    shown = {name: size(parts[key]) for name, key in names.items()}
    if parts["mapped_bytes"]:
        shown["Of it mapped"] = f"{size(parts['mapped_bytes'])}, pages of files that need not stay in memory"
    return shown | {"Savings": f"{parts['savings_percent']:.1f} % against full fine-tuning"}


def _verdict(facts: dict[str, Any]) -> str:
    memory = "VRAM" if facts["device"] == "cuda" else "memory"
    if facts["fits"]:
        return f"✓ Configuration fits in {facts['vram_gb']:g} GB {memory}"
    # one sequence runs at once by then, and the adapters are a trifle beside its activations
    advice = "lower --max-seq-len" if facts["recommended_method"] != "full" else "--method lora"
    return (
        f"⚠ Configuration requires {facts['memory_gb']:.2f} GB, and only 85 % of {facts['vram_gb']:g} GB "
        f"{memory} can be used; try {advice}"
    )
