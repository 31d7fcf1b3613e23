"""What stands for the objects of another process, and what can be asked of these."""

from __future__ import annotations

import operator

TYPE_CHECKING = False  # importing typing or collections.abc would take longer than the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MUTABLE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "list": (list, list.copy),
    "dict": (dict, dict.copy),
    "set": (set, lambda value: set(set.__iter__(value))),
    "bytearray": (bytearray, bytearray.copy),
}
"""Types whose values may change: a value of a class that inherits from one counts as what it holds."""

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
    "held": lambda value, base: MUTABLE[base][1](value),
    "wait": lambda value: __import__("asyncio").run(value),
    **{f.__name__: f for f in (getattr, setattr, delattr, isinstance, issubclass)},
}
"""What a side can be asked to do."""


class Foreign:
    """Stands for an object of the other side.

    What a test expects is never shown to the other side's operators: with anything but another of its objects a `Foreign`
    is not equal, cannot be ordered or combined, and "in" compares on this side. Objects that are lists, dicts or sets by
    inheritance count as what they hold.
    """

    __slots__ = ("__base", "__link", "__number")

    def __init__(self, link: Any, number: int, base: str):
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

    def _number_at(self, link: Any) -> int:
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


HELD: dict[type, Any] = {}
"""For an immutable type the class of values that are asked of the other side besides."""


def held_class(base: type) -> Any:
    """A class of values of an immutable type whose other attributes are asked of the other side."""
    if base not in HELD:

        def new(kind: Any, value: Any, link: Any, number: int) -> Any:
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
        HELD[base] = type(base.__name__, (base,), body)
    return HELD[base]
