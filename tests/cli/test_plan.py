"""Plans from the command line: from a size or a config.json alone, with the keys that scripts read."""

from __future__ import annotations

import pytest

from lora.estimate import Settings, plan
from tests.cli.conftest import LABELLED
from tests.data.files import write_jsonl

KEYS = {
    "task",
    "num_classes",
    "lora_rank",
    "hidden_size",
    "num_layers",
    "trainable_params",
    "lora_adapters",
    "model_params",
    "vram_gb",
    "recommended_method",
    "recommended_rank",
    "recommended_alpha",
    "trainable_percent",
    "memory_gb",
    "utilization_percent",
    "epochs",
    "learning_rate",
    "plan_only",
}
PARTS = {
    "model_bytes",
    "adapter_bytes",
    "optimizer_bytes",
    "activation_bytes",
    "total_bytes",
    "savings_percent",
}


def test_json_is_the_plan_of_the_library(lora) -> None:
    document = lora("finetune", "--task", "classify", "--model-size", "9B", "--plan", "--json").document
    assert document.keys() >= KEYS
    assert document["memory_breakdown"].keys() >= PARTS
    assert document == {"status": "planned"} | plan("9b", task="classify").as_dict()
    assert (document["num_classes"], document["adapter_params_stored"]) == (5, 6946816)


@pytest.mark.parametrize("task", [(), ("--task", "classify"), ("--task", "causal")])
def test_a_plan_without_a_model_says_what_is_needed(lora, task: tuple[str, ...]) -> None:
    outcome = lora("finetune", *task, "--plan")
    assert (outcome.exit_code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "expects MODEL (a folder, .apr or hub id) or --model-size and nothing else" in outcome.err
    for size in ("0.5b", "7b", "27b"):
        assert f" {size}" in outcome.err
        assert lora("finetune", *task, "--plan", "--model-size", size).exit_code == 0


def test_help_tells_the_default_budget(lora) -> None:
    assert f"[default: ({Settings.vram_gb})]" in " ".join(lora("finetune", "--help").out.split())


def test_every_flag_that_memory_depends_on_reaches_the_plan(lora) -> None:
    settings = {
        "method": "lora",
        "rank": 8,
        "alpha": 4.0,
        "targets": "attention",
        "num_classes": 3,
        "device": "cuda",
        "dtype": "bfloat16",
        "batch_size": 4,
        "max_seq_len": 100,
        "grad_accum": 2,
        "epochs": 7,
        "learning_rate": 0.001,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    outcome = lora(
        "finetune", "--plan", "--model-size", "1.5B", "--vram", "12", "--no-head-bias", "--json", *flags
    )
    expected = plan("1.5b", vram_gb=12.0, head_bias=False, task="classify", **settings).as_dict()
    assert outcome.document == {"status": "planned"} | expected


def test_text_has_the_two_sections_and_a_verdict(lora) -> None:
    flags = ("finetune", "--plan", "--model-size", "9B", "--method", "lora")
    outcome = lora(*flags, "--vram", "64")
    assert outcome.exit_code == 0
    for said in (
        "4096h x 32L",
        "rank=16, alpha=32, 40 adapters",
        "6,946,816 stored, 6,160,384 trained",
        "4096->5 (20,485 params)",
        "RECOMMENDED CONFIGURATION",
        "MEMORY BREAKDOWN",
        "TOTAL:",
        "✓ Configuration fits in 64 GB memory",
    ):
        assert said in outcome.out
    small = lora(*flags, "--vram", "2", "--device", "cuda").out
    assert "⚠ Configuration requires" in small
    assert "of 2 GB VRAM can be used; try lower --max-seq-len" in small
    full = lora("finetune", "--plan", "--model-size", "9B", "--method", "full").out
    assert "LoRA:" not in full
    assert "try --method lora" in full


def test_a_folder_needs_no_more_than_its_config(lora, own_base) -> None:
    for file in own_base.iterdir():
        if file.name != "config.json":
            file.unlink()
    document = lora("finetune", own_base, "--plan", "--json").document
    assert (document["hidden_size"], document["weight_dtype"]) == (16, "float32")


def test_data_says_the_task_and_the_classes(lora, rows, texts, tmp_path) -> None:
    flags = ("finetune", "--model-size", "0.5B", "--plan", "--json")
    document = lora(*flags, "--data", rows).document
    assert (document["task"], document["num_classes"]) == ("classify", 2)
    assert lora(*flags, "--data", texts).document["task"] == "causal"
    assert lora(*flags, "--data", tmp_path / "nothing").exit_code == 3
    bad = write_jsonl(tmp_path / "bad.jsonl", [LABELLED[0], {"input": "x"}])
    outcome = lora(*flags, "--data", bad)
    assert outcome.exit_code == 5
    assert "line 2" in outcome.err


def test_a_full_command_line_can_be_planned_and_writes_nothing(lora, base, rows, tmp_path) -> None:
    outcome = lora(
        "finetune", base, "-d", rows, "-o", tmp_path / "run", "--patience", 3, "--plan", "--json", "-q"
    )
    assert outcome.exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        ([], 2),
        (["--model-size", "99B"], 2),
        (["./no-such-folder"], 3),
        (["no-such-folder"], 2),
        (["--model-size", "0.5B", "--vram", "0"], 2),
        (["--model-size", "0.5B", "--method", "lora", "--targets", "no_such"], 5),
        (["--model-size", "0.5B", "--method", "qlora"], 5),
        (["model.apr"], 3),
    ],
)
def test_what_cannot_be_planned(lora, arguments: list[str], exit_code: int) -> None:
    outcome = lora("finetune", "--plan", *arguments, "--json")
    assert (outcome.exit_code, outcome.document["exit_code"]) == (exit_code, exit_code)


def test_a_folder_of_another_size_than_named_is_refused(lora, base) -> None:
    outcome = lora("finetune", base, "--model-size", "0.5B", "--plan")
    assert outcome.exit_code == 5
    assert "hidden_size" in outcome.err


def test_no_packing_is_planned_too(lora) -> None:
    plan = lora("finetune", "--model-size", "0.5B", "--plan", "--no-packing", "--json").document
    assert plan["micro_batch_tokens"] == plan["max_seq_len"]
