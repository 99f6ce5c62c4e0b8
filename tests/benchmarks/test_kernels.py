"""`python -m benchmarks kernels` without a GPU: the emulator's kernels, timed by a made-up clock."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import kernels, registry
from benchmarks.__main__ import main
from benchmarks.agreement import Disagreement
from benchmarks.device_time import device_seconds
from benchmarks.kernel_records import OURS, PEERS, PEERS_TOLERANCE, TOLERANCE, Job, check, finished, timed
from benchmarks.kernel_reference import calls_of, expected, stored
from benchmarks.processes import Conversation
from benchmarks.registry import OPERATIONS, bench, draw
from benchmarks.results import COMMON, read
from benchmarks.workers.kernel_serving import apart
from lora.backend.kernel import using_engine
from tests.benchmarks.emulated_kernels import MICROSECONDS, RATES
from tests.emulator import requires_emulator
from tests.emulator.engine import Emulator

TINY = {
    "rmsnorm": {"N": 3, "D": 72},
    "rope": {"N": 5, "H": 2, "G": 1, "E": 16},
    "swiglu": {"N": 3, "F": 40},
    "embedding": {"N": 6, "V": 9, "D": 24},
    "pool": {"S": 2, "T": 3, "D": 24},
    "softmax_xent": {"N": 4, "D": 16, "V": 40},
    "attention": {"N": 20, "H": 2, "G": 1, "E": 64},
    "cached_attention": {"S": 2, "C": 9, "H": 2, "G": 1, "E": 64},
    "lowrank_linear": {"N": 7, "I": 24, "O1": 16, "O2": 8, "O3": 8, "R": 4},
    "adamw": {"L": 2, "R": 4, "D": 24},
}
JOB = Job("rmsnorm", {"N": 4, "D": 8}, 0, OURS, "")
HOST = SimpleNamespace(to_host=lambda array: np.asarray(array, np.float32))


def test_every_operation_with_kernels_is_measured() -> None:
    launchers = (Path(registry.__file__).parent.parent / "lora" / "cuda").glob("[!_]*.py")
    assert {path.stem for path in launchers} == set(OPERATIONS) == set(TINY)
    assert set(PEERS) <= set(OPERATIONS)


@requires_emulator
@pytest.mark.parametrize("operation", TINY)
def test_kernels_agree_with_the_reference_on_the_arrays_of_the_benchmark(
    operation: str, tmp_path: Path
) -> None:
    reference = expected(operation, TINY[operation], seed=3)
    np.savez(tmp_path / "expected.npz", **reference)
    with using_engine(Emulator(2)):
        calls = calls_of("lora.cuda", operation, stored(draw(operation, TINY[operation], 3), np.array))
        found = apart(HOST, calls, str(tmp_path / "expected.npz"))
    assert found.keys() == reference.keys()
    assert max(found.values()) <= TOLERANCE[OPERATIONS[operation]]


@pytest.mark.parametrize("operation", TINY)
def test_work_is_stated_of_every_call(operation: str) -> None:
    shape = type(bench(operation).SHAPES[0])(**TINY[operation])
    arrays = stored(draw(operation, TINY[operation], 0), np.array)
    work = bench(operation).work(shape)
    assert work.keys() == calls_of("lora.ops", operation, arrays).keys()
    assert all(each.bytes > 0 for each in work.values())


def test_bytes_of_a_call_are_those_of_its_arrays() -> None:
    # rmsnorm: x, residual, y and stream in bfloat16, the weight, and rstd in float32
    shape = bench("rmsnorm").Shape(N=10, D=100)
    assert bench("rmsnorm").work(shape)["forward"].bytes == 4 * 2 * 1000 + 2 * 100 + 4 * 10
    # attention: 2 FLOP for each of two products over the 10 scores that the mask leaves of 16, in 3 heads
    assert (
        bench("attention").work(bench("attention").Shape(4, 3, 1, 64))["forward"].flops == 2 * 2 * 64 * 10 * 3
    )


@pytest.mark.parametrize(
    ("contestant", "allowed"), [(OURS, TOLERANCE["bfloat16"]), ("torch", PEERS_TOLERANCE)]
)
def test_what_is_too_far_from_the_reference_gets_no_time(contestant: str, allowed: float) -> None:
    job = JOB._replace(contestant=contestant)
    assert check(job, {"forward y": allowed}) == {"forward y": allowed}
    for far in (1.01 * allowed, float("inf"), float("nan")):
        with pytest.raises(Disagreement, match=r"rmsnorm N=4 D=8 \w+: backward dx .* from the reference"):
            check(job, {"forward y": 0.0, "backward dx": far})


def test_an_output_that_is_missing_is_infinitely_far(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", **{"forward y": np.ones(3), "backward dx": np.ones(3)})
    found = apart(HOST, {"forward": lambda: {"y": np.ones(3)}}, str(tmp_path / "e.npz"))
    assert found == {"forward y": 0.0, "backward dx": float("inf")}


class Clock:
    """A device on which the n-th run takes n milliseconds; it keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._runs = itertools.count(1)

    def mark(self) -> int:
        self.told.append("mark")
        return len(self.told)

    def flush(self) -> None:
        self.told.append("flush")

    def wait(self) -> None:
        self.told.append("wait")

    def seconds(self, start: int, stop: int) -> float:
        assert start < stop
        return next(self._runs) / 1e3


