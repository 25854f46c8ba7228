"""A small SVG writer over the standard library's XML tree, which escapes everything that comes from data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from xml.etree import ElementTree

_FONT = "ui-monospace, 'DejaVu Sans Mono', 'Noto Sans Mono', 'Noto Sans CJK SC', monospace"

INK = "#1f2328"
PAPER = "#ffffff"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(slots=True)
class Drawing:
    """An SVG picture of fixed size on white, which a browser scales down to the page's width."""

    width: float
    height: float
    _root: ElementTree.Element = field(init=False)

    def __post_init__(self) -> None:
        size = {"width": _number(self.width), "height": _number(self.height)}
        view = f"0 0 {size['width']} {size['height']}"
        style = "max-width:100%;height:auto"
        self._root = ElementTree.Element(
            "svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": view, "style": style, "role": "img"} | size
        )
        self._root.set("font-family", _FONT)
        self.rectangle(Box(0, 0, self.width, self.height), fill=PAPER)

    def describe(self, title: str) -> None:
        """What the picture shows, for readers that cannot see it."""
        self._root.set("aria-label", title)

    def rectangle(
        self, box: Box, *, fill: str = "none", opacity: float = 1.0, stroke: str | None = None, tooltip: str = ""
    ) -> None:
        """A rectangle; ``tooltip`` shows when the pointer rests on it."""
        shape = self._shape("rect", {"x": box.x, "y": box.y, "width": box.width, "height": box.height}, tooltip)
        shape.set("fill", fill)
        if opacity != 1:
            shape.set("fill-opacity", _number(opacity))
        if stroke is not None:
            shape.set("stroke", stroke)
            shape.set("stroke-width", "1.5")

    def circle(self, x: float, y: float, *, fill: str, radius: float = 2.5, tooltip: str = "") -> None:
        """A translucent point."""
        shape = self._shape("circle", {"cx": x, "cy": y, "r": radius}, tooltip)
        shape.set("fill", fill)
        shape.set("fill-opacity", "0.45")

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 11,
        anchor: Literal["start", "middle", "end"] = "start",
        angle: float = 0,
        fill: str = INK,
    ) -> None:
        """A line of text that starts, is centred or ends at (x, y), turned by ``angle`` degrees."""
        place = {"x": _number(x), "y": _number(y), "font-size": _number(size), "text-anchor": anchor, "fill": fill}
        if angle:
            place["transform"] = f"rotate({_number(angle)} {_number(x)} {_number(y)})"
        # Right-to-left tokens must not move their neighbours or the anchor.
        place["style"] = "unicode-bidi:plaintext;white-space:pre"
        ElementTree.SubElement(self._root, "text", place).text = words

    def to_svg(self) -> str:
        """The picture as one element, fit for a file of its own or for an HTML page."""
        return ElementTree.tostring(self._root, encoding="unicode")

    def _shape(self, tag: str, numbers: dict[str, float], tooltip: str) -> ElementTree.Element:
        shape = ElementTree.SubElement(self._root, tag, {name: _number(value) for name, value in numbers.items()})
        if tooltip:
            ElementTree.SubElement(shape, "title").text = tooltip
        return shape


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
