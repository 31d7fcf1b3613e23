"""The rollout stream: which updates Trainer is handed, in which order, and after a resume."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grpo_hf.packing.attention import block_mask
from grpo_hf.rewards import Scorer, get_rewards
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Plan
from grpo_hf.rollout.prompts import PromptOrder, load_prompts
from grpo_hf.rollout.sampler import GroupSampler
from grpo_hf.rollout.stream import RolloutStream
from grpo_hf.types import Completion
from tests.tiny import even_words, tiny_tokenizer

PROMPTS = [{"prompt": f"w{number} w{number + 1}"} for number in range(7)]


class FakeEngine:
    """A canned completion for each seed, which holds the number of weight syncs too."""

    def __init__(self) -> None:
        self.syncs = 0

    def sync_weights(self) -> None:
        self.syncs += 1

    def sample(
        self, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        for number in reversed(range(len(prompts))):  # groups finish in any order
            yield (
                number,
                [
                    Completion([(seeds[number] + n) % 89, *[90] * ((seeds[number] + n) % 3)], truncated=False)
                    for n in range(num_generations)
                ],
            )


class Run:
    """A stream, and the loop that Trainer drives it by."""

    def __init__(self, *, finished: int = 0, updates: int = 1, iterations: int = 1, accumulation: int = 1, **options: Any):
        self.finished, self.rollouts, self.engine = finished, [], FakeEngine()
        tokenizer = tiny_tokenizer()
        self.stream = RolloutStream(
            prompts=load_prompts(PROMPTS, tokenizer),
            order=PromptOrder(num_prompts=7, prompts_per_rollout=2, seed=0),
            sampler=GroupSampler(self.engine, tokenizer, Scorer(get_rewards(even_words))),
            sampling=Sampling(max_completion_length=3, stop_token_ids=(90,)),
            num_generations=4,
            plan=Plan("centered", updates, "packed", 100, max_completion_length=3, keep_zero_signal=True),
            num_iterations=iterations,
            gradient_accumulation_steps=accumulation,
            finished_updates=lambda: self.finished,
            on_rollout=lambda rollout: self.rollouts.append(rollout.index),
            **options,
        )

    def epoch(self) -> Iterator[dict[str, Any]]:
        """One pass of the prompts; an update is finished when the next item is asked for."""
        for item in self.stream:
            yield item
            self.finished += "update" in item


def tokens(item: dict[str, Any]) -> tuple[int, list[list[int]]]:
    """What identifies an update: its rollout and its completions' tokens."""
    return item["rollout"], [batch.targets.tolist() for batch in item["update"].microbatches]


def test_length_of_an_epoch() -> None:
    """7 prompts make 3 rollouts of 2."""
    assert len(Run().stream) == 3
    run = Run(updates=2, iterations=3, accumulation=4)
    assert len(run.stream) == 3 * 2 * 3 * 4 == len(list(run.epoch()))


@pytest.mark.parametrize(
    ("updates", "iterations", "order"),
    [(1, 1, [0]), (2, 1, [0, 1]), (1, 2, [0, 0]), (2, 2, [0, 1, 0, 1])],
)
def test_order_of_updates(updates: int, iterations: int, order: list[int]) -> None:
    """A rollout's updates in order, that many times over; weights are synced once a rollout."""
    run = Run(updates=updates, iterations=iterations)
    numbers, rollouts = [], []
    for item in run.epoch():
        assert run.stream.rollout is not None
        numbers.append([update is item["update"] for update in run.stream.rollout.updates].index(True))
        rollouts.append(item["rollout"])
    assert numbers == order * 3
    assert rollouts == [rollout for rollout in range(3) for _ in order]
    assert run.rollouts == [0, 1, 2]
    assert run.engine.syncs == 3


def test_accumulation_puts_an_update_on_the_last_item() -> None:
    assert [sorted(item) for item in Run(accumulation=3).epoch()] == [[], [], ["rollout", "update"]] * 3


def test_groups_are_scored_and_in_the_order_of_the_prompts() -> None:
    run = Run()
    rollout = run.stream.make(0)
    prompts, seeds = run.stream.draw(0)
    for group, prompt, seed in zip(rollout.groups, prompts, seeds, strict=True):
        assert group.prompt == prompt
        assert [completion.ids[0] for completion in group.completions] == [(seed + n) % 89 for n in range(4)]
        for completion in group.completions:
            assert completion.text.split()[0] == f"w{completion.ids[0]}"
            assert completion.reward == even_words(completion.text)


