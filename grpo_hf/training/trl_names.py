"""TRL's names: settings that its GRPOConfig has and this one does not, each with what to use instead, and what can be in its
generation_kwargs."""

from __future__ import annotations

from typing import Any

TRL_ONLY: dict[str, str] = {
    "log_completions_hub_repo": "upload <output_dir>/rollouts/*.parquet with the hub's own tools",
    "max_prompt_length": "use overlong_prompts='drop'; TRL has dropped this name too",
    "vllm_importance_sampling_cap": "use vllm_importance_sampling_clip_max",
    **dict.fromkeys(
        "ds3_gather_for_generation cache_implementation use_transformers_continuous_batching use_transformers_paged "
        "transformers_continuous_batching_config vllm_model_impl".split(),
        "there is one path here, so nothing to choose; leave it out",
    ),
}

ASKS_FOR_NOTHING: dict[str, Any] = {
    "ds3_gather_for_generation": True,
    "use_transformers_continuous_batching": False,
    "use_transformers_paged": False,
    "vllm_model_impl": "vllm",
}
"""The values of those settings at which they ask for nothing else than is done here, where that is not None: accepted."""

SAMPLING_NAMES: dict[str, str] = {
    **{name: name for name in "temperature top_p top_k min_p repetition_penalty stop_strings stop_token_ids".split()},
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "stop": "stop_strings",
    "eos_token_id": "stop_token_ids",
}
"""What can be in generation_kwargs, by the names of GenerationConfig and SamplingParams -> the setting that it is."""

SAMPLES_ANYWAY: dict[str, Any] = {"do_sample": True, "num_beams": 1, "num_return_sequences": 1, "n": 1}
"""What else may be in it, at the one value that says what is done here."""


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a setting that only TRL has is at the value that changes nothing."""
    return value is None or (name in ASKS_FOR_NOTHING and value == ASKS_FOR_NOTHING[name])


def sampling_settings(generation_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The settings that generation_kwargs are; raises ValueError for what is no plain sampling."""
    settings: dict[str, Any] = {}
    for name, value in generation_kwargs.items():
        if name in SAMPLES_ANYWAY:
            if value != SAMPLES_ANYWAY[name]:
                raise ValueError(
                    f"generation_kwargs has {name}={value!r}, but completions are samples of the policy, num_generations a "
                    f"prompt: leave it out or set {SAMPLES_ANYWAY[name]!r}"
                )
        elif name not in SAMPLING_NAMES:
            raise ValueError(
                f"generation_kwargs has {name!r}, which the loss could not account for; it may have "
                f"{', '.join((*SAMPLING_NAMES, *SAMPLES_ANYWAY))}"
            )
        else:
            listed = SAMPLING_NAMES[name].startswith("stop_") and not isinstance(value, list | tuple)
            settings[SAMPLING_NAMES[name]] = [value] if listed else value
    return settings
