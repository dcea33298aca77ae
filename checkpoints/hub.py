"""Names of models: the embedded ones that ship with the package, and the official ones, fetched when asked for."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Source = Literal["llamagen", "var", "hmar", "code"]

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Official:
    """Released weights of another project.

    Attributes:
        source: name of the converter in visar.checkpoints.convert.
        repository: model repository on the Hugging Face hub.
        file: file of the generator in it.
        tokenizer_repository, tokenizer_file: the tokenizer it was trained with.
        grid: (rows, columns) of tokens where the file cannot say it; None where it can.
        defaults: sampling settings of the authors' best FID, as `ImagePipeline` takes them.
        note: what a user should know.
    """

    source: Source
    repository: str
    file: str
    tokenizer_repository: str
    tokenizer_file: str
    grid: tuple[int, int] | None
    defaults: dict[str, Any]
    note: str


def scale_defaults(sampler: str, strength: float, top_k: int, top_p: float) -> dict[str, Any]:
    """Sampling settings in the form that VAR's and HMAR's authors give them.

    Args:
        sampler: name in the index of samplers.
        strength: t of guided = (1 + t) c - t n at the last scale; it rises linearly from 0 at the first one.
        top_k, top_p: filters of all scales.
    """
    guidance = {"scale": strength, "convention": "extrapolate", "schedule": "linear"}
    return {"sampler": sampler, "guidance": guidance, "top_k": top_k, "top_p": top_p}


# Settings of the released evaluation: FoundationVision/VAR@78b9539 (README), czg1225/CoDe@bfb204d (without its
# temperature of 1.1 on the first seven scales), NVlabs/HMAR@595a9df (config/evaluate).
VAR_DEFAULTS = scale_defaults("next_scale", 1.5, 900, 0.96)
CODE_DEFAULTS = scale_defaults("next_scale", 1.5, 600, 0.96)
HMAR_DEFAULTS: dict[int, dict[str, Any]] = {
    16: scale_defaults("masked_refinement", 1.7, 1000, 0.99),
    20: scale_defaults("masked_refinement", 1.9, 950, 0.99),
    24: scale_defaults("masked_refinement", 2.1, 900, 0.99),
    30: scale_defaults("masked_refinement", 1.6, 650, 0.99),
}


def _llamagen(file: str, side: int, scale: float) -> Official:
    return Official(
        source="llamagen",
        repository="FoundationVision/LlamaGen",
        file=file,
        tokenizer_repository="FoundationVision/LlamaGen",
        tokenizer_file="vq_ds16_c2i.pt",
        grid=(side // 16, side // 16),
        defaults={"guidance_scale": scale},
        note=f"ImageNet classes, {side} x {side}",
    )


def _llamagen_text(file: str, side: int) -> Official:
    return Official(
        source="llamagen",
        repository="peizesun/llamagen_t2i",
        file=file,
        tokenizer_repository="peizesun/llamagen_t2i",
        tokenizer_file="vq_ds16_t2i.pt",
        grid=(side // 16, side // 16),
        defaults={"guidance_scale": 7.5, "top_k": 1000, "text_encoder": "flan-t5-xl"},
        note=f"captions through FLAN-T5-XL (fetched at the first prompt), {side} x {side}",
    )


def _scales(source: Source, repository: str, file: str, defaults: dict[str, Any], note: str) -> Official:
    return Official(
        source=source,
        repository=repository,
        file=file,
        tokenizer_repository="FoundationVision/var",
        tokenizer_file="vae_ch160v4096z32.pth",
        grid=None,
        defaults=defaults,
        note=note,
    )


def _var(depth: int, side: int) -> Official:
    note = f"ImageNet classes, {side} x {side}"
    return _scales("var", "FoundationVision/var", f"var_d{depth}.pth", VAR_DEFAULTS, note)


def _hmar(depth: int) -> Official:
    note = "ImageNet classes, 256 x 256; weights for research and non-commercial use only"
    return _scales("hmar", "nvidia/HMAR", f"hmar-d{depth}.pth", HMAR_DEFAULTS[depth], note)


# Guidance of LlamaGen: best FID rows of arXiv 2406.06525 (tables 8 and 9) and the defaults of the released text
# sampler. CoDe's pairs (Zigeng/VAR_CoDe) are two generators, which one pipeline does not hold: `visar convert`.
OFFICIAL: dict[str, Official] = {
    "llamagen-c2i-b-256": _llamagen("c2i_B_256.pt", 256, 2.0),
    "llamagen-c2i-b-384": _llamagen("c2i_B_384.pt", 384, 2.25),
    "llamagen-c2i-l-256": _llamagen("c2i_L_256.pt", 256, 1.75),
    "llamagen-c2i-l-384": _llamagen("c2i_L_384.pt", 384, 2.0),
    "llamagen-c2i-xl-384": _llamagen("c2i_XL_384.pt", 384, 1.75),
    "llamagen-c2i-xxl-384": _llamagen("c2i_XXL_384.pt", 384, 1.75),
    "llamagen-c2i-3b-384": _llamagen("c2i_3B_384.pt", 384, 1.65),
    "llamagen-t2i-xl-256": _llamagen_text("t2i_XL_stage1_256.pt", 256),
    "llamagen-t2i-xl-512": _llamagen_text("t2i_XL_stage2_512.pt", 512),
    "var-d16": _var(16, 256),
    "var-d20": _var(20, 256),
    "var-d24": _var(24, 256),
    "var-d30": _var(30, 256),
    "var-d36": _var(36, 512),
    "hmar-d16": _hmar(16),
    "hmar-d20": _hmar(20),
    "hmar-d24": _hmar(24),
    "hmar-d30": _hmar(30),
}


def embedded_names() -> list[str]:
    """Names of the models that ship with the package, generators and tokenizers, sorted."""
    return sorted(facts.parent.name for facts in EMBEDDED_FOLDER.glob("*/about.json"))


def about(name: str) -> dict:
    """Facts of an embedded model: kind, summary, tokenizer (for generators), parameters, defaults, licence."""
    with open(EMBEDDED_FOLDER / name / "about.json", encoding="utf-8") as file:
        return json.load(file)


def unknown_model(name: str) -> ValueError:
    """The error for a name that is neither a folder nor a model, with the nearest names."""
    names = [*embedded_names(), *OFFICIAL]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    return ValueError(f"unknown model {name!r}: neither a folder nor a name. {hint}all names: {', '.join(names)}")


def download(repository: str, file: str) -> Path:
    """Path of a hub file in the local cache, fetched if it is not there.

    Raises:
        ValueError: it cannot be had (no network, no such file, no right to it).
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{file} of {repository} could not be fetched ({type(error).__name__}). With the file at hand, "
            f"`visar convert` turns it into a folder that loads without a network."
        ) from error
