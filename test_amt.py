"""Tests of amt.py and train_cifar.py, in an order to read them in. Run: python -m pytest -q

First the whole method, then what each part of amt.py promises, in the order in which a batch
passes through them, then comparisons with other people's code, and errors. The second half tests
train_cifar.py. What docs/reuse.md shows is tested in docs/test_reuse.py.
"""
import argparse
import ast
import csv
import errno
import itertools
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""                   # the tests compare results of the CPU

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torchvision.transforms import v2

import amt
import train_cifar

torch.set_num_threads(1)                                  # as in the processes that tests start

def rng(seed=0):
    return torch.Generator().manual_seed(seed)

def random_images(n, size=16, seed=0):
    return torch.randn(n, 2, size, size, generator=rng(seed))

def unsettle(module):
    """Moves each parameter away from values, as 0 and 1, at which leaving it out would not show."""
    generator = rng(1)
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return module

# Two channels, so that nothing takes three for granted.
SIZES = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, in_chans=2)

def tiny_vit(**sizes):
    torch.manual_seed(0)
    return unsettle(amt.ViT(**{**SIZES, **sizes}))

def tiny_mae(norm_pix_loss=False):
    return unsettle(amt.MAE(tiny_vit(), 16, 2, 2, norm_pix_loss))

def tiny_simmim(target="pixels"):
    return unsettle(amt.SimMIM(tiny_vit(), target))

def random_sets(n):
    """Indices (masked, thrown, visible) of 5, 6 and 5 of 16 patches, in random order, for n images."""
    ranking = torch.rand(n, 16, generator=rng(1)).argsort(dim=1)
    return ranking.split([5, 6, 5], dim=1)

# ==== The method ==================================================================================

def test_the_loop_in_the_docstring_runs_on_schedule_and_learns():
    docstring = ast.get_docstring(ast.parse(Path(amt.__file__).read_text()))
    code = re.search(r"\n(    vit = .*\n(?:    .*\n|\n)*)", docstring)[1]
    code = textwrap.dedent(code)
    for old, new in [("range(400)", "range(30)"), ("% 40", "% 3"), ("1.5e-4", "3e-3"),
                     ("loss.backward()", "before.append(vit.norm.bias.grad); loss.backward()"),
                     ("optimizer.step()", "optimizer.step(); losses.append(loss.item())")]:
        assert old in code
        code = code.replace(old, new)
    events, before, losses = [], [], []

    def small_mae(vit):
        return amt.MAE(vit, 16, 1, 2)

    def dataset_maps(*args):
        events.append("maps")
        return amt.dataset_maps(*args)

    def mask_and_throw(ranking, *ratios):
        events.append(ratios)
        return amt.mask_and_throw(ranking, *ratios)

    small = dict(vit_base=tiny_vit, MAE=small_mae)
    noting = dict(dataset_maps=dataset_maps, mask_and_throw=mask_and_throw)
    module = SimpleNamespace(**vars(amt) | small | noting)
    images = random_images(1).repeat(70, 1, 1, 1)         # two steps an epoch
    torch.manual_seed(0)
    exec(code, dict(amt=module, torch=torch, images=images, before=before, losses=losses))
    assert events == 6 * [(0.75, 0.0)] + 9 * ["maps", *6 * [(0.45, 0.40)]]
    assert before == 60 * [None]                          # each step starts without gradients
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

# ==== Patches =====================================================================================

def test_patchify_runs_row_by_row_over_patches_and_their_pixels_and_unpatchify_inverts_it():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = amt.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for i, row, column in [(0, 0, 1), (1, 0, 2), (1, 1, 0)]:
        pixels = images[i, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
        expected = pixels.permute(1, 2, 0).flatten()      # the channels of a pixel are neighbors
        assert torch.equal(patches[i, 3 * row + column], expected)

    square = random_images(3)
    assert torch.equal(amt.unpatchify(amt.patchify(square, 4), 4), square)

# ==== Attention maps ==============================================================================

def test_from_cls_is_the_row_of_cls_in_the_softmax_over_all_tokens():
    attn = unsettle(amt.Attention(24, 2))
    attn.qkv.register_forward_hook(lambda module, args, qkv: 2 * qkv)        # an adapter, say
    x = 2 * torch.randn(2, 7, 24, generator=rng())
    q, k, _ = attn.qkv(x).view(2, 7, 3, 2, 12).permute(2, 0, 3, 1, 4)
    every_row = (q @ k.mT / math.sqrt(12)).softmax(dim=3)
    assert_close(attn.from_cls(x), every_row[:, :, 0, 1:])

    a = attn.bfloat16().from_cls(x.bfloat16())
    assert a.dtype == torch.float32
    assert not torch.equal(a, a.bfloat16().float())       # the softmax was not rounded

def test_attention_maps_average_the_heads_then_stretch_each_image_to_0_and_1():
    a = torch.rand(3, 2, 16, generator=rng())
    mean = (a[:, 0] + a[:, 1]) / 2
    expected = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in mean]).view(3, 4, 4)
    assert_close(amt.attention_maps(lambda images: a, random_images(3)), expected)

    vit, images = tiny_vit(), random_images(3)            # an encoder, or a function
    maps = amt.attention_maps(vit, images)
    assert not maps.requires_grad
    assert torch.equal(maps, amt.attention_maps(vit.cls_attention, images))
    even = torch.full((2, 3, 16), 1 / 17, dtype=torch.bfloat16)
    assert not amt.attention_maps(lambda images: even, images[:2]).any()

def test_dataset_maps_puts_each_map_at_the_index_of_its_image_and_shares_sum_to_the_whole():
    vit, images = tiny_vit(), random_images(5)
    batches = [(torch.tensor(ids), images[ids]) for ids in ([3, 0], [4], [1, 2])]
    maps = amt.dataset_maps(vit, iter(batches), 6)        # a loader may be read only once
    assert maps.shape == (6, 4, 4) and maps.dtype == torch.float16
    assert_close(maps[:5], amt.attention_maps(vit, images).half())
    assert not maps[5].any()                              # no batch has image 5
    shares = amt.dataset_maps(vit, batches[1:], 6) + amt.dataset_maps(vit, batches[:1], 6)
    assert torch.equal(shares, maps)

# ==== Crops of images and maps ====================================================================

@pytest.mark.parametrize("image_ratio", [1.0, 3.0])
def test_random_crops_are_uniform_in_area_aspect_place_and_flip(image_ratio):
    n = 40000
    theta = amt.random_crops(n, (0.05, 0.15), (0.5, 2.0), rng(), image_ratio)
    ratios = torch.full((n,), image_ratio)                # of each image, the same as one of all
    assert torch.equal(theta, amt.random_crops(n, (0.05, 0.15), (0.5, 2.0), rng(), ratios))
    assert theta.shape == (n, 2, 3) and not theta[:, [0, 1], [1, 0]].any()

    width, height = theta[:, 0, 0].abs(), theta[:, 1, 1]
    x, y = theta[:, :, 2].T
    flipped = (theta[:, 0, 0] < 0).float()
    assert (height > 0).all()
    assert flipped.mean().item() == pytest.approx(0.5, abs=0.01)
    uniform = torch.stack([                               # each of these is uniform in 0 to 1
        (width * height - 0.05) / 0.1,
        (width / height * image_ratio).log() / math.log(4) + 0.5,
        (x / (1 - width) + 1) / 2,
        (y / (1 - height) + 1) / 2,
    ])
    distance = (uniform.sort(dim=1).values - torch.arange(n) / n).abs().amax(dim=1)
    assert (distance < 1.95 / math.sqrt(n)).all()         # Kolmogorov and Smirnov's test at 0.1 %
    correlation = torch.corrcoef(torch.cat([uniform, flipped[None]]))
    assert (correlation - torch.eye(5)).abs().max() < 0.03

def test_random_crops_stay_in_the_image_and_have_the_usual_sizes():
    theta = amt.random_crops(5000, generator=rng(3))
    sides, centers = theta[:, [0, 1], [0, 1]].abs(), theta[:, :, 2].abs()
    assert (sides + centers <= 1 + 1e-6).all()
    area, aspect = sides.prod(dim=1), sides[:, 0] / sides[:, 1]
    assert 0.199 < area.min() < 0.21 and area.max() > 0.95
    assert 0.749 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.334

@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_of_whole_pixels_is_slicing_and_the_image_continues_at_its_edges(mode, flip):
    images = random_images(1)
    x_scale = -0.5 if flip else 0.5
    theta = torch.tensor([[[x_scale, 0, -0.25], [0, 0.5, 0.125]]], dtype=torch.float64)
    expected = images[:, :, 5:13, 2:10]
    expected = expected.flip(3) if flip else expected
    assert_close(amt.crop(images, theta, 8, mode), expected, rtol=1e-4, atol=1e-4)

    whole = torch.eye(2, 3)[None]
    larger = F.interpolate(images, size=32, mode=mode)
    assert_close(amt.crop(images, whole, 32, mode), larger, rtol=1e-4, atol=1e-4)
    assert amt.crop(images.half(), whole, 32, mode).dtype == torch.float16

def places(H, W):
    """An image (2, H, W) in which each pixel holds its place (x, y), between 0 and 1."""
    x = (torch.arange(W) + 0.5) / W
    y = (torch.arange(H) + 0.5) / H
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))

