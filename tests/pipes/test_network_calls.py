"""The learned call of a network is the pipeline's own: the same predictions, the same latents, in every family."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.network_inputs import NetworkInputs
from dit.tokenizers import as_visual_tokenizer
from pipelines.network_calls import (
    NetworkCall,
    Ragged,
    learn_unguided_call,
    normalize_latents,
    pack_latents,
    prompt_argument,
    size_arguments,
)
from pipelines.network_calls.recording import Timed, _find_line
from pipelines.network_calls.unguided import NEUTRAL
from tests.families.every import FAMILIES, build, caption, is_class, options, side

FRAMES = {"mochi": 7, "latte": 4, "cogvideox": 9, "ltx2": 9}
"""Of a short clip, where five are not right."""

ALONE = {
    "kandinsky5": "its pipeline pads the shorter text of a batch without a mask",
    "latte": "its pipeline cuts the padding of one text off, and sets it to zero in a batch",
    "ltx2": "the noise of its sound depends on the number of samples",
}
"""Why some predict another image for the same prompt beside a second one."""


@dataclass
class Step:
    """What a scheduler is given in one step of a pipeline, and what it returned."""

    output: Tensor
    timestep: float
    sample: Tensor


@dataclass
class Learned:
    """A pipeline and the call of its network, for a short clip or a small image that is no square."""

    name: str
    pipe: Any
    inputs: NetworkInputs
    bucket: tuple[int, int, int]
    call: NetworkCall

    def arguments(self, *captions: str) -> dict[str, Any]:
        """Arguments of the pipeline's call, without guidance."""
        info, (frames, height, width) = self.inputs.info, self.bucket
        values = [prompt_argument(info, one) for one in captions]
        prompt = values[0][1] if len(values) == 1 else [one for _, value in values for one in _listed(value)]
        neutral = {key: value for key, value in NEUTRAL.items() if key in info.parameters}
        if info.guidance_kind == "distilled":
            neutral.pop(info.guidance_argument)
        if self.name == "z_image":  # it guides at 1 as well
            neutral[info.guidance_argument] = 0.0
        clip = frames if info.frames is not None else None
        size = size_arguments(info, height, width, clip)
        return {**neutral, **info.fixed, **size, **options(self.name), values[0][0]: prompt}

    def parts(self, *captions: str) -> list[dict[str, Any]]:
        """Recorded arguments of the network."""
        found = []
        for one in captions:
            name, value = prompt_argument(self.inputs.info, one)
            found.append(self.call.record(**{name: value}))
        return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextmanager
def watched(pipe: Any, steps: list[Step], answer: Tensor | None = None) -> Generator[None]:
    """Note what the scheduler is given for the transformer's answers; with `answer` its steps return that."""
    kind, calls = type(pipe.scheduler), []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    own = kind.step

    def step(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor, *given: Any, **named: Any) -> Any:
        made = own(scheduler, output, timestep, sample, *given, **named)
        if calls:  # else it is the step of another network, or of the sound
            calls.clear()
            steps.append(Step(output.clone(), float(torch.as_tensor(timestep).flatten()[0]), sample.clone()))
        if answer is None or sample.shape != answer.shape:
            return made
        return (answer.to(sample.dtype), *made[1:]) if isinstance(made, tuple) else type(made)(answer)

    kind.step = step
    try:
        yield
    finally:
        kind.step = own
        handle.remove()


