"""A web page to sample, edit and compare: images appear while they form. Built with gradio, the extra `demo`."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
import PIL.Image
import torch

from visar.core.output import SampleStatistics
from visar.demo.steps import Progress, fitting_samplers, watch
from visar.pipelines.editing import edit_images
from visar.pipelines.image import ImageOutput, ImagePipeline
from visar.pipelines.loading import load
from visar.pipelines.requests import named_values
from visar.samplers.settings import parse_sampler

_ANY = "any"
_MOST_IMAGES = 16
_ZOOM = 4
_CSS = ".pixels img {image-rendering: pixelated}"


class Models:
    """Pipelines by name, loaded when first asked for.

    Args:
        names: embedded or official names, or folders.
        device, dtype: see `visar.load`.

    Attributes:
        busy: held while one of them works: a model's buffers serve one call at a time.
    """

    def __init__(self, names: Sequence[str], device: str | None = None, dtype: str | None = None) -> None:
        self.names, self.busy = list(names), threading.Lock()
        self._placing: dict[str, Any] = dict(device=device, dtype=dtype)
        self._pipelines: dict[str, ImagePipeline] = {}
        self._loading = threading.Lock()

    def __getitem__(self, name: str) -> ImagePipeline:
        if name not in self.names:
            raise ValueError(f"model {name!r}; choose one of {', '.join(self.names)}")
        with self._loading:
            if name not in self._pipelines:
                pipeline = load(name, **self._placing)
                pipeline.set_progress_bar_config(disable=True)
                self._pipelines[name] = pipeline
            return self._pipelines[name]

    def samplers(self, name: str) -> list[str]:
        """See `fitting_samplers`."""
        return fitting_samplers(self[name])

    def classes(self, name: str) -> list[str]:
        """Names of a model's classes; none for models of words, and where classes have numbers only."""
        pipeline = self[name]
        takes_class = bool(pipeline.generator.config.get("num_classes"))
        vocabulary = pipeline.vocabulary
        return list(vocabulary.attributes.get("class", ())) if takes_class and vocabulary is not None else []

    def edits(self) -> list[str]:
        """Names of the models that edit images; all models are loaded for it."""
        return [name for name in self.names if self[name].tokenizer.layout.arrangement == "scales"]


def asked_for(
    models: Models,
    name: str,
    sampler: str,
    text: str = "",
    guidance: float | None = None,
    seed: float = 0,
    images: float = 1,
    what: str = "",
    labels: str = "",
) -> dict[str, Any]:
    """Arguments of a pipeline's call from the fields of the page.

    Args:
        name, sampler: of the model and the sampler.
        text: settings of the sampler as setting=value,setting=value; may be empty.
        guidance: scale; None = the model's default.
        seed, images: of the first image, and their number.
        what: a class, or a prompt where the model takes words; empty or "any" leaves it open.
        labels: further labels as name=value, several with commas between; may be empty.

    Raises:
        ValueError: a field that is none.
    """
    if seed is None or seed != int(seed):
        raise ValueError(f"seed {seed}; needed: a whole number")
    if not 1 <= images <= _MOST_IMAGES:
        raise ValueError(f"{images} images; needed: 1 ... {_MOST_IMAGES}")
    _, options = parse_sampler(f"{sampler}:{text.strip()}")
    arguments: dict[str, Any] = dict(sampler=sampler, sampler_options=options, num_images=int(images), seed=int(seed))
    if guidance is not None:
        arguments["guidance_scale"] = float(guidance)
    what = (what or "").strip()
    if what and what != _ANY:
        arguments["class_labels" if models.classes(name) else "prompt"] = what
    if named := [part.strip() for part in (labels or "").split(",") if part.strip()]:
        arguments["attributes"] = named_values(named)
    return arguments


def counts(statistics: SampleStatistics, seconds: float) -> str:
    """Passes and seconds in words."""
    passes = dict(statistics.forward_passes)
    parts = [f"{passes.pop('generator', 0)} passes", *(f"{count} of the {name}" for name, count in passes.items())]
    return f"{' + '.join(parts)}, {statistics.seconds:.2f} s of sampling, {seconds:.2f} s in all"


