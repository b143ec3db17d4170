"""AMT: attention-driven masking and throwing for masked image modeling.

    Liu, Gui and Luo. Good Helper Is around You: Attention-Driven Masked Image Modeling.
    AAAI 2023. https://arxiv.org/abs/2211.15362v2 (later versions are another paper)

Masked image modeling hides patches of an image and trains a vision transformer to
predict them. Random masking ignores what the image shows; AMT lets the model's own
attention decide which patches to hide. Every tenth of training, it runs the encoder
over all the (uncropped) training images and stores how strongly [CLS] attends to
each patch. At every step it then ranks the patches of each crop at random: the more
a patch is attended, the earlier it tends to come. The ranking is split in three:

    masked:   the top of the ranking, hidden from the encoder and predicted by the model
    thrown:   the middle, left out altogether: neither fed to the model nor predicted
    visible:  the rest, which is all of the image that the encoder gets to see

Two draws for nine patches, numbered 0 to 8 row by row. The first three of a ranking
are masked (m), the next three thrown (t), and the last three stay visible (.):

    weights       draw one                  draw two
                  4 3 5 | 7 0 1 | 2 8 6     5 0 3 | 4 1 2 | 7 8 6
    .1  .2  .1    t  t  .                   m  t  t
    .3  1.  .4    m  m  m                   m  t  m
    0   .2  .1    .  t  .                   .  .  .

Why mask the most attended patches? They should lie on the object, which makes them
worth predicting. Why draw, and not take the top k? That would hide the same patches
until the maps change and hardly ever show the object, while a draw leaves parts of
it visible and forgives a rough map. In draw two, as in one of seven, even the most
attended patch is thrown, not masked; only a patch of weight 0 has to come last.

Why throw? Every patch left out saves compute: of N = 196 patches AMT masks 88,
throws 78 and leaves 30 visible, so MAE's encoder sees 30 instead of 49, and its
decoder 118 instead of 196. Why the middle? The paper calls it superfluous; as we
read it, runners-up that stay visible would give much of the object away, while the
bottom is harmless context. To throw the bottom instead costs the paper 0.7 points
(Table 4, linear probe on Tiny ImageNet).

Why [CLS]? It stands for no patch: what it knows of the image it collects by
attention, in self-supervised ViTs often from the object (DINO; Caron et al., 2021).
But MAE has no loss on [CLS], so its maps are rough. At first they mean nothing,
which is why masking is random then and nothing is thrown; later they may favor
corners or miss parts of the object. So plot some of yours.

What to expect: with a ViT-B/16 pretrained on ImageNet, AMT's linear probes are 2.9
to 5.9 points above MAE's random masking on five datasets, and SimMIM takes 0.76 or
0.62 of the cost of pretraining without AMT, depending on the ratios (the paper's
Tables 1 and 2).

When not to expect it to help: in small runs, as far as we measured. On CIFAR-10,
after 60 epochs and 10 of fine-tuning, MAE's random masking was ahead of AMT by 3.5
to 5.5 points in three of three runs, and throwing at random, with AMT's ratios, by
1.8 to 3.1; after 16 epochs MAE was ahead by 0.1 and 0.8 (settings in the README).

The whole method, without schedules or data loading, for standardized `images` of
shape (n, 3, 224, 224):

    vit = amt.vit_base()
    mae = amt.MAE(vit)
    optimizer = torch.optim.AdamW(mae.parameters(), lr=1.5e-4, weight_decay=0.05)
    maps = images.new_ones(len(images), 1, 1)  # equal weights at first: plain MAE
    ratios = (0.75, 0.0)

    for epoch in range(400):
        if epoch > 0 and epoch % 40 == 0:  # every tenth of training
            batches = ((ids, images[ids]) for ids in torch.arange(len(images)).split(64))
            maps = amt.dataset_maps(vit, batches, len(images))
            ratios = (0.45, 0.40)

        for ids in torch.randperm(len(images)).split(64):
            theta = amt.random_crops(len(ids))
            crops = amt.crop(images[ids], theta, vit.img_size, "bicubic")
            weights = amt.crop_weights(maps[ids], theta, vit.img_size, vit.patch_size)
            ranking = amt.sample_patches(weights)
            masked, thrown, visible = amt.mask_and_throw(ranking, *ratios)

            loss, pred = mae(crops, visible=visible, masked=masked)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

Sections 2 to 5 follow this loop, so read them first; section 6 is a plain ViT. The
models of section 7 get only the indices of visible and masked patches, so they take
any ranking, such as those of section 8. Names here and in the paper:

    maps             a_w         attention of [CLS] to the parts of images (n, h, w)
    theta            -           where crops lie in their images (B, 2, 3)
    weights          P_A         attention that each patch of a crop gets (B, N)
    ranking          M           patches in the order of masking (B, N)
    the two ratios   r, t        fractions of the patches that are masked and thrown
    B, n             -           images in a mini-batch, in the dataset
    p, N = h * w     P, N        side of a patch in pixels, patches in h rows of w
    K, L             -           patches in a subset, values per patch
    T, D, d          -, D, D_h   tokens, width of a token, width of a head

Where the paper and the authors' code differ, and what we do (more in the README):

  - Crop of the map: their code computes a pixel's map cell from the side of the image
    instead of a patch, so nearly every crop reads the 2 x 2 cells at the map's top left
    (guijiejie/Attention-driven-Masking-and-Throwing, #6). We crop both alike.
  - Heads: their code normalizes each head before the mean; the paper and we
    normalize the mean (Eq. 4).
  - MAE's target: the paper does not name it. Their command predicts raw pixels, as
    we do by default; `norm_pix_loss=True` standardizes them, as He et al. prefer.
  - Thrown patches: their code makes tokens for all hidden patches and deletes those
    of the thrown ones, which we never make. The loss is the same.
"""
import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ==== 1. Patches ==================================================================
def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images (B, C, H, W) into patches (B, N, p*p*C). Patches run row by row, and
    the values within a patch in (row, column, channel) order, as in MAE."""
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"patch size {p} must divide both sides of {H}x{W} images")

    x = images.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
    return x.flatten(3).flatten(1, 2)

def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Puts patches (B, N, p*p*C) of square images together again, as (B, C, H, H)."""
    B, N, _ = patches.shape
    p = patch_size
    h = square_side(N)
    x = patches.reshape(B, h, h, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, h, p)
    return x.reshape(B, -1, h * p, h * p)

