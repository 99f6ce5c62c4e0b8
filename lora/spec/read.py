"""config.json into a ModelSpec: every number named, checked, and none of them guessed."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from lora.contracts import FamilyContract, family_contract, family_names
from lora.errors import ContractError, UnsupportedError
from lora.spec.expressions import evaluate, letters
from lora.spec.model_spec import ModelSpec
from lora.spec.spelling import one_spelling

_MOST = 2**31 - 1  # no size of a model is near it, and arithmetic on such numbers is safe


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Return the sizes that `config`, the content of a config.json in any spelling, states.

    Any sizes that keep the family's rules are accepted.

    Raises:
        UnsupportedError: the model_type belongs to no family that has a contract.
        ContractError: numbers are missing, are no numbers, break a rule, or ask for what is not computed.
            One error names every such key.
    """
    contract = _family(config.get("model_type"))
    problems: list[str] = []
    values = _Values(one_spelling(config, problems), problems)
    _refuse_other_values(contract, values)
    axes = _axes(contract, values)
    _check_rules(contract, axes, problems)
    _check_layer_types(contract, values, axes.get("L"))
    fields: dict[str, Any] = {
        "max_position_embeddings": values.whole("max_position_embeddings"),
        "rms_norm_eps": values.real("rms_norm_eps"),
        "rope_theta": values.real("rope_theta"),
        "tie_word_embeddings": values.flag("tie_word_embeddings", contract.defaults["tie_word_embeddings"]),
        "initializer_range": values.real("initializer_range", contract.defaults["initializer_range"]),
        "eos_token_ids": values.token_ids("eos_token_id"),
        "pad_token_id": next(iter(values.token_ids("pad_token_id")), None),
    }
    if problems:
        raise ContractError(f"config.json does not fit family {contract.contract}: " + "; ".join(problems))
    sizes = {key: axes[letter] for letter, key in contract.axes.items()}
    # only now: a damaged file may ask for a list of any length
    layer_types = _layer_types(contract, values, axes["L"])
    return ModelSpec(contract.contract, layer_types=layer_types, **contract.facts, **sizes, **fields)


def _family(model_type: Any) -> FamilyContract:
    contracts = [family_contract(name) for name in family_names()]
    for contract in contracts:
        if model_type in contract.model_types:
            return contract
    known = ", ".join(f"{c.display} ({' or '.join(c.model_types)})" for c in contracts)
    raise UnsupportedError(
        f"config.json: model_type {reprlib.repr(model_type)} is not built; these are: {known}"
    )


class _Values:
    """Typed access to the keys of one config; what is missing or of another type is added to `problems`."""

    def __init__(self, config: Mapping[str, Any], problems: list[str]):
        self.config = config
        self.problems = problems

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number above 0; 0 where a problem was reported."""
        value = self._get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST:
            return value
        self._report(key, value, f"a whole number from 1 to {_MOST}")
        return 0

    def real(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0; NaN where a problem was reported."""
        value = self._get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
            return float(value)
        self._report(key, value, "a finite number above 0")
        return math.nan

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if isinstance(value, bool):
            return value
        self._report(key, value, "true or false")
        return default

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one id, a list of ids, or nothing, as a tuple."""
        value = self.config.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            return tuple(ids)
        self._report(key, value, "token ids, whole numbers from 0")
        return ()

    def _get(self, key: str, default: Any) -> Any:
        return self.config.get(key, default)

    def _report(self, key: str, value: Any, expected: str) -> None:
        found = "is missing" if value is None else f"is {reprlib.repr(value)}"
        self.problems.append(f"{key} {found}, expected {expected}")


def _refuse_other_values(contract: FamilyContract, values: _Values) -> None:
    for key, computed in contract.fixed.items():
        found = values.config.get(key, computed)
        if found != computed:
            values.problems.append(f"{key} is {reprlib.repr(found)}; only {computed!r} is built")


def _axes(contract: FamilyContract, values: _Values) -> dict[str, int]:
    """Return the sizes by letter; a letter whose key was reported as a problem is left out."""
    axes: dict[str, int] = {}
    for letter, key in contract.axes.items():
        if key == "rotary_dim":
            size = _rotary_dim(contract, values, axes.get("E"))
        elif key in contract.defaults and key not in values.config:
            size = _default(contract.defaults[key], axes)
        else:
            size = values.whole(key) or None
        if size == 0:
            values.problems.append(f"{key} comes out as 0, expected at least 1")
        elif size is not None:
            axes[letter] = size
    return axes


def _default(expression: str, axes: Mapping[str, int]) -> int | None:
    return evaluate(expression, axes) if set(letters(expression)) <= axes.keys() else None


def _rotary_dim(contract: FamilyContract, values: _Values, head_dim: int | None) -> int | None:
    factor = values.real("partial_rotary_factor", contract.defaults["partial_rotary_factor"])
    if factor > 1:
        values.problems.append(f"partial_rotary_factor is {factor}, expected at most 1")
    return None if head_dim is None or math.isnan(factor) else int(head_dim * min(factor, 1.0))


def _check_rules(contract: FamilyContract, axes: Mapping[str, int], problems: list[str]) -> None:
    for entry in contract.rules:
        used = letters(entry["rule"])
        # a letter without a size was reported already
        if set(used) <= axes.keys() and not evaluate(entry["rule"], axes):
            named = ", ".join(f"{contract.axes[letter]} {axes[letter]}" for letter in used)
            problems.append(f"{named}: {entry['says']} ({entry['rule']})")


def _check_layer_types(contract: FamilyContract, values: _Values, count: int | None) -> None:
    """Report a wrong length, types that are not computed, an interval that says otherwise, or silence."""
    built = _built(contract)
    listed = values.config.get("layer_types")
    if listed is not None and (not isinstance(listed, list) or len(listed) != count):
        found = f"{len(listed)} entries" if isinstance(listed, list) else reprlib.repr(listed)
        values.problems.append(f"layer_types has {found}, expected a list of num_hidden_layers {count}")
        return
    unknown = sorted({str(kind) for kind in listed or () if kind not in built})
    if unknown:
        values.problems.append(
            f"layer_types holds {reprlib.repr(unknown)}; only {', '.join(built)} are built"
        )
    if "full_attention_interval" in values.config:
        interval = values.whole("full_attention_interval")
        if listed is not None and interval and tuple(listed) != _every(interval, len(listed)):
            values.problems.append(f"layer_types contradicts full_attention_interval {interval}")
    elif listed is None and len(built) > 1:
        values.problems.append("layer_types is missing, expected a list, or full_attention_interval")


def _layer_types(contract: FamilyContract, values: _Values, count: int) -> tuple[str, ...]:
    if "layer_types" in values.config:
        return tuple(values.config["layer_types"])
    if len(_built(contract)) == 1:
        return _built(contract) * count
    return _every(values.whole("full_attention_interval"), count)


def _built(contract: FamilyContract) -> tuple[str, ...]:
    return tuple(kind for kind in ("full_attention", "linear_attention") if kind in contract.tensors)


def _every(interval: int, count: int) -> tuple[str, ...]:
    """Return `count` types where every `interval`-th layer, and no other, has full attention."""
    return tuple("linear_attention" if i % interval else "full_attention" for i in range(1, count + 1))
