"""Training of codebooks: losses of a quantised tokenizer, its moving averages and the revival of unused codes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from visar.tokenizers.multiscale_quantizer import ScaleUsage
from visar.tokenizers.quantizer import CodebookTrainer, CodebookUsage
from visar.tokenizers.training import Bottleneck


def usage_scalars(ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Share of codes used, and perplexity of their frequencies, in one batch; left on the device."""
    flat = ids.flatten()
    count_V = torch.zeros(vocab_size, device=ids.device).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float))
    share_V = count_V / flat.shape[0]
    entropy = torch.special.entr(share_V).sum()
    return {"codes_used": (count_V > 0).float().mean(), "code_perplexity": entropy.exp()}


class CodebookMeter:
    """How a set of images uses the codebook, in all and at every scale of a pyramid."""

    def __init__(self, layout: Any, device: torch.device) -> None:
        self._shapes = layout.shapes
        self._usage = CodebookUsage(layout.vocab_size, device)
        self._of_maps = ScaleUsage(layout.sizes, layout.vocab_size, device)

    def update(self, output: Any) -> None:
        self._usage.update(output.ids_BN)
        self._of_maps.update(output.ids_BN)

    def values(self) -> dict[str, float]:
        values = {"codes_used": self._usage.fraction, "code_perplexity": self._usage.perplexity}
        if len(self._shapes) > 1:
            for shape, perplexity in zip(self._shapes, self._of_maps.perplexity, strict=True):
                values[f"code_perplexity_{'x'.join(map(str, shape))}"] = perplexity
        return values


class CodebookBottleneck(Bottleneck):
    """Training of a codebook; families derive from it and say where the codes are and how they are moved."""

    quantizer: str
    trainer: type[CodebookTrainer]

    def __init__(self, model: Any, options: Any) -> None:
        super().__init__(model, options)
        self.codebook = self.trainer(
            getattr(model, self.quantizer),
            update=options.codebook_update,
            decay=options.codebook_decay,
            revive_below=options.revive_below,
        )

    def loss(self, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        loss = options.commitment_weight * output.commitment_loss + options.codebook_weight * output.codebook_loss
        return loss, {"commitment": output.commitment_loss}

    def after_step(
        self, outputs: Sequence[Any], step: int, random: Callable[[], torch.Generator]
    ) -> dict[str, Tensor]:
        options = self.options
        ids_BN = torch.cat([output.ids_BN for output in outputs])
        scalars = usage_scalars(ids_BN, self.model.layout.vocab_size)
        if options.decoder_only:
            return scalars
        latent_BChw = torch.cat([output.latent_BChw.detach() for output in outputs])
        self.codebook.step(latent_BChw, ids_BN)
        due = options.revive_every and (step + 1) % options.revive_every == 0
        if due and options.revive_below and step < options.revive_until * options.steps:
            self.codebook.revive(latent_BChw, random())
        return scalars

    def meter(self) -> CodebookMeter:
        return CodebookMeter(self.model.layout, next(self.model.parameters()).device)

    def state_dict(self) -> dict[str, Tensor]:
        return self.codebook.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.codebook.load_state_dict(state)


class VQBottleneck(CodebookBottleneck):
    """Training of one codebook."""

    quantizer, trainer = "quantize", CodebookTrainer
