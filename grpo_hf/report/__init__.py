"""What a run leaves behind: curves as PNG, and one self-contained page to look through."""

from grpo_hf.report.curves import learning_curves, read_metrics
from grpo_hf.report.page import write_report

__all__ = ["learning_curves", "read_metrics", "write_report"]
