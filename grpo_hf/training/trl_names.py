"""Settings that TRL's GRPOConfig has and this one does not, each with what to use instead."""

NOT_FOR_TEXT = "this trainer is for text-only models"
ONE_WAY = "there is one path here, so nothing to choose; leave it out"

TRL_ONLY: dict[str, str] = {
    "trust_remote_code": "put it into model_init_kwargs={'trust_remote_code': True}",
    "router_aux_loss_coef": "set router_aux_loss_coef in the model's own config; it is not added to this loss",
    "cast_lm_head_to_fp32": "log-probs are always taken in float32; load the model in float32 for a float32 head",
    "ds3_gather_for_generation": ONE_WAY,
    "pad_to_multiple_of": "the packed layout has no padding; leave it out",
    "generation_kwargs": "use temperature, top_p, top_k, min_p and repetition_penalty",
    "cache_implementation": ONE_WAY,
    "vespo_k_pos": "loss_type='vespo' is not here; 'sapo' is the soft-clipped loss",
    "vespo_lambda_pos": "loss_type='vespo' is not here; 'sapo' is the soft-clipped loss",
    "vespo_k_neg": "loss_type='vespo' is not here; 'sapo' is the soft-clipped loss",
    "vespo_lambda_neg": "loss_type='vespo' is not here; 'sapo' is the soft-clipped loss",
    "multi_objective_aggregation": "advantage='gdpo' normalizes each reward before the sum, the other forms after it",
    "top_entropy_quantile": "every token counts; use entropy_coef for exploration",
    "use_adaptive_entropy": "set a constant entropy_coef",
    "entropy_coef_min": "set a constant entropy_coef",
    "entropy_coef_max": "set a constant entropy_coef",
    "entropy_coef_delta": "set a constant entropy_coef",
    "entropy_target": "set a constant entropy_coef",
    "max_tool_calling_iterations": "completions are single-turn here",
    "off_policy_mask_threshold": "use delta, or fewer updates per rollout",
    "log_multimodal": NOT_FOR_TEXT,
    "log_unique_prompts": "all samples are in <output_dir>/rollouts/*.parquet",
    "log_completions_hub_repo": "upload <output_dir>/rollouts/*.parquet with the hub's own tools",
    "use_transformers_continuous_batching": ONE_WAY,
    "transformers_continuous_batching_config": ONE_WAY,
    "use_transformers_paged": ONE_WAY,
    "max_prompt_length": "use overlong_prompts='drop'; TRL has dropped this name too",
    "vllm_model_impl": ONE_WAY,
    "vllm_max_model_length": "it follows from the longest prompt and max_completion_length; leave it out",
    "vllm_tensor_parallel_size": "each process has an engine of its own; for a larger one: vllm_mode='server' and "
    "grpo-hf serve --tensor-parallel-size",
    "vllm_importance_sampling_cap": "use vllm_importance_sampling_clip_max",
}
