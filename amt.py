"""AMT: masked image modeling that asks the model's own attention what to hide.

    Zhengqi Liu, Jie Gui, Hao Luo. Good Helper Is around You: Attention-Driven Masked Image
    Modeling. AAAI 2023, https://arxiv.org/abs/2211.15362

Masked image modeling hides patches of an image and trains a vision transformer to predict them.
Hiding patches at random ignores what the image shows. AMT looks first: at a fixed interval, a tenth
of the epochs, it runs the encoder on every training image, whole, and keeps the attention that
[CLS] pays to each patch. At each step a ranking of the patches is drawn with that attention for
weights, so that attended patches tend to the top. The top is masked, that is hidden and predicted;
the next part is thrown away, never to enter the model; the rest is visible.

One idea organises the file: every masking strategy is a ranking M of the N patches of an image, and
masking and throwing is a split of M. A model takes two sets of indices, `visible` and `masked`, and
knows nothing of how they were chosen.

    paper                                              section of this file
    patches and their positions                        1. Patches
    ViT, self-attention (Eq. 1)                        2. Vision transformer
    attention of [CLS] (Eq. 3)                         2. Vision transformer: ViT.cls_attention
    masking weights a_w of a whole image (Eq. 4)       3. Masking weights
    weights P_A of a cropped, flipped image            4. Crops of images and of their weights
    sampling the ranking M (Eq. 5)                     5. Ranking
    masking and throwing (Eq. 6, Algorithm 1)          6. Masking and throwing
    loss on the masked patches (Eq. 2)                 7. Models: MAE, SimMIM, MaskFeat
    the strategies that AMT is compared with           8. Other strategies

Letters in shapes: B images, C channels, H x W pixels, p patch size in pixels, h x w = H/p x W/p the
grid of patches, N = h w patches, K patches of a set of them, L numbers that describe a patch, T
tokens, D width of the module at hand, d width of a head.

A step of AMT, on the images `ids` of a data set (n, 3, H, H) and of its maps (n, h, w):

    theta = random_crops(B)
    ranking = sample_patches(crop_weights(maps[ids], theta, H, p))
    masked, thrown, visible = mask_and_throw(ranking, mask_ratio=0.45, throw_ratio=0.40)
    loss, _ = mae(crop(images[ids], theta, H, "bicubic"), visible, masked)

with `mae = MAE(vit_base())` and, at that interval, `maps = masking_weights(mae.encoder, images)`,
batch by batch. Until the first time, and for the baseline, masking is random: 0.75 masked, nothing
thrown, by `ranking = sample_patches(torch.ones(B, N))`. SimMIM and MaskFeat mask units of u x u
patches, at random 0.60 and 0.40 of them. With SimMIM(vit_base()) and u = 2 the middle becomes

    ranking = sample_patches(crop_weights(maps[ids], theta, H, u * p))            # of units
    masked, thrown, visible = (expand_units(units, h, u)
                               for units in mask_and_throw(ranking, 0.44, 0.26))
"""
import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------
# 1. Patches


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images (B, C, H, W) into patches (B, N, p*p*C).

    Patches are in rows, left to right; pixels within a patch are in the order (row, column,
    channel). Raises ValueError if p does not divide H and W.
    """
    B, C, H, W = images.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"images of {H}x{W} pixels cannot be cut into patches of {p}x{p}: "
                         f"choose a patch size that divides both sides")
    x = images.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Puts the patches (B, N, p*p*C) of square images together again: (B, C, H, H), H = p sqrt(N).

    The inverse of `patchify`. Raises ValueError if N is not a square or p*p does not divide the
    length of a patch.
    """
    B, N, L = patches.shape
    p, h = patch_size, grid_side(N)
    if L % (p * p):
        raise ValueError(f"patches {tuple(patches.shape)} are not of {p}x{p} pixels: give "
                         f"(B, N, p*p*C)")
    x = patches.reshape(B, h, h, p, p, L // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, L // (p * p), h * p, h * p)


def grid_side(N: int) -> int:
    """The side h of a square grid of N patches. Raises ValueError if N is not a square."""
    h = math.isqrt(N)
    if h * h != N:
        raise ValueError(f"N = {N} patches do not make a square grid: give the patches of a square "
                         f"image, without [CLS] and other extra tokens")
    return h


def select(x: Tensor, ids: Tensor) -> Tensor:
    """Picks the patches ids (B, K), int64, out of x (B, N, L): (B, K, L)."""
    return torch.take_along_dim(x, ids[:, :, None], dim=1)


def sincos_pos_embed(embed_dim: int, grid_size: int) -> Tensor:
    """MAE's fixed 2-d sine-cosine positions (1, N+1, D) of a square grid, [CLS] at zeros first.

    The first half of the channels encodes a patch's column, the second its row; each half is sines,
    then cosines, at D/4 wavelengths from 2 pi to 10000 * 2 pi patches (the last excluded).
    Raises ValueError if 4 does not divide D.
    """
    if embed_dim % 4:
        raise ValueError(f"width {embed_dim} is not a multiple of 4, as sines and cosines of rows "
                         f"and columns need: choose one that is")
    omega = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                      # (h, D/2)
    column = line[None, :, :].expand(grid_size, -1, -1)                      # (h, w, D/2)
    row = line[:, None, :].expand(-1, grid_size, -1)                         # (h, w, D/2)
    table = torch.cat([column, row], dim=2).flatten(0, 1)                    # (N, D)
    return F.pad(table, (0, 0, 1, 0)).float()[None]                          # (1, N+1, D)


# ------------------------------------------------------------------------------------------------
# 2. Vision transformer. Parameter names are timm's, so that checkpoints go both ways.


class PatchEmbed(nn.Module):
    """Projects patches (B, K, p*p*3) to tokens (B, K, D).

    The weight has the shape of a strided convolution's, as in timm, but it is applied to patches
    already cut out, so that a patch that is not kept is not embedded either.
    """

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)             # (D, p*p*3)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention: tokens (B, T, D) to tokens (B, T, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)          # (B, heads, T, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split_heads, self.qkv(x).chunk(3, dim=2))
        x = F.scaled_dot_product_attention(q, k, v)      # Eq. 1: softmax(q k^T / sqrt(d)) v
        return self.proj(x.transpose(1, 2).flatten(2))

    def cls_attention(self, x: Tensor) -> Tensor:
        """The attention (B, heads, T-1) of [CLS], the first token, over the others."""
        (w_q, w_k, _), (b_q, b_k, _) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q = self.split_heads(F.linear(x[:, :1], w_q, b_q))                   # (B, heads, 1, d)
        k = self.split_heads(F.linear(x, w_k, b_k))                          # (B, heads, T, d)
        a = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])                    # (B, heads, 1, T)
        a = a.softmax(dim=3, dtype=torch.float32)        # Eq. 3: softmax(q_cls k^T / sqrt(d))
        return a[:, :, 0, 1:]


