"""Archives of records: the same bytes for the same files, and no archive of a stranger does harm."""

from __future__ import annotations

import hashlib
import io
import lzma
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.records import archive
from harness.records.archive import CHECKSUMS, archive_bytes, read_archive, read_members

TRIAL = "study_0/lm_pytorch/trial_1"
FILES = {
    f"study_{study}/lm_pytorch/trial_{trial}/{name}": f"{name} of {study} and {trial}: ".encode() * 40
    for study in (0, 1)
    for trial in (1, 2)
    for name in ("eval_measurements.csv", "manifest.json")
} | {"plan_lm.json": b"{}"}
Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Entry:
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.size = kind, link, len(content)
    return header, content


def checksums(files: dict[str, bytes]) -> Entry:
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return entry(CHECKSUMS, "".join(lines).encode())


def write_archive(path: Path, entries: Iterable[Entry], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """An archive with these headers, however wrong they are."""
    tar = io.BytesIO()
    for header, content in entries:
        tar.write(header.tobuf(tar_format))
        tar.write(content + b"\0" * (-len(content) % tarfile.BLOCKSIZE))
    path.write_bytes(lzma.compress(tar.getvalue() + b"\0" * 1024))
    return path


def read(path: Path) -> tuple[dict[str, bytes], list[str]]:
    problems: list[str] = []
    members = list(read_members(path, problems))
    assert len(dict(members)) == len(members)
    return dict(members), problems


def test_what_is_written_is_read_in_an_order_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.xz"
    path.write_bytes(archive_bytes(FILES))
    assert read(path) == (FILES, [])
    backwards = dict(reversed(FILES.items()))
    assert archive_bytes(backwards) == path.read_bytes()
    names = list(read(path)[0])
    assert names[:3] == ["plan_lm.json", f"{TRIAL}/manifest.json", f"{TRIAL}/eval_measurements.csv"]
    content = read_archive(path)
    assert set(content.plans) == {"plan_lm.json"} and len(content.trials) == 4 and not content.problems
    trial = content.trials[TRIAL]
    assert (trial.study, trial.workload, trial.framework, trial.trial) == (0, "lm", "pytorch", 1)


def test_other_programs_read_it_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.xz"
    path.write_bytes(archive_bytes(FILES))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert all((m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in members)
        tar.extractall(tmp_path, filter="data")
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize(
    "header",
    [
        entry(f"{TRIAL}/manifest.json", b"", tarfile.SYMTYPE, "/etc/passwd"),
        entry(f"{TRIAL}/manifest.json", b"", tarfile.LNKTYPE, "plan_lm.json"),
        entry(f"{TRIAL}/manifest.json", b"", tarfile.CHRTYPE),
        entry(f"{TRIAL}/manifest.json", b"", tarfile.FIFOTYPE),
        entry("study_0", b"", tarfile.DIRTYPE),
        entry("../plan_lm.json"),
        entry(f"../{TRIAL}/manifest.json"),
        entry(f"/{TRIAL}/manifest.json"),
        entry(f"./{TRIAL}/manifest.json"),
        entry("study_0/../lm_pytorch/trial_1/manifest.json"),
        entry("study_0/.._pytorch/trial_1/manifest.json"),
        entry("study_0\\lm_pytorch\\trial_1\\manifest.json"),
        entry("C:/plan_lm.json"),
        entry("plan_a/b.json"),
        entry("plan_\x1b[31m.json"),
        entry("study_٣/lm_pytorch/trial_1/manifest.json"),
        entry("study_0/lm_pytorch/trial_1/checkpoint.pt"),
        entry("run.py"),
        entry(f"{TRIAL}/manifest.json\nplan_x.json"),
        entry("x" * 90, b"x" * 2000, tarfile.GNUTYPE_LONGNAME),
        entry("x", b"30 size=99999999999999999999\n", tarfile.XHDTYPE),
        entry("x", b"30 path=/etc/passwd         \n", tarfile.XGLTYPE),
        entry(CHECKSUMS),
    ],
    ids=lambda header: ascii(f"{header[0].type.decode()} {header[0].name}")[1:40],
)
@pytest.mark.parametrize("listed", [False, True])
def test_anything_but_the_files_of_records_is_refused_and_the_rest_is_read(
    tmp_path: Path, header: Entry, listed: bool
) -> None:
    name, good = header[0].name, {"plan_lm.json": b"{}", "plan_z.json": b"[]"}
    sums = checksums(good | ({name: header[1]} if listed and "\n" not in name and name.isascii() else {}))
    entries = [sums, entry("plan_lm.json", b"{}"), header, entry("plan_z.json", b"[]")]
    members, problems = read(write_archive(tmp_path / "a.tar.xz", entries))
    if listed and "\x1b" in name:
        assert not members and "line 3 is not" in problems[0]
    else:
        assert members == good
        assert "refused" in problems[0] and problems[0].startswith(ascii(name)[1:-1])
    assert all(line.isprintable() for line in problems)


def test_a_second_member_of_a_name_is_refused(tmp_path: Path) -> None:
    sums = checksums({"plan_lm.json": b"{}"})
    path = write_archive(tmp_path / "a", [sums, entry("plan_lm.json", b"{}"), entry("plan_lm.json", b"[]")])
    assert read(path) == ({"plan_lm.json": b"{}"}, ["plan_lm.json: refused: a second file of this name"])


def test_members_that_the_checksums_do_not_list_or_that_are_missing(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a", [checksums({"plan_a.json": b"", "plan_c.json": b""}), entry("plan_b.json"),
                                          entry("plan_a.json", b"")])  # fmt: skip
    members, problems = read(path)
    assert members == {"plan_a.json": b""}
    assert problems[0] == "plan_b.json: refused: not listed in SHA256SUMS"
    assert problems[1].startswith("plan_c.json: damaged (listed in SHA256SUMS and missing); 1 of 2 files")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "SHA256SUMS: damaged (it has no members)"),
        ([entry("plan_lm.json")], "SHA256SUMS: damaged (the first file must be SHA256SUMS; pack the folder"),
        ([entry(CHECKSUMS, b"abc  plan_lm.json\n")], "line 1 is not `<SHA-256>  <name>`"),
        ([entry(CHECKSUMS, (b"0" * 64 + b"  plan_lm.json\n") * 2)], "line 2 is not"),
    ],
)
def test_without_checksums_nothing_is_trusted(tmp_path: Path, entries: list[Entry], message: str) -> None:
    members, problems = read(write_archive(tmp_path / "a", [*entries, entry("plan_lm.json")] if entries else []))
    assert not members and len(problems) == 1 and message in problems[0]


