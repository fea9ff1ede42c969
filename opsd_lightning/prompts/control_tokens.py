"""Encode control tokens in data, such as a literal ``<|im_end|>`` in a trace, as ordinary text.

A tokenizer turns every ``<|im_end|>`` in a text into the token that ends a turn. Text from the data or the model must not
end a turn inside a prompt. Such strings are replaced by marks before the chat template is rendered, and then encoded
without added tokens. A text without control tokens is encoded as usual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


class _Control(NamedTuple):
    """Control tokens of a tokenizer.

    Args:
        key: Size of the vocabulary, and the chat template, when they were read.
        patterns: Regular expressions that match a control token in a ``prompt`` and in a ``completion``.
        ids: Ids of all control tokens.
    """

    key: tuple[int, str]
    patterns: dict[str, re.Pattern[str]]
    ids: frozenset[int]


_KNOWN: WeakKeyDictionary[Any, _Control] = WeakKeyDictionary()
_NOTHING = re.compile(r"(?!)")
_TAG = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_THINKING = re.compile("think|thought|reason", re.IGNORECASE)


def _control(tokenizer: PreTrainedTokenizerBase) -> _Control:
    template = str(tokenizer.chat_template)
    key = (len(tokenizer), template)
    known = _KNOWN.get(tokenizer)
    if known is not None and known.key == key:
        return known
    added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if len(token.content.strip()) > 1}
    special = {token.content for token in added.values() if token.special}
    # Tags that are not special count as control tokens if the template writes one of the pair, or if they name thinking.
    # Other tags, such as Gemma's <table>, are text.
    shaped = {token.content for token in added.values() if _TAG.fullmatch(token.content)}
    opening = {token: token.replace("/", "", 1) for token in shaped}
    written = {opening[token] for token in shaped if token in template}
    tags = {token for token in shaped if opening[token] in written or _THINKING.search(token)}
    patterns = {
        "prompt": _any_of(special | tags),
        # A completion may think, and decoding keeps tokens that are not special.
        "completion": _any_of({token for token in special if not _THINKING.search(token)}),
    }
    ids = frozenset(index for index, token in added.items() if token.content in special | tags)
    known = _KNOWN[tokenizer] = _Control(key, patterns, ids)
    return known


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else _NOTHING


def spelled(tokenizer: PreTrainedTokenizerBase, text: str, where: Literal["prompt", "completion"] = "prompt") -> list[str]:
    """Return the control tokens in a text."""
    return _control(tokenizer).patterns[where].findall(text)


def without_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Return the pieces of a text between its control tokens."""
    return _control(tokenizer).patterns["prompt"].split(text)


