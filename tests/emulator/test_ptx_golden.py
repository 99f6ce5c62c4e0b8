"""The host halves of kernels/ptx.cuh answer what a GPU answered."""

from __future__ import annotations

import numpy as np
import pytest

from lora.backend import nvrtc
from lora.backend.kernel import using_engine
from tests.emulator import requires_emulator
from tests.emulator.engine import Emulator
from tests.emulator.ptx_cases import RECORD, SOURCES, PtxCase, answers, cases, kernels_of_tests

CASES = cases()
pytestmark = requires_emulator
recorded = pytest.mark.skipif(
    not RECORD.is_file(),
    reason="no GPU has recorded the PTX wrappers yet: python -m tests.emulator.record_ptx_golden",
)


def emulated(case: PtxCase) -> tuple[np.ndarray, ...]:
    with kernels_of_tests(), using_engine(Emulator(kernels=SOURCES)):
        return answers(case, np.copy)


def assert_same(case: PtxCase, found: np.ndarray, expected: np.ndarray) -> None:
    slack = case.tolerance * np.maximum(1, np.abs(expected)) if case.tolerance else 0
    assert found.shape == expected.shape
    assert (np.abs(found.astype("float64") - expected) <= slack).all()


@recorded
@pytest.mark.parametrize("name", CASES)
def test_the_emulator_answers_as_the_device_did(name: str) -> None:
    with np.load(RECORD) as record:
        for index, found in enumerate(emulated(CASES[name])):
            assert_same(CASES[name], found, record[f"{name}/{index}"])


@pytest.mark.parametrize("name", CASES)
def test_every_case_answers_and_a_wrong_answer_would_be_seen(name: str) -> None:
    for before, found in zip(CASES[name].outputs, emulated(CASES[name]), strict=True):
        assert (found != before).any()
        assert_same(CASES[name], found, found)
        wrong = found.copy()
        wrong.flat[7] += 1
        with pytest.raises(AssertionError):
            assert_same(CASES[name], wrong, found)


def test_what_is_recorded_compiles_for_a_device() -> None:
    names = sorted({case.kernel for case in CASES.values()})
    with kernels_of_tests():
        compiled = nvrtc.compile_cubin("semantics.cu", names, "sm_80")
    assert set(compiled.lowered) == set(names)
