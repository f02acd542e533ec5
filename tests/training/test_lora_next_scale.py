"""Adapters on models that generate scale by scale: one image is learned, and the file does the same elsewhere."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from apps.commands.train_lora import make_config
from apps.training.config import ConfigError
from apps.training.task import TaskContext, task_class
from apps.training.tasks import adapters
from apps.training.tasks.lora import LoraTask
from apps.training.tasks.lora_config import LoraConfig
from apps.training.tasks.lora_next_scale import LoraNextScaleConfig, LoraNextScaleTask
from dit.lora.adapters import adapter_layers
from pipelines import NextScaleClassToImagePipeline, load_lora, unload_lora
from tests.families.tiny import tiny_pipeline
from tests.models import tiny_next_scale
from tests.pipes.test_next_scale_text import of_bits, of_entries, stirred
from tests.training.helpers import assert_resumes_exactly

CAPTIONS = {"classes": "3", "entries": "a red cat", "bits": "a red cat"}
BUILDERS = {
    "classes": lambda: NextScaleClassToImagePipeline(
        stirred(tiny_next_scale.transformer()), tiny_next_scale.tokenizer()
    ),
    "entries": of_entries,
    "bits": of_bits,
}


def images(folder, name, count=1):
    """Images of noise with a caption each, or a class."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype("uint8")).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(CAPTIONS[name])


def config_of(name, folder, config_class=LoraNextScaleConfig, **sections):
    """A configuration of a run on one image."""
    square = next((wide for wide, high in BUILDERS[name]().info().sizes if wide == high), None)
    given = {
        "run": {"name": name, "output": str(folder / "runs"), "batch_size": 1, "num_threads": 1},
        "task": {"kind": "lora_next_scale", "score_images": 0, "preview_images": 1},
        "data": {"folder": str(folder / "images"), "resolution": square, "caption_dropout": 0.0},
        "model": {"pretrained": name},
        "lora": {"rank": 4, "layers": ["all"]},
    }
    return config_class.model_validate({key: {**value, **sections.get(key, {})} for key, value in given.items()})


