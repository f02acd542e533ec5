"""RFD4 Proteina tiny, for which diffusers has no test: two kinds of latents, each with a scheduler, and recycling."""

from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_rfd4_proteina import CONDITION_KEYS

TOKENS, WIDTH, ATOMS, RESIDUES = 8, 16, 37, 147


def rfd4(steps: int) -> tuple[diffusers.DiffusionPipeline, dict[str, Any]]:
    """Return the pipeline with random weights and a call of it.

    Args:
        steps: which the pipeline's configuration says, not the call.
    """
    torch.manual_seed(0)
    sizes = {"token_dim": WIDTH, "nheads": 2, "dim_cond": WIDTH, "pair_repr_dim": 8, "latent_dim": 4}
    transformer = diffusers.RFD4ProteinaTransformer(
        nlayers=2, t_emb_dim=WIDTH, tri_mult_c=8, feats_seq=("xt_bb_ca", "xt_local_latents"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
        feats_pair_cond=("time_emb_bb_ca",), **sizes,
    )  # fmt: skip
    vae = diffusers.RFD4ProteinaAutoencoder(
        atom37_mask=[[True] * ATOMS] * RESIDUES, allowed_residue_types=[[True] * RESIDUES] * 7, nlayers=1,
        encoder_feats_seq=("x1_a37coors_nm",), decoder_feats_seq=("ca_coors_nm", "z_latent_seq"), **sizes,
    )  # fmt: skip
    schedulers = [
        diffusers.RFD4ProteinaScheduler(schedule_mode=mode, noise_mode="1/t", tsr_k=2.0, tsr_sigma=0.1, tail_steps=0)
        for mode in ("log", "power")
    ]
    pipe = diffusers.RFD4ProteinaPipeline(
        transformer.eval(), vae.eval(), *schedulers, recycle_depths=[2, 2, *[1] * (steps - 2)]
    )
    all_tokens = torch.ones(1, TOKENS, dtype=torch.bool)
    codes = torch.zeros(1, TOKENS, dtype=torch.long)
    return pipe, {
        "padding_mask": all_tokens,
        "is_in_context_conditioning": ~all_tokens,
        "supports_local_latent": all_tokens,
        "token_type": codes,
        "atom37_mask": torch.ones(1, TOKENS, ATOMS, dtype=torch.bool),
        "conditioning_features": {CONDITION_KEYS["sequence"]: codes, "molecule_iid": codes},
        "generator": None,
    }
