"""Training from the command line: what is written, what is said, what is refused, and in which order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lora.cli.finetune import finetune as command
from lora.io.peft import load_adapter
from lora.io.safetensors_file import read_tensors, write_tensors
from lora.train.config import FinetuneConfig
from tests.data.files import write_jsonl

QUICK = ("--method", "lora", "--epochs", "2", "--batch-size", "8")
# what scripts read, by the seed's names
KEYS = {
    "status",
    "best_epoch",
    "best_val_loss",
    "stopped_early",
    "total_epochs",
    "total_time_ms",
    "checkpoint_dir",
    "checkpoint_format",
    "epoch_metrics",
    "final_loss",
    "wall_time_sec",
    "tokens_per_sec",
    "samples_per_sec",
}
TIMES = {"total_time_ms", "wall_time_sec", "tokens_per_sec", "samples_per_sec"}
EPOCH_KEYS = {
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "epoch_time_ms",
    "samples_per_sec",
}


def test_a_run_ends_with_a_table_and_what_to_do_next(lora, base, rows, tmp_path) -> None:
    outcome = lora("finetune", base, "--data", rows, "-o", tmp_path / "run", *QUICK)
    assert outcome.exit_code == 0
    header = next(line for line in outcome.out.splitlines() if line.startswith("Epoch"))
    assert header.split("  ")[0] == "Epoch"
    for column in ("Train Loss", "Val Loss", "Train Acc", "Val Acc", "LR", "Time (ms)"):
        assert column in header
    marked = [line.split()[0] for line in outcome.out.splitlines() if line[:1].isdigit()]
    assert [mark.rstrip("*") for mark in marked] == ["1", "2"]
    assert sum(mark.endswith("*") for mark in marked) == 1
    assert f"lora eval {tmp_path / 'run' / 'best'}" in outcome.out
    assert f"lora report {tmp_path / 'run'}\n" in outcome.out
    assert f"lora merge --adapter {tmp_path / 'run' / 'best'}" in outcome.out
    for said in ("Task:", "classify", "bad, good", "16 to train on, 4 to validate", "step 1/4", "epoch 2"):
        assert said in outcome.err
    assert "host memory" not in outcome.err
    # mean pooling and a bias, the defaults, are what Transformers has no place for
    assert "\nnote: Transformers" in outcome.err
    assert load_adapter(tmp_path / "run" / "best")[0].r == 16


def test_json_is_all_of_stdout_and_has_the_keys_that_scripts_read(lora, base, rows, tmp_path) -> None:
    outcome = lora("finetune", base, "--data", rows, "-o", tmp_path / "run", *QUICK, "--json")
    document = outcome.document
    assert document.keys() >= KEYS
    assert document["status"] == "training_complete"
    assert document["total_epochs"] == len(document["epoch_metrics"]) == 2
    assert document["epoch_metrics"][0].keys() >= EPOCH_KEYS
    assert document["wall_time_sec"] == pytest.approx(document["total_time_ms"] / 1000)
    assert document["best_val_loss"] == min(epoch["val_loss"] for epoch in document["epoch_metrics"])
    assert document["base_model"] == str(base)


def test_quiet_says_only_what_must_be_known(lora, base, rows, tmp_path) -> None:
    last = ("--pooling", "last", "--no-head-bias")
    assert lora("finetune", base, "-d", rows, "-o", tmp_path / "a", *QUICK, "-q", *last).err == ""
    outcome = lora(
        "finetune", base, "-d", rows, "-o", tmp_path / "b", *QUICK, "-q", *last, "--max-seq-len", "9"
    )
    assert outcome.err == "note: 20 texts are longer than 9 tokens and keep their head\n"


def test_every_setting_of_a_run_is_an_option_with_its_default() -> None:
    options = {option.name: option.default for option in command.params}
    defaults = vars(FinetuneConfig())
    assert {name: options[name] for name in defaults} == defaults


# a value for each option that is not its default, and the setting that it must become in the run's own record
VALUES = {
    "--task": ("classify", "classify"),
    "--method": ("lora", "lora"),
    "--rank": ("3", 3),
    "--alpha": ("5", 5.0),
    "--targets": ("q_proj,o_proj", ["q_proj", "o_proj"]),
    "--epochs": ("1", 1),
    "--learning-rate": ("0.01", 0.01),
    "--weight-decay": ("0.5", 0.5),
    "--batch-size": ("5", 5),
    "--max-seq-len": ("11", 11),
    "--grad-accum": ("2", 2),
    "--val-split": ("0.3", 0.3),
    "--patience": ("4", 4),
    "--warmup": ("0.2", 0.2),
    "--clip": ("2", 2.0),
    "--seed": ("7", 7),
    "--num-classes": ("2", 2),
    "--pooling": ("last", "last"),
    "--class-weights": ("uniform", "uniform"),
    "--label-smoothing": ("0.1", 0.1),
    "--save-steps": ("3", 3),
    "--save-every": ("2", 2),
    "--checkpoint-format": ("apr,safetensors", "apr,safetensors"),
    "--keep": ("2", 2),
    "--dtype": ("float64", "float64"),
    "--layout": ("text", "text"),
}


def test_every_option_reaches_the_run(lora, base, rows, tmp_path) -> None:
    arguments = [argument for option, (value, _) in VALUES.items() for argument in (option, value)]
    pytest.importorskip("tensorboardX")
    switches = ("--no-head-bias", "--no-packing", "--oversample", "--tensorboard")
    outcome = lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *arguments, *switches)
    assert outcome.exit_code == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    expected = {option[2:].replace("-", "_"): setting for option, (_, setting) in VALUES.items()}
    assert {name: settings[name] for name in expected} == expected
    assert settings["head_bias"] is settings["packing"] is False
    assert settings["oversample"] is settings["tensorboard"] is True
    switched = {"head_bias", "packing", "oversample", "tensorboard"}
    unproven = settings.keys() - expected.keys() - switched - {"model_size", "device"}
    assert not unproven, "a new setting needs a value above"


def test_a_causal_run_is_told_by_its_rows(lora, base, texts, tmp_path) -> None:
    document = lora("finetune", base, "-d", texts, "-o", tmp_path / "run", *QUICK, "--json").document
    assert (document["task"], document["class_names"]) == ("causal", [])


def test_with_neither_model_nor_data_the_embedded_ones_are_trained_and_named(
    lora, base, rows, tmp_path, monkeypatch
) -> None:
    embedded = {("demo", "base"): base, ("demo", "train.jsonl"): rows}
    monkeypatch.setattr("lora.assets.asset", lambda *parts: embedded[parts])
    outcome = lora("finetune", "--task", "classify", "-o", tmp_path / "run", *QUICK, "--json")
    assert outcome.exit_code == 0
    assert (outcome.document["base_model"], outcome.document["data"]) == (str(base), str(rows))
    assert "note: no MODEL and no --data" in outcome.err


def test_ctrl_c_saves_the_last_state_and_says_where(lora, base, rows, tmp_path, monkeypatch) -> None:
    def interrupt(self, event) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora.cli.progress.ProgressLines.step_done", interrupt)
    outcome = lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *QUICK, "--json")
    assert (outcome.exit_code, outcome.document["exit_code"]) == (130, 130)
    assert str(tmp_path / "run" / "last") in outcome.err
    assert "note: the same command with --resume goes on\n" in outcome.err
    assert load_adapter(tmp_path / "run" / "last")
    monkeypatch.undo()
    resumed = lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *QUICK, "--json", "--resume")
    assert resumed.document["total_epochs"] == 2
    assert "4 (1 of them done before)" in resumed.err
    again = lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *QUICK, "--json", "--resume")
    steady = {name: value for name, value in again.document.items() if name not in TIMES}
    assert steady == {name: resumed.document[name] for name in steady}


def test_nothing_to_resume_is_said_and_another_run_is_refused(lora, base, rows, tmp_path) -> None:
    run = ("finetune", base, "-d", rows, "-o", tmp_path / "run", *QUICK, "-q")
    assert "holds no run to resume: starting a new one" in lora(*run, "--resume").err
    outcome = lora(*run)
    assert (outcome.exit_code, outcome.out) == (5, "")
    assert "--resume" in outcome.err
    changed = lora(*run, "--resume", "--rank", "3")
    assert changed.exit_code == 5
    assert "settings rank: 16 then, 3 now" in changed.err


def test_on_a_terminal_a_bar_is_drawn(lora, base, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    outcome = lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *QUICK)
    assert outcome.exit_code == 0
    # epoch, bar, steps, loss, learning rate, speed, peak memory, time left
    state = r"loss \d+\.\d{4}  lr \d\.\d\de-\d\d  [\d,]+ tokens/s  [\d.]+ [MG]B \d+:\d\d:\d\d"
    assert re.search(rf"epoch 2 \S+ +4/4 {state}", re.sub(r"\x1b\[[\d;?]*\w", "", outcome.err))
    assert "epoch 2: train loss" in outcome.err


def test_what_is_not_built_is_refused_by_name(lora) -> None:
    outcome = lora("finetune", "--method", "qlora", "--data", "none.jsonl")
    assert outcome.exit_code == 5
    assert "qlora" in outcome.err
    assert "not built" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["base"],
        ["--task", "causal"],
        ["--task", "classify", "--data", "rows.jsonl"],
        ["--task", "classify", "--model-size", "0.5B"],
        ["base", "--data", "rows.jsonl", "--vram", "24"],
        ["base", "--data", "rows.jsonl", "--epochs", "0"],
        ["base", "--data", "rows.jsonl", "--save-steps", "0"],
        ["base", "--data", "rows.jsonl", "--allow-data-mismatch"],
        ["base", "--plan", "--resume"],
        ["base", "--data", "rows.jsonl", "--task", "sort"],
        ["--model-size", "0.6B", "--data", "rows.jsonl"],
        ["base", "--model-size", "0.6B", "--data", "rows.jsonl"],
    ],
)
def test_a_command_that_says_too_little_or_wrong_is_2(lora, arguments: list[str]) -> None:
    assert lora("finetune", *arguments).exit_code == 2


def test_a_published_size_without_a_network_says_how_to_fetch_it(lora, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    outcome = lora("finetune", "--model-size", "0.5b", "-d", rows, "-o", tmp_path / "run")
    assert outcome.exit_code == 6
    assert "hf download Qwen/Qwen2.5-Coder-0.5B" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_size_than_named_is_refused(lora, base, rows, tmp_path) -> None:
    outcome = lora("finetune", base, "--model-size", "0.5B", "-d", rows, "-o", tmp_path / "run")
    assert outcome.exit_code == 5
    assert "hidden_size" in outcome.err


# each is wrong on its own; `test_checks_come_in_order` breaks a case and all that are checked after it
def break_nothing(base: Path, rows: Path) -> list[str]:
    return []


def break_flags(base: Path, rows: Path) -> list[str]:
    return ["--rank", "0"]


def break_existence(base: Path, rows: Path) -> list[str]:
    rows.unlink(missing_ok=True)
    return []


def break_rows(base: Path, rows: Path) -> list[str]:
    write_jsonl(rows, [{"input": "a", "label": "b"}, {"input": "a"}, {"input": 3, "label": "b"}])
    return []


def break_config(base: Path, rows: Path) -> list[str]:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    return []


def break_tokenizer(base: Path, rows: Path) -> list[str]:
    (base / "tokenizer.json").unlink()
    return []


def break_weights(base: Path, rows: Path) -> list[str]:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    return []


ORDER = [
    (break_flags, 2, "rank"),
    (break_existence, 3, "rows.jsonl"),
    (break_rows, 5, "line 2"),
    (break_config, 5, "num_attention_heads"),
    (break_tokenizer, 6, "tokenizer.json"),
    (break_weights, 4, "model.safetensors"),
]


@pytest.mark.parametrize("first", range(len(ORDER)), ids=[case[0].__name__ for case in ORDER])
def test_checks_come_in_order_and_nothing_is_written_before_they_pass(
    lora, own_base, rows, tmp_path, first: int
) -> None:
    own_rows = tmp_path / "rows.jsonl"
    own_rows.write_bytes(rows.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    # the last first, so that a file that is missing stays missing
    arguments = [
        argument for breaks, _, _ in reversed(ORDER[first:]) for argument in breaks(own_base, own_rows)
    ]
    outcome = lora("finetune", own_base, "--data", own_rows, "-o", tmp_path / "run", *arguments)
    assert (outcome.exit_code, outcome.out) == (ORDER[first][1], "")
    assert ORDER[first][2] in outcome.err
    assert set(tmp_path.rglob("*")) <= set(before)


def test_a_run_that_diverges_says_where_and_what_to_lower(lora, base, rows, tmp_path) -> None:
    run = (
        "finetune",
        base,
        "-d",
        rows,
        "-o",
        tmp_path / "run",
        *QUICK,
        "--pooling",
        "last",
        "--no-head-bias",
    )
    outcome = lora(*run, "-q", "--learning-rate", "1e38", "--json")
    assert (outcome.exit_code, outcome.document["exit_code"], outcome.err.count("\n")) == (5, 5, 1)
    place = r"(loss is nan|gradient is not finite): first .*model\.layers\.\d"
    assert re.search(
        rf"error: step [23]: (a|the) {place}.*; lower learning_rate, which is 1e\+38, "
        r"and begin anew in another output\n",
        outcome.err,
    )


def test_a_base_that_is_not_finite_is_told_from_a_run_that_diverges(lora, own_base, rows, tmp_path) -> None:
    weights = read_tensors(own_base / "model.safetensors")
    broken = weights | {"model.norm.weight": weights["model.norm.weight"] * np.float32("nan")}
    write_tensors(tmp_path / "broken", broken, {"format": "pt"})
    (tmp_path / "broken").replace(own_base / "model.safetensors")
    outcome = lora("finetune", own_base, "-d", rows, "-o", tmp_path / "run", *QUICK, "--pooling", "last")
    assert outcome.exit_code == 5
    assert "error: step 1: the loss is nan: first " in outcome.err
    assert "; nothing is trained yet: check the base's weights, and dtype, which is float32\n" in outcome.err


def test_a_class_without_a_row_is_said(lora, base, tmp_path) -> None:
    rows = [{"input": f"text {i}", "label": (0, 1, 5)[i % 3]} for i in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = ("finetune", base, "-d", data, "-o", tmp_path / "run", *QUICK, "-q", "--pooling", "last")
    said = f"note: {data}: classes 2, 3, 4 have no row, of 6"
    for more in (("--no-head-bias", "--json"), ("--plan", "--json")):
        outcome = lora(*run, *more)
        assert outcome.exit_code == 0
        assert outcome.err.startswith(said)
        assert outcome.err.count("\n") == 1
        assert outcome.document["status"] in ("training_complete", "planned")


def test_all_bad_rows_are_listed(lora, base, tmp_path) -> None:
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"input": "a", "label": "b"}, "{", {"input": "a", "label": None}]
    )
    outcome = lora("finetune", base, "-d", data, "-o", tmp_path / "run")
    assert outcome.exit_code == 5
    assert "line 2" in outcome.err
    assert "line 3" in outcome.err


def test_a_folder_that_cannot_be_written_is_7(lora, base, rows, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = lora("finetune", base, "-d", rows, "-o", tmp_path / "file" / "run", *QUICK)
    assert outcome.exit_code == 7
    assert (tmp_path / "file").read_text() == "in the way"
