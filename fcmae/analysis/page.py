"""The page of fcmae.visualize: one file that needs no network, with a slider for the mask ratio and a button for each
strategy. Every picture is in it; a script of a few lines shows one of them. Without scripts it shows them all."""

from __future__ import annotations

import base64
import hashlib
import html as escaping
import io
from pathlib import Path

from fcmae.analysis.gallery import GAP, Sheet, sheets_in, strip
from fcmae.analysis.images import Images
from fcmae.analysis.subjects import Subject
from fcmae.comparison.report import STYLE
from fcmae.errors import UsageError

MARK = '<meta name="generator" content="fcmae.visualize">'
MORE = """
body { max-width: 76rem; }
.controls { display: none; flex-wrap: wrap; gap: 1rem 2rem; align-items: center; margin: 1.2rem 0; position: sticky;
            top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #e3e6ea; }
.js .controls { display: flex; } .controls input { width: 16rem; vertical-align: middle; accent-color: #1f6fb4; }
output { font-variant-numeric: tabular-nums; font-weight: 600; display: inline-block; width: 3rem; }
button { font: inherit; padding: .3rem .9rem; border: 1px solid #c4cad1; background: #fff; border-radius: .3rem;
         cursor: pointer; } button[aria-pressed=true] { background: #1f6fb4; border-color: #1f6fb4; color: #fff; }
.heads { display: grid; font-weight: 600; font-size: .9rem; text-align: center; }
.heads span { overflow-wrap: anywhere; } figure img { width: auto; max-width: 100%; }
"""
SCRIPT = """
const sheets = [...document.querySelectorAll('figure')], slider = document.querySelector('input');
const buttons = [...document.querySelectorAll('button')], shown = document.querySelector('output');
const ratios = [...new Set(sheets.map(s => s.dataset.ratio))].sort((a, b) => a - b);
let strategy = sheets[0].dataset.strategy;
function show() {
  const ratio = ratios[slider.value];
  const here = sheets.filter(s => s.dataset.strategy === strategy);
  const best = here.find(s => s.dataset.ratio === ratio);
  sheets.forEach(s => s.hidden = s !== best);
  document.getElementById('none').hidden = best !== undefined;
  buttons.forEach(b => b.setAttribute('aria-pressed', b.value === strategy));
  shown.value = ratio; slider.setAttribute('aria-valuetext', ratio);
}
function read() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const at = ratios.findIndex(r => Number(r) === Number(asked.get('ratio')));
  if (at >= 0) slider.value = at;
  if (buttons.some(b => b.value === asked.get('strategy'))) strategy = asked.get('strategy');
  show();
}
function changed() {
  show();
  history.replaceState(null, '', '#ratio=' + ratios[slider.value] + '&strategy=' + strategy);
}
document.documentElement.className = 'js';
slider.max = ratios.length - 1; slider.value = Math.floor((ratios.length - 1) / 2);
slider.addEventListener('input', changed); addEventListener('hashchange', read);
buttons.forEach(b => b.addEventListener('click', () => { strategy = b.value; changed(); }));
read();
"""


def check_out(out: Path, name: str) -> None:
    """Raises UsageError where the folder has a page of this name that is another's, or is none."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    page = out / name
    if page.exists() and (not page.is_file() or MARK.encode() not in page.read_bytes()[:2000]):
        raise UsageError(f"{page} was not written by fcmae.visualize; choose another --out")
    sheets = sheets_in(out) if out.is_dir() and not page.exists() else []
    if sheets:
        raise UsageError(f"{out} holds pictures of something else ({sheets[0]}); choose another --out")


def html(subjects: list[Subject], images: Images, sheets: list[Sheet], left_out: list[str]) -> str:
    """The page."""
    title = f"Reconstructions: {' and '.join(subject.label for subject in subjects)}"
    strategies = list(dict.fromkeys(sheet.strategy for sheet in sheets))
    buttons = "".join(f'<button type="button" value="{s}" aria-pressed="false">{s}</button>' for s in strategies)
    rows = "".join(
        f"<tr><td>{_text(s.label)}</td><td>{_text(s.text)}</td><td>{s.image_size[0]} x {s.image_size[1]}</td>"
        f"<td>{s.autoencoder.mask_unit}</td></tr>"
        for s in subjects
    )
    head = "<tr><th>run</th><th>model</th><th>image, pixels</th><th>mask unit, pixels</th></tr>"
    names = "".join(f"<li>{_text(Path(name).name)}</li>" for name in images.used)
    notes = [*left_out, *(f"skipped, unreadable: {Path(line).name}" for line in images.skipped)]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # The policy lets a browser fetch nothing and run nothing but the script below, whatever the page says.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            MARK,
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{STYLE}{MORE}</style></head>\n<body>",
            f"<h1>{_text(title)}</h1>",
            '<div class="controls"><label>mask ratio <input type="range" min="0" max="0" step="1" value="0">',
            f'<output></output></label><div role="group" aria-label="mask strategy">{buttons}</div></div>',
            '<div aria-live="polite">',
            '<p id="none" hidden>This strategy leaves nothing visible, or hides nothing, at this ratio.</p>',
            *(_figure(sheet) for sheet in sheets),
            "</div>",
            f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>',
            *(f'<p class="note">{_text(line)}</p>' for line in notes),
            f"<details><summary>Images</summary><ol>{names}</ol></details>",
            f"<script>{SCRIPT}</script>\n</body></html>\n",
        ]
    )


def _figure(sheet: Sheet) -> str:
    picture, buffer = strip(sheet), io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    heads = "".join(f"<span>{_text(name)}</span>" for name in sheet.columns)
    grid = (
        f"grid-template-columns: repeat({len(sheet.columns)}, 1fr); column-gap: {GAP}px; max-width: {picture.width}px"
    )
    losses = ", ".join(f"{label} {loss:.4f}" for label, loss in sheet.losses.items())
    caption = f"{sheet.strategy} masks, ratio {sheet.ratio:g}; {sheet.label()}. Loss on these images: {losses}."
    return (
        f'<figure data-strategy="{sheet.strategy}" data-ratio="{sheet.ratio:g}"><div class="heads" style="{grid}">'
        f'{heads}</div><img alt="{_text(caption)}" width="{picture.width}" height="{picture.height}" '
        f'src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'
    )


def _text(value: str) -> str:
    return escaping.escape(str(value))
