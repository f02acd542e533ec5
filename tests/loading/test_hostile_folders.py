"""Damaged model folders: each loads and gives finite images, or is refused with one clear error."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from apps import cli
from pipelines import TextToImagePipeline, load_pipeline
from pipelines.loading.settings import check_settings, declared
from pipelines.loading.sources import check_folder, read_index
from pipelines.loading.structure import check_network
from pipelines.loading.weight_files import read_header, stored_tensors
from tests.families.tiny import TINY_NAMES, VARIANTS
from tests.loading.hostile import FOLDERS, OURS, loading, outcome
from tests.loading.mutations import Mutation, mutation, mutations

FEW = 28
"""Kinds of damage to each pipeline in the quick test; the slow one does all."""

PARTS = 12
SECONDS = 20.0
"""Of this process, in which no damage may keep the loader busy."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a pipeline by name, written once."""
    root = tmp_path_factory.mktemp("hostile")

    def saved(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            FOLDERS[name].build().save_pretrained(folder)
        return folder

    return saved


def spoilt(folder: Path, damage: Mutation, place: Path) -> Path:
    """A damaged copy of a folder."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    damage.apply(place)
    return place


def failures(name: str, folder: Path, chosen: list[Mutation], place: Path) -> list[str]:
    """What is neither a finite image nor a clear error, or takes very long."""
    found = []
    for damage in chosen:
        start = time.process_time()
        result = outcome(spoilt(folder, damage, place), FOLDERS[name])
        seconds = time.process_time() - start
        if result.startswith("bad") or seconds > SECONDS:
            found.append(f"{damage.name}: {result} ({seconds:.0f} s)")
    return found


@pytest.mark.parametrize("name", OURS)
def test_some_damage_of_every_kind(name, saved, tmp_path):
    every = mutations(saved(name))
    assert len(every) > 500
    stride = max(len(every) // FEW, 1)
    assert failures(name, saved(name), every[::stride], tmp_path / "copy") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", OURS)
def test_all_damage(name, part, saved, tmp_path):
    assert failures(name, saved(name), mutations(saved(name))[part::PARTS], tmp_path / "copy") == []


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
NAMED = {
    f"{CONFIG}: nested deeply": ("config.json", "nested too deeply"),
    f"{CONFIG}: a list": ("config.json", "holds a list"),
    f"{CONFIG}: missing": ("no config.json",),
    f"{CONFIG}: num_layers=0": ("num_layers is 0", "1 to 1000"),
    f"{CONFIG}: num_layers=1000000": ("num_layers is 1000000", "tensors", "at most"),
    f"{CONFIG}: num_layers=7": ("don't fit the TextDiT", "missing", "transformer_blocks.2"),
    f'{CONFIG}: num_layers="many"': ("num_layers is 'many'", "expected int"),
    f"{CONFIG}: patch_size=[[4]]": ("patch_size is [[4]]", "expected int"),
    f"{CONFIG}: rope_theta=NaN": ("rope_theta is nan", "finite"),
    f"{CONFIG}: text_dim=1000000000000": ("text_dim is 1000000000000", "65536"),
    f"{WEIGHTS}: zero bytes": ("no safetensors file",),
    f"{WEIGHTS}: a header nested deeply": ("no safetensors file", "nested too deeply"),
    f"{WEIGHTS}: header dtype unknown": ("dtype of", "'F31'", "BF16"),
    f"{WEIGHTS}: header shape of strings": ("shape of", "whole numbers"),
    f"{WEIGHTS}: header shape too large": ("bytes", "belong to F32"),
    f"{WEIGHTS}: header offsets shared": ("damaged", "begins at byte"),
    f"{WEIGHTS}: no tensors": ("missing",),
    f"{WEIGHTS}: names of another model": ("missing", "no place"),
    "transformer: shards of numbers": ("weight_map names 5", ".safetensors files"),
    "transformer: shards null": ("weight_map is None", "expected an object"),
    "transformer: shards outside": ("weight_map names '../../secret.safetensors'",),
    "model_index.json: _class_name=5": ("brings its own pipeline code (5)",),
    "model_index.json: transformer is numbers": ("transformer is [1, 2]", "[library, class]"),
    "model_index.json: transformer is a function": ("is a logging",),
    "model_index.json: transformer is nothings": ("has no transformer",),
    "model_index.json: vae is an unknown library": ("names the module 'os'",),
    "scheduler/scheduler_config.json: num_train_timesteps=0": ("num_train_timesteps is 0",),
    'scheduler/scheduler_config.json: shift="many"': ("shift is 'many'",),
    "tokenizer/tokenizer.json: empty": ("copy/tokenizer can't be used",),
    "tokenizer/tokenizer_config.json: model_max_length=-1": ("model_max_length is -1", "from 1 to"),
    "tokenizer/tokenizer_config.json: without pad_token": ("pad_token is not set",),
    "text_encoder/config.json: vocab_size=7": ("don't fit the T5EncoderModel", "other shapes"),
    "text_encoder/config.json: d_model=[4]": ("no T5EncoderModel can be built",),
}


@pytest.mark.parametrize("name", NAMED)
def test_errors_name_what_is_wrong(name, saved, tmp_path):
    """Both ways in say the same; nothing was read yet where the header or a configuration tells it."""
    damaged = spoilt(saved("text_dit"), mutation(saved("text_dit"), name), tmp_path / "copy")
    for load in (load_pipeline, TextToImagePipeline.from_pretrained):
        with pytest.raises((ValueError, OSError)) as refused:
            load(damaged)
        told = str(refused.value)
        assert "\n" not in told
        assert all(word in told for word in NAMED[name]), told


@pytest.mark.parametrize("value", ["NaN", "infinity"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_values_that_are_not_finite(part, value, saved, tmp_path):
    folder = saved("text_dit")
    damage = next(one for one in mutations(folder) if one.name.startswith(f"{part}/") and f": {value} in" in one.name)
    spoilt(folder, damage, tmp_path / "copy")
    for load in (load_pipeline, TextToImagePipeline.from_pretrained):
        with pytest.raises(ValueError, match=f"{part} has values in .* that are NaN or infinite"):
            load(tmp_path / "copy")


def test_a_running_variance_is_a_weight_too(saved, tmp_path):
    copy = Path(shutil.copytree(saved("text_dit"), tmp_path / "copy"))
    pipe = load_pipeline(copy, device="cpu")
    pipe.vae.latent_norm.running_var[0] = torch.inf
    pipe.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"latent_norm\.running_var"):
        load_pipeline(copy, device="cpu")


DAMAGED = (f"{CONFIG}: num_layers=1000000", f"{CONFIG}: nested deeply", f"{WEIGHTS}: zero bytes",
           "tokenizer/tokenizer.json: cut short", "model_index.json: a list")  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_the_command_line_says_it_in_one_line(name, saved, tmp_path, capsys):
    damaged = spoilt(saved("text_dit"), mutation(saved("text_dit"), name), tmp_path / "copy")
    capsys.readouterr()  # what was told while the folder was made
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", "x", "--model", str(damaged), "--device", "cpu", "-o", str(tmp_path / "a.png")])
    told = capsys.readouterr().err
    # A folder that is no usable model is wrong usage; a file that can't be read is work that failed.
    assert left.value.code == (1 if "zero bytes" in name else 2)
    assert "Traceback" not in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


# ------------------------------------------------------------------ foreign pipelines


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_foreign_folders_go_through_the_same_checks(name, saved, tmp_path):
    """What happens when they run is diffusers' business; loading one is clear."""
    parts = ("transformer", "vae", "scheduler", "model_index")
    every = [one for one in mutations(saved(name)) if one.name.startswith(parts)]
    results = {
        damage.name: loading(spoilt(saved(name), damage, tmp_path / "copy")) for damage in every[:: len(every) // FEW]
    }
    assert {damage: result for damage, result in results.items() if result.startswith("bad")} == {}
    assert sum(result.startswith("refused") for result in results.values()) > FEW / 2


# ---------------------------------------------------------------------- single checks


def test_a_configuration_with_huge_tables_is_refused(saved):
    """Positions that are computed take no room in the file."""
    folder = saved("class_dit") / "transformer"
    config = {**json.loads((folder / "config.json").read_text()), "sample_size": 8192, "patch_size": 1}
    from dit.models.dit import DiT

    stored = stored_tensors(folder)
    with pytest.raises(ValueError, match=r"tables of [\d.]+ GiB|don't fit"):
        check_network(folder, DiT, config, stored, exact=True)


def test_a_configuration_that_keeps_making_tensors_is_stopped(saved):
    """Whatever the setting is called: building ends when it has made far more than the file holds."""
    from diffusers import AutoencoderKL

    folder, many = saved("sd3") / "vae", 30_000
    config = json.loads((folder / "config.json").read_text())
    config |= {"block_out_channels": [4] * many, "down_block_types": ["DownEncoderBlock2D"] * many}
    config |= {"up_block_types": ["UpDecoderBlock2D"] * many}
    with pytest.raises(ValueError, match=r"config\.json: no AutoencoderKL can be built.*far more tensors"):
        check_network(folder, AutoencoderKL, config, stored_tensors(folder), exact=False)


@pytest.mark.parametrize("name", [*TINY_NAMES, *VARIANTS])
def test_good_folders_of_every_family_pass(name, folder_of):
    folder = folder_of(name)
    sizes = check_folder(folder, read_index(folder))
    assert sizes["transformer"] > 0


def test_settings_of_every_class_of_ours_are_declared(saved):
    """A setting without a declared type would not be checked."""
    for name in OURS:
        pipe = FOLDERS[name].build()
        for part in (pipe.transformer, pipe.vae):
            hints = declared(type(part))
            assert None not in hints.values()
            config = json.loads(json.dumps({key: value for key, value in part.config.items() if key[0] != "_"}))
            assert set(config) <= set(hints)
            check_settings(type(part), config, "here", exact=True)


def test_headers_of_good_files_are_read_as_they_are(saved):
    from safetensors.torch import load_file

    for file in saved("text_dit").rglob("*.safetensors"):
        loaded, header = load_file(file), read_header(file)
        assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
            name: tensor.shape for name, tensor in header.items()
        }
        assert all(header[name].nbytes == tensor.nbytes for name, tensor in loaded.items())


def test_checking_draws_no_random_numbers(saved):
    """What a seed gives must not depend on how often a folder was checked."""
    for name in ("text_dit", "class_dit", "next_scale_text"):
        folder = saved(name)
        before = torch.get_rng_state()
        check_folder(folder, read_index(folder))
        assert torch.equal(torch.get_rng_state(), before)
