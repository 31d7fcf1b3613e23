"""Sequence-classification models as rewards: as from TRL, by instance or by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from grpo_hf.rewards import get_reward, get_rewards, score_samples
from grpo_hf.rewards.reward_model import RewardModel
from grpo_hf.types import Sample
from tests.runs import logs
from tests.scoring import score
from tests.tiny import SIZES, tiny_model, tiny_tokenizer, tiny_trainer

TEXTS = [("w1 w2", "w3 w4 w5"), ("w7", "w8"), ("w9 w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9 w1 w2")]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval()


def samples(chat: bool = False) -> list[Sample]:
    made = []
    for prompt, completion in TEXTS:
        messages: Any = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]
        prompt_form, form = messages if chat else (prompt + " ", completion)
        made.append(Sample(prompt_form, form, completion, [1], {}))
    return made


def expected(model: PreTrainedModel) -> list[float]:
    """Each text alone, without padding."""
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        return [model(**tokenizer(f"{p} {c}", return_tensors="pt")).logits[0, 0].item() for p, c in TEXTS]


@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_scores_are_the_first_logit_of_prompt_and_completion(chat: bool, batch_tokens: int) -> None:
    model, tokenizer = classifier(), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    reward = get_reward(RewardModel(model, tokenizer, batch_tokens=batch_tokens))
    assert len(set(expected(model))) == 4
    assert score(reward, samples(chat)) == pytest.approx(expected(model), abs=1e-5)


def test_a_model_is_found_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    classifier().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (reward,) = get_rewards([str(folder)])
    assert (reward.name, reward.per_sample, reward.function.model) == ("judge", False, None), "no weights as yet"
    found = [one["judge"].score for one in score_samples([reward], samples())]
    assert found == pytest.approx(expected(classifier()), abs=1e-5)


def test_other_models_and_names_are_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "lm")
    with pytest.raises(
        ValueError, match=r"is a model of \['Qwen2ForCausalLM'\], but a reward model is one of \*ForSequence"
    ):
        get_reward(str(tmp_path / "lm"))
    with pytest.raises(ValueError, match="'nobody/nothing' is neither a verifier nor a model that can be read"):
        get_reward("nobody/nothing")


def test_a_trainer_takes_reward_models(tmp_path: Path) -> None:
    model = classifier()
    options: dict[str, Any] = {"reward": [model, lambda completion: 1.0]}
    trainer = tiny_trainer(tmp_path, reward_processing_classes=[tiny_tokenizer(), None], **options)
    trainer.train()
    (entry,) = logs(trainer)
    name = trainer.rewards[0].name
    assert name == "LlamaForSequenceClassification"
    assert entry[f"rewards/{name}/std"] > 0
    group = trainer.rollout.groups[0]
    scores = RewardModel(model, tiny_tokenizer())(
        [group.prompt.raw] * len(group.completions), [item.text for item in group.completions]
    )
    assert [item.rewards[name] for item in group.completions] == pytest.approx(scores, abs=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="reward_processing_classes has 1 entries for 2 rewards"):
        tiny_trainer(tmp_path, reward_processing_classes=[tiny_tokenizer()], **options)


def test_one_tokenizer_for_two_reward_models_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward": [classifier(), classifier()]}
    with pytest.raises(ValueError, match="one tokenizer for 2 reward models"):
        tiny_trainer(tmp_path, reward_processing_classes=tiny_tokenizer(), **options)
