"""Numbers and bytes as the page writes them."""

import base64
import math


def whole(number: int) -> str:
    """A number of things, with commas."""
    return f"{number:,}"


def decimal(value: float, digits: int = 2) -> str:
    """So many decimals; a dash where there is nothing to measure."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def size(length: int) -> str:
    """A number of bytes."""
    return f"{length / 1000:,.0f} kB" if length >= 1000 else f"{length} B"


def base64_text(content: bytes) -> str:
    """Bytes for a data URL or the script."""
    return base64.b64encode(content).decode("ascii")
