"""What is checked, and loaded, before any weights are: rewards and prompts; and what is said when numbers go bad."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from grpo_hf.algorithm.trial import check_credit
from grpo_hf.episodes.toolbox import Toolbox
from grpo_hf.evaluation.sampling import metric_names
from grpo_hf.rewards import Reward, Scorer, check_columns, get_rewards
from grpo_hf.rewards.gold import bad_gold
from grpo_hf.rewards.loading import nearest
from grpo_hf.rewards.trial import try_options
from grpo_hf.rollout.dynamic import is_informative
from grpo_hf.rollout.prompts import PromptSet, check_is_table, checked_dataset, load_prompts
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.policy import StepReport
from grpo_hf.types import Group

logger = logging.get_logger(__name__)


def check_reference(args: GRPOConfig, *, lora: bool) -> None:
    """A reference that moves is a model of its own; under LoRA it is the policy with another adapter or none."""
    if args.sync_ref_model and lora:
        raise ValueError(
            "sync_ref_model=True cannot move the reference under LoRA, where it is a frozen adapter or the base model; set "
            "sync_ref_model=False, or train all weights (no peft_config)"
        )


def in_memory(table: Any, rows: int | None = None) -> Any:
    """A streamed data set as one with rows by number, of the first ``rows``; any other as it is."""
    if not isinstance(table, IterableDataset):
        return table
    return Dataset.from_list(list(table if rows is None else table.take(rows)), features=table.features)


def read_stream(table: Any, args: GRPOConfig) -> Any:
    """What of a streamed data set max_steps will ask for, in its order, so that a resumed run finds its rows again."""
    if not isinstance(table, IterableDataset):
        return table
    if args.max_steps <= 0:
        raise ValueError(
            f"train_dataset is an IterableDataset, which has no length, and max_steps={args.max_steps}: set max_steps, or "
            "make it a table: Dataset.from_list(list(train_dataset))"
        )
    if args.dynamic_sampling or args.curriculum:
        raise ValueError(
            "train_dataset is an IterableDataset, and dynamic_sampling and curricula choose among rows: take as many as "
            "they may need, Dataset.from_list(list(train_dataset.take(100_000)))"
        )
    args.shuffle_dataset = False
    rollouts = -(-args.max_steps // args.steps_per_rollout)
    return in_memory(table, rollouts * args.prompts_per_rollout)


def check_best_metric(args: GRPOConfig, rewards: list[Reward], evals: list[str]) -> None:
    """Raise ValueError where the metric that a checkpoint is chosen by is none that evaluation has."""
    if not args.load_best_model_at_end or args.metric_for_best_model is None:
        return
    if not evals:
        raise ValueError("load_best_model_at_end=True needs an eval_dataset")
    names = metric_names([reward.name for reward in rewards], args.num_generations_eval or args.num_generations)
    known = [f"{part}_{name}".removeprefix("_") for part in evals for name in names]
    wanted = args.metric_for_best_model.removeprefix("eval_")
    if wanted not in known:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is none that evaluation has: {', '.join(known)}"
            f"{nearest(wanted, known)}"
        )


def check_stop_at(args: GRPOConfig, rewards: list[Reward], evals: list[str]) -> None:
    """Raise ValueError where a run cannot be ended by rewards of held-out rows."""
    if args.stop_at is None:
        return
    numbers = isinstance(args.stop_at, Mapping) and all(type(least) in (int, float) for least in args.stop_at.values())
    if not numbers or not args.stop_at:
        raise ValueError(f"stop_at={args.stop_at!r} must map rewards to numbers: {{exact_match: 0.97}}")
    if not evals or args.eval_strategy == "no":
        raise ValueError(
            f"stop_at={args.stop_at!r} needs evaluations: give an eval_dataset, and set eval_strategy='steps' and eval_steps"
        )
    names = [reward.name for reward in rewards]
    for name in args.stop_at:
        if name not in names:
            known = f"{', '.join(names)}{nearest(name, names)}"
            raise ValueError(f"stop_at names {name!r}, which is no reward of the held-out rows: {known}")


def warn_without_reward(groups: Iterable[Group]) -> None:
    """Say so where no verifier has given a completion a score, which leaves it out of its group and of the loss."""
    completions = [item for group in groups for item in group.completions]
    without = [item for item in completions if item.valid and all(map(math.isnan, item.rewards.values()))]
    if without:
        logger.warning(
            f"no reward has given {len(without)} of {len(completions)} completions a score, so they are not trained on; the "
            f"first of them: {without[0].text!r:.200}"
        )


def warn_without_signal(groups: Sequence[Group]) -> None:
    """Say so, with a sample, where the rewards of no group differ, so that nothing is learned of them."""
    completions = [item for group in groups for item in group.completions]
    if not completions or any(map(is_informative, groups)):
        return
    scored = sorted({item.reward for item in completions if not math.isnan(item.reward)})
    shown = [f"{value:g}" for value in scored[:5]] + ["none"] * any(math.isnan(item.reward) for item in completions)
    cut = sum(item.truncated for item in completions)
    logger.warning(
        f"no group of the first rollout has a signal: its {len(completions)} completions have the rewards "
        f"{', '.join(shown)}, equal within each group, and {cut} of them were cut off at "
        f"max_completion_length. One of them: {completions[0].text!r:.300}. Where this goes on nothing is learned: show the "
        "form of the answer in the prompt, with an example; reward parts of it; take prompts that the model solves "
        "sometimes (grpo-hf eval shows pass@k)"
    )


def checked_rewards(
    reward_funcs: Any, args: GRPOConfig, processing_classes: Any = None, *, owned: Sequence[Reward] = ()
) -> tuple[list[Reward], list[float]]:
    """The verifiers and one weight each; tokenizers of reward models are given one for each reward, None for the others.
    ``owned`` are the rewards of environments, whose weight is 1."""
    rewards = get_rewards(reward_funcs if reward_funcs is not None else [])
    models = [reward.name for reward in rewards if hasattr(reward.function, "processing_class")]
    if processing_classes is not None and not isinstance(processing_classes, list) and len(models) > 1:
        raise ValueError(
            f"reward_processing_classes is one tokenizer for {len(models)} reward models ({', '.join(models)}), which may"
            " have different ones; give a list, whose entries must match the rewards, None where a reward is no model"
        )
    tokenizers = processing_classes if isinstance(processing_classes, list) else [processing_classes] * len(rewards)
    if len(tokenizers) != len(rewards):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(rewards)} rewards, and must match "
            "them; give one each, None where the reward is no model"
        )
    for reward, tokenizer in zip(rewards, tokenizers, strict=True):
        if tokenizer is not None and hasattr(reward.function, "processing_class"):
            reward.function.processing_class = tokenizer
    weights = args.reward_weights or [1.0] * len(rewards)
    if not [*rewards, *owned]:
        raise ValueError(
            "No reward source provided: reward_funcs is empty; give at least one verifier, by name or as a function, or an "
            "environment with get_reward"
        )
    if len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards "
            f"({', '.join(reward.name for reward in rewards)}); give one each"
        )
    check_credit(args.credit(), len(rewards) + len(owned), args.num_generations, f"advantage={args.advantage_form!r}")
    return [*rewards, *owned], [*weights, *(1.0 for _ in owned)]


def checked_prompts(
    table: Any,
    name: str,
    *,
    args: GRPOConfig,
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    toolbox: Toolbox | None = None,
    more_columns: bool = False,
) -> PromptSet:
    """The tokenized prompts of a dataset that has every column, answers that can be read, and fits into the context.

    With ``more_columns`` verifiers may ask for what a rollout function will say of its completions.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context <= args.max_completion_length:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in the model's context of "
            f"{context} positions; lower it"
        )
    if isinstance(table, dict):
        raise ValueError(f"{name} holds several data sets ({', '.join(table)}); give one: {name}[{next(iter(table), '')!r}]")
    check_is_table(table, name)
    if toolbox is not None:
        table = with_environment(table, name, args, toolbox)
    table = checked_dataset(table, name)
    if not more_columns:
        check_columns(scorer.rewards, table.column_names, name)
    prompts = load_prompts(
        table,
        tokenizer,
        name=name,
        max_prompt_length=None if context is None else context - args.max_completion_length,
        overlong_prompts=args.overlong_prompts,
        chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
        schemas=None if toolbox is None else toolbox.schemas,
    )
    check_token_ids(prompts, name, tokenizer, config)
    try_options(scorer, prompts.dataset[prompts.kept[0]])
    return prompts if args.bad_gold_rows == "keep" else with_good_gold(prompts, name, args, scorer)


