"""A timing run imports what a record names, so a record must not name just anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.processes import SOURCE_ROOT
from harness.study.trusted_classes import check_trusted
from scripts import compare, timing
from tests.harness.review.forging import honest, of, write

EVIL = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nclass Rule: pass\n"


def config(optimizer: str, workload: str = "workloads.gpt2.GPT2", wrappers: Any = ()) -> dict[str, Any]:
    return {
        "workload": {"class_path": workload},
        "optimizer": {"class_path": optimizer, "wrappers": list(wrappers)},
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records with a module in it, and a module beside it, both where Python finds them."""
    records = tmp_path / "results"
    (records / "evil").mkdir(parents=True)
    (records / "evil" / "code.py").write_text(EVIL)
    (tmp_path / "own.py").write_text(EVIL)
    for name in ("results", "own", "evil"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return records


def test_classes_of_pacemark_and_torch_are_imported(folder: Path) -> None:
    for path in ("torch.optim.AdamW", "submissions.muon.Muon"):
        check_trusted({"x": config(path, wrappers=["submissions.sam.SAM"])}, [folder], trust=False)
    # Who gives the whole repository as the folder of records does not mean its own packages.
    check_trusted({"x": config("submissions.muon.Muon")}, [SOURCE_ROOT, SOURCE_ROOT.parent], trust=False)


@pytest.mark.parametrize("place", ["optimizer", "workload", "wrappers"])
def test_other_classes_need_trust(place: str, folder: Path) -> None:
    given: dict[str, Any] = {"optimizer": "torch.optim.AdamW"} | {
        place: ["own.Rule"] if place == "wrappers" else "own.Rule"
    }
    with pytest.raises(UserError, match=r"=own.Rule of x: a record names it.*--trust"):
        check_trusted({"x": config(**given)}, [folder], trust=False)
    check_trusted({"x": config(**given)}, [folder], trust=True)
    assert not (folder.parent / "own.ran").exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("path", ["results.evil.code.Rule", "evil.code.Rule"])
def test_nothing_below_the_records_is_ever_imported(
    path: str, trust: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(UserError, match="lies below the records, and nothing there is ever run"):
        check_trusted({"x": config(path)}, [folder], trust=trust)
    assert not (folder / "evil" / "code.ran").exists()


@pytest.mark.parametrize("path", ["..x.Y", "a b.C", "", "os.system('x')"])
def test_what_is_no_class_path_is_refused(path: str, folder: Path) -> None:
    with pytest.raises(UserError, match="no path of a class"):
        check_trusted({"x": config(path)}, [folder], trust=True)


def forged(root: Path, path: str) -> Path:
    """Records whose muon is another class, coherent in all else."""
    trials = honest()
    for trial in of(trials, "muon"):
        assert trial.manifest is not None
        trial.label = trial.manifest["submission"] = "mine"
        for part in ("identity", "config"):
            trial.manifest[part]["optimizer"]["class_path"] = path
        trial.rehash()
    return write(root, trials)


def test_the_timing_run_asks_for_trust(folder: Path, tmp_path: Path) -> None:
    root = forged(folder, "own.Rule")
    with pytest.raises(UserError, match=r"optimizer\.class_path=own\.Rule of mine on gpt2"):
        timing.main([str(root), "--out", str(tmp_path / "t.csv")])
    assert not (folder.parent / "own.ran").exists()
    # Of the others there is nothing to ask.
    with pytest.raises(UserError, match="--submissions nobody: not in the records"):
        timing.main([str(root), "--out", str(tmp_path / "t.csv"), "--submissions", "nobody"])


def test_a_comparison_in_seconds_asks_for_trust(folder: Path) -> None:
    root = forged(folder, "results.evil.code.Rule")
    with pytest.raises(UserError, match="lies below the records"):
        compare.main(["mine", "adamw", "--records", str(root), "--ruleset", "external", "--time", "--trust"])
    assert not (folder / "evil" / "code.ran").exists()


def test_a_file_that_a_record_names_needs_trust(folder: Path, tmp_path: Path) -> None:
    def of_file(path: Path) -> dict[str, Any]:
        given = config("submissions.algoperf.adaptor.AlgoPerf")
        return given | {"optimizer": given["optimizer"] | {"path": str(path)}}

    elsewhere = of_file(tmp_path / "elsewhere" / "submission.py")
    with pytest.raises(UserError, match="it would be run; read it and add --trust"):
        check_trusted({"x": elsewhere}, [folder], trust=False)
    check_trusted({"x": elsewhere}, [folder], trust=True)
    with pytest.raises(UserError, match="lies below the records"):
        check_trusted({"x": of_file(folder / "submission.py")}, [folder], trust=True)
