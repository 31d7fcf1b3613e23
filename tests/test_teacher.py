"""On-policy distillation: the policy nears its teacher, whose log-probs are of the same tokens in the same layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_hf import GRPOConfig, GRPOTrainer
from grpo_hf.algorithm.aggregation import Denominators
from grpo_hf.algorithm.kl import kl_to_teacher
from grpo_hf.algorithm.losses import reinforce
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.types import TokenBatch
from tests.runs import logs, lora, values
from tests.tiny import PROMPTS, WORDS, even_words, tiny_model, tiny_tokenizer

COUNTS = Denominators(8, 2, 4, num_processes=1, max_completion_length=4, update_tokens=4)


def test_the_gradient_is_the_reverse_kls() -> None:
    """By the whole vocabulary: E_π[sg(log π - log π_T) ∇ log π] = ∇ KL(π || π_T)."""
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    logprobs, of_teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - of_teacher)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    batch = TokenBatch(
        logprobs, logprobs, logprobs, logprobs.detach(), torch.arange(5), torch.ones(5), teacher_logprobs=of_teacher
    )
    losses, metrics = kl_to_teacher(batch)
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * losses).sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert (logprobs.exp() * metrics["teacher_kl"]).sum().item() == pytest.approx(kl.item())


def test_the_term_has_a_denominator_of_its_own() -> None:
    # log π = -1, log π_T = -1 - ln 2 and -1: r d = 1 ln 2 and 0, over the update's 4 tokens, times 3.
    logprobs = torch.full((2,), -1.0, requires_grad=True)
    of_teacher = torch.tensor([-1 - math.log(2), -1.0])
    zero = torch.zeros(2)
    batch = TokenBatch(
        logprobs, zero, zero, logprobs.detach(), torch.tensor([0, 0]), torch.tensor([2]), teacher_logprobs=of_teacher
    )
    for aggregation in ("token_mean", "sequence_sum"):
        objective = grpo_objective(reinforce, aggregation, teacher_coef=3.0)
        assert objective(batch, COUNTS)[0].item() == pytest.approx(3 * math.log(2) / 4)
        assert objective.needs_every_token


def trainer_with(folder: Path, teacher: Any, *, reward: Any = None, peft_config: Any = None, **settings: Any) -> GRPOTrainer:
    defaults = {"num_generations": 8, "per_device_train_batch_size": 32, "max_completion_length": 8, "learning_rate": 3e-2}
    quiet = {"save_rollouts": False, "write_report": False, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    machine = {"use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1}
    args = GRPOConfig(output_dir=str(folder), **(defaults | quiet | machine | settings))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return GRPOTrainer(model, reward, args, PROMPTS, processing_class=tokenizer, teacher=teacher, peft_config=peft_config)


@pytest.mark.parametrize(("peft_config", "steps"), [(lambda: None, 20), (lora, 40)], ids=["full", "lora"])
def test_the_policy_nears_its_teacher(tmp_path: Path, peft_config: Any, steps: int) -> None:
    """Without any reward, an adapter more slowly; the teacher's log-probs are its own, row by row."""
    teacher = tiny_model(seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = trainer_with(tmp_path, teacher, peft_config=peft_config(), max_steps=steps)
    trainer.train()
    kl = values(trainer, "teacher_kl")
    assert sum(kl[-5:]) / 5 < 0.8 * kl[0]
    assert values(trainer, "reward") == [0.0] * steps
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    (batch, *_) = trainer.policy.microbatches(trainer.rollout.updates[0])
    with torch.no_grad():
        torch.testing.assert_close(batch.teacher_logprobs, batch_logprobs(teacher, batch)[0], atol=1e-5, rtol=0)


def test_a_teacher_beside_a_reward(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    trainer = trainer_with(tmp_path, str(tmp_path / "teacher"), reward=even_words, teacher_coef=0.5, max_steps=1)
    trainer.train()
    (line,) = logs(trainer)
    # On-policy the policy's part is -Σ A / tokens, and the other 0.5 times the mean difference.
    assert line["loss"] - line["policy_loss"] == pytest.approx(0.5 * line["teacher_kl"], rel=1e-3)
    assert trainer.run["weights of the teacher"], "a run with another is another run"


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer(["w1", "w0", *WORDS[2:]]).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another vocabulary: 2 tokens have another id or are missing, such as 'w0', 'w1'"):
        trainer_with(tmp_path, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="knows 50 token ids, and the tokenizer has ids up to"):
        trainer_with(tmp_path, tiny_model(vocab_size=50, pad_token_id=None, eos_token_id=None))
