"""Pretrains a vision transformer by masked image modeling with AMT, then probes and fine-tunes it.

    python train_cifar.py --dataset shapes             # a look at the method, offline, on a CPU
    python train_cifar.py                              # CIFAR-10, one GPU
    torchrun --nproc_per_node=4 train_cifar.py         # four GPUs; --batch-size is per process
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_cifar.py                                 # on each of two nodes
    python train_cifar.py --resume                     # goes on with the run in --out-dir

    python train_cifar.py --masking random --out-dir out-random              # MAE, the baseline
    python train_cifar.py --mask-ratio 0.75 --throw-ratio 0 --out-dir out-am # AM: nothing is thrown
    python train_cifar.py --method simmim --out-dir out-simmim               # SimMIM with AMT
    python train_cifar.py --checkpoint out/encoder.pth --epochs 0 --probe-epochs 0 \
        --finetune-epochs 100                          # fine-tuning; none: from scratch
    python train_cifar.py --benchmark                  # the time of a step: random, AM, AMT

The directory --out-dir gets checkpoint.pth, encoder.pth (the encoder's state dict alone), log.csv
(a row an epoch), attention.png (what [CLS] attended to at each update), masking.png, and after
fine-tuning finetuned.pth.
"""
import argparse
import math
import os
import pickle
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2
from torchvision.utils import save_image

import amt

