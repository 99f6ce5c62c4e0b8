"""`lora convert`: a checkpoint or an adapter from its folder to one APR file, and back."""

from __future__ import annotations

from pathlib import Path

import click

from lora.cli.options import output_options
from lora.cli.output import print_facts, print_json
from lora.errors import UsageError


@click.command(short_help="Turn a folder into an .apr file, or back.")
@click.argument("source")
@click.argument("target")
@output_options
def convert(source: str, target: str, as_json: bool) -> None:
    """Write SOURCE, a checkpoint or an adapter, as TARGET: one is an .apr file, the other a folder.

    Every tensor keeps its bits and its dtype; the tokenizer and the configuration travel inside the file.
    """
    to_apr, from_apr = (name.lower().endswith(".apr") for name in (target, source))
    if to_apr == from_apr:
        raise UsageError(f"{source} to {target}: expected an .apr file on one side and a folder on the other")
    if Path(target).exists():
        raise UsageError(f"{target} exists already; name another target")
    from lora.io.convert import apr_to_folder, folder_to_apr
    from lora.io.hub import resolve

    if to_apr:
        folder_to_apr(Path(resolve(source)), Path(target))
    else:
        apr_to_folder(Path(source), Path(target))
    facts = {"source": source, "target": target}
    if as_json:
        print_json({"status": "converted", **facts})
    else:
        print_facts({"Source": source, "Written": target})
