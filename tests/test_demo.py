"""The demo: images of a call while it runs, the fields of the page, and the page itself in a browser."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from visar import load
from visar.demo.steps import fitting_samplers, partial_images, watch

NAMES = ("emoji-raster", "emoji-var-small")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    made = {name: load(name, device="cpu") for name in NAMES}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image).astype(int)


# --------------------------------------------------------------------------------------------------- images that form
@pytest.mark.parametrize("name", NAMES)
def test_what_is_there_of_a_call_is_seen_and_the_end_is_the_call_itself(pipelines, name):
    pipeline = pipelines[name]
    arguments = dict(num_images=2, seed=3)
    steps = list(watch(pipeline, pipeline, every=0.2 if name == "emoji-raster" else 0.0, **arguments))
    done = [step.done for step in steps]
    assert len(steps) > 2 and done == sorted(done) and done[-1] == steps[-1].total == pipeline.generator.num_tokens
    whole = pipeline(**arguments).images
    assert steps[-1].result is not None and all(step.result is None for step in steps[:-1])
    for made, image in zip(steps[-1].images, whole, strict=True):
        assert np.array_equal(pixels(made), pixels(image))
    distance = [float(np.abs(pixels(step.images[0]) - pixels(whole[0])).mean()) for step in steps]
    assert distance[-1] == 0 and distance[0] > 1


def test_rows_that_are_not_there_are_grey(pipelines):
    pipeline = pipelines["emoji-raster"]
    out = pipeline(num_images=2, seed=0, output_type="pt")
    [half, _] = partial_images(pipeline, out.tokens[:, :128], 128)
    whole = out.images[0].permute(1, 2, 0).numpy() * 255
    assert len(np.unique(pixels(half)[32:])) == 1
    # The decoder sees some pixels across the edge of what is there.
    assert np.abs(pixels(half)[:16] - whole[:16]).mean() < 2
    assert partial_images(pipeline, out.tokens[:, :0], 0) == []


def test_vectors_that_are_not_there_are_grey():
    """As of masked generators, whose tokens come in any order."""
    layout = SimpleNamespace(previews=(), arrangement="grid", num_tokens=4, shapes=((2, 2),))
    pipeline: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(layout=layout, downsampling=2), decode=lambda tokens: torch.ones(1, 3, 4, 4)
    )
    tokens = torch.zeros(1, 4, 3)
    tokens[0, 2] = 1.0
    [image] = partial_images(pipeline, tokens, 1)
    white = (pixels(image) == 255).all(-1)
    assert white[2:, :2].all() and white.sum() == 4


def test_a_call_ends_when_nobody_watches_and_errors_come_out(pipelines):
    pipeline = pipelines["emoji-raster"]
    before = threading.active_count()
    steps = watch(pipeline, pipeline, every=0.0, num_images=4)
    assert next(steps).result is None
    begun = time.perf_counter()
    steps.close()
    assert threading.active_count() == before
    assert time.perf_counter() - begun < 30
    with pytest.raises(ValueError, match="temperature"):
        list(watch(pipeline, pipeline, temperature=0.0))


def test_samplers_that_need_nothing_else_are_offered(pipelines):
    assert {"ancestral", "jacobi", "grouped"} <= set(fitting_samplers(pipelines["emoji-raster"]))
    over_scales = fitting_samplers(pipelines["emoji-var-small"])
    assert "next_scale" in over_scales and not {"jacobi", "collaborative", "edit"} & set(over_scales)


# -------------------------------------------------------------------------------------------------- fields of the page
@pytest.fixture(scope="module")
def app() -> Any:
    pytest.importorskip("gradio", reason="gradio is not installed (the extra demo)")
    import visar.demo.app

    return visar.demo.app


@pytest.fixture(scope="module")
def models(app) -> Any:
    return app.Models(NAMES, "cpu")


def test_fields_become_the_arguments_of_a_call(app, models):
    asked = app.asked_for(models, NAMES[0], "jacobi", " window=8 ", 2.0, 5, 3, "red heart", "style=noto, ")
    assert asked == dict(
        sampler="jacobi",
        sampler_options={"window": 8},
        num_images=3,
        seed=5,
        guidance_scale=2.0,
        class_labels="red heart",
        attributes={"style": "noto"},
    )
    open_ = app.asked_for(models, NAMES[0], "ancestral", what="any")
    assert not {"class_labels", "prompt", "attributes", "guidance_scale"} & set(open_)
    for changes, message in (
        (dict(text="width=3"), "has no setting 'width'"),
        (dict(seed=0.5), "seed 0.5"),
        (dict(images=17), "17 images; needed: 1 ... 16"),
        (dict(labels="noto"), "write it as name=value"),
    ):
        with pytest.raises(ValueError, match=message):
            app.asked_for(models, NAMES[0], "ancestral", **changes)
    with pytest.raises(ValueError, match="model 'x'; choose one of emoji-raster"):
        models["x"]


def drawn(height: int, width: int, *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    layers = np.zeros((len(boxes), height, width, 4), np.uint8)
    for layer, (top, left, bottom, right) in zip(layers, boxes, strict=True):
        layer[top:bottom, left:right, 3] = 255
    background = np.full((height, width, 4), (200, 200, 200, 255), np.uint8)
    return {"background": background, "layers": list(layers)}


def test_what_is_painted_is_made_anew_and_the_rest_stays(app, models):
    keep = app.keep_mask(drawn(128, 256, (0, 64, 64, 128), (64, 192, 128, 256))["layers"], 64)
    assert keep.shape == (1, 64, 64)
    assert not keep[0, :32, :32].any() and keep[0, 32:].all() and keep[0, :32, 32:].all()
    out = app.edit(models, NAMES[1], drawn(64, 64, (16, 16, 48, 48)), "any", 0, 2)
    for image in out.images:
        assert (pixels(image)[:16] == 200).all() and (pixels(image)[16:48, 16:48] != 200).any()
    for given, message in ((None, "give an image"), (drawn(64, 64), "paint over")):
        with pytest.raises(ValueError, match=message):
            app.edit(models, NAMES[1], given, "any", 0, 1)


# ----------------------------------------------------------------------------------------------------------- a browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
         "--disable-component-update")  # fmt: skip
SCREENSHOTS = os.environ.get("VISAR_SCREENSHOTS")  # a folder; those of the docs were made with it


@pytest.fixture(scope="module")
def address(app, tmp_path_factory) -> Iterator[str]:
    """The command's page, served by a process of its own."""
    pytest.importorskip("playwright", reason="playwright is not installed (the extra dev)")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this system")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    command = [sys.executable, "-m", "visar", "demo", *NAMES, "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        until = time.monotonic() + 120
        while "Running on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture
