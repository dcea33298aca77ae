"""Clips as their authors' code makes them: LARP's tokenizer and NAR's generator on a box, and their released sizes."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from visar import load
from visar.checkpoints import larp, nar
from visar.cli.main import main
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.next_neighbor import NEXT_NEIGHBOR_BOXES, NextNeighborTransformer
from visar.pipelines.video import VideoPipeline
from visar.samplers.ancestral import sample_ancestral
from visar.tokenizers.decoding import decode_tokens
from visar.tokenizers.families import load_family
from visar.tokenizers.larp import LARP_PRESETS, LARPTokenizer

# Names of NAR's heads: right, down, back (the next frame), in the order of ours.
_NAMES = {"abs_pe": "position_embedding", "norm_R.weight": "norm.weight", "output_R.weight": "output.weight"}
for _number, _head in enumerate("DB"):
    _NAMES[f"norm_{_head}.weight"] = f"other_norms.{_number}.weight"
    _NAMES[f"output_{_head}.weight"] = f"other_outputs.{_number}.weight"


class Recorded:
    """The fixture: both models, and what the authors' code made of them."""

    def __init__(self, folder) -> None:
        self.config = folder.config
        self.io = load_file(folder.folder / "io.safetensors")
        sizes = self.config["tokenizer"]
        box = tuple(self.config["ar"]["latent_shape"])
        self.tokenizer = LARPTokenizer(
            image_size=sizes["input_size"],
            num_frames=sizes["frame_num"],
            patch=(sizes["temporal_patch_size"], sizes["patch_size"], sizes["patch_size"]),
            box=box,
            width=sizes["encoder_hidden_size"],
            num_layers=sizes["encoder_depth"],
            num_heads=sizes["encoder_num_heads"],
            codebook_size=sizes["codebook_size"],
            codebook_dim=sizes["bottleneck_dim"],
        ).eval()
        self.made_embeddings = {name: value.clone() for name, value in self.tokenizer.named_buffers()}
        self.tokenizer.load_state_dict(load_file(folder.folder / "checkpoint-tokenizer.safetensors"))
        sizes = self.config["ar"]
        state = load_file(folder.folder / "checkpoint.safetensors")
        self.generator = NextNeighborTransformer(
            vocab_size=sizes["vocab_size"],
            grid=box,
            width=sizes["dim"],
            num_layers=sizes["n_layer"],
            num_heads=sizes["n_head"],
            hidden_width=state["layers.0.feed_forward.w1.weight"].shape[0],
            num_classes=sizes["num_classes"],
            positions="learned",
        ).eval()
        renamed = {_NAMES.get(key, key): value for key, value in state.items()}
        renamed["position_embedding"] = renamed["position_embedding"][0]
        self.generator.load_state_dict(renamed)

    @property
    def clip(self) -> Tensor:
        """Clips [B, T, 3, H, W] in [-1, 1]; recorded ones are [B, 3, T, H, W] in [0, 1]."""
        return self.io["tok.video"].transpose(1, 2) * 2 - 1

    def condition(self) -> Condition:
        return Condition(labels_BA=self.io["tf.labels"][:, None])


@pytest.fixture
def recorded(parity) -> Recorded:
    return Recorded(parity("nar-video"))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
def test_parity_of_the_tokenizer(recorded):
    model, io = recorded.tokenizer, recorded.io
    for name in ("encoder_patch_pe", "decoder_latent_pe", "decoder_patch_query_embed"):
        close(recorded.made_embeddings[name], model.get_buffer(name))
    close(model.codebook, io["tok.codebook"])
    close(model.encode_latents(recorded.clip).flatten(2).transpose(1, 2), io["tok.projected_z"])
    assert torch.equal(model.encode(recorded.clip), io["tok.indices"])
    latents = model.latents(io["tok.indices"])
    close(latents.flatten(2).transpose(1, 2), io["tok.quantized"])
    close((model.decode(io["tok.indices"]).transpose(1, 2) + 1) / 2, io["tok.recon"])
    close((model(recorded.clip).clip_BTCHW.transpose(1, 2) + 1) / 2, io["tok.recon_via_forward"])


@torch.no_grad()
def test_parity_of_the_generator(recorded):
    model, io = recorded.generator, recorded.io
    close(model(io["tf.idx"], recorded.condition()), io["tf.mixed"])
    null = model.null_condition(recorded.condition())
    close(model(io["tf.idx"], null), io["tf_uncond.mixed"])
    order = model.tables(torch.device("cpu")).place_N
    assert torch.equal(order, io["decode_order"])


@torch.no_grad()
def test_parity_of_greedy_clips_and_of_their_pixels(recorded):
    model, io = recorded.generator, recorded.io
    noise = Noise([0, 1])
    for name, scale in (("greedy_nocfg", 1.0), ("greedy_cfg", recorded.config["cfg_scale"])):
        out = sample_ancestral(model, recorded.condition(), noise=noise, guidance=Guidance(scale), top_k=1)
        tokens = io[f"{name}.tokens"].long()
        assert torch.equal(out.tokens, tokens), name
        assert out.statistics.forward_passes == {"generator": int(io[f"{name}.num_forwards"])}
        assert int(io[f"{name}.num_forwards"]) == sum(model.config["grid"]) - 2
    # The recorded clip is of the first sequence without guidance or with it, not clamped.
    made = [
        decode_tokens(recorded.tokenizer, io[f"{name}.tokens"][:1].long()) for name in ("greedy_cfg", "greedy_nocfg")
    ]
    errors = [float(((each.transpose(1, 2) + 1) / 2 - io["gen.video"]).abs().max()) for each in made]
    assert min(errors) < 1e-4, errors


