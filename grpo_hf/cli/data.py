"""Rows from a file or a dataset's name."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""What datasets calls each kind of file."""


def load_table(name: str, split: str) -> Dataset:
    """The rows of a file, or of a dataset's split."""
    path = Path(name)
    if path.suffix not in FORMATS:
        return load_dataset(name, split=split)
    if not path.is_file():
        raise ValueError(f"there is no file {name}")
    if not path.stat().st_size:
        raise ValueError(f"{name} is empty; one row at least is needed")
    return load_dataset(FORMATS[path.suffix], data_files={"train": name}, split="train")
