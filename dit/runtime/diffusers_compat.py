"""All use of diffusers' private names and registries.

diffusers does not promise the names in `PRIVATE_NAMES`. A test looks all of them up, so that an upgrade that moved one
fails there and not in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import diffusers
from diffusers import FasterCacheConfig
from torch import Tensor, nn

TESTED = "0.42"
"""The minor version of diffusers whose private names these are."""

PRIVATE_NAMES: tuple[tuple[str, str], ...] = (
    ("diffusers.models.attention_dispatch", "AttentionBackendName"),
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.get_active_backend"),
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.list_backends"),
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.register"),
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry._backends"),
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry._constraints"),
    ("diffusers.models.attention_dispatch", "_AttentionBackendRegistry._supported_arg_names"),
    ("diffusers.models.attention_dispatch", "_check_attention_backend_requirements"),
    ("diffusers.hooks._helpers", "TransformerBlockRegistry._registry"),
    ("diffusers.hooks._helpers", "TransformerBlockRegistry.get"),
    ("diffusers.hooks._helpers", "TransformerBlockMetadata"),
    ("diffusers.hooks.faster_cache", "FasterCacheConfig._unconditional_conditional_input_kwargs_identifiers"),
    ("diffusers.hooks.context_parallel", "apply_context_parallel"),
    ("diffusers.hooks.context_parallel", "remove_context_parallel"),
    ("diffusers.hooks.group_offloading", "_GROUP_OFFLOADING"),
    ("diffusers.hooks.group_offloading", "_LAYER_EXECUTION_TRACKER"),
    ("diffusers.hooks.group_offloading", "_LAZY_PREFETCH_GROUP_OFFLOADING"),
    ("diffusers.models._modeling_parallel", "ParallelConfig"),
    ("diffusers.loaders.single_file_utils", "fetch_diffusers_config"),
    ("diffusers.loaders.single_file_utils", "SingleFileComponentError"),
    ("diffusers.loaders.single_file_model", "SINGLE_FILE_LOADABLE_CLASSES"),
    ("diffusers.models.modeling_utils", "LegacyModelMixin"),
    ("diffusers.models.modeling_utils", "ModelMixin._fix_state_dict_keys_on_load"),
    ("diffusers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING"),
    ("diffusers.quantizers.auto", "AUTO_QUANTIZER_MAPPING"),
    ("diffusers.quantizers.auto", "DiffusersAutoQuantizer.from_config"),
)
"""Module and name of everything private that this file uses, and dit/quant/registration.py, which can't import it: it
runs while diffusers is being imported."""


_MISSING = object()


class DiffusersChangedError(ImportError):
    """diffusers moved a private name that we need; the message says which and what to do."""


def _private(module: str, name: str) -> Any:
    """Look up something private of diffusers."""
    try:
        thing = import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError) as error:
        raise DiffusersChangedError(
            f"diffusers {diffusers.__version__} has no {module}.{name} any more (tessera was tested with {TESTED}): "
            f"install 'diffusers~={TESTED}.0', or update dit/runtime/diffusers_compat.py"
        ) from error
    return thing


# Looked up once: the name of the backend is asked for in every attention call, and in compiled code.
_BACKEND_NAMES = _private("diffusers.models.attention_dispatch", "AttentionBackendName")
_ACTIVE_BACKEND = _private("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.get_active_backend")


def active_attention_backend() -> str:
    """Return the backend that diffusers uses where none is named (environment or `attention_backend` context)."""
    return _BACKEND_NAMES(_ACTIVE_BACKEND()[0]).value


def attention_backend_names() -> list[str]:
    """Return the names of diffusers' attention backends, whether they work here or not."""
    listed = _private("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.list_backends")()
    names = [one.value for one in listed if one.value not in _UNLISTED]
    return sorted(names, key=lambda name: (name.startswith("_"), name != "native", name))


def check_attention_backend(name: str) -> None:
    """Check that an attention backend has what it needs.

    Raises:
        ValueError: no such backend.
        RuntimeError: a package is missing or too old.
    """
    _private("diffusers.models.attention_dispatch", "_check_attention_backend_requirements")(_BACKEND_NAMES(name))


_UNLISTED: set[str] = set()
"""Backends that serve one layer each, which nobody chooses by name."""


