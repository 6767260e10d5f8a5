#!/usr/bin/env python3
"""make_book.py [--check] [OUT]: renders align.c for reading, as one page, docs/book.html (or OUT). From the folder of align.c.

A row of the book is a comment at the margin and the code it stands before. Of a comment, indented lines are formulas, tables or drawings
and keep their layout; `in` and `out` lines become a list; other lines flow. [glossary: TERM], [N] (papers), `chapter N`, `test: NAME`
and the names of functions become links. Terms come from docs/glossary.md. The same input gives the same bytes.
--check: writes nothing; exit 1 if docs/book.html is not what align.c and the glossary make."""
import html, os, re, sys, unicodedata

SOURCE, GLOSSARY, BOOK = "align.c", "docs/glossary.md", "docs/book.html"
KEYWORDS = set("""auto break case char const continue default do double else enum extern float for goto if inline int long register return short signed sizeof
static struct switch typedef union unsigned void volatile while bool true false NULL size_t ssize_t uint8_t uint16_t uint32_t uint64_t int8_t int16_t int32_t
int64_t uintptr_t FILE va_list _Noreturn _Thread_local _Static_assert NAN INFINITY""".split())
TOKEN = re.compile(r"""(?P<comment>/\*.*?\*/|//[^\n]*)|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|(?P<name>[A-Za-z_]\w*)|(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
|(?P<space>[ \t]+)|(?P<line>\n)|(?P<other>->|.)""", re.S | re.X)
INLINE = re.compile(r"""\[glossary:\ (?P<tag>[^\]]+)\]|(?<![\w\]])(?P<papers>(?:\[\d{1,2}\])+)|`(?P<code>[^`]+)`
|\b(?P<word>[Cc]hapters?\ )(?P<chapters>\d+(?:(?:,\ |\ and\ |,\ and\ )\d+)*)|(?<![\w-])(?P<flag>--[a-z]\w+)|\b(?P<kind>struct|enum)\ (?P<type>\w+)|\b(?P<name>[A-Za-z]\w*)""", re.X)


def escape(text): return html.escape(text, quote=False)
def fold(text): return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)).lower()
def slug(text): return re.sub(r"[^a-z0-9]+", "-", fold(text).translate(str.maketrans({"β": "beta", "ω": "omega", "π": "pi", "τ": "tau"}))).strip("-")


# ------------------------------------------------------------------------------------------------ the source, as rows
class Row:
    """A comment at the margin, the lines of code behind it, and what they define."""
    def __init__(self, comment, chapter):
        self.comment, self.chapter, self.code, self.functions, self.types, self.id = comment, chapter, [], [], [], ""

    def main(self):
        """The function that the comment is about: "NAME -- ..." says so; else the first."""
        name = self.lead(" --|:")
        return name if name in self.functions else self.functions[0] if self.functions else ""

    def lead(self, behind=" --"):
        m = re.match(r"(\w+)(?:%s)" % behind, self.comment[0]) if self.comment else None
        return m[1] if m else ""


class Chapter:
    def __init__(self, number, title, lines):
        self.number, self.title, self.lines, self.rows = number, title, lines, []
        self.tags, self.part = [], False


def comment_lines(text):
    """A comment without its stars, line by line, indentation kept."""
    lines = text.split("\n")
    lines[0] = re.sub(r"^/\* ?", "", lines[0])
    lines[-1] = re.sub(r" ?\*/$", "", lines[-1])
    return [lines[0]] + [re.sub(r"^\s*\* ?", "", line) for line in lines[1:]]


def tokens(text): return [(m.lastgroup, m.group()) for m in TOKEN.finditer(text)]


def definitions(code):
    """[(kind, name)] of what a piece of top-level code defines: function, struct, enum, macro."""
    found = [("macro", m[1]) for m in re.finditer(r"(?m)^#\s*define\s+(\w+)\(", code)]
    code = re.sub(r"(?m)^#(?:[^\n\\]|\\.|\\\n)*", "", code)
    depth = parens = 0
    names, last, candidate, kind = [], "", "", None
    for group, text in tokens(code):
        if group in ("space", "line", "comment"): continue
        if text == "(":
            if depth == 0 and parens == 0: candidate = last
            parens += 1
        elif text == ")": parens -= 1
        elif text == "{":
            if depth == 0 and parens == 0:
                if last == ")" and candidate: found.append(("function", candidate))
                elif kind and len(names) > 1 and names[-2] in ("struct", "enum", "union"): found.append((names[-2], names[-1]))
            depth += 1
        elif text == "}":
            depth -= 1
            if depth == 0: names, candidate, kind = [], "", None
        elif text in (";", "=") and depth == 0: names, candidate, kind = [], "", None
        if depth == 0 and parens == 0 and group == "name":
            names.append(text)
            if text in ("struct", "enum", "union"): kind = text
        last = text
    return found


def layout(source):
    """For each line: the depth of braces at its start; {line: last line} of the comments that start at the margin outside braces; the
    lines that start inside a comment."""
    depths, comments, inside = [0], {}, set()
    depth, saved, directive, line, at_margin, last = 0, [], "", 0, True, "\n"
    for group, text in tokens(source):
        if group == "comment" and text.count("\n"):
            inside.update(range(line + 1, line + text.count("\n") + 1))
        if group == "comment" and at_margin and depth == 0: comments[line] = line + text.count("\n")
        if "\n" in text:                        # a string too may go on behind a backslash
            line += text.count("\n")
            depths += [depth] * text.count("\n")
            if group == "line" and last != "\\": directive = ""
        elif text == "#" and last == "\n": directive = "#"
        elif directive == "#" and group == "name":
            directive = text
            if text.startswith("if"): saved.append(depth)
            elif text in ("else", "elif") and saved: depth = saved[-1]
            elif text == "endif" and saved: saved.pop()
        elif not directive and group == "other": depth += (text == "{") - (text == "}")
        at_margin = group == "line"
        if group != "space": last = text
    return depths, comments, inside


def paragraphs(source):
    """Top-level pieces of the source in order: ("comment", text), ("gap", "") for an empty line behind one, and ("code", text). Code ends
    at a comment at the margin, or at an empty line outside braces."""
    lines, pieces, code = source.split("\n"), [], []
    depths, comments, inside = layout(source)

    def flush():
        while code and not code[-1].strip(): code.pop()
        if code: pieces.append(("code", "\n".join(code)))
        code.clear()

    i = 0
    while i < len(lines):
        line = lines[i]
        if i in comments and lines[comments[i]].rstrip().endswith("*/"):
            flush()
            pieces.append(("comment", "\n".join(lines[i:comments[i] + 1]).rstrip()))
            i = comments[i] + 1
            if i < len(lines) and not lines[i].strip(): pieces.append(("gap", ""))
            continue
        if depths[i] == 0 and not line.strip() and i not in inside: flush()
        else: code.append(line)
        i += 1
    flush()
    return pieces


