"""Pretrain a vision transformer with AMT, then probe it and fine-tune it.

    python train_cifar.py --dataset shapes --out-dir out-shapes   # offline, minutes on a CPU
    python train_cifar.py                                         # CIFAR-10, on one GPU
    python train_cifar.py --resume                                # continue a stopped run
    python train_cifar.py --checkpoint out/encoder.pth --epochs 0 \\
        --finetune-epochs 100 --out-dir out-finetuned             # fine-tune an encoder
    torchrun --nproc_per_node=4 train_cifar.py \\
        --dataset imagenet --data-path DIR                        # ImageNet, on 4 GPUs

A run writes to --out-dir:

    encoder.pth       the encoder, with timm's names
    checkpoint.pth    for --resume; its "data" has the images' mean and std and the classes
    epoch-N.png       how images are masked, before each update of the maps and at the end
    log.csv           for each epoch the seconds of its steps, map_seconds of the maps made after
                      it, position_share, the fraction of their variance that a patch's position
                      explains, and at the end probe_cls and probe_mean, the test accuracy of
                      linear classifiers on [CLS] and on the mean of the patches

and fine-tuning finetuned.pth, finetune-checkpoint.pth and finetune-log.csv.
"""
import argparse
import io
import math
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
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
TERMINAL = sys.stdout is not None and sys.stdout.isatty()

# (mask ratio, throw ratio), the side of a masking unit in patches, the range of a crop's area.
METHODS = {
    "mae": dict(random=(0.75, 0.0), amt=(0.45, 0.40), unit=1, scale=(0.2, 1)),
    "simmim": dict(random=(0.60, 0.0), amt=(0.44, 0.26), unit=2, scale=(0.67, 1)),
    "maskfeat": dict(random=(0.40, 0.0), amt=(0.44, 0.26), unit=2, scale=(0.5, 1)),
}

STRATEGIES = {
    "attention": amt.sample_patches,                     # AMT
    "uniform": amt.random_ranking,                       # AMT's ratios, at random
    "random": amt.random_ranking,                        # MAE's and SimMIM's own masking
    "attmask": amt.highest_first,
    "mst": amt.lowest_first,
    "block": amt.block_wise,
    "grid": amt.grid_wise,
}
USE_MAPS = ["attention", "uniform", "attmask", "mst"]    # masking is random until there are maps
MODELS = ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]

DATASETS = {  # default flags, where they differ from cifar10's
    "cifar10": {},
    "cifar100": {},
    "stl10": dict(img_size=96, patch_size=8),
    "tiny-imagenet": dict(img_size=64, patch_size=8, square_size=64),
    "folder": dict(img_size=224, patch_size=16),
    "imagenet": dict(img_size=224, patch_size=16, model="vit_base", blr=1.5e-4,
                     decoder_embed_dim=512, decoder_depth=8),
    "shapes": dict(depth=3, decoder_embed_dim=96, decoder_depth=1, epochs=24, batch_size=64,
                   blr=4e-3),
}

class UserError(ValueError):
    """What the user can mend. main() prints it as a line, without a traceback."""

# ==== Flags =======================================================================

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False, usage="train_cifar.py [flags]",
                    formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, default, text: str, **kwargs):
        if default is False:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif default is not None:
            kwargs.setdefault("type", type(default))
            text += " (default: %(default)s)"
        parser.add_argument(flag, default=default, help=text, **kwargs)

    # Data
    add("--dataset", "cifar10", "cifar10, cifar100 and stl10 are downloaded, shapes is "
        "generated, the others are files in --data-path: train/<class>/ and val/<class>/, which "
        "imagenet decodes in each epoch and the others once", choices=DATASETS)
    add("--data-path", "data", "directory of the images", metavar="DIR")
    add("--num-images", 2500, "training images of shapes")
    add("--img-size", 32, "side of a crop in pixels")
    add("--square-size", None, "files become squares of this side (default: 320 for crops "
        "of 224, and in proportion)", type=int)
    add("--workers", min(16, os.cpu_count() or 1), "threads that decode files")

    # Model
    add("--model", "vit_tiny", "size of the encoder", choices=MODELS)
    add("--depth", None, "blocks of the encoder (default: the model's)", type=int)
    add("--patch-size", 4, "side of a patch in pixels")
    add("--decoder-embed-dim", 192, "width of the MAE decoder, a multiple of 32")
    add("--decoder-depth", 4, "blocks of the MAE decoder")
    add("--checkpoint", None, "an encoder of this script, timm or MAE to pretrain further "
        "or, with --epochs 0, to probe or fine-tune; none is a new one", metavar="FILE")

    # Masking
    add("--method", "mae", "maskfeat is simmim with HOG targets", choices=METHODS)
    add("--masking", "attention", "how patches are ranked: attention draws them by their "
        "attention, uniform at AMT's ratios but with equal weights; attmask takes the highest "
        "attention first, mst the lowest; the others ignore it", choices=STRATEGIES)
    add("--mask-ratio", None, "patches to mask (default: the paper's)", type=float)
    add("--throw-ratio", None, "patches to throw (default: the paper's)", type=float)
    add("--update-interval", None, "epochs between new maps (default: a tenth, at least "
        "4, but at most half)", type=int)
    add("--raw-pixels", False, "MAE predicts raw pixels, as the authors' published command "
        "does, and not each patch standardized")

    # Pretraining and fine-tuning
    add("--epochs", 400, "epochs of pretraining; 0, with --checkpoint, skips it")
    add("--batch-size", 512, "images per process and forward pass")
    add("--accum-steps", 1, "forward passes per process and optimizer step")
    add("--blr", 5e-4, "base learning rate, times the images of a step / 256")
    add("--finetune-epochs", 0, "epochs of fine-tuning; 0 skips it")
    add("--finetune-blr", 1e-3, "base learning rate of fine-tuning")

    # Run
    add("--seed", 0, "seed of all random numbers")
    add("--out-dir", "out", "directory of the run's files, of one run only", metavar="DIR")
    add("--resume", False, "continue the run in --out-dir after its last saved epoch, with "
        "its flags and those given here")
    bf16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    add("--precision", "bf16" if bf16 else "fp32", "fp32 is TF32 on GPUs",
        choices=["bf16", "fp32"])
    add("--compile", False, "use torch.compile")
    add("--cuda-graph", False, "launch all kernels of a step at once, on one GPU and without "
        "accumulation; not yet tested on a GPU")

    # The dataset decides the defaults of other flags, and so does the run that is resumed.
    given = parser.parse_known_args(argv)[0]
    saved = saved_flags(given) if given.resume else {}
    parser.set_defaults(**DATASETS[saved.get("dataset", given.dataset)] | saved)
    args = parser.parse_args(argv)
    if saved and (args.masking, args.method) != (saved.get("masking"), saved.get("method")):
        parser.set_defaults(mask_ratio=None, throw_ratio=None)  # those of the new masking
        args = parser.parse_args(argv)
    set_defaults(args)
    if saved:
        changed = [f"{name} {saved.get(name)} -> {value}" for name, value in vars(args).items()
                   if saved.get(name) != value]
        say(f"resuming {args.out_dir}; changed: {', '.join(changed) or 'nothing'}")
        finetuned = Path(args.out_dir) / "finetune-checkpoint.pth"
        if args.epochs != saved.get("epochs") and finetuned.exists():
            raise UserError(f"{finetuned} is of {saved.get('epochs')} epochs of pretraining: move "
                            "it away to fine-tune anew")
    return args

