#!/usr/bin/env python3
"""check_book.py [FILE]: is docs/book.html (or FILE) whole, true and readable? From the folder of align.c.

Whole: it is what docs/tools/make_book.py makes; every token of align.c's code and every word of its comments is there; every function has its
anchor, every term both definitions and the places of its use; every internal link resolves, no id is there twice, nothing is asked of the
network. Readable, in Chromium, at 360, 768 and 1400 pixels, light and dark: no console error, no overflow, every text's contrast passes
WCAG AA; search, drawer, jumps and print work. Ends with 'N passed, N failed', exit 1 on failure."""
import html.parser, os, re, sys
from collections import Counter
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import make_book
from browser import Browser

VOID = {"meta", "link", "input", "br", "wbr"}
passed = failed = 0


def check(name, faults, note=""):
    """One check: it failed if there are faults."""
    global passed, failed
    faults = [str(f) for f in faults]
    if faults: failed += 1
    else: passed += 1
    print(f"{'FAIL' if faults else 'ok  '}  {name}" + (": " + "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "") if faults else f" {note}".rstrip()), flush=True)


class Page(html.parser.HTMLParser):
    """Ids, links, texts of a page, and what stands in which row."""
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.faults, self.stack = Counter(), [], [], [], []
        self.code, self.prose, self.style, self.headings = [], [], [], []
        self.term_uses, self.term_backs, self.definitions = {}, {}, {}         # by id of the term
        self.place, self.row, self.term, self.fact = "", "", "", ""
        self.feed(text)
        if self.stack: self.faults.append(f"<{self.stack[-1][0]}> is not closed")

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        kind = (a.get("class") or "").split()
        if "id" in a: self.ids[a["id"]] += 1
        if tag not in VOID: self.stack.append((tag, kind, a))
        if tag in ("h1", "h2", "h3", "h4"): self.headings.append((int(tag[1]), a))
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
            if self.fact == "Used at": self.term_backs[self.term].add(a["href"][1:])
            if "t" in kind and self.place: self.term_uses.setdefault(a["href"][1:], set()).add(self.place)
        elif "src" in a or (tag == "link" and not a.get("href", "").startswith("data:")): self.loads.append(f"<{tag}> {a.get('src') or a.get('href')}")
        if "r" in kind: self.row = self.place = a["id"]
        if "intro" in kind: self.place = "intro"
        if self.place == "intro" and tag in ("h2", "h3") and "id" in a: self.place = a["id"]
        if "term" in kind and tag == "section":
            self.term, self.place = a["aria-labelledby"], ""
            self.term_backs[self.term], self.definitions[self.term] = set(), {}

    def handle_endtag(self, tag):
        if not self.stack or self.stack[-1][0] != tag: self.faults.append(f"</{tag}> closes <{self.stack[-1][0] if self.stack else ''}> at line {self.getpos()[0]}")
        else:
            _, kind, _ = self.stack.pop()
            if "code" in kind and tag == "pre": self.code.append("\n")
            if tag == "dd": self.fact = ""

    def handle_data(self, data):
        tags = [tag for tag, _, _ in self.stack]
        if "style" in tags: self.style.append(data)
        if "script" in tags or "style" in tags or "nav" in tags: return
        self.prose.append(data)
        if any("code" in kind and tag == "pre" for tag, kind, _ in self.stack): self.code.append(data)
        if tags and tags[-1] == "dt": self.fact = data
        for tag, kind, a in self.stack:
            if self.term and tag == "p" and kind in (["en"], ["pt"]): self.definitions[self.term][(kind[0], a.get("lang", ""))] = self.definitions[self.term].get((kind[0], a.get("lang", "")), "") + data


def functions_of(source):
    """Names of the functions that begin at the margin: 'type name(arguments) {'."""
    names = []
    for line in re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), source, flags=re.S).split("\n"):
        if not re.match(r"[A-Za-z_][^;=]*\) \{", line) or re.match(r"(struct|enum|union|typedef) \w+ \{", line): continue
        depth, end = 0, line.index(") {")
        for start in range(end, -1, -1):
            depth += (line[start] == ")") - (line[start] == "(")
            if depth == 0: break
        names.append(re.search(r"(\w+)$", line[:start])[1])
    return names


