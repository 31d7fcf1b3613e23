"""A loss and a credit of the user's own: refused where they do not fit, with what is wanted, and trained with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_hf import GRPOConfig
from grpo_hf.algorithm.advantages import ADVANTAGES, leave_one_out
from grpo_hf.algorithm.aggregation import AGGREGATIONS
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.algorithm.trial import trial_batch
from grpo_hf.training.checks import checked_rewards
from grpo_hf.training.guards import GuardError
from grpo_hf.training.same_run import Changes, check_same_run, describe_run
from grpo_hf.types import TokenBatch
from tests.snippets import ROOT, blocks_of
from tests.tiny import Gradients, relative_error, tiny_trainer


def config(**settings: Any) -> GRPOConfig:
    return GRPOConfig(**({"output_dir": "unused", "use_cpu": True} | settings))


CUSTOM = """
import torch

def loss(batch, *, epsilon, sharpness=3.0):
    return -epsilon * sharpness * batch.advantages * batch.logprobs, {"mine": batch.entropy}

def credit(scores, weights):
    return (scores * weights).sum(-1) - 1.0

def no_batch(): ...
def three_tensors(logprobs, log_ratio, advantages): ...
def unknown_option(batch, *, epsilom): ...
def only_losses(batch): return -batch.logprobs
def one_number(batch): return -batch.logprobs.sum(), {}
def numbers_for_metrics(batch): return -batch.logprobs, {"mine": 3.0}
def own_name(batch): return -batch.logprobs, {"loss": batch.entropy}
def no_gradient(batch): return -batch.advantages * batch.old_logprobs, {}
def rewards_only(rewards): ...
def of_one_objective(scores, weights): return scores
def transposed(scores, weights): return scores[..., 0].T
number = 3
"""


@pytest.fixture
def custom(tmp_path: Path) -> str:
    (tmp_path / "custom.py").write_text(CUSTOM)
    return f"{tmp_path}/custom.py"


def own_loss(batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -batch.advantages * batch.logprobs, {}


def test_a_loss_of_ones_own(custom: str) -> None:
    settings = config(loss_type=f"{custom}:loss", epsilon=0.5)
    batch = trial_batch()
    losses, metrics = settings.objective().terms[0].value(batch)
    assert torch.equal(losses, -0.5 * 3.0 * batch.advantages * batch.logprobs)
    assert metrics == {"mine": batch.entropy}
    assert settings.objective().terms[0].aggregation is AGGREGATIONS["token_mean"]
    other = config(loss_type=f"{custom}:loss", loss_aggregation="sequence_mean").objective()
    assert other.terms[0].aggregation is AGGREGATIONS["sequence_mean"]
    assert config(loss_type=own_loss).objective().terms[0].value.func is own_loss
    assert config(loss_type="grpo_hf.algorithm.losses:sapo").objective().terms[0].value.func is LOSSES["sapo"][0]


def test_a_credit_of_ones_own(custom: str) -> None:
    scores, weights = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([1.0, 0.5])
    assert config(advantage=f"{custom}:credit").credit()(scores, weights).tolist() == [[1.0, 4.0]]
    assert config(advantage=leave_one_out).credit() is ADVANTAGES["leave_one_out"]
    assert config().credit() is ADVANTAGES["group"]


def test_the_docs_own(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks_of(ROOT / "docs" / "objectives.md") if "def loss(batch" in block.text]
    (tmp_path / "my_loss.py").write_text(shown.text)
    made = config(loss_type=f"{tmp_path}/my_loss.py:loss", advantage=f"{tmp_path}/my_loss.py:credit")
    assert not made.objective().needs_every_token and not made.objective().needs_whole_completions
    checked_rewards(["exact_match", "format"], made)
    # One correct and short, one correct and long, one wrong: 1 - 2/3 + 0.5 x 1, 1 - 2/3, 0 - 2/3.
    scores = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(made.credit()(scores, torch.tensor([1.0, 0.5])), torch.tensor([[5 / 6, 1 / 3, -2 / 3]]))
    missing = torch.cat([scores, torch.full((1, 1, 2), torch.nan)], dim=1)
    torch.testing.assert_close(made.credit()(missing, torch.tensor([1.0, 0.5])), torch.tensor([[5 / 6, 1 / 3, -2 / 3, 0.0]]))


NOT_A_LOSS = {
    "no_batch": r"loss\(batch: TokenBatch, .*; \(\) takes 0 arguments by position",
    "three_tensors": r"loss\(batch: TokenBatch, .*; \(logprobs, log_ratio, advantages\) takes 3 arguments by position",
    "unknown_option": "its option 'epsilom' is no setting; give it a default",
    "only_losses": r"-> \(losses \[token\], metrics .*, and it returned a tensor of shape \[10\]",
    "one_number": r"for 10 tokens its losses are a tensor of shape \[\]; a loss is def loss",
    "numbers_for_metrics": "for 10 tokens its mine are a float; a loss is def loss",
    "own_name": "its metric 'loss' is one that every run logs itself",
    "no_gradient": "its losses have no gradient",
    "number": "is not a function but 3",
    "los": r"has no attribute 'los' \(nearest: loss\)",
}


@pytest.mark.parametrize(("name", "message"), NOT_A_LOSS.items(), ids=NOT_A_LOSS)
def test_what_is_no_loss_is_refused(custom: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"custom.py:{name}'.*{message}"):
        config(loss_type=f"{custom}:{name}")


def test_what_is_no_credit_is_refused(custom: str) -> None:
    """One that makes something else of them when the number of rewards is known, before any weights are loaded."""
    with pytest.raises(ValueError, match=r"custom.py:rewards_only'.* credit is def credit.*; \(rewards\) takes 1 arguments"):
        config(advantage=f"{custom}:rewards_only")
    message = r"of_one_objective': of scores \[9, 8, 2\] it made a tensor of shape \[9, 8, 2\]; credit is def credit"
    with pytest.raises(ValueError, match=message):
        checked_rewards(["exact_match", "format"], config(advantage=f"{custom}:of_one_objective"))
    with pytest.raises(ValueError, match=r"transposed': of scores \[3, 2, 2\] it made a tensor of shape \[2, 3\]"):
        two = {"num_generations": 2, "per_device_train_batch_size": 2}
        checked_rewards(["exact_match", "format"], config(advantage=f"{custom}:transposed", **two))


def test_a_loss_may_look_at_all_that_the_run_has(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def loss(batch): return (batch.ref_logprobs - batch.logprobs) * batch.advantages, {}\n"
    )
    config(loss_type=f"{tmp_path}/mine.py:loss", beta=0.1)
    with pytest.raises(TypeError, match="NoneType"):
        config(loss_type=f"{tmp_path}/mine.py:loss")


def test_a_resumed_run_tells_functions_apart(custom: str) -> None:
    def described(**settings: Any) -> dict[str, Any]:
        made = config(**settings)
        prompts, model = SimpleNamespace(ids=[[1]]), torch.nn.Linear(1, 1)
        return describe_run(made, prompts, [], [], model)  # type: ignore[arg-type]

    mine = described(loss_type=f"{custom}:loss", advantage=f"{custom}:credit")
    assert check_same_run(mine, described(loss_type=f"{custom}:loss", advantage=f"{custom}:credit"), "it") == Changes()
    with pytest.raises(ValueError, match=r"run: .*loss_type '.*custom.py:loss' -> 'tests.test_custom_objective:own_loss'"):
        check_same_run(mine, described(loss_type=own_loss, advantage=f"{custom}:credit"), "it")
    with pytest.raises(ValueError, match=r"another run: .*advantage '.*custom.py:credit' -> '.*advantages:leave_one_out'"):
        check_same_run(mine, described(loss_type=f"{custom}:loss", advantage=leave_one_out), "it")
    with pytest.raises(ValueError, match="another run: loss_aggregation None -> 'sequence_mean'"):
        other = described(loss_type=f"{custom}:loss", advantage=f"{custom}:credit", loss_aggregation="sequence_mean")
        check_same_run(mine, other, "it")


# ---- Training with them

OF_THE_LIBRARY = """
import torch

