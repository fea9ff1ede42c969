r"""Find the complete final answer in a text.

The last ``\boxed{...}`` counts. Without one, the last phrase that announces an answer counts ("The answer is 42",
"**Answer:** 42", "答案是42", ``<answer>42</answer>``, a last line "#### 42"). The text after the phrase is cut at the end of
the sentence or clause. It is accepted only if it is an answer as a whole: a number with its unit, an expression, a list, a
choice, or a name.
"""

from __future__ import annotations

import re
from collections import deque

from opsd_lightning.grading.answer_forms import EQUALS, has_words, is_label, read_choice, read_clock, strip_unit
from opsd_lightning.grading.answer_text import clean, is_balanced, split_outside_brackets
from opsd_lightning.grading.quantities import read_quantity

_LOOKAHEAD = 600  # characters after a phrase that are read
_MARKERS = 50  # number of phrases to try, from the last one back
_WORDS = 1000  # number of occurrences of "answer" to search, from the last one back
_PREFIX = 80  # characters before that word that may belong to a phrase
_BOXES = 20  # maximum number of boxes joined into one answer

# -- thinking blocks -----------------------------------------------------------------------------------------------------

_NAMES = r"think|thinking|thought|reasoning"
_THINKING = re.compile(
    rf"(?P<open><\s*(?:{_NAMES})\s*>|\[THINK\]|◁think▷)|(?P<close><\s*/\s*(?:{_NAMES})\s*>|\[/THINK\]|◁/think▷)",
    re.IGNORECASE,
)


def strip_thinking(text: str) -> str | None:
    """Return the text after the last thinking block, the whole text if there is no block, or None if a block is open."""
    start, opened = 0, False
    for tag in _THINKING.finditer(text):
        opened = tag["open"] is not None
        start = tag.end()
    return None if opened else text[start:]


# -- boxes ---------------------------------------------------------------------------------------------------------------

