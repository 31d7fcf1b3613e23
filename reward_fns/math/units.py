"""The units of an answer: a table of names, and what a phrase such as `square feet per hour` means."""

from __future__ import annotations

import re
from fractions import Fraction

Unit = tuple[str, Fraction]
"""A dimension and the size in its base unit; a dimension that begins with `?` is a word that the table lacks."""

NONE: Unit = ("", Fraction(1))
PERCENT: Unit = ("number", Fraction(1, 100))

_SIZES: dict[str, dict[str, str]] = {
    "length": {
        "1/1000": "mm millimeter millimetre",
        "1/100": "cm centimeter centimetre",
        "1": "m meter metre",
        "1000": "km kilometer kilometre",
        "0.0254": "in inch inche",
        "0.3048": "ft foot feet",
        "0.9144": "yd yard",
        "1609.344": "mi mile",
    },
    "mass": {
        "1/1000": "mg milligram",
        "1": "g gram",
        "1000": "kg kilogram",
        "28.349523125": "oz ounce",
        "453.59237": "lb pound",
    },
    "time": {
        "1": "s sec second",
        "60": "min minute",
        "3600": "h hr hour",
        "86400": "day",
        "604800": "week",
    },
    "calendar": {"1": "month", "12": "year yr"},
    "morning": {"1": "am a.m."},
    "afternoon": {"1": "pm p.m."},
    "volume": {"1/1000": "ml mL milliliter millilitre", "1": "l L liter litre"},
    "dollar": {"1/100": "cent ¢", "1": "dollar $ usd buck"},
    "euro": {"1": "euro € eur"},
    "sterling": {"1/100": "pence", "1": "£ gbp"},
    "yen": {"1": "¥ yen"},
    "rupee": {"1": "₹ rupee rs"},
    "angle": {"1": "degree deg"},
    "radian": {"1": "radian rad"},
    "celsius": {"1": "celsius"},
    "fahrenheit": {"1": "fahrenheit"},
    "number": {"1/100": "% percent percentage pct"},
}
_UNITS: dict[str, Unit] = {
    name: (dimension, Fraction(size))
    for dimension, sizes in _SIZES.items()
    for size, names in sizes.items()
    for name in names.split()
}
_SHORT_FOR = {"mph": "mile/hour", "kmh": "km/h", "kph": "km/h", "sqft": "ft^2", "sqm": "m^2", "cc": "cm^3"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_AFTER_INCHES = {"of", "long", "wide", "tall", "high", "deep", "thick", "by", "x", "per"}
_PIECE = re.compile(r"(?P<name>[^\s^]+?)(?:\s*\^\s*\{?(?P<power>[1-9])\}?)?")


def parse_unit(phrase: str) -> Unit:
    """What a phrase says the unit is.

    A known unit at its beginning is enough; without one the words are kept, in the singular.

    >>> parse_unit("km"), parse_unit("feet of rope"), parse_unit("red apples")
    (('length', Fraction(1000, 1)), ('length', Fraction(381, 1250)), ('?red apple', Fraction(1, 1)))
    >>> parse_unit("square centimeters") == parse_unit("cm^2"), parse_unit("mph") == parse_unit("miles per hour")
    (True, True)
    """
    phrase = " ".join(phrase.replace("\\", " ").split()).strip(" .,")
    if not phrase:
        return NONE
    words = phrase.split()
    for end in range(len(words), 0, -1):
        if words[0] == "in" and words[end : end + 1] and words[end] not in _AFTER_INCHES:
            continue  # a preposition
        if (unit := _known(" ".join(words[:end]))) is not None:
            return unit
    return "?" + " ".join(map(_singular, phrase.casefold().split())), Fraction(1)


def is_known(word: str) -> bool:
    """Whether the table has the word, in the singular or plural.

    >>> is_known("inches"), is_known("x")
    (True, False)
    """
    return _known(word) is not None


def _known(phrase: str) -> Unit | None:
    """A product of known units over known units; None if one is unknown."""
    phrase = _SHORT_FOR.get(phrase.casefold(), phrase)
    dimensions, size = [], Fraction(1)
    for place, side in enumerate(re.split(r"\s*/\s*|\s+per\s+", phrase)):
        piece = _piece(side)
        if piece is None:
            return None
        dimensions.append(piece[0])
        size = size / piece[1] if place else piece[1]
    return "/".join(dimensions), size


def _piece(text: str) -> Unit | None:
    """One unit with its power: `m`, `square m`, `m^2`, `meters squared`."""
    words = text.split()
    powers = [_POWERS[word.casefold()] for word in words if word.casefold() in _POWERS]
    match = _PIECE.fullmatch(" ".join(word for word in words if word.casefold() not in _POWERS))
    if match is None or len(powers) > 1:
        return None
    name = match["name"]
    unit = next((_UNITS[key] for key in (name, name.casefold(), _singular(name.casefold())) if key in _UNITS), None)
    power = powers[0] if powers else int(match["power"] or 1)
    return unit if unit is None or power == 1 else (f"{unit[0]}^{power}", unit[1] ** power)


def _singular(word: str) -> str:
    """Without the s of a plural."""
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
