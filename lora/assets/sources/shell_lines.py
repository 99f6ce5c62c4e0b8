"""Shell lines of five classes.

A line is a statement that decides its class, perhaps a harmless one beside it, and a construction around it.
The class follows from how the line was made; no line holds two hazards. What the tables call `held_out` never
reaches a line drawn from the pool "shown".
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from lora.assets.sources.tables import Command, Form, commands, fill, forms, names, pick, weighted

LABELS = (
    "safe",
    "needs-quoting",
    "non-deterministic",
    "non-idempotent",
    "unsafe",
)  # in the order of their indices
SHARES = {
    "safe": 0.32,
    "needs-quoting": 0.17,
    "non-deterministic": 0.17,
    "non-idempotent": 0.17,
    "unsafe": 0.17,
}

Pool = Literal["shown", "held_out", "all"]
Entry = TypeVar("Entry", Command, Form)

_SAFE_SHARES = {"read": 0.3, "tame": 0.35, "mention": 0.2, "unsplit": 0.15}


class Statement(NamedTuple):
    """One command, or a compound that stands for one, and what a manual would say about it."""

    text: str
    label: str
    kind: str  # a key of documentation.yaml
    held_out: bool  # holds a command or a form that training never shows
    does: str = ""  # what the command does, as "prints a file"
    thing: str = ""  # the noun in the sentences of `kind`

    @property
    def ends_its_line(self) -> bool:
        """Whether it is a comment or a here-document, so that nothing may follow on its last line."""
        return self.text.startswith("#") or " # " in self.text or "<<'" in self.text


class Line(NamedTuple):
    """One row of the data: a line or a few lines of shell."""

    text: str
    deciding: Statement
    held_out: bool  # its deciding statement or its construction is held out

    @property
    def label(self) -> str:
        """The name of its class."""
        return self.deciding.label


@dataclass(frozen=True)
class ShellLines:
    """A stream of lines; from pool "held_out", each with a held-out statement or construction."""

    rng: random.Random
    pool: Pool

    def line(self) -> Line:
        """Draw a line, its class by SHARES."""
        label = weighted(self.rng, SHARES)
        while True:
            line = self._line(label)
            if line.held_out or self.pool != "held_out":
                return line

    def statement(self) -> Statement:
        """Draw a deciding statement, its class by SHARES."""
        return self._deciding(weighted(self.rng, SHARES))

    def examples(self, command: Command) -> list[Statement]:
        """Draw one statement of each sort that a command has: quoted and bare, or risky and tame."""
        if command.room == "reads":
            return [self._quoted(command), self._bare(command)]
        return [self._risky(command), *([self._tame(command)] if command.tame else [])]

    def _deciding(self, label: str) -> Statement:
        if label == "safe":
            return self._safe(weighted(self.rng, _SAFE_SHARES))
        if label == "needs-quoting":
            splitting = self.rng.random() < 0.25
            return (
                self._of_form("splitting", label, "split")
                if splitting
                else self._bare(self._command("reads"))
            )
        return self._risky(self._command(label))

    def _safe(self, sort: str) -> Statement:
        if sort == "read":
            return self._quoted(self._command("reads"))
        if sort == "tame":
            return self._tame(self._choose([command for command in commands() if command.tame]))
        if sort == "mention":
            return self._mention()
        return self._of_form("unsplit", "safe", "unsplit")

    def _quoted(self, command: Command) -> Statement:
        """Draw a reading command whose operand is a file name or stands in double quotes."""
        operand = self._choose(forms("operands"))
        spelling, kind = operand.templates[1], "kept"
        if self.rng.random() < 0.25:
            operand, spelling, kind = Form((), False), "<file>", "reads"
        text = fill(self.rng, pick(self.rng, command.lines).replace("<ARG>", spelling))
        return Statement(text, "safe", kind, command.held_out or operand.held_out, command.does)

    def _bare(self, command: Command) -> Statement:
        """Draw a reading command with an operand that the shell splits."""
        operand = self._choose(forms("operands"))
        text = fill(self.rng, pick(self.rng, command.lines).replace("<ARG>", operand.templates[0]))
        return Statement(text, "needs-quoting", "split", command.held_out or operand.held_out, command.does)

    def _risky(self, command: Command) -> Statement:
        text = fill(self.rng, pick(self.rng, command.risky))
        return Statement(text, command.room, command.kind, command.held_out, command.does, command.thing)

    def _tame(self, command: Command) -> Statement:
        return Statement(fill(self.rng, pick(self.rng, command.tame)), "safe", "tame", command.held_out)

    def _of_form(self, section: str, label: str, kind: str) -> Statement:
        form = self._choose(forms(section))
        return Statement(fill(self.rng, pick(self.rng, form.templates)), label, kind, form.held_out)

    def _mention(self) -> Statement:
        """Draw a statement that only names another, as a literal text or in a comment."""
        form = self._choose(forms("mentions"))
        while True:
            named = self._deciding(pick(self.rng, LABELS[1:]))
            # within single quotes a single quote would end them, and a comment ends with its line
            if not {"'", "\n"} & set(named.text):
                break
        text = fill(self.rng, pick(self.rng, form.templates)).replace("<NAMED>", named.text)
        return Statement(text, "safe", "mention", form.held_out or named.held_out)

    def _line(self, label: str) -> Line:
        deciding = self._deciding(label)
        # a comment is no body for a construction: a filler follows it
        count = 1 if deciding.ends_its_line else pick(self.rng, (0, 0, 1))
        texts = [deciding.text, *(self._filler(deciding) for _ in range(count))]
        if not deciding.ends_its_line and self.rng.random() < 0.5:
            texts.reverse()
        form = self._choose(_constructions(deciding.ends_its_line))
        text = self._construct(form, texts, deciding.ends_its_line)
        return Line(text, deciding, deciding.held_out or form.held_out)

    def _filler(self, deciding: Statement) -> str:
        """Draw a harmless statement that shares no file, folder or variable with the deciding one.

        `rm -f list.txt` would take the sting out of `echo a >> list.txt`, and `name=a` out of `cat $name`.
        """
        while True:
            filler = fill(self.rng, pick(self.rng, pick(self.rng, forms("fillers")).templates))
            if not names(filler) & names(deciding.text):
                return filler

    def _construct(self, form: Form, texts: Sequence[str], separate_lines: bool) -> str:
        if separate_lines:
            separators = ["\n"]
        elif any("||" in text for text in texts):
            # && and || bind alike, so && before a guard would become a part of its condition
            separators = ["; ", "\n"]
        else:
            separators = ["; ", " && ", "\n"]
        body = pick(self.rng, separators).join(texts)
        lines = "\n".join(f"    {text}" for text in texts)
        templates = [each for each in form.templates if not separate_lines or _fits_lines(each)]
        template = pick(self.rng, templates)
        if "&& <BODY>" in template and "||" in body:
            body = f"{{ {body}; }}"
        return fill(self.rng, template).replace("<BODY>", body).replace("<LINES>", lines)

    def _command(self, room: str) -> Command:
        return self._choose([command for command in commands() if command.room == room])

    def _choose(self, entries: Sequence[Entry]) -> Entry:
        """Draw an entry that the pool allows; "held_out" takes a held-out one three times in five."""
        if self.pool != "all":
            held_out = self.pool == "held_out" and self.rng.random() < 0.6
            entries = [entry for entry in entries if entry.held_out == held_out]
        return pick(self.rng, entries)


def _constructions(separate_lines: bool) -> list[Form]:
    return [
        form
        for form in forms("constructions")
        if not separate_lines or any(_fits_lines(template) for template in form.templates)
    ]


def _fits_lines(template: str) -> bool:
    """Whether a construction puts nothing behind the last statement on its line."""
    return "<LINES>" in template or template.endswith("<BODY>")
