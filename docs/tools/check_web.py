#!/usr/bin/env python3
"""check_web.py: does align.html do what ./align does, in Node, Chromium and Firefox?

    make && python3 docs/tools/check_web.py [--only node,chromium,firefox] [--long] [--html FILE]
                                            [--pictures DIR] [--seed N]

Makes align.html (docs/tools/make_web.py) unless --html gives one. Needs node, and Debian's chromium
and firefox-esr; four minutes, with --long (the whole course in each browser) half an hour. Ends
with 'N passed, N failed'; prints sizes, times and memory.
Node: the page's own program and worker without a browser. Each trainer on 50 steps of a small
model, natively (one thread, the 4 x 8 tile) and as WebAssembly: losses within 1e-4; the same bits
as a build with musl, whose C library WASI's comes from, where musl-gcc is installed. Every topic of
`explain`: its JSON within 1e-6, its text within what is printed. Wrong flags, topics and files, and
more memory than there is: the same line, the same status.
Browsers, from file://: a stopped training goes on from its checkpoint to the same bits, a paused
one holds and goes on; then the page itself: the short course to its end, where PPO's reward has to
rise by a standard deviation, an example changed and compared with ./align, own preferences to DPO,
save and load; no console error, no request (of which the probe is proved by one that is made)."""

import argparse
import base64
import hashlib
import http.server
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile

import browser as chromium
import firefox

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = ROOT / "docs" / "tools"
ALIGN = str(ROOT / "align")
SHORT = {"pretrain": 300, "reward": 100, "ppo": 16, "dpo": 4}
WHOLE = {"pretrain": 3200, "reward": 450, "ppo": 85, "dpo": 150}
STEPS, LOSS_LIMIT, NUMBER_LIMIT = 50, 1e-4, 1e-6
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ALIGN_KERNEL": "base"}
GROUPS = "--num_generations 4 --per_device_train_batch_size 8"
SHAPE = "--n_layer 2 --n_head 2 --n_embd 32 --n_positions 64 --vocab_size 600"
passed = failed = 0


def check(name, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok  ' if ok else 'FAIL'}  {name}{': ' if detail else ''}{detail}", flush=True)
    return ok


def native(words, folder, program=ALIGN, stdin="", **environment):
    return subprocess.run(
        [program, *words],
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **ONE_THREAD, **environment},
    )


