"""What a call of the pipeline does: reproducibility, stopping, callbacks, inputs and outputs."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from pipelines.text_to_image import TextToImagePipeline
from tests.pipes.tiny import tiny_text_to_image_pipeline

PROMPT = "a red apple"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def paint(pipe, prompt=PROMPT, **kwargs):
    call = {"num_inference_steps": 3, "generator": seeded(), "output_type": "pt", **kwargs}
    return pipe(prompt, **call).images


def psnr(a, b):
    return -10 * torch.log10((a - b).square().mean().clamp_min(1e-12))


def test_same_seed_same_picture_bit_for_bit(pipe):
    first, second = paint(pipe), paint(pipe)
    assert first.std() > 0.01  # a flat image would prove nothing
    assert torch.equal(first, second)
    assert not torch.equal(first, paint(pipe, generator=seeded(1)))


def test_first_picture_does_not_depend_on_the_batch(pipe):
    alone = paint(pipe)[0]
    more = paint(pipe, num_images_per_prompt=3)
    mixed = paint(pipe, prompt=[PROMPT, "three small green frogs on a yellow background"])
    assert psnr(alone, more[0]) > 50
    assert psnr(alone, mixed[0]) > 50
    assert psnr(more[0], more[1]) < 50  # other noise, other image


def test_noise_of_a_picture_is_the_same_in_every_batch(pipe):
    shape = (3, 5, 7)  # an odd size: one draw for the whole batch would shuffle the numbers
    assert torch.equal(pipe.prepare_noise(shape, 1, seeded())[0], pipe.prepare_noise(shape, 4, seeded())[0])
    each = pipe.prepare_noise(shape, 2, [seeded(1), seeded(2)])
    assert torch.equal(each[1], pipe.prepare_noise(shape, 1, seeded(2))[0])
    assert each.dtype == torch.float32


def test_one_generator_a_picture(pipe):
    both = paint(pipe, num_images_per_prompt=2, generator=[seeded(5), seeded(6)])
    assert psnr(both[1], paint(pipe, generator=seeded(6))[0]) > 50


def test_given_latents_are_the_noise(pipe):
    noise = pipe.prepare_noise((4, 4, 4), 1, seeded())
    assert torch.equal(paint(pipe, latents=noise, generator=None), paint(pipe))


def test_output_types_agree(pipe):
    pt = paint(pipe)
    array = paint(pipe, output_type="np")
    image = paint(pipe, output_type="pil")[0]
    assert image.size == (32, 32)
    assert array.shape == (1, 32, 32, 3)
    np.testing.assert_allclose(array[0], pt[0].permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(np.asarray(image) / 255, array[0], atol=1 / 255)
    latent = paint(pipe, output_type="latent")
    with torch.no_grad():
        decoded = pipe.image_processor.postprocess(pipe.decode_latents(latent), "pt")
    torch.testing.assert_close(decoded, pt)
    as_tuple = pipe(PROMPT, num_inference_steps=3, generator=seeded(), output_type="pt", return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], pt)


def test_any_size_and_aspect(pipe):
    assert paint(pipe, height=48, width=16).shape == (1, 3, 48, 16)


def test_guidance_is_the_extrapolation_of_two_branches(pipe):
    """One guided Euler step equals the combination of the conditional and the unconditional one."""
    call = {"num_inference_steps": 1, "output_type": "latent"}
    cond = paint(pipe, guidance_scale=1.0, **call)
    uncond = paint(pipe, prompt="", guidance_scale=1.0, **call)
    guided = paint(pipe, guidance_scale=3.0, **call)
    torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond), atol=1e-4, rtol=1e-4)
    negative = paint(pipe, guidance_scale=3.0, negative_prompt="a cat", **call)
    assert not torch.allclose(guided, negative, atol=1e-4)
    never = paint(pipe, guidance_scale=3.0, guidance_interval=(0.0, 0.5), **call)  # the one step is at sigma 1
    torch.testing.assert_close(never, cond, atol=1e-5, rtol=1e-5)


def test_negative_prompts_per_prompt(pipe):
    both = paint(pipe, prompt=[PROMPT, PROMPT], negative_prompt=["a cat", "black"], generator=[seeded(), seeded()])
    assert psnr(both[0], paint(pipe, negative_prompt="a cat")[0]) > 50
    assert psnr(both[1], paint(pipe, negative_prompt="black")[0]) > 50


def test_ready_embeddings_equal_prompts(pipe):
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPT, "a cat")
    again = paint(
        pipe,
        prompt=None,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
    )
    assert torch.equal(again, paint(pipe, negative_prompt="a cat"))


def test_padding_is_invisible(pipe):
    embeds, mask, *_ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    longer = torch.cat([embeds, torch.full_like(embeds, 7.0)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    call = {"prompt": None, "guidance_scale": 1.0}
    plain = paint(pipe, prompt_embeds=embeds, prompt_attention_mask=mask, **call)
    padded = paint(pipe, prompt_embeds=longer, prompt_attention_mask=longer_mask, **call)
    assert psnr(plain, padded) > 80


def test_long_prompts_warn_once_and_are_cut(pipe, caplog, monkeypatch):
    monkeypatch.setattr("pipelines.inputs.conditioning.logger.warning", seen := Recorder())
    long = paint(pipe, prompt="a red apple " * 40)
    assert len(seen.calls) == 1
    assert "the model reads 24" in seen.calls[0]
    assert long.shape == (1, 3, 32, 32)


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, message):
        self.calls.append(message)


def test_strange_and_empty_prompts_work(pipe):
    assert torch.isfinite(paint(pipe, prompt=["", "\U0001f34e \x00 zzzqqq", "\n"])).all()


def test_image_to_image_keeps_more_at_low_strength(pipe):
    start = Image.new("RGB", (40, 24), "red")
    latents = pipe.encode_image(start, 32, 32)
    call = {"image": start, "num_inference_steps": 10, "output_type": "latent", "guidance_scale": 1.0}
    distance = [float((paint(pipe, strength=s, **call) - latents).norm()) for s in (0.1, 0.5, 1.0)]
    assert distance[0] < distance[1] < distance[2]
    paint(pipe, strength=0.5, **call)
    assert pipe.num_timesteps == 5
    full = paint(pipe, strength=1.0, **call)
    torch.testing.assert_close(full, paint(pipe, **{**call, "image": None}))


def test_image_inputs_agree(pipe):
    array = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32).round(1)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    from_array, from_tensor = (pipe.encode_image(x, 32, 32) for x in (array, tensor))
    torch.testing.assert_close(from_array, from_tensor)
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    white = Image.new("RGB", (32, 32), "white")
    assert torch.equal(pipe.encode_image(clear, 32, 32), pipe.encode_image(white, 32, 32))


def test_custom_sigmas_set_the_steps(pipe):
    paint(pipe, sigmas=[1.0, 0.5])
    assert pipe.num_timesteps == 2
    shifted = 3.0 * 0.5 / (1 + 2.0 * 0.5)  # the scheduler's shift of 3 applies to them
    assert pipe.scheduler.timesteps[1].item() == pytest.approx(1000 * shifted)


@pytest.mark.parametrize("seen", ["callback", "thread"])
def test_interrupt_stops_within_one_step_without_decoding(seen, monkeypatch):
    pipe = tiny_text_to_image_pipeline()
    calls = []
    forward = pipe.transformer.forward

    def counting(*args, **kwargs):
        calls.append(1)
        if seen == "thread" and len(calls) == 2:  # as if another thread set it in the middle of a step
            pipe.interrupt = True
        return forward(*args, **kwargs)

    def stop(pipe, step, timestep, tensors):
        pipe.interrupt = step == 1
        return {}

    monkeypatch.setattr(pipe.transformer, "forward", counting)
    decoded = Recorder()
    monkeypatch.setattr(pipe, "decode_latents", decoded)
    images = paint(pipe, num_inference_steps=10, callback_on_step_end=stop if seen == "callback" else None)
    assert len(calls) == 2
    assert images == []
    assert pipe.interrupted
    assert decoded.calls == []
    monkeypatch.undo()
    assert paint(pipe).shape == (1, 3, 32, 32)  # the next call starts afresh
    assert not pipe.interrupted


def test_callback_sees_and_replaces_tensors(pipe):
    seen = []

    def record(pipe, step, timestep, tensors):
        assert pipe.current_timestep == timestep
        seen.append((step, float(timestep), set(tensors)))
        if step == 2:
            torch.testing.assert_close(tensors["denoised_latents"], tensors["latents"])  # sigma has reached 0
            return {"latents": torch.zeros_like(tensors["latents"])}
        return None

    images = paint(
        pipe,
        output_type="latent",
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["latents", "denoised_latents"],
    )
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][1] == 1000.0
    assert seen[0][2] == {"latents", "denoised_latents"}
    assert images.abs().sum() == 0
    assert pipe.current_timestep is None


def test_preview_is_small_and_cheap(pipe):
    previews = pipe.preview(torch.randn(2, 4, 4, 4, generator=seeded()))
    assert len(previews) == 2
    assert previews[0].mode == "RGB"
    assert max(previews[0].size) <= 32


def test_bfloat16_stays_close_to_float32(pipe):
    half = tiny_text_to_image_pipeline().to(torch.bfloat16)
    noises = []

    def keep(pipe, step, timestep, tensors):
        noises.append(tensors["latents"].dtype)
        return {}

    picture = paint(half, callback_on_step_end=keep)
    assert set(noises) == {torch.float32}  # the loop's arithmetic
    assert psnr(picture, paint(pipe)) > 30


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_flow_schedulers_reach_the_same_picture(scheduler):
    """All solve the same equation, so with many steps they agree with Euler."""
    pipe = tiny_text_to_image_pipeline()
    call = {"num_inference_steps": 40, "output_type": "latent", "guidance_scale": 1.0}
    euler = paint(pipe, **call)
    pipe.scheduler = scheduler
    other = paint(pipe, **call)
    assert (other - euler).norm() < 0.1 * euler.norm()


def test_size_dependent_shift(pipe):
    scheduler = pipe.scheduler
    pipe.scheduler = scheduler.from_config(scheduler.config, use_dynamic_shifting=True, shift=1.0)
    small = paint(pipe) is not None and pipe.scheduler.timesteps.clone()
    paint(pipe, height=128, width=128)
    large = pipe.scheduler.timesteps
    pipe.scheduler = scheduler
    assert (large[1:] > small[1:]).all()  # larger images spend more steps at high noise


def test_lora_files_round_trip(tmp_path):
    pipe = tiny_text_to_image_pipeline()
    plain = paint(pipe)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=64, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    adapted = paint(pipe)
    assert psnr(plain, adapted) < 60
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    other = tiny_text_to_image_pipeline()
    other.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(paint(other), adapted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(paint(other, attention_kwargs={"scale": 0.0}), plain, atol=1e-5, rtol=1e-5)
    other.unload_lora_weights()
    assert torch.equal(paint(other), plain)
    with pytest.raises(ValueError, match="safetensors"):
        other.load_lora_weights(tmp_path, use_safetensors=False)


BAD = {
    "no prompt": ({"prompt": None}, ValueError, "either prompt or prompt_embeds, got neither"),
    "both": ({"prompt_embeds": torch.zeros(1, 3, 16)}, ValueError, "prompt_embeds, got both"),
    "empty list": ({"prompt": []}, ValueError, "prompt is an empty list"),
    "wrong type": ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, got int 3"),
    "wrong element": ({"prompt": ["a", None]}, TypeError, r"prompt\[1\] must be a string"),
    "negative count": ({"negative_prompt": ["a", "b", "c"]}, ValueError, "3 negative prompts for 1 prompts"),
    "embeds rank": ({"prompt": None, "prompt_embeds": torch.zeros(3, 16)}, ValueError, r"got \(3, 16\)"),
    "mask shape": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 16), "prompt_attention_mask": torch.ones(1, 4)},
        ValueError,
        r"shape \(1, 4\)",
    ),
    "embeds width": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 5)},
        ValueError,
        "width 5, the transformer reads width 16",
    ),
    "nan guidance": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale=nan is out of range: expected 0"),
    "guidance type": ({"guidance_scale": "4"}, TypeError, "guidance_scale must be a number"),
    "steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0 is out of range: expected 1 to 1000"),
    "steps type": ({"num_inference_steps": 2.5}, TypeError, "num_inference_steps must be an int"),
    "height": ({"height": 33}, ValueError, "height=33 is not usable: expected a multiple of 16.*Nearest: height=32"),
    "too large": ({"width": 1 << 20}, ValueError, "Nearest: width=4096"),
    "size type": ({"width": 32.0}, TypeError, "width must be an int"),
    "zero height": ({"height": 0}, ValueError, "height=0 is not usable"),
    "count": ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt=0"),
    "strength": ({"strength": 1.5}, ValueError, "strength=1.5 is out of range"),
    "sigmas": ({"sigmas": [0.5, 0.7]}, ValueError, "sigmas must decrease, got 0.5 followed by 0.7"),
    "no sigmas": ({"sigmas": []}, ValueError, "sigmas is empty"),
    "latents": ({"latents": torch.zeros(1, 4, 5, 4)}, ValueError, "height=40 is not usable"),
    "latent channels": ({"latents": torch.zeros(1, 3, 4, 4)}, ValueError, r"shape \(1, 4, 4, 4\)"),
    "latent nan": ({"latents": torch.full((1, 4, 4, 4), float("nan"))}, ValueError, "finite"),
    "generators": ({"generator": [seeded(), seeded()]}, ValueError, "2 generators for 1 images"),
    "seed": ({"generator": 7}, TypeError, "torch.Generator"),
    "output": ({"output_type": "jpeg"}, ValueError, "output_type='jpeg' is unknown"),
    "callback": ({"callback_on_step_end_tensor_inputs": ["foo"]}, ValueError, r"\['foo'\], which are not on offer"),
    "max length": ({"max_sequence_length": 99}, ValueError, "max_sequence_length=99 is out of range.*1 to 24"),
    "image type": ({"image": "cat.png"}, TypeError, "image must be a PIL image"),
    "image ints": ({"image": np.zeros((8, 8, 3), dtype=np.uint8)}, TypeError, "float array"),
    "image range": ({"image": np.full((8, 8, 3), 255.0)}, ValueError, "divide 8-bit values by 255"),
    "images": ({"image": [Image.new("RGB", (8, 8))] * 2}, ValueError, "2 images for 1 output images"),
    "no images": ({"image": []}, TypeError, "image must be"),
    "interval": ({"guidance_interval": (0.9, 0.1)}, ValueError, "guidance interval"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(pipe, case):
    change, error, message = BAD[case]
    call = {"prompt": PROMPT, "num_inference_steps": 2, **change}
    with pytest.raises(error, match=message):
        pipe(**call)


def test_missing_text_encoder_is_named(pipe):
    without = type(pipe)(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="no text encoder to read prompt with: pass prompt_embeds"):
        without(PROMPT, num_inference_steps=1)


def test_a_model_keeps_the_steps_and_guidance_that_suit_it(tmp_path):
    pipe = tiny_text_to_image_pipeline()
    own = TextToImagePipeline(**pipe.components, defaults={"num_inference_steps": 2, "guidance_scale": 1.5})
    own.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path)
    assert (loaded.info().steps, loaded.info().guidance) == (2, 1.5)
    assert (pipe.info().steps, pipe.info().guidance) == (28, 4.0)
    unnamed = loaded(PROMPT, generator=seeded(), output_type="pt").images
    assert torch.equal(unnamed, paint(loaded, num_inference_steps=2, guidance_scale=1.5))
    assert not torch.equal(unnamed, paint(loaded, num_inference_steps=3))
    with pytest.raises(ValueError, match=r"defaults name \['steps'\]; expected some of"):
        TextToImagePipeline(**pipe.components, defaults={"steps": 2})
