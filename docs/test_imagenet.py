"""Tests of what docs/imagenet.md and the README say of files and datasets: formats, layouts, sizes.

They share the photos and the small runs of test_amt.py: run them from the project's root.
"""
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

import train_cifar
from test_amt import column, error, make_photos, on_disk, parse, record, run

@pytest.mark.parametrize("img_size, square_size", [(224, 320), (384, 549), (64, 91)])
def test_squares_grow_with_the_crops(img_size, square_size):
    args = parse("--dataset", "folder", "--img-size", img_size, "--patch-size", 16)
    assert args.square_size == square_size

def test_a_jpeg_is_never_decoded_smaller_than_the_square(tmp_path, monkeypatch):
    Image.new("RGB", (600, 400)).save(tmp_path / "a.jpg")
    decoded = record(monkeypatch, v2.functional, "resize")
    for size, height in {48: 50, 51: 100, 300: 400}.items():
        images = train_cifar.Images(SimpleNamespace(square_size=size), [], [])
        square, aspect = images.decode(str(tmp_path / "a.jpg"))
        assert square.shape == (size, size, 3) and aspect == 1.5
        assert decoded[-1].inpt.shape[1] == height

PNG_OF_16_BITS = bytes.fromhex(                          # a pixel, as Pillow cannot write it
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000"
    "000c4944415478da63e0ff0f820009b2032b3ad493090000000049454e44ae426082")

def test_a_file_that_cannot_be_used_is_named(tmp_path):
    page = Image.effect_noise((64, 64), 50)
    page.save(tmp_path / "cut.jpg")
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    Image.new("I;16", (8, 8)).save(tmp_path / "gray16.png")
    Image.new("F", (8, 8)).save(tmp_path / "float.tif")
    for name, content in {"text.png": b"text", "color16.png": PNG_OF_16_BITS,
                          "cut.jpg": (tmp_path / "cut.jpg").read_bytes()[:-200]}.items():
        (tmp_path / name).write_bytes(content)

    images = train_cifar.Images(SimpleNamespace(square_size=48), [], [])
    for name, words in {"text.png": "", "cut.jpg": "truncated", "pages.tif": "it has 2 pages",
                        "gray16.png": "than 8 bits", "color16.png": "than 8 bits",
                        "float.tif": "than 8 bits"}.items():
        with pytest.raises(train_cifar.UserError, match=f"cannot decode .*{name}.*{words}"):
            images.decode(str(tmp_path / name))

def test_labels_may_be_in_tiny_imagenets_notes_or_missing(tmp_path):
    root = make_photos(tmp_path)
    (root / "val/b").rename(root / "val/images")
    lines = [f"{path.name}\t{kind}\t0\t0\t9\t9"
             for path, kind in zip(sorted(root.glob("val/images/*")), "baab")]
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n\n")
    _, test = train_cifar.load_data(parse(*on_disk(root), "--dataset", "tiny-imagenet"))
    assert test.labels.tolist() == [1, 0, 0, 1]

    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train/a")
    (root / "train/b").rename(root / "train/all")
    run(tmp_path / "out", *on_disk(root), "--epochs", 1)
    assert column(tmp_path / "out/log.csv", "probe_cls") == [None]

class FakeDownload:
    """A dataset of torchvision: 40 images to train on, of which 17 have labels, and 4 to test."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    pixels[:, :, :, 2] = 7                               # constant
    base_folder, classes = "fake", list("abc")

    def __init__(self, root, train=True, split="train+unlabeled", download=False):
        n = 40 if train and split == "train+unlabeled" else 4
        self.data = self.pixels[:n]
        self.targets = [i % 3 for i in range(n)]
        if root == "stl10":
            self.data = self.data.transpose(0, 3, 1, 2)
            self.labels = np.array(self.targets)
            self.labels[17:] = -1

@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_downloads_are_read_and_only_images_with_labels_are_finetuned(name, tmp_path, monkeypatch):
    assert getattr(train_cifar, name.upper()).__name__.lower() == name
    monkeypatch.setattr(train_cifar, name.upper(), FakeDownload)
    flags = ["--dataset", name, "--data-path", name, "--img-size", 32, "--accum-steps", 1]
    train, test = train_cifar.load_data(parse(*flags))
    pixels = FakeDownload.pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(train.squares, pixels)
    assert np.array_equal(test.squares, pixels[:4])
    n = 17 if name == "stl10" else 40
    assert train.labels.tolist() == [i % 3 for i in range(n)]

    reads = record(monkeypatch, train_cifar.Images, "read")
    run(tmp_path, *flags, "--epochs", 1, "--finetune-epochs", 1)
    seen = [max(map(max, x.batches)) for x in reads if len(x.self) == 40]
    pretraining, probe, finetuning = seen
    assert pretraining > 20 and probe == n - 1 and finetuning < n

def test_srun_must_start_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert "under srun, torchrun must start the processes" in error(capsys)

def test_two_runs_in_one_directory_are_noticed(tmp_path, monkeypatch, capsys):
    replace = os.replace
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *paths: replace(*paths) or replace(*paths))
    assert "does another run write to out?" in error(capsys)
