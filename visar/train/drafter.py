"""Training of drafters for speculative sampling on a frozen raster model: EAGLE's layer, or heads of several offsets.

Sources: EAGLE, arXiv 2401.15077 section 4.2; Medusa, 2401.10774 section 2.2; the losses are in
visar/samplers/drafters/eagle.py. Conditions are left out at random, so that the drafter also serves the null half of
a guided batch.

B images, N tokens, D width, V codes, O offsets.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor

from visar.core.guidance import combine
from visar.core.interface import Features
from visar.data.images import ImageSet, load_image_set
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.pipelines.text_encoder import load_text_encoder
from visar.samplers.drafters.eagle import FeatureDrafter, feature_loss
from visar.samplers.drafters.heads import SpatialHeads, heads_loss, heads_predictions
from visar.samplers.drafters.interface import target_digest
from visar.train.building import image_side, in_dtype, load_initial
from visar.train.captions import CaptionTable, encode_image_captions
from visar.train.images import select_conditions
from visar.train.log import Sheet
from visar.train.loop import Task, TrainResult, run_task
from visar.train.options import TrainDrafter
from visar.train.randomness import Draw, step_seed
from visar.train.run import Part, Run
from visar.train.token_batches import TokenBatches, load_tokens
from visar.train.token_cache import TokenCache


@dataclass(frozen=True)
class Conditions:
    """What a pipeline's generator reads of an image set's conditions.

    Attributes:
        images: the set with the label columns and words that are read.
        with_class: whether the first column is.
        captions: features of a text encoder, read instead; None = none.
        null_text_TC: features that mean "not given".
    """

    images: ImageSet
    with_class: bool
    captions: CaptionTable | None
    null_text_TC: Tensor | None


def read_conditions(pipeline: ImagePipeline, everything: ImageSet, device: torch.device) -> Conditions:
    """The conditions of an image set that a raster pipeline's generator reads.

    Args:
        pipeline: with the generator.
        everything: the images with all their conditions.
        device: device of the features of captions.

    Raises:
        ValueError: the images have not the model's labels or words.
    """
    target: Any = pipeline.generator
    config, vocabulary = target.config, pipeline.vocabulary
    with_class = bool(config["num_classes"])
    names = () if vocabulary is None else tuple(vocabulary.attributes)[1:]
    images = select_conditions(everything, names, bool(config["word_vocab_size"]))
    if config["caption_width"]:
        encoder = load_text_encoder(pipeline.config["defaults"].get("text_encoder", "none"), device)
        captions = encode_image_captions(images, encoder, config["caption_length"], device)
        return Conditions(images, with_class, captions, target.cls_embedding.uncond_embedding.clone())
    ours = images.vocabulary
    sizes = ([config["num_classes"]] if with_class else []) + list(config["attributes"])
    known = list(ours.null_labels)[0 if with_class else 1 :]
    same = vocabulary is None or (vocabulary.attributes, vocabulary.words) == (ours.attributes, ours.words)
    if sizes != known or not same:
        raise ValueError(
            f"the labels and words of {everything.name} are not the model's: {known} values a label column and "
            f"{len(ours.words)} words, {sizes} and {config['word_vocab_size']} needed, of the same names"
        )
    return Conditions(images, with_class, None, None)


# --------------------------------------------------------------------------------------------------- kinds of drafters
class EagleKind:
    """One layer that predicts the target's next hidden vector."""

    def build(self, options: TrainDrafter, target: Any, shared: dict[str, Any]) -> Any:
        return FeatureDrafter(
            **shared,
            num_heads=options.num_heads or target.config["num_heads"],
            hidden_width=options.hidden_width or target.config["hidden_width"],
            prefix_length=target.prefix_length,
        )

    def loss(
        self, part: Part, target: Any, ids_BN: Tensor, hidden_BND: Tensor, options: TrainDrafter, random: Generator
    ) -> Tensor:
        uniform_BND = None
        if options.input_noise:
            uniform_BND = torch.rand(hidden_BND.shape, generator=random, device=hidden_BND.device)
        weight, noise = options.law_weight, options.input_noise
        return feature_loss(part.call, target, hidden_BND, ids_BN, uniform_BND, weight, noise)

    def predictions(self, model: Any, target: Any, ids_RN: Tensor, hidden_RND: Tensor) -> list[tuple[int, Tensor]]:
        return [(1, model(target.embed(ids_RN[:, :-1]), hidden_RND[:, :-1]))]


class HeadsKind:
    """Heads that predict hidden vectors several tokens ahead."""

    def build(self, options: TrainDrafter, target: Any, shared: dict[str, Any]) -> Any:
        return SpatialHeads(**shared, num_right=options.num_right)

    def loss(
        self, part: Part, target: Any, ids_BN: Tensor, hidden_BND: Tensor, options: TrainDrafter, random: Generator
    ) -> Tensor:
        return heads_loss(part.module, target, hidden_BND, options.offset_decay, call=part.call)

    def predictions(self, model: Any, target: Any, ids_RN: Tensor, hidden_RND: Tensor) -> list[tuple[int, Tensor]]:
        return list(heads_predictions(model, hidden_RND))


KINDS: dict[str, EagleKind | HeadsKind] = {"eagle": EagleKind(), "heads": HeadsKind()}
"""Drafters by the name of --kind: how one is built, its loss, and (offset, predicted hidden vectors from there on)."""


NAMES = ("top1", "acceptance")


