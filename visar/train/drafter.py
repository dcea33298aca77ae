"""Training of drafters for speculative sampling on a frozen raster model: EAGLE's layer, or heads of several offsets.

Sources: EAGLE, arXiv 2401.15077 section 4.2; Medusa, 2401.10774 section 2.2; the losses are in
visar/samplers/drafters/eagle.py. Conditions are left out at random, so that the drafter also serves the null half of
a guided batch.

B images, N tokens, D width, V codes, O offsets.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import combine
from visar.data.images import ImageSet, load_image_set
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.pipelines.text_encoder import load_text_encoder
from visar.samplers.drafters.eagle import FeatureDrafter, feature_loss
from visar.samplers.drafters.heads import SpatialHeads, heads_loss, heads_predictions
from visar.samplers.drafters.interface import target_digest
from visar.train.building import image_side, in_dtype, load_initial
from visar.train.captions import encode_image_captions
from visar.train.conditions import ConditionDropout
from visar.train.images import AUGMENTATIONS, PictureSplit, select_conditions, take_split
from visar.train.log import Sheet
from visar.train.loop import Task, TrainResult, run_task
from visar.train.options import TrainDrafter
from visar.train.randomness import Draw, IndexDraws, step_seed
from visar.train.run import Run
from visar.train.token_cache import TokenCache, build_token_cache


class Conditions:
    """What a pipeline's generator reads of an image set's conditions.

    Args:
        pipeline: a raster model's.
        everything: the images with all their conditions.
        device: of the conditions.

    Raises:
        ValueError: the images have not the model's labels or words.
    """

    def __init__(self, pipeline: ImagePipeline, everything: ImageSet, device: torch.device) -> None:
        config, vocabulary = pipeline.generator.config, pipeline.vocabulary
        self.with_class, self.captions, self.null_text_TC = bool(config["num_classes"]), None, None
        names = () if vocabulary is None else tuple(vocabulary.attributes)[1:]
        self.images = select_conditions(everything, names, bool(config["word_vocab_size"]))
        if config["caption_width"]:
            encoder = load_text_encoder(pipeline.config["defaults"].get("text_encoder", "none"), device)
            self.captions = encode_image_captions(self.images, encoder, config["caption_length"], device)
            self.null_text_TC = pipeline.generator.cls_embedding.uncond_embedding.clone()
            return
        ours = self.images.vocabulary
        sizes = ([config["num_classes"]] if self.with_class else []) + list(config["attributes"])
        known = list(ours.null_labels)[0 if self.with_class else 1 :]
        same = vocabulary is None or (vocabulary.attributes, vocabulary.words) == (ours.attributes, ours.words)
        if sizes != known or not same:
            raise ValueError(
                f"the labels and words of {everything.name} are not the model's: {known} values a label column and "
                f"{len(ours.words)} words, {sizes} and {config['word_vocab_size']} needed, of the same names"
            )

    @property
    def table_sizes(self) -> tuple[int, ...]:
        """Values of every label column that is read."""
        return tuple(self.images.vocabulary.null_labels)[0 if self.with_class else 1 :]

    def of(self, pictures: PictureSplit, index_B: Tensor) -> Condition:
        """Conditions of some images of a split of `images`."""
        if self.captions is not None:
            return self.captions.condition(pictures.index_N[index_B])
        labels_BA = pictures.labels_NA[index_B][:, 0 if self.with_class else 1 :]
        words_BT = None if pictures.words_NT is None else pictures.words_NT[index_B]
        return Condition(labels_BA=labels_BA if labels_BA.shape[1] else None, words_BT=words_BT)


NAMES = ("top1", "acceptance")


def agreement(p_BXV: Tensor, q_BXV: Tensor) -> Tensor:
    """Sums over positions, [2]: whether the likeliest codes agree, and the chance sum min(p, q) to accept a draft."""
    same = (p_BXV.argmax(-1) == q_BXV.argmax(-1)).float()
    return torch.stack([same.sum(), torch.minimum(p_BXV, q_BXV).sum()])


class DrafterTask(Task):
    """Steps and measurements of `train_drafter`.

    Args:
        run: this process.
        options: of the run.
        pipeline: with the frozen target, on the device.
        conditions: of the image set.
        cache: ids of all images.
    """

    select, higher_is_better = "acceptance", True

    def __init__(
        self, run: Run, options: TrainDrafter, pipeline: ImagePipeline, conditions: Conditions, cache: TokenCache
    ) -> None:
        self.run, self.options, self.conditions = run, options, conditions
        self.target: Any = pipeline.generator
        images = conditions.images
        self.pictures = take_split(images, "train", "none", run.device)
        self.validation = take_split(images, "val", "none", run.device)
        self.ids_NKL = cache.ids_NKL[self.pictures.index_N.cpu()].to(run.device)
        self.validation_ids_NL = cache.ids_NKL[self.validation.index_N.cpu(), 0].to(run.device)
        self.draws = IndexDraws(len(self.pictures), None, run.device)
        guidance = pipeline.sampling_settings(guidance_scale=options.guidance_scale)["guidance"]
        self.scale_N1 = torch.tensor(guidance.scales(self.target.num_tokens), device=run.device)[:, None]
        drafter = self._build()
        drafter.reset_parameters(torch.Generator().manual_seed(step_seed(options.seed, 0, Draw.INITIAL)))
        if options.initial is not None:
            load_initial(drafter, options.initial)
        part = run.add_part(drafter, options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay)
        self.parts = {"model": part}
        self.dropout = ConditionDropout(
            conditions.table_sizes,
            together=options.label_dropout,
            label_rates=[0.0] * len(conditions.table_sizes),
            word_rate=0.0,
            null_text_TC=conditions.null_text_TC,
            device=run.device,
        )

    def _build(self) -> Any:
        options, config = self.options, self.target.config
        shared: dict[str, Any] = {name: config[name] for name in ("vocab_size", "grid", "width")}
        shared |= dict(target=options.target, target_digest=target_digest(self.target))
        if options.kind == "heads":
            return SpatialHeads(**shared, num_right=options.num_right)
        return FeatureDrafter(
            **shared,
            num_heads=options.num_heads or config["num_heads"],
            hidden_width=options.hidden_width or config["hidden_width"],
            prefix_length=self.target.prefix_length,
        )

    def step(self, step: int) -> dict[str, Tensor]:
        options, random, part_of = self.options, self.run.random, self.parts["model"]
        generator = random.generator(step, Draw.DATA, shared=True)
        index_B = self.draws.draw(options.batch_size, generator)
        variant_B = torch.randint(self.ids_NKL.shape[1], index_B.shape, generator=generator, device=self.run.device)

        def losses(part: int) -> tuple[Tensor, dict[str, Tensor]]:
            own_B = self.run.share(index_B, part)
            ids_BN = self.ids_NKL[own_B, self.run.share(variant_B, part)].long()
            condition = self.conditions.of(self.pictures, own_B)
            condition = self.dropout(condition, random.generator(step, Draw.CONDITION, part=part))
            with torch.no_grad():
                hidden_BND = self.target.hidden(ids_BN, condition)
            if options.kind == "heads":
                heads, decay = part_of.module, options.offset_decay
                loss = heads_loss(heads, self.target, hidden_BND, decay, call=part_of.call)
            else:
                uniform_BND = None
                if options.input_noise:
                    draw = random.generator(step, Draw.MASK, part=part)
                    uniform_BND = torch.rand(hidden_BND.shape, generator=draw, device=self.run.device)
                weight, noise = options.law_weight, options.input_noise
                loss = feature_loss(part_of.call, self.target, hidden_BND, ids_BN, uniform_BND, weight, noise)
            return loss, {"loss": loss}

        return self.run.descend(part_of, step, losses)

    # ------------------------------------------------------------------------------------------------- measurements
    def validate(self, model: Any) -> dict[str, float]:
        """top1: how often the drafter's likeliest code is the target's; acceptance: mean chance of a draft.

        Both with guidance and teacher forcing; for heads, means over offsets, and acceptance_K of each besides.
        """
        totals: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for index_B in torch.arange(len(self.validation), device=self.run.device).split(self.run.part_size):
            ids_BN = self.validation_ids_NL[index_B].long()
            given = self.conditions.of(self.validation, index_B)
            with self.run.autocast():
                rows = given.followed_by(self.target.null_condition(given))
                twice = torch.cat([ids_BN, ids_BN])
                hidden_RND = self.target.hidden(twice, rows)
                p_BNV = self._law(hidden_RND, self.scale_N1)
                for offset, predicted_RXD in self._predictions(model, twice, hidden_RND):
                    q_BXV = self._law(predicted_RXD, self.scale_N1[offset:])
                    totals[offset] = totals.get(offset, 0.0) + agreement(p_BNV[:, offset:], q_BXV).double()
                    counts[offset] = counts.get(offset, 0) + q_BXV.shape[0] * q_BXV.shape[1]
        shares = {offset: (totals[offset] / counts[offset]).tolist() for offset in totals}
        found = {name: sum(share[i] for share in shares.values()) / len(shares) for i, name in enumerate(NAMES)}
        several = {f"acceptance_{offset}": share[1] for offset, share in shares.items()} if len(shares) > 1 else {}
        return found | several

    def _law(self, hidden_RXD: Tensor, scale_X1: Tensor) -> Tensor:
        return torch.softmax(combine(self.target.output(hidden_RXD), scale_X1), dim=-1)

    def _predictions(self, model: Any, ids_RN: Tensor, hidden_RND: Tensor) -> list[tuple[int, Tensor]]:
        """(offset, predictions of the hidden vectors from that position on)."""
        if self.options.kind == "eagle":
            return [(1, model(self.target.embed(ids_RN[:, :-1]), hidden_RND[:, :-1]))]
        return list(heads_predictions(model, hidden_RND))

    def sheets(self, model: Any) -> dict[str, Sheet]:
        """None: a drafter makes no pictures of its own."""
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
    if not callable(getattr(pipeline.generator, "hidden", None)):
        raise ValueError(f"{options.target} is a {type(pipeline.generator).__name__}; drafters are for raster models")
    everything = load_image_set(options.data, image_side(pipeline.tokenizer), options.skip_unreadable)
    conditions = Conditions(pipeline, everything, run.device)
    with run.accelerator.main_process_first(), run.autocast():
        cache = build_token_cache(
            conditions.images,
            pipeline.tokenizer,
            options.tokens,
            variants=options.variants,
            augmentation=AUGMENTATIONS[options.augment] if options.variants > 1 else None,
            seed=options.seed,
            device=run.device,
        )
    return run_task(run, DrafterTask(run, options, pipeline, conditions, cache))
