"""What samples a trainer's groups where the engine's answer is not all: tools and environments, or a rollout function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_hf.episodes.chat import Chat
from grpo_hf.episodes.episode import Rules, play
from grpo_hf.episodes.hosted import HostedEnvironment, load_hosted
from grpo_hf.episodes.sampler import EpisodeSampler
from grpo_hf.episodes.toolbox import Toolbox
from grpo_hf.rewards.signature import Reward, describe
from grpo_hf.rollout.engine import Engine, Sampling
from grpo_hf.rollout.prompts import PromptSet
from grpo_hf.rollout.stream import SampleFunction
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.fingerprint import digest_of_code, digest_of_columns
from grpo_hf.types import Completion, Prompt


def hosted_environment(spec: Any, args: GRPOConfig, **others: Any) -> HostedEnvironment | None:
    """An environment of the package `verifiers`; None without one. Raises ValueError beside what it brings itself."""
    given = [name for name, value in others.items() if value is not None and value != []]
    if spec is not None and given:
        raise ValueError(f"environments={spec!r} brings data, tools and episodes of its own; leave out {', '.join(given)}")
    if spec is not None and args.rollout_ahead:
        raise ValueError("rollout_ahead=1 would sample later turns from weights that have changed; set rollout_ahead=0")
    return load_hosted(spec, timeout=args.tool_timeout)


def brought(
    hosted: HostedEnvironment | None, toolbox: Toolbox | None, train: Any, held_out: Any
) -> tuple[list[Reward], Any, Any]:
    """The rewards that environments bring, and the data sets, which a hosted one brings too."""
    if hosted is None:
        return rewards_of(toolbox), train, held_out
    return [hosted.reward], hosted.dataset(), hosted.held_out() if held_out is None else held_out


def make_toolbox(tools: Any, environments: Any, rollout_func: Any, args: GRPOConfig) -> Toolbox | None:
    """The tools and environments of a run; None without any. Raises ValueError where they cannot be."""
    if rollout_func is not None and not callable(rollout_func):
        raise ValueError(f"rollout_func is a function `rollout_func(prompts, trainer)`; got {rollout_func!r}")
    if not tools and environments is None:
        return None
    if rollout_func is not None:
        raise ValueError("a rollout_func makes whole completions, with calls of tools: give it, or tools and environments")
    if args.rollout_ahead:
        raise ValueError("rollout_ahead=1 would sample later turns from weights that have changed; set rollout_ahead=0")
    if args.vllm_tensor_parallel_size > 1:
        raise ValueError("vllm_tensor_parallel_size > 1 takes no later turns in process; set vllm_mode='server' for tools")
    return Toolbox(tools, environments, args.tool_settings())


def check_chat(toolbox: Toolbox | None, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig) -> None:
    """Raise ValueError where the tokenizer's chat template cannot show tools, calls and results."""
    for schemas in toolbox.all_schemas if toolbox else ():
        if schemas:
            chat_of(tokenizer, args).check(schemas)


def describe_agents(
    toolbox: Toolbox | None, rollout_func: Any, hosted: HostedEnvironment | None, prompts: PromptSet
) -> dict[str, Any]:
    """What of them makes a run this run: their names and code, and the columns that environments are reset with."""
    described: dict[str, Any] = {}
    if rollout_func is not None:
        described["code of rollout_func"] = digest_of_code(rollout_func)
    if hosted is not None:
        described["environments"] = {hosted.name: [hosted.options, digest_of_code(type(hosted.environment))]}
    if toolbox is not None:
        described["tools"] = {name: digest_of_code(tool.function) for name, tool in toolbox.tools.items()}
        kinds = {str(name): kind.factory for name, kind in toolbox.kinds.items()}
        described["environments"] = {name: digest_of_code(factory) for name, factory in kinds.items()}
        columns = prompts.dataset.column_names if kinds else []
        described["columns that environments read"] = digest_of_columns(prompts.dataset, prompts.kept, columns)
    return described


def rewards_of(toolbox: Toolbox | None) -> list[Reward]:
    """One for each class of environments that has get_reward; others' episodes have none of it (TRL's)."""

    def reward(name: str) -> Reward:
        def get_reward(environments: list[Any], completions: Any = None, **kwargs: Any) -> list[float | None]:
            return [item.get_reward() if type(item).__name__ == name else None for item in environments]

        return replace(describe(name, get_reward), per_sample=True, of_environment=True)

    return [reward(name) for name in (toolbox.rewards if toolbox else ())]