def read_source(source):
    """(title, chapters): every chapter with its rows."""
    chapters, row, title = [], None, ""
    for kind, text in paragraphs(source):
        if kind == "gap":
            if row and not row.code: row = None
            continue
        if kind == "comment":
            lines = comment_lines(text)
            banner = [i for i, line in enumerate(lines) if re.fullmatch(r"\s*[=-]{20,}\s*", line)]
            if banner:
                at = next((i for i, line in enumerate(lines) if line.startswith("Chapter ")), None)
                if not chapters: title = lines[0]
                head = at if at is not None else next(i for i, line in enumerate(lines) if line.strip() and i not in banner)
                words = lines[head]
                m = re.match(r"Chapter (\d+) - (.*)", words)
                chapter = Chapter(int(m[1]), m[2], None) if m else Chapter(chapters[-1].number, words, None)
                chapter.part = not m
                chapter.tags = re.findall(r"\[glossary: ([^\]]+)\]", chapter.title)
                chapter.title = re.sub(r"\s*\[glossary: [^\]]+\]", "", chapter.title).strip()
                chapter.lines = [line for i, line in enumerate(lines) if i > head and i not in banner]
                chapters.append(chapter)
                row = None
                continue
            if heading := re.fullmatch(r"-{4} (.+?) -{4,}", " ".join(lines).strip()):
                chapters.append(Chapter(chapters[-1].number, heading[1], None))
                chapters[-1].part, chapters[-1].tags, chapters[-1].lines = True, [], []
                row = None
                continue
            row = Row(lines, chapters[-1])
            chapters[-1].rows.append(row)
            continue
        found = definitions(text)
        functions = [name for k, name in found if k == "function"]
        named = re.match(r"(\w+) --", row.comment[0]) if row and row.comment else None
        joins = row and (not row.code or (not row.functions and (not functions or (named and any(f == named[1] or f.startswith(named[1] + "_") for f in functions)))))
        if not joins:
            row = Row(None, chapters[-1])
            chapters[-1].rows.append(row)
        row.code.append(text)
        row.functions += functions
        row.types += [(k, name) for k, name in found if k != "function"]
    return title, chapters


def read_papers(lines):
    """{number: text} of the preface's list, and the preface without it."""
    start = next((i for i, line in enumerate(lines) if line.strip() == "Papers"), len(lines))
    papers = {}
    for line in lines[start + 1:]:
        for entry in re.split(r"\s{2,}(?=\[\d+\])", line.strip()):
            m = re.match(r"\[(\d+)\] (.*)", entry)
            if m: papers[int(m[1])] = m[2]
            elif entry and papers: papers[max(papers)] += " " + entry
    return papers, lines[:start]


def read_glossary(text):
    """[(theme, {"name", "english name", label: text})], in order."""
    terms, theme, term = [], "", None
    for line in text.split("\n"):
        if line.startswith("## "): theme = line[3:].strip()
        elif line.startswith("### "):
            name, _, english = line[4:].partition(" · ")
            term = {"name": name.strip(), "english name": english.strip(), "theme": theme}
            terms.append(term)
        elif term and line.startswith("- ") and ": " in line:
            label, _, value = line[2:].partition(": ")
            term[label] = value.strip()
    return terms


