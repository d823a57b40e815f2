"""What the tests of texts share."""

from tests.text.prompt_files import write  # noqa: F401
