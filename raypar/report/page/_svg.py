"""SVG and axes as text, safe to put into a page.

Places along x are shares of the width (``12.5%``), so that a drawing fits any width and can be
zoomed by being made wider, without its texts becoming wider too. Places along y are pixels, or
shares as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Value = str | float | int | None
_TICKS = (1.0, 2.0, 2.5, 5.0, 10.0)


def element(name: str, content: Iterable[Markup | str] = (), **attributes: Value) -> Markup:
    """One element with everything in it escaped that is not markup already.

    Args:
        name: Its tag.
        content: What is inside.
        **attributes: Its attributes; ``class_`` is ``class``, ``_`` is ``-``, and None leaves an
            attribute out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            title = key.rstrip("_").replace("_", "-")
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            words.append(f'{title}="{escape(text)}"')
    inner = "".join(escape(part) for part in content)
    return Markup(f"<{' '.join(words)}>{inner}</{name}>")


def joined(parts: Iterable[Markup]) -> Markup:
    """Markup, one after the other."""
    return Markup("").join(parts)


def share(value: float) -> str:
    """``12.35%`` of 0.1235: a place or length along an axis."""
    return f"{round(100 * value, 3):g}%"


@dataclass(frozen=True, slots=True)
class Scale:
    """Values → places between 0 and 1.

    Attributes:
        low: The value at 0.
        high: The value at 1.
        log: Whether equal ratios are equal distances.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(
        cls, values: Sequence[float], *, room: float = 0.06, zero: bool = False, log_at: float = 12
    ) -> Scale:
        """A scale on which all values have their place, with some room at the ends.

        Args:
            values: Finite, at least one.
            room: Share of the spread that is left free at either end.
            zero: Whether it begins at zero (and is linear then).
            log_at: Ratio of the largest to the smallest value from which on it is logarithmic.
        """
        low, high = min(values), max(values)
        if zero:
            return cls(0.0, high * (1 + room) or 1.0)
        if low > 0 and high / low >= log_at:
            more = (high / low) ** room
            return cls(low / more, high * more, True)
        more = (high - low) * room or abs(high) * 0.1 or 1.0
        return cls(max(0.0, low - more) if low >= 0 else low - more, high + more)

    def place(self, value: float) -> float:
        """Where a value lies; outside of the scale, at its nearer end."""
        if self.log:
            value = max(value, self.low)
            found = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            found = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, found))

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the scale, at most about so many."""
        if self.log:
            return self._log_ticks(most)
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(t * power for t in _TICKS if t * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**p for p in powers for d in digits]
            found = [v for v in found if self.low <= v <= self.high]
            if len(found) <= most:
                break
        return found[:: max(1, math.ceil(len(found) / most))]


Words = Callable[[float], str]
"""A value with its unit."""


def labels(scale: Scale, words: Words, *, upwards: bool = False, most: int = 6) -> Markup:
    """The texts beside an axis, placed by HTML so that they keep their size.

    Args:
        scale: The axis.
        words: What to write at a value.
        upwards: Whether it is the y axis.
        most: At most about so many.
    """
    side = "bottom" if upwards else "left"
    return joined(
        element("span", [words(v)], style=f"{side}:{share(scale.place(v))}")
        for v in scale.ticks(most)
    )


def grid(x: Scale | None, y: Scale | None, *, most: int = 6) -> Markup:
    """Lines at the ticks of both axes."""
    lines = []
    for v in x.ticks(most) if x else ():
        at = share(x.place(v)) if x else ""
        lines.append(element("line", x1=at, x2=at, y1="0", y2="100%", class_="grid"))
    for v in y.ticks(most) if y else ():
        at = share(1 - y.place(v)) if y else ""
        lines.append(element("line", x1="0", x2="100%", y1=at, y2=at, class_="grid"))
    return joined(lines)


def svg(content: Iterable[Markup], *, height: float, title: str, **attributes: Value) -> Markup:
    """A drawing as wide as its place.

    Args:
        content: What is drawn.
        height: Pixels.
        title: What it shows, for those who cannot see it.
        **attributes: More attributes.
    """
    return element(
        "svg", content, width="100%", height=height, role="img", aria_label=title, **attributes
    )


def stretched(content: Iterable[Markup]) -> Markup:
    """Paths in a square of 1000 × 1000, stretched over the whole drawing."""
    return element(
        "svg",
        content,
        width="100%",
        height="100%",
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
    )