def square_side(N: int) -> int:
    """The side of a square grid of N patches."""
    h = math.isqrt(N)
    if h * h != N:
        raise ValueError(f"{N} patches form no square grid (are extra tokens among them?)")
    return h

def select(x: Tensor, ids: Tensor) -> Tensor:
    """Picks rows `ids` (B, K) of x (B, N, L), giving (B, K, L)."""
    return torch.take_along_dim(x, ids[:, :, None], dim=1)

# ==== 2. Attention maps ===========================================================
# A *map* covers a whole image; *weights* say what each patch of a crop is worth.

@torch.no_grad()
def attention_maps(encoder, images: Tensor) -> Tensor:
    """Attention maps a_w (B, h, h) of whole, square images (B, C, H, H), each scaled to
    [0, 1] (Eq. 4). Squash photos rather than cut them, since a map must cover all that
    a crop can show. `encoder` has a method `cls_attention(images) -> (B, heads, N)`, as
    `ViT` in section 6, or is such a function. Its mode is left alone, so if it has
    dropout or drop path, call eval() before and train() after, or the maps are noisy."""
    H, W = images.shape[2:]
    if H != W:
        raise ValueError(f"images must be squashed to squares, got {H}x{W}")

    cls_attention = getattr(encoder, "cls_attention", encoder)
    a = cls_attention(images).float()  # Eq. 3, in Attention.from_cls: (B, heads, N)
    if not ((a >= 0) & (a < math.inf)).all():
        raise ValueError(f"attention must be finite and nonnegative, got {a.min()} to {a.max()}")

    # If all patches are attended equally, the map is zero and the ranking uniform.
    a_w = a.mean(dim=1)                # Eq. 4: (B, N)
    low, high = a_w.aminmax(dim=1, keepdim=True)
    a_w = (a_w - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    h = square_side(a_w.shape[1])
    return a_w.unflatten(1, (h, h))

def dataset_maps(encoder, batches, n: int) -> Tensor:
    """Attention maps (n, h, h) of a whole dataset, in float16 to save memory. `batches`
    yields (ids, images): indices (B,) into the dataset, and the images as
    `attention_maps` wants them. Images that never come keep a map of zeros, so several
    processes can each take a share of the dataset and sum (all-reduce) their maps."""
    maps = None
    for ids, images in batches:
        a_w = attention_maps(encoder, images).half()
        if maps is None:
            maps = a_w.new_zeros(n, *a_w.shape[1:])
        maps[ids] = a_w
    return maps

# ==== 3. Crops of images and maps =================================================
def random_crops(B: int, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), generator=None,
                 image_ratio=1.0) -> Tensor:
    """Random resized crops of B images, half of them flipped, as affine transforms theta
    (B, 2, 3) from the crop's coordinates to the image's, both from -1 to 1 as in
    `F.affine_grid`. To switch flips off, call `theta[:, 0, 0].abs_()`.

    The distribution is that of torchvision's RandomResizedCrop, but a side longer than
    the image's is cut to fit, not drawn again. `ratio` bounds a crop's width / height as
    measured in the original photo. If photos are not square, give their width / height
    as `image_ratio`, a number or (B,), even if they have since been squashed."""
    device = generator.device if generator else None
    u = torch.rand(5, B, generator=generator, device=device)

    # Areas, widths and heights are fractions of the image's.
    area = scale[0] + (scale[1] - scale[0]) * u[0]
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[1] / image_ratio
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)

    theta = torch.zeros(B, 2, 3, device=device)
    theta[:, 0, 0] = torch.where(u[4] < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * u[2] - 1)   # never beyond the image's sides
    theta[:, 1, 2] = (1 - height) * (2 * u[3] - 1)
    return theta