RANK, LOCAL_RANK, WORLD_SIZE = (  # set by torchrun
    int(os.environ.get(name, default)) for name, default in
    [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
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


def say(line: str, end: str = "\n"):
    if RANK == 0:
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""        # the line that `progress` left
        print(clear + line, end=end, flush=True)


def fail(message: str):
    """Ends the program with one line, said by one process of each machine."""
    sys.exit(f"train_cifar.py: error: {message}" if LOCAL_RANK == 0 else 1)


def all_sum(x: Tensor) -> Tensor:
    """Sums x over the processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def generator(*key) -> torch.Generator:
    """The generator of what is drawn under a key such as (seed, "pretrain", epoch).

    All that an epoch draws comes from its own generator, for the batch of all processes, of which
    each takes its rows. So no random state is ever saved, a resumed epoch draws what it drew
    before, and the draws do not depend on the number of processes.
    """
    return torch.Generator(DEVICE).manual_seed(random.Random(repr(key)).getrandbits(63))


# ------------------------------------------------------------------------------------------------
# Data: all images lie on the device, as bytes


class Data(NamedTuple):
    train: Tensor           # (n, 3, H, H) uint8
    train_labels: Tensor    # int64, of as many of the first of these as are labelled
    test: Tensor
    test_labels: Tensor
    mean: Tensor            # (3, 1, 1) of the training pixels, 0 to 255
    std: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    @property
    def shown(self) -> Tensor:
        """Eight test images, for the pictures: not the first, which may be of one class."""
        ids = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(0))[:8]
        return self.test[ids.to(DEVICE)]

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


def load_data(args) -> Data:
    if args.dataset == "shapes":
        splits = [shapes(args.num_images, seed=1), shapes(1000, seed=2)]
    else:
        splits = (folders if args.dataset in ("folder", "tiny-imagenet") else published)(args)
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
        if WORLD_SIZE > 1:
            dist.barrier()
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


def folders(args) -> list[tuple[Tensor, Tensor]]:
    """Images of any size in train/<class>/ and val/<class>/, or in the layout of Tiny ImageNet,
    decoded once: the short side resized to --img-size, and the middle square kept."""
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
    except (OSError, ValueError) as error:
        fail(f"--data-path {root} is not in the layout of --dataset {args.dataset} ({error})")
    except KeyError as error:
        fail(f"class {error} of {root / 'val'} is not among the {len(train.classes)} of "
             f"{root / 'train'}: give both the same classes")
    images = len(train.samples) + len(test)
    if images * 3 * args.img_size ** 2 > 2e9:
        fail(f"{images} images of {args.img_size} pixels a side do not fit in 2 GB: give a "
             f"smaller --img-size")
    square = v2.Compose([v2.Resize(args.img_size), v2.CenterCrop(args.img_size), v2.PILToTensor()])

    def decode(sample):
        try:
            return square(default_loader(sample[0]))
        except Exception as error:                               # Pillow raises many kinds
            fail(f"cannot decode {sample[0]} ({error}): mend it or take it away")

    def decode_all(samples):
        pixels = torch.empty(len(samples), 3, args.img_size, args.img_size, dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for i, image in enumerate(pool.map(decode, samples)):
                pixels[i] = image
                progress(f"decoding image {i + 1} of {len(samples)}")
        return pixels, torch.tensor([label for _, label in samples])

    return [decode_all(train.samples), decode_all(test)]


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
# Pretraining


@contextmanager
def precision(args):
    """Autocast, as --precision says."""
    bf16 = args.precision == "bf16"
    # On CPUs, the backward pass of torch's fused bfloat16 attention is slower than the plain one's.
    plain = sdpa_kernel(SDPBackend.MATH) if bf16 and DEVICE.type == "cpu" else nullcontext()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16), plain:
        yield


def build_encoder(args, **kwargs) -> amt.ViT:
    torch.manual_seed(args.seed)
    if args.depth:
        kwargs["depth"] = args.depth
    return VITS[args.model](img_size=args.img_size, patch_size=args.patch_size, **kwargs)


def build_model(args) -> nn.Module:
    encoder = build_encoder(args)
    if args.method != "mae":
        return amt.SimMIM(encoder, "hog" if args.method == "maskfeat" else "pixels").to(DEVICE)
    return amt.MAE(encoder, args.decoder_embed_dim, args.decoder_depth,
                   args.decoder_embed_dim // 32, norm_pix_loss=True).to(DEVICE)


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
            model, device_ids=[DEVICE] if DEVICE.type == "cuda" else None)
    return torch.compile(model) if args.compile else model


def set_lr(optimizer, peak: float, epoch: float, epochs: int, warmup: int = 0):
    """Linear warm-up, then half a cosine to 0; `epoch` is the number of epochs done, a fraction."""
    lr = peak * (epoch / warmup if epoch < warmup else
                 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def my_rows(batch: Tensor) -> slice:
    """The rows of the batch of all processes that are this process's."""
    n = len(batch) // WORLD_SIZE
    return slice(RANK * n, (RANK + 1) * n)


def my_batches(args, n: int):
    """Slices of n images that go over those of this process, once each and in order."""
    for i in range(RANK * args.batch_size, n, WORLD_SIZE * args.batch_size):
        yield slice(i, i + args.batch_size)


def crop_images(args, data: Data, ids: Tensor, theta: Tensor) -> Tensor:
    """The areas theta (B, 2, 3) of the training images ids (B,): pixels (B, 3, H, H), 0 to 255."""
    crops = amt.crop(data.train[ids].float(), theta, args.img_size, "bicubic")
    return crops.clamp(0, 255)                                   # bicubic overshoots


def policy(args, updated: bool) -> tuple[Callable, tuple[float, float]]:
    """The strategy and its ratios: what goes by attention is random until there are maps of it."""
    if args.masking in BY_ATTENTION and not updated:
        return amt.STRATEGIES["random"], METHODS[args.method].random
    return amt.STRATEGIES[args.masking], (args.mask_ratio, args.throw_ratio)


def make_batch(args, data: Data, maps: Tensor | None, ids: Tensor, g: torch.Generator):
    """This process's share of the batch `ids`: cropped images (B, 3, H, H) and a ranking (B, N) of
    their units. `maps` (n, h, w) are the weights of all training images; None: no update yet."""
    mine = my_rows(ids)
    own = ids[mine]
    theta = amt.random_crops(len(ids), METHODS[args.method].scale, generator=g)
    images = crop_images(args, data, own, theta[mine])
    weights = torch.ones(len(ids), args.num_units, device=DEVICE)
    if maps is not None:
        unit = args.mask_unit * args.patch_size                  # in pixels
        weights[mine] = amt.crop_weights(maps[own], theta[mine], args.img_size, unit)
    strategy, _ = policy(args, maps is not None)
    return data.normalise(images), strategy(weights, g)[mine]


def train_step(args, model: nn.Module, optimizer, images: Tensor, ranking: Tensor,
               ratios: tuple[float, float]) -> Tensor:
    masked, _, visible = split(args, ranking, ratios)
    with precision(args):
        loss, _ = model(images, visible, masked)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def split(args, ranking: Tensor, ratios: tuple[float, float]) -> list[Tensor]:
    """The patches masked, thrown and visible, by a ranking of units."""
    return [amt.expand_units(units, args.img_size // args.patch_size, args.mask_unit)
            for units in amt.mask_and_throw(ranking, *ratios, args.throw)]


def update_maps(args, encoder: amt.ViT, data: Data) -> Tensor:
    """The masking weights (n, h, w) of all training images, whole, each process doing its share."""
    h = encoder.grid_size
    maps = torch.zeros(len(data.train), h, h, device=DEVICE)
    for batch in my_batches(args, len(maps)):
        with precision(args):
            maps[batch] = amt.masking_weights(encoder, data.normalise(data.train[batch].float()))
        progress(f"new attention maps: image {batch.start} of {len(maps)}")
    return all_sum(maps)                                         # 0 here: another process's


def pretrain(args, data: Data) -> amt.ViT:
    """Trains and saves until --epochs are done; returns the encoder."""
    model = build_model(args)
    optimizer = build_optimizer(model)
    peak_lr, batch = args.blr * args.global_batch / 256, args.global_batch
    steps = len(data.train) // batch
    run = {"epoch": 0, "seconds": 0.0, "update_seconds": 0.0, "maps": None, "snapshots": []}
    if args.resume:
        run = load_checkpoint(args, model, optimizer) or run
    if all_sum(torch.tensor(run["epoch"], device=DEVICE)) != WORLD_SIZE * run["epoch"]:
        fail(f"the processes found different checkpoints: --out-dir {args.out_dir} must be one "
             f"directory for all nodes")
    start_log(args, run["epoch"])
    started = time.time() - run["seconds"]

    parallel = wrap(args, model)
    model.train()
    for epoch in range(run["epoch"], args.epochs):
        epoch_started = time.time()
        update_seconds = 0.0
        if args.masking in BY_ATTENTION and epoch and epoch % args.update_interval == 0:
            run["maps"] = update_maps(args, model.encoder, data)
            shown = data.normalise(data.shown.float())
            run["snapshots"].append(amt.masking_weights(model.encoder, shown))
            save_attention(args, data, run["snapshots"])
            update_seconds = time.time() - epoch_started
        _, ratios = policy(args, run["maps"] is not None)
        g = generator(args.seed, "pretrain", epoch)
        order = torch.randperm(len(data.train), generator=g, device=DEVICE)
        losses = torch.zeros(steps, device=DEVICE)
        steps_started = time.time()
        for step in range(steps):
            set_lr(optimizer, peak_lr, epoch + step / steps, args.epochs, args.warmup_epochs)
            ids = order[step * batch:(step + 1) * batch]
            images, ranking = make_batch(args, data, run["maps"], ids, g)
            losses[step] = train_step(args, parallel, optimizer, images, ranking, ratios)
            if progress(f"epoch {epoch + 1}/{args.epochs}  step {step + 1}/{steps}"):
                if WORLD_SIZE == 1:                              # several agree at the epoch's end
                    check_finite(args, losses[:step + 1], epoch)
        losses = all_sum(losses) / WORLD_SIZE
        check_finite(args, losses, epoch)

        now = time.time()
        run["epoch"], run["seconds"] = epoch + 1, now - started
        run["update_seconds"] += update_seconds
        loss, lr = losses.mean().item(), optimizer.param_groups[0]["lr"]
        speed = steps * batch / (now - steps_started)
        accuracy = ""
        if args.probe_every and (epoch + 1) % args.probe_every == 0:
            accuracy = f"{linear_probe(args, model.encoder, data, short=True):.2f}"
            model.train()
            started += time.time() - now                         # it is not time of pretraining
        log(args, epoch + 1, f"{loss:.5f}", f"{lr:.3e}", f"{speed:.0f}",
            f"{now - epoch_started:.2f}", f"{update_seconds:.2f}", accuracy)
        left = run["seconds"] / (epoch + 1) * (args.epochs - epoch - 1)
        say(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} images/s"
            f"  {clock(left)} left"
            + (f"  (new attention maps: {clock(update_seconds)})" if update_seconds else "")
            + (f"  short probe {accuracy} %" if accuracy else ""))
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epochs:
            save_checkpoint(args, model, optimizer, run)
    if RANK == 0:
        save_masking(args, model, data, run["maps"] is not None)
    share = run["update_seconds"] / run["seconds"]
    say(f"pretrained for {args.epochs} epochs in {clock(run['seconds'])}, of which "
        f"{clock(run['update_seconds'])} ({share:.1%}) for {len(run['snapshots'])} updates of the "
        f"attention maps")
    return model.encoder


def check_finite(args, losses: Tensor, epoch: int):
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].item()
        fail(f"the loss is {losses[step].item()} in epoch {epoch + 1}, step {step + 1}: start "
             f"again in another --out-dir with a lower --blr (now {args.blr:g}) or in fp32. The "
             f"last checkpoint in {args.out_dir} is unharmed")


# ------------------------------------------------------------------------------------------------
# Linear probe and fine-tuning


def train_classifier(args, data: Data, stage: str, epochs: int, warmup: int, model: nn.Module,
                     optimizer, lr: float, batch_loss: Callable, logits: Callable) -> float:
    """Test accuracy in percent, after the last epoch, of the `logits(images)` of a model trained by
    `batch_loss(ids, g)`: the loss on this process's rows of the batch `ids`, with g for draws."""
    n, batch, started = len(data.train_labels), args.global_batch, time.time()
    steps = n // batch
    for epoch in range(epochs):
        model.train()
        g = generator(args.seed, stage, epoch)
        # Mixing and drop path draw from torch's own generators, here seeded for each process.
        torch.manual_seed(generator(args.seed, stage, epoch, RANK).initial_seed())
        order = torch.randperm(n, generator=g, device=DEVICE)
        losses = torch.zeros(steps, device=DEVICE)
        for step in range(steps):
            set_lr(optimizer, lr, epoch + step / steps, epochs, warmup)
            loss = batch_loss(order[step * batch:(step + 1) * batch], g)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            progress(f"{stage} epoch {epoch + 1}/{epochs}  step {step + 1}/{steps}")
        left = (time.time() - started) / (epoch + 1) * (epochs - epoch - 1)
        say(f"{stage} epoch {epoch + 1}/{epochs}  loss {losses.mean().item():.4f}"
            f"  {clock(left)} left")

    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        for own in my_batches(args, len(data.test)):
            predicted = logits(data.normalise(data.test[own].float())).argmax(dim=1)
            right += (predicted == data.test_labels[own]).sum()
    return 100 * all_sum(right).item() / len(data.test)


def random_crops_of(args, data: Data, ids: Tensor, g: torch.Generator) -> Tensor:
    """Crops (B, 3, H, H), 0 to 255, of this process's rows of the batch `ids`."""
    mine, theta = my_rows(ids), amt.random_crops(len(ids), generator=g)
    return crop_images(args, data, ids[mine], theta[mine])


def linear_probe(args, encoder: amt.ViT, data: Data, short: bool = False) -> float:
    """Accuracy of a linear layer on the frozen [CLS]; `short`: after a tenth of the epochs."""
    encoder.eval()
    torch.manual_seed(args.seed)
    head = nn.Sequential(nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6),
                         nn.Linear(encoder.embed_dim, data.classes)).to(DEVICE)
    nn.init.trunc_normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    lr = args.probe_blr * args.global_batch / 256
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)

    @torch.no_grad()
    def cls_features(images: Tensor) -> Tensor:
        with precision(args):
            return encoder(images)[:, 0].float()                             # (B, D)

    def batch_loss(ids: Tensor, g: torch.Generator) -> Tensor:
        # The processes divide the encoder's work and share its features; then each trains the
        # same head on all of them. BatchNorm sees the whole batch, no gradient is exchanged.
        features = torch.zeros(len(ids), encoder.embed_dim, device=DEVICE)
        features[my_rows(ids)] = cls_features(data.normalise(random_crops_of(args, data, ids, g)))
        return F.cross_entropy(head(all_sum(features)), data.train_labels[ids])

    epochs = max(1, args.probe_epochs // 10) if short else args.probe_epochs
    return train_classifier(args, data, "probe", epochs, 0, head, optimizer, lr, batch_loss,
                            lambda images: head(cls_features(images)))


class Classifier(nn.Module):
    """Logits (B, classes) of images: a linear layer on the encoder's [CLS]."""

    def __init__(self, encoder: amt.ViT, classes: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images)[:, 0])


