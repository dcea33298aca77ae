"""Options of `visar train`: those of every run, and of a tokenizer's, a generator's and a drafter's."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from visar.core.checks import BELOW_ONE, COUNT, COUNT_OR_OFF, SEED, SHARE, WEIGHT, Range, check_ranges
from visar.generators import families as generators
from visar.tokenizers import families as tokenizers
from visar.train.schedule import Schedule, check_schedule

OptimizerName = Literal["adamw", "muon"]
AugmentKind = Literal["none", "drawings", "photographs"]
PerceptualKind = Literal["lite0", "lpips"]
if TYPE_CHECKING:
    GeneratorName: TypeAlias = str
    TokenizerName: TypeAlias = str
else:
    GeneratorName = Literal["auto", *generators.FAMILIES]
    TokenizerName = Literal[*tokenizers.FAMILIES]

# Options that do not change what a step computes, so a run may go on with others.
FREE_OPTIONS = frozenset(
    {"out", "log_every", "sample_every", "save_every", "keep_checkpoints", "resume", "max_minutes", "tracker"}
)


_RATE = Range(0, 1000, open_low=True)

# Of the options of all recipes, by name; schedules have further checks.
RANGES = {
    "steps": COUNT,
    "batch_size": Range(1, 2**20),
    "gradient_accumulation": Range(1, 2**20),
    "learning_rate": _RATE,
    "warmup_steps": COUNT_OR_OFF,
    "decay_steps": COUNT_OR_OFF,
    "final_fraction": SHARE,
    "clip_norm": WEIGHT,
    "ema_decay": BELOW_ONE,
    "seed": SEED,
    "log_every": COUNT,
    "validate_every": COUNT_OR_OFF,
    "sample_every": COUNT_OR_OFF,
    "save_every": COUNT_OR_OFF,
    "keep_checkpoints": COUNT,
    "max_minutes": Range(0, 10**7),
    "weight_decay": Range(0, 1000),
    "image_size": Range(1, 16_384),
    "codebook_size": Range(1, 2**20),
    "codebook_decay": BELOW_ONE,
    "commitment_weight": WEIGHT,
    "codebook_weight": WEIGHT,
    "revive_every": COUNT_OR_OFF,
    "revive_below": WEIGHT,
    "revive_until": SHARE,
    "l1_weight": WEIGHT,
    "l2_weight": WEIGHT,
    "gradient_weight": WEIGHT,
    "perceptual_weight": WEIGHT,
    "adversarial_weight": WEIGHT,
    "adversarial_start": COUNT_OR_OFF,
    "adversarial_learning_rate": _RATE,
    "adversarial_layers": Range(1, 16),
    "adversarial_maximum": WEIGHT,
    "variants": Range(1, 65_536),
    "width": Range(1, 65_536),
    "num_layers": Range(1, 1024),
    "dropout": BELOW_ONE,
    "label_dropout": SHARE,
    "class_dropout": SHARE,
    "attribute_dropout": SHARE,
    "word_dropout": SHARE,
    "word_omission": SHARE,
    "class_balance": Range(0, 100),
    "scale_weights": WEIGHT,
    "self_correction": SHARE,
    "initial_layers": Range(0, 1023),
    "sample_images": Range(1, 4096),
    "sample_guidance": Range(0, 1000),
    "num_right": Range(1, 1024),
    "law_weight": WEIGHT,
    "input_noise": WEIGHT,
    "offset_decay": SHARE,
    "guidance_scale": Range(0, 1000),
}
# A drafter's are the model's where they are 0.
_SIZES = {"num_heads": Range(1, 1024), "hidden_width": Range(1, 2**20)}
_SIZES_OR_MODEL = {"num_heads": Range(0, 1024), "hidden_width": Range(0, 2**20)}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the loop, the optimiser's schedule and the folder of results."""

    out: Path
    """Folder of the run: model/ (what it is for), metrics.jsonl, samples/, checkpoints/, logs/ (TensorBoard)."""
    skip_unreadable: bool = False
    """Leave pictures that cannot be read out, and name them, instead of stopping before the first step."""
    initial: Path | None = None
    """Model of the same architecture to start from, for fine-tuning: a folder (a run's model/) or an embedded name."""
    steps: int = 4000
    """Optimiser steps; schedules depend on it."""
    batch_size: int = 128
    """Images of a step, over all processes."""
    gradient_accumulation: int = 1
    """Parts that a process cuts its share of a step into, to need less memory."""
    learning_rate: float = 4e-4
    """Of AdamW, at its highest."""
    schedule: Schedule = "cosine"
    """After the warm-up: constant; cosine; or wsd: constant, then linear over the last decay_steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""
    decay_steps: int = 0
    """Steps in which it falls at the end, for schedule wsd."""
    final_fraction: float = 0.0
    """Share of the learning rate that is left at the end."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 = off."""
    ema_decay: float = 0.999
    """Of the moving average of weights, which is what is measured and saved; lower in early steps; 0 = no average."""
    seed: int = 0
    """Of everything random in the run."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """bf16: matrix products and convolutions in bfloat16; weights stay float32."""
    compile: bool = False
    """torch.compile of the trained module: about a minute at the start, faster steps on a GPU."""
    tf32: bool = True
    """TF32 for what stays float32 on a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU of the process, if there is one."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl, which hold means since the line before."""
    validate_every: int = 500
    """Steps between validations; 0 = at the end only."""
    sample_every: int = 1000
    """Steps between sheets of pictures; 0 = at the end only."""
    save_every: int = 1000
    """Steps between checkpoints; 0 = at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best model by validation is kept in model/ besides."""
    resume: Literal["auto", "restart"] = "auto"
    """auto: go on from the newest checkpoint in `out`, if there is one. restart: remove them and begin anew."""
    max_minutes: float = 0.0
    """Stop with a checkpoint after this time, to be gone on from; 0 = no limit."""
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    """Where curves and sheets go besides the folder."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer(RunOptions):
    """Trains a tokenizer on images, and writes it in the form that `visar.load_tokenizer` reads."""

    data: Path
    """Images: emoji64.zip, a folder with a subfolder a class, a parquet file or an .npz."""
    image_size: int | None = None
    """Side of the images in pixels; needed for images that may be of any size."""
    kind: TokenizerName | None = None
    """One grid of codes, or a pyramid of them for next-scale generators; the preset's when not given, else vq."""
    preset: str | None = None
    """Architecture; the smallest of the kind when not given: vq-4-64, msvq-4-64."""
    model_options: str = "{}"
    """Constructor arguments that differ from the preset's, as JSON, such as '{"base_channels": 48}'."""
    codebook_size: int | None = None
    """Codes; those of the preset when not given."""
    codebook_update: Literal["gradient", "ema"] = "ema"
    """Codes follow the moving average of their latents, or the gradient of the codebook loss."""
    codebook_decay: float = 0.99
    """Of the moving averages of codes and their uses."""
    commitment_weight: float = 0.25
    """Weight of the loss that keeps latents near their codes."""
    codebook_weight: float = 1.0
    """Weight of the loss that moves codes; codes that follow a moving average have no gradient from it."""
    revive_every: int = 20
    """Steps between revivals of unused codes; 0 = never."""
    revive_below: float = 0.2
    """Uses a step below which a code counts as unused."""
    revive_until: float = 0.8
    """Share of the run in which codes are revived."""
    l1_weight: float = 1.0
    """Weight of the mean absolute error."""
    l2_weight: float = 2.0
    """Weight of the mean squared error."""
    gradient_weight: float = 0.5
    """Weight of the multi-scale L1 of pixel differences."""
    perceptual_weight: float = 0.3
    """Weight of the perceptual distance; 0 = off."""
    perceptual: PerceptualKind = "lite0"
    """lite0: EfficientNet-Lite0, from a package; lpips: VGG-16, weights are fetched."""
    adversarial_weight: float = 0.0
    """Weight of the discriminator's loss; 0 = off."""
    adversarial_start: int = 0
    """Step at which the discriminator sets in."""
    adversarial_learning_rate: float = 1e-4
    """Of the discriminator."""
    adversarial_layers: int = 3
    """Its convolutions of stride 2; each doubles the side of the patches that it judges."""
    adversarial_spectral: bool = True
    """Spectral norm in the discriminator, else group norm."""
    adversarial_adaptive: bool = False
    """Scale its loss by the ratio of gradient norms at the decoder's last layer (VQGAN)."""
    adversarial_maximum: float = 10.0
    """Largest such ratio."""
    decoder_only: bool = False
    """Train the decoder alone, from `initial`: the ids of every picture stay what they are."""
    weight_decay: float = 0.0
    """Of matrices and convolutions."""
    augment: AugmentKind = "photographs"
    """drawings: shifts, mirror images and slight rescalings on white; photographs: random crops and mirror images."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights in model/."""