def theta_of(top, left, height, width, flipped, H: int, W: int) -> Tensor:
    """The theta (2, 3) of a crop made elsewhere: a box of an H x W image, as from
    torchvision's RandomResizedCrop.get_params, and whether it was flipped afterwards."""
    mirror = -1 if flipped else 1
    return torch.tensor([[mirror * width / W, 0, (2 * left + width) / W - 1],
                         [0, height / H, (2 * top + height) / H - 1]])

def crop(x: Tensor, theta: Tensor, size, mode: str) -> Tensor:
    """Takes the crops theta (B, 2, 3) of x (B, C, H, W), resized to `size`, a side or a
    pair. theta is relative to the sides, so it crops an image and its map alike. Nothing
    is antialiased: shrink far larger images first. `mode` is that of `F.grid_sample`."""
    if not x.is_floating_point():  # bicubic values beyond 0 and 255 would wrap around
        raise ValueError(f"x must be floating point, got {x.dtype}")

    height, width = (size, size) if isinstance(size, int) else size
    theta = theta.to(x.device, torch.float32)
    with torch.autocast(x.device.type, enabled=False):  # half precision shifts the crop
        shape = (*x.shape[:2], height, width)
        grid = F.affine_grid(theta, shape, align_corners=False)
        x_crop = F.grid_sample(x.float(), grid, mode, "border", align_corners=False)
    return x_crop.to(x.dtype)