def _large(images: Sequence[PIL.Image.Image]) -> list[PIL.Image.Image]:
    return [each.resize((each.width * _ZOOM, each.height * _ZOOM), PIL.Image.Resampling.NEAREST) for each in images]


def _line(progress: Progress) -> str:
    if progress.result is None:
        return f"{progress.done} of {progress.total} tokens, {progress.seconds:.1f} s"
    return counts(progress.result.statistics, progress.seconds)


def _steps(models: Models, name: str, arguments: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """What the page shows of a call, again and again; errors as the page shows them."""
    try:
        pipeline = models[name]
        with models.busy:
            yield from ((_large(step.images), _line(step)) for step in watch(pipeline, pipeline, **arguments))
    except (ValueError, ImportError, torch.OutOfMemoryError) as error:
        raise gr.Error(str(error)) from error


def keep_mask(layers: Sequence[np.ndarray], side: int) -> torch.Tensor:
    """Pixels that stay, bool [1, side, side], of a brush's layers: those of the centre square that none painted.

    Args:
        layers: uint8 [h, w, 4] each; painted where alpha is not 0.
    """
    painted = np.any([layer[..., 3] > 0 for layer in layers], axis=0)
    height, width = painted.shape
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = PIL.Image.fromarray(painted[top : top + edge, left : left + edge])
    return ~torch.from_numpy(np.asarray(square.resize((side, side), PIL.Image.Resampling.BOX)) > 0)[None]


def edit(models: Models, name: str, drawn: dict[str, Any] | None, what: str, seed: float, images: float) -> Any:
    """Images with the painted part made anew.

    Args:
        drawn: what the page's image editor gives: background and layers, uint8 [h, w, 4].
        what, seed, images: see `asked_for`.

    Raises:
        ValueError: nothing is painted, or a field that is none.
    """
    if not drawn or drawn.get("background") is None:
        raise ValueError("give an image first")
    pipeline = models[name]
    side = pipeline.tokenizer.layout.shapes[-1][0] * pipeline.tokenizer.downsampling
    keep_1HW = keep_mask(drawn["layers"], side) if drawn["layers"] else torch.ones(1, side, side, dtype=torch.bool)
    if keep_1HW.all():
        raise ValueError("paint over what is to be made anew")
    background = np.asarray(drawn["background"])
    picture = PIL.Image.fromarray(background)
    arguments = asked_for(models, name, "next_scale", seed=seed, images=images, what=what)
    labels = [arguments["class_labels"]] * int(images) if "class_labels" in arguments else None
    with models.busy:
        return edit_images(
            pipeline, [picture] * int(images), mask=keep_1HW, class_labels=labels, seed=arguments["seed"]
        )


def build(models: Models) -> gr.Blocks:
    """The page."""
    first = models.names[0]

    def chosen(name: str) -> tuple[Any, Any, Any]:
        samplers, classes = models.samplers(name), models.classes(name)
        default = models[name].config["defaults"].get("sampler", samplers[0])
        named = [_ANY, *classes]
        return (
            gr.Dropdown(choices=samplers, value=default if default in samplers else samplers[0]),
            gr.Dropdown(choices=named, value=_ANY, visible=bool(classes)),
            gr.Textbox(value="", visible=not classes),
        )

    def request(
        name: str,
        sampler: str,
        text: str,
        scale: float,
        seed: float,
        images: float,
        cls: str,
        prompt: str,
        labels: str,
    ):
        what = cls if models.classes(name) else prompt
        try:
            return asked_for(models, name, sampler, text, scale or None, seed, images, what, labels)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def sample(name: str, sampler: str, *fields: Any) -> Iterator[tuple[Any, str]]:
        yield from _steps(models, name, request(name, sampler, *fields))

    def compare(
        name: str, one: str, text: str, other: str, other_text: str, *fields: Any
    ) -> Iterator[tuple[Any, ...]]:
        left: tuple[Any, str] = ([], "")
        requests = [request(name, each, given, *fields) for each, given in ((one, text), (other, other_text))]
        for left in _steps(models, name, requests[0]):
            yield *left, [], ""
        for right in _steps(models, name, requests[1]):
            yield *left, *right

    def edited(name: str, drawn: dict[str, Any], cls: str, seed: float, images: float) -> tuple[Any, str]:
        try:
            out: ImageOutput[Any] = edit(models, name, drawn, cls, seed, images)
        except (ValueError, torch.OutOfMemoryError) as error:
            raise gr.Error(str(error)) from error
        return _large(out.images), counts(out.statistics, out.statistics.seconds)

    samplers, named, words = chosen(first)
    with gr.Blocks(title="visar") as page:
        gr.Markdown("# visar\nVisual autoregressive generation: choose a model and a sampler, and watch images form.")

        def fields() -> tuple[Any, ...]:
            scale = gr.Slider(0, 10, value=0, step=0.1, label="guidance (0: default)")
            seed = gr.Number(value=0, precision=0, label="seed of the first image")
            images = gr.Slider(1, _MOST_IMAGES, value=4, step=1, label="images")
            cls = gr.Dropdown(choices=named.choices, value=_ANY, label="class", visible=named.visible)
            prompt = gr.Textbox(label="prompt", visible=words.visible)
            labels = gr.Textbox(label="further labels", placeholder="style=noto")
            return scale, seed, images, cls, prompt, labels

        def gallery(label: str) -> Any:
            return gr.Gallery(label=label, columns=4, height="auto", elem_classes="pixels", format="png")

        options = dict(choices=samplers.choices, value=samplers.value)
        with gr.Tab("Sample"):
            with gr.Row():
                with gr.Column(scale=1):
                    model = gr.Dropdown(choices=models.names, value=first, label="model")
                    sampler = gr.Dropdown(**options, label="sampler")
                    text = gr.Textbox(label="settings of the sampler", placeholder="window=16,coupling=reuse")
                    own = fields()
                    with gr.Row():
                        go, end = gr.Button("Sample", variant="primary"), gr.Button("Cancel")
                with gr.Column(scale=2):
                    shown, said = gallery("images"), gr.Markdown()
            run = go.click(sample, [model, sampler, text, *own], [shown, said], concurrency_id="model")
            end.click(None, cancels=[run])
            model.change(chosen, model, [sampler, own[3], own[4]])
        with gr.Tab("Compare"):
            with gr.Row():
                model = gr.Dropdown(choices=models.names, value=first, label="model")
                own = fields()
            halves = []
            with gr.Row():
                for number in ("first", "second"):
                    with gr.Column():
                        sampler = gr.Dropdown(**options, label=f"{number} sampler")
                        text = gr.Textbox(label="its settings")
                        halves.append((sampler, text, gallery(f"{number} images"), gr.Markdown()))
            with gr.Row():
                go, end = gr.Button("Compare", variant="primary"), gr.Button("Cancel")
            (one, text, *left), (other, other_text, *right) = halves
            run = go.click(
                compare, [model, one, text, other, other_text, *own], [*left, *right], concurrency_id="model"
            )
            end.click(None, cancels=[run])
            model.change(chosen, model, [one, own[3], own[4]])
            model.change(lambda name: chosen(name)[0], model, other)
        if over_scales := models.edits():
            with gr.Tab("Edit"), gr.Row():
                with gr.Column(scale=1):
                    model = gr.Dropdown(choices=over_scales, value=over_scales[0], label="model")
                    drawn = gr.ImageEditor(
                        type="numpy", image_mode="RGBA", label="image: paint over what is to be made anew"
                    )
                    cls = gr.Dropdown(choices=[_ANY, *models.classes(over_scales[0])], value=_ANY, label="class")
                    seed = gr.Number(value=0, precision=0, label="seed of the first image")
                    images = gr.Slider(1, _MOST_IMAGES, value=4, step=1, label="images")
                    go = gr.Button("Edit", variant="primary")
                with gr.Column(scale=2):
                    shown, said = gallery("images"), gr.Markdown()
                go.click(edited, [model, drawn, cls, seed, images], [shown, said], concurrency_id="model")
    return page


def serve(models: Models, host: str, port: int, browser: bool) -> None:
    """Serves the page until the process ends; users wait in a queue, and one call runs at a time.

    Args:
        host, port: address that is listened at.
        browser: open the page in a browser.
    """
    page = build(models).queue(default_concurrency_limit=1, max_size=64)
    page.launch(server_name=host, server_port=port, inbrowser=browser, css=_CSS, quiet=False)