class Block(nn.Module):
    """Pre-norm transformer block: tokens (B, T, D) to tokens (B, T, D). In training, each branch is
    skipped for an image with probability `drop_path` (stochastic depth: Huang et al., 2016)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))
        self.drop_path = drop_path

    def drop(self, branch: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


def init_weights(module: nn.Module):
    """MAE's initialisation: Xavier-uniform matrices (the patch projection too), zero biases."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.flatten(1))         # a view, filled in place
            nn.init.zeros_(m.bias)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021) on square RGB images, as MAE pretrains it.

    `state_dict()` loads into timm's VisionTransformer(num_classes=0) of the same size and gives the
    same tokens. Positions are fixed: `pos_embed` is a parameter that takes no gradient.
    `drop_path` is the last block's; the others' rise to it linearly from 0.
    Raises ValueError if p does not divide the image size, or num_heads or 4 the width.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, embed_dim: int = 768,
                 depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0,
                 drop_path: float = 0.0):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide img_size {img_size}: "
                             f"choose one that does")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}: "
                             f"choose a number that does")
        self.img_size, self.patch_size, self.embed_dim = img_size, patch_size, embed_dim
        self.grid_size = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(
            sincos_pos_embed(embed_dim, self.grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path * i / max(depth - 1, 1))
            for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, 1+K, D) of the patches `keep` (B, K), [CLS] first, positions added."""
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"images {tuple(images.shape)} do not fit this ViT: "
                             f"give (B, 3, {self.img_size}, {self.img_size})")
        patches, pos = patchify(images, self.patch_size), self.pos_embed[0, 1:]
        if keep is not None:
            patches, pos = select(patches, keep), pos[keep]      # (B, K, p*p*3), (B, K, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([cls, self.patch_embed(patches) + pos], dim=1)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Normalised tokens (B, 1+K, D) of images (B, 3, H, H), [CLS] first.

        `keep` (B, K), int64, are the indices of the patches to process, in any order; None: all N.
        The others are neither embedded nor attended to.
        Raises ValueError if the images are not of the size that the ViT was made for.
        """
        return self.run_blocks(self.embed(images, keep))

    def run_blocks(self, x: Tensor) -> Tensor:
        """Runs all blocks and the last norm: tokens (B, T, D) to tokens (B, T, D)."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def cls_attention(self, images: Tensor) -> Tensor:
        """What [CLS] attends to in the last block (Eq. 3): (B, heads, N) of images (B, 3, H, H).

        The softmax runs over [CLS] and all patches; then [CLS]'s own entry is left out, so that a
        row sums to less than 1. Only the [CLS] row of the last block's attention is computed.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.cls_attention(last.norm1(x))


