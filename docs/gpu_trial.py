"""Ten minutes of a GPU: how long a step takes eager, as a CUDA graph, compiled, or both.

    python docs/gpu_trial.py --out DIR --limit 570   # seconds in all
    python docs/gpu_trial.py --out DIR --tiny        # tests this file, also on a CPU

A row is a model and a variant, measured in a process of its own, which may crash or run out of
time. The most important rows come first; DIR/gpu_trial.csv is written after each. What processes
print goes to DIR/gpu_trial.txt: errors, and the slowest kernels of a step, by torch's profiler.
Columns, for random masking and (_amt) for AMT's ratios:

    step_ms     a step, without waiting between steps, as in training: the median block
    host_ms     what Python takes to launch it; if that is near step_ms, the CPU is the bound
    peak_gib    memory reserved; first_s: seconds of the first three steps, which compile
    loss        the sum of the first eight losses

How to decide: recommend --cuda-graph if `ti graph` takes at most 7 ms with AMT and at most 0.7 of
random masking's time, with losses equal to those of `ti eager` to 3 digits; if they differ, look at
the random numbers first. If its host_ms is near step_ms, a copy waits for the GPU: pin it. If
graph-math or graph-efficient beats graph, short sequences want that attention.
"""
import argparse
import csv
import gc
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

import amt
import train_cifar as script

MODELS = {
    "ti": ["--batch-size", "512"],
    "b": ["--batch-size", "256", "--dataset", "imagenet"],
    "sim-b": ["--batch-size", "256", "--dataset", "imagenet", "--method", "simmim"],
}
VARIANTS = {  # flags, and what computes attention, if not torch's choice
    "eager": ([], None),
    "graph": (["--cuda-graph"], None),
    "compile": (["--compile"], None),
    "graph+compile": (["--cuda-graph", "--compile"], None),
    "graph-cudnn": (["--cuda-graph"], SDPBackend.CUDNN_ATTENTION),
    "graph-efficient": (["--cuda-graph"], SDPBackend.EFFICIENT_ATTENTION),
    "graph-math": (["--cuda-graph"], SDPBackend.MATH),
}
TINY = ["--batch-size", "2", "--depth", "1", "--decoder-depth", "1"]
ROWS = ["ti eager", "ti graph", "ti graph+compile", "b eager", "b graph", "ti compile",
        "b graph+compile", "ti graph-cudnn", "ti graph-efficient", "ti graph-math", "sim-b eager",
        "sim-b graph", "b graph-cudnn", "b compile", "sim-b graph+compile"]
COLUMNS = [name + suffix for name in ["step_ms", "host_ms", "peak_gib", "first_s", "loss"]
           for suffix in ["", "_amt"]]
GPU = script.DEVICE.type == "cuda"

def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()

def measure(args, attention, blocks: int, has_maps: bool) -> dict:
    """The columns of a row, of random masking or with maps."""
    gc.collect()                                         # what the other masking left
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    torch.manual_seed(0)
    B, h = args.batch_size, args.img_size // args.patch_size
    side = args.square_size if args.dataset == "imagenet" else args.img_size
    squares = torch.randint(256, (2 * B, 3, side, side), dtype=torch.uint8)
    images = script.Images(args, [], [], squares)
    maps = torch.rand(2 * B, h, h).half().to(script.DEVICE)
    model = script.build_model(args, script.load_encoder(args)).to(script.DEVICE)
    optimizer = script.build_optimizer(model)
    model = script.parallelize(args, model)              # compiles it, too
    step = script.Step(args, model, optimizer, partial(script.masked_loss, args, model, images))
    numbers = iter(range(10 ** 9))

    def run():                                           # as in train_epoch and pretrain
        i = next(numbers)
        step.set_lr(1e-4 * (1 + i % 7))
        torch.manual_seed(i)
        (ids, x, aspect), = images.read([torch.randperm(2 * B)[:B]])
        theta = amt.random_crops(B, script.METHODS[args.method]["scale"], image_ratio=aspect)
        theta = theta.to(script.DEVICE, non_blocking=True)
        step((x, theta, maps[ids]) if has_maps else (x, theta), last=True)

    with sdpa_kernel(attention) if attention else nullcontext():
        a = now()
        for _ in range(3):
            run()
        result = dict(first_s=now() - a)
        for _ in range(5):
            run()
        result["loss"] = step.total.item()

        times, launches = [], []
        for _ in range(blocks):                          # of 20 steps
            a = now()
            for k in range(20):
                run()
                if k == 9:                               # many more would fill CUDA's queue
                    launches.append(1e3 * (time.perf_counter() - a) / 10)
            times.append(1e3 * (now() - a) / 20)
        result["step_ms"] = statistics.median(times)
        result["host_ms"] = statistics.median(launches)

        if GPU:
            result["peak_gib"] = torch.cuda.max_memory_reserved() / 2 ** 30
            with profile(activities=[ProfilerActivity.CUDA]) as p:
                run()
                now()
            print(p.key_averages().table("self_device_time_total", row_limit=25))
    return result

def measure_row(cli):
    """Writes DIR/row.json after random masking, and again after AMT."""
    model, variant = cli.row.split()
    flags, attention = VARIANTS[variant]
    args = script.parse_args(MODELS[model] + flags + TINY * cli.tiny)
    result = {}
    for suffix in ["", "_amt"]:
        found = measure(args, attention, 1 if cli.tiny else 5, suffix == "_amt")
        result |= {column + suffix: value for column, value in found.items()}
        (cli.out / "row.json").write_text(json.dumps(result))

def measure_all(cli):
    end, rows = time.time() + cli.limit, []
    saved = cli.out / "row.json"
    for row in ROWS:
        left, note = end - time.time(), ""
        saved.write_text("{}")                           # a process may crash before it writes
        if left < 25 or not GPU and "graph" in row:
            note = "skipped"
        else:
            command = [sys.executable, __file__, "--row", row, "--out", cli.out]
            limit = min(left, 60 if "eager" in row else 150)             # seconds
            with open(cli.out / "gpu_trial.txt", "a") as file:
                print(f"\n== {row}", file=file, flush=True)
                try:
                    subprocess.run([*command, *["--tiny"] * cli.tiny], stdout=file, stderr=file,
                                   timeout=limit, check=True)
                except subprocess.SubprocessError as error:
                    note = type(error).__name__

        result = dict(row=row, **json.loads(saved.read_text()), note=note)
        if "step_ms_amt" in result:
            result["ratio"] = result["step_ms_amt"] / result["step_ms"]
        rows.append({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in result.items()})
        print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
        with open(cli.out / "gpu_trial.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["row", "ratio", *COLUMNS, "note"])
            writer.writeheader()
            writer.writerows(rows)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=float, default=570)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    cli = parser.parse_args()
    cli.out.mkdir(parents=True, exist_ok=True)

    torch.set_float32_matmul_precision("high")           # as in set_up
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if GPU:
        torch.cuda.set_stream(torch.cuda.Stream())
    measure_row(cli) if cli.row else measure_all(cli)
