"""The evidence of a trial, gathered from its training for the record (docs/fair_play.md)."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import ProcessKilled
from harness.records.layout import SOURCES
from harness.records.manifest import Evidence, KeptWeights
from harness.trial.record import Record
from harness.trial.remote_training import AnyTraining, SubmissionFailed
from harness.trial.weights import hash_weights

_OF_PACEMARK = "submissions."
"""Modules of which the record keeps no text: the repository has it."""


class WeightsKeeper:
    """Keeps the weights of evaluations for judge=replay."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._hash = ""

    def remember(self, model: nn.Module) -> None:
        """Note the weights of the evaluation that is made now."""
        self._last = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self._hash = hash_weights(model)

    def write(self, record: Record, name: str, row: int) -> None:
        """Write the weights that were noted last into the record. row: index of their evaluation. Raises LeaseLost and
        OSError."""
        if not self._last or record.manifest is None or record.manifest.evidence is None:
            return
        buffer = io.BytesIO()
        torch.save(self._last, buffer)
        record.write_extra(name, buffer.getvalue())
        kept = record.manifest.evidence.kept_weights | {name: KeptWeights(row=row, sha256=self._hash)}
        record.manifest.evidence.kept_weights = kept


def write_evidence(training: AnyTraining, record: Record) -> None:
    """Put what is known of the submission into the record's manifest, which the caller writes, and the submission's
    sources beside it. Raises LeaseLost and OSError."""
    assert record.manifest is not None and record.manifest.evidence is not None
    fields: dict[str, Any] = {
        "initial_weights_sha256": training.initial_weights_sha256,
        "built_weights_sha256": training.built_weights_sha256,
    }
    try:
        fields |= training.collect_evidence()
    except (SubmissionFailed, ProcessKilled):
        # Its process is gone. How it ended is in the record.
        fields["sources"] = {}
    texts = {module: text for module, text in fields.pop("texts", {}).items() if not module.startswith(_OF_PACEMARK)}
    structure = training.model_structure if training.is_built else []
    fields["model_sha256"] = hashlib.sha256("\n".join(structure).encode()).hexdigest()
    known = record.manifest.evidence.model_dump(exclude_unset=True)
    record.manifest.evidence = Evidence(**(known | fields))
    if texts and record.run.judge != "none":
        record.write_extra(SOURCES, json.dumps(texts, indent=1, sort_keys=True).encode())