def finetune(args, pretrained: amt.ViT, data: Data) -> float:
    """Accuracy of the whole encoder with a linear layer on [CLS], by the recipe of He et al., 2022;
    from scratch without their layer-wise decay of the learning rate."""
    encoder = build_encoder(args, drop_path=0.1)
    encoder.load_state_dict(pretrained.state_dict())
    model = Classifier(encoder, data.classes).to(DEVICE)
    depth, decay = len(encoder.blocks), 1.0 if args.checkpoint == "none" else 0.75

    def lr_scale(name: str) -> float:
        part, *rest = name.removeprefix("encoder.").split(".")
        layer = {"cls_token": 0, "patch_embed": 0, "norm": depth + 1, "head": depth + 1}
        return decay ** (depth + 1 - (int(rest[0]) + 1 if part == "blocks" else layer[part]))

    optimizer = build_optimizer(model, 0.999, lr_scale)
    parallel = wrap(args, model)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=data.classes),
                           v2.CutMix(alpha=1.0, num_classes=data.classes)])
    rand_augment = v2.RandAugment()

    def logits(images: Tensor, model: nn.Module = model) -> Tensor:
        with precision(args):
            return model(images).float()

    def batch_loss(ids: Tensor, g: torch.Generator) -> Tensor:
        images = random_crops_of(args, data, ids, g)
        if args.randaugment:
            images = torch.stack([rand_augment(image) for image in images.byte()]).float()
        images, labels = mix(data.normalise(images), data.train_labels[ids[my_rows(ids)]])
        return F.cross_entropy(logits(images, parallel), labels, label_smoothing=0.1)

    lr, epochs = args.finetune_blr * args.global_batch / 256, args.finetune_epochs
    accuracy = train_classifier(args, data, "fine-tuning", epochs, epochs // 20, model, optimizer,
                                lr, batch_loss, logits)
    if RANK == 0:
        state = {name.removeprefix("encoder."): p for name, p in model.state_dict().items()}
        write_file(args.out_dir / "finetuned.pth", lambda file: torch.save(state, file))
    return accuracy


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
        pos = saved["pos_embed"]                                             # (1, 1+n, D)
        side = math.isqrt(pos.shape[1] - 1)
        if side != encoder.grid_size:
            grid = pos[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid.float(), size=encoder.grid_size, mode="bicubic",
                                 antialias=True)
            saved["pos_embed"] = torch.cat([pos[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    except Exception as error:                                   # torch.load raises many kinds
        fail(f"--checkpoint {path} cannot be read or holds no state dict of a ViT "
             f"({reason(error)}): give an encoder.pth or checkpoint.pth of this script, a state "
             f"dict of timm, or a file of He et al.")
    theirs, ours = ({name: tuple(p.shape) for name, p in state.items()}
                    for state in (saved, encoder.state_dict()))
    misfits = [f"{name} {theirs.get(name, 'absent')}, here {ours.get(name, 'absent')}"
               for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if misfits:
        fail(f"--checkpoint {path} does not fit --model {args.model} with --patch-size "
             f"{args.patch_size} and {len(encoder.blocks)} blocks, see --depth: "
             f"{'; '.join(misfits)}")
    encoder.load_state_dict(saved)
    return encoder


# ------------------------------------------------------------------------------------------------
# Files and lines


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
        part.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error}): make room, or give another --out-dir. What was there "
             f"is unharmed")


SETTINGS = ["dataset", "num_images", "img_size", "model", "depth", "patch_size", "method",
            "decoder_embed_dim", "decoder_depth", "masking", "mask_ratio", "throw_ratio", "throw",
            "mask_unit", "update_interval", "epochs", "warmup_epochs", "global_batch", "blr",
            "seed", "precision"]                                             # a run keeps its own
LOG_COLUMNS = ["epoch", "loss", "lr", "images_per_second", "seconds", "update_seconds",
               "probe_accuracy"]


def save_checkpoint(args, model: amt.MAE, optimizer, run: dict):
    if RANK == 0:
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                      "settings": {name: getattr(args, name) for name in SETTINGS}, **run}
        encoder = model.encoder.state_dict()
        write_file(args.out_dir / "encoder.pth", lambda file: torch.save(encoder, file))
        write_file(args.out_dir / "checkpoint.pth", lambda file: torch.save(checkpoint, file))


