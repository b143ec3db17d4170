"""Pretrain a vision transformer with AMT, then probe it and fine-tune it.

    python train_cifar.py --dataset shapes --out-dir out-shapes     # offline, minutes on a CPU
    python train_cifar.py                                           # CIFAR-10, on one GPU
    python train_cifar.py --resume                                  # continue a stopped run
    python train_cifar.py --checkpoint out/encoder.pth --epochs 0 \\
        --finetune-epochs 100 --out-dir out-finetuned               # fine-tune an encoder
    torchrun --nproc_per_node=4 train_cifar.py --dataset imagenet --data-path DIR    # 4 GPUs

A run writes to --out-dir: encoder.pth (with timm's names), checkpoint.pth (for --resume; its "data"
has the images' mean and std and the classes), attention.png (where [CLS] looks), masking.png (what
is masked, thrown, predicted) and log.csv: seconds and images_per_second of an epoch's steps,
map_seconds of new maps, position_share (the fraction of the maps' variance that a patch's position
explains), probe_cls and probe_mean (test accuracy of linear classifiers on [CLS] and the mean of
the patches). Fine-tuning writes finetuned.pth, finetune-checkpoint.pth and finetune-log.csv.
"""
import argparse
import math
import os
import random
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from torchvision.utils import make_grid

import amt

RANK = int(os.environ.get("RANK", 0))                    # torchrun sets these three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")

# (mask ratio, throw ratio), the side of a masking unit in patches, the range of a crop's area.
METHODS = {
    "mae": dict(random=(0.75, 0.0), amt=(0.45, 0.40), unit=1, scale=(0.2, 1)),
    "simmim": dict(random=(0.60, 0.0), amt=(0.44, 0.26), unit=2, scale=(0.67, 1)),
    "maskfeat": dict(random=(0.40, 0.0), amt=(0.44, 0.26), unit=2, scale=(0.5, 1)),
}
STRATEGIES = {"attention": amt.sample_patches, "random": amt.random_ranking,
              "attmask": amt.highest_first, "mst": amt.lowest_first,
              "block": amt.block_wise, "grid": amt.grid_wise}
USE_MAPS = ["attention", "attmask", "mst"]               # strategies that rank by attention
MODELS = ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
POSITIVE = "square_size workers depth update_interval batch_size accum_steps save_every".split()
DOWNLOADS = {  # the class in torchvision, and its arguments for training and for test images
    "cifar10": (CIFAR10, dict(train=True), dict(train=False)),
    "cifar100": (CIFAR100, dict(train=True), dict(train=False)),
    "stl10": (STL10, dict(split="train+unlabeled"), dict(split="test")),     # unlabeled come last
}
DATASETS = {  # flags of a dataset that differ from cifar10's
    "cifar10": {}, "cifar100": {},
    "stl10": dict(img_size=96, patch_size=8),
    "tiny-imagenet": dict(img_size=64, patch_size=8, square_size=64),
    "folder": dict(img_size=224, patch_size=16, square_size=320),
    "imagenet": dict(img_size=224, patch_size=16, square_size=320, model="vit_base", blr=1.5e-4,
                     decoder_embed_dim=512, decoder_depth=8, save_every=1),
    "shapes": dict(depth=3, decoder_embed_dim=96, decoder_depth=1, epochs=24, batch_size=64,
                   blr=4e-3),
}

