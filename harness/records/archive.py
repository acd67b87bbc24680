"""The records of one submission as one file: `<label>.tar.xz` in the place of the folder `<label>/`.

A USTAR archive in one xz stream. Its members are the files of the folder under their paths below it (see
harness/records/layout.py): the plans, then trial by trial the manifest and the evaluations. The first member,
SHA256SUMS, lists the others as `sha256sum` does. The same files give the same bytes.

Archives come from strangers. Their members are read one after the other into memory, never extracted by their names.
Only regular files with a name of the layout are taken, and the decompressed size is limited. All else is refused.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from harness.records.layout import MANIFEST, split_workload_name, study_number, trial_number

CHECKSUMS = "SHA256SUMS"
"""The first member: a line `<SHA-256>  <name>` for each of the others, in their order."""
LARGEST_MEMBER = 64 * 2**20
"""Bytes of a file. A real record has a few hundred rows; a larger file is no record."""
LARGEST_TOTAL = 512 * 2**20
"""Bytes of a decompressed archive. A trial has about 30 KB."""
MOST_REFUSED = 20
"""After so many problems an archive is not read further: a hostile one could have millions of members."""

_WORKLOAD = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
_MEMBER = re.compile(
    rf"plan_{_WORKLOAD}\.json"
    rf"|study_[0-9]{{1,10}}/{_WORKLOAD}_(?:jax|pytorch)/trial_[0-9]{{1,9}}/"
    r"(?:eval_measurements\.csv|manifest\.json|sources\.json|weights_at_(?:target|end)\.pt)"
)
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  ([ -~]+)")
# Fixed, since the bytes of an archive depend on them. The dictionary holds a submission of a few hundred trials whole;
# pb=0 fits text.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 8 * 2**20, "pb": 0}]
# An archive says itself how large a dictionary it needs: up to 4 GiB.
_DECODER_MEMORY = 100 * 2**20
_CHUNK = 2**18
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


def is_member_name(name: str) -> bool:
    """Whether a file with this path below a submission's folder belongs to its records."""
    return _MEMBER.fullmatch(name) is not None


@dataclass
class ArchivedTrial:
    """The files of a trial in an archive."""

    study: int
    workload: str
    """With the variant: gpt2, or gpt2_silu."""
    framework: str
    trial: int
    files: dict[str, bytes] = field(default_factory=dict)
    """manifest.json and eval_measurements.csv, as far as they are there and undamaged."""


@dataclass
class ArchivedSubmission:
    """What `read_archive` returns."""

    plans: dict[str, bytes] = field(default_factory=dict)
    """By name: plan_gpt2.json."""
    trials: dict[str, ArchivedTrial] = field(default_factory=dict)
    """By folder: study_0/gpt2_pytorch/trial_1."""
    problems: list[str] = field(default_factory=list)
    """What was refused or is damaged, with the name of the member."""


def read_archive(path: Path) -> ArchivedSubmission:
    """The plans and trials of an archive, as far as they can be read."""
    submission = ArchivedSubmission()
    for name, content in read_members(path, submission.problems):
        folder, _, file_name = name.rpartition("/")
        if not folder:
            submission.plans[name] = content
            continue
        if folder not in submission.trials:
            study, workload_name, trial = folder.split("/")
            workload, framework = split_workload_name(workload_name)
            # `read_members` gives names of the layout alone.
            numbers = study_number(study), trial_number(trial)
            assert numbers[0] is not None and numbers[1] is not None
            submission.trials[folder] = ArchivedTrial(numbers[0], workload, framework, numbers[1])
        submission.trials[folder].files[file_name] = content
    return submission


