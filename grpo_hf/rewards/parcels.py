"""What workers are sent once: verifiers, packed so that another process can load them, and the trainer's state."""

from __future__ import annotations

import hashlib
import io
import itertools
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle

from grpo_hf.rewards.loading import from_file, place_in_file
from grpo_hf.rewards.signature import Reward


@dataclass(frozen=True)
class Parcel:
    """Something that a worker is sent once: a verifier, or the trainer's state."""

    slot: str
    """What calls name it by."""
    version: str
    """A worker that holds another version is sent this one."""
    blob: bytes
    """The thing itself."""
    modules: frozenset[str] = frozenset()
    """What loading it imports."""


def verifier_parcel(reward: Reward) -> Parcel:
    """Pack a verifier, by reference where workers can import it, else by value.

    Raises:
        ValueError: it holds something that cannot be sent to another process.
    """
    packed = io.BytesIO()
    pickler = _Pickler(packed)
    try:
        pickler.dump(reward)
    except Exception as error:
        raise ValueError(
            f"the verifier {reward.name!r} cannot be sent to worker processes: {error}. Let it make what it holds when it is"
            " called, write it as `def f(completions, ...) -> list[float]`, or register it with in_process=True"
        ) from error
    digest = hashlib.sha256(packed.getvalue()).hexdigest()
    return Parcel(digest, digest, packed.getvalue(), frozenset(pickler.modules))


class _Pickler(cloudpickle.Pickler):
    """Has workers load a verifier's file, where it came from one, as this process did; notes what they will import."""

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


_states = itertools.count()


def state_parcel(state: Any) -> Parcel:
    """Pack the trainer's state as it is now."""
    return Parcel("trainer_state", str(next(_states)), cloudpickle.dumps(state))
