"""Options of `visar eval`, its modes and `visar stats`; flags are made from the fields. What several commands take
stands in a class of its own, and the functions behind the commands take these classes."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from visar.pipelines.options import Filters, Placement

LabelPolicy = Literal["balanced", "random", "histogram", "prompts", "none"]
KeepImages = Literal["none", "png", "npz"]
ResizeChain = Literal["none", "adm", "torchvision"]


@dataclass(frozen=True)
class MetricOptions:
    """Settings of the scores; the defaults are torch-fidelity's and the papers'.

    Attributes:
        inception_splits: parts of the inception score; images are shuffled first, so class order cannot skew them.
        kid_subsets: subsets of KID.
        kid_subset_size: images in one; at most as many as a set has.
        neighbours: k of precision and recall (Kynkaanniemi et al., arXiv 1904.06991: 3).
    """

    inception_splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    neighbours: int = 3

    def __post_init__(self) -> None:
        for name in ("inception_splits", "kid_subsets", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}; it must be >= 1")
        if self.kid_subset_size < 2:
            raise ValueError(f"kid_subset_size {self.kid_subset_size}; it must be >= 2")


# ------------------------------------------------------------------------------------- what several commands take
@dataclass(frozen=True, kw_only=True)
class ExtractorOptions:
    """The network whose features are compared."""

    extractor: str = "efficientnet-lite0"
    """Network whose features are compared: efficientnet-lite0 (FD-Lite0), craft (FD-CRAFT) or inception-v3 (FID)."""
    extractor_weights: Path | None = None
    """Weights file of the extractor; needed for inception-v3 without a network connection."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(ExtractorOptions):
    """Which of its features."""

    layer: str | None = None
    """Layer whose features the distance compares; when not given, the extractor's own choice."""
    spatial: bool = False
    """Also compute sFID; inception-v3 only."""


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """How the images of a folder get one size."""

    resize: ResizeChain = "none"
    """Resizing of a folder's images: adm is the chain of the ImageNet statistics."""
    image_size: int | None = None
    """Side in pixels that a folder's images are resized to."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(FeatureOptions, ResizeOptions):
    """What images are scored with and against.

    Attributes:
        extractor_dtype: dtype of the extractor's arithmetic; it has no flag.
    """

    reference: str
    """Reference: the name of a shipped statistics file, a file of `visar stats`, an ADM batch, an .npz of images, a
    folder, or PLACE@train, a split of an image set."""
    second_extractor: str | None = None
    """Second network that scores the same images, such as craft; runs are ranked by both."""
    second_reference: str | None = None
    """Reference for the second extractor; when not given, --reference, which must then hold images."""
    train: str | None = None
    """Training images (a folder, an .npz or PLACE@train): also print the copy rate and draw the nearest ones."""
    held_out: str | None = None
    """Real images that the model was not trained on (PLACE@val), for the null of the copy rate."""
    extractor_dtype: tyro.conf.Suppress[tyro.conf.Fixed[Literal["float32", "float64"]]] = "float32"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One evaluation run, whatever makes the images.

    Attributes:
        metrics: settings of the scores; no flag.

    Raises:
        ValueError: fewer images than precision and recall need.
    """

    out: Path
    """Folder for metrics.json, card.md and the state of the run."""
    num_samples: int = 10_000
    """Number of images; published ImageNet figures use 50,000."""
    batch_size: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("--batch",))] = 64
    """Images per batch; auto finds how many fit into memory."""
    seed: int = 0
    """Seed of the first image; image i has seed + i."""
    labels: LabelPolicy | Literal["auto"] = "auto"
    """Labels that are asked for. auto: the training histogram where the model or the reference has it, else balanced
    classes."""
    captions: str | None = None
    """PLACE@val, a split of an image set, whose labels and captions are asked for instead of the training images'."""
    keep_images: KeepImages = "none"
    """Images to write: png, one file per image; npz, one file that ADM's evaluator reads."""
    metrics: tyro.conf.Suppress[tyro.conf.Fixed[MetricOptions]] = field(default_factory=MetricOptions)

    def __post_init__(self) -> None:
        if self.num_samples <= self.metrics.neighbours:
            raise ValueError(
                f"num_samples {self.num_samples}: precision and recall with {self.metrics.neighbours} neighbours need "
                f"{self.metrics.neighbours + 1} images or more"
            )
        if self.captions is not None and self.labels not in ("auto", "histogram"):
            raise ValueError(f"labels {self.labels!r}: captions bring their own; leave labels out")


