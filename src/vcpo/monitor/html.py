"""The shell of a page: one HTML file that needs nothing else, reads well on a phone, light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def page(title: str, eyebrow: str, sections: Iterable[str], css: str = "") -> str:
    """A whole page. ``eyebrow`` is the line over the title; ``sections`` are HTML, empty ones left out;
    ``css`` is added to the common one."""
    title = escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title} · vcpo</title>\n<style>{_CSS}{css}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p class=eyebrow>{escape(eyebrow)}</p><h1>{title}</h1></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def chart(
    title: str, subtitle: str, keys: Iterable[tuple[str, str]], drawing: str, wide: bool = False
) -> str:
    """A card with a drawing; ``keys`` are colour class and label of each entry of the legend."""
    legend = "".join(f"<span class='key {colour}'>{escape(label)}</span>" for colour, label in keys)
    return (
        f"<figure class='card{' wide' if wide else ''}'><figcaption><h3>{escape(title)}</h3>"
        f"<p>{escape(subtitle)}</p><p class=legend>{legend}</p></figcaption>{drawing}</figure>"
    )


_CSS = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1b2330;--muted:#5d6878;--grid:#dfe3e9;--accent:#2f5fd0;--second:#e08a1e;
--third:#c3cad5;--fourth:#7c8798;--bad:#c92a2a;--shadow:0 1px 2px #1b233014,0 2px 8px #1b23300a}
@media(prefers-color-scheme:dark){:root{--page:#10141b;--card:#191f29;--ink:#e8ecf2;--muted:#9aa6b6;--grid:#2d3643;
--accent:#7ea6ff;--second:#f2b04f;--third:#465162;--fourth:#8995a6;--bad:#ff8787;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:28px 16px 56px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 20px;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:1.12rem;margin:32px 0 12px}
h3{font-size:.95rem;margin:0}
p{margin:0}
.eyebrow{color:var(--muted);font-size:.85rem;margin-bottom:2px}
.banner{background:var(--card);border-left:4px solid var(--second);border-radius:8px;padding:12px 14px;
margin-bottom:16px}
.card,.tiles,.findings li,details,.calm{background:var(--card);border-radius:12px;box-shadow:var(--shadow)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px}
.card{margin:0;padding:16px;min-width:0}
.big{font-size:2.1rem;font-weight:650;letter-spacing:-.02em;margin:2px 0 10px}
.big i{font-style:normal;font-weight:400;color:var(--muted)}
.track{display:grid;grid-template-columns:3.4em 1fr 6.6em;gap:10px;align-items:center;font-size:.82rem;
color:var(--muted)}
.track span:last-child{text-align:right;font-variant-numeric:tabular-nums}
.rail{position:relative;height:16px}
.rail::before{content:"";position:absolute;inset:7px 0;background:var(--grid);border-radius:2px}
.range{position:absolute;top:5px;height:6px;border-radius:3px;background:var(--accent);opacity:.45}
.dot{position:absolute;top:3px;width:10px;height:10px;margin-left:-5px;border-radius:50%;background:var(--accent)}
.before .range,.before .dot{background:var(--fourth)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));margin-top:16px;padding:6px 4px}
.tile{padding:10px 12px}
.tile b{display:block;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:.82rem}
.findings{list-style:none;margin:0;padding:0;display:grid;gap:10px}
.findings li{padding:12px 14px;border-left:4px solid var(--fourth)}
.findings b{font-size:.78rem;text-transform:uppercase;letter-spacing:.05em;color:var(--muted)}
.findings .critical{border-color:var(--bad)}.findings .critical b{color:var(--bad)}
.findings .warning{border-color:var(--second)}
.advice{color:var(--muted);font-size:.92rem}
.calm{padding:12px 14px;color:var(--muted)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:16px}
@media(min-width:760px){figcaption{min-height:4.4rem}.wide{grid-column:span 2}}
figcaption p{color:var(--muted);font-size:.85rem}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px}
.key::before{content:"";display:inline-block;width:12px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle;
background:var(--c)}
.accent{--c:var(--accent)}.second{--c:var(--second)}.third{--c:var(--third)}.fourth{--c:var(--fourth)}
.rest{--c:var(--grid)}
.bar{display:flex;gap:10px;align-items:center;margin-top:14px}
.bar span{width:4.6em;color:var(--muted);font-size:.85rem}
.bar div{display:flex;flex:1;height:30px;border-radius:6px;overflow:hidden}
.bar i{background:var(--c)}
svg{display:block;width:100%;height:auto;margin-top:4px}
svg text{font-family:inherit!important}
details{margin-top:16px;padding:4px 16px}
summary{cursor:pointer;padding:10px 0;font-weight:600}
details h3{margin:14px 0 4px;text-transform:capitalize}
pre,.scroll{overflow-x:auto}
pre{font-size:.82rem;margin:0 0 12px}
table{border-collapse:collapse;font-size:.86rem;margin-bottom:12px}
th{width:45%;text-align:left;font-weight:500;color:var(--muted);padding:3px 16px 3px 0}
th,td{vertical-align:top}
.columns th,.columns td{width:auto;padding-right:20px}
td{padding:3px 0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
dl{margin:0 0 12px;font-size:.9rem}
dt{margin-top:8px}dt i{color:var(--muted);font-style:normal;font-size:.82rem}
dd{margin:0}dd span{color:var(--muted)}
code{font-size:.86rem}
"""
