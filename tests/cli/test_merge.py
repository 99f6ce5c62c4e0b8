"""Merging from the command line: three spellings, one result, and nothing of the inputs overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lora.model.loading import load
from lora.train.finetune import finetune

IDS = np.arange(24).reshape(2, 12)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("spelling", [["merge"], ["finetune", "merge"], ["finetune", "--merge"]])
def test_the_merge_computes_what_the_adapter_computed(
    lora, base, adapter, tmp_path, spelling: list[str]
) -> None:
    before = snapshot(base) | snapshot(adapter)
    outcome = lora(*spelling, base, "--adapter", adapter, "-o", tmp_path / "merged", "--json")
    assert (outcome.exit_code, outcome.err) == (0, "")
    document = outcome.document
    assert (document["status"], document["rank"], document["alpha"]) == ("merged", 16, 32)
    assert (document["merged_layers"], document["total_layers"]) == (6, 21)
    assert document["output_size"] == (tmp_path / "merged" / "model.safetensors").stat().st_size
    adapted, merged, plain = (load(folder) for folder in (adapter, tmp_path / "merged", base))
    np.testing.assert_allclose(merged(IDS), adapted(IDS), atol=1e-5)
    assert document["max_logit_difference"] < 1e-5
    assert merged.head.class_names == ("bad", "good")
    assert not np.array_equal(
        merged.parameters["model.layers.0.self_attn.q_proj.weight"],
        plain.parameters["model.layers.0.self_attn.q_proj.weight"],
    )
    assert snapshot(base) | snapshot(adapter) == before


def test_without_a_model_the_adapter_names_its_base(lora, base, adapter, tmp_path) -> None:
    outcome = lora("merge", "--adapter", adapter, "-o", tmp_path / "merged")
    assert outcome.exit_code == 0
    for said in (
        str(base),
        "rank 16, alpha 32",
        "6 of 21",
        "Max |logit difference|",
        str(tmp_path / "merged"),
    ):
        assert said in outcome.out


def test_a_base_that_has_moved_is_given_by_hand(lora, own_base, adapter, tmp_path) -> None:
    outcome = lora("merge", own_base, "--adapter", adapter, "-o", tmp_path / "merged", "--json")
    assert outcome.document["base_model"] == str(own_base)


def test_a_head_that_transformers_reads_otherwise_is_told(lora, base, rows, tmp_path) -> None:
    mean_pooled = finetune(base, rows, output=tmp_path / "run", method="lora", epochs=1).best
    outcome = lora("merge", "--adapter", mean_pooled, "-o", tmp_path / "merged", "--json")
    assert outcome.document["status"] == "merged"
    assert outcome.err.startswith("note: Transformers")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_the_inputs_are_never_overwritten(lora, own_base, adapter, tmp_path, what: str) -> None:
    own_adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    target = {"base": own_base, "adapter": own_adapter}[what]
    (tmp_path / "link").symlink_to(target)
    before = snapshot(target)
    for output in (target, tmp_path / "link", target / ".." / target.name):
        outcome = lora("merge", own_base, "--adapter", own_adapter, "-o", output)
        assert outcome.exit_code == 2
        assert f"is the {what} itself" in outcome.err
    assert snapshot(target) == before


def test_a_merge_is_not_put_beside_an_adapter(lora, adapter, tmp_path) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    before = snapshot(other)
    assert lora("merge", "--adapter", adapter, "-o", other).exit_code == 2
    assert snapshot(other) == before


def test_what_lies_in_the_output_is_never_overwritten(lora, own_base, base, adapter, tmp_path) -> None:
    (tmp_path / "merged.apr").write_bytes(b"mine")
    only_tokenizer = tmp_path / "only-tokenizer"
    only_tokenizer.mkdir()
    (only_tokenizer / "tokenizer.json").write_text("{}")
    before = snapshot(tmp_path)
    for output, said in (
        (own_base, "holds config.json, model.safetensors, tokenizer.json, tokenizer_config.json"),
        (only_tokenizer, "holds tokenizer.json"),
        (tmp_path / "merged.apr", "exists already"),
    ):
        outcome = lora("merge", base, "--adapter", adapter, "-o", output)
        assert outcome.exit_code == 2
        assert (
            f"--output {output} {said}, which a merge does not overwrite; name another output" in outcome.err
        )
    assert snapshot(tmp_path) == before


def test_a_folder_with_the_name_of_an_apr_file_is_no_output(lora, adapter, tmp_path) -> None:
    (tmp_path / "merged.apr").mkdir()
    outcome = lora("merge", "--adapter", adapter, "-o", tmp_path / "merged.apr")
    assert outcome.exit_code == 2
    assert "is a folder with the name of an APR file" in outcome.err
    assert list((tmp_path / "merged.apr").iterdir()) == []


def test_other_files_in_the_output_stay(lora, adapter, tmp_path) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert lora("merge", "--adapter", adapter, "-o", output).exit_code == 0
    assert (output / "notes.txt").read_text() == "mine"
    assert load(output).is_classifier
    whole = snapshot(output)
    assert lora("merge", "--adapter", adapter, "-o", output).exit_code == 2
    assert snapshot(output) == whole


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["merge", "base", "-o", "out"], 2),
        (["merge", "--adapter", "adapter"], 2),
        (["finetune", "--merge", "--adapter", "adapter", "-o", "out", "--epochs", "3"], 2),
        (["merge", "--adapter", "./no-such-folder", "-o", "out"], 3),
        (["merge", "./no-such-folder", "--adapter", "adapter", "-o", "out"], 3),
        (["merge", "--adapter", "base", "-o", "out"], 3),
        (["merge", "--adapter", "./no-such.apr", "-o", "out"], 3),
        (["merge", "--adapter", "broken.apr", "-o", "out.apr"], 4),
        (["merge", "broken.apr", "--adapter", "adapter", "-o", "out"], 4),
    ],
)
def test_what_cannot_be_merged_writes_nothing(
    lora, base, adapter, tmp_path, monkeypatch, arguments: list[str], exit_code: int
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "broken.apr").write_bytes(b"APR\0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = snapshot(tmp_path)
    assert lora(*arguments).exit_code == exit_code
    assert snapshot(tmp_path) == before
