"""`--adapters DATA:DIR` from the command line."""

from __future__ import annotations

import pytest

from lora.io.peft import load_adapter
from tests.data.files import write_jsonl

QUICK = ("--method", "lora", "--epochs", "1", "--batch-size", "8")


def test_each_folder_is_a_run_of_its_own(lora, base, rows, texts, tmp_path) -> None:
    pairs = [f"{rows}:{tmp_path / 'rows'}", f"{texts}:{tmp_path / 'texts'}"]
    adapters = [argument for pair in pairs for argument in ("--adapters", pair)]
    outcome = lora("finetune", base, *adapters, *QUICK)
    assert outcome.exit_code == 0
    for name, data in (("rows", rows), ("texts", texts)):
        assert load_adapter(tmp_path / name / "best")
        assert f"{data} in {tmp_path / name}\n" in outcome.out
        assert f"lora eval {tmp_path / name / 'best'}" in outcome.out
    again = lora("finetune", base, *adapters, *QUICK, "--resume", "--json")
    document = again.document
    assert (document["status"], document["base_model"]) == ("training_complete", str(base))
    assert [(run["task"], run["data"]) for run in document["runs"]] == [
        ("classify", str(rows)),
        ("causal", str(texts)),
    ]


def test_a_failure_in_one_says_which_are_done(lora, base, rows, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = lora(
        "finetune",
        base,
        *QUICK,
        "-q",
        "--adapters",
        f"{rows}:{tmp_path / 'a'}",
        "--adapters",
        f"{rows}:{tmp_path / 'file' / 'b'}",
    )
    assert outcome.exit_code == 7
    assert f"ended in {tmp_path / 'file' / 'b'}; complete: {tmp_path / 'a'}; not begun: none" in outcome.err


def test_a_bar_is_drawn_for_one_adapter_at_a_time(lora, base, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = []
    monkeypatch.setattr(
        "lora.cli.progress.ProgressBar.epoch_done", lambda self, event: shown.append(len(self._bar.task_ids))
    )
    adapters = ("--adapters", f"{rows}:{tmp_path / 'a'}", "--adapters", f"{rows}:{tmp_path / 'b'}")
    assert lora("finetune", base, *QUICK, *adapters).exit_code == 0
    assert shown == [1, 1]


def test_a_recipe_of_settings_alone_goes_with_adapters(lora, base, rows, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 1\nmethod: lora\n")
    pair = f"{rows}:{tmp_path / 'a'}"
    assert lora("finetune", base, "--recipe", recipe, "--adapters", pair, "-q").exit_code == 0
    recipe.write_text("output: elsewhere\n")
    outcome = lora("finetune", base, "--recipe", recipe, "--adapters", pair, "-q")
    assert (outcome.exit_code, "leave out -o" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["base", "--adapters", "rows.jsonl"], "DATA:DIR"),
        (["base", "--adapters", "rows.jsonl:"], "DATA:DIR"),
        (["base", "--adapters", ":a"], "DATA:DIR"),
        (["base", "--adapters", "a:b", "--data", "rows.jsonl"], "--data"),
        (["base", "--adapters", "a:b", "-o", "checkpoints"], "-o"),
        (["base", "--adapters", "a:b", "--plan"], "--plan"),
        (["base", "--adapters", "a:b", "--method", "full"], "expected method auto or lora, found 'full'"),
        (["base", "--adapters", "a:b", "--method", "head"], "expected method auto or lora, found 'head'"),
        (["base", "--adapters", "a:b", "--allow-data-mismatch"], "resume"),
        (["--adapters", "a:b"], "MODEL"),
    ],
)
def test_a_command_that_contradicts_itself_is_2(lora, arguments: list[str], said: str) -> None:
    outcome = lora("finetune", *arguments)
    assert outcome.exit_code == 2
    assert said in outcome.err


def test_every_row_of_every_file_is_checked_first(lora, base, rows, tmp_path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"input": "a", "label": "b"}, {"input": "a"}])
    pairs = (f"{rows}:{tmp_path / 'a'}", f"{bad}:{tmp_path / 'b'}")
    outcome = lora("finetune", base, "--adapters", pairs[0], "--adapters", pairs[1])
    assert (outcome.exit_code, outcome.out) == (5, "")
    assert "line 2" in outcome.err
    assert not (tmp_path / "a").exists()
