"""Coarse-to-fine generator: labels of clusters of codes one by one, then the codes of all labels in one pass.

Source: CTF, arXiv 2503.16194 (tables and captions; no code and no weights are public, and the text on its second
stage was not at hand): stage 1 is LlamaGen's transformer over the labels, stage 2 predicts all codes given all labels.
Stage 2 here is this project's: it sees everything, and its codes are those of the given clusters alone, so that
log p(codes) = sum_n log p(label_n | labels before) + sum_n log p(code_n | all labels) exactly, to be compared with a
flat model's. Given the labels, codes are independent of each other.

B images, R rows (2B when guided), N tokens, V codes, M clusters, C code width, D hidden size of a stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, combine, double, repeat
from visar.core.interface import FineSampling, TokenLayout
from visar.data.vocabulary import Vocabulary
from visar.generators.clusters import cluster_codes
from visar.generators.raster import RASTER_PRESETS, RasterGPT
from visar.generators.training import GeneratorFamily, Objective, position_weights, shared_arguments, token_loss
from visar.layers.bidirectional import BidirectionalBlock
from visar.layers.conditioning import ConditionVector
from visar.layers.packable import Packable
from visar.layers.rope import PrefixRotation, RopeKind

_FINE: dict[str, Any] = dict(clusters=512, fine_width=1024, fine_layers=24, fine_heads=16, fine_hidden_width=4096)
_FINE |= dict(fine_sampling=dict(temperature=1.1))

# The paper's sizes: LlamaGen's over 512 labels (87 M, 310 M and 734 M parameters), and a stage 2 of 343 M, whose form
# it does not tell; this one's has 321 M. Figures of the paper: temperature 1.1 in both stages.
COARSE_TO_FINE_PRESETS: dict[str, dict] = {
    name.replace("llamagen", "ctf"): {**RASTER_PRESETS[name], **_FINE}
    for name in ("llamagen-b", "llamagen-l", "llamagen-xl")
}

Stage = Literal["both", "coarse", "fine"]


class StageLogits(NamedTuple):
    """Logits of both stages: coarse [B, N, M], and fine [B, N, V], -inf outside of the given labels' clusters; None
    for a stage that was not asked for."""

    coarse: Tensor | None
    fine: Tensor | None


class FineTransformer(nn.Module):
    """Logits of all codes of an image given all its labels, in one pass that sees everything.

    Args:
        clusters, vocab_size, num_tokens: M, V, N.
        width, num_layers, num_heads, hidden_width: D, depth, heads, width of the feed-forward parts.
        num_classes, attributes, word_vocab_size: see `ConditionVector`.
        dropout: of attention and behind projections.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self,
        *,
        clusters: int,
        vocab_size: int,
        num_tokens: int,
        width: int,
        num_layers: int,
        num_heads: int,
        hidden_width: int,
        num_classes: int,
        attributes: tuple[int, ...],
        word_vocab_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"fine_width {width}, fine_heads {num_heads}; the width must be a multiple of the heads")
        self.label_embedding = nn.Embedding(clusters, width)
        self.position = nn.Parameter(torch.zeros(num_tokens, width))
        self.condition_vector = ConditionVector(width, num_classes, attributes, word_vocab_size)
        self.blocks = nn.ModuleList(
            BidirectionalBlock(width, num_heads, hidden_width, dropout, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.output = nn.Linear(width, vocab_size, bias=False)

    def forward(self, labels_RN: Tensor, vector_RD: Tensor) -> Tensor:
        """Logits [R, N, V] of all codes, those of other clusters among them; vector_RD: from `condition_vector`."""
        x = self.label_embedding(labels_RN) + self.position + vector_RD[:, None]
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block, x) if checkpointing else block(x)
        return self.output(self.norm(x))


@dataclass
class FineState:
    """What the fine stage reads of a batch besides its labels.

    Attributes:
        vector_RD: what the images are conditioned on.
        scale_1: float32 [1], guidance; None when it is off.
    """

    vector_RD: Tensor
    scale_1: Tensor | None


class CoarseToFine(Packable, ModelMixin, ConfigMixin):
    """Labels of clusters of codes in raster order, then their codes in one pass. CTF, arXiv 2503.16194.

    The first stage is a `RasterGPT` of M codes, `coarse`: samplers of raster models run on it, and draw the codes
    behind it (visar/samplers/stages.py).

    Args:
        vocab_size: number of codes V.
        clusters: M (CTF: 512 for 16384 codes).
        balanced, cluster_seed: see `cluster_codes`; read by training when it makes the clusters.
        grid: (rows, columns) of the tokens.
        width, num_layers, num_heads, hidden_width: of the first stage.
        fine_width, fine_layers, fine_heads, fine_hidden_width: of the second.
        num_classes, attributes, word_vocab_size, num_words, words, rope, prefix_rotation: see `RasterGPT`; the second
            stage takes the mean of the words' vectors.
        token_dropout, residual_dropout, ffn_dropout: of the first stage, see `RasterGPT`.
        fine_dropout: of the second.
        fine_sampling: fields of `FineSampling` that differ from its defaults.

    Raises:
        ValueError: more clusters than codes, no condition at all, or sizes that exclude each other.
    """

    quantized_parts = ("coarse", "fine")
    read_once_per_block = ("coarse",)
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "BidirectionalBlock"]
    _repeated_blocks = ["Block", "BidirectionalBlock"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        clusters: int = 512,
        balanced: bool = True,
        cluster_seed: int = 0,
        grid: tuple[int, int] = (16, 16),
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        hidden_width: int = 2048,
        fine_width: int = 1024,
        fine_layers: int = 24,
        fine_heads: int = 16,
        fine_hidden_width: int = 4096,
        num_classes: int = 1000,
        attributes: tuple[int, ...] = (),
        word_vocab_size: int = 0,
        num_words: int = 0,
        words: Literal["sum", "prefix"] = "sum",
        rope: RopeKind = "2d",
        prefix_rotation: PrefixRotation = "zero",
        token_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        fine_dropout: float = 0.0,
        fine_sampling: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= clusters <= vocab_size:
            raise ValueError(f"clusters {clusters}; allowed: 1 ... {vocab_size}, the number of codes")
        conditions: dict[str, Any] = dict(
            num_classes=num_classes, attributes=tuple(attributes), word_vocab_size=word_vocab_size
        )
        self.num_tokens = grid[0] * grid[1]
        self.coarse = RasterGPT(
            vocab_size=clusters,
            grid=grid,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            hidden_width=hidden_width,
            num_words=num_words,
            words=words,
            rope=rope,
            prefix_rotation=prefix_rotation,
            token_dropout=token_dropout,
            residual_dropout=residual_dropout,
            ffn_dropout=ffn_dropout,
            **conditions,
        )
        self.fine = FineTransformer(
            clusters=clusters,
            vocab_size=vocab_size,
            num_tokens=self.num_tokens,
            width=fine_width,
            num_layers=fine_layers,
            num_heads=fine_heads,
            hidden_width=fine_hidden_width,
            dropout=fine_dropout,
            **conditions,
        )
        FineSampling(**(fine_sampling or {}))
        # Until a tokenizer's are set, clusters of neighbouring ids.
        cluster_V = torch.arange(vocab_size) * clusters // vocab_size
        self.register_buffer("cluster_of", cluster_V)
        self.register_buffer("rank_of", torch.arange(vocab_size) - torch.searchsorted(cluster_V, cluster_V))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from: N(0, 0.02) for linear and embedding layers and places, zero output heads."""
        self.coarse.reset_parameters(generator)
        for module in self.fine.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fine.position, std=0.02, generator=generator)
        nn.init.zeros_(self.fine.output.weight)

    @property
    def fine_sampling(self) -> FineSampling:
        """How the second stage is sampled; what is set is saved with the model."""
        return FineSampling(**(self.config["fine_sampling"] or {}))

    @fine_sampling.setter
    def fine_sampling(self, value: FineSampling) -> None:
        self.register_to_config(fine_sampling=asdict(value))

    # ---------------------------------------------------------------------------------------------------- clusters
    def set_clusters(self, cluster_V: Tensor, rank_V: Tensor) -> None:
        """Takes over clusters of the codes and the codes' ranks in them, as of `cluster_codes`.

        Raises:
            ValueError: other shapes or numbers of clusters, an empty one, or ranks that do not count its codes.
        """
        codes, clusters = self.config["vocab_size"], self.config["clusters"]
        if cluster_V.shape != (codes,) or rank_V.shape != (codes,):
            raise ValueError(
                f"clusters and ranks {tuple(cluster_V.shape)} and {tuple(rank_V.shape)}; needed: ({codes},)"
            )
        sizes_V = torch.bincount(cluster_V.clamp(min=0), minlength=clusters)
        if int(cluster_V.min()) < 0 or len(sizes_V) != clusters or not int(sizes_V.min()):
            found = f"{len(set(cluster_V.tolist()))} of {int(cluster_V.min())} ... {int(cluster_V.max())}"
            raise ValueError(f"clusters {found}; needed: all of 0 ... {clusters - 1}")
        order_V = (cluster_V * codes + rank_V).argsort()
        places_V = torch.arange(codes, device=order_V.device) - (sizes_V.cumsum(0) - sizes_V)[cluster_V[order_V]]
        if not torch.equal(rank_V[order_V], places_V):
            raise ValueError("ranks of the codes; needed: 0, 1, ... in every cluster")
        self.cluster_of.copy_(cluster_V)
        self.rank_of.copy_(rank_V)

    def preview(self, labels: Tensor) -> Tensor:
        """The code nearest to the mean of every label's cluster: what labels without codes are shown as."""
        code_V = torch.arange(len(self.rank_of), device=labels.device)
        central_M = torch.zeros(self.config["clusters"], dtype=torch.int64, device=labels.device)
        central_M.scatter_reduce_(0, self.cluster_of, torch.where(self.rank_of == 0, code_V, 0), "amax")
        return central_M[labels]

    def centres(self, codebook_VC: Tensor) -> Tensor:
        """Means float32 [M, C] of the clusters' code vectors: the codebook of the labels."""
        member_MV = torch.arange(self.config["clusters"], device=self.cluster_of.device)[:, None] == self.cluster_of
        member_MV = member_MV.to(codebook_VC.device, torch.float32)
        return member_MV @ codebook_VC.float() / member_MV.sum(1, keepdim=True)

    # -------------------------------------------------------------------------------------------------- conditions
    def check_condition(self, condition: Condition) -> None:
        """Checks that the condition has what this model reads; errors as of `RasterGPT.check_condition`."""
        self.coarse.check_condition(condition)

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that gives nothing, in the same shapes."""
        return self.coarse.null_condition(condition)

    def example_condition(self, batch: int) -> Condition:
        """Some condition that this model takes, for `batch` images, on its device."""
        return self.coarse.example_condition(batch)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Labels of every block: one each."""
        return self.coarse.block_sizes

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """Blocks of one kind do the same work; behind the last one all codes are drawn."""
        return (*self.coarse.block_kinds[:-1], "last")

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Bytes of the first stage's keys and values; the second keeps none."""
        return self.coarse.cache_bytes(rows, positions)

    # -------------------------------------------------------------------------------------------- teacher forcing
    def forward(self, tokens_BN: Tensor, condition: Condition, stage: Stage = "both") -> StageLogits:
        """Teacher-forced conditionals: of every label given the labels before it, and of every code given all labels.

        Args:
            tokens_BN: int64 ids of codes.
            condition: of the B images.
            stage: what is computed.
        """
        labels_BN = self.cluster_of[tokens_BN]
        coarse = self.coarse(labels_BN, condition) if stage != "fine" else None
        fine = None
        if stage != "coarse":
            fine = self._inside(self.fine(labels_BN, self.fine.condition_vector(condition)), labels_BN)
        return StageLogits(coarse, fine)

    def log_probs(self, tokens_BN: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Log-likelihood of labels given those before, and of codes given all labels, nats, float32 [B, N] each.

        Their sum over both and all tokens is that of the image's tokens.
        """
        logits = self(tokens_BN, condition)
        pairs = (logits.coarse, self.cluster_of[tokens_BN]), (logits.fine, tokens_BN)
        coarse, fine = (
            each.float().log_softmax(-1).gather(-1, ids_BN[..., None]).squeeze(-1)
            for each, ids_BN in pairs
            if each is not None
        )
        return coarse, fine

    def _inside(self, logits_BNV: Tensor, labels_BN: Tensor) -> Tensor:
        """The logits, -inf outside of the labels' clusters."""
        return logits_BNV.masked_fill(self.cluster_of != labels_BN[..., None], float("-inf"))

    # --------------------------------------------------------------------------------------------------- decoding
    def start(self, condition: Condition, guidance: Guidance = OFF, *, state: FineState | None = None) -> FineState:
        """State of the fine stage; that of the first is `coarse.start`.

        Args:
            condition: of the B images.
            guidance: of the stage's only pass.
            state: a state of the same batch and guidance, whose buffers are used again.

        Raises:
            ValueError: see `check_condition`.
        """
        self.check_condition(condition)
        guided = guidance.active(1)
        rows = double(condition, self.null_condition(condition)) if guided else condition
        vector_RD = self.fine.condition_vector(rows)
        if state is None:
            scale_1 = torch.ones(1, device=vector_RD.device) if guided else None
            state = FineState(torch.empty_like(vector_RD), scale_1)
        state.vector_RD.copy_(vector_RD)
        if state.scale_1 is not None:
            state.scale_1.fill_(guidance.at(0, 1))
        return state

    def fine_logits(self, state: FineState, labels_BN: Tensor, first: int = 0) -> Tensor:
        """Guided float32 logits [b, N, V] of all codes given all labels, -inf outside of the labels' clusters.

        Args:
            state: of the batch.
            labels_BN: int64 labels of b of its images, one after another.
            first: place of the first of them in the batch.
        """
        images = slice(first, first + len(labels_BN))
        if state.scale_1 is None:
            return self._inside(self.fine(labels_BN, state.vector_RD[images]).float(), labels_BN)
        vector_RD = torch.cat([part_BD[images] for part_BD in state.vector_RD.chunk(2)])
        return self._inside(combine(self.fine(repeat(labels_BN, 2), vector_RD), state.scale_1), labels_BN)


# -------------------------------------------------------------------------------------------- training and benchmark
class StagesObjective(Objective):
    """What a run minimises: cross-entropy of the labels plus that of the codes given them, nats per token.

    scale_weights weighs the two; a stage of weight 0 is frozen, and the other is trained alone.
    """

    takes_distributions = False

    def __init__(self, model: Any, layout: TokenLayout, options: Any, device: torch.device) -> None:
        weight_2 = position_weights((1, 1), options.scale_weights)
        self.weights: tuple[float, ...] = (1.0, 1.0) if weight_2 is None else tuple(weight_2.tolist())
        for part, weight in zip((model.coarse, model.fine), self.weights, strict=True):
            part.requires_grad_(weight > 0)
        self.stage: Stage = "both" if all(self.weights) else "coarse" if self.weights[0] else "fine"
        self.cluster_of = model.cluster_of
        self._token_loss = torch.compile(token_loss) if options.compile else token_loss

    def _losses(self, logits: StageLogits, tokens_BN: Tensor) -> list[Tensor | None]:
        """Mean loss of each stage, None for one that was not computed."""
        pairs = (logits.coarse, self.cluster_of.to(tokens_BN.device)[tokens_BN]), (logits.fine, tokens_BN)
        return [None if each is None else self._token_loss(each, ids_BN) for each, ids_BN in pairs]

    def loss(
        self, call: Any, tokens_BL: Tensor, target: Tensor, condition: Condition, random: torch.Generator
    ) -> Tensor:
        losses = self._losses(call(tokens_BL, condition, self.stage), target)
        weighted = [weight * loss for weight, loss in zip(self.weights, losses, strict=True) if loss is not None]
        return torch.stack(weighted).sum()

    def measure(
        self, model: Any, tokens_BL: Tensor, conditions: Sequence[Condition], random: torch.Generator
    ) -> list[Tensor]:
        """Mean negative log-likelihood of a batch under each of several conditions, both stages together."""
        losses = [self._losses(model(tokens_BL, condition), tokens_BL) for condition in conditions]
        return [torch.stack([loss for loss in both if loss is not None]).sum() for both in losses]


def _arguments(tokenizer: Any, vocabulary: Vocabulary, options: Any, caption_width: int) -> dict[str, Any]:
    if caption_width:
        raise ValueError("this family reads classes, attributes and words: give no text_encoder")
    arguments = shared_arguments(tokenizer, vocabulary, options)
    del arguments["codebook_width"]
    arguments |= dict(grid=tokenizer.layout.shapes[0], hidden_width=options.hidden_width)
    arguments |= dict(fine_width=options.width, fine_layers=options.num_layers, fine_heads=options.num_heads)
    arguments |= dict(fine_hidden_width=4 * options.width, clusters=default_clusters(arguments["vocab_size"]))
    dropouts = ("token_dropout", "residual_dropout", "ffn_dropout", "fine_dropout")
    arguments |= dict.fromkeys(dropouts, options.dropout)
    if options.words != "none":
        arguments |= dict(words=options.words, num_words=vocabulary.num_words)
    return arguments


def default_clusters(vocab_size: int) -> int:
    """Clusters of 32 codes each, as of CTF's 512 for 16384 codes."""
    return max(1, vocab_size // 32)


def _fits(layout: TokenLayout) -> bool:
    return layout.arrangement == "grid" and layout.vocab_size > 0


def _connect(model: CoarseToFine, tokenizer: Any) -> None:
    """Makes the clusters of the tokenizer's codes."""
    config = model.config
    made = cluster_codes(
        tokenizer.codebook, config["clusters"], balanced=config["balanced"], seed=config["cluster_seed"]
    )
    model.set_clusters(*made)


FAMILY = GeneratorFamily(
    model=CoarseToFine,
    presets={},  # sizes are COARSE_TO_FINE_PRESETS; the benchmark measures generators of one stage
    tokenizer="vq-16",
    tiny=dict(vocab_size=128, clusters=8, grid=(4, 4), width=64, num_layers=2, num_heads=2, hidden_width=96)
    | dict(fine_width=64, fine_layers=1, fine_heads=2, fine_hidden_width=128, num_classes=4),
    fits=_fits,
    arguments=_arguments,
    connect=_connect,
    phases={"next_scale": StagesObjective},
)
