"""A kernel can read which layer and which heads it computes for, on our networks and on diffusers' own."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit.models.next_scale import NextScaleTransformer
from dit.runtime import LayerContext, Mechanism, current_layer, follow_layers
from dit.runtime.diffusers_compat import (
    attention_backend_scope,
    register_attention_backend,
    unregister_attention_backend,
)
from dit.runtime.families import family_of
from dit.runtime.hooks import AttachError, Attachment
from dit.runtime.layer_context import head_scope, layer_scope
from tests.families.networks import tiny_transformer
from tests.families.tiny import tiny_call, tiny_pipeline
from tests.models import infinity_reference, next_scale_reference
from tests.models.tiny_next_scale import transformer as tiny_next_scale

NAMES = ("text_dit", "class_dit", "flux", "wan", "hunyuan_video", "ltx", "qwen_image")
"""Families whose attention goes through diffusers' dispatcher."""


class Followed(Mechanism):
    """Asks for the layer context, and for nothing else."""

    name = "followed"

    def __init__(self, *kinds: str) -> None:
        self.kinds, self.layers = kinds, []

    def install(self, attachment: Attachment) -> None:
        self.layers = follow_layers(attachment, *self.kinds)


class Kernel:
    """A backend that notes where it is called; what it computes for a layer may depend on it."""

    def __init__(self) -> None:
        self.seen: list[LayerContext | None] = []
        self.shapes: list[torch.Size] = []
        self.gains: dict[str, Tensor] = {}  # name of a layer -> a factor for each head, (K,)

    def __call__(self, query, key, value, attn_mask=None, scale=None):
        layer = current_layer()
        self.seen.append(layer)
        self.shapes.append(query.shape)
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=attn_mask, scale=scale
        ).transpose(1, 2)  # (B, N, K, E)
        if layer is None or layer.name not in self.gains:
            return out
        heads = range(out.shape[2]) if layer.heads is None else layer.heads
        return out * self.gains[layer.name][list(heads)][:, None]


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    found = Kernel()
    # An instance's signature isn't that of a function for diffusers, which drops arguments that it doesn't name.
    register_attention_backend("noted", lambda query, key, value, attn_mask, scale: found(query, key, value, attn_mask))
    yield found
    unregister_attention_backend("noted")


def run(name: str, pipe) -> Tensor:
    output = pipe(**{**tiny_call(name), "generator": torch.Generator().manual_seed(5)})
    return torch.as_tensor(output[0])


def traces(model: nn.Module) -> list[tuple]:
    return [(name, sorted(vars(part)), len(part._forward_hooks)) for name, part in model.named_modules()]


# ------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_reads_its_layer(name: str, kernel: Kernel) -> None:
    pipe = tiny_pipeline(name)
    layers = family_of(pipe.transformer).attention_layers(pipe.transformer)
    expected = [one for one in layers if hasattr(one.module.processor, "_attention_backend")]
    with attention_backend_scope([pipe.transformer], "noted"):
        before, trace = run(name, pipe), traces(pipe.transformer)
        calls = len(kernel.seen)
        assert set(kernel.seen) == {None}, "nobody asked"
        kernel.seen.clear()
        with Followed().attach(pipe):
            assert torch.equal(run(name, pipe), before)
        assert traces(pipe.transformer) == trace
    assert len(kernel.seen) == calls
    assert None not in kernel.seen
    first = list(dict.fromkeys(kernel.seen))
    assert [(one.name, one.kind, one.axes) for one in first] == [(one.name, one.kind, one.axes) for one in expected]
    for kind in {one.kind for one in first}:
        alike = [one for one in first if one.kind == kind]
        assert [one.index for one in alike] == list(range(len(alike))), "in the order of execution"
        assert {one.count for one in alike} == {len(alike)}
    assert {one.heads for one in first} == {None}
    assert current_layer() is None


@pytest.mark.parametrize("name", ["cogvideox", "sd3", "pixart", "mochi"])
def test_so_does_what_intercepts_torch_itself(name: str) -> None:
    """Other networks of diffusers call torch's attention without the dispatcher."""
    seen: list[LayerContext | None] = []

    class Intercepted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append(current_layer())
            return func(*args, **(kwargs or {}))

    pipe = tiny_pipeline(name)
    before = run(name, pipe)
    with Followed().attach(pipe) as attachment, Intercepted():
        assert torch.equal(run(name, pipe), before)
    in_network = [one for one in seen if one is not None]  # not those of text encoders and decoders
    assert list(dict.fromkeys(in_network)) == attachment.mechanism.layers


