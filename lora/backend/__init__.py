"""Array libraries, precision, memory, matrix products and random streams: all that operations stand on."""

from lora import blas_start
from lora.backend.arrays import Array, address, array_module, beside, to_host
from lora.backend.blas import blas_facts
from lora.backend.dtypes import accumulation_dtype, bfloat16, compute_dtype, wide
from lora.backend.gemm import linear, linear_transpose, matmul, matmul_into
from lora.backend.kernel import Kernel, launch
from lora.backend.memory import empty, scratch
from lora.backend.random_streams import named_stream
from lora.backend.threads import run_all

blas_start.restore()

__all__ = [
    "Array",
    "Kernel",
    "accumulation_dtype",
    "address",
    "array_module",
    "beside",
    "bfloat16",
    "blas_facts",
    "compute_dtype",
    "empty",
    "launch",
    "linear",
    "linear_transpose",
    "matmul",
    "matmul_into",
    "named_stream",
    "run_all",
    "scratch",
    "to_host",
    "wide",
]
