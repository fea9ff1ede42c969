"""Parse numbers with units in the notations of people and programs, and compare them exactly."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

_LARGEST_POWER = 2000  # maximum number of digits of a computed power

_WHOLE = (
    r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?:[ ]\d{3})+(?!\d)|[1-9]\d{0,2}(?:'\d{3})+(?!\d)"
    r"|[1-9]\d{0,2}(?:_\d{3})+(?!\d)"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)"
)
_DECIMAL = rf"(?:[1-9]\d{{0,2}}(?:\.\d{{3}}){{2,}}(?:,\d+)?(?!\d)|[1-9]\d{{0,2}}(?:\.\d{{3}})+,\d+|{_WHOLE}(?:\.\d+)?|\.\d+)"
_FRACTION = rf"(?:\\frac\s*\{{\s*[-+]?{_DECIMAL}\s*\}}\s*\{{\s*{_DECIMAL}\s*\}}|{_DECIMAL}\s*/\s*{_DECIMAL})"
_CURRENCIES = {
    "$": "dollar", "US$": "dollar", "USD": "dollar", "dollar": "dollar", "€": "euro", "EUR": "euro", "£": "sterling",
    "GBP": "sterling", "¥": "yen", "JPY": "yen", "CNY": "yuan", "RMB": "yuan", "₹": "rupee", "INR": "rupee", "Rs.": "rupee",
    "Rs": "rupee", "₩": "won", "₽": "ruble", "CHF": "franc",
}  # fmt: skip
_MONEY = "|".join(re.escape(sign) for sign in sorted(_CURRENCIES, key=len, reverse=True) if sign != "dollar")
_QUANTITY = re.compile(
    rf"""\s*(?P<sign>[-+]?)\s*(?P<currency>{_MONEY})?\s*(?P<inner>[-+]?)\s*
    (?:(?P<mixed>\d+(?:\s+|(?=\\frac)))(?P<part>\\frac\s*\{{\s*\d+\s*\}}\s*\{{\s*\d+\s*\}}|\d+\s*/\s*\d+)
    |(?P<repeated>\d*\.(?P<head>\d*)(?:\\(?:overline|bar|dot)\s*\{{(?P<bar>\d+)\}}|\((?P<round>\d+)\)))
    |(?P<dots>\d*\.\d+)\.{{3}}
    |(?P<fraction>{_FRACTION})
    |(?P<base>{_DECIMAL})\s*\^\s*\{{\s*(?P<power>[-+]?\d+)\s*\}}
    |(?P<mantissa>{_DECIMAL})\s*(?:[eE]|(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{{)\s*(?P<exponent>[-+]?\d+)\s*\}}?
    |(?P<number>{_DECIMAL}))
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
_SPELLED = re.compile(
    rf"(?P<minus>minus |negative )?(?:(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<unit>{'|'.join(_ONES[1:10])}))?"
    rf"|(?P<one>{'|'.join(sorted(_ONES, key=len, reverse=True))}))(?![a-z])(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_SCALES: dict[str, int | Fraction] = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    **{name: Fraction(1, of) for of, names in {
        2: "half halves", 3: "third thirds", 4: "quarter quarters fourth fourths", 5: "fifth fifths", 6: "sixth sixths",
        7: "seventh sevenths", 8: "eighth eighths", 9: "ninth ninths", 10: "tenth tenths",
    }.items() for name in names.split()},
}  # fmt: skip
_SCALE = re.compile(
    rf"[\s-]*({'|'.join(sorted(_SCALES, key=len, reverse=True))})(?![A-Za-z])(?:\s+of\s+an?\b)?", re.IGNORECASE
)
_UNITS_TABLE = """
nm nanometer nanometre = 1/1000000000 m; mm millimeter millimetre = 1/1000 m; cm centimeter centimetre = 1/100 m
dm decimeter decimetre = 1/10 m; m meter metre = 1 m; km kilometer kilometre = 1000 m; in inch = 127/5000 m
ft foot feet = 381/1250 m; yd yard = 1143/1250 m; mi mile = 201168/125 m
mg milligram = 1/1000 g; g gram gramme gm = 1 g; kg kilogram kilo = 1000 g; t tonne = 1000000 g
lb lbs pound = 45359237/100000 g; oz ounce = 45359237/1600000 g; ton = 1 ton
ms millisecond = 1/1000 s; s sec second = 1 s; min minute = 60 s; h hr hour = 3600 s; day = 86400 s; week = 604800 s
month = 1 month; yr year = 12 month; decade = 120 month; century centuries = 1200 month
ml mL milliliter millilitre = 1/1000 l; cl centiliter = 1/100 l; l L liter litre = 1 l; gal gallon = 1 gal
quart qt = 1/4 gal; pint pt = 1/8 gal; ha hectare = 1 ha; acre = 1 acre
cent ¢ = 1/100 dollar; dollar USD buck $ = 1 dollar; euro EUR € = 1 euro; sterling GBP £ = 1 sterling
penny pence = 1/100 sterling; yen JPY ¥ = 1 yen; yuan CNY RMB = 1 yuan; rupee INR ₹ = 1 rupee
won = 1 won; ruble = 1 ruble; franc CHF = 1 franc
% percent pct percentage = 1 %; ° degree deg = 1 °; degc Celsius celsius = 1 degc; degf Fahrenheit fahrenheit = 1 degf
rad radian = 1 rad; K kelvin = 1 K; N newton = 1 N; J joule = 1 J; kJ kilojoule = 1000 J; W watt = 1 W; kW kilowatt = 1000 W
V volt = 1 V; A ampere amp = 1 A; Pa pascal = 1 Pa; kPa = 1000 Pa; Hz hertz = 1 Hz; kHz = 1000 Hz; MHz = 1000000 Hz
mol mole = 1 mol; unit = 1 unit; bit = 1 bit; byte B = 8 bit
"""
_UNITS: dict[str, tuple[Fraction, str]] = {}
for _names, _factor, _dimension in re.findall(r"([^=;]+)=\s*(\S+) ([^\s;]+)", _UNITS_TABLE.replace("\n", ";")):
    _UNITS |= dict.fromkeys(_names.split(), (Fraction(_factor), _dimension))
