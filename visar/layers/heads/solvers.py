"""Solvers of a diffusion head's probability flow, by diffusers' schedulers: a token in few passes, without noise.

Sources: DDIM, arXiv 2010.02502; DPM-Solver++(2M), arXiv 2211.01095. The noisiest level of the cosine schedule has a
signal of 5e-5, by which a noise prediction's error is divided; diffusers' advice for this schedule is to begin where
the logarithm of signal over noise is -5.1 (signal 0.006), and both solvers do so.
"""

import copy
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from visar.layers.heads.schedule import TRAIN_STEPS, schedule

FlowSolver = Literal["ddim", "dpm"]
LEAST_LOG_SIGNAL = -5.1
_PREDICTIONS = {"noise": "epsilon", "velocity": "v_prediction"}


def noisiest_level() -> int:
    """The last of the 1000 training levels whose log(signal / noise) is not below `LEAST_LOG_SIGNAL`."""
    alphas_bar = schedule(TRAIN_STEPS).alphas_bar
    return int((0.5 * np.log(alphas_bar / (1.0 - alphas_bar)) >= LEAST_LOG_SIGNAL).sum()) - 1


@lru_cache(maxsize=32)
def _template(solver: FlowSolver, prediction: str, steps: int) -> Any:
    shared: dict[str, Any] = dict(
        num_train_timesteps=TRAIN_STEPS,
        trained_betas=schedule(TRAIN_STEPS).betas.tolist(),
        prediction_type=_PREDICTIONS[prediction],
    )
    if solver == "dpm":
        return DPMSolverMultistepScheduler(**shared, lambda_min_clipped=LEAST_LOG_SIGNAL, timestep_spacing="linspace")
    stride = TRAIN_STEPS // steps
    # Levels offset, offset + stride ...; the first one's step ends at the token where the offset is below the stride.
    offset = min(noisiest_level() - (steps - 1) * stride, stride - 1)
    return DDIMScheduler(**shared, clip_sample=False, timestep_spacing="leading", steps_offset=max(offset, 0))


def flow_scheduler(solver: FlowSolver, prediction: str, steps: int) -> Any:
    """A scheduler at its first step; `timesteps` has the levels, from the noisiest on.

    Args:
        solver: "ddim", or "dpm" for DPM-Solver++(2M).
        prediction: what the network gives, "noise" or "velocity".
        steps: passes, 1 ... 1000.
    """
    made = copy.copy(_template(solver, prediction, steps))
    made.set_timesteps(steps)
    if isinstance(made, DPMSolverMultistepScheduler):
        made.set_begin_index(0)
    return made