def crop_weights(maps: Tensor, theta: Tensor, img_size, patch_size: int) -> Tensor:
    """How much attention P_A (B, N) each patch of a crop gets. The maps (B, h, w) of the
    whole images are interpolated to pixels, cropped with the theta that cropped the
    images, and summed over each patch. To rank units of several patches (section 5),
    give the side of a unit as patch_size."""
    x = maps.float()[:, None]
    x = F.interpolate(x, size=img_size, mode="bilinear", align_corners=False)
    x = crop(x, theta, img_size, "bilinear")   # (B, 1, H, W)
    return patchify(x, patch_size).sum(dim=2)  # P_A: (B, N)

# ==== 4. Ranking ==================================================================
def sample_patches(weights: Tensor, generator=None) -> Tensor:
    """Draws a random ranking M (B, N) of patches with weights (B, N) (Eq. 5). Patches
    are drawn one by one, without replacement: whichever are left, each is next with
    probability proportional to its weight, so only the ratios of an image's weights
    matter. Patches of weight 0 come last, at random; nan and negative weights count
    as 0, and inf comes first."""
    # Give each patch an alarm clock that rings at time E / weight, with E drawn from
    # Exp(1). A patch rings first with probability weight / sum(weights), and since
    # exponentials have no memory, the same holds among the patches still waiting. So
    # sorting by ringing time samples without replacement (Efraimidis and Spirakis, 2006).
    #
    # We compare logs, as E / weight could overflow. log 0 becomes -200, which is low
    # enough to ring last: the smallest positive float32 has log -103, and log E lies
    # between about -40 and 5.
    log_weights = weights.float().log().nan_to_num(nan=-200, neginf=-200, posinf=200)
    E = torch.empty_like(log_weights).exponential_(generator=generator)
    return (E.log() - log_weights).argsort(dim=1)  # Eq. 5

# ==== 5. Masking and throwing =====================================================
def mask_and_throw(ranking: Tensor, mask_ratio: float, throw_ratio=0.0, unit=1):
    """Splits a ranking M (B, N) into the indices (masked, thrown, visible) (Eq. 6,
    Algorithm 1): the first round(N * mask_ratio) patches, the next N * throw_ratio, the
    rest, each in the order of the ranking. Indices count patches only, not [CLS].
    SimMIM hides units of 2 x 2 patches: with unit=2, what is ranked are the N / 4 units
    of a square grid, and the indices are still those of patches. In the paper:

        MAE, unit 1:     random (0.75, 0)    AMT (0.45, 0.40)
        SimMIM, unit 2:  random (0.60, 0)    AMT (0.44, 0.26), or faster (0.33, 0.50)
    """
    n_units = ranking.shape[1]
    n_masked = round(n_units * mask_ratio)
    n_thrown = round(n_units * throw_ratio)
    n_visible = n_units - n_masked - n_thrown
    if n_masked < 1 or n_thrown < 0 or n_visible < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} and throw_ratio {throw_ratio} give {n_masked} masked, "
            f"{n_thrown} thrown and {n_visible} visible of {n_units}: masked and visible must "
            "be at least 1, thrown at least 0")

    parts = ranking.split([n_masked, n_thrown, n_visible], dim=1)  # Eq. 6
    if unit == 1:
        return parts

    h = square_side(n_units) * unit
    patches = torch.arange(h * h, device=ranking.device).view(1, 1, h, h)
    patches_of_unit = patchify(patches, unit)[0]  # (n_units, unit * unit)
    return tuple(patches_of_unit[ids].flatten(1) for ids in parts)

# ==== 6. Vision transformer =======================================================
# Parameters are named as in timm, so weights load in both directions.