def read_members(path: Path, problems: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every member that can be trusted, in the order of the archive, without SHA256SUMS.

    Adds to `problems` a line for each member that is refused, and for the one at which a damaged archive breaks.
    """
    try:
        with path.open("rb") as file:
            yield from _Reader(file, problems).read()
    except OSError as error:
        problems.append(f"cannot be read ({error.strerror})")


def archive_bytes(files: Mapping[str, bytes]) -> bytes:
    """The archive of these files, by name; the same for the same files, in whatever order they are given."""
    # Plans first, since their folder is empty; the manifest before the evaluations, so that of a file that was cut off
    # no evaluations are read without their manifest.
    names = sorted(files, key=lambda name: (name.rpartition("/")[0], not name.endswith(MANIFEST), name))
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names]
    tar = io.BytesIO()
    for name, content in ((CHECKSUMS, "".join(lines).encode()), *((name, files[name]) for name in names)):
        header = tarfile.TarInfo(name)
        # All other fields of a header are constant: no owner, no time, mode 644.
        header.size = len(content)
        tar.write(header.tobuf(tarfile.USTAR_FORMAT))
        tar.write(content)
        tar.write(b"\0" * (-len(content) % tarfile.BLOCKSIZE))
    tar.write(b"\0" * (2 * tarfile.BLOCKSIZE))
    return lzma.compress(tar.getbuffer(), lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=_FILTERS)


# ---- reading -------------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """The rest of the archive cannot be read."""


class _Reader:
    """Reads an archive once, from start to end."""

    def __init__(self, file: IO[bytes], problems: list[str]) -> None:
        self._stream = _XzStream(file)
        self._problems = problems
        self._expected: dict[str, str] | None = None
        """SHA-256 by name, in the order of SHA256SUMS; None before it was read."""
        self._seen: set[str] = set()
        self._refused = 0

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of every member that can be trusted."""
        count = 0
        try:
            while (header := self._next_header()) is not None:
                content = self._read_member(header)
                if content is not None and header.name != CHECKSUMS:
                    count += 1
                    yield header.name, content
            if self._expected is None:
                raise _Damaged("it has no members")
            if not self._expected.keys() <= self._seen:
                raise _Damaged(f"listed in {CHECKSUMS} and missing")
            self._stream.expect_end()
        except _Damaged as damage:
            listed = f" of {len(self._expected)}" if self._expected is not None else ""
            self._problems.append(f"{self._next_name()}: damaged ({damage}); {count}{listed} files were read before it")

    def _next_name(self) -> str:
        """The first member that SHA256SUMS lists and that has not been met: there the archive breaks."""
        if self._expected is None:
            return CHECKSUMS
        return next((name for name in self._expected if name not in self._seen), "its end")

    def _next_header(self) -> tarfile.TarInfo | None:
        block = self._stream.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise _Damaged(f"no header of a member: {error}") from error
        if header.size < 0:
            raise _Damaged("a header with a negative size")
        return header

    def _read_member(self, header: tarfile.TarInfo) -> bytes | None:
        """The content of a member; None if it is refused."""
        reason = self._why_refused(header)
        if reason is not None:
            self._refuse(header.name, reason)
            if header.type not in _WITHOUT_CONTENT:
                self._stream.skip(header.size + -header.size % tarfile.BLOCKSIZE)
            return None
        content = self._stream.read(header.size)
        self._stream.skip(-header.size % tarfile.BLOCKSIZE)
        # Not before its content: where that breaks off, this is the member to name.
        self._seen.add(header.name)
        if self._expected is None:
            self._expected = _parse_checksums(content)
        elif hashlib.sha256(content).hexdigest() != self._expected[header.name]:
            self._refuse(header.name, f"damaged: its content is not the one that {CHECKSUMS} lists")
            return None
        return content

    def _why_refused(self, header: tarfile.TarInfo) -> str | None:
        name = header.name
        if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            return "refused: no regular file"
        if header.size > LARGEST_MEMBER:
            return f"refused: {header.size:,} bytes, and the largest record has {LARGEST_MEMBER >> 20} MiB"
        if self._expected is None:
            if name != CHECKSUMS:
                raise _Damaged(f"the first file must be {CHECKSUMS}; pack the folder with scripts/records.py")
        elif name in self._seen:
            return "refused: a second file of this name"
        elif not is_member_name(name):
            return "refused: no file of a record has this name"
        elif name not in self._expected:
            return f"refused: not listed in {CHECKSUMS}"
        return None

    def _refuse(self, name: str, reason: str) -> None:
        self._refused += 1
        if self._refused > MOST_REFUSED:
            raise _Damaged(f"more than {MOST_REFUSED} members are refused")
        # As ASCII and cut, since a hostile name could hold anything that a terminal obeys.
        self._problems.append(f"{ascii(name)[1:-1][:200]}: {reason}")


def _parse_checksums(content: bytes) -> dict[str, str]:
    expected: dict[str, str] = {}
    for number, line in enumerate(content.decode("ascii", errors="replace").splitlines(), 1):
        match = _CHECKSUM_LINE.fullmatch(line)
        if match is None or match[2] in expected:
            raise _Damaged(f"line {number} is not `<SHA-256>  <name>` with a new name")
        expected[match[2]] = match[1]
    return expected


class _XzStream:
    """The decompressed content of an xz file, piece by piece, so that a bomb fills no memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DECODER_MEMORY)
        self._chunk, self._position, self._total = b"", 0, 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        start, end = self._position, self._position + size
        # Most members lie in the chunk whole.
        if end <= len(self._chunk):
            self._position = end
            return self._chunk[start:end]
        return b"".join(self._pieces(size))

    def skip(self, size: int) -> None:
        """Leave out `size` bytes."""
        for _ in self._pieces(size):
            pass

    def expect_end(self) -> None:
        """Read the rest, which must be zeros and the checks of the xz format."""
        while True:
            if self._chunk[self._position :].strip(b"\0"):
                raise _Damaged("data after the last member")
            if self._decoder.eof:
                break
            self._next_chunk()
        if self._decoder.unused_data or self._file.read(1):
            raise _Damaged("data after the end of the archive")

    def _pieces(self, size: int) -> Iterator[bytes]:
        while size:
            if self._position == len(self._chunk):
                self._next_chunk()
            piece = self._chunk[self._position : self._position + size]
            self._position += len(piece)
            size -= len(piece)
            yield piece

    def _next_chunk(self) -> None:
        """Decompress further; the chunk is empty only at the end of the file."""
        self._chunk, self._position = b"", 0
        while not self._chunk:
            if self._decoder.eof:
                raise _Damaged("it ends too early")
            compressed = self._file.read(_CHUNK) if self._decoder.needs_input else b""
            if self._decoder.needs_input and not compressed:
                raise _Damaged("it is cut off")
            try:
                self._chunk = self._decoder.decompress(compressed, _CHUNK)
            except lzma.LZMAError as error:
                raise _Damaged(str(error)) from error
            if self._decoder.eof:
                break
        self._total += len(self._chunk)
        if self._total > LARGEST_TOTAL:
            raise _Damaged(f"more than {LARGEST_TOTAL >> 20} MiB when decompressed")