def load_checkpoint(args, model: amt.MAE, optimizer) -> dict | None:
    """Loads model and optimizer; returns the state of the run, or None where none was saved yet."""
    path = args.out_dir / "checkpoint.pth"
    if not path.exists():
        say(f"{args.out_dir} holds no checkpoint yet: starting from the beginning")
        return None
    try:
        run = torch.load(path, map_location=DEVICE, weights_only=True)
        settings = run.pop("settings")
    except Exception as error:                                   # torch.load raises many kinds
        fail(f"{path} is damaged or not a checkpoint of this script ({reason(error)}): give "
             f"another --out-dir")
    differ = [f"{name} {settings.get(name)} (now {getattr(args, name)})"
              for name in SETTINGS if settings.get(name) != getattr(args, name)]
    if differ:
        fail(f"{path} was made with other settings: {', '.join(differ)}. Resume with those, or "
             f"give another --out-dir")
    model.load_state_dict(run.pop("model"))
    optimizer.load_state_dict(run.pop("optimizer"))
    say(f"resuming {path} after epoch {run['epoch']}")
    return run


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def start_log(args, epochs_done: int):
    """Leaves in log.csv the header and the rows of the epochs done; later ones are trained anew."""
    path = args.out_dir / "log.csv"
    if RANK == 0:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = lines[1:1 + epochs_done]
        text = ",".join(LOG_COLUMNS) + "\n" + "".join(rows)
        write_file(path, lambda file: file.write(text.encode()))