def agreement(p_BXV: Tensor, q_BXV: Tensor) -> Tensor:
    """Sums over positions, [2]: whether the likeliest codes agree, and the chance sum min(p, q) to accept a draft."""
    same = (p_BXV.argmax(-1) == q_BXV.argmax(-1)).float()
    return torch.stack([same.sum(), torch.minimum(p_BXV, q_BXV).sum()])


class DrafterTask(Task):
    """Steps and measurements of `train_drafter`.

    Args:
        run: this process.
        options: options of the run.
        pipeline: with the frozen target, on the device.
        conditions: conditions of the image set.
        cache: ids of all images.
    """

    select, higher_is_better = "acceptance", True

    def __init__(
        self, run: Run, options: TrainDrafter, pipeline: ImagePipeline, conditions: Conditions, cache: TokenCache
    ) -> None:
        self.run, self.options, self.kind = run, options, KINDS[options.kind]
        self.target: Any = cast(Any, pipeline.generator)
        self.batches = TokenBatches(
            run,
            conditions.images,
            cache,
            with_class=conditions.with_class,
            captions=conditions.captions,
            null_text_TC=conditions.null_text_TC,
            label_dropout=options.label_dropout,
        )
        guidance = pipeline.sampling_settings(guidance_scale=options.guidance_scale)["guidance"]
        self.scale_N1 = torch.tensor(guidance.scales(self.target.num_tokens), device=run.device)[:, None]
        shared: dict[str, Any] = {name: self.target.config[name] for name in ("vocab_size", "grid", "width")}
        shared |= dict(target=options.target, target_digest=target_digest(self.target))
        drafter = self.kind.build(options, self.target, shared)
        drafter.reset_parameters(torch.Generator().manual_seed(step_seed(options.seed, 0, Draw.INITIAL)))
        if options.initial is not None:
            load_initial(drafter, options.initial)
        part = run.add_part(drafter, options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay)
        self.parts = {"model": part}

    def step(self, step: int) -> dict[str, Tensor]:
        drawn = self.batches.draw(step)

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            ids_BN, condition = self.batches.part(drawn, step, part)
            with torch.no_grad():
                hidden_BND = self.target.hidden(ids_BN, condition)
            random = self.run.random.generator(step, Draw.MASK, part=part)
            loss = self.kind.loss(self.parts["model"], self.target, ids_BN, hidden_BND, self.options, random)
            return loss, {"loss": loss}

        return self.run.descend(self.parts["model"], step, losses)

    # ------------------------------------------------------------------------------------------------- measurements
    def validate(self, model: Any) -> dict[str, float]:
        """top1: how often the drafter's likeliest code is the target's; acceptance: mean chance of a draft.

        Both with guidance and teacher forcing; for heads, means over offsets, and acceptance_K of each besides.
        """
        totals: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        images = self.batches.validation
        for index_B in torch.arange(len(images), device=self.run.device).split(self.run.part_size):
            ids_BN, given = images.tokens(index_B), images.condition(index_B)
            with self.run.autocast():
                rows = given.followed_by(self.target.null_condition(given))
                twice = torch.cat([ids_BN, ids_BN])
                hidden_RND = self.target.hidden(twice, rows)
                p_BNV = self._probs(hidden_RND, self.scale_N1)
                for offset, predicted_RXD in self.kind.predictions(model, self.target, twice, hidden_RND):
                    q_BXV = self._probs(predicted_RXD, self.scale_N1[offset:])
                    totals[offset] = totals.get(offset, 0.0) + agreement(p_BNV[:, offset:], q_BXV).double()
                    counts[offset] = counts.get(offset, 0) + q_BXV.shape[0] * q_BXV.shape[1]
        shares = {offset: (totals[offset] / counts[offset]).tolist() for offset in totals}
        found = {name: sum(share[i] for share in shares.values()) / len(shares) for i, name in enumerate(NAMES)}
        several = {f"acceptance_{offset}": share[1] for offset, share in shares.items()} if len(shares) > 1 else {}
        return found | several

    def _probs(self, hidden_RXD: Tensor, scale_X1: Tensor) -> Tensor:
        return torch.softmax(combine(self.target.output(hidden_RXD), scale_X1), dim=-1)

    def sheets(self, model: Any) -> dict[str, Sheet]:
        """None: a drafter makes no images of its own."""
        return {}

    def save_model(self, model: Any, folder: Path) -> None:
        in_dtype(model, self.options.save_dtype).save_pretrained(folder)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state


def train_drafter(options: TrainDrafter) -> TrainResult:
    """Trains a drafter; see `TrainDrafter`. Its model/ is what `load_drafter` reads.

    Raises:
        ValueError: an option outside its range, data or a model that cannot be read or used, or a folder that holds
            another run.
        ImportError: a package is missing.
    """
    if options.num_right < 1:
        raise ValueError(f"num_right {options.num_right}; it must be at least 1")
    run = Run(options)
    pipeline = load(options.target, device=run.device, dtype="float32")
    for part in (pipeline.tokenizer, pipeline.generator):
        part.requires_grad_(False)
    if not isinstance(pipeline.generator, Features):
        raise ValueError(f"{options.target} is a {type(pipeline.generator).__name__}; drafters are for raster models")
    everything = load_image_set(options.data, image_side(pipeline.tokenizer), options.skip_unreadable)
    conditions = read_conditions(pipeline, everything, run.device)
    cache = load_tokens(run, options, conditions.images, pipeline.tokenizer)
    return run_task(run, DrafterTask(run, options, pipeline, conditions, cache))
