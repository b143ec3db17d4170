"""Pretrains a vision transformer by masked image modeling with AMT, then probes and fine-tunes it.

    python train_cifar.py --dataset shapes --out-dir out-shapes      # a look, offline, on a CPU
    python train_cifar.py                              # CIFAR-10, one GPU
    torchrun --nproc_per_node=4 train_cifar.py --dataset imagenet --data-path DIR       # four GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_cifar.py --dataset imagenet --data-path DIR                  # on each of two nodes
    python train_cifar.py --resume                     # goes on with the run in --out-dir

    python train_cifar.py --masking random --out-dir out-random              # MAE, the baseline
    python train_cifar.py --method simmim --out-dir out-simmim               # SimMIM with AMT
    python train_cifar.py --checkpoint out/encoder.pth --epochs 0 --probe-epochs 0 \
        --finetune-epochs 100 --out-dir out-finetuned                        # none: from scratch
    python train_cifar.py --benchmark                  # what a step costs: random and AMT

--out-dir gets checkpoint.pth, encoder.pth (the encoder's state dict alone), log.csv (a row an
epoch), attention.png (what [CLS] attended to at each update) and masking.png; probe and fine-tuning
have checkpoints and logs of their own, and fine-tuning leaves finetuned.pth.
"""
import argparse
import ctypes
import math
import os
import pickle
import random
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder
from torchvision.transforms import v2
from torchvision.utils import save_image

import amt

RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE = (  # set by torchrun
    int(os.environ.get(name, default)) for name, default in
    [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)])
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")


class Method(NamedTuple):
    random: tuple[float, float]         # masked and thrown at random, and until the first update
    amt: list[tuple[float, float]]      # and by AMT; the first is the default
    mask_unit: int                      # the side, in patches, of what is masked as one
    scale: tuple[float, float]          # the crops' share of the area


METHODS = {  # the ratios of AMT with MaskFeat are those with SimMIM
    "mae": Method((0.75, 0.0), [(0.45, 0.40)], 1, (0.2, 1.0)),
    "simmim": Method((0.60, 0.0), [(0.44, 0.26), (0.33, 0.50)], 2, (0.67, 1.0)),
    "maskfeat": Method((0.40, 0.0), [(0.44, 0.26), (0.33, 0.50)], 2, (0.5, 1.0)),
}
BY_ATTENTION = ["attention", "attmask", "mst"]      # the strategies that need attention maps

# ------------------------------------------------------------------------------------------------
# Lines, processes, signals


def say(line: str, end: str = "\n"):
    if RANK == 0:
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""        # the line that `progress` left
        print(clear + line, end=end, flush=True)


def fail(message: str, alone: bool = False):
    """Ends the program with one line, said by one process a machine; or by this one, if alone."""
    sys.exit(f"train_cifar.py: error: {message}" if alone or LOCAL_RANK == 0 else 1)


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def progress(line: str) -> bool:
    """Once a second: True, and on a terminal the line, which the next one overwrites."""
    now = time.time()
    if now - progress.shown < 1:
        return False
    progress.shown = now
    if sys.stdout.isatty():
        say(line, end="")
    return True


progress.shown = 0.0


def keep_memory():
    """Makes glibc keep freed blocks of over 32 MB, of which each new one would cost its page faults
    again: on a CPU, up to a quarter of a step."""
    with suppress(OSError, AttributeError, TypeError):           # there is no glibc
        ctypes.CDLL(None).mallopt(-4, 0)                         # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)               # M_TRIM_THRESHOLD


def clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def all_sum(x: Tensor) -> Tensor:
    """Sums x over the processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x, group=all_sum.group)
    return x


def agree(*flags: bool) -> list[bool]:
    """Whether each flag is up in any process."""
    return all_sum(torch.tensor(flags, dtype=torch.int32)).bool().tolist()


def wait():
    """Returns when all processes are here, one of which may be busy with a file for long; in all
    other places a process that keeps the others waiting for 45 seconds counts as lost."""
    if WORLD_SIZE > 1:
        dist.all_reduce(torch.zeros(1))


def share(n: int) -> Tensor:
    """The numbers, of 0 ... n-1, that are this process's: all of them together have each once."""
    return torch.arange(n, device=DEVICE).tensor_split(WORLD_SIZE)[RANK]


def generator(*key) -> torch.Generator:
    """The generator of what is drawn under a key such as (seed, "pretraining", epoch, step).

    Each epoch, and each step, draws from its own, for the batch of all processes, of which each
    takes its rows. So no random state is ever saved, a resumed step draws what it drew before, and
    the draws do not depend on the number of processes.
    """
    return torch.Generator(DEVICE).manual_seed(random.Random(repr(key)).getrandbits(63))


SIGNALS = []                            # SIGTERM and Ctrl-C, since the training began


@contextmanager
def signals_noted():
    """Inside, SIGTERM and Ctrl-C do nothing but get into SIGNALS, for the end of the step."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    before = [signal.signal(number, lambda n, _: SIGNALS.append(n)) for number in numbers]
    try:
        yield
    finally:
        list(map(signal.signal, numbers, before))


def outlast_signals(worker: int):
    """A loader's worker ends with its process, which may want a last batch after a signal to all:
    to SIGTERM, which is also how a process that ends clears away its workers, it gives a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


# ------------------------------------------------------------------------------------------------
# Data


@dataclass
class Data:
    """Images held on the device, as bytes (n, 3, H, H)."""
    train: Tensor
    train_labels: Tensor    # int64, of as many of the first of these as are labelled
    test: Tensor
    test_labels: Tensor
    mean: Tensor            # (3, 1, 1) of the training pixels, 0 to 255
    std: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def shown(self, args) -> Tensor:
        """Eight test images, 0 to 255: not the first, which may be of one class."""
        g = torch.Generator().manual_seed(0)
        ids = torch.randperm(len(self.test), generator=g)[:8].to(DEVICE)
        return torch.cat([images for _, images in self.whole(args, "test", ids)])

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def whole(self, args, split: str, ids: Tensor):
        """Yields ids (B,) and images (B, 3, H, H), 0 to 255, of the split "train" or "test"."""
        for some in ids.split(args.batch_size) if len(ids) else ():
            yield some, getattr(self, split)[some].float()

    def crops(self, args, scale: tuple[float, float], augment: bool, order: Tensor, mine: Tensor,
              g: torch.Generator):
        """Yields ids (B,), crops (B, 3, H, H), 0 to 255, and their theta (B, 2, 3), of the training
        images order[mine]. Crops are drawn for the whole order; `augment`: RandAugment follows."""
        theta = amt.random_crops(len(order), scale, generator=g)
        seeds = torch.randint(2 ** 32, (len(order),), generator=g, device=DEVICE)
        for rows in mine.split(args.batch_size):
            ids = order[rows]
            images = amt.crop(self.train[ids].float(), theta[rows], args.img_size, "bicubic")
            images = images.clamp(0, 255)                        # bicubic overshoots
            if augment:
                images = torch.stack(list(map(rand_augment, images.round().byte(),
                                              seeds[rows].tolist())))
            yield ids, images.float(), theta[rows]


