"""`lora report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora.cli.options import output_options
from lora.cli.output import note, print_facts, print_json, size
from lora.errors import LoraError

if TYPE_CHECKING:
    from lora.train.report_evaluation import Evaluation
    from lora.train.report_record import Record


@click.command(short_help="Show a run as one HTML page that opens offline.")
@click.argument("folder", metavar="DIR")
@click.option(
    "--evaluate/--no-evaluate",
    default=True,
    help="Run the best state on the validation rows again, for its confusions, calibration and hardest rows.",
)
@output_options
def report(folder: str, evaluate: bool, as_json: bool) -> None:
    """Write DIR/report.html, a page that shows the run in DIR, finished or not.

    It holds the curves, scores, hardest rows, settings and hashes, and needs no network to be read. Where the
    data or the base are not there any more, it says so and shows the rest.
    """
    from lora.train.report import write_report
    from lora.train.report_record import read_record

    record = read_record(Path(folder))
    evaluation, missing = _evaluation(record) if evaluate else (None, "it was written with --no-evaluate.")
    path = write_report(record, evaluation, missing)
    if as_json:
        document = {"status": "reported", "report": str(path), "run": record.status}
        print_json({**document, "scores": evaluation.scores.as_dict() if evaluation else None})
    else:
        print_facts({"Run": record.status, "Written": f"{path} ({size(path.stat().st_size)})"})


def _evaluation(record: Record) -> tuple[Evaluation | None, str | None]:
    """Return the evaluation, or why there is none: a page without one is worth having."""
    from lora.train.report_evaluation import evaluate_run

    if record.state is None:
        return None, "the run has not saved a state yet."
    try:
        return evaluate_run(record.state, record.recipe, record.facts), None
    except LoraError as error:
        note(f"the best state is not evaluated: {error}")
        return None, str(error)
