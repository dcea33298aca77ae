"""One-step student of an autoregressive generator: all tokens of an image from noise in one pass.

Source: Distilled Decoding, arXiv 2412.17153 section 3, microsoft/distilled_decoding@3b95d33f (the student's inputs and
heads). The network is the teacher's own, with vectors as input, and no shift: output i reads what comes before token i
and the vector of token i itself. With a velocity head, the generator of Distilled Decoding 2, arXiv 2510.21003: the
network reads the noise before token i, the head that of token i.

B images, N tokens, D width, V codes, C code width.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.layers.diffusion_head import DiffusionHead
from visar.layers.packable import Packable
from visar.layers.quantize import fingerprint

# Classes that a student can be of: they have `parallel_hidden`, `history`, `hidden`, `logits_of` and `latents_of`.
NETWORKS = {
    "NextScaleTransformer": "visar.generators.next_scale",
    "RasterGPT": "visar.generators.raster",
}


class OneStepGenerator(Packable, ModelMixin, ConfigMixin):
    """Predicts tokens, as codes and as vectors, from noise, or from data in front and noise behind.

    Args:
        network_class: class of the teacher, one of NETWORKS.
        arguments: the constructor arguments of that class.
        code_scale: what code vectors are multiplied by to have the variance of the noise.
        starts: first blocks (tokens of raster teachers, scales of next-scale ones) that the steps of a call draw from
            noise, rising from 0: a call of n steps takes the first n. The paper: (0, 80) of 256 tokens, (0, 4) or
            (0, 5) of ten scales.
        sharpness: logits are multiplied by it where the image is made of mean codes, softmax(sharpness * logits) @
            codes; not in the paper.
        output: what images are made of where a call does not say: "soft" mean codes, "codes" (the likeliest), or
            "vectors" from block `late` on and codes before it (the paper).
        late: see `output`.
        teacher: what the student was distilled from, for sampling mixed with it: "fingerprint" of its weights, and the
            settings that its tokens were drawn by: "guidance" (fields of `Guidance`), "temperature", "top_k", "top_p"
            and "flow_steps"; "name", for messages. None: it is not known.
        velocity_head: width and depth of a `DiffusionHead` that makes the vectors, noise - velocity; the logits are
            then the vectors' closeness to the codes. None: the two linear heads of the first paper.

    Raises:
        ValueError: a class that has no students, starts that do not begin with 0 or do not rise, or an unknown output;
            several starts, or output "soft", with a velocity head.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["pyramid"]

    @register_to_config
    def __init__(
        self,
        network_class: str = "RasterGPT",
        arguments: dict[str, Any] | None = None,
        code_scale: float = 1.0,
        starts: tuple[int, ...] = (0,),
        sharpness: float = 2.0,
        output: str = "soft",
        late: int = 0,
        teacher: dict[str, Any] | None = None,
        velocity_head: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if network_class not in NETWORKS:
            raise ValueError(f"network_class {network_class!r}; choose one of {', '.join(NETWORKS)}")
        if output not in OUTPUTS:
            raise ValueError(f"output {output!r}; choose one of {', '.join(OUTPUTS)}")
        build = getattr(importlib.import_module(NETWORKS[network_class]), network_class)
        self.network: Any = build(**(arguments or {}))
        width, channels = self.network.config["width"], self.network.config["codebook_width"]
        blocks = len(self.network.block_sizes)
        if list(starts) != sorted({0, *starts}) or starts[-1] >= blocks:
            raise ValueError(f"starts {tuple(starts)}; needed: rising numbers from 0 on, below {blocks}")
        if velocity_head is not None:
            if len(starts) > 1 or output == "soft":
                raise ValueError(f"starts {tuple(starts)}, output {output!r}; a velocity head takes (0,), not soft")
            self.velocity = DiffusionHead(channels, width, *velocity_head)
        else:
            self.make_heads(width, channels)
        self.reset_heads(None)

    def make_heads(self, width: int, channels: int) -> None:
        """The mark of noise and data, and what vectors are made by."""
        self.kind = nn.Embedding(2, width)
        self.vector_head: Any = nn.Linear(width, channels)

    def reset_heads(self, generator: torch.Generator | None) -> None:
        """Weights to train what the teacher does not have from."""
        if self._internal_dict["velocity_head"] is not None:
            self.velocity.reset_parameters(generator)
            return
        nn.init.zeros_(self.kind.weight)
        nn.init.trunc_normal_(self.vector_head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.vector_head.bias)

    @property
    def config(self) -> Mapping[str, Any]:
        """The network's configuration (sizes, conditions) and the student's own."""
        return {**self.network.config, **self._internal_dict}

    @property
    def quantized_parts(self) -> tuple[str, ...]:
        """Names of the submodules whose linear layers 8-bit weights are for."""
        return tuple(f"network.{name}" for name in self.network.quantized_parts)

    @property
    def read_once_per_block(self) -> tuple[str, ...]:
        """Names of the submodules whose weights a pass reads."""
        head = "vector_head" if self._internal_dict["velocity_head"] is None else "velocity"
        return (*(f"network.{name}" for name in self.network.read_once_per_block), head)

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Keys and values that stay from pass to pass: none."""
        return 0

    def example_condition(self, batch: int) -> Condition:
        """A condition that the model takes, for as many images."""
        return self.network.example_condition(batch)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, N."""
        return self.network.num_tokens

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """One block: all tokens."""
        return (self.num_tokens,)

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """One kind."""
        return ("image",)

    @property
    def codes(self) -> Tensor:
        """Code vectors float32 [V, C] in the scale of the noise."""
        return self.network.codes.float() * self._internal_dict["code_scale"]

    @property
    def codebook(self) -> Tensor:
        """Code vectors [V, C] of the tokenizer, as looked up."""
        return self.network.codes

    def first_token(self, block: int) -> int:
        """Number of tokens before a block of the teacher."""
        return sum(self.network.block_sizes[:block])

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that gives nothing; guidance is part of what a student has learned, so no sampler asks."""
        return self.network.null_condition(condition)

    def check_condition(self, condition: Condition) -> None:
        """See the network's; first tokens are refused."""
        condition.check_without_first()
        self.network.check_condition(condition)

    def forward(self, vectors_BNC: Tensor, known: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Predictions of all tokens in one pass.

        Args:
            vectors_BNC: scaled codes of known tokens, standard normal noise for the others.
            known: bool [B, N] or [N], True where the vector is a token's code.
            condition: of the B images.

        Returns: logits float32 [B, N, V], and vectors float32 [B, N, C] in the scale of the noise.
        """
        plain_BNC = vectors_BNC / self._internal_dict["code_scale"]
        if self._internal_dict["velocity_head"] is not None:
            return self._by_velocity(vectors_BNC, plain_BNC, condition)
        kind = self.kind(known.long()).expand(*vectors_BNC.shape[:2], -1)
        hidden_BND = self.network.parallel_hidden(plain_BNC, kind, condition)
        return self.network.logits_of(hidden_BND).float(), self.vector_head(hidden_BND).float()

    def _by_velocity(self, noise_BNC: Tensor, plain_BNC: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        hidden_BND = self.network.hidden(self.network.history(plain_BNC), condition)
        time_N = torch.full(noise_BNC.shape[1:2], TIME_UNITS, device=noise_BNC.device)
        made_BNC = noise_BNC - self.velocity(noise_BNC, time_N, hidden_BND).float()
        with torch.no_grad(), torch.autocast(noise_BNC.device.type, enabled=False):
            return made_BNC @ self.codes.t() - self.codes.square().sum(-1) / 2, made_BNC

    def latents(self, vectors_BNC: Tensor) -> Tensor:
        """What the tokenizer's `decode_latents` takes, float32 [B, C, h, w], of vectors in the scale of the noise."""
        return self.network.latents_of(vectors_BNC.float() / self._internal_dict["code_scale"])


OUTPUTS = ("soft", "codes", "vectors")
TIME_UNITS = 1000.0
"""Times 0 ... 1 of the flow are multiplied by it for a `DiffusionHead`."""


def check_distillable(teacher: Any) -> None:
    """Raises a ValueError for a generator that has no students."""
    name = type(teacher).__name__
    if name not in NETWORKS:
        raise ValueError(f"a {name} cannot be distilled into one step; teachers: {', '.join(NETWORKS)}")


def student_of(
    teacher: Any,
    code_scale: float,
    starts: tuple[int, ...],
    codebook_VC: Tensor,
    seed: int = 0,
    velocity_head: tuple[int, int] | None = None,
    *,
    drawn_by: Mapping[str, Any] | None = None,
) -> OneStepGenerator:
    """A student with a teacher's weights, ready to be trained.

    Dropout is off. A teacher that embeds ids gets a new linear map of code vectors instead of its table.

    Args:
        teacher: a generator of one of the classes in NETWORKS.
        code_scale, starts: see `OneStepGenerator`.
        codebook_VC: code vectors of the tokenizer, as looked up.
        seed: of the weights that the teacher does not have.
        drawn_by: name and settings of the teacher, see `OneStepGenerator`; None: the student cannot say later how to
            sample mixed with it.
        velocity_head: see `OneStepGenerator`; its output is then "vectors".

    Raises:
        ValueError: a teacher of another class.
    """
    check_distillable(teacher)
    name = type(teacher).__name__
    arguments = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    arguments |= {key: 0.0 for key in arguments if "dropout" in key or key == "drop_path"}
    arguments |= (
        {"token_input": "codebook", "codebook_width": codebook_VC.shape[1]} if "token_input" in arguments else {}
    )
    known = None if drawn_by is None else {"fingerprint": fingerprint(teacher), **drawn_by}
    student = OneStepGenerator(
        name,
        arguments,
        code_scale,
        starts,
        output="soft" if velocity_head is None else "vectors",
        teacher=known,
        velocity_head=velocity_head,
    )
    generator = torch.Generator().manual_seed(seed)
    student.reset_heads(generator)
    state = {key: value.float() for key, value in teacher.state_dict().items()}
    found = student.network.load_state_dict(state, strict=False)
    lacking = [key for key in found.missing_keys if not key.startswith(("codebook", "codebook_proj"))]
    assert not lacking, lacking
    if "codebook" in found.missing_keys:
        student.network.set_codebook(codebook_VC.cpu().float())
        nn.init.normal_(student.network.codebook_proj.weight, std=0.02, generator=generator)
        nn.init.zeros_(student.network.codebook_proj.bias)
    return student
