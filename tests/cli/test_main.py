"""Exit codes, one line of error, one JSON document; and what happens when nobody foresaw it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora.cli import doctor as doctor_module
from lora.cli.main import lora as commands
from lora.cli.main import run
from lora.errors import (
    DivergedError,
    FileFormatError,
    LoadError,
    LoraError,
    MissingFileError,
    UsageError,
    ValidationError,
    WriteError,
)

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **more,
    )


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (UsageError, 2),
        (MissingFileError, 3),
        (FileFormatError, 4),
        (ValidationError, 5),
        (DivergedError, 5),
        (LoadError, 6),
        (WriteError, 7),
        (PermissionError, 7),
        (MemoryError, 1),
        (KeyboardInterrupt, 130),
    ],
)
def test_an_error_is_one_line_and_one_document(
    lora, monkeypatch, error: type[Exception], exit_code: int
) -> None:
    def fail() -> None:
        raise error("the reason")

    monkeypatch.setattr(doctor_module, "diagnose", fail)
    outcome = lora("doctor")
    assert (outcome.exit_code, outcome.out) == (exit_code, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    outcome = lora("doctor", "--json")
    assert outcome.exit_code == exit_code
    assert outcome.document["status"] == "error"
    assert outcome.document["exit_code"] == exit_code
    assert outcome.document["error"] in outcome.err


def test_debug_adds_the_traceback(lora, monkeypatch) -> None:
    def fail() -> None:
        raise LoraError("the reason")

    monkeypatch.setattr(doctor_module, "diagnose", fail)
    outcome = lora("doctor", "--debug")
    assert outcome.exit_code == 1
    assert "Traceback" in outcome.err
    assert "in fail" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["doctor", "--no-such-option"],
        ["doctor", "extra"],
        ["finetune", "--rank", "many"],
        ["merge"],
    ],
)
def test_a_usage_error_is_2_and_says_where_help_is(lora, arguments: list[str]) -> None:
    outcome = lora(*arguments, "--json")
    assert outcome.exit_code == 2
    assert outcome.document["exit_code"] == 2
    assert "--help" in outcome.err


def test_options_after_two_dashes_are_texts(lora) -> None:
    outcome = lora("predict", "no/such/model", "--", "--json")
    assert (outcome.exit_code, outcome.out) == (3, "")


def test_without_a_command_help_is_shown_and_the_usage_is_wrong(lora) -> None:
    outcome = lora()
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert "finetune" in outcome.err


@pytest.mark.parametrize("name", [None, *commands.commands])
def test_help_names_every_option_with_its_meaning(lora, name: str | None) -> None:
    outcome = lora(*([name] if name else []), "--help")
    assert (outcome.exit_code, outcome.err) == (0, "")
    for parameter in (commands.commands[name] if name else commands).params:
        if parameter.param_type_name == "option":
            assert parameter.help
            assert parameter.opts[0] in outcome.out


def test_help_imports_nothing_that_takes_time() -> None:
    code = "import sys; from lora.cli.main import run; run(['finetune', '--help']); print(*sys.modules)"
    loaded = set(python("-c", code).stdout.rpartition("\n\n")[2].split())
    assert "lora.cli.finetune" in loaded
    assert not loaded & {"numpy", "rich", "tokenizers", "huggingface_hub", "yaml", "lora.model", "lora.ops"}


def test_python_m_lora_is_the_command() -> None:
    done = python("-m", "lora", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("lora ")


BUG = """
import sys
from lora.cli import doctor, main
doctor.diagnose = lambda: {}["nothing here"]
sys.argv = ["lora", "doctor", *sys.argv[1:]]
main.main()
"""


def test_a_bug_asks_to_be_reported() -> None:
    done = python("-c", BUG, "--json")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "KeyError" in done.stderr
    assert "report" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 1
    assert "Traceback" in python("-c", BUG, "--debug").stderr


def test_a_bug_is_not_swallowed(lora, monkeypatch) -> None:
    monkeypatch.setattr(doctor_module, "diagnose", lambda: 1 / 0)
    hook = sys.excepthook
    with pytest.raises(ZeroDivisionError):
        run(["doctor"])
    monkeypatch.setattr(sys, "excepthook", hook)


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "import sys; from lora.cli.main import main; sys.argv = ['lora', 'doctor']; sys.stdin.read(); main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()  # before the command has written anything
    process.stdin.close()
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk_under_stdout_is_one_line(options: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lora", "doctor", *options],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (7, "error: [Errno 28] No space left on device\n")