_BOX = re.compile(r"\\{1,2}(?:f?boxed|fbox|framebox)(?![A-Za-z])\s{0,9}(?:(\{)|(?=([^\s{])))|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[-+]?\d[\d.,]*(?<![.,])|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+(?:\{[^{}]*\})*")
_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:,|;|\\text\s*\{\s*(?:,?\s*and|,?\s*or)\s*\}|,?\s*\b(?:and|or)\b|\\quad|\\\))[\s$,]*(?:\\\(\s*)?(?:\\quad\s*)*"
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*=\s*)?"
)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete, nonempty ``\boxed{...}``, or None.

    Boxes separated only by "and", "or" or a comma are joined into one answer. Takes linear time.
    """
    found: list[tuple[int, int, str]] = []  # start and end of a box, and its content
    opened: list[tuple[int, int]] = []  # for each open brace: the start of its box or -1, and the start of its content
    for token in _BOX.finditer(text):
        if token[0].startswith("\\"):
            if token[1]:
                opened.append((token.start(), token.end()))
            elif token[2]:
                bare = _BARE.match(text, token.end())
                if bare is not None and _bare_box_ends(text, bare.end()):
                    found.append((token.start(), bare.end(), bare[0]))
        elif token[0] == "{":
            opened.append((-1, token.end()))
        elif opened:
            box, start = opened.pop()
            if box >= 0:
                found.append((box, token.end(), text[start : token.start()].strip()))
    found.sort(reverse=True)
    last = next((i for i, (_, _, content) in enumerate(found) if not _is_empty(content)), None)
    if last is None:
        return None
    start, _, answer = found[last]
    for box, end, content in found[last + 1 : last + 1 + _BOXES]:
        if not 0 <= start - end <= 80 or _BETWEEN_BOXES.fullmatch(text[end:start]) is None:
            break
        start, answer = box, f"{content}, {answer}"
    return answer


def _bare_box_ends(text: str, place: int) -> bool:
    """Return True if a ``\\boxed 7`` without braces ends here: before a delimiter or the end of a sentence or text."""
    return re.match(r"\s*(?:$|\\?[$)\]]|[.,;:!]?(?:\s|$))", text[place : place + 40]) is not None and not re.match(
        r"\s*[\d/+*^-]", text[place : place + 40]
    )


def _is_empty(answer: str) -> bool:
    if not answer or answer.isalnum():
        return not answer
    answer = clean(answer[:_LOOKAHEAD])
    return re.search(r"\w|\\emptyset|\\\{\s*\\\}|\{\s*\}", answer) is None


# -- phrases -------------------------------------------------------------------------------------------------------------

_ADJECTIVES = "final|correct|right|exact|numerical|numeric|overall|required|only|simplified"
_IS = (
    r"(?:is|are|was|will\s+be|would\s+be|should\s+be|must\s+be|becomes|equals|comes\s+(?:out\s+)?to|turns\s+out\s+to\s+be)\b"
)
_MARKER = re.compile(
    rf"""
    (?P<tag><\s*answer\s*>)
    | (?P<conditional>\b(?:if|whether|unless|suppose|assuming?|imagine)\s+(?:that\s+)?)?
      \b(?:(?:the|my|our|your|an?|this)\s+)?(?:(?:{_ADJECTIVES})\s+){{0,3}}
      \banswer(?:s)?\b["'*_`]{{0,4}}
      (?:\s+(?:to|for|of|in|that|which|we|I|here|then|therefore|thus|choice|option|value)\b[^\n.:=?!]{{0,80}}?)??
      ["'*_`]{{0,4}}\s*(?:\([^()\n]{{0,40}}\)\s*)?
      (?:(?P<colon>[:：=]|—|\bis\s*:)|(?P<is>{_IS}))
    | \bans(?:\.\s|\s?[:：=])
    | (?:最终|最後の|最后|正确)?(?:答案|答え|解答)[*_]{{0,4}}(?:是|为|為|等于|は|：|:)+
    | (?:따라서\s*)?(?:정답|답)[*_]{{0,4}}\s*(?:은|는|:|：)
    | \b(?:la\s+)?r[ée]ponse\s*(?:finale\s*)?(?:est|:|：)
    | \b(?:die\s+)?(?:antwort|lösung)\s*(?:ist|lautet|:)+
    | \b(?:la\s+)?respuesta\s*(?:final\s*)?(?:es|:)
    | \b(?:la\s+)?risposta\s*(?:finale\s*)?(?:è|:)
    | \b(?:a\s+)?resposta\s*(?:final\s*)?(?:é|:)
    | \bответ\s*(?:[:—-])
    | (?P<heading>^[ \t]*(?:\#{{1,6}}[ \t]*|\*\*|__)(?:final\s+)?answer(?:\*\*|__)?[ \t]*(?=\n))
    | (?P<hashes>^[ \t]*\#{{4}}(?!\#)[ \t]*(?=\S))
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_ANSWER = re.compile("answer", re.IGNORECASE)
_FILLER = re.compile(
    r"""(?:[\s:：=]|therefore\b|thus\b|hence\b|then\b|indeed\b|simply\b|just\b|exactly\b|clearly\b|now\b|also\b|actually\b|still\b
    |equal\s+to\b|given\s+by\b|as\s+follows\b|the\s+following\b|approximately\b|about\b|roughly\b|around\b|either\b
    |\\approx(?![A-Za-z])|≈|,(?=\s)|\b(?:the|a)\s+(?:number|value|integer|fraction|set|interval|pair|point)\s+(?=[\d$\\({\[-]))*""",
    re.VERBOSE | re.IGNORECASE,
)
_CLAUSE = set(
    "because since as so which where by for from with after given due using based thus therefore hence but though "
    "although while however not i'm we they he she it this these those there here let note please hope once until "
    "whereas yet making meaning giving who whose rather instead according only i.e e.g namely checking".split()
)
_NO_ANSWERS = set(
    "correct right wrong incorrect obvious clear above below follows following simple easy hard not unknown here this "
    "that it the a an we i you they there see let to as in of step first next now so then thus hence therefore also "
    "because since if when where which who please note hint solution answer explanation reasoning question problem "
    "given".split()
)
_ORDINALS = set("first second third fourth fifth sixth seventh eighth ninth tenth".split())
_SPECIAL = re.compile(
    r"(?:yes|no|true|false|none|never|always|infinity|undefined|impossible|unknown|valid|invalid|even|odd|positive|negative|"
    r"no (?:real )?solutions?|there (?:is|are) no (?:real )?solutions?|does not exist|dne|not possible|"
    r"not enough information|"
    r"infinitely many(?: solutions)?|empty set|neither|both|all of the above|none of the above|cannot be determined)",
    re.IGNORECASE,
)


def final_answer(text: str) -> str | None:
    r"""Return the complete final answer of a text, or None. The answer is never empty.

    Only the text after the last thinking block is read. A text with an open thinking block has no answer.
    """
    rest = strip_thinking(text)
    if rest is None:
        return None
    boxed = last_boxed(rest)
    if boxed is not None:
        return boxed
    markers = list(_MARKER.finditer(rest, _search_start(rest)))[-_MARKERS:]
    for place in reversed(range(len(markers))):
        marker = markers[place]
        if marker["conditional"]:
            continue
        end = markers[place + 1].start() if place + 1 < len(markers) else len(rest)
        after = rest[marker.end() : min(end, marker.end() + _LOOKAHEAD)]
        if marker["hashes"]:
            answer = _last_line(rest, marker.end())
            if answer is not None:
                return answer
            continue
        answer = _answer_after_phrase(after)
        if answer is not None:
            return answer
        clause = re.split(r"[.!?。]\s|\n\s*\S[^\n]*\n|\n", _FILLER.sub("", after, count=1).lstrip(), maxsplit=1)[0]
        if re.search(r"[\d\\$=]", clause):
            return None  # there is an answer, but its end is unclear
    return None


def _search_start(text: str) -> int:
    """Return the start of the search for phrases, which covers only the last `_WORDS` occurrences of "answer"."""
    words = deque((found.start() for found in _ANSWER.finditer(text)), maxlen=_WORDS)
    return max(0, words[0] - _PREFIX) if len(words) == _WORDS else 0


def _last_line(text: str, start: int) -> str | None:
    """Read an answer in the format of GSM8K: a last line that contains only a number or an expression."""
    line = text[start:].strip() if len(text) - start <= _LOOKAHEAD else ""
    if not line or "\n" in line or re.match(r"\d+[.)]\s", line):
        return None
    answer, whole = _first_clause(re.sub("[\x02\x03]", "", _mark_emphasis(line)))
    number = read_quantity(clean(answer)) if answer else None
    if not whole or answer is None or not _is_answer(answer):
        return None
    if number is not None and number.unit is not None and not number.unit.known and not answer.islower():
        return None  # a heading such as "2 Check"
    return _strip_counted_noun(answer)


def _answer_after_phrase(after: str) -> str | None:
    """Return the answer at the start of a text, or None if there is none or its end is unclear."""
    after = _mark_emphasis(after)
    filler = _FILLER.match(after)
    after = after[filler.end() :] if filler is not None else after
    emphasised = re.match(r"\x02([^\x02\x03\n]{1,80})\x03\s*(?:[.!,;]|\n|$)", after)
    answer, _ = _first_clause(after.replace("\x02", "").replace("\x03", ""))
    if answer is None:
        return None
    if _is_answer(answer):
        return _strip_counted_noun(answer)
    name = emphasised[1].strip(" .") if emphasised is not None else ""
    words = name.lower().split()
    return name if 0 < len(words) <= 6 and not set(words) & _NO_ANSWERS and not re.search(r"[\d=\\$]", name) else None


def _strip_counted_noun(answer: str) -> str:
    """Remove a counted noun after a number: "3 1/2 cups" becomes "3 1/2". Units of measurement stay."""
    number = read_quantity(clean(answer))
    if number is None or number.unit is None or not number.unit.counted:
        return answer
    for end in re.finditer(r"\s+|(?<=\d)(?=[^\x00-\u2fff])", answer):
        plain = read_quantity(clean(answer[: end.start()]))
        if plain is not None and plain.unit is None and plain.value == number.value:
            return answer[: end.start()]
    return answer


def _mark_emphasis(text: str) -> str:
    """Enclose strong emphasis, code and quotes in two control characters, and remove other emphasis."""
    text = re.sub(r"[\x02\x03]", "", text)
    text = re.sub(r"(?<![\w)\]])(\*\*|__)(?=\S)([^\n]{1,200}?)\1(?![\w(])", "\x02\\2\x03", text)
    text = re.sub(r"(`+)([^`\n]{1,200})\1", "\x02\\2\x03", text)
    text = re.sub(r"[\"“「『]([^\"“”「」『』\n]{1,200})[\"”」』]", "\x02\\1\x03", text)
    text = re.sub(r"(?<![\w)\]*])\*(?=[^\s*])([^*\n]{1,200})(?<!\s)\*(?![\w(*])", r"\1", text)
    text = re.sub(r"(?<!\w)_(?=[^\s_])([^_\n]{1,200})(?<!\s)_(?!\w)", r"\1", text)
    return re.sub(r"(?<![\w)\]])(?:\*\*|__)|(?:\*\*|__)(?=[\s.,;:!?)]|$)", "", text)


# -- where an answer ends ------------------------------------------------------------------------------------------------

_ELEMENT = re.compile(
    r"\s*(?:[-+−±√]?\s*[\d.¼½¾⅐-⅞€£¥₹(\[{]|[-+−±]?\s*\$|\\|[A-Za-zα-ω](?:_\w+)?\s*[=^<>]|[A-Za-z](?![A-Za-z]))"
)
_TOKEN = re.compile(
    r"""
    (?P<tex>\$\$|\$|\\\(|\\\[)
    | (?P<begin>\\begin\s*\{)
    | (?P<escape>\\.)
    | (?P<open>[(\[{])
    | (?P<close>[)\]}])
    | (?P<line>\n)
    | (?P<abbreviation>(?<=[\s\d])[ap]\.\s?m\.|\b(?:sq|cu|ft|in|oz|lb|lbs|hr|hrs|min|Rs|No|vs)\.(?=\s+[\da-z])|U\.S\.)
    | (?P<ellipsis>(?<=\d)\.{3}|…)
    | (?P<stop>[.．](?!\d)|。|[!?！？](?=\s|$|[)"'”*]))
    | (?P<comma>[,;，；、](?!\d{3}(?!\d)))
    | (?P<dash>—|–(?=\s)|\s-(?=\s+[A-Za-z]{2}))
    | (?P<tag><\s*/?\s*[|A-Za-z][^<>]{0,30}>|[#|](?=\s|$)|\s->)
    | (?P<word>[A-Za-z][A-Za-z'’]*)
    """,
    re.VERBOSE,
)
_CLOSERS = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}


def _first_clause(text: str) -> tuple[str | None, bool]:
    """Cut a text at the end of its first sentence or main clause.

    Returns:
        The first clause without TeX delimiters, or None if it is empty or a bracket or delimiter is open. Also True if the
        text ends there.
    """
    french = re.match(r"\s*\][^\n\[\]]{1,60},[^\n\[\]]{1,60}[\[\]]", text)
    pieces: list[str] = [french[0]] if french else []
    place = start = french.end() if french else 0
    end, depth = len(text), 0
    while (token := _TOKEN.search(text, place)) is not None:
        kind, place = token.lastgroup, token.end()
        if kind == "tex":
            span = _tex(text, token)
            if span is None:
                if token[0] == "$" and re.match(r"\s*[-+]?\d[\d,.]*(?!\s*[+*/^=\\_\d])", text[place:]):
                    continue  # a price
                return None, False
            pieces += [text[start : token.start()], text[place : span[0]]]
            start = place = span[1]
        elif kind == "begin":
            closing = text.find(r"\end", place)
            brace = text.find("}", closing)
            if closing < 0 or brace < 0:
                return None, False
            place = brace + 1
        elif kind == "open":
            if token[0] == "(" and depth == 0 and token.start() > 0 and _is_aside(text, token.start()):
                end = token.start()
                break
            depth += 1
        elif kind == "close":
            if depth:
                depth -= 1
            elif (label := re.match(r"\s*[A-Ja-j]\)(?=\s*[\w$(\\])", text)) is None or label.end() != place:  # "B) 12"
                end = token.start()
                break
        elif depth == 0 and _ends_clause(text, token, start == 0 and not text[: token.start()].strip()):
            end = token.start()
            break
        elif kind == "line" or (kind == "stop" and token[0] in "。！？"):
            return None, False
    if depth:
        return None, False
    pieces.append(text[start:end])
    answer = "".join(pieces).strip().strip(",;:，；、").strip()
    answer = answer if re.search(r"\.\.\.$|[ap]\.\s?m\.$", answer) else answer.rstrip(".").strip()
    answer = re.sub(r"(?:です|입니다|이다|でした)$", "", answer).strip()
    rest = text[end:].strip().strip(".。!")
    return (answer or None), not rest


def _tex(text: str, token: re.Match[str]) -> tuple[int, int] | None:
    """Return the end of the content of a TeX span and the end of the span, or None for a single ``$``."""
    closer = _CLOSERS[token[0]]
    end = text.find(closer, token.end())
    while end > 0 and text[end - 1] == "\\" and closer.startswith("$"):
        end = text.find(closer, end + 1)
    if end < 0 or (token[0] == "$" and "\n" in text[token.end() : end]):
        return None
    content = text[token.end() : end]
    if token[0] == "$" and re.match(r"\d", content) and re.search(r"(?<![\\A-Za-z{])[A-Za-z]{2,}\s", content):
        return None  # two prices, such as "$5 and $6"
    return end, end + len(closer)


def _is_aside(text: str, place: int) -> bool:
    """Return True if the bracket at ``place`` opens a remark, as in "12 (twelve)"."""
    if not text[place - 1].isspace() or not text[:place].strip():
        return False
    inside = text[place + 1 : place + 200].split(")")[0]
    return re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", inside) is not None and not inside.startswith("mod")


def _ends_clause(text: str, token: re.Match[str], first: bool) -> bool:
    """Return True if an answer ends before a token. The token is outside all brackets."""
    kind, after = token.lastgroup, text[token.end() :]
    if kind in ("line", "dash", "tag"):
        return True
    if kind == "stop":
        # "B. 12" and "A. Paris" begin with the label of a choice
        return not (
            token[0] == "." and re.fullmatch(r"\(?[A-J]", text[: token.start()].strip()) and re.match(r" ?\S", after)
        )
    if kind == "comma":
        if re.match(r"\s*(?:and|or)\b", after):
            return False
        return _ELEMENT.match(after) is None or re.match(r"\s*(?:I|a)\s", after) is not None
    if kind == "word":
        word = token[0].lower().replace("’", "'")
        if first or (token.start() > 0 and not text[token.start() - 1].isspace()):
            return False
        if word == "and":
            return (
                _ELEMENT.match(after) is None
                and re.match(r"\s*(?:an?|one|two|three)[\s-](?:half|third|quarter)", after) is None
            )
        if word in ("by", "for", "from"):
            return re.match(r"\s+(?:an?\b|the\b|this\b|that\b|our\b|\w+ing\b)", after) is not None
        return word in _CLAUSE
    return False


_UNFINISHED = re.compile(
    r"(?:[-+*/^=<>_&]|\\(?:times|cdot|frac|sqrt|pm|le|ge|ne|in|cup)\s*)$|^(?:[*/^=<>&_]|\\(?:times|cdot)\b)"
)


def _is_answer(text: str) -> bool:
    """Return True if a text is an answer as a whole."""
    plain = clean(text)
    if len(text) > 300 or _is_empty(text) or re.search(r"\\f?boxed|\$(?!\d)", text):
        return False
    if not (is_balanced(plain) or plain.startswith("]") or read_choice(plain) is not None):
        return False
    if _SPECIAL.fullmatch(plain) or read_clock(plain) is not None or read_choice(plain) is not None:
        return True
    if read_quantity(plain) is not None:
        return plain.lower() not in _ORDINALS
    if _UNFINISHED.search(plain):
        return False
    parts = [part for part in split_outside_brackets(plain, r",|;|\band\b|\bor\b") if part]
    if len(parts) > 1 and all(_is_answer(part) for part in parts):
        return True
    if re.fullmatch(r"\d{4}-\d\d?-\d\d?|\d{1,2}/\d{1,2}/\d{2,4}", plain):
        return True
    if not has_words(plain):
        return re.search(r"[\d\\^=+*/<>({\[|-]", plain) is not None
    if not re.search(r"[\d=\\]", plain):
        return _is_name(plain)
    before, unit = strip_unit(plain)
    if unit is not None:
        return _is_answer(before)
    sides = split_outside_brackets(plain, EQUALS)
    return len(sides) == 2 and is_label(sides[0]) and len(sides[0].split()) <= 4 and _is_answer(sides[1])


def _is_name(text: str) -> bool:
    """Return True for a name of a few words, such as "Paris" and "Isle of Man"."""
    words = text.split()
    capital = [re.fullmatch(r"[A-Z][\w.'-]*", word) is not None for word in words]
    small = [word in ("of", "the", "de", "von") for word in words]
    named = capital[0] and all(big or (i > 0 and little) for i, (big, little) in enumerate(zip(capital, small, strict=True)))
    return named and len(words) <= 4 and words[0].lower() not in _NO_ANSWERS
