"""Attention that networks are trained with: slow definitions, masks, grids, saving, and that it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.attention import TokenGrid
from dit.attention.plan import AttentionPlan
from dit.attention.trainable import Replacement, replace_attention, replacement, replacement_names
from dit.attention.trainable.moh import MoH, balance_loss
from dit.attention.trainable.sla2 import soft_top_k
from dit.layers.attention import SelfAttention
from dit.models.dit import DiT
from dit.models.text_dit import TextDiT
from dit.runtime.hooks import AttachError

SMALL: dict[str, dict[str, Any]] = {
    "agent": {"agents": (1, 2, 2), "window": (3, 4)},
    "agent_free": {},
    "mala": {"kernel": 3},
    "moh": {"shared": 1, "routed": 2},
    "dma": {"keep": 5},
    "coarse_gate": {"keep": 0.4, "tile": (1, 2, 2)},
    "sla": {"keep": 0.4, "block": 4, "key_block": 4},
    "sla2": {"keep": 0.4, "block": 4, "key_block": 4},
}
"""Parameters for a grid of (2, 3, 4)."""
GRID = TokenGrid(2, 3, 4, 3, "first")
HEADS, WIDTH = 4, 8


def make_layer(name: str, seed: int = 0, **params: Any) -> Any:
    """Return a layer with a replacement whose weights are all random."""
    torch.manual_seed(seed)
    layer = SelfAttention(HEADS * WIDTH, HEADS)
    processor = replacement(name, **{**SMALL[name], **params})
    for key, weight in processor.new_weights(layer).items():
        setattr(layer, key, weight)
    layer.set_processor(processor)  # pyright: ignore[reportArgumentType]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def draw(seed: int = 0, grid: TokenGrid = GRID) -> Tensor:
    return torch.randn(2, grid.length, HEADS * WIDTH, generator=torch.Generator().manual_seed(seed))


def heads_of(layer: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, (B, K, N, E), in float64."""
    query, key, value = (module(x).unflatten(-1, (HEADS, WIDTH)) for module in (layer.to_q, layer.to_k, layer.to_v))
    return tuple(x.double().transpose(1, 2) for x in (layer.norm_q(query), layer.norm_k(key), value))  # pyright: ignore


def joined(layer: SelfAttention, out: Tensor) -> Tensor:
    """Project heads (B, K, N, E) back."""
    return layer.to_out[0](out.transpose(1, 2).flatten(2).float())


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return (query @ key.mT / WIDTH**0.5 + bias).softmax(-1) @ value


# ------------------------------------------------------------- slow definitions


@torch.no_grad()
def test_agent_pools_biases_and_convolves_frame_by_frame() -> None:
    layer, x = make_layer("agent"), draw()
    query, key, value = heads_of(layer, x)
    weights = {name: value.double() for name, value in layer.state_dict().items()}
    agents = torch.stack(
        [
            query[:, :, 3:].unflatten(2, (2, 3, 4))[:, :, :, rows, columns].flatten(2, 4).mean(2)
            for rows in (slice(0, 2), slice(1, 3))
            for columns in (slice(0, 2), slice(2, 4))
        ],
        dim=2,
    )
    places = [(row, column) for _ in range(2) for row in range(3) for column in range(4)]
    coarse = {name: F.interpolate(weights[name], size=(3, 4), mode="bilinear") for name in ("an_bias", "na_bias")}
    first = torch.stack(
        [weights["ac_bias"][0, :, :, 0]] * 3
        + [
            coarse["an_bias"][:, :, r, c] + weights["ah_bias"][0, :, :, r, 0] + weights["aw_bias"][0, :, :, 0, c]
            for r, c in places
        ],
        dim=-1,
    )
    second = torch.stack(
        [weights["ca_bias"][0, :, 0]] * 3
        + [
            coarse["na_bias"][:, :, r, c] + weights["ha_bias"][0, :, r, 0] + weights["wa_bias"][0, :, 0, c]
            for r, c in places
        ],
        dim=1,
    )
    out = softmax_attention(query, agents, softmax_attention(agents, key, value, first), second)
    for frame in range(2):
        part = slice(3 + 12 * frame, 15 + 12 * frame)
        image = value[:, :, part].permute(0, 1, 3, 2).reshape(2, HEADS * WIDTH, 3, 4)
        convolved = F.conv2d(image, weights["dwc.weight"], weights["dwc.bias"], padding=1, groups=HEADS * WIDTH)
        out[:, :, part] += convolved.view(2, HEADS, WIDTH, 12).mT
    assert torch.allclose(layer(x, grid=GRID), joined(layer, out), atol=1e-5)