# The field's sizes. ViT's arguments go with them, as in vit_tiny(img_size=32, patch_size=4).
vit_tiny = partial(ViT, embed_dim=192, depth=12, num_heads=3)
vit_small = partial(ViT, embed_dim=384, depth=12, num_heads=6)
vit_base = partial(ViT, embed_dim=768, depth=12, num_heads=12)
vit_large = partial(ViT, embed_dim=1024, depth=24, num_heads=16)
vit_huge = partial(ViT, patch_size=14, embed_dim=1280, depth=32, num_heads=16)


# ------------------------------------------------------------------------------------------------
# 3. Masking weights


@torch.no_grad()
def masking_weights(vit: nn.Module, images: Tensor) -> Tensor:
    """The masking weights a_w (B, h, w) of whole images (B, 3, H, H), float32, in [0, 1] (Eq. 4).

    `vit` is any module with `cls_attention(images) -> (B, heads, N)` on a square grid of patches.
    It runs in eval mode, without gradients, and every submodule is left in the mode it was in.
    The attention is averaged over the heads, then stretched to [0, 1], image by image. Where all
    patches are attended to alike, all weights are 0, which `sample_patches` ranks uniformly.
    Raises ValueError if the grid is not square.
    """
    training = [m for m in vit.modules() if m.training]
    vit.eval()
    try:
        a = vit.cls_attention(images).float()                                # (B, heads, N)
    finally:
        for m in training:
            m.training = True
    h = grid_side(a.shape[2])
    # The mean comes before the stretch, as in the paper; the authors' code stretches each head.
    a_w = a.mean(dim=1)                                                      # Eq. 4: (B, N)
    low, high = a_w.aminmax(dim=1, keepdim=True)
    a_w = (a_w - low) / (high - low).clamp_min(torch.finfo(a_w.dtype).tiny)  # min-max: 0 to 1
    return a_w.unflatten(1, (h, h))


# ------------------------------------------------------------------------------------------------
# 4. Crops of images and of their weights


