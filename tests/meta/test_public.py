"""What `import lora` gives, and what it costs: counted in modules, which are the same on every machine."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import lora
from lora import errors

# DESIGN: the names that a program may rely on
NAMES = {
    "load",
    "LoraConfig",
    "AdamW",
    "finetune",
    "plan",
    "Model",
    "FinetuneConfig",
    "Callback",
    "Run",
    "Plan",
    "LoraError",
}
METHODS = {
    "add_adapter",
    "save_adapter",
    "load_adapter",
    "set_adapter",
    "merge_adapter",
    "unmerge_adapter",
    "save",
    "loss_and_gradients",
}
EXIT_CODES = {
    "LoraError": 1,
    "KernelError": 1,
    "UsageError": 2,
    "MissingFileError": 3,
    "FileFormatError": 4,
    "ValidationError": 5,
    "ShapeError": 5,
    "ContractError": 5,
    "DataError": 5,
    "AdapterError": 5,
    "UnsupportedError": 5,
    "DeviceError": 5,
    "DivergedError": 5,
    "LoadError": 6,
    "WriteError": 7,
}
MOST_MODULES = 60  # of which the library's own are two; NumPy alone would bring more than a hundred
NEVER_BY_LOADING = ("cupy", "click", "rich", "matplotlib", "huggingface_hub", "tokenizers", "jinja2")


def modules_after(statement: str) -> set[str]:
    """Return what `statement` imports in a fresh interpreter."""
    program = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_lora_imports_next_to_nothing() -> None:
    modules = modules_after("import lora")
    packages = {name.partition(".")[0] for name in modules}
    assert packages - sys.stdlib_module_names == {"lora"}
    assert {name for name in modules if name.startswith("lora")} == {"lora", "lora.blas_start", "lora.errors"}
    assert len(modules) <= MOST_MODULES


def test_loading_needs_no_terminal_and_no_device() -> None:
    modules = modules_after("import lora; lora.load, lora.LoraConfig, lora.AdamW")
    assert "numpy" in modules
    assert modules.isdisjoint(NEVER_BY_LOADING)


def test_every_public_name_is_there() -> None:
    assert set(lora.__all__) >= NAMES
    for name in lora.__all__:
        assert getattr(lora, name).__module__.startswith("lora")
    assert set(dir(lora)) >= set(lora.__all__)
    assert set(dir(lora.Model)) >= METHODS
    with pytest.raises(AttributeError, match="public names: AdamW"):
        lora.laod  # type: ignore[attr-defined]  # noqa: B018


def test_no_room_bears_the_name_of_a_public_function() -> None:
    for name in lora.__all__:
        assert not inspect.ismodule(getattr(lora, name)), name
        with pytest.raises(ModuleNotFoundError):
            import_module(f"lora.{name}")


def test_exit_codes_are_those_of_the_table() -> None:
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.LoraError)
    }
    assert found == EXIT_CODES
    assert set(found) <= set(lora.__all__)