def register_attention_backend(name: str, function: Callable[..., Tensor], *, is_listed: bool = True) -> Any:
    """Make a function one of diffusers' attention backends, for all networks that attend through its dispatcher.

    Args:
        name: in lower case, as `set_attention_backend` takes it.
        function: gets `query`, `key`, `value`, (B, N, K, E) each, and those of `attn_mask`, `dropout_p`, `is_causal`,
            `scale` and `enable_gqa` that its signature names; returns (B, N, K, E).
        is_listed: `attention_backend_names` names it.

    Returns:
        The member of diffusers' enumeration, as processors keep it.

    Raises:
        ValueError: the name is taken, or not in lower case.
        DiffusersChangedError: diffusers moved its registry.
    """
    if name in _BACKEND_NAMES._value2member_map_ or name != name.lower():
        raise ValueError(f"{name!r} can't be registered: expected a new name in lower case, for example 'my_attention'")
    register = _private("diffusers.models.attention_dispatch", "_AttentionBackendRegistry.register")
    # The names are an enumeration, which has no way to take in another member.
    member = str.__new__(_BACKEND_NAMES, name)
    member._name_, member._value_, member._sort_order_ = name.upper(), name, len(_BACKEND_NAMES)
    _BACKEND_NAMES._member_map_[member._name_] = member
    _BACKEND_NAMES._value2member_map_[name] = member
    _BACKEND_NAMES._member_names_.append(member._name_)
    register(member)(function)
    if not is_listed:
        _UNLISTED.add(name)
    return member


def unregister_attention_backend(name: str) -> None:
    """Take a backend of `register_attention_backend` back; networks that still name it raise.

    Args:
        name: as it was registered.

    Raises:
        ValueError: there is none, or it is the active one.
    """
    registry = [
        _private("diffusers.models.attention_dispatch", f"_AttentionBackendRegistry.{table}")
        for table in ("_backends", "_constraints", "_supported_arg_names")
    ]
    member = _BACKEND_NAMES._value2member_map_.get(name)
    if member is None or active_attention_backend() == name:
        raise ValueError(f"{name!r} can't be taken back: it is {'unknown' if member is None else 'the active backend'}")
    for table in registry:
        table.pop(member)
    _UNLISTED.discard(name)
    del _BACKEND_NAMES._member_map_[member._name_]
    del _BACKEND_NAMES._value2member_map_[name]
    _BACKEND_NAMES._member_names_.remove(member._name_)


@contextmanager
def attention_backend_scope(models: Iterable[nn.Module], backend: str) -> Generator[int]:
    """Set the attention backend of some networks inside the `with` block, and of nothing else in the process.

    `set_attention_backend` of diffusers changes what every other network uses too, and for good.

    Args:
        models: the networks.
        backend: one of `attention_backend_names`.

    Yields:
        How many attention layers follow it.

    Raises:
        ValueError: no such backend.
        RuntimeError: a package is missing or too old.
    """
    check_attention_backend(backend)
    found: list[Any] = [getattr(part, "processor", None) for model in models for part in model.modules()]
    processors = {id(one): one for one in found if hasattr(one, "_attention_backend")}.values()
    with _restore_attributes(processors, ("_attention_backend",)):
        for one in processors:
            one._attention_backend = _BACKEND_NAMES(backend)
        yield len(processors)


def chosen_attention_backends(models: Iterable[nn.Module]) -> set[str]:
    """Return the backends that the attention layers of some networks go through now.

    Args:
        models: the networks.
    """
    processors: list[Any] = [getattr(part, "processor", None) for model in models for part in model.modules()]
    names = [one._attention_backend for one in processors if hasattr(one, "_attention_backend")]
    return {active_attention_backend() if name is None else _BACKEND_NAMES(name).value for name in names}


@contextmanager
def _restore_attributes(things: Iterable[Any], names: Iterable[str]) -> Generator[None]:
    """Restore attributes at the end; those that an instance did not have itself are deleted."""
    kept = [(vars(thing), name) for thing in things for name in names]
    before = [(own, name, own.get(name, _MISSING)) for own, name in kept]
    try:
        yield
    finally:
        for own, name, value in before:
            if value is _MISSING:
                own.pop(name, None)
            else:
                own[name] = value


Block = TypeVar("Block", bound=type[nn.Module])


def registered_block(block: Block, text_index: int | None = None) -> Block:
    """Register a block class with diffusers, so that its FirstBlockCache and MagCache work on networks of such blocks.

    A class decorator. diffusers' own `register` would import all of its transformers first; they are registered at the
    first look-up as always.

    Args:
        block: its forward takes `hidden_states` and returns them: alone, or first in a tuple.
        text_index: where in the tuple the text's stream `encoder_hidden_states` is, for blocks that change it too.

    Returns:
        The class itself.

    Raises:
        DiffusersChangedError: diffusers moved its registry.
    """
    metadata = _private("diffusers.hooks._helpers", "TransformerBlockMetadata")(
        return_hidden_states_index=0, return_encoder_hidden_states_index=text_index
    )
    metadata._cls = block  # as `register` does
    _private("diffusers.hooks._helpers", "TransformerBlockRegistry._registry")[block] = metadata
    return block


