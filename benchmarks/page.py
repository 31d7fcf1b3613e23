"""A run's page with 100,000 samples: how long it takes to write and to open, and how large it is.

python -m benchmarks.page        # needs Chromium; writes benchmarks/results/page.json
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_hf.report import write_report

SAMPLES, GROUP, STEPS = 100_000, 8, 200
REPEATS = 3
TIMER = "<script>document.body.append('opened in ' + performance.now().toFixed(0) + ' ms')</script></body>"


def write_run(folder: Path) -> None:
    """Completions of 100 words and prompts of 40, each prompt twice in the run."""
    generator = random.Random(0)
    words = [f"word{number}" for number in range(2000)]
    (folder / "rollouts").mkdir()
    lines = [
        {"step": step, "reward": step / STEPS, "entropy": 1 / step, "time/generate": 1.0} for step in range(1, STEPS + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    per_step = SAMPLES // STEPS // GROUP
    for step in range(1, STEPS + 1):
        rows: list[dict[str, Any]] = []
        for group in range(per_step):
            prompt = " ".join(generator.choices(words, k=40))
            place = {"step": step, "rollout": step - 1, "process": 0, "group": group}
            for _ in range(GROUP):
                reward = generator.random()
                rows.append(
                    place
                    | {"row": (step % (STEPS // 2)) * per_step + group, "columns": json.dumps({"answer": group})}
                    | {"prompt": prompt, "completion": " ".join(generator.choices(words, k=100)), "length": 100}
                    | {"truncated": reward < 0.1, "rewards/right": reward, "outcomes/right": "scored"}
                    | {"reward": reward, "advantage": reward - 0.5, "ids": list(range(100)), "logprobs": [-0.5] * 100}
                )
        pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts" / f"{step:06d}.parquet")


def main() -> None:
    """Measure, print and save."""
    browser = shutil.which("chromium") or "google-chrome"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_run(folder)
        written, opened = [], []
        for _ in range(REPEATS):
            start = time.perf_counter()
            page = write_report(folder)
            written.append(time.perf_counter() - start)
            page.write_text(page.read_text().replace("</body>", TIMER))
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
            text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
            opened.append(int(re.findall(r"opened in (\d+) ms", text)[-1]) / 1000)
        shown = re.findall(r"The page holds (\d+) of (\d+) completions", text)
        result = {
            "samples": SAMPLES,
            "shown": int(shown[0][0]) if shown else SAMPLES,
            "megabytes": round(page.stat().st_size / 1e6, 1),
            "seconds_to_write": round(median(written), 2),
            "seconds_to_open": round(median(opened), 2),
        }
    print(json.dumps(result, indent=1))
    Path("benchmarks/results/page.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
