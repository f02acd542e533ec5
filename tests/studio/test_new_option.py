"""A new option is one field, one argument of a pipeline and one label a language; everything else follows.

The test adds an option to a copy of `apps` and asks each place where a user would look for it.
"""

from __future__ import annotations

import json
import os
import shutil

from tests.fresh import run_python

FIELD = """
    sharpness: Annotated[
        float | None,
        Field(ge=0, le=2),
        Option(
            help="Sharpness of the edges.",
            panel=SAMPLING,
            argument="sharpness",
            control=Control(kind="slider", place="advanced", start=0.5, step=0.1),
        ),
    ] = None
"""
LABELS = {"en": "Sharpness", "zh": "\u9510\u5ea6"}

CHECK = '''
import json, pathlib, sys
from PIL import Image
from apps.api.app import create_app
from apps.cli import main
from apps.commands.batch import read_lines
from apps.commands.given_options import make_options
from apps.commands.options import complete, asked
from apps.service.engine import Engine
from apps.service.events import Done
from apps.service.events import Picture
from apps.service.grid import Axis, plan, read_axis
from apps.service.metadata import read_picture, request_from_settings
from apps.service.prompt_file import PromptLine, request_fields
from apps.service.requests import TextToImageRequest
from apps.studio.app import build_page
from apps.studio.forms import form_to_request, settings_to_form
from apps.studio.sessions import Sessions
from apps.studio.strings import Strings
from tests.studio.fakes import FakePipeline
from tests.studio.test_page import PAGE

class Sharp(FakePipeline):
    def __call__(self, prompt, sharpness=0.3, **others):
        self.seen = sharpness
        return super().__call__(prompt, **others)

import inspect
own = inspect.signature(FakePipeline.__call__).parameters
extra = inspect.Parameter("sharpness", inspect.Parameter.KEYWORD_ONLY, default=0.3)
Sharp.__call__.__signature__ = inspect.Signature([*own.values(), extra])

folder = pathlib.Path(sys.argv[1])
pipe = Sharp()
engine = Engine({"fake": str(folder)}, folder, device="cpu", load=lambda source: pipe)
found = {}

# the pipeline's argument, and the record in the file
def generate(request):
    return next(event for event in engine.generate(request) if isinstance(event, Picture))
picture = generate(TextToImageRequest(prompt="a fox", steps=2, height=64, width=64, sharpness=1.5))
found["argument"] = pipe.seen
settings = read_picture(picture.path)
found["recorded"] = settings.sharpness
generate(request_from_settings(settings))
found["repeated"] = pipe.seen
default = generate(TextToImageRequest(prompt="a fox", steps=2, height=64, width=64))
found["default"] = default.metadata.sharpness

# the command line, a file of prompts, the HTTP schema
found["asked"] = asked(make_options(prompt="x", sharpness=0.7))["sharpness"]
(folder / "batch.jsonl").write_text(json.dumps({"prompt": "x", "sharpness": 0.9}))
found["batch"] = [line.options.value("sharpness") for line in read_lines(folder / "batch.jsonl", make_options())]
found["prompt file"] = request_fields(PromptLine(1, {"prompt": "x", "sharpness": 1.1}))["sharpness"]
def described(part):
    """Find what the documentation of the server says of the option."""
    if isinstance(part, dict) and "sharpness" in part.get("properties", {}):
        return part["properties"]["sharpness"]
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return next(filter(None, map(described, parts)), None)
schema = described(create_app(engine).openapi())
found["schema"] = [schema["anyOf"][0]["maximum"], schema["description"]]

# the page: control, request, settings put back, label in each language
for language in ("en", "zh"):
    page = build_page(engine, Strings(language), Sessions(None))
    control = next(one for one in page.blocks.values() if getattr(one, "elem_id", None) == "sharpness")
    found[language] = [control.label, control.minimum, control.maximum]
values = {**PAGE, "sharpness": 0.4}
found["page"] = form_to_request(values, ("text_to_image",)).sharpness
found["shown"] = settings_to_form(settings)["sharpness"]

# a grid
cells = plan(TextToImageRequest(prompt="a fox", seed=1), [read_axis("sharpness", "0.1, 0.2"), Axis(), Axis()])
found["grid"] = [cell.request.sharpness for cell in cells]
engine.close()
print("FOUND " + json.dumps(found))
try:
    main(["generate", "--help"])
except SystemExit:
    sys.stdout.flush()
'''


def test_a_field_an_argument_and_a_label_make_an_option(tmp_path, root):
    apps = tmp_path / "apps"
    shutil.copytree(root / "apps", apps, ignore=shutil.ignore_patterns("__pycache__"))
    options = apps / "service" / "options.py"
    text = options.read_text(encoding="utf-8")
    heading = '    """What tasks with denoising steps have."""\n'
    assert text.count(heading) == 1
    options.write_text(text.replace(heading, heading + FIELD), encoding="utf-8")
    for language, label in LABELS.items():
        strings = apps / "studio" / "strings" / f"{language}.json"
        strings.write_text(json.dumps({**json.loads(strings.read_text("utf-8")), "sharpness": label}), "utf-8")
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "COLUMNS": "200"}
    _, out, _ = run_python("-c", CHECK, tmp_path / "out", env=environment, cwd=tmp_path, path=[tmp_path])
    line = next(line for line in out.splitlines() if line.startswith("FOUND "))
    assert json.loads(line.removeprefix("FOUND ")) == {
        "argument": 1.5,
        "recorded": 1.5,
        "repeated": 1.5,
        "default": 0.3,
        "asked": 0.7,
        "batch": [0.9],
        "prompt file": 1.1,
        "schema": [2, "Sharpness of the edges."],
        "en": ["Sharpness", 0, 2],
        "zh": ["\u9510\u5ea6", 0, 2],
        "page": 0.4,
        "shown": 1.5,
        "grid": [0.1, 0.2],
    }
    assert "--sharpness" in out
    assert "Sharpness of the edges. (0 to 2)" in out