def bare(code): return [word for group, word in make_book.tokens(code) if group not in ("space", "line", "comment")]


def check_text(text, source, glossary):
    page = Page(text)
    check("well formed", page.faults)
    if "viewport" not in text or not text.startswith('<!DOCTYPE html>\n<html lang="en">'): check("doctype, lang and viewport", ["missing"])
    check("one file: nothing else is loaded", page.loads + re.findall(r"@import[^;]*|url\([^)]*\)|https?://[^\s\"'<)]+", text.replace("https://git-lfs.github.com/", "")))   # a string of align.c
    check("under 2.5 MB", [] if len(text.encode()) < 2.5e6 else [f"{len(text.encode())} bytes"], f"({len(text.encode()) / 1e6:.2f} MB)")
    check("no id is there twice", [i for i, n in page.ids.items() if n > 1], f"({len(page.ids)} ids)")
    check("every internal link resolves", sorted({link for link in page.links if not link.startswith("#") or link[1:] not in page.ids}), f"({len(page.links)} links)")
    functions = functions_of(source)
    check("every function has its anchor", [f for f in dict.fromkeys(functions) if "fn-" + f not in page.ids], f"({len(set(functions))} functions)")
    chapters = re.findall(r"(?m)^ \* Chapter (\d+) - ", source)
    check("every chapter has its anchor", [c for c in chapters if "chapter-" + c not in page.ids], f"({len(chapters)} chapters)")
    levels = [level for level, _ in page.headings]
    check("headings: no level is left out", [f"h{a} then h{b}" for a, b in zip(levels, levels[1:]) if b > a + 1 and not (a == 1)], f"({len(levels)} headings)")
    wanted, found = bare(source), bare("".join(page.code))
    at = next((i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))
    check("all code is there, in order", [] if wanted == found else [f"token {at}: align.c has {wanted[at:at + 6]}, the book {found[at:at + 6]}"], f"({len(wanted)} tokens)")
    words = lambda t: Counter(re.findall(r"[^\W_]+", t.lower()))
    comments = " ".join(word for group, word in make_book.tokens(source) if group == "comment")
    comments = re.sub(r"\[glossary: (?!TERM)[^\]]*\]|\btest: |Chapter \d+ - ", " ", comments)
    repeated = words(" ".join(re.findall(r"/\* ?(\w+)(?: --|:) ", source)))            # "name -- what it does": the name is the heading
    lost = words(comments) - words(" ".join(page.prose)) - repeated
    check("no word of a comment is lost", [f"{w} ({n})" for w, n in lost.items()], f"({sum(words(comments).values())} words)")
    terms = make_book.read_glossary(glossary)
    check("every term has both definitions", [t["name"] for t in terms if not all(len(page.definitions.get("term-" + make_book.slug(t["name"]), {}).get(k, "")) > 40 for k in (("en", ""), ("pt", "pt-BR")))], f"({len(terms)} terms)")
    check("every term is used, and says where", [t for t, backs in page.term_backs.items() if not backs])
    faults = []
    for term, backs in page.term_backs.items():
        uses = page.term_uses.get(term, set())
        ahead = {b if b in uses or not re.match(r"(struct|enum)-", b) else next((u for u in uses if u.startswith("row-")), b) for b in backs}
        faults += [f"{term}: {b} has no link to it" for b in ahead - uses] + [f"{term}: no way back to {u}" for u in uses - ahead if not any(re.match(r"(struct|enum)-", b) for b in backs)]
    check("every use of a term is a link there and back", faults, f"({sum(len(b) for b in page.term_backs.values())} uses)")
    tags = {tag for tag in re.findall(r"\[glossary: ([^\]]+)\]", source) if tag != "TERM"}
    known = {name for t in terms for name in (t["name"], t["english name"], *t["Aliases"].split("; "))}
    check("every tag is a term", sorted(tags - known), f"({len(tags)} tags)")
    check_colours("".join(page.style))


