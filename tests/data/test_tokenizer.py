"""Ids of a byte-level tokenizer, where every token can be named: EOS, truncation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lora.data import tokenizer as module
from lora.data.tokenizer import Tokenizer
from lora.errors import DataError, FileFormatError, LoadError, ValidationError
from tests.data.files import EOS, byte_tokenizer, tokenizer_folder

EOS_ID = 256
TOKENIZER = Tokenizer(byte_tokenizer(), EOS_ID)
TEXTS = st.lists(st.text(min_size=1), min_size=1)


def size(text: str) -> int:
    return len(text.encode())


@given(texts=TEXTS)
def test_classification_adds_nothing_and_decodes_back(texts: list[str]) -> None:
    encoded = TOKENIZER.encode(texts, max_length=10**6)
    assert [len(ids) for ids in encoded.ids] == list(map(size, texts))
    assert all(ids.dtype == np.int64 for ids in encoded.ids)
    assert [TOKENIZER.decode(ids) for ids in encoded.ids] == texts
    assert encoded.truncated == 0


@given(texts=TEXTS, max_length=st.integers(1, 12), append_eos=st.booleans())
def test_a_long_text_keeps_its_head_and_is_counted(texts: list, max_length: int, append_eos: bool) -> None:
    whole = TOKENIZER.encode(texts, max_length=10**6, append_eos=append_eos).ids
    encoded = TOKENIZER.encode(texts, max_length, append_eos=append_eos)
    for ids, full in zip(encoded.ids, whole, strict=True):
        np.testing.assert_array_equal(ids, full[:max_length])
    assert encoded.truncated == sum(len(full) > max_length for full in whole)


@given(texts=TEXTS)
def test_a_causal_text_ends_with_one_eos(texts: list[str]) -> None:
    plain = TOKENIZER.encode(texts, max_length=10**6).ids
    ended = TOKENIZER.encode(texts, max_length=10**6, append_eos=True).ids
    spelled = TOKENIZER.encode([text + EOS for text in texts], max_length=10**6, append_eos=True).ids
    for without, with_eos, own in zip(plain, ended, spelled, strict=True):
        np.testing.assert_array_equal(with_eos, [*without, EOS_ID])
        np.testing.assert_array_equal(own, with_eos)


@pytest.mark.parametrize(
    ("max_length", "kept", "truncated"), [(4, "abc" + EOS, 0), (3, "abc", 1), (2, "ab", 1)]
)
def test_an_eos_that_does_not_fit_is_left_out_and_counted(max_length: int, kept: str, truncated: int) -> None:
    encoded = TOKENIZER.encode(["abc"], max_length, append_eos=True)
    assert TOKENIZER.decode(encoded.ids[0], skip_special_tokens=False) == kept
    assert encoded.truncated == truncated


def test_more_texts_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEXTS_AT_A_TIME", 3)
    texts = ["a", "bc", "d", "e", "fgh", "i", "j"]
    assert [TOKENIZER.decode(ids) for ids in TOKENIZER.encode(texts, 9).ids] == texts


def test_texts_without_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none at line 4, line 9$"):
        TOKENIZER.encode(["", "a", ""], 9, append_eos=True, lines=[4, 7, 9])
    with pytest.raises(DataError, match=r"none at text 1$"):
        TOKENIZER.encode(["a", ""], 9)
    with pytest.raises(DataError, match=r"text 19 and 5 more$"):
        TOKENIZER.encode([""] * 25, 9)


def test_the_settings_of_the_run_that_saved_it_do_not_apply() -> None:
    configured = byte_tokenizer()
    configured.enable_truncation(2)
    configured.enable_padding(length=8, pad_token="a")
    encoded = Tokenizer(configured, None).encode(["abcd"], 9)
    assert len(encoded.ids[0]) == 4


def test_a_bos_that_the_tokenizer_would_add_is_left_out() -> None:
    adding = byte_tokenizer()
    adding.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, EOS_ID)])
    assert EOS_ID not in Tokenizer(adding, EOS_ID).encode(["abcd"], 9).ids[0]


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_length_that_holds_nothing_is_refused(max_length: int) -> None:
    with pytest.raises(ValidationError, match=f"max_length: expected at least 1 token, found {max_length}"):
        TOKENIZER.encode(["a"], max_length)


@pytest.mark.parametrize("eos", [EOS, {"content": EOS, "lstrip": False}])
def test_the_eos_is_transformers_own(eos: object, tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, eos_token=eos)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.load(folder).eos_id == EOS_ID


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token_id": 7}, 7),
        ({"eos_token_id": [8, 7]}, 8),
        ({"text_config": {"eos_token_id": 9}, "eos_token_id": 7}, 9),
        ({"text_config": {}, "eos_token_id": 7}, 7),
        ({}, None),
    ],
)
def test_the_config_names_the_eos_where_the_tokenizer_does_not(
    config: dict, expected: int | None, tmp_path: Path
) -> None:
    folder = tokenizer_folder(tmp_path, eos_token=None)
    (folder / "config.json").write_text(json.dumps(config))
    assert Tokenizer.load(folder).eos_id == expected


def test_an_eos_that_nobody_names_is_missed_only_when_needed() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), None)
    assert tokenizer.encode(["a"], 9).truncated == 0
    with pytest.raises(LoadError, match="names no EOS token"):
        tokenizer.encode(["a"], 9, append_eos=True)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"No tokenizer\.json found in"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: expected a tokenizer, found"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileFormatError, match="eos_token '<end>' is not in"):
        Tokenizer.load(tokenizer_folder(tmp_path, eos_token="<end>"))
    for broken in ("[", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(FileFormatError, match=r"tokenizer_config\.json: expected"):
            Tokenizer.load(tmp_path)