def with_environment(table: Any, name: str, args: GRPOConfig, toolbox: Toolbox) -> Any:
    """The rows of a run with tools: each is a chat, and an environment may bring its own prompt, or all of the data."""
    blank = [{"role": "user", "content": ""}]
    if table is None and toolbox.kinds:
        if len(toolbox.kinds) > 1 or None not in toolbox.kinds:
            raise ValueError(
                f"a dict of environments requires a `train_dataset` with a column 'environment' that names one of "
                f"{', '.join(map(str, toolbox.kinds))} in each row"
            )
        if args.max_steps <= 0:
            raise ValueError(f"without a train_dataset max_steps says how long to train, but it is {args.max_steps}; set it")
        table = Dataset.from_dict({"prompt": [blank] * args.prompts_per_rollout})
    if toolbox.kinds and table is not None:
        table = Dataset.from_list(table) if isinstance(table, list) else table
        if "prompt" not in table.column_names:
            table = table.add_column("prompt", [blank] * len(table))
    table = checked_dataset(table, name)
    if isinstance(prompt := table[0]["prompt"], str):
        raise ValueError(
            f"tools need chat prompts, and row 0 of the {name} is the text {prompt!r:.60}; make it a message: "
            f"[{{'role': 'user', 'content': {prompt!r:.60}}}]"
        )
    toolbox.check(table, name)
    return table


