"""What of a trainer looks at a step before it counts, and takes it again when memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from grpo_hf.packing.split import split
from grpo_hf.rollout.planning import Update
from grpo_hf.training.checks import not_finite, weights_not_finite
from grpo_hf.training.guards import GuardError, Guards, Seen, is_out_of_memory
from grpo_hf.training.resumable import ResumableTrainer
from grpo_hf.types import PackedBatch

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
Measured = tuple[PackedBatch, dict[str, Tensor]]
"""A micro-batch and the per-token values of its loss."""


class GuardedTrainer(ResumableTrainer):
    """A trainer with guards (grpo_hf/training/guards.py), which skip a step or stop a run whose numbers go bad."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.guards = Guards(self.args.chosen_guards())
        self._skips_step = False

    def _step_means(self, loss: Tensor, measured: list[Measured]) -> dict[str, float]:
        """The loss and the means over an update's tokens, over all processes, by metric name."""
        mine = {"loss": (loss.item(), 1)}
        for name in measured[0][1] if measured else ():
            values = [of_tokens[name] for _, of_tokens in measured]
            mine[name] = (sum(value.sum() for value in values).item(), sum(map(len, values)))  # type: ignore[union-attr]
        everyone = self.peers.gather(mine)
        means: dict[str, float] = {}
        for name in dict.fromkeys(name for part in everyone for name in part):
            totals, counts = zip(*(part[name] for part in everyone if name in part), strict=True)
            means[name] = sum(totals) / sum(counts)
        if (rollout := self.stream.rollout) is not None:
            means["sampling/staleness"] = rollout.index * self.stream.steps_per_rollout - rollout.version
        return means

    def _guarded(self, values: dict[str, float], explain: Callable[[], str], *, taken: bool = False) -> bool:
        """Whether to skip the step; ``taken``: it is too late for that. Raises GuardError where a guard stops the run."""
        readings = self.guards.look(Seen(self.state.global_step + (not taken), values, explain=explain))
        for name, reading in readings.items():
            self.metrics.maximum(f"guards/{name}", float(reading.tripped))
        return self.guards.act(readings, can_skip=not taken)

    def _guard_weights(self, norm: float) -> None:
        explain = partial(weights_not_finite, self.state.global_step, self.model, self.args)
        self._guarded({"norm of the weights": norm}, explain, taken=True)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, with a look at it before it reaches the weights, and without the gradients of a step that is skipped.

        fp16's gradient scaler makes such gradients itself, finds them, and leaves out the step.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and self.accelerator.scaler is None and not self._skips_step:
            explain = partial(not_finite, self.model, str(self.args.output_dir))
            self._skips_step = self._guarded({"gradient norm": float(grad_norm)}, explain)
        if self._skips_step:
            model.zero_grad()  # to None: from a gradient of zero, momentum and weight decay would still move weights
        if self.guards.may_skip:
            self.metrics.mean("guards/skipped_steps", float(self._skips_step))
        return grad_norm

    def _with_less_memory(self, run: Callable[[], Result], update: Update) -> Result:
        """What ``run`` makes of the update, tried once more on micro-batches of half the tokens when memory has run out."""
        own = [batch for batch in update.microbatches if batch.old_logprobs is None]
        try:
            return run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._halve_budget(update, error)
        # Outside the except clause, which keeps the failed pass's activations.
        for batch in own:
            batch.old_logprobs = None
        self.model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for planned in self.stream.rollout.updates if self.stream.rollout else [update]:
            planned.microbatches = [
                part
                for batch in planned.microbatches
                for part in split(batch, tokens_per_microbatch=self.stream.plan.tokens_per_microbatch)
            ]
        return self._with_less_memory(run, update)

    def _halve_budget(self, update: Update, error: RuntimeError) -> None:
        """For the rest of the run; raises when that was done before, or when other processes would have to join in."""
        budget, largest = self.stream.plan.tokens_per_microbatch, max(batch.num_tokens for batch in update.microbatches)
        step = self.state.global_step + 1
        said = f"out of memory in step {step} on micro-batches of up to {largest} tokens, tokens_per_microbatch={budget}"
        if self.peers.count > 1:  # they wait in a collective, where a checkpoint would wait for them
            raise torch.OutOfMemoryError(f"{said}; set tokens_per_microbatch={max(1, budget // 2)}: {error}") from error
        if self._halved_budget is not None or budget == 1:
            raise GuardError(
                f"{said}, which was halved before: lower it, max_completion_length={self.args.max_completion_length} or the "
                f"length of prompts, or set gradient_checkpointing=True: {error}"
            ) from error
        self._set_budget(budget // 2)
        logger.warning(f"{said}; from here on it is {budget // 2}, and the step is taken again with the same numbers")
        self.metrics.maximum("guards/out_of_memory", 1.0)
