"""What runs an operation is what the device promises, or the refusal names it."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lora
from lora import dispatch
from lora.dispatch import CUDA, REFERENCE, Choice, Unbuilt, choices, implementations, require
from lora.errors import DeviceError, UnsupportedError
from lora.model.operations import operations
from tests.backend.fake_cupy import FakeCupy
from tests.harness.models import FAMILIES, write_model


def test_the_name_of_a_device_is_checked_before_anything_else() -> None:
    for function in (implementations, choices, lambda device: require(device, ["no such operation"])):
        with pytest.raises(DeviceError, match="device must be one of 'cpu', 'cuda'; got 'tpu'"):
            function("tpu")
    with pytest.raises(DeviceError, match="got 'tpu'"):
        lora.load("no such folder", device="tpu", dtype="no such dtype")


def test_cuda_without_a_gpu_is_an_error_before_any_file_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="device 'cuda' needs CuPy"):
        lora.load("no such folder", device="cuda")


def test_cuda_with_a_gpu_gives_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    assert implementations("cuda") is CUDA


@pytest.mark.parametrize("stem", REFERENCE._fields)
def test_an_entry_for_cuda_is_the_module_of_its_name_or_refuses_by_name(stem: str) -> None:
    module = getattr(CUDA, stem)
    if isinstance(module, Unbuilt):
        with pytest.raises(
            UnsupportedError, match=rf"no CUDA kernel in this version for {stem}; use device='cpu'"
        ):
            module.forward()
        assert (stem, "none") in [choice[:2] for choice in choices("cuda")]
    else:
        assert module.__name__ == f"lora.cuda.{stem}"
        assert module.KERNELS


def test_an_unbuilt_operation_still_answers_what_python_asks_of_any_object() -> None:
    assert not hasattr(Unbuilt("rope"), "__wrapped__")
    assert inspect.unwrap(Unbuilt("rope")) is not None


def test_all_that_is_absent_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table = REFERENCE._replace(gated_delta_rule=Unbuilt("gated_delta_rule"), gated_norm=Unbuilt("gated_norm"))
    monkeypatch.setitem(dispatch._TABLES, "cuda", table)
    require("cuda", ["rmsnorm", "attention"])
    with pytest.raises(UnsupportedError, match="for gated_delta_rule, gated_norm; use device='cpu'"):
        require("cuda", ["gated_norm", "rmsnorm", "gated_delta_rule"])


def test_choices_say_where_a_kernel_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(KERNELS=(SimpleNamespace(file="rope.cu"), SimpleNamespace(file="rope.cu")))
    monkeypatch.setitem(dispatch._TABLES, "cuda", CUDA._replace(rope=module))
    assert Choice("rope", "cuda", "compiled from kernels/rope.cu") in choices("cuda")
    by_operation = {choice.operation: choice.implementation for choice in choices("cpu")}
    assert (by_operation["rmsnorm"], by_operation["embedding"]) == ("host", "reference")


class Used:
    """A module of operations that tells which of its functions ran."""

    def __init__(self, module: ModuleType, stem: str, seen: set[str]) -> None:
        self._module, self._stem, self._seen = module, stem, seen

    def __getattr__(self, name: str) -> Any:
        self._seen.add(self._stem)
        return getattr(self._module, name)


@pytest.mark.parametrize("classifies", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_uses_exactly_the_operations_that_it_is_said_to_need(
    tmp_path: Any, family: str, classifies: bool
) -> None:
    write_model(tmp_path, FAMILIES[family])
    model = lora.load(tmp_path, num_labels=3 if classifies else None)
    seen: set[str] = set()
    model.ops = dispatch.Ops(*(Used(module, stem, seen) for stem, module in REFERENCE._asdict().items()))
    model.add_adapter(lora.LoraConfig(r=2, target_modules="all-linear"))
    ids = np.arange(1, 13).reshape(2, 6)
    model.loss_and_gradients(ids, np.array([0, 2]) if classifies else ids)
    assert seen == operations(model.spec, classifies=classifies)


def test_a_classifier_of_several_labels_uses_exactly_the_operations_that_it_is_said_to_need(
    tmp_path: Any,
) -> None:
    write_model(tmp_path, FAMILIES["qwen2"])
    model = lora.load(tmp_path, num_labels=3, problem_type="multi_label_classification")
    seen: set[str] = set()
    model.ops = dispatch.Ops(*(Used(module, stem, seen) for stem, module in REFERENCE._asdict().items()))
    model.loss_and_gradients(np.arange(1, 13).reshape(2, 6), np.array([[0, 1, 1], [0, 0, 0]]))
    assert seen == operations(model.spec, classifies=True, multi_label=True)


def test_a_model_with_an_operation_that_has_no_kernel_is_refused_before_its_weights_are_read(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, FAMILIES["qwen3_5"])
    monkeypatch.setattr(
        "lora.model.loading.load_weights", lambda *arguments: pytest.fail("weights were read")
    )
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    absent = ("causal_conv1d", "gated_delta_rule", "gated_norm")
    monkeypatch.setitem(
        dispatch._TABLES, "cuda", REFERENCE._replace(**{name: Unbuilt(name) for name in absent})
    )
    with pytest.raises(UnsupportedError, match="for causal_conv1d, gated_delta_rule, gated_norm"):
        lora.load(tmp_path, device="cuda")
