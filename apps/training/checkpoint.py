"""Checkpoints that resume exactly, made of safetensors and JSON only (nothing is ever unpickled).

    checkpoint-000500/
      weights.safetensors     trained parameters (fp32) and buffers, `module/parameter`
      ema.safetensors         their moving average; empty where the optimizer keeps the average itself
      optimizer.safetensors   optimizer tensors, `module/parameter|exp_avg`
      random-0.safetensors    random states of process 0, one file per process
      state.json              step, seconds, values that the optimizer keeps for its groups of parameters,
                              configuration, sizes of the files above; written last

A folder is written as `checkpoint-000500.tmp` and renamed when complete, so that a checkpoint is whole or absent.
"""

import json
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NAME = re.compile(r"checkpoint-(\d+)")
_ABSENT = object()


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or made for something else."""


@dataclass
class TrainState:
    """Everything a step reads and writes; what a checkpoint holds.

    Attributes:
        parameters: Trained parameters by `module/parameter`, each once even if tied.
        buffers: Persistent buffers by `module/buffer`.
        ema: Moving average of `parameters`.
        optimizer: The optimizer over `parameters`.
        step: Optimizer steps taken.
        seconds: Training time so far, over all slices.
        initial_groups: What the groups of the optimizer hold at first, parameters left out.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    initial_groups: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.initial_groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]

    def changed_group_values(self) -> list[dict[str, Any]]:
        """Return what the optimizer itself has written into each of its groups, such as Prodigy's estimate `d`.

        What is as it was made comes from the configuration, which may change from one slice of a run to the next; the
        learning rate follows from the step.

        Raises:
            CheckpointError: If a value is no number, text, truth value or None, so that JSON cannot hold it exactly.
        """
        changed = [
            {
                key: value
                for key, value in group.items()
                if key not in ("params", "lr") and (isinstance(value, Tensor) or value != initial.get(key, _ABSENT))
            }
            for group, initial in zip(self.optimizer.param_groups, self.initial_groups, strict=True)
        ]
        for key, value in (item for values in changed for item in values.items()):
            if not isinstance(value, int | float | str | None):
                kind = type(value).__name__
                raise CheckpointError(
                    f"the optimizer keeps {key!r} of a group of parameters as {kind}; a checkpoint holds int, float, "
                    "str, bool and None there: use another version of its package or another optimizer.name"
                )
        return changed


