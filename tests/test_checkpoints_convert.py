"""Folders from other projects' files: they load and give the tokens of the models themselves; refused files."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from visar.checkpoints import hmar, llamagen, var
from visar.checkpoints.code import load_pair
from visar.checkpoints.convert import find_rows
from visar.checkpoints.options import Convert
from visar.checkpoints.rows import all_rows, sources_of
from visar.cli.convert import convert
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.pipelines.components import load_tokenizer
from visar.pipelines.loading import load
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.collaborative import sample_collaborative
from visar.samplers.masked_refinement import sample_masked_refinement
from visar.samplers.next_scale import sample_next_scale


def write(tmp_path: Path, parity, system: str, name: str, checkpoint: str = "checkpoint.safetensors") -> Path:
    """A system's weights as a file of the given name."""
    path = tmp_path / name
    state = parity(system).checkpoint(checkpoint)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def raster_files(tmp_path, parity) -> tuple[Path, Path, tuple[int, int], int]:
    folder = parity("llamagen_gpt_c2i")
    return (
        write(tmp_path, parity, "llamagen_gpt_c2i", "c2i.pt"),
        write(tmp_path, parity, "llamagen_vq", "vq.pt"),
        tuple(folder.config["derived"]["grid"]),
        folder.config["constructor"]["ModelArgs"]["n_head"],
    )


def scale_tokenizer(parity, path: Path, system: str):
    return var.load_vq(path, scales=parity(system).config["patch_nums"])


