"""How long a rollout of episodes takes whose tool is slow, beside TRL's and beside the longest of the episodes alone.

    python -m benchmarks.episodes

Needs `pip install "grpo_hf[benchmarks]"`. 64 episodes of at most 6 turns of the same small chat model, sampled by
transformers in both; its tool sleeps 0.1 to 1 s. The limit is what the episode that waits longest takes when it is played
alone: its turns and its tool's answers can only come one after the other. benchmarks/results/episodes.json has the result.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset

from grpo_hf.rollout.prompts import derived_seed
from grpo_hf.types import Completion
from tests.agents import agent_model, agent_tokenizer, agent_trainer

RESULT = Path(__file__).parent / "results" / "episodes.json"
EPISODES, TURNS, ROUNDS = 64, 6, 2
PROMPTS = [{"prompt": [{"role": "user", "content": word}]} for word in ("one", "two", "one two", "six")]
SETTINGS = {"max_completion_length": 120, "num_generations": 16, "per_device_train_batch_size": EPISODES}


async def dice(place: int) -> str:
    """Wait, and throw a die.

    Args:
        place: Where it is thrown.
    """
    await asyncio.sleep(random.uniform(0.1, 1.0))
    return "six"


async def look(place: int) -> str:
    """Wait, and look somewhere.

    Args:
        place: Where.
    """
    await asyncio.sleep(random.uniform(0.1, 1.0))
    return "one two"


def nothing_scored(completions: list[Any], **kwargs: Any) -> list[float]:
    """The rollout alone is measured."""
    return [0.0] * len(completions)


def waited(item: Completion) -> float:
    """Seconds of an episode's tools; calls of one turn run at once."""
    return sum(max(call.seconds for call in turn.calls) for turn in item.turns if turn.calls)


def ours(folder: Path, seed: int) -> dict[str, float]:
    """A rollout, and its longest episode alone."""
    options = SETTINGS | {"tools": [dice, look], "tool_workers": EPISODES, "max_tool_calling_iterations": TURNS - 1}
    trainer = agent_trainer(folder, rows=PROMPTS, reward=nothing_scored, **options)
    episodes, sampling = trainer.stream.sampler.episodes, trainer.stream.sampling
    assert episodes is not None
    prompts = [trainer.prompts[number] for number in range(len(PROMPTS))]
    seeds = [derived_seed(seed, number) for number in range(len(PROMPTS))]
    trainer.stream.sampler.engine.sync_weights(0)
    list(episodes(prompts[:1], [0], EPISODES, sampling))  # warm: workers are there
    start = time.perf_counter()
    made = dict(episodes(prompts, seeds, EPISODES // len(PROMPTS), sampling))
    seconds = time.perf_counter() - start
    places = [(number, place) for number in made for place in range(len(made[number]))]
    number, place = max(places, key=lambda at: waited(made[at[0]][at[1]]))
    same = made[number][place]
    start = time.perf_counter()
    ((_, (alone,)),) = episodes([prompts[number]], [seeds[number] + place], 1, sampling)
    limit = time.perf_counter() - start
    assert alone.ids == same.ids, "the same episode"
    items = [item for group in made.values() for item in group]
    trainer.toolbox.close()
    return {
        "seconds": seconds,
        "limit": limit,
        "calls": sum(len(turn.calls) for item in items for turn in item.turns),
        "turns of the longest": len(same.turns),
    }


def theirs(folder: Path, seed: int) -> dict[str, float]:
    """TRL's rollout with the same model and tools."""
    calls = 0

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        async def tool(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return await function(*args, **kwargs)

        return tool

    args = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        max_tool_calling_iterations=TURNS - 1,
        gradient_checkpointing=False,
        seed=seed,
        **SETTINGS,
    )
    trainer = trl.GRPOTrainer(
        agent_model(),
        nothing_scored,
        args,
        Dataset.from_list(PROMPTS),
        processing_class=agent_tokenizer(),
        tools=[counted(dice), counted(look)],
    )
    rows = [dict(row) for row in PROMPTS for _ in range(EPISODES // len(PROMPTS))]
    start = time.perf_counter()
    trainer._generate_and_score_completions(rows)
    return {"seconds": time.perf_counter() - start, "calls": calls}


def main() -> None:
    """Interleave both, and take medians."""
    rounds: dict[str, list[dict[str, float]]] = {"grpo_hf": [], "trl": []}
    for number in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            rounds["grpo_hf"].append(ours(Path(folder) / "ours", number))
            rounds["trl"].append(theirs(Path(folder) / "theirs", number))
        print(
            {side: {name: round(value, 2) for name, value in found[-1].items()} for side, found in rounds.items()},
            flush=True,
        )
    median = {
        side: {name: statistics.median(item[name] for item in found) for name in found[0]} for side, found in rounds.items()
    }
    of_limit = statistics.median(item["seconds"] / item["limit"] for item in rounds["grpo_hf"])
    per_call = [statistics.median(i["seconds"] / i["calls"] for i in rounds[side]) for side in ("trl", "grpo_hf")]
    result = {
        "episodes": EPISODES,
        "turns at most": TURNS,
        "medians": median,
        "times the limit": of_limit,
        "trl's seconds a call over ours": per_call[0] / per_call[1],
        "rounds": rounds,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{of_limit:.2f} times the limit; TRL takes {per_call[0] / per_call[1]:.1f} times as long for a call")


if __name__ == "__main__":
    main()
