"""Weight-only quantisation: errors of logits, the kernels against torchao's own linear, where it is switched on."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from visar.bench.correctness import check_logits
from visar.bench.options import Bench
from visar.bench.run import bench
from visar.bench.subjects import Subject, build, find_preset, floor_seconds, tiny
from visar.cli.main import main
from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.generators.tabular import TabularGenerator
from visar.layers import quantize
from visar.layers.quantize import QUANTIZATIONS, dequantize_, quantize_, quantized_layers, stored, weights_digest
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.ancestral import sample_ancestral

CPU = torch.device("cpu")
KINDS = {"int8": 2e-2, "fp8": 8e-2}
FAMILIES = ("llamagen-b", "var-d16", "hmar-d16")

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed (pip install torch-visar[quantize])"
)


def small(name: str, kind: str = "none", device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Subject:
    return build(name, tiny(find_preset(name)), device, dtype, kind)


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_stay_near(name, kind):
    subject, quantised = small(name), small(name, kind)
    tokens = torch.randint(128, (2, subject.num_tokens), generator=torch.Generator().manual_seed(0))
    condition = subject.generator.example_condition(2)
    expected, got = (model(tokens, condition) for model in (subject.generator, quantised.generator))
    assert 1e-4 < float((got - expected).norm() / expected.norm()) < KINDS[kind]
    check_logits(quantised, CPU)  # decoding block by block is the teacher-forced pass
    plain = dequantize_(small(name, kind).generator)
    torch.testing.assert_close(plain(tokens, condition), got, rtol=1e-4, atol=1e-4)
    digests = [weights_digest(model) for model in (subject.generator, quantised.generator, plain)]
    assert digests[0] != digests[1] == digests[2]


@needs_torchao
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_quantised(name):
    model = small(name, "int8").generator
    layers = quantized_layers(model)
    assert not any(part in key for key in layers for part in ("ada_lin", "embed", "norm", "phi"))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            values, scale_N = stored(module)
            assert (values.dtype == torch.int8) == (scale_N is not None) == (module in layers.values())
    assert {key.partition(".")[0] for key in layers} & {"output", "head", "ns_head"}


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_kernel_is_torchaos_linear(device, kind, rows):
    from visar.kernels.product import Weight, product

    torch.manual_seed(0)
    layer, x = nn.Linear(96, 40, bias=False).to(device), torch.randn(rows, 96, device=device)
    holder = nn.Module()
    holder.output = layer
    quantize_(holder, kind)
    got = product(x, Weight(*stored(layer)), tile="head")
    torch.testing.assert_close(got, functional.linear(x, layer.weight), rtol=1e-5, atol=1e-5)


@needs_torchao
@torch.no_grad()
def test_steps_by_kernels_are_the_plain_path(device, monkeypatch):
    from visar.layers import llama_fused as decoder

    monkeypatch.setattr(decoder, "FEW_DTYPES", (torch.float32,))
    model = small("llamagen-b", "int8", device).generator
    for batch in (1, 5):  # 2 rows by the kernels of products, 10 by tensor-core tiles
        condition, logits = Condition(labels_BA=torch.ones(batch, 1, dtype=torch.int64, device=device)), []
        for model.fused in ("auto", "off"):
            state = model.start(condition, Guidance(2.0))
            logits.append(model.predict(state))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_logits_of_decoding(name, kind):
    subject = small(name, kind, torch.device("cuda"), torch.bfloat16)
    check_logits(subject, torch.device("cuda"))
    noise, condition = Noise(image_seeds(0, 3), "cuda"), subject.generator.example_condition(3)
    tokens = sample_ancestral(subject.generator, condition, noise=noise, guidance=Guidance(2.0)).tokens
    assert tokens.shape == (3, subject.num_tokens)


# ------------------------------------------------------------------------------------------------------- switching on
@needs_torchao
def test_load_and_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISAR_TRITON", "0")
    subject = small("var-d16")
    ImagePipeline(subject.tokenizer, subject.generator).save_pretrained("tiny")
    pipeline: Any = load("tiny", device="cpu", quantize="int8")
    assert all(stored(layer)[1] is not None for layer in quantized_layers(pipeline.generator).values())
    assert len(pipeline(num_images=2, seed=0).images) == 2
    with pytest.raises(ValueError, match="a quantised pipeline is not saved"):
        pipeline.save_pretrained("again")
    assert main(["sample", "tiny", "--quantize", "int8", "--device", "cpu", "--out", "a.png"]) == 0
    assert (tmp_path / "a.png").is_file()
    capsys.readouterr()


@needs_torchao
def test_benchmark_counts_the_bytes(monkeypatch):
    monkeypatch.setenv("VISAR_TRITON", "0")
    lines: list[str] = []
    options = Bench(preset="llamagen-b", dtype="float32", device="cpu", quantize="int8")
    assert bench(options, {}, lines.append) == [] and any("logits of decoding" in line for line in lines)
    machine = {"copy_gb_s": 1e-3, "matmul_tflop_s": 1e9}
    models = [small("llamagen-b", kind).generator for kind in ("none", "int8")]
    full, quantised = (floor_seconds(model, 0, machine) for model in models)
    layers = quantized_layers(models[0]).values()
    bytes_8 = sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)
    assert full / quantised == pytest.approx(sum(layer.weight.nbytes for layer in layers) / bytes_8)


@needs_torchao
def test_refusals():
    with pytest.raises(ValueError, match="'int4'; choose one of none, int8, fp8"):
        load("emoji-raster", device="cpu", quantize="int4")
    model = small("llamagen-b", "int8").generator
    with pytest.raises(ValueError, match="quantised already"):
        quantize_(model, "int8")
    with pytest.raises(ValueError, match="TabularGenerator has no linear layers in blocks"):
        quantize_(TabularGenerator(), "int8")
    with pytest.raises(ValueError, match="vq-16 has none"):
        bench(Bench(preset="vq-16", device="cpu", quantize="int8"), {}, print)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ValueError, match="has no float8"):
            small("llamagen-b", "fp8", torch.device("cuda"))


class OtherTensor(torch.Tensor):
    pass


@needs_torchao
def test_unknown_weights_are_refused():
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup
    from torchao.quantization import quantize_ as by_torchao

    layer = nn.Linear(64, 64)
    by_torchao(layer, Int8WeightOnlyConfig(granularity=PerGroup(32), version=2))
    with pytest.raises(TypeError, match="64 rows with 128 scales"):
        stored(layer)
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(OtherTensor))
    with pytest.raises(TypeError, match="class OtherTensor; known are torchao's"):
        stored(layer)


def test_without_torchao(monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        load("emoji-raster", device="cpu", quantize="fp8")
    quantize_(TabularGenerator(), "none")


def test_torchao_is_imported_only_when_asked_for():
    code = "import sys, json, visar.layers.quantize; print(json.dumps('torchao.quantization' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False and QUANTIZATIONS == ("none", "int8", "fp8")
