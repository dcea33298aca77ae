"""What pipelines of images and of videos share."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.interface import Callback
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.io.files import check_folder_output, finish_folder, writing
from visar.kernels.invariance import batch_invariant, check_deterministic, wanted
from visar.layers.packable import Storage, check_storage, pack_folder
from visar.layers.quantize import quantized_layers, scaled
from visar.pipelines import memory as batching
from visar.pipelines.components import _place, placement, read_pipeline
from visar.pipelines.fitting import check_defaults, check_parts, check_vocabulary, read_vocabulary
from visar.pipelines.memory import borrowed
from visar.pipelines.requests import numbered_classes, seeds_of_images
from visar.pipelines.sampling import Helpers, chosen_settings, resolve_options
from visar.pipelines.text_encoder import TextEncoder, encode_captions, load_text_encoder
from visar.samplers.index import SamplerEntry
from visar.tokenizers.decoding import decode_tokens


class TokenPipeline(DiffusionPipeline):
    """What pipelines of images and of videos share: conditions, settings, sampling, decoding.

    Args:
        tokenizer: turns ids into images.
        generator: predicts ids.
        vocabulary: `visar.data.vocabulary.Vocabulary.to_dict()`: names of labels and words; None for a model whose
            classes have numbers only.
        defaults: sampling settings used where a call gives none: sampler, temperature, top_k, top_p, and
            guidance_scale or guidance (a dict of the fields of `Guidance`). Also text_encoder, for models with
            `caption_width`: what `load_text_encoder` takes; it is loaded at the first prompt.

    Attributes:
        offload: whether tokenizer and text encoder wait on the CPU and are moved to the generator's device for their
            part only; see `enable_offload`.
        deterministic: "batch": on a GPU, an image is the same bits whatever batch it is made in; "auto": in float32
            only; "off": never. See docs/seeds.md for what it costs.

    Raises:
        ValueError: unknown default settings, or parts that do not fit each other.
    """

    model_cpu_offload_seq = "generator->tokenizer"
    tokenizer: Any
    generator: Any
    _callback_tensor_inputs = ["tokens"]

    def __init__(
        self,
        tokenizer: ModelMixin,
        generator: ModelMixin,
        vocabulary: dict | None = None,
        defaults: dict | None = None,
    ) -> None:
        super().__init__()
        check_defaults({} if defaults is None else defaults, None if generator is None else len(generator.block_sizes))
        if tokenizer is not None and generator is not None:
            check_parts(tokenizer, generator)
        self.register_modules(tokenizer=tokenizer, generator=generator)
        self.register_to_config(vocabulary=vocabulary, defaults=defaults or {})
        self.vocabulary = None if vocabulary is None else read_vocabulary(vocabulary)
        if self.vocabulary is not None and generator is not None:
            check_vocabulary(self.vocabulary, generator)
        self.runtime = Runtime()
        self.offload = False
        self.deterministic = "auto"
        self._text_encoder: TextEncoder | None = None
        self._helpers = Helpers()

    def __repr__(self) -> str:
        """A few lines; diffusers would print the whole configuration, all words of the vocabulary among it."""
        return summary(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        tokenizer: ModelMixin | None = None,
        generator: ModelMixin | None = None,
        torch_dtype: str | torch.dtype | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool | None = None,
        **others: Any,
    ) -> Self:
        """A pipeline from a folder that `save_pretrained` wrote; `visar.load` also takes names of models.

        Not by diffusers' loader: that imports whatever modules a folder names. Here classes come from a table.

        Args:
            pretrained_model_name_or_path: the folder.
            tokenizer, generator: used instead of the folder's.
            torch_dtype, dtype: dtype of both parts, as torch has it or by name; None is float32.
            device_map: one device for all, such as "cpu" or "cuda:1"; None is the CPU.
            use_safetensors: None or True; there is no other format.
            local_files_only: any value; nothing is fetched.
            others: further arguments of diffusers' loader. None of them is taken here.

        Raises:
            ValueError: no such folder, one that is damaged or names other classes, or an argument that is not taken.
        """
        refused = {name: value for name, value in others.items() if value is not None and value is not False}
        refused |= {"use_safetensors": False} if use_safetensors is False else {}
        if refused:
            name, value = next(iter(refused.items()))
            raise ValueError(f"from_pretrained does not take {name}={value!r}; it reads safetensors of one folder")
        for name, given in (("torch_dtype", torch_dtype), ("dtype", dtype), ("device_map", device_map)):
            if not isinstance(given, str | torch.dtype | torch.device | None):
                raise ValueError(f"{name} {given!r}; give one for all parts, such as 'float32' or 'cpu'")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; visar.load also takes names of models (visar models)")
        device, kind = placement(device_map or "cpu", torch_dtype or dtype or torch.float32)
        parts = read_pipeline(folder, cls, tokenizer=tokenizer, generator=generator)
        for part in ("tokenizer", "generator"):
            _place(parts[part], device, kind)
        return cls(**parts)

    def save_pretrained(self, save_directory: str | os.PathLike, storage: Storage = "plain", **settings: Any) -> None:
        """Writes the pipeline to a folder, as diffusers does.

        Args:
            save_directory: folder.
            storage: "int8": the generator's matrices in 8 bits with a scale a row; "plain": in the dtype that they
                have. The tokenizer's have theirs.
            settings: see diffusers.

        Raises:
            ValueError: the generator is quantised, another storage, or the folder cannot be written.
        """
        check_storage(storage)
        if any(scaled(layer) for layer in quantized_layers(self.generator).values()):
            raise ValueError("a quantised pipeline is not saved: save it as it was loaded, and quantise after loading")
        folder = Path(save_directory)
        check_folder_output(folder)
        with writing(folder):
            super().save_pretrained(save_directory, **settings)
            if storage == "int8":
                pack_folder(self.generator, folder / "generator")
            for part in ("tokenizer", "generator"):
                finish_folder(folder / part)

    # ---------------------------------------------------------------------------------------------------- the memory
    def enable_offload(self) -> None:
        """Moves tokenizer and text encoder to the CPU, from where they are fetched for their part only.

        Results stay the same; every batch takes the time of moving the tokenizer to the GPU and back.
        """
        self.offload = True
        nn.Module.to(self.tokenizer, "cpu")
        if self._text_encoder is not None:
            nn.Module.to(self._text_encoder.model, "cpu")

    @property
    def device(self) -> torch.device:
        """Where images are made."""
        return self.generator.device if self.offload else super().device

    def _invariant(self) -> bool:
        """Whether images are to be the same bits in every batch, by kernels that can be had here."""
        check_deterministic(self.deterministic)
        # Of the last part, the head: the first ones may stay float32, and all of them take milliseconds to look at.
        parts = list(self.generator.children())
        weight = next((parts[-1] if parts else self.generator).parameters())
        return wanted(self.deterministic, weight.dtype, weight.device)

    def _fetched(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        return borrowed(module, self._execution_device) if self.offload else contextlib.nullcontext()

    @torch.no_grad()
    def find_batch_size(self, most: int, *, limit_bytes: int | None = None, **settings: Any) -> int:
        """The largest power of two <= most that fits into memory.

        On a GPU, batches of 1 and 2 are run and measured (raster models: three steps and the decoder), then the batch
        that should fit; graphs and caches of earlier calls are freed. On a CPU the need is computed from shapes, and
        no more than 64 images are made at a time.

        Args:
            most: bound, such as the number of images.
            limit_bytes: memory beside the weights; None is 90 % of a GPU's free memory, or half of a CPU's.
            settings: arguments of `sampling_settings`, and sampler_options.

        Raises:
            ValueError: most < 1, or not even one image fits.
        """
        chosen = self.sampling_settings(**{k: v for k, v in settings.items() if k != "sampler_options"})
        chosen["sampler_options"] = settings.get("sampler_options")
        return batching.find_batch_size(self, most, limit_bytes, chosen)

    # ------------------------------------------------------------------------------------------------- the steps
    def prepare_seeds(
        self,
        num_images: int,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> list[int]:
        """One seed an image: given, counted up from `seed`, drawn from `generator` (one for all, or one each), or
        random.

        Raises:
            ValueError: more than one source, or another number of seeds than images.
        """
        return seeds_of_images(num_images, seed, seeds, generator)

    def prepare_condition(
        self,
        seeds: list[int],
        class_labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        attributes: dict[str, str] | None = None,
    ) -> tuple[Condition, list[str]]:
        """Conditions of the images and their descriptions; what is not given is drawn from the distribution
        of the training set.

        Args:
            seeds: one per image; unspecified conditions are functions of it.
            class_labels: one class per image, by number or by name.
            prompts: one per image, for models conditioned on words or captions.
            attributes: further labels by name, such as {"style": "noto"}.

        Raises:
            ValueError: unknown names (with the nearest ones), or a kind of condition that the model does not take.
            ImportError: the model's text encoder is not installed.
        """
        config = self.generator.config
        takes_class = bool(config["num_classes"])
        takes_words = bool(config["word_vocab_size"])
        if config.get("caption_width"):
            if class_labels is not None or attributes:
                raise ValueError("this model is conditioned on captions: give a prompt, no class or attributes")
            return self._captions(seeds, prompts)
        if class_labels is not None and not takes_class:
            raise ValueError("this model is conditioned on words: give a prompt, not a class")
        if prompts is not None and (takes_class or not takes_words):
            raise ValueError("this model is conditioned on classes: give a class, not a prompt")
        if self.vocabulary is None:
            return numbered_classes(config["num_classes"], seeds, class_labels, attributes)
        uniform = Noise(seeds).uniform(Use.CONDITION, 0)
        condition, descriptions = self.vocabulary.complete(
            uniform,
            class_labels=class_labels,
            prompts=prompts,
            attributes=attributes,
            with_labels=takes_class or bool(config["attributes"]),
            with_words=takes_words,
        )
        if config["attributes"] and not takes_class:
            null_BA = torch.tensor(self.vocabulary.null_labels).expand(len(seeds), -1)
            labels_BA = null_BA if condition.labels_BA is None else condition.labels_BA
            condition = replace(condition, labels_BA=labels_BA[:, 1:])
        return condition, descriptions

    def _captions(self, seeds: list[int], prompts: Sequence[str] | None) -> tuple[Condition, list[str]]:
        name = self.config["defaults"].get("text_encoder")
        if name is None:
            raise ValueError(
                "this model reads features of a text encoder: pass condition=Condition(text_BTC=..., text_mask_BT=...)"
            )
        if prompts is None:
            if self.vocabulary is None:
                raise ValueError("this model is conditioned on captions: give a prompt")
            prompts = self.vocabulary.draw_texts(Noise(seeds).uniform(Use.CONDITION, 0))
        device = self._execution_device
        if self._text_encoder is None:
            self._text_encoder = load_text_encoder(name, "cpu" if self.offload else device)
        length = self.generator.config["caption_length"]
        with self._fetched(self._text_encoder.model):
            return encode_captions(prompts, self._text_encoder, length=length, device=device), list(prompts)

    def sampling_settings(
        self,
        *,
        sampler: str | None = None,
        guidance_scale: float | Guidance | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """Arguments of `sample_tokens`: what is given, else the model's defaults, else the neutral values.

        Raises:
            ValueError: an unknown sampler, or a setting that it does not have or take.
        """
        general = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return chosen_settings(self.config["defaults"], sampler, guidance_scale, general)

    def check_settings(self, *, sampler_options: dict[str, Any] | None = None, **settings: Any) -> None:
        """Finds before anything is drawn what would not: the sampler's name, its options and what it needs of the
        generator, guidance, temperature, top_k and top_p. Drafters and followers are loaded for it and freed again.

        Args:
            sampler_options: settings of the sampler.
            settings: arguments of `sampling_settings`.

        Raises:
            ValueError: the first thing that does not fit.
        """
        chosen = self.sampling_settings(**settings)
        entry, options = self._options(Helpers(), chosen.pop("sampler"), sampler_options)
        entry.check(self.generator, chosen | options)

    def _options(
        self, helpers: Helpers, sampler: str, given: dict[str, Any] | None
    ) -> tuple[SamplerEntry, dict[str, Any]]:
        entry, options = resolve_options(sampler, given, self.generator, helpers)
        if "codebook" in entry.settings() and options.get("neighbours") is None:
            options.setdefault("codebook", self.tokenizer.codebook.to(self._execution_device))
        return entry, options

    def sample_tokens(
        self,
        condition: Condition,
        seeds: list[int],
        *,
        sampler: str = "ancestral",
        sampler_options: dict[str, Any] | None = None,
        callback: Callback | None = None,
        **settings: Any,
    ) -> SampleOutput:
        """Tokens of a batch; see the sampler's own docstring for its options.

        Options may be text, as on the command line; a drafter is then what `load_drafter` takes, and followers are
        names or folders of pipelines.

        Args:
            condition, seeds: condition and seeds of the images.
            sampler, sampler_options: see `visar samplers`.
            callback: called in the sampler's loop; True ends the sampling, see `Callback`.
            settings: guidance, and those of temperature, top_k and top_p that the sampler has.

        Raises:
            ValueError: unknown sampler or option, or a generator that lacks what the sampler needs.
        """
        entry, options = self._options(self._helpers, sampler, sampler_options)
        noise, condition = Noise(seeds, self._execution_device), condition.to(self._execution_device)
        arguments = settings | options
        with batch_invariant(self._invariant()):
            return entry.load()(
                self.generator, condition, noise=noise, runtime=self.runtime, callback=callback, **arguments
            )

    def decode(self, tokens: Tensor) -> Tensor:
        """Images in [-1, 1], float32 [B, 3, H, W], of token ids [B, N], or of what `SampleOutput.latent` is."""
        with self._fetched(self.tokenizer):
            # A graph reads weights where they were: of no use to a tokenizer that moves.
            runtime = EAGER if self.offload else self.runtime
            decoded = decode_tokens(self.tokenizer, tokens, runtime=runtime, invariant=self._invariant())
        return decoded.float().clamp(-1.0, 1.0)


def summary(pipeline: Any) -> str:
    """Generator, tokenizer, conditions and default settings of an `ImagePipeline`, one per line."""
    generator, config = pipeline.generator, pipeline.generator.config
    dtype = str(generator.dtype).removeprefix("torch.")
    settings = [f"{name} {value}" for name, value in pipeline.config["defaults"].items()]
    lines = {
        "generator": f"{type(generator).__name__}, {generator.num_parameters() / 1e6:,.1f} M parameters, "
        f"{generator.num_tokens} tokens of {config['vocab_size']:,} codes, {generator.device}, {dtype}",
        "tokenizer": type(pipeline.tokenizer).__name__,
        "conditions": ", ".join(_conditions(pipeline)) or "none",
        "defaults": ", ".join(settings) or "none",
    }
    return "\n".join([type(pipeline).__name__, *(f"  {name:<12}{text}" for name, text in lines.items())])


def _conditions(pipeline: Any) -> list[str]:
    config, vocabulary = pipeline.generator.config, pipeline.vocabulary
    if config.get("caption_width"):
        return ["captions"]
    found = [f"class ({config['num_classes']:,})"] if config["num_classes"] else []
    names = ["attribute"] * len(config["attributes"]) if vocabulary is None else list(vocabulary.attributes)[1:]
    found += [f"{name} ({count:,})" for name, count in zip(names, config["attributes"], strict=False)]
    return [*found, "words"] if config["word_vocab_size"] else found
