"""Pretrain a vision transformer with AMT, then train a linear probe on it and fine-tune it.

    python train_cifar.py --dataset shapes --out-dir out-shapes          # offline, on a CPU
    python train_cifar.py                                                # CIFAR-10, one GPU
    python train_cifar.py --resume                                       # continue a stopped run
    torchrun --nproc_per_node=4 train_cifar.py --dataset imagenet --data-path DIR     # 4 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_cifar.py --dataset imagenet --data-path DIR                # on each of two nodes

    python train_cifar.py --masking random --out-dir out-random          # MAE, the baseline
    python train_cifar.py --method simmim --out-dir out-simmim           # SimMIM with AMT
    python train_cifar.py --checkpoint out/encoder.pth --epochs 0 --probe-epochs 0 \\
        --finetune-epochs 100 --out-dir out-finetuned                    # fine-tune an encoder
    python train_cifar.py --benchmark                                    # the cost of a step

A run is a sequence of numbered steps. The number of a step and the seed determine its images and
its random numbers. So a checkpoint stores no state of a data loader or of a random generator, and a
resumed run ends with the same weights as an unbroken one.

A run writes to --out-dir: checkpoint.pth, encoder.pth (the state dict of the encoder alone, with
timm's names), log.csv (one row per epoch; position_share is the fraction of the variance of new
attention maps that the position of a patch explains), attention.png (where [CLS] attended, for each
update of the attention maps) and masking.png (what is masked and predicted). The probe and
fine-tuning have their own checkpoint and log, and fine-tuning writes finetuned.pth.
"""
import argparse
import ctypes
import fcntl
import io
import math
import os
import random
import signal
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from torchvision.utils import save_image

import amt

RANK = int(os.environ.get("RANK", 0))                    # torchrun sets these four
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")

# random: the (mask ratio, throw ratio) of random masking. amt: AMT's pairs. The first is the
# default, and MaskFeat has SimMIM's. unit: the side of a masking unit in patches. scale: the range
# of a crop's area, as a fraction of the image's.
METHODS = {
    "mae": dict(random=(0.75, 0.0), amt=[(0.45, 0.40)], unit=1, scale=(0.2, 1)),
    "simmim": dict(random=(0.60, 0.0), amt=[(0.44, 0.26), (0.33, 0.50)], unit=2, scale=(0.67, 1)),
    "maskfeat": dict(random=(0.40, 0.0), amt=[(0.44, 0.26), (0.33, 0.50)], unit=2, scale=(0.5, 1)),
}
STRATEGIES = {
    "attention": amt.sample_patches,
    "random": amt.random_ranking,
    "attmask": amt.highest_first,
    "mst": amt.lowest_first,
    "block": amt.block_wise,
    "grid": amt.grid_wise,
}
USE_MAPS = ["attention", "attmask", "mst"]               # strategies that rank by attention
DEFAULTS = {  # flags of a data set that differ from cifar10's
    "cifar10": {},
    "cifar100": {},
    "stl10": dict(img_size=96, patch_size=8),
    "tiny-imagenet": dict(img_size=64, patch_size=8),
    "folder": dict(img_size=224, patch_size=16),
    "imagenet": dict(img_size=224, patch_size=16, model="vit_base", decoder_embed_dim=512,
                     decoder_depth=8, blr=1.5e-4, save_every=1),
    "shapes": dict(depth=3, decoder_embed_dim=96, decoder_depth=1, epochs=24, update_interval=4,
                   batch_size=64, blr=4e-3, probe_epochs=8, probe_blr=0.5),
}


