"""`tgate-compile web`: a page that runs a model in the browser, for any static server."""

from __future__ import annotations

import tempfile
import webbrowser
from dataclasses import fields
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import typer

from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, print_json, print_note
from tgate_compile._cli.settings import ScheduleOptions
from tgate_compile._errors import ConfigurationError, check_installed

MSG_BUNDLE_ALONE = "--bundle contains a model with all settings. Leave out {given}, or leave out --bundle."
MSG_AS_IT_IS = "{folder} already contains a site, which is served unchanged. Use --force to write it again."


def web(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A new folder for the site.", rich_help_panel=options.OUTPUT)
    ] = Path("tgate-web"),
    model: options.Model = None,
    *,
    loading: options.LoadingOnCpu,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="A bundle written by `export --components all`, instead of --model.", rich_help_panel=options.MODEL
        ),
    ] = None,
    image: options.Image,
    schedule: ScheduleOptions,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="A prompt that the page suggests; repeatable.",
            rich_help_panel=options.IMAGE,
        ),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The dist folder of the npm package onnxruntime-web.",
            show_default="downloaded with npm once",
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the site on this machine until Ctrl-C.")] = False,
    open: Annotated[bool, typer.Option("--open", help="Serve the site and open it in a browser.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 0,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write a page that runs a model in the browser, with and without T-GATE, for any static server."""
    check_installed("pydantic", extra="onnx", what="web")
    from tgate_compile._web.site import check_bundle, check_site_target, is_site, runtime_files, server_for, write_site
    from tgate_compile.bundle.formats import check_can_write

    schedule.check_known_in_advance()
    of_model = {"model": model, **_changed(loading), **_changed(image), **schedule.given, "schedule": schedule.file}
    given = [f"--{name.replace('_', '-')}" for name, value in of_model.items() if value is not None]
    if bundle is not None and given:
        raise ConfigurationError(MSG_BUNDLE_ALONE.format(given=" and ".join(given)))
    server = server_for(out, port) if serve or open else None  # before anything is written, in case the port is taken
    asked = bool(given or bundle or prompt or runtime or force)
    if server is not None and is_site(out) and not asked:
        print_note(MSG_AS_IT_IS.format(folder=out))
    else:
        check_site_target(out, overwrite=force)
        if bundle is not None:
            check_bundle(bundle)
        else:
            check_installed("torch", "diffusers", "transformers", extra="cli", what="web without --bundle")
            check_can_write("onnx")
            check_installed("tokenizers", what="web without --bundle")
        with ERR.status("Fetching ONNX Runtime"):
            files = runtime_files(runtime)
        if bundle is not None:
            write_site(out, bundle, files, prompts=prompt or (), overwrite=force)
        else:
            with tempfile.TemporaryDirectory() as name:
                made = Path(name, "bundle")
                suggestions = _export(made, model, loading, image, schedule, shown=not json)
                write_site(out, made, files, prompts=prompt or suggestions, overwrite=force)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if json:
        print_json({"folder": str(out), "bytes": size})
    else:
        OUT.print(f"written   {out}, {size / 1e6:.1f} MB, for any static server", soft_wrap=True)
    if server is not None:
        _serve(server, open_browser=open)


def _export(
    folder: Path,
    model: str | None,
    loading: options.Loading,
    image: options.Image,
    schedule: ScheduleOptions,
    *,
    shown: bool,
) -> list[str]:
    """Write a bundle of `model` with fixed sizes, which run fastest, and return prompts to suggest."""
    import tgate_compile
    from tgate_compile._cli.loading import demo_prompts
    from tgate_compile._cli.settings import chosen_for

    def show(stage: str) -> None:
        if shown:
            ERR.print(f"[dim]{stage}[/]", soft_wrap=True)

    show("Loading the model")
    loaded = loading.load(model)
    settings, chosen = chosen_for(loaded, loading, image, schedule, shown=shown)
    tgate_compile.optimize(loaded.pipe, schedule=chosen, backend="eager")
    call = {"prompt": "", **loaded.call, **image.size}
    call |= {"num_inference_steps": settings.steps, **loaded.guided(settings.guidance)}
    tgate_compile.export(loaded.pipe, folder, call=call, dynamic=False, components="all", progress=show)
    return demo_prompts(6) if loaded.is_embedded else []


def _changed(given: options.Loading | options.Image) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    values = ((field, getattr(given, field.name)) for field in fields(given))
    return {field.name: value for field, value in values if value != field.default}


def _serve(server: ThreadingHTTPServer, *, open_browser: bool) -> None:
    from tgate_compile._web.site import address_of

    address = address_of(server)
    ERR.print(f"Serving at {address}, for this machine only. Press Ctrl-C to stop.", soft_wrap=True)
    if open_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
