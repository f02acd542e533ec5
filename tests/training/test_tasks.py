"""The two tasks at toy size: exact resume, pure batches, what they export."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from apps.perceptual import load_st_lpips
from apps.stickers.scene import Placement, Scene, combinations, is_held_out
from apps.training.config import ConfigError
from apps.training.data.base import BatchAddress
from apps.training.data.config import Stage
from apps.training.data.stickers import ScenePool, StickerData, StickerSettings, box_mask, read_vocabulary
from apps.training.image_grid import save_grid
from apps.training.image_losses import perceptual_loss, psnr, reconstruction_loss, ssim
from apps.training.loop import Trainer, train
from apps.training.task import load_config
from apps.training.tokenizer import train_tokenizer
from dit.tokenizers import ViTAutoencoder
from dit.tokenizers.base import linear_preview
from tests.training.helpers import TINY_RUN, assert_learns, assert_resumes_exactly

AUTOENCODER = """
[task]
kind = "autoencoder"

[data]
resolution = 32
vocabulary_fraction = 0.5
validation_examples = 24
calibration_images = 64

[model]
latent_channels = 4
patch_size = 8
encoder_dim = 32
encoder_layers = 1
decoder_dim = 32
decoder_layers = 1
refiner_channels = 8
"""
TEXT_TO_IMAGE = """
[task]
kind = "text_to_image"
caption_dropout = 0.5
preview_steps = 1

[data]
vae = "VAE"
resolution = 32
pool_size = 48
tokenizer_captions = 50
validation_examples = 4

[[data.stages]]
until_step = 2
single = 1
pair = 0
count = 0
jitter = 0

[[data.stages]]
until_step = 4
single = 0
pair = 1
count = 0
jitter = 0.5

[[data.stages]]
until_step = 5
single = 0
pair = 0
count = 1
jitter = 1

[model]
patch_size = 2
num_layers = 1
num_attention_heads = 2
attention_head_dim = 16

[model.text]
vocab_size = 300
d_model = 16
d_kv = 8
d_ff = 16
num_layers = 1
num_heads = 2
"""


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    ViTAutoencoder(
        latent_channels=4, patch_size=8, encoder_dim=32, encoder_layers=1, decoder_dim=32, decoder_layers=1,
        refiner_channels=8, sample_size=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def configured(tmp_path, vae_folder):
    """Writes a task's tiny configuration and returns a loader that takes overrides."""

    def load(kind, *overrides, output="runs"):
        text = {"autoencoder": AUTOENCODER, "text_to_image": TEXT_TO_IMAGE.replace("VAE", str(vae_folder))}[kind]
        path = tmp_path / f"{kind}.toml"
        path.write_text(TINY_RUN + text)
        return load_config(path, [f'run.output="{tmp_path / output}"', *overrides])

    return load


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("autoencoder", "adamw"), ("autoencoder", "muon"), ("text_to_image", "muon")]
)
def test_resume_is_bit_identical(configured, tmp_path, kind, optimizer):
    name = f"optimizer.name={optimizer}"
    folder = assert_resumes_exactly(lambda output: configured(kind, name, output=output), 3)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "validation"] == [3, 6]
    assert (tmp_path / "whole/tiny/previews/step-000006.png").is_file()


def test_autoencoder_exports_calibrated_statistics(configured, tmp_path):
    trainer = Trainer(configured("autoencoder", "data.calibration_images=512"))
    trainer.run()
    vae = ViTAutoencoder.from_pretrained(tmp_path / "runs/tiny/export/vae").eval()
    stored = load_file(tmp_path / "runs/tiny/export/vae/diffusion_pytorch_model.safetensors")
    assert stored["patch_embed.weight"].dtype == torch.bfloat16
    assert stored["latent_norm.running_var"].dtype == torch.float32
    images = torch.cat([trainer.task.batch(index)["images"] for index in range(100, 228)])
    with torch.no_grad():
        latents = vae.encode(images).latent  # (512, 4, 4, 4)
        pixels = linear_preview(latents, vae.preview_factors)  # (512, 3, 16, 16)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    small = torch.nn.functional.interpolate(images, size=pixels.shape[-2:], mode="area")
    assert (pixels - small).square().mean() < 0.5 * small.var()  # the linear map explains most of the colours


