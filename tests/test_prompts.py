"""Prompts: tokenizing, what is refused and with which words, and the order in which rollouts draw them."""

import logging

import pytest
from datasets import Dataset

from grpo_hf.rollout.prompts import PromptOrder, checked_dataset, derived_seed, load_prompts, prepare_tokenizer
from tests.tiny_models import WORDS, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{{ ' ' + mood if mood }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def rows(*prompts) -> list[dict]:
    return [{"prompt": prompt, "answer": number} for number, prompt in enumerate(prompts)]


def test_strings(tokenizer) -> None:
    prompts = load_prompts(rows("w3 w1", "w2"), tokenizer)
    assert len(prompts) == 2
    assert [prompt.ids for prompt in prompts] == [[3, 1], [2]]
    first = prompts[0]
    assert (first.raw, first.row, first.index) == ("w3 w1", {"prompt": "w3 w1", "answer": 0}, 0)


def test_chat_messages() -> None:
    tokenizer = tiny_tokenizer(["user", "assistant", "hello", "gaily"])
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "hello"}]
    prompts = load_prompts(rows(chat), tokenizer)
    assert tokenizer.decode(prompts[0].ids) == "user hello assistant"
    assert prompts[0].raw == chat
    (moody,) = load_prompts(rows(chat), tokenizer, chat_template_kwargs={"mood": "gaily"})
    assert tokenizer.decode(moody.ids) == "user hello assistant gaily"


def test_plain_text_for_a_chat_model_is_said(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_prompts(rows("w1"), tokenizer)
        assert "chat template" not in caplog.text
        tokenizer.chat_template = TEMPLATE
        load_prompts(rows([{"role": "user", "content": "w1"}]), tokenizer)
        assert "chat template" not in caplog.text
        load_prompts(rows("w1"), tokenizer)
    assert "prompts are plain text, and go to the model without the chat template that its tokenizer has" in caplog.text


def test_prompts_of_another_kind_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="a prompt must be a string or a list of chat messages, got int: 7"):
        load_prompts([{"prompt": 7}], tokenizer)


def test_prompts_without_tokens_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"train_dataset: 2 prompts have no tokens \(rows 1, 2\)"):
        load_prompts(rows("w1", "", " "), tokenizer)


def test_overlong_prompts_are_refused_with_the_numbers(tokenizer) -> None:
    with pytest.raises(ValueError) as error:
        load_prompts(rows("w1", "w1 w2 w3", "w1 w2 w3 w4"), tokenizer, max_prompt_length=2)
    assert str(error.value) == (
        "train_dataset: 2 of 3 prompts are longer than 2 tokens, which is the model's context less max_completion_length "
        "(rows 1, 2; the longest has 4). Shorten them, lower max_completion_length, or set overlong_prompts='drop'"
    )


def test_long_lists_of_rows_are_cut(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.;"):
        load_prompts(rows(*["w1 w2"] * 12), tokenizer, max_prompt_length=1)


def test_overlong_prompts_are_dropped_when_asked(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_prompt_length": 2, "overlong_prompts": "drop"}
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(rows("w1 w2 w3", "w4", "w5 w6"), tokenizer, **options)
    assert "dropped 1 of 3 prompts longer than 2 tokens" in caplog.text
    assert [(prompt.ids, prompt.index, prompt.row["answer"]) for prompt in prompts] == [([4], 1, 1), ([5, 6], 2, 2)]
    with pytest.raises(ValueError, match="1 of 1 prompts are longer"):  # nothing would be left
        load_prompts(rows("w1 w2 w3"), tokenizer, **options)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "`evals` is required: give at least one row with a prompt"),
        ([], "evals is empty: give at least one row with a prompt"),
        ([{"prompts": "w1", "a": 1}], r"evals has no column 'prompt', only \['prompts', 'a'\]; .*rename_column\('prompts'"),
        ([{"question": "w1"}], r"no column 'prompt', only \['question'\]; use evals.rename_column\('question', 'prompt'\)"),
        (Dataset.from_list(rows("w1")).to_iterable_dataset(), "evals is an IterableDataset: .*Load it without streaming"),
    ],
    ids=["missing", "empty", "near name", "other name", "streaming"],
)
def test_bad_datasets_are_refused_with_the_fix(dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_dataset(dataset, "evals")


def test_tokenizer_needs_eos_and_is_given_a_pad_token(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.pad_token = None
    with caplog.at_level(logging.WARNING):
        assert prepare_tokenizer(tokenizer).pad_token_id == tokenizer.eos_token_id == len(WORDS) + 1
    assert "no pad token; using its eos token '<eos>'" in caplog.text
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no eos token, so no completion could end; set tokenizer\.eos_token"):
        prepare_tokenizer(tokenizer)


def test_each_epoch_is_a_permutation() -> None:
    order = PromptOrder(num_prompts=12, prompts_per_rollout=4, seed=1)
    assert order.rollouts_per_epoch == 3
    epochs = [[row for rollout in range(3 * e, 3 * e + 3) for row in order.prompts(rollout)] for e in range(4)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_function_of_seed_and_rollout_alone() -> None:
    one, same, other = (PromptOrder(50, 8, seed) for seed in (1, 1, 2))
    one.prompts(0)  # asking before changes nothing
    assert one.prompts(9) == same.prompts(9) != other.prompts(9)


def test_a_remainder_waits_for_the_next_permutation() -> None:
    order = PromptOrder(num_prompts=10, prompts_per_rollout=4, seed=0)
    assert order.rollouts_per_epoch == 2
    seen: set[int] = set()
    for epoch in range(20):
        drawn = order.prompts(2 * epoch) + order.prompts(2 * epoch + 1)
        assert len(set(drawn)) == 8
        seen |= set(drawn)
    assert seen == set(range(10))


def test_without_shuffling_the_datasets_order() -> None:
    order = PromptOrder(num_prompts=5, prompts_per_rollout=2, seed=0, shuffle=False)
    assert [order.prompts(rollout) for rollout in range(4)] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_derived_seeds() -> None:
    """The same on every machine, 62 bits, and a matter of the parts' places as well as their values."""
    assert derived_seed(0, "sample", 1, 2, 3) == 4576174040340985081
    seeds = [derived_seed(1, 23), derived_seed(12, 3), derived_seed(1, 2, 3), derived_seed(0), derived_seed(1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