def log(args, *values):
    if RANK == 0:
        with open(args.out_dir / "log.csv", "a") as file:
            file.write(",".join(map(str, values)) + "\n")


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


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ------------------------------------------------------------------------------------------------
# Pictures


def save_grid(rows: list[Tensor], path: Path):
    """Rows of pictures (8, 3, H, W) in [0, 1]."""
    images = torch.cat([F.interpolate(row, size=128, mode="nearest") for row in rows])
    save_image(images, path, nrow=len(rows[0]), padding=4, pad_value=1.0)


def heat(maps: Tensor) -> Tensor:
    """Maps (B, h, w) in [0, 1] in colours (B, 3, h, w): black, red, yellow, white."""
    return torch.stack([3 * maps, 3 * maps - 1, 3 * maps - 2], dim=1).clamp(0, 1)


def save_attention(args, data: Data, snapshots: list[Tensor]):
    """attention.png: eight test images; below, a row an update, what [CLS] attended to (Fig. 2)."""
    if RANK == 0:
        save_grid([data.shown / 255, *map(heat, snapshots)], args.out_dir / "attention.png")


@torch.no_grad()
def save_masking(args, model: amt.MAE, data: Data, updated: bool):
    """masking.png: eight test images, their attention, what is masked (grey) and thrown (black),
    and, where pixels are predicted, the reconstruction; MAE's predictions, which are normalised
    patch by patch, get each patch's mean and contrast back."""
    p = args.patch_size
    images = data.normalise(data.shown.float())
    maps = amt.masking_weights(model.encoder, images)
    weights = amt.patchify(maps[:, None], args.mask_unit).sum(dim=2)         # (8, N)
    strategy, _ = policy(args, updated)
    ranking = strategy(weights, generator(args.seed, "picture"))
    masked, thrown, visible = split(args, ranking, (args.mask_ratio, args.throw_ratio))
    _, pred = model(images, visible, masked)

    if args.method == "mae":
        target = amt.select(amt.patchify(images, p), masked)
        pred = pred * target.std(dim=2, keepdim=True) + target.mean(dim=2, keepdim=True)
    std, mean = (x.flatten().repeat(p * p) / 255 for x in (data.std, data.mean))     # (p*p*3)

    def paint(patches, ids, colours):
        return patches.scatter(1, ids[:, :, None].expand(-1, -1, patches.shape[2]), colours)

    patches = paint(amt.patchify(data.shown / 255, p), thrown, 0.0)
    hidden = paint(patches, masked, 0.5)
    rows = [data.shown / 255, heat(maps), amt.unpatchify(hidden, p)]
    if args.method != "maskfeat":
        predicted = paint(patches, masked, (pred * std + mean).clamp(0, 1))
        rows.append(amt.unpatchify(predicted, p))
    save_grid(rows, args.out_dir / "masking.png")


