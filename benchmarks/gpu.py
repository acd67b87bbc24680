"""Proves and measures what Pacemark does on one GPU, in parts, and writes docs/gpu.md's tables.

    python benchmarks/gpu.py [PART ...] [--minutes 8] [--out build/gpu] [--again]

Takes no data and no network. Runs the parts that OUT/gpu.json does not have yet for this card and commit, each in a
process of its own with a time limit, and stops before `--minutes` are over; the same command goes on. Parts:

  waits        no step makes the host wait (torch.cuda.set_sync_debug_mode), all workloads and submissions
  resume       a resumed training has the bits of an uninterrupted one
  torchrun     a trial under torchrun
  mini         the mini workloads in fp32, bf16 and compiled, against a bare loop
  gpt2         GPT-2 124M on random tokens: tokens/s, utilisation, memory, against a loop in nanoGPT's manner
  images       ResNet-50 and ViT-S/16 on random pictures
  updates      update rules against torch's fused AdamW and the memory's bandwidth
  energy       joules and watts
  conformance  all submissions

--device cpu --tiny runs every part on the CPU at sizes that show nothing but that it runs. Exit status: 0 all parts
passed, 1 one failed or was not reached, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from comparison import Figures, Options
from gpu_measurements import describe, energy, gpt2, images, mini, updates
from gpu_proofs import Failed, conformance, resume, torchrun, waits

from harness.command_line import run_script
from harness.errors import UserError
from harness.files import write_atomically

PARTS: dict[str, Callable[[Options], Figures]] = {
    part.__name__: part for part in (waits, resume, torchrun, mini, gpt2, images, updates, energy, conformance)
}
"""All parts by name, in the order in which they run."""
SECONDS = {
    "waits": 150, "resume": 90, "torchrun": 90, "mini": 240, "gpt2": 240, "images": 150, "updates": 150, "energy": 60,
    "conformance": 300,
}  # fmt: skip
"""The longest that each may take, its process's start included."""
RESULT = "GPU-RESULT "
"""Begins the line of a child's standard output that holds its figures."""
DESCRIPTION = "description"
"""The part that tells card, packages and commit; in a child, since this process opens no CUDA context."""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--again", action="store_true", help="also run what passed before")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = Options(options.device, options.tiny)
    if options.child:
        return _run_here(options.parts[0], chosen)
    for part in options.parts:
        if part not in PARTS:
            raise UserError(f"{part}: no such part; there are {', '.join(PARTS)}")
    header = _run_child(DESCRIPTION, chosen, 120)
    if "error" in header:
        raise UserError(header["error"])
    header = header["figures"]
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"
    results = _load(file, header)
    deadline = monotonic() + 60 * options.minutes
    for part in options.parts or PARTS:
        if results["parts"].get(part, {}).get("status") == "passed" and not options.again:
            print(f"{part}: passed before")
            continue
        left = deadline - monotonic()
        # A part that cannot come to its end is left to the next command.
        if left < min(SECONDS[part], 60):
            results["parts"].setdefault(part, {"status": "not reached"})
            print(f"{part}: not reached; the same command goes on")
            continue
        results["parts"][part] = _run_child(part, chosen, min(left, SECONDS[part]))
        print(f"{part}: {results['parts'][part]['status']} in {results['parts'][part]['seconds']:.0f} s", flush=True)
        # After every part: the machine may be taken away at any time.
        write_atomically(file, json.dumps(results, indent=1))
        write_atomically(options.out / "gpu.md", format_report(results))
    write_atomically(file, json.dumps(results, indent=1))
    write_atomically(options.out / "gpu.md", format_report(results))
    print(f"written: {file} and {options.out / 'gpu.md'}")
    return int(any(results["parts"].get(part, {}).get("status") != "passed" for part in options.parts or PARTS))


def _load(file: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The results so far, if they are of this card and commit; else none."""
    try:
        results: dict[str, Any] = json.loads(file.read_text())
        if all(results[key] == header[key] for key in header):
            return results
        print(f"{file} is of another machine or commit; it is replaced")
    except FileNotFoundError:
        pass
    except (ValueError, KeyError) as error:
        raise UserError(f"--out: {file} is no result of this command ({error}); move it away") from error
    return header | {"parts": {}}


def _run_child(part: str, options: Options, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own: an error of CUDA makes a process unusable for the next part."""
    command = [sys.executable, __file__, part, "--child", "--device", options.device]
    start = monotonic()
    try:
        done = subprocess.run(
            command + ["--tiny"] * options.tiny, capture_output=True, text=True, timeout=seconds, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "error": f"not done after {seconds:.0f} s", "seconds": monotonic() - start}
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT)) | {"seconds": monotonic() - start}
    text = f"the process ended with status {done.returncode}: {done.stderr[-3000:]}"
    return {"status": "failed", "error": text, "seconds": monotonic() - start}


def _run_here(part: str, options: Options) -> int:
    """In the child: run the part and print its result."""
    try:
        result = {"status": "passed", "figures": (PARTS | {DESCRIPTION: describe})[part](options)}
    except (Failed, UserError) as failed:
        result = {"status": "failed", "error": str(failed)}
    print(RESULT + json.dumps(result), flush=True)
    return 0


def format_report(results: dict[str, Any]) -> str:
    """Markdown: what it ran on, how each part ended, and the figures."""
    machine, packages, code = results["machine"], results["packages"], results["code"]
    card = machine.get("gpu", f"{machine['cpu']} (a dry run, whose figures mean nothing)")
    lines = [
        f"Measured on {card}, torch {packages['torch']}, CUDA {machine.get('cuda', 'none')}, driver "
        f"{machine.get('gpu_driver', 'unknown')}, Pacemark {code.get('commit', code['version'])}.\n",
        "| part | what | result |\n|---|---|---|",
    ]
    for part, function in PARTS.items():
        result = results["parts"].get(part, {"status": "not reached"})
        summary = str(function.__doc__).split(".\n")[0]
        lines.append(f"| {part} | {' '.join(summary.split()).rstrip('.')} | {result['status']} |")
    for part in PARTS:
        result = results["parts"].get(part, {})
        if "error" in result:
            lines.append(f"\n### {part}: failed\n\n```\n{result['error'][:6000]}\n```")
        elif result.get("figures"):
            lines.append(f"\n### {part}\n\n{_format_figures(result['figures'])}")
    return "\n".join(lines) + "\n"


def _format_figures(figures: dict[str, Any]) -> str:
    """A table with a row for each entry; entries that are tables themselves become columns."""
    nested = {name: value for name, value in figures.items() if isinstance(value, dict)}
    flat = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    parts = []
    if flat:
        rows = "\n".join(f"| {name} | {_format_value(value)} |" for name, value in flat.items())
        parts.append(f"| | |\n|---|---|\n{rows}")
    if nested:
        columns = list(dict.fromkeys(column for value in nested.values() for column in value))
        heading = f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
        cells = ((name, [_format_value(value.get(column)) for column in columns]) for name, value in nested.items())
        rows = "\n".join(f"| {name} | {' | '.join(row)} |" for name, row in cells)
        parts.append(f"{heading}\n{rows}")
    return "\n\n".join(parts)


def _format_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_format_value, value))
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
