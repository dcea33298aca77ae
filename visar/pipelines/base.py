"""What pipelines of images and of videos share."""

import contextlib
import inspect
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from diffusers import ModelMixin

# Type checkers take diffusers' lazy name for the stand-in that it has where torch is missing.
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.interface import Callback, GeneratorModel, TokenizerModel, TokenLayout
from visar.core.noise import Noise, Use
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.io.files import check_folder_output, finish_folder
from visar.io.formats import mark_pipeline, settings_of
from visar.kernels.invariance import batch_invariant, check_deterministic, wanted
from visar.layers.packable import Storage, check_storage, pack_folder
from visar.layers.quantize import quantized_layers, scaled
from visar.pipelines import memory as batching
from visar.pipelines.components import _place, find_folder, placement, read_pipeline
from visar.pipelines.fitting import (
    check_codes,
    check_copy,
    check_defaults,
    check_hooks,
    check_medium,
    check_parts,
    check_vocabulary,
    codes_of,
    read_vocabulary,
)
from visar.pipelines.memory import borrowed
from visar.pipelines.publishing import check_repository, model_card, publish
from visar.pipelines.requests import numbered_classes, seeds_of_images
from visar.pipelines.sampling import Helpers, chosen_settings, resolve_options
from visar.pipelines.text_encoder import TextEncoder, encode_captions, load_text_encoder
from visar.samplers.index import SAMPLERS, SamplerEntry, find_sampler
from visar.tokenizers.decoding import decode_tokens, decoder_noise

