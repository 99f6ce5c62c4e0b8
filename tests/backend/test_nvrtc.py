"""The binding of NVRTC gives machine code, its symbols, what ptxas says of it, and errors that help."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora.backend import nvrtc, toolkit
from lora.backend.nvrtc import Usage, compile_cubin, usage
from lora.errors import DeviceError, KernelError

SOURCE = """
#include "tile.cuh"
template <typename T, int N>
__global__ void scale(const T* x, T* y, float s)
{
    __shared__ float part[N];
    part[threadIdx.x] = s * widened(x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = part[(threadIdx.x + 1) % N];
}
"""
HEADER = """
#include <cuda_bf16.h>
__device__ float widened(float x) { return x; }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
"""
SPILLS = """
__global__ void __launch_bounds__(1024) crowded(float* x)
{
    float held[128];
    #pragma unroll
    for (int i = 0; i < 128; i++) held[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 128; i++) x[i * 1024 + threadIdx.x] = held[127 - i] * held[(i * 7) % 128];
}
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_instances_become_machine_code_with_a_report(kernels: Path, arch: str) -> None:
    (kernels / "scale.cu").write_text(SOURCE)
    (kernels / "tile.cuh").write_text(HEADER)
    names = ["scale<float, 32>", "scale<__nv_bfloat16, 64>"]
    compiled = compile_cubin("scale.cu", names, arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    reports = usage(compiled.log)
    assert set(compiled.lowered) == set(names)
    assert all(symbol.encode() in compiled.cubin for symbol in compiled.lowered.values())
    for name, shared in zip(names, (128, 256), strict=True):
        report = reports[compiled.lowered[name]]
        assert (report.spilled_bytes, report.shared_bytes) == (0, shared)
        assert 4 < report.registers < 40


def test_what_does_not_fit_into_registers_is_reported(kernels: Path) -> None:
    (kernels / "crowded.cu").write_text(SPILLS)
    compiled = compile_cubin("crowded.cu", ["crowded"], "sm_90")
    report = usage(compiled.log)[compiled.lowered["crowded"]]
    assert report.registers <= 64
    assert report.spilled_bytes > 0


def test_the_report_is_read_as_both_releases_write_it() -> None:
    twelve = (
        "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 133 registers, used 1 barriers, 16 bytes stack, 1024 bytes smem\n"
    )
    thirteen = twelve.replace("    16 bytes stack", "ptxas         .     16 bytes stack")
    assert usage(twelve) == usage(thirteen) == {"_Z1kPf": Usage(133, 12, 16, 1024)}


def test_an_error_names_file_and_line(kernels: Path) -> None:
    (kernels / "wrong.cu").write_text("__global__ void k(float* x)\n{\n    x[0] = unknown;\n}\n")
    with pytest.raises(KernelError, match=r'wrong\.cu\(3\): error: identifier "unknown" is undefined'):
        compile_cubin("wrong.cu", ["k"], "sm_80")


def test_an_instance_that_the_source_lacks_is_an_error(kernels: Path) -> None:
    (kernels / "k.cu").write_text("__global__ void k(float* x) {}\n")
    with pytest.raises(KernelError, match="missing"):
        compile_cubin("k.cu", ["missing<float>"], "sm_80")


def test_an_architecture_that_this_release_lacks_is_named(kernels: Path) -> None:
    (kernels / "k.cu").write_text("__global__ void k(float* x) {}\n")
    with pytest.raises(DeviceError, match="and not for sm_20"):
        compile_cubin("k.cu", ["k"], "sm_20")


def lay_out_wheels(folder: Path, release: int, *components: str) -> None:
    """Lay out empty libraries and headers as NVIDIA's wheels of a CUDA release do."""
    for component in components:
        root = folder / "nvidia" / (f"cu{release}" if release == 13 else component)
        for sub in ("lib", "include"):
            (root / sub).mkdir(parents=True, exist_ok=True)
        (root / "lib" / f"lib{component.removeprefix('cuda_')}.so.{release}").touch()
        if component == "cuda_runtime":
            (root / "include" / "cuda_bf16.h").touch()


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide every CUDA that this machine has."""
    monkeypatch.setattr(toolkit, "find_spec", lambda name: None)
    monkeypatch.setattr(toolkit, "SYSTEM_ROOTS", ())
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nothing_installed")
def test_without_cuda_the_error_names_what_to_install() -> None:
    with pytest.raises(
        DeviceError, match=r"libnvrtc\.so was not found; .*pip install 'lora-numpy\[cuda13\]'"
    ):
        toolkit.library("nvrtc")
    with pytest.raises(DeviceError, match=r"headers of CUDA 13 .*pip install 'lora-numpy\[cuda13\]'"):
        toolkit.headers(13)


@pytest.mark.parametrize("release", [12, 13])
def test_libraries_and_headers_are_found_in_the_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: int
) -> None:
    lay_out_wheels(tmp_path, release, "cuda_nvrtc", "cuda_runtime", "cublas")
    monkeypatch.setattr(toolkit, "SYSTEM_ROOTS", ())
    monkeypatch.setattr(toolkit, "majors", lambda: (release,))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    for name in ("nvrtc", "cublas"):
        path = toolkit.library(name)
        assert path.is_relative_to(tmp_path)
        assert path.name == f"lib{name}.so.{release}"
    assert toolkit.headers(release).is_relative_to(tmp_path)


@pytest.mark.usefixtures("nothing_installed")
def test_cuda_path_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libnvrtc.so.12").touch()
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    monkeypatch.setattr(toolkit, "majors", lambda: (13, 12))
    assert toolkit.library("nvrtc") == tmp_path / "lib64" / "libnvrtc.so.12"


def test_the_release_that_cupy_is_built_for_comes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, expected in (("cupy-cuda12x", (12,)), ("cupy-cuda13x", (13,)), ("none", (13, 12))):
        monkeypatch.setattr(toolkit, "_installed", lambda package, name=installed: package == name)
        toolkit.majors.cache_clear()
        assert toolkit.majors() == expected
    toolkit.majors.cache_clear()


def test_the_version_is_a_release_that_the_package_names() -> None:
    major, _ = nvrtc.version()
    assert major in toolkit.majors()
    assert {"sm_80", "sm_90"} <= set(nvrtc.architectures())
