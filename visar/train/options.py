"""Options of `visar train`: those of every run, and of a tokenizer's, a generator's and a drafter's."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from visar.core.checks import BELOW_ONE, CODES, COUNT, COUNT_OR_OFF, SEED, SHARE, WEIGHT, Range, check_ranges
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

# Options that do not change what a step computes, so a run may resume with others.
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
    "codebook_size": CODES,
    "codebook_decay": BELOW_ONE,
    "commitment_weight": WEIGHT,
    "codebook_weight": WEIGHT,
    "kl_weight": WEIGHT,
    "flow_weight": WEIGHT,
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
    """Folder of the run: model/ (the trained model), metrics.jsonl, samples/, checkpoints/, logs/ (TensorBoard)."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and name them, instead of stopping before the first step."""
    initial: Path | None = None
    """Model of the same architecture to start from, for fine-tuning: a folder (a run's model/) or an embedded name."""
    steps: int = 4000
    """Number of optimiser steps; schedules span all of them."""
    batch_size: int = 128
    """Images per step, over all processes."""
    gradient_accumulation: int = 1
    """Number of parts that each process cuts its share of a batch into, to need less memory."""
    gradient_checkpointing: bool = False
    """Compute the activations of the model's blocks again in the backward pass instead of keeping them: much less
    memory, and steps a third slower."""
    learning_rate: float = 4e-4
    """Peak learning rate, the same for AdamW and Muon."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: constant; cosine; or wsd: constant, then linear over the last --decay-steps."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises from 0 to its peak."""
    decay_steps: int = 0
    """Number of steps at the end in which the learning rate falls, for --schedule wsd."""
    final_fraction: float = 0.0
    """Learning rate of the last step, as a fraction of the peak."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it; 0 = off."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is validated and saved; lower in early steps; 0 = no
    average."""
    seed: int = 0
    """Seed of everything random in the run."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """bf16: matrix products and convolutions in bfloat16, weights in float32; no: everything in float32."""
    compile: bool = False
    """Compile the trained module with torch.compile: about a minute at the start, faster steps on a GPU."""
    tf32: bool = True
    """Allow TF32 for products and convolutions that stay float32 on a GPU."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU of the process, if there is one; cpu: the CPU."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl; each line holds the means of the steps since the line before."""
    validate_every: int = 500
    """Steps between validations; 0 = at the end only."""
    sample_every: int = 1000
    """Steps between sheets of sampled images; 0 = at the end only."""
    save_every: int = 1000
    """Steps between checkpoints; 0 = at the end only."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that stay on disk, besides the best model by validation in model/."""
    resume: Literal["auto", "restart"] = "auto"
    """auto: resume from the newest checkpoint in --out, if there is one; restart: remove the checkpoints and start
    anew."""
    max_minutes: float = 0.0
    """Minutes after which the run stops with a checkpoint that it can be resumed from; 0 = no limit."""
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    """Tracker that gets curves and sheets of images, besides the files of the run's folder."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer(RunOptions):
    """Trains a tokenizer on images, and writes it in the form that `visar.load_tokenizer` reads."""

    data: Path
    """Training images: emoji64.zip, a folder with one subfolder per class, parquet files or an .npz. For tokenizers of
    clips: emojiclips.zip, a folder that `visar data doom` or `visar data moving-emoji` made, or a folder of videos."""
    image_size: int | None = None
    """Side of the images in pixels; needed for images that may be of any size."""
    kind: TokenizerName | None = None
    """Family of tokenizer: vq, one grid of codes; multiscale, a pyramid of grids for next-scale generators; kl, a grid
    of vectors; diffusion, a sequence of codes with a diffusion decoder; video, a box of codes of a clip; larp,
    codes of queries that look at a whole clip; when not given, the preset's, or vq."""
    preset: str | None = None
    """Architecture preset; when not given, the smallest of the kind: vq-4-64, msvq-4-64, kl-4-64, dar-64,
    video-vq-4-64 or larp-64."""
    model_options: str = "{}"
    """Constructor arguments that replace the preset's, as JSON, such as '{"base_channels": 48}'."""
    codebook_size: int | None = None
    """Number of codes in the codebook; when not given, the preset's."""
    codebook_update: Literal["gradient", "ema"] = "ema"
    """How codes are learnt: ema, as moving averages of their latents; gradient, from the codebook loss."""
    codebook_decay: float = 0.99
    """Decay of the moving averages of codes and of how often they are used."""
    commitment_weight: float = 0.25
    """Weight of the loss that keeps latents near their codes."""
    codebook_weight: float = 1.0
    """Weight of the loss that moves codes; codes that follow a moving average have no gradient from it."""
    kl_weight: float = 1e-6
    """Weight of the KL term of continuous latents, nats of an image over the number of its pixel values (latent
    diffusion's unit)."""
    flow_weight: float = 1.0
    """Weight of the flow-matching loss of a diffusion decoder. Its losses of pixels and the perceptual distance are of
    the image that one step from a random time points to."""
    revive_every: int = 20
    """Steps between revivals of unused codes; 0 = never."""
    revive_below: float = 0.2
    """Mean number of uses per step below which a code counts as unused."""
    revive_until: float = 0.8
    """Fraction of the run in which unused codes are revived."""
    l1_weight: float = 1.0
    """Weight of the mean absolute error of pixels."""
    l2_weight: float = 2.0
    """Weight of the mean squared error of pixels."""
    gradient_weight: float = 0.5
    """Weight of the multi-scale L1 of pixel differences."""
    perceptual_weight: float = 0.3
    """Weight of the perceptual distance; 0 = off."""
    perceptual: PerceptualKind = "lite0"
    """Network of the perceptual distance: lite0, EfficientNet-Lite0 from a package; lpips, VGG-16, whose weights are
    fetched."""
    adversarial_weight: float = 0.0
    """Weight of the discriminator's loss; 0 = off."""
    adversarial_start: int = 0
    """Step at which the discriminator starts."""
    adversarial_learning_rate: float = 1e-4
    """Peak learning rate of the discriminator."""
    adversarial_layers: int = 3
    """Number of convolutions of stride 2 in the discriminator; each doubles the side of the patches that it scores."""
    adversarial_spectral: bool = True
    """Use spectral norm in the discriminator; otherwise group norm."""
    adversarial_adaptive: bool = False
    """Scale the discriminator's loss by the ratio of gradient norms at the decoder's last layer, as VQGAN does."""
    adversarial_maximum: float = 10.0
    """Largest ratio of gradient norms with --adversarial-adaptive."""
    decoder_only: bool = False
    """Train the decoder alone, from --initial: the ids of every image stay the same."""
    weight_decay: float = 0.0
    """Weight decay of matrices and convolutions."""
    augment: AugmentKind = "photographs"
    """Augmentation. drawings: shifts, mirror images and slight rescalings on white; photographs: random crops and
    mirror images."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights that are written to model/."""


