"""Things that worker processes are sent once, by reference where they can import them, else by value."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle

from grpo_hf.isolation import inside
from grpo_hf.isolation.by_path import from_file, place_in_file
from grpo_hf.isolation.pool import LOAD_SECONDS, DiedError, LateError, StoppedError, Worker


class UnloadableError(Exception):
    """A worker cannot load what it was sent; the text says why."""


@dataclass(frozen=True)
class Parcel:
    """Something that a worker is sent once: a function, or the trainer's state."""

    slot: str
    """What calls name it by."""
    version: str
    """A worker that holds another version is sent this one."""
    blob: bytes
    """The thing itself."""
    modules: frozenset[str] = frozenset()
    """What loading it imports."""


def parcel_of(thing: Any) -> Parcel:
    """Pack a thing whose content names it; what cannot be sent to another process raises."""
    packed = io.BytesIO()
    pickler = _Pickler(packed)
    pickler.dump(thing)
    digest = hashlib.sha256(packed.getvalue()).hexdigest()
    return Parcel(digest, digest, packed.getvalue(), frozenset(pickler.modules))


class _Pickler(cloudpickle.Pickler):
    """Has workers load a function's file, where it came from one, as this process did; notes what they will import."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        if (place := place_in_file(obj)) is not None:
            return from_file, place
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented and isinstance(obj, FunctionType | ModuleType | type):
            self.modules.add(obj.__name__ if isinstance(obj, ModuleType) else obj.__module__)
        return reduced


class Courier:
    """Asks workers, and sends them first what they lack; what cannot be loaded is not tried again for every call."""

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}

    def ask(
        self, made: Worker, parcels: Sequence[Parcel], timeout: float, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """What a function answers in a worker; it returns its answer and whether the worker is spent, which ends then.

        Raises:
            UnloadableError: the worker cannot load what the call needs.
            LateError: the call ran past its deadline.
            DiedError: the worker ended.
        """
        for parcel in parcels:
            if parcel.version not in self.refused and made.sent.get(parcel.slot) != parcel.version:
                self._load(made, parcel)
            if parcel.version in self.refused:
                raise UnloadableError(f"it cannot be loaded in a worker process: {self.refused[parcel.version]}")
        answer, spent = made.call(function, *arguments, timeout=timeout)
        if spent:
            made.end()
        return answer

    def _load(self, made: Worker, parcel: Parcel) -> None:
        try:
            problem = made.call(inside.load, parcel.slot, parcel.blob, timeout=LOAD_SECONDS)
        except LateError:
            problem = f"it took more than {LOAD_SECONDS:g} s"
        except StoppedError:  # which says nothing about what was sent
            raise
        except DiedError as error:
            problem = str(error)
        if problem:
            self.refused[parcel.version] = problem
        else:
            made.sent[parcel.slot] = parcel.version


def walls(memory_gb: float, printed: Callable[[], int] = lambda: inside.PRINTED_CHARACTERS) -> Callable[[Worker], None]:
    """What is done to each new worker of a pool: what a call may add to its memory, what all may print between them."""

    def setup(made: Worker) -> None:
        folder = os.getcwd()
        path = [place or folder for place in sys.path]
        made.call(inside.start, int(memory_gb * 2**30), folder, path, printed(), timeout=LOAD_SECONDS)

    return setup
