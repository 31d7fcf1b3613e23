"""Liger's fused linear GRPO loss, in the plain loop over padded rows, each target a row of its own for it.

So its head sees targets alone; as many completions as TRL forwards at a time are padded to their longest, sorted by length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, Data
from benchmarks.sides import plain
from benchmarks.sides.clock import Clock
from benchmarks.sides.plain import EPSILON, MicroBatch, Sample


def train(case: Case, model: str, folder: str, data: Data, clock: Clock) -> None:
    """With torch's SDPA, causal: padding comes last."""
    plain.train(case, model, data, clock, lay_out=lay_out, head=fused_head)


def lay_out(case: Case, samples: Sequence[Sample]) -> Iterator[MicroBatch]:
    """Padded rows."""
    for rows in rows_of(case, samples):
        input_ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
        places = []
        for number, row in enumerate(rows):
            input_ids[number, : len(row.ids)] = torch.tensor(row.ids)
            start = number * input_ids.shape[1] + len(row.prompt) - 1
            places.append(range(start, start + len(row.completion.ids)))
        yield plain.micro_batch_of({"input_ids": input_ids}, rows, places)


def rows_of(case: Case, samples: Sequence[Sample]) -> list[list[Sample]]:
    """What is padded together."""
    by_length = sorted(samples, key=lambda sample: len(sample.ids))
    return [by_length[start : start + case.rows] for start in range(0, len(by_length), case.rows)]


def fused_head(hidden: Tensor, head: nn.Module, batch: MicroBatch, beta: float, targets: float) -> None:
    """Not compiled, and all targets at once: it cuts its logits itself."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        use_ref_model=batch.ref_logprobs is not None,
        chunk_size=len(hidden),
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="dapo",
        use_bias_correction_kl=True,
    )
    value, _ = loss(
        hidden[:, None],
        head.weight,
        batch.labels[:, None],
        torch.ones(len(hidden), 1),
        batch.advantages,
        ref_per_token_logps=None if batch.ref_logprobs is None else batch.ref_logprobs[:, None],
        old_per_token_logps=None if batch.old_logprobs is None else batch.old_logprobs[:, None],
        num_items_in_batch=targets,
    )
    value.backward()


def num_tokens(case: Case, data: Data) -> int:
    """The padded rows."""
    rows = rows_of(case, plain.samples_of(case, data)[0])
    return sum(len(part) * max(len(row.ids) for row in part) for part in rows)
