"""A model that exists, trained further: its U-Net, its text encoder, or a LoRA, a word, a ControlNet."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine import finish
from engine.config import GIVEN, FinetuneConfig
from engine.errors import UserNotice
from engine.loading import SHIPPED, SHIPPED_NAME
from engine.parallel import exchanged
from engine.train import (
    adapters,
    controlling,
    distilling,
    inversion,
    judges,
    latents,
    loop,
    objectives,
    optim,
    rewarding,
)
from engine.train.checkpoint import make_for_all
from engine.train.data import Batch, BatchAt
from engine.train.samples import Drawer, Samples
from engine.train.sources import training_batches
from engine.train.step import Around, Loss, cast, itself
from engine.train.workdir import STAGE, check_same_run, remember
from engine.types import Params, UserError
from engine.weights import embeddings, lora_files
from engine.weights.component import Component
from engine.weights.controlnet import save_controlnet
from engine.weights.folder import Model, load_trainable, read_scheduler, save_folder
from engine.weights.lora import XL_KINDS, Lora, merged_on_host

# settings that a run keeps
SETTLED = ("model", "what", "seed", "clip_skip", "scheduler", "lora", "inversion")
SETTLED += ("controlnet.kind", "controlnet.adapter", "distill", "reward")
PRIOR_BATCH = 16
# options of a scheduler that belong to what a model learned, unlike its grid
MODEL_OF_NOISE = {"prediction_type", "rescale_betas_zero_snr", "beta_start", "beta_end", "beta_schedule"}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained of a model: a tree of params."""

    model: Model
    params: Any
    lora: Lora | None  # as it begins, where params are the layers of one
    word: inversion.Inversion | None = None  # where params are the vectors of one
    net: Component | None = None  # where params are those of a ControlNet, {"controlnet": params}
    sight: str = ""  # what that is shown of pictures
    judge: judges.Judge | None = None  # of the pictures that it draws, where that is what it learns from

    @property
    def is_file(self) -> bool:
        """Whether what is trained is a file beside the model."""
        return self.lora is not None or self.word is not None

    def parts(self, params: Any) -> dict[str, Params]:
        """The params of whole parts of the model, of trained `params`."""
        if self.word is not None:
            return self.word.parts(self.model, params)
        if self.lora is None:
            return params
        weights = {kind: part.params for kind, part in self.model.parts.items() if kind in XL_KINDS}
        return merged_on_host(weights, Lora(params, self.lora.alphas))


def train(
    config: FinetuneConfig, workdir: pathlib.Path, fit: Callable[..., Any] = loop.fit
) -> pathlib.Path | None:
    """Trains to the end, from the newest checkpoint if there is one, and exports.

    Args:
      fit: what is done with a stage; `dry_run.fit` looks at it only.

    Returns:
      WORKDIR/model or WORKDIR/controlnet, or the file of the LoRA or the word; None when a signal stopped
      the run, and on all hosts but the first.

    Raises:
      UserError: the config is wrong, or `workdir` holds another run.
    """
    config.validate()
    check_same_run(config, workdir, SETTLED)
    task = begin(config)
    _tell_of_scheduler(config, task)
    loss, frozen, around = objective(config, task)
    folder = workdir / "samples"
    samples = Samples(config.samples, task.model, config.finetune, folder, task.net, task.sight)
    make_for_all(workdir)
    remember(config, workdir)
    batch_at = batches(config, task, workdir, fit is not loop.fit)
    params = fit(
        STAGE,
        loss,
        task.params,
        frozen,
        optim.optimizer(config.finetune.optim, config.finetune.steps),
        config.finetune,
        seed=config.seed,
        batch_at=batch_at,
        workdir=workdir,
        watch=loop.Watch(samples.every, lambda step, own: samples.draw(step, task.parts(own))),
        around=around,
    )
    if params is None or fit is not loop.fit or jax.process_index():
        return None
    place = "controlnet" if task.net else "" if task.is_file else "model"
    return export(task, params, workdir / place, overwrite=True)


def _tell_of_scheduler(config: FinetuneConfig, task: Task) -> None:
    """What is trained beside a model is drawn with by the model's own scheduler."""
    changed = MODEL_OF_NOISE & config.scheduler.keys()
    if changed and (task.is_file or task.net):
        told = f"{', '.join(sorted(changed))} of config.scheduler"
        warnings.warn(
            f"{told}: what is trained here does not keep it, and draws with a model alone whose "
            "scheduler_config.json says the same",
            UserNotice,
            stacklevel=2,
        )


def folder_of(config: FinetuneConfig) -> pathlib.Path:
    """Of the model that the run begins with."""
    return SHIPPED if config.model == SHIPPED_NAME else pathlib.Path(config.model).expanduser()


