"""What the source of a submission's file says before it is run, and the file as a module."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from harness.errors import UserError
from submissions.algoperf.package import NAMES, imported_names, jax_import, provide_package, run_file

REQUIRED = ("get_batch_size", "init_optimizer_state", "update_params", "data_selection")
"""The functions that a file must have."""
OPTIONAL = ("prepare_for_eval",)


def read_source(path: str) -> ast.Module:
    """The source of a file of PyTorch. Raises UserError, naming the file, where it is none."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"optimizer.path={path}: this is a folder; give the file, as in {file / 'submission.py'}")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"optimizer.path={path}: cannot be read ({error.strerror}); give FOLDER/submission.py"
        ) from None
    except (SyntaxError, ValueError) as error:
        raise UserError(f"optimizer.path={path}: is no Python ({error}); give FOLDER/submission.py") from None
    if library := jax_import(tree):
        raise UserError(
            f"optimizer.path={path}: this is a JAX submission (it imports {library}), and the workloads here are "
            "PyTorch's; give the PyTorch submission of the algorithm"
        )
    return tree


def load_module(path: str, tree: ast.Module, device: torch.device | None) -> ModuleType:
    """The file as a module, run anew. Raises UserError where that fails, and naming each function that is missing."""
    provide_package(device)
    try:
        module = run_file(Path(path).resolve(), tree)
    except ImportError as error:
        raise UserError(f"optimizer.path={path}: {_import_problem(error)}") from error
    except (Exception, SystemExit) as error:
        # A user's file can fail in any way when it runs.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"optimizer.path={path}: importing it fails ({reason}); debug=true shows where") from error
    if missing := [name for name in REQUIRED if not callable(getattr(module, name, None))]:
        raise UserError(
            f"optimizer.path={path}: it has no function {' and no '.join(missing)}; AlgoPerf's interface wants "
            f"{', '.join(REQUIRED)}"
        )
    return module


def _import_problem(error: ImportError) -> str:
    name = error.name or ""
    if name.partition(".")[0] in NAMES:
        return (
            f"it imports what is not here of AlgoPerf's package ({error}); there are spec, pytorch_utils.pytorch_setup "
            "and random_utils, and an installed algoperf has all"
        )
    if jax_import(ast.parse(f"import {name}" if name else "")):
        return f"a module beside it is of JAX (it imports {name}); give the PyTorch submission of the algorithm"
    return f"cannot import {name or 'a module'} ({error}); is its package installed, and its file beside this one?"


def compiles(path: str, tree: ast.Module) -> bool:
    """Whether the file, or a module beside it that it imports, uses torch.compile."""
    folder = Path(path).parent
    beside = (folder / f"{name.rpartition('.')[2]}.py" for name in imported_names(tree))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in {Path(path), *beside} if file.is_file()]
    return any("torch.compile" in text for text in texts)


def missing_hyperparameters(tree: ast.Module, given: Iterable[str]) -> list[str]:
    """The hyperparameters that the functions of the interface read as attributes and that are not given; without those
    that the file asks for first (`hasattr`, `getattr`), and without functions that put their own in place of them."""
    asked = {name for function in _functions(tree) for name in _attributes_of(function, "hyperparameters")}
    guarded = {
        node.args[1].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    }
    return sorted(asked - guarded - set(given))


def reads(tree: ast.Module, argument: str) -> bool:
    """Whether a function of the interface reads its argument of this name."""
    return any(
        isinstance(node, ast.Name) and node.id == argument and isinstance(node.ctx, ast.Load)
        for function in _functions(tree)
        for node in ast.walk(function)
    )


def passes(tree: ast.Module, argument: str) -> bool:
    """Whether a call in the file passes an argument by this name to `model_fn`."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    return any(call.func.attr == "model_fn" and any(k.arg == argument for k in call.keywords) for call in calls)  # type: ignore[attr-defined]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    names = (*REQUIRED, *OPTIONAL)
    yield from (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names)


def _attributes_of(function: ast.FunctionDef, argument: str) -> set[str]:
    """The attributes of an argument that a function reads; none where it puts something else in its place."""
    nodes = list(ast.walk(function))
    if any(isinstance(n, ast.Name) and n.id == argument and not isinstance(n.ctx, ast.Load) for n in nodes):
        return set()
    read = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    names = {n.attr for n in read if isinstance(n.value, ast.Name) and n.value.id == argument}
    return {name for name in names if not name.startswith("_")}


def convert_search_space(raw: Any, key: str) -> dict[str, Any]:
    """What a tuning_search_space.json holds, in the shape of `optimizer.search_space`: a list of points, or a range or
    its feasible points for each hyperparameter. key: its name in the messages. Raises UserError."""
    if isinstance(raw, list) and raw and all(isinstance(point, dict) and point for point in raw):
        return {"points": [{"hyperparameters": point} for point in raw]}
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{key}: must hold a list of points, or a range for each hyperparameter")
    ranges, problems = {}, []
    for name, entry in raw.items():
        keys = set(entry) if isinstance(entry, dict) else set()
        if keys == {"feasible_points"} and isinstance(entry["feasible_points"], list):
            ranges[name] = {"choices": entry["feasible_points"]}
        elif keys == {"min", "max", "scaling"} and entry["scaling"] in ("linear", "log"):
            low, high = entry["min"], entry["max"]
            ranges[name] = {"choices": [low]} if low == high else {entry["scaling"]: [low, high]}
        else:
            problems.append(
                f'{key}: {name} must be {{"min": LOW, "max": HIGH, "scaling": "linear" or "log"}} or '
                f'{{"feasible_points": [...]}}, and is {entry}'
            )
    if problems:
        raise UserError(problems)
    return {"hyperparameters": ranges}
