"""PyTorch diffusers, which draws from the same folder and the same latents. To be installed beside."""

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.diffusion.scheduler_config import SchedulerConfig
from engine.types import UserError

if TYPE_CHECKING:
    from engine.benchmark.drawing import Work


class Peer:
    """A pipeline of diffusers."""

    def __init__(self, folder: pathlib.Path, dtype: str, compiled: bool = False):
        """
        Raises:
          UserError: diffusers, transformers or PyTorch is not installed.
        """
        try:
            import diffusers
            import torch
        except ImportError as error:
            raise UserError(f"no peer: pip install torch diffusers transformers ({error})") from None
        self._torch, self._schedulers = torch, diffusers
        diffusers.utils.logging.disable_progress_bar()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
        self._pipe = pipe.to(self.device)
        self._pipe.set_progress_bar_config(disable=True)
        if compiled:
            self._pipe.unet = torch.compile(self._pipe.unet)

    def draw(self, work: "Work", scheduler: SchedulerConfig) -> np.ndarray:
        """uint8 (B, H, W, 3)."""
        torch, pipe, settings = self._torch, self._pipe, work.settings
        options: dict[str, Any] = scheduler.to_json()
        pipe.scheduler = getattr(self._schedulers, options["_class_name"]).from_config(options)
        latents = torch.from_numpy(np.ascontiguousarray(work.latents.transpose(0, 3, 1, 2)))
        with torch.inference_mode():
            images = pipe(
                list(work.prompts),
                latents=latents.to(self.device, pipe.unet.dtype),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                height=settings.height,
                width=settings.width,
                output_type="np",
            ).images
        return (images * 255).round().astype(np.uint8)


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays, in dB."""
    error = np.square(ours.astype(np.float64) - theirs.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
