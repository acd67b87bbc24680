"""The leaderboard's pages: what they show, and that names from records stay text; in a real browser if there is one."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness.board.page.figures import memory
from harness.board.page.site import display, file_name, plain, write_page
from tests.processes import wait_until

STUDIES = (0, 1, 2)


def make_board(
    names: tuple[str, ...] = ("muon", "nadamw", "adamw", "sgd", "lion"), workloads: int = 3
) -> dict[str, Any]:
    """A board as scripts/leaderboard.py makes it: every submission a bit slower than the one before it, the last two
    with misses. Any number of submissions on any number of workloads, three studies each."""
    known = [
        {"name": "gpt2", "metric": "loss", "direction": "min", "target": 1.4048, "held_out": False},
        {"name": "resnet", "metric": "accuracy", "direction": "max", "target": 0.9, "held_out": False},
        {"name": "vit_gelu", "metric": "accuracy", "direction": "max", "target": 0.86, "held_out": True},
    ]
    chosen = [{**known[i % 3], "name": known[i % 3]["name"] + (f"_{i}" if i > 2 else "")} for i in range(workloads)]
    taus = [1 + 3 * i / 99 for i in range(100)]
    submissions, curves = [], []
    for rank, name in enumerate(names):
        slower = 1 + 0.17 * rank
        times, trials = {}, []
        for w, workload in enumerate(chosen):
            missed = len(names) > 2 and rank >= len(names) - 2 and w == (len(names) - rank) % max(workloads, 1)
            seconds = None if missed else (41.0 + 9 * w) * slower
            steps = None if missed else int(820 * slower)
            status = "exhausted" if missed else "reached"
            times[workload["name"]] = {
                "seconds": seconds,
                "low": seconds and seconds * 0.94,
                "high": seconds and seconds * 1.07,
                "steps": steps,
                "examples": steps and steps * 32,
                "raw_seconds": seconds and seconds * 1.04,
                "status": status,
            }
            for study in STUDIES:
                grid = [20 * i for i in range(81)]
                speed = (0.7 if missed else 2.0) / (820 * slower) * (1 + 0.02 * study)
                share = [math.exp(-1.9 * speed * step) + 0.004 * math.sin(step * (study + 1)) for step in grid]
                start = 5.5 if workload["direction"] == "min" else 0.1
                best = workload["target"] + (-1 if workload["direction"] == "min" else 1) * 0.023 * abs(
                    start - workload["target"]
                )
                curve = {
                    "submission": name,
                    "workload": workload["name"],
                    "study": study,
                    "trial": 1,
                    "seconds": [step * 0.05 * (1 + 0.1 * (rank % 2)) for step in grid],
                    "steps": grid,
                    "values": [best + (start - best) * part for part in share],
                }
                curves.append(curve)
                trials.append(
                    {
                        "study": study,
                        "trial": 1,
                        "workload": workload["name"],
                        "status": status,
                        "seconds": seconds,
                        "steps": steps,
                        "best": curve["values"][-1],
                        "final": curve["values"][-1],
                        "hyperparameters": {"lr": 0.001 * (study + 1), "weight_decay": 0.1, "betas": [0.9, 0.95]},
                        "note": "the machine was disturbed" if study == 2 and rank == 1 else None,
                    }
                )
        score = max(0.0, 1 - 0.13 * rank)
        misses = sum(trial["status"] != "reached" for trial in trials)
        submissions.append(
            {
                "name": name,
                "description": f"{name}, with the recipe of its paper",
                "score": score,
                "score_low": max(0.0, score - 0.06),
                "score_high": min(1.0, score + 0.05),
                "steps_score": max(0.0, score - 0.02),
                "speedup": 1.34 / slower,
                "speedup_low": 1.34 / slower * 0.9,
                "speedup_high": 1.34 / slower * 1.12,
                "speedup_note": "upper bound" if misses else "exact",
                "rank_low": max(1, rank),
                "rank_high": min(len(names), rank + 2),
                "statuses": {"reached": len(trials) - misses, "exhausted": misses, "diverged": int(rank == 4)},
                "peak_memory_bytes": int(2**30 * (2.4 - 0.35 * ((rank * 3) % 5))),
                "state_bytes_per_parameter": (4.7, 8.0, 8.0, 4.0, 4.0)[rank % 5],
                "data_wait_share": 0.004 + 0.01 * rank,
                "disturbed": 3 if rank == 1 else 0,
                "config": {
                    "optimizer": {"name": name, "class_path": "torch.optim.AdamW", "hyperparameters": {"lr": 1e-3}}
                },
                "times": times,
                "profile": [1.0 if tau >= slower else round(0.33 * (rank % 3), 2) for tau in taus],
                "trials": trials,
                "tunability": {
                    "curves": {
                        workload["name"]: {
                            "k": [1, 2, 3],
                            "score": [0.3, 0.5, 0.6],
                            "score_low": [0.1, 0.2, 0.4],
                            "score_high": [0.5, 0.8, 0.9],
                            "reached": [0.5, 0.8, 1.0],
                            "seconds": [None, 20.0, 15.0],
                        }
                        for workload in chosen
                    },
                    "bands": [
                        {
                            "workload": workload["name"],
                            "hyperparameter": "hyperparameters.lr",
                            "low": 1e-3,
                            "high": 1e-1,
                            "reached_low": 5e-3,
                            "reached_high": None,
                            "width": 0.4,
                        }
                        for workload in chosen
                    ],
                },
            }
        )
    return {
        "title": "Pacemark leaderboard",
        "subtitle": "mini, external ruleset, 5 trials per study",
        "mode": "default",
        "baseline": names[2] if len(names) > 2 else None,
        "tau_max": 4.0,
        "method": "Intervals are 95 % t intervals on log time with the variance pooled over submissions and workloads.",
        "detectable": 1.12,
        "notes": ["vit counts for nobody until its target is accepted.", "One record was refused, see below."],
        "commands": [
            "python run.py -m workload=gpt2,resnet,vit optimizer=muon,adamw seed=0,1,2",
            "python scripts/leaderboard.py",
        ],
        "workloads": chosen,
        "submissions": submissions,
        "taus": taus,
        "curves": curves,
        "problems": [{"path": "results/records/mini/x/eval_measurements.csv", "message": "the last line was cut off"}],
    }


# Every way in that we know: markup, handlers, the end of a script block, links, template languages, plot markup, file
# names, spreadsheets, Markdown, letters that turn the text around, ends of lines for JavaScript, no letters at all.
NASTY = (
    "<script>window.__pwned=1</script>",
    '"><img src=x onerror="window.__pwned=1"><svg onload=window.__pwned=1>',
    "</script><script>window.__pwned=1</script><!--",
    '<a href="javascript:window.__pwned=1"><b>bold</b></a> &lt;i&gt; &#60;u&#62; %{x}',
    "{{ 7 * 7 }}{% raw %}${7*7}';alert(1)//",
    "../../../../etc/pacemark \\..\\windows",
    "=HYPERLINK('x')|a|b\n# c",
    "\u202eevil\u2028\u2029\x00\x1b\ud800",
    "日本語 ñ 🙂",
    "long" * 80,
    "-",
)


def nasty_board() -> dict[str, Any]:
    """All words of a board replaced by nasty ones, names of submissions and workloads among them."""
    board = make_board(NASTY)
    renamed = {workload["name"]: NASTY[i] for i, workload in enumerate(board["workloads"])}
    status = dict(zip(("reached", "exhausted", "diverged"), NASTY, strict=False))
    for workload in board["workloads"]:
        workload |= {"name": renamed[workload["name"]], "metric": NASTY[3]}
    for curve in board["curves"]:
        curve["workload"] = renamed[curve["workload"]]
    for submission in board["submissions"]:
        submission["times"] = {renamed[w]: {**t, "status": NASTY[1]} for w, t in submission["times"].items()}
        submission["statuses"] = {status[name]: count for name, count in submission["statuses"].items()}
        submission |= {"description": NASTY[1], "speedup_note": NASTY[2], "config": {n: [n, {n: n}] for n in NASTY}}
        tunability = submission["tunability"]
        tunability["curves"] = {renamed[w]: curve for w, curve in tunability["curves"].items()}
        for band in tunability["bands"]:
            band |= {"workload": renamed[band["workload"]], "hyperparameter": NASTY[0]}
        for trial in submission["trials"]:
            point = {name: f"{name}{trial['study']}" for name in NASTY}
            trial |= {"workload": renamed[trial["workload"]], "status": NASTY[0], "note": NASTY[2]}
            trial |= {"hyperparameters": {**point, NASTY[1] + "!": NASTY[0]}}
    texts = {key: NASTY[i] for i, key in enumerate(("title", "subtitle", "baseline", "method"))}
    problems = [{"path": name, "message": name} for name in NASTY]
    return {**board, **texts, "notes": list(NASTY), "commands": list(NASTY), "problems": problems}


def blank_board() -> dict[str, Any]:
    """A board on which nothing is known that may be unknown, and what is left is infinite or not a number."""
    board = make_board()
    optional = ("subtitle", "baseline", "detectable")
    for submission in board["submissions"]:
        for key in set(submission) - {"name", "statuses", "times", "profile", "trials", "disturbed"}:
            submission[key] = None
        for time in submission["times"].values():
            time |= {key: None for key in time if key != "status"}
        for trial in submission["trials"]:
            trial |= {key: None for key in trial if key not in ("study", "trial", "workload", "status")}
        submission["times"].pop("resnet")
        submission["profile"] = [math.nan] * len(board["taus"])
    for curve in board["curves"]:
        curve["values"] = [math.inf, -math.inf, math.nan, None] * 20
    return {**board, **dict.fromkeys(optional)}


def empty_board() -> dict[str, Any]:
    return {**make_board((), workloads=0), "notes": [], "commands": [], "problems": []}


class Reader(HTMLParser):
    """What a page holds, as a browser parses it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.scripts, self.links, self.handlers, self.data = "", [], [], [], ""
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self._inside = tag
        if tag == "script" and attributes.get("type") != "application/json":
            self.scripts.append(attributes.get("src"))
        if tag == "a":
            self.links.append(attributes["href"])
        self.handlers += [name for name in attributes if name.startswith("on") or name == "style"]
        assert tag not in ("img", "iframe", "i", "u")

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.data += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages")
    for name, board in (
        ("usual", make_board()),
        ("nasty", nasty_board()),
        ("blank", blank_board()),
        ("empty", empty_board()),
        ("alone", make_board(("adamw",), workloads=1)),
        ("large", make_board(tuple(f"optimizer_{i:02d}" for i in range(40)), workloads=14)),
    ):
        write_page(board, path / name)
    return path