def rand_augment(image: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return RAND_AUGMENT(image)


RAND_AUGMENT = v2.RandAugment()


@dataclass
class Files(Data):
    """Images that stay files, decoded by --workers processes: `train` and `test` are paths."""
    items: list = field(default_factory=list)
    loader: DataLoader | None = None

    def read(self, args, items):
        """Yields numbers (B,), pixels (B, 3, H, H) and theta (B, 2, 3) of items for `Decoder`."""
        if self.loader is None:
            self.loader = DataLoader(
                Decoder(self.train + self.test, args.img_size), args.batch_size,
                sampler=self.items, num_workers=args.workers, worker_init_fn=outlast_signals,
                persistent_workers=args.workers > 0, pin_memory=DEVICE.type == "cuda")
        self.items[:], bad = items, None
        try:
            for batch in self.loader:
                ids, pixels, theta = (x.to(DEVICE, non_blocking=True) for x in batch)
                yield ids, pixels.permute(0, 3, 1, 2).float(), theta
        except BadImage as error:
            bad = str(error.with_traceback(None))                # that would keep the workers alive
        if bad:
            fail(bad.strip().rpartition("BadImage: ")[2], alone=True)    # a worker's has its stack

    def whole(self, args, split: str, ids: Tensor):
        first, view = (0, "whole") if split == "train" else (len(self.train), 0.875)
        for some, images, _ in self.read(args, [(first + i, view, 0) for i in ids.tolist()]):
            yield some - first, images

    def crops(self, args, scale, augment, order, mine, g):
        seeds = torch.randint(2 ** 32, (len(order),), generator=g, device=DEVICE)[mine]
        return self.read(args, ((i, (scale, augment), seed) for i, seed in
                                zip(order[mine].tolist(), seeds.tolist())))


class BadImage(Exception):
    pass


class Decoder(Dataset):
    """Files of images of any size and mode, as RGB bytes (H, H, 3).

    An item (number, view, seed) is that image, whole ("whole": without regard to its aspect), its
    middle square (a number: of this share of the short side), or a crop with a flip ((scale,
    augment): drawn from the seed). With it come the number and the theta (2, 3) of what is shown
    in the whole image.
    """

    def __init__(self, paths: list, img_size: int):
        self.paths = np.array([os.fsencode(path) for path in paths])     # one block for all workers
        self.img_size = img_size

    def __getitem__(self, item):
        number, view, seed = item
        path = os.fsdecode(self.paths[number])
        try:
            with Image.open(path) as image:
                return number, *self.show(image, view, seed)
        except Exception as error:                               # Pillow raises many kinds
            raise BadImage(f"cannot decode {path} ({reason(error)}): mend it or take it "
                           f"away") from None

    def show(self, image: Image.Image, view, seed: int) -> tuple[Tensor, Tensor]:
        size, orientation = self.img_size, image.getexif().get(0x0112, 1)
        W, H = image.size if orientation < 5 else image.size[::-1]           # turned by 90 degrees
        if isinstance(view, tuple):
            g = torch.Generator().manual_seed(seed)
            (width, _, x), (_, height, y) = amt.random_crops(
                1, view[0], generator=g, image_ratio=W / H)[0].tolist()
        else:
            side = (W, H) if view == "whole" else (view * min(W, H),) * 2
            width, height, x, y = side[0] / W, side[1] / H, 0.0, 0.0
        # A JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves a crop of H x H pixels or more.
        reduced = max(size / (W * abs(width)), size / (H * height))
        image.draft(None, tuple(math.ceil(reduced * side) for side in image.size))
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        W, H = image.size
        left, right = (round((x + side + 1) / 2 * W) for side in (-abs(width), abs(width)))
        top, bottom = (round((y + side + 1) / 2 * H) for side in (-height, height))
        left, top = min(left, W - 1), min(top, H - 1)
        right, bottom = max(right, left + 1), max(bottom, top + 1)           # a pixel at the least
        flip = math.copysign(1, width)
        theta = torch.tensor([[flip * (right - left) / W, 0, (left + right) / W - 1],
                              [0, (bottom - top) / H, (top + bottom) / H - 1]])
        pixels = torch.from_numpy(np.array(image.crop((left, top, right, bottom))))
        pixels = v2.functional.resize(pixels.permute(2, 0, 1), [size, size],
                                      v2.InterpolationMode.BICUBIC)          # antialiased
        pixels = pixels.flip(2) if flip < 0 else pixels
        if isinstance(view, tuple) and view[1]:
            pixels = rand_augment(pixels, seed + 1)              # the seed itself drew the crop
        return pixels.permute(1, 2, 0).contiguous(), theta       # as it lies in memory, for speed


def load_data(args) -> Data:
    if args.dataset == "shapes":
        splits = [shapes(args.num_images, seed=1), shapes(1000, seed=2)]
    elif args.dataset in ("cifar10", "cifar100", "stl10"):
        splits = published(args)
    else:
        data, bytes_each = find_files(args), 3 * args.img_size ** 2
        if args.dataset == "imagenet" or len(data.train + data.test) * bytes_each > 2e9:
            return data
        splits = decode_all(args, data)
    size = [args.img_size, args.img_size]
    (train, train_labels), (test, test_labels) = [
        (v2.functional.resize(x, size).to(DEVICE), y.to(DEVICE)) for x, y in splits]
    some = train[::1 + train.numel() // 2 ** 28]                 # all of CIFAR's, floats in 1 GiB
    std, mean = torch.std_mean(some.float(), dim=(0, 2, 3))
    return Data(train, train_labels, test, test_labels, mean[:, None, None], std[:, None, None])


def published(args) -> list[tuple[Tensor, Tensor]]:
    """The data sets that torchvision downloads."""
    if args.dataset == "stl10":
        dataset, kinds = STL10, [{"split": "train+unlabeled"}, {"split": "test"}]
    else:
        dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[args.dataset]
        kinds = [{"train": True}, {"train": False}]
    try:
        if LOCAL_RANK == 0:
            dataset(args.data_path, download=True)
        wait()
        splits = [dataset(args.data_path, **kind) for kind in kinds]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"cannot read or download {dataset.__name__} in --data-path {args.data_path} "
             f"({error}): connect to the internet, or give the directory that holds "
             f"{dataset.base_folder}")
    if args.dataset == "stl10":                                  # the unlabelled ones come last
        return [(torch.from_numpy(split.data), torch.tensor(split.labels[split.labels >= 0]).long())
                for split in splits]
    return [(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
             torch.tensor(split.targets)) for split in splits]


def find_files(args) -> Files:
    """Images in train/<class>/ and val/<class>/, or in the layout of Tiny ImageNet."""
    root = Path(args.data_path)
    try:
        train = ImageFolder(root / "train")
        if args.dataset == "tiny-imagenet":                      # file, class, and a box, by tabs
            lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
            test = [(str(root / "val" / "images" / name), kind)
                    for name, kind, *_ in (line.split("\t") for line in lines)]
        else:
            val = ImageFolder(root / "val")
            test = [(path, val.classes[label]) for path, label in val.samples]
        test = [(path, train.class_to_idx[kind]) for path, kind in test]
        (train_files, train_labels), (test_files, test_labels) = (
            zip(*split) for split in (train.samples, test))
    except (OSError, ValueError) as error:
        fail(f"--data-path {root} is not in the layout of --dataset {args.dataset} ({error})")
    except KeyError as error:
        fail(f"class {error} of {root / 'val'} is not among the {len(train.classes)} of "
             f"{root / 'train'}: give both the same classes")
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=DEVICE) * 255
    return Files(train_files, torch.tensor(train_labels, device=DEVICE), test_files,
                 torch.tensor(test_labels, device=DEVICE), mean[:, None, None], std[:, None, None])


