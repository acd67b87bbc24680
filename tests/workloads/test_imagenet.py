"""ImageNet: every format gives the same pictures, and any number of processes decodes them to the same pixels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

from harness.config.compose import load_run
from harness.errors import PreparationError, WorkloadError
from harness.interface.workload import WorkloadSpec
from harness.seeding import splitmix64
from workloads.data import decoding, imagenet
from workloads.data.decoding import DRAWS, Augmentation, ByteRange, Decoders
from workloads.data.prepared import PreparedData
from workloads.data.streamed_images import StreamedImages, uniform_draws
from workloads.vit import ViT

from . import copies
from .copies import Pictures, ignore_progress

PICTURES = copies.imagenet_pictures()
CPU = torch.device("cpu")
SIZE = 24


def prepare(source: Path, root: Path, partial: bool = True, workers: int = 1) -> PreparedData:
    return imagenet.prepare(str(source), root, partial=partial, workers=workers, report=ignore_progress)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PreparedData from class folders."""
    folder = tmp_path_factory.mktemp("imagenet")
    prepare(copies.imagenet_folder(folder / "copy", PICTURES), folder)
    return folder


def stream_images(root: Path, workers: int = 1, operations: int = 0, lookahead: int = 2) -> StreamedImages:
    augmentation = Augmentation(operations=operations)
    return StreamedImages(imagenet.load_splits(str(root))[1], 4, image=SIZE, resize=28, augmentation=augmentation,
                          lookahead=lookahead, device=CPU, workers=workers)  # fmt: skip


# ---- preparation ---------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_numbers_to_the_same_pictures(tmp_path: Path, root: Path) -> None:
    from_folder, _ = imagenet.load_splits(str(root))
    from_parquet = prepare(copies.imagenet_parquet(tmp_path / "parquet", PICTURES), tmp_path / "b")
    by_two_processes = prepare(copies.imagenet_parquet(tmp_path / "p2", PICTURES), tmp_path / "c", workers=2)
    for data in (from_folder, from_parquet, by_two_processes):
        assert data.content == from_folder.content and data.counts == {"train": 24, "validation": 9}
        assert (
            not data.complete
            and "24 of 1,281,167 train pictures" in data.missing_data
            and "3 of 1,000 classes" in data.missing_data
        )
        assert not list(data.folder.glob("*.part.npy")) and not (data.folder / "units").exists()
        pictures = imagenet.Pictures(data, "train")
        stored = [Path(path).read_bytes()[o : o + n] for path, o, n in pictures.locate(np.arange(24))]
        rows = [(label, content) for label, c in enumerate(copies.CLASSES) for content in PICTURES["train"][c]]
        rows.sort(key=lambda row: hashlib.sha256(f"train {row[0]} ".encode() + row[1]).digest())
        assert list(zip(pictures.labels.tolist(), stored, strict=True)) == rows


def test_the_complete_data_set_is_recognised_by_its_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "COUNTS", {"train": 24, "validation": 9})
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    data = prepare(copies.imagenet_folder(tmp_path / "copy", PICTURES), tmp_path, partial=False)
    assert data.complete and data.fingerprint["published"] == "yes"


def test_the_hub_by_datasets(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "HUB", str(copies.imagenet_parquet(tmp_path / "copy", PICTURES)))
    data = imagenet.prepare("hub", tmp_path, partial=True, workers=1, report=ignore_progress)
    assert data.source == "hub" and data.content == imagenet.load_splits(str(root))[0].content


