"""How many experts a checkpoint folder has, and how many there were. Reads no tensor, and needs no torch."""

from __future__ import annotations

from ..runtime.moe_classes import is_moe_class
from ..runtime.moe_config import complete_moe_config, moe_shape
from ..runtime.validate import StoredCheckpoint


def experts_stored(stored: StoredCheckpoint) -> dict[str, int] | None:
    """Return `kept`, `of`, `active` and `active_of`; None of a model that is no mixture of experts.

    Args:
        stored: an opened folder.

    Returns:
        Experts of a layer and those that a token goes through: as the config has them, and as they were
        before the first stage that changed them; the same where none did.

    Raises:
        SourceError: the config is damaged.
    """
    name = stored.class_name
    if not is_moe_class(name):
        return None
    where = str(stored.folder / "config.json")
    routing = moe_shape(complete_moe_config(name, stored.config, where)).routing
    experts, active = routing.experts, routing.active
    found = {"kept": experts, "of": experts, "active": active, "active_of": active}
    for entry in stored.manifest.history:
        before = [entry.details.get(key) for key in ("experts_before", "active_before")]
        counts = [count for count in before if isinstance(count, int)]
        if len(counts) == len(before):
            return {**found, "of": counts[0], "active_of": counts[1]}
    return found