def trained_parameters(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return parameters with `requires_grad` by `module/parameter`; tied ones appear once, even across modules."""
    every = {
        f"{module_name}/{name}": parameter
        for module_name, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    first = {id(parameter): name for name, parameter in reversed(every.items())}
    return {name: parameter for name, parameter in every.items() if first[id(parameter)] == name}


def persistent_buffers(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return buffers that belong to the state dict, by `module/buffer`."""
    found = {}
    for module_name, module in modules.items():
        buffers = dict(module.named_buffers())
        found |= {f"{module_name}/{name}": buffers[name] for name in module.state_dict() if name in buffers}
    return found


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"checkpoint-{step:06d}"


def begin(folder: Path, step: int) -> Path:
    """Make the empty temporary folder of a checkpoint (first process only)."""
    temporary = folder / f"{checkpoint_path(folder, step).name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def write_random_state(temporary: Path, rank: int) -> None:
    """Write the random states of this process (every process)."""
    state: Any = np.random.get_state()  # noqa: NPY002 (the global state is what is kept)
    name, keys, position, has_gauss, cached = state
    version, internal, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(internal, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    scalars = {"numpy": [name, position, has_gauss, cached], "python": [version, gauss]}
    save_file(tensors, temporary / f"random-{rank}.safetensors", {"scalars": json.dumps(scalars)})


def read_random_state(checkpoint: Path, rank: int) -> None:
    """Restore the random states of this process.

    Raises:
        CheckpointError: If the run had fewer processes.
    """
    path = checkpoint / f"random-{rank}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} has no random state for process {rank}; resume with as many processes")
    with safe_open(path, "pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name, position, has_gauss, cached = scalars["numpy"]
    version, gauss = scalars["python"]
    torch.set_rng_state(tensors["torch"])
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002 (the global state is what is kept)
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def commit(temporary: Path, state: TrainState, config: dict[str, Any], world_size: int) -> Path:
    """Write the tensors and `state.json`, then rename the folder to its final name (first process only).

    Returns:
        The path of the finished checkpoint.
    """
    save_file(_contiguous({**state.parameters, **state.buffers}), temporary / "weights.safetensors")
    save_file(_contiguous(state.ema), temporary / "ema.safetensors")
    optimizer_tensors = {
        f"{name}|{key}": _as_tensor(value)
        for name, parameter in state.parameters.items()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }
    save_file(_contiguous(optimizer_tensors), temporary / "optimizer.safetensors")
    description = {
        "step": state.step,
        "seconds": state.seconds,
        "world_size": world_size,
        "optimizer_groups": state.changed_group_values(),
        "files": {file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
        "config": config,
    }
    (temporary / "state.json").write_text(json.dumps(description, indent=1))
    final = temporary.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    return final


def read(checkpoint: Path, state: TrainState, world_size: int, optimizer_name: str) -> dict[str, Any]:
    """Load a checkpoint into the networks, the moving average and the optimizer, in place.

    Args:
        checkpoint: A complete checkpoint folder.
        state: The state to fill; its names and shapes must be those of the checkpoint.
        world_size: Number of processes now.
        optimizer_name: `optimizer.name` now.

    Returns:
        The configuration that the checkpoint was made with.

    Raises:
        CheckpointError: If the checkpoint is incomplete, or made for other networks, another optimizer or another
            process count.
    """
    if not is_valid(checkpoint):
        raise CheckpointError(f"{checkpoint} is missing or incomplete; use --resume latest for the newest complete one")
    description = json.loads((checkpoint / "state.json").read_text())
    if description["world_size"] != world_size:
        raise CheckpointError(
            f"{checkpoint} was made by {description['world_size']} processes, this run has {world_size}; "
            "resume with as many, or start anew from exported weights (data.init_from)"
        )
    groups = _optimizer_groups(checkpoint, description, state, optimizer_name)
    _copy_into({**state.parameters, **state.buffers}, load_file(checkpoint / "weights.safetensors"), checkpoint)
    _copy_into(state.ema, load_file(checkpoint / "ema.safetensors"), checkpoint)
    state.optimizer.state.clear()
    for full_name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, key = full_name.rpartition("|")
        parameter = state.parameters[name]
        state.optimizer.state[parameter][key] = tensor.to(parameter.device)
    for group, values in zip(state.optimizer.param_groups, groups, strict=True):
        group.update(values)
    state.step, state.seconds = description["step"], description["seconds"]
    return description["config"]


def is_valid(checkpoint: Path) -> bool:
    """Tell whether a folder is a complete checkpoint: renamed, described, and every file there at its full size.

    One that the run deletes in this moment is none.
    """
    if not _NAME.fullmatch(checkpoint.name):
        return False
    try:
        files = json.loads((checkpoint / "state.json").read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if is_valid(path)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def resolve(folder: Path, resume: str) -> Path:
    """Return the checkpoint that `--resume` names: `latest` or a path.

    Raises:
        CheckpointError: If there is none.
    """
    if resume != "latest":
        return Path(resume)
    found = complete_checkpoints(folder)
    if not found:
        raise CheckpointError(f"no complete checkpoint in {folder}; start without --resume")
    return found[-1]


def rotate(folder: Path, limit: int) -> None:
    """Delete all but the `limit` newest complete checkpoints.

    Incomplete folders do not count, so the only one that can be resumed from is never deleted.
    """
    for path in complete_checkpoints(folder)[:-limit]:
        shutil.rmtree(path)


def _optimizer_groups(
    checkpoint: Path, description: dict[str, Any], state: TrainState, optimizer_name: str
) -> list[dict[str, Any]]:
    """Return the values that a checkpoint has for each group of the optimizer, if it is of the same optimizer."""
    made_with = description["config"].get("optimizer", {}).get("name", optimizer_name)
    if made_with != optimizer_name:
        raise CheckpointError(
            f"{checkpoint} was made with optimizer.name = {made_with!r}, this run has {optimizer_name!r}; resume with "
            "the same, or start anew from exported weights (data.init_from)"
        )
    count = len(state.optimizer.param_groups)
    groups = description.get("optimizer_groups", [{}] * count)  # absent before there were optimizers that keep values
    if len(groups) != count:
        raise CheckpointError(
            f"{checkpoint} has {len(groups)} groups of parameters, the optimizer of this run has {count}; resume with "
            "the settings of [optimizer] that it was made with"
        )
    return groups


def _as_tensor(value: Any) -> Tensor:
    # Python's floats have 64 bits, and torch would make 32 of them.
    return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _contiguous(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _copy_into(targets: dict[str, Any], tensors: dict[str, Tensor], checkpoint: Path) -> None:
    differing = sorted(set(targets) ^ set(tensors))
    differing += [name for name in targets if name in tensors and targets[name].shape != tensors[name].shape]
    if differing:
        raise CheckpointError(f"{checkpoint} was made for another network: {differing[0]!r} differs; check [model]")
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)
