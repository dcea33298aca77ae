"""Conditional scores of tokens: the teacher's, exact, and a network that learns another generator's.

Source: Distilled Decoding 2, arXiv 2510.21003 sections 3 and 4. On the straight path x_t = (1 - t) q + t e from a
token q to noise e, the score given the tokens before is ((1 - t) D - x_t) / t^2 with D the mean of q given x_t, the
denoised vector. The teacher's D follows from its distribution over codes (visar/samplers/flow.py); a network predicts
the velocity v, and its D is x_t - t v.

B images, N tokens, K noisy vectors of a token, V codes, C code width. Vectors are in the scale of the noise.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import combine, double, repeat
from visar.generators.one_step import TIME_UNITS, OneStepGenerator
from visar.pipelines.image import ImagePipeline
from visar.samplers.filtering import filter_logits
from visar.samplers.flow import denoise
from visar.tokenizers.quantizer import nearest_codes
from visar.train.run import fast_math

# Logits float32 that are held at a time, of both halves of a guided batch: 1 GiB.
_LARGEST = 2**28

History = Literal["vectors", "codes"]


def between(vectors: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t [..., C] on the straight path from vectors (t = 0) to noise (t = 1); time [...]."""
    return torch.lerp(vectors, noise, time[..., None])


class TeacherScore:
    """The teacher's denoised vectors, guided and filtered as it is sampled.

    The tokens before are vectors of a student, which need be no codes. A teacher that reads vectors or maps is told
    them as they are, or, with history "codes", the nearest codes; one that embeds ids can be told codes only.

    Args:
        pipeline: the teacher; its default settings are used.
        codes_VC: its codes in the scale of the noise.
        code_scale: what they were multiplied by.
        history: see above.

    Raises:
        ValueError: an unknown history.
    """

    def __init__(self, pipeline: ImagePipeline, codes_VC: Tensor, code_scale: float, history: History) -> None:
        if history not in ("vectors", "codes"):
            raise ValueError(f"history {history!r}; choose vectors or codes")
        self.generator: Any = pipeline.generator
        self.codes_VC, self.code_scale = codes_VC.float(), code_scale
        self.reads_ids = self.generator.config.get("token_input") == "table"
        self.snapped = history == "codes" or self.reads_ids
        settings = pipeline.sampling_settings()
        self.filters = {name: settings[name] for name in ("temperature", "top_k", "top_p")}
        sizes = torch.tensor(self.generator.block_sizes)
        scales = torch.tensor(settings["guidance"].scales(len(sizes)))
        self._scale_N1: Tensor | None = None
        if settings["guidance"].active(len(sizes)):
            self._scale_N1 = torch.repeat_interleave(scales, sizes)[:, None].to(codes_VC.device)
        self._null: dict[int, Condition] = {}

    def history(self, vectors_BNC: Tensor) -> Tensor:
        """What the teacher reads of the tokens before, where they are these vectors."""
        if not self.snapped:
            return self.generator.history(vectors_BNC / self.code_scale)
        ids_BN = nearest_codes(vectors_BNC.flatten(0, 1), self.codes_VC).view(vectors_BNC.shape[:2])
        return ids_BN if self.reads_ids else self.generator.history(self.codes_VC[ids_BN] / self.code_scale)

    def _null_of(self, condition: Condition) -> Condition:
        """The null condition of a batch; made once, because making one waits for the device."""
        if condition.batch not in self._null:
            self._null[condition.batch] = self.generator.null_condition(condition)
        return self._null[condition.batch]

    @torch.no_grad()
    def logits(self, history: Tensor, condition: Condition) -> Tensor:
        """Guided and filtered logits, float32 [B, N, V].

        Args:
            history: as `history` makes it.
            condition: of the B images.
        """
        with torch.autocast(self.codes_VC.device.type, enabled=False):  # bfloat16 weights have kernels of their own
            if self._scale_N1 is None:
                logits_BNV = self.generator.logits_of(self.generator.hidden(history, condition)).float()
            else:
                rows = double(condition, self._null_of(condition))
                hidden_RND = self.generator.hidden(repeat(history, 2), rows)
                logits_BNV = combine(self.generator.logits_of(hidden_RND), self._scale_N1)
            return filter_logits(logits_BNV, **self.filters)

    def denoised(self, noisy_KBNC: Tensor, time_KBN: Tensor, history: Tensor, condition: Condition) -> Tensor:
        """D, float32 [K, B, N, C]; differentiable in the noisy vectors.

        Args:
            noisy_KBNC: K noisy vectors of every token.
            time_KBN: their times, in (0, 1].
            history, condition: as for `logits`.
        """
        images = max(1, _LARGEST // (2 * self.generator.num_tokens * self.codes_VC.shape[0]))
        parts = []
        for first in range(0, condition.batch, images):
            own = slice(first, first + images)
            logits_BNV = self.logits(history[own], condition.rows(own))
            parts.append(
                torch.stack(
                    [
                        denoised(noisy_BNC, time_BN, logits_BNV, self.codes_VC)
                        for noisy_BNC, time_BN in zip(noisy_KBNC[:, own], time_KBN[:, own], strict=True)
                    ]
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def denoised(noisy_BNC: Tensor, time_BN: Tensor, logits_BNV: Tensor, codes_VC: Tensor) -> Tensor:
    """`denoise` for tokens of images, in full float32: products are divided by t^2, TF32 is too coarse for that."""
    with torch.autocast(noisy_BNC.device.type, enabled=False), fast_math(False):
        flat_MC, time_M1 = noisy_BNC.flatten(0, 1).float(), time_BN.reshape(-1, 1)
        return denoise(flat_MC, time_M1, logits_BNV.flatten(0, 1), codes_VC).view(noisy_BNC.shape)


class ScoreNetwork(nn.Module):
    """Velocity of noisy vectors given the vectors of the tokens before: a teacher's network, and a head on its hidden
    vectors.

    Args:
        student: a one-step generator with a velocity head. Its network and head are taken, not copied.
    """

    def __init__(self, student: OneStepGenerator) -> None:
        super().__init__()
        self.network, self.head = student.network, student.velocity
        self.code_scale = student.config["code_scale"]

    def history(self, vectors_BNC: Tensor) -> Tensor:
        """What `forward` reads of the tokens before, where they are these vectors; no gradient."""
        with torch.no_grad(), torch.autocast(vectors_BNC.device.type, enabled=False):
            return self.network.history(vectors_BNC / self.code_scale)

    def forward(self, noisy_KBNC: Tensor, time_KBN: Tensor, history: Tensor, condition: Condition) -> Tensor:
        """Velocities, float32 [K, B, N, C].

        Args:
            noisy_KBNC: K noisy vectors of every token.
            time_KBN: their times, in [0, 1].
            history: as `history` makes it.
            condition: of the B images.
        """
        hidden_BND = self.network.hidden(history, condition)
        return self.head(noisy_KBNC, time_KBN * TIME_UNITS, hidden_BND).float()

    def copy_to(self, student: OneStepGenerator) -> None:
        """Gives a generator of the same sizes this network's weights."""
        with torch.no_grad():
            theirs = [*student.network.parameters(), *student.velocity.parameters()]
            torch._foreach_copy_(theirs, list(self.parameters()))


# ------------------------------------------------------------------------------------------------------------- losses
def tuning_loss(velocity: Tensor, noisy: Tensor, time: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of denoised vectors against the teacher's: the velocity's, weighted by t^2 (the ground-truth
    score loss of section 4.2)."""
    return (noisy - time[..., None] * velocity - target).square().mean()


def fake_loss(velocity: Tensor, vectors: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Mean squared error of the velocity against noise - vectors, weighted by t: the score network of a generator."""
    return ((velocity - (noise - vectors)).square() * time[..., None]).mean()


def dmd_loss(vectors_BNC: Tensor, teacher_BNC: Tensor, fake_BNC: Tensor) -> Tensor:
    """Moves a generator's vectors along D_teacher - D_fake, in units of an image's mean |q - D_teacher|.

    Source: distribution matching distillation, arXiv 2311.18828 eq. 7 and 8. The gradient reaches the vectors alone.
    """
    with torch.no_grad():
        scale_B11 = (vectors_BNC - teacher_BNC).abs().mean((-2, -1), keepdim=True).clamp(min=1e-4)
        target_BNC = vectors_BNC - (fake_BNC - teacher_BNC) / scale_B11
    return (vectors_BNC - target_BNC).square().mean() / 2


def sid_loss(vectors_BNC: Tensor, teacher_BNC: Tensor, fake_BNC: Tensor) -> Tensor:
    """(D_teacher - D_fake) . (D_fake - q), in the same units; the gradient reaches the vectors through both too.

    Source: score identity distillation, arXiv 2404.04057, at alpha = 1 as the paper takes it; its weight of times is
    not given there.
    """
    scale_B11 = (vectors_BNC - teacher_BNC).detach().abs().mean((-2, -1), keepdim=True).clamp(min=1e-4)
    return ((teacher_BNC - fake_BNC) * (fake_BNC - vectors_BNC) / scale_B11).mean()


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"dmd": dmd_loss, "sid": sid_loss}
"""Losses of the generator by the name of --form: of its vectors, and of what teacher and fake score denoise."""
