"""Decoding and augmentation of pictures in worker processes: from a file's bytes to the pixels of a model's input.

All randomness comes in as a row of uniform numbers. The pixels are a pure function of the bytes and that row, whichever
process computes them. Pillow decodes (its wheels contain libjpeg-turbo). This module does not import torch, so that
workers start quickly.

Training: a random crop of 8 to 100% of the area with an aspect ratio of 3/4 to 4/3, scaled to the input size (Szegedy
et al. 2015, arXiv:1409.4842), mirrored half of the time, then optionally RandAugment. Evaluation: the shorter side is
scaled to `resize`, and the centre is cropped.
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

from workloads.data.prepared import exit_with_parent

ATTEMPTS = 10
"""Random crops that are tried until one lies inside the picture; then the largest central crop is used."""
DRAWS = 4 * ATTEMPTS + 1 + 2 * 4
"""Uniform numbers for one picture: the crops, the mirroring, and up to two operations of RandAugment."""
ASPECTS = (3 / 4, 4 / 3)
CHUNK = 16
"""Pictures per task of a worker."""

MAX_OPEN_BLOCKS = 8
"""Blocks of shared memory that a worker keeps open; more than are in use at a time."""
SHARED_MEMORY = Path("/dev/shm")

Box = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels."""


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training pictures."""

    min_area: float = 0.08
    """Smallest share of the area that is cropped."""
    flip: bool = True
    """Whether to mirror left-right half of the time."""
    operations: int = 0
    """Number of RandAugment's operations, at most two."""
    level: int = 10
    """RandAugment's level, at most ten."""


class ByteRange(NamedTuple):
    """The location of a picture's bytes in a file."""

    path: str
    offset: int
    length: int


# ---- one picture ---------------------------------------------------------------------------------------------------


def decode_picture(content: bytes) -> Image.Image:
    """The complete picture in RGB. Raises OSError or ValueError if it cannot be decoded."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def training_pixels(image: Image.Image, size: int, draws: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """The augmented input uint8 [size, size, 3]. draws: float64 [DRAWS] in [0, 1)."""
    crop = image.crop(random_crop_box(image.width, image.height, draws, augmentation.min_area))
    scaled = crop.resize((size, size), Image.Resampling.BILINEAR)
    if augmentation.flip and draws[4 * ATTEMPTS] < 0.5:
        scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for k in range(augmentation.operations):
        first = 4 * ATTEMPTS + 1 + 4 * k
        scaled = apply_randaugment(scaled, draws[first : first + 4], augmentation.level)
    return np.asarray(scaled)


def evaluation_pixels(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """The input uint8 [size, size, 3]: the centre of the picture scaled to a shorter side of `resize` pixels."""
    shorter = min(image.size)
    width, height = (max(size, int(side * resize / shorter)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def random_crop_box(width: int, height: int, draws: np.ndarray, min_area: float) -> Box:
    """A random box with at least the share `min_area` of the area; the largest central one if no attempt fits.

    draws: four numbers for each attempt, float64 [4 * ATTEMPTS or more].
    """
    low, high = (math.log(aspect) for aspect in ASPECTS)
    for area_draw, aspect_draw, x, y in draws[: 4 * ATTEMPTS].reshape(ATTEMPTS, 4).tolist():
        area = (min_area + area_draw * (1 - min_area)) * width * height
        ratio = math.exp(low + aspect_draw * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
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


def apply_randaugment(image: Image.Image, draws: np.ndarray, level: int) -> Image.Image:
    """Apply one operation of RandAugment (Cubuk et al. 2020, arXiv:1909.13719) at `level` of ten.

    Magnitudes as in its released code and AlgoPerf's. draws: float64 [4] for the operation, its sign, and the centre of
    a cutout.
    """
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
            increase = int(110 * strength)
            return image.point([min(255, v + increase) if v < 128 else v for v in range(256)] * 3)
        case "color" | "contrast" | "brightness" | "sharpness":
            return getattr(ImageEnhance, operation.capitalize())(image).enhance(0.1 + 1.8 * strength)
        case "shear_x" | "shear_y" | "translate_x" | "translate_y":
            amount = sign * strength * (0.3 if operation.startswith("shear") else 100 / 224 * image.width)
            index = {"shear_x": 1, "translate_x": 2, "shear_y": 3, "translate_y": 5}[operation]
            matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
            matrix[index] = amount
            return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)
        case "cutout":
            half = round(40 / 224 * image.width * strength)
            x, y = int(draws[2] * image.width), int(draws[3] * image.height)
            result = image.copy()
            result.paste(
                GREY, (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
            )
            return result
    return image


# ---- batches, in worker processes ----------------------------------------------------------------------------------


class Decoders:
    """Worker processes that decode pictures into blocks of shared memory.

    size, resize: see `evaluation_pixels`. workers: processes (default: one per core).
    """

    def __init__(self, size: int, resize: int, augmentation: Augmentation, workers: int | None = None) -> None:
        self._size, self._picture_bytes = size, size * size * 3
        self._workers = workers or default_workers()
        self._arguments = (size, resize, augmentation)
        self._pool: ProcessPoolExecutor | None = None
        self._free: list[SharedMemory] = []
        self._lock = Lock()

    def load_pixels(self, pictures: Sequence[ByteRange], draws: np.ndarray | None) -> np.ndarray:
        """The inputs uint8 [n, size, size, 3] of n pictures, as a new array. Can be called from several threads.

        draws: float64 [n, DRAWS] for training, None for an evaluation. Raises OSError, which names the picture, if one
        cannot be decoded, or if there is too little shared memory.
        """
        pool, block = self._start_pool(), self._acquire_block(len(pictures) * self._picture_bytes)
        try:
            tasks: list[Future[None]] = []
            for i in range(0, len(pictures), CHUNK):
                chunk_draws = None if draws is None else draws[i : i + CHUNK]
                tasks.append(pool.submit(_fill_block, block.name, i, list(pictures[i : i + CHUNK]), chunk_draws))
            # Waits for all tasks even if one has failed: the block is used again.
            errors = [error for task in tasks if (error := task.exception()) is not None]
            if errors:
                raise errors[0]
            shape = (len(pictures), self._size, self._size, 3)
            return np.ndarray(shape, np.uint8, block.buf).copy()
        finally:
            with self._lock:
                self._free.append(block)

    def _start_pool(self) -> ProcessPoolExecutor:
        """The worker processes, started by the first call."""
        with self._lock:
            if self._pool is None:
                # spawn: a fork would copy a process that has threads, and perhaps a GPU.
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, self._arguments)
                weakref.finalize(self, _close, self._pool, self._free, os.getpid())
            return self._pool

    def _acquire_block(self, size: int) -> SharedMemory:
        """A free block of at least `size` bytes, or a new one. Raises OSError if there is too little shared memory."""
        with self._lock:
            for block in self._free:
                if block.size >= size:
                    self._free.remove(block)
                    return block
            # All free blocks are too small, since batches have grown.
            while self._free:
                _delete_block(self._free.pop())
            # Writing beyond the available shared memory would kill a worker by a signal, without a message.
            free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else size
            if free < size:
                raise OSError(
                    f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and a batch needs {size / 1e6:.0f} MB; make room, "
                    "or give the container more (docker run --shm-size=8g)"
                )
            return SharedMemory(create=True, size=size)


def default_workers() -> int:
    """One process per core that this process may use, divided among the ranks of a node."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _close(pool: ProcessPoolExecutor, blocks: list[SharedMemory], owner: int) -> None:
    """End the worker processes and delete the blocks, if this is the process `owner`."""
    # A forked process inherits the finalizer.
    if os.getpid() != owner:
        return
    pool.shutdown(wait=True, cancel_futures=True)
    for block in blocks:
        _delete_block(block)


