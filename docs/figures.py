"""Draws the pictures of the README. Needs matplotlib.

    python docs/figures.py method out-shapes     # docs/method.png, from the checkpoint of a run
    python docs/figures.py paired                # docs/paired.png and its table, from docs/logs
    python docs/figures.py curve                 # docs/curve.png, from docs/logs
    python docs/figures.py attention out-0 out-1 DATA_PATH     # docs/attention.png, of two seeds
    python docs/figures.py objects out-shapes ...     # attention on the objects of shapes
"""
import csv
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import amt
import train_cifar

MASKED, THROWN, VISIBLE = "#d1495b", "#8a8f98", "#2e7d5b"
NAMES = {"own": "AMT", "uniform": "throwing\nat random", "random": "random\nmasking",
         "shuffled": "another\nimage's map", "debiased": "debiased\nmap"}
plt.rcParams.update({"font.size": 10, "figure.facecolor": "white", "savefig.dpi": 130})


def load_run(out_dir: str) -> tuple[dict, amt.ViT]:
    """The settings and the encoder of a run of train_cifar.py."""
    settings = torch.load(Path(out_dir) / "checkpoint.pth", weights_only=True)["settings"]
    args = train_cifar.parse_args([
        "--dataset", settings["dataset"], "--depth", str(settings["depth"]),
        "--epochs", "0", "--checkpoint", str(Path(out_dir) / "encoder.pth")])
    return settings, train_cifar.load_encoder(args)


def test_maps(encoder: amt.ViT, data: train_cifar.Images, n: int) -> torch.Tensor:
    """The attention maps (n, h, w) of the first n test images."""
    batches = ((ids, data.normalise(images))
               for ids, images in data.whole("test", torch.arange(n)))
    return amt.dataset_maps(encoder, batches, n).float()


