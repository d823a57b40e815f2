"""What a pipeline's text encoders say of the prompts of a job; and which pipeline, as rows may have LoRAs."""

from collections.abc import Callable, Sequence

import jax

from engine.jobs import digests
from engine.jobs.account import Recent, out_of_memory_or_raise
from engine.jobs.loras import Own
from engine.jobs.plan import Wanted
from engine.pipeline import Pipeline
from engine.requests import Context, Request
from engine.text.prompts import unread
from engine.text.reading import cut
from engine.types import UserError

TEXT_BATCH = 16  # prompts a device encodes at once
CONTEXTS, CONTEXT_BYTES = 1024, 2**28  # that are kept, for prompts that come again


class Wording:
    """A pipeline, and the contexts of the last prompts by it."""

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe
        self._contexts = Recent(CONTEXTS, CONTEXT_BYTES)

    def of(self, requests: Sequence[Request]) -> dict[str, Context]:
        """Contexts of all their prompts."""
        texts = [text for one in requests for text in (one.prompt, one.negative_prompt)]
        texts = list(dict.fromkeys([*texts, *self.pipe.beside]))
        known = {text: self._contexts[text] for text in texts if text in self._contexts}
        new = [text for text in texts if text not in known]
        found = self.pipe.encode(new, TEXT_BATCH) if new else {}
        for text, context in found.items():
            self._contexts.add(text, context)
        return known | found


class TooLong:
    """Counts the pictures whose prompts are not read to their end, and tells of the first."""

    def __init__(self, pipe: Pipeline, tell: Callable[[str], None]):
        self.count = 0
        self._reading, self._tell = (pipe.model.first_tokenizer, pipe.reading), tell

    def look_at(self, wanted: Sequence[Wanted]) -> None:
        is_cut: dict[str, bool] = {}
        for one in wanted:
            texts = one.request.prompt, one.request.negative_prompt
            for text in texts:
                if text not in is_cut:
                    is_cut[text] = cut(text, *self._reading) is not None
            if long := [text for text in texts if is_cut[text]]:
                if not self.count:
                    self._tell(f"warning: row {one.row.number}: {unread(long[:1], *self._reading)[0]}")
                self.count += 1


class Changed(UserError):
    """The LoRAs of some rows are not those any more that the job was planned with."""


class Wordings:
    """That of the job's pipeline, and beside it that of the rows that were drawn last with own LoRAs.

    No more than one of those is in memory.
    """

    def __init__(self, pipe: Pipeline):
        self._plain = Wording(pipe)
        self._lora: Own | None = None
        self._own: Wording | None = None

    def are_there(self, lora: Own | None) -> bool:
        """Whether nothing must be loaded for rows of these LoRAs."""
        return lora is None or (self._own is not None and lora == self._lora)

    def of(self, lora: Own | None) -> Wording:
        """For rows of these LoRAs, or of the job's.

        Raises:
          Changed: a file is another now, or gone: its rows cannot be drawn.
          OSError: trouble on the way to a file, which may pass.
          UserError: there is no room for them.
        """
        if lora is None:
            return self._plain
        if self._own is None or lora != self._lora:
            self._own, self._lora = None, None  # the others leave the memory first
            self._own, self._lora = Wording(self._with(lora)), lora
        return self._own

    def _with(self, lora: Own) -> Pipeline:
        try:
            pipe = self._plain.pipe.with_loras(lora.files)
            if digests.of_loras(lora.files) == lora.mark:
                return pipe
            reason = "has changed since the job was planned"
        except UserError as error:
            reason = f"cannot be read any more: {error}"
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            out_of_memory_or_raise(error)
            raise UserError(
                "out of memory: LoRAs of rows take that of a second U-Net and its text encoders; write "
                "--dtype bfloat16, or a job for the rows of each, with --lora"
            ) from None
        raise Changed(f"lora={lora.told} {reason}")
