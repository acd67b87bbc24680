"""Run a foreign optimizer for a few steps so that nothing of it is left: random numbers, warnings, compiled code."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Compilation:
    """Whether compiled code was called."""

    seen: bool = False


@contextmanager
def undisturbed() -> Iterator[Compilation]:
    """Random numbers come back as they were, warnings are not shown, and compiled code runs uncompiled; whether there
    is any."""
    compilation = Compilation()
    # The generator that numpy's functions share, which a library may draw from.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        # Whatever the caller's default device is.
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        stack.enter_context(_uncompiled(compilation))
        try:
            yield compilation
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def _uncompiled(compilation: Compilation) -> Iterator[None]:
    """Within it compiled code runs uncompiled, and `compilation` hears of it."""
    compile_ = torch.compile
    with ExitStack() as stack:
        # Importing the compiler takes seconds, and most libraries do not compile.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(_calls_uncompiled(compilation))

        def compile_later(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                stack.enter_context(_calls_uncompiled(compilation))
            return compile_(*args, **kwargs)

        torch.compile = compile_later
        try:
            yield
        finally:
            torch.compile = compile_


@contextmanager
def _calls_uncompiled(compilation: Compilation) -> Iterator[None]:
    from torch._dynamo import eval_frame

    original = eval_frame._callback_from_stance

    def noticing(callback: Any) -> Any:
        # None and False switch compilation off.
        compilation.seen |= callback is not None and callback is not False
        return original(callback)

    # A function of torch itself, which runs before every call of compiled code.
    eval_frame._callback_from_stance = noticing
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        eval_frame._callback_from_stance = original
