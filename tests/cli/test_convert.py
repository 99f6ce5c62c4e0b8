"""Between folders and APR files: every bit kept, and nothing written where it should not be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora.io.apr import read_apr, write_apr
from lora.io.safetensors_file import read_tensors
from lora.model.loading import load
from tests.harness.models import FAMILIES, write_model

IDS = np.arange(12).reshape(1, 12)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_tensors(a: Path, b: Path) -> bool:
    one, other = read_tensors(a), read_tensors(b)
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].tobytes() == other[n].tobytes() for n in one
    )


def test_a_model_comes_back_bit_for_bit(lora, base, tmp_path) -> None:
    apr, back, again = (tmp_path / name for name in ("model.apr", "back", "again.apr"))
    document = lora("convert", base, apr, "--json").document
    assert document == {"status": "converted", "source": str(base), "target": str(apr)}
    assert lora("convert", apr, back).exit_code == 0
    assert contents(back) == contents(base)
    assert lora("convert", back, again).exit_code == 0
    assert again.read_bytes() == apr.read_bytes()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_both_families_keep_dtype_and_meaning(lora, tmp_path, family: str) -> None:
    folder = write_model(tmp_path / "base", FAMILIES[family], dtype=np.float16)
    assert lora("convert", folder, tmp_path / "m.apr").exit_code == 0
    metadata = read_apr(tmp_path / "m.apr").metadata
    assert (metadata["architecture"], metadata["hidden_size"], metadata["num_layers"]) == (family, 16, 3)
    assert lora("convert", tmp_path / "m.apr", tmp_path / "back").exit_code == 0
    assert same_tensors(folder / "model.safetensors", tmp_path / "back" / "model.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "back")(IDS), load(folder)(IDS))


def test_an_adapter_comes_back_bit_for_bit(lora, adapter, tmp_path) -> None:
    apr, back = tmp_path / "adapter.apr", tmp_path / "back"
    assert lora("convert", adapter, apr).exit_code == 0
    metadata, tensors = read_apr(apr)
    assert (metadata["model_type"], metadata["lora_rank"], metadata["lora_alpha"]) == ("adapter", 16, 32)
    assert tensors["lora.0.q_proj.lora_a"].shape == (16, 16)
    assert tensors["classifier.weight"].shape == (2, 16)
    assert not [name for name in tensors if name.startswith("base_model")]
    assert lora("convert", apr, back).exit_code == 0
    expected = contents(adapter)
    assert contents(back) == {name: expected[name] for name in contents(back)}
    assert {"adapter_config.json", "adapter_model.safetensors", "lora_metadata.json"} <= contents(back).keys()
    np.testing.assert_array_equal(load(back)(IDS), load(adapter)(IDS))


def test_a_file_without_our_config_is_read_by_its_sizes(lora, base, tmp_path) -> None:
    assert lora("convert", base, tmp_path / "ours.apr").exit_code == 0
    metadata, tensors = read_apr(tmp_path / "ours.apr")
    tokenizer = metadata.pop("files")["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    write_apr(tmp_path / "plain.apr", metadata, tensors)
    assert lora("convert", tmp_path / "plain.apr", tmp_path / "back").exit_code == 0
    np.testing.assert_array_equal(load(tmp_path / "back")(IDS), load(base)(IDS))
    assert (tmp_path / "back" / "tokenizer.json").read_text(encoding="utf-8") == tokenizer
    del metadata["num_layers"], metadata["rope_theta"]
    write_apr(tmp_path / "poor.apr", metadata, tensors)
    outcome = lora("convert", tmp_path / "poor.apr", tmp_path / "none")
    assert (outcome.exit_code, outcome.err.count("\n")) == (4, 1)
    assert "num_layers, rope_theta" in outcome.err


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "/evil",
        "..",
        "evil.py",
        "a/tokenizer.json",
        "tokenizer/x",
        "tokenizer\0",
        "tokenizer" * 50,
    ],
)
def test_no_file_is_written_outside_the_folder(lora, base, tmp_path, name: str) -> None:
    assert lora("convert", base, tmp_path / "ours.apr").exit_code == 0
    metadata, tensors = read_apr(tmp_path / "ours.apr")
    metadata["files"][name] = "{}"
    write_apr(tmp_path / "evil.apr", metadata, tensors)
    before = sorted(tmp_path.rglob("*"))
    outcome = lora("convert", tmp_path / "evil.apr", tmp_path / "out")
    assert (outcome.exit_code, outcome.err.count("\n")) == (4, 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_half_of_a_surrogate_pair_is_no_text(lora, base, tmp_path) -> None:
    assert lora("convert", base, tmp_path / "ours.apr").exit_code == 0
    metadata, tensors = read_apr(tmp_path / "ours.apr")
    metadata["files"]["chat_template.jinja"] = "@ud800"
    write_apr(tmp_path / "evil.apr", metadata, tensors)
    raw = (tmp_path / "evil.apr").read_bytes().replace(b"@ud800", rb"\ud800")
    (tmp_path / "evil.apr").write_bytes(raw[:-4])
    assert lora("convert", tmp_path / "evil.apr", tmp_path / "out").exit_code == 4


def test_one_tensor_under_two_names_is_refused(lora, adapter, tmp_path) -> None:
    assert lora("convert", adapter, tmp_path / "ours.apr").exit_code == 0
    metadata, tensors = read_apr(tmp_path / "ours.apr")
    tensors["base_model.model.score.weight"] = tensors["classifier.weight"]
    write_apr(tmp_path / "twice.apr", metadata, tensors)
    outcome = lora("convert", tmp_path / "twice.apr", tmp_path / "out")
    assert (outcome.exit_code, (tmp_path / "out").exists()) == (4, False)


@pytest.mark.parametrize("broken", ["missing", "misshapen", "nan"])
def test_what_is_not_whole_writes_nothing(lora, adapter, base, tmp_path, broken: str) -> None:
    source = adapter if broken == "nan" else base
    assert lora("convert", source, tmp_path / "whole.apr").exit_code == 0
    metadata, tensors = read_apr(tmp_path / "whole.apr")
    name = next(iter(tensors))
    if broken == "missing":
        del tensors[name]
    elif broken == "misshapen":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name] = np.full_like(tensors[name], np.nan)
    write_apr(tmp_path / "broken.apr", metadata, tensors)
    outcome = lora("convert", tmp_path / "broken.apr", tmp_path / "out")
    assert outcome.exit_code in (5, 6)
    assert not (tmp_path / "out").exists()


def test_usage(lora, base, tmp_path) -> None:
    (tmp_path / "there.apr").touch()
    for arguments, exit_code in (
        ((base, tmp_path / "folder"), 2),
        (("a.apr", "b.apr"), 2),
        ((base, tmp_path / "there.apr"), 2),
        ((tmp_path / "none.apr", tmp_path / "out"), 3),
        ((tmp_path / "there.apr", tmp_path / "out"), 4),
    ):
        assert lora("convert", *arguments).exit_code == exit_code