_INSTEAD = (
    "it moves layer after layer in forward, which decoding does not call. Use enable_model_cpu_offload(), which moves "
    "one model at a time, enable_offload(), which moves all but the generator, or quantize of visar.load"
)


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
        codes: some entries of the codebook of the tokenizer that the generator was trained with, see `codes_of`; None
            is that of the tokenizer given.

    Attributes:
        offload: whether tokenizer and text encoder wait on the CPU and are moved to the generator's device for their
            part only; see `enable_offload`.
        deterministic: "batch": on a GPU, an image is the same bits whatever batch it is made in; "auto": in float32
            only; "off": never. See docs/seeds.md for what it costs.

    Raises:
        ValueError: unknown default settings, or parts that do not fit each other.
    """

    tokenizer: TokenizerModel
    generator: GeneratorModel
    _callback_tensor_inputs = ["tokens"]
    _of_clips = False

    def __init__(
        self,
        tokenizer: ModelMixin | TokenizerModel,
        generator: ModelMixin | GeneratorModel,
        vocabulary: dict | None = None,
        defaults: dict | None = None,
        codes: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_defaults({} if defaults is None else defaults, None if generator is None else len(generator.block_sizes))
        self._checked: tuple[weakref.ref, ...] = ()
        self.register_modules(tokenizer=tokenizer, generator=generator)
        if codes is None and tokenizer is not None:
            codes = codes_of(tokenizer)
        self.register_to_config(vocabulary=vocabulary, defaults=defaults or {}, codes=codes)
        if tokenizer is not None and generator is not None:
            self._check_parts()
        self.vocabulary = None if vocabulary is None else read_vocabulary(vocabulary)
        if self.vocabulary is not None and generator is not None:
            check_vocabulary(self.vocabulary, generator)
        self.runtime = Runtime()
        self.offload = False
        self._onload_device: torch.device | None = None
        self.deterministic = "auto"
        self._interrupt = False
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
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        **others: Any,
    ) -> Self:
        """A pipeline from a folder that `save_pretrained` wrote, here or on the Hugging Face hub; `visar.load` also
        takes names of models.

        Not by diffusers' loader: that imports whatever modules a folder names. Here classes come from a table.

        Args:
            pretrained_model_name_or_path: the folder, or owner/model on the hub.
            tokenizer, generator: used instead of the folder's.
            torch_dtype, dtype: dtype of both parts, as torch has it or by name; None is float32.
            device_map: one device for all, such as "cpu" or "cuda:1"; None is the CPU.
            use_safetensors: None or True; there is no other format.
            variant: which weights to read, such as "fp16" for those that `save_pretrained(..., variant="fp16")` wrote;
                None is those without.
            revision: branch, tag or commit on the hub; None is the main branch.
            cache_dir, token: folder and access token of the hub's client; None is its own.
            local_files_only: True fetches nothing that is not in the cache.
            others: further arguments of diffusers' loader. None of them is taken here.

        Raises:
            ValueError: no such folder, one that is damaged or names other classes, a repository that cannot be
                fetched, or an argument that is not taken.
        """
        refused = {name: value for name, value in others.items() if value is not None and value is not False}
        refused |= {"use_safetensors": False} if use_safetensors is False else {}
        if refused:
            name, value = next(iter(refused.items()))
            raise ValueError(f"from_pretrained does not take {name}={value!r}; it reads safetensors of one folder")
        place = os.fspath(pretrained_model_name_or_path)
        options = dict(revision=revision, cache_dir=cache_dir, token=token, local_files_only=bool(local_files_only))
        for name, given in (("torch_dtype", torch_dtype), ("dtype", dtype), ("device_map", device_map)):
            if not isinstance(given, str | torch.dtype | torch.device | None):
                raise ValueError(f"{name} {given!r}; give one for all parts, such as 'float32' or 'cpu'")
        device, kind = placement(device_map or "cpu", torch_dtype or dtype or torch.float32)
        folder = find_folder(place, variant, **options)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; visar.load also takes names of models (visar models)")
        parts = read_pipeline(folder, cls, variant=variant, tokenizer=tokenizer, generator=generator)
        for part in ("tokenizer", "generator"):
            _place(parts[part], device, kind)
        try:
            check_copy(parts["tokenizer"], parts["generator"])
            return cls(**parts)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @classmethod
    def from_pipe(
        cls,
        pipeline: "TokenPipeline",
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> Self:
        """A pipeline of another one's models, vocabulary, settings and offloading; nothing is copied.

        Differs from diffusers: without a dtype the models keep theirs.

        Args:
            pipeline: of tokens, too.
            torch_dtype, dtype: cast the models, which are the other pipeline's too, to it; None leaves them.
            changes: arguments of the constructor that are to be others.

        Raises:
            ValueError: a pipeline of another kind, or changes that do not fit.
        """
        if not isinstance(pipeline, TokenPipeline):
            raise ValueError(f"from_pipe of a {type(pipeline).__name__}; needed: one of a tokenizer and a generator")
        parts = pipeline.components
        unknown = [name for name in changes if name not in parts]
        if unknown:
            raise ValueError(f"from_pipe does not take {unknown[0]}; choose from {', '.join(parts)}")
        made = cls(**{**parts, **changes})
        made.offload, made._onload_device = pipeline.offload, pipeline._onload_device
        made.deterministic, made._text_encoder = pipeline.deterministic, pipeline._text_encoder
        kind = torch_dtype or dtype
        if kind is not None:
            for part in (made.tokenizer, made.generator):
                _place(part, part.device, kind)
        return made

    @property
    def components(self) -> dict[str, Any]:
        """All that the pipeline is made of, as arguments of its constructor."""
        values = {name: self.config[name] for name in ("vocabulary", "defaults", "codes")}
        return {"tokenizer": self.tokenizer, "generator": self.generator, **values}

    def save_pretrained(self, save_directory: str | os.PathLike, storage: Storage = "plain", **settings: Any) -> None:
        """Writes the pipeline to a folder, as diffusers does.

        Args:
            save_directory: folder.
            storage: "int8": the generator's matrices in 8 bits with a scale a row; "plain": in the dtype that they
                have. The tokenizer's have theirs.
            settings: see diffusers.

        Raises:
            ValueError: the generator is quantised, another storage, or the folder cannot be written; push_to_hub.
        """
        check_storage(storage)
        if settings.pop("push_to_hub", False):
            raise ValueError("push_to_hub=True: call pipeline.push_to_hub(repository), which also writes a card")
        if self._quantised():
            raise ValueError("a quantised pipeline is not saved: save it as it was loaded, and quantise after loading")
        folder = Path(save_directory)
        check_folder_output(folder)
        super().save_pretrained(save_directory, **settings)
        if storage == "int8":
            pack_folder(self.generator, folder / "generator")
        for part in ("tokenizer", "generator"):
            finish_folder(folder / part)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        evaluation: str | os.PathLike | None = None,
        licence: str | None = None,
        about: str = "",
        storage: Storage = "plain",
        variant: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
    ) -> str:
        """Saves the pipeline to a repository of the Hugging Face hub, with a card; `visar.load(repo_id)` reads it.

        Args:
            repo_id: owner/model; made where there is none.
            evaluation: folder that `visar eval` wrote: the card takes its figures with their whole protocol.
            licence: of the weights, by the hub's name for it, such as "apache-2.0".
            about: further text of the card, in Markdown: data, training, limits.
            storage, variant: as of `save_pretrained`.
            private, token, commit_message, create_pr, revision: as huggingface_hub has them.

        Returns: address of the commit.

        Raises:
            ValueError: a name that is none, no right to it or no network, no evaluation there, or as of
                `save_pretrained`.
        """
        repository = check_repository(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.save_pretrained(folder, storage, variant=variant)
            place = None if evaluation is None else Path(evaluation)
            card = model_card(self, repository, folder, evaluation=place, licence=licence, about=about)
            (folder / "README.md").write_text(card, encoding="utf-8")
            return publish(
                folder,
                repository,
                private=private,
                token=token,
                message=commit_message or f"{type(self).__name__} saved by visar",
                create_pr=create_pr,
                revision=revision,
            )

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **settings: Any) -> None:
        """Writes model_index.json and what other loaders need, as a part of `save_pretrained`."""
        super().save_config(save_directory, push_to_hub, **settings)
        folder = Path(save_directory)
        parts = tuple(part for part in ("tokenizer", "generator") if (folder / part / "config.json").is_file())
        mark_pipeline(folder, type(self).__name__, parts)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **settings: Any) -> Any:
        """Constructor arguments among what model_index.json says; see diffusers."""
        return super().extract_init_dict(settings_of(config_dict), **settings)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        """What diffusers' loader checks the constructor's arguments by: nothing, as the constructor checks them.

        Older versions of it cannot read all annotations.
        """
        names = inspect.signature(cls.__init__).parameters
        return {name: (inspect.Signature.empty,) for name in names if name != "self"}

    # ---------------------------------------------------------------------------------------------------- the memory
    def enable_offload(self) -> None:
        """Moves tokenizer and text encoder to the CPU, from where they are fetched for their part only.

        Results stay the same; every batch takes the time of moving the tokenizer to the GPU and back.
        """
        self.offload = True
        nn.Module.to(self.tokenizer, "cpu")
        if self._text_encoder is not None:
            nn.Module.to(self._text_encoder.model, "cpu")

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Moves all parts to the CPU, from where each is fetched to a GPU for its part only: the generator while it
        samples, then the tokenizer. `remove_all_hooks` ends it.

        Results stay the same; every batch takes the time of moving both parts, and of capturing steps anew.

        Args:
            gpu_id: number of the GPU; None is that of `device`, or 0.
            device: its kind, such as "cuda"; None is the GPU that there is.

        Raises:
            ValueError: no such GPU, two numbers for it, or a quantised generator.
        """
        if self._quantised():
            raise ValueError("a quantised generator is not moved: use enable_offload, which moves the other parts")
        target, _ = placement(device)
        if device is None and target.type == "cpu":
            raise ValueError("enable_model_cpu_offload moves parts to a GPU, and torch sees none on this machine")
        if gpu_id is not None:
            if target.index not in (None, gpu_id):
                raise ValueError(f"gpu_id {gpu_id} and device {device!r} name two GPUs; give one")
            target, _ = placement(f"{target.type}:{gpu_id}")
        self.enable_offload()
        self.runtime.clear()
        nn.Module.to(self.generator, "cpu")
        self._onload_device = target

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, as it changes weights in hooks of forward, which decoding does not call.

        Raises:
            ValueError: always; it says what to use instead.
        """
        raise ValueError(f"sequential offload is not for this pipeline: {_INSTEAD}")

    def enable_group_offload(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, as it changes weights in hooks of forward, which decoding does not call.

        Raises:
            ValueError: always; it says what to use instead.
        """
        raise ValueError(f"group offload is not for this pipeline: {_INSTEAD}")

    def remove_all_hooks(self) -> None:
        """Ends offloading of any kind; parts stay where they are until they are moved."""
        self.offload, self._onload_device = False, None
        super().remove_all_hooks()

    @property
    def device(self) -> torch.device:
        """Where images are made."""
        if self._onload_device is not None:
            return self._onload_device
        return self.generator.device if self.offload else super().device

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    def _quantised(self) -> bool:
        return any(scaled(layer) for layer in quantized_layers(self.generator).values())

    def _invariant(self) -> bool:
        """Whether images are to be the same bits in every batch, by kernels that can be had here."""
        check_deterministic(self.deterministic)
        # Of the last part, the head: the first ones may stay float32, and all of them take milliseconds to look at.
        parts = list(self.generator.children())
        weight = next((parts[-1] if parts else self.generator).parameters())
        return wanted(self.deterministic, weight.dtype, self._execution_device)

    def _fetched(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """The context in which a part is where images are made."""
        waits = self.offload if module is not self.generator else self._onload_device is not None
        return borrowed(module, self._execution_device) if waits else contextlib.nullcontext()

    def _check_parts(self) -> None:
        """Checks that the parts fit each other, where one of them was replaced, and that nothing else moves them."""
        parts = (self.tokenizer, self.generator)
        check_hooks(*parts)
        if tuple(part() for part in self._checked) != parts:
            check_medium(self.tokenizer.layout, self._of_clips)
            check_parts(*parts)
            check_codes(self.tokenizer, self.config["codes"])
            self._checked = tuple(map(weakref.ref, parts))

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
            ValueError: unknown sampler or option, a generator that lacks what the sampler needs, a part that was
                replaced by one that does not fit, or first tokens for a lossy sampler.
        """
        self._check_parts()
        if condition.first_BK is not None and not find_sampler(sampler).exact:
            exact = ", ".join(name for name, entry in SAMPLERS.items() if entry.exact and entry.fits(self.generator))
            raise ValueError(f"sampler {sampler} is lossy and would not keep the first tokens; those that do: {exact}")
        noise, condition = Noise(seeds, self._execution_device), condition.to(self._execution_device)
        # A graph reads weights where they were: of no use to a generator that moves. Steps with first tokens are
        # others than those without.
        plain = self._onload_device is None and condition.first_BK is None
        runtime = self.runtime if plain else Runtime(self.runtime.capture)
        with self._fetched(self.generator), batch_invariant(self._invariant()):
            entry, options = self._options(self._helpers, sampler, sampler_options)
            arguments = settings | options
            return entry.load()(
                self.generator, condition, noise=noise, runtime=runtime, callback=callback, **arguments
            )

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of an image in pixels; None where the tokens have no places in it."""
        shape, factor = self.tokenizer.layout.shapes[-1], self.tokenizer.downsampling
        return None if len(shape) < 2 else (shape[-2] * factor, shape[-1] * factor)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the call by setting `_interrupt`, as in other pipelines of diffusers."""
        return self._interrupt

    def _latents(self, tokens: Tensor) -> Tensor:
        """What `decode` makes images of, float [B, C, h, w], of tokens or of what `SampleOutput.latent` is."""
        if tokens.ndim >= 4:
            return tokens
        with self._fetched(self.tokenizer):
            return self.tokenizer.latents(tokens)

    def decode(self, tokens: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Images in [-1, 1], float32 [B, 3, H, W], or clips [B, T, 3, H, W], of token ids [B, N], or of what
        `SampleOutput.latent` is.

        Args:
            tokens: of the images, or where `tokenizer.layout.previews` says so the first ones of each.
            seeds: of the images; needed where the tokenizer's decoder draws, not read elsewhere.

        Raises:
            ValueError: no seeds where they are needed, or tokens that do not fit.
        """
        self._check_parts()
        noise = decoder_noise(self.tokenizer, seeds, self._execution_device)
        with self._fetched(self.tokenizer):
            # A graph reads weights where they were: of no use to a tokenizer that moves.
            runtime = EAGER if self.offload else self.runtime
            decoded = decode_tokens(self.tokenizer, tokens, noise=noise, runtime=runtime, invariant=self._invariant())
        return decoded.float().clamp(-1.0, 1.0)


def summary(pipeline: Any) -> str:
    """Generator, tokenizer, conditions and default settings of an `ImagePipeline`, one per line."""
    generator = pipeline.generator
    dtype = str(generator.dtype).removeprefix("torch.")
    settings = [f"{name} {value}" for name, value in pipeline.config["defaults"].items()]
    lines = {
        "generator": f"{type(generator).__name__}, {generator.num_parameters() / 1e6:,.1f} M parameters, "
        f"{generator.num_tokens} tokens of {_kind_of_tokens(pipeline.tokenizer.layout)}, {generator.device}, {dtype}",
        "tokenizer": type(pipeline.tokenizer).__name__,
        "conditions": ", ".join(_conditions(pipeline)) or "none",
        "defaults": ", ".join(settings) or "none",
    }
    return "\n".join([type(pipeline).__name__, *(f"  {name:<12}{text}" for name, text in lines.items())])


def _kind_of_tokens(layout: TokenLayout) -> str:
    return f"{layout.vocab_size:,} codes" if layout.vocab_size else f"{layout.channels} numbers"


def _conditions(pipeline: Any) -> list[str]:
    config, vocabulary = pipeline.generator.config, pipeline.vocabulary
    if config.get("caption_width"):
        return ["captions"]
    found = [f"class ({config['num_classes']:,})"] if config["num_classes"] else []
    names = ["attribute"] * len(config["attributes"]) if vocabulary is None else list(vocabulary.attributes)[1:]
    found += [f"{name} ({count:,})" for name, count in zip(names, config["attributes"], strict=False)]
    return [*found, "words"] if config["word_vocab_size"] else found
