"""GRPOTrainer: transformers.Trainer fed by the rollout stream, with GRPO's loss on packed micro-batches."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.utils import logging

from grpo_hf.algorithm.objective import Objective
from grpo_hf.algorithm.sequences import sequence_mean
from grpo_hf.evaluation import evaluate_prompts
from grpo_hf.metrics import Metrics
from grpo_hf.packing.choose import choose_layout, disable_dropout
from grpo_hf.packing.layout import default_budget
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.rewards import RewardSpec, Scorer
from grpo_hf.rewards.faults import merged, stop_if_faulty
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Plan, Update
from grpo_hf.rollout.prompts import PromptOrder, PromptSet, prepare_tokenizer
from grpo_hf.rollout.record import (
    record_forward,
    record_outcomes,
    record_rollout,
    write_rollout,
)
from grpo_hf.rollout.sampler import GroupSampler
from grpo_hf.rollout.stream import Rollout, RolloutStream
from grpo_hf.rollout.vllm_support import installed_vllm
from grpo_hf.training.callbacks import (
    FiniteWeights,
    MetricsFile,
    Report,
    RewardProgress,
    StepClock,
    SyncReference,
    print_samples,
)
from grpo_hf.training.checks import (
    check_enough_prompts,
    check_reference,
    checked_prompts,
    checked_rewards,
    not_finite,
    refuse_arguments,
)
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.engines import make_engine, make_sampling
from grpo_hf.training.guarded import GuardedTrainer, Measured
from grpo_hf.training.guards import Seen
from grpo_hf.training.models import causal_lm, frozen_copy, is_sharded, load_config, load_model, load_tokenizer, run_inside
from grpo_hf.training.profiling import Profile
from grpo_hf.training.throughput import Throughput
from grpo_hf.types import PackedBatch

logger = logging.get_logger(__name__)

SPREAD = ("sampling/sampling_logp_difference", "sampling/importance_sampling_ratio")
"""Per-token values that are logged with their smallest and largest."""


class GRPOTrainer(GuardedTrainer):
    """Train a causal LM with GRPO (Shao et al. 2024, arXiv 2402.03300) and its descendants.

    The constructor is TRL's. `model` is a name, a path or a causal LM; `reward_funcs` one or several of: a registered
    name, `package.module:function`, `path/file.py:function`, a function, a sequence-classification model. `train_dataset`
    needs a column "prompt" (strings or chat messages); verifiers take the other columns by name. Raises ValueError for bad
    input before any weights load.
    """

    args: GRPOConfig  # type: ignore[assignment]
    model: Any
    model_wrapped: Any
    processing_class: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardSpec | list[RewardSpec] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | list[dict[str, Any]] | None = None,
        eval_dataset: Dataset | list[dict[str, Any]] | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **unsupported: Any,
    ):
        refuse_arguments(unsupported)
        args = args or GRPOConfig()
        check_reference(args, lora=peft_config is not None or isinstance(model, PeftModel))
        if args.use_vllm and args.vllm_mode == "colocate":
            installed_vllm()
        self.metrics = Metrics()
        self.rewards, self.reward_weights = checked_rewards(reward_funcs, args, reward_processing_classes)
        self.scorer = Scorer(self.rewards, self.reward_weights, args.reward_settings())
        init: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
        if quantization_config is not None:
            init["quantization_config"] = quantization_config
        shared = {key: init[key] for key in ("revision", "trust_remote_code") if key in init}
        tokenizer = prepare_tokenizer(processing_class or load_tokenizer(model, **shared))
        self._check = partial(
            checked_prompts, args=args, scorer=self.scorer, tokenizer=tokenizer, config=load_config(model, **shared)
        )
        self.prompts = train = self._check(train_dataset, "train_dataset")
        check_enough_prompts(train, args)
        self.eval_prompts = evals = self._checked_eval(eval_dataset)

        set_seed(args.seed)  # adapter weights are random
        lm = load_model(model, **init) if isinstance(model, str) else model
        if args.disable_dropout:
            disable_dropout(lm)
        if peft_config is not None:
            lm = get_peft_model(lm, peft_config)  # type: ignore[arg-type]
        args.ignore_data_skip = True  # skipping would sample; the stream finds its own place
        super().__init__(
            model=lm,
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=train.dataset,
            eval_dataset={name: part.dataset for name, part in evals.items()} or None,
            processing_class=tokenizer,
            callbacks=[
                FiniteWeights(self._guard_weights),
                MetricsFile(),
                *([Profile(args.profile)] if args.profile else []),
                *(callbacks or []),
                *([Report()] if args.write_report else []),
            ],
            optimizers=optimizers,
        )
        self.compute_dtype: torch.dtype = args.compute_dtype or causal_lm(self.model).dtype
        self.throughput = Throughput(causal_lm(self.model))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RewardProgress(self.compute_dtype))
        for reward in self.rewards:
            if hasattr(reward.function, "processing_class"):  # a model
                reward.function.to(self.args.device)  # type: ignore[attr-defined]
        self.loss_is_scaled_for_ga = True
        self.objective: Objective = args.objective()
        self.peers = Peers(self.args.process_index, self.args.world_size, lambda item: gather_object([item]))
        self.sharded = is_sharded(self.accelerator)
        self.stream = self._make_stream(tokenizer)
        self.add_callback(StepClock(self.metrics, len(self.stream) // args.gradient_accumulation_steps))
        self.ref_model = self._make_reference() if self.objective.beta else None
        if self.args.sync_ref_model and self.ref_model is not None:
            self.add_callback(SyncReference(self.model, self.ref_model))

    # ---- Setting up

    def _checked_eval(self, evals: Any) -> dict[str, PromptSet]:
        """Held-out prompts by name; a single data set has the name ""."""
        named = evals if isinstance(evals, dict) else {} if evals is None else {"": evals}
        return {name: self._check(table, f"eval_dataset {name}".strip()) for name, table in named.items()}

    def _make_stream(self, tokenizer: PreTrainedTokenizerBase) -> RolloutStream:
        args = self.args
        lm = causal_lm(self.model)
        layout = choose_layout(lm, [self.prompts.ids[0], self.prompts.ids[-1]], args.token_layout)
        self.sampling = make_sampling(args, tokenizer, lm)
        self.sampler = GroupSampler(
            engine=make_engine(
                self.model,
                args,
                sampling=self.sampling,
                prompts=[self.prompts, *self.eval_prompts.values()],
                tokenizer=tokenizer,
                peers=self.peers,
                sharded=self.sharded,
                finished_updates=lambda: self.state.global_step,
                autocast=self.accelerator.autocast,
            ),
            tokenizer=tokenizer,
            scorer=self.scorer,
            metrics=self.metrics,
            trainer_state=lambda: self.state,
        )
        seed = args.seed if args.data_seed is None else args.data_seed
        longest = max(map(len, self.prompts.ids))
        budget = args.tokens_per_microbatch or default_budget(
            args.device,
            longest_prompt=longest,
            longest_group=longest + args.num_generations * args.max_completion_length,
        )
        return RolloutStream(
            prompts=self.prompts,
            order=PromptOrder(len(self.prompts), args.prompts_per_rollout, seed, args.shuffle_dataset),
            sampler=self.sampler,
            sampling=self.sampling,
            num_generations=args.num_generations,
            plan=Plan(
                advantage=args.advantage_form,
                updates_per_rollout=args.updates_per_rollout,
                layout=layout,
                tokens_per_microbatch=budget,
                max_completion_length=args.max_completion_length,
                mask_truncated_completions=args.mask_truncated_completions,
                keep_zero_signal=args.keep_zero_signal or self.objective.needs_every_token,
                # A local mean is over the completions that a process has sampled itself.
                balance=args.balance_processes and self.peers.count > 1 and args.loss_type != "bnpo",
                same_number=self.sharded,
            ),
            num_iterations=args.num_iterations,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            finished_updates=lambda: self.state.global_step,
            on_rollout=self._on_rollout,
            peers=self.peers,
            rollout_ahead=args.rollout_ahead,
            max_updates=lambda: self.state.max_steps,
            choice=args.choice(),
        )

    def _make_reference(self) -> nn.Module | None:
        """None under LoRA, where the reference is the model with its adapter switched off."""
        return None if isinstance(self.model, PeftModel) else frozen_copy(self.model)

    # ---- Rollouts

    def get_train_dataloader(self) -> RolloutStream:  # type: ignore[override]
        """The rollout stream; rollouts and measurements that an earlier train() has left are not this one's."""
        self.stream.reset()
        self.throughput.start(self.args.device, self.compute_dtype)
        self.metrics.reset()
        self._last_logged_step = 0
        return self.stream

    def num_examples(self, dataloader: Any) -> int:
        """Prompts of one pass."""
        return len(self.prompts)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        """Nothing: denominators travel with each update."""

    def _on_rollout(self, rollout: Rollout) -> None:
        """Record a new rollout, and take the log-probs that its updates will need of the weights as they are now."""
        self._claim_run_folder()
        step = self.state.global_step + 1
        record_rollout(self.metrics, rollout, self.peers)
        record_outcomes(self.metrics, self.sampler.tally)
        record_forward(self.metrics, rollout, self.peers, num_iterations=self.args.num_iterations)
        if self.args.use_vllm:
            self.metrics.mean("sampling/staleness", self.state.global_step - rollout.version)
        sizes = [(len(g.prompt.ids) * len(g.completions), sum(len(c.ids) for c in g.completions)) for g in rollout.groups]
        self.state.num_input_tokens_seen += sum(self.peers.gather(sum(map(sum, sizes))))
        if self.args.save_rollouts:
            folder = Path(str(self.args.output_dir), "rollouts")
            write_rollout(folder, rollout, step=step, process=self.peers.rank)
        since_log = self.state.global_step % max(1, int(self.state.logging_steps or 1))
        if self.args.log_completions and self.peers.rank == 0 and since_log < self.stream.steps_per_rollout:
            print_samples(rollout.groups, step, self.args.num_completions_to_print or 4)
        stop_if_faulty(merged(self.peers.gather(self.sampler.tally)), self.scorer.settings)
        with self.metrics.phase("logprobs"):
            for number, update in enumerate(rollout.updates):
                update.microbatches = [batch.to(self.args.device) for batch in update.microbatches]
                for batch in update.microbatches:
                    if self.objective.beta:
                        batch.ref_logprobs = self._reference_logprobs(batch)
                    if number > 0:  # the first update's are its own, see _loss
                        batch.old_logprobs = self._no_grad_logprobs(self.model_wrapped, self.model, batch)

    # ---- The update

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one update's micro-batches, and look at what comes of them."""
        if "update" not in inputs:
            return torch.zeros((), device=self.args.device)
        update: Update = inputs["update"]
        model.train()
        loss, measured = self._with_less_memory(lambda: self._forward_backward(model, update), update)
        values = self._step_means(loss, measured)
        self._skips_step = self._guarded(values, partial(not_finite, self.model, str(self.args.output_dir), update))
        if math.isfinite(values["loss"]):
            self.metrics.mean("loss", loss)
            for batch, of_tokens in measured:
                self._record_values(batch, of_tokens)
        return loss

    def _forward_backward(self, model: nn.Module, update: Update) -> tuple[Tensor, list[Measured]]:
        """The loss, and what its micro-batches measured; gradients are synchronized on the last."""
        loss = torch.zeros((), device=self.args.device)
        measured: list[Measured] = []
        with self.metrics.phase("forward_backward"):
            for number, batch in enumerate(update.microbatches, start=1):
                last = number == len(update.microbatches)
                # Gradients that are not synchronized are whole ones, for which sharded models have no room.
                with contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(model):
                    part, values = self._loss(model, batch, update)
                    self.accelerator.backward(part)
                loss += part.detach()
                if batch.weight:
                    measured.append((batch, {name: value.detach() for name, value in values.items()}))
        return loss, measured

    def _loss(self, model: nn.Module, batch: PackedBatch, update: Update) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = self._logprobs(model, self.model, batch)
        if batch.old_logprobs is None:
            # Sampling-time weights are the current ones, so π_old is π_θ held constant; later passes will need it.
            batch.old_logprobs = logprobs.detach()
        loss, values = self.objective(
            logprobs,
            entropy,
            batch.advantages,
            batch.sequence,
            update.denominators,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
        )
        # Data-parallel wrappers average over processes what is already a share of the global sum.
        return loss * batch.weight * update.denominators.num_processes, values

    def _record_values(self, batch: PackedBatch, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            spread = name in SPREAD
            suffix = "_mean" if name.startswith("clip_ratio/") else "/mean" if spread else ""
            self.metrics.mean(name + suffix, value.detach().sum(), len(value))
            if spread:
                self.metrics.minimum(f"{name}/min", value.min().item())
                self.metrics.maximum(f"{name}/max", value.max().item())
        if "clip_ratio/low" in values:
            per_sequence = [
                sequence_mean(values[f"clip_ratio/{side}"], batch.sequence, batch.num_sequences) for side in ("low", "high")
            ]
            self.metrics.minimum("clip_ratio/low_min", per_sequence[0].min().item())
            self.metrics.maximum("clip_ratio/high_max", per_sequence[1].max().item())

    def _logprobs(self, wrapped: nn.Module, inner: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        def forward(batch: PackedBatch) -> tuple[Tensor, Tensor]:
            return batch_logprobs(causal_lm(inner), batch, temperature=self.args.temperature)

        with self.accelerator.autocast():
            return run_inside(wrapped, inner, forward, batch)

    @torch.no_grad()
    def _no_grad_logprobs(self, wrapped: nn.Module, inner: nn.Module, batch: PackedBatch) -> Tensor:
        return self._logprobs(wrapped, inner, batch)[0]

    def _reference_logprobs(self, batch: PackedBatch) -> Tensor:
        if self.ref_model is not None:
            return self._no_grad_logprobs(self.ref_model, self.ref_model, batch)
        with self.model.disable_adapter():
            return self._no_grad_logprobs(self.model_wrapped, self.model, batch)

    # ---- Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample every held-out prompt with fixed seeds, score, and log; several data sets have a prefix each."""
        parts = self.eval_prompts if eval_dataset is None else self._checked_eval(eval_dataset)
        if not parts:
            raise ValueError("evaluation needs an eval_dataset")
        args = self.args
        temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
        metrics: dict[str, float] = {}
        self.stream.settle()
        self.sampler.engine.sync_weights()
        with self.metrics.phase("evaluate"):
            for name, prompts in parts.items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                measured = evaluate_prompts(
                    prompts,
                    replace(self.sampler, metrics=Metrics()),
                    replace(self.sampling, temperature=temperature),
                    num_generations=args.num_generations_eval or args.num_generations,
                    batch_size=args.per_device_eval_batch_size,
                    seed=args.seed,
                    peers=self.peers,
                )
                metrics |= {f"{prefix}_{key}": value for key, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with what the steps since the last log measured; reward comes first."""
        self._claim_run_folder()
        readings = {}
        if "loss" in logs:
            steps = self.state.global_step - self._last_logged_step
            measured = self.metrics.flush(self.peers.gather, steps=steps)
            seconds = sum(value for name, value in measured.items() if name.startswith("time/"))
            measured["tokens_per_second"] = measured.get("tokens/sampled", 0.0) / seconds
            measured["num_tokens"] = self.state.num_input_tokens_seen
            trained_for = measured.get("time/forward_backward", 0.0) * max(steps, 1)
            measured |= self.throughput.flush(self.peers.gather, seconds=trained_for)
            logs = dict(sorted((logs | measured).items(), key=lambda item: item[0] != "reward"))
            self._last_logged_step = self.state.global_step
            rewards = [line["reward"] for line in [*self.state.log_history, logs] if "loss" in line and "reward" in line]
            readings = self.guards.look(Seen(self.state.global_step, rewards=rewards))
            logs |= {f"guards/{name}": float(reading.tripped) for name, reading in readings.items()}
        super().log(logs, start_time)
        self.guards.act(readings)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of an update that was taken."""
        return self.throughput.add(inputs["update"].microbatches) if "update" in inputs else 0
