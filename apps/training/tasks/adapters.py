"""What all training of adapters shares: a pipeline, adapters on its network, and the file they are written to."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from diffusers.models import embeddings
from torch import Tensor, nn

from apps.training.config import ConfigError
from apps.training.data.file_rows import Bucket
from apps.training.network_inputs import NetworkInputs
from apps.training.task import TaskContext
from apps.training.tasks.lora_config import LoraModel
from dit.layers.embeddings import LabelEmbedding
from dit.lora.adapters import DEFAULT_FILE, add_adapter, save_adapter, with_adapter_methods
from dit.lora.timestep_experts import TimestepArgument, checkpointed
from dit.runtime.families import UnknownFamilyError, call_family_of
from pipelines import load_pipeline
from pipelines.info.inspection import info_of
from pipelines.network_calls import Ragged
from sampling.diffusion_targets import noise_process

ADAPTER = "default"


class AdapterTask:
    """A pipeline whose network gets adapters; the base of tasks, see `apps.training.task.Task`.

    Args:
        config: With the sections `run`, `model` and `lora` of `lora_config`.
        context: Where it runs.

    Attributes:
        pipe: The pipeline.
        network: Its network.
        process: How its data becomes noise.
        inputs: What the network is shown.
        adapted: Names of the layers with adapters.

    Raises:
        ConfigError: The model can't be loaded or trained.
    """

    def __init__(self, config: Any, context: TaskContext) -> None:
        self.config, self.context = config, context
        self.pipe: Any = load_for_training(config.model, context.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.network: Any = _network(self.pipe, config.model.network)
        self.inputs: Any = self.make_inputs(config.run.output / "cache")
        self.adapted: list[str] = []

    def make_inputs(self, cache: Path) -> Any:
        """Find out how the pipeline's data becomes noise, and return what its network is shown.

        Args:
            cache: Folder of what is computed once.

        Raises:
            ConfigError: It is no model of noise, or one that can't be trained.
        """
        model = self.config.model
        if info_of(self.pipe).grids:
            raise ConfigError(
                f"model.pretrained = {model.pretrained!r} predicts tokens scale by scale and removes no noise: use "
                "task.kind = 'lora_next_scale'"
            )
        try:
            process = noise_process(self.pipe.scheduler)
        except ValueError as error:
            raise ConfigError(f"model.pretrained = {model.pretrained!r}: {error}") from error
        bounds = timesteps_of(self.pipe, model.network, process.num_timesteps)
        self.process = dataclasses.replace(process, bounds=bounds)
        return NetworkInputs(self.pipe, self.network, cache, model.guidance, dict(model.options))

    def modules(self) -> dict[str, nn.Module]:
        """Return the network; only its adapters are trained."""
        return {"transformer": self.network}

    def add_adapters(self, bucket: Bucket | None = None) -> list[str]:
        """Put adapters on the network, freeze the rest, and return the names of the adapted layers.

        Args:
            bucket: A size that is trained on; None is the pipeline's own.
        """
        with_adapter_methods(self.network)
        try:
            adapted = add_adapter(self.network, self.config.lora.settings(), ADAPTER, self._timestep_argument(bucket))
        except ValueError as error:
            raise ConfigError(f"lora.{error}") from error
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if self.config.model.gradient_checkpointing:
            if not getattr(self.network, "_supports_gradient_checkpointing", False):
                raise ConfigError(f"model.gradient_checkpointing: {type(self.network).__name__} can't; set it to false")
            is_timed = self.config.lora.algorithm == "td_lora"
            self.network.enable_gradient_checkpointing(checkpointed(self.network) if is_timed else None)
        keep_conditions(self.network)
        return adapted

    def _timestep_argument(self, bucket: Bucket | None) -> TimestepArgument | None:
        """Return how the pipeline tells its network the timestep, where adapters depend on it."""
        if self.config.lora.algorithm != "td_lora":
            return None
        if not isinstance(self.inputs, NetworkInputs):
            raise ConfigError(
                "lora.algorithm = 'td_lora' mixes experts by the timestep, and models that generate scale by scale "
                "have none: use 'lora'"
            )
        info = self.inputs.info
        timed = self.inputs.call(bucket or (info.frames or 1, info.height, info.width)).timed
        name, found = next(iter(timed.items()))
        return TimestepArgument(name, found.factor * self.process.num_timesteps, found.offset)

    def to_device(self, batch: Any) -> Any:
        """Return a batch on the device of the network."""
        return send_to_device(batch, self.context.device)

    def predict(self, bucket: Bucket, noisy: Tensor, timesteps: Tensor, arguments: list[dict[str, Any]]) -> Tensor:
        """Call the network on a batch, or on sample after sample where texts of several lengths can't be joined."""
        call = self.inputs.call(bucket)
        try:
            return call.predict(self.network, noisy, timesteps, arguments)
        except Ragged:
            parts = [
                call.predict(self.network, noisy[row : row + 1], timesteps[row : row + 1], arguments[row : row + 1])
                for row in range(len(noisy))
            ]
            return torch.cat(parts)

    def sizes(self) -> dict[Bucket, int]:
        """Return how many files are trained on of each size; {} where files aren't what it trains on."""
        return {}

    def ahead(self) -> str:
        """Say what is computed before the first step and takes long; "" where that is no more than encoding files."""
        return ""

    def largest_batch(self) -> dict[str, Any]:
        """Return a batch that needs as much memory as any, on the CPU."""
        return self.batch(0)

    def batch(self, index: int) -> dict[str, Any]:
        """Return a batch, see `apps.training.task.Task`."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Write the adapters as `pytorch_lora_weights.safetensors`."""
        self.save_adapter(folder / DEFAULT_FILE)

    def save_adapter(self, path: Path) -> Path:
        """Write the adapters as one file (loha, lokr: one folder), with what they were trained on in its metadata."""
        return save_adapter(self.network, path, self.config.lora.settings(), self.metadata(), ADAPTER)

    def metadata(self) -> dict[str, str]:
        """Return what the file says of itself."""
        try:
            family = call_family_of(self.network).name
        except UnknownFamilyError:
            family = ""
        found = {
            "lora_family": family,
            "base_model": Path(self.config.model.pretrained).name,
            "modelspec.title": self.config.run.name,
            "modelspec.trigger_phrase": getattr(self.config.data, "trigger", ""),
        }
        return {key: value for key, value in found.items() if value}


