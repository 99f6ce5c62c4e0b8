"""Low-rank adapters beside a frozen model: which modules get one, how it starts, how it is read back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora.backend import Array, beside, named_stream
from lora.errors import AdapterError, UnsupportedError
from lora.io.lora_config import LoraConfig
from lora.io.peft import check_tensors, in_layout
from lora.io.targets import match_targets
from lora.model.parameters import Adapter, Parameters, master_copy
from lora.ops.lowrank_linear import Factors
from lora.spec import ModelSpec, adaptable_modules

FUSED_QKV = ".in_proj_qkv"


def new_adapter(parameters: Parameters, spec: ModelSpec, config: LoraConfig, seed: int) -> Adapter:
    """Return an adapter at its start: A drawn as `config.init_lora_weights` says, B zero.

    Each A is drawn from `seed` and the name of its module: a new target moves no other's numbers.
    """
    config.validate(training=False)
    _refuse_embedding_that_is_the_head(parameters, config)
    modules = adaptable_modules(spec)
    factors: dict[str, Factors] = {}
    for module, target in match_targets(config, modules, layout=parameters.layout).items():
        outputs, inputs = modules[module]
        a = _initial(config, named_stream(seed, "lora_A", module), (target.r, inputs))
        b = np.zeros((outputs, target.r), np.float32)
        weight = parameters.weights[f"{module}.weight"]
        factors[module] = Factors(beside(a, weight), beside(b, weight), target.scale)
    zero_rows = {
        name: _key_rows(spec)
        for name in factors
        if config.target_modules == "qv" and name.endswith(FUSED_QKV)
    }
    return Adapter(config, factors, _copies(parameters, config), zero_rows)


def adapter_from_tensors(
    parameters: Parameters, spec: ModelSpec, config: LoraConfig, tensors: Mapping[str, Array]
) -> Adapter:
    """Return the adapter that `tensors` hold, by PEFT's names in either layout.

    Raises:
        AdapterError: a tensor is missing, left over or of another shape; every one of them is listed.
    """
    adapter, tensors = new_adapter(parameters, spec, config, seed=0), in_layout(tensors, parameters.layout)
    expected = adapter.tensors(parameters.layout)
    check_tensors(tensors, {name: array.shape for name, array in expected.items()})
    for name, array in expected.items():
        array[...] = beside(tensors[name], array)
    return adapter


def _key_rows(spec: ModelSpec) -> slice:
    """Return the rows of k in a gated-delta layer's fused q, k, v: under "qv" their part of B stays zero."""
    width = spec.linear_num_key_heads * spec.linear_key_head_dim
    return slice(width, 2 * width)


def _initial(config: LoraConfig, rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    r, inputs = shape
    if config.init_lora_weights == "gaussian":
        return (rng.standard_normal(shape) / r).astype(np.float32)
    # PEFT's default: kaiming_uniform with a = √5 is uniform in ±1/√I
    return rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(inputs**0.5)


def _refuse_embedding_that_is_the_head(parameters: Parameters, config: LoraConfig) -> None:
    saved = config.saved_modules
    tied = "lm_head.weight" not in parameters.weights and "lm_head" not in saved
    if tied and "embed_tokens" in saved and config.task_type != "SEQ_CLS":
        # PEFT trains the embedding apart from the head it is tied to: the same file would mean two models
        raise UnsupportedError(
            "modules_to_save: embed_tokens is the output head as well in this model (tie_word_embeddings); "
            "name lm_head beside it, so that each is trained as its own copy"
        )


def _copies(parameters: Parameters, config: LoraConfig) -> dict[str, Array]:
    """Return trained copies of the tensors of modules_to_save, among them a classifier's head."""
    copies: dict[str, Array] = {}
    for module in config.saved_modules:
        names = _tensors_of(parameters, module)
        if not names:
            raise AdapterError(f"modules_to_save: the model has no module named {module!r}")
        copies |= {name: master_copy(parameters.weights[source]) for name, source in names.items()}
    return copies


def _tensors_of(parameters: Parameters, module: str) -> dict[str, str]:
    """Return {name of the copy: name of the weight it starts from} for a module or a suffix of its name."""
    names = {
        name: name
        for name in parameters.weights
        if name.rpartition(".")[0] == module or name.rpartition(".")[0].endswith(f".{module}")
    }
    if not names and module == "lm_head":
        return {
            "lm_head.weight": "model.embed_tokens.weight"
        }  # a tied head that is trained is tied no longer
    return names