def test_damaged_pictures_are_named_and_repaired_ones_accepted(tmp_path: Path) -> None:
    copy = copies.imagenet_folder(tmp_path / "copy", PICTURES)
    half = copy / "train" / copies.CLASSES[2] / f"{copies.CLASSES[2]}_5.JPEG"
    content = half.read_bytes()
    half.write_bytes(content[: len(content) // 2])
    other = half.with_name("page.JPEG")
    other.write_bytes(b"<html>404</html>")
    with pytest.raises(
        PreparationError, match=rf"2 pictures cannot be decoded: {half} .*truncated.*{other} .*the same command"
    ):
        prepare(copy, tmp_path)
    assert not list((tmp_path / "imagenet").glob("*.bin")) and not list((tmp_path / "imagenet").glob(".*"))
    half.write_bytes(content)
    other.unlink()
    assert prepare(copy, tmp_path).counts["train"] == 24


@pytest.mark.parametrize("damage", ["half", "column", "label", "no bytes"])
def test_damaged_parquet_is_named(tmp_path: Path, damage: str) -> None:
    copy = copies.imagenet_parquet(tmp_path / "copy", PICTURES)
    path = next(copy.rglob("train-00001*"))
    good = {"bytes": PICTURES["train"][copies.CLASSES[0]][2], "path": "a.JPEG"}
    if damage == "half":
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "column":
        copies.write_parquet(pyarrow.table({"image": [good]}), path)
    elif damage == "label":
        # The label of the hub's test split.
        copies.write_parquet(pyarrow.table({"image": [good], "label": [-1]}), path)
    else:
        copies.write_parquet(pyarrow.table({"image": [good, None], "label": [0, 1]}), path)
    with pytest.raises(PreparationError, match=rf"{path}, row \d+ cannot be read"):
        prepare(copy, tmp_path)


def test_missing_splits_and_classes(tmp_path: Path) -> None:
    only_train: Pictures = {"train": PICTURES["train"]}
    for make in (copies.imagenet_folder, copies.imagenet_parquet):
        copy = make(tmp_path / make.__name__, only_train)
        with pytest.raises(PreparationError, match="no pictures of the split validation"):
            prepare(copy, tmp_path)
    fewer: Pictures = {
        "train": {c: PICTURES["train"][c] for c in copies.CLASSES[:2]},
        "validation": PICTURES["validation"],
    }
    with pytest.raises(PreparationError, match=f"that the training split lacks .{copies.CLASSES[2]}"):
        prepare(copies.imagenet_folder(tmp_path / "fewer", fewer), tmp_path)
    with pytest.raises(PreparationError, match=r"not the complete ImageNet-1k .24 of .*--partial"):
        prepare(copies.imagenet_folder(tmp_path / "part", PICTURES), tmp_path, partial=False)
    with pytest.raises(PreparationError, match="no such folder"):
        prepare(tmp_path / "nowhere", tmp_path)


# ---- pixels of one picture -----------------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(width).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_random_crops_are_inside_and_have_the_right_areas_and_aspects() -> None:
    draws = uniform_draws(np.arange(4000), DRAWS)
    areas, aspects = [], []
    for row in draws:
        left, top, right, bottom = decoding.random_crop_box(400, 300, row, 0.08)
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / 120_000)
        aspects.append((right - left) / (bottom - top))
    assert 0.079 < min(areas) < 0.09 and 0.95 < max(areas) <= 1
    assert 0.74 < min(aspects) < 0.77 and 1.3 < max(aspects) < 1.345
    square = [decoding.random_crop_box(300, 300, row, 0.08) for row in draws]
    assert abs(np.median([(right - left) / (bottom - top) for left, top, right, bottom in square]) - 1) < 0.03
    # Both sides of the picture are cut off equally often.
    lefts = [decoding.random_crop_box(400, 300, row, 0.5)[0] for row in draws[:500]]
    rights = [400 - decoding.random_crop_box(400, 300, row, 0.5)[2] for row in draws[:500]]
    assert abs(np.mean(lefts) - np.mean(rights)) < 10


def test_a_picture_too_narrow_for_every_attempt_is_cropped_centrally() -> None:
    draws = np.full(DRAWS, 0.999)
    assert decoding.random_crop_box(1000, 10, draws, 0.9) == (493, 0, 506, 10)
    assert decoding.random_crop_box(10, 1000, draws, 0.9) == (0, 493, 10, 506)


def test_evaluation_is_the_centre_of_the_scaled_picture() -> None:
    image = picture(90, 60)
    scaled = np.asarray(image.resize((42, 28), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decoding.evaluation_pixels(image, 24, 28), scaled[2:26, 9:33])
    assert decoding.evaluation_pixels(picture(5, 7), 24, 28).shape == (24, 24, 3)


def test_mirroring() -> None:
    draws = np.full(DRAWS, 0.5)
    draws[40] = 0.6
    plain = decoding.training_pixels(picture(60, 50), SIZE, draws, Augmentation())
    draws[40] = 0.4
    np.testing.assert_array_equal(
        decoding.training_pixels(picture(60, 50), SIZE, draws, Augmentation()), plain[:, ::-1]
    )
    np.testing.assert_array_equal(
        decoding.training_pixels(picture(60, 50), SIZE, draws, Augmentation(flip=False)), plain
    )


@pytest.mark.parametrize("operation", decoding.OPERATIONS)
def test_operations_of_randaugment_against_numpy(operation: str) -> None:
    """At level 10. Operations that resample are checked by the pixels that must move."""
    rng = np.random.default_rng(5)
    raw = rng.integers(30, 220, (224, 224, 3), np.uint8)
    image = Image.fromarray(raw)
    number = (decoding.OPERATIONS.index(operation) + 0.5) / len(decoding.OPERATIONS)
    plus, minus = (
        np.asarray(decoding.apply_randaugment(image, np.array([number, s, 0.5, 0.25]), 10)) for s in (0.9, 0.1)
    )
    wide = raw.astype(int)
    exact = {
        "invert": lambda: 255 - wide,
        "posterize": lambda: wide & 0xF0,
        # No pixel is brighter than the threshold of 256.
        "solarize": lambda: wide,
        "solarize_add": lambda: np.where(wide < 128, np.minimum(wide + 110, 255), wide),
        "brightness": lambda: np.minimum((wide * 1.9).astype(int), 255),
    }
    assert plus.shape == raw.shape
    if operation in exact:
        np.testing.assert_array_equal(plus, exact[operation]())
    elif operation.startswith("translate"):
        axis = 1 if operation.endswith("x") else 0
        moved = np.take(raw, range(100, 224), axis)
        np.testing.assert_array_equal(np.take(plus, range(124), axis), moved)
        assert (np.take(plus, range(124, 224), axis) == 128).all() and (np.take(minus, range(100), axis) == 128).all()
    elif operation == "cutout":
        assert (plus[16:96, 72:152] == 128).all() and (plus[:16] == raw[:16]).all() and (plus[96:] == raw[96:]).all()
    elif operation.startswith("shear") or operation == "rotate":
        assert (plus == 128).all(2).sum() > 2000 and not np.array_equal(plus, minus)
    elif operation in ("autocontrast", "equalize"):
        assert plus.min() == 0 and plus.max() == 255
    # color, contrast, sharpness: further from the grey, mean or smoothed picture.
    else:
        assert plus.std() > raw.std() or operation == "color"
        assert not np.array_equal(plus, raw)


def test_level_0_translates_by_nothing() -> None:
    raw = np.asarray(picture(224, 224))
    number = (decoding.OPERATIONS.index("translate_x") + 0.5) / len(decoding.OPERATIONS)
    augmented = decoding.apply_randaugment(picture(224, 224), np.array([number, 0.9, 0, 0]), 0)
    np.testing.assert_array_equal(np.asarray(augmented), raw)


def test_against_torchvision() -> None:
    """Crop, scaling and mirroring of the same boxes, and the evaluation's transform."""
    # A torchvision for GPUs does not register these operators with a torch for CPUs.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pytest.importorskip("torchvision")
    from torchvision.transforms import v2

    for image in (picture(90, 60), picture(61, 143)):
        transform = v2.Compose([v2.Resize(28), v2.CenterCrop(24)])
        np.testing.assert_array_equal(decoding.evaluation_pixels(image, 24, 28), np.asarray(transform(image)))
        for key in range(5):
            draws = uniform_draws(np.array([key]), DRAWS)[0]
            left, top, right, bottom = decoding.random_crop_box(*image.size, draws, 0.08)
            expected = v2.functional.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE])
            pixels = decoding.training_pixels(image, SIZE, draws, Augmentation(flip=False))
            np.testing.assert_array_equal(pixels, np.asarray(expected))