@dataclass(frozen=True, kw_only=True)
class TrainGenerator(RunOptions):
    """Trains a generator on a tokenizer's ids, and writes both as a pipeline that `visar.load` reads."""

    data: Path
    """Images: emoji64.zip, a folder with a subfolder a class, a parquet file or an .npz."""
    tokenizer: str
    """A folder that `visar train tokenizer` wrote (its model/), or the name of an embedded tokenizer."""
    tokens: Path | None = None
    """File of ids to read, or to write if it does not exist; without it ids are made anew."""
    variants: int = 32
    """Variants of every image, made once: the image itself and augmented ones; 1 = no augmentation."""
    augment: AugmentKind = "photographs"
    """drawings: shifts, mirror images and slight rescalings on white; photographs: random crops and mirror images."""
    family: GeneratorName = "auto"
    """Kind of generator. auto: the first of them that fits the tokenizer's tokens, so raster for ids on one grid and
    next_scale for ids over scales; hmar: hierarchical masked, over scales."""
    phase: Literal["next_scale", "refinement"] = "next_scale"
    """Of family hmar: first everything but the refinement parts; then these alone, from the first run's `initial`."""
    width: int = 256
    """Of the transformer."""
    num_layers: int = 9
    """Of the transformer."""
    num_heads: int = 4
    """Of the transformer."""
    hidden_width: int = 704
    """Of its feed-forward parts."""
    model_options: str = "{}"
    """Further constructor arguments as JSON."""
    class_condition: bool = True
    """Condition on the class."""
    attributes: tuple[str, ...] | None = None
    """Label columns to condition on besides; when not given: all of the data with class_condition, else none."""
    words: Literal["none", "sum", "prefix"] = "none"
    """Condition on words too: by the mean of their vectors, or one by one before the image."""
    text_encoder: str = "none"
    """Condition on the captions alone, through a frozen encoder: minilm, flan-t5-xl or a folder (raster only). The
    class is not read then, whatever class_condition says."""
    dropout: float = 0.1
    """On the input, and after every attention and feed-forward part."""
    label_dropout: float = 0.1
    """Chance that an image loses all its conditions."""
    class_dropout: float = 0.0
    """Chance that it loses the class, besides."""
    attribute_dropout: float = 0.1
    """The same for every attribute."""
    word_dropout: float = 0.1
    """The same for the words."""
    word_omission: float = 0.0
    """Chance of every single word of a caption to be left out."""
    class_balance: float = 0.5
    """Images are drawn with weight n^-power, n the size of their class: 0 = as they are, 1 = all classes alike."""
    scale_weights: tuple[float, ...] = ()
    """Weights of the loss of a token of every scale, coarse to fine; empty = all alike (hmar: its own)."""
    self_correction: float = 0.0
    """Over scales: largest share of an image's codes that are replaced before finer scales, whose targets then make up
    for them; 0 = off. In both phases of family hmar."""
    initial_layers: tuple[int, ...] = ()
    """Layers of `initial` to start from, for a model of so many layers and the same widths; empty = all of them."""
    teacher: str = ""
    """A generator of the same ids and conditions, by name or folder: its laws are learnt instead of the ids."""
    weight_decay: float = 0.05
    """Of matrices."""
    optimizer: OptimizerName = "adamw"
    """muon: matrices of the blocks by Muon, the rest by AdamW; learns more from a step, which takes longer."""
    sample_images: int = 48
    """Pictures of a sheet."""
    sample_guidance: float = 2.0
    """Guidance of its pictures; 1.0 = off."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights in model/."""


