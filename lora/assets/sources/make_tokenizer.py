"""Train the demo's tokenizer on the base model's text: `python -m lora.assets.sources.make_tokenizer`.

A byte-level BPE in the form of Qwen2's tokenizer.json: NFC, Qwen's split pattern, byte-level bytes, one
special token that ends a text and pads. Written to lora/assets/demo/base/.
"""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lora.assets.sources.make_data import DEMO
from lora.assets.sources.make_text import texts

BASE = DEMO / "base"
VOCABULARY = 2048
END = "<|endoftext|>"
# words with one leading sign or space, single digits, runs of other signs, line ends, spaces
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train() -> Tokenizer:
    """Train the tokenizer: 256 bytes, merges up to the vocabulary less one, then the special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([END])
    return tokenizer


def main() -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    BASE.mkdir(exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(BASE / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": 512,
        "pad_token": END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (BASE / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
