"""Which classes of a record may be imported: those of Pacemark and torch, unless the user trusts the records.

A record comes from anyone, and importing a module runs it. So what a timing run builds is of this repository or of
torch, and never of a module that lies below the folders of records.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.processes import SOURCE_ROOT

TRUSTED_PACKAGES = ("harness", "submissions", "workloads", "torch")


def check_trusted(configs: Mapping[str, Mapping[str, Any]], folders: Iterable[Path], trust: bool) -> None:
    """Raise UserError for each class that a configuration names and that must not be imported.

    configs: configurations of manifests, by label. folders: the folders of records. trust: whether the user vouches for
    classes of other packages too. Imports nothing.
    """
    roots = [folder.resolve() for folder in folders]
    messages = []
    for label, config in configs.items():
        for key, path in _class_paths(config):
            reason = _why_not(path, roots, trust)
            if reason is not None:
                messages.append(f"{key}={path} of {label}: {reason}")
        if (file := _file(config)) is not None and (reason := _why_not_file(Path(file), roots, trust)) is not None:
            messages.append(f"optimizer.path={file} of {label}: {reason}")
    if messages:
        raise UserError(dict.fromkeys(messages))


def _class_paths(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    workload, optimizer = config.get("workload"), config.get("optimizer")
    if isinstance(workload, dict):
        yield "workload.class_path", str(workload.get("class_path"))
    if isinstance(optimizer, dict):
        yield "optimizer.class_path", str(optimizer.get("class_path"))
        wrappers = optimizer.get("wrappers")
        for wrapper in wrappers if isinstance(wrappers, list) else []:
            yield "optimizer.wrappers", str(wrapper)
        for key in ("base", "fallback"):
            if isinstance(part := optimizer.get(key), dict):
                yield f"optimizer.{key}.class_path", str(part.get("class_path"))


def _file(config: Mapping[str, Any]) -> str | None:
    """The file that holds the algorithm, where a configuration names one."""
    optimizer = config.get("optimizer")
    path = optimizer.get("path") if isinstance(optimizer, dict) else None
    return path if isinstance(path, str) else None


def _why_not_file(path: Path, roots: list[Path], trust: bool) -> str | None:
    """Why a file must not be run; None if it may be."""
    if any(path.resolve().is_relative_to(root) for root in roots if not SOURCE_ROOT.is_relative_to(root)):
        return "it lies below the records, and nothing there is ever run; move it, or leave these out"
    if trust:
        return None
    return "a record names it, and it would be run; read it and add --trust, or leave it out with --submissions"


def _why_not(path: str, roots: list[Path], trust: bool) -> str | None:
    """Why a class must not be imported; None if it may be."""
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        return "no path of a class; leave these records out"
    package = parts[0]
    # Where it would come from, without running it: of a package in a package, finding it would import the outer one.
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    places = [] if spec is None else [*(spec.submodule_search_locations or []), *([spec.origin] if spec.origin else [])]
    origins = [Path(place).resolve() for place in places if place not in ("built-in", "frozen", "namespace")]
    ours = package in TRUSTED_PACKAGES and (package == "torch" or any(p.is_relative_to(SOURCE_ROOT) for p in origins))
    # The folder of a package can lie above the records.
    inner = [place.joinpath(*parts[1:-1]) for place in origins]
    # Who gives the whole repository as the folder of records does not mean its own packages.
    roots = [root for root in roots if not (ours and SOURCE_ROOT.is_relative_to(root))]
    if any(place.is_relative_to(root) for place in (*origins, *inner) for root in roots):
        return "its module lies below the records, and nothing there is ever run; install it, or leave these out"
    if trust:
        return None
    if not ours:
        return (
            f"a record names it, and only classes of {', '.join(TRUSTED_PACKAGES)} are imported for that; read its "
            "source and add --trust, or leave it out with --submissions"
        )
    return None
