"""Recipes: one YAML file that holds every setting of a run, its model, data and output included.

    model: Qwen/Qwen2.5-Coder-0.5B
    data: train.jsonl
    rank: 8
    targets: [q_proj, v_proj]

A recipe is a mapping from names to numbers, texts, true, false, null and lists of texts, in YAML 1.2's core
schema (https://yaml.org/spec/1.2.2/, 10.3.2): 2e-4 is a number, and `no` is a text. Whatever else YAML can
say (aliases, tags, nesting) is refused: it has no meaning here, and can blow up.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from lora.errors import FileFormatError, LoraError, MissingFileError, ValidationError
from lora.io.atomic import write_text
from lora.train.config import FinetuneConfig

RECIPE_FILE = "recipe.yaml"
MOST_BYTES = 65_536
SHOWN = 20  # problems that one message lists; the rest are counted
_DEEPEST = 2  # a list within the mapping
_PLACES: dict[str, Any] = {"model": str, "data": str, "output": str}
_TYPES: dict[str, Any] = _PLACES | get_type_hints(FinetuneConfig)
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a list of texts",
    NoneType: "null",
}
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}


class _Item(NamedTuple):
    line: int  # from 1
    name: str
    value: Any


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return what a recipe says by name, ready for `lora.finetune(**recipe)`; paths are as they stand.

    Raises:
        MissingFileError: there is no such file.
        FileFormatError: it is no YAML of the form above, or larger than 64 kB.
        ValidationError: names are unknown, or values of the wrong type or out of range; all are listed.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"{path}: expected a recipe, found {'a folder' if path.is_dir() else 'nothing'}"
        )
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise FileFormatError(f"{path}: a recipe has {MOST_BYTES:,} bytes at most")
    try:
        items = _items(content.decode())
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{path}: expected a recipe in YAML, found {_said(error)}") from error
    return _checked(path, items)


def write_recipe(path: Path, model: str, data: Path, output: Path, config: FinetuneConfig) -> None:
    """Write the recipe that, given another output, repeats a run bit for bit on the same machine.

    Args:
        path: of the recipe.
        model: an absolute path or a hub id.
        data: the file of rows.
        output: the run's folder.
        config: with task and method decided.

    Raises:
        WriteError: the file could not be written.
    """
    from lora import __version__

    values = {"model": model, "data": str(data.resolve()), "output": str(output.resolve()), **asdict(config)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    head = f"# lora {__version__}. `lora finetune --recipe {path.name} -o another-folder` repeats this run.\n"
    write_text(path, head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """PyYAML's parser without a way to nest deep or to refer back; plain scalars are left to `_scalar`."""

    depth = 0
    yaml_implicit_resolvers: ClassVar[Any] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias", problem_mark=self.peek_event().start_mark)
        if self.depth > _DEEPEST:
            raise yaml.MarkedYAMLError(
                problem="values inside values", problem_mark=self.peek_event().start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _said(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = str(error.problem).removeprefix("but found ")  # PyYAML's half of a sentence
        return f"{problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


def _items(text: str) -> list[_Item]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    finally:
        loader.dispose()
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise yaml.YAMLError("no mapping from the names of settings to their values")
    return [_Item(key.start_mark.line + 1, _name(key), _value(node)) for key, node in root.value]


def _name(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(problem="a name that is no text", problem_mark=node.start_mark)
    return node.value


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return tuple(_value(item) for item in node.value)
    if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str":
        return _scalar(node)
    raise yaml.MarkedYAMLError(problem="a value of another kind", problem_mark=node.start_mark)


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style is not None:  # quoted, or a block
        text.encode()  # an escape can spell half of a surrogate pair, which is no text
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def _checked(path: Path, items: list[_Item]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for item in items:
        problem = _problem(item, values)
        if problem is None:
            values[item.name] = _widened(item)
        else:
            problems.append(f"line {item.line}: {problem}")
    try:
        FinetuneConfig(**{name: value for name, value in values.items() if name not in _PLACES})
    except LoraError as error:
        problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ValidationError(f"{path}: " + "; ".join([*problems[:SHOWN], *more]))
    return values


def _problem(item: _Item, before: Mapping[str, Any]) -> str | None:
    if item.name not in _TYPES:
        near = difflib.get_close_matches(item.name[:100], _TYPES, n=1)
        return f"{reprlib.repr(item.name)} is unknown" + (f"; did you mean {near[0]}?" if near else "")
    if item.name in before:
        return f"{item.name} is given twice"
    allowed = _allowed(_TYPES[item.name])
    if not any(_fits(item.value, kind) for kind in allowed):
        expected = " or ".join(_WORDS[kind] for kind in allowed)
        return f"{item.name} = {reprlib.repr(item.value)}: expected {expected}"
    return None


def _allowed(hint: Any) -> tuple[type, ...]:
    """Return the plain types of a field; which of its words a Literal allows, `FinetuneConfig` checks."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(dict.fromkeys(kind for part in get_args(hint) for kind in _allowed(part)))
    if get_origin(hint) is Literal:
        return (str,)
    return (get_origin(hint) or hint,)


def _fits(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _widened(item: _Item) -> Any:
    # as a flag is read: 5 for a number is 5.0
    whole = type(item.value) is int and int not in _allowed(_TYPES[item.name])
    return float(item.value) if whole else item.value