def node(html, folder, jobs):
    """What the page's program says to each list of arguments, run in order on this folder."""
    done = subprocess.run(
        ["node", str(TOOLS / "web_node.js"), str(html), str(folder)],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- Node: the trainers ---------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder):
    """Texts, pairs, a language model, a reward model, and rollouts to replay: made natively, read
    by both."""
    lines = (ROOT / "docs/reviews.jsonl").read_text().splitlines()[:400]
    rows = [json.loads(line) for line in lines]
    write_rows(folder / "texts.jsonl", [{"text": r["text"], "score": r["score"]} for r in rows])
    pairs = [
        {"prompt": "The film", "chosen": " " + a["text"], "rejected": " " + b["text"]}
        for a, b in zip(rows[::2], rows[1::2])
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    shutil.copy(ROOT / "tokenizer.bin", folder)
    texts = "--dataset_name texts.jsonl"
    for words in (
        f"pretrain {SHAPE} {texts} --max_steps 30 --output_dir lm",
        f"reward --model_name_or_path lm {texts} --max_steps 10 --output_dir rm",
        f"ppo --model_name_or_path lm --reward_model_path rm {texts} --batch_size 8"
        f" --mini_batch_size 4 --max_steps {STEPS} --output_dir rolled",
        # groups: num_generations answers in a row have one query
        f"grpo --model_name_or_path lm --reward_model_path rm {texts} {GROUPS}"
        f" --max_completion_length 20 --max_steps {STEPS} --output_dir grouped",
    ):
        done = native(words.split() + ["--quiet"], folder)
        if done.returncode:
            raise RuntimeError(f"align {words}: {done.stderr}")
    for made in ("rolled", "grouped"):
        shutil.copy(folder / made / "rollouts.jsonl", folder / f"{made}.jsonl")


def trainers():
    few = f"--max_steps {STEPS} --logging_steps 1 --learning_rate 1e-3"
    base, texts = "--model_name_or_path lm", "--dataset_name texts.jsonl"
    small = "--per_device_train_batch_size 4"
    return {
        "pretrain": f"pretrain {SHAPE} {texts} {few} {small}",
        "sft": f"sft {base} {texts} {few} {small}",
        "reward": f"reward {base} {texts} {few} {small}",
        # The same answers for both: a token near the edge of a draw would make two runs of one. So
        # would a ratio near the edge of the clip: PPO takes 8 steps on each answer, smaller ones.
        "reinforce": f"reinforce {base} --rollouts grouped.jsonl --batch_size 8 {few}",
        "ppo": f"ppo {base} --rollouts rolled.jsonl --batch_size 8 --mini_batch_size 4"
        f" {few.replace('1e-3', '3e-4')}",
        "grpo": f"grpo {base} --rollouts grouped.jsonl --beta 0.04 {GROUPS} {few}",
        "dpo": f"dpo {base} --dataset_name pairs.jsonl {few} {small}",
    }


def losses(folder):
    """A loss for each step: of the Trainer's log, or of PPO's statistics."""
    stats = folder / "stats_all.jsonl"
    if stats.exists():
        rows = [json.loads(line) for line in stats.read_text().splitlines()]
        key = "ppo/loss/total" if "ppo/loss/total" in rows[0] else "loss"
        return [row[key] for row in rows]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def musl_build(folder):
    if not shutil.which("musl-gcc"):
        return None
    program = str(folder / "align_musl")
    source = str(ROOT / "align.c")
    subprocess.run(["musl-gcc", "-O2", "-static", source, "-o", program, "-lm"], check=True)
    return program


def check_trainers(html, folder):
    make_data(folder)
    commands = trainers()
    musl = musl_build(folder)
    jobs = [f"{words} --output_dir web_{name}".split() for name, words in commands.items()]
    results = dict(zip(commands, node(html, folder, jobs)))
    for name, words in commands.items():
        result = results[name]
        begin = time.monotonic()
        done = native(f"{words} --output_dir native_{name}".split(), folder)
        seconds = time.monotonic() - begin
        if result["code"] or done.returncode:
            check(name, False, (result["stderr"] + done.stderr)[-600:])
            continue
        a, b = losses(folder / f"native_{name}"), losses(folder / f"web_{name}")
        difference = max((abs(x - y) for x, y in zip(a, b)), default=math.inf)
        same = sum(x == y for x, y in zip(a, b))
        check(
            f"{name}: {STEPS} steps, native and WebAssembly",
            len(a) == len(b) == STEPS and difference <= LOSS_LIMIT,
            f"losses differ by {difference:.1e} at most, {same} of {len(a)} not at all;"
            f" {seconds:.1f} s and {result['seconds']:.1f} s",
        )
        if not musl:
            continue
        native(f"{words} --output_dir musl_{name}".split(), folder, musl)
        files = [folder / f"{kind}_{name}/model.safetensors" for kind in ("musl", "web")]
        sums = [hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files]
        check(f"{name}: the weights of a build with musl, bit for bit", sums[0] == sums[1], sums)


# ---- Node: explain, errors ------------------------------------------------------------------


# a difference quotient: the last digits of two float32 losses, divided by a small step
LIMITS = {"backprop.wte[3]": 1e-4}


def apart(a, b, where=""):
    """Where two JSON values differ by more than NUMBER_LIMIT; "" nowhere."""
    if isinstance(a, bool) or isinstance(b, bool) or not isinstance(a, (int, float, list, dict)):
        return "" if a == b else f"{where}: {a!r}, {b!r}"
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        near = abs(a - b) <= LIMITS.get(where, NUMBER_LIMIT) * max(1, abs(a))
        return "" if near else f"{where}: {a!r}, {b!r}"
    if type(a) is not type(b) or len(a) != len(b):
        return f"{where}: another shape"
    if isinstance(a, list):
        return next((d for i, x in enumerate(a) if (d := apart(x, b[i], f"{where}[{i}]"))), "")
    if list(a) != list(b):
        return f"{where}: other keys"
    return next((d for k in a if (d := apart(a[k], b[k], f"{where}.{k}"))), "")


def topics():
    listed = native(["explain"], ROOT)
    return re.findall(r"^  (\w+)  ", listed.stdout + listed.stderr, re.M)


def check_explain(html, folder):
    names = topics()
    jobs = [["explain", name, *more] for name in names for more in (["--json"], [])]
    results = node(html, folder, jobs)
    wrong, other_text, most = [], [], 0
    for words, result in zip(jobs, results):
        done = native(words, folder)
        if result["code"] or done.returncode:
            wrong.append(f"{words}: {result['stderr']}{done.stderr}")
        elif words[-1] == "--json":
            if d := apart(json.loads(done.stdout), json.loads(result["stdout"]), words[1]):
                wrong.append(d)
        elif done.stdout != result["stdout"]:
            other_text.append(words[1])
        most = max(most, result["seconds"])
    detail = f"{len(names)} topics, {most * 1000:.0f} ms at most;"
    detail += f" text differs: {other_text or 'none'}"
    check("explain: JSON as native within 1e-6", len(names) >= 16 and not wrong, wrong or detail)


def check_errors(html, folder):
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (folder / "bad.json").write_text('{"logits": [1, 2], "temperature": -1}')
    cases = [
        "dpoo",
        "sft --lerning_rate 1",
        "explain softmax --example bad.json",
        "sft --model_name_or_path lm --dataset_name bad.jsonl --output_dir no",
        "generate --model_name_or_path nowhere --prompt a",
        "rlhf --pretrain_steps -1",
    ]
    results = node(html, folder, [case.split() for case in cases])
    for case, result in zip(cases, results):
        done = native(case.split(), folder)
        said = done.stderr.replace(ALIGN, "align")
        detail = result["stderr"].strip()
        if result["code"] != done.returncode or result["stderr"] != said:
            detail = f"{result['code']} {result['stderr']!r}, native {done.returncode} {said!r}"
        check(f"error: {case}", detail == result["stderr"].strip() and result["code"] > 0, detail)
    # a browser has no programs to start
    words = "ppo --model_name_or_path lm --reward_command cat --dataset_name texts.jsonl"
    result = node(html, folder, [f"{words} --output_dir no".split()])[0]
    said = result["stderr"].strip()
    expected = "align: --reward_command: programs can be started on Linux"
    ok = result["code"] == 1 and said.startswith(expected) and "\n" not in said
    check("error: --reward_command", ok, said)
    huge = "--vocab_size 600 --n_layer 48 --n_head 64 --n_embd 8192 --dataset_name texts.jsonl"
    result = node(html, folder, [f"pretrain {huge} --output_dir no".split()])[0]
    said = result["stderr"].strip().splitlines()[-1]
    check("out of memory is a line", result["code"] == 1 and "out of memory" in said, said)
    prompt = "Não é só água — 水, 🙂"
    words = ["next", "--model_name_or_path", "lm", "--prompt", prompt, "--json"]
    came = json.loads(node(html, folder, [words])[0]["stdout"])["prompt"]
    check("arguments and output in UTF-8", came == prompt, came)


# ---- Browsers -------------------------------------------------------------------------------


def wait(page, expression, seconds, every=0.25):
    """The expression's value, as soon as it is true."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := page.evaluate(expression):
            return value
        time.sleep(every)
    raise RuntimeError(f"not true in {seconds} s: {expression}")


def test(name):
    return f"document.querySelector('[data-test=\"{name}\"]')"


def state(page, name, seconds):
    """Waits until something that goes on has come to its end; its state."""
    ended = f"(s => !['idle', 'running', 'paused'].includes(s) && s)({test(name)}.dataset.state)"
    return wait(page, ended, seconds)


def set_value(page, name, value):
    send = "['input', 'change'].forEach(t => e.dispatchEvent(new Event(t, {bubbles: true})))"
    page.evaluate(f"(e => {{ e.value = {json.dumps(str(value))}; {send} }})({test(name)})")


def click(page, name):
    page.evaluate(f"{test(name)}.click()")


def run(words, options="{}"):
    return f"engine.run({json.dumps(words.split())}, {options})"


WEIGHTS = (
    "(async path => [...new Uint8Array(await crypto.subtle.digest('SHA-256', engine.read(path)))]"
    ".map(b => b.toString(16).padStart(2, '0')).join(''))"
)


def check_stops(page, name):
    """Stopped at a checkpoint or paused, then gone on with: the weights of an undisturbed run."""
    words = f"pretrain {SHAPE} --dataset_name docs/reviews.jsonl --max_steps 60 --save_steps 20"
    words += " --per_device_train_batch_size 8 --logging_steps 1 --output_dir "
    sums = []
    page.evaluate(run(words + "whole"), 300)
    sums.append(page.evaluate(WEIGHTS + "('whole/model.safetensors')"))
    stop = "{progress: e => e.step === 30 && engine.stop()}"
    stopped = page.evaluate(run(words + "stopped", stop), 300)
    page.evaluate(run(words + "stopped --resume_from_checkpoint true"), 300)
    sums.append(page.evaluate(WEIGHTS + "('stopped/model.safetensors')"))
    ok = stopped["stopped"] and stopped["code"] == 130 and sums[0] == sums[1]
    check(f"{name}: a stopped training goes on from its checkpoint to the same bits", ok, sums)
    if not page.evaluate("engine.canPause"):
        print(f"      {name} cannot suspend WebAssembly: no pause")
        return
    # steps that come while paused, and afterwards
    script = f"""(async () => {{
      let steps = 0, held = -1;
      const count = e => {{ if (e.step === 30) engine.pause(); steps++; }};
      const done = {run(words + "paused", "{progress: count}")};
      while (!engine.paused) await new Promise(r => setTimeout(r, 5));
      await new Promise(r => setTimeout(r, 1000));
      const before = steps;
      await new Promise(r => setTimeout(r, 1000));
      held = steps - before;
      engine.resume();
      return [held, before, steps, (await done).code];
    }})()"""
    held, before, _, code = page.evaluate(script, 300)
    same = page.evaluate(WEIGHTS + "('paused/model.safetensors')") == sums[0]
    check(f"{name}: a paused training holds, and goes on to the same bits",
          held == 0 and before < 60 and code == 0 and same, f"{before} steps before the pause")


def processor_seconds(pid):
    """What a process and those that it started have had of processors (Linux): on a busy machine
    the clock says little."""
    parents, used = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        used[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family = {pid}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used.get(p, 0) for p in family)


def check_course(page, name, steps, seconds):
    for stage, n in steps.items():
        set_value(page, f"{stage}-steps", n)
    begin, pid = time.monotonic(), page.browser.process.pid
    processor = processor_seconds(pid)
    had_models = page.evaluate("Boolean(engine.read('out/language_model/model.safetensors'))")
    click(page, "run-course")
    asks = page.evaluate(f"!{test('replace-do')}.closest('#replace').hidden")
    if had_models:
        check(f"{name}: a new run asks before it replaces models", asks)
        click(page, "replace-do")
    wait(page, f"{test('course-state')}.dataset.state === 'running'", 20)
    ended = state(page, "course-state", seconds)
    took, processor = time.monotonic() - begin, processor_seconds(pid) - processor
    summary = json.loads(page.evaluate("engine.text('out/summary.json') || '{}'") or "{}")
    said = page.evaluate(f"{test('course-state')}.textContent")
    if not check(f"{name}: the course to its end", ended == "done" and "ppo" in summary, said):
        return
    gains = {k: summary[k]["reward_after"] - summary[k]["reward_before"] for k in ("ppo", "dpo")}
    memory = page.evaluate("engine.memory")
    check(
        f"{name}: PPO's reward has risen by a standard deviation",
        gains["ppo"] >= 1,
        f"PPO {gains['ppo']:+.2f}, DPO {gains['dpo']:+.2f}; {took:.0f} s ({processor:.0f} s of"
        f" processors), {memory / 1e6:.0f} MB, {json.dumps(steps)}",
    )
    check(f"{name}: the report is there", page.evaluate(f"Boolean({test('report')})"))


def check_explained(page, name, folder):
    """The page's number, changed, against what ./align says of the same example."""
    changes = [("dpo", "beta", 0.37), ("softmax", "temperature", 0.6), ("ppo", "cliprange", 0.05)]
    for topic, field, value in changes:
        set_value(page, "explain-topic", topic)
        wait(page, f"{test('explain-' + field)} && true", 20)
        set_value(page, f"explain-{field}", value)
        result = test("explain-result") + ".dataset"
        shown = wait(
            page,
            f"(d => d.json && JSON.parse(d.json).{field} === {value} && [d.json, d.example])"
            f"({result})",
            30,
        )
        (folder / "shown.json").write_text(shown[1])
        words = ["explain", topic, "--example", "shown.json", "--json"]
        done = native(words, folder)
        difference = apart(json.loads(done.stdout), json.loads(shown[0]))
        check(f"{name}: explain {topic}, {field} {value}, as native", not difference, difference)


def check_preferences(page, name):
    """Ten judgements, some of them after a click for another pair, then DPO on them."""
    count = f"Number({test('rate-count')}.textContent)"
    ready = f"(e => e && !e.disabled && e.textContent.trim() && true)({test('rate-a')})"
    click(page, "rate-new")
    for i in range(10):
        wait(page, ready, 60)
        if i % 4 == 3:
            click(page, "rate-new")
            wait(page, ready, 60)
        click(page, "rate-a" if i % 2 else "rate-b")
        wait(page, f"{count} === {i + 1}", 60)
    click(page, "rate-train")
    ended = state(page, "rate-state", 300)
    found = page.evaluate("[...engine.files.keys()].filter(f => /preferences/.test(f))")
    rows = page.evaluate(f"engine.text({json.dumps(found[0])}).trim().split('\\n').length")
    check(f"{name}: own preferences to DPO", ended == "done" and rows == 10, f"{rows} pairs")


def check_saved(page, name, folder):
    """What is saved is a model that ./align reads, and comes back into the page as it was."""
    click(page, "save")
    wait(page, "window.alignSaved && alignSaved.length > 0", 60)
    weights = "out/ppo/model.safetensors"
    before = page.evaluate(WEIGHTS + f"('{weights}')")
    text = page.evaluate("btoa(Array.from(alignSaved, c => String.fromCharCode(c)).join(''))", 120)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(text))) as saved:
        inside = saved.namelist()
        broken = saved.testzip()
        saved.extractall(folder / "saved")
    found = list((folder / "saved").rglob("ppo/model.safetensors"))
    words = "generate --max_new_tokens 5 --prompt The --model_name_or_path".split()
    done = native(words + [str(found[0].parent)], ROOT) if found else None
    ok = not broken and done and done.returncode == 0
    detail = f"{len(inside)} files" if ok else f"{broken} {inside} {done and done.stderr}"
    check(f"{name}: what is saved is a .zip of folders that ./align reads", ok, detail)
    page.evaluate("engine.remove('out')")
    page.evaluate(
        "(e => { const t = new DataTransfer(); t.items.add(new File([alignSaved], 'run.zip'));"
        " e.files = t.files; e.dispatchEvent(new Event('change', {bubbles: true})); })"
        f"({test('load')})"
    )
    wait(page, f"{test('load-state')}.dataset.state === 'done'", 60)
    after = page.evaluate(f"Boolean(engine.read('{weights}'))") and page.evaluate(
        WEIGHTS + f"('{weights}')"
    )
    check(f"{name}: what is loaded is what was saved", before == after)


