"""report.html: one page that shows a run, with everything inside it: no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora.assets import asset
from lora.io.atomic import write_text
from lora.train.classification_metrics import ClassificationMetrics
from lora.train.duration import duration
from lora.train.multi_label_metrics import MultiLabelMetrics
from lora.train.report_charts import Chart, Series, line_chart, smoothed
from lora.train.report_evaluation import Evaluation
from lora.train.report_record import Record

REPORT_FILE = "report.html"
MOST_CELLS = 24  # classes of a confusion matrix that a page has room for
SHOWN_TEXT = 600  # characters of a row


def write_report(record: Record, evaluation: Evaluation | None, missing: str | None) -> Path:
    """Write the page into the run's folder, whole or not at all, and return its path.

    Args:
        record: from `read_record`.
        evaluation: of the best state; None for a page of what the files say.
        missing: why there is no evaluation, for the reader.

    Raises:
        WriteError: the page could not be written; what was there is unharmed.
    """
    path = record.folder / REPORT_FILE
    write_text(path, report_page(record, evaluation, missing))
    return path


def report_page(record: Record, evaluation: Evaluation | None, missing: str | None) -> str:
    """Return the page as HTML; arguments as in `write_report`."""
    # here: only this command needs templates
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from lora import __version__

    environment = Environment(
        loader=FileSystemLoader(asset("report")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        record=record,
        facts=record.facts,
        settings=record.settings,
        evaluation=evaluation,
        missing=missing,
        cards=_cards(record, evaluation),
        charts=_charts(record),
        confusion=_confusion(evaluation),
        shown_text=SHOWN_TEXT,
        plain=_plain,
        version=__version__,
    )


def _cards(record: Record, evaluation: Evaluation | None) -> list[tuple[str, str, str]]:
    """Return (label, number, remark) of the first things to know."""
    cards: list[tuple[str, str, str]] = []
    best = record.best
    of = f"epoch {best['epoch']} of {record.settings['epochs']}" if best else ""
    if best:
        cards.append(("Best validation loss", f"{best['val_loss']:.4f}", f"{of}, in nats"))
    scores = evaluation.scores if evaluation else None
    if isinstance(scores, ClassificationMetrics):
        interval = scores.accuracy_interval
        cards += [
            ("Accuracy", f"{scores.accuracy:.1%}", f"95 %: {interval.low:.1%} to {interval.high:.1%}"),
            (
                "Macro F1",
                f"{scores.macro_f1:.3f}",
                f"always “{scores.majority_baseline.name}”: {scores.majority_baseline.macro_f1:.3f}",
            ),
            ("Calibration error", f"{scores.expected_calibration_error:.3f}", "0 is perfect"),
        ]
    elif isinstance(scores, MultiLabelMetrics):
        cards += [
            ("Micro F1", f"{scores.micro_f1:.3f}", "all labels together"),
            ("Macro F1", f"{scores.macro_f1:.3f}", "mean over the labels"),
            (
                "Subset accuracy",
                f"{scores.subset_accuracy:.1%}",
                f"never a label: {scores.none_baseline:.1%}",
            ),
        ]
    elif scores is not None:
        cards += [
            ("Perplexity", f"{scores.perplexity:.4g}", f"{scores.tokens:,} tokens predicted"),
            ("Token accuracy", f"{scores.token_accuracy:.1%}", "the likeliest token was right"),
        ]
    elif best:
        cards.append(("Validation accuracy", f"{best['val_accuracy']:.1%}", of))
    if record.epochs:
        seconds = sum(epoch["epoch_time_ms"] for epoch in record.epochs) / 1000
        speed = sum(step["tokens"] for step in record.steps) / seconds if seconds else 0
        cards.append(("Time", duration(seconds), f"{speed:,.0f} tokens/s, validation included"))
    return cards


def _charts(record: Record) -> dict[str, Chart]:
    charts: dict[str, Chart] = {}
    steps, epochs = record.steps, record.epochs
    if steps:
        charts |= _step_charts(steps, epochs)
    if epochs:
        xs = [epoch["epoch"] for epoch in epochs]
        charts["accuracy"] = line_chart(
            "Accuracy",
            "epoch",
            [
                Series(name, style, xs, [epoch[key] for epoch in epochs], dots=True)
                for name, style, key in (
                    ("training", "train", "train_accuracy"),
                    ("validation", "validation", "val_accuracy"),
                )
            ],
            width=450,
            height=260,
        )
    return charts


def _step_charts(steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> dict[str, Chart]:
    xs = [step["step"] for step in steps]
    losses = [step["loss"] for step in steps]
    last = {step["epoch"]: step["step"] for step in steps}
    done = [epoch for epoch in epochs if epoch["epoch"] in last]
    loss = [Series("each step", "raw", xs, losses), Series("training", "train", xs, smoothed(losses))]
    if done:
        ends, values = [last[epoch["epoch"]] for epoch in done], [epoch["val_loss"] for epoch in done]
        loss.append(Series("validation", "validation", ends, values, dots=True))
    charts = {"loss": line_chart("Loss", "step", loss, width=980, height=340)}
    for key, title in (
        ("learning_rate", "Learning rate"),
        ("gradient_norm", "Gradient norm"),
        ("tokens_per_second", "Tokens per second"),
    ):
        series = [Series(title.lower(), "train", xs, [step[key] for step in steps])]
        charts[key] = line_chart(title, "step", series, width=310, height=200, zero=True)
    return charts


def _confusion(evaluation: Evaluation | None) -> list[tuple[str, list[tuple[int, float]]]]:
    """Return (class, its cells as (rows, share of the class)), or nothing where there is no room for it."""
    scores = evaluation.scores if evaluation else None
    if not isinstance(scores, ClassificationMetrics) or len(scores.per_class) > MOST_CELLS:
        return []
    return [
        (score.name, [(count, count / max(score.support, 1)) for count in counts])
        for score, counts in zip(scores.per_class, scores.confusion_matrix, strict=True)
    ]


def _plain(value: Any) -> str:
    """Return a setting as a reader writes it."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