def decode_all(args, data: Files) -> list[tuple[Tensor, Tensor]]:
    """The middle squares of the images, pixels and labels: decoded once, to be held in memory."""
    n = len(data.train + data.test)
    pixels = torch.empty(n, 3, args.img_size, args.img_size, dtype=torch.uint8)
    for ids, images, _ in data.read(args, [(i, 1.0, 0) for i in range(n)]):
        pixels[ids.cpu()] = images.byte().cpu()
        progress(f"decoding image {ids[-1] + 1} of {n}")
    return list(zip(pixels.tensor_split([len(data.train)]), (data.train_labels, data.test_labels)))


def shapes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n images (n, 3, 32, 32) of textured objects on smooth backgrounds, and labels 0 to 9 (n,).

    Class c has outline c mod 5 (triangle, square, hexagon, disc, flower) and, of five textures, c
    mod 5 for the first five classes and the next one for the others: neither alone tells the class.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    label = torch.arange(n) % 10
    outline, texture = label % 5, (label + label // 5) % 5
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    angle, size = uniform(-0.2, 0.2, 1, 1), uniform(0.8, 1.0, 1, 1)
    x, y = x - uniform(-0.15, 0.15, 1, 1), y - uniform(-0.15, 0.15, 1, 1)
    x, y = (x * angle.cos() - y * angle.sin()) / size, (x * angle.sin() + y * angle.cos()) / size
    radius, turn = torch.hypot(x, y), torch.atan2(x, -y)                     # (n, 32, 32)

    def polygon(sides):
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


# ------------------------------------------------------------------------------------------------
# Training


@contextmanager
def precision(args):
    """Autocast, as --precision says."""
    bf16 = args.precision == "bf16"
    plain = PlainAttention() if bf16 and DEVICE.type == "cpu" else nullcontext()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16), plain:
        yield


class PlainAttention(TorchFunctionMode):
    """Inside, attention is by plain products, which autocast knows: on CPUs, the backward pass of
    torch's fused bfloat16 attention takes as long as the rest of a step."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            return (q @ k.mT / math.sqrt(q.shape[3])).softmax(dim=3) @ v
        return function(*args, **(kwargs or {}))


def build_encoder(args, **kwargs) -> amt.ViT:
    torch.manual_seed(args.seed)
    if args.depth:
        kwargs["depth"] = args.depth
    return VITS[args.model](img_size=args.img_size, patch_size=args.patch_size, **kwargs)


def build_optimizer(model: nn.Module, beta2: float = 0.95,
                    lr_scale: Callable[[str], float] = lambda name: 1.0) -> torch.optim.Optimizer:
    """AdamW; weight decay is for matrices, and lr_scale(name) a factor of a parameter's lr."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.05 if name.endswith("weight") and p.ndim > 1 else 0.0
            scale = lr_scale(name)
            group = {"params": [], "weight_decay": decay, "lr_scale": scale}
            groups.setdefault((decay, scale), group)["params"].append(p)
    return torch.optim.AdamW(groups.values(), betas=(0.9, beta2), fused=True)


def wrap(args, model: nn.Module) -> nn.Module:
    if WORLD_SIZE > 1:
        model = DistributedDataParallel(
            model, device_ids=[DEVICE] if DEVICE.type == "cuda" else None,
            process_group=all_sum.group, gradient_as_bucket_view=True)
    return torch.compile(model, dynamic=False) if args.compile else model


