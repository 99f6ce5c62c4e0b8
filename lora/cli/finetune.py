"""`lora finetune`: train an adapter, or say beforehand what that takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora.cli.adapters import Pair, adapters_option
from lora.cli.options import given, output_options
from lora.cli.output import note, print_facts, print_json, print_table
from lora.cli.recipe import recipe_option
from lora.errors import UsageError
from lora.train.config import FinetuneConfig

if TYPE_CHECKING:
    from lora.train.run import Run

DEFAULTS = FinetuneConfig()
OUTPUT = "checkpoints"
GO_ON = "the same command with --resume goes on"


def setting(flag: str, *short: str, help: str, default: str | None = None, **more: Any) -> Callable[..., Any]:
    """Return the option of a field of FinetuneConfig with its default; `default` words one that is None."""
    name = flag.partition("/")[0].removeprefix("--").replace("-", "_")
    return click.option(
        flag, *short, name, default=getattr(DEFAULTS, name), show_default=default, help=help, **more
    )


def _targets(ctx: click.Context, param: click.Parameter, value: str) -> str | tuple[str, ...]:
    # a regular expression may hold a comma too; a list of names holds nothing but names
    parts = tuple(part.strip() for part in value.split(","))
    return parts if len(parts) > 1 and all(re.fullmatch(r"[\w.]+", part) for part in parts) else value


@click.command(short_help="Train an adapter on your rows, or plan it with --plan.")
@click.argument("model", required=False)
@click.option(
    "--data",
    "-d",
    metavar="FILE",
    help='JSON Lines: {"input", "label"} or "labels", {"text"}, {"messages"} ...',
)
@click.option(
    "--output",
    "-o",
    metavar="PATH",
    default=OUTPUT,
    help="The run's folder; or NAME.apr for its best state, and its folder is NAME-run.",
)
@adapters_option
@recipe_option
@setting(
    "--task",
    metavar="[classify|causal|instruct]",
    default="what the first row's fields say",
    help="What to train.",
)
@setting(
    "--method",
    "-m",
    metavar="[auto|full|lora|head]",
    help="auto is lora; full trains every weight; head trains a classifier's head alone.",
)
@setting("--rank", "-r", type=int, help="Rank of the adapters.")
@setting("--alpha", type=float, default="2 x rank", help="The adapters' output is scaled by alpha / rank.")
@setting(
    "--targets", callback=_targets, help="qv, attention, mlp, all-linear; or names with commas; or a regex."
)
@setting("--epochs", type=int, help="Passes over the rows.")
@setting("--learning-rate", type=float, help="Peak of the schedule.")
@setting("--weight-decay", type=float, help="AdamW's decoupled decay.")
@setting("--batch-size", type=int, help="Rows in a batch.")
@setting("--max-seq-len", type=int, help="Tokens of a text; a longer one keeps its head.")
@setting("--grad-accum", type=int, help="Batches in an optimizer step.")
@setting(
    "--packing/--no-packing",
    help="Run rows together, without padding, up to the plan's tokens; or each alone. The same gradients.",
)
@setting("--val-split", type=float, help="Share of the rows that validate, at most 0.5.")
@setting("--patience", type=int, help="Epochs without a better validation loss before the run stops.")
@setting("--warmup", type=float, help="Share of the steps in which the learning rate rises.")
@setting("--clip", type=float, help="Largest norm of the gradients; 0 for no limit.")
@setting("--seed", type=int, help="Draws the adapters, the head, the split and the order of the rows.")
@setting("--num-classes", type=int, default="what the data holds; 5 in a plan without data", help="Classes.")
@setting(
    "--pooling",
    metavar="[mean|last]",
    default="mean, or a classification checkpoint's own",
    help="What the head sees.",
)
@setting(
    "--head-bias/--no-head-bias",
    default="with, or a classification checkpoint's own",
    help="The head's bias.",
)
@setting(
    "--class-weights",
    metavar="[auto|uniform|sqrt_inverse|inverse_freq]",
    help="auto weighs imbalanced classes.",
)
@setting(
    "--oversample/--no-oversample",
    help="Repeat training rows of rare classes until all classes are equal.",
)
@setting(
    "--label-smoothing",
    type=float,
    help="Share of each target spread over all classes; in training alone, so not in the validation loss.",
)
@setting("--save-steps", type=int, help="Steps between the states that --resume goes on from.")
@setting("--save-every", type=int, default="1 up to 5 epochs, else 5", help="Epochs between kept states.")
@setting(
    "--checkpoint-format",
    metavar="[safetensors|apr,safetensors]",
    help="Of each kept state; with apr, adapter.apr (model.apr) lies beside the safetensors.",
)
@setting("--keep", type=int, help="Newest kept states; the best and the last to go on from always stay.")
@setting(
    "--model-size", metavar="SIZE", help="A published size, for example 0.5B: of MODEL, or in its place."
)
@setting(
    "--layout",
    metavar="[text|multimodal]",
    default="the base's own",
    help="Whose names the adapter's tensors get: the text model's, or those inside a multimodal checkpoint.",
)
@setting("--device", metavar="[cpu|cuda]", help="Where to train; cuda needs --dtype bfloat16.")
@setting("--dtype", metavar="[float32|float64|bfloat16]", help="Precision of the arithmetic.")
@setting(
    "--tensorboard/--no-tensorboard",
    help="Write TensorBoard's event files too; needs lora-numpy[tensorboard].",
)
@click.option("--plan", is_flag=True, help="Say what the run would take. Nothing is loaded or written.")
@click.option("--vram", type=float, show_default="16.0", help="GB that the plan may use.")
@click.option("--resume", is_flag=True, help="Go on with the run in DIR, bit for bit; or begin it, aloud.")
@click.option("--allow-data-mismatch", is_flag=True, help="With --resume: though the rows have changed.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@output_options
def finetune(
    model: str | None,
    data: str | None,
    output: str,
    adapters: tuple[Pair, ...],
    plan: bool,
    vram: float | None,
    resume: bool,
    allow_data_mismatch: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train an adapter for MODEL, a checkpoint's folder, an .apr file or a hub id, on the rows of --data.

    With neither MODEL nor --data, `--task classify` trains the small base and the data that travel with lora.
    `lora finetune merge` and `lora finetune --merge` are `lora merge`.
    """
    config = FinetuneConfig(**settings)
    if adapters:
        _refuse_beside_adapters(
            {"--data": data is not None, "-o": output != OUTPUT or given("output"), "--plan": plan}
        )
    if plan:
        if resume or allow_data_mismatch:
            raise UsageError("--resume goes on with a run, and --plan starts none")
        _plan(config, model, data, vram, as_json=as_json)
        return
    if vram is not None:
        raise UsageError("--vram belongs to --plan")
    settings |= {"resume": resume, "allow_data_mismatch": allow_data_mismatch}
    if adapters:
        _train_each(_model(config, model), adapters, settings, quiet=quiet, as_json=as_json)
        return
    inputs = _inputs(config, model, data)
    if inputs.note:
        note(inputs.note)
    # the arithmetic and what it stands on load here, once the flags are known to be sound
    from lora.cli.progress import progress
    from lora.train.finetune import finetune as train

    with progress(quiet=quiet, after_interrupt=GO_ON) as callback:
        run = train(inputs.model, inputs.data, output=output, callbacks=[callback], **settings)
    if as_json:
        print_json(run.as_dict() | {"base_model": str(inputs.model), "data": str(inputs.data)})
    else:
        print_run(run)


