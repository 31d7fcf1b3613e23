"""Run: pytest. A verifier that is wrong once in a hundred is what the model will learn."""

import pytest
from verifier import right_number


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"12 and 30 make \boxed{42}.", 1.0),
        (r"\boxed{12} and \boxed{30}, so \boxed{ 42 }", 1.0),
        (r"\boxed{-42}", 0.0),
        (r"\boxed{420}", 0.0),
        ("42", 0.0),
        ("", 0.0),
    ],
)
def test_right_number(completion, score):
    assert right_number(completion, answer=42) == score