def with_halved_input(config: Any, name: str) -> Any:
    """Add an argument to those that FasterCache of diffusers halves with the batch.

    It halves the batch on steps that compute one branch only, and by default knows no arguments but texts.

    Args:
        config: of any cache of diffusers.
        name: of the network's argument.

    Returns:
        The config, or a changed copy if it is one of FasterCache.
    """
    if not isinstance(config, FasterCacheConfig):
        return config
    halved = config._unconditional_conditional_input_kwargs_identifiers
    known = list(dict.fromkeys([*halved, name]))
    return replace(config, _unconditional_conditional_input_kwargs_identifiers=known)


@cache
def block_streams(block: type[nn.Module]) -> tuple[tuple[str, str], tuple[int, int | None]] | None:
    """Return what diffusers knows about the streams of a block class.

    Args:
        block: its class.

    Returns:
        The arguments with the image's and the text's stream, and their indices in the block's result; None for a
        class that is not registered.
    """
    try:
        found = _private("diffusers.hooks._helpers", "TransformerBlockRegistry.get")(block)
    except ValueError:
        return None
    arguments = found.hidden_states_argument_name, found.encoder_hidden_states_argument_name
    return arguments, (found.return_hidden_states_index, found.return_encoder_hidden_states_index)


def enable_ulysses(model: nn.Module, degree: int) -> Callable[[], None]:
    """Set a diffusers network up for Ulysses attention on the present process group, on any device.

    What `enable_parallelism` does, without its check of the number of accelerators, which is 0 on a CPU.

    Args:
        model: the bare network, with `_cp_plan`.
        degree: number of processes.

    Returns:
        A function that undoes it.
    """
    from diffusers import ContextParallelConfig
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    apply = _private("diffusers.hooks.context_parallel", "apply_context_parallel")
    device = next(model.parameters()).device
    config = ContextParallelConfig(ulysses_degree=degree)
    mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = _private("diffusers.models._modeling_parallel", "ParallelConfig")(context_parallel_config=config)
    parallel.setup(distributed.get_rank(), distributed.get_world_size(), device, mesh=mesh)
    found: list[Any] = [model, *(getattr(part, "processor", None) for part in model.modules())]
    holders = [holder for holder in found if hasattr(holder, "_parallel_config")]
    plan: Any = model._cp_plan
    undo = ExitStack()
    undo.enter_context(_restore_attributes(holders, ("_parallel_config",)))
    undo.enter_context(restore_forwards([model]))
    for holder in holders:
        holder._parallel_config = parallel
    apply(model, config, plan)
    undo.callback(_private("diffusers.hooks.context_parallel", "remove_context_parallel"), model, plan)
    return undo.close


@contextmanager
def restore_forwards(models: Iterable[nn.Module]) -> Generator[None]:
    """Remove at the end what hooks of diffusers and accelerate leave on modules when they are removed.

    They leave an instance attribute `forward` that calls what the class says, and an empty list of hooks.

    Args:
        models: the networks; with all submodules.
    """
    parts = list(dict.fromkeys(part for model in models for part in model.modules()))
    with _restore_attributes(parts, ("forward", "_diffusers_hook", "_hf_hook", "_old_forward")):
        yield


def remove_group_offload(model: nn.Module) -> None:
    """Take the hooks of `enable_group_offload` off a network and all its parts.

    Args:
        model: of a pipeline; its weights are wherever the hooks left them.
    """
    names = [
        _private("diffusers.hooks.group_offloading", name)
        for name in ("_GROUP_OFFLOADING", "_LAYER_EXECUTION_TRACKER", "_LAZY_PREFETCH_GROUP_OFFLOADING")
    ]
    for part in model.modules():
        registry = vars(part).get("_diffusers_hook")
        if registry is None:
            continue
        for name in names:
            registry.remove_hook(name, recurse=False)


def is_offloaded(model: nn.Module) -> bool:
    """Return whether hooks of diffusers or accelerate bring a network's weights over when they are needed."""
    name = _private("diffusers.hooks.group_offloading", "_GROUP_OFFLOADING")
    registries = [vars(part).get("_diffusers_hook") for part in model.modules()]
    return any("_hf_hook" in vars(part) for part in model.modules()) or any(
        registry is not None and name in registry.hooks for registry in registries
    )


