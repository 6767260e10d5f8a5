#!/usr/bin/env python3
"""check_report.py [--pictures DIR]: is what align shows right: progress on a terminal, and
report.html in a real browser? From the folder of align.c.

    make && python3 docs/tools/check_report.py

A minute or two; needs Debian's chromium; ends with 'N passed, N failed'.
Progress: under a terminal of 60 columns no line is longer, nothing but carriage return and "erase
to the end of the line" steers it, samples appear; without a terminal, with TERM=dumb and with
--quiet there is no control code; all of these end with the same weights, bit for bit.
Reports of rlhf and of each training command, at 360 and 1200 pixels, light and dark, and as
printed: no console error, no request but for the page itself, no overflow, every text with the
contrast of WCAG AA, every plot with a heading, a label for screen readers, axes with round numbers
evenly spaced, curves inside its frame, an explanation, and a term that docs/glossary.md has.
The data: the page's tags are those of docs/report.html, its JSON is what the files hold, no text
in the page could steer a screen or turn the direction of writing.
The microscope: with the run's own settings its columns are those of trace.jsonl, for each answer;
with others those of the formulas; keyboard alone reaches all of it. trace.jsonl: the fields that
unipo's docs/canonical_schema.json has, of equal lengths, in less than 2 MB for a run of rlhf.
Odd logs: none, one point, nulls, 100,000 points, hostile texts. The page's policy: nothing is
loaded or sent, no text becomes markup. Its functions, by hand. Without scripts all facts, logs and
samples are there as tables. Its glossary is that of docs/glossary.md.
Without docs/report.html a training ends well, with a note, and align report makes the page later.
--pictures DIR: keeps pictures of the pages there."""

import fcntl
import hashlib
import html.parser
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import unicodedata

from browser import Browser

passed = failed = 0
ALIGN = os.path.abspath("align")
PAGE = os.path.abspath("docs/report.html")
TINY = "--vocab_size 300 --n_layer 1 --n_head 2 --n_embd 16"
FEW = "--max_steps 4 --logging_steps 1"
RLHF = (
    "rlhf --model_name_or_path pretrain --dataset_name rated --pretrain_steps 9"
    " --reward_steps 6 --ppo_steps 3 --dpo_steps 2"
)
ROLL = (
    "--model_name_or_path pretrain --dataset_name prompts --reward_model_path reward"
    " --batch_size 4 " + FEW
)
PLOTS = {"course": 13, "pretrain": 1, "sft": 1, "reward": 2, "dpo": 2, "ppo": 6, "reinforce": 1}
POINTS = {"one": 1, "nulls": 19, "absurd": 3, "flat": 5}  # that can be shown, of odd logs
STAGES = ("language_model", "reward_model", "ppo", "dpo")
FILES = ["report.json", "trainer_state.json"] + [s + "/trainer_state.json" for s in STAGES]
FILES += ["trace.jsonl", "ppo/trace.jsonl"]
# The fields of poloclub/unipo's docs/canonical_schema.json, commit a9c9acf, that a viewer of PPO
# needs: of its first line, of an entry, of its metrics, of a response; of a token, a list each.
UNIPO = {
    "header": "algorithm totalSteps hparams",
    "hparams": "gamma gae_lambda clip_eps kl_coef learning_rate group_size",
    "entry": "step is_first_step_after_rollout_phase metrics prompts",
    "metrics": "policy_objective reward policy_loss value_loss entropy kl clip_fraction"
    " advantage_mean advantage_std",
    "response": "id reward advantage response_text response_length tokens",
    "tokens": "ids strings log_probs ref_log_probs old_log_probs values advantages returns token_kl"
    " rewards token_objective",
}
TRACE_BYTES = 2e6  # of make run: 85 steps, of which 13 are shown

