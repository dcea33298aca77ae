"""Drafters that read the target's last hidden vectors: an EAGLE-style layer, and heads for spatial offsets.

Hidden vector h_t is the one that predicts token t; it has seen the condition and the tokens before t. Both drafters
end in the target's own output head and use its token embedding; neither is part of their weights. They are trained on
frozen targets with `feature_loss` and `heads_loss`.

B batch, R rows (2B when guided), N tokens, L slots of a pass, J drafts so far, W nodes of a level, D width, V codes,
T slots of a cache, M nodes.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from visar import kernels
from visar.cache import KVCache, visible, visible_tree
from visar.generators.raster import Attention, LayerCache
from visar.guidance import repeat
from visar.layers import RMSNorm, SwiGLU
from visar.rope import rope_table
from visar.runtime import Session
from visar.samplers.drafters import Kept, Target, check_fit, weights_key
from visar.samplers.verify import Generator, row_at, token_law
from visar.tree import DraftTree


def target_digest(model: Generator) -> str:
    """Tells a target from others: 16 hexadecimal digits of the sha256 of some rows of its output head.

    The rows are rounded to bfloat16 first, so that it does not matter whether they were loaded in that or in float32.
    """
    rows = model.output.weight[:64].detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def check_features(drafter: Generator, model: Generator) -> None:
    """Checks that a drafter can read a target's hidden vectors, and was trained on this one's if it says so.

    Raises:
        ValueError: the target has none to show, or of another width, or it is not the drafter's.
    """
    if not callable(getattr(model, "features", None)):
        raise ValueError(f"this drafter reads hidden vectors, which {type(model).__name__} does not show")
    check_fit(drafter, model)
    if drafter.config["width"] != model.config["width"]:
        raise ValueError(f"the drafter's width is {drafter.config['width']}, the generator's {model.config['width']}")
    digest = drafter.config["target_digest"]
    if digest and digest != target_digest(model):
        raise ValueError(
            f"the drafter was trained for {drafter.config['target'] or 'another generator'} (weights {digest}); the "
            f"weights of this generator are {target_digest(model)}"
        )


def law_or_uniform(law_BV: Tensor, known_B: Tensor) -> Tensor:
    """The law where hidden vectors are known, else the uniform one (in the first pass there are none)."""
    return torch.where(known_B[:, None], law_BV, 1.0 / law_BV.shape[-1])


# ------------------------------------------------------------------------------------------------------------- EAGLE
class FeatureDrafter(ModelMixin, ConfigMixin):
    """Predicts the target's next hidden vector from the latest one and the token after it. EAGLE, arXiv 2401.15077.

    (embedding of token t, h_t) -> linear 2D to D -> one decoder layer without an input norm -> h_(t+1) -> the target's
    head. As in the drafters of LANTERN, arXiv 2410.03355 (LlamaGen-XL: width 1280, 20 heads, hidden width 3584).

    Args:
        vocab_size, grid: the target's.
        width: D, the target's.
        num_heads, hidden_width: of the layer.
        prefix_length: positions before the first image token, for the rotary table.
        target, target_digest: name and `target_digest` of the generator it was trained for; "" = not said.

    Differs from the paper: the prefix is not fed; h_0 carries the condition.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        grid: tuple[int, int] = (16, 16),
        width: int = 1280,
        num_heads: int = 20,
        hidden_width: int = 3584,
        prefix_length: int = 1,
        target: str = "",
        target_digest: str = "",
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * width, width)
        self.attention = Attention(width, num_heads, 0.0)
        self.ffn_norm = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden_width)
        self._rope = rope_table(
            "2d", prefix_length=prefix_length, grid=(grid[0], grid[1]), head_width=width // num_heads
        )[prefix_length:]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from: N(0, 0.02), and predictions near the vectors that are given."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.fc.bias)
        with torch.no_grad():
            self.fc.weight[:, self.config["width"] :] += torch.eye(self.config["width"])

    def rope(self, device: torch.device) -> Tensor:
        """Rotary table [N, E / 2, 2] of the image tokens."""
        if self._rope.device != device:
            self._rope = self._rope.to(device)
        return self._rope

    def read(self, embedded_RLD: Tensor, hidden_RLD: Tensor, rope: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Predicted hidden vectors h_(t+1) [R, L, D] from tokens t and h_t."""
        x = self.fc(torch.cat([embedded_RLD, hidden_RLD], dim=-1))
        x = x + self.attention(x, rope, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))

    def read_by_kernels(self, embedded_RLD: Tensor, hidden_RLD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """What `read` does; attend: queries, keys and values [R, L, 3 D] -> what attention makes of them [R, L, D]."""
        from visar.kernels.elementwise import add_rms_norm_

        x_RLD = self.fc(torch.cat([embedded_RLD, hidden_RLD], dim=-1))
        mixed_RLD = self.attention.wo(attend(self.attention.wqkv(x_RLD)))
        norm = self.ffn_norm
        normed_MD = add_rms_norm_(x_RLD.flatten(0, 1), mixed_RLD.flatten(0, 1), norm.weight, norm.eps)
        return x_RLD + self.feed_forward(normed_MD.view_as(x_RLD))

    def forward(self, embedded_BND: Tensor, hidden_BND: Tensor) -> Tensor:
        """Teacher-forced predictions of h_1 ... h_N, [B, N, D]."""
        rope = self.rope(hidden_BND.device)[None, : hidden_BND.shape[1]]
        return self.read(embedded_BND, hidden_BND, rope, None, None)

    def key(self) -> tuple:
        """See Drafter."""
        return ("feature", *weights_key(self))

    def start(self, session: Session, kept: Kept, target: Target) -> "FeatureDrafting":
        """See Drafter."""
        check_features(self, target.model)
        return FeatureDrafting(self, session, kept, target)


def feature_loss(
    drafter: Any,
    model: Generator,
    hidden_BND: Tensor,
    tokens_BN: Tensor,
    uniform_BND: Tensor | None = None,
    law_weight: float = 0.1,
    noise: float = 0.2,
) -> Tensor:
    """Loss of an EAGLE drafter on a frozen target: smooth L1 of the next hidden vectors + weight * soft cross-entropy.

    arXiv 2401.15077, section 4.2 (its training adds noise to the inputs).

    Args:
        model: the target, for its embedding and output head.
        hidden_BND: its teacher-forced hidden vectors, `model.hidden(tokens, condition)`.
        tokens_BN: int64.
        uniform_BND: uniform numbers u in (0, 1) for noise on the inputs, (u - 1/2) * noise; None = off.
        law_weight: 0.1.
        noise: width of the noise. EAGLE's released training: 0.2 * 512 / length, for texts of about 512 tokens.
    """
    with torch.no_grad():
        embedded_BND = model.embed(tokens_BN[:, :-1])
        wanted = hidden_BND[:, 1:]
        law = torch.softmax(model.output(wanted).float(), dim=-1)
        given = hidden_BND[:, :-1]
        if uniform_BND is not None:
            given = given + (uniform_BND[:, :-1].to(given) - 0.5) * noise
    predicted = drafter(embedded_BND, given)
    log_law = torch.log_softmax(model.output(predicted).float(), dim=-1)
    return functional.smooth_l1_loss(predicted.float(), wanted.float()) - law_weight * (law * log_law).sum(-1).mean()


class FeatureDrafting:
    """A FeatureDrafter at work.

    Entry t of its cache belongs to (token t, h_t). `begin` reads the entries of the tokens committed last, with the
    target's true hidden vectors; `extend` goes on with predicted ones.
    """

    reads_features = True

    def __init__(self, drafter: Any, session: Session, kept: Kept, target: Target) -> None:
        self.drafter, self.target = drafter, target
        state, width = target.state, drafter.config["width"]
        rows, slots = state.batch * state.parts, target.depth + 1
        weight, heads = drafter.fc.weight, drafter.config["num_heads"]
        if kept.drafter is None:
            kept.drafter = KVCache(
                num_layers=1,
                rows=rows,
                num_heads=heads,
                num_slots=target.model.num_tokens + target.window + slots,
                head_width=width // heads,
                ragged=True,
                device=weight.device,
                dtype=weight.dtype,
            )
        self.cache: KVCache = kept.drafter
        zeros_B = torch.zeros(state.batch, dtype=torch.int64, device=weight.device)
        self.shown_RLD = session.hold(
            "shown", torch.zeros(rows, slots, width, device=weight.device, dtype=weight.dtype)
        )
        self.start_B, self.count_B = session.hold("start", zeros_B), session.hold("count", zeros_B)
        self.after_RLD = self.shown_RLD[:, :1]
        mixed = torch.is_autocast_enabled(weight.device.type)
        self.fused = kernels.usable(weight) and not mixed and not (weight.requires_grad and torch.is_grad_enabled())

    def calls(self, depth: int) -> int:
        return depth

    def _read(self, tokens_BL: Tensor, hidden_RLD: Tensor, slot_BL: Tensor, place_BL: Tensor, mask: Tensor) -> Tensor:
        parts, table = self.target.state.parts, self.drafter.rope(hidden_RLD.device)
        embedded_RLD = repeat(self.target.model.embed(tokens_BL), parts).to(hidden_RLD.dtype)
        rope = repeat(table[place_BL.clamp(0, len(table) - 1)], parts)
        cache = LayerCache(self.cache, 0, repeat(slot_BL, parts), None)
        return self.drafter.read(embedded_RLD, hidden_RLD, rope, repeat(mask, parts), cache)

    def _read_by_kernels(
        self,
        tokens_BL: Tensor,
        hidden_RLD: Tensor,
        length_B: Tensor,
        ahead: int,
        tree: DraftTree | None = None,
        first: int = 0,
    ) -> Tensor:
        """What `_read` does, at slots length + ahead ... of every row, or at a tree's slots from `first` on."""
        from visar.kernels.attention import cached_attention

        parts, table = self.target.state.parts, self.drafter.rope(hidden_RLD.device)
        embedded_RLD = repeat(self.target.model.embed(tokens_BL), parts).to(hidden_RLD.dtype)
        place: dict = dict(ahead=ahead, batch=self.target.state.batch, key_valid_RS=None, tree=tree, first=first)

        def attend(qkv_RLX: Tensor) -> Tensor:
            return cached_attention(qkv_RLX, self.cache.keys[0], self.cache.values[0], table, length_B, **place)

        with kernels.on(hidden_RLD.device):
            return self.drafter.read_by_kernels(embedded_RLD, hidden_RLD, attend)

    def _laws(self, hidden_RLD: Tensor, depth: int) -> Tensor:
        depth_BL = torch.full((1, hidden_RLD.shape[1]), depth, device=hidden_RLD.device)
        logits_BLV = self.target.model.guided_logits(self.target.state, hidden_RLD, depth_BL)
        return token_law(logits_BLV, *self.target.filters)

    def begin(self) -> Tensor:
        tokens_BT, parts = self.target.state.tokens, self.target.state.parts
        slot_BL = self.start_B[:, None] + torch.arange(self.shown_RLD.shape[1], device=tokens_BT.device)
        tokens_BL = tokens_BT.gather(1, slot_BL.clamp(max=tokens_BT.shape[1] - 1))
        if self.fused:
            predicted_RLD = self._read_by_kernels(tokens_BL, self.shown_RLD, self.start_B, 0)
        else:
            mask = visible(slot_BL, self.cache.num_slots)
            predicted_RLD = self._read(tokens_BL, self.shown_RLD, slot_BL, slot_BL, mask)
        last_R = repeat((self.count_B - 1).clamp(min=0), parts)
        self.after_RLD = row_at(predicted_RLD, last_R)[:, None]
        return law_or_uniform(self._laws(self.after_RLD, 0)[:, 0], self.count_B > 0)

    def extend(self, draft_BJ: Tensor) -> Tensor:
        length_B, ahead = self.target.state.length, draft_BJ.shape[1] - 1
        if self.fused:
            self.after_RLD = self._read_by_kernels(draft_BJ[:, -1:], self.after_RLD, length_B, ahead)
        else:
            slot_B1 = length_B[:, None] + ahead
            mask = visible(slot_B1, self.cache.num_slots)
            self.after_RLD = self._read(draft_BJ[:, -1:], self.after_RLD, slot_B1, slot_B1, mask)
        return law_or_uniform(self._laws(self.after_RLD, draft_BJ.shape[1])[:, 0], self.count_B > 0)

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        state = self.target.state
        parents_RW = repeat(tree.parents_BM[:, first - 1 :], state.parts)
        given_RWD = self.after_RLD.gather(1, parents_RW[..., None].expand(-1, -1, self.after_RLD.shape[-1]))
        tokens_BW = tree.tokens_BM[:, first - 1 :]
        if self.fused:
            predicted_RWD = self._read_by_kernels(tokens_BW, given_RWD, state.length, -1, tree, first)
        else:
            root_B1 = state.length[:, None] - 1
            slot_BW = root_B1 + torch.arange(first, tree.num_nodes + 1, device=root_B1.device)
            mask = visible_tree(root_B1, tree.seen_BLL, self.cache.num_slots)[:, :, first:]
            place_BW = (root_B1 + depth).expand_as(slot_BW)
            predicted_RWD = self._read(tokens_BW, given_RWD, slot_BW.clamp(min=0), place_BW, mask)
        self.after_RLD = torch.cat([self.after_RLD[:, :first], predicted_RWD], dim=1)
        laws_BWV = self._laws(predicted_RWD, depth)
        return law_or_uniform(laws_BWV.flatten(0, 1), (self.count_B > 0).repeat_interleave(laws_BWV.shape[1])).view_as(
            laws_BWV
        )

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        assert features_RLD is not None
        self.start_B.copy_(start_B)
        self.count_B.copy_(count_B)
        self.shown_RLD[:, : features_RLD.shape[1]].copy_(features_RLD)


# ------------------------------------------------------------------------------------------------------------- heads
class SpatialHeads(ModelMixin, ConfigMixin):
    """Heads that predict several tokens to the right at once, helped by the hidden vectors of the row above.

    Multi-token heads are Medusa's (arXiv 2401.10774); the second, vertical offset is a grid's own: the token below is
    as predictable as the one two steps to the right. The hidden vector for position m = t + k is

        right_k(h_t) + below(h_(m - columns + 1)),    right_k(h) = h + silu(W_k h),    below(h) = V silu(U h),

    where h_(m - columns + 1) is the one that had just read the token above m, if it is known. All offsets end in the
    target's head.

    Args:
        vocab_size, grid, width: the target's.
        num_right: largest k, the most drafts of a pass. Medusa: 5.
        target, target_digest: see FeatureDrafter.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        grid: tuple[int, int] = (16, 16),
        width: int = 1280,
        num_right: int = 5,
        target: str = "",
        target_digest: str = "",
    ) -> None:
        super().__init__()
        self.right = nn.ModuleList(nn.Linear(width, width) for _ in range(num_right))
        self.below_in = nn.Linear(width, width)
        self.below_out = nn.Linear(width, width, bias=False)
        for layer in (*self.right, self.below_out):
            nn.init.zeros_(layer.weight)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from: all heads give back the vector that they are given."""
        nn.init.normal_(self.below_in.weight, std=0.02, generator=generator)
        for layer in (*self.right, self.below_in):
            nn.init.zeros_(layer.bias)
        for layer in (*self.right, self.below_out):
            nn.init.zeros_(layer.weight)

    def forward(self, last_BXD: Tensor, above_BXD: Tensor, known_BX: Tensor, offset: int) -> Tensor:
        """Hidden vectors [..., D] for `offset` >= 1 positions to the right.

        last_BXD: h_t. above_BXD: h_(m - columns + 1), used where known_BX.
        """
        right = last_BXD + functional.silu(self.right[offset - 1](last_BXD))
        below = self.below_out(functional.silu(self.below_in(above_BXD)))
        return right + below * known_BX[..., None]

    def key(self) -> tuple:
        """See Drafter."""
        return ("heads", *weights_key(self))

    def start(self, session: Session, kept: Kept, target: Target) -> "HeadsDrafting":
        """See Drafter."""
        check_features(self, target.model)
        if target.depth > len(self.right):
            raise ValueError(f"{target.depth} drafts one after another; these heads reach {len(self.right)}")
        return HeadsDrafting(self, session, target)


def above_index(last_T: Tensor, offset: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where the vector is that had just read the token above position last + offset, and whether it is known there."""
    above_T = last_T + offset - columns + 1
    return above_T.clamp(min=0), (above_T >= 0) & (above_T <= last_T)


def heads_predictions(
    heads: Any, hidden_BND: Tensor, call: Callable[..., Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Every offset of `SpatialHeads`, and their predictions [B, N - offset, D] of the vectors that far ahead.

    Args:
        hidden_BND: teacher-forced hidden vectors of the target.
        call: the heads as they are to be called; None is `heads` itself.
    """
    predict: Callable[..., Tensor] = heads if call is None else call
    num_tokens, columns = hidden_BND.shape[1], heads.config["grid"][1]
    for offset in range(1, min(len(heads.right), num_tokens - 1) + 1):
        last = torch.arange(num_tokens - offset, device=hidden_BND.device)
        above, known = above_index(last, offset, columns)
        yield offset, predict(hidden_BND[:, last], hidden_BND[:, above], known[None], offset)


def heads_loss(
    heads: Any,
    model: Generator,
    hidden_BND: Tensor,
    decay: float = 0.8,
    call: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Cross-entropy with a frozen target's laws at all offsets, weighted decay^(k - 1).

    Medusa, arXiv 2401.10774, section 2.2.

    Args:
        model: the target, for its output head.
        hidden_BND: its teacher-forced hidden vectors, `model.hidden(tokens, condition)`.
        decay: 0.8.
        call: the heads as they are to be called, such as behind gradient averaging; None is `heads` itself.

    Differs from the paper: the target's laws, which drafts are judged by, stand in for the data's tokens.
    """
    hidden_BND = hidden_BND.detach()
    with torch.no_grad():
        law_BNV = torch.softmax(model.output(hidden_BND).float(), dim=-1)
    total, weights = hidden_BND.new_zeros((), dtype=torch.float32), 0.0
    for offset, predicted in heads_predictions(heads, hidden_BND, call):
        log_law = torch.log_softmax(model.output(predicted).float(), dim=-1)
        weight = decay ** (offset - 1)
        total = total - weight * (law_BNV[:, offset:] * log_law).sum(-1).mean()
        weights += weight
    return total / weights


class HeadsDrafting:
    """SpatialHeads at work: remembers the hidden vectors of all committed positions."""

    reads_features = True

    def __init__(self, heads: Any, session: Session, target: Target) -> None:
        self.heads, self.target, self.columns = heads, target, heads.config["grid"][1]
        rows, weight = target.state.batch * target.state.parts, heads.below_in.weight
        length = target.model.num_tokens + target.depth + 1
        memory = torch.zeros(rows, length, heads.config["width"], device=weight.device, dtype=weight.dtype)
        self.memory_RTD = session.hold("memory", memory)

    def calls(self, depth: int) -> int:
        return depth

    def _law(self, drafts: int) -> Tensor:
        state = self.target.state
        last_R = repeat(state.length - 1, state.parts)
        above_R = last_R + drafts + 2 - self.columns
        known_R = (above_R >= 0) & (above_R <= last_R)
        last_RD = row_at(self.memory_RTD, last_R.clamp(min=0))
        above_RD = row_at(self.memory_RTD, torch.where(known_R, above_R, 0))
        hidden_R1D = self.heads(last_RD, above_RD, known_R, drafts + 1)[:, None]
        depth_BL = torch.full((1, 1), drafts, device=hidden_R1D.device)
        logits_B1V = self.target.model.guided_logits(state, hidden_R1D, depth_BL)
        return law_or_uniform(token_law(logits_B1V[:, 0], *self.target.filters), state.length > 0)

    def begin(self) -> Tensor:
        return self._law(0)

    def extend(self, draft_BJ: Tensor) -> Tensor:
        return self._law(draft_BJ.shape[1])

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        return self._law(depth)[:, None].expand(-1, tree.num_nodes + 1 - first, -1)

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        assert features_RLD is not None
        start_R1 = repeat(start_B, self.target.state.parts)[:, None]
        position_RL = start_R1 + torch.arange(features_RLD.shape[1], device=features_RLD.device)
        index = position_RL.clamp(max=self.memory_RTD.shape[1] - 1)[..., None].expand_as(features_RLD)
        self.memory_RTD.scatter_(1, index, features_RLD.to(self.memory_RTD.dtype))
