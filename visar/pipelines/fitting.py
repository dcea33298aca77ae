"""Whether the parts of a pipeline belong together: found when it is made, not after all tokens are drawn."""

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import nn

from visar.core.interface import Scales, TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.pipelines.sampling import NEUTRAL, guidance_of_defaults
from visar.samplers.index import find_sampler
from visar.tokenizers.multiscale_quantizer import scale_pairs

# Entries of a codebook that it is known by, and how far rounding to 16 bits may move them, of the largest one.
_KNOWN_BY, _ROUNDED = 16, 1 / 64


def check_medium(layout: TokenLayout, clips: bool) -> None:
    """Checks that a tokenizer's tokens are those of what a pipeline makes.

    Args:
        layout: of the tokens.
        clips: whether the pipeline makes clips.

    Raises:
        ValueError: they are of clips and the pipeline makes images, or the other way round.
    """
    if (layout.arrangement == "box") != clips:
        needed = "a VideoPipeline" if layout.arrangement == "box" else "an ImagePipeline"
        raise ValueError(f"the tokenizer's tokens are in arrangement {layout.arrangement}, which needs {needed}")


def check_parts(tokenizer: Any, generator: Any) -> None:
    """Checks that a generator predicts the tokens that a tokenizer decodes.

    Raises:
        ValueError: another grid or other scales, or another number, width or upsampling of codes; all are named.
    """
    layout, config = tokenizer.layout, generator.config
    found: dict[str, tuple[Any, Any]] = {"codes": (config.get("vocab_size", 0), layout.vocab_size)}
    if "channels" in config:
        found["numbers of a token"] = config["channels"], layout.channels
    if "scales" in config:
        found["scales"] = _shown(scale_pairs(config["scales"])), _shown(layout.shapes)
    elif layout.arrangement == "sequence":
        found["tokens"] = generator.num_tokens, layout.num_tokens
        if "rope" in config:
            found["rotary positions"] = config["rope"], "1d"
    elif "grid" in config:
        found["grid"] = _shown([config["grid"]]), _shown(layout.shapes)
    else:
        found["tokens"] = generator.num_tokens, layout.num_tokens
    # Generators that read code vectors have a copy of the tokenizer's.
    if "codebook_width" in config and config.get("token_input", "codebook") == "codebook":
        found["width of a code"] = config["codebook_width"], layout.channels
    for name in ("num_phi", "phi_ratio"):
        if name in config:
            found[name] = config[name], tokenizer.config.get(name)
    wrong = [f"{name} {ours} (the tokenizer's: {theirs})" for name, (ours, theirs) in found.items() if ours != theirs]
    if wrong:
        raise ValueError(f"generator and tokenizer do not fit each other: the generator has {'; '.join(wrong)}")
    if config.get("token_input") == "codebook":
        check_codes(tokenizer, codes_of(generator))


def check_copy(tokenizer: Any, generator: Any) -> None:
    """Checks the copy of the codes of a saved generator over scales; that of one that was just made is random.

    Raises:
        ValueError: it is of another tokenizer.
    """
    if isinstance(generator, Scales):
        check_codes(tokenizer, codes_of(generator.pyramid))


