"""The sides of a comparison, each a real trainer in a process of its own that takes a step when it is told to.

    python -m benchmarks.sides '{"side": "trl", "case": {...}, "model": FOLDER, "folder": FOLDER}'

reads a line from standard input for each rollout, trains on the case's completions, and answers with a JSON line. The
completions are injected where each trainer samples: TRL's `rollout_func`, our Engine. So all sides train on the same tokens
with the same rewards, and the clock runs from the moment the completions are there to the end of the optimizer step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.cases import Case, Data, make_data, make_tokenizer, text_of
from grpo_hf.types import Completion


class Clock(TrainerCallback):
    """Waits for a line before each rollout, and answers when its last optimizer step has been taken; of several processes
    the first one does, and the others wait for that."""

    def __init__(self, case: Case, gradient: Path):
        self.case, self.gradient = case, gradient
        self.first = os.environ.get("RANK", "0") == "0"
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the trainers print is no answer
        self.tokens = 0
        self.start = (0.0, 0.0)

    def wait(self) -> None:
        """Until the next line; the end of the lines ends the process."""
        if self.first and not sys.stdin.readline():
            os._exit(0)
        self.tokens, self.start = 0, (time.perf_counter(), time.process_time())

    def waits_before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called when the clock allows."""

        def late(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            return function(*args, **kwargs)

        return late

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward hook of the policy's decoder."""
        self.tokens += kwargs["input_ids"].numel()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the first rollout's gradient, the sum of its updates': TRL shuffles completions between them."""
        if state.global_step < self.case.updates and self.first:
            parts = {
                name.removeprefix("module."): p.grad for name, p in kwargs["model"].named_parameters() if p.requires_grad
            }
            gradient = torch.cat([parts[name].flatten() for name in sorted(parts)])
            if state.global_step:
                gradient += torch.load(self.gradient)
            torch.save(gradient, self.gradient)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer with what an optimizer step took; the peak is the process's own, in MiB."""
        if state.global_step % self.case.updates == 0 and self.first:
            wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            measured = {"wall_s": wall, "cpu_s": cpu, "tokens_forwarded": self.tokens}
            answer = {name: value / self.case.updates for name, value in measured.items()} | {"peak_mib": peak_mib()}
            print(json.dumps(answer), file=self.answers, flush=True)


def peak_mib() -> float:
    """The most memory that this process has held (not ru_maxrss, which starts at the parent's)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


class Replay:
    """An Engine whose samples are the case's completions."""

    def __init__(self, data: Data, clock: Clock):
        self.completions = {tuple(ids): made for ids, made in zip(data.prompts, data.completions, strict=True)}
        self.clock = clock

    def sync_weights(self) -> None:
        """Nothing to do."""

    def abort(self) -> None:
        """Nothing to do."""

    def sample(
        self, prompts: list[list[int]], seeds: list[int], num_generations: int, sampling: Any
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The completions, when the clock allows."""
        self.clock.wait()
        for number, ids in enumerate(prompts):
            yield number, [Completion(made, truncated=True) for made in self.completions[tuple(ids)]]


def settings_of(case: Case, folder: str, **more: Any) -> dict[str, Any]:
    """What both trainers are told, in the words that they share."""
    accumulation = case.groups * case.group_size // case.rows // int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "output_dir": folder,
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation * case.updates,
        "num_generations": case.group_size,
        "max_completion_length": case.completion,
        "beta": case.beta,
        "learning_rate": 1e-6,
        "max_grad_norm": 1e9,  # measured, never reached: updates that are scaled one by one would not add up
        "max_steps": 1_000_000,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    } | more


def load_policy(case: Case, model: str) -> Any:
    """The path itself, or a model with an adapter whose random weights are the same on all sides."""
    if not case.lora:
        return model
    torch.manual_seed(0)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)


def rows_of(case: Case, data: Data) -> Any:
    """The data set; many rows, since an epoch has an end."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": text_of(ids)} for ids in data.prompts] * 100)


def trl_trainer(case: Case, model: str, folder: str, data: Data, clock: Clock) -> Any:
    """TRL's GRPOTrainer with its defaults, but for what Case and settings_of say."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl import GRPOConfig, GRPOTrainer

    by_prompt = {text_of(ids): (ids, made) for ids, made in zip(data.prompts, data.completions, strict=True)}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        clock.wait()
        numbers = [number % case.group_size for number in range(len(prompts))]
        return {
            "prompt_ids": [by_prompt[prompt][0] for prompt in prompts],
            "completion_ids": [by_prompt[prompt][1][number] for prompt, number in zip(prompts, numbers, strict=True)],
            "logprobs": None,
        }

    trainer = GRPOTrainer(
        model=load_policy(case, model),
        reward_funcs=data.reward,
        args=GRPOConfig(**settings_of(case, folder)),
        train_dataset=rows_of(case, data),
        processing_class=make_tokenizer(case.vocabulary),
        callbacks=[clock],
        rollout_func=rollout if case.injected else None,
    )
    if not case.injected:
        trainer._generate_and_score_completions = clock.waits_before(trainer._generate_and_score_completions)
    return trainer


def our_trainer(case: Case, model: str, folder: str, data: Data, clock: Clock, layout: str = "packed", **more: Any) -> Any:
    """grpo_hf's with its defaults, and the case's token budget, or that of as many padded rows as TRL's."""
    from grpo_hf import GRPOConfig, GRPOTrainer

    packed = case.budget or case.prompt + case.group_size * case.completion
    settings = {
        "token_layout": layout,
        "tokens_per_microbatch": packed if layout == "packed" else case.rows * (case.prompt + case.completion),
        "save_rollouts": False,
        "write_report": False,
        **more,
    }
    trainer = GRPOTrainer(
        model=load_policy(case, model),
        reward_funcs=data.reward,
        args=GRPOConfig(**settings_of(case, folder, **settings)),
        train_dataset=rows_of(case, data),
        processing_class=make_tokenizer(case.vocabulary),
        callbacks=[clock],
    )
    if case.injected:
        trainer.sampler.engine = Replay(data, clock)
    else:
        trainer.stream.make = clock.waits_before(trainer.stream.make)
    return trainer


def padded_trainer(*args: Any) -> Any:
    """grpo_hf's with one padded row for every completion, those without signal too, and the same fused head."""
    return our_trainer(*args, layout="padded", keep_zero_signal=True)


def vllm_trainer(*args: Any) -> Any:
    """grpo_hf's with vLLM in its process."""
    return our_trainer(*args, use_vllm=True)


SIDES: dict[str, Callable[..., Any]] = {
    "trl": trl_trainer,
    "padded": padded_trainer,
    "grpo_hf": our_trainer,
    "grpo_hf_vllm": vllm_trainer,
}
"""Each takes the case, the model's folder, one to write to, the data and the clock."""


def gradient_file(folder: Path, side: str) -> Path:
    """Where a side leaves the gradient of its first rollout."""
    return folder / f"{side}.pt"


def main() -> None:
    """A worker."""
    spec = json.loads(sys.argv[1])
    case, folder = Case(**spec["case"]), Path(spec["folder"])
    data = make_data(case)
    clock = Clock(case, gradient_file(folder, spec["side"]))
    trainer = SIDES[spec["side"]](case, spec["model"], str(folder / spec["side"]), data, clock)
    decoder = trainer.model.get_decoder() if not case.lora else trainer.model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(clock.count, with_kwargs=True)
    trainer.train()


if __name__ == "__main__":
    main()
