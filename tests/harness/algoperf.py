"""AlgoPerf's v0.5 external competition: what was scored, and what was published."""

from __future__ import annotations

import os
from pathlib import Path

from harness.scoring.targets import Target, Targets

# previous_leaderboards/algoperf_v05/README.md of mlcommons/submissions_algorithms.
PUBLISHED = {
    "shampoo_submission": 0.7784,
    "schedule_free_adamw": 0.7077,
    "generalized_adam": 0.6383,
    "cyclic_lr": 0.6301,
    "nadamp": 0.5909,
    "baseline": 0.5707,
    "amos": 0.4918,
    "caspr_adaptive": 0.4722,
    "lawa_queue": 0.3699,
    "lawa_ema": 0.3384,
    "schedule_free_prodigy": 0.0,
}
# workload_targets_v05.json there.
_VALUES = {
    "criteo1tb": ("loss", "min", 0.123735),
    "fastmri": ("ssim", "max", 0.723653),
    "imagenet_resnet": ("accuracy", "max", 0.77431),
    "imagenet_vit": ("accuracy", "max", 0.77309),
    "librispeech_conformer": ("wer", "min", 0.085884),
    "librispeech_deepspeech": ("wer", "min", 0.119936),
    "ogbg": ("mean_average_precision", "max", 0.28098),
    "wmt": ("bleu", "max", 30.8491),
    "criteo1tb_embed_init": ("loss", "min", 0.129657),
    "fastmri_tanh": ("ssim", "max", 0.71784),
    "imagenet_resnet_large_bn_init": ("accuracy", "max", 0.76526),
    "librispeech_conformer_layernorm": ("wer", "min", 0.09731),
    "ogbg_model_size": ("mean_average_precision", "max", 0.269446),
    "wmt_glu_tanh": ("bleu", "max", 29.5779),
}
TARGETS = Targets(
    tuple(_VALUES)[:8],
    tuple(_VALUES)[8:],
    {name: Target(metric, direction, value) for name, (metric, direction, value) in _VALUES.items()},  # type: ignore[arg-type]
)
TABLE = Path(__file__).parents[1] / "data" / "algoperf_v05_external.csv"
ARCHIVE = Path(os.environ.get("ALGOPERF_V05", Path(__file__).parents[3] / "shared" / "algoperf"))
"""Folder with v05_external.tar.xz and targets_v05.json."""