def test_a_page_per_submission_and_all_links_lead_somewhere(folder: Path) -> None:
    written = {path.name for path in (folder / "usual").iterdir()}
    assert written == {
        *("index.html", "page.css", "plotly.min.js", "plots.js", "tables.js", "theme.js"),
        *("submission-1-muon.html", "submission-2-nadamw.html", "submission-3-adamw.html", "submission-4-sgd.html"),
        "submission-5-lion.html",
        *(f"curves-{number}.js" for number in range(1, 6)),
    }
    for page in (folder / "usual").glob("*.html"):
        reader = Reader(page.read_text(encoding="utf-8"))
        assert {link for link in reader.links if not link.startswith("#")} <= written
        assert set(reader.scripts) == {"theme.js", "plotly.min.js", "tables.js", "plots.js"} & written


def test_the_page_says_what_the_board_says(folder: Path) -> None:
    text = " ".join(Reader((folder / "usual" / "index.html").read_text(encoding="utf-8")).text.split())
    for words in (
        "mini, external ruleset, 5 trials per study",
        "12 % is the smallest difference in time that these data can tell from chance.",
        "Intervals are 95 % t intervals",
        "vit counts for nobody",
        "1.000 [0.94, 1.00] 1–2 1.34× [1.21, 1.50]",
        "≤ 0.80× [0.72, 0.89]",
        "missed targets the baseline met",
        "9 reached ⚑ 3 disturbed",
        "6 reached 3 exhausted 1 diverged",
        "On it: muon, nadamw, sgd.",
        "1 remark on reading the records",
        "the last line was cut off",
    ):
        assert words in text, words


