"""Checkpoints as Transformers writes them, damaged ones, and our own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora import spec
from lora.errors import ContractError, FileFormatError, LoadError, MissingFileError
from lora.io.checkpoint import INDEX, SINGLE, load_weights, open_checkpoint
from lora.io.safetensors_file import Deferred, read_tensors, write_tensors
from lora.io.save_checkpoint import save_checkpoint
from tests.spec.configs import shaped

GOLDEN = Path(__file__).parents[1] / "golden"
PT = {"format": "pt"}
Weights = dict[str, np.ndarray]


def golden(case: str) -> tuple[dict[str, Any], Weights]:
    with np.load(GOLDEN / f"{case}.npz") as file:
        weights = {name.removeprefix("weight/"): file[name] for name in file if name.startswith("weight/")}
        return json.loads(str(file["config"])), weights


def random_weights(shapes: dict[str, Any], dtype: Any = "f4") -> Weights:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def expected_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return spec.tensor_shapes(open_checkpoint(folder).spec)


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == expected[k].dtype and found[k].tobytes() == expected[k].tobytes() for k in expected
    )


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Path, dict[str, Any], Weights]:
    """A tied checkpoint in one file."""
    config, weights = golden("qwen2_qv")
    assert config["tie_word_embeddings"]
    save_checkpoint(tmp_path / "model", weights, config)
    return tmp_path / "model", config, weights


@pytest.mark.parametrize("case", ["qwen2_qv", "qwen2_all_linear", "qwen2_patterns", "qwen2_full"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1])
def test_weights_come_back_whole_from_any_number_of_files(
    tmp_path: Path, case: str, shard_bytes: int
) -> None:
    config, weights = golden(case)
    save_checkpoint(tmp_path / "m", weights, config, shard_bytes=shard_bytes)
    found = open_checkpoint(tmp_path / "m")
    assert same(load_weights(found, spec.tensor_shapes(found.spec)), weights)
    assert found.config == config
    assert (found.layout, found.skipped) == ("text", {})
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert (files == [SINGLE]) == (shard_bytes == 10**9)


def test_shards_hold_what_their_index_says_and_no_more_than_they_may(tmp_path: Path) -> None:
    config, weights = golden("qwen2_all_linear")
    save_checkpoint(tmp_path, weights, config, shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    held = {file: read_tensors(tmp_path / file) for file in set(index["weight_map"].values())}
    assert {name: file for file, tensors in held.items() for name in tensors} == index["weight_map"]
    assert all(
        sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1 for tensors in held.values()
    )
    count = len(held)
    assert sorted(held) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ml_dtypes.bfloat16])
def test_the_stored_dtype_is_kept(tmp_path: Path, dtype: Any) -> None:
    config, weights = golden("qwen2_qv")
    narrow = {name: array.astype(dtype) for name, array in weights.items()}
    dtypes = {name: np.dtype(dtype) for name in weights}
    save_checkpoint(tmp_path / "given", narrow, config)
    save_checkpoint(tmp_path / "asked", weights, config, dtypes=dtypes)
    for folder in (tmp_path / "given", tmp_path / "asked"):
        assert same(load_weights(open_checkpoint(folder), expected_of(folder)), narrow)


def test_every_problem_of_the_tensors_is_in_one_error(tied: tuple[Path, dict[str, Any], Weights]) -> None:
    folder, config, weights = tied
    del weights["model.norm.weight"], weights["model.layers.1.self_attn.k_proj.bias"]
    weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((3, 3), "f4")
    weights["model.layers.0.self_attn.o_proj.weight"] = np.zeros((5, 32), "f4")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].astype("i4")
    save_checkpoint(folder, weights, config)
    with pytest.raises(LoadError) as caught:
        load_weights(open_checkpoint(folder), expected_of(folder))
    message = str(caught.value)
    missing = re.search(r"missing: (.*?);", message)
    assert missing
    assert set(missing[1].split(", ")) == {"model.norm.weight", "model.layers.1.self_attn.k_proj.bias"}
    assert "not expected: model.layers.2.mlp.up_proj.weight" in message
    assert "model.layers.0.self_attn.o_proj.weight [5, 32], expected [32, 32]" in message
    assert "model.embed_tokens.weight int32" in message


def test_a_config_that_contradicts_the_tensors_is_refused(tied: tuple[Path, dict[str, Any], Weights]) -> None:
    folder, config, weights = tied
    save_checkpoint(folder, weights, config | {"intermediate_size": 45})
    with pytest.raises(LoadError, match=r"gate_proj\.weight \[44, 32\], expected \[45, 32\]"):
        load_weights(open_checkpoint(folder), expected_of(folder))


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(
    tied: tuple[Path, dict[str, Any], Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.io.checkpoint._COMPARED_ROWS", 8)
    folder, config, weights = tied
    head = weights["model.embed_tokens.weight"].copy()
    save_checkpoint(folder, weights | {"lm_head.weight": head}, config)
    assert same(load_weights(open_checkpoint(folder), expected_of(folder)), weights)
    head[-1, -1] += 1e-3
    save_checkpoint(folder, weights | {"lm_head.weight": head}, config)
    with pytest.raises(LoadError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_weights(open_checkpoint(folder), expected_of(folder))


def test_optional_tensors_may_be_absent_or_present(tmp_path: Path) -> None:
    config, weights = golden("qwen2_classifier")
    save_checkpoint(tmp_path, weights, config)
    optional = {"lm_head.weight", "score.weight", "score.bias"}
    expected = spec.tensor_shapes(spec.read_spec(config))
    assert "lm_head.weight" in expected
    assert same(load_weights(open_checkpoint(tmp_path), expected, optional), weights)
    with pytest.raises(LoadError, match=r"missing: lm_head\.weight; not expected: score\.weight"):
        load_weights(open_checkpoint(tmp_path), expected)


MULTIMODAL = next(entry for entry in shaped("qwen3_5") if "text_config" in entry["config"])


def test_the_multimodal_layout_is_read_by_canonical_names_and_saved_as_it_was(tmp_path: Path) -> None:
    stored = random_weights(MULTIMODAL["tensors"] | {"mtp.fc.weight": [3, 5]}, ml_dtypes.bfloat16)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_tensors(source / SINGLE, stored, PT)
    (source / "config.json").write_text(json.dumps(MULTIMODAL["config"]))
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "preprocessor_config.json",
    ):
        (source / name).write_text(name)
    (source / "pytorch_model.bin").write_text("not copied")

    found = open_checkpoint(source)
    weights = load_weights(found, spec.tensor_shapes(found.spec))
    assert found.layout == "multimodal"
    assert set(found.skipped) == {name for name in stored if "visual" in name or name.startswith("mtp.")}

    save_checkpoint(target, weights, found.config, source_folder=source)
    assert same(read_tensors(target / SINGLE), stored)
    assert sorted(path.name for path in target.iterdir()) == sorted(
        {path.name for path in source.iterdir()} - {"pytorch_model.bin"}
    )


def test_names_of_the_other_layout_are_left_over(tmp_path: Path) -> None:
    stored = random_weights(MULTIMODAL["tensors"])
    stored["model.norm.weight"] = stored["model.language_model.norm.weight"]
    write_tensors(tmp_path / SINGLE, stored, PT)
    (tmp_path / "config.json").write_text(json.dumps(MULTIMODAL["config"]))
    with pytest.raises(LoadError, match=r"not expected: model\.norm\.weight \(in layout multimodal\)"):
        load_weights(open_checkpoint(tmp_path), expected_of(tmp_path))


def test_a_checkpoint_can_be_saved_over_itself_while_it_is_mapped(
    tied: tuple[Path, dict[str, Any], Weights],
) -> None:
    folder, config, weights = tied
    (folder / "notes.txt").write_text("mine")
    mapped = load_weights(open_checkpoint(folder), expected_of(folder))
    save_checkpoint(folder, mapped, config, source_folder=folder, shard_bytes=20_000)
    assert not (folder / SINGLE).exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert same(load_weights(open_checkpoint(folder), expected_of(folder)), weights)
    assert same(mapped, weights)


def test_a_deferred_weight_is_stored_in_the_dtype_asked_for(
    tied: tuple[Path, dict[str, Any], Weights],
) -> None:
    folder, config, weights = tied
    name = "model.norm.weight"
    deferred = Deferred(weights[name].shape, np.dtype("f4"), lambda: weights[name])
    save_checkpoint(folder, weights | {name: deferred}, config, dtypes={name: "f2"})
    assert load_weights(open_checkpoint(folder), expected_of(folder))[name].dtype == np.float16


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_shard_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    config, weights = golden("qwen2_qv")
    folder = tmp_path_factory.mktemp("cut")
    save_checkpoint(folder, weights, config, shard_bytes=20_000)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    with shard.open("r+b") as file:
        file.truncate(int(share * shard.stat().st_size))
    with pytest.raises(FileFormatError, match=shard.name):
        open_checkpoint(folder)


def _index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "a shard is missing": (
        lambda f: [p.unlink() for p in sorted(f.glob("model-*"))[:2]],
        LoadError,
        r"model-00001-of-\d+\.safetensors, model-00002",
    ),
    "the index leaves a tensor out": (
        lambda f: _index(f, lambda i: i["weight_map"].pop(NORM)),
        LoadError,
        r"not in the index: model\.norm\.weight",
    ),
    "the index invents a tensor": (
        lambda f: _index(f, lambda i: i["weight_map"].update(ghost=i["weight_map"][NORM])),
        LoadError,
        r"not in model-\d+-of-\d+\.safetensors: ghost",
    ),
    "the index leads out of the folder": (
        lambda f: _index(f, lambda i: i["weight_map"].update({NORM: "../other/model.safetensors"})),
        FileFormatError,
        "weight_map",
    ),
    "the index is no map": (
        lambda f: _index(f, lambda i: i.update(weight_map=[])),
        FileFormatError,
        "weight_map",
    ),
    "the index is no JSON": (lambda f: (f / INDEX).write_text("{"), FileFormatError, "not JSON"),
    "there are no weights": (
        lambda f: (f / INDEX).rename(f / "pytorch_model.bin"),
        LoadError,
        "pytorch_model.bin",
    ),
    "there is no config": (lambda f: (f / "config.json").unlink(), LoadError, "holds no config.json"),
    "the config is a list": (lambda f: (f / "config.json").write_text("[]"), FileFormatError, "JSON object"),
    "the config breaks a rule": (
        lambda f: (f / "config.json").write_text('{"model_type": "qwen2"}'),
        ContractError,
        "rope_theta is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    config, weights = golden("qwen2_qv")
    save_checkpoint(tmp_path / "m", weights, config, shard_bytes=20_000)
    break_it, error, message = DAMAGES[damage]
    break_it(tmp_path / "m")
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path / "m")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")
