"""A launch reaches an engine only with what the CUDA source declares, whatever a launcher passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.backend import bfloat16
from lora.backend.kernel import Kernel, launch, using_engine
from lora.backend.signature import DTYPES, Parameter, read_signature
from lora.errors import DeviceError, KernelError

SOURCE = """
// __global__ void not_a_kernel(int n) in a comment, and template <typename T>
#include "ptx.cuh"
template <typename U, int N> __device__ U helper(U value) { return value; }

template <typename T, int D, bool CAUSAL = (2 > 1)>
__global__ void __launch_bounds__(threads(D), 2) normalise(
    const T* __restrict__ x_ND,       // in, with a comma
    T *y_ND,
    float const* scale_D, /* [D], fp32 */
    const long long rows,
    int width, float eps)
{ if (D > 1) helper<T, 2>(x_ND[0]); }

extern "C" __global__ void count(unsigned char* bytes, unsigned long long n, bool twice, unsigned int u,
                                 double d) {}
template <typename T> __global__ void odd(T** table) {}
"""


@pytest.fixture(autouse=True)
def source(kernels: Path) -> None:
    (kernels / "k.cu").write_text(SOURCE)


class Recorder:
    """An engine that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def launch(self, kernel: Kernel, grid: tuple[int, int, int], values: Any) -> None:
        self.calls.append((kernel, grid, values))


NORMALISE = Kernel("k.cu", "normalise<__nv_bfloat16, 64, true>", 256, 1024)
COUNT = Kernel("k.cu", "count", 32)


def arguments(**changes: Any) -> list[Any]:
    """Return the arguments of NORMALISE, with some changed by the parameter's name."""
    whole = {
        "x_ND": np.ones((3, 8), bfloat16),
        "y_ND": np.ones((3, 8), bfloat16),
        "scale_D": np.ones(8, np.float32),
        "rows": 3,
        "width": 8,
        "eps": 1e-6,
    }
    return list((whole | changes).values())


def test_signature_is_read_as_cuda_declares_it() -> None:
    assert read_signature("k.cu", NORMALISE.name) == (
        Parameter("x_ND", bfloat16, True, False),
        Parameter("y_ND", bfloat16, True, True),
        Parameter("scale_D", np.dtype("float32"), True, False),
        Parameter("rows", np.dtype("int64"), False, False),
        Parameter("width", np.dtype("int32"), False, False),
        Parameter("eps", np.dtype("float32"), False, False),
    )
    assert [str(p.dtype) for p in read_signature("k.cu", "normalise<float,64,false>")[:2]] == [
        "float32",
        "float32",
    ]
    kinds = [(p.name, str(p.dtype), p.pointer) for p in read_signature("k.cu", "count")]
    assert kinds == [
        ("bytes", "uint8", True),
        ("n", "uint64", False),
        ("twice", "bool", False),
        ("u", "uint32", False),
        ("d", "float64", False),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing<float>", "has no kernel missing; it has normalise, count, odd"),
        ("not_a_kernel", "has no kernel not_a_kernel"),
        ("normalise<float>", "takes 3 template arguments"),
        ("normalise", "takes 3 template arguments"),
        ("count<float>", "takes 0 template arguments"),
        ("normalise<float4, 64, true>", r"cannot read the parameter 'const T\* __restrict__ x_ND'"),
        ("odd<float>", "cannot read the parameter"),
    ],
)
def test_a_name_that_the_source_lacks_is_an_error(name: str, expected: str) -> None:
    with pytest.raises(KernelError, match=expected):
        read_signature("k.cu", name)


def test_engine_gets_arrays_as_they_are_and_scalars_of_the_declared_width() -> None:
    engine, given_ = Recorder(), arguments(scale_D=None)
    with using_engine(engine):
        launch(NORMALISE, (3, 2), *given_)
    ((kernel, grid, values),) = engine.calls
    assert (kernel, grid) == (NORMALISE, (3, 2, 1))
    assert values[0] is given_[0]
    assert values[1] is given_[1]
    assert [(type(value), value) for value in values[2:]] == [
        (np.uintp, 0),
        (np.int64, 3),
        (np.int32, 8),
        (np.float32, np.float32(1e-6)),
    ]


READ_ONLY = np.ones((3, 8), bfloat16)
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"x_ND": np.ones((3, 8), np.float32)}, "x_ND: expected an array of bfloat16, got float32"),
        ({"scale_D": np.ones(8)}, "scale_D: expected an array of float32, got float64"),
        ({"x_ND": np.ones((8, 3), bfloat16).T}, "x_ND: expected a C-contiguous array"),
        ({"x_ND": np.ones((3, 16), bfloat16)[:, ::2]}, "x_ND: expected a C-contiguous array"),
        ({"y_ND": READ_ONLY}, "y_ND: is written by the kernel, and the array is read-only"),
        ({"x_ND": 3}, "x_ND: expected an array of bfloat16, got 3"),
        ({"x_ND": np.float32(3)}, "x_ND: expected an array of bfloat16"),
        ({"width": 2**31}, "width: 2147483648 does not fit int32"),
        ({"width": 8.0}, "width: expected a number of int32, got 8.0"),
        ({"width": True}, "width: expected a number of int32, got True"),
        ({"width": None}, "width: expected a number of int32, got None"),
        ({"width": np.ones(1, np.int32)}, "width: expected a number of int32"),
        ({"rows": 2**63}, "rows: 9223372036854775808 does not fit int64"),
        ({"eps": 1e39}, r"eps: 1e\+39 does not fit float32"),
        ({"eps": "1"}, "eps: expected a number of float32, got '1'"),
        ({"more": 1}, "expected 6 arguments, got 7"),
    ],
)
def test_an_argument_that_the_source_does_not_declare_never_reaches_the_engine(
    changes: dict[str, Any], expected: str
) -> None:
    engine = Recorder()
    with using_engine(engine), pytest.raises(KernelError, match=expected):
        launch(NORMALISE, (1,), *arguments(**changes))
    assert engine.calls == []


def test_what_a_kernel_only_reads_may_be_read_only() -> None:
    engine = Recorder()
    with using_engine(engine):
        launch(NORMALISE, (1,), *arguments(x_ND=READ_ONLY))
    assert len(engine.calls) == 1


@given(dtype=st.sampled_from(sorted(set(map(str, DTYPES.values())))))
def test_a_pointer_takes_arrays_of_its_own_dtype_alone(dtype: str) -> None:
    engine, array = Recorder(), np.ones(4, bfloat16 if dtype == "bfloat16" else dtype)
    with using_engine(engine):
        if dtype == "uint8":
            launch(COUNT, (1,), array, 4, False, 1, 1.5)
        else:
            with pytest.raises(KernelError, match=f"expected an array of uint8, got {dtype}"):
                launch(COUNT, (1,), array, 4, False, 1, 1.5)
    assert len(engine.calls) == (dtype == "uint8")


@pytest.mark.parametrize("grid", [(), (0,), (1, 0), (1, 65536), (2**31,), (1, 1, 1, 1), (-1,)])
def test_a_grid_outside_the_limits_of_cuda_is_an_error(grid: tuple[int, ...]) -> None:
    with using_engine(Recorder()), pytest.raises(KernelError, match="expected a grid"):
        launch(NORMALISE, grid, *arguments())


def test_without_an_engine_arrays_of_the_host_are_an_error() -> None:
    with using_engine(Recorder()):
        pass
    with pytest.raises(DeviceError, match="expected CuPy arrays, got NumPy arrays"):
        launch(NORMALISE, (1,), *arguments())