# ------------------------------------------------------------------------------------------------ rendering
class Book:
    def __init__(self, source, glossary):
        self.title, self.chapters = read_source(source)
        self.papers, self.chapters[0].lines = read_papers(self.chapters[0].lines)
        self.terms = read_glossary(glossary)
        self.numbers = {c.number for c in self.chapters}
        self.names, self.uses, self.cited, self.functions, self.types = {}, {}, {}, {}, {}
        for term in self.terms:
            term["id"] = "term-" + slug(term["name"])
            self.uses[term["id"]] = []
            for name in (term["name"], term["english name"], *term.get("Aliases", "").split("; ")): self.names.setdefault(name, term)
        count = {}
        for chapter in self.chapters:
            for row in chapter.rows:
                row.functions = [name for name in dict.fromkeys(row.functions) if self.functions.setdefault(name, row) is row]
                row.types = [(k, name) for k, name in dict.fromkeys(row.types) if self.types.setdefault(name, (k, row))[1] is row]
                count[chapter.number] = count.get(chapter.number, 0) + 1
                row.id = "fn-" + row.main() if row.functions else "about-" + row.lead() if row.lead() else f"row-{chapter.number}-{count[chapter.number]}"
        self.callers = {name: [] for name in self.functions}
        self.here = ("", "")                                       # where text is that is rendered now: address and label

    # -- words within comments
    def use(self, uses):
        if self.here not in uses: uses.append(self.here)

    def term_link(self, tag, chip=False):
        term = self.names.get(tag)
        if not term: return escape(f"[glossary: {tag}]")
        self.use(self.uses[term["id"]])
        if not chip:
            lang = ' lang="pt-BR"' if tag == term["name"] and fold(tag) != fold(term["english name"]) else ""
            return f'<a class=t href="#{term["id"]}"{lang}>{escape(tag)}</a>'
        return f'<a class=t href="#{term["id"]}">{self.both_names(term)}</a>'

    @staticmethod
    def both_names(term):
        if fold(term["name"]) == fold(term["english name"]): return escape(term["name"])
        return f'{escape(term["english name"])}&nbsp;<span lang="pt-BR">{escape(term["name"])}</span>'

    def inline(self, text, prose=True):
        out, at = [], 0
        for m in INLINE.finditer(text):
            out.append(escape(text[at:m.start()]))
            at, whole = m.end(), m.group()
            if m["tag"]: out.append(self.term_link(m["tag"]))
            elif m["papers"]:
                for number in re.findall(r"\d+", whole):
                    if int(number) in self.papers:
                        self.use(self.cited.setdefault(int(number), []))
                        out.append(f'<a class=ref href="#paper-{number}">[{number}]</a>')
                    else: out.append(f"[{number}]")
            elif m["code"]: out.append(f"<code>{self.inline(m['code'], False)}</code>" if prose else f"`{self.inline(m['code'], False)}`")
            elif m["chapters"]: out.append(m["word"] + re.sub(r"\d+", lambda n: f'<a href="#chapter-{n[0]}">{n[0]}</a>' if int(n[0]) in self.numbers else n[0], m["chapters"]))
            elif m["flag"]: out.append(f"<code class=a>{whole}</code>" if prose else f"<span class=a>{whole}</span>")
            elif m["kind"]:
                link = f'<a href="#{m["kind"]}-{m["type"]}">{whole}</a>' if self.types.get(m["type"], ("",))[0] == m["kind"] else whole
                out.append(f"<code>{link}</code>" if prose and link != whole else link)
            else:
                link = f'<a href="#fn-{whole}">{whole}</a>' if whole in self.functions and ("_" in whole or text[at:at + 2] == "()") and self.here[1] != whole else whole
                out.append(f"<code>{link}</code>" if prose and (link != whole or ("_" in whole and all(len(part) > 1 for part in whole.split("_")))) else link)
        out.append(escape(text[at:]))
        return "".join(out)

    def flow(self, text):
        """A paragraph of prose."""
        text = re.sub(r"\s+", " ", text.strip())
        out = self.inline(text.replace(" -- ", " – ").replace(" -> ", " → "))
        if text.startswith("Reading paths."): out = re.sub(r"(?<=[ ,])\d{1,2}(?=[,. ])", lambda n: f'<a href="#chapter-{n[0]}">{n[0]}</a>' if int(n[0]) in self.numbers else n[0], out)
        return re.sub(r"^(By hand:)", r"<strong>\1</strong>", out)

    def formula(self, lines, wide):
        """Indented lines: a list with numbers, or text whose layout counts."""
        if re.match(r"\s+\d+[.)] ", lines[0]):
            first = len(lines[0]) - len(lines[0].lstrip())
            if all(re.match(r"\s+\d+[.)] ", line) or len(line) - len(line.lstrip()) > first for line in lines):
                items = []
                for line in lines:
                    if re.match(r" {%d}\d+[.)] " % first, line): items.append(re.sub(r"^\s+\d+[.)] ", "", line))
                    else: items[-1] += " " + line.strip()
                number = int(re.search(r"\d+", lines[0])[0])
                return f'<ol{f" start={number}" if number != 1 else ""}>' + "".join(f"<li>{self.flow(item)}</li>" for item in items) + "</ol>"
        margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        texts = [line[margin:].rstrip() for line in lines]
        if wide:
            shown = "\n".join(self.inline(text, False) for text in texts)
            if self.here[0] == "chapter-0":              # the drawing's (13), and the table of contents
                chapter = lambda n, s: f'<a href="#chapter-{n}">{s}</a>' if int(n) in self.numbers else s
                shown = re.sub(r"\((\d{1,2})\)", lambda m: "(" + chapter(m[1], m[1]) + ")", shown)
                shown = re.sub(r"(?m)(^|\s)(\d{1,2}) ([A-Z](?:\S| (?! ))*)", lambda m: f"{m[1]}{m[2]} {chapter(m[2], m[3])}" if m[1] != "" or len(m[2]) < 3 else m[0], shown)
            return f"<pre class=draw>{shown}</pre>"
        out, plain = [], []
        while texts:
            table = self.table(texts)
            if (table or len(texts) == 1) and (plain or not table):
                plain += texts[:1] if not table else []
                out.append(f"<pre class=f>{self.formula_lines(plain)}</pre>")
                plain = []
            elif not table: plain.append(texts[0])
            if table: out.append(table[0])
            texts = texts[table[1] if table else 1:]
        return "".join(out)

    def table(self, texts):
        """Labels and, from one column on, what they stand for: (html, how many lines); None if no table of two rows or more starts here."""
        m = re.match(r"(\S+(?: \S+)*)\s{3,}(?=[^\s\[])", texts[0])
        if not m or len(m[1]) > 24 or m[1][-1] in ";=,": return None
        column, rows = m.end(), []
        for text in texts:
            label, value = text[:column], text[column:]
            if label.strip() and (not value or value[0] == " " or not label.endswith("  ") or re.search(r"\S\s{2,}\S", label)): break
            if label.strip(): rows.append([label.strip(), []])
            rows[-1][1].append(value)
        if len(rows) < 2: return None
        return "<dl class=table>" + "".join(f"<dt>{self.inline(label, False)}</dt><dd><pre class=f>{self.formula_lines(values)}</pre></dd>" for label, values in rows) + "</dl>", sum(len(values) for _, values in rows)

    def formula_lines(self, texts):
        out = []
        for text in texts:
            indent = len(text) - len(text.lstrip())
            formula, gap, note = re.match(r"(.*?[^\s;])(\s{3,})(\S.*)$|$", text).groups() if re.search(r"[^\s;]\s{3,}(\[\d|[(a-z])", text) else (None, None, None)
            pieces = re.split(r"(?<=;)( {2,})", formula or text)               # "a = b;   c = d": a line breaks between the two first
            shown = "".join(self.inline(piece, False) if k % 2 or len(pieces) == 1 else f"<span class=q>{self.inline(piece, False)}</span>" for k, piece in enumerate(pieces))
            if formula: shown += f"{gap}<span class=note>{self.inline(note, False)}</span>"
            out.append(f'<span class="l{f" i{min(indent // 2 * 2, 40)}" if indent > 1 else ""}">{shown}\n</span>')
        return "".join(out)

    def prose(self, lines, name="", wide=False):
        """A comment's lines -> (html, terms tagged, tests named)."""
        tags, tests = [], []

        def lift(m):                                    # a tag at a sentence's end names the subject: it moves under the heading
            before, after = text[:m.start()].rstrip(), text[m.end():].lstrip(" ")
            if before and before[-1] not in ".:)]\n" and after and after[0] != "\n" and after[0] not in "[": return m[0]
            if after and after[0] not in "[\n" and not after[0].isupper(): return m[0]
            if m[1] not in self.names: return m[0]
            tags.append(m[1])
            return ""
        text = "\n".join(lines)
        m = re.search(r"\s*(?<!\()\btest: ([\w*]+(?:,? [\w*]+)*)\.?\s*$", text)
        if m:
            tests = m[1]
            text = text[:m.start()] + "\n"
        text = re.sub(r"\[glossary: ([^\]]+)\]", lift, text)
        if name: text = re.sub(r"^%s(?: --|:)\s+" % re.escape(name), "", text)
        text = re.sub(r"(\S)[ ]{2,}(By hand:)", r"\1\n\2", text)
        blocks = []                                     # [kind, lines]
        for line in text.split("\n"):
            if not line.strip():
                blocks.append(["", []])
                continue
            label = re.match(r"(in|out)\s{2,}(\S.*)", line)
            last = blocks[-1] if blocks else ["", []]
            if label:
                if last[0] != "io": blocks.append(["io", []])
                for part in re.split(r"\s{3,}(?=out\s{2,})", line):
                    key, value = re.match(r"(in|out)\s+(.*)", part).groups()
                    blocks[-1][1].append([key, value.strip()])
            elif last[0] == "io" and re.match(r"\s{4,}", line): last[1][-1][1] += " " + line.strip()
            elif re.match(r"\s{2,}\S", line):
                if last[0] != "f": blocks.append(["f", []])
                blocks[-1][1].append(line)
            else:
                begins = re.match(r"By hand:|Why ", line) and last[1] and re.search(r"[.:)]\s*$", last[1][-1] if last[0] == "p" else ".")
                if last[0] != "p" or begins: blocks.append(["p", []])
                blocks[-1][1].append(line.strip())
        out = []
        for kind, content in blocks:
            if kind == "p":
                words = " ".join(content)
                if not out and name and re.match(r"(?!align )[a-z]{2,} ", words): words = words[0].upper() + words[1:]
                out.append(f"<p>{self.flow(words)}</p>")
            elif kind == "f": out.append(self.formula(content, wide))
            elif kind == "io": out.append("<dl class=io>" + "".join(f"<dt>{key}</dt><dd>{self.flow(value)}</dd>" for key, value in content) + "</dl>")
        return "".join(out), tags, tests

    # -- code
    @staticmethod
    def tighten(words, width=74):
        """Comments at lines' ends that start in one column: in the nearest column that suits those that fit their line, two spaces
        behind the code where they don't."""
        groups, column = {}, 0
        for k, (group, word) in enumerate(words):
            if group == "comment" and k > 1 and words[k - 1][0] == "space" and words[k - 2][0] != "line":
                groups.setdefault(column, []).append((k - 1, column - len(words[k - 1][1]), len(word)))
            column = len(word) - word.rfind("\n") - 1 if "\n" in word else column + len(word)
        for members in groups.values():
            at = max((code + 2 for _, code, comment in members if code + 2 + comment <= width), default=0)
            for k, code, comment in members: words[k] = ("space", " " * (at - code if code + 2 <= at and at + comment <= width else 2))
        return words

    def code(self, text, row):
        """Code with light colours and links, a block for each line."""
        words, shown_types = self.tighten(tokens(text)), set()
        depth, lines, line, i = 0, [], [], 0
        waiting = list(row.functions)
        macros = {name for kind, name in row.types if kind == "macro"}
        solid = [k for k, (g, _) in enumerate(words) if g not in ("space", "line", "comment")]
        before = {k: words[solid[n - 1]][1] if n else "" for n, k in enumerate(solid)}
        after = {k: words[solid[n + 1]][1] if n + 1 < len(solid) else "" for n, k in enumerate(solid)}
        parens, inside, preprocessor, only_space = 0, "", False, True
        indent = 0

        def put(part): line.append(part)

        def end_line():
            shown = "".join(line)
            lines.append(f'<span class="l{f" i{min(indent, 40)}" if indent else ""}">{shown}\n</span>')
            line.clear()

        while i < len(words):
            group, word = words[i]
            if group == "line":
                end_line()
                only_space, indent = True, 0
                if preprocessor and not (i and words[i - 1][1] == "\\"): preprocessor = False
            elif group == "space":
                if only_space: indent = len(word.expandtabs(4)) // 4 * 4
                put(word)
            elif group == "comment":
                trailing = not only_space
                if "\n" in word and not trailing:
                    word = re.sub(r"\s*\n\s*\*?\s*", " ", word)                  # prose between lines of code flows
                for k, part in enumerate(word.split("\n")):
                    if k:
                        end_line()
                        part = part.lstrip(" *") if part.strip() != "*/" else part.strip()
                        put(" " * 4)
                    put(f'<span class="{"c e" if trailing else "c"}">{self.inline(part, False)}</span>')
                only_space = False
            elif group == "string": put("<span class=s>" + re.sub(r"--\w+", r"<span class=a>\g<0></span>", escape(word)) + "</span>")
            elif group == "name":
                nxt, prev = after.get(i, ""), before.get(i, "")
                if preprocessor and prev == "#": put(f"<span class=m>{word}</span>")
                elif word in macros and prev == "define" and word not in shown_types:
                    shown_types.add(word)
                    put(f'<b id="macro-{word}">{word}</b>')
                elif word in KEYWORDS:
                    run, j = word, i                    # neighbours share one span
                    while j + 2 < len(words) and words[j + 1][1] == " " and words[j + 2][1] in KEYWORDS:
                        run += " " + words[j + 2][1]
                        j += 2
                    i = j
                    put(f"<span class=k>{run}</span>")
                elif depth == 0 and not preprocessor and word in waiting and nxt == "(" and parens == 0:
                    waiting.remove(word)
                    inside = word
                    put(f"<b>{word}</b>" if "fn-" + word == row.id else f'<b id="fn-{word}">{word}</b>')
                elif prev in ("struct", "enum", "union") and word in self.types and self.types[word][0] == prev:
                    if self.types[word][1] is row and nxt == "{" and word not in shown_types and depth == 0:
                        shown_types.add(word)
                        put(f'<b id="{prev}-{word}">{word}</b>')
                    else: put(f'<a href="#{prev}-{word}">{word}</a>')
                elif word in self.functions and prev not in (".", "->") and word != inside and (nxt == "(" or ("_" in word and not re.match(r"[\w*]", prev or "=") or prev == "return")) and not (preprocessor and prev == "define"):
                    if inside and inside not in self.callers[word]: self.callers[word].append(inside)
                    put(f'<a href="#fn-{word}">{word}</a>')
                elif nxt == "(" and self.types.get(word, ("",))[0] == "macro" and not (preprocessor and prev == "define"): put(f'<a href="#macro-{word}">{word}</a>')
                else: put(word)
                only_space = False
            else:
                if word == "#" and only_space: preprocessor = True
                if not preprocessor:
                    if word == "{": depth += 1
                    elif word == "}":
                        depth -= 1
                        if depth == 0: inside = ""
                    elif word == "(" : parens += depth == 0
                    elif word == ")": parens -= depth == 0
                put("<span class=m>#</span>" if word == "#" and preprocessor and only_space else escape(word))
                only_space = False
            i += 1
        if line: end_line()
        return "".join(lines)

    # -- parts of the page
    def meta(self, row_tags, tests):
        out = []
        if row_tags: out.append(f'<p class=terms><span class=label>Term{"s" * (len(set(row_tags)) > 1)}</span> ' + " ".join(self.term_link(tag, True) for tag in dict.fromkeys(row_tags)) + "</p>")
        if tests: out.append("<p class=meta><span class=label>Test</span> " + ", ".join(f"<code>{escape(t)}</code>" for t in re.split(r", ?", tests)) + "</p>")
        return out

    def row(self, row):
        main = row.main()
        types = [f"{kind} {name}" for kind, name in row.types if kind != "macro"]
        lead = row.lead()
        label = main or lead or (types[0] if types else f"chapter {row.chapter.number}")
        anchor = "fn-" + main if main else row.id if lead else types[0].replace(" ", "-") if types else row.id
        self.here = (anchor, label)
        left = [f'<h3><a href="#fn-{name}">{name}</a></h3>' for name in row.functions]
        if lead and lead != main: left.insert(0, f'<h3><a href="#{row.id}">{lead}</a></h3>')
        elif not row.functions and types: left.append("<h3>" + "<br>".join(f'<a href="#{t.replace(" ", "-")}">{t}</a>' for t in types[:3]) + "</h3>")
        if row.comment:
            body, tags, tests = self.prose(row.comment, lead or main)
            meta = self.meta(tags, tests)
            left += meta[:1] if tags else []
            left.append(body)
            left += meta[1:] if tags else meta
        right = self.code("\n\n".join(row.code), row)
        left.append("\0" + ",".join(row.functions) + "\0")                    # who calls them is known when all rows are done
        kind = "r" if row.comment or row.functions else "r bare"
        if not right: return f'<div class="r text" id="{row.id}"><div class=p>{"".join(left)}</div></div>\n'
        return f'<div class="{kind}" id="{row.id}"><div class=p>{"".join(left)}</div><pre class=code><code>{right}</code></pre></div>\n'

    def called_by(self, names):
        out = []
        for name in filter(None, names.split(",")):
            callers = self.callers[name]
            if not callers: continue
            some = ", ".join(f'<a href="#fn-{c}">{c}</a>' for c in callers[:6])
            which = f" {name}" if "," in names else ""
            out.append(f'<p class=meta><span class=label>{"Called by" if not which else f"{name}: called by"}</span> {some}{f" and {len(callers) - 6} more" if len(callers) > 6 else ""}</p>')
        return "".join(out)

    def chapter(self, chapter):
        self.here = (f"chapter-{chapter.number}" if not chapter.part else f"part-{chapter.number}-{slug(chapter.title)}", f"chapter {chapter.number}")
        if chapter.part: head = f'<h3 class=part id="{self.here[0]}">{escape(chapter.title)}</h3>'
        else: head = f'<h2 id="chapter-{chapter.number}"><span class=number>Chapter {chapter.number}</span> {escape(chapter.title)}</h2>'
        body, tags, tests = self.prose(chapter.lines, wide=True)
        intro = f'<div class=intro>{head}{"".join(self.meta(chapter.tags + tags, tests))}{body}</div>\n'
        return intro + "".join(self.row(row) for row in chapter.rows)

    def links(self, places):
        return ", ".join(f'<a href="#{address}">{escape(label)}</a>' for address, label in places)

    def glossary(self):
        out, theme = ['<div class=intro><h2 id="glossary">Glossary <span lang="pt-BR">Glossário</span></h2><p>The terms of the course, in English and Portuguese: what implements each, which test proves it, where the book uses it.</p></div>\n'], None
        for term in self.terms:
            if term["theme"] != theme:
                theme = term["theme"]
                english, _, portuguese = theme.partition(" · ")
                out.append(f'<h3 class=theme id="theme-{slug(english)}">{escape(english)} <span lang="pt-BR">{escape(portuguese)}</span></h3>\n')
            self.here = (term["id"], term["name"])
            facts = []
            if term.get("Aliases"): facts.append(("Also", escape(term["Aliases"].replace("; ", ", "))))
            names = []
            for chapter, listed in re.findall(r"chapter (\d+)((?:, `[^`]+`)+)", term.get("In align.c", "")):
                for name in re.findall(r"`([^`]+)`", listed):
                    kind, _, bare = name.rpartition(" ")
                    address = f"fn-{name}" if name in self.functions else f"{kind}-{bare}" if kind and self.types.get(bare, ("",))[0] == kind else ""
                    names.append(f'<a href="#{address}"><code>{name}</code></a>' if address else f"<code>{name}</code>")
            if names: facts.append(("In align.c", ", ".join(names)))
            uses = self.uses[term["id"]]
            if uses: facts.append(("Used at", self.links(uses)))
            if term.get("Test"): facts.append(("Test", ", ".join(f"<code>{t}</code>" for t in re.findall(r"`([^`]+)`", term["Test"]))))
            if term.get("Try"): facts.append(("Try", f'<code>{self.inline(term["Try"].strip("`"), False)}</code>'))
            also = [self.names[name] for name in term.get("See also", "").split("; ") if name in self.names]
            if also: facts.append(("See also", ", ".join(f'<a class=t href="#{t["id"]}">{escape(t["english name"])}</a>' for t in also)))
            same = fold(term["name"]) == fold(term["english name"])
            head = escape(term["english name"]) if same else f'{escape(term["english name"])} <span lang="pt-BR">{escape(term["name"])}</span>'
            keep = self.uses
            self.uses = {key: [] for key in keep}                    # a definition's own words are no use of a term
            english, portuguese = self.flow(term.get("English", "")), self.flow(term.get("Português", ""))
            self.uses = keep
            out.append(f'<section class=term aria-labelledby="{term["id"]}"><h4 id="{term["id"]}" data-also="{html.escape(term["name"] + " " + term.get("Aliases", ""))}">{head}</h4>'
                       f'<div class=two><p class=en>{english}</p><p class=pt lang="pt-BR">{portuguese}</p></div>'
                       f'<dl class=facts>{"".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts)}</dl></section>\n')
        return "".join(out)

    def paper_list(self):
        out = ['<div class=intro><h2 id="papers">Papers</h2><ol class=papers>']
        for number, text in sorted(self.papers.items()):
            cited = self.cited.get(number, [])
            out.append(f'<li id="paper-{number}" value={number}>{escape(text)}{f"<br><span class=meta><span class=label>Cited at</span> {self.links(cited)}</span>" if cited else ""}</li>')
        return "".join(out) + "</ol></div>\n"

    def nav(self):
        out = []
        for chapter in self.chapters:
            if chapter.part: continue
            rows = [row for c in self.chapters if c.number == chapter.number for row in c.rows]
            inner = "".join(f'<li><a href="#fn-{name}">{name.replace("_", "_<wbr>")}</a></li>' for row in rows for name in row.functions)
            out.append(f'<li data-chapter="chapter-{chapter.number}"><a href="#chapter-{chapter.number}"><span class=n>{chapter.number}</span> {escape(chapter.title)}</a>{f"<ul>{inner}</ul>" if inner else ""}</li>')
        themes = list(dict.fromkeys(term["theme"] for term in self.terms))
        inner = "".join(f'<li><a href="#theme-{slug(t.partition(" · ")[0])}">{escape(t.partition(" · ")[0])}</a></li>' for t in themes)
        out.append(f'<li data-chapter="glossary" class=back><a href="#glossary"><span class=n></span> Glossary</a><ul>{inner}</ul></li>')
        out.append('<li data-chapter="papers"><a href="#papers"><span class=n></span> Papers</a></li>')
        return "<ul class=toc>" + "".join(out) + "</ul>"

    def render(self):
        name, _, what = self.title.partition(" -- ")
        sections = []
        for chapter in self.chapters:
            if chapter.part: sections[-1] += self.chapter(chapter)
            else: sections.append(f'<section class=chapter aria-labelledby="chapter-{chapter.number}">\n' + self.chapter(chapter))
        body = "</section>\n".join(sections) + "</section>\n"
        body = re.sub("\0([^\0]*)\0", lambda m: self.called_by(m[1]), body).replace("-&gt;", "<span class=a>-&gt;</span>")
        glossary = f'<section class=chapter aria-labelledby="glossary">\n{self.glossary()}</section>\n'
        papers = f'<section class=chapter aria-labelledby="papers">\n{self.paper_list()}</section>\n'
        summary = what[:1].upper() + what[1:]
        return PAGE.format(title=escape(f"{name}: the book"), name=escape(name), what=escape(summary), description=html.escape(summary), style=STYLE.strip(), script=SCRIPT.strip(), nav=self.nav(), body=body + glossary + papers,
                           functions=len(self.functions), terms=len(self.terms), chapters=len(self.numbers))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="description" content="{description}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<a class=skip href="#main">Skip to the text</a>
