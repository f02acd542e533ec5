"""What two gloo processes compute; `test_parallel` starts it and compares with one process.

`python -m tests.step_cache.two_processes RANK STORE RESULT`
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from dit.runtime.compare import relative_error
from pipelines.acceleration import AccelerationConfig
from sampling.parallel import GuidanceParallel, context_parallel
from sampling.step_cache import StepCache
from sampling.step_cache.forecasters import Newton
from sampling.step_cache.gates import FirstBlock
from sampling.step_cache.regions import Blocks
from tests.families.networks import tiny_transformer
from tests.families.tiny import tiny_pipeline
from tests.runtime.truth import guided_call

NAMES = ("text_dit", "dit", "sd3", "flux", "wan", "qwen_image")


def paint(pipe: Any, name: str) -> torch.Tensor:
    arguments = {**guided_call(pipe, name, guided=True), "num_inference_steps": 5}
    return torch.as_tensor(pipe(**{**arguments, "generator": torch.Generator().manual_seed(5)})[0])


def guidance() -> dict[str, Any]:
    found = {}
    for name in NAMES:
        pipe = tiny_pipeline(name)
        plain, calls = paint(pipe, name), []
        sizes = pipe.transformer.register_forward_pre_hook(lambda *_, calls=calls: None)
        blocks = next(iter(pipe.transformer.children()))
        counted = blocks.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with GuidanceParallel().attach(pipe) as attached:
            found[name] = {"error": relative_error(paint(pipe, name), plain), "calls": len(calls)}
            found[name]["inactive"] = attached.report()["inactive"]
        counted.remove()
        sizes.remove()
    return found


def cached() -> dict[str, Any]:
    """A gate that looks at tensors decides alike on both ranks, though each sees its own branch."""
    pipe = tiny_pipeline("text_dit")
    cache = StepCache(FirstBlock(0.12), Newton(1), Blocks(1), group=dist.group.WORLD)
    with GuidanceParallel().attach(pipe), cache.attach(pipe) as attached:
        paint(pipe, "text_dit")
        strips = list(attached.report()["strip"].values())
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, strips)
    return {"strips": gathered}


@torch.no_grad()
def ulysses() -> float:
    """Flux with its tokens on two processes against one."""
    inputs = {
        "hidden_states": torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)),
        "encoder_hidden_states": torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1)),
        "pooled_projections": torch.randn(1, 16, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }
    model = tiny_transformer("flux")
    plain = model(**inputs)[0]
    context_parallel(model)
    return relative_error(model(**inputs)[0], plain)


def accelerated() -> dict[str, Any]:
    """Both kinds of parallelism as a part of an acceleration; leaving gives one process its bits back."""
    found = {}
    for kind, name in (("guidance", "text_dit"), ("guidance", "wan"), ("context", "flux")):
        pipe = tiny_pipeline(name)
        plain = paint(pipe, name)
        clean = [sorted(vars(module)) for module in pipe.transformer.modules()]
        with AccelerationConfig.from_dict({"parallel": kind}).apply(pipe) as handle:
            error = relative_error(paint(pipe, name), plain)
            part = handle.report()["parallel"]
        leaves = torch.equal(paint(pipe, name), plain)
        is_clean = [sorted(vars(module)) for module in pipe.transformer.modules()] == clean
        found[f"{kind} {name}"] = {"error": error, "active": part.is_active, "exact": leaves, "clean": is_clean}
    pipe = tiny_pipeline("text_dit")
    both = {"parallel": "guidance", "step_cache": "fbcache:threshold=0.3"}
    with AccelerationConfig.from_dict(both).apply(pipe) as handle:
        paint(pipe, "text_dit")
        strips = list(handle.report()["step_cache"].values["strip"].values())
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, strips)
    return {"kinds": found, "strips": gathered}


def main(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    found = {"guidance": guidance(), "cached": cached(), "ulysses": ulysses(), "accelerated": accelerated()}
    with open(f"{result}.{rank}", "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