def check_play(page, name):
    set_value(page, "play-prompt", "The film is")
    click(page, "play-run")
    text = wait(page, f"{test('play-result')}.textContent.trim()", 60)
    check(f"{name}: the playground answers", len(text) > 3, text[:60])


class Listener(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def check_probe(kind, name, folder):
    """A page that asks the network is caught; under the policy of align.html nothing is asked."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask = f"new Image().src = 'http://127.0.0.1:{server.server_port}/asked'"
    policy = re.search(r"<meta http-equiv=[^>]*>", options.html.read_text())[0]
    found = []
    for head in ("", policy):
        (folder / "asks.html").write_text(
            f'<!doctype html><meta charset="utf-8">{head}<title>t</title><script>{ask}</script>'
        )
        server.asked.clear()
        page = kind.open(str(folder / "asks.html"))
        time.sleep(1)
        page.evaluate("1")
        said = " ".join(page.errors)
        found.append("asks the network" in said)
        found.append(re.search("Content.Security.Policy", said) is not None)
        page.close()
    server.shutdown()
    ok = found[0] and found[3] and not server.asked
    check(f"{name}: a request is noticed, and the policy stops it", ok, "" if ok else found)


def check_browser(kind, name, folder):
    folder.mkdir()
    begin = time.monotonic()
    with kind.Browser() as b:
        page = b.open(str(options.html))
        lack = "!['starting', undefined].includes(document.documentElement.dataset.engine) && "
        engine = wait(page, lack + "document.documentElement.dataset.engine", 60)
        took = time.monotonic() - begin
        check(f"{name}: opens from disk", engine == "ready", f"{took:.1f} s, browser included")
        check_probe(b, name, folder)
        steps = [
            lambda: check_stops(page, name),
            lambda: check_explained(page, name, folder),
            lambda: check_course(page, name, SHORT, 900),
            lambda: check_play(page, name),
            lambda: check_preferences(page, name),
            lambda: check_saved(page, name, folder),
        ]
        if options.long:
            steps.append(lambda: check_course(page, name, WHOLE, 3600))
        for step in steps:
            try:
                step()
            except (RuntimeError, OSError) as error:
                check(f"{name}: {error}"[:400], False)
        if options.pictures:
            os.makedirs(options.pictures, exist_ok=True)
            page.screenshot(f"{options.pictures}/{name}.png")
        check(f"{name}: no console error, no request", not page.errors, page.errors[:5] or "")


# ---- All ------------------------------------------------------------------------------------

parser = argparse.ArgumentParser()
parser.add_argument("--only", default="node,chromium,firefox")
parser.add_argument("--long", action="store_true", help="the whole course in each browser, too")
parser.add_argument("--html", type=pathlib.Path, help="do not make it")
parser.add_argument("--pictures", metavar="DIR", help="keeps a picture of the page there")
options = parser.parse_args()
work = pathlib.Path(tempfile.mkdtemp(prefix="check_web."))
try:
    if not options.html:
        options.html = work / "align.html"
        make = [sys.executable, str(TOOLS / "make_web.py"), "--output", str(options.html)]
        if subprocess.run(make).returncode:
            sys.exit("check_web: no page\n0 passed, 1 failed")
    size = options.html.stat().st_size
    check("one file of 6 MB at most", size <= 6 << 20, f"{size / 1e6:.2f} MB")
    if "node" in options.only:
        (work / "node").mkdir()
        check_trainers(options.html, work / "node")
        check_explain(options.html, work / "node")
        check_errors(options.html, work / "node")
    for kind, name in ((chromium, "chromium"), (firefox, "firefox")):
        if name in options.only:
            check_browser(kind, name.capitalize(), work / name)
finally:
    shutil.rmtree(work, ignore_errors=True)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
