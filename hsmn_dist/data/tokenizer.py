"""Text to token ids and back: bytes, byte-level BPE trained on the run's text, or a given tokenizer.json.

What is unusual: ids 0 to 3 are <pad>, <bos>, <eos>, <unk> in every kind; a given file that numbers its tokens otherwise is
shifted up by four. Text can never produce these ids: "<eos>" in a document is five ordinary characters. BPE splits numbers
into digits, which arithmetic needs. Source of BPE on bytes: Radford et al. 2019 (GPT-2), section 2.2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from hsmn_dist.config.data import TokenizerConfig
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import write_text

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)
NUM_SPECIAL = len(SPECIAL_TOKENS)
TOKENIZER_NAME = "tokenizer.json"
LARGEST_ID = 1 << 24


class Tokenizer(Protocol):
    """What the house asks of a tokenizer."""

    pad_id: int
    bos_id: int
    eos_id: int

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special id is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ids give nothing."""
        ...

    def save(self, path: Path) -> None:
        """Write a file that `load_tokenizer` reads."""
        ...


class ByteTokenizer:
    """One id per byte of UTF-8: 4 + byte."""

    pad_id, bos_id, eos_id = 0, 1, 2

    @property
    def vocab_size(self) -> int:
        """260."""
        return NUM_SPECIAL + 256

    @property
    def digest(self) -> str:
        """Of the saved form."""
        return hashlib.sha256(self._saved().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Bytes of the text, each plus 4."""
        return [byte + NUM_SPECIAL for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; bytes that are no UTF-8 become the replacement character."""
        data = bytes(i - NUM_SPECIAL for i in ids if NUM_SPECIAL <= i < NUM_SPECIAL + 256)
        return data.decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write the kind."""
        write_text(path, self._saved())

    def _saved(self) -> str:
        return json.dumps({"kind": "bytes"}) + "\n"


class BpeTokenizer:
    """A tokenizer of the `tokenizers` library; its ids are shifted so that 0 to 3 are the special ones."""

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        inner.no_padding()
        inner.no_truncation()
        # Without this, "<eos>" written in a document would become the id that ends a target.
        inner.encode_special_tokens = True
        own = [inner.token_to_id(token) for token in SPECIAL_TOKENS]
        self._shift = 0 if own == list(range(NUM_SPECIAL)) else NUM_SPECIAL
        # Ids need not be dense in a given file, so the largest one counts.
        self._vocab_size = self._shift + 1 + max(inner.get_vocab(with_added_tokens=True).values())
        self._digest = hashlib.sha256(inner.to_str().encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn merges from texts. The result depends on the texts alone; it may have fewer ids than asked for."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = Inner(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Read a tokenizer.json.

        Raises:
            DataError: there is none, or the library cannot read it.
        """
        from tokenizers import Tokenizer as Inner

        try:
            text = path.read_text(encoding="utf-8")
            _check_ids(json.loads(text))
            return cls(Inner.from_str(text))
        except Exception as error:  # the library raises plain Exception for any bad file
            raise DataError(
                f"{path}: no tokenizer can be read from it ({error})",
                allowed="a tokenizer.json of the tokenizers library",
                action="set tokenizer.path to such a file, or use tokenizer.kind bpe or bytes",
            ) from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's JSON."""
        return self._digest

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        return [i + self._shift for i in ids] if self._shift else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; the four special ids, and ids of no token, give nothing."""
        known = [i - self._shift for i in ids if NUM_SPECIAL <= i < self._vocab_size]
        return str(self._inner.decode(known, skip_special_tokens=False))

    def save(self, path: Path) -> None:
        """Write the library's own JSON."""
        write_text(path, self._inner.to_str())


def _check_ids(value: Any) -> None:
    """Refuse ids beyond any vocabulary: the library walks from 0 to the largest, so one huge id costs it minutes."""
    vocab = value["model"].get("vocab")
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token["id"] for token in value.get("added_tokens") or []]
    if not all(type(number) is int and 0 <= number < LARGEST_ID for number in ids):
        raise ValueError(f"a token id that is no whole number below {LARGEST_ID}")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that `save` wrote, or any tokenizer.json of the tokenizers library.

    Raises:
        DataError: the file is missing or is no tokenizer.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: no tokenizer can be read from it ({error})",
            allowed="a tokenizer.json",
            action="name another file, or prepare the data again",
        ) from error
    if value == {"kind": "bytes"}:
        return ByteTokenizer()
    return BpeTokenizer.load(path)


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of a run; `texts` are read only when one is trained."""
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "file":
        return BpeTokenizer.load(Path(config.path))
    return BpeTokenizer.train(texts, config.vocab_size)
