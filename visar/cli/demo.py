"""`visar demo`: a web page to sample, edit and compare."""

import dataclasses
from collections.abc import Callable

import tyro

Report = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Demo:
    """Serves a web page to sample, edit and compare: images appear while they form. Needs the extra demo."""

    models: tyro.conf.Positional[tuple[str, ...]] = ("emoji-raster", "emoji-var")
    """Models: embedded or official names (`visar models`), or folders made by save_pretrained."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen at."""
    browser: bool = False
    """Open the page in a browser."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""
    dtype: str | None = None
    """Dtype of the weights: float32, bfloat16 or float16; when not given, bfloat16 on a GPU and float32 on a CPU."""


def demo(options: Demo, report: Report) -> None:
    """Runs `visar demo`; returns when the server is stopped.

    Raises:
        ImportError: gradio is not installed.
        ValueError: no model of that name, none at all, or the port is taken.
    """
    import os

    if not options.models:
        raise ValueError("no models; give one or more names")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would call its makers
    try:
        from visar.demo.app import Models, serve
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise ImportError('the demo needs gradio: pip install "torch-visar[demo]"') from error
    models = Models(options.models, options.device, options.dtype)
    for name in options.models:
        report(f"loading {name}")
        models[name]
    try:
        serve(models, options.host, options.port, options.browser)
    except OSError as error:
        raise ValueError(f"cannot listen at {options.host}:{options.port}: {error}") from error
