"""A server whose model takes its time without taking the machine's; `python -m tests.studio.slow_server FOLDER`."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from apps.api.app import create_app
from apps.commands.serve import _start, check_port
from apps.service.engine import Engine
from apps.studio.app import mount
from tests.studio.fakes import FakePipeline

STEP_SECONDS = 0.1


def main(folder: Path) -> None:
    """Serve the page until SIGINT, with a log like that of `tessera studio`."""
    (folder / "out").mkdir(exist_ok=True)
    (folder / "vocabulary.txt").write_text("fox\npizza\nghost\nice cream\n")
    engine = Engine({"fake": str(folder)}, folder / "out", device="cpu", load=lambda source: FakePipeline(STEP_SECONDS))
    app = create_app(engine, api=False)
    mount(app, engine)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    sys.stdout.write(f"http://127.0.0.1:{port}\n")
    sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.should_exit = True
        engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
