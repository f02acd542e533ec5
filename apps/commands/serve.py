"""`tessera studio` and `tessera serve`: one process with the web page, and for `serve` the HTTP API beside it."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
import time
import webbrowser
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from apps.service.content_credentials import check_signing
from apps.service.limits import fine_tuning_limits
from apps.service.temporary import private_folder

QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
}
"""Set before Gradio and diffusers are imported: no call home, no code from checkpoints.

The environment is the only switch that these libraries have for it, and the process is the command's own.
"""
PATIENCE = 2
"""Seconds that open connections get when the server ends."""


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
    *,
    api: bool = False,
    page: bool = True,
    auth_file: Path | None = None,
    lora: Path | None = None,
    wildcards: Path | None = None,
    own_models: Path | None = None,
    upscalers: list[str] | None = None,
    fine_tuning: tuple[float, float, float, float] | None = None,
    mcp: bool = False,
) -> None:
    """Serve until Ctrl-C; what is unfinished then goes on at the next start.

    Args:
        models: offered besides the built-in models, the first one is preset: names, folders or hub ids.
        host: a loopback address; any other one needs `auth_file`.
        port: to listen on; 0 takes any free one.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; several with commas between them.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        open_browser: open the page.
        output_dir: folder that receives the images; visitors of the page can read all of it.
        offload: `none`, `model`, `group`, `sequential`; see `pipelines.load_pipeline`.
        base: for models that are single files with a transformer only: folder or hub id of their pipeline.
        api: serve the HTTP API under `/v1`.
        page: serve the web page.
        auth_file: users and their tokens; None lets everybody in who can reach the address.
        lora: folder of LoRA files to offer.
        wildcards: folder of lists that prompts may name; None for `wildcards` in the output folder.
        own_models: folder of models; None for `models` beside the output folder.
        upscalers: offered besides the built-in ones: folders or hub ids.
        fine_tuning: see `apps.service.limits.fine_tuning_limits`; None for the defaults.
        mcp: serve the tools of the Model Context Protocol at `/mcp`; with `auth_file` each request there needs a token.

    Raises:
        ValueError: other machines could reach it without a token, there is no model, the output folder is in use, or
            a signature that is configured can't be made.
        OSError: the port is taken.
        ImportError: the extra `studio` is not installed, or `mcp`, or `c2pa` where signing is configured.
    """
    check_host(host, auth_file)
    check_signing()
    _check_packages(mcp)
    port = check_port(host, port)
    os.environ.update(QUIET)
    folders = ExitStack()
    private = folders.enter_context(private_folder())
    os.environ["GRADIO_TEMP_DIR"] = str(private)
    console = Console()
    engine = server = runs = app = None
    try:
        with console.status("Starting"):
            # Here, because they read the environment at import.
            from apps.api.app import create_app
            from apps.api.tokens import TokenTable
            from apps.service.logs import hide_prompts, set_up
            from apps.service.own_models import OwnModels, models_folder
            from apps.studio.app import FORMS, UPLOADS, build_engine, mount
            from apps.studio.pwa import PUBLIC

            set_up()
            tokens = None if auth_file is None else TokenTable(auth_file)
            folder = models_folder(output_dir) if own_models is None else own_models
            engine = build_engine(models, output_dir, device, dtype, offload, base, lora, upscalers, wildcards, folder)
            engine.model().add_done_callback(lambda _: hide_prompts())  # the libraries are imported then
            app = create_app(
                engine,
                tokens,
                _names(host),
                api,
                uploads=UPLOADS,
                forms=FORMS,
                public=PUBLIC if page else (),
                scratch=private,
            )
            app.state.own_models = own = OwnModels(engine, folder)
            if mcp:
                _add_mcp(app, engine, tokens)
            if page:
                runs = mount(app, engine, tokens, fine_tuning_limits(*fine_tuning) if fine_tuning else None, own)
            server = _start(app, host, port)
        address = _address(host, port)
        more = ("  API under /v1" if page and api else "") + ("  MCP at /mcp" if mcp else "")
        console.print(f"[bold]tessera {'studio' if page else 'API'}[/bold]  [link]{address}[/link]{more}")
        console.print(f"[dim]images go to {output_dir}, Ctrl-C ends[/dim]", highlight=False)
        if open_browser and page:
            webbrowser.open(address)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's Ctrl-C: tidy up as well
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("[dim]ending; what is unfinished goes on at the next start[/dim]")
    finally:
        if server is not None:
            server.should_exit = True
        state = getattr(app, "state", None)
        for one in (runs, getattr(state, "tunings", None), getattr(state, "own_models", None), engine):
            if one is not None:
                one.close()
        _wait_until_ended(server)
        folders.close()


def _check_packages(mcp: bool) -> None:
    """Refuse to start without an optional package that is needed.

    Raises:
        ImportError: it names the extra.
    """
    if find_spec("gradio") is None:
        raise ImportError("The studio needs Gradio: pip install 'tessera[studio]', or `make studio` in the project.")
    if mcp and find_spec("mcp") is None:
        raise ImportError("--mcp needs the package mcp: pip install 'tessera[mcp]'")


def _add_mcp(app: Any, engine: Any, tokens: Any) -> None:
    from apps.mcp.server import add_mcp

    add_mcp(app, engine, has_users=tokens is not None)


def _address(host: str, port: int) -> str:
    """Return the address that a browser on this machine opens."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _start(app: Any, host: str, port: int) -> Any:
    """Serve in the background; returns when the port answers.

    Raises:
        OSError: it never does.
    """
    import uvicorn

    from apps.api.connections import LimitedProtocol
    from apps.api.ending import EndingApp, EndingServer

    app = EndingApp(app)
    config = uvicorn.Config(
        app,
        host,
        port,
        http=LimitedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=PATIENCE,
        server_header=False,
        h11_max_incomplete_event_size=32 * 1024,
        proxy_headers=False,  # nobody should say by a header who they are
    )
    server = EndingServer(config, app)
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise OSError(f"The server could not listen on {host}:{port}; the log says why.")
        time.sleep(0.02)
    return server


def _wait_until_ended(server: Any) -> None:
    """Wait until the server has let its connections go, a little longer than it lets them live."""
    deadline = time.monotonic() + 2 * PATIENCE
    while server is not None and any(thread.name == "server" for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


def check_host(host: str, auth_file: Path | None = None) -> None:
    """Refuse addresses that other machines can reach, unless everybody there needs a token.

    Raises:
        ValueError: not a loopback address, and no file of users.
    """
    if not is_loopback(host) and auth_file is None:
        raise ValueError(
            f"Host {host!r} can be reached by other machines, and nobody would be asked for a token. Use 127.0.0.1, or "
            "make users (tessera token NAME --auth-file users.json) and add --auth-file users.json. From elsewhere a "
            "tunnel is safest, because the server speaks plain HTTP: ssh -L 7860:127.0.0.1:7860 THIS-MACHINE"
        )


def _names(host: str) -> tuple[str, ...]:
    """Names under which the server may be called; with a token asked of everybody, any name is safe."""
    return (host, "localhost", "127.0.0.1", "[::1]") if is_loopback(host) else ("*",)


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
