"""Where CUDA's libraries and headers are: in NVIDIA's wheels, under CUDA_PATH, or where a system keeps them.

The two wheel layouts: nvidia/cu13/lib and nvidia/cu13/include (CUDA 13), nvidia/<component>/lib and
nvidia/<component>/include (CUDA 12).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from lora.errors import DeviceError

SYSTEM_ROOTS = (Path("/usr/local/cuda"), Path("/opt/cuda"), Path("/usr"))
LIBRARY_FOLDERS = (
    "lib64",
    "lib",
    "lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
    "targets/x86_64-linux/lib",
)
ADVICE = "install it with pip install 'lora-numpy[cuda13]' (or [cuda12]), or set CUDA_PATH to a CUDA toolkit"


def library(name: str) -> Path:
    """Return the path of lib`name`.so, of the CUDA release that CuPy is built for where CuPy is installed.

    Raises:
        DeviceError: there is none.
    """
    for major in majors():
        for folder in _folders(major, *LIBRARY_FOLDERS):
            path = folder / f"lib{name}.so.{major}"
            if path.is_file():
                return path
    raise DeviceError(f"CUDA's lib{name}.so was not found; {ADVICE}")


def load(path: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Return the library at `path`, loaded.

    Raises:
        DeviceError: the loader refuses it.
    """
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        raise DeviceError(f"{path} does not load: {error}; {ADVICE}") from error


def headers(major: int) -> Path:
    """Return the folder of the CUDA headers (cuda_bf16.h and others) of release `major`.

    Raises:
        DeviceError: there is none.
    """
    for folder in _folders(major, "include"):
        if (folder / "cuda_bf16.h").is_file():
            return folder
    raise DeviceError(f"the headers of CUDA {major} (cuda_bf16.h) were not found; {ADVICE}")


@cache
def majors() -> tuple[int, ...]:
    """Return the CUDA releases to look for, the wanted one first."""
    built_for = tuple(major for major in (13, 12) if _installed(f"cupy-cuda{major}x"))
    return built_for or (13, 12)


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _folders(major: int, *names: str) -> Iterator[Path]:
    """Yield the folders of release `major` that exist, in the order in which they are asked."""
    spec = find_spec("nvidia")
    wheels = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    roots = [root for place in wheels for root in (place / f"cu{major}", *_components(place, major))]
    roots += [Path(os.environ[name]) for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    for root in (*roots, *SYSTEM_ROOTS):
        yield from (root / name for name in names if (root / name).is_dir())


def _components(place: Path, major: int) -> list[Path]:
    """Return the wheels' folders, one a component, as they were up to CUDA 12."""
    return sorted(path for path in place.iterdir() if not path.name.startswith("cu1")) if major == 12 else []
