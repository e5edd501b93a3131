"""Which layers are measured by which metric: the groups of MixDQ (arXiv 2405.17873).

The paper splits a text-to-image model in two. `content`: cross-attention and feed-forward layers, which
decide what an image shows; measured by SSIM. `quality`: everything else; measured by SQNR. A model
without cross-attention, or without images, has one group, measured by SQNR.

The paper's code finds the groups by names that contain `attn2` or `ff`; here the layers' roles decide,
which gives the same groups on its models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from ....errors import PlanError
from ....recipes.patterns import select, unmatched

ALL, CONTENT, QUALITY, REST = "all", "content", "quality", "rest"
"""Names of groups that nobody wrote: the only one, the paper's two, and what no pattern describes."""

_TWO_GROUPS = frozenset({"pixart", "unet"})
_CONTENT_ROLES = ("cross.", "ff.")
_WITHOUT_IMAGES = frozenset({"llm", "moe"})

Metric = Literal["sqnr_db", "ssim"]


class GroupRule(Protocol):
    """What a recipe says of a group; `recipes.allocation.GroupSettings` is one."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Patterns of layer names."""

    @property
    def metric(self) -> Metric:
        """By which the layers are measured."""


@dataclass(frozen=True)
class MetricGroup:
    """A group and its layers.

    Attributes:
        name: as in the recipe, or one of the names above.
        metric: by which its layers are measured.
        layers: names, in the order of the model.
    """

    name: str
    metric: Metric
    layers: tuple[str, ...]


def group_layers(
    family: str, roles: Mapping[str, str], rules: Mapping[str, GroupRule] | None = None
) -> list[MetricGroup]:
    """Put every layer into one group.

    Args:
        family: name of the model's family.
        roles: names of the layers that are quantized, in the order of the model -> role.
        rules: what the recipe says; None: the family's own groups.

    Returns:
        The groups that have layers, in the order of the rules. Layers that no pattern describes are the
        group `rest`, measured by SQNR.

    Raises:
        PlanError: a pattern matches no layer, a layer is in two groups, or a language model is to be
            measured by SSIM.
    """
    if rules is None:
        return _of_family(family, roles)
    owner: dict[str, str] = {}
    for name, rule in rules.items():
        if rule.metric == "ssim" and family in _WITHOUT_IMAGES:
            raise PlanError(
                f"groups.{name}: ssim compares images, and the family {family} has none",
                hint="measure the group by sqnr_db",
            )
        for pattern in unmatched(rule.layers, roles):
            raise PlanError(
                f"groups.{name}: pattern {pattern!r} matches no layer that is allocated",
                hint="patterns describe full names, `*` stands for anything; `compress inspect` lists them",
            )
        for layer in select(rule.layers, roles):
            if layer in owner:
                raise PlanError(
                    f"{layer} is in two groups, {owner[layer]!r} and {name!r}",
                    hint="narrow one of their patterns",
                )
            owner[layer] = name
    left = [layer for layer in roles if layer not in owner]
    if left and REST in rules:
        raise PlanError(
            f"groups.{REST} does not describe all other layers; {left[0]} is in no group",
            hint="take the group out: what no pattern describes is put there",
        )
    groups = [(name, rule.metric) for name, rule in rules.items()]
    return _filled([*groups, (REST, "sqnr_db")], {**dict.fromkeys(left, REST), **owner}, roles)


def _of_family(family: str, roles: Mapping[str, str]) -> list[MetricGroup]:
    if family not in _TWO_GROUPS:
        return [MetricGroup(ALL, "sqnr_db", tuple(roles))] if roles else []
    owner = {layer: CONTENT if role.startswith(_CONTENT_ROLES) else QUALITY for layer, role in roles.items()}
    return _filled([(CONTENT, "ssim"), (QUALITY, "sqnr_db")], owner, roles)


def _filled(
    groups: list[tuple[str, Metric]], owner: Mapping[str, str], roles: Mapping[str, str]
) -> list[MetricGroup]:
    filled = [
        MetricGroup(name, metric, tuple(layer for layer in roles if owner[layer] == name))
        for name, metric in groups
    ]
    return [group for group in filled if group.layers]
