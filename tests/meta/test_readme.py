"""README.md says what is so: its paths exist, its numbers are printed, its examples run."""

from __future__ import annotations

import re
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest

import lora
from lora.cli.main import run
from tests.harness.models import write_model

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
HUB_ID = '"Qwen/Qwen2.5-Coder-0.5B"'


def block_with(text: str) -> str:
    """Return the one fenced block that holds `text`."""
    (found,) = (body for _, body in BLOCKS if text in body)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_path_in_the_text_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:lora|tests|contracts|kernels|\.ci)/[\w./-]*)`", text)
    # X stands for a stem; host and cuda are rooms that are still to come
    missing = [p for p in paths if not (ROOT / p).exists() and not re.search(r"X\.|/host|/cuda", p)]
    assert not missing
    assert paths


@pytest.mark.parametrize("stage", ["demo", "tests"])
def test_the_commands_that_ci_runs_are_marked(stage: str) -> None:
    assert README.count(f"<!-- ci: {stage} -->\n```sh\n") == 1


def test_the_plan_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "--model-size", "0.5B", "--plan"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert not [line for line in block_with("494,032,768").splitlines() if line not in printed]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block_with("lora.AdamW")
    assert HUB_ID in code
    monkeypatch.chdir(tmp_path)
    base = write_model(tmp_path / "base")
    batches = [(np.array([[1, 2, 3], [4, 5, 6]]), np.array([0, 4]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora.LoraWarning)  # Transformers would pool the last token
        exec(code.replace(HUB_ID, "base"), {"base": base, "batches": batches})
    assert lora.load("merged").head.class_names == tuple("01234")


def test_the_layer_that_is_shown_is_the_layer() -> None:
    source = (ROOT / "lora" / "ops" / "rmsnorm.py").read_text(encoding="utf-8").splitlines()
    assert not [line for line in block_with("class Saved").splitlines() if line and line not in source]


def test_the_rooms_that_are_listed_are_there() -> None:
    rooms = re.findall(r"^(?:lora/)? +(\w+)  ", block_with("one file a command"), flags=re.MULTILINE)
    folders = {path.name for path in (ROOT / "lora").iterdir() if (path / "__init__.py").is_file()}
    assert set(rooms) == folders - {"assets"}


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {lora.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]
