"""Python values as tables of lines, and back.

Numbers, text and bytes, lists, tuples, sets and dicts of these, and a few values of the standard library are copied, by
their exact types; what has another type stays where it is, and the other side gets a `Foreign` that asks it.
"""

from __future__ import annotations

import builtins
import os
import sys
from types import CoroutineType, ModuleType

from grpo_hf.isolation.foreign import HELD, MUTABLE, Foreign, held_class

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_CONSTANTS = {repr(value): value for value in (None, True, False, Ellipsis, NotImplemented)}
_TYPES = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
_NAMES = {value: name for name, value in _TYPES.items()}
_IMMUTABLE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "int": (int, int.__int__),
    "float": (float, float.__float__),
    "complex": (complex, complex.__pos__),
    "str": (str, str.__str__),
    "bytes": (bytes, lambda value: bytes.__getitem__(value, slice(None))),
    "tuple": (tuple, lambda value: tuple.__getitem__(value, slice(None))),
    "frozenset": (frozenset, lambda value: frozenset(frozenset.__iter__(value))),
}
# Values of the standard library: what each is made of. The class is called with that on the other side.
_STANDARD: dict[tuple[str, str], Callable[[Any], tuple[Any, ...]]] = {
    ("collections", "deque"): lambda value: (list(value), value.maxlen),
    ("collections", "Counter"): lambda value: (dict(value),),
    ("collections", "OrderedDict"): lambda value: (list(value.items()),),
    ("collections", "defaultdict"): lambda value: (value.default_factory, dict(value)),
    ("fractions", "Fraction"): lambda value: (value.numerator, value.denominator),
    ("decimal", "Decimal"): lambda value: (str(value),),
    ("datetime", "date"): lambda value: (value.year, value.month, value.day),
    ("datetime", "timedelta"): lambda value: (value.days, value.seconds, value.microseconds),
    ("datetime", "datetime"): lambda value: (*value.timetuple()[:6], value.microsecond, value.tzinfo),
    ("datetime", "timezone"): lambda value: (value.utcoffset(None),),
    ("builtins", "range"): lambda value: (value.start, value.stop, value.step),
    ("builtins", "slice"): lambda value: (value.start, value.stop, value.step),
}
_FLAT: dict[type, tuple[bytes, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    int: (b"i", lambda v: b"%d" % v if -(1 << 63) < v < 1 << 63 else hex(v).encode(), lambda text: int(text, 0)),
    float: (b"d", lambda v: repr(v).encode(), float),
    complex: (b"z", lambda v: repr(v).encode(), lambda text: complex(text.decode())),
    str: (b"s", lambda v: v.encode("unicode_escape"), lambda text: text.decode("unicode_escape")),
}
_TAGS: dict[type, bytes] = {list: b"l", tuple: b"u", set: b"S", frozenset: b"F"}
_READ_FLAT = {tag: read for tag, _, read in _FLAT.values()}
_LIBRARY = sys.stdlib_module_names


class Writer:
    """Writes a table of values; ``known`` are places in the message that is answered, by identity."""

    def __init__(self, link: Any, known: dict[int, int]):
        self.link, self.known = link, known
        self.table: list[Any] = []
        self.places: dict[int, int] = {}

    def write(self, link: Any, tag: bytes, root: Any) -> list[Any]:
        """Send a message; the values by their places in it."""
        lines = [tag]
        self.place(root)
        for value in self.table:  # which grows
            lines.append(self.line(value))
        data = b"\n".join(lines)
        data = len(data).to_bytes(8, "little") + data
        while data:
            data = data[os.write(link.files[1], data) :]
        return self.table

    def place(self, value: Any) -> int:
        """Where in the table a value is."""
        if id(value) not in self.places:
            self.places[id(value)] = len(self.table)
            self.table.append(value)
        return self.places[id(value)]

    def line(self, value: Any) -> bytes:
        """One value; what it holds goes to the end of the table."""
        kind = type(value)
        if id(value) in self.known:
            return b"^%d" % self.known[id(value)]
        if kind in _FLAT:
            tag, write, _ = _FLAT[kind]
            return tag + write(value)
        if value is None or kind is bool or value is Ellipsis or value is NotImplemented:
            return b"k" + repr(value).encode()
        if kind in (bytes, bytearray):
            return (b"b" if kind is bytes else b"y") + value.hex().encode()
        if kind in (list, tuple, set, frozenset):
            return _TAGS[kind] + self.items(value)
        if kind is dict:
            return b"m" + self.references(item for pair in value.items() for item in pair)
        if kind is type and value in _NAMES:
            return b"t" + _NAMES[value].encode()
        if (kind.__module__, kind.__name__) in _STANDARD and kind is _standard(kind.__module__, kind.__name__):
            parts = _STANDARD[kind.__module__, kind.__name__](value)
            return f"v{kind.__module__} {kind.__name__} ".encode() + self.references([parts])
        return self.other(value, kind)

    def other(self, value: Any, kind: type) -> bytes:
        """A value that stays here, and what the other side is to know of it."""
        if kind is Foreign or kind in HELD.values():
            return b"o%d" % value._number_at(self.link)
        if isinstance(value, type) and value in self.link.exceptions.values():
            return b"o%d" % next(number for number, made in self.link.exceptions.items() if made is value)
        if isinstance(value, BaseException):
            own = vars(value) if all(isinstance(name, str) for name in vars(value)) else {}
            return b"E" + self.references([kind, tuple(value.args), dict(own), str(value)])
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [base for base in value.__bases__ if issubclass(base, BaseException)]
            return b"X%d %s " % (self.link.number(value), value.__name__.encode()) + self.references(bases)
        if kind is ModuleType:
            return b"M%d " % self.link.number(value) + value.__name__.encode()
        for name, (base, plain) in _IMMUTABLE.items():
            if issubclass(kind, base):
                return b"w%d %s " % (self.link.number(value), name.encode()) + self.references([plain(value)])
        if not self.link.trusts and (place := _place(value)):
            return f"g{place[0]} {place[1]}".encode()
        if kind is CoroutineType:
            return b"c%d" % self.link.number(value)
        held = next((name for name, (base, _) in MUTABLE.items() if issubclass(kind, base)), "")
        return b"h%d %s" % (self.link.number(value), held.encode())

    def items(self, values: Any) -> bytes:
        """The items of a list, tuple or set; all in one where they are numbers, or texts, alone."""
        kinds = set(map(type, values))
        if len(kinds) == 1 and (kind := kinds.pop()) in _FLAT and (tag := _FLAT[kind][0]):
            return tag + b"\t".join(map(_FLAT[kind][1], values))
        return b"*" + self.references(values)

    def references(self, values: Any) -> bytes:
        """Places, after which the values are found."""
        return b" ".join(b"%d" % self.place(value) for value in values)


class Reader:
    """Reads a table of values; ``sent`` is what the message that it answers held."""

    def __init__(self, link: Any, message: bytes, sent: list[Any]):
        self.link, self.sent = link, sent
        self.lines = message.split(b"\n")[1:]
        self.found: dict[int, Any] = {}
        self.mutable: list[tuple[int, Any]] = []
        self.unfilled: list[tuple[Any, bytes]] = []

    def whole(self, place: int = 0) -> Any:
        """The value at a place, the first as a rule, with all that it holds."""
        waiting, self.unfilled = self.unfilled, []
        found = self.value(place)
        while self.unfilled:
            mine, line = self.unfilled.pop()
            refill(mine, self.pairs(line) if isinstance(mine, dict) else self.items(line))
        self.unfilled = waiting
        return found

    def value(self, place: int) -> Any:
        """The value at a place."""
        if place not in self.found:
            self.found[place] = self.read(self.lines[place], place)
        return self.found[place]

    def read(self, line: bytes, place: int) -> Any:
        """Read one value; a list, set or dict is filled later, as it may hold itself."""
        tag, rest = line[:1], line[1:]
        if tag in _READ_FLAT:
            return _READ_FLAT[tag](rest)
        if tag in b"lSmy":
            made: Any = {b"l": list, b"S": set, b"m": dict, b"y": bytearray}[tag]()
            self.mutable.append((place, made))
            if tag == b"y":
                made += bytes.fromhex(rest.decode())
            else:
                self.unfilled.append((made, rest))
            return made
        if tag in b"uF":
            return (tuple if tag == b"u" else frozenset)(self.items(rest))
        if tag == b"^":
            return self.sent[int(rest)]
        if tag == b"o":
            return self.link.lent[int(rest)]
        if tag in b"kbt":
            text = rest.decode()
            return bytes.fromhex(text) if tag == b"b" else (_CONSTANTS if tag == b"k" else _TYPES)[text]
        return self.other(tag, rest)

    def other(self, tag: bytes, rest: bytes) -> Any:
        """Read what is made of other values, or stays with the other side."""
        words = rest.split(b" ")
        if tag == b"v":
            module, name = words[0].decode(), words[1].decode()
            assert (module, name) in _STANDARD
            return _standard(module, name)(*self.whole(int(words[2])))
        if tag == b"E":
            return self.exception(*map(int, words))
        if tag == b"X":
            return self.exception_class(
                int(words[0]), words[1].decode(), [self.value(int(word)) for word in words[2:] if word]
            )
        if tag == b"M":
            mine = None if self.link.trusts else _library_module(words[1].decode())
            return self.link.foreign(int(words[0]), "") if mine is None else mine
        if tag == b"g":
            assert self.link.trusts
            return _named(words[0].decode(), words[1].decode())
        if tag == b"w":
            base = _IMMUTABLE[words[1].decode()][0]
            return held_class(base)(self.value(int(words[2])), self.link, int(words[0]))
        assert tag in b"hc"
        if tag == b"c":
            return self.link.coroutine(int(rest))
        assert words[1].decode() in {"", *MUTABLE}
        return self.link.foreign(int(words[0]), words[1].decode())

    def items(self, line: bytes) -> list[Any]:
        """What a list, tuple or set holds."""
        tag, rest = line[:1], line[1:]
        if tag in _READ_FLAT:
            return list(map(_READ_FLAT[tag], rest.split(b"\t")))
        return [self.value(int(word)) for word in rest.split()]

    def pairs(self, line: bytes) -> list[tuple[Any, Any]]:
        """What a dict holds."""
        values = [self.value(int(word)) for word in line.split()]
        return list(zip(values[::2], values[1::2], strict=True))

    def exception(self, kind: int, args: int, own: int, text: int) -> BaseException:
        """An exception of the other side, or one of Python's own."""
        found = self.value(kind)
        assert issubclass(found, BaseException)
        error = found.__new__(found, *self.value(args))
        error.args = self.value(args)
        if found in self.link.exceptions.values():
            vars(error).update(self.whole(own), _text=self.value(text))
        return error

    def exception_class(self, number: int, name: str, bases: list[Any]) -> type[BaseException]:
        """A class that stands for one of the other side's, so that `except` can name it."""
        if number not in self.link.exceptions:
            assert all(issubclass(base, BaseException) for base in bases)
            body = {"__str__": lambda error: getattr(error, "_text", "") or ", ".join(map(str, error.args))}
            self.link.exceptions[number] = type(name, tuple(bases) or (Exception,), body)
        return self.link.exceptions[number]


def refill(mine: Any, content: Any) -> None:
    """Put other items into a list, set, dict or bytearray."""
    mine.clear()
    (mine.extend if isinstance(mine, list | bytearray) else mine.update)(content)


def _standard(module: str, name: str) -> Any:
    """A class of the standard library."""
    return getattr(__import__(module), name)


def _library_module(name: str) -> Any:
    """A module of the standard library; None for any other, and for those that make objects which equal everything."""
    top = name.split(".")[0]
    return __import__(name, fromlist=[""]) if top in _LIBRARY and top != "unittest" else None


def _named(module: str, name: str) -> Any:
    value = __import__(module, fromlist=[""])
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _place(value: Any) -> tuple[str, str] | None:
    """Module and name of a function or class of the standard library; None for anything else."""
    module = getattr(getattr(value, "__objclass__", value), "__module__", None)
    name = getattr(value, "__qualname__", None)
    if not (callable(value) and isinstance(module, str) and isinstance(name, str) and module.split(".")[0] in _LIBRARY):
        return None
    holder = sys.modules.get(module)
    for part in name.split("."):
        holder = getattr(holder, part, None)
    return (module, name) if holder is value else None