_MEASURES = {dimension for _, dimension in _UNITS.values()}
# Words after a number that are not a unit: they change the number or continue the sentence.
_NO_UNIT = set(
    "and or plus minus times over by divided squared cubed factorial to than not no nor is are was were be been has "
    "have had if then so because since as when where which that who whose but however wrong correct right incorrect "
    "less fewer greater at most least between approximately mod modulo choose sin cos tan log ln exp sqrt pi root x y "
    "z squares i we you it they this these those also while after before until unless am pm can could may might must "
    "shall should will would do does did go get see say need needs add make take use find".split()
)
_FILLERS = set("of the a an in total all altogether overall each left remaining more different distinct ways way".split())


PERCENT = frozenset([("%", 1)])


class Unit(NamedTuple):
    """Product of powers of units, such as km/h, or a counted noun, such as apples.

    Args:
        factor: Factor to the base units of the dimensions.
        dimensions: Base units and counted nouns with their exponents.
        known: True if all parts are in the table of units.
    """

    factor: Fraction
    dimensions: frozenset[tuple[str, int]]
    known: bool

    @property
    def counted(self) -> bool:
        """True for a counted noun without units of measurement: ``apples`` and ``cups``, but not ``miles per trip``."""
        return not self.known and not {name for name, _ in self.dimensions} & _MEASURES


class Quantity(NamedTuple):
    """Number with an optional unit.

    Args:
        value: Exact value.
        places: Digits after the decimal point, or None if the number is not a decimal.
        unit: Unit, or None.
    """

    value: Fraction
    places: int | None = None
    unit: Unit | None = None


def _read_fraction(text: str) -> Fraction | None:
    """Return the value of a number with separators, or of a fraction of two such numbers."""
    text = text.strip()
    if text.startswith(r"\frac"):
        top, bottom = re.findall(r"\{([^{}]*)\}", text)
        text = f"{top}/{bottom}"
    if "/" in text:
        above, below = (_read_fraction(part) for part in text.split("/", 1))
        return above / below if above is not None and below else None
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+- ")
    if text.count(".") > 1 or re.fullmatch(r"[\d.]+\.\d{3},\d+", text):
        text = text.replace(".", "").replace(",", ".")
    return sign * Fraction(re.sub(r"[,' _]", "", text))


