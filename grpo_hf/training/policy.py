"""The model that is trained: its log-probs, its reference's, and the gradient of an update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from grpo_hf.algorithm.entropy_control import EntropyControl
from grpo_hf.algorithm.objective import Objective
from grpo_hf.algorithm.router import RouterLoss, load_balancing
from grpo_hf.algorithm.selection import joined
from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.rollout.peers import ALONE, Peers
from grpo_hf.rollout.planning import Update
from grpo_hf.training.adapters import reference_weights
from grpo_hf.training.guards import GuardError, is_out_of_memory
from grpo_hf.training.models import causal_lm
from grpo_hf.types import PackedBatch, TrainingSample

logger = logging.get_logger(__name__)


@dataclass
class StepReport:
    """What the forward and backward passes of an update have measured on this process."""

    loss: Tensor
    """Of the update: this process's part, times the number of processes."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """The same by term of the objective."""
    batches: list[PackedBatch] = field(default_factory=list)
    """The micro-batches that were run."""
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    """Per-token values of each by name, NaN where a token is not counted; none of one that adds nothing to the gradient."""
    logprobs: dict[int, Tensor] = field(default_factory=dict)
    """Of each sample's targets, by its number in the update, before the step."""
    out_of_memory: bool = False
    """Whether memory ran out at first."""
    aux_loss: Tensor | None = None
    """The router's, before its coefficient, as `loss` is; None where it is not added."""

    def values(self) -> dict[str, Tensor]:
        """Each metric's values that count, over all micro-batches."""
        names = dict.fromkeys(name for values in self.metrics for name in values)
        joined = {name: torch.cat([values[name] for values in self.metrics if name in values]) for name in names}
        return {name: values[~values.isnan()] for name, values in joined.items()}


