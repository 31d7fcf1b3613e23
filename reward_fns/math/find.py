"""Finding the answer in a completion: what is marked as the answer, or else the last value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from grpo_hf.reward_fns.marks import BOX, MARKER, last_boxed, without_markup
from grpo_hf.reward_fns.math.forms import MAX_CHARACTERS, Form, has_words, read
from grpo_hf.reward_fns.math.text import UnreadableError

MAX_COMPLETION = 20_000
_SHORT = 100
_FEW_WORDS = 3
_ENDING = 200
_UNMARKED = 2000

_BETWEEN_BOXES = re.compile(r"\\q?quad|\\text|\\[()\[\],;! ]|[\s${}]")
_JOINED = re.compile(r"(?P<join>[,;]?(?:and|or)?)(?:[A-Za-z]\w*=)?")
_WORDS_AND = re.compile(r"[^.:?!\n]{0,50}\W(?P<join>and|or)\W*")
_PERCENT = r"\s*\$?\s*(?:\\?%|percent\b|pct\b)"
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_CUE_WORDS = ("answer", "ans", "réponse", "答案")
_CUE = re.compile(
    rf"(?:^[^\w\n]*(?P<title>final\s+)?answer[^\w\n]*\n"
    rf"|(?<!wrong )(?<!incorrect )(?P<final>final\s+)?\b(?:{'|'.join(_CUE_WORDS)})\W{{0,3}}"
    r"(?:\s+(?:to|for)\b[^.\n]{0,80}?)?\s*(?:\b(?:is|was|(?:would|should|must|will) be|equals)\b|[:=：]))"
    r"(?:\s+(?:as follows|given by|the following|below))?[\s:]*(?:(?<=\n)[-*•>]\s+)?(?:\\?[\"“])?",
    re.IGNORECASE | re.MULTILINE,
)
_TEX = r"(?:[^$\n\\]|\\.)"
_SPAN = (
    rf"(?:\$\$[^$]+\$\$|\$(?![^$\n\\]*[A-Za-z]{{2}}[,;]?\s+[A-Za-z]{{2}})(?:{_TEX}+|\s*\n{_TEX}+\n\s*)\$(?!\d)"
    r"|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\]|\\begin\{(?P<matrix>\w*matrix)\}(?:(?!\\begin).)*?\\end\{\w*matrix\})"
)
_SPANS = re.compile(rf"{_SPAN}(?:\s*(?:,|,?\s*(?:and|or))\s*{_SPAN.replace('P<matrix>', ':')})*(?:{_PERCENT})?", re.DOTALL)
_SENTENCE = re.compile(
    r".*?(?=(?:[.;?]|(?<!\d)!)+(?:\s|$)|[。，]|,\s+(?!and\b|or\b)[a-z]{2}|\s(?:because|since|when|where|if|which|while)\b|$)",
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?:[.;?]|(?<!\d)!)\s|[。\n]")
_CLAUSE_END = re.compile(r",\s+(?!and\b|or\b)(?=[a-z]{2})")
_CONDITION = re.compile(r"\s*(?:if|since|because|when|assuming|given|although|though)\b", re.IGNORECASE)
_NUMBER = r"(?:\d+ \d+/\d+|\d(?:[\d,]*\d)?(?:\.\d+)?|\.\d+|\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|\\sqrt\s*\{[^{}]*\})"
_TERM = rf"\(?(?:\\?[$€£¥₹]\s?)?{_NUMBER}\)?"
_EXPRESSION = re.compile(
    r"(?<![\w(])[(\[{][^()\[\]{}$\n]{0,80},[^()\[\]{}$\n]{1,80}[)\]}]"
    rf"|(?<![A-Za-z0-9_.^])(?:[-+−]|(?:minus|negative)\s)?{_TERM}(?:(?:\s?[-+*/^×·÷:]\s?-?|,? or ){_TERM})*"
    r"(?:\s?\\?[%$€£¥₹]|[ ]?[^\W\d_]+(?:\^?[²³23])?(?:[ ][^\W\d_]+)*)?"
)
_ASIDE = re.compile(
    r"\b(?:(?:to|for|from|by|in|ici|on|at|after|before|with|among|every|each|within|during|until)\s+(?:[a-z]+ing\s+)?"
    r"(?:(?:his|her|their|its|my|our|your|the|all|these|those|other)\s+){0,2}"
    r"|(?<!ha[sd] )(?<!have )(?<!need )(?<!needs )(?<!needed )(?<!able )(?<!going )(?<!wants )"
    r"to\s+(?!about|around|be|exactly|only)[a-z]+\s+(?:(?:his|her|their|its|the|another)\s+)?"
    r"|(?:at|when|where|if|for|with)\s+[A-Za-z]\s*=\s*)$",
    re.IGNORECASE,
)
_NO_IDEA = re.compile(
    r"\bI (?:do not|don['’]t|can ?not|can['’]t) (?:know|tell|say|solve|answer|determine)\b[^.?!\n]{0,40}[.?!]", re.IGNORECASE
)
_HEDGED = re.compile(r"\b(?:or|either|maybe|perhaps|possibly)\b.*\d|\band\b\W{0,5}\d", re.IGNORECASE | re.DOTALL)
_NOT_THIS = re.compile(
    r"(?:\b(?:not?|never|neither|nor|least|most|up to|such as|(?:more|less|\w+er) than|over|under|between)|n['’]t)\W*"
    r"(?:\s(?:be|a|the))?\W*$",
    re.IGNORECASE,
)


def find_answer(completion: str, *, strict: bool, words: bool = True) -> str | None:
    """The text of the answer that a completion gives, as it is written; None if there is none.

    Marked is what the last of these holds: `\\boxed{}`, `<answer>`, a line with `####`, "final answer is". Unless it is
    ``strict``, unmarked answers count too: what follows the last "answer is" or "answer:", or else the last value. Without
    ``words`` an unmarked answer must hold a value.

    >>> find_answer("It is \\\\boxed{2}, no, \\\\boxed{3} or \\\\boxed{4}.", strict=True)
    '3, 4'
    >>> find_answer("It is **5**.", strict=False), find_answer("It is 5.", strict=True)
    ('5', None)
    """
    text = without_markup(completion[-MAX_COMPLETION:])
    cues = list(_cues(text))
    marks = [*_boxes(text), *_hash_lines(text)]
    marks += [(match.start(), match[1]) for match in _TAG.finditer(text) if match[1].strip()]
    marks += [(start, said) for start, final, said in cues if final and (form := _form(said)) and not has_words(form)]
    if marks:
        return max(marks)[1]
    if BOX.search(text):
        return None  # a box that does not end may have been cut inside a number
    for _, final, said in cues:
        if (final or not strict) and _is_answer(_form(said), words=words):
            return said
        if not strict and _EXPRESSION.search(said):
            return value_in(said)
    return None if strict else _last_value(text, words=words)


def value_in(text: str) -> str | None:
    """The value that a sentence says: the one that it begins with, or else the last, but none that it denies or bounds.

    >>> value_in("Jane has 20 apples"), value_in("20 apples for 3 friends"), value_in("not 20"), value_in("at least 20")
    ('20 apples', '20 apples for', None, None)
    """
    values = list(_values(text))
    if not values:
        return None
    start, _, found = values[0] if values[0][0] == len(text) - len(text.lstrip()) else _result(text, values)
    return None if _NOT_THIS.search(text[:start]) or _HEDGED.search(text) else found


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    """The last box; boxes joined by nothing, a comma, `and` or `or` are one answer."""
    contents: list[str] = []
    boxes = list(BOX.finditer(text))
    end = len(text)
    for box in reversed(boxes):
        content = last_boxed(text[box.start() : end])
        if content is None:
            break
        after = box.end() + (0 if box["bare"] else len(content) + 1)
        between = _JOINED.fullmatch(_BETWEEN_BOXES.sub("", text[after:end])) or _WORDS_AND.fullmatch(text[after:end])
        if contents and between is None:
            break
        if not contents or content != contents[-1] or (between and between["join"]):
            percent = re.match(_PERCENT, text[after:])
            contents.append(content + (r"\%" if percent else ""))
        end = box.start()
    if "".join(contents).strip():
        yield boxes[-1].start(), ", ".join(reversed(contents))


def _hash_lines(text: str) -> Iterator[tuple[int, str]]:
    """The last line with `####` that is no heading: it holds a number, or ends the text and can be read."""
    end = len(text)
    while (start := text.rfind(MARKER, 0, end)) >= 0:
        line, _, rest = text[start + len(MARKER) : end].lstrip(" :\t\n").partition("\n")
        form = _form(line)
        if form is not None and (form.value is not None or _EXPRESSION.match(line) or not rest.strip()):
            yield start, line
            return
        end = start


def _cues(text: str) -> Iterator[tuple[int, bool, str]]:
    """Where "answer is" or "answer:" stands, whether "final" stands before it, and the TeX or sentence after it."""
    folded = text.casefold()
    for cue in reversed(list(_CUE.finditer(text) if any(word in folded for word in _CUE_WORDS) else ())):
        rest = text[cue.end() : cue.end() + MAX_CHARACTERS].lstrip()
        match = _SPANS.match(rest) or _SENTENCE.match(rest)
        yield cue.start(), bool(cue["final"] or cue["title"]), match.group() if match else ""


def _last_value(text: str, *, words: bool) -> str | None:
    """A short text itself, or the value that its last sentence with one comes to."""
    short = text.strip()
    if len(short) <= _SHORT and "\n" not in short and _is_answer(_form(short), words=words):
        return short
    if len(text) > _UNMARKED:
        text = text[-_UNMARKED:].partition(" ")[2]
    values = list(_values(text))
    return _result(text, values)[2] if values and not _NO_IDEA.search(text[-_ENDING:]) else None


def _result(text: str, values: list[tuple[int, int, str]]) -> tuple[int, int, str]:
    """The value that the last sentence with one comes to: after the last `=` of its last main clause, or else the last.

    Clauses such as "if ..." and what only says to, for, in or by how many are left out, unless there is nothing else.
    """
    sentence = max((end.end() for end in _SENTENCE_END.finditer(text, 0, values[-1][0])), default=0)
    starts = [sentence, *(end.end() for end in _CLAUSE_END.finditer(text, sentence, values[-1][0]))]
    clauses = [(start, [v for v in values if start <= v[0] < end]) for start, end in pairwise([*starts, len(text)])]
    said = [(start, found) for start, found in clauses if found]
    begin, found = ([clause for clause in said if not _CONDITION.match(text, clause[0])] or said)[-1]
    found = [value for value in found if not _ASIDE.search(text, begin, value[0]) and text[value[0]] == value[2][0]] or found
    equals = text.rfind("=", begin, found[-1][0])
    return next(value for value in found if value[1] > equals) if equals >= 0 else found[-1]


def _values(text: str) -> Iterator[tuple[int, int, str]]:
    """Where the TeX and the numbers of a text that can be read start and end, and what they are."""
    spans = [(*match.span(), match.group()) for match in _SPANS.finditer(text)]
    plain = [(*match.span(), match.group()) for match in _EXPRESSION.finditer(_SPANS.sub(_blank, text))]
    for start, end, found in sorted(spans + plain):
        if (start, end, found) in plain and found.count("(") != found.count(")"):
            found = found.strip("()")
        form = _form(found)
        if form is not None and ((start, end, found) in spans or not form.words):
            yield start, end, found


def _form(text: str) -> Form | None:
    """The text's form, or None if it cannot be read."""
    try:
        return read(text)
    except UnreadableError:
        return None


def _is_answer(form: Form | None, *, words: bool) -> bool:
    """Whether it can be read, not as a sentence, and as words only if they may be."""
    if form is None or (has_words(form) and (form.parts or not words)):
        return False
    return len(form.words.split()) <= _FEW_WORDS and not re.search("[0-9]", form.words)


def _blank(match: re.Match[str]) -> str:
    """As many spaces as the match is long."""
    return " " * len(match.group())
