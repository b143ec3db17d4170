"""Pretrains a vision transformer by masked image modeling with AMT, then probes it linearly.

    python train_cifar.py --dataset shapes             # a look at the method, offline, on a CPU
    python train_cifar.py                              # CIFAR-10, one GPU
    torchrun --nproc_per_node=4 train_cifar.py         # four GPUs; --batch-size is per process
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \
        train_cifar.py                                 # on each of two nodes
    python train_cifar.py --resume                     # goes on with the run in --out-dir

    python train_cifar.py --masking random --out-dir out-random              # MAE, the baseline
    python train_cifar.py --mask-ratio 0.75 --throw-ratio 0 --out-dir out-am # AM: nothing is thrown
    python train_cifar.py --benchmark                  # the time of a step: random, AM, AMT

The directory --out-dir gets checkpoint.pth, encoder.pth (the encoder's state dict alone), log.csv
(a row an epoch), attention.png (what [CLS] attended to at each update) and masking.png.
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
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.utils import save_image

import amt

RANK, LOCAL_RANK, WORLD_SIZE = (  # set by torchrun
    int(os.environ.get(name, default)) for name, default in
    [("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)])
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
RANDOM_RATIOS = (0.75, 0.0)  # masked and thrown: MAE's, and AMT's until its first update


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
    train_labels: Tensor    # (n,) int64
    test: Tensor
    test_labels: Tensor
    mean: Tensor            # (3, 1, 1) of the training pixels, 0 to 255
    std: Tensor

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels.clamp(0, 255) - self.mean) / self.std     # a bicubic crop overshoots


def load_data(args) -> Data:
    if args.dataset == "shapes":
        splits = [shapes(args.num_images, seed=1), shapes(1000, seed=2)]
    else:
        splits = cifar({"cifar10": CIFAR10, "cifar100": CIFAR100}[args.dataset], args.data_path)
    (train, train_labels), (test, test_labels) = [(x.to(DEVICE), y.to(DEVICE)) for x, y in splits]
    std, mean = torch.std_mean(train.float(), dim=(0, 2, 3))
    return Data(train, train_labels, test, test_labels, mean[:, None, None], std[:, None, None])


def cifar(dataset, root: str) -> list[tuple[Tensor, Tensor]]:
    try:
        if LOCAL_RANK == 0:
            dataset(root, download=True)
        if WORLD_SIZE > 1:
            dist.barrier()
        splits = [dataset(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"cannot read or download {dataset.__name__} in --data-path {root} ({error}): connect "
             f"to the internet, or give the directory that holds {dataset.base_folder}")
    return [(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
             torch.tensor(split.targets)) for split in splits]


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


def build_model(args) -> amt.MAE:
    torch.manual_seed(args.seed)
    depth = {"depth": args.depth} if args.depth else {}
    encoder = VITS[args.model](img_size=args.img_size, patch_size=args.patch_size, **depth)
    return amt.MAE(encoder, args.decoder_embed_dim, args.decoder_depth,
                   args.decoder_embed_dim // 32, norm_pix_loss=True).to(DEVICE)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if name.endswith("weight") and p.ndim > 1]
    others = [p for name, p in named if not (name.endswith("weight") and p.ndim > 1)]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                              {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95),
                              fused=True)


def set_lr(optimizer, peak: float, epoch: float, epochs: int, warmup: int = 0):
    """Linear warm-up, then half a cosine to 0; `epoch` is the number of epochs done, a fraction."""
    lr = peak * (epoch / warmup if epoch < warmup else
                 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = lr


def my_rows(batch: Tensor) -> slice:
    """The rows of the batch of all processes that are this process's."""
    n = len(batch) // WORLD_SIZE
    return slice(RANK * n, (RANK + 1) * n)