@torch.no_grad()
def test_agents_of_every_token_are_two_softmaxes() -> None:
    layer, x = make_layer("agent_free", share=1.0, power=1.0, shortcut=0.0), draw(grid=TokenGrid(1, 3, 4))
    query, key, value = heads_of(layer, x)
    out = softmax_attention(query, query, softmax_attention(query, key, value))
    assert torch.allclose(layer(x, grid=TokenGrid(1, 3, 4)), joined(layer, out), atol=1e-5)


@torch.no_grad()
def test_weights_of_mala_sum_to_one_and_follow_the_length_of_the_query() -> None:
    layer, x = make_layer("mala", kernel=0, gate=False), draw()
    query, key, value = heads_of(layer, x)
    query, key = F.elu(query) + 1, F.elu(key) + 1
    z = query @ key.mean(2, keepdim=True).mT / WIDTH**0.5
    weights = (1 + 1 / z) * (query @ key.mT) / WIDTH**0.5 / GRID.length - z / GRID.length  # (B, K, N, N)
    assert torch.allclose(weights.sum(-1), torch.ones_like(z[..., 0]))
    assert torch.allclose(layer(x, grid=GRID), joined(layer, weights @ value), atol=1e-5)
    longer = 3 * query
    z = longer @ key.mean(2, keepdim=True).mT / WIDTH**0.5
    sharper = (1 + 1 / z) * (longer @ key.mT) / WIDTH**0.5 / GRID.length - z / GRID.length
    assert (sharper.std(-1) > weights.std(-1)).all()


@torch.no_grad()
@pytest.mark.parametrize(("shared", "routed"), [(1, 2), (2, 1), (0, 3), (4, 0)])
def test_moh_weighs_heads_by_token(shared: int, routed: int) -> None:
    layer, x = make_layer("moh", shared=shared, routed=routed), draw()
    query, key, value = heads_of(layer, x)
    out = softmax_attention(query, key, value)
    for b in range(2):
        for n in range(GRID.length):
            token = x[b, n]
            kinds = 2 * layer.wg_0(token).softmax(-1) if shared and routed else torch.ones(2)
            gates = torch.zeros(HEADS)
            gates[:shared] = kinds[0] * (shared * layer.wg_1(token).softmax(-1) if shared > 1 else 1)
            if routed:
                probability = layer.wg(token).softmax(-1)
                best = probability.argsort(descending=True)[:routed]
                gates[shared + best] = kinds[1] * routed * probability[best] / probability[best].sum()
            out[b, :, n] *= gates[:, None]
    assert torch.allclose(layer(x, grid=GRID), joined(layer, out), atol=1e-5)
    processor = layer.processor
    processor.skip_from = 1
    assert torch.allclose(layer(x, grid=GRID), joined(layer, out), atol=1e-5)


@torch.no_grad()
def test_dma_keeps_the_keys_with_the_largest_bias_and_the_text() -> None:
    layer, x = make_layer("dma", keep=5), draw()
    query, key, value = heads_of(layer, x)
    bias = layer.A.double() * F.softplus(layer.dt_proj(value.transpose(1, 2).flatten(2).float()).double())
    bias = bias.transpose(1, 2)  # (B, K, N)
    kept = torch.zeros_like(bias, dtype=torch.bool)
    kept[..., :3] = True
    for b in range(2):
        for k in range(HEADS):
            kept[b, k, 3 + bias[b, k, 3:].argsort(descending=True)[:5]] = True
    out = softmax_attention(query, key, value, bias.masked_fill(~kept, -torch.inf)[:, :, None])
    assert torch.allclose(layer(x, grid=GRID), joined(layer, out), atol=1e-5)


