"""Finding the answer in a completion: what is marked as the answer, or else the last expression."""

from __future__ import annotations

import re
from collections.abc import Iterator

from reward_fns.gsm8k import MARKER, last_boxed
from reward_fns.math_forms import MAX_CHARACTERS, Form, read
from reward_fns.math_text import UnreadableError

MAX_COMPLETION = 20_000
_SHORT = 100
_FEW_WORDS = 3

_BOX = re.compile(r"\\boxed\s*\{")
_BETWEEN_BOXES = re.compile(r"\\q?quad|\\text|\\[()\[\],;! ]|[\s${}]")
_JOINED = re.compile(r"(?P<join>[,;]?(?:and|or)?)(?:[A-Za-z]\w*=)?")
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_CUE = re.compile(
    r"(?P<final>final\s+)?answer\W{0,3}(?:\s+(?:to|for)\b[^.\n]{0,80}?)?\s*(?:\bis\b|:|=)[\s:*]*",
    re.IGNORECASE,
)
_SPAN = r"(?:\$\$[^$]+\$\$|\$[^$\n]+\$|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\])"
_SPANS = re.compile(rf"{_SPAN}(?:\s*(?:,|,?\s*(?:and|or))\s*{_SPAN})*(?:\s*(?:%|percent\b))?", re.DOTALL)
_SENTENCE = re.compile(r".*?(?=[.;?]+(?:\s|$)|,\s+(?!and\b|or\b)[a-z]{2}|$)")
_TERM = r"\(?[$€£¥₹]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)\)?"
_EXPRESSION = re.compile(
    r"(?<![\w(])[(\[{][^()\[\]{}$\n]{0,80},[^()\[\]{}$\n]{1,80}[)\]}]"
    rf"|(?<![\w.^])[-+−]?{_TERM}(?:\s?[-+*/^×·÷:]\s?-?{_TERM})*(?:\s?%|[ ]?[A-Za-z]+(?:[ ][A-Za-z]+)*)?"
)


def find_answer(completion: str, *, strict: bool) -> str | None:
    """The text of the answer that a completion gives, as it is written; None if there is none.

    Marked is what the last of these holds: `\\boxed{}`, `<answer>`, a line with `####`, "final answer is". Unless it is
    ``strict``, unmarked answers count too: what follows the last "answer is" or "answer:", or else the last expression.

    >>> find_answer("It is \\\\boxed{2}, no, \\\\boxed{3} or \\\\boxed{4}.", strict=True)
    '3, 4'
    >>> find_answer("It is 5.", strict=False), find_answer("It is 5.", strict=True)
    ('5', None)
    """
    completion = completion[-MAX_COMPLETION:]
    cues = list(_cues(completion))
    marks = [*_boxes(completion), *_hash_lines(completion)]
    marks += [(match.start(), match[1]) for match in _TAG.finditer(completion) if match[1].strip()]
    marks += [(start, text) for start, final, text in cues if final and (form := _form(text)) and not _has_words(form)]
    if marks:
        return max(marks)[1]
    if _BOX.search(completion):
        return None  # a box that does not end may have been cut inside a number
    for _, final, text in cues:
        if (final or not strict) and _is_answer(_form(text)):
            return text
        if not strict and (found := _last_expression(text)) is not None:
            return found
    return None if strict else _last_expression(completion)


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    """The last box; boxes joined by nothing, a comma, `and` or `or` are one answer."""
    contents: list[str] = []
    starts = [match.span() for match in _BOX.finditer(text)]
    end = len(text)
    for start, inside in reversed(starts):
        content = last_boxed(text[start:end])
        if content is None:
            break
        between = _JOINED.fullmatch(_BETWEEN_BOXES.sub("", text[inside + len(content) + 1 : end]))
        if contents and between is None:
            break
        if not contents or content != contents[-1] or (between and between["join"]):
            contents.append(content)
        end = start
    if "".join(contents).strip():
        yield starts[-1][0], ", ".join(reversed(contents))


def _hash_lines(text: str) -> Iterator[tuple[int, str]]:
    """The last line with `####` that is no heading: it holds a number, or ends the text and can be read."""
    end = len(text)
    while (start := text.rfind(MARKER, 0, end)) >= 0:
        line, _, rest = text[start + len(MARKER) : end].lstrip().partition("\n")
        form = _form(line)
        if form is not None and (form.value is not None or not rest.strip()):
            yield start, line
            return
        end = start


def _cues(text: str) -> Iterator[tuple[int, bool, str]]:
    """Where "answer is" or "answer:" stands, whether "final" stands before it, and the TeX or sentence after it."""
    for cue in reversed(list(_CUE.finditer(text))):
        rest = text[cue.end() : cue.end() + MAX_CHARACTERS].lstrip()
        match = _SPANS.match(rest) or _SENTENCE.match(rest)
        yield cue.start(), cue["final"] is not None, match.group() if match else ""


def _last_expression(text: str) -> str | None:
    """A short text itself, or its last TeX or number that can be read."""
    short = text.strip()
    if len(short) <= _SHORT and "\n" not in short and _is_answer(_form(short)):
        return short
    spans = [(match.end(), match.group()) for match in _SPANS.finditer(text)]
    plain = [(match.end(), match.group()) for match in _EXPRESSION.finditer(_SPANS.sub(_blank, text))]
    for _, found in sorted(spans + plain, reverse=True):
        if _form(found) is not None:
            return found
    return None


def _form(text: str) -> Form | None:
    """The text's form, or None if it cannot be read."""
    try:
        return read(text)
    except UnreadableError:
        return None


def _is_answer(form: Form | None) -> bool:
    """Whether it can be read, and not as a sentence."""
    if form is None or (_has_words(form) and form.parts):
        return False
    return len(form.words.split()) <= _FEW_WORDS and not re.search("[0-9]", form.words)


def _has_words(form: Form) -> bool:
    """Whether words stand in it."""
    return bool(form.words) or any(map(_has_words, form.parts))


def _blank(match: re.Match[str]) -> str:
    """As many spaces as the match is long."""
    return " " * len(match.group())
