"""The README beside a trained model says what it is, for full models and adapters alike."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from tests.runs import held_out_trainer
from tests.tiny import tiny_trainer

HELD_OUT = [{"prompt": "w11"}, {"prompt": "w12 w13"}]


def test_a_card_says_what_was_trained(tmp_path: Path) -> None:
    trainer = held_out_trainer(tmp_path, HELD_OUT, eval_on_start=True, beta=0.1)
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and "grpo" in card.data.tags and card.data.model_name == tmp_path.name
    assert "| even_words | 1 |" in text and "beta: 0.1" in text and "- torch 2." in text and "2402.03300" in text
    first, last = [line for line in trainer.state.log_history if "reward" in line and "loss" in line][::2]
    assert f"| reward | {first['reward']:.3f} (step 1) | {last['reward']:.3f} (step 3) |" in text
    assert "| eval_rewards/even_words/mean |" in text
    assert str(tmp_path) not in text


def test_an_adapter_has_one_too(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "A LoRA adapter of" in text and "[More Information Needed]" not in text
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


@pytest.mark.filterwarnings("ignore")
def test_it_is_pushed_with_the_model(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.hub_model_id = "me/sorts"
    trainer.args.hub_model_id = "me/sorts"
    with patch("transformers.trainer.hf_api") as hub:  # there is none here
        trainer.push_to_hub(dataset_name="openai/gsm8k", tags="math")
    assert hub().upload_folder.call_args.kwargs["repo_id"] == "me/sorts"
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.datasets, data.model_name) == ("openai/gsm8k", "sorts") and "math" in data.tags
