"""Named recipes: the options that the embedded models are trained with. Paths are replaced by the caller's:
dataclasses.replace(RECIPES["emoji-vq"], data=Path("data/emoji64.zip"), out=Path("runs/emoji-vq")).
"""

from dataclasses import replace
from pathlib import Path

from visar.train.options import TrainDrafter, TrainGenerator, TrainTokenizer

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

# 507 ids over 8 scales. Coarse scales stay in use by tail dropout (the tokenizer's) and by revival of codes from
# the residuals of every scale alike.
_MSVQ = replace(_VQ, out=Path("runs/emoji-msvq"), preset="msvq-4-64")

# All codes of a scale are drawn independently, so what a model was not shown in training it meets in sampling: hence
# self-correction.
_VAR = replace(
    _RASTER,
    out=Path("runs/emoji-var"),
    tokenizer="emoji-msvq",
    optimizer="muon",
    learning_rate=3e-3,
    self_correction=0.3,
    hidden_width=928,
    words="sum",
    word_dropout=0.25,
    word_omission=0.1,
    model_options='{"shared_adaln": true, "drop_path": 0.05}',
)

_HMAR = replace(
    _VAR,
    out=Path("runs/emoji-hmar"),
    family="hmar",
    num_layers=8,
    hidden_width=736,
    scale_weights=(1.0,) * 8,
    model_options='{"shared_adaln": true, "num_refinement_layers": 2, "drop_path": 0.05}',
)

# 16 x 16 vectors of width 8
_KL = replace(_VQ, out=Path("runs/emoji-kl"), kind="kl", preset="kl-4-64", kl_weight=1e-6)

# Classes, attributes and words as emoji-raster has them. The head's variance is fixed, so that the causal pair can be
# sampled by exact speculation.
_CONTINUOUS = replace(
    _RASTER,
    tokenizer="emoji-kl",
    optimizer="muon",
    learning_rate=2e-3,
    words="sum",
    word_dropout=0.25,
    word_omission=0.1,
)
_MAR = replace(
    _CONTINUOUS,
    out=Path("runs/emoji-mar"),
    family="masked",
    num_layers=6,
    model_options='{"buffer_size": 16, "head_arguments": {"width": 384, "depth": 3, "steps": 50}}',
)
_CAUSAL = replace(
    _CONTINUOUS,
    out=Path("runs/emoji-causal"),
    family="causal_continuous",
    num_layers=6,
    model_options=(
        '{"head_arguments": {"width": 384, "depth": 3, "steps": 25, "prediction": "velocity", "variance": "large"}}'
    ),
)

# Blocks in an order, with as many parameters as emoji-raster: the extra block of each axis takes the place of one.
_NAR = replace(
    _RASTER,
    out=Path("runs/emoji-nar"),
    family="next_neighbor",
    num_layers=7,
    optimizer="muon",
    learning_rate=2e-3,
    words="sum",
    word_dropout=0.25,
    word_omission=0.1,
)
_PAR = replace(_NAR, out=Path("runs/emoji-par-4"), family="region_parallel", num_layers=9)

# 64 ids in the order of denoising steps
_DAR_TOKENIZER = replace(
    _VQ,
    out=Path("runs/emoji-dar-tokenizer"),
    kind="diffusion",
    preset="dar-64",
    model_options=(
        '{"encoder_width": 192, "condition_width": 192, "pixel_width": 192, "num_encoder_layers": 3, '
        '"num_condition_layers": 3, "num_pixel_layers": 5}'
    ),
    steps=8000,
)

_EAGLE = TrainDrafter(
    out=Path("runs/emoji-raster-eagle"),
    data=_EMOJI,
    target="emoji-raster",
    augment="drawings",
    variants=32,
    steps=5000,
    batch_size=256,
    learning_rate=1e-3,
    warmup_steps=200,
    ema_decay=0.998,
    validate_every=1000,
    sample_every=0,
    save_every=1000,
)

