"""What the stage `cskv` and the evaluation of decoding tell: hand-made, to be worked out by hand."""

from __future__ import annotations

from typing import Any

WHY = "it attends to the last 16 tokens alone, and its stock cache holds no more"


def layer(number: int, rank_k: int = 8, rank_v: int = 16) -> dict[str, Any]:
    """Return the row of one attention of 32 channels."""
    return {
        "name": f"model.layers.{number}.self_attn", "width": 32, "rank_k": rank_k, "rank_v": rank_v,
        "discarded_k": 0.0123, "discarded_v": 0.25, "mse_k": 0.5, "mse_v": 0.25, "mse_k_trained": None,
        "mse_v_trained": None,
    }  # fmt: skip


def spread(number: int, of: int = 32) -> dict[str, Any]:
    """Return singular values that halve every channel, and every second channel."""
    return {
        "name": f"model.layers.{number}.self_attn",
        "k": [2.0**-place for place in range(of)],
        "v": [2.0 ** -(place / 2) for place in range(of)],
        "of": of,
    }


def cache(layers: int = 3, **changes: Any) -> dict[str, Any]:
    """Return what is told of layers of 32 channels in float32: a quarter and a half of them are kept."""
    before, after = layers * 2 * 32 * 4.0, layers * 24 * 4.0
    return {
        "init": "whiten", "window": 32, "mode": "sliding", "bits": None, "key_group": 32,
        "removed": {"k": 0.75, "v": 0.5}, "asked": {"removed": {"k": 0.75, "v": 0.5}},
        "bytes_per_token": {"before": before, "after": after, "metadata": 0.0},
        "at_context": {
            "tokens": 512, "before": int(512 * before), "after": int(512 * (after + 4) + 32 * before),
            "with_factors": int(512 * (after + 4) + 32 * before + layers * 96 * 24 * 4),
        },
        "window_bytes": int(32 * before), "factor_parameters": layers * 96 * 24,
        "factor_bytes": layers * 96 * 24 * 4, "break_even_tokens_one": 110, "break_even_tokens": 58,
        "rebuild_flops": {"tokens": 512, "per_token": 2 * 512 * 24 * 32 * layers},
        "layers": [layer(number) for number in range(layers)], "skipped": [],
        "singular_values": [spread(number) for number in range(layers)],
        "allocation": None, "training": None, "calibration_tokens": 4096, **changes,
    }  # fmt: skip


def decoding(**changes: Any) -> dict[str, Any]:
    """Return what is told of decoding 4 sequences, with a loss that grows behind the prompt."""
    rows = [
        {"first": 2 + 14 * span, "last": 15 + 14 * span, "tokens": 56, "original": 1.25 + 0.05 * (span % 3),
         "compressed": 1.25 + 0.05 * (span % 3) + 0.01 * span, "divergence": 0.01 * span}
        for span in range(16)
    ]  # fmt: skip
    told = {
        "samples": 4,
        "prompt": 8,
        "tokens": 896,
        "compressed_share": 0.75,
        "original": "one pass",
        "by_distance": rows,
    }
    return {**told, **changes}


PASSKEY = {
    "original": [
        {"length": 1024, "samples": 10, "found": 10},
        {"length": 2048, "samples": 10, "found": 8},
    ],
    "compressed": [
        {"length": 1024, "samples": 10, "found": 9},
        {"length": 2048, "samples": 10, "found": 5},
    ],
}
METRICS = {
    "decode_perplexity_original": 3.5, "decode_perplexity": 3.605,
    "decode_perplexity_one_pass": 3.55, "decode_perplexity_increase": 0.03,
    "decode_kl": 0.0125, "kv_bytes_per_token": 288.0, "kv_bytes_ratio": 0.375,
}  # fmt: skip
TEXT = {"samples": 4, "length": 256, "tokens": 1020, "seed": 0, "note": "one pass says nothing of the cache"}
FIDELITY = {"sqnr_db": 200.0, "kl": 0.0, "perplexity_original": 4.0, "perplexity": 4.0}


def told_in(document: dict[str, Any], details: dict[str, Any], **evaluation: Any) -> dict[str, Any]:
    """Return a report of a language model with a stage `cskv`, and of how it decodes."""
    (stage, *_), measured = document["stages"], document["evaluation"]
    sizes = {
        key: document["model"].get(key, 16) for key in ("parameters", "macs", "bytes", "bits_per_weight")
    }
    per_token = details["bytes_per_token"]
    return {
        **document,
        "model": {**document["model"], "family": "llm", "class": "LlamaForCausalLM"},
        "stages": [
            {**stage, "method": "cskv", "details": {"kv_cache": details},
             "before": {**sizes, "kv_bytes_per_token": per_token["before"]},
             "after": {**sizes, "kv_bytes_per_token": per_token["after"]}}
        ],
        "evaluation": {
            "metrics": {**measured["metrics"], **FIDELITY, "perplexity_increase": 0.0, **METRICS},
            "text": TEXT, "decoding": decoding(**evaluation),
        },
    }  # fmt: skip
