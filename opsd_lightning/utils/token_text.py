"""How single tokens are shown: their text where it is text, and their bytes where a character is split over several.

A byte-level vocabulary (GPT-2, Llama 3, Qwen) has tokens that are parts of a character, whose own decoding is a replacement
sign; a sentencepiece vocabulary drops a token's leading space when it is decoded alone. So the vocabulary itself is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A token as it is shown.

    Args:
        text: Its text, spaces and newlines included; of a part of a character the bytes in hexadecimal.
        kind: ``text``, ``special`` (an added token), ``bytes`` (part of a character) or ``unknown`` (beyond the vocabulary).
        data: The bytes, where they are no whole text.
    """

    text: str
    kind: str = "text"
    data: bytes = b""


class Pieces:
    """The pieces of a tokenizer's tokens.

    Args:
        tokenizer: Any of transformers'.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = b"" if backend is None or backend.decoder is None else backend.decoder.__getstate__()
        self._bytes = _byte_of_letter() if b'"ByteLevel"' in decoder else {}
        self._sentencepiece = "\u2581".encode() in decoder
        self._known: dict[int, Piece] = {}

    def __getitem__(self, token: int) -> Piece:
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def joined(self, tokens: Sequence[int]) -> dict[int, str]:
        """Characters that are split over several tokens, by the place of the last of them; the others' text is then empty.

        What is no character after all keeps its bytes.
        """
        found: dict[int, str] = {}
        for start, stop in _runs([self[token].kind == "bytes" for token in tokens]):
            place = start
            while place < stop:
                # The fewest tokens from here that make whole characters; a character has at most four bytes.
                for end in range(place + 1, min(place + 8, stop) + 1):
                    try:
                        text = b"".join(self[token].data for token in tokens[place:end]).decode()
                    except UnicodeDecodeError:
                        continue
                    found |= dict.fromkeys(range(place, end - 1), "") | {end - 1: text}
                    place = end
                    break
                else:
                    place += 1
        return found

    def _read(self, token: int) -> Piece:
        if token in self._special:
            return Piece(self._special[token], "special")
        raw = self.tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self.tokenizer) else None
        if raw is None:
            return Piece(f"token {token}", "unknown")
        if self._bytes and all(letter in self._bytes for letter in raw):
            return _of_bytes(bytes(self._bytes[letter] for letter in raw))
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", raw):
            return _of_bytes(bytes([int(byte[1], 16)]))
        if self._sentencepiece:
            return Piece(raw.replace("\u2581", " "))
        return Piece(str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)))


def _of_bytes(data: bytes) -> Piece:
    try:
        return Piece(data.decode())
    except UnicodeDecodeError:
        return Piece(data.hex(" ").upper(), "bytes", data)


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where runs of True start and stop."""
    padded = [False, *flags, False]
    edges = [place for place in range(len(flags) + 1) if padded[place] != padded[place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, and the others for the letters from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
