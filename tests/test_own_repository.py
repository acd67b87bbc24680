"""docs/own_repository.md, followed word for word outside the clone, with the built wheel.

Here the wheel is unpacked beside the packages of this environment. CI installs it in a fresh environment and sets
PACEMARK_FRESH to its folder, and then the long commands run too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own_repository.md").read_text()
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FRESH = os.environ.get("PACEMARK_FRESH")
pytestmark = pytest.mark.xdist_group("wheel")


@dataclass(frozen=True)
class Place:
    """A repository of a user's, and the environment in which the commands run."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, status: int = 0) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == status, (command, done.stdout, done.stderr)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("own")
    for _, option, text in BLOCKS:
        if option.startswith("file="):
            path = folder / option.removeprefix("file=")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    # With bytecode: many processes load the installed files.
    hidden = ("PYTHONPATH", "PACEMARK_CONFIG_DIR", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}
    if FRESH:
        return Place(folder, environment | {"PATH": f"{FRESH}/bin{os.pathsep}{environment['PATH']}"})
    return Place(folder, environment | {"PYTHONPATH": str(_unpack_wheel(tmp_path_factory.mktemp("wheel")))})


def _unpack_wheel(folder: Path) -> Path:
    """The installed files of a wheel that is built now, without its dependencies."""
    try:
        import setuptools
    except ImportError:
        pytest.skip("setuptools is not here to build a wheel")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools is too old to build a wheel")
    for path in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pacemark", "harness", "workloads",
                 "submissions", "scripts", "configs", "results"):  # fmt: skip
        (folder / path).symlink_to(ROOT / path)
    build = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, "dist"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), "installed"], cwd=folder, check=True)
    return folder / "installed"


def commands(option: str) -> list[list[str]]:
    texts = [text for language, words, text in BLOCKS if language == "sh" and words == option]
    return [line.split() for text in texts for line in text.splitlines()]


def words_of(command: list[str]) -> list[str]:
    """`pacemark ...` of the fresh environment, or its module in this one."""
    assert command[0] == "pacemark"
    return command if FRESH else [sys.executable, "-m", *command]


def test_the_package_is_one_import_name(place: Place) -> None:
    python = f"{FRESH}/bin/python" if FRESH else sys.executable
    code = "import pacemark, harness, sys; print(harness.__file__); assert pacemark.Rule and pacemark.load_records"
    printed = place.run(python, "-c", code)
    assert "_lib" in printed and str(ROOT) not in printed
    if not FRESH:
        installed = Path(place.environment["PYTHONPATH"])
        assert {path.name for path in installed.iterdir() if ".dist-info" not in path.name} == {"pacemark"}


def test_the_short_commands(place: Place) -> None:
    printed = [place.run(*words_of(command)) for command in commands("")]
    assert "failed" not in printed[0] and "not comparable: max_steps" in printed[1] and "seed: 3" in printed[2]
    (record,) = (place.folder / "results" / "records").glob("*/quick/*/my_signum/study_0/gpt2_pytorch/trial_1")
    assert (record / "manifest.json").is_file()
    assert sorted(path.name for path in place.folder.iterdir()) == ["my_configs", "my_package", "results"]


def test_the_baselines_come_along(place: Place) -> None:
    assert "muon is faster" in place.run(*words_of(["pacemark", "compare", "muon", "adamw"]))


@pytest.mark.skipif(not FRESH, reason="ten minutes; CI runs it in a fresh environment")
@pytest.mark.timeout(1800)
def test_the_verdict_the_board_and_the_notebook(place: Place) -> None:
    printed = [place.run(*words_of(command)) for command in commands("long")]
    assert "my_signum is" in printed[1] or "no difference shown" in printed[1]
    assert (place.folder / "board" / "LEADERBOARD.md").is_file()
    (code,) = [text for language, option, text in BLOCKS if option == "notebook"]
    printed_by_notebook = place.run(f"{FRESH}/bin/python", "-c", code)
    assert "my_signum" in printed_by_notebook and "hp.lr" in printed_by_notebook
