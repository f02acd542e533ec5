import torch

from dit.models.dit import DiT
from dit.runtime.attachment import attachments
from tests.runtime.overhead import NoOp, measure_overhead


def test_a_mechanism_that_does_nothing_costs_next_to_nothing() -> None:
    """The bar is 0.5 % of a DiT-XL-shaped step; measured far below (see tests/runtime/overhead.py)."""
    found = measure_overhead(blocks=2, repeats=3)
    assert found.share < 0.005, found


def test_detached_costs_nothing_at_all() -> None:
    """No hook of ours is left in the path of a call."""
    model = DiT(sample_size=4, num_layers=2, num_attention_heads=1, attention_head_dim=8, num_classes=2)
    NoOp().attach(model).detach()
    assert attachments(model) == []
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    assert torch.is_grad_enabled()
