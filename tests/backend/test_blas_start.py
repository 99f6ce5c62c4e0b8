"""What OpenBLAS reads when NumPy is imported: ours, unless the user says otherwise, and gone after."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lora.blas_start import NAME, TICKS

SHOWN = f"print(os.environ.get('{NAME}'))"
PROGRAM = f"import os{{first}}, lora; {SHOWN}; import lora.backend; {SHOWN}"


@pytest.mark.parametrize(
    ("first", "set_by_user", "seen"),
    [("", None, [TICKS, "None"]), ("", "20", ["20", "20"]), (", numpy", None, ["None", "None"])],
)
def test_the_environment_around_the_import_of_numpy(
    first: str, set_by_user: str | None, seen: list[str]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    if set_by_user is not None:
        environment[NAME] = set_by_user
    command = [sys.executable, "-c", PROGRAM.format(first=first)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == seen