def test_muon_takes_the_matrices_of_blocks_only(configured):
    trainer = Trainer(configured("text_to_image", "optimizer.name=muon", "optimizer.muon_learning_rate=2e-3"))
    muon, adamw = trainer.state.optimizer.optimizers
    names = {id(parameter): name for name, parameter in trainer.state.parameters.items()}
    inside = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    outside = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert sorted(inside + outside) == sorted(names.values())
    assert all("block" in name and trainer.state.parameters[name].ndim == 2 for name in inside)
    assert any(name.endswith("attn.to_q.weight") for name in inside)
    assert any("SelfAttention.q" in name for name in inside)
    assert not any("table" in name or "relative_attention_bias" in name for name in inside)
    trainer.run()
    assert muon.param_groups[0]["lr"] == pytest.approx(2 * adamw.param_groups[0]["lr"])


def test_training_the_decoder_leaves_the_codes_alone(configured, vae_folder, tmp_path):
    config = configured("autoencoder", f'data.init_from="{vae_folder}"', "task.train=decoder")
    before = ViTAutoencoder.from_pretrained(vae_folder).eval()
    trainer = Trainer(config)
    trainer.run()
    after = ViTAutoencoder.from_pretrained(tmp_path / "runs/tiny/export/vae", torch_dtype=torch.float32).eval()
    images = trainer.task.batch(50)["images"]
    with torch.no_grad():
        # Equal but for the rounding of the exported weights to bfloat16.
        torch.testing.assert_close(after.encode(images).latent, before.encode(images).latent, rtol=0.05, atol=0.05)
    assert torch.equal(after.latent_norm.running_var, before.latent_norm.running_var)
    assert not torch.equal(after.to_pixels.weight, before.to_pixels.weight.bfloat16().float())
    assert torch.equal(after.to_latent.weight, before.to_latent.weight.bfloat16().float())
    assert str(vae_folder) not in (tmp_path / "runs/tiny/export/vae/config.json").read_text()


def test_training_the_decoder_needs_a_start(configured):
    with pytest.raises(ConfigError, match=r"data\.init_from"):
        configured("autoencoder", "task.train=decoder")


def test_autoencoder_learns(configured):
    trainer = Trainer(configured("autoencoder", "run.steps=30", "optimizer.learning_rate=4e-3", "run.validate_every=0"))
    with torch.no_grad():
        before = trainer.task.validate()
    trainer.run()
    with torch.no_grad():
        after = trainer.task.validate()
    assert after["psnr"] > before["psnr"] + 1
    assert after["psnr_boxes"] > before["psnr_boxes"]


def test_text_to_image_exports_a_pipeline_to_start_from(configured, tmp_path):
    train(configured("text_to_image"))
    from pipelines import load_pipeline

    export = tmp_path / "runs/tiny/export"
    pipe = load_pipeline(str(export))
    pictures = pipe("a red apple", num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 32, 32, 3)
    assert (export / "vocabulary.txt").read_text().splitlines() == list(read_vocabulary("starter"))
    assert pipe.unknown_words("three crabs on teal") == ("teal",)
    assert pipe.scheduler.config.shift == 3.0
    assert pipe.tokenizer("").input_ids == [pipe.tokenizer.eos_token_id]

    again = Trainer(
        configured("text_to_image", f'data.init_from="{export}"', f'data.vae="{export}/vae"', output="again")
    )
    stored = load_file(export / "transformer/diffusion_pytorch_model.safetensors")
    started = again.task.transformer.state_dict()
    assert all(torch.equal(started[name], tensor.float()) for name, tensor in stored.items())
    assert next(again.task.transformer.parameters()).dtype == torch.float32


def test_batches_are_pure_and_follow_the_stages(configured):
    task = Trainer(configured("text_to_image")).task
    for index, kind in [(0, "single"), (1, "single"), (2, "pair"), (3, "pair"), (4, "count"), (9, "count")]:
        first, second = task.batch(index), task.batch(index)
        assert all(torch.equal(first[name], second[name]) for name in first)
        rows = (first["latents"][:, None] == task.latents.float()[None]).flatten(2).all(dim=2)
        assert all(task.pool.scenes[int(row.nonzero()[0])].kind == kind for row in rows)
    assert not torch.equal(task.batch(0)["noise"], task.batch(1)["noise"])


