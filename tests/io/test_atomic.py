"""The old file or the new one, and never half of either: also when the process is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora.errors import WriteError
from lora.io.atomic import replace_folder, write_atomically, write_text

# the process dies at the first rename, with everything written and nothing renamed
KILLED = """
import os, sys
from pathlib import Path
from lora.io import atomic
os.replace = lambda *paths: os._exit(9)
target = Path(sys.argv[1])
"""


def killed(target: Path, script: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED + script, str(target)], check=False)
    assert done.returncode == 9


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    write_text(target, "old")
    killed(target, "atomic.write_text(target, 'new, and longer than the old one')")
    assert target.read_text() == "old"


def test_a_kill_before_the_rename_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with replace_folder(target) as new:
        (new / "file").write_text("old")
    killed(target, "with atomic.replace_folder(target) as new: (new / 'file').write_text('new')")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "old"


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), write_atomically(target) as temporary:
        _write_half(temporary)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_while_writing_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with replace_folder(target) as new:
        (new / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), replace_folder(target) as new:
        _write_half(new / "file")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_made_with_its_parents_and_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    write_text(tmp_path / "a" / "b" / "file", "text")
    assert (tmp_path / "a" / "b" / "file").stat().st_mode == plain.stat().st_mode
    with replace_folder(tmp_path / "c" / "d") as new:
        (new / "x").write_text("")
    assert [path.name for path in (tmp_path / "c" / "d").iterdir()] == ["x"]


def test_a_new_folder_keeps_what_is_not_its_own_and_drops_what_is_stale(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    for name in ("model-00002-of-00002.safetensors", "README.md", "config.json"):
        (target / name).write_text("old")
    (target / "logs").mkdir()
    with replace_folder(target, owns=("model*", "config.json")) as new:
        (new / "model.safetensors").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "logs", "model.safetensors"]
    assert (target / "README.md").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(WriteError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "text")
    with pytest.raises(WriteError, match="cannot write"), replace_folder(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_the_current_folder_is_not_swapped_from_under_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WriteError, match="current folder"), replace_folder(Path(".")):
        pass


def test_a_swap_that_fails_half_way_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder"
    with replace_folder(target) as new:
        (new / "file").write_text("old")
    plain, calls = os.replace, []

    def second_fails(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        plain(source, destination)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(WriteError, match="No space left on device"), replace_folder(target) as new:
        (new / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
