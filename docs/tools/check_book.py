#!/usr/bin/env python3
"""check_book.py [FILE]: is docs/book.html (or FILE) whole, true and readable?

From the folder of align.c.

Whole: it is what docs/tools/make_book.py makes; every token of align.c's code and every word of its
comments is there; every function has its anchor, every term both definitions and the places of its
use; every internal link resolves, no id is there twice, nothing is asked of the network. Readable,
in Chromium, at 360, 768 and 1400 pixels, light and dark: no console error, no overflow, every
text's contrast passes WCAG AA; search, drawer, jumps and print work. Ends with 'N passed, N
failed', exit 1 on failure.
"""

import html.parser
import os
import re
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import make_book  # noqa: E402
from browser import Browser  # noqa: E402

VOID = {"meta", "link", "input", "br", "wbr"}
passed = failed = 0


def check(name, faults, note=""):
    """One check: it failed if there are faults."""
    global passed, failed
    faults = [str(f) for f in faults]
    if faults:
        failed += 1
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        print(f"FAIL  {name}: {'; '.join(faults[:5])}{more}", flush=True)
    else:
        passed += 1
        print(f"ok    {name} {note}".rstrip(), flush=True)


def expect(name, good, seen, note=""):
    """One check: if it is not good, what was seen (a value, or a list of them) is the fault."""
    check(name, [] if good else seen if isinstance(seen, list) else [seen], note)


