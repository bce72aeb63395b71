"""By which instructions this processor multiplies 8-bit integers: int8 engines answer otherwise with and without some.

x86 without VNNI adds pairs of products in 16 bits, which saturate. Read without loading a library; a bundle carries this.
"""

from __future__ import annotations

import platform
from pathlib import Path

_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "asimddp"}
_CPUINFO = Path("/proc/cpuinfo")


def int8_arithmetic() -> str:
    """Architecture and whether it has dot products, such as `x86_64 with dot products`; empty where that is not known."""
    try:
        lines = _CPUINFO.read_text().splitlines()
        features = next(line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return ""
    has = "with" if _DOT_PRODUCTS.intersection(features.split()) else "without"
    return f"{platform.machine()} {has} dot products"
