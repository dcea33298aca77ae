"""Hierarchical masked transformer: next-scale prediction that is Markov in the scale, and refinement inside a scale.

Source: HMAR, CVPR 2025, arXiv 2506.04421: written from its method and from recorded inputs and outputs; parameter
names are those of the released files. Attributes and words are this project's. The released weights are for
non-commercial use.

B images, R rows (2B when guided), L positions of one scale, N all positions, D hidden size, V codes, C code width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.guidance import combine
from visar.core.interface import TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.generators.scales import ScaleGenerator, ScaleState, fits_scales, scale_arguments, take_pyramid
from visar.generators.training import GeneratorFamily, Objective
from visar.layers.scale_attention import Method
from visar.layers.scale_blocks import AdaLNBlock, AdaLNOutputNorm, reset_blocks, run_blocks
from visar.tokenizers.multiscale_vq import SCALES_256

Phase = Literal["next_scale", "refinement"]

# Released sizes: depth d has width 64 d and d heads; the last 8 blocks exist twice (468 M, 846 M, 1.38 B, 2.56 B).
HIERARCHICAL_MASKED_PRESETS: dict[str, dict] = {
    "hmar-d16": dict(width=1024, num_layers=16, num_heads=16),
    "hmar-d20": dict(width=1280, num_layers=20, num_heads=20),
    "hmar-d24": dict(width=1536, num_layers=24, num_heads=24),
    "hmar-d30": dict(width=1920, num_layers=30, num_heads=30),
}


class HierarchicalMaskedTransformer(ScaleGenerator, ModelMixin, ConfigMixin):
    """Two transformers that share their first blocks: one predicts a scale, one predicts its masked tokens anew.

    Both see the scale itself only (block-diagonal attention); all history arrives through the accumulated map, so
    decoding keeps no keys and values.

    Args:
        vocab_size, codebook_width, scales, num_phi, phi_ratio: of the tokenizer, see `ScalePyramid`.
        width, num_layers, num_heads, mlp_ratio: D, depth of each of the two, heads, feed-forward width / D.
        num_refinement_layers: blocks at the end that the two do not share (released: 8).
        num_classes, attributes, word_vocab_size, shared_adaln, qk_norm, drop_path, dropout, norm_eps: see
            `NextScaleTransformer`. With shared_adaln, which no released model has, all three kinds of blocks share
            one modulation layer; it learns in the first phase only.
        hide_masked: leave masked codes out of the map of a scale's own codes. Released models have them in it (False),
            and resizing and convolution carry them to the neighbours: the true ones in training, stale draws in
            sampling, so that refinement trained that way does worse than no refinement where it hides little.

    Raises:
        ValueError: sizes that exclude each other.
    """

    quantized_parts = ("base_blocks", "ns_blocks", "mask_blocks", "ns_head", "mask_head")
    read_once_per_block = ("word_embed", "base_blocks", "ns_blocks", "ns_head")

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        codebook_width: int = 32,
        scales: tuple = SCALES_256,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        width: int = 1024,
        num_layers: int = 16,
        num_heads: int = 16,
        num_refinement_layers: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        attributes: tuple[int, ...] = (),
        word_vocab_size: int = 0,
        shared_adaln: bool = False,
        qk_norm: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        hide_masked: bool = False,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}")
        if not 0 <= num_refinement_layers <= num_layers:
            raise ValueError(f"num_refinement_layers {num_refinement_layers}; it must be in 0 ... {num_layers}")
        self._build_inputs(
            vocab_size=vocab_size,
            codebook_width=codebook_width,
            scales=scales,
            num_phi=num_phi,
            phi_ratio=phi_ratio,
            width=width,
            num_classes=num_classes,
            attributes=attributes,
            word_vocab_size=word_vocab_size,
        )

        def blocks(first: int, last: int) -> nn.ModuleList:
            return nn.ModuleList(
                AdaLNBlock(
                    width,
                    num_heads,
                    round(width * mlp_ratio),
                    qk_norm=qk_norm,
                    shared_adaln=shared_adaln,
                    drop_path=drop_path * index / max(num_layers - 1, 1),
                    dropout=dropout,
                    eps=norm_eps,
                )
                for index in range(first, last)
            )

        self.attention_method: Method = "auto"
        self.input_dropout = nn.Dropout(dropout)
        self.word_embed = nn.Linear(codebook_width, width, bias=False)
        self.word_embed_bias = nn.Parameter(torch.zeros(width))
        self.mask_embed = nn.Embedding(1, width)
        if shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.base_blocks = blocks(0, num_layers - num_refinement_layers)
        self.ns_blocks = blocks(num_layers - num_refinement_layers, num_layers)
        self.mask_blocks = blocks(num_layers - num_refinement_layers, num_layers)
        self.ns_head_nm, self.mask_head_nm = AdaLNOutputNorm(width, norm_eps), AdaLNOutputNorm(width, norm_eps)
        self.ns_head, self.mask_head = nn.Linear(width, vocab_size), nn.Linear(width, vocab_size)
        self._reset_inputs(width, None)

    def reset_parameters(self, generator: torch.Generator | None = None, gate: float = 1e-3) -> None:
        """Weights for the first phase of training, as VAR's; see `NextScaleTransformer.reset_parameters`."""
        width, depth = self.config["width"], self.config["num_layers"]
        std = (1 / width / 3) ** 0.5
        self._reset_inputs(width, generator)
        for blocks in (self.base_blocks, self.ns_blocks):
            reset_blocks(blocks, width, depth, gate, generator)
        modulation = cast(nn.Linear, self.ns_head_nm.ada_lin[1])
        for module in (self.word_embed, self.mask_embed, self.ns_head, modulation):
            nn.init.trunc_normal_(module.weight, std=std, generator=generator)
        for bias in (self.word_embed_bias, self.ns_head.bias, modulation.bias):
            nn.init.zeros_(bias)
        with torch.no_grad():
            self.ns_head.weight.mul_(0.02)
            modulation.weight.mul_(0.5)
        self.begin_refinement()

    def begin_refinement(self) -> None:
        """Starts the refinement blocks and head from those of next-scale prediction (between the two phases)."""
        self.mask_blocks.load_state_dict(self.ns_blocks.state_dict())
        self.mask_head_nm.load_state_dict(self.ns_head_nm.state_dict())
        self.mask_head.load_state_dict(self.ns_head.state_dict())

    def set_phase(self, phase: Phase) -> None:
        """Makes the parameters of one phase of training trainable and freezes the others.

        Args:
            phase: "next_scale" trains everything but the refinement parts; "refinement" trains these alone: the last
                blocks, the head and the mask embedding.

        Raises:
            ValueError: an unknown phase.
        """
        if phase not in ("next_scale", "refinement"):
            raise ValueError(f"phase {phase!r}; choose next_scale or refinement")
        self.requires_grad_(phase == "next_scale")
        for part in (self.mask_blocks, self.mask_head_nm, self.mask_head, self.mask_embed):
            part.requires_grad_(phase == "refinement")
        self.pyramid.requires_grad_(False)

    # ------------------------------------------------------------------------------------------------ the two paths
    def embed_map(self, inputs_BLC: Tensor) -> Tensor:
        return self.word_embed(inputs_BLC.to(self.word_embed.weight.dtype)) + self.word_embed_bias

    def modulate(self, condition_RD: Tensor) -> dict[str, Tensor]:
        """Modulations [blocks, R, 6, D] of the shared blocks and both ends, and [1, R, 2, D] of both norms."""
        shared = self.shared_modulation(condition_RD)
        ends: dict[str, nn.ModuleList] = {"base": self.base_blocks, "ns": self.ns_blocks, "mask": self.mask_blocks}
        modulations = {
            name: torch.stack([block.modulation(condition_RD, shared) for block in cast(Iterable[AdaLNBlock], blocks)])
            for name, blocks in ends.items()
            if len(blocks)
        }
        modulations["ns_head"] = self.ns_head_nm.modulation(condition_RD)[None]
        modulations["mask_head"] = self.mask_head_nm.modulation(condition_RD)[None]
        return modulations

    def _run(
        self, x: Tensor, modulations: dict[str, Tensor], sizes: tuple[int, ...], end: Literal["ns", "mask"]
    ) -> Tensor:
        """Logits [R, L, V] through the shared blocks and one of the two ends."""
        both = [*self.base_blocks, *(self.ns_blocks if end == "ns" else self.mask_blocks)]
        blocks = cast(list[AdaLNBlock], both)
        each = [modulation for name in ("base", end) if name in modulations for modulation in modulations[name]]
        norm, head = (self.ns_head_nm, self.ns_head) if end == "ns" else (self.mask_head_nm, self.mask_head)
        modulation = modulations[f"{end}_head"][0]
        calls: dict[str, Any] = dict(method=self.attention_method, checkpoint=self._checkpoint)
        return head(run_blocks(blocks, each, x, norm, modulation, sizes, "diagonal", **calls))

    def _masked_codes(self, codes_BLC: Tensor, masked_BL: Tensor) -> Tensor:
        """What current tokens add to their positions' input [B, L, D]: a map of their codes, or the mask embedding."""
        embedded = self.word_embed(codes_BLC.to(self.word_embed.weight.dtype))
        return torch.where(masked_BL[..., None], self.mask_embed.weight[0].to(embedded.dtype), embedded)

    def current_input(self, scale: int, tokens_BL: Tensor, masked_BL: Tensor) -> Tensor:
        """The map of a scale's own codes (resized, through phi) seen at its resolution, [B, L, C]."""
        codes_BLC = self.pyramid.embedding(tokens_BL)
        if self.config["hide_masked"]:
            codes_BLC = codes_BLC.masked_fill(masked_BL[..., None], 0.0)
        return self.pyramid.next_input(self.pyramid.contribution(scale, codes_BLC), scale)

    def current_inputs(self, tokens_BN: Tensor, masked_BN: Tensor) -> Tensor:
        """`current_input` of all scales after the first, [B, N - L_0, C]."""
        tokens, masked = (parts.split(self.block_sizes, dim=1) for parts in (tokens_BN, masked_BN))
        scales = range(1, len(tokens))
        return torch.cat([self.current_input(scale, tokens[scale], masked[scale]) for scale in scales], dim=1)

    # -------------------------------------------------------------------------------------------- teacher forcing
    def forward(
        self,
        tokens_BN: Tensor,
        condition: Condition,
        masked_BN: Tensor | None = None,
        current_BN: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced conditionals of every token.

        Args:
            tokens_BN: int64 ids [B, N], coarse to fine.
            condition: of the B images.
            masked_BN: None for next-scale prediction. For refinement: bool [B, N] or [1, N], True at the positions
                whose tokens are hidden; the first scale's are not read.
            current_BN: int64 ids [B, N] whose unmasked ones are seen inside their own scale; None = tokens_BN. They
                differ where histories hold mistakes, see visar/train/self_correction.py.

        Returns: float32 logits [B, N, V].
        """
        with torch.no_grad():
            inputs_BLC = self.pyramid.inputs(tokens_BN)
            current_BN = tokens_BN if current_BN is None else current_BN
            current_BLC = None if masked_BN is None else self.current_inputs(current_BN, masked_BN)
        condition_RD = self.condition_vector(condition)
        x = self.embed(condition_RD, inputs_BLC, 0, len(self.scales) - 1)
        if current_BLC is not None and masked_BN is not None:
            first = self.block_sizes[0]
            x = x + functional.pad(self._masked_codes(current_BLC, masked_BN[:, first:]), (0, 0, first, 0))
        end: Literal["ns", "mask"] = "ns" if masked_BN is None else "mask"
        return self._run(self.input_dropout(x), self.modulate(condition_RD), self.block_sizes, end).float()

    # --------------------------------------------------------------------------------------------------- decoding
    def make_cache(self, rows: int, num_scales: int, dtype: torch.dtype, device: torch.device) -> None:
        """None: a scale sees itself only."""
        return None

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """0: a scale sees itself only."""
        return 0

    def raw_logits(self, state: ScaleState) -> Tensor:
        """Unguided logits [R, L, V] of scale `state.block`."""
        scale = state.block
        inputs_BLC = state.inputs_BNC[:, max(self.begin_of(scale), self.block_sizes[0]) : self.ends[scale]]
        x = self.embed(state.condition_RD, inputs_BLC, scale, scale)
        return self._run(x, state.modulations, (self.block_sizes[scale],), "ns")

    def refine(self, state: ScaleState, tokens_BL: Tensor, masked_BL: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Conditionals of all tokens of scale `state.block` (not the first) given those that are not masked.

        Args:
            state: coarser scales committed, this one not.
            tokens_BL: int64 ids of the scale.
            masked_BL: bool, True where the token is hidden.
            guidance_scale: "interpolate" convention; 1.0 = off, which runs no null rows (the released sampler's 1e-6
                in the other convention is practically that).

        Returns: float32 logits [B, L, V].
        """
        scale = state.block
        guided = state.scale_S is not None and guidance_scale != 1.0
        rows = state.condition_RD.shape[0] if guided else state.batch
        modulations = {name: value[:, :rows] for name, value in state.modulations.items()}
        inputs_BLC = state.inputs_BNC[:, self.begin_of(scale) : self.ends[scale]]
        x = self.embed(state.condition_RD[:rows], inputs_BLC, scale, scale)
        current = self._masked_codes(self.current_input(scale, tokens_BL, masked_BL), masked_BL)
        x = x + (torch.cat([current, current]) if guided else current)
        logits = self._run(x, modulations, (self.block_sizes[scale],), "mask")
        return combine(logits, guidance_scale) if guided else logits.float()


# -------------------------------------------------------------------------------------------- training and benchmark
def scale_weights(sizes: tuple[int, ...]) -> Tensor:
    """Loss weight of every position in the first phase, float32 [N], summing to 1.

    A scale's weight is the normal density at its place in the reversed order of side lengths, standardised; it is
    spread over the scale's tokens. Scales of middling size count most, where a plain mean counts the finest most.
    """
    sides = torch.tensor(sizes, dtype=torch.float64).sqrt()
    reversed_sides = sides.flip(0) / sides[-1]
    standard = (reversed_sides - reversed_sides.mean()) / reversed_sides.std()
    weight_S = torch.softmax(-0.5 * standard.square(), dim=0)
    counts = torch.tensor(sizes)
    return torch.repeat_interleave(weight_S / counts, counts).float()


def random_mask(sizes: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Masked positions of a step of the second phase, bool [1, N]: one ratio p ~ U(0, 1), ceil(p n) of a scale's n
    tokens.

    All images of the batch share them. The first scale has none. Made on the generator's device (CPU if None).
    """
    device = "cpu" if generator is None else generator.device
    ratio = torch.rand((), generator=generator, device=device)
    parts = [torch.zeros(sizes[0], dtype=torch.bool, device=device)]
    for size in sizes[1:]:
        rank = torch.rand(size, generator=generator, device=device).argsort().argsort()
        parts.append(rank < torch.ceil(ratio * size))
    return torch.cat(parts)[None]


def refinement_loss(logits_BNV: Tensor, tokens_BN: Tensor, masked_BN: Tensor) -> Tensor:
    """Cross-entropy of the second phase: mean over the masked positions."""
    loss_BN = functional.cross_entropy(logits_BNV.float().transpose(1, 2), tokens_BN, reduction="none")
    masked = masked_BN.expand_as(loss_BN)
    return (loss_BN * masked).sum() / masked.sum().clamp(min=1)


class NextScalePhase(Objective):
    """First phase: everything but the refinement parts, positions weighted by `scale_weights` where none are given."""

    def __init__(self, model: Any, layout: TokenLayout, options: Any, device: torch.device) -> None:
        super().__init__(model, layout, options, device)
        model.set_phase("next_scale")
        if self.weight_L is None:
            self.weight_L = scale_weights(model.block_sizes).to(device)

    def finish(self, model: Any) -> None:
        """Starts the refinement parts, for the second phase, from what was learnt."""
        model.begin_refinement()


class RefinementPhase(Objective):
    """Second phase: the refinement parts alone, on randomly masked tokens."""

    takes_distributions = False

    def __init__(self, model: Any, layout: TokenLayout, options: Any, device: torch.device) -> None:
        super().__init__(model, layout, options, device)
        model.set_phase("refinement")
        self.sizes = model.block_sizes

    def loss(
        self,
        call: Callable[..., Tensor],
        tokens_BL: Tensor,
        target: Tensor,
        condition: Condition,
        random: torch.Generator,
    ) -> Tensor:
        """Unmasked targets are what is seen inside a scale; coarser scales are read from the tokens."""
        masked_1L = random_mask(self.sizes, random)
        return refinement_loss(call(tokens_BL, condition, masked_1L, target), target, masked_1L)

    def measure(
        self, model: Any, tokens_BL: Tensor, conditions: Sequence[Condition], random: torch.Generator
    ) -> list[Tensor]:
        """Mean loss of the masked tokens, the same ones under every condition."""
        masked_1L = random_mask(self.sizes, random)
        return [
            refinement_loss(model(tokens_BL, condition, masked_1L), tokens_BL, masked_1L) for condition in conditions
        ]


def _arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    # Released models are not trained with hidden masked codes; see docs/results.md.
    return scale_arguments(tokenizer, vocabulary, options, caption_width) | {"hide_masked": True}


FAMILY = GeneratorFamily(
    model=HierarchicalMaskedTransformer,
    presets=HIERARCHICAL_MASKED_PRESETS,
    tokenizer="var-vq16",
    tiny=dict(
        vocab_size=128,
        codebook_width=8,
        scales=(1, 2, 4),
        width=64,
        num_layers=3,
        num_heads=2,
        num_refinement_layers=1,
        num_classes=4,
    ),
    fits=fits_scales,
    arguments=_arguments,
    connect=take_pyramid,
    phases={"next_scale": NextScalePhase, "refinement": RefinementPhase},
)
