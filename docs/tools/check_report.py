#!/usr/bin/env python3
"""check_report.py [--pictures DIR]: is what align shows right: progress on a terminal, and report.html in a real browser? From the folder of align.c.

    make && python3 docs/tools/check_report.py            about a minute; needs Debian's chromium; ends with 'N passed, N failed'

Progress: under a terminal of 60 columns no line is longer, nothing but carriage return and "erase to the end of the line" steers it, samples
appear; without a terminal, with TERM=dumb and with --quiet there is no control code; all of these end with the same weights, bit for bit.
Reports of rlhf and of each training command, at 360 and 1200 pixels, light and dark, and as printed: no console error, no request, no overflow, every text
with the contrast of WCAG AA, every plot with a heading, a label for screen readers, axes with round numbers evenly spaced, curves inside its frame, an
explanation, and a term that docs/glossary.md has. Odd logs: none, one point, nulls, 100,000 points, hostile texts.
--pictures DIR: keeps pictures of the pages there."""
import fcntl, hashlib, json, os, pty, re, struct, subprocess, sys, tempfile, termios, unicodedata
sys.path.insert(0, "docs")
from browser import Browser

passed = failed = 0
ALIGN = os.path.abspath("align")
TINY, FEW = "--vocab_size 300 --n_layer 1 --n_head 2 --n_embd 16", "--max_steps 4 --logging_steps 1"
RLHF = "rlhf --model_name_or_path pretrain --dataset_name rated --pretrain_steps 9 --reward_steps 6 --ppo_steps 3 --dpo_steps 2"
ROLL = "--model_name_or_path pretrain --dataset_name prompts --reward_model_path reward --batch_size 4 " + FEW
PLOTS = {"course": 11, "pretrain": 1, "sft": 1, "reward": 2, "dpo": 2, "ppo": 4, "reinforce": 1}

# Of each figure: what a reader needs, as one string of complaints.
FIGURES = r"""[...document.querySelectorAll('figure')].map(f => {
  const svg = f.querySelector('svg'), box = svg.viewBox.baseVal, wrong = [], label = svg.getAttribute('aria-label') || '';
  if (!f.querySelector('h3')?.textContent.trim()) wrong.push('no heading');
  if (svg.getAttribute('role') !== 'img' || label.length < 20) wrong.push('no label');
  const ticks = anchor => [...svg.querySelectorAll('text')].filter(anchor).map(t => Number(t.textContent.replace('−', '-'))).filter(v => !Number.isNaN(v));
  const number = t => /^[-+.e\d]+$/.test(t.textContent);
  const y = ticks(t => number(t) && t.getAttribute('x') < 50), x = ticks(t => number(t) && t.getAttribute('x') >= 50);
  for (const [name, v] of [['x', x], ['y', y]]) {
    if (v.length < 2) { wrong.push(name + ' axis of ' + v.length + ' numbers'); continue; }
    const step = v[1] - v[0], lead = Number((step / 10 ** Math.floor(Math.log10(step) + 1e-9)).toPrecision(3));
    if (![1, 2, 5].includes(lead) || v.some((w, i) => Math.abs(w - v[0] - i * step) > step / 100)) wrong.push(name + ' axis: ' + v);
  }
  const lines = [...svg.querySelectorAll('path.l')].filter(p => !p.getAttribute('d').includes('h18'));
  if (!lines.length) wrong.push('no curve');
  for (const p of lines) {
    const at = p.getAttribute('d').match(/-?[\d.]+/g).map(Number), b = p.getBBox();
    if (/nan|inf/i.test(p.getAttribute('d'))) wrong.push('NaN in a curve');
    if (b.x < 0 || b.y < 0 || b.x + b.width > box.width || b.y + b.height > box.height) wrong.push('a curve leaves the frame');
  }
  for (const t of svg.querySelectorAll('text')) { const b = t.getBBox(); if (b.x < -1 || b.x + b.width > box.width + 1 || b.y + b.height > box.height + 1) wrong.push('text leaves the frame: ' + t.textContent); }
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBBox()]);
  for (const [i, [a, p]] of texts.entries()) for (const [b, q] of texts.slice(i + 1))
    if (p.x + 1 < q.x + q.width && q.x + 1 < p.x + p.width && p.y + 3 < q.y + q.height && q.y + 3 < p.y + p.height) wrong.push('texts overlap: ' + a + ', ' + b);
  const caption = f.querySelector('figcaption')?.innerText || '', term = caption.match(/Glossary: (.*)/)?.[1].trim() || '';
  if (caption.length < 40 || !term) wrong.push('no explanation or term');
  return {title: f.querySelector('h3')?.textContent, points: Math.max(...lines.map(p => p.getAttribute('d').split(' ').length / 2 - 0.5)), term, wrong: wrong.join('; ')};
})"""
PAGE = r"""(() => {
  const wrong = [], one = s => document.querySelectorAll(s).length === 1 || wrong.push('not one ' + s);
  one('h1'); one('main'); one('title'); one('html[lang=en]'); one('meta[name=viewport]');
  if (document.scripts.length) wrong.push('a script');
  if (document.querySelector('[src], link, iframe, object, img, form, [href]:not([href^="#"])')) wrong.push('something from elsewhere');
  if ([...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))) wrong.push('a handler');
  if (/\b(NaN|nan|undefined)\b/.test(document.body.innerText)) wrong.push('NaN in the text');
  for (const e of document.querySelectorAll('.t span')) if (!e.className.match(/^[ud][123]$/)) wrong.push('a span of class ' + e.className);
  for (const e of document.querySelectorAll('.t span')) if (parseFloat(getComputedStyle(e).borderBottomWidth) < 1) wrong.push('a token told by colour alone');
  return wrong;
})()"""