def loss(batch, *, epsilon):
    ratio = batch.log_ratio.exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    losses = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return losses, {"ratio_above_1": (ratio > 1).float()}

def credit(scores, weights):
    rewards = scores[..., 0] * weights[0]
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-4)
"""


def trained(folder: Path, **settings: Any) -> tuple[Any, Gradients]:
    gradients = Gradients()
    trainer = tiny_trainer(folder, max_steps=2, num_iterations=2, epsilon=0.1, callbacks=[gradients], **settings)
    trainer.train()
    return trainer, gradients


def test_the_same_functions_written_anew_train_the_same(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OF_THE_LIBRARY)
    _, expected = trained(tmp_path, loss_type="dapo", advantage="group")
    trainer, gradients = trained(tmp_path, loss_type=f"{file}:loss", advantage=f"{file}:credit")
    for step, whole in zip(gradients.steps, expected.steps, strict=True):
        assert relative_error(step, whole) < 1e-5
    shares = [line["ratio_above_1"] for line in trainer.state.log_history if "ratio_above_1" in line]
    assert shares[0] == 0 < shares[1] < 1, "on the policy that sampled, then not"


def imitate(batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """It has a gradient whatever the advantages are."""
    return -batch.logprobs, {}


def nothing(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros(scores.shape[:2])


def test_a_loss_that_needs_no_advantage_is_given_every_token(tmp_path: Path) -> None:
    _, gradients = trained(tmp_path, loss_type=imitate, advantage=nothing)
    assert all(any(bool(part.any()) for part in step.values()) for step in gradients.steps)
    _, without = trained(tmp_path, loss_type="dapo", advantage=nothing)
    assert not any(bool(part.any()) for step in without.steps for part in step.values())


def above(entropy: float) -> Any:
    return lambda batch: (-batch.advantages * batch.logprobs + (batch.entropy - entropy).relu(), {})


def on_ratios_above(ratio: float) -> Any:
    return lambda batch: (-batch.advantages * batch.logprobs + (batch.log_ratio.exp() - ratio).relu(), {})


@pytest.mark.parametrize(
    "loss",
    [above(2.0), above(3.0), above(10.0), on_ratios_above(1.5), on_ratios_above(100.0)],
    ids=["entropy 2", "entropy 3", "entropy 10", "ratio 1.5", "ratio 100"],
)
def test_a_gradient_that_advantages_have_no_part_in_is_found_wherever_it_is(loss: Any) -> None:
    assert grpo_objective(loss, "token_mean").needs_every_token


def test_an_advantage_that_is_no_number_is_named(tmp_path: Path) -> None:
    """The mean of a group in which a score is missing is NaN, and so is every advantage."""
    (tmp_path / "mine.py").write_text("def credit(scores, weights): return scores[..., 0] - scores[..., 0].mean(-1, True)\n")

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if place == 0 else float(place) for place in range(len(completions))]

    with pytest.raises(GuardError, match=r"tokens have an advantage that is not finite.*mine.py:credit.*nanmean"):
        trained(tmp_path, advantage=f"{tmp_path}/mine.py:credit", reward=reward)


def test_gdpo_hears_an_objective_that_a_larger_one_drowns(tmp_path: Path) -> None:
    """Two rewards that differ by a factor of a million have the same say."""
    loud = {"reward": [of_length, of_evenness], "reward_weights": [1.0, 1.0]}
    _, of_sum = trained(tmp_path / "1", advantage="group", **loud)
    _, of_length_alone = trained(tmp_path / "2", advantage="group", reward=[of_length])
    assert relative_error(of_sum.steps[0], of_length_alone.steps[0]) < 1e-3
    _, of_both = trained(tmp_path / "3", advantage="gdpo", **loud)
    assert relative_error(of_both.steps[0], of_length_alone.steps[0]) > 0.1


def of_length(completion: str) -> float:
    return 1e6 * len(completion.split())


def of_evenness(completion: str) -> float:
    return float(sum(int(word.removeprefix("w")) % 2 == 0 for word in completion.split()))
