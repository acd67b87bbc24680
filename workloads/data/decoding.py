"""From the bytes of a picture to the pixels that a model sees, in worker processes.

Everything random comes in as a row of uniform numbers, so the pixels are a pure function of the bytes and that row,
whichever process makes them. Pillow decodes (its wheels carry libjpeg-turbo); no torch in here: workers start quickly.

Training: a random part of 8 to 100% of the area at an aspect of 3/4 to 4/3, scaled to the input size (Szegedy et al.
2015, arXiv:1409.4842), mirrored half of the time, then RandAugment where it is wanted. Evaluation: the shorter side
scaled to `resize`, the centre cut out.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import shutil
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from workloads.data.prepared import end_with_parent

ATTEMPTS = 10
"""At a random part that lies inside the picture, before the largest one in the middle is taken."""
DRAWS = 4 * ATTEMPTS + 1 + 2 * 4
"""Uniform numbers for one picture: the parts, the mirroring, and up to two operations of RandAugment."""
ASPECTS = (3 / 4, 4 / 3)
CHUNK = 16
"""Pictures per task of a worker."""

BLOCKS = 8
"""Pieces of shared memory that a worker keeps open; more than are in use at a time."""
SHARED = Path("/dev/shm")

Box = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training picture."""

    min_area: float = 0.08
    flip: bool = True
    operations: int = 0
    """Of RandAugment, at most two."""
    level: int = 10
    """Of RandAugment, at most ten."""


class Blob(NamedTuple):
    """Where the bytes of a picture lie."""

    path: str
    offset: int
    length: int


# ---- one picture ---------------------------------------------------------------------------------------------------


