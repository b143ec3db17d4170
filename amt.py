"""AMT: attention-driven masking and throwing for masked image modeling.

Liu, Gui and Luo. Good Helper Is around You: Attention-Driven Masked Image Modeling. AAAI 2023.
https://arxiv.org/abs/2211.15362

Masked image modeling hides patches of an image and trains a vision transformer to predict them.
Random masking ignores what is in the image. AMT uses the model's own attention. After each tenth
of the training, the encoder runs on every training image, uncropped, and AMT stores how much [CLS]
attends to each patch. In each step AMT draws a random ranking of the patches of each image, in
which patches with more attention tend to come first. The ranking is split into three parts:

    masked:  the top. The encoder does not see these patches, and the model predicts them.
    thrown:  the middle. These patches never enter the model and are not predicted.
    visible: the rest. The encoder sees these patches.

The most attended patches tend to show the object, so they are worth predicting. The next ones are
thrown. If they stayed visible, the prediction would be too easy, and each patch costs time. Before
the first attention is stored, masking is random, and no patches are thrown.

Every masking strategy in this file is a ranking of the patches. A model takes two sets of patch
indices and does not know how they were chosen.

Letters in shapes: B images, C channels, H x W pixels, p patch size in pixels, h x w patch grid,
N = h * w patches, K patches of a subset, L length of a patch's vector, T tokens, D width, d width
of an attention head, u side of a masking unit in patches, n images of a data set.
"""
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ==== 1. Patches ==================================================================================

def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images (B, C, H, W) into patches (B, N, p*p*C).

    Patches are ordered row by row. Pixels within a patch are ordered (row, column, channel).
    Raises ValueError if p does not divide H and W.
    """
    B, C, H, W = images.shape
    p = patch_size
    if p < 1 or H % p or W % p:
        raise ValueError(f"images of {H}x{W} pixels cannot be cut into patches of {p}x{p}: "
                         f"choose a patch size that divides both sides")
    x = images.reshape(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)                                          # (B, h, w, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Puts the patches (B, N, p*p*C) of square images together: (B, C, H, H) with H = p sqrt(N).

    The inverse of `patchify`. Raises ValueError if N is not a square number.
    """
    B, N, _ = patches.shape
    p = patch_size
    h = square_side(N)
    x = patches.reshape(B, h, h, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)                                          # (B, C, h, p, h, p)
    return x.reshape(B, -1, h * p, h * p)


def square_side(N: int) -> int:
    """The side h of a square grid of N patches. Raises ValueError if N is not a square number."""
    h = math.isqrt(N)
    if h * h != N:
        raise ValueError(f"N = {N} patches do not make a square grid: give the patches of a square "
                         f"image, without [CLS] and other extra tokens")
    return h


def select(x: Tensor, ids: Tensor) -> Tensor:
    """Picks the rows ids (B, K), int64, from x (B, N, L). Returns (B, K, L)."""
    return torch.take_along_dim(x, ids[:, :, None], dim=1)


def sincos_pos_embed(embed_dim: int, grid_size: int) -> Tensor:
    """MAE's fixed 2-d sine-cosine positions (1, 1+N, D) of a square grid. Row 0, [CLS]'s, is 0.

    The first half of the channels encodes the column of a patch, the second half its row. Each half
    holds D/4 sines, then D/4 cosines. The wavelengths grow geometrically from 2 pi to almost
    10000 * 2 pi patches. Raises ValueError if 4 does not divide D.
    """
    if embed_dim % 4:
        raise ValueError(f"width {embed_dim} is not a multiple of 4: choose one that is, because "
                         f"rows and columns each have a sine and a cosine")
    omega = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    angle = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                      # (h, D/2)
    column = axis[None, :, :].expand(grid_size, -1, -1)                      # (h, w, D/2)
    row = axis[:, None, :].expand(-1, grid_size, -1)                         # (h, w, D/2)
    table = torch.cat([column, row], dim=2).flatten(0, 1)                    # (N, D)
    return F.pad(table, (0, 0, 1, 0)).float()[None]                          # (1, 1+N, D)


# ==== 2. Vision transformer =======================================================================
# Parameters have timm's names, so checkpoints load in both directions.

