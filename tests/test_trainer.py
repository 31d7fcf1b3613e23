"""GRPOTrainer learns, in every form that its settings describe, and saves what transformers and PEFT can load."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from grpo_hf import GRPOConfig, GRPOTrainer
from grpo_hf.algorithm.losses import LOSSES
from grpo_hf.packing.logprobs import batch_logprobs
from tests.runs import AfterStep, logs, lora, same, values, weights
from tests.tiny import (
    PROMPTS,
    SIZES,
    VOCAB,
    Gradients,
    even_words,
    relative_error,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)

FULL_AND_LORA = pytest.mark.parametrize("peft_config", [lambda: None, lora], ids=["full", "lora"])
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def share_of_w7(completion: str) -> float:
    """An easy task: say w7, and nothing else."""
    return completion.split().count("w7") / 8


# ---- Learning


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_reward_rises_on_an_easy_task(tmp_path: Path, family: str) -> None:
    settings = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "max_grad_norm": 1.0}
    trainer = tiny_trainer(tmp_path, model=tiny_model(family), reward=share_of_w7, **settings)
    trainer.train()
    rewards = values(trainer, "reward")
    assert rewards[0] < 0.2
    assert min(rewards[-3:]) > 0.8


def test_lora_learns_and_leaves_the_base_alone(tmp_path: Path) -> None:
    """To the last bit; and its checkpoint is an adapter that PEFT loads."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    settings = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 2e-2, "max_grad_norm": 1.0}
    trainer = tiny_trainer(
        tmp_path, model=str(tmp_path / "base"), reward=share_of_w7, peft_config=lora(), save_strategy="steps", **settings
    )
    trainer.train()
    assert min(values(trainer, "reward")[-3:]) > 0.8
    after = {name.replace(".base_layer", ""): value for name, value in weights(trainer.model.get_base_model()).items()}
    assert all(torch.equal(after[name], value) for name, value in base.state_dict().items())

    checkpoint = tmp_path / "checkpoint-40"
    assert not list(checkpoint.glob("model*")), "only the adapter is saved"
    expected = trainer.model.eval()(IDS).logits
    loaded = [
        AutoPeftModelForCausalLM.from_pretrained(checkpoint),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), checkpoint),
    ]
    for model in loaded:
        torch.testing.assert_close(model.eval()(IDS).logits, expected)


def test_a_peft_model_is_trained_as_it_is(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), lora())
    before = weights(model)
    trainer = tiny_trainer(tmp_path, model=model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_checkpoint_loads_with_the_same_logits(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, save_strategy="steps", max_steps=2)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(loaded.eval()(IDS).logits, trainer.model.eval()(IDS).logits)
    assert (tmp_path / "checkpoint-2" / "tokenizer.json").is_file()


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    """Whatever random numbers were drawn before."""

    def run(**settings: Any) -> dict[str, Tensor]:
        torch.rand(3)
        trainer = tiny_trainer(tmp_path, max_steps=2, **settings)
        trainer.train()
        return weights(trainer.model)

    assert same(run(), run())
    assert same(run(peft_config=lora()), run(peft_config=lora()))
    assert not same(run(), run(seed=1))
    assert not same(run(), run(data_seed=1))


def test_train_can_be_called_again(tmp_path: Path) -> None:
    """It samples anew: the first rollout of the second call comes from the weights as they are."""
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    first = trainer.rollout
    trainer.train()
    assert trainer.rollout is not first
    assert values(trainer, "clip_ratio/region_mean") == [0.0]
    assert values(trainer, "tokens/sampled")[-1] > 0


# ---- Rewards and prompts


def test_rewards_are_weighted_and_summed(tmp_path: Path) -> None:
    def length(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(completion.split())) for completion in completions]

    def never(completion: str) -> None:
        return None

    trainer = tiny_trainer(tmp_path, reward=[even_words, length, never], reward_weights=[2.0, -1.0, 5.0], max_steps=2)
    trainer.train()
    for entry in logs(trainer):
        expected = 2 * entry["rewards/even_words/mean"] - entry["rewards/length/mean"]
        assert entry["reward"] == pytest.approx(expected)
        assert "rewards/never/mean" not in entry, "it never applied"
    for group in trainer.rollout.groups:
        for item in group.completions:
            assert item.reward == 2 * item.rewards["even_words"] - item.rewards["length"]