def make_episodes(
    engine: Engine,
    toolbox: Toolbox | HostedEnvironment,
    rewards: list[Reward],
    args: GRPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_model_length: int,
) -> SampleFunction:
    """Episodes with tools on an engine."""
    rules = Rules(
        max_completion_length=args.max_completion_length,
        max_model_length=max_model_length,
        max_tool_calling_iterations=args.max_tool_calling_iterations,
        policy=args.tool_policies(),
        keeps_environments=any(reward.takes_environments for reward in rewards),
    )
    chat = chat_of(tokenizer, args)
    if isinstance(toolbox, HostedEnvironment):
        return EpisodeSampler(engine, partial(toolbox.play, chat=chat, rules=rules))
    return EpisodeSampler(engine, partial(play, chat=chat, toolbox=toolbox, rules=rules))


def chat_of(tokenizer: PreTrainedTokenizerBase, args: GRPOConfig) -> Chat:
    """The tokenizer's chat template with the run's options."""
    return Chat(tokenizer, chat_template_kwargs=args.chat_template_kwargs)  # type: ignore[arg-type]


RETURNED = ("prompt_ids", "completion_ids", "logprobs")
"""What a rollout function returns: a list with an entry for each prompt that it was given."""


def rollouts_of(function: Callable[[list[Any], Any], dict[str, Any]], trainer: Any) -> SampleFunction:
    """A rollout function as what samples: `function(prompts, trainer)` with each prompt repeated for its group (TRL's).

    ``env_mask`` (optional) has a 1 for each completion id that the model sampled and 0 for the others; any other key is a
    column for the verifiers. ``logprobs`` are of all completion ids, in nats; those of ids with mask 0 are not read.
    """

    def sample(
        prompts: list[Prompt], seeds: list[int], num_generations: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        asked = [prompt.raw for prompt in prompts for _ in range(num_generations)]
        output = function(asked, trainer) if asked else {}
        if not isinstance(output, Mapping):
            raise ValueError(f"rollout_func returned {_kind_of(output)}; return a dict with {', '.join(RETURNED)}")
        if asked and (missing := sorted(set(RETURNED) - output.keys())):
            raise ValueError(f"rollout_func must return keys {missing} in its output dict.")
        output = {name: _as_list(name, values) for name, values in output.items() if values is not None}
        lengths = {name: len(values) for name, values in output.items()}
        if wrong := {name: length for name, length in lengths.items() if length != len(asked)}:
            raise ValueError(f"rollout_func was given {len(asked)} prompts and returned {wrong}; return one entry for each")
        for number in range(len(prompts)):
            places = range(number * num_generations, (number + 1) * num_generations)
            yield number, [_completion({name: v[place] for name, v in output.items()}, sampling) for place in places]

    return sample


def _completion(made: dict[str, Any], sampling: Sampling) -> Completion:
    ids, mask = [int(token) for token in made.pop("completion_ids")], made.pop("env_mask", None)
    is_sampled = None if mask is None else [bool(flag) for flag in mask]
    logprobs = made.pop("logprobs", None)
    for name, values in (("env_mask", is_sampled), ("logprobs", logprobs)):
        if values is not None and len(values) != len(ids):
            raise ValueError(
                f"rollout_func returned {len(values)} {name} for {len(ids)} completion_ids; return one for each"
            )
    if logprobs is not None:
        logprobs = [_first(x) for x, wanted in zip(logprobs, is_sampled or [True] * len(ids), strict=True) if wanted]
    return Completion(
        ids=ids,
        truncated=not ids or ids[-1] not in sampling.stop_token_ids,
        rollout_logprobs=logprobs,
        is_sampled=is_sampled,
        prompt_ids=[int(token) for token in made.pop("prompt_ids")],
        columns=made,
    )


def _as_list(name: str, values: Any) -> list[Any]:
    """What a rollout function returned under a key, as a list; an array or a tensor becomes one too."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"rollout_func returned {_kind_of(values)} as {name!r}; return a list with one entry for each prompt"
        )
    return list(values)


def _kind_of(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})"


def _first(logprob: Any) -> float | None:
    """A log-prob, or the first of a list: the sampled token's comes before those of other candidates."""
    value = logprob[0] if isinstance(logprob, list | tuple) else logprob
    return None if value is None else float(value)
