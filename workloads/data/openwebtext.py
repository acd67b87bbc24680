"""OpenWebText (Gokaslan & Cohen 2019): 8,013,769 web pages, 38 GB of text, as GPT-2 tokens.

Prepared from the hub's parquet files, a copy of them, or texts: .txt files of one page each, alone or in the tar and
.xz archives of the original release. Each page is tokenised once (see bpe.py), followed by the end-of-text token, and
stored as uint16, a file per source file and split. A page's split is a pure function of its text: the first eight bytes
of its SHA-256, modulo 2,000, are 0 for validation, 1 for the test and anything else for training. A share of 0.05% is
nanoGPT's, too; unlike its shuffle, this rule does not depend on the order of the pages.
"""

from __future__ import annotations

import hashlib
import lzma
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import PreparationError
from workloads.data import bpe, prepared
from workloads.data.prepared import Prepared, Report, Unit

if TYPE_CHECKING:
    import tiktoken

NAME = "openwebtext"
HUB = "Skylion007/openwebtext"
DOCUMENTS = 8_013_769
SPLITS = ("train", "validation", "test")
FILES_PER_UNIT = 256
"""Of texts and archives, which are small; a parquet file is a unit by itself."""

REMEDY = (
    "OpenWebText can come from (1) the hub: --source hub; (2) a copy of its parquet files, .txt files of a page each, "
    "or the original release's archives of such: --source FOLDER"
)


def load(source: str) -> tuple[Prepared, dict[str, list[np.ndarray]]]:
    """The prepared splits, each a list of memory-mapped uint16 arrays. PreparationError if missing or damaged."""
    found = prepared.find(NAME, source)
    if found.extra.get("vocabulary_sha256") != bpe.SHA256 or found.extra.get("vocabulary_size") != bpe.SIZE:
        raise PreparationError(
            f"data={source}: {found.folder} was tokenised with another vocabulary than GPT-2's "
            f"({found.extra.get('vocabulary_sha256')}); {prepared.how(NAME, source)} after removing that folder"
        )
    splits: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for name in found.files:  # in the order of the source
        if found.files[name]["bytes"]:
            splits[name.rpartition("-")[2].removesuffix(".bin")].append(np.memmap(found.folder / name, np.uint16, "r"))
    return found, splits


def split_of(digest: bytes) -> str:
    """The split of the page whose text has this SHA-256."""
    return {0: "validation", 1: "test"}.get(int.from_bytes(digest[:8], "big") % 2000, "train")


def prepare(
    source: str, root: Path, *, partial: bool, workers: int, report: Report, vocabulary: Path | None = None
) -> Prepared:
    """Tokenise into `root/openwebtext`. source: hub, or a folder. partial: take another number of pages, too.

    vocabulary: folder of GPT-2's vocabulary files (default: the package's).
    """
    files = bpe.files(vocabulary)
    bpe.encoding(files)  # its problems come before any work
    folder = root / NAME
    receipts = prepared.run_units(folder, _units(source, files), tokenise, workers, report)
    documents = sum(receipt["documents"] for receipt in receipts)
    missing_data = "" if documents == DOCUMENTS else f"{documents:,} of {DOCUMENTS:,} pages"
    counts = {"documents": documents} | {split: sum(r["tokens"][split] for r in receipts) for split in SPLITS}
    if missing_data and not partial:
        raise PreparationError(f"--source {source}: this is not the whole of OpenWebText ({missing_data}); {REMEDY}; "
                               "or add --partial to take it all the same, for runs that no board counts")  # fmt: skip
    content = prepared.content_hash(sum(int(receipt["digests"], 16) for receipt in receipts))
    extra = {"vocabulary_sha256": bpe.SHA256, "vocabulary_size": bpe.SIZE, "split": "sha256(text)[:8] mod 2000"}
    written = {name: entry for receipt in receipts for name, entry in receipt["files"].items()}
    whole = Prepared(
        folder,
        NAME,
        "hub" if source == "hub" else "folder",
        not missing_data,
        missing_data,
        content,
        counts,
        written,
        extra,
    )
    prepared.finish(whole)
    return whole


