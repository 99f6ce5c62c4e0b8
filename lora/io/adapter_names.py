"""What a tensor of an adapter is called: in PEFT's files, and in an APR file, which has the seed's names.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    lora.0.q_proj.lora_a [R, I]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    lora.0.q_proj.lora_b [O, R]
    base_model.model.score.weight, .bias                              classifier.weight [C, D], .bias [C]

A tensor that the seed has no name for keeps PEFT's.
"""

from __future__ import annotations

import re

from lora.errors import AdapterError
from lora.spec import canonical_name, stored_name

PREFIX = "base_model.model."
_KINDS = ("lora_A.weight", "lora_B.weight", "weight", "bias")
# the last part of a module -> what it stands in; no family has two modules of one name in a layer
_PARENTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "out_proj"), "linear_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
_FACTORS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
_FACTOR_KINDS = {short: kind for kind, short in _FACTORS.items()}


def peft_name(module: str, kind: str, layout: str = "text") -> str:
    """Return the name on disk of a tensor of an adapter.

    Args:
        module: canonical, for example `model.layers.0.self_attn.q_proj` or `score`.
        kind: "lora_A.weight", "lora_B.weight", or "weight" and "bias" of a module that is saved whole.
        layout: the layout of the base that PEFT would load the adapter into.
    """
    return f"{PREFIX}{stored_name(module, layout)}.{kind}"


def parse_peft_name(name: str, layout: str = "text") -> tuple[str, str]:
    """Return (module, kind), the inverse of `peft_name`.

    Raises:
        AdapterError: `name` is no such name.
    """
    for kind in _KINDS:
        if name.startswith(PREFIX) and name.endswith(f".{kind}"):
            return canonical_name(name.removeprefix(PREFIX).removesuffix(f".{kind}"), layout), kind
    raise AdapterError(f"{name!r}: expected {PREFIX}<module> and one of {', '.join(_KINDS)}")


def apr_name(name: str, layout: str) -> str:
    """Return what an APR file calls the tensor that PEFT calls `name` beside a base of `layout`."""
    module, kind = parse_peft_name(name, layout)
    if module == "score":
        return f"classifier.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(\w+)", module)
    if found and kind in _FACTORS and _PARENTS.get(found[3]) == found[2]:
        return f"lora.{found[1]}.{found[3]}.{_FACTORS[kind]}"
    return name


def from_apr_name(name: str, layout: str) -> str:
    """Return what PEFT calls the tensor that an APR file calls `name`, the inverse of `apr_name`."""
    if found := re.fullmatch(r"classifier\.(weight|bias)", name):
        return peft_name("score", found[1])
    found = re.fullmatch(r"lora\.(\d+)\.(\w+)\.(lora_[ab])", name)
    if found and found[2] in _PARENTS:
        module = f"model.layers.{found[1]}.{_PARENTS[found[2]]}.{found[2]}"
        return peft_name(module, _FACTOR_KINDS[found[3]], layout)
    return name
