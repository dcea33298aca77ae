"""What a pipeline is, in a few lines."""

from typing import Any


def summary(pipeline: Any) -> str:
    """Generator, tokenizer, conditions and default settings of an `ImagePipeline`, one a line."""
    generator, config = pipeline.generator, pipeline.generator.config
    dtype = str(generator.dtype).removeprefix("torch.")
    settings = [f"{name} {value}" for name, value in pipeline.config["defaults"].items()]
    lines = {
        "generator": f"{type(generator).__name__}, {generator.num_parameters() / 1e6:,.1f} M parameters, "
        f"{generator.num_tokens} tokens of {config['vocab_size']:,} codes, {generator.device}, {dtype}",
        "tokenizer": type(pipeline.tokenizer).__name__,
        "conditions": ", ".join(_conditions(pipeline)) or "none",
        "defaults": ", ".join(settings) or "none",
    }
    return "\n".join([type(pipeline).__name__, *(f"  {name:<12}{text}" for name, text in lines.items())])


def _conditions(pipeline: Any) -> list[str]:
    config, vocabulary = pipeline.generator.config, pipeline.vocabulary
    if config.get("caption_width"):
        return ["captions"]
    found = [f"class ({config['num_classes']:,})"] if config["num_classes"] else []
    names = ["attribute"] * len(config["attributes"]) if vocabulary is None else list(vocabulary.attributes)[1:]
    found += [f"{name} ({count:,})" for name, count in zip(names, config["attributes"], strict=False)]
    return [*found, "words"] if config["word_vocab_size"] else found