def tiles_of(grid: TokenGrid) -> Tensor:
    """Return the tile (1, 2, 2) of each visual token, by its coordinates."""
    frame, row, column = grid.coordinates(torch.arange(grid.visual_length))
    return frame * 4 + row // 2 * 2 + column // 2


@torch.no_grad()
def test_coarse_gate_adds_attention_of_tiles() -> None:
    layer, x = make_layer("coarse_gate"), draw()
    query, key, value = heads_of(layer, x)
    gate = layer.to_gate_compress(x).double().unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    tiles = tiles_of(GRID)
    means = [torch.stack([y[:, :, 3:][:, :, tiles == t].mean(2) for t in range(8)], 2) for y in (query, key, value)]
    coarse = softmax_attention(*means)
    scores = means[0] @ means[1].mT
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(4, -1).indices, True)  # ceil(0.4 * 8)
    allowed = torch.ones(2, HEADS, GRID.length, GRID.length, dtype=torch.bool)
    allowed[:, :, 3:, 3:] = chosen[:, :, tiles][..., tiles]
    out = softmax_attention(query, key, value, torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf))
    out[:, :, 3:] += gate[:, :, 3:] * coarse[:, :, tiles]
    assert torch.allclose(layer(x, grid=GRID), joined(layer, out), atol=1e-5)