# ==== Flags =======================================================================================

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The defaults shown are those of cifar10. Other data sets change some of them.")
    parser.error = lambda message: sys.exit(f"train_cifar.py: error: {message} (see --help)")

    def add(flag: str, default, text: str, **kwargs):
        if default is not None:
            text += " (default: %(default)s)"
            kwargs.setdefault("type", type(default))
        parser.add_argument(flag, default=default, help=text, **kwargs)

    add("--dataset", "cifar10", "cifar10, cifar100 and stl10 are downloaded; tiny-imagenet and "
        "folder (train/<class>/, val/<class>/) are decoded once and kept in memory; imagenet is a "
        "folder that is decoded in each epoch; shapes is generated", choices=DEFAULTS)
    add("--data-path", "data", "directory of the images", metavar="DIR")
    add("--num-images", 2500, "number of training images of shapes")
    add("--img-size", 32, "side of an image in pixels")
    add("--workers", min(16, max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE)),
        "processes that decode images, for each training process")
    vits = ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    add("--model", "vit_tiny", "size of the encoder", choices=vits)
    add("--depth", None, "number of encoder blocks (default: the model's)", type=int)
    add("--patch-size", 4, "side of a patch in pixels")
    add("--decoder-embed-dim", 192, "width of the MAE decoder, a multiple of 32")
    add("--decoder-depth", 4, "number of blocks of the MAE decoder")
    add("--method", "mae", "maskfeat is simmim with HOG targets", choices=METHODS)
    add("--masking", "attention", "how patches are ranked: attention samples them by attention, "
        "attmask takes the highest attention first, mst the lowest; the others ignore attention",
        choices=STRATEGIES)
    add("--weights", "own", "the map that ranks the patches: own is the image's own attention map, "
        "shuffled is another image's map, uniform is 1 for each patch, debiased is the own map "
        "divided by the mean map of the data set",
        choices=["own", "shuffled", "uniform", "debiased"])
    add("--mask-ratio", None, "fraction of patches that are masked (default with attention: 0.45 "
        "for mae, else 0.44; without: 0.75 mae, 0.60 simmim, 0.40 maskfeat)", type=float)
    add("--throw-ratio", None, "fraction of patches that are thrown (default with attention: 0.40 "
        "for mae, else 0.26; without: 0)", type=float)
    add("--mask-unit", None, "side of a masking unit in patches (default: 1 mae, else 2)", type=int)
    add("--update-interval", None, "epochs between updates of the attention maps (default: a tenth "
        "of --epochs)", type=int)
    add("--epochs", 400, "epochs of pretraining; --checkpoint requires 0")
    add("--warmup-epochs", None, "epochs of warm-up (default: a tenth of --epochs)", type=int)
    add("--batch-size", 512, "images per process and forward pass")
    add("--accum-steps", 1, "forward passes per process and optimiser step")
    add("--blr", 5e-4, "learning rate, scaled by the images per step / 256")
    add("--checkpoint", None, "with --epochs 0: the encoder to probe or to fine-tune, a file of "
        "this script, timm or MAE; or the word none, for an untrained encoder", metavar="FILE")
    add("--probe-epochs", 90, "epochs of the linear probe; 0 skips it")
    add("--probe-blr", 0.1, "learning rate of the probe, like --blr")
    add("--probe-every", None, "train a linear probe every N epochs and log its accuracy; it sees "
        "each image once, without augmentation", type=int, metavar="N")
    add("--finetune-epochs", 0, "epochs of fine-tuning; 0 skips it")
    add("--finetune-blr", 1e-3, "learning rate of fine-tuning, like --blr; each block has 0.75 "
        "times the rate of the next one")
    add("--finetune-randaugment", None, "fine-tune with RandAugment", action="store_true")
    add("--seed", 0, "seed of all random numbers")
    add("--out-dir", Path("out"), "directory of the run's files", metavar="DIR")
    add("--resume", None, "continue the run in --out-dir; repeat its flags", action="store_true")
    add("--save-every", 10, "epochs between checkpoints")
    add("--precision", None, "bf16 is autocast; fp32 allows TF32 on GPUs (default: bf16 on GPUs "
        "that have it, else fp32)", choices=["bf16", "fp32"])
    add("--compile", None, "use torch.compile", action="store_true")
    add("--benchmark", None, "only time a step: random masking against AMT", action="store_true")

    # Some flags decide the defaults of others, so they are read first.
    first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**DEFAULTS[first.dataset])
    if first.model == "vit_huge" and parser.get_default("patch_size") == 16:
        parser.set_defaults(patch_size=14)
    if first.checkpoint == "none":
        parser.set_defaults(probe_epochs=0)
    args = parser.parse_args(argv)
    method = METHODS[args.method]
    ratios = method["amt"][0] if args.masking == "attention" else method["random"]
    bf16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    derived = dict(mask_ratio=ratios[0], throw_ratio=ratios[1], mask_unit=method["unit"],
                   update_interval=max(1, round(args.epochs / 10)),
                   warmup_epochs=args.epochs // 10, precision="bf16" if bf16 else "fp32")
    vars(args).update({k: v for k, v in derived.items() if getattr(args, k) is None})
    args.global_batch = args.batch_size * args.accum_steps * WORLD_SIZE
    check(args, parser.error)
    return args


def check(args, error):
    """Refuses flags that are out of range or do not fit together, before any data is loaded."""
    may_be_0 = ["workers", "epochs", "warmup_epochs", "probe_epochs", "finetune_epochs", "seed"]
    for name, value in vars(args).items():
        low = 0 if name in may_be_0 else 1
        if type(value) is int and value < low:
            error(f"--{name.replace('_', '-')} {value} is not allowed: give {low} or more")
        if name.endswith("blr") and not 0 < value < 1e6:
            error(f"--{name.replace('_', '-')} {value} is not allowed: give more than 0, below 1e6")
    if DEVICE.type == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        error(f"there are more processes than GPUs: give torchrun --nproc_per_node "
              f"{torch.cuda.device_count()}")
    if bool(args.epochs) == bool(args.checkpoint):
        error(f"--epochs {args.epochs} with --checkpoint {args.checkpoint}: give --epochs above 0 "
              f"to pretrain, or --epochs 0 and a --checkpoint, FILE or none")
    if args.epochs and args.warmup_epochs >= args.epochs:
        error(f"--warmup-epochs {args.warmup_epochs} is not less than --epochs {args.epochs}")
    if args.masking in USE_MAPS and args.update_interval >= args.epochs > 1:
        error(f"--update-interval {args.update_interval} is not less than --epochs {args.epochs}: "
              f"there would be no attention maps")
    if args.checkpoint and not args.probe_epochs and not args.finetune_epochs:
        error(f"there is nothing to do with --checkpoint {args.checkpoint}: give --probe-epochs or "
              f"--finetune-epochs")
    if args.benchmark and WORLD_SIZE > 1:
        error("--benchmark times one process: start it without torchrun")
    if args.probe_epochs and args.batch_size * WORLD_SIZE == 1:
        error("--batch-size 1 is too small for the BatchNorm of the linear probe: give 2 or more")
    try:
        with torch.device("meta"):
            build_model(args)
        grid = args.img_size // args.patch_size
        if grid % args.mask_unit:
            raise ValueError(f"--mask-unit {args.mask_unit} does not divide a side of {grid} "
                             f"patches")
        ranking = torch.zeros(1, (grid // args.mask_unit) ** 2)
        method = METHODS[args.method]
        for ratios in [method["random"], *method["amt"], (args.mask_ratio, args.throw_ratio)]:
            amt.mask_and_throw(ranking, *ratios)
    except ValueError as wrong:
        error(f"{wrong} (flags: --img-size, --patch-size, --decoder-embed-dim, --mask-unit, "
              f"--mask-ratio, --throw-ratio)")


# ==== Main ========================================================================================

def main(argv: list[str] | None = None):
    args = parse_args(argv)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if args.benchmark:
        benchmark(args)
        return
    if WORLD_SIZE > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    with open_out_dir(args):
        data = load_data(args)
        check_same("images", data.fingerprint)
        labelled = args.probe_epochs or args.probe_every or args.finetune_epochs
        n = len(data.train_labels if labelled else data.train)
        if args.global_batch > n:
            sys.exit(f"error: a step takes {args.global_batch} images, but there are only {n} "
                     f"training images: give a smaller --batch-size")
        say(f"{args.dataset}: {len(data.train)} training and {len(data.test)} test images. "
            f"{args.model} on {DEVICE} in {args.precision}, {args.global_batch} images a step, "
            f"processes: {WORLD_SIZE}")
        note_signals()
        if args.checkpoint:
            encoder = load_encoder(args)
        else:
            pretraining = Pretraining(args, data)
            fit(pretraining)
            save_masking(pretraining)
            encoder = pretraining.model.encoder
        if args.probe_epochs:
            fit(LinearProbe(args, data, encoder))
        if args.finetune_epochs:
            finetuning = FineTuning(args, data, encoder)
            fit(finetuning)
            state = finetuning.model.state_dict()
            state = {name.removeprefix("encoder."): p for name, p in state.items()}
            write_file(args.out_dir / "finetuned.pth", state)
        say(f"done: see {args.out_dir}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


# ==== Pretraining =================================================================================

class Stage:
    """What `fit` trains: a model, an optimiser and a loss. A checkpoint holds the states of the
    model and of the optimiser, and `run`."""
    scale = (0.2, 1.0)                                   # area of the random crops
    augment = False                                      # RandAugment after the crop
    warmup = 0                                           # epochs
    encoder_checksum = None                              # of the pretrained encoder, if any

    def __init__(self, args, data, name: str, model: nn.Module, optimizer, blr: float, epochs: int,
                 n: int):
        self.args = args
        self.data = data
        self.name = name
        self.prefix = "" if name == "pretraining" else f"{name}-"    # of its checkpoint and its log
        self.model = model
        self.optimizer = optimizer
        self.lr = blr * args.global_batch / 256
        self.epochs = epochs
        self.n = n                                       # it trains on the first n training images
        self.steps = n // args.global_batch              # per epoch
        loss = torch.zeros((), dtype=torch.float64, device=DEVICE)           # sum over this epoch
        self.run = {"step": 0, "loss": loss, "seconds": 0.0, "log": []}      # log: a row an epoch

    def loss(self, ids: Tensor, images: Tensor, theta: Tensor) -> Tensor:
        """The loss, a scalar, of a mini-batch of `batches`."""
        raise NotImplementedError

    def start_epoch(self, done: int):
        """Is called before each epoch. `done` epochs are finished."""

    def end_epoch(self, done: int) -> dict[str, str]:
        """Is called after each epoch, and returns more columns for the log."""
        return {}


class Pretraining(Stage):
    def __init__(self, args, data):
        torch.manual_seed(seed_of(args.seed))
        model = build_model(args).to(DEVICE)
        super().__init__(args, data, "pretraining", model, build_optimizer(model), args.blr,
                         args.epochs, len(data.train))
        self.parallel = wrap(args, model)
        self.scale = METHODS[args.method]["scale"]
        self.warmup = args.warmup_epochs
        self.run |= {"maps": None, "snapshots": [], "update_seconds": 0.0, "position_share": ""}

    def start_epoch(self, done: int):
        """Updates the attention maps when it is time: the encoder looks at each whole image."""
        args, data, run, encoder = self.args, self.data, self.run, self.model.encoder
        run["update_seconds"], run["position_share"] = 0.0, ""
        if args.masking not in USE_MAPS or done == 0 or done % args.update_interval:
            return
        started = time.time()
        with precision(args):
            whole_images = ((ids, data.normalise(images))
                            for ids, images in data.whole("train", share(self.n)))
            maps = all_reduce(amt.dataset_maps(encoder, whole_images, self.n)).float()   # (n, h, w)
        run["position_share"] = f"{position_share(maps):.4f}"
        torch.manual_seed(seed_of(args.seed, "shuffled", done))      # for --weights shuffled
        run["maps"] = reweight(maps, args.weights).half()
        shown = self.shown()
        run["snapshots"].append(amt.attention_maps(encoder, data.normalise(shown)))
        save_grid([shown / 255, *map(heat, run["snapshots"])], args.out_dir / "attention.png")
        run["update_seconds"] = time.time() - started

    def loss(self, ids: Tensor, images: Tensor, theta: Tensor) -> Tensor:
        maps = self.run["maps"]
        if maps is not None:
            maps = maps[ids]
        with precision(self.args):
            return amt.training_loss(self.parallel, self.data.normalise(images), theta, maps,
                                     **self.masking())

    def masking(self) -> dict:
        """Arguments of `amt.training_loss`. Masking is random before the first maps."""
        args = self.args
        ratios, strategy = (args.mask_ratio, args.throw_ratio), STRATEGIES[args.masking]
        if args.masking in USE_MAPS and self.run["maps"] is None:
            ratios, strategy = METHODS[args.method]["random"], amt.random_ranking
        return dict(mask_ratio=ratios[0], throw_ratio=ratios[1], unit=args.mask_unit,
                    strategy=strategy)

    def end_epoch(self, done: int) -> dict[str, str]:
        probe_accuracy = ""
        if self.args.probe_every and done % self.args.probe_every == 0:
            # The probe may take minutes. If the run is killed now, the resumed run finds all steps
            # of this epoch done and repeats the probe.
            save_checkpoint(self)
            probe_accuracy = cached_probe(self.args, self.data, self.model.encoder)
        return {"update_seconds": f"{self.run['update_seconds']:.2f}",
                "position_share": self.run["position_share"], "probe_accuracy": probe_accuracy}

    def shown(self) -> Tensor:
        """Eight test images, 0 to 255, for the pictures."""
        ids = torch.randperm(len(self.data.test), generator=torch.Generator().manual_seed(0))[:8]
        return torch.cat([images for _, images in self.data.whole("test", ids)])


def position_share(maps: Tensor) -> float:
    """The fraction of the variance of maps (n, h, w) that the position of a patch explains."""
    return (maps.mean(dim=0).var() / maps.var()).item()


def reweight(maps: Tensor, weights: str) -> Tensor:
    """What patches are ranked by, given the attention maps (n, h, w): see --weights."""
    if weights == "shuffled":
        return maps[torch.randperm(len(maps)).to(maps.device)]
    if weights == "uniform":
        return torch.ones_like(maps)
    if weights == "debiased":
        ratio = maps / maps.mean(dim=0).clamp_min(1e-4)
        low, high = ratio.amin(dim=(1, 2), keepdim=True), ratio.amax(dim=(1, 2), keepdim=True)
        return (ratio - low) / (high - low).clamp_min(1e-12)
    return maps


def build_model(args) -> nn.Module:
    encoder = build_encoder(args)
    if args.method != "mae":
        return amt.SimMIM(encoder, "hog" if args.method == "maskfeat" else "pixels")
    return amt.MAE(encoder, args.decoder_embed_dim, args.decoder_depth,
                   args.decoder_embed_dim // 32, norm_pix_loss=True)


def build_encoder(args) -> amt.ViT:
    kwargs = {"depth": args.depth} if args.depth else {}
    return getattr(amt, args.model)(img_size=args.img_size, patch_size=args.patch_size, **kwargs)


# ==== Mini-batches and the training loop ==========================================================

def batches(stage: Stage, step: int):
    """Yields this process's mini-batches from `step` to the end of its epoch: ids (B,), crops
    (B, 3, H, H), 0 to 255, and their theta (B, 2, 3).

    A step has WORLD_SIZE * accum_steps parts of B images, and each process takes accum_steps of
    them. The random generator is seeded anew for each part, before its crops, ranking and drop path
    are drawn. So any process can compute any part, and a run may resume on another number of them.
    """
    args = stage.args
    epoch, first = divmod(step, stage.steps)
    torch.manual_seed(seed_of(args.seed, stage.name, epoch))
    order = torch.randperm(stage.n)[: stage.steps * args.global_batch]
    order = order.view(stage.steps, WORLD_SIZE, -1)      # (steps, processes, accum_steps * B)
    ids = order[first:, RANK].flatten()
    crops = stage.data.crops(ids, stage.scale, stage.augment, (args.seed, stage.name, epoch))
    for i in range(step, (epoch + 1) * stage.steps):
        for part in range(RANK * args.accum_steps, (RANK + 1) * args.accum_steps):
            torch.manual_seed(seed_of(args.seed, stage.name, i, part))
            yield next(crops)


def fit(stage: Stage):
    """Trains a stage to its last step. Saves every --save-every epochs and when a signal comes."""
    args, run = stage.args, stage.run
    if args.resume:
        load_checkpoint(stage)
    # The log has one row for each finished epoch, so its length is the number of the next one.
    for epoch in range(len(run["log"]), stage.epochs):
        began = time.time()
        if run["step"] == epoch * stage.steps:
            run["loss"].zero_()
            stage.start_epoch(epoch)                     # pretraining: new attention maps
        else:                                            # the run resumes within this epoch
            began -= run["seconds"]
        stage.model.train()
        mini_batches = batches(stage, run["step"])
        for step in range(run["step"], (epoch + 1) * stage.steps):
            train_step(stage, step, mini_batches)
            run["seconds"] = time.time() - began
            progress(f"{stage.name}: epoch {epoch + 1} of {stage.epochs}, step "
                     f"{step % stage.steps + 1} of {stage.steps}")
            # The number of a signal that came to any process, or 0.
            stop = all_reduce(torch.tensor(max(SIGNALS, default=0)), dist.ReduceOp.MAX).item()
            if stop:
                save_checkpoint(stage)
                mini_batches.close()                     # ends the processes that decode images
                say(f"stopped by {signal.Signals(stop).name} after step {step + 1} of "
                    f"{stage.name}: the same command with --resume continues")
                sys.exit(128 + stop)
        mini_batches.close()
        check_finite(stage, run["loss"])                 # waits for the GPU
        run["seconds"] = time.time() - began
        finish_epoch(stage, epoch + 1)


def train_step(stage: Stage, step: int, mini_batches):
    """One step of the optimiser, on accum_steps mini-batches of each process."""
    args, run, optimizer = stage.args, stage.run, stage.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(stage, step) * group.get("lr_scale", 1.0)
    no_sync = getattr(stage.parallel, "no_sync", nullcontext)
    total = 0.0
    for part in range(args.accum_steps):
        ids, images, theta = next(mini_batches)
        last = part + 1 == args.accum_steps
        # DDP averages the gradients over the processes in the last backward pass only.
        with nullcontext() if last else no_sync():
            loss = stage.loss(ids, images, theta) / args.accum_steps
            loss.backward()
        total += loss.detach()
    run["loss"] += all_reduce(total) / WORLD_SIZE
    optimizer.step()
    optimizer.zero_grad()
    run["step"] = step + 1


def finish_epoch(stage: Stage, epoch: int):
    """Adds a row to the log, prints it, and saves when it is time. `epoch` counts from 1."""
    args, run, log = stage.args, stage.run, stage.run["log"]
    seconds = run["seconds"] - run.get("update_seconds", 0.0)    # without the update of the maps
    row = {"epoch": str(epoch), "loss": f"{run['loss'].item() / stage.steps:.5f}",
           "lr": f"{learning_rate(stage, epoch * stage.steps - 1):.3e}",
           "images_per_second": f"{stage.steps * args.global_batch / seconds:.0f}",
           "seconds": f"{run['seconds']:.2f}"}
    log.append(row | stage.end_epoch(epoch))
    left = sum(float(row["seconds"]) for row in log) / epoch * (stage.epochs - epoch)
    columns = ", ".join(f"{name} {value}" for name, value in log[-1].items() if value)
    say(f"{stage.name}: {columns}, {timedelta(seconds=round(left))} left")
    lines = [",".join(log[0]), *(",".join(row.values()) for row in log)]
    write_file(args.out_dir / f"{stage.prefix}log.csv", ("\n".join(lines) + "\n").encode())
    if epoch % args.save_every == 0 or epoch == stage.epochs:
        save_checkpoint(stage)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    epoch = step / stage.steps
    if epoch < stage.warmup:
        return stage.lr * epoch / stage.warmup
    done = (epoch - stage.warmup) / (stage.epochs - stage.warmup)
    return stage.lr * (0.5 + 0.5 * math.cos(math.pi * done))


def check_finite(stage: Stage, x: Tensor):
    if not x.isfinite().all():
        sys.exit(f"error: the loss or a weight is nan or infinite after step {stage.run['step']} "
                 f"of {stage.name}. The last checkpoint is unharmed. Start again in another "
                 f"--out-dir with --precision fp32 or a lower --{stage.prefix}blr")


def build_optimizer(model: nn.Module, beta2: float = 0.95, lr_scale=lambda name: 1.0):
    """AdamW. Only matrices have weight decay. lr_scale(name) multiplies a parameter's rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.05 if name.endswith("weight") and p.ndim > 1 else 0.0
            groups.setdefault((decay, lr_scale(name)), []).append(p)
    groups = [{"params": params, "weight_decay": decay, "lr_scale": scale}
              for (decay, scale), params in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)


def wrap(args, model: nn.Module) -> nn.Module:
    """The model as training calls it: with DistributedDataParallel and torch.compile."""
    if WORLD_SIZE > 1:
        model = DistributedDataParallel(
            model, [DEVICE] if DEVICE.type == "cuda" else None, gradient_as_bucket_view=True)
    return torch.compile(model, dynamic=False) if args.compile else model


@contextmanager
def precision(args):
    """Autocasts to bfloat16 if --precision says so."""
    bf16 = args.precision == "bf16"
    attention = PlainAttention() if bf16 and DEVICE.type == "cpu" else nullcontext()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16), attention:
        yield


class PlainAttention(TorchFunctionMode):
    """Computes attention as two matrix products. On CPUs, the backward pass of torch's fused
    attention in bfloat16 takes as long as the rest of a step."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            return (q @ k.mT / math.sqrt(q.shape[3])).softmax(dim=3) @ v
        return function(*args, **(kwargs or {}))


# ==== Linear probe and fine-tuning ================================================================

class LinearProbe(Stage):
    """A linear layer on [CLS] of the frozen encoder, after a BatchNorm without affine. BatchNorm
    sees WORLD_SIZE * batch_size images, so the result depends on the number of processes."""

    def __init__(self, args, data, encoder: amt.ViT):
        torch.manual_seed(seed_of(args.seed))
        head = nn.Sequential(nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6),
                             nn.Linear(encoder.embed_dim, data.classes)).to(DEVICE)
        nn.init.trunc_normal_(head[1].weight, std=0.01)
        nn.init.zeros_(head[1].bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9)
        super().__init__(args, data, "probe", head, optimizer, args.probe_blr, args.probe_epochs,
                         len(data.train_labels))
        self.parallel = head
        self.encoder = encoder
        self.encoder_checksum = checksum(*encoder.state_dict().values())

    def logits(self, images: Tensor) -> Tensor:
        return self.model(features(self.args, self.data, self.encoder, images))

    def loss(self, ids: Tensor, images: Tensor, theta: Tensor) -> Tensor:
        # Each process encodes its own images. Then the processes exchange the features, and each
        # trains the same head on all of them. So the head needs no DDP.
        x = features(self.args, self.data, self.encoder, images)
        all_x = torch.zeros(WORLD_SIZE, *x.shape, device=DEVICE)
        all_labels = torch.zeros(WORLD_SIZE, len(ids), dtype=torch.int64, device=DEVICE)
        all_x[RANK] = x
        all_labels[RANK] = self.data.train_labels[ids]
        logits = self.model(all_reduce(all_x).flatten(0, 1))
        return F.cross_entropy(logits, all_reduce(all_labels).flatten())

    def end_epoch(self, done: int) -> dict[str, str]:
        if done < self.epochs:
            return {"test_accuracy": "", "cached_accuracy": ""}
        return {"test_accuracy": accuracy(self),
                "cached_accuracy": cached_probe(self.args, self.data, self.encoder)}


@torch.no_grad()
def features(args, data, encoder: amt.ViT, images: Tensor) -> Tensor:
    """[CLS] (B, D) of images (B, 3, H, H), 0 to 255."""
    encoder.eval()
    with precision(args):
        return encoder(data.normalise(images))[:, 0].float()


def cached_probe(args, data, encoder: amt.ViT) -> str:
    """The test accuracy, in percent, of a linear layer on [CLS] of whole images, standardised.

    There is no augmentation, so each image goes through the encoder once. A random tenth of the
    training images is held out. The layer is trained on the others until the loss of the held-out
    ones has not improved in three rounds of L-BFGS.
    """
    def all_features(split: str, n: int) -> Tensor:
        x = torch.zeros(n, encoder.embed_dim, device=DEVICE)
        for ids, images in data.whole(split, share(n)):
            x[ids] = features(args, data, encoder, images)
        return all_reduce(x)

    labels = data.train_labels
    x, x_test = all_features("train", len(labels)), all_features("test", len(data.test))
    std, mean = torch.std_mean(x, dim=0)
    x, x_test = (x - mean) / (std + 1e-6), (x_test - mean) / (std + 1e-6)
    torch.manual_seed(seed_of(args.seed, "cached probe"))
    held_out, used = torch.randperm(len(x)).to(DEVICE).tensor_split([len(x) // 10])
    head = nn.Linear(encoder.embed_dim, data.classes).to(DEVICE)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=10)

    def training_loss() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x[used]), labels[used])
        loss.backward()
        return loss

    losses = []                                          # of the held-out images, each round
    test_accuracy = 0.0                                  # in the round with the lowest loss
    while len(losses) < 4 or min(losses[-3:]) < min(losses[:-3]):
        optimizer.step(training_loss)
        with torch.no_grad():
            losses.append(F.cross_entropy(head(x[held_out]), labels[held_out]).item())
            right = head(x_test).argmax(dim=1) == data.test_labels
        if losses[-1] == min(losses):
            test_accuracy = 100 * right.float().mean().item()
    return f"{test_accuracy:.2f}"


class Classifier(nn.Module):
    """Logits (B, classes) of images: a linear layer on [CLS] of the encoder."""

    def __init__(self, encoder: amt.ViT, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images)[:, 0])


class FineTuning(Stage):
    """The encoder and a linear layer on [CLS], after the recipe of He et al., 2022. An untrained
    encoder (--checkpoint none) has no layer-wise learning-rate decay."""

    def __init__(self, args, data, pretrained: amt.ViT):
        torch.manual_seed(seed_of(args.seed))
        encoder = build_encoder(args)
        encoder.load_state_dict(pretrained.state_dict())
        add_drop_path(encoder, 0.1)
        model = Classifier(encoder, data.classes).to(DEVICE)
        depth = len(encoder.blocks)
        decay = 1.0 if args.checkpoint == "none" else 0.75

        def lr_scale(name: str) -> float:
            """1 for the head and the last norm. A layer has `decay` times the next one's."""
            if name.startswith("encoder.blocks."):
                return decay ** (depth - int(name.split(".")[2]))
            below = name.startswith(("encoder.cls_token", "encoder.patch_embed"))
            return decay ** (depth + 1) if below else 1.0

        super().__init__(args, data, "finetune", model, build_optimizer(model, 0.999, lr_scale),
                         args.finetune_blr, args.finetune_epochs, len(data.train_labels))
        self.parallel = wrap(args, model)
        self.encoder_checksum = checksum(*pretrained.state_dict().values())
        self.warmup = self.epochs // 20
        self.augment = args.finetune_randaugment
        self.mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=data.classes),
                                    v2.CutMix(alpha=1.0, num_classes=data.classes)])

    def logits(self, images: Tensor) -> Tensor:
        with precision(self.args):
            return self.model(self.data.normalise(images)).float()

    def loss(self, ids: Tensor, images: Tensor, theta: Tensor) -> Tensor:
        images, labels = self.mix(self.data.normalise(images), self.data.train_labels[ids])
        with precision(self.args):
            logits = self.parallel(images).float()
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    def end_epoch(self, done: int) -> dict[str, str]:
        return {"test_accuracy": accuracy(self)}