def decode(content: bytes) -> Image.Image:
    """The picture in RGB, whole; OSError or ValueError if it does not decode."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def training_pixels(image: Image.Image, size: int, draws: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """uint8 [size, size, 3]. draws: float64 [DRAWS] in [0, 1)."""
    part = image.crop(random_part(image.width, image.height, draws, augmentation.min_area))
    cut = part.resize((size, size), Image.Resampling.BILINEAR)
    if augmentation.flip and draws[4 * ATTEMPTS] < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for k in range(augmentation.operations):
        first = 4 * ATTEMPTS + 1 + 4 * k
        cut = rand_augment(cut, draws[first : first + 4], augmentation.level)
    return np.asarray(cut)


def evaluation_pixels(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """uint8 [size, size, 3]: the centre of the picture whose shorter side has `resize` pixels."""
    shorter = min(image.size)
    width, height = (max(size, int(side * resize / shorter)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def random_part(width: int, height: int, draws: np.ndarray, min_area: float) -> Box:
    """A part of at least `min_area` of the area. draws: four numbers for each attempt."""
    low, high = (math.log(aspect) for aspect in ASPECTS)
    for area, aspect, x, y in draws[: 4 * ATTEMPTS].reshape(ATTEMPTS, 4).tolist():
        wanted = (min_area + area * (1 - min_area)) * width * height
        ratio = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECTS[1])), min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


OPERATIONS = ("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
              "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
              "cutout")  # fmt: skip
GREY = (128, 128, 128)


def rand_augment(image: Image.Image, draws: np.ndarray, level: int) -> Image.Image:
    """One operation of RandAugment (Cubuk et al. 2020, arXiv:1909.13719), at `level` of ten; magnitudes as in its
    released code and AlgoPerf's. draws: operation, sign, and the place of what is cut out."""
    strength = level / 10
    operation = OPERATIONS[int(draws[0] * len(OPERATIONS))]
    sign = -1.0 if draws[1] < 0.5 else 1.0
    match operation:
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "rotate":
            return image.rotate(sign * 30 * strength, Image.Resampling.NEAREST, fillcolor=GREY)
        case "posterize":
            return ImageOps.posterize(image, max(1, int(4 * strength)))
        case "solarize":
            return ImageOps.solarize(image, int(256 * strength))
        case "solarize_add":
            added = int(110 * strength)
            return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * 3)
        case "color" | "contrast" | "brightness" | "sharpness":
            return getattr(ImageEnhance, operation.capitalize())(image).enhance(0.1 + 1.8 * strength)
        case "shear_x" | "shear_y" | "translate_x" | "translate_y":
            amount = sign * strength * (0.3 if operation.startswith("shear") else 100 / 224 * image.width)
            place = {"shear_x": 1, "translate_x": 2, "shear_y": 3, "translate_y": 5}[operation]
            matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
            matrix[place] = amount
            return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)
        case "cutout":
            half = round(40 / 224 * image.width * strength)
            x, y = int(draws[2] * image.width), int(draws[3] * image.height)
            cut = image.copy()
            cut.paste(
                GREY, (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
            )
            return cut
    return image


# ---- many, in processes --------------------------------------------------------------------------------------------


class Decoders:
    """Worker processes that fill blocks of shared memory with pixels."""

    def __init__(self, size: int, resize: int, augmentation: Augmentation, workers: int | None = None) -> None:
        self._size, self._picture = size, size * size * 3
        self._workers = workers or default_workers()
        self._arguments = (size, resize, augmentation)
        self._pool: ProcessPoolExecutor | None = None
        self._free: list[SharedMemory] = []
        self._lock = Lock()

    def pixels(self, blobs: Sequence[Blob], draws: np.ndarray | None) -> np.ndarray:
        """uint8 [n, size, size, 3] of the caller's own; draws: float64 [n, DRAWS] for training, None for an evaluation.

        Callable from several threads at once. OSError, naming the picture, if one does not decode.
        """
        pool, block = self._started(), self._block(len(blobs) * self._picture)
        try:
            tasks: list[Future[None]] = []
            for i in range(0, len(blobs), CHUNK):
                own = None if draws is None else draws[i : i + CHUNK]
                tasks.append(pool.submit(_fill, block.name, i, list(blobs[i : i + CHUNK]), own))
            failed = [error for task in tasks if (error := task.exception()) is not None]
            if failed:
                raise failed[0]
            shape = (len(blobs), self._size, self._size, 3)
            return np.ndarray(shape, np.uint8, block.buf).copy()
        finally:
            with self._lock:
                self._free.append(block)

    def _started(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # spawn: a fork would copy a process that has threads, and perhaps a GPU.
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self._workers, context, _begin, self._arguments)
                weakref.finalize(self, _close, self._pool, self._free, os.getpid())
            return self._pool

    def _block(self, size: int) -> SharedMemory:
        with self._lock:
            for block in self._free:
                if block.size >= size:
                    self._free.remove(block)
                    return block
            while self._free:  # too small: batches have grown
                _discard(self._free.pop())
            # Writing to shared memory that is not there would kill a worker by a signal, without a word.
            free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else size
            if free < size:
                raise OSError(
                    f"{SHARED} has {free / 1e6:.0f} MB free, and a batch needs {size / 1e6:.0f} MB; make room, or give "
                    "the container more (docker run --shm-size=8g)"
                )
            return SharedMemory(create=True, size=size)


def default_workers() -> int:
    """One process per core that this process may use, shared among the ranks of a node."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _close(pool: ProcessPoolExecutor, blocks: list[SharedMemory], owner: int) -> None:
    if os.getpid() != owner:  # a fork's copy
        return
    pool.shutdown(wait=True, cancel_futures=True)
    for block in blocks:
        _discard(block)


def _discard(block: SharedMemory) -> None:
    block.close()
    block.unlink()


class _Worker:
    """What a worker process keeps."""

    size: int
    resize: int
    augmentation: Augmentation
    blocks: dict[str, SharedMemory]
    files: dict[str, np.memmap]


def _begin(size: int, resize: int, augmentation: Augmentation) -> None:
    end_with_parent()
    _Worker.size, _Worker.resize, _Worker.augmentation = size, resize, augmentation
    _Worker.blocks, _Worker.files = {}, {}


def _fill(block: str, first: int, blobs: list[Blob], draws: np.ndarray | None) -> None:
    if block not in _Worker.blocks:
        if len(_Worker.blocks) >= BLOCKS:  # some of which the parent may have given up
            for known in _Worker.blocks.values():
                known.close()
            _Worker.blocks.clear()
        _Worker.blocks[block] = SharedMemory(block)
    picture = _Worker.size * _Worker.size * 3
    shape = (len(blobs), _Worker.size, _Worker.size, 3)
    pixels = np.ndarray(shape, np.uint8, _Worker.blocks[block].buf, first * picture)
    for i, (path, offset, length) in enumerate(blobs):
        if path not in _Worker.files:
            _Worker.files[path] = np.memmap(path, np.uint8, "r")
        content = _Worker.files[path][offset : offset + length].tobytes()
        try:
            image = decode(content)
        except Exception as error:  # Pillow raises many kinds
            raise OSError(f"the picture at byte {offset} of {path} does not decode ({error})") from error
        if draws is None:
            pixels[i] = evaluation_pixels(image, _Worker.size, _Worker.resize)
        else:
            pixels[i] = training_pixels(image, _Worker.size, draws[i], _Worker.augmentation)
