"""Students of Distilled Decoding's authors: what their parts do, and files in their layout."""

import pytest
import torch
from torch.nn import functional

from visar.checkpoints import hub, llamagen, var
from visar.checkpoints.convert import read_models
from visar.checkpoints.options import Convert
from visar.core.condition import Condition
from visar.core.noise import Noise
from visar.generators.one_step import OneStepGenerator
from visar.generators.released_student import ReleasedStudent
from visar.pipelines.image import ImagePipeline
from visar.samplers.one_step import sample_one_step
from visar.tokenizers.multiscale_vq import MultiScaleVQTokenizer
from visar.tokenizers.vq import VQTokenizer

SMALL = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=16)
SIZES = dict(vocab_size=16, width=16, num_layers=2, num_heads=2, num_classes=3)


def filled(module):
    torch.manual_seed(0)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            torch.nn.init.normal_(value, std=0.3)
            if name.endswith("norm.weight"):
                value.data += 1.0
    return module.eval()


def tokenizer(kind: str):
    if kind == "raster":
        return filled(VQTokenizer(image_size=8, latent_channels=8, codebook_dim=4, **SMALL))
    return filled(MultiScaleVQTokenizer(scales=(1, 2, 4), codebook_dim=4, **SMALL))


def student(kind: str, made: type = ReleasedStudent):
    if kind == "raster":
        own = dict(grid=[4, 4], hidden_width=24, token_input="codebook", codebook_width=4)
        name, start, late = "RasterGPT", 5, 8
    else:
        own, name, start, late = dict(scales=[1, 2, 4], codebook_width=4), "NextScaleTransformer", 2, 2
    model = filled(made(name, {**SIZES, **own}, starts=(0, start), output="vectors", late=late))
    if kind == "raster":
        model.network.set_codebook(tokenizer(kind).codebook)
    else:
        model.network.set_tokenizer(tokenizer(kind).quantizer)
    return model


def in_their_layout(model) -> dict[str, torch.Tensor]:
    """The weights under the names of the released files."""
    names = {"kind.": "n_d_embed.", "kind_layers.": "layerwise_n_d_embed.", "vector_head.": "final_layer_conti."}
    names |= {"network.": "", "codebook_proj.": "tok_embeddings.", "condition_vector.": ""}
    state = {}
    for key, value in model.state_dict().items():
        if "pyramid." in key or key == "network.codebook":
            continue
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
        state[key] = value.clone()
    if "pos_1LC" in state:
        cell = torch.randn(2, 1, 1, 16)
        state["pos_start"] = state["pos_start"] - cell.sum(0)
        state["pos_1LC"] = torch.cat([cell[0], state["pos_1LC"]], dim=1)
        state["lvl_embed.weight"] = torch.cat([cell[1, 0], state["lvl_embed.weight"]])
        state["lvl_1L"] = torch.zeros(1, 22, dtype=torch.int64)
        state["attn_bias_for_masking"] = torch.zeros(1, 1, 22, 22)
        state |= {f"blocks.{index}.attn.zero_k_bias": torch.zeros(16) for index in range(2)}
    return state


def inputs(count: int, tokens: int):
    known = torch.arange(tokens) < 5
    return torch.randn(count, tokens, 4), known, Condition(labels_BA=torch.arange(count)[:, None] % 3)


