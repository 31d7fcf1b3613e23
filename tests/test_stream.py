"""The rollout stream: what a rollout is a function of, sampling ahead, and what a checkpoint holds of it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.stream import Rollout, RolloutStream
from grpo_hf.types import Prompt
from tests.samples import even_words
from tests.streams import STOP, FakeEngine, make_stream, shown

PROMPTS = [f"w{number} w{number + 1}" for number in range(7)]


def answer(prompt: list[int], seed: int, n: int) -> list[int]:
    """One to three tokens that tell the seed."""
    return [(seed + n) % 89, *[STOP] * ((seed + n) % 3)]


def stream_of(**options: Any) -> RolloutStream:
    return make_stream(PROMPTS, even_words, FakeEngine(answer), **options)


def run(stream: RolloutStream, count: int, *, start: int = 0, updates: int = 1, ahead: bool = False) -> list[Rollout]:
    """Rollouts one after the other, each trained on for so many updates; the last asks for no other."""
    return [
        stream.make(index, version=index * updates, ahead=ahead and index + 1 < start + count)
        for index in range(start, start + count)
    ]


def requests(stream: RolloutStream, index: int) -> tuple[list[Prompt], list[int]]:
    """This process's prompts of a rollout, and a seed for each group."""
    draw = stream.choice.first_round(stream.order, index, stream.memory, stream.peers.count)
    return stream._requests(index, draw, draw.places[stream.peers.rank])


def engine_of(stream: RolloutStream) -> FakeEngine:
    engine = stream.sampler.engine
    assert isinstance(engine, FakeEngine)
    return engine


def test_groups_are_scored_and_in_the_order_of_the_prompts() -> None:
    stream = stream_of()
    rollout = stream.make(0, version=0)
    prompts, seeds = requests(stream, 0)
    for group, prompt, seed in zip(rollout.groups, prompts, seeds, strict=True):
        assert group.prompt == prompt
        assert [completion.ids for completion in group.completions] == [answer(prompt.ids, seed, n) for n in range(4)]
        for completion in group.completions:
            assert completion.text.split()[0] == f"w{completion.ids[0]}"
            assert completion.reward == completion.rewards["even_words"] == even_words(completion.text)


def test_a_rollout_says_how_its_verifiers_ended_and_keeps_nothing() -> None:
    """Tally and version are returned; the next rollout starts from nothing."""
    stream = stream_of()
    for rollout in run(stream, 2):
        assert rollout.tally["even_words"].outcomes == {"scored": 8}
        assert rollout.sampled is rollout.groups
        assert (rollout.rounds, rollout.skipped, rollout.updates) == (None, None, [])
    assert stream.ahead is None


def test_weights_are_synced_once_a_rollout_with_their_version() -> None:
    stream = stream_of()
    assert [rollout.version for rollout in run(stream, 3, updates=4)] == [0, 4, 8]
    assert engine_of(stream).synced == [0, 4, 8]


def test_a_rollout_is_a_function_of_its_number() -> None:
    """Whatever was sampled before it; every pass draws every prompt once, in another order."""
    expected = list(map(shown, run(stream_of(), 6)))
    assert shown(stream_of().make(4, version=0)) == expected[4]
    passes = [[index for rollout in part for index, _ in rollout[1]] for part in (expected[:3], expected[3:])]
    assert all(len(set(part)) == 6 for part in passes), "7 prompts make 3 rollouts of 2"
    assert passes[0] != passes[1]


def test_two_processes_share_the_prompts_and_seeds_of_one() -> None:
    prompts, seeds = requests(stream_of(), 2)
    halves = [requests(stream_of(peers=Peers(rank, 2, lambda item: [item])), 2) for rank in (0, 1)]
    assert [part for half in halves for part in half[0]] == prompts
    assert [part for half in halves for part in half[1]] == seeds
    assert len({seed + n for seed in seeds for n in range(4)}) == 8


@pytest.mark.parametrize("updates", [1, 2])
def test_ahead_by_one(updates: int) -> None:
    """The next rollout has the weights from before this one is trained on; the prompts and seeds are the same as ever."""
    stream, plain = stream_of(), stream_of()
    rollouts = []
    for index in range(3):
        rollouts.append(stream.make(index, version=index * updates, ahead=index < 2))
        asked = stream.ahead
        assert (asked and (asked.index, asked.version)) == ((index + 1, index * updates) if index < 2 else None)
    assert [rollout.version for rollout in rollouts] == [0, 0, updates]
    assert engine_of(stream).synced == [0, 0, updates]
    assert list(map(shown, rollouts)) == list(map(shown, run(plain, 3)))


def test_a_checkpoint_holds_what_was_sampled_ahead() -> None:
    stream = stream_of()
    first = stream.make(0, version=0, ahead=True)
    state = pickle.dumps(stream.state_dict())
    expected = [shown(stream.make(1, version=1, ahead=True)), shown(stream.make(2, version=2))]
    resumed = stream_of()
    resumed.load_state_dict(pickle.loads(state))
    again = run(resumed, 2, start=1, ahead=True)
    assert list(map(shown, again)) == expected
    assert [rollout.version for rollout in again] == [0, 1]
    assert engine_of(resumed).synced == [1], "rollout 2's; rollout 1 was there"
    assert shown(first)[0] == 0


def test_what_was_sampled_ahead_for_another_rollout_is_not_taken() -> None:
    stream = stream_of()
    stream.make(0, version=0, ahead=True)
    assert shown(stream.make(5, version=9)) == shown(stream_of().make(5, version=9))
    assert engine_of(stream).synced == [0, 0, 9]


def test_settling_finishes_what_is_sampled_ahead_before_the_engine_gets_other_weights() -> None:
    stream = stream_of()
    stream.make(0, version=0, ahead=True)
    engine = engine_of(stream)
    assert (len(engine.asked), engine.answered) == (2, 2), "the fake samples when it is waited for"
    stream.settle()
    assert engine.answered == 4
    engine.answer = lambda *asked: [0]
    assert shown(stream.make(1, version=1)) == shown(stream_of().make(1, version=1))


def test_a_reset_forgets_the_rollout_ahead() -> None:
    stream = stream_of()
    stream.make(0, version=0, ahead=True)
    stream.reset()
    assert stream.ahead is None
    stream.make(1, version=7)
    assert engine_of(stream).synced == [0, 0, 7]
