"""PyTorch diffusers, which draws from the same folder and the same latents. To be installed beside."""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.diffusion.scheduler_config import SchedulerConfig
from engine.types import UserError

if TYPE_CHECKING:
    from engine.benchmark.drawing import Work


def installed() -> tuple[Any, Any]:
    """PyTorch and diffusers; UserError where they are not."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise UserError(f"no peer: pip install torch diffusers transformers ({error})") from None
    return torch, diffusers


class Peer:
    """A pipeline of diffusers."""

    def __init__(self, folder: pathlib.Path, dtype: str, compiled: bool = False):
        """
        Raises:
          UserError: diffusers, transformers or PyTorch is not installed.
        """
        torch, diffusers = installed()
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


class PeerTraining:
    """Steps of AdamW on a U-Net of diffusers: squared error of eps at uniform timesteps, as in scripts."""

    def __init__(
        self,
        folder: pathlib.Path,
        dtype: str,
        compiled: bool,
        batch: Mapping[str, np.ndarray],
        steps: int,
    ):
        """batch: what ours trains on, float32; steps: of a call."""
        self._steps = steps
        torch, diffusers = installed()
        self._torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        unet = (
            diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(self.device).train()
        )
        self._optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
        self._unet = torch.compile(unet) if compiled else unet
        self._scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        given = {name: torch.from_numpy(array).to(self.device) for name, array in batch.items()}
        self._latents = given["mean"].permute(0, 3, 1, 2).contiguous()
        self._told = {"encoder_hidden_states": given["context"]}
        if "pooled" in given:
            added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]}
            self._told["added_cond_kwargs"] = added
        self._half = dtype == "bfloat16"

    def __call__(self) -> None:
        torch = self._torch
        for _ in range(self._steps):
            noise = torch.randn_like(self._latents)
            t = torch.randint(0, 1000, (len(noise),), device=self.device)
            noisy = self._scheduler.add_noise(self._latents, noise, t)
            with torch.autocast(self.device, torch.bfloat16, enabled=self._half):
                found = self._unet(noisy, t, **self._told).sample
            loss = torch.nn.functional.mse_loss(found.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._unet.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        loss.item()  # waits
