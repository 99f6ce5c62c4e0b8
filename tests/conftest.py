"""Profiles, and memory that tells when an element was never written."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import lora.backend.memory
from lora.backend.device import current_gpu
from lora.errors import DeviceError

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("few", max_examples=3, derandomize=True, **COMMON)
settings.register_profile("quick", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("ci", max_examples=200, derandomize=True, print_blob=True, **COMMON)
settings.register_profile("nightly", max_examples=5000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `backend.empty` hands out with NaN, so that an element left unwritten is seen."""
    plain = lora.backend.memory.allocate

    def poisoned(shape, dtype, like=None):
        array = plain(shape, dtype, like)
        if np.issubdtype(array.dtype, np.integer):
            array[...] = np.iinfo(array.dtype).min
        else:
            array[...] = np.nan
        return array

    monkeypatch.setattr(lora.backend.memory, "allocate", poisoned)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="also run the long campaigns")
    parser.addoption("--gpu", action="store_true", help="also run what needs a GPU; an error without one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu"):
        try:
            current_gpu()
        except DeviceError as error:
            raise pytest.UsageError(f"--gpu: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--gpu"):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest --gpu"))
    if config.getoption("--campaign") or "campaign" in (config.getoption("-m") or ""):
        return
    campaigns = [item for item in items if item.get_closest_marker("campaign")]
    if campaigns:
        config.hook.pytest_deselected(items=campaigns)
        items[:] = [item for item in items if item not in campaigns]
