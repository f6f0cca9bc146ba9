"""What goes wrong with the files of a model, before any request: one sentence for who starts the server."""

from __future__ import annotations


class ModelFilesError(ValueError):
    """The tokenizer or template files of a model can't be used. The message is one sentence for people."""
