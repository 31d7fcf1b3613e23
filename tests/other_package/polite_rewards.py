from grpo_hf import register_reward


@register_reward
def says_please(completion: str, numbers: list[int], *, word: str = "please") -> float:
    return float(word in completion) / len(numbers)