def sincos_pos_embed(embed_dim: int, grid_size: int) -> Tensor:
    """MAE's fixed 2-D sine-cosine position embedding (1, 1+N, D) of a square grid, with
    zeros for [CLS] in row 0. The first half of the channels encodes a patch's column,
    the second its row, each with D/4 sines, then D/4 cosines."""
    frequency = torch.arange(embed_dim // 4, dtype=torch.float64)
    place = torch.arange(grid_size, dtype=torch.float64)
    angle = place[:, None] * 10000.0 ** -(frequency / (embed_dim // 4))
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)    # (h, D/2)
    column = axis[None, :, :].expand(grid_size, -1, -1)    # (h, h, D/2)
    row = axis[:, None, :].expand(-1, grid_size, -1)       # (h, h, D/2)
    table = torch.cat([column, row], dim=2).flatten(0, 1)  # (N, D)
    return F.pad(table, (0, 0, 1, 0)).float()[None]        # (1, 1+N, D)

class PatchEmbed(nn.Module):
    """Projects patches (B, K, p*p*C) to tokens (B, K, D). The weight is stored as timm's
    strided convolution but applied to patches, so that only visible ones are embedded."""

    def __init__(self, patch_size: int, embed_dim: int, in_chans=3):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, patches):
        # Flatten the kernel in patchify's order: (row, column, channel).
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
        return F.linear(patches, weight, self.proj.bias)

class Attention(nn.Module):
    """Multi-head self-attention on tokens (B, T, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)            # each of q, k, v: (B, heads, T, d)

    def forward(self, x):
        q, k, v = self.heads(x)
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v
        return self.proj(x.transpose(1, 2).flatten(2))

    def from_cls(self, x):
        """Attention (B, heads, N) of [CLS] to each patch (Eq. 3), given tokens (B, 1+N, D)
        with [CLS] first. The softmax includes [CLS] itself, the result does not."""
        q, k, _ = self.heads(x)
        a = q[:, :, :1] @ k.mT / math.sqrt(q.shape[3])  # (B, heads, 1, 1+N)
        a = a.softmax(dim=3, dtype=torch.float32)       # Eq. 3, in float32 under autocast
        return a[:, :, 0, 1:]

class Block(nn.Module):
    """Pre-norm transformer block on tokens (B, T, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

def init_weights(module: nn.Module):
    """MAE's initialization, except that the patch projection's bias also starts at zero."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.flatten(1))  # a view, so this fills m.weight
            nn.init.zeros_(m.bias)

class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021) for square images, in the form MAE
    uses: positions are fixed. timm's VisionTransformer(num_classes=0) gives the same
    tokens after `timm_vit.load_state_dict(vit.state_dict())`."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12,
                 num_heads=12, in_chans=3):
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size
        self.embed_dim = embed_dim
        self.in_chans = in_chans

        self.patch_embed = PatchEmbed(patch_size, embed_dim, in_chans)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        pos_embed = sincos_pos_embed(embed_dim, self.grid_size)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self)

    def forward(self, images, visible=None):
        """Encodes images (B, C, H, H) as tokens (B, 1+K, D), [CLS] first, after the final
        norm. Only the patches `visible` (B, K) are embedded; None means all N."""
        return self.run_blocks(self.embed(images, visible))

    def embed(self, images, visible=None):
        """The input of the first block: [CLS] and the patches, positions added (Eq. 1)."""
        C, H = self.in_chans, self.img_size
        if images.shape[1:] != (C, H, H):
            raise ValueError(f"expected images (B, {C}, {H}, {H}), got {tuple(images.shape)}")

        patches = patchify(images, self.patch_size)  # (B, N, p*p*C)
        pos = self.pos_embed[0, 1:]                  # (N, D)
        if visible is not None:
            patches = select(patches, visible)       # (B, K, p*p*C)
            pos = pos[visible]                       # (B, K, D)

        x = self.patch_embed(patches) + pos
        cls = self.cls_token + self.pos_embed[:, :1]
        cls = cls.expand(images.shape[0], -1, -1)    # len(images) would be a constant in exports
        return torch.cat([cls, x], dim=1)            # (B, 1+K, D)

    def run_blocks(self, x):
        """Runs tokens (B, T, D) through all blocks and the final norm."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def cls_attention(self, images):
        """Attention (B, heads, N) of [CLS] to each patch in the last block."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.from_cls(last.norm1(x))

# Standard sizes. Further arguments go to ViT, e.g. vit_tiny(img_size=32, patch_size=4).
vit_tiny = partial(ViT, embed_dim=192, depth=12, num_heads=3)
vit_small = partial(ViT, embed_dim=384, depth=12, num_heads=6)
vit_base = partial(ViT, embed_dim=768, depth=12, num_heads=12)
vit_large = partial(ViT, embed_dim=1024, depth=24, num_heads=16)
vit_huge = partial(ViT, patch_size=14, embed_dim=1280, depth=32, num_heads=16)

def load_weights(vit: ViT, saved: dict):
    """Loads a checkpoint of timm, MAE, DINO, MoCo or this project, as torch.load gives it:
    the ViT under any prefix, without decoder and head, its positions resized."""
    if not isinstance(saved, dict):
        raise ValueError(f"saved must be a dict, as from torch.load, got {type(saved)}")
    for key in ("model", "state_dict", "teacher"):  # where MAE, MoCo and DINO keep weights
        if isinstance(saved.get(key), dict):
            saved = saved[key]

    # "encoder.pos_embed" tells the prefix "encoder."; "momentum" is MoCo's second encoder.
    found = [name for name in saved if name.endswith("pos_embed")
             and "decoder" not in name and "momentum" not in name]
    if len(found) != 1:
        raise ValueError(f"expected one ViT with timm's names, got {', '.join(saved)[:100]}")
    prefix = found[0].removesuffix("pos_embed")
    skip = tuple(prefix + name for name in ("decoder", "mask_token", "head."))
    state = {name.removeprefix(prefix): value for name, value in saved.items()
             if name.startswith(prefix) and not name.startswith(skip)}
    D, _, p, _ = state["patch_embed.proj.weight"].shape
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    if (depth, D, p) != (len(vit.blocks), vit.embed_dim, vit.patch_size):
        raise ValueError(
            f"these weights have depth {depth}, embed_dim {D} and patch_size {p}, but the "
            f"ViT has {len(vit.blocks)}, {vit.embed_dim} and {vit.patch_size}")

    cls, pos = state["pos_embed"].tensor_split([1], dim=1)
    h = square_side(pos.shape[1])
    if h != vit.grid_size:
        pos = pos.float().mT.unflatten(2, (h, h))  # (1, D, h, h)
        pos = F.interpolate(pos, size=vit.grid_size, mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([cls, pos.flatten(2).mT], dim=1)
    vit.load_state_dict(state)

# ==== 7. Models: MAE, SimMIM, MaskFeat ============================================
# `visible` and `masked` are keyword-only so that nobody swaps them by accident.

class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022). The encoder sees only the visible patches, the
    decoder its output and a mask token for each masked patch. `encoder` can be a ViT or
    anything with `embed_dim`, `patch_size`, `grid_size` and `in_chans` that maps (images,
    visible) to tokens (B, 1+K, D)."""

    def __init__(self, encoder: nn.Module, decoder_embed_dim=512, decoder_depth=8,
                 decoder_num_heads=16, norm_pix_loss=False):
        super().__init__()
        D = decoder_embed_dim
        self.decoder_embed = nn.Linear(encoder.embed_dim, D)
        self.mask_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        pos_embed = sincos_pos_embed(D, encoder.grid_size)
        self.decoder_pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(D, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_pred = nn.Linear(D, encoder.in_chans * encoder.patch_size ** 2)
        init_weights(self)
        self.encoder = encoder  # assigned last so that init_weights leaves it alone
        self.norm_pix_loss = norm_pix_loss

    def targets(self, images, masked):
        """The pixels (B, K, p*p*C) of the masked patches, raw or standardized."""
        x = select(patchify(images, self.encoder.patch_size), masked)
        if self.norm_pix_loss:
            mean = x.mean(dim=2, keepdim=True)
            x = (x - mean) / (x.var(dim=2, keepdim=True) + 1e-6).sqrt()
        return x

    def forward(self, images, *, visible, masked):
        """Returns the scalar loss and the predictions (B, K, p*p*C), ordered as in
        `masked`. Patches in neither set are thrown: no part of the model sees them."""
        B, K = masked.shape
        x = self.decoder_embed(self.encoder(images, visible))
        mask_tokens = self.mask_token.expand(B, K, -1)
        x = torch.cat([x, mask_tokens], dim=1)                        # (B, T, D)

        # Attention does not care about order: what tells the decoder where a patch
        # belongs is its position embedding. So, unlike MAE's code, we need not unshuffle.
        zero = masked.new_zeros(B, 1)                                 # row 0 is [CLS]'s
        position = torch.cat([zero, 1 + visible, 1 + masked], dim=1)  # (B, T)
        x = x + self.decoder_pos_embed[0][position]
        for block in self.decoder_blocks:
            x = block(x)

        x = self.decoder_norm(x[:, -K:])                              # the masked patches
        pred = self.decoder_pred(x).float()
        loss = F.mse_loss(pred, self.targets(images, masked))         # Eq. 2, l2
        return loss, pred

def hog(images: Tensor, patch_size: int) -> Tensor:
    """Histograms of oriented gradients (B, N, 36*C) of images (B, C, H, W): MaskFeat's
    target, a simplified Dalal and Triggs (2005). Each of a patch's 2 x 2 cells gets an
    l2-normalized histogram per channel of 9 orientations, in which pixels vote with the
    magnitude of their gradients. Gradients at a patch's edge reach one pixel into its
    neighbors, thrown ones included. Give float32, as half precision is too coarse."""
    B, C, H, W = images.shape
    if patch_size % 2:  # each patch has two cells a side
        raise ValueError(f"patch size {patch_size} must be even")
    bins = 9
    cell = patch_size // 2

    def cells(x):  # (B, C, 2h, 2w, cell * cell)
        return x.unfold(2, cell, cell).unfold(3, cell, cell).flatten(4)

    dx = F.pad(images[:, :, :, 2:] - images[:, :, :, :-2], (1, 1))  # 0 at image borders
    dy = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    magnitude = torch.hypot(dx, dy)
    orientation = torch.atan2(dy, dx) % math.pi  # opposite directions share an orientation
    bin_of_pixel = (orientation * (bins / math.pi)).long().clamp(max=bins - 1)

    histogram = images.new_zeros(B, C, H // cell, W // cell, bins)
    histogram = histogram.scatter_add(4, cells(bin_of_pixel), cells(magnitude))
    # Without this epsilon (scikit-image's), rounding noise in flat cells would be blown up.
    square_norm = histogram.square().sum(dim=4, keepdim=True)
    x = histogram / (square_norm + 1e-5 ** 2).sqrt()
    x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, C*bins, 2h, 2w)
    return patchify(x, 2)                       # (B, N, 4*C*bins)

class SimMIM(nn.Module):
    """SimMIM (Xie et al., 2022): an encoder that sees mask tokens too, and a linear head.
    target="hog" makes it MaskFeat (Wei et al., 2022) as set up in the AMT paper: HOG
    instead of pixels, l2 instead of l1. `encoder` is like a ViT in `embed_dim`,
    `patch_size`, `in_chans`, `pos_embed`, `embed` and `run_blocks`. Caution: maps
    come from [CLS]'s query in the last block, on which this loss does not depend: the
    weights that compute it learn from the patches' queries alone."""

    def __init__(self, encoder: nn.Module, target="pixels"):
        super().__init__()
        kinds = {"pixels": (patchify, F.l1_loss), "hog": (hog, F.mse_loss)}
        self.target_fn, self.loss_fn = kinds[target]
        p = encoder.patch_size
        target_dim = self.target_fn(torch.zeros(1, encoder.in_chans, p, p), p).shape[2]
        self.mask_token = nn.Parameter(torch.randn(1, 1, encoder.embed_dim) * 0.02)
        self.head = nn.Linear(encoder.embed_dim, target_dim)
        init_weights(self)
        self.encoder = encoder  # assigned last so that init_weights leaves it alone

    def targets(self, images, masked):
        """Pixels (B, K, p*p*C) or histograms (B, K, 36*C) of the masked patches."""
        return select(self.target_fn(images, self.encoder.patch_size), masked)

    def forward(self, images, *, visible, masked):
        """Like `MAE.forward`, with predictions (B, K, L), but here the encoder itself
        gets a token for each masked patch: the mask token plus the patch's position."""
        K = masked.shape[1]
        x = self.encoder.embed(images, visible)
        mask_tokens = self.mask_token + self.encoder.pos_embed[0, 1:][masked]
        x = torch.cat([x, mask_tokens], dim=1)                   # (B, T, D)
        x = self.encoder.run_blocks(x)

        pred = self.head(x[:, -K:]).float()                      # (B, K, L)
        loss = self.loss_fn(pred, self.targets(images, masked))  # Eq. 2
        return loss, pred

# ==== 8. Other strategies =========================================================
# Weights in, a ranking out, as in `sample_patches`; some use only the shape of the weights.

def random_ranking(weights: Tensor) -> Tensor:
    """Uniformly at random, as in MAE (He et al., 2022) and SimMIM (Xie et al., 2022)."""
    return sample_patches(torch.ones_like(weights))

def highest_first(weights: Tensor) -> Tensor:
    """Highest weight first, as in AttMask (Kakogeorgiou et al., 2022). Ties break at
    random, as equal weights would otherwise always mask the top rows."""
    shuffled = random_ranking(weights)
    order = weights.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, order)

def lowest_first(weights: Tensor) -> Tensor:
    """Lowest weight first, after MST (Li et al., 2021), which masks low attention."""
    return highest_first(-weights)

def grid_wise(weights: Tensor) -> Tensor:
    """Ranks in a regular pattern (He et al., 2022): on an even grid, masking 0.5 leaves a
    checkerboard, and 0.75 the bottom-left patch of each group of 2 x 2."""
    B, N = weights.shape
    h = square_side(N)
    patch = torch.arange(N, device=weights.device)
    odd_row = (patch // h) % 2
    odd_column = (patch % h) % 2
    quarter = 2 * (odd_row != odd_column) + odd_row  # its rank among its group's four
    noise = torch.rand(B, N, device=weights.device)
    return (quarter + noise).argsort(dim=1)

def block_wise(weights: Tensor) -> Tensor:
    """Ranks rectangle by rectangle, and row by row within each, after BEiT (Bao et al.,
    2022). A rectangle has about 8 to 40 % of the patches and a height / width of about
    0.3 to 1 / 0.3."""
    B, N = weights.shape
    h = square_side(N)
    n_rectangles = 64                                    # enough to cover nearly everything
    u = torch.rand(4, B, n_rectangles, 1, device=weights.device)
    area = (0.08 + 0.32 * u[0]) * N
    aspect = 0.3 ** (2 * u[1] - 1)                       # log-uniform
    height = (area * aspect).sqrt().round().clamp(1, h)  # (B, n_rectangles, 1)
    width = (area / aspect).sqrt().round().clamp(1, h)
    top = (u[2] * (h - height + 1)).floor()
    left = (u[3] * (h - width + 1)).floor()

    patch = torch.arange(N, device=weights.device)
    row = patch // h - top                               # (B, n_rectangles, N)
    column = patch % h - left
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)

    # A patch belongs to the first rectangle that contains it; patches in none come last.
    rectangle = torch.arange(n_rectangles, device=weights.device)[:, None]
    rectangle = torch.where(inside, rectangle, n_rectangles)
    return rectangle.amin(dim=1).argsort(dim=1, stable=True)