def codes_of(model: Any) -> list[float] | None:
    """Some entries of a tokenizer's codebook, or of the copy in its generator, to know it again in any dtype; of a
    continuous tokenizer, entries of what stands in its place.

    None for a model whose weights are not there (on the device meta).
    """
    codebook = (model.codebook if hasattr(model, "codebook") else model.known_by).detach()
    if codebook.is_meta:
        return None
    step = max(1, codebook.numel() // _KNOWN_BY)
    return codebook.flatten()[::step][:_KNOWN_BY].float().tolist()


def check_codes(tokenizer: Any, codes: Any) -> None:
    """Checks that a tokenizer has the codes that a generator was trained on.

    Args:
        tokenizer: to decode with.
        codes: see `codes_of`; None where nothing is known.

    Raises:
        ValueError: it has others, or codes are no numbers.
    """
    if not isinstance(codes, list | tuple | None) or not all(map(_number, codes or ())):
        raise ValueError(f"codes {codes!r:.200}; needed: a list of numbers")
    found = codes_of(tokenizer)
    if codes is None or found is None:
        return
    largest = max(map(abs, codes), default=0.0)
    if len(found) != len(codes) or any(abs(a - b) > _ROUNDED * largest for a, b in zip(found, codes, strict=True)):
        raise ValueError(
            "the tokenizer is not the one that the generator was trained with: they are of one shape, but its codes "
            "are others"
        )


def check_hooks(*models: nn.Module) -> None:
    """Checks that weights are there, and that no hooks of diffusers move or cast them.

    Raises:
        ValueError: they are not, or some do.
    """
    for model in models:
        name = type(model).__name__
        if any("_diffusers_hook" in vars(module) for module in model.modules()):
            raise ValueError(
                f"hooks of diffusers (group offload, layerwise casting, caches) are on the {name}. They work in "
                "forward, which decoding does not call: load the model again, and use enable_model_cpu_offload() or "
                "enable_offload() of the pipeline"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                f"weights of the {name} are on the device meta, as after accelerate's offloading to the CPU or to a "
                "disk: load the model again, and use enable_model_cpu_offload() or enable_offload() of the pipeline"
            )


def _shown(shapes: Any) -> str:
    return ", ".join(" x ".join(map(str, shape)) for shape in shapes)


def check_vocabulary(vocabulary: Vocabulary, generator: Any) -> None:
    """Checks that the names of labels and words are as many as the generator has.

    Raises:
        ValueError: they are not, or the rows of the training set have labels or captions that are none.
    """
    config, columns = generator.config, list(vocabulary.null_labels)
    if not config.get("caption_width"):
        num_classes, attributes = config.get("num_classes", 0), list(config.get("attributes", ()))
        if num_classes or attributes:
            needed = [num_classes, *attributes] if num_classes else attributes
            given = columns if num_classes else columns[1:]
            if given != needed:
                raise ValueError(f"the vocabulary has {given} names of labels, the generator {needed} labels")
        words = config.get("word_vocab_size", 0)
        if words and len(vocabulary.words) != words:
            raise ValueError(f"the vocabulary has {len(vocabulary.words)} words, the generator {words}")
        if words and vocabulary.num_words > config.get("num_words", vocabulary.num_words):
            raise ValueError(f"captions of {vocabulary.num_words} words; the generator reads {config['num_words']}")
    rows, texts = vocabulary.rows, len(vocabulary.texts)
    bounds = [(-1, texts - 1), *((0, count) for count in columns)]
    for number, (low, high) in enumerate(bounds[: rows.shape[1]]):
        if len(rows) and not low <= rows[:, number].min() <= rows[:, number].max() <= high:
            what = "captions" if number == 0 else list(vocabulary.attributes)[number - 1]
            raise ValueError(f"the vocabulary's training rows have {what} outside of {low} ... {high}")


def read_vocabulary(values: Any) -> Vocabulary:
    """A vocabulary from the values that a pipeline's folder has of it.

    Raises:
        ValueError: they are not of the form of `Vocabulary.to_dict`.
    """
    try:
        vocabulary = Vocabulary.from_dict(values)
        names = [*vocabulary.attributes, *vocabulary.words, *vocabulary.texts]
        names += [name for of_column in vocabulary.attributes.values() for name in of_column]
        strange = next((name for name in names if not isinstance(name, str)), None)
        if strange is not None:
            raise ValueError(f"{strange!r:.80} is no name")
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise ValueError(f"the vocabulary is damaged ({type(error).__name__}: {str(error):.200})") from error
    return vocabulary


def check_defaults(defaults: Any, num_blocks: int | None = None) -> None:
    """Checks a pipeline's default sampling settings.

    Args:
        defaults: defaults of the pipeline.
        num_blocks: number of blocks of its generator; None where there is none.

    Raises:
        ValueError: unknown settings, or values that no sampler takes.
    """
    if not isinstance(defaults, Mapping):
        raise ValueError(f"default settings {defaults!r:.200}; needed: a dictionary such as {{'guidance_scale': 2.0}}")
    scale, fields = defaults.get("guidance_scale", 1.0), defaults.get("guidance", {})
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise ValueError(f"default guidance_scale {scale!r:.200}; needed: a number >= 0 (1.0 = off)")
    if not isinstance(fields, Mapping):
        raise ValueError(f"default guidance {fields!r:.200}; needed: a dictionary of the fields of Guidance")
    guidance = guidance_of_defaults(defaults)
    try:
        guidance.scales(num_blocks or (len(guidance.scale) if isinstance(guidance.scale, tuple) else 2))
    except (TypeError, ValueError) as error:
        raise ValueError(f"default guidance {dict(fields)!r:.200} does not fit: {error}") from error
    settings = {**NEUTRAL, **defaults}
    find_sampler(settings["sampler"])
    for name, (fits, allowed) in _ALLOWED.items():
        value = settings[name]
        if not all(map(fits, value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"default {name} {value!r:.200}; needed: {allowed}, or a list with one per scale")
    encoder = settings.get("text_encoder")
    if not isinstance(encoder, str | None):
        raise ValueError(f"default text_encoder {encoder!r:.200}; needed: the name or folder of one")


def _number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: _number(value) and 0 < value < float("inf"), "a number above 0"),
    "top_k": (lambda value: _number(value, Integral) and value >= 0, "a whole number >= 0 (0 = off)"),
    "top_p": (lambda value: _number(value) and 0 < value <= 1, "a number above 0, at most 1 (1 = off)"),
}
