"""The shell of a self-contained HTML page: nothing is loaded from anywhere, and no script runs but the page's own.

The content security policy forbids both to the browser: a page without a script runs none, and one with a script
names its hash. It reads at phone width, in light and dark, and on paper.
"""

import base64
import hashlib
import html

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
{script}</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --soft: #f5f5f5; --line: #ccc; --link: #005a8f;
  --error: #fdecea; --muted: #555; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181b; --soft: #222529; --line: #4a4f55; --link: #8cc8ff; --error: #4a1f1b;
    --muted: #b5b5b5; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.35rem; margin-top: 2rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; margin: .5rem 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border: 0; border-bottom: 1px solid var(--line); }
thead th, thead td { border-bottom: 2px solid var(--muted); vertical-align: bottom; }
caption { text-align: left; font-weight: bold; white-space: nowrap; padding: .25rem .6rem .25rem 0; }
tbody th { white-space: nowrap; }
@media (max-width: 40rem) { tbody th { white-space: normal; min-width: 7rem; } }
th[scope=colgroup] { text-align: center; }
table.texts th, table.texts td { text-align: left; vertical-align: top; }
table.texts td { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; color: var(--muted); font-size: .875rem; }
pre, code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; font-size: .8rem; background: var(--soft); padding: .5rem .75rem; margin: .5rem 0; }
.muted { color: var(--muted); }
@media (max-width: 40rem) { main { padding: .5rem .75rem 3rem; } }
@media print {
  @page { margin: 14mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav, details:not([open]) { display: none; }
  h1, h2, h3 { break-after: avoid; }
  tr, img, figure { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: .1rem .25rem; }
}
"""


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: any text; it is escaped.
        body: trusted HTML.
        style: trusted CSS behind `STYLE`.
        script: the one script that the page may run; none by default.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        policy += f"; script-src 'sha256-{digest}'"
    return _PAGE.format(
        policy=policy,
        title=html.escape(title),
        style=STYLE + style,
        body=body,
        script=f"<script>{script}</script>\n" if script else "",
    )
