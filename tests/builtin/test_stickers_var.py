"""The built-in next-scale model: it is small, and generates what it is asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines
from apps.service.engine import Engine
from apps.service.events import Picture
from apps.service.requests import NextScaleTextRequest
from apps.stickers.captions import caption
from apps.stickers.judge import Judge, score
from apps.stickers.renderer import render
from apps.stickers.scene import SceneMix, SceneSampler
from apps.stickers.sprites import load_sprites
from apps.stickers.vocabulary import STARTER
from pipelines import builtin_models, load_pipeline
from sampling.inference_search import TTSConfig
from sampling.rewards import as_reward

FOLDER = Path(pipelines.__file__).parent / "pretrained" / "stickers-var"
MIB = 2**20


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline("stickers-var", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def scenes_of(kind, count, names=None):
    names = names or (FOLDER / "vocabulary.txt").read_text().splitlines()
    mix = SceneMix(**{name: float(name == kind) for name in ("single", "pair", "count")})
    sampler = SceneSampler(load_sprites(), names, mix=mix)
    return [sampler.scene(2**42, index) for index in range(count)], sampler, names


def test_it_is_listed_and_small():
    assert "stickers-var" in builtin_models()
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 10 * MIB


def test_its_scorer_chooses_among_candidates(pipe):
    """It knows the starter stickers, numbers and colours; which of two stands left it does not, see the card."""
    scenes = scenes_of("single", 12, STARTER)[0]
    sheet = load_sprites()
    pictures = render(scenes, sheet, 128) / 2 + 0.5
    reward = as_reward(pipe.scorer)
    right = [f"a {sheet.names[scene.sprites[0]]}" for scene in scenes]
    wrong = [*right[1:], right[0]]
    assert (reward(pictures, right) > reward(pictures, wrong)).float().mean() >= 0.9

    config = TTSConfig(method="best_of", batch_sizes=3)
    found = pipe("a red apple on white", generator=seeds(1)[0], search=config, output_type="pt")
    (result,) = found.search
    assert result.rewards.tolist() == sorted(result.rewards.tolist(), reverse=True)
    assert torch.allclose(found.images[0].cpu(), result.images[0], atol=1 / 255)
    assert result.token_cost == pytest.approx(3)


@pytest.mark.parametrize(("kind", "metric"), [("single", "recall"), ("pair", "relation"), ("count", "count")])
def test_paints_what_is_asked(pipe, kind, metric):
    """Sixteen prompts of each kind; the shares over 200 are in the model card."""
    sheet, rng = load_sprites(), np.random.default_rng(5)
    scenes, _, names = scenes_of(kind, 16)
    prompts = [caption(scene, sheet, rng, synonyms=0, vocabulary=names) for scene in scenes]
    pictures = pipe(prompts, generator=seeds(*range(16)), output_type="pt").images * 2 - 1
    scores = [score(scene, read) for scene, read in zip(scenes, Judge(sheet).read(pictures), strict=True)]
    assert sum(found[metric] for found in scores) >= 11
    assert sum(found["colour"] for found in scores) >= 14


def test_same_seed_same_picture_whatever_the_batch(pipe):
    prompts = ["a red apple on white", "two ghost stickers on blue"]
    together = pipe(prompts, generator=seeds(3, 4), output_type="pt").images
    alone = pipe(prompts[1], generator=seeds(4), output_type="pt").images
    assert torch.allclose(together[1:], alone, atol=1e-3)


def test_the_codes_are_used():
    """A running average of training: hardly any entry of the codebook lies idle."""
    pipe = load_pipeline("stickers-var", device="cpu")
    scenes = [scene for kind in ("single", "pair", "count") for scene in scenes_of(kind, 60)[0]]
    codes = pipe.vae.quantize(render(scenes, load_sprites(), 128)).indices
    used = torch.cat([tokens.flatten() for tokens in codes]).unique()
    assert len(used) >= 0.93 * pipe.vae.config.vocab_size  # 95 % of 1024 takes some 50,000 tokens; these are 28,440


def test_kept_pixels_of_inpainting_are_the_pictures_own(pipe, tmp_path):
    engine = Engine({"stickers-var": "stickers-var"}, tmp_path, device="cpu", load=lambda source: pipe)
    assert engine.model().result(60).can_search  # so the studio offers it
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    ids = {"image": engine.uploads.add(picture), "mask": engine.uploads.add(mask)}
    told = list(engine.generate(NextScaleTextRequest(prompt="a pizza on a blue background", seed=3, **ids)))
    painted = next(event for event in told if isinstance(event, Picture))
    with Image.open(painted.path) as image:
        before, after, marked = np.asarray(picture), np.asarray(image.convert("RGB")), np.asarray(mask) > 0
    assert (after[~marked] == before[~marked]).all()
    assert (after[marked] != before[marked]).mean() > 0.9
    engine.close()
