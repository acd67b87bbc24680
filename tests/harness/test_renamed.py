"""Code that was written for an earlier version is told the new names."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import harness.interface
from harness import renamed
from harness.interface import StepContext, Workload, WrappedContext
from submissions.rule import Rule


@pytest.mark.parametrize("name", sorted(renamed.MODULES))
def test_a_module_that_moved_names_where_its_contents_are(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=rf"harness\.{name} is now harness\.\w+") as caught:
        importlib.import_module(f"harness.{name}")
    importlib.import_module(str(caught.value).rpartition(" ")[2])


def test_a_module_that_never_was_is_an_ordinary_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'harness\.nothing'"):
        importlib.import_module("harness.nothing")


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in renamed.NAMES for name in renamed.NAMES[module]]
)
def test_a_name_that_moved_names_the_new_one(module: str, name: str) -> None:
    with pytest.raises(ImportError, match=rf"{module}\.{name} is now ") as caught:
        getattr(importlib.import_module(module), name)
    new = str(caught.value).rpartition("is now ")[2]
    attribute, _, new_module = new.partition(" of ")
    if not new_module:
        new_module, _, attribute = new.rpartition(".")
    assert hasattr(importlib.import_module(new_module), attribute)


def test_a_name_that_never_was_is_an_ordinary_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from harness.config import nothing")


@pytest.mark.parametrize("method", ["loss", "gradients", "loss_and_gradients", "hessian_vector_product"])
def test_the_weights_of_a_gradient_are_given_as_params(method: str) -> None:
    for context in (StepContext, WrappedContext):
        if method in vars(context):
            with pytest.raises(TypeError, match=rf"{method}\(at=\.\.\.\) is now .*{method}\(params=\.\.\.\)"):
                getattr(context, method)(SimpleNamespace(), at=[torch.zeros(1)])


def test_a_method_under_a_former_name_is_refused_instead_of_never_called() -> None:
    with pytest.raises(TypeError, match=r"Old\.lacks is never called: the method is now named missing_data"):
        type("Old", (Workload,), {"lacks": lambda self: None})
    with pytest.raises(TypeError, match=r"Old\.survey is never called: the method is now named prepare_step"):
        type("Old", (Rule,), {"survey": lambda self: None})


def test_the_facts_of_a_workload_are_its_spec() -> None:
    workload: Any = SimpleNamespace()
    with pytest.raises(AttributeError, match=re.escape("spec")):
        Workload.facts.fget(workload)  # type: ignore[attr-defined]


def test_every_name_of_the_interface_can_be_imported_from_it() -> None:
    for name in harness.interface.__all__:
        getattr(harness.interface, name)
    # What type checkers see is the same list.
    text = Path(str(harness.interface.__file__)).read_text()
    declared = re.findall(r"^    from [\w.]+ import (\w+) as \1$", text, re.MULTILINE)
    assert sorted(declared) == harness.interface.__all__
