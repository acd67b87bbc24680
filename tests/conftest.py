"""Small trials: the real workloads, real data and the real engine, at sizes that take a fraction of a second."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Tests that run at the same time do not look at each other's cores.
os.environ["PACEMARK_MACHINE_FOLDER"] = tempfile.mkdtemp(prefix="pacemark-tests-")
# Inductor otherwise compiles programs to ask what the processor can do, which it reads as well.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

from harness.config.choices import CONFIG_DIR_VARIABLE
from harness.config.compose import load_run
from harness.study.stop_rule import make_should_stop
from harness.trial.record import Record
from harness.trial.trial import run_trial
from tests.simulated_cuda import library
from tests.simulated_cuda.program import END
from workloads.data import fashion_mnist

# Deterministic, and no second ever decides: machines are shared.
settings.register_profile("pacemark", derandomize=True, deadline=None, database=None)
settings.load_profile("pacemark")


def pytest_unconfigure() -> None:
    """Remove the folder that stands for the machine's."""
    shutil.rmtree(os.environ["PACEMARK_MACHINE_FOLDER"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that it does not keep one core busy when the others have finished: whole commands,
    and the tests that share what one of them made."""
    whole_commands = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent != whole_commands and item.get_closest_marker("xdist_group") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without collections of garbage while modules are loaded: what they load stays, and looking through it takes most
    of the time of a collection, then and later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture
def workloads_of_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs of workloads that only tests have records of (tests/harness/folders.py)."""
    monkeypatch.setenv(CONFIG_DIR_VARIABLE, str(Path(__file__).parent / "data" / "configs"))


TINY_GPT2 = [
    "workload=gpt2",
    "workload.model={vocabulary: 256, context: 16, layers: 1, width: 16, heads: 2, dropout: 0.1}",
    "workload.data={blocks: 200, evaluation_examples: 16, evaluation_batch: 8}",
    "workload.nominal_batch=8",
    "workload.micro_batch=8",
    "workload.max_steps=12",
    "workload.eval_every=3",
    "workload.target=0.001",
]
TINY_RESNET = [
    "workload=resnet",
    "workload.model={channels: 1, classes: 10, width: 4, stages: [1, 1], stem_stride: 4}",
    "workload.data={validation_size: 2000, pad: 2, flip: true, evaluation_batch: 20000}",
    "workload.nominal_batch=16",
    "workload.micro_batch=16",
    "workload.max_steps=4",
    "workload.eval_every=2",
    "workload.target=1.0",
]
TINY_VIT = [
    "workload=vit",
    "workload.model={image: 28, channels: 1, classes: 10, patch: 7, layers: 1, width: 8, heads: 2, dropout: 0.1, "
    "pooling: mean}",
    "workload.data={validation_size: 2000, pad: 0, flip: false, evaluation_batch: 20000}",
    "workload.nominal_batch=16",
    "workload.micro_batch=16",
    "workload.max_steps=6",
    "workload.eval_every=2",
    "workload.target=1.0",
]


@pytest.fixture
def trial(tmp_path: Path) -> Callable[..., Record]:
    """Run a tiny trial in this process with further arguments; its record."""

    def run(*arguments: str, base: list[str] = TINY_GPT2, optimizer: str = "adamw") -> Record:
        config = load_run([*base, f"optimizer={optimizer}", f"records={tmp_path / 'records'}", *arguments])
        return run_trial(config, make_should_stop=make_should_stop)[0]

    return run


@pytest.fixture(scope="session")
def simulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, dict[str, Any]]]]:
    """Send a request to tests/simulated_cuda/program.py, which runs once; its results by name."""
    if reason := library.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("library")
    command = [sys.executable, "-m", "tests.simulated_cuda.program", str(library.build(folder))]
    errors = folder / "errors.txt"
    with errors.open("w") as file, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, cwd=Path(__file__).parents[1]
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def measure(*request: str) -> dict[str, dict[str, Any]]:
            results: list[dict[str, Any]] = []
            try:
                print(json.dumps(request), file=requests, flush=True)
                while (line := answers.readline()) != END:
                    assert line, errors.read_text()
                    results += [json.loads(line)] if line.startswith("{") else []
            except BaseException:
                # Also at the time limit of a test: the next one must not read the rest.
                process.kill()
                raise
            return {result.pop("name"): result for result in results}

        yield measure
        requests.close()


@pytest.fixture(scope="session")
def fashion_mnist_data() -> dict[str, fashion_mnist.Images]:
    """The real data; `python scripts/prepare_data.py fashion_mnist` fetches them."""
    if not fashion_mnist.DEBIAN.is_dir():
        try:
            return fashion_mnist.load_splits("hub")[1]
        except Exception:
            pytest.skip("Fashion-MNIST is not here: python scripts/prepare_data.py fashion_mnist")
    return fashion_mnist.load_splits("debian")[1]