@dataclass(frozen=True, kw_only=True)
class TrainDrafter(RunOptions):
    """Trains a drafter for a raster model; `--sampler.drafter OUT/model` samples with it."""

    data: Path
    """The images that the model was trained on."""
    target: str
    """The model: an embedded or official name, or a pipeline's folder."""
    kind: Literal["eagle", "heads"] = "eagle"
    """eagle: a layer that predicts the next hidden vector; heads: one small head for each of the next tokens."""
    tokens: Path | None = None
    """File of ids to read, or to write if it does not exist; without it ids are made anew."""
    variants: int = 32
    """Variants of every image, made once: the image itself and augmented ones; 1 = no augmentation."""
    augment: AugmentKind = "photographs"
    """drawings: shifts, mirror images and slight rescalings on white; photographs: random crops and mirror images."""
    num_heads: int = 0
    """Attention heads of an eagle drafter; 0 = the model's."""
    hidden_width: int = 0
    """Of its feed-forward part; 0 = the model's."""
    num_right: int = 5
    """Offsets of heads: the most drafts one after another."""
    law_weight: float = 1.0
    """Weight of the cross-entropy beside the hidden vectors' own loss, for eagle (in its paper 0.1)."""
    input_noise: float = 0.2
    """Width of the noise on the hidden vectors that an eagle drafter reads, to bear its own slips; 0 = off."""
    offset_decay: float = 0.8
    """Weight of an offset's loss relative to the one before, for heads."""
    label_dropout: float = 0.15
    """Chance that an image loses all its conditions."""
    weight_decay: float = 0.0
    """Of matrices."""
    guidance_scale: float | None = None
    """At which acceptance is measured; the model's own when not given."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights in model/."""


def check_run_options(options: RunOptions, num_processes: int) -> None:
    """Checks the numbers among the options of a recipe, and what processes and schedule ask for.

    Raises:
        ValueError: an option outside its range.
    """
    check_ranges(options, RANGES | (_SIZES_OR_MODEL if isinstance(options, TrainDrafter) else _SIZES))
    parts = num_processes * options.gradient_accumulation
    if options.batch_size % parts:
        raise ValueError(
            f"batch_size {options.batch_size} must be a multiple of {num_processes} processes x "
            f"{options.gradient_accumulation} accumulated parts"
        )
    check_schedule(options.schedule, options.steps, options.warmup_steps, options.decay_steps, options.final_fraction)
