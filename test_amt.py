"""Tests of amt.py and train_cifar.py. Run them with: python -m pytest -q"""
import argparse
import csv
import errno
import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
from collections import Counter
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # the tests compare results of the CPU

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import amt
import train_cifar

torch.set_num_threads(1)                                 # as in the processes that tests start


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=rng(seed))


def unsettle(module):
    """Moves each parameter away from values, as 0 and 1, at which leaving it out would not show."""
    generator = rng(1)
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return module


def tiny_vit(**kwargs):
    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2)
    torch.manual_seed(0)
    return unsettle(amt.ViT(**{**sizes, **kwargs}))


def tiny_mae(**kwargs):
    return unsettle(amt.MAE(tiny_vit(), 16, decoder_depth=2, decoder_num_heads=2, **kwargs))


def tiny_simmim(target="pixels"):
    return unsettle(amt.SimMIM(tiny_vit(), target))


MODELS = {"mae": tiny_mae, "mae with norm_pix_loss": lambda: tiny_mae(norm_pix_loss=True),
          "simmim": tiny_simmim, "maskfeat": lambda: tiny_simmim("hog")}


def split(n, n_thrown=6):
    """Random sets `masked, thrown, visible` of 16 patches, in random order, for n images."""
    ranking = torch.rand(n, 16, generator=rng(1)).argsort(dim=1)
    return ranking.split([5, n_thrown, 11 - n_thrown], dim=1)


def vit_with_attention(attention):
    vit = tiny_vit()
    vit.cls_attention = lambda images: attention
    return vit


@pytest.mark.parametrize("call, message", [
    (lambda: amt.patchify(torch.zeros(1, 3, 12, 10), 4), "12x10 pixels.*4x4"),
    (lambda: amt.patchify(torch.zeros(1, 3, 10, 12), 4), "10x12 pixels.*4x4"),
    (lambda: amt.unpatchify(torch.zeros(1, 5, 48), 4), "N = 5 patches.*square"),
    (lambda: amt.sincos_pos_embed(10, 4), "width 10 .*multiple of 4"),
    (lambda: tiny_vit(patch_size=5), "size 5.*16"), (lambda: tiny_vit(num_heads=5), "heads 5.*24"),
    (lambda: tiny_vit()(torch.zeros(2, 3, 16, 8)), r"\(2, 3, 16, 8\).*\(B, 3, 16, 16\)"),
    (lambda: amt.attention_maps(vit_with_attention(torch.ones(1, 2, 17)), None), "N = 17.*square"),
    *((lambda value=value: amt.attention_maps(vit_with_attention(torch.full((1, 2, 4), value)),
                                              None), "not finite")
      for value in (math.nan, math.inf)),
    (lambda: amt.dataset_maps(tiny_vit(), [], 4), "no images"),
    *((lambda value=value: amt.sample_patches(torch.tensor([[1.0], [value]])), "negative, inf")
      for value in (-0.1, math.nan, math.inf)),
    (lambda: amt.mask_and_throw(torch.zeros(1, 64), 1.0), "N = 64 .*mask_ratio 1.0 .*less than 1"),
    (lambda: amt.mask_and_throw(torch.zeros(1, 64), 0.5, -0.1), "throw_ratio -0.1.*at least 0"),
    *((lambda value=value: amt.mask_and_throw(torch.zeros(1, 64), value), f"mask_ratio {value}")
      for value in (math.nan, math.inf)),
    (lambda: amt.mask_and_throw(torch.zeros(1, 64), 0.6, 0.4), "38 masked, 26 thrown, 0 visible"),
    (lambda: amt.mask_and_throw(torch.zeros(1, 64), 0.001), "0 masked, 0 thrown, 64 visible"),
    (lambda: amt.mask_and_throw(torch.zeros(1, 64), 0.4, unit=0), "0x0 patches"),
    (lambda: amt.mask_and_throw(torch.zeros(1, 8), 0.5, unit=2), "N = 8 patches.*square"),
    (lambda: amt.expand_units(torch.zeros(1, 4).long(), 8, 3), "3x3 patches.*grid of 8x8"),
    (lambda: tiny_mae()(random_images(2), *split(2)[:2]), "positional argument"),
    (lambda: tiny_simmim()(random_images(2), *split(2)[:2]), "positional argument"),
    (lambda: amt.hog(torch.zeros(1, 3, 10, 10), 5), "patch size 5 with images of 10x10.*even"),
    (lambda: tiny_simmim("edges"), '"edges".*"pixels" or "hog"'),
    (lambda: amt.training_loss(tiny_mae(), random_images(2), amt.random_crops(2),
                               torch.ones(2, 4, 4), unit=3), "16x16.*12x12"),
    (lambda: amt.training_loss(tiny_mae(), random_images(2), None, None, unit=3), "16x16.*12x12"),
    (lambda: amt.grid_wise(torch.rand(1, 17)), "N = 17 patches.*square.*extra tokens"),
    (lambda: amt.block_wise(torch.rand(1, 17)), "N = 17 patches.*square.*extra tokens"),
])
def test_an_error_names_the_argument_that_does_not_fit(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ==== 1. Patches ==================================================================================

def test_patchify_orders_patches_and_pixels_by_row_and_unpatchify_inverts_it():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = amt.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for b, row, column in itertools.product(range(2), range(2), range(3)):
        pixels = [images[b, c, 2 * row + i, 2 * column + j].item()
                  for i, j, c in itertools.product(range(2), range(2), range(3))]
        assert patches[b, 3 * row + column].tolist() == pixels
    square = random_images(2)[:, :2]
    assert torch.equal(amt.unpatchify(amt.patchify(square, 4), 4), square)


def test_pos_embed_is_the_table_of_mae():
    table = amt.sincos_pos_embed(16, 3)
    assert table.shape == (1, 10, 16) and table.dtype == torch.float32 and not table[0, 0].any()
    for row, column in itertools.product(range(3), range(3)):
        expected = []
        for place in (column, row):
            angles = [place / 10000 ** (i / 4) for i in range(4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(table[0, 1 + 3 * row + column], torch.tensor(expected))


# ==== 2. Vision transformer =======================================================================

def torch_layer(block):
    """PyTorch's own transformer layer, with the parameters of a Block."""
    layer = nn.TransformerEncoderLayer(block.attn.proj.in_features, block.attn.num_heads, 1, 0.0,
                                       "gelu", batch_first=True, norm_first=True)
    layer.self_attn.in_proj_weight = block.attn.qkv.weight
    layer.self_attn.in_proj_bias = block.attn.qkv.bias
    layer.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
    layer.linear1, layer.linear2 = block.mlp.fc1, block.mlp.fc2
    layer.norm1, layer.norm2 = block.norm1, block.norm2
    return layer


def torch_vit(vit, images):
    """The same ViT in PyTorch's own layers: the tokens of whole images, and the list of layers."""
    conv = vit.patch_embed.proj
    x = F.conv2d(images, conv.weight, conv.bias, stride=conv.stride).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(len(images), -1, -1), x], dim=1) + vit.pos_embed
    return x, [torch_layer(block) for block in vit.blocks]


@pytest.mark.parametrize("visible", [None, [[3, 0, 15], [1, 2, 3], [9, 8, 7]]])
def test_vit_equals_pytorchs_layers_and_embeds_only_visible_patches(visible):
    vit, images, embedded = tiny_vit(), random_images(3), []
    vit.pos_embed.data[:, 0] = torch.randn(24, generator=rng())      # not 0, as in some checkpoints
    ids = visible or 3 * [range(16)]
    x, layers = torch_vit(vit, images)
    x = torch.stack([x[i, [0, *(1 + place for place in ids[i])]] for i in range(3)])
    for layer in layers:
        x = layer(x)
    vit.patch_embed.register_forward_pre_hook(lambda _, args: embedded.append(args[0].shape[1]))
    tokens = vit(images, visible and torch.tensor(visible))
    torch.testing.assert_close(tokens, vit.norm(x), rtol=1e-4, atol=1e-5)
    assert embedded == [len(ids[0])]


def test_parameters_have_the_names_of_timm_and_mae_and_only_positions_are_frozen():
    parts = r"(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)"
    vit = rf"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d\.{parts})\.(weight|bias)"
    decoder = rf"decoder_(embed|norm|pred|blocks\.\d\.{parts})\.(weight|bias)"
    mae = rf"encoder\.({vit})|{decoder}|mask_token|decoder_pos_embed"
    simmim = rf"encoder\.({vit})|head\.(weight|bias)|mask_token"
    for model, names in [(tiny_vit(), vit), (tiny_mae(), mae), (tiny_simmim(), simmim)]:
        for name, p in model.named_parameters():
            assert re.fullmatch(names, name) and p.requires_grad != name.endswith("pos_embed")
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("build, patch_size, width, depth, heads, millions", [
    (amt.vit_tiny, 16, 192, 12, 3, 5.5), (amt.vit_small, 16, 384, 12, 6, 21.7),
    (amt.vit_base, 16, 768, 12, 12, 85.8), (amt.vit_large, 16, 1024, 24, 16, 303.3),
    (amt.vit_huge, 14, 1280, 32, 16, 630.8),
])
def test_the_standard_sizes_and_the_defaults(build, patch_size, width, depth, heads, millions):
    with torch.device("meta"):
        mae = amt.MAE(build())
    vit, attns = mae.encoder, [m for m in mae.modules() if isinstance(m, amt.Attention)]
    assert (vit.img_size, vit.patch_size, vit.embed_dim) == (224, patch_size, width)
    assert [m.num_heads for m in attns] == 8 * [16] + depth * [heads]        # decoder, then encoder
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert mae.decoder_blocks[0].mlp.fc1.weight.shape == (2048, 512) and not mae.norm_pix_loss


def test_initialisation_is_maes_and_a_model_leaves_its_encoder_as_it_is():
    torch.manual_seed(0)
    vit = amt.ViT(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2)
    before = {name: p.clone() for name, p in vit.state_dict().items()}
    mae, simmim = amt.MAE(vit, 64, 1, 2), amt.SimMIM(vit)
    assert all(torch.equal(p, before[name]) for name, p in vit.state_dict().items())
    for layer, fan_in, fan_out in [
            (vit.blocks[0].attn.qkv, 64, 192), (vit.blocks[0].mlp.fc2, 256, 64),
            (vit.patch_embed.proj, 192, 64), (mae.decoder_pred, 64, 192), (simmim.head, 64, 192)]:
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    for token in (vit.cls_token, mae.mask_token, simmim.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)


# ==== 3. Attention maps ===========================================================================

def torch_attention(layer, x):
    """The attention (B, heads, T) of the first token, from PyTorch's own layer."""
    return layer.self_attn(x, x, x, average_attn_weights=False)[1][:, :, 0]


def test_cls_attention_is_the_row_of_cls_without_the_tokens_that_are_not_patches():
    block, x = tiny_vit().blocks[0], 3 * torch.randn(2, 7, 24, generator=rng())
    expected = torch_attention(torch_layer(block), x)[:, :, 3:]
    torch.testing.assert_close(block.attn.cls_attention(x, num_prefix_tokens=3), expected)
    a = block.bfloat16().attn.cls_attention(x.bfloat16())
    assert a.dtype == torch.float32 and not torch.equal(a, a.bfloat16().float())


def test_attention_maps_average_the_last_blocks_heads_then_stretch_each_image_to_0_and_1():
    vit, images = tiny_vit(), random_images(3)
    train_cifar.add_drop_path(vit, 0.9)                  # only eval mode gives these weights
    x, layers = torch_vit(vit, images)
    for layer in layers[:-1]:
        x = layer(x)
    a = torch_attention(layers[-1], layers[-1].norm1(x))[:, :, 1:]
    torch.testing.assert_close(vit.eval().cls_attention(images), a)
    expected = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in a.mean(dim=1)])
    weights = amt.attention_maps(vit.train(), images)
    torch.testing.assert_close(weights, expected.view(3, 4, 4))
    assert not weights.requires_grad
    even = vit_with_attention(torch.full((2, 3, 16), 1 / 17, dtype=torch.bfloat16))
    assert torch.equal(amt.attention_maps(even, images), torch.zeros(2, 4, 4))


