"""An APR file wherever a folder may stand: as a base, an adapter, what a merge writes; the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.io.apr import read_apr, write_apr
from lora.io.apr_folder import AprFolder
from lora.io.peft import load_adapter
from lora.io.safetensors_file import read_tensors
from lora.model.loading import load
from lora.train.finetune import finetune
from tests.harness.models import FAMILIES, write_model

IDS = np.arange(24).reshape(2, 12)
RUN = {"method": "lora", "epochs": 1, "learning_rate": 0.1, "pooling": "last", "head_bias": False}


@pytest.fixture(scope="module")
def base_apr(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apr") / "base.apr"
    load(base).save(path)
    return path


@pytest.fixture(scope="module")
def adapter_apr(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apr") / "adapter.apr"
    facts = json.loads((adapter / "lora_metadata.json").read_text())
    load(adapter).save_adapter(path, metadata=facts)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def roots(array: Any) -> Iterator[Any]:
    while array is not None:
        yield array
        array = getattr(array, "base", None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_is_the_same_from_either_and_is_not_copied(tmp_path, family: str) -> None:
    folder, path = write_model(tmp_path / "base", FAMILIES[family], dtype=np.float16), tmp_path / "base.apr"
    load(folder).save(path)
    model, expected = load(path), load(folder)
    assert (model.spec, model.base_name) == (expected.spec, str(path))
    np.testing.assert_array_equal(model(IDS), expected(IDS))
    for name, array in model.parameters.weights.items():
        assert any(isinstance(root, np.memmap) for root in roots(array)), name
        assert array.flags.aligned
        assert not array.flags.writeable


def test_what_the_api_writes_is_what_convert_writes(
    lora, base, adapter, base_apr, adapter_apr, tmp_path
) -> None:
    for source, written in ((base, base_apr), (adapter, adapter_apr)):
        converted = tmp_path / f"{source.name}.apr"
        assert lora("convert", source, converted).exit_code == 0
        assert converted.read_bytes() == written.read_bytes()


def test_training_from_either_gives_the_same_adapter(base_apr, adapter, rows, tmp_path) -> None:
    best = finetune(base_apr, rows, output=tmp_path / "run", **RUN).best
    name = "adapter_model.safetensors"
    assert (best / name).read_bytes() == (adapter / name).read_bytes()
    facts, expected = (json.loads((folder / "lora_metadata.json").read_text()) for folder in (best, adapter))
    assert facts["base"] == str(base_apr)
    assert f"lora convert {base_apr} base" in (best / "README.md").read_text()
    del facts["base"], expected["base"]
    assert facts == expected
    np.testing.assert_array_equal(load(best)(IDS), load(adapter)(IDS))


def test_a_run_is_resumed_unless_a_byte_of_its_file_changed(lora, base_apr, rows, tmp_path) -> None:
    path = Path(shutil.copyfile(base_apr, tmp_path / "base.apr"))
    run = ("finetune", path, "-d", rows, "-o", tmp_path / "run", "--epochs", 1, "-q")
    assert lora(*run).exit_code == 0
    assert lora(*run, "--resume").exit_code == 0
    metadata, tensors = read_apr(path)
    path.unlink()  # its pages are still mapped
    write_apr(path, metadata, tensors | {"model.norm.weight": 2 * tensors["model.norm.weight"]})
    outcome = lora(*run, "--resume")
    assert (outcome.exit_code, outcome.err.count("\n")) == (5, 1)
    assert "base base.apr:" in outcome.err


def test_every_command_reads_either(lora, base, base_apr, adapter, adapter_apr, rows, texts) -> None:
    def told(command: str, model: Path, *more: Any) -> Any:
        outcome = lora(command, model, *more, "--json")
        assert (outcome.exit_code, outcome.err) == (0, "")
        assert outcome.document.pop("model", str(model)) == str(model)
        return {name: value for name, value in outcome.document.items() if name != "model"}

    for command, more in (("eval", ("-d", rows)), ("predict", ("good news", "bad news"))):
        assert told(command, adapter_apr, *more) == told(command, adapter, *more)
        assert told(command, adapter_apr, *more, "--base", base_apr) == told(command, adapter, *more)
    for command, more in (("eval", ("-d", texts)), ("generate", ("a text", "--max-new-tokens", "3"))):
        assert told(command, base_apr, *more) == told(command, base, *more)
    plan = ("finetune", "--plan", "--json")
    assert lora(*plan, base_apr).document == lora(*plan, base).document


def test_a_merge_has_the_same_bytes_by_every_way(
    lora, base, base_apr, adapter, adapter_apr, tmp_path
) -> None:
    merged, converted = tmp_path / "merged", tmp_path / "converted.apr"
    assert lora("merge", base, "--adapter", adapter, "-o", merged).exit_code == 0
    assert lora("convert", merged, converted).exit_code == 0
    for number, (model, beside) in enumerate(
        [(base, adapter_apr), (base_apr, adapter), (base_apr, adapter_apr)]
    ):
        folder, path = tmp_path / f"{number}", tmp_path / f"{number}.apr"
        assert lora("merge", model, "--adapter", beside, "-o", folder).exit_code == 0
        assert files(folder) == files(merged)
        outcome = lora("merge", model, "--adapter", beside, "-o", path, "--json")
        assert (outcome.exit_code, outcome.document["output_size"]) == (0, path.stat().st_size)
        assert path.read_bytes() == converted.read_bytes()
    np.testing.assert_array_equal(load(path)(IDS), load(merged)(IDS))


def test_the_best_state_is_written_as_the_file_that_was_named(
    lora, base_apr, adapter, rows, tmp_path
) -> None:
    path = tmp_path / "tuned.apr"
    flags = ("--epochs", 1, "--learning-rate", 0.1, "--pooling", "last", "--no-head-bias")
    run = ("finetune", base_apr, "-d", rows, "-o", path, *flags)
    outcome = lora(*run)
    assert outcome.exit_code == 0
    assert f"lora merge --adapter {path} -o merged" in outcome.out
    assert {entry.name for entry in tmp_path.iterdir()} == {"tuned.apr", "tuned-run"}
    converted = tmp_path / "converted.apr"
    assert lora("convert", tmp_path / "tuned-run" / "best", converted).exit_code == 0
    whole = path.read_bytes()
    assert whole == converted.read_bytes()
    np.testing.assert_array_equal(load(path)(IDS), load(adapter)(IDS))
    assert lora(*run).exit_code == 5  # another run
    path.write_bytes(b"lost")
    document = lora(*run, "--resume", "--json").document
    assert document["apr_file"] == str(path)
    assert path.read_bytes() == whole
    shutil.rmtree(tmp_path / "tuned-run")
    for more in ((), ("--resume",)):  # whose file it is, nobody knows any more
        outcome = lora(*run, *more, "-q")
        assert (outcome.exit_code, path.read_bytes()) == (2, whole)
        assert not (tmp_path / "tuned-run").exists()


def test_each_of_several_adapters_may_be_a_file(lora, base_apr, rows, texts, tmp_path) -> None:
    pairs = ("--adapters", f"{rows}:{tmp_path / 'one.apr'}", "--adapters", f"{texts}:{tmp_path / 'two.apr'}")
    assert lora("finetune", base_apr, *pairs, "--epochs", 1, "-q").exit_code == 0
    assert load(tmp_path / "one.apr").is_classifier
    assert not load(tmp_path / "two.apr").is_classifier
    same = ("--adapters", f"{rows}:{tmp_path / 'x.apr'}", "--adapters", f"{rows}:{tmp_path / 'x-run'}")
    assert lora("finetune", base_apr, *same, "--epochs", 1, "-q").exit_code == 2


@pytest.mark.parametrize(("method", "name"), [("lora", "adapter.apr"), ("full", "model.apr")])
def test_a_kept_state_may_be_an_apr_file_too(lora, base, rows, tmp_path, method: str, name: str) -> None:
    flags = ("--method", method, "--epochs", 2, "--checkpoint-format", "apr,safetensors", "--json")
    outcome = lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *flags)
    assert outcome.document["checkpoint_format"] == "apr,safetensors"
    for state in ("best", "epoch-1", "epoch-2"):
        folder = tmp_path / "run" / state
        np.testing.assert_array_equal(load(folder / name)(IDS), load(folder)(IDS))
    raw = bytearray((tmp_path / "run" / "best" / name).read_bytes())
    raw[-80] ^= 1
    (tmp_path / "run" / "best" / name).write_bytes(raw)
    broken = lora("finetune", base, "-d", rows, "-o", tmp_path / "run", *flags, "--resume")
    assert (broken.exit_code, broken.err.count("\n")) == (4, 1)
    assert f"{name} changed" in broken.err


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_a_merge_overwrites_no_input(lora, base_apr, adapter_apr, tmp_path, what: str) -> None:
    own = {"base": base_apr, "adapter": adapter_apr}
    own = {name: Path(shutil.copyfile(path, tmp_path / f"{name}.apr")) for name, path in own.items()}
    before = files(tmp_path)
    outcome = lora("merge", own["base"], "--adapter", own["adapter"], "-o", own[what])
    assert outcome.exit_code == 2
    assert f"is the {what} itself" in outcome.err
    assert files(tmp_path) == before


def test_a_file_of_sizes_alone_takes_its_tokenizer_from_beside_it(
    lora, base, base_apr, texts, tmp_path
) -> None:
    metadata, tensors = read_apr(base_apr)
    small = metadata.pop("files")
    path = tmp_path / "plain.apr"
    write_apr(path, metadata, tensors)
    outcome = lora("finetune", path, "-d", texts, "-o", tmp_path / "run", "-q")
    assert outcome.exit_code == 6
    assert "No tokenizer.json" in outcome.err
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(small[name], encoding="utf-8")
    assert lora("finetune", path, "-d", texts, "-o", tmp_path / "run", "--epochs", 1, "-q").exit_code == 0
    assert lora("finetune", base, "-d", texts, "-o", tmp_path / "other", "--epochs", 1, "-q").exit_code == 0
    one, other = (
        read_tensors(tmp_path / run / "best" / "adapter_model.safetensors") for run in ("run", "other")
    )
    assert {name: array.tobytes() for name, array in one.items()} == {
        name: array.tobytes() for name, array in other.items()
    }
    assert {"plain.apr", "tokenizer.json", "tokenizer_config.json"} == {
        source.name for source in AprFolder(path).sources()
    }
    (tmp_path / "tokenizer_config.json").write_text(small["tokenizer_config.json"] + " ")
    changed = lora("finetune", path, "-d", texts, "-o", tmp_path / "run", "--epochs", 1, "-q", "--resume")
    assert "base tokenizer_config.json:" in changed.err


def test_sizes_come_before_a_config_beside_and_that_before_an_error(base, base_apr, tmp_path) -> None:
    metadata, tensors = read_apr(base_apr)
    del metadata["files"]
    other = json.loads((base / "config.json").read_text()) | {"rope_theta": 5.0}
    (tmp_path / "config.json").write_text(json.dumps(other))
    write_apr(tmp_path / "whole.apr", metadata, tensors)
    assert load(tmp_path / "whole.apr").spec.rope_theta == metadata["rope_theta"]
    assert load(tmp_path / "whole.apr").checkpoint.config["torch_dtype"] == "float32"
    del metadata["num_layers"]
    write_apr(tmp_path / "poor.apr", metadata, tensors)
    assert load(tmp_path / "poor.apr").spec.rope_theta == 5.0


def test_an_optimizer_s_tensors_are_left_where_they_are(base_apr, adapter_apr, tmp_path) -> None:
    for path, read in ((base_apr, load), (adapter_apr, lambda p: load_adapter(AprFolder(p))[1])):
        metadata, tensors = read_apr(path)
        state = {"__training__.optimizer.m.0": np.ones(3, np.float32)}
        write_apr(tmp_path / path.name, metadata, tensors | state)
        found, expected = read(tmp_path / path.name), read(path)
        if isinstance(found, dict):
            assert found.keys() == expected.keys()
        else:
            np.testing.assert_array_equal(found(IDS), expected(IDS))
