"""What watches a run's numbers, and what becomes of the step or of the run when they go bad.

A guard is one function and its entry in GUARDS: it reads what a step or a log line has measured, and says whether that is
beyond the guard's threshold. What follows is the user's choice: warn, skip the optimizer step, or stop.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.utils import logging

from grpo_hf.metrics import Metrics
from grpo_hf.rewards.loading import nearest

logger = logging.get_logger(__name__)

ACTIONS = ("warn", "skip", "stop")

REWARD_WINDOW = 10
"""Log lines in a running mean of the reward; checkpoints keep as many."""


class GuardError(RuntimeError):
    """A guard has stopped the run; says the value, its limit, the step and what to try."""


@dataclass(frozen=True)
class Seen:
    """What guards look at."""

    step: int
    values: Mapping[str, float] = field(default_factory=dict)
    """By metric name: means over one update's tokens, over all processes."""
    lines: Sequence[Mapping[str, float]] = ()
    """The log lines so far of steps that had a reward."""
    explain: Callable[[], str] = lambda: ""
    """Where a value that is not finite comes from."""


@dataclass(frozen=True)
class Reading:
    """What a guard makes of it."""

    tripped: bool
    said: str
    """The value, the limit, and what to try."""


# ---- The guards: None where there is nothing to look at


def not_finite(seen: Seen, limit: float) -> Reading | None:
    """Loss, gradient norm and weights: NaN, or at the limit or beyond it."""
    values = {name: seen.values[name] for name in ("loss", "gradient norm", "norm of the weights") if name in seen.values}
    if not values:
        return None
    bad = {name: value for name, value in values.items() if not abs(value) < limit}
    if not bad:
        return Reading(False, "")
    name, value = next(iter(bad.items()))
    over = f", of less than {limit:g} that are allowed" if math.isfinite(limit) else ""
    return Reading(True, f"the {name} of step {seen.step} is {value}{over}: {seen.explain()}")


def reward_collapse(seen: Seen, share: float) -> Reading | None:
    """The mean reward of the last REWARD_WINDOW log lines against the best such mean, where that is positive."""
    rewards = [line["reward"] for line in seen.lines]
    sums = [sum(rewards[end - REWARD_WINDOW : end]) for end in range(REWARD_WINDOW, len(rewards) + 1)]
    if not sums or max(sums) <= 0:
        return None
    now, best = sums[-1] / REWARD_WINDOW, max(sums) / REWARD_WINDOW
    return Reading(
        now < share * best,
        f"the mean reward of the last {REWARD_WINDOW} log lines up to step {seen.step} is {now:.4g}, below {share:g} of its "
        f"best, {best:.4g}: read the samples in rollouts/, go back to a checkpoint from before, and try a lower "
        "learning_rate or beta > 0",
    )