# Of each figure: what a reader needs, as one string of complaints.
FIGURES = r"""[...document.querySelectorAll('figure')].map(f => {
  const svg = f.querySelector('svg'), box = svg.viewBox.baseVal, wrong = [];
  const label = svg.getAttribute('aria-label') || '', all = [...svg.querySelectorAll('text')];
  if (!f.querySelector('h3')?.textContent.trim()) wrong.push('no heading');
  if (svg.getAttribute('role') !== 'img' || label.length < 20) wrong.push('no label');
  const numbers = all.filter(t => /^[-+.e\d]+$/.test(t.textContent));
  const ticks = anchor => numbers.filter(anchor).map(t => Number(t.textContent));
  const y = ticks(t => t.getAttribute('x') < 50), x = ticks(t => t.getAttribute('x') >= 50);
  for (const [name, v] of [['x', x], ['y', y]]) {
    if (v.length < 2) { wrong.push(name + ' axis of ' + v.length + ' numbers'); continue; }
    const step = v[1] - v[0], power = 10 ** Math.floor(Math.log10(step) + 1e-9);
    const even = v.every((w, i) => Math.abs(w - v[0] - i * step) <= step / 100);
    if (![1, 2, 5].includes(Number((step / power).toPrecision(3))) || !even)
      wrong.push(name + ' axis: ' + v);
  }
  const lines = [...svg.querySelectorAll('path.curve:not(.key)')];
  if (!lines.length) wrong.push('no curve');
  for (const p of lines) {
    const b = p.getBBox();
    if (/nan|inf|undefined/i.test(p.getAttribute('d'))) wrong.push('NaN in a curve');
    if (b.x < 0 || b.y < 0 || b.x + b.width > box.width || b.y + b.height > box.height)
      wrong.push('a curve leaves the frame');
  }
  const texts = all.map(t => [t.textContent, t.getBBox()]);
  for (const [text, b] of texts)
    if (b.x < -1 || b.x + b.width > box.width + 1 || b.y + b.height > box.height + 1)
      wrong.push('text leaves the frame: ' + text);
  for (const [i, [a, p]] of texts.entries()) for (const [b, q] of texts.slice(i + 1))
    if (p.x + 1 < q.x + q.width && q.x + 1 < p.x + p.width
        && p.y + 3 < q.y + q.height && q.y + 3 < p.y + p.height)
      wrong.push('texts overlap: ' + a + ', ' + b);
  const caption = f.querySelector('figcaption')?.innerText || '';
  const term = caption.match(/Glossary: (.*)/)?.[1].trim() || '';
  if (caption.length < 40 || !term) wrong.push('no explanation or term');
  const points = p => p.getAttribute('d').split(' ').length / 2 - 0.5;
  return {title: f.querySelector('h3')?.textContent, points: Math.max(...lines.map(points)), term,
          height: Math.max(...lines.map(p => p.getBBox().height)), wrong: wrong.join('; ')};
})"""
# The page as a whole. The texts of the run are looked at one by one, and the attributes as well.
WHOLE = r"""(() => {
  const wrong = [], $$ = s => [...document.querySelectorAll(s)];
  for (const s of ['h1', 'main', 'title', 'html[lang=en]', 'meta[name=viewport]', 'noscript'])
    if ($$(s).length !== 1) wrong.push('not one ' + s);
  const scripts = $$('script').map(s => s.id + ' ' + s.type + ' ' + s.src);
  if (scripts.join() !== 'run application/json ,  ') wrong.push('scripts: ' + scripts);
  if ($$('[src], link, iframe, object, img, form, base, [href]:not([href^="#"])').length)
    wrong.push('something from elsewhere');
  const attributes = $$('*').flatMap(e => [...e.attributes]);
  if (attributes.some(a => a.name.startsWith('on'))) wrong.push('a handler');
  if (/\b(NaN|nan|undefined|null|object Object)\b/.test(document.body.innerText))
    wrong.push('NaN in the text');
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = [];
  for (let text; (text = walker.nextNode());)
    if (text.parentElement.localName !== 'script') texts.push(text.data);
  const harm = /[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/;
  for (const text of [...texts, ...attributes.map(a => a.value), document.title])
    if (harm.test(text) || !text.isWellFormed()) wrong.push('a text that steers: ' + escape(text));
  for (const e of $$('.text span')) {
    if (!e.className.match(/^(up|down)[123]$/)) wrong.push('a span of class ' + e.className);
    if (parseFloat(getComputedStyle(e).borderBottomWidth) < 1)
      wrong.push('a token told by colour alone');
  }
  return wrong;
})()"""
# What the page's policy must stop, each by the directive that stops it. What could run as a script
# is stopped by Trusted Types first.
POLICY = r"""(async () => {
  const seen = [], wrong = [], there = 'http://127.0.0.1:9/', types = 'require-trusted-types-for';
  addEventListener('securitypolicyviolation', e => seen.push(e.effectiveDirective));
  const put = (name, more) => {
    const e = document.createElement(name);
    for (const [key, value] of Object.entries(more)) e.setAttribute(key, value);
    document.body.append(e);
    return e;
  };
  const tries = [
    ['img-src', () => put('img', {src: there})],
    ['frame-src', () => put('iframe', {src: there})],
    ['style-src-elem', () => put('link', {rel: 'stylesheet', href: there})],
    ['media-src', () => put('video', {src: there})],
    ['connect-src', () => fetch(there)],
    ['connect-src', () => navigator.sendBeacon(there)],
    ['connect-src', () => new WebSocket('ws://127.0.0.1:9/')],
    ['font-src', () => new FontFace('f', `url(${there})`).load()],
    ['base-uri', () => put('base', {href: there})],
    ['form-action', () => put('form', {action: there}).submit()],
    [types, () => put('script', {src: there})],
    [types, () => put('embed', {src: there})],
    [types, () => document.body.setAttribute('onclick', '1')],
    [types, () => eval('1')],
    [types, () => { document.body.innerHTML = '<p>'; }],
  ];
  for (const [i, [directive, attempt]] of tries.entries()) {
    seen.length = 0;
    try { await attempt(); } catch { }
    for (let wait = 0; wait < 40 && !seen.includes(directive); wait++)
      await new Promise(done => setTimeout(done, 50));
    if (!seen.includes(directive)) wrong.push(`${i}: ${directive} stops nothing; ${seen}`);
  }
  return wrong;
})()"""
# The page's own functions, with numbers by hand.
BY_HAND = r"""(() => {
  const wrong = [], same = (what, got, want) => {
    if (JSON.stringify(got) !== JSON.stringify(want))
      wrong.push(`${what}: ${JSON.stringify(got)}, expected ${JSON.stringify(want)}`);
  };
  const axis = (low, step, count) => ({low, step, count});
  same('0.13 to 0.87', axisFit(0.13, 0.87, 5), axis(0, 0.2, 5));
  same('one value', axisFit(8, 8, 4), axis(4, 2, 4));
  same('zero', axisFit(0, 0, 4), axis(0, 0.5, 2));
  same('almost one value', axisFit(0.693147, 0.693148, 4), axis(0.2, 0.2, 5));
  same('steps', axisFit(1, 2000, 5), axis(0, 500, 4));
  same('round numbers stay', axisFit(0, 100, 5), axis(0, 20, 5));
  same('below zero', axisFit(-3.2, 1.1, 5), axis(-4, 1, 6));
  same('small', axisFit(0, 3e-5, 4), axis(0, 1e-5, 3));
  same('all numbers', axisOf([3, -2, 7, 0], 5), axis(-2, 2, 5));
  const x = axisFit(0, 100, 5), y = axisFit(0, 1, 5);
  same('ends', [placeX(x, 0), placeX(x, 100), placeY(y, 0), placeY(y, 1)],
       [FRAME.left, FRAME.right, FRAME.bottom, FRAME.top]);
  same('a quarter', placeX(x, 25), FRAME.left + 0.25 * (FRAME.right - FRAME.left));
  same('numbers', [0.3, 1e6, 999999, 1.5e6, 1e-5, -0.25, 0, 1e29].map(v => rounded(v, 6)),
       ['0.3', '1e+6', '999999', '1.5e+6', '1e-5', '-0.25', '0', '1e+29']);
  same('digits', [5.6549, 0.03077, 250000].map(v => rounded(v, 3)), ['5.65', '0.0308', '2.5e+5']);
  same('signs', [0.36, -2, 0].map(v => signed(v, 2)), ['+0.36', '-2.00', '+0.00']);
  const steps = stair([0, 0.1, 0.3, 2], axis(0, 1, 2)), at = i => [steps[i].x, steps[i].y];
  same('a stair', [steps.length, at(0), at(1), at(2), at(3), at(4), at(5), at(15), at(16), at(17)],
       [18, [0, 0], [0, 50], [0.25, 50], [0.25, 25], [0.5, 25], [0.5, 0], [1.75, 25], [2, 25],
        [2, 0]]);
  const p = (x, y) => ({x, y});
  same('thinned', thinned([p(0, 5), p(0.1, 9), p(0.1, 7), p(0.2, 1), p(0.2, 3), p(1, 1), p(2, 4),
                           p(2.1, 2)]), [p(0.1, 9), p(0.2, 1), p(1, 1), p(2, 4), p(2.1, 2)]);
  same('kinds', [1e29, 1e30, -1e300, null, '3'].map(shown), [1e29, NaN, NaN, NaN, NaN]);
  const answer = {strings: ['a', 'b', 'c'], kl: [0.5, 0, 0.1], score: 1, values: [0.5, 0.4, 0.3],
    rewards: [1, 2, 3], logProbs: [-1, -1, -1], refLogProbs: [0, 0, 0], mean: 0, deviation: 1,
    later: [[-1, -0.7, -1.5]]};
  const set = {beta: 0.2, gamma: 1, lambda: 0.95, clip: 0.2};
  const column = (name, rows = recompute(answer, set, false)) => rows.map(row => cell(row[name]));
  same('penalty', column('penalty'), ['-0.100', '0.000', '-0.020'].map(x => cell(Number(x))));
  same('reward', column('reward'), [-0.1, 0, 0.98].map(cell));
  same('delta', column('delta'), [-0.2, -0.1, 0.68].map(cell));
  same('advantage', column('advantage'), [0.3187, 0.546, 0.68].map(cell));
  same('return', column('target'), [0.8187, 0.946, 0.98].map(cell));
  same('clipped', recompute(answer, set, false).map(row => row.clipped[0]), [false, true, false]);
  const whitened = recompute(answer, set, true);
  same('whitened rewards stay', column('reward', whitened), [1, 2, 3].map(cell));
  same('no discount, no lambda', column('advantage', recompute(answer, {...set, lambda: 0}, false)),
       [-0.2, -0.1, 0.68].map(cell));
  same('nearest', [-5, 1.4, 1.6, 9].map(x => nearest([0, 1, 2, 3], x)), [0, 1, 2, 3]);
  const log = [{step: 1, 'objective/kl': 2, 'env/reward_mean': 3}, {step: 2, 'objective/kl': null},
    {step: 4, eval_kl: 1, eval_reward: 0.5}];
  const frontier = frontierChart([log], {best_of_n: [{n: 2, kl: 0.19, reward: 1}]});
  same('reward against KL', frontier.curves.map(c => [c.name, c.points]), [
    ['PPO', [{x: 2, y: 3, note: 'step 1'}]], ['DPO', [{x: 1, y: 0.5, note: 'step 4'}]],
    ['best of n', [{x: 0.19, y: 1, note: 'n 2'}]]]);
  same('letters', harmless('é日😀\t\n\r<b>&'), 'é日😀\t\n\r<b>&');
  same('NUL, escape, C1', harmless('a\0\x1b\x9b\x7f'), 'a' + '\ufffd'.repeat(4));
  same('turning', harmless('\u202a\u202eb\u2066\u2069'), '\ufffd\ufffdb\ufffd\ufffd');
  same('half a character', harmless('\ud800a\udc00'), '\ufffda\ufffd');
  return wrong;
})()"""


