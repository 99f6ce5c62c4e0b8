"""Attempts to falsify contracts/training/apr_folder.yaml, and hostile files against all that reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.io.apr_contents
import lora.io.peft
from lora.contracts import training_contract
from lora.errors import AdapterError, LoadError, LoraError
from lora.io.apr import read_apr, write_apr
from lora.io.apr_folder import AprFolder
from lora.io.convert import apr_to_folder, folder_to_apr
from lora.io.lora_config import LoraConfig
from lora.io.peft import load_adapter
from lora.model.loading import load
from lora.model.model import Model
from tests.harness.cases import seeds
from tests.harness.claims import assert_killed, claimed, planted
from tests.io.test_apr import resealed
from tests.train.tiny import base

pytestmark = [
    # a mean-pooled head, which Transformers reads otherwise
    pytest.mark.filterwarnings("ignore:Transformers:lora.errors.LoraWarning"),
    # the hash of FACTS is nobody's
    pytest.mark.filterwarnings("ignore:.* is not the base:lora.errors.LoraWarning"),
]

CONTRACT = training_contract("apr_folder")
IDS = np.arange(12).reshape(2, 6)
FACTS = {"base_hash": "b" * 64, "data_hash": "d" * 64}
Write = Callable[[Model, Path], None]
Read = Callable[[Path], Any]


class Case(NamedTuple):
    rank: int
    seed: int

    def model(self) -> Model:
        """Return a classifier with an adapter whose every value is its own."""
        model = load(base(), num_labels=3)
        model.add_adapter(LoraConfig(r=self.rank, target_modules="qv"), seed=self.seed)
        rng = np.random.default_rng(self.seed)
        for array in model.trainable().values():
            array[...] = 0.1 * rng.standard_normal(array.shape)
        return model


@pytest.fixture(scope="module", autouse=True)
def _folder_with_a_tokenizer() -> None:
    (base() / "tokenizer.json").write_text("{}")


def written(write: Write, model: Model, name: str = "x.apr") -> Any:
    with TemporaryDirectory() as parent:
        write(model, Path(parent) / name)
        return read_apr(Path(parent) / name)  # the map outlives the name


def save_adapter(model: Model, path: Path) -> None:
    model.save_adapter(path, metadata=FACTS)


def check_complete(write: Write, case: Case) -> None:
    modules = [
        f"lora.{layer}.{name}_proj.lora_{factor}" for layer in "01" for name in "qv" for factor in "ab"
    ]
    held = written(write, case.model()).tensors
    assert sorted(held) == ["classifier.bias", "classifier.weight", *sorted(modules)]


def check_schema(write: Write, case: Case) -> None:
    assert written(write, case.model()).metadata["__checkpoint__.schema_version"] == "1.3.0"


def check_finite_out(write: Write, case: Case) -> None:
    model = case.model()
    next(iter(model.trainable().values())).flat[case.seed % case.rank] = np.inf
    with TemporaryDirectory() as parent:
        with pytest.raises(AdapterError, match="not finite"):
            write(model, Path(parent) / "x.apr")
        assert list(Path(parent).iterdir()) == []


def check_finite_in(read: Read, case: Case) -> None:
    with TemporaryDirectory() as parent:
        path = Path(parent) / "x.apr"
        save_adapter(case.model(), path)
        metadata, tensors = copy.deepcopy(read_apr(path))
        changed = list(tensors)[case.seed % len(tensors)]
        tensors[changed] = np.full_like(tensors[changed], np.nan)
        write_apr(path.with_name("broken.apr"), metadata, tensors)
        read(path)
        with pytest.raises(AdapterError, match="not finite"):
            read(path.with_name("broken.apr"))


def check_whole(read: Read, case: Case) -> None:
    with TemporaryDirectory() as parent:
        path = Path(parent) / "x.apr"
        folder_to_apr(base(), path)
        read(path)
        metadata, tensors = read_apr(path)
        name = list(tensors)[case.seed % len(tensors)]
        for number, changed in enumerate(
            [
                {other: array for other, array in tensors.items() if other != name},
                tensors | {name: tensors[name][:-1]},
                tensors | {f"{name}.{case.seed}": tensors[name]},
            ]
        ):
            write_apr(path.with_name(f"{number}.apr"), metadata, changed)
            with pytest.raises(LoadError, match=name):
                read(path.with_name(f"{number}.apr"))


def check_optimizer(read: Read, case: Case) -> None:
    with TemporaryDirectory() as parent:
        path = Path(parent) / "x.apr"
        folder_to_apr(base(), path)
        metadata, tensors = read_apr(path)
        state = {"__training__.optimizer.m.0": np.ones(case.rank, np.float32)}
        write_apr(path.with_name("more.apr"), metadata, tensors | state)
        np.testing.assert_array_equal(read(path.with_name("more.apr"))(IDS), load(base())(IDS))


def check_origin(write: Write, case: Case) -> None:
    metadata = written(write, case.model()).metadata
    assert metadata["base_model_source"] == str(base())
    assert (metadata["base_model_hash"], metadata["data_hash"]) == (FACTS["base_hash"], FACTS["data_hash"])


def check_same_model(read: Read, case: Case) -> None:
    with TemporaryDirectory() as parent:
        path = Path(parent) / "x.apr"
        folder_to_apr(base(), path)
        metadata, tensors = read_apr(path)
        # a file of sizes alone, beside a config.json of another model
        (path.parent / "config.json").write_text(
            (base() / "config.json").read_text().replace("10000.0", "7.0")
        )
        del metadata["files"]
        write_apr(path.with_name("sizes.apr"), metadata, tensors)
        for name in ("x.apr", "sizes.apr"):
            model = read(path.with_name(name))
            np.testing.assert_array_equal(model(IDS), load(base())(IDS))
            assert all(is_mapped(array) for array in model.parameters.weights.values())


def check_same_merge(write: Write, case: Case) -> None:
    model = case.model()
    model.merge_adapter()
    with TemporaryDirectory() as parent:
        model.save(Path(parent) / "folder")
        folder_to_apr(Path(parent) / "folder", Path(parent) / "converted.apr")
        write(model, Path(parent) / "merged.apr")
        assert (Path(parent) / "merged.apr").read_bytes() == (Path(parent) / "converted.apr").read_bytes()
        apr_to_folder(Path(parent) / "merged.apr", Path(parent) / "back")
        for file in (Path(parent) / "folder").iterdir():
            assert (Path(parent) / "back" / file.name).read_bytes() == file.read_bytes()


def is_mapped(array: Any) -> bool:
    return array is not None and (isinstance(array, np.memmap) or is_mapped(array.base))


def read_adapter(path: Path) -> Any:
    return load_adapter(AprFolder(path))


CHECKS = {
    "F-CKPT-001": check_complete,
    "F-CKPT-002": check_schema,
    "F-CKPT-007": check_finite_out,
    "F-CKPT-013": check_finite_in,
    "F-CKPT-014": check_whole,
    "F-CKPT-016": check_optimizer,
    "F-CKPT-017": check_origin,
    "APR-MODEL-001": check_same_model,
    "APR-MODEL-002": check_same_merge,
}
OURS = {
    **dict.fromkeys((check_complete, check_schema, check_finite_out, check_origin), save_adapter),
    check_finite_in: read_adapter,
    **dict.fromkeys((check_whole, check_optimizer, check_same_model), load),
    check_same_merge: Model.save,
}
CASES = st.builds(Case, st.integers(*CONTRACT.domain["rank"]), seeds)


@pytest.mark.parametrize("check", claimed(CHECKS))
@given(case=CASES)
def test_claim(check: Any, case: Case) -> None:
    check(OURS[check], case)


def rewritten(change: Callable[[dict[str, Any], dict[str, Any]], Any], write: Write = save_adapter) -> Write:
    """Return a writer whose file `change` has altered: (metadata, tensors)."""

    def write_and_change(model: Model, path: Path) -> None:
        write(model, path)
        metadata, tensors = read_apr(path)
        path.unlink()  # its pages are still mapped
        change(metadata, tensors)
        write_apr(path, metadata, tensors)

    return write_and_change


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` in a world where adapters are not checked."""

    def call(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora.io.peft, "_check_writable", lambda tensors: None)
            return function(*arguments)

    return call


