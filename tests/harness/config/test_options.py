"""The options of the command: Hydra's where they mean something here, in any place, and a remedy for the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.options import Options, parse_options
from harness.errors import UserError

OVERRIDES = ["workload=gpt2", "optimizer=lion"]


@pytest.mark.parametrize("option", ["-m", "--multirun"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_multirun_stands_in_any_place(option: str, place: int) -> None:
    assert parse_options([*OVERRIDES[:place], option, *OVERRIDES[place:]]) == Options(OVERRIDES, multirun=True)


@pytest.mark.parametrize(
    "words", [["--show"], ["--cfg", "job"], ["--cfg=job"], ["-c", "job"], ["-c", "job", "--resolve"]]
)
def test_the_configuration_is_shown(words: list[str]) -> None:
    assert parse_options([*OVERRIDES, *words]) == Options(OVERRIDES, show=True)


def test_folders_of_configs() -> None:
    options = parse_options(["--config-dir", "a", *OVERRIDES, "--config-dir=b", "-cd", "c"])
    assert options == Options(OVERRIDES, config_dirs=(Path("a"), Path("b"), Path("c")))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--nonsense"], "no such option; there are --help"),
        (["--cfg", "hydra"], "only `--cfg job` is there"),
        (["--config-dir"], "a value is missing"),
        (["--config-path", "x"], "--config-dir FOLDER adds"),
        (["-cn", "x"], "+experiment=NAME"),
        (["--info"], "--show prints"),
        (["-sc", "install=bash"], "pacemark completion bash"),
    ],
)
def test_what_does_not_exist_names_what_does(arguments: list[str], remedy: str) -> None:
    with pytest.raises(UserError, match=f"^{arguments[0].replace('-', '.')}") as caught:
        parse_options([*OVERRIDES, *arguments])
    assert remedy in str(caught.value)
