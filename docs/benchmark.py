"""Prints the time, the GFLOP and, on a GPU, the peak memory of a training step: random masking
against AMT's ratios.

    python docs/benchmark.py --precision bf16
    python docs/benchmark.py --precision bf16 --dataset imagenet --method simmim --batch-size 16

It takes the flags of train_cifar.py, but compares its own list of ratios, whatever --masking says.
A step is one of `pretrain`, on random squares in memory: decoding files is not timed.
"""
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import amt
import train_cifar as script

args, DEVICE = script.parse_args(sys.argv[1:]), script.DEVICE
method, B, size = script.METHODS[args.method], args.batch_size, args.img_size
rows = [("random", method["random"]), ("attention", method["amt"])]
if args.method == "simmim":
    rows.append(("attention", (0.33, 0.50)))             # the paper's other pair
unit_size = method["unit"] * args.patch_size
N = (size // unit_size) ** 2                             # units of a crop

torch.set_float32_matmul_precision("high")               # these three lines are the script's
torch.backends.cuda.enable_flash_sdp(DEVICE.type == "cuda" or args.precision == "fp32")
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
model = script.build_model(args, script.load_encoder(args)).to(DEVICE)
parallel = torch.compile(model, dynamic=False) if args.compile else model
optimizer = script.build_optimizer(model)
side = args.square_size or size
images = script.Images(args, [], [], torch.randint(256, (B, 3, side, side), dtype=torch.uint8))
images.mean, images.std = torch.tensor(127.5), torch.tensor(73.9)        # of uniform bytes

def step(masking: str, ratios: tuple[float, float]):
    (ids, squares, image_ratio), = images.read([torch.randperm(B)])
    theta = amt.random_crops(B, method["scale"], image_ratio=image_ratio)
    x = images.normalize(amt.crop(squares, theta, size, "bicubic"))
    weights = torch.ones(B, N, device=DEVICE)
    if masking == "attention":
        weights = amt.crop_weights(maps[ids], theta, size, unit_size)
    masked, _, visible = amt.mask_and_throw(amt.sample_patches(weights), *ratios, method["unit"])
    with script.autocast(args):
        loss, _ = parallel(x, visible=visible, masked=masked)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

def gflop(ratios: tuple[float, float]) -> float:
    """GFLOP of the matrix products of a step, forward and backward, per image."""
    ranking = torch.arange(N, device="meta")[None]
    masked, _, visible = amt.mask_and_throw(ranking, *ratios, method["unit"])
    x = torch.zeros(1, 3, size, size, device="meta")
    # MATH is attention as matrix products, which the counter knows; it misses some fused kernels.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(x, visible=visible, masked=masked)[0].backward()
    return counter.get_total_flops() / 1e9

def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

times, peaks, began = [], {}, now()                      # a round: new maps, a step of each row
while len(times) < 6 or len(times) < 11 and now() - began < 40:
    stamps = [now()]
    (ids, squares, _), = images.read([torch.arange(B)])
    with script.autocast(args):
        maps = amt.dataset_maps(model.encoder, [(ids, images.whole(squares))], B)
    stamps.append(now())
    for row in rows:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(*row)
        stamps.append(now())
        if DEVICE.type == "cuda":
            peaks[row] = f"{torch.cuda.max_memory_allocated() / 2 ** 30:9.2f} GiB"
    times.append([b - a for a, b in zip(stamps, stamps[1:])])
# The first round allocates and compiles, so it is left out.
update_seconds, *seconds = [statistics.median(column) for column in zip(*times[1:])]
counts = [gflop(ratios) for _, ratios in rows]
chip = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
print(f"{args.method}, {args.model}, {size} pixels, patches of {args.patch_size}, batch {B}, "
      f"{args.precision}, {chip}, torch {torch.__version__}, medians of {len(times) - 1} rounds\n"
      f"masking    mask throw       step   images/s GFLOP/image  time GFLOP (of random's)")
for row, s, count in zip(rows, seconds, counts):
    masking, ratios = row
    print(f"{masking:9}{ratios[0]:6.2f}{ratios[1]:6.2f}{1e3 * s:8.1f} ms{B / s:11,.1f}{count:12.3f}"
          f"{s / seconds[0]:6.2f}{count / counts[0]:6.2f}{peaks.get(row, '')}")
print(f"update of the attention maps: {B / update_seconds:,.1f} images/s")
