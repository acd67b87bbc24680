"""Other libraries' implementations of the rules that are here, for benchmarks/optimizer_step.py.

    pip install -e '.[bench]' && pip install --no-deps timm

A library that is not installed is left out, and a line says so. timm asks for torchvision, which would have to match
the installed torch; its optimizers do not need it, and are loaded without the rest of timm.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

Optimizer = torch.optim.Optimizer
Make = Callable[[Sequence[nn.Parameter]], Optimizer]


def rules_of(submission: str) -> dict[str, Make]:
    """By library: what makes its optimizer for the rule of a submission. foreach: over lists of tensors.

    The rules are the same; details such as the place of ε may differ.
    """
    return {library: make for library, make in _RULES.get(submission, {}).items() if _imports(library.split()[0])}


@cache
def _imports(library: str) -> bool:
    """Whether a library can be used; prints a line if not."""
    try:
        if library == "timm":
            _load_timm_without_models()
        elif library == "heavyball":
            # Its rules compile themselves unless they are told not to; everything here is compared uncompiled.
            importlib.import_module("heavyball").utils.compile_mode = None
        elif library != "torch":
            importlib.import_module(MODULES.get(library, library))
    except ImportError as error:
        print(f"without {library}: {error}", file=sys.stderr)
        return False
    return True


MODULES = {"lion-pytorch": "lion_pytorch", "adan-pytorch": "adan_pytorch", "dog-optimizer": "dog"}
"""Names of modules that differ from those of their packages."""


def _load_timm_without_models() -> None:
    """Make `timm.optim.NAME` importable: its packages as empty modules, whose own imports are not executed."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("No module named 'timm'")
    folder = spec.submodule_search_locations[0]
    for name, path in (("timm", folder), ("timm.optim", f"{folder}/optim")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package


def _rule(path: str, grouped: dict[str, Any] | None = None, **options: Any) -> Make:
    """What makes the class `path` with these options. grouped: options that belong into the parameter group."""
    module, _, name = path.rpartition(".")

    def make(parameters: Sequence[nn.Parameter]) -> Optimizer:
        cls = getattr(importlib.import_module(module), name)
        optimizer: Optimizer = cls([{"params": list(parameters)} | (grouped or {})], **options)
        # Schedule-Free refuses to make a step before it.
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def _timm(path: str, **options: Any) -> dict[str, Make]:
    """timm's optimizer, tensor by tensor and over lists."""
    return {
        "timm": _rule(f"timm.optim.{path}", foreach=False, **options),
        "timm foreach": _rule(f"timm.optim.{path}", foreach=True, **options),
    }


def _pytorch_optimizer(name: str, grouped: dict[str, Any] | None = None, **options: Any) -> dict[str, Make]:
    return {"pytorch_optimizer": _rule(f"pytorch_optimizer.{name}", grouped, **options)}


_GALORE = {"rank": 16, "update_proj_gap": 50, "scale": 1.0, "projection_type": "std"}
_RULES: dict[str, dict[str, Make]] = {
    "adabelief": _pytorch_optimizer("AdaBelief", rectify=False)
    | {"timm": _rule("timm.optim.adabelief.AdaBelief", rectify=False)},
    "adafactor": _pytorch_optimizer("AdaFactor", lr=1e-3)
    | {"timm": _rule("timm.optim.adafactor.Adafactor")}
    | {"torch": _rule("torch.optim.Adafactor", foreach=False)}
    | {"torch foreach": _rule("torch.optim.Adafactor", foreach=True)},
    "adago": _pytorch_optimizer("AdaGO", {"use_muon": True}),
    "adamuon": _pytorch_optimizer("AdaMuon", {"use_muon": True}),
    "adamp": _pytorch_optimizer("AdamP") | {"timm": _rule("timm.optim.adamp.AdamP")},
    "adamw_sn": _pytorch_optimizer("AdamWSN", {"sn": True}),
    "adan": _pytorch_optimizer("Adan") | _timm("adan.Adan") | {"adan-pytorch": _rule("adan_pytorch.Adan")},
    "ademamix": _pytorch_optimizer("AdEMAMix") | {"heavyball": _rule("heavyball.AdEMAMix")},
    "adopt": _pytorch_optimizer("ADOPT")
    | _timm("adopt.Adopt", decoupled=True, clip_exp=0.25)
    | {"heavyball": _rule("heavyball.ADOPT")},
    "apollo": _pytorch_optimizer("APOLLO", _GALORE | {"update_proj_gap": 200, "scale_type": "channel"}),
    "cautious_adamw": {"timm": _rule("timm.optim.adamw.AdamWLegacy", caution=True)},
    "cautious_lion": _timm("lion.Lion", caution=True),
    "conda": _pytorch_optimizer("Conda", {"update_proj_gap": 100, "scale": 1.0, "projection_type": "std"}),
    "diffgrad": _pytorch_optimizer("DiffGrad"),
    "dog": {"dog-optimizer": _rule("dog.DoG", reps_rel=1e-6)},
    "fira": _pytorch_optimizer("Fira", _GALORE | {"update_proj_gap": 200}),
    "galore": _pytorch_optimizer("GaLore", _GALORE),
    "grams": _pytorch_optimizer("Grams"),
    "gravity": _pytorch_optimizer("Gravity"),
    "lamb": _pytorch_optimizer("Lamb") | {"timm": _rule("timm.optim.lamb.Lamb", max_grad_norm=None)},
    "lars": _pytorch_optimizer("LARS") | {"timm": _rule("timm.optim.lars.Lars", lr=1.0, momentum=0.9)},
    "ldog": {"dog-optimizer": _rule("dog.LDoG", reps_rel=1e-6)},
    "lion": _pytorch_optimizer("Lion") | _timm("lion.Lion") | {"lion-pytorch": _rule("lion_pytorch.Lion")},
    "mars_adamw": _pytorch_optimizer("MARS") | {"timm": _rule("timm.optim.mars.Mars")},
    "mars_lion": _pytorch_optimizer("MARS", mars_type="lion")
    | {"timm": _rule("timm.optim.mars.Mars", mars_type="lion")},
    "mars_shampoo": _pytorch_optimizer("MARS", mars_type="shampoo"),
    "muon": _pytorch_optimizer("Muon", {"use_muon": True})
    | {"torch": _rule("torch.optim.Muon")}
    | {"timm": _rule("timm.optim.muon.Muon", nesterov=True)}
    | {"heavyball": _rule("heavyball.Muon")},
    "normuon": _pytorch_optimizer("NorMuon", {"use_muon": True}),
    "novograd": _pytorch_optimizer("NovoGrad") | {"timm": _rule("timm.optim.nvnovograd.NvNovoGrad")},
    "prodigy": _pytorch_optimizer("Prodigy") | {"prodigyopt": _rule("prodigyopt.Prodigy")},
    "psgd_kron": _pytorch_optimizer("Kron")
    | {"timm": _rule("timm.optim.kron.Kron")}
    | {"heavyball": _rule("heavyball.PSGDKron")},
    "qhm": _pytorch_optimizer("QHM"),
    "schedule_free_adamw": _pytorch_optimizer("ScheduleFreeAdamW")
    | {"schedulefree": _rule("schedulefree.AdamWScheduleFree", foreach=False)}
    | {"schedulefree foreach": _rule("schedulefree.AdamWScheduleFree", foreach=True)}
    | {"heavyball": _rule("heavyball.SFAdamW")},
    "schedule_free_sgd": _pytorch_optimizer("ScheduleFreeSGD")
    | {"schedulefree": _rule("schedulefree.SGDScheduleFree", foreach=False)}
    | {"schedulefree foreach": _rule("schedulefree.SGDScheduleFree", foreach=True)},
    "scion": _pytorch_optimizer("SCION"),
    "sgd_sai": _pytorch_optimizer("SGDSaI"),
    "sgdp": _pytorch_optimizer("SGDP", momentum=0.9)
    | {"timm": _rule("timm.optim.sgdp.SGDP", lr=0.1, momentum=0.9, nesterov=True)},
    "sgdw": _pytorch_optimizer("SGDW", momentum=0.9) | _timm("sgdw.SGDW", momentum=0.9),
    "shampoo": _pytorch_optimizer("Shampoo", preconditioning_compute_steps=10),
    "signum": _pytorch_optimizer("SignSGD", momentum=0.9),
    "simplified_ademamix": _pytorch_optimizer("SimplifiedAdEMAMix"),
    "splus": _pytorch_optimizer("SPlus", inverse_steps=20),
    "soap": _pytorch_optimizer("SOAP", precondition_frequency=10)
    | {"heavyball": _rule("heavyball.SOAP", precondition_frequency=10)},
}
# Without it the library's products need terabytes.
if not torch.backends.opt_einsum.is_available():
    del _RULES["psgd_kron"]["pytorch_optimizer"]
