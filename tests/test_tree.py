"""Tries of token runs: literal ones, and random ones against what a prefix is by definition."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from grpo_hf.packing.tree import Bin, Ids, Run, cut, first_fit, token_runs, without_short_runs

SHARING = {
    "nothing in common": ([(1, 2), (3,), (4, 5, 6)], 6),
    "one sequence": ([(1, 2, 3)], 3),
    "a system prompt": ([(1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 6, 7)], 7),
    "one ends inside another": ([(1, 2), (1, 2, 3), (1,)], 3),
    "the same twice": ([(1, 2), (1, 2)], 2),
    "a fork below a fork": ([(1, 2, 3, 4), (1, 2, 3, 5), (1, 9, 3)], 7),
}


def prefixes(sequences: list[Ids]) -> set[Ids]:
    """All beginnings of all of them: the tokens of their trie, by definition."""
    return {ids[:length] for ids in sequences for length in range(1, len(ids) + 1)}


def tokens_of(run: Run, sequences: list[Ids]) -> Ids:
    return sequences[run.sequence][run.start : run.stop]


def paths(runs: list[Run], sequences: list[Ids]) -> list[Ids]:
    """What each run has before it, with its own tokens."""
    found: list[Ids] = []
    for number, run in enumerate(runs):
        assert run.parent < number and len(run) > 0
        before = found[run.parent] if run.parent >= 0 else ()
        assert len(before) == run.start
        found.append(before + tokens_of(run, sequences))
    return found


def check(runs: list[Run], sequences: list[Ids]) -> None:
    """Depth first; every sequence is the beginning of the path of the one run that it ends in."""
    path = paths(runs, sequences)
    ends = sorted((number, place) for place, run in enumerate(runs) for number in run.ends)
    assert [number for number, _ in ends] == list(range(len(sequences))), "every sequence once"
    for number, place in ends:
        assert path[place][: len(sequences[number])] == sequences[number] and len(sequences[number]) > runs[place].start
    open_runs: list[int] = []  # those on the way to the run at hand
    for number, run in enumerate(runs):
        while open_runs and open_runs[-1] != run.parent:
            open_runs.pop()
        assert open_runs or run.parent == -1, "what is below a run lies behind it in one piece"
        open_runs.append(number)


def random_sequences(seed: int, *, words: int = 3) -> list[Ids]:
    """Few words, so that beginnings are shared, and sequences are repeated or lie inside each other."""
    generator = random.Random(seed)
    count = generator.randint(1, 20)
    return [tuple(generator.choices(range(words), k=generator.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize(("sequences", "tokens"), SHARING.values(), ids=SHARING)
def test_size_by_hand(sequences: list[Ids], tokens: int) -> None:
    assert sum(map(len, token_runs(sequences))) == tokens


def test_runs_by_hand() -> None:
    """The cat sat, the cat ran, dogs: two runs begin, one of them forks."""
    the, cat, sat, ran, dogs = range(5)
    runs = token_runs([(the, cat, sat), (the, cat, ran), (dogs,)])
    assert {(run.start, run.stop, run.parent, run.sequence) for run in runs} == {
        (0, 1, -1, 2),
        (0, 2, -1, 0),
        (2, 3, 1, 0),
        (2, 3, 1, 1),
    }
    assert sorted(tuple(run.ends) for run in runs) == [(), (0,), (1,), (2,)]


def test_a_run_goes_on_where_others_end() -> None:
    (run,) = token_runs([(1, 2), (1, 2, 3), (1,)])
    assert (run.start, run.stop, sorted(run.ends)) == (0, 3, [0, 1, 2])


@pytest.mark.parametrize("words", [1, 2, 3, 50])
def test_random_runs_hold_each_prefix_once(words: int) -> None:
    for seed in range(150):
        sequences = random_sequences(seed, words=words)
        runs = token_runs(sequences)
        check(runs, sequences)
        path = paths(runs, sequences)
        held = [path[n][:depth] for n, run in enumerate(runs) for depth in range(run.start + 1, run.stop + 1)]
        assert len(held) == len(set(held)) and set(held) == prefixes(sequences)
        for parent in {run.parent for run in runs}:
            first = [tokens_of(run, sequences)[0] for run in runs if run.parent == parent]
            assert len(first) == len(set(first)) and (len(first) > 1 or parent == -1), "each is as long as it can be"
        assert token_runs(sequences) == runs


def test_short_runs_by_hand() -> None:
    """(1, 2) saves 2 tokens for 2 branches, 4 for 3."""
    two, three = [(1, 2, 3), (1, 2, 4)], [(1, 2, 3), (1, 2, 4), (1, 2, 5)]
    for sequences, least_saved, nodes, tokens in ((two, 2, 3, 4), (two, 3, 2, 6), (three, 4, 4, 5), (three, 5, 3, 9)):
        runs = without_short_runs(token_runs(sequences), least_saved)
        check(runs, sequences)
        assert (len(runs), sum(map(len, runs))) == (nodes, tokens)


def test_what_ends_in_a_short_run_ends_in_one_below_it() -> None:
    sequences = [(1,), (1, 2, 3), (1, 4)]
    runs = without_short_runs(token_runs(sequences), 2)
    check(runs, sequences)
    assert sorted(tokens_of(run, sequences) for run in runs) == [(1, 2, 3), (1, 4)]


@pytest.mark.parametrize("least_saved", [0, 1, 2, 4, 8, 1000])
def test_random_runs_without_short_ones(least_saved: int) -> None:
    for seed in range(150):
        sequences = random_sequences(seed)
        runs = token_runs(sequences)
        untouched = [Run(run.start, run.parent, run.sequence, run.stop, list(run.ends)) for run in runs]
        kept = without_short_runs(runs, least_saved)
        assert runs == untouched
        check(kept, sequences)
        assert set(paths(kept, sequences)) <= prefixes(sequences)
        for number, run in enumerate(kept):
            children = sum(other.parent == number for other in kept)
            assert not children or (children - 1) * len(run) >= least_saved
        if least_saved <= 1:
            assert kept == runs, "with a fork below it every run saves a token"
        if least_saved == 1000:
            assert all(run.parent == -1 for run in kept)


def tree_size(sequences: list[Ids], members: list[int], extra: list[int]) -> int:
    return len(prefixes([sequences[n] for n in members])) + sum(extra[n] for n in members)


def test_cuts_by_hand() -> None:
    """A prompt of 3 with branches of 4, 3 and 2, and a stranger of 4."""
    sequences = [(1, 2, 3, *branch) for branch in ((10, 11, 12, 13), (20, 21, 22), (30, 31))] + [(7, 8, 9, 9)]
    none = [0] * 4
    assert cut(sequences, none, 16) == [[0, 1, 2, 3]]
    assert sorted(cut(sequences, none, 12)) == [[0, 1, 2], [3]]
    assert sorted(cut(sequences, none, 10)) == [[0, 1], [2, 3]], "the prompt is repeated, and the stranger fills up"
    assert sorted(cut(sequences, none, 7)) == [[0], [1], [2], [3]]
    assert sorted(cut(sequences, none, 1)) == [[0], [1], [2], [3]], "one that is too large is alone"
    assert sorted(cut(sequences, [0, 0, 5, 0], 12)) == [[0, 1], [2], [3]], "what comes with a sequence has to fit too"
    assert sorted(cut([(1, 2, 3, 4, 5, 6), (1,)], [0, 3], 8)) == [[0], [1]], "also where it ends inside another's run"


def test_cuts_repeat_the_shallow_run_rather_than_the_deep_one() -> None:
    system, deep = (1,), tuple(range(100, 120))
    sequences = [(*system, *deep, 2), (*system, 3, 4, 5), (*system, *deep, 6), (*system, 7, 8, 9)]
    assert sorted(cut(sequences, [0] * 4, 23)) == [[0, 2], [1, 3]]


def test_random_cuts_keep_the_budget_and_every_sequence() -> None:
    for seed in range(400):
        sequences = random_sequences(seed)
        generator = random.Random(seed)
        budget = generator.randint(1, 40)
        extra = [generator.choice((0, 0, 0, 3)) for _ in sequences]
        parts = cut(sequences, extra, budget)
        assert sorted(n for part in parts for n in part) == list(range(len(sequences)))
        for part in parts:
            assert len(part) == 1 or tree_size(sequences, part, extra) <= budget
        assert len(parts) <= len(sequences)
        assert cut(sequences, extra, budget) == parts
        assert cut(sequences, extra, 10_000) == [list(range(len(sequences)))]


def test_cuts_repeat_less_than_sequences_in_any_order() -> None:
    """The reason for cutting along the trie: filled in the order that they come in, the same sequences take more tokens."""
    by_trie = in_order = 0
    for seed in range(100):
        sequences = random_sequences(seed)
        none, budget = [0] * len(sequences), 24
        by_trie += sum(tree_size(sequences, part, none) for part in cut(sequences, none, budget))
        parts: list[list[int]] = [[]]
        for number in range(len(sequences)):
            if parts[-1] and tree_size(sequences, [*parts[-1], number], none) > budget:
                parts.append([])
            parts[-1].append(number)
        in_order += sum(tree_size(sequences, part, none) for part in parts)
    assert by_trie < in_order


def test_first_fit_by_hand() -> None:
    def packed(sizes: list[int], room: int) -> list[tuple[int, list[int]]]:
        return [(item.size, item.members) for item in first_fit([Bin(n, [place]) for place, n in enumerate(sizes)], room)]

    assert packed([2, 5, 4, 1], 6) == [(6, [1, 3]), (6, [2, 0])]
    assert packed([3, 3, 3], 6) == [(6, [0, 1]), (3, [2])]
    assert packed([9, 1], 6) == [(9, [0]), (1, [1])], "one that is too large stays alone"
    assert packed([9, 0, 2], 6) == [(9, [0]), (2, [2, 1])], "also where another would take no room"
    assert packed([], 6) == []


def test_first_fit_is_within_its_bound_and_changes_no_bin_that_it_is_given() -> None:
    """First-fit decreasing needs at most 11/9 of the fewest bins, and one; all but one bin are more than half full."""
    for seed in range(200):
        generator = random.Random(seed)
        room = generator.randint(5, 30)
        given = [Bin(generator.randint(1, room), [n]) for n in range(generator.randint(1, 30))]
        packed = first_fit(given, room)
        assert all(item.size == sum(given[n].size for n in item.members) <= room for item in packed)
        assert sorted(n for item in packed for n in item.members) == list(range(len(given)))
        assert [item.members for item in given] == [[n] for n in range(len(given))]
        assert sum(item.size * 2 <= room for item in packed) <= 1
        assert all(first.size + second.size > room for first, second in pairwise(packed) if second.size * 2 <= room)
