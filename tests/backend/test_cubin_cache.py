"""A stored cubin is taken exactly where everything that decided it is the same, and its bytes are whole."""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora.backend import cubin_cache, nvrtc
from lora.backend.cubin_cache import cache_folder, cache_key, cached_cubin
from lora.backend.sources import reachable
from lora.errors import KernelError, LoraWarning, WriteError

NAME = "fill<float>"
FILES = {
    "fill.cu": '#include "outer.cuh"\ntemplate <typename T> __global__ void fill(T* x) { x[0] = VALUE; }\n',
    "outer.cuh": '#pragma once\n  #  include "inner.cuh"\n#if 0\n#include "unused.cuh"\n#endif\n',
    "inner.cuh": "#include <cuda_bf16.h>\n#define VALUE 1.0f\n",
    "unused.cuh": "#error not to be compiled\n",
}


@pytest.fixture(autouse=True)
def source(kernels: Path) -> Path:
    for name, text in FILES.items():
        (kernels / name).write_text(text)
    (kernels / "stranger.cuh").write_text("")
    return kernels


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count what is compiled."""
    seen: list[str] = []
    compile_cubin = nvrtc.compile_cubin
    monkeypatch.setattr(
        nvrtc, "compile_cubin", lambda *whole: (seen.append(whole[1][0]), compile_cubin(*whole))[1]
    )
    return seen


# every example puts back what it edited
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edited=st.sampled_from(sorted(FILES)), place=st.integers(0, 200), comment=st.text("ab ", min_size=1))
def test_an_edit_of_any_text_that_is_reached_gives_another_key(
    source: Path, edited: str, place: int, comment: str
) -> None:
    before = cache_key("fill.cu", NAME, "sm_80")
    path, text = source / edited, FILES[edited]
    place = min(place, len(text))
    path.write_text(f"{text[:place]}/*{comment}*/{text[place:]}")
    # an include that the edit broke reaches less, and is another text all the same
    edited_key = cache_key("fill.cu", NAME, "sm_80")
    path.write_text(text)
    assert edited_key != before
    assert cache_key("fill.cu", NAME, "sm_80") == before


def test_a_text_that_is_not_reached_changes_nothing(source: Path) -> None:
    before = cache_key("fill.cu", NAME, "sm_80")
    (source / "stranger.cuh").write_text("// edited")
    assert cache_key("fill.cu", NAME, "sm_80") == before


def test_instance_architecture_options_and_release_each_give_another_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {cache_key("fill.cu", NAME, "sm_80"), cache_key("fill.cu", NAME, "sm_90")}
    keys.add(cache_key("fill.cu", "fill<int>", "sm_80"))
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--use_fast_math"))
        keys.add(cache_key("fill.cu", NAME, "sm_80"))
    headers = nvrtc.include_folders()
    monkeypatch.setattr(nvrtc, "include_folders", lambda: headers)
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 0))
    keys.add(cache_key("fill.cu", NAME, "sm_80"))
    assert len(keys) == 5


def test_text_moved_from_one_file_to_another_gives_another_key(source: Path) -> None:
    before = cache_key("fill.cu", NAME, "sm_80")
    (source / "outer.cuh").write_text(FILES["outer.cuh"] + FILES["unused.cuh"])
    (source / "unused.cuh").write_text("")
    assert cache_key("fill.cu", NAME, "sm_80") != before


def test_cudas_own_headers_are_part_of_what_is_reached(source: Path) -> None:
    names = {path.name for path in reachable(source / "fill.cu", nvrtc.include_folders())}
    assert {"cuda_bf16.h", "cuda_bf16.hpp", *FILES} <= names


def test_an_include_by_macro_is_refused_for_what_it_reaches_is_unknown(source: Path) -> None:
    (source / "outer.cuh").write_text('#define WHERE "inner.cuh"\n#include WHERE\n')
    with pytest.raises(KernelError, match=r"outer\.cuh: #include WHERE: expected a file's name"):
        cache_key("fill.cu", NAME, "sm_80")


def test_the_second_time_nothing_is_compiled(compilations: list[str]) -> None:
    first, second = cached_cubin("fill.cu", NAME, "sm_80"), cached_cubin("fill.cu", NAME, "sm_80")
    assert compilations == [NAME]
    assert first == second
    assert first.symbol.encode() in first.path.read_bytes()
    assert first.path.is_relative_to(cache_folder())


def test_an_edited_header_is_compiled_anew(source: Path, compilations: list[str]) -> None:
    first = cached_cubin("fill.cu", NAME, "sm_80").path.read_bytes()
    (source / "inner.cuh").write_text("#define VALUE 2.0f\n")
    assert cached_cubin("fill.cu", NAME, "sm_80").path.read_bytes() != first
    assert compilations == [NAME, NAME]


def entry() -> Path:
    return cache_folder() / f"{cache_key('fill.cu', NAME, 'sm_80')}.json"


DAMAGES = {
    "cubin cut": lambda cubin: cubin.write_bytes(cubin.read_bytes()[:-1]),
    "cubin changed": lambda cubin: cubin.write_bytes(cubin.read_bytes()[:-1] + b"\xff"),
    "cubin gone": lambda cubin: cubin.unlink(),
    "entry empty": lambda cubin: entry().write_bytes(b""),
    "entry no object": lambda cubin: entry().write_text("[]"),
    "entry without symbol": lambda cubin: entry().write_text(json.dumps({"sha256": cubin.stem})),
    "entry no text": lambda cubin: entry().write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again_and_said(damage: str, compilations: list[str]) -> None:
    cubin = cached_cubin("fill.cu", NAME, "sm_80")
    whole = cubin.path.read_bytes()
    DAMAGES[damage](cubin.path)
    with pytest.warns(LoraWarning, match="a damaged entry of the kernel cache is compiled again"):
        assert cached_cubin("fill.cu", NAME, "sm_80") == cubin
    assert cubin.path.read_bytes() == whole
    with warnings.catch_warnings(action="error"):
        cached_cubin("fill.cu", NAME, "sm_80")
    assert compilations == [NAME, NAME]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(WriteError, match=r"cannot write the kernel cache .*set XDG_CACHE_HOME"):
        cached_cubin("fill.cu", NAME, "sm_80")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cubin_cache.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_cubin("fill.cu", NAME, "sm_80")
    assert [path for path in cache_folder().iterdir() if not path.name.startswith(".partial-")] == []
    assert cached_cubin("fill.cu", NAME, "sm_80").path.is_file()


@pytest.mark.parametrize(
    ("setting", "expected"), [("", ".cache"), ("relative", ".cache"), ("/somewhere", None)]
)
def test_the_folder_follows_the_xdg_specification(
    setting: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", setting)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = tmp_path / expected if expected else Path(setting)
    assert cache_folder() == base / "lora-numpy" / "cubins"


def _take(folder: Path, barrier: object) -> str:
    cubin_cache.asset = nvrtc.asset = lambda *parts: folder.joinpath(*parts[1:])
    barrier.wait()
    with warnings.catch_warnings(action="error"):
        cubin = cached_cubin("fill.cu", NAME, "sm_80")
    return f"{cubin.symbol} {len(cubin.path.read_bytes())}"


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_processes_that_compile_at_once_get_the_same(source: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(4) as pool:
        barrier = manager.Barrier(4)
        taken = pool.starmap(_take, [(source, barrier)] * 4)
    assert len(set(taken)) == 1
    assert len(list(cache_folder().glob("*.json"))) == 1
    assert list(cache_folder().glob(".partial-*")) == []
