"""What all pictures share: one self-contained page, a notebook's view of it, and a PNG by matplotlib.

    page.html   <- style.css, page.js, the view's own script (web/), its data as JSON, its binary parts in base64

The page loads nothing: its Content-Security-Policy forbids the network, and allows the one script by its hash, so
that no text of a prompt can run. All texts reach the document as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import pathlib
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import InterpretError
from ...files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEB = pathlib.Path(__file__).parent.parent / "web"
SUFFIXES = (".html", ".png")
FRAME_HEIGHT = 760  # CSS pixels of a picture in a notebook


class Picture(ABC):
    """A picture of a model's inside: `save` it as .html or .png, or let a notebook show it."""

    view: ClassVar[str]  # web/{view}.js draws it
    title: ClassVar[str]
    figsize: ClassVar[tuple[float, float]] = (9.0, 6.0)  # inches, of the PNG

    @abstractmethod
    def data(self) -> Mapping[str, Any]:
        """What the page's script draws, as JSON."""

    @abstractmethod
    def draw(self, figure: Figure) -> None:
        """Draw it with matplotlib."""

    def parts(self) -> Mapping[str, bytes]:
        """Binary parts by name, which the page's script inflates when they are needed."""
        return {}

    def html(self) -> str:
        """One HTML document, which needs no other file and no network."""
        script = "\n".join(_web(name) for name in ("page.js", f"{self.view}.js")) + "\nstart();\n"
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        filled = {
            "title": html.escape(self.title),
            "script-hash": f"sha256-{digest}",
            "style": _web("style.css"),
            "script": script,
            "data": _json({"title": self.title, **self.data()}),
            "parts": "\n".join(
                f'<script type="text/plain" id="part-{name}">{base64.b64encode(part).decode()}</script>'
                for name, part in self.parts().items()
            ),
        }
        return re.sub(r"<!--([a-z-]+)-->", lambda found: filled[found[1]], _web("page.html"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .html or .png file, atomically. InterpretError for another suffix, WriteError."""
        target = check_suffix(path)
        figure = self.figure() if target.suffix == ".png" else None
        page = self.html() if figure is None else ""
        with atomic_write(target) as temporary:
            if figure is None:
                temporary.write_text(page, encoding="utf-8")
            else:
                figure.savefig(temporary, format="png", dpi=120)

    def figure(self) -> Figure:
        """The picture as a matplotlib figure. InterpretError if matplotlib is missing."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InterpretError("a PNG needs matplotlib", hint="pip install 'mistral-7b[plot]'") from error
        figure = Figure(figsize=self.figsize, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        return figure

    def _repr_html_(self) -> str:
        """A notebook's view: the page in a frame, so that neither's styles and scripts reach the other."""
        return (
            f'<iframe title="{html.escape(self.title)}" style="width:100%;height:{FRAME_HEIGHT}px;border:0" '
            f'srcdoc="{html.escape(self.html())}"></iframe>'
        )


def check_suffix(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a picture. InterpretError unless its suffix is one of SUFFIXES."""
    target = pathlib.Path(path).expanduser()
    if target.suffix not in SUFFIXES:
        raise InterpretError("a picture is an .html or a .png file", field="output", place=target)
    return target


def plotted(text: str, limit: int = 14) -> str:
    """A token's text as a label of matplotlib, of at most `limit` characters.

    Spaces are shown as dots, as on the page. Line breaks, "$", which begins mathematics, and
    characters that its own font lacks are escaped.
    """
    text = text.replace(" ", "·").replace("\n", "\\n").replace("\t", "\\t").replace("$", r"\$")
    text = "".join(c if c < "\u2e80" and c.isprintable() else f"U+{ord(c):04X}" for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def deflate(data: bytes) -> bytes:
    """Compress as the browser's DecompressionStream("deflate") reads."""
    return zlib.compress(data, 9)


def _web(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element in which it stands."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
