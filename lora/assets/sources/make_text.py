"""Write the text that the base model learns from: `python -m lora.assets.sources.make_text FILE`.

Manual pages, lists, notes, and lines that are explained, as JSON lines {"text": ...}. It speaks of every
command and form, the held-out ones too, and says what follows from them; it names no class, and explains no
line that is a row of the demo's data.
"""

import json
import random
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora.assets.sources.make_data import drawn
from lora.assets.sources.shell_lines import ShellLines, Statement
from lora.assets.sources.tables import commands, pick, sentences, weighted

DOCUMENTS = 40_000
_SHARES = {"explained": 0.45, "notes": 0.4, "manual": 0.1, "list": 0.05}


@dataclass(frozen=True)
class Documents:
    """A stream of documents that explains no line whose text is taken."""

    rng: random.Random
    taken: Collection[str]

    def draw(self) -> str:
        """Draw one document."""
        draw = {
            "explained": self._explained,
            "manual": self._manual,
            "list": self._list,
            "notes": self._notes,
        }
        return draw[weighted(self.rng, _SHARES)]()

    def _explained(self) -> str:
        """A line, and in a comment below it what follows from it."""
        line = self._source.line()
        while line.text in self.taken:
            line = self._source.line()
        return self._commented(line.text, line.deciding)

    def _manual(self) -> str:
        """The page of one command: a line of each sort, and what follows from it."""
        command = pick(self.rng, commands())
        page = [f"{command.name}: {command.does}."]
        for statement in self._source.examples(command):
            page += [f"    {statement.text}", self._remark(statement, does=False)]
        return "\n".join(page)

    def _list(self) -> str:
        """A remark, and lines of several commands for which it holds."""
        same = [self._source.statement()]
        while len(same) < 4:
            other = self._source.statement()
            if other.kind == same[0].kind:
                same.append(other)
        return "\n".join(
            [self._remark(same[0], does=False), *(f"    {statement.text}" for statement in same)]
        )

    def _notes(self) -> str:
        """Some statements, each with a remark below it."""
        statements = [self._source.statement() for _ in range(pick(self.rng, (2, 3, 4)))]
        return "\n".join(self._commented(statement.text, statement) for statement in statements)

    def _commented(self, text: str, statement: Statement) -> str:
        return f"{text}\n# {self._remark(statement)}"

    @property
    def _source(self) -> ShellLines:
        return ShellLines(self.rng, "all")

    def _remark(self, statement: Statement, *, does: bool = True) -> str:
        """Say what a statement does and what follows from it, in the words of documentation.yaml."""
        sentence = pick(self.rng, sentences(statement.kind)).replace("<thing>", statement.thing)
        if does and statement.does and self.rng.random() < 0.7:
            sentence = f"{statement.does}; {sentence}"
        return f"{sentence[0].upper()}{sentence[1:]}."


def texts() -> Iterator[str]:
    """Draw the documents."""
    documents = Documents(random.Random(3), {line.text for lines in drawn().values() for line in lines})
    return (documents.draw() for _ in range(DOCUMENTS))


def write_text(path: Path) -> None:
    """Write the documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf-8")


if __name__ == "__main__":
    write_text(Path(sys.argv[1]))