def ratio(a, b):
    def luminance(c): return sum(k * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for k, v in zip((0.2126, 0.7152, 0.0722), (int(c[i:i + 2], 16) / 255 for i in (1, 3, 5))))
    x, y = luminance(a), luminance(b)
    return (max(x, y) + 0.05) / (min(x, y) + 0.05)


def check_colours(style):
    blocks = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{([^}]*--paper[^}]*)\}", style)]
    pairs = [(t, "paper") for t in ("ink", "soft", "link", "term")] + [(t, "panel") for t in ("ink", "soft", "link", "term", "keyword", "string", "comment", "macro")] + [("term", "wash"), ("ink", "wash"), ("soft", "wash"), ("ink", "mark")]
    if len(blocks) != 2: check("colours", [f"{len(blocks)} palettes, expected light and dark"])
    for name, block in zip(("light", "dark"), blocks):
        rated = sorted((ratio(block[a], block[b]), f"{a} on {b}") for a, b in pairs)
        faint = [f"focus on {b}: {ratio(block['focus'], block[b]):.2f}" for b in ("paper", "panel") if ratio(block["focus"], block[b]) < 3]
        check(f"contrast of the palette, {name}", [f"{pair}: {r:.2f}" for r, pair in rated if r < 4.5] + faint, f"(lowest {rated[0][0]:.2f}, {rated[0][1]})")


JUMPS = """(async () => {
  const bar = document.querySelector('.top').getBoundingClientRect(), out = [], marks = [...document.querySelectorAll('h2[id], h4[id], .r[id^=fn-]')];
  for (let i = 0; i < marks.length; i += 23) {
    location.hash = marks[i].id; await new Promise(requestAnimationFrame);
    const r = (marks[i].querySelector('h3') || marks[i]).getBoundingClientRect();
    if (r.top < bar.bottom - 1 || r.top > innerHeight) out.push(marks[i].id + ' at ' + Math.round(r.top));
  }
  return out;
})()"""
MEASURE = """(() => { const c = [];
  for (const e of document.querySelectorAll('.r:not(.text) .p > p:not(.meta):not(.terms)')) { const n = Math.round(e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight)); if (n >= 4) c.push(e.textContent.length / (n - .5)); }
  c.sort((a, b) => a - b); return c[c.length >> 1]; })()"""
COLUMNS = """(() => [...document.querySelectorAll('.r:not(.bare):not(.text)')].filter(r => { const [p, c] = [...r.children].map(e => e.getBoundingClientRect()); return !(%s); }).map(r => r.id))()"""


def search(page, words):
    """Types into the search box, opened by /; what the list says."""
    page.press("/")
    page.evaluate("document.querySelector('#search').value = ''")
    page.type(words)
    return page.evaluate("({focus: document.activeElement.id, count: document.querySelector('#count').textContent, open: !document.querySelector('#found').hidden, first: (document.querySelector('#results [aria-selected=true]') || {}).textContent || ''})")


def check_search(page):
    name = page.evaluate("(document.getElementById('fn-ppo_loss') || document.querySelector('.r[id^=fn-]')).id.slice(3)")
    r = search(page, name)
    check("search: / opens it, a function comes first", [] if r["focus"] == "search" and r["open"] and name in r["first"] and "function" in r["first"] else [r], f"({name}: {r['count']})")
    page.press("Enter")
    where = page.evaluate("({hash: location.hash, open: !document.querySelector('#found').hidden, focus: document.activeElement.id, top: document.getElementById(location.hash.slice(1)).getBoundingClientRect().top})")
    check("search: Enter goes there and takes the focus along", [] if where["hash"] == "#fn-" + name == "#" + where["focus"] and not where["open"] and 0 < where["top"] < 300 else [where])
    r = search(page, "divergencia de kullback")
    check("search: a term by its Portuguese name, without accents", [] if "Divergência de Kullback" in r["first"] else [r], f"({r['count']})")
    text = page.evaluate("[...document.querySelectorAll('.r .p > p:not(.meta):not(.terms)')].map(p => p.textContent).filter(t => t.length > 90)[40].slice(20, 60).trim()")
    r = search(page, text)
    check("search: words of the text", [] if r["open"] and text.split()[2] in r["first"] else [text, r], f"({text!r}: {r['count']})")
    page.press("Enter")
    shown = page.evaluate("[...CSS.highlights.get('found') || []].length")
    check("search: what was found is marked", [] if shown else ["nothing is marked"], f"({shown})")
    r = search(page, "sort")
    before = page.evaluate("document.querySelector('#search').getAttribute('aria-activedescendant')")
    page.press("ArrowDown")
    after = page.evaluate("document.querySelector('#search').getAttribute('aria-activedescendant')")
    check("search: arrows move the choice", [] if before and after and before != after else [before, after])
    page.press("Escape")
    check("search: Escape closes it", [] if page.evaluate("document.querySelector('#found').hidden && document.activeElement.id !== 'search'") else ["still open"])
    r = search(page, "qqzzxx")
    check("search: nothing found is said", [] if r["count"] == "Nothing found" else [r])
    page.press("Escape")


