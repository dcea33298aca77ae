"""`visar sample`: images or clips of a model, as a grid in one file or as a folder of files."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from visar.cli.flags import names_clip, names_image

Report = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Makes images or clips with a model: a grid in one file, or a folder of files."""

    model: tyro.conf.Positional[str]
    """Model: an embedded or official name (`visar models`), or a folder made by save_pretrained."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Class by name or number; when not given, every image draws one from the training set's distribution."""
    prompt: str | None = None
    """Prompt, for models conditioned on words."""
    attribute: tuple[str, ...] = ()
    """Further labels as name=value, such as style=noto."""
    num_images: int = 1
    """Number of images."""
    seed: int = 0
    """Seed of the first image; image i has seed + i. Nothing else of the call changes its random numbers."""
    out: Path = Path("samples.png")
    """A .png file for a grid, or a folder for one file per image. Of clips: an .mp4 (extra video), .gif or .webp file
    in which all of them move side by side, a .png file with a row of frames per clip, or a folder of .webp files."""
    fps: float = 8.0
    """Frames a second of clips."""
    sampler: str | None = None
    """Sampler (`visar samplers`); its own settings are given as --sampler.NAME VALUE. When not given, the model's
    default, as for guidance, temperature, top-k and top-p."""
    guidance_scale: float | None = None
    """Guidance scale; 1.0 = off."""
    temperature: float | None = None
    """Temperature, > 0; 1.0 = off."""
    top_k: int | None = None
    """Number of likeliest codes that may be drawn (top-k); 0 = off."""
    top_p: float | None = None
    """Probability mass of the likeliest codes that may be drawn (top-p), in (0, 1]; 1.0 = off."""
    previews: bool = False
    """Also write the images after every scale, or every group of tokens, one row per image, beside --out; for models
    over scales and for those of a diffusion tokenizer."""
    first_tokens_of: Path | None = None
    """Image whose first tokens all images begin with; of a diffusion tokenizer they say how it is laid out. For raster
    models, with --num-first-tokens."""
    num_first_tokens: int = 0
    """Number of the tokens that --first-tokens-of gives; the more, the more alike."""
    batch_size: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("--batch",))] = 64
    """Largest number of images per batch; auto finds how many fit into memory."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""
    dtype: str | None = None
    """Dtype of the weights: float32, bfloat16 or float16; when not given, bfloat16 on a GPU and float32 on a CPU."""
    offload: bool = False
    """Keep tokenizer and text encoder on the CPU and move them to the GPU when needed: slower, with less GPU
    memory."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """int8 or fp8: store the weights of the generator's blocks and head in 8 bits; needs torchao."""


