"""Penstock: an OpenAI-compatible LLM server for Apple's MLX that never dies of memory."""

__version__ = "0.1.0"
