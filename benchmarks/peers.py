"""An environment of their own for the libraries that we are compared with."""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft")
_IMPORTABLE = "import sys, importlib.util as u; print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))"
HINT = "`python -m benchmarks peers DIR` makes their environment, `--peers DIR` uses it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.add_argument("folder", type=Path, help="where the environment is made")
    parser.add_argument("--cuda", action="store_true", help="PyTorch for CUDA, and Liger")


def main(options: argparse.Namespace) -> int:
    """Make the environment, or bring one that is there up to the pinned versions."""
    requirements = Path(__file__).parent / f"requirements-peers{'-cuda' if options.cuda else ''}.txt"
    venv.create(options.folder, with_pip=True)
    subprocess.run([interpreter(options.folder), "-m", "pip", "install", "-r", str(requirements)], check=True)
    print(f"peers: ready; python -m benchmarks step --peers {options.folder}")
    return 0


def interpreter(folder: Path) -> str:
    """Return the path of an environment's Python. Not resolved: a link would lead out of the environment."""
    return str(folder.absolute() / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))


def why_missing(folder: Path | None, packages: tuple[str, ...] = PACKAGES) -> str | None:
    """Return why the peers in `folder` cannot run, with what to do about it; None where they can."""
    if folder is None:
        return f"no --peers given: {HINT}"
    if not Path(interpreter(folder)).is_file():
        return f"no environment in {folder}: {HINT}"
    done = subprocess.run(
        [interpreter(folder), "-c", _IMPORTABLE, *packages], capture_output=True, text=True, check=False
    )
    missing = done.stdout.split()
    if done.returncode or missing:
        return f"{', '.join(missing) or 'its Python'} not importable in {folder}: {HINT}"
    return None
