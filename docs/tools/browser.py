"""browser.py: a page in headless Chromium, driven over its DevTools pipe by the standard library alone.

    from browser import Browser
    with Browser() as browser:                              # Debian's chromium, or $CHROMIUM
        page = browser.open("docs/book.html", width=360, dark=True)     # a path or a URL; returns when it has loaded
        page.errors                                         # what the console, scripts and loading complained of: [] is well
        page.requests                                       # what it asked for, itself first
        page.evaluate("document.title")                     # a JSON value; a promise is awaited; an exception raises
        page.overflow()                                     # pixels by which the page is wider than its window: 0 is well
        page.contrast()                                     # texts under WCAG AA: [{"text", "ratio", "needed", "colour", "background", "element"}]
        page.press("/"); page.type("kl"); page.press("Enter")           # keys, as a keyboard sends them
        page.screenshot("/tmp/book.png", full=True)         # the window, or the whole page
        page.pdf("/tmp/book.pdf")                           # as it prints
        page.set(width=1400, dark=False, media="print")     # the same page in another window
        page.close()

Nothing is asked of the network: a page that needs it has errors. `python3 docs/tools/browser.py FILE WIDTH [dark] PNG` takes a picture.
"""

import base64, fcntl, json, os, pathlib, select, shutil, subprocess, sys, tempfile, time

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--mute-audio",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
]
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Tab": ("Tab", 9, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
    " ": ("Space", 32, " "),
}

# Contrast of every visible text with what is painted behind it: WCAG 2.1's formula, colours composited from the root
# inwards. An SVG text lies on the filled shapes drawn before it that contain its middle. Colours pass through a canvas:
# it understands every notation that CSS has.
CONTRAST = r"""(() => {
  const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
  const paint = canvas.getContext('2d', {willReadFrequently: true}), known = new Map();
  const rgba = text => {
    if (!known.has(text)) {
      paint.clearRect(0, 0, 1, 1); paint.fillStyle = '#000'; paint.fillStyle = text; paint.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data; known.set(text, [r, g, b, a / 255]);
    }
    return known.get(text);
  };
  const over = (top, alpha, under) => [0, 1, 2].map(i => top[i] * alpha + under[i] * (1 - alpha));
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)]; return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05); };
  const hex = c => '#' + c.map(v => Math.round(v).toString(16).padStart(2, '0')).join('');
  const styles = new Map(), style = e => { if (!styles.has(e)) styles.set(e, getComputedStyle(e)); return styles.get(e); };
  const base = matchMedia('(prefers-color-scheme: dark)').matches && /dark/.test(getComputedStyle(document.documentElement).colorScheme) ? [18, 18, 18] : [255, 255, 255];
  const behind = new Map();
  const background = e => {                     // what is painted behind e's text, as far as HTML paints it
    if (!e) return {colour: base, opacity: 1, image: ''};
    if (behind.has(e)) return behind.get(e);
    const outer = background(e.parentElement), s = style(e), svg = e instanceof SVGElement && e.localName !== 'svg';
    const c = svg ? [0, 0, 0, 0] : rgba(s.backgroundColor), opacity = outer.opacity * parseFloat(s.opacity);
    const image = !svg && s.backgroundImage !== 'none' ? s.backgroundImage : c[3] === 1 ? '' : outer.image;
    const result = {colour: over(c, c[3] * opacity, outer.colour), opacity, image};
    behind.set(e, result); return result;
  };
  const shapes = new Map();
  const svgShapes = root => {
    if (!shapes.has(root)) shapes.set(root, [...root.querySelectorAll('rect, path, polygon, circle, ellipse')].filter(e => e.checkVisibility() && !e.closest('defs, clipPath, mask, symbol, marker')));
    return shapes.get(root);
  };
  const faults = [];
  const judge = (e, text, colour, under, rect, size, weight) => {
    const b = background(e); let back = b.colour;
    if (under) for (const shape of svgShapes(e.ownerSVGElement || e)) {
      if (!(shape.compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
      const s = style(shape); if (s.fill === 'none' || s.fill.startsWith('url')) continue;
      const r = shape.getBoundingClientRect(), x = rect.left + rect.width / 2, y = rect.top + rect.height / 2;
      if (r.left > x || r.right < x || r.top > y || r.bottom < y) continue;
      if (shape.isPointInFill && shape.localName !== 'rect') {
        const m = shape.getScreenCTM(); if (m && !shape.isPointInFill(new DOMPoint(x, y).matrixTransform(m.inverse()))) continue;
      }
      const f = rgba(s.fill); let alpha = f[3] * parseFloat(s.fillOpacity);
      for (let p = shape; p instanceof SVGElement; p = p.parentElement) alpha *= parseFloat(style(p).opacity);
      back = over(f, alpha, back);
    }
    const c = rgba(colour), front = over(c, c[3] * b.opacity, back), found = ratio(front, back);
    const needed = size >= 24 || (size >= 18.66 && weight >= 700) ? 3 : 4.5;
    if (found >= needed && !b.image) return;
    const name = e.localName + (e.id ? '#' + e.id : '') + (typeof e.className === 'string' && e.className ? '.' + e.className.trim().replace(/\s+/g, '.') : '');
    faults.push({text: text.trim().slice(0, 40), ratio: Math.round(found * 100) / 100, needed, colour: hex(front), background: b.image || hex(back), element: name});
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = document.createRange();
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || !e || e.closest('script, style, noscript, template, title, desc, [disabled]') || !e.checkVisibility({visibilityProperty: true})) continue;
    range.selectNodeContents(node);
    const rect = range.getBoundingClientRect(), s = style(e), svg = e instanceof SVGElement, box = e.getBoundingClientRect();
    if (rect.width < 1 || rect.height < 1 || (s.position === 'absolute' && box.width <= 1 && box.height <= 1)) continue;
    judge(e, node.data, svg ? s.fill : s.color, svg, rect, parseFloat(s.fontSize), parseInt(s.fontWeight));
  }
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility({visibilityProperty: true}) || e instanceof SVGElement) continue;
    for (const pseudo of e.placeholder ? ['::placeholder', '::before', '::after'] : ['::before', '::after']) {
      const s = getComputedStyle(e, pseudo), text = pseudo === '::placeholder' ? e.placeholder : /^"(.*)"$/.test(s.content) ? s.content.slice(1, -1) : '';
      if (/[^\s\u200b]/.test(text)) judge(e, text, s.color, false, null, parseFloat(s.fontSize), parseInt(s.fontWeight));
    }
  }
  return faults;
})()"""


