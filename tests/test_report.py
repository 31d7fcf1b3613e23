"""The report from real files: what is read, what is left out, and what stands on the page."""

import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_hf.report import learning_curves, read_metrics, write_report
from grpo_hf.report.curves import curve, held_out_keys, run_panels
from grpo_hf.report.page import headline, pick_samples, read_samples

PNG = b"\x89PNG\r\n\x1a\n"
BEST = "1 < 2 & 2 < 3\n\n  done"


def write_metrics(run_dir, *lines):
    run_dir.mkdir(exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(text)
    return run_dir / "metrics.jsonl"


def row(reward, completion, *, rollout=0, prompt="sort: 3 1 2", **more):
    fixed = {"step": rollout + 1, "rollout": rollout, "process": 0, "prompt": prompt, "completion": completion}
    scores = {"rewards/sorting": reward, "rewards/format": math.nan, "reward": reward, "advantage": reward - 0.5}
    return fixed | {"length": 7, "truncated": False} | scores | more


def write_rollouts(run_dir, *files):
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    for i, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows), run_dir / "rollouts" / f"{i:06d}.parquet")


@pytest.fixture
def run_dir(tmp_path):
    train = [
        {"step": step, "reward": reward, "frac_reward_zero_std": None, "entropy": math.nan}
        | {"tokens/forwarded": 500, "tokens/padded_equivalent": 1400, "time/generate": 40, "time/other": 2.5}
        for step, reward in ((1, 0.25), (2, 0.5), (3, 0.875))
    ]
    evals = [{"step": 0, "eval_reward": 0.2}, {"step": 3, "eval_reward": 0.9, "eval_runtime": 4.0}]
    run = tmp_path / "run"
    write_metrics(run, evals[0], *train, evals[1])
    rewards = [0.0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8]
    last = [row(reward, f"answer {reward}", rollout=2) for reward in rewards] + [row(1.0, BEST, rollout=2)]
    write_rollouts(run, [row(0.3, "at the start"), row(0.0, "nothing")], last)
    return run


def test_page_shows_the_headline_numbers(run_dir):
    page = write_report(run_dir, title="sorting <6>", summary={"model": "tiny & random"}).read_text()
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert tiles == {
        "reward": "0.250 → 0.875",
        "held-out reward": "0.200 → 0.900",
        "steps": "3",
        "time in steps": "2 min 08 s",  # 3 x 42.5 = 127.5 s
        "completions": "11",
        "tokens forwarded": "1,500",
        "tokens if padded": "2.80 times",
    }
    assert "<h1>sorting &lt;6&gt;</h1>" in page
    assert "<th>model</th><td>tiny &amp; random</td>" in page


def test_page_stands_alone_and_comes_in_order(run_dir):
    page = write_report(run_dir)
    text = page.read_text()
    assert page == run_dir / "report.html"
    assert (run_dir / "curves.png").read_bytes().startswith(PNG)
    assert set(re.findall(r'(?:src|srcset|href)="([^"]{22})', text)) == {"data:image/png;base64,"}
    assert "<script" not in text and "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert re.findall(r'<img alt="(.*?)"', text) == [
        "Reward",
        "Held-out reward",
        "Where the time of a step went (seconds)",
    ]
    order = [text.index(part) for part in ("<h1>run</h1>", "<h2>Curves", "<h2>Samples", "Best", "Worst", ">Typical<")]
    assert order == sorted(order)


def test_page_shows_the_best_sample_escaped_with_its_lines(run_dir):
    page = write_report(run_dir).read_text()
    best, worst = page[page.index("<h3>Best") :].split("<h3>Worst")
    assert best.count("<article>") == 3
    first = best[: best.index("</article>")]
    assert "1 &lt; 2 &amp; 2 &lt; 3\n\n  done</div>" in first
    assert BEST not in page
    assert ".text { white-space: pre-wrap" in page
    facts = dict(re.findall(r"<span>(.*?) <b>(.*?)</b></span>", first))
    assert facts == {
        "reward": "1.000",
        "advantage": "+0.500",
        "step": "3",
        "length": "7 tokens",
        "sorting": "1.000",
        "format": "n/a",
    }
    assert "answer 0.0<" in worst[: worst.index("</article>")]
    assert "at the start" in page[page.index("first rollout (0)") :]


