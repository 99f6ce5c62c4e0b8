"""`lora eval`: score a model on rows that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora.cli.options import (
    base_option,
    device_option,
    dtype_option,
    given,
    output_options,
    text_length,
    trained_length_option,
)
from lora.cli.output import note, note_truncated, one_line, print_facts, print_json, print_table
from lora.errors import DataError, UsageError

if TYPE_CHECKING:
    from lora.data.rows import Row
    from lora.model.model import Model
    from lora.train.classification_metrics import ClassificationMetrics, ClassScore
    from lora.train.evaluate import CausalMetrics
    from lora.train.exact_match import ExactMatch
    from lora.train.multi_label_metrics import MultiLabelMetrics
    from lora.train.probability_scores import Interval

CLASS_WIDTH = 40  # of a class's name in a table


@click.command("eval", short_help="Score a model or an adapter on a data file.")
@click.argument("model", metavar="MODEL_OR_ADAPTER")
@click.option(
    "--data",
    "-d",
    required=True,
    metavar="FILE",
    help='JSON Lines: {"input", "label"} or "labels", {"text"}, {"messages"} ...',
)
@trained_length_option
@click.option("--batch-size", type=click.IntRange(1), default=32, help="Rows that are run together.")
@click.option("--exact-match", is_flag=True, help="Generate an answer to each instruction, and compare.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=64, help="Where --exact-match cuts an answer."
)
@click.option("--generate-card", is_flag=True, help="Write README.md, a model card, beside the adapter.")
@base_option
@device_option
@dtype_option
@output_options
def evaluate(
    model: str,
    data: str,
    max_seq_len: int | None,
    batch_size: int,
    exact_match: bool,
    max_new_tokens: int,
    generate_card: bool,
    base: str | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Score MODEL_OR_ADAPTER, a folder, an .apr file or a hub id, on every row of --data.

    A classifier's scores: accuracy, precision, recall and F1 of each class, the confusion matrix, the
    calibration error, log loss and Brier score, Cohen's kappa and MCC, bootstrap intervals, and what guessing
    would score; with several labels a row, F1 of each label, micro- and macro-F1, and rows that are right
    whole. A language model's: loss, perplexity and token accuracy of what training would learn; with
    --exact-match how often its greedy answer is the last turn of the row.
    """
    if not exact_match and given("max_new_tokens"):
        raise UsageError("--max-new-tokens belongs to --exact-match")
    from lora.data.rows import read_jsonl
    from lora.io.hub import require_path
    from lora.model.loading import load
    from lora.train.evaluate import evaluate as scores_of
    from lora.train.evaluate import examples_for, read_data_for
    from lora.train.exact_match import exact_match as answers_of
    from lora.train.examples import detect_task, task_of
    from lora.train.model_card import check_is_adapter, write_model_card

    require_path(model)
    if generate_card:
        check_is_adapter(Path(model))
    rows = read_jsonl(data)  # before a weight is read; which labels they may have, only the model says
    if exact_match and detect_task(Path(data)) != "instruct":
        raise UsageError(f"--exact-match needs instructions, or prompts and completions; {data} has none")
    loaded = load(model, device, dtype, base=base)
    _check_fields(rows[0], loaded, model)
    read = read_data_for(loaded, Path(data))
    length = text_length(loaded, max_seq_len)
    examples = examples_for(loaded, read, length)
    note_truncated(examples.truncated, length)
    scores = scores_of(loaded, examples, batch_size=batch_size)
    answers = None
    if exact_match:
        answers = answers_of(loaded, read, max_new_tokens=max_new_tokens, batch_size=batch_size)
    document = scores.as_dict() | ({} if answers is None else answers.as_dict())
    if generate_card:
        note(f"model card: {write_model_card(Path(model), loaded, document, Path(data))}")
    if as_json:
        about = {"status": "evaluated", "task": task_of(read), "model": model, "data": data}
        print_json({**about, "truncated_rows": examples.truncated, **document})
    else:
        print_scores(scores, answers)


def _check_fields(row: Row, loaded: Model, model: str) -> None:
    from lora.model.head import ClassifierHead
    from lora.train.examples import TASKS_BY_FIELD

    if isinstance(loaded.head, ClassifierHead):
        label = "labels" if loaded.head.is_multi_label else "label"
        kind, expected, fits = "classifier", f"input and {label}", row.fields.keys() >= {"input", label}
    else:
        kind, expected = (
            "language model",
            "text, messages, instruction and response, or prompt and completion",
        )
        fits = any(TASKS_BY_FIELD.get(name) in ("causal", "instruct") for name in row.fields)
    if not fits:
        found = ", ".join(row.fields) or "none"
        raise DataError(f"{model} is a {kind}: expected rows with {expected}; line {row.line} has {found}")


