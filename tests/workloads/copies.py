"""Tiny copies of the full-scale data sets, in every format that the preparation reads."""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

# ---- CIFAR-10 ------------------------------------------------------------------------------------------------------

TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
Batches = dict[str, tuple[np.ndarray, list[int]]]


def cifar_images(per_batch: int = 20) -> Batches:
    """Images uint8 [n, 3, 32, 32] and labels by name of the batch; every class occurs equally often."""
    random = np.random.default_rng(0)
    labels = [i % 10 for i in range(per_batch)]
    return {name: (random.integers(0, 256, (per_batch, 3, 32, 32), np.uint8), labels) for name in (*TRAIN, *TEST)}


def cifar_batch(images: np.ndarray, labels: Sequence[int]) -> bytes:
    """A batch in the release's format: Python 2's pickle, with a module of numpy that has been renamed since."""
    content = {
        b"batch_label": b"x",
        b"labels": list(labels),
        b"data": images.reshape(len(images), -1),
        b"filenames": [],
    }
    return pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_folder(root: Path, batches: Batches) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, (images, labels) in batches.items():
        (folder / name).write_bytes(cifar_batch(images, labels))
    return root


def cifar_archive(root: Path, batches: Batches) -> Path:
    root.mkdir(parents=True)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, (images, labels) in batches.items():
            add_member(archive, f"cifar-10-batches-py/{name}", cifar_batch(images, labels))
    return root


def cifar_parquet(root: Path, batches: Batches) -> Path:
    for split, names in (("train", TRAIN), ("test", TEST)):
        rows = [(image, label) for name in names for image, label in zip(*batches[name], strict=True)]
        images = [
            {"bytes": encode_image(image.transpose(1, 2, 0), "PNG"), "path": f"{i}.png"}
            for i, (image, _) in enumerate(rows)
        ]
        table = pyarrow.table({"img": images, "label": [label for _, label in rows]})
        write_parquet(table, root / "plain_text" / f"{split}-00000-of-00001.parquet")
    return root


# ---- ImageNet ------------------------------------------------------------------------------------------------------

CLASSES = ["n01440764", "n01443537", "n01484850"]
Pictures = dict[str, dict[str, list[bytes]]]


def imagenet_pictures(train: int = 8, validation: int = 3) -> Pictures:
    """The files' bytes by split and class: JPEG of all modes, and a PNG with the name of a JPEG, as in ImageNet."""
    random = np.random.default_rng(1)
    pictures: Pictures = {}
    for split, count in (("train", train), ("validation", validation)):
        pictures[split] = {}
        for label, name in enumerate(CLASSES):
            files = []
            for i in range(count):
                small = random.integers(0, 256, (5, 6, 3), np.uint8)
                size = (int(random.integers(30, 80)), int(random.integers(30, 80)))
                image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
                mode = {(0, 0): "CMYK", (0, 1): "L"}.get((label, i), "RGB")
                kind = "PNG" if (label, i) == (1, 0) and split == "train" else "JPEG"
                files.append(encode_image(np.asarray(image.convert(mode)), kind, mode))
            pictures[split][name] = files
    return pictures


def imagenet_folder(root: Path, pictures: Pictures) -> Path:
    for split, classes in pictures.items():
        for name, files in classes.items():
            folder = root / {"train": "train", "validation": "val"}[split] / name
            folder.mkdir(parents=True)
            for i, content in enumerate(files):
                (folder / f"{name}_{i}.JPEG").write_bytes(content)
    return root


def imagenet_parquet(root: Path, pictures: Pictures, files: int = 2) -> Path:
    for split, classes in pictures.items():
        rows = [(content, label) for label, name in enumerate(classes) for content in classes[name]]
        # As on the hub, in random order.
        rows = [rows[i] for i in np.random.default_rng(2).permutation(len(rows))]
        for k in range(files):
            part = rows[k::files]
            table = pyarrow.table({
                "image": [{"bytes": content, "path": f"{split}_{k}_{i}.JPEG"} for i, (content, _) in enumerate(part)],
                "label": [label for _, label in part],
            })  # fmt: skip
            write_parquet(table, root / "data" / f"{split}-{k:05d}-of-{files:05d}.parquet")
    return root


# ---- OpenWebText ---------------------------------------------------------------------------------------------------


def pages(count: int = 400) -> list[str]:
    """Texts of ten to a hundred words, with difficult cases for a tokeniser."""
    random = np.random.default_rng(3)
    words = [
        "the",
        "of",
        "optimizer's",
        "naïve",
        "  ",
        "\n\n",
        "\r\n",
        "2,048",
        "<|endoftext|>",
        "日本",
        "🙂",
        "gradient",
        "don't",
    ]
    return [" ".join(random.choice(words, int(random.integers(10, 100)))) + f" {i}" for i in range(count)]


def text_parquet(root: Path, texts: list[str], files: int = 3) -> Path:
    for k in range(files):
        write_parquet(
            pyarrow.table({"text": texts[k::files]}), root / "plain_text" / f"train-{k:05d}-of-{files:05d}.parquet"
        )
    return root


def text_files(root: Path, texts: list[str]) -> Path:
    (root / "pages").mkdir(parents=True)
    for i, text in enumerate(texts):
        (root / "pages" / f"{i:05d}.txt").write_text(text, encoding="utf-8", newline="")
    return root


def text_archives(root: Path, texts: list[str], files: int = 3) -> Path:
    """The release's urlsf_subset*.xz: compressed tar archives of texts."""
    root.mkdir(parents=True)
    for k in range(files):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for i, text in enumerate(texts[k::files]):
                add_member(archive, f"{i:07d}-{k}.txt", text.encode())
        (root / f"urlsf_subset{k:02d}_data.xz").write_bytes(lzma.compress(content.getvalue(), preset=0))
    return root


# ---- files ---------------------------------------------------------------------------------------------------------


def encode_image(image: np.ndarray, kind: str, mode: str | None = None) -> bytes:
    content = io.BytesIO()
    picture = Image.fromarray(image) if mode is None else Image.frombytes(mode, image.shape[1::-1], image.tobytes())
    options: dict[str, Any] = {"quality": 90} if kind == "JPEG" else {}
    (picture.convert("RGB") if kind == "PNG" else picture).save(content, kind, **options)
    return content.getvalue()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_parquet(table: pyarrow.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def ignore_progress(done: int, total: int) -> None:
    """A progress report that does nothing."""
