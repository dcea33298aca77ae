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
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.data.images import ImageSet, load_image_set
from visar.generators.hierarchical_masked import random_mask, refinement_loss, scale_weights
from visar.io.pictures import to_uint8
from visar.pipelines.components import load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.text_encoder import load_text_encoder
from visar.samplers.ancestral import sample_ancestral
from visar.train.building import build_generator, image_side, in_dtype, json_options, load_initial
from visar.train.captions import encode_image_captions
from visar.train.conditions import ConditionDropout
from visar.train.images import AUGMENTATIONS, PictureSplit, select_conditions, take_split
from visar.train.log import Sheet
from visar.train.loop import Task, TrainResult, run_task
from visar.train.options import TrainGenerator
from visar.train.randomness import Draw, IndexDraws, balanced_weights, step_seed
from visar.train.run import Run
from visar.train.self_correction import self_correction
from visar.train.teacher import laws, load_teacher
from visar.train.token_cache import TokenCache, build_token_cache


def token_loss(logits_BLV: Tensor, target: Tensor, weight_L: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of ids, or cross-entropy to laws; nats a token, float32.

    Args:
        logits_BLV: conditionals.
        target: ids int64 [B, L], or laws float32 [B, L, V].
        weight_L: relative weights of the positions; None = all alike.
    """
    loss_M = functional.cross_entropy(logits_BLV.float().flatten(0, 1), target.flatten(0, 1), reduction="none")
    loss_L = loss_M.unflatten(0, logits_BLV.shape[:2]).mean(0)
    return loss_L.mean() if weight_L is None else (loss_L * weight_L).sum() / weight_L.sum()


def position_weights(scales: tuple[tuple[int, int], ...], weights: tuple[float, ...]) -> Tensor | None:
    """Weight of every position, float32 [L], from one a scale for each of its tokens; None where none is given.

    Raises:
        ValueError: another number of weights than scales, or one that is negative.
    """
    if not weights:
        return None
    if len(weights) != len(scales) or min(weights) < 0 or max(weights) <= 0:
        raise ValueError(f"scale_weights {weights}; needed: {len(scales)} numbers >= 0, not all 0")
    return torch.cat(
        [torch.full((height * width,), weight) for (height, width), weight in zip(scales, weights, strict=True)]
    )


class GeneratorTask(Task):
    """Steps and measurements of `train_generator`.

    Args:
        run: this process.
        options: of the run.
        tokenizer: whose ids they are, frozen, on the device.
        images: with the conditions that the model reads.
        cache: ids of all of them.
    """

    select, higher_is_better = "nll", False

    def __init__(self, run: Run, options: TrainGenerator, tokenizer: Any, images: ImageSet, cache: TokenCache) -> None:
        self.run, self.options, self.tokenizer = run, options, tokenizer
        self.vocabulary = images.vocabulary
        self.pictures = pictures = take_split(images, "train", "none", run.device)
        self.validation = validation = take_split(images, "val", "none", run.device)
        self.ids_NKL = cache.ids_NKL[pictures.index_N.cpu()].to(run.device)
        self.validation_ids_NL = cache.ids_NKL[validation.index_N.cpu(), 0].to(run.device)
        weight_N = balanced_weights(pictures.labels_NA[:, 0].cpu(), options.class_balance)
        self.draws = IndexDraws(len(pictures), weight_N, run.device)
        encoder = None if options.text_encoder == "none" else load_text_encoder(options.text_encoder, run.device)
        model: Any = build_generator(
            tokenizer,
            images.vocabulary,
            width=options.width,
            num_layers=options.num_layers,
            num_heads=options.num_heads,
            hidden_width=options.hidden_width,
            dropout=options.dropout,
            class_condition=options.class_condition,
            words=options.words,
            caption_width=0 if encoder is None else encoder.width,
            family=options.family,
            model_options=json_options(options.model_options),
            seed=step_seed(options.seed, 0, Draw.INITIAL),
        )
        if options.initial is not None:
            load_initial(model, options.initial, options.initial_layers)
        self.refining = options.phase == "refinement"
        self.teacher = load_teacher(options.teacher, model, run.device) if options.teacher else None
        if options.family == "hmar":
            model.set_phase(options.phase)
        self.captions = null_text_TC = None
        if encoder is not None:
            self.captions = encode_image_captions(images, encoder, model.config["caption_length"], run.device)
            null_text_TC = model.cls_embedding.uncond_embedding.clone()
        part = run.add_part(
            model,
            options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
            optimizer=options.optimizer,
        )
        self.parts = {"model": part}
        weight_L = position_weights(tokenizer.layout.scales, options.scale_weights)
        if weight_L is None and options.family == "hmar":
            weight_L = scale_weights(model.block_sizes)
        self.weight_L = None if weight_L is None else weight_L.to(run.device)
        self.loss = torch.compile(token_loss) if options.compile else token_loss
        first = 0 if options.class_condition else 1
        sizes = images.vocabulary.null_labels
        self.dropout = ConditionDropout(
            sizes[first:],
            together=options.label_dropout,
            label_rates=([options.class_dropout] + [options.attribute_dropout] * (len(sizes) - 1))[first:],
            word_rate=options.word_dropout,
            omit_rate=options.word_omission,
            null_text_TC=null_text_TC,
            device=run.device,
        )
        generator = run.random.generator(0, Draw.SUBSET, shared=True)
        order = torch.randperm(len(pictures), generator=generator, device=run.device)
        self.train_subset = order[: len(validation)]

    # -------------------------------------------------------------------------------------------------------- steps
    def condition(self, pictures: PictureSplit, index_B: Tensor) -> Condition:
        """What the model reads of the conditions of images."""
        if self.captions is not None:
            return self.captions.condition(pictures.index_N[index_B])
        labels_BA = pictures.labels_NA[index_B]
        words_BT = None if pictures.words_NT is None else pictures.words_NT[index_B]
        if not self.options.class_condition:
            labels_BA = labels_BA[:, 1:]
        return Condition(labels_BA=labels_BA if labels_BA.shape[1] else None, words_BT=words_BT)

    def step(self, step: int) -> dict[str, Tensor]:
        options, random = self.options, self.run.random
        generator = random.generator(step, Draw.DATA, shared=True)
        index_B = self.draws.draw(options.batch_size, generator)
        variant_B = torch.randint(self.ids_NKL.shape[1], index_B.shape, generator=generator, device=self.run.device)

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            own_B = self.run.share(index_B, part)
            ids_BL = self.ids_NKL[own_B, self.run.share(variant_B, part)].long()
            generator = random.generator(step, Draw.CONDITION, part=part)
            condition = self.dropout(self.condition(self.pictures, own_B), generator)
            history_BL = ids_BL
            generator = random.generator(step, Draw.MASK, part=part)
            if options.self_correction:
                history_BL, ids_BL = self_correction(
                    self.tokenizer.quantizer, ids_BL, options.self_correction, generator
                )
            if self.refining:
                masked_BL = random_mask(self.parts["model"].module.block_sizes, generator)
                logits_BLV = self.parts["model"].call(history_BL, condition, masked_BL, ids_BL)
                loss = refinement_loss(logits_BLV, ids_BL, masked_BL)
            else:
                logits_BLV = self.parts["model"].call(history_BL, condition)
                target = ids_BL if self.teacher is None else laws(self.teacher, history_BL, condition)
                loss = self.loss(logits_BLV, target, self.weight_L)
            return loss, {"loss": loss}

        return self.run.descend(self.parts["model"], step, losses)

    # ------------------------------------------------------------------------------------------------- measurements
    def validate(self, model: Any) -> dict[str, float]:
        everything = torch.arange(len(self.validation), device=self.run.device)
        nll, null_nll = self._measure(model, self.validation, self.validation_ids_NL, everything)
        train_nll, train_null_nll = self._measure(model, self.pictures, self.ids_NKL[:, 0], self.train_subset)
        return {"nll": nll, "null_nll": null_nll, "train_nll": train_nll, "train_null_nll": train_null_nll}

    def _measure(self, model: Any, pictures: PictureSplit, ids_NL: Tensor, index_N: Tensor) -> tuple[float, float]:
        """Mean loss with the conditions and with none: of all tokens, or of masked ones, the same in every call."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.run.device)
        masks = self.run.random.generator(0, Draw.MASK, shared=True)
        for index_B in index_N.split(2 * self.run.part_size):
            ids_BL = ids_NL[index_B].long()
            given = self.condition(pictures, index_B)
            masked_BL = random_mask(model.block_sizes, masks) if self.refining else None
            for i, condition in enumerate((given, model.null_condition(given))):
                with self.run.autocast():
                    if masked_BL is None:
                        loss = token_loss(model(ids_BL, condition), ids_BL)
                    else:
                        loss = refinement_loss(model(ids_BL, condition, masked_BL), ids_BL, masked_BL)
                totals[i] += loss.double() * len(index_B)
        nll, null_nll = (totals / len(index_N)).tolist()
        return nll, null_nll

    def sheets(self, model: Any) -> dict[str, Sheet]:
        """Samples at conditions of training images, the same conditions and seeds on every sheet."""
        count = min(self.options.sample_images, len(self.train_subset))
        condition = self.condition(self.pictures, self.train_subset[:count])
        out = sample_ancestral(
            model,
            condition,
            noise=Noise(image_seeds(self.options.seed, count), self.run.device),
            guidance=Guidance(self.options.sample_guidance),
        )
        return {"samples": Sheet(to_uint8(self.tokenizer.decode(out.tokens)), columns=12)}

    def save_model(self, model: Any, folder: Path) -> None:
        defaults: dict[str, Any] = {"guidance_scale": self.options.sample_guidance}
        if self.captions is not None:
            defaults["text_encoder"] = self.options.text_encoder
        saved = in_dtype(model, self.options.save_dtype)
        if self.options.family == "hmar" and not self.refining:
            saved.begin_refinement()
        pipeline: Any = ImagePipeline(
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
    if options.phase == "refinement" and (options.family != "hmar" or options.initial is None):
        raise ValueError("phase refinement is for family hmar, and needs initial: the model of the first phase")
    if options.initial_layers and options.initial is None:
        raise ValueError("initial_layers needs initial: the model that has them")
    if not 0.0 <= options.self_correction <= 1.0:
        raise ValueError(f"self_correction {options.self_correction}; allowed: 0 ... 1")
    if options.teacher and options.phase == "refinement":
        raise ValueError("a teacher is for laws of whole images: not for phase refinement")
    run = Run(options)
    tokenizer: Any = load_tokenizer(options.tokenizer, device=run.device, dtype="float32")
    tokenizer.requires_grad_(False)
    if options.self_correction and tokenizer.layout.kind != "scales":
        raise ValueError("self_correction is for a tokenizer over scales")
    everything = load_image_set(options.data, image_side(tokenizer), options.skip_unreadable)
    attributes = () if options.attributes is None and not options.class_condition else options.attributes
    images = select_conditions(everything, attributes, options.words != "none")
    with run.accelerator.main_process_first(), run.autocast():
        cache = build_token_cache(
            images,
            tokenizer,
            options.tokens,
            variants=options.variants,
            augmentation=AUGMENTATIONS[options.augment] if options.variants > 1 else None,
            seed=options.seed,
            device=run.device,
        )
    return run_task(run, GeneratorTask(run, options, tokenizer, images, cache))
