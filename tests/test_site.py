"""The site: what its navigation names, the mapping of links, and that it builds; and the citation file."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MADE = {"index.md", "reference.md", "boards/index.md", "algorithms/index.md", "CHANGELOG.md", "CONTRIBUTING.md"}
"""Pages that scripts/site_hooks.py adds."""


class _AnyTag(yaml.SafeLoader):
    """Reads mkdocs.yml without mkdocs: tags of values are ignored."""


_AnyTag.add_multi_constructor("", lambda loader, tag, node: None)


def pages_of(nav: Any) -> list[str]:
    """The files that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


def test_the_navigation_names_every_document_once() -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), _AnyTag)["nav"]
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert sorted(pages_of(nav)) == sorted(documents | MADE)
    assert all((ROOT / name).exists() for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))


def test_the_citation_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings", "latex2mathml"))):
        pytest.skip("pip install -e '.[site]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_builds_without_a_warning(site: Path) -> None:
    for name in ("index.html", "faq.html", "records.html", "reference.html", "boards/index.html"):
        assert (site / name).exists(), name
    assert 'id="harness.interface.StepContext"' in (site / "reference.html").read_text()


def test_formulas_need_no_script(site: Path) -> None:
    page = (site / "statistics.html").read_text()
    numbers = re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "statistics.md").read_text())
    assert page.count("<math") > len(numbers) and "arithmatex" not in page
    assert all(f"({number})</span><math" in page for number in numbers)


def test_links_lead_to_pages_or_to_nothing(site: Path) -> None:
    front = (site / "index.html").read_text()
    assert 'href="new_algorithm.html"' in front and 'src="board.png"' in front
    assert 'href="boards/external/LEADERBOARD.html"' in front
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="(?!https?:|#|mailto:|data:)([^"#?]+)', page.read_text()):
            assert (page.parent / link).exists() or link.startswith("/"), f"{page.relative_to(site)}: {link}"
