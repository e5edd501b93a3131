"""A model hub on loopback, as a process of its own: what `huggingface_hub` speaks, kept on disk.

Only for tests. `Hub` starts it, tells it to fail, and looks at what it holds.
"""

from .client import Hub

__all__ = ["Hub"]
