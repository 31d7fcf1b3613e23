"""Outcomes: what each call ended as, what becomes of its completion, and when a run stops."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from grpo_hf.rewards import (
    NO_ANSWER,
    BadGoldError,
    RewardFaultError,
    RewardSettings,
    Scorer,
    check_gold,
    get_rewards,
    parses_gold,
    score_samples,
)
from grpo_hf.rewards.faults import Tally, merged, stop_if_faulty
from grpo_hf.rewards.outcomes import NoAnswer
from grpo_hf.rollout.stream import set_rewards
from grpo_hf.types import Completion, Group, Prompt, Sample

QUICK = RewardSettings(timeout=1.0, workers=1)


def group(raw: Any, texts: Sequence[str], index: int = 0, **row: Any) -> Group:
    completions = [Completion(ids=[1], truncated=False, text=text) for text in texts]
    return Group(prompt=Prompt(ids=[0], raw=raw, row=row, index=index), completions=completions)


def settle(
    rewards: Any, groups: list[Group], *, weights: Any = None, settings: RewardSettings = QUICK, **options: Any
) -> tuple[Tally, dict[str, list[float]]]:
    """Score groups, in the order that an engine might finish them in; the counts, and what was logged."""
    metrics: dict[str, list[float]] = {}
    scorer = Scorer(get_rewards(rewards), weights, settings)
    with scorer.round(options.get("trainer_state")) as scoring:
        scoring.expect(one.prompt.row for one in groups)
        for place in reversed(range(len(groups))):
            scoring.add_group(place, groups[place])
        tally = scorer.settle(groups, list(scoring.verdicts()), lambda k, v: metrics.setdefault(k, []).append(v))
    set_rewards(groups, scorer.weights)
    scorer.close()
    return tally, metrics


def of_all(groups: list[Group], value: Callable[[Completion], Any]) -> list[Any]:
    return [value(completion) for one in groups for completion in one.completions]


# ---- How calls are made

WAYS = ["worker", "in_process", "async", "batch", "batch in_process", "async batch"]


def in_way(way: str, judge: Callable[[str], Any]) -> Any:
    """The same judgement as a verifier of each form."""

    def one(completion: str) -> Any:
        return judge(completion)

    async def one_async(completion: str) -> Any:
        await asyncio.sleep(0)
        return judge(completion)

    def batch(completions: list[str]) -> list[Any]:
        return [judge(text) for text in completions]

    async def batch_async(completions: list[str], **kwargs: Any) -> list[Any]:
        await asyncio.sleep(0)
        return [judge(text) for text in completions]

    forms = {"worker": one, "": one, "async": one_async, "batch": batch, "async batch": batch_async}
    form, here = way.removesuffix("in_process").strip(), way.endswith("in_process")
    return {"name": forms[form], "in_process": True} if here else forms[form]


def judge(text: str) -> Any:
    """One of each outcome."""
    if text == "bad":
        raise BadGoldError("no number in it")
    if text == "raise":
        raise KeyError("as planned")
    return {"none": None, "nothing": NO_ANSWER, "some": NoAnswer(0.25), "text": "1.0"}.get(text, 1.0)


@pytest.mark.parametrize("way", WAYS)
def test_outcomes_are_the_same_in_every_form(way: str) -> None:
    texts = ["right", "none", "nothing", "some", "text"]
    outcomes = ["scored", "scored", "no_answer", "no_answer", "error"]
    if "batch" not in way:
        texts, outcomes = [*texts, "bad", "raise"], [*outcomes, "bad_gold", "error"]
    groups = [group("Q", texts)]
    tally, _ = settle(in_way(way, judge), groups)
    (name,) = tally
    assert of_all(groups, lambda item: item.outcomes[name]) == outcomes
    scores = of_all(groups, lambda item: item.rewards[name])
    assert scores[:1] == [1.0] and math.isnan(scores[1]) and scores[2:5] == [0.0, 0.25, 0.0]
    if "batch" not in way:
        assert math.isnan(scores[5]) and scores[6] == 0.0
        assert any("KeyError: 'as planned'" in item.verdict.message for item in tally[name].offenders["error"])


@pytest.mark.parametrize("way", ["batch", "batch in_process", "async batch"])
def test_a_batch_that_raises_is_an_error_of_all_its_samples(way: str) -> None:
    groups = [group("Q", ["right", "raise"]), group("Q", ["right"])]
    tally, _ = settle(in_way(way, judge), groups)
    (calls,) = tally.values()
    assert calls.outcomes == {"error": 3} and of_all(groups, lambda item: item.reward) == [0.0] * 3


def test_a_batch_is_called_once_with_all_samples_in_the_prompts_order() -> None:
    seen = []

    def f(prompts: Any, completions: Any, level: Any) -> list[float]:
        seen.append((prompts, completions, level))
        return [float(n) for n in range(len(prompts))]

    chat = [{"role": "user", "content": "Q"}]
    groups = [group("Q", ["a", "b"], level=1), group(chat, ["c"], level=2)]
    settle({"name": f, "in_process": True}, groups)
    assert seen == [(["Q", "Q", chat], ["a", "b", [{"role": "assistant", "content": "c"}]], [1, 1, 2])]
    assert of_all(groups, lambda item: item.reward) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_batch_has_the_deadline_of_its_samples_together(is_async: bool) -> None:
    def f(completions: list[str], **kwargs: Any) -> list[float]:
        time.sleep(1000 if "hang" in completions else 0.9)
        return [1.0] * len(completions)

    async def f_async(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(1000 if "hang" in completions else 0.9)
        return [1.0] * len(completions)

    verifier, settings = f_async if is_async else f, RewardSettings(timeout=0.5, workers=1)
    start = time.monotonic()
    tally, _ = settle(verifier, [group("Q", ["a", "b"]), group("Q", ["c", "d"])], settings=settings)
    (calls,) = tally.values()
    assert calls.outcomes == {"scored": 4}, "2 s for four samples"
    groups = [group("Q", ["a", "hang"])]
    tally, _ = settle(verifier, groups, settings=settings)
    (calls,) = tally.values()
    assert calls.outcomes == {"timeout": 2} and of_all(groups, lambda item: item.reward) == [0.0, 0.0]
    assert calls.seconds == pytest.approx(1.0) and "deadline of 1 s" in calls.offenders["timeout"][0].verdict.message
    assert time.monotonic() - start < 60


def test_a_batch_runs_in_a_worker_with_a_memory_limit(tmp_path: Path) -> None:
    def f(completions: list[str], trainer_state: Any, log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        if "huge" in completions:
            bytearray(10 * 2**30)
        log_extra("step", [trainer_state.global_step] * len(completions))
        log_metric("n", len(completions))
        return [float(os.getpid())] * len(completions)

    groups = [group("Q", ["a", "b"])]
    _, metrics = settle(f, groups, trainer_state=State(global_step=7))
    assert os.getpid() not in of_all(groups, lambda item: item.reward)
    assert metrics == {"n": [2.0]} and of_all(groups, lambda item: item.extra) == [{"step": 7}] * 2
    tally, _ = settle(f, [group("Q", ["a", "huge"])], trainer_state=State(global_step=7))
    assert tally["f"].outcomes == {"crash": 2}


@dataclass
class State:
    """What a trainer's state has."""

    global_step: int


