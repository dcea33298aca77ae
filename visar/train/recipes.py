"""Named recipes: the options that the embedded models are trained with. Paths are replaced by the caller's:
dataclasses.replace(RECIPES["emoji-vq"], data=Path("data/emoji64.zip"), out=Path("runs/emoji-vq")).
"""

from dataclasses import replace
from pathlib import Path

from visar.train.generator import TrainGenerator
from visar.train.tokenizer import TrainTokenizer

_EMOJI = Path("emoji64.zip")

# 64 x 64 images as 16 x 16 ids
_VQ = TrainTokenizer(
    out=Path("runs/emoji-vq"),
    data=_EMOJI,
    preset="vq-4-64",
    augment="drawings",
    steps=4000,
    batch_size=128,
    learning_rate=4e-4,
    warmup_steps=100,
    ema_decay=0.998,
    validate_every=500,
    sample_every=1000,
    save_every=1000,
)

_RASTER = TrainGenerator(
    out=Path("runs/emoji-raster"),
    data=_EMOJI,
    tokenizer="emoji-vq",
    augment="drawings",
    variants=32,
    steps=8000,
    batch_size=256,
    learning_rate=1e-3,
    warmup_steps=200,
    ema_decay=0.999,
    validate_every=500,
    sample_every=2000,
    save_every=1000,
)

RECIPES: dict[str, TrainTokenizer | TrainGenerator] = {
    "emoji-vq": _VQ,
    "emoji-vq-4096": replace(_VQ, out=Path("runs/emoji-vq-4096"), preset="vq-4-64-4096"),
    # class, group, style, tone and the words of the name; reads codes' vectors, so that it can teach one-step students
    "emoji-raster": replace(
        _RASTER,
        words="sum",
        word_dropout=0.25,
        word_omission=0.1,
        model_options='{"token_input": "codebook", "prefix_rotation": "identity"}',
    ),
    # words of the caption one by one before the image
    "emoji-raster-text": replace(
        _RASTER,
        out=Path("runs/emoji-raster-text"),
        class_condition=False,
        words="prefix",
        word_dropout=0.0,
        word_omission=0.15,
        model_options='{"token_input": "codebook", "prefix_rotation": "identity"}',
    ),
}
