"""Read the options of a multiple-choice question, and the choice that a completion makes.

A choice is read only where the text clearly makes one: the whole text, an answer phrase, a first or last line of its own, or
the only option that is mentioned. Otherwise there is no choice.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from opsd_lightning.grading.final_answer import last_boxed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 20_000
"""Number of characters at the end of a completion that are read."""

_OPTION_LINE = re.compile(r"^[ \t]*(?:[-*][ \t]+)?[(\[]?([A-Za-z]|\d{1,2})[)\].:][ \t]*(\S[^\n]*)$", re.MULTILINE)
_TEX_TEXT = re.compile(r"\\(?:text|textbf|mathbf|mathrm|textrm|boxed)\s?\{([^{}]{0,200})\}")
_MARKUP = re.compile(r"\*\*|__|`|\\[()\[\]]|\$")
_TAGS = re.compile(r"<\s*(/?)\s*(?:answer|final|choice|option)\s*>", re.IGNORECASE)
_MARKER = re.compile(
    r"""
    \x02                                                                      # an opening tag of the answer
    | \b(?:answers?|choice|option|solution|selection|ans)["']?[ \t]*(?:\([^()\n]{0,20}\)[ \t]*)?
      (?:(?:would|should|must|will|can)[ ](?:therefore[ ])?be\b|is\b|are\b|was\b|[:=：]|['’]s\b|[-–—](?=\s))
    | \bans\.
    | \b(?:i|we)(?:['’]d|['’]ll|[ ]would|[ ]will)?[ ](?:choose|pick|select|go[ ]with|answer|chose|picked|selected)\b
    | \b(?:correct|right|best)[ ](?:one|statement)[ ]is\b
    | \b(?:respuesta|réponse|risposta|resposta)(?:[ ]\w{1,12})?[ ]?(?:es\b|est\b|è\b|é\b|:)
    | \bantwort(?:[ ]ist\b|:) | \bответ[ ]?[:—-]
    | (?:答案|正解|答え|正确答案|选项)(?:应该|應該)?(?:是|为|為|は|：|:)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_WEAK_MARKER = re.compile(r"\bit(?:['’]s|[ ]is)\b|\b(?:so|therefore|thus|hence)\b,?", re.IGNORECASE)  # only before letters
_FILLER = re.compile(
    r"(?:[\s:=：>\"'“‘]|,(?=\s)"
    r"|\b(?:therefore|thus|hence|then|simply|clearly|indeed|definitely|most likely|probably|likely)\b)*"
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+|best\s+)?(?:option|choice|answer|letter|number)\b[ \t:]*)?[\s\"'“‘]*",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:not|neither|never|cannot|isn['’]?t|n['’]t)\b", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:not|n['’]t|cannot|can['’]t|isn['’]t|neither|nor|wrong|incorrect|false|eliminate\w*|exclude\w*|except"
    r"|rule[sd]?\s+out|unlikely|if|unless|maybe|perhaps|whether|unsure)\b",
    re.IGNORECASE,
)
_WRONG = re.compile(
    r"\b(?:wrong|incorrect|false|impossible|eliminat\w*|(?:not|isn['’]t|can['’]t\s+be)\s+(?:correct|right|true|the|possible|it))\b",
    re.IGNORECASE,
)
_RIGHT = re.compile(
    r"[ \t]*(?:\"|')?[ \t]+(?:is|must[ ]be|would[ ]be|seems|looks)[ ]"
    r"(?:(?:therefore|clearly|indeed|thus|definitely|the)[ ]){0,2}"
    r"(?:only[ ])?(?:correct|right|true|best|answer|(?:one|option)[ ]that[ ]is[ ]correct)\b",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\b(?:if|whether|unless|why|wrong|incorrect|not the)\b[^.,\n]*$", re.IGNORECASE)
_OTHER = re.compile(
    r"\s*(?:[,;/&+]|\bor\b|\band\b|,\s*(?:or|and)\b)\s*(?:also\s+|maybe\s+|perhaps\s+|possibly\s+|both\s+)?", re.IGNORECASE
)
_END = re.compile(r"[ \t]*(?:$|[.,;:!?)\]\"'”’\n\x03]|—|–|-[ ]|\(|[ ](?:because|since|or|and|is|not|as)\b)")
_REASON = re.compile(
    r"[ \t]*(?:$|[.,;:!?)\]\"'”’。，、；]|\n|—|–|-[ ]|\x03|\((?!s\))"
    r"|[ ](?:because|since|as|for|given|due|which|where|so|not|rather|instead|or|and|is|in|from|with|based|by|if|when|while|"
    r"but|corresponds|represents|here|therefore|thus|hence|this|that|we|it|they|he|she|i)\b)",
    re.IGNORECASE,
)


class OptionError(ValueError):
    """Options that cannot be read. The message is the problem."""


def read_options(value: Any) -> dict[str, str]:
    """Return the text of each option by its label, in upper case.

    Args:
        value: A list of texts, which get the labels A, B, ...; an object of texts by label; an object with the lists
            ``label`` and ``text``; or a text with one labelled option per line.

    Raises:
        OptionError: The value has another form, fewer than two options, or a label twice.
    """
    if isinstance(value, str):
        return _options_in(value)
    if isinstance(value, Mapping):
        texts = value.get("text", value.get("choices"))
        labels = value.get("label", value.get("labels"))
        if isinstance(texts, (list, tuple)) and isinstance(labels, (list, tuple)):
            if len(texts) != len(labels):
                raise OptionError(f"there are {len(labels)} labels and {len(texts)} texts")
            pairs = list(zip(labels, texts, strict=True))
        else:
            pairs = list(value.items())
    elif isinstance(value, (list, tuple)):
        if len(value) > len(LETTERS):
            raise OptionError(f"there are {len(value)} options, and {len(LETTERS)} letters")
        pairs = list(zip(LETTERS, value, strict=False))
    else:
        raise OptionError(f"a {type(value).__name__} holds no options")
    found: dict[str, str] = {}
    for label, text in pairs:
        name = str(label).strip().rstrip(".):").lstrip("(").upper()
        if not re.fullmatch(r"[A-Z]|\d{1,2}", name):
            raise OptionError(f"the label {label!r} is neither a letter nor a number")
        if name in found:
            raise OptionError(f"the label {name} is given twice")
        if isinstance(text, (Mapping, list, tuple)):
            raise OptionError(f"the option {name} is not a text")
        if text is not None:  # a column of a table has null where a row has fewer options
            found[name] = _without_label(str(text), name)
    return _several(found)


def _without_label(text: str, label: str) -> str:
    """Remove a label that the text of an option repeats, as in ``A) 12``."""
    return re.sub(rf"^\s*[(\[]?{label}[)\].:]\s*(?=\S)", "", text.strip())


def _options_in(text: str) -> dict[str, str]:
    """Return the options of a question's text: the last lines labelled A, B, ... or 1, 2, ... in order."""
    best: dict[str, str] = {}
    for numbers in (False, True):
        found: dict[str, str] = {}
        for line in _OPTION_LINE.finditer(text):
            label = line[1].upper()
            if label.isdigit() is numbers:
                if label in ("A", "1"):
                    found = {}
                expected = str(len(found) + 1) if numbers else LETTERS[min(len(found), 25)]
                if label == expected:
                    found[label] = line[2].strip()
        if len(found) > 1 and not best:
            best = found
    if not best:  # on one line: "(A) 10 (B) 12 (C) 14"
        labels = list(re.finditer(r"(?:^|(?<=\s))(?:\(([A-Z])\)|([A-Z])[).])[ \t]*(?=\S)", text))
        starts = [place for place, label in enumerate(labels) if (label[1] or label[2]) == "A"]
        for place, label in enumerate(labels[starts[-1] :] if starts else []):
            if (label[1] or label[2]) != LETTERS[place]:
                break
            following = starts[-1] + place + 1
            end = labels[following].start() if following < len(labels) else len(text)
            best[LETTERS[place]] = text[label.end() : end].strip().strip(",;").strip()
    return _several(best)


def _several(found: dict[str, str]) -> dict[str, str]:
    if len(found) < 2:
        raise OptionError(f"{len(found) or 'no'} option{'s' * (len(found) != 1)} found")
    return found


def plain(text: str) -> str:
    """Return a text in a form for comparison: without markup, case, closing punctuation and repeated white space."""
    text = unicodedata.normalize("NFKC", _without_markup(text)).casefold()
    return " ".join(text.split()).strip(" .,;:!\"'“”‘’\x02\x03")


def _without_markup(text: str) -> str:
    return _MARKUP.sub("", _TEX_TEXT.sub(r"\1", text))


def _is_conditional(text: str, place: int) -> bool:
    """Return True if the words before a place deny or suppose what follows, as in "if the answer is B"."""
    return _CONDITION.search(text[max(0, place - 40) : place]) is not None


def _clause(text: str, start: int) -> str:
    return re.split(r"[.,;\n]", text[start : start + 100], maxsplit=1)[0]


class ChoiceReader:
    """Reader of the choices that completions make between given options.

    Args:
        options: Text of each option by label, from `read_options`.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        self.options = options
        labels = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
        self._digits = any(label.isdigit() for label in options)
        self._texts: dict[str, list[str]] = {}  # labels by the plain text of their options
        for label, text in options.items():
            self._texts.setdefault(plain(text), []).append(label)
        # a label in brackets, before a delimiter, or alone, with an optional word before it
        word = r"(?:(?:option|choice|answer|letter|number)\b[ \t:]*)"
        self._label = re.compile(
            rf"(?P<word>{word})?(?:[(\[]\s?(?P<bracketed>{labels})\s?[)\]]|(?P<marked>{labels})[).:](?!\d)"
            rf"|(?P<bare>{labels})(?![\w'’]))",
            re.IGNORECASE,
        )
        self._mention = re.compile(
            rf"(?<![\w(])(?:(?i:{word})[(\[]?(?P<named>{labels})(?![\w'’])[)\]]?|[(\[](?P<bracketed>{labels})[)\]]"
            rf"|(?P<alone>{labels})(?=[ ]is[ ]))",
            re.IGNORECASE if self._digits else 0,
        )
        self._named = re.compile(rf"(?<![\w(])(?:{word}?[(\[]?(?P<label>{labels})(?![\w'’])[)\]]?)", re.IGNORECASE)

    def label_of(self, text: str) -> str | None:
        """Return the label of the only option with this text, or None."""
        found = self._texts.get(plain(text), [])
        return found[0] if len(found) == 1 else None

    def read(self, text: str) -> str | None:
        """Return the label of the option that a text chooses, or None."""
        text = text if len(text) <= LONGEST else text[-LONGEST:]
        text = unicodedata.normalize("NFKC", text.replace("\x02", "").replace("\x03", ""))
        boxed = last_boxed(text)
        if boxed is not None:
            return self.whole(boxed)
        text = _TAGS.sub(lambda tag: "\x03" if tag[1] else "\x02", _without_markup(text)).strip()
        whole = self.whole(text.strip("\x02\x03 \n"))
        if whole is not None:
            return whole
        text = self._without_list(text)
        decided, found = self._after_phrases(text)
        if decided:
            return found
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            return None
        ends = {label for label in (self.whole(lines[0], line=True), self.whole(lines[-1], line=True)) if label is not None}
        if ends:
            return ends.pop() if len(ends) == 1 else None
        return self._only_mention(text)

    def whole(self, text: str, line: bool = False) -> str | None:
        """Return the label of a text that is a choice as a whole, such as ``B``, ``(B) 12``, ``Option B`` or ``twelve``.

        Args:
            text: The text.
            line: If True, the text is a line among others, and text after a label must not be a sentence of its own.
        """
        text = _without_markup(text).strip()
        by_text = self._texts.get(plain(text))
        label = self._label.match(text)
        if label is None:
            return by_text[0] if by_text is not None and len(by_text) == 1 else None
        name = (label["bracketed"] or label["marked"] or label["bare"]).upper()
        content = text[label.end() :].strip(" \t.:,-–—)!\"'")
        if by_text is not None:  # "A" may be both a label and the text of an option
            if not content and name not in by_text:
                return None
            return by_text[0] if len(by_text) == 1 else name if name in by_text else None
        if not content:
            return name
        of_content = self._texts.get(plain(content))
        if of_content is not None:
            return name if name in of_content else None
        if self._is_list(text[label.end() :], name):
            return None
        if "\n" in content:  # a first line that names an option, and an answer phrase below it that names another one
            decided, later = self._after_phrases(content)
            if decided and later != name:
                return None
        if _WRONG.search(re.split(r"\n|(?<=\w)\.\s", content[:300], maxsplit=1)[0]):
            return None
        if label["bare"] is not None and label["word"] is None:
            if re.match(r"\s*,?\s*(?:because|since)\b", text[label.end() :]):
                return name
            return name if _REASON.match(text, label.end()) and text[label.end()] in "\n,;—–(" else None
        if line and label["bracketed"] is None and label["marked"] is None:
            return None
        if _RIGHT.match(text, label.end()) or label["word"] is not None or label["bracketed"] is not None:
            denied = _DENIED.search(content[:200].split("\n")[0])
            return None if denied is not None else name
        return name if "\n" not in content or not self._other_choices(content, name) else None

    def _is_list(self, content: str, name: str) -> bool:
        """Return True if the text after a choice names another one, as in ``B or C`` and ``A) 10 B) 12``."""
        other = _OTHER.match(content)
        if other is not None:
            label = self._named.match(content, other.end())
            if label is not None and label["label"].upper() != name and label["label"].isupper():
                return True
        first = content.split("\n")[0]
        return any(
            found["bracketed"] is not None and found["bracketed"].upper() != name for found in self._mention.finditer(first)
        ) or bool({found[1].upper() for found in re.finditer(r"(?:^|\s)([A-Za-z])\)", first)} & set(self.options) - {name})

    def _other_choices(self, content: str, name: str) -> bool:
        return any(self.whole(line) not in (None, name) for line in content.splitlines()[:50] if len(line) < 300)

    def _without_list(self, text: str) -> str:
        """Remove the options that a completion repeats from the question: neighbouring lines with different labels."""
        lines = text.split("\n")
        labels = []
        for line in lines:
            found = _OPTION_LINE.match(line)
            label = found[1].upper() if found is not None else ""
            labels.append(label if found is not None and label in self.options and self._repeats(label, found[2]) else "")
        kept = []
        for place, line in enumerate(lines):
            near = {labels[other] for other in (place - 1, place + 1) if 0 <= other < len(lines)} - {""}
            if not (labels[place] and near - {labels[place]}):
                kept.append(line)
        return "\n".join(kept)

    def _repeats(self, label: str, content: str) -> bool:
        return plain(content) == plain(self.options[label])

    def _after_phrases(self, text: str) -> tuple[bool, str | None]:
        """Return the choice after the last phrase that announces an answer, and True if there is such a phrase."""
        found: list[tuple[int, str | None]] = []
        for marker in [*_MARKER.finditer(text), *_WEAK_MARKER.finditer(text)]:
            if _is_conditional(text, marker.start()):
                continue
            filler = _FILLER.match(text, marker.end())
            start = filler.end() if filler is not None else marker.end()
            choice = self._start(text, start)
            if marker.re is _WEAK_MARKER:
                label = self._label.match(text, start)
                if not choice or label is None or _WRONG.search(_clause(text, label.end() - 1)):
                    continue
            if choice is not None:
                found.append((start, choice or None))
        for right in _RIGHT.finditer(text):
            before = re.split(r"\n|,|[.!?]\s", text[max(0, right.start() - 300) : right.start()])[-1]
            by_text = self.label_of(re.sub(r"^\s*(?:so|thus|therefore|hence)\s", "", before, flags=re.IGNORECASE))
            if by_text is not None:
                found.append((right.start(), by_text))
        for mention in self._mention.finditer(text):
            if _RIGHT.match(text, mention.end()) and not _is_conditional(text, mention.start()):
                name = mention["named"] or mention["bracketed"] or mention["alone"]
                found.append((mention.start(), name.upper()))
        return (True, max(found, key=lambda each: each[0])[1]) if found else (False, None)

    def _start(self, text: str, start: int) -> str | None:
        """Return the choice at the start of a clause, an empty text for several choices, and None if there is none."""
        if _NEGATION.match(text, start):
            return None
        clause = re.split(r"\n|\x03|(?<=\w\w)[.!?](?=\s|$)", text[start : start + 500], maxsplit=1)[0]
        label = self._label.match(text, start)
        if label is not None and (label["bare"] is None or self._ends(text, label)):
            name = (label["bracketed"] or label["marked"] or label["bare"]).upper()
            content = clause[label.end() - start :]
            if self._is_list(content, name):
                return ""
            of_content = self._texts.get(plain(content))
            whole = self._texts.get(plain(clause))
            if of_content is not None and name not in of_content:
                return ""
            if whole is not None and name not in whole:
                return whole[0] if plain(content) and len(whole) == 1 else ""
            return name
        for end in (clause, re.split(r"[,;(]|\bbecause\b|\bsince\b", clause, maxsplit=1)[0]):
            by_text = self._texts.get(plain(end))
            if by_text is not None:
                return by_text[0] if len(by_text) == 1 else ""
        return None

    def _ends(self, text: str, label: re.Match[str]) -> bool:
        """Return True if a label without brackets is no word of a sentence: "A" and "I" may be, and lower-case letters."""
        if _REASON.match(text, label.end()) is None:
            rest = re.split(r"\n|\x03", text[label.end() : label.end() + 300], maxsplit=1)[0]
            return plain(rest) == plain(self.options[label["bare"].upper()])
        name = label["bare"]
        if name.isdigit() or (name.isupper() and name not in "AI"):
            return True
        return _END.match(text, label.end()) is not None

    def _only_mention(self, text: str) -> str | None:
        """Return the only option that a text mentions in brackets or after the word "option", unless it is denied."""
        names = set[str]()
        for found in self._mention.finditer(text):
            name = (found["named"] or found["bracketed"] or "").upper()
            if not name:
                continue
            names.add(name)
            content = re.split(r"\n|[,;]|(?<=\w)[.!?](?=\s|$)", text[found.end() : found.end() + 500], maxsplit=1)[0]
            if name not in self._texts.get(plain(content), [name]):
                return None  # the text of another option
        return names.pop() if len(names) == 1 and _DENIED.search(text) is None else None