CONTEXT = TaskContext(torch.device("cpu"), 0, 1, contextlib.nullcontext, contextlib.nullcontext)


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Models by the names of `BUILDERS`, instead of folders."""
    monkeypatch.setattr(adapters, "load_pipeline", lambda name, **_: BUILDERS[name]())


@pytest.fixture(params=BUILDERS)
def task(request, tmp_path):
    images(tmp_path, request.param)
    return LoraNextScaleTask(config_of(request.param, tmp_path), CONTEXT)


def logits_of(pipe, group):
    with torch.no_grad():
        network = pipe.transformer.eval()
        grids = None if network.pos_embed is not None else group["grids"]
        return network(group["inputs"], **group["conditions"], grids=grids).sample


def test_one_image_is_learned_and_a_fresh_pipeline_does_the_same(task, tmp_path):
    name = task.config.model.pretrained
    before = {key: one.clone() for key, one in BUILDERS[name]().transformer.state_dict().items()}
    parameters = [one for one in task.network.parameters() if one.requires_grad]
    optimizer, batch, losses = torch.optim.AdamW(parameters, 2e-2), task.batch(0), []
    for _ in range(50):
        loss, _ = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], (losses[0], losses[-1])
    now = task.network.state_dict()
    base = {key.replace(".base_layer", ""): one for key, one in now.items() if "lora_" not in key}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[key], one) for key, one in before.items())

    task.export(tmp_path / "export")
    (group,) = batch["groups"]
    group["grids"] = task.inputs.schedule(group["bucket"])
    learned, painted = logits_of(task.pipe, group), task.generate(CAPTIONS[name], 0)
    fresh = BUILDERS[name]()
    plain = logits_of(fresh, group)
    for load in (fresh.load_lora_weights, lambda folder: load_lora(fresh, folder)):
        load(tmp_path / "export")
        torch.testing.assert_close(logits_of(fresh, group), learned, atol=1e-5, rtol=1e-5)
        task.pipe = fresh
        torch.testing.assert_close(task.generate(CAPTIONS[name], 0), painted, atol=1e-5, rtol=1e-5)
        unload_lora(fresh)
        assert torch.equal(logits_of(fresh, group), plain)
    assert not torch.allclose(plain, learned, atol=1e-2)


def test_batches_and_losses_are_functions_of_the_index(task):
    """Also in training mode, in which the network itself would drop conditions by chance."""
    task.network.train()
    first, again = task.batch(3), task.batch(3)
    one, other = first["groups"][0], again["groups"][0]
    assert torch.equal(one["tokens"], other["tokens"])
    assert torch.equal(one["inputs"], other["inputs"])
    losses = [task.loss(batch)[0].item() for batch in (first, again, first, again)]
    assert len(set(losses)) == 1
    assert all(layer.training for layer in adapter_layers(task.network).values())
    values = task.validate()
    assert values["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert "training_loss" in task.score(3)


@pytest.mark.parametrize("name", BUILDERS)
def test_an_empty_caption_is_what_guidance_steers_away_from(name, tmp_path):
    images(tmp_path, name)
    task = LoraNextScaleTask(config_of(name, tmp_path), CONTEXT)
    found = task.inputs.conditions(["", CAPTIONS[name]])
    if name == "classes":
        assert found["class_labels"].tolist() == [task.network.config.num_classes, 3]
        return
    states, mask = found["encoder_hidden_states"], found["encoder_attention_mask"]
    wanted, wanted_mask, *_ = task.pipe.encode_prompt(CAPTIONS[name], do_classifier_free_guidance=False)
    torch.testing.assert_close(states[1:], wanted)
    assert torch.equal(mask[1:], wanted_mask)
    torch.testing.assert_close(states[:1], task.network.null_text_embeds(states.shape[1]))
    assert mask[0].all()


def test_captions_of_several_lengths_are_padded_behind_a_mask(tmp_path):
    images(tmp_path, "entries")
    (tmp_path / "images" / "0.txt").write_text("a cat\na red cat with a hat on a white background")
    task = LoraNextScaleTask(config_of("entries", tmp_path), CONTEXT)
    rows, short = task.data, "a cat"
    numbers, alone = [0, 0], task._fixed(rows, 0, short)
    long = max(rows.captions_of_all(), key=len)
    batch = task._drawn(rows, numbers, [short, long], torch.Generator()) | {"bucket": rows.bucket(0), "weight": 1.0}
    both = task._losses(batch)
    wanted = [task._losses({**task._fixed(rows, 0, caption), "bucket": rows.bucket(0)}) for caption in (short, long)]
    torch.testing.assert_close(both, torch.cat(wanted))
    assert alone["conditions"]["encoder_attention_mask"].sum() < batch["conditions"]["encoder_attention_mask"][1].sum()


def test_noise_changes_what_is_seen_and_not_what_is_asked(tmp_path):
    images(tmp_path, "classes")
    noisy = LoraNextScaleTask(config_of("classes", tmp_path, task={"token_noise": 1.0}), CONTEXT)
    clean = LoraNextScaleTask(config_of("classes", tmp_path), CONTEXT)
    one, other = (task.batch(0)["groups"][0] for task in (noisy, clean))
    assert torch.equal(one["tokens"], other["tokens"])
    assert not torch.equal(one["inputs"], other["inputs"])


def test_resume_is_bit_identical(tmp_path):
    images(tmp_path, "classes", count=6)

    def configured(output):
        run = {"output": str(tmp_path / output), "steps": 4, "save_every": 2, "validate_every": 2, "preview_every": 4}
        return config_of("classes", tmp_path, run=run, data={"caption_dropout": 0.3}, lora={"dropout": 0.1})

    folder = assert_resumes_exactly(configured, 2)
    assert (folder / "previews/step-000004.png").is_file()
    assert (folder / "export/pytorch_lora_weights.safetensors").is_file()


def test_each_kind_refuses_the_models_of_the_other(tmp_path, monkeypatch):
    assert task_class("lora_next_scale") is LoraNextScaleTask
    images(tmp_path, "classes")
    config = config_of("classes", tmp_path, LoraConfig, task={"kind": "lora"})
    with pytest.raises(ConfigError, match=r"'classes' predicts tokens .* task\.kind = 'lora_next_scale'"):
        LoraTask(config, CONTEXT)
    config = config_of("classes", tmp_path)
    monkeypatch.setattr(adapters, "load_pipeline", lambda *_, **__: tiny_pipeline("class_dit"))
    with pytest.raises(ConfigError, match=r"doesn't generate scale by scale: use task\.kind = 'lora'"):
        LoraNextScaleTask(config, CONTEXT)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"guidance": 3.0}}, r"model\.guidance does nothing"),
        ({"model": {"options": {"num_inference_steps": 4}}}, r"model\.options: num_inference_steps are no arg"),
        ({"task": {"preview_steps": 4}}, r"task\.preview_steps does nothing"),
        ({"data": {"resolution": 48}}, r"no images of .*data\.resolution"),
        ({"lora": {"layers": ["nowhere"]}}, r"lora\.layers = 'nowhere'"),
    ],
    ids=["guidance", "options", "steps", "size", "layers"],
)
def test_what_would_do_nothing_or_fail_is_refused(sections, message, tmp_path):
    images(tmp_path, "classes")
    with pytest.raises(ConfigError, match=message):
        LoraNextScaleTask(config_of("classes", tmp_path, **sections), CONTEXT)


@pytest.mark.parametrize(("model", "kind"), [("stickers-var", "lora_next_scale"), ("stickers", "lora")])
def test_a_rehearsal_from_flags_has_the_settings_of_its_kind(model, kind, tmp_path):
    flags = {"model": model, "data": tmp_path, "output_dir": tmp_path / "run"}
    config = make_config(None, flags, [], smoke=True)
    assert (config.task.kind, config.run.steps, config.task.preview_images) == (kind, 2, 2)
    assert config.run.name == "run-smoke"
    assert config.optimizer.learning_rate == 1e-3  # as small models want it
    assert make_config(None, {**flags, "learning_rate": 2e-4}, []).optimizer.learning_rate == 2e-4
    assert make_config(None, {**flags, "model": "other/model"}, []).optimizer.learning_rate == 1e-4
    assert make_config(None, {**flags, "optimizer": "sgd_sai"}, []).optimizer.learning_rate == 0.05
    with pytest.raises(ConfigError, match="optimizer"):
        make_config(None, flags, ["optimizer=adamw"])
