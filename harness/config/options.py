"""The options of `run`: Hydra's, where they have a meaning here, in any place of the command line.

Hydra's own command line is not used, since a sweep here is one pool of trials. An option of Hydra's that does nothing
here is refused with what to use in its place, so that none is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError

_FLAGS = {
    **dict.fromkeys(("-h", "--help"), "help"),
    **dict.fromkeys(("-m", "--multirun"), "multirun"),
    "--show": "show",
    "--version": "version",
    # --cfg always shows resolved values; --run is what happens without --multirun.
    **dict.fromkeys(("--resolve", "--run", "-r"), ""),
}
_WITH_VALUE = {
    **dict.fromkeys(("-c", "--cfg"), "cfg"),
    **dict.fromkeys(("-cd", "--config-dir"), "config_dir"),
}
_NOT_HERE = {
    **dict.fromkeys(("-cp", "--config-path"), "--config-dir FOLDER adds a folder of configs to the shipped ones"),
    **dict.fromkeys(("-cn", "--config-name"), "presets are files experiment/NAME.yaml, taken by +experiment=NAME"),
    **dict.fromkeys(("-p", "--package"), "--show prints the whole configuration"),
    **dict.fromkeys(("-i", "--info"), "--show prints the whole configuration, --help every choice"),
    **dict.fromkeys(
        ("-sc", "--shell-completion"), 'the profile of your shell takes eval "$(pacemark completion bash)"'
    ),
    "--hydra-help": "--help lists what there is",
    "--experimental-rerun": "the same command continues a trial, and overwrite=true repeats it",
}


@dataclass
class Options:
    """A command line of `run`, taken apart."""

    overrides: list[str]
    """KEY=VALUE, in their order."""
    help: bool = False
    version: bool = False
    multirun: bool = False
    show: bool = False
    """Print the configuration instead of training."""
    config_dirs: tuple[Path, ...] = ()
    """The user's own folders of configs."""


def parse_options(arguments: list[str]) -> Options:
    """Take the options out of a command line. Raises UserError naming an option that does not exist here."""
    options = Options([])
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            options.overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        if word in _FLAGS:
            if _FLAGS[word]:
                setattr(options, _FLAGS[word], True)
        elif name in _WITH_VALUE:
            _set_value(options, name, value if equals else _next_word(words, name))
        elif name in _NOT_HERE:
            raise UserError(f"{name}: not used here; {_NOT_HERE[name]}")
        else:
            raise UserError(
                f"{word}: no such option; there are --help, --version, --show, -m, -v and --config-dir FOLDER"
            )
    return options


def _next_word(words: Iterator[str], name: str) -> str:
    value = next(words, None)
    if value is None:
        raise UserError(f"{name}: a value is missing")
    return value


def _set_value(options: Options, name: str, value: str) -> None:
    if _WITH_VALUE[name] == "config_dir":
        options.config_dirs = (*options.config_dirs, Path(value))
    elif value == "job":
        options.show = True
    else:
        raise UserError(f"{name} {value}: only `{name} job` is there, which is --show; Hydra's own config is not used")
