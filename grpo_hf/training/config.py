"""GRPOConfig: transformers' TrainingArguments plus GRPO's own settings, under TRL's names where TRL has them."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import TrainingArguments

from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.aggregation import AGGREGATIONS
from grpo_hf.algorithm.correction import CORRECTION_MODES, corrected, measured, off_policy_masked
from grpo_hf.algorithm.entropy_control import EntropyControl
from grpo_hf.algorithm.kl import KL_ESTIMATORS
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import Objective, grpo_objective
from grpo_hf.algorithm.selection import selections_of
from grpo_hf.algorithm.trial import CREDIT_FORM, LOSS_FORM, check_arguments, options_of
from grpo_hf.episodes.episode import POLICIES
from grpo_hf.episodes.settings import ToolSettings
from grpo_hf.rewards.loading import choose
from grpo_hf.rewards.settings import DEFAULT_POLICY, RewardSettings
from grpo_hf.rollout.dynamic import CURRICULA, Choice, skip_solved
from grpo_hf.rollout.weight_sync import LORA_SYNCS
from grpo_hf.training.config_checks import check_config
from grpo_hf.training.guards import ACTIONS, GUARDS, Guard, chosen_guards
from grpo_hf.training.trl_names import TRL_ONLY, asks_for_nothing, sampling_settings
from grpo_hf.types import CALL_FAILURES

if TYPE_CHECKING:
    from grpo_hf.algorithm.advantages import Credit
    from grpo_hf.algorithm.correction import Factor

Class = TypeVar("Class", bound=type)


def refuse_unknown_names(config_class: Class) -> Class:
    """Make a misspelt or unsupported setting say what to use instead."""
    original = config_class.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        known = [item.name for item in fields(config_class) if item.init]
        for name in [name for name in settings if name in TRL_ONLY and asks_for_nothing(name, settings[name])]:
            del settings[name]
        for name in settings:
            if name in TRL_ONLY:
                raise ValueError(f"grpo_hf has no setting {name!r}: {TRL_ONLY[name]}")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        original(self, *args, **settings)

    config_class.__init__ = init  # type: ignore[misc]
    return config_class


def option(default: Any, help: str) -> Any:
    """A dataclass field with a help text for the command line."""
    return field(default=default, metadata={"help": help})


@refuse_unknown_names
@dataclass
class GRPOConfig(TrainingArguments):
    """Settings of a GRPO run; raises ValueError, before anything is loaded, for any that cannot work together.

    One optimizer step trains on `per_device_train_batch_size * gradient_accumulation_steps` completions a process. How
    they are cut into forward passes is decided by `tokens_per_microbatch` alone and changes no gradient.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  (the base class has it so)
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
        "generation_kwargs",
        "vllm_structured_outputs_json",
        "reward_policy",
        "tool_policy",
        "guards",
    ]

    learning_rate: float = option(1e-6, "Initial learning rate.")
    logging_steps: float = option(10, "Optimizer steps between log lines.")
    gradient_checkpointing: bool = option(True, "Recompute activations in the backward pass: less memory, more time.")
    bf16: bool | None = option(None, "bfloat16 autocast; None: on where there is a GPU that has it.")  # type: ignore[assignment]
    ddp_find_unused_parameters: bool | None = option(False, "Every parameter is used in every step.")

    # Model and data
    model_init_kwargs: dict | str | None = option(None, "Keywords of from_pretrained when the model is given by name.")
    trust_remote_code: bool = option(False, "Run the code that a model's or tokenizer's repository brings along.")
    cast_lm_head_to_fp32: bool = option(False, "Compute the logits in float32, from a float32 copy of an untied head.")
    disable_dropout: bool = option(True, "Train the policy that sampled: no dropout. (TRL's default is False.)")
    chat_template_kwargs: dict | str | None = option(None, "Keywords of the chat template.")
    shuffle_dataset: bool = option(True, "A new order of the prompts for each pass.")
    overlong_prompts: str = option("error", "Prompts that leave no room for a completion: 'error' or 'drop'.")

    # Sampling
    num_generations: int = option(8, "Completions for each prompt: the group.")
    num_generations_eval: int | None = option(None, "The same in evaluation; None: num_generations.")
    max_completion_length: int = option(512, "Tokens of a completion at most.")
    generation_batch_size: int | None = option(None, "Completions sampled at a time over all processes.")
    steps_per_generation: int | None = option(
        None, "The same, in units of per_device_train_batch_size; None: gradient_accumulation_steps (on-policy)."
    )
    temperature: float = option(1.0, "Divides the logits, in sampling and in training.")
    eval_temperature: float | None = option(None, "The same in evaluation; 0 is greedy; None: temperature.")
    top_p: float = option(1.0, "Sample from the smallest set of tokens with this probability.")
    top_k: int = option(0, "Sample from this many most likely tokens; 0: from all.")
    min_p: float | None = option(None, "Sample tokens at least this probable relative to the most likely one.")
    repetition_penalty: float = option(1.0, "Divides the scores of tokens already present.")
    stop_strings: list[str] | None = option(None, "Any of these in its text ends a completion.")
    stop_token_ids: list[int] | None = option(None, "Tokens that end a completion, beside the model's own.")

    generation_kwargs: dict | str | None = option(
        None, "These settings under the names of GenerationConfig or SamplingParams; they go before the ones above."
    )
    pad_to_multiple_of: int | str | None = option(None, "Accepted, and changes nothing: rows are not padded.")

    # Choice of prompts
    dynamic_sampling: bool = option(False, "Draw prompts until a rollout has its number of groups with unequal rewards.")
    dynamic_sampling_max_rounds: int = option(4, "Rounds of sampling for it at most; groups without signal fill the rest.")
    skip_solved_after: int | None = option(None, "Skip a prompt that its whole group solved on so many visits in a row.")
    revisit_after: int = option(3, "Passes that it is skipped for, before it is looked at again.")
    solved_reward: float = option(1.0, "A completion with at least this reward has solved its prompt.")
    curriculum: str | None = option(
        None, f"Which prompts to sample, by their pass rates: path.py:function, or one of {', '.join(CURRICULA)}."
    )

    # vLLM
    use_vllm: bool = option(False, "Sample with vLLM instead of transformers.")
    vllm_mode: str = option("colocate", "Where vLLM runs: 'colocate', in each training process, or 'server'.")
    vllm_server_base_url: str | None = option(
        None,
        "The server's address; None: http://vllm_server_host:vllm_server_port. Its key is read from the environment "
        "variable VLLM_API_KEY alone.",
    )
    vllm_server_host: str = option("0.0.0.0", "The server's host.")
    vllm_server_port: int = option(8000, "The server's port.")
    vllm_server_timeout: float = option(240.0, "Seconds that the server may stay away, at the start and later.")
    vllm_group_port: int = option(51216, "The trainer's port for NCCL with the server.")
    vllm_weights_folder: str | None = option(
        None, "A folder that trainer and server share, for weights without NCCL and adapters; None: one in memory."
    )
    vllm_lora_sync: str = option(
        "merge",
        f"What travels under LoRA: one of {', '.join(LORA_SYNCS)}. Merging samples faster, an adapter travels faster.",
    )
    rollout_ahead: int = option(0, "1: the server samples the next rollout while this one is trained on.")
    vllm_structured_outputs_regex: str | None = option(None, "Sample only what matches this regular expression.")
    vllm_structured_outputs_json: dict | str | None = option(None, "Sample only JSON that this schema allows.")
    vllm_gpu_memory_utilization: float = option(0.3, "Share of the GPU's memory for vLLM.")
    vllm_tensor_parallel_size: int = option(1, "Processes that share an engine, in process; a server has its own option.")
    vllm_max_model_length: int | None = option(
        None, "Context of vLLM in process; None: what the longest prompt and max_completion_length need."
    )
    vllm_enable_sleep_mode: bool = option(False, "vLLM gives its GPU memory back while training.")
    vllm_importance_sampling_correction: bool = option(True, "Weight the loss by trainer over engine probabilities.")
    vllm_importance_sampling_mode: str = option("sequence_mask", f"One of {', '.join(CORRECTION_MODES)}.")
    vllm_importance_sampling_clip_max: float | None = option(3.0, "Upper bound of that weight; None: no bound.")
    vllm_importance_sampling_clip_min: float | None = option(None, "Lower bound of that weight; None: no bound.")

    # Verifiers
    reward_timeout: float = option(10.0, "Seconds that one call of a verifier may take.")
    reward_memory_gb: float = option(4.0, "Memory that one call may add to its worker process.")
    reward_workers: int | None = option(None, "Worker processes for verifiers; None: this process's share of the cores.")
    reward_concurrency: int = option(64, "Calls of async verifiers at a time.")
    reward_policy: dict | str | None = option(
        None, f"What becomes of calls by outcome: {', '.join(f'{k}: {v}' for k, v in DEFAULT_POLICY.items())}; or stop."
    )
    reward_max_fault_share: float = option(0.2, "Stop when more of a verifier's calls over a rollout are faults.")
    bad_gold_rows: str = option("error", "Rows whose own answer no verifier can read: 'error', 'drop', or 'keep' unseen.")

    # Tools and environments
    max_tool_calling_iterations: int | None = option(None, "Turns of an episode whose tool calls are run; None: no limit.")
    tool_timeout: float = option(30.0, "Seconds that one call of a tool or an environment may take.")
    tool_memory_gb: float = option(4.0, "Memory that a call may add to its worker, and an environment to its process.")
    tool_workers: int | None = option(
        None, "Calls of plain functions at a time; None: 8, or the cores where there are more."
    )
    tool_concurrency: int = option(256, "Calls of async functions at a time.")
    tool_environments: int = option(256, "Environments that live at a time, each a process, in each training process.")
    tool_result_chars: int = option(100_000, "Characters of a result that the model is told.")
    tool_policy: dict | str | None = option(
        None,
        "What becomes of calls that end in error, timeout or crash: 'tell' the model (default), 'drop' the episode, 'stop'.",
    )

    # Objective
    loss_type: str = option(
        "dapo", f"The loss of each token: one of {', '.join(LOSSES)}, or a function of yours as path/file.py:function."
    )
    loss_aggregation: str | None = option(
        None,
        f"How the losses of tokens become one number: one of {', '.join(AGGREGATIONS)}. None: as the loss_type has it, "
        "token_mean for a function of yours.",
    )
    importance_sampling_level: str = option("token", "Ratio per 'token', or per 'sequence' (GSPO).")
    scale_rewards: str = option("group", "'group' (or True), 'batch' or 'none' (or False).")
    advantage: str | None = option(
        None,
        f"How scores become advantages, in place of scale_rewards: one of {', '.join(ADVANTAGES)}, or a function of yours "
        "as path/file.py:function.",
    )
    advantage_k: int = option(4, "The k of advantage='pass_at_k'.")
    multi_objective_aggregation: str = option(
        "sum_then_normalize", "'normalize_then_sum' normalizes each reward before the sum, as advantage='gdpo' does."
    )
    reward_weights: list[float] | None = option(None, "One for each reward; None: 1 each.")
    num_iterations: int = option(1, "Passes over each rollout (μ in the GRPO paper).")
    epsilon: float = option(0.2, "Lower clip distance.")
    epsilon_high: float | None = option(None, "Upper clip distance, None: epsilon. For cispo the bound itself, None: 5.")
    delta: float | None = option(None, "Upper bound of the ratio where the advantage is negative.")
    sapo_temperature_pos: float = option(1.0, "SAPO's gate temperature for positive advantages.")
    sapo_temperature_neg: float = option(1.05, "The same for negative ones.")
    vespo_k_pos: float = option(2.0, "VESPO's k for positive advantages: how fast weights below 1 fall.")
    vespo_lambda_pos: float = option(3.0, "VESPO's λ for positive advantages: how fast weights above 1 fall.")
    vespo_k_neg: float = option(3.0, "The same k for negative ones.")
    vespo_lambda_neg: float = option(2.0, "The same λ for negative ones.")
    clip_cov_ratio: float = option(0.0002, "Share of an update's tokens that clip_cov leaves out.")
    clip_cov_lb: float = option(1.0, "Covariance of advantage and log-prob above which they are chosen.")
    clip_cov_ub: float = option(5.0, "Covariance below which they are chosen.")
    kl_cov_ratio: float = option(0.0002, "Share of an update's tokens that kl_cov holds back, those of highest covariance.")
    kl_cov_coef: float = option(1.0, "Weight of |log ratio| on those.")
    off_policy_mask_threshold: float | None = option(
        None, "Leave completions with negative advantage and a mean log(π_sampled / π) above this out; None: keep all."
    )
    top_entropy_quantile: float = option(
        1.0,
        "Share of an update's tokens, those of highest entropy, that the policy loss and entropy bonus are over, say 0.2.",
    )
    beta: float = option(0.0, "KL coefficient; 0 loads no reference model.")
    kl_estimator: str = option("k3", f"One of {', '.join(KL_ESTIMATORS)}.")
    use_bias_correction_kl: bool = option(True, "Multiply the KL estimate by the differentiable ratio.")
    sync_ref_model: bool = option(False, "Move the reference towards the policy every ref_model_sync_steps.")
    ref_model_mixup_alpha: float = option(0.6, "ref = alpha * policy + (1 - alpha) * ref.")
    ref_model_sync_steps: int = option(512, "Optimizer steps between those moves.")
    entropy_coef: float = option(0.0, "Entropy bonus, on the mean per-token entropy.")
    use_adaptive_entropy: bool = option(False, "Move entropy_coef after each step, to hold the entropy at entropy_target.")
    entropy_target: float = option(0.2, "Mean per-token entropy in nats, at or below which the bonus is applied and grows.")
    entropy_coef_delta: float = option(0.005, "How far entropy_coef moves in a step.")
    entropy_coef_min: float = option(0.0, "The least that it becomes.")
    entropy_coef_max: float = option(1.0, "The most that it becomes.")
    teacher_coef: float = option(1.0, "Weight of the reverse KL to the trainer's teacher, a mean over tokens.")
    router_aux_loss_coef: float | None = option(
        None, "Weight of the load-balancing loss of a mixture of experts; None: that of the model's config, 0: none."
    )
    mask_truncated_completions: bool = option(False, "Leave completions that hit the length limit out of the loss.")

    # Cost
    tokens_per_microbatch: int | None = option(
        None, "Tokens of a forward pass; changes memory and speed only. None: 8192, on a CPU 2048, more for long prompts."
    )
    token_layout: str = option(
        "auto", "'packed' (a token tree: shared beginnings once, no padding), 'padded', or 'auto': packed if the model can."
    )
    balance_processes: bool = option(True, "Processes train on each other's groups, for as many tokens each; same gradient.")
    keep_zero_signal: bool = option(False, "Forward completions with advantage 0 too; same gradient, more work.")

    # Guards
    guards: dict | str | None = option(
        None,
        f"What follows when numbers go bad: {{name: action}} or {{name: {{action: ..., threshold: ...}}}}; actions are "
        f"{', '.join(ACTIONS)}; guards {', '.join(f'{k} ({g.action}, {g.threshold})' for k, g in GUARDS.items())}.",
    )

    # The end
    stop_at: dict | str | None = option(
        None,
        "End the run when these rewards of the held-out rows are, in two evaluations in a row, at least so high on average: "
        "{exact_match: 0.97}. max_steps is then the most that it takes.",
    )

    # What a run leaves
    log_completions: bool = option(
        False, "Print some samples with their rewards at each log line; all of them are a table in wandb and trackio."
    )
    num_completions_to_print: int | None = option(None, "How many; None: 4.")
    log_unique_prompts: bool = option(False, "One row a prompt in that table.")
    log_multimodal: bool = option(True, "Accepted, and changes nothing: samples are text.")
    save_rollouts: bool = option(True, "Write every sample to <output_dir>/rollouts/*.parquet.")
    write_report: bool = option(True, "Write <output_dir>/report.html at the end.")
    profile: int = option(0, "Trace so many steps after the first to <output_dir>/profile/, and print the top operators.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = not self.fp16 and on_gpu and torch.cuda.is_bf16_supported()
        if self.metric_for_best_model is None and self.load_best_model_at_end:
            self.metric_for_best_model = "reward"
        super().__post_init__()
        for name, value in sampling_settings(self.generation_kwargs or {}).items():  # type: ignore[arg-type]
            setattr(self, name, value)
        if self.trust_remote_code:
            self.model_init_kwargs = {"trust_remote_code": True, **(self.model_init_kwargs or {})}  # type: ignore[dict-item]
        self.remove_unused_columns = False
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        check_config(self)

    # ---- Derived numbers

    @property
    def batches_per_rollout(self) -> int:
        """Batches of per_device_train_batch_size completions that one rollout holds, on one process."""
        if self.steps_per_generation is not None:
            return self.steps_per_generation
        if self.generation_batch_size is not None:
            return self.generation_batch_size // (self.per_device_train_batch_size * self.world_size)
        return self.gradient_accumulation_steps

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that share one rollout's completions."""
        return self.batches_per_rollout // self.gradient_accumulation_steps

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.updates_per_rollout * self.num_iterations

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts sampled at a time, over all processes."""
        return self.per_device_train_batch_size * self.batches_per_rollout * self.world_size // self.num_generations

    @property
    def advantage_form(self) -> str:
        """The advantage that this run uses: what it is called in ADVANTAGES, or a function of the user's."""
        if self.multi_objective_aggregation == "normalize_then_sum":
            return "gdpo"
        return self.advantage or {"group": "group", "batch": "batch", "none": "centered"}[str(self.scale_rewards)]

    def credit(self) -> Credit:
        """What turns the scores of a rollout into advantages; raises ValueError for an unknown name."""
        credit = choose("advantage", self.advantage_form, ADVANTAGES)
        check_arguments(credit, 2, f"advantage={self.advantage_form!r}: {CREDIT_FORM}")
        options = options_of(credit, self._options() | {"lengths": None}, f"advantage={self.advantage_form!r}")
        options.pop("lengths", None)  # the planner's
        return partial(credit, **options) if options else credit

    def objective(self, *, teacher: bool = False) -> Objective:
        """The loss of this run, which may have a teacher; raises ValueError for an unknown name or no loss."""
        chosen = choose("loss_type", self.loss_type, LOSSES)
        loss, aggregation = chosen if isinstance(chosen, tuple) else (chosen, "token_mean")
        settings, what = self._options(), f"loss_type={self.loss_type!r}"
        check_arguments(loss, 1, f"{what}: {LOSS_FORM}")
        options = options_of(loss, settings, what)
        return grpo_objective(
            partial(loss, **options),
            self.loss_aggregation or aggregation,
            level=self.importance_sampling_level,
            # A loss with that option takes the engine's part of the weights into its own.
            factors=(measured if "vllm_importance_sampling_correction" in options else self._correction(), *self._masks()),
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            kl_bias_correction=self.use_bias_correction_kl,
            entropy_coef=self.entropy_coef_max if self.use_adaptive_entropy else self.entropy_coef,
            teacher_coef=self.teacher_coef if teacher else 0.0,
            selections={
                name: partial(select, **options_of(select, settings, what)) for name, select in selections_of(loss).items()
            },
            top_entropy_quantile=self.top_entropy_quantile,
        )

    def entropy_control(self) -> EntropyControl | None:
        """What moves entropy_coef from step to step; None where it is constant."""
        if not self.use_adaptive_entropy:
            return None
        return EntropyControl(
            self.entropy_coef, self.entropy_target, self.entropy_coef_delta, self.entropy_coef_min, self.entropy_coef_max
        )

    def _options(self) -> dict[str, Any]:
        """What a loss or credit may ask for by name."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        return settings | {"vllm_importance_sampling_correction": self.use_vllm and self.vllm_importance_sampling_correction}

    def _correction(self) -> Factor:
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return measured
        return partial(
            corrected,
            mode=self.vllm_importance_sampling_mode,
            low=self.vllm_importance_sampling_clip_min,
            high=self.vllm_importance_sampling_clip_max,
        )

    def _masks(self) -> tuple[Factor, ...]:
        threshold = self.off_policy_mask_threshold
        return () if threshold is None else (partial(off_policy_masked, threshold=threshold),)

    def reward_settings(self) -> RewardSettings:
        """How verifiers are run; raises ValueError for settings that cannot be."""
        return RewardSettings(
            timeout=self.reward_timeout,
            memory_gb=self.reward_memory_gb,
            workers=self.reward_workers,
            concurrency=self.reward_concurrency,
            policy=self.reward_policy or {},  # type: ignore[arg-type]
            max_fault_share=self.reward_max_fault_share,
        )

    def tool_settings(self) -> ToolSettings:
        """How tools and environments are run; raises ValueError for settings that cannot be."""
        return ToolSettings(
            **{item.name: getattr(self, f"tool_{item.name}") for item in fields(ToolSettings) if item.name != "modules"}
        )

    def tool_policies(self) -> dict[str, str]:
        """What becomes of calls of tools, by outcome; raises ValueError for what cannot be."""
        policy = self.tool_policy or {}
        if not isinstance(policy, dict):
            raise ValueError(f"tool_policy={policy!r} must map outcomes to what becomes of them: {{timeout: drop}}")
        for names, known in ((policy, CALL_FAILURES), (policy.values(), POLICIES)):
            if wrong := [name for name in names if name not in known]:
                raise ValueError(f"tool_policy={policy!r} has {wrong[0]!r}, which is not one of {', '.join(known)}")
        return policy

    def chosen_guards(self) -> dict[str, Guard]:
        """The guards of this run; raises ValueError for settings that cannot be."""
        chosen = chosen_guards(self.guards)
        for name in self.guards or ():
            if (needs := chosen[name].needs) and not getattr(self, needs):
                raise ValueError(f"guards has {name!r}, which has nothing to look at with {needs}={getattr(self, needs)}")
        if self.deepspeed_plugin is not None and (skips := [name for name in chosen if chosen[name].action == "skip"]):
            raise ValueError(
                f"guards[{skips[0]!r}] cannot skip a step under DeepSpeed, which takes it in the backward pass; set 'warn' "
                "or 'stop'"
            )
        return chosen

    def choice(self) -> Choice:
        """How prompts are chosen; raises ValueError for an unknown curriculum."""
        skip = [partial(skip_solved, after=n, revisit_after=self.revisit_after)] if (n := self.skip_solved_after) else []
        other = [choose("curriculum", self.curriculum, CURRICULA)] if self.curriculum is not None else []
        return Choice(self.dynamic_sampling, self.dynamic_sampling_max_rounds, (*skip, *other), self.solved_reward)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What autocast computes in; None: the model's own."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None
