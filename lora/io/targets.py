"""Which modules an adapter sits beside, and the rank and scale of each: PEFT's rules, and shorthands.

Source: PEFT's documentation of target_modules, rank_pattern and layers_to_transform.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any, NamedTuple

from lora.errors import AdapterError
from lora.io.lora_config import LoraConfig
from lora.spec import stored_name

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
SHORTHANDS: Mapping[str, tuple[str, ...]] = {
    "qv": ("q_proj", "v_proj", "in_proj_qkv"),
    "attention": _ATTENTION,
    "mlp": _MLP,
    "all-linear": (*_ATTENTION, *_MLP),
}


class FactorSizes(NamedTuple):
    """The adapter beside one module."""

    r: int
    alpha: float
    scale: float  # alpha / r, or alpha / √r


def match_targets(
    config: LoraConfig, modules: Mapping[str, tuple[int, int]], *, layout: str = "text"
) -> dict[str, FactorSizes]:
    """Return the adapter of every module that `config` targets, by canonical name, in the order of `modules`.

    Args:
        config: the adapter's settings.
        modules: (O, I) of every module that can carry an adapter, by canonical name.
        layout: the layout whose names the patterns of `config` are written for.

    Raises:
        AdapterError: a target, or a pattern, matches nothing: a typo must not train nothing in silence.
    """
    names = {name: stored_name(name, layout) for name in modules}
    targets = _targets(config, modules)
    matched = {name: seen for name, seen in names.items() if _is_target(config, targets, seen)}
    _refuse_idle(config, targets, names.values(), matched.values())
    return {name: _sizes(config, seen) for name, seen in matched.items()}


def expanded(config: LoraConfig, modules: Iterable[str]) -> LoraConfig:
    """Return `config` as it is written: alpha a number, and a shorthand the names that occur in `modules`."""
    return replace(config, lora_alpha=config.alpha, target_modules=_targets(config, modules))


def with_shorthand(config: LoraConfig, shorthand: Any, modules: Iterable[str]) -> LoraConfig:
    """Return `config` with its targets put back as the `shorthand` that it was written from, if it was."""
    if isinstance(shorthand, str) and shorthand in SHORTHANDS:
        short = replace(config, target_modules=shorthand)
        if expanded(short, modules).target_modules == config.target_modules:
            return short
    return config


def _targets(config: LoraConfig, modules: Iterable[str]) -> tuple[str, ...] | str:
    """Return a regex, or the names that are matched whole or as a last part."""
    targets = config.target_modules
    if targets is None:
        raise AdapterError("target_modules is missing: expected module names, a shorthand or a regex")
    if isinstance(targets, str) and targets in SHORTHANDS:
        present = {name.rpartition(".")[2] for name in modules}
        return tuple(name for name in SHORTHANDS[targets] if name in present)
    return targets


def _is_target(config: LoraConfig, targets: tuple[str, ...] | str, name: str) -> bool:
    if config.exclude_modules and _names(config.exclude_modules, name):
        return False
    return bool(_names(targets, name)) and _in_chosen_layer(config, name)


def _names(targets: tuple[str, ...] | str, name: str) -> list[str]:
    """Return the ones of `targets` that name the module `name`."""
    if isinstance(targets, str):
        return [targets] if re.fullmatch(targets, name) else []
    return [target for target in targets if name == target or name.endswith(f".{target}")]


def _in_chosen_layer(config: LoraConfig, name: str) -> bool:
    chosen = config.layers_to_transform
    if chosen is None or chosen == ():
        return True
    wanted = (chosen,) if isinstance(chosen, int) else chosen
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        # the first number counts the layers; a later one would count something inside them
        if found := re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", name):
            return int(found[1]) in wanted
    return False


def _refuse_idle(
    config: LoraConfig, targets: tuple[str, ...] | str, names: Collection[str], matched: Collection[str]
) -> None:
    """Refuse a target that names none of the modules `names`, and a pattern that fits none of `matched`."""
    listed = (targets,) if isinstance(targets, str) else targets
    idle = [f"target {t!r}" for t in listed if not any(t in _names(targets, name) for name in names)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = getattr(config, key)
        idle += [f"{key} {p!r}" for p in patterns if not any(_pattern_matches(p, n) for n in matched)]
    if idle or not matched:
        raise AdapterError(
            f"nothing is matched by {', '.join(idle) or 'target_modules'}; check the names, exclude_modules "
            "and layers_to_transform against `lora inspect`"
        )


def _sizes(config: LoraConfig, name: str) -> FactorSizes:
    r = _first(config.rank_pattern, name, config.r)
    alpha = _first(config.alpha_pattern, name, config.alpha)
    return FactorSizes(r, alpha, alpha / sqrt(r) if config.use_rslora else alpha / r)


def _first(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if _pattern_matches(key, name)), default)


def _pattern_matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
