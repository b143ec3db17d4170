"""Runs train_cifar.py with one part of AMT's ranking replaced, to see what it contributes.

    python docs/controls.py shuffled --dataset shapes --out-dir out-shuffled
    python docs/controls.py shuffled --resume --out-dir out-shuffled    # type the name again

Below, each function's docstring has the question that it answers, by comparison with a run of
train_cifar.py with the same flags and seed. Its masking must use maps. Pictures are drawn as
usual, but for per-head, top-left and patch-mean, which also change where [CLS] seems to look.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import amt
import train_cifar

own_maps = train_cifar.new_maps

def shuffled(args, train, encoder) -> tuple[Tensor, str]:
    """Does it matter what the image shows? Every image gets another one's map, so the maps keep
    their skew and their favorite positions, but say nothing about the image."""
    maps, share = own_maps(args, train, encoder)         # all-reduced: the same in all processes
    g = torch.Generator().manual_seed(train_cifar.seed_of(args.seed, "shuffled", share))
    order = torch.randperm(len(maps), generator=g).to(maps.device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)                         # the next in a random order
    return maps[other], share

def floor(args, train, encoder) -> tuple[Tensor, str]:
    """Does it harm that hardly attended patches always stay visible and others hardly ever do?
    Above a floor, no patch has more than four times the weight of another."""
    maps, share = own_maps(args, train, encoder)
    return 0.25 + 0.75 * maps, share

def true_object(args, train, encoder) -> tuple[Tensor, str]:
    """Would better maps help? Patches are ranked by how much of them the object covers, which is
    known for --dataset shapes, above the same floor."""
    if args.dataset != "shapes":
        raise train_cifar.UserError(f"object needs --dataset shapes, got {args.dataset}")
    return (0.25 + 0.75 * object_fraction(args, train)).half(), ""

def object_fraction(args, images) -> Tensor:
    """The fraction (n, h, w) of each patch of shapes that the object covers. The background is
    interpolated between an image's corners, so the object is where the image differs from it."""
    pixels = images.squares.float()
    corners = pixels[:, :, ::31, ::31]
    background = F.interpolate(corners, 32, mode="bilinear", align_corners=True)
    inside = ((pixels - background).abs() > 2).any(dim=1)            # 2, as pixels are rounded
    return F.adaptive_avg_pool2d(inside.float(), args.img_size // args.patch_size)

@torch.no_grad()
def per_head(encoder, images: Tensor) -> Tensor:
    """Does it matter that the authors' code min-max normalizes each head before the mean, not the
    mean (Eq. 4)?"""
    a = getattr(encoder, "cls_attention", encoder)(images).float()         # (B, heads, N)
    low, high = a.aminmax(dim=2, keepdim=True)
    a = (a - low) / (high - low).clamp_min(1e-30)

    h = amt.square_side(a.shape[2])
    return a.mean(dim=1).unflatten(1, (h, h))

def patch_mean(self, x: Tensor) -> Tensor:
    """Does the patches' attention rank better than that of [CLS], on which MAE has no loss? Each
    patch gets the mean of what all patches pay to it, (B, heads, N), in the last block."""
    q, k, _ = self.heads(x)
    a = q[:, :, 1:] @ k.mT / math.sqrt(q.shape[3])       # (B, heads, N, 1+N)
    a = a.softmax(dim=3, dtype=torch.float32)
    return a[:, :, :, 1:].mean(dim=2)

def top_left(maps: Tensor, theta: Tensor, img_size, patch_size: int) -> Tensor:
    """Does what the authors' code ranks by gain? Nearly every crop gets the 2 x 2 cells at its
    map's top left, stretched over the crop and flipped with it. The maps are per-head's."""
    x = maps[:, None, :2, :2].float()
    x = F.interpolate(x, size=img_size, mode="bilinear", align_corners=False)

    flipped = theta[:, 0, 0].to(x.device) < 0
    x = torch.where(flipped[:, None, None, None], x.flip(3), x)
    return amt.patchify(x, patch_size).sum(dim=2)        # (B, N)

def gradient(maps: Tensor, theta: Tensor, img_size, patch_size: int) -> Tensor:
    """Does top-left gain by attention, or by hiding one side of a crop? Its cells are random."""
    cells = torch.rand_like(maps[:, :2, :2], dtype=torch.float32)
    return top_left(cells, theta, img_size, patch_size)

CONTROLS = {  # what is replaced, and by what
    "shuffled": [(train_cifar, "new_maps", shuffled)],
    "floor": [(train_cifar, "new_maps", floor)],
    "object": [(train_cifar, "new_maps", true_object)],
    "per-head": [(amt, "attention_maps", per_head)],
    "patch-mean": [(amt.Attention, "from_cls", patch_mean)],
    "top-left": [(amt, "attention_maps", per_head), (amt, "crop_weights", top_left)],
    "gradient": [(amt, "crop_weights", gradient)],
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CONTROLS:
        sys.exit(f"usage: python docs/controls.py NAME [flags]\nNAME: {', '.join(CONTROLS)}")
    for module, name, replacement in CONTROLS[sys.argv[1]]:
        setattr(module, name, replacement)
    train_cifar.main(sys.argv[2:])