def test_a_layer_of_a_foreign_network_can_be_treated_by_itself(kernel: Kernel) -> None:
    """The heads of one layer of Wan are changed as a hook on its output projection would change them."""
    pipe = tiny_pipeline("wan")
    attn = pipe.transformer.blocks[1].attn1
    gains = torch.tensor([0.5, -2.0])
    wide = gains.repeat_interleave(attn.to_out[0].in_features // 2)  # (D,)
    hook = attn.to_out[0].register_forward_pre_hook(lambda module, args: args[0] * wide)
    expected = run("wan", pipe)
    hook.remove()
    kernel.gains = {"blocks.1.attn1": gains}
    with attention_backend_scope([pipe.transformer], "noted"):
        assert not torch.allclose(run("wan", pipe), expected, atol=1e-3)  # without the mechanism it can't know
        with Followed("self").attach(pipe) as attachment:
            torch.testing.assert_close(run("wan", pipe), expected, rtol=1e-4, atol=1e-5)
    assert {one.kind for one in attachment.mechanism.layers} == {"self"}


def test_only_the_kinds_asked_for_are_followed(kernel: Kernel) -> None:
    pipe = tiny_pipeline("wan")
    with attention_backend_scope([pipe.transformer], "noted"), Followed("cross").attach(pipe):
        run("wan", pipe)
    assert {one and one.name for one in kernel.seen} == {None, "blocks.0.attn2", "blocks.1.attn2"}
    with pytest.raises(AttachError, match="joint"):
        Followed("joint").attach(pipe)


def test_each_network_of_a_pipeline_counts_for_itself() -> None:
    both = {"transformer": tiny_transformer("wan"), "transformer_2": tiny_transformer("wan", seed=1)}
    with Followed("self").attach(SimpleNamespace(components=both)) as attachment:
        found = [(one.index, one.count, one.name) for one in attachment.mechanism.layers]
    names = [f"{prefix}blocks.{index}.attn1" for prefix in ("", "transformer_2.") for index in (0, 1)]
    assert found == [(index % 2, 2, name) for index, name in enumerate(names)]


def test_recomputed_layers_are_followed_in_the_backward_pass(kernel: Kernel) -> None:
    model = tiny_transformer("class_dit").train()
    model.enable_gradient_checkpointing()
    inputs = (torch.randn(1, 4, 4, 4), torch.tensor([500.0]), torch.tensor([1]))
    with attention_backend_scope([model], "noted"), Followed().attach(model):
        loss = model(*inputs)[0].square().mean()
        forward = [one.index for one in kernel.seen]
        loss.backward()
    assert [one.index for one in kernel.seen] == [*forward, *reversed(forward)]


def test_a_call_that_fails_leaves_no_layer(kernel: Kernel) -> None:
    model = tiny_transformer("class_dit")
    with Followed().attach(model), pytest.raises(RuntimeError):
        model.transformer_blocks[0].attn(torch.zeros(1, 2, 3))
    assert current_layer() is None


def test_compiled_networks_are_followed_too(kernel: Kernel) -> None:
    model = tiny_transformer("class_dit")
    inputs = (torch.randn(1, 4, 4, 4), torch.tensor([500.0]), torch.tensor([1]))
    with torch.no_grad(), attention_backend_scope([model], "noted"):
        expected = model(*inputs)[0]
        compiled = torch.compile(model, backend="eager")
        kernel.seen.clear()
        with Followed().attach(compiled):
            torch.testing.assert_close(compiled(*inputs)[0], expected, rtol=1e-5, atol=1e-6)
    assert [one.index for one in kernel.seen] == [0, 1]


# ------------------------------------------------------------------------- next-scale models


def steps(model: NextScaleTransformer, **cache: object) -> Tensor:
    """Logits of all scales."""
    inputs, labels = next_scale_reference.inputs(), torch.tensor(next_scale_reference.LABELS)
    condition, held = model.prepare_condition(labels), model.make_cache(len(labels), **cache)
    logits = [model.step(None, 0, condition, held)]
    for scale, place in enumerate(model.slices[1:], start=1):
        logits.append(model.step(inputs[:, place.start - 1 : place.stop - 1], scale, condition, held))
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_heads_that_attend_one_by_one_say_which_they_are(kernel: Kernel) -> None:
    """The last scale of layer 0 does so with a full cache, and not where an observer wants to see it whole."""
    model = tiny_next_scale()
    heads, scales = model.config.num_attention_heads, len(model.grids)
    kernel.gains = {
        f"transformer_blocks.{layer}.attn": torch.linspace(0.2, 2, heads).roll(layer)
        for layer in range(model.config.num_layers)
    }
    with attention_backend_scope([model], "noted"), Followed().attach(model):
        whole = steps(model, observer=lambda *_: None)
        assert {one.heads for one in kernel.seen} == {None}
        kernel.seen.clear()
        by_head = steps(model)
    torch.testing.assert_close(by_head, whole, rtol=1e-4, atol=1e-5)
    alone = [(one.index, one.heads) for one in kernel.seen if one.heads is not None]
    assert alone == [(0, range(head, head + 1)) for head in range(heads)]
    assert len(kernel.seen) == scales * model.config.num_layers + heads - 1


@torch.no_grad()
def test_the_pool_of_the_text_attends_through_the_chosen_backend(kernel: Kernel) -> None:
    """It stands outside of the blocks: a kernel is told that it is no layer of a plan."""
    model = NextScaleTransformer(**infinity_reference.config("wide")).eval()
    text = torch.randn(2, 3, infinity_reference.TEXT, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    before = model.text_pool(text, mask)
    with attention_backend_scope([model], "noted"), Followed().attach(model):
        assert torch.equal(model.text_pool(text, mask), before)
    pooled = infinity_reference.POOL_HEADS
    assert (kernel.seen, kernel.shapes[0][:3]) == ([None], (2, 1, pooled))


# ------------------------------------------------------------------------------------ scopes


def test_scopes_nest_and_end() -> None:
    layer = LayerContext(1, 4, "blocks.1.attn1", "self")
    with head_scope(range(2)):
        assert current_layer() is None  # heads of no layer
    with layer_scope(layer):
        with head_scope(range(2, 4)):
            assert current_layer().heads == range(2, 4)
            with layer_scope(None):
                assert current_layer() is None
        assert current_layer() is layer
    assert current_layer() is None
