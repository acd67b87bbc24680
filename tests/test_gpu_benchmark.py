from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of benchmarks/gpu.py, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def test_every_part_runs_on_a_cpu_with_tiny_sizes(gpu: Any) -> None:
    options = gpu.Options(device="cpu", tiny=True)
    parts = {name: {"status": "passed", "figures": part(options)} for name, part in gpu.PARTS.items()}
    assert parts["waits"]["figures"]["submissions"] == 2
    assert set(parts["mini"]["figures"]) == {f"{w} {p}" for w in ("gpt2", "resnet", "vit") for p in ("fp32", "bf16")}
    assert all(row["harness / bare loop"] > 0 for row in parts["mini"]["figures"].values())
    assert set(parts["images"]["figures"]) == {"ResNet-50", "ViT-S/16"}
    assert parts["updates"]["figures"]["tiny lion"]["of fused AdamW"] > 0
    report = gpu.format_report(gpu.describe(options) | {"parts": parts})
    assert "(a dry run, whose figures mean nothing)" in report
    assert report.count("| passed |") == len(gpu.PARTS) and "tokens per second" in report


def test_a_proof_that_does_not_hold_is_reported(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_proofs

    monkeypatch.setattr(gpu_proofs, "_equal_bits", lambda first, second: False)
    with pytest.raises(gpu.Failed, match="workload=gpt2 precision=fp32: other weights after a resume"):
        gpu.PARTS["resume"](gpu.Options(device="cpu", tiny=True))


def test_parts_go_on_where_the_last_command_stopped(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    header = {"machine": {"cpu": "a processor"}, "packages": {"torch": "2"}, "code": {"version": "1"}}

    def run_child(part: str, options: Any, seconds: float) -> dict[str, Any]:
        if part == gpu.DESCRIPTION:
            return {"status": "passed", "figures": header, "seconds": 1.0}
        ran.append(part)
        error = {"status": "failed", "error": "not done after 240 s", "seconds": 240.0}
        return error if part == "gpt2" else {"status": "passed", "figures": {"steps": 3}, "seconds": 2.0}

    monkeypatch.setattr(gpu, "_run_child", run_child)
    command = ["--device", "cpu", "--out", str(tmp_path)]
    assert gpu.main([*command, "--minutes", "0"]) == 1
    assert not ran and "resume: not reached; the same command goes on" in capsys.readouterr().out
    assert gpu.main(command) == 1 and ran == list(gpu.PARTS)
    assert gpu.main(command) == 1 and ran[len(gpu.PARTS) :] == ["gpt2"]
    report = (tmp_path / "gpu.md").read_text()
    assert "### gpt2: failed" in report and "not done after 240 s" in report
    # Of another machine nothing counts.
    header["machine"] = {"cpu": "another processor"}
    ran.clear()
    assert gpu.main([*command, "waits"]) == 0 and ran == ["waits"]
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["waits"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from harness.command_line import run_script

    assert run_script(gpu.main, ["--out", str(tmp_path)]) == 2
    assert "error: device=cuda: torch" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_unknown_part_is_named(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from harness.command_line import run_script

    assert run_script(gpu.main, ["speed"]) == 2
    assert "speed: no such part; there are waits, resume" in capsys.readouterr().err
