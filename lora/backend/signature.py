"""The parameters of a kernel, read from its CUDA source: what a launch is checked against.

A kernel is a `__global__` function, plain or a template, whose parameters are scalars and pointers to
scalars of the types in `DTYPES`, or of a type that the template names.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from lora.assets import asset
from lora.backend.dtypes import bfloat16
from lora.errors import KernelError

DTYPES: dict[str, np.dtype[Any]] = {
    "__nv_bfloat16": bfloat16,
    "__half": np.dtype("float16"),
    "float": np.dtype("float32"),
    "double": np.dtype("float64"),
    "bool": np.dtype("bool"),
    "signed char": np.dtype("int8"),
    "unsigned char": np.dtype("uint8"),
    "short": np.dtype("int16"),
    "unsigned short": np.dtype("uint16"),
    "int": np.dtype("int32"),
    "unsigned": np.dtype("uint32"),
    "unsigned int": np.dtype("uint32"),
    "long long": np.dtype("int64"),
    "unsigned long long": np.dtype("uint64"),
}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_BETWEEN = re.compile(r"\s*(?:void|__launch_bounds__|__restrict__|static|inline)\b\s*")
_TEMPLATE = re.compile(r'template\s*<(?P<list>[^;{}]*)>\s*(?:extern\s*"C"\s*)?', re.DOTALL)


class Parameter(NamedTuple):
    """One parameter of a kernel, as the source declares it."""

    name: str
    dtype: np.dtype[Any]  # of the scalar, or of the elements that the pointer leads to
    pointer: bool
    written: bool  # a pointer to elements that are not const


class _Declaration(NamedTuple):
    template: tuple[str, ...]  # "typename T", "int D"
    parameters: tuple[str, ...]  # "const T* __restrict__ x_ND"


@cache
def read_signature(file: str, name: str) -> tuple[Parameter, ...]:
    """Return the parameters of `name` ("rmsnorm_forward<float>") in `file` of the kernels folder.

    Raises:
        KernelError: the file has no such kernel, or declares a parameter of another type.
    """
    kernels = _declarations(file)
    stem, _, arguments = name.partition("<")
    if stem not in kernels:
        raise KernelError(f"{file} has no kernel {stem}; it has {', '.join(kernels) or 'none'}")
    declared = kernels[stem]
    given = _split(arguments.strip().removesuffix(">")) if arguments else ()
    if len(given) != len(declared.template):
        raise KernelError(
            f"{file}: {stem} takes {len(declared.template)} template arguments; {name} gives {len(given)}"
        )
    types = dict(zip((formal.split()[-1] for formal in declared.template), given, strict=True))
    return tuple(_parameter(text, types, f"{file}: {name}") for text in declared.parameters)


@cache
def _declarations(file: str) -> dict[str, _Declaration]:
    """Return every kernel that the source declares, by name."""
    text = _COMMENT.sub(" ", asset("kernels", file).read_text(encoding="utf-8"))
    found: dict[str, _Declaration] = {}
    for match in re.finditer(r"\b__global__\b", text):
        place = match.end()
        while between := _BETWEEN.match(text, place):
            place = between.end()
            if text[place] == "(":  # the bounds of __launch_bounds__
                place = _closing(text, place) + 1
        name, opening = text[place : text.index("(", place)].strip(), text.index("(", place)
        parameters = _split(text[opening + 1 : _closing(text, opening)])
        found[name] = _Declaration(_template(text[: match.start()]), parameters)
    return found


def _template(before: str) -> tuple[str, ...]:
    """Return the template parameters that the text before `__global__` ends with, without their defaults."""
    start = before.rfind("template")
    head = _TEMPLATE.fullmatch(before, start) if start >= 0 else None
    return tuple(formal.partition("=")[0].strip() for formal in _split(head["list"])) if head else ()


def _closing(text: str, opening: int) -> int:
    """Return where the parenthesis at `opening` is closed."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise KernelError(f"a parenthesis is never closed: {text[opening : opening + 40]!r}")


def _split(text: str) -> tuple[str, ...]:
    """Return the parts between the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, "<": 1, ")": -1, ">": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts if part.strip())


def _parameter(text: str, types: dict[str, str], where: str) -> Parameter:
    words = re.findall(r"\w+|\S", text.replace("__restrict__", " "))
    stars = words.count("*")
    element = words[: words.index("*")] if stars else words[:-1]
    spelled = " ".join(word for word in element if word != "const")
    dtype = DTYPES.get(types.get(spelled, spelled))
    if dtype is None or stars > 1 or not words[-1].isidentifier():
        raise KernelError(
            f"{where}: cannot read the parameter {text!r}; "
            f"expected a scalar, or a pointer to one of {', '.join(DTYPES)}"
        )
    return Parameter(words[-1], dtype, stars == 1, stars == 1 and "const" not in element)