def test_epochs_go_on_where_the_last_one_ended() -> None:
    run = Run(updates=2)
    rollouts = [item["rollout"] for _ in range(3) for item in run.epoch()]
    assert rollouts == [number for number in range(9) for _ in range(2)]


def test_two_processes_share_the_prompts_and_seeds_of_one() -> None:
    prompts, seeds = Run().stream.draw(2)
    halves = [Run(peers=Peers(rank, 2, lambda item: [item])).stream.draw(2) for rank in (0, 1)]
    assert [part for half in halves for part in half[0]] == prompts
    assert [part for half in halves for part in half[1]] == seeds
    assert len({seed + n for seed in seeds for n in range(4)}) == 8


@pytest.mark.parametrize(("updates", "iterations", "accumulation"), [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_resume_from_any_number_of_finished_updates(updates: int, iterations: int, accumulation: int) -> None:
    options = {"updates": updates, "iterations": iterations, "accumulation": accumulation}
    run, expected, states = Run(**options), [], []
    for _ in range(2):
        for item in run.epoch():
            if "update" in item:
                # While an item is out the ones before it are finished: what a checkpoint written then would hold.
                states.append(pickle.dumps(run.stream.state_dict()))
                expected.append(tokens(item))
    for finished in range(len(expected)):
        resumed = Run(finished=finished, **options)
        resumed.stream.load_state_dict(pickle.loads(states[finished]))
        left = len(expected) // 2 - finished % (len(expected) // 2)  # in this pass
        rest = [tokens(item) for item in resumed.epoch() if "update" in item]
        assert rest == expected[finished : finished + left]
        inside = finished % (updates * iterations)
        assert (expected[finished][0] in resumed.rollouts) is not bool(inside)  # not sampled again


def test_state_holds_the_rollout_only_between_its_updates() -> None:
    run, held = Run(updates=2, iterations=2), []
    for _ in run.epoch():
        held.append(run.stream.state_dict()["rollout"])
    assert [rollout and rollout.index for rollout in held] == [None, 0, 0, 0, None, 1, 1, 1, None, 2, 2, 2]


def test_state_keeps_what_the_first_pass_left_behind() -> None:
    """Old log-probs are part of a rollout; attention masks made on the way are not, and are made again."""
    run = Run(iterations=2, finished=1)
    rollout = run.stream.rollout = run.stream.make(0)
    (batch,) = rollout.updates[0].microbatches
    batch.old_logprobs = torch.full((len(batch.targets),), -1.5)
    assert batch.prefix_layout is not None
    batch.prefix_layout.block_masks[None] = block_mask(batch.prefix_layout, None)
    loaded = pickle.loads(pickle.dumps(run.stream.state_dict()))["rollout"]
    (again,) = loaded.updates[0].microbatches
    assert torch.equal(again.old_logprobs, batch.old_logprobs)
    assert again.prefix_layout.block_masks == {}


@pytest.mark.parametrize("updates", [1, 2])
def test_ahead_by_one(updates: int) -> None:
    """The next rollout has the weights from before this one is trained on; the prompts and seeds are the same as ever."""
    run, plain, versions = Run(updates=updates, rollout_ahead=1, max_updates=lambda: 3 * updates), Run(updates=updates), []
    for _item in run.epoch():
        rollout = run.stream.rollout
        assert rollout is not None
        versions.append(run.finished - rollout.version)
        ahead = run.stream.ahead
        assert (ahead is None) is (rollout.index == 2)  # the run ends there
        assert ahead is None or (ahead.index, ahead.version) == (rollout.index + 1, rollout.index * updates)
    assert versions == [*range(updates), *[updates + n for n in range(updates)] * 2]
    assert run.engine.syncs == 3
    assert [tokens(item) for item in Run(updates=updates, rollout_ahead=1).epoch()] == [tokens(i) for i in plain.epoch()]


def test_a_checkpoint_holds_what_was_sampled_ahead() -> None:
    run = Run(rollout_ahead=1)
    expected, states = [], []
    for item in run.epoch():
        states.append(pickle.dumps(run.stream.state_dict()))
        expected.append(tokens(item))
    resumed = Run(rollout_ahead=1, finished=1)
    resumed.stream.load_state_dict(pickle.loads(states[0]))
    resumed.engine.syncs = 7
    assert [tokens(item) for item in resumed.epoch()] == expected[1:]
    assert resumed.engine.syncs == 9  # rollout 2's and, of the next pass, rollout 3's