@pytest.mark.parametrize("kind", ["raster", "scales"])
@torch.no_grad()
def test_files_are_converted_and_sampled(tmp_path, kind):
    model, vq = student(kind), tokenizer(kind)
    other = {key: value + 1.0 for key, value in in_their_layout(model).items()}
    if kind == "raster":
        content = {"ema": in_their_layout(model), "model": other}
        torch.save(llamagen.export_vq(vq), tmp_path / "vq.pt")
        options = dict(grid=(4, 4), num_heads=2)
    else:
        content = {"trainer": {"ema_parameters": in_their_layout(model), "var_wo_ddp": other}}
        torch.save(var.export_vq(vq), tmp_path / "vq.pt")
        options = dict(scales=(1, 2, 4))
    torch.save(content, tmp_path / "student.pt")
    models = read_models(Convert(tmp_path / "student.pt", tmp_path / "out", tmp_path / "vq.pt", **options))
    made = models.generator
    assert models.source == "distilled_decoding" and isinstance(made, ReleasedStudent)
    assert made.config["starts"] == (0, 5 if kind == "raster" else 2)
    assert made.config["late"] == (8 if kind == "raster" else 2) and made.config["output"] == "vectors"
    arguments = inputs(2, made.num_tokens)
    for ours, theirs in zip(made(*arguments), model(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    pipeline = ImagePipeline(models.tokenizer, made, defaults=models.defaults)
    pipeline.save_pretrained(tmp_path / "saved")
    pipe = ImagePipeline.from_pretrained(tmp_path / "saved")
    pipe.set_progress_bar_config(disable=True)
    out = pipe(num_images=1, seed=1, class_labels=[0, 2], sampler_options={"steps": 2}, output_type="pt")
    assert out.statistics.forward_passes == {"generator": 2} and len(out.images) == 2
    with pytest.raises(ValueError, match="a student includes its tokenizer's codes; say tokenizer"):
        read_models(Convert(tmp_path / "student.pt", tmp_path / "out", **options))


@pytest.mark.parametrize("kind", ["raster", "scales"])
@torch.no_grad()
def test_a_student_without_what_is_released_is_one_of_ours(kind):
    """No marks: logits are those of our students with the same network; vectors are the second head by its formula."""
    model, ours = student(kind), student(kind, OneStepGenerator)
    ours.network.load_state_dict(model.network.state_dict())
    for part in (model.kind, ours.kind, *model.kind_layers):
        for parameter in part.parameters():
            torch.nn.init.zeros_(parameter)
    vectors, known, condition = inputs(2, model.num_tokens)
    logits, _ = model(vectors, known, condition)
    torch.testing.assert_close(logits, ours(vectors, known, condition)[0], atol=1e-4, rtol=1e-4)
    hidden, cell = torch.randn(2, 5, 16), torch.randn(2, 1, 16)
    shift, scale = (model.vector_head.scale_shift_table[row] + cell for row in (0, 1))
    expected = functional.layer_norm(hidden, (16,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(model.vector_head(hidden, cell), model.vector_head.linear(expected))


@pytest.mark.parametrize("kind", ["raster", "scales"])
@torch.no_grad()
def test_marks_reach_the_predictions_and_inputs_only_later_ones(kind):
    model = student(kind)
    vectors, known, condition = inputs(1, model.num_tokens)
    before = model(vectors, known, condition)
    marked = model(vectors, ~known, condition)
    assert all((one - other).abs().amax(-1).min() > 1e-6 for one, other in zip(before, marked, strict=True))
    changed = vectors.clone()
    changed[:, 3] += 1.0
    after = model(changed, known, condition)
    seen = [
        ((one - other).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()
        for one, other in zip(before, after, strict=True)
    ]
    later = list(range(3, 16)) if kind == "raster" else [3, *range(5, 21)]
    assert seen == [later, later]
    images = [sample_one_step(model, condition, noise=Noise([7]), steps=steps).tokens for steps in (1, 2)]
    assert torch.equal(images[0][:, :5], images[1][:, :5])


def test_released_students_have_names():
    names = {name: entry for name, entry in hub.official().items() if entry.source == "distilled_decoding"}
    assert set(names) == {"dd1-llamagen-b", "dd1-llamagen-l", "dd1-var-d16", "dd1-var-d20", "dd1-var-d24"}
    assert names["dd1-var-d20"].file == "VAR-DD/var-d20.pth"
    assert names["dd1-llamagen-l"].tokenizer_file == "vq_ds16_c2i.pt"
    assert all(entry.defaults["sampler"] == "one_step" for entry in names.values())
