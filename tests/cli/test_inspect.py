"""What a path is, told from its content."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from lora.io.apr import write_apr
from lora.model.loading import load
from tests.cli.conftest import CONFIG


def test_a_checkpoint(lora, base) -> None:
    document = lora("inspect", base, "--json").document
    parameters = load(base).parameters.weights
    assert (document["kind"], document["family"], document["layout"]) == ("checkpoint", "qwen2", "text")
    assert document["tensors"] == len(parameters)
    assert document["parameters"] == sum(array.size for array in parameters.values())
    assert document["dtypes"] == {"float32": len(parameters)}
    assert document["tied_embeddings"] is True
    assert {name: document[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers")} == {
        name: CONFIG[name] for name in ("hidden_size", "vocab_size", "num_hidden_layers")
    }
    assert document["files"] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    outcome = lora("inspect", base)
    for line in ("Kind:", "Hidden size:", "Tied embeddings:         yes", f"{document['parameters']:,}"):
        assert line in outcome.out


def test_an_adapter(lora, adapter, base) -> None:
    document = lora("inspect", adapter, "--json").document
    assert (document["kind"], document["base"], document["rank"], document["alpha"]) == (
        "adapter",
        str(base),
        16,
        32,
    )
    assert document["class_names"] == ["bad", "good"]
    assert sorted(document["target_modules"]) == ["q_proj", "v_proj"]
    assert document["tensors"] == 2 * 6 + 1


def test_a_run(lora, adapter, base) -> None:
    document = lora("inspect", adapter.parent, "--json").document
    assert (document["kind"], document["base"]) == ("run", str(base))
    assert document["states"] == ["best", "epoch-1"]


def test_a_run_is_written_as_a_person_would(lora, adapter) -> None:
    facts = json.loads((adapter.parent / "run.json").read_text())
    lines = dict(line.split(":", 1) for line in lora("inspect", adapter.parent).out.splitlines())
    [part] = facts["parts"]
    assert lines["Parts"].strip().startswith(f"from_step 0, data sha256 {part['data']['sha256']}, lora 0.")
    assert "epochs 1, learning_rate 0.1" in lines["Settings"]
    for value in lines.values():
        assert not re.search(r"[{}\[\]']|None|False|True", value)
    epochs = lora("inspect", adapter).out.partition("\nEpochs:")[2].partition("\n")[0]
    assert epochs.strip().startswith("epoch 1, train_loss ")


def test_parts_of_a_run_that_went_on_stand_apart(lora, adapter, tmp_path) -> None:
    facts = json.loads((adapter.parent / "run.json").read_text())
    parts = [{"from_step": 0, "GPU": None}, {"from_step": 5, "data": {"sha256": "ab"}}]
    (tmp_path / "run.json").write_text(json.dumps(facts | {"parts": parts}))
    out = lora("inspect", tmp_path).out
    assert re.search(r"^Parts: +from_step 0; from_step 5, data sha256 ab$", out, re.MULTILINE)
    assert re.search(r"^States: +none$", out, re.MULTILINE)


def test_a_recipe(lora, adapter, tmp_path) -> None:
    recipe = adapter.parent / "recipe.yaml"
    document = lora("inspect", recipe, "--json").document
    assert (document["kind"], document["epochs"], document["output"]) == ("recipe", 1, str(adapter.parent))
    assert re.search(r"^Learning rate: +0\.1$", lora("inspect", recipe).out, re.MULTILINE)
    (tmp_path / "own.yml").write_text("ranc: 4\n")
    outcome = lora("inspect", tmp_path / "own.yml")
    assert (outcome.exit_code, "did you mean rank?" in outcome.err) == (5, True)


def test_a_file_of_no_known_kind_is_told_which_are(lora, adapter, tmp_path) -> None:
    for path in (adapter.parent / "metrics.csv", adapter.parent / "run.json"):
        outcome = lora("inspect", path)
        assert (outcome.exit_code, outcome.err.count("\n")) == (5, 1)
        assert (
            "expected rows of data (JSON Lines), weights (.safetensors, .apr), a recipe (.yaml)"
            in outcome.err
        )
    mixed = tmp_path / "rows.jsonl"
    mixed.write_text('{"input": "a", "label": "b"}\n{"input"\n')
    assert "Invalid JSONL at line 2" in lora("inspect", mixed).err


def test_a_data_file(lora, rows) -> None:
    document = lora("inspect", rows, "--json").document
    assert (document["kind"], document["rows"]) == ("data", 20)
    assert document["fields"] == {"input": 20, "label": 20}
    assert document["classes"] == {"bad": 10, "good": 10}
    # "bad news, number 0" to "good news, number 19"
    assert document["characters"] == {"shortest": 18, "median": 19, "longest": 20}


def test_a_data_file_of_many_classes_is_cut_and_counted(lora, tmp_path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"input": "x", "label": {i}}}\n' for i in range(25)))
    classes = lora("inspect", data, "--json").document["classes"]
    assert len(classes) == 21
    assert classes["5 more"] == 5


def test_a_weights_file(lora, base) -> None:
    document = lora("inspect", base / "model.safetensors", "--json").document
    assert document["kind"] == "weights"
    assert "model.norm.weight" in document["names"]
    assert document["tensors"] == len(document["names"])


@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_none_of_these(lora, tmp_path, as_json: bool) -> None:
    flags = ["--json"] if as_json else []
    assert lora("inspect", tmp_path / "nothing", *flags).exit_code == 3
    assert lora("inspect", tmp_path, *flags).exit_code == 6
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    assert lora("inspect", tmp_path / "a.bin", *flags).exit_code == 5
    (tmp_path / "a.safetensors").write_bytes(b"\xff\xfe")
    assert lora("inspect", tmp_path / "a.safetensors", *flags).exit_code == 4


def test_an_apr_file(lora, tmp_path) -> None:
    path = tmp_path / "model.apr"
    tensors = {"b": np.zeros((2, 3), np.float32), "a": np.zeros(4, np.float16)}
    write_apr(path, {"architecture": "qwen2", "hidden_size": 3, "vocabulary": ["x"]}, tensors)
    document = lora("inspect", path, "--json").document
    assert (document["kind"], document["tensors"], document["parameters"]) == ("APR v2", 2, 10)
    assert document["dtypes"] == {"float16": 1, "float32": 1}
    assert document["names"] == ["a", "b"]
    assert document["metadata"] == {"architecture": "qwen2", "hidden_size": 3}
    assert document["other_metadata"] == ["vocabulary"]
    assert "architecture qwen2" in lora("inspect", path).out


def test_a_corrupt_apr_file_is_refused_in_one_line(lora, tmp_path) -> None:
    path = tmp_path / "model.apr"
    write_apr(path, {}, {"a": np.zeros(4, np.float32)})
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    outcome = lora("inspect", path)
    assert (outcome.exit_code, outcome.err.count("\n")) == (4, 1)
    assert "CRC-32" in outcome.err


def test_rows_are_read_as_a_task_s(lora, rows, texts) -> None:
    document = lora("inspect", "data", rows, "--json").document
    assert (document["task"], document["rows"], document["path"]) == ("classify", 20, str(rows))
    assert lora("inspect", "data", texts, "--json").document["task"] == "causal"
    outcome = lora("inspect", "data", texts, "--task", "instruct")
    assert outcome.exit_code == 5
    assert "12 problems" in outcome.err
    assert "line 1: expected messages" in outcome.err


def test_a_folder_named_data_is_a_path(lora, base, tmp_path, monkeypatch) -> None:
    shutil.copytree(base, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert lora("inspect", "data", "--json").document["kind"] == "checkpoint"
    assert lora("inspect", "data", "data").exit_code == 3  # a folder is no file of rows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "base"), "lora inspect data"),
        (("--task", "causal"), "lora inspect data"),
        (("second",), "or `data FILE`"),
        (("--rows", "2"), "belong to --model"),
    ],
)
def test_data_s_own_options_name_its_spelling(lora, texts, arguments, said: str) -> None:
    outcome = lora("inspect", texts, *arguments)
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert said in outcome.err
