"""A page of HTML that needs nothing but itself: no network, no script, pictures inside.

Text is escaped here and nowhere else: what these functions are given is text, what they return is
markup.
"""

import base64
import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #22252a; background: #fff; margin: 0 auto;
       max-width: 70rem; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d5d9de; }
h3 { font-size: 1.05rem; margin: 1.4rem 0 .4rem; }
p, li { max-width: 46rem; }
.verdict { font-size: 1.2rem; background: #eef4fa; border-left: 5px solid #0072b2;
           padding: .8rem 1rem; }
.banner { background: #b3261e; color: #fff; font-weight: 600; padding: .7rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .5rem 0 1rem; }
th, td { border: 1px solid #d5d9de; padding: .25rem .5rem; text-align: right; }
th { background: #f3f5f7; }
th:first-child, td:first-child { text-align: left; }
figure { margin: .8rem 0 1.2rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; color: #555b63; max-width: 46rem; }
pre { white-space: pre-wrap; font-size: .82rem; background: #f7f8f9; padding: .8rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  figure, table, .verdict { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details > * { display: block; }
}
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document.

    Args:
        title: text.
        body: markup of the parts, in order.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading of level 2 or 3."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is "", "verdict" or "banner"."""
    name = f' class="{kind}"' if kind else ""
    return f"<p{name}>{html.escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def picture(png: bytes, caption: str) -> str:
    """A picture inside the page, its caption also its alternative text.

    Raises:
        ValueError: what is given is no PNG.
    """
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"Expected the bytes of a PNG for {caption!r}, got {png[:8]!r}.")
    data = base64.b64encode(png).decode("ascii")
    text = html.escape(caption)
    alt = html.escape(caption, quote=True)
    return (
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def folded(summary: str, text: str) -> str:
    """Long text behind a line that opens it; open on paper."""
    return (
        f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre>"
        "</details>"
    )
