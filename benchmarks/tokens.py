"""Tokens that the training forward of an update computes, by side, counted and not timed: `python -m benchmarks.tokens`.

For every case of training_step.py each side lays the update's completions out as it would to train on them, and no model is
made. Left out are passes without gradient (old and reference log-probs), of which each side has its own rules. "Needed" is
what no layout can do without: a token counts once for all completions that begin with the same tokens, if a later token of
one with signal is trained on; without a budget, and without the last token, which predicts nothing.
"""

from __future__ import annotations

from pkgutil import resolve_name

from benchmarks.cases import Case, make_data, text_of
from benchmarks.sides import SIDES, is_installed
from benchmarks.training_step import CASES

COUNTED = ("trl", "trl_async_tree", "prefix_grouper", "liger", "grpo_hf")


def needed(case: Case) -> int:
    """Distinct beginnings of the update's completions with signal that predict a trained token, now or later."""
    data = make_data(case)
    nodes: dict[tuple[int, int], int] = {}  # (beginning, next token) -> beginning
    for prompt, group in zip(data.prompts[: case.groups], data.completions, strict=False):
        for made in group if text_of(prompt) not in data.flat else []:
            after_last = made.is_sampled[::-1].index(True) + 1
            node = -1
            for token in (prompt + made.ids)[:-after_last]:
                node = nodes.setdefault((node, token), len(nodes))
    return len(nodes)


def count(case: Case) -> dict[str, int]:
    """By side; TRL's trie is left out where TRL is not installed, the others need nothing."""
    data = make_data(case)
    sides = [side for side in COUNTED if side != "trl_async_tree" or is_installed(side)]
    rooms = {side: SIDES[side].partition(":")[0] for side in sides}
    return {side: resolve_name(f"{room}:num_tokens")(case, data) for side, room in rooms.items()} | {"needed": needed(case)}


def main() -> None:
    """One line a case."""
    found = {name: count(case) for name, case in CASES.items()}
    sides = list(next(iter(found.values())))
    print(f"{'':31}" + "".join(f"{side:>16}" for side in sides))
    for name, tokens in found.items():
        print(f"{name:31}" + "".join(f"{tokens[side]:16,}" for side in sides))


if __name__ == "__main__":
    main()