<header class=top>
<button type=button id=menu aria-expanded=false aria-controls=toc hidden>Contents</button>
<a class=name href="#main">{name}</a>
<div class=search id=searchbox role=search hidden>
<label for=search class=sr>Search functions, terms and text</label>
<input id=search type=search placeholder="Search  /" autocomplete=off spellcheck=false role=combobox aria-expanded=false aria-controls=results aria-autocomplete=list aria-keyshortcuts="/">
<div id=found hidden><p id=count role=status></p><ul id=results role=listbox aria-label="Results"></ul></div>
</div>
</header>
<nav id=toc aria-label="Chapters">{nav}</nav>
<main id=main tabindex=-1>
<div class=title><h1>{name}</h1><p>{what}</p>
<p class=how>Comments stand beside their code. A name in the code leads to its definition, a <span class=t>term</span> to the glossary in English and Portuguese, a number in brackets to the paper. Press <kbd>/</kbd> to search {functions} functions, {terms} terms and the text. A test runs by its name: <code>./test_align NAME</code>.</p></div>
{body}</main>
<script>
{script}
</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf6; --panel: #f3f0e8; --line: #ddd8cb; --ink: #24221d; --soft: #625c50; --link: #1d5a83; --term: #7a3b12; --wash: #f6e7d3;
  --keyword: #3c4f8f; --string: #3f6321; --comment: #6a6254; --macro: #7d4a72; --mark: #ffe08a; --focus: #1d5a83; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #17191c; --panel: #1f2226; --line: #363a40; --ink: #dcd8cf; --soft: #a39e93; --link: #8fc1e6; --term: #e8b184; --wash: #3a2d20;
  --keyword: #a3b6ee; --string: #a9cb8a; --comment: #a09887; --macro: #d5a6c8; --mark: #6b5a17; --focus: #8fc1e6; } }