def no_signal(seen: Seen, lines: float) -> Reading | None:
    """So many log lines in a row in which the completions of each prompt all earned the same, which teaches nothing."""
    last = seen.lines[-int(lines) :]
    if len(last) < lines:
        return None
    line = last[-1]
    shares = {
        name.split("/")[1]: line.get(name.replace("/mean", "/outcomes/no_answer"), 0.0)
        for name in line
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    said = [f"{name} scores {line[f'rewards/{name}/mean']:.3g}, {share:.0%} no answer" for name, share in shares.items()]
    if any(share > 0.5 for share in shares.values()):
        advice = "a prompt that says which form the answer takes, or max_completion_length"
        advice += " where completions are cut off before they answer"
    elif line["reward"] > 0:
        advice = "harder prompts, or skip_solved_after, where all completions are right"
    else:
        advice = "easier prompts first (curriculum), a larger num_generations, or a verifier that gives credit for a part"
    return Reading(
        all(item.get("frac_reward_zero_std") == 1 for item in last),
        f"up to step {seen.step}, {len(last)} log lines had no prompt whose completions earned different rewards, so "
        f"nothing was learned from them ({'; '.join([*said, _cut_off(line)])}). What usually mends it: {advice}",
    )


def _cut_off(line: Mapping[str, float]) -> str:
    return f"{line.get('completions/clipped_ratio', 0.0):.0%} of the completions are cut off"


def entropy_collapse(seen: Seen, limit: float) -> Reading | None:
    """The mean entropy of the tokens, in nats."""
    if (value := seen.values.get("entropy")) is None:
        return None
    return Reading(
        value < limit,
        f"the mean token entropy of step {seen.step} is {value:.3g} nats, below {limit:g}: the policy hardly explores any "
        "more. Try a higher epsilon_high or temperature, entropy_coef > 0, or a lower learning_rate",
    )


def kl(seen: Seen, limit: float) -> Reading | None:
    """The mean KL estimate of the tokens, in nats."""
    if (value := seen.values.get("kl")) is None:
        return None
    return Reading(
        value > limit,
        f"the mean KL divergence from the reference in step {seen.step} is {value:.3g} nats, above {limit:g}: try a lower "
        "learning_rate, a higher beta, or sync_ref_model=True",
    )


def engine_mismatch(seen: Seen, limit: float) -> Reading | None:
    """How far the engine's log-probs are from the trainer's under the same weights; older ones differ as they must."""
    value = seen.values.get("sampling/sampling_logp_difference")
    if value is None or seen.values.get("sampling/staleness"):
        return None
    return Reading(
        value > limit,
        f"the engine's log-probs of its samples differ from the trainer's by {value:.2g} on average in step {seen.step}, "
        f"above {limit:g}: it does not compute this model as transformers does, and the correction will drop or shrink most "
        "of the loss. Set use_vllm=False, or try another version of vLLM",
    )


def engine_weights(seen: Seen, limit: float) -> Reading | None:
    """The same, so far that it cannot be arithmetic."""
    if (reading := engine_mismatch(seen, limit)) is None:
        return None
    value = seen.values["sampling/sampling_logp_difference"]
    return Reading(
        reading.tripped,
        f"the engine's log-probs of its samples differ from the trainer's by {value:.2g} on average in step {seen.step}, "
        f"above {limit:g}: it has other weights than the trainer, or computes another model, so what it samples teaches "
        "nothing. Set use_vllm=False, try "
        "another version of vLLM, or, should this be as you want it, guards={'engine_weights': 'warn'}",
    )


@dataclass(frozen=True)
class Guard:
    """A guard, and when it trips and what follows, unless the user says otherwise."""

    look: Callable[[Seen, float], Reading | None]
    threshold: float
    action: str = "warn"
    can_skip: bool = True
    """Whether its value is known before the optimizer step."""
    needs: str | None = None
    """The setting without which it has nothing to look at."""


GUARDS: dict[str, Guard] = {
    "not_finite": Guard(not_finite, math.inf, "stop"),
    "reward_collapse": Guard(reward_collapse, 0.5, can_skip=False),
    "no_signal": Guard(no_signal, 10, can_skip=False),
    "entropy_collapse": Guard(entropy_collapse, 0.01),
    "kl": Guard(kl, 1.0, needs="beta"),
    # Nats: bfloat16 gives 0.01 to 0.04, different weights or another attention 1 and more.
    "engine_mismatch": Guard(engine_mismatch, 0.1),
    "engine_weights": Guard(engine_weights, 0.2, "stop"),
}
"""Actions and thresholds are the defaults of the setting ``guards``."""


# ---- Settings


def chosen_guards(settings: Any) -> dict[str, Guard]:
    """GUARDS with the user's actions and thresholds: {name: action} or {name: {action: ..., threshold: ...}}.

    Raises ValueError for what is no guard, action or threshold.

    >>> chosen_guards({"kl": "stop"})["kl"].action
    'stop'
    """
    if not isinstance(settings or {}, Mapping):
        raise ValueError(f"guards={settings!r} must map guards to what they do: {{kl: stop}}")
    return GUARDS | {name: _chosen(name, given) for name, given in (settings or {}).items()}


def _chosen(name: str, given: Any) -> Guard:
    if name not in GUARDS:
        raise ValueError(f"there is no guard {name!r}, only {', '.join(GUARDS)}{nearest(str(name), GUARDS)}")
    changes = {"action": given} if isinstance(given, str) else given
    if not isinstance(changes, Mapping) or not changes or changes.keys() - {"action", "threshold"}:
        raise ValueError(
            f"guards[{name!r}]={given!r} is neither one of {', '.join(ACTIONS)} nor {{action: ..., threshold: ...}}"
        )
    guard = replace(GUARDS[name], **changes)
    if guard.action not in ACTIONS:
        hint = nearest(str(guard.action), ACTIONS)
        raise ValueError(f"guards[{name!r}] has the action {guard.action!r}, which is not one of {', '.join(ACTIONS)}{hint}")
    if guard.action == "skip" and not guard.can_skip:
        raise ValueError(f"guards[{name!r}] cannot skip a step: its value is known only after it; set 'warn' or 'stop'")
    threshold = guard.threshold
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or math.isnan(threshold):
        raise ValueError(f"guards[{name!r}] has the threshold {threshold!r}; give a number")
    return guard


class Guards:
    """The guards of a run."""

    def __init__(self, chosen: Mapping[str, Guard], metrics: Metrics):
        """``metrics`` is where it is written that one has tripped."""
        self.chosen, self.metrics = chosen, metrics
        self.may_skip = any(guard.action == "skip" for guard in chosen.values())
        self.said: set[str] = set()
        """Those that have tripped and not recovered: one warning is enough."""

    def check(self, seen: Seen, *, can_skip: bool = False) -> bool:
        """Whether to skip the step. Raises GuardError where a guard stops the run."""
        readings = self.look(seen)
        for name, reading in readings.items():
            self.metrics.maximum(f"guards/{name}", float(reading.tripped))
        return self.act(readings, can_skip=can_skip)

    def look(self, seen: Seen) -> dict[str, Reading]:
        """The readings of the guards that have something to look at."""
        readings = {name: guard.look(seen, guard.threshold) for name, guard in self.chosen.items()}
        return {name: reading for name, reading in readings.items() if reading is not None}

    def act(self, readings: Mapping[str, Reading], *, can_skip: bool = False) -> bool:
        """Warn, and return whether to skip the step. Raises GuardError to stop, also where it is too late to skip."""
        tripped = {name: self.chosen[name].action for name, reading in readings.items() if reading.tripped}
        stops = [name for name, action in tripped.items() if action == "stop" or (action == "skip" and not can_skip)]
        for name, action in tripped.items():
            if name not in stops and name not in self.said:
                then = "the step is skipped" if action == "skip" else "training goes on"
                logger.warning(f"guard {name} ({then}): {readings[name].said}")
        self.said = (self.said - readings.keys()) | tripped.keys()
        if stops:
            raise GuardError("; ".join(f"{readings[name].said} (guard {name})" for name in stops))
        return "skip" in tripped.values()


# ---- Faults of the machine


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward or backward pass has failed for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room: Python says so, safetensors in words, and torch.save only that
    its archive is shorter than it should be."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(text in str(error) for text in ("No space left on device", "inline_container.cc"))
