"""Tokenizers: every text comes back, special ids cannot be written in a text, and the same texts give the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsmn_dist.config.data import TokenizerConfig
from hsmn_dist.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, build_tokenizer, load_tokenizer
from hsmn_dist.foundation.errors import DataError

TEXTS = ["Anna has 3 apples and buys 4 more.", "def add(a, b):\n    return a + b\n", "3 + 4 = 7\n#### 7"] * 20


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(TEXTS, 400)


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_every_text_comes_back(bpe: BpeTokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(4 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("special", ["<pad>", "<bos>", "<eos>", "<unk>"])
def test_special_tokens_cannot_be_written_in_a_text(bpe: BpeTokenizer, special: str) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert min(tokenizer.encode(f"a{special}b")) >= 4
        assert tokenizer.decode([1, *tokenizer.encode("a b"), 2, 0]) == "a b"


def test_training_is_a_function_of_the_texts(bpe: BpeTokenizer) -> None:
    again = BpeTokenizer.train(iter(TEXTS), 400)
    assert again.digest == bpe.digest and again.vocab_size == bpe.vocab_size <= 400
    assert BpeTokenizer.train(TEXTS[:2], 400).digest != bpe.digest
    assert len(bpe.encode("Anna has")) < len(ByteTokenizer().encode("Anna has"))


def test_digits_stand_alone(bpe: BpeTokenizer) -> None:
    assert len(bpe.encode("1234567")) == 7


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_is_the_same_one(kind: str, bpe: BpeTokenizer, tmp_path: Path) -> None:
    tokenizer: Tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.digest == tokenizer.digest and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_a_foreign_file_is_shifted_above_the_special_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Inner(models.BPE(vocab, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(tmp_path / "foreign.json"))
    tokenizer = build_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "foreign.json")), [])
    ids = tokenizer.encode("Good day <|endoftext|>")
    assert min(ids) >= 4 and max(ids) < tokenizer.vocab_size == 4 + 256 + 1
    assert tokenizer.decode([1, *ids, 2]) == "Good day <|endoftext|>"


@pytest.mark.parametrize("content", ["", "{}", "not json", json.dumps({"kind": "words"})])
def test_a_bad_file_is_a_data_error_that_names_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(tmp_path / "absent")
