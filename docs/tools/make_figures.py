#!/usr/bin/env python3
"""make_figures.py [--check] [ALIGN]: docs/figures, from the numbers of `align explain`.

    make figures          or: python3 docs/tools/make_figures.py
    python3 docs/tools/make_figures.py --check      are they what the program's numbers give?

Each figure is a function below; its numbers come from `align explain TOPIC --json`, so that a
figure cannot say anything else than the program does. The SVG files are 700 units wide, have their
colours for light and dark, a title and a description for screen readers, and text as text.
"""

import html
import json
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
FOLDER = os.path.join(ROOT, "docs", "figures")
WIDTH = 700
STYLE = """\
.figure { --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #8c959f; --fill: #eef2f6;
  --good: #0a5ea8; --good-fill: #d6e8f8; --bad: #a83a12; --bad-fill: #f9dfd3;
  font: 15px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
@media screen and (prefers-color-scheme: dark) { .figure { --paper: #14181d; --ink: #e6eaef;
  --soft: #a5afba; --line: #77818c; --fill: #252c34; --good: #82bdf2; --good-fill: #17395a;
  --bad: #f5a27c; --bad-fill: #55291a; } }
.figure text { fill: var(--ink); }
.figure .soft { fill: var(--soft); }
.figure .good { fill: var(--good); }
.figure .bad { fill: var(--bad); }
.figure .bold { font-weight: 600; }
.figure .code { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.figure .paper { fill: var(--paper); }
.figure .box { fill: var(--fill); stroke: var(--line); }
.figure .box.good { fill: var(--good-fill); stroke: var(--good); }
.figure .box.bad { fill: var(--bad-fill); stroke: var(--bad); }
.figure .none { fill: none; stroke: var(--line); stroke-dasharray: 4 3; }
.figure .way { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.figure .way.good { stroke: var(--good); stroke-width: 2.5; }
.figure .way.bad { stroke: var(--bad); stroke-width: 2.5; }
.figure .thin { fill: none; stroke: var(--line); }
.figure .ring { stroke: var(--ink); stroke-width: 2; fill: var(--ink); }
.figure .ring.paper { fill: var(--paper); }
.figure .dash { stroke-dasharray: 4 4; }
"""


