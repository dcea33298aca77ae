"""Named recipes: the options that the embedded models are trained with. Paths are replaced by the caller's.

dataclasses.replace(RECIPES["emoji-vq"], data=Path("emoji64.zip"), out=Path("runs/emoji-vq"))
"""

from pathlib import Path

from visar.train.generator import TrainGenerator
from visar.train.tokenizer import TrainTokenizer

_EMOJI = Path("emoji64.zip")

_VQ = dict(
    data=_EMOJI,
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

_RASTER = dict(
    data=_EMOJI,
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
    # 64 x 64 images as 16 x 16 ids
    "emoji-vq": TrainTokenizer(out=Path("runs/emoji-vq"), preset="vq-4-64", **_VQ),
    "emoji-vq-4096": TrainTokenizer(out=Path("runs/emoji-vq-4096"), preset="vq-4-64-4096", **_VQ),
    # class, group, style, tone and the words of the name; reads codes' vectors, so that it can teach one-step students
    "emoji-raster": TrainGenerator(
        out=Path("runs/emoji-raster"),
        tokenizer="emoji-vq",
        words="sum",
        word_dropout=0.25,
        word_omission=0.1,
        model_options='{"token_input": "codebook", "prefix_rotation": "identity"}',
        **_RASTER,
    ),
    # words of the caption one by one before the image
    "emoji-raster-text": TrainGenerator(
        out=Path("runs/emoji-raster-text"),
        tokenizer="emoji-vq",
        class_condition=False,
        words="prefix",
        word_dropout=0.0,
        word_omission=0.15,
        model_options='{"token_input": "codebook", "prefix_rotation": "identity"}',
        **_RASTER,
    ),
}