class Policy:
    """A causal LM with what its training needs: a wrapper, a reference, a teacher, a layout, an objective.

    ``inner`` is the model or the PEFT model around it; ``wrapped`` what the launcher has put around that.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        accelerator: Any,
        objective: Objective,
        layout: str,
        tokens_per_microbatch: int,
        temperature: float,
        reference: nn.Module | None = None,
        reference_adapter: str | None = None,
        needs_reference: bool = False,
        teacher: nn.Module | None = None,
        entropy_control: EntropyControl | None = None,
        router: RouterLoss | None = None,
        sharded: bool = False,
        peers: Peers = ALONE,
    ):
        """``reference`` None is the model with its ``reference_adapter``, or with its adapter switched off; ``sharded``:
        every process runs as many forward passes as the others."""
        self.inner = self.wrapped = model
        self.accelerator, self.objective, self.layout, self.temperature = accelerator, objective, layout, temperature
        self.reference, self.reference_adapter, self.needs_reference = reference, reference_adapter, needs_reference
        self.sharded, self.peers = sharded, peers
        self.teacher, self.entropy_control, self.router = teacher, entropy_control, router
        self.tokens_per_microbatch = tokens_per_microbatch
        self.was_halved = False
        """Whether memory has run out before; once more ends the run."""

    def microbatches(self, update: Update) -> list[PackedBatch]:
        """An update's samples laid out under the budget that holds now, on the model's device."""
        batches = LAYOUTS[self.layout](update.samples, tokens_per_microbatch=self.tokens_per_microbatch)
        weight = 0.0 if update.idle else 1.0
        batches = [replace(batch.to(self.accelerator.device), weight=weight) for batch in batches]
        if self.sharded:
            missing = max(self.peers.gather(len(batches))) - len(batches)
            batches += [replace(min(batches, key=lambda batch: batch.num_tokens), weight=0.0)] * missing
        return batches

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """log π_θ of every target [token], a constant."""
        return self._forward(self.wrapped, self.inner, batch)[0]

    @torch.no_grad()
    def ref_logprobs(self, batch: PackedBatch) -> Tensor:
        """log π_ref of every target [token]."""
        if self.reference is not None:
            return self._forward(self.reference, self.reference, batch)[0]
        assert isinstance(self.inner, PeftModel)
        with reference_weights(self.inner, self.reference_adapter):
            return self._forward(self.wrapped, self.inner, batch)[0]

    @torch.no_grad()
    def teacher_logprobs(self, batch: PackedBatch) -> Tensor:
        """log π_teacher of every target [token]."""
        assert self.teacher is not None
        return self._forward(self.teacher, self.teacher, batch)[0]

    def annotated(self, updates: list[Update], *, step: int) -> list[Update]:
        """The updates of a new rollout with the log-probs that they will need of the weights as they are now: the
        reference's, and, for all but the first, whose weights these are, the policy's own."""
        return [self._retried(partial(self._annotated, update, number), step)[0] for number, update in enumerate(updates)]

    def _annotated(self, update: Update, number: int) -> Update:
        wanted = {"ref_logprobs": self.ref_logprobs} if self.needs_reference else {}
        wanted |= {"teacher_logprobs": self.teacher_logprobs} if self.teacher is not None else {}
        wanted |= {"old_logprobs": self.logprobs} if number else {}
        found: dict[str, dict[int, Tensor]] = {name: {} for name in wanted}
        for batch in self.microbatches(update) if wanted else ():
            for name, source in wanted.items():
                found[name] |= batch.by_sample(source(batch).cpu())
        return replace(update, samples=with_logprobs(update.samples, **found))

    def forward_backward(self, update: Update, *, step: int) -> StepReport:
        """Add the update's gradient, which is synchronized on its last micro-batch."""
        report, again = self._retried(partial(self._forward_backward, update), step)
        return replace(report, out_of_memory=again)

    def _retried(self, run: Callable[[], Any], step: int) -> tuple[Any, bool]:
        """What ``run`` returns, and whether memory ran out at first: then it is run once more with half the budget. Raises
        GuardError when that is not enough."""
        try:
            return run(), False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._halve_budget(step, error)
        # Outside the except clause, which keeps the failed pass's activations.
        self.inner.zero_grad()
        torch.cuda.empty_cache()
        return self._retried(run, step)[0], True

    def _forward_backward(self, update: Update) -> StepReport:
        zero = torch.zeros((), device=self.accelerator.device)
        report, objective = StepReport(zero), self.objective
        if self.entropy_control is not None:
            objective = objective.with_coefficient("entropy", -self.entropy_control.applied)
        batches = self.microbatches(update)
        selected, sent = self._selected(batches), self._sent_to_experts(batches)
        for number, batch in enumerate(batches, start=1):
            # Gradients that are not synchronized are whole ones, for which sharded models have no room.
            synced = number == len(batches) or self.sharded
            with contextlib.nullcontext() if synced else self.accelerator.no_sync(self.wrapped):
                logprobs, entropy, *load = self._forward(self.wrapped, self.inner, batch, self.router)
                tokens = replace(batch.tokens(logprobs, entropy), selected=selected[number - 1])
                parts, metrics = objective.parts(tokens, update.denominators)
                if self.router is not None:
                    balance = load_balancing(sent, load[0][1], self.router.experts_per_token)
                    parts["router"] = self.router.coefficient * balance
                # Data-parallel wrappers average over processes what is already a share of the global sum.
                factor = batch.weight * update.denominators.num_processes
                part = sum(parts.values(), start=zero) * factor
                self.accelerator.backward(part)
            report.loss = report.loss + part.detach()
            for name, value in parts.items():
                report.parts[name] = report.parts.get(name, zero) + value.detach() * factor
            report.batches.append(batch)
            report.metrics.append({name: value.detach() for name, value in metrics.items()} if batch.weight else {})
            report.logprobs |= batch.by_sample(tokens.logprobs.detach().cpu())
        if self.router is not None:
            report.aux_loss = report.parts["router"] / self.router.coefficient
        return report

    @torch.no_grad()
    def _sent_to_experts(self, batches: list[PackedBatch]) -> Tensor:
        """How many tokens of the update are sent to each expert [expert], over all processes; nothing without a router."""
        nothing = torch.zeros((), device=self.accelerator.device)
        if self.router is None:
            return nothing
        loads = [self._forward(self.wrapped, self.inner, batch, self.router)[2] * batch.weight for batch in batches]
        return sum(self.peers.gather(sum(loads, start=nothing)[0].cpu())).to(self.accelerator.device)

    @torch.no_grad()
    def _selected(self, batches: list[PackedBatch]) -> list[dict[str, Tensor]]:
        """By micro-batch what the objective's selections say of its tokens, when they have seen those of all processes."""
        if not self.objective.selections:
            return [{} for _ in batches]
        mine = [batch.tokens(*self._forward(self.wrapped, self.inner, batch)) for batch in batches]
        counted = [tokens for tokens, batch in zip(mine, batches, strict=True) if batch.weight]
        everyone = self.peers.gather([joined(counted)] if counted else [])
        before = sum(len(tokens.logprobs) for part in everyone[: self.peers.rank] for tokens in part)
        said = self.objective.select(joined([tokens for part in everyone for tokens in part])) if any(everyone) else {}
        selected = []
        for tokens, batch in zip(mine, batches, strict=True):
            of_batch = {name: torch.zeros_like(tokens.logprobs) for name in self.objective.selections}
            if batch.weight:
                place = slice(before, before + len(tokens.logprobs))
                of_batch = {name: values[place].to(tokens.logprobs) for name, values in said.items()}
                before = place.stop
            selected.append(of_batch)
        return selected

    def adapt(self, entropy: float) -> None:
        """Let the entropy coefficient follow a step's mean entropy over all processes."""
        if self.entropy_control is not None and not math.isnan(entropy):
            self.entropy_control = self.entropy_control.after(entropy)

    @property
    def entropy_coef(self) -> float | None:
        """As TRL logs it: the constant one, or the one that the next step has; None without an entropy bonus."""
        if self.entropy_control is not None:
            return self.entropy_control.coefficient
        return next((-term.coefficient for term in self.objective.terms if term.name == "entropy"), None)

    def _forward(
        self, wrapped: nn.Module, inner: nn.Module, batch: PackedBatch, router: RouterLoss | None = None
    ) -> tuple[Tensor, ...]:
        """Log-probs and entropy of the targets [token], with a router the experts' load too, in place of the inner model's
        forward, through the wrapper (DDP, FSDP): its own work before and after, such as gathering weights and readying
        gradient buckets, is done as for any forward."""
        own, experts = vars(inner).get("forward"), router.experts_per_token if router else None
        of_batch = partial(batch_logprobs, causal_lm(inner), temperature=self.temperature, experts_per_token=experts)
        inner.forward = of_batch  # type: ignore[method-assign]
        try:
            with self.accelerator.autocast():
                return wrapped(batch)
        finally:
            if own is None:
                del inner.forward
            else:
                inner.forward = own  # type: ignore[method-assign]

    def _halve_budget(self, step: int, error: RuntimeError) -> None:
        """For the rest of the run; raises when that was done before, or when other processes would have to join in."""
        budget = self.tokens_per_microbatch
        message = f"out of memory in step {step}, tokens_per_microbatch={budget}"
        if self.peers.count > 1:  # they wait in a collective, where a checkpoint would wait for them
            raise torch.OutOfMemoryError(f"{message}; set tokens_per_microbatch={max(1, budget // 2)}: {error}") from error
        if self.was_halved or budget == 1:
            why = "was halved before" if self.was_halved else "is the least"
            raise GuardError(
                f"{message}, which {why}: lower it, max_completion_length or the length of prompts, or set "
                f"gradient_checkpointing=True: {error}"
            ) from error
        self.tokens_per_microbatch, self.was_halved = budget // 2, True
        logger.warning(f"{message}; from here on it is {budget // 2}, and the step is taken again with the same numbers")

    def state_dict(self) -> dict[str, Any]:
        """The budget, where memory has run out, and the entropy coefficient, where it moves."""
        return {
            "halved_budget": self.tokens_per_microbatch if self.was_halved else None,
            "entropy_control": self.entropy_control,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a checkpoint's."""
        if state["halved_budget"]:
            self.tokens_per_microbatch = min(state["halved_budget"], self.tokens_per_microbatch)
            self.was_halved = True
        self.entropy_control = state["entropy_control"]


def with_logprobs(samples: list[TrainingSample], **found: dict[int, Tensor]) -> list[TrainingSample]:
    """The samples with these of their log-probs, by sample number."""
    return [
        replace(sample, **{name: values[number] for name, values in found.items()})  # type: ignore[arg-type]
        for number, sample in enumerate(samples)
    ]
