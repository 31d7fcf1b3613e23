"""Calls between two processes of which one does not trust the other: plain values go over, everything else stays at home.

A message is a table of values, one a line. Numbers, text and bytes, lists, tuples, sets and dicts of these, and a few values
of the standard library are copied, by their exact types; what has another type stays where it is, and the other side gets a
`Foreign` that asks it. Nothing that is read is ever executed, so the worst that a message can do is to be a wrong value.
Lists, sets and dicts that a call has changed are changed in the caller too, and what was one object is one object there.
"""

from __future__ import annotations

import builtins
import operator
import os
import sys
from types import CoroutineType, ModuleType

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_CONSTANTS = {repr(value): value for value in (None, True, False, Ellipsis, NotImplemented)}
_TYPES = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
_NAMES = {value: name for name, value in _TYPES.items()}
_MUTABLE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "list": (list, list.copy),
    "dict": (dict, dict.copy),
    "set": (set, lambda value: set(set.__iter__(value))),
    "bytearray": (bytearray, bytearray.copy),
}
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
_CHANGES = {base for base, _ in _MUTABLE.values()}
_TAGS: dict[type, bytes] = {list: b"l", tuple: b"u", set: b"S", frozenset: b"F"}
_READ_FLAT = {tag: read for tag, _, read in _FLAT.values()}

UNARY = {
    **{
        f"__{f.__name__}__": f
        for f in (len, iter, next, bool, str, repr, int, float, complex, hash, reversed, round, format)
    },
    **{name: getattr(operator, name) for name in "__abs__ __neg__ __pos__ __invert__ __index__".split()},
    **{name: getattr(operator, name) for name in "__getitem__ __setitem__ __delitem__".split()},
    "__enter__": lambda value: type(value).__enter__(value),
    "__exit__": lambda value, *error: type(value).__exit__(value, *error),
}
COMPARED = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__".split()
COMBINED = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
SPECIAL = UNARY | {
    name: getattr(operator, name) for name in (*COMPARED, *(f"__{name}__" for name in COMBINED), "__contains__")
}
"""What can be asked of an object besides its attributes and to be called."""
VERBS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **options: function(*args, **options),
    "special": lambda name, *args: SPECIAL[name](*args),
    "held": lambda value, base: _MUTABLE[base][1](value),
    "wait": lambda value: __import__("asyncio").run(value),
    **{f.__name__: f for f in (getattr, setattr, delattr, isinstance, issubclass)},
}
"""What a side can be asked to do."""


class LinkError(Exception):
    """The other side has ended, or writes what is no message."""


