"""What only an accelerator shows: offloads that move weights, and compiled networks that generate code for it."""

import pytest
import torch

from pipelines.acceleration import AccelerationConfig
from tests.pipes.tiny import tiny_text_to_image_pipeline

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def generate(pipe):
    noise = torch.Generator().manual_seed(1)
    return pipe("a cat", num_inference_steps=4, generator=noise, output_type="pt").images.float().cpu()


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("part", [{"offload": "model"}, {"offload": "sequential"}, {"compile": True}])
def test_a_part_gives_the_same_image_and_leaves_no_trace(part):
    pipe = tiny_text_to_image_pipeline().to("cuda")
    before = generate(pipe)
    with AccelerationConfig.from_dict(part).apply(pipe) as acceleration:
        torch.testing.assert_close(generate(pipe), before, atol=2e-3, rtol=1e-3)
        assert all(one.is_active for one in acceleration.report().parts)
    assert torch.equal(generate(pipe.to("cuda")), before)