def set_lr(optimizer, peak: float, epoch: float, epochs: int, warmup: int = 0):
    """Linear warm-up, then half a cosine to 0; `epoch` is the number of epochs done, a fraction."""
    lr = peak * (epoch / warmup if epoch < warmup else
                 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Stage:
    """What `fit` trains on the first n training images: a model by an optimizer. These and `run`
    are all that a checkpoint holds. `prefix` begins the names of its files; None: it has none."""
    scale, augment, warmup = (0.2, 1.0), False, 0        # of the crops; RandAugment; epochs
    columns = ["epoch", "loss", "lr", "images_per_second", "seconds"]            # of the log

    def __init__(self, args, data: Data, name: str, prefix: str | None, model: nn.Module,
                 optimizer, blr: float, epochs: int, n: int):
        self.args, self.data, self.name, self.prefix, self.n = args, data, name, prefix, n
        self.model, self.optimizer, self.epochs = model, optimizer, epochs
        self.parallel, self.lr = model, blr * args.global_batch / 256
        self.run = {"epoch": 0, "step": 0, "losses": None, "seconds": 0.0, "epoch_began": 0.0,
                    "log": []}

    def loss(self, ids: Tensor, images: Tensor, theta: Tensor, rows: slice,
             g: torch.Generator) -> Tensor:
        """The mean loss of crops (B, 3, H, H), 0 to 255, of the training images ids (B,), which are
        `rows` of the batch of all processes; g draws for all of that."""
        raise NotImplementedError

    def start_epoch(self):
        pass

    def end_epoch(self) -> dict[str, str]:
        """Further columns of the log."""
        return {}


def fit(stage: Stage):
    """Trains a stage to its last epoch, with --resume from where its checkpoint left it."""
    args, data, run, optimizer = stage.args, stage.data, stage.run, stage.optimizer
    steps = stage.n // args.global_batch
    if args.resume and stage.prefix is not None:
        load_checkpoint(stage)
    write_log(stage)
    started = time.time() - run["seconds"]
    with signals_noted():
        for epoch in range(run["epoch"], stage.epochs):
            if run["step"] == 0:
                run["epoch_began"] = time.time() - started
                run["losses"] = torch.zeros(steps, device=DEVICE)
                stage.start_epoch()
            stage.model.train()
            g = generator(args.seed, stage.name, epoch)
            order = torch.randperm(stage.n, generator=g, device=DEVICE)
            # A step takes --accum-steps batches of each process, the first process's rows first.
            rows = torch.arange(steps * args.global_batch, device=DEVICE)
            mine = rows.view(steps, WORLD_SIZE, -1)[run["step"]:, RANK].flatten()
            crops = data.crops(args, stage.scale, stage.augment, order, mine, g)
            for step in range(run["step"], steps):
                set_lr(optimizer, stage.lr, epoch + step / steps, stage.epochs, stage.warmup)
                optimizer.zero_grad()
                for i in range(args.accum_steps):
                    first = (RANK * args.accum_steps + i) * args.batch_size
                    batch = next(crops)
                    g = generator(args.seed, stage.name, epoch, step)
                    torch.manual_seed(g.initial_seed() + first)  # for mixing and drop path
                    # Only the last backward pass sums the gradients over the processes.
                    no_sync = getattr(stage.parallel, "no_sync", nullcontext)
                    with no_sync() if i + 1 < args.accum_steps else nullcontext():
                        loss = stage.loss(*batch, slice(first, first + args.batch_size), g)
                        (loss / args.accum_steps).backward()
                    run["losses"][step] += loss.detach() / args.accum_steps
                optimizer.step()
                run["step"] = step + 1
                look = progress(f"{stage.name} epoch {epoch + 1}/{stage.epochs}  step {step + 1}"
                                f"/{steps}")
                bad = look and not run["losses"].isfinite().all()
                stopped, bad = agree(len(SIGNALS) > 0, bad)
                if stopped or bad:
                    break
            losses = all_sum(run["losses"].clone()) / WORLD_SIZE
            check_finite(stage, losses, epoch)                   # waits for a GPU to be done
            run["seconds"] = time.time() - started
            if run["step"] < steps or agree(len(SIGNALS) > 0)[0]:
                stop(stage)
            columns = stage.end_epoch()
            started = time.time() - run["seconds"]               # that was not time of training
            seconds = run["seconds"] - run["epoch_began"]
            speed = steps * args.global_batch / (seconds - float(columns.get("update_seconds", 0)))
            loss, lr = losses.mean().item(), max(group["lr"] for group in optimizer.param_groups)
            run["log"].append([str(epoch + 1), f"{loss:.5f}", f"{lr:.3e}", f"{speed:.0f}",
                               f"{seconds:.2f}", *columns.values()])
            run.update(epoch=epoch + 1, step=0)
            write_log(stage)
            left = run["seconds"] / (epoch + 1) * (stage.epochs - epoch - 1)
            more = "".join(f"  {k} {value}" for k, value in columns.items() if float(value or 0))
            say(f"{stage.name} epoch {epoch + 1}/{stage.epochs}  loss {loss:.4f}  lr {lr:.2e}"
                f"  {speed:,.0f} images/s  {clock(left)} left{more}")
            if (epoch + 1) % args.save_every == 0 or epoch + 1 == stage.epochs:
                save_checkpoint(stage)


def stop(stage: Stage):
    """Saves and ends the program, as a signal to some process wants it."""
    save_checkpoint(stage)
    number = signal.Signals(SIGNALS[0] if SIGNALS else signal.SIGTERM)
    say(f"stopped by {number.name} in {stage.name}, epoch {stage.run['epoch'] + 1}, after step "
        f"{stage.run['step']}: the same command with --resume goes on from there")
    sys.exit(128 + number)


def check_finite(stage: Stage, losses: Tensor, epoch: int):
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].item()
        fail(f"the loss is {losses[step].item()} in epoch {epoch + 1}, step {step + 1} of "
             f"{stage.name}: start again in another --out-dir with a lower learning rate (its peak "
             f"was {stage.lr:.3g}; see --blr, --probe-blr, --finetune-blr) or in fp32. The last "
             f"checkpoint in {stage.args.out_dir} is unharmed")


# ------------------------------------------------------------------------------------------------
# Pretraining


def build_model(args) -> nn.Module:
    encoder = build_encoder(args)
    if args.method != "mae":
        return amt.SimMIM(encoder, "hog" if args.method == "maskfeat" else "pixels")
    return amt.MAE(encoder, args.decoder_embed_dim, args.decoder_depth,
                   args.decoder_embed_dim // 32, norm_pix_loss=True)


def policy(args, updated: bool) -> tuple[Callable, tuple[float, float]]:
    """The strategy and its ratios: what goes by attention is random until there are maps of it."""
    if args.masking in BY_ATTENTION and not updated:
        return amt.STRATEGIES["random"], METHODS[args.method].random
    return amt.STRATEGIES[args.masking], (args.mask_ratio, args.throw_ratio)


def split(args, ranking: Tensor, ratios: tuple[float, float]) -> list[Tensor]:
    """The patches masked, thrown and visible, by a ranking of units."""
    return [amt.expand_units(units, args.img_size // args.patch_size, args.mask_unit)
            for units in amt.mask_and_throw(ranking, *ratios, args.throw)]


def update_maps(args, encoder: amt.ViT, data: Data) -> Tensor | None:
    """The masking weights (n, h, w), float16, of all training images, whole, of which each process
    finds its share; None: a signal came."""
    h = encoder.grid_size
    maps = torch.zeros(len(data.train), h, h, dtype=torch.float16, device=DEVICE)
    mine = share(len(maps))
    for i, (ids, images) in enumerate(data.whole(args, "train", mine)):
        if SIGNALS:
            break
        with precision(args):
            maps[ids] = amt.masking_weights(encoder, data.normalise(images)).half()
        progress(f"new attention maps: {i * args.batch_size} of {len(mine)} images")
    wait()
    (stopped,) = agree(len(SIGNALS) > 0)
    return None if stopped else all_sum(maps)                    # 0 here: another process's


class Pretraining(Stage):
    columns = [*Stage.columns, "update_seconds", "probe_accuracy"]

    def __init__(self, args, data: Data):
        model = build_model(args).to(DEVICE)
        super().__init__(args, data, "pretraining", "", model, build_optimizer(model), args.blr,
                         args.epochs, len(data.train))
        self.parallel, self.warmup = wrap(args, model), args.warmup_epochs
        self.scale = METHODS[args.method].scale
        self.run |= {"maps": None, "snapshots": [], "update_seconds": 0.0}

    def start_epoch(self):
        args, run, started = self.args, self.run, time.time()
        run["update_seconds"] = 0.0
        due = run["epoch"] and run["epoch"] % args.update_interval == 0
        if due and args.masking in BY_ATTENTION:
            maps = update_maps(args, self.model.encoder, self.data)
            if maps is None:
                stop(self)
            run["maps"] = maps
            shown = self.data.shown(args)
            run["snapshots"].append(
                amt.masking_weights(self.model.encoder, self.data.normalise(shown)))
            if RANK == 0:                                        # what [CLS] attends to (Fig. 2)
                rows = [shown / 255, *map(heat, run["snapshots"])]
                save_grid(rows, args.out_dir / "attention.png")
            run["update_seconds"] = time.time() - started

    def rank(self, ids: Tensor, theta: Tensor, rows: slice, g: torch.Generator) -> Tensor:
        """A ranking (B, N) of the units of these crops."""
        args, maps = self.args, self.run["maps"]
        weights = torch.ones(args.global_batch, args.num_units, device=DEVICE)
        if maps is not None:
            unit = args.mask_unit * args.patch_size              # in pixels
            weights[rows] = amt.crop_weights(maps[ids].float(), theta, args.img_size, unit)
        strategy, _ = policy(args, maps is not None)
        return strategy(weights, g)[rows]

    def loss(self, ids, images, theta, rows, g):
        _, ratios = policy(self.args, self.run["maps"] is not None)
        masked, _, visible = split(self.args, self.rank(ids, theta, rows, g), ratios)
        with precision(self.args):
            return self.parallel(self.data.normalise(images), visible, masked)[0]

    def end_epoch(self):
        accuracy = ""
        if self.args.probe_every and (self.run["epoch"] + 1) % self.args.probe_every == 0:
            save_checkpoint(self)                                # the probe may be stopped
            probe = LinearProbe(self.args, self.data, self.model.encoder, short=True)
            fit(probe)
            accuracy = f"{probe.accuracy():.2f}"
        return {"update_seconds": f"{self.run['update_seconds']:.2f}", "probe_accuracy": accuracy}


# ------------------------------------------------------------------------------------------------
# Linear probe and fine-tuning


class Classification(Stage):
    """Has logits(images) of normalised images."""

    @torch.no_grad()
    def accuracy(self) -> float:
        """Of all test images, whole, in percent."""
        self.model.eval()
        data, right = self.data, torch.zeros((), dtype=torch.int64, device=DEVICE)
        for ids, images in data.whole(self.args, "test", share(len(data.test))):
            predicted = self.logits(data.normalise(images)).argmax(dim=1)
            right += (predicted == data.test_labels[ids]).sum()
        wait()
        return 100 * all_sum(right).item() / len(data.test)


class LinearProbe(Classification):
    """A linear layer on the frozen [CLS]; `short`: for a tenth of the epochs."""

    def __init__(self, args, data: Data, encoder: amt.ViT, short: bool = False):
        torch.manual_seed(args.seed)
        head = nn.Sequential(nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6),
                             nn.Linear(encoder.embed_dim, data.classes)).to(DEVICE)
        nn.init.trunc_normal_(head[1].weight, std=0.01)
        nn.init.zeros_(head[1].bias)
        epochs = max(1, args.probe_epochs // 10) if short else args.probe_epochs
        optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=0.9)
        super().__init__(args, data, "probe", None if short else "probe-", head, optimizer,
                         args.probe_blr, epochs, len(data.train_labels))
        self.encoder = encoder

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        self.encoder.eval()
        with precision(self.args):
            return self.encoder(images)[:, 0].float()                        # (B, D)

    def logits(self, images):
        return self.model(self.features(images))

    def loss(self, ids, images, theta, rows, g):
        # The processes divide the encoder's work and share its features; then each trains the
        # same head on all of them. BatchNorm sees all of these, no gradient is exchanged.
        features = self.features(self.data.normalise(images))
        shared = torch.zeros(WORLD_SIZE, *features.shape, device=DEVICE)
        labels = torch.zeros(WORLD_SIZE, len(ids), dtype=torch.int64, device=DEVICE)
        shared[RANK], labels[RANK] = features, self.data.train_labels[ids]
        return F.cross_entropy(self.model(all_sum(shared).flatten(0, 1)), all_sum(labels).flatten())


class Classifier(nn.Module):
    """Logits (B, classes) of images: a linear layer on the encoder's [CLS]."""

    def __init__(self, encoder: amt.ViT, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images)[:, 0])