def add_drop_path(encoder: amt.ViT, rate: float):
    """In training, the attention and the MLP of a block are skipped for some images (stochastic
    depth). The probability rises linearly from 0 in the first block to `rate` in the last one."""
    depth = len(encoder.blocks)
    for i, block in enumerate(encoder.blocks):
        def skip(module, inputs, output, p=rate * i / max(depth - 1, 1)):
            return stochastic_depth(output, p, "row", module.training)

        block.attn.register_forward_hook(skip)
        block.mlp.register_forward_hook(skip)


@torch.no_grad()
def accuracy(stage: LinearProbe | FineTuning) -> str:
    """The accuracy on the test images, without random crops, in percent."""
    stage.model.eval()
    right = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for ids, images in stage.data.whole("test", share(len(stage.data.test))):
        right += (stage.logits(images).argmax(dim=1) == stage.data.test_labels[ids]).sum()
    return f"{100 * all_reduce(right).item() / len(stage.data.test):.2f}"


def checksum(*tensors: Tensor) -> int:
    crc = 0
    for x in tensors:
        crc = zlib.crc32(x.cpu().contiguous().numpy(), crc)
    return crc


def load_encoder(args) -> amt.ViT:
    """The encoder of --checkpoint: a file of this script, of timm or of MAE ({"model": ...}).
    Positions of another grid are interpolated."""
    torch.manual_seed(seed_of(args.seed))
    encoder = build_encoder(args).to(DEVICE)
    if args.checkpoint == "none":
        return encoder
    try:
        saved = load_file(args.checkpoint)
        saved = saved.get("model", saved.get("state_dict", saved))
        state = {}
        for name, p in saved.items():
            name = name.removeprefix("module.").removeprefix("encoder.")
            if not name.startswith(("decoder", "mask_token", "head.")):
                state[name] = p
        cls, grid = state["pos_embed"].tensor_split([1], dim=1)
        if grid.shape[1] != encoder.grid_size ** 2:
            h = amt.square_side(grid.shape[1])
            grid = grid.unflatten(1, (h, h)).permute(0, 3, 1, 2).float()     # (1, D, h, w)
            grid = F.interpolate(grid, size=encoder.grid_size, mode="bicubic", antialias=True)
            grid = grid.flatten(2).transpose(1, 2)                           # (1, N, D)
        state["pos_embed"] = torch.cat([cls, grid], dim=1)
        encoder.load_state_dict(state)
    except Exception as error:                           # torch.load raises many types
        sys.exit(f"error: --checkpoint {args.checkpoint} does not load as a ViT of --model "
                 f"{args.model}, --patch-size {args.patch_size} and {len(encoder.blocks)} blocks: "
                 f"{one_line(error)}. Give a state dict of this script, timm or MAE")
    return encoder


