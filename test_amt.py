"""Tests of amt.py and train_cifar.py:  python -m pytest -q"""

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the bit-for-bit comparisons are for the CPU

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import amt
import train_cifar

HERE = Path(__file__).parent


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=rng(seed))


def tiny_vit(**kwargs):
    """A ViT none of whose parameters are at a value, 0 or 1, that would hide a mistake."""
    torch.manual_seed(0)
    vit = amt.ViT(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, **kwargs}
    )
    return unsettle(vit)


def unsettle(module):
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=rng(p.numel()))
    return module


def tiny_mae(**kwargs):
    mae = amt.MAE(tiny_vit(), decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, **kwargs)
    return unsettle(mae)


def tiny_simmim(target="pixels"):
    return unsettle(amt.SimMIM(tiny_vit(), target))


MODELS = {
    "mae": tiny_mae,
    "simmim": tiny_simmim,
    "maskfeat": lambda: tiny_simmim("hog"),
}


def split(n, n_masked=5, n_thrown=0, N=16):
    ranking = torch.rand(n, N, generator=rng(1)).argsort(dim=1)
    return ranking.split([n_masked, n_thrown, N - n_masked - n_thrown], dim=1)


# ------------------------------------------------------------------------------------------------
# 1. Patches


def test_patchify_orders_patches_by_row_and_pixels_by_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = amt.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for b, row, column in itertools.product(range(2), range(2), range(3)):
        expected = [
            images[b, c, 2 * row + i, 2 * column + j].item()
            for i in range(2)
            for j in range(2)
            for c in range(3)
        ]
        assert patches[b, 3 * row + column].tolist() == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_unpatchify_inverts_patchify(channels):
    images = torch.randn(2, channels, 12, 12, generator=rng())
    assert torch.equal(amt.unpatchify(amt.patchify(images, 4), 4), images)


def test_pos_embed_is_maes_table():
    D, h = 16, 3
    table = amt.sincos_pos_embed(D, h)
    assert table.shape == (1, h * h + 1, D) and table.dtype == torch.float32
    assert torch.equal(table[0, 0], torch.zeros(D))
    for row, column in itertools.product(range(h), range(h)):
        expected = []
        for position in (column, row):
            angles = [position / 10000 ** (i / (D // 4)) for i in range(D // 4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(table[0, 1 + h * row + column], torch.tensor(expected))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="12x10 pixels.*4x4"):
        amt.patchify(torch.zeros(1, 3, 12, 10), 4)
    with pytest.raises(ValueError, match="N = 5 patches.*square"):
        amt.unpatchify(torch.zeros(1, 5, 48), 4)
    with pytest.raises(ValueError, match=r"\(1, 4, 50\).*4x4 pixels"):
        amt.unpatchify(torch.zeros(1, 4, 50), 4)
    for strategy in (amt.grid_wise, amt.block_wise):
        with pytest.raises(ValueError, match="N = 17 patches.*square.*extra tokens"):
            strategy(torch.rand(1, 17))
    with pytest.raises(ValueError, match="width 10 .*multiple of 4"):
        amt.sincos_pos_embed(10, 4)
    with pytest.raises(ValueError, match="patch_size 5.*img_size 16"):
        amt.ViT(img_size=16, patch_size=5)
    with pytest.raises(ValueError, match="num_heads 5.*embed_dim 24"):
        amt.ViT(img_size=16, patch_size=4, embed_dim=24, num_heads=5)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*\(B, 3, 16, 16\)"):
        tiny_vit()(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="N = 17 patches.*square.*extra tokens"):
        amt.masking_weights(Stub(torch.rand(1, 2, 17)), random_images(1))
    with pytest.raises(ValueError, match="decoder_num_heads 3.*decoder_embed_dim 16"):
        amt.MAE(tiny_vit(), decoder_embed_dim=16, decoder_num_heads=3)
    with pytest.raises(ValueError, match='"edges".*"pixels" or "hog"'):
        amt.SimMIM(tiny_vit(), "edges")
    for patch_size, H, W in [(5, 10, 10), (4, 12, 10), (16, 20, 32)]:
        with pytest.raises(
            ValueError, match=f"patch size {patch_size} with images of {H}x{W}.*even"
        ):
            amt.hog(torch.zeros(1, 3, H, W), patch_size)
    with pytest.raises(ValueError, match="3x3 patches do not fill a grid of 8x8"):
        amt.expand_units(torch.zeros(1, 4, dtype=torch.int64), 8, 3)


# ------------------------------------------------------------------------------------------------
# 2. Vision transformer


def torch_vit(vit, images):
    """The same ViT in PyTorch's own layers: the embedded tokens of all patches, and the blocks."""

    def layer(block):
        D = block.norm1.normalized_shape[0]
        ours = block.state_dict()
        names = {
            "self_attn.in_proj_": "attn.qkv.",
            "self_attn.out_proj.": "attn.proj.",
            "linear1.": "mlp.fc1.",
            "linear2.": "mlp.fc2.",
            "norm1.": "norm1.",
            "norm2.": "norm2.",
        }
        theirs = nn.TransformerEncoderLayer(
            D,
            block.attn.num_heads,
            len(ours["mlp.fc1.bias"]),
            0.0,
            "gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        theirs.load_state_dict(
            {
                new + kind: ours[old + kind]
                for new, old in names.items()
                for kind in ("weight", "bias")
            }
        )
        return theirs

    conv = vit.patch_embed.proj
    x = F.conv2d(images, conv.weight, conv.bias, stride=conv.stride).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(len(images), -1, -1), x], dim=1) + vit.pos_embed
    return x, [layer(block) for block in vit.blocks]


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # small tokens tell an eps of 1e-6 from others
def test_vit_is_pytorchs_transformer_encoder(scale):
    vit, images = tiny_vit(), random_images(3)
    if scale != 1:
        for p in (vit.cls_token, vit.pos_embed, *vit.patch_embed.parameters()):
            p.data *= scale
        for block in vit.blocks:
            for p in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
                p.data *= scale
    x, layers = torch_vit(vit, images)
    for keep in (None, torch.tensor([[3, 0, 15], [1, 2, 3], [9, 8, 7]])):
        tokens = (
            x
            if keep is None
            else torch.stack(
                [torch.cat([tokens[:1], tokens[1 + ids]]) for tokens, ids in zip(x, keep)]
            )
        )
        for layer in layers:
            tokens = layer(tokens)
        expected = F.layer_norm(tokens, (24,), vit.norm.weight, vit.norm.bias, 1e-6)
        torch.testing.assert_close(vit(images, keep), expected, rtol=1e-4, atol=1e-5)


def test_parameters_have_timms_names():
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = [
        "patch_embed.proj",
        *(f"blocks.{i}.{name}" for i in range(3) for name in block),
        "norm",
    ]
    names = {
        "cls_token",
        "pos_embed",
        *(f"{m}.{kind}" for m in modules for kind in ("weight", "bias")),
    }
    assert set(tiny_vit().state_dict()) == names
    theirs = [
        "decoder_embed",
        "decoder_norm",
        "decoder_pred",
        *(f"decoder_blocks.{i}.{name}" for i in range(2) for name in block),
    ]
    names = {
        "mask_token",
        "decoder_pos_embed",
        *(f"{m}.{kind}" for m in theirs for kind in ("weight", "bias")),
    }
    mae = tiny_mae()
    assert {name for name in mae.state_dict() if not name.startswith("encoder.")} == names
    assert {m.eps for m in mae.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_state_dict_loads_into_timm_and_gives_the_same_tokens():
    timm = pytest.importorskip("timm")
    vit, images = tiny_vit(), random_images(2)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0
    )
    theirs.load_state_dict(vit.state_dict(), strict=True)
    torch.testing.assert_close(
        vit(images), theirs.eval().forward_features(images), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "build, patch, width, depth, heads, millions",
    [
        (amt.vit_tiny, 16, 192, 12, 3, 5.5),
        (amt.vit_small, 16, 384, 12, 6, 21.7),
        (amt.vit_base, 16, 768, 12, 12, 85.8),
        (amt.vit_large, 16, 1024, 24, 16, 303.3),
        (amt.vit_huge, 14, 1280, 32, 16, 630.8),
    ],
)
def test_builders_have_the_fields_sizes(build, patch, width, depth, heads, millions):
    with torch.device("meta"):
        vit = build()
    assert (vit.patch_size, vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads) == (
        patch,
        width,
        depth,
        heads,
    )
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_initialisation_is_maes():
    torch.manual_seed(0)
    vit = amt.ViT(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2)
    for linear, fan_in, fan_out in [
        (vit.blocks[0].attn.qkv, 64, 192),
        (vit.blocks[0].mlp.fc2, 256, 64),
        (vit.patch_embed.proj, 192, 64),
    ]:
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not linear.bias.any()
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    before = vit.blocks[0].attn.qkv.weight.clone()
    mae = amt.MAE(vit, 16, 1, 2)
    assert torch.equal(vit.blocks[0].attn.qkv.weight, before)  # a trained encoder stays trained
    bound = math.sqrt(6 / (16 + 192))
    assert 0.98 * bound < mae.decoder_pred.weight.abs().max() <= bound


def test_defaults_are_the_papers():
    with torch.device("meta"):
        mae = amt.MAE(amt.vit_base())
    assert (mae.encoder.img_size, mae.decoder_embed.out_features) == (224, 512)
    assert (len(mae.decoder_blocks), mae.decoder_blocks[0].attn.num_heads) == (8, 16)
    assert not mae.norm_pix_loss
    sides = amt.random_crops(5000)[:, [0, 1], [0, 1]].abs()
    assert 0.19 < sides.prod(dim=1).min() < 0.22 and sides.max() == 1


def test_only_kept_patches_are_embedded_and_processed():
    vit, images = tiny_vit(), random_images(2)
    shapes = []
    vit.patch_embed.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape))
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda _, x: shapes.append(x[0].shape))
    vit(images, keep=torch.tensor([[5, 1], [0, 7]]))
    assert shapes == [(2, 2, 48)] + 3 * [(2, 3, 24)]


