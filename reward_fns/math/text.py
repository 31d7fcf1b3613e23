"""The text of a mathematical answer: its many spellings written one way, its top-level parts, and plain numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from grpo_hf.reward_fns.marks import without_markup

MAX_DEPTH = 12
MAX_DIGITS = 1000


class UnreadableError(ValueError):
    """The text is no answer that can be read; it says why."""


class ProseError(UnreadableError):
    """The text is a sentence."""


_FUNCTIONS = "arcsin|arccos|arctan|arccot|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|gcd|lcm"
_UP_TO_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve"
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_SMALL = {word: str(value) for value, word in enumerate(f"{_UP_TO_TWELVE} {_TEENS}".split())}
_TENS = {word: str(value) for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_IN_WORDS = re.compile(
    rf"(?P<lead>^|^\\text\s*\{{\s*)(?P<sign>(?:negative|minus) )?"
    rf"(?P<ten>{'|'.join(_TENS)})?[ -]?(?P<one>{'|'.join(_SMALL)})?"
    rf"(?<=\w)(?![\w-])(?!.*\b(?:{'|'.join([*_SMALL, *_TENS])}|hundred)\b)",
    re.IGNORECASE,
)
_GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|sigma|phi|omega|pi|infty"
_UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f~", " "),
        **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty "},
        **{"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "±": r"\pm ", "∈": r"\in ", "ℝ": r"\mathbb{R}"},
        **{"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "°": r"^\circ ", "⟨": r"\langle ", "⟩": r"\rangle "},
        **{power: f"^{{{digit}}}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
    }
)
_ARGUMENT = r"\s*(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\sqrt\s*(?:\{[^{}]*\}|\w)|\\[A-Za-z]+|[A-Za-z0-9])"
_FRACTION = re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}")
_Rewrite = str | Callable[[re.Match[str]], str]


def _braced(fraction: re.Match[str]) -> str:
    """A fraction, and those in it, with braces around both of its arguments."""
    above, below = (_FRACTION.sub(_braced, text[1:-1] if text[0] == "{" else text) for text in fraction.groups())
    return rf"\frac{{{above}}}{{{below}}}"


def _digits(words: re.Match[str]) -> str:
    """A number below 100 in words, in digits."""
    ten, one = _TENS.get((words["ten"] or "").casefold(), ""), _SMALL[(words["one"] or "zero").casefold()]
    number = f"{words['lead']}{'-' if words['sign'] else ''}{ten}{one}"
    return number if len(one) == 1 or not ten else words.group()


_SPELLINGS: tuple[tuple[str, _Rewrite], ...] = (
    # what only spaces or sizes
    (r"\\left\s*\.|\\right\s*\.", ""),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
    (r"(?<=\d)\s*(?:\{\s*,\s*\}|,?\s*\\[,!]|,\\ )\s*(?=\d{3}(?!\d))", ""),
    (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
    (r"\\underline\s*\{([^{}]*)\}", r"\1"),
    (r"\\hspace\*?\s*\{[^{}]*\}|\\\\\s*$|\(?\\[pb]?mod(?![A-Za-z])\s*(?:\{[^{}]*\}|\d+)\)?", " "),
    (r"(?<!\\)\\[,;:!> ]|\\q?quad(?![A-Za-z])", " "),
    # fonts and words
    (r"\\(?:mathrm|text|operatorname)\s*\{\s*([ei])\s*\}", r"\1"),
    (r"\\(?:mathbf|boldsymbol|bm|mathit|vec)\s*\{\s*([A-Za-z])\s*\}", r"\1"),
    (rf"\\(?:mathrm|operatorname\*?|text)\s*\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
    (r"\\(?:text[a-z]{2,}|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname\*?)\s*\{", r"\\text{"),
    (r"(?<![A-Za-z])(?:negative|minus)\s+(?=[\d.\\$(])", "-"),
    (r"(?<=\d)(?:st|nd|rd|th)(?![A-Za-z])", ""),
    *(
        (rf"(?<=\d)\s*(\\text\s*\{{)?\s*{word}(?![A-Za-z])", rf" \\times 10^{{{power}}} \1")
        for word, power in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    ),
    (r"\\text\s*\{\s*\}", ""),
    (r"^\\text\s*\{([^{}]*)\}$", r"\1"),
    (r"^(?:\\(?:approx|sim(?:eq)?)|(?:approximately|about|roughly|around|nearly|exactly))(?![A-Za-z])\s*", ""),
    (r"(?<=[A-Za-z])\s*\\equiv(?![A-Za-z])", " ="),
    # signs
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
    (r"\\ne(?![A-Za-z])|!=", r"\\neq "),
    (r"\\([lg])e(?:qslant|qq)?(?![A-Za-z])", r"\\\1eq "),
    (r"<=", r"\\leq "),
    (r">=", r"\\geq "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", r"\\text{degrees}"),
    (r"\\text\{degrees\}\s*(?:\\text\s*\{\s*)?C(?![A-Za-z])\s*\}?", r"\\text{celsius}"),
    (r"\\text\{degrees\}\s*(?:\\text\s*\{\s*)?F(?![A-Za-z])\s*\}?", r"\\text{fahrenheit}"),
    (r"\*\*", "^"),
    (r"(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty "),
    (rf"(?<![\\A-Za-z])({_GREEK}|{_FUNCTIONS})(?![A-Za-z])", r"\\\1 "),
    # short forms
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([A-Za-z0-9])", r"\\sqrt{\1}"),
    (_FRACTION.pattern, _braced),
    (r"(?<![\w.}^)/])(\d+)/(\d+)\s+(?=[A-Za-z(\\])", r"\\frac{\1}{\2} "),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"^\]([^\[\]]*)\[$", r"(\1)"),
    (r"^\]([^\[\]]*\])$", r"(\1"),
    (r"^(\[[^\[\]]*)\[$", r"\1)"),
    (r"^\{([^{}]*,[^{}]*|\s*[A-Za-z]\s*[|:][^{}]*)\}$", r"\\{\1\\}"),
    (r"^\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid|\||:)\s*(.*)\\\}$", r"\2"),
)
_REWRITES = [(re.compile(pattern), new) for pattern, new in _SPELLINGS]
_DELIMITERS = re.compile(
    r"\$\$?(?P<dollars>(?:[^$\\]|\\.)+)\$\$?|\\\((?P<round>.+)\\\)|\\\[(?P<square>.+)\\\]|[\"'“‘](?P<quoted>.+)[\"'”’]",
    re.DOTALL,
)
_INLINE = re.compile(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$", re.DOTALL)
_TRAILING = re.compile(r"(?:\\[,;:! ]|\s)+$")
_JOINER = re.compile(r"(,?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*)")
_VALUE = re.compile(r"\d|\\(?!text)[A-Za-z]|^\W*[A-Za-z]\W*$|=")
_ESCAPED_TWICE = re.compile(r"\\\\(?=[A-Za-z,!({\[])")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
OPENING = {"(": "(", "[": "[", r"\{": "{", r"\langle": "<", r"\lbrack": "[", "{": ""}
CLOSING = {")": ")", "]": "]", r"\}": "}", r"\rangle": ">", r"\rbrack": "]", "}": ""}
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?:(?P<whole>\d+)\s*)?\\frac\s*\{{\s*(?P<above>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<below>{_DECIMAL})\s*\}}"
    rf"|(?:(?P<whole_>\d+)\s+)?(?P<above_>{_DECIMAL})\s*/\s*(?P<below_>{_DECIMAL})"
    rf"|(?:(?P<mantissa>{_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d+)\s*\}}|(?P<power_>-?\d+))"
    rf"|(?P<decimal>{_DECIMAL})(?:\\(?:overline|bar|dot)\s*\{{(?P<repeat>\d+)\}}|[eE](?P<power__>[-+]?\d+))?)"
)


def plain(text: str) -> str:
    """Write an answer's spellings one way: no delimiters, spacing commands, Unicode signs or short forms.

    >>> plain("$\\\\dfrac12\\\\,\\\\mathrm{m}$."), plain("**x**2 ≤ 4**")
    ('\\\\frac{1}{2} \\\\text{m}', 'x^2 \\\\leq  4')

    Raises:
        UnreadableError: it leaves something out with dots, or is nested deeper than MAX_DEPTH.
    """
    if re.search(r"\\[lcv]?dots|\.\.\.|…", text):
        raise UnreadableError("dots leave something out")
    text = _INLINE.sub(r"\1", strip(_TRAILING.sub("", without_markup(text)).translate(_UNICODE)))
    text = _IN_WORDS.sub(_digits, text)
    if r"\begin" not in text:
        text = _ESCAPED_TWICE.sub(r"\\", text)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _listed(text)
    if any(depth > MAX_DEPTH for _, _, depth in _tokens(text)):
        raise UnreadableError(f"nested deeper than {MAX_DEPTH}")
    return strip(text)


def _listed(text: str) -> str:
    """Commas instead of `and` and `or`, but only between values, or where nothing is one: not in "5 cats and dogs"."""
    pieces = _JOINER.split(text)
    values = [_VALUE.search(piece) is not None for piece in pieces[::2]]
    joins = [(value and any(values[: place + 1])) or not any(values) for place, value in enumerate(values[1:])]
    return "".join(
        [
            pieces[0],
            *((", " if join else gap) + piece for gap, piece, join in zip(pieces[1::2], pieces[2::2], joins, strict=True)),
        ]
    )


def strip(text: str) -> str:
    """Without white space, final punctuation and quotes or math delimiters around it."""
    stripped = text.strip().rstrip(".,;:? \n").lstrip(":,; \n")
    if match := _DELIMITERS.fullmatch(stripped):
        stripped = next(filter(None, match.groups()))
    return stripped if stripped == text else strip(stripped)


def split(text: str, separators: str) -> list[str]:
    """Cut a text at the separators that stand in no brackets.

    >>> split("(1, 2), 3; 4", ",;")
    ['(1, 2)', ' 3', ' 4']
    """
    cuts = [start for token, start, depth in _tokens(text) if depth == 0 and token in separators]
    starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def unwrap(text: str) -> tuple[str, str]:
    """The brackets around a whole text, and what is in them; `""` and the text if there are none.

    >>> unwrap("(1, 2]"), unwrap("(1)(2)")
    (('(]', '1, 2'), ('', '(1)(2)'))
    """
    tokens = list(_tokens(text))
    first, last = tokens[0][0], tokens[-1][0]
    pair = OPENING.get(first, "") + CLOSING.get(last, "")
    closed = [start for token, start, depth in tokens if depth == 0 and token in CLOSING]
    if len(pair) < 2 or closed != [tokens[-1][1]]:
        return "", text
    return pair, text[len(first) : len(text) - len(last)]


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is one number, exactly; None if it is anything else.

    >>> [str(parse_number(text)) for text in ("-2\\\\frac{1}{2}", "0.1\\\\overline{6}", "6.02 \\\\times 10^{-3}", "2^3")]
    ['-5/2', '1/6', '301/50000', 'None']

    Raises:
        UnreadableError: more than MAX_DIGITS digits, or a division by zero.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    groups = {key.strip("_"): value for key, value in match.groupdict().items() if value is not None}
    power = int(groups.get("power", "0")[:MAX_DIGITS])
    if len(text) > MAX_DIGITS or abs(power) > MAX_DIGITS:
        raise UnreadableError(f"a number of more than {MAX_DIGITS} digits")
    if "below" in groups:
        if not Fraction(groups["below"]):
            raise UnreadableError("a division by zero")
        value = int(groups.get("whole", 0)) + Fraction(groups["above"]) / Fraction(groups["below"])
    else:
        decimal, repeat = groups.get("decimal") or groups.get("mantissa") or "1", groups.get("repeat", "")
        value = Fraction(decimal) * Fraction(10) ** power
        if repeat:
            value += Fraction(int(repeat), (10 ** len(repeat) - 1) * 10 ** len(decimal.partition(".")[2]))
    return -value if match["sign"] == "-" else value


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Each command or character, where it starts, and how many brackets are open after it."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        depth += (token in OPENING) - (token in CLOSING)
        yield token, match.start(), depth
