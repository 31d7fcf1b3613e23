"""The toy: the lecture's model, its stuck loop, and the setting that solves it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import grpo_hf.toy.train as toy_train
from grpo_hf.algorithm.advantages import ADVANTAGES
from grpo_hf.algorithm.aggregation import AGGREGATIONS
from grpo_hf.algorithm.kl import KL_ESTIMATORS
from grpo_hf.algorithm.losses import LEVELS, LOSSES
from grpo_hf.toy.cli import main
from grpo_hf.toy.experiments import LECTURE, SOLVING, frozen_ratio_gradients, variance_example
from grpo_hf.toy.model import SortingModel, generate, response_logprobs, side_by_side
from grpo_hf.toy.train import ToySettings, train

PROMPTS = torch.tensor(toy_train.LECTURE_PROMPTS)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only lose by more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_model(seed: int = 0, response_length: int = 3) -> SortingModel:
    return SortingModel(
        vocab_size=5,
        embedding_dim=10,
        prompt_length=3,
        response_length=response_length,
        generator=torch.Generator().manual_seed(seed),
    )


def test_logits_are_the_lectures_formula() -> None:
    model = new_model(response_length=2)
    logits = model(PROMPTS)
    assert logits.shape == (3, 2, 5)
    table = model.embedding.weight
    # Second prompt [3, 2, 4], second answer position, token 1; written out with plain matrix products.
    encoded = sum(table[token] @ model.encode_weights[pos] for pos, token in enumerate([3, 2, 4]))
    torch.testing.assert_close(logits[1, 1, 1], encoded @ model.decode_weights[1] @ table[1])


def test_weights_start_as_in_the_lecture() -> None:
    model = SortingModel(vocab_size=400, embedding_dim=100, prompt_length=4, response_length=4)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.encode_weights.std().item() == pytest.approx(0.1, rel=0.02)
    assert model.decode_weights.std().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_generate_samples_softmax_of_the_logits(temperature: float) -> None:
    model, generator = new_model(), torch.Generator().manual_seed(0)
    responses = generate(model, PROMPTS, 20_000, temperature, generator)
    assert responses.shape == (3, 20_000, 3)
    frequencies = torch.nn.functional.one_hot(responses, 5).float().mean(1)
    expected = (model(PROMPTS) / temperature).softmax(-1)
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)  # 4 standard errors of p = 1/2


def test_generate_depends_on_its_generator_alone() -> None:
    draws = [generate(new_model(), PROMPTS, 50, 10.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_response_logprobs_pick_each_tokens_own() -> None:
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    responses = torch.randint(5, (3, 4, 2), generator=torch.Generator().manual_seed(1))
    logprobs = response_logprobs(logits, responses, 2.0)
    assert logprobs.shape == (3, 4, 2)
    expected = (logits[2, 1] / 2).log_softmax(-1)[responses[2, 3, 1]]
    torch.testing.assert_close(logprobs[2, 3, 1], expected)


def test_side_by_side_models_keep_their_own_logits_and_gradients() -> None:
    models = [new_model(0).double(), new_model(1).double()]
    stacked = side_by_side(models)
    logits = stacked(PROMPTS)
    logits.square().sum().backward()
    for index, model in enumerate(models):
        own = model(PROMPTS)
        own.square().sum().backward()
        torch.testing.assert_close(logits[index], own)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(stacked.get_parameter(name).grad[index], parameter.grad)


def test_frozen_ratio() -> None:
    not_held, held = frozen_ratio_gradients(2.0)
    assert not_held == 0.0
    assert held == pytest.approx(0.1192029)  # 1 - σ(2) = 1 / (1 + e²)


def test_variance_example() -> None:
    # Mean of 11, 9, 0, 2 is 5.5: 30.25 + 12.25 + 30.25 + 12.25 = 85, over 3. After it 1, -1, -1, 1: 4 over 3.
    assert variance_example() == pytest.approx((85 / 3, 4 / 3))


def test_the_lectures_loop_sticks() -> None:
    """After 30 of its 100 epochs no delta has one seed of three solved, and the samples no longer differ."""
    for settings in LECTURE["the four deltas (naive loss)"].values():
        result = train(replace(settings, num_epochs=30), seeds=range(3))
        assert (result.num_sorted[-1] <= 1).all()
        assert (result.lecture_reward < 4.5).all()
        assert (result.rewards[-1] - result.rewards[-5]).abs().max() < 0.5


def test_the_solving_setting_solves_ten_seeds() -> None:
    result = train(SOLVING, seeds=range(10))
    expected = torch.tensor([[0, 1, 2], [2, 3, 4], [1, 2, 3]])
    assert torch.equal(result.greedy, expected.expand(10, 3, 3))
    assert result.lecture_reward.tolist() == [5.0] * 10
    assert (result.num_sorted[-50:] == 3).all(), "solved by half time, and it stays so"
    assert result.rewards[-1].min() > 2.8, "the sampled answers, of 3 points, are right too"
    assert result.samples_per_prompt <= 100 * 10, "no more than the lecture's"


def test_a_seed_does_not_depend_on_its_neighbours() -> None:
    settings = replace(SOLVING, num_epochs=5)
    together, alone = train(settings, seeds=[4, 7]), train(settings, seeds=[7])
    torch.testing.assert_close(together.rewards[:, 1:], alone.rewards)
    assert torch.equal(together.greedy[1:], alone.greedy)
    again = train(settings, seeds=[4, 7])
    assert torch.equal(together.rewards, again.rewards)


def test_shapes_and_counts() -> None:
    settings = ToySettings(num_epochs=2, num_steps=1, num_responses=4, prompts=((2, 0, 1, 1),), beta=0.1)
    result = train(settings, seeds=[0, 1, 2])
    assert result.rewards.shape == (2, 3)
    assert result.num_sorted.shape == (3, 3)
    assert result.greedy.shape == (3, 1, 4)
    assert result.samples_per_prompt == 8


def counted(function: Callable[..., Any], calls: list) -> Callable[..., Any]:
    """The same function, which takes note of its calls."""

    def wrapped(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return function(*args, **options)

    return wrapped


def test_every_step_goes_through_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ToySettings(
        advantage="centered",
        loss="sapo",
        level="sequence",
        aggregation="constant_length",
        kl="k2",
        beta=0.1,
        num_epochs=2,
        num_steps=3,
    )
    tables = ((ADVANTAGES, "centered"), (AGGREGATIONS, "constant_length"), (KL_ESTIMATORS, "k2"), (LEVELS, "sequence"))
    calls: dict[str, list] = {"sapo": []}
    for table, name in tables:
        calls[name] = []
        monkeypatch.setitem(table, name, counted(table[name], calls[name]))
    sapo, aggregation = LOSSES["sapo"]
    monkeypatch.setitem(LOSSES, "sapo", (counted(sapo, calls["sapo"]), aggregation))
    train(settings, seeds=[0, 1])
    counts = {name: len(of_name) for name, of_name in calls.items()}
    # Advantages once an epoch and seed, the rest at each of 2 x 3 steps; loss and KL are aggregated.
    assert counts == {"centered": 4, "constant_length": 12, "k2": 6, "sequence": 6, "sapo": 6}


@pytest.mark.parametrize(
    ("table", "name", "replacement"),
    [
        (ADVANTAGES, "group", lambda scores, weights: -scores.sum(-1)),
        (LOSSES, "dapo", (lambda batch, **_: (batch.advantages * batch.logprobs, {}), "token_mean")),
        (LEVELS, "token", lambda batch: 0 * batch.logprobs),
        (AGGREGATIONS, "token_mean", lambda batch, denominators: torch.zeros(len(batch.logprobs))),
    ],
    ids=["ADVANTAGES", "LOSSES", "LEVELS", "AGGREGATIONS"],
)
def test_what_algorithm_says_is_what_happens(monkeypatch, table: dict, name: str, replacement) -> None:
    settings = replace(SOLVING, num_epochs=20)
    sorted_before = train(settings).num_sorted[-1].item()
    monkeypatch.setitem(table, name, replacement)
    assert sorted_before == 3
    assert train(settings).num_sorted[-1].item() < 3


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 1.0},
        {"beta": 1.0, "reference_period": 1},
        {"entropy_bonus": 1.0},
        {"temperature": 3.0},
        {"loss_options": {"epsilon": 0.01}},
        {"reward": "inclusion_ordering"},
    ],
)
def test_every_setting_changes_the_run(change: dict) -> None:
    base = replace(SOLVING, num_epochs=10)
    if "reference_period" in change:
        base = replace(base, beta=1.0)
    assert not torch.equal(train(base).rewards, train(replace(base, **change)).rewards)


def test_kl_holds_the_policy_at_its_reference() -> None:
    """With a large β the policy cannot leave a reference that is never copied again; copied each epoch, it can."""

    def gained(period: int) -> float:
        settings = replace(SOLVING, beta=10.0, num_epochs=20, reference_period=period)
        return train(settings, seeds=range(3)).rewards[-1].mean().item()

    assert gained(period=1000) < 1.0  # of 3 points; 0.6 at the start
    assert gained(period=1) > 2.0


def test_entropy_bonus_explores_what_the_start_leaves_out() -> None:
    def num_sorted(bonus: float) -> int:
        settings = replace(SOLVING, temperature=1.0, entropy_bonus=bonus)
        return int(train(settings, seeds=range(5)).num_sorted[-1].sum())

    assert num_sorted(0.0) < 6  # of 5 x 3
    assert num_sorted(0.3) > 11


def test_cli_prints_the_tables_and_draws_the_curves(tmp_path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--seeds", "0", "1", "--epochs", "3", "--output_dir", str(tmp_path / "toy")]) == 0
    printed = capsys.readouterr().out
    for text in ("raw rewards", "max only", "unclipped ratio", "KL, beta 0.1", "solving setting", "28.33, and 1.33"):
        assert text in printed
    assert "0.1192 with p_old held constant, 0.0000 without" in printed
    for name in ("lecture.png", "solving.png"):
        assert (tmp_path / "toy" / name).read_bytes().startswith(b"\x89PNG")


def test_cli_refuses_no_epochs(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--epochs", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err
