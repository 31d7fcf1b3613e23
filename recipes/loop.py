"""GRPO on one page, with the library's own functions and no Trainer: `python -m recipes.loop` teaches a tiny decoder with
random weights to write sevens. Each line below "for step" is an arrow of the flow, from dataset row to optimizer."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.algorithm.objective import grpo_objective
from grpo_hf.packing.choose import choose_layout
from grpo_hf.packing.layout import LAYOUTS
from grpo_hf.packing.logprobs import batch_logprobs
from grpo_hf.rewards import Scorer, get_rewards
from grpo_hf.rollout.engine import Sampling
from grpo_hf.rollout.peers import ALONE
from grpo_hf.rollout.planning import Plan
from grpo_hf.rollout.prompts import PromptOrder, derived_seed, load_prompts
from grpo_hf.rollout.stream import GroupSampler
from grpo_hf.rollout.transformers_engine import TransformersEngine
from recipes.sorting_lm import make_tokenizer


def share_of_sevens(completion: str) -> float:
    """How much of eight characters is a 7."""
    return completion.count("7") / 8


def train(steps: int = 30, group_size: int = 8, seed: int = 0) -> list[float]:
    """The mean reward of every step."""
    torch.manual_seed(seed)
    tokenizer, rewards = make_tokenizer(), []
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)  # type: ignore[arg-type]
    model = Qwen2ForCausalLM(config)
    prompts = load_prompts([{"prompt": f"{number} {number + 1}="} for number in range(8)], tokenizer)
    order = PromptOrder(len(prompts), prompts_per_rollout=4, seed=seed)
    engine = TransformersEngine(model, pad_token_id=tokenizer.pad_token_id)
    sampler = GroupSampler(engine, tokenizer, Scorer(get_rewards(share_of_sevens)))
    sampling = Sampling(max_completion_length=8, stop_token_ids=(tokenizer.eos_token_id,))
    plan = Plan(ADVANTAGES["group"], reward_weights=[1.0], updates_per_rollout=1, max_completion_length=8)
    layout = LAYOUTS[choose_layout(model, prompts.ids[:2])]
    objective, optimizer = grpo_objective(*LOSSES["dapo"]), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows = order.prompts(step)  # dataset rows
        seeds = [derived_seed(seed, "sample", step, place) for place in range(len(rows))]
        groups, _ = sampler.sample([prompts[row] for row in rows], seeds, group_size, sampling)  # completions and rewards
        (update,) = plan.updates(groups, step, ALONE)  # advantages, what has a gradient, training samples
        for batch in layout(update.samples, tokens_per_microbatch=512):  # token trees
            loss, _ = objective(batch.tokens(*batch_logprobs(model, batch)), update.denominators)
            (loss * (not update.idle)).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(sum(item.reward for group in groups for item in group.completions) / (len(groups) * group_size))
        print(f"step {step:2}  reward {rewards[-1]:.3f}")
    return rewards


if __name__ == "__main__":
    train()
