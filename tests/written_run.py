"""A run's folder as training leaves it, for the tests of what shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write_run(folder: Path, *, steps: int = 4) -> Path:
    """Two prompts a step, with four completions each; the second prompt's all earn the same."""
    (folder / "rollouts").mkdir(parents=True)
    for step in range(1, steps + 1):
        rows: list[dict[str, Any]] = []
        for prompt in (0, 1):
            for sample in range(4):
                reward = sample / 4 if prompt == 0 else 0.5
                rows.append(
                    {"step": step, "rollout": step - 1, "process": 0, "row": prompt, "group": prompt}
                    | {"prompt": f"prompt <{prompt}>", "columns": json.dumps({"gold": f"g{prompt}"})}
                    | {"completion": f"answer {sample} of step {step}", "length": 5 + sample, "truncated": sample == 3}
                    | {"rewards/right": reward, "reward": reward, "advantage": 0.0}
                    | {"outcomes/right": "no_answer" if sample == 0 and prompt == 0 else "scored"}
                )
        pq.write_table(pa.Table.from_pylist(rows), folder / "rollouts" / f"{step}.parquet")
    lines = [{"step": step, "reward": step / 10, "entropy": 1.0} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
