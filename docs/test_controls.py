"""Tests of docs/controls.py: python -m pytest docs/test_controls.py"""
import pytest
import torch

import controls
from controls import train_cifar

@pytest.fixture
def tiny():
    args = train_cifar.parse_args(["--dataset", "shapes", "--depth", "1"])
    return args, train_cifar.shapes(args, 40, 1), train_cifar.load_encoder(args)

def test_shuffled_maps_are_those_of_other_images_and_a_floor_raises_all(tiny):
    own, _ = train_cifar.new_maps(*tiny)
    shuffled, _ = controls.shuffled(*tiny)
    source = torch.cdist(shuffled.float().flatten(1), own.float().flatten(1)).argmin(dim=1)
    assert source.sort().values.equal(torch.arange(40))
    assert not (source == torch.arange(40)).any()
    assert shuffled.equal(own[source]) and shuffled.equal(controls.shuffled(*tiny)[0])
    assert (controls.floor(*tiny)[0] - 0.25 - 0.75 * own).abs().max() < 1e-3

def test_objects_are_in_the_middle(tiny):
    maps, _ = controls.true_object(*tiny)
    assert maps.shape == (40, 8, 8) and maps.min() == 0.25 and maps.max() == 1
    assert (maps[:, ::7, ::7] < 0.5).all() and maps[:, 3:5, 3:5].mean() > 0.9

def test_top_left_stretches_and_flips_four_cells():
    maps = torch.arange(64.0).view(1, 8, 8)              # 0 and 1 above 8 and 9
    theta = torch.tensor([[[0.5, 0, 0.5], [0, 0.5, 0.5]]])
    weights = controls.top_left(maps, theta, 4, 1).view(4, 4)
    axis = torch.tensor([0, 0.25, 0.75, 1])
    assert weights.equal(8 * axis[:, None] + axis)
    assert controls.top_left(maps, -theta, 4, 1).view(4, 4).equal(weights.flip(1))

def test_other_attention(tiny):
    heads = torch.tensor([[[0, 1, 2, 4], [8, 0, 0, 0.0]]])
    maps = controls.per_head(lambda images: heads, None)
    assert maps.equal(torch.tensor([[[0.5, 0.125], [0.25, 0.5]]]))
    a = controls.patch_mean(tiny[2].blocks[0].attn, torch.randn(2, 65, 192))
    assert a.shape == (2, 3, 64) and (a.sum(dim=2) < 1).all() and (a.sum(dim=2) > 0.9).all()
