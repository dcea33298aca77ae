"""Next-scale transformer: predicts all tokens of a scale at once from the scales before it.

Source: VAR, arXiv 2404.02905 section 3; parameter names and numerics of FoundationVision/VAR@78b9539. Attributes and
words are this project's.

B images, R rows (2B when guided), L positions of a call, N all positions, D hidden size, V codes, C code width.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.generators.scales import ScaleGenerator, ScaleState, fits_scales, scale_arguments, take_pyramid
from visar.generators.training import GeneratorFamily
from visar.layers.cache import KVCache
from visar.layers.scale_attention import Method
from visar.layers.scale_blocks import AdaLNBlock, AdaLNOutputNorm, LayerCache, reset_blocks, run_blocks
from visar.tokenizers.multiscale_vq import SCALES_256

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)

# Released sizes, arXiv 2404.02905 table 1 and appendix: depth d has width 64 d and d heads (310 M, 601 M, 1.03 B,
# 2.01 B; 2.35 B at 512 px).
NEXT_SCALE_PRESETS: dict[str, dict] = {
    "var-d16": dict(width=1024, num_layers=16, num_heads=16, scales=SCALES_256),
    "var-d20": dict(width=1280, num_layers=20, num_heads=20, scales=SCALES_256),
    "var-d24": dict(width=1536, num_layers=24, num_heads=24, scales=SCALES_256),
    "var-d30": dict(width=1920, num_layers=30, num_heads=30, scales=SCALES_256),
    "var-d36": dict(width=2304, num_layers=36, num_heads=36, scales=SCALES_512, shared_adaln=True),
}


class NextScaleTransformer(ScaleGenerator, ModelMixin, ConfigMixin):
    """Block-causal transformer over a pyramid of token maps. arXiv 2404.02905.

    A scale's input is the map accumulated from all coarser scales, resized to it; the first scale's is the condition.

    Args:
        vocab_size, codebook_width: V and C of the tokenizer.
        scales: sizes, coarse to fine (numbers or (height, width) pairs); the first may exceed 1.
        num_phi, phi_ratio: of the tokenizer, see `ScalePyramid`.
        width, num_layers, num_heads, mlp_ratio: D, depth, heads, feed-forward width / D.
        num_classes: classes of label column 0; 0 = not conditioned on a class.
        attributes: number of values of every further label column.
        word_vocab_size: size of the word table (0 padding, 1 "not given"); 0 = no words.
        shared_adaln: one modulation layer for all blocks plus an offset per block (VAR at 512 px), else one per block.
        qk_norm: l2-normalised queries and keys with a learned scale per head (all released models).
        drop_path: stochastic depth of the last block in training, rising linearly from 0 (VAR: 0.1 depth / 24).
        dropout: on the input, and after every attention and feed-forward part (VAR: 0.0).
        norm_eps: of all norms.

    Raises:
        ValueError: nothing to be conditioned on, a width that heads do not divide, or scales that are not a pyramid.
    """

    quantized_parts = ("blocks", "head")
    read_once_per_block = ("word_embed", "blocks", "head")

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
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        attributes: tuple[int, ...] = (),
        word_vocab_size: int = 0,
        shared_adaln: bool = False,
        qk_norm: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}")
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
        self.attention_method: Method = "auto"
        self.input_dropout = nn.Dropout(dropout)
        self.word_embed = nn.Linear(codebook_width, width)
        if shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(
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
            for index in range(num_layers)
        )
        self.head_nm = AdaLNOutputNorm(width, norm_eps)
        self.head = nn.Linear(width, vocab_size)
        self._reset_inputs(width, None)

    def reset_parameters(self, generator: torch.Generator | None = None, gate: float = 1e-3) -> None:
        """Weights for training from scratch (VAR's); gate: 1e-3 for depth 16 and 20, down to 5e-6 for depth 36."""
        width, depth = self.config["width"], self.config["num_layers"]
        std = (1 / width / 3) ** 0.5
        self._reset_inputs(width, generator)
        reset_blocks(self.blocks, width, depth, gate, generator)
        modulation = cast(nn.Linear, self.head_nm.ada_lin[1])
        for linear in (self.word_embed, self.head, modulation):
            nn.init.trunc_normal_(linear.weight, std=std, generator=generator)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            modulation.weight.mul_(0.5)

    # -------------------------------------------------------------------------------------------- teacher forcing
    def embed_map(self, inputs_BLC: Tensor) -> Tensor:
        return self.word_embed(inputs_BLC.to(self.word_embed.weight.dtype))

    def forward(self, tokens_BN: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced conditionals of every token given the condition and the coarser scales.

        Args:
            tokens_BN: int64 ids [B, N], coarse to fine (those of the last scale are not read).
            condition: of the B images.

        Returns: float32 logits [B, N, V].
        """
        with torch.no_grad():
            inputs_BLC = self.pyramid.inputs(tokens_BN)
        return self.forward_inputs(inputs_BLC, condition)

    def forward_inputs(self, inputs_BLC: Tensor, condition: Condition) -> Tensor:
        """As `forward`, from the inputs [B, N - L_0, C] of the scales after the first."""
        return self.head(self.hidden(inputs_BLC, condition)).float()

    def hidden(self, inputs_BLC: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced: what the head reads, [B, N, D]; inputs as for `forward_inputs`."""
        condition_RD = self.condition_vector(condition)
        x = self.input_dropout(self.embed(condition_RD, inputs_BLC, 0, len(self.scales) - 1))
        return self._run(x, self.modulate(condition_RD), self.block_sizes)

    @torch.no_grad()
    def history(self, vectors_BNC: Tensor) -> Tensor:
        """What `hidden` reads where tokens are vectors [B, N, C], codes or not: inputs [B, N - L_0, C]."""
        inputs, total = [vectors_BNC[:, :0]], self.pyramid.empty_map(vectors_BNC.shape[0])
        for scale, vectors_BLC in enumerate(vectors_BNC.split(self.block_sizes, dim=1)[:-1]):
            total = self.pyramid.accumulate(total, scale, vectors_BLC)
            inputs.append(self.pyramid.next_input(total, scale + 1))
        return torch.cat(inputs, dim=1)

    def _run(
        self, x: Tensor, modulations: dict[str, Tensor], sizes: tuple[int, ...], caches: list[LayerCache] | None = None
    ) -> Tensor:
        """What the head reads, [R, L, D]."""
        return run_blocks(
            cast(Sequence[AdaLNBlock], self.blocks),
            modulations["blocks"],
            x,
            self.head_nm,
            modulations["head"][0],
            sizes,
            "causal",
            caches=caches,
            method=self.attention_method,
            checkpoint=self._checkpoint,
        )

    def parallel_hidden(self, vectors_BNC: Tensor, extra_BND: Tensor, condition: Condition) -> Tensor:
        """What the head reads of all tokens in one pass, [B, N, D]: a token sees the condition, the coarser scales and
        its own input, so that tokens of one scale do not see each other's noise. For one-step students.

        Args:
            vectors_BNC: code vectors, or noise; not maps.
            extra_BND: added to the embedded vectors.
            condition: of the B images.
        """
        condition_RD = self.condition_vector(condition)
        x = self.embed_map(vectors_BNC) + self.embed_positions(0, len(self.scales) - 1) + extra_BND
        cell_B1D = self.start_input(condition_RD)[:, :1].to(x.dtype)
        modulations = self.modulate(condition_RD)
        hidden_BLD = run_blocks(
            cast(Sequence[AdaLNBlock], self.blocks),
            modulations["blocks"],
            torch.cat([cell_B1D, x], dim=1),
            self.head_nm,
            modulations["head"][0],
            (1, *self.block_sizes),
            "own",
            method=self.attention_method,
            checkpoint=self._checkpoint,
        )
        return hidden_BLD[:, 1:]

    def logits_of(self, hidden_BND: Tensor) -> Tensor:
        """Logits [B, N, V] of what `parallel_hidden` returns."""
        return self.head(hidden_BND)

    @property
    def codes(self) -> Tensor:
        """Code vectors [V, C] of the tokenizer."""
        return self.pyramid.codebook

    def latents_of(self, vectors_BNC: Tensor) -> Tensor:
        """The accumulated map [B, C, h, w] of code vectors of all scales."""
        total = self.pyramid.empty_map(vectors_BNC.shape[0])
        for scale, vectors_BLC in enumerate(vectors_BNC.split(self.block_sizes, dim=1)):
            total = self.pyramid.accumulate(total, scale, vectors_BLC)
        return total

    def modulate(self, condition_RD: Tensor) -> dict[str, Tensor]:
        """Modulations of all blocks [depth, R, 6, D] and of the output norm [1, R, 2, D]."""
        shared = self.shared_modulation(condition_RD)
        blocks = cast(Iterable[AdaLNBlock], self.blocks)
        modulations = torch.stack([block.modulation(condition_RD, shared) for block in blocks])
        return {"blocks": modulations, "head": self.head_nm.modulation(condition_RD)[None]}

    # --------------------------------------------------------------------------------------------------- decoding
    def make_cache(self, rows: int, num_scales: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """Keys and values of the first scales."""
        return KVCache(
            num_layers=len(self.blocks),
            rows=rows,
            num_heads=self.config["num_heads"],
            num_slots=self.ends[num_scales - 1],
            head_width=self.config["width"] // self.config["num_heads"],
            device=device,
            dtype=dtype,
        )

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Bytes of keys and values of some rows and positions; None is all positions."""
        positions = self.num_tokens if positions is None else positions
        return 2 * len(self.blocks) * self.config["width"] * self.head.weight.dtype.itemsize * rows * positions

    def raw_logits(self, state: ScaleState) -> Tensor:
        """Unguided logits [R, L, V] of scale `state.block`.

        Where it is the first scale that the state predicts, all coarser ones are read in the same pass.
        """
        assert state.cache is not None
        scale = state.block
        first = 0 if scale == state.first_block else scale
        begin, end = self.begin_of(first), self.ends[scale]
        inputs_BLC = state.inputs_BNC[:, max(begin, self.block_sizes[0]) : end]
        x = self.embed(state.condition_RD, inputs_BLC, first, scale)
        position = torch.arange(begin, end, device=x.device)[None]
        caches = [LayerCache(state.cache, index, position, end) for index in range(len(self.blocks))]
        x = self._run(x, state.modulations, self.block_sizes[first : scale + 1], caches)
        return self.head(x[:, -self.block_sizes[scale] :])


FAMILY = GeneratorFamily(
    model=NextScaleTransformer,
    presets=NEXT_SCALE_PRESETS,
    tokenizer="var-vq16",
    tiny=dict(vocab_size=128, codebook_width=8, scales=(1, 2, 4), width=64, num_layers=2, num_heads=2, num_classes=4),
    fits=fits_scales,
    arguments=scale_arguments,
    connect=take_pyramid,
)
