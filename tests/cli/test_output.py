"""What is printed: JSON that every parser reads, names that stay names, sizes that a reader wants."""

from __future__ import annotations

import json

import pytest

from lora.cli.output import listed, one_line, print_facts, print_json, print_table, size


def test_a_number_that_is_not_finite_is_null(capsys) -> None:
    print_json({"a": [1.5, float("nan")], "b": {"c": (float("inf"), "é")}})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None], "b": {"c": [None, "é"]}}


def test_a_class_that_looks_like_markup_is_a_name(capsys) -> None:
    print_table(("Class", "F1"), [("[red]", "0.5"), ("a much longer name", "0.25")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["[red]", "0.5"]
    assert lines[2].rstrip().endswith("0.5")
    assert len(lines[2]) == len(lines[3])


def test_facts_are_aligned_and_unknown_ones_left_out(capsys) -> None:
    print_facts({"A": 1, "Longer": "x", "None": None})
    assert capsys.readouterr().out == "A:      1\nLonger: x\n"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (40456, "40.5 kB"),
        (988_097_824, "988 MB"),
        (2_104_000_000, "2.10 GB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


def test_a_long_list_is_cut_and_counted() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([*map(str, range(25))]).endswith("18, 19, and 5 more")


def test_a_text_stays_on_its_line() -> None:
    assert one_line("a\tb\nc\x1b[0m") == r"a\tb\nc\x1b[0m"
    assert one_line("x" * 70) == "x" * 57 + "..."