def sample(options: Sample, sampler_options: dict[str, Any], report: Report) -> None:
    """Runs `visar sample`.

    Args:
        options: options of the command.
        sampler_options: settings of the sampler, by name.
        report: prints a line.

    Raises:
        ValueError: an option that does not fit, or `out` cannot be written to.
        OutOfMemory: a batch does not fit; the images made before it are written.
    """
    import PIL.Image

    from visar import load
    from visar.data.pictures import read_picture
    from visar.io.files import atomic_write, check_file_output, locked
    from visar.io.pictures import grid
    from visar.pipelines.editing import first_tokens_of, scale_previews
    from visar.pipelines.memory import OutOfMemory
    from visar.pipelines.previews import check_previews
    from visar.pipelines.requests import named_values, number_or_name
    from visar.pipelines.video import VideoPipeline

    animated = names_clip(options.out, options.fps)
    single = animated or names_image(options.out)
    attributes = named_values(options.attribute)
    if (options.first_tokens_of is None) != (options.num_first_tokens == 0):
        raise ValueError("--first-tokens-of IMAGE and --num-first-tokens K go together; K is at least 1")
    given = options.first_tokens_of
    picture = None if given is None else PIL.Image.fromarray(read_picture(given, None, str(given)))
    if options.previews:
        check_file_output(_beside(options.out))
    placing: dict[str, Any] = dict(device=options.device, dtype=options.dtype, offload=options.offload)
    pipeline = load(options.model, **placing, quantize=options.quantize)
    of_clips = isinstance(pipeline, VideoPipeline)
    if animated and not of_clips and options.out.suffix.lower() != ".webp":
        raise ValueError(
            f"{options.model} makes still images, so {options.out} must end in .png, .jpg, .jpeg or .webp, or be a "
            "folder"
        )
    if of_clips and options.first_tokens_of is not None:
        raise ValueError("--first-tokens-of is for still images; clips are continued from Python (docs/video.md)")
    if options.previews:
        check_previews(pipeline)
    first_tokens = None
    if picture is not None:
        first_tokens = first_tokens_of(pipeline, picture, options.num_first_tokens)
    pipeline.set_progress_bar_config(desc="sampling", unit="step")
    try:
        result = cast(Any, pipeline)(  # of images or of clips
            class_labels=(
                None if options.class_name is None else number_or_name(options.class_name, pipeline.vocabulary)
            ),
            prompt=options.prompt,
            num_images=options.num_images,
            attributes=attributes,
            sampler=options.sampler,
            sampler_options=sampler_options,
            guidance_scale=options.guidance_scale,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            batch_size=options.batch_size,
            first_tokens=first_tokens,
        )
    except OutOfMemory as error:
        if error.done is not None and not of_clips:
            _write_images(error.done, options.out, single, report)
        raise
    with contextlib.nullcontext() if single else locked(options.out):
        if of_clips:
            _write_clips(result, options, animated, single, report)
        else:
            _write_images(result, options.out, single, report)
    if options.previews:
        rows = scale_previews(pipeline, result.tokens, result.seeds)
        with atomic_write(_beside(options.out)) as path:
            grid([image for row in rows for image in row], columns=len(rows[0])).save(path, format="PNG")
    passes = describe_passes(result.statistics.forward_passes)
    what = "clip" if of_clips else "image"
    count = f"{len(result.seeds)} {what}{'s' if len(result.seeds) > 1 else ''}"
    report(f"{count} in {result.statistics.seconds:.1f} s of sampling, {passes}: {options.out}")


def _beside(out: Path) -> Path:
    """Where previews go."""
    out = out.resolve()
    return out.with_name(f"{out.stem}-scales.png")


def describe_passes(forward_passes: Mapping[str, int]) -> str:
    """Passes of the generator, and apart from them those of each helper, which cost less or more."""
    others = {name: count for name, count in forward_passes.items() if name != "generator"}
    parts = [f"{count} of the {name}" for name, count in others.items()]
    if "generator" in forward_passes:
        return " + ".join([f"{forward_passes['generator']} passes", *parts])
    return f"passes: {' + '.join(parts)}"


def _write_clips(result: Any, options: Sample, animated: bool, single: bool, report: Report) -> None:
    """Writes clips and reports what is on them, or a folder of files with a list of them."""
    from visar.io.files import atomic_write
    from visar.io.video import contact_sheet, side_by_side, write_video

    rows = list(zip(result.seeds, result.descriptions, strict=True))
    if animated:
        write_video(options.out, side_by_side(result.frames), options.fps)
    elif single:
        with atomic_write(options.out) as path:
            contact_sheet(result.frames).save(path)
    if single:
        for seed, text in rows:
            report(f"seed {seed}: {text}")
        return
    for seed, frames in zip(result.seeds, result.frames, strict=True):
        write_video(options.out / f"{seed:06d}.webp", frames, options.fps)
    with atomic_write(options.out / "seeds.txt") as path:
        path.write_text("".join(f"{seed}\t{text}\n" for seed, text in rows), encoding="utf-8")


def _write_images(result: Any, out: Path, single: bool, report: Report) -> None:
    """Writes a grid and reports what is on it, or a folder of files with a list of them."""
    from visar.io.files import atomic_write
    from visar.io.pictures import grid

    rows = list(zip(result.seeds, result.descriptions, strict=True))
    if single:
        with atomic_write(out) as path:
            grid(result.images).save(path)
        for seed, text in rows:
            report(f"seed {seed}: {text}")
        return
    for seed, image in zip(result.seeds, result.images, strict=True):
        with atomic_write(out / f"{seed:06d}.png") as path:
            image.save(path)
    with atomic_write(out / "seeds.txt") as path:
        path.write_text("".join(f"{seed}\t{text}\n" for seed, text in rows), encoding="utf-8")
