"""CUDA kernels executed on the host, for tests."""

from __future__ import annotations

import os

import pytest

from tests.emulator.build import MISSING, available

# without a compiler the other tests are still worth running; a gate must not lose these in silence
requires_emulator = pytest.mark.skipif(not available() and "CI" not in os.environ, reason=MISSING)