def check(name, faults, note=""):
    global passed, failed
    faults = [str(f) for f in faults if f]
    passed, failed = passed + (not faults), failed + bool(faults)
    said = "; ".join(faults) or note
    print(f"{'FAIL' if faults else 'ok  '}  {name}{': ' if said else ''}{said}", flush=True)


def run(work, arguments, program=ALIGN):
    return subprocess.run([program, *arguments.split()], cwd=work, capture_output=True)


def must(work, arguments):
    done = run(work, arguments)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        sys.exit("align %s: exit %d: %s" % (arguments, done.returncode, said))
    return done


def read(*path):
    with open(os.path.join(*path), "rb") as f:
        return f.read()


def write(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(content if isinstance(content, bytes) else json.dumps(content).encode())


# ---- Progress on a terminal ----------------------------------------------------------------------


def on_terminal(work, arguments, columns, **environment):
    """Runs align on a terminal of its own -> (exit status, what it wrote there)."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [ALIGN, *arguments.split()],
        cwd=work,
        stdout=subprocess.DEVNULL,
        stderr=side,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    os.close(side)
    written = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:
            break
        if not piece:
            break
        written += piece
    os.close(main)
    return process.wait(), written


def columns_of(line):
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in line)
    return len(line) + wide - sum(unicodedata.combining(c) > 0 for c in line)


def weights(folder):
    return [hashlib.sha256(read(folder, m, "model.safetensors")).hexdigest() for m in STAGES]


def faults_of_lines(lines, columns):
    """Complaints about lines on a terminal: too wide, or one that should be there is not."""
    bars = [line for line in lines if re.search(r" \[=* *\] ", line)]
    samples = [line for line in lines if line.startswith("    ")]
    wide = [line for line in bars + samples if columns_of(line) > columns - 1]
    whole = any("tokens/s" in line and " left" in line and "loss" in line for line in bars)
    faults = [
        wide and "too wide: %r" % wide[0],
        len(bars) < 20 and "%d lines of progress" % len(bars),
        len(samples) < 8 and "%d samples" % len(samples),
        not any("20/20" in line or "9/9" in line for line in bars) and "no stage ends",
        columns == 300 and not whole and "no time left, tokens/s, loss",
    ]
    return faults + [
        "stage %s is missing" % stage
        for stage in ("1/4", "2/4", "3/4", "4/4")
        if not any(line.startswith(stage) for line in bars)
    ]


def check_progress(work):
    must(work, RLHF + " --output_dir plain")
    same, codes = weights(work + "/plain"), re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]")
    code_in = lambda text: codes.search(text) and "a control code: %r" % codes.search(text)[0]
    for name, columns, environment, arguments in (
        ("60 columns", 60, {"TERM": "xterm"}, ""),
        ("300 columns, NO_COLOR", 300, {"TERM": "xterm", "NO_COLOR": "1"}, ""),
        ("TERM=dumb", 60, {"TERM": "dumb"}, ""),
        ("--quiet", 60, {"TERM": "xterm"}, " --quiet"),
    ):
        live = RLHF + arguments + " --output_dir live"
        status, written = on_terminal(work, live, columns, **environment)
        faults, text = [status and "exit %d" % status], written.replace(b"\r\n", b"\n")
        steered = text.replace(b"\x1b[K", b"")
        lines = [line for line in re.split("[\r\n]", steered.decode("utf-8")) if line]
        if weights(work + "/live") != same:
            faults.append("other weights than without a terminal")
        if name == "--quiet" and text:
            faults.append("wrote %r" % text[:80])
        if name == "TERM=dumb":
            faults.append(code_in(text))
        if "columns" in name:
            if code_in(steered.replace(b"\r", b"")):
                faults.append("more control codes than \\r and ESC [ K")
            faults += faults_of_lines(lines, columns)
        check("terminal: " + name, faults, "%d lines renewed" % len(lines) if lines else "")
    plain = run(work, RLHF + " --output_dir plain").stderr
    steps = plain.count(b"step")
    check(
        "no terminal",
        [code_in(plain), steps > 45 and "%d lines" % steps],
        "%d lines" % plain.count(b"\n"),
    )


# ---- The data in a page --------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """The tags of a page, and what stands in its element #run."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.run, self.inside, self.plain = [], "", False, False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = ("id", "run") in attributes
        if not self.plain:
            self.tags.append((tag, attributes))
        elif tag not in ("h2", "table", "tr", "th", "td") or attributes:
            self.tags.append(("a tag among the tables", tag, attributes))
        self.plain = self.plain or ("id", "plain") in attributes

    def handle_endtag(self, tag):
        self.plain = self.plain and tag != "div"
        if not self.plain:
            self.tags.append(tag)
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.run += data


def held(folder):
    """What a run's files hold, as the page must have it."""
    texts = {
        name: read(folder, name).decode("utf-8-sig")
        for name in FILES
        if os.path.exists(os.path.join(folder, name))
    }
    lines = lambda text: [json.loads(line) for line in text.split("\n") if line]
    return {
        name: lines(text) if name.endswith("l") else json.loads(text)
        for name, text in texts.items()
    }


def check_data(browser, name, folder):
    """The page is docs/report.html, and its data are the files', for Python and for the browser."""
    page, files = Tags(read(folder, "report.html").decode()), held(folder)
    template = Tags(read(PAGE).decode())
    shown = browser.open(os.path.join(folder, "report.html"))
    equal = shown.evaluate(
        "JSON.stringify(JSON.parse(document.getElementById('run').textContent))"
        " === JSON.stringify(JSON.parse(%s))" % json.dumps(json.dumps(files))
    )
    shown.close()
    check(
        "data: " + name,
        [
            page.tags != template.tags and "other tags than docs/report.html",
            template.run and "docs/report.html has a run in it",
            json.loads(page.run) != files and "other data than the files",
            not equal and "other data than the files, in the browser",
        ],
        ", ".join(files),
    )


# ---- The pages -----------------------------------------------------------------------------------


def check_page(browser, name, path, terms, plots, pictures):
    """One report, in all its windows."""
    faults = []
    for width, dark, media in (
        (1200, False, ""),
        (1200, True, ""),
        (360, False, ""),
        (360, True, ""),
        (720, False, "print"),
        (720, True, "print"),
    ):
        page = browser.open(path, width=width, dark=dark, media=media)
        where = "%d %s %s: " % (width, "dark" if dark else "light", media)
        figures = page.evaluate(FIGURES)
        faults += [where + str(x) for x in page.errors + page.evaluate(WHOLE)]
        faults += [page.overflow() and where + "%d pixels too wide" % page.overflow()]
        faults += [
            where + "contrast %(ratio)s of %(text)r, %(colour)s on %(background)s" % c
            for c in page.contrast()[:5]
        ]
        faults += [where + f["title"] + ": " + f["wrong"] for f in figures if f["wrong"]]
        faults += [
            "%s is no term of docs/glossary.md" % f["term"]
            for f in figures
            if f["term"] not in terms
        ]
        faults += [len(figures) != plots and "%d plots, expected %d" % (len(figures), plots)]
        picture = "%s-%s.png" % (name, where.strip(": ").replace(" ", "-"))
        if pictures:
            page.screenshot(os.path.join(pictures, picture), full=True)
        faults += [where + "asks for " + url for url in page.requests[1:]]
        page.close()
    points = max([f["points"] for f in figures], default=0)
    faults += [points != POINTS.get(name, points) and "%.0f points" % points]
    check(
        "page: " + name,
        dict.fromkeys(faults),
        "%d plots, at most %.0f points, %d KB"
        % (len(figures), points, os.path.getsize(path) // 1024),
    )
    return figures


def log(entries):
    return {"trainer_state.json": {"log_history": entries}}


def odd_runs(work):
    """Folders with logs as no run should leave them -> {name: plots expected}."""
    token = (
        b'"</script><script>window.ran=1</script><!--<script><img src=x onerror=window.ran=1>'
        b"\\\" onmouseover=\\\"window.ran=1 '&amp;' \\ud800 \\u202e\\u0000\\u009b "
        b'\xe2\x80\xa8\xe2\x80\xa9\xe2\x81\xa6"'
    )
    answer = b'{"reward": 1, "tokens": [%s, 3, null, "b"], "logratio": [5, -2, null, -0.5]}' % token
    report = (
        b'{"facts": {%s: %s, "Seed": 4}, "liked": [1, null, 2], "samples": '
        b'[{"prompt": %s, "before": %s, "ppo": %s}]}' % (token, token, token, answer, answer)
    )
    ends = [{"step": 1, "loss": 1}, {"step": 2, "loss": 2}]
    write(work + "/hostile", {**log(ends), "report.json": report})
    write(
        work + "/kinds",
        {
            **log(ends),
            "report.json": {
                "facts": {"a": ["b"], "__proto__": "c"},
                "liked": {"length": 2},
                "disliked": "many",
                "samples": [
                    None,
                    3,
                    {"prompt": 4, "before": "x", "ppo": {"tokens": 5, "logratio": {}}},
                ],
            },
        },
    )
    tokens = {"strings": ["a", None, 3], "old_log_probs": "x", "values": [1, None], "rewards": {}}
    odd = [3, {"prompt": 4}, {"responses": [{"tokens": tokens}]}, None, {"responses": 5}]
    odd_trace = [{"ppo_step": 1, "prompts": odd}, None, 4, {"ppo_step": "x"}, {"ppo_step": 3}]
    odd_trace += [{"ppo_step": 1, "prompts": [None], "metrics": 7}]
    rows = "\n".join(json.dumps(line) for line in odd_trace if isinstance(line, dict))
    write(work + "/trace", {**log(ends), "trace.jsonl": rows.encode()})
    write(work + "/no_trace", {**log(ends), "trace.jsonl": b"\n\n"})
    write(work + "/none", log([]))
    write(work + "/one", log([{"step": 7, "loss": 3.25}]))
    nulls = [{"step": s, "loss": None if s % 2 else 1 / s, "eval_loss": None} for s in range(1, 40)]
    write(work + "/nulls", log(nulls + [{"step": None, "loss": 1}, {"loss": "x"}, 3, None, [1]]))
    losses = {1: "-1e308", 2: "1e300", 3: "1e29", 4: "-1e29", "1e14": "1e-29"}
    entries = ", ".join('{"step": %s, "loss": %s}' % pair for pair in losses.items())
    write(work + "/absurd", {"trainer_state.json": b'{"log_history": [%s]}' % entries.encode()})
    write(
        work + "/flat",
        log(
            [{"step": s, "loss": 1e6 + 1e-9 * s} for s in range(5)] + [{"step": 2, "eval_loss": 0}]
        ),
    )
    write(
        work + "/long",
        log(
            [
                {"step": s, "loss": 3 + (s * 7919 % 1000) / 1000 + (97 if s == 54321 else 0)}
                for s in range(100000)
            ]
        ),
    )
    return {
        "hostile": 1,
        "kinds": 1,
        "trace": 1,
        "no_trace": 1,
        "none": 0,
        "one": 1,
        "nulls": 1,
        "absurd": 1,
        "flat": 1,
        "long": 1,
    }


def check_hostile(browser, path):
    """Markup is shown as the letters that it is made of, and nothing in it ran."""
    page = browser.open(path)
    words = page.evaluate("[...document.querySelectorAll('th, td, .text')].map(e => e.textContent)")
    letters = "</script><script>window.ran=1</script><!--<script><img src=x onerror=window.ran=1>"
    shown = [text for text in words if letters in text]
    check(
        "hostile: shown as text",
        [
            len(shown) != 5 and "in %d places of 5" % len(shown),
            page.evaluate("'ran' in window") and "it ran",
        ],
    )
    page.close()


def check_functions(browser):
    page = browser.open(PAGE)
    bare = page.evaluate("document.querySelector('main').innerText")
    check(
        "page: no run in it yet",
        page.errors
        + page.evaluate(WHOLE)
        + ["No run is in this page yet" not in bare and "says nothing of it"],
    )
    check("functions, by hand", page.evaluate(BY_HAND))
    try:
        faults = page.evaluate(POLICY)
    except RuntimeError as e:
        faults = ["the page was left: %s" % e]
    check("policy: nothing leaves the page", faults)
    page.close()


def check_noscript(browser, folder):
    """Without scripts: facts, rewards, samples and each entry of each log, as tables."""
    page = browser.open(folder + "/report.html", scripts=False)
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    cells = {}
    for node in tree:
        role = node.get("role", {}).get("value")
        cells.setdefault(role, []).append(str(node.get("name", {}).get("value", "")))
    texts = set(cells.get("cell", [])) | set(cells.get("gridcell", []))
    said = " ".join(cells.get("StaticText", []))
    files = held(folder)
    report = files["report.json"]
    logs = [f["log_history"] for n, f in files.items() if n.endswith("trainer_state.json")]
    squeezed = lambda text: re.sub(r"\s+", "", text)
    wanted = list(report["facts"].values()) + [s["prompt"] for s in report["samples"]]
    wanted += ["".join(s["ppo"]["tokens"]) for s in report["samples"]]
    wanted += [", ".join("%.6g" % r for r in report["dpo"])]
    wanted += ["%.6g" % e["loss"] for log in logs for e in log if "loss" in e]
    all_cells = [squeezed(t) for t in texts]
    missing = [w for w in wanted if not any(squeezed(w) in cell for cell in all_cells)]
    check(
        "without scripts: the numbers as tables",
        [
            "Scripts are switched off here" not in said and "no line says so",
            missing and "%d of %d are missing: %r" % (len(missing), len(wanted), missing[0][:60]),
            page.overflow() and "%d pixels too wide" % page.overflow(),
        ],
        "%d rows, %d values looked for" % (len(cells.get("row", [])), len(wanted)),
    )
    page.close()


# ---- The microscope ------------------------------------------------------------------------------


def names_missing(what, found):
    return ["%s without %s" % (what, n) for n in UNIPO[what].split() if n not in found]


def check_trace(name, path, most_shown):
    """The form that unipo reads, and what the numbers must be among themselves."""
    lines = [json.loads(line) for line in open(path, encoding="utf-8")]
    header, entries = lines[0], lines[1:]
    epochs = header["hparams"]["ppo_epochs"]
    faults = names_missing("header", header) + names_missing("hparams", header["hparams"])
    faults += [header["type"] != "header" and "the first line is no header"]
    for e in entries:
        faults += names_missing("entry", e) + names_missing("metrics", e["metrics"])
        first = e["step"] % epochs == 0
        faults += [e["is_first_step_after_rollout_phase"] != first and "first: %s" % e["step"]]
        for response in (r for p in e["prompts"] for r in p["responses"]):
            tokens = response["tokens"]
            faults += names_missing("response", response) + names_missing("tokens", tokens)
            lengths = {len(values) for values in tokens.values()}
            faults += [lengths != {response["response_length"]} and "lengths %s" % lengths]
            same = tokens["log_probs"] == tokens["old_log_probs"]
            faults += [first and not same and "the first ratio is not 1"]
    steps = sorted({e["ppo_step"] for e in entries})
    size = os.path.getsize(path)
    whole_run = size / len(steps) * 13
    faults += [
        steps[0] != 1 or steps[-1] * epochs != entries[-1]["step"] + 1 and "steps %s" % steps,
        len(steps) > 13 and "%d steps" % len(steps),
        most_shown and whole_run > TRACE_BYTES and "%d bytes of 13 steps" % whole_run,
    ]
    note = "%d steps, %d KB" % (len(steps), size // 1000)
    check("trace.jsonl: " + name, dict.fromkeys(faults), note)


# For each answer of each step: the page's columns, with the run's settings, against the file's.
AGAINST_TRACE = r"""(() => {
  const lines = JSON.parse(byId('run').textContent)[%s], trace = readTrace(lines), wrong = [];
  let tokens = 0;
  for (const [number, epochs] of trace.steps) {
    epochs[0].prompts.forEach((prompt, i) => {
      const h = trace.hparams, file = prompt.responses[0].tokens, answer = traceAnswer(epochs, i);
      const rows = recompute(answer, {beta: answer.beta, gamma: h.gamma, lambda: h.gae_lambda,
        clip: h.clip_eps}, false);
      for (const [name, key] of [['rewards', 'reward'], ['returns', 'target'],
          ['advantages', 'whitened']])
        rows.forEach((row, t) => {
          tokens++;
          if (!(Math.abs(row[key] - file[name][t]) < 1e-4))
            wrong.push(`${number}, ${i}, ${t}: ${key} ${row[key]}, ${file[name][t]}`);
        });
      epochs.slice(1).forEach((line, e) => rows.forEach((row, t) => {
        const r = line.prompts[i].responses[0].tokens;
        const A = r.advantages[t], ratio = row.ratios[e];
        const limit = 0.2, cut = Math.min(1 + limit, Math.max(1 - limit, ratio));
        if (!(Math.abs(Math.min(A * ratio, A * cut) - r.token_objective[t]) < 1e-4))
          wrong.push(`step ${number}, answer ${i}, epoch ${e + 1}, token ${t}: objective`);
        if (row.clipped[e] !== A * cut < A * ratio) wrong.push(`step ${number}, token ${t}: clip`);
      }));
    });
  }
  return [tokens, wrong.slice(0, 5)];
})()"""


def check_microscope(browser, path, name):
    page = browser.open(path)
    tokens, wrong = page.evaluate(AGAINST_TRACE % json.dumps(name))
    check("microscope: the columns are the file's", wrong, "%d numbers" % tokens)

    # The keyboard alone: step, answer, a slider and back, GAE, a heading, its term, a plot.
    text = lambda query: page.evaluate("document.querySelector(%r).textContent" % query)
    focus = lambda query: page.evaluate("document.querySelector(%r).focus()" % query)
    at = lambda: page.evaluate("document.activeElement.id || document.activeElement.localName")
    rows = "[...document.querySelectorAll('#tokens tbody tr')]"
    column = lambda k: page.evaluate(rows + ".map(row => row.children[%d].textContent)" % k)
    faults, before = [], text("#tokens")
    wrong_if = lambda fault, what: faults.append(fault and what)
    focus("#step")
    page.press("ArrowRight")
    page.press("ArrowRight")
    wrong_if(text("#tokens") == before, "another step shows the same")
    page.press("Tab")
    wrong_if(at() != "answer", "after the step comes %s" % at())
    before = text("#tokens")
    page.press("ArrowDown")
    wrong_if(text("#tokens") == before, "another answer shows the same")
    before = text("#tokens")
    for slider, changed in (("beta", 4), ("lambda", 8), ("gamma", 9)):
        focus("#" + slider)
        was = column(changed)
        page.press("Home")
        wrong_if(column(changed) == was, slider + " changes nothing")
    wrong_if(set(column(4)) - {"0.000", "-0.000"}, "a penalty at beta 0: %s" % column(4))
    wrong_if(column(7) != column(8), "delta is not the advantage at gamma 0")
    focus("#clip")
    page.press("End")
    wrong_if("clip" in "".join(column(14)), "clipped at 1")
    focus("#back")
    page.press("Enter")
    wrong_if(text("#tokens") != before, "the way back leads elsewhere")
    focus("#previous")
    page.press("Enter")
    wrong_if(set(column(8)) != {""}, "GAE does not begin with nothing")
    page.press("Enter")
    wrong_if([bool(x) for x in column(8)][-2:] != [False, True], "GAE does not begin at the end")
    wrong_if("A = δ + γλ" not in text("#gae"), "GAE's step is not told")
    focus("#tokens th button")
    page.press("Tab")
    wrong_if("log π ref: " not in text("#column"), "no explanation: " + text("#column"))
    page.press("Enter")
    wrong_if(at() != "a", "no way to the term: " + at())
    page.press("Enter")
    wrong_if(not page.evaluate("location.hash").startswith("#term"), "the term is not reached")
    focus("figure svg")
    page.press("End")
    page.press("ArrowLeft")
    wrong_if(not re.search(r"\d: .*\d", text(".readout")), "a plot says nothing")
    faults += page.errors
    check("microscope: by keyboard", faults)
    page.close()


def check_glossary(browser):
    """What the page says of a term is what docs/glossary.md says."""
    with open("docs/glossary.md", encoding="utf-8") as f:
        entries = [block.split("\n") for block in f.read().split("\n### ")[1:]]
    english = {
        tuple(dict.fromkeys(e[0].split(" · "))): line[11:].replace("`", "")
        for e in entries
        for line in e
        if line.startswith("- English: ")
    }
    page = browser.open(PAGE)
    said = page.evaluate(
        "[...document.querySelectorAll('dt')]"
        ".map(e => [e.textContent, e.nextElementSibling.textContent])"
    )
    page.close()
    squeezed = lambda text: " ".join(text.split())
    check(
        "glossary: the page's is docs/glossary.md's",
        [
            squeezed(text) != squeezed(english.get(tuple(term.split(" · ")), "")) and term
            for term, text in said
        ],
        "%d terms" % len(said),
    )


# ---- align report --------------------------------------------------------------------------------


def refused(work, arguments, status, words=b"", program=ALIGN):
    """One line says what is wrong."""
    done = run(work, arguments, program)
    said = done.stderr
    good = done.returncode == status and said.startswith(b"align: ") and said.count(b"\n") == 1
    fault = "exit %d: %r" % (done.returncode, said[:200])
    check(
        "refused: align " + arguments,
        [not (good and words in said) and fault],
        said.decode(errors="replace").strip(),
    )


def check_refusals(work):
    os.makedirs(work + "/empty")
    write(work + "/broken", {"trainer_state.json": b'{"log_history": ['})
    for arguments, status in (
        ("report nowhere", 1),
        ("report empty", 1),
        ("report broken", 1),
        ("report rated", 1),
        ("report", 2),
        ("report a b", 2),
    ):
        refused(work, arguments, status)


def check_without_page(work):
    """align without docs, then with a page that has no place for a run, then with the right
    one: trainings end well all the same, and the page can be made later."""
    alone = tempfile.mkdtemp(dir=work)
    program = shutil.copy(ALIGN, alone)
    shutil.copy("tokenizer.bin", alone)
    short = "--model_name_or_path pretrain --max_steps 1 --quiet"
    trainings = {"late sft": "sft --dataset_name text " + short, "late course": RLHF + " --quiet"}
    for page, why in (
        (None, "docs/report.html is neither beside the program nor in the current"),
        (b"<html></html>", "docs/report.html: no place for a run (<div "),
    ):
        if page:
            write(alone + "/docs", {"report.html": page})
        for name, arguments in trainings.items():
            folder = name.replace(" ", "_")
            shutil.rmtree(os.path.join(work, folder), ignore_errors=True)
            done = run(work, arguments + " --output_dir " + folder, program)
            notes = [line for line in done.stderr.decode().split("\n") if "report.html" in line]
            wanted = (
                why,
                folder + "/report.html is not written",
                "report.json and the logs",
                "report " + folder + " makes the page",
            )
            said = "".join(notes)
            there = lambda name: os.path.exists(os.path.join(work, folder, name))
            check(
                "%s, %s" % (name, "a page without a place" if page else "no page"),
                [
                    done.returncode and "exit %d" % done.returncode,
                    len(notes) != 1 and "%d notes: %s" % (len(notes), done.stderr.decode()),
                    there("report.html") and "a page",
                    not there("report.json") and "no report.json",
                ]
                + ["the note lacks %r: %s" % (w, said) for w in wanted if w not in said],
            )
        refused(work, "report late_sft", 1, why.encode(), program)
    shutil.copy(PAGE, alone + "/docs")
    for folder in ("late_sft", "late_course"):
        done = run(work, "report " + folder, program)
        made = os.path.join(work, folder, "report.html")
        check(
            "made later: " + folder,
            [done.returncode and done.stderr, not os.path.exists(made) and "no page"],
        )


def make_runs(work):
    with open("docs/reviews.jsonl", encoding="utf-8") as f:
        rated = [json.loads(line) for _, line in zip(range(240), f)]
    pairs = [{"prompt": "The film is", "chosen": " good", "rejected": " bad"}] * 8
    shapes = {
        "rated": rated,
        "text": [{"text": r["text"]} for r in rated[:40]],
        "pairs": pairs,
        "prompts": [{"prompt": "The film"}] * 8,
    }
    for name, rows in shapes.items():
        with open(os.path.join(work, name), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    for folder, data in (
        ("pretrain", "text"),
        ("sft", "text"),
        ("reward", "pairs"),
        ("dpo", "pairs"),
    ):
        new, old = TINY + " --n_positions 256", "--model_name_or_path pretrain"
        must(
            work,
            "%s %s --dataset_name %s --eval_dataset %s --output_dir %s --quiet %s"
            % (folder, new if folder == "pretrain" else old, data, data, folder, FEW),
        )
    must(work, "reinforce %s --num_generations 2 --output_dir reinforce --quiet" % ROLL)
    must(work, "ppo %s --mini_batch_size 2 --output_dir ppo --quiet" % ROLL)


def check_made_again(work, name):
    before = read(work, name, "report.html")
    must(work, "report " + name)
    check("made again: " + name, ["differs"] * (before != read(work, name, "report.html")))


def main():
    pictures = sys.argv[2] if sys.argv[1:2] == ["--pictures"] else None
    if pictures:
        os.makedirs(pictures, exist_ok=True)
    with open("docs/glossary.md", encoding="utf-8") as f:
        terms = {line[4:].strip() for line in f if line.startswith("### ")}
    terms |= {t.split(" · ")[0] for t in terms if len(set(t.split(" · "))) == 1}
    with tempfile.TemporaryDirectory() as work:
        make_runs(work)
        check_progress(work)
        must(
            ".",
            "rlhf --pretrain_steps 40 --reward_steps 20 --ppo_steps 4 --dpo_steps 4 --quiet"
            " --output_dir " + work + "/course",
        )
        odd = odd_runs(work)
        for name in odd:
            must(work, "report " + name)
        with Browser() as browser:
            for name, plots in {**PLOTS, **odd}.items():
                path = os.path.join(work, name, "report.html")
                figures = check_page(browser, name, path, terms, plots, pictures)
                check_data(browser, name, os.path.join(work, name))
                if name == "long":
                    few, high = figures[0]["points"] < 1200, figures[0]["height"] > 80
                    check(
                        "100,000 points: thinned, and the peak is there",
                        [not few and "not thinned", not high and "no peak"],
                    )
            check_hostile(browser, work + "/hostile/report.html")
            check_functions(browser)
            check_noscript(browser, work + "/course")
            check_glossary(browser)
            check_trace("course", work + "/course/ppo/trace.jsonl", True)
            check_trace("ppo", work + "/ppo/trace.jsonl", False)
            check_microscope(browser, work + "/course/report.html", "ppo/trace.jsonl")
        for name in PLOTS:
            check_made_again(work, name)
        check_refusals(work)
        check_without_page(work)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
