"""`python -m tests.sanitize` with a tool of the test's own in the place of NVIDIA's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import sanitize


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a compute-sanitizer that writes its arguments down, and finds something with racecheck."""
    path = tmp_path / sanitize.TOOL
    path.write_text(f'#!/bin/sh\necho "$HYPOTHESIS_PROFILE $@" >> {tmp_path}/called\n[ "$2" != racecheck ]\n')
    path.chmod(0o755)
    monkeypatch.setattr(sanitize, "cuda_device", lambda: "a GPU")
    monkeypatch.setattr(sanitize, "find_tool", lambda: str(path))
    return path


@pytest.mark.parametrize(("tools", "code"), [(["memcheck"], 0), (["racecheck", "memcheck"], 1)])
def test_every_tool_runs_and_the_worst_decides(tool: Path, tools: list[str], code: int) -> None:
    assert sanitize.main(["--operations", "rope", "--tools", *tools]) == code
    called = (tool.parent / "called").read_text().splitlines()
    assert [line.split()[:5] for line in called] == [
        ["few", "--tool", name, "--error-exitcode", "1"] for name in tools
    ]
    assert all(line.endswith("-m tests.sanitize --under-tool rope") for line in called)


def test_without_a_gpu_or_a_tool_it_says_so(
    tool: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    assert sanitize.main([]) == 5
    assert "sanitize: not run: compute-sanitizer was not found: pip install" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "cuda_device", lambda: None)
    assert sanitize.main([]) == 5
    assert capsys.readouterr().out == "sanitize: not run: no CUDA device\n"
    assert not (tool.parent / "called").exists()


def test_the_tool_beside_the_headers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / sanitize.TOOL
    tool.touch(mode=0o755)
    monkeypatch.setattr(sanitize.toolkit, "headers", lambda major: tmp_path / "include")
    assert sanitize.find_tool() == str(tool)


def test_under_the_tool_arrays_do_not_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    cuda = SimpleNamespace(set_allocator=told.append)
    monkeypatch.setattr(sanitize, "cupy_module", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(sanitize.pytest, "main", lambda arguments: told.append(arguments) or 1)
    assert sanitize.main(["--under-tool", "rope", "swiglu"]) == 1
    allocator, arguments = told
    assert allocator is None
    assert arguments[-2:] == ["tests/ops/test_rope.py", "tests/ops/test_swiglu.py"]
    assert "--gpu" in arguments
