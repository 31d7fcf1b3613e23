"""Calls between two processes of which one does not trust the other: plain values go over, everything else stays at home.

Nothing that is read is ever executed, so the worst that a message can do is to be a wrong value. Lists, sets and dicts that
a call has changed are changed in the caller too, and what was one object is one object there.
"""

from __future__ import annotations

import operator
import os

from grpo_hf.isolation.foreign import MUTABLE, Foreign
from grpo_hf.isolation.values import Reader, Writer, refill

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_CHANGES = {base for base, _ in MUTABLE.values()}


class LinkError(Exception):
    """The other side has ended, or writes what is no message."""


class Link:
    """One side's end: it asks, and answers while it waits.

    ``answer(verb, *arguments)`` is what it does when it is asked, and ``lends(value)`` says whether the other side may ask a
    value. One that trusts the other looks up what that names of the standard library; one that does not takes modules of the
    library alone, and its own.
    """

    def __init__(self, files: tuple[int, int], answer: Callable[..., Any], lends: Callable[[Any], bool], *, trusts: bool):
        self.files, self.answer, self.lends, self.trusts = files, answer, lends, trusts
        self.lent: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.foreigners: dict[int, Foreign] = {}
        self.exceptions: dict[int, type[BaseException]] = {}

    def foreign(self, number: int, base: str) -> Foreign:
        """What stands for an object of the other side, always the same."""
        if number not in self.foreigners:
            self.foreigners[number] = Foreign(self, number, base)
        return self.foreigners[number]

    async def coroutine(self, number: int) -> Any:
        """Stands for a coroutine of the other side."""
        return self.ask("wait", self.foreign(number, ""))

    def ask(self, verb: str, *arguments: Any, **options: Any) -> Any:
        """Have the other side do something; what it returns is returned, and what it raises is raised.

        Raises:
            LinkError: the other side has ended, or what it says cannot be read.
        """
        table = Writer(self, {}).write(self, b"?", (verb, arguments, options))
        while (message := _receive(self.files[0]))[:1] == b"?":
            self._serve(message)
        try:
            good, value, changed = Reader(self, message, table).whole()
        except Exception as error:
            raise LinkError(f"what the other side says cannot be read: {error!r}") from error
        for mine, content in changed:
            if any(mine is one for one in table if type(one) in _CHANGES):  # and not what the test keeps to itself
                refill(mine, content)
        if good is not True:
            raise value
        return value

    def serve(self) -> None:
        """Answer until the other side ends."""
        while True:
            try:
                message = _receive(self.files[0])
            except LinkError:
                return
            self._serve(message)

    def _serve(self, message: bytes) -> None:
        reader = Reader(self, message, [])
        try:
            verb, arguments, options = reader.whole()
            before = [(place, mine, _content(mine)) for place, mine in reader.mutable]
            good, value = True, self.answer(verb, *arguments, **options)
        except BaseException as error:
            good, value, before = False, error.with_traceback(None), []
        known = {id(mine): place for place, mine in reader.mutable}
        changed = [(mine, now) for _, mine, old in before if not _same(old, now := _content(mine))]
        try:
            Writer(self, known).write(self, b"=", (good, value, changed))
        except (TypeError, ValueError, AttributeError) as error:
            Writer(self, known).write(self, b"=", (False, TypeError(str(error)), []))

    def number(self, value: Any) -> int:
        """What the other side calls an object of this one by."""
        if not self.lends(value):
            raise TypeError(f"a value of type {type(value).__name__!r} cannot be handed over")
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.lent)
            self.lent.append(value)
        return self.numbers[id(value)]


def _content(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else bytes(value) if isinstance(value, bytearray) else list(value)


def _same(old: Any, new: Any) -> bool:
    """Whether two contents hold the very same objects."""
    if isinstance(old, bytes):
        return old == new
    if old and isinstance(old[0], tuple) and new and isinstance(new[0], tuple):
        old, new = ([part for pair in content for part in pair] for content in (old, new))
    return len(old) == len(new) and all(map(operator.is_, old, new))


def _receive(file: int) -> bytes:
    """Read a message.

    Raises:
        LinkError: there is none any more.
    """
    size = int.from_bytes(_exactly(file, 8), "little")
    return _exactly(file, size)


def _exactly(file: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.read(file, min(size, 1 << 20))
        if not part:
            raise LinkError("the other side has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
