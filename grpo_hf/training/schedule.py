"""Optimizer and learning-rate schedule of a run that goes on with other settings than it was saved with."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """Learning rate and weight decay of each group of parameters, as they were set; of a schedule that has not begun."""
    return [{"initial_lr": group.get("initial_lr", group["lr"])} | _decay(group) for group in optimizer.param_groups]


def apply_settings(optimizer: Any, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Give these back to an optimizer and a schedule that hold a checkpoint's: lr = initial_lr · λ(finished steps).

    Raises ValueError for a schedule that is no function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"{type(scheduler).__name__} goes on from its own past, so learning rate, weight decay and schedule cannot be "
            "changed in the middle of a run; set them as they were"
        )
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group.update(wanted)
    scheduler.base_lrs = [wanted["initial_lr"] for wanted in settings]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def _decay(group: dict[str, Any]) -> dict[str, Any]:
    return {"weight_decay": group["weight_decay"]} if "weight_decay" in group else {}
