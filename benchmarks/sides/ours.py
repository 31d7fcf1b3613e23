"""grpo_hf's GRPOTrainer with its defaults."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks.cases import Case, Data, Transcript, text_of
from benchmarks.sides.clock import Clock
from benchmarks.sides.trainers import arguments_of, settings_of
from grpo_hf.packing.layout import pack
from grpo_hf.rollout.planning import numbered_samples
from grpo_hf.types import Completion, Group, Prompt, TrainingSample


class Replay:
    """An Engine, and its Requests, whose samples are the case's completions."""

    patience = 0.0

    def __init__(self, data: Data, clock: Clock):
        self.completions = {tuple(ids): made for ids, made in zip(data.prompts, data.completions, strict=True)}
        self.clock = clock

    def sync_weights(self, version: int) -> None:
        """Nothing to do."""

    def abort(self) -> None:
        """Nothing to do."""

    @contextmanager
    def requests(self, sampling: Any) -> Iterator[Replay]:
        """The completions, when the clock allows."""
        self.made: list[tuple[Hashable, list[Completion]]] = []
        yield self

    def add(self, key: Hashable, ids: list[int], seed: int, count: int = 1, max_tokens: int | None = None) -> None:
        """See Requests.add."""
        self.made.append((key, [completion_of(made) for made in self.completions[tuple(ids)]]))

    def finished(self, timeout: float | None = None) -> list[tuple[Hashable, list[Completion]]]:
        """See Requests.finished."""
        self.clock.wait()
        made, self.made = self.made, []
        return made


def completion_of(made: Transcript) -> Completion:
    """As an engine gives it; what tools answered is marked where there is any."""
    return Completion(made.ids, truncated=True, is_sampled=None if all(made.is_sampled) else made.is_sampled)


def train(case: Case, model: str, folder: str, data: Data, clock: Clock, layout: str = "packed", **more: Any) -> None:
    """With the case's token budget, or that of as many padded rows as TRL's."""
    from grpo_hf import GRPOConfig, GRPOTrainer

    padded = case.rows * (case.longest_prompt + case.longest_completion)
    settings = settings_of(case, folder) | {
        "token_layout": layout,
        "tokens_per_microbatch": case.tokens if layout == "packed" else padded,
        "save_rollouts": False,
        "write_report": False,
        **more,
    }
    trainer = GRPOTrainer(args=GRPOConfig(**settings), **arguments_of(case, model, data, clock))
    if case.injected:
        trainer.stream.sampler.engine = Replay(data, clock)
    else:
        trainer.stream.make = clock.waits_before(trainer.stream.make)
    clock.watch(trainer.model)
    trainer.train()


def train_padded(*args: Any) -> None:
    """With one padded row for every completion, those without signal too, and the same fused head."""
    train(*args, layout="padded", keep_zero_signal=True)


def train_with_vllm(*args: Any) -> None:
    """With vLLM in its process."""
    train(*args, use_vllm=True)


def samples_of(case: Case, data: Data) -> list[TrainingSample]:
    """What is trained on of the rollout's first update: all completions but those without signal."""
    groups = [
        Group(Prompt(ids, "", {}, number), [replace(completion_of(transcript), advantage=1.0) for transcript in made])
        for number, (ids, made) in enumerate(zip(data.prompts, data.completions, strict=True))
        if number < case.groups and text_of(ids) not in data.flat
    ]
    return [sample for own in numbered_samples(groups, version=0) for sample in own]


def num_tokens(case: Case, data: Data) -> int:
    """Token trees of the case's budget."""
    return sum(batch.num_tokens for batch in pack(samples_of(case, data), tokens_per_microbatch=case.tokens))