def make_batch(args, data: Data, maps: Tensor | None, ids: Tensor, g: torch.Generator):
    """This process's share of the batch `ids`: cropped images (B, 3, H, H) and a ranking (B, N) of
    their patches. `maps` (n, h, w) are the weights of all training images; None: at random."""
    mine = my_rows(ids)
    own = ids[mine]
    theta = amt.random_crops(len(ids), generator=g)
    images = amt.crop(data.train[own].float(), theta[mine], args.img_size, "bicubic")
    weights = torch.ones(len(ids), args.num_patches, device=DEVICE)
    if maps is not None:
        weights[mine] = amt.crop_weights(maps[own], theta[mine], args.img_size, args.patch_size)
    return data.normalise(images), amt.sample_patches(weights, g)[mine]


def train_step(args, model: nn.Module, optimizer, images: Tensor, ranking: Tensor,
               ratios: tuple[float, float]) -> Tensor:
    masked, _, visible = amt.mask_and_throw(ranking, *ratios)
    with precision(args):
        loss, _ = model(images, visible, masked)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def update_maps(args, encoder: amt.ViT, data: Data) -> Tensor:
    """The masking weights (n, h, w) of all training images, whole, each process doing its share."""
    h = encoder.grid_size
    maps = torch.zeros(len(data.train), h, h, device=DEVICE)
    for i in range(RANK * args.batch_size, len(maps), WORLD_SIZE * args.batch_size):
        batch = slice(i, i + args.batch_size)
        with precision(args):
            maps[batch] = amt.masking_weights(encoder, data.normalise(data.train[batch].float()))
        progress(f"new attention maps: image {i} of {len(maps)}")
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

    parallel = model
    if WORLD_SIZE > 1:
        parallel = DistributedDataParallel(
            model, device_ids=[DEVICE] if DEVICE.type == "cuda" else None)
    if args.compile:
        parallel = torch.compile(parallel)

    model.train()
    for epoch in range(run["epoch"], args.epochs):
        epoch_started = time.time()
        update_seconds = 0.0
        if args.masking == "attention" and epoch and epoch % args.update_interval == 0:
            run["maps"] = update_maps(args, model.encoder, data)
            shown = data.normalise(data.test[:8].float())
            run["snapshots"].append(amt.masking_weights(model.encoder, shown))
            save_attention(args, data, run["snapshots"])
            update_seconds = time.time() - epoch_started
        ratios = args.mask_ratio, args.throw_ratio
        if args.masking == "attention" and run["maps"] is None:              # no update yet
            ratios = RANDOM_RATIOS

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
        log(args, epoch + 1, f"{loss:.5f}", f"{lr:.3e}", f"{speed:.0f}",
            f"{now - epoch_started:.2f}", f"{update_seconds:.2f}")
        left = run["seconds"] / (epoch + 1) * (args.epochs - epoch - 1)
        say(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} images/s"
            f"  {clock(left)} left"
            + (f"  (new attention maps: {clock(update_seconds)})" if update_seconds else ""))
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
# Linear probe