def checkpoints(args) -> list[Path]:
    """Those in --out-dir, the last one written at the end."""
    found = Path(args.out_dir).glob("*checkpoint.pth")
    return sorted(found, key=lambda path: path.stat().st_mtime)

def saved_flags(args) -> dict:
    """The flags of the run in --out-dir."""
    found = checkpoints(args)
    if not found:
        say(f"{args.out_dir} has no checkpoint yet: starting from the beginning")
        return {}

    saved = load_file(found[-1])
    if not isinstance(saved, dict) or not isinstance(saved.get("args"), dict):
        raise UserError(f"{found[-1]} is not a checkpoint of this script")
    return saved["args"] | {"resume": True, "out_dir": args.out_dir}

def set_defaults(args):
    """Fills in what depends on other flags, and refuses what would fail only after minutes."""
    for name, value in vars(args).items():
        least = 0 if name in ["epochs", "finetune_epochs", "seed"] else 1
        if type(value) is int and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")

    ratios = METHODS[args.method]["amt" if args.masking in ["attention", "uniform"] else "random"]
    if args.mask_ratio is None:
        args.mask_ratio = ratios[0]
    if args.throw_ratio is None:
        args.throw_ratio = ratios[1]
    if args.update_interval is None:
        args.update_interval = min(max(4, round(args.epochs / 10)), max(1, args.epochs // 2))
    if args.square_size is None:
        args.square_size = round(args.img_size * 320 / 224)
    args.global_batch = args.batch_size * args.accum_steps * WORLD_SIZE

    unit_size = METHODS[args.method]["unit"] * args.patch_size
    if args.img_size % unit_size:
        raise UserError(f"--img-size must be a multiple of {unit_size}, got {args.img_size}")
    if args.square_size < args.img_size:
        raise UserError(f"--square-size must be at least {args.img_size}, got {args.square_size}")
    if args.decoder_embed_dim % 32:
        raise UserError(f"--decoder-embed-dim must be 32, 64, ..., got {args.decoder_embed_dim}")
    if args.masking in USE_MAPS and args.update_interval >= args.epochs > 1:
        raise UserError(f"--update-interval must be less than --epochs, got {args.update_interval}")
    if not args.epochs and not args.checkpoint:
        raise UserError("--epochs 0 needs a --checkpoint: a FILE to probe or fine-tune, or 'none'")
    if args.cuda_graph and (DEVICE.type != "cuda" or args.global_batch != args.batch_size):
        raise UserError("--cuda-graph needs a GPU, one process and --accum-steps 1")
    units = torch.zeros(1, (args.img_size // unit_size) ** 2)
    amt.mask_and_throw(units, args.mask_ratio, args.throw_ratio)  # so bad ratios fail now

# ==== Pretraining =================================================================

def masked_loss(args, model, images: "Images", squares: Tensor, theta: Tensor,
                maps: Tensor | None = None) -> Tensor:
    """The method: from whole images, squares (B, 3, S, S), to the loss of their crops theta
    (B, 2, 3). `maps` (B, h, w) have the attention on the whole images, once there is any."""
    unit = METHODS[args.method]["unit"]        # the side of a masking unit in patches
    unit_size = unit * args.patch_size         # and in pixels
    rank, ratios = masking_of(args, maps)

    # The same theta cuts the images and their attention maps.
    crops = images.normalize(amt.crop(squares, theta, args.img_size, "bicubic"))
    if maps is None:
        N = (args.img_size // unit_size) ** 2  # units in a crop
        weights = torch.ones(len(squares), N, device=squares.device)
    else:
        weights = amt.crop_weights(maps, theta, args.img_size, unit_size)  # (B, N)

    ranking = rank(weights)                                               # Eq. 5
    masked, thrown, visible = amt.mask_and_throw(ranking, *ratios, unit)  # Eq. 6
    with autocast(args):
        loss, pred = model(crops, visible=visible, masked=masked)         # Eq. 2
    return loss

def masking_of(args, maps: Tensor | None):
    """How to rank patches, and the ratios. Until there are maps, masking is random."""
    if args.masking in USE_MAPS and maps is None:
        return amt.random_ranking, METHODS[args.method]["random"]
    return STRATEGIES[args.masking], (args.mask_ratio, args.throw_ratio)

def new_maps(args, train: "Images", encoder: amt.ViT) -> tuple[Tensor, str]:
    """The attention maps (n, h, w) of all training images, and the fraction of their variance
    that a patch's position explains. To rank by other maps, replace this function."""
    if args.masking == "uniform":
        return torch.ones(len(train), 1, 1, dtype=torch.half, device=DEVICE), ""

    attend = torch.compile(encoder.cls_attention) if args.compile else encoder
    batches = train.read(share(len(train)).split(args.batch_size), "attention maps")
    whole = ((ids, train.whole(squares)) for ids, squares, aspect in batches)
    with autocast(args):
        maps = all_reduce(amt.dataset_maps(attend, whole, len(train)))  # Eq. 3 and 4

    x = maps.float()
    return maps, f"{(x.mean(dim=0).var() / x.var()).item():.4f}"

def pretrain(args, train: "Images", test: "Images", model: nn.Module):
    optimizer = build_optimizer(model)
    maps, log = None, []
    if args.resume and (Path(args.out_dir) / "checkpoint.pth").exists():
        saved = restore(args, "checkpoint.pth", model, optimizer)
        maps = saved["maps"]
        log = saved["log"]
        if maps is not None and len(maps) != len(train):
            raise UserError(f"this run has the maps of {len(maps)} training images, but now there "
                            f"are {len(train)}")

    parallel = parallelize(args, model)
    step = Step(args, parallel, optimizer, partial(masked_loss, args, parallel, train))
    lr_at = partial(schedule, args.blr * args.global_batch / 256, args.epochs // 10, args.epochs)
    updates = range(args.update_interval, args.epochs, args.update_interval)
    uses_maps = args.masking in USE_MAPS
    if uses_maps and maps is None and args.checkpoint not in [None, "none"]:
        maps, _ = new_maps(args, train, model.encoder)  # those of a trained encoder are of use

    def inputs_of(ids: Tensor, squares: Tensor, aspect: Tensor) -> tuple[Tensor, ...]:
        theta = amt.random_crops(len(ids), METHODS[args.method]["scale"], image_ratio=aspect)
        theta = theta.to(DEVICE, non_blocking=True)
        return (squares, theta) if maps is None else (squares, theta, maps[ids])

    def save():
        state = model.encoder.state_dict()
        write(args, "encoder.pth", {name: p.cpu() for name, p in state.items()})
        save_checkpoint(args, "checkpoint.pth", model, optimizer, log, train, maps=maps)

    saved_at = time.time()
    for epoch in range(len(log), args.epochs + 1):
        # What is due after so many epochs? A run that is stopped meanwhile does it again.
        if epoch in updates or epoch == args.epochs:
            save_picture(args, model, test if len(test) else train, maps, epoch)
        if epoch in updates and uses_maps:
            began = time.time()
            maps, share_of_position = new_maps(args, train, model.encoder)
            log[-1] |= dict(map_seconds=f"{time.time() - began:.2f}",
                            position_share=share_of_position)
            if share_of_position:
                say(f"new attention maps: position_share {share_of_position}")
        if epoch == args.epochs:
            break

        model.train()
        row = train_epoch(args, "pretraining", epoch, args.epochs, train, len(train), step, lr_at,
                          inputs_of)
        log.append(row | dict(map_seconds="", position_share="", probe_cls="", probe_mean=""))
        write_log(args, "log.csv", log)
        if epoch + 1 in [*updates, args.epochs] or time.time() - saved_at > 60:
            save()  # first, as pictures, maps and probes may take minutes
            saved_at = time.time()

    if not log[-1]["probe_cls"]:
        log[-1] |= linear_probe(args, train, test, model.encoder)
    write_log(args, "log.csv", log)
    save()

# ==== An epoch, a step ============================================================

def train_epoch(args, name: str, epoch: int, epochs: int, images: "Images", n: int, step: "Step",
                lr_at, inputs_of) -> dict[str, str]:
    """Trains once on the first n images, without those left over after the last full step.
    inputs_of(ids, squares, aspect) turns a mini-batch into the inputs of a step. The seed and the
    number of a step determine its images and random numbers, so a resumed run ends as an unbroken
    one. Returns a row of the log."""
    steps = n // args.global_batch
    accum = args.accum_steps
    torch.manual_seed(seed_of(args.seed, name, epoch))
    order = torch.randperm(n)[: steps * args.global_batch]
    mine = order.view(steps, WORLD_SIZE, accum, args.batch_size)[:, RANK]
    batches = images.read(mine.flatten(0, 1))

    step.total.zero_()
    began = time.time()
    for i in shown(range(epoch * steps, (epoch + 1) * steps), f"{name} {epoch + 1}/{epochs}, step"):
        lr = lr_at(i / steps)
        step.set_lr(lr)
        for part in range(accum):
            # Each part of a step has its own seed, so the number of processes may change.
            torch.manual_seed(seed_of(args.seed, name, i, RANK * accum + part))
            step(inputs_of(*next(batches)), last=part + 1 == accum)

    mean = all_reduce(step.total).item() / WORLD_SIZE / steps  # waits for the GPU
    weights = [p.isfinite().all() for p in step.model.parameters()]
    if not math.isfinite(mean) or not torch.stack(weights).all():
        raise UserError(f"the loss or a weight is not finite after epoch {epoch + 1}, so it is not "
                        "saved: start anew with a lower --blr or --finetune-blr")

    seconds = time.time() - began
    row = dict(epoch=str(epoch + 1), loss=f"{mean:.5f}", lr=f"{lr:.3e}", seconds=f"{seconds:.2f}",
               images_per_second=f"{steps * args.global_batch / seconds:.0f}")
    left = timedelta(seconds=round(seconds * (epochs - epoch - 1)))
    say(f"{name}: " + ", ".join(f"{key} {row[key]}" for key in row) + f", {left} left")
    return row

class Step:
    """step(inputs, last) adds a mini-batch's loss to `total` and its gradients to the weights'.
    The last mini-batch of an optimizer step also updates the weights.

    With --cuda-graph the fourth step is recorded as a CUDA graph, and from then on all kernels
    are launched at once: to launch a small model's thousand kernels one by one takes longer than
    to run them. Python does not run again, so all that changes from step to step is in the
    inputs, in the seed, or in tensors that are changed in place, such as the learning rate."""

    def __init__(self, args, model: nn.Module, optimizer, loss_of):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.loss_of = loss_of  # a function of the inputs
        self.total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        self.shapes = None      # of the inputs of the last step
        if args.cuda_graph:     # a number would be recorded for good
            for group in optimizer.param_groups:
                group.update(capturable=True, lr=torch.zeros((), device=DEVICE))

    def set_lr(self, lr: float):
        for group in self.optimizer.param_groups:
            if self.args.cuda_graph:
                group["lr"].fill_(lr * group["lr_scale"])
            else:
                group["lr"] = lr * group["lr_scale"]

    def compute(self, inputs, last: bool = True):
        loss = self.loss_of(*inputs) / self.args.accum_steps
        loss.backward()
        self.total += loss.detach()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def __call__(self, inputs: tuple[Tensor, ...], last: bool):
        self.model.require_backward_grad_sync = last    # DDP averages in the last only
        shapes = [x.shape for x in inputs]
        if shapes != self.shapes:                       # at first, and when maps come in
            self.shapes, self.calls, self.graph = shapes, 0, None
        self.calls += 1
        if not self.args.cuda_graph or self.calls < 4:  # three steps choose the kernels
            return self.compute(inputs, last)

        if self.graph is None:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.compute(self.inputs)               # recorded, but not yet run
        for recorded, x in zip(self.inputs, inputs):
            recorded.copy_(x, non_blocking=True)
        self.graph.replay()

def schedule(peak: float, warmup: int, epochs: int, epoch: float) -> float:
    """The learning rate: linear warm-up, then half a cosine to 0."""
    if epoch < warmup:
        return peak * epoch / warmup
    progress = (epoch - warmup) / (epochs - warmup)
    return peak * (0.5 + 0.5 * math.cos(math.pi * progress))

def build_model(args, encoder: amt.ViT) -> nn.Module:
    if args.method != "mae":
        return amt.SimMIM(encoder, "hog" if args.method == "maskfeat" else "pixels")
    return amt.MAE(encoder, args.decoder_embed_dim, args.decoder_depth,
                   args.decoder_embed_dim // 32, norm_pix_loss=not args.raw_pixels)

def build_optimizer(model: nn.Module, beta2: float = 0.95, lr_scale=lambda name: 1.0):
    """AdamW. Biases, norms and tokens have no weight decay. lr_scale(name) scales the rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.05 if name.endswith("weight") and p.ndim > 1 else 0.0
            groups.setdefault((decay, lr_scale(name)), []).append(p)

    groups = [dict(params=p, weight_decay=decay, lr_scale=scale)
              for (decay, scale), p in groups.items()]
    return torch.optim.AdamW(groups, betas=(0.9, beta2), fused=True)

def parallelize(args, model: nn.Module) -> nn.Module:
    model = torch.compile(model, dynamic=False) if args.compile else model
    return nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model

def autocast(args):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.precision == "bf16")

# ==== Linear probe and fine-tuning ================================================

@torch.no_grad()
def outputs(args, images: "Images", function, shape: tuple, text: str) -> Tensor:
    """function(central crops (B, 3, H, H)) of all images with labels: (n, *shape)."""
    result = torch.zeros(len(images.labels), *shape, device=DEVICE)
    for ids, squares, aspect in images.read(share(len(result)).split(args.batch_size), text):
        with autocast(args):
            result[ids] = function(images.central(squares, aspect)).float()
    return all_reduce(result)

def features(args, images: "Images", encoder: amt.ViT) -> Tensor:
    """[CLS] and the mean of the patches of all images with labels: (n, 2, D)."""
    def readouts(crops: Tensor) -> Tensor:
        tokens = encoder(crops)                                               # (B, 1+N, D)
        return torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)  # (B, 2, D)

    return outputs(args, images, readouts, (2, encoder.embed_dim), "features of the probe")

def accuracy(logits: Tensor, images: "Images") -> str:
    return f"{100 * (logits.argmax(dim=1) == images.labels).float().mean().item():.2f}"

def linear_probe(args, train: "Images", test: "Images", encoder: amt.ViT) -> dict[str, str]:
    """The test accuracy of linear classifiers on frozen [CLS] and on the mean of the patches."""
    if len(train.classes) < 2 or not len(test):
        return {}                                  # set_up has said so

    x = features(args, train, encoder)             # (n, 2, D)
    x_test = features(args, test, encoder)
    columns = {}
    torch.set_float32_matmul_precision("highest")  # TF32 would stop the fit early
    for i, name in enumerate(["probe_cls", "probe_mean"]):
        torch.manual_seed(seed_of(args.seed, "probe"))
        logits = linear_classifier(x[:, i], train.labels, x_test[:, i])
        columns[name] = accuracy(logits, test)
    torch.set_float32_matmul_precision("high")
    say(f"linear probe: [CLS] {columns['probe_cls']} %, patches {columns['probe_mean']} %")
    return columns

def linear_classifier(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Logits (n_test, classes) of a linear classifier on features x (n, D) with labels y (n,).
    Features are standardized, as the paper does by BatchNorm without affine. A random tenth is
    held out, and the L2 penalty lowered as long as the loss on that tenth falls; with the best
    penalty the classifier is then fitted to all images."""
    std, mean = torch.std_mean(x, dim=0)
    x = (x - mean) / (std + 1e-6)
    x_test = (x_test - mean) / (std + 1e-6)
    shuffled = torch.randperm(len(x)).to(x.device)
    held_out, used = shuffled.tensor_split([max(1, len(x) // 10)])
    head = nn.Linear(x.shape[1], int(y.max()) + 1).to(x.device)
    nn.init.zeros_(head.weight)

    def fit(x: Tensor, y: Tensor, penalty: float):  # from where the last fit ended
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=1000, tolerance_grad=1e-5,
                                      tolerance_change=1e-8, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(head(x), y) + penalty * head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)

    best_loss = math.inf
    best_penalty = 1.0
    for k in range(1, 14):                          # penalties from 0.32 down to 3.2e-7
        penalty = 10 ** (-k / 2)
        fit(x[used], y[used], penalty)
        loss = F.cross_entropy(head(x[held_out]), y[held_out]).item()
        if not loss < best_loss:
            break
        best_loss, best_penalty = loss, penalty
    fit(x, y, best_penalty)
    return head(x_test).detach()

class Classifier(nn.Module):
    """The encoder, with drop path, and a linear layer on [CLS]."""

    def __init__(self, encoder: amt.ViT, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.drop_rates = torch.linspace(0, 0.1, len(encoder.blocks)).tolist()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, H)."""
        x = self.encoder.embed(images)  # (B, 1+N, D)
        for block, rate in zip(self.encoder.blocks, self.drop_rates):
            x = x + stochastic_depth(block.attn(block.norm1(x)), rate, "row", self.training)
            x = x + stochastic_depth(block.mlp(block.norm2(x)), rate, "row", self.training)
        return self.head(self.encoder.norm(x)[:, 0])

def finetune(args, train: "Images", test: "Images", encoder: amt.ViT):
    """Trains the encoder and a linear layer on [CLS], after the recipe of He et al., 2022."""
    torch.manual_seed(seed_of(args.seed, "finetune"))
    classes, depth = len(train.classes), len(encoder.blocks)
    model = Classifier(encoder, classes).to(DEVICE)
    trained = args.epochs > 0 or args.checkpoint != "none"
    decay = 0.75 if trained else 1.0  # layer-wise

    def lr_scale(name: str) -> float:
        """1 for the head and the last norm. A layer has `decay` times the next one's."""
        parts = name.split(".")
        if parts[1] == "blocks":
            return decay ** (depth - int(parts[2]))
        below = parts[1] in ["cls_token", "patch_embed"]
        return decay ** (depth + 1) if below else 1.0

    optimizer, log = build_optimizer(model, 0.999, lr_scale), []
    if args.resume and (Path(args.out_dir) / "finetune-checkpoint.pth").exists():
        saved = restore(args, "finetune-checkpoint.pth", model, optimizer)
        log = saved["log"]

    parallel = parallelize(args, model)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes),
                           v2.CutMix(alpha=1.0, num_classes=classes)])

    def inputs_of(ids: Tensor, squares: Tensor, aspect: Tensor) -> tuple[Tensor, Tensor]:
        theta = amt.random_crops(len(ids), image_ratio=aspect)
        crops = train.normalize(amt.crop(squares, theta, args.img_size, "bicubic"))
        return mix(crops, train.labels[ids])

    def loss_of(crops: Tensor, labels: Tensor) -> Tensor:
        with autocast(args):
            logits = parallel(crops).float()
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    step = Step(args, parallel, optimizer, loss_of)
    epochs, peak_lr = args.finetune_epochs, args.finetune_blr * args.global_batch / 256
    lr_at = partial(schedule, peak_lr, epochs // 20, epochs)

    saved_at = time.time()
    for epoch in range(len(log), epochs + 1):
        if epoch > 0 and not log[-1]["test_accuracy"]:
            logits = outputs(args, test, model.eval(), (classes,), "test images")
            log[-1]["test_accuracy"] = accuracy(logits, test)
            write_log(args, "finetune-log.csv", log)
            say(f"test accuracy {log[-1]['test_accuracy']} %")
        if epoch == epochs:
            break

        model.train()
        row = train_epoch(args, "finetune", epoch, epochs, train, len(train.labels), step, lr_at,
                          inputs_of)
        log.append(row | dict(test_accuracy=""))
        if epoch + 1 == epochs or time.time() - saved_at > 60:
            save_checkpoint(args, "finetune-checkpoint.pth", model, optimizer, log, train)
            saved_at = time.time()

    save_checkpoint(args, "finetune-checkpoint.pth", model, optimizer, log, train)
    state = model.state_dict()
    write(args, "finetuned.pth", {k.removeprefix("encoder."): p.cpu() for k, p in state.items()})

# ==== Data ========================================================================

class Images:
    """Whole images as squares (n, 3, S, S) of bytes, whatever their width / height was: in
    memory, or in files that are decoded whenever they are read. The first len(labels) have
    labels."""

    def __init__(self, args, labels: list[int], classes: list[str], squares: Tensor | None = None,
                 aspect: Tensor | None = None, files=()):
        self.args = args
        self.classes = classes
        self.files = files
        self.labels = torch.tensor(labels, dtype=torch.int64, device=DEVICE)
        self.squares = squares
        if squares is not None and squares.nbytes < 2 ** 33:  # more stay in host memory
            self.squares = squares.to(DEVICE)
        self.aspect = torch.ones(len(self)) if aspect is None else aspect  # width / height
        self.mean = 255 * channels([0.485, 0.456, 0.406])     # ImageNet's, unless changed
        self.std = 255 * channels([0.229, 0.224, 0.225])

    def __len__(self) -> int:
        return len(self.files if self.squares is None else self.squares)

    def read(self, batches, text: str = ""):
        """Yields indices (B,), squares (B, 3, S, S), 0 to 255, both on the device, and aspects
        (B,) for each mini-batch of indices. `text` names a pass whose progress is shown."""
        batches = [ids for ids in batches if len(ids)]  # a share may be empty
        found = map(self.from_memory, batches)
        if self.squares is None:
            found = self.decode_ahead(batches)
        for ids in shown(batches, text):
            squares, aspect = next(found)
            squares = squares.to(DEVICE, non_blocking=True).float()
            yield ids.to(DEVICE, non_blocking=True), squares, aspect

    def from_memory(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.squares[ids.to(self.squares.device, non_blocking=True)], self.aspect[ids]

    def decode_ahead(self, batches: list[Tensor]):
        """Threads decode two mini-batches ahead, as Pillow and torch release Python's lock."""
        ahead = []
        with ThreadPoolExecutor(self.args.workers) as pool:
            for i in range(len(batches)):
                for ids in batches[i + len(ahead): i + 3]:  # this mini-batch and the next two
                    ahead.append(pool.map(self.decode, [self.files[k] for k in ids]))
                squares, aspect = zip(*ahead.pop(0))
                yield torch.stack(squares).permute(0, 3, 1, 2), torch.tensor(aspect)

    def decode(self, path: str) -> tuple[Tensor, float]:
        """An image file as a square (S, S, 3) of bytes, and its width / height."""
        size = [self.args.square_size, self.args.square_size]
        try:
            with Image.open(path) as image:
                if image.mode[0] in "IF" or ";16" in str([tile[3] for tile in image.tile]):
                    raise ValueError("it has more than 8 bits a channel")
                if image.format == "TIFF" and image.n_frames > 1:
                    raise ValueError(f"it has {image.n_frames} pages")
                aspect = image.width / image.height
                image.draft(None, size)  # decodes a large JPEG at 1/2, 1/4 or 1/8
                pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
        except Exception as error:       # Pillow raises many types
            raise UserError(f"cannot decode {path!r}: {error}") from None
        # A view: to bring the bytes from Pillow's order into torch's would take 50 % longer.
        square = v2.functional.resize(pixels, size, v2.InterpolationMode.BICUBIC)
        return square.permute(1, 2, 0), aspect

    def normalize(self, pixels: Tensor) -> Tensor:
        pixels = pixels.clamp(0, 255)  # bicubic interpolation overshoots
        return (pixels - self.mean) / self.std

    def whole(self, squares: Tensor) -> Tensor:
        """Normalized whole images (B, 3, H, H), squashed to a square."""
        size = [self.args.img_size, self.args.img_size]
        return self.normalize(v2.functional.resize(squares, size, v2.InterpolationMode.BICUBIC))

    def central(self, squares: Tensor, aspect: Tensor) -> Tensor:
        """Normalized test images (B, 3, H, H): whole, as usual for CIFAR, or, if squares are
        larger than crops, their central part, 0.875 of the short side, as for ImageNet."""
        if squares.shape[2] <= self.args.img_size:
            return self.whole(squares)
        theta = torch.zeros(len(squares), 2, 3)
        theta[:, 0, 0] = 0.875 * (1 / aspect).clamp(max=1)
        theta[:, 1, 1] = 0.875 * aspect.clamp(max=1)
        return self.normalize(amt.crop(squares, theta, self.args.img_size, "bicubic"))

def channels(values) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float32, device=DEVICE)
    return values[:, None, None]  # (3, 1, 1)

def load_data(args) -> tuple[Images, Images]:
    """The training and the test images. A new dataset is a new branch."""
    if args.dataset == "shapes":
        train, test = shapes(args, args.num_images, 1), shapes(args, 8000, 2)
    elif args.dataset in ["cifar10", "cifar100", "stl10"]:
        train, test = download(args)
    else:
        train = image_files(args, "train")
        test = image_files(args, "val", train.classes)

    if args.dataset in ["shapes", "cifar10", "cifar100", "stl10"]:  # others keep ImageNet's
        some = train.squares[::1 + train.squares.numel() // 2 ** 28]  # floats: at most 1 GiB
        std, mean = torch.std_mean(some.float(), dim=(0, 2, 3))
        train.mean = test.mean = channels(mean)
        train.std = test.std = channels(std.clamp_min(1))           # a channel may be constant
    return train, test

def download(args) -> list[Images]:
    """The training and the test images of a dataset that torchvision downloads."""
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10}[args.dataset]
    splits = [dict(train=True), dict(train=False)]
    if kind is STL10:
        splits = [dict(split="train+unlabeled"), dict(split="test")]  # the unlabeled come last

    try:
        if LOCAL_RANK == 0:
            kind(args.data_path, download=True)
        all_reduce(torch.zeros(1))  # the others wait for the download
        found = [kind(args.data_path, **split) for split in splits]
    except (OSError, RuntimeError) as error:
        raise UserError(f"no intact {kind.base_folder} in --data-path {args.data_path}, and it "
                        f"cannot be downloaded: {error}") from None

    images = []
    for x in found:
        if kind is STL10:
            squares, labels = x.data, [label for label in x.labels.tolist() if label >= 0]
        else:
            squares, labels = x.data.transpose(0, 3, 1, 2).copy(), x.targets
        images.append(Images(args, labels, x.classes, torch.from_numpy(squares)))
    return images

def image_files(args, split: str, classes: list[str] | None = None) -> Images:
    """The images in DIR/split/<class>/, with labels as in train/. There may be no val/."""
    folder = Path(args.data_path) / split
    if split == "val" and not folder.exists():
        return Images(args, [], classes)
    try:
        found = ImageFolder(folder)
    except OSError as error:
        raise UserError(f"--data-path must have {split}/<class>/, or train/all/ for images without "
                        f"labels: {error}") from None

    files = [file for file, label in found.samples]
    names = [found.classes[label] for label in found.targets]
    if (folder / "val_annotations.txt").exists():
        names = tiny_imagenet_classes(folder / "val_annotations.txt", files)
    index = {name: i for i, name in enumerate(classes or found.classes)}
    unknown = sorted(set(names) - index.keys())
    if unknown:
        raise UserError(f"{folder} has {len(unknown)} classes that train/ lacks, such as "
                        f"{unknown[0]!r}")
    labels = [index[name] for name in names]
    images = Images(args, labels, list(index), files=files)
    if args.dataset == "imagenet":  # decodes them in each epoch
        return images

    S = args.square_size
    squares = torch.empty(len(files), 3, S, S, dtype=torch.uint8)
    aspect = torch.empty(len(files))
    for ids, pixels, ratio in images.read(torch.arange(len(files)).split(64), f"decoding {split}"):
        squares[ids.cpu()] = pixels.byte().cpu()
        aspect[ids.cpu()] = ratio
    return Images(args, labels, list(index), squares, aspect)

def tiny_imagenet_classes(notes: Path, files: list[str]) -> list[str]:
    """The classes of files by Tiny ImageNet's notes, lines of a file, its class and a box."""
    try:
        rows = [line.split("\t") for line in notes.read_text().splitlines() if line.strip()]
        class_of = {row[0]: row[1] for row in rows}
        return [class_of[Path(file).name] for file in files]
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{notes} must have a line for each image: its file, a tab, its class, a "
                        f"tab and its box ({type(error).__name__}: {error})") from None

def shapes(args, n: int, seed: int) -> Images:
    """n textured objects. Class c has outline c mod 5 (triangle, square, hexagon, disc, flower)
    and texture c mod 5 or, from class 5, the next. So neither alone tells the class."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    def polygon(sides: int) -> Tensor:
        sector = (turn + math.pi / sides) % (2 * math.pi / sides) - math.pi / sides
        return radius * sector.cos() < math.cos(math.pi / sides)

    label = torch.arange(n) % 10
    outline = label % 5
    texture = (label + label // 5) % 5

    # Coordinates (n, 32, 32) of the pixels in each object's own frame: shifted, turned, scaled.
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    angle = uniform(-0.2, 0.2, 1, 1)
    size = uniform(0.8, 1.0, 1, 1)
    x = x - uniform(-0.15, 0.15, 1, 1)
    y = y - uniform(-0.15, 0.15, 1, 1)
    x, y = (x * angle.cos() - y * angle.sin()) / size, (x * angle.sin() + y * angle.cos()) / size
    radius = torch.hypot(x, y)
    turn = torch.atan2(x, -y)

    flower = radius < 0.7 + 0.3 * (5 * turn).cos()
    outlines = torch.stack([polygon(3), polygon(4), polygon(6), radius < 0.9, flower])
    textures = torch.stack([(9 * x).sin(), (9 * y).sin(), (12 * radius).sin(),
                            (8 * x).sin() * (8 * y).sin(), (6 * turn).sin()]) > 0
    inside = outlines[outline, torch.arange(n), None]  # (n, 1, 32, 32)
    pattern = textures[texture, torch.arange(n), None]

    background = F.interpolate(uniform(0, 255, 3, 2, 2), 32, mode="bilinear", align_corners=True)
    dark = uniform(0, 100, 3, 1, 1)
    light = uniform(155, 255, 3, 1, 1)
    image = torch.where(inside, torch.where(pattern, light, dark), background)
    return Images(args, label.tolist(), [*"0123456789"], image.round().byte())

# ==== Pictures ====================================================================

@torch.no_grad()
def save_picture(args, model: nn.Module, images: Images, maps: Tensor | None, epoch: int):
    """epoch-N.png: eight images, where [CLS] looks, what is masked and thrown, and what the
    model predicts, which MaskFeat cannot show."""
    p, unit = args.patch_size, METHODS[args.method]["unit"]
    ids = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:8]
    _, squares, _ = next(images.read([ids]))
    x = images.whole(squares)
    patches = amt.patchify(x, p)                      # (8, N, p*p*3)
    attention = amt.attention_maps(model.encoder, x)  # (8, h, w)

    rank, ratios = masking_of(args, maps)
    torch.manual_seed(seed_of(args.seed))
    weights = amt.patchify(attention[:, None], unit).sum(dim=2)
    masked, thrown, visible = amt.mask_and_throw(rank(weights), *ratios, unit)
    _, pred = model(x, visible=visible, masked=masked)
    if args.method == "mae" and not args.raw_pixels:  # it predicts standardized patches
        true = amt.select(patches, masked)
        pred = pred * true.std(dim=2, keepdim=True) + true.mean(dim=2, keepdim=True)

    def pixels(patches: Tensor) -> Tensor:
        return (amt.unpatchify(patches, p) * images.std + images.mean) / 255

    # 0 where a patch is visible, 1 where it is masked and 2 where it is thrown.
    state = torch.zeros_like(attention).flatten(1).scatter(1, masked, 1.0).scatter(1, thrown, 2.0)
    state = F.interpolate(state.view_as(attention)[:, None], size=args.img_size)
    hidden = torch.where(state == 1, channels([0.82, 0.29, 0.36]), pixels(patches))
    hidden = torch.where(state == 2, channels([0.54, 0.56, 0.60]), hidden)
    heat = torch.stack([3 * attention, 3 * attention - 1, 3 * attention - 2], dim=1)
    rows = {"images": pixels(patches), "where [CLS] looks\n(white: most)": heat,
            "red: masked\ngray: thrown": hidden}
    if args.method != "maskfeat":
        ids = masked[:, :, None].expand_as(pred)
        rows["predicted"] = torch.where(state == 1, pixels(patches.scatter(1, ids, pred)), hidden)

    row = torch.cat([F.interpolate(row.cpu(), size=96) for row in rows.values()])
    grid = make_grid(row.clamp(0, 1), nrow=len(x), padding=4, pad_value=1.0)
    picture = v2.functional.to_pil_image(F.pad(grid, (130, 0), value=1.0))
    for i, label in enumerate(rows):  # on the left, where 130 pixels are free
        ImageDraw.Draw(picture).text((6, 100 * i + 35), label, fill="black")
    content = io.BytesIO()
    picture.save(content, "png")
    write(args, f"epoch-{epoch}.png", content.getvalue())

# ==== Files, printed lines, processes =============================================

def load_encoder(args) -> amt.ViT:
    """A new encoder, or that of --checkpoint."""
    torch.manual_seed(seed_of(args.seed))
    kwargs = {"depth": args.depth} if args.depth else {}
    build = getattr(amt, args.model)
    encoder = build(img_size=args.img_size, patch_size=args.patch_size, **kwargs)
    if args.checkpoint not in [None, "none"]:
        try:
            amt.load_weights(encoder, load_file(args.checkpoint))
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot load --checkpoint {args.checkpoint}: {reason}") from None
    return encoder.to(DEVICE)

def load_file(path: Path | str):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # is in MAE's files
            return torch.load(path, DEVICE, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many types
        raise UserError(f"{path} is damaged or not a file of torch.save "
                        f"({type(error).__name__})") from None

def restore(args, name: str, model: nn.Module, optimizer) -> dict:
    path = Path(args.out_dir) / name
    saved = load_file(path)
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit these flags: {reason}") from None

    for group in optimizer.param_groups:
        group.update(capturable=False, lr=0.0)  # a CUDA graph has other values here
    return saved

def save_checkpoint(args, name: str, model: nn.Module, optimizer, log: list, train: Images, **more):
    data = dict(mean=(train.mean / 255).flatten().tolist(),
                std=(train.std / 255).flatten().tolist(), classes=train.classes)
    write(args, name, dict(args=vars(args), model=model.state_dict(), log=log, data=data,
                           optimizer=optimizer.state_dict(), **more))

def write(args, name: str, content: bytes | dict):
    """Writes a file of --out-dir. A kill or a full disk leaves the old one or the new, whole."""
    if RANK != 0:
        return
    if isinstance(content, dict):
        buffer = io.BytesIO()  # torch.save hides why a disk refuses
        torch.save(content, buffer)
        content = buffer.getvalue()

    path = Path(args.out_dir) / name
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except FileNotFoundError:
        raise UserError(f"{part} is gone: does another run write to {args.out_dir}?") from None
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None

def write_log(args, name: str, log: list[dict[str, str]]):
    lines = [",".join(log[0])] + [",".join(row.values()) for row in log]
    write(args, name, ("\n".join(lines) + "\n").encode())

def say(text: str, end: str = "\n"):
    if RANK == 0:
        with suppress(OSError):  # the reader of a pipe may be gone
            print(("\r\033[K" if TERMINAL else "") + text, end=end, flush=True)

def shown(items, text: str):
    """Yields the items and, if there is a text, shows how many are done: twice a second in the
    last line of a terminal, elsewhere in a line a minute."""
    began = last = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if text and now - last > (0.5 if TERMINAL else 60):
            last = now
            left = timedelta(seconds=round((now - began) / done * (len(items) - done)))
            say(f"{text} {done}/{len(items)}, {left} left", end="" if TERMINAL else "\n")

def seed_of(*key) -> int:
    return random.Random(repr(key)).getrandbits(63)

def all_reduce(x: Tensor) -> Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(x)  # in place
    return x

def share(n: int) -> Tensor:
    return torch.arange(n).tensor_split(WORLD_SIZE)[RANK]  # the part that this process takes

def set_up(args) -> tuple[nn.Module, Images, Images]:
    """Starts the processes. Returns the model, the training and the test images."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError("under srun, torchrun must start the processes: "
                        "srun --ntasks-per-node=1 torchrun ... train_cifar.py ...")
    if WORLD_SIZE > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
    if args.cuda_graph:
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be recorded
    torch.set_float32_matmul_precision("high")
    # On CPUs the backward pass of fused attention in bfloat16 takes as long as all the rest.
    torch.backends.cuda.enable_flash_sdp(DEVICE.type == "cuda" or args.precision == "fp32")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)

    try:
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out-dir must be a directory to write to: {error}") from None
    if checkpoints(args) and not args.resume:
        raise UserError(f"{args.out_dir} has a checkpoint: continue it with --resume, or give "
                        "another --out-dir")
    say(f"{args.model} on {DEVICE} in {args.precision}, {args.global_batch} images a step")
    if DEVICE.type == "cpu" and args.dataset != "shapes" and args.depth is None and args.epochs:
        say("on a CPU this takes days; to start small: --depth 3 --decoder-embed-dim 96 "
            "--decoder-depth 1 --batch-size 128 --blr 2e-3 --epochs 16")

    encoder = load_encoder(args)
    model = build_model(args, encoder).to(DEVICE)
    train, test = load_data(args)
    say(f"{args.dataset}: {len(train)} training, {len(test)} test images in {len(train.classes)} "
        "classes")
    if len(train.classes) < 2 or not len(test):
        needs = "needs two classes or more, and test images (files: in val/<class>/)"
        if args.finetune_epochs or not args.epochs:
            raise UserError(f"{'fine-tuning' if args.finetune_epochs else 'the probe'} {needs}")
        say(f"no linear probe, which {needs}")
    n = len(train.labels) if args.finetune_epochs else len(train)
    if (args.epochs or args.finetune_epochs) and n < args.global_batch:
        raise UserError(f"a step takes {args.global_batch} images (--batch-size), but there are "
                        f"{n}")
    return model, train, test

def main(argv: list[str] | None = None):
    users = ValueError  # before training, every ValueError is the user's mistake
    try:
        args = parse_args(argv)
        model, train, test = set_up(args)
        users = UserError
        if args.epochs:
            pretrain(args, train, test, model)
        if args.finetune_epochs:
            finetune(args, train, test, model.encoder)
        if not args.epochs and not args.finetune_epochs:
            linear_probe(args, train, test, model.encoder)
    except (users, OSError) as error:
        print("\n" * TERMINAL + f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped: --resume continues after the last saved epoch")

    say(f"done: {args.out_dir} has {', '.join(sorted(os.listdir(args.out_dir)))}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
