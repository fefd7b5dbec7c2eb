"""The site, as it is built: every link leads somewhere, nothing is loaded from elsewhere, every page can be reached."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("mkdocs", reason="the site wants the extra: pip install -e '.[docs]'")

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(r"(?:https?:)?//")


class Tags(HTMLParser):
    """The ids of a page, its links, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads = set[str](), list[str](), list[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source", "video") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; built strictly, so that a link or an anchor that MkDocs misses is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return out


def test_every_link_of_the_site_leads_to_a_page_and_a_place_on_it(site: Path) -> None:
    pages = {page: Tags(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 20
    wrong, count = [], 0
    for page, tags in pages.items():
        for link in [*tags.links, *tags.loads]:
            if ":" in link.partition("/")[0]:
                continue
            path, _, place = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            count += 1
            if not target.is_file() or (place and target in pages and place not in pages[target].ids | {"__skip"}):
                wrong.append((page.name, link))
    assert wrong == []
    assert count > 1000


def test_every_page_can_be_reached_from_the_first(site: Path) -> None:
    first, every = site / "index.html", {page for page in site.rglob("*.html") if page.name != "404.html"}
    seen, waiting = {first}, [first]
    while waiting:
        page = waiting.pop()
        found = {(page.parent / unquote(link).partition("#")[0]).resolve() for link in Tags(page).links if ".html" in link}
        waiting += [one for one in found & every if one not in seen]
        seen |= found & every
    assert every - seen == set()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = {one for page in site.rglob("*.html") for one in Tags(page).loads}
    assert loaded
    assert [one for one in loaded if ELSEWHERE.match(one)] == []
    styles = [*site.rglob("*.css")]
    assert styles
    inline = [
        text for page in site.rglob("*.html") for text in re.findall(r"<style>(.*?)</style>", page.read_text(), re.DOTALL)
    ]
    for text in [*(style.read_text(encoding="utf-8") for style in styles), *inline]:
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", text) == []
    whole = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    assert not re.search(r"fonts\.g(?:oogleapis|static)|google-analytics|googletagmanager|gtag\(", whole)


def test_what_is_found_by_the_search_is_the_documentation_and_not_the_notebooks(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "guide/memory.html" in index
    assert '"lab/quality.html' not in index


def test_the_api_page_shows_the_fields_of_the_records(site: Path) -> None:
    tags = Tags(site / "reference" / "api.html")
    assert {"recap_cli.load", "recap_cli.api.RoundPlan", "recap_cli.api.Method", "recap_cli.api.Criterion"} <= tags.ids
