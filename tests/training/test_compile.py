"""`run.compile`: the repeated blocks are compiled, and the run trains, resumes and exports as without it."""

import pytest
import torch

from apps.training.compile import compile_blocks, uncompiled
from apps.training.config import ConfigError
from dit.models.text_dit import TextDiT


def network() -> TextDiT:
    torch.manual_seed(0)
    return TextDiT(in_channels=2, sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=16, text_dim=8)


@pytest.fixture
def without_compiler(monkeypatch) -> None:
    """Let blocks be marked for compiling where there is no compiler: nothing here is compiled."""
    monkeypatch.setattr("apps.training.compile._require_compiler", lambda: None)


@pytest.mark.usefixtures("without_compiler")
def test_only_trained_blocks_are_compiled_and_names_stay() -> None:
    trained, frozen, other = network(), network().requires_grad_(False), torch.nn.Linear(2, 2)
    names = list(trained.state_dict())
    assert compile_blocks({"trained": trained, "frozen": frozen, "other": other}) == 2
    assert list(trained.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in trained.transformer_blocks)
    assert all(block._compiled_call_impl is None for block in frozen.transformer_blocks)


def test_a_missing_compiler_is_said_before_the_first_step(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"there is no no-such-compiler: install it .* run\.compile=false"):
        compile_blocks({"model": network()})


@pytest.mark.usefixtures("without_compiler")
def test_what_runs_once_is_not_compiled() -> None:
    plain, compiled = network(), network()
    for model in (plain, compiled):
        torch.nn.init.normal_(model.proj_out.weight, generator=torch.Generator().manual_seed(1))
    compile_blocks({"model": compiled})
    inputs = (torch.ones(1, 2, 4, 4), torch.ones(1, 3, 8), torch.tensor([500.0]))
    with uncompiled(), torch.no_grad():
        assert torch.equal(compiled(*inputs).sample, plain(*inputs).sample)
