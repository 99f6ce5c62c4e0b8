"""Write chat.json: what Transformers' apply_chat_template makes of the conversations in chat_templates.py."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.golden.chat_templates import CASES, TEMPLATES


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte, and the two marks of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        built.save(f"{folder}/tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def main() -> None:
    tokenizer, cases = byte_level(), {}
    for name, (template, messages, tools, _) in CASES.items():
        options = {"chat_template": TEMPLATES[template], "tools": tools}
        made = tokenizer.apply_chat_template(
            messages, **options, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        cases[name] = {
            "text": tokenizer.apply_chat_template(messages, **options, tokenize=False),
            "prompt": tokenizer.apply_chat_template(
                messages, **options, tokenize=False, add_generation_prompt=True
            ),
            "ids": made["input_ids"],
            "mask": made["assistant_masks"] if template == "marked" else None,
        }
    document = {"transformers": transformers.__version__, "cases": cases}
    path = Path(__file__).with_name("chat.json")
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
