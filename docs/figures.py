"""Draws the pictures of the README and of results.md. Needs matplotlib: pip install matplotlib

    python docs/figures.py method out-shapes         # docs/method.png, with a run of shapes
    python docs/figures.py probes                    # docs/probes.png, from docs/logs
    python docs/figures.py differences shapes cifar10         # those of results.md
    python docs/figures.py attention out-0 out-1 DATA_PATH    # docs/attention.png, of two seeds
    python docs/figures.py objects out-shapes ...    # attention on the objects of shapes
"""
import argparse
import csv
import functools
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import amt
import controls
import train_cifar

MASKED, THROWN, VISIBLE = "#d1495b", "#8a8f98", "#2e7d5b"
LOGS = {"shapes": "shapes-24-epochs.csv", "cifar10": "cifar10-16-epochs.csv",
        "contrasts": "cifar10-16-epochs-contrasts.csv", "grid": "tiny-imagenet-16-epochs.csv"}
READOUTS = {"probe_cls": "[CLS]", "probe_mean": "mean of the patches",
            "knn_cls": "neighbors on [CLS]", "knn_mean": "neighbors on the mean of the patches"}
NAMES = {  # of the runs in docs/logs: what ranks the patches, masked / thrown
    "random": "random, 0.75 / 0 (MAE)", "random-16-epochs": "random, 0.75 / 0, 16 epochs",
    "am": "own attention, 0.75 / 0 (AM)", "am-floor": "own attention with floor, 0.75 / 0",
    "am-object": "true object with floor, 0.75 / 0", "uniform": "random, 0.45 / 0.40",
    "own": "own attention, 0.45 / 0.40 (AMT)", "floor": "own attention with floor, 0.45 / 0.40",
    "object": "true object with floor, 0.45 / 0.40",
    "teacher": "a classifier's attention, 0.45 / 0.40", "uniform-85": "random, 0.85 / 0",
    "uniform-45-30": "random, 0.45 / 0.30", "untrained": "untrained"}
PROBES = ["probe_cls", "probe_mean"]
PLANNED = ["probe_mean", "knn_mean"]
DIFFERENCES = {  # of each log: the readouts that are compared, and the pairs of runs
    "shapes": (PROBES, [
        ("own", "random"), ("uniform", "random"), ("own", "uniform"), ("am", "random"),
        ("own", "am"), ("am-floor", "am"), ("am-floor", "random"), ("floor", "own"),
        ("floor", "uniform"), ("am-object", "random"), ("object", "uniform"),
        ("object", "random"), ("uniform", "random-16-epochs"), ("own", "random-16-epochs")]),
    "cifar10": (PROBES, [
        ("own", "random"), ("uniform", "random"), ("own", "uniform"), ("uniform-85", "random"),
        ("uniform-45-30", "random"), ("uniform", "uniform-45-30"), ("uniform", "uniform-85"),
        ("floor", "own"), ("floor", "uniform"), ("teacher", "uniform")]),
    "contrasts": (PLANNED, [
        ("own", "shuffled"), ("am", "random"), ("per-head", "own"), ("top-left", "uniform"),
        ("patch-mean", "uniform"), ("raw-own", "raw-uniform")]),
    "grid": (PLANNED, [
        ("own", "uniform"), ("raw-own", "raw-uniform"), ("own", "shuffled"), ("am", "random"),
        ("mature", "uniform")]),
}
plt.rcParams.update({"font.size": 10, "figure.facecolor": "white", "savefig.dpi": 130})

def load_run(out_dir: str, **flags) -> tuple[argparse.Namespace, amt.ViT]:
    """The flags, some of them replaced, and the encoder of a run of train_cifar.py."""
    saved = train_cifar.load_file(Path(out_dir) / "checkpoint.pth")["args"]
    flags["checkpoint"] = Path(out_dir) / "encoder.pth"
    args = argparse.Namespace(**saved | flags)
    return args, train_cifar.load_encoder(args)

