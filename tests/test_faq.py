"""docs/faq.md: its short commands run as they are written, and print the figures that stand beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.processes import call, execute

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "faq.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def programs(word: str) -> str:
    """The one `python -c` block that has the word in it."""
    (text,) = [text for language, text in BLOCKS if language == "sh" and text.startswith("python -c") and word in text]
    return text.partition('"')[2].rpartition('"')[0]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its first row and column."""
    section = TEXT.partition(f"## {heading}")[2].partition("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [cells[1:] for cells in table[1:]]


def test_times_of_trials() -> None:
    printed = execute(programs("limit_seconds"))
    median, spread = rows("How long does a trial take, and a study? How much disk and memory?")
    for workload, middle, ends in zip(("gpt2", "resnet", "vit"), median, spread, strict=True):
        (line,) = [line.split() for line in printed.splitlines() if line.startswith(f"{workload} ")]
        low, centre, high = (f"{float(value):.0f}" for value in line[2:])
        assert (centre, f"{low} to {high}") == (middle, ends), workload
    assert f"{float(printed.split()[-4]):.2f} hours" in TEXT


def test_studies_that_a_difference_takes() -> None:
    percents = [line.split()[-1] for line in execute(programs("exp(")).splitlines()]
    recipes, tuned = rows("How many studies do I need to show a difference of 5%?")
    assert percents == recipes + tuned


@pytest.mark.parametrize("line", re.findall(r"^python scripts/compare.py .*%.*$", TEXT, re.MULTILINE))
def test_differences_that_could_have_been_detected(line: str) -> None:
    command, _, comment = line.partition("#")
    _, script, *arguments = command.split()
    done = call(Path(script).stem, *arguments)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    percent, sigma = re.findall(r"(\d+)%.* ([\d.]+)$", comment.rstrip())[0]
    assert f"A difference of {percent}% overall" in printed and f"sigma of log time {sigma} " in printed


def test_reading_records() -> None:
    (text,) = [text for language, text in BLOCKS if language == "python"]
    printed = execute(f"{text}\nprint(trials['status'].unique(), len(curves), 'hp.lr' in trials)")
    assert "reached" in printed and printed.split()[-2:] == ["15257", "True"]
