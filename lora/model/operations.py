"""Which operations a model is made of: what its device must be able to run."""

from __future__ import annotations

from lora.spec import ModelSpec

EVERY_MODEL = frozenset({"embedding", "lowrank_linear", "rmsnorm", "rope", "swiglu"})
MIXERS = {
    "full_attention": frozenset({"attention"}),
    "linear_attention": frozenset({"causal_conv1d", "gated_delta_rule", "gated_norm"}),
}


def operations(spec: ModelSpec, *, classifies: bool, multi_label: bool = False) -> frozenset[str]:
    """Return the names of the operations that a forward and a backward of such a model call."""
    named = EVERY_MODEL | {"sigmoid_bce" if multi_label else "softmax_xent"}
    named = named.union(*(MIXERS[kind] for kind in spec.layer_types))
    if spec.attn_output_gate:
        named |= {"sigmoid_gate"}
    return named | {"pool"} if classifies else named