def read_quantity(text: str) -> Quantity | None:
    """Read a normalized text as a number with an optional unit, or as a sum such as ``2 hours 30 minutes``."""
    single = _read_quantity(text)
    if single is not None:
        return single
    pieces = re.split(r"\s*,?\s+(?:and\s+)?(?=[\d$])", text)
    if not 1 < len(pieces) < 5:
        return None
    parts = [_read_quantity(piece) for piece in pieces]
    units = [part.unit for part in parts if part is not None and part.unit is not None]
    if len(units) < len(pieces) or len({unit.dimensions for unit in units}) > 1 or not all(unit.known for unit in units):
        return None
    if any(left.factor <= right.factor for left, right in pairwise(units)):
        return None
    total = sum((part.value * part.unit.factor for part in parts if part is not None and part.unit is not None), Fraction(0))
    return Quantity(total, None, units[0]._replace(factor=Fraction(1)))


def _read_quantity(text: str) -> Quantity | None:
    text = re.sub(r"^(\s*[-+]?\d+)\s+and\s+(?=\d+/\d|\\frac)", r"\1 ", text)
    found = _QUANTITY.fullmatch(text)
    places: int | None = None
    value: Fraction | None
    if found is None:
        spelled = _SPELLED.fullmatch(text)
        if spelled is None:
            return _read_ordinal(text)
        value = Fraction(_spelled_value(spelled))
        sign, rest, currency = (-1 if spelled["minus"] else 1), spelled["rest"], None
    else:
        value, places = _matched_value(found)
        sign = -1 if (found["sign"] == "-") != (found["inner"] == "-") else 1
        rest, currency = found["rest"], found["currency"]
    if value is None:
        return None
    value *= sign
    while (scale := _SCALE.match(rest)) is not None:
        if isinstance(_SCALES[scale[1].lower()], Fraction) and re.match(r"\s*[-+]?\d", text) and not rest[:1].isspace():
            return None  # "3third"
        value, places, rest = value * _SCALES[scale[1].lower()], None, rest[scale.end() :]
    more = re.match(r"\s+(?:and\s+)?(?=[A-Za-z])", rest)
    if found is None and more is not None and value >= 100:
        small = _read_quantity(rest[more.end() :])
        if small is not None and small.value < value and small.value.denominator == 1:
            return Quantity(value + sign * small.value, None, small.unit)
    half = re.match(r"\s+and\s+(?:an?|(one|two|three|four|five|six|seven|eight|nine))[\s-]+", rest)
    if half is not None and (scale := _SCALE.match(rest, half.end())) is not None:
        share = _SCALES[scale[1].lower()]
        if share >= 1:
            return None
        value, places = value + sign * (_ONES.index(half[1]) if half[1] else 1) * share, None
        rest = rest[scale.end() :]
    if re.match(r"(?:st|nd|rd|th)(?![A-Za-z])", rest):
        rest = rest[2:]
    if not rest.strip():
        unit = None
    else:
        unit = read_unit(rest.strip(), attached=not rest[0].isspace())
        if unit is None:
            return None
    if currency is not None:
        if unit is not None and unit != _money(currency):
            return None if unit.known else Quantity(value, places, _money(currency))
        unit = _money(currency)
    return Quantity(value, places, unit)


def _money(sign: str) -> Unit:
    return Unit(Fraction(1), frozenset([(_CURRENCIES[sign], 1)]), True)


def _read_ordinal(text: str) -> Quantity | None:
    """Read "third" as 3, but "a third" and "half" as fractions."""
    word = text.strip().lower()
    share = re.fullmatch(r"(?:an?\s+)?(half|quarter)|an?\s+(\w+)", word)
    if share is not None and isinstance(scale := _SCALES.get(share[1] or share[2]), Fraction):
        return Quantity(scale)
    return Quantity(Fraction(_ORDINALS.index(word) + 1)) if word in _ORDINALS else None