_STEP_CACHES = ("fbc_", "mag_cache", "sea_cache", "taylorseer", "faster_cache", "pyramid_attention")
"""Prefixes of the hook names of diffusers' caches that skip work across steps."""


def other_caches(target: Any, models: Iterable[nn.Module]) -> list[str]:
    """Name the step caches on a pipeline's networks that are not ours: those of diffusers and of cache-dit.

    Args:
        target: the pipeline, or a network.
        models: its networks, wrapped or not.
    """
    found = set()
    for model in models:
        for part in model.modules():
            hooks = vars(part).get("_diffusers_hook")
            names = () if hooks is None else hooks.hooks
            if any(word in name for name in names for word in _STEP_CACHES):
                found.add("a cache of diffusers")
            if "_is_cached" in vars(part) or type(part).__module__.startswith("cache_dit."):
                found.add("cache-dit")
    if "_is_cached" in vars(type(target)) or "_is_cached" in vars(target):
        found.add("cache-dit")
    return sorted(found)


def context_parallel_group(model: nn.Module) -> Any:
    """Return the process group that shares the tokens of a network, or None.

    Args:
        model: the bare network, after diffusers' `enable_parallelism`.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def published_repository(checkpoint: Mapping[str, Tensor]) -> str | None:
    """Name the Hub repository of the pipeline that a single-file checkpoint belongs to, by the names of its weights.

    Args:
        checkpoint: weights by name; only names and shapes are read, so tensors on "meta" work.

    Returns:
        `user/repository`, or None for a layout that diffusers doesn't know.
    """
    fetch = _private("diffusers.loaders.single_file_utils", "fetch_diffusers_config")
    try:
        found = fetch(checkpoint)["pretrained_model_name_or_path"]
    except (KeyError, UnboundLocalError):  # the names of a published network, but in a size that was never published
        return None
    # The first Stable Diffusion is also what diffusers answers when nothing matched.
    is_guess = found == fetch({})["pretrained_model_name_or_path"]
    if is_guess and not any(name.startswith("model.diffusion_model.input_blocks.") for name in checkpoint):
        return None
    return found


def skip_other_steps(pipe: Any) -> None:
    """Have a running pipeline of diffusers skip its other steps and decode what it holds.

    Its `interrupt` can only be read; the name behind it is the same in all pipelines, and set to False by each call.
    """
    pipe._interrupt = True


def is_missing_component(error: BaseException) -> bool:
    """Return whether loading a single file failed because the file holds no weights for a component."""
    return isinstance(error, _private("diffusers.loaders.single_file_utils", "SingleFileComponentError"))


def is_remapped(network: type) -> bool:
    """Return whether a class of diffusers stands for others, among which its configuration chooses on loading."""
    return issubclass(network, _private("diffusers.models.modeling_utils", "LegacyModelMixin"))


def rename_deprecated(network: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Give weights stored under names of old versions of diffusers the names of today, as its loader does.

    Args:
        network: of diffusers, which says where it has such weights.
        weights: by name; the values don't matter.
    """
    return _private("diffusers.models.modeling_utils", "ModelMixin._fix_state_dict_keys_on_load")(
        network, dict(weights)
    )


def translated_checkpoint(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors of a publisher's single file in the names of a network.

    Args:
        model: the network, of diffusers.
        tensors: by their names in the file.

    Returns:
        The tensors, cut and joined by rows where the file holds them otherwise; None for networks without such files.
    """
    classes = _private("diffusers.loaders.single_file_model", "SINGLE_FILE_LOADABLE_CLASSES")
    function = classes.get(type(model).__name__, {}).get("checkpoint_mapping_fn")
    return None if function is None else function(config=dict(model.config), checkpoint=dict(tensors))


def forget_config(model: Any, name: str) -> None:
    """Take an entry out of a network's configuration, which diffusers only lets grow.

    Args:
        model: of diffusers.
        name: of the entry; it may be missing.
    """
    config = model._internal_dict
    if name in config:
        model._internal_dict = type(config)({key: value for key, value in config.items() if key != name})


def missing() -> list[str]:
    """Return what diffusers no longer has of `PRIVATE_NAMES`, one message each; empty if all is well."""
    found = []
    for module, name in PRIVATE_NAMES:
        try:
            _private(module, name)
        except DiffusersChangedError as error:
            found.append(str(error))
    return found
