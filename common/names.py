"""What flags accept by name, known before torch is imported, which takes longer than all else.

Their meanings are where they are used; `tests/test_start_up.py` holds the two together.
"""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # in flags: torch's
PICTURES = (".png", ".jpg", ".webp")
BALANCE_TERMS = ("switch", "contrastive", "z_loss", "bias")
_SIZES = {  # of families with patch 2 alone
    "ProMoE": ("S", "B", "L", "XL"),
    "ProMoE-EC": ("S", "B", "L", "XL"),
    "EC-DiT": ("L",),
    "DiffMoE": ("B", "L", "XL"),
}
MODELS = (
    *(f"DiT-{size}/{patch}" for size in ("Ti", "S", "B", "L", "XL") for patch in (1, 2, 4, 8)),
    *(f"DiT-G/{patch}" for patch in (1, 2)),
    *(f"{family}-{size}/2" for family, sizes in _SIZES.items() for size in sizes),
)
