"""The README of a trained model: what it is, what it was trained on, for what, and how well it went."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from grpo_hf.training.config import GRPOConfig
from grpo_hf.training.starts import changed_settings, versions

NOT_OF_THE_MODEL = (
    "output_dir",
    "run_name",
    "logging_",
    "save_",
    "report_to",
    "disable_tqdm",
    "hub_",
    "push_to_hub",
    "local_",
)
"""Beginnings of settings that change nothing in the weights."""

CITATION = """@article{shao2024deepseekmath,
    title  = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
    author = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Xiao Bi and others},
    year   = 2024,
    eprint = {arXiv:2402.03300},
}"""


def model_card(
    *,
    name: str,
    base_model: str | None,
    is_adapter: bool,
    dataset: str | None,
    tags: Sequence[str],
    rewards: dict[str, float],
    args: GRPOConfig,
    lines: list[dict[str, Any]],
    prompts: int,
) -> ModelCard:
    """Of a run with these rewards (and their weights), settings and log lines."""
    data = ModelCardData(
        base_model=base_model,
        datasets=dataset,
        library_name="peft" if is_adapter else "transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["grpo", "grpo_hf", "generated_from_trainer", *tags])),
    )
    what = "A LoRA adapter of" if is_adapter else "A fine-tuned version of"
    of = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model made on the spot"
    on = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else "a data set of its own"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n",
        f"{what} {of}, trained with GRPO ([Shao et al. 2024](https://arxiv.org/abs/2402.03300)) by grpo_hf "
        f"on {on}, {prompts} prompts.\n",
        "## Rewards\n\n| reward | weight |\n|---|---|\n"
        + "".join(f"| {key} | {value:g} |\n" for key, value in rewards.items()),
        "## How it went\n\n" + _figures(lines),
        "## Settings that are not the defaults\n\n```yaml\n" + _settings(args) + "```\n",
        "## Versions\n\n" + "".join(f"- {package} {version}\n" for package, version in versions().items()),
        f"## Citation\n\n```bibtex\n{CITATION}\n```\n",
    ]
    return ModelCard("\n".join(parts), ignore_metadata_errors=True)


def _figures(lines: list[dict[str, Any]]) -> str:
    """The first and the last value of rewards, as trained on and held out."""
    names = dict.fromkeys(
        name
        for line in lines
        for name in line
        if name == "reward" or (name.endswith("/mean") and name.startswith(("rewards/", "eval_")))
    )
    rows = []
    for name in names:
        found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
        found = [(step, value) for step, value in found if math.isfinite(value)]
        if found and "/seconds/" not in name:
            (first, before), (last, after) = found[0], found[-1]
            rows.append(f"| {name} | {before:.3f} (step {first}) | {after:.3f} (step {last}) |\n")
    return "| | first | last |\n|---|---|---|\n" + "".join(rows) if rows else "No step has been logged.\n"


def _settings(args: GRPOConfig) -> str:
    shown = {name: value for name, value in changed_settings(args).items() if not name.startswith(NOT_OF_THE_MODEL)}
    return "".join(f"{name}: {json.dumps(value, default=str)}\n" for name, value in shown.items())


def source_of(config: Any) -> str | None:
    """The hub name that a model was loaded from; None where that was a folder, or nothing."""
    name = getattr(config, "_name_or_path", "") or ""
    return name if name and not Path(name).exists() else None
