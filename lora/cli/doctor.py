"""`lora doctor`: what this installation runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import click

from lora import __version__
from lora.cli.options import output_options
from lora.cli.output import print_facts, print_json, print_table

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "pyyaml",
    "jinja2",
    "click",
    "rich",
)
CUPY_WHEELS = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
LABELS = {
    "lora": "lora",
    "python": "Python",
    "platform": "Platform",
    "packages": "Packages",
    "blas": "BLAS",
    "environment": "Environment",
    "cpu_features": "Processor",
    "cores": "Cores",
    "memory_gb": "Memory (GB)",
    "cupy": "CuPy",
    "cuda_driver": "CUDA of the driver",
    "nvrtc": "NVRTC",
    "cublas": "cuBLAS",
    "gpu": "GPU",
    "compute_capability": "Compute capability",
    "gpu_memory_gb": "GPU memory (GB)",
    "kernel_cache": "Compiled kernels",
    "cuda_problems": "Device cuda lacks",
    "hub_offline": "Hub offline",
    "advice": "Advice",
}
OPERATIONS = {"cpu": "operations", "cuda": "cuda_operations"}  # keys of what runs each operation, by device
VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")  # that decide bits
# what OpenBLAS calls its kernels without AVX-512
NARROW_CORES = ("Haswell", "Zen", "Sandybridge", "Nehalem")


@click.command(short_help="Say what this installation runs on.")
@output_options
def doctor(as_json: bool) -> None:
    """Say which versions, BLAS, processor features and devices there are, and what runs each operation."""
    facts = diagnose()
    if as_json:
        print_json({"status": "diagnosed", **facts})
        return
    operations = {device: facts.pop(key) for device, key in OPERATIONS.items()}
    facts["cuda_problems"] = "; ".join(facts["cuda_problems"]) or None
    print_facts({LABELS[name]: _shown(value) for name, value in facts.items()})
    for device, choices in operations.items():
        columns = (f"Operation on {device}", "Implementation", "Reason")
        print_table(columns, [tuple(choice.values()) for choice in choices], texts=len(columns))


def diagnose() -> dict[str, Any]:
    """Return the facts as JSON values."""
    from lora.backend import blas_facts
    from lora.backend.device_facts import device_facts
    from lora.dispatch import choices

    blas, features = blas_facts(), _cpu_features()
    return {
        "lora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "blas": blas,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "cpu_features": features,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "cupy": next((f"{name} {found}" for name in CUPY_WHEELS if (found := _version(name))), None),
        **device_facts()._asdict(),
        "hub_offline": _hub_offline(),
        "advice": _advice(blas, features),
        **{key: [choice._asdict() for choice in choices(device)] for device, key in OPERATIONS.items()},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_features() -> list[str]:
    import numpy as np

    extensions = np.show_config(mode="dicts")["SIMD Extensions"]
    return [*extensions["baseline"], *extensions["found"]]


def _memory_gb() -> dict[str, float | None]:
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    total = page * os.sysconf("SC_PHYS_PAGES") / 1e9 if page else None
    return {"total": total and round(total, 1), "available": _available_gb()}


def _available_gb() -> float | None:
    """Return what can be had without swapping, which only Linux tells."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return round(int(fields["MemAvailable"].split()[0]) * 1024 / 1e9, 1)


def _hub_offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE


def _advice(blas: dict[str, Any], features: list[str]) -> str | None:
    wide = any(name.startswith(("X86_V4", "AVX512")) for name in features)
    if not wide or blas["core"] not in NARROW_CORES or "OPENBLAS_CORETYPE" in os.environ:
        return None
    return (
        f"OpenBLAS takes this processor for a {blas['core']}, without its AVX-512: with "
        "OPENBLAS_CORETYPE=SkylakeX in the environment, matrix products may run at twice the speed, and "
        "differ in their last bits"
    )


def _shown(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {'-' if item is None else item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