def test_chat_prompts(tmp_path: Path) -> None:
    """The template makes the tokens; a batch verifier gets messages, as from TRL, a verifier of one sample the text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w{{ (m.role | length) + 80 }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}{{ start | default('w90') }}{% endif %}"
    )
    chat = [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "w3"}]
    seen: list[Any] = []

    def batch(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [float(len(completion[0]["content"])) for completion in completions]

    def one(prompt: Any, completion: str) -> float:
        seen.append((prompt, completion))
        return 0.0

    rewards = [{"name": verifier, "in_process": True} for verifier in (batch, one)]
    options = {"dataset": [{"prompt": chat}] * 2, "tokenizer": tokenizer, "reward": rewards}
    trainer = tiny_trainer(tmp_path, **options)
    trainer.train()
    words = trainer.processing_class.convert_ids_to_tokens(trainer.prompts.ids[0])
    assert words == ["w86", "w1", "w2", "w84", "w3", "w90"]
    text = trainer.rollout.groups[0].completions[0].text
    assert seen[:2] == [(chat, [{"role": "assistant", "content": text}]), (chat, text)]

    trainer = tiny_trainer(tmp_path, **options, chat_template_kwargs={"start": "w91"})
    assert trainer.processing_class.convert_ids_to_tokens(trainer.prompts.ids[0])[-1] == "w91"


def test_prompts_come_in_the_datasets_order_without_shuffling(tmp_path: Path) -> None:
    drawn = []
    trainer = tiny_trainer(
        tmp_path, max_steps=4, shuffle_dataset=False, callbacks=[AfterStep(lambda *_: drawn.append(indices(trainer)))]
    )
    trainer.train()
    assert drawn == [[0, 1], [2, 3], [4, 5], [0, 1]]


def indices(trainer: GRPOTrainer) -> list[int]:
    """Dataset rows of the rollout that is being trained on."""
    return [group.prompt.index for group in trainer.rollout.groups]


# ---- Several updates on a rollout


def test_num_iterations_and_steps_per_generation(tmp_path: Path) -> None:
    """Two updates, run twice, on one rollout; the first is on-policy, and π_old of all is the policy that sampled."""
    sampled_by = tiny_model()
    model = tiny_model()
    model.generation_config.eos_token_id = sampled_by.generation_config.eos_token_id = list(range(VOCAB - 20, VOCAB))
    steps: list[tuple[int, list[int]]] = []
    settings = {"max_steps": 5, "num_iterations": 2, "steps_per_generation": 2, "learning_rate": 1e-2}
    callback = AfterStep(lambda state, _: steps.append((trainer.rollout.index, indices(trainer))))
    trainer = tiny_trainer(tmp_path, model=model, callbacks=[callback], keep_zero_signal=True, **settings)
    old: list[Tensor] = []
    check = AfterStep(lambda state, _: old.append(rollout_logprobs(trainer, sampled_by)) if state.global_step == 4 else None)
    trainer.add_callback(check)
    trainer.train()

    assert [index for index, _ in steps] == [0, 0, 0, 0, 1]
    assert len(steps[0][1]) == 4, "a rollout of 2 * 8 completions in groups of 4"
    clipped = values(trainer, "clip_ratio/region_mean")
    assert clipped[0] == clipped[4] == 0.0, "on the policy that sampled"
    assert min(clipped[1:4]) > 0.0
    generated = [entry["time/generate"] > 0 if "time/generate" in entry else False for entry in logs(trainer)]
    assert generated == [True, False, False, False, True]
    torch.testing.assert_close(*old[0], atol=1e-5, rtol=0)


def rollout_logprobs(trainer: GRPOTrainer, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The kept log-probs of a rollout's updates, and a model's."""
    model.set_attn_implementation("token_tree")
    batches = [batch for update in trainer.rollout.updates for batch in trainer.policy.microbatches(update)]
    with torch.no_grad():
        expected = [batch_logprobs(model, batch)[0] for batch in batches]
    return torch.cat([batch.old_logprobs for batch in batches]), torch.cat(expected)


def test_accumulation_is_one_update(tmp_path: Path) -> None:
    """16 completions are 16 completions, in one batch or in four."""

    def run(batch: int, accumulation: int) -> dict[str, Tensor]:
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = tiny_trainer(tmp_path, max_steps=3, **sizes)
        trainer.train()
        assert trainer.state.global_step == 3
        return weights(trainer.model)

    assert same(run(16, 1), run(4, 4))


# ---- KL


