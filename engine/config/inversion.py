"""A word more for a model that exists, learned from a few pictures."""

import dataclasses

from engine.errors import UserError

# As Gal et al. 2022 have them from CLIP: sentences that say nothing of what is in the picture.
TEMPLATES = (
    *("a photo of a {}", "a photo of the {}", "a picture of a {}", "a picture of the {}"),
    *("an image of a {}", "an image of the {}", "a {}", "the {}"),
)
MAX_VECTORS = 64


@dataclasses.dataclass
class InversionConfig:
    """Textual inversion (Gal et al. 2022): the vectors of one new word are learned, and nothing else.

    `templates` take the place of the captions of the data, which then need not have any: one is drawn for
    each picture of each step. For a style write ("a picture in the style of {}",). With none, the data's own
    captions are used, and pictures whose caption lacks the placeholder are skipped.
    """

    placeholder: str = ""  # the new word, such as "<my-thing>"
    initializer: str = ""  # the word that it begins as, such as "dog": one token of the model
    num_vectors: int = 1  # that stand for it: more remember more, and follow the rest of a prompt less
    templates: tuple[str, ...] = TEMPLATES  # captions, {} for the placeholder; none: those of the data

    def validate(self, where: str = "inversion") -> None:
        """Raises UserError; `where` is what the config calls this part. Only a model knows its words."""
        word, count = self.placeholder, self.num_vectors
        if not word or any(c.isspace() or not c.isprintable() for c in word):
            raise UserError(f"{where}.placeholder={word!r}: write a new word, such as '<my-thing>'")
        if word != word.lower():  # diffusers reads no more than the first vector of such a word
            raise UserError(f"{where}.placeholder={word!r}: write it in small letters, {word.lower()!r}")
        if not self.initializer.strip():
            raise UserError(f"{where}.initializer='': write the word that {word} begins as, such as 'dog'")
        if not 1 <= count <= MAX_VECTORS:
            raise UserError(f"{where}.num_vectors={count} is out of range; write 1 to {MAX_VECTORS}")
        if isinstance(self.templates, str):
            raise UserError(f"{where}.templates={self.templates!r}: write a tuple, such as ('the {{}}',)")
        for template in self.templates:
            if "{}" not in template:
                raise UserError(f"{where}.templates: {template!r} has no {{}}, where {word} is to stand")
