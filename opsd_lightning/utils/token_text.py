"""Display text of single tokens: decoded text, or bytes for a part of a multi-byte character.

In a byte-level vocabulary (GPT-2, Llama 3, Qwen), a token may be a part of a character, and decoding it alone gives a
replacement character. With sentencepiece, decoding a single token drops its leading space. Therefore the text is read from
the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Display text of a token.

    Args:
        text: The text with its spaces and newlines, or hexadecimal bytes for a part of a character.
        kind: ``text``, ``special`` (an added token), ``bytes`` (part of a character) or ``unknown`` (not in the vocabulary).
        data: The bytes of a token of kind ``bytes``.
    """

    text: str
    kind: str = "text"
    data: bytes = b""


class Pieces:
    """Cached mapping from token ids to pieces.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = b"" if backend is None or backend.decoder is None else backend.decoder.__getstate__()
        self._bytes = _byte_by_character() if b'"ByteLevel"' in decoder else {}
        self._sentencepiece = "\u2581".encode() in decoder
        self._known: dict[int, Piece] = {}

    def __getitem__(self, token: int) -> Piece:
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def joined(self, tokens: Sequence[int]) -> dict[int, str]:
        """Join characters that are split over several tokens.

        Returns:
            Text by token index. The last token of a character gets the whole character, and its other tokens get an empty
            string. Bytes that do not form a character are left out.
        """
        found: dict[int, str] = {}
        for start, stop in _runs([self[token].kind == "bytes" for token in tokens]):
            place = start
            while place < stop:
                # Find the fewest tokens from here that form complete characters. A character has at most four bytes.
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
            return _bytes_piece(bytes(self._bytes[letter] for letter in raw))
        if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", raw):
            return _bytes_piece(bytes([int(byte[1], 16)]))
        if self._sentencepiece:
            return Piece(raw.replace("\u2581", " "))
        return Piece(str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False)))


def _bytes_piece(data: bytes) -> Piece:
    try:
        return Piece(data.decode())
    except UnicodeDecodeError:
        return Piece(data.hex(" ").upper(), "bytes", data)


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the start and stop index of each run of True."""
    padded = [False, *flags, False]
    edges = [place for place in range(len(flags) + 1) if padded[place] != padded[place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _byte_by_character() -> dict[str, int]:
    """Return GPT-2's table from characters to bytes: printable bytes map to themselves, other bytes to U+0100 and up."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
