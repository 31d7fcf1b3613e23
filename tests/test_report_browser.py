"""The page in a real browser, without a window: what its script makes of the data, and of the choices in its address."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from grpo_hf.cli.report import main
from grpo_hf.report import write_report
from tests.written_run import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def seen(page: Path, choice: str = "") -> str:
    """The page's elements after its script has run."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, f"{page.as_uri()}#{choice}"], capture_output=True, text=True, timeout=120, check=True)
    return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)


def groups(text: str) -> list[str]:
    return re.findall(r'<section class="group"><h3>(.*?)</h3>', text)


@in_browser
def test_curves_and_samples(tmp_path: Path) -> None:
    text = seen(write_report(write_run(tmp_path / "run")))
    assert re.findall(r'class="u-title">(.*?)<', text) == ["Reward", "Entropy (nats per token)"]
    assert "8 of 8 groups" in text and "Prompts over steps" in text
    assert groups(text)[0] == "step 4, prompt 0: mean reward 0.375 "
    assert groups(text)[1] == 'step 4, prompt 1: mean reward 0.500 <span class="tag">no signal</span>'
    assert 'dir="auto">prompt &lt;0&gt;</div>' in text
    assert "4 of 8 groups have no signal: in 0 of them all completions earned the most, in 4" in text
    assert "<td>right</td><td>0.438</td><td>scored 87.5 %, no answer 12.5 %</td>" in text


@in_browser
@pytest.mark.parametrize(
    ("choice", "found", "first"),
    [
        ("q=step+3", 2, "step 3, prompt 0"),
        ("q=G1&sort=oldest", 4, "step 1, prompt 1"),
        ("row=0", 4, "step 4, prompt 0"),
        ("from=2&to=3", 4, "step 3, prompt 0"),
        ("low=0.7", 4, "step 4, prompt 0"),
        ("high=0.1", 4, "step 4, prompt 0"),
        ("outcome=no_answer", 4, "step 4, prompt 0"),
        ("outcome=no_answer&row=1", 0, None),
        ("cut=true&sort=best", 8, "step 1, prompt 1"),
    ],
)
def test_what_is_looked_for(tmp_path: Path, choice: str, found: int, first: str | None) -> None:
    text = seen(write_report(write_run(tmp_path / "run")), choice)
    assert f"{found} of 8 groups" in text
    assert groups(text)[0].startswith(first) if first else not groups(text), groups(text)
    opened = re.findall(r'<details open="" class="completion">', text)
    assert opened if first else not opened


@in_browser
def test_two_runs(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=2))
    text = seen(page, "run=b")
    assert "4 of 12 groups" in text and groups(text)[0].startswith("b, step 2")
    assert {"a: reward", "b: reward"} <= set(re.findall(r'class="u-label">(.*?)<', text))


@in_browser
def test_nothing_but_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": math.nan}))
    assert "No metric with a finite value was logged." in seen(write_report(tmp_path))


def test_it_is_written_again_while_the_run_goes_on(tmp_path: Path) -> None:
    """It waits for the first line, and after Ctrl-C the page stays as it is."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "grpo_hf", "report", str(run), "--watch", "0.2"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit to ignore it
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        assert watching.stdout is not None
        time.sleep(1)
        assert watching.poll() is None
        write_run(run)
        assert watching.stdout.readline().strip() == str(run / "report.html")
        assert '<meta http-equiv="refresh" content="0.2">' in (run / "report.html").read_text()
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 9, "reward": 0.9}) + "\n")
        until = time.monotonic() + 60
        while "<dd>9</dd>" not in (run / "report.html").read_text() and time.monotonic() < until:
            time.sleep(0.1)
        assert "<dd>9</dd>" in (run / "report.html").read_text()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 0
        assert "http-equiv" not in (run / "report.html").read_text()
    finally:
        watching.kill()
        watching.communicate()


def test_a_watch_of_no_seconds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--watch", "0"])
    assert "--watch 0 must be above 0 seconds" in capsys.readouterr().err
