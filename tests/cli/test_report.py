"""`lora report`: one page for every kind of run, that asks nobody for anything and shows what is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lora.train.finetune import finetune
from tests.cli.conftest import retrain
from tests.data.files import write_jsonl

QUICK = ("--epochs", "2", "--batch-size", "4", "--learning-rate", "0.02")
INSTRUCTIONS = [{"instruction": f"Say {i}.", "response": f"It is {i}."} for i in range(10)]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page's elements, attributes and text; elements that do not nest are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.style = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += f"{data} "  # cells stand apart on the page too


def page(folder: Path) -> Page:
    """Return the report in `folder`, once it is known to be whole and to load nothing."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    found = Page(html)
    assert found.tags.isdisjoint(
        {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}
    )
    names = {name for name, _ in found.attributes}
    assert names.isdisjoint({"src", "href", "srcset", "action", "data", "xlink:href", "background"})
    assert not [name for name in names if name.startswith("on")]
    values = " ".join(value for name, value in found.attributes if name in ("style", "content"))
    assert not re.search(r"url\(|@import|https?:|//", found.style + values)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    return found


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def classified(base, rows, tmp_path_factory) -> Path:
    return finetune(
        base,
        rows,
        output=tmp_path_factory.mktemp("reported") / "run",
        epochs=3,
        batch_size=4,
        learning_rate=0.02,
    ).output


def test_a_classifiers_page_holds_all_that_is_known(lora, classified) -> None:
    outcome = lora("report", classified, "--json")
    assert outcome.exit_code == 0
    document = outcome.document
    assert (document["status"], document["run"]) == ("reported", "complete")
    facts = json.loads((classified / "run.json").read_text())
    text = words(page(classified).text)
    for heading in (
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Epochs",
        "Classes",
        "Confusion",
        "Calibration",
    ):
        assert heading in text
    assert facts["data_hash"] in text
    assert facts["base_hash"] in text
    scores = document["scores"]
    for row in scores["per_class"]:
        assert (
            f"{row['name']} {row['f1']:.3f} {row['precision']:.3f} {row['recall']:.3f} {row['support']}"
            in text
        )
    cells = [count for counts in scores["confusion_matrix"] for count in counts]
    assert " ".join(map(str, cells[:2])) in text
    losses = [float(loss) for loss in re.findall(r"line \d+ loss (\d\.\d+)", text)]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == scores["rows"] == 4
    assert np.mean(losses) == pytest.approx(scores["log_loss"], abs=1e-3)
    # what is evaluated anew is what the run itself has seen
    best = min(json.loads(line)["val_loss"] for line in metrics(classified) if line[9:16] == '"epoch"')
    assert f"Best validation loss {best:.4f}" in text
    assert scores["log_loss"] == pytest.approx(best, rel=1e-5)


def metrics(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("kind", ["causal", "instruct"])
def test_language_models_have_a_page_too(lora, base, texts, tmp_path, kind: str) -> None:
    data = texts if kind == "causal" else write_jsonl(tmp_path / "rows.jsonl", INSTRUCTIONS)
    assert lora("finetune", base, "-d", data, "-o", tmp_path / "run", *QUICK).exit_code == 0
    outcome = lora("report", tmp_path / "run", "--json")
    assert outcome.exit_code == 0
    text = words(page(tmp_path / "run").text)
    assert f"Perplexity {outcome.document['scores']['perplexity']:.4g}" in text
    assert ("assistant: It is" if kind == "instruct" else "of a text") in text
    assert "Confusion" not in text


def test_a_run_that_was_interrupted_has_a_page(lora, base, rows, tmp_path, monkeypatch) -> None:
    def interrupt(self, event) -> None:
        if event.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("lora.cli.progress.ProgressLines.step_done", interrupt)
    assert lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *QUICK).exit_code == 130
    outcome = lora("report", tmp_path / "run", "--json")
    assert outcome.document["run"] == "unfinished"
    text = words(page(tmp_path / "run").text)
    assert "0 of 2 epochs, 3 steps" in text
    assert "Calibration" in text  # of the state that was saved


def test_a_run_killed_before_its_first_state_has_a_page(lora, classified, tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "recipe.yaml"):
        shutil.copy(classified / name, folder)
    (folder / "metrics.jsonl").write_text(metrics(classified)[0] + '\n{"kind": "st')
    assert lora("report", folder).exit_code == 0
    assert "has not saved a state" in words(page(folder).text)
    (folder / "metrics.jsonl").unlink()
    assert lora("report", folder).exit_code == 0
    page(folder)


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></title>{{ 7 * 7 }}"]