@pytest.mark.parametrize("size, p", [((32, 32), 4), ((32, 32), 8), ((32, 48), 8)])
def test_each_weight_lies_on_the_patch_that_shows_what_the_weight_was_measured_on(size, p):
    # The map of image i is a_i * x + b_i * y, so the weight of a patch must be the sum of this
    # over the places (x, y) that the patch shows.
    n, h, w = 64, size[0] // 4, size[1] // 4
    theta = amt.random_crops(n, generator=rng())
    ab = 2 * torch.rand(n, 2, 1, 1, generator=rng(1)) - 1
    maps = (ab * places(h, w)).sum(dim=1).half()
    weights = amt.crop_weights(maps, theta, size, p)
    assert weights.dtype == torch.float32

    x, y = amt.crop(places(*size).expand(n, -1, -1, -1), theta, size, "bilinear").unbind(dim=1)
    x = x.clamp(0.5 / w, 1 - 0.5 / w)                     # the map is continued at its edges
    y = y.clamp(0.5 / h, 1 - 0.5 / h)
    shown = ab[:, 0] * x + ab[:, 1] * y
    assert_close(weights, amt.patchify(shown[:, None], p).sum(dim=2), rtol=0, atol=0.005 * p * p)

    with torch.autocast("cpu", torch.bfloat16):           # must not shift the crop
        assert torch.equal(amt.crop_weights(maps, theta, size, p), weights)

# ==== Ranking =====================================================================================

def assert_distribution(rankings, probability):
    """Pearson's chi-square test of rankings (n, N) and the probability of each permutation."""
    n, N = rankings.shape
    counts = Counter(map(tuple, rankings.tolist()))
    statistic, freedom = 0.0, -1
    for permutation in itertools.permutations(range(N)):
        expected = n * probability(permutation)
        if expected < 1e-9:
            assert counts[permutation] == 0
        else:
            statistic += (counts[permutation] - expected) ** 2 / expected
            freedom += 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)

@pytest.mark.parametrize("weights", [
    [0.4, 0.3, 0.2, 0.1],
    [1e-30, 3e-30, 2e-30, 1e-30],
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 2.0 ** -149, 0.0, 1.0, 0.0, 3e38],              # 2 ** -149 is the least positive float32
    [math.nan, 2.0, -1.0, 1.0, 0.0],                      # nan and negative weights count as zero
])
def test_sample_patches_draws_in_proportion_to_the_weights_and_zeros_last(weights):
    positive = [max(0.0, w) if w == w else 0.0 for w in weights]

    def probability(permutation):
        p = 1.0
        for k, i in enumerate(permutation):               # the weight of i among what is left
            left = [positive[j] for j in permutation[k:]]
            p *= positive[i] / sum(left) if sum(left) else 1 / len(left)
        return p

    weights = torch.tensor(weights).expand(60000, -1)
    rankings = amt.sample_patches(weights, rng())
    assert torch.equal(rankings, amt.sample_patches(weights, rng()))
    assert_distribution(rankings, probability)

# ==== Masking and throwing ========================================================================

@pytest.mark.parametrize("N, mask_ratio, throw_ratio, counts", [
    (196, 0.45, 0.40, [88, 78, 30]),
    (196, 0.75, 0.00, [147, 0, 49]),
    (49, 0.44, 0.26, [22, 13, 14]),                       # rounded, not cut off
])
def test_the_top_of_a_ranking_is_masked_its_middle_thrown_the_rest_visible(
        N, mask_ratio, throw_ratio, counts):
    ranking = torch.rand(2, N, generator=rng()).argsort(dim=1)
    parts = amt.mask_and_throw(ranking, mask_ratio, throw_ratio)
    assert [ids.shape[1] for ids in parts] == counts
    assert torch.equal(torch.cat(parts, dim=1), ranking)

@pytest.mark.parametrize("h, unit", [(8, 2), (6, 3)])
def test_a_unit_stands_for_its_square_of_patches_and_units_count_row_by_row(h, unit):
    side = h // unit
    ranking = torch.rand(3, side * side, generator=rng()).argsort(dim=1)
    parts = amt.mask_and_throw(ranking, 0.5, 0.25, unit)
    patches = torch.cat(parts, dim=1).view(-1, unit * unit)
    for i, patches_of_unit in zip(ranking.flatten().tolist(), patches, strict=True):
        top, left = i // side * unit, i % side * unit
        square = torch.arange(h * h).view(h, h)[top:top + unit, left:left + unit]
        assert sorted(patches_of_unit.tolist()) == square.flatten().tolist()

# ==== Vision transformer ==========================================================================

def test_half_of_a_position_embedding_tells_the_column_and_half_the_row():
    table = amt.sincos_pos_embed(16, 3)
    assert table.shape == (1, 10, 16) and not table[0, 0].any()
    omega = torch.tensor([1.0, 0.1, 0.01, 0.001])
    for row, column in itertools.product(range(3), range(3)):
        waves = [f(place * omega) for place in (column, row) for f in (torch.sin, torch.cos)]
        assert_close(table[0, 1 + 3 * row + column], torch.cat(waves))

def test_a_vit_embeds_only_visible_patches_each_with_its_own_position():
    vit, images, embedded = tiny_vit(), random_images(3), []
    vit.patch_embed.register_forward_hook(lambda module, args, x: embedded.append(x.shape[1]))
    whole = vit.embed(images)
    visible = torch.tensor([[3, 0, 15], [1, 2, 3], [9, 8, 7]])
    expected = torch.stack([x[[0, *(1 + ids).tolist()]] for x, ids in zip(whole, visible)])
    assert_close(vit.embed(images, visible), expected)
    assert_close(vit(images, visible), vit.run_blocks(expected))
    assert embedded == [16, 3, 3]

def test_parameters_have_the_names_of_timm_and_mae_and_only_positions_are_frozen():
    parts = r"(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)"
    vit = rf"cls_token|pos_embed|(patch_embed\.proj|norm|blocks\.\d\.{parts})\.(weight|bias)"
    decoder = rf"decoder_(embed|norm|pred|blocks\.\d\.{parts})\.(weight|bias)"
    mae = rf"encoder\.({vit})|{decoder}|mask_token|decoder_pos_embed"
    simmim = rf"encoder\.({vit})|head\.(weight|bias)|mask_token"
    for model, names in [(tiny_vit(), vit), (tiny_mae(), mae), (tiny_simmim(), simmim)]:
        for name, p in model.named_parameters():
            assert re.fullmatch(names, name)
            assert p.requires_grad != name.endswith("pos_embed")
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}

@pytest.mark.parametrize("build, patch_size, width, depth, heads", [
    (amt.vit_tiny, 16, 192, 12, 3),
    (amt.vit_small, 16, 384, 12, 6),
    (amt.vit_base, 16, 768, 12, 12),
    (amt.vit_large, 16, 1024, 24, 16),
    (amt.vit_huge, 14, 1280, 32, 16),
])
def test_the_standard_sizes_and_the_decoder_of_mae(build, patch_size, width, depth, heads):
    with torch.device("meta"):
        mae = amt.MAE(build())
    vit = mae.encoder
    assert (vit.img_size, vit.patch_size, vit.embed_dim) == (224, patch_size, width)
    assert [block.attn.num_heads for block in vit.blocks] == depth * [heads]
    assert [block.attn.num_heads for block in mae.decoder_blocks] == 8 * [16]
    assert mae.decoder_embed.out_features == 512 and not mae.norm_pix_loss

@pytest.mark.parametrize("prefix, key", [
    ("", None), ("encoder.", "model"), ("backbone.vit.", "teacher"),
    ("module.base_encoder.", "state_dict"),
])
def test_load_weights_finds_the_encoder_under_any_prefix(prefix, key):
    vit, saved = tiny_vit(), {}
    for name, p in vit.state_dict().items():
        saved[prefix + name] = p
        if "base" in prefix:                              # MoCo keeps a second copy
            saved[f"module.momentum_encoder.{name}"] = torch.zeros_like(p)
    for name in ("decoder_pos_embed", "mask_token", "head.weight"):
        saved[prefix + name] = torch.zeros(1, 1, 16)

    new = amt.ViT(**SIZES)
    amt.load_weights(new, {key: saved} if key else saved)
    assert_close(new.state_dict(), vit.state_dict(), rtol=0, atol=0)

def test_load_weights_resizes_positions_to_the_grid_and_keeps_those_of_cls():
    large = tiny_vit(img_size=32)
    large.pos_embed.data[0, 0] = torch.randn(24, generator=rng())
    large.pos_embed.data[0, 1:, :2] = places(8, 8).flatten(1).T
    vit = amt.ViT(**SIZES)
    amt.load_weights(vit, large.state_dict())
    assert torch.equal(vit.pos_embed[0, 0], large.pos_embed[0, 0])
    assert_close(vit.pos_embed[0, 1:, :2], places(4, 4).flatten(1).T, rtol=0, atol=0.05)
    assert torch.equal(vit.blocks[0].attn.qkv.weight, large.blocks[0].attn.qkv.weight)

# ==== Models ======================================================================================

def literal_mae(mae, image, visible, masked):
    """MAE's predictions for one image: all tokens in their order, of which thrown ones leave."""
    tokens = mae.decoder_embed(mae.encoder(image[None], visible[None]))[0]
    x = torch.cat([tokens[:1], mae.mask_token[0].expand(16, -1)])
    x[1 + visible] = tokens[1:]
    x = x + mae.decoder_pos_embed[0]
    kept = torch.cat([visible, masked]).sort().values
    x = torch.cat([x[:1], x[1 + kept]])[None]
    for block in mae.decoder_blocks:
        x = block(x)
    pred = mae.decoder_pred(mae.decoder_norm(x))[0, 1:]
    return pred[torch.searchsorted(kept, masked)]

def literal_simmim(simmim, image, visible, masked):
    """SimMIM's predictions for one image: a mask token instead of each masked patch's content."""
    vit = simmim.encoder
    x = vit.embed(image[None])[0].clone()
    x[1 + masked] = simmim.mask_token[0] + vit.pos_embed[0, 1 + masked]
    kept = torch.cat([visible, masked]).sort().values
    x = vit.run_blocks(torch.cat([x[:1], x[1 + kept]])[None])
    return simmim.head(x)[0, 1:][torch.searchsorted(kept, masked)]

def standardized_patches(images, patch_size):
    patches = amt.patchify(images, patch_size)
    var, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()