@pytest.fixture(scope="module", params=FAMILIES)
def learned(request, tmp_path_factory):
    name = request.param
    pipe = build(name)
    inputs = NetworkInputs(pipe, pipe.transformer, tmp_path_factory.mktemp(name), None, options(name))
    size = (side(name), side(name) + inputs.size_step())
    if is_class(name):
        size = (inputs.info.height, inputs.info.width)
    bucket = (FRAMES.get(name, 5) if inputs.info.frames is not None else 1, *size)
    return Learned(name, pipe, inputs, bucket, inputs.call(bucket))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def run(learned: Learned, *captions: str) -> list[Step]:
    """Two steps of the pipeline itself; the seed is that of recorded calls."""
    steps: list[Step] = []
    with watched(learned.pipe, steps):
        learned.pipe(
            **learned.arguments(*captions),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    return steps


def predict(learned: Learned, samples: Tensor, times: list[float], parts: list[dict[str, Any]]) -> Tensor:
    """Predictions of a batch, or of one sample after the other."""
    network, call, moments = learned.pipe.transformer, learned.call, torch.tensor(times, dtype=torch.float64)
    try:
        return call.predict(network, samples, moments, parts)
    except Ragged:
        rows = [slice(number, number + 1) for number in range(len(samples))]
        return torch.cat([call.predict(network, samples[row], moments[row], parts[row]) for row in rows])


@torch.no_grad()
def test_it_predicts_what_the_pipeline_hands_to_its_scheduler(learned):
    for number in range(2):
        one = caption(learned.name, number)
        steps, parts = run(learned, one), learned.parts(one)
        for step in steps[: 1 if learned.name == "ltx2" else 2]:  # its sound goes on too; recorded is its noise
            assert relative(predict(learned, step.sample, [step.timestep], parts), step.output) < 1e-5


@torch.no_grad()
def test_samples_of_a_batch_have_their_own_text_and_time(learned):
    """One batch of two captions at two timesteps, against two runs of the pipeline."""
    captions = caption(learned.name), caption(learned.name, 1)
    one, other = (run(learned, each) for each in captions)
    pair = one[0], other[0 if learned.name in ("ltx2", "wan22") else 1]  # the second step may be another network's
    samples, wanted = torch.cat([step.sample for step in pair]), torch.cat([step.output for step in pair])
    found = predict(learned, samples, [step.timestep for step in pair], learned.parts(*captions))
    assert relative(found, wanted) < 1e-5


@torch.no_grad()
def test_two_captions_are_predicted_as_in_one_call_of_the_pipeline(learned):
    if learned.name in ALONE:
        pytest.skip(ALONE[learned.name])
    captions = caption(learned.name), caption(learned.name, 1)
    step, *_ = run(learned, *captions)
    found = predict(learned, step.sample, [step.timestep] * 2, learned.parts(*captions))
    assert relative(found, step.output) < 1e-5


@torch.no_grad()
def test_packed_latents_are_what_the_pipeline_decodes(learned):
    frames, height, width = learned.bucket
    vae, info = as_visual_tokenizer(learned.pipe.vae), learned.inputs.info
    clip = frames if info.frames is not None else None
    shape = (1, 3, height, width) if clip is None else (1, 3, clip, height, width)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = learned.inputs._encode(vae, pixels)  # (1, C, [T,] h, w)
    packed = pack_latents(learned.pipe, latents, learned.call.sample_shape, height, width, clip)
    with watched(learned.pipe, [], packed):
        made = learned.pipe(**learned.arguments(caption(learned.name)), num_inference_steps=2, output_type="np")
    painted = torch.as_tensor(getattr(made, info.output)[0])  # ([T,] H, W, 3)

    if learned.name == "latte":  # frame by frame
        pixels = pixels[0].transpose(0, 1)  # (T, 3, H, W)
    decoded = vae.decode(vae.encode(pixels, return_dict=False)[0], return_dict=False)[0]  # (1, 3, [T,] H, W)
    decoded = decoded.movedim(1, -1) if learned.name == "latte" else decoded[0].movedim(0, -1)  # ([T,] H, W, 3)
    torch.testing.assert_close(painted, (decoded / 2 + 0.5).clamp(0, 1), atol=2e-5, rtol=1e-5)
    assert painted.std() > 0.04


@torch.no_grad()
def test_latents_of_other_cells_are_refused(tmp_path):
    """As many numbers as there are places, but of cells of another size."""
    pipe = build("flux2")
    latents = pipe.vae.encode(torch.zeros(1, 3, 32, 64)).latent_dist.mode()  # (1, C, h, w)
    packed = pack_latents(pipe, normalize_latents(pipe, latents), (8, 16), 32, 64)
    assert packed.shape == (1, 8, 16)
    with pytest.raises(ValueError, match="don't fill"):
        pack_latents(pipe, latents, (8, 16), 32, 64)


def test_one_timestep_for_a_batch_is_kept_to():
    timed = Timed(0.001, 0.0, (), False, torch.float32)
    assert float(timed.fill(torch.tensor([500.0, 500.0]))) == 0.5
    with pytest.raises(Ragged, match="one timestep"):
        timed.fill(torch.tensor([500.0, 400.0]))


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "lumina2", "text_dit"])
def test_timesteps_rounded_to_bfloat16_are_understood(name):
    """Steps next to each other may round to the same number; published schedules shift by the size of the image."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = build(name).to(dtype)
        pipe.scheduler.register_to_config(use_dynamic_shifting=name in ("flux", "flux2", "qwen_image"))
        call = learn_unguided_call(pipe, side(name), side(name), options=options(name))
        found.append({name: (timed.factor, timed.offset) for name, timed in call.timed.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("values", "eps", "line"),
    [
        ((999.0, 125.0), 1e-7, (1.0, 0.0)),
        ((1000.0, 126.0), 1e-7, (1.0, 1.0)),
        ((1000.0, 125.0), 2**-7, (1.0, 0.0)),  # 999 in bfloat16
        ((0.999, 0.125), 1e-7, (1e-3, 0.0)),
        ((0.001, 0.875), 1e-7, (-1e-3, 1.0)),
        ((1.0, 875.0), 1e-7, (-1.0, 1000.0)),
        ((499.5, 62.5), 1e-7, None),
        ((0.999, 0.125 + 0.05), 1e-7, None),
    ],
)
def test_what_is_a_timestep(values, eps, line):
    assert _find_line((999.0, 125.0), values, eps, 1000) == line
