"""Fused log-probs and entropy: the values and gradients of full logits, without full logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_hf.algorithm.logits import entropy, token_logprobs
from grpo_hf.packing.logprobs import LOGIT_TRANSFORMS, head_logprobs, logit_transform
from tests.tiny_models import tiny_model

TOKENS, DIM, VOCAB = 24, 8, 61


def make_head(**options) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(DIM, VOCAB, **{"bias": False, **options})


def make_tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    hidden = (torch.randn(TOKENS, DIM) * 3).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCAB, (TOKENS,))


def full_logits(hidden, targets, head, *, rows=None, temperature=1.0, transform=None) -> tuple[Tensor, Tensor]:
    """What head_logprobs must equal, the plain way: a state is repeated for each of its targets."""
    logits = head(hidden if rows is None else hidden[rows]).float()
    logits = logits if transform is None else transform(logits)
    return token_logprobs(logits, targets, temperature), entropy(logits, temperature)


def values_and_gradients(function, head: nn.Module, parts: str = "both", *, states: int = TOKENS, **options) -> list[Tensor]:
    """Log-probs, entropy, and the gradient of a random mixture of them for hidden states and head."""
    hidden, targets = make_tokens()
    logprobs, entropies = function(hidden[:states], targets, head, **options)
    torch.manual_seed(2)
    loss = torch.zeros(())
    if parts != "entropy":
        loss = loss + (torch.randn(TOKENS) * logprobs).sum()
    if parts != "logprobs":
        loss = loss + (torch.randn(TOKENS) * entropies).sum()
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return [logprobs.detach(), entropies.detach(), *torch.autograd.grad(loss, [hidden, *weights])]


def assert_equal_to_full_logits(
    head: nn.Module, parts: str = "both", rtol=1e-4, atol=1e-5, chunk=None, kept=0, **options
) -> None:
    chunked = {} if chunk is None else {"logits_per_chunk": chunk * VOCAB, "logits_kept": kept * VOCAB}
    found = values_and_gradients(head_logprobs, head, parts, **chunked, **options)
    expected = values_and_gradients(full_logits, head, parts, **options)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("parts", ["logprobs", "entropy", "both"])
def test_values_and_gradients(parts: str, temperature: float) -> None:
    assert_equal_to_full_logits(make_head(), parts, temperature=temperature)


@pytest.mark.parametrize("kept", [0, 10, TOKENS])
@pytest.mark.parametrize("chunk", range(1, TOKENS + 1))
def test_chunks_and_what_is_kept_of_them_change_nothing(chunk: int, kept: int) -> None:
    assert_equal_to_full_logits(make_head(), chunk=chunk, kept=kept, temperature=0.7)


def test_bf16_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_to_full_logits(make_head(), rtol=0.05, atol=0.1)
        logprobs, _ = head_logprobs(*make_tokens(), make_head())
    assert logprobs.dtype == torch.float32


def test_bf16_weights_get_bf16_gradients() -> None:
    head, (hidden, targets) = make_head(dtype=torch.bfloat16), make_tokens(torch.bfloat16)
    logprobs, entropies = head_logprobs(hidden, targets, head)
    assert logprobs.dtype == entropies.dtype == torch.float32
    logprobs.sum().backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("parts", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("chunk", [5, TOKENS])
def test_a_frozen_head_gets_no_gradient(chunk: int, parts: str, temperature: float) -> None:
    head = make_head().requires_grad_(False)
    assert_equal_to_full_logits(head, parts, chunk=chunk, kept=1, temperature=temperature)
    logprobs, _ = head_logprobs(*make_tokens(), head)
    logprobs.sum().backward()
    assert head.weight.grad is None


def lora_head() -> nn.Module:
    model = nn.Sequential(make_head())
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(model, config).base_model.model[0]  # type: ignore[arg-type, index]


GENERAL = {
    "bias": (lambda: make_head(bias=True), None),
    "lora": (lora_head, None),
    "softcap": (make_head, lambda logits: LOGIT_TRANSFORMS["final_logit_softcapping"](logits, 2.0)),
    "scale": (make_head, lambda logits: LOGIT_TRANSFORMS["logit_scale"](logits, 0.3)),
}


@pytest.mark.parametrize("chunk", [1, 5, TOKENS])
@pytest.mark.parametrize(("head", "transform"), GENERAL.values(), ids=GENERAL)
def test_other_heads_take_the_general_path(head, transform, chunk: int) -> None:
    assert_equal_to_full_logits(head(), chunk=chunk, transform=transform, temperature=0.7)


def test_a_models_transform_comes_from_its_config() -> None:
    logits = torch.tensor([-8.0, 0.5, 8.0])
    assert logit_transform(tiny_model("llama")) is None
    capped = logit_transform(tiny_model("gemma2"))
    assert capped is not None
    torch.testing.assert_close(capped(logits), 3 * torch.tanh(logits / 3))


ROWS = torch.tensor([3, 0, 0, 7, 3, 2, 3, 6, 7, 7, 1, 0, 3, 5, 6, 2, 2, 1, 3, 3, 5, 0, 6, 7])
"""Which of 8 states predicts each of the 24 targets: in no order, up to six for one state and none for another."""
PATHS = {
    "fused": (make_head, None, 0),
    "fused, half of the chunks kept": (make_head, None, 4),
    "fused, all kept": (make_head, None, TOKENS),
    "frozen": (lambda: make_head().requires_grad_(False), None, 1),
    **{f"general: {name}": (head, transform, 0) for name, (head, transform) in GENERAL.items()},
}


@pytest.mark.parametrize("parts", ["logprobs", "entropy", "both"])
@pytest.mark.parametrize("chunk", [1, 3, 8, TOKENS])
@pytest.mark.parametrize(("head", "transform", "kept"), PATHS.values(), ids=PATHS)
def test_several_targets_of_one_state(head, transform, kept: int, chunk: int, parts: str) -> None:
    """As if the state had been there once for each: completions that begin alike are predicted from one position."""
    options = {"rows": ROWS, "states": int(ROWS.max()) + 1, "temperature": 0.7, "transform": transform}
    assert_equal_to_full_logits(head(), parts, chunk=chunk, kept=kept, **options)


def test_a_state_with_several_targets_goes_through_the_head_once() -> None:
    """Chunks are of states: 8 states make no larger product for 24 targets than for 8."""
    seen = []
    head = make_head(bias=True)
    head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    hidden, targets = make_tokens()
    logprobs, entropies = head_logprobs(hidden[:8], targets, head, rows=ROWS)
    assert sum(seen) == 8 * VOCAB
    assert len(logprobs) == len(entropies) == TOKENS
    with LargestTensor() as recorded:
        head_logprobs(hidden[:8], targets, make_head(), rows=ROWS)
    assert recorded.largest == 8 * VOCAB


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, in forward and backward."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.largest = max([self.largest, *(item.numel() for item in outputs if isinstance(item, Tensor))])
        return result


def largest_tensor(function, head: nn.Module, **options) -> int:
    with LargestTensor() as recorded:
        values_and_gradients(function, head, **options)
    return recorded.largest


HEADS = pytest.mark.parametrize("head", [make_head, lambda: make_head(bias=True), lora_head], ids=["linear", "bias", "lora"])


@HEADS
def test_full_logits_are_never_made(head) -> None:
    """Neither forward nor backward makes a tensor of tokens x vocabulary; the plain way shows that it would be seen."""
    largest = largest_tensor(head_logprobs, head(), logits_per_chunk=2 * VOCAB, logits_kept=5 * VOCAB)
    assert largest == max(DIM * VOCAB, TOKENS * DIM, 2 * VOCAB)
    assert largest_tensor(full_logits, head()) == TOKENS * VOCAB > 2 * largest


def saved_for_backward(function, head: nn.Module, **options) -> int:
    """Elements of all tensors that the forward pass leaves to the backward pass, the weights counted once."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda x: x):
        function(*make_tokens(), head, **options)
    return sum(tensor.numel() for tensor in kept.values())


@pytest.mark.parametrize("kept", [0, 5, 6])
@HEADS
def test_no_more_logits_are_kept_for_backward_than_asked_for(head, kept: int) -> None:
    weights = sum(parameter.numel() for parameter in head().parameters())
    saved = saved_for_backward(head_logprobs, head(), logits_per_chunk=2 * VOCAB, logits_kept=kept * VOCAB)
    assert saved <= weights + TOKENS * (DIM + 8) + kept // 2 * 2 * VOCAB
    assert saved_for_backward(full_logits, head()) > weights + TOKENS * VOCAB


def test_a_frozen_head_leaves_a_vector_a_token_and_makes_nothing_again() -> None:
    head = make_head().requires_grad_(False)
    assert saved_for_backward(head_logprobs, head) <= head.weight.numel() + TOKENS * (2 * DIM + 8)
    logprobs, _ = head_logprobs(*make_tokens(), head)
    with LargestTensor() as recorded:
        logprobs.sum().backward()
    assert recorded.largest == TOKENS * DIM