class Page(html.parser.HTMLParser):
    """Ids, links, texts of a page, and what stands in which row."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.faults, self.stack = Counter(), [], [], [], []
        self.code, self.prose, self.style, self.headings = [], [], [], []
        self.term_uses, self.term_backs, self.definitions = {}, {}, {}  # by id of the term
        self.place, self.row, self.term, self.fact = "", "", "", ""
        self.feed(text)
        if self.stack:
            self.faults.append(f"<{self.stack[-1][0]}> is not closed")

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        kind = (a.get("class") or "").split()
        if "id" in a:
            self.ids[a["id"]] += 1
        if tag not in VOID:
            self.stack.append((tag, kind, a))
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), a))
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
            if self.fact == "Used at":
                self.term_backs[self.term].add(a["href"][1:])
            if "t" in kind and self.place:
                self.term_uses.setdefault(a["href"][1:], set()).add(self.place)
        elif "src" in a or (tag == "link" and not a.get("href", "").startswith("data:")):
            self.loads.append(f"<{tag}> {a.get('src') or a.get('href')}")
        if "r" in kind:
            self.row = self.place = a["id"]
        if "intro" in kind:
            self.place = "intro"
        if self.place == "intro" and tag in ("h2", "h3") and "id" in a:
            self.place = a["id"]
        if "term" in kind and tag == "section":
            self.term, self.place = a["aria-labelledby"], ""
            self.term_backs[self.term], self.definitions[self.term] = set(), {}

    def handle_endtag(self, tag):
        opened = self.stack[-1][0] if self.stack else ""
        if opened != tag:
            self.faults.append(f"</{tag}> closes <{opened}> at line {self.getpos()[0]}")
        else:
            _, kind, _ = self.stack.pop()
            if "code" in kind and tag == "pre":
                self.code.append("\n")
            if tag == "dd":
                self.fact = ""

    def handle_data(self, data):
        tags = [tag for tag, _, _ in self.stack]
        if "style" in tags:
            self.style.append(data)
        if "script" in tags or "style" in tags or "nav" in tags:
            return
        self.prose.append(data)
        if any("code" in kind and tag == "pre" for tag, kind, _ in self.stack):
            self.code.append(data)
        if tags and tags[-1] == "dt":
            self.fact = data
        for tag, kind, a in self.stack:
            if self.term and tag == "p" and kind in (["en"], ["pt"]):
                key, texts = (kind[0], a.get("lang", "")), self.definitions[self.term]
                texts[key] = texts.get(key, "") + data


def functions_of(source):
    """Names of the functions that begin at the margin: 'type name(arguments) {'."""
    names = []
    code = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), source, flags=re.S)
    for line in code.split("\n"):
        if not re.match(r"[A-Za-z_][^;=]*\) \{", line):
            continue
        if re.match(r"(struct|enum|union|typedef) \w+ \{", line):
            continue
        depth, end = 0, line.index(") {")
        for start in range(end, -1, -1):
            depth += (line[start] == ")") - (line[start] == "(")
            if depth == 0:
                break
        names.append(re.search(r"(\w+)$", line[:start])[1])
    return names


def bare(code):
    no_code = ("space", "line", "comment")
    return [word for group, word in make_book.tokens(code) if group not in no_code]


def check_text(text, source, glossary):
    page = Page(text)
    check("well formed", page.faults)
    if "viewport" not in text or not text.startswith('<!DOCTYPE html>\n<html lang="en">'):
        check("doctype, lang and viewport", ["missing"])
    others = text.replace("https://git-lfs.github.com/", "")  # a string of align.c
    loads = re.findall(r"@import[^;]*|url\((?!#)[^)]*\)|https?://[^\s\"'<)]+", others)
    check("one file: nothing else is loaded", page.loads + loads)
    size = len(text.encode())
    expect("under 3.5 MB", size < 3.5e6, f"{size} bytes", f"({size / 1e6:.2f} MB)")
    twice = [i for i, n in page.ids.items() if n > 1]
    check("no id is there twice", twice, f"({len(page.ids)} ids)")
    dead = {link for link in page.links if not link.startswith("#") or link[1:] not in page.ids}
    check("every internal link resolves", sorted(dead), f"({len(page.links)} links)")
    functions = functions_of(source)
    check(
        "every function has its anchor",
        [f for f in dict.fromkeys(functions) if "fn-" + f not in page.ids],
        f"({len(set(functions))} functions)",
    )
    chapters = re.findall(r"(?m)^ \* Chapter (\d+) - ", source)
    check(
        "every chapter has its anchor",
        [c for c in chapters if "chapter-" + c not in page.ids],
        f"({len(chapters)} chapters)",
    )
    levels = [level for level, _ in page.headings]
    check(
        "headings: no level is left out",
        [f"h{a} then h{b}" for a, b in zip(levels, levels[1:]) if b > a + 1 and not (a == 1)],
        f"({len(levels)} headings)",
    )
    check_code(source, page)
    check_comments(source, page)
    terms = make_book.read_glossary(glossary)
    check_terms(page, terms)
    tags = {tag for tag in re.findall(r"\[glossary: ([^\]]+)\]", source) if tag != "TERM"}
    known = set()
    for t in terms:
        known |= {t["name"], t["english name"], *t["Aliases"].split("; ")}
    check("every tag is a term", sorted(tags - known), f"({len(tags)} tags)")
    check_colours("".join(page.style))


def check_code(source, page):
    wanted, found = bare(source), bare("".join(page.code))
    differ = (i for i, (a, b) in enumerate(zip(wanted, found)) if a != b)
    at = next(differ, min(len(wanted), len(found)))
    expect(
        "all code is there, in order",
        wanted == found,
        f"token {at}: align.c has {wanted[at:at + 6]}, the book {found[at:at + 6]}",
        f"({len(wanted)} tokens)",
    )


def check_comments(source, page):
    def words(t):
        return Counter(re.findall(r"[^\W_]+", t.lower()))

    comments = " ".join(word for group, word in make_book.tokens(source) if group == "comment")
    comments = re.sub(r"\[glossary: (?!TERM)[^\]]*\]|\btest: |Chapter \d+ - ", " ", comments)
    # "name -- what it does": the name is the heading
    repeated = words(" ".join(re.findall(r"/\* ?(\w+)(?: --|:) ", source)))
    lost = words(comments) - words(" ".join(page.prose)) - repeated
    check(
        "no word of a comment is lost",
        [f"{w} ({n})" for w, n in lost.items()],
        f"({sum(words(comments).values())} words)",
    )


def check_terms(page, terms):
    def defined(t):
        """Does the glossary's English and Portuguese stand at the term?"""
        texts = page.definitions.get("term-" + make_book.slug(t["name"]), {})
        return all(len(texts.get(k, "")) > 40 for k in (("en", ""), ("pt", "pt-BR")))

    undefined = [t["name"] for t in terms if not defined(t)]
    check("every term has both definitions", undefined, f"({len(terms)} terms)")
    unused = [t for t, backs in page.term_backs.items() if not backs]
    check("every term is used, and says where", unused)
    faults = []
    for term, backs in page.term_backs.items():
        uses = page.term_uses.get(term, set())
        a_row = next((u for u in uses if u.startswith("row-")), None)
        types = {b for b in backs if re.match(r"(struct|enum)-", b)}
        ahead = {a_row or b if b in types - uses else b for b in backs}
        faults += [f"{term}: {b} has no link to it" for b in ahead - uses]
        if not types:
            faults += [f"{term}: no way back to {u}" for u in uses - ahead]
    count = sum(len(b) for b in page.term_backs.values())
    check("every use of a term is a link there and back", faults, f"({count} uses)")