@FULL_AND_LORA
def test_kl_to_the_reference_starts_at_0_and_grows(tmp_path: Path, peft_config: Any) -> None:
    trainer = tiny_trainer(tmp_path, peft_config=peft_config(), beta=0.1, max_steps=8, learning_rate=1e-2)
    reference = None if trainer.ref_model is None else weights(trainer.ref_model)
    trainer.train()
    kl = values(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > kl[1] > 1e-4
    assert (reference is None) == (peft_config is lora), "under LoRA it is the base model, adapter switched off"
    assert reference is None or same(weights(trainer.ref_model), reference)
    for batch in trainer.policy.microbatches(trainer.rollout.updates[0]):
        base = tiny_model()
        base.set_attn_implementation("token_tree")
        with torch.no_grad():
            expected = batch_logprobs(base, batch)[0]
        torch.testing.assert_close(batch.ref_logprobs, expected, atol=1e-5, rtol=0)


def test_beta_holds_the_policy_back(tmp_path: Path) -> None:
    def last_kl(beta: float) -> float:
        trainer = tiny_trainer(tmp_path, beta=beta, max_steps=30, learning_rate=3e-3, reward=share_of_w7)
        trainer.train()
        return values(trainer, "kl")[-1]

    assert last_kl(10.0) < 0.5 * last_kl(1e-9)


def test_without_beta_there_is_no_reference(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    assert trainer.ref_model is None
    assert "kl" not in logs(trainer)[0]


def test_the_reference_moves_towards_the_policy(tmp_path: Path) -> None:
    """ref = 0.25 π + 0.75 ref after every second step."""
    history: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    settings = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    trainer = tiny_trainer(tmp_path, max_steps=5, **settings)
    start = weights(trainer.ref_model)
    trainer.add_callback(AfterStep(lambda state, model: history.append((weights(model), weights(trainer.ref_model)))))
    trainer.train()
    for step, (policy, reference) in enumerate(history, start=1):
        before = history[step - 2][1] if step > 1 else start
        if step % 2:
            assert same(reference, before)
        else:
            expected = {name: 0.25 * policy[name] + 0.75 * before[name] for name in before}
            torch.testing.assert_close(reference, expected)
            assert not same(reference, before)


def test_the_reference_does_not_move_under_lora(tmp_path: Path) -> None:
    settings = {"beta": 0.1, "sync_ref_model": True}
    for options in ({"peft_config": lora()}, {"model": get_peft_model(tiny_model(), lora())}):
        with pytest.raises(ValueError, match="sync_ref_model=True cannot move the reference under LoRA"):
            tiny_trainer(tmp_path, **settings, **options)


# ---- Memory and precision


@FULL_AND_LORA
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path, peft_config: Any) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        kept = Gradients()
        settings = {"gradient_checkpointing": checkpointing, "callbacks": [kept]}
        trainer = tiny_trainer(tmp_path, peft_config=peft_config(), **settings)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        return kept.steps[0]

    assert relative_error(gradients(True), gradients(False)) < 1e-6


@FULL_AND_LORA
def test_bf16(tmp_path: Path, peft_config: Any) -> None:
    """Autocast: the weights and their gradients stay in float32."""

    rollouts: list[Any] = []

    def gradients(bf16: bool) -> dict[str, Tensor]:
        kept = Gradients()
        settings = {"bf16": bf16, "gradient_checkpointing": bf16, "callbacks": [kept], "beta": 0.1}
        trainer = tiny_trainer(tmp_path, peft_config=peft_config(), **settings)
        make = trainer.make_rollout
        trainer.make_rollout = lambda index: rollouts[0] if rollouts else make(index)
        trainer.train()
        rollouts.append(trainer.rollout)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        return kept.steps[0]

    full = gradients(False)
    assert 1e-6 < relative_error(gradients(True), full) < 0.1


def test_bf16_weights_train_too(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    trainer = tiny_trainer(tmp_path, model=model, max_steps=2, learning_rate=1e-2)
    before = weights(model)
    trainer.train()
    assert not same(weights(trainer.model), before)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    def model() -> nn.Module:
        made = tiny_model("gpt2")
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return made

    assert {m.p for m in tiny_trainer(tmp_path, model=model()).model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    kept = tiny_trainer(tmp_path, model=model(), disable_dropout=False)
    assert {m.p for m in kept.model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert kept.policy.layout == "padded"


# ---- Loss


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type_trains(tmp_path: Path, loss_type: str, level: str, layout: str) -> None:
    bound = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "token_layout": layout, **bound}
    trainer = tiny_trainer(tmp_path, max_steps=2, num_iterations=2, **settings)
    before = weights(trainer.model)
    trainer.train()
    assert all(0 < norm < 1e3 for norm in values(trainer, "grad_norm"))
    assert not same(weights(trainer.model), before)


def test_truncated_completions_can_be_masked(tmp_path: Path) -> None:
    """They have rewards and advantages, but no token of theirs is counted or trained on."""
    trainer = tiny_trainer(tmp_path, mask_truncated_completions=True, per_device_train_batch_size=16)
    trainer.train()
    completions = [item for group in trainer.rollout.groups for item in group.completions]
    ended = [item for item in completions if not item.truncated]
    assert 0 < len(ended) < len(completions) == 16
    (update,) = trainer.rollout.updates
    assert update.denominators.tokens == sum(len(item.ids) for item in ended)
    assert len(update.samples) == sum(item.advantage != 0 for item in ended)


def test_nothing_is_learned_when_all_are_masked(tmp_path: Path) -> None:
    model = tiny_model()  # ends one time in 97
    settings = {"mask_truncated_completions": True, "max_completion_length": 1}
    trainer = tiny_trainer(tmp_path, model=model, **settings)
    before = weights(trainer.model)
    trainer.train()
    assert values(trainer, "completions/clipped_ratio") == [1.0]
    assert values(trainer, "grad_norm") == [0.0]
    assert same(weights(trainer.model), before)


# ---- As from TRL


def test_a_trl_script_runs_with_its_import_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a script without output_dir writes where it is started
    model = tiny_model("llama")
    model.config.max_position_embeddings = 1024
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")

    def reward_num_unique_words(completions: list[str], **kwargs: Any) -> list[float]:
        assert {"prompts", "completion_ids", "label", "trainer_state"} <= set(kwargs)
        return [float(len(set(completion.split()))) for completion in completions]

    training_args = GRPOConfig(
        output_dir="run",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=2,
        use_cpu=True,
    )
    trainer = GRPOTrainer(
        model="model",
        reward_funcs=reward_num_unique_words,
        args=training_args,
        train_dataset=[row | {"label": number} for number, row in enumerate(PROMPTS)],
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}

    with_defaults = GRPOTrainer("model", reward_num_unique_words, train_dataset=PROMPTS)
    assert with_defaults.args.num_generations == 8
    assert with_defaults.processing_class.eos_token == "<eos>"


def test_what_people_read_of_a_trainer(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("qwen2", num_labels=1, **(SIZES | {"tie_word_embeddings": True}))
    )
    tokenizer = tiny_tokenizer()
    trainer = tiny_trainer(tmp_path, reward=[even_words, model], reward_processing_classes=[None, tokenizer])
    assert trainer.reward_funcs == [even_words, model]
    assert trainer.reward_func_names[0] == "even_words" and len(trainer.reward_func_names) == 2
    assert trainer.reward_processing_classes == [None, tokenizer]
    assert trainer.eval_dataset is None


def test_the_head_alone_in_float32(tmp_path: Path) -> None:
    """Log-probs are those of the same hidden states under a float32 product, in a model of bfloat16; and it trains."""

    def model() -> Any:
        return tiny_model("llama").to(torch.bfloat16)

    trainer = tiny_trainer(tmp_path, model=model(), cast_lm_head_to_fp32=True, beta=0.1, num_iterations=2, max_steps=2)
    head = trainer.model.lm_head
    assert head.weight.dtype == torch.float32 and trainer.model.model.embed_tokens.weight.dtype == torch.bfloat16
    trainer.train()
    batch = trainer.policy.microbatches(trainer.rollout.updates[0])[0]
    hidden: list[Tensor] = []
    hook = trainer.model.model.register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = batch_logprobs(trainer.model, batch)[0]
    hook.remove()
    logits = hidden[0].flatten(0, 1)[batch.scored_at].float() @ head.weight.T
    expected = logits.log_softmax(-1)[batch.scored, batch.targets]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert trainer.model(IDS).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="head apart from the embeddings, and that of Qwen2ForCausalLM is tied to them"):
        tiny_trainer(tmp_path, cast_lm_head_to_fp32=True)


def test_completions_without_any_score_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("grpo_hf.training.checks"), "warning", said.append)

    def odd_alone(completion: str) -> float | None:
        return 1.0 if len(completion.split()) % 2 else None

    trainer = tiny_trainer(tmp_path, reward=odd_alone)
    trainer.train()
    without = [item for group in trainer.rollout.groups for item in group.completions if math.isnan(item.reward)]
    assert 0 < len(without) < 8
    unscored, no_signal = said  # each is said once
    assert unscored.startswith(f"no reward has given {len(without)} of 8 completions a score")
    assert no_signal.startswith(
        "no group of the first rollout has a signal: its 8 completions have the rewards 1, none, equal"
    )


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_samples_are_a_table_where_the_tracker_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    module = pytest.importorskip(tracker)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    frames: list[Any] = []
    build = module.Table.__init__

    def observed(table: Any, *args: Any, dataframe: Any, **more: Any) -> None:
        frames.append(dataframe)
        build(table, *args, dataframe=dataframe, **more)

    monkeypatch.setattr(module.Table, "__init__", observed)
    settings = {"log_completions": True, "report_to": [tracker], "max_steps": 2, "log_unique_prompts": tracker == "wandb"}
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    assert len(frames) == 2
    assert list(frames[1].columns) == ["step", "prompt", "completion", "even_words", "advantage"]
    assert len(frames[1]) == (2 if tracker == "wandb" else 8)
    assert frames[1]["even_words"][0] == trainer.rollout.groups[0].completions[0].reward
    assert tracker != "wandb" or module.run.summary["completions"]["nrows"] == 2


def test_model_init_kwargs_load_the_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    trainer = tiny_trainer(tmp_path, model=str(tmp_path), model_init_kwargs={"dtype": "bfloat16"})
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