def linear_probe(args, encoder: amt.ViT, data: Data) -> float:
    """Test accuracy in percent, after the last epoch, of a linear layer on the frozen [CLS]."""
    encoder.eval()
    torch.manual_seed(args.seed)
    classes = int(data.train_labels.max()) + 1
    head = nn.Sequential(nn.BatchNorm1d(encoder.embed_dim, affine=False, eps=1e-6),
                         nn.Linear(encoder.embed_dim, classes)).to(DEVICE)
    nn.init.trunc_normal_(head[1].weight, std=0.01)
    nn.init.zeros_(head[1].bias)
    lr, batch = args.probe_blr * args.global_batch / 256, args.global_batch
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)

    @torch.no_grad()
    def cls_features(pixels: Tensor) -> Tensor:
        with precision(args):
            return encoder(data.normalise(pixels))[:, 0].float()             # (B, D)

    steps, started = len(data.train) // batch, time.time()
    for epoch in range(args.probe_epochs):
        head.train()
        g = generator(args.seed, "probe", epoch)
        order = torch.randperm(len(data.train), generator=g, device=DEVICE)
        losses = torch.zeros(steps, device=DEVICE)
        for step in range(steps):
            set_lr(optimizer, lr, epoch + step / steps, args.probe_epochs)
            ids = order[step * batch:(step + 1) * batch]
            mine, theta = my_rows(ids), amt.random_crops(batch, generator=g)
            crops = amt.crop(data.train[ids[mine]].float(), theta[mine], args.img_size, "bicubic")
            # The processes divide the encoder's work and share its features; then each trains the
            # same head on all of them. BatchNorm sees the whole batch, no gradient is exchanged.
            features = torch.zeros(batch, encoder.embed_dim, device=DEVICE)
            features[mine] = cls_features(crops)
            loss = F.cross_entropy(head(all_sum(features)), data.train_labels[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            progress(f"probe epoch {epoch + 1}/{args.probe_epochs}  step {step + 1}/{steps}")
        left = (time.time() - started) / (epoch + 1) * (args.probe_epochs - epoch - 1)
        say(f"probe epoch {epoch + 1}/{args.probe_epochs}  loss {losses.mean().item():.4f}"
            f"  {clock(left)} left")

    head.eval()
    right = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(RANK * args.batch_size, len(data.test), WORLD_SIZE * args.batch_size):
        batch = slice(i, i + args.batch_size)
        predicted = head(cls_features(data.test[batch].float())).argmax(dim=1)
        right += (predicted == data.test_labels[batch]).sum()
    return 100 * all_sum(right).item() / len(data.test)


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


SETTINGS = ["dataset", "num_images", "model", "depth", "patch_size", "decoder_embed_dim",
            "decoder_depth", "masking", "mask_ratio", "throw_ratio", "update_interval", "epochs",
            "warmup_epochs", "global_batch", "blr", "seed", "precision"]     # a run keeps its own
LOG_COLUMNS = ["epoch", "loss", "lr", "images_per_second", "seconds", "update_seconds"]


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"{path} is damaged or not a checkpoint of this script ({reason}): give another "
             f"--out-dir")
    differ = [f"{name} {settings.get(name)} (now {getattr(args, name)})"
              for name in SETTINGS if settings.get(name) != getattr(args, name)]
    if differ:
        fail(f"{path} was made with other settings: {', '.join(differ)}. Resume with those, or "
             f"give another --out-dir")
    model.load_state_dict(run.pop("model"))
    optimizer.load_state_dict(run.pop("optimizer"))
    say(f"resuming {path} after epoch {run['epoch']}")
    return run


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
    save_image(images, path, nrow=8, padding=4, pad_value=1.0)


def heat(maps: Tensor) -> Tensor:
    """Maps (B, h, w) in [0, 1] in colours (B, 3, h, w): black, red, yellow, white."""
    return torch.stack([3 * maps, 3 * maps - 1, 3 * maps - 2], dim=1).clamp(0, 1)


def save_attention(args, data: Data, snapshots: list[Tensor]):
    """attention.png: eight test images; below, a row an update, what [CLS] attended to (Fig. 2)."""
    if RANK == 0:
        save_grid([data.test[:8] / 255, *map(heat, snapshots)], args.out_dir / "attention.png")


@torch.no_grad()
def save_masking(args, model: amt.MAE, data: Data, by_attention: bool):
    """masking.png: eight test images, their attention, what is masked (grey) and thrown (black),
    and the reconstruction, in which each predicted patch gets its own mean and contrast back."""
    p = args.patch_size
    images = data.normalise(data.test[:8].float())
    maps = amt.masking_weights(model.encoder, images)
    weights = maps.flatten(1) if by_attention else torch.ones_like(maps.flatten(1))
    ranking = amt.sample_patches(weights, generator(args.seed, "picture"))
    masked, thrown, visible = amt.mask_and_throw(ranking, args.mask_ratio, args.throw_ratio)
    _, pred = model(images, visible, masked)

    target = torch.take_along_dim(amt.patchify(images, p), masked[:, :, None], dim=1)
    pred = pred * target.std(dim=2, keepdim=True) + target.mean(dim=2, keepdim=True)
    std, mean = (x.flatten().repeat(p * p) / 255 for x in (data.std, data.mean))     # (p*p*3)

    def paint(patches, ids, colours):
        return patches.scatter(1, ids[:, :, None].expand(-1, -1, patches.shape[2]), colours)

    patches = paint(amt.patchify(data.test[:8] / 255, p), thrown, 0.0)
    hidden = paint(patches, masked, 0.5)
    predicted = paint(patches, masked, (pred * std + mean).clamp(0, 1))
    save_grid([data.test[:8] / 255, heat(maps), amt.unpatchify(hidden, p),
               amt.unpatchify(predicted, p)], args.out_dir / "masking.png")


# ------------------------------------------------------------------------------------------------
# Benchmark


def benchmark(args):
    """Prints the time of a step by random masking, AM and AMT, taken in turn, and of an update."""
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

    def step(maps: Tensor | None, mask_ratio: float, throw_ratio: float):
        batch = make_batch(args, data, maps, ids, g)
        train_step(args, compiled, optimizer, *batch, (mask_ratio, throw_ratio))

    jobs = {"random 0.75": lambda: step(None, 0.75, 0.0),
            "AM 0.75": lambda: step(maps, 0.75, 0.0),
            "AMT 0.45/0.40": lambda: step(maps, 0.45, 0.40),
            "update": lambda: update_maps(args, model.encoder, data)}
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
    chip = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    say(f"{args.model}, {len(model.encoder.blocks)} blocks; decoder {args.decoder_embed_dim} wide, "
        f"{args.decoder_depth} blocks; images {args.img_size}, patches {args.patch_size}, batch "
        f"{args.batch_size}, {args.precision}; {chip}, torch {torch.__version__}; {rounds} rounds")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, median in medians.items():
        say(f"{name:14} {1000 * median:8.1f} ms  {args.batch_size / median:8,.0f} images/s  "
            f"{median / medians['random 0.75']:.2f} of random")


# ------------------------------------------------------------------------------------------------
# Command line

VITS = {name: getattr(amt, name)
        for name in ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]}
