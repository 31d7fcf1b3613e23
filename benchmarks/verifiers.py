"""Accuracy of `math`, and the speed of `math` and `gsm8k`: `python -m benchmarks.verifiers`.

Precision and recall on tests/data/math_pairs.jsonl next to the exact string (of the answer that `math` finds) and to
math-verify called bare; it is also given the gold answers in the dollar signs that it asks for. The labels are the lenient
mode's: strict refuses unmarked answers, missing units and the like by design, and math-verify takes 50% for 50. Then
samples per second on GSM8K: every solution against its own answer and against another's, gold answers parsed once, in this
process and in two. Writes benchmarks/results/verifiers.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import math_verify

from reward_fns.gsm8k import gsm8k
from reward_fns.math import math
from reward_fns.math.find import find_answer

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "tests" / "data" / "math_pairs.jsonl"
GSM8K = ROOT.parent / "shared" / "gsm8k"
CHUNK = 256

Judge = Callable[[str, str], bool]


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


def accuracy(judge: Judge, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Precision = right among accepted, recall = accepted among equal; and the number of wrong pairs of each form."""
    accepted = [judge(pair["completion"], pair["gold"]) for pair in pairs]
    right = sum(yes and pair["equal"] for yes, pair in zip(accepted, pairs, strict=True))
    wrong = {pair["form"]: 0 for pair in pairs}
    for yes, pair in zip(accepted, pairs, strict=True):
        wrong[pair["form"]] += yes != pair["equal"]
    return {
        "precision": right / sum(accepted),
        "recall": right / sum(pair["equal"] for pair in pairs),
        "accepted_unequal": sum(accepted) - right,
        "refused_equal": sum(pair["equal"] for pair in pairs) - right,
        "wrong_by_form": wrong,
    }


def judge_chunk(verifier: str, samples: list[tuple[str, Any]]) -> float:
    """Score samples against parsed gold answers."""
    judge = {"gsm8k": gsm8k, "math": math}[verifier].judge  # type: ignore[attr-defined]
    return sum(judge(completion, answer=gold) for completion, gold in samples)


def gsm8k_samples(verifier: str) -> list[tuple[str, Any]]:
    """Every solution with its own parsed answer and with another's."""
    answers = [json.loads(line)["answer"] for file in sorted(GSM8K.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pairs = [json.loads(line) for line in PAIRS.open(encoding="utf-8")]
    results: dict[str, Any] = {"accuracy": {}, "speed": {}}
    print(f"{len(pairs)} pairs, {sum(pair['equal'] for pair in pairs)} equal")
    print(f"{'':<24}{'precision':>10}{'recall':>10}   accepted unequal, refused equal")
    for name, judge in JUDGES.items():
        r = results["accuracy"][name] = accuracy(judge, pairs)
        print(f"{name:<24}{r['precision']:>10.3f}{r['recall']:>10.3f}{r['accepted_unequal']:>10}{r['refused_equal']:>16}")
    for verifier in ("gsm8k", "math") if GSM8K.is_dir() else ():
        for processes in (1, 2):
            r = results["speed"][f"{verifier}, {processes}"] = speed(verifier, processes, args.repeats)
            print(f"{verifier:<6} {processes} process{'es' * (processes - 1):<3}{r['samples_per_second']:>9.0f} samples/s")
    versions = {name: metadata.version(name) for name in ("math-verify", "latex2sympy2-extended", "sympy")}
    results["setting"] = {**versions, "pairs": len(pairs), "repeats": args.repeats}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "verifiers.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
