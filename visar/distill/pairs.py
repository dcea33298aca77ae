"""Pairs of noise and tokens for one-step students, made by the teacher through its flow map.

Noise is a function of an image's seed, so a pair is stored as its seed, its condition and its token ids. Pairs come in
blocks of consecutive seeds, one file a block: a block that exists is never made again, several processes or commands
may make blocks of one folder at the same time, and training may read them while later ones are being made.

B images, N tokens, A label columns, T words.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visar.core.condition import Condition
from visar.core.noise import Noise
from visar.generators.one_step import check_distillable
from visar.io.files import atomic_write, json_object
from visar.layers.quantize import weights_digest
from visar.pipelines.image import ImagePipeline
from visar.samplers.flow import sample_flow

logger = logging.getLogger(__name__)


class Pairs:
    """The pairs of one teacher in one folder.

    Args:
        folder: of the blocks; made if it does not exist.
        pipeline: the teacher, on its device, with the settings that its tokens are drawn by as its defaults.
        block: pairs of a file, made in one batch.
        steps: of the flow map.
        first_seed: of block 0.

    Raises:
        ValueError: the folder holds pairs of another teacher or of other settings, or the teacher reads captions.
    """

    def __init__(
        self, folder: Path, pipeline: ImagePipeline, *, block: int = 1024, steps: int = 20, first_seed: int = 2**40
    ) -> None:
        self.folder, self.pipeline, self.block, self.steps, self.first_seed = (
            folder,
            pipeline,
            block,
            steps,
            first_seed,
        )
        if pipeline.generator.config.get("caption_width"):
            raise ValueError("teachers of captions are not distilled: give one of classes, attributes or words")
        check_distillable(pipeline.generator)
        self.settings = pipeline.sampling_settings()
        facts = {
            "teacher": weights_digest(pipeline.generator),
            "settings": repr({key: self.settings[key] for key in ("guidance", "temperature", "top_k", "top_p")}),
            "block": block,
            "steps": steps,
            "first_seed": first_seed,
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "pairs.json"
        if not path.is_file():
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(facts, indent=1))
        try:
            there = json_object(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); give another folder") from error
        differing = [name for name, value in facts.items() if there.get(name) != value]
        if differing:
            raise ValueError(
                f"{folder} holds pairs of another {differing[0]} ({there.get(differing[0])}, now "
                f"{facts[differing[0]]}); give another folder"
            )

    def drawn_by(self, name: str) -> dict[str, Any]:
        """What a student keeps of its teacher; see `visar.generators.one_step.student_of`."""
        kept = {key: self.settings[key] for key in ("temperature", "top_k", "top_p")}
        guidance = dataclasses.asdict(self.settings["guidance"])
        return {"name": name, "guidance": guidance, "flow_steps": self.steps, **kept}

    def path(self, index: int) -> Path:
        """File of a block."""
        return self.folder / f"block-{index:06d}.safetensors"

    def seeds(self, index: int) -> list[int]:
        """Seeds of a block's images."""
        first = self.first_seed + index * self.block
        return list(range(first, first + self.block))

    def make(self, index: int) -> None:
        """Makes a block and writes it."""
        seeds, settings = self.seeds(index), self.settings
        device = self.pipeline.generator.device
        condition, _ = self.pipeline.prepare_condition(seeds)
        tokens = sample_flow(
            self.pipeline.generator,
            condition.to(device),
            noise=Noise(seeds, device),
            codebook=self.pipeline.tokenizer.codebook,
            guidance=settings["guidance"],
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            top_p=settings["top_p"],
            steps=self.steps,
            runtime=self.pipeline.runtime,
        ).tokens
        content = {"ids": tokens.to(torch.int32).cpu()}
        if self.pipeline.generator.config["vocab_size"] <= 2**15:
            content["ids"] = content["ids"].to(torch.int16)
        for name in ("labels_BA", "words_BT"):
            value = getattr(condition, name)
            if value is not None:
                content[name] = value.to(torch.int16).cpu().contiguous()
        with atomic_write(self.path(index)) as temporary:
            save_file(content, temporary)

    def load(self, index: int) -> dict[str, Tensor]:
        """A block: ids [B, N], and labels_BA, words_BT where the teacher reads them.

        Raises:
            ValueError: it is damaged, or is none of this teacher's.
        """
        path = self.path(index)
        try:
            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}; remove it, and it is made again") from error
        if content.get("ids", torch.empty(0)).shape != (self.block, self.pipeline.generator.num_tokens):
            raise ValueError(f"{path} does not hold {self.block} sequences; remove it, and it is made again")
        return content

    def ensure(
        self, count: int, process: int = 0, processes: int = 1, waited: Callable[[], None] | None = None
    ) -> None:
        """Makes the blocks 0 ... count - 1 that do not exist: those whose number is this process's.

        Args:
            count: blocks.
            process, processes: this one, and how many share the work.
            waited: called when this process's share is done, to wait for the others.
        """
        for index in range(process, count, processes):
            if not self.path(index).is_file():
                self.make(index)
        if waited is not None:
            waited()


class PairTable:
    """Blocks on a device, in the order of their numbers.

    Args:
        pairs: where they come from.
        device: of the table.
        capacity: blocks that there may be.
    """

    def __init__(self, pairs: Pairs, device: torch.device, capacity: int) -> None:
        self.pairs, self.device, self.count = pairs, device, 0
        self._capacity = capacity
        self._columns: dict[str, Tensor] = {}

    def read(self, count: int) -> None:
        """Takes in the blocks up to `count`, which exist."""
        for index in range(self.count, count):
            content = self.pairs.load(index)
            for name, value in content.items():
                if name not in self._columns:
                    rows = self._capacity * self.pairs.block
                    self._columns[name] = torch.zeros(rows, *value.shape[1:], dtype=value.dtype, device=self.device)
                first = index * self.pairs.block
                self._columns[name][first : first + len(value)] = value.to(self.device)
        self.count = max(self.count, count)

    def rows(self, index_B: Tensor) -> tuple[Tensor, Condition, Noise]:
        """Ids int64 [B, N], conditions and noise of some pairs, by number."""
        taken: dict[str, Any] = {name: column[index_B].long() for name, column in self._columns.items()}
        ids_BN = taken.pop("ids")
        return ids_BN, Condition(**taken), Noise(index_B + self.pairs.first_seed, self.device)


def pairs_folder(out: Path, given: Path | None) -> Path:
    """Where a run keeps its pairs: the given folder, else pairs/ of the run's own."""
    return Path(os.path.expanduser(given)) if given is not None else out / "pairs"
