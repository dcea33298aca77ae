"""Training of generators on a tokenizer's ids: cross-entropy of each token given those before it and the condition.

Source: LlamaGen's recipe, arXiv 2406.06525 section 3.2 (AdamW 0.9 / 0.95, weight decay 0.05, clipping, dropout 0.1,
conditions dropped with 0.1). Differs from it: a learning rate that falls, averaged weights, the model of the best
validation is kept, and classes are drawn with weight n^-power.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.data.clip_sets import load_clip_set
from visar.data.images import ImageSet, load_image_set
from visar.generators.families import find_family
from visar.generators.training import GeneratorFamily, Objective
from visar.io.pictures import to_uint8
from visar.pipelines.components import load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.text_encoder import load_text_encoder
from visar.pipelines.video import VideoPipeline
from visar.samplers.index import find_sampler
from visar.tokenizers.decoding import decode_tokens, decoder_noise
from visar.train.building import build_generator, image_side, in_dtype, load_initial
from visar.train.captions import encode_image_captions
from visar.train.images import select_conditions
from visar.train.log import Sheet
from visar.train.loop import Task, TrainResult, run_task
from visar.train.options import TrainGenerator
from visar.train.randomness import Draw
from visar.train.run import Run
from visar.train.self_correction import self_correction
from visar.train.teacher import load_teacher, teacher_probs
from visar.train.token_batches import TokenBatches, TokenSplit, load_tokens
from visar.train.token_cache import TokenCache


class GeneratorTask(Task):
    """Steps and measurements of `train_generator`.

    Args:
        run: this process.
        options: options of the run.
        tokenizer: whose ids they are, frozen, on the device.
        images: with the conditions that the model reads.
        cache: ids of all of them.
    """

    select, higher_is_better = "nll", False

    def __init__(self, run: Run, options: TrainGenerator, tokenizer: Any, images: ImageSet, cache: TokenCache) -> None:
        self.run, self.options, self.tokenizer = run, options, tokenizer
        self.vocabulary = images.vocabulary
        encoder = None if options.text_encoder == "none" else load_text_encoder(options.text_encoder, run.device)
        caption_width = 0 if encoder is None else encoder.width
        self.family = find_family(options.family, tokenizer.layout)
        model: Any = build_generator(self.family, tokenizer, images.vocabulary, options, caption_width)
        if options.initial is not None:
            load_initial(model, options.initial, options.initial_layers)
        self.teacher = load_teacher(options.teacher, model, run.device) if options.teacher else None
        self.objective = find_phase(self.family, options)(model, tokenizer.layout, options, run.device)
        captions = null_text_TC = None
        if encoder is not None:
            captions = encode_image_captions(images, encoder, model.config["caption_length"], run.device)
            null_text_TC = model.cls_embedding.uncond_embedding.clone()
        self.batches = TokenBatches(
            run,
            images,
            cache,
            with_class=options.class_condition,
            captions=captions,
            null_text_TC=null_text_TC,
            class_balance=options.class_balance,
            label_dropout=options.label_dropout,
            class_dropout=options.class_dropout,
            attribute_dropout=options.attribute_dropout,
            word_dropout=options.word_dropout,
            word_omission=options.word_omission,
            token_means=options.token_means,
        )
        part = run.add_part(
            model,
            options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            optimizer=options.optimizer,
        )
        self.parts = {"model": part}
        generator = run.random.generator(0, Draw.SUBSET, shared=True)
        order = torch.randperm(len(self.batches.train), generator=generator, device=run.device)
        self.train_subset = order[: len(self.batches.validation)]

    # -------------------------------------------------------------------------------------------------------- steps
    def step(self, step: int) -> dict[str, Tensor]:
        drawn = self.batches.draw(step)

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            tokens_BL, condition = self.batches.part(drawn, step, part)
            generator = self.run.random.generator(step, Draw.MASK, part=part)
            target = tokens_BL
            if largest := self.options.self_correction:
                tokens_BL, target = self_correction(self.tokenizer.quantizer, tokens_BL, largest, generator)
            if self.teacher is not None:
                target = teacher_probs(self.teacher, tokens_BL, condition)
            loss = self.objective.loss(self.parts["model"].call, tokens_BL, target, condition, generator)
            return loss, {"loss": loss}

        return self.run.descend(self.parts["model"], step, losses)

    # ------------------------------------------------------------------------------------------------- measurements
    def validate(self, model: Any) -> dict[str, float]:
        everything = torch.arange(len(self.batches.validation), device=self.run.device)
        nll, null_nll = self._measure(model, self.batches.validation, everything)
        train_nll, train_null_nll = self._measure(model, self.batches.train, self.train_subset)
        return {"nll": nll, "null_nll": null_nll, "train_nll": train_nll, "train_null_nll": train_null_nll}

    def _measure(self, model: Any, images: TokenSplit, index_N: Tensor) -> tuple[float, float]:
        """Mean loss with the conditions and with none; what is random in it is the same in every call."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.run.device)
        generator = self.run.random.generator(0, Draw.MASK, shared=True)
        for index_B in index_N.split(2 * self.run.part_size):
            given = images.condition(index_B)
            with self.run.autocast():
                conditions = (given, model.null_condition(given))
                losses = self.objective.measure(model, images.tokens(index_B), conditions, generator)
            totals += torch.stack(losses).double() * len(index_B)
        nll, null_nll = (totals / len(index_N)).tolist()
        return nll, null_nll

    def sheets(self, model: Any) -> dict[str, Sheet]:
        """Samples at conditions of training images, the same conditions and seeds on every sheet."""
        frames = self.tokenizer.config.get("num_frames", 0)
        count = min(self.options.sample_images, len(self.train_subset))
        count = max(1, count // frames) if frames else count
        condition = self.batches.train.condition(self.train_subset[:count])
        seeds = image_seeds(self.options.seed, count)
        out = find_sampler(self.family.sampler).load()(
            model,
            condition,
            noise=Noise(seeds, self.run.device),
            guidance=Guidance(self.options.sample_guidance),
        )
        noise = decoder_noise(self.tokenizer, seeds, self.run.device)
        made_BCHW = decode_tokens(self.tokenizer, out.tokens, noise=noise)
        return {"samples": Sheet(to_uint8(made_BCHW.flatten(0, -4)), columns=frames or 12)}

    def save_model(self, model: Any, folder: Path) -> None:
        defaults: dict[str, Any] = {
            "sampler": self.family.sampler,
            "guidance_scale": self.options.sample_guidance,
        }
        if self.options.text_encoder != "none":
            defaults["text_encoder"] = self.options.text_encoder
        saved = in_dtype(model, self.options.save_dtype)
        self.objective.finish(saved)
        kind = VideoPipeline if self.tokenizer.layout.arrangement == "box" else ImagePipeline
        pipeline: Any = kind(
            in_dtype(self.tokenizer, self.options.save_dtype),
            saved,
            vocabulary=self.vocabulary.to_dict(),
            defaults=defaults,
        )
        pipeline.save_pretrained(folder)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state


def find_phase(family: GeneratorFamily, options: TrainGenerator) -> type[Objective]:
    """The objective of the phase that options name.

    Raises:
        ValueError: the family has no such phase, a later phase without a model of the one before, or a teacher where
            targets cannot be its distributions.
    """
    if options.phase not in family.phases:
        raise ValueError(f"phase {options.phase!r}; {family.model.__name__} is trained in {', '.join(family.phases)}")
    if options.phase != next(iter(family.phases)) and options.initial is None:
        raise ValueError(f"phase {options.phase} needs initial: the model of the phase before")
    objective = family.phases[options.phase]
    if options.teacher and not objective.takes_distributions:
        raise ValueError(f"a teacher gives distributions of whole images: not for phase {options.phase}")
    return objective


def train_generator(options: TrainGenerator) -> TrainResult:
    """Trains a generator; see `TrainGenerator`. Its model/ is a pipeline with the weights of the best validation.

    Raises:
        ValueError: an option outside its range, data or a tokenizer that cannot be read or used, or a folder that
            holds another run.
        ImportError: a package is missing.
    """
    if options.text_encoder != "none":
        if options.words != "none" or options.attributes:
            raise ValueError(f"text_encoder {options.text_encoder} excludes words and attributes")
        options = replace(options, class_condition=False)
    if options.initial_layers and options.initial is None:
        raise ValueError("initial_layers needs initial: the model that has them")
    if not 0.0 <= options.self_correction <= 1.0:
        raise ValueError(f"self_correction {options.self_correction}; allowed: 0 ... 1")
    run = Run(options)
    tokenizer: Any = load_tokenizer(options.tokenizer, device=run.device, dtype="float32")
    tokenizer.requires_grad_(False)
    find_phase(find_family(options.family, tokenizer.layout), options)
    if options.self_correction and tokenizer.layout.arrangement != "scales":
        raise ValueError("self_correction is for a tokenizer over scales")
    side = image_side(tokenizer)
    if tokenizer.layout.arrangement == "box":
        everything = load_clip_set(options.data, tokenizer.config["num_frames"], side, options.skip_unreadable)
    else:
        everything = load_image_set(options.data, side, options.skip_unreadable)
    attributes = () if options.attributes is None and not options.class_condition else options.attributes
    images = select_conditions(everything, attributes, options.words != "none")
    cache = load_tokens(run, options, images, tokenizer)
    return run_task(run, GeneratorTask(run, options, tokenizer, images, cache))