def _units(source: str, vocabulary: Path) -> list[Unit]:
    options = {"vocabulary": str(vocabulary), "tokens": bpe.SHA256["vocab.bpe"]}
    if source == "hub":
        parquet = prepared.hub_files(HUB, ["train"])["train"]
        return [Unit(f"{i:05d}", (str(path),), options | {"kind": "parquet"}) for i, path in enumerate(parquet)]
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise PreparationError(f"--source {source}: no such folder; {REMEDY}")
    if parquet := prepared.parquet_files(folder, ""):
        return [Unit(f"{i:05d}", (str(path),), options | {"kind": "parquet"}) for i, path in enumerate(parquet)]
    texts = sorted(str(path) for path in folder.rglob("*") if path.suffix in (".txt", ".xz", ".tar"))
    if not texts:
        raise PreparationError(f"--source {source}: no .parquet, .txt, .tar or .xz file in it; {REMEDY}")
    pieces = [tuple(texts[i : i + FILES_PER_UNIT]) for i in range(0, len(texts), FILES_PER_UNIT)]
    return [Unit(f"{i:05d}", piece, options | {"kind": "text"}) for i, piece in enumerate(pieces)]


def tokenise(folder: Path, unit: Unit) -> dict[str, Any]:
    """A unit's shards: <unit>-<split>.bin, uint16 tokens."""
    encoding = _encoding(unit.options["vocabulary"])
    documents, digests = 0, 0
    tokens = dict.fromkeys(SPLITS, 0)
    names = {split: f"{unit.name}-{split}.bin" for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context(prepared.writing(folder / name)) for split, name in names.items()}
        for text in _documents(unit):
            digest = hashlib.sha256(text.encode()).digest()
            encoded = encoding.encode_ordinary(text)
            encoded.append(bpe.END_OF_TEXT)
            split = split_of(digest)
            files[split].write(array("H", encoded))
            tokens[split] += len(encoded)
            documents += 1
            digests += int.from_bytes(digest, "big")
    entries = {name: prepared.entry(files[split], folder / name) for split, name in names.items()}
    return {"files": entries, "documents": documents, "tokens": tokens, "digests": prepared.content_hash(digests)}


@lru_cache(maxsize=1)
def _encoding(folder: str) -> tiktoken.Encoding:
    return bpe.encoding(Path(folder))


def _documents(unit: Unit) -> Iterator[str]:
    for name in unit.inputs:
        path = Path(name)
        number = 0
        try:
            for text in _texts(path, unit.options["kind"]):
                if not isinstance(text, str):
                    raise ValueError(f"{text!r} is no text")
                yield text
                number += 1
        # Damaged files; what pyarrow raises for them is an OSError or a ValueError, too.
        except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, lzma.LZMAError) as error:
            raise PreparationError(
                f"--source: {path} cannot be read after page {number} ({type(error).__name__}: {error}), half a "
                "download perhaps; get it again, and the same command goes on where it stopped"
            ) from error


def _texts(path: Path, kind: str) -> Iterable[Any]:
    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"it has no column `text`, but {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(256, columns=["text"]):
                yield from batch.column(0).to_pylist()
    elif path.suffix == ".txt":
        yield path.read_bytes().decode("utf-8")  # line ends as they are
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    yield content.read().decode("utf-8")


class Tokens:
    """Shards as one sequence of tokens."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """uint16 [n, length]: the tokens from each of `starts` (int64 [n], at most len(self) - length) on."""
        found = np.empty((len(starts), length), np.uint16)
        first = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(found, starts.tolist(), first.tolist(), strict=True):
            filled = 0
            while filled < length:
                begin = start + filled - (int(self._ends[shard - 1]) if shard else 0)
                piece = self._shards[shard][begin : begin + length - filled]
                row[filled : filled + len(piece)] = piece
                filled, shard = filled + len(piece), shard + 1
        return found