class Browser:
    def __init__(self, program=None):
        program = (
            program
            or os.environ.get("CHROMIUM")
            or shutil.which("chromium")
            or shutil.which("chromium-browser")
            or shutil.which("google-chrome")
        )
        if not program:
            raise RuntimeError(
                "no Chromium: apt-get install chromium, or set CHROMIUM to the program"
            )
        self.folder = tempfile.mkdtemp(prefix="browser.")
        to_child, self.write = os.pipe()
        self.read, from_child = os.pipe()
        high = [
            fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_child, from_child)
        ]  # Chromium reads from 3 and writes to 4
        os.close(to_child), os.close(from_child)
        command = [
            "bash",
            "-c",
            'exec "$@" 3<&%d 4>&%d' % tuple(high),
            "bash",
            program,
            *FLAGS,
            f"--user-data-dir={self.folder}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            command,
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in high:
            os.close(fd)
        self.buffer, self.number, self.answers, self.pages = b"", 0, {}, {}
        self.call("Browser.getVersion")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if not self.process:
            return
        try:
            self.call("Browser.close", timeout=5)
        except (RuntimeError, OSError):
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.write), os.close(self.read)
        self.process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def receive(self, until):
        """One message, an answer or an event, until the time is up; False when none came."""
        while b"\0" not in self.buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.read], [], [], left)[0]:
                return False
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium ended")
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        if "id" in message:
            self.answers[message["id"]] = message
        elif message.get("sessionId") in self.pages:
            self.pages[message["sessionId"]].event(message["method"], message["params"])
        return True

    def call(self, method, session=None, timeout=60, **parameters):
        self.number += 1
        number, until = self.number, time.monotonic() + timeout
        text = (
            json.dumps(
                {
                    "id": number,
                    "method": method,
                    "params": parameters,
                    **({"sessionId": session} if session else {}),
                }
            ).encode()
            + b"\0"
        )
        while text:
            text = text[os.write(self.write, text) :]
        while number not in self.answers:
            if not self.receive(until):
                raise RuntimeError(f"{method}: no answer in {timeout} s")
        answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def open(self, where, width=1400, height=900, dark=False, media="", timeout=60, scripts=True):
        """A new tab with this file or address, at this width in CSS pixels, in light or dark, with
        its scripts or without."""
        url = (
            where
            if "://" in where or where.startswith(("about:", "data:"))
            else pathlib.Path(where).resolve().as_uri()
        )
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(
            self,
            target,
            self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"],
        )
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(domain + ".enable")
        page.set(width, height, dark, media)
        if not scripts:
            page.call("Emulation.setScriptExecutionDisabled", value=True)
        failure = page.call("Page.navigate", url=url).get("errorText")
        if failure:
            raise RuntimeError(f"{url}: {failure}")
        until = time.monotonic() + timeout
        while not page.loaded:
            if not self.receive(until):
                raise RuntimeError(f"{url}: not loaded in {timeout} s")
        if scripts:
            page.settle()
        return page


