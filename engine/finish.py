"""From the decoder's output to files: uint8, checks, names, PNG with its settings inside, sheets, WebP.

Every file is written whole or not at all: to a temporary name in the same folder, flushed to the disk,
then moved to its place in one step.
"""

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import re
import secrets
import tempfile
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from engine.types import UserError

SETTINGS_KEY = "fogsculpt"  # the JSON that makes the picture again
READABLE_KEY = "parameters"  # the same for people, under the key that picture viewers show
NOT_READABLE = ("prompt", "negative_prompt", "contents")  # the first two have lines of their own
BESIDE = {"sheet", "frames", "words"}  # settings of files that stand beside pictures and show them
SETTINGS_LIMIT = 16 * 2**20  # characters of JSON
FILE_LIMIT = 2**30  # bytes of a PNG that we are asked to read
MOST_DEFLATED = 1032  # times smaller at most, by the deflate that PNG has; and a pixel is a bit at least

PAPER, INK = (255, 255, 255), (60, 60, 60)  # of contact sheets
LABEL_SIZE = 12  # px
WORDS_PIXELS = 2**25  # of a sheet of words, at most: those of large pictures and many words are made smaller
DARK = 0.15  # of the brightness is left where a word is not heeded

Picture = UInt8[np.ndarray, "H W 3"]
Larger = UInt8[np.ndarray, "H2 W2 3"]
Pictures = UInt8[np.ndarray, "B H W 3"]
Path = str | os.PathLike


def to_uint8(
    x: Float[jax.Array, "B H W C"] | Float[np.ndarray, "B H W C"],
) -> UInt8[jax.Array, "B H W C"] | UInt8[np.ndarray, "B H W C"]:
    """[-1, 1] -> uint8 0..255, rounded to nearest; what lies outside is clipped. Works under jit too."""
    xp = x.__array_namespace__()
    unit = xp.clip(x.astype(np.float32) / 2 + 0.5, 0.0, 1.0)
    return xp.round(unit * 255).astype(np.uint8)


def check_finite(x: Shaped[jax.Array, "B ..."] | Shaped[np.ndarray, "B ..."]) -> list[int]:
    """Indices along the batch of the latents or images that hold a NaN or an infinity."""
    finite = x.__array_namespace__().isfinite(x.reshape(len(x), math.prod(x.shape[1:])))
    return np.flatnonzero(~np.asarray(finite.all(axis=1))).tolist()


def upscale(image: Picture, factor: int) -> Larger:
    """The picture `factor` times as wide and high, with Lanczos's filter."""
    if factor < 1:
        raise UserError(f"upscale={factor}: write a whole number from 1")
    height, width, _ = image.shape
    return resized(image, height * factor, width * factor)