def test_released_sizes_are_those_of_the_manifests(parity):
    def shapes(model: Any) -> dict[str, list[int]]:
        return {key: list(value.shape) for key, value in model.state_dict().items()}

    seen = 0
    for path in parity("nar-video").manifests():
        manifest = json.loads(path.read_text())
        wanted = {key: shape for key, (shape, _) in manifest["tensors"].items() if not key.startswith("prior_model.")}
        with torch.device("meta"):
            if "LARP" in path.name:
                assert shapes(LARPTokenizer(**LARP_PRESETS["larp-l-long"])) == wanted
            else:
                name = "nar-ucf101-lp" if "LP" in path.name else "nar-ucf101-l"
                found = shapes(NextNeighborTransformer(**NEXT_NEIGHBOR_BOXES[name]))
                renamed = {_NAMES.get(key, key): shape for key, shape in wanted.items()}
                renamed["position_embedding"] = renamed["position_embedding"][1:]
                assert found == renamed
        seen += 1
    assert seen == 3


# ------------------------------------------------------------------------------------------------------- conversion
def test_parity_of_converted_files(recorded, parity):
    folder = parity("nar-video").folder
    box, heads = tuple(recorded.config["ar"]["latent_shape"]), recorded.config["tokenizer"]["encoder_num_heads"]
    sizes = recorded.config["tokenizer"]
    patches = tuple(
        recorded.config["tokenizer"][total] // recorded.config["tokenizer"][part]
        for total, part in (("frame_num", "temporal_patch_size"), *[("input_size", "patch_size")] * 2)
    )
    file = folder / "checkpoint-tokenizer.safetensors"
    tokenizer = larp.load_tokenizer(file, patches=patches, box=box, num_heads=heads)
    assert dict(tokenizer.config) == dict(recorded.tokenizer.config)
    assert torch.equal(tokenizer.encode(recorded.clip), recorded.io["tok.indices"])
    content = dict(load_file(file))
    assert larp.TOKENIZER.sniff({"model": {"sd": content}}) and not nar.BOX.sniff(content)
    content["prior_model.head.bias"] = torch.zeros(3)
    config, state = larp.convert_tokenizer({"model": {"sd": content}}, patches=patches, box=box, num_heads=heads)
    assert config["codebook_size"] == sizes["codebook_size"] and not any("prior" in key for key in state)
    for changes, message in (
        (dict(), "clips of 32 patches; the released model has 4 x 16 x 16"),
        (dict(patches=patches, box=(1, 4, 4)), "clips of 32 codes"),
        (dict(patches=patches), "width 48 is of no released size; give num_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            larp.convert_tokenizer(content, **changes)


def test_files_of_a_released_shape_become_a_folder_of_clips(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = dict(width=64, num_layers=1, num_heads=1, codebook_size=32, codebook_dim=8)
    tokenizer = LARPTokenizer(**sizes).eval()
    generator = NextNeighborTransformer(
        vocab_size=32, grid=larp.RELEASED, width=16, num_layers=1, num_heads=2, hidden_width=32, num_classes=3,
        positions="learned",
    )  # fmt: skip
    torch.save(tokenizer.state_dict() | {"prior_model.x": torch.zeros(1)}, tmp_path / "larp.pt")
    torch.save(nar.export_generator(generator), tmp_path / "nar.pt")
    names = [str(tmp_path / name) for name in ("nar.pt", "larp.pt", "out")]
    assert main(["convert", names[0], "--tokenizer", names[1], "--num-heads", "2", "--out", names[2]]) == 0
    assert "LARPTokenizer" in capsys.readouterr().out
    pipeline = load(names[2], device="cpu")
    assert isinstance(pipeline, VideoPipeline) and pipeline.generator.num_tokens == 1024
    assert pipeline.sampling_settings()["guidance"].scale == 1.25
    assert torch.equal(pipeline.tokenizer.encoder_latent_query_embed, tokenizer.encoder_latent_query_embed)
    wrong = dict(tokenizer.state_dict())
    wrong["bottleneck.regularizer.embedding.weight"] = torch.zeros(31, 8)
    torch.save(wrong, tmp_path / "larp.pt")
    assert main(["convert", names[0], "--tokenizer", names[1], "--num-heads", "2", "--out", f"{names[2]}2"]) == 1
    assert "predicts 32 codes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the tokenizer alone
def test_a_clip_of_another_shape_is_refused():
    torch.manual_seed(0)
    model = LARPTokenizer(**load_family("larp").tiny).eval()
    clip = torch.rand(2, 2, 3, 8, 8) * 2 - 1
    ids = model.encode(clip)
    assert ids.shape == (2, 32) and model.layout.shapes == ((2, 4, 4),) and model.decode(ids).shape == clip.shape
    made = model(clip)
    assert torch.equal(made.ids_BN, ids)
    (made.clip_BTCHW.square().mean() + made.commitment_loss + made.codebook_loss).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    for call, message in (
        (
            lambda: model.encode(clip[:, :1]),
            r"clip of \(1, 8, 8\) frames, rows and columns; this tokenizer reads \(2, 8",
        ),
        (lambda: model.decode(ids[:, :16]), "16 ids in no grid; needed: 32"),
        (lambda: LARPTokenizer(patch=(3, 8, 8)), "do not fill a clip of"),
        (lambda: LARPTokenizer(width=50), "width 50"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