def test_bombs_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST_MEMBER", 2**20)
    monkeypatch.setattr(archive, "LARGEST_TOTAL", 4 * 2**20)
    large, huge = entry("plan_a.json", b"0" * (2**20 + 1)), entry("plan_b.json", b"0" * 2**23)
    good = entry("plan_c.json", b"{}")
    sums = checksums({header.name: content for header, content in (large, huge, good)})
    members, problems = read(write_archive(tmp_path / "a", [sums, large, good, huge]))
    assert members == {"plan_c.json": b"{}"}
    assert "plan_a.json: refused: 1,048,577 bytes" in problems[0] and "plan_b.json: refused" in problems[1]
    assert "more than 4 MiB when decompressed" in problems[2]
    # A dictionary of 256 MiB, which the decoder would have to hold in memory.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**28}]
    write_bytes(tmp_path / "b", lzma.compress(lzma.decompress(archive_bytes(FILES)), filters=filters))
    members, problems = read(tmp_path / "b")
    assert not members and "Memory usage limit" in problems[0]


def test_many_refused_members_end_the_reading(tmp_path: Path) -> None:
    entries = [checksums({}), *(entry(f"x{i}") for i in range(100))]
    _, problems = read(write_archive(tmp_path / "a", entries))
    assert len(problems) == archive.MOST_REFUSED + 1 and "more than 20 members are refused" in problems[-1]


def test_sizes_that_lie(tmp_path: Path) -> None:
    for size in (-1, 8**11 - 1, 2**62):
        header, content = entry("plan_lm.json", b"{}")
        header.size = size
        sums = checksums({"plan_lm.json": content})
        path = write_archive(tmp_path / "a", [sums, (header, content)], tarfile.GNU_FORMAT)
        members, problems = read(path)
        assert not members and "plan_lm.json" in problems[0]


def test_an_archive_that_is_cut_off_gives_what_is_before_the_cut(tmp_path: Path) -> None:
    path, content = tmp_path / "a", archive_bytes(FILES)
    names = list(dict(read(write_bytes(path, content))[0]))
    seen = set()
    for end in range(0, len(content), 10):
        members, problems = read(write_bytes(path, content[:end]))
        seen.add(len(members))
        # A start of the members, each as it was, and the next is named.
        assert list(members) == names[: len(members)]
        assert all(FILES[name] == members[name] for name in members)
        (problem,) = problems
        following = [*names, "its end"][len(members)]
        assert problem.startswith(f"{following}: damaged (") or problem.startswith(f"{CHECKSUMS}: damaged (")
    assert {0, len(names)} <= seen and len(seen) > 2


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_flipped_bytes_give_no_wrong_content(tmp_path: Path) -> None:
    path, content = tmp_path / "a", archive_bytes(FILES)
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        members, problems = read(write_bytes(path, bytes(flipped)))
        assert problems, position
        assert all(FILES[name] == members[name] for name in members)


def test_a_wrong_content_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    sums = checksums({"plan_a.json": b"1", "plan_b.json": b"2"})
    path = write_archive(tmp_path / "a", [sums, entry("plan_a.json", b"7"), entry("plan_b.json", b"2")])
    members, problems = read(path)
    assert members == {"plan_b.json": b"2"}
    assert problems == ["plan_a.json: damaged: its content is not the one that SHA256SUMS lists"]


@pytest.mark.parametrize("tail", [b"x", b"\0" * 16, None])
def test_data_after_the_end_are_reported(tmp_path: Path, tail: bytes | None) -> None:
    content = archive_bytes(FILES)
    path = write_bytes(tmp_path / "a", content + (content if tail is None else tail))
    members, problems = read(path)
    assert members == FILES and "data after the end of the archive" in problems[0]
    hidden = lzma.compress(lzma.decompress(content) + b"hidden")
    assert "data after the last member" in read(write_bytes(path, hidden))[1][0]


@given(st.binary(max_size=2000), st.booleans(), st.booleans())
def test_any_bytes_are_read_or_reported(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, compressed: bool, listed: bool
) -> None:
    path = tmp_path_factory.mktemp("archives") / "a"
    header, sums = checksums(FILES)
    if listed:
        content = header.tobuf() + sums + b"\0" * (-len(sums) % 512) + content
    _, problems = read(write_bytes(path, lzma.compress(content, preset=0) if compressed else content))
    assert problems


def test_a_file_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    assert read(tmp_path / "absent")[1] == ["cannot be read (No such file or directory)"]