def resized(image: Picture, height: int, width: int) -> Larger:
    """The picture with so many pixels, by Lanczos's filter; as it is where it has them."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def contact_sheet(
    images: Pictures, columns: int | None = None, gap: int = 4, labels: Sequence[str] | None = None
) -> Larger:
    """All pictures on one sheet, row by row on white paper, `gap` px apart and from the edge.

    Args:
      columns: None makes the sheet about square.
      labels: a line under each picture, shortened to its width, in ASCII: Pillow's own font has no more.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    below = LABEL_SIZE + 4 if labels is not None else 0
    cell_height, cell_width = height + below + gap, width + gap
    sheet = np.full((rows * cell_height + gap, columns * cell_width + gap, 3), PAPER, np.uint8)
    corners = [(gap + i // columns * cell_height, gap + i % columns * cell_width) for i in range(count)]
    for image, (top, left) in zip(images, corners, strict=True):
        sheet[top : top + height, left : left + width] = image
    if labels is None:
        return sheet
    page = Image.fromarray(sheet)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(LABEL_SIZE)
    for label, (top, left) in zip(labels, corners, strict=True):
        draw.text((left, top + height), _fitting(label, font, width), fill=INK, font=font)
    return np.asarray(page)


def strip(frames: Pictures, predictions: Pictures | None = None, gap: int = 4) -> Larger:
    """One row from static to picture; with `predictions`, the denoised guess under each noisy frame."""
    both = frames if predictions is None else np.concatenate([frames, predictions])
    return contact_sheet(both, columns=len(frames), gap=gap)


def lit(image: Picture, heat: Float[np.ndarray, "h w"], most: float) -> Picture:
    """The picture in the light of how much it heeds a word: brighter where more than in the mean.

    Args:
      heat: shares of any size.
      most: times the mean that are fully lit; the scale between is logarithmic.
    """
    height, width, _ = image.shape
    times = Image.fromarray(np.float32(heat / heat.mean())).resize((width, height), Image.Resampling.BICUBIC)
    light = np.log(np.maximum(np.asarray(times), 1.0)) / max(np.log(most), 1e-6)
    shade = DARK + (1 - DARK) * np.clip(light, 0.0, 1.0)
    return np.round(image * shade[..., None]).astype(np.uint8)


def words_sheet(image: Picture, heats: Sequence[tuple[str, Float[np.ndarray, "h w"]]]) -> Larger:
    """The picture, and what each word steered: the same picture, lit where the word was heeded (see `lit`).

    All words share one scale. Under each it stands how many times its own mean its brightest place has, and
    the word, or which of the prompt it is where it cannot be written in ASCII.

    Args:
      heats: words, and how much each place attends to them.
    """
    height, width, _ = image.shape
    share = (WORDS_PIXELS / (len(heats) + 1) / (height * width)) ** 0.5
    if share < 1:
        size = max(int(width * share), 1), max(int(height * share), 1)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    times = [float(heat.max() / heat.mean()) for _, heat in heats]
    parts = [image, *(lit(image, heat, max(times)) for _, heat in heats)]
    names = [in_ascii(word).strip() or f"(word {i})" for i, (word, _) in enumerate(heats, start=1)]
    labels = [f"{n:.1f} {name}" for name, n in zip(names, times, strict=True)]
    return contact_sheet(np.stack(parts), labels=["", *labels])


def slug(prompt: str, limit: int = 60) -> str:
    """The prompt for a file name: at most `limit` of [a-z0-9-], never empty ('picture' stands in)."""
    words = re.sub(r"[^a-z0-9]+", "-", in_ascii(prompt).lower()).strip("-")
    if len(words) > limit:
        cut = words[: limit + 1].rpartition("-")[0]  # between words, where there is a place
        words = cut or words[:limit]
    return words or "picture"


def picture_name(index: int, prompt: str) -> str:
    """00007-a-fox-on-a-skateboard.png"""
    return f"{index:05d}-{slug(prompt)}.png"


def prepare_folder(path: Path) -> pathlib.Path:
    """Makes the folder and proves, before any work is done, that files can be written there.

    Raises:
      UserError: it cannot be made or written to.
    """
    if "://" in str(path):
        raise UserError(f"{path}: write a folder of this machine; jobs (--prompts_file) write elsewhere, too")
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from None
    return folder


def write_png(path: Path, image: Picture, settings: dict[str, Any]) -> None:
    """Writes the picture with its settings (anything JSON can say) inside. Equal input gives equal bytes.

    Raises:
      UserError: the file cannot be written. Nothing half-written is left.
    """
    try:
        data = encode_png(image, settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    _write(path, data)


def encode_png(image: Picture, settings: dict[str, Any]) -> bytes:
    """The bytes of `write_png`; UserError where the settings do not fit."""
    # ASCII JSON escapes what PNG text may not hold: NUL, and lone surrogates.
    text = json.dumps(settings, ensure_ascii=True, allow_nan=False)
    if len(text) > SETTINGS_LIMIT:
        raise UserError(f"settings of {len(text)} characters do not fit; write a shorter prompt")
    info = PngImagePlugin.PngInfo()
    info.add_itxt(SETTINGS_KEY, text)
    info.add_itxt(READABLE_KEY, _readable(settings))
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", pnginfo=info)
    return data.getvalue()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings inside a PNG that `write_png` wrote.

    Raises:
      UserError: no such file, not a whole PNG, or one without settings.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write the path of a PNG made by fogsculpt")
    if path.stat().st_size > FILE_LIMIT:
        raise UserError(
            f"{path}: more than {FILE_LIMIT // 2**20} MiB; write the path of a PNG made by fogsculpt"
        )
    try:
        # Not Image.open, which refuses pictures as large as --upscale makes them: no pixel is decoded here.
        with PngImagePlugin.PngImageFile(path) as image:
            text, (width, height) = image.info.get(SETTINGS_KEY), image.size
            image.verify()  # every chunk's checksum, up to the end
    except Exception as error:  # Pillow raises half a dozen types for broken files
        reason = "it is damaged or no PNG" if not isinstance(error, PermissionError) else "permission denied"
        raise UserError(f"{path}: {reason}; write the path of a PNG made by fogsculpt") from None
    if width * height > 8 * MOST_DEFLATED * path.stat().st_size:
        raise UserError(f"{path}: the picture is too large to be one of fogsculpt's: its file cannot hold it")
    if text is None:
        raise UserError(f"{path}: no settings inside; write the path of a PNG made by fogsculpt")
    try:
        settings = json.loads(text) if len(text) <= SETTINGS_LIMIT else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: its settings are damaged; write the path of a PNG made by fogsculpt")
    return settings


def write_animation(path: Path, frames: Pictures, duration: int = 120, linger: int = 2000) -> None:
    """An animated WebP that repeats for ever: `duration` ms a frame, `linger` ms for the last one.

    Raises:
      UserError: the file cannot be written. Nothing half-written is left.
    """
    first, *rest = [Image.fromarray(frame) for frame in frames]
    durations = [duration] * len(rest) + [linger]
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=90)
    _write(path, data.getvalue())


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8. UserError where that fails; nothing half-written is left."""
    _write(path, text.encode())


def _write(path: Path, data: bytes) -> None:
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:  # Ctrl-C included
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise


def fsync_folder(folder: pathlib.Path) -> None:
    """Makes the move itself survive a power cut. Windows and some network folders have no such thing."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def unwritable(path: Path, error: OSError | ValueError) -> UserError:
    """What to say, and to do, where a file or folder cannot be written."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, or choose another folder with --out"
    elif code in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        advice = "something else has that name; choose another folder with --out"
    else:
        advice = "choose a folder that you may write to with --out"
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{path}: cannot be written: {reason}; {advice}")


def _readable(settings: dict[str, Any]) -> str:
    """Prompt, negative prompt, then 'name: value, ...' on a line, without what PNG text may not hold."""
    rest = {k: v for k, v in settings.items() if k not in NOT_READABLE}
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{k.replace('_', ' ').capitalize()}: {v}" for k, v in rest.items()))
    text = "\n".join(lines).replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text.encode("utf-8", "replace").decode("utf-8")


def in_ascii(text: str) -> str:
    """Letters without their accents; what has no ASCII form is left out."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _fitting(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The longest start of the label, on one line, that is no wider than `width` px."""
    label = " ".join(in_ascii(label[: 2 * width]).split())  # no letter is narrower than half a pixel
    label = "".join(c for c in label if c.isprintable())
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "...") > width:
        label = label[:-1]
    return label + "..."