def print_scores(
    scores: ClassificationMetrics | MultiLabelMetrics | CausalMetrics, answers: ExactMatch | None
) -> None:
    """Print the scores of a model of any kind."""
    from lora.train.classification_metrics import ClassificationMetrics
    from lora.train.multi_label_metrics import MultiLabelMetrics

    if isinstance(scores, ClassificationMetrics):
        print_classification(scores)
    elif isinstance(scores, MultiLabelMetrics):
        print_multi_label(scores)
    else:
        print_causal(scores, answers)


def print_classification(scores: ClassificationMetrics) -> None:
    """Print a classifier's scores."""
    _print_classes("Class", scores.per_class)
    names = [one_line(s.name, CLASS_WIDTH) for s in scores.per_class]
    rows = zip(names, scores.confusion_matrix, strict=True)
    print_table(
        ("Label \\ predicted", *names),
        [(name, *map(str, counts)) for name, counts in rows],
        title="Confusion matrix",
    )
    majority, chance = scores.majority_baseline, scores.random_baseline
    print_facts(
        {
            "Rows": f"{scores.rows:,}",
            "Accuracy": f"{scores.accuracy:.4f} {_interval(scores.accuracy_interval)}",
            "Macro-F1": f"{scores.macro_f1:.4f} {_interval(scores.macro_f1_interval)}",
            "Top-2 accuracy": f"{scores.top2_accuracy:.4f}",
            "Cohen's kappa": f"{scores.cohen_kappa:.4f}",
            "MCC": f"{scores.mcc:.4f}",
            "Log loss": f"{scores.log_loss:.4f} nats",
            "Brier score": f"{scores.brier_score:.4f} (sum over classes, 0 to 2)",
            "Calibration error": f"{scores.expected_calibration_error:.4f} (10 bins)",
            "Majority baseline": (
                f"accuracy {majority.accuracy:.4f}, macro-F1 {majority.macro_f1:.4f} "
                f"(always {one_line(majority.name, CLASS_WIDTH)})"
            ),
            "Random baseline": (
                f"accuracy {chance.accuracy:.4f}, macro-F1 {chance.macro_f1:.4f} (by class frequency)"
            ),
            "Confused most": ", ".join(
                f"{one_line(c.label, CLASS_WIDTH)} as {one_line(c.predicted, CLASS_WIDTH)} ({c.count})"
                for c in scores.top_confusions
            )
            or None,
        }
    )


def print_multi_label(scores: MultiLabelMetrics) -> None:
    """Print the scores of a classifier of several labels."""
    _print_classes("Label", scores.per_class)
    print_facts(
        {
            "Rows": f"{scores.rows:,}",
            "Micro-F1": f"{scores.micro_f1:.4f}",
            "Macro-F1": f"{scores.macro_f1:.4f}",
            "Subset accuracy": f"{scores.subset_accuracy:.4f} (every label of a row is right)",
            "Hamming loss": f"{scores.hamming_loss:.4f} (share of wrong labels)",
            "Log loss": f"{scores.log_loss:.4f} nats per label",
            "No-label baseline": f"subset accuracy {scores.none_baseline:.4f} (no label, ever)",
        }
    )


def _print_classes(kind: str, scores: Sequence[ClassScore]) -> None:
    print_table(
        (kind, "Precision", "Recall", "F1", "Support"),
        [
            (
                one_line(s.name, CLASS_WIDTH),
                f"{s.precision:.4f}",
                f"{s.recall:.4f}",
                f"{s.f1:.4f}",
                f"{s.support}",
            )
            for s in scores
        ],
    )


def _interval(interval: Interval) -> str:
    return f"[{interval.low:.4f}, {interval.high:.4f}] (95 %, bootstrap)"


def print_causal(scores: CausalMetrics, answers: ExactMatch | None) -> None:
    """Print a language model's scores."""
    facts = {
        "Rows": f"{scores.rows:,}",
        "Tokens": f"{scores.tokens:,}",
        "Loss": f"{scores.loss:.4f} nats per token",
        "Perplexity": f"{scores.perplexity:.4g}",
        "Token accuracy": f"{scores.token_accuracy:.4f}",
    }
    if answers is not None:
        matches, rows = answers.exact_matches, answers.generated_rows
        facts["Exact match"] = f"{answers.exact_match:.4f} ({matches:,} of {rows:,} rows)"
        if answers.unended_rows:
            facts["Cut answers"] = (
                f"{answers.unended_rows:,} had not ended after {answers.max_new_tokens} tokens"
            )
    print_facts(facts)