# ==== Data in memory ==============================================================================

class Images:
    """A data set on the device, as bytes (n, 3, H, H). The first len(train_labels) training images
    have labels. Mean and standard deviation are those of the training pixels."""

    def __init__(self, args, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]):
        self.args = args
        self.fingerprint = checksum(*train, *test)
        size = [args.img_size, args.img_size]
        self.train, self.test = (v2.functional.resize(images, size).to(DEVICE).contiguous()
                                 for images, _ in (train, test))
        self.train_labels, self.test_labels = train[1].to(DEVICE), test[1].to(DEVICE)
        self.classes = int(self.train_labels.max()) + 1
        every = 1 + self.train.numel() // 2 ** 28        # every k-th image: at most 1 GiB
        some = self.train[::every].float()
        self.std, self.mean = (x[:, None, None] for x in torch.std_mean(some, dim=(0, 2, 3)))

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def whole(self, split: str, ids: Tensor):
        """Yields ids (B,) and whole images (B, 3, H, H), 0 to 255, of "train" or "test"."""
        images = self.train if split == "train" else self.test
        for part in ids.to(DEVICE).split(self.args.batch_size):
            yield part, images[part].float()

    def crops(self, ids: Tensor, scale: tuple[float, float], augment: bool, key: tuple):
        """Yields ids (B,), random crops (B, 3, H, H), 0 to 255, and their theta (B, 2, 3), drawn
        from the global random generator. (`Files.crops` draws by `key`.)"""
        for part in ids.to(DEVICE).split(self.args.batch_size):
            theta = amt.random_crops(len(part), scale).to(DEVICE)
            images = amt.crop(self.train[part].float(), theta, self.args.img_size, "bicubic")
            images = images.clamp(0, 255)                # bicubic interpolation overshoots
            if augment:
                images = torch.stack([RAND_AUGMENT(image) for image in images.round().byte()])
            yield part, images.float(), theta


