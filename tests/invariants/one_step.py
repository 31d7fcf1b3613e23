"""The gradient of one optimizer step of GRPOTrainer, here or, as a script under `accelerate launch`, in several processes.

python -m tests.invariants.one_step FOLDER takes a list of settings from FOLDER/settings.json, one step for each, and
writes process 0's gradients to FOLDER/gradients.pt.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from tests.tiny import PROMPTS, Gradients, even_words, tiny_trainer

COMPLETIONS = 16
"""Of the step, over all processes: 4 to each of the first 4 prompts, without shuffling."""


def gradient_of_one_step(
    folder: Path, *, flat_from: int = len(PROMPTS), lora: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """Train one step on the first 4 prompts; those from ``flat_from`` on get the same reward for everything."""
    flat = [row["prompt"] for row in PROMPTS[flat_from:]]

    def reward(prompt: str, completion: str) -> float:
        return 0.5 if prompt in flat else even_words(completion)

    kept = Gradients()
    trainer = tiny_trainer(
        folder,
        reward=reward,
        callbacks=[kept],
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
        shuffle_dataset=False,
        **({"per_device_train_batch_size": COMPLETIONS} | settings),
    )
    trainer.train()
    return kept.steps[0]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    gradients = [gradient_of_one_step(folder, **settings) for settings in json.loads((folder / "settings.json").read_text())]
    if torch.distributed.get_rank() == 0:
        torch.save(gradients, folder / "gradients.pt")
    # gloo's threads drop the last results in their own time; when that is after the interpreter has begun to end, they
    # abort the process. So end them first: let go of the wrapped models, which hold the process group, then of the group.
    gc.collect()
    torch.distributed.destroy_process_group()
