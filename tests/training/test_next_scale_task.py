"""Training of next-scale models: tokenizers, the generator, and what they export."""

import json

import pytest
import torch

from apps.commands import evaluate
from apps.training.codebook_usage import CodebookUsage
from apps.training.loop import Trainer, train
from apps.training.task import load_config
from dit.tokenizers import MultiScaleBSQ, MultiScaleVQ, ViTAutoencoder
from dit.tokenizers.losses import bit_entropy, code_entropy, residual_loss, straight_through
from pipelines import load_pipeline
from pipelines.info.inspection import info_of
from sampling.objectives import next_scale_loss
from tests.training.helpers import assert_resumes_exactly

VIT = {
    "patch_size": 8, "encoder_dim": 32, "encoder_layers": 1, "decoder_dim": 32, "decoder_layers": 1,
    "attention_head_dim": 16, "refiner_channels": 8, "sample_size": 32,
}  # fmt: skip
COMMON = """
[run]
name = "tiny"
steps = 4
batch_size = 4
log_every = 2
validate_every = 4
preview_every = 4
save_every = 2
num_threads = 1

[optimizer]
learning_rate = 1e-3
warmup_steps = 2
"""
TOKENIZER = """
[task]
kind = "multi_scale_tokenizer"
entropy_weight = 0.01
ssim_weight = 0.0

[data]
resolution = 32
validation_examples = 24
calibration_images = 32

[model]
scales = [1, 2, 4]
vocab_size = 24
latent_channels = 4
patch_size = 8
encoder_dim = 32
encoder_layers = 1
decoder_dim = 32
decoder_layers = 1
refiner_channels = 8
"""
NEXT_SCALE = """
[task]
kind = "next_scale"
token_noise = 0.2

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
scales = 2

[[data.stages]]
until_step = 100

[model]
num_layers = 1
num_attention_heads = 2
attention_head_dim = 16
text_pool_heads = 2

[model.text]
vocab_size = 300
d_model = 16
d_kv = 8
d_ff = 16
num_layers = 1
num_heads = 2
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untrained tokenizers and an autoencoder, by name."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tokenizers")
    MultiScaleVQ(scales=(1, 2, 4), latent_channels=4, vocab_size=24, vit=VIT).save_pretrained(root / "vq")
    MultiScaleBSQ(scales=(1, 2, 4), latent_channels=4, vit=VIT).save_pretrained(root / "bsq")
    ViTAutoencoder(latent_channels=4, **VIT).save_pretrained(root / "vit")
    return root


@pytest.fixture
def configured(tmp_path, folders):
    """Writes a tiny configuration and returns a loader that takes overrides."""

    def load(kind, *overrides, output="runs", vae="vq"):
        text = {"tokenizer": TOKENIZER, "next_scale": NEXT_SCALE.replace("VAE", str(folders / vae))}[kind]
        path = tmp_path / f"{kind}.toml"
        path.write_text(COMMON + text)
        return load_config(path, [f'run.output="{tmp_path / output}"', *overrides])

    return load


@pytest.mark.parametrize(("kind", "vae"), [("tokenizer", "vq"), ("next_scale", "vq")])
def test_resume_is_bit_identical(configured, kind, vae):
    muon = ("optimizer.name=muon", 'optimizer.muon_leaves_out=["text_encoder"]')
    assert_resumes_exactly(lambda output: configured(kind, *muon, output=output, vae=vae), 2)


@pytest.mark.parametrize("quantizer", ["vq", "bsq"])
def test_a_tokenizer_starts_from_an_autoencoder(configured, folders, tmp_path, quantizer):
    start = f'data.init_from="{folders / "vit"}"'
    trainer = Trainer(configured("tokenizer", start, f"model.quantizer={quantizer}"))
    vae = trainer.task.vae
    weights = ViTAutoencoder.from_pretrained(folders / "vit").state_dict()
    assert all(torch.equal(vae.backbone.state_dict()[name], value) for name, value in weights.items())
    trainer.run()
    exported = type(vae).from_pretrained(tmp_path / "runs/tiny/export/vae")
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = exported.quantize(pictures)
    assert [tokens.shape[1] for tokens in codes.indices] == [1, 4, 16]
    assert torch.allclose(exported.indices_to_latents(codes.indices), codes.latent, atol=1e-5)
    assert torch.allclose(exported.partial_sums(codes.indices)[-1], codes.latent, atol=1e-5)
    assert exported.decode(codes.latent).sample.shape == pictures.shape
    assert (tmp_path / "runs/tiny/code_usage.png").is_file()
    values = [json.loads(line) for line in (tmp_path / "runs/tiny/log.jsonl").read_text().splitlines()][-1]
    assert values["kind"] == "validation"
    assert values["tokens"] == 24 * 21
    assert ("used" in values) == (quantizer == "vq")


def test_clusters_say_more_than_random_codes(configured, folders):
    trainer = Trainer(configured("tokenizer", f'data.init_from="{folders / "vit"}"', "data.calibration_images=128"))
    vae = trainer.task.vae.eval()
    features = torch.cat([vae.features(images) for images in trainer.task._calibration()]).detach()

    @torch.no_grad()
    def error():
        return float((vae.quantize_features(features).latent - features).square().mean())

    clustered = error()
    torch.nn.init.normal_(vae.quantizer.codebook.weight)
    assert clustered < 0.6 * error()


def test_unused_codes_come_back(configured):
    task = Trainer(configured("tokenizer")).task
    task.vae.train()
    images = task.batch(0)["images"]
    task.loss({"images": images})
    codes = task.vae.quantizer.codebook.weight
    with torch.no_grad():
        codes[3] = 1e3  # far from everything
        task.vae.quantizer.hits[:, 3] = 0
    before = codes.detach().clone()
    task.loss({"images": images})
    assert codes[3].abs().max() < 100, "moved to where the batch is"
    assert float(task.vae.quantizer.hits[:, 3].sum()) > 0
    kept = torch.arange(len(codes)) != 3
    assert torch.equal(codes[kept], before[kept])


def test_only_the_decoder_learns_when_asked(configured, folders, tmp_path):
    start = (f'data.init_from="{folders / "vq"}"', "task.train=decoder")
    trainer = Trainer(configured("tokenizer", *start))
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    before = trainer.task.vae.eval().quantize(pictures).indices
    decoded = trainer.task.vae.decode(trainer.task.vae.quantize(pictures).latent).sample.detach()
    trainer.run()
    after = trainer.task.vae.eval().quantize(pictures)
    assert all(torch.equal(one, other) for one, other in zip(before, after.indices, strict=True))
    assert not torch.allclose(trainer.task.vae.decode(after.latent).sample, decoded)


@pytest.mark.parametrize("vae", ["vq", "bsq"])
def test_a_deeper_decoder_starts_as_the_old_one_and_learns(configured, folders, vae):
    more = ("model.decoder_layers=3", "model.refiner_layers=4")
    trainer = Trainer(configured("tokenizer", f'data.init_from="{folders / vae}"', "task.train=decoder", *more))
    old = {"vq": MultiScaleVQ, "bsq": MultiScaleBSQ}[vae].from_pretrained(folders / vae).eval()
    new = trainer.task.vae.eval()
    assert (len(new.backbone.decoder_blocks), len(new.backbone.refiner)) == (3, 4 + 2)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = old.quantize(pictures)
    assert all(map(torch.equal, new.quantize(pictures).indices, codes.indices))
    assert torch.allclose(new.decode(codes.latent).sample, old.decode(codes.latent).sample, atol=1e-6)
    trainer.run()
    assert new.backbone.refiner[3].conv2.weight.abs().max() > 1e-6  # nothing stays silent
    assert new.backbone.decoder_blocks[2].ff.net[2].weight.abs().max() > 1e-6


def test_a_decoder_does_not_become_shallower(configured, folders):
    config = configured("tokenizer", f'data.init_from="{folders / "vq"}"', "model.refiner_layers=0")
    with pytest.raises(ValueError, match="refiner_layers = 0 is less than the 1"):
        Trainer(config)


@pytest.mark.parametrize("vae", ["vq", "bsq"])
def test_the_generator_is_exported_as_a_pipeline(configured, tmp_path, vae):
    assert train(configured("next_scale", "optimizer.name=muon", vae=vae)) == "finished"
    folder = tmp_path / "runs/tiny"
    assert (folder / "previews/step-000004.png").is_file()
    pipe = load_pipeline(folder / "export", device="cpu")
    pictures = pipe("a red apple", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert pictures.shape == (1, 3, 32, 32)
    assert evaluate.call_settings(pipe, None, None) == (None, 3.0), "previews and evaluations draw as was configured"
    assert evaluate.call_settings(pipe, None, 1.5) == (None, 1.5)
    assert evaluate.picture_side(pipe) == info_of(pipe).height == info_of(pipe).width == 32
    with pytest.raises(ValueError, match="takes no --steps"):
        evaluate.call_settings(pipe, 28, None)
    assert len((folder / "export/vocabulary.txt").read_text().splitlines()) == 128


def test_stages_may_train_the_first_scales_only(configured):
    task = Trainer(configured("next_scale")).task
    few, all_of_them = task.batch(0), task.batch(2)
    assert few["tokens"].shape == (4, 5)
    assert few["inputs"].shape == (4, 4, 4)
    assert all_of_them["tokens"].shape == (4, 21)
    again = task.batch(0)
    assert all(torch.equal(few[name], again[name]) for name in few)
    task.transformer.eval()
    part = task._cross_entropies(task._teach(all_of_them["tokens"], 2, None) | _text(all_of_them))
    whole = task._cross_entropies(task._teach(all_of_them["tokens"], None, None) | _text(all_of_them))
    assert torch.allclose(part, whole[:, :2], atol=1e-5)


def _text(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_noise_changes_what_is_seen_and_not_what_is_asked(configured):
    task = Trainer(configured("next_scale", "task.token_noise=1.0")).task
    tokens = task.latents[:8].long()
    noisy = task._teach(tokens, None, torch.Generator().manual_seed(0))
    clean = task._teach(tokens, None, None)
    assert torch.equal(noisy["tokens"], clean["tokens"])
    assert not torch.equal(noisy["inputs"], clean["inputs"])


def test_losses_by_hand():
    logits = torch.randn(2, 5, 7)
    tokens = torch.randint(7, (2, 5))
    each = next_scale_loss(logits, tokens, (1, 4))
    log_p = logits.log_softmax(-1)
    expected = -torch.stack([log_p[1, n, tokens[1, n]] for n in range(1, 5)]).mean()
    assert torch.allclose(each[1, 1], expected)
    bits, targets = torch.zeros(2, 5, 3, 2), torch.randint(2, (2, 5, 3))
    assert torch.allclose(next_scale_loss(bits, targets, (1, 4)), torch.tensor(2.0).log().expand(2, 2))

    features = torch.tensor([[1.0, 2.0]], requires_grad=True)
    quantised = torch.tensor([[3.0, -1.0]], requires_grad=True)
    passed = straight_through(features, quantised)
    assert torch.equal(passed, quantised)
    passed.sum().backward()
    assert torch.equal(features.grad, torch.ones(1, 2))
    assert quantised.grad is None
    loss = residual_loss(features, [quantised], commitment=0.5)
    assert loss.item() == pytest.approx(1.5 * (4 + 9) / 2)


def test_entropies_reward_sure_and_varied_choices():
    codebook = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, 0.0], [0.0, -10.0]])
    varied, same = code_entropy(codebook, codebook), code_entropy(codebook[:1].repeat(4, 1), codebook)
    assert float(varied) == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-3)
    assert float(same) == pytest.approx(0.0, abs=1e-3)
    sure = torch.tensor([[5.0, -5.0], [-5.0, 5.0]])
    assert float(bit_entropy(sure)) == pytest.approx(-torch.tensor(2.0).log().item(), abs=1e-3)
    assert float(bit_entropy(torch.zeros(2, 2))) == pytest.approx(0.0, abs=1e-6)


def test_usage_counts(tmp_path):
    usage = CodebookUsage(2, 4)
    usage.add([torch.tensor([[0]]), torch.tensor([[0, 1, 1, 1]])])
    summary = usage.summary()
    assert summary["tokens"] == 5
    assert summary["used"] == 0.5
    share = torch.tensor([0.4, 0.6])
    assert summary["perplexity"] == pytest.approx(float((-(share * share.log()).sum()).exp()))
    usage.plot(tmp_path / "usage.png")
    assert (tmp_path / "usage.png").stat().st_size > 500
    bits = CodebookUsage(1, 6, bits=True)
    bits.add([torch.tensor([[[0, 1, 0], [1, 1, 0]]])])
    assert bits.summary()["tokens"] == 2
    assert bits.summary()["bit_entropy"] == pytest.approx(1 / 3)
