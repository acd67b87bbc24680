"""What the source of a foreign optimizer's class says of the keys of its parameter groups."""

from __future__ import annotations

import inspect
import re
from typing import Any


def source_of(cls: type[Any]) -> str:
    """The source of the class and of its bases outside of torch; empty where there is none."""
    texts = []
    for base in cls.__mro__:
        if base is not object and not base.__module__.startswith(("torch.", "abc")):
            try:
                texts.append(inspect.getsource(base))
            except (OSError, TypeError):
                continue
    return "\n".join(texts)


def optional_keys(source: str) -> set[str]:
    """Keys of parameter groups that the source asks for and can do without."""
    asked = re.findall(r"['\"](\w+)['\"] (?:not )?in (?:param_)?group\b", source)
    return {*asked, *re.findall(r"\bgroup\.get\(\s*['\"](\w+)['\"]", source)}


def selecting_keys(cls: type[Any], source: str) -> set[str]:
    """Those of them that select what the class is named for: its documentation speaks of them, or it asks whether a
    group has them."""
    tested = set(re.findall(r"['\"](\w+)['\"] (?:not )?in (?:param_)?group\b", source))
    documented = set(re.findall(r"\w+", cls.__doc__ or ""))
    return {key for key in optional_keys(source) if key in documented or key in tested}


def flags(cls: type[Any]) -> list[str]:
    """Keys of parameter groups that look like a switch between two rules."""
    keys = optional_keys(source_of(cls)) | set(re.findall(r"\bgroup\[['\"](\w+)['\"]\]", source_of(cls)))
    return sorted(key for key in keys if key.startswith(("use_", "is_")) and key not in signature_names(cls))


def signature_names(cls: type[Any]) -> set[str]:
    """The names of the constructor's arguments."""
    return set(inspect.signature(cls.__init__).parameters)
