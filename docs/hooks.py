"""mkdocs: pages from files above docs/, and those that pages link to there, which the site takes along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
_LINK = re.compile(r"\]\(((?!https://|#)[^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add those pages, and every file that a page links to outside of docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text()
        files.append(File.generated(config, page, content=_LINK.sub(lambda link: _from(ROOT, link), text)))
    for page in [*map(ROOT.joinpath, PAGES), *(ROOT / "docs").glob("*.md")]:
        for path, _ in _LINK.findall(page.read_text()):
            target = (page.parent / path).resolve()
            name = _place(target)
            if name.startswith("files/") and target.is_file() and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links that lead out of docs/ lead to what was taken along."""
    return _LINK.sub(lambda link: _from(ROOT / "docs", link) if link[1].startswith("../") else link[0], markdown)


def _from(folder: Path, link: re.Match[str]) -> str:
    return f"]({_place((folder / link[1]).resolve())}{link[2] or ''})"


def _place(target: Path) -> str:
    """Where the site has a file of the repository."""
    name = target.relative_to(ROOT)
    if name.parts[0] == "docs":
        return str(Path(*name.parts[1:]))
    return PAGES.get(str(name), f"files/{name}")
