"""What share of the machine the training phase used: measured, put together over processes, and said in one line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from grpo_hf.training.throughput import Throughput, matmul_peak, step_line, update_flops
from tests.runs import StopAfter, logs, values
from tests.tiny import tiny_model, tiny_trainer

CPU = torch.device("cpu")


def test_the_peak_is_measured_without_trainers_random_numbers() -> None:
    matmul_peak.cache_clear()
    state = torch.get_rng_state()
    peaks = [matmul_peak(CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(1e8 < peak < 1e15 for peak in peaks)
    assert matmul_peak(CPU, torch.float32) == peaks[0], "once a process"


def test_processes_are_put_together() -> None:
    """Rates and peaks are sums."""
    throughput = Throughput(tiny_model())
    throughput.peak, throughput.flops = 4e12, int(6e12)
    found = throughput.flush(lambda mine: [mine, (1e12, 2e12)], seconds=3.0)
    assert found == {"perf/tflops": 3.0, "perf/peak_tflops": 6.0, "perf/mfu": 0.5}
    assert throughput.flops == 0


def test_nothing_was_trained_on() -> None:
    throughput = Throughput(tiny_model())
    throughput.peak = 1e12
    assert throughput.flush(lambda mine: [mine], seconds=0.0)["perf/mfu"] == 0.0


def test_a_log_line_holds_the_updates_since_the_last(tmp_path: Path) -> None:
    """perf/tflops x time/forward_backward is what the updates cost, whatever was sampled or logged between."""
    trainer = tiny_trainer(tmp_path, max_steps=4, logging_steps=2, num_iterations=2)
    flops: list[int] = []
    count = trainer.recorder.throughput.add
    trainer.recorder.throughput.add = lambda batches: flops.append(count(batches)) or flops[-1]  # type: ignore[method-assign,func-returns-value]
    trainer.train()
    assert len(flops) == 4
    for entry, updates in zip(logs(trainer), (flops[:2], flops[2:]), strict=True):
        found = entry["perf/tflops"] * 1e12 * 2 * entry["time/forward_backward"]
        assert found == pytest.approx(sum(updates))
        assert entry["perf/mfu"] == pytest.approx(entry["perf/tflops"] / entry["perf/peak_tflops"])
    assert trainer.state.total_flos == sum(flops)
    batches = trainer.policy.microbatches(trainer.rollout.updates[0])
    assert flops[-1] == update_flops(trainer.recorder.throughput.cost, batches) > 0


def test_a_resumed_run_counts_its_own_steps_only(tmp_path: Path) -> None:
    """Those before the checkpoint are not in its seconds either."""
    settings = {"max_steps": 4, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    tiny_trainer(tmp_path, callbacks=[StopAfter(3)], **settings).train()
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    stopped, entry = logs(trainer)
    assert stopped["step"] == 3, "a run's last steps are logged, wherever it is stopped"
    (update,) = trainer.rollout.updates
    found = entry["perf/tflops"] * 1e12 * entry["time/forward_backward"]
    assert found == pytest.approx(update_flops(trainer.recorder.throughput.cost, trainer.policy.microbatches(update)))


LOGS = {"time/forward_backward": 0.5, "time/generate": 1.2, "time/other": 0.004, "time/log": 0.3, "reward": 1.0}
PERF = {"perf/tflops": 0.067, "perf/peak_tflops": 0.134, "perf/mfu": 0.5}


def test_the_line_says_where_the_time_went() -> None:
    line = "step 40: 2 s = generate 60 % | forward_backward 25 % | log 15 %"
    assert step_line(40, LOGS, torch.float32) == line
    rest = "; forward_backward at 50% of the matmul peak, 134 GFLOP/s float32"
    assert step_line(40, LOGS | PERF, torch.float32) == line + rest
    large = PERF | {"perf/peak_tflops": 812.3}
    assert step_line(40, LOGS | large, torch.bfloat16).endswith("at 50% of the matmul peak, 812 TFLOP/s bfloat16")


def test_the_line_stands_above_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, since the run is over before the next is due."""
    tiny_trainer(tmp_path, max_steps=3, disable_tqdm=False).train()
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(shown) == 1
    assert shown[0].startswith("step 1: ") and shown[0].endswith(" GFLOP/s float32")
    assert Counter(shown[0])["|"] >= 2


def test_bf16_is_measured_against_a_product_in_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tmp_path, bf16=True, disable_tqdm=False)
    trainer.train()
    assert values(trainer, "perf/peak_tflops") == [matmul_peak(CPU, torch.bfloat16) / 1e12]
    assert "FLOP/s bfloat16" in capsys.readouterr().out