RAND_AUGMENT = v2.RandAugment()


def load_data(args):
    if args.dataset == "shapes":
        return Images(args, shapes(args.num_images, seed=1), shapes(1000, seed=2))
    if args.dataset in ("cifar10", "cifar100", "stl10"):
        return Images(args, *download(args))
    files = Files(args)
    return files if args.dataset == "imagenet" else Images(args, *files.decode_all())


def download(args) -> list[tuple[Tensor, Tensor]]:
    """The training and test images and labels of a data set that torchvision downloads."""
    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}[args.dataset]
    splits = [{"train": True}, {"train": False}]
    if dataset is STL10:
        splits = [{"split": "train+unlabeled"}, {"split": "test"}]   # the unlabelled ones are last
    try:
        if LOCAL_RANK == 0:
            dataset(args.data_path, download=True)
        all_reduce(torch.zeros(1))                       # the others wait for the download
        train, test = (dataset(args.data_path, **split) for split in splits)
    except Exception as error:                           # torchvision raises many types
        sys.exit(f"error: cannot read or download {dataset.__name__} in --data-path "
                 f"{args.data_path} ({one_line(error)}): connect to the internet, or give the "
                 f"directory that holds {dataset.base_folder}")
    if dataset is STL10:
        return [(torch.from_numpy(x.data), torch.tensor(x.labels[x.labels >= 0]).long())
                for x in (train, test)]
    return [(torch.from_numpy(x.data).permute(0, 3, 1, 2), torch.tensor(x.targets))
            for x in (train, test)]


