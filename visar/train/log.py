"""What a run writes while it goes: metrics.jsonl, sheets of images, TensorBoard, a progress bar."""

import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.utils.logging import tqdm
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from visar.io.files import atomic_write, writing
from visar.io.pictures import grid
from visar.train.options import RunOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sheet:
    """Images for people: uint8 [B, 3, H, W], in rows of `columns`."""

    images: Tensor
    columns: int


class RunLog:
    """Writer of the main process; in other processes it does nothing.

    Lines of metrics.jsonl beyond the step that the run resumes from are removed: a run that was killed leaves the file
    that an uninterrupted one leaves.

    Args:
        options: options of the run.
        accelerator: accelerator of accelerate; its tracker is used.
        begin: step that the run resumes from.

    Raises:
        ImportError: the tracker is not installed.
        ValueError: metrics.jsonl holds something else.
    """

    def __init__(self, options: RunOptions, accelerator: Any, begin: int) -> None:
        self.active = accelerator.is_main_process
        self.folder = options.out
        self._bar = tqdm(
            total=options.steps,
            initial=begin,
            desc=options.out.name,
            unit="step",
            disable=not self.active,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        self._tracker: Any = None
        if not self.active:
            return
        lines = self._lines_until(begin)
        with atomic_write(self.folder / "metrics.jsonl") as path:
            path.write_text("".join(lines), encoding="utf-8")
        if options.tracker == "tensorboard":
            self._tracker = _tensorboard(options, begin)

    def _lines_until(self, begin: int) -> list[str]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        # The last line may be half written; it is then beyond the newest checkpoint.
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        try:
            return [line.decode() for line in lines if json.loads(line)["step"] <= begin]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} holds lines that are not of a training run ({error}); move it away") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line, and points to the curves."""
        if not self.active:
            return
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tracker is not None:
            self._tracker.log(values, step=step)
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.5g}" for name, value in values.items()))

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Shows the loss and the speed beside the bar."""
        shown = {"loss": f"{values['train/loss']:.4f}", "images/s": f"{values['train/images_per_second']:.0f}"}
        self._bar.set_postfix(shown, refresh=False)

    def advance(self, step: int) -> None:
        """Moves the bar on."""
        bar: Any = self._bar
        bar.update(step - bar.n)

    def picture(self, step: int, name: str, sheet: Sheet) -> None:
        """Writes a sheet to samples/, and to the tracker."""
        images = [to_pil_image(image) for image in sheet.images.cpu()]
        sheet_image = grid(images, columns=sheet.columns)
        with atomic_write(self.folder / "samples" / f"{name}-{step:08d}.png") as path:
            sheet_image.save(path)
        if self._tracker is not None:
            self._tracker.log_images({name: np.asarray(sheet_image)[None]}, step=step, dataformats="NHWC")

    def close(self) -> None:
        """Ends the bar and the tracker."""
        self._bar.close()
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None


def _tensorboard(options: RunOptions, begin: int) -> Any:
    from accelerate.tracking import TensorBoardTracker
    from accelerate.utils import is_tensorboard_available

    if not is_tensorboard_available():
        raise ImportError("tracker tensorboard is missing: pip install 'torch-visar[train]', or --tracker none")
    # Points beyond the step that the run resumes from are written again.
    tracker = TensorBoardTracker("logs", options.out, purge_step=begin + 1)
    tracker.start()
    return tracker