def check_token_ids(prompts: PromptSet, name: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise ValueError for a token of a prompt, or a pad token that will be needed, which the model has no embedding for."""
    rows: float = getattr(config, "vocab_size", None) or math.inf
    largest, row = max((max(ids), row) for ids, row in zip(prompts.ids, prompts.kept, strict=True))
    pads = len(set(map(len, prompts.ids))) > 1 or tokenizer.eos_token_id < rows  # where none can end, nothing is filled up
    for where, number in (
        (f"{name}, row {row}: ", largest),
        ("the tokenizer's pad token ", tokenizer.pad_token_id if pads else 0),
    ):
        if number >= rows:
            raise ValueError(
                f"{where}{tokenizer.convert_ids_to_tokens(number)!r} has the id {number}, but the model's embedding has "
                f"{rows} rows: it does not know the token. Call model.resize_token_embeddings(len(tokenizer)) and give the "
                "trainer that model, or take a tokenizer without added tokens (a pad token may be the eos token)"
            )


def with_good_gold(prompts: PromptSet, name: str, args: GRPOConfig, scorer: Scorer) -> PromptSet:
    """The prompts whose gold answers every verifier can read; each process looks at its share of them."""
    if not any(reward.gold_column for reward in scorer.rewards):
        return prompts
    share = prompts.kept[args.process_index :: args.world_size]
    bad = [item for part in gather_object([bad_gold(scorer, prompts.dataset, share)]) for item in part]
    if not bad:
        return prompts
    rows = {item.row for item in bad}
    said = "\n".join(f"- row {item.row}, {item.verifier}: {item.message.splitlines()[-1]}" for item in bad[:10])
    message = f"{name}: the answers of {len(rows)} of {len(prompts)} rows cannot be read, the first of them:\n{said}\n"
    kept = [number for number, row in enumerate(prompts.kept) if row not in rows]
    if args.bad_gold_rows == "error" or not kept:
        raise ValueError(message + "Mend these rows, or set bad_gold_rows='drop'; `grpo-hf verify --gold` lists all of them")
    logger.warning(message + "They were dropped")
    return PromptSet(prompts.dataset, [prompts.ids[number] for number in kept], [prompts.kept[number] for number in kept])


def check_enough_prompts(prompts: PromptSet, args: GRPOConfig) -> None:
    """A rollout's prompts are all different."""
    if len(prompts) < args.prompts_per_rollout:
        raise ValueError(
            f"train_dataset has {len(prompts)} prompts, but a rollout samples {args.prompts_per_rollout} different ones "
            f"(per_device_train_batch_size * steps_per_generation * processes / num_generations); lower "
            f"per_device_train_batch_size or raise num_generations"
        )


def why_not_finite(model: nn.Module, args: GRPOConfig, report: StepReport | None = None) -> str:
    """Where a loss or gradient that is not finite comes from, and what to try."""
    bad = sum(int((~values.isfinite()).sum()) for values in (report.logprobs.values() if report else ()))
    advantages = sum(int((~batch.advantages.isfinite()).sum()) for batch in (report.batches if report else ()))
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    if advantages:
        return (
            f"{advantages} tokens have an advantage that is not finite, which advantage={args.advantage_form!r} has made of "
            "the scores in rollouts/*.parquet. A score that is missing is NaN, and makes NaN of a mean: leave it out with "
            "nanmean and nan_to_num"
        )
    return (
        f"not finite are {bad} log-probs, {_not_finite('weights', model.named_parameters())} and "
        f"{_not_finite('gradients', gradients)}. It has not reached the weights yet, and the checkpoints in "
        f"{args.output_dir} are good. Try a lower learning_rate, bf16=False or a smaller beta"
    )


def weights_not_finite(step: int, model: nn.Module, args: GRPOConfig) -> str:
    """The same when a finite gradient has made weights NaN or infinite."""
    return (
        f"step {step} has made {_not_finite('weights NaN or infinite', model.named_parameters())}, from a finite gradient: "
        f"learning_rate={args.learning_rate} is too high. They are not saved; the checkpoints in {args.output_dir} are good"
    )


def _not_finite(what: str, tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    names = [name for name, values in tensors if values is not None and not values.isfinite().all()]
    return f"{len(names)} {what} ({', '.join(names[:3])})"


@torch.no_grad()
def norm_of_weights(model: nn.Module) -> float:
    """Of those that are trained, all together: finite if all of them are."""
    norm = torch.nn.utils.get_total_norm([p for p in model.parameters() if p.requires_grad])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