def check_browser(path):
    with Browser() as browser:
        for width in (360, 768, 1400):
            for dark in (False, True):
                page = browser.open(path, width, dark=dark)
                name = f"{width} px, {'dark' if dark else 'light'}"
                check(f"{name}: no error", page.errors)
                check(f"{name}: no overflow", [f"{page.overflow()} pixels"] if page.overflow() else [])
                faint = page.contrast()
                check(f"{name}: contrast", [f"{f['text']!r} {f['colour']} on {f['background']}: {f['ratio']}" for f in faint])
                if not dark:
                    check(f"{name}: {'prose beside its code' if width == 1400 else 'prose above its code'}", page.evaluate(COLUMNS % ("p.right <= c.left" if width == 1400 else "p.bottom <= c.top")))
                    check(f"{name}: a jump lands below the bar", page.evaluate(JUMPS))
                    if width != 768: check_search(page)
                if width == 1400 and not dark:
                    measure = page.evaluate(MEASURE)
                    check("60 to 75 letters of prose a line", [] if 60 <= measure <= 75 else [f"{measure:.1f}"], f"({measure:.1f})")
                    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
                    page.set(700, 1000, dark=True, media="print")
                    hidden = page.evaluate("['.top', 'nav', '.skip'].filter(s => document.querySelector(s).checkVisibility())")
                    dark_ink = page.evaluate("getComputedStyle(document.documentElement).color")
                    check("print: text alone, dark on white", hidden + ([] if dark_ink == "rgb(36, 34, 29)" else [dark_ink]) + ([f"overflow {page.overflow()}"] if page.overflow() else []))
                page.close()
        page = browser.open(path, 1400)
        page.press("Tab")
        check("the first Tab shows the way past the chapters", [] if page.evaluate("document.activeElement.className === 'skip' && document.activeElement.getBoundingClientRect().top >= 0") else [page.evaluate("document.activeElement.outerHTML.slice(0, 80)")])
        page.close()
        page = browser.open(path, 360)
        shown = "document.querySelector('#toc').checkVisibility()"
        before = page.evaluate(shown)
        page.evaluate("document.querySelector('#menu').click()")
        during = page.evaluate(shown + " && document.querySelector('#toc').contains(document.activeElement) && document.querySelector('#menu').getAttribute('aria-expanded') === 'true'")
        page.press("Escape")
        after = page.evaluate(shown + " || document.activeElement.id !== 'menu'")
        check("phone: the drawer opens, takes the focus, closes with Escape", [] if (before, during, after) == (False, True, False) else [before, during, after])
        check("no error after all this", page.errors)


def main():
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]: sys.exit(__doc__)
    path = sys.argv[1] if len(sys.argv) == 2 else make_book.BOOK
    if not os.path.exists(path): sys.exit(f"{path} is not there: make book")
    text, source, glossary = make_book.read(path), make_book.read(make_book.SOURCE), make_book.read(make_book.GLOSSARY)
    check(f"it is what {make_book.SOURCE} and {make_book.GLOSSARY} make", [] if text == make_book.make(source, glossary) else ["it is not: make book"])
    check_text(text, source, glossary)
    try: check_browser(path)
    except RuntimeError as error: check("Chromium", [error])
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__": main()