def method(out_dir: str):
    """The path of one image through AMT: attention, ranking, split, encoder, decoder, loss."""
    settings, encoder = load_run(out_dir)
    images = train_cifar.shapes(60, seed=3)[0].float()
    image = images[52:53]
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    std = images.std(dim=(0, 2, 3), keepdim=True)
    maps = amt.attention_maps(encoder, (image - mean) / std)
    p = settings["patch_size"]
    torch.manual_seed(1)
    ranking = amt.sample_patches(maps.flatten(1))
    masked, thrown, visible = amt.mask_and_throw(ranking, 0.45, 0.40)
    patches = amt.patchify(image, p)[0].view(-1, p, p, 3) / 255

    figure, axes = plt.subplots(figsize=(11, 4.6))
    axes.set(xlim=(0, 11), ylim=(0, 4.6))
    axes.axis("off")

    def text(x, y, words, **kwargs):
        axes.text(x, y, words, ha="center", va="center", **kwargs)

    def arrow(x0, y0, x1, y1, words=""):
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=dict(arrowstyle="->", color="black"))
        text((x0 + x1) / 2, (y0 + y1) / 2 + 0.16, words, family="monospace", size=8)

    def show(picture, x, y, size, **kwargs):
        axes.imshow(picture, extent=(x, x + size, y, y + size), aspect="auto", zorder=2, **kwargs)

    def tile(i, x, y, size, colour, empty=False):
        if not empty:
            show(patches[i], x, y, size)
        axes.add_patch(Rectangle((x, y), size, size, fill=empty, facecolor="#e8e8e8",
                                 edgecolor=colour, linewidth=1.5, zorder=3))

    show(image[0].permute(1, 2, 0) / 255, 0.1, 2.7, 1.5)
    text(0.85, 4.4, "whole image")
    arrow(1.65, 3.45, 3.35, 3.45, "attention_maps")
    show(maps[0], 3.4, 2.7, 1.5, cmap="magma")
    text(4.15, 4.4, "attention of [CLS]")
    arrow(4.95, 3.45, 6.6, 3.45, "crop_weights")
    text(5.78, 3.29, "sample_patches", family="monospace", size=8)
    text(8.7, 4.4, "ranking of the 64 patches, mask_and_throw", size=10)
    for place, i in enumerate(ranking[0].tolist()):
        colour = MASKED if place < masked.shape[1] else (
            THROWN if place < masked.shape[1] + thrown.shape[1] else VISIBLE)
        tile(i, 6.7 + 0.25 * (place % 16), 3.75 - 0.4 * (place // 16), 0.21, colour)
    text(7.35, 2.2, f"masked, {masked.shape[1]}", color=MASKED, weight="bold")
    text(8.8, 2.2, f"thrown, {thrown.shape[1]}", color=THROWN, weight="bold")
    text(10.2, 2.2, f"visible, {visible.shape[1]}", color=VISIBLE, weight="bold")

    for place, i in enumerate(visible[0].tolist()):
        tile(i, 0.2 + 0.25 * (place % 5), 1.35 - 0.3 * (place // 5), 0.21, VISIBLE)
    text(0.8, 0.35, "visible")
    arrow(1.6, 1.2, 2.5, 1.2)
    for x, words in [(2.55, "encoder"), (5.9, "decoder")]:
        axes.add_patch(Rectangle((x, 0.75), 1.4, 0.9, facecolor="#f3efe4", edgecolor="black"))
        text(x + 0.7, 1.2, words, weight="bold")
    arrow(4.0, 1.2, 5.85, 1.2, "")
    for place in range(6):
        tile(0, 4.2 + 0.25 * place, 0.55, 0.21, MASKED, empty=True)
    text(5.8, 0.6, "...")
    text(4.95, 0.3, f"{masked.shape[1]} mask tokens with the\npositions of the masked", size=8)
    arrow(7.35, 1.2, 8.3, 1.2)
    for place, i in enumerate(masked[0, :15].tolist()):
        tile(i, 8.4 + 0.25 * (place % 5), 1.35 - 0.3 * (place // 5), 0.21, MASKED)
    text(9.75, 0.8, "...")
    text(9.0, 0.35, f"predict the {masked.shape[1]} masked: loss", size=9)
    text(10.3, 1.2, "thrown:\nneither seen\nnor predicted", size=9, color=THROWN)
    figure.savefig(DOCS / "method.png", bbox_inches="tight")


def read_log(name: str) -> list[dict]:
    with open(DOCS / "logs" / name, newline="") as file:
        return list(csv.DictReader(file))


def paired():
    """A dot for each seed: the difference of the linear probe between two runs of that seed. Prints
    the differences with their standard errors and the p of a paired t-test, as Markdown."""
    rows = read_log("cifar10-16-epochs.csv")

    def probe(run):
        return {row["seed"]: float(row["probe_accuracy"]) for row in rows if row["run"] == run}

    pairs = [("own", "uniform"), ("own", "shuffled"), ("own", "debiased"), ("own", "random"),
             ("debiased", "uniform"), ("uniform", "random")]
    figure, axes = plt.subplots(figsize=(9, 3.4))
    for place, (run, control) in enumerate(pairs):
        a, b = probe(run), probe(control)
        seeds = sorted(a.keys() & b.keys())
        differences = torch.tensor([a[x] - b[x] for x in seeds], dtype=torch.float64)
        n = len(seeds)
        mean, error = differences.mean().item(), differences.std().item() / n ** 0.5
        p = p_value(mean / error, n - 1)
        print(f"| {run} - {control} | {n} | {mean:+.2f} | {error:.2f} | {p:.3f} |")
        axes.errorbar(place + 0.22, mean, error, fmt="_", color="black", capsize=4, markersize=14)
        label = f"{mean:+.2f}\n\u00b1 {error:.2f}"
        axes.text(place + 0.28, mean + 0.05, label, va="bottom", size=8)
        for seed, difference in zip(seeds, differences.tolist()):
            x = place - 0.15 + 0.07 * int(seed)
            axes.plot(x, difference, "o", color=MASKED, alpha=0.8)
            axes.annotate(seed, (x, difference), (0, 5), textcoords="offset points",
                          ha="center", size=7)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xlim=(-0.4, len(pairs) - 0.3), ylim=(-2.7, 2), ylabel="points of linear probe")
    axes.set_xticks(range(len(pairs)), [f"{NAMES[a]}\nminus\n{NAMES[b]}" for a, b in pairs], size=8)
    figure.savefig(DOCS / "paired.png", bbox_inches="tight")


def p_value(t: float, df: int) -> float:
    """The two-sided p of Student's t with df degrees of freedom, by numerical integration."""
    x = torch.linspace(0, abs(t), 100_001, dtype=torch.float64)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    density = scale * (1 + x ** 2 / df) ** (-(df + 1) / 2)
    return 1 - 2 * torch.trapezoid(density, x).item()


def curve():
    """The linear probe and the share of position over 60 epochs: a line for each run."""
    rows = read_log("cifar10-60-epochs.csv")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = [("probe_accuracy", 1, "linear probe, %"),
              ("position_share", 100, "share of variance that\nposition explains, %")]
    runs = [("own", MASKED), ("uniform", VISIBLE), ("random", THROWN), ("debiased", "#2b6cb0")]
    for ax, (column, scale, name) in zip(axes, panels):
        for run, colour in runs:
            for seed, style in [("0", "-"), ("1", "--")]:
                points = [(int(row["epoch"]), scale * float(row[column])) for row in rows
                          if (row["run"], row["seed"]) == (run, seed) and row[column]]
                if points:
                    ax.plot(*zip(*points), style, marker="o", markersize=4, color=colour,
                            label=NAMES[run].replace("\n", " ") if seed == "0" else None)
        ax.set(xlabel="epoch (solid: seed 0, dashed: seed 1)", ylabel=name)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "curve.png", bbox_inches="tight")


def attention(out_dir_a: str, out_dir_b: str, data_path: str = "data"):
    """What [CLS] attends to in eight test images of CIFAR-10, in runs that differ in the seed."""
    data = train_cifar.load_data(train_cifar.parse_args(["--data-path", data_path]))
    figure, axes = plt.subplots(3, 8, figsize=(9, 3.9))
    for column in range(8):
        axes[0, column].imshow(data.test[column].permute(1, 2, 0))
    for row, out_dir in zip(axes[1:], [out_dir_a, out_dir_b]):
        settings, encoder = load_run(out_dir)
        maps = test_maps(encoder, data, 2000)
        share = 100 * train_cifar.position_share(maps)
        for column in range(8):
            row[column].imshow(maps[column], cmap="magma", vmin=0, vmax=1)
        row[0].set_ylabel(f"seed {settings['seed']}\nposition\n{share:.0f} %")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    figure.savefig(DOCS / "attention.png", bbox_inches="tight")


def objects(*out_dirs: str):
    """Prints how much attention [CLS] pays to the objects in the test images of shapes."""
    args = train_cifar.parse_args(["--dataset", "shapes"])
    data = train_cifar.load_data(args)
    colours = (data.test.long() * torch.tensor([65536, 256, 1])[:, None, None]).sum(dim=1)
    inside = []
    for image in colours:                                # the two most common are the object's
        values, counts = image.unique(return_counts=True)
        inside.append(torch.isin(image, values[counts.topk(2).indices]))
    area = amt.patchify(torch.stack(inside)[:, None].float(), args.patch_size).mean(dim=2)
    print(f"objects: {100 * area.mean():.1f} % of the area")
    for out_dir in out_dirs:
        maps = test_maps(load_run(out_dir)[1], data, len(data.test))
        weights = maps.flatten(1)
        on_objects = (weights * area).sum(dim=1) / weights.sum(dim=1)
        position = train_cifar.position_share(maps)
        torch.manual_seed(0)
        visible = amt.mask_and_throw(amt.sample_patches(weights), 0.45, 0.40)[2]
        print(f"{out_dir}: objects have {100 * on_objects.mean():.1f} % of the attention and "
              f"{100 * area.gather(1, visible).mean():.1f} % of the visible patches; position "
              f"explains {100 * position:.0f} % of the variance")


if __name__ == "__main__":
    commands = {"method": method, "paired": paired, "curve": curve, "attention": attention,
                "objects": objects}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