class FineTuning(Classification):
    """The whole encoder with a linear layer on [CLS], by the recipe of He et al., 2022; from
    scratch without their layer-wise decay of the learning rate."""

    def __init__(self, args, data: Data, pretrained: amt.ViT):
        encoder = build_encoder(args, drop_path=0.1)
        encoder.load_state_dict(pretrained.state_dict())
        model = Classifier(encoder, data.classes).to(DEVICE)
        depth, decay = len(encoder.blocks), 1.0 if args.checkpoint == "none" else 0.75

        def lr_scale(name: str) -> float:
            part, *rest = name.removeprefix("encoder.").split(".")
            layer = {"cls_token": 0, "patch_embed": 0, "norm": depth + 1, "head": depth + 1}
            return decay ** (depth + 1 - (int(rest[0]) + 1 if part == "blocks" else layer[part]))

        super().__init__(args, data, "fine-tuning", "finetune-", model,
                         build_optimizer(model, 0.999, lr_scale), args.finetune_blr,
                         args.finetune_epochs, len(data.train_labels))
        self.parallel, self.warmup = wrap(args, model), self.epochs // 20
        self.augment = args.randaugment
        self.mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=data.classes),
                                    v2.CutMix(alpha=1.0, num_classes=data.classes)])

    def logits(self, images):
        with precision(self.args):
            return self.model(images).float()

    def loss(self, ids, images, theta, rows, g):
        images, labels = self.mix(self.data.normalise(images), self.data.train_labels[ids])
        with precision(self.args):
            logits = self.parallel(images).float()
        return F.cross_entropy(logits, labels, label_smoothing=0.1)


def load_encoder(args, path: str) -> amt.ViT:
    """The encoder in a state dict of this script, of timm, or of He et al. ({"model": ...}), with
    its positions interpolated to this grid; "none": a fresh one."""
    encoder = build_encoder(args).to(DEVICE)
    if path == "none":
        return encoder
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # in He et al.'s files
            saved = torch.load(path, map_location=DEVICE, weights_only=True)
        saved = {name.removeprefix("encoder."): p for name, p in saved.get("model", saved).items()
                 if not name.startswith(("decoder", "mask_token", "head."))}
        cls, grid = saved["pos_embed"].split([1, saved["pos_embed"].shape[1] - 1], dim=1)
        if grid.shape[1] != encoder.grid_size ** 2:
            grid = grid.unflatten(1, (amt.grid_side(grid.shape[1]), -1)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid.float(), size=encoder.grid_size, mode="bicubic",
                                 antialias=True).flatten(2).transpose(1, 2)
        encoder.load_state_dict({**saved, "pos_embed": torch.cat([cls, grid], dim=1)})
    except Exception as error:                                   # torch.load raises many kinds
        fail(f"--checkpoint {path} is not a state dict of a ViT, of this script, timm or He et "
             f"al., that fits --model {args.model}, --patch-size {args.patch_size} and, see "
             f"--depth, {len(encoder.blocks)} blocks ({' '.join(str(error).split())})")
    return encoder


# ------------------------------------------------------------------------------------------------
# Files