@torch.no_grad()
def test_llamagen_folder_gives_the_models_own_tokens(parity, tmp_path):
    file, tokenizer_file, grid, num_heads = raster_files(tmp_path, parity)
    out = tmp_path / "deep" / "folder"
    line = convert(Convert(file, out, tokenizer_file, grid=grid, num_heads=num_heads, like="llamagen-c2i-l-384"))
    assert "RasterGPT" in line and "VQTokenizer" in line and str(out) in line
    assert line.splitlines()[1:] == [f"Next: visar sample {out} --class 3"]
    pipeline = load(out, device="cpu")
    direct = llamagen.load_gpt(file, grid=grid, num_heads=num_heads)
    labels = parity("llamagen_gpt_c2i").config["greedy_labels"]
    expected = sample_ancestral(
        direct,
        Condition(labels_BA=torch.tensor(labels)[:, None]),
        noise=Noise([0, 1]),
        guidance=Guidance(2.0),
        top_k=1,
    ).tokens
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(labels, seed=0, top_k=1, output_type="pt")
    assert torch.equal(result.tokens, expected)
    rows, columns = pipeline.tokenizer.layout.shapes[0]
    assert (rows, columns) == grid
    tokenizer = llamagen.load_vq(tokenizer_file)
    assert torch.allclose(result.images, (tokenizer.decode(expected).clamp(-1, 1) + 1) / 2, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("system", ["var", "var_saln"])
def test_var_folder_gives_the_models_own_tokens(system, parity, tmp_path):
    file = write(tmp_path, parity, system, "var.pth")
    tokenizer_file = write(tmp_path, parity, "var_vqvae", "vae.pth")
    heads = parity(system).config["num_heads"]
    line = convert(Convert(file, tmp_path / "out", tokenizer_file, num_heads=heads))
    assert "from var's var.pth" in line
    pipeline = load(tmp_path / "out", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    tokenizer = scale_tokenizer(parity, tokenizer_file, system)
    direct = var.load_transformer(file, tokenizer, num_heads=heads)
    assert pipeline.tokenizer.layout == tokenizer.layout
    for given, guidance in ((None, Guidance(1.5, "extrapolate", "linear")), (3.0, Guidance(3.0, schedule="linear"))):
        expected = sample_next_scale(
            direct,
            Condition(labels_BA=torch.tensor([[1], [2]])),
            noise=Noise([5, 6]),
            guidance=guidance,
            top_k=900,
            top_p=0.96,
        )
        result = pipeline([1, 2], seed=5, guidance_scale=given, output_type="pt")
        assert torch.equal(result.tokens, expected.tokens)
        images = tokenizer.decode_latents(expected.latent).clamp(-1, 1)
        assert torch.allclose(result.images, (images + 1) / 2, atol=1e-5)


@torch.no_grad()
def test_hmar_folder_from_the_released_layout_and_from_both_phases(parity, tmp_path):
    folder = parity("hmar")
    tokenizer_file = write(tmp_path, parity, "var_vqvae", "vae.safetensors")
    file = write(tmp_path, parity, "hmar", "hmar.pth")
    convert(Convert(file, tmp_path / "merged", tokenizer_file))
    pipeline = load(tmp_path / "merged", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    direct = hmar.load(file, scale_tokenizer(parity, tokenizer_file, "hmar"))
    settings = hmar.DEFAULTS.get(folder.config["depth"], hmar.DEFAULTS[16])
    expected = sample_masked_refinement(
        direct,
        Condition(labels_BA=torch.tensor([[1]])),
        noise=Noise([7]),
        guidance=Guidance(**settings["guidance"]),
        top_k=settings["top_k"],
        top_p=settings["top_p"],
    ).tokens
    assert torch.equal(pipeline(1, seed=7).tokens, expected)

    first, second = split_phases(folder.checkpoint())
    torch.save(first, tmp_path / "phase1.pth")
    torch.save(second, tmp_path / "phase2.pth")
    trained = folder.config["n_layers_train"]
    phases = Convert(
        tmp_path / "phase1.pth",
        tmp_path / "phases",
        tokenizer_file,
        second=tmp_path / "phase2.pth",
        refinement_layers=trained,
    )
    assert "HierarchicalMaskedTransformer" in convert(phases)
    again = HierarchicalMaskedTransformer.from_pretrained(tmp_path / "phases" / "generator").state_dict()
    for key, value in direct.state_dict().items():
        assert torch.equal(again[key], value), key


def split_phases(state: dict) -> tuple[dict, dict]:
    """The two training phases that `hmar.merge_phases` makes a file of."""
    depth = len({key.split(".")[1] for key in state if key.startswith("base_blocks.")})
    phases = []
    for end, other in (("ns", "mask"), ("mask", "ns")):
        phase = {}
        for key, value in state.items():
            if key.startswith(f"{other}_") and not key.startswith("mask_embed"):
                continue
            if key.startswith("base_blocks."):
                key = key.removeprefix("base_")
            elif key.startswith(f"{end}_blocks."):
                _, index, rest = key.split(".", 2)
                key = f"blocks.{int(index) + depth}.{rest}"
            elif key.startswith((f"{end}_head.", f"{end}_head_nm.")):
                key = key.removeprefix(f"{end}_")
            phase["word_embed.bias" if key == "word_embed_bias" else key] = value
        phases.append(phase)
    phases[0].pop("mask_embed.weight")
    return phases[0], phases[1]


@torch.no_grad()
def test_code_pair_in_two_folders(parity, tmp_path):
    heads = {name: parity("code").config[name]["num_heads"] for name in ("drafter", "refiner")}
    drafter = write(tmp_path, parity, "code", "drafter_8.pth", "checkpoint_drafter.safetensors")
    refiner = write(tmp_path, parity, "code", "refiner_8.pth", "checkpoint_refiner.safetensors")
    tokenizer_file = write(tmp_path, parity, "var_vqvae", "vae.pth")
    line = convert(Convert(drafter, tmp_path / "pair", tokenizer_file, second=refiner))
    assert "takes over at scale 8" in line and "drafter/" in line
    pipeline = load(tmp_path / "pair" / "drafter", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    follower = NextScaleTransformer.from_pretrained(tmp_path / "pair" / "refiner").eval()
    assert (pipeline.generator.config["num_heads"], follower.config["num_heads"]) == tuple(heads.values())
    pair = load_pair(drafter, refiner, scale_tokenizer(parity, tokenizer_file, "code"))
    stages = {"followers": [pair.refiner], "takes_over": [pair.takes_over]}
    expected = sample_collaborative(
        pair.drafter, Condition(labels_BA=torch.tensor([[1]])), noise=Noise([1]), top_k=20, **stages
    ).tokens
    options = {"followers": [follower], "takes_over": [8]}
    result = pipeline(
        1, seed=1, sampler="collaborative", sampler_options=options, guidance_scale=1.0, top_k=20, top_p=1.0
    )
    assert torch.equal(result.tokens, expected)


@torch.no_grad()
def test_one_model_alone_and_stored_dtypes(parity, tmp_path):
    file, tokenizer_file, grid, num_heads = raster_files(tmp_path, parity)
    assert "alone" in convert(Convert(tokenizer_file, tmp_path / "vq", grid=grid))
    tokenizer = load_tokenizer(tmp_path / "vq", device="cpu")
    direct = llamagen.load_vq(tokenizer_file)
    ids = torch.arange(grid[0] * grid[1])[None]
    assert torch.equal(tokenizer.decode(ids), direct.decode(ids)) and tokenizer.layout.shapes == (grid,)

    vae = write(tmp_path, parity, "var_vqvae", "vae.pth")
    scales = tuple(parity("var").config["patch_nums"])
    convert(Convert(vae, tmp_path / "vae", scales=scales, dtype="bfloat16"))
    stored = load_tokenizer(tmp_path / "vae", device="cpu")
    assert stored.layout == var.load_vq(vae, scales=scales).layout
    expected = torch.nn.Module.to(var.load_vq(vae, scales=scales), torch.bfloat16).state_dict()
    for key, value in stored.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[key].float()), key

    convert(Convert(file, tmp_path / "gpt", grid=grid, num_heads=num_heads, rope="1d"))
    generator = RasterGPT.from_pretrained(tmp_path / "gpt")
    assert generator.config["rope"] == "1d" and tuple(generator.config["grid"]) == grid
    convert(Convert(file, tmp_path / "like", num_heads=num_heads, like="llamagen-c2i-b-384"))
    assert tuple(RasterGPT.from_pretrained(tmp_path / "like").config["grid"]) == (24, 24)
    with pytest.raises(ValueError, match="holds one model"):
        load(tmp_path / "gpt", device="cpu")
    with pytest.raises(
        ValueError, match="RasterGPT is no class that may be loaded here; allowed: VQTokenizer, MultiScaleVQTokenizer"
    ):
        load_tokenizer(tmp_path / "gpt", device="cpu")


def test_trainer_checkpoints_hold_both(parity, tmp_path):
    content = {"trainer": {"var_wo_ddp": parity("var").checkpoint(), "vae_local": parity("var_vqvae").checkpoint()}}
    torch.save(content, tmp_path / "ar-ckpt.pth")
    convert(Convert(tmp_path / "ar-ckpt.pth", tmp_path / "out", num_heads=parity("var").config["num_heads"]))
    pipeline = load(tmp_path / "out", device="cpu")
    assert torch.equal(pipeline.generator.pyramid.codebook, pipeline.tokenizer.codebook)


@pytest.mark.parametrize(
    ("system", "checkpoint", "sources", "role"),
    [
        ("llamagen_vq", "checkpoint", ["llamagen"], "tokenizer"),
        ("llamagen_gpt_c2i", "checkpoint", ["llamagen"], "generator"),
        ("llamagen_gpt_t2i", "checkpoint", ["llamagen"], "generator"),
        ("dar_gpt", "checkpoint", ["llamagen"], "generator"),
        ("dar_tokenizer", "checkpoint", ["dar"], "tokenizer"),
        ("var_vqvae", "checkpoint", ["code/hmar/var"], "tokenizer"),
        ("var", "checkpoint", ["code", "hmar", "var"], "generator"),
        ("var_saln", "checkpoint", ["code", "hmar", "var"], "generator"),
        ("hmar", "checkpoint", ["hmar"], "generator"),
        ("code", "checkpoint_refiner", ["code", "hmar", "var"], "generator"),
    ],
)
def test_sniffing(system, checkpoint, sources, role, parity):
    state = parity(system).checkpoint(f"{checkpoint}.safetensors")
    for content in (state, {"model": {f"module.{key}": value for key, value in state.items()}}):
        found = find_rows(content, None, "file")
        assert [sources_of(row) for row in found] == sources and {row.role for row in found} == {role}
    for source in all_rows():
        # D-AR's generators have LlamaGen's keys, and are taken where D-AR is named.
        if source == "dar" and system in ("llamagen_gpt_c2i", "dar_gpt"):
            assert [row.source for row in find_rows(state, source, "file")] == ["dar"]
        elif source not in "/".join(sources):
            with pytest.raises(ValueError, match=f"that a converter of {source} knows"):
                find_rows(state, source, "file")


class Code:
    """Its pickle asks for a function to be called."""

    def __reduce__(self):
        return (print, ("run",))


def test_refused_files(parity, tmp_path):
    file, tokenizer_file, grid, num_heads = raster_files(tmp_path, parity)
    scale_file = write(tmp_path, parity, "var", "var.pth")
    vae = write(tmp_path, parity, "var_vqvae", "vae.pth")
    masked = write(tmp_path, parity, "hmar", "hmar.pth")
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    unsafe = tmp_path / "unsafe.pt"
    unsafe.write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    other = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(2), "conv.bias": torch.zeros(2)}, other)
    state = parity("llamagen_vq").checkpoint()
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:-1].clone()
    smaller = tmp_path / "smaller.pt"
    torch.save(state, smaller)
    state = parity("var_vqvae").checkpoint()
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:-1].clone()
    smaller_vae = tmp_path / "smaller_vae.pth"
    torch.save(state, smaller_vae)
    short = tmp_path / "short.pt"
    torch.save({k: v for k, v in parity("llamagen_gpt_c2i").checkpoint().items() if k != "norm.weight"}, short)
    raster = dict(tokenizer=tokenizer_file, grid=grid, num_heads=num_heads)
    cases = [
        (dict(file=truncated, **raster), "truncated.pt is truncated"),
        (dict(file=unsafe, **raster), "unsafe.pt is refused: its pickle holds more than tensors"),
        (dict(file=tmp_path / "none.pt"), "no weights file at .*none.pt"),
        (
            dict(file=other),
            "other.safetensors holds no weights.*code/hmar/var tokenizer: no .*llamagen generator: no",
        ),
        (
            dict(file=other),
            "Its tensors: conv.bias, conv.weight. Sources: code, .*hmar, larp, llamagen, mar, nar, var",
        ),
        (dict(file=scale_file, source="llamagen", grid=grid), "var.pth holds no weights that a converter of llamagen"),
        (dict(file=file, source="var", tokenizer=vae), "c2i.pt holds no weights that a converter of var"),
        (dict(file=file, tokenizer=tokenizer_file), "c2i.pt: the grid of tokens is not in the file.*16 16 for 256 px"),
        (dict(file=file, tokenizer=tokenizer_file, grid=grid), "number of heads.*known: 12 x 768"),
        (dict(file=short, **raster), "short.pt does not fit the model. 1 missing: norm.weight"),
        (
            dict(file=file, **raster | dict(tokenizer=smaller)),
            r"c2i.pt predicts \d+ codes, .*smaller.pt has \d+: they",
        ),
        (
            dict(file=file, **raster | dict(tokenizer=vae)),
            "vae.pth is a tokenizer of code/hmar/var; a tokenizer of llama",
        ),
        (dict(file=file, **raster | dict(tokenizer=other)), "other.safetensors is of no known kind"),
        (dict(file=tokenizer_file, tokenizer=tokenizer_file), "vq.pt is a tokenizer itself"),
        (
            dict(file=file, scales=(1, 2), **raster),
            r"scales \(1, 2\) is for code, .*hmar, var; a generator of llamagen does not",
        ),
        (dict(file=file, second=file, **raster), "second file goes with one generator of code, hmar"),
        (dict(file=scale_file), "var.pth: a model of scales includes its tokenizer's codebook; say tokenizer"),
        (dict(file=scale_file, tokenizer=smaller_vae), r"var.pth predicts \d+ codes, .*smaller_vae.pth has \d+: they"),
        (
            dict(file=scale_file, tokenizer=tokenizer_file),
            "vq.pt is a tokenizer of llamagen; a tokenizer of code/hmar/var",
        ),
        (dict(file=scale_file, tokenizer=vae, grid=(4, 4)), r"grid \(4, 4\) is for .*llamagen"),
        (dict(file=vae, tokenizer=vae), "vae.pth is a tokenizer itself; give the generator"),
        (dict(file=scale_file, tokenizer=vae, source="code"), "CoDe's models are pairs; say second"),
        (dict(file=scale_file, tokenizer=vae, source="hmar"), "one training phase of HMAR; say second"),
        (
            dict(file=scale_file, tokenizer=vae, second=file),
            "c2i.pt is a generator of llamagen; a generator of code is",
        ),
        (dict(file=masked, tokenizer=vae, second=masked), "hmar.pth needs no second file"),
        (
            dict(file=file, like="llamagen-x", **raster),
            "--like llamagen-x: no such official name; choose one of .*llamagen-c2i-b-256",
        ),
        (dict(file=file, like="var-d16", source="llamagen", **raster), "--like var-d16 is of var"),
        (dict(file=file, dtype="half", **raster), "--dtype half: choose one of float32, bfloat16, float16"),
    ]
    for number, (arguments, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            convert(Convert(out=tmp_path / "new" / str(number), **arguments))
    assert not list((tmp_path / "new").iterdir())


def test_out_is_not_overwritten(parity, tmp_path):
    vae = write(tmp_path, parity, "var_vqvae", "vae.pth")
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "mine.txt").write_text("mine")
    for out in (full, vae):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            convert(Convert(vae, out))
    with pytest.raises(ValueError, match="cannot write"):
        convert(Convert(vae, vae / "below"))
    convert(Convert(vae, empty, scales=(1, 2, 3, 4)))
    assert (full / "mine.txt").read_text() == "mine" and (empty / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "vae.pth"]
    assert empty.stat().st_mode & 0o777 == full.stat().st_mode & 0o777