def test_what_the_data_says_is_text(lora, base, tmp_path) -> None:
    hostile = [{"input": f"{HOSTILE[i % 3]} {i}", "label": HOSTILE[(i // 3) % 3]} for i in range(24)]
    data = write_jsonl(tmp_path / "rows.jsonl", hostile)
    assert lora("finetune", base, "-d", data, "-o", tmp_path / "run", *QUICK).exit_code == 0
    assert lora("report", tmp_path / "run").exit_code == 0
    found = page(tmp_path / "run")
    for text in HOSTILE:
        assert found.text.count(text) > 3
        assert any(value == text for name, value in found.attributes if name == "title")


@pytest.mark.parametrize("gone", ["data", "base", "recipe", "changed", "weights"])
def test_what_is_not_there_any_more_is_said_and_the_rest_shown(
    lora, own_base, rows, tmp_path, gone: str
) -> None:
    data = Path(shutil.copy(rows, tmp_path / "rows.jsonl"))
    assert lora("finetune", own_base, "-d", data, "-o", tmp_path / "run", *QUICK).exit_code == 0
    if gone == "data":
        data.unlink()
    elif gone == "base":
        shutil.rmtree(own_base)
    elif gone == "recipe":
        (tmp_path / "run" / "recipe.yaml").unlink()
    elif gone == "weights":
        retrain(own_base)
    else:
        write_jsonl(data, [{"input": f"other {i}", "label": "good" if i % 2 else "bad"} for i in range(20)])
    outcome = lora("report", tmp_path / "run", "--json")
    assert (outcome.exit_code, outcome.document["scores"]) == (0, None)
    assert outcome.err.startswith("note: the best state is not evaluated:")
    assert outcome.err.count("\n") == 1
    text = words(page(tmp_path / "run").text)
    assert "Without the parts that need an evaluation" in text
    assert "Learning rate" in text
    assert "Hardest rows" not in text


def test_many_classes_are_a_list_of_confusions(lora, base, tmp_path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input": f"text {i}", "label": i % 30} for i in range(90)])
    assert lora("finetune", base, "-d", data, "-o", tmp_path / "run", *QUICK).exit_code == 0
    assert lora("report", tmp_path / "run").exit_code == 0
    assert "30 classes are too many for a matrix" in words(page(tmp_path / "run").text)


def test_no_evaluation_is_done_where_none_is_asked_for(lora, classified, tmp_path) -> None:
    folder = Path(shutil.copytree(classified, tmp_path / "run"))
    shutil.rmtree(folder / "best")
    outcome = lora("report", folder, "--no-evaluate")
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert "--no-evaluate" in page(folder).text


def test_what_is_no_run_is_one_line(lora, tmp_path) -> None:
    outcome = lora("report", tmp_path)
    assert (outcome.exit_code, outcome.err.count("\n")) == (3, 1)
    (tmp_path / "run.json").write_text("{")
    assert lora("report", tmp_path).exit_code == 4
    assert not (tmp_path / "report.html").exists()


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
WIDTH, HEIGHT = 600, 900
PAPER, TRAIN, VALIDATION = (0xF7, 0xF7, 0xF4), (0x35, 0x54, 0xD1), (0xD9, 0x57, 0x0A)  # of style.css, by day


@pytest.mark.skipif(
    BROWSER is None, reason="NOT LOOKED AT: no chromium or chrome is installed to draw the page"
)
def test_a_browser_draws_the_page(lora, classified, tmp_path) -> None:
    assert lora("report", classified).exit_code == 0
    picture = tmp_path / "page.png"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
    ]
    subprocess.run(
        [
            str(BROWSER),
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={picture}",
            (classified / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = read_png(picture.read_bytes())
    assert pixels.shape == (HEIGHT, WIDTH, 3)

    def count(color: tuple[int, int, int]) -> int:
        return int((np.abs(pixels.astype(int) - color).max(axis=2) <= 24).sum())

    assert (pixels[2, 2] == PAPER).all()
    assert count(PAPER) > 0.02 * WIDTH * HEIGHT
    assert count((255, 255, 255)) > 0.3 * WIDTH * HEIGHT  # the cards
    # the legend's own marks have 54 pixels
    assert count(TRAIN) > 80
    assert count(VALIDATION) > 80
    assert count((0x1D, 0x20, 0x25)) > 500  # the text


def read_png(raw: bytes) -> np.ndarray:
    """Return the pixels [H, W, 3] uint8 of a PNG of 8 bits a channel, without interlace."""
    data, at, channels, width, height = b"", 8, 0, 0, 0
    while at < len(raw):
        size, kind = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + 8]
        if kind == b"IHDR":
            width, height = (int.from_bytes(raw[at + 8 + i : at + 12 + i]) for i in (0, 4))
            channels = {2: 3, 6: 4}[raw[at + 17]]
        data += raw[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    lines = np.frombuffer(zlib.decompress(data), np.uint8).reshape(height, 1 + width * channels)
    above = np.zeros((width, channels), np.int64)
    picture = np.empty((height, width, channels), np.uint8)
    for y, line in enumerate(lines):
        above = unfiltered(int(line[0]), line[1:].reshape(width, channels).astype(np.int64), above)
        picture[y] = above
    return picture[:, :, :3]


def unfiltered(kind: int, line: np.ndarray, above: np.ndarray) -> np.ndarray:
    if kind == 1:
        return line.cumsum(axis=0) % 256
    if kind in (0, 2):
        return (line + (above if kind else 0)) % 256
    left, corner = np.zeros(line.shape[1], np.int64), np.zeros(line.shape[1], np.int64)
    for x in range(len(line)):
        if kind == 3:
            guess = (left + above[x]) // 2
        else:
            sides = np.stack([left, above[x], corner])
            nearest = np.abs(left + above[x] - corner - sides).argmin(axis=0)
            guess = np.take_along_axis(sides, nearest[None], axis=0)[0]
        line[x] = left = (line[x] + guess) % 256
        corner = above[x]
    return line