def test_long_texts_are_cut_with_a_note(tmp_path):
    write_metrics(tmp_path, {"step": 1, "reward": 1.0})
    write_rollouts(tmp_path, [row(1.0, "a" * 1500 + "b" * 900, truncated=True, prompt="p" * 1500)])
    page = write_report(tmp_path).read_text()
    assert ">" + "a" * 1500 + "</div>" in page
    assert page.count("cut here") == 1  # the prompt fits
    assert "cut here: 1,500 of 2,400 characters shown" in page
    assert "7 tokens, cut off" in page


def test_samples_come_from_the_last_rollouts_and_no_row_twice(tmp_path):
    files = [[row(float(i == 1), f"rollout {i}", rollout=i), row(0.5, "same", rollout=i)] for i in range(7)]
    files[6] += [row(0.9, "late", rollout=6), row(math.nan, "unscored", rollout=6)]
    write_rollouts(tmp_path, *files)
    count, samples = read_samples(tmp_path / "rollouts")
    assert count == 16
    shown = [r["completion"] for heading in ("Best", "Worst", "Typical") for r in samples[heading]]
    assert shown[0] == "late"
    assert len(shown) == len(set(shown)) == 6
    assert not {"rollout 1", "rollout 2", "unscored"} & set(shown)
    assert next(r for rows in samples.values() for r in rows if r["completion"] == "same")["step"] == 7
    assert [r["completion"] for r in samples["Typical, first rollout (0)"]] == ["rollout 0", "same"]


def test_equal_rewards_show_different_prompts():
    rows = [row(1.0, f"{prompt}{i}", prompt=prompt) for prompt in "abc" for i in range(4)]
    assert [r["completion"] for r in pick_samples(rows)["Best"]] == ["a0", "b0", "c0"]


def test_torn_rollout_file_is_skipped(tmp_path):
    write_rollouts(tmp_path, [row(1.0, "whole")])
    (tmp_path / "rollouts" / "000001.parquet").write_bytes(b"PAR1 half of a file")
    count, samples = read_samples(tmp_path / "rollouts")
    assert count == 1
    assert samples["Best"][0]["completion"] == "whole"


def test_last_line_of_a_step_wins_and_torn_lines_are_skipped(tmp_path):
    path = write_metrics(
        tmp_path,
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": 0.2},
        {"step": 2, "eval_reward": 0.7},
        '{"step": 3, "rew',  # killed here; the resumed run writes on, on the same line
        {"step": 2, "reward": 0.25},
        {"step": 3, "reward": 0.3},
        '{"step": 4, "reward": 0.',
    )
    assert read_metrics(path) == [
        {"step": 1, "reward": 0.1},
        {"step": 2, "reward": 0.25, "eval_reward": 0.7},
        {"step": 3, "reward": 0.3},
    ]