@dataclass(frozen=True, kw_only=True)
class TrainGenerator(RunOptions):
    """Trains a generator on a tokenizer's ids, and writes both as a pipeline that `visar.load` reads."""

    data: Path
    """Training images: emoji64.zip, a folder with one subfolder per class, parquet files or an .npz. For tokenizers of
    clips: emojiclips.zip, a folder that `visar data doom` or `visar data moving-emoji` made, or a folder of videos."""
    tokenizer: str
    """Tokenizer: a folder that `visar train tokenizer` wrote (its model/), or the name of an embedded one."""
    tokens: Path | None = None
    """File of ids to read, or to write if it does not exist; without it ids are computed anew."""
    variants: int = 32
    """Number of variants per image, made once: the image itself and augmented ones; 1 = no augmentation."""
    augment: AugmentKind = "photographs"
    """Augmentation. drawings: shifts, mirror images and slight rescalings on white; photographs: random crops and
    mirror images."""
    token_means: bool = False
    """Train on the means of continuous tokens instead of draws around them."""
    family: GeneratorName = "auto"
    """Family of generator. auto: the first that fits the tokenizer's tokens, so raster for one grid and next_scale for
    several scales; hmar: hierarchical masked, over scales; coarse_to_fine: clusters of codes, then codes, on one
    grid; next_neighbor, region_parallel: several tokens per pass, by diagonals or in all regions at once."""
    phase: Literal["next_scale", "refinement"] = "next_scale"
    """Training phase of --family hmar: next_scale trains everything but the refinement layers; refinement trains these
    alone, from the first run's model as --initial."""
    width: int = 256
    """Hidden size of the transformer."""
    num_layers: int = 9
    """Number of blocks of the transformer."""
    num_heads: int = 4
    """Number of attention heads of the transformer."""
    hidden_width: int = 704
    """Hidden size of the transformer's feed-forward layers."""
    model_options: str = "{}"
    """Further constructor arguments of the generator, as JSON."""
    class_condition: bool = True
    """Condition on the class."""
    attributes: tuple[str, ...] | None = None
    """Label columns to condition on besides the class; when not given, all columns of the data with --class-condition,
    else none."""
    words: Literal["none", "sum", "prefix"] = "none"
    """Condition on words too: sum, by the mean of their vectors; prefix, one by one before the image."""
    text_encoder: str = "none"
    """Condition on captions alone, through a frozen encoder: minilm, flan-t5-xl or a folder (raster only). The class
    is not read then, whatever --class-condition says."""
    dropout: float = 0.1
    """Dropout of the input and after every attention and feed-forward layer."""
    label_dropout: float = 0.1
    """Probability that an image loses all its conditions."""
    class_dropout: float = 0.0
    """Probability that an image loses its class alone."""
    attribute_dropout: float = 0.1
    """Probability that an image loses an attribute, for every attribute by itself."""
    word_dropout: float = 0.1
    """Probability that an image loses all its words."""
    word_omission: float = 0.0
    """Probability that a word of a caption is left out, for every word by itself."""
    class_balance: float = 0.5
    """Power p of the weight n^-p with which images are drawn, n being the size of their class: 0 = all images alike, 1
    = all classes alike."""
    scale_weights: tuple[float, ...] = ()
    """Weights of the loss per token of every scale, coarse to fine, or of the two stages of coarse_to_fine, where 0
    freezes one and trains the other alone; empty = all alike (hmar: its own)."""
    self_correction: float = 0.0
    """Largest fraction of an image's codes that are replaced before finer scales, whose targets then correct them, for
    models over scales (hmar: in both phases); 0 = off."""
    initial_layers: tuple[int, ...] = ()
    """Layers of --initial to start from, for a model of that many layers and the same widths; empty = all layers."""
    teacher: str = ""
    """Generator of the same ids and conditions, by name or folder, whose distributions are learnt instead of the
    ids."""
    weight_decay: float = 0.05
    """Weight decay of matrices."""
    optimizer: OptimizerName = "adamw"
    """Optimizer. muon: Muon for the matrices of the blocks and AdamW for the rest; learns more per step, and a step
    takes longer."""
    sample_images: int = 48
    """Number of images on a sheet."""
    sample_guidance: float = 2.0
    """Guidance scale of the images on a sheet; 1.0 = off."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights that are written to model/."""