def shapes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n images (n, 3, 32, 32) of textured objects on smooth backgrounds, and labels 0 to 9 (n,).

    Class c has outline c mod 5 (triangle, square, hexagon, disc, flower). The first five classes
    have texture c mod 5, the others the next one. So neither outline nor texture tells the class.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    label = torch.arange(n) % 10
    outline, texture = label % 5, (label + label // 5) % 5
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    angle, size = uniform(-0.2, 0.2, 1, 1), uniform(0.8, 1.0, 1, 1)
    x, y = x - uniform(-0.15, 0.15, 1, 1), y - uniform(-0.15, 0.15, 1, 1)
    x, y = (x * angle.cos() - y * angle.sin()) / size, (x * angle.sin() + y * angle.cos()) / size
    radius, turn = torch.hypot(x, y), torch.atan2(x, -y)                     # (n, 32, 32)

    def polygon(sides: int) -> Tensor:
        sector = (turn + math.pi / sides) % (2 * math.pi / sides) - math.pi / sides
        return radius * sector.cos() < math.cos(math.pi / sides)

    inside = torch.stack([polygon(3), polygon(4), polygon(6), radius < 0.9,
                          radius < 0.7 + 0.3 * (5 * turn).cos()])            # (5, n, 32, 32)
    pattern = torch.stack([(9 * x).sin(), (9 * y).sin(), (12 * radius).sin(),
                           (8 * x).sin() * (8 * y).sin(), (6 * turn).sin()]) > 0
    inside, pattern = inside[outline, torch.arange(n)], pattern[texture, torch.arange(n)]

    corners = uniform(0, 255, 3, 2, 2)
    background = F.interpolate(corners, size=32, mode="bilinear", align_corners=True)
    dark, light = uniform(0, 100, 3, 1, 1), uniform(155, 255, 3, 1, 1)
    image = torch.where(inside[:, None], torch.where(pattern[:, None], light, dark), background)
    return image.round().byte(), label


# ==== Data on disk ================================================================================

class Files:
    """Image files that --workers processes decode anew in each pass. It has the methods of Images.

    Here, crops come from the whole image, a test image is the central square with 0.875 of the
    short side, and mean and standard deviation are ImageNet's, as usual for ImageNet. In Images,
    crops come from the central square, a test image is all of the central square, and mean and
    standard deviation are those of the data set, as usual for CIFAR.
    """
    normalise = Images.normalise

    def __init__(self, args):
        self.args = args
        root = Path(args.data_path)
        try:
            train = ImageFolder(root / "train")
            if args.dataset == "tiny-imagenet":          # lines of file, class and a box
                lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
                fields = [line.split("\t") for line in lines]
                test = [(str(root / "val" / "images" / name), kind) for name, kind, *_ in fields]
            else:
                val = ImageFolder(root / "val")
                test = [(path, val.classes[label]) for path, label in val.samples]
            test = [(path, train.class_to_idx[kind]) for path, kind in test]
            (self.train, train_labels), (self.test, test_labels) = zip(*train.samples), zip(*test)
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"error: --data-path {root} does not have the layout of --dataset "
                     f"{args.dataset}, or a class of val is not in train: {one_line(error)}")
        self.train_labels = torch.tensor(train_labels, device=DEVICE)
        self.test_labels = torch.tensor(test_labels, device=DEVICE)
        self.classes = len(train.classes)
        names = [f"{os.path.relpath(path, root)} {label}" for path, label in train.samples + test]
        self.fingerprint = zlib.crc32(os.fsencode("\n".join(names)))
        mean_std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=DEVICE)
        self.mean, self.std = 255 * mean_std[:, :, None, None]

    def read(self, paths: tuple, ids: Tensor, view, augment: bool = False, key: tuple = ()):
        """Yields ids (B,), pixels (B, 3, H, H), 0 to 255, and theta (B, 2, 3) of these files."""
        loader = DataLoader(
            Decoder(paths, self.args.img_size, view, augment, key), self.args.batch_size,
            sampler=ids.tolist(), num_workers=self.args.workers, worker_init_fn=outlive_signals,
            pin_memory=DEVICE.type == "cuda",
            generator=torch.Generator())                 # else it uses up a global random number
        failure = None
        try:
            for i, batch in enumerate(loader):
                part, pixels, theta = (x.to(DEVICE, non_blocking=True) for x in batch)
                yield part, pixels.permute(0, 3, 1, 2).float(), theta
                if not isinstance(view, tuple):          # training prints its own progress
                    progress(f"read {(i + 1) * self.args.batch_size} of {len(ids)} images")
        except ValueError as error:                      # a worker's own message is the last line
            failure = str(error).splitlines()[-1].removeprefix("ValueError: ")
            error.with_traceback(None)                   # the traceback keeps the workers alive
        if failure:
            sys.exit(f"error: {failure}")

    def whole(self, split: str, ids: Tensor):
        paths, view = (self.train, "whole") if split == "train" else (self.test, 0.875)
        for part, pixels, _ in self.read(paths, ids, view):
            yield part, pixels

    def crops(self, ids: Tensor, scale: tuple[float, float], augment: bool, key: tuple):
        return self.read(self.train, ids, scale, augment, key)

    def decode_all(self) -> list[tuple[Tensor, Tensor]]:
        """The central squares and the labels of all training and all test images, for Images."""
        splits, size = [], self.args.img_size
        for paths, labels in [(self.train, self.train_labels), (self.test, self.test_labels)]:
            images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
            for ids, pixels, _ in self.read(paths, torch.arange(len(paths)), 1.0):
                images[ids.cpu()] = pixels.byte().cpu()
            splits.append((images, labels.cpu()))
        return splits