def test_rewards_are_weighted_sums_over_what_applies() -> None:
    def right(completion: str, answer: str) -> float:
        return float(completion == answer)

    def short(completion: str) -> float | None:
        return None if completion == "no" else -0.5

    def never(completions: list, **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    groups = [group("Q", ["yes", "no"], answer="yes"), group([{"role": "user", "content": "Q"}], ["a"], answer="a")]
    settle([right, short, never], groups, weights=[2.0, 1.0, 9.0])
    assert of_all(groups, lambda item: item.reward) == [1.5, 0.0, 1.5]
    first = groups[0].completions[0].rewards
    assert (first["right"], first["short"]) == (1.0, -0.5) and math.isnan(first["never"])
    settle(never, groups[:1])
    assert math.isnan(groups[0].completions[0].reward)


def test_weights_and_names_are_checked() -> None:
    rewards = get_rewards(["format", "exact_match"])
    with pytest.raises(ValueError, match=r"1 reward weights for 2 rewards \(format, exact_match\)"):
        Scorer(rewards, [1.0])
    with pytest.raises(ValueError, match="two rewards have one name: format, format"):
        Scorer([rewards[0]] * 2, [1.0, 1.0])
    with pytest.raises(ValueError, match="'exact_match' asks for the column 'answer'"):
        list(score_samples(rewards, [Sample("Q", "a", "a", [1], {"question": "b"})]))


@pytest.mark.parametrize("way", WAYS)
def test_nan_is_an_error_and_none_is_not(way: str) -> None:
    verdict = {"a": 1.0, "none": None, "nan": math.nan}
    groups = [group("Q", ["a", "none", "nan"])]
    tally, _ = settle(in_way(way, lambda text: verdict[text]), groups)
    (calls,) = tally.values()
    assert calls.outcomes == {"scored": 2, "error": 1} and calls.blank == 1
    assert "expected a finite number, or None where it does not apply" in calls.offenders["error"][0].verdict.message


def test_rewards_that_are_none_throughout_are_said_and_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def never(completion: str) -> float | None:
        return 1.0 if completion == "some" else None

    def other(completions: list[str], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    scorer = Scorer(get_rewards([never, other]), settings=QUICK)

    def rollout(*texts: str) -> Tally:
        groups = [group("Q", texts)]
        with scorer.round() as scoring:
            scoring.add_group(0, groups[0])
            return scorer.settle(groups, list(scoring.verdicts()), lambda *_: None)

    for texts in (["a", "b"], ["a"], ["some", "a"], ["a"], ["a", "b"]):
        stop_if_faulty(merged([rollout(*texts)]), QUICK)
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and "'never' 2 None; 'other' 2 None" in said[0]
    third = rollout("a")
    with pytest.raises(RewardFaultError, match=r"no completion of 3 rollouts in a row .*'never' 1 None; 'other' 1 None"):
        stop_if_faulty(third, QUICK)
    fine = {name: replace(calls, blank_rollouts=0) for name, calls in third.items()}
    stop_if_faulty(merged([third, fine]), QUICK)
    scorer.close()


# ---- Async calls


def test_async_calls_run_concurrently_up_to_a_limit_and_each_has_the_deadline() -> None:
    running = most = 0

    async def f(completion: str) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.sleep(1000 if completion == "hang" else 0.02)
        except asyncio.CancelledError:
            if completion == "hang":
                await asyncio.sleep(2)  # refuses to be cancelled
        running -= 1
        return 1.0

    groups = [group("Q", ["a"] * 11 + ["hang"])]
    settings = RewardSettings(timeout=0.5, concurrency=4)
    tally, _ = settle(f, groups, settings=settings)
    assert tally["f"].outcomes == {"scored": 11, "timeout": 1}
    assert most == 4
    assert groups[0].completions[-1].reward == 0.0


def test_an_async_call_that_exits_ends_no_other_call() -> None:
    async def f(completion: str) -> float:
        if completion == "exit":
            raise SystemExit(3)
        await asyncio.sleep(0.1)
        return 1.0

    tally, _ = settle(f, [group("Q", ["a", "exit", "a"])], settings=RewardSettings(timeout=5.0, max_fault_share=1.0))
    assert tally["f"].outcomes == {"scored": 2, "error": 1}
    assert "SystemExit(3)" in tally["f"].offenders["error"][0].verdict.message


def test_an_async_call_that_blocks_the_loop_does_not_hang_the_run() -> None:
    async def f(completion: str) -> float:
        if completion == "block":
            time.sleep(4)
        return 1.0

    scorer = Scorer(get_rewards(f), settings=RewardSettings(timeout=0.5))

    def outcomes(texts: list[str]) -> list[str]:
        groups = [group("Q", texts)]
        with scorer.round() as scoring:
            scoring.add_group(0, groups[0])
            scorer.settle(groups, list(scoring.verdicts()), lambda *_: None)
        return of_all(groups, lambda item: item.outcomes["f"])

    assert outcomes(["block"]) == ["timeout"]
    assert outcomes(["a", "a"]) == ["scored", "scored"], "on a new loop"


# ---- Gold answers


@dataclass
class Counting:
    """Parses integers, and notes each time in a file."""

    log: Path
    parsed: list[int] = field(default_factory=list)

    def verifier(self) -> Any:
        log = self.log

        def number(answer: str) -> int:
            with log.open("a") as file:
                file.write("parsed\n")
            if answer == "hang":
                while True:
                    pass
            if answer == "huge":
                bytearray(10 * 2**30)
            if answer == "none":
                raise BadGoldError("the answer 'none' has no number")
            return int(answer)

        @parses_gold(number)
        def equals(completion: str, answer: int, *, scale: float = 1.0) -> float:
            return scale * (int(completion) == answer)

        return equals


@pytest.mark.parametrize("in_process", [False, True], ids=["worker", "here"])
def test_gold_answers_are_parsed_once_a_prompt(tmp_path: Path, in_process: bool) -> None:
    verifier = {"name": Counting(tmp_path / "log").verifier(), "scale": 2.0, "in_process": in_process}
    groups = [group("Q", ["7", "8", "7"], answer="7"), group("Q", ["1", "2"], answer="none"), group("Q", ["3"], answer="x")]
    tally, _ = settle(verifier, groups)
    assert len((tmp_path / "log").read_text().splitlines()) == 3
    rewards = of_all(groups, lambda item: item.reward)
    assert rewards[:3] == [2.0, 0.0, 2.0] and all(map(math.isnan, rewards[3:])), "bad gold leaves completions out"
    assert tally["equals"].outcomes == {"scored": 3, "bad_gold": 3}


def test_a_gold_answer_whose_parsing_hangs_or_crashes_is_bad(tmp_path: Path) -> None:
    groups = [group("Q", ["7", "8"], answer=answer) for answer in ("hang", "huge", "7")]
    tally, _ = settle(Counting(tmp_path / "log").verifier(), groups)
    assert tally["equals"].outcomes == {"bad_gold": 4, "scored": 2}
    messages = " ".join(item.verdict.message for item in tally["equals"].offenders["bad_gold"])
    assert "deadline of 1 s" in messages and "MemoryError" in messages


@pytest.mark.parametrize("in_process", [False, True], ids=["worker", "here"])
def test_bad_gold_rows_are_found_before_training(tmp_path: Path, in_process: bool) -> None:
    verifier = {"name": Counting(tmp_path / "log").verifier(), "in_process": in_process}
    answers = [str(number) for number in range(40)]
    answers[3], answers[21] = "none", "x"
    if not in_process:
        answers[30] = "hang"
    rewards = get_rewards([verifier, "exact_match"])
    bad = check_gold(rewards, [{"answer": answer} for answer in answers], settings=QUICK)
    assert [(item.row, item.verifier) for item in bad] == [(row, "equals") for row in (3, 21, 30)[: 2 + (not in_process)]]
    assert "the answer 'none' has no number" in bad[0].message and "ValueError" in bad[1].message
    assert check_gold(get_rewards("exact_match"), [{"answer": "none"}]) == []


# ---- What verifiers log


@pytest.mark.parametrize("in_process", [False, True], ids=["worker", "here"])
def test_log_metric_and_log_extra_of_single_samples(in_process: bool) -> None:
    def f(completion: str, log_metric: Any, log_extra: Any, trainer_state: Any) -> float:
        log_metric("length", len(completion) + trainer_state["step"])
        log_extra("upper", completion.upper())
        if completion == "fail":
            raise ValueError
        return 1.0

    groups = [group("Q", ["a", "bb", "fail"])]
    _, metrics = settle({"name": f, "in_process": in_process}, groups, trainer_state={"step": 10})
    assert metrics["length"] == [11.0, 12.0], "not what a failed call has said"
    assert of_all(groups, lambda item: item.extra) == [{"upper": "A"}, {"upper": "BB"}, {}]


def test_log_extra_of_a_batch_is_a_value_for_each_sample() -> None:
    def f(completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("once", 3)
        log_extra("upper", [text.upper() for text in completions])
        return [1.0] * len(completions)

    def short(completions: list[str], log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("upper", ["A"])
        return [1.0] * len(completions)

    groups = [group("Q", ["a", "b"]), group("Q", ["c"])]
    _, metrics = settle(f, groups)
    assert metrics == {"once": [3.0]} and of_all(groups, lambda item: item.extra) == [{"upper": c} for c in "ABC"]
    tally, _ = settle(short, groups)
    assert (
        "log_extra('upper', ...) was given 1 values for 3 completions"
        in tally["short"].offenders["error"][0].verdict.message
    )


# ---- Policies, and when a run stops


def test_each_outcome_follows_its_policy() -> None:
    groups = [group("Q", ["right", "nothing", "raise"])]
    policy = {"no_answer": "drop", "error": "drop"}
    settle(in_way("worker", judge), groups, settings=RewardSettings(policy=policy, workers=1))
    rewards = of_all(groups, lambda item: item.reward)
    assert rewards[0] == 1.0 and all(map(math.isnan, rewards[1:]))


def test_one_verifiers_dropped_call_drops_the_completion() -> None:
    groups = [group("Q", ["right", "raise"])]
    rewards = [in_way("worker", judge), lambda completion: 0.5]
    settle(rewards, groups, settings=RewardSettings(policy={"error": "drop"}, workers=1))
    assert groups[0].completions[0].reward == 1.5 and math.isnan(groups[0].completions[1].reward)


def faulty(count: int, of: int, settings: RewardSettings) -> Tally:
    groups = [group("Q", ["raise"] * count + ["right"] * (of - count), index=12)]
    return settle(in_way("in_process", judge), groups, settings=settings)[0]


@pytest.mark.parametrize(("count", "of", "stops"), [(1, 100, False), (20, 100, False), (21, 100, True), (4, 4, True)])
def test_a_run_stops_when_faults_pass_their_share(count: int, of: int, stops: bool) -> None:
    tally = faulty(count, of, QUICK)
    if not stops:
        stop_if_faulty(tally, QUICK)
        return
    with pytest.raises(RewardFaultError) as error:
        stop_if_faulty(tally, QUICK)
    text = str(error.value)
    assert f"the verifier 'one' was called {of} times" in text and f"{count} error" in text
    assert "more than reward_max_fault_share=0.2 allows" in text
    assert "on row 12, completion 'raise'" in text and "KeyError: 'as planned'" in text and "Traceback" in text
    assert text.count("on row 12") == min(count, 3)


def test_the_share_is_that_of_all_processes() -> None:
    mine, others = faulty(4, 10, QUICK), faulty(0, 10, QUICK)
    with pytest.raises(RewardFaultError, match="40% of them"):
        stop_if_faulty(mine, QUICK)
    stop_if_faulty(merged([mine, others]), QUICK)


def test_of_few_calls_some_faults_may_be_chance_and_all_may_not() -> None:
    stop_if_faulty(faulty(1, 4, QUICK), QUICK)
    stop_if_faulty(faulty(3, 8, QUICK), QUICK)
    for faults, calls in ((4, 4), (1, 1), (4, 8)):
        with pytest.raises(RewardFaultError):
            stop_if_faulty(faulty(faults, calls, QUICK), QUICK)


def test_a_policy_can_stop_at_the_first() -> None:
    settings = RewardSettings(policy={"error": "stop"})
    with pytest.raises(RewardFaultError, match="reward_policy stops the run at error"):
        stop_if_faulty(faulty(1, 100, settings), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "reward_timeout=0, but reward_timeout > 0 is needed"),
        ({"memory_gb": -1}, "reward_memory_gb=-1, but"),
        ({"workers": 0}, "reward_workers=0, but"),
        ({"concurrency": 0}, "reward_concurrency=0, but"),
        ({"max_fault_share": 2}, "reward_max_fault_share=2, but 0 <= reward_max_fault_share <= 1 is needed"),
        ({"policy": {"timeuot": "drop"}}, r"no outcome 'timeuot', only .* \(nearest: timeout\)"),
        ({"policy": {"timeout": "skip"}}, r"reward_policy\['timeout'\]='skip' is not one of zero, drop, stop"),
        ({"policy": {"scored": "drop"}}, "no outcome 'scored'"),
        ({"policy": "drop"}, "reward_policy='drop' must map outcomes"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(**settings)


# ---- score_samples


def test_score_samples_streams_verdicts_in_order() -> None:
    def slow(completion: str) -> float:
        time.sleep(0.01 if completion == "a" else 0)
        return float(len(completion))

    def whole(completions: list[str]) -> list[float]:
        return [float(number) for number in range(len(completions))]

    samples = [Sample("Q", text, text, [1], {}) for text in ("a", "bb", "ccc")]
    found = list(score_samples(get_rewards([slow, whole]), samples))
    assert [(one["slow"].score, one["whole"].score) for one in found] == [(1.0, 0.0), (2.0, 1.0), (3.0, 2.0)]
    assert all(one["slow"].outcome == "scored" and one["slow"].message == "" for one in found)
    assert found[0]["slow"].seconds >= 0.01
    stream = score_samples(get_rewards(slow), samples)
    assert next(stream)["slow"].score == 1.0
    stream.close()  # gives the rest up