RECIPES: dict[str, TrainTokenizer | TrainGenerator | TrainDrafter] = {
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
    "emoji-raster-4096": replace(
        _RASTER,
        out=Path("runs/emoji-raster-4096"),
        tokenizer="emoji-vq-4096",
        words="sum",
        word_dropout=0.25,
        word_omission=0.1,
        num_layers=8,
        model_options='{"token_input": "codebook", "prefix_rotation": "identity"}',
    ),
    "emoji-kl": _KL,
    "emoji-mar": _MAR,
    "emoji-mar-small": replace(
        _MAR,
        out=Path("runs/emoji-mar-small"),
        width=128,
        num_layers=4,
        num_heads=2,
        model_options=_MAR.model_options.replace('"width": 384, "depth": 3', '"width": 192, "depth": 2'),
    ),
    "emoji-causal": _CAUSAL,
    "emoji-causal-small": replace(
        _CAUSAL,
        out=Path("runs/emoji-causal-small"),
        width=128,
        num_layers=3,
        num_heads=2,
        hidden_width=352,
        model_options=_CAUSAL.model_options.replace('"width": 384, "depth": 3', '"width": 192, "depth": 2'),
    ),
    "emoji-nar": _NAR,
    "emoji-par-4": replace(_PAR, model_options='{"regions": 4}'),
    "emoji-par-16": replace(_PAR, out=Path("runs/emoji-par-16"), model_options='{"regions": 16}'),
    # clusters of 32 codes: labels of clusters first, then all codes in one pass; emoji-raster-4096 is the flat model
    "emoji-ctf": replace(
        _NAR,
        out=Path("runs/emoji-ctf"),
        family="coarse_to_fine",
        tokenizer="emoji-vq-4096",
        num_layers=5,
        model_options='{"fine_layers": 3}',
    ),
    "emoji-dar-tokenizer": _DAR_TOKENIZER,
    "emoji-dar": replace(
        _NAR, out=Path("runs/emoji-dar"), family="raster", tokenizer="emoji-dar-tokenizer", num_layers=9
    ),
    # 32 x 32 as 8 x 8 ids; not augmented: shoes look one way, and the ground is black
    "fashion-vq": replace(
        _VQ,
        out=Path("runs/fashion-vq"),
        data=Path("fashion.zip"),
        model_options='{"base_channels": 64}',
        codebook_size=512,
        augment="none",
        perceptual_weight=2.0,
        steps=1500,
        batch_size=256,
    ),
    "fashion-raster": replace(
        _RASTER,
        out=Path("runs/fashion-raster"),
        data=Path("fashion.zip"),
        tokenizer="runs/fashion-vq/model",
        augment="none",
        variants=1,
        num_layers=6,
        batch_size=512,
        steps=2500,
        optimizer="muon",
        learning_rate=3e-3,
        dropout=0.2,
        model_options='{"token_input": "codebook", "prefix_rotation": "identity"}',
    ),
    "emoji-msvq": _MSVQ,
    "emoji-var": _VAR,
    # takes over from emoji-var at finer scales (CoDe): four of its nine layers, taught by it; dropout would hold back
    # what is too small to remember
    "emoji-var-small": replace(
        _VAR,
        out=Path("runs/emoji-var-small"),
        initial=Path("emoji-var"),
        initial_layers=(0, 3, 5, 8),
        num_layers=4,
        teacher="emoji-var",
        learning_rate=2e-3,
        dropout=0.0,
        model_options='{"shared_adaln": true}',
    ),
    "emoji-hmar": _HMAR,
    # needs initial, the model of the first phase
    "emoji-hmar-refinement": replace(_HMAR, out=Path("runs/emoji-hmar-refinement"), phase="refinement", steps=4000),
    "emoji-raster-eagle": _EAGLE,
    "emoji-raster-4096-eagle": replace(
        _EAGLE, out=Path("runs/emoji-raster-4096-eagle"), target="emoji-raster-4096", variants=6, steps=1000
    ),
    "emoji-raster-heads": replace(_EAGLE, out=Path("runs/emoji-raster-heads"), kind="heads", steps=4000),
}