@dataclass(frozen=True, kw_only=True)
class TrainDrafter(RunOptions):
    """Trains a drafter for a raster model; `--sampler.drafter OUT/model` samples with it."""

    data: Path
    """Images that the target model was trained on."""
    target: str
    """Model to draft for: an embedded or official name, or a pipeline's folder."""
    kind: Literal["eagle", "heads"] = "eagle"
    """Kind of drafter. eagle: a layer that predicts the next hidden vector; heads: one small head for each of the next
    tokens."""
    tokens: Path | None = None
    """File of ids to read, or to write if it does not exist; without it ids are computed anew."""
    variants: int = 32
    """Number of variants per image, made once: the image itself and augmented ones; 1 = no augmentation."""
    augment: AugmentKind = "photographs"
    """Augmentation. drawings: shifts, mirror images and slight rescalings on white; photographs: random crops and
    mirror images."""
    num_heads: int = 0
    """Number of attention heads of an eagle drafter; 0 = as many as the target's."""
    hidden_width: int = 0
    """Hidden size of an eagle drafter's feed-forward layer; 0 = the target's."""
    num_right: int = 5
    """Number of next tokens that heads predict, which is the most drafts in a row."""
    law_weight: float = 1.0
    """Weight of the cross-entropy relative to the loss of the hidden vectors, for eagle (0.1 in its paper)."""
    input_noise: float = 0.2
    """Width of the noise on the hidden vectors that an eagle drafter reads, which makes it robust to its own errors; 0
    = off."""
    offset_decay: float = 0.8
    """Weight of an offset's loss relative to that of the offset before, for heads."""
    label_dropout: float = 0.15
    """Probability that an image loses all its conditions."""
    weight_decay: float = 0.0
    """Weight decay of matrices."""
    guidance_scale: float | None = None
    """Guidance scale at which acceptance is measured; when not given, the target's default."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights that are written to model/."""


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