def _refuse_beside_adapters(named: dict[str, bool]) -> None:
    found = [flag for flag, is_named in named.items() if is_named]
    if found:
        raise UsageError(
            f"--adapters DATA:DIR names each run's rows and folder; leave out {', '.join(found)}"
        )


def _train_each(
    model: str, adapters: tuple[Pair, ...], settings: dict[str, Any], *, quiet: bool, as_json: bool
) -> None:
    from lora.cli.progress import progress
    from lora.train.several import finetune_each

    with progress(quiet=quiet, after_interrupt=GO_ON) as callback:
        runs = finetune_each(model, adapters, callbacks=[callback], **settings)
    if as_json:
        documents = [run.as_dict() | {"data": data} for run, (data, _) in zip(runs, adapters, strict=True)]
        print_json({"status": "training_complete", "base_model": model, "runs": documents})
        return
    for run, (data, folder) in zip(runs, adapters, strict=True):
        click.echo(f"\n{data} in {folder}\n")
        print_run(run)


def _plan(
    config: FinetuneConfig, model: str | None, data: str | None, vram: float | None, *, as_json: bool
) -> None:
    from lora.cli.plan import make_plan, print_plan

    made = make_plan(config, model, data, vram)
    if as_json:
        print_json({"status": "planned", **made.as_dict()})
    else:
        print_plan(made)


