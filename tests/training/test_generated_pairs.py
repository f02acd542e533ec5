"""Decoders that learn from generated latents: their targets, and training on them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apps.stickers import render
from apps.training import generated_pairs
from apps.training.config import ConfigError
from apps.training.data.base import VALIDATION_SEED
from apps.training.data.stickers import StickerData, StickerSettings
from apps.training.generated_pairs import cached_pairs, generate_pairs
from apps.training.loop import Trainer
from pipelines.text_to_image import TextToImagePipeline
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.training.test_tasks import configured, vae_folder  # noqa: F401 (fixtures)

DATA = StickerData(StickerSettings(), 128)


class PerfectPipe:
    """A pipeline that renders what is asked for, and whose latents are the images; the first three are negatives."""

    vae = SimpleNamespace(decode=lambda z: SimpleNamespace(sample=z))

    def __call__(self, captions, generator, output_type):
        assert output_type == "latent"
        assert len(generator) == len(captions)
        scenes = [DATA.sampler.scene(VALIDATION_SEED + 3 + 7, number) for number in range(len(captions))]
        images = render(scenes, DATA.sheet, 128)
        images[:3] *= -1
        return SimpleNamespace(images=images)


def test_targets_are_the_best_renderings_and_wrong_images_have_none() -> None:
    pairs = generate_pairs(PerfectPipe(), DATA, 12, seed=7, quiet=True)
    assert len(pairs) == 9
    assert pairs.fidelity.min() > 35
    targets = pairs.images(range(9))
    error = (targets - pairs.latents.float()).square().mean((1, 2, 3))
    assert error.max() < 2e-3
    assert np.isin(pairs.placements[..., 0].numpy(), [-1, *DATA.sampler.sprites]).all()


@pytest.fixture
def generator_folder(tmp_path, vae_folder, monkeypatch):  # noqa: F811
    """Return the folder of an untrained pipeline around the tiny autoencoder; all that it makes counts as right."""
    from dit.models.text_dit import TextDiT
    from dit.tokenizers import ViTAutoencoder

    monkeypatch.setattr(generated_pairs, "LEAST_FIDELITY", -100.0)
    pipe = tiny_text_to_image_pipeline()
    parts = {**pipe.components, "vae": ViTAutoencoder.from_pretrained(vae_folder)}
    parts["transformer"] = TextDiT(
        in_channels=4, sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        text_dim=pipe.text_encoder.config.d_model,
    )  # fmt: skip
    TextToImagePipeline(**parts, defaults={"num_inference_steps": 1, "guidance_scale": 1.0}).save_pretrained(
        tmp_path / "generator"
    )
    return tmp_path / "generator"


def test_a_decoder_trains_on_generated_latents(configured, vae_folder, generator_folder, tmp_path) -> None:  # noqa: F811
    settings = (f'data.init_from="{vae_folder}"', "task.train=decoder", "run.steps=2", "run.batch_size=4")
    generated = (f'data.generated_from="{generator_folder}"', "data.generated_images=6", "task.generated_fraction=0.5")
    trainer = Trainer(configured("autoencoder", *settings, *generated))
    batch = trainer.task.batch(0)
    assert batch["images"].shape[0] == 4
    assert batch["generated"].shape == (2, 4, 4, 4)
    again = trainer.task.batch(0)
    assert torch.equal(batch["generated"], again["generated"])
    assert torch.equal(batch["images"], again["images"])
    assert trainer.run() == "finished"
    files = list((tmp_path / "runs").glob("pairs-*.safetensors"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    pipe = generated_pairs.load_generator(generator_folder, torch.device("cpu"))
    kept = cached_pairs(pipe, trainer.task.data, 6, trainer.config.run.seed, tmp_path / "runs")
    assert files[0].stat().st_mtime_ns == stamp
    assert torch.equal(kept.latents, trainer.task.pairs.latents)


def test_a_generator_of_other_codes_is_refused(configured, vae_folder, generator_folder, tmp_path) -> None:  # noqa: F811
    from dit.tokenizers import ViTAutoencoder

    other = ViTAutoencoder.from_pretrained(vae_folder)
    torch.nn.init.normal_(other.to_latent.weight, generator=torch.Generator().manual_seed(3))
    other.save_pretrained(generator_folder / "vae")
    settings = (f'data.init_from="{vae_folder}"', "task.train=decoder", f'data.generated_from="{generator_folder}"')
    with pytest.raises(ConfigError, match="codes of another encoder"):
        Trainer(configured("autoencoder", *settings))
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        Trainer(configured("autoencoder", *settings[:2], f'data.generated_from="{tmp_path}"'))


def test_generated_latents_fit_one_encoder_only(configured) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r'generated_from needs task\.train = "decoder"'):
        configured("autoencoder", 'data.generated_from="somewhere"')