def write_file(path: Path, write: Callable):
    """Writes beside `path`, then renames: whatever happens, `path` is the old file or the new."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink()
        fail(f"cannot write {path} ({error}): make room, or give another --out-dir. What was there "
             f"is unharmed")


ALL = ["dataset", "num_images", "img_size", "model", "depth", "patch_size", "global_batch", "seed",
       "precision"]
SETTINGS = {  # that a stage keeps when it is resumed
    "pretraining": [*ALL, "method", "decoder_embed_dim", "decoder_depth", "masking", "mask_ratio",
                    "throw_ratio", "throw", "mask_unit", "update_interval", "epochs",
                    "warmup_epochs", "blr"],
    "probe": [*ALL, "checkpoint", "probe_epochs", "probe_blr"],
    "fine-tuning": [*ALL, "checkpoint", "finetune_epochs", "finetune_blr", "randaugment"],
}


def save_checkpoint(stage: Stage):
    losses = all_sum(stage.run["losses"].clone()) / WORLD_SIZE   # each process has its own
    if RANK == 0 and stage.prefix is not None:
        out_dir, settings = stage.args.out_dir, SETTINGS[stage.name]
        checkpoint = {
            "model": stage.model.state_dict(), "optimizer": stage.optimizer.state_dict(),
            "settings": {name: getattr(stage.args, name) for name in settings}, **stage.run,
            "losses": losses}
        if stage.name == "pretraining":
            encoder = stage.model.encoder.state_dict()
            write_file(out_dir / "encoder.pth", lambda file: torch.save(encoder, file))
        path = out_dir / f"{stage.prefix}checkpoint.pth"
        write_file(path, lambda file: torch.save(checkpoint, file))
    wait()


def load_checkpoint(stage: Stage):
    args, path = stage.args, stage.args.out_dir / f"{stage.prefix}checkpoint.pth"
    if path.exists():
        try:
            run = torch.load(path, map_location=DEVICE, weights_only=True)
            model, optimizer, settings = (run.pop(k) for k in ("model", "optimizer", "settings"))
            if run.keys() != stage.run.keys():
                raise ValueError("of another version")
        except Exception as error:                               # torch.load raises many kinds
            fail(f"{path} is damaged or not a checkpoint of this script ({reason(error)}): give "
                 f"another --out-dir")
        differ = [f"{name} {settings.get(name)} (now {getattr(args, name)})"
                  for name in SETTINGS[stage.name] if settings.get(name) != getattr(args, name)]
        if differ:
            fail(f"{path} was made with other settings: {', '.join(differ)}. Resume with those, or "
                 f"give another --out-dir")
        stage.model.load_state_dict(model)
        stage.optimizer.load_state_dict(optimizer)
        stage.run.update(run)
    wait()
    epoch, step = stage.run["epoch"], stage.run["step"]
    if all_sum(torch.tensor([epoch, step])).tolist() != [WORLD_SIZE * epoch, WORLD_SIZE * step]:
        fail(f"the processes found different checkpoints: --out-dir {args.out_dir} must be one "
             f"directory for all nodes")
    say(f"resuming {path} after epoch {epoch}" + f", step {step}" * (step > 0) if path.exists() else
        f"{path} does not exist yet: {stage.name} starts from the beginning")


def write_log(stage: Stage):
    """A row an epoch that the run has: none that came after the checkpoint it goes on from."""
    if RANK == 0 and stage.prefix is not None:
        rows = [stage.columns, *stage.run["log"]]
        text = "".join(",".join(row) + "\n" for row in rows)
        path = stage.args.out_dir / f"{stage.prefix}log.csv"
        write_file(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------------------------------
# Pictures


def save_grid(rows: list[Tensor], path: Path):
    """Rows of pictures (8, 3, H, W) in [0, 1]."""
    images = torch.cat([F.interpolate(row, size=128, mode="nearest") for row in rows])
    write_file(path, lambda file: save_image(images, file, format="png", nrow=len(rows[0]),
                                             padding=4, pad_value=1.0))


def heat(maps: Tensor) -> Tensor:
    """Maps (B, h, w) in [0, 1] in colours (B, 3, h, w): black, red, yellow, white."""
    return torch.stack([3 * maps, 3 * maps - 1, 3 * maps - 2], dim=1).clamp(0, 1)


@torch.no_grad()
def save_masking(stage: Pretraining):
    """masking.png: eight test images, their attention, what is masked (grey) and thrown (black),
    and, where pixels are predicted, the reconstruction; MAE's predictions, which are normalised
    patch by patch, get each patch's mean and contrast back."""
    args, data, model, p = stage.args, stage.data, stage.model, stage.args.patch_size
    shown = data.shown(args) / 255
    images = data.normalise(255 * shown)
    maps = amt.masking_weights(model.encoder, images)
    weights = amt.patchify(maps[:, None], args.mask_unit).sum(dim=2)         # (8, N)
    strategy, _ = policy(args, stage.run["maps"] is not None)
    ranking = strategy(weights, generator(args.seed, "picture"))
    masked, thrown, visible = split(args, ranking, (args.mask_ratio, args.throw_ratio))
    _, pred = model(images, visible, masked)

    if args.method == "mae":
        target = amt.select(amt.patchify(images, p), masked)
        pred = pred * target.std(dim=2, keepdim=True) + target.mean(dim=2, keepdim=True)
    std, mean = (x.flatten().repeat(p * p) / 255 for x in (data.std, data.mean))     # (p*p*3)

    def paint(patches, ids, colours):
        return patches.scatter(1, ids[:, :, None].expand(-1, -1, patches.shape[2]), colours)

    patches = paint(amt.patchify(shown, p), thrown, 0.0)
    rows = [shown, heat(maps), amt.unpatchify(paint(patches, masked, 0.5), p)]
    if args.method != "maskfeat":
        predicted = paint(patches, masked, (pred * std + mean).clamp(0, 1))
        rows.append(amt.unpatchify(predicted, p))
    save_grid(rows, args.out_dir / "masking.png")


# ------------------------------------------------------------------------------------------------
# Benchmark


TITLES = """\
                GFLOP an image                       of random's             of the  not the
                encoder decoder       step  images/s  time GFLOP    memory   matmul    model"""


def benchmark(args):
    """Prints what a step costs by random masking and by AMT, taken in turn, and an update."""
    g, n, method = generator(args.seed, "benchmark"), args.batch_size, METHODS[args.method]
    images = torch.randint(256, (n, 3, args.img_size, args.img_size), dtype=torch.uint8,
                           generator=g, device=DEVICE)
    labels, (mean, std) = images[:, 0, 0, 0].long(), torch.full((2, 3, 1, 1), 127.5, device=DEVICE)
    data = Data(images, labels, images, labels, mean, std)
    stage, ids = Pretraining(args, data), torch.arange(n, device=DEVICE)
    set_lr(stage.optimizer, 1e-4, 0, 1)
    stage.model.train()
    maps = update_maps(args, stage.model.encoder, data)

    def step(masking: str, ratios: tuple[float, float], whole: bool = True):
        """A step of one batch; not whole: what of it is not the model."""
        stage.args = argparse.Namespace(**{**vars(args), "masking": masking, "global_batch": n,
                                           "mask_ratio": ratios[0], "throw_ratio": ratios[1]})
        stage.run["maps"] = maps if masking == "attention" else None
        some, crops, theta = next(data.crops(args, stage.scale, False, ids, ids, g))
        if not whole:
            return split(stage.args, stage.rank(some, theta, slice(0, n), g), ratios)
        stage.optimizer.zero_grad()
        stage.loss(some, crops, theta, slice(0, n), g).backward()
        stage.optimizer.step()

    rows = {"random {:.2f}".format(method.random[0]): ("random", method.random)}
    rows |= {"AMT {:.2f}/{:.2f}".format(*ratios): ("attention", ratios) for ratios in method.amt}
    jobs = {name: partial(step, *row) for name, row in rows.items()}
    jobs |= {f"{name}, choice": partial(step, *row, whole=False) for name, row in rows.items()}
    jobs["update"] = partial(update_maps, args, stage.model.encoder, data)
    for job in jobs.values():                                    # compiles, makes AdamW's state
        job()
    memory = {name: peak_memory(jobs[name]) for name in rows}
    side = 8192 if DEVICE.type == "cuda" else 2048
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    matrix = torch.randn(side, side, device=DEVICE, dtype=dtype)
    jobs["matmul"] = lambda: matrix @ matrix
    times, began, rounds = {name: [] for name in jobs}, time.perf_counter(), 0
    while rounds < 3 or rounds < 10 and time.perf_counter() - began < 40:
        rounds += 1
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(some) for name, some in times.items()}

    chip = (torch.cuda.get_device_name() if DEVICE.type == "cuda" else
            f"{torch.get_num_threads()} CPU threads")
    peak = 2 * side ** 3 / min(times["matmul"])
    say(f"{args.method}, {args.model}, {len(stage.model.encoder.blocks)} blocks, images "
        f"{args.img_size}, patches {args.patch_size}, batch {n}, {args.precision}\n{chip}, torch "
        f"{torch.__version__}, matmul {peak / 1e12:.3g} TFLOP/s at best; medians of {rounds} "
        f"rounds\n{TITLES}")
    counts = {name: operations(args, ratios) for name, (_, ratios) in rows.items()}
    base, best = list(rows)[:2]
    for name in rows:
        (encoder, decoder), s = counts[name], seconds[name]
        say(f"{name:14} {encoder / 1e9:8.3f} {decoder / 1e9:7.3f} {1e3 * s:7.1f} ms "
            f"{n / s:9,.1f} {s / seconds[base]:5.2f} {sum(counts[name]) / sum(counts[base]):5.2f} "
            f"{memory[name]:5.1f} GiB {sum(counts[name]) * n / s / peak:8.0%} "
            f"{seconds[f'{name}, choice'] / s:8.1%}")
    cost = seconds["update"] / (args.update_interval * seconds[best])
    say(f"update of the maps: {n / seconds['update']:,.0f} images/s; every {args.update_interval} "
        f"epochs, {cost:.1%} of the time that these take by {best}")


