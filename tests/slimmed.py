"""What a stage that slimmed an encoder tells, in the form in which it stands in a report."""

from __future__ import annotations

from typing import Any


def slimmed_details(*, layers: int = 12, uniform: bool = True, masks: bool = True) -> dict[str, Any]:
    """Return details of a stage on an encoder of SAM-B's widths.

    Args:
        layers: of the encoder.
        uniform: all layers are equally wide afterwards.
        masks: weights were chosen by mIoU; False: by the output's error.
    """
    heads = [32 if uniform else 20 + 2 * layer for layer in range(layers)]
    inner = [1536 if uniform else 960 + 96 * layer for layer in range(layers)]
    errors, mious = (0.0421, 0.00312, 0.0119, 0.00287), (0.41, 0.705, 0.622, 0.7123)
    phases: list[dict[str, Any]] = []
    for number, name in enumerate(
        ("embedding pruning", "embedding aligning", "bottleneck pruning", "bottleneck aligning")
    ):
        measured = {"output_error": errors[number], "miou": mious[number] if masks else None}
        if "aligning" in name:
            values = [mious[number] - 0.1 * 0.7**epoch for epoch in range(20)]
            if not masks:
                values = [errors[number] * (1 + 3 * 0.7**epoch) for epoch in range(20)]
            values[-1] = values[-3]
            phases.append(
                {
                    "name": name, "kind": "aligning", "steps": 1000, "epochs": 20.0, "batch_size": 4,
                    "training_loss": [[5 * i + 5, 0.1 * 0.99**i] for i in range(200)],
                    "choice_values": [[50 * (i + 1), v, 1e-4] for i, v in enumerate(values)],
                    "best_step": 950 if number == 1 else 1000, **measured, "seconds": 12.5, "resumed_at": 0,
                }
            )  # fmt: skip
        else:
            parameters = 45_209_472 if number == 0 else 23_897_216
            phases.append(
                {"name": name, "kind": "pruning", "parameters": parameters, **measured, "seconds": 1.5}
            )
    choice = {"by": "miou" if masks else "output_error", "images": 50, "masks": 312 if masks else None}
    return {
        "ratio": 0.5, "ranking": "uniform" if uniform else "global",
        **({} if uniform else {"normalizer": "gaussian"}), "slimming": "alternate", "features": True,
        "rel_pos": "slice", "attn_scale": "preserve", "sigma": 0.01, "gradients": "summed",
        "score_images": 1000, "train_images": 9950, "choice": choice, "heads": 12,
        "widths": {"embedding": [768, 384], "head_dim": [[64, size] for size in heads],
                   "inner": [[3072, size] for size in inner]},
        "phases": phases, "before": {"output_error": 0, "miou": 0.7301 if masks else None},
        "parameters": {"model": [93_735_728, 27_962_032], "encoder": [89_670_912, 23_897_216]},
        "macs": {"model": [485_397_449_216, 154_046_024_192], "encoder": [483_585_097_728, 152_233_672_704],
                 "encoder_linear_conv": [368_704_487_424, 94_793_367_552]},
        "kept_file": "slimming.json",
    }  # fmt: skip