def explain(topic):
    command = [explain.align, "explain", topic, "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


# ---- Shapes


def at(x):
    """A coordinate: one decimal, rounded so that a float's last bits do not decide."""
    return ("%.1f" % (x + 1e-4)).replace(".0", "").replace("-0", "0" if abs(x) < 0.05 else "-0")


def number(x, digits=3):
    """A number to read: without needless zeros, with a real minus sign."""
    x = round(x * (1 + 1e-6), digits)
    return (("%.*f" % (digits, x)).rstrip("0").rstrip(".") if x else "0").replace("-", "\u2212")


def text(x, y, words, kind="", anchor="middle"):
    """kind: words of STYLE."""
    kind = ' class="%s"' % kind if kind else ""
    place = "" if anchor == "start" else ' text-anchor="%s"' % anchor
    return '<text x="%s" y="%s"%s%s>%s</text>' % (at(x), at(y), kind, place, html.escape(words))


def left(x, y, words, kind=""):
    return text(x, y, words, kind, "start")


def box(x, y, width, height, kind="box", corner=4):
    size = (at(x), at(y), at(width), at(height), corner, kind)
    return '<rect x="%s" y="%s" width="%s" height="%s" rx="%d" class="%s"/>' % size


def line(*points, kind="way", arrow=False):
    head = ' marker-end="url(#%s-arrow)"' % line.figure if arrow else ""
    way = " ".join("%s,%s" % (at(x), at(y)) for x, y in points)
    return '<polyline points="%s" class="%s"%s/>' % (way, kind, head)


def arrow(*points, kind="way"):
    return line(*points, kind=kind, arrow=True)


def box_of(x, y, width, height, lines, kind="box"):
    """A box with centred lines, the first of them bold; what is between ` is code."""
    parts, top = [box(x, y, width, height, kind)], y + height / 2 + 5 - 10 * (len(lines) - 1)
    for i, words in enumerate(lines):
        style = "code" if words.startswith("`") else "bold" if i == 0 else "soft"
        parts.append(text(x + width / 2, top + 20 * i, words.strip("`"), style))
    return parts


def dot(x, y, radius, kind=""):
    place = (at(x), at(y), radius, kind)
    return '<circle cx="%s" cy="%s" r="%d" class="ring %s"/>' % place


def bar(x, base, width, height, kind):
    """Height upwards from the base; downwards if it is below 0."""
    return box(x, base - max(height, 0), width, max(abs(height), 0.5), "box " + kind, 0)


def figure(name, height, title, description, parts):
    """The text of an SVG file."""
    ids = (name, name)
    head = [
        '<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 %d %d" role="img"'
        % (WIDTH, height)
        + ' aria-labelledby="%s-title %s-text">' % ids,
        '<title id="%s-title">%s</title>' % (name, html.escape(title)),
        '<desc id="%s-text">%s</desc>' % (name, html.escape(description)),
        "<style>\n%s</style>" % STYLE,
        '<defs><marker id="%s-arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7"' % name
        + ' markerHeight="7" orient="auto"><path d="M0,0 L10,5 L0,10 z" class="soft"/></marker>'
        "</defs>",
        box(0, 0, WIDTH, height, "paper", 8),
    ]
    return "\n".join(head + spread(parts) + ["</svg>", ""])


def spread(parts):
    """Lists in the list become part of it."""
    return [p for part in parts for p in (part if isinstance(part, list) else [part])]


# ---- The figures


def pipeline():
    parts = [
        box_of(20, 30, 150, 90, ["Language model", "learns from texts", "`align sft`"]),
        box_of(20, 210, 150, 90, ["Preferences", "chosen, rejected", "`align collect`"]),
        box_of(275, 210, 150, 90, ["Reward model", "chosen > rejected", "`align reward`"]),
        box_of(530, 30, 150, 90, ["PPO", "answers, is scored", "`align ppo`"], "box good"),
        box_of(530, 210, 150, 90, ["DPO", "no reward model", "`align dpo`"], "box good"),
        arrow((170, 62), (530, 62)),
        text(350, 54, "start model and reference", "soft"),
        arrow((95, 120), (95, 210)),
        left(105, 170, "writes answers", "soft"),
        arrow((170, 255), (275, 255)),
        arrow((380, 210), (380, 96), (530, 96)),
        text(425, 115, "score", "soft"),
        arrow((95, 300), (95, 330), (605, 330), (605, 300)),
        text(350, 350, "the same pairs", "soft"),
        dot(470, 62, 3),
        arrow((470, 62), (470, 255), (530, 255)),
    ]
    what = "The language model starts PPO and DPO and is their reference. Pairs of answers, chosen"
    what += " and rejected, train a reward model, whose score PPO needs; DPO learns from the pairs."
    return 370, "From a language model to an aligned one", what, parts


def batch():
    rows = ["The film is a lot of fun", "The film is dull", "A film"]
    tokens = [row.replace(" ", " \u0000").split("\u0000") for row in rows]
    tokens = [[t.strip() for t in row] for row in tokens]
    kinds, longest, n = ("good", "", "bad"), max(map(len, tokens)), sum(map(len, tokens))
    parts, cell = [], 56
    parts.append(left(20, 30, "Padded: %d sequences of %d" % (len(rows), longest), "bold"))
    for b, row in enumerate(tokens):
        for t in range(longest):
            place = (20 + cell * t, 45 + 34 * b, cell, 30)
            kind = "box " + kinds[b] if t < len(row) else "none"
            parts.append(box(*place, kind, 0))
            label = (row[t], "") if t < len(row) else ("pad", "soft")
            parts.append(text(place[0] + cell / 2, place[1] + 20, *label))
    wasted = len(rows) * longest - n
    parts.append(left(430, 84, "%d places, %d of them" % (n + wasted, wasted)))
    parts.append(left(430, 104, "computed and masked"))
    parts.append(left(20, 190, "Packed: the same %d tokens, one after another" % n, "bold"))
    cell, i = (WIDTH - 40) / n, 0
    for b, row in enumerate(tokens):
        for t, token in enumerate(row):
            x = 20 + cell * i
            parts += [box(x, 205, cell, 30, "box " + kinds[b], 0), text(x + cell / 2, 225, token)]
            i += 1
        first = 20 + cell * (i - len(row))
        middle, end = first + cell * len(row) / 2, 20 + cell * i
        parts.append(line((first + 3, 243), (first + 3, 250), (end - 3, 250), (end - 3, 243)))
        parts.append(text(middle, 270, "%d to %d" % (i - len(row), i - 1), "soft"))
    note = "Attention looks back no further than the first token of its own sequence."
    parts.append(left(20, 300, note))
    what = "%d sequences of different lengths fill a rectangle of %d places when padded, %d of them"
    what = what % (len(rows), n + wasted, wasted)
    what += " without a use; packed, they are %d tokens in a row." % n
    return 320, "A batch padded and packed", what, parts


LABELS = ("a", "lot", "of", "fun")


def labels(answer):
    return [t.strip() for t in answer.get("tokens", LABELS)]


def column(t):
    return 270 + 115 * t


def table_row(y, name, values, kind=""):
    """A name, and a number for each token."""
    cells = [text(column(t), y, number(x), kind) for t, x in enumerate(values)]
    return [left(20, y, name, kind)] + cells


def reward():
    e = explain("ppo")
    a, beta = e["answers"][0], e["kl_coef"]
    penalty = [-beta * kl for kl in a["kl"]]
    parts, base, scale = [], 180, 120
    parts.append(left(20, 30, "Prompt \u201c%s\u201d, answer:" % e.get("prompt", "The film is")))
    for t, token in enumerate(labels(a)):
        parts.append(text(column(t), 30, token, "bold"))
    parts.append(left(20, 100, "score %s," % number(a["score"]), "good"))
    parts.append(left(20, 120, "on the last token", "good"))
    parts.append(left(20, 165, "KL penalty", "bad"))
    parts.append(left(20, 185, "of each token", "bad"))
    last = len(penalty) - 1
    for t, x in enumerate(penalty):
        score = a["score"] * scale if t == last else 0
        if score:
            parts.append(bar(column(t) - 30, base, 28, score, "good"))
        parts.append(bar(column(t) + (2 if score else -14), base, 28, x * scale, "bad"))
    parts.append(line((180, base), (680, base), kind="thin"))
    parts.append(table_row(230, "log p, policy", a["logprobs"]))
    parts.append(table_row(256, "log p, reference", a["ref_logprobs"]))
    parts.append(table_row(282, "KL (k1): difference", a["kl"]))
    parts.append(table_row(308, "penalty: \u2212%s \u00b7 KL" % number(beta), penalty, "bad"))
    parts.append(line((20, 322), (680, 322), kind="thin"))
    parts.append(table_row(346, "reward", a["rewards"], "bold"))
    numbers = ", ".join(number(x) for x in a["rewards"])
    what = "Each token pays its KL penalty, which may be negative; the last one gets the score too:"
    return 366, "Score and KL penalty, token by token", what + " rewards %s." % numbers, parts


def gae():
    e = explain("gae")
    a, factor = e["answers"][0], e["gamma"] * e["lam"]
    parts = [left(20, 30, "Answer:")]
    for t, token in enumerate(labels(a)):
        parts.append(text(column(t), 30, token, "bold"))
    parts.append(table_row(62, "reward", a["rewards"]))
    parts.append(table_row(88, "value", a["values"]))
    parts.append(left(20, 128, "delta", "bad"))
    parts.append(left(20, 148, "reward + \u03b3 next value", "soft"))
    parts.append(left(20, 168, "\u2212 value", "soft"))
    parts.append(left(20, 234, "advantage", "good"))
    parts.append(left(20, 254, "delta + \u03b3\u03bb \u00b7 next", "soft"))
    for t, (delta, A) in enumerate(zip(a["deltas"], a["raw_advantages"])):
        x = column(t)
        parts += [box(x - 36, 112, 72, 32, "box bad"), text(x, 133, number(delta))]
        parts += [box(x - 36, 216, 72, 32, "box good"), text(x, 237, number(A))]
        parts.append(arrow((x, 144), (x, 216)))
        if t:
            parts.append(arrow((x - 36, 232), (column(t - 1) + 36, 232)))
            parts.append(text(x - 57, 208, "\u00d7 %s" % number(factor), "soft"))
    parts.append(text(column(3) + 36, 274, "starts here: nothing follows", "soft", "end"))
    parts.append(arrow((column(2), 296), (column(0), 296), kind="way"))
    parts.append(text(column(1), 316, "runs backwards", "soft"))
    numbers = [", ".join(number(x) for x in a[name]) for name in ("deltas", "raw_advantages")]
    what = "From the last token to the first: advantage = delta + %s times the next advantage."
    what = what % number(factor) + " Deltas %s; advantages %s." % tuple(numbers)
    return 336, "GAE's recursion", what, parts


def ppo_clip():
    e = explain("ppo")
    clip, parts, low, high = e["cliprange"], [], 0.5, 1.5
    tokens = [token for a in e["answers"] for token in ppo_tokens(a)]
    for left, sign in ((20, 1), (370, -1)):
        kind = "good" if sign > 0 else "bad"

        def place(ratio, loss):
            return left + 310 * (ratio - low), 165 - 185 * (loss + sign)

        bounds = (low, 1 - clip, 1 + clip, high)
        losses = [max(-sign * r, -sign * min(max(r, 1 - clip), 1 + clip)) for r in bounds]
        name = "A > 0: a good token" if sign > 0 else "A < 0: a bad token"
        parts.append(text(left + 155, 30, name, "bold " + kind))
        for r in (1 - clip, 1, 1 + clip):
            parts.append(line((place(r, 0)[0], 60), (place(r, 0)[0], 270), kind="thin dash"))
            parts.append(text(place(r, 0)[0], 290, number(r)))
        parts.append(line((left, 270), (left + 310, 270), kind="thin"))
        parts.append(line(place(low, -sign * low), place(high, -sign * high), kind="thin dash"))
        parts.append(line(*map(place, bounds, losses), kind="way " + kind))
        for ratio, A, loss, is_clipped in tokens:
            if A * sign > 0:
                x, y = place(ratio, loss / abs(A))
                parts.append(dot(x, y, 6, "paper" if is_clipped else ""))
        slope = "flat above %s: gradient 0" % number(1 + clip)
        if sign < 0:
            slope = "flat below %s: gradient 0" % number(1 - clip)
        parts.append(text(left + 155, 52, slope, "soft"))
        parts.append(text(left + 155, 312, "ratio = p new / p old", "soft"))
    note = "loss / |A|, downwards is better; dots: the example's tokens,"
    parts.append(text(350, 338, note, "soft"))
    parts.append(text(350, 358, "hollow where the clip stopped the gradient", "soft"))
    stopped = sum(is_clipped for _r, _A, _l, is_clipped in tokens)
    what = "PPO's loss of a token against the ratio: with A > 0 it falls up to %s, flat beyond;"
    what = what % number(1 + clip) + " with A < 0 it is flat below %s and rises" % number(1 - clip)
    what += " from there. Clipped tokens of the example: %d of %d." % (stopped, len(tokens))
    return 376, "PPO's clipped loss", what, parts


def ppo_tokens(a):
    return zip(a["ratios"], a["advantages"], a["token_losses"], a["clipped"])




def gradient():
    """Stations from the loss (top) to wte (bottom): function, what it hands on."""
    stations = (
        ("ppo_token_loss", "d loss / d log-probability: \u2212A \u00b7 ratio, 0 if clipped"),
        ("lm_head_backward", "d logit = slope \u00b7 ([is the token] \u2212 p)"),
        ("layernorm_backward", "ln_f: d hidden becomes d x"),
        ("block_backward", "each block, last to first:"),
        ("embedding_backward", "what arrives where a token was read"),
    )
    inside = (("module_backward", "gelu_backward"), ("layernorm_backward", "attention_backward"))
    with open(os.path.join(ROOT, "align.c"), encoding="utf-8") as file:
        source = file.read()
    for name in [name for name, _what in stations] + [name for pair in inside for name in pair]:
        if not re.search(r"^static [\w *]*\b%s\(" % name, source, re.M):
            sys.exit("align.c has no function %s: mend `gradient` in make_figures.py" % name)
    parts, tops = [], (20, 96, 172, 248, 362)
    for (name, what), top in zip(stations, tops):
        tall = 88 if name == "block_backward" else 48
        parts += [box(20, top, 420, tall), left(32, top + 20, name, "code bold")]
        parts.append(left(32, top + 40, what, "soft"))
        if top != tops[-1]:
            parts.append(arrow((230, top + tall), (230, tops[tops.index(top) + 1])))
    for i, pair in enumerate(inside):
        parts.append(left(32, 308 + 19 * i, " \u00b7 ".join(pair), "code"))
    lines = ["`wte`", "one matrix,", "two contributions,", "added"]
    parts += box_of(520, 200, 160, 120, lines, "box good")
    parts.append(arrow((440, 120), (600, 120), (600, 200), kind="way good"))
    parts.append(left(450, 108, "as output layer", "good"))
    parts.append(arrow((440, 386), (600, 386), (600, 320), kind="way good"))
    parts.append(left(450, 408, "as embedding", "good"))
    what = "The gradient passes " + ", ".join(name for name, _what in stations)
    what += "; lm_head_backward and embedding_backward both add to wte's gradient."
    return 430, "From PPO's loss to wte", what, parts


def closed_form():
    e = explain("exact")
    ref, best, beta = e["ref_probabilities"], e["optimum"], e["beta"]
    weights = [b * e["Z"] / p for p, b in zip(ref, best)]
    names = e.get("tokens") or (["answer 1", "answer 2", "all others"] if len(ref) == 3 else None)
    parts, base, scale, step = [], 250, 200, 520 / len(ref)
    parts.append(left(20, 30, "optimum = reference \u00b7 exp(reward / \u03b2) / Z", "bold"))
    note = "\u03b2 = %s, Z = %s" % (number(beta), number(e["Z"]))
    parts.append(text(680, 30, note, "", "end"))
    for i, (p, b, w, r) in enumerate(zip(ref, best, weights, e["rewards"])):
        x = 160 + step * (i + 0.5)
        parts += [bar(x - 62, base, 58, p * scale, ""), bar(x + 4, base, 58, b * scale, "good")]
        parts.append(text(x - 33, base - p * scale - 8, number(p)))
        parts.append(text(x + 33, base - b * scale - 8, number(b), "good bold"))
        parts.append(text(x, 272, names[i] if names else "answer %d" % (i + 1), "bold"))
        parts += [text(x, 300, number(r)), text(x, 326, "\u00d7 " + number(w))]
    parts.append(line((150, base), (690, base), kind="thin"))
    parts += [box(20, 195, 16, 16), left(44, 208, "reference")]
    parts += [box(20, 221, 16, 16, "box good"), left(44, 234, "optimum")]
    parts.append(left(20, 300, "reward"))
    parts.append(left(20, 326, "exp(reward / \u03b2)"))
    numbers = [", ".join(number(x) for x in each) for each in (ref, best)]
    what = "Each answer's probability is multiplied by exp(reward / beta) and divided by the sum"
    what += " Z: from %s to %s." % tuple(numbers)
    return 346, "The closed form: a reweighted distribution", what, parts


FIGURES = dict(
    pipeline=pipeline,
    batch=batch,
    reward=reward,
    gae=gae,
    ppo_clip=ppo_clip,
    gradient=gradient,
    closed_form=closed_form,
)


def main():
    arguments = [a for a in sys.argv[1:] if a != "--check"]
    explain.align = os.path.realpath(arguments[0] if arguments else os.path.join(ROOT, "align"))
    other = []
    for name, draw in FIGURES.items():
        line.figure, path = name, os.path.join(FOLDER, name + ".svg")
        drawn = figure(name, *draw())
        if "--check" in sys.argv:
            with open(path, encoding="utf-8") as file:
                other += [name] * (file.read() != drawn)
        else:
            with open(path, "w", encoding="utf-8") as file:
                file.write(drawn)
    if other:
        sys.exit("other than the numbers give: %s; run make figures" % ", ".join(other))
    print("%d figures" % len(FIGURES))


if __name__ == "__main__":
    main()
