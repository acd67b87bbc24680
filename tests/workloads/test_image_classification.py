from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from harness.interface.workload import WorkloadSpec
from workloads.data import fashion_mnist
from workloads.data.fashion_mnist import Images
from workloads.image_classification import ImageClassification
from workloads.resnet import ResNet

from .conftest import Splits

CPU = torch.device("cpu")
Load = Callable[..., ImageClassification]


@pytest.fixture
def load_workload(make_spec: Callable[..., WorkloadSpec], idx_folder: Path) -> Load:
    """A workload on 300 images of noise, 50 of them for validation."""

    def loaded(**options: object) -> ImageClassification:
        workload = ResNet(make_spec("resnet", data={"validation_size": 50, "evaluation_batch": 20} | options))
        workload.load(str(idx_folder), CPU)
        return workload

    return loaded


def all_examples(workload: ImageClassification, split: str) -> tuple[Tensor, Tensor]:
    """All images and labels of a split; `train` only makes sense without augmentation."""
    if split == "train":
        indices = torch.arange(workload.train_size)
        batches = [workload.batch(indices, torch.zeros_like(indices))]
    else:
        batches = list(workload.evaluation_batches("validation" if split == "validation" else "test"))
    return torch.cat([batch["inputs"] for batch in batches]), torch.cat([batch["labels"] for batch in batches])


def test_splits_are_disjoint_and_normalised_alike(load_workload: Load, noise: Splits) -> None:
    workload = load_workload(pad=0, flip=False)
    raw = torch.tensor(noise["train"].images).double()
    mean, deviation = raw[:250].mean(), raw[:250].std(correction=0)
    expected = {"train": raw[:250], "validation": raw[250:], "test": torch.tensor(noise["test"].images).double()}
    labels = {
        "train": noise["train"].labels[:250],
        "validation": noise["train"].labels[250:],
        "test": noise["test"].labels,
    }
    for split, images in expected.items():
        inputs, classes = all_examples(workload, split)
        assert inputs.shape == (len(images), 1, 28, 28) and inputs.dtype == torch.float32
        torch.testing.assert_close(inputs.squeeze(1).double() * deviation + mean, images, atol=1e-3, rtol=0)
        assert classes.tolist() == labels[split].tolist()


def test_augmentation_one_image_at_a_time(load_workload: Load, keys: Tensor) -> None:
    indices = torch.arange(64)
    plain = load_workload(pad=0, flip=False).batch(indices, keys)["inputs"]
    augmented = load_workload(pad=3, flip=True).batch(indices, keys)["inputs"]
    for inputs, image, key in zip(augmented, plain, keys.tolist(), strict=True):
        row, column = (key & 0xFFFF) % 7, (key >> 16 & 0xFFFF) % 7
        crop = F.pad(image, [3] * 4)[:, row : row + 28, column : column + 28]
        assert torch.equal(inputs, crop.flip(-1) if key >> 32 & 1 else crop)


def test_without_flip_no_key_mirrors(load_workload: Load) -> None:
    still, mirrored = torch.tensor([0]), torch.tensor([1 << 32])
    for flip in (False, True):
        workload = load_workload(pad=0, flip=flip)
        a, b = (workload.batch(torch.tensor([7]), key)["inputs"] for key in (still, mirrored))
        assert torch.equal(b, a.flip(-1) if flip else a)


def test_batch_is_a_pure_function_of_indices_and_keys(load_workload: Load, keys: Tensor) -> None:
    workload = load_workload(pad=2, flip=True)
    indices = torch.randint(250, (64,), generator=torch.Generator().manual_seed(1))
    batch = workload.batch(indices, keys)
    parts = [workload.batch(i, k) for i, k in zip(indices.split(10), keys.split(10), strict=True)]
    for name in ("inputs", "labels"):
        assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
    # The caller may change a batch without changing the data.
    batch["inputs"].zero_()
    assert torch.equal(workload.batch(indices[:10], keys[:10])["inputs"], parts[0]["inputs"])


def test_evaluation_batches_are_of_the_configured_size(load_workload: Load) -> None:
    assert [len(batch["labels"]) for batch in load_workload().evaluation_batches("validation")] == [20, 20, 10]
    assert [len(batch["labels"]) for batch in load_workload().evaluation_batches("validation", slice(0, None, 2))] == [
        20,
        10,
    ]


def test_losses_and_metrics_agree(load_workload: Load) -> None:
    workload = load_workload()
    batch = next(workload.evaluation_batches("test"))
    outputs = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    mean, each = workload.loss(outputs, batch), workload.loss(outputs, batch, reduction="none")
    assert each.shape == (20,)
    torch.testing.assert_close(each.mean(), mean)
    sums = workload.evaluation_sums(outputs, batch)
    torch.testing.assert_close(sums["loss"] / sums["num_examples"], mean)
    correct = [row.argmax().item() == label for row, label in zip(outputs, batch["labels"].tolist(), strict=True)]
    assert sums["accuracy"].item() == sum(correct)


def test_sampled_labels_follow_the_prediction(load_workload: Load) -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    labels = load_workload().sample_labels(probabilities.log().expand(20_000, 3), torch.Generator().manual_seed(0))
    assert labels.shape == (20_000,)
    torch.testing.assert_close(labels.bincount() / len(labels), probabilities, atol=0.015, rtol=0)


def test_fingerprint(load_workload: Load, noise: Splits, idx_folder: Path) -> None:
    hashes = {name: split.sha256 for name, split in noise.items()}
    assert load_workload().fingerprint == {"name": "fashion-mnist", "source": "folder"} | hashes


@pytest.mark.parametrize("options", [{"validation_size": 0}, {"validation_size": 60_000}, {"pad": -1}, {"padding": 2}])
def test_bad_options_are_named(load_workload: Load, options: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        load_workload(**options)


def test_real_images(
    make_spec: Callable[..., WorkloadSpec], fashion_mnist_data: dict[str, Images], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "load_splits", lambda source: (source, fashion_mnist_data))
    workload = ResNet(make_spec("resnet", data={"pad": 0, "flip": False}))
    workload.load("auto", CPU)
    validation_size = workload.data_options.validation_size
    assert workload.train_size == 60_000 - validation_size
    images, labels = all_examples(workload, "validation")
    assert len(labels) == validation_size
    # The order of the files is random, so the cut is a fair sample.
    assert abs(images.mean()) < 0.02 and abs(images.std() - 1) < 0.02
    assert labels.bincount().float().div(validation_size).sub(0.1).abs().max() < 0.02
    assert len(all_examples(workload, "test")[1]) == 10_000
