"""A drafter that reads the target's last hidden vectors: a layer that predicts the next one, after EAGLE.

Hidden vector h_t is the one that predicts token t; it has seen the condition and the tokens before t. The layer's
output goes into the target's own output head, and its input has the target's token embedding; neither is part of its
weights. It is trained on frozen targets with `feature_loss`.

B batch, R rows (2B when guided), N tokens, L slots of a pass, J drafts so far, W nodes of a level, D hidden size, V
codes, T slots of a cache, M nodes.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from visar import kernels
from visar.core.guidance import repeat
from visar.core.interface import Features
from visar.core.runtime import Session
from visar.core.window import DraftTree
from visar.layers.cache import KVCache, LayerCache, visible, visible_tree
from visar.layers.llama import Attention, RMSNorm, SwiGLU
from visar.layers.packable import Packable
from visar.layers.rope import rope_table
from visar.samplers.drafters.interface import Kept, Target, check_features, probs_or_uniform, weights_key
from visar.samplers.filtering import filtered_probs
from visar.samplers.verify import row_at


class FeatureDrafter(Packable, ModelMixin, ConfigMixin):
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
    model: Features,
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
        probs = torch.softmax(model.output(wanted).float(), dim=-1)
        given = hidden_BND[:, :-1]
        if uniform_BND is not None:
            given = given + (uniform_BND[:, :-1].to(given) - 0.5) * noise
    predicted = drafter(embedded_BND, given)
    log_probs = torch.log_softmax(model.output(predicted).float(), dim=-1)
    return (
        functional.smooth_l1_loss(predicted.float(), wanted.float()) - law_weight * (probs * log_probs).sum(-1).mean()
    )


class FeatureDrafting:
    """A FeatureDrafter at work.

    Entry t of its cache belongs to (token t, h_t). `begin` reads the entries of the tokens committed last, with the
    target's true hidden vectors; `extend` continues with predicted ones.
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
        self.shown_RLD = session.static(
            "shown", torch.zeros(rows, slots, width, device=weight.device, dtype=weight.dtype)
        )
        self.start_B, self.count_B = session.static("start", zeros_B), session.static("count", zeros_B)
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

    def _probs(self, hidden_RLD: Tensor, depth: int) -> Tensor:
        depth_BL = torch.full((1, hidden_RLD.shape[1]), depth, device=hidden_RLD.device)
        logits_BLV = self.target.model.guided_logits(self.target.state, hidden_RLD, depth_BL)
        return filtered_probs(logits_BLV, *self.target.filters)

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
        return probs_or_uniform(self._probs(self.after_RLD, 0)[:, 0], self.count_B > 0)

    def extend(self, draft_BJ: Tensor) -> Tensor:
        length_B, ahead = self.target.state.length, draft_BJ.shape[1] - 1
        if self.fused:
            self.after_RLD = self._read_by_kernels(draft_BJ[:, -1:], self.after_RLD, length_B, ahead)
        else:
            slot_B1 = length_B[:, None] + ahead
            mask = visible(slot_B1, self.cache.num_slots)
            self.after_RLD = self._read(draft_BJ[:, -1:], self.after_RLD, slot_B1, slot_B1, mask)
        return probs_or_uniform(self._probs(self.after_RLD, draft_BJ.shape[1])[:, 0], self.count_B > 0)

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
        probs_BWV = self._probs(predicted_RWD, depth)
        return probs_or_uniform(
            probs_BWV.flatten(0, 1), (self.count_B > 0).repeat_interleave(probs_BWV.shape[1])
        ).view_as(probs_BWV)

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        assert features_RLD is not None
        self.start_B.copy_(start_B)
        self.count_B.copy_(count_B)
        self.shown_RLD[:, : features_RLD.shape[1]].copy_(features_RLD)