# ------------------------------------------------------------------------------------------------
# Benchmark


def benchmark(args):
    """Prints the time of a step by random masking and AMT, taken in turn, and of an update."""
    g = generator(args.seed, "benchmark")
    size = (args.batch_size, 3, args.img_size, args.img_size)
    images = torch.randint(256, size, generator=g, device=DEVICE).byte()
    mean, std = torch.full((2, 3, 1, 1), 127.5, device=DEVICE)
    data = Data(images, None, None, None, mean, std)
    model = build_model(args).train()
    optimizer = build_optimizer(model)
    set_lr(optimizer, 1e-4, 0, 1)
    compiled = torch.compile(model) if args.compile else model
    maps = update_maps(args, model.encoder, data)
    ids = torch.arange(args.batch_size, device=DEVICE)

    def step(maps: Tensor | None, ratios: tuple[float, float]):
        train_step(args, compiled, optimizer, *make_batch(args, data, maps, ids, g), ratios)

    method = METHODS[args.method]
    jobs = {f"random {method.random[0]:.2f}": lambda: step(None, method.random),
            f"AM {method.random[0]:.2f}": lambda: step(maps, method.random)}
    for ratios in method.amt:
        jobs["AMT {:.2f}/{:.2f}".format(*ratios)] = partial(step, maps, ratios)
    jobs["update"] = lambda: update_maps(args, model.encoder, data)
    times = {name: [] for name in jobs}
    warmup, rounds = 3, 10
    for i in range(warmup + rounds):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    cuda = DEVICE.type == "cuda"
    decoder = (f"decoder {args.decoder_embed_dim} wide, {args.decoder_depth} blocks"
               if args.method == "mae" else f"units of {args.mask_unit}x{args.mask_unit} patches")
    chip = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    say(f"{args.method}, {args.model}, {len(model.encoder.blocks)} blocks; {decoder}; images "
        f"{args.img_size}, patches {args.patch_size}, batch {args.batch_size}, {args.precision}; "
        f"{chip}, torch {torch.__version__}; {rounds} rounds")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, median in medians.items():
        say(f"{name:14} {1000 * median:8.1f} ms  {args.batch_size / median:8,.0f} images/s  "
            f"{median / next(iter(medians.values())):.2f} of random")


# ------------------------------------------------------------------------------------------------
# Command line

VITS = {name: getattr(amt, name)
        for name in ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]}
DEFAULTS = {  # where a data set's are not those of parse_args
    "cifar10": {},
    "cifar100": {},
    "stl10": {"img_size": 96, "patch_size": 8},
    "tiny-imagenet": {"img_size": 64, "patch_size": 8},
    "folder": {"img_size": 224, "patch_size": 16},
    "shapes": {"depth": 3, "decoder_embed_dim": 96, "decoder_depth": 1, "epochs": 24,
               "update_interval": 4, "batch_size": 64, "blr": 4e-3, "probe_epochs": 8,
               "probe_blr": 0.5},
}


