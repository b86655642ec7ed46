"""The documentation: links and anchors lead somewhere, named code exists, and the site builds."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(rf"{BLOCK.pattern}|`[^`\n]*`", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
NAMED = re.compile(r"`(?:selftaught/)?([\w/]+\.py):(\w+)`")


def text_of(path: Path) -> str:
    """A page with the files that it includes."""
    text = path.read_text(encoding="utf-8")
    return INCLUDED.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), text)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as both GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", one).strip().lower().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_relative_links_lead_to_files_and_headings(page: str):
    path = ROOT / page
    for target in LINK.findall(CODE.sub("", text_of(path))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES)
def test_pages_link_only_to_what_the_site_has(page: str):
    for target in LINK.findall(CODE.sub("", text_of(ROOT / page))):
        if not target.startswith(("http", "mailto", "#")):
            there = (ROOT / page).parent / target.partition("#")[0]
            assert there.resolve().is_relative_to(DOCS), target


def test_the_navigation_lists_every_page_once():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def listed(entry):
        if isinstance(entry, str):
            return [entry]
        inside = entry.values() if isinstance(entry, dict) else entry
        return [page for one in inside for page in listed(one)]

    assert sorted(f"docs/{page}" for page in listed(settings["nav"])) == PAGES


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/methods/")])
def test_functions_named_with_their_file_exist(page: str):
    for file, name in NAMED.findall(text_of(ROOT / page)):
        source = (ROOT / "selftaught" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), f"{file}:{name}"


def test_pictures_are_small():
    for picture in [*DOCS.rglob("*.png"), *DOCS.rglob("*.svg")]:
        assert picture.stat().st_size <= 300_000, picture


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_warnings(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "api" / "training" / "index.html").is_file()
