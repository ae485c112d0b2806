"""report.html: one page that needs no network. Every number on it is taken from the contents of report.json."""

from __future__ import annotations

import base64
import html as escaping
import json
from collections.abc import Callable, Iterator

from fcmae.comparison import figures

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2126; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { max-width: 48rem; } .lead { font-size: 1.05rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid #e3e6ea; vertical-align: top;
         font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; font-weight: 400; } thead th { font-weight: 600; }
.note, figcaption, small { color: #5b636d; font-size: .87rem; } figure { margin: .6rem 0; }
svg, img { width: 100%; height: auto; display: block; } .pair { display: flex; flex-wrap: wrap; gap: 1rem; }
.pair figure { flex: 1 1 22rem; } pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def summary(report: dict) -> list[str]:
    """What came out, in a few sentences."""
    arms = report["arms"]
    best = min(arms, key=lambda n: arms[n]["final_loss"])
    fast = max(arms, key=lambda n: arms[n]["images_per_second"])
    lines = [
        f"{best} ends at the lowest loss, {arms[best]['final_loss']:.4f}"
        + _others(arms, best, lambda arm: f"{arm['final_loss']:.4f}")
        + ".",
        f"{fast} trains fastest, {rate(arms[fast])} img/s"
        + _others(
            arms,
            fast,
            lambda arm: f"{rate(arm)}, {arm['images_per_second'] / arms[fast]['images_per_second']:.2f} of that",
        )
        + ".",
        f"To a loss of {report['time_to_loss']['loss']:.4f} it takes "
        + ", ".join(f"{name} {to_loss(arm)}" for name, arm in arms.items())
        + ".",
    ]
    if report["labelled"]:
        each = [
            f"{name} {top1(arm, 'trained', 'knn')} (at random initialisation {top1(arm, 'random', 'knn')})"
            for name, arm in arms.items()
        ]
        lines.append(f"kNN accuracy: {', '.join(each)}.")
    return lines


def table(report: dict) -> Iterator[tuple[str, list[str]]]:
    """The rows of the page's table: what it is, and the figure of each arm."""
    arms = list(report["arms"].values())

    def row(text: str, show: Callable[[dict], str]) -> tuple[str, list[str]]:
        return text, [show(arm) for arm in arms]

    yield row("model", lambda a: a["model"])
    yield row("parameters, million: encoder / whole", lambda a: pair(a["parameters"], 1e6))
    yield row("GFLOPs an image: encoder on visible regions / whole forward", lambda a: pair(a["flops"], 1e9))
    yield row("GFLOPs an image: encoder on all regions", lambda a: f"{a['flops']['encoder_dense'] / 1e9:#.3g}")
    yield row("steps", lambda a: f"{a['steps']:,}")
    yield row("images seen", lambda a: f"{a['images']:,}")
    yield row("seconds of training", lambda a: f"{a['seconds']:.1f}")
    yield row("img/s, median step", rate)
    yield row("of the time spent waiting for images", lambda a: f"{a['data_wait_share']:.1%}")
    yield row("peak memory, MiB (images a pass)", memory)
    yield row("final loss", lambda a: f"{a['final_loss']:.4f}")
    yield row(f"time to loss {report['time_to_loss']['loss']:.4f}", to_loss)
    if report["reconstructions"]:
        yield row("loss on the images below", lambda a: f"{a['reconstruction_loss']:.4f}")
    if report["labelled"]:
        for kind, text in (("knn", "kNN"), ("probe", "linear probe")):
            yield row(f"{text} accuracy, trained", lambda a, kind=kind: top1(a, "trained", kind, error=True))
            yield row(
                f"{text} accuracy, random initialisation", lambda a, kind=kind: top1(a, "random", kind, error=True)
            )
            yield row(f"{text} balanced accuracy, trained", lambda a, kind=kind: balanced(a, "trained", kind))
            yield row(
                f"{text} balanced accuracy, random initialisation", lambda a, kind=kind: balanced(a, "random", kind)
            )
    for state, text in (("trained", "trained"), ("random", "random initialisation")):
        yield row(f"cosine distance of channels, mean of blocks, {text}", lambda a, s=state: distance(a, s))


def html(report: dict, sheet: bytes | None) -> str:
    """The page. report: the contents of report.json. sheet: the PNG of the reconstructions, if there is one."""
    arms = report["arms"]
    rows = "".join(
        f"<tr><td>{_text(text)}</td>{''.join(f'<td>{_text(v)}</td>' for v in values)}</tr>"
        for text, values in table(report)
    )
    parts = [
        f"<h1>{_text(' against '.join(arms))}</h1>",
        f'<p class="lead">{_text(" ".join(summary(report)))}</p>',
        f"<p>{_text(setup(report))}</p>",
        f'<div class="wide"><table><thead><tr><th></th>{"".join(f"<th>{_text(n)}</th>" for n in arms)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        f'<p class="note">{_text(notes(report))}</p>',
        "<h2>Loss</h2>",
        _figure(figures.loss_curves(arms), "Faint: each step. Solid: the mean of the last 2 % of the steps."),
    ]
    if sheet is not None:
        image = f'<img alt="reconstructions" src="data:image/png;base64,{base64.b64encode(sheet).decode()}">'
        caption = "The same images under the same masks, as they were in the first epoch: " + ", ".join(
            report["reconstructions"]
        )
        parts += ["<h2>Reconstructions</h2>", _figure(image, caption)]
    parts += ["<h2>What was learned</h2>", '<div class="pair">']
    if report["labelled"]:
        parts.append(_figure(figures.accuracies(arms), labelled_text(report)))
    images = next(iter(arms.values()))["representation"]["trained"]["cosine_distance"]["images"]
    caption = f"Cosine distance of the channels' features after each block, mean of {images} whole images."
    parts += [_figure(figures.distances(arms), caption), "</div>"]
    layers = {name: arm["representation"] for name, arm in arms.items()}
    parts += ["<details><summary>Cosine distance, each block</summary>", *(_layers(n, r) for n, r in layers.items())]
    machine = "\n".join(f"{key}: {value}" for key, value in report["machine"].items())
    parts += [
        "</details>",
        f"<h2>Machine</h2><pre>{_text(machine)}</pre>",
        f"<details><summary>Settings</summary><pre>{_text(json.dumps(report['settings'], indent=1))}</pre></details>",
    ]
    # The policy lets a browser fetch nothing, whatever the page says.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(' against '.join(arms))}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def setup(report: dict) -> str:
    """What the arms had in common."""
    d, budget = report["data"], report["budget"]
    long = f"{budget['seconds']:g} s, in steps" if budget["steps"] is None else f"{budget['steps']:,} steps"
    turns = "their steps taking turns" if report["arms_in_turn"] else "one after another"
    batch = next(iter(report["arms"].values()))["images_per_step"]
    h, w = d["image_size"]
    return (
        f"Each arm trained for {long} of {batch} images, step for step on the same crops and masks of "
        f"{d['images']:,} images ({d['source']}) "
        f" at {h}x{w} pixels, {d['visible']} of {d['regions']} regions of {d['region_pixels']} pixels "
        f"visible; {turns}."
    )


def notes(report: dict) -> str:
    """How the figures were taken."""
    arms = report["arms"]
    target = "as asked for" if report["time_to_loss"]["given"] else "the worst final loss of an arm"
    final = ", ".join(f"{arm['averaged_over']} logged steps of {name}" for name, arm in arms.items())
    memory = next(iter(arms.values()))["peak_memory"]["what"]
    return (
        "Parameters are those of pretraining, the encoder's being what is kept. FLOPs count two for each multiply-add "
        "of matrix products, convolutions and attention in a forward pass of one image; a 7x7 convolution on visible "
        "regions counts all taps at each visible position. Seconds are those of training steps, waiting for images "
        "and, in the first step after a start, compiling included, checkpoints and pictures not"
        + ("; while one arm computes, the other's images are read. " if report["arms_in_turn"] else ". ")
        + f"Memory: {memory}. Final loss: the mean of the last {final}. The loss "
        f"to time is {target}; it counts as reached when such a mean is."
    )


def labelled_text(report: dict) -> str:
    """What the accuracies were taken on, and how."""
    found, e = report["labelled"], report["settings"]["evaluate"]
    return (
        f"Top-1 on {found['val']:,} images of {found['classes']} classes after {found['train']:,} to train on "
        f"({found['source']}: {found['split']}; {found['unreadable']} unreadable), the largest class being "
        f"{found['largest_class_share']:.1%}; lines: standard error. Features: the mean over positions of the "
        f"encoder's output for the whole image. kNN: cosine, k={e['neighbours']}, temperature {e['temperature']:g}. "
        f"Probe: logistic regression on standardized features, decay {e['decay']:g}."
    )


def rate(arm: dict) -> str:
    """Images per second."""
    value = arm["images_per_second"]
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def pair(counts: dict, unit: float) -> str:
    """Encoder and whole."""
    return f"{counts['encoder'] / unit:#.3g} / {counts['whole'] / unit:#.3g}"


def memory(arm: dict) -> str:
    """The peak, and at how many images."""
    peak = arm["peak_memory"]
    return "not measured" if peak["bytes"] is None else f"{peak['bytes'] / 2**20:,.0f} ({peak['batch_size']})"


def to_loss(arm: dict) -> str:
    """When the loss in question was reached."""
    found = arm["to_loss"]
    return "not reached" if found is None else f"{found['seconds']:.1f} s ({found['step']:,} steps)"


def top1(arm: dict, state: str, kind: str, error: bool = False) -> str:
    """An accuracy, with its standard error if wanted."""
    found = arm["representation"][state][kind]
    return f"{100 * found['top1']:.1f} %" + (f" ± {100 * found['standard_error']:.1f}" if error else "")


def balanced(arm: dict, state: str, kind: str) -> str:
    """The mean of the classes' accuracies."""
    return f"{100 * arm['representation'][state][kind]['balanced']:.1f} %"


def distance(arm: dict, state: str) -> str:
    """The mean cosine distance over blocks."""
    return f"{arm['representation'][state]['cosine_distance']['mean']:.3f}"


def _layers(name: str, found: dict) -> str:
    both = zip(*(found[state]["cosine_distance"]["layers"] for state in ("trained", "random")), strict=True)
    rows = "".join(
        f"<tr><td>{_text(a['layer'])}</td><td>{a['distance']:.4f}</td><td>{b['distance']:.4f}</td></tr>"
        for a, b in both
    )
    head = f"<tr><th>{_text(name)}</th><th>trained</th><th>random initialisation</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _others(arms: dict, but: str, show: Callable[[dict], str]) -> str:
    return " (" + "; ".join(f"{name}: {show(arm)}" for name, arm in arms.items() if name != but) + ")"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{_text(caption)}</figcaption></figure>"


def _text(value: str) -> str:
    return escaping.escape(str(value))
