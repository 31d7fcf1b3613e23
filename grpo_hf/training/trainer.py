"""GRPOTrainer: transformers.Trainer whose data are rollouts, with GRPO's loss on token trees.

In the order of the flow: `make_rollout` samples, scores, plans and records; `training_step` takes one of its updates.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from grpo_hf.algorithm.objective import Objective
from grpo_hf.episodes.environments import Kind
from grpo_hf.episodes.metrics import record_calls
from grpo_hf.evaluation.record import write_evaluation
from grpo_hf.evaluation.sampling import evaluate_prompts
from grpo_hf.metrics import Metrics
from grpo_hf.packing.choose import choose_layout, choose_router_loss, disable_dropout
from grpo_hf.packing.layout import default_budget
from grpo_hf.packing.logprobs import cast_head_to_fp32
from grpo_hf.packing.tree import common_length
from grpo_hf.rewards import Reward, RewardSpec, Scorer, get_rewards
from grpo_hf.rewards.faults import merged, stop_if_faulty
from grpo_hf.rollout.engine import EngineLostError
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Plan, Update
from grpo_hf.rollout.prompts import PromptOrder, PromptSet, prepare_tokenizer
from grpo_hf.rollout.stream import GroupSampler, Rollout, RolloutStream, SampleFunction
from grpo_hf.rollout.vllm_support import installed_vllm
from grpo_hf.training import adapters, checkpoints, checks
from grpo_hf.training import callbacks as own_callbacks
from grpo_hf.training.agents import (
    brought,
    check_chat,
    describe_agents,
    hosted_environment,
    make_episodes,
    make_toolbox,
    rollouts_of,
)
from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.engines import longest_sequence, make_engine, make_sampling
from grpo_hf.training.fingerprint import digest_of_weights
from grpo_hf.training.folder import RunFolder, check_writable
from grpo_hf.training.guards import REWARD_WINDOW, GuardError, Guards, Seen
from grpo_hf.training.model_card import model_card, source_of
from grpo_hf.training.models import (
    causal_lm,
    check_router,
    checked_model,
    is_sharded,
    keep_gradients,
    load_config,
    load_model,
    load_tokenizer,
    make_savable,
)
from grpo_hf.training.policy import Policy, with_logprobs
from grpo_hf.training.recorder import Recorder
from grpo_hf.training.same_run import Changes, check_same_run, describe_run
from grpo_hf.training.schedule import apply_settings, settings_of
from grpo_hf.training.starts import start
from grpo_hf.training.stopping import RunStopped, StopRequest
from grpo_hf.training.tables import log_table, sample_rows
from grpo_hf.training.teacher import check_vocabulary, load_teacher, rewards_beside
from grpo_hf.training.throughput import Throughput
from grpo_hf.types import Group

logger = logging.get_logger(__name__)


class GRPOTrainer(Trainer):
    """Train a causal LM with GRPO (Shao et al. 2024, arXiv 2402.03300) and its descendants.

    The constructor is TRL's. `model` is a name, a path or a causal LM; `reward_funcs` one or several of: a registered
    name, `package.module:function`, `path/file.py:function`, a function, a sequence-classification model. `train_dataset`
    needs a column "prompt" (strings or chat messages); verifiers take the other columns by name. `tools` are functions that
    the model may call in its answers; `environment_factory` makes an object with a state for each episode, whose methods are
    its tools, or maps names, which rows choose by their column "environment", to such factories; `environments` is one of
    the package verifiers, "verifiers:NAME", which brings data and rewards too; a `rollout_func` makes completions itself.
    Held-out rows are scored with `eval_reward_funcs`, or as training's. With a `teacher`, a name, a path or a causal LM with
    the same vocabulary, the reverse KL to it is part of the loss (`teacher_coef`); without reward_funcs it is all of it.
    Raises ValueError for bad input before any weights load.
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
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Callable[[list[Any], GRPOTrainer], dict[str, Any]] | None = None,
        environment_factory: Any = None,
        teacher: str | PreTrainedModel | None = None,
        eval_reward_funcs: RewardSpec | list[RewardSpec] | None = None,
        environments: str | dict[str, Any] | None = None,
    ):
        args = args or GRPOConfig()
        model = checked_model(model)
        init: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
        own_adapter = adapters.config_of(model, **init)
        adapters.check_one_adapter(model, own_adapter, peft_config)
        if (adapter := own_adapter or peft_config) is not None:
            adapters.check_adapter_config(adapter, beta=args.beta)
        checks.check_reference(args, lora=adapter is not None)
        if args.use_vllm and args.vllm_mode == "colocate":
            installed_vllm()
        self.metrics = Metrics()
        self.toolbox = make_toolbox(tools, environment_factory, rollout_func, args)
        self.rollout_func = rollout_func
        own = {"tools": tools, "environment_factory": environment_factory, "rollout_func": rollout_func}
        self.hosted = hosted_environment(environments, args, train_dataset=train_dataset, **own)
        train_dataset = checks.read_stream(train_dataset, args)
        owned, train_dataset, eval_dataset = brought(self.hosted, self.toolbox, train_dataset, eval_dataset)
        reward_funcs = rewards_beside(teacher, reward_funcs)
        self.rewards, weights = checks.checked_rewards(reward_funcs, args, reward_processing_classes, owned=owned)
        self.scorer = Scorer(self.rewards, weights, args.reward_settings())
        others = [*get_rewards(eval_reward_funcs or []), *owned]
        unweighted = Scorer(others, [1.0] * len(others), args.reward_settings())
        self.eval_scorer = unweighted if eval_reward_funcs else self.scorer
        if quantization_config is not None:
            init["quantization_config"] = quantization_config
        shared = {key: init[key] for key in ("revision", "trust_remote_code") if key in init}
        tokenizer = prepare_tokenizer(processing_class or load_tokenizer(model, **shared))
        check_chat(self.toolbox, tokenizer, args)
        config = load_config(model, **shared)
        check_router(config, args.router_aux_loss_coef)
        self._check = partial(
            checks.checked_prompts,
            args=args,
            tokenizer=tokenizer,
            config=config,
            toolbox=self.toolbox,
            more_columns=rollout_func is not None or environments is not None,
        )
        check_vocabulary(teacher, tokenizer, trust_remote_code=args.trust_remote_code)
        self.prompts = train = self._check(train_dataset, "train_dataset", scorer=self.scorer)
        checks.check_enough_prompts(train, args)
        self.eval_prompts = evals = self._checked_eval(eval_dataset)
        checks.check_best_metric(args, self.eval_scorer.rewards, list(evals))
        checks.check_stop_at(args, self.eval_scorer.rewards, list(evals))
        check_writable(Path(str(args.output_dir)))

        set_seed(args.seed)  # adapter weights are random
        lm, reference_adapter = trainable(model, args, peft_config, **init)
        args.ignore_data_skip = True  # skipping would sample; rollouts find their own place
        self.guards = Guards(args.chosen_guards(), self.metrics)
        self.peers = Peers(args.process_index, args.world_size, lambda item: gather_object([item]))
        self.folder = RunFolder(Path(str(args.output_dir)), self.peers)
        self.run = describe_run(args, train, self.rewards, weights, lm)
        self.run |= describe_agents(self.toolbox, rollout_func, self.hosted, train)
        """What makes it this run; taken before anything has changed it."""
        super().__init__(
            model=lm,
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=train.dataset,
            eval_dataset={name: part.dataset for name, part in evals.items()} or None,
            processing_class=tokenizer,
            callbacks=[
                own_callbacks.FiniteWeights(self.guards),
                own_callbacks.MetricsFile(self.folder),
                *([own_callbacks.StopAt(args.stop_at)] if args.stop_at else []),  # type: ignore[arg-type]
                *([own_callbacks.Profile(args.profile)] if args.profile else []),
                *(callbacks or []),
                *([own_callbacks.Report()] if args.write_report else []),
            ],
            optimizers=optimizers,
        )
        self.eval_dataset = eval_dataset
        self.loss_is_scaled_for_ga = True
        self._skips_step = False
        self.compute_dtype: torch.dtype = args.compute_dtype or causal_lm(self.model).dtype
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(own_callbacks.RewardProgress(self.compute_dtype))
        for reward in self._all_rewards():
            if hasattr(reward.function, "processing_class"):  # a model
                reward.function.to(self.args.device)  # type: ignore[attr-defined]
        self.objective: Objective = args.objective(teacher=teacher is not None)
        self.policy = self._make_policy(reference_adapter, load_teacher(teacher, args))
        if self.policy.teacher is not None:
            self.run["weights of the teacher"] = digest_of_weights(self.policy.teacher.named_parameters())
        self.plan = self._make_plan()
        self.stream = self._make_stream(tokenizer)
        self.rollout: Rollout | None = None
        """The one that is trained on."""
        self.recorder = Recorder(
            self.metrics, self.folder.path, self.peers, Throughput(causal_lm(self.model)), args.num_iterations
        )
        self.stop = StopRequest(self.peers)
        self._changes = Changes()
        moving = {"reference": self.policy.reference} if args.sync_ref_model and self.policy.reference is not None else {}
        parts: dict[str, checkpoints.Stateful] = {"stream": self.stream, "policy": self.policy, "recorder": self.recorder}
        self.checkpoints = checkpoints.Checkpoints(parts, moving, self.peers, self.metrics, self.prompts)
        self.add_callback(own_callbacks.StepClock(self.metrics, Updates(self).steps))
        for reference in moving.values():
            self.add_callback(own_callbacks.SyncReference(self.model, reference))

    # ---- Setting up

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's; accelerate looks for FSDP only where it has found GPUs, and would train unsharded on the CPU."""
        state = PartialState()
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU  # until it has looked; the device stays the CPU
        super().create_accelerator_and_postprocess()
        if torch.distributed.is_initialized():  # and it tells gloo nothing of how long to wait for a silent process
            _set_pg_timeout(timedelta(seconds=self.args.ddp_timeout))

    def _checked_eval(self, evals: Any) -> dict[str, PromptSet]:
        """Held-out prompts by name; a single data set has the name ""."""
        named = evals if isinstance(evals, dict) else {} if evals is None else {"": evals}
        return {
            name: self._check(checks.in_memory(table), f"eval_dataset {name}".strip(), scorer=self.eval_scorer)
            for name, table in named.items()
        }

    def _make_policy(self, reference_adapter: str | None, teacher: PreTrainedModel | None) -> Policy:
        args, longest = self.args, max(map(len, self.prompts.ids))
        if isinstance(self.model, PeftModel):
            if args.beta > 0:
                adapters.check_reference_weights(self.model, self.prompts.ids[0], beta=args.beta, adapter=reference_adapter)
            adapters.check_trained(self.model, self.prompts.ids[0])
        to_try = [self.prompts.ids[0], self.prompts.ids[-1]]
        layout = choose_layout(causal_lm(self.model), to_try, args.token_layout, training=args.disable_dropout)
        if teacher is not None:
            choose_layout(teacher, to_try, layout)
        budget = args.tokens_per_microbatch or default_budget(
            args.device,
            longest_prompt=longest,
            longest_group=longest + args.num_generations * args.max_completion_length,
            shared=common_length(min(self.prompts.ids), max(self.prompts.ids)),
        )
        # With an adapter the reference is the same model, with another one or none.
        own_reference = args.beta > 0 and not isinstance(self.model, PeftModel)
        return Policy(
            self.model,
            accelerator=self.accelerator,
            objective=self.objective,
            layout=layout,
            tokens_per_microbatch=budget,
            temperature=args.temperature,
            reference=copy.deepcopy(self.model).eval().requires_grad_(False) if own_reference else None,
            reference_adapter=reference_adapter,
            needs_reference=args.beta > 0,
            teacher=teacher,
            entropy_control=args.entropy_control(),
            router=choose_router_loss(causal_lm(self.model), to_try[0], args.router_aux_loss_coef),
            sharded=is_sharded(self.accelerator),
            peers=self.peers,
        )

    def _make_plan(self) -> Plan:
        args = self.args
        return Plan(
            credit=args.credit(),
            reward_weights=self.scorer.weights,
            updates_per_rollout=args.updates_per_rollout,
            max_completion_length=args.max_completion_length,
            mask_truncated_completions=args.mask_truncated_completions,
            keep_zero_signal=args.keep_zero_signal or self.objective.needs_every_token or self.aux_loss_enabled,
            whole_completions=self.objective.needs_whole_completions,
            # A local mean is over the completions that a process has sampled itself.
            balance=args.balance_processes and self.peers.count > 1 and not self.objective.needs_own_completions,
        )

    def _make_stream(self, tokenizer: PreTrainedTokenizerBase) -> RolloutStream:
        args = self.args
        sampling = make_sampling(args, tokenizer, causal_lm(self.model))
        length = longest_sequence(
            [self.prompts, *self.eval_prompts.values()],
            args,
            causal_lm(self.model).config,
            observations=self.toolbox is not None and bool(self.toolbox.kinds),
        )
        engine = make_engine(
            self.model,
            args,
            sampling=sampling,
            max_model_length=length,
            tokenizer=tokenizer,
            peers=self.peers,
            sharded=self.policy.sharded,
        )
        episodes: SampleFunction | None = None
        if self.rollout_func is not None:
            episodes = rollouts_of(self.rollout_func, self)
        elif (played := self.toolbox or self.hosted) is not None:
            episodes = make_episodes(engine, played, self._all_rewards(), args, tokenizer, max_model_length=length)
        seed = args.seed if args.data_seed is None else args.data_seed
        return RolloutStream(
            prompts=self.prompts,
            order=PromptOrder(len(self.prompts), args.prompts_per_rollout, seed, args.shuffle_dataset),
            sampler=GroupSampler(engine, tokenizer, self.scorer, self.metrics, episodes),
            sampling=sampling,
            num_generations=args.num_generations,
            peers=self.peers,
            choice=args.choice(),
        )

    def _all_rewards(self) -> list[Reward]:
        return self.rewards if self.eval_scorer is self.scorer else [*self.rewards, *self.eval_scorer.rewards]

    @property
    def reward_funcs(self) -> list[Any]:
        """The verifiers' functions, and the models among them, in their order."""
        functions: list[Any] = [reward.function for reward in self.rewards]
        return [item.model if hasattr(item, "processing_class") else item for item in functions]

    @property
    def reward_func_names(self) -> list[str]:
        """Their names, as in the metrics."""
        return [reward.name for reward in self.rewards]

    @property
    def reward_weights(self) -> Tensor:
        """What each is multiplied by in their sum."""
        return torch.tensor(self.scorer.weights)

    @property
    def tools(self) -> list[Callable[..., Any]]:
        """What the model may call, whatever the row."""
        return self.toolbox.functions if self.toolbox else []

    @property
    def environments(self) -> dict[str | None, Kind] | None:
        """What episodes may play in, by the name in a row's column `environment` (None: all rows have this one); None
        without any. The objects themselves live in processes of their own."""
        return (self.toolbox.kinds if self.toolbox else None) or None

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether a router's load-balancing loss is added to this one."""
        return self.policy.router is not None

    @property
    def entropy_coef(self) -> float | None:
        """The entropy bonus's, which adaptive control changes; None without one."""
        return self.policy.entropy_coef

    @property
    def reward_processing_classes(self) -> list[Any]:
        """The tokenizers of those that are models; None for the others."""
        return [getattr(reward.function, "processing_class", None) for reward in self.rewards]

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model; None without one, and with an adapter, where it is the model with another one or none."""
        return self.policy.reference

    # ---- Rollouts

    def get_train_dataloader(self) -> Updates:  # type: ignore[override]
        """The updates of one pass; rollouts and measurements that an earlier train() has left are not this one's."""
        self.stream.reset()
        self.recorder.reset()
        self.recorder.throughput.start(self.args.device, self.compute_dtype)
        self.rollout = None
        return Updates(self)

    def make_rollout(self, index: int) -> Rollout:
        """Sample, score, plan and record a rollout, and take the log-probs that it needs of the weights as they are now."""
        args, step = self.args, self.state.global_step
        ahead = args.rollout_ahead > 0 and step + args.steps_per_rollout < self.state.max_steps
        rollout = self.stream.make(index, version=step, ahead=ahead, trainer_state=self.state)
        updates = self.plan.updates(rollout.groups, rollout.version, self.peers)
        self.state.num_input_tokens_seen += self.recorder.rollout(rollout, step=step + 1, save=args.save_rollouts)
        if self.toolbox is not None or self.hosted is not None:
            record_calls(self.metrics, rollout.sampled, self.toolbox.names if self.toolbox else ())
        if args.use_vllm:
            self.metrics.mean("sampling/staleness", step - rollout.version)
        since_log = step % max(1, int(self.state.logging_steps or 1))
        if args.log_completions and since_log < args.steps_per_rollout:
            self._show(rollout.groups, step + 1)
        checks.warn_without_reward(rollout.sampled)
        if index == 0 and self.rewards:
            checks.warn_without_signal(rollout.sampled)
        stop_if_faulty(merged(self.peers.gather(rollout.tally)), self.scorer.settings)
        with self.metrics.phase("logprobs"):
            return replace(rollout, updates=self.policy.annotated(updates, step=step + 1))

    def _show(self, groups: list[Group], step: int) -> None:
        rows = [row for part in self.peers.gather(sample_rows(groups, step)) for row in part]
        if self.peers.rank == 0:
            own_callbacks.print_samples(groups, step, self.args.num_completions_to_print or 4)
            log_table(rows, self.args.report_to or (), unique_prompts=self.args.log_unique_prompts)

    # ---- The update

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Take one update's gradient, and look at what comes of it."""
        if "update" not in inputs:
            return torch.zeros((), device=self.args.device)
        update: Update = inputs["update"]
        model.train()
        with self.metrics.phase("forward_backward"):
            report = self.policy.forward_backward(update, step=self.state.global_step + 1)
        if self.args.num_iterations > 1 and update.samples[0].old_logprobs is None:
            update.samples = with_logprobs(update.samples, old_logprobs=report.logprobs)  # for its later passes
        self.current_flos += self.recorder.throughput.add(report.batches)
        means = self.recorder.step(report)
        self.policy.adapt(means.get("entropy", math.nan))
        if self.policy.entropy_coef is not None:
            self.metrics.mean("entropy_coef", self.policy.entropy_coef)
        if (rollout := self.rollout) is not None:
            means["sampling/staleness"] = rollout.index * self.args.steps_per_rollout - rollout.version
        explain = partial(checks.why_not_finite, self.model, self.args, report)
        seen = Seen(self.state.global_step + 1, means, explain=explain)
        self._skips_step = self.guards.check(seen, can_skip=True)
        return report.loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing more: training_step has counted them."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, with a look at it before it reaches the weights, and without the gradients of a step that is skipped.

        fp16's gradient scaler makes such gradients itself, finds them, and leaves out the step.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and self.accelerator.scaler is None and not self._skips_step:
            explain = partial(checks.why_not_finite, self.model, self.args)
            seen = Seen(self.state.global_step + 1, {"gradient norm": float(grad_norm)}, explain=explain)
            self._skips_step = self.guards.check(seen, can_skip=True)
        if self._skips_step:
            model.zero_grad()  # to None: from a gradient of zero, momentum and weight decay would still move weights
        if self.guards.may_skip:
            self.metrics.mean("guards/skipped_steps", float(self._skips_step))
        return grad_norm

    # ---- A run and its checkpoints

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Trainer's; "auto" goes on from the newest whole checkpoint in output_dir, or starts anew.

        Ctrl-C and SIGTERM stop it after the step, with a checkpoint, by RunStopped, which is a SystemExit.
        """
        with self.folder.lock(), self.stop.watched():
            checkpoint = checkpoints.resume_point(resume_from_checkpoint, self.folder.path)
            self.peers.gather(None)  # all have looked at the folder as it was
            self._open_folder(checkpoint)
            self.folder.add_start(start(self.args, 0 if checkpoint is None else checkpoints.step_of(checkpoint)))
            return self._train(checkpoint, trial, ignore_keys_for_eval)

    def _open_folder(self, checkpoint: Path | None) -> None:
        """Before a run begins, or goes on from a checkpoint, if it is one of this run."""
        if checkpoint is None:
            self._changes = Changes()
            source = getattr(causal_lm(self.model).config, "_name_or_path", "")
            return self.folder.begin(keep_model=bool(source) and Path(str(source)).resolve() == self.folder.path.resolve())
        step, steps = checkpoints.step_of(checkpoint), self.args.steps_per_rollout
        saved = checkpoints.run_of(checkpoint)
        self._changes = check_same_run(saved, self.run, str(checkpoint), within_rollout=step % steps > 0)
        if self._changes.said:
            logger.warning(self._changes.said)
        self.folder.go_on(checkpoint, rollouts=-(-step // steps))

    def _train(self, checkpoint: Path | None, trial: Any, ignore_keys_for_eval: Any) -> TrainOutput:
        self.checkpoints.unsaved = None
        on_start, self.args.eval_on_start = self.args.eval_on_start, self.args.eval_on_start and checkpoint is None
        try:
            output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
        except (GuardError, RunStopped) as error:
            self._save_before_stop(trial)
            if isinstance(error, RunStopped) and self.peers.rank == 0:
                print(self._how_to_go_on(), file=sys.stderr, flush=True)
            raise
        except EngineLostError:
            self.stream.ahead = None  # it is lost with the engine
            if self.state.global_step:
                self._save_checkpoint(self.model, trial)
                logger.error(f"saved step {self.state.global_step}; go on with --resume_from_checkpoint auto")
            raise
        finally:
            self.args.eval_on_start = on_start
            self.stream.sampler.engine.abort()
            if self.toolbox is not None:
                self.toolbox.close()
            self.folder.end()
        if self.checkpoints.unsaved:
            raise GuardError(f"the run has ended, and its last checkpoint is not saved: {self.checkpoints.unsaved}")
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, which looks only after a step whether the run has ended."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _how_to_go_on(self) -> str:
        newest = checkpoints.newest_checkpoint(self.folder.path)
        how = f"go on from {newest} with --resume_from_checkpoint auto" if newest else "no checkpoint is there to go on from"
        return f"stopped after step {self.state.global_step}: {how}"

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, with the parts that this trainer adds; older checkpoints go when this one is whole."""
        state, steps = self.state, self.args.steps_per_rollout
        more = {"rollout": checkpoints.unfinished(self.rollout, state.global_step, steps)}
        folder = self._checkpoint_folder(trial)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        history, state.log_history = state.log_history, state.log_history[-REWARD_WINDOW:]  # metrics.jsonl has all of it
        others = partial(super()._save_checkpoint, model, trial)
        try:
            if self.peers.rank == 0:
                self.folder.flush(to_disk=True)
            whole = self.checkpoints.save(folder, others, more, run=self.run, weights_only=self.args.save_only_model)
        finally:
            self.args.save_total_limit, state.log_history = limit, history
        if whole and self.peers.rank == 0:
            checkpoints.rotate(folder.parent, limit, keep=folder, best=state.best_model_checkpoint)

    def _save_before_stop(self, trial: Any) -> None:
        """The steps so far are good, unless their weights are not."""
        wanted = self.args.save_strategy != "no" and self.state.global_step > 0
        finished = checkpoints.is_finished(self._checkpoint_folder(trial))
        if wanted and not finished and math.isfinite(checks.norm_of_weights(self.model)):
            self._save_checkpoint(self.model, trial)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer's, but a tied weight is not missing: a checkpoint holds it once, under its other name."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, with a model card beside a model that is no checkpoint."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card(folder=output_dir)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        folder: str | None = None,
    ) -> None:
        """Write README.md: the base model, the data set, rewards, figures, settings and versions."""
        if self.peers.rank > 0:
            return
        folder = folder or str(self.args.output_dir)
        card = model_card(
            name=model_name or self.args.hub_model_id or Path(folder).resolve().name,
            base_model=source_of(causal_lm(self.model).config),
            is_adapter=isinstance(self.model, PeftModel),
            dataset=dataset_name,
            tags=[tags] if isinstance(tags, str) else tags or [],
            rewards={reward.name: weight for reward, weight in zip(self.rewards, self.scorer.weights, strict=True)},
            args=self.args,
            lines=self.state.log_history,
            prompts=len(self.prompts),
        )
        card.save(Path(folder) / "README.md")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, with what was changed on purpose, the parts that this trainer adds, and the random state."""
        changed = self._changes.schedule and not self.is_deepspeed_enabled
        settings = settings_of(self.optimizer) if changed else []
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            if changed:
                apply_settings(self.optimizer, self.lr_scheduler, settings)
            state = self.checkpoints.load(Path(checkpoint), self.args.device, sampled_otherwise=self._changes.sampling)
            self.rollout = state["rollout"]
            self._load_rng_state(checkpoint)

    # ---- Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample every held-out prompt with fixed seeds, score, and log; several data sets have a prefix each."""
        with self.folder.lock():
            return self._evaluate_prompts(eval_dataset, metric_key_prefix)

    def _evaluate_prompts(self, eval_dataset: Any, metric_key_prefix: str) -> dict[str, float]:
        parts = self.eval_prompts if eval_dataset is None else self._checked_eval(eval_dataset)
        if not parts:
            raise ValueError("evaluation needs an eval_dataset")
        args, stream = self.args, self.stream
        temperature = args.temperature if args.eval_temperature is None else args.eval_temperature
        metrics: dict[str, float] = {}
        stream.settle()
        stream.sampler.engine.sync_weights(self.state.global_step)
        with self.metrics.phase("evaluate"):
            for name, prompts in parts.items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                measured = evaluate_prompts(
                    prompts,
                    replace(stream.sampler, scorer=self.eval_scorer, metrics=Metrics()),
                    replace(stream.sampling, temperature=temperature),
                    num_generations=args.num_generations_eval or args.num_generations,
                    batch_size=args.per_device_eval_batch_size,
                    seed=args.seed,
                    peers=self.peers,
                    trainer_state=self.state,
                )
                metrics |= {f"{prefix}_{key}": value for key, value in measured.metrics.items()}
                if args.save_rollouts and measured.groups:
                    self._begin_record()
                    place = {"step": self.state.global_step, "process": self.peers.rank, "seed": args.seed}
                    write_evaluation(self.folder.path, measured.groups, name=name, **place)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Logs

    def _begin_record(self) -> None:
        """What is measured before the first step is a new run's first line; after the last one it is still the run's."""
        if self.state.global_step == 0:
            self.folder.begin_record()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with what the steps since the last log measured; reward comes first."""
        self._begin_record()
        readings = {}
        if "loss" in logs:
            logs = self.recorder.line(logs, step=self.state.global_step)
            logs["num_tokens"] = self.state.num_input_tokens_seen
            lines = [line for line in [*self.state.log_history, logs] if "loss" in line and "reward" in line]
            readings = self.guards.look(Seen(self.state.global_step, lines=lines))
            logs |= {f"guards/{name}": float(reading.tripped) for name, reading in readings.items()}
        elif "train_loss" in logs:  # the summary, in which TRL's users look for the last metrics
            last = next((line for line in reversed(self.state.log_history) if "loss" in line), {})
            logs = {name: value for name, value in last.items() if name not in ("loss", "step", "epoch")} | logs
        super().log(logs, start_time)
        self.guards.act(readings)


def trainable(
    model: str | PreTrainedModel | PeftModel, args: GRPOConfig, peft_config: PeftConfig | None, **init: Any
) -> tuple[Any, str | None]:
    """The model as it is trained, and the name of the adapter that is its reference, where it is one."""
    lm: Any = load_model(model, **init) if isinstance(model, str) else model
    make_savable(causal_lm(lm))
    keep_gradients(lm)
    if args.cast_lm_head_to_fp32:
        cast_head_to_fp32(causal_lm(lm))
    lm, reference_adapter = adapters.with_adapter(lm, peft_config, needs_reference=args.beta > 0)
    if args.disable_dropout:
        disable_dropout(lm)
    return lm, reference_adapter


class Updates:
    """One pass over the prompts, as the dataloader that Trainer draws from.

    Trainer draws `gradient_accumulation_steps` items for an optimizer step. An update is planned as a whole, so the last
    of them carries it and the others are empty. Which update comes next follows from the number of finished ones alone,
    so a resumed run goes on where the killed one was.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer, self.dataset = trainer, trainer.prompts
        self.steps = trainer.stream.order.rollouts_per_epoch * trainer.args.steps_per_rollout

    def __len__(self) -> int:
        return self.steps * self.trainer.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer, args = self.trainer, self.trainer.args
        start = trainer.state.global_step
        trainer.policy.inner, trainer.policy.wrapped = trainer.model, trainer.model_wrapped  # the launcher's, by now
        for step in range(start, (start // self.steps + 1) * self.steps):
            index, place = divmod(step, args.steps_per_rollout)
            trainer.stop.check()
            if trainer.rollout is None or trainer.rollout.index != index:
                trainer.rollout = trainer.make_rollout(index)
            yield from [{}] * (args.gradient_accumulation_steps - 1)
            yield {"update": trainer.rollout.updates[place % args.updates_per_rollout]}
