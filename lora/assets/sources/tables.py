"""The tables beside this file, as records: commands.yaml, forms.yaml, words.yaml and documentation.yaml."""

import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

Item = TypeVar("Item")

_SLOT = re.compile(r"<([a-z]+)([=!]?)>")


class Command(NamedTuple):
    """An entry of commands.yaml: one of room "reads" has lines with an operand, any other risky lines."""

    name: str
    room: str  # "reads", or the class of the risky lines
    does: str
    kind: str = ""
    thing: str = ""
    lines: tuple[str, ...] = ()
    risky: tuple[str, ...] = ()
    tame: tuple[str, ...] = ()
    held_out: bool = False


class Form(NamedTuple):
    """An entry of forms.yaml."""

    templates: tuple[str, ...]  # operands: the bare spelling, then the quoted one
    held_out: bool


@cache
def commands() -> tuple[Command, ...]:
    """Return every command."""
    rooms = _read("commands")
    return tuple(
        Command(
            name,
            room,
            **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()},
        )
        for room, entries in rooms.items()
        for name, entry in entries.items()
    )


@cache
def forms(section: str) -> tuple[Form, ...]:
    """Return the entries of one section of forms.yaml."""
    rooms = _read("forms")[section]
    return tuple(
        Form(tuple(templates) if isinstance(templates, list) else (templates,), name == "held_out")
        for name, room in rooms.items()
        for templates in room
    )


def sentences(kind: str) -> list[str]:
    """Return the sentences of one kind of documentation.yaml, with <thing> for the noun."""
    return _read("documentation")[kind]


def pick(rng: random.Random, items: Sequence[Item]) -> Item:
    """Draw one item. Only `random()` is called: its stream alone is promised to outlive a Python version."""
    return items[int(rng.random() * len(items))]


def weighted(rng: random.Random, weights: dict[str, float]) -> str:
    """Draw a key with the probability that its weight, out of a sum of 1, gives it."""
    point = rng.random()
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return key


def fill(rng: random.Random, template: str) -> str:
    """Put words into slots: <dir> a literal or a quoted variable, <dir!> a literal, <dir=> one throughout."""
    words = _read("words")
    shared: dict[str, str] = {}

    def word(slot: re.Match[str]) -> str:
        name, mark = slot.groups()
        literal = pick(rng, words["values"][name])
        if mark == "=":
            return shared.setdefault(name, literal)
        before = template[: slot.start()]
        inside_quotes = before.count('"') % 2 or before.count("'") % 2
        if not mark and name in words["variable"] and not inside_quotes and rng.random() < 0.4:
            return pick(rng, (f'"${name}"', '"$target"', '"$1"'))
        return literal

    return _SLOT.sub(word, template)


def names(text: str) -> set[str]:
    """Return the files, folders and variables of words.yaml that a text names."""
    values = _read("words")["values"]
    known = {*values["file"], *values["dir"], *values["var"], *values["count"]}
    return known & set(re.findall(r"[\w.-]+", text))


@cache
def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