def test_a_network_is_trained_with_another_attention_and_exported_with_it(configured, tmp_path):
    chosen = ["model.attention=moh", "model.attention_params={shared=1,routed=1}"]
    assert_learns(Trainer(configured("text_to_image", "task.caption_dropout=0", *chosen)).task, steps=30)
    train(configured("text_to_image", *chosen))
    from pipelines import load_pipeline

    attn = load_pipeline(str(tmp_path / "runs/tiny/export")).transformer.transformer_blocks[0].attn
    assert attn.processor.name == "moh"
    assert attn.wg.weight.shape == (1, 32)
    with pytest.raises(ConfigError, match="there is no attention 'mho'"):
        configured("text_to_image", "model.attention=mho")


def test_same_scene_gets_fresh_captions(configured):
    task = Trainer(
        configured("text_to_image", "task.caption_dropout=0", "data.pool_size=16", "data.stages=[{until_step=1}]")
    ).task
    texts = {tuple(row.tolist()) for index in range(6) for row in task.batch(index)["input_ids"]}
    assert len(texts) > 8


def test_latent_cache_is_reused_and_keyed_by_the_scenes(configured, tmp_path):
    Trainer(configured("text_to_image"))
    (cache,) = (tmp_path / "runs").glob("latents-*.safetensors")
    written = cache.stat().st_mtime_ns
    Trainer(configured("text_to_image"))
    assert cache.stat().st_mtime_ns == written
    Trainer(configured("text_to_image", "run.seed=1"))
    assert len(list((tmp_path / "runs").glob("latents-*.safetensors"))) == 2


def test_pool_keeps_to_the_training_split_and_the_jitter():
    data, address = StickerData(StickerSettings(), 32), BatchAddress(0, 0, 200)
    pool = data.pool(60, [Stage(until_step=1, jitter=0), Stage(until_step=2, jitter=1)], seed=0)
    assert not any(is_held_out(*each) for scene in pool.scenes for each in combinations(scene, data.sheet))
    calm = Stage(until_step=1, single=1, pair=1, count=0, jitter=0.5)
    drawn = pool.draw(address, np.random.default_rng(0), calm)
    assert (drawn % 2 == 0).all(), "the jitter levels take turns"
    assert {pool.scenes[row].kind for row in drawn} == {"single", "pair"}
    singles = ScenePool([scene for scene in pool.scenes if scene.kind == "single"], np.zeros(60), data)
    with pytest.raises(ValueError, match="no pair scene"):
        singles.draw(address, np.random.default_rng(0), Stage(until_step=1, single=0, pair=1, count=0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.vocabulary=starters", "starter, common, all, or a text file"),
        ("data.stages=[{until_step=5}, {until_step=3}]", "ascending order"),
        ("data.vae=nowhere", "no config.json"),
        ("data.stages=[{until_steps=5}]", "did you mean 'until_step'?"),
        ("model.text.d_modell=8", "did you mean 'd_model'?"),
    ],
)
def test_errors_say_the_remedy(configured, override, message):
    with pytest.raises(ConfigError) as caught:
        Trainer(configured("text_to_image", override))
    assert message in str(caught.value)


def test_shipped_configurations_are_valid():
    from pathlib import Path

    import apps.training

    paths = sorted((Path(apps.training.__file__).parent / "configs").glob("*.toml"))
    assert {path.stem for path in paths} >= {"smoke", "stickers", "stickers_autoencoder"}
    for path in paths:
        assert load_config(path, []).run.name == path.stem


