"""Contracts and kernels are read from the checkout where there is one, and travel inside the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lora.assets import asset
from lora.contracts import all_contracts, op_contract
from lora.errors import MissingFileError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the checkout, with stale contracts in the package, as editable installs have."""
    ignore = shutil.ignore_patterns("__pycache__", "demo", "sources")
    shutil.copytree(ROOT / "lora", tmp_path / "lora", ignore=ignore)
    shutil.copytree(ROOT / "contracts", tmp_path / "contracts")
    shutil.copytree(ROOT / "contracts", tmp_path / "lora" / "assets" / "contracts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    contract = tmp_path / "contracts" / "ops" / "rmsnorm.yaml"
    text = contract.read_text(encoding="utf-8")
    contract.write_text(text.replace("version: 1\n", "version: 99\n"), encoding="utf-8")
    return tmp_path


def contract_seen_in(folder: Path) -> str:
    """Return the version of the contract that the copy of the library in `folder` reads, or its error."""
    program = (
        "from lora.contracts import op_contract\n"
        "try: print(op_contract('rmsnorm').version)\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_an_edited_contract_is_seen_at_once(checkout: Path) -> None:
    assert contract_seen_in(checkout) == "99"


def test_an_installed_wheel_reads_its_own(checkout: Path) -> None:
    (checkout / "pyproject.toml").unlink()  # what tells a checkout from a folder of installed packages
    assert contract_seen_in(checkout) == "1"


def test_the_wheel_is_told_to_carry_them() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    assert wheel["force-include"] == {"contracts": "lora/assets/contracts", "kernels": "lora/assets/kernels"}
    assert "lora/assets/sources" in wheel["exclude"]


def test_every_contract_loads_and_is_named_after_its_file() -> None:
    stems = {path.stem for path in asset("contracts").rglob("*.yaml")}
    assert {contract.contract for contract in all_contracts()} == stems
    assert {contract.kind for contract in all_contracts()} == {"op", "family", "training"}


def test_an_unknown_key_in_a_contract_is_an_error(checkout: Path) -> None:
    contract = checkout / "contracts" / "ops" / "rmsnorm.yaml"
    contract.write_text(contract.read_text(encoding="utf-8") + "clams: []\n", encoding="utf-8")
    assert "clams" in contract_seen_in(checkout)


def test_an_asset_that_is_not_there_is_an_error() -> None:
    with pytest.raises(MissingFileError, match="reinstall"):
        op_contract("no_such_operation")
