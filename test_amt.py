"""Tests of amt.py and train_cifar.py, in an order to read them in. Run: python -m pytest -q

First the whole method, then what each part of amt.py promises, in the order in which a batch
passes through them, then comparisons with other people's code, and errors. The second half tests
train_cifar.py. What docs/reuse.md shows is tested in docs/test_reuse.py.
"""
import ast
import csv
import errno
import importlib
import inspect
import itertools
import math
import multiprocessing
import os
import re
import socket
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
from torch.utils._pytree import tree_flatten
from torchvision.transforms import v2

import amt
import train_cifar
from docs import fake_graph

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
    """Indices (masked, thrown, visible) of 5, 6 and 5 of 16 patches, for n images."""
    ranking = torch.rand(n, 16, generator=rng(1)).argsort(dim=1)
    return ranking.split([5, 6, 5], dim=1)

def record(patch, owner, name):
    """A list to which each call of a function adds its arguments, by name, and its result."""
    calls = []
    function = getattr(owner, name)
    signature = inspect.signature(function)

    def recording(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        result = function(*args, **kwargs)
        calls.append(SimpleNamespace(**given.arguments, result=result))
        return result

    patch.setattr(owner, name, recording)
    return calls

# ==== The method ==================================================================================

def test_the_loop_in_the_docstring_runs_on_schedule_and_learns(monkeypatch):
    docstring = ast.get_docstring(ast.parse(Path(amt.__file__).read_text()))
    code = re.search(r"\n(    vit = .*\n(?:    .*\n|\n)*)", docstring)[1]
    code = textwrap.dedent(code)
    for old, new in [("range(400)", "range(30)"), ("% 40", "% 3"), ("1.5e-4", "3e-3"),
                     ("optimizer.step()", "optimizer.step(); losses.append(loss.item())")]:
        assert old in code
        code = code.replace(old, new)

    monkeypatch.setattr(amt, "vit_base", tiny_vit)
    monkeypatch.setattr(amt, "MAE", partial(amt.MAE, decoder_embed_dim=16, decoder_num_heads=2))
    maps = record(monkeypatch, amt, "dataset_maps")
    sets = record(monkeypatch, amt, "mask_and_throw")
    images = random_images(1).repeat(70, 1, 1, 1)         # two steps an epoch
    losses = []
    torch.manual_seed(0)
    exec(code, dict(amt=amt, torch=torch, images=images, losses=losses))
    ratios = [(x.mask_ratio, x.throw_ratio) for x in sets]
    assert ratios == 6 * [(0.75, 0.0)] + 54 * [(0.45, 0.40)]
    assert len(maps) == 9
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

def test_random_crops_stay_in_the_image():
    theta = amt.random_crops(5000, generator=rng(3))
    sides = theta[:, [0, 1], [0, 1]].abs()
    centers = theta[:, :, 2].abs()
    assert (sides + centers <= 1 + 1e-6).all()

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
def test_a_strategy_ranks_every_patch_and_draws_for_each_image_anew(strategy, N):
    weights = torch.rand(N, generator=rng())
    torch.manual_seed(0)
    ranking = strategy(weights.expand(6, N))              # images with the same weights
    assert ranking.dtype == torch.int64
    assert torch.equal(ranking.sort(dim=1).values, torch.arange(N).expand(6, N))
    expected = 1 if strategy in (amt.highest_first, amt.lowest_first) else 6
    assert len(ranking.unique(dim=0)) == expected

def test_rankings_by_weight_sort_and_random_ones_ignore_weights():
    torch.manual_seed(0)
    rankings = amt.random_ranking(torch.tensor([3.0, 0.0, 2.0, 0.1]).expand(60000, 4))
    assert_distribution(rankings, lambda permutation: 1 / 24)

    weights = torch.tensor([[0.2, 0.9, 0.0, 0.5], [3.0, 1.0, 2.0, 0.1]])
    assert amt.highest_first(weights).tolist() == [[1, 3, 0, 2], [0, 2, 1, 3]]
    assert amt.lowest_first(weights).tolist() == [[2, 0, 3, 1], [3, 1, 2, 0]]

@pytest.mark.parametrize("h", [4, 14])
def test_grid_wise_ranks_a_checkerboard_first_and_the_bottom_left_of_each_2_x_2_last(h):
    ranking = amt.grid_wise(torch.ones(50, h * h))
    row, column = ranking // h % 2, ranking % h % 2
    assert (row == column)[:, :h * h // 2].all()
    assert (row > column)[:, 3 * h * h // 4:].all()
    assert len(ranking[:, 0].unique()) > 3                # any of the same kind can come first

def test_block_wise_ranks_rectangles_that_lie_everywhere_each_row_by_row():
    torch.manual_seed(0)
    ranking = amt.block_wise(torch.ones(500, 196))
    assert (ranking[:, :12].diff(dim=1) > 0).all()        # no rectangle has fewer than 12 patches

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
    with pytest.raises(RuntimeError, match="ls1.gamma"):  # LayerScale, which our ViT has not
        amt.load_weights(vit, vit.state_dict() | {"blocks.0.ls1.gamma": torch.zeros(24)})

# ==== train_cifar.py: helpers =====================================================================

# Ten epochs of two steps, each of two mini-batches of 8 of the 40 images. New maps come after
# epochs 4 and 8.
SMALL = ("--dataset shapes --num-images 40 --patch-size 8 --depth 1 --decoder-embed-dim 32 "
         "--decoder-depth 1 --epochs 10 --batch-size 8 --accum-steps 2 --blr 2e-2").split()
TIMES = {"seconds", "map_seconds", "images_per_second"}
SHAPES = train_cifar.shapes

def few_shapes(args, n, seed):
    return SHAPES(args, min(n, 40), seed)

train_cifar.shapes = few_shapes                          # instead of 8000 to test on

def parse(*flags):
    return train_cifar.parse_args([*SMALL, *map(str, flags)])

def run(out_dir, *flags):
    train_cifar.main([*SMALL, "--out-dir", str(out_dir), *map(str, flags)])
    return out_dir

def column(path, name):
    """A column of a log: numbers, and None where it is empty."""
    with open(path, newline="") as file:
        values = [row[name] for row in csv.DictReader(file)]
    return [float(value) if value else None for value in values]

def contents(out_dir):
    """All files of a run but for its times, its flags and the rate, which each step sets anew."""
    found = {}
    for path in sorted(Path(out_dir).iterdir()):
        content = torch.load(path) if path.suffix == ".pth" else path.read_bytes()
        if path.suffix == ".csv":
            content = {"log": list(csv.DictReader(content.decode().splitlines()))}

        if isinstance(content, dict):
            content.pop("args", None)
            content.get("optimizer", {}).pop("param_groups", None)
            log = content.get("log", [])
            content["log"] = [{k: v for k, v in row.items() if k not in TIMES} for row in log]
        found[path.name] = content
    return found

def assert_same(a, b):
    """Compares nested dicts and lists of tensors and other things bit for bit."""
    a, form = tree_flatten(a)
    b, other_form = tree_flatten(b)
    assert form == other_form
    for x, y in zip(a, b):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

# ==== A small run =================================================================================

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from its beginning to its end, and its calls. Tests read its files, in `out`."""
    with pytest.MonkeyPatch.context() as patch:
        calls = SimpleNamespace(
            thetas=record(patch, amt, "random_crops"), crops=record(patch, amt, "crop"),
            weights=record(patch, amt, "crop_weights"), sets=record(patch, amt, "mask_and_throw"),
            maps=record(patch, amt, "dataset_maps"), forward=record(patch, amt.MAE, "forward"))
        calls.out = run(tmp_path_factory.mktemp("finished"), "--finetune-epochs", 2)
    return calls

def steps_of(calls):
    """The calls of mini-batches, without the pictures after epochs 4, 8 and 10."""
    return calls[:16] + calls[17:33] + calls[34:42]

def test_a_run_writes_its_files_and_learns(finished):
    names = {path.name for path in finished.out.iterdir()}
    assert names == {"encoder.pth", "finetuned.pth", "checkpoint.pth", "finetune-checkpoint.pth",
                     "log.csv", "finetune-log.csv", "epoch-4.png", "epoch-8.png", "epoch-10.png"}
    log = finished.out / "log.csv"
    for name, epochs in dict(position_share=[4, 8], map_seconds=[4, 8], probe_mean=[10]).items():
        values = column(log, name)
        assert [i for i in range(1, 11) if values[i - 1] is not None] == epochs

    loss = column(log, "loss")
    assert loss[3] < loss[0] - 0.03
    assert loss[9] < loss[4] - 0.01

    encoder = torch.load(finished.out / "encoder.pth")
    tuned = torch.load(finished.out / "finetuned.pth")
    saved = torch.load(finished.out / "checkpoint.pth")
    assert set(tuned) == {*encoder, "head.weight", "head.bias"}
    assert_close(tuned["cls_token"], encoder["cls_token"], rtol=0, atol=1e-3)       # went on from

    train, _ = train_cifar.load_data(parse())
    std, mean = torch.std_mean(train.squares.double() / 255, dim=(0, 2, 3))
    assert saved["data"]["mean"] == pytest.approx(mean.tolist(), abs=1e-5)
    assert saved["data"]["std"] == pytest.approx(std.tolist(), abs=1e-5)

def test_masking_is_random_until_there_are_maps_and_then_follows_them(finished):
    sets = steps_of([x for x in finished.sets if len(x.ranking) == 8])
    ratios = [(x.mask_ratio, x.throw_ratio) for x in sets]
    assert ratios == 16 * [(0.75, 0.0)] + 24 * [(0.45, 0.40)]
    weights = torch.cat([x.result for x in finished.weights])
    ranked = weights.gather(1, torch.cat([x.ranking for x in sets[16:]]))
    assert ranked[:, :8].sum() > 1.3 * ranked[:, 8:].sum()       # 16 patches

def test_one_theta_cuts_an_image_and_its_own_map(finished):
    train, _ = train_cifar.load_data(parse())
    crops = [x for x in finished.crops if x.mode == "bicubic"][:40]
    thetas = [x.result for x in finished.thetas][:40]    # the rest are of fine-tuning

    assert len(torch.cat(thetas).unique(dim=0)) == 320   # no two crops are equal
    for calls, used in [(crops, thetas), (finished.weights, thetas[16:])]:
        assert_same([call.theta for call in calls], used)

    squares = torch.cat([x.x for x in crops])
    equal = (squares[:, None] == train.squares).all(dim=(2, 3, 4))
    ids = equal.int().argmax(dim=1)
    assert equal.any(dim=1).all()
    epochs = ids.view(10, 32)                            # each shows an image at most once
    assert all(len(epoch.unique()) == 32 for epoch in epochs)
    assert len(epochs.unique(dim=0)) == 10

    used = torch.cat([x.maps for x in finished.weights])
    first, second = (call.result for call in finished.maps)
    assert torch.equal(used[:128], first[ids[128:256]])
    assert torch.equal(used[128:], second[ids[256:]])

    forward = steps_of(finished.forward)
    pixels = torch.cat([x.result for x in crops]).clamp(0, 255)          # bicubic overshoots
    images = torch.cat([x.images for x in forward])
    assert_close(images, (pixels - train.mean) / train.std)

def test_the_rate_warms_up_and_then_follows_a_cosine(finished):
    peak = 2e-2 * 16 / 256
    rates = column(finished.out / "log.csv", "lr")       # at the second step of each epoch
    assert rates[0] == pytest.approx(peak / 2)
    for i in range(1, 10):
        angle = math.pi * (i - 0.5) / 9
        assert rates[i] == pytest.approx(peak * (0.5 + 0.5 * math.cos(angle)), rel=1e-3)

def test_a_picture_shows_masked_patches_red_and_thrown_ones_gray(finished):
    with Image.open(finished.out / "epoch-10.png") as image:
        pixels = np.array(image).astype(int)
    assert pixels.shape == (404, 130 + 804, 3)           # four rows of eight images, and labels
    tiles = pixels[4:, 134:].reshape(4, 100, 8, 100, 3)[:, :96, :, :96]
    images, _, hidden, predicted = np.moveaxis(tiles, 2, 1)      # (8, 96, 96, 3)
    red = np.abs(hidden - [209, 73, 91]).max(axis=3) < 3
    gray = np.abs(hidden - [138, 143, 152]).max(axis=3) < 3
    assert (red.sum(axis=(1, 2)) == 7 * 24 ** 2).all()   # 0.45 and 0.40 of 16 patches
    assert (gray.sum(axis=(1, 2)) == 6 * 24 ** 2).all()

    visible = ~red & ~gray
    assert np.abs(images - hidden)[visible].max() < 2
    assert (predicted == hidden)[~red].all()
    assert 5 < np.abs(predicted - images)[red].mean() < 50

# ==== Strategies, methods, models =================================================================

def test_the_strategies_are_the_rankings_of_amt():
    expected = dict(attention=amt.sample_patches, uniform=amt.random_ranking,
                    random=amt.random_ranking, attmask=amt.highest_first, mst=amt.lowest_first,
                    block=amt.block_wise, grid=amt.grid_wise)
    for name, rank in expected.items():
        args = parse("--masking", name)
        own = (rank, (args.mask_ratio, args.throw_ratio))
        assert train_cifar.masking_of(args, torch.ones(1)) == own
        waits = name in ["attention", "uniform", "attmask", "mst"]
        first = (amt.random_ranking, (0.75, 0.0)) if waits else own
        assert train_cifar.masking_of(args, None) == first

def test_uniform_has_amts_schedule_but_never_looks_at_attention(tmp_path, monkeypatch):
    monkeypatch.delattr(amt, "dataset_maps")
    sets = record(monkeypatch, amt, "mask_and_throw")
    run(tmp_path, "--masking", "uniform", "--epochs", 2, "--update-interval", 1)
    ratios = [(x.mask_ratio, x.throw_ratio) for x in sets[1:]]   # with a picture after each epoch
    assert ratios == 5 * [(0.75, 0.0)] + 5 * [(0.45, 0.40)]

@pytest.mark.parametrize("method, unit, low, random, amts", [
    ("mae", 1, 0.2, (0.75, 0), (0.45, 0.40)),
    ("simmim", 2, 0.67, (0.60, 0), (0.44, 0.26)),
    ("maskfeat", 2, 0.5, (0.40, 0), (0.44, 0.26))])
def test_a_method_has_the_papers_ratios_units_and_crops(method, unit, low, random, amts, tmp_path,
                                                        monkeypatch):
    expected = dict(random=random, uniform=amts, attention=amts, mst=random)
    for masking, ratios in expected.items():
        args = parse("--method", method, "--masking", masking)
        assert (args.mask_ratio, args.throw_ratio) == ratios
    model = train_cifar.build_model(args, train_cifar.load_encoder(args))
    assert isinstance(model, amt.MAE if method == "mae" else amt.SimMIM)
    assert method == "mae" or model.target_fn is (amt.hog if method == "maskfeat" else amt.patchify)

    sets = record(monkeypatch, amt, "mask_and_throw")
    thetas = record(monkeypatch, amt, "random_crops")
    run(tmp_path, "--method", method, "--epochs", 1, "--patch-size", 4)
    for call in sets[1:]:                                # the first checks the ratios
        assert call.unit == unit and call.ranking.shape[1] == 64 // unit ** 2
    assert {x.scale for x in thetas} == {(low, 1)}

def test_raw_pixels_are_predicted_on_request_and_only_matrices_decay():
    for flags, standardized in [([], True), (["--raw-pixels"], False)]:
        args = parse(*flags)
        model = train_cifar.build_model(args, train_cifar.load_encoder(args))
        assert model.norm_pix_loss is standardized

    optimizer = train_cifar.build_optimizer(model)
    matrices = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for group in optimizer.param_groups:
        assert {0.05 * (p in matrices) for p in group["params"]} == {group["weight_decay"]}

# ==== Data ========================================================================================

PHOTO_SIZES = [(90, 60), (40, 100), (64, 64), (300, 200)]      # width, height
ASPECTS = torch.tensor([width / height for width, height in PHOTO_SIZES]).repeat(5)

def make_photos(root):
    """16 images to train on and, of class b only, 4 to test on. Red rises from left to right, green
    from top to bottom, and blue is 10 times the number of the image."""
    for i in range(20):
        width, height = PHOTO_SIZES[i % 4]
        kind = root / ("train" if i < 16 else "val") / "ab"[i >= 8]
        kind.mkdir(parents=True, exist_ok=True)
        y, x = np.mgrid[0:255:1j * height, 0:255:1j * width]
        pixels = np.stack([x, y, 0 * x + 10 * i], axis=2)
        suffix = "jpg" if i % 4 == 3 else "png"
        Image.fromarray(pixels.astype(np.uint8)).save(kind / f"{i:02}.{suffix}", quality=95)
    return root

def on_disk(root, *flags):
    return ["--dataset", "imagenet", "--data-path", root, "--model", "vit_tiny", "--img-size", 32,
            "--square-size", 48, "--accum-steps", 1, *flags]

def number_of(squares):
    blue = squares[:, 2].mean(dim=(1, 2))
    return (blue / 10).round().long()

@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
def test_photos_are_squashed_to_squares_and_keep_their_aspect(dataset, tmp_path):
    args = parse(*on_disk(make_photos(tmp_path), "--dataset", dataset))
    train, test = train_cifar.load_data(args)
    assert (train.squares is None) == (dataset == "imagenet")
    assert train.labels.tolist() == 8 * [0] + 8 * [1]
    assert test.labels.tolist() == 4 * [1]
    assert train.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])

    order = torch.randperm(16, generator=rng()).split(5)
    for wanted, (ids, squares, aspect) in zip(order, train.read(order), strict=True):
        assert torch.equal(ids, wanted) and torch.equal(number_of(squares), ids)
        assert torch.equal(aspect, ASPECTS[ids]) and squares.shape[1:] == (3, 48, 48)
        ramp = 255 * (torch.arange(48) + 0.5) / 48
        assert (squares[:, 0] - ramp).abs().max() < 9
        assert (squares[:, 1] - ramp[:, None]).abs().max() < 9

    # The central square has 0.875 of the short side. Ramps tell what a crop shows.
    (_, squares, aspect), = test.read([torch.arange(4)])
    central = test.central(squares, aspect) * test.std + test.mean
    place = (torch.arange(32) + 0.5) / 32 - 0.5
    for (width, height), (red, green, _) in zip(PHOTO_SIZES, central):
        side = 0.875 * min(width, height)
        assert_close(red[16], 255 * (0.5 + place * side / width), rtol=0, atol=8)
        assert_close(green[:, 16], 255 * (0.5 + place * side / height), rtol=0, atol=8)
    small = squares[:, :, :32, :32]                      # as crops: they are taken whole
    assert torch.equal(test.central(small, aspect), test.whole(small))

def test_a_run_on_photos_crops_by_their_aspect_and_maps_the_whole(tmp_path, monkeypatch):
    thetas = record(monkeypatch, amt, "random_crops")
    crops = record(monkeypatch, amt, "crop")
    maps = record(monkeypatch, amt, "attention_maps")
    central = record(monkeypatch, train_cifar.Images, "central")
    run(tmp_path / "out", *on_disk(make_photos(tmp_path)), "--epochs", 2, "--update-interval", 1,
        "--finetune-epochs", 1)
    assert len(thetas) == 6                              # 2 mini-batches in each epoch
    assert len(central) == 3 + 1                         # of the probe and of the test
    for theta in thetas:
        squares = [x.x for x in crops if x.theta is theta.result and x.mode == "bicubic"]
        assert torch.equal(theta.image_ratio, ASPECTS[number_of(squares[0])])

    ramp = 255 * (torch.arange(32) + 0.5) / 32
    for call in maps:                                    # of pictures, too
        red, green, _ = (call.images * 57.4 + 117).unbind(dim=1)
        assert (red - ramp).abs().max() < 15
        assert (green - ramp[:, None]).abs().max() < 15

def test_a_file_that_cannot_be_used_is_named(tmp_path):
    page = Image.effect_noise((64, 64), 50)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    Image.new("I;16", (8, 8)).save(tmp_path / "gray.png")
    (tmp_path / "text.png").write_bytes(b"text")

    images = train_cifar.Images(SimpleNamespace(square_size=48), [], [])
    for name, words in {"text.png": "", "gray.png": "8 bits", "pages.tif": "2 pages"}.items():
        with pytest.raises(train_cifar.UserError, match=f"cannot decode .*{name}.*{words}"):
            images.decode(str(tmp_path / name))

# ==== Linear probe and fine-tuning ================================================================

def test_the_probe_reads_cls_and_the_mean_of_the_patches():
    labels = torch.arange(60) % 3
    colors = 255 * F.one_hot(labels).byte()
    squares = colors[:, :, None, None].expand(-1, -1, 32, 32)
    train = train_cifar.Images(parse(), labels.tolist(), list("abc"), squares)
    labels[40] = 0                                       # is wrong: 40 of 41 are right
    test = train_cifar.Images(parse(), labels[:41].tolist(), list("abc"), squares[:41])

    class Encoder:                                       # whose [CLS] tells nothing
        embed_dim = 3

        def __call__(self, images):
            assert not torch.is_grad_enabled()
            color = images.mean(dim=(2, 3))
            return torch.stack([0 * color + 5, color + 1, color - 3], dim=1)

    x = train_cifar.features(parse(), train, Encoder())
    color = ((train.squares - train.mean) / train.std)[:, :, 0, 0]
    assert (x[:, 0] == 5).all()
    assert_close(x[:, 1], color - 1)
    found = train_cifar.linear_probe(parse(), train, test, Encoder())
    assert found["probe_mean"] == f"{100 * 40 / 41:.2f}" and float(found["probe_cls"]) < 40

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

def test_a_classifier_reads_cls_and_drops_more_paths_in_later_layers(monkeypatch):
    model = train_cifar.Classifier(tiny_vit(), 5)
    unsettle(model.head)
    encoder, images = model.encoder, random_images(4)
    assert_close(model.eval()(images), model.head(encoder(images)[:, 0]))

    dropped = record(monkeypatch, train_cifar, "stochastic_depth")
    model.train()(images)
    assert [x.p for x in dropped] == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.1])
    assert {(x.mode, x.training) for x in dropped} == {("row", True)}
    monkeypatch.setattr(train_cifar, "stochastic_depth", lambda x, *rest: 0 * x)
    rest = encoder.norm(encoder.embed(images))           # all paths are dropped
    assert_close(model(images), model.head(rest[:, 0]))

@pytest.mark.parametrize("checkpoint, decay", [("e.pth", 0.75), ("none", 1)])
def test_finetuning_follows_the_recipe(checkpoint, decay, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(train_cifar.load_encoder(parse("--depth", 2)).state_dict(), "e.pth")
    steps = record(monkeypatch, train_cifar.Step, "__init__")
    losses = record(monkeypatch, F, "cross_entropy")
    rates = record(monkeypatch, train_cifar, "schedule")
    crops = record(monkeypatch, amt, "random_crops")
    modes = record(monkeypatch, train_cifar, "outputs")
    run("out", "--epochs", 0, "--checkpoint", checkpoint, "--depth", 2, "--finetune-epochs", 20,
        "--num-images", 16)

    # A step of two mini-batches in each epoch, the first of which is warm-up.
    step, = steps
    assert {int(state["step"]) for state in step.optimizer.state.values()} == {20}
    assert len(losses) == len(crops) == 40
    for call in rates:
        assert (call.warmup, call.epochs, call.peak) == (1, 20, 1e-3 * 16 / 256)
    assert {x.scale for x in crops} == {(0.2, 1.0)}
    assert {x.label_smoothing for x in losses} == {0.1}
    assert len(modes) == 20 and not any(x.function.training for x in modes)
    mixed = torch.cat([x.target for x in losses])
    assert_close(mixed.sum(dim=1), torch.ones(320))
    assert (mixed.amax(dim=1) < 0.999).float().mean() > 0.5

    groups = step.optimizer.param_groups
    assert all(p.grad is None for p in step.model.parameters())
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert groups[0]["lr"] == pytest.approx(rates[-1].result * groups[0]["lr_scale"])
    layers = {"encoder.cls_token": 0, "encoder.patch_embed": 0, "encoder.blocks.0": 1,
              "encoder.blocks.1": 2, "encoder.norm": 3, "head": 3}
    for name, p in step.model.named_parameters():
        if p.requires_grad:
            layer, = (layer for start, layer in layers.items() if name.startswith(start))
            assert scales[p] == pytest.approx(decay ** (3 - layer))

# ==== Runs that are killed, and their files =======================================================

class Killed(BaseException):
    """What the script can catch as little as SIGKILL."""

@pytest.mark.parametrize("call, owner, name, seconds, redone", [
    (27, amt, "random_crops", 61, 16 + 8),               # in epoch 7; a save each minute
    (9, amt, "attention_maps", 0, 8 + 8),                # amid the maps after epoch 8
    (40 + 6, amt, "random_crops", 61, 4)])               # in epoch 2 of fine-tuning
def test_a_killed_run_ends_as_an_unbroken_one_once_resumed(
        call, owner, name, seconds, redone, finished, tmp_path, monkeypatch):
    function, calls = getattr(owner, name), iter(range(1, 10 ** 6))

    def dying(*args, **kwargs):                          # at that call, the first being 1
        if next(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dying)
        if seconds:                                      # that seem to pass between two looks
            clock = iter(range(0, 10 ** 6, seconds))
            patch.setattr(train_cifar, "time", SimpleNamespace(time=clock.__next__))
        run(tmp_path, "--finetune-epochs", 2)
    crops = record(monkeypatch, amt, "random_crops")
    train_cifar.main(["--resume", "--out-dir", str(tmp_path)])
    assert len(crops) == redone                          # mini-batches
    assert_same(contents(tmp_path), contents(finished.out))

def test_a_resumed_run_keeps_its_flags_and_names_what_changes(finished, capsys):
    def resumed(*flags):
        return train_cifar.parse_args(["--resume", "--out-dir", str(finished.out), *flags])

    saved = torch.load(finished.out / "checkpoint.pth")["args"]
    assert vars(resumed("--blr", "1", "--no-compile")) == saved | dict(blr=1.0, resume=True)
    assert "changed: blr 0.02 -> 1.0\n" in capsys.readouterr().out
    args = resumed("--masking", "random")
    assert (args.mask_ratio, args.throw_ratio) == (0.75, 0)      # and not AMT's
    with pytest.raises(train_cifar.UserError, match="checkpoint.pth is of 10 epochs"):
        resumed("--epochs", "12")                        # it has been fine-tuned

def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    args = SimpleNamespace(out_dir=tmp_path)
    train_cifar.write(args, "a.pth", {"a": 1})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(train_cifar.UserError, match="cannot write .*a.pth: No space left"):
        train_cifar.write(args, "a.pth", {"a": 2})
    assert torch.load(tmp_path / "a.pth") == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1

# ==== Several processes ===========================================================================

def run_in_two_processes(out_dir, *flags):
    """Runs the script twice at once, as torchrun does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def process(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        importlib.reload(train_cifar)                    # which reads them
        train_cifar.shapes = few_shapes
        run(out_dir, *flags)

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for each in started:
        each.start()
    for each in started:
        each.join(120)
        each.kill()
    assert [each.exitcode for each in started] == [0, 0]

def test_two_processes_do_what_one_does(finished, tmp_path):
    run_in_two_processes(tmp_path, "--accum-steps", 1, "--finetune-epochs", 2)
    one, two = contents(finished.out), contents(tmp_path)
    for name in ["log.csv", "finetune-log.csv"]:
        losses = [column(out_dir / name, "loss") for out_dir in (finished.out, tmp_path)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name in ["checkpoint.pth", "finetune-checkpoint.pth"]:
        for key, p in one[name]["model"].items():
            if not key.endswith("qkv.bias"):             # the gradient of a key's bias is noise
                assert_close(two[name]["model"][key], p, rtol=0, atol=2e-4)
    maps = [found["checkpoint.pth"]["maps"] for found in (one, two)]
    assert_close(*maps, rtol=0, atol=0.02)

# ==== CUDA graphs, emulated on a CPU ==============================================================

@pytest.fixture
def run_graphs(monkeypatch):
    """A function that runs the script with or without emulated graphs: 10 steps of random masking,
    10 with maps and 5 of fine-tuning. The first 3 of each are not recorded."""
    for name, value in {"CUDAGraph": fake_graph.CUDAGraph, "graph": fake_graph.graph,
                        "Stream": object, "set_stream": id, "current_stream": object}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    set_lr, set_defaults = train_cifar.Step.set_lr, train_cifar.set_defaults

    def set_rounded_lr(self, lr):
        set_lr(self, lr)
        for group in self.optimizer.param_groups:        # a graph has the rate in float32
            rate = group["lr"]
            group["lr"] = torch.tensor(rate).item() if isinstance(rate, float) else rate

    def run_with(cuda_graph, out_dir, set_lr=set_rounded_lr):
        def set_flag(args):                              # which set_defaults would refuse
            args.cuda_graph = False
            set_defaults(args)
            args.cuda_graph = cuda_graph

        monkeypatch.setattr(train_cifar, "set_defaults", set_flag)
        monkeypatch.setattr(train_cifar.Step, "set_lr", set_lr)
        run(out_dir, "--accum-steps", 1, "--epochs", 4, "--update-interval", 2,
            "--finetune-epochs", 1)
        return contents(out_dir)

    return run_with

def test_a_run_of_graphs_equals_an_eager_one(run_graphs, tmp_path, monkeypatch):
    expected = run_graphs(False, tmp_path / "eager")
    replays = record(monkeypatch, fake_graph.CUDAGraph, "replay")
    assert_same(run_graphs(True, tmp_path / "graphs"), expected)
    assert len(replays) == 7 + 7 + 2

    # The emulation notices a rate that is recorded as a number, and a value that is read.
    def set_number(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    found = run_graphs(True, tmp_path / "number", set_lr=set_number)
    assert found["log.csv"] != expected["log.csv"]

    masked_loss = train_cifar.masked_loss
    monkeypatch.setattr(train_cifar, "masked_loss", lambda *given: (
        masked_loss(*given).clamp(max=masked_loss(*given).item())))
    with pytest.raises(RuntimeError, match="while a graph is recorded"):
        run_graphs(True, tmp_path / "read")

# ==== Errors ======================================================================================

def error(capsys, *flags):
    """The one line that the script ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run("out", *flags)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("error: ") and len(said) < 400
    assert said.count("\n") == 1 and said.endswith("\n")
    return said

@pytest.mark.parametrize("flags, words", [
    (["--epoch", 1], "unrecognized arguments: --epoch 1"),           # no abbreviations
    (["--img-size", 36], "--img-size must be a multiple of 8, got 36"),
    (["--mask-ratio", 0.75], "mask_ratio 0.75 and throw_ratio 0.4 give .* -2 visible"),
    (["--batch-size", 32], "a step takes 64 images .* there are 40"),
    (["--dataset", "folder", "--data-path", "no"], "--data-path must have train/<class>/"),
    (["--out-dir", "old"], "old has a checkpoint: continue it with --resume"),
    (["--out-dir", "old", "--resume"], "old/checkpoint.pth is damaged")])
def test_a_mistake_is_one_line_of_what_must_hold(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old/checkpoint.pth").write_text("not a checkpoint")
    assert re.search(words, error(capsys, *flags))

def test_nothing_is_saved_that_is_not_finite(tmp_path, monkeypatch, capsys):
    factors = iter(25 * [1] + [math.nan] + 99 * [1])
    masked_loss = train_cifar.masked_loss
    monkeypatch.setattr(train_cifar, "masked_loss",
                        lambda *given: masked_loss(*given) * next(factors))
    monkeypatch.chdir(tmp_path)
    assert "not finite after epoch 7, so it is not saved: start anew with" in error(capsys)
    assert len(column("out/log.csv", "loss")) == 6 and max(column("out/log.csv", "loss")) < 2
    for weights in (torch.load("out/encoder.pth"), torch.load("out/checkpoint.pth")["model"]):
        assert all(p.isfinite().all() for p in weights.values())
