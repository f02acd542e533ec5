import torch

from dit.models.dit import DiT
from dit.runtime.hooks import attachments
from dit.runtime.step_context import StepContext, step_scope
from tests.runtime.counting import count_calls, count_operations
from tests.runtime.overhead import NoOp


def test_a_mechanism_that_does_nothing_costs_a_few_calls_and_no_operation() -> None:
    """Counted; `python -m tests.runtime.overhead` measures the share of a step's time, on a machine that is quiet."""
    model = DiT(sample_size=4, num_layers=6, num_attention_heads=1, attention_head_dim=8, num_classes=2).eval()
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([500.0]), torch.tensor([1])

    def run() -> None:
        with torch.no_grad(), step_scope(StepContext(1, 0, 1, 1.0, 500.0)):
            model(*inputs)

    run()
    calls, operations = count_calls(run), count_operations(run)
    NoOp().attach(model)
    run()
    assert count_operations(run) == operations
    hooked = len(model.transformer_blocks)
    assert hooked <= count_calls(run) - calls < 40 * hooked


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