# ---- batches -------------------------------------------------------------------------------------------------------


def test_uniform_numbers_are_uniform_and_a_function_of_the_key() -> None:
    keys = splitmix64(np.arange(2000, dtype=np.uint64)).astype(np.int64) & (2**63 - 1)
    draws = uniform_draws(keys, DRAWS)
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.08
    np.testing.assert_array_equal(uniform_draws(keys[5:6], 3)[0], draws[5, :3])


def test_a_batch_is_a_function_of_indices_and_keys_for_any_workers(root: Path, keys: torch.Tensor) -> None:
    one_worker, two_workers = stream_images(root, 1, operations=2), stream_images(root, 2, operations=2)
    assert len(one_worker) == 24 - 4
    indices = torch.randint(20, (64,), generator=torch.Generator().manual_seed(0))
    batch = one_worker.batch(indices, keys)
    assert batch["inputs"].shape == (64, 3, SIZE, SIZE) and batch["inputs"].dtype == torch.float32
    two_workers.prefetch(indices, keys)
    two_workers.prefetch(indices[:7], keys[:7])
    prefetched = two_workers.batch(indices, keys)
    parts = [two_workers.batch(i, k) for i, k in zip(indices.split(7), keys.split(7), strict=True)]
    for name in ("inputs", "labels"):
        assert torch.equal(batch[name], prefetched[name])
        assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
    # One picture computed separately.
    (location,) = imagenet.load_splits(str(root))[1]["train"].locate(np.array([indices[3].item() + 4]))
    content = Path(location.path).read_bytes()[location.offset : location.offset + location.length]
    draws = uniform_draws(keys[3:4].numpy(), DRAWS)[0]
    pixels = decoding.training_pixels(decoding.decode_picture(content), SIZE, draws, Augmentation(operations=2))
    normalised = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch["inputs"][3].permute(1, 2, 0), normalised, atol=1e-5)