def pads_what_is_missing(path: Path) -> Any:
    weights = load(base()).parameters.weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.model.loading.load_weights", lambda *_: dict(weights))
        return load(path)


def reads_the_optimizer(path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.io.apr_folder._TRAINING_STATE", "__nothing__")
        return load(path)


def copies_the_base(path: Path) -> Any:
    model = load(path)
    model.parameters.weights = {name: array.copy() for name, array in model.parameters.weights.items()}
    return model


def reads_its_neighbour(path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.io.apr_folder.SIZES", {"no_such_size": "model_type"})
        return load(path)


def merges_into_double(model: Model, path: Path) -> None:
    def widen(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors.update({name: array.astype(np.float64) for name, array in tensors.items()})

    rewritten(widen, Model.save)(model, path)


MUTANTS = {
    "forgets_a_factor": rewritten(lambda metadata, tensors: tensors.pop("lora.1.v_proj.lora_b")),
    "forgets_the_schema": rewritten(
        lambda metadata, tensors: metadata.update({lora.io.apr_contents.SCHEMA: None})
    ),
    "writes_what_is_not_finite": unchecked(save_adapter),
    "reads_what_is_not_finite": unchecked(read_adapter),
    "pads_what_is_missing": pads_what_is_missing,
    "reads_the_optimizer": reads_the_optimizer,
    "forgets_its_base": rewritten(lambda metadata, tensors: metadata.update(base_model_hash=None)),
    "forgets_its_data": lambda model, path: model.save_adapter(path, metadata=FACTS | {"data_hash": ""}),
    "copies_the_base": copies_the_base,
    "reads_its_neighbour": reads_its_neighbour,
    "merges_into_double": merges_into_double,
    "forgets_the_tokenizer": rewritten(
        lambda metadata, _: metadata["files"].pop("tokenizer.json"), Model.save
    ),
}


@pytest.mark.parametrize(("check", "mutant"), planted(CONTRACT, CHECKS, MUTANTS))
def test_planted_bug_is_killed(check: Any, mutant: Any) -> None:
    assert_killed(check, mutant, CASES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model's file and an adapter's."""
    folder = tmp_path_factory.mktemp("whole")
    folder_to_apr(base(), folder / "model.apr")
    save_adapter(Case(2, 0).model(), folder / "adapter.apr")
    return folder


def attack(raw: bytes) -> None:
    """Load and convert `raw`: either works, or ends in one error of ours, and nothing else is written."""
    with TemporaryDirectory() as parent:
        path, out = Path(parent) / "x.apr", Path(parent) / "out"
        path.write_bytes(raw)
        with suppress(LoraError):
            load(path)
        with suppress(LoraError):
            apr_to_folder(path, out)
        assert {entry.name for entry in path.parent.iterdir()} <= {"x.apr", "out"}


@pytest.mark.parametrize("name", ["model.apr", "adapter.apr"])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 255)), min_size=1, max_size=6),
    near=st.booleans(),
)
def test_changed_bytes_end_in_one_error(
    whole: Path, name: str, changes: list[tuple[int, int]], near: bool
) -> None:
    raw = bytearray((whole / name).read_bytes())
    end = (
        min(6000, len(raw) - 4) if near else len(raw) - 4
    )  # where the header, the metadata and the index are
    for at, value in changes:
        raw[at % end] = value
    attack(resealed(bytes(raw)))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc./", max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ["architecture", "hidden_size", "num_layers", "rope_theta", "head_dim", "layout", "lora_rank", "files"]


@pytest.mark.parametrize("name", ["model.apr", "adapter.apr"])
@given(key=st.sampled_from(KEYS), value=VALUES, sizes_alone=st.booleans())
def test_changed_metadata_ends_in_one_error(
    whole: Path, name: str, key: str, value: Any, sizes_alone: bool
) -> None:
    metadata, tensors = read_apr(whole / name)
    if sizes_alone:
        del metadata["files"]
    with TemporaryDirectory() as parent:
        write_apr(Path(parent) / "x.apr", metadata | {key: value}, tensors)
        attack((Path(parent) / "x.apr").read_bytes())
