"""Dataset rows -> token ids, checked before any model is loaded; and which prompts each rollout draws."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from grpo_hf.types import Prompt

logger = logging.get_logger(__name__)

PROMPT_COLUMN = "prompt"


class PromptSet(Sequence[Prompt]):
    """A dataset's prompts as token ids, beside their rows."""

    def __init__(self, dataset: Dataset, ids: list[list[int]], kept: list[int]):
        self.dataset, self.ids, self.kept = dataset, ids, kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, number: int) -> Prompt:  # type: ignore[override]
        row = self.dataset[self.kept[number]]
        return Prompt(ids=self.ids[number], raw=row[PROMPT_COLUMN], row=row, index=self.kept[number])


def load_prompts(
    dataset: Dataset | list[dict[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train_dataset",
    max_prompt_length: int | None = None,
    overlong_prompts: str = "error",
    chat_template_kwargs: dict[str, Any] | None = None,
    schemas: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None,
) -> PromptSet:
    """Tokenize every prompt: a string as the tokenizer does by default, messages through the chat template, which shows
    the tools of the row (``schemas``) too.

    Raises ValueError for an empty dataset, a missing column, an empty prompt, and prompts of more than
    ``max_prompt_length`` tokens unless ``overlong_prompts`` is "drop".
    """
    table = checked_dataset(dataset, name)
    options = chat_template_kwargs or {}
    if schemas is None:
        ids = [_tokenize(raw, tokenizer, options) for raw in table[PROMPT_COLUMN]]
    else:
        ids = [_tokenize(row[PROMPT_COLUMN], tokenizer, options | {"tools": schemas(row) or None}) for row in table]
    if tokenizer.chat_template and isinstance(table[PROMPT_COLUMN][0], str):
        logger.warning(
            f"{name}: prompts are plain text, and go to the model without the chat template that its tokenizer has. A chat "
            "model wants messages: [{'role': 'user', 'content': ...}]; in a recipe set system_prompt, '' for none"
        )
    empty = [number for number, tokens in enumerate(ids) if not tokens]
    if empty:
        raise ValueError(f"{name}: {len(empty)} prompts have no tokens (rows {_listed(empty)}); give each some text")
    limit = max_prompt_length or max(map(len, ids))
    overlong = [number for number, tokens in enumerate(ids) if len(tokens) > limit]
    if overlong and (overlong_prompts == "error" or len(overlong) == len(ids)):
        raise ValueError(
            f"{name}: {len(overlong)} of {len(ids)} prompts are longer than {limit} tokens, which is the model's context "
            f"less max_completion_length (rows {_listed(overlong)}; the longest has {max(map(len, ids))}). Shorten them, "
            f"lower max_completion_length, or set overlong_prompts='drop'"
        )
    if overlong:
        logger.warning(f"{name}: dropped {len(overlong)} of {len(ids)} prompts longer than {limit} tokens")
    kept = [number for number, tokens in enumerate(ids) if len(tokens) <= limit]
    return PromptSet(table, [ids[number] for number in kept], kept)


def check_is_table(dataset: Any, name: str) -> None:
    """Raise ValueError where it is not rows: a path, or a list of something else."""
    if isinstance(dataset, str | Path):
        raise ValueError(
            f"{name}={str(dataset)!r} is a name; load it: datasets.load_dataset({str(dataset)!r}, split='train'), or of a "
            f"file datasets.load_dataset('json', data_files={str(dataset)!r}, split='train')"
        )
    if isinstance(dataset, list):
        wrong = next((number for number, row in enumerate(dataset) if not isinstance(row, dict)), None)
        if wrong is not None:
            raise ValueError(
                f"{name} is a list whose entry {wrong} is {dataset[wrong]!r:.60}; a row is a dict: {{'prompt': ..., and the "
                "columns that verifiers ask for}"
            )
    elif dataset is not None and not hasattr(dataset, "column_names"):
        raise ValueError(f"{name} is a {type(dataset).__name__}; give a datasets.Dataset or a list of dicts")


def checked_dataset(dataset: Any, name: str) -> Dataset:
    """The dataset as a datasets.Dataset with rows and a prompt column; ValueError with the fix otherwise."""
    check_is_table(dataset, name)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is an IterableDataset: exact resume needs rows by number. "
            f"Load it without streaming, or take a part: Dataset.from_list(list({name}.take(100_000)))"
        )
    table = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    if table is None or len(table) == 0:
        missing = f"`{name}` is required" if table is None else f"{name} is empty"
        raise ValueError(f"{missing}: give at least one row with a prompt")
    if PROMPT_COLUMN not in table.column_names:
        near = difflib.get_close_matches(PROMPT_COLUMN, table.column_names, n=1)
        hint = f"rename_column({(near or table.column_names)[0]!r}, 'prompt')"
        raise ValueError(f"{name} has no column 'prompt', only {table.column_names}; use {name}.{hint}")
    return table


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Require an eos token; choose a pad token where there is none, and say so."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token, so no completion could end; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning(f"The tokenizer has no pad token; using its eos token {tokenizer.eos_token!r}")
    return tokenizer


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts, with which seeds, each rollout samples: a pure function of (seed, rollout)."""

    num_prompts: int
    """Rows of the prompt set."""
    prompts_per_rollout: int
    """Over all processes."""
    seed: int
    """The run's data seed."""
    shuffle: bool = True
    """A new permutation for each pass, or the dataset's own order."""

    @property
    def rollouts_per_epoch(self) -> int:
        """Whole rollouts in one pass; a remainder of prompts is left for the next pass's permutation."""
        return self.num_prompts // self.prompts_per_rollout

    def prompts(self, rollout: int) -> list[int]:
        """Row numbers of one rollout."""
        epoch, place = divmod(rollout, self.rollouts_per_epoch)
        order = self._permutation("epoch", epoch) if self.shuffle else list(range(self.num_prompts))
        return order[place * self.prompts_per_rollout :][: self.prompts_per_rollout]

    def refills(self, rollout: int) -> list[int]:
        """All row numbers in an order of this rollout's own: what it samples beside its prompts, or instead of some."""
        return self._permutation("refill", rollout)

    def _permutation(self, what: str, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, what, number))
        return torch.randperm(self.num_prompts, generator=generator).tolist()


def derived_seed(*parts: int | str) -> int:
    """A 62-bit seed from counters, the same on every machine: seeds of neighbours share nothing."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()) >> 2


def _tokenize(raw: Any, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> list[int]:
    if isinstance(raw, str):
        return tokenizer(raw)["input_ids"]
    if not isinstance(raw, list):
        raise ValueError(f"a prompt must be a string or a list of chat messages, got {type(raw).__name__}: {raw!r:.200}")
    options = {"add_generation_prompt": True, **chat_template_kwargs}
    encoded: Any = tokenizer.apply_chat_template(raw, tokenize=True, return_dict=True, **options)
    return encoded["input_ids"]


def _listed(numbers: list[int], most: int = 10) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")
