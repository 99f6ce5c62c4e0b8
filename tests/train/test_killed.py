"""Real processes, killed at any moment, out of disk or with damaged files: what they leave behind."""

from __future__ import annotations

import glob
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora.train.state import STATE_FILE
from tests.train.test_resume import damages, inputs, whole_again, written

SECONDS = 120  # more than any run here takes
FLAGS = ("--epochs", "25", "--batch-size", "4", "--save-steps", "1", "--save-every", "5", "--patience", "30")
ENVIRONMENT = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
PARTIAL = ".*.partial"  # what stands beside a file or a folder while it is written


def command(output: Path, *more: str) -> list[str]:
    base, rows = inputs()
    start = [sys.executable, "-m", "lora", "finetune", str(base), "-d", str(rows), "-o", str(output), "-q"]
    return [*start, *FLAGS, *more]


def start(output: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(output, *more),
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(arguments: list[str], limits: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        env=ENVIRONMENT,
        preexec_fn=limits,
        text=True,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )


def finish(output: Path, *more: str) -> None:
    done = run(command(output, *more))
    assert done.returncode == 0, done.stderr


def kill(process: subprocess.Popen[str], is_time: Callable[[], bool]) -> bool:
    """Kill the process as soon as `is_time`; say whether it was alive."""
    end = time.monotonic() + SECONDS
    while not is_time() and process.poll() is None and time.monotonic() < end:
        pass  # a write takes less than any sleep
    process.kill()
    process.communicate(timeout=SECONDS)
    return process.returncode == -signal.SIGKILL


def kill_while_it_trains(output: Path, delay: float) -> bool:
    """Start or go on, and kill `delay` seconds after the first state is there."""
    process = start(output, "--resume")
    begun = output / "run.json"
    while not begun.exists() and process.poll() is None:
        time.sleep(0.002)
    moment = time.monotonic() + delay
    return kill(process, lambda: time.monotonic() >= moment)


def kill_while_it_writes(output: Path, pattern: str) -> bool:
    """Start or go on, and kill once something of `pattern` is being written and the run is under way."""
    process = start(output, "--resume")
    while not (output / "epoch-5").exists() and process.poll() is None:
        time.sleep(0.002)
    return kill(process, lambda: bool(glob.glob(pattern, root_dir=output)))


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    finish(tmp_path / "whole")
    alive, output = 0, tmp_path / "killed"
    for delay in (0.05, 0.1):
        alive += kill_while_it_trains(output, delay)
    alive += kill_while_it_writes(output, f".{STATE_FILE}{PARTIAL}")
    assert alive, "the run was over before it was killed"
    finish(output, "--resume")
    assert written(output) == written(tmp_path / "whole")


@pytest.mark.campaign
def test_twenty_killed_processes_go_on(tmp_path: Path) -> None:
    finish(tmp_path / "whole")
    rng, alive = np.random.default_rng(0), 0
    for number in range(20):
        output = tmp_path / f"killed-{number}"
        alive += kill_while_it_trains(output, rng.uniform(0, 0.6))
        finish(output, "--resume")
        assert written(output) == written(tmp_path / "whole"), f"kill {number}"
    print(f"{alive} of 20 were killed while they trained")
    assert alive >= 15


@pytest.mark.campaign
@pytest.mark.parametrize(
    "pattern",
    [
        f".{STATE_FILE}{PARTIAL}",
        f".best{PARTIAL}",
        f".best{PARTIAL}/adapter_model.safetensors",
        f".epoch-*{PARTIAL}",
        f"*/.README.md{PARTIAL}",
    ],
)
def test_processes_killed_over_a_write_go_on(tmp_path: Path, pattern: str) -> None:
    finish(tmp_path / "whole")
    left = 0
    for number in range(4):
        output = tmp_path / f"killed-{number}"
        kill_while_it_writes(output, pattern)
        left += any(output.rglob(PARTIAL))
        finish(output, "--resume")
        assert written(output) == written(tmp_path / "whole"), f"kill {number}"
        assert not any(output.rglob(PARTIAL))
    print(f"{left} of 4 left a partial write behind")
    assert left


def one_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line on stderr that is no note."""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert (done.stdout, len(errors)) == ("", 1), done.stderr
    assert errors[0].startswith("error: ")
    return errors[0]


def test_a_full_disk_leaves_the_last_state_whole(tmp_path: Path) -> None:
    output = tmp_path / "run"
    finish(tmp_path / "whole")
    kill_while_it_trains(output, 0.1)
    state = (output / STATE_FILE).read_bytes()
    half = len(state) // 2  # no file of the process may be longer
    limits = (half, half)
    done = run(command(output, "--resume"), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert done.returncode == 7
    assert "cannot write" in one_error(done)
    assert (output / STATE_FILE).read_bytes() == state
    assert not any(output.rglob(PARTIAL))
    finish(output, "--resume")
    assert written(output) == written(tmp_path / "whole")


SMALL_DISK = """
mount -t tmpfs -o size={blocks}k tmpfs {disk}
{train} 2> {left}/error || echo $? > {left}/exit-code
cp -a {disk}/. {left}/full
mount -o remount,size=64m {disk}
{train} --resume 2> {left}/resumed
cp -a {disk}/. {left}/resumed-run
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.campaign
@pytest.mark.skipif(not can_mount(), reason="a small disk needs a mount namespace of one's own")
def test_a_small_disk_fills(tmp_path: Path) -> None:
    finish(tmp_path / "whole")
    need = sum(-(-path.stat().st_size // 4096) * 4 for path in (tmp_path / "whole").rglob("*"))
    inputs()  # outside the small disk
    full = 0
    for number in range(12):
        disk, left = tmp_path / f"disk-{number}", tmp_path / f"left-{number}"
        disk.mkdir()
        (left / "full").mkdir(parents=True)
        (left / "resumed-run").mkdir()
        fields = {
            "blocks": int(need * (number + 1) / 12),
            "disk": disk,
            "left": left,
            "train": shlex.join(command(disk)),
        }
        done = run([*NAMESPACE, "sh", "-ec", SMALL_DISK.format(**fields)])
        assert done.returncode == 0, done.stderr + (left / "resumed").read_text()
        if (left / "exit-code").exists():
            full += 1
            assert (left / "exit-code").read_text() == "7\n"
            error = (left / "error").read_text().splitlines()
            assert "No space left on device" in error[-1]
            assert [line.startswith("error: ") for line in error].count(True) == 1
            assert not any((left / "full").rglob(PARTIAL))
        assert written(left / "resumed-run") == written(tmp_path / "whole")
    print(f"{full} of 12 disks were full before the run ended")
    assert full >= 8


@pytest.mark.campaign
def test_each_damaged_file_is_named_in_one_line(tmp_path: Path) -> None:
    output = tmp_path / "run"
    kill_while_it_writes(output, f".{STATE_FILE}{PARTIAL}")
    finish(output, "--resume")
    best, (_, rows) = output / "best", inputs()
    read = [path for path in sorted(best.iterdir()) if path.name != "README.md"]
    evaluate = [sys.executable, "-m", "lora", "eval", str(best), "-d", str(rows)]
    tried = 0
    for path in [output / STATE_FILE, output / "metrics.jsonl", *read]:
        cut, flipped, gone = damages(path.read_bytes(), step=1)
        attempts = [(damaged, command(output, "--resume")) for damaged in (cut, flipped, gone)]
        if path in read and path.name != "lora_metadata.json":
            attempts += [(damaged, evaluate) for damaged in (cut, gone)]
        for damaged, arguments in attempts:
            with whole_again(path):
                path.unlink()
                if damaged is not None:
                    path.write_bytes(damaged)
                done = run(arguments)
            tried += 1
            assert done.returncode in (3, 4, 5, 6), (path, arguments, done)
            # a folder without adapter_config.json is no adapter, and is named itself
            assert (str(best) if arguments is evaluate else path.name) in one_error(done)
    print(f"{tried} damaged files, {tried} errors of one line")
    finish(output, "--resume")
