"""PEFT's adapter folder, both ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from lora import spec
from lora.errors import AdapterError, FileFormatError, LoraError, MissingFileError, UnsupportedError
from lora.io.lora_config import LoraConfig
from lora.io.peft import (
    CONFIG,
    METADATA,
    TENSORS,
    check_tensors,
    in_layout,
    load_adapter,
    parse_peft_name,
    peft_name,
    save_adapter,
)
from lora.io.safetensors_file import write_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
PT = {"format": "pt"}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
FACTORS = {A: np.arange(6, dtype="f4").reshape(2, 3), B: np.ones((4, 2), "f4")}
CONFIG_FIELDS = LoraConfig(r=2, target_modules=["q_proj"])


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", CONFIG_FIELDS, FACTORS, {})
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(values))


def test_an_adapter_that_peft_wrote_is_read() -> None:
    config, tensors, metadata = load_adapter(GOLDEN / "peft_adapter")
    with np.load(GOLDEN / "qwen2_all_linear.npz") as file:
        expected = {key.removeprefix("adapter/"): file[key] for key in file if key.startswith("adapter/")}
    assert same(tensors, expected)
    assert (config.r, config.lora_alpha, config.task_type, metadata) == (4, 6, "CAUSAL_LM", {})
    assert set(config.target_modules or ()) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }


@pytest.mark.parametrize("case", ["qv", "all_linear", "patterns", "lm_head", "classifier", "long"])
def test_what_peft_wrote_comes_back_after_we_wrote_it(tmp_path: Path, case: str) -> None:
    with np.load(GOLDEN / f"qwen2_{case}.npz") as file:
        written = json.loads(str(file["lora_config"]))
        tensors = {key.removeprefix("adapter/"): file[key] for key in file if key.startswith("adapter/")}
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(written))
    write_tensors(tmp_path / "peft" / TENSORS, tensors, PT)
    config, found, _ = load_adapter(tmp_path / "peft")
    save_adapter(tmp_path / "ours", config, found, {})
    config_again, tensors_again, _ = load_adapter(tmp_path / "ours")
    assert config_again == config
    assert same(tensors_again, tensors)
    ours = json.loads((tmp_path / "ours" / CONFIG).read_text())
    differing = {key for key, value in ours.items() if written[key] != value}
    # PEFT writes its sets in any order
    assert differing <= {"target_modules", "modules_to_save"}
    assert all(sorted(ours[key]) == sorted(written[key]) for key in differing)


def test_only_fields_that_peft_0_17_knows_are_written(folder: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    assert values["peft_type"] == "LORA"
    assert values["inference_mode"] is True
    assert values["lora_alpha"] == 4
    assert values["target_modules"] == ["q_proj"]
    later = {
        "alora_invocation_tokens",
        "arrow_config",
        "ensure_weight_tying",
        "peft_version",
        "runtime_config",
    }
    assert not later & values.keys()
    assert len(values) == 32
    with safetensors.safe_open(folder / TENSORS, "numpy") as file:
        assert file.metadata() == PT
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]


def test_patterns_keep_their_order_because_the_first_that_matches_counts(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2, ".*": 3, "a": 4})
    save_adapter(tmp_path / "a", config, FACTORS, {})
    assert list(load_adapter(tmp_path / "a")[0].rank_pattern) == ["q_proj", ".*", "a"]


def test_a_classifier_is_written_as_peft_writes_it(tmp_path: Path) -> None:
    tensors = FACTORS | {"base_model.model.score.weight": np.ones((3, 4), "f4")}
    save_adapter(
        tmp_path / "a", LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]), tensors, {"names": ["x"]}
    )
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["modules_to_save"] == ["classifier", "score"]
    config, found, metadata = load_adapter(tmp_path / "a")
    assert (config.saved_modules, metadata) == (("score",), {"names": ["x"]})
    assert same(found, tensors)


def test_metadata_of_an_older_adapter_does_not_survive_it(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", CONFIG_FIELDS, FACTORS, {"class_names": ["old"]})
    (tmp_path / "a" / "README.md").write_text("mine")
    save_adapter(tmp_path / "a", CONFIG_FIELDS, FACTORS, {})
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["README.md", CONFIG, TENSORS]
    assert not (tmp_path / "a" / METADATA).exists()


def test_keys_that_a_file_lacks_have_pefts_defaults(folder: Path) -> None:
    (folder / CONFIG).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    config, _, _ = load_adapter(folder)
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 8, True)
    assert (config.rank_pattern, config.use_rslora) == ({}, False)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"use_dora": True}, UnsupportedError, "use_dora"),
        ({"bias": "all"}, UnsupportedError, "bias"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights"),
        ({"alora_invocation_tokens": [1]}, UnsupportedError, "alora_invocation_tokens"),
        (
            {"ensure_weight_tying": True, "kasa_config": {"a": 1}},
            UnsupportedError,
            "ensure_weight_tying.*kasa_config",
        ),
        ({"peft_type": "LOHA"}, UnsupportedError, "LOHA"),
        ({"peft_type": None}, UnsupportedError, "peft_type"),
        ({"target_modules": None}, AdapterError, "target_modules"),
        ({"r": None}, AdapterError, "r is None"),
        ({"lora_alpha": None}, AdapterError, "lora_alpha is null"),
        ({"r": "8", "use_rslora": 1}, AdapterError, "r is '8'.*use_rslora is 1"),
    ],
)
def test_a_config_is_refused_by_the_field(
    folder: Path, changes: Any, error: type[Exception], named: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(error, match=named):
        load_adapter(folder)


@pytest.mark.parametrize("nothing", [None, False, [], {}, "", 0])
def test_a_key_of_a_later_version_that_says_no_is_no_reason_to_refuse(folder: Path, nothing: Any) -> None:
    edit(folder, a_switch_of_2031=nothing, peft_version="0.21.2", lora_dropout=0.05)
    assert load_adapter(folder)[0].lora_dropout == 0.05


@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16])
def test_narrow_adapters_are_widened(folder: Path, dtype: Any) -> None:
    narrow = {name: (array / 7).astype(dtype) for name, array in FACTORS.items()}
    write_tensors(folder / TENSORS, narrow, PT)
    _, found, _ = load_adapter(folder)
    assert all(found[name].dtype == np.float32 for name in found)
    assert same(found, {name: array.astype("f4") for name, array in narrow.items()})
    assert all(array.flags.writeable for array in found.values())


@pytest.mark.parametrize("dtype", ["f8", "i4"])
def test_other_dtypes_are_refused(folder: Path, dtype: str) -> None:
    write_tensors(folder / TENSORS, FACTORS | {B: np.ones((4, 2), dtype)}, PT)
    with pytest.raises(AdapterError, match=r"lora_B.*expected float32"):
        load_adapter(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_both_ways(folder: Path, value: float) -> None:
    broken = FACTORS | {B: np.full((4, 2), value, "f4")}
    with pytest.raises(AdapterError, match=f"not finite in {B}"):
        save_adapter(folder, CONFIG_FIELDS, broken, {})
    assert same(load_adapter(folder)[1], FACTORS)
    write_tensors(folder / TENSORS, broken, PT)
    with pytest.raises(AdapterError, match=f"not finite in {B}"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        (LoraConfig(), FACTORS, "'qv' must be expanded"),
        (CONFIG_FIELDS, {}, "no tensor"),
        (CONFIG_FIELDS, {"model.q_proj.lora_A.weight": FACTORS[A]}, "expected base_model.model"),
        (CONFIG_FIELDS, {A: FACTORS[A].astype("f8")}, "float64, expected float32"),
    ],
)
def test_what_peft_could_not_read_is_not_written(
    tmp_path: Path, config: Any, tensors: Any, named: str
) -> None:
    with pytest.raises(AdapterError, match=named):
        save_adapter(tmp_path / "a", config, tensors, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=f"{name} is missing"):
        load_adapter(folder)


@given(name=st.sampled_from([CONFIG, TENSORS]), share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, share: float
) -> None:
    folder = tmp_path_factory.mktemp("cut") / "adapter"
    shutil.copytree(GOLDEN / "peft_adapter", folder)
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(int(share * size))
    with pytest.raises(FileFormatError, match=name):
        load_adapter(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@given(
    changes=st.dictionaries(
        st.sampled_from([*json.loads((GOLDEN / "peft_adapter" / CONFIG).read_text())]), JSON
    )
)
def test_a_hostile_config_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    folder = tmp_path_factory.mktemp("hostile") / "adapter"
    save_adapter(folder, CONFIG_FIELDS, FACTORS, {})
    edit(folder, **changes)
    try:
        config, _, _ = load_adapter(folder)
    except LoraError:
        return
    save_adapter(folder, config, FACTORS, {})
    assert load_adapter(folder)[0] == config


MODULES = [*spec.adaptable_modules(spec.size_spec("0.8b")), "lm_head", "score", "model.embed_tokens"]


@given(
    module=st.sampled_from(MODULES),
    kind=st.sampled_from(["lora_A.weight", "lora_B.weight", "weight", "bias"]),
    layout=st.sampled_from(["text", "multimodal"]),
)
def test_names_come_back_in_both_layouts(module: str, kind: str, layout: str) -> None:
    name = peft_name(module, kind, layout)
    assert parse_peft_name(name, layout) == (module, kind)
    inside = "model.language_model." if layout == "multimodal" else "model."
    assert name == f"base_model.model.{module.replace('model.', inside, 1)}.{kind}"


def test_an_adapter_moves_between_layouts() -> None:
    tensors = FACTORS | {"base_model.model.score.weight": np.ones((3, 4), "f4")}
    moved = in_layout(tensors, "multimodal")
    assert set(moved) == {
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.score.weight",
    }
    assert same(in_layout(moved, "text"), tensors)
    assert same(in_layout(moved, "multimodal"), moved)


def test_every_tensor_that_does_not_fit_is_in_one_error() -> None:
    with pytest.raises(AdapterError) as caught:
        check_tensors({A: np.ones((2, 4)), "ghost": np.ones(1)}, {A: (2, 3), B: (4, 2)})
    message = str(caught.value)
    assert f"{B} is missing" in message
    assert "ghost is not expected" in message
    assert f"{A} is [2, 4], expected [2, 3]" in message
    check_tensors(FACTORS, {A: (2, 3), B: (4, 2)})