def test_names_are_text_on_every_page(folder: Path) -> None:
    pages = sorted((folder / "nasty").glob("*.html"))
    assert len(pages) == 1 + len(NASTY)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        reader = Reader(html)
        assert set(reader.scripts) == {"theme.js", "plotly.min.js", "tables.js", "plots.js"}
        assert not reader.handlers
        assert all(re.fullmatch(r"#[a-z]+|index\.html|submission-\d+-[a-z0-9-]+\.html", link) for link in reader.links)
        block = html.split('id="data">')[1].split("</script>")[0]
        assert not re.search("[<>&\u2028\u2029]", block)
        assert json.loads(block) == json.loads(reader.data)
    index = Reader((folder / "nasty" / "index.html").read_text(encoding="utf-8"))
    for name in NASTY:
        assert plain(name) in index.text
    assert [submission["name"] for submission in json.loads(index.data)["submissions"]] == [
        plain(name) for name in NASTY
    ]


def curves_of(folder: Path, number: int) -> list[dict[str, Any]]:
    """The curves of the n-th submission, from 1, as a browser has them: without the short form of equal distances."""
    match = re.fullmatch(r"pacemarkCurves\((\d+),(.*)\);\n", (folder / f"curves-{number}.js").read_text("ascii"))
    assert match is not None and int(match[1]) == number - 1
    curves = json.loads(match[2], parse_constant=lambda constant: pytest.fail(constant))
    for curve in curves:
        for axis in ("seconds", "steps", "values"):
            if isinstance(curve[axis], dict):
                first, by, count = (curve[axis][key] for key in ("first", "by", "count"))
                curve[axis] = [first + by * i for i in range(count)]
    return list(curves)


