"""TRL's GRPOTrainer with its defaults, as it is and with a smaller head."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.cases import Case, Data, text_of
from benchmarks.sides.clock import Clock
from benchmarks.sides.trainers import arguments_of, settings_of


def train(case: Case, model: str, folder: str, data: Data, clock: Clock) -> None:
    """As it is: without Triton its head scores every position, prompts and padding too."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl import GRPOConfig, GRPOTrainer

    by_prompt = {text_of(ids): (ids, made) for ids, made in zip(data.prompts, data.completions, strict=True)}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        clock.wait()
        made = [by_prompt[prompt][1][number % case.group_size] for number, prompt in enumerate(prompts)]
        found = {
            "prompt_ids": [by_prompt[prompt][0] for prompt in prompts],
            "completion_ids": [transcript.ids for transcript in made],
            "logprobs": None,
        }
        return found | ({"env_mask": [[*map(int, transcript.is_sampled)] for transcript in made]} if case.tool else {})

    trainer = GRPOTrainer(
        args=GRPOConfig(**settings_of(case, folder)),
        rollout_func=rollout if case.injected else None,
        **arguments_of(case, model, data, clock),
    )
    if not case.injected:
        trainer._generate_and_score_completions = clock.waits_before(trainer._generate_and_score_completions)
    clock.watch(trainer.model)
    trainer.train()


def train_compact_head(*args: Any) -> None:
    """Its head is told that there is Triton, so that it scores completion tokens only, by its code for torch."""
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True
    train(*args)


def num_tokens(case: Case, data: Data) -> int:
    """Every completion is a row as long as the longest prompt and the longest completion of the rollout."""
    longest = max(len(made.ids) for group in data.completions for made in group)
    return case.groups * case.group_size * (max(map(len, data.prompts)) + longest)