def test_drop_path_leaves_out_branches_in_training_alone_and_keeps_the_mean():
    block = amt.Block(8, 2, drop_path=0.25)
    x = torch.randn(4000, 3, 8, generator=rng())
    full = block.eval()(x) - x
    assert torch.equal(block(x) - x, full)
    torch.manual_seed(0)
    skipped = (block.train()(x) == x).all(dim=2).all(dim=1).float().mean().item()
    assert skipped == pytest.approx(0.25**2, abs=0.015)  # both branches
    branch = block.drop(torch.ones(4000, 3, 8))
    assert branch.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (branch == branch[:, :1, :1]).all()  # an image's branch goes as a whole
    assert branch.mean().item() == pytest.approx(1, abs=0.03)
    rates = [b.drop_path for b in amt.ViT(16, 4, 24, 5, 2, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


# ------------------------------------------------------------------------------------------------
# 3. Masking weights


def attention_by_hand(vit, images):
    """The last block's whole attention (B, heads, T, T), from the q and k that it computes."""
    caught = []
    hook = vit.blocks[-1].attn.qkv.register_forward_hook(lambda *args: caught.append(args[2]))
    vit(images)
    hook.remove()
    B, T, D3 = caught[0].shape
    heads = vit.blocks[-1].attn.num_heads
    q, k, _ = caught[0].reshape(B, T, 3, heads, D3 // 3 // heads).permute(2, 0, 3, 1, 4)
    return torch.einsum("bhqd,bhkd->bhqk", q, k).div(math.sqrt(D3 // 3 // heads)).softmax(dim=-1)


def test_cls_attention_is_the_first_row_without_its_first_entry():
    vit, images = tiny_vit().eval(), random_images(3)
    expected = attention_by_hand(vit, images)[:, :, 0, 1:]
    a = vit.cls_attention(images)
    torch.testing.assert_close(a, expected)
    assert a.shape == (3, 2, 16) and (a.sum(dim=2) < 0.999).all()  # not renormalised


def test_masking_weights_average_the_heads_then_stretch():
    vit, images = tiny_vit(), random_images(3)
    mean = attention_by_hand(vit.eval(), images)[:, :, 0, 1:].mean(dim=1)
    expected = torch.stack([(a - a.min()) / (a.max() - a.min()) for a in mean]).reshape(3, 4, 4)
    weights = amt.masking_weights(vit, images)
    torch.testing.assert_close(weights, expected)
    assert weights.dtype == torch.float32 and not weights.requires_grad


class Stub(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention, self.dropout, self.frozen = attention, nn.Dropout(), nn.BatchNorm1d(1)
        self.frozen.eval()

    def cls_attention(self, images):
        assert not (self.training or self.dropout.training or torch.is_grad_enabled())
        if self.attention is None:
            raise RuntimeError("out of memory")
        return self.attention


def test_masking_weights_of_even_attention_are_zero():
    weights = amt.masking_weights(
        Stub(torch.full((2, 3, 16), 1 / 17, dtype=torch.bfloat16)), random_images(2)
    )
    assert weights.dtype == torch.float32 and torch.equal(weights, torch.zeros(2, 4, 4))


@pytest.mark.parametrize("attention", [torch.rand(2, 3, 16, generator=rng()), None])
def test_masking_weights_leave_every_mode_as_it_was(attention):
    stub = Stub(attention)
    try:
        amt.masking_weights(stub, random_images(2))
    except RuntimeError:
        assert attention is None
    assert stub.training and stub.dropout.training and not stub.frozen.training


# ------------------------------------------------------------------------------------------------
# 4. Crops


def test_random_crops_have_the_distribution_of_random_resized_crop():
    n = 40000
    theta = amt.random_crops(n, (0.05, 0.15), (0.5, 2.0), rng())
    assert theta.shape == (n, 2, 3) and not theta[:, [0, 1], [1, 0]].any()
    width, height, x, y = theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2]
    assert (height > 0).all() and (width < 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    width = width.abs()
    uniform = {  # each of these is uniform in 0 to 1
        "area": (width * height - 0.05) / 0.1,
        "aspect": (width / height).log() / math.log(4) + 0.5,
        "x": (x / (1 - width) + 1) / 2,
        "y": (y / (1 - height) + 1) / 2,
    }
    for name, u in uniform.items():
        sorted_u, ideal = u.sort().values, torch.arange(n) / n
        assert (sorted_u - ideal).abs().max() < 1.95 / math.sqrt(n), (
            name
        )  # Kolmogorov-Smirnov, 0.1 %
    corr = torch.corrcoef(torch.stack([*uniform.values(), theta[:, 0, 0].sign()]))
    assert (corr - torch.eye(5)).abs().max() < 0.03


def test_random_crops_are_cut_to_the_image_and_repeat_with_the_generator():
    theta = amt.random_crops(5000, (0.2, 1.0), generator=rng(3))
    sides, centres = theta[:, [0, 1], [0, 1]].abs(), theta[:, :, 2].abs()
    assert (sides + centres <= 1 + 1e-6).all() and (sides == 1).any()
    assert torch.equal(theta, amt.random_crops(5000, (0.2, 1.0), generator=rng(3)))
    assert not torch.equal(theta, amt.random_crops(5000, (0.2, 1.0), generator=rng(4)))


@pytest.mark.parametrize("image_ratio", [0.5, 3.0])
def test_random_crops_have_their_ratio_in_pixels_of_the_image(image_ratio):
    theta = amt.random_crops(5000, (0.02, 0.05), (0.5, 2.0), rng(), image_ratio)
    width, height = theta[:, 0, 0].abs(), theta[:, 1, 1]
    aspect, area = width / height * image_ratio, width * height
    assert 0.5 < aspect.min() * 1.001 and aspect.max() * 0.999 < 2.0
    assert aspect.log().mean().abs() < 0.03
    assert 0.02 < area.min() * 1.001 and area.max() * 0.999 < 0.05


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_of_whole_pixels_is_slicing(mode, flip):
    images, (top, left, size) = random_images(1), (5, 2, 8)
    width = -size / 16 if flip else size / 16
    theta = torch.tensor(
        [[[width, 0, (2 * left + size) / 16 - 1], [0, size / 16, (2 * top + size) / 16 - 1]]]
    )
    expected = images[:, :, top : top + size, left : left + size]
    expected = expected.flip(3) if flip else expected
    torch.testing.assert_close(amt.crop(images, theta, size, mode), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_crop_continues_the_image_at_its_edges(mode):
    whole = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    torch.testing.assert_close(
        amt.crop(torch.ones(1, 1, 4, 4), whole, 16, mode), torch.ones(1, 1, 16, 16)
    )


def test_weights_lie_on_the_patches_that_show_what_they_were_measured_on():
    # Each pixel of the image holds its own place; the map has one hot cell. Whatever the crop and
    # the flip, a patch's weight must be that of the places it shows.
    n, size, p, h = 64, 32, 4, 8
    line = (torch.arange(size) + 0.5) / size
    places = torch.stack([line.expand(size, size), line[:, None].expand(size, size)]).expand(
        n, 2, size, size
    )
    theta = amt.random_crops(n, (0.2, 1.0), generator=rng())
    hot = torch.randint(h, (n, 2), generator=rng(1))  # column, row
    maps = torch.zeros(n, h, h)
    maps[torch.arange(n), hot[:, 1], hot[:, 0]] = 1
    weights = amt.crop_weights(maps, theta, size, p)
    assert weights.shape == (n, (size // p) ** 2)

    shown = amt.crop(places, theta, size, "bilinear")
    centre = ((hot + 0.5) / h)[:, :, None, None]
    tents = (1 - (shown - centre).abs() * h).clamp(min=0)  # bilinear interpolation of the cell
    at_edge = (hot == 0) | (hot == h - 1)  # where the map is continued outwards
    beyond = ((shown - centre) * (hot - 3.5).sign()[:, :, None, None] > 0) & at_edge[
        :, :, None, None
    ]
    tents = torch.where(beyond, 1.0, tents)
    expected = amt.patchify((tents[:, :1] * tents[:, 1:]), p).sum(dim=2)
    most = expected.amax(dim=1)  # of 16, where all is seen
    assert (most > 8).sum() > 20 and (most == 0).any()
    assert (weights - expected).abs().max() < 1  # pixels are not points


def test_weights_of_an_even_map_are_sums_over_pixels():
    weights = amt.crop_weights(
        torch.full((3, 7, 7), 0.5), amt.random_crops(3, generator=rng()), 28, 4
    )
    torch.testing.assert_close(weights, torch.full((3, 49), 0.5 * 16))


# ------------------------------------------------------------------------------------------------
# 5. Ranking


def chi_square(rankings, probability):
    """Pearson's statistic of the rankings (n, N) against the probability of each permutation."""
    n, N = rankings.shape
    codes = (rankings * N ** torch.arange(N)).sum(dim=1)
    total = 0.0
    for permutation in itertools.permutations(range(N)):
        code = sum(i * N**place for place, i in enumerate(permutation))
        expected = n * probability(permutation)
        total += ((codes == code).sum().item() - expected) ** 2 / expected
    return total


def plackett_luce(weights):
    def probability(permutation):
        p, left = 1.0, sum(weights)
        for i in permutation:
            p, left = p * weights[i] / left, left - weights[i]
        return p

    return probability


@pytest.mark.parametrize(
    "weights", [[0.4, 0.3, 0.2, 0.1], [1e-30, 3e-30, 2e-30, 1e-30], [4.0, 4.0, 4.0, 4.0]]
)
def test_ranking_has_the_plackett_luce_distribution(weights):
    rankings = amt.sample_patches(torch.tensor(weights).expand(60000, 4), rng())
    assert chi_square(rankings, plackett_luce(weights)) < 49.7  # 23 degrees of freedom, 0.1 %


def test_zero_weights_rank_last_in_random_order():
    least = 2.0**-149  # the least positive float32
    weights = torch.tensor([0.0, least, 0.0, 1.0, 0.0, 3e38]).expand(30000, 6)
    rankings = amt.sample_patches(weights, rng())
    assert set(rankings[:, :3].unique().tolist()) == {1, 3, 5}
    order = rankings[:, 3:] // 2  # 0, 2, 4 as 0, 1, 2
    assert chi_square(order, lambda _: 1 / 6) < 20.5  # 5 degrees of freedom, 0.1 %


def test_a_row_of_zeros_is_ranked_uniformly():
    rankings = amt.sample_patches(torch.zeros(60000, 4), rng())
    assert chi_square(rankings, lambda _: 1 / 24) < 49.7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rankings_are_permutations_that_repeat_with_the_generator(dtype):
    weights = torch.rand(8, 196, generator=rng()).to(dtype)
    rankings = amt.sample_patches(weights, rng(5))
    assert rankings.dtype == torch.int64
    assert torch.equal(rankings.sort(dim=1).values, torch.arange(196).expand(8, 196))
    assert torch.equal(rankings, amt.sample_patches(weights, rng(5)))
    assert not torch.equal(rankings, amt.sample_patches(weights, rng(6)))
    assert (rankings[0] != rankings[1]).any()


# ------------------------------------------------------------------------------------------------
# 6. Masking and throwing


@pytest.mark.parametrize(
    "N, mask_ratio, throw_ratio, counts",
    [
        (196, 0.45, 0.40, (88, 78, 30)),
        (196, 0.75, 0.0, (147, 0, 49)),
        (64, 0.45, 0.40, (29, 26, 9)),
        (49, 0.44, 0.26, (22, 13, 14)),
        (10, 0.45, 0.25, (4, 2, 4)),
    ],
)  # round halves to even
def test_counts_and_order(N, mask_ratio, throw_ratio, counts):
    ranking = torch.rand(2, N, generator=rng()).argsort(dim=1)
    masked, thrown, visible = amt.mask_and_throw(ranking, mask_ratio, throw_ratio)
    assert (masked.shape[1], thrown.shape[1], visible.shape[1]) == counts
    assert torch.equal(torch.cat([masked, thrown, visible], dim=1), ranking)
    masked, thrown, visible = amt.mask_and_throw(ranking, mask_ratio, throw_ratio, throw="lowest")
    assert (masked.shape[1], thrown.shape[1], visible.shape[1]) == counts
    assert torch.equal(torch.cat([masked, visible, thrown], dim=1), ranking)


@pytest.mark.parametrize(
    "ratios, message",
    [
        ((1.0, 0.0), "N = 64 .*mask_ratio 1.0 and throw_ratio 0.0.*less than 1"),
        ((0.5, -0.1), "N = 64 .*mask_ratio 0.5 and throw_ratio -0.1.*at least 0"),
        ((float("nan"), 0.0), "mask_ratio nan"),
        ((0.6, 0.4), "38 masked, 26 thrown, 0 visible"),
        ((0.001, 0.4), "0 masked, 26 thrown, 38 visible"),
        ((0.75, 0.4), "48 masked, 26 thrown, -10 visible"),
        ((0.4, 0.4, "highest"), '"highest".*"middle" or "lowest"'),
    ],
)
def test_ratios_that_leave_nothing_are_refused(ratios, message):
    with pytest.raises(ValueError, match=message):
        amt.mask_and_throw(torch.zeros(1, 64), *ratios)


@pytest.mark.parametrize("grid_size, unit", [(8, 2), (6, 3), (4, 1)])
def test_units_are_squares_of_patches_counted_in_rows(grid_size, unit):
    side = grid_size // unit
    ids = torch.rand(3, side * side, generator=rng()).argsort(dim=1)[:, :3]
    patches = amt.expand_units(ids, grid_size, unit)
    assert patches.shape == (3, 3 * unit * unit) and patches.dtype == torch.int64
    for b, k in itertools.product(range(3), range(3)):
        row, column = divmod(ids[b, k].item(), side)
        rows = range(row * unit, (row + 1) * unit)
        columns = range(column * unit, (column + 1) * unit)
        expected = {i * grid_size + j for i, j in itertools.product(rows, columns)}
        assert set(patches[b].unflatten(0, (3, -1))[k].tolist()) == expected


def test_weights_of_units_are_the_sums_of_their_patches():
    maps, theta = torch.rand(3, 4, 4, generator=rng()), amt.random_crops(3, generator=rng())
    units = amt.crop_weights(maps, theta, 32, 8)
    patches = amt.crop_weights(maps, theta, 32, 4)
    ids = amt.expand_units(torch.arange(16).expand(3, -1), 8, 2)
    torch.testing.assert_close(units, patches.gather(1, ids).unflatten(1, (16, 4)).sum(dim=2))


# ------------------------------------------------------------------------------------------------
# 7. Models: MAE, SimMIM, MaskFeat


def literal_mae(mae, images, visible, masked, norm_pix_loss):
    """MAE as published, an image at a time: mask tokens at all hidden places, in the image's order,
    all tokens decoded and projected, the loss by a mask; and thrown tokens taken out."""
    p, N = mae.encoder.patch_size, mae.encoder.grid_size**2
    losses, preds = [], []
    for i in range(len(images)):
        latent = mae.decoder_embed(mae.encoder(images[i : i + 1], keep=visible[i : i + 1]))[0]
        tokens = mae.mask_token[0].repeat(N, 1)
        for token, place in zip(latent[1:], visible[i]):
            tokens[place] = token
        x = torch.cat([latent[:1], tokens]) + mae.decoder_pos_embed[0]
        stays = sorted([*visible[i].tolist(), *masked[i].tolist()])
        x = x[[0] + [1 + place for place in stays]][None]
        for block in mae.decoder_blocks:
            x = block(x)
        out = mae.decoder_pred(mae.decoder_norm(x))[0, 1:]
        target = amt.patchify(images[i : i + 1], p)[0]
        if norm_pix_loss:
            target = torch.stack([(t - t.mean()) / (t.var() + 1e-6) ** 0.5 for t in target])
        is_masked = torch.tensor([float(place in masked[i].tolist()) for place in stays])
        per_patch = ((out - target[stays]) ** 2).mean(dim=1)
        losses.append((per_patch * is_masked).sum() / is_masked.sum())
        preds.append(out[[stays.index(place) for place in masked[i].tolist()]])
    return torch.stack(losses).mean(), torch.stack(preds)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("n_thrown", [0, 6])
def test_mae_is_the_literal_one(norm_pix_loss, n_thrown):
    mae, images = tiny_mae(norm_pix_loss=norm_pix_loss), random_images(3)
    images[0] = 0.5  # patches of no contrast
    masked, _, visible = split(3, n_thrown=n_thrown)
    loss, pred = mae(images, visible, masked)
    expected_loss, expected_pred = literal_mae(mae, images, visible, masked, norm_pix_loss)
    assert pred.shape == (3, 5, 48)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(pred, expected_pred, rtol=1e-4, atol=1e-5)
    assert {p for p in mae.parameters() if not p.requires_grad} == {
        mae.encoder.pos_embed,
        mae.decoder_pos_embed,
    }


def repaint(images, ids, seed=9):
    """The images with other pixels in the patches ids."""
    patches = amt.patchify(images, 4)
    noise = torch.randn(patches.shape, generator=rng(seed))
    return amt.unpatchify(patches.scatter(1, ids[:, :, None].expand(-1, -1, 48), noise), 4)


def loss_pred_grads(mae, images, visible, masked):
    mae.zero_grad()
    loss, pred = mae(images, visible, masked)
    loss.backward()
    return (
        loss.detach(),
        pred.detach(),
        [p.grad.clone() for p in mae.parameters() if p.requires_grad],
    )


@pytest.mark.parametrize("model", ["mae", "simmim"])
def test_thrown_pixels_change_nothing(model):
    mae, images = MODELS[model](), random_images(2)
    masked, thrown, visible = split(2, n_thrown=6)
    before, after = (
        loss_pred_grads(mae, x, visible, masked) for x in (images, repaint(images, thrown))
    )
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert all(map(torch.equal, before[2], after[2])) and all(g.any() for g in before[2])


@pytest.mark.parametrize("model", ["mae", "simmim"])
def test_masked_pixels_change_the_targets_alone(model):
    mae, images = MODELS[model](), random_images(2)
    masked, _, visible = split(2, n_thrown=6)
    other = repaint(images, masked)
    (loss, pred), (other_loss, other_pred) = (
        mae(images, visible, masked),
        mae(other, visible, masked),
    )
    assert torch.equal(pred, other_pred) and loss != other_loss
    target = torch.take_along_dim(amt.patchify(other, 4), masked[:, :, None], dim=1)
    off = pred - target
    torch.testing.assert_close(other_loss, (off**2 if model == "mae" else off.abs()).mean())
    assert not torch.equal(pred, mae(repaint(images, visible), visible, masked)[1])


@pytest.mark.parametrize("model", MODELS)
def test_the_order_of_the_index_sets_does_not_matter(model):
    mae, images = MODELS[model](), random_images(2)
    masked, _, visible = split(2, n_thrown=6)
    loss, pred = mae(images, visible, masked)
    other_loss, other_pred = mae(images, visible.flip(1), masked.flip(1))
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(pred, other_pred.flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["pixels", "hog"])
@pytest.mark.parametrize("n_thrown", [0, 6])
def test_simmim_is_the_literal_one(target, n_thrown):
    """As published: all patches are embedded, the masked ones replaced by the mask token, positions
    added; here thrown tokens are then taken out. In PyTorch's own layers, an image at a time."""
    simmim, images = tiny_simmim(target), random_images(3)
    vit, (masked, _, visible) = simmim.encoder, split(3, n_thrown=n_thrown)
    loss, pred = simmim(images, visible, masked)
    described = amt.patchify(images, 4) if target == "pixels" else amt.hog(images, 4)
    x, layers = torch_vit(vit, images)
    errors = []
    for i in range(3):
        tokens = x[i].clone()
        for place in masked[i]:
            tokens[1 + place] = simmim.mask_token[0, 0] + vit.pos_embed[0, 1 + place]
        stays = sorted([*visible[i].tolist(), *masked[i].tolist()])
        tokens = tokens[[0] + [1 + place for place in stays]][None]
        for layer in layers:
            tokens = layer(tokens)
        tokens = F.layer_norm(tokens, (24,), vit.norm.weight, vit.norm.bias, 1e-6)[0, 1:]
        expected = simmim.head(tokens[[stays.index(place) for place in masked[i].tolist()]])
        torch.testing.assert_close(pred[i], expected, rtol=1e-4, atol=1e-5)
        off = expected - described[i, masked[i]]
        errors.append((off.abs() if target == "pixels" else off**2).mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())
    assert [p for p in simmim.parameters() if not p.requires_grad] == [vit.pos_embed]
    grads = loss_pred_grads(simmim, images, visible, masked)[2]
    assert all(g.any() for g in grads)


def test_simmim_starts_from_its_encoder_as_it_is():
    vit = tiny_vit()
    before = {name: p.clone() for name, p in vit.state_dict().items()}
    simmim = amt.SimMIM(vit)
    assert simmim.encoder is vit and simmim.head.out_features == 48
    assert_same(dict(vit.state_dict()), before)
    assert set(simmim.state_dict()) - {f"encoder.{name}" for name in before} == {
        "mask_token",
        "head.weight",
        "head.bias",
    }


def test_simmim_is_initialised_as_mae_is():
    torch.manual_seed(0)
    vit = amt.ViT(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2)
    simmim, bound = amt.SimMIM(vit), math.sqrt(6 / (64 + 192))
    assert 0.98 * bound < simmim.head.weight.abs().max() <= bound and not simmim.head.bias.any()
    assert simmim.mask_token.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_is_float32_under_autocast(model):
    masked, _, visible = split(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred = MODELS[model]()(random_images(2), visible, masked)
    assert loss.dtype == pred.dtype == torch.float32


def literal_hog(image, cell, bins=9):
    """Histograms (C, cells, cells, bins) of an image (C, H, H), a pixel at a time."""
    C, H, _ = image.shape
    votes = np.zeros((C, H // cell, H // cell, bins))
    for c, y, x in itertools.product(range(C), range(H), range(H)):
        dy = image[c, y + 1, x] - image[c, y - 1, x] if 0 < y < H - 1 else 0.0
        dx = image[c, y, x + 1] - image[c, y, x - 1] if 0 < x < H - 1 else 0.0
        degrees = math.degrees(math.atan2(dy, dx)) % 180
        votes[c, y // cell, x // cell, int(degrees // (180 / bins))] += math.hypot(dy, dx)
    length = np.sqrt((votes**2).sum(axis=3, keepdims=True))
    return votes / np.maximum(length, 1e-12)


def cells_of(histograms, patch_grid, channels, bins=9):
    """Our (N, 4 C bins) of an image as (C, 2h, 2w, bins)."""
    x = histograms.reshape(patch_grid, patch_grid, 2, 2, channels, bins)
    return x.permute(4, 0, 2, 1, 3, 5).reshape(channels, 2 * patch_grid, 2 * patch_grid, bins)


@pytest.mark.parametrize("patch_size, bins", [(4, 9), (8, 6)])
def test_hog_is_the_literal_one(patch_size, bins):
    images = random_images(2).double()
    images[1, :, :8] = 0.5  # no gradient there: no votes
    histograms = amt.hog(images, patch_size, bins)
    h = 16 // patch_size
    assert histograms.shape == (2, h * h, 4 * 3 * bins)
    for image, ours in zip(images, histograms):
        expected = literal_hog(image.numpy(), patch_size // 2, bins)
        np.testing.assert_allclose(cells_of(ours, h, 3, bins), expected, atol=1e-9)


def test_hog_bins_of_known_edges():
    ramp = torch.arange(16.0).expand(16, 16)
    for image, bin in [(ramp, 0), (ramp.T, 4), (ramp + ramp.T, 2), (ramp - ramp.T, 6)]:
        cells = cells_of(amt.hog(image[None, None], 8)[0], 2, 1)[0, 1:3, 1:3]  # of degrees 0, 90...
        assert (cells.argmax(dim=2) == bin).all()
    image = torch.arange(-8.0, 8).repeat(16, 1)
    image[:, 8] = -1e-9 * torch.arange(16)  # a hair below 180 degrees: float32's pi
    assert cells_of(amt.hog(image[None, None], 8)[0], 2, 1)[0, 1, 2, 8] > 0
    up_side_down = amt.hog(-ramp[None, None], 8)  # unsigned
    torch.testing.assert_close(up_side_down, amt.hog(ramp[None, None], 8))


def test_hog_is_scikit_images():
    feature = pytest.importorskip("skimage.feature")
    image = 255 * torch.rand(1, 1, 32, 32, generator=rng(), dtype=torch.float64)
    theirs = feature.hog(
        image[0, 0].numpy(), 9, (4, 4), (1, 1), block_norm="L2", feature_vector=False
    )[:, :, 0, 0]
    ours = cells_of(amt.hog(image, 8)[0], 4, 1)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # theirs adds 1e-5 to the norm


# ------------------------------------------------------------------------------------------------
# 8. Other strategies


@pytest.mark.parametrize("N", [16, 49, 64, 196])
@pytest.mark.parametrize("strategy", amt.STRATEGIES)
def test_every_strategy_gives_rankings(strategy, N):
    rank, weights = amt.STRATEGIES[strategy], torch.rand(6, N, generator=rng())
    ranking = rank(weights, rng(1))
    assert ranking.dtype == torch.int64
    assert torch.equal(ranking.sort(dim=1).values, torch.arange(N).expand(6, N))
    assert torch.equal(ranking, rank(weights, rng(1)))
    assert torch.equal(ranking, rank(weights, rng(2))) == (strategy in ("attmask", "mst"))
    assert len(ranking.unique(dim=0)) == 6  # each image its own
    masked, thrown, visible = amt.mask_and_throw(ranking, 0.45, 0.40)
    counts = {16: (7, 6, 3), 49: (22, 20, 7), 64: (29, 26, 9), 196: (88, 78, 30)}[N]
    assert (masked.shape[1], thrown.shape[1], visible.shape[1]) == counts


def test_attmask_and_mst_are_exact_orders():
    weights = torch.tensor([[0.2, 0.9, 0.0, 0.5], [3.0, 1.0, 2.0, 0.1]])
    assert amt.highest_first(weights).tolist() == [[1, 3, 0, 2], [0, 2, 1, 3]]
    assert amt.lowest_first(weights).tolist() == [[2, 0, 3, 1], [3, 1, 2, 0]]
    for rank in (amt.highest_first, amt.lowest_first):  # the same on each device
        assert torch.equal(rank(torch.zeros(2, 5000)), torch.arange(5000).expand(2, -1))


def test_random_ranking_is_uniform_whatever_the_weights():
    weights = torch.tensor([100.0, 1.0, 0.0, 5.0]).expand(60000, 4)
    assert chi_square(amt.random_ranking(weights, rng()), lambda _: 1 / 24) < 49.7


@pytest.mark.parametrize("h", [4, 8, 14])
def test_grid_wise_masking_is_regular(h):
    ranking = amt.grid_wise(torch.ones(50, h * h), rng())
    row, column = ranking // h, ranking % h
    last = slice(3 * h * h // 4, None)
    assert (row[:, last] % 2 == 1).all() and (column[:, last] % 2 == 0).all()
    assert ((row + column)[:, : h * h // 2] % 2 == 0).all()  # half of it is a checkerboard
    assert len(ranking[:, 0].unique()) > 3  # of those alike, any may come first


def components(masked, h):
    """The sizes of the connected parts of a set of patches."""
    left, sizes = set(masked), []
    while left:
        edge, size = [left.pop()], 0
        while edge:
            i = edge.pop()
            size += 1
            beside = {i - h, i + h, *([i - 1] if i % h else []), *([i + 1] if (i + 1) % h else [])}
            edge += beside & left
            left -= beside
        sizes.append(size)
    return sorted(sizes)


@pytest.mark.parametrize("h", [8, 14])
@pytest.mark.parametrize("ratio", [0.4, 0.75])
def test_block_wise_masking_covers_the_ratio_with_connected_blocks(h, ratio):
    N = h * h
    ranking = amt.block_wise(torch.ones(200, N), rng())
    masked = amt.mask_and_throw(ranking, ratio)[0]
    assert masked.shape == (200, round(N * ratio))
    for row in masked.tolist():
        _, *whole = components(row, h)  # the smallest may be cut short by the ratio
        assert len(whole) <= 5 and all(size > 0.05 * N for size in whole)
    assert (torch.bincount(masked.flatten(), minlength=N) > 0).all()


def test_a_block_is_a_rectangle_of_the_papers_size_and_shape():
    h, N = 14, 196
    sizes, aspects, tops, lefts = [], [], [], []
    for ranking in amt.block_wise(torch.ones(500, N), rng()):
        row, column = ranking // h, ranking % h
        # The first rectangle: the longest beginning of the ranking that is one, and no cut one.
        height, width = (
            x.cummax(0).values - x.neg().cummax(0).values.neg() + 1 for x in (row, column)
        )
        full = ((height * width == torch.arange(1, N + 1)) & (height * width <= 90)).nonzero()
        end = full[-1].item()
        sizes.append(end + 1)
        aspects.append((height[end] / width[end]).item())
        tops.append(row[: end + 1].min().item())
        lefts.append(column[: end + 1].min().item())
    assert min(sizes) >= 12 and sorted(sizes)[250] == pytest.approx(47, abs=6) and max(sizes) >= 75
    assert min(aspects) == pytest.approx(0.3, abs=0.1) and max(aspects) == pytest.approx(
        1 / 0.3, abs=1
    )
    assert sorted(aspects)[250] == pytest.approx(1, abs=0.15)
    assert {0, 1, 2, 3, 4, 5} <= set(tops) and {0, 1, 2, 3, 4, 5} <= set(lefts)


def test_a_block_grows_from_its_centre_and_what_no_block_covers_is_at_random():
    ranking = amt.block_wise(torch.ones(1000, 196), rng())
    for place in (ranking[:, :12] // 14, ranking[:, :12] % 14):  # the others lie around the first
        off = place.float().mean(dim=1) - place[:, 0]
        assert off.abs().mean() < 0.7
    in_order = (ranking[:, -3:].diff(dim=1) > 0).all(dim=1)
    assert in_order.float().mean() < 0.3  # of three, 1/6


# ------------------------------------------------------------------------------------------------
# train_cifar.py

SMALL = [
    "--dataset",
    "shapes",
    "--num-images",
    "70",
    "--depth",
    "1",
    "--decoder-embed-dim",
    "32",
    "--decoder-depth",
    "1",
    "--epochs",
    "6",
    "--update-interval",
    "2",
    "--warmup-epochs",
    "1",
    "--batch-size",
    "32",
    "--probe-epochs",
    "1",
    "--save-every",
    "1",
]


def run(out_dir, *flags):
    """Runs the script; the out-dir's checkpoint."""
    train_cifar.main([*SMALL, "--out-dir", str(out_dir), *flags])
    return torch.load(out_dir / "checkpoint.pth", weights_only=True)


def error(*flags):
    """The one line that the script ends with."""
    with pytest.raises(SystemExit) as caught:
        train_cifar.main([*SMALL, *map(str, flags)])
    line = caught.value.code
    assert line.startswith("train_cifar.py: error: ") and "\n" not in line
    return line


def assert_same(a, b, **tolerance):
    """Compares nested dicts and lists of tensors: bit for bit, or within a tolerance."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, (dict, list)):
        for key in a if isinstance(a, dict) else range(max(len(a), len(b))):
            assert_same(a[key], b[key], **tolerance)
    elif isinstance(a, torch.Tensor) and tolerance:
        torch.testing.assert_close(a, b, **tolerance)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def trained(checkpoint):
    """What training made of a checkpoint, without its times."""
    return {
        key: checkpoint[key]
        for key in ("model", "optimizer", "epoch", "maps", "snapshots", "settings")
    }


def column(out_dir, name):
    with open(out_dir / "log.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def logged_epochs(out_dir):
    header, *rows = [line.split(",") for line in (out_dir / "log.csv").read_text().splitlines()]
    assert header[:4] == ["epoch", "loss", "lr", "images_per_second"] and all(
        len(r) == len(header) for r in rows
    )
    return [int(row[0]) for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from beginning to end: its directory and its checkpoint. Read, never written."""
    out_dir = tmp_path_factory.mktemp("finished")
    return out_dir, run(out_dir)


def copy(finished, tmp_path):
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_run_writes_its_files(finished):
    out_dir, checkpoint = finished
    assert {path.name for path in out_dir.iterdir()} == {
        "checkpoint.pth",
        "encoder.pth",
        "log.csv",
        "attention.png",
        "masking.png",
        "probe-checkpoint.pth",
        "probe-log.csv",
    }
    assert logged_epochs(out_dir) == list(range(1, 7))
    encoder = amt.vit_tiny(img_size=32, patch_size=4, depth=1)
    encoder.load_state_dict(torch.load(out_dir / "encoder.pth", weights_only=True))
    in_checkpoint = {
        name.removeprefix("encoder."): p
        for name, p in checkpoint["model"].items()
        if name.startswith("encoder.")
    }
    assert_same(dict(encoder.state_dict()), in_checkpoint)
    assert (
        checkpoint["maps"].shape == (70, 8, 8) and checkpoint["maps"].amax(dim=(1, 2)).eq(1).all()
    )
    attention, masking = (
        np.array(Image.open(out_dir / f"{name}.png")) for name in ("attention", "masking")
    )
    assert attention.shape == (3 * 132 + 4, 8 * 132 + 4, 3)  # the images, and two updates
    assert masking.shape == (4 * 132 + 4, 8 * 132 + 4, 3)
    hidden = torch.tensor(masking[2 * 132 + 4 : 3 * 132 : 4, 4:132:4]).permute(2, 0, 1).float()
    patches = amt.patchify(hidden[None], 4)[0]  # of the first image
    assert (patches == 0).all(dim=1).sum() == 26 and ((patches - 127.5).abs() < 1).all(
        dim=1
    ).sum() == 29


@pytest.mark.parametrize(
    "method, random, amt_ratios, targets, rows",
    [
        ("simmim", (0.60, 0.0), (0.44, 0.26), 48, 4),
        ("maskfeat", (0.40, 0.0), (0.44, 0.26), 108, 3),
    ],
)
def test_simmim_and_maskfeat_from_the_command_line(
    method, random, amt_ratios, targets, rows, tmp_path, monkeypatch
):
    steps = record(monkeypatch)
    flags = ["--method", method, "--epochs", "3", "--update-interval", "1"]
    checkpoint = run(tmp_path, *flags)
    assert [step["ratios"] for step in steps] == 2 * [random] + 4 * [amt_ratios]
    assert all(step["ranking"].shape == (32, 16) for step in steps)  # of units of 2x2 patches
    assert checkpoint["model"]["head.weight"].shape == (targets, 192)
    assert train_cifar.METHODS[method].amt[1] == (0.33, 0.50)
    args = train_cifar.parse_args([*SMALL, *flags, "--masking", "random"])
    assert (args.mask_ratio, args.throw_ratio, args.mask_unit) == (*random, 2)
    encoder = amt.vit_tiny(img_size=32, patch_size=4, depth=1)  # the same as MAE's
    encoder.load_state_dict(torch.load(tmp_path / "encoder.pth", weights_only=True))
    picture = np.array(Image.open(tmp_path / "masking.png"))
    assert picture.shape == (rows * 132 + 4, 8 * 132 + 4, 3)  # HOG cannot be seen


def test_units_are_masked_thrown_and_seen_as_a_whole():
    args, _ = small("--method", "simmim")
    ranking = torch.rand(3, 16, generator=rng()).argsort(dim=1)
    sets = train_cifar.split(args, ranking, (0.44, 0.26))
    assert [ids.shape[1] for ids in sets] == [4 * 7, 4 * 4, 4 * 5]
    units = torch.cat([ids // 8 // 2 * 4 + ids % 8 // 2 for ids in sets], dim=1)
    assert torch.equal(units, ranking.repeat_interleave(4, dim=1))
    args.throw = "lowest"
    _, thrown, _ = train_cifar.split(args, ranking, (0.44, 0.26))
    assert torch.equal(thrown // 8 // 2 * 4 + thrown % 8 // 2, units[:, -16:])


@pytest.mark.parametrize("method, unit", [("mae", 4), ("simmim", 8)])
@pytest.mark.parametrize("strategy", amt.STRATEGIES)
def test_each_strategy_ranks_by_the_maps_or_without(strategy, method, unit):
    args, data = small("--masking", strategy, "--method", method)
    maps, ids = torch.rand(70, 8, 8, generator=rng()), torch.arange(32)
    theta = amt.random_crops(32, generator=rng())
    weights = amt.crop_weights(maps[:32], theta, 32, unit)
    expected = amt.STRATEGIES[strategy](weights, rng())
    assert torch.equal(ranked(args, data, maps, ids, theta), expected)
    # Before the first update, those by attention are at random.
    first = strategy if strategy in ("block", "grid") else "random"
    expected = amt.STRATEGIES[first](torch.ones_like(weights), rng())
    assert torch.equal(ranked(args, data, None, ids, theta), expected)


def ranked(args, data, maps, ids, theta, rows=slice(0, 32)):
    """The ranking of units that pretraining draws."""
    stage = train_cifar.Pretraining(args, data)
    stage.run["maps"] = maps
    return stage.rank(ids, theta, rows, rng())


@pytest.mark.parametrize("strategy", ["attmask", "mst", "block", "grid"])
def test_updates_are_for_the_strategies_by_attention(strategy, tmp_path, monkeypatch):
    steps = record(monkeypatch)
    flags = ["--epochs", "3", "--mask-ratio", "0.5", "--throw-ratio", "0.25", "--throw", "lowest"]
    checkpoint = run(tmp_path, "--masking", strategy, *flags, "--probe-epochs", "0")
    by_attention = strategy in ("attmask", "mst")
    assert (checkpoint["maps"] is None) != by_attention
    first = (0.75, 0.0) if by_attention else (0.5, 0.25)
    assert [step["ratios"] for step in steps] == 4 * [first] + 2 * [(0.5, 0.25)]
    assert checkpoint["settings"]["throw"] == "lowest"


def record(monkeypatch):
    """Has each step of a run write down what it was given and what it drew."""
    steps, stage = [], train_cifar.Pretraining
    loss, rank, split = stage.loss, stage.rank, train_cifar.split

    def recording_loss(self, ids, images, theta, rows, g):
        lr = self.optimizer.param_groups[0]["lr"]
        step = {"maps": self.run["maps"], "ids": ids.tolist(), "lr": lr, "theta": theta}
        steps.append(step)
        result = loss(self, ids, images, theta, rows, g)
        step["loss"] = result.item()
        return result

    def recording_rank(self, *args):
        steps[-1]["ranking"] = rank(self, *args)
        return steps[-1]["ranking"]

    def recording_split(args, ranking, ratios):
        if steps and "ratios" not in steps[-1]:
            steps[-1]["ratios"] = ratios
        return split(args, ranking, ratios)

    monkeypatch.setattr(stage, "loss", recording_loss)
    monkeypatch.setattr(stage, "rank", recording_rank)
    monkeypatch.setattr(train_cifar, "split", recording_split)
    return steps


def test_schedule_of_a_run(tmp_path, monkeypatch):
    steps = record(monkeypatch)
    saved = []
    monkeypatch.setattr(
        train_cifar, "save_checkpoint", lambda stage: saved.append(stage.run["epoch"])
    )
    flags = ["--blr", "8e-3", "--save-every", "4", "--probe-epochs", "0"]
    train_cifar.main([*SMALL, *flags, "--out-dir", str(tmp_path)])

    # Random masking until the first update, before epoch 3 of 6; another before epoch 5.
    assert [step["ratios"] for step in steps] == 4 * [(0.75, 0.0)] + 8 * [(0.45, 0.40)]
    maps = [step["maps"] for step in steps]
    assert maps[:4] == 4 * [None] and all(m is maps[4] for m in maps[4:8])
    assert all(m is maps[8] for m in maps[8:]) and not torch.equal(maps[4], maps[8])
    peak = 8e-3 * 32 / 256  # after one epoch, of two steps, of warm-up
    expected = [0, peak / 2, *(peak * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10))]
    assert [step["lr"] for step in steps] == pytest.approx(expected)
    assert saved == [4, 6]
    pairs = list(zip(steps[::2], steps[1::2]))
    means = [(a["loss"] + b["loss"]) / 2 for a, b in pairs]
    assert column(tmp_path, "loss") == pytest.approx(means, abs=1e-5)

    # An epoch takes each image once at the most, and draws anew.
    epochs = [a["ids"] + b["ids"] for a, b in pairs]
    assert all(len(set(ids)) == 64 for ids in epochs)
    assert not any(a == b for a, b in itertools.combinations(epochs, 2))
    rankings = [step["ranking"] for step in steps]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rankings, 2))


def test_intervals_are_a_tenth_of_the_epochs():
    for epochs, update, warmup in [("400", 40, 40), ("16", 2, 1), ("5", 1, 0), ("1", 1, 0)]:
        args = train_cifar.parse_args(["--epochs", epochs])
        assert (args.update_interval, args.warmup_epochs) == (update, warmup)


def test_random_masking_never_updates(tmp_path, monkeypatch):
    steps = record(monkeypatch)
    checkpoint = run(tmp_path, "--masking", "random", "--probe-epochs", "0")
    assert {(step["ratios"], step["maps"]) for step in steps} == {((0.75, 0.0), None)}
    assert checkpoint["maps"] is None and not (tmp_path / "attention.png").exists()


def test_plain_attention_is_attention():
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=rng()).unbind()
    expected = F.scaled_dot_product_attention(q, k, v)
    with train_cifar.PlainAttention():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_of_the_split_of_the_ranking(precision):
    args, data = small("--precision", precision)
    stage = train_cifar.Pretraining(args, data)
    stage.run["maps"] = torch.rand(70, 8, 8, generator=rng()).half()
    ids, theta = torch.arange(32), amt.random_crops(32, generator=rng(1))
    images = data.train[:32].float()
    masked, _, visible = amt.mask_and_throw(stage.rank(ids, theta, slice(0, 32), rng()), 0.45, 0.40)
    assert stage.model.norm_pix_loss
    expected = stage.model(data.normalise(images), visible, masked)[0].item()
    loss = stage.loss(ids, images, theta, slice(0, 32), rng()).item()
    assert (loss == expected) == (precision == "fp32")
    assert loss == pytest.approx(expected, rel=0.01)


def test_training_learns(finished):
    losses = column(finished[0], "loss")
    assert losses[-1] < 0.8 * losses[0]


def small(*flags):
    args = train_cifar.parse_args([*SMALL, *flags])
    return args, train_cifar.load_data(args)


def test_maps_are_the_weights_of_the_whole_images_in_order():
    args, data = small()
    pixels = data.normalise(data.train.float())
    torch.testing.assert_close(pixels.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(pixels.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=1e-3)
    encoder = train_cifar.build_model(args).encoder
    maps = train_cifar.update_maps(args, encoder, data)
    for i in (0, 31, 32, 69):  # in and between batches of 32
        image = (data.train[i : i + 1].float() - data.mean) / data.std
        torch.testing.assert_close(
            maps[i : i + 1].float(), amt.masking_weights(encoder, image), rtol=1e-3, atol=5e-4
        )


def drawn(args, data, order, scale=(0.2, 1.0), mine=None):
    """Ids, crops and thetas of training images, in one batch each."""
    mine = torch.arange(len(order)) if mine is None else mine
    batches = data.crops(args, scale, False, order, mine, rng())
    return [torch.cat(parts) for parts in zip(*batches)]


def test_a_ranking_follows_the_maps_of_its_own_images():
    # Each map has one hot cell: a patch that shows some of it is ranked first, where there is one.
    # Not so if the maps were another image's, or cropped differently.
    args, data = small("--batch-size", "64")
    maps = torch.zeros(70, 8, 8)
    maps[torch.arange(70), torch.arange(70) % 8, torch.arange(70) // 9] = 1
    order = torch.arange(69, 5, -1)
    ids, images, theta = drawn(args, data, order)
    assert torch.equal(ids, order)
    ranking = ranked(args, data, maps, ids, theta, slice(0, 64))
    assert torch.equal(theta, amt.random_crops(64, generator=rng()))
    expected = amt.crop_weights(maps[ids], theta, 32, 4)
    top_weight = expected.gather(1, ranking[:, :1])[:, 0]
    assert (top_weight > 0).eq(expected.amax(dim=1) > 0).all()
    shown = amt.crop(data.train[ids].float(), theta, 32, "bicubic").clamp(0, 255)
    torch.testing.assert_close(images, shown)


def test_draws_do_not_depend_on_how_the_batch_is_divided():
    args, data = small()
    maps, order = torch.rand(70, 8, 8, generator=rng()), torch.arange(3, 35)
    ids, images, theta = drawn(args, data, order)
    ranking = ranked(args, data, maps, ids, theta)
    args.batch_size = 16  # and global_batch is 32: two processes, or two batches to a step
    for rows in (slice(0, 16), slice(16, 32)):
        part = drawn(args, data, order, mine=torch.arange(32)[rows])
        assert torch.equal(part[0], ids[rows]) and torch.equal(part[2], theta[rows])
        torch.testing.assert_close(part[1], images[rows])
        assert torch.equal(ranked(args, data, maps, part[0], part[2], rows), ranking[rows])


@pytest.mark.parametrize("method, low", [("mae", 0.2), ("simmim", 0.67), ("maskfeat", 0.5)])
def test_crops_are_of_the_methods_scale(method, low, tmp_path, monkeypatch):
    steps = record(monkeypatch)
    flags = ["--method", method, "--epochs", "1", "--update-interval", "1", "--probe-epochs", "0"]
    run(tmp_path, *flags, "--warmup-epochs", "0", "--num-images", "320")
    theta = torch.cat([step["theta"] for step in steps])
    area = (theta[:, 0, 0] * theta[:, 1, 1]).abs()
    assert low * 0.7 < area.min() < low + 0.1 and area.max() > 0.9


def test_epochs_and_stages_draw_differently():
    first = [
        torch.rand(4, generator=train_cifar.generator(*key))
        for key in [(0, "probe", 0), (0, "probe", 1), (1, "probe", 0), (0, "fine-tuning", 0)]
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))
    assert torch.equal(first[1], torch.rand(4, generator=train_cifar.generator(0, "probe", 1)))


def test_weight_decay_is_for_matrices():
    args = train_cifar.parse_args(SMALL)
    model = train_cifar.build_model(args)
    groups = train_cifar.build_optimizer(model).param_groups
    others, decayed = sorted(groups, key=lambda group: group["weight_decay"])
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (
        0.05,
        0.0,
        (0.9, 0.95),
    )
    names = {p: name for name, p in model.named_parameters()}
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert {names[p] for p in decayed["params"]} == {names[m.weight] for m in linear}
    trained = {name for name, p in model.named_parameters() if "pos_embed" not in name}
    assert {names[p] for p in others["params"]} == trained - {names[m.weight] for m in linear}


class ColourEncoder(nn.Module):
    """[CLS] is the image's mean colour, at an awkward scale, times a parameter."""

    embed_dim = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, images):
        assert not self.training
        self.seen.append(images)
        cls = 100 + 1e-3 * self.scale * images.mean(dim=(2, 3))
        noise = 1e3 * torch.randn(cls.shape, generator=rng(len(self.seen)))
        return torch.stack([cls, noise], dim=1)


def test_probe_trains_a_linear_layer_alone_and_counts_each_test_image(tmp_path):
    args, _ = small("--batch-size", "16", "--probe-epochs", "10", "--probe-blr", "8")
    images, labels = colours(200)
    one_class, test_labels = images[0:1].expand(37, -1, -1, -1), torch.zeros(37, dtype=torch.int64)
    test_labels[36] = 1  # labelled wrongly: 36 of 37 are right
    mean, std = torch.full((3, 1, 1), 127.0), torch.full((3, 1, 1), 100.0)
    data = train_cifar.Data(images, labels, one_class, test_labels, mean, std)
    encoder = ColourEncoder().train()
    args.out_dir = tmp_path
    probe = train_cifar.LinearProbe(args, data, encoder)
    train_cifar.fit(probe)
    assert probe.accuracy() == pytest.approx(100 * 36 / 37)
    assert encoder.scale.item() == 1 and encoder.scale.grad is None

    train, test = torch.cat(encoder.seen[: 10 * 12]), torch.cat(encoder.seen[10 * 12 :])
    torch.testing.assert_close(test, data.normalise(one_class.float()))  # whole, and each once
    rise = (train[:, :, :, -1] - train[:, :, :, 0]).sum(dim=(1, 2))
    assert (rise > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # flips
    assert rise.abs().std() > 0.1 * rise.abs().mean()  # and crops


def colours(n):
    """n images in four colours, darker on the left, and the colours as labels."""
    labels = torch.arange(n) % 4
    colour = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    colour = torch.tensor(colour, dtype=torch.uint8)[labels][:, :, None, None]
    return (colour * torch.linspace(0.5, 1, 32)).expand(-1, -1, 32, -1).byte(), labels


def test_short_probes_go_to_the_log_and_change_nothing(finished, tmp_path):
    checkpoint = run(tmp_path, "--probe-every", "2")
    assert_same(trained(checkpoint), trained(finished[1]))
    with open(tmp_path / "log.csv", newline="") as file:
        accuracies = [row["probe_accuracy"] for row in csv.DictReader(file)]
    assert accuracies[::2] == ["", "", ""] and all(0 <= float(x) <= 100 for x in accuracies[1::2])


def test_short_probes_are_not_time_of_pretraining(tmp_path, monkeypatch):
    clock, offset = train_cifar.time.time, [0.0]

    def probing(self):
        offset[0] += 1000
        return 50.0

    monkeypatch.setattr(train_cifar.time, "time", lambda: clock() + offset[0])
    monkeypatch.setattr(train_cifar.LinearProbe, "accuracy", probing)
    checkpoint = run(tmp_path, "--probe-every", "3", "--probe-epochs", "0")
    assert offset == [2000] and checkpoint["seconds"] < 1000
    assert max(column(tmp_path, "seconds")) < 1000


def finetuning(tmp_path, *flags, n=64, test=None):
    """Fine-tuning on colours, not yet begun, and the encoder that it starts from."""
    args = train_cifar.parse_args(
        [*SMALL, "--depth", "2", "--finetune-epochs", "1", "--out-dir", str(tmp_path), *flags]
    )
    mean, std = torch.full((3, 1, 1), 127.0), torch.full((3, 1, 1), 100.0)
    data = train_cifar.Data(*colours(n), *(test or colours(37)), mean, std)
    pretrained = unsettle(amt.vit_tiny(img_size=32, patch_size=4, depth=2))
    return train_cifar.FineTuning(args, data, pretrained), pretrained


def test_what_finetuning_learns_from(tmp_path, monkeypatch):
    given = []

    def mix(images, labels):
        given.append((images, labels))
        return images, labels

    flags = ["--finetune-epochs", "40", "--finetune-blr", "1e-2", "--accum-steps", "2"]
    stage, _ = finetuning(tmp_path, *flags)
    assert (stage.name, stage.epochs, stage.warmup, stage.n) == ("fine-tuning", 40, 2, 64)
    assert stage.lr == pytest.approx(1e-2 * 64 / 256)  # by the images of a step
    stage.mix = mix
    images, ids = torch.rand(16, 3, 32, 32, generator=rng()) * 255, torch.arange(16, 32)
    stage.loss(ids, images, None, slice(0, 16), rng())
    torch.testing.assert_close(given[0][0], (images - 127) / 100)
    assert torch.equal(given[0][1], colours(64)[1][16:32])


def test_randaugment_is_for_the_crops_of_finetuning(tmp_path, monkeypatch):
    augmented = []

    def invert(image):
        augmented.append((tuple(image.shape), image.dtype))
        return 255 - image

    monkeypatch.setattr(train_cifar, "RAND_AUGMENT", invert)
    stage, _ = finetuning(tmp_path, "--randaugment")
    assert stage.augment and not finetuning(tmp_path)[0].augment
    crops = [
        [batch[1] for batch in stage.data.crops(stage.args, (0.2, 1.0), augment, *places, rng())]
        for augment in (False, True)
        for places in [(torch.arange(64), torch.arange(8, 20))]
    ]
    assert augmented == 12 * [((3, 32, 32), torch.uint8)]
    torch.testing.assert_close(crops[1][0], 255 - crops[0][0].round())


class Drawing(train_cifar.Stage):
    """Learns nothing; notes what it is given and what torch's own generator draws."""

    def __init__(self, args, data, prefix=None):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        super().__init__(args, data, "drawing", prefix, model, optimizer, 6.4, 3, 70)
        self.warmup, self.draws, self.ids, self.rates = 1, [], [], []
        self.gradients, self.losses = [], []
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(model.weight.grad.item()))

    def loss(self, ids, images, theta, rows, g):
        self.draws.append(tuple(torch.rand(3).tolist()))
        self.ids.append(ids.tolist())
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        loss = (self.model.weight * (1 + rows.start)).sum()
        self.losses.append(loss.item())
        return loss


def test_a_stage_draws_anew_in_each_step_and_process(monkeypatch):
    args, data = small("--batch-size", "16")
    args.global_batch = 32  # of two processes
    monkeypatch.setattr(train_cifar, "WORLD_SIZE", 2)
    monkeypatch.setattr(train_cifar, "all_sum", lambda x: x)
    monkeypatch.setattr(train_cifar, "wait", lambda: None)
    stages = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(train_cifar, "RANK", rank)
        stages.append(Drawing(args, data))
        train_cifar.fit(stages[-1])
    first, second, again = stages
    cosine = [0.4 + 0.4 * math.cos(math.pi * i / 4) for i in range(4)]
    assert first.rates == pytest.approx([0, 0.4, *cosine])  # three epochs of two steps
    assert len({*first.draws, *second.draws}) == 12 and first.draws == again.draws
    assert first.ids == again.ids
    both = [a + b for a, b in zip(first.ids, second.ids)]
    epochs = [both[i] + both[i + 1] for i in (0, 2, 4)]
    assert all(len(set(ids)) == 64 for ids in epochs)
    assert not any(a == b for a, b in itertools.combinations(epochs, 2))

    # The same step, of two batches of one process.
    monkeypatch.setattr(train_cifar, "WORLD_SIZE", 1)
    monkeypatch.setattr(train_cifar, "RANK", 0)
    args.accum_steps = 2
    accumulating = Drawing(args, data)
    train_cifar.fit(accumulating)
    assert [a + b for a, b in zip(accumulating.ids[::2], accumulating.ids[1::2])] == both
    assert accumulating.rates[::2] == accumulating.rates[1::2] == first.rates
    assert accumulating.draws[::2] == first.draws and accumulating.draws[1::2] == second.draws
    assert accumulating.gradients == 6 * [(1 + 17) / 2]  # the mean, anew in each step
    means = [sum(accumulating.losses[i : i + 2]) / 2 for i in (8, 10)]
    assert accumulating.run["losses"].tolist() == pytest.approx(means)


def test_the_seed_and_the_stage_change_what_is_drawn():
    stages = []
    for seed, name in [("0", "drawing"), ("1", "drawing"), ("0", "sketching")]:
        stage = Drawing(*small("--seed", seed))
        stage.name = name
        train_cifar.fit(stage)
        stages.append(stage)
    for a, b in itertools.combinations(stages, 2):
        assert not set(a.draws) & set(b.draws) and a.ids[0] != b.ids[0]


@pytest.mark.parametrize("epochs, short", [("30", 3), ("3", 1)])
def test_a_short_probe_takes_a_tenth_of_the_epochs(epochs, short):
    args, data = small("--probe-epochs", epochs, "--probe-blr", "0.4")
    whole = train_cifar.LinearProbe(args, data, ColourEncoder())
    brief = train_cifar.LinearProbe(args, data, ColourEncoder(), short=True)
    assert (whole.epochs, brief.epochs) == (int(epochs), short)
    assert (whole.prefix, brief.prefix) == ("probe-", None)
    assert whole.lr == brief.lr == pytest.approx(0.05) and whole.warmup == 0


def test_crops_are_pixels():
    args, data = small()
    crops = drawn(args, data, torch.arange(32))[1]
    assert crops.min() == 0 and crops.max() == 255


def test_finetuning_starts_from_the_encoder_and_saves_with_timms_names(finished, tmp_path):
    flags = ["--checkpoint", str(finished[0] / "encoder.pth"), "--epochs", "0"]
    flags += ["--finetune-epochs", "1", "--finetune-blr", "1e-12", "--out-dir", str(tmp_path)]
    train_cifar.main([*SMALL, *flags, "--probe-epochs", "0"])
    saved = torch.load(tmp_path / "finetuned.pth", weights_only=True)
    assert saved.pop("head.weight").shape == (10, 192) and saved.pop("head.bias").shape == (10,)
    encoder = torch.load(finished[0] / "encoder.pth", weights_only=True)
    assert_same(dict(saved), dict(encoder), rtol=0, atol=1e-8)


def test_finetuning_drops_paths_and_leaves_the_pretrained_as_it_was(tmp_path):
    stage, pretrained = finetuning(tmp_path, "--finetune-blr", "1e-2")
    assert [block.drop_path for block in stage.model.encoder.blocks] == [0, 0.1]
    before = {name: p.clone() for name, p in pretrained.state_dict().items()}
    train_cifar.fit(stage)
    assert_same(dict(pretrained.state_dict()), before)
    assert not torch.equal(stage.model.encoder.norm.bias, pretrained.norm.bias)


@pytest.mark.parametrize("checkpoint, decay", [([], 0.75), (["none", "--epochs", "0"], 1.0)])
def test_finetuning_decays_the_rate_from_layer_to_layer(checkpoint, decay, tmp_path):
    flags = ["--checkpoint", *checkpoint] if checkpoint else []
    stage, _ = finetuning(tmp_path, *flags)
    train_cifar.fit(stage)
    optimizer, model = stage.optimizer, stage.model
    scale = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    layers = {"encoder.cls_token": 0, "encoder.patch_embed": 0, "encoder.blocks.0": 1}
    layers |= {"encoder.blocks.1": 2, "encoder.norm": 3, "head": 3}
    for name, p in model.named_parameters():
        if p.requires_grad:
            (layer,) = [
                layer
                for prefix, layer in layers.items()
                if name.startswith(prefix + ".") or name == prefix
            ]
            assert scale[p] == pytest.approx(decay ** (3 - layer))
    lrs = {group["lr"] / group["lr_scale"] for group in optimizer.param_groups}
    assert max(lrs) == pytest.approx(min(lrs)) and optimizer.defaults["betas"] == (0.9, 0.999)


def test_finetuning_reads_cls():
    classifier = train_cifar.Classifier(tiny_vit(), 5)
    assert 0 < classifier.head.weight.abs().max() < 1e-3 and not classifier.head.bias.any()
    unsettle(classifier)
    logits = classifier.head(classifier.encoder(random_images(3))[:, 0])
    assert logits.shape == (3, 5) and torch.equal(classifier(random_images(3)), logits)


def test_finetuning_learns_and_counts_each_test_image(tmp_path):
    images, labels = colours(37)
    labels[36] += 1  # labelled wrongly: 36 of 37 are right
    flags = ["--batch-size", "16", "--finetune-epochs", "6", "--finetune-blr", "3e-2"]
    stage, _ = finetuning(tmp_path, *flags, n=160, test=(images, labels))
    train_cifar.fit(stage)
    assert stage.accuracy() == pytest.approx(100 * 36 / 37)


def test_finetuning_mixes_smooths_and_crops(tmp_path, monkeypatch):
    targets, inputs, cross_entropy = [], [], F.cross_entropy
    forward = train_cifar.Classifier.forward

    def entropy(logits, target, **kwargs):
        targets.append((target, kwargs))
        return cross_entropy(logits, target, **kwargs)

    def seeing(self, images):
        inputs.append((images, self.training))
        return forward(self, images)

    monkeypatch.setattr(train_cifar.F, "cross_entropy", entropy)
    monkeypatch.setattr(train_cifar.Classifier, "forward", seeing)
    stage, _ = finetuning(tmp_path, "--batch-size", "16", "--finetune-epochs", "2")
    train_cifar.fit(stage)
    assert all(kwargs == {"label_smoothing": 0.1} for _, kwargs in targets)
    mixed = torch.cat([target for target, _ in targets])
    assert mixed.shape == (128, 4)
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(128))
    assert 0.2 < (mixed.amax(dim=1) < 0.999).float().mean() < 0.95  # some with their own kind
    train = torch.cat([images for images, training in inputs if training])
    rows_alike = (train - train[:, :, :1]).abs().amax(dim=(1, 2, 3)) < 1e-3
    assert 0.2 < rows_alike.float().mean() < 0.9  # CutMix pastes in boxes, MixUp does not
    rise = (train[:, :, 0, -1] - train[:, :, 0, 0]).amax(dim=1)[rows_alike]
    assert (rise > 0).any() and (rise <= 0).any()  # flips


def test_processes_share_the_features_that_a_probe_learns_from(monkeypatch):
    args, data = small("--batch-size", "32")
    probe = train_cifar.LinearProbe(args, data, train_cifar.build_encoder(args))
    unsettle(probe.model)
    ids, images, theta = drawn(args, data, torch.arange(32))
    expected = probe.loss(ids, images, theta, slice(0, 32), rng()).item()

    def part(rank, all_sum):
        monkeypatch.setattr(train_cifar, "RANK", rank)
        monkeypatch.setattr(train_cifar, "all_sum", all_sum)
        rows = slice(16 * rank, 16 * rank + 16)
        return probe.loss(ids[rows], images[rows], theta[rows], rows, rng()).item()

    monkeypatch.setattr(train_cifar, "WORLD_SIZE", 2)
    sent = [[], []]
    for rank in (0, 1):
        part(rank, lambda x: sent[rank].append(x.clone()) or x)
    for rank in (0, 1):
        sums = iter([a + b for a, b in zip(*sent)])
        assert part(rank, lambda x: next(sums)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["Pretraining", "FineTuning"])
def test_the_loss_is_of_the_model_that_sums_gradients(kind, tmp_path):
    args, data = small("--out-dir", str(tmp_path), "--finetune-epochs", "1")
    pretrained = [train_cifar.build_encoder(args)] if kind == "FineTuning" else []
    stage = getattr(train_cifar, kind)(args, data, *pretrained)
    called, model = [], stage.parallel
    stage.parallel = lambda *args: called.append(args) or model(*args)
    ids, images, theta = drawn(args, data, torch.arange(32))
    stage.loss(ids, images, theta, slice(0, 32), rng())
    assert len(called) == 1


STAGE_FILES = ["checkpoint.pth", "log.csv"]


def test_from_pretraining_to_finetuning_on_the_command_line(finished, tmp_path, capsys):
    # The probe and the fine-tuning of a saved encoder are those at the end of its run.
    run(copy(finished, tmp_path), "--resume", "--finetune-epochs", "1")
    ends = [line for line in capsys.readouterr().out.splitlines() if " right after epoch " in line]
    flags = ["--checkpoint", str(finished[0] / "encoder.pth"), "--epochs", "0"]
    flags += ["--finetune-epochs", "1", "--out-dir", str(tmp_path / "of")]
    train_cifar.main([*SMALL, *flags])
    again = [line for line in capsys.readouterr().out.splitlines() if " right after epoch " in line]
    assert len(ends) == 2 and ends == again
    assert {path.name for path in (tmp_path / "of").iterdir()} == {
        "finetuned.pth",
        *(f"{stage}-{file}" for stage in ("probe", "finetune") for file in STAGE_FILES),
    }
    line = error(*flags)
    assert "probe-checkpoint.pth and finetune-checkpoint.pth and finetuned.pth" in line
    assert "--resume" in line and "--out-dir" in line


def test_from_scratch_there_is_no_probe_unless_asked_for(tmp_path, capsys):
    flags = ["--dataset", "shapes", "--num-images", "64", "--depth", "1", "--finetune-epochs", "1"]
    train_cifar.main([*flags, "--checkpoint", "none", "--epochs", "0", "--out-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "fine-tuning: " in out and "probe" not in out
    flags = ["--checkpoint", "none", "--epochs", "0", "--probe-epochs", "3"]
    assert train_cifar.parse_args(flags).probe_epochs == 3
    assert not list(tmp_path.glob("probe-*")) and (tmp_path / "finetuned.pth").exists()


def save_as(kind, encoder, path):
    state = dict(encoder.state_dict())
    if kind == "checkpoint":
        rest = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
        state = {
            "model": {**{f"encoder.{name}": p for name, p in state.items()}, **rest},
            "epoch": 3,
        }
    if kind == "timm":
        state |= {"head.weight": torch.zeros(7, 192), "head.bias": torch.zeros(7)}
    if kind == "mae":
        state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.bias": torch.zeros(8)}
        state = {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 800}
    torch.save(state, path)


@pytest.mark.parametrize("kind", ["encoder", "checkpoint", "timm", "mae"])
def test_encoders_of_each_kind_load(kind, tmp_path):
    encoder = unsettle(amt.vit_tiny(img_size=32, patch_size=4, depth=1))
    encoder.pos_embed.data += 1  # as of one that has learned its positions
    save_as(kind, encoder, tmp_path / "saved.pth")
    loaded = train_cifar.load_encoder(small()[0], tmp_path / "saved.pth")
    assert_same(dict(loaded.state_dict()), dict(encoder.state_dict()))


def test_positions_of_another_grid_are_interpolated(tmp_path):
    large = unsettle(amt.vit_tiny(img_size=64, patch_size=4, depth=1))
    centres = {n: (2 * torch.arange(n) + 1) / n - 1 for n in (8, 16)}  # of n patches, in -1 to 1
    line = centres[16]
    large.pos_embed.data[0, 1:, 0] = line.repeat(16)  # column
    large.pos_embed.data[0, 1:, 1] = line.repeat_interleave(16)  # row
    save_as("encoder", large, tmp_path / "large.pth")
    loaded = train_cifar.load_encoder(small()[0], tmp_path / "large.pth")
    assert torch.equal(loaded.pos_embed[:, 0], large.pos_embed[:, 0])
    inner = loaded.pos_embed[0, 1:, :2].unflatten(0, (8, 8))[1:-1, 1:-1]
    line = centres[8]
    expected = torch.stack([line.expand(8, 8), line[:, None].expand(8, 8)], dim=2)[1:-1, 1:-1]
    torch.testing.assert_close(inner, expected, rtol=0, atol=0.02)
    assert_same(loaded.blocks.state_dict(), large.blocks.state_dict())


def test_positions_are_interpolated_as_in_timm(tmp_path):
    layers = pytest.importorskip("timm.layers")
    large = amt.vit_tiny(img_size=64, patch_size=4, depth=1)
    large.pos_embed.data = torch.randn(large.pos_embed.shape, generator=rng())
    save_as("encoder", large, tmp_path / "large.pth")
    loaded = train_cifar.load_encoder(small()[0], tmp_path / "large.pth")
    expected = layers.resample_abs_pos_embed(large.pos_embed.data, [8, 8])
    torch.testing.assert_close(loaded.pos_embed.data, expected)


@pytest.mark.parametrize(
    "sizes, misfits",
    [
        ({"depth": 2}, ["Unexpected key(s)", "blocks.1.attn.qkv.weight"]),
        (
            {"embed_dim": 96},
            ["size mismatch for cls_token", "[1, 1, 96]", "[1, 1, 192]", "blocks.0.mlp.fc2.bias"],
        ),
        ({"patch_size": 8}, ["patch_embed.proj.weight", "[192, 3, 8, 8]", "[192, 3, 4, 4]"]),
        ({"depth": 0}, ["Missing key(s)", "blocks.0.norm1.weight"]),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_with_what_differs(sizes, misfits, tmp_path):
    encoder = amt.vit_tiny(**{"img_size": 32, "patch_size": 4, "depth": 1, **sizes})
    save_as("encoder", encoder, tmp_path / "saved.pth")
    line = error(
        "--epochs",
        0,
        "--checkpoint",
        tmp_path / "saved.pth",
        "--out-dir",
        tmp_path / "out",
    )
    assert all(misfit in line for misfit in misfits) and "--depth" in line
    assert "pos_embed" not in line or "embed_dim" in sizes


@pytest.mark.parametrize("content", [None, "text", {"epoch": 3}, [1, 2]])
def test_a_file_without_an_encoder_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content == "text":
        (tmp_path / "saved.pth").write_text("no weights")
    elif content:
        torch.save(content, tmp_path / "saved.pth")
    flags = ["--epochs", 0, "--checkpoint", "saved.pth"]
    line = error(*flags, "--out-dir", tmp_path / "out")
    assert "--checkpoint saved.pth is not a state dict of a ViT" in line


def test_a_file_that_would_execute_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Harmful(), tmp_path / "saved.pth")
    error("--epochs", 0, "--checkpoint", "saved.pth", "--out-dir", "out")
    assert not (tmp_path / "harm").exists()


def make_folder(root, dataset="folder"):
    """Two classes of 17 training images each, of one colour, in many sizes and modes, and of three
    test images each; in one of the two layouts."""
    modes = itertools.cycle(["RGB", "L", "RGBA", "P", "CMYK"])
    annotations = []
    for kind, colour in [("n01", "black"), ("n02", "white")]:
        for split_name, n in [("train", 17), ("val", 3)]:
            for i in range(n):
                mode = next(modes)
                suffix = "png" if mode in ("RGBA", "P") else "JPEG"
                name = f"{kind}_{i}.{suffix}"
                path = root / split_name / kind / name
                if dataset == "tiny-imagenet":
                    path = root / split_name / "images" / name
                    if split_name == "train":
                        path = root / split_name / kind / "images" / name
                    else:
                        annotations.append(f"{name}\t{kind}\t0\t0\t62\t62\n")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20 + 3 * i, 44 - i), colour).convert(mode).save(path)
    if dataset == "tiny-imagenet":
        (root / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    return root


@pytest.mark.parametrize("dataset, size", [("folder", 224), ("tiny-imagenet", 64)])
def test_images_in_folders(dataset, size, tmp_path):
    make_folder(tmp_path, dataset)
    flags = ["--dataset", dataset, "--data-path", str(tmp_path)]
    args = train_cifar.parse_args(flags)
    assert args.img_size == size and size % args.patch_size == 0
    flags += ["--img-size", "32", "--patch-size", "4"]
    data = train_cifar.load_data(train_cifar.parse_args(flags))
    assert data.train.shape == (34, 3, 32, 32) and data.train.dtype == torch.uint8
    assert data.train_labels.tolist() == 17 * [0] + 17 * [1]
    assert data.test.shape == (6, 3, 32, 32)
    for pixels, labels in [(data.train, data.train_labels), (data.test, data.test_labels)]:
        assert (pixels.float() - 255 * labels[:, None, None, None]).abs().max() < 4
    assert data.test_labels.sum() == 3 and data.classes == 2


def test_images_in_folders_keep_their_middle_square(tmp_path):
    make_folder(tmp_path)
    ramp = np.arange(128, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "train" / "n01" / "a.png")  # 128 wide, 64 high
    flags = ["--dataset", "folder", "--data-path", str(tmp_path)]
    args = train_cifar.parse_args([*flags, "--img-size", "32", "--patch-size", "4"])
    expected = torch.arange(32).expand(3, 32, 32) * 2 + 32.5
    assert (train_cifar.load_data(args).train[0] - expected).abs().max() <= 1.5


def test_folders_too_large_to_hold_stay_on_the_disk(tmp_path):
    make_folder(tmp_path)
    flags = ["--dataset", "folder", "--data-path", str(tmp_path), "--patch-size", "1000"]
    data = train_cifar.load_data(train_cifar.parse_args([*flags, "--img-size", "5000"]))
    assert isinstance(data, train_cifar.Files)  # 40 images of 75 MB


def test_train_on_a_folder_from_the_command_line(tmp_path, capsys):
    make_folder(tmp_path / "images")
    flags = ["--dataset", "folder", "--data-path", str(tmp_path / "images"), "--img-size", "32"]
    run(tmp_path / "out", *flags, "--patch-size", "8", "--epochs", "2", "--update-interval", "1")
    assert "34 training and 6 test images" in capsys.readouterr().out
    picture = np.array(Image.open(tmp_path / "out" / "masking.png"))
    assert picture.shape == (4 * 132 + 4, 6 * 132 + 4, 3)


def picture(width, height, seed=0):
    """A smooth random image, no two of whose places look alike."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_pictures(root):
    """Two classes with pictures of many sizes and modes: 37 to train on and 7 to test."""
    kinds = itertools.cycle(["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", *"2345678"])
    for i in range(44):
        kind, image = next(kinds), picture(20 + 7 * i, 300 - 6 * i, i)
        path = root / ("train" if i < 37 else "val") / f"n{i % 2}" / str(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind.isdigit() and kind != "1":  # turned or mirrored, as EXIF says
            exif = Image.Exif()
            exif[0x0112] = int(kind)
            image.save(path.with_suffix(".jpg"), exif=exif)
        else:
            suffix = ".JPEG" if kind in ("RGB", "L", "CMYK") else ".png"
            image.convert(kind).save(path.with_suffix(suffix))
    return root


ON_DISK = ["--dataset", "imagenet", "--model", "vit_tiny", "--img-size", "32", "--patch-size", "8"]
ON_DISK += ["--blr", "1e-2", "--batch-size", "12", "--num-images", "2500"]


def on_disk(root, *flags):
    args = train_cifar.parse_args([*SMALL, *ON_DISK, "--data-path", str(root), *flags])
    return args, train_cifar.load_data(args)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_images_on_disk_are_shown_as_they_are_cropped(workers, tmp_path):
    args, data = on_disk(make_pictures(tmp_path), "--workers", workers)
    assert isinstance(data, train_cifar.Files) and len(data.train) == 37 and len(data.test) == 7
    assert data.train_labels.tolist() == [int("/n1/" in path) for path in data.train]
    assert data.test_labels.tolist() == [int("/n1/" in path) for path in data.test]
    order = torch.randperm(37, generator=rng())
    ids, images, theta = drawn(args, data, order)
    assert torch.equal(ids, order) and images.shape == (37, 3, 32, 32)
    assert ((theta[:, 0, 0] < 0).sum() - 18).abs() < 10  # flips
    for number, image, crop in zip(ids.tolist(), images, theta):
        with Image.open(data.train[number]) as file:
            whole = ImageOps.exif_transpose(file).convert("RGB")
        W, H = whole.size
        area, aspect = (crop[0, 0] * crop[1, 1]).abs(), W / H * (crop[0, 0] / crop[1, 1]).abs()
        inner = max(crop[0, 0].abs(), crop[1, 1].abs()) < 0.95  # not cut short by the image's side
        assert area < 1.01 and (not inner or (area > 0.18 and 0.7 < aspect < 1.42))
        box = [((s * crop[i, i].abs() + crop[i, 2] + 1) / 2) for s in (-1, 1) for i in (0, 1)]
        box = [(x * side).item() for x, side in zip(box, [W, H, W, H])]
        expected = whole.resize((32, 32), Image.Resampling.BICUBIC, [max(x, 0) for x in box])
        expected = ImageOps.mirror(expected) if crop[0, 0] < 0 else expected
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
        assert (image - expected).abs().mean() < (20 if whole.mode == "1" else 6)


def test_images_on_disk_are_whole_for_their_maps_and_cut_for_the_test(tmp_path):
    args, data = on_disk(make_pictures(tmp_path), "--workers", "1")
    for split_name, paths in [("train", data.train), ("test", data.test)]:
        ids = torch.arange(len(paths) - 1, 0, -2)
        batches = list(data.whole(args, split_name, ids))
        assert torch.equal(torch.cat([some for some, _ in batches]), ids)
        for number, image in zip(ids.tolist(), torch.cat([images for _, images in batches])):
            with Image.open(paths[number]) as file:
                whole = ImageOps.exif_transpose(file).convert("RGB")
            W, H = whole.size
            side = 0.875 * min(W, H)  # of the test images, the middle
            box = [(W - side) / 2, (H - side) / 2, (W + side) / 2, (H + side) / 2]
            box = [0, 0, W, H] if split_name == "train" else box
            expected = whole.resize((32, 32), Image.Resampling.BICUBIC, box)
            expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
            assert (image - expected).abs().mean() < 6


def test_a_crop_is_of_the_nearest_whole_pixels_at_least_one(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 9, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    decoder = train_cifar.Decoder([tmp_path / "a.png"], 32)
    for seed, scale in itertools.product(range(20), [(0.05, 0.1), (0.2, 1.0)]):
        _, pixels, theta = decoder[0, (scale, False), seed]
        (drawn,) = amt.random_crops(1, scale, generator=rng(seed), image_ratio=9 / 4)
        boxes = []
        for x in (drawn, theta):
            side, middle = x[[0, 1], [0, 1]].abs(), x[:, 2] + 1
            boxes.append(torch.cat([middle - side, middle + side]) / 2 * torch.tensor([9, 4, 9, 4]))
        box = boxes[1].round()
        torch.testing.assert_close(boxes[1], box, rtol=0, atol=1e-4)  # theta is of what is shown
        assert (box[:2] >= 0).all() and (box[2:] > box[:2]).all()
        nearest = (box - boxes[0]).abs() < 0.501
        assert (nearest | (box[2:] - box[:2] == 1).repeat(2)).all()
        shown = image.crop(box.int().tolist()).resize((32, 32), Image.Resampling.BICUBIC)
        shown = ImageOps.mirror(shown) if theta[0, 0] < 0 else shown
        assert np.abs(np.array(shown).astype(int) - pixels.numpy()).max() <= 2
        assert (theta[0, 0] < 0) == (drawn[0, 0] < 0)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_no_larger_than_the_crop_needs(orientation, tmp_path, monkeypatch):
    decoded, decoder = [], train_cifar.Decoder([tmp_path / "a.jpg"], 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(1000, 600).save(tmp_path / "a.jpg", exif=exif)
    load = JpegImageFile.load_prepare
    monkeypatch.setattr(
        JpegImageFile, "load_prepare", lambda self: decoded.append(self.size) or load(self)
    )
    for seed in range(40):
        pixels, theta = decoder[0, ((0.02, 1.0), False), seed][1:]
        W, H = decoded[-1] if orientation == 1 else decoded[-1][::-1]
        share = min(theta[0, 0].abs() * W, theta[1, 1] * H).item()
        assert share > 63  # a pixel for each of the crop's, but for rounding
        assert share < 2 * 65 or decoded[-1] == (125, 75)
    assert {size for size in decoded} == {(1000, 600), (500, 300), (250, 150), (125, 75)}
    assert decoder[0, "whole", 0][1].shape == (64, 64, 3) and decoded[-1] == (125, 75)


def test_randaugment_in_a_worker_follows_the_images_seed(tmp_path, monkeypatch):
    picture(50, 50).save(tmp_path / "a.png")
    decoder = train_cifar.Decoder([tmp_path / "a.png"], 32)
    plain, augmented = ((0.2, 1.0), False), ((0.2, 1.0), True)
    torch.manual_seed(1)
    first = [decoder[0, augmented, seed][1] for seed in range(6)]
    torch.manual_seed(2)
    again = [decoder[0, augmented, seed][1] for seed in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    same = [torch.equal(image, decoder[0, plain, seed][1]) for seed, image in enumerate(first)]
    assert sum(same) < 4


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_augments_an_image_is_its_own_and_of_the_generator(where, tmp_path):
    if where == "disk":
        args, data = on_disk(make_pictures(tmp_path), "--workers", "0")
    else:
        args, data = small("--batch-size", "12")
    order = torch.arange(36)

    def crops(mine, augment, seed):
        torch.manual_seed(seed)  # of no account
        batches = data.crops(args, (0.05, 0.1), augment, order, mine, rng())
        _, images, theta = (torch.cat(parts) for parts in zip(*batches))
        return images, theta

    (plain, theta), (augmented, same) = (crops(order, augment, 0) for augment in (False, True))
    assert torch.equal(theta, same) and (theta[:, 0, 0] * theta[:, 1, 1]).abs().max() < 0.15
    changed = (plain != augmented).flatten(1).any(dim=1).sum()
    assert 18 < changed and torch.equal(crops(order[20:], True, 1)[0], augmented[20:])


def test_a_process_names_the_image_that_it_alone_cannot_decode(tmp_path, monkeypatch):
    args, data = on_disk(make_pictures(tmp_path), "--workers", "0")
    Path(data.train[3]).write_bytes(b"")
    monkeypatch.setattr(train_cifar, "LOCAL_RANK", 1)
    with pytest.raises(SystemExit, match=f"error: cannot decode {data.train[3]} "):
        list(data.whole(args, "train", torch.arange(12)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlast_a_signal_to_all(number, tmp_path):
    args, data = on_disk(make_pictures(tmp_path), "--workers", "1", "--batch-size", "4")
    before = set(multiprocessing.active_children())
    batches = data.whole(args, "train", torch.arange(37))
    first = next(batches)
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, number)
    assert torch.equal(torch.cat([ids for ids, _ in [first, *batches]]), torch.arange(37))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_workers_and_processes_change_nothing(tmp_path):
    root = make_pictures(tmp_path / "images")
    flags = [*ON_DISK, "--data-path", str(root), "--epochs", "3", "--update-interval", "1"]
    flags += ["--finetune-epochs", "1", "--seed", "3"]
    none = run(tmp_path / "none", *flags, "--workers", "0")
    three = run(tmp_path / "three", *flags, "--workers", "3")
    assert_same(trained(none), trained(three))
    assert none["maps"].shape == (37, 4, 4) and none["maps"].dtype == torch.float16
    tuned = [
        torch.load(tmp_path / d / "finetuned.pth", weights_only=True) for d in ("none", "three")
    ]
    assert_same(*tuned)
    flags += ["--workers", 1, "--batch-size", 3, "--accum-steps", 2, "--out-dir", tmp_path]
    codes, said = two_processes(*flags, out=tmp_path / "said")
    assert codes == [0, 0], said
    two = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    losses = [column(d, "loss") for d in (tmp_path, tmp_path / "none")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_same(two["maps"].float(), none["maps"].float(), rtol=1e-2, atol=1e-2)
    losses = [column(d, "loss") for d in (tmp_path / "none", tmp_path / "three")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("n", [70, 7, 2])
def test_maps_do_not_depend_on_the_number_of_processes(n, monkeypatch):
    args, data = small()
    data.train = data.train[:n]
    encoder = train_cifar.build_model(args).encoder
    whole = train_cifar.update_maps(args, encoder, data)
    assert whole.dtype == torch.float16 and whole.amax(dim=(1, 2)).eq(1).all()
    monkeypatch.setattr(train_cifar, "all_sum", lambda x: x)
    monkeypatch.setattr(train_cifar, "wait", lambda: None)
    for processes in (2, 3):
        parts = []
        monkeypatch.setattr(train_cifar, "WORLD_SIZE", processes)
        for rank in range(processes):
            monkeypatch.setattr(train_cifar, "RANK", rank)
            parts.append(train_cifar.update_maps(args, encoder, data))
        torch.testing.assert_close(sum(parts), whole, rtol=0, atol=2e-3)
        assert all((sum(part.amax(dim=(1, 2)) > 0 for part in parts)) == 1)
        assert max(len(part[part.amax(dim=(1, 2)) > 0]) for part in parts) <= n // processes + 1


@pytest.mark.parametrize(
    "strategy, updated, used",
    [
        ("attmask", True, "attmask"),
        ("attmask", False, "random"),
        ("attention", True, "attention"),
        ("grid", False, "grid"),
    ],
)
def test_the_picture_shows_the_strategy(strategy, updated, used, tmp_path, monkeypatch):
    names = []
    for name, rank in list(amt.STRATEGIES.items()):
        monkeypatch.setitem(
            amt.STRATEGIES, name, lambda *args, n=name, rank=rank: names.append(n) or rank(*args)
        )
    flags = ["--masking", strategy, "--method", "simmim", "--out-dir", str(tmp_path)]
    stage = train_cifar.Pretraining(*small(*flags))
    if updated:
        stage.run["maps"] = torch.ones(70, 8, 8)
    train_cifar.save_masking(stage)
    assert names == [used]


def test_pictures_are_of_images_from_all_over_the_test_set():
    args, data = small()
    data.test = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(-1, 3, 2, 2)
    shown = data.shown(args)[:, 0, 0, 0]
    assert len(shown.unique()) == 8 and shown.min() < 30 and shown.max() >= 70


def test_folders_that_are_wrong_are_named(tmp_path):
    def refused(*more, dataset="folder"):
        flags = ["--dataset", dataset, "--data-path", root, "--out-dir", tmp_path / "out"]
        return error(*flags, "--model", "vit_tiny", "--decoder-embed-dim", 96, *more)

    root = make_folder(tmp_path / "a")
    (root / "val").rename(root / "test")
    line = refused()
    assert f"--data-path {root}" in line and "--dataset folder" in line and "val" in line
    assert "val_annotations.txt" in refused(dataset="tiny-imagenet")
    (root / "test").rename(root / "val")
    (root / "val" / "n02").rename(root / "val" / "n03")
    assert re.search("class 'n03' of .*val is not among the 2 of .*train", refused())
    (root / "val" / "n03").rename(root / "val" / "n02")
    for split_name in ("train", "val"):
        (root / split_name / "n03").mkdir()
        line = refused(dataset="imagenet")
        assert "n03" in line and str(root) in line  # a class without images
        (root / split_name / "n03").rmdir()
    assert "a batch of 35 is more than the 34 training images" in refused(
        "--batch-size", 35, dataset="imagenet"
    )
    broken = root / "train" / "n02" / "n02_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    for dataset in ("folder", "imagenet"):
        for workers in (0, 2):
            line = refused("--img-size", 64, "--workers", workers, dataset=dataset)
            assert f"error: cannot decode {broken} (" in line and line.endswith("take it away")
    for path in [*root.glob("*/*/*")]:
        path.unlink()
    assert "n01" in refused()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"log.csv"}


def test_stl10_pretrains_on_all_and_probes_on_those_with_labels(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, 96, 96), dtype=np.uint8)
    downloads = []

    class Fake:
        def __init__(self, root, split="train", download=False):
            downloads.append((split, download))
            self.data = {"train+unlabeled": pixels, "test": pixels[:4]}.get(split)
            self.labels = np.array(
                [2, 0, 1, 1, -1, -1, -1, -1, -1] if "un" in split else [0, 1, 2, 0]
            )

    monkeypatch.setattr(train_cifar, "STL10", Fake)
    flags = ["--dataset", "stl10", "--data-path", str(tmp_path)]
    args = train_cifar.parse_args(flags)
    assert (args.img_size, args.patch_size) == (96, 8)
    data = train_cifar.load_data(args)
    assert torch.equal(data.train, torch.from_numpy(pixels))
    assert data.train_labels.tolist() == [2, 0, 1, 1] and data.test_labels.tolist() == [0, 1, 2, 0]
    assert data.train_labels.dtype == torch.int64 and data.classes == 3
    assert downloads[0][1] and not any(download for _, download in downloads[1:])
    args = train_cifar.parse_args(["--dataset", "stl10", "--img-size", "48"])
    assert train_cifar.load_data(args).train.shape == (9, 3, 48, 48)

    line = error(*flags, "--batch-size", 5, "--out-dir", tmp_path / "out")
    assert "a batch of 5 is more than the 4 training images with labels" in line

    # The probe takes the labelled ones alone.
    args = train_cifar.parse_args(["--batch-size", "4", "--probe-epochs", "2", "--img-size", "96"])
    encoder = ColourEncoder()
    probe = train_cifar.LinearProbe(args, data, encoder, short=True)
    probe.epochs = 2
    train_cifar.fit(probe)
    probe.accuracy()
    assert sum(len(seen) for seen in encoder.seen) == 4 + 4 + 4


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_torchvisions(name, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 32, 32, 3), dtype=np.uint8)
    roots = []

    class Fake:
        def __init__(self, root, train=True, download=False):
            roots.append(root)
            self.data, self.targets = pixels[0 if train else 1], [3, 1, 2, 0, 5, 4]

    monkeypatch.setattr(train_cifar, name, Fake)
    args = train_cifar.parse_args(["--dataset", name.lower(), "--data-path", str(tmp_path)])
    data = train_cifar.load_data(args)
    for ours, theirs in [(data.train, pixels[0]), (data.test, pixels[1])]:
        assert torch.equal(ours.permute(0, 2, 3, 1), torch.from_numpy(theirs))
    assert data.train_labels.tolist() == data.test_labels.tolist() == [3, 1, 2, 0, 5, 4]
    assert set(roots) == {str(tmp_path)}


def test_shapes_are_the_same_each_time_and_balanced():
    (images, labels), (again, _) = train_cifar.shapes(200, 1), train_cifar.shapes(200, 1)
    assert (
        images.shape == (200, 3, 32, 32)
        and images.dtype == torch.uint8
        and torch.equal(images, again)
    )
    assert labels.bincount().tolist() == 10 * [20]
    assert not torch.equal(images, train_cifar.shapes(200, 2)[0])


@pytest.mark.parametrize(
    "method, names",
    [
        ("mae", ["random 0.75", "AMT 0.45/0.40"]),
        ("simmim", ["random 0.60", "AMT 0.44/0.26", "AMT 0.33/0.50"]),
    ],
)
def test_benchmark_has_a_row_a_strategy(method, names, capsys, tmp_path, monkeypatch):
    steps = record(monkeypatch)
    flags = ["--benchmark", "--method", method, "--batch-size", "4", "--out-dir", tmp_path / "none"]
    train_cifar.main([*SMALL, *map(str, flags)])
    *_, last = lines = capsys.readouterr().out.replace(",", "").splitlines()
    assert [line[:13].strip() for line in lines[-1 - len(names) : -1]] == names
    matmul = float(re.search(r"matmul ([\d.]+) TFLOP/s", lines[1])[1])
    rows = [re.findall(r"[\d.]+", line[13:]) for line in lines[-1 - len(names) : -1]]
    rows = [list(map(float, row)) for row in rows]
    for encoder, decoder, ms, images, of_time, of_operations, memory, share, choice in rows:
        assert images == pytest.approx(4 / ms * 1000, rel=0.1) and memory > 0.1
        assert of_time == pytest.approx(ms / rows[0][2], abs=0.1)
        ratio = (encoder + decoder) / sum(rows[0][:2])
        assert of_operations == pytest.approx(ratio, abs=0.02)
        rate = (encoder + decoder) * images / 1000  # in TFLOP/s
        assert share == pytest.approx(100 * rate / matmul, rel=0.1, abs=1)
        assert 0 < choice < 100
    update, interval, share = map(float, re.findall(r"[\d.]+", last)[:3])
    assert share == pytest.approx(100 * rows[1][3] / update / interval, rel=0.1)
    assert not (tmp_path / "none").exists()
    # Each row is of its own strategy and ratios.
    found = {(step["maps"] is not None, step["ratios"]) for step in steps}
    given = train_cifar.METHODS[method]
    assert found == {(False, given.random), *((True, ratios) for ratios in given.amt)}


def test_operations_are_those_of_the_products():
    def blocks(T, D, depth):  # qkv, proj and mlp; q k^T and a v; and twice that for gradients
        return 3 * depth * 2 * (12 * T * D**2 + 2 * T**2 * D)

    args = train_cifar.parse_args([*SMALL, "--depth", "3", "--decoder-depth", "2"])
    encoder, decoder = train_cifar.operations(args, (0.45, 0.40))
    # Of 64 patches 29 are masked and 9 visible; images have no gradient.
    assert encoder == blocks(1 + 9, 192, 3) + 2 * 2 * 9 * 48 * 192
    assert decoder == blocks(1 + 9 + 29, 32, 2) + 3 * 2 * (10 * 192 * 32 + 29 * 32 * 48)
    args = train_cifar.parse_args([*SMALL, "--depth", "3", "--method", "simmim"])
    encoder, decoder = train_cifar.operations(args, (0.44, 0.26))
    # Of 16 units of 4 patches 7 are masked and 5 visible.
    assert encoder == blocks(1 + 48, 192, 3) + 2 * 2 * 20 * 48 * 192
    assert decoder == 3 * 2 * 28 * 192 * 48


class Waits(TorchDispatchMode):
    """Counts what makes the program wait for a GPU: values or shapes that depend on values."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        if name in self.names or name.startswith("index") and any(
            x.dtype == torch.bool for x in tensors[1:]
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masking", amt.STRATEGIES)
@pytest.mark.parametrize("method", train_cifar.METHODS)
def test_no_step_waits_for_the_device(method, masking):
    args, data = small("--method", method, "--masking", masking, "--precision", "bf16")
    stage, ids = train_cifar.Pretraining(args, data), torch.arange(32)
    stage.run["maps"] = torch.rand(70, 8, 8, generator=rng()).half()
    with Waits() as waits:
        crops = next(data.crops(args, stage.scale, False, ids, ids, rng()))
        stage.loss(*crops, slice(0, 32), rng()).backward()
    assert waits.found == []
    with waits:
        (ids > 3).any().item(), ids[ids > 3]
    assert len(waits.found) == 2


# ------------------------------------------------------------------------------------------------
# Runs that are stopped, and several processes


def command(*flags):
    return [sys.executable, str(HERE / "train_cifar.py"), *SMALL, *map(str, flags)]


FORKS = multiprocessing.get_context("forkserver")  # of a process that has the imports behind it
FORKS.set_forkserver_preload(["torchvision.datasets", "torchvision.transforms.v2"])


def two_processes(*flags, out, program=HERE / "train_cifar.py"):
    """Runs the script, or another one, in two processes; their exit codes and what they print.

    The files `out`-0 and `out`-1 get it, so that no process waits for a reader.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    argv = [str(program), *command(*flags)[2:]]
    processes = []
    for rank in range(2):
        source = f"""
import os, runpy, sys, torch
os.dup2(os.open("{out}-{rank}", os.O_WRONLY | os.O_CREAT), 1)
os.dup2(1, 2)
os.environ.update({env}, MASTER_PORT="{port}", RANK="{rank}", LOCAL_RANK="{rank}")
sys.argv = {argv}
torch.set_num_threads(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
        processes.append(FORKS.Process(target=exec, args=(source,)))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    said = [Path(f"{out}-{rank}").read_text() for rank in range(2)]
    return [process.exitcode for process in processes], "".join(said)


def test_killed_and_resumed_run_ends_with_the_same_weights(finished, tmp_path):
    with subprocess.Popen(
        command("--out-dir", tmp_path), stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("pretraining epoch 4/6"):  # with maps that epochs 3 and 4 use
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    (tmp_path / "log.csv").open("a").write("5,0.1")  # a row cut short by the kill
    assert_same(trained(run(tmp_path, "--resume")), trained(finished[1]))
    assert_same(
        *(torch.load(d / "encoder.pth", weights_only=True) for d in (tmp_path, finished[0]))
    )
    assert logged_epochs(tmp_path) == list(range(1, 7))


@pytest.fixture(scope="module")
def tuned(finished, tmp_path_factory):
    """The finished run, and its fine-tuning: the directory. Read, never written."""
    out_dir = copy(finished, tmp_path_factory.mktemp("tuned"))
    run(out_dir, "--resume", "--finetune-epochs", "2")
    return out_dir


@pytest.mark.parametrize(
    "number, kind, call, where",
    [
        (signal.SIGTERM, "Pretraining", 7, "pretraining, epoch 4, after step 1"),
        (signal.SIGINT, "Pretraining", 8, "pretraining, epoch 4, after step 2"),
        (signal.SIGTERM, "LinearProbe", 2, "probe, epoch 1, after step 2"),
        (signal.SIGINT, "FineTuning", 3, "fine-tuning, epoch 2, after step 1"),
    ],
)
def test_a_signal_ends_the_step_saves_and_stops(
    number, kind, call, where, tuned, tmp_path, monkeypatch, capsys
):
    flags = ["--save-every", "9", "--finetune-epochs", "2"]  # it is the signal that saves
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        calls = signalled_in_step(patch, kind, call, number)
        run(tmp_path, *flags)
    assert caught.value.code == 128 + number and len(calls) == call
    train_cifar.SIGNALS.clear()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name} in {where}: ") and "--resume" in last
    assert signal.getsignal(number) is before
    run(tmp_path, *flags, "--resume")
    assert_same_runs(tmp_path, tuned)


def signalled_in_step(patch, kind, call, number):
    """Has the process get a signal in that step of a stage; the steps that it takes."""
    loss, calls = getattr(train_cifar, kind).loss, []

    def signalled(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return loss(*args)

    patch.setattr(getattr(train_cifar, kind), "loss", signalled)
    return calls


def assert_same_runs(*out_dirs):
    for prefix in ("", "probe-", "finetune-"):
        files = [d / f"{prefix}checkpoint.pth" for d in out_dirs]
        a, b = (torch.load(file, weights_only=True) for file in files)
        for name in ("model", "optimizer", "epoch", "step", "losses", "maps", "snapshots"):
            assert_same(a.get(name), b.get(name))
        rows = [(d / f"{prefix}log.csv").read_text().splitlines() for d in out_dirs]
        a, b = ([row.split(",")[:3] for row in some] for some in rows)
        assert a == b and len(a) > 1
    assert_same(*(torch.load(d / "finetuned.pth", weights_only=True) for d in out_dirs))


def test_a_signal_while_maps_are_updated(finished, tmp_path, monkeypatch, capsys):
    weights, calls = amt.masking_weights, []

    def signalled(*args):
        calls.append(args)
        if len(calls) == 6:  # in the second update, before epoch 5
            os.kill(os.getpid(), signal.SIGTERM)
        return weights(*args)

    monkeypatch.setattr(amt, "masking_weights", signalled)
    with pytest.raises(SystemExit):
        run(tmp_path, "--save-every", "9")
    assert len(calls) == 6
    train_cifar.SIGNALS.clear()
    assert "in pretraining, epoch 5, after step 0:" in capsys.readouterr().out
    assert_same(trained(run(tmp_path, "--resume")), trained(finished[1]))


def test_a_signal_in_a_short_probe(finished, tmp_path, monkeypatch, capsys):
    flags = ["--probe-every", "4", "--save-every", "9"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signalled_in_step(patch, "LinearProbe", 1, signal.SIGTERM)
        run(tmp_path, *flags)
    train_cifar.SIGNALS.clear()
    assert "--resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == 2
    assert_same(trained(run(tmp_path, *flags, "--resume")), trained(finished[1]))
    assert logged_epochs(tmp_path) == list(range(1, 7))
    accuracy = [row.split(",")[-1] for row in (tmp_path / "log.csv").read_text().splitlines()]
    assert [text != "" for text in accuracy[1:]] == [i == 4 for i in range(1, 7)]


@pytest.mark.parametrize(
    "action, message, codes, epoch, step",
    [
        (
            "os.kill(os.getpid(), 15)",
            "stopped by SIGTERM in pretraining, epoch 3, after step 1",
            [143, 143],
            2,
            1,
        ),
        ("result = result * float('nan')", "the loss is nan in epoch 3, step 1", [1, 1], 2, 0),
        ("os.kill(os.getpid(), 9)", "lost another process", [1, -9], 2, 0),
    ],
)
def test_what_one_process_meets_ends_all(
    action, message, codes, epoch, step, tmp_path, monkeypatch
):
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import os, train_cifar
loss, calls = train_cifar.Pretraining.loss, []
def failing(*args):
    calls.append(args)
    result = loss(*args)
    if train_cifar.RANK == 1 and len(calls) == 5:
        {action}
    return result
train_cifar.Pretraining.loss = failing
train_cifar.main()
"""
    )
    flags = ["--batch-size", 16, "--out-dir", tmp_path / "out"]
    ends, said = two_processes(*flags, out=tmp_path / "said", program=program)
    assert ends == codes, said
    assert message in said and ("--resume" in said or "lower learning rate" in said)
    assert said.count("error: the loss is nan") <= 1
    saved = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (epoch, step)
    assert all(p.isfinite().all() for p in saved["model"].values())
    if "SIGTERM" in message:  # what one process has of both's losses, and the step's mean
        signalled_in_step(monkeypatch, "Pretraining", 5, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(tmp_path)
        train_cifar.SIGNALS.clear()
        one = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        torch.testing.assert_close(saved["losses"], one["losses"], rtol=1e-4, atol=0)


def test_the_log_counts_each_second_of_training_once(tmp_path, monkeypatch):
    now, calls = [train_cifar.time.time()], []

    def taking(seconds, function):
        def slow(*args):
            now[0] += seconds
            calls.append(seconds)
            if calls.count(1) == 7 and seconds == 1:  # epoch 4, step 1
                train_cifar.SIGNALS.append(signal.SIGTERM)
            return function(*args)

        return slow

    monkeypatch.setattr(train_cifar, "SIGNALS", [])
    monkeypatch.setattr(train_cifar.time, "time", lambda: now[0])
    monkeypatch.setattr(train_cifar.Pretraining, "loss", taking(1, train_cifar.Pretraining.loss))
    monkeypatch.setattr(train_cifar, "update_maps", taking(100, train_cifar.update_maps))
    flags = ["--probe-epochs", "0", "--save-every", "9"]
    with pytest.raises(SystemExit):
        run(tmp_path, *flags)
    train_cifar.SIGNALS.clear()
    now[0] += 5000
    checkpoint = run(tmp_path, "--resume", *flags)
    assert column(tmp_path, "seconds") == pytest.approx([2, 2, 102, 2, 102, 2])
    assert column(tmp_path, "update_seconds") == pytest.approx([0, 0, 100, 0, 100, 0])
    assert column(tmp_path, "images_per_second") == 6 * [32]
    assert checkpoint["seconds"] == pytest.approx(212)


def test_resume_restores_the_log_of_its_checkpoint(finished, tmp_path):
    log = copy(finished, tmp_path).joinpath("log.csv")
    before = log.read_text()
    log.write_text(before + "7,0.1")  # of an epoch after the checkpoint
    run(tmp_path, "--resume", "--probe-epochs", "0")
    assert log.read_text() == before


def test_a_row_of_the_log_is_there_before_its_checkpoint(tmp_path, monkeypatch):
    save, rows = train_cifar.save_checkpoint, []

    def saving(stage):
        rows.append(logged_epochs(tmp_path))
        save(stage)

    monkeypatch.setattr(train_cifar, "save_checkpoint", saving)
    run(tmp_path, "--epochs", "2", "--probe-epochs", "0")
    assert rows == [[1], [1, 2]]


def test_maps_are_given_up_when_another_process_has_a_signal(monkeypatch):
    args, data = small()
    encoder = train_cifar.build_model(args).encoder
    monkeypatch.setattr(train_cifar, "all_sum", lambda x: x + 1)
    assert train_cifar.update_maps(args, encoder, data) is None


def test_a_checkpoint_of_another_version_is_refused(finished, tmp_path):
    checkpoint = dict(finished[1])
    checkpoint.pop("epoch_began")
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert "of another version" in error("--out-dir", tmp_path, "--resume", "--probe-epochs", 0)


def test_processes_that_find_different_checkpoints_stop(finished, tmp_path, monkeypatch):
    flags = ["--out-dir", str(copy(finished, tmp_path)), "--resume"]
    stage = train_cifar.Pretraining(*small(*flags))
    monkeypatch.setattr(train_cifar, "WORLD_SIZE", 2)
    monkeypatch.setattr(train_cifar, "wait", lambda: None)
    monkeypatch.setattr(train_cifar, "all_sum", lambda x: x)  # the other one has none
    with pytest.raises(SystemExit, match="different checkpoints: --out-dir .* one directory"):
        train_cifar.load_checkpoint(stage)


@pytest.mark.parametrize(
    "processes, message, lost",
    [
        (1, "[Errno 104] Connection reset by peer", False),
        (2, "[gloo/transport/tcp/pair.cc:534] Connection closed by peer", True),
        (2, "mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_only_a_lost_process_is_called_one(
    processes, message, lost, tmp_path, monkeypatch, capsys
):
    def failing(args):
        raise RuntimeError(message)

    monkeypatch.setattr(train_cifar, "run", failing)
    monkeypatch.setattr(train_cifar, "WORLD_SIZE", processes)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(train_cifar.dist, name, lambda *args, **kwargs: None)
    with pytest.raises(SystemExit, match="lost another process .*--resume" if lost else "^1$"):
        train_cifar.main([*SMALL, "--out-dir", str(tmp_path)])
    assert (f"RuntimeError: {message}" in capsys.readouterr().err) is not lost


def test_resumed_epochs_use_the_maps_of_the_checkpoint(finished, tmp_path, monkeypatch):
    loss, calls = train_cifar.Pretraining.loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 8:  # epoch 4, step 2
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(train_cifar.Pretraining, "loss", interrupted)
    with pytest.raises(SystemExit, match="stopped: .*--resume goes on from the last checkpoint"):
        run(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 3
    checkpoint = run(tmp_path, "--resume", "--probe-epochs", "0")
    assert_same(trained(checkpoint), trained(finished[1]))


def test_settings_of_a_checkpoint_are_all_that_its_weights_depend_on(finished):
    others = {"data_path", "out_dir", "resume", "save_every", "compile", "benchmark", "checkpoint"}
    others |= {"num_units", "batch_size", "accum_steps", "workers", "probe_every"}
    probe, finetune = {"probe_epochs", "probe_blr"}, {"finetune_epochs", "finetune_blr"}
    finetune |= {"randaugment"}
    every = set(vars(small()[0]))
    assert set(finished[1]["settings"]) == every - others - probe - finetune
    probed = torch.load(finished[0] / "probe-checkpoint.pth", weights_only=True)["settings"]
    assert probe | {"checkpoint", "seed", "global_batch"} < set(probed) < every
    assert set(train_cifar.SETTINGS["fine-tuning"]) == set(probed) - probe | finetune


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(finished, tmp_path, capsys):
    (tmp_path / "log.csv").write_text("epoch,loss\n1,0.5\n")
    assert_same(trained(run(tmp_path, "--resume", "--probe-epochs", "0")), trained(finished[1]))
    out = capsys.readouterr().out
    assert "checkpoint.pth does not exist yet: pretraining starts from the beginning" in out
    assert logged_epochs(tmp_path) == list(range(1, 7))


def test_two_processes_do_what_one_does(finished, tmp_path, capsys):
    python, *script = command("--out-dir", tmp_path, "--batch-size", 16, "--finetune-epochs", 1)
    done = subprocess.run(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    two, one = (
        trained(torch.load(d / "checkpoint.pth", weights_only=True))
        for d in (tmp_path, finished[0])
    )
    assert_same(two["settings"], one["settings"])
    for name, p in one["model"].items():
        if "qkv.bias" not in name:  # a key's bias has no gradient but rounding, which Adam enlarges
            torch.testing.assert_close(two["model"][name], p, rtol=1e-3, atol=2e-5)
    assert_same(two["maps"], one["maps"], rtol=1e-2, atol=1e-3)
    assert logged_epochs(tmp_path) == list(range(1, 7))
    losses = [column(d, "loss") for d in (tmp_path, finished[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert done.stdout.count("epoch 6/6") == done.stdout.count("probe: ") == 1
    assert done.stdout.count("fine-tuning: ") == 1 and (tmp_path / "finetuned.pth").exists()
    run(copy(finished, tmp_path), "--resume")  # only probes
    accuracies = [
        float(out.split("probe: ")[1].split()[0]) for out in (done.stdout, capsys.readouterr().out)
    ]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.5)


def test_a_run_is_not_written_over(finished, tmp_path):
    copy(finished, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "--resume" in error("--out-dir", tmp_path)
    line = error("--out-dir", tmp_path, "--resume", "--blr", "1e-4", "--masking", "random")
    assert "masking attention (now random)" in line and "blr" in line and "seed" not in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", ["half", {"epoch": 3}, Harmful(), [1, 2]])
def test_what_is_no_checkpoint_is_refused(content, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    if content == "half":
        whole = (finished[0] / "checkpoint.pth").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        torch.save(content, path)
    before = path.read_bytes()
    assert "damaged or not a checkpoint" in error("--out-dir", tmp_path, "--resume")
    assert path.read_bytes() == before and not (tmp_path / "harm").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    loss, calls = train_cifar.Pretraining.loss, []

    def failing_loss(*args):
        calls.append(loss(*args))
        return calls[-1] * (float("nan") if len(calls) == 6 else 1)  # epoch 3, step 2

    monkeypatch.setattr(train_cifar.Pretraining, "loss", failing_loss)
    line = error("--out-dir", tmp_path)
    assert "the loss is nan in epoch 3, step 2" in line and "--blr" in line
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 2
    assert logged_epochs(tmp_path) == [1, 2]


def test_a_loss_that_is_not_finite_ends_its_epoch_and_is_never_saved(tmp_path, monkeypatch):
    loss, calls = train_cifar.Pretraining.loss, []

    def failing_loss(*args):
        calls.append(loss(*args))
        if len(calls) == 5:  # epoch 3, step 1
            train_cifar.SIGNALS.append(signal.SIGTERM)
        return calls[-1] * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(train_cifar, "SIGNALS", [])
    monkeypatch.setattr(train_cifar, "progress", lambda line: True)
    monkeypatch.setattr(train_cifar.Pretraining, "loss", failing_loss)
    assert "the loss is nan in epoch 3, step 1" in error("--out-dir", tmp_path)
    assert len(calls) == 5
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 2


def test_a_torch_save_that_fails_keeps_what_was_there(tmp_path):
    def full(file):
        file.write(b"ne")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    (tmp_path / "a.pth").write_bytes(b"old")
    with pytest.raises(SystemExit, match="cannot write .*a.pth .*PytorchStreamWriter"):
        train_cifar.write_file(tmp_path / "a.pth", full)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_save_that_fails_keeps_what_was_there(finished, tmp_path, monkeypatch):
    before = copy(finished, tmp_path).joinpath("checkpoint.pth").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="cannot write .*checkpoint.pth .*No space left"):
        train_cifar.write_file(tmp_path / "checkpoint.pth", lambda file: file.write(b"new"))
    assert (tmp_path / "checkpoint.pth").read_bytes() == before and not list(
        tmp_path.glob("*.part")
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--patch-size", 5], "patch_size 5 does not divide img_size 32.*--patch-size"),
        (["--batch-size", 71], "a batch of 71 is more than the 70 training images"),
        (
            ["--batch-size", 0],
            "--batch-size: 0 is not allowed: give a whole number from 1 to 2147483647",
        ),
        (["--epochs", "many"], "--epochs: many is not allowed"),
        (["--mask-ratio", 0.75], "0.75 and throw_ratio 0.4 .*-10 visible.*--throw-ratio"),
        (["--mask-ratio", "nan"], "mask_ratio nan"),
        (["--blr", 0], "--blr: 0 is not a learning rate: give a number above 0"),
        (["--finetune-blr", -1], "--finetune-blr: -1 is not a learning rate"),
        (["--method", "beit"], "--method: invalid choice: 'beit'"),
        (["--masking", "saliency"], "--masking: invalid choice: 'saliency'"),
        (["--throw", "highest"], "--throw: invalid choice: 'highest'"),
        (["--mask-unit", 3], "3x3 patches do not fill a grid of 8x8.*--mask-unit"),
        (["--mask-unit", 8], "of N = 1 patches"),
        (
            ["--method", "maskfeat", "--patch-size", 1, "--img-size", 16],
            "patch size 1 .* choose an even one.*--patch-size",
        ),
        (["--epochs", 0], "--epochs 0 with --checkpoint None: give .*FILE or none"),
        (["--checkpoint", "none"], "--epochs 6 with --checkpoint none"),
        (["--probe-every", 0], "--probe-every: 0 is not allowed"),
        (["--probe-blr", "inf"], "--probe-blr: inf is not a learning rate"),
        (["--warmup-epochs", 6], "--warmup-epochs 6 is not less than --epochs 6"),
        (["--decoder-embed-dim", 48], "--decoder-embed-dim 48 is not a multiple of 32"),
        (["--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
        (["--model", "vit_giant"], "--model: invalid choice: 'vit_giant'"),
        (["--rate", 3], "unrecognized arguments: --rate 3"),
        (["--seed", 2**64], "--seed: 18446744073709551616 is not allowed"),
        (["--workers", -1], "--workers: -1 is not allowed: give a whole number from 0"),
        (["--accum-steps", 0], "--accum-steps: 0 is not allowed"),
        (["--accum-steps", 3], "a batch of 96 is more than the 70 training images"),
        (["--mask-unit", 16], "of N = 0 patches.*--mask-unit"),
        (["--out-dir", __file__], "cannot make --out-dir .*test_amt.py"),
    ],
)
def test_bad_input_is_named(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded, (_, data) = [], small()
    monkeypatch.setattr(train_cifar, "load_data", lambda args: loaded.append(args) or data)
    assert re.search(message, error(*flags))
    assert bool(loaded) == ("training images" in message)
    assert not list(tmp_path.glob("*/*"))


def test_a_data_set_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    def offline(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(train_cifar.CIFAR10, "download", offline)
    line = error("--dataset", "cifar10", "--data-path", tmp_path, "--out-dir", tmp_path / "out")
    assert (
        f"--data-path {tmp_path}" in line
        and "no route to host" in line
        and "cifar-10-batches-py" in line
    )
    assert not list((tmp_path / "out").iterdir())
