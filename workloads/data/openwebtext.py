"""OpenWebText (Gokaslan & Cohen 2019): 8,013,769 web pages, 38 GB of text, as GPT-2 tokens.

Prepared from the hub's parquet files, a copy of them, or texts: .txt files of one page each, alone or in the tar and
.xz archives of the original release. Each page is tokenised once (see bpe.py), followed by the end-of-text token, and
stored as uint16, with a file for each source file and split. A page's split is a pure function of its text: the first
eight bytes of its SHA-256, modulo 2,000, are 0 for validation, 1 for the test and any other number for training. The
share of 0.05% is also nanoGPT's; unlike its shuffle, this rule does not depend on the order of the pages.
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
from workloads.data.prepared import INCOMPLETE_DOWNLOAD, RESUME, PreparedData, ReportProgress, Unit

if TYPE_CHECKING:
    import tiktoken

NAME = "openwebtext"
HUB = "Skylion007/openwebtext"
DOCUMENTS = 8_013_769
SPLITS = ("train", "validation", "test")
FILES_PER_UNIT = 256
"""Texts and archives, which are small; a parquet file is a unit by itself."""

REMEDY = (
    "OpenWebText can come from (1) the hub: --source hub; (2) a copy of its parquet files, .txt files of one page "
    "each, or the original release's archives of .txt files: --source FOLDER"
)


def load_shards(source: str) -> tuple[PreparedData, dict[str, list[np.ndarray]]]:
    """The prepared splits, each a list of memory-mapped uint16 arrays.

    source: auto, a root, or the folder of the prepared data. Raises PreparationError if they are missing, damaged or
    tokenised with another vocabulary.
    """
    data = prepared.open_prepared(NAME, source)
    if data.extra.get("vocabulary_sha256") != bpe.SHA256 or data.extra.get("vocabulary_size") != bpe.SIZE:
        raise PreparationError(
            f"data={source}: {data.folder} was tokenised with another vocabulary than GPT-2's "
            f"({data.extra.get('vocabulary_sha256')}); remove that folder and {prepared.remedy(NAME, source)}"
        )
    splits: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    # In the order of the source. An empty file cannot be memory-mapped.
    for name in data.files:
        if data.files[name]["bytes"]:
            splits[name.rpartition("-")[2].removesuffix(".bin")].append(np.memmap(data.folder / name, np.uint16, "r"))
    return data, splits


def page_split(digest: bytes) -> str:
    """The split of a page, from the SHA-256 of its text."""
    return {0: "validation", 1: "test"}.get(int.from_bytes(digest[:8], "big") % 2000, "train")


def prepare(
    source: str, root: Path, *, partial: bool, workers: int, report: ReportProgress, vocabulary: Path | None = None
) -> PreparedData:
    """Tokenise into `root/openwebtext`. Raises PreparationError.

    source: hub, or a folder. partial: accept another number of pages. workers: processes. vocabulary: folder of GPT-2's
    vocabulary files (default: the package's).
    """
    vocabulary_folder = bpe.find_vocabulary(vocabulary)
    # Loaded only to raise its errors before any work.
    bpe.load_encoding(vocabulary_folder)
    folder = root / NAME
    results = prepared.run_units(folder, _make_units(source, vocabulary_folder), tokenise_unit, workers, report)
    documents = sum(result["documents"] for result in results)
    missing_data = "" if documents == DOCUMENTS else f"{documents:,} of {DOCUMENTS:,} pages"
    if missing_data and not partial:
        raise PreparationError(
            f"--source {source}: this is not the complete OpenWebText ({missing_data}); {REMEDY}; or add --partial to "
            "accept it for runs that no board counts"
        )
    data = PreparedData(
        folder,
        NAME,
        source="hub" if source == "hub" else "folder",
        complete=not missing_data,
        missing_data=missing_data,
        content=prepared.content_hash(sum(int(result["digests"], 16) for result in results)),
        counts={"documents": documents} | {split: sum(r["tokens"][split] for r in results) for split in SPLITS},
        files={name: entry for result in results for name, entry in result["files"].items()},
        extra={"vocabulary_sha256": bpe.SHA256, "vocabulary_size": bpe.SIZE, "split": "sha256(text)[:8] mod 2000"},
    )
    prepared.finish_preparation(data)
    return data


def _make_units(source: str, vocabulary: Path) -> list[Unit]:
    """The units of a source. Raises PreparationError if it has no files. vocabulary: folder of the vocabulary files."""
    options = {"vocabulary": str(vocabulary), "tokens": bpe.SHA256["vocab.bpe"]}
    if source == "hub":
        parquet = prepared.download_hub_files(HUB, ["train"])["train"]
        return [Unit(f"{i:05d}", (str(path),), options | {"kind": "parquet"}) for i, path in enumerate(parquet)]
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise PreparationError(f"--source {source}: no such folder; {REMEDY}")
    if parquet := prepared.list_parquet_files(folder, ""):
        return [Unit(f"{i:05d}", (str(path),), options | {"kind": "parquet"}) for i, path in enumerate(parquet)]
    texts = sorted(str(path) for path in folder.rglob("*") if path.suffix in (".txt", ".xz", ".tar"))
    if not texts:
        raise PreparationError(f"--source {source}: no .parquet, .txt, .tar or .xz file in it; {REMEDY}")
    inputs = [tuple(texts[i : i + FILES_PER_UNIT]) for i in range(0, len(texts), FILES_PER_UNIT)]
    return [Unit(f"{i:05d}", paths, options | {"kind": "text"}) for i, paths in enumerate(inputs)]


def tokenise_unit(folder: Path, unit: Unit) -> dict[str, Any]:
    """Write a unit's shards <unit>-<split>.bin, uint16 tokens; see `prepared.run_units`.

    The result has besides `files`: the number of `documents`, the `tokens` of each split, and the sum of the `digests`.
    """
    encoding = _load_encoding(unit.options["vocabulary"])
    documents, digests = 0, 0
    tokens = dict.fromkeys(SPLITS, 0)
    names = {split: f"{unit.name}-{split}.bin" for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context(prepared.hashed_writer(folder / name)) for split, name in names.items()}
        for text in _read_documents(unit):
            digest = hashlib.sha256(text.encode()).digest()
            # encode_ordinary: a page that contains "<|endoftext|>" must not get the special token.
            encoded = encoding.encode_ordinary(text)
            encoded.append(bpe.END_OF_TEXT)
            split = page_split(digest)
            files[split].write(array("H", encoded))
            tokens[split] += len(encoded)
            documents += 1
            digests += int.from_bytes(digest, "big")
    entries = {name: prepared.manifest_entry(files[split], folder / name) for split, name in names.items()}
    return {"files": entries, "documents": documents, "tokens": tokens, "digests": prepared.content_hash(digests)}


@lru_cache(maxsize=1)
def _load_encoding(folder: str) -> tiktoken.Encoding:
    """The encoding, loaded once per process."""
    return bpe.load_encoding(Path(folder))


def _read_documents(unit: Unit) -> Iterator[str]:
    """The texts of all pages of a unit. Raises PreparationError, which names the file and the page."""
    for name in unit.inputs:
        path = Path(name)
        number = 0
        try:
            for text in _read_texts(path, unit.options["kind"]):
                if not isinstance(text, str):
                    raise ValueError(f"{text!r} is not a text")
                yield text
                number += 1
        # pyarrow's errors for damaged files are OSError and ValueError.
        except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, lzma.LZMAError) as error:
            raise PreparationError(
                f"--source: {path} cannot be read after page {number} ({type(error).__name__}: {error}), "
                f"{INCOMPLETE_DOWNLOAD}; download it again, and {RESUME}"
            ) from error


def _read_texts(path: Path, kind: str) -> Iterable[Any]:
    """The pages of one file. kind: parquet or text, the latter a .txt file or an archive."""
    if kind == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(f"it has no column `text`, but {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(256, columns=["text"]):
                yield from batch.column(0).to_pylist()
    elif path.suffix == ".txt":
        # Not read_text, which would change line ends.
        yield path.read_bytes().decode("utf-8")
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None
                    yield content.read().decode("utf-8")


class Tokens:
    """One sequence of tokens from several shards, uint16 arrays."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows uint16 [n, length] that begin at `starts` (int64 [n], at most len(self) - length)."""
        windows = np.empty((len(starts), length), np.uint16)
        first_shards = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(windows, starts.tolist(), first_shards.tolist(), strict=True):
            filled = 0
            # A window may extend over several shards.
            while filled < length:
                begin = start + filled - (int(self._ends[shard - 1]) if shard else 0)
                tokens = self._shards[shard][begin : begin + length - filled]
                row[filled : filled + len(tokens)] = tokens
                filled, shard = filled + len(tokens), shard + 1
        return windows