def maps_of(encoder: amt.ViT, images: train_cifar.Images, n: int) -> tuple[torch.Tensor, float]:
    """The attention maps (n, h, w) of the first n images, and the percentage of their variance
    that the position of a patch explains."""
    batches = images.read(torch.arange(n).split(250))
    whole = ((ids, images.whole(squares)) for ids, squares, _ in batches)
    maps = amt.dataset_maps(encoder, whole, n).float().cpu()
    return maps, 100 * (maps.mean(dim=0).var() / maps.var()).item()

def method(out_dir: str):
    """The path of one image through AMT: attention, crop, ranking, split, encoder and decoder."""
    args, encoder = load_run(out_dir)
    images = train_cifar.load_data(args)[1]
    (_, squares, _), = images.read([torch.tensor([32])])
    theta = torch.tensor([[[-0.75, 0, 0.13], [0, 0.75, -0.16]]])             # a crop and a flip
    size, p = args.img_size, args.patch_size
    maps = amt.attention_maps(encoder, images.whole(squares))
    cropped = amt.crop(squares, theta, size, "bicubic").clamp(0, 255)
    weights = amt.crop_weights(maps, theta, size, p)
    torch.manual_seed(2)
    ranking = amt.sample_patches(weights)
    masked, thrown, visible = (x[0].tolist() for x in amt.mask_and_throw(ranking, 0.45, 0.40))
    patches = (amt.patchify(cropped, p)[0].view(-1, p, p, 3) / 255).cpu()

    figure, axes = plt.subplots(figsize=(9, 6.4))
    figure.subplots_adjust(0, 0, 1, 1)                   # so that coordinates are inches
    axes.set(xlim=(0, 9), ylim=(0.2, 6.6))
    axes.axis("off")

    def text(x, y, words, ha="center", size=10.5, **kwargs):
        axes.text(x, y, words, ha=ha, va="center", size=size, **kwargs)

    def code(x, y, words, ha="center"):
        text(x, y, words, ha, size=9.5, family="monospace")

    def arrow(x0, y0, x1, y1):
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="->", color="black"))

    def show(picture, x, y, side, **kwargs):
        axes.imshow(picture.cpu(), extent=(x, x + side, y, y + side), aspect="auto", zorder=2,
                    **kwargs)

    def tiles(ids, x, y, columns, side, color, empty=False):
        """Patches in rows from the top left corner (x, y)."""
        for place, i in enumerate(ids):
            left, low = x + side * (place % columns), y - side * (place // columns + 1)
            if not empty:
                show(patches[i], left, low, 0.86 * side)
            axes.add_patch(Rectangle((left, low), 0.86 * side, 0.86 * side, fill=empty, zorder=3,
                                     facecolor="#e8e8e8", edgecolor=color, linewidth=1.5))

    def box(x, y, side):
        """The area of the crop, drawn on a picture of the whole image."""
        (w, _, cx), (_, h, cy) = theta[0].tolist()       # theta's y points down; w < 0 is a flip
        corner = x + side * (1 + cx - abs(w)) / 2, y + side * (1 - cy - h) / 2
        for color, width, style in [("black", 3.5, "-"), ("white", 1.5, "--")]:
            axes.add_patch(Rectangle(corner, side * abs(w), side * h, fill=False, zorder=4,
                                     edgecolor=color, linewidth=width, linestyle=style))

    side, left, right, top, low = 1.45, 0.1, 2.8, 4.75, 2.5
    middle = (left + side + right) / 2
    show(squares[0].permute(1, 2, 0) / 255, left, top, side)
    show(maps[0], right, top, side, cmap="magma")
    box(left, top, side)
    box(right, top, side)
    text(left + side / 2, 6.42, "whole image")
    text(right + side / 2, 6.42, "attention of [CLS]")
    arrow(left + side + 0.05, top + 0.75, right - 0.05, top + 0.75)
    code(middle, top + 0.91, "attention_maps")
    for x, words in [(left, "crop"), (right, "crop_weights")]:
        arrow(x + side / 2, top - 0.06, x + side / 2, low + side + 0.06)
        code(x + side / 2 + 0.1, top - 0.4, words, ha="left")
    text(middle, top - 0.4, "the same box,\nthen a flip", size=9.5)
    show(cropped[0].permute(1, 2, 0) / 255, left, low, side)
    show(weights.view(size // p, size // p), right, low, side, cmap="magma")
    text(left + side / 2, low - 0.17, "cropped, flipped")
    text(right + side / 2, low - 0.17, "its weights")
    arrow(right + side + 0.05, low + 0.75, 5.45, low + 0.75)
    code(4.85, low + 0.91, "sample_patches")
    code(4.85, low + 0.59, "mask_and_throw")

    text(7.22, 6.42, "the 64 patches in the order drawn")
    for y, name, ids, color in [
            (6.1, f"masked, {len(masked)}: predicted", masked, MASKED),
            (4.7, f"thrown, {len(thrown)}: neither seen nor predicted", thrown, THROWN),
            (3.3, f"visible, {len(visible)}: seen by the encoder", visible, VISIBLE)]:
        text(5.55, y, name, ha="left", color=color, weight="bold")
        tiles(ids, 5.55, y - 0.15, 10, 0.34, color)

    tiles(visible, 0.15, 1.55, 5, 0.28, VISIBLE)
    text(0.83, 0.75, "visible")
    arrow(1.6, 1.27, 2.1, 1.27)
    for x, words in [(2.15, "encoder"), (5.2, "decoder")]:
        axes.add_patch(Rectangle((x, 0.85), 1.2, 0.84, facecolor="#f3efe4", edgecolor="black"))
        text(x + 0.6, 1.27, words, weight="bold")
    arrow(3.4, 1.27, 5.15, 1.27)
    tiles(range(5), 3.5, 1.05, 5, 0.26, MASKED, empty=True)
    text(4.95, 0.88, "...")
    text(4.25, 0.45, f"{len(masked)} mask tokens with the\npositions of the masked", size=9.5)
    arrow(6.45, 1.27, 6.9, 1.27)
    tiles(masked, 6.98, 1.97, 7, 0.28, MASKED)
    text(7.95, 0.37, f"predict these {len(masked)}: loss")
    figure.savefig(DOCS / "method.png", bbox_inches="tight")

def read_log(dataset: str) -> dict[str, dict[str, dict]]:
    """The rows of a log by run and seed."""
    found = {}
    with open(DOCS / "logs" / LOGS[dataset], newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["run"], {})[row["seed"]] = row
    return found

def probes():
    """Both probes of every run: a dot for each seed and a line for the mean."""
    logs = {dataset: read_log(dataset) for dataset in ["shapes", "cifar10"]}
    figure, axes = plt.subplots(len(logs), 1, figsize=(8.5, 8),
                                height_ratios=[len(log) for log in logs.values()])
    for ax, (dataset, log) in zip(axes, logs.items()):
        for place, seeds in enumerate(log.values()):
            for (column, label), color in zip(READOUTS.items(), [MASKED, VISIBLE]):
                values = [float(row[column]) for row in seeds.values()]
                ax.plot(values, [place] * len(values), "o", color=color, alpha=0.5, markersize=5,
                        label=label if place == 0 else None)
                ax.plot([sum(values) / len(values)], [place], "|", color=color, markersize=18,
                        markeredgewidth=2.5)
        ax.set_yticks(range(len(log)), [NAMES[run] for run in log])
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.4)
        ax.set_title({"shapes": "shapes, 24 epochs", "cifar10": "CIFAR-10, 16 epochs"}[dataset])
    axes[0].legend(title="linear probe on", fontsize=9)
    axes[-1].set_xlabel("test accuracy, %: a dot for each seed, a bar for their mean")
    figure.tight_layout()
    figure.savefig(DOCS / "probes.png", bbox_inches="tight")

def differences(*datasets: str):
    """Prints the differences of results.md, paired by seed: mean, 95 % interval and p of Student's
    t, and p as corrected by Holm and by Benjamini and Hochberg for all that are planned, also
    those that were not run. Of two seeds it prints both values, which are not tested."""
    tested = []
    m = 0                                                # tests that are planned
    for dataset in datasets:
        log = read_log(dataset)
        readouts, pairs = DIFFERENCES[dataset]
        m += len(readouts) * len(pairs)
        for run, control in pairs:
            a, b = log.get(run, {}), log.get(control, {})
            for column in readouts:
                x = torch.tensor([float(a[seed][column]) - float(b[seed][column])
                                  for seed in sorted(a.keys() & b.keys())])
                name = f"{dataset}: {run} - {control}, {READOUTS[column]}, n = {len(x)}"
                if len(x) < 3:
                    print(name, " · ".join(f"{d:+.2f}" for d in x))
                else:
                    tested.append((name, *interval(x)))

    tested.sort(key=lambda row: row[-1])                 # by p
    holm = 0.0
    hochberg = [min([1, *(m * row[-1] / k for k, row in enumerate(tested[i:], i + 1))])
                for i in range(len(tested))]
    for i, (name, mean, half, p) in enumerate(tested):
        holm = max(holm, min(1, (m - i) * p))
        print(f"{name}: {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}], p {p:.4f}, "
              f"Holm {holm:.4f}, Benjamini-Hochberg {hochberg[i]:.4f}")

def interval(x: torch.Tensor) -> tuple[float, float, float]:
    """The mean of differences x (n,), half of its 95 % interval, and p."""
    t, p = student(len(x) - 1)
    error = x.std().item() / len(x) ** 0.5
    of_mean = abs(x.mean().item()) / error
    return x.mean().item(), t[p <= 0.05][0].item() * error, p[t >= min(of_mean, 199)][0].item()

@functools.cache
def student(df: int) -> tuple[torch.Tensor, torch.Tensor]:
    """t from 0 to 200, and the two-sided p of each by Student's distribution, integrated."""
    t = torch.linspace(0, 200, 2_000_001, dtype=torch.float64)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    density = scale * (1 + t ** 2 / df) ** (-(df + 1) / 2)
    inside = torch.cumulative_trapezoid(density, t)
    return t[1:], 1 - 2 * inside

def attention(out_dir_a: str, out_dir_b: str, data_path: str = "data"):
    """What [CLS] attends to in eight test images, in two runs that differ in the seed."""
    figure, axes = plt.subplots(3, 8, figsize=(9, 3.9))
    for row, out_dir in zip(axes[1:], [out_dir_a, out_dir_b]):
        args, encoder = load_run(out_dir, data_path=data_path)
        images = train_cifar.load_data(args)[1]
        maps, by_position = maps_of(encoder, images, 2000)
        for column in range(8):
            axes[0, column].imshow(images.squares[column].permute(1, 2, 0).cpu())
            row[column].imshow(maps[column], cmap="magma", vmin=0, vmax=1)
        row[0].set_ylabel(f"seed {args.seed}\nposition\n{by_position:.0f} %")

    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    figure.savefig(DOCS / "attention.png", bbox_inches="tight")

def objects(*out_dirs: str):
    """Prints how much attention [CLS] pays to the objects in 1,000 test images of shapes."""
    for out_dir in out_dirs:
        args, encoder = load_run(out_dir)
        images = train_cifar.load_data(args)[1]
        maps, by_position = maps_of(encoder, images, 1000)
        area = controls.object_fraction(args, images)[:1000].cpu()
        on_objects = (maps * area).sum(dim=(1, 2)) / maps.sum(dim=(1, 2))
        print(f"{out_dir}: objects cover {100 * area.mean():.1f} % of the area and have "
              f"{100 * on_objects.mean():.1f} % of the attention; position explains "
              f"{by_position:.0f} % of the variance")

if __name__ == "__main__":
    commands = {"method": method, "probes": probes, "differences": differences,
                "attention": attention, "objects": objects}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