@dataclass(frozen=True)
class Inputs:
    """What is trained on what, and what the user should be told about it."""

    model: str | Path
    data: str | Path
    note: str | None = None


def _inputs(config: FinetuneConfig, model: str | None, data: str | None) -> Inputs:
    if model is None and data is None and config.task == "classify" and config.model_size is None:
        return _embedded()
    if data is None:
        raise UsageError("nothing to train on: name a JSON Lines file with --data, or ask for a --plan")
    return Inputs(_model(config, model), data)


def _model(config: FinetuneConfig, model: str | None) -> str:
    if config.model_size is not None:
        from lora.spec import size_hub

        # a size that no contract knows is refused before anything is read
        hub_id = size_hub(config.model_size)
        model = hub_id if model is None else model
    if model is None:
        raise UsageError(
            "nothing to train: name a MODEL (a checkpoint's folder or a hub id), or a --model-size"
        )
    return model


def _embedded() -> Inputs:
    from lora.assets import asset

    said = "no MODEL and no --data: training the small base and the shell-safety data that travel with lora"
    return Inputs(asset("demo", "base"), asset("demo", "train.jsonl"), said)


def print_run(run: Run) -> None:
    """Print the table of epochs, the summary, and what to run next."""
    columns = ("Epoch", "Train Loss", "Val Loss", "Train Acc", "Val Acc", "LR", "Time (ms)")
    print_table(
        columns,
        [
            (
                f"{epoch.epoch}{'*' if epoch.epoch == run.best_epoch else ''}",
                f"{epoch.train_loss:.4f}",
                f"{epoch.val_loss:.4f}",
                f"{epoch.train_accuracy:.2%}",
                f"{epoch.val_accuracy:.2%}",
                f"{epoch.learning_rate:.2e}",
                f"{epoch.epoch_time_ms}",
            )
            for epoch in run.epochs
        ],
    )
    best = run.epochs[run.best_epoch - 1]
    print_facts(
        {
            "Total epochs": len(run.epochs),
            "Best epoch": f"{run.best_epoch} (validation loss {run.best_val_loss:.4f})",
            "Best validation accuracy": f"{best.val_accuracy:.2%}",
            "Early stopping": "yes" if run.stopped_early else "no",
            "Total time": f"{run.total_time_ms / 1000:.1f} s, {run.tokens_per_sec:,.0f} tokens/s",
            "Format": run.checkpoint_format,
            "Checkpoints": run.output,
            "Adapter" if run.method == "lora" else "Model": run.best,
            "APR file": run.apr,
        }
    )
    click.echo("\nNext:")
    for command in next_commands(run):
        click.echo(f"  {command}")


def next_commands(run: Run) -> list[str]:
    """Return the commands that a user is likely to want now."""
    best = shlex.quote(str(run.apr or run.best))
    commands = [f"lora eval {best} --data test.jsonl"]
    if run.task == "classify":
        commands.append(f"lora predict {best} 'a text'")
    commands.append(f"lora report {shlex.quote(str(run.output))}")
    if run.method == "lora":
        commands.append(f"lora merge --adapter {best} -o merged")
    return commands