class Foreign:
    """Stands for an object of the other side.

    What a test expects is never shown to the other side's operators: with anything but another of its objects a `Foreign`
    is not equal, cannot be ordered or combined, and "in" compares on this side. Objects that are lists, dicts or sets by
    inheritance count as what they hold.
    """

    __slots__ = ("__base", "__link", "__number")

    def __init__(self, link: Link, number: int, base: str):
        for name, value in (("link", link), ("number", number), ("base", base)):
            object.__setattr__(self, f"_Foreign__{name}", value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__link.ask("call", self, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return self.__link.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__link.ask("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self.__link.ask("delattr", self, name)

    def __instancecheck__(self, value: Any) -> bool:
        return self.__link.ask("isinstance", value, self) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return self.__link.ask("issubclass", kind, self) is True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        return self.__link.ask("special", "__exit__", self, kind, error, None)

    def __iter__(self) -> Any:
        return iter(self._held()) if self.__base else self.__link.ask("special", "__iter__", self)

    def __contains__(self, item: Any) -> bool:
        if isinstance(item, Foreign):
            return self.__link.ask("special", "__contains__", self, item) is True
        return any(mine is item or mine == item for mine in self)

    def _held(self) -> Any:
        """What it holds now, where it is a list, dict, set or bytearray."""
        return self.__link.ask("held", self, self.__base)

    def _number_at(self, link: Link) -> int:
        """Its number, if it is of this link."""
        assert link is self.__link
        return self.__number


def _add_operators() -> None:
    def unary(name: str) -> Callable[..., Any]:
        return lambda self, *args: self._Foreign__link.ask("special", name, self, *args)

    def binary(name: str, reverse: bool) -> Callable[..., Any]:
        def method(self: Any, other: Any) -> Any:
            if isinstance(other, Foreign):
                return self._Foreign__link.ask("special", name, *((other, self) if reverse else (self, other)))
            if not self._Foreign__base:
                return NotImplemented
            pair = (other, self._held()) if reverse else (self._held(), other)
            return SPECIAL[name](*pair)

        return method

    for name in UNARY.keys() - {"__iter__", "__exit__"}:
        setattr(Foreign, name, unary(name))
    for name in COMPARED:
        setattr(Foreign, name, binary(name, False))
    for name in COMBINED:
        setattr(Foreign, f"__{name}__", binary(f"__{name}__", False))
        setattr(Foreign, f"__r{name}__", binary(f"__{name}__", True))


_add_operators()


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
        table = _Writer(self, {}).write(self, b"?", (verb, arguments, options))
        while (message := _receive(self.files[0]))[:1] == b"?":
            self._serve(message)
        try:
            good, value, changed = _Reader(self, message, table).root()
        except Exception as error:
            raise LinkError(f"what the other side says cannot be read: {error!r}") from error
        for mine, content in changed:
            if any(mine is one for one in table if type(one) in _CHANGES):  # and not what the test keeps to itself
                _refill(mine, content)
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
        reader = _Reader(self, message, [])
        try:
            verb, arguments, options = reader.root()
            before = [(place, mine, _content(mine)) for place, mine in reader.mutable]
            good, value = True, self.answer(verb, *arguments, **options)
        except BaseException as error:
            good, value, before = False, error.with_traceback(None), []
        known = {id(mine): place for place, mine in reader.mutable}
        changed = [(mine, now) for _, mine, old in before if not _same(old, now := _content(mine))]
        try:
            _Writer(self, known).write(self, b"=", (good, value, changed))
        except (TypeError, ValueError, AttributeError) as error:
            _Writer(self, known).write(self, b"=", (False, TypeError(str(error)), []))

    def number(self, value: Any) -> int:
        """What the other side calls an object of this one by."""
        if not self.lends(value):
            raise TypeError(f"a value of type {type(value).__name__!r} cannot be handed over")
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.lent)
            self.lent.append(value)
        return self.numbers[id(value)]


class _Writer:
    """Writes a table of values; ``known`` are places in the message that is answered, by identity."""

    def __init__(self, link: Link, known: dict[int, int]):
        self.link, self.known = link, known
        self.table: list[Any] = []
        self.places: dict[int, int] = {}

    def write(self, link: Link, tag: bytes, root: Any) -> list[Any]:
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
        if kind is Foreign or kind in _held_classes.values():
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
        held = next((name for name, (base, _) in _MUTABLE.items() if issubclass(kind, base)), "")
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


class _Reader:
    """Reads a table of values; ``sent`` is what the message that it answers held."""

    def __init__(self, link: Link, message: bytes, sent: list[Any]):
        self.link, self.sent = link, sent
        self.lines = message.split(b"\n")[1:]
        self.found: dict[int, Any] = {}
        self.mutable: list[tuple[int, Any]] = []
        self.unfilled: list[tuple[Any, bytes]] = []

    def root(self) -> Any:
        """The value that the message is about."""
        root = self.value(0)
        while self.unfilled:
            mine, line = self.unfilled.pop()
            _refill(mine, self.pairs(line) if isinstance(mine, dict) else self.items(line))
        return root

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
            return _standard(module, name)(*_filled(self, int(words[2])))
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
            return _held_class(base)(self.value(int(words[2])), self.link, int(words[0]))
        assert tag in b"hc"
        if tag == b"c":
            return self.link.coroutine(int(rest))
        assert words[1].decode() in {"", *_MUTABLE}
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
            vars(error).update(_filled(self, own), _text=self.value(text))
        return error

    def exception_class(self, number: int, name: str, bases: list[Any]) -> type[BaseException]:
        """A class that stands for one of the other side's, so that `except` can name it."""
        if number not in self.link.exceptions:
            assert all(issubclass(base, BaseException) for base in bases)
            body = {"__str__": lambda error: getattr(error, "_text", "") or ", ".join(map(str, error.args))}
            self.link.exceptions[number] = type(name, tuple(bases) or (Exception,), body)
        return self.link.exceptions[number]


def _filled(reader: _Reader, place: int) -> Any:
    """A value with all that it holds, where it is needed at once."""
    waiting, reader.unfilled = reader.unfilled, []
    value = reader.value(place)
    while reader.unfilled:
        mine, line = reader.unfilled.pop()
        _refill(mine, reader.pairs(line) if isinstance(mine, dict) else reader.items(line))
    reader.unfilled = waiting
    return value


_held_classes: dict[type, Any] = {}


def _held_class(base: type) -> Any:
    """A class of values of an immutable type whose other attributes are asked of the other side."""
    if base not in _held_classes:

        def new(kind: Any, value: Any, link: Link, number: int) -> Any:
            assert type(value) is base
            made: Any = base.__new__(kind, value)  # type: ignore[call-overload]
            made._asks = link.foreign(number, "")
            return made

        body = {
            "__new__": new,
            "__init__": lambda self, *args: None,
            "__getattr__": lambda self, name: getattr(vars(self)["_asks"], name),
            "_number_at": lambda self, link: self._asks._number_at(link),
        }
        _held_classes[base] = type(base.__name__, (base,), body)
    return _held_classes[base]


def _content(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else bytes(value) if isinstance(value, bytearray) else list(value)


def _same(old: Any, new: Any) -> bool:
    """Whether two contents hold the very same objects."""
    if isinstance(old, bytes):
        return old == new
    if old and isinstance(old[0], tuple) and new and isinstance(new[0], tuple):
        old, new = ([part for pair in content for part in pair] for content in (old, new))
    return len(old) == len(new) and all(map(operator.is_, old, new))


def _refill(mine: Any, content: Any) -> None:
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


_LIBRARY = sys.stdlib_module_names


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
