"""`python -m benchmarks step|scaling|kernels|peers`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

COMMANDS = {
    "step": "one training step, ours against Transformers + PEFT",
    "scaling": "time and memory against tokens, layers, rank and vocabulary, with fitted exponents",
    "kernels": "every operation on a GPU, beside PyTorch's, cuDNN's and Liger's",
    "peers": "make the environment that holds PyTorch, Transformers and PEFT",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 disagreement, 2 usage, 5 nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = import_module(f"benchmarks.{name}")
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    return options.main(options)


if __name__ == "__main__":
    sys.exit(main())
