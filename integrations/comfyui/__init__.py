"""Nodes for ComfyUI: load a model, make images by class or prompt, redraw a painted part.

Copy or link this folder into ComfyUI/custom_nodes/, with visar in ComfyUI's Python. Images are float [B, H, W, 3] in
[0, 1], masks float [B, H, W] with 1 where something is to be made anew.
"""

from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

import visar
from visar.checkpoints.hub import about, embedded_names
from visar.pipelines.editing import edit_images
from visar.pipelines.requests import named_values
from visar.samplers.settings import parse_sampler

_SEED = ("INT", {"default": 0, "min": 0, "max": 2**62, "tooltip": "Image i of a call has seed + i."})
_TEXT = ("STRING", {"default": ""})
_COUNT = ("INT", {"default": 4, "min": 1, "max": 64})
_LABELS = ("STRING", {"default": "", "tooltip": "Further labels, such as style=noto, with commas between."})


def _wanted(class_name: str, prompt: str, labels: str) -> dict[str, Any]:
    """Arguments of a call that say what is to be made; empty fields leave it open."""
    given: dict[str, Any] = {}
    if class_name.strip():
        given["class_labels"] = class_name.strip()
    if prompt.strip():
        given["prompt"] = prompt.strip()
    if labels.strip():
        given["attributes"] = named_values([part.strip() for part in labels.split(",") if part.strip()])
    return given


class VisarLoad:
    """Loads a model: the name of an embedded or official one, or a folder."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "visar", "load", ("VISAR_PIPELINE",), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [name for name in embedded_names() if about(name)["kind"] == "generator"]
        return {
            "required": {"model": (names,)},
            "optional": {"name_or_folder": ("STRING", {"default": "", "tooltip": "Instead of the model above."})},
        }

    def load(self, model: str, name_or_folder: str = "") -> tuple[Any]:
        return (visar.load(name_or_folder.strip() or model),)


class VisarSample:
    """Makes images by class or prompt."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "visar", "sample", ("IMAGE", "STRING"), ("images", "descriptions")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sampler = {"default": "", "tooltip": "NAME or NAME:setting=value,setting=value; empty is the model's own."}
        guidance = {"default": 0.0, "min": 0.0, "max": 30.0, "step": 0.1, "tooltip": "0 is the model's own, 1 is off."}
        return {
            "required": {"pipeline": ("VISAR_PIPELINE",), "seed": _SEED, "num_images": _COUNT},
            "optional": {
                "class_name": _TEXT,
                "prompt": ("STRING", {"default": "", "multiline": True}),
                "labels": _LABELS,
                "sampler": ("STRING", sampler),
                "guidance": ("FLOAT", guidance),
            },
        }

    def sample(
        self,
        pipeline: Any,
        seed: int,
        num_images: int,
        class_name: str = "",
        prompt: str = "",
        labels: str = "",
        sampler: str = "",
        guidance: float = 0.0,
    ) -> tuple[torch.Tensor, str]:
        settings: dict[str, Any] = _wanted(class_name, prompt, labels)
        if sampler.strip():
            settings["sampler"], settings["sampler_options"] = parse_sampler(sampler.strip())
        if guidance:
            settings["guidance_scale"] = guidance
        out = pipeline(num_images=num_images, seed=seed, output_type="pt", **settings)
        return out.images.permute(0, 2, 3, 1).float().cpu().contiguous(), "\n".join(out.descriptions)


class VisarEdit:
    """Makes the masked part of images anew, by a model over scales or a masked one."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = "visar", "edit", ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"pipeline": ("VISAR_PIPELINE",), "image": ("IMAGE",), "mask": ("MASK",), "seed": _SEED},
            "optional": {"class_name": _TEXT, "labels": _LABELS},
        }

    def edit(
        self,
        pipeline: Any,
        image: torch.Tensor,
        mask: torch.Tensor,
        seed: int,
        class_name: str = "",
        labels: str = "",
    ) -> tuple[torch.Tensor]:
        height, width = pipeline.image_size
        levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        pictures = [PIL.Image.fromarray(each[..., :3]) for each in levels]
        edge = min(mask.shape[-2:])  # of the centre square, which is what is edited
        top, left = ((side - edge) // 2 for side in mask.shape[-2:])
        square = mask[:1, None, top : top + edge, left : left + edge].float()
        keep = functional.interpolate(square, (height, width), mode="area")[:, 0] == 0
        wanted = _wanted(class_name, "", labels)
        if "class_labels" in wanted:
            wanted["class_labels"] = [wanted["class_labels"]] * len(pictures)
        out = edit_images(pipeline, pictures, mask=keep, seed=seed, **wanted)
        made = np.stack([np.asarray(each) for each in out.images])
        return (torch.from_numpy(made).float() / 255,)


NODE_CLASS_MAPPINGS = {"VisarLoad": VisarLoad, "VisarSample": VisarSample, "VisarEdit": VisarEdit}
NODE_DISPLAY_NAME_MAPPINGS = {"VisarLoad": "visar: load", "VisarSample": "visar: sample", "VisarEdit": "visar: edit"}