@pytest.mark.parametrize("text", ["", "\n\n", '{"step": 1, "rew'])
def test_empty_metrics_name_the_file(tmp_path, text):
    write_metrics(tmp_path, text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no metrics"):
        write_report(tmp_path)


def test_single_step_without_rollouts_or_numbers(tmp_path):
    write_metrics(tmp_path, {"step": 1, "reward": None, "kl": math.nan, "time/generate": 0.5})
    page = write_report(tmp_path).read_text()
    assert re.findall(r'<img alt="(.*?)"', page) == ["Where the time of a step went (seconds)"]
    assert "Samples" not in page
    assert "<dd>0.5 s</dd>" in page
    write_metrics(tmp_path, {"step": 1, "reward": None})
    assert "No metric with a finite value" in write_report(tmp_path).read_text()


def test_totals_count_the_steps_between_logged_lines(tmp_path):
    lines = [{"step": step, "time/generate": 2.0, "tokens/forwarded": 10} for step in (1, 5, 10)]
    metrics = read_metrics(write_metrics(tmp_path, {"step": 0, "eval_reward": 0.5}, *lines, {"step": 10, "eval_x": 1}))
    assert headline(metrics)["time in steps"] == "20.0 s"
    assert headline(metrics)["tokens forwarded"] == "100"


def test_panels_come_reward_first_and_leave_out_what_repeats():
    line = {"step": 1, "reward": 0.5, "rewards/a/mean": 0.5, "rewards/b/mean": 0.1, "rewards/a/std": 0.2}
    line |= {"entropy": 1.0, "clip_ratio/low_mean": 0.0, "completions/mean_length": 9.0, "grad_norm": 3.0}
    evals = {"eval_pass@4": 0.8, "eval_reward": 0.6, "eval_rewards/a/mean": 0.6, "eval_runtime": 3.0}
    evals |= {"eval_completions/mean_length": 8.0, "eval_reward_std": 0.1, "eval_pass@2": math.nan}
    metrics = [line | evals]
    assert held_out_keys(metrics) == ["eval_reward", "eval_pass@4"]  # the lone component is the reward itself
    panels = {panel.title: panel for panel in run_panels(metrics)}
    assert list(panels) == [
        *("Reward", "Held-out reward", "Held-out pass@4", "Reward: a", "Reward: b"),
        *("Completion length (tokens)", "Entropy (nats per token)", "Tokens clipped by the loss (share)"),
    ]
    assert list(panels["Completion length (tokens)"].curves) == ["mean", "held-out mean"]


def test_time_parts_share_their_steps_and_absent_ones_take_none():
    metrics = [{"step": 1, "time/generate": 2.0, "time/other": 0.5}, {"step": 2, "time/other": 0.25, "time/sync": 1.0}]
    [panel] = run_panels(metrics)
    assert {label: c.values for label, c in panel.curves.items()} == {
        "generate": [2.0, 0.0],
        "other": [0.5, 0.25],
        "sync": [0.0, 1.0],
    }


def test_curve_leaves_out_what_is_not_finite():
    metrics = [{"step": 1, "kl": None}, {"step": 2, "kl": 0.5}, {"step": 3}, {"step": 4, "kl": math.inf}]
    assert (curve(metrics, "kl").steps, curve(metrics, "kl").values) == ([2], [0.5])


def test_learning_curves_draws_a_file_and_refuses_nothing(tmp_path):
    curves = {"raw $5": [1.0, 2.0, math.nan], "centered $6": [1.5]}
    path = learning_curves(tmp_path / "toy.png", curves, title="Reward", xlabel="epoch", ylabel="reward")
    assert path == tmp_path / "toy.png"
    assert path.read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match=r"toy\.png: got 1 curves, none with a value"):
        learning_curves(path, {"raw": []}, title="", xlabel="", ylabel="")


def test_outcomes_are_shown_beside_scores_and_as_curves(run_dir):
    lines = [
        {"step": step, "reward": 0.5, "rewards/math/seconds/mean": 0.1, "rewards/math/mean": 0.5, "rewards/format/mean": 1.0}
        | {"rewards/math/outcomes/timeout": share, "rewards/math/outcomes/crash": 0.0}
        | {"eval_rewards/math/outcomes/error": 0.1}
        for step, share in ((1, 0.0), (2, 0.25))
    ]
    panels = {panel.title: panel for panel in run_panels(lines)}
    assert set(panels["Verifier calls without a score (share)"].curves) == {"math: timeout", "held-out math: error"}
    assert not any("seconds" in title or "outcomes" in title for title in panels)
    more = {"outcomes/sorting": "timeout", "outcomes/format": "scored", "extra/parsed": "<3>"}
    write_rollouts(run_dir, [row(0.0, "slow", **more)], [row(0.5, "quick", **{"extra/parsed": 3})])
    page = write_report(run_dir).read_text()
    assert "<span>sorting <b>0.000, timeout</b></span>" in page
    assert "<span>parsed <b>&lt;3&gt;</b></span>" in page
