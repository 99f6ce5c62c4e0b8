"""`lora demo`: the whole of it in two minutes, with no model, no data and no network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora.cli.options import output_options
from lora.cli.output import one_line, print_facts, print_json, print_table
from lora.errors import ValidationError
from lora.train.config import FinetuneConfig

if TYPE_CHECKING:
    from lora.cli.merge import Merged
    from lora.cli.predict import Prediction
    from lora.train.callbacks import Callback
    from lora.train.classification_metrics import ClassificationMetrics
    from lora.train.run import Run

OUTPUT = "lora-demo"
LORA, HEAD, MERGED, SUMMARY = "lora", "head-only", "merged", "demo.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 3, "learning_rate": 1e-3, "targets": "all-linear"},
    # twice the epochs at twenty times the rate: trained to the end, so that the comparison is fair
    "head": {"epochs": 6, "learning_rate": 2e-2},
}
MAX_SEQ_LEN = FinetuneConfig().max_seq_len
LINES = (
    'rm -rf "$HOME"/*',
    "cp $src $dst",
    'mkdir -p "$out" && cp -- "$file" "$out"/',
)


@click.command(short_help="Fine-tune, evaluate, merge and classify with what travels with lora.")
@click.option("--output", "-o", metavar="DIR", default=OUTPUT, help="Where it is all written.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@output_options
def demo(output: str, quiet: bool, as_json: bool) -> None:
    """Fine-tune the small base that travels with lora to tell safe shell lines from unsafe ones.

    The result is compared, on constructions that training never shows, with always guessing the most frequent
    class and with training nothing but a head; then it is merged, and classifies three lines.
    """
    from lora.cli.progress import progress

    there = [name for name in (LORA, HEAD, MERGED, SUMMARY) if (Path(output) / name).exists()]
    if there:
        raise ValidationError(
            f"{output} holds an earlier demo ({', '.join(there)}); name another folder with -o, or remove it"
        )
    anew = f"a demo cannot go on; begin a new one in another folder with -o, or remove {output}"
    with progress(quiet=quiet, after_interrupt=anew) as callback:
        shown = run_demo(Path(output), callback)
    if as_json:
        print_json(shown.as_dict())
    else:
        print_demo(shown)


@dataclass(frozen=True)
class Demo:
    """All that the demo did."""

    run: Run
    head_run: Run
    scores: ClassificationMetrics
    head_scores: ClassificationMetrics
    merged: Merged
    predictions: list[Prediction]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "status": "demo_complete",
            "training": self.run.as_dict(),
            "head_only": self.head_run.as_dict(),
            "evaluation": self.scores.as_dict(),
            "head_only_evaluation": self.head_scores.as_dict(),
            "merge": self.merged.as_dict(),
            "predictions": [prediction.as_dict() for prediction in self.predictions],
        }


def run_demo(output: Path, callback: Callback) -> Demo:
    """Train an adapter and, for comparison, a head alone; score both; merge; classify three lines."""
    from lora.assets import asset
    from lora.cli.merge import merge_folders
    from lora.cli.predict import Texts, predict_texts
    from lora.io.atomic import write_text
    from lora.model.loading import load
    from lora.train.evaluate import evaluate_classifier, read_examples_for
    from lora.train.finetune import finetune

    base, data, test = (asset("demo", name) for name in ("base", "train.jsonl", "test.jsonl"))

    def trained(method: str, folder: str) -> tuple[Run, ClassificationMetrics]:
        run = finetune(
            base, data, "classify", output / folder, callbacks=[callback], method=method, **SETTINGS[method]
        )
        model = load(run.best)
        return run, evaluate_classifier(model, read_examples_for(model, test, MAX_SEQ_LEN))

    run, scores = trained("lora", LORA)
    head_run, head_scores = trained("head", HEAD)
    merged = merge_folders(None, run.best, output / MERGED)
    predictions, _ = predict_texts(load(merged.output), Texts(LINES, None), MAX_SEQ_LEN)
    shown = Demo(run, head_run, scores, head_scores, merged, predictions)
    write_text(output / SUMMARY, json.dumps(shown.as_dict(), indent=2) + "\n")
    return shown


def print_demo(demo: Demo) -> None:
    """Print the comparison, the three lines, and where everything is."""
    majority = demo.scores.majority_baseline
    compared = {
        f"always {majority.name}": majority,
        "head only": demo.head_scores,
        f"LoRA, rank {demo.merged.rank}": demo.scores,
    }
    print_table(
        (f"On {demo.scores.rows:,} test rows", "Accuracy", "Macro-F1"),
        [(name, f"{scores.accuracy:.4f}", f"{scores.macro_f1:.4f}") for name, scores in compared.items()],
    )
    print_table(
        ("Text", "Class", "Probability"),
        [(one_line(p.text), p.label, f"{p.probability:.4f}") for p in demo.predictions],
        texts=2,
    )
    print_facts(
        {
            "Adapter": demo.run.best,
            "Head only": demo.head_run.best,
            "Merged": f"{demo.merged.output} (max |logit difference| {demo.merged.max_logit_difference:.3g})",
            "Metrics": demo.run.output / "metrics.jsonl",
            "All figures": demo.run.output.parent / SUMMARY,
        }
    )
    click.echo(f"\nNext:\n  lora predict {demo.run.best} 'sudo rm -rf /tmp/*'")
