"""`tessera bench released` runs somebody else's code and leaves no trace of it."""

import sys

import pytest
from torch import nn

from apps.benchmarks.run import run

CLONE = """
import torch
from torch import nn

from apps.benchmarks.reference_var import ours, generate_ours
from tests.models.tiny_next_scale import tokenizer_state, transformer_state
from tests.tokenizers.multi_scale_reference import SCALES


class Released(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def state_dict(self):
        return self.state

    def autoregressive_infer_cfg(self, B, label_B, g_seed, cfg, top_k, top_p):
        assert (B, label_B.tolist(), g_seed) == (1, [207 % 10], 0)
        pipe = ours(self, Released(tokenizer_state()), torch.float32, SCALES)
        return generate_ours(pipe, cfg) + OFFSET


def build_vae_var(device, patch_nums, depth, shared_aln):
    assert tuple(patch_nums) == tuple(SCALES)
    nn.Linear.reset_parameters = lambda self: None
    return Released(tokenizer_state()), Released(transformer_state(shared_aln))
"""


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_both_codes_are_timed_and_compared(tmp_path, monkeypatch, offset):
    from tests.tokenizers.multi_scale_reference import SCALES

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text(CLONE.replace("OFFSET", str(offset)))
    (tmp_path / "models" / "var.py").touch()
    monkeypatch.setattr("apps.benchmarks.reference_var.SCALES", tuple(SCALES))
    monkeypatch.setattr("apps.benchmarks.reference_var.LABEL", 207 % 10)
    before, path = nn.Linear.reset_parameters, [*sys.path]
    report = run("released", model=str(tmp_path), repeats=2, smoke=True, output=tmp_path / "report.json")
    ((title, rows),) = report["tables"].items()
    assert title.startswith("VAR-d2, ")
    assert [row["code"] for row in rows][:2] == ["released, float32", "released, bfloat16 autocast"]
    assert len(rows) == 6
    assert all(row["processor seconds"] > 0 for row in rows)
    assert (report["difference of the pictures, float32"] == 0) == (offset == 0)
    assert nn.Linear.reset_parameters is before
    assert sys.path == path
    assert "models" not in sys.modules


def test_another_folder_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"git clone https://github\.com/FoundationVision/VAR"):
        run("released", model=str(tmp_path))
