"""Invariant 1."""

from itertools import product

import pytest

from grpo_hf.packing.layout import pack
from tests.invariants.gradients import gradient_of_layout, gradient_of_rows, make_model
from tests.samples import UNEVEN, random_samples
from tests.tiny_models import FAMILIES, relative_error

SHAPES = {"uneven": UNEVEN, "one completion a group": [(7, [5]), (3, [1]), (12, [9])]}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_gradient_is_padded_gradient(family: str, shapes: list) -> None:
    """Tree gradient = padded gradient (float32, relative error < 1e-5), for uneven prompt and completion lengths, G = 1,
    one-token completions, and several groups, with and without LoRA, with and without gradient checkpointing.

    Both layouts are held against rows without any padding, one at a time, through the model's own eager forward.
    """
    samples, worst = random_samples(shapes), 0.0
    assert len(pack(samples, tokens_per_microbatch=15)) > 1
    for lora, checkpointing in product((False, True), (False, True)):
        options = {"lora": lora, "checkpointing": checkpointing}
        expected = gradient_of_rows(make_model(family, **options), samples)
        for layout, budget in (("packed", 15), ("packed", 1000), ("padded", 1000)):
            error = relative_error(gradient_of_layout(make_model(family, **options), samples, layout, budget), expected)
            worst = max(worst, error)
            assert error < 1e-5, f"{family}, {options}, {layout}, budget {budget}"
    print(f"\n{family}: worst relative gradient error {worst:.1e}")
