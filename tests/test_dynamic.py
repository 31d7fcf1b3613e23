"""Dynamic sampling, skipping of solved prompts and curricula: which prompts a rollout samples, keeps and learns from."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grpo_hf.algorithm.advantages import centered
from grpo_hf.metrics import Metrics
from grpo_hf.rewards.loading import choose
from grpo_hf.rollout.dynamic import CURRICULA, Choice, History, Memory, chosen, skip_solved
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Plan
from grpo_hf.rollout.prompts import PromptOrder, derived_seed
from grpo_hf.rollout.record import record_rollout
from grpo_hf.rollout.stream import Rollout
from grpo_hf.types import Completion, Group
from tests.peers import on_processes
from tests.runs import values
from tests.samples import group
from tests.streams import STOP, FakeEngine, make_stream, shown
from tests.tiny import tiny_trainer

NUMBER_OF_PROMPTS = 12
MIXED, FLAT, SOLVED = (0, 1, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1)


def right(completion: str) -> float:
    """w1 is a right answer."""
    return float(completion.split()[0] == "w1")


SKIP_AT_ONCE = partial(skip_solved, after=1, revisit_after=1)


class Run:
    """A stream over prompts that are told apart by their first token, whose groups are right or wrong by prompt."""

    def __init__(
        self, answers: Callable[[int], tuple[int, ...]], *, peers: Peers = ALONE, prompts_per_rollout: int = 2, **choice: Any
    ):
        self.engine = FakeEngine(lambda ids, seed, n: [answers(ids[0])[n], (seed + n) % 89, STOP])
        prompts = [f"w{n}" for n in range(NUMBER_OF_PROMPTS)]
        sizes = {"prompts_per_rollout": prompts_per_rollout, "peers": peers}
        self.stream = make_stream(prompts, right, self.engine, choice=Choice(**choice), **sizes)
        self.next = 0

    def epoch(self) -> list[Rollout]:
        """The rollouts of one pass over the prompts."""
        first, self.next = self.next, self.next + self.stream.order.rollouts_per_epoch
        return [self.stream.make(index, version=index) for index in range(first, self.next)]


def measured(rollout: Rollout) -> dict[str, float]:
    """What is logged of it, once it is planned."""
    Plan(centered, [1.0], 1, max_completion_length=3).updates(rollout.groups, 0, ALONE)
    metrics = Metrics()
    record_rollout(metrics, rollout, ALONE)
    return metrics.flush(lambda part: [part], steps=1)


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def rows(rollout: Rollout) -> list[int]:
    return [group.prompt.index for group in rollout.groups]


def test_uninformative_groups_are_replaced() -> None:
    """Refills come one round after the other, in an order of their own, each with a seed of its own."""
    own, refills = PromptOrder(NUMBER_OF_PROMPTS, 2, 0).prompts(0), PromptOrder(NUMBER_OF_PROMPTS, 2, 0).refills(0)
    others = [row for row in refills if row not in own]
    run = Run(lambda prompt: FLAT if prompt in (own[0], others[0]) else MIXED, dynamic_sampling=True)
    rollout = run.stream.make(0, version=0)
    assert run.engine.asked == [own, [others[0]], [others[1]]]
    assert rows(rollout) == [own[1], others[1]]
    assert [group.prompt.index for group in rollout.sampled] == [*own, *others[:2]]
    assert flat(run.engine.seeds) == [derived_seed(0, "sample", 0, place) for place in range(4)]
    assert run.engine.synced == [0]
    assert rollout.tally["right"].count == 4 * 4, "of all rounds"
    logged = measured(rollout)
    assert [logged[f"dynamic/{name}"] for name in ("rounds", "acceptance", "sampled_per_kept")] == [3, 0.5, 2]
    assert (logged["dynamic/reward"], logged["tokens/sampled"]) == (0.25, 2 * 4 * 3 * 2), "of those that are left out too"


@pytest.mark.parametrize("dynamic", [False, True])
def test_where_all_are_informative_nothing_changes(dynamic: bool) -> None:
    run, plain = Run(lambda prompt: MIXED, dynamic_sampling=dynamic), Run(lambda prompt: MIXED)
    assert list(map(shown, run.epoch())) == list(map(shown, plain.epoch()))
    assert run.engine.asked == plain.engine.asked


def test_the_bound() -> None:
    """Then groups without signal fill the rollout, which goes on with gradient 0."""
    run = Run(lambda prompt: FLAT, dynamic_sampling=True, max_rounds=3)
    rollout = run.stream.make(0, version=0)
    assert len(run.engine.asked) == rollout.rounds == 3
    assert rows(rollout) == run.engine.asked[0]
    assert len(set(flat(run.engine.asked))) == 6, "all different"
    (update,) = Plan(centered, [1.0], 1, max_completion_length=3).updates(rollout.groups, 0, ALONE)
    assert update.idle


def test_it_ends_when_no_prompt_is_left() -> None:
    run = Run(lambda prompt: FLAT, prompts_per_rollout=5, dynamic_sampling=True, max_rounds=9)
    run.stream.make(0, version=0)
    assert [len(asked) for asked in run.engine.asked] == [5, 5, 2]


def test_the_over_sampling_factor_learns() -> None:
    """From every second group being informative: a round of one group becomes one of about two."""
    run = Run(lambda prompt: MIXED if prompt % 2 else FLAT, dynamic_sampling=True, max_rounds=1)
    acceptance = []
    for index in range(24):
        run.stream.make(index, version=index)
        acceptance.append(run.stream.memory.acceptance)
    assert sum(acceptance[6:]) / 18 == pytest.approx(0.5, abs=0.05)
    assert len(run.engine.asked[0]) == 2
    assert sum(map(len, run.engine.asked[6:])) / 18 == pytest.approx(4, abs=1)
    memory = Memory(acceptance=0.1)
    assert (memory.oversampled(2), memory.oversampled(0)) == (20, 0)


def test_informative_groups_first_in_the_order_drawn() -> None:
    def with_rewards(number: int, *rewards: float) -> Group:
        return group([1], [Completion([2], False, reward=reward) for reward in rewards], number)

    nan = math.nan
    drawn = [with_rewards(0, 1, 1), with_rewards(1, 0, 1), with_rewards(2, nan, 1), with_rewards(3, nan, 0, 1)]
    assert [item.prompt.index for item in chosen(drawn, 3)] == [1, 3, 0]


def test_two_processes_sample_as_often() -> None:
    """One that has its share samples nothing; no prompt is drawn twice, and both remember the same."""
    own = PromptOrder(NUMBER_OF_PROMPTS, 4, 0).prompts(0)

    def process(peers: Peers) -> tuple[Run, Rollout]:
        run = Run(
            lambda prompt: FLAT if prompt in own[2:] else MIXED,
            prompts_per_rollout=4,
            peers=peers,
            dynamic_sampling=True,
            curricula=(skip_solved,),
        )
        rollout = run.stream.make(0, version=0)
        run.stream.make(0, version=0)  # teaches nothing twice
        del run.engine.asked[2:]
        return run, rollout

    (one, first), (two, second) = on_processes(process)
    assert one.engine.asked == [own[:2], []]
    assert two.engine.asked[0] == own[2:] and len(two.engine.asked[1]) == 2
    assert len({*rows(first), *rows(second)}) == 4
    assert one.stream.memory == two.stream.memory
    assert {row: len(rates) for row, rates in one.stream.memory.histories.items()} == dict.fromkeys(
        [*own, *two.engine.asked[1]], 1
    )
    assert one.stream.memory.acceptance == pytest.approx(0.7 + 0.3 * 4 / 6)


def test_a_skipped_prompt_is_the_same_on_one_and_two_processes() -> None:
    """A curriculum alone draws no more prompts, so the number of processes changes nothing."""

    def asked(peers: Peers) -> list[list[int]]:
        run = Run(lambda p: SOLVED if p % 3 else MIXED, prompts_per_rollout=4, peers=peers, curricula=(SKIP_AT_ONCE,))
        for _ in range(3):
            run.epoch()
        return run.engine.asked

    halves = on_processes(asked)
    assert [first + second for first, second in zip(*halves, strict=True)] == asked(ALONE)


HISTORIES: dict[str, tuple[History, bool]] = {
    "new": ([], True),
    "once": ([1.0], True),
    "twice": ([0.5, 1.0, 1.0], False),
    "not in a row": ([1.0, 0.75, 1.0], True),
    "skipped": ([1.0, 1.0, None, None], False),
    "looked at again": ([1.0, 1.0, None, None, None], True),
    "solved again": ([1.0, 1.0, None, None, None, 1.0], False),
    "lost again": ([1.0, 1.0, None, None, None, 0.5], True),
}


@pytest.mark.parametrize(("history", "sampled"), HISTORIES.values(), ids=HISTORIES)
def test_skipping_by_history(history: History, sampled: bool) -> None:
    assert skip_solved(history, after=2, revisit_after=3) is sampled


def test_solved_prompts_are_skipped_and_revisited() -> None:
    """Prompt 5 is solved on two passes, skipped for three, looked at, and skipped again; refills never draw it meanwhile."""
    run = Run(lambda prompt: SOLVED if prompt == 5 else MIXED, curricula=(partial(skip_solved, after=2, revisit_after=3),))
    visits = []
    for _ in range(9):
        before = len(run.engine.asked)
        run.epoch()
        drawn = flat(run.engine.asked[before:])
        assert len(drawn) == NUMBER_OF_PROMPTS
        visits.append(drawn.count(5))
    assert visits == [1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert run.stream.memory.histories[5] == [1.0, 1.0, None, None, None, 1.0, None, None, None]
    assert all(0.5 in history for row, history in run.stream.memory.histories.items() if row != 5)


def test_when_all_would_be_skipped_they_are_sampled(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(lambda prompt: MIXED, curricula=(lambda history: False,))
    rollouts = run.epoch()
    assert sorted(flat(map(rows, rollouts))) == list(range(NUMBER_OF_PROMPTS))
    assert caplog.text.count("sampled all the same") == 1
    assert [measured(rollout)["dynamic/skipped"] for rollout in rollouts] == [0] * 6


def not_too_easy(history: History) -> bool:
    """A curriculum as a user writes it."""
    return not history or history[-1] is None or history[-1] < 0.5


def test_a_curriculum_by_pass_rate(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def hard(history):\n    return not history or history[-1] is None\n")
    assert choose("curriculum", "skip_solved", CURRICULA) is skip_solved
    assert choose("curriculum", not_too_easy, CURRICULA) is not_too_easy
    hard = choose("curriculum", f"{tmp_path}/mine.py:hard", CURRICULA)
    assert [hard(history) for history in ([], [0.1], [0.1, None])] == [True, False, True]
    run = Run(lambda prompt: MIXED if prompt < 3 else FLAT, curricula=(not_too_easy,))
    for _ in range(2):
        run.epoch()
    second = flat(run.engine.asked[6:])
    assert len(second) == NUMBER_OF_PROMPTS and not {0, 1, 2} & set(second)


@pytest.mark.parametrize("ahead", [False, True])
def test_resume_from_any_rollout(ahead: bool) -> None:
    """From the state on a rollout's edge, also the one that lies before a rollout which is made again."""

    def start() -> Run:
        answers = {0: SOLVED, 1: MIXED, 2: FLAT}
        return Run(lambda prompt: answers[prompt % 3], dynamic_sampling=True, curricula=(SKIP_AT_ONCE,))

    def rest(run: Run, first: int, count: int) -> list:
        states.append(pickle.dumps(run.stream.state_dict()))
        found = []
        for index in range(first, count):
            found.append(shown(run.stream.make(index, version=index, ahead=ahead)))
            states.append(pickle.dumps(run.stream.state_dict()))
        return found

    states: list[bytes] = []
    expected = rest(start(), 0, 12)
    saved = list(states)
    for finished in range(12):
        resumed = start()
        resumed.stream.load_state_dict(pickle.loads(saved[finished]))
        assert rest(resumed, finished, 12) == expected[finished:]
    again = start()
    again.stream.load_state_dict(pickle.loads(saved[5]))  # written after rollout 4 was made
    again.stream.make(4, version=4)
    assert again.stream.memory.rollouts == 5, "a rollout that is made again teaches nothing twice"


def first_is_even(completion: str) -> float:
    """About every third group of four agrees."""
    return float(int(("w1 " + completion).split()[-1].removeprefix("w")) % 4 == 0)


def test_a_run(tmp_path: Path) -> None:
    dataset = [{"prompt": f"w{n} w{n + 1}"} for n in range(40)]
    trainer = tiny_trainer(tmp_path, max_steps=6, reward=first_is_even, dataset=dataset, dynamic_sampling=True)
    trainer.train()
    assert values(trainer, "frac_reward_zero_std") == [0.0] * 6
    assert min(values(trainer, "dynamic/acceptance")) < 1 < max(values(trainer, "dynamic/sampled_per_kept"))


def test_a_curriculum_survives_a_checkpoint(tmp_path: Path) -> None:
    """A function too, which is compared by its name."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "curriculum": not_too_easy, "solved_reward": 2.0}
    tiny_trainer(tmp_path, max_steps=4, **settings).train()
    resumed = tiny_trainer(tmp_path, max_steps=6, **settings)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.stream.memory.rollouts >= 5
    assert max(values(resumed, "dynamic/skipped")) > 0
