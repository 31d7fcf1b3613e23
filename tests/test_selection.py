"""What a loss selects from a whole update does not depend on how that is cut, nor on the number of processes."""

from typing import Any

import pytest

from grpo_hf.algorithm.entropy_control import EntropyControl
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.algorithm.selection import selections_of
from grpo_hf.rollout.peers import Peers
from grpo_hf.rollout.planning import Update
from tests.invariants.one_step import gradient_of_one_step
from tests.peers import on_processes
from tests.runs import values
from tests.samples import random_samples
from tests.test_policy import COUNTS, make_policy
from tests.tiny import tiny_trainer
from tests.tiny_models import gradient_of, relative_error, tiny_model

SELECTING = {
    "clip_cov": {"loss_type": "clip_cov", "clip_cov_ratio": 0.3, "clip_cov_lb": -2.0},
    "kl_cov": {"loss_type": "kl_cov", "kl_cov_ratio": 0.3},
    "top_entropy": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
}


@pytest.mark.parametrize("settings", SELECTING.values(), ids=SELECTING)
def test_the_gradient_does_not_depend_on_the_budget(tmp_path: Any, settings: dict) -> None:
    whole, cut = (gradient_of_one_step(tmp_path, tokens_per_microbatch=budget, **settings) for budget in (4096, 40))
    assert relative_error(cut, whole) < 1e-5
    if settings.get("loss_type") != "kl_cov":  # |log r| has no gradient on-policy
        plain = {"entropy_coef": settings.get("entropy_coef", 0.0)}
        assert relative_error(whole, gradient_of_one_step(tmp_path, **plain)) > 1e-2


def test_every_process_sees_the_tokens_of_all() -> None:
    """Two processes, each with a part of the samples, choose what one with all of them does."""
    samples, models = random_samples(), [tiny_model() for _ in range(3)]
    objective = grpo_objective(*LOSSES["clip_cov"], top_entropy_quantile=0.3)
    parts = [samples[:3], samples[3:]]

    def work(peers: Peers) -> Any:
        policy = make_policy(models[peers.rank], budget=30, peers=peers)
        policy.objective = objective
        policy.inner.zero_grad()
        policy.forward_backward(Update(parts[peers.rank], COUNTS), step=1)
        return gradient_of(policy.inner)

    first, second = on_processes(work)
    policy = make_policy(models[2], budget=30)
    policy.objective = objective
    policy.inner.zero_grad()
    policy.forward_backward(Update(samples, COUNTS), step=1)
    both = {name: first[name] + second[name] for name in first}
    assert relative_error(both, gradient_of(policy.inner)) < 1e-5


def test_the_entropy_coefficient_follows_the_entropy() -> None:
    control = EntropyControl(0.5, target=2.0, delta=0.2, low=0.1, high=0.8)
    assert control.applied == 0.0, "before the first step there is no entropy"
    low = control.after(1.5)
    assert (low.coefficient, low.applied) == (0.7, 0.7)
    assert low.after(2.0).coefficient == 0.8, "no more than its bound"
    high = low.after(2.5)
    assert (high.coefficient, high.applied) == (pytest.approx(0.5), 0.0)
    assert high.after(3.0).after(3.0).after(3.0).coefficient == 0.1


def test_a_run_moves_its_entropy_coefficient_and_keeps_it(tmp_path: Any) -> None:
    settings = {"use_adaptive_entropy": True, "entropy_target": 100.0, "entropy_coef": 0.01, "entropy_coef_delta": 0.02}
    trainer = tiny_trainer(tmp_path, max_steps=3, **settings)
    trainer.train()
    assert values(trainer, "entropy_coef") == pytest.approx([0.03, 0.05, 0.07])
    entropy, policy, loss = (values(trainer, name) for name in ("entropy", "policy_loss", "loss"))
    assert loss[0] == pytest.approx(policy[0], abs=1e-6), "not applied in the first step"
    assert policy[1] - loss[1] == pytest.approx(0.03 * entropy[1], rel=1e-3)
    other = tiny_trainer(tmp_path, **settings)
    other.policy.load_state_dict(trainer.policy.state_dict())
    assert other.policy.entropy_control == trainer.policy.entropy_control


def test_a_loss_says_what_it_selects() -> None:
    assert list(selections_of(LOSSES["kl_cov"][0])) == ["kl_cov"]
    assert selections_of(LOSSES["dapo"][0]) == {}
    assert grpo_objective(*LOSSES["kl_cov"]).needs_every_token, "it compares with them"
