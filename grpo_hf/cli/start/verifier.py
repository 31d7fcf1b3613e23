"""What a completion earns. Check it on samples of yours: grpo-hf verify samples.jsonl --reward verifier.py:right_number"""

import re


def right_number(completion: str, answer: int) -> float | None:
    """1 when the last boxed number is the row's `answer`, 0 when it is another or missing.

    `completion` is the text of one sample; any other parameter is the dataset's column of that name.
    """
    found = re.findall(r"\\boxed\{\s*(-?\d+)\s*\}", completion)
    return float(bool(found) and int(found[-1]) == answer)
