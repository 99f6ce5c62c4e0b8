"""Record on a GPU what every wrapper of kernels/ptx.cuh does: python -m tests.emulator.record_ptx_golden."""

from __future__ import annotations

import numpy as np

from lora.backend.device import cupy_module, current_gpu
from tests.emulator.ptx_cases import RECORD, answers, cases, kernels_of_tests


def main() -> None:
    cupy, gpu = cupy_module(), current_gpu()
    found = {}
    with kernels_of_tests():
        for name, case in cases().items():
            for index, answer in enumerate(answers(case, lambda array: cupy.array(array))):
                found[f"{name}/{index}"] = answer
    np.savez_compressed(RECORD, device=np.array(f"{gpu.name}, {gpu.arch}"), **found)
    print(f"{RECORD}: {len(found)} answers of {gpu.name}")


if __name__ == "__main__":
    main()
