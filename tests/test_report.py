"""The report from real files: what is read, what is left out, and what stands on the page."""

import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_hf.report import learning_curves, read_metrics, write_report
from grpo_hf.report.curves import curve, held_out_keys, run_panels
from grpo_hf.report.page import headline
from grpo_hf.report.samples import SHOWN_CHARACTERS, decoder_of, read_samples
from tests.tiny import tiny_tokenizer

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
    page = write_report(run_dir.rename(run_dir.with_name("sorting <6>"))).read_text()
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
    assert "<details" not in page  # nothing is known of how it was started


def test_page_shows_what_runs_were_started_with(run_dir, tmp_path):
    """Each command; and the settings of the last, with marks where runs differ. A line half written is none."""
    starts = [
        {"step": step, "time": f"2026-01-0{step + 1}T00:00:00+00:00", "command": f"python train.py --seed {seed}"}
        | {"settings": {"seed": seed, "lora": {"r": 4}, "system_prompt": "<think>"}, "versions": {"torch": "2.13"}}
        for step, seed in ((0, 1), (3, 2))
    ]
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts) + '{"step": 4, "ti')
    page = write_report(run_dir).read_text()
    for seed in (1, 2):
        assert f"python train.py --seed {seed}<" in page
    assert "<tr><th>seed</th><td>2</td></tr>" in page and "<tr><th>torch</th><td>2.13</td></tr>" in page
    assert "<td>{&quot;r&quot;: 4}</td>" in page and "<td>&lt;think&gt;</td>" in page
    other = tmp_path / "other"
    write_metrics(other, {"step": 1, "reward": 0.5})
    (other / "starts.jsonl").write_text(json.dumps(starts[0]) + "\n")
    both = write_report(run_dir, other).read_text()
    assert '<tr class="differs"><th>seed</th><td>2</td><td>1</td></tr>' in both
    assert "<tr><th>torch</th><td>2.13</td><td>2.13</td></tr>" in both


def shown(page):
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_page_stands_alone(run_dir):
    page = write_report(run_dir)
    assert page == run_dir / "report.html"
    assert (run_dir / "curves.png").read_bytes().startswith(PNG)
    assert not re.search(r"\b(src|srcset|href|import)=", page.read_text())
    assert [panel["title"] for panel in shown(page)["panels"]] == [
        "Reward",
        "Held-out reward",
        "Where the time of a step went (seconds)",
    ]


def test_page_holds_every_sample_and_no_markup_of_theirs(run_dir):
    write_rollouts(run_dir, [row(0.0, "</script><b>", rollout=0)])
    page = write_report(run_dir)
    assert "</script><b>" not in page.read_text()
    assert [item["said"] for item in shown(page)["groups"][0]["items"]] == [[["assistant", "</script><b>"]]]


def test_a_group_has_its_completions_by_reward(run_dir):
    first, last = shown(write_report(run_dir))["groups"]
    assert [first["step"], last["step"]] == [1, 3] and last["prompt"] == [["user", "sort: 3 1 2"]]
    assert [item["reward"] for item in last["items"]] == [1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2, 0.1, 0.0]
    assert last["items"][0] == {
        "said": [["assistant", BEST]],
        "reward": 1.0,
        "scores": {"sorting": [1.0, "scored"], "format": [None, "scored"]},
        "logged": {},
        "advantage": 0.5,
        "length": 7,
        "cut_off": False,
        "turns": 0,
    }


def test_what_has_no_reward_comes_last(tmp_path):
    write_rollouts(tmp_path, [row(reward, str(reward)) for reward in (-2.0, math.nan, -1.0)])
    (group,) = read_samples(tmp_path / "rollouts", budget=10**6).groups
    assert [item["reward"] for item in group["items"]] == [-1.0, -2.0, None]


def test_prompts_of_one_rollout_are_groups_of_their_own(tmp_path):
    rows = [
        row(float(i), f"{i} of {g}", group=g, columns=json.dumps({"numbers": [g]}), row=40 + g)
        for g in (0, 1)
        for i in (0, 1)
    ]
    write_rollouts(tmp_path, rows)
    samples = read_samples(tmp_path / "rollouts", budget=10**6)
    assert [(group["row"], group["columns"]) for group in samples.groups] == [
        (40, {"numbers": "[0]"}),
        (41, {"numbers": "[1]"}),
    ]
    assert samples.history == [[1, 40, 0.5], [1, 41, 0.5]]


