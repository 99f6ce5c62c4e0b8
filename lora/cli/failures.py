"""What becomes of an exception: one line on stderr, a JSON document under --json, an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import click

from lora.cli.output import note, print_json
from lora.errors import LoraError, LoraWarning, UsageError, WriteError

INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


@dataclass
class Failures:
    """Ends what raised inside the `with` block with a message and an exit code.

    An exception that no line below foresees is a bug of ours. It is not caught: `sys.excepthook` reports it,
    and the interpreter ends with exit code 1.
    """

    as_json: bool
    debug: bool
    exit_code: int = 0
    _warnings: Any = field(default=None, init=False)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Failures:
        """Read --json and --debug where a parser may not have come to them: a usage error is reported too."""
        options = list(arguments)
        if "--" in options:
            options = options[: options.index("--")]
        return cls(as_json="--json" in options, debug="--debug" in options)

    def __enter__(self) -> Failures:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always", LoraWarning)
        warnings.showwarning = _show_warning
        sys.excepthook = self._report_bug
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._warnings.__exit__(kind, error, trace)
        if isinstance(error, click.exceptions.Exit):
            self.exit_code = error.exit_code
        elif isinstance(error, BrokenPipeError):
            self.exit_code = BROKEN_PIPE
            # the interpreter flushes stdout at its end, which must not fail a second time
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif error is not None:
            described = _describe(error)
            if described is None:
                return False
            self._report(*described, error)
        sys.excepthook = sys.__excepthook__
        return True

    def _report(self, exit_code: int, message: str, error: BaseException) -> None:
        self.exit_code = exit_code
        if self.debug:
            traceback.print_exception(error)
        click.echo(f"error: {message}", err=True)
        if not self.as_json:
            return
        with suppress(OSError):  # stdout may be what failed; stderr has said it
            print_json({"status": "error", "exit_code": exit_code, "error": message})

    def _report_bug(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        message = (
            f"{kind.__name__}: {error}. This is a bug of lora: please report this line, what --debug adds to "
            "it and the output of `lora doctor`"
        )
        self._report(1, message, error)


def _describe(error: BaseException) -> tuple[int, str] | None:
    """Return (exit code, message), or None for an exception that nobody foresaw."""
    if isinstance(error, LoraError):
        return error.exit_code, str(error)
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "lora"
        return UsageError.exit_code, f"{error.format_message().rstrip('.')}; see `{where} --help`"
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return INTERRUPTED, "interrupted"
    if isinstance(error, MemoryError):
        return 1, f"out of memory ({error or 'no size given'}): `lora finetune --plan` shows what a run needs"
    if isinstance(error, OSError):
        return WriteError.exit_code, str(error)
    return None


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, LoraWarning):
        note(str(message))
    else:
        click.echo(warnings.formatwarning(message, category, *where[:2]), err=True)
