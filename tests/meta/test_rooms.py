"""What the rooms of the library owe each other: names, signatures, and what they may import."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lora.ops
from lora.dispatch import REFERENCE, implementations

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("lora", "tests", "contracts", "kernels", "benchmarks")
STEMS = sorted(path.stem for path in (ROOT / "lora" / "ops").glob("[!_]*.py"))
NAMELESS = re.compile(r"(^|_)(utils?|helpers?|managers?|handlers?|common|misc|stuff|tools)$")
FRAMEWORKS = {"torch", "transformers", "peft", "jax", "tensorflow", "triton"}
PUBLIC = {"forward", "backward", "Saved", "Grads"}
CALLED = ("angles", "forward", "backward", "update")  # of an operation, by the rooms above it


def python_files(*rooms: str) -> list[Path]:
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    # what makes expected values is run by hand, with the packages that we are compared with
    return [path for path in files if "golden" not in path.parts and not path.stem.startswith("make_")]


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("stem", STEMS)
def test_an_operation_is_one_stem_in_every_room(stem: str) -> None:
    assert (ROOT / "contracts" / "ops" / f"{stem}.yaml").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{stem}.py").is_file()


def test_no_contract_or_test_of_an_operation_that_is_not_there() -> None:
    contracts = {path.stem for path in (ROOT / "contracts" / "ops").glob("*.yaml")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    assert contracts == tests == set(STEMS)


def test_every_operation_can_be_dispatched() -> None:
    assert set(REFERENCE._fields) == set(STEMS)
    assert implementations("cpu")._fields == REFERENCE._fields


@pytest.mark.parametrize("stem", [stem for stem in STEMS if hasattr(getattr(REFERENCE, stem), "backward")])
def test_an_operation_shows_forward_backward_and_their_records(stem: str) -> None:
    assert vars(getattr(REFERENCE, stem)).keys() >= PUBLIC


def differing_signatures(reference: Any, other: Any) -> list[str]:
    """Return what model code calls of `reference`, and `other` lacks or takes other arguments for."""
    functions = [name for name in CALLED if hasattr(reference, name)]
    return [
        name
        for name in functions
        if not hasattr(other, name)
        or _parameters(getattr(other, name)) != _parameters(getattr(reference, name))
    ]


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("stem", STEMS)
def test_implementations_take_the_arguments_of_the_reference(stem: str) -> None:
    assert differing_signatures(getattr(REFERENCE, stem), getattr(implementations("cpu"), stem)) == []


def test_a_different_signature_would_be_seen() -> None:
    same = SimpleNamespace(forward=lora.ops.rmsnorm.forward, backward=lora.ops.rmsnorm.backward)
    assert differing_signatures(lora.ops.rmsnorm, same) == []
    renamed = SimpleNamespace(forward=lambda x, w: None, backward=lora.ops.rmsnorm.backward)
    assert differing_signatures(lora.ops.rmsnorm, renamed) == ["forward"]
    assert differing_signatures(lora.ops.rmsnorm, SimpleNamespace()) == ["forward", "backward"]


def test_no_file_has_a_name_that_says_nothing() -> None:
    named = [path for room in ROOMS for path in (ROOT / room).rglob("*") if "__pycache__" not in path.parts]
    assert [str(path) for path in named if NAMELESS.search(path.stem)] == []


def test_no_other_framework_is_imported() -> None:
    found = {str(path): FRAMEWORKS & set(imported(path)) for path in python_files("lora", "tests")}
    assert {path: names for path, names in found.items() if names} == {}


def test_only_backend_and_cuda_name_cupy() -> None:
    naming = {
        path.relative_to(ROOT).parts[1] for path in python_files("lora") if "cupy" in set(imported(path))
    }
    assert naming <= {"backend", "cuda"}


def test_what_the_library_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=~! ]", d)[0].lower() for d in project["dependencies"]}
    # huggingface_hub comes with tokenizers, which needs it itself; CuPy and tensorboardX are extras
    packages = declared - {"pyyaml"} | {"yaml", "huggingface_hub", "cupy", "tensorboardX", "lora"}
    third_party = {
        name for path in python_files("lora") if "sources" not in path.parts for name in imported(path)
    } - _standard_library()
    assert third_party <= packages


def _standard_library() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names