def random_crops(n: int, scale: tuple[float, float] = (0.2, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3),
                 generator: torch.Generator | None = None, image_ratio: float = 1.0) -> Tensor:
    """Random resized crops and horizontal flips of n images, as affine maps theta (n, 2, 3).

    RandomResizedCrop and RandomHorizontalFlip for a whole batch at once: a crop's share of the area
    is uniform in `scale`, the logarithm of its width / height uniform between those of `ratio`, and
    its place uniform; each is flipped with probability 1/2. A side that would exceed the image's is
    shortened to it (torchvision draws again instead). theta is what
    `torch.nn.functional.affine_grid` takes: it maps coordinates of the crop, -1 to 1 from edge to
    edge, to those of the image. It lies on the generator's device, on the CPU if none is given.
    `image_ratio` is the images' own width / height: 1 for square ones.
    """
    device = generator.device if generator else None
    area, aspect, x, y, flip = torch.rand(5, n, generator=generator, device=device)
    area = scale[0] + (scale[1] - scale[0]) * area
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect / image_ratio        # of shares of the sides
    width = (area * aspect).sqrt().clamp(max=1)                              # 1: the whole side
    height = (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = torch.where(flip < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x - 1)                               # the crop's centre
    theta[:, 1, 2] = (1 - height) * (2 * y - 1)
    return theta


def crop(x: Tensor, theta: Tensor, size: int, mode: str) -> Tensor:
    """Cuts the areas theta (B, 2, 3) out of x (B, C, H, W), resized to (B, C, size, size).

    For images and attention maps alike, since theta does not count in pixels.
    `mode` is "bicubic" (which may overshoot the range of x a little), "bilinear" or "nearest".
    """
    grid = F.affine_grid(theta, (len(x), x.shape[1], size, size), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)


def crop_weights(weights: Tensor, theta: Tensor, img_size: int, patch_size: int) -> Tensor:
    """The weights P_A (B, N) of the patches of cropped, flipped images.

    The maps `weights` (B, h, w) of the whole images are interpolated to img_size pixels a side, cut
    with the theta (B, 2, 3) that cut the images, and summed per patch. Giving `crop` and
    `crop_weights` one theta is what keeps each weight on the patch that shows what the weight was
    measured on.
    """
    # As in the paper. To find the map's cells under a crop, the authors' code divides pixels by the
    # image's size, not the patch's: so it takes the top-left 2x2 or 3x3 cells, whatever the crop.
    x = F.interpolate(weights[:, None], size=img_size, mode="bilinear", align_corners=False)
    return patchify(crop(x, theta, img_size, "bilinear"), patch_size).sum(dim=2)


# ------------------------------------------------------------------------------------------------
# 5. Ranking


def sample_patches(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws a ranking M (B, N), int64, of N patches with weights (B, N): Eq. 5.

    Each row is a permutation of 0 ... N-1, drawn without replacement with probability proportional
    to the weights, as `torch.multinomial(weights, N)` draws it. It is defined for zeros too:
    patches of weight 0 rank below all others, in random order among themselves; a row of zeros is
    ranked uniformly. The generator, if given, is on the weights' device.
    """
    # A race of exponential clocks: patch i rings at time E_i / w_i. Of those yet to ring, each is
    # the next with probability proportional to its weight. In logarithms, no weight is too small:
    # log w is at least -103 in float32 and log E is between -17 and 5, so zeros, put at -200, ring
    # after all others.
    w = weights.float()
    E = torch.empty_like(w).exponential_(generator=generator)
    log_w = torch.where(w > 0, w.log(), -200.0)
    return (log_w - E.log()).argsort(dim=1, descending=True)                 # Eq. 5


# ------------------------------------------------------------------------------------------------
# 6. Masking and throwing


def mask_and_throw(ranking: Tensor, mask_ratio: float, throw_ratio: float = 0.0,
                   throw: str = "middle") -> tuple[Tensor, Tensor, Tensor]:
    """Splits a ranking M (B, N) into the indices `masked, thrown, visible`: Eq. 6, Algorithm 1.

    round(N * mask_ratio) patches from the top of the ranking are masked, to be predicted.
    round(N * throw_ratio) are thrown: those next in rank (throw="middle", the paper's) or those at
    the bottom (throw="lowest"). The rest is visible. The paper's ratios with MAE: 0.75 and 0 at
    random and for AM (attention-driven masking alone), 0.45 and 0.40 for AMT.
    Raises ValueError if a ratio is outside [0, 1), nothing would be masked or nothing visible, or
    `throw` is another word.
    """
    N = ranking.shape[1]
    given = f"of N = {N} patches, mask_ratio {mask_ratio} and throw_ratio {throw_ratio}"
    if not (0 <= mask_ratio < 1 and 0 <= throw_ratio < 1):
        raise ValueError(f"{given}: each ratio must be at least 0 and less than 1")
    n_masked, n_thrown = round(N * mask_ratio), round(N * throw_ratio)
    n_visible = N - n_masked - n_thrown
    if n_masked < 1 or n_visible < 1:
        raise ValueError(f"{given} make {n_masked} masked, {n_thrown} thrown, {n_visible} visible: "
                         f"at least one must be masked and one visible")
    if throw == "middle":                                                    # Eq. 6
        return ranking.split([n_masked, n_thrown, n_visible], dim=1)
    if throw == "lowest":
        masked, visible, thrown = ranking.split([n_masked, n_visible, n_thrown], dim=1)
        return masked, thrown, visible
    raise ValueError(f'throw "{throw}" is unknown: choose "middle" or "lowest"')


def expand_units(ids: Tensor, grid_size: int, unit: int) -> Tensor:
    """The patches (B, K u*u), int64, in the units ids (B, K) of u x u patches.

    Units are counted in rows, as patches are. `grid_size` is the side h of the grid of patches.
    Raises ValueError if u does not divide it.
    """
    if grid_size % unit:
        raise ValueError(f"units of {unit}x{unit} patches do not fill a grid of "
                         f"{grid_size}x{grid_size}: choose a unit that divides {grid_size}")
    numbers = torch.arange(grid_size ** 2, device=ids.device).view(1, 1, grid_size, grid_size)
    members = patchify(numbers, unit)[0]                                     # (N / (u*u), u*u)
    return members[ids].flatten(1)


# ------------------------------------------------------------------------------------------------
# 7. Models: MAE, SimMIM, MaskFeat. Each wraps an encoder and is called with index sets.


class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022): a deep encoder of the visible patches, a light decoder
    of these and the masked ones.

    With `norm_pix_loss` the pixels of each target are normalised to mean 0 and variance 1.
    Raises ValueError if decoder_num_heads or 4 does not divide decoder_embed_dim.
    """

    def __init__(self, encoder: ViT, decoder_embed_dim: int = 512, decoder_depth: int = 8,
                 decoder_num_heads: int = 16, norm_pix_loss: bool = False):
        super().__init__()
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(f"decoder_num_heads {decoder_num_heads} does not divide "
                             f"decoder_embed_dim {decoder_embed_dim}: choose a number that does")
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(
            sincos_pos_embed(decoder_embed_dim, encoder.grid_size), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * encoder.patch_size ** 2)
        init_weights(self)
        self.encoder = encoder                           # after init_weights: keeps its weights
        self.norm_pix_loss = norm_pix_loss

    def target(self, images: Tensor, masked: Tensor) -> Tensor:
        """What is to be predicted: the pixels (B, K_masked, p*p*3) of the masked patches."""
        x = select(patchify(images, self.encoder.patch_size), masked)
        if self.norm_pix_loss:
            x = (x - x.mean(dim=2, keepdim=True)) / (x.var(dim=2, keepdim=True) + 1e-6).sqrt()
        return x

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the predictions (B, K_masked, p*p*3), in the order of `masked`.

        `visible` (B, K_visible) and `masked` (B, K_masked), int64, are indices of patches of the
        images (B, 3, H, H), as `mask_and_throw` gives them. A patch in neither set was thrown: it
        is seen by neither encoder, decoder nor loss.
        """
        B, K = masked.shape
        x = self.decoder_embed(self.encoder(images, keep=visible))           # (B, 1+K_visible, D)
        x = torch.cat([x, self.mask_token.expand(B, K, -1)], dim=1)          # (B, T, D)
        # A transformer knows its tokens by the positions added to them, not by their order. So each
        # token gets its own patch's position, and nothing is ever put back into the image's order.
        place = torch.cat([masked.new_zeros(B, 1), 1 + visible, 1 + masked], dim=1)  # 0: [CLS]'s
        x = x + self.decoder_pos_embed[0][place]
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x[:, -K:])).float()       # (B, K_masked, p*p*3)
        loss = F.mse_loss(pred, self.target(images, masked))                 # Eq. 2, l2
        return loss, pred


def hog(images: Tensor, patch_size: int, bins: int = 9) -> Tensor:
    """Histograms of oriented gradients (B, N, 4 C bins) of images (B, C, H, W): MaskFeat's target.

    A simple form of Dalal and Triggs, 2005: in a cell, half a patch a side, each pixel adds the
    length of its gradient to the bin of its orientation, one of `bins` equal parts of 180 degrees;
    the histogram of a cell and channel is divided by its l2 norm. A patch's four cells are in rows,
    the numbers of each in the order (channel, bin). Images are of a floating-point type.
    Raises ValueError if p is odd or does not divide H and W.
    """
    B, C, H, W = images.shape
    if patch_size % 2 or H % patch_size or W % patch_size:
        raise ValueError(f"patch size {patch_size} with images of {H}x{W} pixels: choose an even "
                         f"one, as cells are half a patch, that divides both sides")
    c = patch_size // 2

    def cells(x):
        return x.unfold(2, c, c).unfold(3, c, c).flatten(4)                  # (B, C, 2h, 2w, c*c)

    dx = F.pad(images[:, :, :, 2:] - images[:, :, :, :-2], (1, 1))           # 0 at the borders
    dy = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    orientation = torch.atan2(dy, dx) % math.pi          # opposite directions are one orientation
    index = (orientation * (bins / math.pi)).long().clamp(max=bins - 1)
    x = images.new_zeros(B, C, H // c, W // c, bins)
    x = x.scatter_add(4, cells(index), cells(torch.hypot(dx, dy)))
    x = F.normalize(x, dim=4).permute(0, 1, 4, 2, 3).flatten(1, 2)           # (B, C bins, 2h, 2w)
    return patchify(x, 2)


class SimMIM(nn.Module):
    """SimMIM (Xie et al., 2022): an encoder of visible patches and mask tokens, and a linear layer.

    With target="hog" it is MaskFeat (Wei et al., 2022), as the paper builds it: what is predicted
    are histograms of gradients instead of pixels, and the loss is l2 instead of l1. In both [CLS]
    learns only by what it gives the patches: unlike MAE's, it has no use after the last block.
    Raises ValueError if the target is another word, or "hog" and the patch size odd.
    """

    def __init__(self, encoder: ViT, target: str = "pixels"):
        super().__init__()
        if target not in ("pixels", "hog"):
            raise ValueError(f'target "{target}" is unknown: choose "pixels" or "hog"')
        self.describe, self.distance = {
            "pixels": (patchify, F.l1_loss), "hog": (hog, F.mse_loss)}[target]
        p, D = encoder.patch_size, encoder.embed_dim
        length = self.describe(torch.zeros(1, 3, p, p), p).shape[2]
        self.mask_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        self.head = nn.Linear(D, length)
        init_weights(self)
        self.encoder = encoder                           # after init_weights: keeps its weights

    def target(self, images: Tensor, masked: Tensor) -> Tensor:
        """What is to be predicted: pixels (B, K_masked, p*p*3) or histograms (B, K_masked, 108)."""
        return select(self.describe(images, self.encoder.patch_size), masked)

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the predictions (B, K_masked, L), in the order of `masked`.

        The arguments are those of `MAE.forward`. Unlike there, the encoder gets masked patches too,
        each as the mask token with the position of the patch; but thrown ones in no form.
        """
        hidden = self.mask_token + self.encoder.pos_embed[0, 1:][masked]     # (B, K_masked, D)
        x = torch.cat([self.encoder.embed(images, visible), hidden], dim=1)  # (B, T, D)
        x = self.encoder.run_blocks(x)
        pred = self.head(x[:, -masked.shape[1]:]).float()                    # (B, K_masked, L)
        loss = self.distance(pred, self.target(images, masked))              # Eq. 2
        return loss, pred


# ------------------------------------------------------------------------------------------------
# 8. Other strategies. Like `sample_patches`, each takes weights (B, N) and a generator, and gives a
# ranking (B, N). Of `random_ranking`, `grid_wise` and `block_wise`, only the weights' shape and
# device matter.


def random_ranking(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly at random: He et al., 2022 (MAE), Xie et al., 2022 (SimMIM)."""
    return sample_patches(torch.ones_like(weights), generator)


def highest_first(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """By weight, the highest first: Kakogeorgiou et al., 2022 (AttMask)."""
    return weights.argsort(dim=1, descending=True, stable=True)


def lowest_first(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """By weight, the lowest first: after Li et al., 2021 (MST), who draw some of the lowest."""
    return weights.argsort(dim=1, stable=True)


def grid_wise(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Regularly: He et al., 2022. The first half of a square grid is a checkerboard; last comes the
    bottom left one of each 2x2 patches, which alone stays visible of an even grid with 0.75 masked.
    Raises ValueError if N is not a square.
    """
    (B, N), device = weights.shape, weights.device
    place, h = torch.arange(N, device=device), grid_side(N)
    row, column = place // h % 2, place % h % 2          # 0 or 1: even or odd
    order = 2 * (row != column) + row                    # first both even, then both odd
    return (order + torch.rand(B, N, generator=generator, device=device)).argsort(dim=1)


def block_wise(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rectangle by rectangle of a square grid: after Bao et al., 2022 (BEiT).

    Each has about 0.08 to 0.4 of the patches (BEiT: at least 16 and in all 75 of 196), with an
    aspect between 0.3 and 1 / 0.3, and is ranked from its centre outwards: the one that the ratio
    cuts is a smaller block. Raises ValueError if N is not a square.
    """
    (B, N), device = weights.shape, weights.device
    h, n_blocks = grid_side(N), 64                       # what these leave uncovered ranks last

    def rand(*shape):
        return torch.rand(*shape, generator=generator, device=device)

    area, aspect = (0.08 + 0.32 * rand(B, n_blocks)) * N, 0.3 ** (2 * rand(B, n_blocks) - 1)
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()])    # (2, B, n_blocks)
    sides = sides.round().clamp(1, h)                                        # height, width
    start = (rand(2, B, n_blocks) * (h - sides + 1)).floor()                 # top, left
    line = torch.arange(h, device=device) + 0.5
    place = torch.cartesian_prod(line, line).T[:, None, None]                # (2, 1, 1, N)
    off = (place - (start + sides / 2)[..., None]) / sides[..., None]        # (2, B, n_blocks, N)
    inside, block = (off.abs() < 0.5).all(dim=0), torch.arange(n_blocks, device=device)[:, None]
    rank = torch.where(inside, block + (off ** 2).sum(dim=0), n_blocks + rand(B, 1, N))
    return rank.amin(dim=1).argsort(dim=1, stable=True)  # by a patch's first block


STRATEGIES = {"attention": sample_patches, "random": random_ranking, "attmask": highest_first,
              "mst": lowest_first, "block": block_wise, "grid": grid_wise}
