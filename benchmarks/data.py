"""Throughput of the data of scale=full on one core.

    python benchmarks/data.py [--workers N] [--text FILE] [--pictures FOLDER]

Tokenising in MB/s of UTF-8 (of the King James Bible, or --text); decoding in pictures/s (of generated 500 x 375 JPEGs,
or those in --pictures); decoding by worker processes, including the transfer to this process; and the assembly of
CIFAR-10 and GPT-2 batches. One core is measured in CPU seconds of the process, so that a busy machine has little
influence.
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
from workloads.data.decoding import DRAWS, Augmentation, ByteRange, Decoders
from workloads.data.device_images import DeviceImages
from workloads.data.openwebtext import Tokens
from workloads.data.streamed_images import uniform_draws

ROUNDS = 5
PAGE_LENGTH = 4700
"""Mean length of OpenWebText's pages, in characters."""


def main() -> None:
    """Parse the command line, run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=decoding.default_workers())
    parser.add_argument("--text", type=Path, help="a UTF-8 file")
    parser.add_argument("--pictures", type=Path, help="a folder of JPEG files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _measure_tokenising(options.text.read_text(encoding="utf-8") if options.text else kjv.load_text("auto")[1].decode())
    paths = sorted(options.pictures.rglob("*.[jJ][pP]*"))[:500] if options.pictures else []
    _measure_decoding([path.read_bytes() for path in paths] or generate_pictures(100), options.workers)
    _measure_cifar_batches()
    _measure_gpt2_batches()


def _measure_tokenising(text: str) -> None:
    try:
        encoding = bpe.load_encoding(bpe.find_vocabulary())
    except PreparationError as error:
        print(f"tokenising: not measured ({error})")
        return
    pages = [text[i : i + PAGE_LENGTH] for i in range(0, min(len(text), 4_000_000), PAGE_LENGTH)]
    size = sum(len(page.encode()) for page in pages)
    seconds = _time_rounds(lambda: [encoding.encode_ordinary(page) for page in pages], process_time)
    _print_rate("tokenising, one core", size / 1e6, seconds, "MB/s")


def _measure_decoding(pictures: list[bytes], workers: int) -> None:
    """Decode JPEG files for training and evaluation on one core, and for training by worker processes."""
    draws = uniform_draws(np.arange(len(pictures)), DRAWS)
    count, mean = len(pictures), sum(map(len, pictures)) / len(pictures)
    print(f"{count} pictures of {mean / 1e3:.0f} kB on average")
    for name, augmentation in (("training", Augmentation()), ("training, RandAugment", Augmentation(operations=2))):

        def train(augmentation: Augmentation = augmentation) -> None:
            for content, row in zip(pictures, draws, strict=True):
                decoding.training_pixels(decoding.decode_picture(content), 224, row, augmentation)

        _print_rate(f"{name}, one core", count, _time_rounds(train, process_time), "pictures/s")

    def evaluate() -> None:
        for content in pictures:
            decoding.evaluation_pixels(decoding.decode_picture(content), 224, 256)

    _print_rate("evaluation, one core", count, _time_rounds(evaluate, process_time), "pictures/s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.bin"
        path.write_bytes(b"".join(pictures))
        ends = np.cumsum([len(picture) for picture in pictures])
        locations = [ByteRange(str(path), int(end) - len(p), len(p)) for end, p in zip(ends, pictures, strict=True)]
        decoders = Decoders(224, 256, Augmentation(), workers)
        # The first round, which is not counted, also starts the processes.
        seconds = _time_rounds(lambda: decoders.load_pixels(locations, draws), perf_counter)
        _print_rate(f"training, {workers} processes into this one", count, seconds, "pictures/s by the wall clock")


def _measure_cifar_batches() -> None:
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (5000, 32, 32, 3), np.uint8), random.integers(0, 10, 5000)
    evaluation = {"validation": (images[:10], labels[:10])}
    source = DeviceImages((images, labels), evaluation, pad=4, flip=True, device=torch.device("cpu"))
    indices, keys = torch.randint(5000, (128,)), torch.randint(2**62, (128,))
    seconds = _time_rounds(lambda: [source.batch(indices, keys) for _ in range(100)], process_time)
    _print_rate("CIFAR-10 batches of 128, one core", 12_800, seconds, "images/s")


def _measure_gpt2_batches() -> None:
    tokens = Tokens([np.zeros(10_000_000, np.uint16) for _ in range(4)])
    starts = np.random.default_rng(0).integers(0, len(tokens) - 1025, 512)
    seconds = _time_rounds(lambda: [tokens.windows(starts, 1025) for _ in range(10)], process_time)
    _print_rate("GPT-2 batches of 512 x 1024, one core", 10 * 512 * 1024, seconds, "tokens/s")


def generate_pictures(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 with about as many bytes as ImageNet's: smooth, with some noise."""
    random, pictures = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8))
        smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + random.integers(-14, 15, smooth.shape)).clip(0, 255).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(noisy).save(content, "JPEG", quality=95)
        pictures.append(content.getvalue())
    return pictures


def _time_rounds(work: Callable[[], object], clock: Callable[[], float]) -> list[float]:
    """Seconds of each of `ROUNDS` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        work()
        seconds.append(clock() - start)
    return seconds


def _print_rate(name: str, amount: float, seconds: list[float], unit: str) -> None:
    """Print the median, smallest and largest rate. amount: units of work per round."""
    rates = sorted(amount / s for s in seconds)
    median, low, high = (
        f"{rate:,.4g}" if rate < 1e4 else f"{rate:,.0f}" for rate in (statistics.median(rates), rates[0], rates[-1])
    )
    print(f"{name:42} {median} {unit} (from {low} to {high})", flush=True)


if __name__ == "__main__":
    main()