class Marks:
    """Marks in place of the control tokens in several texts of one prompt, with one table for all.

    Args:
        tokenizer: The tokenizer.
        texts: All texts that will be in the prompt. No mark looks like a part of them.

    Attributes:
        hidden: The control token behind each mark.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
        self._patterns = _control(tokenizer).patterns
        self._texts = texts
        self._fence = ""
        self.hidden: dict[str, str] = {}

    def hide(
        self, text: str, inserted: Sequence[Span] | None = None, where: Literal["prompt", "completion"] = "prompt"
    ) -> str:
        """Replace control tokens that overlap inserted values by marks.

        Args:
            text: The text.
            inserted: Start and end of the values in it. Control tokens elsewhere stay. Defaults to the whole text.
            where: Use of the text, which decides the tokens that count as control tokens.
        """
        pieces, end = [], 0
        for match in self._patterns[where].finditer(text):
            if inserted is None or any(match.start() < stop and start < match.end() for start, stop in inserted):
                mark = f"{self._mark()}{len(self.hidden)}{self._fence}"
                self.hidden[mark] = match[0]
                pieces += [text[end : match.start()], mark]
                end = match.end()
        return "".join([*pieces, text[end:]])

    def hide_in(self, value: Any, where: Literal["prompt", "completion"] = "prompt") -> Any:
        """Replace control tokens in all texts of a nested value, such as a tool schema."""
        if isinstance(value, str):
            return self.hide(value, where=where)
        if isinstance(value, Mapping):
            return {self.hide_in(key, where): self.hide_in(each, where) for key, each in value.items()}
        return [self.hide_in(each, where) for each in value] if isinstance(value, list | tuple) else value

    def _mark(self) -> str:
        if not self._fence:
            # A character for private use that these texts do not contain: no template treats it in a special way.
            used = set().union(*self._texts)
            self._fence = next((chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used), "\ue000")
        return self._fence


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts of a nested value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_in(each)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, hidden: Mapping[str, str]) -> list[int]:
    """Encode a text without adding special tokens. Encode the control tokens behind `Marks` as ordinary text."""
    if not hidden:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    escaped = {json.dumps(mark)[1:-1]: token for mark, token in hidden.items()}  # as templates may write JSON
    hidden = {**hidden, **escaped}
    pieces = re.split("(" + "|".join(map(re.escape, hidden)) + ")", text)
    shown, places = "", []
    for number, piece in enumerate(pieces):
        if number % 2:
            places.append((len(shown), len(shown) + len(hidden[piece])))
        shown += hidden[piece] if number % 2 else piece
    if not tokenizer.is_fast:
        return _piece_by_piece(tokenizer, shown, places)
    ids = _control(tokenizer).ids
    encoded = tokenizer(shown, add_special_tokens=False, return_offsets_mapping=True)
    found: list[int] = []
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):  # type: ignore[arg-type]
        if token in ids and any(start < last and first < stop for first, last in places):
            found += plain(tokenizer, shown[start:stop])
        else:
            found.append(token)
    return found


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, where: Literal["prompt", "completion"] = "prompt"
) -> list[int]:
    """Encode a text from the data or the model. Its control tokens become ordinary text."""
    marks = Marks(tokenizer, [text])
    return encode(tokenizer, marks.hide(text, where=where), marks.hidden)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text without the tokens that were added to the vocabulary."""
    own = {tokenizer.convert_tokens_to_ids(token) for token in spelled(tokenizer, text)}
    backend = _without_added_tokens(tokenizer)
    if backend is not None:
        ids = behind_a_break(lambda piece: list(backend.encode(piece).ids), text)
        if own.isdisjoint(ids):
            return ids
    # The base vocabulary has the token too. Single characters are never control tokens.
    encode_piece = lambda piece: list(tokenizer.encode(piece, add_special_tokens=False))  # noqa: E731
    return [token for character in text for token in behind_a_break(encode_piece, character)]


def behind_a_break(encode_piece: Callable[[str], list[int]], text: str) -> list[int]:
    """Encode a text behind a line break, because some tokenizers add a space at the beginning of a text."""
    start, ids = encode_piece("\n"), encode_piece("\n" + text)
    return ids[len(start) :] if ids[: len(start)] == start else encode_piece(text)


def _piece_by_piece(tokenizer: PreTrainedTokenizerBase, text: str, places: Sequence[Span]) -> list[int]:
    found: list[int] = []
    end = 0
    for start, stop in [*places, (len(text), len(text))]:
        if text[end:start]:
            found += tokenizer.encode(text[end:start], add_special_tokens=False)
        found += plain(tokenizer, text[start:stop])
        end = stop
    return found


_BACKENDS: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a copy of a fast tokenizer without added tokens, or None if it cannot be copied."""
    if not tokenizer.is_fast:
        return None
    size, backend = _BACKENDS.get(tokenizer, (-1, None))
    if size != len(tokenizer):
        from tokenizers import Tokenizer

        try:
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            backend = Tokenizer.from_str(json.dumps(state))
        except Exception:  # parts written in Python cannot be copied, and tokenizers has no error class
            backend = None
        _BACKENDS[tokenizer] = (len(tokenizer), backend)
    return backend
