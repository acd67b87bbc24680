"""Writing the pages: index.html, a page and the curves of each submission, and their assets.

The curves are scripts apart from the pages, which load those that they draw. A page that is opened from disk may load a
script beside it, and no other file.

Everything on the pages that names something (submissions, workloads, hyperparameters, notes) comes from records, which
anyone can write. So it is text wherever it is shown: templates escape it, the data for the plots is escaped for its
place in the page, and file names are made from a number and the harmless letters of a name.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from harness.board.page import display, figures
from harness.files import write_atomically

PACKAGE = "harness.board.page"
ASSETS = ("page.css", "theme.js", "tables.js", "plots.js")
# Control characters but tab and newline; and lone surrogates, which no file in UTF-8 can hold.
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write_page(board: dict[str, Any], folder: Path) -> None:
    """Write `index.html`, `submission-<n>-<slug>.html` and `curves-<n>.js` for the n-th submission (from 1) and their
    assets.

    board: plain data as harness/board/page_data.py makes it, submissions in rank order; a number that is None, NaN or
    infinite is shown as not known. folder: made where it is absent. Files of the same name are replaced, each in one
    rename, and no other file is touched, so pages of submissions that have left the board stay. Raises KeyError where a
    part of the board is absent, and OSError where a file cannot be written.
    """
    # Before anything else, so that names are the same in the text, in the data and in the file names.
    board = plain(board)
    pages = [file_name(number, submission["name"]) for number, submission in enumerate(board["submissions"], start=1)]
    templates = _templates()
    shared = {"board": board, "pages": pages, "plural": display.plural}
    contents: dict[str, str] = {"plotly.min.js": get_plotlyjs()}
    for asset in ASSETS:
        contents[asset] = (files(PACKAGE) / "static" / asset).read_text(encoding="utf-8")
    for index, (page, curves) in enumerate(zip(pages, figures.curves_of_submissions(board), strict=True)):
        # Numbers alone: no name from a record is in a script that is run.
        contents[f"curves-{index + 1}.js"] = f"pacemarkCurves({index},{embedded(curves)});\n"
        contents[page] = templates.get_template("submission.html").render(
            **shared,
            index=index,
            submission=board["submissions"][index],
            trials=display.trial_table(board["submissions"][index]),
            data=embedded(figures.submission_data(board, index)),
        )
    # Last, so that every page it links to is there when it is opened.
    contents["index.html"] = templates.get_template("index.html").render(
        **shared, table=display.ranking(board), memory=figures.memory(board), data=embedded(figures.board_data(board))
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, content)


def plain(value: Any) -> Any:
    """A copy of JSON-able data that can be shown: no control characters, lone surrogates, non-finite numbers."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return UNSHOWABLE.sub("\ufffd", str(value))


def embedded(data: Any) -> Markup:
    """JSON that can stand inside <script>: no `<`, `>`, `&`, and only ASCII, so no line separators either."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def file_name(number: int, name: str) -> str:
    """The page of the submission at rank `number`; the number makes it unique, so the rest need not be."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    # 48 letters, since file systems limit the length of a name.
    slug = re.sub(r"[^a-z0-9]+", "-", letters)[:48].strip("-")
    return f"submission-{number}-{slug or 'unnamed'}.html"


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(PACKAGE),
        autoescape=True,
        # A part of the board that is absent is an error, and not an empty place on the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(display.FILTERS)
    environment.globals["style_of"] = display.style_of
    return environment
