"""Attempts to falsify that the demo's tokenizer is one that a Qwen2 checkpoint could have."""

import json

import pytest
from tokenizers import Tokenizer

from lora.assets import asset
from lora.assets.sources.make_tokenizer import END, VOCABULARY


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(asset("demo", "base", "tokenizer.json")))


def rows() -> list[str]:
    files = [asset("demo", f"{split}.jsonl").read_text("utf-8") for split in ("train", "test")]
    return [json.loads(line)["input"] for text in files for line in text.splitlines()]


def test_every_row_comes_back_from_its_ids(tokenizer: Tokenizer) -> None:
    texts = rows()
    assert tokenizer.decode_batch([encoding.ids for encoding in tokenizer.encode_batch(texts)]) == texts


def test_bytes_that_no_row_holds_come_back_too(tokenizer: Tokenizer) -> None:
    text = "naïve ☃ 漢字 \x00\t\r\n 0123456789 ~^"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_last_id_ends_a_text_and_pads(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.token_to_id(END) == VOCABULARY - 1
    config = json.loads(asset("demo", "base", "tokenizer_config.json").read_text("utf-8"))
    assert config["eos_token"] == config["pad_token"] == END


def test_quoted_and_bare_expansions_differ_in_their_tokens(tokenizer: Tokenizer) -> None:
    bare, quoted = tokenizer.encode("cat $file").tokens, tokenizer.encode('cat "$file"').tokens
    assert bare == ["cat", "Ġ$", "file"]
    assert quoted == ["cat", 'Ġ"$', "file", '"']


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("chmod 755").tokens == ["chmod", "Ġ", "7", "5", "5"]
