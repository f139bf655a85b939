# SPDX-License-Identifier: MIT
"""Figures on image data at full size on one GPU, in parts of at most ten minutes each.

    python bench/gpu_figures.py [mlp-vs-hybrid role-of-depth spectra vit] [--out runs/gpu] [--seconds 600]

Without a CUDA device nothing is run, and the program says so. The times are estimates for an H200, from the
numbers of operations below: no part has been run on a GPU yet.

mlp-vs-hybrid
    The published setting: 50,000 images, width 1024, 400 epochs of 391 steps, so 156,400 steps for each of
    two networks. A step has 6.5 Gflop in float32 and 85 (hybrid: 65) operations, of which the CUDA graph of
    the passes leaves 27 and two launches. At 0.6 to 0.9 ms a step: 3 to 5 minutes.
role-of-depth
    40,000 training and 10,000 validation images, width 512, the networks and seeds of the figure's defaults
    with one further hybrid per depth: 236 trainings of 6,260 steps. Four processes, one for each data set and
    loss, share the GPU: 6 to 9 minutes. Finished trainings are lines of role-of-depth.*.jsonl in the folder:
    the same command resumes.
spectra
    The linear network, the MLP and VGG-16 of penultimate-spectra, 50 epochs of 782 steps, 39,100 steps each:
    3 to 4 minutes.
vit
    ViT-B of penultimate-spectra, 39,100 steps of 2.1 Tflop. In TF32, at 200 to 250 Tflop/s: 6 to 8 minutes.
    In float32 it would take half an hour.

The folder gets the picture and the JSON file of every figure, a log of every process, and summary.json with
the state, the seconds and the device of every part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DEPTH = ("role-of-depth", "--images", "40000", "--validation", "10000", "--width", "512", "--others", "3")
#: Part -> arguments of `dlnfast figure`, and further environment variables.
PARTS = {
    "mlp-vs-hybrid": (("mlp-vs-hybrid",), {}),
    "role-of-depth": (DEPTH, {}),
    "spectra": (("penultimate-spectra", "--families", "linear", "mlp", "vgg"), {}),
    "vit": (("penultimate-spectra", "--families", "vit"), {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}),
}
#: Shares of role-of-depth that train side by side.
SHARES = [
    ("--datasets", dataset, "--losses", loss)
    for dataset in ("fashion-mnist", "cifar10")
    for loss in ("cross_entropy", "squared")
]


def start(arguments: Sequence[str], out: Path, log: str, environment: dict[str, str]) -> subprocess.Popen:
    """Start `dlnfast figure` with its output in a log file."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dlnfast", "figure", *arguments, "--out", str(out)]
    with (out / log).open("w") as file:
        variables = {**os.environ, **environment}
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)


def wait(processes: Sequence[subprocess.Popen], seconds: float) -> str:
    """Wait for processes, end those that take longer, and return "finished", "failed" or "out of time"."""
    end = time.monotonic() + seconds
    try:
        codes = [process.wait(max(end - time.monotonic(), 0.1)) for process in processes]
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return "failed" if any(codes) else "finished"


def run_part(part: str, out: Path, seconds: float, options: Sequence[str]) -> str:
    """Run a part within its time, and return its state."""
    arguments, environment = PARTS[part]
    begin = time.monotonic()
    if part != "role-of-depth":
        return wait([start([*arguments, *options], out / part, "log.txt", environment)], seconds)
    folder = out / part
    files = [folder / f"role-of-depth.{number}.jsonl" for number in range(len(SHARES))]
    state = wait(
        [
            start([*arguments, *share, *options, "--results", str(file)], folder, f"log{i}.txt", environment)
            for i, (share, file) in enumerate(zip(SHARES, files, strict=True))
        ],
        seconds,
    )
    if state == "finished":  # draw the results of all shares together
        merged = folder / "role-of-depth.jsonl"
        merged.write_bytes(b"".join(file.read_bytes() for file in files))
        left = seconds - (time.monotonic() - begin)
        whole = [*arguments, *options, "--results", str(merged)]
        state = wait([start(whole, folder, "log.txt", environment)], left)
    return state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=600.0, help="most time of a part")
    parser.add_argument("--device", default="cuda", help="cpu tests the program, with small --options")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options of the figures")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART is {unknown[0]!r}; wanted one of {', '.join(PARTS)}")
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"not run: no GPU (PyTorch {torch.__version__} finds no CUDA device)")
        return 0
    is_cuda = options.device.startswith("cuda")
    name = torch.cuda.get_device_name(options.device) if is_cuda else options.device
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    states = []
    for part in options.parts or PARTS:
        begin = time.monotonic()
        more = ["--device", options.device, *options.options]
        state = run_part(part, options.out, options.seconds, more)
        seconds = round(time.monotonic() - begin, 1)
        states.append(state)
        machine = {"device": name, "torch": torch.__version__}
        summary[part] = {"state": state, "seconds": seconds, **machine}
        file.write_text(json.dumps(summary, indent=1))
        print(f"{part}: {state} after {seconds:.0f} s on {name}, in {options.out / part}", flush=True)
    return int(any(state != "finished" for state in states))


if __name__ == "__main__":
    raise SystemExit(main())
