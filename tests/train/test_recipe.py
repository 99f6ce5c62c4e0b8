"""Recipes: what is read, what is refused in one error, and that a run's own recipe repeats it bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import lora
from lora.errors import FileFormatError, LoraError, MissingFileError, ValidationError
from lora.train.config import FinetuneConfig
from lora.train.recipe import MOST_BYTES, read_recipe, write_recipe
from tests.cli.conftest import LABELLED, TEXTS, write_base
from tests.data.files import write_jsonl

QUICK = {"epochs": 2, "batch_size": 8, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def read(path: Path, text: str | bytes) -> dict:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path)


OWN = ("metrics.jsonl", "metrics.csv", "recipe.yaml", "state.safetensors")


def written(folder: Path) -> dict[str, bytes]:
    """Return every file of a run that does not name its own folder or a time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in OWN
    }


@pytest.mark.parametrize("rows", [LABELLED, TEXTS], ids=["classify", "causal"])
def test_the_recipe_of_a_run_repeats_it_bit_for_bit(tmp_path, monkeypatch, rows: list) -> None:
    base = write_base(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    # none of these is a default, and paths are relative: the recipe must hold all that was meant
    lora.finetune(
        "./base", "rows.jsonl", output="first", targets=("v_proj", "o_proj"), rank=3, seed=5, **QUICK
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = read_recipe(tmp_path / "first" / "recipe.yaml")
    assert (recipe["model"], recipe["data"], recipe["method"]) == (str(base), str(data), "lora")
    run = lora.finetune(**recipe | {"output": tmp_path / "again"})
    first, again = written(tmp_path / "first"), written(tmp_path / "again")
    assert "best/adapter_model.safetensors" in first
    assert first == again
    assert run.output == tmp_path / "again"
    again_recipe = read_recipe(tmp_path / "again" / "recipe.yaml")
    assert again_recipe == recipe | {"output": str(tmp_path / "again")}


def test_a_written_recipe_holds_every_setting_and_is_read_as_it_was(scratch) -> None:
    config = FinetuneConfig(task="causal", targets=("q_proj",), alpha=5.0, learning_rate=2e-5, layout="text")
    write_recipe(scratch, "owner/name", Path("/rows.jsonl"), Path("/out"), config)
    recipe = read_recipe(scratch)
    assert recipe.keys() == {"model", "data", "output", *vars(config)}
    assert FinetuneConfig(**{name: recipe[name] for name in vars(config)}) == config
    assert yaml.safe_load(scratch.read_text(encoding="utf-8"))["rank"] == 16


def test_scalars_are_those_of_yaml_1_2(scratch) -> None:
    recipe = read(
        scratch,
        "model: no\ndata: 2024-01-01\noutput: '5'\nlearning_rate: 2e-4\nrank: 010\nalpha: 7\npacking: false\n"
        "pooling: null\ntargets: [q_proj, 'true']\nweight_decay: .5\nmodel_size: 0.5B\n",
    )
    assert recipe == {
        "model": "no",
        "data": "2024-01-01",
        "output": "5",
        "learning_rate": 2e-4,
        "rank": 10,
        "alpha": 7.0,
        "packing": False,
        "pooling": None,
        "targets": ("q_proj", "true"),
        "weight_decay": 0.5,
        "model_size": "0.5B",
    }
    assert type(recipe["alpha"]) is float


def test_all_problems_come_in_one_error(scratch) -> None:
    with pytest.raises(ValidationError) as caught:
        read(
            scratch,
            "rnak: 8\nlearning-rate: 0.1\nepochs: two\nbatch_size: true\nseed: 1.5\npacking: yes\n"
            "targets: [1]\ndata: null\nclip: -1\nval_split: 0.9\nmethod: lora\nmethod: head\nzzz: 1\n",
        )
    said = str(caught.value)
    assert "\n" not in said
    for problem in (
        "line 1: 'rnak' is unknown; did you mean rank?",
        "line 2: 'learning-rate' is unknown; did you mean learning_rate?",
        "line 3: epochs = 'two': expected a whole number",
        "line 4: batch_size = True: expected a whole number",
        "line 5: seed = 1.5: expected a whole number",
        "line 6: packing = 'yes': expected true or false",
        "line 7: targets = (1,): expected a text or a list of texts",
        "line 8: data = None: expected a text",
        "clip = -1.0: expected 0 or more",
        "val_split = 0.9: expected more than 0, at most 0.5",
        "line 12: method is given twice",
        "line 13: 'zzz' is unknown",
    ):
        assert problem in said


def test_many_problems_are_counted(scratch) -> None:
    with pytest.raises(ValidationError, match="and 5 more") as caught:
        read(scratch, "".join(f"unknown{i}: 1\n" for i in range(25)))
    assert len(str(caught.value)) < 2000


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no mapping"),
        ("- a\n", "no mapping"),
        ("{}", "no mapping"),
        ("rank: [", "line 1"),
        ("rank: 8\n---\nrank: 9\n", "YAML, found another document, line 2"),
        ("rank: *x\n", "alias"),
        (LAUGHS, "an alias, line 2"),
        ("rank: {a: 1}\n", "a value of another kind"),
        ("targets: [[q_proj]]\n", "values inside values"),
        ("targets: " + "[" * 30_000, "values inside values"),
        ("? [a]\n: 1\n", "a name that is no text"),
        ("rank: !!python/object/apply:os.system ['true']\n", "another kind, line 1"),
        ("rank: !!binary aGk=\n", "another kind"),
        ('model: "\\ud800"\n', "surrogates"),
        ('model: "\\U00110000"\n', "0x110000"),
        ("%YAML " + "9" * 5000 + ".1\n---\nrank: 8\n", "recipe in YAML"),
        (b"model: \xff\n", "can't decode"),
        ("model: \x00\n", "special characters"),
    ],
)
def test_what_is_no_recipe_is_refused(scratch, text: str | bytes, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(FileFormatError, match=said):
        read(scratch, text)
    assert time.monotonic() - start < 5


def test_a_large_file_is_refused_before_it_is_parsed(scratch) -> None:
    read(scratch, "rank: 8\n".ljust(MOST_BYTES, "#"))
    with pytest.raises(FileFormatError, match="65,536 bytes"):
        read(scratch, "rank: 8\n".ljust(MOST_BYTES + 1, "#"))


def test_what_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(MissingFileError, match="found nothing"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(MissingFileError, match="found a folder"):
        read_recipe(tmp_path)


NAMES = st.sampled_from(["model", "data", "targets", "rank", "learning_rate", "packing", "?", "<<", "x"])
SCALARS = st.one_of(
    st.sampled_from(
        ["1e999", "99999999999999999999", "-0", "&a b", "*a", "!!int x", '"\\ud800"', "|", "'", "~"]
    ),
    st.floats().map(str),
    st.text(max_size=10),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3).map(lambda v: f"[{', '.join(v)}]"))
RECIPES = st.lists(st.tuples(NAMES, VALUES), max_size=6).map(
    lambda items: "".join(f"{name}: {value}\n" for name, value in items)
)


@given(
    content=st.one_of(
        st.binary(max_size=200),
        (st.text(max_size=200) | RECIPES).map(lambda text: text.encode(errors="replace")),
    )
)
def test_hostile_input_is_read_or_refused_in_one_error(scratch, content: bytes) -> None:
    try:
        recipe = read(scratch, content)
    except LoraError as error:
        said = str(error)
    else:
        FinetuneConfig(**{name: value for name, value in recipe.items() if name in vars(FinetuneConfig())})
        return
    assert said.startswith(str(scratch))
    assert len(said) < 5000