def begin(config: FinetuneConfig) -> Task:
    """Loads the model, and says what of it is trained."""
    folder = folder_of(config)
    model = load_trainable(folder, config.clip_skip)
    model = dataclasses.replace(model, scheduler=read_scheduler(folder, config.scheduler))
    judge = judges.judge(config.reward) if config.reward.judge else None
    if config.what == "textual_inversion":
        model, word = inversion.begin(model, config.inversion, config.seed)
        return Task(model, word.params, None, word)
    if config.what == "lora":
        lora = adapters.begin(model.parts, config.lora, config.seed)
        return Task(model, lora.layers, lora, judge=judge)
    if config.what == "controlnet":
        net = controlling.begin(model, config.controlnet, config.seed)
        return Task(model, {"controlnet": net.params}, None, net=net, sight=config.controlnet.sight)
    trained = ["unet", *(model.readers if "text_encoder" in config.what else ())]
    return Task(model, {kind: model.parts[kind].params for kind in trained}, None, judge=judge)


class Objective(NamedTuple):
    """What is minimised."""

    loss: Loss
    frozen: dict[str, Any]  # what else it needs: the params that stay
    around: Around = itself  # see `train_step`


def objective(config: FinetuneConfig, task: Task) -> Objective:
    """The loss of what is trained."""
    model, dtype = task.model, config.finetune.compute_dtype
    if config.latents:
        encode = objectives.of_cache(model.vae.config.scaling_factor)
        cache = pathlib.Path(config.latents).expanduser()
        frozen = {"unet": model.unet.params, "empty": latents.empty(cache, model)}
    else:
        encode = objectives.of_pictures(model.graphdefs, model.zeros, model.clip_skip)
        frozen = {kind: part.params for kind, part in model.parts.items()}
        frozen["empty_ids"] = model.tokenizers.encode([""])[0]
    how = model.unet.graphdef, encode, model.scheduler
    if task.judge is not None:
        frozen[rewarding.JUDGE] = task.judge.params
        loss = rewarding.reward_loss(model, config.reward, task.judge)
    elif config.distill.steps:
        loss = distilling.distilling_loss(*how, config.distill)
    else:
        control = controlling.control(task.net.graphdef, task.sight) if task.net else None
        loss = objectives.denoising_loss(*how, config.finetune, control)
    if config.prior.num_images:
        loss = with_prior(loss, config.prior.weight)
    if task.lora is not None:
        beside = {distilling.TEACHER: "unet"} if config.distill.steps else {}
        around = functools.partial(adapters.lora_loss, alphas=task.lora.alphas, beside=beside)
        return Objective(loss, adapters.kept(frozen, task.lora, dtype), around)
    if task.word is not None:
        return Objective(task.word.loss(loss), cast(frozen, dtype))
    rest = {name: own for name, own in frozen.items() if name not in task.params}
    return Objective(objectives.over_parts(loss), cast(rest, dtype))


def with_prior(loss: Loss, weight: float) -> Loss:
    """Adds `weight` times the loss of batch["prior"] (Ruiz et al. 2023, equation 2)."""

    def both(params, frozen, batch, key):
        keys = jax.random.split(key)
        value, metrics = loss(params, frozen, {k: v for k, v in batch.items() if k != "prior"}, keys[0])
        prior, _ = loss(params, frozen, batch["prior"], keys[1])
        return value + weight * prior, {**metrics, "prior_loss": prior}

    return both


def batches(config: FinetuneConfig, task: Task, workdir: pathlib.Path, shapes_only: bool = False) -> BatchAt:
    """The data: pictures, and beside them those of the prior.

    Args:
      shapes_only: do not draw the prior; batches of one's own pictures have its shapes.
    """
    stage, tokenizer = config.finetune, task.model.tokenizers
    hosts = {"process": jax.process_index(), "processes": jax.process_count()}
    if task.judge is not None:
        own = config.reward, task.model, task.judge, stage.batch_size, config.data.seed
        return rewarding.prompts_at(*own, **hosts)
    if config.latents:
        cache = pathlib.Path(config.latents).expanduser()
        return latents.cached_batches(cache, stage.batch_size, config.data.seed, **hosts)
    options = {
        "size": min(task.model.default_size),
        "keep_tags": stage.keep_tags if stage.caption_shuffle else None,
        "sized": task.model.text_encoder_2 is not None,
        "controlled": task.net is not None and config.controlnet.kind == GIVEN,
        **hosts,
    }
    captions = task.word.captions() if task.word else {}
    own = training_batches(config.data, stage.batch_size, tokenizer, workdir=workdir, **options, **captions)
    if not config.prior.num_images:
        return own
    if shapes_only:
        return lambda step: {**own(step), "prior": own(step)}
    # by the model as it is, not as it is to become
    as_it_is = dataclasses.replace(task.model, scheduler=read_scheduler(folder_of(config)))
    folder = draw_prior(config, as_it_is, workdir / "prior")
    # its own metadata, and the size that it is drawn in
    drawn = {"paths": (str(folder),), "kind": "files", "repeats": (1,), "caption_field": "", "min_size": 1}
    prior = training_batches(
        dataclasses.replace(config.data, **drawn),
        stage.batch_size,
        tokenizer,
        workdir=workdir / "prior-data",
        **options,
    )

    def both(step: int) -> Batch:
        return {**own(step), "prior": prior(step)}

    return both


