"""Sums add up, more of anything never takes less, and a micro-batch is as large as its budget allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.estimate import Workload, memory, micro_batch_tokens
from lora.io.lora_config import LoraConfig
from lora.spec import parameter_count, size_spec

SIZES = ("0.5b", "1.5b", "7b", "9b")
TARGETS = ("qv", "attention", "mlp", "all-linear")
LONGEST = 512

WORKLOADS = st.builds(
    Workload,
    st.sampled_from(SIZES).map(size_spec),
    st.sampled_from(["classify", "causal"]),
    st.sampled_from(["full", "lora"]),
    st.builds(LoraConfig, r=st.integers(1, 128), target_modules=st.sampled_from(TARGETS)),
    num_classes=st.integers(2, 100),
    head_bias=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
    weight_dtype=st.sampled_from(["bfloat16", "float32"]),
    device=st.sampled_from(["cpu", "cuda"]),
)
TOKENS = st.integers(1, 50_000)


@given(WORKLOADS, TOKENS, st.booleans())
def test_the_parts_add_up(workload: Workload, tokens: int, accumulates: bool) -> None:
    needed = memory(workload, tokens, longest=LONGEST, accumulates=accumulates)
    *parts, mapped = needed
    assert all(isinstance(part, int) and part >= 0 for part in needed)
    assert needed.total == sum(parts)
    assert needed.resident == needed.total - mapped
    assert mapped == (needed.model if workload.device == "cpu" and workload.method == "lora" else 0)
    assert needed.adapter == 4 * (workload.adapter_parameters + workload.head_parameters)
    assert needed.optimizer == 8 * workload.held_parameters


def more(workload: Workload) -> dict[str, Workload]:
    """Return workloads that ask for more than `workload`, by what of it."""
    rank = replace(workload.adapter, r=workload.adapter.r + 1)
    everywhere = replace(workload.adapter, target_modules="all-linear")
    changes: dict[str, dict[str, Any]] = {
        "rank": {"adapter": rank},
        "targets": {"adapter": everywhere},
        "classes": {"num_classes": workload.num_classes + 1},
        "bias": {"head_bias": True},
        "precision": {"dtype": "float64"},
        "method": {"method": "full"},
    }
    return {name: replace(workload, **change) for name, change in changes.items()}


@given(WORKLOADS, TOKENS, st.booleans())
def test_more_never_takes_less(workload: Workload, tokens: int, accumulates: bool) -> None:
    def total(asked: Workload, tokens: int = tokens, accumulates: bool = accumulates) -> int:
        return memory(asked, tokens, longest=LONGEST, accumulates=accumulates).total

    least = total(workload)
    for name, larger in more(workload).items():
        assert total(larger) >= least, name
    assert total(workload, tokens=tokens + 1) >= least
    assert total(workload, accumulates=True) >= least


def test_a_larger_model_takes_more() -> None:
    totals = [
        memory(Workload(size_spec(size)), 1000, longest=LONGEST, accumulates=False).total
        for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b")
    ]
    assert totals == sorted(set(totals))


@given(
    size=st.sampled_from(SIZES),
    budget=st.integers(0, 40 * 10**9),
    task=st.sampled_from(["classify", "causal"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    targets=st.sampled_from(TARGETS),
    max_seq_len=st.sampled_from([32, 512, 4096]),
)
def test_a_micro_batch_is_the_largest_that_fits(
    size: str, budget: int, task: Any, dtype: str, targets: str, max_seq_len: int
) -> None:
    adapter = LoraConfig(target_modules=targets)
    workload = Workload(size_spec(size), task, adapter=adapter, dtype=dtype)
    tokens = micro_batch_tokens(workload, budget, longest=max_seq_len)

    def running(tokens: int) -> int:
        needed = memory(workload, tokens, longest=max_seq_len, accumulates=False)
        return needed.activation + needed.logits

    assert tokens >= 0
    assert tokens == 0 or running(tokens) <= budget
    assert running(tokens + 1) > budget


@pytest.mark.parametrize("size", ["0.5b", "7b", "32b", "9b"])
def test_a_causal_model_under_full_training_trains_every_parameter(size: str) -> None:
    workload = Workload(size_spec(size), "causal", "full")
    assert workload.trained_parameters == parameter_count(size_spec(size))
    assert workload.model_bytes == 4 * parameter_count(size_spec(size))


def test_a_classifier_has_no_use_for_an_untied_language_head() -> None:
    spec = size_spec("7b")
    head = spec.vocab_size * spec.hidden_size
    assert Workload(spec, "classify").model_bytes == 2 * (parameter_count(spec) - head)
    assert Workload(size_spec("0.5b"), "classify").model_bytes == 2 * 494_032_768


def test_layers_below_the_first_adapter_keep_nothing() -> None:
    spec = size_spec("0.5b")

    def activation(targets: str) -> int:
        workload = Workload(spec, adapter=LoraConfig(target_modules=targets))
        return memory(workload, 4096, longest=LONGEST, accumulates=False).activation

    last, half, all_ = (
        activation(rf"model\.layers\.({layers})\..*q_proj") for layers in ("23", "12|23", r"\d+")
    )
    assert last < half < all_
    assert last < all_ / 5
