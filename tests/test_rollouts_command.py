"""Samples in the terminal, with the keys that a user presses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Static

from grpo_hf.cli.rollouts import main
from grpo_hf.report.browser import Browser, in_order, tags_of
from tests.written_run import write_run


def column(app: Browser, name: int) -> list[str]:
    table = app.query_one(DataTable)
    return [str(table.get_row_at(i)[name]) for i in range(table.row_count)]


def read(app: Browser) -> str:
    return str(app.query_one(Static).render())


def test_browse_sort_and_search(tmp_path: Path) -> None:
    async def use() -> None:
        app = Browser(write_run(tmp_path / "run"))
        async with app.run_test(size=(160, 40)) as pilot:
            await pilot.pause()
            assert column(app, 0) == ["4", "4", "3", "3", "2", "2", "1", "1"]
            assert column(app, 2)[:2] == ["0.375", "0.5"] and column(app, 6)[:2] == [
                "cut off, no answer",
                "no signal, cut off",
            ]
            assert read(app).startswith(
                "user\nprompt <0>\ngold: g0\n\nreward 0.75, advantage 0 (right 0.75 scored; 8 tokens, cut off)"
            )
            await pilot.press("down")
            await pilot.pause()
            assert read(app).startswith("user\nprompt <1>")
            await pilot.press("s", "s")
            assert column(app, 2)[:4] == ["0.5"] * 4 and app.order == "best"
            await pilot.press("slash", *"STEP 3", "enter")
            await pilot.pause()
            assert column(app, 0) == ["3", "3"] and app.sub_title == "2 of 8 groups, best"
            await pilot.press("slash", *"zzz", "enter")
            await pilot.pause()
            assert column(app, 0) == [] and read(app) == "nothing is found"

    asyncio.run(use())


def test_a_run_without_samples_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no samples"):
        main([str(tmp_path)])


def test_groups_without_a_reward_come_last() -> None:
    def group(*rewards: float | None) -> dict[str, Any]:
        items = [{"reward": reward, "length": 3, "cut_off": False, "scores": {}} for reward in rewards]
        return {"step": 1, "items": items}

    groups = [group(None, None), group(-1.0, -2.0), group(0.5, None)]
    assert in_order(groups, "best") == [groups[2], groups[1], groups[0]]
    assert in_order(groups, "worst") == [groups[1], groups[2], groups[0]]
    assert [tags_of(item) for item in groups] == [["no signal"], [], ["no signal"]]
