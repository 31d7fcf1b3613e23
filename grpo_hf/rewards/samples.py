"""What verifiers are called with: a completion and its dataset row as keywords."""

from __future__ import annotations

from typing import Any

from grpo_hf.rewards.signature import BUILT_INS, Reward
from grpo_hf.types import Completion, Prompt, Sample


def sample_of(prompt: Prompt, completion: Completion) -> Sample:
    """Show a completion as a verifier sees it, in TRL's form for chat prompts."""
    chat = [{"role": "assistant", "content": completion.text}]
    return Sample(
        prompt=prompt.raw,
        completion=completion.text if isinstance(prompt.raw, str) else chat,
        text=completion.text,
        completion_ids=completion.ids,
        row=prompt.row,
    )


def sample_keywords(reward: Reward, sample: Sample) -> dict[str, Any]:
    """What a per-sample verifier accepts of what can be said of one sample."""
    columns = {key: value for key, value in sample.row.items() if key not in BUILT_INS}
    known = columns | {"prompt": sample.prompt, "completion": sample.text, "completion_ids": sample.completion_ids}
    return {key: value for key, value in known.items() if reward.accepts(key)}


def batch_keywords(reward: Reward, samples: list[Sample]) -> dict[str, Any]:
    """The same of a batch, as TRL calls it: a list for each keyword."""
    columns = [key for key in samples[0].row if key not in BUILT_INS and reward.accepts(key)]
    known = {
        "prompts": [sample.prompt for sample in samples],
        "completions": [sample.completion for sample in samples],
        "completion_ids": [sample.completion_ids for sample in samples],
    }
    listed = {key: [sample.row[key] for sample in samples] for key in columns}
    return listed | {key: value for key, value in known.items() if reward.accepts(key)}
