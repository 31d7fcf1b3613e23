"""Accuracy of `math`, and the speed of `math` and `gsm8k`: `python -m benchmarks.verifiers`.

Precision and recall, next to the exact string (of the answer that `math` finds) and to math-verify called bare and with the
gold answers in the dollar signs that it asks for, on

    pairs      tests/data/math_pairs.jsonl, by form
    answers    tests/data/answers.jsonl: how people and models write an answer, and how they try to be right without one
    made       completions of benchmarks.near_misses: right ones in many forms, near misses and hedges
    peers      the test cases of other graders, where ../shared/cases/peers_math.jsonl lies
    models     samples of four models on GSM8K, their marked last line cut off, where ../shared/gsm8k holds the
               example_model_solutions.jsonl that is published with GSM8K (--models names another place)

The labels are the lenient mode's: strict refuses unmarked answers, missing units and the like by design. Then samples per
second on GSM8K: every solution against its own answer and against another's, gold answers parsed once, in this process and
in two (--repeats 0 leaves this out). Writes benchmarks/results/verifiers.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import math_verify

from benchmarks.near_misses import made, solutions
from grpo_hf.reward_fns.gsm8k import gsm8k
from grpo_hf.reward_fns.math import math
from grpo_hf.reward_fns.math.find import find_answer
from grpo_hf.rewards.outcomes import BadGoldError

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
PEERS = ROOT.parent / "shared" / "cases" / "peers_math.jsonl"
GSM8K = ROOT.parent / "shared" / "gsm8k"
MODELS = GSM8K / "example_model_solutions.jsonl"
CHUNK = 256
MADE = 10_000

Judge = Callable[[str, str], bool]


class Case(NamedTuple):
    """A completion, a gold answer, and whether a reader takes the first for the second."""

    completion: str
    gold: str
    equal: bool
    form: str
    """What kind of case it is."""


def exact_string(completion: str, gold: str) -> bool:
    """The same answer, letter for letter."""
    return (find_answer(completion, strict=False) or "").strip(" $") == (find_answer(gold, strict=True) or gold).strip(" $")


def bare(completion: str, gold: str) -> bool:
    """math-verify with its defaults."""
    return bool(math_verify.verify(math_verify.parse(gold), math_verify.parse(completion)))


def bare_in_dollars(completion: str, gold: str) -> bool:
    """The same, the gold answer marked as TeX."""
    return bare(completion, gold if "$" in gold or "####" in gold else f"${gold}$")


JUDGES: dict[str, Judge] = {
    "math, lenient": lambda completion, gold: math(completion, gold) == 1.0,
    "math, strict": lambda completion, gold: math(completion, gold, mode="strict") == 1.0,
    "math-verify": bare,
    "math-verify, gold in $": bare_in_dollars,
    "exact string": exact_string,
}


def agrees(judge: Judge, case: Case) -> bool:
    """The verdict; a gold answer that cannot be read accepts nothing."""
    try:
        return judge(case.completion, case.gold)
    except BadGoldError:
        return False


def accuracy(judge: Judge, cases: list[Case]) -> dict[str, Any]:
    """Precision = right among accepted, recall = accepted among equal; and the number of wrong verdicts of each form."""
    accepted = [agrees(judge, case) for case in cases]
    right = sum(yes and case.equal for yes, case in zip(accepted, cases, strict=True))
    wrong = {case.form: 0 for case in cases}
    for yes, case in zip(accepted, cases, strict=True):
        wrong[case.form] += yes != case.equal
    return {
        "cases": len(cases),
        "equal": sum(case.equal for case in cases),
        "agreement": 1 - sum(wrong.values()) / len(cases),
        "precision": right / max(sum(accepted), 1),
        "recall": right / sum(case.equal for case in cases),
        "accepted_unequal": sum(accepted) - right,
        "refused_equal": sum(case.equal for case in cases) - right,
        "wrong_by_form": {form: count for form, count in wrong.items() if count},
    }


def sets(models: Path) -> dict[str, list[Case]]:
    """The labelled cases that lie on this machine, by name."""
    found = {
        "pairs": [Case(**row) for row in rows(DATA / "math_pairs.jsonl")],
        "answers": [labelled(row, row["kind"]) for row in rows(DATA / "answers.jsonl") if row["verifier"] == "math"],
        "made": [Case(*case) for case in made(list(solutions(sorted(GSM8K.glob("t*.jsonl")))), MADE, seed=0)],
        "peers": [labelled(row, row["set"]) for row in rows(PEERS)],
        "models": [case for row in rows(models) for case in model_samples(row)],
    }
    return {name: cases for name, cases in found.items() if cases}


def labelled(row: dict[str, Any], form: str) -> Case:
    """A case from a file of labelled completions."""
    return Case(row["completion"], str(row["answer"]), bool(row["label"]), form)


def model_samples(row: dict[str, Any]) -> Iterator[Case]:
    """A GSM8K problem's samples, one a model, without the line that marks the answer and without calculator notes."""
    gold = row["ground_truth"].rpartition("A:")[2].strip()
    for model, sample in row.items():
        text = re.sub(r"<<[^>]*>>", "", sample["solution"]).rpartition("\nA:")[0] if isinstance(sample, dict) else ""
        if text:
            yield Case(text, gold, sample["is_correct"], model)


def rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; none where there is no such file."""
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.is_file() else []


def judge_chunk(verifier: str, samples: list[tuple[str, Any]]) -> float:
    """Score samples against parsed gold answers."""
    judge = {"gsm8k": gsm8k, "math": math}[verifier].judge  # type: ignore[attr-defined]
    return sum(judge(completion, answer=gold) for completion, gold in samples)


def gsm8k_samples(verifier: str) -> list[tuple[str, Any]]:
    """Every solution with its own parsed answer and with another's."""
    answers = [row["answer"] for file in sorted(GSM8K.glob("t*.jsonl")) for row in rows(file)]
    parse = {"gsm8k": gsm8k, "math": math}[verifier].parse_gold  # type: ignore[attr-defined]
    others = random.Random(0).sample(answers, len(answers))
    return [(text, parse(gold)) for golds in (answers, others) for text, gold in zip(answers, golds, strict=True)]


def speed(verifier: str, processes: int, repeats: int) -> dict[str, Any]:
    """Samples per second; the processes are started and have imported everything before."""
    samples = gsm8k_samples(verifier)
    chunks = [samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK)]
    seconds, scores = [], 0.0
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        run = map if processes == 1 else pool.map
        for _ in range(repeats + 1):
            start = time.perf_counter()
            scores = sum(run(judge_chunk, [verifier] * len(chunks), chunks))
            seconds.append(time.perf_counter() - start)
    rates = [len(samples) / second for second in seconds[1:]]
    return {"samples_per_second": statistics.median(rates), "spread": [min(rates), max(rates)], "scored_1": scores}


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes; 0: accuracy only")
    parser.add_argument("--models", type=Path, default=MODELS, help="the file with the models' samples")
    args = parser.parse_args()
    results: dict[str, Any] = {"accuracy": {}, "speed": {}}
    for name, cases in sets(args.models).items():
        results["accuracy"][name] = {}
        print(f"{name}: {len(cases)} cases, {sum(case.equal for case in cases)} equal")
        print(f"{'':<24}{'precision':>10}{'recall':>10}   accepted unequal, refused equal")
        for title, judge in JUDGES.items():
            r = results["accuracy"][name][title] = accuracy(judge, cases)
            print(
                f"{title:<24}{r['precision']:>10.3f}{r['recall']:>10.3f}{r['accepted_unequal']:>10}{r['refused_equal']:>16}"
            )
    for verifier in ("gsm8k", "math") if GSM8K.is_dir() and args.repeats else ():
        for processes in (1, 2):
            r = results["speed"][f"{verifier}, {processes}"] = speed(verifier, processes, args.repeats)
            print(f"{verifier:<6} {processes} process{'es' * (processes - 1):<3}{r['samples_per_second']:>9.0f} samples/s")
    versions = {name: metadata.version(name) for name in ("math-verify", "latex2sympy2-extended", "sympy")}
    results["setting"] = {**versions, "repeats": args.repeats}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "verifiers.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