def _spelled_value(found: re.Match[str]) -> int:
    if found["tens"]:
        return 10 * (_TENS.index(found["tens"].lower()) + 2) + (_ONES.index(found["unit"].lower()) if found["unit"] else 0)
    return _ONES.index(found["one"].lower())


def _matched_value(found: re.Match[str]) -> tuple[Fraction | None, int | None]:
    if found["mixed"]:
        part = _read_fraction(found["part"])
        return (None if part is None else int(found["mixed"]) + part), None
    if found["repeated"]:
        cycle = found["bar"] or found["round"]
        return _repeating(found["repeated"].split(".")[0], found["head"], cycle), None
    if found["dots"]:
        whole, digits = found["dots"].split(".")
        for length in range(1, len(digits) // 2 + 1):
            head = digits[: len(digits) % length] if length > 1 else ""
            cycle = digits[-length:]
            if digits[len(head) :] == cycle * (len(digits[len(head) :]) // length) and len(digits) >= 3:
                return _repeating(whole, head, cycle), None
        return None, None
    if found["fraction"]:
        return _read_fraction(found["fraction"]), None
    if found["base"]:
        base, power = _read_fraction(found["base"]), int(found["power"])
        if base is None or (base == 0 and power < 0) or abs(power) * len(found["base"]) > _LARGEST_POWER:
            return None, None
        return base**power, None
    if found["mantissa"]:
        mantissa, exponent = _read_fraction(found["mantissa"]), int(found["exponent"])
        if mantissa is None or abs(exponent) > _LARGEST_POWER:
            return None, None
        return mantissa * Fraction(10) ** exponent, None
    digits = found["number"]
    return _read_fraction(digits), len(digits.rsplit(".", 1)[1]) if digits.count(".") == 1 and "," not in digits.rsplit(
        ".", 1
    )[1] else 0


def _repeating(whole: str, head: str, cycle: str) -> Fraction:
    scale = 10 ** len(head)
    return int(whole or "0") + Fraction(int(head or "0"), scale) + Fraction(int(cycle), scale * (10 ** len(cycle) - 1))


def read_unit(text: str, attached: bool = False) -> Unit | None:
    """Read the text after a number as a unit or a counted noun.

    Args:
        text: The text after the number.
        attached: True if no space separates them. A single letter is then a variable, as in ``2h``.
    """
    if re.fullmatch(
        r"(?![^万萬億亿千百十半分度倍或和と与]*[万萬億亿千百十半分度倍或和と与])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]{1,8}",
        text,
    ):
        return Unit(Fraction(1), frozenset([(text, 1)]), False)
    text = re.sub(r"(?i)(?:degrees?|°)\s*(?:C|Celsius)\b", "degc", text)
    text = re.sub(r"(?i)(?:degrees?|°)\s*(?:F|Fahrenheit)\b", "degf", text)
    text = re.sub(r"(?i)\bper\s+cent\b", "percent", text)
    text = re.sub(r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1", text)
    text = re.sub(r"(?i)\bsq(?:uare|\.)?\s+([A-Za-z]+)", r"\1^2", text)
    text = re.sub(r"(?i)\b(?:cubic|cu\.?)\s+([A-Za-z]+)", r"\1^3", text)
    text = re.sub(r"(?i)\b([A-Za-z]+)\s+squared\b", r"\1^2", text)
    text = re.sub(r"(?i)\b([A-Za-z]+)\s+cubed\b", r"\1^3", text)
    text = re.sub(r"\bmph\b", "mi/h", re.sub(r"\bkmh\b|\bkph\b", "km/h", text))
    text = re.sub(r"\s+per\s+(?:an?\s+)?", "/", re.sub(r"\\cdot|\\times|\*", " ", text))
    if re.search(r"[^A-Za-z0-9\s/^%°¢$€£¥₹.'()-]", text) or len(text) > 80:
        return None
    tokens = re.findall(r"/|[A-Za-z%°¢$€£¥₹'][A-Za-z'.-]*(?:\^?-?\d+)?|\S", text)
    factor, powers, known, sign = Fraction(1), dict[str, int](), True, 1
    for place, token in enumerate(tokens):
        if token in "()":
            if len(tokens) < 3:
                return None
            continue
        if token == "/":
            sign = -1
            continue
        match = re.fullmatch(r"([A-Za-z%°¢$€£¥₹'][A-Za-z'.-]*?)\.?(?:\^?(-?\d+))?", token)
        if match is None:
            return None
        word, power = match[1], int(match[2] or 1) * sign
        last = place == len(tokens) - 1
        if word.lower() in _FILLERS and not (word == "in" and last):
            if attached and place == 0:
                return None
            continue
        unit = _known_unit(word)
        if unit is None or (attached and place == 0 and len(word) == 1 and word.isalpha()):
            if word.lower() in _NO_UNIT or len(word) < 2 or match[2] or (attached and place == 0):
                return None
            unit, known = (Fraction(1), _singular(word.lower())), False
        factor *= unit[0] ** power
        powers[unit[1]] = powers.get(unit[1], 0) + power
    if not tokens or sum(len(name) > 0 for name in powers) > 6:
        return None
    powers = {name: power for name, power in powers.items() if power and name != "unit"}
    return Unit(factor, frozenset(powers.items()), known)


def _known_unit(word: str) -> tuple[Fraction, str] | None:
    for name in (word, word.lower()) if len(word) > 1 else (word,):
        for ending in ("", "s", "es"):
            stem = name.removesuffix(ending)
            if stem in _UNITS and (not ending or (stem != name and len(stem) > 2)):
                return _UNITS[stem]
    return None


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:ch|sh|x|ss|z)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def unit_ratio(reference: Unit | None, answer: Unit | None) -> Fraction | None:
    """Return the factor that converts the answer's number to the reference's unit, or None for incompatible units."""
    if reference is None or answer is None or not reference.dimensions or not answer.dimensions:
        return Fraction(1)
    if reference.dimensions == answer.dimensions:
        return answer.factor / reference.factor
    ours, theirs = ({name for name, _ in unit.dimensions} for unit in (reference, answer))
    if {"sterling", "g"} == ours | theirs:  # pounds
        return Fraction(1) if {reference.factor, answer.factor} == {Fraction(1), _UNITS["pound"][0]} else None
    if not reference.known and not answer.known and (ours <= theirs or theirs <= ours):
        return Fraction(1)
    return None


def equal_numbers(reference: Quantity, answer: Quantity, factor: Fraction = Fraction(1)) -> bool:
    """Return True if two values are equal, or one is the other rounded to six or more digits.

    Args:
        reference: The right number.
        answer: The number to compare.
        factor: Factor that converts the answer to the unit of the reference.
    """
    left, right = reference.value, answer.value * factor
    if left == right:
        return True
    for exact, places, rounded in ((right, reference.places, left), (left, answer.places, right)):
        other = answer.places if rounded is left else reference.places
        if places is not None and other is None and places >= 6 and abs(rounded) * 10**places >= 10**5 and factor == 1:
            denominator = exact.denominator
            while denominator % 2 == 0:
                denominator //= 2
            while denominator % 5 == 0:
                denominator //= 5
            return denominator > 1 and abs(exact - rounded) * 2 * 10**places <= 1
    return False


def equal_quantities(reference: Quantity, answer: Quantity) -> bool:
    """Return True if numbers and units are equal. If only one side has a unit, 50 % equals both 50 and 0.5."""
    shares = [side.unit is not None and side.unit.dimensions == PERCENT for side in (reference, answer)]
    if shares[0] != shares[1] and (reference.unit is None or answer.unit is None):
        hundredth = Fraction(1, 100)
        scaled = reference._replace(value=reference.value * (hundredth if shares[0] else 1), places=None)
        other = answer._replace(value=answer.value * (hundredth if shares[1] else 1), places=None)
        return equal_numbers(reference, answer) or equal_numbers(scaled, other)
    factor = unit_ratio(reference.unit, answer.unit)
    return factor is not None and equal_numbers(reference, answer, factor)
