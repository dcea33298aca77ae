"""Common parts of generators over a pyramid of scales: decoding state, embedding of positions, commit of a scale.

A generator holds its own copy of the tokenizer's codebook and phi (`pyramid`), because the input of a scale is the map
accumulated from the codes of the coarser ones: a model file is complete without its tokenizer, and samplers need none.

B images, R rows (2B when guided), S scales, L positions of a call, N all positions, D hidden size, V codes, C code
width, h w the finest grid, M transformer blocks.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, combine, double, repeat
from visar.core.interface import TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.generators.training import shared_arguments
from visar.layers.cache import KVCache
from visar.layers.conditioning import ConditionVector, example_condition
from visar.layers.packable import Packable
from visar.tokenizers.multiscale_quantizer import ScalePyramid, scale_pairs


@dataclass
class ScaleState:
    """Decoding state of a batch. All tensors are allocated by `start` and changed in place from then on.

    Attributes:
        tokens: int64 [B, N], the committed ids.
        length: int64 [1], how many of them there are.
        map_BChw: float32 accumulated map of the committed scales.
        inputs_BNC: float32 inputs of all positions; those of the scale after the committed ones are the latest.
        condition_RD: condition vectors.
        modulations: every adaptive norm's vectors, by name; they depend on the condition only, so `start` makes them
            once.
        scale_S: float32 [S] guidance of every scale; None when guidance is off.
        cache: keys and values of the scales read so far; None for models that see one scale at a time.
        first_block: scale at which this model begins; when it gets there it reads all coarser ones in the same pass.
        block: index of the scale about to be predicted or committed, set by the loop.
    """

    tokens: Tensor
    length: Tensor
    map_BChw: Tensor
    inputs_BNC: Tensor
    condition_RD: Tensor
    modulations: dict[str, Tensor]
    scale_S: Tensor | None
    cache: KVCache | None
    first_block: int
    block: int = 0

    @property
    def batch(self) -> int:
        """Number of images B."""
        return self.tokens.shape[0]

    @property
    def parts(self) -> int:
        """Rows per image: 2 when guided, else 1."""
        return 1 if self.scale_S is None else 2

    def take_over(self, other: "ScaleState") -> None:
        """Copies what another model has committed: tokens, map and next inputs (not its cache)."""
        for name in ("tokens", "length", "map_BChw", "inputs_BNC"):
            getattr(self, name).copy_(getattr(other, name))


class ScaleGenerator(Packable, ModelMixin, ConfigMixin):
    """Base of the generators over scales; see the module's text. Subclasses define the blocks and `read`."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]
    _supports_gradient_checkpointing = True
    _no_split_modules = ["AdaLNBlock"]
    _repeated_blocks = ["AdaLNBlock"]
    _keep_in_fp32_modules = ["pyramid"]

    pyramid: ScalePyramid

    @property
    def _checkpoint(self) -> Callable[..., Tensor] | None:
        """What blocks are called by where their activations are not to be kept."""
        return self._gradient_checkpointing_func if self.gradient_checkpointing and torch.is_grad_enabled() else None

    def _build_inputs(
        self,
        *,
        vocab_size: int,
        codebook_width: int,
        scales: tuple,
        num_phi: int,
        phi_ratio: float,
        width: int,
        num_classes: int,
        attributes: tuple[int, ...],
        word_vocab_size: int,
    ) -> None:
        """Makes the modules and tables that turn conditions and maps into the transformer's input."""
        self.scales = scale_pairs(scales)
        self.block_sizes = tuple(rows * columns for rows, columns in self.scales)
        self.ends = tuple(sum(self.block_sizes[: scale + 1]) for scale in range(len(self.scales)))
        self.num_tokens = self.ends[-1]
        self.pyramid = ScalePyramid(vocab_size, codebook_width, self.scales, num_phi=num_phi, phi_ratio=phi_ratio)
        self.pyramid.requires_grad_(False)
        self.condition_vector = ConditionVector(width, num_classes, tuple(attributes), word_vocab_size)
        self.pos_start = nn.Parameter(torch.empty(1, self.block_sizes[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.num_tokens, width))
        self.lvl_embed = nn.Embedding(len(self.scales), width)

    def _reset_inputs(self, width: int, generator: torch.Generator | None) -> None:
        """VAR's start of the embeddings: N(0, sqrt(1 / (3 D)))."""
        std = (1 / width / 3) ** 0.5
        for parameter in (self.pos_start, self.pos_1LC, *self.condition_vector.parameters()):
            nn.init.trunc_normal_(parameter, std=std, generator=generator)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=std, generator=generator)

    def set_tokenizer(self, pyramid: ScalePyramid) -> None:
        """Takes over the tokenizer's codebook and phi (`tokenizer.quantizer`).

        Raises:
            ValueError: it has other sizes than this model was made for.
        """
        ours, theirs = self.pyramid.state_dict(), pyramid.state_dict()
        wrong = [key for key in ours if key not in theirs or theirs[key].shape != ours[key].shape]
        if wrong or pyramid.phi_of_scale != self.pyramid.phi_of_scale or pyramid.scales != self.scales:
            raise ValueError(
                f"the tokenizer has scales {pyramid.scales}, {pyramid.vocab_size} codes of width {pyramid.channels}; "
                f"this model needs {self.scales}, {self.pyramid.vocab_size}, {self.pyramid.channels}"
            )
        self.pyramid.load_state_dict({key: theirs[key] for key in ours})

    # ------------------------------------------------------------------------------------------------ conditions
    @property
    def block_kinds(self) -> tuple[str, ...]:
        """Every scale does work of its own size (see visar/core/runtime.py)."""
        return tuple(f"scale {scale}" for scale in range(len(self.scales)))

    def check_condition(self, condition: Condition) -> None:
        """See `ConditionVector.check`."""
        self.condition_vector.check(condition)

    def null_condition(self, condition: Condition) -> Condition:
        """The condition "nothing given" for as many images, in the same shapes."""
        return self.condition_vector.null(condition)

    def example_condition(self, batch: int) -> Condition:
        """Some condition that this model takes, for `batch` images, on its device: to time or measure it."""
        return example_condition(self.config, batch).to(self.device)

    # --------------------------------------------------------------------------------------------------- embedding
    def begin_of(self, scale: int) -> int:
        """Index of a scale's first position."""
        return self.ends[scale] - self.block_sizes[scale]

    def embed_positions(self, first: int, last: int) -> Tensor:
        """Level plus position embedding [1, L, D] of scales first ... last (inclusive)."""
        levels = [self.lvl_embed.weight[scale].expand(self.block_sizes[scale], -1) for scale in range(first, last + 1)]
        return torch.cat(levels)[None] + self.pos_1LC[:, self.begin_of(first) : self.ends[last]]

    def start_input(self, condition_RD: Tensor) -> Tensor:
        """Input [R, L_0, D] of the first scale, before level and position: the condition and a start embedding."""
        return condition_RD[:, None] + self.pos_start

    @abstractmethod
    def embed_map(self, inputs_BLC: Tensor) -> Tensor:
        """Input [B, L, D] of later scales, before level and position, from resized maps."""

    def embed(self, condition_RD: Tensor, inputs_BLC: Tensor, first: int, last: int) -> Tensor:
        """Transformer input [R, L, D] of scales first ... last.

        Args:
            condition_RD: condition vectors.
            inputs_BLC: resized maps of these scales' positions, without those of scale 0.
            first, last: inclusive.
        """
        x = self.embed_map(inputs_BLC)
        x = repeat(x, condition_RD.shape[0] // x.shape[0])
        if first == 0:
            x = torch.cat([self.start_input(condition_RD), x], dim=1)
        return x + self.embed_positions(first, last)

    # --------------------------------------------------------------------------------------------------- decoding
    def shared_modulation(self, condition_RD: Tensor) -> Tensor | None:
        """The six vectors that all blocks share [R, 6, D]; None where every block has its own layer for them."""
        if not self.config["shared_adaln"]:
            return None
        return self.shared_ada_lin(condition_RD).unflatten(-1, (6, -1))

    @abstractmethod
    def modulate(self, condition_RD: Tensor) -> dict[str, Tensor]:
        """Vectors of all adaptive norms, by name, with the rows R at axis 1."""

    @abstractmethod
    def make_cache(self, rows: int, num_scales: int, dtype: torch.dtype, device: torch.device) -> KVCache | None:
        """Keys and values of the first scales; None for models that see one scale at a time."""

    @abstractmethod
    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Bytes of keys and values of some rows and positions (None is all); 0 for models that keep none."""

    @abstractmethod
    def raw_logits(self, state: ScaleState) -> Tensor:
        """Unguided logits [R, L, V] of scale `state.block`."""

    def start(
        self,
        condition: Condition,
        guidance: Guidance = OFF,
        *,
        state: ScaleState | None = None,
        first_scale: int = 0,
        last_scale: int | None = None,
        history: ScaleState | None = None,
    ) -> ScaleState:
        """Decoding state before the first scale.

        Args:
            condition: of the B images.
            guidance: blocks are scales; when no scale is guided the batch is not doubled.
            state: a state of the same batch, guidance and scales, whose buffers are used again.
            first_scale: scale that is predicted first. Coarser ones must be committed before (`append`) or come from
                `history`; the model reads them in the pass that predicts this scale.
            last_scale: last scale that will be predicted (the cache ends there); None is the finest.
            history: state of another model whose committed scales are taken over.

        Raises:
            ValueError: the condition does not fit, or scales out of range.
        """
        last = len(self.scales) - 1 if last_scale is None else last_scale
        if not 0 <= first_scale <= last < len(self.scales):
            raise ValueError(f"scales {first_scale} ... {last}; this model has scales 0 ... {len(self.scales) - 1}")
        self.check_condition(condition)
        guided = guidance.active(len(self.scales))
        rows = double(condition, self.null_condition(condition)) if guided else condition
        condition_RD = self.condition_vector(rows)
        modulations = self.modulate(condition_RD)
        if state is None:
            state = self._allocate(condition.batch, condition_RD, modulations, guided, first_scale, last + 1)
        state.first_block = state.block = first_scale
        state.tokens.zero_()
        state.length.zero_()
        state.map_BChw.zero_()
        state.condition_RD.copy_(condition_RD)
        for name, value in modulations.items():
            state.modulations[name].copy_(value)
        if state.scale_S is not None:
            # A collaborative sampler starts its next model in mid-image: that must not wait for the device.
            state.scale_S.copy_(torch.tensor(guidance.scales(len(self.scales))), non_blocking=True)
        if history is not None:
            state.take_over(history)
        return state

    def _allocate(
        self,
        batch: int,
        condition_RD: Tensor,
        modulations: dict[str, Tensor],
        guided: bool,
        first_scale: int,
        num_scales: int,
    ) -> ScaleState:
        device, rows = condition_RD.device, condition_RD.shape[0]
        return ScaleState(
            tokens=torch.zeros(batch, self.num_tokens, dtype=torch.int64, device=device),
            length=torch.zeros(1, dtype=torch.int64, device=device),
            map_BChw=self.pyramid.empty_map(batch),
            inputs_BNC=torch.zeros(batch, self.num_tokens, self.pyramid.channels, device=device),
            condition_RD=torch.empty_like(condition_RD),
            modulations={name: torch.empty_like(value) for name, value in modulations.items()},
            scale_S=torch.ones(len(self.scales), device=device) if guided else None,
            cache=self.make_cache(rows, num_scales, condition_RD.dtype, device),
            first_block=first_scale,
        )

    def predict(self, state: ScaleState) -> Tensor:
        """Guided float32 logits [B, L, V] of scale `state.block`."""
        logits_RLV = self.raw_logits(state)
        return logits_RLV.float() if state.scale_S is None else combine(logits_RLV, state.scale_S[state.block])

    def positions(self, state: ScaleState) -> Tensor:
        """Where the tokens of scale `state.block` stand in the tokenizer's order, int64 [1, L]."""
        return torch.arange(self.begin_of(state.block), self.ends[state.block], device=state.tokens.device)[None]

    def result(self, state: ScaleState) -> Tensor:
        """The image's tokens int64 [B, N] in the tokenizer's order, 0 where none is committed yet; a view."""
        return state.tokens

    def append(self, state: ScaleState, tokens_BL: Tensor, codes_BLC: Tensor | None = None) -> None:
        """Commits scale `state.block`.

        Args:
            state: changed in place.
            tokens_BL: int64 ids.
            codes_BLC: float vectors that are added to the map instead of the ids' codes; None is the codes.
        """
        codes = self.pyramid.embedding(tokens_BL) if codes_BLC is None else codes_BLC
        self.commit_map(state, tokens_BL, self.pyramid.accumulate(state.map_BChw, state.block, codes))

    def commit_map(self, state: ScaleState, tokens_BL: Tensor, map_BChw: Tensor) -> None:
        """Commits scale `state.block` with a given accumulated map [B, C, h, w] after it."""
        scale = state.block
        end = self.ends[scale]
        state.tokens[:, self.begin_of(scale) : end].copy_(tokens_BL)
        state.map_BChw.copy_(map_BChw)
        if scale + 1 < len(self.scales):
            state.inputs_BNC[:, end : self.ends[scale + 1]].copy_(self.pyramid.next_input(map_BChw, scale + 1))
        state.length += self.block_sizes[scale]


# -------------------------------------------------------------------------------------------- training and benchmark
def fits_scales(layout: TokenLayout) -> bool:
    """Whether tokens are ids over scales."""
    return layout.arrangement == "scales" and layout.vocab_size > 0


def scale_arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    """Constructor arguments of a generator over scales; see `GeneratorFamily.arguments`."""
    if options.words == "prefix":
        raise ValueError("words prefix is for raster generators; a next-scale generator takes sum or none")
    if caption_width:
        raise ValueError("text encoders are for raster generators; a next-scale generator takes words sum or none")
    return {
        **shared_arguments(tokenizer, vocabulary, options),
        "scales": tokenizer.layout.shapes,
        "num_phi": tokenizer.config["num_phi"],
        "phi_ratio": tokenizer.config["phi_ratio"],
        "mlp_ratio": options.hidden_width / options.width,
        "dropout": options.dropout,
    }


def take_pyramid(model: Any, tokenizer: Any) -> None:
    """Gives a generator over scales the codebook and phi of its tokenizer."""
    model.set_tokenizer(tokenizer.quantizer)
