"""The command `lora`: finds the subcommand, and turns whatever it raises into one line and an exit code.

Exit codes: 0 ok, 1 internal, 2 usage, 3 not found, 4 bad file format, 5 validation, 6 load, 7 input and
output, 130 interrupted, 141 nobody reads the output.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from lora import __version__
from lora.cli.chat import chat
from lora.cli.convert import convert
from lora.cli.demo import demo
from lora.cli.doctor import doctor
from lora.cli.eval import evaluate
from lora.cli.failures import Failures
from lora.cli.finetune import finetune
from lora.cli.generate import generate
from lora.cli.inspect import inspect
from lora.cli.merge import merge
from lora.cli.predict import predict
from lora.cli.report import report


class Commands(click.Group):
    """The subcommands, in the order of a user's first day."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names as they were added, where click would sort them."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Read `finetune merge ...` and `finetune --merge ...`, the seed's two spellings, as `merge ...`."""
        if args[:2] == ["finetune", "merge"]:
            args = args[1:]
        elif args[0] == "finetune" and "--merge" in args:
            args = ["merge", *(arg for arg in args[1:] if arg != "--merge")]
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, package_name="lora-numpy", message="lora %(version)s")
@click.pass_context
def lora(ctx: click.Context) -> None:
    """Fine-tune Qwen models with LoRA on nothing but NumPy.

    Start with `lora demo`: it needs no model, no data and no network.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


for _command in (demo, finetune, report, evaluate, predict, generate, chat, merge, convert, inspect, doctor):
    lora.add_command(_command)


def main() -> None:
    """Run the command line of this process, and end it with the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may hold what the terminal cannot show
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run `lora` with `arguments` and return its exit code; only a bug of ours raises."""
    with Failures.of(arguments) as failures:
        with lora.make_context("lora", list(arguments)) as ctx:
            lora.invoke(ctx)
        sys.stdout.flush()  # here, where a closed pipe is caught
    return failures.exit_code
