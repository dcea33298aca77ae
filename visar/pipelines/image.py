"""Images from labels or words: a tokenizer, a generator and a sampler behind the call that diffusers users know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, overload

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from einops import rearrange
from torch import Tensor

from visar.core.checks import BATCH, IMAGES, check_range
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.output import SampleStatistics
from visar.io.pictures import check_decoded, to_pictures
from visar.pipelines import memory as batching
from visar.pipelines.base import TokenPipeline
from visar.pipelines.previews import Previews, check_previews
from visar.pipelines.requests import check_others, check_returned, each_begins, each_image, without_empty

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
Images = TypeVar("Images")


@dataclass
class ImageOutput(BaseOutput, Generic[Images]):
    """Result of a call, typed by its images.

    Attributes:
        images: list of PIL images, float tensor [B, 3, H, W] in [0, 1], float array [B, H, W, 3] in [0, 1], or
            latents: float tensor [B, C, h, w], which `decode` makes images of.
        statistics: statistics of the sampler.
        tokens: int64 [B, N].
        seeds: one per image; an image can be made again alone with its seed and condition.
        descriptions: what each image was conditioned on, in words.
    """

    images: Images
    statistics: SampleStatistics
    tokens: Tensor
    seeds: list[int]
    descriptions: list[str]


class CallSettings(TypedDict, total=False):
    """Keyword arguments of a call that do not say what its images are."""

    attributes: dict[str, str] | None
    condition: Condition | None
    sampler: str | None
    sampler_options: dict[str, Any] | None
    guidance_scale: float | Guidance | None
    temperature: float | Sequence[float] | None
    top_k: int | Sequence[int] | None
    top_p: float | Sequence[float] | None
    seed: int | None
    seeds: Sequence[int] | None
    generator: torch.Generator | list[torch.Generator] | None
    batch_size: int | Literal["auto"] | None
    callback_on_step_end: Callable[["ImagePipeline", int, int, dict], dict | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str] | None
    num_images_per_prompt: int | None
    callback_on_preview: Callable[["ImagePipeline", int, int, Any], object] | None
    first_tokens: Tensor | None


Labels = int | str | Sequence[int | str] | None
Prompts = str | Sequence[str] | None


class ImagePipeline(TokenPipeline):
    """Generation of images from classes, words or captions; arguments as of `TokenPipeline`."""

    # -------------------------------------------------------------------------------------------------- the call
    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        prompt: Prompts = None,
        num_images: int = 1,
        *,
        output_type: Literal["pil"] = "pil",
        return_dict: Literal[True] = True,
        **settings: Unpack[CallSettings],
    ) -> ImageOutput[list[PIL.Image.Image]]: ...

    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        prompt: Prompts = None,
        num_images: int = 1,
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[True] = True,
        **settings: Unpack[CallSettings],
    ) -> ImageOutput[Tensor]: ...

    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        prompt: Prompts = None,
        num_images: int = 1,
        *,
        output_type: Literal["np"],
        return_dict: Literal[True] = True,
        **settings: Unpack[CallSettings],
    ) -> ImageOutput[np.ndarray]: ...

    @overload
    def __call__(
        self,
        class_labels: Labels = None,
        prompt: Prompts = None,
        num_images: int = 1,
        *,
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        return_dict: Literal[False],
        **settings: Unpack[CallSettings],
    ) -> tuple[Any]: ...

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        prompt: Prompts = None,
        num_images: int = 1,
        *,
        attributes: dict[str, str] | None = None,
        condition: Condition | None = None,
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        guidance_scale: float | Guidance | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | Literal["auto"] | None = None,
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        callback_on_step_end: Callable[["ImagePipeline", int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        num_images_per_prompt: int | None = None,
        callback_on_preview: Callable[["ImagePipeline", int, int, Any], object] | None = None,
        first_tokens: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> ImageOutput[Any] | tuple[Any]:
        """Makes images.

        Args:
            class_labels: a class, or one per image, by name or number; None draws from the training distribution.
            prompt: words, or one prompt per image, for models conditioned on words or captions; "" is none.
            num_images: images of every class or prompt.
            attributes: further labels by name, such as {"style": "noto"}.
            condition: the tensors themselves, instead of class_labels, prompt and attributes (for text encoders'
                features).
            sampler, sampler_options: see `visar samplers`. None takes the model's default, as the next four do.
            guidance_scale: 1.0 = off; where the model's default rises from block to block, so does it. Or a Guidance.
            temperature: > 0; 1.0 = off. It and the next two may be lists, one value a scale, for samplers over scales.
            top_k: 0 = off.
            top_p: in (0, 1]; 1.0 = off.
            seed: image i of the call has seed + i; an image depends on its own seed and condition only, and on how
                matrix products of the batch's size are rounded.
            seeds: one per image, instead of seed.
            generator: torch generator(s) to draw the seeds from, instead of seed.
            batch_size: most images at a time; None is all; "auto" finds the most that fit, see `find_batch_size`.
            output_type: "pil", "pt" (tensor in [0, 1]), "np" (array in [0, 1]) or "latent" (see `ImageOutput`).
            callback_on_step_end: called as f(pipeline, n, n, {"tokens": ids so far}) after every block (every few
                passes of speculative samplers); n + 1 tokens are there. `pipeline._interrupt = True` in it ends the
                call: images of what is there are returned (other tokens are 0), and no further batch is begun.
            callback_on_preview: called as f(pipeline, first, n, images) when the first n tokens of a batch give images
                of their own (`tokenizer.layout.previews`): after every scale, or after every group of tokens of a
                diffusion tokenizer, for which these images cost nothing more. `first` is the number of the batch's
                first image; images as output_type says.
            first_tokens: int64 [K], or [B, K] with one row per image: tokens that the images begin with, such as
                those of another image (`visar.pipelines.editing.first_tokens_of`, or `tokens` of another call). The
                others are drawn given them, for raster models by exact samplers.
            callback_on_step_end_tensor_inputs: None or ["tokens"]: what the callback is given.
            num_images_per_prompt: num_images, by the name that other pipelines of diffusers have for it.
            return_dict: False returns the tuple (images,) instead.
            others: further arguments of pipelines of diffusers; only those that ask for nothing are taken (see
                visar/pipelines/requests.py).

        Raises:
            ValueError: bad values; the message names the value and the allowed ones.
            OutOfMemory: a batch does not fit; what was made before is in its attribute `done`.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        check_others(others, callback_on_step_end_tensor_inputs, self.image_size)
        if num_images_per_prompt is not None:
            if num_images not in (1, num_images_per_prompt):
                raise ValueError(f"num_images {num_images!r} and num_images_per_prompt {num_images_per_prompt!r}: one")
            num_images = num_images_per_prompt
        if not isinstance(num_images, Integral):
            raise ValueError(f"num_images {num_images!r}; it must be a whole number >= 1")
        check_range("num_images", int(num_images), IMAGES)
        if isinstance(batch_size, str) and batch_size != "auto":
            raise ValueError(f'batch_size {batch_size!r}; a number >= 1, "auto" or None')
        if not isinstance(batch_size, str | None):
            if not isinstance(batch_size, Integral):
                raise ValueError(f"batch_size {batch_size!r}; it must be a whole number >= 1")
            check_range("batch_size", int(batch_size), BATCH)
        if not isinstance(attributes, Mapping | None):
            raise ValueError(f"attributes {attributes!r}; give a dictionary, such as {{'style': 'noto'}}")
        prompt, num_images = without_empty(prompt, num_images)
        if class_labels is not None and prompt is not None:
            raise ValueError("give a class (class_labels, --class) or a prompt, not both")
        if not isinstance(condition, Condition | None):
            raise ValueError(f"condition {condition!r:.80}; a Condition is needed")
        if condition is not None and (class_labels is not None or prompt is not None or attributes):
            raise ValueError("condition says everything: give it without class_labels, prompt and attributes")
        labels = None if class_labels is None else each_image("class_labels", class_labels, num_images)
        prompts = None if prompt is None else each_image("prompt", prompt, num_images)
        given = labels if labels is not None else prompts
        count = condition.batch if condition is not None else num_images if given is None else len(given)
        image_seed_list = self.prepare_seeds(count, seed, seeds, generator)
        if condition is None:
            condition, descriptions = self.prepare_condition(image_seed_list, labels, prompts, attributes)
        else:
            descriptions = [""] * count
        if first_tokens is not None:
            condition = replace(condition, first_BK=each_begins(first_tokens, count))
        if callback_on_preview is not None:
            check_previews(self)
        settings = self.sampling_settings(
            sampler=sampler, guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        settings["sampler_options"] = sampler_options
        size = count if batch_size is None else batch_size
        if isinstance(size, str):
            guidance = settings["guidance"]
            others = {name: value for name, value in settings.items() if name != "guidance"}
            size = self.find_batch_size(count, guidance_scale=guidance, **others)
        tokens: list[Tensor] = []
        images: list[Tensor] = []
        self._interrupt = False
        statistics = SampleStatistics()

        def finished() -> ImageOutput[Any]:
            made = sum(len(part) for part in tokens)
            return ImageOutput(
                images=_finish(torch.cat(images), output_type),
                statistics=statistics,
                tokens=torch.cat(tokens),
                seeds=image_seed_list[:made],
                descriptions=descriptions[:made],
            )

        num_tokens = self.generator.num_tokens
        # Typed as a decorator in some versions of diffusers, which it is not.
        progress_bar: Any = self.progress_bar
        with progress_bar(total=len(range(0, count, size)) * num_tokens) as bar:
            for first in range(0, count, size):
                part = slice(first, first + size)
                previews = None if callback_on_preview is None else Previews(self, image_seed_list[part])

                def callback(
                    done: int,
                    ids: Tensor,
                    before: int = first // size * num_tokens,
                    first: int = first,
                    previews: Previews | None = previews,
                ) -> bool:
                    bar.update(before + done - bar.n)
                    shown = None if previews is None else previews.update(done, ids)
                    if callback_on_preview is not None and shown is not None:
                        kind = "pt" if output_type == "latent" else output_type
                        callback_on_preview(self, first, shown[0], _finish(shown[1], kind))
                    if callback_on_step_end is not None:
                        check_returned(callback_on_step_end(self, done - 1, done - 1, {"tokens": ids}), ids)
                    return self._interrupt

                try:
                    out = self.sample_tokens(
                        condition.rows(part), image_seed_list[part], callback=callback, **settings
                    )
                    if (missing := num_tokens - out.tokens.shape[1]) and self._interrupt:
                        out.tokens = F.pad(out.tokens, ((0, 0) * (out.tokens.ndim - 2)) + (0, missing))
                    made = out.tokens if out.latent is None else out.latent
                    whole = None if previews is None or out.latent is not None else previews.whole(out.tokens)
                    if output_type == "latent":
                        pictures = self._latents(made)
                    else:
                        pictures = self.decode(made, image_seed_list[part]) if whole is None else whole
                except torch.OutOfMemoryError:
                    out = None
                if out is None:  # outside of the handler, which keeps the failed call's tensors alive
                    most = min(size, count - first)
                    raise batching.out_of_memory(self, most, settings["guidance"], finished() if tokens else None)
                tokens.append(out.tokens)
                images.append(pictures)
                statistics = statistics + out.statistics
                if self._interrupt:
                    break
        output = finished()
        return output if return_dict else (output.images,)


def _finish(image_BCHW: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return image_BCHW
    check_decoded(image_BCHW)
    if output_type == "pt":
        return (image_BCHW + 1.0) / 2.0
    if output_type == "np":
        return rearrange((image_BCHW + 1.0) / 2.0, "b c h w -> b h w c").cpu().numpy()
    return to_pictures(image_BCHW)
