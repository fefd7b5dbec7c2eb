"""Give the site the pages that stand outside of docs/, and make links from file to file lead from page to page.

A hook of MkDocs, named in mkdocs.yml. Links in pages are written as the repository needs them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "benchmarks/README.md": "lab/README.md",
    "benchmarks/pages/quality.md": "lab/quality.md",
    "benchmarks/pages/memory.md": "lab/memory.md",
    "benchmarks/pages/segmentation.md": "lab/segmentation.md",
    "benchmarks/pages/memory-methods.svg": "lab/memory-methods.svg",
    "benchmarks/pages/benchmarks.md": "lab/benchmarks.md",
    "CONTRIBUTING.md": "project/CONTRIBUTING.md",
    "CHANGELOG.md": "project/CHANGELOG.md",
    "LICENSE": "project/LICENSE",
    "README.md": "index.md",  # its place on the site is the home page
}
PAGES = {source: page for source, page in OUTSIDE.items() if page != "index.md"}
NOTEBOOKS = "lab/"
CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
CODE = re.compile(r"(?<=<code>)[^<]*")
LINK = re.compile(r"(?<=\]\()([^)\s#]+)((?:#[^)\s]*)?(?=\)))")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of OUTSIDE to those of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages; leave lab notebooks out of the search."""
    uri = page.file.src_uri
    if uri.startswith(NOTEBOOKS):
        page.meta["search"] = {"exclude": True}
    return LINK.sub(lambda match: _target(uri, match[1]) + match[2], markdown)


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    """Say where a table's cell may break: not between a number and its ± or unit, and code only after a dot, _ or =."""

    def broken(cell: re.Match[str]) -> str:
        whole = re.sub(r"(?<=\d) (?=%|MB\b|±)|(?<=±) ", "\u00a0", cell[0])
        return CODE.sub(lambda code: re.sub(r"(?<=[._=/])(?=\w)(?!py\b)", "<wbr>", code[0]), whole)

    return CELL.sub(broken, html)


def _target(uri: str, link: str) -> str:
    """Return `link`, written in the page `uri`, as a link on the site; what is no file of the repository stays as it is."""
    if ":" in link:
        return link
    source = next((source for source, page in PAGES.items() if page == uri), f"docs/{uri}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    place = OUTSIDE.get(target, target.removeprefix("docs/"))
    return posixpath.relpath(place, posixpath.dirname(uri) or ".")