def load_for_training(model: LoraModel, device: torch.device) -> DiffusionPipeline:
    """Load the pipeline that is fine-tuned.

    Raises:
        ConfigError: It can't be loaded.
    """
    try:
        return load_pipeline(model.pretrained, device=device, dtype=model.dtype, revision=model.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained = {model.pretrained!r}: {error}") from error


def timesteps_of(pipe: Any, network: str, num_timesteps: int) -> tuple[float, float] | None:
    """Return the lowest and highest timestep that a pipeline asks a network at; None for all.

    Args:
        pipe: The pipeline. Wan 2.2 has `transformer` for much and `transformer_2` for little noise.
        network: Name of the network.
        num_timesteps: Of the scheduler.
    """
    ratio = pipe.config.get("boundary_ratio")
    if ratio is None:
        return None
    boundary = ratio * num_timesteps
    return (0.0, boundary) if network == "transformer_2" else (boundary, float(num_timesteps))


def keep_conditions(network: nn.Module) -> None:
    """Keep a network in training mode from dropping conditions itself: `data.caption_dropout` has dropped some.

    Its own mode and that of its tables of classes decide that, and stay those of evaluation from now on. The modes of
    its other layers, with the dropout of adapters, change as ever.
    """
    tables = [one for one in network.modules() if isinstance(one, LabelEmbedding | embeddings.LabelEmbedding)]
    for module in (network, *tables):
        module.train = functools.partial(_train_layers, module)  # type: ignore[method-assign]
        module.training = False


def _train_layers(module: nn.Module, mode: bool = True) -> nn.Module:
    """Set the mode of the layers of a module; its own is evaluation."""
    type(module).train(module, mode)
    module.training = False
    return module


def _network(pipe: Any, name: str) -> nn.Module:
    """Return the network of a pipeline that gets adapters.

    Raises:
        ConfigError: There is none of that name.
    """
    network = getattr(pipe, name, None)
    if not isinstance(network, nn.Module):
        parts = ", ".join(key for key, part in pipe.components.items() if isinstance(part, nn.Module))
        raise ConfigError(f"model.network = {name!r} is no part of {type(pipe).__name__}: give one of {parts}")
    return network
