"""What the installation says of itself."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lora.backend import blas_facts, device, nvrtc, toolkit
from lora.backend.device_facts import device_facts
from lora.cli.doctor import _advice
from lora.dispatch import Ops
from tests.backend.fake_cupy import FakeCupy


def test_it_names_what_decides_bits_and_speed(lora) -> None:
    document = lora("doctor", "--json").document
    assert document["packages"]["numpy"] == np.__version__
    assert document["blas"] == blas_facts()
    for key in ("operations", "cuda_operations"):
        assert [choice["operation"] for choice in document[key]] == list(Ops._fields)
        assert all(choice["reason"] for choice in document[key])
    assert 0 < document["memory_gb"]["available"] <= document["memory_gb"]["total"]
    assert document["cupy"] is None or "cupy" in document["cupy"]


def test_text_has_a_line_for_each_fact(lora, monkeypatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    outcome = lora("doctor")
    assert (outcome.exit_code, outcome.err) == (0, "")
    for said in ("BLAS:", "OPENBLAS_NUM_THREADS 2", "CuPy:", "Hub offline:", "rmsnorm", "NumPy in blocks"):
        assert said in outcome.out


def test_where_nothing_of_cuda_is_there_it_says_what_is_missing(lora, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(toolkit, "_folders", lambda *arguments: iter(()))
    for remembered in (nvrtc._library, nvrtc.version):
        remembered.cache_clear()
    outcome, document = lora("doctor"), lora("doctor", "--json").document
    assert (outcome.exit_code, outcome.err) == (0, "")
    assert "Device cuda lacks:  device 'cuda' needs CuPy" in outcome.out
    assert [document[key] for key in ("nvrtc", "cublas", "gpu", "compute_capability")] == [None] * 4
    assert [
        next(word for word in ("CuPy", "nvrtc", "cublas") if word in text)
        for text in document["cuda_problems"]
    ] == ["CuPy", "nvrtc", "cublas"]


def test_a_gpu_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    device._gpu.cache_clear()
    facts = device_facts()
    device._gpu.cache_clear()
    assert (facts.gpu, facts.compute_capability, facts.gpu_memory_gb) == ("Fake H100", "9.0", 85.9)
    assert facts.nvrtc == ".".join(map(str, nvrtc.version()))


@pytest.mark.parametrize(
    ("core", "features", "setting", "advised"),
    [
        ("Haswell", ["X86_V3", "X86_V4"], None, True),
        ("Zen", ["AVX512F"], None, True),
        ("Haswell", ["X86_V3"], None, False),
        ("SkylakeX", ["X86_V4"], None, False),
        ("Haswell", ["X86_V4"], "Haswell", False),
        (None, ["X86_V4"], None, False),
    ],
)
def test_a_slow_core_is_told_unless_it_was_chosen(
    monkeypatch, core: str | None, features: list[str], setting: str | None, advised: bool
) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if setting:
        monkeypatch.setenv("OPENBLAS_CORETYPE", setting)
    advice = _advice({"core": core}, features)
    assert (advice is not None) is advised
    if advised:
        assert "OPENBLAS_CORETYPE=SkylakeX" in advice
