"""What a configuration takes from a file of the user's: its hash, and the hyperparameters that come with it.

The search space of the other interface becomes `optimizer.search_space`, and one point of it the recipe. So every
process of a study has them in its configuration, and the file beside the submission is read once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from harness.config.hyperparameters import import_algorithm
from harness.config.schema import FILE_KEYS, Optimizer
from harness.config.search_space import parse_search_space
from harness.errors import UserError
from harness.interface.submission import FileSubmission

SEARCH_SPACE_FILE = "tuning_search_space.json"
"""The name of the file that is looked for beside the submission's."""


def read_submission_file(values: dict[str, Any]) -> dict[str, Any]:
    """The composed configuration with what the file at `optimizer.path` brings; as it is where there is none.

    Raises UserError for a search space that cannot be read. What else is wrong is found by the validation.
    """
    options = values.get("optimizer")
    if not isinstance(options, dict) or not isinstance(options.get("path"), str):
        return values
    try:
        cls = import_algorithm(str(options.get("class_path")))
    except UserError:
        return values
    if not issubclass(cls, FileSubmission):
        return values
    path = Path(options["path"])
    if path.is_file():
        needs = {*options.get("needs", []), *_needs(cls, options["path"])}
        hashed = hashlib.sha256(path.read_bytes()).hexdigest()
        options = options | {"file_sha256": hashed, "needs": sorted(needs)}
    file = options.get("tuning_search_space")
    if file is None and (path.parent / SEARCH_SPACE_FILE).is_file():
        file = str(path.parent / SEARCH_SPACE_FILE)
    if isinstance(file, str):
        options = _with_search_space(options, cls, file)
    elif options.get("point") is not None:
        raise UserError(
            f"optimizer.point={options['point']}: there is no {SEARCH_SPACE_FILE} beside optimizer.path; name the file "
            "with optimizer.tuning_search_space=FILE"
        )
    return values | {"optimizer": options}


def _needs(cls: type[FileSubmission], path: str) -> list[str]:
    try:
        return [need.value for need in cls.read_needs(path)]
    except UserError:
        return []  # the validation says so


def _with_search_space(options: dict[str, Any], cls: type[FileSubmission], file: str) -> dict[str, Any]:
    raw = cls.read_search_space(file)
    space = parse_search_space(raw, f"optimizer.tuning_search_space={file}")
    number = options.get("point")
    if not space.points:
        if number is not None:
            raise UserError(f"optimizer.point={number}: {file} has ranges and no list of points; leave it out")
        point = space.middle()
    else:
        number = number if isinstance(number, int) else 1
        if not 1 <= number <= len(space.points):
            raise UserError(f"optimizer.point={number}: {file} has the points 1 to {len(space.points)}; give one")
        point = space.points[number - 1]
    recipe = dict(options.get("recipe") or {})
    # A recipe in a YAML of the user's own wins over the file.
    recipe["hyperparameters"] = point["hyperparameters"] | (recipe.get("hyperparameters") or {})
    own_space = options.get("search_space")
    return options | {"recipe": recipe, "search_space": raw if own_space is None else own_space}


def file_problems(optimizer: Optimizer, cls: type[Any]) -> list[str]:
    """What is wrong with the file of a submission, with the options for it, and with such options where there is no
    file."""
    if not issubclass(cls, FileSubmission):
        return [
            f"optimizer.{key}={getattr(optimizer, key)}: {cls.__name__} is no algorithm in a file; leave it out, or "
            "take optimizer=algoperf"
            for key in FILE_KEYS
            if getattr(optimizer, key) is not None
        ]
    if optimizer.path is None:
        return ["optimizer.path is not given; add optimizer.path=FOLDER/submission.py"]
    try:
        cls.load(optimizer.path, optimizer)
    except UserError as error:
        return error.messages
    return []