def test_evaluation_is_in_order_and_the_test_split_is_not_trained_on(root: Path) -> None:
    images = stream_images(root)
    splits = imagenet.load_splits(str(root))[1]
    validation, test = (list(images.evaluation_batches(split, 4)) for split in ("validation", "test"))
    assert [len(batch["labels"]) for batch in validation] == [4, 4, 1] and len(test) == 1
    (second,) = images.evaluation_batches("validation", 4, slice(1, None, 2))
    assert torch.equal(second["inputs"], validation[1]["inputs"])
    assert torch.cat([b["labels"] for b in validation]).tolist() == splits["validation"].labels.tolist()
    assert test[0]["labels"].tolist() == splits["train"].labels[:4].tolist()
    train = images.batch(torch.arange(20), torch.zeros(20, dtype=torch.int64))
    assert train["labels"].tolist() == splits["train"].labels[4:].tolist()


def test_a_picture_damaged_after_the_preparation_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    content = io.BytesIO()
    picture(60, 60).save(content, "JPEG")
    path.write_bytes(content.getvalue() + content.getvalue()[:200])
    locations = [ByteRange(str(path), 0, content.tell()), ByteRange(str(path), content.tell(), 200)]
    decoders = Decoders(SIZE, 28, Augmentation(), workers=1)
    with pytest.raises(OSError, match=rf"the picture at byte {content.tell()} of {path} cannot be decoded"):
        decoders.load_pixels(locations, None)
    assert decoders.load_pixels(locations[:1], None).shape == (1, SIZE, SIZE, 3)


def test_growing_batches_free_the_smaller_blocks(tmp_path: Path) -> None:
    path = tmp_path / "some.bin"
    picture(60, 60).save(path, "JPEG")
    location = ByteRange(str(path), 0, path.stat().st_size)
    decoders = Decoders(SIZE, 28, Augmentation(), workers=1)
    for count in range(1, 30, 3):
        pixels = decoders.load_pixels([location] * count, None)
        assert (pixels == pixels[0]).all()
        assert [block.size for block in decoders._free] == [count * SIZE * SIZE * 3]


def test_too_little_shared_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"/dev/shm has 0 MB free, .*--shm-size"):
        Decoders(SIZE, 28, Augmentation(), workers=1).load_pixels([ByteRange("nothing", 0, 1)], None)


