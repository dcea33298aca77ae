"""Names of models: the embedded ones that ship with the package, and the official ones, fetched when asked for."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Official:
    """Released weights of another project.

    Attributes:
        source: name of the converter module in visar.checkpoints.
        repository: model repository on the Hugging Face hub.
        file: file of the generator in it.
        tokenizer_repository, tokenizer_file: the tokenizer it was trained with.
        grid: (rows, columns) of tokens, which the file cannot say.
        guidance_scale: scale of the authors' best FID.
        note: what a user should know.
    """

    source: str
    repository: str
    file: str
    tokenizer_repository: str
    tokenizer_file: str
    grid: tuple[int, int]
    guidance_scale: float
    note: str


def _llamagen(file: str, side: int, scale: float) -> Official:
    return Official(
        source="llamagen",
        repository="FoundationVision/LlamaGen",
        file=file,
        tokenizer_repository="FoundationVision/LlamaGen",
        tokenizer_file="vq_ds16_c2i.pt",
        grid=(side // 16, side // 16),
        guidance_scale=scale,
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
        guidance_scale=7.5,
        note=f"captions through FLAN-T5-XL features, {side} x {side}",
    )


# Scales: best FID rows of arXiv 2406.06525 (tables 8 and 9) and the defaults of the released text sampler.
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
