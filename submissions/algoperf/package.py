"""AlgoPerf's package under its two names, for files that import it where it is not installed, and the import of a file.

A submission's file imports `algoperf` or, as it was called before, `algorithmic_efficiency`, modules that lie beside
it, and sometimes itself by its place in AlgoPerf's repositories. All of these are found while it is loaded.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from submissions.algoperf import pytorch_utils, random_utils, spec

NAMES = ("algoperf", "algorithmic_efficiency")
"""What AlgoPerf's package is called."""
_MODULES = {"spec": spec, "pytorch_utils": pytorch_utils, "random_utils": random_utils}
_JAX = ("jax", "flax", "optax", "chex")

_loaded: set[str] = set()
"""Names in sys.modules that the last file brought."""
_folder: str | None = None


def provide_package(device: torch.device | None) -> None:
    """Put AlgoPerf's package into sys.modules under each name under which it is not installed, and absl's logging where
    that is not. device: what `pytorch_setup` tells."""
    pytorch_utils.set_device(device or torch.device("cpu"))
    for name in NAMES:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            _add_package(name, _MODULES)
    if "absl" not in sys.modules and importlib.util.find_spec("absl") is None:
        log = ModuleType("absl.logging")
        logger = logging.getLogger("absl")
        for level in ("debug", "info", "warning", "error", "exception", "log"):
            setattr(log, level, getattr(logger, level))
        _add_package("absl", {"logging": log})


def _add_package(name: str, modules: dict[str, ModuleType]) -> None:
    package = ModuleType(name)
    # With it the module is a package, and importing another part of it says that there is none.
    package.__path__ = []
    sys.modules[name] = package
    for part, module in modules.items():
        sys.modules[f"{name}.{part}"] = module
        setattr(package, part, module)


def imported_names(tree: ast.Module) -> list[str]:
    """The modules that a file imports by their full names, anywhere in it."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return names + [
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]


def jax_import(tree: ast.Module) -> str | None:
    """The library of JAX that a file imports; None for a file of PyTorch."""
    return next((top for name in imported_names(tree) if (top := name.partition(".")[0]) in _JAX), None)


def run_file(path: Path, tree: ast.Module) -> ModuleType:
    """The module of the file at `path`, run anew, and with it the modules beside it. tree: of its source. Raises
    whatever the file raises."""
    _forget_last()
    global _folder
    folder = str(path.parent)
    if folder not in sys.path:
        _folder = folder
        # Last, so that no module beside it takes the place of another one.
        sys.path.append(folder)
    name = "algoperf_submission_" + re.sub(r"\W", "_", path.parent.name)
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    before = set(sys.modules)
    finder = _OwnName(path.parent, imported_names(tree))
    sys.meta_path.append(finder)
    # Classes of it are looked up by the name of their module.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    finally:
        sys.meta_path.remove(finder)
        _loaded.update(n for n in sys.modules.keys() - before if _is_beside(sys.modules[n], folder))
        _loaded.update(finder.made)
        _loaded.add(name)
    return module


def loaded_modules() -> set[str]:
    """The names in sys.modules that the last file brought: its own, and those of the modules beside it."""
    return set(_loaded)


def _forget_last() -> None:
    """Let the modules of the last file be loaded again: two folders may have modules of the same name."""
    global _folder
    for name in _loaded:
        sys.modules.pop(name, None)
    _loaded.clear()
    if _folder in sys.path:
        sys.path.remove(_folder)
    _folder = None


def _is_beside(module: ModuleType, folder: str) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).is_relative_to(folder)


class _OwnName(importlib.abc.MetaPathFinder):
    """Finds the packages above a file by which it names its own folder, such as `submissions.self_tuning.mine`."""

    def __init__(self, folder: Path, imported: Sequence[str]) -> None:
        self.made: set[str] = set()
        """The names that it was asked for and gave."""
        self._places: dict[str, list[str]] = {}
        for name in imported:
            parts = name.split(".")
            if folder.name in parts[1:]:
                end = parts.index(folder.name, 1) + 1
                self._places |= {".".join(parts[:i]): [] for i in range(1, end)}
                self._places[".".join(parts[:end])] = [str(folder)]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A package without a file of its own, or None."""
        if fullname not in self._places:
            return None
        self.made.add(fullname)
        module_spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
        module_spec.submodule_search_locations = self._places[fullname]
        return module_spec
