"""The pipeline: conditions, seeds, output types, save and load, and what it says to bad input."""

import numpy as np
import PIL.Image
import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.data.vocabulary import build_vocabulary
from visar.generators.raster import RasterGPT
from visar.pipelines.components import load_tokenizer
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.relaxed import neighbour_table
from visar.tokenizers.vq import VQTokenizer

ATTRIBUTES = {"class": ("animal/cat", "animal/dog", "fruit/apple"), "style": ("ink", "oil")}
LABELS = np.array([[0, 0], [0, 1], [1, 0], [2, 1], [2, 1]])
CAPTIONS = [
    "black cat, ink style",
    "grey cat, oil style",
    "black dog, ink style",
    "red apple, oil style",
    "apple, oil style",
]


def make(words: bool = False) -> ImagePipeline:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(
        image_size=8,
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=8,
        codebook_size=16,
    )
    vocabulary = build_vocabulary(ATTRIBUTES, LABELS, CAPTIONS if words else None, np.arange(5))
    sizes = dict(vocab_size=16, grid=(4, 4), width=16, num_layers=1, num_heads=2, hidden_width=24)
    if words:
        conditions = dict(
            num_classes=0, word_vocab_size=len(vocabulary.words), num_words=vocabulary.num_words, words="prefix"
        )
    else:
        conditions = dict(num_classes=3, attributes=(2,), token_input="codebook", codebook_width=8)
    generator = RasterGPT(**sizes, **conditions)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if not words:
        generator.set_codebook(tokenizer.codebook)
    pipeline = ImagePipeline(
        tokenizer.eval(), generator.eval(), vocabulary.to_dict(), {"guidance_scale": 1.5, "top_k": 12}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def classes() -> ImagePipeline:
    return make()


@pytest.fixture(scope="module")
def texts() -> ImagePipeline:
    return make(words=True)


def test_images_by_name_number_and_from_the_training_distribution(classes):
    out = classes("cat", num_images=3, seed=0)
    assert len(out.images) == 3 and isinstance(out.images[0], PIL.Image.Image) and out.images[0].size == (8, 8)
    assert all(text.startswith("animal/cat") for text in out.descriptions)
    assert torch.equal(classes(0, num_images=3, seed=0).tokens, out.tokens)
    open_ended = classes(num_images=40, seed=0)
    drawn = [text.split(",")[0] for text in open_ended.descriptions]
    assert set(drawn) == set(ATTRIBUTES["class"])
    two = classes(["dog", "animal/cat"], num_images=2, seed=0)
    assert [text.split(",")[0] for text in two.descriptions] == ["animal/dog"] * 2 + ["animal/cat"] * 2


@pytest.mark.parametrize("kind", ["classes", "texts"])
def test_same_seed_same_image_at_any_batch_size_and_in_any_order(kind, request):
    pipeline = request.getfixturevalue(kind)
    whole = pipeline(num_images=6, seed=10)
    assert torch.equal(pipeline(num_images=6, seed=10, batch_size=4).tokens, whole.tokens)
    shuffled = pipeline(num_images=6, seeds=[15, 10, 12, 11, 14, 13])
    assert torch.equal(shuffled.tokens, whole.tokens[[5, 0, 2, 1, 4, 3]])
    alone = pipeline(num_images=1, seed=13)
    assert torch.equal(alone.tokens[0], whole.tokens[3]) and alone.descriptions[0] == whole.descriptions[3]
    assert np.array_equal(np.asarray(alone.images[0]), np.asarray(whole.images[3]))


def test_prompts(texts):
    out = texts(prompt="Black cat, ink style", num_images=2, seed=3)
    assert out.descriptions == ["Black cat, ink style"] * 2
    same = texts(prompt=["a black cat in ink", "red apple"], seed=3)
    assert torch.equal(same.tokens[0], out.tokens[0])


def test_output_types_and_generators(classes):
    pil = classes(num_images=2, seed=4)
    array = classes(num_images=2, seed=4, output_type="np").images
    tensor = classes(num_images=2, seed=4, output_type="pt").images
    assert array.shape == (2, 8, 8, 3) and tensor.shape == (2, 3, 8, 8)
    assert 0.0 <= float(tensor.min()) and float(tensor.max()) <= 1.0
    assert np.array_equal(np.asarray(pil.images[1]), np.round(array[1] * 255).astype(np.uint8))
    one = classes(num_images=2, generator=torch.Generator().manual_seed(5))
    again = classes(num_images=2, seeds=one.seeds)
    assert torch.equal(one.tokens, again.tokens) and one.seeds[0] != one.seeds[1]
    each = classes(num_images=2, generator=[torch.Generator().manual_seed(s) for s in (5, 6)])
    assert each.seeds[0] == one.seeds[0]


def test_defaults_and_guidance(classes):
    base = classes("cat", seed=1, num_images=8)
    explicit = classes("cat", seed=1, num_images=8, guidance_scale=1.5, top_k=12, temperature=1.0, top_p=1.0)
    assert torch.equal(base.tokens, explicit.tokens)
    assert torch.equal(classes("cat", seed=1, num_images=8, guidance_scale=Guidance(1.5)).tokens, base.tokens)
    assert not torch.equal(classes("cat", seed=1, num_images=8, guidance_scale=6.0).tokens, base.tokens)


def test_a_scale_keeps_the_rest_of_the_default_guidance(classes):
    pipeline = ImagePipeline(
        classes.tokenizer,
        classes.generator,
        classes.vocabulary.to_dict(),
        {"guidance": {"scale": 3.0, "convention": "extrapolate", "schedule": "linear", "start": 1.0}},
    )
    given = pipeline.sampling_settings(guidance_scale=4.0)["guidance"]
    assert given.scales(3) == pipeline.sampling_settings()["guidance"].scales(3) == [2.0, 3.0, 4.0]


def test_attributes_without_a_class():
    """What `visar train generator --no-class-condition --words sum` makes of images with attributes."""
    pipeline = make(words=True)
    config = {name: value for name, value in pipeline.generator.config.items() if not name.startswith("_")}
    generator = RasterGPT(**(config | dict(attributes=(2,), words="sum"))).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipeline = ImagePipeline(pipeline.tokenizer, generator, pipeline.vocabulary.to_dict(), {"guidance_scale": 1.5})
    pipeline.set_progress_bar_config(disable=True)
    for given, style in ((dict(attributes={"style": "oil"}), 1), (dict(prompt=["black cat", "dog"]), 2)):
        condition, _ = pipeline.prepare_condition([3, 4], None, given.get("prompt"), given.get("attributes"))
        assert condition.labels_BA.tolist() == [[style], [style]] and condition.words_BT is not None
        count = 1 if "prompt" in given else 2
        assert pipeline(**given, num_images=count, seed=3).tokens.shape == (2, 16)
    assert pipeline(num_images=2, seed=3).tokens.shape == (2, 16)


def test_a_table_of_neighbours_goes_before_the_codebook(classes):
    settings = dict(sampler="lantern", seed=1, num_images=2)
    options = dict(max_moved=0.2, num_neighbours=3, tree="static", branches=(2, 1))
    table = neighbour_table(classes.tokenizer.codebook, 3)
    expected = classes("cat", sampler_options=options, **settings)
    found = classes("cat", sampler_options=options | dict(neighbours=table), **settings)
    assert torch.equal(found.tokens, expected.tokens)


def test_callback_sees_tokens_as_they_come(classes):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        seen.append((step, int(kwargs["tokens"][0, step])))
        return kwargs

    out = classes("cat", seed=2, callback_on_step_end=callback)
    assert seen == list(enumerate(out.tokens[0].tolist()))


def test_explicit_condition(classes):
    condition = Condition(labels_BA=torch.tensor([[0, 0], [3, 2]]))
    assert classes(condition=condition, seed=0).tokens.shape == (2, 16)


def test_save_and_load(classes, texts, tmp_path):
    for pipeline, condition in ((classes, dict(class_labels="dog")), (texts, dict(prompt="red apple"))):
        folder = tmp_path / next(iter(condition))
        pipeline.save_pretrained(folder)
        loaded = load(folder, device="cpu")
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded(**condition, seed=3).tokens, pipeline(**condition, seed=3).tokens)
        assert loaded.vocabulary.attributes == pipeline.vocabulary.attributes
        assert not list(folder.rglob("*.bin")) and list(folder.rglob("*.safetensors"))
    tokenizer = load_tokenizer(tmp_path / "prompt" / "tokenizer", device="cpu")
    ids = torch.randint(16, (1, 16))
    with torch.no_grad():
        assert torch.equal(tokenizer.decode(ids), texts.tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(class_labels="cta"), "unknown class 'cta'; nearest: cat"),
        (dict(class_labels=3), r"class 3; the numbers are 0 \.\.\. 2"),
        (dict(class_labels=-1), "class -1"),
        (dict(prompt="red apple"), "conditioned on classes"),
        (dict(class_labels="cat", prompt="red apple"), "not both"),
        (dict(attributes={"style": "chalk"}), "unknown style 'chalk'"),
        (dict(attributes={"mood": "ink"}), "unknown attribute 'mood'; this model has class, style"),
        (dict(class_labels="dog", attributes={"style": "oil"}), "no training image has style 'oil'.*occur with: ink"),
        (dict(num_images=0), "num_images 0"),
        (dict(num_images=-2), "num_images -2"),
        (dict(num_images=1.5), "num_images 1.5"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(top_p=0.0), r"top_p 0.0; it must be in \(0, 1\]"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(top_p=[0.9, 0.5]), r"ancestral: top_p \[0.9, 0.5\]; allowed: a number \(one per scale: next_scale"),
        (dict(temperature="hot"), "sampler ancestral: temperature 'hot'; allowed: a number"),
        (dict(top_k=-1), "top_k -1"),
        (dict(temperature=0.0), "temperature 0.0"),
        (dict(guidance_scale=-1.0), "guidance scale -1.0"),
        (dict(output_type="jpeg"), "output_type 'jpeg'; choose one of pil, pt, np"),
        (dict(sampler="jacoby"), "unknown sampler 'jacoby'"),
        (dict(sampler_options={"windw": 3}), "has no setting 'windw'"),
        (dict(sampler="jacobi", sampler_options="window=16"), "sampler_options 'window=16'; give a dictionary"),
        (dict(sampler="jacobi", sampler_options={"window": 2.0}), "window 2.0; allowed: a whole number"),
        (dict(class_labels=1.5), "class_labels 1.5; a name or a whole number"),
        (dict(class_labels=[]), "class_labels is empty"),
        (dict(guidance_scale="high"), "guidance_scale 'high'; give a number"),
        (dict(seed="a"), "seed 'a'; it must be a whole number"),
        (dict(seeds=[1.5]), "seed 1.5; it must be a whole number"),
        (dict(top_k=2.0), "top_k 2.0; allowed: a whole number"),
        (dict(condition=Condition(labels_BA=torch.tensor([[0, 0]])), class_labels=1), "condition says everything"),
        (dict(num_images="3"), "num_images '3'"),
        (dict(batch_size=1.5), "batch_size 1.5"),
        (dict(attributes="style=ink"), "attributes 'style=ink'; give a dictionary"),
        (dict(seeds=1), "seeds 1; give one per image"),
        (dict(generator=5), "generator 5; a torch.Generator"),
        (dict(sampler=["jacobi"]), "unknown sampler"),
        (dict(seed=-1), "seed -1"),
        (dict(seed=1, seeds=[1]), "one of seed, seeds and generator"),
        (dict(seeds=[1, 2]), "2 seeds for 1 images"),
        (dict(generator=[torch.Generator()], num_images=2), "1 generators for 2 images"),
    ],
)
def test_bad_input(classes, arguments, message):
    with pytest.raises(ValueError, match=message):
        classes(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sampler="jacoby"), "unknown sampler 'jacoby'"),
        (dict(sampler="next_scale"), "does not fit a RasterGPT; samplers that do: ancestral, jacobi, speculative"),
        (dict(sampler="speculative", sampler_options={"drafter": "nope"}), "unknown drafter 'nope'"),
        (dict(sampler="jacobi", sampler_options={"windw": 3}), "has no setting 'windw'"),
        (dict(sampler="jacobi", sampler_options={"window": 0}), "window 0; allowed: 1 ... 4096"),
        (dict(sampler="speculative", sampler_options={"num_drafts": 0}), "num_drafts 0; allowed: 1 ... 1000"),
        (dict(sampler="static_tree", sampler_options={"branches": "2,0"}), "branches"),
        (dict(sampler="lantern"), "give max_moved"),
        (dict(sampler="grouped", sampler_options={"group": 0}), "group 0; allowed: 1 ... 1048576"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(top_p=[0.9, 0.5]), "allowed: a number"),
        (dict(guidance_scale=-1.0), "guidance scale -1.0"),
    ],
)
def test_settings_are_checked_without_drawing(classes, settings, message, monkeypatch):
    monkeypatch.setattr(RasterGPT, "start", lambda *_, **__: pytest.fail("something was drawn"))
    classes.check_settings(sampler="jacobi", sampler_options={"window": 4}, top_k=3, guidance_scale=2.0)
    with pytest.raises(ValueError, match=message):
        classes.check_settings(**settings)