@pytest.mark.parametrize("build, literal, targets_of, loss_of", [
    (tiny_mae, literal_mae, amt.patchify, F.mse_loss),
    (partial(tiny_mae, norm_pix_loss=True), literal_mae, standardized_patches, F.mse_loss),
    (tiny_simmim, literal_simmim, amt.patchify, F.l1_loss),
    (partial(tiny_simmim, "hog"), literal_simmim, amt.hog, F.mse_loss),
])
@pytest.mark.parametrize("n", [1, 3])
def test_models_equal_the_published_ones_and_do_not_see_thrown_patches(
        build, literal, targets_of, loss_of, n):
    model, images = build(), random_images(n)
    images[0, :, :8] *= 1e-3                              # so faint that the epsilon of MAE shows
    masked, thrown, visible = random_sets(n)
    expected = torch.stack([literal(model, *x) for x in zip(images, visible, masked)])
    targets = amt.select(targets_of(images, 4), masked)

    if targets_of is not amt.hog:                         # which looks one pixel into neighbors
        patches = amt.patchify(images, 4)
        patches = patches.scatter(1, thrown[:, :, None].expand(-1, -1, 32), math.nan)
        images = amt.unpatchify(patches, 4)
    loss, pred = model(images, visible=visible, masked=masked)
    assert_close(pred, expected, rtol=1e-4, atol=1e-5)
    assert_close(loss, loss_of(expected, targets))

    loss.backward()
    for p in model.parameters():
        assert not p.requires_grad or p.grad.any() and p.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):           # the loss is not rounded
        loss, pred = model(images, visible=visible, masked=masked)
    assert loss.dtype == pred.dtype == torch.float32

def test_weights_start_as_in_mae_and_a_model_leaves_its_encoder_as_it_is():
    torch.manual_seed(0)
    vit = amt.ViT(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2)
    before = {name: p.clone() for name, p in vit.state_dict().items()}
    mae, simmim = amt.MAE(vit, 64, 1, 2), amt.SimMIM(vit)
    assert_close(dict(vit.state_dict()), before, rtol=0, atol=0)

    layers = [vit.blocks[0].attn.qkv, vit.patch_embed.proj, mae.decoder_pred, simmim.head]
    for layer in layers:                                  # a patch has 192 values, a token 64
        bound = math.sqrt(6 / (64 + 192))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    for pos_embed in (vit.pos_embed, mae.decoder_pos_embed):
        assert torch.equal(pos_embed, amt.sincos_pos_embed(64, 4))
    for token in (vit.cls_token, mae.mask_token, simmim.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.3)

# ==== Strategies ==================================================================================

STRATEGIES = [amt.sample_patches, amt.random_ranking, amt.highest_first, amt.lowest_first,
              amt.block_wise, amt.grid_wise]

@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_stays_on_the_device_and_never_waits_for_it(strategy):
    models = [tiny_mae(), tiny_simmim("hog")]
    with FakeTensorMode(allow_non_fake_inputs=True):      # refuses two devices and reading values
        images = torch.randn(3, 2, 16, 16, device="cuda")
        maps = torch.rand(3, 4, 4, device="cuda")
        theta = amt.random_crops(3)
        crops = amt.crop(images, theta, 16, "bicubic")
        ranking = strategy(amt.crop_weights(maps, theta, 16, 8))
        masked, _, visible = amt.mask_and_throw(ranking, 0.5, 0.25, unit=2)
        for model in models:
            loss, _ = model.to("cuda")(crops, visible=visible, masked=masked)
            assert loss.device.type == "cuda"

@pytest.mark.parametrize("N", [16, 49])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_each_image_its_own_permutation(strategy, N):
    weights = torch.rand(6, N, generator=rng())
    torch.manual_seed(0)
    ranking, of_half = strategy(weights), strategy(weights.half())
    assert ranking.dtype == of_half.dtype == torch.int64
    assert torch.equal(ranking.sort(dim=1).values, torch.arange(N).expand(6, N))
    assert len(ranking.unique(dim=0)) == 6

    alike = weights[:1].expand(6, N)                      # images with the same weights
    expected = 1 if strategy in (amt.highest_first, amt.lowest_first) else 6
    assert len(strategy(alike).unique(dim=0)) == expected

def test_rankings_by_weight_break_ties_at_random_and_random_ones_ignore_weights():
    torch.manual_seed(0)
    rankings = amt.random_ranking(torch.tensor([3.0, 0.0, 2.0, 0.1]).expand(60000, 4))
    assert_distribution(rankings, lambda permutation: 1 / 24)

    weights = torch.tensor([[0.2, 0.9, 0.0, 0.5], [3.0, 1.0, 2.0, 0.1]])
    assert amt.highest_first(weights).tolist() == [[1, 3, 0, 2], [0, 2, 1, 3]]
    assert amt.lowest_first(weights).tolist() == [[2, 0, 3, 1], [3, 1, 2, 0]]

    tied = torch.tensor([1.0, 2.0, 1.0, 2.0]).expand(60000, -1)
    for strategy, first in [(amt.highest_first, {1, 3}), (amt.lowest_first, {0, 2})]:
        torch.manual_seed(0)
        assert_distribution(strategy(tied), lambda order: (set(order[:2]) == first) / 4)

