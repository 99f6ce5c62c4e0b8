"""Names into folders; the hub is played by a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from lora.errors import FileFormatError, LoadError, MissingFileError, UnsupportedError
from lora.io.hub import is_path, resolve


class Hub:
    """Plays `snapshot_download`: a cached folder, a folder that a download gives, or neither."""

    def __init__(self, cached: Path | None = None, fetched: Path | Exception | None = None):
        self.cached, self.fetched = cached, fetched
        self.downloads = 0

    def __call__(self, repo_id: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert "*.safetensors" in allow_patterns
        if not local_files_only:
            self.downloads += 1
        found: Any = self.cached if local_files_only else self.fetched
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise LocalEntryNotFoundError(f"{repo_id}: outgoing traffic has been disabled\nmore of it")
        return str(found)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model.safetensors").touch()
    return tmp_path / "whole"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    folder = tmp_path / "partial"
    folder.mkdir()
    index = (
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "model-00001-of-00002.safetensors").touch()
    return folder


def play(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


@pytest.mark.parametrize("name", ["/a", "./a", "../a", ".", "a/b/c", "a/b/", "model.apr"])
def test_paths_by_their_form(name: str) -> None:
    assert is_path(name)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-Coder-0.5B", "gpt2"])
def test_ids_by_their_form(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_path(name)
    Path(name).mkdir(parents=True)
    assert is_path(name)
    assert resolve(name) == Path(name)


def test_a_path_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = play(monkeypatch, Hub())
    with pytest.raises(MissingFileError, match="nowhere"):
        resolve(tmp_path / "nowhere")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UnsupportedError, match=r"model\.gguf is a file"):
        resolve(tmp_path / "model.gguf")
    (tmp_path / "model.apr").touch()
    with pytest.raises(FileFormatError, match=r"model\.apr: truncated"):
        resolve(tmp_path / "model.apr")
    assert hub.downloads == 0


def test_the_cache_comes_first(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    hub = play(monkeypatch, Hub(cached=whole, fetched=LoadError("asked")))
    assert resolve("Qwen/Qwen2.5-Coder-0.5B") == whole
    assert hub.downloads == 0


def test_what_is_not_cached_is_fetched(monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    play(monkeypatch, Hub(fetched=whole))
    assert resolve("Qwen/Qwen2.5-Coder-0.5B") == whole


def test_a_part_in_the_cache_is_completed(
    monkeypatch: pytest.MonkeyPatch, whole: Path, partial: Path
) -> None:
    play(monkeypatch, Hub(cached=partial, fetched=whole))
    assert resolve("Qwen/Qwen2.5-Coder-0.5B") == whole


@pytest.mark.parametrize("failure", [None, OSError("no route"), ValueError("bad id"), "partial"])
def test_offline_it_is_an_error_with_the_command_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch, partial: Path, failure: Any
) -> None:
    play(monkeypatch, Hub(cached=partial, fetched=partial if failure == "partial" else failure))
    with pytest.raises(
        LoadError, match=r"hf download Qwen/Qwen2\.5-Coder-0\.5B --include '\*\.json'"
    ) as caught:
        resolve("Qwen/Qwen2.5-Coder-0.5B")
    assert "\n" not in str(caught.value)


def test_what_is_neither_a_path_nor_an_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = play(monkeypatch, Hub())
    with pytest.raises(MissingFileError, match="my model: no such file or folder"):
        resolve("my model")
    assert hub.downloads == 0