def check(name, faults, note=""):
    global passed, failed
    faults = [str(f) for f in faults if f]
    passed, failed = passed + (not faults), failed + bool(faults)
    print(f"{'FAIL' if faults else 'ok  '}  {name}{': ' if faults or note else ''}{'; '.join(faults) or note}", flush=True)


def run(work, arguments, **more):
    return subprocess.run([ALIGN, *arguments.split()], cwd=work, capture_output=True, env={**os.environ, **more})


def must(work, arguments):
    done = run(work, arguments)
    if done.returncode: sys.exit("align %s: exit %d: %s" % (arguments, done.returncode, done.stderr.decode(errors="replace").strip()))
    return done


def on_terminal(work, arguments, columns, **environment):
    """Runs align on a terminal of its own -> (exit status, what it wrote there)."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([ALIGN, *arguments.split()], cwd=work, stdout=subprocess.DEVNULL, stderr=side, stdin=subprocess.DEVNULL, env={**os.environ, **environment})
    os.close(side)
    written = b""
    while True:
        try: piece = os.read(main, 65536)
        except OSError: break
        if not piece: break
        written += piece
    os.close(main)
    return process.wait(), written


def columns_of(line): return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in line)


def weights(folder):
    return [hashlib.sha256(open(os.path.join(folder, m, "model.safetensors"), "rb").read()).hexdigest() for m in ("language_model", "reward_model", "ppo", "dpo")]


def check_progress(work):
    must(work, RLHF + " --output_dir plain")
    same, codes = weights(work + "/plain"), re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]")
    for name, columns, environment, arguments in (("60 columns", 60, {"TERM": "xterm"}, ""), ("300 columns, NO_COLOR", 300, {"TERM": "xterm", "NO_COLOR": "1"}, ""),
                                                  ("TERM=dumb", 60, {"TERM": "dumb"}, ""), ("--quiet", 60, {"TERM": "xterm"}, " --quiet")):
        status, written = on_terminal(work, RLHF + arguments + " --output_dir live", columns, **environment)
        faults, text = [status and "exit %d" % status], written.replace(b"\r\n", b"\n")
        if weights(work + "/live") != same: faults.append("other weights than without a terminal")
        if name == "--quiet" and text: faults.append("wrote %r" % text[:80])
        if name == "TERM=dumb" and codes.search(text): faults.append("a control code: %r" % codes.search(text)[0])
        lines = [l for l in re.split("[\r\n]", text.replace(b"\x1b[K", b"").decode("utf-8")) if l]
        if "columns" in name:
            if codes.search(text.replace(b"\r", b"").replace(b"\x1b[K", b"")): faults.append("more control codes than \\r and ESC [ K")
            bars, samples = [l for l in lines if re.search(r" \[=* *\] ", l)], [l for l in lines if l.startswith("    ")]
            wide = [l for l in bars + samples if columns_of(l) > columns - 1]
            faults += [wide and "too wide: %r" % wide[0], len(bars) < 20 and "%d lines of progress" % len(bars), len(samples) < 8 and "%d samples" % len(samples)]
            faults += ["stage %s is missing" % stage for stage in ("1/4", "2/4", "3/4", "4/4") if not any(l.startswith(stage) for l in bars)]
            last = [l for l in bars if "20/20" in l or "9/9" in l]
            faults += [not last and "no stage ends", columns == 300 and not any("tokens/s" in l and " left" in l and "loss" in l for l in bars) and "no time left, tokens/s, loss"]
        check("terminal: " + name, faults, "%d lines renewed" % len(lines) if lines else "")
    plain = run(work, RLHF + " --output_dir plain").stderr
    check("no terminal", [codes.search(plain) and "a control code: %r" % codes.search(plain)[0], plain.count(b"step") > 45 and "%d lines" % plain.count(b"step")], "%d lines" % plain.count(b"\n"))


def check_page(browser, name, path, terms, plots, pictures):
    """One report, in all its windows."""
    faults = []
    for width, dark, media in ((1200, False, ""), (1200, True, ""), (360, False, ""), (360, True, ""), (720, False, "print"), (720, True, "print")):
        page = browser.open(path, width=width, dark=dark, media=media)
        where = "%d %s %s" % (width, "dark" if dark else "light", media)
        faults += [where + ": " + str(x) for x in page.errors + page.evaluate(PAGE)]
        faults += [page.overflow() and where + ": %d pixels too wide" % page.overflow()]
        faults += [where + ": contrast %(ratio)s of %(text)r, %(colour)s on %(background)s" % c for c in page.contrast()[:5]]
        figures = page.evaluate(FIGURES)
        faults += [where + ": " + f["title"] + ": " + f["wrong"] for f in figures if f["wrong"]]
        faults += ["%s is no term of docs/glossary.md" % f["term"] for f in figures if f["term"] not in terms]
        if len(figures) != plots: faults.append("%d plots, expected %d" % (len(figures), plots))
        if pictures: page.screenshot(os.path.join(pictures, "%s-%s.png" % (name, where.strip().replace(" ", "-"))), full=True)
        page.close()
    check("page: " + name, dict.fromkeys(faults), "%d plots, at most %.0f points, %d KB" % (len(figures), max([f["points"] for f in figures], default=0), os.path.getsize(path) // 1024))


def write(folder, files):
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as f: f.write(content if isinstance(content, bytes) else json.dumps(content).encode())


def log(entries): return {"trainer_state.json": {"log_history": entries}}


def odd_runs(work):
    """Folders with logs as no run should leave them -> {name: plots expected}."""
    hostile = b"<script>alert(1)</script><img src=x onerror=alert(1)>\\\" onmouseover=\\\"alert(1) '&amp;' \\ud800 \\u202e\\u0000\\u009b"
    token = b"\"" + hostile + b"\""
    answer = b"{\"reward\": 1, \"tokens\": [%s, 3, null, \"b\"], \"logratio\": [5, -2, null, -0.5]}" % token
    write(work + "/hostile", {**log([{"step": 1, "loss": 1}, {"step": 2, "loss": 2}]), "report.json": b"{\"facts\": {%s: %s, \"Seed\": 4}, \"liked\": [1, null, 2], \"samples\": [{\"prompt\": %s, \"before\": %s, \"ppo\": %s}]}" % (token, token, token, answer, answer)})
    write(work + "/none", log([]))
    write(work + "/one", log([{"step": 7, "loss": 3.25}]))
    write(work + "/nulls", log([{"step": s, "loss": None if s % 2 else 1 / s, "eval_loss": None} for s in range(1, 40)] + [{"step": None, "loss": 1}, {"loss": "x"}, 3, None, [1]]))
    write(work + "/absurd", {"trainer_state.json": b"{\"log_history\": [{\"step\": 1, \"loss\": -1e308}, {\"step\": 2, \"loss\": 1e300}, {\"step\": 3, \"loss\": 1e29}, {\"step\": 4, \"loss\": -1e29}, {\"step\": 1e14, \"loss\": 1e-29}]}"})
    write(work + "/flat", log([{"step": s, "loss": 1e6 + 1e-9 * s} for s in range(5)] + [{"step": 2, "eval_loss": 0}]))
    write(work + "/long", log([{"step": s, "loss": 3 + (s * 7919 % 1000) / 1000 + (97 if s == 54321 else 0)} for s in range(100000)]))
    return {"hostile": 1, "none": 0, "one": 1, "nulls": 1, "absurd": 1, "flat": 1, "long": 1}


def check_refusals(work):
    os.makedirs(work + "/empty")
    write(work + "/broken", {"trainer_state.json": b"{\"log_history\": ["})
    for arguments, status in (("report nowhere", 1), ("report empty", 1), ("report broken", 1), ("report rated", 1), ("report", 2), ("report a b", 2)):
        done = run(work, arguments)
        good = done.returncode == status and done.stderr.startswith(b"align: ") and done.stderr.count(b"\n") == 1
        check("refused: align " + arguments, [] if good else ["exit %d: %r" % (done.returncode, done.stderr[:200])], done.stderr.decode().strip())


def make_runs(work):
    with open("docs/reviews.jsonl", encoding="utf-8") as f: rated = [json.loads(line) for _, line in zip(range(240), f)]
    shapes = {"rated": rated, "text": [{"text": r["text"]} for r in rated[:40]], "pairs": [{"prompt": "The film is", "chosen": " good", "rejected": " bad"}] * 8, "prompts": [{"prompt": "The film"}] * 8}
    for name, rows in shapes.items():
        with open(os.path.join(work, name), "w", encoding="utf-8") as f: f.writelines(json.dumps(row) + "\n" for row in rows)
    for folder, data in (("pretrain", "text"), ("sft", "text"), ("reward", "pairs"), ("dpo", "pairs")):
        more = TINY + " --n_positions 256" if folder == "pretrain" else "--model_name_or_path pretrain"
        must(work, "%s %s --dataset_name %s --eval_dataset %s --output_dir %s --quiet %s" % (folder, more, data, data, folder, FEW))
    must(work, "reinforce %s --num_generations 2 --output_dir reinforce --quiet" % ROLL)
    must(work, "ppo %s --mini_batch_size 2 --output_dir ppo --quiet" % ROLL)


def main():
    pictures = sys.argv[2] if sys.argv[1:2] == ["--pictures"] else None
    if pictures: os.makedirs(pictures, exist_ok=True)
    with open("docs/glossary.md", encoding="utf-8") as f: terms = {line[4:].strip() for line in f if line.startswith("### ")}
    terms |= {t.split(" · ")[0] for t in terms if len(set(t.split(" · "))) == 1}
    with tempfile.TemporaryDirectory() as work:
        make_runs(work)
        check_progress(work)
        must(".", "rlhf --pretrain_steps 40 --reward_steps 20 --ppo_steps 4 --dpo_steps 4 --quiet --output_dir " + work + "/course")
        odd = odd_runs(work)
        for name in odd: must(work, "report " + name)
        with Browser() as browser:
            for name, plots in {**PLOTS, **odd}.items(): check_page(browser, name, os.path.join(work, name, "report.html"), terms, plots, pictures)
        for name in PLOTS:
            with open(os.path.join(work, name, "report.html"), "rb") as f: before = f.read()
            must(work, "report " + name)
            with open(os.path.join(work, name, "report.html"), "rb") as f: check("made again: " + name, ["differs"] * (before != f.read()))
        with open(work + "/hostile/report.html", "rb") as f: html = f.read()
        try: html.decode("utf-8")
        except UnicodeDecodeError as e: check("hostile: UTF-8", [e])
        check("hostile: escaped", [b"<script" in html and "a script", b"<img" in html and "a picture", b"&lt;script>" not in html and "the text is gone"])
        check_refusals(work)
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__": main()
