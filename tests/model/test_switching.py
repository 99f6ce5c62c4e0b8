"""Several adapters on one loaded base: each is what it would be alone."""

from __future__ import annotations

import numpy as np
import pytest

from lora.errors import AdapterError
from lora.io.lora_config import LoraConfig
from tests.train.tiny import VOCABULARY, trained, untrained

IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 7))


def second_beside(model) -> None:
    """Attach another adapter, of another rank and on another module, with B's that are not zero."""
    model.add_adapter(LoraConfig(r=3, target_modules=["o_proj"]), seed=5, name="second")
    for name, array in model.trainable().items():
        if "lora_B" in name:
            array[...] = 0.1


def test_switching_gives_each_adapters_own_bits_back() -> None:
    model, without = trained(classify=False), untrained(classify=False)
    first = model(IDS)
    second_beside(model)
    second_beside(without)
    second = model(IDS)
    assert np.abs(second - first).max() > 1e-3
    np.testing.assert_array_equal(second, without(IDS))  # the first has no part in it
    for name, expected in (("default", first), ("second", second), ("default", first)):
        model.set_adapter(name)
        np.testing.assert_array_equal(model(IDS), expected)


def test_the_active_adapter_alone_is_trained_and_saved(tmp_path) -> None:
    model = trained(classify=False)
    second_beside(model)
    _, gradients = model.loss_and_gradients(IDS, IDS)
    assert gradients.keys() == model.trainable().keys()
    assert all(".o_proj." in name for name in gradients)
    model.save_adapter(tmp_path / "second")
    model.set_adapter("default")
    assert any(".q_proj." in name for name in model.trainable())
    again = untrained(classify=False)
    again.load_adapter(tmp_path / "second", name="loaded")
    model.set_adapter("second")
    np.testing.assert_allclose(again(IDS), model(IDS), rtol=1e-6, atol=1e-6)


def test_an_adapter_that_is_not_attached_is_refused_by_name() -> None:
    model = trained(classify=False)
    with pytest.raises(AdapterError, match="absent"):
        model.set_adapter("absent")
