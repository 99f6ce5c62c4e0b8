"""Kernels of the tests' own, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora.backend.cubin_cache
import lora.backend.nvrtc
import lora.backend.signature


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty folder that the library takes for its kernels, and a cache that is empty too."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    for module in (lora.backend.cubin_cache, lora.backend.nvrtc, lora.backend.signature):
        monkeypatch.setattr(module, "asset", lambda *parts: folder.joinpath(*parts[1:]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget = (lora.backend.signature.read_signature, lora.backend.signature._declarations)
    for function in forget:
        function.cache_clear()
    return folder