class Page:
    def __init__(self, browser, target, session):
        self.browser, self.target, self.session, self.loaded = browser, target, session, False
        self.errors, self.requests = [], []
        browser.pages[session] = self

    def call(self, method, timeout=60, **parameters):
        return self.browser.call(method, self.session, timeout, **parameters)

    def event(self, method, p):
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            d = p["exceptionDetails"]
            self.errors.append(
                f"exception: {d.get('exception', {}).get('description') or d['text']} (line {d['lineNumber'] + 1})"
            )
        elif method == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert", "warning"):
            self.errors.append(
                f"console.{p['type']}: "
                + " ".join(str(a.get("value", a.get("description", ""))) for a in p["args"])
            )
        elif method == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
            self.errors.append(
                f"{p['entry']['level']}: {p['entry']['text']} {p['entry'].get('url', '')}".strip()
            )
        elif method == "Network.requestWillBeSent":
            url = p["request"]["url"]
            self.requests.append(url)
            if not url.startswith(("file:", "data:", "about:", "blob:", "chrome")):
                self.errors.append(f"asks the network: {url}")

    def set(self, width=1400, height=900, dark=False, media=""):
        """The window: width and height in CSS pixels, colour scheme, medium ("" or "print")."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[
                {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )

    def evaluate(self, script, timeout=60):
        r = self.call(
            "Runtime.evaluate",
            timeout,
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in r:
            raise RuntimeError(
                r["exceptionDetails"].get("exception", {}).get("description")
                or r["exceptionDetails"]["text"]
            )
        return r["result"].get("value")

    def settle(self):
        """Two frames: what scripts and layout had still to do is done."""
        self.evaluate(
            "new Promise(done => { requestAnimationFrame(() => requestAnimationFrame(() => done(true))); setTimeout(() => done(true), 1000); })"
        )

    def press(self, key, shift=False, settle=True):
        """One key: a character, or Enter, Escape, Tab, an arrow, Home, End."""
        code, number, text = KEYS.get(key, ("", ord(key[0].upper()) if key.isalnum() else 0, key))
        common = dict(key=key, code=code, windowsVirtualKeyCode=number, modifiers=8 if shift else 0)
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            **common,
            **({"text": text} if text else {}),
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)
        if settle:
            self.settle()

    def type(self, text):
        for character in text:
            self.press(character, settle=False)
        self.settle()

    def overflow(self):
        return self.evaluate("Math.max(0, document.scrollingElement.scrollWidth - innerWidth)")

    def contrast(self):
        return self.evaluate(CONTRAST, timeout=300)

    def screenshot(self, path, full=False):
        clip = {}
        if full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {
                "captureBeyondViewport": True,
                "clip": {
                    "x": 0,
                    "y": 0,
                    "width": size["width"],
                    "height": min(size["height"], 16000),
                    "scale": 1,
                },
            }
        with open(path, "wb") as f:
            f.write(
                base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
            )

    def pdf(self, path):
        with open(path, "wb") as f:
            f.write(
                base64.b64decode(
                    self.call(
                        "Page.printToPDF",
                        timeout=300,
                        preferCSSPageSize=True,
                        printBackground=False,
                    )["data"]
                )
            )

    def close(self):
        self.browser.pages.pop(self.session, None)
        self.browser.call("Target.closeTarget", targetId=self.target)


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    with Browser() as b:
        p = b.open(sys.argv[1], int(sys.argv[2]), dark="dark" in sys.argv[3:-1])
        p.screenshot(sys.argv[-1], full=True)
        print(f"{p.errors} overflow {p.overflow()} contrast {p.contrast()}")