def operations(args, ratios: tuple[float, float]) -> tuple[int, int]:
    """Floating-point operations of a step for an image, those of matrix products and their
    gradients, in the encoder and in the decoder; counted without doing them."""
    with torch.device("meta"), PlainAttention(), FlopCounterMode(display=False) as counter:
        images = torch.zeros(1, 3, args.img_size, args.img_size)
        masked, _, visible = split(args, torch.arange(args.num_units)[None], ratios)
        build_model(args)(images, visible, masked)[0].backward()
    encoder = sum(sum(count.values()) for name, count in counter.get_flop_counts().items()
                  if re.fullmatch(r"\w+\.encoder\.(patch_embed|blocks\.\d+)", name))
    return encoder, counter.get_total_flops() - encoder


def peak_memory(job: Callable) -> float:
    """GiB, while job() runs: of tensors on a GPU; on Linux, of the process; elsewhere nan."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated() / 2 ** 30
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)                         # gives back what is free
        Path("/proc/self/clear_refs").write_text("5")            # resets VmHWM
        job()
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2 ** 20
    return math.nan


# ------------------------------------------------------------------------------------------------
# Command line

VITS = {name: getattr(amt, name)
        for name in ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]}
DEFAULTS = {  # where a data set's are not those of parse_args
    "cifar10": {}, "cifar100": {}, "stl10": {"img_size": 96, "patch_size": 8},
    "tiny-imagenet": {"img_size": 64, "patch_size": 8},
    "folder": {"img_size": 224, "patch_size": 16},
    "imagenet": {"img_size": 224, "patch_size": 16, "model": "vit_base", "decoder_embed_dim": 512,
                 "decoder_depth": 8, "blr": 1.5e-4, "save_every": 1},
    "shapes": {"depth": 3, "decoder_embed_dim": 96, "decoder_depth": 1, "epochs": 24,
               "update_interval": 4, "batch_size": 64, "blr": 4e-3, "probe_epochs": 8,
               "probe_blr": 0.5},
}


def at_least(low: int):
    def whole_number(text: str) -> int:
        if not (text.lstrip("-").isdigit() and low <= int(text) < 2 ** 31):
            raise argparse.ArgumentTypeError(
                f"{text} is not allowed: give a whole number from {low} to {2 ** 31 - 1}")
        return int(text)
    return whole_number


def rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a learning rate: give a number above 0")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (see --help)")
    some, number = {"type": at_least(1)}, {"type": at_least(0)}

    def add(flag: str, text: str = "(%(default)s)", default=None, **kwargs):
        parser.add_argument(flag, help=text, default=default, **kwargs)

    add("--dataset", "cifar10, cifar100, stl10: downloaded; tiny-imagenet; folder: train/<class>/ "
        "and val/<class>/, decoded once; imagenet: the same, decoded in each epoch; shapes: made. "
        "The defaults given here are those of cifar10", "cifar10", choices=DEFAULTS)
    add("--data-path", "of the images, DIR (%(default)s)", "data", metavar="DIR")
    add("--num-images", "for training, of --dataset shapes (%(default)s)", 2500, **some)
    add("--img-size", "in pixels, of a side (%(default)s)", 32, **some)
    add("--workers", "that decode images, of each process (%(default)s)",
        min(16, max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE)), **number)
    add("--out-dir", "of the run's files, DIR (%(default)s)", Path("out"), type=Path)
    add("--resume", "go on with the run in --out-dir", False, action="store_true")
    add("--save-every", "epochs of training (%(default)s)", 10, **some)
    add("--seed", default=0, **number)
    # the model
    add("--model", default="vit_tiny", choices=VITS)
    add("--depth", "of the encoder, in blocks (the model's own)", **some)
    add("--patch-size", "in pixels, of a side (%(default)s)", 4, **some)
    add("--decoder-embed-dim", "a multiple of 32, as each head has 32 (%(default)s)", 192, **some)
    add("--decoder-depth", "in blocks (%(default)s)", 4, **some)
    # the method
    add("--method", "maskfeat is simmim with HOG targets (%(default)s)", "mae", choices=METHODS)
    add("--masking", "what patches are ranked by: attention, drawn; random; attmask: the highest "
        "attention first; mst: the lowest; block; grid (%(default)s)", "attention",
        choices=amt.STRATEGIES)
    add("--mask-ratio", "share of patches that are masked (0.45 by attention with mae, else 0.44; "
        "by other strategies 0.75 with mae, 0.60 with simmim, 0.40 with maskfeat)", type=float)
    add("--throw-ratio", "share of patches that are thrown (0.40 by attention with mae, else 0.26; "
        "by other strategies 0)", type=float)
    add("--throw", "part of the ranking (%(default)s)", "middle", choices=["middle", "lowest"])
    add("--mask-unit", "side, in patches, of what is masked as one (mae: 1, others: 2)", **some)
    add("--update-interval", "of the attention maps, in epochs (a tenth of --epochs)", **some)
    # the schedules
    add("--epochs", "of pretraining; 0 for --checkpoint (%(default)s)", 400, **number)
    add("--warmup-epochs", "(a tenth of --epochs)", **number)
    add("--batch-size", "of each process, at a time (%(default)s)", 512, **some)
    add("--accum-steps", "batches of each process to a step (%(default)s)", 1, **some)
    add("--blr", "learning rate for 256 images a step in all, growing with these (%(default)s)",
        5e-4, type=rate)
    add("--checkpoint", "with --epochs 0: FILE with the encoder to probe or to fine-tune, of this "
        "script, timm or MAE's authors; none: an untrained one")
    add("--probe-epochs", "0: no linear probe (%(default)s)", 90, **number)
    add("--probe-blr", "as --blr (%(default)s)", 0.1, type=rate)
    add("--probe-every", "epochs of pretraining: a tenth of --probe-epochs, for log.csv", **some)
    add("--finetune-epochs", "0: no fine-tuning (%(default)s)", 0, **number)
    add("--finetune-blr", "as --blr; a layer has 0.75 of the next one's (%(default)s)", 1e-3,
        type=rate)
    add("--randaugment", "after crop and flip in fine-tuning", False, action="store_true")
    # the machine
    add("--precision", "(bf16 autocast on GPUs that have it)", choices=["bf16", "fp32"])
    add("--compile", "by torch.compile", False, action="store_true")
    add("--benchmark", "only time steps of --method at the paper's ratios, on made images", False,
        action="store_true")

    first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**DEFAULTS[first.dataset])
    if first.checkpoint == "none":
        parser.set_defaults(probe_epochs=0)
    args = parser.parse_args(argv)
    args.global_batch = args.batch_size * args.accum_steps * WORLD_SIZE
    method = METHODS[args.method]
    mask_ratio, throw_ratio = method.amt[0] if args.masking == "attention" else method.random
    args.mask_ratio = mask_ratio if args.mask_ratio is None else args.mask_ratio
    args.throw_ratio = throw_ratio if args.throw_ratio is None else args.throw_ratio
    args.mask_unit = args.mask_unit or method.mask_unit
    args.num_units = (args.img_size // args.patch_size // args.mask_unit) ** 2
    args.update_interval = args.update_interval or max(1, round(args.epochs / 10))
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs // 10
    bf16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    check(args)
    return args


def check(args):
    """Refuses flags that contradict each other, before any data is loaded."""
    held = [name for name, epochs in [("checkpoint.pth", args.epochs),
                                      ("probe-checkpoint.pth", args.probe_epochs),
                                      ("finetune-checkpoint.pth", args.finetune_epochs),
                                      ("finetuned.pth", args.finetune_epochs)]
            if epochs and (args.out_dir / name).exists()]
    gpus = torch.cuda.device_count() if DEVICE.type == "cuda" else LOCAL_WORLD_SIZE
    for wrong, message in [
        (args.decoder_embed_dim % 32,
         f"--decoder-embed-dim {args.decoder_embed_dim} is not a multiple of 32: give one"),
        (bool(args.epochs) == bool(args.checkpoint),
         f"--epochs {args.epochs} with --checkpoint {args.checkpoint}: give --epochs above 0, to "
         f"pretrain, or --epochs 0 and a --checkpoint, FILE or none, to start from"),
        (args.epochs and args.warmup_epochs >= args.epochs,
         f"--warmup-epochs {args.warmup_epochs} is not less than --epochs {args.epochs}"),
        (LOCAL_RANK >= gpus, f"more processes on a machine than its {gpus} GPUs: give torchrun a "
                             f"smaller --nproc_per_node"),
        (args.benchmark and WORLD_SIZE > 1,
         "--benchmark times a single process: start it without torchrun"),
        (held and not (args.resume or args.benchmark),
         f"{args.out_dir} holds the {' and '.join(held)} of a run: go on with it by --resume, or "
         f"give another --out-dir"),
    ]:
        if wrong:
            fail(message)
    try:
        with torch.device("meta"):
            build_model(args)
        method = METHODS[args.method]
        for ratios in [method.random, (args.mask_ratio, args.throw_ratio),
                       *(method.amt if args.benchmark else ())]:
            split(args, torch.zeros(1, args.num_units, dtype=torch.int64), ratios)
    except ValueError as error:
        fail(f"{error} (see --img-size, --patch-size, --mask-unit, --mask-ratio, --throw-ratio)")


def run(args):
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make --out-dir {args.out_dir} ({error}): give one that can be made")
    started, data = time.time(), load_data(args)
    wait()
    if args.global_batch > len(data.train_labels):
        fail(f"a batch of {args.global_batch} is more than the {len(data.train_labels)} training "
             f"images with labels: give a smaller --batch-size")
    say(f"{args.dataset}: {len(data.train)} training and {len(data.test)} test images; "
        f"{args.model} on {DEVICE}, {args.precision}, batch {args.global_batch} over {WORLD_SIZE} "
        f"process{'es' * (WORLD_SIZE > 1)}")
    if args.checkpoint:
        encoder = load_encoder(args, args.checkpoint)
    else:
        stage = Pretraining(args, data)
        fit(stage)
        if RANK == 0:
            save_masking(stage)
        encoder, seconds = stage.model.encoder, stage.run["seconds"]
        updates = sum(float(row[stage.columns.index("update_seconds")]) for row in stage.run["log"])
        say(f"pretrained for {args.epochs} epochs in {clock(seconds)}, of which {clock(updates)} "
            f"({updates / seconds:.1%}) for {len(stage.run['snapshots'])} updates of the attention "
            f"maps")
    for kind, epochs in [(LinearProbe, args.probe_epochs), (FineTuning, args.finetune_epochs)]:
        if epochs:
            stage = kind(args, data, encoder)
            fit(stage)
            say(f"{stage.name}: {stage.accuracy():.2f} % of {len(data.test)} test images right "
                f"after epoch {epochs}, the last")
    if args.finetune_epochs and RANK == 0:
        state = {name.removeprefix("encoder."): p for name, p in stage.model.state_dict().items()}
        write_file(args.out_dir / "finetuned.pth", lambda file: torch.save(state, file))
    files = sorted(path.name for path in args.out_dir.iterdir())
    say(f"done in {clock(time.time() - started)}; in {args.out_dir}: {', '.join(files)}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    torch.set_float32_matmul_precision("high")
    if DEVICE.type == "cpu":
        keep_memory()
    if args.benchmark:
        return benchmark(args)
    try:
        if WORLD_SIZE > 1:
            if DEVICE.type == "cuda":
                torch.cuda.set_device(DEVICE)
            dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=1))
            all_sum.group = dist.new_group(timeout=timedelta(seconds=45))
        return run(args)
    except SystemExit as error:
        end = error.code
    except KeyboardInterrupt:
        end = "stopped: the same command with --resume goes on from the last checkpoint"
    except Exception as error:
        if WORLD_SIZE > 1 and re.search("gloo|NCCL|onnection", str(error)):
            end = (f"train_cifar.py: error: lost another process ({' '.join(str(error).split())}): "
                   f"its error, if any, is above; the same command with --resume goes on from the "
                   f"last checkpoint")
        else:
            traceback.print_exc()
            end = 1
    sys.exit(end)                       # only here, where nothing holds the loader and its workers


if __name__ == "__main__":
    main()