# ---------------------------------------------------------------------------------------------------- the commands
@dataclass(frozen=True)
class Eval(Placement, Filters, ScoreOptions, RunOptions):
    """Generates images, scores them against a reference and writes the figure with its whole protocol.

    Under torchrun or accelerate launch the images are shared among the processes. A run that was stopped resumes when
    the same command is given again.
    """

    model: tyro.conf.Positional[str]
    """A model's name or folder (`visar models`); or images to score: a folder of them, an .npz, or PLACE@val."""
    _: KW_ONLY
    out: Path = Path("evaluation")
    """Folder for metrics.json, card.md and the state of the run."""
    prompts: Path | None = None
    """Text file with one prompt per line, for models conditioned on words."""
    sampler: str | None = None
    """Sampler (`visar samplers`); its own settings are given as --sampler.NAME VALUE. When not given, the model's
    default."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """Guidance over the blocks: constant; or linear, from 1.0 at the first block to the scale at the last."""
    uint8_rule: Literal["round", "truncate"] = "round"
    """How pixels are rounded; truncate only to reproduce figures that were made so."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """int8 or fp8: store the weights of the generator's blocks and head in 8 bits; needs torchao."""


@dataclass(frozen=True)
class Reproduce:
    """Runs a paper's evaluation from the authors' files and prints its figure beside the paper's.

    Without a name, lists the rows. With --dry-run, says what would be fetched and done. Under torchrun the images are
    shared among the processes, and a run that was stopped resumes: torchrun --nproc-per-node 8 -m visar reproduce
    llamagen-b-256 --reference VIRTUAL_imagenet256_labeled.npz
    """

    name: tyro.conf.Positional[str] = ""
    """Row to reproduce, such as llamagen-b-256; when not given, the rows are listed."""
    _: KW_ONLY
    reference: Path | None = None
    """File of the paper's reference batch, which --dry-run says where to get; or another reference for a trial."""
    out: Path = Path("reproduction")
    """Folder for reproduction.json, metrics.json, card.md and the state of the run."""
    dry_run: bool = False
    """Fetch and make nothing: print the files with their sizes, the settings, the protocol and the paper's figures."""
    num_samples: int = 50_000
    """Number of images; the papers' figures are of 50,000."""
    batch_size: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("--batch",))] = "auto"
    """Images per batch; auto finds how many fit into memory."""
    seed: int = 0
    """Seed of the first image; image i has seed + i."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""
    dtype: str | None = None
    """Dtype of the generator's weights; when not given, the row's own, which is nearest to the paper's."""
    extractor: str = "inception-v3"
    """Network whose features are compared; only inception-v3 gives a FID."""
    extractor_weights: Path | None = None
    """Weights file of the extractor; needed for inception-v3 without a network connection."""
    keep_images: KeepImages = "none"
    """Images to write: png, one file per image; npz, one file that ADM's evaluator reads."""


@dataclass(frozen=True)
class Stats(FeatureOptions, ResizeOptions):
    """Writes a statistics file of real images, to evaluate against without the images."""

    source: tyro.conf.Positional[str]
    """Real images: a folder, an .npz, or PLACE@train, a split of an image set with its labels."""
    out: Path
    """Statistics file to write, .npz."""
    protocol: Literal["generation", "reconstruction"] = "generation"
    """Use of the statistics: generation (of training images) or reconstruction (of a tokenizer's originals)."""
    keep_features: bool = False
    """Also store the features of every image, which KID, precision and recall need."""
    batch_size: int = 64
    """Images per batch."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""


@dataclass(frozen=True)
class EvalTokenizer(Placement, ExtractorOptions, ResizeOptions):
    """Encodes and decodes images and prints PSNR, SSIM, the reconstructions' distance and use of the codebook."""

    tokenizer: tyro.conf.Positional[str]
    """Name or folder of a tokenizer."""
    images: str
    """Images that the tokenizer was not trained on: a folder, an .npz, or PLACE@val, a split of an image set."""
    out: Path = Path("reconstruction")
    """Folder for metrics.json."""
    batch_size: int = 64
    """Images per batch."""


@dataclass(frozen=True)
class Compare(Placement, ScoreOptions, RunOptions):
    """The same seeds through several samplers or models: one table, relative to the first, and a plot.

    Without --samplers and --runs, the names are folders that `visar eval` wrote.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Models (each with every sampler), or folders that `visar eval` wrote."""
    _: KW_ONLY
    out: Path = Path("comparison")
    """Folder for compare.md, compare.json, pareto.png, and one folder per run."""
    samplers: tuple[str, ...] = ()
    """Samplers, each as NAME or NAME:setting=value,setting=value, such as static_tree:branches=2,1,drafter=eagle.
    Settings of all samplers: guidance_scale, guidance_schedule, temperature, top_k, top_p, as in
    next_scale:guidance_scale=2,top_p=0.9."""
    runs: tuple[str, ...] = ()
    """Runs instead of names and --samplers, each as MODEL/SAMPLER, such as emoji-raster/ancestral
    runs/var/model/next_scale:top_k=900: the last slash before the first colon divides model and sampler."""
    reference: str = ""
    """Reference, as of `visar eval`; not needed where finished folders are compared."""
    speed_batches: tuple[int, ...] = ()
    """Batch sizes whose whole calls, tokens and decoding, are also timed, with the peak of GPU memory."""
    guidance_scale: float | None = None
    """Guidance scale of runs that do not say their own, 1.0 = off; when not given, each model's own default. Where
    that default rises from block to block, so does this."""