def test_attention_maps_restore_the_modes_even_after_an_error():
    vit, images = tiny_vit(), random_images(2)
    vit.blocks[1].eval()
    modes = [m.training for m in vit.modules()]
    amt.attention_maps(vit, images)
    assert [m.training for m in vit.modules()] == modes
    with pytest.raises(ValueError, match="do not fit"):
        amt.attention_maps(vit, images[:, :, 1:])
    assert [m.training for m in vit.modules()] == modes


def test_dataset_maps_puts_each_map_at_the_index_of_its_image_and_shares_sum_to_the_whole():
    vit, images = tiny_vit(), random_images(5)
    batches = [(torch.tensor(ids), images[ids]) for ids in ([3, 0], [4], [1, 2])]
    maps = amt.dataset_maps(vit, iter(batches), 6)       # a loader may be read only once
    assert maps.shape == (6, 4, 4) and maps.dtype == torch.float16
    torch.testing.assert_close(maps[:5], amt.attention_maps(vit, images).half())
    assert not maps[5].any()                             # no batch has image 5
    shares = amt.dataset_maps(vit, batches[1:], 6) + amt.dataset_maps(vit, batches[:1], 6)
    assert torch.equal(shares, maps)


# ==== 4. Crops of images and of maps ==============================================================

@pytest.mark.parametrize("image_ratio", [1.0, 0.5, 3.0])
def test_random_crops_have_the_distribution_of_random_resized_crop(image_ratio):
    n = 40000
    theta = amt.random_crops(n, (0.05, 0.15), (0.5, 2.0), rng(), image_ratio)
    assert theta.shape == (n, 2, 3) and not theta[:, [0, 1], [1, 0]].any()
    width, height, x, y = theta[:, 0, 0], theta[:, 1, 1], theta[:, 0, 2], theta[:, 1, 2]
    assert (height > 0).all() and (width < 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    width = width.abs()
    uniform = torch.stack([                              # each of these is uniform in 0 to 1
        (width * height - 0.05) / 0.1, (width / height * image_ratio).log() / math.log(4) + 0.5,
        (x / (1 - width) + 1) / 2, (y / (1 - height) + 1) / 2])
    distance = (uniform.sort(dim=1).values - torch.arange(n) / n).abs().amax(dim=1)
    assert (distance < 1.95 / math.sqrt(n)).all()        # Kolmogorov and Smirnov's test at 0.1 %
    correlation = torch.corrcoef(torch.cat([uniform, theta[None, :, 0, 0].sign()]))
    assert (correlation - torch.eye(5)).abs().max() < 0.03


def test_random_crops_stay_in_the_image_and_repeat_with_the_generator():
    theta = amt.random_crops(5000, generator=rng(3))
    sides, centres = theta[:, [0, 1], [0, 1]].abs(), theta[:, :, 2].abs()
    assert (sides + centres <= 1 + 1e-6).all() and (sides == 1).any()
    area, aspect = sides.prod(dim=1), sides[:, 0] / sides[:, 1]
    assert 0.2 < area.min() * 1.001 < 0.21 and area.max() > 0.95     # MAE's scale, usual ratio
    assert 0.75 < aspect.min() * 1.001 < 0.76 and 1.32 < aspect.max() * 0.999 < 4 / 3
    assert torch.equal(theta, amt.random_crops(5000, generator=rng(3)))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_of_whole_pixels_is_slicing_and_the_image_continues_at_its_edges(mode, flip):
    images, s = random_images(1), -0.5 if flip else 0.5
    theta = torch.tensor([[[s, 0, -0.25], [0, 0.5, 0.125]]], dtype=torch.float64)
    expected = images[:, :, 5:13, 2:10].flip([3] if flip else [])
    torch.testing.assert_close(amt.crop(images, theta, 8, mode), expected, rtol=1e-4, atol=1e-4)
    larger = F.interpolate(images, size=32, mode=mode)
    whole = torch.eye(2, 3)[None]
    torch.testing.assert_close(amt.crop(images, whole, 32, mode), larger, rtol=1e-4, atol=1e-4)
    assert amt.crop(images.half(), whole, 32, mode).dtype == torch.float16


@pytest.mark.parametrize("p", [4, 8])
def test_each_weight_lies_on_the_patch_that_shows_what_the_weight_was_measured_on(p):
    # Each pixel of an image holds its place (x, y), and the map is a * x + b * y. So the weight of
    # a patch must be the sum of a * x + b * y over the places that the patch shows.
    def places(side):
        line = (torch.arange(side) + 0.5) / side
        return torch.stack([line.expand(side, side), line[:, None].expand(side, side)])

    n, size, h = 64, 32, 8
    theta = amt.random_crops(n, generator=rng())
    ab = 2 * torch.rand(n, 2, 1, 1, generator=rng(1)) - 1
    maps = (ab * places(h)).sum(dim=1).half()
    weights = amt.crop_weights(maps, theta, size, p)
    assert weights.dtype == torch.float32
    shown = amt.crop(places(size).expand(n, -1, -1, -1), theta, size, "bilinear")
    shown = shown.clamp(0.5 / h, 1 - 0.5 / h)            # the map is continued at its edges
    expected = amt.patchify((ab * shown).sum(dim=1, keepdim=True), p).sum(dim=2)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0.02 * p * p)
    with torch.autocast("cpu", torch.bfloat16):          # must not shift the crop
        assert torch.equal(amt.crop_weights(maps, theta, size, p), weights)


# ==== 5. Ranking ==================================================================================

def assert_distribution(rankings, probability):
    """Pearson's chi-square test of rankings (n, N) and the probability of each permutation."""
    n, N = rankings.shape
    counts = Counter(map(tuple, rankings.tolist()))
    statistic, freedom = 0.0, -1
    for permutation in itertools.permutations(range(N)):
        expected = n * probability(permutation)
        assert expected > 1e-9 or counts[permutation] == 0
        statistic += (counts[permutation] - expected) ** 2 / max(expected, 1e-9)
        freedom += expected > 1e-9
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("weights", [
    [0.4, 0.3, 0.2, 0.1], [1e-30, 3e-30, 2e-30, 1e-30], 4 * [4.0], 4 * [0.0], [0.0, 3.0, 0.0, 1.0],
    [0.0, 2.0 ** -149, 0.0, 1.0, 0.0, 3e38],             # 2 ** -149 is the least positive float32
])
def test_sample_patches_draws_in_proportion_to_the_weights_and_zeros_last(weights):
    def probability(permutation):
        p = 1.0
        for k, i in enumerate(permutation):
            left = sum(weights[j] for j in permutation[k:])
            p *= weights[i] / left if left else 1 / (len(weights) - k)
        return p

    rankings = amt.sample_patches(torch.tensor(weights).expand(60000, -1), rng())
    assert_distribution(rankings, probability)


def test_a_zero_weight_comes_after_a_tiny_one_whatever_is_drawn(monkeypatch):
    E = torch.tensor([[0.0, 148.0]])                     # no exponential draw is outside
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator=None: x.copy_(E))
    assert amt.sample_patches(torch.tensor([[0.0, 2.0 ** -149]])).tolist() == [[1, 0]]


# ==== 6. Masking and throwing =====================================================================

@pytest.mark.parametrize("N, mask_ratio, throw_ratio, counts", [
    (196, 0.45, 0.40, (88, 78, 30)), (196, 0.75, 0.0, (147, 0, 49)), (64, 0.45, 0.40, (29, 26, 9)),
    (49, 0.44, 0.26, (22, 13, 14)), (10, 0.45, 0.25, (4, 2, 4)),     # 4.5 and 2.5 round to even
])
def test_the_ranking_is_split_into_masked_thrown_and_visible(N, mask_ratio, throw_ratio, counts):
    ranking = torch.rand(2, N, generator=rng()).argsort(dim=1)
    parts = amt.mask_and_throw(ranking, mask_ratio, throw_ratio)
    assert tuple(ids.shape[1] for ids in parts) == counts
    assert torch.equal(torch.cat(parts, dim=1), ranking)


@pytest.mark.parametrize("h, unit", [(8, 2), (6, 3), (4, 1)])
def test_units_are_squares_of_patches_numbered_row_by_row(h, unit):
    side = h // unit
    ranking = torch.rand(3, side * side, generator=rng()).argsort(dim=1)
    patches = amt.expand_units(ranking, h, unit).unflatten(1, (side * side, unit * unit))
    for i, members in zip(ranking.flatten().tolist(), patches.flatten(0, 1).tolist()):
        places = itertools.product(range(unit), range(unit))
        first = i // side * unit * h + i % side * unit
        assert set(members) == {first + row * h + column for row, column in places}
    of_patches = torch.cat(amt.mask_and_throw(ranking, 0.5, 0.25, unit=unit), dim=1)
    assert torch.equal(of_patches, patches.flatten(1))


# ==== 7. Models: MAE, SimMIM, MaskFeat ============================================================