# ==== Flags =======================================================================================
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train_cifar.py [flags]", allow_abbrev=False, add_help=False)

    def add(flag: str, default, text: str, **kwargs):    # to the group that is current
        if default is False:
            kwargs["action"] = "store_true"
        elif default is not None:
            kwargs.setdefault("type", type(default))
            text += " (default: %(default)s)"
        group.add_argument(flag, default=default, help=text, **kwargs)
    group = parser.add_argument_group("data")
    add("--dataset", "cifar10", "cifar10, cifar100 and stl10 are downloaded; shapes is generated; "
        "the others are files in --data-path, train/<class>/ and, to probe or fine-tune, "
        "val/<class>/; imagenet decodes them in each epoch, the others once", choices=DATASETS)
    dataset = parser.parse_known_args(argv)[0].dataset   # decides the defaults of other flags
    add("--data-path", "data", "directory of the images", metavar="DIR")
    add("--num-images", 2500, "training images of shapes")
    add("--img-size", 32, "side of a crop in pixels")
    add("--square-size", None, "files become squares of this side (default: %(default)s)", type=int)
    add("--workers", min(16, os.cpu_count() or 1), "threads that decode files")
    group = parser.add_argument_group("model")
    add("--model", "vit_tiny", "size of the encoder", choices=MODELS)
    add("--depth", None, "blocks; None is the model's number (default: %(default)s)", type=int)
    add("--patch-size", 4, "side of a patch in pixels")
    add("--decoder-embed-dim", 192, "width of the MAE decoder, a multiple of 32")
    add("--decoder-depth", 4, "blocks of the MAE decoder")
    add("--checkpoint", None, "an encoder of this script, timm or MAE to pretrain further or, with "
        "--epochs 0, to probe or fine-tune; none stands for a new one", metavar="FILE")
    group = parser.add_argument_group("masking")
    add("--method", "mae", "maskfeat is simmim with HOG targets", choices=METHODS)
    add("--masking", "attention", "how patches are ranked: attention draws them, attmask takes the "
        "highest attention first, mst the lowest; the others ignore it", choices=STRATEGIES)
    add("--weights", "own", "whose attention map: the image's own, another image's, 1 for each "
        "patch, or (shapes only) where the object truly is",
        choices=["own", "shuffled", "uniform"] + ["object"] * (dataset == "shapes"))
    add("--map-floor", 0.0, "rank by floor + (1 - floor) * map, so that hints of the object stay")
    add("--mask-ratio", None, "fraction of patches to mask (default: the paper's)", type=float)
    add("--throw-ratio", None, "fraction of patches to throw (default: the paper's)", type=float)
    add("--update-interval", None, "epochs between new maps (default: a tenth, at least 4, but at "
        "most half)", type=int)
    group = parser.add_argument_group("pretraining")
    add("--epochs", 400, "epochs of pretraining; 0, with --checkpoint, skips it")
    add("--warmup-epochs", None, "epochs of warm-up (default: a tenth)", type=int)
    add("--batch-size", 512, "images per process and forward pass")
    add("--accum-steps", 1, "forward passes per process and optimizer step")
    add("--blr", 5e-4, "base learning rate, which is multiplied by the images per step / 256")
    add("--probe-every", 0, "epochs between linear probes; 0 probes after the last epoch only")
    group = parser.add_argument_group("fine-tuning")
    add("--finetune-epochs", 0, "epochs of fine-tuning; 0 skips it")
    add("--finetune-blr", 1e-3, "base learning rate of fine-tuning")
    add("--finetune-randaugment", False, "fine-tune with RandAugment")
    group = parser.add_argument_group("run")
    add("--seed", 0, "seed of all random numbers")
    add("--out-dir", Path("out"), "directory of the run's files", metavar="DIR")
    add("--resume", False, "continue the run in --out-dir; repeat its flags")
    add("--save-every", 10, "epochs between checkpoints")
    bf16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    add("--precision", "bf16" if bf16 else "fp32", "fp32 is TF32 on GPUs", choices=["bf16", "fp32"])
    add("--compile", False, "use torch.compile")
    group.add_argument("-h", "--help", action="help", help="show this, with the dataset's defaults")
    parser.set_defaults(**DATASETS[dataset])
    args = parser.parse_args(argv)
    ratios = METHODS[args.method]["amt" if args.masking == "attention" else "random"]
    tenth = min(max(4, round(args.epochs / 10)), max(1, args.epochs // 2))
    for name, default in dict(mask_ratio=ratios[0], throw_ratio=ratios[1], update_interval=tenth,
                              warmup_epochs=args.epochs // 10).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name, value in vars(args).items():
        least = 1 if name in POSITIVE else 0
        if isinstance(value, (int, float)) and not value >= least:           # nor may it be nan
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not args.epochs and not args.checkpoint:
        parser.error("--epochs 0 needs a --checkpoint: a FILE to probe or fine-tune, or 'none'")
    if args.masking != "attention" and (args.weights != "own" or args.map_floor):
        parser.error(f"--weights and --map-floor need --masking attention, got {args.masking}")
    if args.map_floor > 1:
        parser.error(f"--map-floor must be at most 1, got {args.map_floor}")
    if args.masking in USE_MAPS and args.update_interval >= args.epochs > 1:
        parser.error(f"--update-interval must be less than --epochs, got {args.update_interval}")
    args.global_batch = args.batch_size * args.accum_steps * WORLD_SIZE
    return args

# ==== Pretraining =================================================================================
def pretrain(args, train: "Images", test: "Images", encoder: amt.ViT):
    """Pretrains the encoder. Until the first attention maps exist, masking is random."""
    method, size, use_maps = METHODS[args.method], args.img_size, args.masking in USE_MAPS
    model = build_model(args, encoder).to(DEVICE)
    run = Run(args, "pretraining", model, build_optimizer(model), args.blr, args.epochs,
              args.warmup_epochs, train, len(train))
    unit_size = method["unit"] * args.patch_size         # side of a masking unit in pixels
    N = amt.patchify(torch.zeros(1, 1, size, size), unit_size).shape[1]      # units in a crop
    uniform = torch.ones(args.batch_size, N, device=DEVICE)
    amt.mask_and_throw(uniform, args.mask_ratio, args.throw_ratio)   # so that bad ratios fail now
    updates = range(args.update_interval, args.epochs, args.update_interval)
    if use_maps and args.checkpoint not in (None, "none") and run.maps is None:
        run.maps, _ = new_maps(args, train, encoder, 0)  # a trained encoder's maps are of use

    for epoch in range(len(run.log), args.epochs):
        rank_patches, ratios = STRATEGIES[args.masking], (args.mask_ratio, args.throw_ratio)
        if use_maps and run.maps is None:
            rank_patches, ratios = amt.random_ranking, method["random"]
        model.train()
        for ids, squares, aspect, last in run.mini_batches(epoch):            # (B,), (B, 3, S, S)
            # The same theta cuts the images and their attention maps.
            theta = amt.random_crops(len(ids), method["scale"], image_ratio=aspect)
            images = train.normalize(amt.crop(squares, theta, size, "bicubic"))
            weights = uniform                                                # (B, N)
            if run.maps is not None:                                         # (n, h, w)
                weights = amt.crop_weights(run.maps[ids], theta, size, unit_size)
            ranking = rank_patches(weights)                                  # Eq. 5
            masked, _, visible = amt.mask_and_throw(ranking, *ratios, method["unit"])    # Eq. 6
            with autocast(args):
                loss, _ = run.parallel(images, visible=visible, masked=masked)           # Eq. 2
            loss = loss / args.accum_steps
            loss.backward()
            run.loss += loss.detach()
            if last:                                     # of the accum_steps in a step
                run.optimizer.step()
                run.optimizer.zero_grad()

        done = epoch + 1
        row = dict(map_seconds="", position_share="", probe_cls="", probe_mean="")
        update = use_maps and done in updates
        probe = done == args.epochs or (args.probe_every and done % args.probe_every == 0)
        if update or probe:
            run.save()                                   # because either may take minutes
        if update:
            began = time.time()
            run.maps, row["position_share"] = new_maps(args, train, encoder, done)   # Eq. 3 and 4
            row["map_seconds"] = f"{time.time() - began:.2f}"
        if RANK == 0 and (done in updates or done == args.epochs):
            save_pictures(args, run, test if len(test) else train, rank_patches, ratios, done)
        if probe:
            row |= linear_probe(args, train, test, encoder)
        run.end_epoch(row)

def new_maps(args, train: "Images", encoder: amt.ViT, epoch: int) -> tuple[Tensor, str]:
    """What patches are ranked by, (n, h, w): the attention maps of all training images, changed as
    --weights says. And the fraction of the maps' variance that the position of a patch explains."""
    if args.weights in ["uniform", "object"]:            # neither needs attention
        return reweight(args, torch.ones(len(train), 1, 1, device=DEVICE), train).half(), ""
    batches = train.read(share(len(train)).split(args.batch_size), "attention maps")
    whole = ((ids, train.whole(squares)) for ids, squares, _ in batches)
    with autocast(args):
        maps = all_reduce(amt.dataset_maps(encoder, whole, len(train))).float()
    position_share = maps.mean(dim=0).var() / maps.var()
    torch.manual_seed(seed_of(args.seed, "shuffled", epoch))
    return reweight(args, maps, train).half(), f"{position_share.item():.4f}"

def reweight(args, maps: Tensor, images: "Images", ids=slice(None)) -> Tensor:
    """The maps (n, h, w) of these images, or what --weights takes instead, with --map-floor."""
    if args.weights == "shuffled":
        maps = maps[torch.randperm(len(maps)).to(maps.device)]
    elif args.weights != "own":
        maps = torch.ones_like(maps) if args.weights == "uniform" else images.objects[ids]
    return args.map_floor + (1 - args.map_floor) * maps

def build_model(args, encoder: amt.ViT) -> nn.Module:
    if args.method != "mae":
        return amt.SimMIM(encoder, "hog" if args.method == "maskfeat" else "pixels")
    return amt.MAE(encoder, args.decoder_embed_dim, args.decoder_depth,
                   args.decoder_embed_dim // 32, norm_pix_loss=True)

def build_optimizer(model: nn.Module, beta2: float = 0.95, lr_scale=lambda name: 1.0):
    """AdamW. Biases, norms and tokens have no weight decay. lr_scale(name) multiplies the rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.05 if name.endswith("weight") and p.ndim > 1 else 0.0
            groups.setdefault((decay, lr_scale(name)), []).append(p)
    groups = [dict(params=p, weight_decay=d, lr_scale=scale) for (d, scale), p in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)

def autocast(args):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.precision == "bf16")

# ==== A run: steps, log, checkpoint ===============================================================
class Run:
    """The training of a model, and all that a checkpoint holds of it. The seed and the number of a
    step determine its images and random numbers, so a resumed run ends as an unbroken one."""
    KEPT = ["step", "loss", "seconds", "log", "maps", "snapshots"]           # in a checkpoint

    def __init__(self, args, name: str, model: nn.Module, optimizer, blr: float, epochs: int,
                 warmup: int, train: "Images", n: int):
        self.args, self.name, self.model, self.optimizer = args, name, model, optimizer
        self.peak_lr = blr * args.global_batch / 256
        self.epochs, self.warmup = epochs, warmup
        self.train, self.n = train, n                    # it trains on the first n images
        self.per_epoch = n // args.global_batch          # steps
        if not self.per_epoch:
            raise ValueError(f"a step takes {args.global_batch} images, but there are only {n}")
        self.step, self.seconds = 0, 0.0                 # steps in all; seconds in this epoch
        self.loss = torch.zeros((), dtype=torch.float64, device=DEVICE)      # sum over this epoch
        self.log, self.maps, self.snapshots = [], None, {}       # its rows; (n, h, w); for pictures
        self.prefix = "" if name == "pretraining" else f"{name}-"
        self.path = args.out_dir / f"{self.prefix}checkpoint.pth"
        if args.resume and self.path.exists():
            saved = load_file(self.path)
            refuse_other(self.path, saved["data"], train.about)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            vars(self).update({kept: saved[kept] for kept in self.KEPT})
            say(f"{name} resumes after step {self.step} from {self.path}")
        elif args.resume:
            say(f"{self.path} does not exist yet: {name} starts from the beginning")
        self.parallel = torch.compile(model, dynamic=False) if args.compile else model
        if WORLD_SIZE > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.parallel)

    def mini_batches(self, epoch: int):
        """Yields this process's mini-batches of the steps that are left of this epoch, as
        `Images.read` does, and whether each is the last of its step, after which the caller updates
        the weights. After a signal it waits for the end of the step, saves and ends the run."""
        args, accum, first = self.args, self.args.accum_steps, epoch * self.per_epoch
        torch.manual_seed(seed_of(args.seed, self.name, epoch))
        order = torch.randperm(self.n)[: self.per_epoch * args.global_batch]
        order = order.view(self.per_epoch, WORLD_SIZE, accum, args.batch_size)
        mine = order[self.step - first:, RANK]           # (steps that are left, accum, B)
        batches = self.train.read(mine.flatten(0, 1))
        began = time.time() - self.seconds
        while self.step < first + self.per_epoch:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step) * group["lr_scale"]
            for i in range(accum):
                last = i + 1 == accum
                # Each part of a step has its own seed, so the number of processes may change.
                torch.manual_seed(seed_of(args.seed, self.name, self.step, RANK * accum + i))
                self.parallel.require_backward_grad_sync = last      # DDP averages in the last only
                ids, squares, aspect = next(batches)
                yield ids, squares, aspect, last
            self.step += 1
            self.seconds = time.time() - began
            show_progress(lambda: self.progress(epoch))
            # One process's signal stops all of them.
            received = all_reduce(torch.tensor(max(SIGNALS, default=0)), dist.ReduceOp.MAX)
            if received:
                self.save()
                say(f"stopped after step {self.step} of {self.name}: the same command with "
                    "--resume continues")
                sys.exit(128 + received.item())
        if not all_reduce(self.loss.clone()).isfinite():         # waits for the GPU
            self.save()                                  # raises the error, so nothing is saved
        self.seconds = time.time() - began

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to 0."""
        epoch, warmup = step / self.per_epoch, self.warmup
        if epoch < warmup:
            return self.peak_lr * epoch / warmup
        progress = (epoch - warmup) / (self.epochs - warmup)
        return self.peak_lr * (0.5 + 0.5 * math.cos(math.pi * progress))

    def progress(self, epoch: int) -> str:
        done = self.step - epoch * self.per_epoch        # steps of this epoch, in self.seconds
        left = (self.epochs * self.per_epoch - self.step) * self.seconds / done
        return (f"{self.name} {epoch + 1}/{self.epochs}, step {done}/{self.per_epoch}, loss "
                f"{self.loss.item() / done:.3f}, {timedelta(seconds=round(left))} left, "
                f"{done * self.args.global_batch / self.seconds:.0f} images/s")

    def end_epoch(self, columns: dict[str, str]):
        """Adds a row to the log, prints it, and saves if it is time."""
        loss = all_reduce(self.loss.clone()).item() / WORLD_SIZE / self.per_epoch
        speed = self.per_epoch * self.args.global_batch / self.seconds
        row = {"epoch": str(len(self.log) + 1), "loss": f"{loss:.5f}",
               "lr": f"{self.learning_rate(self.step - 1):.3e}", "seconds": f"{self.seconds:.2f}",
               "images_per_second": f"{speed:.0f}"} | columns
        self.log.append(row)
        say(f"{self.name}: " + ", ".join(f"{k} {v}" for k, v in row.items() if v))
        lines = [",".join(self.log[0])] + [",".join(row.values()) for row in self.log]
        write(self.args.out_dir / f"{self.prefix}log.csv", ("\n".join(lines) + "\n").encode())
        self.loss.zero_()
        self.seconds = 0.0
        if len(self.log) % self.args.save_every == 0 or len(self.log) == self.epochs:
            self.save()

    def save(self):
        loss = all_reduce(self.loss.clone()) / WORLD_SIZE
        if not all(x.isfinite().all() for x in [loss, *self.model.parameters()]):
            raise ValueError(f"the loss or a weight is not finite after step {self.step} of "
                             f"{self.name}; not saved. Start anew with a lower --{self.prefix}blr")
        if self.name == "pretraining":
            state = self.model.encoder.state_dict()
            write(self.args.out_dir / "encoder.pth", {name: p.cpu() for name, p in state.items()})
        write(self.path, {name: getattr(self, name) for name in self.KEPT} | {
            "loss": loss, "model": self.model.state_dict(), "data": self.train.about,
            "optimizer": self.optimizer.state_dict(), "settings": settings(self.args, self.name)})
        all_reduce(torch.zeros(1))                       # nobody goes on before it is written

def settings(args, stage: str) -> dict[str, str]:
    """The flags that a resumed run must share with its checkpoint."""
    may_differ = ["data_path", "workers", "resume", "out_dir", "save_every", "accum_steps",
                  "compile", "probe_every"]
    return {k: str(v) for k, v in vars(args).items() if k not in may_differ
            and (stage == "finetune" or not k.startswith("finetune"))}

def refuse_other(what: Path | str, theirs: dict, mine: dict):
    differ = [f"{name} {theirs.get(name)} (here {value})" for name, value in mine.items()
              if theirs.get(name) != value]
    if differ:
        raise ValueError(f"{what} has other flags or images: {', '.join(differ)[:500]}")

def load_file(path: Path | str) -> dict:
    """Loads a file of torch.save after verifying its checksums, which torch does not."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals([argparse.Namespace]):         # is in MAE's files
            return torch.load(path, DEVICE, weights_only=True)
    except Exception as error:                           # torch.load raises many types
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"cannot load {path}: {reason}") from None

def write(path: Path, content: bytes | dict):
    """Writes a file. A kill or a full disk leaves either the old file or the new one, whole."""
    if RANK == 0:
        part = path.with_name(path.name + ".part")
        try:
            with open(part, "wb") as file:
                torch.save(content, file) if isinstance(content, dict) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, RuntimeError) as error:         # torch.save raises the latter
            part.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}, the old file is unharmed: {error}") from None

def seed_of(*key) -> int:
    return random.Random(repr(key)).getrandbits(63)

# ==== Linear probe and fine-tuning ================================================================
@torch.no_grad()
def outputs(args, images: "Images", function, shape: tuple, text: str = "") -> Tensor:
    """function(central crops (B, 3, H, H)) of all images with labels: (n, *shape)."""
    result = torch.zeros(len(images.labels), *shape, device=DEVICE)
    for ids, squares, aspect in images.read(share(len(result)).split(args.batch_size), text):
        with autocast(args):
            result[ids] = function(images.central(squares, aspect)).float()
    return all_reduce(result)

def accuracy(logits: Tensor, images: "Images") -> str:
    return f"{100 * (logits.argmax(dim=1) == images.labels).float().mean().item():.2f}"

def linear_probe(args, train: "Images", test: "Images", encoder: amt.ViT,
                 classify=amt.linear_probe) -> dict[str, str]:
    """The test accuracy of a linear classifier on frozen [CLS] and on the mean of the patches."""
    def readouts(images: Tensor) -> Tensor:
        tokens = encoder(images)                                             # (B, 1+N, D)
        return torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)         # (B, 2, D)
    if len(train.classes) < 2 or not len(test):
        say("no linear probe, because there is one class or no test image")
        return {}
    encoder.eval()
    shape, text = (2, encoder.embed_dim), "features of the probe"
    x = outputs(args, train, readouts, shape, text)                          # (n, 2, D)
    x_test = outputs(args, test, readouts, shape, text)
    accuracies = {}
    torch.set_float32_matmul_precision("highest")        # TF32 would stop the fit early
    for i, name in enumerate(["probe_cls", "probe_mean"]):
        torch.manual_seed(seed_of(args.seed, "probe"))
        accuracies[name] = accuracy(classify(x[:, i], train.labels, x_test[:, i]), test)
    torch.set_float32_matmul_precision("high")
    return accuracies

def finetune(args, train: "Images", test: "Images", encoder: amt.ViT):
    """Trains the encoder and a linear layer on [CLS], after the recipe of He et al., 2022."""
    torch.manual_seed(seed_of(args.seed, "finetune"))
    classes, depth = len(train.classes), len(encoder.blocks)
    head = nn.Linear(encoder.embed_dim, classes).to(DEVICE)
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(OrderedDict(encoder=encoder, head=head))
    encoder.register_forward_hook(lambda module, inputs, tokens: tokens[:, 0])   # head sees [CLS]
    for rate, block in zip(torch.linspace(0, 0.1, depth).tolist(), encoder.blocks):
        def drop_path(module, inputs, y, rate=rate):     # what a hook returns replaces y
            return stochastic_depth(y, rate, "row", module.training)
        block.attn.register_forward_hook(drop_path)
        block.mlp.register_forward_hook(drop_path)
    decay = 0.75 if args.epochs or args.checkpoint != "none" else 1.0        # layer-wise

    def lr_scale(name: str) -> float:
        """1 for the head and the last norm. A layer has `decay` times the next one's."""
        if name.startswith("encoder.blocks."):
            return decay ** (depth - int(name.split(".")[2]))
        below = name.startswith(("encoder.cls_token", "encoder.patch_embed"))
        return decay ** (depth + 1) if below else 1.0
    run = Run(args, "finetune", model, build_optimizer(model, 0.999, lr_scale), args.finetune_blr,
              args.finetune_epochs, args.finetune_epochs // 20, train, len(train.labels))
    mixes = v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)
    mix, augment = v2.RandomChoice(mixes), v2.RandAugment()
    for epoch in range(len(run.log), args.finetune_epochs):
        model.train()
        for ids, squares, aspect, last in run.mini_batches(epoch):
            theta = amt.random_crops(len(ids), image_ratio=aspect)
            images = amt.crop(squares, theta, args.img_size, "bicubic").clamp(0, 255)
            if args.finetune_randaugment:
                images = torch.stack([augment(image) for image in images.round().byte()])
            images, labels = mix(train.normalize(images), train.labels[ids])
            with autocast(args):
                logits = run.parallel(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=0.1) / args.accum_steps
            loss.backward()
            run.loss += loss.detach()
            if last:
                run.optimizer.step()
                run.optimizer.zero_grad()
        logits = outputs(args, test, model.eval(), (classes,))
        run.end_epoch({"test_accuracy": accuracy(logits, test)})
    write(args.out_dir / "finetuned.pth",
          {name.removeprefix("encoder."): p.cpu() for name, p in model.state_dict().items()})

def load_encoder(args) -> amt.ViT:
    """A new encoder, or that of --checkpoint."""
    torch.manual_seed(seed_of(args.seed))
    kwargs = {"depth": args.depth} if args.depth else {}
    encoder = getattr(amt, args.model)(img_size=args.img_size, patch_size=args.patch_size, **kwargs)
    if args.checkpoint not in (None, "none"):
        amt.load_weights(encoder, load_file(args.checkpoint))
    return encoder.to(DEVICE)

# ==== Data ========================================================================================
class Images:
    """Whole images as squares (n, 3, S, S) of bytes, whatever their width / height was: in memory,
    or in files that are decoded whenever they are read. The first len(labels) have labels."""

    def __init__(self, args, labels: list[int], classes: list[str], squares: Tensor | None = None,
                 aspect: Tensor | None = None, files=(), objects: Tensor | None = None):
        self.args, self.classes, self.files, self.squares = args, classes, files, squares
        self.objects = objects                           # of shapes, their fraction of each patch
        self.labels = torch.tensor(labels, dtype=torch.int64, device=DEVICE)
        if squares is not None and squares.nbytes < 2 ** 33:     # more stay in host memory
            self.squares = squares.to(DEVICE)
        self.aspect = torch.ones(len(self)) if aspect is None else aspect       # width / height

    def __len__(self) -> int:
        return len(self.files if self.squares is None else self.squares)

    def read(self, batches, text: str = ""):
        """Yields indices (B,), squares (B, 3, S, S), 0 to 255, on the device, and aspects (B,) for
        each mini-batch of indices. Threads decode files two mini-batches ahead, as Pillow and
        torch release Python's lock. `text` names a pass to show, and to end at a signal."""
        batches = [ids for ids in batches if len(ids)]   # a share may be empty
        ahead = []
        with ThreadPoolExecutor(self.args.workers) as pool:
            for i, ids in enumerate(batches):
                if self.squares is not None:
                    squares = self.squares[ids.to(self.squares.device)]
                    aspect = self.aspect[ids]
                else:
                    for other in batches[i + len(ahead): i + 3]:
                        ahead.append(pool.map(self.decode, [self.files[k] for k in other]))
                    squares, aspect = zip(*ahead.pop(0))
                    squares = torch.stack(squares).permute(0, 3, 1, 2)
                    aspect = torch.tensor(aspect)
                yield ids, squares.to(DEVICE).float(), aspect
                if text:
                    show_progress(lambda: f"{text}: {i + 1} of {len(batches)} mini-batches")
                    if SIGNALS:              # training was saved before; --resume repeats this pass
                        sys.exit(128 + SIGNALS[0])

    def decode(self, path: str) -> tuple[Tensor, float]:
        """An image file as a square (S, S, 3) of bytes, and its width / height."""
        size = [self.args.square_size, self.args.square_size]
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
                aspect = image.width / image.height
                image.draft(None, size)                  # decodes a large JPEG at 1/2, 1/4 or 1/8
                pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
        except Exception as error:                       # Pillow raises many types
            raise ValueError(f"cannot decode {path}: {error}") from None
        # A view: to bring the bytes from Pillow's order into torch's would take 50 % longer.
        square = v2.functional.resize(pixels, size, v2.InterpolationMode.BICUBIC)
        return square.permute(1, 2, 0), aspect

    def normalize(self, pixels: Tensor) -> Tensor:
        return (pixels.clamp(0, 255) - self.mean) / self.std     # bicubic interpolation overshoots

    def whole(self, squares: Tensor) -> Tensor:
        """Normalized whole images (B, 3, H, H), squashed to a square."""
        size = [self.args.img_size, self.args.img_size]
        return self.normalize(v2.functional.resize(squares, size, v2.InterpolationMode.BICUBIC))

    def central(self, squares: Tensor, aspect: Tensor) -> Tensor:
        """Normalized test images (B, 3, H, H): whole, as usual for CIFAR, or if squares are larger
        than crops the central square with 0.875 of the short side, as usual for ImageNet."""
        if squares.shape[2] <= self.args.img_size:
            return self.whole(squares)
        theta = torch.zeros(len(squares), 2, 3)
        theta[:, 0, 0] = 0.875 * (1 / aspect).clamp(max=1)
        theta[:, 1, 1] = 0.875 * aspect.clamp(max=1)
        return self.normalize(amt.crop(squares, theta, self.args.img_size, "bicubic"))

def load_data(args) -> tuple[Images, Images]:
    """The training and the test images. Files get ImageNet's mean and std, others their own."""
    if args.dataset == "shapes":
        train, test = shapes(args, args.num_images, 1), shapes(args, 8000, 2)
    elif args.dataset in DOWNLOADS:
        train, test = download(args)
    else:
        train = image_files(args, "train", [])
        test = image_files(args, "val", train.classes)
    mean, std = 255 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    if args.dataset == "shapes" or args.dataset in DOWNLOADS:
        some = train.squares[::1 + train.squares.numel() // 2 ** 28]         # floats: at most 1 GiB
        std, mean = torch.std_mean(some.float(), dim=(0, 2, 3))
    std = std.clamp_min(1)                               # a channel may be constant
    crc = 0
    for images in (train, test):
        images.mean, images.std = (x.to(DEVICE)[:, None, None] for x in (mean, std))
        names = [os.path.relpath(file, args.data_path) for file in images.files]
        crc = zlib.crc32(os.fsencode(f"{names} {images.labels.tolist()}"), crc)
        if images.squares is not None:
            crc = zlib.crc32(images.squares.cpu().contiguous().numpy(), crc)
    mean, std = ([round(x, 6) for x in (v / 255).tolist()] for v in (mean, std))
    train.about = dict(mean=mean, std=std, classes=train.classes, images=f"checksum {crc:08x}")
    return train, test

def download(args) -> list[Images]:
    """The training and the test images of a dataset that torchvision downloads."""
    kind, *splits = DOWNLOADS[args.dataset]
    try:
        if LOCAL_RANK == 0:
            kind(args.data_path, download=True)
        all_reduce(torch.zeros(1))                       # the others wait for the download
        found = [kind(args.data_path, **split) for split in splits]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot find {kind.base_folder} in --data-path {args.data_path}, nor "
                         f"download it: {error}") from None
    for i, x in enumerate(found):
        squares = torch.from_numpy(x.data if kind is STL10 else x.data.transpose(0, 3, 1, 2).copy())
        labels = x.labels.tolist() if kind is STL10 else x.targets
        found[i] = Images(args, [label for label in labels if label >= 0], x.classes, squares)
    return found

def image_files(args, split: str, classes: list[str]) -> Images:
    """The images in DIR/split/<class>/, with labels as in train/. There may be no val/."""
    folder = Path(args.data_path) / split
    if split == "val" and not folder.exists():
        return Images(args, [], classes)
    found, notes = ImageFolder(folder), folder / "val_annotations.txt"
    files, kinds = [file for file, _ in found.samples], [found.classes[i] for i in found.targets]
    if notes.exists():                                   # Tiny ImageNet's: file, class, a box
        names = dict(line.split("\t")[:2] for line in notes.read_text().splitlines())
        kinds = [names.get(Path(file).name, f"none for {file}") for file in files]
    index = {name: i for i, name in enumerate(classes or found.classes)}
    if set(kinds) - index.keys():
        raise ValueError(f"{folder} has classes that train/ has not: {set(kinds) - index.keys()}")
    labels, ids = [index[kind] for kind in kinds], torch.arange(len(files)).split(512)
    images = Images(args, labels, list(index), files=files)
    if args.dataset != "imagenet":                       # decode them once
        squares, aspect = zip(*((squares.byte().cpu(), aspect)
                               for _, squares, aspect in images.read(ids, f"decoding {split}")))
        images = Images(args, labels, list(index), torch.cat(squares), torch.cat(aspect))
    return images

def shapes(args, n: int, seed: int) -> Images:
    """n textured objects. Class c has outline c mod 5 (triangle, square, hexagon, disc, flower) and
    texture c mod 5 or, from class 5, the next. So neither outline nor texture tells the class."""
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)
    def polygon(sides: int) -> Tensor:
        sector = (turn + math.pi / sides) % (2 * math.pi / sides) - math.pi / sides
        return radius * sector.cos() < math.cos(math.pi / sides)
    g, label = torch.Generator().manual_seed(seed), torch.arange(n) % 10
    outline, texture = label % 5, (label + label // 5) % 5
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    angle, size = uniform(-0.2, 0.2, 1, 1), uniform(0.8, 1.0, 1, 1)
    x, y = x - uniform(-0.15, 0.15, 1, 1), y - uniform(-0.15, 0.15, 1, 1)
    x, y = (x * angle.cos() - y * angle.sin()) / size, (x * angle.sin() + y * angle.cos()) / size
    radius, turn = torch.hypot(x, y), torch.atan2(x, -y)                     # (n, 32, 32)
    inside = torch.stack([polygon(3), polygon(4), polygon(6), radius < 0.9,
                          radius < 0.7 + 0.3 * (5 * turn).cos()])            # (5, n, 32, 32)
    pattern = torch.stack([(9 * x).sin(), (9 * y).sin(), (12 * radius).sin(),
                           (8 * x).sin() * (8 * y).sin(), (6 * turn).sin()]) > 0
    inside, pattern = inside[outline, torch.arange(n)], pattern[texture, torch.arange(n)]
    background = F.interpolate(uniform(0, 255, 3, 2, 2), 32, mode="bilinear", align_corners=True)
    dark, light = uniform(0, 100, 3, 1, 1), uniform(155, 255, 3, 1, 1)
    image = torch.where(inside[:, None], torch.where(pattern[:, None], light, dark), background)
    objects = F.adaptive_avg_pool2d(inside.float(), args.img_size // args.patch_size).to(DEVICE)
    return Images(args, label.tolist(), [*"0123456789"], image.round().byte(), objects=objects)

# ==== Pictures ====================================================================================
@torch.no_grad()
def save_pictures(args, run: Run, images: Images, rank_patches, ratios, epoch: int):
    """attention.png: the attention of eight images, a row for each update of the attention maps.
    masking.png: the same images, masked and predicted. MaskFeat predicts no pixels."""
    def color(*rgb: int) -> Tensor:
        pixel = images.normalize(torch.tensor(rgb, device=DEVICE)[:, None, None])
        return pixel.flatten().repeat(p * p)             # (p*p*3,), as in a patch
    p, unit, model = args.patch_size, METHODS[args.method]["unit"], run.model.eval()
    ids = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:8]
    _, squares, _ = next(images.read([ids]))
    x = images.whole(squares)
    maps = run.snapshots[epoch] = amt.attention_maps(model.encoder, x)
    torch.manual_seed(seed_of(args.seed))
    weights = amt.patchify(reweight(args, maps, images, ids)[:, None], unit).sum(dim=2)
    masked, thrown, visible = amt.mask_and_throw(rank_patches(weights), *ratios, unit)
    _, pred = model(x, visible=visible, masked=masked)
    patches, image = amt.patchify(x, p), torch.arange(len(x), device=DEVICE)[:, None]
    if args.method == "mae":                             # it predicts standardized patches
        true = amt.select(patches, masked)
        pred = pred * true.std(dim=2, keepdim=True) + true.mean(dim=2, keepdim=True)
    hidden = patches.clone()                             # (8, N, p*p*3)
    hidden[image, masked], hidden[image, thrown] = color(209, 73, 91), color(138, 143, 152)
    rows = {"images": patches, "red: masked\ngray: thrown": hidden}
    if args.method != "maskfeat":
        predicted = hidden.clone()
        predicted[image, masked] = pred
        rows["predicted (MAE: with\nthe true mean and\ncontrast)"] = predicted
    rows = {label: (amt.unpatchify(row, p) * images.std + images.mean) / 255
            for label, row in rows.items()}
    attention = {"images": rows["images"]}
    for k, a in run.snapshots.items():                   # (8, h, w): black, red, yellow, white
        looks = torch.stack([3 * a, 3 * a - 1, 3 * a - 2], dim=1)
        attention[f"where [CLS] looks,\nepoch {k} (white:\nmost)"] = looks
    for name, shown in [("masking", rows), ("attention", attention)]:
        pixels = torch.cat([F.interpolate(row.cpu(), size=96) for row in shown.values()])
        grid = make_grid(pixels.clamp(0, 1), nrow=len(ids), padding=4, pad_value=1.0)
        picture = v2.functional.to_pil_image(F.pad(grid, (150, 0), value=1.0))
        for i, label in enumerate(shown):                # on the left, where 150 pixels are free
            ImageDraw.Draw(picture).text((6, 100 * i + 30), label, fill="black")
        picture.save(args.out_dir / f"{name}.png")

# ==== Processes, signals, printed lines, main =====================================================
STOPS, SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT), []      # handled; received
SHOWN = {"next": 0.0}                                    # when a line of progress is due

def all_reduce(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(x, op)                           # in place
    return x

def share(n: int) -> Tensor:
    return torch.arange(n).tensor_split(WORLD_SIZE)[RANK]        # the part that this process takes

def on_signal(number: int, frame):
    if RANK == 0 and not SIGNALS:
        with suppress(OSError):                          # the terminal may be gone
            os.write(2, b"\nstopping; --resume continues\n")
    SIGNALS.append(number)

def say(text: str, end: str = "\n"):
    if RANK == 0:
        with suppress(OSError):
            print(("\r\033[K" if sys.stdout.isatty() else "") + text, end=end, flush=True)

def show_progress(text):
    """Shows text() if it is time: a line that moves on a terminal, elsewhere one a minute."""
    if RANK == 0 and time.time() >= SHOWN["next"]:
        moves = sys.stdout.isatty()
        SHOWN["next"] = time.time() + (0.5 if moves else 60)
        width = shutil.get_terminal_size().columns - 1 if moves else None
        say(text()[:width], end="" if moves else "\n")

def run_all(args):
    if WORLD_SIZE > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    # On CPUs the backward pass of fused attention in bfloat16 takes as long as all the rest.
    torch.backends.cuda.enable_flash_sdp(DEVICE.type == "cuda" or args.precision == "fp32")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    mine = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items()
            if name not in ("data_path", "workers")}
    for stage, path in [("pretraining", args.out_dir / "checkpoint.pth"),
                        ("finetune", args.out_dir / "finetune-checkpoint.pth")]:
        if path.exists() and not args.resume:
            raise ValueError(f"{path} exists: continue it with --resume, or give another --out-dir")
        if path.exists():
            saved = load_file(path)
            refuse_other(path, saved.get("settings", {}), settings(args, stage))
            mine[f"steps in {path}"] = saved["step"]
            del saved                                    # frees its memory on the device
    encoder = load_encoder(args)
    train, test = load_data(args)
    if WORLD_SIZE > 1:
        everyone = [None] * WORLD_SIZE
        dist.all_gather_object(everyone, mine | train.about)
        for rank, theirs in enumerate(everyone):
            refuse_other(f"process {rank}", theirs, mine | train.about)
    say(f"{args.dataset}: {len(train)} training, {len(test)} test images, {train.about['images']}\n"
        f"{args.model} on {DEVICE} in {args.precision}, {args.global_batch} images a step")
    if not (args.epochs or args.finetune_epochs):
        say(f"linear probe, %: {linear_probe(args, train, test, encoder)}")
    tunable = len(train.classes) > 1 and len(test) and len(train.labels) >= args.global_batch
    if args.finetune_epochs and not tunable:
        raise ValueError(f"--finetune-epochs needs two classes or more, test images, and a label "
                         f"for as many images as a step takes, {args.global_batch}")
    for number in STOPS:                                 # until here, they end the script as usual
        if signal.getsignal(number) is not signal.SIG_IGN:               # as under nohup
            signal.signal(number, on_signal)
    if args.epochs:
        pretrain(args, train, test, encoder)
    if args.finetune_epochs:
        finetune(args, train, test, encoder)
    say(f"done: {args.out_dir} has {', '.join(sorted(x.name for x in args.out_dir.iterdir()))}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()

def main(argv: list[str] | None = None):
    args = parse_args(argv)
    SIGNALS.clear()
    SHOWN["next"] = time.time() + 5
    old = {number: signal.getsignal(number) for number in STOPS}
    try:
        run_all(args)
    except (ValueError, OSError) as error:
        print("\n" * sys.stdout.isatty() + f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

if __name__ == "__main__":
    main()
