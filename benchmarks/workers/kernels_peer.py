"""The side of PyTorch and Liger: `python -m benchmarks.workers.kernels_peer`, in the peers' environment."""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from benchmarks.device_time import FLUSHED_BYTES
from benchmarks.registry import Calls, Inputs
from benchmarks.workers.kernel_serving import serve_kernels
from benchmarks.workers.peer_operations import PEERS


class TorchStream:
    """See `device_time.Device`."""

    def __init__(self) -> None:
        self._buffer = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def mark(self) -> Any:
        """See `Device`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, stop: Any) -> float:
        """See `Device`."""
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def flush(self) -> None:
        """See `Device`."""
        self._buffer.zero_()

    def wait(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize()


class Peers:
    """What `PEERS` lists, on one device."""

    refusals = (RuntimeError, ImportError)  # no backend for the shape, no memory; Liger is not there

    def __init__(self, device: str) -> None:
        self._place = device
        self.device = TorchStream() if device == "cuda" else None

    def facts(self) -> dict[str, Any]:
        """See `Side`."""
        liger = metadata.version("liger-kernel") if find_spec("liger_kernel") else None
        versions = {"torch": torch.__version__, "cuda_runtime": torch.version.cuda, "liger": liger}
        return {"versions": {**versions, "cudnn": _cudnn(), "python": sys.version.split()[0]}}

    def calls(self, contestant: str, operation: str, arrays: Inputs) -> Calls:
        """See `Side`."""
        a = {name: self._placed(array).bfloat16() for name, array in arrays.stored.items()}
        a |= {name: self._placed(array) for name, array in arrays.exact.items()}
        return PEERS[operation][contestant](a)

    def to_host(self, array: torch.Tensor) -> np.ndarray:
        """See `Side`."""
        return array.detach().float().cpu().numpy()

    def release(self) -> None:
        """See `Side`."""
        torch.cuda.empty_cache()

    def _placed(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._place)


def _cudnn() -> int | None:
    return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None


if __name__ == "__main__":
    serve_kernels(Peers("cuda"))