def at_least(low: int):
    def whole_number(text: str) -> int:
        if not (text.lstrip("-").isdigit() and int(text) >= low):
            raise argparse.ArgumentTypeError(
                f"{text} is not allowed: give a whole number of at least {low}")
        return int(text)
    return whole_number


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fail(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", choices=DEFAULTS, default="cifar10",
        help="cifar10 (the default), cifar100, stl10 (pretrains on the unlabelled images, too), "
             "tiny-imagenet, folder (train/<class>/... and val/<class>/...), or made: shapes, with "
             "smaller defaults of its own")
    add("--data-path", default="data", metavar="DIR",
        help="of the images; CIFAR and STL-10 are downloaded to it (data)")
    add("--num-images", type=at_least(1), default=2500, metavar="N",
        help="training images of --dataset shapes (2500)")
    add("--img-size", type=at_least(1), default=32, metavar="PIXELS",
        help="(32; stl10: 96, tiny-imagenet: 64, folder: 224)")
    add("--out-dir", type=Path, default=Path("out"), metavar="DIR", help="of the run's files (out)")
    add("--resume", action="store_true", help="go on with the run in --out-dir")
    add("--save-every", type=at_least(1), default=10, metavar="EPOCHS", help="(10)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="(0)")
    # the model
    add("--model", choices=VITS, default="vit_tiny", help="the encoder (vit_tiny)")
    add("--depth", type=at_least(1), metavar="BLOCKS", help="of the encoder (the model's own)")
    add("--patch-size", type=at_least(1), default=4, metavar="PIXELS",
        help="(4; stl10, tiny-imagenet: 8, folder: 16)")
    add("--decoder-embed-dim", type=at_least(32), default=192, metavar="D",
        help="a multiple of 32: each head has 32 (192)")
    add("--decoder-depth", type=at_least(1), default=4, metavar="BLOCKS", help="(4)")
    # the method
    add("--method", choices=METHODS, default="mae",
        help="mae (the default), simmim, or maskfeat, which is simmim with HOG targets")
    add("--masking", choices=amt.STRATEGIES, default="attention",
        help="what patches are ranked by: attention, drawn (the default); random; attmask: the "
             "highest attention first; mst: the lowest; block; grid")
    add("--mask-ratio", type=float, metavar="R",
        help="share of patches that are masked (by attention 0.45 with mae, else 0.44; by all "
             "other strategies 0.75 with mae, 0.60 with simmim, 0.40 with maskfeat)")
    add("--throw-ratio", type=float, metavar="T",
        help="share of patches that are thrown (by attention 0.40 with mae, else 0.26; by all "
             "other strategies 0)")
    add("--throw", choices=["middle", "lowest"], default="middle",
        help="of the ranking is thrown (middle)")
    add("--mask-unit", type=at_least(1), metavar="PATCHES",
        help="side of the squares that are masked as one (mae: 1, simmim and maskfeat: 2)")
    add("--update-interval", type=at_least(1), metavar="EPOCHS",
        help="from one update of the attention maps to the next (a tenth of --epochs)")
    # the schedules
    add("--epochs", type=at_least(0), default=400, metavar="N",
        help="of pretraining; 0 for --checkpoint (400)")
    add("--warmup-epochs", type=at_least(0), metavar="N", help="(a tenth of --epochs)")
    add("--batch-size", type=at_least(1), default=512, metavar="B", help="per process (512)")
    add("--blr", type=float, default=5e-4, metavar="LR",
        help="learning rate for a batch, of all processes, of 256; it grows with the batch (5e-4)")
    add("--checkpoint", metavar="FILE",
        help="with --epochs 0: the encoder to probe or to fine-tune, from this script, timm or "
             "MAE's authors; none: an untrained one")
    add("--probe-epochs", type=at_least(0), default=90, metavar="N",
        help="0: no linear probe (90; with --checkpoint none: 0)")
    add("--probe-blr", type=float, default=0.1, metavar="LR", help="as --blr, of the probe (0.1)")
    add("--probe-every", type=at_least(1), metavar="EPOCHS",
        help="of pretraining: probe for a tenth of --probe-epochs; the accuracy goes to log.csv")
    add("--finetune-epochs", type=at_least(0), default=0, metavar="N", help="0: none (0)")
    add("--finetune-blr", type=float, default=1e-3, metavar="LR",
        help="as --blr, of fine-tuning; each layer has 0.75 of the next one's (1e-3)")
    add("--randaugment", action="store_true",
        help="fine-tune with RandAugment after crop and flip (not without)")
    # the machine
    add("--precision", choices=["bf16", "fp32"],
        help="bf16 autocast (the default on GPUs that have it) or fp32")
    add("--compile", action="store_true", help="use torch.compile")
    add("--benchmark", action="store_true", help="only time training steps, on random images")

    first = parser.parse_known_args(argv)[0]
    parser.set_defaults(**DEFAULTS[first.dataset])
    if first.checkpoint == "none":
        parser.set_defaults(probe_epochs=0)
    args = parser.parse_args(argv)
    args.global_batch = args.batch_size * WORLD_SIZE
    method = METHODS[args.method]
    mask_ratio, throw_ratio = method.amt[0] if args.masking == "attention" else method.random
    args.mask_ratio = mask_ratio if args.mask_ratio is None else args.mask_ratio
    args.throw_ratio = throw_ratio if args.throw_ratio is None else args.throw_ratio
    args.mask_unit = args.mask_unit or method.mask_unit
    args.update_interval = args.update_interval or max(1, round(args.epochs / 10))
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs // 10
    bf16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")

    if args.img_size % args.patch_size:
        fail(f"--patch-size {args.patch_size} does not divide the image size {args.img_size}: "
             f"give one that does")
    grid = args.img_size // args.patch_size
    if grid % args.mask_unit:
        fail(f"--mask-unit {args.mask_unit} does not divide the grid of {grid}x{grid} patches: "
             f"give one that does")
    if args.method == "maskfeat" and args.patch_size % 2:
        fail(f"--patch-size {args.patch_size} is odd, and a cell of --method maskfeat is half a "
             f"patch: give an even one")
    args.num_units = (grid // args.mask_unit) ** 2
    if args.decoder_embed_dim % 32:
        fail(f"--decoder-embed-dim {args.decoder_embed_dim} is not a multiple of 32: give one")
    for flag, value in [("--blr", args.blr), ("--probe-blr", args.probe_blr),
                        ("--finetune-blr", args.finetune_blr)]:
        if not 0 < value < math.inf:
            fail(f"{flag} {value} is not a learning rate: give a number above 0")
    if bool(args.epochs) == bool(args.checkpoint):
        fail(f"--epochs {args.epochs} with --checkpoint {args.checkpoint}: give --epochs above 0, "
             f"to pretrain, or --epochs 0 and a --checkpoint, FILE or none, to start from")
    if args.epochs and args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs} is not less than --epochs {args.epochs}: "
             f"give fewer")
    try:
        for ratios in [method.random, (args.mask_ratio, args.throw_ratio)]:
            amt.mask_and_throw(torch.empty(1, args.num_units), *ratios)
    except ValueError as error:
        fail(f"{error} (see --mask-ratio, --throw-ratio, --patch-size)")
    if DEVICE.type == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"more processes on a machine than its {torch.cuda.device_count()} GPUs: "
             f"give torchrun a smaller --nproc_per_node")
    if args.benchmark and WORLD_SIZE > 1:
        fail("--benchmark times a single process: start it without torchrun")
    if (args.out_dir / "checkpoint.pth").exists() and not (
            args.resume or args.benchmark or args.checkpoint):
        fail(f"{args.out_dir} holds the checkpoint of a run: go on with it by --resume, or give "
             f"another --out-dir")
    if (args.out_dir / "finetuned.pth").exists() and args.finetune_epochs and not args.resume:
        fail(f"{args.out_dir} holds a finetuned.pth, which --finetune-epochs would write over: "
             f"give another --out-dir")
    return args


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    torch.set_float32_matmul_precision("high")
    if WORLD_SIZE > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    if args.benchmark:
        return benchmark(args)

    started = time.time()
    data = load_data(args)
    if args.global_batch > len(data.train_labels):
        fail(f"a batch of {args.global_batch} is more than the {len(data.train_labels)} training "
             f"images with labels: give a smaller --batch-size")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make --out-dir {args.out_dir} ({error}): give one that can be made")
    say(f"{args.dataset}: {len(data.train)} training and {len(data.test)} test images; "
        f"{args.model} on {DEVICE}, {args.precision}, batch {args.global_batch} over {WORLD_SIZE} "
        f"process{'es' * (WORLD_SIZE > 1)}")
    encoder = load_encoder(args, args.checkpoint) if args.checkpoint else pretrain(args, data)
    for stage, function, epochs in [("linear probe", linear_probe, args.probe_epochs),
                                    ("fine-tuning", finetune, args.finetune_epochs)]:
        if epochs:
            say(f"{stage}: {function(args, encoder, data):.2f} % of {len(data.test)} test images "
                f"right after epoch {epochs}, the last")
    files = ["checkpoint.pth", "encoder.pth", "log.csv", "masking.png", "attention.png",
             "finetuned.pth"]
    files = [name for name in files if (args.out_dir / name).exists()]
    say(f"done in {clock(time.time() - started)}; in {args.out_dir}: {', '.join(files)}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
