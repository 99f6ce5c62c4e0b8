"""Every kernel compiles without a word for every architecture, and takes no more than is recorded."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from lora.backend import Kernel, nvrtc
from lora.backend.nvrtc import Usage
from lora.dispatch import CUDA, Unbuilt
from tests.compile.instances import ARCHITECTURES, Build, build, instructions, kernels, modules
from tests.compile.record import EXPECTED, Expected, Taken, expected, taken

REGISTERS = 65536  # of a multiprocessor, compute capability 8.0 to 9.0


def faults(kernel: Kernel, arch: str, build: Build, expected: Expected) -> list[str]:
    """Return what is wrong with a build of `kernel`."""
    usage, found = build.usage, taken(kernel, build)
    patterns = expected.instructions.items()
    wanted = {name for pattern, names in patterns if fnmatchcase(kernel.name, pattern) for name in names}
    # registers are given to a warp in units of 8 a thread
    registers = -(-usage.registers // 8) * 8 * kernel.threads
    said = {
        f"warnings: {build.warnings}": bool(build.warnings),
        f"{usage.spilled_bytes} bytes of registers spilled": usage.spilled_bytes > 0,
        f"{usage.stack_bytes} bytes of local memory": usage.stack_bytes > 0,
        f"{registers} registers in a block of {kernel.threads} threads": registers > REGISTERS,
        f"{found['shared']} bytes of shared memory": found["shared"] > ARCHITECTURES[arch],
        f"lacks {sorted(wanted - build.instructions)}": not wanted <= build.instructions,
    }
    limits = expected.usage.get(arch, {}).get(kernel.name)
    return [text for text, wrong in said.items() if wrong] + _excess(found, limits)


def _excess(found: Taken, limits: Taken | None) -> list[str]:
    if limits is None:
        return ["nothing recorded: python -m tests.compile.record"]
    return [f"{key} {found[key]}, recorded {limits[key]}" for key in found if found[key] > limits[key]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: f"{kernel.file}-{kernel.name}")
def test_a_kernel_compiles_and_takes_what_is_recorded(kernel: Kernel, arch: str) -> None:
    assert faults(kernel, arch, build(kernel, arch), expected(kernel.file)) == []


def test_nothing_is_expected_of_a_kernel_that_is_not_there() -> None:
    for path in EXPECTED.glob("*.yaml"):
        names = {kernel.name for kernel in kernels() if kernel.file == f"{path.stem}.cu"}
        instructions, usage = expected(f"{path.stem}.cu")
        assert set(usage) == set(ARCHITECTURES), path.name
        assert {name for recorded in usage.values() for name in recorded} <= names, path.name
        idle = [p for p in instructions if not any(fnmatchcase(name, p) for name in names)]
        assert idle == [], path.name


def test_every_module_that_launches_kernels_is_dispatched() -> None:
    dispatched = {name for name, module in CUDA._asdict().items() if not isinstance(module, Unbuilt)}
    assert dispatched == set(modules())


KERNEL = Kernel("k.cu", "k<float>", 256, 1024)
SOUND = Build(Usage(64, 0, 0, 256), frozenset({"HMMA", "LDG"}), ())
LIMITS = {"k<float>": {"registers": 64, "shared": 1280}}
EXPECTATION = Expected({"k<*": ["HMMA"], "other<*": ["LDSM"]}, {"sm_80": LIMITS, "sm_90": LIMITS})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"usage": Usage(65, 0, 0, 256)}, "registers 65, recorded 64"),
        ({"usage": Usage(64, 0, 0, 257)}, "shared 1281, recorded 1280"),
        ({"usage": Usage(64, 4, 0, 256)}, "4 bytes of registers spilled"),
        ({"usage": Usage(64, 0, 16, 256)}, "16 bytes of local memory"),
        ({"instructions": frozenset({"LDG"})}, "lacks ['HMMA']"),
        ({"warnings": ("k.cu(3): warning #177-D",)}, "warnings: ('k.cu(3): warning #177-D',)"),
    ],
)
def test_a_fault_of_a_build_would_be_seen(changes: dict[str, Any], fault: str) -> None:
    assert faults(KERNEL, "sm_80", SOUND, EXPECTATION) == []
    assert faults(KERNEL, "sm_80", SOUND._replace(**changes), EXPECTATION) == [fault]


def test_what_a_block_cannot_have_would_be_seen() -> None:
    ample = {"k<float>": {"registers": 255, "shared": 10**6}}
    loose = Expected({}, {"sm_80": ample, "sm_90": ample})
    many, large = KERNEL._replace(threads=1024), KERNEL._replace(shared_bytes=163 * 1024)
    crowded = SOUND._replace(usage=Usage(65, 0, 0, 256))
    assert faults(many, "sm_80", crowded, loose) == ["73728 registers in a block of 1024 threads"]
    assert faults(large, "sm_80", SOUND, loose) == ["167168 bytes of shared memory"]
    assert faults(large, "sm_90", SOUND, loose) == []


def test_a_kernel_that_was_never_recorded_would_be_seen() -> None:
    assert faults(KERNEL, "sm_80", SOUND, Expected({}, {})) == [
        "nothing recorded: python -m tests.compile.record"
    ]


MIXED = """
template <bool TENSOR> __global__ void mixed(float* d, const unsigned* a)
{
    if (TENSOR) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
    } else if (a[threadIdx.x] > 7) {
        d[threadIdx.x] *= 2.0f;
    }
}
"""


def test_machine_instructions_are_read_kernel_by_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mixed.cu").write_text(MIXED)
    monkeypatch.setattr(nvrtc, "asset", lambda *parts: tmp_path.joinpath(*parts[1:]))
    compiled = nvrtc.compile_cubin("mixed.cu", ["mixed<true>", "mixed<false>"], "sm_90")
    found = instructions(compiled.cubin)
    tensor, plain = (found[compiled.lowered[f"mixed<{kind}>"]] for kind in ("true", "false"))
    assert {"HMMA", "STG", "EXIT"} <= tensor
    assert "HMMA" not in plain
    assert "STG" in plain  # under a predicate