@pytest.mark.parametrize("h", [4, 14])
def test_grid_wise_ranks_a_checkerboard_first_and_the_bottom_left_of_each_2_x_2_last(h):
    ranking = amt.grid_wise(torch.ones(50, h * h))
    row, column = ranking // h % 2, ranking % h % 2
    assert (row == column)[:, :h * h // 2].all()
    assert (row > column)[:, 3 * h * h // 4:].all()
    assert len(ranking[:, 0].unique()) > 3                # any of the same kind can come first

def test_block_wise_ranks_rectangles_of_the_right_shapes_each_row_by_row():
    torch.manual_seed(0)
    ranking = amt.block_wise(torch.ones(500, 196))
    assert (ranking[:, :12].diff(dim=1) > 0).all()        # no rectangle has fewer than 12 patches

    # The first rectangle is the longest beginning of a ranking that fills its bounding box.
    place = torch.stack([ranking // 14, ranking % 14])    # row and column
    height, width = place.cummax(dim=2).values - place.cummin(dim=2).values + 1
    full = (height * width == torch.arange(1, 197)) & (height * width <= 90)
    end = torch.where(full, torch.arange(196), 0).amax(dim=1)
    aspect = (height / width).gather(1, end[:, None])[:, 0].sort().values
    size = (end + 1).sort().values
    assert size[50:500:100].tolist() == pytest.approx([22, 34, 47, 60, 72], abs=5)
    assert aspect[[0, 250]].tolist() == pytest.approx([0.3, 1], abs=0.15)
    assert aspect[-1].item() == pytest.approx(1 / 0.3, abs=1)

    # The rectangles lie everywhere, and are enough to rank nearly everything.
    masked = torch.zeros(500, 196).scatter(1, ranking[:, :78], 1).view(500, 14, 14)
    assert (masked.sum(dim=0) > 5).all()
    edges = masked.diff(dim=1).abs().sum() + masked.diff(dim=2).abs().sum()
    assert edges / 500 < 60                               # 175 if patches are masked independently
    in_order = (ranking[:, -20:].diff(dim=1) > 0).all(dim=1)                 # in no rectangle
    assert in_order.float().mean() < 0.1

# ==== Other people's code =========================================================================

def torch_layer(block):
    """PyTorch's own transformer layer, with the parameters of a Block."""
    layer = nn.TransformerEncoderLayer(block.attn.proj.in_features, block.attn.num_heads, 1, 0.0,
                                       "gelu", 1e-6, batch_first=True, norm_first=True)
    layer.self_attn.in_proj_weight = block.attn.qkv.weight
    layer.self_attn.in_proj_bias = block.attn.qkv.bias
    layer.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
    for name in ("norm1", "norm2"):
        getattr(layer, name).load_state_dict(getattr(block, name).state_dict())
    layer.linear1, layer.linear2 = block.mlp.fc1, block.mlp.fc2
    return layer

def test_a_vit_equals_pytorchs_layers_in_tokens_and_attention():
    vit, images = tiny_vit(), random_images(3)
    images[0] *= 1e-3                                     # so faint that LayerNorm's epsilon shows
    vit.cls_token.data *= 1e-3
    vit.pos_embed.data[:, 0] = 0.1 * torch.randn(24, generator=rng())        # not 0, as in timm
    x = vit.patch_embed.proj(images).flatten(2).mT
    x = torch.cat([vit.cls_token.expand(3, -1, -1), x], dim=1) + vit.pos_embed
    layers = [torch_layer(block) for block in vit.blocks]
    for layer in layers[:-1]:
        x = layer(x)
    normed = layers[-1].norm1(x)
    a = layers[-1].self_attn(normed, normed, normed, average_attn_weights=False)[1]
    assert_close(vit.cls_attention(images), a[:, :, 0, 1:])
    assert_close(vit(images), vit.norm(layers[-1](x)), rtol=1e-4, atol=1e-5)

def test_weights_load_from_and_into_timms_vit_which_gives_the_same_tokens():
    timm = pytest.importorskip("timm")
    vit, images = tiny_vit(), random_images(2)
    theirs = timm.models.VisionTransformer(**SIZES, num_classes=0).eval()
    amt.load_weights(vit, theirs.state_dict())
    assert_close(vit(images), theirs.forward_features(images), rtol=1e-4, atol=1e-4)
    theirs.load_state_dict(tiny_vit().state_dict())
    assert_close(tiny_vit()(images), theirs.forward_features(images), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("flip", [False, True])
def test_theta_of_gives_the_crop_that_torchvision_makes(flip):
    images, box = random_images(2, 40)[:, :, :30], (4, 7, 20, 27)    # top, left, height, width
    expected = v2.functional.resized_crop(images, *box, [16, 24], antialias=False)
    expected = expected.flip(3) if flip else expected
    theta = amt.theta_of(*box, flip, 30, 40)
    ours = amt.crop(images, theta.expand(2, -1, -1), (16, 24), "bilinear")
    inside = (..., slice(1, -1), slice(1, -1))            # at the edge only the box ends
    assert_close(ours[inside], expected[inside], rtol=0, atol=1e-4)

def literal_hog(image, cell):
    """Dalal and Triggs' histograms (N, 36*C) of an image (C, H, H), one pixel at a time."""
    C, H, _ = image.shape
    votes = np.zeros((H // cell, H // cell, C, 9))
    for c, y, x in itertools.product(range(C), range(H), range(H)):
        dy = image[c, y + 1, x] - image[c, y - 1, x] if 0 < y < H - 1 else 0.0
        dx = image[c, y, x + 1] - image[c, y, x - 1] if 0 < x < H - 1 else 0.0
        degrees = math.degrees(math.atan2(dy, dx)) % 180
        votes[y // cell, x // cell, c, int(degrees // 20)] += math.hypot(dy, dx)
    votes /= np.sqrt((votes ** 2).sum(axis=3, keepdims=True) + 1e-5 ** 2)

    # The four cells of a patch are put together.
    h = H // cell // 2
    return votes.reshape(h, 2, h, 2, -1).transpose(0, 2, 1, 3, 4).reshape(h * h, -1)

@pytest.mark.parametrize("patch_size", [4, 8])
def test_hog_equals_the_literal_one(patch_size):
    images = random_images(2).double()
    images[0, :, :8] = 0.5                                # no gradient, so no votes
    images[1, :, :8] *= 1e-6                              # so faint that the epsilon shows
    for image, ours in zip(images, amt.hog(images, patch_size)):
        np.testing.assert_allclose(ours, literal_hog(image.numpy(), patch_size // 2), atol=1e-9)

    image = torch.arange(-8.0, 8).repeat(16, 1)
    image[:, 8] = -1e-9 * torch.arange(16)                # rounds to 180 degrees: the last bin
    assert amt.hog(image[None, None], 8)[0, 1, 26] > 0    # bottom left cell

# ==== Errors ======================================================================================

def test_mistakes_that_would_go_unnoticed_are_errors():
    vit, images, ranking = tiny_vit(), random_images(2), torch.arange(64)[None]
    masked, _, visible = random_sets(2)

    with pytest.raises(ValueError, match="17"):           # [CLS] is among the patches
        amt.attention_maps(lambda images: torch.ones(2, 2, 17), images)
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="finite"):
            amt.attention_maps(lambda images: torch.full((2, 2, 16), value), images)
    with pytest.raises(ValueError, match="uint8"):        # bicubic values would wrap around
        amt.crop(images.byte(), amt.random_crops(2), 8, "bicubic")
    for ratios in [(1.0, 0.0), (0.6, 0.4), (0.001, 0.0), (math.nan, 0.0)]:
        with pytest.raises(ValueError):                   # one masked and one visible are needed
            amt.mask_and_throw(ranking, *ratios)
    with pytest.raises(TypeError, match="positional"):    # nobody swaps visible and masked
        tiny_mae()(images, visible, masked)
    with pytest.raises(ValueError, match="timm"):
        amt.load_weights(vit, {"layers.0.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="ls1.gamma"):  # LayerScale, which our ViT has not
        amt.load_weights(vit, vit.state_dict() | {"blocks.0.ls1.gamma": torch.zeros(24)})

# ==== train_cifar.py: helpers =====================================================================

# Six epochs of two steps. A step has two mini-batches. New maps come after epochs 2 and 4.
SMALL = ("--dataset shapes --num-images 70 --img-size 32 --patch-size 8 --depth 1 --blr 4e-3 "
         "--decoder-depth 1 --decoder-embed-dim 32 --epochs 6 --update-interval 2 "
         "--warmup-epochs 1 --batch-size 16 --accum-steps 2 --save-every 4").split()
ALL_STAGES = ["--probe-every", 3, "--finetune-epochs", 2]
TIMES = {"seconds", "map_seconds", "images_per_second"}
SHAPES = train_cifar.shapes
train_cifar.shapes = lambda args, n, seed: SHAPES(args, min(n, 70), seed)

def parse(*flags):
    return train_cifar.parse_args([*SMALL, *map(str, flags)])

def load(path):
    return torch.load(path, weights_only=True)

def run(out_dir, *flags):
    train_cifar.main([*SMALL, "--out-dir", str(out_dir), *map(str, flags)])
    return out_dir

def error(capsys, out_dir, *flags):
    """The one line that the script ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(out_dir, *flags)
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and "error: " in said[-1]
    assert len(said) == 1 or len(said) == 2 and said[0].startswith("usage")
    return said[-1]

def column(out_dir, name, prefix=""):
    """A column of a log: numbers, and None where it is empty."""
    with open(out_dir / f"{prefix}log.csv", newline="") as file:
        return [float(row[name]) if row[name] else None for row in csv.DictReader(file)]

def saved(out_dir, prefix=""):
    """All that a stage leaves but the times."""
    content = load(out_dir / f"{prefix}checkpoint.pth")
    with open(out_dir / f"{prefix}log.csv", newline="") as file:
        content["csv"] = list(csv.DictReader(file))
    for row in (content, *content["log"], *content["csv"]):
        for name in TIMES & row.keys():
            del row[name]
    return content

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

def record(monkeypatch):
    """A list to which each mini-batch of a run adds what it drew and what its model was given."""
    steps = []

    def patch(module, name, note):
        original = getattr(module, name)

        def noting(*args, **kwargs):
            result = original(*args, **kwargs)
            note(result, args, kwargs)
            return result
        monkeypatch.setattr(module, name, noting)

    patch(amt, "random_crops", lambda theta, args, kwargs: steps.append(
        {"theta": theta, "scale": args[1] if len(args) > 1 else None, "maps": None}))
    patch(amt, "crop", lambda x, args, kwargs: steps[-1].setdefault("crops", (args[0], x)))
    patch(amt, "crop_weights", lambda x, args, kwargs: steps[-1].update(maps=args[0], weights=x))

    def note_split(sets, args, kwargs):
        if steps and "ratios" not in steps[-1]:
            steps[-1].update(ranking=args[0], ratios=args[1:3], sets=sets)

    def note_forward(result, args, kwargs):
        if steps and "given" not in steps[-1]:
            steps[-1].update(given=kwargs, images=args[1], loss=result[0].item())

    patch(amt, "mask_and_throw", note_split)
    patch(amt.MAE, "forward", note_forward)
    patch(amt.SimMIM, "forward", note_forward)
    return steps

def at_call(monkeypatch, call, action, owner=amt, name="random_crops"):
    """Has action() run before that call (the first is 1) of a function, by default the one that a
    mini-batch calls once. Returns a counter, whose next number is 1 + the calls so far."""
    function, calls = getattr(owner, name), itertools.count(1)

    def acting(*args, **kwargs):
        if next(calls) == call:
            action()
        return function(*args, **kwargs)
    monkeypatch.setattr(owner, name, acting)
    return calls

FORKS = multiprocessing.get_context("forkserver")        # forks a process that has imported torch
FORKS.set_forkserver_preload(["torchvision.datasets", "torchvision.transforms.v2"])
PROCESS = """
import itertools, os, signal, sys
os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
os.dup2(1, 2)
os.environ.update(env)
sys.path.insert(0, path)
import torch, amt, train_cifar
torch.set_num_threads(1)
shapes, crops, calls = train_cifar.shapes, amt.random_crops, itertools.count(1)
train_cifar.shapes = lambda args, n, seed: shapes(args, min(n, 70), seed)
def acting(*args, **kwargs):
    if int(env["RANK"]) == at[0] and next(calls) == at[1]:
        exec(at[2], globals())
    return crops(*args, **kwargs)
amt.random_crops = acting
train_cifar.main(argv)
"""

def processes(tmp_path, *flags_of_each, at=(0, 0, "")):
    """Runs the script in a process for each list of flags, as torchrun does. Returns the exit codes
    and what is printed. at = (rank, call, code) runs code in that draw of random crops."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started, n, path = [], len(flags_of_each), str(Path(train_cifar.__file__).parent)
    for rank, flags in enumerate(flags_of_each):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port)
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

# ==== Flags and errors ============================================================================

@pytest.mark.parametrize("flags, words", [
    (["--patch-size", 5], r"patch_size \(5\) must divide img_size \(32\)"),
    (["--batch-size", 64], "a step takes 128 images, but there are only 70"),
    (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
    (["--blr", "nan"], "--blr must be at least 0, got nan"),
    (["--epoch", 1], "unrecognized arguments: --epoch 1"),           # no abbreviations
    (["--mask-ratio", 0.75], "mask_ratio 0.75 and throw_ratio 0.4 leave .* -2 visible"),
    (["--mask-ratio", 0.01], "0 of 16 masked"),
    (["--masking", "random", "--weights", "uniform"], "need --masking attention, got random"),
    (["--masking", "attmask", "--map-floor", 0.5], "need --masking attention, got attmask"),
    (["--map-floor", 25], "--map-floor must be at most 1, got 25"),
    (["--workers", 0], "--workers must be at least 1, got 0"),
    (["--dataset", "cifar10", "--weights", "object"], "invalid choice: 'object'"),
    (["--update-interval", 6], "--update-interval must be less than --epochs, got 6"),
    (["--epochs", 0], "--epochs 0 needs a --checkpoint"),
    (["--checkpoint", "no.pth"], "No such file.*no.pth"),
    (["--dataset", "folder", "--data-path", "no"], "no/train"),
    (["--dataset", "cifar10", "--data-path", "/dev/null"], "cannot find cifar-10-batches-py in"),
])
def test_a_mistake_is_one_line_that_says_what_must_hold(flags, words, tmp_path, capsys):
    assert re.search(words, error(capsys, tmp_path, *flags))

@pytest.mark.parametrize("method, unit, low, random, amt_ratios", [
    ("mae", 1, 0.2, (0.75, 0), (0.45, 0.40)), ("simmim", 2, 0.67, (0.60, 0), (0.44, 0.26)),
    ("maskfeat", 2, 0.5, (0.40, 0), (0.44, 0.26))])
def test_a_method_has_the_ratios_and_units_of_the_paper(method, unit, low, random, amt_ratios):
    found = train_cifar.METHODS[method]
    assert (found["unit"], found["scale"]) == (unit, (low, 1))
    for masking, ratios in [("random", random), ("attention", amt_ratios), ("attmask", random)]:
        args = parse("--method", method, "--masking", masking)
        assert (args.mask_ratio, args.throw_ratio) == ratios
    model = train_cifar.build_model(args, train_cifar.load_encoder(args))
    assert isinstance(model, amt.MAE if method == "mae" else amt.SimMIM)
    assert method != "mae" or model.norm_pix_loss
    assert method != "maskfeat" or model.target_fn is amt.hog

def test_defaults_follow_the_dataset_and_the_epochs(capsys):
    for epochs, interval, warmup in [(400, 40, 40), (60, 6, 6), (24, 4, 2), (2, 1, 0), (1, 1, 0)]:
        args = train_cifar.parse_args(["--epochs", str(epochs)])
        assert (args.update_interval, args.warmup_epochs) == (interval, warmup)
    args = train_cifar.parse_args(["--dataset", "imagenet"])
    assert (args.model, args.img_size, args.decoder_depth) == ("vit_base", 224, 8)
    with pytest.raises(SystemExit):
        train_cifar.parse_args(["--dataset", "shapes", "--help"])
    said = capsys.readouterr().out
    assert "epochs of pretraining; 0, with --checkpoint, skips it\n                        " \
           "(default: 24)" in said and "masking:" in said and "probe_mean" in said

# ==== Pretraining =================================================================================

def test_a_run_writes_its_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        "attention.png", "masking.png", "encoder.pth", "finetuned.pth", "checkpoint.pth", "log.csv",
        "finetune-checkpoint.pth", "finetune-log.csv"}
    encoder, tuned = load(finished / "encoder.pth"), load(finished / "finetuned.pth")
    assert set(tuned) == {*encoder, "head.weight", "head.bias"}
    assert any(not torch.equal(tuned[name], encoder[name]) for name in encoder)
    assert column(finished, "epoch") == [1, 2, 3, 4, 5, 6]
    for name, given in [("probe_cls", [3, 6]), ("probe_mean", [3, 6]), ("map_seconds", [2, 4]),
                        ("position_share", [2, 4])]:
        assert [i + 1 for i, x in enumerate(column(finished, name)) if x is not None] == given
    assert column(finished, "loss")[-1] < column(finished, "loss")[0] - 0.08
    assert all(5 < x < 60 for x in column(finished, "test_accuracy", "finetune-"))
    data, train = load(finished / "checkpoint.pth")["data"], train_cifar.load_data(parse())[0]
    pixels = train.squares.double() / 255
    assert data["mean"] == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert data["std"] == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert data["classes"] == train.classes

def test_the_schedule_and_the_step_of_a_run(finished, tmp_path, monkeypatch):
    steps = record(monkeypatch)
    run(tmp_path)
    monkeypatch.undo()
    assert [step["ratios"] for step in steps] == 8 * [(0.75, 0.0)] + 16 * [(0.45, 0.40)]
    assert [step["maps"] is None for step in steps] == 8 * [True] + 16 * [False]
    peak = 4e-3 * 32 / 256                               # after one epoch of warm-up
    rates = [peak / 2, *(peak * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(1, 10, 2))]
    assert column(tmp_path, "lr") == pytest.approx(rates, rel=1e-3)
    losses = torch.tensor([step["loss"] for step in steps]).view(6, 4).mean(dim=1)
    assert column(tmp_path, "loss") == pytest.approx(losses.tolist(), abs=1e-4)
    for a, b in itertools.combinations(steps, 2):
        assert not torch.equal(a["ranking"], b["ranking"])
        assert not torch.equal(a["theta"], b["theta"])
    assert_same(saved(tmp_path)["model"], saved(finished)["model"])      # probes change nothing
    train = train_cifar.load_data(parse())[0]
    for step in steps:
        masked, _, visible = step["sets"]
        assert step["given"] == {"visible": visible, "masked": masked}
        squares, _ = step["crops"]
        crops = amt.crop(squares, step["theta"], 32, "bicubic").clamp(0, 255)
        torch.testing.assert_close(step["images"], (crops - train.mean) / train.std)
        if step["maps"] is not None:                     # of these images, cut by the same theta
            distance = (train.squares[:, None].float() - squares).abs().amax(dim=(2, 3, 4))
            ids = distance.argmin(dim=0)
            assert (distance.amin(dim=0) == 0).all()
            again = amt.crop_weights(step["maps"], step["theta"], 32, 8)
            torch.testing.assert_close(step["weights"], again)
            step["ids"] = ids
    for step in steps[-8:]:
        assert torch.equal(step["maps"], load(tmp_path / "checkpoint.pth")["maps"][step["ids"]])
    orders = torch.cat([step["ids"] for step in steps[8:]]).view(4, 64)      # of epochs 3 to 6
    assert all(len(order.unique()) == 64 for order in orders)    # an epoch shows an image once
    assert len(orders.unique(dim=0)) == 4

@pytest.mark.parametrize("masking, method", [
    ("attmask", "mae"), ("mst", "simmim"), ("grid", "mae"), ("block", "maskfeat")])
def test_strategies_rank_by_the_maps_of_crops_or_without(masking, method, tmp_path, monkeypatch):
    steps = record(monkeypatch)
    run(tmp_path, "--masking", masking, "--method", method, "--epochs", 2, "--update-interval", 1,
        "--patch-size", 4, "--mask-ratio", 0.5, "--throw-ratio", 0.25)
    uses_maps, unit = masking in ("attmask", "mst"), 1 if method == "mae" else 2
    first, N = train_cifar.METHODS[method]["random"] if uses_maps else (0.5, 0.25), 64 // unit ** 2
    assert [step["ratios"] for step in steps] == 4 * [first] + 4 * [(0.5, 0.25)]
    areas = torch.cat([step["theta"] for step in steps])[:, [0, 1], [0, 1]].abs().prod(dim=1)
    low = train_cifar.METHODS[method]["scale"][0]
    assert low < areas.min() * 1.001 < low + 0.1
    for i, step in enumerate(steps):
        assert step["ranking"].shape == (16, N) and len(step["ranking"].unique(dim=0)) > 1
        assert (step["maps"] is not None) == (uses_maps and i >= 4)
        if uses_maps and i >= 4:
            ranked = step["weights"].gather(1, step["ranking"]).diff(dim=1)
            assert (ranked <= 0 if masking == "attmask" else ranked >= 0).all()

def test_maps_are_the_attention_of_whole_images_and_weights_change_them():
    args, (train, _) = parse(), train_cifar.load_data(parse())
    encoder = unsettle(train_cifar.load_encoder(args)).train()
    own, share = train_cifar.new_maps(args, train, encoder, 2)
    pixels = (train.squares.float() - train.mean) / train.std
    assert pixels.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    torch.testing.assert_close(own, amt.attention_maps(encoder, pixels).half(), rtol=0, atol=2e-3)
    maps = own.float()
    assert float(share) == pytest.approx((maps.mean(dim=0).var() / maps.var()).item(), abs=1e-3)
    for flag, expected in [("uniform", torch.ones(70, 1, 1)), ("object", train.objects)]:
        found, share = train_cifar.new_maps(parse("--weights", flag), train, None, 2)
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-3)
        assert share == ""                               # no encoder ran
    shuffled, _ = train_cifar.new_maps(parse("--weights", "shuffled"), train, encoder, 2)
    source = torch.cdist(shuffled.float().flatten(1), maps.flatten(1)).argmin(dim=1)
    assert len(source.unique()) == 70 and (source == torch.arange(70)).sum() < 10
    floored, _ = train_cifar.new_maps(parse("--map-floor", 0.25), train, encoder, 2)
    assert floored.amin() == 0.25 and floored.amax() == 1
    torch.testing.assert_close((floored.float() - 0.25) / 0.75, maps, rtol=0, atol=2e-3)

def test_the_true_objects_are_where_an_image_differs_from_its_background():
    images, _ = train_cifar.load_data(parse())
    pixels = images.squares.float()
    background = F.interpolate(pixels[:, :, ::31, ::31], 32, mode="bilinear", align_corners=True)
    inside = ((pixels - background).abs() > 2).any(dim=1).float()
    fraction = inside.unflatten(1, (4, 8)).unflatten(3, (4, 8)).mean(dim=(2, 4))
    assert 0.3 < fraction.mean() < 0.5
    torch.testing.assert_close(images.objects, fraction, rtol=0, atol=1 / 16)

def test_a_picture_ranks_by_the_true_objects_of_its_own_images(tmp_path, monkeypatch):
    reweight, found = train_cifar.reweight, []
    monkeypatch.setattr(train_cifar, "reweight",
                        lambda *args: found.append(reweight(*args)) or found[-1])
    run(tmp_path, "--weights", "object", "--map-floor", 0.25)
    shown = torch.randperm(70, generator=rng())[:8]
    torch.testing.assert_close(
        found[-1], 0.25 + 0.75 * train_cifar.load_data(parse())[1].objects[shown])

def test_pretraining_may_start_from_an_encoder_and_then_has_maps_at_once(tmp_path, monkeypatch):
    encoder = unsettle(train_cifar.load_encoder(parse()))
    torch.save(encoder.state_dict(), tmp_path / "e.pth")
    steps = record(monkeypatch)
    run(tmp_path / "out", "--checkpoint", tmp_path / "e.pth", "--blr", 0, "--epochs", 3)
    assert_same(dict(encoder.state_dict()), dict(load(tmp_path / "out" / "encoder.pth")))
    assert {step["ratios"] for step in steps} == {(0.45, 0.40)}
    assert all(step["maps"] is not None for step in steps)

def test_initialization_follows_the_seed_and_only_matrices_have_weight_decay(tmp_path):
    models = [train_cifar.build_model(parse("--seed", seed), train_cifar.load_encoder(
        parse("--seed", seed))) for seed in (0, 0, 1)]
    states = [model.encoder.state_dict()["blocks.0.mlp.fc1.weight"] for model in models]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    optimizer = train_cifar.build_optimizer(models[0])
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {m.weight for m in models[0].modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert decay == {p: 0.05 * (p in matrices) for p in models[0].parameters() if p.requires_grad}
    assert optimizer.defaults["betas"] == (0.9, 0.95)

def test_a_run_says_what_it_reads_and_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train_cifar.SHOWN, "next", 0)
    monkeypatch.setattr(train_cifar.time, "time", itertools.count(0, 7).__next__)
    run(tmp_path, "--epochs", 1, "--update-interval", 1)
    said = capsys.readouterr().out
    assert "shapes: 70 training, 70 test images, checksum " in said
    pattern = r"pretraining 1/1, step \d/2, loss [\d.]+, \d:\d\d:\d\d left, \d+ images/s"
    assert re.search(pattern, said) and "encoder.pth" in said.splitlines()[-1]
    train_cifar.SHOWN["next"] = 0
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    train_cifar.show_progress(lambda: 30 * "x")
    assert capsys.readouterr().out == "\r\033[K" + 19 * "x"

# ==== Linear probe and fine-tuning ================================================================

def colors(n):
    """n squares in four colors, darker on the left, and the colors as labels."""
    labels = torch.arange(n) % 4
    color = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]])[labels]
    return (color[:, :, None, None] * torch.linspace(0.5, 1, 32).expand(32, 32)).byte(), labels

def images_of(args, squares, labels):
    images = train_cifar.Images(args, labels.tolist(), list("abcd"), squares)
    images.mean, images.std, images.about = torch.tensor(100.0), torch.tensor(50.0), {}
    return images

def test_the_probe_reads_both_readouts_of_whole_images(monkeypatch):
    args, (squares, labels) = parse(), colors(41)
    labels[40] = 3                                       # is wrong: 40 of 41 are right
    train, test = images_of(args, *colors(64)), images_of(args, squares, labels)
    seen = []

    class Encoder(nn.Module):                            # [CLS] tells nothing
        embed_dim = 3

        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            seen.append(images)
            patches = images.mean(dim=(2, 3))
            noise = 100 * torch.randn(patches.shape, generator=rng(len(seen)))
            return torch.stack([noise, patches + 1, patches - 1], dim=1)

    found = train_cifar.linear_probe(args, train, test, Encoder().train())
    assert found["probe_mean"] == f"{100 * 40 / 41:.2f}" and float(found["probe_cls"]) < 50
    pixels = torch.cat([train.squares, squares]).float()
    torch.testing.assert_close(torch.cat(seen), (pixels - 100) / 50)

def test_nearest_neighbors_vote_with_the_exponential_of_their_cosine_similarity():
    knn = runpy.run_path(str(Path(__file__).parent / "docs/knn.py"))["knn"]
    x, x_test = torch.randn(30, 4, generator=rng()) + 0.5, torch.randn(1001, 4, generator=rng(1))
    y = torch.arange(30) % 3
    votes = knn(x, y, x_test, k=5, temperature=0.5)
    for i in (0, 7, 1000):
        near = sorted(((F.cosine_similarity(x_test[i], x[j], 0).item(), y[j].item())
                       for j in range(30)), reverse=True)[:5]
        expected = [sum(math.exp(s / 0.5) for s, label in near if label == c) for c in range(3)]
        assert votes[i].tolist() == pytest.approx(expected, rel=1e-4)

def optimum(x, y, penalty):
    """The linear classifier of standardized x with the least penalized loss, in float64."""
    head = nn.Linear(x.shape[1], 3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_grad=1e-9,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    return head

def test_the_linear_classifier_is_the_optimum_on_all_images_at_the_penalty_that_generalizes():
    # Class 0 is the largest. The first and the last tenth have wrong labels, so whoever holds out
    # one of them, and not a random tenth, finds that the strongest penalty is the best.
    y = torch.randint(3, (600,), generator=rng(2)) * torch.randint(2, (600,), generator=rng(3))
    x = torch.randn(600, 30, generator=rng()) * 3 + 7
    x[:, :3] += 4 * F.one_hot(y, 3)
    y[:60] = (y[:60] + 1) % 3
    y[-60:] = (y[-60:] + 1) % 3
    x_test = torch.randn(50, 30, generator=rng(1)) * 5 + 4
    torch.manual_seed(0)
    found = train_cifar.linear_classifier(x, y, x_test).double().softmax(dim=1)

    std, mean = torch.std_mean(x.double(), dim=0)
    distances = {}
    for k in range(1, 8):
        head = optimum((x - mean) / std, y, penalty=10 ** (-k / 2))
        expected = head((x_test - mean) / std).softmax(dim=1)
        distances[k] = (found - expected).abs().max().item()
    assert min(distances, key=distances.get) == 3         # what this seed's tenth prefers
    assert distances[3] < 2e-3

@pytest.mark.parametrize("flags, decay", [([], 0.75), (["--checkpoint", "none", "--epochs", 0], 1)])
def test_finetuning_decays_the_rate_by_layer_mixes_smooths_and_crops(flags, decay, tmp_path,
                                                                     monkeypatch):
    args = parse("--depth", 2, "--accum-steps", 1, "--finetune-epochs", 8, "--finetune-blr", 3e-2,
                 "--out-dir", tmp_path, *flags)
    squares, labels = colors(37)
    labels[36] += 1                                      # is wrong: 36 of 37 are right
    train, test = images_of(args, *colors(64)), images_of(args, squares, labels)
    encoder = unsettle(amt.vit_tiny(img_size=32, patch_size=8, depth=2))
    targets, inputs, rates, cross_entropy, runs = [], [], set(), F.cross_entropy, []

    def entropy(logits, target, label_smoothing):
        targets.append(target)
        assert label_smoothing == 0.1
        return cross_entropy(logits, target, label_smoothing=label_smoothing)

    init = train_cifar.Run.__init__
    monkeypatch.setattr(F, "cross_entropy", entropy)
    monkeypatch.setattr(train_cifar.Run, "__init__",
                        lambda self, *x: runs.append(self) or init(self, *x))
    monkeypatch.setattr(train_cifar, "stochastic_depth",
                        lambda x, p, *rest: rates.add((round(p, 6), *rest)) or x)
    encoder.patch_embed.register_forward_pre_hook(
        lambda module, x: inputs.append(x[0]) if module.training else None)
    train_cifar.finetune(args, train, test, encoder)
    assert rates == {(p, "row", training) for p in (0, 0.1) for training in (True, False)}
    run_, = runs
    assert run_.optimizer.defaults["betas"] == (0.9, 0.999) and run_.warmup == 0
    last = 3e-2 * 16 / 256 * (0.5 + 0.5 * math.cos(math.pi * 31 / 32))
    groups = run_.optimizer.param_groups
    rates = {p: group["lr"] / last for group in groups for p in group["params"]}
    layers = {"encoder.cls_token": 0, "encoder.patch_embed": 0, "encoder.blocks.0": 1,
              "encoder.blocks.1": 2, "encoder.norm": 3, "head": 3}
    for name, p in run_.model.named_parameters():
        if p.requires_grad:
            layer, = (layer for start, layer in layers.items() if name.startswith(start))
            assert rates[p] == pytest.approx(decay ** (3 - layer))
    assert column(tmp_path, "test_accuracy", "finetune-")[-1] == round(100 * 36 / 37, 2)
    mixed = torch.cat(targets)
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(512))
    assert 0.2 < (mixed.amax(dim=1) < 0.999).float().mean() < 0.95
    x = amt.unpatchify(torch.cat(inputs), 8)
    rise = (x[:, :, 0, -1] - x[:, :, 0, 0]).amax(dim=1)
    assert (rise > 0.1).any() and (rise < -0.1).any() and rise.abs().std() > 0.1      # flips, crops

@pytest.mark.parametrize("flags", [[], ["--finetune-randaugment"]])
def test_randaugment_changes_each_image_only_if_asked(flags, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(v2.RandAugment, "forward", lambda self, x: given.append(x) or x)
    run(tmp_path, "--checkpoint", "none", "--epochs", 0, "--finetune-epochs", 1, *flags)
    assert [x.dtype for x in given] == len(flags) * 64 * [torch.uint8]

@pytest.mark.parametrize("kind", ["script", "timm", "mae", "dino", "compiled", "other grid"])
def test_encoders_of_each_kind_load(kind, tmp_path, capsys):
    size = 64 if kind == "other grid" else 32
    encoder = unsettle(amt.vit_tiny(img_size=size, patch_size=4, depth=1))
    line = (2 * torch.arange(size // 4) + 1) / (size // 4) - 1               # centers of patches
    encoder.pos_embed.data[0, 1:, :2] += torch.cartesian_prod(line, line)
    content = state = dict(encoder.state_dict())
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    if kind == "script":
        content = {"model": {f"encoder.{k}": p for k, p in state.items()} | decoder, "step": 3}
    if kind == "timm":
        content = state | {"head.weight": torch.zeros(7, 192), "head.bias": torch.zeros(7)}
    if kind == "mae":
        content = {"model": state | decoder, "args": argparse.Namespace(lr=0.1), "epoch": 800}
    if kind == "dino":
        content = {"student": {}, "teacher": {f"backbone.{k}": p for k, p in state.items()}
                   | {"head.mlp.0.weight": torch.zeros(2)}}
    if kind == "compiled":
        content = {"state_dict": {f"module._orig_mod.{k}": p for k, p in state.items()}}
    torch.save(content, tmp_path / "saved.pth")
    flags = ["--epochs", 0, "--checkpoint", tmp_path / "saved.pth", "--patch-size", 4]
    loaded = dict(train_cifar.load_encoder(parse(*flags)).state_dict())
    if kind == "other grid":                             # the mean of 2 x 2 is close
        new, old = (x.pop("pos_embed") for x in (loaded, state))
        assert torch.equal(new[:, 0], old[:, 0])
        old = F.avg_pool2d(old[0, 1:].T.view(1, -1, 16, 16), 2).flatten(2).mT
        torch.testing.assert_close(new[:, 1:, :2], old[:, :, :2], rtol=0, atol=0.1)
    assert_same(loaded, state)
    assert "need depth 1, embed_dim 192 and patch_size 4, got 2, 192 and 8" in error(
        capsys, tmp_path / "out", *flags[:4], "--depth", 2)

# ==== Data ========================================================================================

def make_pictures(root):
    """Pictures whose red rises from left to right and whose green rises from top to bottom."""
    for i, (w, h) in enumerate([(90, 60), (40, 100), (64, 64), (300, 200)] * 5):
        kind = root / ("train" if i < 16 else "val") / "ab"[i % 2]
        kind.mkdir(parents=True, exist_ok=True)
        x = np.broadcast_to(np.linspace(0, 255, w), (h, w))
        y = np.broadcast_to(np.linspace(0, 255, h)[:, None], (h, w))
        image = Image.fromarray(np.stack([x, y, np.full((h, w), 10 * i)], 2).astype(np.uint8))
        image.save(kind / f"{i}.{'jpg' if i % 4 == 3 else 'png'}", quality=95)
    return root

def on_disk(root, *flags):
    return ["--dataset", "imagenet", "--data-path", root, "--model", "vit_tiny", "--batch-size", 4,
            "--square-size", 48, "--accum-steps", 1, *flags]

@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
def test_files_become_squares_and_crops_show_what_torchvision_would(dataset, tmp_path):
    args = parse(*on_disk(make_pictures(tmp_path)), "--dataset", dataset)
    train, test = train_cifar.load_data(args)
    assert (train.squares is None) == (dataset == "imagenet")
    assert (len(train), len(test), train.classes) == (16, 4, ["a", "b"])
    assert train.labels.tolist() == 8 * [0] + 8 * [1] and test.labels.tolist() == [0, 0, 1, 1]
    assert train.about["mean"] == [0.485, 0.456, 0.406]
    assert train.about["std"] == [0.229, 0.224, 0.225]
    files = sorted((tmp_path / "train/a").iterdir()) + sorted((tmp_path / "train/b").iterdir())
    order = torch.randperm(16, generator=rng()).split(5)
    read = list(train.read(order))
    assert [ids.tolist() for ids, _, _ in read] == [ids.tolist() for ids in order]
    for ids, squares, ratio in read:
        theta = amt.random_crops(len(ids), generator=rng(3), image_ratio=ratio)
        crops = amt.crop(squares, theta, 32, "bicubic")
        for i, crop, (row_x, row_y) in zip(ids, crops, theta.tolist()):
            image = Image.open(files[i])
            assert crop[2].mean().item() == pytest.approx(10 * int(files[i].stem), abs=3)
            w, h = abs(row_x[0]), row_y[1]
            left, top = (1 + row_x[2] - w) / 2, (1 + row_y[2] - h) / 2
            assert 0.74 < w * image.width / (h * image.height) < 1.34 or max(w, h) == 1
            red = crop[0, 16, [4, 27]] if row_x[0] > 0 else crop[0, 16, [27, 4]]
            x = left + w * torch.tensor([4.5, 27.5]) / 32
            y = top + h * torch.tensor([4.5, 27.5]) / 32
            torch.testing.assert_close(red, 255 * x, rtol=0, atol=8)
            torch.testing.assert_close(crop[1, [4, 27], 16], 255 * y, rtol=0, atol=8)
    (_, squares, ratio), = test.read([torch.arange(4)])
    central = test.central(squares, ratio) * test.std + test.mean
    for i, (w, h) in enumerate([(90, 60), (64, 64), (40, 100), (300, 200)]):
        half = 0.875 * min(w, h) / w / 2
        ends = 255 * (0.5 + half * (2 * torch.tensor([4.5, 27.5]) / 32 - 1))
        torch.testing.assert_close(central[i, 0, 16, [4, 27]], ends, rtol=0, atol=8)

def test_draft_never_decodes_smaller_than_the_square(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((600, 400)).save(tmp_path / "a.jpg")
    images = train_cifar.Images(parse(*on_disk(tmp_path)), [0], ["a"], files=["a.jpg"])
    sizes, resize = [], v2.functional.resize
    monkeypatch.setattr(v2.functional, "resize",
                        lambda x, *rest: sizes.append(tuple(x.shape)) or resize(x, *rest))
    for size, decoded in [(48, (3, 50, 75)), (51, (3, 100, 150)), (300, (3, 400, 600))]:
        images.args.square_size = size
        assert images.decode(str(tmp_path / "a.jpg"))[0].shape == (size, size, 3)
        assert sizes[-1] == decoded

def test_files_that_cannot_be_used_are_named_and_reading_can_be_left(tmp_path, capsys):
    root = make_pictures(tmp_path / "images")
    train = train_cifar.load_data(parse(*on_disk(root)))[0]
    reading = train.read(torch.arange(16).split(4))
    next(reading)
    reading.close()                                      # ends the threads
    (root / "train/a/0.png").write_bytes((root / "train/a/2.png").read_bytes()[:-300])
    assert "cannot decode" in error(capsys, tmp_path / "o", *on_disk(root))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / "train/a/0.png")
    assert "0.png: mode I;16 has more than 8 bits" in error(capsys, tmp_path / "o", *on_disk(root))
    (root / "train/a/0.png").unlink()
    (root / "train/a").rename(root / "train/c")
    said = error(capsys, tmp_path / "p", *on_disk(root))
    assert "val has classes that train/ has not: {'a'}" in said
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train/b")
    run(tmp_path / "q", *on_disk(root), "--epochs", 3)   # one class and no val/ are enough
    assert column(tmp_path / "q", "probe_cls") == [None, None, None]
    assert "needs two classes" in error(capsys, tmp_path / "r", *on_disk(root), "--epochs", 0,
                                        "--checkpoint", "none", "--finetune-epochs", 1)

def test_tiny_imagenet_has_its_own_validation_labels(tmp_path):
    root = make_pictures(tmp_path)
    (root / "val/images").mkdir()
    for file in [*root.glob("val/a/*"), *root.glob("val/b/*")]:
        file.rename(root / "val/images" / file.name)
    (root / "val/a").rmdir(), (root / "val/b").rmdir()
    names = sorted(file.name for file in root.glob("val/images/*"))
    lines = [f"{name}\t{kind}\t0\t0\t9\t9" for name, kind in zip(names, "baab")]
    (root / "val/val_annotations.txt").write_text("\n".join(lines))
    _, test = train_cifar.load_data(parse(*on_disk(root), "--dataset", "tiny-imagenet"))
    assert test.labels.tolist() == [1, 0, 0, 1]

class Fake:
    """A download of torchvision: 40 images to train on, of which 17 have labels, and 4 to test."""
    pixels, base_folder, classes = np.zeros((40, 32, 32, 3), np.uint8), "fake", list("abc")
    pixels[:, :, :, :2] = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 2))   # blue is 0

    def __init__(self, root, train=True, split="train+unlabeled", download=False):
        n = 4 if split == "test" or not train else 40
        self.data, self.targets = self.pixels[:n], [i % 3 for i in range(n)]
        if root == "stl10":
            self.data = self.data.transpose(0, 3, 1, 2)
            self.labels = np.array([x if i < 17 else -1 for i, x in enumerate(self.targets)])

@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_downloads_are_torchvisions_and_only_images_with_labels_are_finetuned(
        name, tmp_path, monkeypatch, capsys):
    real, *splits = train_cifar.DOWNLOADS[name]
    assert real.__name__.lower() == name
    fake = type("STL10" if name == "stl10" else "CIFAR", (Fake,), {})
    monkeypatch.setitem(train_cifar.DOWNLOADS, name, (fake, *splits))
    monkeypatch.setattr(train_cifar, "STL10", fake if name == "stl10" else None)
    flags = ["--dataset", name, "--data-path", name]
    (train, test), pixels = train_cifar.load_data(parse(*flags)), Fake.pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(train.squares, pixels) and np.array_equal(test.squares, pixels[:4])
    n = 17 if name == "stl10" else 40
    assert train.labels.tolist() == [i % 3 for i in range(n)] and test.labels.dtype == torch.int64
    read, seen = train_cifar.Images.read, []
    monkeypatch.setattr(train_cifar.Images, "read", lambda self, batches, text="": (
        seen.append(max(map(max, batches)).item()) if len(batches) > 1 else None) or read(
            self, batches, text))
    run(tmp_path, *flags, "--batch-size", 8, "--epochs", 3, "--finetune-epochs", 1,
        "--img-size", 16, "--patch-size", 4)
    assert max(seen) > 34 and seen[-1] < n               # a constant channel did not give nan
    if name == "stl10":                                  # 17 have labels, a step takes 32
        said = error(capsys, tmp_path / "few", *flags, "--batch-size", 16, "--finetune-epochs", 1)
        assert "a label for as many images as a step takes, 32" in said
        assert not list((tmp_path / "few").iterdir())

def test_neither_the_outline_nor_the_texture_of_a_shape_tells_its_class():
    shapes = SHAPES(parse(), 600, 3)
    images, labels = shapes.squares, shapes.labels
    assert images.shape == (600, 3, 32, 32) and labels.bincount().tolist() == 10 * [60]
    outlines, textures = torch.zeros(2, 10, 32, 32)
    # The object has the two colors, a dark and a light one, that most pixels have.
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

@pytest.mark.parametrize("call, number, prefix, step", [
    (13, signal.SIGTERM, "", 7),                         # in the middle of epoch 4
    (8, signal.SIGINT, "", 4),                           # at the end of epoch 2, before new maps
    (24 + 3, signal.SIGHUP, "finetune-", 2)])
def test_a_run_that_a_signal_stops_ends_as_an_unbroken_one_once_resumed(
        call, number, prefix, step, finished, tmp_path, monkeypatch, capsys):
    for ignored in (signal.SIGHUP, signal.SIGINT):       # as by nohup and in background jobs
        signal.signal(ignored, signal.default_int_handler)
    before, made, new_maps = signal.getsignal(number), [], train_cifar.new_maps
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        at_call(patch, call, lambda: [os.kill(os.getpid(), number) for _ in range(2)])
        run(tmp_path, *ALL_STAGES)
    assert caught.value.code == 128 + number and signal.getsignal(number) == before
    assert "the same command with --resume continues" in capsys.readouterr().out
    assert load(tmp_path / f"{prefix}checkpoint.pth")["step"] == step
    monkeypatch.setattr(train_cifar, "new_maps", lambda *x: made.append(x[3]) or new_maps(*x))
    run(tmp_path, "--resume", *ALL_STAGES)               # in the same process: a notebook
    assert made == {7: [4], 4: [2, 4], 2: []}[step]      # a resume within an epoch makes none
    for name in ("", "finetune-"):
        assert_same(saved(tmp_path, name), saved(finished, name))
    for name in ("encoder.pth", "finetuned.pth"):
        assert_same(load(tmp_path / name), load(finished / name))

def test_a_signal_ends_at_once_what_has_no_steps(tmp_path, monkeypatch):
    def at(name):
        found, original = [], getattr(train_cifar, name)
        monkeypatch.setattr(train_cifar, name, lambda *args: found.append(
            signal.getsignal(signal.SIGTERM) is train_cifar.on_signal) or original(*args))
        return found
    loading, probe = at("load_data"), at("linear_probe")
    run(tmp_path, "--epochs", 0, "--checkpoint", "none")
    run(tmp_path, "--epochs", 1, "--masking", "random")
    assert (loading, probe) == ([False, False], [False, True])

@pytest.mark.parametrize("call, step", [(1, 4), (6 + 1, 6)])          # of the maps, of the probe
def test_a_signal_during_maps_or_the_probe_ends_within_a_mini_batch(call, step, finished, tmp_path,
                                                                    monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        calls = at_call(patch, call, lambda: os.kill(os.getpid(), signal.SIGTERM),
                        train_cifar.Images, "whole")
        run(tmp_path, *ALL_STAGES)
    assert caught.value.code == 128 + signal.SIGTERM and next(calls) == call + 1
    assert load(tmp_path / "checkpoint.pth")["step"] == step
    run(tmp_path, "--resume", *ALL_STAGES)
    assert_same(saved(tmp_path), saved(finished))

@pytest.mark.parametrize("where", [b"", b"half a checkpoint"])
def test_a_run_killed_before_or_while_it_saves_ends_as_an_unbroken_one(where, finished, tmp_path,
                                                                       monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, 21, lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
        run(tmp_path, *ALL_STAGES)
    (tmp_path / "checkpoint.pth.part").write_bytes(where)
    assert load(tmp_path / "checkpoint.pth")["step"] in (8, 10)
    run(tmp_path, "--resume", *ALL_STAGES)
    assert_same(saved(tmp_path), saved(finished))

def test_two_processes_do_what_one_does_and_one_can_resume_them(tmp_path):
    one, two = run(tmp_path / "one", "--finetune-epochs", 1, "--accum-steps", 4, "--probe-every", 2,
                   "--batch-size", 8), tmp_path / "two"
    flags = ["--finetune-epochs", 1, "--batch-size", 8, "--probe-every", 2, "--out-dir", two]
    stop = "os.kill(os.getpid(), signal.SIGTERM)"
    codes, said = processes(tmp_path, flags, flags, at=(1, 13, stop))
    assert codes == 2 * [128 + signal.SIGTERM], said
    assert load(two / "checkpoint.pth")["step"] == 7
    run(two, *flags, "--accum-steps", 4, "--resume")
    for prefix in ("", "finetune-"):
        a, b = ({k: p for k, p in saved(x, prefix)["model"].items() if "qkv.bias" not in k}
                for x in (one, two))                     # the gradient of a key's bias is noise
        assert_same(a, b, rtol=0, atol=1e-4)
        assert column(one, "loss", prefix) == pytest.approx(column(two, "loss", prefix), rel=1e-3)
    for name in ("position_share", "probe_cls"):
        assert column(one, name) == pytest.approx(column(two, name), abs=2)

@pytest.mark.parametrize("other, words", [
    (["--blr", 1e-3], "--blr"), (["--save-every", 1], "--save-every"),
    (["--num-images", 64], "images checksum")])
def test_processes_must_agree_on_flags_and_images(other, words, tmp_path):
    codes, said = processes(tmp_path, ["--out-dir", tmp_path / "o"],
                            ["--out-dir", tmp_path / "o", *other])
    assert 0 not in codes and "has other flags or images" in said and words in said
    assert not list((tmp_path / "o").iterdir())

def test_nothing_is_saved_that_is_not_finite(tmp_path, monkeypatch, capsys):
    forward, calls = amt.MAE.forward, itertools.count(1)

    def spoiled(self, images, **sets):
        loss, pred = forward(self, images, **sets)
        return (loss * math.nan if next(calls) == 10 else loss), pred

    monkeypatch.setattr(amt.MAE, "forward", spoiled)
    said = error(capsys, tmp_path, "--save-every", 1)
    assert "not finite after step 6" in said and said.endswith("Start anew with a lower --blr")
    state = load(tmp_path / "checkpoint.pth")
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["model"].values())
    assert all(p.isfinite().all() for p in load(tmp_path / "encoder.pth").values())
    calls = itertools.count(3)                           # before the maps could notice it
    assert "not finite after step 4" in error(capsys, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.pth"))

def test_a_run_with_other_settings_or_images_is_refused_before_anything_is_loaded(
        finished, tmp_path, monkeypatch, capsys):
    def no_data(args):
        raise AssertionError("the data was loaded")

    content = {path.name: path.read_bytes() for path in finished.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(train_cifar, "load_data", no_data)
        for flag, value in [("epochs", 8), ("seed", 1), ("weights", "uniform"), ("depth", 2),
                            ("batch_size", 8), ("finetune_blr", 1.0), ("precision", "bf16"),
                            ("checkpoint", "none")]:
            other = [f"--{flag.replace('_', '-')}", value]
            said = error(capsys, finished, "--resume", *ALL_STAGES, *other)
            assert f"{flag} " in said and f"(here {value})" in said
        assert "exists: continue it with --resume" in error(capsys, finished)
    with monkeypatch.context() as patch:
        shapes = train_cifar.shapes
        patch.setattr(train_cifar, "shapes", lambda args, n, seed: shapes(args, n, seed + 5))
        assert "images checksum" in error(capsys, finished, "--resume", *ALL_STAGES)
    assert content == {path.name: path.read_bytes() for path in finished.iterdir()}
    run(finished, "--resume", *ALL_STAGES, "--probe-every", 2, "--save-every", 2)    # these may

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)

def test_a_damaged_or_hostile_checkpoint_is_refused(finished, tmp_path, monkeypatch, capsys):
    out, content = tmp_path / "out", (finished / "checkpoint.pth").read_bytes()
    out.mkdir()
    for i in (len(content) // 3, len(content) // 2):     # a bit of a weight, which torch reads
        damaged = bytearray(content)
        damaged[i] ^= 1
        (out / "checkpoint.pth").write_bytes(damaged)
        assert "cannot load" in error(capsys, out, "--resume", *ALL_STAGES)
        assert (out / "checkpoint.pth").read_bytes() == damaged
    torch.save({"settings": Hostile()}, out / "checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    assert "Weights only load failed" in error(capsys, out, "--resume", *ALL_STAGES)
    assert not Path("hostile").exists()

def test_a_file_that_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    train_cifar.write(tmp_path / "a.pth", {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    for content in ({"a": 2}, b"2"):
        with pytest.raises(OSError, match="cannot write .*a.pth.* unharmed: .*No space left"):
            train_cifar.write(tmp_path / "a.pth", content)
        assert load(tmp_path / "a.pth") == {"a": 1} and len(list(tmp_path.iterdir())) == 1

def test_masking_png_shows_masked_patches_red_and_thrown_ones_gray(finished):
    pixels = np.array(Image.open(finished / "masking.png").convert("RGB")).astype(int)
    assert pixels.shape == (304, 150 + 804, 3)           # three rows of eight images, and labels
    rows = pixels[4:, 154:].reshape(3, 100, 8, 100, 3)[:, :96, :, :96]
    red, gray = (np.abs(rows - color).max(axis=4) < 3 for color in ([209, 73, 91], [138, 143, 152]))
    assert red[1].mean() == pytest.approx(7 / 16, abs=0.01)          # 7 and 6 of 16 patches
    assert gray[1].mean() == pytest.approx(6 / 16, abs=0.01)
    assert gray[2][gray[1]].all() and red[2].mean() < 0.2
    visible = ~(red[1] | gray[1])
    assert np.abs(rows[0][visible] - rows[1][visible]).max() < 2
    assert (pixels[:, :150] < 128).any()