class Decoder(Dataset):
    """Decodes image files of any size. Item i is (i, RGB bytes (H, H, 3), theta (2, 3)).

    `view` says what part of the image is shown, and theta says where this part lies. "whole" is
    all of it, whatever its aspect ratio. A number is the central square with this fraction of the
    short side. A pair is a random crop with an area in this range; its random numbers follow from
    `key` and i.
    """

    def __init__(self, paths: tuple, img_size: int, view, augment: bool, key: tuple):
        self.paths = np.array([os.fsencode(path) for path in paths])     # shared with the workers
        self.img_size = img_size
        self.view = view
        self.augment = augment
        self.key = key

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
        path = os.fsdecode(self.paths[i])
        try:
            with Image.open(path) as image:
                pixels, theta = self.show(image, i)
        except Exception as error:                       # Pillow raises many types
            raise ValueError(f"cannot decode {path} ({one_line(error)}): repair the file, or "
                             f"remove it and start a new run") from None
        if self.augment:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.key, i, "augment"))
                pixels = RAND_AUGMENT(pixels)
        return i, pixels.permute(1, 2, 0).contiguous(), theta    # Pillow's layout copies fastest

    def show(self, image: Image.Image, i: int) -> tuple[Tensor, Tensor]:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode} has more than 8 bits a channel: convert it")
        width, height, x, y, flip = self.area(image, i)

        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop still has enough pixels.
        size = self.img_size
        W, H = image.size
        shrink = max(size / (W * width), size / (H * height))
        image.draft(None, (math.ceil(shrink * W), math.ceil(shrink * H)))
        if image.mode != "RGB":
            image = image.convert("RGB")

        # The crop is rounded to whole pixels, at least one, and theta is that of the rounded crop.
        W, H = image.size                                # draft has changed it
        left = min(round((x - width + 1) / 2 * W), W - 1)
        top = min(round((y - height + 1) / 2 * H), H - 1)
        right = max(round((x + width + 1) / 2 * W), left + 1)
        bottom = max(round((y + height + 1) / 2 * H), top + 1)
        theta = torch.tensor([[(right - left) / W * (-1 if flip else 1), 0, (left + right) / W - 1],
                              [0, (bottom - top) / H, (top + bottom) / H - 1]])

        pixels = torch.from_numpy(np.array(image.crop((left, top, right, bottom))))
        pixels = v2.functional.resize(pixels.permute(2, 0, 1), [size, size],
                                      v2.InterpolationMode.BICUBIC)          # antialiased
        return pixels.flip(2) if flip else pixels, theta

    def area(self, image: Image.Image, i: int) -> tuple[float, float, float, float, bool]:
        """Width and height of the view as fractions of the image, its centre (x, y) in [-1, 1], and
        whether it is flipped."""
        W, H = image.size
        if self.view == "whole":
            return 1, 1, 0, 0, False
        if isinstance(self.view, tuple):
            g = torch.Generator().manual_seed(seed_of(self.key, i))
            theta = amt.random_crops(1, self.view, generator=g, image_ratio=W / H)[0]
            (width, _, x), (_, height, y) = theta.tolist()
            return abs(width), height, x, y, width < 0
        side = self.view * min(W, H)
        return side / W, side / H, 0, 0, False


# ==== Checkpoints =================================================================================

def write_file(path: Path, content):
    """Writes bytes or a checkpoint. A kill leaves either the old file or the new one, whole."""
    if RANK != 0:
        return
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getbuffer()
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        sys.exit(f"error: cannot write {path} ({error}): free some space, or give another "
                 f"--out-dir. The old file is unharmed")


def load_file(path: Path | str) -> dict:
    """Loads a file of torch.save after checking its checksums, which torch does not."""
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
        raise ValueError("a checksum is wrong")
    with torch.serialization.safe_globals([argparse.Namespace]):             # is in MAE's files
        return torch.load(path, map_location=DEVICE, weights_only=True)


def settings(stage: Stage) -> dict:
    """What a resumed run must share with its checkpoint: flags, images, and the encoder that a
    probe or a fine-tuning starts from. The flags of the other stages may change."""
    free = ["data_path", "out_dir", "resume", "save_every", "workers", "accum_steps", "checkpoint",
            "probe_every", "compile", "benchmark"]
    flags = {name: value for name, value in vars(stage.args).items() if name not in free
             and (name.startswith(stage.name) or not name.startswith(("probe_", "finetune_")))}
    return flags | {"images": stage.data.fingerprint, "encoder": stage.encoder_checksum}


def save_checkpoint(stage: Stage):
    for x in [stage.run["loss"], *stage.model.parameters()]:
        check_finite(stage, x)
    if stage.name == "pretraining":
        write_file(stage.args.out_dir / "encoder.pth", stage.model.encoder.state_dict())
    write_file(stage.args.out_dir / f"{stage.prefix}checkpoint.pth", {
        "model": stage.model.state_dict(), "optimizer": stage.optimizer.state_dict(),
        "settings": settings(stage), "run": stage.run})


def load_checkpoint(stage: Stage):
    path = stage.args.out_dir / f"{stage.prefix}checkpoint.pth"
    try:
        saved = load_file(path)
        now, then = settings(stage), saved["settings"]
        differ = [f"{k} {then.get(k)} (now {now[k]})" for k in now if then.get(k) != now[k]]
        if differ:
            sys.exit(f"error: {path} was made with other settings: {', '.join(differ)}. Resume "
                     f"with the old ones, or give another --out-dir")
        if not 0 <= saved["run"]["step"] <= stage.epochs * stage.steps:
            raise ValueError(f"the run has no step {saved['run']['step']}")
        stage.model.load_state_dict(saved["model"])
        stage.optimizer.load_state_dict(saved["optimizer"])
        stage.run.update({name: saved["run"][name] for name in stage.run})
        say(f"{stage.name} resumes after step {stage.run['step']} from {path}")
    except FileNotFoundError:
        say(f"{path} does not exist yet: {stage.name} starts from the beginning")
    except Exception as error:                           # torch.load raises many types
        sys.exit(f"error: {path} is damaged or not a checkpoint of this script "
                 f"({one_line(error)}): give another --out-dir")
    check_same(f"steps in {path}", stage.run["step"])


# ==== Processes, signals, printed lines ===========================================================

def all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """Reduces x over the processes, in place: sums it, if no other `op` is given."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x, op)
    return x


def share(n: int) -> Tensor:
    """The part of 0 ... n-1 that this process takes."""
    return torch.arange(n).tensor_split(WORLD_SIZE)[RANK]


def check_same(what: str, value):
    """Ends the run if a value differs between the processes."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        sys.exit(f"error: the processes differ in their {what}: {values}. Give all nodes the same "
                 f"--data-path and --out-dir")


def seed_of(*key) -> int:
    return random.Random(repr(key)).getrandbits(63)


