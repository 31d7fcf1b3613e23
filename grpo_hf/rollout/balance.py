"""Which process trains on which groups: about as many tokens each, whoever has sampled them."""

from __future__ import annotations

from grpo_hf.packing.layout import num_tokens
from grpo_hf.rollout.peers import Peers
from grpo_hf.types import Completion, Group, Prompt


def balanced(groups: list[Group], peers: Peers) -> list[Group]:
    """This process's share of the groups of all processes; the loss is a sum over all, so its gradient stays the same."""
    everyone = [group for part in peers.gather([_tokens_only(group) for group in groups]) for group in part]
    return shares(everyone, peers.count)[peers.rank]


def shares(groups: list[Group], count: int) -> list[list[Group]]:
    """Longest processing time first (Graham 1969): each group, the largest first, to whoever has the fewest tokens."""
    parts: list[list[Group]] = [[] for _ in range(count)]
    totals = [0] * count
    for group in sorted(groups, key=num_tokens, reverse=True):
        place = totals.index(min(totals))
        parts[place].append(group)
        totals[place] += num_tokens(group)
    return parts


def _tokens_only(group: Group) -> Group:
    """What the loss needs of a group: no texts and no dataset row have to travel."""
    completions = [
        Completion(item.ids, item.truncated, rollout_logprobs=item.rollout_logprobs, advantage=item.advantage)
        for item in group.completions
    ]
    return Group(Prompt(group.prompt.ids, raw="", row={}, index=group.prompt.index), completions)