def _delete_block(block: SharedMemory) -> None:
    block.close()
    block.unlink()


class _Worker:
    """The state of a worker process: arguments, open blocks by name and memory-mapped files by path."""

    size: int
    resize: int
    augmentation: Augmentation
    blocks: dict[str, SharedMemory]
    files: dict[str, np.memmap]


def _start_worker(size: int, resize: int, augmentation: Augmentation) -> None:
    exit_with_parent()
    _Worker.size, _Worker.resize, _Worker.augmentation = size, resize, augmentation
    _Worker.blocks, _Worker.files = {}, {}


def _fill_block(block: str, first: int, pictures: list[ByteRange], draws: np.ndarray | None) -> None:
    """Decode pictures into a block of shared memory, from its picture `first` on; draws: one row for each picture."""
    if block not in _Worker.blocks:
        # The parent may have deleted some of them; closing an open one only costs reopening it.
        if len(_Worker.blocks) >= MAX_OPEN_BLOCKS:
            for open_block in _Worker.blocks.values():
                open_block.close()
            _Worker.blocks.clear()
        _Worker.blocks[block] = SharedMemory(block)
    picture_bytes = _Worker.size * _Worker.size * 3
    shape = (len(pictures), _Worker.size, _Worker.size, 3)
    pixels = np.ndarray(shape, np.uint8, _Worker.blocks[block].buf, first * picture_bytes)
    for i, (path, offset, length) in enumerate(pictures):
        if path not in _Worker.files:
            _Worker.files[path] = np.memmap(path, np.uint8, "r")
        content = _Worker.files[path][offset : offset + length].tobytes()
        try:
            image = decode_picture(content)
        # Pillow raises many types.
        except Exception as error:
            raise OSError(
                f"the picture at byte {offset} of {path} cannot be decoded ({error}); prepare the data again"
            ) from error
        if draws is None:
            pixels[i] = evaluation_pixels(image, _Worker.size, _Worker.resize)
        else:
            pixels[i] = training_pixels(image, _Worker.size, draws[i], _Worker.augmentation)
