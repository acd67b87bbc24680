"""How fast scale=full's data come: what one core does, and what that means for a GPU that must not wait.

    python benchmarks/data.py [--workers N] [--text FILE] [--pictures FOLDER]

Tokenising in MB/s of UTF-8 per core (of the King James Bible, or --text), decoding in pictures/s per core (of made-up
500 x 375 JPEGs, or those in --pictures), the same by worker processes with the way into this process, and the assembly
of CIFAR-10 and GPT-2 batches. Where one core is measured, in CPU seconds of the process, so that a busy machine matters
little.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from PIL import Image

from harness.errors import PreparationError
from workloads.data import bpe, decoding, kjv
from workloads.data.decoding import DRAWS, Augmentation, Blob, Decoders
from workloads.data.device_images import DeviceImages
from workloads.data.openwebtext import Tokens
from workloads.data.streamed_images import uniform

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=decoding.default_workers())
    parser.add_argument("--text", type=Path, help="a UTF-8 file")
    parser.add_argument("--pictures", type=Path, help="a folder of JPEG files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _tokenising(options.text.read_text(encoding="utf-8") if options.text else kjv.load("auto")[1].decode())
    paths = sorted(options.pictures.rglob("*.[jJ][pP]*"))[:500] if options.pictures else []
    _decoding([path.read_bytes() for path in paths] or made_up_pictures(100), options.workers)
    _cifar()
    _windows()


def _tokenising(text: str) -> None:
    try:
        encoding = bpe.encoding(bpe.files())
    except PreparationError as error:
        print(f"tokenising: not measured ({error})")
        return
    pages = [text[i : i + 4700] for i in range(0, min(len(text), 4_000_000), 4700)]  # OpenWebText's mean length
    size = sum(len(page.encode()) for page in pages)
    seconds = _rounds(lambda: [encoding.encode_ordinary(page) for page in pages], process_time)
    _say("tokenising, one core", size / 1e6, seconds, "MB/s")


def _decoding(pictures: list[bytes], workers: int) -> None:
    draws = uniform(np.arange(len(pictures)), DRAWS)
    count, mean = len(pictures), sum(map(len, pictures)) / len(pictures)
    print(f"{count} pictures of {mean / 1e3:.0f} kB on average")
    for name, augmentation in (("training", Augmentation()), ("training, RandAugment", Augmentation(operations=2))):

        def train(augmentation: Augmentation = augmentation) -> None:
            for content, row in zip(pictures, draws, strict=True):
                decoding.training_pixels(decoding.decode(content), 224, row, augmentation)

        _say(f"{name}, one core", count, _rounds(train, process_time), "pictures/s")

    def evaluate() -> None:
        for content in pictures:
            decoding.evaluation_pixels(decoding.decode(content), 224, 256)

    _say("evaluation, one core", count, _rounds(evaluate, process_time), "pictures/s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.bin"
        path.write_bytes(b"".join(pictures))
        ends = np.cumsum([len(picture) for picture in pictures])
        blobs = [Blob(str(path), int(end) - len(p), len(p)) for end, p in zip(ends, pictures, strict=True)]
        decoders = Decoders(224, 256, Augmentation(), workers)
        decoders.pixels(blobs, draws)  # starts the processes
        seconds = _rounds(lambda: decoders.pixels(blobs, draws), perf_counter)
        _say(f"training, {workers} processes into this one", count, seconds, "pictures/s by the wall clock")


def _cifar() -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (5000, 32, 32, 3), np.uint8), random.integers(0, 10, 5000)
    held_back = {"validation": (images[:10], labels[:10])}
    source = DeviceImages((images, labels), held_back, pad=4, flip=True, device=torch.device("cpu"))
    indices, keys = torch.randint(5000, (128,)), torch.randint(2**62, (128,))
    seconds = _rounds(lambda: [source.batch(indices, keys) for _ in range(100)], process_time)
    _say("CIFAR-10 batches of 128, one core", 12_800, seconds, "images/s")


def _windows() -> None:
    tokens = Tokens([np.zeros(10_000_000, np.uint16) for _ in range(4)])
    starts = np.random.default_rng(0).integers(0, len(tokens) - 1025, 512)
    seconds = _rounds(lambda: [tokens.windows(starts, 1025) for _ in range(10)], process_time)
    _say("GPT-2 batches of 512 x 1024, one core", 10 * 512 * 1024, seconds, "tokens/s")


def made_up_pictures(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 with about as many bytes as ImageNet's: smooth, with some noise."""
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + random.integers(-14, 15, smooth.shape)).clip(0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(noisy).save(content, "JPEG", quality=95)
        found.append(content.getvalue())
    return found


def _rounds(work: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    work()
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        work()
        seconds.append(clock() - start)
    return seconds


def _say(what: str, amount: float, seconds: list[float], unit: str) -> None:
    rates = sorted(amount / s for s in seconds)
    middle, low, high = (
        f"{rate:,.4g}" if rate < 1e4 else f"{rate:,.0f}" for rate in (statistics.median(rates), rates[0], rates[-1])
    )
    print(f"{what:42} {middle} {unit} (from {low} to {high})", flush=True)


if __name__ == "__main__":
    main()
