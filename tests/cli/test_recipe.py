"""`lora finetune --recipe`: every flag from a file, and who wins where both speak."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def write(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["settings"]


def test_a_recipe_stands_for_every_flag(lora, base, rows, tmp_path) -> None:
    recipe = write(
        tmp_path / "r.yaml",
        model=str(base),
        data=str(rows),
        output=str(tmp_path / "run"),
        epochs=1,
        rank=2,
        targets=["v_proj"],
        head_bias=False,
        pooling="last",
    )
    outcome = lora("finetune", "--recipe", recipe, "-q")
    assert (outcome.exit_code, outcome.err) == (0, "")
    settings = settings_of(tmp_path / "run")
    assert (settings["epochs"], settings["rank"], settings["targets"]) == (1, 2, ["v_proj"])
    assert settings["head_bias"] is False


def test_the_command_line_wins_and_says_so(lora, base, rows, tmp_path) -> None:
    recipe = write(
        tmp_path / "r.yaml", model="/none", data=str(rows), output="/none", epochs=3, seed=1, rank=2
    )
    flags = ("--epochs", "1", "--seed", "1", "--no-head-bias", "--pooling", "last")
    outcome = lora("finetune", base, "--recipe", recipe, "-o", tmp_path / "run", "-q", *flags)
    assert outcome.exit_code == 0
    settings = settings_of(tmp_path / "run")
    assert (settings["epochs"], settings["seed"], settings["rank"]) == (1, 1, 2)
    # the seed is the same in both: nobody wins
    assert outcome.err == (
        f"note: the command line wins over {recipe}: model = {base} (there: /none), "
        f"output = {tmp_path / 'run'} (there: /none), epochs = 1 (there: 3)\n"
    )


def test_a_run_is_repeated_by_its_own_recipe(lora, base, rows, tmp_path) -> None:
    flags = ("--targets", "v_proj,o_proj", "--epochs", "2", "--learning-rate", "0.05", "--oversample")
    assert lora("finetune", base, "-d", rows, "-o", tmp_path / "a", *flags).exit_code == 0
    outcome = lora("finetune", "--recipe", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b")
    assert outcome.exit_code == 0
    first, again = ((tmp_path / name / "best" / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == again


def test_a_recipe_is_not_overwritten_by_that_of_its_run(lora, base, rows, tmp_path) -> None:
    recipe = write(tmp_path / "recipe.yaml", model=str(base), data=str(rows), output=str(tmp_path), epochs=1)
    before = recipe.read_bytes()
    outcome = lora("finetune", "--recipe", recipe, "-q")
    assert outcome.exit_code == 2
    assert "name another output" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert recipe.read_bytes() == before
    # a run goes on by its own
    assert lora("finetune", "--recipe", recipe, "-o", tmp_path / "run", "-q").exit_code == 0
    assert lora("finetune", "--recipe", tmp_path / "run" / "recipe.yaml", "-q", "--resume").exit_code == 0


def test_a_plan_reads_the_recipe_too(lora, tmp_path) -> None:
    recipe = write(tmp_path / "r.yaml", model_size="0.5B", task="classify", rank=4)
    document = lora("finetune", "--plan", "--recipe", recipe, "--json").document
    assert document["recommended_rank"] == 4


def test_a_bad_recipe_is_one_line_and_writes_nothing(lora, base, rows, tmp_path) -> None:
    recipe = write(tmp_path / "r.yaml", rnak=8, epochs="two", output=str(tmp_path / "run"))
    outcome = lora("finetune", base, "-d", rows, "--recipe", recipe, "--json")
    assert (outcome.exit_code, outcome.err.count("\n")) == (5, 1)
    assert "did you mean rank?" in outcome.err
    assert "epochs = 'two'" in outcome.document["error"]
    assert not (tmp_path / "run").exists()
    assert lora("finetune", "--recipe", tmp_path / "none.yaml").exit_code == 3
