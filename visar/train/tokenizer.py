"""Training of all tokenizers: reconstruction, perceptual and adversarial losses, and those of the bottleneck.

Source: VQGAN, arXiv 2012.09841, in LlamaGen's form, arXiv 2406.06525 section 3.1 (l2-normalised lookup, perceptual and
hinge losses); multi-scale: arXiv 2404.02905. Moving-average codebook and revival of unused codes:
visar/tokenizers/quantizer.py. Continuous latents: arXiv 2112.10752, with its KL weight.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visar.data.clip_sets import load_clip_set
from visar.data.images import ImageSet, load_image_set
from visar.evaluate.reconstruction import psnr
from visar.io.pictures import to_uint8
from visar.pipelines.components import read_json
from visar.tokenizers.families import find_family
from visar.tokenizers.training import Meter
from visar.train.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from visar.train.building import in_dtype, initial_folder, json_options, load_initial
from visar.train.curves import draw_codebook_use
from visar.train.images import PictureSplit, PixelsAhead, take_split
from visar.train.log import Sheet
from visar.train.loop import Task, TrainResult, run_task
from visar.train.options import TrainTokenizer
from visar.train.perceptual import gradient_l1, load_perceptual
from visar.train.randomness import Draw, IndexDraws, step_seed
from visar.train.run import Run


def build_tokenizer(options: TrainTokenizer, image_size: int) -> nn.Module:
    """A tokenizer for images or clips of a size, with fresh weights from the run's seed.

    Raises:
        ValueError: an unknown preset, or arguments that the architecture refuses.
    """
    family, preset = find_family(options.kind, options.preset)
    given = json_options(options.model_options)
    if options.codebook_size is not None:
        given["codebook_size"] = options.codebook_size
    arguments = family.arguments(family.presets[preset], given, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(options.seed, 0, Draw.INITIAL))
        try:
            return family.model(**arguments)
        except TypeError as error:
            raise ValueError(f"preset {preset} does not take these model_options: {error}") from error


class TokenizerTask(Task):
    """Steps and measurements of `train_tokenizer`."""

    select, higher_is_better = "psnr", True

    def __init__(self, run: Run, options: TrainTokenizer, images: ImageSet) -> None:
        self.run, self.options, self.num_frames = run, options, images.num_frames
        self.pictures = pictures = take_split(images, "train", options.augment, run.device)
        self.validation = validation = take_split(images, "val", "none", run.device)
        self.draws = IndexDraws(len(pictures), None, run.device)
        self.ahead = PixelsAhead(pictures, lambda step: run.own(self.index(step)))
        family, _ = find_family(options.kind, options.preset)
        model = build_tokenizer(options, images.image_size).to(run.device)
        if options.initial is not None:
            load_initial(model, options.initial)
        if options.decoder_only:
            for name in family.frozen:
                model.get_submodule(name).requires_grad_(False)
        # Convolutions in three dimensions have another format.
        if run.device.type == "cuda" and all(weight.ndim <= 4 for weight in model.parameters()):
            model.to(memory_format=torch.channels_last)
        self.bottleneck = family.bottleneck(model, options)
        if options.initial is not None:
            self.bottleneck.start(read_json(initial_folder(options.initial) / "config.json"))
        self.parts = {
            "model": run.add_part(model, options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay)
        }
        if options.adversarial_weight:
            self.parts["discriminator"] = run.add_part(
                PatchDiscriminator(num_layers=options.adversarial_layers, spectral=options.adversarial_spectral),
                options.adversarial_learning_rate,
                betas=(0.5, 0.9),
                weight_decay=0.0,
            )
        self.perceptual = None
        if options.perceptual_weight:
            bf16 = run.device.type == "cuda" and options.mixed_precision == "bf16"
            self.perceptual = load_perceptual(
                options.perceptual, run.device, torch.bfloat16 if bf16 else torch.float32
            )
            if options.compile:
                self.perceptual.compile()
        generator = run.random.generator(0, Draw.SUBSET, shared=True)
        order = torch.randperm(len(pictures), generator=generator, device=run.device)
        self.train_subset = order[: len(validation)]

    # -------------------------------------------------------------------------------------------------------- steps
    def index(self, step: int) -> Tensor:
        """Numbers of the images of a step, of all processes."""
        return self.draws.draw(self.options.batch_size, self.run.random.generator(step, Draw.DATA, shared=True))

    def step(self, step: int) -> dict[str, Tensor]:
        options, random = self.options, self.run.random
        index_B, pixels = self.index(step), self.ahead.take(step).split(self.run.part_size)
        adversarial = options.adversarial_weight > 0 and step >= options.adversarial_start
        seen: list[tuple[Tensor, Any]] = []

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            generator = random.generator(step, Draw.AUGMENT, part=part)
            image_BCHW = self.pictures.prepare(pixels[part], self.run.share(index_B, part), generator)
            output = self.parts["model"].call(image_BCHW)
            image_BCHW = _as_images(image_BCHW)
            seen.append((image_BCHW, output))
            return self._losses(image_BCHW, output, adversarial)

        scalars = self.run.descend(self.parts["model"], step, losses)
        if adversarial:
            scalars |= self._train_discriminator(step, seen)
        outputs = [output for _, output in seen]
        return scalars | self.bottleneck.after_step(outputs, step, lambda: random.generator(step, Draw.REVIVE))

    def _losses(self, image_BCHW: Tensor, output: Any, adversarial: bool) -> tuple[Tensor, dict[str, Tensor]]:
        options, made_BCHW = self.options, output.image_BCHW.float()
        difference = made_BCHW - image_BCHW
        square_B = difference.square().mean((1, 2, 3))
        loss = options.l1_weight * difference.abs().mean() + options.l2_weight * square_B.mean()
        own_loss, own_scalars = self.bottleneck.loss(output)
        loss = loss + own_loss
        scalars = {"psnr": (-10.0 * torch.log10(square_B.clamp(min=1e-10) / 4.0)).mean(), **own_scalars}
        if options.gradient_weight:
            loss = loss + options.gradient_weight * gradient_l1(made_BCHW, image_BCHW).mean()
        if self.perceptual is not None:
            scalars["perceptual"] = self.perceptual(made_BCHW, image_BCHW).mean()
            loss = loss + options.perceptual_weight * scalars["perceptual"]
        if adversarial:
            discriminator = self.parts["discriminator"].module.requires_grad_(False)
            scalars["adversarial"] = generator_loss(discriminator(output.image_BCHW))
            weight: Tensor | float = options.adversarial_weight
            if options.adversarial_adaptive:
                last_layer = self.parts["model"].module.decoder.conv_out.weight
                scalars["adaptive_weight"] = adaptive_weight(
                    loss, scalars["adversarial"], last_layer, options.adversarial_maximum
                )
                weight = weight * scalars["adaptive_weight"]
            loss = loss + weight * scalars["adversarial"]
            discriminator.requires_grad_(True)
        return loss, {"loss": loss, **scalars}

    def _train_discriminator(self, step: int, seen: list[tuple[Tensor, Any]]) -> dict[str, Tensor]:
        part = self.parts["discriminator"]

        def losses(index: int) -> tuple[Tensor, dict[str, Tensor]]:
            image_BCHW, output = seen[index]
            made_BCHW = output.image_BCHW.detach().to(image_BCHW.dtype)
            real_logits, fake_logits = part.call(torch.cat([image_BCHW, made_BCHW])).chunk(2)
            loss = discriminator_loss(real_logits, fake_logits)
            return loss, {"discriminator": loss}

        return {"discriminator": self.run.descend(part, step, losses)["discriminator"]}

    # ------------------------------------------------------------------------------------------------- measurements
    def validate(self, model: Any) -> dict[str, float]:
        everything = torch.arange(len(self.validation), device=self.run.device)
        meter = self.bottleneck.meter()
        values = self._measure(model, self.validation, everything, (meter,)) | meter.values()
        trained = self._measure(model, self.pictures, self.train_subset, ())
        return values | {f"train_{name}": value for name, value in trained.items()}

    def _measure(
        self, model: Any, pictures: PictureSplit, index_N: Tensor, meters: Sequence[Meter]
    ) -> dict[str, float]:
        ratios, distances = [], []
        for index_B in index_N.split(4 * self.run.part_size):
            image_BCHW = pictures.batch(index_B)
            with self.run.autocast():
                output = model(image_BCHW)
            for meter in meters:
                meter.update(output)
            image_BCHW = _as_images(image_BCHW)
            ratios.append(psnr(to_uint8(image_BCHW), to_uint8(output.image_BCHW)))
            if self.perceptual is not None:
                distances.append(self.perceptual(output.image_BCHW.float(), image_BCHW))
        values = {"psnr": float(torch.cat(ratios).mean())}
        return values | ({"perceptual": float(torch.cat(distances).mean())} if distances else {})

    def sheets(self, model: Any) -> dict[str, Sheet]:
        """Rows of images, or the frames of a clip each, and the rows of their reconstructions below them."""
        columns = self.num_frames or 12
        count = min(4 if self.num_frames else 4 * columns, len(self.validation))
        index = torch.linspace(0, len(self.validation) - 1, count, device=self.run.device).long()
        image_BCHW = self.validation.batch(index)
        with self.run.autocast():
            made_BCHW = model(image_BCHW).image_BCHW
        image_BCHW = _as_images(image_BCHW)
        rows = [
            row
            for pair in zip(image_BCHW.split(columns), made_BCHW.float().split(columns), strict=True)
            for row in pair
        ]
        return {"reconstruction": Sheet(to_uint8(torch.cat(rows)), columns)}

    def save_model(self, model: Any, folder: Path) -> None:
        batches = (self.pictures.batch(index_B) for index_B in self.train_subset.split(4 * self.run.part_size))
        self.bottleneck.finish(model, batches)
        in_dtype(model, self.options.save_dtype).save_pretrained(folder)

    def state_dict(self) -> dict[str, Tensor]:
        return self.bottleneck.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.bottleneck.load_state_dict(state)


def _as_images(image: Tensor) -> Tensor:
    """Images [B, C, H, W] as they are, and all frames of clips [B, T, C, H, W] as images."""
    return image.flatten(0, -4)


def _load_data(options: TrainTokenizer) -> ImageSet:
    """The run's images, or clips of as many frames as its model has.

    Raises:
        ValueError: see `load_image_set` and `load_clip_set`, or model_options with a number of frames that is none.
    """
    family, preset = find_family(options.kind, options.preset)
    if not family.clips:
        return load_image_set(options.data, options.image_size, options.skip_unreadable)
    frames = json_options(options.model_options).get("num_frames", family.presets[preset]["num_frames"])
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
        raise ValueError(f"num_frames {frames!r} of model_options; it must be a whole number >= 1")
    return load_clip_set(options.data, frames, options.image_size, options.skip_unreadable)


def train_tokenizer(options: TrainTokenizer) -> TrainResult:
    """Trains a tokenizer; see `TrainTokenizer`. Its model/ holds the averaged weights of the best validation PSNR;
    codebook-use.png shows how many codes every scale of a pyramid uses.

    Raises:
        ValueError: an option outside its range, data that cannot be read, or a folder that holds another run.
        ImportError: a package is missing.
    """
    if options.adversarial_adaptive and options.compile:
        raise ValueError("adversarial_adaptive takes gradients twice and excludes compile")
    run = Run(options)
    images = _load_data(options)
    if options.adversarial_weight and images.image_size >> options.adversarial_layers < 3:
        raise ValueError(
            f"adversarial_layers {options.adversarial_layers} are too many for images of {images.image_size} pixels"
        )
    if options.decoder_only and options.initial is None:
        raise ValueError("decoder_only needs initial, the tokenizer whose ids are to stay")
    result = run_task(run, TokenizerTask(run, options, images))
    if run.is_main:
        draw_codebook_use(options.out)
    return result
