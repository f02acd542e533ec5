"""Training tasks take their data as an object; only what is about scenes knows the sticker world."""

import ast

from tests.architecture.sources import ROOT, parse, python_files

TRAINING = ROOT / "apps" / "training"
# The data itself; labels of scenes, which probes predict; captions that are nearly right; what a generated image should
# have been.
STICKER_WORLD = {"data/stickers.py", "scene_labels.py", "hard_negatives.py", "generated_pairs.py"}
STICKER_WORLD |= {"data/moving_stickers.py", "clip_labels.py"}
# These two predict what a scene holds or tell nearly right captions apart, which needs scenes whose truth is known;
# the value model also reports how well it still tells them apart, if its captions are those of stickers.
ABOUT_SCENES = {"tasks/contrastive.py", "tasks/text_encoder_pretraining.py", "tasks/value_model.py"}
ABOUT_SCENES |= {"tasks/clip_text_pretraining.py"}


def imports(path) -> set[str]:
    """Return the modules that a file names in its imports, anywhere."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(prefixes: tuple[str, ...], folder: str = "") -> set[str]:
    """Return the files of the training that import a module with one of these names."""
    files = [path for path in python_files(tests=False) if path.is_relative_to(TRAINING / folder)]
    assert files
    return {
        path.relative_to(TRAINING).as_posix()
        for path in files
        if any(name == prefix or name.startswith(prefix + ".") for name in imports(path) for prefix in prefixes)
    }


def test_only_the_data_and_what_is_about_scenes_import_the_sticker_world() -> None:
    assert importers(("apps.stickers",)) == STICKER_WORLD
    assert importers(("apps.stickers",), "tasks") == set()


def test_only_tasks_about_scenes_import_what_knows_scenes() -> None:
    names = ("apps.training.data.stickers", "apps.training.scene_labels", "apps.training.hard_negatives")
    names += ("apps.training.data.moving_stickers", "apps.training.clip_labels")
    assert importers(names, "tasks") == ABOUT_SCENES