class PatchEmbed(nn.Module):
    """Projects patches (B, K, p*p*3) to tokens (B, K, D).

    The weight has the shape of timm's strided convolution. We cut out the patches first, so only
    visible patches are embedded.
    """

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        # Order the weight's pixels as patchify does.
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)             # (D, p*p*3)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention from tokens (B, T, D) to tokens (B, T, D).

    Raises ValueError if num_heads does not divide D.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the width {dim}: choose a "
                             f"number that does")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)          # (B, heads, T, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.split_heads, self.qkv(x).chunk(3, dim=2))
        x = F.scaled_dot_product_attention(q, k, v)      # Eq. 1: softmax(q k^T / sqrt(d)) v
        return self.proj(x.transpose(1, 2).flatten(2))

    def cls_attention(self, x: Tensor, num_prefix_tokens: int = 1) -> Tensor:
        """The attention (B, heads, N) of [CLS] to the patches, from tokens (B, T, D) (Eq. 3).

        [CLS] is the first token. The first `num_prefix_tokens` tokens are not patches: [CLS] and,
        in some models, registers. The softmax includes them. The result does not, so a row sums to
        less than 1.
        """
        w_q, w_k, _ = self.qkv.weight.chunk(3)
        b_q, b_k, _ = self.qkv.bias.chunk(3)
        q = self.split_heads(F.linear(x[:, :1], w_q, b_q))                   # (B, heads, 1, d)
        k = self.split_heads(F.linear(x, w_k, b_k))                          # (B, heads, T, d)
        a = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])                    # (B, heads, 1, T)
        a = a.softmax(dim=3, dtype=torch.float32)        # Eq. 3: softmax(q_cls k^T / sqrt(d))
        return a[:, :, 0, num_prefix_tokens:]


