"""What may be timed: sides whose first steps agree."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.agreement import GRADIENT, Disagreement, compare, difference


def gradients() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((4, 8)).astype(np.float32) for name in ("a", "b")}


def test_equal_sides_agree() -> None:
    assert compare((2.0, 2.0), gradients(), gradients(), "float32")[:2] == (0.0, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_worst_tensor_decides(dtype: str) -> None:
    theirs = gradients()
    near = {"a": theirs["a"], "b": theirs["b"] * np.float32(1 + 0.5 * GRADIENT[dtype])}
    far = {"a": theirs["a"], "b": theirs["b"] * np.float32(1 + 2 * GRADIENT[dtype])}
    assert compare((2.0, 2.0), near, theirs, dtype).worst == "b"
    with pytest.raises(Disagreement, match="gradient of b"):
        compare((2.0, 2.0), far, theirs, dtype)


def test_swapped_rows_are_seen() -> None:
    theirs = gradients()
    with pytest.raises(Disagreement, match="gradient of a"):
        compare((2.0, 2.0), theirs | {"a": theirs["a"][::-1]}, theirs, "float32")


@pytest.mark.parametrize("loss", [2.001, float("nan")])
def test_another_loss_is_refused(loss: float) -> None:
    with pytest.raises(Disagreement, match="loss"):
        compare((loss, 2.0), gradients(), gradients(), "float32")


def test_another_set_of_tensors_is_refused() -> None:
    theirs = gradients()
    with pytest.raises(Disagreement, match="ours alone \\['c'\\]"):
        compare((2.0, 2.0), {**theirs, "c": theirs["a"]}, theirs, "float32")


def test_a_difference_that_cannot_be_measured_is_infinite() -> None:
    zeros, ones = np.zeros(3), np.ones(3)
    assert difference(zeros, zeros) == 0
    assert difference(ones, zeros) == float("inf")
    assert difference(np.array([np.nan, 1, 1]), ones) == float("inf")
    assert difference(np.ones(4), ones) == float("inf")
