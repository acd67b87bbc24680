"""What mkdocs does for the site beyond its own: pages from outside docs/, links into the repository, formulas.

Named in mkdocs.yml, and called by mkdocs alone:

- README.md becomes the front page. CHANGELOG.md, CONTRIBUTING.md and the LEADERBOARD.md of each board become pages.
- reference.md is made from `harness.interface` and the bases of update rules.
- What scripts/build_site.py has left in build/boards and build/algorithms is added: a list of the boards and their HTML
  pages, and a page for each algorithm.
- A link to a file of the repository that is no page leads to `repo_url`; without one it becomes plain text.
- Formulas become MathML, so that the site needs no script from another server.
"""

from __future__ import annotations

import html
import posixpath
import re
import xml.etree.ElementTree as etree
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BOARDS = ROOT / "build" / "boards"
"""What scripts/build_site.py makes before it calls mkdocs."""
ALGORITHMS = ROOT / "build" / "algorithms"
"""Likewise."""
NO_ALGORITHMS = "# Each algorithm\n\n`python scripts/build_site.py` builds their pages.\n"
NO_BOARDS = "# Boards\n\n`python scripts/build_site.py` builds their pages.\n"
BASES = ("submissions.rule.Rule", "submissions.rule.Bucket", "submissions.matrices.MatrixRule",
         "submissions.matrices.MatrixSubmission")  # fmt: skip
"""What the reference lists besides `harness.interface`."""


# ---- pages -----------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let links of every page pass through `_Links`."""
    links.repository = (config.repo_url or "").rstrip("/")
    extensions: list[Any] = config.markdown_extensions
    extensions.append(links)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    links.pages = {f"docs/{file.src_uri}": file.src_uri for file in files}
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        _add(files, config, "index.md" if name == "README.md" else name, ROOT / name)
    for board in list_boards():
        _add(files, config, f"boards/{board.parent.name}/LEADERBOARD.md", board / "LEADERBOARD.md")
    files.append(File.generated(config, "reference.md", content=_reference()))
    pages = sorted(ALGORITHMS.glob("*.md"))
    if not pages:
        files.append(File.generated(config, "algorithms/index.md", content=NO_ALGORITHMS))
    for path in pages:
        _add(files, config, f"algorithms/{path.name}", path)
    made = [path for path in sorted(BOARDS.rglob("*")) if path.is_file()]
    if not made:
        files.append(File.generated(config, "boards/index.md", content=NO_BOARDS))
    for path in made:
        _add(files, config, f"boards/{path.relative_to(BOARDS).as_posix()}", path)
    return files


def list_boards() -> list[Path]:
    """The folders of the committed boards."""
    return sorted(path.parent for path in ROOT.glob("results/*/leaderboard/LEADERBOARD.md"))


def _add(files: Files, config: MkDocsConfig, name: str, path: Path) -> None:
    files.append(File.generated(config, name, abs_src_path=str(path)))
    links.pages[path.relative_to(ROOT).as_posix()] = name


def _reference() -> str:
    import harness.interface

    results = ("load_records", "load_curves", "score", "list_submissions")
    parts = [
        "# Reference",
        "The public names; all else is internal. In a repository of your own, import them from `pacemark`.",
        "## For readers of results",
        *(f"::: pacemark.results.{name}" for name in results),
        "## For authors",
        "What authors of submissions and workloads import from `harness.interface`, and the bases of update rules.",
        *(f"::: harness.interface.{name}" for name in harness.interface.__all__),
        *(f"::: {path}" for path in BASES),
    ]
    return "\n\n".join(parts) + "\n"


# ---- links -----------------------------------------------------------------------------------------------------------


class _Links(Extension, Treeprocessor):
    """Maps links between files of the repository to links between pages of the site."""

    repository = ""
    """`repo_url` of mkdocs.yml; empty: none."""
    pages: dict[str, str]
    """The name in the site of each file of the repository that is part of it, by path."""
    source = ""
    """Path in the repository of the page that is rendered."""
    page = ""
    """Its name in the site."""

    def extendMarkdown(self, md: Markdown) -> None:
        """As `markdown.extensions.Extension.extendMarkdown`."""
        self.md = md
        # After the links are parsed (20), before mkdocs checks them (0).
        md.treeprocessors.register(self, "pacemark_links", 5)

    def run(self, root: etree.Element) -> None:
        """As `markdown.treeprocessors.Treeprocessor.run`."""
        for element in root.iter():
            key = {"a": "href", "img": "src"}.get(element.tag)
            if key is not None and key in element.attrib:
                target = self.map(element.attrib[key])
                if target is not None:
                    element.set(key, target)
                else:
                    element.tag = "span"
                    del element.attrib[key]

    def map(self, link: str) -> str | None:
        """The link as the page needs it; None if it leads to a file that the site cannot link to."""
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not parts.path or not self.source:
            return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.source), unquote(parts.path)))
        anchor = f"#{parts.fragment}" if parts.fragment else ""
        if path in self.pages:
            return posixpath.relpath(self.pages[path], posixpath.dirname(self.page) or ".") + anchor
        if not (ROOT / path).exists():
            return link  # mkdocs reports it
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{self.repository}/{kind}/HEAD/{path}{anchor}" if self.repository else None


links = _Links()


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Tell `_Links` which page comes."""
    links.page = page.file.src_uri
    links.source = next((path for path, name in links.pages.items() if name == links.page), "")
    return markdown


# ---- formulas --------------------------------------------------------------------------------------------------------

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_TAG = re.compile(r"\\tag\{(\d+)\}")


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Formulas as MathML."""
    return _FORMULA.sub(lambda match: _mathml(match[2], page.file.src_uri), content)


def _mathml(source: str, page: str) -> str:
    r"""MathML of what arithmatex leaves, `\(...\)` or `\[...\]`; the number of an equation stands beside it."""
    formula = html.unescape(source).strip()
    is_block = formula.startswith(r"\[")
    formula = formula[2:-2]
    number = _TAG.search(formula)
    try:
        math = convert(_TAG.sub("", formula).strip(), display="block" if is_block else "inline")
    except Exception as error:
        raise PluginError(f"{page}: {formula} cannot be converted to MathML ({error})") from error
    if not is_block:
        return math
    label = f'<span style="float: right">({number[1]})</span>' if number else ""
    return f'<div style="overflow-x: auto">{label}{math}</div>'