def page(address) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(address, wait_until="domcontentloaded")
        page.get_by_role("button", name="Sample").wait_for()
        yield page
        browser.close()


def images_of(page: Any) -> list[str]:
    return [each.get_attribute("src") for each in page.locator(".gallery-item img, .thumbnail-item img").all()]


def keep_picture(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"demo-{name}.png")


def test_images_form_on_the_page_and_a_call_can_be_cancelled(page):
    page.get_by_role("button", name="Sample").click()
    seen: list[list[str]] = []
    until = time.monotonic() + 120
    while not page.get_by_text("256 passes").count() and time.monotonic() < until:
        if (now := images_of(page)) and now not in seen:
            seen.append(now)
            if len(seen) == 5:
                keep_picture(page, "sample")
        time.sleep(0.1)
    assert page.get_by_text("256 passes").count()
    assert len(seen) >= 2 and all(len(images) == 4 for images in seen)

    page.get_by_role("tab", name="Sample").wait_for()
    page.get_by_label("settings of the sampler").first.fill("width=3")
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("has no setting 'width'").wait_for()
    page.get_by_label("settings of the sampler").first.fill("")

    page.get_by_role("button", name="Sample").click()
    page.get_by_text("of 256 tokens").wait_for()
    page.get_by_role("button", name="Cancel").first.click()
    time.sleep(3)
    at_first = images_of(page)
    time.sleep(3)
    assert images_of(page) == at_first and page.get_by_text("of 256 tokens").count()
    page.get_by_role("button", name="Sample").click()  # the model is free again
    page.get_by_text("256 passes").wait_for(timeout=120_000)


def test_two_samplers_side_by_side(page):
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("second sampler").click()
    page.get_by_role("option", name="jacobi").click()
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("passes,").nth(1).wait_for(timeout=180_000)
    passes = [int(text.split()[0]) for text in page.get_by_text("passes,").all_inner_texts()]
    assert passes[0] == 256 and passes[1] < 256
    keep_picture(page, "compare")


def test_a_painted_part_is_made_anew(page, tmp_path):
    file = tmp_path / "given.png"
    load(NAMES[1], device="cpu")(class_labels="heart", seed=0).images[0].resize((512, 512)).save(file)
    page.get_by_role("tab", name="Edit").click()
    page.locator("input[type=file]").last.set_input_files(file)
    page.get_by_label("Brush").first.click()
    box = page.locator("canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    time.sleep(2)
    page.mouse.move(x - 30, y)
    page.mouse.down()
    for step in range(-30, 31, 5):
        page.mouse.move(x + step, y + step / 2)
    page.mouse.up()
    time.sleep(2)
    page.get_by_role("button", name="Edit").last.click()
    page.get_by_text("passes,").last.wait_for(timeout=120_000)
    assert len(images_of(page)) >= 4
    keep_picture(page, "edit")
