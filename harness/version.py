"""The version of the package."""

from __future__ import annotations

import importlib.metadata


def package_version() -> str:
    """Of the installed package, also of one that was installed from a clone with `pip install -e`; "unknown" for files
    that are used without installation."""
    try:
        return importlib.metadata.version("pacemark")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
