"""`tgate-compile web`: a page that runs a model in the browser, for any static server."""

from __future__ import annotations

import tempfile
import webbrowser
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import typer

from tgate_compile._cli import options
from tgate_compile._cli.console import ERR, OUT, print_json, print_note
from tgate_compile._errors import ConfigurationError, check_installed

MSG_BUNDLE_ALONE = "--bundle is a model with all its settings. Leave out {given}, or leave out --bundle."
MSG_AS_IT_IS = "{folder} has a site already, which is served as it is. --force writes it anew."


def web(
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the site.")] = Path("tgate-web"),
    model: options.Model = None,
    model_config: options.ModelConfig = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="A bundle of `export --components all` in the place of --model.", show_default="none"),
    ] = None,
    gate_step: options.GateStep = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A suggestion on the page; several times.")
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(help="The folder dist of the npm package onnxruntime-web.", show_default="fetched by npm, once"),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the site on this machine until Ctrl-C.")] = False,
    open: Annotated[bool, typer.Option("--open", help="The same, and open it in a browser.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="To serve at; 0 takes any that is free.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the site that is there.")] = False,
    json: options.Json = False,
) -> None:
    """Write a page that runs a model in the browser, with T-GATE and without, for any static server."""
    check_installed("pydantic", extra="onnx", what="web")
    from tgate_compile._web.onnxruntime_web import runtime_files
    from tgate_compile._web.site import check_bundle, check_site_target, is_site, server_for, write_site

    of_model = {
        "--model": model,
        "--model-config": model_config,
        "--gate-step": gate_step,
        "--steps": steps,
        "--guidance": guidance,
    }
    given = [name for name, value in of_model.items() if value is not None]
    if bundle is not None and given:
        raise ConfigurationError(MSG_BUNDLE_ALONE.format(given=" and ".join(given)))
    server = server_for(out, port) if serve or open else None  # the port is there, or nothing is written
    asked = bool(given or bundle or prompt or runtime or force)
    if server is not None and is_site(out) and not asked:
        print_note(MSG_AS_IT_IS.format(folder=out))
    else:
        check_site_target(out, overwrite=force)
        if bundle is not None:
            check_bundle(bundle)
        with ERR.status("Fetching ONNX Runtime"):
            files = runtime_files(runtime)
        if bundle is not None:
            write_site(out, bundle, files, prompts=prompt or (), overwrite=force)
        else:
            with tempfile.TemporaryDirectory() as name:
                made = Path(name, "bundle")
                suggestions = _export(made, model, model_config, gate_step, steps, guidance, shown=not json)
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
    model_config: str | None,
    gate_step: float | None,
    steps: int | None,
    guidance: float | None,
    *,
    shown: bool,
) -> list[str]:
    """Write a bundle of `model` with fixed sizes, which run fastest; prompts to suggest for it."""
    check_installed("torch", "diffusers", "transformers", extra="cli", what="web without --bundle")
    from tgate_compile.bundle.formats import check_can_write

    check_can_write("onnx")
    import tgate_compile
    from tgate_compile._cli.loading import load, settings_for
    from tgate_compile._cli.options import demo_prompts

    def say(stage: str) -> None:
        if shown:
            ERR.print(f"[dim]{stage}[/]", soft_wrap=True)

    say("Loading the model")
    loaded = load(model, model_config=model_config, device="cpu")
    settings = settings_for(loaded, steps=steps, guidance=guidance, gate_step=gate_step)
    tgate_compile.optimize(loaded.pipe, settings.gate_step, backend="eager")
    call = {"prompt": "", **loaded.call, "num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
    tgate_compile.export(loaded.pipe, folder, call=call, dynamic=False, components="all", progress=say)
    return demo_prompts(6) if loaded.is_embedded else []


def _serve(server: ThreadingHTTPServer, *, open_browser: bool) -> None:
    from tgate_compile._web.site import address_of

    address = address_of(server)
    ERR.print(f"Serving at {address} for this machine. Ctrl-C ends it.", soft_wrap=True)
    if open_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