def test_curves_are_those_of_the_records_to_five_digits(folder: Path) -> None:
    board = make_board()
    places = [workload["name"] for workload in board["workloads"]]
    for number, submission in enumerate(board["submissions"], 1):
        expected = [curve for curve in board["curves"] if curve["submission"] == submission["name"]]
        for shown, curve in zip(curves_of(folder / "usual", number), expected, strict=True):
            assert (places[shown["workload"]], shown["study"]) == (curve["workload"], curve["study"])
            assert shown["steps"] == curve["steps"]
            for axis in ("seconds", "values"):
                assert shown[axis] == pytest.approx(curve[axis], rel=1e-4)


def test_no_name_is_in_a_script_that_is_run(folder: Path) -> None:
    for path in (folder / "nasty").glob("curves-*.js"):
        assert re.fullmatch(r'[\w(){}\[\],:;".\n-]*', path.read_text("ascii"))
        assert not set(re.findall('"([^"]*)"', path.read_text())) - {
            "workload", "study", "trial", "seconds", "steps", "values", "first", "by", "count",
        }  # fmt: skip


def test_a_long_curve_keeps_what_a_screen_shows(tmp_path: Path) -> None:
    """Both ends, a spike, a gap, and the point that met the target."""
    board = make_board(("a",), workloads=1)
    values: list[float | None] = [3 - i / 5000 for i in range(10_000)]
    values[1234], values[4321], values[7000] = 1.4, 9.0, None
    curve = {"steps": list(range(10_000)), "seconds": [0.1 * i for i in range(10_000)], "values": values}
    board["curves"] = [board["curves"][0] | curve]
    write_page(board, tmp_path)
    (shown,) = curves_of(tmp_path, 1)
    assert 200 <= len(shown["values"]) <= 210
    points = dict(zip(shown["steps"], shown["values"], strict=True))
    assert points[0] == 3 and points[9999] == pytest.approx(values[-1], rel=1e-4)
    assert points[1234] == 1.4 and points[4321] == 9 and points[7000] is None
    assert next(step for step, value in points.items() if value is not None and value <= 1.4048) == 1234


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 submissions, each with 45 trials of 80 evaluations."""
    board = make_board(tuple(f"optimizer_{i:03d}" for i in range(300)))
    for curve in list(board["curves"]):
        board["curves"] += [curve | {"trial": trial} for trial in range(2, 6)]
    path = tmp_path_factory.mktemp("huge")
    write_page(board, path)
    return path


def test_the_page_of_300_submissions_is_small(huge: Path) -> None:
    assert (huge / "index.html").stat().st_size < 3e6
    curves = [path.stat().st_size for path in huge.glob("curves-*.js")]
    assert len(curves) == 300 and max(curves) < 100_000
    # The page of a submission has its curves from the same file.
    assert max(path.stat().st_size for path in huge.glob("submission-*.html")) < 100_000
    assert len(json.loads(Reader((huge / "index.html").read_text()).data)["submissions"]) == 300


def test_files_stay_in_the_folder_and_other_files_stay(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("mine")
    target = tmp_path / "deep" / "pages"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine")
    (target / "index.html").symlink_to(outside / "victim")
    write_page(nasty_board(), target)
    write_page(make_board(), target)
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (outside / "victim").read_text() == "mine" == (target / "notes.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pages"]
    assert not [path for path in target.iterdir() if path.is_dir() or path.name.startswith(".")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AdamW (ours)", "submission-7-adamw-ours.html"),
        ("../../x", "submission-7-x.html"),
        ("Nesterov é", "submission-7-nesterov-e.html"),
        ("日本語", "submission-7-unnamed.html"),
        ("", "submission-7-unnamed.html"),
        ("a" * 300, f"submission-7-{'a' * 48}.html"),
    ],
)
def test_file_names_are_harmless(name: str, expected: str) -> None:
    assert file_name(7, name) == expected


def test_names_that_look_alike_have_pages_of_their_own(tmp_path: Path) -> None:
    write_page(make_board(("a b", "a/b", "A-B")), tmp_path)
    assert len(list(tmp_path.glob("submission-*-a-b.html"))) == 3


def test_the_same_board_gives_the_same_bytes_and_is_left_alone(tmp_path: Path) -> None:
    board = make_board()
    before = copy.deepcopy(board)
    for name in ("one", "two"):
        write_page(board, tmp_path / name)
    assert board == before
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_unknown_numbers_are_dashes(folder: Path) -> None:
    for page in (folder / "blank").glob("*.html"):
        reader = Reader(page.read_text(encoding="utf-8"))
        assert not re.search(r"\b(None|nan|inf|NaN|null)\b", reader.text)
        json.loads(reader.data, parse_constant=lambda constant: pytest.fail(constant))
    assert "not known" in Reader((folder / "blank" / "index.html").read_text(encoding="utf-8")).text


def test_pareto_front_and_relative_time() -> None:
    board = make_board(("a", "b", "c", "d"))
    for submission, seconds, size in zip(board["submissions"], (10.0, 20.0, 40.0, None), (8, 4, 6, 1), strict=True):
        submission["peak_memory_bytes"] = size
        for time in submission["times"].values():
            time["seconds"] = seconds
    board["submissions"][1]["times"]["gpt2"]["seconds"] = 5.0  # twice as fast here, half as fast on resnet
    figure = memory(board)
    assert [point["time"] and round(point["time"], 6) for point in figure["points"]] == [
        1.414214,
        1.414214,
        5.656854,
        None,
    ]
    assert figure["front"] == [1], "a takes as long as b and more memory, c more of both, d has no time"
    assert figure["workloads"] == 2, "the held-out workload does not count"


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"speedup": 1.25, "speedup_note": "exact"}, ("1.25×", None)),
        ({"speedup": 1.25, "speedup_note": None}, ("1.25×", None)),
        ({"speedup": 0.5, "speedup_note": "lower bound"}, ("≥ 0.50×", "the baseline missed targets")),
        ({"speedup": None, "speedup_note": "none"}, ("–", "not comparable")),
        ({"speedup": 2.0, "speedup_note": "only gpt2"}, ("2.00×", "only gpt2")),
    ],
)
def test_speedups_in_words(change: dict[str, Any], shown: tuple[str, str | None]) -> None:
    assert (display.speedup(change), display.speedup_hint(change)) == shown


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """A page in Chromium. Errors, violations of its policy, dialogs and requests to a network become `complaints`.

    Tests of tables alone leave out the plots, which take most of the time that a page needs to load.
    """

    def __init__(self, browser: Any, path: Path, plots: bool = True, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        if not plots:
            self.page.route("**/plotly.min.js", lambda route: route.fulfill(body="", content_type="text/javascript"))
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri())
        if plots:
            self.wait_for("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
            self.wait_for_curves()

    def wait_for_curves(self) -> None:
        """Until those of the chosen submissions are there."""
        self.wait_for("[...document.querySelectorAll('#curves-plot')].every(p => p.dataset.loading === '0')")

    def wait_for(self, condition: str) -> None:
        """Not wait_for_function, which the policy of the page forbids to look again."""
        wait_until(lambda: bool(self.page.evaluate(condition)))

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"asked for {request.url}")

    def column(self, table: str, cell: int) -> list[str]:
        script = "([id, cell]) => [...document.getElementById(id).tBodies[0].rows].filter(r => !r.hidden)"
        return self.page.evaluate(f"{script}.map(r => r.cells[cell].innerText.trim())", [table, cell])

    def fits_a_phone(self) -> None:
        self.page.set_viewport_size({"width": 360, "height": 740})
        self.page.wait_for_timeout(150)  # Plotly follows the width a moment later
        assert self.page.evaluate("document.documentElement.scrollWidth") == 360

    def plot(self, plot: str, property_path: str) -> Any:
        """Something of a Plotly figure: `data.length`, `layout.xaxis.title.text`."""
        return self.page.evaluate(f"document.getElementById('{plot}').{property_path}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, folder: Path) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def open_(page: str, **options: Any) -> Tab:
        tabs.append(Tab(browser, folder / page, **options))
        return tabs[-1]

    yield open_
    for tab in tabs:
        tab.context.close()
        assert tab.complaints == []


def test_sorting_by_mouse_and_keyboard(open_page: Callable[..., Tab]) -> None:
    tab = open_page("usual/index.html", plots=False)
    names = ["muon", "nadamw", "adamw", "sgd", "lion"]
    assert tab.column("ranking-table", 1) == names
    header = tab.page.locator("#ranking-table thead th", has_text="Peak memory")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert tab.column("ranking-table", 1) == ["sgd", "nadamw", "lion", "adamw", "muon"]
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert tab.column("ranking-table", 1) == ["muon", "adamw", "lion", "nadamw", "sgd"]
    button = tab.page.locator("#ranking-table thead th", has_text="Submission").get_by_role("button")
    button.focus()
    tab.page.keyboard.press("Enter")
    assert tab.column("ranking-table", 1) == sorted(names)
    tab.page.keyboard.press("Space")
    assert tab.column("ranking-table", 1) == sorted(names, reverse=True)
    assert tab.page.locator("#ranking-table [aria-sort=ascending], #ranking-table [aria-sort=descending]").count() == 1


def test_unknown_values_sort_last_both_ways(open_page: Callable[..., Tab]) -> None:
    tab = open_page("usual/index.html", plots=False)
    table = tab.page.locator("#times table")
    table.locator("thead th", has_text="vit_gelu").get_by_role("button").click()
    assert table.locator("tbody tr").last.inner_text().startswith("sgd")
    table.locator("thead th", has_text="vit_gelu").get_by_role("button").click()
    assert table.locator("tbody tr").last.inner_text().startswith("sgd")
    assert table.locator("tbody tr").first.inner_text().startswith("lion")


def test_filtering(open_page: Callable[..., Tab]) -> None:
    tab = open_page("usual/index.html", plots=False)
    tab.page.get_by_label("Filter").fill("ADAM recipe")
    assert tab.column("ranking-table", 1) == ["nadamw", "adamw"]
    assert tab.page.locator("[data-count]").inner_text() == "2 of 5 submissions"
    tab.page.get_by_label("Filter").fill("diverged")
    assert tab.column("ranking-table", 1) == ["lion"]
    tab.page.get_by_label("Filter").fill("nobody")
    assert tab.page.get_by_text("No submission matches the filter.").is_visible()
    assert tab.page.get_by_text("The plots need plotly.min.js beside this page.").count() == 3
    tab.page.get_by_label("Filter").fill("")
    assert len(tab.column("ranking-table", 1)) == 5


def test_curves_follow_the_controls(open_page: Callable[..., Tab]) -> None:
    tab = open_page("usual/index.html")
    assert tab.plot("curves-plot", "layout.yaxis.title.text") == "loss"
    assert tab.plot("curves-plot", "layout.shapes[0].y0") == 1.4048
    assert tab.plot("curves-plot", "data[0].x[80]") == pytest.approx(80)
    tab.page.get_by_label("steps").check(force=True)
    assert tab.plot("curves-plot", "layout.xaxis.title.text") == "steps"
    assert tab.plot("curves-plot", "data[0].x[80]") == 1600
    tab.page.get_by_role("combobox", name="Workload").select_option("resnet")
    assert tab.plot("curves-plot", "layout.yaxis.title.text") == "accuracy"
    assert tab.plot("curves-plot", "layout.shapes[0].y0") == 0.9
    low, high = tab.plot("curves-plot", "layout.yaxis.range")
    assert 0.4 < low < 0.9 < high < 1
    assert tab.page.locator("#curves h3:visible").all_inner_texts() == ["resnet"]
    assert tab.plot("profile-plot", "data.length") == 5
    tab.page.get_by_role("button", name="sgd", exact=True).click()
    assert tab.page.get_by_role("button", name="sgd", exact=True).get_attribute("aria-pressed") == "false"
    assert tab.plot("profile-plot", "data.length") == 4
    tab.page.get_by_role("button", name="None", exact=True).click()
    assert tab.plot("curves-plot", "data.length") == 0
    tab.page.get_by_role("button", name="All", exact=True).click()
    assert tab.plot("profile-plot", "data.length") == 5
    tab.fits_a_phone()


def test_a_large_board_loads_the_curves_that_it_shows(browser: Any, huge: Path) -> None:
    tab = Tab(browser, huge / "index.html")
    loaded = "document.querySelectorAll('script[src^=curves-]').length"
    assert tab.page.evaluate(loaded) == 10
    lines = "document.getElementById('curves-plot').data.filter(t => t.mode === 'lines').length"
    assert tab.page.evaluate(lines) == 10 * 15
    tab.page.get_by_role("button", name="None", exact=True).click()
    tab.page.get_by_role("button", name="optimizer_250", exact=True).click()
    tab.wait_for_curves()
    tab.wait_for(f"{lines} === 15")
    assert tab.page.evaluate(loaded) == 11
    tab.page.get_by_label("Filter").fill("optimizer_29")
    assert tab.column("ranking-table", 1) == [f"optimizer_29{i}" for i in range(10)]
    tab.context.close()
    assert tab.complaints == []


def test_curves_that_are_not_beside_the_page_are_told(browser: Any, tmp_path: Path) -> None:
    write_page(make_board(("a",), workloads=1), tmp_path)
    (tmp_path / "curves-1.js").unlink()
    tab = Tab(browser, tmp_path / "index.html")
    assert tab.plot("curves-plot", "layout.annotations[0].text") == "The curves need curves-….js beside this page."
    tab.context.close()


def test_dark_and_light(open_page: Callable[..., Tab]) -> None:
    tab = open_page("usual/index.html", color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark, dark_line = tab.page.evaluate(ground), tab.plot("curves-plot", "data[0].line.color")
    tab.page.get_by_role("button", name="Light colours").click()
    light, light_line = tab.page.evaluate(ground), tab.plot("curves-plot", "data[0].line.color")
    assert (dark, light) == ("rgb(20, 23, 27)", "rgb(253, 253, 251)")
    assert dark_line != light_line
    tab.page.reload()
    tab.page.wait_for_function("document.querySelector('#memory-plot .main-svg')")
    assert tab.page.evaluate(ground) == light, "the choice is kept"
    assert tab.plot("curves-plot", "data[0].line.color") == light_line


def test_names_execute_nothing(open_page: Callable[..., Tab], folder: Path) -> None:
    tab = open_page("nasty/index.html")
    tab.page.get_by_role("button", name="All", exact=True).click()
    for plot in ("profile-plot", "curves-plot", "memory-plot"):
        trace = tab.plot(plot, "data.findIndex(trace => trace.meta && trace.meta[0].startsWith('&lt;a'))")
        tab.page.evaluate(f"Plotly.Fx.hover('{plot}', [{{curveNumber: {trace}, pointNumber: 0}}])")
        assert tab.page.locator(f"#{plot} .hoverlayer").text_content().startswith('<a href="javascript:win')
    markup = tab.page.locator(".plot a, .plot script, .plot img, .plot [onload], .plot [style*='font-weight: bold']")
    assert markup.count() == 0
    labels = tab.page.evaluate("[...document.querySelectorAll('#memory-plot .textpoint text')].map(t => t.textContent)")
    assert any(label.startswith('"><img src=x onerror="w') for label in labels)
    assert any(label.startswith("<a href=") for label in labels)
    assert tab.page.evaluate("window.__pwned") is None
    tab.fits_a_phone()
    for number in (1, 10):
        page = next((folder / "nasty").glob(f"submission-{number}-*.html"))
        tab = open_page(f"nasty/{page.name}", plots=False)
        assert tab.page.evaluate("window.__pwned") is None
        tab.fits_a_phone()


@pytest.mark.parametrize(
    "page", ["blank/index.html", "blank/submission-1-muon.html", "empty/index.html", "alone/index.html"]
)
def test_little_to_show(open_page: Callable[..., Tab], page: str) -> None:
    tab = open_page(page, plots="submission" not in page)
    assert tab.page.get_by_role("heading", level=1).is_visible()
    tab.fits_a_phone()


def test_forty_submissions(open_page: Callable[..., Tab]) -> None:
    tab = open_page("large/index.html")
    assert tab.plot("profile-plot", "data.length") == 10
    tab.page.get_by_role("button", name="All", exact=True).click()
    assert tab.plot("profile-plot", "data.length") == 40
    looks = tab.page.evaluate("document.getElementById('profile-plot').data.map(t => t.line.color + t.line.dash)")
    assert len(set(looks)) == 40
    tab.fits_a_phone()


def test_submission_page(open_page: Callable[..., Tab]) -> None:
    tab = open_page("usual/submission-2-nadamw.html")
    assert tab.page.get_by_text("class_path: torch.optim.AdamW").is_visible()
    assert tab.plot("curves-plot", "data.length") == 6, (
        "three studies, each with a line and the point that met the target"
    )
    tab.page.get_by_label("Filter").fill("resnet disturbed")
    assert tab.column("trials-table", 0) == ["resnet"]
    tab.fits_a_phone()
    assert tab.page.get_by_role("link", name="Pacemark leaderboard").get_attribute("href") == "index.html"
