"""Dynamic sampling, skipping of solved prompts and curricula: which prompts a rollout samples, keeps and learns from."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_hf.rewards import Scorer, get_rewards
from grpo_hf.rewards.loading import choose
from grpo_hf.rollout.dynamic import CURRICULA, Choice, History, Memory, chosen, skip_solved, solved_skipper
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Plan
from grpo_hf.rollout.prompts import PromptOrder, derived_seed, load_prompts
from grpo_hf.rollout.sampler import GroupSampler
from grpo_hf.rollout.stream import Rollout, RolloutStream
from grpo_hf.types import Completion, Group
from tests.runs import values
from tests.test_stream import tokens
from tests.tiny import group, tiny_tokenizer, tiny_trainer

NUMBER_OF_PROMPTS = 12
MIXED, FLAT, SOLVED = (0, 1, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1)


def right(completion: str) -> float:
    """FakeEngine writes w1 for a right answer."""
    return float(completion.split()[0] == "w1")


class FakeEngine:
    """Answers right or wrong by prompt and visit; remembers what it was asked for."""

    def __init__(self, answers: Callable[[int], tuple[int, ...]]):
        self.answers, self.asked, self.seeds, self.syncs = answers, [], [], 0

    def sync_weights(self) -> None:
        self.syncs += 1

    def sample(
        self, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.asked.append([ids[0] for ids in prompts])
        self.seeds.append(seeds)
        for number, ids in enumerate(prompts):
            right_or_wrong = self.answers(ids[0])
            yield number, [Completion([bit, (seeds[number] + n) % 89, 90], False) for n, bit in enumerate(right_or_wrong)]


class Run:
    """A stream over prompts that are told apart by their first token, and the loop that Trainer drives it by."""

    def __init__(
        self,
        answers: Callable[[int], tuple[int, ...]],
        *,
        finished: int = 0,
        prompts_per_rollout: int = 2,
        peers: Peers | None = None,
        iterations: int = 1,
        **choice: Any,
    ):
        self.finished, self.engine, tokenizer = finished, FakeEngine(answers), tiny_tokenizer()
        self.stream = RolloutStream(
            prompts=load_prompts([{"prompt": f"w{n}"} for n in range(NUMBER_OF_PROMPTS)], tokenizer),
            order=PromptOrder(NUMBER_OF_PROMPTS, prompts_per_rollout, seed=0),
            sampler=GroupSampler(self.engine, tokenizer, Scorer(get_rewards(right))),
            sampling=Sampling(max_completion_length=3, stop_token_ids=(90,)),
            num_generations=4,
            plan=Plan("centered", 1, "packed", 100, max_completion_length=3),
            num_iterations=iterations,
            finished_updates=lambda: self.finished,
            choice=Choice(**choice),
            **({"peers": peers} if peers else {}),
        )

    def steps(self) -> Iterator[dict[str, Any]]:
        """Every update of an epoch; one is finished when the next is asked for."""
        for item in self.stream:
            yield item
            self.finished += 1

    def measured(self) -> dict[str, float]:
        return self.stream.sampler.metrics.flush(lambda part: [part], steps=1)


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def rows(rollout: Rollout) -> list[int]:
    return [group.prompt.index for group in rollout.groups]


def test_uninformative_groups_are_replaced() -> None:
    """Refills come one round after the other, in an order of their own, each with a seed of its own."""
    own, refills = PromptOrder(NUMBER_OF_PROMPTS, 2, 0).prompts(0), PromptOrder(NUMBER_OF_PROMPTS, 2, 0).refills(0)
    others = [row for row in refills if row not in own]
    run = Run(lambda prompt: FLAT if prompt in (own[0], others[0]) else MIXED, dynamic_sampling=True)
    rollout = run.stream.make(0)
    assert run.engine.asked == [own, [others[0]], [others[1]]]
    assert rows(rollout) == [own[1], others[1]]
    assert flat(run.engine.seeds) == [derived_seed(0, "sample", 0, place) for place in range(4)]
    assert run.engine.syncs == 1
    assert run.stream.sampler.tally["right"].count == 4 * 4  # of all rounds
    measured = run.measured()
    assert [measured[f"dynamic/{name}"] for name in ("rounds", "acceptance", "sampled_per_kept")] == [3, 0.5, 2]
    assert (measured["dynamic/reward"], measured["tokens/sampled"]) == (0.25, 2 * 4 * 3)  # of those that are left out


@pytest.mark.parametrize("dynamic", [False, True])
def test_where_all_are_informative_nothing_changes(dynamic: bool) -> None:
    run, plain = Run(lambda prompt: MIXED, dynamic_sampling=dynamic), Run(lambda prompt: MIXED)
    assert [tokens(item) for item in run.steps()] == [tokens(item) for item in plain.steps()]
    assert run.engine.asked == plain.engine.asked


def test_the_bound() -> None:
    """Then groups without signal fill the rollout, which goes on with gradient 0."""
    run = Run(lambda prompt: FLAT, dynamic_sampling=True, max_rounds=3)
    rollout = run.stream.make(0)
    assert len(run.engine.asked) == 3
    assert rows(rollout) == run.engine.asked[0]
    assert len(set(flat(run.engine.asked))) == 6, "all different"
    assert [batch.weight for update in rollout.updates for batch in update.microbatches] == [0.0]


def test_it_ends_when_no_prompt_is_left() -> None:
    run = Run(lambda prompt: FLAT, prompts_per_rollout=5, dynamic_sampling=True, max_rounds=9)
    run.stream.make(0)
    assert [len(asked) for asked in run.engine.asked] == [5, 5, 2]


def test_the_over_sampling_factor_learns() -> None:
    """From every second group being informative: 1 + 1 / acceptance groups become one round of twice as many."""
    run = Run(lambda prompt: MIXED if prompt % 2 else FLAT, dynamic_sampling=True, max_rounds=1)
    for _ in range(4):
        for _item in run.steps():
            pass
    assert run.stream.memory.acceptance == pytest.approx(0.5, abs=0.15)
    assert run.stream.memory.oversampled(4) in (7, 8, 9, 10, 11, 12)
    assert len(run.engine.asked[0]) == 2 < len(run.engine.asked[-1])
    memory = Memory(acceptance=0.1)
    assert (memory.oversampled(2), memory.oversampled(0)) == (20, 0)


def test_informative_groups_first_in_the_order_drawn() -> None:
    def with_rewards(number: int, *rewards: float) -> Group:
        return group([1], [Completion([2], False, reward=reward) for reward in rewards], number)

    nan = math.nan
    drawn = [with_rewards(0, 1, 1), with_rewards(1, 0, 1), with_rewards(2, nan, 1), with_rewards(3, nan, 0, 1)]
    assert [item.prompt.index for item in chosen(drawn, 3)] == [1, 3, 0]


def together(make: Callable[[Peers], Any], count: int = 2) -> list[Any]:
    """What each of these processes makes, in threads that gather from each other."""
    barrier, slots, results = threading.Barrier(count, timeout=60), [None] * count, [None] * count

    def process(rank: int) -> None:
        def gather(item: Any) -> list[Any]:
            slots[rank] = item
            barrier.wait()
            everyone = list(slots)
            barrier.wait()
            return everyone

        results[rank] = make(Peers(rank, count, gather))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


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
        rollout = run.stream.rollout = run.stream.make(0)
        run.finished = 1
        run.stream.state_dict()
        run.stream.state_dict()  # teaches nothing twice
        return run, rollout

    (one, first), (two, second) = together(process)
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

    def asked(peers: Peers | None) -> list[list[int]]:
        run = Run(
            lambda p: SOLVED if p % 3 else MIXED, prompts_per_rollout=4, peers=peers, curricula=(solved_skipper(1, 1),)
        )
        for _ in range(3):
            for _item in run.steps():
                pass
        return run.engine.asked

    halves = together(asked)
    assert [first + second for first, second in zip(*halves, strict=True)] == asked(None)


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
    run = Run(lambda prompt: SOLVED if prompt == 5 else MIXED, curricula=(solved_skipper(2, 3),))
    visits = []
    for _ in range(9):
        before = len(run.engine.asked)
        for _item in run.steps():
            pass
        drawn = flat(run.engine.asked[before:])
        assert len(drawn) == NUMBER_OF_PROMPTS
        visits.append(drawn.count(5))
    assert visits == [1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert run.stream.memory.histories[5] == [1.0, 1.0, None, None, None, 1.0, None, None, None]
    assert all(0.5 in history for row, history in run.stream.memory.histories.items() if row != 5)


def test_when_all_would_be_skipped_they_are_sampled(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(lambda prompt: MIXED, curricula=(lambda history: False,))
    rollouts = [run.stream.make(number) for number in range(6)]
    assert sorted(flat(map(rows, rollouts))) == list(range(NUMBER_OF_PROMPTS))
    assert caplog.text.count("sampled all the same") == 1
    assert run.measured()["dynamic/skipped"] == 0


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
        for _item in run.steps():
            pass
    second = flat(run.engine.asked[6:])
    assert len(second) == NUMBER_OF_PROMPTS and not {0, 1, 2} & set(second)


@pytest.mark.parametrize("iterations", [1, 2])
def test_resume_from_any_number_of_finished_updates(iterations: int) -> None:
    """The state that lies on a rollout's edge, where that rollout is made again, too."""

    def start(finished: int = 0) -> Run:
        answers = {0: SOLVED, 1: MIXED, 2: FLAT}
        choice = {"dynamic_sampling": True, "curricula": (solved_skipper(1, 1),)}
        return Run(lambda prompt: answers[prompt % 3], finished=finished, iterations=iterations, **choice)

    run, expected, states = start(), [], []
    for _ in range(2):
        for item in run.steps():
            states.append(pickle.dumps(run.stream.state_dict()))
            expected.append(tokens(item))
    for finished in range(len(expected)):
        resumed = start(finished)
        resumed.stream.load_state_dict(pickle.loads(states[finished]))
        left = len(expected) // 2 - finished % (len(expected) // 2)
        assert [tokens(item) for item in resumed.steps()] == expected[finished : finished + left]


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


def test_killed_at_random_moments_it_is_the_same_run(tmp_path: Path) -> None:
    """Rollouts with refills and with skipped prompts; metrics, samples and weights to the last bit (invariant 6)."""
    settings = {"max_steps": 16, "dynamic_sampling": True, "skip_solved_after": 1, "revisit_after": 1}
    sizes = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 2}
    command = [sys.executable, "-m", "tests.killed_run", str(tmp_path), "--kills", "5", "--settings"]
    command.append(json.dumps(settings | sizes))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for name, least in (("rounds", 1), ("skipped", 0), ("sampled_per_kept", 1)):
        assert max(line.get(f"dynamic/{name}", 0) for line in lines) > least
