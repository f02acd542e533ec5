"""The studio: a page in the browser that paints what is typed into it. Loopback only."""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
}
"""Set before Gradio and diffusers are imported: no call home, no code from checkpoints."""


def run(
    models: list[str],
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    dtype: str = "auto",
    open_browser: bool = True,
    output_dir: Path = Path("outputs"),
    offload: str = "none",
    base: str | None = None,
) -> None:
    """Serve the studio until Ctrl-C.

    Args:
        models: offered besides the built-in models, the first one is preset: names, folders or hub ids.
        host: a loopback address.
        port: to listen on; 0 takes any free one.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        open_browser: open the page.
        output_dir: folder that receives the pictures; visitors of the page can read all of it.
        offload: `none`, `model`, `group`, `sequential`; see `pipelines.load_pipeline`.
        base: for models that are single files with a transformer only: folder or hub id of their pipeline.

    Raises:
        ValueError: the host is no loopback address, or there is no model.
        OSError: the port is taken.
        ImportError: the extra `studio` is not installed.
    """
    check_host(host)
    if find_spec("gradio") is None:
        raise ImportError("The studio needs Gradio: pip install 'tessera[studio]', or `make studio` in the project.")
    port = check_port(host, port)
    os.environ.update(QUIET)
    private = tempfile.mkdtemp(prefix="tessera-studio-")  # only its owner can read it
    os.environ["GRADIO_TEMP_DIR"] = private
    console = Console()
    logging.basicConfig(level=logging.WARNING, handlers=[RichHandler(console=Console(stderr=True), show_path=False)])
    try:
        with console.status("Starting the studio"):
            # Here, because they read the environment at import.
            from apps.studio.app import build_engine, launch

            engine = build_engine(models, output_dir, device, dtype, offload, base)
            page = launch(engine, host, port, open_browser)
        console.print(f"[bold]tessera studio[/bold]  [link]http://{host}:{port}[/link]")
        console.print(f"[dim]pictures go to {output_dir}, Ctrl-C ends[/dim]", highlight=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's Ctrl-C: tidy up as well
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def check_host(host: str) -> None:
    """Refuse every address that other machines can reach: the studio asks nobody for a password.

    Raises:
        ValueError: not a loopback address.
    """
    try:
        is_loopback = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError(
            f"Host {host!r} can be reached by other machines, and the studio has no passwords yet; use 127.0.0.1. "
            "From elsewhere, tunnel: ssh -L 7860:127.0.0.1:7860 THIS-MACHINE"
        )


def check_port(host: str, port: int) -> int:
    """Return a port that is free now; 0 asks the system for one.

    Raises:
        OSError: it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in its closing pause is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"Port {port} can't be had ({error.strerror}); choose another --port, or 0 for any."
            ) from error
        return probe.getsockname()[1]
