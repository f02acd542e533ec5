"""Training of the tokenizers of next-scale models: `MultiScaleVQ` or `MultiScaleBSQ` around a `ViTAutoencoder`.

Images are encoded, quantized scale by scale and decoded; gradients pass the quantizer straight through. Codes that are
hardly used are moved to residuals of the batch. It may start from a trained continuous autoencoder: its latents are
clustered, and the networks only adapt to the error of quantization.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from apps.training.codebook_usage import CodebookUsage
from apps.training.config import TrainConfig
from apps.training.export import save_component
from apps.training.net2net import deeper_decoder
from apps.training.tasks.autoencoder import (
    AutoencoderConfig,
    AutoencoderModel,
    AutoencoderSection,
    AutoencoderTask,
)
from dit.tokenizers import MultiScaleBSQ, MultiScaleVQ, ViTAutoencoder
from dit.tokenizers.losses import bit_entropy, code_entropy, residual_loss, straight_through

ENTROPY_ROWS = 1024  # tokens of a batch that the entropy is estimated from
CLUSTER_PASSES = 8
MIN_CLUSTER = 5  # members; smaller clusters start again elsewhere
DECODER_SIZES = {"decoder_layers", "refiner_layers"}  # what of a trained tokenizer may grow
HITS_DECAY = 0.97  # of the running average of a code's use


class TokenizerSection(AutoencoderSection):
    """The `[task]` section.

    Attributes:
        quantizer_weight: Weight of `dit.tokenizers.losses.residual_loss`.
        commitment: How strongly features are pulled towards their codes.
        entropy_weight: Weight of the entropy terms; 0 leaves them out.
        revive_below: A code used less often than this share of the mean is moved to a random residual of the batch.
    """

    latent_noise: float = Field(default=0.0, ge=0)
    quantizer_weight: float = Field(default=0.25, ge=0)
    commitment: float = Field(default=0.25, ge=0)
    entropy_weight: float = Field(default=0.0, ge=0)
    revive_below: float = Field(default=0.03, ge=0, lt=1)


class TokenizerModel(AutoencoderModel):
    """The `[model]` section; see `MultiScaleVQ`, `MultiScaleBSQ` and `ViTAutoencoder`.

    With `data.init_from` the sizes of the networks are those found there. A tokenizer found there may get a deeper
    decoder: give `decoder_layers` or `refiner_layers`.
    """

    quantizer: Literal["vq", "bsq"] = "vq"
    scales: list[int] = [1, 2, 3, 4, 5, 6, 8]
    vocab_size: int = Field(default=1024, ge=2)
    num_phis: int = Field(default=4, ge=1)
    phi_ratio: float = Field(default=0.5, ge=0, le=1)


class TokenizerConfig(AutoencoderConfig):
    """A whole configuration of this task."""

    task: TokenizerSection
    model: TokenizerModel = TokenizerModel()


class MultiScaleTokenizerTask(AutoencoderTask):
    """Train a multi-scale tokenizer. See `apps.training.task.Task`."""

    config: TokenizerConfig
    config_class: ClassVar[type[TrainConfig]] = TokenizerConfig

    def _network(self) -> Any:
        """Return a new tokenizer, one around a trained autoencoder's networks, or the trained one of `init_from`."""
        start = self.config.data.init_from
        settings: Any = {} if start is None else ViTAutoencoder.load_config(start)
        kind = settings.get("_class_name")
        if kind in ("MultiScaleVQ", "MultiScaleBSQ"):
            vae = {"MultiScaleVQ": MultiScaleVQ, "MultiScaleBSQ": MultiScaleBSQ}[kind].from_pretrained(
                start, torch_dtype=torch.float32
            )
            vae = self._deepened(vae)
        else:
            trained = None if start is None else ViTAutoencoder.from_pretrained(start, torch_dtype=torch.float32)
            vae = self._around(trained)
        if self.config.task.train == "decoder":
            vit = vae.backbone
            quantizer = [vae.quantizer] if isinstance(vae, MultiScaleVQ) else []
            for part in (vit.patch_embed, vit.encoder_blocks, vit.encoder_norm, vit.to_latent, *quantizer):
                part.requires_grad_(False)
        if start is not None and isinstance(vae, MultiScaleVQ) and kind != "MultiScaleVQ":
            self._cluster(vae)
        return vae

    def _deepened(self, vae: Any) -> Any:
        """Return the same tokenizer, with the decoder's layers that `[model]` names, if it names any."""
        named = self.config.model.model_dump(include=self.config.model.model_fields_set & DECODER_SIZES)
        if not named:
            return vae
        layers = {name: named.get(name, vae.backbone.config[name]) for name in DECODER_SIZES}
        config, weights = deeper_decoder(vae.backbone, **layers)
        vit = {name: value for name, value in config.items() if name not in ("in_channels", "latent_channels")}
        deeper = type(vae).from_config(vae.config, vit=vit)
        kept = {name: one for name, one in vae.state_dict().items() if not name.startswith("backbone.")}
        deeper.load_state_dict(kept | {f"backbone.{name}": one for name, one in weights.items()})
        return deeper

    @torch.no_grad()
    def _cluster(self, vae: Any) -> None:
        """Initialize the codebook by k-means over the residuals that all scales have to code.

        The coarse scales' residuals depend on the codes, so assignments and means alternate over whole passes.
        """
        features = torch.cat([vae.eval().features(images) for images in self._calibration()])  # (S, C, H, W)
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)  # (M, C)
        rng = torch.Generator().manual_seed(self.config.run.seed)
        codes = vae.quantizer.codebook.weight  # (V, C)
        small = torch.ones(len(codes), dtype=torch.bool)  # (V,): clusters that start (again) at a random row
        for _ in range(CLUSTER_PASSES):
            codes[small] = rows[torch.randint(len(rows), (int(small.sum()),), generator=rng)]
            indices = vae.quantize_features(features).indices
            rows = torch.cat(vae.residuals(features, vae.partial_sums(indices)))  # (M, C)
            chosen = torch.cat([tokens.flatten() for tokens in indices])  # (M,)
            counts = torch.bincount(chosen, minlength=len(codes))  # (V,)
            sums = torch.zeros_like(codes).index_add_(0, chosen, rows)  # (V, C)
            codes[counts > 0] = (sums / counts[:, None])[counts > 0]
            small = counts < MIN_CLUSTER
        vae.quantizer.hits.fill_(1.0)  # in use until counted otherwise
        vae.train()

    def _around(self, trained: ViTAutoencoder | None) -> Any:
        """Return a tokenizer with new codes around a trained autoencoder's networks, or around new ones."""
        model = self.config.model
        if trained is None:
            own = {"quantizer", "scales", "vocab_size", "num_phis", "phi_ratio", "latent_channels"}
            channels, vit = model.latent_channels, model.model_dump(exclude=own)
            vit["sample_size"] = self.config.data.resolution
        else:
            channels = trained.latent_channels
            vit = {
                k: v for k, v in trained.config.items() if k[0] != "_" and k not in ("in_channels", "latent_channels")
            }
        if model.quantizer == "bsq":
            vae: Any = MultiScaleBSQ(scales=tuple(model.scales), latent_channels=channels, vit=vit)
        else:
            vae = MultiScaleVQ(
                scales=tuple(model.scales),
                latent_channels=channels,
                vocab_size=model.vocab_size,
                num_phis=model.num_phis,
                phi_ratio=model.phi_ratio,
                vit=vit,
            )
            nn.init.normal_(vae.quantizer.codebook.weight)
            for phi in vae.quantizer.phis:  # the identity: nothing to correct yet
                nn.init.dirac_(phi.weight)
                nn.init.zeros_(phi.bias)
        if trained is not None:
            vae.backbone.load_state_dict(trained.state_dict())
        return vae

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reconstruction error, and how far the scales' sums are from the features."""
        images, task = batch["images"], self.config.task  # (B, 3, H, W)
        if task.train == "decoder":
            self.vae.backbone.latent_norm.eval()
        generated = batch.get("generated", images.new_empty(0))  # (G, C, H, W)
        features = self.vae.features(images[len(generated) :]).float()  # (B - G, C, H, W)
        with torch.autocast(images.device.type, enabled=False):
            latent, loss, values = self._quantize(features)
        decoded: Tensor = self.vae.decode(self._disturbed(latent, generated)).sample  # (B, 3, H, W)
        error, parts = self._image_loss(decoded, images)
        return error + loss, {**parts, **values}

    def _quantize(self, features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return quantized features (B, C, H, W) with gradients to the features, the quantizer's loss, log values."""
        task = self.config.task
        if isinstance(self.vae, MultiScaleVQ) and task.train == "all":
            self._revive(features)
        with torch.no_grad():
            indices = self.vae.quantize_features(features.detach()).indices
        sums = self.vae.partial_sums(indices)
        latent = straight_through(features, sums[-1])  # (B, C, H, W)
        error = (sums[-1] - features).detach().square().mean() / features.detach().square().mean()
        if task.train == "decoder":
            return latent, features.new_zeros(()), {"quantization_error": error}
        loss = task.quantizer_weight * residual_loss(features, sums, task.commitment)
        values = {"quantization_error": error}
        if isinstance(self.vae, MultiScaleVQ):
            values["dead"] = self._count(indices)
        if task.entropy_weight:
            entropy = self._entropy(torch.cat(self.vae.residuals(features, [part.detach() for part in sums])))
            loss, values["entropy"] = loss + task.entropy_weight * entropy, entropy.detach()
        return latent, loss, values

    def _entropy(self, rows: Tensor) -> Tensor:
        rows = rows[torch.randint(len(rows), (min(ENTROPY_ROWS, len(rows)),), device=rows.device)]  # (M, C)
        if isinstance(self.vae, MultiScaleBSQ):
            return bit_entropy(rows)
        return code_entropy(rows, self.vae.quantizer.codebook.weight)

    @torch.no_grad()
    def _count(self, indices: list[Tensor]) -> Tensor:
        """Update the running use of each code at each scale and return the share that is hardly used."""
        hits = self.vae.quantizer.hits  # (S, V)
        for row, tokens in zip(hits, indices, strict=True):
            count = torch.bincount(tokens.flatten(), minlength=len(row))  # (V,)
            row.lerp_(count.to(row), 1 - HITS_DECAY)
        return self._is_dead(hits).float().mean()

    def _is_dead(self, hits: Tensor) -> Tensor:
        """Tell which codes (V,) are used less than the given share of the mean."""
        total = hits.sum(0)  # (V,)
        return total < self.config.task.revive_below * total.mean()

    @torch.no_grad()
    def _revive(self, features: Tensor) -> None:
        """Move hardly used codes to residuals of the batch. All processes see the same `hits`, so all take part."""
        quantizer = self.vae.quantizer
        is_new = bool((quantizer.hits == 0).all())  # before the first step nothing has been used
        dead = torch.ones_like(quantizer.hits[0], dtype=torch.bool) if is_new else self._is_dead(quantizer.hits)  # (V,)
        if not dead.any():
            return
        sums = self.vae.partial_sums(self.vae.quantize_features(features).indices)
        if is_new:  # no code means anything yet: what coarse scales would see is the shrunk features
            sums = [torch.zeros_like(part) for part in sums]
        rows = torch.cat(self.vae.residuals(features, sums))  # (M, C)
        chosen = rows[torch.randint(len(rows), (int(dead.sum()),), device=rows.device)]  # (D, C)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(chosen, 0)
        quantizer.codebook.weight[dead] = chosen
        mean = quantizer.hits.sum(0).mean() if not is_new else torch.ones(())
        quantizer.hits[:, dead] = mean / len(quantizer.hits)  # in use until counted otherwise

    def validate(self) -> dict[str, float]:
        """Return PSNR, and how the codes of the same images are used; plot that in the run's folder."""
        vae = self._calibrated()
        usage = self.usage(vae)
        usage.plot(self.config.run.folder / "code_usage.png")
        return {**self.measure(vae), **usage.summary()}

    def usage(self, vae: Any) -> CodebookUsage:
        """Count the codes of the held-out images."""
        is_bits = isinstance(vae, MultiScaleBSQ)
        codes = 2 * vae.latent_channels * vae.config.patchify**2 if is_bits else vae.config.vocab_size
        usage = CodebookUsage(len(vae.grids), codes, is_bits)
        for start in range(0, len(self.held_out), 32):
            rows = range(start, min(start + 32, len(self.held_out)))
            images = self.held_out.images(rows).to(self.context.device)  # (b, 3, H, W)
            usage.add(vae.quantize(images).indices)
        return usage

    def export(self, folder: Path) -> None:
        """Write `vae/`, its code statistics fitted to calibration images."""
        save_component(self._calibrated(), folder / "vae")

    def _latent_norm(self, vae: Any) -> nn.BatchNorm1d:
        return vae.backbone.latent_norm
