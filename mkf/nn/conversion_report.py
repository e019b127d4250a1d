"""What a conversion did to a network, layer by layer, and what can be hoped for from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class LayerReport:
    """One depthwise convolution.

    Attributes:
        name: The layer's name in the model; empty where the model is itself the layer.
        filters: Number of its filters.
        kernel_size: Height and width of a filter.
        reason: Why it was not replaced; None if it was. The fields below are None then, or where they do not apply.
        keys_used: How many different keys its channels have.
        residual: Mean over the filters of ||f - (a key + b)|| / ||f - mean(f)||; dead filters (constant ones) left out.
        worst_residual: The largest of them.
        output_error: ||y_keys - y|| / ||y|| of the layer's output y for the batch, the layer's input being the same;
            of its first run if there are several. None where y is 0.
        seconds: Time of the layer for the batch, of all its runs if there are several.
        seconds_with_keys: The same with keys.
        norm_fused: Whether it computes the LayerNorm that follows too (`mkf.nn.fuse_norms`), which no time here counts.
    """

    name: str
    filters: int
    kernel_size: tuple[int, int]
    reason: str | None = None
    keys_used: int | None = None
    residual: float | None = None
    worst_residual: float | None = None
    output_error: float | None = None
    seconds: float | None = None
    seconds_with_keys: float | None = None
    norm_fused: bool = False


@dataclass
class ConversionReport:
    """All depthwise convolutions of a model, in its order. `print` shows it as a table.

    Attributes:
        layers: One report each.
        seconds: Time of the whole model for the batch before any conversion, in evaluation mode; None without a batch.
    """

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float | None = None

    @property
    def replaced(self) -> list[LayerReport]:
        """The layers that have keys now."""
        return [layer for layer in self.layers if layer.reason is None]

    @property
    def skipped(self) -> list[LayerReport]:
        """The layers that were left as they are."""
        return [layer for layer in self.layers if layer.reason is not None]

    @property
    def share(self) -> float | None:
        """Part of the model's time that the replaced layers took; None without a batch."""
        if self.seconds is None:
            return None
        return sum(layer.seconds or 0.0 for layer in self.replaced) / self.seconds

    @property
    def saved(self) -> float:
        """Seconds that the replaced layers take less than before, of those that were timed."""
        return sum((layer.seconds or 0.0) - (layer.seconds_with_keys or 0.0) for layer in self.replaced)

    @property
    def expected_speed_up(self) -> float | None:
        """Time of the model / its time if only the replaced layers change, by Amdahl's law.

        None without a batch, and where layers took longer than their network, as on a machine that is busy.
        """
        if self.share is None or self.share >= 1 or self.seconds is None:
            return None
        return self.seconds / (self.seconds - self.saved)

    def __str__(self) -> str:
        """A table of the layers and a line for the whole."""
        columns = ["layer", "filters", "size", "keys", "residual", "worst"]
        if self.seconds is not None:
            columns += ["output error", "share of time", "times faster"]
        rows = [columns]
        for layer in self.layers:
            height, width = layer.kernel_size
            row = [layer.name or "(the model)", str(layer.filters), f"{height}x{width}"]
            if layer.reason is not None:
                rows.append([*row, f"left alone: {layer.reason}"])
                continue
            row += [str(layer.keys_used), _three(layer.residual), _three(layer.worst_residual)]
            if self.seconds is not None and layer.seconds and layer.seconds_with_keys:
                share, gain = layer.seconds / self.seconds, layer.seconds / layer.seconds_with_keys
                row += [_three(layer.output_error), f"{100 * share:.1f} %", f"{gain:.2f}"]
            rows.append(row)
        replaced = self.replaced
        whole = f"{len(replaced)} of {len(self.layers)} depthwise layers have keys now"
        whole += f" ({sum(layer.filters for layer in replaced)} filters)."
        if fused := sum(layer.norm_fused for layer in replaced):
            whole += f" {fused} of them were fused with the LayerNorm that follows."
        if self.share is not None:
            whole += f" They took {100 * self.share:.1f} % of the network's time on this batch; "
            speed_up = self.expected_speed_up
            whole += (
                "so this machine was too busy to tell how fast it will run."
                if speed_up is None
                else f"expect it to run {speed_up:.2f} times as fast."
            )
        return "\n".join([*_aligned(rows), whole])


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns of one width; the last word of a shorter row, a reason, may run over."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    return [
        "  ".join([row[0].ljust(widths[0]), *(word.rjust(w) for word, w in zip(row[1:], widths[1:], strict=False))])
        for row in rows
    ]
