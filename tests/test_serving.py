"""Front ends of others: calls as vLLM-Omni's diffusers adapter makes them, and the nodes for ComfyUI."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visar import load

FOLDER = Path(__file__).parent.parent / "integrations" / "comfyui"


# ------------------------------------------------------------------------------------------------------------ a server
def served(pipeline: Any, prompt: str, **sampling: Any) -> Any:
    """A request as the adapter of vllm-omni 0.30.0 hands it over: what the call's signature names is passed on, a
    seed also as a generator, and everything runs in inference mode."""
    accepted = set(inspect.signature(pipeline.__call__).parameters)
    number = sampling.pop("num_outputs_per_prompt", 1)
    given = {"prompt": prompt} | {name: value for name, value in sampling.items() if value is not None}
    arguments = {name: value for name, value in given.items() if name in accepted}
    arguments |= {name: number for name in accepted if re.match(r"num_[a-z]+_per_prompt", name)}
    generator = torch.Generator()
    arguments["generator"] = generator if sampling.get("seed") is None else generator.manual_seed(sampling["seed"])
    with torch.inference_mode():
        return pipeline(**arguments, output_type="pil")


SENT = dict(height=None, width=None, num_inference_steps=50, guidance_scale=2.0, guidance_rescale=0.0, eta=0.0)


def test_a_request_with_a_seed_gives_the_image_of_that_seed():
    pipeline = load("emoji-raster-text", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    prompt = "red heart, noto style"
    asked = served(pipeline, prompt, seed=7, num_outputs_per_prompt=2, **SENT)
    wanted = pipeline(prompt=prompt, seed=7, num_images=2, guidance_scale=2.0)
    assert [image.tobytes() for image in asked.images] == [image.tobytes() for image in wanted.images]
    assert asked.seeds == [7, 8]
    assert len(served(pipeline, "", **SENT).images) == 1


def test_a_generator_of_another_seed_is_a_second_source():
    pipeline = load("emoji-var-small", device="cpu")
    for generator in (torch.Generator().manual_seed(8), [torch.Generator().manual_seed(7)]):
        with pytest.raises(ValueError, match="one of seed, seeds and generator"):
            pipeline(seed=7, generator=generator)
    used = torch.Generator().manual_seed(7)
    torch.rand(1, generator=used)
    with pytest.raises(ValueError, match="one of seed, seeds and generator"):
        pipeline(seed=7, generator=used)


# ------------------------------------------------------------------------------------------------------------- ComfyUI
@pytest.fixture(scope="module")
def nodes() -> Any:
    """The folder's module, loaded as a folder of custom nodes is."""
    spec = importlib.util.spec_from_file_location("custom_nodes_visar", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_nodes_visar"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["custom_nodes_visar"]


def call(nodes: Any, name: str, **inputs: Any) -> tuple[Any, ...]:
    """Runs a node, as a graph would: by the name of its function, with inputs that it declares."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    declared = node.INPUT_TYPES()
    assert set(declared["required"]) <= set(inputs) <= {*declared["required"], *declared.get("optional", {})}
    out = getattr(node(), node.FUNCTION)(**inputs)
    assert len(out) == len(node.RETURN_TYPES)
    return out


def test_declarations(nodes):
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        declared = node.INPUT_TYPES()
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert {*declared["required"], *declared.get("optional", {})} == set(parameters) - {"self"}
        for name in declared.get("optional", {}):
            assert parameters[name].default is not parameters[name].empty
        assert node.CATEGORY and node.RETURN_TYPES and len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    [names] = nodes.VisarLoad.INPUT_TYPES()["required"]["model"]
    assert "emoji-var-small" in names and "emoji-vq" not in names


def test_images_and_edits(nodes):
    (pipeline,) = call(nodes, "VisarLoad", model="emoji-raster", name_or_folder="emoji-var-small")
    pipeline.set_progress_bar_config(disable=True)
    images, text = call(nodes, "VisarSample", pipeline=pipeline, seed=3, num_images=2, class_name="heart")
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and len(text.splitlines()) == 2
    wanted = pipeline(class_labels="heart", seed=3, num_images=2, output_type="pt").images
    assert torch.equal(images, wanted.permute(0, 2, 3, 1).cpu())
    own = dict(sampler="next_scale:smooth=true", guidance=1.0, labels="style=noto")
    other, _ = call(nodes, "VisarSample", pipeline=pipeline, seed=3, num_images=2, class_name="heart", **own)
    assert not torch.equal(other, images)

    mask = torch.zeros(1, 128, 128)
    mask[:, :64] = 1.0  # the upper half
    (edited,) = call(nodes, "VisarEdit", pipeline=pipeline, image=images, mask=mask, seed=0, class_name="heart")
    assert edited.shape == images.shape
    assert (edited[:, 32:] - images[:, 32:]).abs().max() <= 0.5 / 255 + 1e-6
    assert (edited[:, :32] - images[:, :32]).abs().max() > 0.1
    with pytest.raises(ValueError, match="unknown class 'hart'; nearest"):
        call(nodes, "VisarSample", pipeline=pipeline, seed=0, num_images=1, class_name="hart")