def draw_prior(config: FinetuneConfig, model: Model, folder: pathlib.Path) -> pathlib.Path:
    """Draws the pictures of the prior that are not there yet: PNGs, and metadata.jsonl when all are.

    Those of a larger prior before are set aside, and taken back where more are wanted again. Several hosts
    draw a share each, into one folder, and wait for each other.

    Raises:
      UserError: those that are there were drawn of another prompt.
    """
    wanted, prompt = config.prior.num_images, config.prior.prompt
    folder = finish.prepare_folder(folder)
    names = [f"{index:06d}.png" for index in range(wanted)]
    if (folder / names[0]).exists():
        try:
            drawn = finish.read_settings(folder / names[0])["prompt"]
        except UserError as error:
            raise UserError(f"{error.args[0].partition(';')[0]}: remove it, and it is drawn anew") from None
        if drawn != prompt:
            raise UserError(f"{folder} has pictures of {drawn!r}, not of {prompt!r}: give another --workdir")
    leads = jax.process_index() == 0
    if leads:
        keep_alone(folder, names)
    # as the first host sees it: the others may look when some are drawn already
    missing = exchanged([index for index, name in enumerate(names) if not (folder / name).exists()])[0]
    batches = sorted({index - index % PRIOR_BATCH for index in missing})
    own = batches[jax.process_index() :: jax.process_count()]
    if own:
        count = sum(min(PRIOR_BATCH, wanted - first) for first in own)
        print(f"prior: drawing {count} pictures of {prompt!r}", flush=True)
        pipe = Drawer(model, config.finetune, config.model, folder).ready()
        for first in own:
            count = min(PRIOR_BATCH, wanted - first)
            at_once = pipe.batch_size_for(count, *pipe.default_size)
            images = pipe.generate([prompt] * count, seed=config.seed, first_index=first, batch_size=at_once)
            for index, image in enumerate(images, first):
                finish.write_png(folder / names[index], image, {"prompt": prompt, "index": index})
        del pipe  # its params leave the devices
    if leads:
        lines = [json.dumps({"file_name": name, "text": prompt}) for name in names]
        finish.write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    exchanged("drawn")
    return folder


def keep_alone(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Leaves no PNGs but these in a folder: others wait in a hidden one below, which no training reads."""
    aside = folder / ".aside"
    aside.mkdir(exist_ok=True)
    others = {file.name for file in folder.glob("*.png")} - set(names)
    moves = [(folder / name, aside / name) for name in others]
    moves += [(aside / name, folder / name) for name in names if not (folder / name).exists()]
    for source, target in moves:
        with contextlib.suppress(FileNotFoundError):  # never drawn
            source.replace(target)


def export(task: Task, params: Any, folder: pathlib.Path, overwrite: bool) -> pathlib.Path:
    """Writes the model or the ControlNet into the folder, in float16; of a LoRA or a word, its file."""
    if task.net is not None:
        net = dataclasses.replace(task.net, params=params["controlnet"])
        save_controlnet(folder, net, task.sight, overwrite)
        return folder
    if (task.word or task.lora) and not overwrite:
        _refuse_to_replace(folder, embeddings.FILE if task.word else lora_files.FILE)
    if task.word is not None:
        return embeddings.save(folder, task.word.embedding(params))
    if task.lora is not None:
        return lora_files.save(folder, Lora(jax.tree.map(np.asarray, params), task.lora.alphas))
    save_folder(folder, trained(task, params), dtype=jnp.float16, overwrite=overwrite)
    return folder


def _refuse_to_replace(path: pathlib.Path, name: str) -> None:
    """UserError where the file that is to be saved exists: `path`, or `name` in that folder."""
    file = path if path.suffix == ".safetensors" else path / name
    if file.exists():
        raise UserError(f"{file} already exists: choose another place, or remove it")


def trained(task: Task, params: Mapping[str, Params]) -> Model:
    """The model with trained parts."""
    parts = {kind: dataclasses.replace(getattr(task.model, kind), params=own) for kind, own in params.items()}
    return dataclasses.replace(task.model, **parts)