def test_every_run_is_timed_alone_after_the_cache_is_flushed() -> None:
    clock = Clock()
    assert device_seconds(lambda: clock.told.append("call"), clock, 3) == [0.002, 0.003, 0.004]
    assert " ".join(clock.told).endswith(
        " wait call flush flush mark flush mark" + 3 * " flush flush mark call mark"
    )


def test_the_cache_is_flushed_until_the_host_has_issued_the_call() -> None:
    clock = Clock()  # a flush takes 1 ms of it
    device_seconds(lambda: time.sleep(0.003), clock, 1)
    assert clock.told[-2:] == ["mark", "mark"]
    assert clock.told[-3:-10:-1] == ["flush"] * 7


def records(**seconds: list[float]) -> list[dict[str, Any]]:
    return [
        timed(JOB._replace(contestant=name), "forward", times, {"forward y": 1e-3}, {})
        for name, times in seconds.items()
    ]


def test_a_time_is_worth_its_share_of_what_bounds_the_call() -> None:
    moved, computed = bench("rmsnorm").work(JOB.sizes)["forward"]
    rates = {"copy": moved / 0.5, "gemm": computed / 0.1}  # 0.5 s for the bytes, 0.1 s for the FLOP
    ours, peer = finished(records(lora=[0.9, 1.0, 7.0], torch=[3.0]), [rates, rates], 0.0)
    assert (ours["bound"], ours["share"]) == ("copy", pytest.approx(0.5))
    assert ours["bytes_per_second"] == pytest.approx(moved)
    assert "ours" not in ours
    assert peer["ours"]["times_faster"] == pytest.approx(3)
    assert not ours["disturbed"]
    (bound_by_products,) = finished(records(lora=[1.0]), [{"copy": moved / 0.1, "gemm": computed / 0.4}], 0.0)
    assert (bound_by_products["bound"], bound_by_products["share"]) == ("gemm", pytest.approx(0.4))


@pytest.mark.parametrize(
    ("after", "foreign", "is_disturbed"),
    [(1.0, 0.0, False), (1.0, None, False), (0.9, 0.0, True), (1.1, 0.0, True), (1.0, 0.2, True)],
)
def test_rates_that_move_and_other_work_disturb(
    after: float, foreign: float | None, is_disturbed: bool
) -> None:
    rates = [{"copy": 1.0, "gemm": 1.0}, {"copy": 1.0, "gemm": after}]
    (record,) = finished(records(lora=[1.0]), rates, foreign)
    assert record["disturbed"] == is_disturbed


def test_without_a_gpu_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(kernels, "cuda_device", lambda: None)
    assert main(["kernels", "--output", str(tmp_path)]) == 5
    assert capsys.readouterr().out == "kernels: not measured: no CUDA device\n"
    assert list(tmp_path.iterdir()) == []


def test_without_their_environment_peers_are_named_with_what_to_do() -> None:
    sides = SimpleNamespace(ours=None, peer=None, why_no_peer="no --peers given")
    found = kernels.measure_one(JOB._replace(contestant="torch"), sides, 3)
    assert [(r["case"], r["status"]) for r in found] == [
        ("rmsnorm N=4 D=8 forward", "not measured: no --peers given"),
        ("rmsnorm N=4 D=8 backward", "not measured: no --peers given"),
    ]
    assert all("seconds" not in record for record in finished(found, [RATES], 0.0))


@requires_emulator
def test_the_whole_way_with_a_made_up_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def start(folder: Path | None, stack: ExitStack) -> kernels.Sides:
        sides = []
        for side in ("ours", "peer"):
            (tmp_path / side).mkdir()
            worker = Conversation(
                kernels.sys.executable, "tests.benchmarks.emulated_kernels", [], tmp_path / side
            )
            sides.append(stack.enter_context(worker))
        return kernels.Sides(*sides, None)

    monkeypatch.setattr(kernels, "why_not", lambda: None)
    monkeypatch.setattr(kernels, "start", start)
    for operation in ("rmsnorm", "attention"):
        shape = type(bench(operation).SHAPES[0])(**TINY[operation])
        monkeypatch.setattr(bench(operation), "SHAPES", (shape,))
    arguments = [
        "kernels",
        "--operations",
        "rmsnorm",
        "attention",
        "--runs",
        "3",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 1  # a contestant of attention computes something else
    shown = capsys.readouterr()
    assert "attention N=20 H=2 G=1 E=64 sdpa-flash: forward o 1.0e-01 from the reference" in shown.err
    assert "liger: not measured: ImportError: No module named 'liger_kernel'" in shown.out
    found = read(tmp_path / "out" / "kernels.jsonl")
    assert all(set(COMMON) <= record.keys() for record in found)
    assert "sdpa-flash" not in {record["contestant"] for record in found}
    by_name = {(record["case"], record["contestant"]): record for record in found}
    ours, peer = (by_name["rmsnorm N=3 D=72 forward", name] for name in ("lora", "torch"))
    assert ours["seconds"]["samples"] == [MICROSECONDS["lora"] / 1e6] * 3
    assert ours["copy_bytes_per_second"] == RATES["copy"]
    assert 0 < ours["agreement"]["forward y"] < TOLERANCE["bfloat16"]
    assert peer["ours"]["times_faster"] == pytest.approx(2.5)
    assert json.dumps(found)
