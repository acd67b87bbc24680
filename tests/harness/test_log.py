from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator

import pytest

from harness import log
from harness.command_line import run_script
from harness.display import make_console
from harness.errors import UserError

logger = logging.getLogger("harness.some.module")
PATH = "/a/path/that/is/much/longer/than/eighty/columns/" + "x" * 80


@pytest.fixture(autouse=True)
def level_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(log.VARIABLE, raising=False)
    yield
    os.environ.pop(log.VARIABLE, None)
    log.configure()


@pytest.mark.parametrize(
    ("arguments", "others", "level"),
    [
        (["a=1", "b"], ["a=1", "b"], logging.WARNING),
        (["-v", "-m", "a=1"], ["-m", "a=1"], logging.INFO),
        (["-m", "a=1", "-v"], ["-m", "a=1"], logging.INFO),
        (["a=1", "-vv"], ["a=1"], logging.DEBUG),
        (["-v", "a=1", "--verbose"], ["a=1"], logging.DEBUG),
        (["--version", "-vx"], ["--version", "-vx"], logging.WARNING),
    ],
)
def test_verbosity_is_taken_from_anywhere(arguments: list[str], others: list[str], level: int) -> None:
    assert log.take_verbosity(arguments) == others
    assert logger.getEffectiveLevel() == level and log.is_shown(level) and not log.is_shown(level - 1)
    # Processes that are started now inherit it.
    assert os.environ.get(log.VARIABLE, "WARNING") == logging.getLevelName(level)


def test_the_environment_sets_the_level_and_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.VARIABLE, "error")
    assert log.take_verbosity(["a"]) == ["a"] and logger.getEffectiveLevel() == logging.ERROR
    log.take_verbosity(["-v"])
    assert logger.getEffectiveLevel() == logging.INFO


def test_a_wrong_level_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(log.VARIABLE, "inof")
    with pytest.raises(UserError, match="PACEMARK_LOG=inof: no such level; did you mean `INFO`"):
        log.configure()
    assert run_script(lambda _: 0, []) == 2 and "PACEMARK_LOG=inof" in capsys.readouterr().err
    monkeypatch.setenv(log.VARIABLE, "7")
    with pytest.raises(UserError, match="known are DEBUG, ERROR, INFO, WARNING"):
        log.configure()


def test_records_are_whole_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.take_verbosity(["-v"])
    logger.info("written: %s", PATH)
    logger.debug("too much")
    logging.getLogger("another_library").info("not ours")
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.endswith(f" INFO harness.some.module: written: {PATH}")


def test_ranks_other_than_the_first_tell_only_their_troubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log.take_verbosity(["-vv"])
    assert logger.getEffectiveLevel() == logging.WARNING


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_they_go_above_the_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, screen = _Terminal(), _Terminal()
    monkeypatch.setattr("sys.stderr", errors)
    log.take_verbosity(["-v"])
    log.show_above(make_console(file=screen, force_terminal=True, width=80))
    logger.info("written: %s", PATH)
    log.show_above(None)
    assert errors.getvalue() == "" and PATH in screen.getvalue()
    logger.info("afterwards")
    assert "afterwards" in errors.getvalue() and "afterwards" not in screen.getvalue()


def test_a_child_sends_its_records_to_its_parent(capsys: pytest.CaptureFixture[str]) -> None:
    log.take_verbosity(["-v"])
    log.send_to_parent()
    logger.warning("two\nlines: %d", 2)
    (line,) = capsys.readouterr().err.splitlines()
    log.configure()
    assert log.receive(f"{line}\n", "adamw on gpt2")
    assert capsys.readouterr().err.endswith(" WARNING harness.some.module: adamw on gpt2: two\nlines: 2\n")


@pytest.mark.parametrize(
    "line",
    ["error: no data\n", "Traceback (most recent call last):\n", "pacemark-log: {broken\n", "pacemark-log: 3\n",
     "pacemark-log: {}\n",
     "pacemark-log: " + json.dumps({"name": "harness", "level": None, "message": ""}) + "\n"],
)  # fmt: skip
def test_what_is_no_record_stays_an_error(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not log.receive(line, "adamw on gpt2")
    assert capsys.readouterr().err == ""


def test_no_path_is_broken_where_the_output_is_no_terminal() -> None:
    from rich.table import Table

    output = io.StringIO()
    console = make_console(file=output)
    table = Table()
    table.add_column("path", overflow="fold")
    table.add_row(PATH)
    console.print(f"written: {PATH}")
    console.print(table)
    assert output.getvalue().count(PATH) == 2
