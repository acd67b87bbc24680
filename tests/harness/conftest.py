from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from harness.config.choices import CONFIG_DIR, target_file


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of configs/ in which gpt2's variant silu has the target 1.5, and res-post-norm none."""
    copy = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, copy)
    monkeypatch.setattr("harness.config.choices.CONFIG_DIR", copy)
    for variant, target in (("silu", "1.5"), ("res-post-norm", "null")):
        path = target_file("gpt2", "mini", variant)
        text = path.read_text().partition("target_provenance:")[0]
        path.write_text(re.sub("^target: .*$", f"target: {target}", text, flags=re.MULTILINE))
    return copy