:root { --serif: Charter, "Bitstream Charter", "Sitka Text", "Source Serif 4", "Noto Serif", Cambria, Georgia, "DejaVu Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; --bar: 3.25rem; }
* { box-sizing: border-box; }
html { font: 100%/1.5 var(--serif); font-size-adjust: .5; color: var(--ink); background: var(--paper); scroll-padding-top: calc(var(--bar) + 1rem); -webkit-text-size-adjust: 100%; }
body { margin: 0; }
a { color: var(--link); text-decoration-color: color-mix(in srgb, currentColor 35%, transparent); text-underline-offset: .18em; }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; border-radius: 3px; }
main:focus { outline: none; }
code, kbd, pre, nav, .top, h1, h3, .meta, .terms, .facts { font-size-adjust: none; }
code, kbd, pre { font-family: var(--mono); font-size: .8125rem; }
.a { white-space: nowrap; }
.p code, .intro code, .term code { font-size: .84em; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.skip { position: fixed; left: 1rem; top: -4rem; z-index: 9; padding: .5rem 1rem; background: var(--paper); border: 1px solid var(--line); font-family: var(--sans); }
.skip:focus { top: .5rem; }

.top { position: sticky; top: 0; z-index: 5; height: var(--bar); display: flex; align-items: center; gap: 1rem; padding: 0 1.25rem; background: var(--paper); border-bottom: 1px solid var(--line); font-family: var(--sans); }
.top .name { font: 600 1rem var(--mono); color: var(--ink); text-decoration: none; }
.top button { font: inherit; font-size: .875rem; color: var(--ink); background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; }
.search { position: relative; margin-left: auto; width: min(24rem, 100%); }
.search[hidden] { display: none; }
#search { width: 100%; font: 1rem var(--sans); color: var(--ink); background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; }
#search::placeholder { color: var(--soft); opacity: 1; }
#found { position: absolute; right: 0; top: calc(100% + .4rem); width: min(38rem, calc(100vw - 2rem)); max-height: min(34rem, calc(100vh - 5rem)); overflow-y: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; box-shadow: 0 8px 28px rgb(0 0 0 / .18); padding: .4rem; }
#count { margin: .2rem .6rem .4rem; font-size: .8125rem; color: var(--soft); }
#results { list-style: none; margin: 0; padding: 0; }
#results li { padding: .4rem .6rem; border-radius: 5px; cursor: pointer; font-size: .9rem; line-height: 1.35; overflow-wrap: anywhere; }
#results li[aria-selected=true] { background: var(--wash); }
#results .what { float: right; max-width: 45%; margin-left: 1rem; font-size: .78rem; color: var(--soft); text-align: right; }
#results .mono { font-family: var(--mono); font-size: .85rem; }
#results mark { background: var(--mark); color: inherit; }

nav { font: .875rem/1.4 var(--sans); }
nav ul { list-style: none; margin: 0; padding: 0; }
nav a { display: block; padding: .28rem .6rem; color: var(--ink); text-decoration: none; border-radius: 5px; }
nav a:hover { background: var(--panel); text-decoration: underline; }
.toc > li > a { padding-left: 2.4rem; position: relative; }
nav .n { position: absolute; left: .4rem; width: 1.4rem; text-align: right; color: var(--soft); font-variant-numeric: tabular-nums; }
nav li ul { display: none; margin: .2rem 0 .6rem 2.3rem; border-left: 1px solid var(--line); }
nav .current > ul { display: block; }
nav .current > a { font-weight: 600; background: var(--panel); }
nav li li a { font: .75rem/1.5 var(--mono); padding: .12rem .6rem; color: var(--soft); overflow-wrap: anywhere; }
nav .back li a { font-family: var(--sans); }
nav li li a[aria-current] { color: var(--ink); background: var(--wash); }
nav .back { margin-top: .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }

main { min-width: 0; }
.title { padding: 3rem 2rem 1rem; }
h1 { font: 600 2.6rem/1.1 var(--mono); margin: 0 0 .6rem; letter-spacing: -.03em; }
.title p { max-width: 58ch; margin: 0 0 .8rem; font-size: 1.2rem; }
.title .how { font-size: 1rem; color: var(--soft); }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 .35em; background: var(--panel); }
.chapter { border-top: 1px solid var(--line); }
.intro { padding: 3rem 2rem 1.5rem; max-width: 62rem; }
.intro > p, .intro > ol, .intro > dl { max-width: 58ch; }
h2 { font: 600 1.75rem/1.25 var(--serif); margin: 0 0 1rem; }
h2 .number { display: block; font: 600 .8125rem/1.6 var(--sans); color: var(--soft); letter-spacing: .02em; }
h2 [lang], h3 [lang], h4 [lang] { font-weight: 400; color: var(--soft); font-style: italic; }
h3 { font: 600 .875rem/1.4 var(--mono); margin: 0; overflow-wrap: anywhere; }
h3 + p, h3 + dl, h3 + pre, h3 + ol { margin-top: .5rem; }
h3 a { color: var(--ink); text-decoration: none; }
h3 a:hover { text-decoration: underline; }
h3.part, h3.theme { font: 600 1.25rem/1.3 var(--serif); }
h3.theme { padding: 2rem 2rem .5rem; }
p { margin: 0 0 .7rem; hyphens: manual; }
@counter-style paper { system: extends decimal; prefix: "["; suffix: "] "; }
.terms, .meta { font: .8125rem/1.5 var(--sans); color: var(--soft); margin: .3rem 0 .6rem; overflow-wrap: anywhere; }
h3 + .meta { margin-top: .5rem; }
h3 + h3 { margin-top: .4rem; }
.meta a { color: var(--soft); }
.meta a, .meta code { font-family: var(--mono); font-size: .75rem; }
.label { color: var(--soft); font: .8125rem var(--sans); margin-right: .3em; }
.t { color: var(--term); text-decoration: none; border-bottom: 1px solid color-mix(in srgb, currentColor 45%, transparent); }
a.t:hover { border-bottom-color: currentColor; }
.terms { margin-top: .5rem; line-height: 1.75; }
.terms .t { background: var(--wash); border: 0; border-radius: 4px; padding: .12rem .45rem; margin-right: .2rem; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.terms .t:hover { text-decoration: underline; }
.t [lang] { font-style: italic; }
.t [lang]::before { content: "\\b7\\20"; }
.ref { font-size: .88em; text-decoration: none; }
.ref:hover { text-decoration: underline; }

.r { display: grid; grid-template-columns: minmax(0, 1fr); gap: .8rem; padding: 1.1rem 1.25rem; }
.r + .r { border-top: 1px solid color-mix(in srgb, var(--line) 55%, transparent); }
.r > * { min-width: 0; }
.p > :last-child { margin-bottom: 0; }
.p ol, .intro ol { padding-left: 1.4rem; margin: 0 0 .7rem; }
pre { margin: 0; line-height: 1.5; tab-size: 4; }
pre.code { background: var(--panel); border-radius: 8px; padding: .8rem 0; overflow-x: auto; }
pre.code code { display: block; width: max-content; min-width: 100%; padding: 0 1rem; font-size: .78rem; }
.l { display: block; }
pre.f { margin: .2rem 0 .8rem; padding: .1rem 0 .1rem .8rem; border-left: 2px solid var(--line); white-space: pre-wrap; overflow-wrap: anywhere; font-size: .78rem; line-height: 1.6; }
pre.f .l { padding-left: 2ch; text-indent: -2ch; }
pre.f .q { display: inline-block; max-width: 100%; padding-left: 2ch; text-indent: -2ch; vertical-align: top; }
pre.f .note { color: var(--soft); display: inline-block; max-width: 100%; text-indent: 0; }
pre.draw { margin: .3rem 0 1rem; overflow-x: auto; font-size: .8125rem; line-height: 1.45; padding: .8rem 1rem; width: fit-content; max-width: 100%; background: var(--panel); border-radius: 8px; }
.io { display: grid; grid-template-columns: 2.2rem minmax(0, 1fr); gap: .15rem .4rem; margin: .3rem 0 .7rem; }
.io dt { font: .8125rem/1.9 var(--mono); color: var(--soft); }
.io dd { margin: 0; }
.table { display: grid; grid-template-columns: fit-content(24ch) minmax(0, 1fr); gap: .15rem .8rem; margin: .2rem 0 .8rem; padding-left: .8rem; border-left: 2px solid var(--line); }
.table dt { font: .78rem/1.6 var(--mono); overflow-wrap: anywhere; }
.table dd, .table pre.f { margin: 0; padding: 0; border: 0; }
.k { color: var(--keyword); } .s { color: var(--string); } .c { color: var(--comment); } .m { color: var(--macro); }
.code a { color: inherit; text-decoration: underline; text-decoration-color: color-mix(in srgb, currentColor 28%, transparent); }
.code a:hover { text-decoration-color: currentColor; color: var(--link); }
.code .c a { color: var(--link); }
.code .c a.t { color: var(--term); }
.code b { font-weight: 700; }
:target { background: var(--wash); }
.r:target { background: none; }
.r:target h3:first-child, b:target { background: var(--wash); }
h2:target { background: none; }
.r:target h3:first-child, h4:target, h3:target { box-shadow: 0 0 0 .35rem var(--wash); border-radius: 2px; }
::highlight(found) { background-color: var(--mark); }

.term { padding: 1.2rem 1.25rem; border-top: 1px solid color-mix(in srgb, var(--line) 55%, transparent); }
h4 { font: 600 1.1rem/1.35 var(--serif); margin: 0 0 .5rem; overflow-wrap: anywhere; }
h4 [lang] { display: inline-block; margin-left: .4em; font-size: 1rem; }
.two p { max-width: 58ch; overflow-wrap: break-word; }
.facts { display: grid; grid-template-columns: 5.2rem minmax(0, 1fr); gap: .2rem .6rem; margin: .2rem 0 0; font: .8125rem/1.55 var(--sans); max-width: 75rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts code { font-size: .78rem; }
.papers { padding-left: 2.6rem; list-style: paper; }
.papers li { margin-bottom: .7rem; padding-left: .3rem; }

@media (max-width: 63.99rem) {
  .js nav { position: fixed; inset: var(--bar) 0 0 0; z-index: 4; background: var(--paper); overflow-y: auto; overscroll-behavior: contain; padding: 1rem 1rem 3rem; display: none; }
  .js nav.open { display: block; }
  nav { padding: 1rem; }
  nav a { padding-top: .5rem; padding-bottom: .5rem; }
  nav li li a { padding-top: .35rem; padding-bottom: .35rem; }
  .top { padding: 0 1rem; gap: .7rem; }
  .title, .intro { padding: 2rem 1rem 1rem; }
  h3.theme { padding: 1.5rem 1rem .3rem; }
  .r, .term { padding-left: 1rem; padding-right: 1rem; }
  .p, .two p { max-width: 62ch; }
  .r:not(.text) .p:empty { display: none; }
  pre.code { border-radius: 6px; }
}
@media (max-width: 30rem) {
  .top .name { display: none; }
  h1 { font-size: 2.2rem; }
  h2 { font-size: 1.5rem; }
  #found { position: fixed; left: .5rem; right: .5rem; top: calc(var(--bar) + .3rem); width: auto; }
  h4 [lang] { display: block; margin-left: 0; }
  .table { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .table dd { margin: 0 0 .3rem 1rem; }
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .facts dd { margin-bottom: .4rem; }
}
@media screen and (min-width: 64rem) {
  body { display: grid; grid-template: auto 1fr / 15.5rem minmax(0, 1fr); }
  .top { grid-column: 1 / -1; }
  #menu { display: none; }
  nav { position: sticky; top: var(--bar); height: calc(100vh - var(--bar)); overflow-y: auto; padding: 1rem .8rem 3rem; border-right: 1px solid var(--line); overscroll-behavior: contain; }
  .r { grid-template-columns: minmax(20rem, clamp(54ch, 32vw, 62ch)) minmax(0, 62rem); gap: 2rem; padding: 1.3rem 1.5rem 1.3rem 2rem; }
  .r .p { align-self: start; position: sticky; top: calc(var(--bar) + 1rem); }
  .r.text { grid-template-columns: minmax(0, 58ch); }
  .r.text .p { position: static; }
  pre.code { overflow-x: visible; align-self: start; }
  pre.code code { white-space: pre-wrap; overflow-wrap: anywhere; width: auto; }
  .code .l { padding-left: 4ch; text-indent: -4ch; }
  .code .e { display: inline-block; text-indent: 0; max-width: 100%; vertical-align: top; }
  .term { padding: 1.4rem 2rem; }
  .two { display: grid; grid-template-columns: repeat(2, minmax(0, 58ch)); gap: 2.5rem; }
INDENTS}
@media (min-width: 64rem) and (max-width: 79.99rem) {
  body { grid-template-columns: 14rem minmax(0, 1fr); }
  .r { grid-template-columns: minmax(0, 1fr); gap: .8rem; }
  .r .p { position: static; max-width: 58ch; }
}
@media print {
  .top, nav, .skip, .how { display: none !important; }
  html { font-size: 9.5pt; background: none; }
  .chapter { break-before: page; border: 0; }
  .title + .chapter { break-before: auto; }
  .r { display: block; }
  .p { break-inside: avoid; margin-bottom: .5rem; }
  .intro, .title, .r, .term, h3.theme { padding-left: 0; padding-right: 0; }
  .r { padding-top: .6rem; padding-bottom: .6rem; }
  a { color: inherit; text-decoration: none; }
  h2, h3, h4, .p { break-after: avoid; }
  pre.code { background: none; border-left: 2px solid var(--line); border-radius: 0; padding: 0; overflow: visible; }
  pre.code code, pre.draw { white-space: pre-wrap; overflow-wrap: anywhere; width: auto; font-size: 7pt; line-height: 1.4; padding: 0 0 0 .6rem; }
  pre.draw { background: none; }
  .code .l { padding-left: 4ch; text-indent: -4ch; orphans: 2; }
  .meta, .terms { font-size: 7.5pt; }
  .term { break-inside: avoid; }
  .papers li { break-inside: avoid; }
  @page { margin: 18mm 16mm; }
INDENTS}
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: auto; } }
""".replace("INDENTS", "".join(f"  .i{n} {{ padding-left: {n + 4}ch !important; text-indent: -{n + 4}ch !important; }}\n" for n in range(2, 41, 2)))

SCRIPT = r"""
'use strict';
(() => {
  const one = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)];
  document.documentElement.classList.add('js');
  const menu = one('#menu'), nav = one('#toc'), box = one('#searchbox'), input = one('#search'), found = one('#found'), list = one('#results'), count = one('#count');
  menu.hidden = box.hidden = false;

  // The list of chapters: a drawer on a narrow window.
  const drawer = open => { nav.classList.toggle('open', open); menu.setAttribute('aria-expanded', open); };
  menu.addEventListener('click', () => {
    const open = !nav.classList.contains('open');
    drawer(open);
    if (open) (nav.querySelector('.current > a') || nav.querySelector('a')).focus();
  });
  nav.addEventListener('click', e => { if (e.target.closest('a')) drawer(false); });

  // Which chapter and function is being read.
  const items = new Map(all('.toc > li').map(li => [li.dataset.chapter, li])), inner = new Map(all('.toc li li a').map(a => [a.hash.slice(1), a]));
  const marks = all('h2[id], h3[id], .r[id]'); let current, at;
  const follow = () => {
    let low = 0, high = marks.length - 1;                       // the last heading above the upper third of the window
    while (low < high) { const middle = (low + high + 1) >> 1; if (marks[middle].getBoundingClientRect().top < innerHeight / 3) low = middle; else high = middle - 1; }
    const mark = marks[low]; if (mark === at) return; at = mark;
    const chapter = items.get(mark.closest('.chapter').getAttribute('aria-labelledby'));
    if (chapter !== current) {
      if (current) { current.classList.remove('current'); current.firstElementChild.removeAttribute('aria-current'); }
      if (chapter) { chapter.classList.add('current'); chapter.firstElementChild.setAttribute('aria-current', 'true'); }
      current = chapter;
    }
    for (const a of nav.querySelectorAll('li li a[aria-current]')) a.removeAttribute('aria-current');
    const a = inner.get(mark.id) || (chapter && chapter.firstElementChild);
    if (a && a.parentElement.parentElement !== nav.firstElementChild) a.setAttribute('aria-current', 'true');
    if (a && nav.scrollHeight > nav.clientHeight) {
      const r = a.getBoundingClientRect(), n = nav.getBoundingClientRect();
      if (r.top < n.top + 20 || r.bottom > n.bottom - 20) nav.scrollTop += r.top - n.top - n.height / 3;
    }
  };
  // A comment stays beside its code while that passes; one that is taller than the window stays with its end.
  const anchor = () => { for (const p of all('.r > .p')) p.style.top = p.offsetHeight > innerHeight - 90 ? innerHeight - p.offsetHeight - 20 + 'px' : ''; };
  anchor(); addEventListener('resize', anchor);
  let asked = false;
  const later = () => { if (!asked) { asked = true; requestAnimationFrame(() => { asked = false; follow(); }); } };
  addEventListener('scroll', later, {passive: true}); addEventListener('resize', later); follow();

  // Search: names first, then text. Accents and case do not count.
  const fold = s => s.normalize('NFD').replace(/[\u0300-\u036f]/g, '').toLowerCase();
  let index, picked = -1, hits = [];
  const build = () => {
    const names = [], add = (kind, e, text, extra) => names.push({kind, id: e.id, text, key: fold(text), extra: fold(extra || ''), mono: !/chapter|term|section/.test(kind)});
    for (const e of all('h2[id]')) add('chapter', e, e.textContent.trim().replace(/\s+/g, ' '));
    for (const e of all('.r[id^=fn-], b[id]')) add(e.id.startsWith('fn-') ? 'function' : e.id.split('-')[0], e, e.id.slice(e.id.indexOf('-') + 1));
    for (const e of all('h3[id]')) add('section', e, e.textContent);
    for (const e of all('h4[id]')) add('term', e, [...e.childNodes].map(n => n.textContent.trim()).join(' \u00b7 '), e.dataset.also);
    const texts = all('.intro, .r, .term, .papers li').map(e => {
      const parts = e.matches('li') ? [e] : [...e.querySelectorAll('p:not(.meta):not(.terms), li, .io, .table, pre, .facts dd')];
      const text = parts.map(p => p.textContent).join(' ').replace(/\s+/g, ' '), head = e.id ? e : e.querySelector('h2[id], h3[id], h4[id]'), title = e.querySelector('h2, h3, h4');
      return {e, id: head ? head.id : '', where: title ? (title.matches('h2') ? title : title.firstChild).textContent.trim() : '', text, key: fold(text)};
    }).filter(t => t.id);
    index = {names, texts};
  };
  const rank = (n, q) => n.key === q ? 0 : n.key.startsWith(q) ? 1 : (' ' + n.key.replace(/[^a-z0-9]+/g, ' ')).includes(' ' + q) ? 2 : n.key.includes(q) ? 3 : n.extra.includes(q) ? 4 : 9;
  const span = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; e.textContent = text; return e; };
  const many = (n, what) => n + ' ' + what + (n === 1 ? '' : 's');
  const show = () => {
    if (!index) build();
    const q = fold(input.value.trim()); list.textContent = ''; picked = -1; hits = [];
    input.removeAttribute('aria-activedescendant');
    if (!q) return close();
    const names = index.names.map(n => [rank(n, q), n]).filter(r => r[0] < 9).sort((a, b) => a[0] - b[0]);
    const texts = q.length > 1 ? index.texts.filter(t => t.key.includes(q)) : [];
    for (const [, n] of names.slice(0, 24)) hits.push({id: n.id});
    names.slice(0, 24).forEach(([, n], i) => {
      const li = span('li', '', ''); li.append(span('span', 'what', n.kind), span('span', n.mono ? 'mono' : '', n.text)); option(li, i);
    });
    texts.slice(0, 30).forEach(t => {
      const k = t.key.indexOf(q), from = Math.max(0, k - 50), li = span('li', '', '');
      li.append(span('span', 'what', t.where || 'text'), (from ? '…' : '') + t.text.slice(from, k), span('mark', '', t.text.slice(k, k + q.length)), t.text.slice(k + q.length, k + 80) + '…');
      hits.push({id: t.id, e: t.e, q}); option(li, hits.length - 1);
    });
    count.textContent = hits.length ? many(names.length, 'name') + ', ' + many(texts.length, 'place') + ' in the text' + (names.length > 24 || texts.length > 30 ? '; the first are shown' : '') : 'Nothing found';
    found.hidden = false; input.setAttribute('aria-expanded', 'true');
    if (hits.length) pick(0);
  };
  const option = (li, i) => { li.id = 'option-' + i; li.setAttribute('role', 'option'); li.setAttribute('aria-selected', 'false'); li.addEventListener('click', () => go(i)); list.append(li); };
  const pick = i => {
    if (picked >= 0) list.children[picked].setAttribute('aria-selected', 'false');
    picked = i; const li = list.children[i]; li.setAttribute('aria-selected', 'true'); li.scrollIntoView({block: 'nearest'});
    input.setAttribute('aria-activedescendant', li.id);
  };
  const close = () => { found.hidden = true; input.setAttribute('aria-expanded', 'false'); };
  const go = i => {
    const hit = hits[i], target = document.getElementById(hit.id); close(); drawer(false); input.blur();
    location.hash = hit.id; target.scrollIntoView();
    if (!target.hasAttribute('tabindex')) target.tabIndex = -1;
    target.focus({preventScroll: true});
    if (window.Highlight && CSS.highlights) {
      CSS.highlights.delete('found');
      if (hit.e) {
        const ranges = [], chars = [], walk = document.createTreeWalker(hit.e, NodeFilter.SHOW_TEXT);      // a match may lie in several nodes
        for (let n, space = false; (n = walk.nextNode());) for (let k = 0; k < n.data.length; k++) {
          const white = /\s/.test(n.data[k]);
          if (!white || !space) chars.push([white ? ' ' : fold(n.data[k])[0] || n.data[k], n, k]);
          space = white;
        }
        const key = chars.map(c => c[0]).join('');
        for (let k = 0; (k = key.indexOf(hit.q, k)) >= 0; k += hit.q.length) {
          const r = new Range(), first = chars[k], last = chars[k + hit.q.length - 1];
          r.setStart(first[1], first[2]); r.setEnd(last[1], last[2] + 1); ranges.push(r);
        }
        CSS.highlights.set('found', new Highlight(...ranges));
        const r = ranges.length && ranges[0].getBoundingClientRect();
        if (r && (r.top > innerHeight * .8 || r.top < 60)) scrollBy(0, r.top - innerHeight / 3);
      }
    }
  };
  input.addEventListener('input', show);
  input.addEventListener('focus', () => { if (input.value.trim()) show(); });
  input.addEventListener('keydown', e => {
    if (e.key === 'ArrowDown' && hits.length) { pick((picked + 1) % hits.length); e.preventDefault(); }
    else if (e.key === 'ArrowUp' && hits.length) { pick((picked + hits.length - 1) % hits.length); e.preventDefault(); }
    else if (e.key === 'Enter' && picked >= 0) { go(picked); e.preventDefault(); }
    else if (e.key === 'Escape') { if (found.hidden) input.value = ''; close(); input.blur(); e.preventDefault(); e.stopPropagation(); }
  });
  addEventListener('keydown', e => {
    if (e.key === '/' && !e.ctrlKey && !e.metaKey && !e.altKey && !/^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) { input.focus(); input.select(); e.preventDefault(); }
    else if (e.key === 'Escape' && nav.classList.contains('open')) { drawer(false); menu.focus(); }
  });
  document.addEventListener('click', e => { if (!box.contains(e.target)) close(); });
  box.addEventListener('focusout', e => { if (e.relatedTarget && !box.contains(e.relatedTarget)) close(); });
})();
"""


def make(source, glossary): return Book(source, glossary).render()


def read(path):
    with open(path, encoding="utf-8") as f: return f.read()


def main():
    arguments = sys.argv[1:]
    check = "--check" in arguments
    if check: arguments.remove("--check")
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments): sys.exit(__doc__)
    out = arguments[0] if arguments else BOOK
    page = make(read(SOURCE), read(GLOSSARY))
    if check:
        if not os.path.exists(out) or read(out) != page: sys.exit(f"{out} is not what {SOURCE} and {GLOSSARY} make: run make book")
        print(f"{out} is up to date")
        return
    with open(out, "w", encoding="utf-8", newline="\n") as f: f.write(page)
    print(f"{out}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__": main()
