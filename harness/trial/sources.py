"""The source files that a submission brings: their hashes for every record, and their texts for a judged one."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from harness.processes import SOURCE_ROOT
from harness.trial.witness import is_library

_OF_THE_HARNESS = ("harness", "workloads", "scripts", "pacemark")
"""Packages of Pacemark whose version the record names already."""


def submission_sources(classes: Iterable[type], loaded_before: frozenset[str]) -> dict[str, Path]:
    """The source files of the modules that define `classes`, of the modules that these use, and of all modules loaded
    since; without libraries and the harness. By the module's name.

    loaded_before: names of the modules that were loaded before the classes were imported.
    """
    names = {name for cls in classes for base in cls.__mro__ if (name := base.__module__) in sys.modules}
    names |= sys.modules.keys() - loaded_before
    sources: dict[str, Path] = {}
    pending = sorted(names)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        if name in seen or module is None:
            continue
        seen.add(name)
        path = _source_of(module)
        if path is None:
            continue
        sources[name] = path
        # By its contents too: a module may have been loaded earlier, by another submission.
        for value in list(vars(module).values()):
            used = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(used, str):
                pending.append(used)
    return sources


def hash_sources(sources: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of each file; `unreadable` where there is none any more."""
    hashes = {}
    for name, path in sorted(sources.items()):
        try:
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            hashes[name] = "unreadable"
    return hashes


MAX_SOURCE_BYTES = 1 << 20
"""Of all source files of a submission together that a record keeps."""


def read_sources(sources: dict[str, Path]) -> dict[str, str]:
    """The text of each file, as far as `MAX_SOURCE_BYTES` go."""
    texts: dict[str, str] = {}
    left = MAX_SOURCE_BYTES
    for name, path in sorted(sources.items()):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if (left := left - len(text)) < 0:
            break
        texts[name] = text
    return texts


def submission_distributions(classes: Iterable[type]) -> dict[str, str]:
    """Names and versions of the installed distributions that `classes` come from; torch is in every record."""
    versions: dict[str, str] = {}
    tops = {cls.__module__.partition(".")[0] for cls in classes} - {
        "torch",
        "builtins",
        "submissions",
        *_OF_THE_HARNESS,
    }
    if not tops:
        return versions
    # Reads the files of every distribution that is installed.
    packages = importlib.metadata.packages_distributions()
    for top in sorted(tops):
        for name in packages.get(top, []):
            versions[name] = importlib.metadata.version(name)
    return versions


def _source_of(module: ModuleType) -> Path | None:
    """The source file of a module; None for libraries, for the harness and for what has no file."""
    name, file = module.__name__, getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(".py") or is_library(file):
        return None
    if name.partition(".")[0] in _OF_THE_HARNESS and Path(file).is_relative_to(SOURCE_ROOT):
        return None
    return Path(file)
