"""Prints the time, the GFLOP and, on a GPU, the peak memory of a training step: random masking
against AMT's ratios.

    python docs/benchmark.py --precision bf16
    python docs/benchmark.py --precision bf16 --compile --cuda-graph
    python docs/benchmark.py --dataset imagenet --method simmim --batch-size 16

It takes the flags of train_cifar.py, but compares its own list of ratios, whatever --masking says.
Images are random squares in memory: decoding files is not timed. With --cuda-graph, the memory of
each row is that of all.
"""
import argparse
import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import amt
import train_cifar as script

args, DEVICE = script.parse_args(sys.argv[1:]), script.DEVICE
args.masking = "attention"                               # random until there are maps
GPU = DEVICE.type == "cuda"
method, B, size = script.METHODS[args.method], args.batch_size, args.img_size
rows = [("random", method["random"]), ("attention", method["amt"])]
if args.method == "simmim":
    rows.append(("attention", (0.33, 0.50)))             # the paper's other pair

if args.cuda_graph:                                      # these lines are those of set_up
    torch.cuda.set_stream(torch.cuda.Stream())
torch.set_float32_matmul_precision("high")
torch.backends.cuda.enable_flash_sdp(GPU or args.precision == "fp32")
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)

model = script.build_model(args, script.load_encoder(args)).to(DEVICE)
parallel = script.parallelize(args, model)
optimizer = script.build_optimizer(model)
side = args.square_size if args.dataset in ["folder", "imagenet", "tiny-imagenet"] else size
images = script.Images(args, [], [], torch.randint(256, (B, 3, side, side), dtype=torch.uint8))
images.mean = script.channels([127.5] * 3)               # of uniform bytes
images.std = script.channels([73.9] * 3)

def step_of(ratios: tuple[float, float]) -> script.Step:
    """A step of `pretrain` at these ratios. Each row has its own, as it has its own graph."""
    row_args = argparse.Namespace(**vars(args) | dict(mask_ratio=ratios[0], throw_ratio=ratios[1]))
    loss_of = partial(script.masked_loss, row_args, parallel, images)
    return script.Step(row_args, parallel, optimizer, loss_of)

def run(step: script.Step, maps: torch.Tensor | None):
    (ids, squares, aspect), = images.read([torch.randperm(B)])
    theta = amt.random_crops(B, method["scale"], image_ratio=aspect)
    theta = theta.to(DEVICE, non_blocking=True)
    step.set_lr(1e-4)
    step((squares, theta) if maps is None else (squares, theta, maps[ids]), last=True)

def gflop(ratios: tuple[float, float]) -> float:
    """GFLOP of the matrix products of a step, forward and backward, per image."""
    N = (size // method["unit"] // args.patch_size) ** 2             # units of a crop
    ranking = torch.arange(N, device="meta")[None]
    masked, _, visible = amt.mask_and_throw(ranking, *ratios, method["unit"])
    x = torch.zeros(1, 3, size, size, device="meta")

    # MATH is attention as matrix products, which the counter knows; it misses some fused kernels.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(x, visible=visible, masked=masked)[0].backward()
    return counter.get_total_flops() / 1e9

def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()

steps = [step_of(ratios) for _, ratios in rows]
steps_a_round = 10 if GPU else 1                         # without waiting, as in training
times, peaks, began = [], {}, now()
while len(times) < 6 or len(times) < 11 and now() - began < 40:
    a = now()
    maps, _ = script.new_maps(args, images, model.encoder)
    seconds = [now() - a]
    for row, step in zip(rows, steps):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        a = now()
        for _ in range(steps_a_round):
            run(step, None if row[0] == "random" else maps)
        seconds.append((now() - a) / steps_a_round)
        if GPU:
            peaks[row] = f"{torch.cuda.max_memory_allocated() / 2 ** 30:9.2f} GiB"
    times.append(seconds)

# The first round allocates, compiles and records, so it is left out.
update_seconds, *seconds = [statistics.median(column) for column in zip(*times[1:])]
counts = [gflop(ratios) for _, ratios in rows]
chip = torch.cuda.get_device_name() if GPU else "CPU"
print(f"{args.method}, {args.model}, {size} pixels, patches of {args.patch_size}, batch {B}, "
      f"{args.precision}, {chip}, torch {torch.__version__}, medians of {len(times) - 1} rounds\n"
      f"masking    mask throw       step   images/s GFLOP/image  time GFLOP (of random's)")
for row, s, count in zip(rows, seconds, counts):
    masking, ratios = row
    print(f"{masking:9}{ratios[0]:6.2f}{ratios[1]:6.2f}{1e3 * s:8.1f} ms{B / s:11,.1f}{count:12.3f}"
          f"{s / seconds[0]:6.2f}{count / counts[0]:6.2f}{peaks.get(row, '')}")
print(f"update of the attention maps: {B / update_seconds:,.1f} images/s")
