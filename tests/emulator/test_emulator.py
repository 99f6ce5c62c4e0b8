"""What the emulator promises: CUDA's semantics, and an error where a GPU would only misbehave."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora.backend.signature
from lora.backend import bfloat16
from lora.backend.kernel import Kernel, launch, using_engine
from tests.emulator import requires_emulator
from tests.emulator.engine import Emulator, EmulatorError

pytestmark = requires_emulator
SOURCES = Path(__file__).parent / "kernels"
KERNELS = tuple(
    re.findall(r"__global__ void (\w+)\(", (SOURCES / "semantics.cu").read_text(encoding="utf-8"))
)
schedules = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the signatures be read from the kernels of this test."""
    monkeypatch.setattr(lora.backend.signature, "asset", lambda *parts: SOURCES.joinpath(*parts[1:]))


def run(name: str, *arguments: Any, threads: int = 32, grid: tuple[int, ...] = (1,), **how: Any) -> Emulator:
    shared = how.pop("shared", 0)
    emulator = Emulator(how.pop("seed", 0), kernels=SOURCES, instances=lambda _: KERNELS, **how)
    with using_engine(emulator):
        launch(Kernel("semantics.cu", name, threads, shared), grid, *arguments)
    return emulator


def refused(words: str, *arguments: Any, **how: Any) -> None:
    with pytest.raises(EmulatorError, match=words):
        run(*arguments, **how)


@given(seed=schedules)
def test_threads_and_blocks_are_numbered_as_cuda_numbers_them(seed: int) -> None:
    found = np.full((2, 3, 40), -1, np.int32)
    run("number", found, threads=40, grid=(3, 2), seed=seed)
    np.testing.assert_array_equal(found.ravel(), np.arange(240))


def test_scalars_and_null_pointers_arrive() -> None:
    found = np.zeros(4)
    run("scalars", None, -(2**40), 0.5, True, found)
    np.testing.assert_array_equal(found, [1, -(2**40), 0.5, 1])


@given(seed=schedules)
def test_shuffles(seed: int) -> None:
    lanes = np.arange(32)
    found = np.zeros((6, 32), np.int32)
    run("shuffle", found, seed=seed)
    within = lanes % 8
    expected = [
        np.full(32, 5),  # from lane 5
        lanes ^ 3,
        lanes // 8 * 8 + (within + 3) % 8,  # a rotation in groups of 8
        np.where(within + 2 < 8, lanes + 2, lanes),
        np.where(within >= 2, lanes - 2, lanes),
        np.where(lanes < 16, lanes ^ 1, lanes),  # half a warp, while the other half is elsewhere
    ]
    np.testing.assert_array_equal(found, expected)


@given(seed=schedules, votes=st.integers(0, 2**32 - 1))
def test_votes(seed: int, votes: int) -> None:
    found = np.zeros(3, np.uint32)
    run("vote", np.uint32(votes), found, seed=seed)
    np.testing.assert_array_equal(found, [votes, votes != 0, votes == 2**32 - 1])


@given(seed=schedules, threads=st.integers(1, 200))
def test_barriers_count(seed: int, threads: int) -> None:
    found = np.zeros(3, np.int32)
    run("barrier_votes", found, threads=threads, seed=seed)
    odd = threads // 2
    np.testing.assert_array_equal(found, [odd, odd > 0, odd == threads])


@given(seed=schedules, threads=st.integers(1, 128))
def test_atomics(seed: int, threads: int) -> None:
    found = np.array([0, 0, 1000], np.int32)
    run("atomics", found, threads=threads, grid=(3,), seed=seed)
    np.testing.assert_array_equal(found, [3 * threads, threads - 1, -threads + 1])


def test_bf16_rounds_as_numpy_extensions_do() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    bits[:6] = 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001, 0xFF800000, 0x80000000
    x = bits.view(np.float32)
    found = np.zeros(x.shape, bfloat16)
    run("round_to_bf16", x, found, grid=(128,))
    with np.errstate(invalid="ignore"):  # signalling NaNs are cast
        np.testing.assert_array_equal(found.astype("float32"), x.astype(bfloat16).astype("float32"))
    packed = np.zeros((2048, 2), bfloat16)
    run("pack_pairs", x.reshape(2048, 2), packed.view(np.uint32), grid=(64,))
    np.testing.assert_array_equal(packed.astype("float32").ravel(), found.astype("float32"))
    assert np.isnan(found.astype("float32")[np.isnan(x)]).all()


@given(seed=schedules)
def test_mma_is_a_matrix_product(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(bfloat16) for shape in ((16, 16), (16, 8)))
    c = rng.standard_normal((16, 8)).astype("float32")
    found = c.copy()
    run("multiply", a, b, found, seed=seed)
    exact = c + a.astype("float64") @ b.astype("float64")
    np.testing.assert_allclose(found, exact, atol=1e-5)