def slow_ssim(first, second, stride, window=7):
    """The formula of Wang et al. 2004, one window at a time."""
    c1, c2, values = 0.02**2, 0.06**2, []
    for x, y in zip(first.reshape(-1, *first.shape[2:]), second.reshape(-1, *second.shape[2:]), strict=True):
        for row in range(0, x.shape[0] - window + 1, stride):
            for column in range(0, x.shape[1] - window + 1, stride):
                a = x[row : row + window, column : column + window].astype(np.float64).ravel()
                b = y[row : row + window, column : column + window].astype(np.float64).ravel()
                (va, cov), (_, vb) = np.cov(a, b, bias=True)
                top = (2 * a.mean() * b.mean() + c1) * (2 * cov + c2)
                values.append(top / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_equals_the_slow_formula():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 20, 16, generator=generator) * 2 - 1
    other = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    for stride in (1, 4):
        expected = slow_ssim(other.numpy(), images.numpy(), stride)
        assert ssim(other.double(), images.double(), stride=stride) == pytest.approx(expected, abs=1e-6)
    assert ssim(images, images) == pytest.approx(1.0, abs=1e-5)
    loss, parts = reconstruction_loss(other, images, 0.5)
    assert loss == pytest.approx(float(parts["charbonnier"] + 0.5 * (1 - parts["ssim"])))


def test_perceptual_loss_compares_one_square_and_reaches_the_decoded_images():
    network = load_st_lpips()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 48, 40, generator=generator) * 2 - 1
    decoded = images.clone()
    decoded[..., 24:, :] *= -1
    decoded.requires_grad_()
    torch.manual_seed(0)
    assert perceptual_loss(network, images, images, 32) == 0
    whole = perceptual_loss(network, decoded, images, 64)  # larger than the images: all of them
    assert whole.item() == pytest.approx(network(decoded, images).mean().item())
    perceptual_loss(network, decoded, images, 32).backward()
    touched = decoded.grad.abs().sum((0, 1)) > 0  # (48, 40)
    assert touched.any()
    assert touched.any(1).sum() <= 32
    assert touched.any(0).sum() <= 32


def test_autoencoder_trains_with_the_perceptual_loss(configured):
    settings = ("task.perceptual_weight=0.5", "task.perceptual_crop=32", "run.steps=2", "run.validate_every=0")
    trainer = Trainer(configured("autoencoder", *settings))
    loss, parts = trainer.task.loss(trainer.task.batch(0))
    expected = parts["charbonnier"] + 0.5 * parts["perceptual"] + 0.1 * (1 - parts["ssim"])
    assert loss.item() == pytest.approx(expected.item())
    assert trainer.run() == "finished"


def test_psnr_of_a_constant_error():
    assert psnr(0.04) == pytest.approx(20.0)


def test_box_mask_covers_the_sticker_and_little_else():
    scene = Scene("single", (Placement(0, 0.5, 0.25, 0.5),), 0, (0,))
    mask = box_mask([scene], 32)
    assert mask.shape == (1, 1, 32, 32)
    assert mask[0, 0, :16, 8:24].all()
    assert int(mask.sum()) == 16 * 16


def test_grid_lays_pictures_out_in_rows(tmp_path):
    from PIL import Image

    colours = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    save_grid(colours, tmp_path / "grid.png", columns=2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (8, 8, 3)
    assert [int(pixels[y, x, 0]) for y, x in ((0, 0), (0, 7), (7, 0))] == [0, 128, 255]


def test_tokenizer_reads_anything(tmp_path):
    tokenizer = train_tokenizer(["a red apple on white", "two buses"] * 10, vocab_size=300, max_length=16)
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a red apple", "zyx \u65e5\u672c \U0001f34e", ""):
        ids = again(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert ids[-1] == again.eos_token_id
        assert again.decode(ids, skip_special_tokens=True).strip() == text
    assert again("A Red APPLE").input_ids == again("a red apple").input_ids
    assert again("").input_ids == [1]


def test_smoke_rehearses_beside_the_run(tmp_path, vae_folder):
    from apps.commands.train import run

    path = tmp_path / "real.toml"
    path.write_text((TINY_RUN + TEXT_TO_IMAGE).replace("VAE", str(vae_folder)))
    run(path, [f'run.output="{tmp_path}"'], smoke=True)
    state = json.loads((tmp_path / "tiny-smoke/checkpoint-000002/state.json").read_text())
    assert state["config"]["data"]["pool_size"] == 64
    assert (tmp_path / "tiny-smoke/export/model_index.json").is_file()
    assert not (tmp_path / "tiny").exists()
