"""Plans: known counts, the keys that scripts read, what is chosen, and that nothing is loaded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lora.errors import AdapterError, MissingFileError, UnsupportedError, UsageError
from lora.estimate import HOST_ACTIVATION_BYTES, Workload, micro_batch_tokens, plan
from lora.spec import size_spec
from tests.harness.models import TINY_QWEN2

SCRIPT_KEYS = {
    "model_params", "vram_gb", "recommended_method", "recommended_rank", "recommended_alpha",
    "trainable_params", "trainable_percent", "memory_gb", "utilization_percent", "epochs", "learning_rate",
    "plan_only", "memory_breakdown", "task", "num_classes", "lora_rank", "hidden_size", "num_layers",
    "lora_adapters",
}  # fmt: skip
BREAKDOWN_KEYS = {
    "model_bytes", "adapter_bytes", "optimizer_bytes", "gradient_bytes", "activation_bytes", "logits_bytes",
    "total_bytes", "mapped_bytes", "resident_bytes", "savings_percent",
}  # fmt: skip


def test_half_a_billion_by_the_numbers() -> None:
    facts = plan("0.5B", method="lora").as_dict()
    assert facts["model_params"] == 494_032_768
    assert facts["lora_adapters"] == 48
    assert facts["adapter_params_stored"] == facts["adapter_params_trained"] == 1_081_344
    assert facts["head_params"] == 4_485
    assert facts["trainable_params"] == 1_085_829
    assert (facts["hidden_size"], facts["num_layers"], facts["num_classes"]) == (896, 24, 5)
    assert (facts["recommended_rank"], facts["recommended_alpha"], facts["lora_rank"]) == (16, 32, 16)
    parts = facts["memory_breakdown"]
    assert parts["model_bytes"] == parts["mapped_bytes"] == 988_065_536
    assert parts["adapter_bytes"] == 4 * 1_085_829
    assert parts["optimizer_bytes"] == 8 * 1_085_829


def test_nine_billion_by_the_numbers() -> None:
    facts = plan("9b", method="lora", task="classify").as_dict()
    assert facts["model_params"] == 8_953_803_264
    assert facts["lora_adapters"] == 40
    assert facts["adapter_params_stored"] == 6_946_816
    assert facts["adapter_params_trained"] == 6_160_384
    assert facts["head_params"] == 5 * 4097
    assert facts["trainable_params"] == 6_160_384 + 20_485
    # moments and gradients exist for the rows of B that stay zero, too
    assert facts["memory_breakdown"]["optimizer_bytes"] == 8 * (6_946_816 + 20_485)


@pytest.mark.parametrize(
    ("size", "targets", "modules", "stored"),
    [
        ("0.5b", "all-linear", 168, 8_798_208),
        ("9b", "all-linear", 200, 40_108_032),
        ("9b", "attention", 104, 40_108_032 - 32 * 3 * 16 * (4096 + 12288)),
    ],
)
def test_other_targets_by_the_numbers(size: str, targets: str, modules: int, stored: int) -> None:
    facts = plan(size, method="lora", targets=targets, task="causal").as_dict()
    assert facts["lora_adapters"] == modules
    assert (
        facts["adapter_params_stored"]
        == facts["adapter_params_trained"]
        == facts["trainable_params"]
        == stored
    )


@pytest.mark.parametrize("task", ["classify", "causal"])
@pytest.mark.parametrize("method", ["auto", "full", "lora"])
def test_scripts_find_their_keys(task: str, method: str) -> None:
    facts = plan("1.5b", task=task, method=method).as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts.keys() >= SCRIPT_KEYS
    parts = facts["memory_breakdown"]
    assert parts.keys() == BREAKDOWN_KEYS
    summed = ("model", "adapter", "optimizer", "gradient", "activation", "logits")
    assert parts["total_bytes"] == sum(parts[f"{part}_bytes"] for part in summed)
    assert parts["resident_bytes"] == parts["total_bytes"] - parts["mapped_bytes"]
    assert all(isinstance(value, int) for key, value in parts.items() if key.endswith("_bytes"))
    assert facts["memory_gb"] == parts["resident_bytes"] / 1e9
    assert facts["utilization_percent"] == pytest.approx(100 * facts["memory_gb"] / 16)
    assert facts["fits"] == (facts["utilization_percent"] <= 85)
    assert facts["trainable_percent"] == 100 * facts["trainable_params"] / facts["model_params"]
    assert facts["num_classes"] == (5 if task == "classify" else None)
    assert (facts["lora_rank"] is None) == (facts["recommended_method"] != "lora")


def test_auto_is_an_adapter() -> None:
    assert plan("0.5b", vram_gb=200) == plan("0.5b", vram_gb=200, method="lora")


@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_a_method_that_was_named_stays(method: str) -> None:
    assert plan("0.5b", method=method, vram_gb=0.001).workload.method == method


def test_a_frozen_base_is_mapped_on_the_host_alone() -> None:
    on_host, on_device = (plan("7b", method="lora", device=device).memory for device in ("cpu", "cuda"))
    assert on_host.mapped == on_host.model
    assert on_device.mapped == 0
    assert plan("7b", method="full", device="cpu").memory.mapped == 0  # trained copies are nobody's file


def test_the_host_runs_what_a_training_run_would() -> None:
    made = plan("0.5b", method="lora", vram_gb=64)
    expected = micro_batch_tokens(Workload(size_spec("0.5b"), "classify"), HOST_ACTIVATION_BYTES, longest=512)
    assert made.micro_batch_tokens == expected < 32 * 512


def test_the_device_runs_the_whole_batch_where_it_fits_and_one_sequence_at_least() -> None:
    def tokens(vram_gb: float) -> int:
        return plan("0.5b", method="lora", device="cuda", vram_gb=vram_gb).micro_batch_tokens

    assert tokens(200) == 32 * 512
    assert tokens(1) == 512
    assert 512 < tokens(8) < 32 * 512
    made = plan("0.5b", method="lora", device="cuda", vram_gb=8)
    assert 0.999 < made.memory.resident / (0.85 * 8e9) <= 1


def test_what_does_not_fit_is_planned_and_said() -> None:
    made = plan("32b", device="cuda", vram_gb=24)
    assert made.workload.method == "lora"
    assert not made.fits
    assert made.as_dict()["utilization_percent"] > 100


@pytest.mark.parametrize("size", ["32b", "9b"])
def test_planning_is_quick_and_loads_nothing(size: str) -> None:
    plan(size)  # contracts are read once
    start = time.perf_counter()
    plan(size, rank=8)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, 2),
        ({"torch_dtype": None, "dtype": "float16"}, 2),
        ({"torch_dtype": None}, 4),
    ],
)
def test_a_folder_is_planned_from_its_config_alone(
    entry: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    config = {key: value for key, value in (TINY_QWEN2 | entry).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = plan(tmp_path, method="lora")
    assert made.memory.model == expected * made.as_dict()["model_params"]
    assert (
        plan(str(tmp_path), method="lora", weight_dtype="float64").memory.model
        == 4 / expected * 2 * made.memory.model
    )


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        plan(
            "0.5b",
            method="magic",
            num_classes=1,
            device="tpu",
            dtype="int8",
            vram_gb=0,
            batch_size=0,
            epochs=0,
        )
    for name in (
        "method = 'magic'",
        "num_classes = 1",
        "device",
        "dtype",
        "vram_gb",
        "batch_size = 0",
        "epochs",
    ):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        ("0.5b", {"method": "qlora"}, UnsupportedError, "method 'qlora' is not built"),
        ("0.5b", {"method": "head", "task": "instruct"}, UsageError, "no head of its own"),
        ("0.5b", {"method": "head", "task": "causal"}, UsageError, "no head of its own"),
        ("0.5b", {"speed": 2}, UsageError, "unknown settings speed; known: task, method"),
        ("0.5b", {"method": "lora", "targets": "q_prj"}, AdapterError, "q_prj"),
        ("0.5b", {"rank": 0}, AdapterError, "r is 0"),
        ("3.14b", {}, UsageError, "unknown model size '3.14b'"),
        ("./nowhere", {}, MissingFileError, "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_planned_is_refused(model: str, settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        plan(model, **settings)


def test_a_stored_dtype_that_is_not_built_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_QWEN2, "torch_dtype": "float8_e4m3fn"}))
    with pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        plan(tmp_path)


def test_rows_that_run_alone_take_the_memory_of_one() -> None:
    packed, alone = (plan("0.5b", method="lora", vram_gb=64, packing=packing) for packing in (True, False))
    assert alone.micro_batch_tokens == alone.max_seq_len < packed.micro_batch_tokens
    assert alone.memory.activation < packed.memory.activation
