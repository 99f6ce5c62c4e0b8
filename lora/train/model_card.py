"""A model card beside an adapter: README.md, as the Hub reads it, of what the files and an evaluation say.

Source: https://huggingface.co/docs/hub/model-cards, the metadata between the two lines of dashes.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lora.errors import UsageError
from lora.io.apr_folder import is_apr
from lora.io.atomic import write_text
from lora.io.checkpoint import read_json_object
from lora.io.lora_config import LoraConfig
from lora.io.peft import CONFIG, METADATA
from lora.model.head import MULTI_LABEL, ClassifierHead
from lora.model.model import Model
from lora.train.callbacks import EpochDone

CARD = "README.md"
CARD_SETTINGS = (
    "task",
    "epochs",
    "learning_rate",
    "batch_size",
    "grad_accum",
    "max_seq_len",
    "val_split",
    "seed",
)
EPOCH_COLUMNS = ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "learning_rate")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN_FACTS = ("rows", "data_hash", "base_hash")
_SHOWN_SETTINGS = ("r", "target_modules", "init_lora_weights", "use_rslora")


def check_is_adapter(folder: Path) -> None:
    """Refuse what has no place for an adapter's card.

    Raises:
        UsageError: `folder` holds no adapter.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder}: a model card is written beside an adapter; expected a folder with {CONFIG}"
        )


def epoch_facts(epoch: EpochDone) -> dict[str, Any]:
    """Return what the card says of an epoch: what the same run finds again, and so no times."""
    return {name: value for name, value in epoch.as_dict().items() if name in EPOCH_COLUMNS}


def write_model_card(
    folder: Path, model: Model, scores: Mapping[str, Any] | None = None, data: Path | None = None
) -> Path:
    """Write the card of the adapter in `folder`, and return its path; a card that was there is replaced.

    Args:
        folder: the adapter's.
        model: with that adapter active.
        scores: numbers of an evaluation by name, if there was one; what is no number is left out.
        data: the file that was evaluated on; the card names it without its folder.

    Raises:
        UsageError: the folder holds no adapter.
        WriteError: the card cannot be written; what was there is unharmed.
    """
    check_is_adapter(folder)
    path = folder / METADATA
    facts = read_json_object(path) if path.is_file() else {}
    config = model.parameters.adapters[str(model.parameters.active)].config
    write_text(folder / CARD, model_card(model, config, facts, scores or {}, data.name if data else None))
    return folder / CARD


def model_card(
    model: Model, config: LoraConfig, facts: Mapping[str, Any], scores: Mapping[str, Any], data: str | None
) -> str:
    """Return the card's text; arguments as in `write_model_card`."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(model), sort_keys=False)}---\n",
        f"# LoRA adapter for {model.base_name}\n",
        _table("Configuration", _settings(config, facts)),
    ]
    if model.is_classifier:
        names = json.dumps(facts.get("class_names"), ensure_ascii=False)
        parts.append(f"## Classes\n\nIn the order of the logits:\n\n```json\n{names}\n```\n")
    if facts.get("epochs"):
        parts.append(_epoch_table(facts["epochs"]))
    numbers = {name: f"{value:.6g}" for name, value in scores.items() if isinstance(value, int | float)}
    if data is not None:
        parts.append(_table(f"Evaluation on {data}", numbers))
    return "\n".join([*parts, _loading(model)])


def _front_matter(model: Model) -> dict[str, Any]:
    # a base that is no id of the Hub would be a broken link there
    is_id = _HUB_ID.fullmatch(model.base_name) and not Path(model.base_name).exists()
    base = {"base_model": model.base_name} if is_id else {}
    task = "text-classification" if model.is_classifier else "text-generation"
    return {**base, "library_name": "peft", "pipeline_tag": task, "tags": ["lora", model.spec.family]}


def _settings(config: LoraConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    from lora import __version__

    values = {name: getattr(config, name) for name in _SHOWN_SETTINGS} | {"lora_alpha": config.alpha}
    values |= {name: facts[name] for name in ("pooling", *_SHOWN_FACTS) if name in facts}
    values |= facts.get("training", {})
    return {
        **{name: json.dumps(value) for name, value in values.items()},
        "card written by": f"lora {__version__}",
    }


def _table(title: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *lines, ""])


def _epoch_table(epochs: Sequence[Mapping[str, Any]]) -> str:
    rows = [f"| {' | '.join(f'{epoch[name]:.6g}' for name in EPOCH_COLUMNS)} |" for epoch in epochs]
    head = [f"| {' | '.join(EPOCH_COLUMNS)} |", f"|{' --- |' * len(EPOCH_COLUMNS)}"]
    return "\n".join(["## Training, epoch by epoch\n", *head, *rows, ""])


def _loading(model: Model) -> str:
    base, convert = json.dumps(model.base_name), ""
    if is_apr(model.base_name):
        base, convert = '"base"', f"# first: lora convert {shlex.quote(model.base_name)} base\n"
    kind = "SequenceClassification" if model.is_classifier else "CausalLM"
    labels = ""
    if isinstance(model.head, ClassifierHead):
        labels = f", num_labels={len(model.head.class_names)}"
        labels += f', problem_type="{MULTI_LABEL}"' if model.head.is_multi_label else ""
    note = model.transformers_note()
    text = f"""## Loading it

```python
import lora

model = lora.load("path/to/this/folder")
```

```python
from peft import PeftModel
from transformers import AutoModelFor{kind}

{convert}base = AutoModelFor{kind}.from_pretrained({base}{labels})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
    return text if note is None else f"{text}\nNote: {note}\n"