DEFAULTS = {  # where a data set's are not those of parse_args
    "shapes": {"depth": 3, "decoder_embed_dim": 96, "decoder_depth": 1, "epochs": 24,
               "update_interval": 4, "batch_size": 64, "blr": 4e-3, "probe_epochs": 8,
               "probe_blr": 0.5},
    "cifar10": {},
    "cifar100": {},
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
        help="cifar10 (the default), cifar100, or made: shapes, with smaller defaults of its own")
    add("--data-path", default="data", metavar="DIR", help="of CIFAR, downloaded if absent (data)")
    add("--num-images", type=at_least(1), default=2500, metavar="N",
        help="training images of --dataset shapes (2500)")
    add("--out-dir", type=Path, default=Path("out"), metavar="DIR", help="of the run's files (out)")
    add("--resume", action="store_true", help="go on with the run in --out-dir")
    add("--save-every", type=at_least(1), default=10, metavar="EPOCHS", help="(10)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="(0)")
    # the model
    add("--model", choices=VITS, default="vit_tiny", help="the encoder (vit_tiny)")
    add("--depth", type=at_least(1), metavar="BLOCKS", help="of the encoder (the model's own)")
    add("--patch-size", type=at_least(1), default=4, metavar="PIXELS", help="(4)")
    add("--decoder-embed-dim", type=at_least(32), default=192, metavar="D",
        help="a multiple of 32: each head has 32 (192)")
    add("--decoder-depth", type=at_least(1), default=4, metavar="BLOCKS", help="(4)")
    # the method
    add("--masking", choices=["attention", "random"], default="attention",
        help="what patches are ranked by (attention)")
    add("--mask-ratio", type=float, metavar="R",
        help="share of patches that are masked (0.45; with --masking random: 0.75)")
    add("--throw-ratio", type=float, metavar="T",
        help="share of patches that are thrown (0.40; with --masking random: 0)")
    add("--update-interval", type=at_least(1), metavar="EPOCHS",
        help="from one update of the attention maps to the next (a tenth of --epochs)")
    # the schedules
    add("--epochs", type=at_least(1), default=400, metavar="N", help="of pretraining (400)")
    add("--warmup-epochs", type=at_least(0), metavar="N", help="(a tenth of --epochs)")
    add("--batch-size", type=at_least(1), default=512, metavar="B", help="per process (512)")
    add("--blr", type=float, default=5e-4, metavar="LR",
        help="learning rate for a batch, of all processes, of 256; it grows with the batch (5e-4)")
    add("--probe-epochs", type=at_least(0), default=90, metavar="N", help="0: no probe (90)")
    add("--probe-blr", type=float, default=0.1, metavar="LR", help="as --blr, of the probe (0.1)")
    # the machine
    add("--precision", choices=["bf16", "fp32"],
        help="bf16 autocast (the default on GPUs that have it) or fp32")
    add("--compile", action="store_true", help="use torch.compile")
    add("--benchmark", action="store_true", help="only time training steps, on random images")

    parser.set_defaults(**DEFAULTS[parser.parse_known_args(argv)[0].dataset])
    args = parser.parse_args(argv)
    args.img_size = 32
    args.global_batch = args.batch_size * WORLD_SIZE
    mask_ratio, throw_ratio = RANDOM_RATIOS if args.masking == "random" else (0.45, 0.40)
    args.mask_ratio = mask_ratio if args.mask_ratio is None else args.mask_ratio
    args.throw_ratio = throw_ratio if args.throw_ratio is None else args.throw_ratio
    args.update_interval = args.update_interval or max(1, round(args.epochs / 10))
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs // 10
    bf16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")

    if args.img_size % args.patch_size:
        fail(f"--patch-size {args.patch_size} does not divide the image size {args.img_size}: "
             f"give one that does")
    args.num_patches = (args.img_size // args.patch_size) ** 2
    if args.decoder_embed_dim % 32:
        fail(f"--decoder-embed-dim {args.decoder_embed_dim} is not a multiple of 32: give one")
    for flag, value in [("--blr", args.blr), ("--probe-blr", args.probe_blr)]:
        if not 0 < value < math.inf:
            fail(f"{flag} {value} is not a learning rate: give a number above 0")
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs} is not less than --epochs {args.epochs}: "
             f"give fewer")
    try:
        for ratios in [RANDOM_RATIOS, (args.mask_ratio, args.throw_ratio)]:
            amt.mask_and_throw(torch.empty(1, args.num_patches), *ratios)
    except ValueError as error:
        fail(f"{error} (see --mask-ratio, --throw-ratio, --patch-size)")
    if DEVICE.type == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"more processes on a machine than its {torch.cuda.device_count()} GPUs: "
             f"give torchrun a smaller --nproc_per_node")
    if args.benchmark and WORLD_SIZE > 1:
        fail("--benchmark times a single process: start it without torchrun")
    if (args.out_dir / "checkpoint.pth").exists() and not (args.resume or args.benchmark):
        fail(f"{args.out_dir} holds the checkpoint of a run: go on with it by --resume, or give "
             f"another --out-dir")
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
    if args.global_batch > len(data.train):
        fail(f"a batch of {args.global_batch} is more than the {len(data.train)} training images: "
             f"give a smaller --batch-size")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make --out-dir {args.out_dir} ({error}): give one that can be made")
    say(f"{args.dataset}: {len(data.train)} training and {len(data.test)} test images; "
        f"{args.model} on {DEVICE}, {args.precision}, batch {args.global_batch} over {WORLD_SIZE} "
        f"process{'es' * (WORLD_SIZE > 1)}")
    encoder = pretrain(args, data)
    if args.probe_epochs:
        accuracy = linear_probe(args, encoder, data)
        say(f"linear probe: {accuracy:.2f} % of {len(data.test)} test images right after epoch "
            f"{args.probe_epochs}, the last")
    say(f"done in {clock(time.time() - started)}; in {args.out_dir}: checkpoint.pth, encoder.pth, "
        f"log.csv, masking.png"
        + (", attention.png" if (args.out_dir / "attention.png").exists() else ""))
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
