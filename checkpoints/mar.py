"""Weights of MAR (arXiv 2406.11838, LTH14/mar@fe470ac): its KL tokenizer and its masked generators.

Sizes are read off keys and shapes. The scale of the tokens has no key: it is the released one, 0.2325.
"""

import math
from collections.abc import Mapping

import torch

from visar.checkpoints.common import (
    State,
    autoencoder_export_rules,
    autoencoder_rules,
    autoencoder_sizes,
    build,
    count_modules,
    find_weights,
    fitted,
    read,
    rename,
    require,
)
from visar.checkpoints.hub import Official
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import Content, Models, Row, expect
from visar.generators.masked import MASKED_PRESETS, MaskedGenerator
from visar.tokenizers.kl import KL_PRESETS, KLTokenizer

_MARKS = (
    "quant_conv.weight",
    "post_quant_conv.weight",
    "encoder.down.0.block.0.conv1.weight",
    "encoder.mid.attn_1.q.weight",
)


def convert_kl(
    content: Mapping[str, object],
    *,
    image_size: int = 256,
    scale_factor: float = KL_PRESETS["kl-16"]["scale_factor"],
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `KLTokenizer` from MAR's tokenizer file.

    Args:
        content: of the file (`visar.checkpoints.common.read`).
        image_size: side of the images that `layout` describes; the file works at all sizes.
        scale_factor: of the tokens, which the file does not tell.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, or keys and shapes that do not fit together; all are named.
    """
    state = find_weights(content, _MARKS, source)
    sizes = autoencoder_sizes(state, dict.fromkeys(_MARKS, 4), source, "KL tokenizer")
    levels = len(sizes["channel_multipliers"])
    config = sizes | dict(
        image_size=image_size,
        latent_channels=state["post_quant_conv.weight"].shape[0],
        scale_factor=scale_factor,
        decoder_attention=f"decoder.up.{levels - 1}.attn.0.norm.weight" in state,
    )
    return fitted(KLTokenizer, config, rename(state, autoencoder_rules(levels), source), source)


def export_kl(model: KLTokenizer) -> dict[str, State]:
    """A file's content that MAR's own loader takes (save it with `torch.save`)."""
    levels = len(model.config["channel_multipliers"])
    return {"model": rename(model.state_dict(), autoencoder_export_rules(levels))}


# ------------------------------------------------------------------------------------------------------- generator
GENERATOR_MARKS = ("encoder_pos_embed_learned", "diffusion_pos_embed_learned", "diffloss.net.input_proj.weight")
_NULL, _CLASSES = "fake_latent", "class_emb.weight"


def convert_generator(
    content: Mapping[str, object],
    *,
    num_heads: int | None = None,
    grid: tuple[int, int] | None = None,
    source: str = "the checkpoint",
) -> tuple[dict, State]:
    """Configuration and weights of a `MaskedGenerator` from MAR's generator file.

    Args:
        content: of the file (`visar.checkpoints.common.read`), or its weights.
        num_heads: None: that of the released sizes.
        grid: (rows, columns) of tokens; None: a square.
        source: what error messages call the file.

    Raises:
        ValueError: another kind of file, keys and shapes that do not fit together (all are named), or a width whose
            number of heads is not known.
    """
    state = find_weights(content, GENERATOR_MARKS, source, "ema")
    outputs = "diffloss.net.final_layer.linear.weight"
    matrices = ["z_proj.weight", _CLASSES, _NULL, "encoder_blocks.0.mlp.fc1.weight", GENERATOR_MARKS[2], outputs]
    require(state, dict.fromkeys(matrices, 2) | dict.fromkeys(GENERATOR_MARKS[:2], 3), source, "MAR generator")
    width, channels = state["z_proj.weight"].shape
    tokens, places = state[GENERATOR_MARKS[1]].shape[1], state[GENERATOR_MARKS[0]].shape[1]
    if num_heads is None:
        known = {preset["width"]: preset["num_heads"] for preset in MASKED_PRESETS.values()}
        if width not in known:
            raise ValueError(f"{source}: width {width} is of no released size; give num_heads (--num-heads)")
        num_heads = known[width]
    side = math.isqrt(tokens)
    if grid is None and side * side != tokens:
        raise ValueError(f"{source}: {tokens} tokens make no square; give grid (--grid)")
    config = dict(
        channels=channels,
        grid=grid or (side, side),
        width=width,
        encoder_layers=count_modules(state, "encoder_blocks"),
        decoder_layers=count_modules(state, "decoder_blocks"),
        num_heads=num_heads,
        mlp_ratio=state["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        buffer_size=places - tokens,
        head_arguments=dict(
            width=state[GENERATOR_MARKS[2]].shape[0],
            depth=count_modules(state, "diffloss.net.res_blocks"),
            variance="learned" if state[outputs].shape[0] == 2 * channels else "large",
        ),
        num_classes=state[_CLASSES].shape[0],
    )
    kept = {key: value for key, value in state.items() if key not in (_NULL, _CLASSES)}
    ours = rename(kept, [(r"^diffloss\.net\.", "head_module.net.")], source)
    # The condition that gives nothing is the last class here, a vector of its own there.
    ours["condition_vector.class_emb.weight"] = torch.cat([state[_CLASSES], state[_NULL]])
    return fitted(MaskedGenerator, config, ours, source)


def export_generator(model: MaskedGenerator) -> dict[str, State]:
    """A file's content that MAR's own loader takes (save it with `torch.save`).

    Raises:
        ValueError: the model has parts that MAR does not (attributes, words, captions, another head, no classes).
    """
    config = model.config
    foreign = [key for key in ("attributes", "word_vocab_size", "caption_width") if config[key]]
    if foreign or not config["num_classes"] or config["head"] != "diffusion":
        raise ValueError(
            f"MAR has classes and a diffusion head only, and no place for {', '.join(foreign) or 'this model'}"
        )
    state = rename(model.state_dict(), [(r"^head_module\.net\.", "diffloss.net.")])
    table = state.pop("condition_vector.class_emb.weight")
    state |= {_CLASSES: table[:-1], _NULL: table[-1:]}
    return {"model": state, "model_ema": dict(state)}


# ------------------------------------------------------------------------------------------------- for visar convert
def _read_tokenizer(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    config, state = convert_kl(find_weights(content, _MARKS, file, options.weights), source=file)
    note = "its tokens are scaled by 0.2325, the released model's factor, which the file does not tell"
    return Models(tokenizer=build(KLTokenizer, config, state, file, torch.float32), notes=(note,))


def _read_generator(options: Convert, content: Content, second: Content | None) -> Models:
    file = str(options.file)
    state = find_weights(content, GENERATOR_MARKS, file, options.weights)
    config, converted = convert_generator(state, num_heads=options.num_heads, grid=options.grid, source=file)
    generator = build(MaskedGenerator, config, converted, file, torch.float32)
    if options.tokenizer is None:
        return Models(generator=generator)
    tokenizer_file = str(options.tokenizer)
    tokenizer_content = read(options.tokenizer)
    expect(tokenizer_content, TOKENIZER, options.tokenizer)
    kl_config, kl_state = convert_kl(tokenizer_content, source=tokenizer_file)
    factor = 2 ** (len(kl_config["channel_multipliers"]) - 1)
    kl_config["image_size"] = tuple(side * factor for side in config["grid"])
    tokenizer = build(KLTokenizer, kl_config, kl_state, tokenizer_file, torch.float32)
    return Models(tokenizer=tokenizer, generator=generator, defaults=DEFAULTS)


# Settings of the released demonstration; figures of the paper are of 256 steps and a linear schedule.
DEFAULTS = {"sampler": "masked", "guidance_scale": 4.0}
TOKENIZER = Row("mar", "tokenizer", _MARKS, _read_tokenizer)
GENERATOR = Row(
    "mar", "generator", GENERATOR_MARKS, _read_generator, takes=("tokenizer", "num_heads", "grid"), weights="ema"
)
ROWS = (TOKENIZER, GENERATOR)


def _official(name: str, scale: float) -> Official:
    return Official(
        source="mar",
        repository="jadechoghari/mar",
        file=f"mar-{name}.safetensors",
        tokenizer_repository="jadechoghari/mar",
        tokenizer_file="kl16.safetensors",
        grid=None,
        defaults={"sampler": "masked", "guidance": {"scale": scale, "schedule": "linear"}},
        note="a mirror of the authors' files; their figures are of 256 steps (steps=256)",
    )


OFFICIAL: dict[str, Official] = {
    f"mar-{name}": _official(name, scale) for name, scale in (("base", 2.9), ("large", 3.0), ("huge", 3.2))
}
