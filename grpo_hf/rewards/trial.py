"""A verifier's options are tried before a run begins, on a completion that says nothing."""

from __future__ import annotations

import re
from typing import Any

from grpo_hf.rewards.scorer import Scorer
from grpo_hf.types import Sample

_VALUE_ERROR = re.compile(r"^ValueError: (.*)", re.MULTILINE | re.DOTALL)


def try_options(scorer: Scorer, row: dict[str, Any]) -> None:
    """Have the verifiers judge an empty completion of a row.

    Raises:
        ValueError: one that has options raises ValueError, as those that ship do for a value that makes no sense.
    """
    tried = [reward for reward in scorer.rewards if reward.bound and reward.per_sample and reward.in_worker]
    if not tried:
        return
    prompt = row["prompt"]
    said = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
    trial = Scorer(tried, settings=scorer.settings)
    try:
        with trial.round() as scoring:
            scoring.add(0, [Sample(prompt, said, "", [], row)])
            (verdicts,) = next(scoring.verdicts())
    finally:
        trial.close()
    for reward in tried:
        verdict = verdicts[reward.name]
        if verdict.outcome == "error" and (found := _VALUE_ERROR.search(verdict.message)):
            raise ValueError(f"the verifier {reward.name!r} refuses its options ({', '.join(reward.bound)}): {found[1]}")
