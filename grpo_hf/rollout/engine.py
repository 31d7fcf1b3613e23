"""What an engine is: something that samples completions for token-id prompts, from the trainer's current weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from grpo_hf.types import Completion


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from, and where they end."""

    max_completion_length: int
    """Tokens at most, the stop token included."""
    stop_token_ids: tuple[int, ...]
    """Any of these ends a completion and is its last token."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Smallest set of tokens that holds this probability; 1 keeps all."""
    top_k: int = 0
    """The most likely tokens only; 0 keeps all."""
    min_p: float | None = None
    """Tokens at least this probable relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens already present (Keskar et al. 2019); 1 is none."""
    stop_strings: tuple[str, ...] = ()
    """Any of these in the decoded text ends a completion; the token that completes it is the last."""
    regex: str | None = None
    """Only tokens that keep the text a beginning of a match are drawn."""
    json_schema: str | None = None
    """The same for the JSON texts that a schema allows."""

    @property
    def structured(self) -> bool:
        """Whether a grammar narrows down the distribution."""
        return self.regex is not None or self.json_schema is not None

    @property
    def needs_text(self) -> bool:
        """Whether an engine has to decode what it samples."""
        return bool(self.stop_strings) or self.structured


class EngineLostError(RuntimeError):
    """The engine has gone and has not come back in time; the trainer's own state is whole."""


@dataclass(frozen=True)
class Request:
    """Completions of one sequence that are wanted."""

    key: Hashable
    """Whose."""
    ids: list[int]
    """What they follow on."""
    seed: int
    """Of the first; completion n has seed + n."""
    count: int
    """How many."""
    max_tokens: int
    """Tokens of each at most."""

    def __post_init__(self) -> None:
        if not self.ids or self.max_tokens < 1:
            raise ValueError(f"a request of {len(self.ids)} ids and max_tokens={self.max_tokens}; each must be 1 or more")


class Requests(Protocol):
    """An engine at work: requests are added while others are being sampled, and come back in the order in which they end."""

    patience: float
    """Seconds that it pays to wait for more requests before `finished`: 0 where they may join those that run."""

    def add(self, key: Hashable, ids: list[int], seed: int, count: int = 1, max_tokens: int | None = None) -> None:
        """Ask for ``count`` completions of token ids, of at most ``max_tokens`` (None: what Sampling says); completion n has
        seed + n. Raises StaleEngineError when the trainer's weights have changed since sync_weights."""

    def finished(self, timeout: float | None = None) -> list[tuple[Hashable, list[Completion]]]:
        """Work until something has ended, for ``timeout`` seconds at most where the engine is elsewhere (one step or one
        batch where it is here); all requests that have ended since the last call. Empty where none is open."""


class Engine(Protocol):
    """Samples completions; one implementation a file in this folder."""

    def sync_weights(self, version: int) -> None:
        """Make the next samples come from the trainer's current weights, those after ``version`` updates."""

    def requests(self, sampling: Sampling) -> AbstractContextManager[Requests]:
        """Take requests with these settings; what is open at the end is given up. One at a time."""

    def abort(self) -> None:
        """Give up what is being sampled."""


def sample_groups(
    engine: Engine, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Sampling
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (number of the prompt, its completions) as groups finish; completion n has the prompt's seed + n.

    All are asked for before this returns, so that an engine that is elsewhere works on them from now on.
    """
    with ExitStack() as stack:
        requests = stack.enter_context(engine.requests(sampling))
        for number, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            requests.add(number, ids, seed, num_generations)
        return _finished(requests, len(prompts), stack.pop_all())


def _finished(requests: Requests, missing: int, stack: ExitStack) -> Iterator[tuple[Any, list[Completion]]]:
    with stack:
        while missing:
            for number, completions in requests.finished():
                missing -= 1
                yield number, completions