@given(seed=schedules)
def test_ldmatrix_feeds_mma(seed: int) -> None:
    """Fragments by ldmatrix, of rows and of columns, give the product that fragments by hand give."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(bfloat16) for shape in ((16, 16), (16, 16)))
    found = np.zeros((16, 16), np.float32)
    run("multiply_by_ldmatrix", a, b, found, shared=1024, seed=seed)
    np.testing.assert_allclose(found, a.astype("float64") @ b.astype("float64"), atol=1e-5)


def test_ldmatrix_layout() -> None:
    tiles = np.arange(256, dtype=np.uint16)
    found = np.zeros((2, 4, 32, 2), np.uint16)
    run("load_matrices", tiles, found.view(np.uint32), shared=512)
    for lane in range(32):
        for tile in range(4):
            row, column = lane // 4, lane % 4 * 2
            assert found[0, tile, lane].tolist() == [64 * tile + 8 * row + column + e for e in (0, 1)]
            assert found[1, tile, lane].tolist() == [64 * tile + 8 * (column + e) + row for e in (0, 1)]


@pytest.mark.parametrize(("stride", "extra"), [(16, 0), (128, 7), (32, 1), (144, 0)])
def test_bank_conflicts_of_ldmatrix_are_counted(stride: int, extra: int) -> None:
    emulator = run("strided_rows", stride, shared=32 * stride)
    assert emulator.bank_conflicts == (4, 4 * extra)


@given(seed=schedules)
def test_async_copies_arrive_when_they_are_waited_for(seed: int) -> None:
    x, found = np.arange(256, dtype=np.float32), np.zeros((3, 128), np.float32)
    run("copy_async", x, found, threads=32, shared=1024, seed=seed)
    assert np.isnan(found[0]).all(), "a copy was there before anybody waited"
    np.testing.assert_array_equal(found[1], x[:128])
    second = x[128:].copy()
    second[124:] = 0  # the last lane's copy is not valid
    np.testing.assert_array_equal(found[2], second)


@given(seed=schedules)
def test_shared_memory_is_poisoned_in_every_block(seed: int) -> None:
    found = np.zeros((3, 2), np.float32)
    run("read_unwritten", found, threads=1, grid=(3,), shared=64, seed=seed)
    assert np.isnan(found).all()


def test_what_the_schedule_decides_is_seen() -> None:
    """Without its barrier a reduction is right in some orders and wrong in others."""
    x = np.arange(64, dtype=np.float32)
    sums = set()
    for seed in range(20):
        found = np.zeros(1, np.float32)
        run("racing_sum", x, found, threads=64, seed=seed)
        sums.add(str(found[0]))
    assert len(sums) == 2, sums


def test_the_same_seed_is_the_same_schedule() -> None:
    orders = [np.zeros(96, np.int32) for _ in range(3)]
    for order, seed in zip(orders, (7, 7, 8), strict=True):
        run("order", order, np.zeros(1, np.int32), threads=96, seed=seed)
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    assert sorted(orders[0]) == list(range(96))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [1, 7, 1024, 5000])
@pytest.mark.parametrize("beyond", [0, 16])
def test_accesses_out_of_bounds(seed: int, size: int, beyond: int) -> None:
    x, y = np.ones(size, np.float32), np.zeros(size, np.float32)
    first, last = -1 - beyond, size + beyond
    run("copy_element", x, y, 0, size - 1, seed=seed, threads=1)
    refused(
        "illegal memory access|bytes beside",
        "copy_element",
        x,
        y,
        0,
        (last, first)[seed],
        seed=seed,
        threads=1,
    )
    if beyond or size % 4 == 0:  # else the read hits the padding to 16 bytes, which is NaN
        refused("illegal memory access", "copy_element", x, y, (last, first)[seed], 0, seed=seed, threads=1)


def test_a_fault_names_its_block_and_thread() -> None:
    refused(r"\(block 2,0,0, thread 4\)", "touch", np.zeros(68, np.int32), threads=32, grid=(3,))


def test_inputs_cannot_be_written() -> None:
    refused("illegal memory access", "write_input", np.zeros(4, np.float32), threads=1)


def test_arrays_that_overlap_are_refused() -> None:
    x = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match="overlap"):
        run("copy_element", x[:6], x[2:], 0, 0, threads=1)
    run("copy_element", x, x, 0, 1, threads=1)


@pytest.mark.parametrize(
    ("kernel", "words", "threads"),
    [
        ("store_past_shared", "illegal shared memory access: byte 64 of 64", 1),
        ("misaligned", "misaligned address", 1),
        ("misaligned_copy", "misaligned address: cp_async_16", 1),
        ("unfinished_copy", "exits while a cp.async", 1),
        ("deadlock", "deadlock.*32 in __shfl_sync.*, 32 in __syncthreads|deadlock.*__syncthreads", 64),
        ("divergent_barrier", "divergent barrier", 64),
        ("left_out", "which leaves it out", 32),
        ("exited", "lanes that have exited", 32),
        ("mixed_collectives", "meet in", 32),
        ("divide", "integer division by zero", 1),
        ("recurse", "stack is full", 1),
    ],
)
@given(seed=schedules)
def test_misuse_is_an_error(kernel: str, words: str, threads: int, seed: int) -> None:
    refused(words, kernel, np.zeros(64, np.int32), threads=threads, shared=64, seed=seed)


def test_launches_work_after_an_error() -> None:
    for _ in range(3):
        refused("illegal memory access", "write_input", np.zeros(4, np.float32), threads=1)
        found = np.full((1, 1, 40), -1, np.int32)
        run("number", found, threads=40)
        np.testing.assert_array_equal(found.ravel(), np.arange(40))


def test_an_edit_changes_the_kernel_once_or_is_refused() -> None:
    found = np.zeros((1, 1, 40), np.int32)
    run("number", found, threads=40, edits=[("semantics.cu", "= number;", "= -number;")])
    np.testing.assert_array_equal(found.ravel(), -np.arange(40))
    with pytest.raises(ValueError, match="found it 0 times"):
        run("number", found, edits=[("semantics.cu", "no such text", "")])
