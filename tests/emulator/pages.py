"""Pages of memory, and what may be done with them."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import cache

STACK, THREADS = 128 * 1024, 1024  # as cpp/machine.h has them

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_memory(size: int) -> int:
    """Return the address of `size` bytes that may not be touched yet."""
    address = _libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address == _FAILED:
        raise _error(f"cannot map {size} bytes")
    return address


def protect(address: int, size: int, access: int) -> None:
    """Allow `access` to whole pages, and nothing else."""
    if _libc.mprotect(address, size, access):
        raise _error(f"cannot change the access to {size} bytes")


def unmap_memory(address: int, size: int) -> None:
    """Give pages back."""
    if _libc.munmap(address, size):
        raise _error(f"cannot unmap {size} bytes")


@cache
def stacks() -> int:
    """Return the address of a stack for each thread of the largest block, each above a page without access.

    They serve every launch of the process: fresh pages would cost more than a small kernel, and a process may
    have no more than 65,530 areas of different access.
    """
    address = map_memory(STACK * THREADS)
    for stack in range(address, address + STACK * THREADS, STACK):
        protect(stack + mmap.PAGESIZE, STACK - mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
    return address


def _error(what: str) -> OSError:
    return OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