def sparse_of_blocks(query: Tensor, key: Tensor, value: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Attend to the best blocks of 4 visual keys, text exact; return also which pairs that is."""
    blocks = torch.arange(24) // 4
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)
    allowed = torch.ones(2, HEADS, GRID.length, GRID.length, dtype=torch.bool)
    allowed[:, :, 3:, 3:] = chosen[:, :, blocks][..., blocks]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    return softmax_attention(query, key, value, bias), allowed


@torch.no_grad()
def test_sla_adds_projected_linear_attention_to_visual_tokens() -> None:
    layer, x = make_layer("sla"), draw()
    query, key, value = heads_of(layer, x)
    means = [y[:, :, 3:].unflatten(2, (6, 4)).mean(3) for y in (query, key)]
    out, _ = sparse_of_blocks(query, key, value, means[0] @ means[1].mT, 2)  # floor(0.4 * 6)
    weights = query.softmax(-1) @ key.softmax(-1).mT
    linear = weights @ value / (weights.sum(-1, keepdim=True) + 1e-5)
    out[:, :, 3:] += layer.proj_l(linear[:, :, 3:].float()).double()
    assert torch.allclose(layer(x, grid=GRID), joined(layer, out), atol=1e-5)


@torch.no_grad()
def test_sla2_mixes_the_chosen_and_the_other_blocks() -> None:
    layer, x = make_layer("sla2", parts=6), draw()
    query, key, value = heads_of(layer, x)
    mean_query = query[:, :, 3:].unflatten(2, (6, 4)).mean(3).float()
    mean_key = (key[:, :, 3:].unflatten(2, (6, 4)).mean(3) - key.mean(2, keepdim=True)).float()
    scores = layer.proj_q(mean_query) @ layer.proj_k(mean_key).mT
    sparse, allowed = sparse_of_blocks(query, key, value, scores, 2)
    weights = (query.softmax(-1) @ key.softmax(-1).mT).masked_fill(allowed, 0)
    linear = weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    share = torch.ones(HEADS, GRID.length, 1, dtype=torch.double)
    share[:, 3:, 0] = layer.alpha.double().sigmoid().repeat_interleave(4, 1)
    assert torch.allclose(layer(x, grid=GRID), joined(layer, share * sparse + (1 - share) * linear), atol=1e-5)


@torch.no_grad()
def test_a_soft_router_at_a_low_temperature_chooses() -> None:
    layer, x = make_layer("sla2", soft_router=True, temperature=1e-6), draw()
    chosen = layer(x, grid=GRID)
    layer.train()
    assert torch.allclose(layer(x, grid=GRID), chosen, atol=1e-3)


def test_soft_top_k_sums_to_what_is_wanted_and_has_a_gradient() -> None:
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = soft_top_k(scores, 2, 0.1)
    assert torch.allclose(weights.sum(-1), torch.full((3,), 2.0), atol=1e-4)
    assert torch.equal(weights.topk(2).indices.sort().values, scores.topk(2).indices.sort().values)
    (weights * torch.arange(7.0)).sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() > 0


# ------------------------------------------------------------------ all of them


GOLDEN = {
    "agent": [-0.0404, 2.2677, -0.1638],
    "agent_free": [0.2617, 0.658, 0.0046],
    "mala": [0.1318, 3.5266, -0.2222],
    "moh": [0.046, 0.7468, 0.1112],
    "dma": [0.0134, 1.5465, -1.4736],
    "coarse_gate": [0.0552, 1.4902, -4.1465],
    "sla": [-0.1171, 1.5014, 0.2537],
    "sla2": [0.1215, 0.7484, 1.1076],
}


@pytest.mark.parametrize("name", replacement_names())
def test_golden_numbers(name: str) -> None:
    with torch.no_grad():
        out = make_layer(name)(draw(), grid=GRID)
    assert [float(x) for x in (out.mean(), out.std(), out[1, 5, 7])] == pytest.approx(GOLDEN[name], abs=2e-4)


@pytest.mark.parametrize("name", replacement_names())
def test_masked_tokens_have_no_influence(name: str) -> None:
    layer, x = make_layer(name), draw()
    mask = torch.ones(2, GRID.length, dtype=torch.bool)
    mask[:, 1:3] = False
    other = x.clone()
    other[:, 1:3] = 9
    with torch.no_grad():
        first, second = layer(x, mask, grid=GRID), layer(other, mask, grid=GRID)
    assert torch.allclose(first[:, 3:], second[:, 3:], atol=1e-5)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("name", replacement_names())
@pytest.mark.parametrize("grid", [TokenGrid(1, 1, 1), TokenGrid(1, 5, 3), TokenGrid(3, 2, 7, 4, "last", 2), None])
def test_every_grid_and_half_precision(name: str, grid: TokenGrid | None) -> None:
    layer, x = make_layer(name), draw(grid=grid or TokenGrid(1, 1, 9))
    with torch.no_grad():
        expected = layer(x, grid=grid)
        out = layer.bfloat16()(x.bfloat16(), grid=grid)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(expected).all()
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", replacement_names())
def test_every_weight_gets_a_gradient(name: str) -> None:
    layer, x = make_layer(name, **({"soft_router": True} if name == "sla2" else {})), draw()
    layer.train()(x, grid=GRID).square().sum().backward()
    without = {key for key, one in layer.named_parameters() if one.grad is None or one.grad.abs().max() == 0}
    assert without <= {"to_k.bias"}, "which a softmax doesn't see"


def tiny(name: str, **changes: Any) -> DiT:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH,
        "num_classes": 4,
        "attention": name,
        "attention_params": SMALL[name],
    }
    return DiT(**{**settings, **changes})


@pytest.mark.parametrize("name", replacement_names())
def test_networks_are_saved_and_loaded_with_it(name: str, tmp_path: Path) -> None:
    network = tiny(name)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network.eval().save_pretrained(tmp_path)
    loaded: Any = DiT.from_pretrained(tmp_path)
    assert type(loaded.transformer_blocks[1].attn.processor).name == name
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([0, 4])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(*inputs).sample, network(*inputs).sample)


@pytest.mark.parametrize("name", replacement_names())
def test_training_lowers_the_loss(name: str) -> None:
    network, generator = tiny(name, objective="velocity"), torch.Generator().manual_seed(0)
    data, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    times, labels = torch.rand(4, generator=generator), torch.arange(4)
    noisy = times[:, None, None, None] * data + (1 - times[:, None, None, None]) * noise
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (network.train()(noisy, times, labels).sample - (data - noise)).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["agent", "moh", "sla"])
@pytest.mark.parametrize("space_time", ["full", "factorised"])
def test_networks_of_clips_and_text_take_it(name: str, space_time: str) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": 16, "text_dim": 16}
    network = TextDiT(**shape, space_time=space_time, attention=name, attention_params=SMALL[name])
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    inputs = torch.randn(2, 8, 3, 6, 8), torch.randn(2, 5, 16), torch.tensor(500.0), mask
    expected = network.eval()(*inputs).sample
    assert expected.shape == inputs[0].shape
    network.train().enable_gradient_checkpointing()
    expected_loss = expected.square().mean()
    loss = network(*inputs).sample.square().mean()
    loss.backward()
    assert torch.allclose(loss, expected_loss, rtol=1e-4)


def test_dense_takes_it_all_back() -> None:
    network = tiny("moh")
    before = set(network.state_dict())
    assert replace_attention(network, "agent", **SMALL["agent"]) == [f"transformer_blocks.{i}.attn" for i in (0, 1)]
    assert not any(".wg" in key for key in network.state_dict())
    assert network.config["attention"] == "agent"
    replace_attention(network, "dense")
    assert set(network.state_dict()) == {key for key in before if ".wg" not in key}
    assert network.config["attention"] == "dense"
    assert network.config["attention_params"] is None


def test_the_balance_loss_reaches_the_router_alone() -> None:
    layer, x = make_layer("moh", balance=0.0), draw()
    layer.train()(x, grid=GRID).sum().backward()
    without = {key: one.grad.clone() for key, one in layer.named_parameters() if one.grad is not None}
    layer.zero_grad()
    processor = layer.processor
    assert isinstance(processor, MoH)
    processor.balance = 0.5
    layer(x, grid=GRID).sum().backward()
    _, loss = processor.gates(layer, x)
    assert loss is not None
    added = torch.autograd.grad(0.5 * loss, [layer.wg.weight])[0]
    for key, one in layer.named_parameters():
        expected = without[key] + added if key == "wg.weight" else without[key]
        assert one.grad is not None
        assert torch.allclose(one.grad, expected, atol=1e-4)


def test_balance_loss_is_least_where_heads_are_used_alike() -> None:
    even = torch.full((1, 4, 4), 0.25)
    assert balance_loss(even, torch.eye(4)[None]) == 1
    skewed = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(1, 4, 4)
    assert balance_loss(skewed, torch.eye(4)[[0, 0, 0, 0]][None]) > 2


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("agents", {}, "there is no attention 'agents'; use 'dense' or one of agent"),
        ("mala", {"size": 3}, "takes no size; it takes kernel, gate"),
        ("mala", {"kernel": 4}, "odd number"),
        ("agent", {"agents": [7, 7]}, "3 numbers"),
        ("moh", {"shared": 2, "routed": 3}, "routed must be 1 to 2"),
        ("moh", {"shared": 0, "routed": 0}, "at least one head"),
        ("dma", {"keep": 1.5}, "whole number"),
        ("coarse_gate", {"keep": 0}, "above 0"),
        ("sla", {"block": 0}, "at least 1"),
        ("dense", {"keep": 1}, "takes no parameters"),
    ],
)
def test_wrong_settings_say_what_is_accepted(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace_attention(tiny("agent_free"), name, **params)


def test_what_cannot_work_is_refused() -> None:
    layer, x = make_layer("agent"), draw()
    with pytest.raises(ValueError, match="27 tokens, but a grid of 24"):
        layer(x, grid=TokenGrid(2, 3, 4))
    with pytest.raises(ValueError, match="mask of pairs"):
        layer(x, torch.ones(2, 1, 27, 27, dtype=torch.bool), grid=GRID)
    with pytest.raises(ValueError, match="no layers 'attn'"):
        replace_attention(nn.Linear(2, 2), "mala")
    with pytest.raises(ValueError, match="can't be causal"):
        TextDiT(space_time="causal", attention="mala")


def test_backends_and_plans_reach_only_what_attends_by_softmax() -> None:
    network: Any = tiny("agent")
    with pytest.raises(AttachError, match="no layer of transformer_blocks"):
        AttentionPlan.uniform("dense").attach(network)
    replace_attention(network, "moh", **SMALL["moh"])
    network.set_attention_backend("native")
    assert network.transformer_blocks[0].attn.processor._attention_backend is not None
    with AttentionPlan.uniform("dense").attach(network) as attachment:
        network(torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.tensor([0]))
        assert attachment.report()["dense"] + attachment.report()["sparse"] == 2


def test_every_replacement_says_where_it_comes_from() -> None:
    for name in replacement_names():
        one = replacement(name)
        assert isinstance(one, Replacement)
        assert one.paper.startswith("arXiv ")
        assert type(one).__doc__
