"""What an adapter is: PEFT's fields, with our defaults, and what of them is built.

The fields are those of PEFT 0.17, which every later version reads; adapter_config.json is written from them.
Source: PEFT's LoraConfig, https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lora.errors import AdapterError, UnsupportedError

TASK_TYPES = (None, "CAUSAL_LM", "SEQ_CLS")
# what modules_to_save can name -> its canonical name
SAVED_MODULES = {"lm_head": "lm_head", "score": "score", "embed_tokens": "model.embed_tokens"}


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter under PEFT's names. `validate` says which values mean something here."""

    r: int = 16  # rank of the factors, at least 1
    lora_alpha: float | None = None  # numerator of the scale; None is 2 r
    # module names or their last parts; one of qv, attention, mlp, all-linear; any other string is a regex
    target_modules: tuple[str, ...] | str | None = "qv"
    exclude_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False  # scale by alpha / √r, not alpha / r
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # regex of a module -> its own r
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | int | None = None  # only these layers; all where None
    layers_pattern: tuple[str, ...] | str | None = None  # name of the list of layers that it counts in
    modules_to_save: tuple[str, ...] | None = None  # trained whole: lm_head, score, embed_tokens
    init_lora_weights: bool | str = "gaussian"  # how A starts: "gaussian", std 1 / r; True, PEFT's uniform
    task_type: str | None = None  # "CAUSAL_LM" or "SEQ_CLS", which trains and saves the head `score`
    base_model_name_or_path: str | None = None
    revision: str | None = None
    auto_mapping: Mapping[str, Any] | None = None  # PEFT's note of the base's class; kept, not used
    lora_dropout: float = 0.0  # any value in a file that is only run; 0 to train
    # not built: refused by name unless they have PEFT's default; the last two mean nothing without others
    bias: str = "none"
    corda_config: Any = None
    eva_config: Any = None
    fan_in_fan_out: bool = False
    layer_replication: Any = None
    loftq_config: Any = field(default_factory=dict)
    lora_bias: bool = False
    megatron_config: Any = None
    target_parameters: Any = None
    trainable_token_indices: Any = None
    use_dora: bool = False
    use_qalora: bool = False
    megatron_core: str | None = "megatron.core"
    qalora_group_size: int = 16

    def __post_init__(self) -> None:
        # lists, as users and JSON write them, become tuples: a frozen record must not change under its reader
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
            elif isinstance(value, set | frozenset):
                object.__setattr__(self, f.name, tuple(sorted(value)))

    @property
    def alpha(self) -> float:
        """The numerator of the scale, where no alpha_pattern says otherwise."""
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """The modules that are trained and saved whole; a classifier's head is always one of them."""
        named = self.modules_to_save or ()
        # PEFT adds "classifier" for any sequence classifier; no model here has a module of that name
        own = tuple(name for name in named if name != "classifier" or self.task_type != "SEQ_CLS")
        return own if self.task_type != "SEQ_CLS" or "score" in own else (*own, "score")

    def validate(self, *, training: bool = True) -> None:
        """Check every field; `training` asks for those as well that only matter when the adapter is trained.

        Raises:
            AdapterError: values that no adapter can have; the message names each field.
            UnsupportedError: fields whose meaning is not built; the message names each.
        """
        problems = [*_invalid(self)]
        if problems:
            raise AdapterError("adapter configuration: " + "; ".join(problems))
        unbuilt = [*_unbuilt(self), *(_untrainable(self) if training else ())]
        if unbuilt:
            raise UnsupportedError("adapter configuration: not built here: " + "; ".join(unbuilt))


_NOT_BUILT = (
    "bias",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "layer_replication",
    "loftq_config",
    "lora_bias",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
)
_DEFAULTS = LoraConfig()


def _invalid(config: LoraConfig) -> list[str]:
    problems = [
        f"{key} is {getattr(config, key)!r}, expected {expected}"
        for key, (accepts, expected) in _FORMS.items()
        if not accepts(getattr(config, key))
    ]
    if not problems and config.layers_to_transform is not None and isinstance(config.target_modules, str):
        problems.append("layers_to_transform needs target_modules to be a list of names")
    return problems


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_chance(value: Any) -> bool:
    return value == 0 or (_is_alpha(value) and value < 1)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_regex(value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _some(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and bool(value) and all(map(accepts, value))


def _by_regex(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(_is_regex(k) and accepts(v) for k, v in value.items())
    )


def _any_of(*accepting: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(accepts(value) for accepts in accepting)


def _is_empty(value: Any) -> bool:
    return value is None or value == ()


_NAMES = _some(_is_name)
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_any_of(_is_empty, _is_alpha), "a number above 0, or null for 2 r"),
    "target_modules": (_any_of(_NAMES, _is_regex), "a list of module names, a shorthand or a regex"),
    "exclude_modules": (_any_of(_is_empty, _NAMES, _is_regex), "a list of module names or a regex"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (_by_regex(_is_rank), "whole numbers above 0 by regex"),
    "alpha_pattern": (_by_regex(_is_alpha), "numbers above 0 by regex"),
    "layers_to_transform": (_any_of(_is_empty, _is_index, _some(_is_index)), "layer numbers from 0"),
    "layers_pattern": (_any_of(_is_empty, _is_regex, _some(_is_regex)), "regexes of the list of layers"),
    "modules_to_save": (_any_of(_is_empty, _NAMES), "a list of module names"),
    "task_type": (lambda value: value in TASK_TYPES, f"one of {TASK_TYPES}"),
    "base_model_name_or_path": (_any_of(_is_empty, lambda value: isinstance(value, str)), "a name or a path"),
    "lora_dropout": (_is_chance, "a number from 0, below 1"),
}


def _unbuilt(config: LoraConfig) -> list[str]:
    found = [
        f"{key} {getattr(config, key)!r}"
        for key in _NOT_BUILT
        # null, false and an empty list all say no
        if (getattr(config, key) or None) != (getattr(_DEFAULTS, key) or None)
    ]
    if config.init_lora_weights is not True and config.init_lora_weights != "gaussian":
        found.append(f"init_lora_weights {config.init_lora_weights!r} (built: true and 'gaussian')")
    unknown = [name for name in config.saved_modules if name not in SAVED_MODULES]
    if unknown:
        found.append(f"modules_to_save {', '.join(unknown)} (built: {', '.join(SAVED_MODULES)})")
    return found


def _untrainable(config: LoraConfig) -> list[str]:
    return [f"training with lora_dropout {config.lora_dropout!r}"] if config.lora_dropout else []