def open_out_dir(args):
    """Makes --out-dir and returns an open lock file: while it is open, no second run starts."""
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        old = [path.name for path in args.out_dir.glob("*.pth")]
        if old and not args.resume:
            sys.exit(f"error: --out-dir {args.out_dir} has files of an earlier run ({old[0]}): "
                     f"continue it with --resume, or give another --out-dir")
        lock = open(args.out_dir / ".lock", "w")
        if RANK == 0:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: another run is writing to {args.out_dir}: give another --out-dir")
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot write to --out-dir {args.out_dir} ({error}): give another one")
    return lock


SIGNALS = {}                            # the signals that came, and when


def note_signals():
    """From now on `fit` finishes its step after a signal, saves and stops. A second signal kills,
    unless it comes within a second, because torchrun and Slurm send each signal twice."""
    def note(number, frame):
        SIGNALS.setdefault(number, time.time())
        if time.time() - min(SIGNALS.values()) > 1:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:       # nohup ignores SIGHUP
            signal.signal(number, note)


def outlive_signals(worker: int):
    """After a signal, a process that decodes images lives 10 s longer: the step needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.alarm(10))


def say(text: str):
    """Prints on rank 0. A terminal or a pipe that is closed does not end the run."""
    if RANK == 0:
        with suppress(OSError, UnicodeError):
            print(text, flush=True)


def progress(text: str):
    """Prints a line, but not more than one a minute."""
    if time.time() - progress.last >= 60:
        progress.last = time.time()
        say(text)


progress.last = time.time()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def keep_freed_memory():
    """Makes glibc keep freed blocks. On a CPU, new ones cost up to a quarter of a step."""
    with suppress(OSError, AttributeError, TypeError):   # another C library
        ctypes.CDLL(None).mallopt(-4, 0)                 # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)       # M_TRIM_THRESHOLD


# ==== Pictures ====================================================================================

def save_grid(rows: list[Tensor], path: Path):
    """Saves rows of pictures (8, 3, H, W) in [0, 1] as a PNG file."""
    images = torch.cat([F.interpolate(row, size=128, mode="nearest") for row in rows])
    file = io.BytesIO()
    save_image(images, file, format="png", nrow=len(rows[0]), padding=4, pad_value=1.0)
    write_file(path, file.getvalue())


def heat(maps: Tensor) -> Tensor:
    """Colours (B, 3, h, w) of maps (B, h, w) in [0, 1]: black, red, yellow, white."""
    return torch.stack([3 * maps, 3 * maps - 1, 3 * maps - 2], dim=1).clamp(0, 1)


@torch.no_grad()
def save_masking(stage: Pretraining):
    """masking.png: test images, attention, masked (grey) and thrown (black) patches, predictions.

    MAE predicts normalised patches. They are shown with the mean and contrast of the true patch.
    MaskFeat predicts no pixels, so it has no row of predictions. Here --weights shuffled and
    debiased know only the maps of these eight images.
    """
    args, data, model, p = stage.args, stage.data, stage.model, stage.args.patch_size
    pixels = stage.shown()
    shown, images = pixels / 255, data.normalise(pixels)
    maps = amt.attention_maps(model.encoder, images)
    torch.manual_seed(seed_of(args.seed))
    masking = stage.masking()
    strategy, unit = masking.pop("strategy"), masking["unit"]
    ranking = strategy(amt.patchify(reweight(maps, args.weights)[:, None], unit).sum(dim=2))
    masked, thrown, visible = amt.mask_and_throw(ranking, **masking)
    model.eval()
    _, pred = model(images, visible=visible, masked=masked)
    if args.method == "mae":
        target = amt.select(amt.patchify(images, p), masked)
        pred = pred * target.std(dim=2, keepdim=True) + target.mean(dim=2, keepdim=True)

    def paint(patches: Tensor, ids: Tensor, colours) -> Tensor:
        return patches.scatter(1, ids[:, :, None].expand(-1, -1, patches.shape[2]), colours)

    patches = paint(amt.patchify(shown, p), thrown, 0.0)
    rows = [shown, heat(maps), amt.unpatchify(paint(patches, masked, 0.5), p)]
    if args.method != "maskfeat":
        std, mean = (x.flatten().repeat(p * p) / 255 for x in (data.std, data.mean))
        predicted = paint(patches, masked, (pred * std + mean).clamp(0, 1))
        rows.append(amt.unpatchify(predicted, p))
    save_grid(rows, args.out_dir / "masking.png")


# ==== Benchmark ===================================================================================

def benchmark(args):
    """Prints the time and the operations of a step: random masking against AMT, in turn."""
    B = args.batch_size
    args.global_batch = B
    args.accum_steps = 1
    pixels = torch.randint(256, (B, 3, args.img_size, args.img_size), dtype=torch.uint8)
    images = (pixels, torch.arange(B) % 2)
    stage = Pretraining(args, Images(args, images, images))
    whole = [(torch.arange(B), stage.data.normalise(stage.data.train.float()))]
    rows = [("random", METHODS[args.method]["random"]),
            *(("attention", ratios) for ratios in METHODS[args.method]["amt"])]
    times = [[] for _ in range(len(rows) + 1)]           # of a step by each row, and of an update
    began = time.perf_counter()
    while len(times[-1]) < 3 or len(times[-1]) < 11 and time.perf_counter() - began < 40:
        with precision(args):
            started = time.perf_counter()
            maps = amt.dataset_maps(stage.model.encoder, whole, B)
        times[-1].append(synchronised_time() - started)
        for i, (masking, ratios) in enumerate(rows):
            args.masking = masking
            args.mask_ratio, args.throw_ratio = ratios
            started = time.perf_counter()
            stage.run["maps"] = maps if masking == "attention" else None
            stage.loss(*next(batches(stage, 0))).backward()
            stage.optimizer.step()
            stage.optimizer.zero_grad()
            times[i].append(synchronised_time() - started)
    # The first round compiles and is left out.
    seconds = [float(np.median(row[1:])) for row in times]
    gflop = [operations(args, ratios) / 1e9 for _, ratios in rows]
    chip = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    say(f"{args.method}, {args.model}, {args.img_size} pixels, patches of {args.patch_size}, batch "
        f"{B}, {args.precision}, {chip}, torch {torch.__version__}, medians of "
        f"{len(times[0]) - 1} rounds\n"
        f"masking    mask throw       step   images/s GFLOP/image  time GFLOP (of random's)")
    for (masking, ratios), s, ops in zip(rows, seconds, gflop):
        say(f"{masking:9}{ratios[0]:6.2f}{ratios[1]:6.2f}{1e3 * s:8.1f} ms{B / s:11,.1f}{ops:12.3f}"
            f"{s / seconds[0]:6.2f}{ops / gflop[0]:6.2f}")
    say(f"update of the attention maps: {B / seconds[-1]:,.1f} images/s")


def synchronised_time() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def operations(args, ratios: tuple[float, float]) -> int:
    """Floating-point operations per image of the matrix products, forward and backward."""
    with torch.device("meta"), PlainAttention(), FlopCounterMode(display=False) as counter:
        ranking = torch.arange((args.img_size // args.patch_size // args.mask_unit) ** 2)[None]
        masked, _, visible = amt.mask_and_throw(ranking, *ratios, unit=args.mask_unit)
        images = torch.zeros(1, 3, args.img_size, args.img_size)
        build_model(args)(images, visible=visible, masked=masked)[0].backward()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