def test_chats_are_conversations(tmp_path):
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    call = {"name": "look", "arguments": {"at": "x"}, "outcome": "timeout", "seconds": 1.5}
    said = [
        {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": "late"},
        {"role": "assistant", "content": "No."},
    ]
    turns = [{"num_tokens": 9, "seconds": 0.25, "calls": [call]}, {"num_tokens": 2, "seconds": 0.5, "calls": []}]
    chat = {"messages": json.dumps([*asked, *said]), "turns": json.dumps(turns)}
    write_rollouts(tmp_path, [row(1.0, "I look.No.", prompt=repr(asked), **chat)])
    (group,) = read_samples(tmp_path / "rollouts", budget=10**6).groups
    assert group["prompt"] == [("system", "Be brief."), ("user", "hi")]
    (item,) = group["items"]
    assert item["turns"] == 2
    assert item["said"] == [
        ("assistant, 9 tokens, 0.25 s", 'I look.\nlook("at": "x")'),
        ("look: timeout, 1.50 s", "late"),
        ("assistant, 2 tokens, 0.50 s", "No."),
    ]


def test_long_texts_are_cut_with_a_note(tmp_path):
    write_rollouts(tmp_path, [row(1.0, "a" * SHOWN_CHARACTERS + "b", prompt="p" * SHOWN_CHARACTERS)])
    (group,) = read_samples(tmp_path / "rollouts", budget=10**6).groups
    assert group["prompt"][0][1] == "p" * SHOWN_CHARACTERS
    assert group["items"][0]["said"][0][1] == "a" * SHOWN_CHARACTERS + "\n[cut here: 4,000 of 4,001 characters shown]"


def test_many_samples_are_thinned_evenly(tmp_path):
    """As many rollouts as the budget has room for, the last and the first among them; numbers are of all."""
    write_rollouts(tmp_path, *[[row(0.5, "x" * 100, rollout=i, group=0, row=0)] for i in range(9)])
    one = len(json.dumps(read_samples(tmp_path / "rollouts", budget=1).groups))
    samples = read_samples(tmp_path / "rollouts", budget=4 * one)
    assert [group["step"] for group in samples.groups] == [1, 3, 5, 9]
    assert samples.completions == 9 and len(samples.history) == 9
    assert len(read_samples(tmp_path / "rollouts", budget=10**6).groups) == 9


def test_tokens_of_the_last_and_the_first_rollout(tmp_path):
    """By the tokenizer that the run has saved; a tool's tokens were not sampled."""
    tiny_tokenizer(["even", "odd"]).save_pretrained(tmp_path / "checkpoint-1")
    ids = tiny_tokenizer(["even", "odd"])("even odd even")["input_ids"]
    tokens = {"ids": ids, "is_sampled": [True, False, True], "logprobs": [-0.123, math.nan]}
    write_rollouts(tmp_path, *[[row(0.5, "even odd even", rollout=i, **tokens)] for i in range(3)])
    decode = decoder_of(tmp_path)
    first, middle, last = read_samples(tmp_path / "rollouts", budget=10**6, decode=decode).groups
    assert first["items"][0]["tokens"] == [["even", -0.12], ["odd", None], ["even", None]]
    assert "tokens" in last["items"][0] and "tokens" not in middle["items"][0]
    assert decoder_of(tmp_path / "rollouts") is None


def test_runs_side_by_side(run_dir, tmp_path):
    other = tmp_path / "other"
    write_metrics(other, {"step": 2, "reward": 0.1}, {"step": 4, "reward": 0.2, "entropy": 1.0})
    page = write_report(run_dir, other)
    data = shown(page)
    assert page == run_dir / "compare.html" and data["runs"] == ["run", "other"]
    assert not (run_dir / "report.html").exists() and "<h2>other</h2>" in page.read_text()
    reward = data["panels"][0]
    assert reward["steps"] == [1, 2, 3, 4]
    assert {s["label"]: s["values"] for s in reward["series"]} == {
        "run: reward": [0.25, 0.5, 0.875, None],
        "other: reward": [None, 0.1, None, 0.2],
    }
    assert {group["run"] for group in data["groups"]} == {0}


def test_torn_rollout_file_is_skipped(tmp_path):
    write_rollouts(tmp_path, [row(1.0, "whole")])
    (tmp_path / "rollouts" / "000001.parquet").write_bytes(b"PAR1 half of a file")
    samples = read_samples(tmp_path / "rollouts", budget=10**6)
    assert samples.completions == 1
    assert samples.groups[0]["items"][0]["said"] == [("assistant", "whole")]


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
    page = write_report(tmp_path)
    assert [panel["title"] for panel in shown(page)["panels"]] == ["Where the time of a step went (seconds)"]
    assert shown(page)["groups"] == []
    assert "<dd>0.5 s</dd>" in page.read_text()
    write_metrics(tmp_path, {"step": 1, "reward": None})
    assert shown(write_report(tmp_path))["panels"] == []


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
    write_rollouts(run_dir, [row(0.0, "slow", **more)], [row(0.5, "quick", rollout=1, **{"extra/parsed": 3})])
    slow, quick = (group["items"][0] for group in shown(write_report(run_dir))["groups"])
    assert slow["scores"] == {"sorting": [0.0, "timeout"], "format": [None, "scored"]}
    assert (slow["logged"], quick["logged"]) == ({"parsed": "<3>"}, {"parsed": "3"})


def test_tools_have_a_panel_of_their_own():
    line = {"step": 1, "reward": 0.5, "tools/look/outcomes/ok": 0.9, "tools/look/outcomes/timeout": 0.1}
    panels = {panel.title: panel for panel in run_panels([line])}
    assert set(panels["Tool calls by how they ended (share)"].curves) == {"look: ok", "look: timeout"}
    assert "Verifier calls without a score (share)" not in panels
