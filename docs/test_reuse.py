"""Runs each block of docs/reuse.md, and those of README.md, against the real library.

Started by `python -m pytest -q`, from the root or from here. Tests of a library that is not
installed (timm, lightly, transformers) are skipped.
"""
import os
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""                   # the tests compare results of the CPU
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                             # where amt.py is

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import amt

torch.set_num_threads(1)

SIZES = dict(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=2e-6)

def run_blocks(*marks, page="docs/reuse.md"):
    """Runs the Python blocks that contain these words, in order, and returns their names."""
    blocks = re.findall("```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names = {}
    for mark in marks:
        block, = [block for block in blocks if mark in block]
        exec(block, names)
    return SimpleNamespace(**names)

# ==== Models of others ============================================================================
# Each of these functions takes a model of another library, with the block of the page that makes it
# throw patches, and our model with the same weights. It returns the other's forward (images,
# visible, masked) -> (loss, pred), what makes its attention maps, and our model.

def copy_weights(port, ours, new_names, left_out=()):
    """Gives our model the port's weights. `new_names` are patterns and what replaces them."""
    state = {}
    for name, p in port.named_parameters():
        p.data += 0.1 * torch.randn(p.shape)              # zeros and ones would hide mistakes
        if name in left_out:
            continue
        for pattern, new in new_names.items():
            name = re.sub(pattern, new, name)

        if name in state:                                 # queries, keys and values become qkv
            state[name] = torch.cat([state[name], p.data])
        else:
            state[name] = p.data
    ours.load_state_dict(state)

def timm_encoder():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(**SIZES, num_classes=0)
    port = amt.MAE(run_blocks("class Encoder").Encoder(vit), 16, 2, 2)
    ours = amt.MAE(amt.ViT(**SIZES), 16, 2, 2)
    copy_weights(port, ours, {"encoder.vit": "encoder"})

    def forward(images, visible, masked):
        return port(images, visible=visible, masked=masked)

    return forward, port.encoder, ours

def lightly_mae():
    timm = pytest.importorskip("timm")
    modules = pytest.importorskip("lightly.models.modules")
    vit = timm.models.VisionTransformer(**SIZES, num_classes=0)

    class Port(run_blocks("class AMTForMAE").AMTForMAE, nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_size = 4
            self.backbone = modules.MaskedVisionTransformerTIMM(vit)
            self.decoder_embed = nn.Linear(24, 16)
            self.decoder = modules.MaskedVisionTransformerDecoderTIMM(16, 16, depth=2, num_heads=2)
            self.prediction_head = nn.Linear(16, 48)

    port, ours = Port(), amt.MAE(amt.ViT(**SIZES), 16, 2, 2)
    copy_weights(port, ours, {
        "backbone.vit": "encoder",
        "prediction_head": "decoder_pred",
        r"decoder\.(pos|blocks|norm)": r"decoder_\1",
        r"decoder\.mask": "mask",
    }, left_out=["backbone.mask_token"])

    def forward(images, visible, masked):
        pred, target = port(images, visible, masked)
        return F.mse_loss(pred, target), pred

    return forward, partial(run_blocks("class Encoder").cls_attention, vit.eval()), ours

def lightly_simmim():
    modules = pytest.importorskip("lightly.models.modules")
    vit = torchvision.models.VisionTransformer(16, 4, 3, 2, 24, 96)
    vit.heads = nn.Identity()

    class Port(run_blocks("class AMTForSimMIM").AMTForSimMIM, nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_size = 4
            self.backbone = modules.MaskedVisionTransformerTorchvision(vit)
            self.decoder = nn.Linear(24, 48)

    port, ours = Port(), amt.SimMIM(amt.ViT(**SIZES))
    copy_weights(port, ours, {
        "backbone.mask": "mask",
        "decoder": "head",
        "backbone.vit": "encoder",
        "encoder.encoder": "encoder",
        "conv_proj": "patch_embed.proj",
        "class_token": "cls_token",
        "pos_embedding": "pos_embed",
        "layers.encoder_layer_": "blocks.",
        "encoder.ln": "encoder.norm",
        "ln_": "norm",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    })

    def forward(images, visible, masked):
        pred, target = port(images, visible, masked)
        return F.l1_loss(pred, target), pred

    return forward, port.cls_attention, ours

def hugging_faces_vitmae():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
                 decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_intermediate_size=64,
                 decoder_num_attention_heads=2, layer_norm_eps=1e-6, norm_pix_loss=True)
    with pytest.MonkeyPatch.context() as patch:           # the block makes a large model
        small = partial(transformers.ViTMAEConfig, **sizes)
        patch.setattr(transformers, "ViTMAEConfig", small)
        names = run_blocks("class AMTViTMAE")
    port = names.mae
    ours = amt.MAE(amt.ViT(224, 16, 24, 3, 2), 16, 2, 2, norm_pix_loss=True)

    # The noise of the block masks the top of our ranking, and the positions are ours.
    masked, _, _ = amt.mask_and_throw(names.ranking, 0.75)
    noise = names.ranking.flip(1).argsort(1).float()
    mask = port(names.images, noise=noise).mask
    assert torch.equal(mask, torch.zeros(2, 196).scatter(1, masked, 1.0))
    assert torch.equal(port.vit.embeddings.position_embeddings, ours.encoder.pos_embed)
    assert torch.equal(port.decoder.decoder_pos_embed, ours.decoder_pos_embed)

    copy_weights(port, ours, {
        "vit.embeddings": "encoder",
        "patch_embeddings.projection": "patch_embed.proj",
        "position_embeddings": "pos_embed",
        "^vit": "encoder",
        "layers": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "layernorm": "norm",
        "attention": "attn",
        "[qkv]_proj": "qkv",
        "o_proj": "proj",
        r"decoder\.(decoder|mask)": r"\1",
    })

    def forward(images, visible, masked):
        out = port(images, visible=visible, masked=masked)
        return out["loss"], out["logits"]

    return forward, port, ours

def he_et_als_mae():
    timm = pytest.importorskip("timm")
    VisionTransformer = timm.models.VisionTransformer

    class MaskedAutoencoderViT(VisionTransformer):        # a stand-in with the names of their class
        norm_pix_loss = True
        patchify = partial(amt.patchify, patch_size=4)

        def __init__(self):
            super().__init__(**SIZES, num_classes=0)
            sizes = SIZES | dict(embed_dim=16, depth=2)
            decoder = VisionTransformer(**sizes, num_classes=0)
            self.decoder_embed = nn.Linear(24, 16)
            self.mask_token = decoder.cls_token
            self.decoder_pos_embed = decoder.pos_embed
            self.decoder_blocks = decoder.blocks
            self.decoder_norm = decoder.norm
            self.decoder_pred = nn.Linear(16, 48)

    with pytest.MonkeyPatch.context() as patch:
        module = SimpleNamespace(MaskedAutoencoderViT=MaskedAutoencoderViT)
        patch.setitem(sys.modules, "models_mae", module)
        port = run_blocks("class AMTMAE").AMTMAE()
    ours = amt.MAE(amt.ViT(**SIZES), 16, 2, 2, norm_pix_loss=True)
    copy_weights(port, ours, {"^(cls|pos|patch|blocks|norm)": r"encoder.\1"})
    return port, port, ours

@pytest.mark.parametrize("models", [timm_encoder, lightly_mae, lightly_simmim,
                                    hugging_faces_vitmae, he_et_als_mae])
def test_a_port_is_our_model_and_never_sees_thrown_patches(models):
    torch.manual_seed(0)
    forward, attend, ours = models()
    vit = ours.encoder
    images = torch.randn(3, 3, vit.img_size, vit.img_size)
    ranking = torch.rand(3, vit.grid_size ** 2).argsort(1)
    masked, thrown, visible = amt.mask_and_throw(ranking, 0.45, 0.40)

    expected = ours(images, visible=visible, masked=masked)
    assert_close(tuple(forward(images, visible, masked)), expected)
    assert_close(amt.attention_maps(attend, images), amt.attention_maps(vit, images))

    # The page's own check passes, and finds a single thrown patch that is left in.
    check = run_blocks("def check").check
    check(lambda x: forward(x, visible, masked), images, masked, thrown, vit.patch_size)
    leaky = torch.cat([visible, thrown[:, :1]], dim=1)
    with pytest.raises(AssertionError):
        check(lambda x: forward(x, leaky, masked), images, masked, thrown, vit.patch_size)

# ==== The other blocks ============================================================================

def test_the_loader_gives_the_theta_of_its_crop(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    ramp = Image.linear_gradient("L")
    image = Image.merge("RGB", [ramp, ramp.rotate(90), ramp])
    image.resize((320, 200)).save(tmp_path / "a/0.png")
    monkeypatch.setattr(torchvision.transforms, "ColorJitter", lambda *x: nn.Identity())
    names = run_blocks("class Images")
    (_, whole), = names.Images(tmp_path, names.whole)
    for seed in range(4):                                 # flipped and not
        torch.manual_seed(seed)
        i, crop, theta = names.Images(tmp_path)[0]
        ours = amt.crop(whole[None], theta[None], 224, "bicubic")
        assert i == 0
        assert_close(crop[None], ours, atol=0.05)

def test_the_loop_makes_maps_and_throws_from_its_second_part_on(tmp_path, monkeypatch):
    names = run_blocks("class Images", "def train")
    mae = amt.MAE(amt.vit_tiny(depth=1, img_size=32, patch_size=8), 16, 1, 1)
    images, theta = torch.randn(2, 3, 32, 32), amt.random_crops(2)
    crops = [(torch.arange(2), images, theta)]
    wholes = [(torch.arange(2), images)]
    mask_and_throw, ratios = amt.mask_and_throw, []

    def noting(ranking, *given):
        ratios.append(given)
        return mask_and_throw(ranking, *given)

    monkeypatch.setattr(amt, "mask_and_throw", noting)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        optimizer = torch.optim.AdamW(mae.parameters())
        names.train(mae, mae.encoder, optimizer, crops, wholes, 2, epochs=2, device="cpu")
    finally:
        torch.distributed.destroy_process_group()
    assert ratios == [(0.75, 0.0), (0.45, 0.40)]

@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"])
def test_the_hook_reads_the_attention_of_timms_vits(name):
    timm = pytest.importorskip("timm")
    vit = timm.create_model(name, img_size=112, depth=2).eval()
    images, mixed = torch.randn(2, 3, 112, 112), []
    vit.blocks[-1].attn.proj.register_forward_pre_hook(lambda module, x: mixed.append(x[0]))
    names = run_blocks("class Encoder")
    with torch.no_grad():
        a = names.cls_attention(vit, images)
        tokens = vit.forward_features(images)
    assert a.shape[2] == vit.patch_embed.num_patches
    assert a.sum(2).max() < 1                             # [CLS] attends to itself as well
    written_out, fused = mixed
    assert_close(written_out, fused, atol=1e-5)

    if "reg4" in name:                                    # [CLS], then four registers
        every = torch.arange(a.shape[2]).expand(2, -1)
        with torch.no_grad():
            x = names.Encoder(vit)(images, every)
        assert_close(x[:, 1:], tokens[:, 5:], atol=1e-5)

def test_timms_checkpointing_recomputes_the_blocks_and_changes_no_gradient():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(**SIZES, num_classes=0)
    encoder, calls, gradients = run_blocks("class Encoder").Encoder(vit), [], []
    vit.blocks[1].register_forward_pre_hook(lambda module, x: calls.append(len(gradients)))
    images = torch.randn(2, 3, 16, 16)
    visible = torch.tensor([[3, 1], [0, 2]])
    for enable in (False, True):
        vit.set_grad_checkpointing(enable)
        vit.zero_grad()
        encoder(images, visible).square().mean().backward()
        gradients.append(vit.patch_embed.proj.weight.grad.clone())
    assert calls == [0, 1, 1]
    assert_close(gradients[0], gradients[1])

def test_timms_encoder_refuses_what_is_not_square():
    timm = pytest.importorskip("timm")
    Encoder = run_blocks("class Encoder").Encoder
    vit = timm.models.VisionTransformer(**SIZES | dict(img_size=(16, 8)), num_classes=0)
    with pytest.raises(ValueError, match="16x8"):
        Encoder(vit)

def test_maps_of_a_teacher():
    pytest.importorskip("timm")
    assert run_blocks("class Encoder", "teacher =").maps.shape == (2, 16, 16)

def test_maps_from_outside():
    maps = run_blocks("masks[").maps
    theta = torch.eye(2, 3).expand(8, -1, -1)
    weights = amt.crop_weights(maps, theta, 224, 16).unflatten(1, (14, 14))
    assert weights[:, 4:8, 6:14].mean() > 10 * weights[:, 10:].mean() > 0

def test_the_table_of_indices():
    page = (ROOT / "docs/reuse.md").read_text()
    rows = page.split("| your project takes")[1].split("\n\n")[0].splitlines()[2:]
    cells = [", ".join(re.findall("`(.*?)`", row.split("|")[2])) for row in rows]
    ranking = torch.rand(2, 16).argsort(1)
    masked, _, visible = amt.mask_and_throw(ranking, 0.75)
    prefix = torch.arange(3).expand(2, 3)
    names = dict(B=2, N=16, P=3, T=2, prefix=prefix, ranking=ranking, masked=masked,
                 visible=visible, torch=torch)
    noise, (keep, mask), _, boolean, tubes = (eval(cell, names) for cell in cells)

    assert torch.equal(noise.argsort(1)[:, :4].sort(1)[0], visible.sort(1)[0])
    assert torch.equal(keep, torch.cat([prefix, visible + 3], 1))
    assert torch.equal(mask, masked + 3)
    assert torch.equal(boolean.nonzero()[:, 1].view(2, -1), masked.sort(1)[0])
    assert torch.equal(tubes, torch.cat([masked, masked + 16], 1))

def save_run(folder, encoder):
    """What a run of train_cifar.py leaves of an encoder."""
    folder.mkdir()
    torch.save(encoder.state_dict(), folder / "encoder.pth")
    data = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3], classes=["a", "b"])
    torch.save({"data": data}, folder / "checkpoint.pth")

def test_the_encoder_afterwards_has_our_features(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    encoder = amt.vit_tiny(img_size=32, patch_size=4)
    save_run(tmp_path / "out", encoder)
    Image.new("RGB", (50, 40), (102, 255, 0)).save("photo.jpg", quality=100)
    names = run_blocks("photo.jpg")
    assert_close(names.image[0, :, 9, 9], torch.tensor([0, 2.5, -2]), atol=0.03)
    expected = encoder(names.image)[:, 1:].mean(1).detach()
    assert_close(names.features, expected, atol=1e-5)

# ==== README.md ===================================================================================

def test_the_readmes_step_runs_and_says_its_numbers():
    torch.manual_seed(0)
    names = run_blocks("dataset_maps", page="README.md")
    names.loss.backward()
    sets = names.masked, names.thrown, names.visible
    assert [ids.shape[1] for ids in sets] == [29, 26, 9]
    assert names.maps.shape == (64, 8, 8)
    assert 1.6 < names.loss.item() < 3.1

def test_the_readmes_encoder_loads_into_timm(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    encoder = amt.vit_tiny(img_size=32, patch_size=4, depth=3)
    save_run(tmp_path / "out-shapes", encoder)
    names = run_blocks("encoder.pth", page="README.md")
    images = torch.randn(2, 3, 32, 32)
    tokens = names.vit.eval().forward_features(images)
    assert_close(tokens, encoder(images), atol=1e-4)
    assert names.data["mean"] == [0.4, 0.5, 0.6]

# ==== Export ======================================================================================

def test_an_exported_encoder_takes_any_number_of_images():
    vit = amt.ViT(**SIZES)
    batch = {"images": {0: torch.export.Dim("B")}}
    images = torch.randn(5, 3, 16, 16)
    exported = torch.export.export(vit, (images[:3],), dynamic_shapes=batch)
    assert_close(exported.module()(images), vit(images))