def test_a_pipeline_shows_itself_in_a_few_lines(classes, texts):
    shown = repr(classes).splitlines()
    assert len(shown) == 5
    assert "RasterGPT" in shown[1] and "16 tokens of 16 codes" in shown[1]
    assert shown[3].split() == ["conditions", "class", "(3),", "style", "(2)"]
    assert "guidance_scale 1.5, top_k 12" in shown[4]
    assert repr(texts).splitlines()[3].split() == ["conditions", "words"]


@pytest.mark.parametrize(
    "labels", [[1, 2], ("dog", 2), torch.tensor([1, 2]), np.array([1, 2]), [np.int64(1), torch.tensor(2)]], ids=str
)
def test_classes_in_any_form(classes, labels):
    expected = classes(class_labels=[1, 2], seed=3)
    assert torch.equal(classes(class_labels=labels, seed=np.int64(3)).tokens, expected.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(class_labels="cat"), "conditioned on words"),
        (dict(prompt="blak cat"), "does not know: 'blak'; nearest: black"),
        (dict(prompt=" , "), "has no word"),
        (dict(prompt=5), "prompt 5; a text is needed"),
        (dict(prompt=["black cat", None]), "prompt None; a text is needed"),
        (dict(prompt="cat cat cat cat cat cat"), "6 words; this model reads up to"),
        (dict(prompt="cat", attributes={"style": "ink"}), "a prompt says everything"),
    ],
)
def test_bad_prompts(texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        texts(**arguments)


def test_bad_places(tmp_path):
    for name, message in (
        ("emoji-rastr", "unknown model 'emoji-rastr'"),
        (tmp_path, "no model_index.json"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name)
    with pytest.raises(ValueError, match="unknown model"):
        load_tokenizer("nothing")
    for arguments, message in (
        (dict(device="gpu"), "unknown device 'gpu'"),
        (dict(dtype="half"), "dtype 'half'; choose one of float32, bfloat16, float16"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **arguments)


def test_damaged_folders(classes, tmp_path):
    classes.save_pretrained(tmp_path)
    weights = tmp_path / "generator" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load(tmp_path, device="cpu")
    weights.unlink()
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load(tmp_path, device="cpu")
