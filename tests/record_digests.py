"""Records digests of what the package makes at fixed seeds, to show that a change of the code leaves results alone.

    python tests/record_digests.py before.json      (on the old code)
    python tests/record_digests.py after.json       (on the new code, same machine)
    python tests/record_digests.py before.json --against after.json

Samples of every sampler on every embedded model that it fits, an edit, an evaluation, three short trainings, a
conversion of every parity fixture that has a converter, and the module paths stored in saved folders. One thread, CPU,
about ten minutes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FIXTURES = Path(__file__).parent / "fixtures"
SETTINGS = {
    "speculative": ({}, {"drafter": "eagle"}, {"drafter": "heads"}),
    "static_tree": ({"drafter": "ngram", "branches": "2,1"}, {"drafter": "eagle", "branches": "3,2,1"}),
    "dynamic_tree": ({"drafter": "eagle", "nodes": 8, "depth": 3, "children": 3},),
    "k_seq": ({"drafter": "ngram", "num_chains": 2, "num_drafts": 3},),
    "jacobi": ({"window": 8}, {"window": 8, "coupling": "maximal", "initial": "left_law"}, {"coupling": "gumbel"}),
    "lantern": ({"max_moved": 0.2, "num_neighbours": 50, "nodes": 8, "depth": 3, "children": 3},),
    "masked_refinement": ({"schedule": "1/2/3/4/4/4/4/4"},),
    "collaborative": ({"followers": ("emoji-var-small",), "takes_over": (6,)},),
}
_PYRAMID = ["--tokenizer", str(FIXTURES / "parity" / "var_vqvae" / "checkpoint.safetensors")]
CONVERSIONS = {
    "llamagen_gpt_c2i": ["--num-heads", "4", "--grid", "4", "4"],
    "llamagen_gpt_t2i": ["--num-heads", "4", "--grid", "4", "4"],
    "llamagen_vq": [],
    "var": ["--num-heads", "3", *_PYRAMID],
    "var_saln": ["--num-heads", "2", *_PYRAMID],
    "var_vqvae": [],
    "hmar": ["--num-heads", "3", *_PYRAMID],
}


def digest(tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def record_samples(found: dict[str, str]) -> None:
    import torch

    import visar
    from visar.checkpoints import hub
    from visar.samplers.index import SAMPLERS

    torch.set_num_threads(1)
    for name in hub.embedded_names():
        if hub.about(name)["kind"] in ("tokenizer", "drafter"):
            continue
        pipeline = visar.load(name, device="cpu")
        pipeline.set_progress_bar_config(disable=True)
        for sampler, entry in SAMPLERS.items():
            if sampler == "edit" or not entry.fits(pipeline.generator):
                continue
            for options in SETTINGS.get(sampler, ({},)):
                key = f"{name} {sampler} {json.dumps(options)}"
                given = {} if name == "emoji-raster-text" else {"attributes": None}
                try:
                    out = pipeline(
                        num_images=2, seed=3, sampler=sampler, sampler_options=options, output_type="pt", **given
                    )
                except ValueError as error:
                    found[key] = f"ValueError: {error}"[:120]
                    continue
                found[key] = f"{digest(out.tokens)} {digest(out.images)} {json.dumps(out.statistics.forward_passes)}"
                print(key, found[key], flush=True)


def command(found: dict[str, str], key: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "visar.cli.main", *arguments], capture_output=True, text=True)
    if done.returncode:
        found[key] = f"failed: {(done.stderr.strip().splitlines() or [''])[-1]}"
    print(key, "failed" if done.returncode else "done", flush=True)


def record_commands(found: dict[str, str], place: Path) -> None:
    command(
        found, "picture", "sample", "emoji-raster", "--num-images", "2", "--seed", "3", "--out", f"{place}/raster.png"
    )
    command(
        found, "edit", "edit", "emoji-var", f"{place}/raster.png", "--num-images", "2", "--out", f"{place}/edit.png"
    )
    command(
        found, "eval", "eval", "emoji-var", "--reference", "emoji64-lite0-f320", "--num-samples", "8",
        "--batch-size", "8", "--out", f"{place}/eval",
    )  # fmt: skip
    common = ["--augment", "none", "--batch-size", "4", "--mixed-precision", "no", "--tracker", "none"]
    common += ["--save-dtype", "float32", "--data", f"{FIXTURES}/sample_64.npz"]
    shape = ["--width", "32", "--num-layers", "2", "--num-heads", "2", "--hidden-width", "32"]
    command(
        found, "train", "train", "generator", *common, *shape, "--tokenizer", "emoji-vq", "--variants", "1", "--steps",
        "3", "--sample-images", "1", "--out", f"{place}/raster",
    )  # fmt: skip
    command(
        found, "train", "train", "generator", *common, *shape, "--tokenizer", "emoji-msvq", "--variants", "1",
        "--steps", "3", "--sample-images", "1", "--out", f"{place}/scales",
    )  # fmt: skip
    command(
        found, "train", "train", "drafter", *common, "--target", f"{place}/raster/model", "--variants", "1", "--steps",
        "2", "--out", f"{place}/drafter",
    )  # fmt: skip
    for fixture, options in CONVERSIONS.items():
        file = FIXTURES / "parity" / fixture / "checkpoint.safetensors"
        if file.is_file():
            command(found, f"convert {fixture}", "convert", str(file), *options, "--out", f"{place}/{fixture}")
    for file in sorted(place.rglob("*")):
        name = str(file.relative_to(place))
        if file.suffix in (".png", ".safetensors"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        if file.name == "model_index.json":
            index = json.loads(file.read_text())
            found[name] = json.dumps({key: index.get(key) for key in ("_class_name", "generator", "tokenizer")})
        if file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = json.dumps([{k: v for k, v in row.items() if "second" not in k} for row in rows])[:600]
    if (place / "eval" / "metrics.json").is_file():
        metrics = json.loads((place / "eval" / "metrics.json").read_text())
        found["eval"] = json.dumps([metrics["images_sha256"], metrics["metrics"]["distance"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--part", choices=("all", "commands", "samples"), default="all")
    options = parser.parse_args()
    if options.against is not None:
        before, after = (json.loads(file.read_text()) for file in (options.file, options.against))
        differ = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        for key in differ:
            print(f"{key}\n  {before.get(key)}\n  {after.get(key)}")
        print(f"{len(before)} digests, {len(differ)} differ")
        sys.exit(bool(differ))
    found: dict[str, str] = {}
    if options.part != "samples":
        with tempfile.TemporaryDirectory() as place:
            record_commands(found, Path(place))
    if options.part != "commands":
        record_samples(found)
    options.file.write_text(json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
