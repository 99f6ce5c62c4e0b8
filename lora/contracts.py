"""Contract files into frozen records; an unknown or a missing key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lora.assets import asset
from lora.errors import ContractError


@dataclass(frozen=True)
class Claim:
    """A sentence that could be false, and the planted bugs that its test must reject."""

    id: str
    says: str
    kills: tuple[str, ...]


@dataclass(frozen=True)
class Contract:
    """What every contract has."""

    contract: str
    kind: str
    version: int
    source: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class OpContract(Contract):
    """One operation: its equation, its arrays, and the domain that its tests draw from."""

    equation: str
    axes: Mapping[str, str]
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    domain: Mapping[str, tuple[int, int]]
    error_bound: str
    gradients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingContract(Contract):
    """A rule of training: what must hold over steps, files and runs rather than in one operation."""

    statement: str
    domain: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """One published size of a family."""

    aliases: tuple[str, ...]
    hub: str  # the checkpoint that the size's name stands for
    parameters: int  # exact, tied tensors counted once
    config: Mapping[str, Any]  # in config.json's own keys


@dataclass(frozen=True)
class FamilyContract(Contract):
    """One model family: shape rules and tensors for any sizes, and the published sizes by name."""

    display: str
    architectures: tuple[str, ...]
    classifiers: Mapping[str, str]  # layout -> Transformers' class for a head of labels
    model_types: tuple[str, ...]
    parts: Mapping[str, str]
    axes: Mapping[str, str]  # letter -> key of config.json
    facts: Mapping[str, Any]  # what config.json does not say: conventions of the family's code
    fixed: Mapping[str, Any]  # key of config.json -> the only value that is computed
    defaults: Mapping[str, Any]  # key that a file may lack -> its value, or an expression over axes
    rules: tuple[Mapping[str, str], ...]  # {rule, says}: arithmetic over axes that must hold
    sizes: Mapping[str, Size]
    layouts: Mapping[str, str]  # name of a checkpoint's layout -> what stands for "model." in it
    skipped: tuple[str, ...]  # prefixes of tensors that are neither read nor checked
    tensors: Mapping[str, Mapping[str, tuple[Any, ...]]]  # group -> {name pattern: shape expressions}


_Record = TypeVar("_Record", bound=Contract)


def op_contract(stem: str) -> OpContract:
    """Return the contract of the operation `stem`, from contracts/ops/<stem>.yaml."""
    return _load(OpContract, "ops", f"{stem}.yaml")


def training_contract(stem: str) -> TrainingContract:
    """Return a contract of contracts/training/ by its stem, or `classification-finetune-v1` of contracts/."""
    if asset("contracts").joinpath(f"{stem}.yaml").is_file():
        return _load(TrainingContract, f"{stem}.yaml")
    return _load(TrainingContract, "training", f"{stem}.yaml")


def family_contract(name: str) -> FamilyContract:
    """Return the contract of a model family, from contracts/model-families/<name>.yaml."""
    return _load(FamilyContract, "model-families", f"{name}.yaml")


def _sizes(data: Mapping[str, Any], path: Path) -> dict[str, Size]:
    known = {f.name for f in fields(Size)}
    for name, size in data.items():
        if size.keys() != known:
            raise ContractError(
                f"{path}: size {name}: expected the keys {sorted(known)}; found {sorted(size)}"
            )
    return {name: Size(**{key: _frozen(value) for key, value in size.items()}) for name, size in data.items()}


def family_names() -> tuple[str, ...]:
    """Return the families that have a contract, in alphabetical order."""
    return tuple(sorted(path.stem for path in asset("contracts", "model-families").glob("*.yaml")))


def all_contracts() -> tuple[Contract, ...]:
    """Return every contract there is, each by the record of its folder."""
    root = asset("contracts")
    ops = [op_contract(path.stem) for path in sorted(root.glob("ops/*.yaml"))]
    families = [family_contract(name) for name in family_names()]
    training = [
        training_contract(path.stem) for path in sorted([*root.glob("*.yaml"), *root.glob("training/*.yaml")])
    ]
    return (*ops, *families, *training)


@cache
def _load(record: type[_Record], *parts: str) -> _Record:
    path = asset("contracts", *parts)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ContractError(f"{path}: not YAML: {error}") from error
    known = {f.name for f in fields(record)}
    required = {f.name for f in fields(record) if f.default is MISSING and f.default_factory is MISSING}
    if not isinstance(data, dict) or not required <= data.keys() <= known:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ContractError(
            f"{path}: expected the keys {sorted(required)}, "
            f"optionally {sorted(known - required)}; found {found}"
        )
    data["claims"] = tuple(Claim(c["id"], c["says"], tuple(c["kills"])) for c in data["claims"])
    if record is FamilyContract:
        data["sizes"] = _sizes(data["sizes"], path)
    return record(**{key: _frozen(value) for key, value in data.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