PARENT = """
import sys, time
from workloads.data.decoding import Augmentation, ByteRange, Decoders
if __name__ == "__main__":
    decoders = Decoders(24, 28, Augmentation(), workers=1)
    decoders.load_pixels([ByteRange(sys.argv[1], 0, int(sys.argv[2]))], None)
    print(*decoders._pool._processes, flush=True)
    time.sleep(600)
"""


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """A killed trial leaves no process behind."""
    path, script = tmp_path / "some.bin", tmp_path / "parent.py"
    picture(60, 60).save(path, "JPEG")
    script.write_text(PARENT)
    arguments = [sys.executable, str(script), str(path), str(path.stat().st_size)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [Path(f"/proc/{worker}") for worker in parent.stdout.readline().split()]
        assert workers and all(path.exists() for path in workers)
        parent.kill()
    deadline = time.monotonic() + 60
    while any(path.exists() for path in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(path.exists() for path in workers)


# ---- as a workload -------------------------------------------------------------------------------------------------


def vit(root: Path, *arguments: str) -> ViT:
    small = ["workload.model={image: 24, patch: 8, layers: 1, width: 16, heads: 2, classes: 3}",
             "workload.data.image=24", "workload.data.resize=28", "workload.data.test_size=4"]  # fmt: skip
    spec: WorkloadSpec = load_run(["workload=vit", "scale=full", "optimizer=sgd", *small, *arguments]).spec
    workload = ViT(spec)
    workload.load(str(root), CPU)
    return workload


def test_mixup_within_micro_batches(root: Path, keys: torch.Tensor) -> None:
    sizes = ["workload.nominal_batch=10", "workload.micro_batch=5"]
    plain, mixed = vit(root, *sizes, "workload.data.mixup=0"), vit(root, *sizes, "workload.data.mixup=0.2")
    indices, keys = torch.arange(10), keys[:10]
    raw, batch = plain.batch(indices, keys), mixed.batch(indices, keys)
    shares = []
    for i in range(10):
        other = i // 5 * 5 + (i % 5 + 1) % 5
        a, b = (torch.nn.functional.one_hot(raw["labels"][j], 3).float() for j in (i, other))
        difference = raw["inputs"][i] - raw["inputs"][other]
        share = ((batch["inputs"][i] - raw["inputs"][other]) * difference).sum() / difference.square().sum()
        torch.testing.assert_close(batch["inputs"][i], share * raw["inputs"][i] + (1 - share) * raw["inputs"][other])
        torch.testing.assert_close(batch["labels"][i], share * a + (1 - share) * b)
        shares.append(share.item())
    assert np.ptp(shares[:5]) < 1e-4 and np.ptp(shares[5:]) < 1e-4 and abs(shares[0] - shares[5]) > 1e-3
    # Another rank computes the same from its micro-batch alone.
    half = mixed.batch(indices[5:], keys[5:])
    assert all(torch.equal(half[name], batch[name][5:]) for name in batch)
    outputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    each = -(batch["labels"] * outputs.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(mixed.loss(outputs, batch, "none"), each)
    sampled = batch | {"labels": mixed.sample_labels(outputs, torch.Generator().manual_seed(0))}
    torch.testing.assert_close(
        mixed.loss(outputs, sampled), torch.nn.functional.cross_entropy(outputs, sampled["labels"])
    )


def test_mixing_shares_follow_the_beta_distribution(root: Path) -> None:
    from scipy import stats

    from workloads.image_classification import mixup_shares

    keys = splitmix64(np.arange(3000, dtype=np.uint64)).astype(np.int64) & (2**63 - 1)
    assert stats.kstest(mixup_shares(keys, 0.2), stats.beta(0.2, 0.2).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("argument", "message"),
    [("workload.model.classes=2", "workload.model.classes=2: the labels go up to 2"),
     ("workload.data.test_size=24", "test_size=24 leaves nothing")],
)  # fmt: skip
def test_options_that_do_not_fit_the_data_are_refused(root: Path, argument: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        vit(root, argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("workload.data.resize=20", "resize=20 must be at least image=24"),
     ("workload.data.test_size=null", "test_size is missing"),
     ("workload.data.randaugment=3", "randaugment"),
     ("workload.model.pooling=token", "positions=sincos2d needs")],
)  # fmt: skip
def test_bad_options_are_named(root: Path, argument: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        vit(root, argument)