def literal_model(name, model, images, visible, masked):
    """The published models, one image at a time, tokens in order. Thrown ones are taken out last.

    MAE decodes the encoder's tokens, and a mask token at each other place. SimMIM embeds all
    patches, and the mask token replaces the masked ones.
    """
    vit, losses, preds = model.encoder, [], []
    target = amt.hog(images, 4) if name == "maskfeat" else amt.patchify(images, 4)
    error = torch.abs if name == "simmim" else torch.square
    if name == "mae with norm_pix_loss":
        var, mean = torch.var_mean(target, dim=2, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    for i in range(len(images)):
        x, layers = torch_vit(vit, images[i:i + 1])
        if "mae" in name:
            tokens = model.decoder_embed(vit(images[i:i + 1], visible[i:i + 1]))[0]
            x = torch.cat([tokens[:1], model.mask_token[0].expand(16, -1)])
            x[1 + visible[i]] = tokens[1:]
            x = x + model.decoder_pos_embed[0]
            layers = map(torch_layer, model.decoder_blocks)
            head = nn.Sequential(model.decoder_norm, model.decoder_pred)
        else:
            x = x[0].clone()
            x[1 + masked[i]] = model.mask_token[0] + vit.pos_embed[0, 1 + masked[i]]
            head = nn.Sequential(vit.norm, model.head)
        stays = sorted([*visible[i].tolist(), *masked[i].tolist()])
        x = x[[0, *(1 + place for place in stays)]][None]
        for layer in layers:
            x = layer(x)
        out = dict(zip(stays, head(x)[0, 1:]))
        preds.append(torch.stack([out[place] for place in masked[i].tolist()]))
        losses.append(error(preds[-1] - target[i, masked[i]]).mean())
    return torch.stack(losses).mean(), torch.stack(preds)


@pytest.mark.parametrize("n_thrown", [0, 6])
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_the_published_ones_and_do_not_see_thrown_patches(name, n_thrown):
    model, images = MODELS[name](), random_images(3)
    images[0, :, :8] *= 1e-3                             # so faint that norm_pix_loss's 1e-6 shows
    masked, thrown, visible = split(3, n_thrown)
    expected_loss, expected_pred = literal_model(name, model, images, visible, masked)
    if name != "maskfeat":                               # its targets depend on neighbours
        ids = thrown[:, :, None].expand(-1, -1, 48)
        images = amt.unpatchify(amt.patchify(images, 4).scatter(1, ids, math.nan), 4)
    loss, pred = model(images, visible=visible, masked=masked)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(pred, expected_pred, rtol=1e-4, atol=1e-5)
    loss.backward()
    for p in model.parameters():
        assert not p.requires_grad or p.grad.any() and p.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred = model(images, visible=visible, masked=masked)
    assert loss.dtype == pred.dtype == torch.float32


def literal_hog(image, cell, bins):
    """Histograms (N, 4*C*bins) of an image (C, H, H), one pixel at a time."""
    C, H, _ = image.shape
    votes = np.zeros((H // cell, H // cell, C, bins))
    for c, y, x in itertools.product(range(C), range(H), range(H)):
        dy = image[c, y + 1, x] - image[c, y - 1, x] if 0 < y < H - 1 else 0.0
        dx = image[c, y, x + 1] - image[c, y, x - 1] if 0 < x < H - 1 else 0.0
        degrees = math.degrees(math.atan2(dy, dx)) % 180
        votes[y // cell, x // cell, c, int(degrees // (180 / bins))] += math.hypot(dy, dx)
    return cells_to_patches(votes / np.sqrt((votes ** 2).sum(axis=3, keepdims=True) + 1e-5 ** 2))


def cells_to_patches(cells):
    """Puts the four cells of each patch together: (2h, 2h, C, bins) to (N, 4*C*bins)."""
    h = len(cells) // 2
    return cells.reshape(h, 2, h, 2, -1).transpose(0, 2, 1, 3, 4).reshape(h * h, -1)


@pytest.mark.parametrize("patch_size, bins", [(4, 9), (8, 6)])
def test_hog_equals_the_literal_one(patch_size, bins):
    images = random_images(2).double()
    images[0, :, :8] = 0.5                               # no gradient, so no votes
    images[1, :, :8] *= 1e-6                             # so faint that the epsilon shows
    for image, ours in zip(images, amt.hog(images, patch_size, bins)):
        expected = literal_hog(image.numpy(), patch_size // 2, bins)
        np.testing.assert_allclose(ours, expected, atol=1e-9)
    image = torch.arange(-8.0, 8).repeat(16, 1)
    image[:, 8] = -1e-9 * torch.arange(16)               # rounds to 180 degrees: the last bin
    assert amt.hog(image[None, None], 8, bins)[0, 1, 2 * bins + bins - 1] > 0    # bottom left cell


def test_hog_equals_scikit_images():
    feature = pytest.importorskip("skimage.feature")
    image = torch.rand(1, 1, 32, 32, generator=rng(), dtype=torch.float64)
    theirs = feature.hog(image[0, 0].numpy(), 9, (4, 4), (1, 1), "L2", feature_vector=False)
    np.testing.assert_allclose(amt.hog(image, 8)[0], cells_to_patches(theirs[:, :, 0]), atol=1e-7)


# ==== 8. One training step ========================================================================

@pytest.mark.parametrize("name, with_maps, n_masked, n_thrown, unit, given", [
    ("mae", True, 7, 6, 1, {}),                          # AMT's 0.45 and 0.40 are the defaults
    ("mae", False, 12, 0, 1, dict(mask_ratio=0.75, throw_ratio=0.0, strategy=amt.block_wise)),
    ("simmim", True, 2, 1, 2, dict(mask_ratio=0.44, throw_ratio=0.26, unit=2)),
    ("simmim", False, 2, 0, 2, dict(mask_ratio=0.6, throw_ratio=0.0, unit=2)),
])
def test_training_loss_equals_its_parts(name, with_maps, n_masked, n_thrown, unit, given):
    model, images, theta = MODELS[name](), random_images(3), amt.random_crops(3, generator=rng())
    maps = torch.rand(3, 4, 4, generator=rng()) ** 4 if with_maps else None
    torch.manual_seed(5)
    loss = amt.training_loss(model, images, theta, maps, **given)
    torch.manual_seed(5)
    weights = torch.ones(3, 16 // unit ** 2)
    if with_maps:
        weights = amt.crop_weights(maps, theta, 16, 4 * unit)
    ranking = given.get("strategy", amt.sample_patches)(weights)
    ids = amt.expand_units(ranking, 4, unit)             # all patches, as ranked
    masked, visible = ids[:, :n_masked * unit ** 2], ids[:, (n_masked + n_thrown) * unit ** 2:]
    assert torch.equal(loss, model(images, visible=visible, masked=masked)[0])
    assert loss.requires_grad and amt.training_loss.__defaults__[:2] == (0.45, 0.40)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", train_cifar.STRATEGIES.values())
def test_training_loss_keeps_to_the_device_of_the_images(name, strategy):
    model, images, theta = MODELS[name](), random_images(3), amt.random_crops(3)
    with FakeTensorMode(allow_non_fake_inputs=True):     # refuses operations on two devices
        model, images, maps = model.to("cuda"), images.to("cuda"), torch.rand(3, 4, 4).to("cuda")
        loss = amt.training_loss(model, images, theta, maps, 0.5, 0.25, 2, strategy)
        assert loss.device.type == "cuda"


# ==== 9. Other strategies =========================================================================

@pytest.mark.parametrize("N", [16, 49, 196])
@pytest.mark.parametrize("name", train_cifar.STRATEGIES)
def test_every_strategy_gives_each_image_a_permutation_that_repeats_with_the_generator(name, N):
    rank, weights = train_cifar.STRATEGIES[name], torch.rand(6, N, generator=rng())
    ranking = rank(weights, rng(1))
    assert ranking.dtype == rank(weights.half()).dtype == torch.int64
    assert torch.equal(ranking.sort(dim=1).values, torch.arange(N).expand(6, N))
    assert len(ranking.unique(dim=0)) == 6
    assert torch.equal(ranking, rank(weights, rng(1)))
    assert torch.equal(ranking, rank(weights, rng(2))) == (name in ("attmask", "mst"))


def test_attmask_and_mst_rank_by_weight_and_random_ranking_ignores_it():
    weights = torch.tensor([[0.2, 0.9, 0.0, 0.5], [3.0, 1.0, 2.0, 0.1]])
    assert train_cifar.STRATEGIES["attmask"](weights).tolist() == [[1, 3, 0, 2], [0, 2, 1, 3]]
    assert train_cifar.STRATEGIES["mst"](weights).tolist() == [[2, 0, 3, 1], [3, 1, 2, 0]]
    for name in ("attmask", "mst"):                      # ties keep their order on each device
        ranking = train_cifar.STRATEGIES[name](torch.zeros(2, 5000))
        assert torch.equal(ranking, torch.arange(5000).expand(2, -1))
    rankings = train_cifar.STRATEGIES["random"](weights[0].expand(60000, 4), rng())
    assert_distribution(rankings, lambda _: 1 / 24)


@pytest.mark.parametrize("h", [4, 8, 14])
def test_grid_wise_leaves_the_bottom_left_of_each_2_x_2_after_a_checkerboard(h):
    ranking = train_cifar.STRATEGIES["grid"](torch.ones(50, h * h), rng())
    row, column = ranking // h % 2, ranking % h % 2
    assert (row > column)[:, 3 * h * h // 4:].all()
    assert (row == column)[:, :h * h // 2].all()
    assert len(ranking[:, 0].unique()) > 3               # any of the same kind can come first


def test_block_wise_ranks_rectangles_of_the_right_shapes_each_row_by_row():
    ranking = train_cifar.STRATEGIES["block"](torch.ones(500, 196), rng())
    sides = torch.stack([ranking // 14, ranking % 14])               # row and column
    assert (ranking[:, :12].diff(dim=1) > 0).all()       # no rectangle has fewer than 12 patches
    height, width = sides.cummax(dim=2).values - sides.cummin(dim=2).values + 1
    full = (height * width == torch.arange(1, 197)) & (height * width <= 90)
    end = torch.where(full, torch.arange(196), 0).amax(dim=1)        # of the longest such beginning
    height, width = (x.gather(1, end[:, None])[:, 0] for x in (height, width))
    sizes, aspects = sorted((end + 1).tolist()), sorted((height / width).tolist())
    assert sizes[50:500:100] == pytest.approx([22, 34, 47, 60, 72], abs=5)       # quantiles
    assert aspects[0] == pytest.approx(0.3, abs=0.1) and aspects[250] == pytest.approx(1, abs=0.15)
    assert aspects[-1] == pytest.approx(1 / 0.3, abs=1)
    masked = torch.zeros(500, 196).scatter(1, ranking[:, :78], 1).view(500, 14, 14)
    assert (masked.sum(dim=0) > 5).all()
    edges = masked.diff(dim=1).abs().sum(dim=(1, 2)) + masked.diff(dim=2).abs().sum(dim=(1, 2))
    assert edges.mean() < 60 and edges.max() < 100       # 175 if patches are masked independently


# ==== train_cifar.py: helpers =====================================================================

# Six epochs of two steps. A step has two mini-batches. New maps come before epochs 3 and 5.
SMALL = ("--dataset shapes --num-images 70 --img-size 32 --patch-size 8 --depth 1 --blr 4e-3 "
         "--decoder-depth 1 --decoder-embed-dim 32 --epochs 6 --update-interval 2 --workers 0 "
         "--warmup-epochs 1 --batch-size 16 --accum-steps 2 --save-every 4 --probe-epochs 2"
         ).split()
ALL_STAGES = ["--probe-every", 3, "--finetune-epochs", 2]
NO_PROBE = ["--probe-epochs", 0]
ONE_EPOCH = ["--epochs", 1, "--warmup-epochs", 0, *NO_PROBE]
PREFIXES = ["", "probe-", "finetune-"]
TIMES = {"seconds", "update_seconds", "images_per_second"}
HANDLERS = {number: signal.getsignal(number)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def restored_signals():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)         # nohup and background jobs ignore these
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    train_cifar.SIGNALS.clear()
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def parse(*flags):
    return train_cifar.parse_args([*SMALL, *map(str, flags)])


def load(path):
    return torch.load(path, weights_only=True)


def run(out_dir, *flags):
    train_cifar.main([*SMALL, "--out-dir", str(out_dir), *map(str, flags)])
    return out_dir


def error(out_dir, *flags):
    """The one line that the script ends with."""
    with pytest.raises(SystemExit) as caught:
        run(out_dir, *flags)
    line = caught.value.code
    assert re.match("(train_cifar.py: )?error: ", line) and "\n" not in line
    return line


def rows(out_dir, prefix=""):
    with open(out_dir / f"{prefix}log.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(out_dir, name, prefix=""):
    """A column of a log: numbers, and None where it is empty."""
    return [float(row[name]) if row[name] else None for row in rows(out_dir, prefix)]


def saved(out_dir, prefix=""):
    """All that a stage leaves but the times."""
    content = load(out_dir / f"{prefix}checkpoint.pth")
    for dictionary in (content["run"], *content["run"]["log"]):
        for name in TIMES & dictionary.keys():
            del dictionary[name]
    csv_rows = [{k: v for k, v in row.items() if k not in TIMES} for row in rows(out_dir, prefix)]
    return content | {"csv": csv_rows}


def assert_same(a, b, **tolerance):
    """Compares nested dicts, lists and tuples of tensors bit for bit, or within a tolerance."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)))
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b) and (not isinstance(a, dict) or a.keys() == b.keys())
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key], **tolerance)
    else:
        assert a == b


def assert_close_models(a, b):
    """The gradient of a key's bias is rounding noise, which Adam enlarges: it is left out."""
    a, b = ({k: p for k, p in x["model"].items() if "qkv.bias" not in k} for x in (a, b))
    assert_same(a, b, rtol=0, atol=1e-4)


def record(monkeypatch, kind=train_cifar.Pretraining):
    """A list to which each mini-batch of a stage adds what it was given and what it drew."""
    steps, loss, split = [], kind.loss, amt.mask_and_throw

    def recording_loss(self, ids, images, theta):
        steps.append({"ids": ids.tolist(), "theta": theta, "maps": self.run.get("maps"),
                      "lr": self.optimizer.param_groups[0]["lr"]})
        result = loss(self, ids, images, theta)
        steps[-1]["loss"] = result.item()
        return result

    def recording_split(ranking, *rest, **kwargs):
        sets = split(ranking, *rest, **kwargs)
        if steps and "loss" not in steps[-1]:
            steps[-1].update(ranking=ranking, ratios=rest[:2], sets=sets)
        return sets

    monkeypatch.setattr(kind, "loss", recording_loss)
    monkeypatch.setattr(amt, "mask_and_throw", recording_split)
    return steps


def at_call(monkeypatch, kind, call, action):
    """Has action(loss) replace what that call of the loss of a stage returns."""
    loss, calls = getattr(train_cifar, kind).loss, itertools.count(1)

    def acting(self, *args):
        result = loss(self, *args)
        return action(result) if next(calls) == call else result

    monkeypatch.setattr(getattr(train_cifar, kind), "loss", acting)


FORKS = multiprocessing.get_context("forkserver")        # forks a process that has imported torch
FORKS.set_forkserver_preload(["torchvision.datasets", "torchvision.transforms.v2"])
PROCESS = """
import itertools, multiprocessing, os, signal, sys
os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
os.dup2(1, 2)
os.environ.update(env)
sys.path.insert(0, path)
import torch, train_cifar
multiprocessing.set_start_method("fork", force=True)
torch.set_num_threads(1)
loss, calls = train_cifar.Pretraining.loss, itertools.count(1)
def acting(*args):
    if int(env["RANK"]) == at[0] and next(calls) == at[1]:
        exec(at[2], globals())
    return loss(*args)
train_cifar.Pretraining.loss = acting
train_cifar.main(argv)
"""
SEND = "os.kill(os.getpid(), signal.{})".format


def processes(tmp_path, flags_of_each, at=(0, 0, "pass")):
    """Runs the script in a process for each list of flags, as torchrun does. Returns the exit codes
    and what is printed. at = (rank, call, code) runs code in that call of the loss."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started, n, path = [], len(flags_of_each), str(Path(train_cifar.__file__).parent)
    for rank, flags in enumerate(flags_of_each):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n,
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        values = dict(file=f"{tmp_path}/said-{rank}", path=path, at=at,
                      env={k: str(v) for k, v in env.items()}, argv=[*SMALL, *map(str, flags)])
        started.append(FORKS.Process(target=exec, args=(PROCESS, values)))
        started[-1].start()
    for process in started:
        process.join(60)
        process.kill()
        process.join()
    said = "".join((tmp_path / f"said-{rank}").read_text() for rank in range(n))
    return [process.exitcode for process in started], said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run from its beginning to its end. Tests read it and never write it."""
    return run(tmp_path_factory.mktemp("finished"), *ALL_STAGES)


# ==== Flags =======================================================================================

@pytest.mark.parametrize("flags, words", [
    (["--patch-size", 5], "5.*32.*--patch-size"),
    (["--accum-steps", 5], "80 images, but .* only 70 .*--batch-size"),
    (["--batch-size", 0], "--batch-size 0 is not allowed: give 1 or more"),
    (["--batch-size", 1], "too small for the BatchNorm of the linear probe: give 2 or more"),
    (["--mask-ratio", 0.75], "12 masked, 6 thrown, -2 visible.*--throw-ratio"),
    (["--mask-unit", 3], "--mask-unit 3 does not divide a side of 4 patches"),
    (["--blr", "nan"], "--blr nan is not allowed: give more than 0"),
    (["--epochs", 0], "--epochs 0 with --checkpoint None: give .* FILE or none"),
    (["--epochs", 0, "--checkpoint", "none", "--probe-epochs", 0], "nothing to do with --check"),
    (["--update-interval", 6], "--update-interval 6 is not less than --epochs 6"),
    (["--out-dir", __file__], "cannot write to --out-dir .*give another one"),
])
def test_bad_flags_end_the_run_with_one_line(flags, words, tmp_path):
    assert re.search(words, error(tmp_path, *flags))
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize("method, unit, low, random, amt_ratios", [
    ("mae", 1, 0.2, (0.75, 0.0), [(0.45, 0.40)]),
    ("simmim", 2, 0.67, (0.60, 0.0), [(0.44, 0.26), (0.33, 0.50)]),
    ("maskfeat", 2, 0.5, (0.40, 0.0), [(0.44, 0.26), (0.33, 0.50)])])
def test_a_method_has_the_ratios_and_units_of_the_paper(method, unit, low, random, amt_ratios):
    expected = dict(random=random, amt=amt_ratios, unit=unit, scale=(low, 1))
    assert train_cifar.METHODS[method] == expected
    for masking in train_cifar.STRATEGIES:
        args = train_cifar.parse_args(["--method", method, "--masking", masking])
        ratios = amt_ratios[0] if masking == "attention" else random
        assert (args.mask_ratio, args.throw_ratio, args.mask_unit) == (*ratios, unit)
    assert (args.update_interval, args.warmup_epochs, args.patch_size) == (40, 40, 4)
    assert train_cifar.parse_args(["--dataset", "folder", "--model", "vit_huge"]).patch_size == 14


# ==== Pretraining =================================================================================

def test_a_run_writes_its_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "attention.png", "masking.png", "encoder.pth", "finetuned.pth",
        *(prefix + name for prefix in PREFIXES for name in ("checkpoint.pth", "log.csv"))}
    encoder, tuned = load(finished / "encoder.pth"), load(finished / "finetuned.pth")
    assert set(tuned) == {*encoder, "head.weight", "head.bias"}
    for weights, prefix in [(encoder, ""), (tuned, "finetune-")]:
        state = load(finished / f"{prefix}checkpoint.pth")["model"]
        state = {k.removeprefix("encoder."): p for k, p in state.items()}
        assert all(torch.equal(state[name], p) for name, p in weights.items())
    more = [["update_seconds", "position_share", "probe_accuracy"],
            ["test_accuracy", "cached_accuracy"], ["test_accuracy"]]
    for prefix, epochs, names in zip(PREFIXES, ([*range(1, 7)], [1, 2], [1, 2]), more):
        header = ["epoch", "loss", "lr", "images_per_second", "seconds", *names]
        assert [*rows(finished, prefix)[0]] == header
        assert column(finished, "epoch", prefix) == epochs
    assert [x is None for x in column(finished, "probe_accuracy")] == [True, True, False] * 2
    for name in ("test_accuracy", "cached_accuracy"):
        assert [x is None for x in column(finished, name, "probe-")] == [True, False]
    # No step of pretraining follows the last row, so both probed the same encoder.
    assert rows(finished)[-1]["probe_accuracy"] == rows(finished, "probe-")[-1]["cached_accuracy"]
    assert all(5 < x < 40 for x in column(finished, "test_accuracy", "finetune-"))
    assert column(finished, "loss")[-1] < column(finished, "loss")[0] - 0.08


def test_the_schedule_of_a_run(finished, tmp_path, monkeypatch):
    steps = record(monkeypatch)
    run(tmp_path, *NO_PROBE)
    assert [step["ratios"] for step in steps] == 8 * [(0.75, 0.0)] + 16 * [(0.45, 0.40)]
    maps = [step["maps"] for step in steps]
    assert maps[:8] == 8 * [None] and not torch.equal(maps[8], maps[16])
    assert all(m is maps[8] for m in maps[8:16]) and all(m is maps[16] for m in maps[16:])
    peak = 4e-3 * 32 / 256                               # after one epoch of warm-up
    rates = [0, peak / 2, *(peak * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10))]
    assert [step["lr"] for step in steps] == pytest.approx([x for x in rates for _ in range(2)])
    assert column(tmp_path, "lr") == pytest.approx(rates[1::2], rel=1e-3)
    means = [sum(step["loss"] for step in steps[i:i + 4]) / 4 for i in range(0, 24, 4)]
    assert column(tmp_path, "loss") == pytest.approx(means, abs=1e-5)
    for a, b in itertools.combinations(steps, 2):
        assert not torch.equal(a["ranking"], b["ranking"])
    assert_same(saved(tmp_path)["model"], saved(finished)["model"])      # probes change nothing


@pytest.mark.parametrize("masking, method", [
    ("attmask", "mae"), ("mst", "simmim"), ("grid", "mae"), ("block", "maskfeat")])
def test_strategies_rank_by_the_maps_of_crops_or_without(masking, method, tmp_path, monkeypatch):
    steps = record(monkeypatch)
    run(tmp_path, "--masking", masking, "--method", method, "--epochs", 2, "--update-interval", 1,
        "--patch-size", 4, "--mask-ratio", 0.5, "--throw-ratio", 0.25, *NO_PROBE)
    uses_maps, unit = masking in ("attmask", "mst"), 1 if method == "mae" else 2
    first, N = train_cifar.METHODS[method]["random"] if uses_maps else (0.5, 0.25), 64 // unit ** 2
    assert [step["ratios"] for step in steps] == 4 * [first] + 4 * [(0.5, 0.25)]
    for i, step in enumerate(steps):
        ranking = step["ranking"]
        assert ranking.shape == (16, N) and len(ranking.unique(dim=0)) > 1
        assert (step["maps"] is not None) == (uses_maps and i >= 4)
        if step["maps"] is not None:
            weights = amt.crop_weights(step["maps"][step["ids"]], step["theta"], 32, 4 * unit)
            assert torch.equal(ranking, train_cifar.STRATEGIES[masking](weights))
    assert len(tiles(tmp_path / "masking.png")) == (3 if method == "maskfeat" else 4)
    assert (tmp_path / "attention.png").exists() == uses_maps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_that_of_the_model_on_normalised_crops(precision, monkeypatch):
    steps, args = record(monkeypatch), parse("--patch-size", 4, "--precision", precision)
    stage = train_cifar.Pretraining(args, train_cifar.load_data(args))
    unsettle(stage.model)
    for ids, images, theta in train_cifar.batches(stage, 0):
        pixels = amt.crop(stage.data.train[ids].float(), theta, 32, "bicubic").clamp(0, 255)
        torch.testing.assert_close(images, pixels)
        loss = stage.loss(ids, images, theta).item()
        masked, _, visible = steps[-1]["sets"]
        images = stage.data.normalise(images)
        expected = stage.model(images, visible=visible, masked=masked)[0].item()
        assert (loss == expected) == (precision == "fp32") and stage.model.norm_pix_loss
        assert loss == pytest.approx(expected, rel=0.02)
    pixels = stage.data.normalise(stage.data.train.float())
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-3


def test_maps_are_the_attention_of_whole_images_and_weights_change_them(tmp_path):
    maps, data = {}, train_cifar.load_data(parse())
    for weights in ("own", "shuffled", "uniform", "debiased"):
        stage = train_cifar.Pretraining(parse("--out-dir", tmp_path, "--weights", weights), data)
        unsettle(stage.model)
        for epoch in (0, 1, 3, 5, 2):                    # of these, an update is due at 2 only
            assert stage.run["maps"] is None and stage.run["position_share"] == ""
            stage.start_epoch(epoch)
        maps[weights] = stage.run["maps"].float()
        own = amt.attention_maps(stage.model.encoder, data.normalise(data.train.float()))
        share = (own.mean(dim=0).var() / own.var()).item()
        assert float(stage.run["position_share"]) == pytest.approx(share, abs=1e-3)
    torch.testing.assert_close(maps["own"], own, rtol=1e-3, atol=1e-3)
    assert maps["uniform"].eq(1).all() and maps["uniform"].shape == (70, 4, 4)
    distance = torch.cdist(maps["shuffled"].flatten(1), own.flatten(1))
    source = distance.argmin(dim=1)                      # each is the map of another image
    assert len(source.unique()) == 70 and (source == torch.arange(70)).sum() < 10
    assert distance.amin(dim=1).max() < 0.01
    ratio = own / own.mean(dim=0)
    low, high = ratio.amin(dim=(1, 2), keepdim=True), ratio.amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(maps["debiased"], (ratio - low) / (high - low), rtol=0, atol=2e-3)


def test_only_the_matrices_of_linear_layers_have_weight_decay():
    model = train_cifar.build_model(parse())
    optimizer = train_cifar.build_optimizer(model)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert decay == {p: 0.05 * (p in matrices) for p in model.parameters() if p.requires_grad}
    assert optimizer.defaults["betas"] == (0.9, 0.95)


# ==== Mini-batches ================================================================================

class Drawing(train_cifar.Stage):
    """A stage that learns nothing. It notes its draws and its gradients."""

    def __init__(self, args, data, name="drawing"):
        model, self.draws, self.gradients = nn.Linear(1, 1, bias=False), [], []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        super().__init__(args, data, name, model, optimizer, 1e-9, 3, len(data.train))
        self.parallel, weight = model, model.weight
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(weight.grad.item()))
        nn.init.ones_(weight)

    def loss(self, ids, images, theta):
        self.draws.append(tuple(torch.rand(3).tolist()))
        return self.model.weight.sum() * (1 + 2 * (len(self.draws) % 2))     # 3, 1, 3, 1, ...


def test_gradients_are_the_mean_of_the_mini_batches_and_random_numbers_never_repeat(tmp_path):
    stage = Drawing(parse("--out-dir", tmp_path), train_cifar.load_data(parse()))
    train_cifar.fit(stage)
    assert stage.gradients == pytest.approx(6 * [2.0]) and len(set(stage.draws)) == 12
    assert [float(row["loss"]) for row in stage.run["log"]] == pytest.approx(3 * [2.0])


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_each_epoch_seed_and_stage_draws_its_own_order_and_crops(where, tmp_path):
    flags = on_disk(make_pictures(tmp_path)) if where == "disk" else []
    data, seen = train_cifar.load_data(parse(*flags)), []
    for seed, name, epoch in [(0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0), (0, "a", 0)]:
        stage = Drawing(parse(*flags, "--seed", seed), data, name)
        batches = list(train_cifar.batches(stage, epoch * stage.steps))
        ids, images, theta = (torch.cat(parts) for parts in zip(*batches))
        assert len(batches) == 2 * stage.steps and len(ids.unique()) == len(ids)
        rest = list(train_cifar.batches(stage, epoch * stage.steps + 1))     # of a resumed run
        assert_same([list(x) for x in batches[2:]], [list(x) for x in rest])
        seen.append((ids, theta))
    assert_same(seen.pop(), seen[0])
    for (a, theta_a), (b, theta_b) in itertools.combinations(seen, 2):
        assert not torch.equal(a, b)
        place_a, place_b = (a[:, None] == b).nonzero(as_tuple=True)          # of the same images
        assert not theta_a[place_a].eq(theta_b[place_b]).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_randaugment_changes_each_image_in_its_own_way(where, tmp_path):
    flags = on_disk(make_pictures(tmp_path)) if where == "disk" else []
    data = train_cifar.load_data(parse(*flags))
    equal = data.train[9:10]
    data.train = equal.expand(16, -1, -1, -1) if where == "memory" else 16 * equal

    def crops(augment, seed):
        torch.manual_seed(seed)                          # decides in memory; on disk the key does
        batches = list(data.crops(torch.arange(16), (0.9, 1.0), augment, (seed, "finetune", 0)))
        return [torch.cat(parts) for parts in zip(*batches)]

    (_, plain, theta), (_, augmented, same), (_, again, _) = crops(0, 1), crops(1, 1), crops(1, 1)
    assert torch.equal(augmented, again) and not torch.equal(augmented, crops(1, 2)[1])
    assert torch.equal(theta, same)                      # RandAugment does not change the crop
    assert (augmented - plain).mean(dim=(1, 2, 3)).std() > 4     # of equal images


# ==== Linear probe and fine-tuning ================================================================

class ColourEncoder(nn.Module):
    """[CLS] is the mean colour, shifted and scaled so that only a BatchNorm makes it fit."""
    embed_dim = 3

    def __init__(self):
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(1)), []

    def forward(self, images):
        assert not self.training
        self.seen.append(images)
        cls = 100 + 1e-3 * self.scale * images.mean(dim=(2, 3))
        return torch.stack([cls, torch.full_like(cls, math.nan)], dim=1)


def colours(n):
    """n images in four colours, darker on the left, and the colours as labels."""
    labels = torch.arange(n) % 4
    colour = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])[labels]
    return (colour[:, :, None, None] * torch.linspace(0.5, 1, 32).expand(32, 32)).byte(), labels


def test_the_probe_trains_a_linear_layer_alone_and_counts_each_test_image_once(tmp_path):
    args = parse("--accum-steps", 1, "--probe-blr", 8, "--out-dir", tmp_path)
    images, labels = colours(1)[0].expand(37, -1, -1, -1), torch.zeros(37, dtype=torch.int64)
    labels[36] = 1                                       # is wrong: 36 of 37 are right
    data = train_cifar.Images(args, colours(200), (images, labels))
    encoder = ColourEncoder().train()
    args.probe_epochs = 10
    probe = train_cifar.LinearProbe(args, data, encoder)
    train_cifar.fit(probe)
    assert column(tmp_path, "test_accuracy", "probe-")[-1] == round(100 * 36 / 37, 2)
    assert column(tmp_path, "cached_accuracy", "probe-")[-1] == round(100 * 36 / 37, 2)
    assert encoder.scale.item() == 1 and encoder.scale.grad is None
    assert set(load(tmp_path / "probe-checkpoint.pth")["model"]) == {
        "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias"}
    # 120 steps on crops, then whole images: the test images, and for the cached probe all images.
    train, whole = torch.cat(encoder.seen[:120]), torch.cat(encoder.seen[120:])
    pixels = torch.cat([images, data.train, images]).float()
    torch.testing.assert_close(whole, data.normalise(pixels))
    rise = (train[:, :, :, -1] - train[:, :, :, 0]).sum(dim=(1, 2))
    assert (rise > 0).float().mean().item() == pytest.approx(0.5, abs=0.06)  # flips
    assert rise.abs().std() > 0.1 * rise.abs().mean()    # crops
    assert probe.lr == pytest.approx(8 * 16 / 256) and probe.warmup == 0
    assert probe.optimizer.defaults["momentum"] == 0.9


def test_drop_path_skips_branches_of_whole_images_in_training_and_keeps_the_mean():
    vit, x = amt.ViT(16, 4, 8, 3, 2), torch.randn(2000, 3, 8, generator=rng())
    plain = [[block(x), block.attn(x), block.mlp(x)] for block in vit.blocks]
    train_cifar.add_drop_path(vit, 0.5)
    for block, results in zip(vit.eval().blocks, plain):
        assert torch.equal(block(x), results[0])
    torch.manual_seed(0)
    for block, results, p in zip(vit.train().blocks, plain, (0, 0.25, 0.5)):
        skipped = (block(x) == x).flatten(1).all(dim=1).float().mean().item()
        assert skipped == pytest.approx(p ** 2, abs=0.03)        # of images that skip both branches
        for branch, result in zip((block.attn, block.mlp), results[1:]):
            kept = (branch(x) / result).round(decimals=3).flatten(1)         # 0 or 1 / (1 - p)
            assert (kept == kept[:, :1]).all()
            assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - p)] if p else [1], abs=1e-3)


@pytest.mark.parametrize("flags, decay", [([], 0.75), (["--checkpoint", "none", "--epochs", 0], 1)])
def test_finetuning_decays_the_rate_by_layer_mixes_smooths_and_crops(flags, decay, tmp_path,
                                                                    monkeypatch):
    args = parse("--depth", 2, "--accum-steps", 1, "--finetune-epochs", 8, "--finetune-blr", 3e-2,
                 "--out-dir", tmp_path, *flags)
    images, labels = colours(37)
    labels[36] += 1                                      # is wrong: 36 of 37 are right
    data = train_cifar.Images(args, colours(64), (images, labels))
    pretrained = unsettle(amt.vit_tiny(img_size=32, patch_size=8, depth=2))
    stage, rates = train_cifar.FineTuning(args, data, pretrained), set()
    monkeypatch.setattr(train_cifar, "stochastic_depth", lambda x, p, *_: rates.add(p) or x)
    assert stage.optimizer.defaults["betas"] == (0.9, 0.999)
    assert 0 < stage.model.head.weight.abs().max() < 1e-3
    targets, inputs, cross_entropy = [], [], F.cross_entropy

    def entropy(logits, target, label_smoothing):
        targets.append(target)
        assert label_smoothing == 0.1
        return cross_entropy(logits, target, label_smoothing=label_smoothing)

    monkeypatch.setattr(F, "cross_entropy", entropy)
    stage.model.register_forward_pre_hook(lambda model, x: inputs.append((*x, model.training)))
    before = {name: p.clone() for name, p in pretrained.state_dict().items()}
    train_cifar.fit(stage)
    assert_same(dict(pretrained.state_dict()), before)
    assert rates == {0, 0.1}                             # of drop path
    args.finetune_epochs = 40
    assert train_cifar.FineTuning(args, data, pretrained).warmup == 2
    last = 3e-2 * 16 / 256 * (0.5 + 0.5 * math.cos(math.pi * 31 / 32))
    groups = stage.optimizer.param_groups
    rates = {p: group["lr"] / last for group in groups for p in group["params"]}
    layers = {"encoder.cls_token": 0, "encoder.patch_embed": 0, "encoder.blocks.0": 1,
              "encoder.blocks.1": 2, "encoder.norm": 3, "head": 3}
    for name, p in stage.model.named_parameters():
        if p.requires_grad:
            layer, = (layer for start, layer in layers.items() if name.startswith(start))
            assert rates[p] == pytest.approx(decay ** (3 - layer))
    accuracy = column(tmp_path, "test_accuracy", "finetune-")
    assert accuracy[-1] == round(100 * 36 / 37, 2) and None not in accuracy
    test = torch.cat([x for x, training in inputs if not training])
    torch.testing.assert_close(test, data.normalise(images).repeat(8, 1, 1, 1))
    mixed, train = torch.cat(targets), torch.cat([x for x, training in inputs if training])
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(512))
    assert 0.2 < (mixed.amax(dim=1) < 0.999).float().mean() < 0.95
    rows_alike = (train - train[:, :, :1]).abs().amax(dim=(1, 2, 3)) < 1e-3
    assert 0.2 < rows_alike.float().mean() < 0.9         # CutMix pastes boxes, and MixUp does not
    rise = (train[:, :, 0, -1] - train[:, :, 0, 0]).amax(dim=1)[rows_alike]
    assert (rise > 0).any() and (rise <= 0).any()        # flips


@pytest.mark.parametrize("kind", ["script", "timm", "mae", "other grid"])
def test_encoders_of_each_kind_load(kind, tmp_path):
    size = 64 if kind == "other grid" else 32
    encoder = unsettle(amt.vit_tiny(img_size=size, patch_size=4, depth=1))
    line = (2 * torch.arange(size // 4) + 1) / (size // 4) - 1               # centres of patches
    encoder.pos_embed.data[0, 1:, :2] += torch.cartesian_prod(line, line)
    content = state = dict(encoder.state_dict())
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_blocks.0.norm1.bias": torch.zeros(8)}
    if kind == "script":
        content = {"model": {f"encoder.{k}": p for k, p in state.items()} | decoder, "run": {}}
    if kind == "timm":
        content = state | {"head.weight": torch.zeros(7, 192), "head.bias": torch.zeros(7)}
    if kind == "mae":
        content = {"model": state | decoder, "args": argparse.Namespace(lr=0.1), "epoch": 800}
    torch.save(content, tmp_path / "saved.pth")
    flags = ["--epochs", 0, "--checkpoint", tmp_path / "saved.pth", "--patch-size", 4]
    loaded = dict(train_cifar.load_encoder(parse(*flags)).state_dict())
    if kind == "other grid":                             # the mean of 2 x 2 is close
        new, old = (x.pop("pos_embed") for x in (loaded, state))
        assert torch.equal(new[:, 0], old[:, 0])
        old = F.avg_pool2d(old[:, 1:].transpose(1, 2).unflatten(2, (16, 16)), 2)
        new = new[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        torch.testing.assert_close(*(x[:, :2, 1:-1, 1:-1] for x in (new, old)), rtol=0, atol=0.05)
    assert_same(loaded, state)
    line = error(tmp_path / "out", *flags, "--depth", 2)
    assert re.search("--checkpoint .* does not load as a ViT .*Missing key.*blocks.1.attn", line)


# ==== Pictures, benchmark, printed lines ==========================================================

def tiles(path):
    """The pictures (rows, columns, 3, 32, 32), 0 to 255, of a grid."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[:, 4:, 4:]
    pixels = pixels.unfold(1, 132, 132).unfold(2, 132, 132)[..., :128:4, :128:4]
    return pixels.permute(1, 2, 0, 3, 4).float()


def test_masking_png_shows_masked_patches_grey_and_thrown_ones_black(finished):
    shown, heat, hidden, predicted = tiles(finished / "masking.png")
    updates = tiles(finished / "attention.png")
    assert torch.equal(updates[0], shown) and len(updates) == 3
    data, encoder = train_cifar.load_data(parse()), amt.vit_tiny(32, 8, depth=1)
    distance = torch.cdist(shown.flatten(1), data.test.flatten(1).float())
    assert distance.amin(dim=1).max() == 0               # these are test images
    encoder.load_state_dict(load(finished / "encoder.pth"))
    maps = amt.attention_maps(encoder, data.normalise(shown))
    expected = torch.stack([3 * maps, 3 * maps - 1, 3 * maps - 2], dim=1).clamp(0, 1)
    torch.testing.assert_close(heat[:, :, 4::8, 4::8] / 255, expected, rtol=0, atol=0.01)
    shown, hidden, predicted = (amt.patchify(x, 8) for x in (shown, hidden, predicted))
    masked, thrown = (hidden == 128).all(dim=2), (hidden == 0).all(dim=2)
    visible = ~masked & ~thrown
    assert masked.sum(dim=1).tolist() == 8 * [7] and thrown.sum(dim=1).tolist() == 8 * [6]
    assert torch.equal(hidden[visible], shown[visible])
    assert maps.flatten(1)[masked].mean() > maps.flatten(1)[visible].mean() + 0.1
    assert torch.equal(predicted[~masked], hidden[~masked])
    assert (predicted[masked].mean(dim=1) - shown[masked].mean(dim=1)).abs().mean() < 15


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_the_benchmark_prints_a_row_for_each_ratio(method, tmp_path, monkeypatch, capsys):
    def blocks(T, D):
        """qkv, proj, mlp, q k^T and a v; the gradients cost twice as much as the forward pass."""
        return 3 * 2 * (12 * T * D ** 2 + 2 * T ** 2 * D)

    steps = record(monkeypatch)
    run(tmp_path / "none", "--benchmark", "--method", method, "--batch-size", 4, "--patch-size", 4)
    title, _, *lines, update = capsys.readouterr().out.replace(",", "").splitlines()
    assert not (tmp_path / "none").exists() and f"{method} vit_tiny 32 pixels" in title
    ratios = [train_cifar.METHODS[method]["random"], *train_cifar.METHODS[method]["amt"]]
    assert [line.split()[0] for line in lines] == ["random", *(len(ratios) - 1) * ["attention"]]
    unit, operations = 1 if method == "mae" else 4, []
    for line, pair in zip(lines, ratios):
        mask, throw, ms, images, gflop, of_time, of_gflop = map(float, re.findall(r"[\d.]+", line))
        units = 64 // unit
        M = unit * round(units * mask)
        K = 64 - M - unit * round(units * throw)
        if method == "mae":                              # images have no gradient
            operations.append(blocks(1 + K, 192) + 4 * K * 48 * 192 + blocks(1 + K + M, 32)
                              + 6 * ((1 + K) * 192 * 32 + M * 32 * 48))
        else:
            operations.append(blocks(1 + K + M, 192) + 4 * K * 48 * 192 + 6 * M * 192 * 48)
        first_ms = ms if pair == ratios[0] else first_ms
        assert of_time == pytest.approx(ms / first_ms, abs=0.01)
        assert (mask, throw) == pair and images == pytest.approx(4e3 / ms, rel=0.05)
        assert gflop == pytest.approx(operations[-1] / 1e9, abs=6e-4)
        assert of_gflop == pytest.approx(operations[-1] / operations[0], abs=6e-3)
    assert re.match(r"update of the attention maps: [\d.]+ images/s", update)
    assert {(step["maps"] is not None, step["ratios"]) for step in steps} == {
        (i > 0, pair) for i, pair in enumerate(ratios)}


def test_a_line_is_printed_each_minute_and_the_log_counts_each_second_once(tmp_path, monkeypatch,
                                                                           capsys):
    now, update, loss = [1e9], amt.dataset_maps, train_cifar.Pretraining.loss
    monkeypatch.setattr(train_cifar.time, "time", lambda: now[0])
    monkeypatch.setattr(train_cifar.progress, "last", now[0])

    def taking(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)
        return slow

    monkeypatch.setattr(amt, "dataset_maps", taking(100, update))
    monkeypatch.setattr(train_cifar.Pretraining, "loss", taking(10, loss))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_call(patch, "Pretraining", 13, lambda x: os.kill(os.getpid(), signal.SIGTERM) or x)
        run(tmp_path, *NO_PROBE)
    train_cifar.SIGNALS.clear()
    now[0] += 5000
    run(tmp_path, "--resume", *NO_PROBE)
    assert column(tmp_path, "seconds") == pytest.approx([40, 40, 140, 40, 140, 40])
    assert column(tmp_path, "update_seconds") == pytest.approx([0, 0, 100, 0, 100, 0])
    assert column(tmp_path, "images_per_second") == 6 * [2]                  # 64 images in 40 s
    lines = re.findall(r"epoch (\d) of 6, step (\d) of 2", capsys.readouterr().out)
    assert lines == [("2", "1"), ("3", "1"), ("4", "2"), ("5", "1"), ("6", "2")]


# ==== Data sets ===================================================================================

def picture(width, height, seed=0):
    """A smooth random image. No two places in it look alike."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_pictures(root):
    """A folder of two classes: 37 training and 7 test images of many sizes and modes."""
    kinds = itertools.cycle(["RGB", "L", "CMYK", "P", "RGBA", "LA", "1"])
    for i, kind in zip(range(44), kinds):
        image = picture(20 + 7 * i, 300 - 6 * i, i)
        path = root / ("train" if i < 37 else "val") / f"n{i % 2}" / str(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = ".JPEG" if kind in ("RGB", "L", "CMYK") else ".png"
        image.convert(kind).save(path.with_suffix(suffix))
    return root


def on_disk(root, *flags):
    return ["--dataset", "imagenet", "--data-path", root, "--model", "vit_tiny", "--batch-size", 6,
            "--blr", 3e-2, *flags]


def opened(path):
    with Image.open(path) as file:
        return file.convert("RGB")


def box_of(theta, size):
    """The box (left, top, right, bottom), in pixels, that theta describes."""
    side, middle = theta[[0, 1], [0, 1]].abs(), theta[:, 2] + 1
    return torch.cat([middle - side, middle + side]) / 2 * torch.tensor(2 * size)


def resized(image, box, size=32, flip=False):
    """The box of an image as Pillow resizes it: (3, size, size)."""
    box = torch.as_tensor(box).clamp(min=0).tolist()
    image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    image = ImageOps.mirror(image) if flip else image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("workers", [0, 2])
def test_theta_says_which_part_of_an_image_on_disk_is_shown(workers, tmp_path):
    data = train_cifar.load_data(parse(*on_disk(make_pictures(tmp_path), "--workers", workers)))
    order = torch.randperm(37, generator=rng())
    batches = data.crops(order, (0.2, 1.0), False, (0, "pretraining", 0))
    ids, images, thetas = (torch.cat(parts) for parts in zip(*batches))
    areas = (thetas[:, 0, 0] * thetas[:, 1, 1]).abs()
    assert torch.equal(ids, order) and images.shape == (37, 3, 32, 32)
    assert areas.min() > 0.12 and areas.std() > 0.1 and 8 < (thetas[:, 0, 0] < 0).sum() < 29
    for i, image, theta in zip(ids.tolist(), images, thetas):
        whole = opened(data.train[i])
        aspect = whole.width / whole.height * (theta[0, 0] / theta[1, 1]).abs()
        assert 0.7 < aspect < 1.42 or theta[[0, 1], [0, 1]].abs().max() > 0.95
        expected = resized(whole, box_of(theta, whole.size), flip=theta[0, 0] < 0)
        dithered = int(Path(data.train[i]).stem) % 7 == 6                   # mode "1"
        assert (image - expected).abs().mean() < (20 if dithered else 6)
    for split, paths, labels in [("train", data.train, data.train_labels),
                                 ("test", data.test, data.test_labels)]:
        assert labels.tolist() == [int("/n1/" in path) for path in paths]
        ids = torch.arange(len(paths) - 1, 0, -2)
        batches = list(data.whole(split, ids))
        assert torch.equal(torch.cat([part for part, _ in batches]), ids)
        for i, image in zip(ids.tolist(), torch.cat([images for _, images in batches])):
            whole = opened(paths[i])
            (W, H), side = whole.size, 0.875 * min(whole.size)               # a central square
            box = [(W - side) / 2, (H - side) / 2, (W + side) / 2, (H + side) / 2]
            expected = resized(whole, [0, 0, W, H] if split == "train" else box)
            assert (image - expected).abs().mean() < 6
    mean = data.normalise(torch.tensor([124.0, 116, 104])[:, None, None])
    assert mean.abs().max() < 0.01


def test_a_crop_is_of_the_nearest_whole_pixels_and_of_one_at_least(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 9, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    for seed, scale in itertools.product(range(20), [(0.05, 0.1), (0.2, 1.0)]):
        _, pixels, theta = train_cifar.Decoder((tmp_path / "a.png",), 32, scale, False, (seed,))[0]
        g = rng(train_cifar.seed_of((seed,), 0))
        drawn, = amt.random_crops(1, scale, generator=g, image_ratio=9 / 4)
        box = box_of(theta, (9, 4)).round()
        torch.testing.assert_close(box_of(theta, (9, 4)), box, rtol=0, atol=1e-4)
        one_pixel = (box[2:] - box[:2] == 1).repeat(2)
        assert (box[:2] >= 0).all() and (box[2:] > box[:2]).all()
        assert (((box - box_of(drawn, (9, 4))).abs() < 0.501) | one_pixel).all()
        part = image.crop(box.int().tolist())            # Pillow would blur beyond the box
        expected = resized(part, [0, 0, *part.size], flip=theta[0, 0] < 0)
        assert (expected - pixels.permute(2, 0, 1)).abs().max() <= 2
        assert (theta[0, 0] < 0) == (drawn[0, 0] < 0)


def test_a_large_jpeg_is_decoded_no_larger_than_its_crop_needs(tmp_path, monkeypatch):
    decoded, load_prepare, path = [], JpegImageFile.load_prepare, tmp_path / "a.jpg"
    picture(1000, 600).save(path)
    whole = opened(path)
    monkeypatch.setattr(JpegImageFile, "load_prepare",
                        lambda self: decoded.append(self.size) or load_prepare(self))
    for seed in range(40):
        _, pixels, theta = train_cifar.Decoder((path,), 64, (0.005, 1.0), False, (seed,))[0]
        scale = decoded[-1][0] / 1000
        needed = (theta[[0, 1], [0, 1]].abs() * torch.tensor(whole.size) * scale).min()
        assert needed > 63 and (needed < 2 * 65 or scale == 1 / 8)
        expected = resized(whole, box_of(theta, whole.size), 64, theta[0, 0] < 0)
        assert (pixels.permute(2, 0, 1) - expected).abs().mean() < 3
    assert set(decoded) == {(1000, 600), (500, 300), (250, 150), (125, 75)}


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    root = make_pictures(tmp_path / "images")
    broken, wide = root / "train" / "n1" / "1.JPEG", root / "train" / "n0" / "wide.png"
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(wide)
    for path, words in [(wide, "mode I;16 has more than 8 bits"), (broken, "truncated")]:
        for dataset, workers in [("folder", 0), ("imagenet", 0), ("imagenet", 2)]:
            flags = [*on_disk(root), "--dataset", dataset, "--workers", workers]
            if workers:                                  # they must let the program end
                codes, line = processes(tmp_path, [["--out-dir", tmp_path / path.stem, *flags]])
                assert codes == [1] and "Traceback" not in line
            else:
                line = error(tmp_path / "out", *flags)
            assert f"error: cannot decode {path} (" in line and words in line and "remove" in line
        wide.unlink(missing_ok=True)
        broken.write_bytes(broken.read_bytes()[:1000])


@pytest.mark.parametrize("dataset", ["folder", "tiny-imagenet"])
def test_folders_are_decoded_once_to_central_squares_with_the_labels_of_train(dataset, tmp_path):
    """n01 is red and n02 is green. val has no n01. Blue rises from left to right."""
    tiny = dataset == "tiny-imagenet"
    for i in range(37):
        kind = "val/" + ("images" if tiny else "n02") if i > 33 else f"train/n0{1 + i % 2}/images"
        pixels = np.zeros((64, 128, 3), np.uint8)
        pixels[:, :, 1 if i > 33 else i % 2], pixels[:, :, 2] = 100 + i, np.arange(128)
        (tmp_path / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    lines = "".join(f"{i}.png\tn02\t0\t0\t62\t62\n" for i in (36, 34, 35))
    (tmp_path / "val" / "val_annotations.txt").write_text(lines)
    flags = ["--dataset", dataset, "--data-path", tmp_path, "--batch-size", 8]
    data = train_cifar.load_data(parse(*flags))
    assert isinstance(data, train_cifar.Images) and data.classes == 2
    colour = data.train.amax(dim=(2, 3))
    for label, first in [(0, 100), (1, 101)]:
        assert sorted(colour[data.train_labels == label, label]) == [*range(first, 134, 2)]
    assert data.test[:, 1, 0, 0].tolist() == ([136, 134, 135] if tiny else [134, 135, 136])
    assert data.test_labels.tolist() == [1, 1, 1]
    assert (data.train[:, 2] - (torch.arange(32) * 2 + 32.5)).abs().max() <= 1.5
    (tmp_path / "val").rename(tmp_path / "test")
    assert f"--data-path {tmp_path} does not have the layout" in error(tmp_path / "out", *flags)


class Fake:
    """A download of torchvision: 40 images to train on, of which 17 have labels, and 4 to test."""
    base_folder, calls, targets = "fake", [], [i % 3 for i in range(40)]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)

    def __init__(self, root, train=True, split="train+unlabeled", download=False):
        self.calls.append((split, download))
        n = 4 if split == "test" or not train else 40
        self.data, self.targets = self.pixels[:n], self.targets[:n]
        if root == "stl10":
            self.data = self.data.transpose(0, 3, 1, 2)
            self.labels = np.array([x if i < 17 else -1 for i, x in enumerate(self.targets)])


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "STL10"])
def test_downloads_are_torchvisions_and_only_images_with_labels_are_probed(name, tmp_path,
                                                                          monkeypatch):
    flags = ["--dataset", name.lower(), "--data-path", name.lower()]
    n = 17 if name == "STL10" else 40
    with monkeypatch.context() as patch:
        patch.setattr(train_cifar, name, Fake)
        kinds = ["Pretraining", "LinearProbe", "FineTuning"]
        steps = [record(patch, getattr(train_cifar, kind)) for kind in kinds]
        data, pixels = train_cifar.load_data(parse(*flags)), Fake.pixels.transpose(0, 3, 1, 2)
        assert np.array_equal(data.train, pixels) and np.array_equal(data.test, pixels[:4])
        assert data.train_labels.tolist() == Fake.targets[:n] and data.classes == 3
        assert data.test_labels.tolist() == [0, 1, 2, 0] and data.test_labels.dtype == torch.int64
        run(tmp_path, *flags, "--batch-size", 8, "--epochs", 3, "--finetune-epochs", 1)
        all_ids, *others = [{i for step in kind for i in step["ids"]} for kind in steps]
        assert max(all_ids) > 34 and all(len(ids) > 12 and max(ids) < n for ids in others)

    def offline(self):
        raise OSError("no route to host")

    monkeypatch.setattr(getattr(train_cifar, name), "download", offline)
    line = error(tmp_path / "out", *flags)
    assert f"--data-path {name.lower()} (no route to host)" in line and "connect to the" in line


def test_neither_the_outline_nor_the_texture_of_a_shape_tells_its_class():
    images, labels = train_cifar.shapes(600, seed=3)
    assert images.shape == (600, 3, 32, 32) and labels.bincount().tolist() == 10 * [60]
    assert torch.equal(images, train_cifar.shapes(600, seed=3)[0])
    outlines, textures = torch.zeros(2, 10, 32, 32)
    # The object has the two colours, a dark and a light one, that most pixels have.
    for image, label in zip(images.long(), labels):
        code = (image * torch.tensor([65536, 256, 1])[:, None, None]).sum(dim=0)
        values, counts = code.unique(return_counts=True)
        dark, light = (code == values[counts.topk(2).indices].sort().values[:, None, None]).float()
        outlines[label] += (dark + light) / 60
        textures[label] += (light - dark) / 60
    for c in range(5, 10):
        assert (outlines[c] - outlines[c - 5]).abs().mean() < 0.06           # the same outline
        both = (outlines[c] > 0.8) & (outlines[:5] > 0.8)
        far = ((textures[c] - textures[:5]).abs() * both).sum(dim=(1, 2)) / both.sum(dim=(1, 2))
        assert far.argmin() == (c + 1) % 5               # has the texture of another class


# ==== Runs that are stopped, and several processes ================================================

@pytest.mark.parametrize("kind, call, number, given, prefix, step", [
    ("Pretraining", 13, signal.SIGTERM, [], "", 7),      # in the middle of epoch 4
    ("Pretraining", 8, signal.SIGINT, [], "", 4),        # at the end of epoch 2, before new maps
    ("LinearProbe", 5, signal.SIGHUP, [""], "probe-", 3),
    ("FineTuning", 3, signal.SIGINT, ["", "probe-"], "finetune-", 2)])
def test_a_run_that_a_signal_stops_ends_as_an_unbroken_one_once_resumed(
        kind, call, number, given, prefix, step, finished, tmp_path, monkeypatch, capsys):
    for name in (stage + name for stage in given for name in ("checkpoint.pth", "log.csv")):
        shutil.copy(finished / name, tmp_path)           # this stage has ended
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        at_call(patch, kind, call, lambda loss: os.kill(os.getpid(), number) or loss)
        run(tmp_path, *ALL_STAGES, *(["--resume"] if given else []))
    assert caught.value.code == 128 + number
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name} after step ") and "--resume" in last
    assert load(tmp_path / f"{prefix}checkpoint.pth")["run"]["step"] == step
    train_cifar.SIGNALS.clear()
    later = kind != "Pretraining"
    run(tmp_path, "--resume", *(ALL_STAGES if later else ["--probe-every", 3, *NO_PROBE]))
    for stage in PREFIXES if later else [""]:
        assert_same(saved(tmp_path, stage), saved(finished, stage))
    for name in ["finetuned.pth"] if later else ["encoder.pth"]:
        assert_same(load(tmp_path / name), load(finished / name))


LATER = "now = train_cifar.time.time; train_cifar.time.time = lambda: now() + 2"


def test_a_run_killed_by_a_second_signal_ends_as_an_unbroken_one_once_resumed(finished, tmp_path):
    out, code = tmp_path / "out", f"{SEND('SIGTERM')}; {LATER}; {SEND('SIGTERM')}"
    codes, _ = processes(tmp_path, [["--out-dir", out, "--save-every", 2]], (0, 13, code))
    assert codes == [143]
    assert load(out / "checkpoint.pth")["run"]["step"] == 4
    (out / "log.csv").open("a").write("5,0.1")           # a row that the kill cut short
    run(out, "--resume", "--probe-every", 3, *NO_PROBE)
    assert_same(saved(out), saved(finished))


def test_a_signal_to_one_process_stops_both_and_one_process_can_resume(finished, tmp_path):
    flags = ["--accum-steps", 1, "--probe-every", 3, "--out-dir", tmp_path / "out"]
    twice = f"{SEND('SIGTERM')}; {SEND('SIGTERM')}"      # as torchrun and Slurm do
    codes, said = processes(tmp_path, [flags, flags], (1, 7, twice))
    assert codes == [143, 143] and "stopped by SIGTERM after step 7 of pretraining" in said
    out = run(tmp_path / "out", "--resume", *NO_PROBE)
    one, other = saved(out), saved(finished)
    assert_close_models(one, other)
    assert_same(one["run"]["maps"].float(), other["run"]["maps"].float(), rtol=0, atol=1e-2)
    assert column(out, "loss") == pytest.approx(column(finished, "loss"), rel=1e-4)


def test_two_processes_with_workers_do_what_one_process_does(tmp_path):
    disk = on_disk(make_pictures(tmp_path / "images"), "--epochs", 2, "--update-interval", 1,
                   "--probe-epochs", 1, "--finetune-epochs", 1, "--finetune-randaugment",
                   "--finetune-blr", 3e-2, "--method", "simmim")
    one, two = run(tmp_path / "one", *disk), tmp_path / "two"
    flags = [*disk, "--accum-steps", 1, "--workers", 2, "--out-dir", two]
    codes, said = processes(tmp_path, [flags, flags])
    assert codes == [0, 0] and said.count("pretraining: epoch 2") == 1, said
    for prefix in ("", "finetune-"):
        assert_close_models(saved(one, prefix), saved(two, prefix))
        assert column(one, "loss", prefix) == pytest.approx(column(two, "loss", prefix), rel=1e-3)
    maps = [saved(out)["run"]["maps"].float() for out in (one, two)]
    assert_same(*maps, rtol=0, atol=1e-2)
    # The BatchNorm of the probe sees the images of both processes.
    large = ["--epochs", 0, "--checkpoint", two / "encoder.pth", "--finetune-epochs", 0]
    probe = run(tmp_path / "probe", *disk, *large, "--batch-size", 12, "--accum-steps", 1)
    a, b = (saved(out, "probe-") for out in (two, probe))
    assert_same(a["model"], b["model"], rtol=1e-3, atol=1e-4)
    assert a["csv"][0]["test_accuracy"] == b["csv"][0]["test_accuracy"]


def test_another_run_cannot_use_the_directory(tmp_path, monkeypatch):
    flags, seen = ["--out-dir", tmp_path / "out", *ONE_EPOCH], []
    at_call(monkeypatch, "Pretraining", 2,
            lambda loss: seen.extend(processes(tmp_path, [flags])) or loss)
    run(tmp_path / "out", *flags)
    assert seen[0] == [1] and f"error: another run is writing to {tmp_path / 'out'}" in seen[1]
    line = error(tmp_path / "out")
    assert "has files of an earlier run" in line and "--resume" in line


@pytest.mark.parametrize("call, action", [
    (10, lambda loss: loss * math.nan),
    (12, lambda loss: loss.register_hook(lambda g: g * math.nan) and loss),
    (9, lambda loss: os.kill(os.getpid(), signal.SIGTERM) or loss * math.inf)],
    ids=["the loss", "a gradient", "the loss, and a signal comes"])
def test_nothing_is_saved_that_is_not_finite(call, action, tmp_path, monkeypatch):
    at_call(monkeypatch, "Pretraining", call, action)
    line = error(tmp_path, "--save-every", 1)
    assert "nan or infinite after step" in line and "a lower --blr" in line
    state = load(tmp_path / "checkpoint.pth")
    assert state["run"]["step"] == 4 and column(tmp_path, "epoch")[:2] == [1, 2]
    tensors = [*state["model"].values(), *load(tmp_path / "encoder.pth").values()]
    assert all(p.isfinite().all() for p in tensors)


def test_a_checkpoint_that_is_damaged_is_refused(finished, tmp_path):
    whole, path = (finished / "checkpoint.pth").read_bytes(), tmp_path / "checkpoint.pth"
    too_far = load(finished / "checkpoint.pth")
    too_far["run"]["step"] = 1000
    for content in [too_far, {"epoch": 3}, [1, 2], 0, len(whole) // 2, 2 * len(whole) // 3]:
        if isinstance(content, int):                     # flips a bit
            path.write_bytes(whole[:content] + bytes([whole[content] ^ 1]) + whole[content + 1:])
        else:
            torch.save(content, path)
        before = path.read_bytes()
        assert "checkpoint.pth is damaged or not a checkpoint" in error(tmp_path, "--resume")
        assert path.read_bytes() == before


def test_a_run_with_other_settings_or_images_is_refused(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for flag, value in [("batch_size", 32), ("seed", 1), ("weights", "uniform"), ("depth", 2),
                        ("img_size", 64), ("precision", "bf16"), ("num_images", 71)]:
        line = error(out, "--resume", f"--{flag.replace('_', '-')}", value)
        assert f"{flag} " in line and f"(now {value})" in line and "blr" not in line
    line = error(out, "--resume", *ALL_STAGES, "--finetune-blr", 1)
    assert "finetune-checkpoint.pth" in line and "finetune_blr" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    root = make_pictures(tmp_path / "images")
    disk = run(tmp_path / "disk", *on_disk(root), *ONE_EPOCH)
    image, other = (root / "train" / name / "0.JPEG" for name in ("n0", "n1"))
    image.rename(other)
    line = error(disk, *on_disk(root), *ONE_EPOCH, "--resume")
    assert re.search(r"other settings: [a-z ]*images \d+ \(now", line)
    other.rename(image)
    run(disk, *on_disk(root.rename(tmp_path / "moved")), *ONE_EPOCH, "--resume")


@pytest.mark.parametrize("flags", [["--probe-epochs", 1], [*NO_PROBE, "--finetune-epochs", 1]])
def test_another_encoder_under_the_same_path_is_refused(flags, finished, tmp_path):
    path = shutil.copy(finished / "encoder.pth", tmp_path)
    encoder = load(path)
    flags = [*flags, "--epochs", 0, "--finetune-blr", 1e-12, "--checkpoint"]
    out = run(tmp_path / "out", *flags, path)
    for tuned in out.glob("finetuned.pth"):              # fine-tuning starts from the encoder
        state = {k: p for k, p in load(tuned).items() if "head" not in k}
        assert_same(state, dict(encoder), rtol=0, atol=1e-8)
    torch.save(encoder | {"norm.bias": encoder["norm.bias"] + 1e-3}, path)
    assert re.search(r"other settings: encoder \d+ \(now", error(out, *flags, path, "--resume"))
    run(out, *flags, finished / "encoder.pth", "--resume")


def test_a_file_that_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.pth").write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="a.pth .*No space left"):
        patch.setattr(os, "fsync", full)
        train_cifar.write_file(tmp_path / "a.pth", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    train_cifar.write_file(tmp_path / "a.pth", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


# ==== README ======================================================================================

def python_blocks(name):
    """The blocks of Python code in a Markdown file."""
    text = (Path(__file__).parent / name).read_text()
    return re.findall("```python\n(.*?)```", text, re.DOTALL)


def test_the_step_of_the_readme_trains():
    torch.manual_seed(0)
    names = {}
    exec(python_blocks("README.md")[0], names)
    assert all(p.grad is not None for p in names["mae"].parameters() if p.requires_grad)
    assert [names[x].shape[1] for x in ("masked", "thrown", "visible")] == [29, 26, 9]


def test_the_mae_of_reuse_md_has_the_loss_and_the_encoder_of_ours(monkeypatch):
    names = {"amt": amt, "torch": torch}
    exec(python_blocks("docs/reuse.md")[-1], names)
    images = random_images(2)
    masked, _, visible = split(2)
    for norm_pix_loss in (False, True):
        mae = tiny_mae(norm_pix_loss=norm_pix_loss)
        theirs = argparse.Namespace(                     # with the names of He et al.'s class
            **dict(mae.encoder.named_children()), **dict(mae.named_children()),
            cls_token=mae.encoder.cls_token, pos_embed=mae.encoder.pos_embed,
            mask_token=mae.mask_token, decoder_pos_embed=mae.decoder_pos_embed,
            norm_pix_loss=norm_pix_loss, patchify=lambda x: amt.patchify(x, 4))
        conv = mae.encoder.patch_embed.proj
        theirs.patch_embed = lambda x: conv(x).flatten(2).transpose(1, 2)
        loss, pred = names["forward"](theirs, images, visible, masked)
        expected, expected_pred = mae(images, visible=visible, masked=masked)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(pred, expected_pred)
    theirs.state_dict = lambda: {**mae.state_dict(), **mae.encoder.state_dict()}
    monkeypatch.setattr(amt, "vit_base", lambda: amt.ViT(16, 4, 24, 3, 2))
    assert torch.equal(names["encoder_of"](theirs)(images), mae.encoder(images))


def test_the_timm_code_gives_timms_own_attention():
    timm = pytest.importorskip("timm")
    names = {}
    for block in [python_blocks("README.md")[1], *python_blocks("docs/reuse.md")[:-1]]:
        exec(block, names)
    images = random_images(2, size=224)
    with torch.no_grad():
        tokens = names["vit"].eval().forward_features(images)
        torch.testing.assert_close(names["encoder"](images), tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(names["vit"].cls_attention(images),
                                   names["encoder"].cls_attention(images), rtol=1e-4, atol=1e-5)
    maps = amt.dataset_maps(names["vit"], [(torch.arange(2), images)], 2)
    loader = torch.utils.data.DataLoader(names["Crops"](images), batch_size=2)
    for crops, theta, ids in loader:
        visible, masked = names["choose"](maps, theta, ids)
        assert crops.shape == images.shape
        assert (visible.shape[1], masked.shape[1]) == (30, 88)

    sizes = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    vit = unsettle(timm.models.vision_transformer.VisionTransformer(
        **sizes, reg_tokens=3, qk_norm=True)).eval()
    attention = []
    vit.blocks[-1].attn.fused_attn = False
    vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda *args: attention.append(args[2]))
    vit(random_images(2))
    torch.testing.assert_close(names["cls_attention"](vit, random_images(2)),
                               attention[0][:, :, 0, 4:])
    vit = timm.models.vision_transformer.VisionTransformer(
        **sizes, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="no .CLS. token"):
        names["cls_attention"](vit, random_images(2))
