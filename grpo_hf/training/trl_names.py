"""Settings that TRL's GRPOConfig has and this one does not, each with what to use instead."""

TRL_ONLY: dict[str, str] = {
    "trust_remote_code": "put it into model_init_kwargs={'trust_remote_code': True}",
    "router_aux_loss_coef": "set router_aux_loss_coef in the model's own config; it is not added to this loss",
    "cast_lm_head_to_fp32": "log-probs are always taken in float32; load the model in float32 for a float32 head",
    "pad_to_multiple_of": "the packed layout has no padding; leave it out",
    "generation_kwargs": "use temperature, top_p, top_k, min_p and repetition_penalty",
    "max_tool_calling_iterations": "completions are single-turn here",
    "log_multimodal": "this trainer is for text-only models",
    "log_unique_prompts": "all samples are in <output_dir>/rollouts/*.parquet",
    "log_completions_hub_repo": "upload <output_dir>/rollouts/*.parquet with the hub's own tools",
    "max_prompt_length": "use overlong_prompts='drop'; TRL has dropped this name too",
    "vllm_max_model_length": "it follows from the longest prompt and max_completion_length; leave it out",
    "vllm_tensor_parallel_size": "each process has an engine of its own; for a larger one: vllm_mode='server' and "
    "grpo-hf serve --tensor-parallel-size",
    "vllm_importance_sampling_cap": "use vllm_importance_sampling_clip_max",
    **dict.fromkeys(
        "ds3_gather_for_generation cache_implementation use_transformers_continuous_batching use_transformers_paged "
        "transformers_continuous_batching_config vllm_model_impl".split(),
        "there is one path here, so nothing to choose; leave it out",
    ),
}