def luminance(colour):
    """Of "#rrggbb", from 0 to 1, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(k * v for k, v in zip((0.2126, 0.7152, 0.0722), linear))


def ratio(a, b):
    x, y = luminance(a), luminance(b)
    return (max(x, y) + 0.05) / (min(x, y) + 0.05)


def check_colours(style):
    palettes = re.findall(r":root \{([^}]*--paper[^}]*)\}", style)
    blocks = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", palette)) for palette in palettes]
    text, code = ["ink", "soft", "link", "term"], ["keyword", "string", "comment", "macro"]
    pairs = [(t, "paper") for t in text] + [(t, "panel") for t in text + code]
    pairs += [("term", "wash"), ("ink", "wash"), ("soft", "wash"), ("ink", "mark")]
    if len(blocks) != 2:
        check("colours", [f"{len(blocks)} palettes, expected light and dark"])
    for name, block in zip(("light", "dark"), blocks):
        rated = sorted((ratio(block[a], block[b]), f"{a} on {b}") for a, b in pairs)
        faint = [f"{pair}: {r:.2f}" for r, pair in rated if r < 4.5]
        for b in ("paper", "panel"):
            r = ratio(block["focus"], block[b])
            if r < 3:
                faint.append(f"focus on {b}: {r:.2f}")
        lowest = f"(lowest {rated[0][0]:.2f}, {rated[0][1]})"
        check(f"contrast of the palette, {name}", faint, lowest)


# Headings that a jump hides behind the bar or leaves below the window.
JUMPS = """(async () => {
  const bar = document.querySelector('.top').getBoundingClientRect(), out = [];
  const marks = [...document.querySelectorAll('h2[id], h4[id], .r[id^=fn-]')];
  for (let i = 0; i < marks.length; i += 23) {
    location.hash = marks[i].id; await new Promise(requestAnimationFrame);
    const r = (marks[i].querySelector('h3') || marks[i]).getBoundingClientRect();
    if (r.top < bar.bottom - 1 || r.top > innerHeight)
      out.push(marks[i].id + ' at ' + Math.round(r.top));
  }
  return out;
})()"""
# The median of letters a line, of paragraphs of four lines or more.
MEASURE = """(() => {
  const c = [];
  for (const e of document.querySelectorAll('.r:not(.text) .p > p:not(.meta):not(.terms)')) {
    const line = parseFloat(getComputedStyle(e).lineHeight);
    const n = Math.round(e.getBoundingClientRect().height / line);
    if (n >= 4) c.push(e.textContent.length / (n - .5));
  }
  c.sort((a, b) => a - b);
  return c[c.length >> 1];
})()"""
# Rows whose prose, p, and code, c, do not stand as they should.
COLUMNS = """(() => {
  const rows = [...document.querySelectorAll('.r:not(.bare):not(.text)')];
  return rows.filter(r => {
    const [p, c] = [...r.children].map(e => e.getBoundingClientRect());
    return !(%s);
  }).map(r => r.id);
})()"""
# What the list of a search says.
LISTED = """({
  focus: document.activeElement.id,
  count: document.querySelector('#count').textContent,
  open: !document.querySelector('#found').hidden,
  first: (document.querySelector('#results [aria-selected=true]') || {}).textContent || ''
})"""
# Where the page stands.
PLACE = """({
  hash: location.hash,
  open: !document.querySelector('#found').hidden,
  focus: document.activeElement.id,
  top: document.getElementById(location.hash.slice(1)).getBoundingClientRect().top
})"""
# Forty letters of a paragraph in the middle of the book.
QUOTE = """[...document.querySelectorAll('.r .p > p:not(.meta):not(.terms)')]
  .map(p => p.textContent).filter(t => t.length > 90)[40].slice(20, 60).trim()"""
CHOSEN = "document.querySelector('#search').getAttribute('aria-activedescendant')"
CLOSED = "document.querySelector('#found').hidden && document.activeElement.id !== 'search'"
PRINTED = "['.top', 'nav', '.skip'].filter(s => document.querySelector(s).checkVisibility())"
SKIPS = """document.activeElement.className === 'skip'
  && document.activeElement.getBoundingClientRect().top >= 0"""
DRAWER = "document.querySelector('#toc').checkVisibility()"
IN_DRAWER = """document.querySelector('#toc').contains(document.activeElement)
  && document.querySelector('#menu').getAttribute('aria-expanded') === 'true'"""


def search(page, words):
    """Types into the search box, opened by /; what the list says."""
    page.press("/")
    page.evaluate("document.querySelector('#search').value = ''")
    page.type(words)
    return page.evaluate(LISTED)


def check_search(page):
    function = "document.getElementById('fn-ppo_loss') || document.querySelector('.r[id^=fn-]')"
    name = page.evaluate(f"({function}).id.slice(3)")
    r = search(page, name)
    first = name in r["first"] and "function" in r["first"]
    expect(
        "search: / opens it, a function comes first",
        r["focus"] == "search" and r["open"] and first,
        r,
        f"({name}: {r['count']})",
    )
    page.press("Enter")
    at = page.evaluate(PLACE)
    there = at["hash"] == "#fn-" + name == "#" + at["focus"] and 0 < at["top"] < 300
    expect("search: Enter goes there and takes the focus along", there and not at["open"], at)
    r = search(page, "divergencia de kullback")
    expect(
        "search: a term by its Portuguese name, without accents",
        "Divergência de Kullback" in r["first"],
        r,
        f"({r['count']})",
    )
    text = page.evaluate(QUOTE)
    r = search(page, text)
    listed = r["open"] and text.split()[2] in r["first"]
    expect("search: words of the text", listed, [text, r], f"({text!r}: {r['count']})")
    page.press("Enter")
    shown = page.evaluate("[...CSS.highlights.get('found') || []].length")
    expect("search: what was found is marked", shown, "nothing is marked", f"({shown})")
    r = search(page, "sort")
    before = page.evaluate(CHOSEN)
    page.press("ArrowDown")
    after = page.evaluate(CHOSEN)
    moved = before and after and before != after
    expect("search: arrows move the choice", moved, [before, after])
    page.press("Escape")
    expect("search: Escape closes it", page.evaluate(CLOSED), "still open")
    r = search(page, "qqzzxx")
    expect("search: nothing found is said", r["count"] == "Nothing found", r)
    page.press("Escape")


def check_print(page):
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.set(700, 1000, dark=True, media="print")
    faults = page.evaluate(PRINTED)
    ink = page.evaluate("getComputedStyle(document.documentElement).color")
    if ink != "rgb(36, 34, 29)":
        faults.append(ink)
    if page.overflow():
        faults.append(f"overflow {page.overflow()}")
    check("print: text alone, dark on white", faults)


def check_window(page, width, dark):
    name = f"{width} px, {'dark' if dark else 'light'}"
    check(f"{name}: no error", page.errors)
    expect(f"{name}: no overflow", not page.overflow(), f"{page.overflow()} pixels")
    faint = [
        f"{f['text']!r} {f['colour']} on {f['background']}: {f['ratio']}" for f in page.contrast()
    ]
    check(f"{name}: contrast", faint)
    if dark:
        return
    if width == 1400:
        check(f"{name}: prose beside its code", page.evaluate(COLUMNS % "p.right <= c.left"))
    else:
        check(f"{name}: prose above its code", page.evaluate(COLUMNS % "p.bottom <= c.top"))
    check(f"{name}: a jump lands below the bar", page.evaluate(JUMPS))
    if width != 768:
        check_search(page)
    if width == 1400:
        letters = page.evaluate(MEASURE)
        shown = f"{letters:.1f}"
        expect("60 to 75 letters of prose a line", 60 <= letters <= 75, shown, f"({shown})")
        check_print(page)


def check_browser(path):
    with Browser() as browser:
        for width in (360, 768, 1400):
            for dark in (False, True):
                page = browser.open(path, width, dark=dark)
                check_window(page, width, dark)
                page.close()
        page = browser.open(path, 1400)
        page.press("Tab")
        focused = page.evaluate("document.activeElement.outerHTML.slice(0, 80)")
        shown = page.evaluate(SKIPS)
        expect("the first Tab shows the way past the chapters", shown, focused)
        page.close()
        page = browser.open(path, 360)
        before = page.evaluate(DRAWER)
        page.evaluate("document.querySelector('#menu').click()")
        during = page.evaluate(f"{DRAWER} && {IN_DRAWER}")
        page.press("Escape")
        after = page.evaluate(DRAWER + " || document.activeElement.id !== 'menu'")
        expect(
            "phone: the drawer opens, takes the focus, closes with Escape",
            (before, during, after) == (False, True, False),
            [before, during, after],
        )
        check("no error after all this", page.errors)


def main():
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]:
        sys.exit(__doc__)
    path = sys.argv[1] if len(sys.argv) == 2 else make_book.BOOK
    if not os.path.exists(path):
        sys.exit(f"{path} is not there: make book")
    files = (path, make_book.SOURCE, make_book.GLOSSARY)
    text, source, glossary = (make_book.read(name) for name in files)
    expect(
        f"it is what {make_book.SOURCE} and {make_book.GLOSSARY} make",
        text == make_book.make(source, glossary),
        "it is not: make book",
    )
    check_text(text, source, glossary)
    try:
        check_browser(path)
    except RuntimeError as error:
        check("Chromium", [error])
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
