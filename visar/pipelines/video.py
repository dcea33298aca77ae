"""Clips from labels or words: the pipeline of images over a tokenizer of clips."""

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import PIL.Image
import torch
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor

from visar.core.output import SampleStatistics
from visar.pipelines.image import OUTPUT_TYPES, ImagePipeline, Labels, Prompts

Frames = TypeVar("Frames")


@dataclass
class VideoOutput(BaseOutput, Generic[Frames]):
    """Result of a call, typed by its frames.

    Attributes:
        frames: list of clips, each a list of PIL images; float tensor [B, T, 3, H, W] in [0, 1]; float array
            [B, T, H, W, 3] in [0, 1]; or latents: float tensor [B, C, t, h, w], which `decode` makes clips of.
        statistics, tokens, seeds, descriptions: see `ImageOutput`; one seed and description per clip.
    """

    frames: Frames
    statistics: SampleStatistics
    tokens: Tensor
    seeds: list[int]
    descriptions: list[str]


class VideoPipeline(ImagePipeline):
    """Generation of clips from classes, words or captions; arguments as of `TokenPipeline`."""

    _of_clips = True

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return int(self.tokenizer.config["num_frames"])

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        class_labels: Labels = None,
        prompt: Prompts = None,
        num_clips: int = 1,
        *,
        num_frames: int | None = None,
        num_videos_per_prompt: int | None = None,
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> VideoOutput[Any] | tuple[Any]:
        """Makes clips.

        Args:
            class_labels, prompt: see `ImagePipeline`.
            num_clips: clips of every class or prompt.
            num_frames: None or the model's number of frames: it has no other.
            num_videos_per_prompt: num_clips, by the name that other pipelines of diffusers have for it.
            output_type: "pil" (lists of images), "pt" (tensor in [0, 1]), "np" (array in [0, 1]) or "latent".
            return_dict: False returns the tuple (frames,) instead.
            settings: further arguments of `ImagePipeline`: seed, sampler, guidance_scale, first_tokens, ... The first
                k * h * w tokens are those of the first k maps of frames (`first_frames`).

        Raises:
            ValueError: bad values; the message names the value and the allowed ones.
            OutOfMemory: a batch does not fit; the attribute `done` of what was made before holds its clips as images.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        if num_frames not in (None, self.num_frames):
            raise ValueError(f"num_frames {num_frames!r}; this model's clips have {self.num_frames}")
        num_clips = settings.pop("num_images", num_clips)
        if num_videos_per_prompt is not None:
            settings["num_images_per_prompt"] = num_videos_per_prompt
        kind: Any = "latent" if output_type == "latent" else "pt"
        made = super().__call__(class_labels, prompt, num_clips, output_type=kind, **settings)
        frames = _finish(made.images, output_type)
        if not return_dict:
            return (frames,)
        return VideoOutput(frames, made.statistics, made.tokens, made.seeds, made.descriptions)

    def first_tokens_of(self, clip_TCHW: Tensor) -> Tensor:
        """Tokens int64 [K] of a clip's beginning, for `first_tokens`: the frames that follow are drawn given them.

        Args:
            clip_TCHW: frames float [T, 3, H, W] in [-1, 1]; T is 1 or 1 and some groups of frames of the tokenizer.

        Raises:
            ValueError: frames that do not fit the tokenizer, or as many as the model makes.
        """
        if clip_TCHW.ndim != 4 or len(clip_TCHW) >= self.num_frames:
            raise ValueError(
                f"frames of shape {tuple(clip_TCHW.shape)}; needed: [T, 3, H, W] with T below {self.num_frames}"
            )
        with self._fetched(self.tokenizer):
            return self.tokenizer.encode(clip_TCHW[None].to(self._execution_device))[0]


def _finish(frames_BTCHW: Tensor, output_type: str) -> Any:
    if output_type in ("pt", "latent"):
        return frames_BTCHW
    frames_BTHWC = rearrange(frames_BTCHW, "b t c h w -> b t h w c")
    if output_type == "np":
        return frames_BTHWC.cpu().numpy()
    pixels = (frames_BTHWC * 255.0).clamp(0.0, 255.0).round().to(torch.uint8).cpu().numpy()
    return [[PIL.Image.fromarray(frame) for frame in clip] for clip in pixels]
