"""`grpo-hf verify`: outcomes, disputes, gold answers and exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_hf.cli import main
from tests.tiny import tiny_trainer

ROWS = [
    {"prompt": "1 + 1", "completion": "#### 2", "answer": "#### 2", "right": 1.0},
    {"prompt": "2 + 2", "completion": "#### 5", "answer": "#### 4", "right": 0.0},
    {"prompt": "3 + 3", "completion": "I do not know", "answer": "#### 6", "right": 0.0},
    {"prompt": "4 + 4", "completion": "#### 8.0", "answer": "#### 8", "right": 1.0},
]


def file_of(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def verify(*arguments: str) -> int:
    return main(["verify", *arguments, "--traceback"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_table_of_outcomes(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "verdicts.jsonl"
    assert verify(file_of(tmp_path, ROWS, name), "--reward", "gsm8k", "--output", str(out)) == 0
    header, line, *_ = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.split(), line.split()[1:], strict=True))
    assert (cells["scored"], cells["no_answer"], cells["error"], cells["mean"]) == ("3", "1", "0", "0.500")
    verdicts = [json.loads(line)["verdicts"]["gsm8k"] for line in out.read_text().splitlines()]
    assert [(v["outcome"], v["score"]) for v in verdicts] == [
        ("scored", 1.0),
        ("scored", 0.0),
        ("no_answer", 0.0),
        ("scored", 1.0),
    ]


def test_verifiers_that_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """gsm8k knows that 8.0 is 8."""
    rows = [row | {"completion": row["completion"].removeprefix("#### ")} for row in ROWS]
    rows = [row | {"completion": "#### " + row["completion"]} for row in rows]
    assert verify(file_of(tmp_path, rows), "--reward", "gsm8k", "--reward", "exact_match") == 0
    shown = capsys.readouterr().out.split("disputed:")[1].split("slowest:")[0]
    assert "row 3: gsm8k 1 in" in shown and "exact_match 0 in" in shown
    assert "row 0" not in shown and "row 1" not in shown


def test_a_contradicted_label_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(file_of(tmp_path, ROWS), "--reward", "gsm8k", "--label", "right") == 0
    wrong = [ROWS[0] | {"right": 0.0}, *ROWS[1:]]
    assert verify(file_of(tmp_path, wrong), "--reward", "gsm8k", "--label", "right") == 1
    assert "row 0: gsm8k 1" in capsys.readouterr().out.split("disputed:")[1]


def test_faults_fail_unless_they_are_let_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import time\n"
        "def picky(completion):\n"
        "    if '5' in completion:\n"
        "        raise RuntimeError('I do not like it')\n"
        "    if 'know' in completion:\n"
        "        time.sleep(60)\n"
        "    return 1.0\n"
    )
    command = (file_of(tmp_path, ROWS), "--reward", f"{source}:picky", "--timeout", "1")
    assert verify(*command) == 1
    out = capsys.readouterr().out
    assert "row 1: picky error (RuntimeError: I do not like it)" in out
    assert "row 2: picky timeout" in out
    assert verify(*command, "--max-fault-share", "0.5") == 0


def test_gold_answers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "?", "answer": answer} for answer in ("#### 2", "no number here", "#### 3")]
    assert verify(file_of(tmp_path, rows), "--reward", "gsm8k", "--gold") == 1
    out = capsys.readouterr().out
    assert out.startswith("row 1, gsm8k: ") and "1 of 3 gold answers cannot be read by gsm8k" in out
    assert verify(file_of(tmp_path, rows[::2]), "--reward", "gsm8k", "--gold") == 0
    assert verify(file_of(tmp_path, rows), "--reward", "sorting", "--gold") == 0
    assert "nothing to check" in capsys.readouterr().out


def test_a_runs_samples_are_judged_by_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "w1", "answer": "w1 w2"}, {"prompt": "w2", "answer": "w3"}]
    tiny_trainer(tmp_path, dataset=rows, num_generations=4, save_rollouts=True).train()
    assert verify(str(tmp_path / "rollouts"), "--reward", "exact_match") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["exact_match", "8"]


def test_bad_commands(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'text', only .*--completion-column NAME"):
        verify(file_of(tmp_path, ROWS), "--reward", "gsm8k", "--completion-column", "text")
    with pytest.raises(ValueError, match=r"there is no file .*none.jsonl"):
        verify(str(tmp_path / "none.jsonl"), "--reward", "gsm8k")
    with pytest.raises(ValueError, match=r"unknown reward 'gsm8'.*nearest: gsm8k"):
        verify(file_of(tmp_path, ROWS), "--reward", "gsm8")
    with pytest.raises(SystemExit):
        verify(file_of(tmp_path, ROWS))
