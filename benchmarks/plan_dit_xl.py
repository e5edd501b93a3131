"""What `compress plan` predicts for DiT-XL/2 (class-conditional, 256 pixels) from its config alone.

Writes the config into a temporary folder, without weights, and prints parameters and multiply-
accumulates beside the published figures, and the predicted bytes of several recipes beside bf16.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import compress
from _common import parser, say, start, table
from _dit_xl import write_config
from compress.models.open import read_spec
from compress.recipes.loader import load_recipe

PUBLISHED_PARAMETERS = 675e6
PUBLISHED_MACS = 118.7e9
PUBLISHED_MACS_LINEAR = 114.44e9  # without the attention products

RECIPES: dict[str, dict[str, Any]] = {
    "W8A8": {"weight_bits": 8},
    "W8A8, adaLN 8": {"weight_bits": 8, "adaln_weight_bits": 8},
    "W4A8": {"weight_bits": 4},
    "W4A8, adaLN 8": {"weight_bits": 4, "adaln_weight_bits": 8},
    "W4A8, adaLN 8, groups of 64, symmetric": {
        "weight_bits": 4, "adaln_weight_bits": 8, "group_size": 64, "weight_symmetric": True,
    },
}  # fmt: skip


def main() -> None:
    """Plan and print."""
    arguments = parser(__doc__).parse_args()
    start("Plan of DiT-XL/2 from its config", arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(Path(scratch) / "dit-xl")
        base: dict[str, Any] = {"model": str(folder), "export": {"path": str(Path(scratch) / "out")}}
        spec = read_spec(load_recipe({**base, "stages": [{"rtn": {}}]}).recipe.model)
        size = spec.size()
        linear_macs = spec.family.macs(spec.config, attention_products=False)
        table(
            ["dense model", "predicted", "published", "difference"],
            [
                [label, f"{value:,}", f"{published:,.0f}", f"{100 * (value / published - 1):+.2f} %"]
                for label, value, published in (
                    ("parameters", size.parameters, PUBLISHED_PARAMETERS),
                    ("MACs", size.macs, PUBLISHED_MACS),
                    ("MACs without attention products", linear_macs, PUBLISHED_MACS_LINEAR),
                )
            ],
        )
        say(f"parameters with the copies of the embedder: {size.parameters_stored:,}\n")
        rows = [["bf16", f"{size.bytes:,}", "1.00", f"{size.bits_per_weight:.2f}", "", ""]]
        for label, settings in RECIPES.items():
            began = time.perf_counter()
            document = compress.plan({**base, "stages": [{"vidit_q": settings}]})
            after = document["stages"][0]["after"]
            rows.append(
                [
                    label,
                    f"{document['export']['bytes']:,}",
                    f"{size.bytes / document['export']['bytes']:.2f}",
                    f"{after['bits_per_weight']:.2f}",
                    f"{document['stages'][0]['peak_memory_bytes'] / 1e9:.2f}",
                    f"{time.perf_counter() - began:.1f}",
                ]
            )
    table(["recipe", "file bytes", "x smaller", "bits per weight", "peak memory GB", "planned in s"], rows)


if __name__ == "__main__":
    main()