class Block(nn.Module):
    """Pre-norm transformer block from tokens (B, T, D) to tokens (B, T, D)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim),
            act=nn.GELU(),
            fc2=nn.Linear(4 * dim, dim),
        ))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_weights(module: nn.Module):
    """MAE's initialisation, except that the bias of the patch projection is zero too."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.flatten(1))         # a view: this fills m.weight
            nn.init.zeros_(m.bias)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021) for square RGB images, as MAE pretrains it.

    Checkpoints of timm's VisionTransformer(num_classes=0) load here, and checkpoints of this class
    load there. Both models then give the same tokens. `pos_embed` is not trained.
    Raises ValueError if p does not divide img_size, or if num_heads or 4 does not divide embed_dim.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, embed_dim: int = 768,
                 depth: int = 12, num_heads: int = 12):
        super().__init__()
        if patch_size < 1 or img_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide img_size {img_size}: "
                             f"choose one that does")
        self.img_size = img_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.grid_size = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.pos_embed = nn.Parameter(
            sincos_pos_embed(embed_dim, self.grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Normalised tokens (B, 1+K, D) of images (B, 3, H, H), [CLS] first.

        `visible` (B, K), int64, holds the indices of the patches to process, in any order. Other
        patches are neither embedded nor attended to. None means all N patches.
        Raises ValueError if the images do not have the size that the ViT was made for.
        """
        return self.run_blocks(self.embed(images, visible))

    def embed(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The same tokens before the blocks, with their positions added. Raises the same error."""
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"images {tuple(images.shape)} do not fit this ViT: "
                             f"give (B, 3, {self.img_size}, {self.img_size})")
        patches = patchify(images, self.patch_size)                          # (B, N, p*p*3)
        pos = self.pos_embed[0, 1:]                                          # (N, D)
        if visible is not None:
            patches = select(patches, visible)                               # (B, K, p*p*3)
            pos = pos[visible]                                               # (B, K, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([cls, self.patch_embed(patches) + pos], dim=1)      # (B, 1+K, D)

    def run_blocks(self, x: Tensor) -> Tensor:
        """Runs all blocks and the final norm, from tokens (B, T, D) to tokens (B, T, D)."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def cls_attention(self, images: Tensor) -> Tensor:
        """The attention (B, heads, N) of [CLS] to the patches in the last block (Eq. 3).

        Raises the error of `forward`.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.cls_attention(last.norm1(x))


# Standard sizes. Any other argument of ViT can be added, as in vit_tiny(img_size=32, patch_size=4).
vit_tiny = partial(ViT, embed_dim=192, depth=12, num_heads=3)
vit_small = partial(ViT, embed_dim=384, depth=12, num_heads=6)
vit_base = partial(ViT, embed_dim=768, depth=12, num_heads=12)
vit_large = partial(ViT, embed_dim=1024, depth=24, num_heads=16)
vit_huge = partial(ViT, patch_size=14, embed_dim=1280, depth=32, num_heads=16)


# ==== 3. Attention maps ===========================================================================
# A map (h, w) belongs to a whole image. Weights (N,) belong to the patches of a crop.

@torch.no_grad()
def attention_maps(vit: nn.Module, images: Tensor) -> Tensor:
    """Computes the attention maps (B, h, w) of whole, normalised images (B, 3, H, H) (Eq. 4).

    This is the paper's a_w: float32, in [0, 1]. `vit` is any module with
    `cls_attention(images) -> (B, heads, N)` on a square grid of patches. It runs in eval mode. If
    [CLS] attends to all patches equally, the map is 0, and `sample_patches` ranks uniformly.
    Raises ValueError if the grid is not square or the attention is not finite.
    """
    training_modules = [m for m in vit.modules() if m.training]
    vit.eval()
    try:
        a = vit.cls_attention(images).float()                                # (B, heads, N)
    finally:
        for m in training_modules:
            m.training = True
    h = square_side(a.shape[2])
    if not a.isfinite().all():
        raise ValueError("the attention of [CLS] is nan or infinite: the images or the encoder's "
                         "parameters are not finite, or half precision overflows")
    # As in the paper: average, then normalise. The authors' code normalises each head first.
    a_w = a.mean(dim=1)                                                      # Eq. 4: (B, N)
    low, high = a_w.aminmax(dim=1, keepdim=True)
    a_w = (a_w - low) / (high - low).clamp_min(torch.finfo(a_w.dtype).tiny)  # min-max: [0, 1]
    return a_w.unflatten(1, (h, h))


def dataset_maps(vit: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """Computes the attention maps (n, h, w) of a whole data set, in float16 to save memory.

    `batches` yields pairs (ids, images): the indices (B,) of images in the data set, and the whole,
    normalised images (B, 3, H, H) on the device of `vit`. An image that is not yielded gets a map
    of zeros, so processes can each take some of the images and add their results.
    Raises ValueError if `batches` is empty or if `attention_maps` does.
    """
    maps = None
    for ids, images in batches:
        a_w = attention_maps(vit, images).half()
        if maps is None:
            maps = a_w.new_zeros(n, *a_w.shape[1:])
        maps[ids] = a_w
    if maps is None:
        raise ValueError("there are no images to make attention maps of: give at least one batch")
    return maps


# ==== 4. Crops of images and of maps ==============================================================

def random_crops(B: int, scale: tuple[float, float] = (0.2, 1.0),
                 ratio: tuple[float, float] = (3 / 4, 4 / 3),
                 generator: torch.Generator | None = None, image_ratio: float = 1.0) -> Tensor:
    """Random resized crops and horizontal flips of B images, as affine transforms theta (B, 2, 3).

    Like torchvision's RandomResizedCrop and RandomHorizontalFlip, for a batch. The area, as a
    fraction of the image's, is uniform in `scale`, and width / height is log-uniform in `ratio`.
    The position is uniform. A flip has probability 1/2. A side that is longer than the image's is
    shortened (torchvision draws again). `image_ratio` is the width / height of the images.

    theta maps coordinates in the crop to coordinates in the image, as `F.affine_grid` expects. Both
    run from -1 to 1. theta is on the device of the generator, or on the default device.
    """
    device = generator.device if generator else None
    s, r, x, y, flip = torch.rand(5, B, generator=generator, device=device)
    area = scale[0] + (scale[1] - scale[0]) * s
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** r       # width / height in pixels
    aspect = aspect / image_ratio                        # in fractions of the image's sides
    width = (area * aspect).sqrt().clamp(max=1)
    height = (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(B, 2, 3, device=device)
    theta[:, 0, 0] = torch.where(flip < 0.5, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * x - 1)           # centre of the crop
    theta[:, 1, 2] = (1 - height) * (2 * y - 1)
    return theta


def crop(x: Tensor, theta: Tensor, size: int, mode: str) -> Tensor:
    """Cuts the areas theta (B, 2, 3) out of x (B, C, H, W) and resizes them: (B, C, size, size).

    x holds images or attention maps, of a floating-point type. The coordinates in theta are
    relative, so the same theta crops an image and its map. `mode` is "bicubic" (which can overshoot
    the range of x a little), "bilinear" or "nearest". There is no antialiasing: shrink images that
    are much larger than `size` first.
    """
    theta = theta.to(x.device, torch.float32)
    with torch.autocast(x.device.type, enabled=False):   # half precision would shift the crop
        grid = F.affine_grid(theta, (len(x), x.shape[1], size, size), align_corners=False)
        result = F.grid_sample(x.float(), grid, mode, padding_mode="border", align_corners=False)
    return result.to(x.dtype)


def crop_weights(maps: Tensor, theta: Tensor, img_size: int, patch_size: int) -> Tensor:
    """The weights P_A (B, N) of the patches of cropped and flipped images.

    The maps (B, h, w) of the whole images are interpolated to img_size x img_size pixels, cropped
    with theta (B, 2, 3), and summed per patch. Use the same theta for `crop` and `crop_weights`:
    then each patch of the crop gets the weight of the image area that it shows. For units of u x u
    patches, give patch_size = u * p. Then N counts units. Raises ValueError if they do not fill the
    images.
    """
    # This follows the paper. The authors' code converts pixels to cells of the map by dividing by
    # the image size, 224, instead of the patch size, 16, so it reads the top left cells for every
    # crop.
    x = F.interpolate(maps.float()[:, None], size=img_size, mode="bilinear", align_corners=False)
    x = crop(x, theta, img_size, "bilinear")                                 # (B, 1, H, H)
    return patchify(x, patch_size).sum(dim=2)                                # P_A: (B, N)


# ==== 5. Ranking ==================================================================================

def sample_patches(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws a ranking M (B, N), int64, of N patches with weights (B, N) (Eq. 5).

    Each row is a permutation of 0 ... N-1, sampled without replacement with probabilities
    proportional to the weights. `torch.multinomial(weights, N)` does the same for positive weights.
    Here, patches of weight zero come last, in random order. The generator, if given, is on the
    device of the weights. Raises ValueError if a weight on the CPU is negative, infinite or nan.
    (On a GPU this check would make each step wait.)
    """
    w = weights.float()
    if w.device.type == "cpu" and not ((w >= 0) & (w < math.inf)).all():
        raise ValueError("some weights are negative, infinite or nan: give finite weights of at "
                         "least 0")
    # Draw E_i from an exponential distribution and rank the smallest E_i / w_i first. This samples
    # without replacement in proportion to w (Efraimidis and Spirakis, 2006; also known as Gumbel
    # top-k). To avoid overflow and underflow, we score a patch by log w - log E, and the highest
    # score ranks first. log E is in [-88, 5], so a positive w scores at least -109. With log 0 set
    # to -200, a zero w scores at most -112.
    E = torch.empty_like(w).exponential_(generator=generator)
    log_E = E.clamp_min(torch.finfo(w.dtype).tiny).log()
    log_w = torch.where(w > 0, w.log(), -200.0)
    return (log_w - log_E).argsort(dim=1, descending=True)                   # Eq. 5


# ==== 6. Masking and throwing =====================================================================

def mask_and_throw(ranking: Tensor, mask_ratio: float, throw_ratio: float = 0.0,
                   unit: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a ranking M (B, N) into indices `masked, thrown, visible` (Eq. 6, Algorithm 1).

    The first round(N * mask_ratio) patches of the ranking are masked. The next
    round(N * throw_ratio) patches are thrown. The rest is visible. With unit = u, the ranking
    orders N units of u x u patches, and the result holds the indices of all patches of these units.
    The paper's pairs (mask_ratio, throw_ratio) are

        MAE, unit 1:     random (0.75, 0)    AM (0.75, 0)    AMT (0.45, 0.40)
        SimMIM, unit 2:  random (0.60, 0)    AMT (0.44, 0.26), and (0.33, 0.50), which is faster

    AM is AMT without throwing. Raises ValueError if a ratio is outside [0, 1), if no patch would be
    masked or none visible, or if units do not make a square grid.
    """
    N = ranking.shape[1]
    given = f"of N = {N} patches or units, mask_ratio {mask_ratio} and throw_ratio {throw_ratio}"
    if not (0 <= mask_ratio < 1 and 0 <= throw_ratio < 1):
        raise ValueError(f"{given}: each ratio must be at least 0 and less than 1")
    n_masked = round(N * mask_ratio)
    n_thrown = round(N * throw_ratio)
    n_visible = N - n_masked - n_thrown
    if n_masked < 1 or n_visible < 1:
        raise ValueError(f"{given} make {n_masked} masked, {n_thrown} thrown, {n_visible} visible: "
                         f"at least one must be masked and one visible")
    masked, thrown, visible = ranking.split([n_masked, n_thrown, n_visible], dim=1)      # Eq. 6
    if unit != 1:
        h = square_side(N) * unit
        masked, thrown, visible = (expand_units(x, h, unit) for x in (masked, thrown, visible))
    return masked, thrown, visible


def expand_units(units: Tensor, grid_size: int, unit: int) -> Tensor:
    """The indices (B, K*u*u), int64, of all patches in the given units (B, K) of u x u patches.

    Units are numbered row by row, as patches are. `grid_size` is the side h of the grid of patches.
    Raises ValueError if u does not divide it.
    """
    if unit < 1 or grid_size % unit:
        raise ValueError(f"units of {unit}x{unit} patches do not fill a grid of "
                         f"{grid_size}x{grid_size}: choose a unit that divides {grid_size}")
    patches = torch.arange(grid_size ** 2, device=units.device)
    members = patchify(patches.view(1, 1, grid_size, grid_size), unit)[0]    # (N / (u*u), u*u)
    return members[units].flatten(1)                                         # (B, K*u*u)


# ==== 7. Models: MAE, SimMIM, MaskFeat ============================================================
# The index sets are keyword-only arguments, so they cannot be swapped by mistake.

class MAE(nn.Module):
    """Masked autoencoder (He et al., 2022): a deep encoder and a light decoder.

    The encoder sees the visible patches only. The decoder sees the encoder's output and a mask
    token for each masked patch. `encoder` is a ViT, or a module that has `embed_dim`, `patch_size`
    and `grid_size` and maps (images, visible) to tokens (B, 1+K, D). With `norm_pix_loss`, the
    pixels of each target patch are normalised to mean 0 and variance 1.
    Raises ValueError if decoder_num_heads or 4 does not divide decoder_embed_dim.
    """

    def __init__(self, encoder: nn.Module, decoder_embed_dim: int = 512, decoder_depth: int = 8,
                 decoder_num_heads: int = 16, norm_pix_loss: bool = False):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_embed_dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(
            sincos_pos_embed(decoder_embed_dim, encoder.grid_size), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * encoder.patch_size ** 2)
        init_weights(self)
        self.encoder = encoder           # set last: init_weights must not change the encoder
        self.norm_pix_loss = norm_pix_loss

    def targets(self, images: Tensor, masked: Tensor) -> Tensor:
        """The pixels (B, K_masked, p*p*3) of the masked patches."""
        x = select(patchify(images, self.encoder.patch_size), masked)
        if self.norm_pix_loss:
            mean = x.mean(dim=2, keepdim=True)
            var = x.var(dim=2, keepdim=True)
            x = (x - mean) / (var + 1e-6).sqrt()
        return x

    def forward(self, images: Tensor, *, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the predictions (B, K_masked, p*p*3) in the order of `masked`.

        `visible` (B, K_visible) and `masked` (B, K_masked), int64, are patch indices of the images
        (B, 3, H, H), as `mask_and_throw` returns them. A patch in neither set is thrown: neither
        the encoder nor the decoder nor the loss sees it.
        """
        B, K = masked.shape
        x = self.decoder_embed(self.encoder(images, visible))                # (B, 1+K_visible, D)
        x = torch.cat([x, self.mask_token.expand(B, K, -1)], dim=1)          # (B, T, D)
        # The decoder knows a patch by its position embedding, not by its place in the sequence. So
        # we never restore the order of the image.
        zero = masked.new_zeros(B, 1)                    # row 0 of the table is [CLS]'s
        position = torch.cat([zero, 1 + visible, 1 + masked], dim=1)         # (B, T)
        x = x + self.decoder_pos_embed[0][position]
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x[:, -K:])).float()       # (B, K_masked, p*p*3)
        loss = F.mse_loss(pred, self.targets(images, masked))                # Eq. 2, l2
        return loss, pred


def hog(images: Tensor, patch_size: int, bins: int = 9) -> Tensor:
    """Histograms of oriented gradients (B, N, 4*C*bins) of images (B, C, H, W): MaskFeat's target.

    A simple form of Dalal and Triggs, 2005. Each patch has 2 x 2 cells, ordered row by row. Each
    cell has, for each channel, a histogram over 180 degrees. A pixel adds the length of its
    gradient to the bin of its orientation. Then the histogram is divided by its l2 norm.

    Gradients at the edge of a patch use pixels of its neighbours, even of thrown ones. Give float32
    images, because half precision is too coarse.
    Raises ValueError if p is odd or does not divide H and W.
    """
    B, C, H, W = images.shape
    if patch_size < 2 or patch_size % 2 or H % patch_size or W % patch_size:
        raise ValueError(f"patch size {patch_size} with images of {H}x{W} pixels: choose an even "
                         f"number that divides both sides, because a cell is half a patch wide")
    side = patch_size // 2                               # of a cell of S pixels

    def cells(x: Tensor) -> Tensor:
        return x.unfold(2, side, side).unfold(3, side, side).flatten(4)      # (B, C, 2h, 2w, S)

    dx = F.pad(images[:, :, :, 2:] - images[:, :, :, :-2], (1, 1))           # 0 at the borders
    dy = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))
    length = torch.hypot(dx, dy)
    orientation = torch.atan2(dy, dx) % math.pi          # opposite directions are one orientation
    bin_of_pixel = (orientation * (bins / math.pi)).long().clamp(max=bins - 1)
    histogram = images.new_zeros(B, C, H // side, W // side, bins)
    histogram = histogram.scatter_add(4, cells(bin_of_pixel), cells(length))
    # Flat cells hold only rounding noise. This epsilon, scikit-image's, keeps them small.
    norm = (histogram.square().sum(dim=4, keepdim=True) + 1e-5 ** 2).sqrt()
    x = (histogram / norm).permute(0, 1, 4, 2, 3).flatten(1, 2)              # (B, C*bins, 2h, 2w)
    return patchify(x, 2)                                                    # (B, N, 4*C*bins)


class SimMIM(nn.Module):
    """SimMIM (Xie et al., 2022): an encoder that sees mask tokens too, and a linear head.

    With target="hog" this is MaskFeat (Wei et al., 2022) as the AMT paper builds it: the model
    predicts histograms of gradients instead of pixels, with an l2 loss instead of l1. `encoder` is
    a ViT, or a module that has `embed_dim`, `patch_size`, `pos_embed`, `embed` and `run_blocks`.

    The loss does not reach the query of [CLS] in the last block, which Eq. 3 uses. The query
    projection of that block learns only from the queries of the patches.
    Raises ValueError for another target, or for "hog" with an odd patch size.
    """

    def __init__(self, encoder: nn.Module, target: str = "pixels"):
        super().__init__()
        p = encoder.patch_size
        if target == "pixels":
            self.target_fn = patchify
            self.loss_fn = F.l1_loss
        elif target == "hog":
            self.target_fn = hog
            self.loss_fn = F.mse_loss
        else:
            raise ValueError(f'target "{target}" is unknown: choose "pixels" or "hog"')
        target_dim = self.target_fn(torch.zeros(1, 3, p, p), p).shape[2]
        self.mask_token = nn.Parameter(torch.randn(1, 1, encoder.embed_dim) * 0.02)
        self.head = nn.Linear(encoder.embed_dim, target_dim)
        init_weights(self)
        self.encoder = encoder           # set last: init_weights must not change the encoder

    def targets(self, images: Tensor, masked: Tensor) -> Tensor:
        """Pixels (B, K_masked, p*p*3) or histograms (B, K_masked, 108) of the masked patches."""
        return select(self.target_fn(images, self.encoder.patch_size), masked)

    def forward(self, images: Tensor, *, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and the predictions (B, K_masked, L) in the order of `masked`.

        The arguments are those of `MAE.forward`. Here the encoder also gets a token for each masked
        patch: the mask token plus the position of the patch.
        """
        K = masked.shape[1]
        mask_tokens = self.mask_token + self.encoder.pos_embed[0, 1:][masked]        # (B, K, D)
        x = torch.cat([self.encoder.embed(images, visible), mask_tokens], dim=1)     # (B, T, D)
        x = self.encoder.run_blocks(x)
        pred = self.head(x[:, -K:]).float()                                  # (B, K_masked, L)
        loss = self.loss_fn(pred, self.targets(images, masked))              # Eq. 2
        return loss, pred


# ==== 8. One training step ========================================================================

def training_loss(model: nn.Module, images: Tensor, theta: Tensor, maps: Tensor | None,
                  mask_ratio: float = 0.45, throw_ratio: float = 0.40, unit: int = 1,
                  strategy: Callable = sample_patches) -> Tensor:
    """The loss, a scalar, of MAE or SimMIM on crops `images` (B, 3, H, H).

    theta (B, 2, 3) says where the crops lie. `maps` (B, h, w) are the attention maps of the whole
    images: `dataset_maps(...)[ids]`. The default ratios are those of AMT with MAE. The caller
    computes new maps after each tenth of the training. Before the first ones exist, give None and
    the ratios of random masking: see `mask_and_throw`. Then all patches have the same weight.

    A data set for `torch.utils.data.DataLoader` returns each crop with its theta and its index, as
    here, where self.images (n, 3, H, H) are normalised:

        def __getitem__(self, i):
            theta = random_crops(1)
            return crop(self.images[i][None], theta, 224, "bicubic")[0], theta[0], i

    Raises ValueError if units of u x u patches do not fill the images, or if `mask_and_throw` does.
    """
    patch_size = getattr(model, "module", model).encoder.patch_size          # DDP has a `module`
    unit_size = unit * patch_size                                            # in pixels
    if maps is None:
        N = patchify(images[:1], unit_size).shape[1]                         # counts units
        weights = images.new_ones(len(images), N)
    else:
        weights = crop_weights(maps, theta, images.shape[2], unit_size)
    ranking = strategy(weights)
    masked, _, visible = mask_and_throw(ranking, mask_ratio, throw_ratio, unit)
    loss, _ = model(images, visible=visible, masked=masked)
    return loss


# ==== 9. Other strategies =========================================================================
# Each has the arguments of `sample_patches` and returns a ranking (B, N). `random_ranking`,
# `grid_wise` and `block_wise` use only the shape and the device of the weights.

def random_ranking(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Ranks uniformly at random: He et al., 2022 (MAE), Xie et al., 2022 (SimMIM)."""
    return sample_patches(torch.ones_like(weights), generator)


def highest_first(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Ranks the highest weight first: Kakogeorgiou et al., 2022 (AttMask)."""
    return weights.argsort(dim=1, descending=True, stable=True)


def lowest_first(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Ranks the lowest weight first: after Li et al., 2021 (MST), who sample some of the lowest."""
    return weights.argsort(dim=1, stable=True)


def grid_wise(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Ranks in a regular pattern: He et al., 2022.

    On an even grid, the first half of the ranking is a checkerboard. The last quarter is the bottom
    left patch of each 2 x 2 group, so with a mask ratio of 0.75 only that patch is visible.
    Raises ValueError if N is not a square number.
    """
    B, N = weights.shape
    h = square_side(N)
    patch = torch.arange(N, device=weights.device)
    odd_row = (patch // h) % 2
    odd_column = (patch % h) % 2
    quarter = 2 * (odd_row != odd_column) + odd_row      # 0 and 1: the checkerboard
    noise = torch.rand(B, N, generator=generator, device=weights.device)
    return (quarter + noise).argsort(dim=1)


def block_wise(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Ranks rectangle by rectangle: after Bao et al., 2022 (BEiT).

    Each rectangle has about 0.08 to 0.4 of the patches and an aspect ratio between 0.3 and 1 / 0.3.
    Within a rectangle, patches are ranked row by row.
    Raises ValueError if N is not a square number.
    """
    B, N = weights.shape
    h = square_side(N)
    R = 64                               # rectangles, enough to cover almost the whole image

    def rand() -> Tensor:
        return torch.rand(B, R, 1, generator=generator, device=weights.device)

    area = (0.08 + 0.32 * rand()) * N
    aspect = 0.3 ** (2 * rand() - 1)
    height = (area * aspect).sqrt().round().clamp(1, h)                      # (B, R, 1)
    width = (area / aspect).sqrt().round().clamp(1, h)
    top = (rand() * (h - height + 1)).floor()
    left = (rand() * (h - width + 1)).floor()
    patch = torch.arange(N, device=weights.device)
    row, column = patch // h, patch % h                                      # (N,)
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    rectangle = torch.arange(R, device=weights.device)[:, None]              # (R, 1)
    # A patch belongs to the first rectangle that contains it. Patches in no rectangle come last.
    first_rectangle = torch.where(inside, rectangle, R).amin(dim=1)          # (B, N)
    return first_rectangle.argsort(dim=1, stable=True)
