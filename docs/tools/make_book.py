#!/usr/bin/env python3
"""make_book.py [--check] [OUT]: renders align.c for reading, as one page, docs/book.html (or OUT).

From the folder of align.c. A row of the book is a comment at the margin and the code it stands
before. Of a comment, indented lines are formulas, tables or drawings and keep their layout; `in`
and `out` lines become a list; other lines flow. [glossary: TERM], [N] (papers), `chapter N`, `test:
NAME` and the names of functions become links. Terms come from docs/glossary.md. The same input
gives the same bytes. --check: writes nothing; exit 1 if docs/book.html is not what align.c and the
glossary make.
"""

import html
import os
import re
import sys
import unicodedata

SOURCE, GLOSSARY, BOOK = "align.c", "docs/glossary.md", "docs/book.html"
KEYWORDS = set("""
    auto break case char const continue default do double else enum extern float for goto if inline
    int long register return short signed sizeof static struct switch typedef union unsigned void
    volatile while bool true false NULL size_t ssize_t uint8_t uint16_t uint32_t uint64_t int8_t
    int16_t int32_t int64_t uintptr_t FILE va_list _Noreturn _Thread_local _Static_assert NAN
    INFINITY
    """.split())
GREEK = str.maketrans({"β": "beta", "ω": "omega", "π": "pi", "τ": "tau"})
TOKEN = re.compile(
    r"""
    (?P<comment>/\*.*?\*/|//[^\n]*)
    |(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<name>[A-Za-z_]\w*)
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    |(?P<space>[ \t]+)
    |(?P<line>\n)
    |(?P<other>->|.)
    """,
    re.S | re.X,
)
# Drawings of docs/figures, made by make_figures.py, and the function each stands above.
FIGURES = dict(
    collate="batch",
    kl_reward="reward",
    gae="gae",
    ppo_token_loss="ppo_clip",
    exact_optimum="closed_form",
    ppo_backward="gradient",
)
# What becomes a link, or looks like code, within a comment.
INLINE = re.compile(
    r"""
    \[glossary:\ (?P<tag>[^\]]+)\]
    |(?<![\w\]])(?P<papers>(?:\[\d{1,2}\])+)
    |`(?P<code>[^`]+)`
    |\b(?P<word>[Cc]hapters?\ )(?P<chapters>\d+(?:(?:,\ |\ and\ |,\ and\ )\d+)*)
    |(?<![\w-])(?P<flag>--[a-z]\w+)
    |\b(?P<kind>struct|enum)\ (?P<type>\w+)
    |\b(?P<name>[A-Za-z]\w*)
    """,
    re.X,
)


def unfold(text):
    """A line that ends in a backslash goes on in the next one, without its indentation."""
    return re.sub(r"\\\n *", "", text)


def escape(text):
    return html.escape(text, quote=False)


def fold(text):
    """Without accents and capitals."""
    letters = unicodedata.normalize("NFD", text)
    return "".join(c for c in letters if not unicodedata.combining(c)).lower()


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", fold(text).translate(GREEK)).strip("-")


def element(name, content, attributes=""):
    return (
        f"<{name} {attributes}>{content}</{name}>" if attributes else f"<{name}>{content}</{name}>"
    )


def link(address, content, attributes=""):
    return f'<a {attributes + " " if attributes else ""}href="#{address}">{content}</a>'


def figure(name):
    """A drawing, as part of the page."""
    drawing = read(f"docs/figures/{name}.svg").replace(' xmlns="http://www.w3.org/2000/svg"', "")
    return element("figure", "\n" + drawing) + "\n"


def label(text):
    return f"<span class=label>{text}</span>"


def portuguese(text):
    return f'<span lang="pt-BR">{escape(text)}</span>'


def indentation(line):
    return len(line) - len(line.lstrip())


def line_block(shown, indent):
    """A line of code or of a formula, a block of its own."""
    return f'<span class="l{f" i{min(indent, 40)}" if indent else ""}">{shown}\n</span>'


# ---- the source, as rows -------------------------------------------------------------------------
class Row:
    """A comment at the margin, the lines of code behind it, and what they define."""

    def __init__(self, comment, chapter):
        self.comment, self.chapter, self.id = comment, chapter, ""
        self.code, self.functions, self.types = [], [], []

    def main(self):
        """The function that the comment is about: "NAME -- ..." says so; else the first."""
        name = self.lead(" --|:")
        return name if name in self.functions else self.functions[0] if self.functions else ""

    def lead(self, behind=" --"):
        m = re.match(r"(\w+)(?:%s)" % behind, self.comment[0]) if self.comment else None
        return m[1] if m else ""


class Chapter:
    """A chapter, or a part of one that has a heading."""

    def __init__(self, number, title, part=False):
        self.number, self.part = number, part
        self.tags = re.findall(r"\[glossary: ([^\]]+)\]", title)
        self.title = re.sub(r"\s*\[glossary: [^\]]+\]", "", title).strip()
        self.lines, self.rows = [], []


def comment_lines(text):
    """A comment without its stars, line by line, indentation kept."""
    lines = text.split("\n")
    lines[0] = re.sub(r"^/\* ?", "", lines[0])
    lines[-1] = re.sub(r" ?\*/$", "", lines[-1])
    return [lines[0]] + [re.sub(r"^\s*\* ?", "", line) for line in lines[1:]]


def tokens(text):
    return [(m.lastgroup, m.group()) for m in TOKEN.finditer(text)]


def definitions(code):
    """[(kind, name)] of what a piece of top-level code defines: function, struct, enum, macro."""
    found = [("macro", m[1]) for m in re.finditer(r"(?m)^#\s*define\s+(\w+)\(", code)]
    code = re.sub(r"(?m)^#(?:[^\n\\]|\\.|\\\n)*", "", code)
    depth = parens = 0
    names, last, candidate, kind = [], "", "", None
    for group, text in tokens(code):
        if group in ("space", "line", "comment"):
            continue
        if text == "(":
            if depth == 0 and parens == 0:
                candidate = last
            parens += 1
        elif text == ")":
            parens -= 1
        elif text == "{":
            if depth == 0 and parens == 0:
                if last == ")" and candidate:
                    found.append(("function", candidate))
                elif kind and len(names) > 1 and names[-2] in ("struct", "enum", "union"):
                    found.append((names[-2], names[-1]))
            depth += 1
        elif text == "}":
            depth -= 1
            if depth == 0:
                names, candidate, kind = [], "", None
        elif text in (";", "=") and depth == 0:
            names, candidate, kind = [], "", None
        if depth == 0 and parens == 0 and group == "name":
            names.append(text)
            if text in ("struct", "enum", "union"):
                kind = text
        last = text
    return found


def layout(source):
    """What braces and comments make of the source's lines: three things.

    For each line the depth of braces at its start; {line: last line} of the comments that start at
    the margin outside braces; the lines that start inside a comment.
    """
    depths, comments, inside = [0], {}, set()
    depth, saved, directive, line, at_margin, last = 0, [], "", 0, True, "\n"
    for group, text in tokens(source):
        if group == "comment" and text.count("\n"):
            inside.update(range(line + 1, line + text.count("\n") + 1))
        if group == "comment" and at_margin and depth == 0:
            comments[line] = line + text.count("\n")
        if "\n" in text:  # a string too may go on behind a backslash
            line += text.count("\n")
            depths += [depth] * text.count("\n")
            if group == "line" and last != "\\":
                directive = ""
        elif text == "#" and last == "\n":
            directive = "#"
        elif directive == "#" and group == "name":
            directive = text
            if text.startswith("if"):
                saved.append(depth)
            elif text in ("else", "elif") and saved:
                depth = saved[-1]
            elif text == "endif" and saved:
                saved.pop()
        elif not directive and group == "other":
            depth += (text == "{") - (text == "}")
        at_margin = group == "line"
        if group != "space":
            last = text
    return depths, comments, inside


def paragraphs(source):
    """Top-level pieces of the source in order.

    ("comment", text), ("gap", "") for an empty line behind one, and ("code", text). Code ends at a
    comment at the margin, or at an empty line outside braces.
    """
    lines, pieces, code = source.split("\n"), [], []
    depths, comments, inside = layout(source)

    def flush():
        while code and not code[-1].strip():
            code.pop()
        if code:
            pieces.append(("code", "\n".join(code)))
        code.clear()

    i = 0
    while i < len(lines):
        line = lines[i]
        if i in comments and lines[comments[i]].rstrip().endswith("*/"):
            flush()
            pieces.append(("comment", "\n".join(lines[i : comments[i] + 1]).rstrip()))
            i = comments[i] + 1
            if i < len(lines) and not lines[i].strip():
                pieces.append(("gap", ""))
            continue
        if depths[i] == 0 and not line.strip() and i not in inside:
            flush()
        else:
            code.append(line)
        i += 1
    flush()
    return pieces


def banner_chapter(lines, banner, number):
    """The chapter, or the part of chapter `number`, that a comment with lines of === begins."""
    rest = [line for i, line in enumerate(lines) if i not in banner]
    head = next((i for i, line in enumerate(rest) if line.startswith("Chapter ")), None)
    if head is None:
        head = next(i for i, line in enumerate(rest) if line.strip())
    m = re.match(r"Chapter (\d+) - (.*)", rest[head])
    chapter = Chapter(int(m[1]), m[2]) if m else Chapter(number, rest[head], part=True)
    chapter.lines = rest[head + 1 :]
    return chapter


def goes_on(row, functions):
    """Does code with these functions belong to the row before it?"""
    if not row or not row.code:
        return bool(row)
    if row.functions or not functions:
        return not row.functions
    name = row.lead()
    return bool(name) and any(f == name or f.startswith(name + "_") for f in functions)


def read_source(source):
    """(title, chapters): every chapter with its rows."""
    chapters, row, title = [], None, ""
    for kind, text in paragraphs(source):
        if kind == "gap":
            if row and not row.code:
                row = None
            continue
        if kind == "comment":
            lines = comment_lines(text)
            banner = [i for i, line in enumerate(lines) if re.fullmatch(r"\s*[=-]{20,}\s*", line)]
            heading = re.fullmatch(r"-{4} (.+?) -{4,}", " ".join(lines).strip())
            number = chapters[-1].number if chapters else 0
            if banner:
                title = title if chapters else lines[0]
                chapters.append(banner_chapter(lines, banner, number))
                row = None
            elif heading:
                chapters.append(Chapter(number, heading[1], part=True))
                row = None
            else:
                row = Row(lines, chapters[-1])
                chapters[-1].rows.append(row)
            continue
        found = definitions(text)
        functions = [name for k, name in found if k == "function"]
        if not goes_on(row, functions):
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
    for line in lines[start + 1 :]:
        for entry in re.split(r"\s{2,}(?=\[\d+\])", line.strip()):
            m = re.match(r"\[(\d+)\] (.*)", entry)
            if m:
                papers[int(m[1])] = m[2]
            elif entry and papers:
                papers[max(papers)] += " " + entry
    return papers, lines[:start]


def read_glossary(text):
    """[(theme, {"name", "english name", label: text})], in order."""
    terms, theme, term = [], "", None
    for line in text.split("\n"):
        if line.startswith("## "):
            theme = line[3:].strip()
        elif line.startswith("### "):
            name, _, english = line[4:].partition(" · ")
            term = {"name": name.strip(), "english name": english.strip(), "theme": theme}
            terms.append(term)
        elif term and line.startswith("- ") and ": " in line:
            label, _, value = line[2:].partition(": ")
            term[label] = value.strip()
    return terms


# ---- rendering -----------------------------------------------------------------------------------
class Book:
    """The page, made of the source and the glossary."""

    def __init__(self, source, glossary):
        self.title, self.chapters = read_source(source)
        self.papers, self.chapters[0].lines = read_papers(self.chapters[0].lines)
        self.terms = read_glossary(glossary)
        self.numbers = {c.number for c in self.chapters}
        self.names, self.uses, self.cited, self.functions, self.types = {}, {}, {}, {}, {}
        for term in self.terms:
            term["id"] = "term-" + slug(term["name"])
            self.uses[term["id"]] = []
            for name in (term["name"], term["english name"], *term.get("Aliases", "").split("; ")):
                self.names.setdefault(name, term)
        count = {}
        for chapter in self.chapters:
            for row in chapter.rows:
                count[chapter.number] = count.get(chapter.number, 0) + 1
                self.register(row, f"row-{chapter.number}-{count[chapter.number]}")
        self.callers = {name: [] for name in self.functions}
        self.here = ("", "")  # where text is that is rendered now: address and label

    def register(self, row, otherwise):
        """What a row defines, it defines where it does so first; the row's address."""
        functions, types = dict.fromkeys(row.functions), dict.fromkeys(row.types)
        row.functions = [f for f in functions if self.functions.setdefault(f, row) is row]
        row.types = [(k, t) for k, t in types if self.types.setdefault(t, (k, row))[1] is row]
        if row.functions:
            row.id = "fn-" + row.main()
        elif row.lead():
            row.id = "about-" + row.lead()
        else:
            row.id = otherwise

    def is_type(self, name, kind):
        """Is this the name of a struct, of an enum, of a macro?"""
        return self.types.get(name, ("",))[0] == kind

    # -- words within comments
    def use(self, uses):
        if self.here not in uses:
            uses.append(self.here)

    def term_link(self, tag, chip=False):
        term = self.names.get(tag)
        if not term:
            return escape(f"[glossary: {tag}]")
        self.use(self.uses[term["id"]])
        if chip:
            return link(term["id"], self.both_names(term), "class=t")
        foreign = tag == term["name"] and fold(tag) != fold(term["english name"])
        lang = ' lang="pt-BR"' if foreign else ""
        return f'<a class=t href="#{term["id"]}"{lang}>{escape(tag)}</a>'

    @staticmethod
    def both_names(term):
        if fold(term["name"]) == fold(term["english name"]):
            return escape(term["name"])
        return f'{escape(term["english name"])}&nbsp;{portuguese(term["name"])}'

    def chapter_link(self, number, text=None):
        text = text or number
        return link(f"chapter-{number}", text) if int(number) in self.numbers else text

    def paper_links(self, text):
        """[3][14]: each a link, if the list of papers has it."""
        out = []
        for number in re.findall(r"\d+", text):
            if int(number) in self.papers:
                self.use(self.cited.setdefault(int(number), []))
                out.append(link(f"paper-{number}", f"[{number}]", "class=ref"))
            else:
                out.append(f"[{number}]")
        return "".join(out)

    def inline(self, text, prose=True):
        """Text of a comment with its links; in prose names and flags look like code."""
        out, at = [], 0
        for m in INLINE.finditer(text):
            out.append(escape(text[at : m.start()]))
            at, whole = m.end(), m.group()
            if m["tag"]:
                out.append(self.term_link(m["tag"]))
            elif m["papers"]:
                out.append(self.paper_links(whole))
            elif m["code"]:
                inner = self.inline(m["code"], False)
                out.append(element("code", inner) if prose else f"`{inner}`")
            elif m["chapters"]:
                numbers = re.sub(r"\d+", lambda n: self.chapter_link(n[0]), m["chapters"])
                out.append(m["word"] + numbers)
            elif m["flag"]:
                out.append(element("code" if prose else "span", whole, "class=a"))
            elif m["kind"]:
                known = self.is_type(m["type"], m["kind"])
                shown = link(f'{m["kind"]}-{m["type"]}', whole) if known else whole
                out.append(element("code", shown) if prose and known else shown)
            else:
                out.append(self.word(whole, text[at : at + 2] == "()", prose))
        out.append(escape(text[at:]))
        return "".join(out)

    def word(self, word, called, prose):
        """A word, which may be the name of a function; its own comment has no link to it."""
        known = word in self.functions and ("_" in word or called) and self.here[1] != word
        shown = link(f"fn-{word}", word) if known else word
        a_name = "_" in word and all(len(part) > 1 for part in word.split("_"))
        return element("code", shown) if prose and (known or a_name) else shown

    def flow(self, text):
        """A paragraph of prose."""
        text = re.sub(r"\s+", " ", text.strip())
        out = self.inline(text.replace(" -- ", " – ").replace(" -> ", " → "))
        if text.startswith("Reading paths."):
            out = re.sub(r"(?<=[ ,])\d{1,2}(?=[,. ])", lambda n: self.chapter_link(n[0]), out)
        return re.sub(r"^(By hand:)", r"<strong>\1</strong>", out)

    def formula(self, lines, wide):
        """Indented lines: a list with numbers, or text whose layout counts."""
        items = self.numbered(lines)
        if items:
            number = int(re.search(r"\d+", lines[0])[0])
            start = f"start={number}" if number != 1 else ""
            return element("ol", "".join(f"<li>{self.flow(item)}</li>" for item in items), start)
        margin = min(indentation(line) for line in lines if line.strip())
        texts = [line[margin:].rstrip() for line in lines]
        if wide:
            return element("pre", self.drawing(texts), "class=draw")
        out, plain = [], []
        while texts:
            table = self.table(texts)
            if (table or len(texts) == 1) and (plain or not table):
                plain += texts[:1] if not table else []
                out.append(element("pre", self.formula_lines(plain), "class=f"))
                plain = []
            elif not table:
                plain.append(texts[0])
            if table:
                out.append(table[0])
            texts = texts[table[1] if table else 1 :]
        return "".join(out)

    @staticmethod
    def numbered(lines):
        """The items of "1. ...", "2. ..."; None if the lines are no such list."""
        first = indentation(lines[0])
        starts = [bool(re.match(r"\s+\d+[.)] ", line)) for line in lines]
        inside = [indentation(line) > first for line in lines]
        if not starts[0] or not all(a or b for a, b in zip(starts, inside)):
            return None
        items = []
        for line in lines:
            if re.match(r" {%d}\d+[.)] " % first, line):
                items.append(re.sub(r"^\s+\d+[.)] ", "", line))
            else:
                items[-1] += " " + line.strip()
        return items

    def drawing(self, texts):
        """Lines of a chapter's head; the preface's have the numbers and names of chapters."""
        shown = "\n".join(self.inline(text, False) for text in texts)
        if self.here[0] != "chapter-0":
            return shown
        # the drawing's (13), and the table of contents
        shown = re.sub(r"\((\d{1,2})\)", lambda m: f"({self.chapter_link(m[1])})", shown)
        return re.sub(
            r"(?m)(^|\s)(\d{1,2}) ([A-Z](?:\S| (?! ))*)",
            lambda m: f"{m[1]}{m[2]} {self.chapter_link(m[2], m[3])}",
            shown,
        )

    def table(self, texts):
        """Labels and, from one column on, what they stand for: (html, how many lines).

        None if no table of two rows or more starts here.
        """
        m = re.match(r"(\S+(?: \S+)*)\s{3,}(?=[^\s\[])", texts[0])
        if not m or len(m[1]) > 24 or m[1][-1] in ";=,":
            return None
        column, rows = m.end(), []
        for text in texts:
            name, value = text[:column], text[column:]
            if name.strip():
                apart = name.endswith("  ") and not re.search(r"\S\s{2,}\S", name)
                if not value or value[0] == " " or not apart:
                    break
                rows.append([name.strip(), []])
            rows[-1][1].append(value)
        if len(rows) < 2:
            return None
        out = []
        for name, values in rows:
            formulas = element("pre", self.formula_lines(values), "class=f")
            out.append(f"<dt>{self.inline(name, False)}</dt><dd>{formulas}</dd>")
        return element("dl", "".join(out), "class=table"), sum(len(values) for _, values in rows)

    def formula_lines(self, texts):
        out = []
        for text in texts:
            indent = indentation(text)
            formula = gap = note = None
            if re.search(r"[^\s;]\s{3,}(\[\d|[(a-z])", text):
                formula, gap, note = re.match(r"(.*?[^\s;])(\s{3,})(\S.*)$|$", text).groups()
            # "a = b;   c = d": a line breaks between the two first
            pieces = re.split(r"(?<=;)( {2,})", formula or text)
            shown = [self.inline(piece, False) for piece in pieces]
            if len(pieces) > 1:
                shown[::2] = [element("span", piece, "class=q") for piece in shown[::2]]
            if formula:
                shown.append(gap + element("span", self.inline(note, False), "class=note"))
            out.append(line_block("".join(shown), indent // 2 * 2))
        return "".join(out)

    def prose(self, lines, name="", wide=False):
        """A comment's lines -> (html, terms tagged, tests named)."""
        tags, tests = [], []

        def lift(m):  # a tag at a sentence's end names the subject: it moves under the heading
            before, after = text[: m.start()].rstrip(), text[m.end() :].lstrip(" ")
            ends, begins = not before or before[-1] in ".:)]\n", not after or after[0] in "[\n"
            if not begins and not (ends and after[0].isupper()) or m[1] not in self.names:
                return m[0]
            tags.append(m[1])
            return ""

        text = "\n".join(lines)
        m = re.search(r"\s*(?<!\()\btest: ([\w*]+(?:,? [\w*]+)*)\.?\s*$", text)
        if m:
            tests = m[1]
            text = text[: m.start()] + "\n"
        text = re.sub(r"\[glossary: ([^\]]+)\]", lift, text)
        if name:
            text = re.sub(r"^%s(?: --|:)\s+" % re.escape(name), "", text)
        text = re.sub(r"(\S)[ ]{2,}(By hand:)", r"\1\n\2", text)
        out = []
        for kind, content in self.blocks(text):
            if kind == "p":
                words = " ".join(content)
                if not out and name and re.match(r"(?!align )[a-z]{2,} ", words):
                    words = words[0].upper() + words[1:]
                out.append(element("p", self.flow(words)))
            elif kind == "f":
                out.append(self.formula(content, wide))
            elif kind == "io":
                rows = [f"<dt>{key}</dt><dd>{self.flow(value)}</dd>" for key, value in content]
                out.append(element("dl", "".join(rows), "class=io"))
        return "".join(out), tags, tests

    @staticmethod
    def blocks(text):
        """[kind, lines]: "p" of prose, "f" of a formula, "io" of inputs and outputs, "" of none."""
        blocks = []
        for line in text.split("\n"):
            if not line.strip():
                blocks.append(["", []])
                continue
            label = re.match(r"(in|out)\s{2,}(\S.*)", line)
            last = blocks[-1] if blocks else ["", []]
            if label:
                if last[0] != "io":
                    blocks.append(["io", []])
                for part in re.split(r"\s{3,}(?=out\s{2,})", line):
                    key, value = re.match(r"(in|out)\s+(.*)", part).groups()
                    blocks[-1][1].append([key, value.strip()])
            elif last[0] == "io" and re.match(r"\s{4,}", line):
                last[1][-1][1] += " " + line.strip()
            elif re.match(r"\s{2,}\S", line):
                if last[0] != "f":
                    blocks.append(["f", []])
                blocks[-1][1].append(line)
            else:
                # a paragraph of its own, behind the end of a sentence
                begins = re.match(r"By hand:|Why ", line) and last[1]
                if begins and last[0] == "p":
                    begins = re.search(r"[.:)]\s*$", last[1][-1])
                if last[0] != "p" or begins:
                    blocks.append(["p", []])
                blocks[-1][1].append(line.strip())
        return blocks

    # -- code
    @staticmethod
    def tighten(words, width=74):
        """Comments at lines' ends that start in one column move to the nearest that suits them.

        That is one which suits those that fit their line; where they don't, two spaces behind the
        code.
        """
        groups, column = {}, 0
        for k, (group, word) in enumerate(words):
            if group == "comment" and k > 1 and words[k - 1][0] == "space":
                if words[k - 2][0] != "line":
                    code = column - len(words[k - 1][1])
                    groups.setdefault(column, []).append((k - 1, code, len(word)))
            column = len(word) - word.rfind("\n") - 1 if "\n" in word else column + len(word)
        for members in groups.values():
            fit = [code + 2 for _, code, comment in members if code + 2 + comment <= width]
            at = max(fit, default=0)
            for k, code, comment in members:
                fits = code + 2 <= at and at + comment <= width
                words[k] = ("space", " " * (at - code if fits else 2))
        return words

    def code(self, text, row):
        """Code with light colours and links, a block for each line."""
        words, shown_types = self.tighten(tokens(text)), set()
        depth, lines, line, i = 0, [], [], 0
        waiting = list(row.functions)
        macros = {name for kind, name in row.types if kind == "macro"}
        solid = [k for k, (g, _) in enumerate(words) if g not in ("space", "line", "comment")]
        before = {k: words[j][1] for j, k in zip(solid, solid[1:])}
        after = {j: words[k][1] for j, k in zip(solid, solid[1:])}
        parens, inside, preprocessor, only_space = 0, "", False, True
        indent = 0

        def put(part):
            line.append(part)

        def end_line():
            lines.append(line_block("".join(line), indent))
            line.clear()

        while i < len(words):
            group, word = words[i]
            if group == "line":
                end_line()
                only_space, indent = True, 0
                if preprocessor and not (i and words[i - 1][1] == "\\"):
                    preprocessor = False
            elif group == "space":
                if only_space:
                    indent = len(word.expandtabs(4)) // 4 * 4
                put(word)
            elif group == "comment":
                trailing = not only_space
                if "\n" in word and not trailing:
                    word = re.sub(r"\s*\n\s*\*?\s*", " ", word)  # prose between lines of code flows
                for k, part in enumerate(word.split("\n")):
                    if k:
                        end_line()
                        part = part.lstrip(" *") if part.strip() != "*/" else part.strip()
                        put(" " * 4)
                    kind = "c e" if trailing else "c"
                    put(element("span", self.inline(part, False), f'class="{kind}"'))
                only_space = False
            elif group == "string":
                shown = re.sub(r"--\w+", r"<span class=a>\g<0></span>", escape(word))
                put(element("span", shown, "class=s"))
            elif group == "name":
                nxt, prev = after.get(i, ""), before.get(i, "")
                called, defined = nxt == "(", preprocessor and prev == "define"
                outside = depth == 0 and parens == 0 and not preprocessor
                used = called or prev == "return"
                used = used or ("_" in word and not re.match(r"[\w*]", prev or "="))
                if preprocessor and prev == "#":
                    put(element("span", word, "class=m"))
                elif word in macros and prev == "define" and word not in shown_types:
                    shown_types.add(word)
                    put(element("b", word, f'id="macro-{word}"'))
                elif word in KEYWORDS:
                    run = [word]  # neighbours share one span
                    while (
                        i + 2 < len(words)
                        and words[i + 1][1] == " "
                        and words[i + 2][1] in KEYWORDS
                    ):
                        run.append(words[i + 2][1])
                        i += 2
                    put(element("span", " ".join(run), "class=k"))
                elif outside and called and word in waiting:
                    waiting.remove(word)
                    inside = word
                    anchor = "" if "fn-" + word == row.id else f'id="fn-{word}"'
                    put(element("b", word, anchor))
                elif prev in ("struct", "enum", "union") and self.is_type(word, prev):
                    here = self.types[word][1] is row and word not in shown_types
                    if here and nxt == "{" and depth == 0:
                        shown_types.add(word)
                        put(element("b", word, f'id="{prev}-{word}"'))
                    else:
                        put(link(f"{prev}-{word}", word))
                elif (
                    word in self.functions
                    and word != inside
                    and used
                    and prev not in (".", "->")
                    and not defined
                ):
                    if inside and inside not in self.callers[word]:
                        self.callers[word].append(inside)
                    put(link(f"fn-{word}", word))
                elif called and self.is_type(word, "macro") and not defined:
                    put(link(f"macro-{word}", word))
                else:
                    put(word)
                only_space = False
            else:
                if word == "#" and only_space:
                    preprocessor = True
                if not preprocessor:
                    if word == "{":
                        depth += 1
                    elif word == "}":
                        depth -= 1
                        if depth == 0:
                            inside = ""
                    elif word == "(":
                        parens += depth == 0
                    elif word == ")":
                        parens -= depth == 0
                if word == "#" and preprocessor and only_space:
                    put(element("span", word, "class=m"))
                else:
                    put(escape(word))
                only_space = False
            i += 1
        if line:
            end_line()
        return "".join(lines)

    # -- parts of the page
    def meta(self, row_tags, tests):
        """The lines beside a comment that name its terms and its tests."""
        out = []
        if row_tags:
            tags = list(dict.fromkeys(row_tags))
            links = " ".join(self.term_link(tag, True) for tag in tags)
            many = "Terms" if len(tags) > 1 else "Term"
            out.append(element("p", f"{label(many)} {links}", "class=terms"))
        if tests:
            names = ", ".join(element("code", escape(t)) for t in re.split(r", ?", tests))
            out.append(element("p", f'{label("Test")} {names}', "class=meta"))
        return out

    def row(self, row):
        main, lead = row.main(), row.lead()
        types = [f"{kind} {name}" for kind, name in row.types if kind != "macro"]
        address = {t: t.replace(" ", "-") for t in types}
        anchor = row.id
        if main:
            anchor = "fn-" + main
        elif types and not lead:
            anchor = address[types[0]]
        self.here = (anchor, main or lead or (types + [f"chapter {row.chapter.number}"])[0])
        left = [element("h3", link(f"fn-{name}", name)) for name in row.functions]
        if lead and lead != main:
            left.insert(0, element("h3", link(row.id, lead)))
        elif not row.functions and types:
            left.append(element("h3", "<br>".join(link(address[t], t) for t in types[:3])))
        if row.comment:
            body, tags, tests = self.prose(row.comment, lead or main)
            meta = self.meta(tags, tests)
            left += meta[:1] if tags else []
            left.append(body)
            left += meta[1:] if tags else meta
        right = self.code("\n\n".join(row.code), row)
        # who calls them is known when all rows are done
        left.append("\0" + ",".join(row.functions) + "\0")
        kind = "r" if row.comment or row.functions else "r bare"
        both = element("div", "".join(left), "class=p")
        if right:
            both += element("pre", element("code", right), "class=code")
        else:
            kind = "r text"
        above = "".join(figure(FIGURES[name]) for name in row.functions if name in FIGURES)
        return above + element("div", both, f'class="{kind}" id="{row.id}"') + "\n"

    def called_by(self, names):
        out = []
        for name in filter(None, names.split(",")):
            callers = self.callers[name]
            if not callers:
                continue
            some = ", ".join(link(f"fn-{c}", c) for c in callers[:6])
            more = f" and {len(callers) - 6} more" if len(callers) > 6 else ""
            which = label(f"{name}: called by" if "," in names else "Called by")
            out.append(element("p", f"{which} {some}{more}", "class=meta"))
        return "".join(out)

    def chapter(self, chapter):
        number, title = chapter.number, escape(chapter.title)
        if chapter.part:
            anchor = f"part-{number}-{slug(chapter.title)}"
            head = element("h3", title, f'class=part id="{anchor}"')
        else:
            anchor = f"chapter-{number}"
            shown = element("span", f"Chapter {number}", "class=number")
            head = element("h2", f"{shown} {title}", f'id="{anchor}"')
        self.here = (anchor, f"chapter {number}")
        body, tags, tests = self.prose(chapter.lines, wide=True)
        meta = "".join(self.meta(chapter.tags + tags, tests))
        intro = element("div", head + meta + body, "class=intro") + "\n"
        return intro + "".join(self.row(row) for row in chapter.rows)

    def links(self, places):
        return ", ".join(link(address, escape(text)) for address, text in places)

    def glossary(self):
        out, theme = [GLOSSARY_HEAD], None
        for term in self.terms:
            if term["theme"] != theme:
                theme = term["theme"]
                english, _, other = theme.partition(" · ")
                names = f"{escape(english)} {portuguese(other)}"
                head = element("h3", names, f'class=theme id="theme-{slug(english)}"')
                out.append(head + "\n")
            self.here = (term["id"], term["name"])
            out.append(self.term(term))
        return "".join(out)

    def term(self, term):
        """A term of the glossary: its names, both definitions, and the facts."""
        facts = self.facts(term)
        keep = self.uses
        self.uses = {key: [] for key in keep}  # a definition's own words are no use of a term
        english = element("p", self.flow(term.get("English", "")), "class=en")
        other = element("p", self.flow(term.get("Português", "")), 'class=pt lang="pt-BR"')
        self.uses = keep
        head = escape(term["english name"])
        if fold(term["name"]) != fold(term["english name"]):
            head += " " + portuguese(term["name"])
        also = html.escape(term["name"] + " " + term.get("Aliases", ""))
        head = element("h4", head, f'id="{term["id"]}" data-also="{also}"')
        two = element("div", english + other, "class=two")
        rows = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts)
        body = head + two + element("dl", rows, "class=facts")
        return element("section", body, f'class=term aria-labelledby="{term["id"]}"') + "\n"

    def facts(self, term):
        """[(label, html)] of what is known of a term."""
        facts = []
        if term.get("Aliases"):
            facts.append(("Also", escape(term["Aliases"].replace("; ", ", "))))
        names = []
        for listed in re.findall(r"chapter \d+((?:, `[^`]+`)+)", term.get("In align.c", "")):
            names += [self.definition(name) for name in re.findall(r"`([^`]+)`", listed)]
        if names:
            facts.append(("In align.c", ", ".join(names)))
        uses = self.uses[term["id"]]
        if uses:
            facts.append(("Used at", self.links(uses)))
        if term.get("Test"):
            tests = re.findall(r"`([^`]+)`", term["Test"])
            facts.append(("Test", ", ".join(element("code", t) for t in tests)))
        if term.get("Try"):
            command = self.inline(term["Try"].strip("`"), False)
            facts.append(("Try", element("code", command)))
        others = [name for name in term.get("See also", "").split("; ") if name in self.names]
        if others:
            others = [self.names[name] for name in others]
            links = [link(t["id"], escape(t["english name"]), "class=t") for t in others]
            facts.append(("See also", ", ".join(links)))
        return facts

    def definition(self, name):
        """The name of a function, or "struct NAME", as a link to where it is defined."""
        kind, _, bare = name.rpartition(" ")
        shown = element("code", name)
        if name in self.functions:
            return link(f"fn-{name}", shown)
        return link(f"{kind}-{bare}", shown) if kind and self.is_type(bare, kind) else shown

    def paper_list(self):
        items = []
        for number, text in sorted(self.papers.items()):
            cited, shown = self.cited.get(number, []), escape(text)
            if cited:
                places = f'{label("Cited at")} {self.links(cited)}'
                shown += "<br>" + element("span", places, "class=meta")
            items.append(element("li", shown, f'id="paper-{number}" value={number}'))
        papers = element("ol", "".join(items), "class=papers")
        return element("div", '<h2 id="papers">Papers</h2>' + papers, "class=intro") + "\n"

    def nav(self):
        def item(address, number, title, inner, attributes=""):
            head = link(address, f"<span class=n>{number}</span> {title}")
            inner = element("ul", inner) if inner else ""
            return element("li", head + inner, f'data-chapter="{address}"{attributes}')

        out = []
        for chapter in self.chapters:
            if chapter.part:
                continue
            number, inner = chapter.number, []
            for row in (row for c in self.chapters if c.number == number for row in c.rows):
                for name in row.functions:
                    inner.append(element("li", link(f"fn-{name}", name.replace("_", "_<wbr>"))))
            title = escape(chapter.title)
            out.append(item(f"chapter-{number}", number, title, "".join(inner)))
        themes = dict.fromkeys(term["theme"].partition(" · ")[0] for term in self.terms)
        inner = [element("li", link(f"theme-{slug(t)}", escape(t))) for t in themes]
        out.append(item("glossary", "", "Glossary", "".join(inner), " class=back"))
        out.append(item("papers", "", "Papers", ""))
        return element("ul", "".join(out), "class=toc")

    def render(self):
        def section(address, content):
            return f'<section class=chapter aria-labelledby="{address}">\n{content}</section>\n'

        name, _, what = self.title.partition(" -- ")
        sections = []
        for chapter in self.chapters:
            if chapter.part:
                sections[-1][1] += self.chapter(chapter)
            else:
                sections.append([f"chapter-{chapter.number}", self.chapter(chapter)])
        body = "".join(section(address, content) for address, content in sections)
        body = re.sub("\0([^\0]*)\0", lambda m: self.called_by(m[1]), body)
        body = body.replace("-&gt;", "<span class=a>-&gt;</span>")
        glossary = section("glossary", self.glossary())
        papers = section("papers", self.paper_list())
        summary = what[:1].upper() + what[1:]
        return PAGE.format(
            title=escape(f"{name}: the book"),
            name=escape(name),
            what=escape(summary),
            description=html.escape(summary),
            style=STYLE.strip(),
            script=SCRIPT.strip(),
            nav=self.nav(),
            body=figure("pipeline") + body + glossary + papers,
            functions=len(self.functions),
            terms=len(self.terms),
            chapters=len(self.numbers),
        )


GLOSSARY_HEAD = (
    '<div class=intro><h2 id="glossary">Glossary <span lang="pt-BR">Glossário</span></h2>'
    "<p>The terms of the course, in English and Portuguese: what implements each, which test"
    " proves it, where the book uses it.</p></div>\n"
)

PAGE = unfold(r"""<!DOCTYPE html>
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
<input id=search type=search placeholder="Search  /" autocomplete=off spellcheck=false \
    role=combobox aria-expanded=false aria-controls=results aria-autocomplete=list \
    aria-keyshortcuts="/">
<div id=found hidden><p id=count role=status></p><ul id=results role=listbox \
    aria-label="Results"></ul></div>
</div>
</header>
<nav id=toc aria-label="Chapters">{nav}</nav>
<main id=main tabindex=-1>
<div class=title><h1>{name}</h1><p>{what}</p>
<p class=how>Comments stand beside their code. A name in the code leads to its definition, a <span \
    class=t>term</span> to the glossary in English and Portuguese, a number in brackets to the \
    paper. Press <kbd>/</kbd> to search {functions} functions, {terms} terms and the text. A test \
    runs by its name: <code>./test_align NAME</code>.</p></div>
{body}</main>
<script>
{script}
</script>
</body>
</html>
""")

STYLE = unfold(r"""
:root { color-scheme: light dark;
  --paper: #fbfaf6; --panel: #f3f0e8; --line: #ddd8cb; --ink: #24221d; --soft: #625c50; \
      --link: #1d5a83; --term: #7a3b12; --wash: #f6e7d3;
  --keyword: #3c4f8f; --string: #3f6321; --comment: #6a6254; --macro: #7d4a72; --mark: #ffe08a; \
      --focus: #1d5a83; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #17191c; --panel: #1f2226; --line: #363a40; --ink: #dcd8cf; --soft: #a39e93; \
      --link: #8fc1e6; --term: #e8b184; --wash: #3a2d20;
  --keyword: #a3b6ee; --string: #a9cb8a; --comment: #a09887; --macro: #d5a6c8; --mark: #6b5a17; \
      --focus: #8fc1e6; } }
:root { --serif: Charter, "Bitstream Charter", "Sitka Text", "Source Serif 4", "Noto Serif", \
    Cambria, Georgia, "DejaVu Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", \
      "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", \
      "Liberation Mono", monospace; --bar: 3.25rem; }
* { box-sizing: border-box; }
html { font: 100%/1.5 var(--serif); font-size-adjust: .5; color: var(--ink); \
    background: var(--paper); scroll-padding-top: calc(var(--bar) + 1rem); \
    -webkit-text-size-adjust: 100%; }
body { margin: 0; }
a { color: var(--link); text-decoration-color: color-mix(in srgb, currentColor 35%, transparent); \
    text-underline-offset: .18em; }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; border-radius: 3px; }
main:focus { outline: none; }
code, kbd, pre, nav, .top, h1, h3, .meta, .terms, .facts { font-size-adjust: none; }
code, kbd, pre { font-family: var(--mono); font-size: .8125rem; }
.a { white-space: nowrap; }
.p code, .intro code, .term code { font-size: .84em; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); \
    white-space: nowrap; }
.skip { position: fixed; left: 1rem; top: -4rem; z-index: 9; padding: .5rem 1rem; \
    background: var(--paper); border: 1px solid var(--line); font-family: var(--sans); }
.skip:focus { top: .5rem; }

.top { position: sticky; top: 0; z-index: 5; height: var(--bar); display: flex; \
    align-items: center; gap: 1rem; padding: 0 1.25rem; background: var(--paper); \
    border-bottom: 1px solid var(--line); font-family: var(--sans); }
.top .name { font: 600 1rem var(--mono); color: var(--ink); text-decoration: none; }
.top button { font: inherit; font-size: .875rem; color: var(--ink); background: var(--panel); \
    border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; }
.search { position: relative; margin-left: auto; width: min(24rem, 100%); }
.search[hidden] { display: none; }
#search { width: 100%; font: 1rem var(--sans); color: var(--ink); background: var(--panel); \
    border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; }
#search::placeholder { color: var(--soft); opacity: 1; }
#found { position: absolute; right: 0; top: calc(100% + .4rem); \
    width: min(38rem, calc(100vw - 2rem)); max-height: min(34rem, calc(100vh - 5rem)); \
    overflow-y: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; \
    box-shadow: 0 8px 28px rgb(0 0 0 / .18); padding: .4rem; }
#count { margin: .2rem .6rem .4rem; font-size: .8125rem; color: var(--soft); }
#results { list-style: none; margin: 0; padding: 0; }
#results li { padding: .4rem .6rem; border-radius: 5px; cursor: pointer; font-size: .9rem; \
    line-height: 1.35; overflow-wrap: anywhere; }
#results li[aria-selected=true] { background: var(--wash); }
#results .what { float: right; max-width: 45%; margin-left: 1rem; font-size: .78rem; \
    color: var(--soft); text-align: right; }
#results .mono { font-family: var(--mono); font-size: .85rem; }
#results mark { background: var(--mark); color: inherit; }

nav { font: .875rem/1.4 var(--sans); }
nav ul { list-style: none; margin: 0; padding: 0; }
nav a { display: block; padding: .28rem .6rem; color: var(--ink); text-decoration: none; \
    border-radius: 5px; }
nav a:hover { background: var(--panel); text-decoration: underline; }
.toc > li > a { padding-left: 2.4rem; position: relative; }
nav .n { position: absolute; left: .4rem; width: 1.4rem; text-align: right; color: var(--soft); \
    font-variant-numeric: tabular-nums; }
nav li ul { display: none; margin: .2rem 0 .6rem 2.3rem; border-left: 1px solid var(--line); }
nav .current > ul { display: block; }
nav .current > a { font-weight: 600; background: var(--panel); }
nav li li a { font: .75rem/1.5 var(--mono); padding: .12rem .6rem; color: var(--soft); \
    overflow-wrap: anywhere; }
nav .back li a { font-family: var(--sans); }
nav li li a[aria-current] { color: var(--ink); background: var(--wash); }
nav .back { margin-top: .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }

main { min-width: 0; }
.title { padding: 3rem 2rem 1rem; }
figure { margin: 1.5rem 2rem; max-width: 46rem; overflow-x: auto; }
figure svg { display: block; min-width: 36rem; }
h1 { font: 600 2.6rem/1.1 var(--mono); margin: 0 0 .6rem; letter-spacing: -.03em; }
.title p { max-width: 58ch; margin: 0 0 .8rem; font-size: 1.2rem; }
.title .how { font-size: 1rem; color: var(--soft); }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 .35em; \
    background: var(--panel); }
.chapter { border-top: 1px solid var(--line); }
.intro { padding: 3rem 2rem 1.5rem; max-width: 62rem; }
.intro > p, .intro > ol, .intro > dl { max-width: 58ch; }
h2 { font: 600 1.75rem/1.25 var(--serif); margin: 0 0 1rem; }
h2 .number { display: block; font: 600 .8125rem/1.6 var(--sans); color: var(--soft); \
    letter-spacing: .02em; }
h2 [lang], h3 [lang], h4 [lang] { font-weight: 400; color: var(--soft); font-style: italic; }
h3 { font: 600 .875rem/1.4 var(--mono); margin: 0; overflow-wrap: anywhere; }
h3 + p, h3 + dl, h3 + pre, h3 + ol { margin-top: .5rem; }
h3 a { color: var(--ink); text-decoration: none; }
h3 a:hover { text-decoration: underline; }
h3.part, h3.theme { font: 600 1.25rem/1.3 var(--serif); }
h3.theme { padding: 2rem 2rem .5rem; }
p { margin: 0 0 .7rem; hyphens: manual; }
@counter-style paper { system: extends decimal; prefix: "["; suffix: "] "; }
.terms, .meta { font: .8125rem/1.5 var(--sans); color: var(--soft); margin: .3rem 0 .6rem; \
    overflow-wrap: anywhere; }
h3 + .meta { margin-top: .5rem; }
h3 + h3 { margin-top: .4rem; }
.meta a { color: var(--soft); }
.meta a, .meta code { font-family: var(--mono); font-size: .75rem; }
.label { color: var(--soft); font: .8125rem var(--sans); margin-right: .3em; }
.t { color: var(--term); text-decoration: none; \
    border-bottom: 1px solid color-mix(in srgb, currentColor 45%, transparent); }
a.t:hover { border-bottom-color: currentColor; }
.terms { margin-top: .5rem; line-height: 1.75; }
.terms .t { background: var(--wash); border: 0; border-radius: 4px; padding: .12rem .45rem; \
    margin-right: .2rem; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.terms .t:hover { text-decoration: underline; }
.t [lang] { font-style: italic; }
.t [lang]::before { content: "\b7\20"; }
.ref { font-size: .88em; text-decoration: none; }
.ref:hover { text-decoration: underline; }

.r { display: grid; grid-template-columns: minmax(0, 1fr); gap: .8rem; padding: 1.1rem 1.25rem; }
.r + .r { border-top: 1px solid color-mix(in srgb, var(--line) 55%, transparent); }
.r > * { min-width: 0; }
.p > :last-child { margin-bottom: 0; }
.p ol, .intro ol { padding-left: 1.4rem; margin: 0 0 .7rem; }
pre { margin: 0; line-height: 1.5; tab-size: 4; }
pre.code { background: var(--panel); border-radius: 8px; padding: .8rem 0; overflow-x: auto; }
pre.code code { display: block; width: max-content; min-width: 100%; padding: 0 1rem; \
    font-size: .78rem; }
.l { display: block; }
pre.f { margin: .2rem 0 .8rem; padding: .1rem 0 .1rem .8rem; border-left: 2px solid var(--line); \
    white-space: pre-wrap; overflow-wrap: anywhere; font-size: .78rem; line-height: 1.6; }
pre.f .l { padding-left: 2ch; text-indent: -2ch; }
pre.f .q { display: inline-block; max-width: 100%; padding-left: 2ch; text-indent: -2ch; \
    vertical-align: top; }
pre.f .note { color: var(--soft); display: inline-block; max-width: 100%; text-indent: 0; }
pre.draw { margin: .3rem 0 1rem; overflow-x: auto; font-size: .8125rem; line-height: 1.45; \
    padding: .8rem 1rem; width: fit-content; max-width: 100%; background: var(--panel); \
    border-radius: 8px; }
.io { display: grid; grid-template-columns: 2.2rem minmax(0, 1fr); gap: .15rem .4rem; \
    margin: .3rem 0 .7rem; }
.io dt { font: .8125rem/1.9 var(--mono); color: var(--soft); }
.io dd { margin: 0; }
.table { display: grid; grid-template-columns: fit-content(24ch) minmax(0, 1fr); \
    gap: .15rem .8rem; margin: .2rem 0 .8rem; padding-left: .8rem; \
    border-left: 2px solid var(--line); }
.table dt { font: .78rem/1.6 var(--mono); overflow-wrap: anywhere; }
.table dd, .table pre.f { margin: 0; padding: 0; border: 0; }
.k { color: var(--keyword); } .s { color: var(--string); } .c { color: var(--comment); \
    } .m { color: var(--macro); }
.code a { color: inherit; text-decoration: underline; \
    text-decoration-color: color-mix(in srgb, currentColor 28%, transparent); }
.code a:hover { text-decoration-color: currentColor; color: var(--link); }
.code .c a { color: var(--link); }
.code .c a.t { color: var(--term); }
.code b { font-weight: 700; }
:target { background: var(--wash); }
.r:target { background: none; }
.r:target h3:first-child, b:target { background: var(--wash); }
h2:target { background: none; }
.r:target h3:first-child, h4:target, h3:target { box-shadow: 0 0 0 .35rem var(--wash); \
    border-radius: 2px; }
::highlight(found) { background-color: var(--mark); }

.term { padding: 1.2rem 1.25rem; border-top: 1px solid color-mix(in srgb, var(--line) 55%, \
    transparent); }
h4 { font: 600 1.1rem/1.35 var(--serif); margin: 0 0 .5rem; overflow-wrap: anywhere; }
h4 [lang] { display: inline-block; margin-left: .4em; font-size: 1rem; }
.two p { max-width: 58ch; overflow-wrap: break-word; }
.facts { display: grid; grid-template-columns: 5.2rem minmax(0, 1fr); gap: .2rem .6rem; \
    margin: .2rem 0 0; font: .8125rem/1.55 var(--sans); max-width: 75rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts code { font-size: .78rem; }
.papers { padding-left: 2.6rem; list-style: paper; }
.papers li { margin-bottom: .7rem; padding-left: .3rem; }

@media (max-width: 63.99rem) {
  .js nav { position: fixed; inset: var(--bar) 0 0 0; z-index: 4; background: var(--paper); \
      overflow-y: auto; overscroll-behavior: contain; padding: 1rem 1rem 3rem; display: none; }
  .js nav.open { display: block; }
  nav { padding: 1rem; }
  nav a { padding-top: .5rem; padding-bottom: .5rem; }
  nav li li a { padding-top: .35rem; padding-bottom: .35rem; }
  .top { padding: 0 1rem; gap: .7rem; }
  .title, .intro { padding: 2rem 1rem 1rem; }
  figure { margin: 1rem; }
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
  nav { position: sticky; top: var(--bar); height: calc(100vh - var(--bar)); overflow-y: auto; \
      padding: 1rem .8rem 3rem; border-right: 1px solid var(--line); overscroll-behavior: contain; }
  .r { grid-template-columns: minmax(20rem, clamp(54ch, 32vw, 62ch)) minmax(0, 62rem); gap: 2rem; \
      padding: 1.3rem 1.5rem 1.3rem 2rem; }
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
  pre.code { background: none; border-left: 2px solid var(--line); border-radius: 0; padding: 0; \
      overflow: visible; }
  pre.code code, pre.draw { white-space: pre-wrap; overflow-wrap: anywhere; width: auto; \
      font-size: 7pt; line-height: 1.4; padding: 0 0 0 .6rem; }
  pre.draw { background: none; }
  .code .l { padding-left: 4ch; text-indent: -4ch; orphans: 2; }
  .meta, .terms { font-size: 7.5pt; }
  .term { break-inside: avoid; }
  .papers li { break-inside: avoid; }
  @page { margin: 18mm 16mm; }
INDENTS}
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: auto; } }
""").replace(
    "INDENTS",
    "".join(
        f"  .i{n} {{ padding-left: {n + 4}ch !important; text-indent: -{n + 4}ch !important; }}\n"
        for n in range(2, 41, 2)
    ),
)

SCRIPT = unfold(r"""
'use strict';
(() => {
  const one = s => document.querySelector(s), all = s => [...document.querySelectorAll(s)];
  document.documentElement.classList.add('js');
  const menu = one('#menu'), nav = one('#toc'), box = one('#searchbox'), input = one('#search'), \
      found = one('#found'), list = one('#results'), count = one('#count');
  menu.hidden = box.hidden = false;

  // The list of chapters: a drawer on a narrow window.
  const drawer = open => { \
      nav.classList.toggle('open', open); \
      menu.setAttribute('aria-expanded', open); };
  menu.addEventListener('click', () => {
    const open = !nav.classList.contains('open');
    drawer(open);
    if (open) (nav.querySelector('.current > a') || nav.querySelector('a')).focus();
  });
  nav.addEventListener('click', e => { if (e.target.closest('a')) drawer(false); });

  // Which chapter and function is being read.
  const items = new Map(all('.toc > li').map(li => [li.dataset.chapter, li])), \
      inner = new Map(all('.toc li li a').map(a => [a.hash.slice(1), a]));
  const marks = all('h2[id], h3[id], .r[id]'); let current, at;
  const follow = () => {
    let low = 0, high = marks.length - 1;                       \
        // the last heading above the upper third of the window
    while (low < high) { \
        const middle = (low + high + 1) >> 1; \
        if (marks[middle].getBoundingClientRect().top < innerHeight / 3) low = middle; \
        else high = middle - 1; }
    const mark = marks[low]; if (mark === at) return; at = mark;
    const chapter = items.get(mark.closest('.chapter').getAttribute('aria-labelledby'));
    if (chapter !== current) {
      if (current) { \
          current.classList.remove('current'); \
          current.firstElementChild.removeAttribute('aria-current'); }
      if (chapter) { \
          chapter.classList.add('current'); \
          chapter.firstElementChild.setAttribute('aria-current', 'true'); }
      current = chapter;
    }
    for (const a of nav.querySelectorAll('li li a[aria-current]')) \
        a.removeAttribute('aria-current');
    const a = inner.get(mark.id) || (chapter && chapter.firstElementChild);
    if (a && a.parentElement.parentElement !== nav.firstElementChild) \
        a.setAttribute('aria-current', 'true');
    if (a && nav.scrollHeight > nav.clientHeight) {
      const r = a.getBoundingClientRect(), n = nav.getBoundingClientRect();
      if (r.top < n.top + 20 || r.bottom > n.bottom - 20) \
          nav.scrollTop += r.top - n.top - n.height / 3;
    }
  };
  // A comment stays beside its code while that passes; \
     one that is taller than the window stays with its end.
  const anchor = () => { \
      for (const p of all('.r > .p')) \
          p.style.top = p.offsetHeight > innerHeight - 90 \
              ? innerHeight - p.offsetHeight - 20 + 'px' : ''; };
  anchor(); addEventListener('resize', anchor);
  let asked = false;
  const later = () => { if (!asked) { \
      asked = true; \
      requestAnimationFrame(() => { asked = false; follow(); }); } };
  addEventListener('scroll', later, {passive: true}); addEventListener('resize', later); follow();

  // Search: names first, then text. Accents and case do not count.
  const fold = s => s.normalize('NFD').replace(/[\u0300-\u036f]/g, '').toLowerCase();
  let index, picked = -1, hits = [];
  const build = () => {
    const names = [], \
        add = (kind, e, text, extra) => names.push({kind, id: e.id, text, key: fold(text), \
            extra: fold(extra || ''), mono: !/chapter|term|section/.test(kind)});
    for (const e of all('h2[id]')) add('chapter', e, e.textContent.trim().replace(/\s+/g, ' '));
    for (const e of all('.r[id^=fn-], b[id]')) \
        add(e.id.startsWith('fn-') ? 'function' : e.id.split('-')[0], e, \
            e.id.slice(e.id.indexOf('-') + 1));
    for (const e of all('h3[id]')) add('section', e, e.textContent);
    for (const e of all('h4[id]')) \
        add('term', e, [...e.childNodes].map(n => n.textContent.trim()).join(' \u00b7 '), \
            e.dataset.also);
    const texts = all('.intro, .r, .term, .papers li').map(e => {
      const parts = e.matches('li') ? [e] : \
          [...e.querySelectorAll('p:not(.meta):not(.terms), li, .io, .table, pre, .facts dd')];
      const text = parts.map(p => p.textContent).join(' ').replace(/\s+/g, ' '), \
          head = e.id ? e : e.querySelector('h2[id], h3[id], h4[id]'), \
          title = e.querySelector('h2, h3, h4');
      return {e, id: head ? head.id : '', \
          where: title ? (title.matches('h2') ? title : title.firstChild).textContent.trim() : '', \
          text, key: fold(text)};
    }).filter(t => t.id);
    index = {names, texts};
  };
  const rank = (n, q) => n.key === q ? 0 \
      : n.key.startsWith(q) ? 1 \
      : (' ' + n.key.replace(/[^a-z0-9]+/g, ' ')).includes(' ' + q) ? 2 \
      : n.key.includes(q) ? 3 \
      : n.extra.includes(q) ? 4 : 9;
  const span = (tag, cls, text) => { \
      const e = document.createElement(tag); \
      if (cls) e.className = cls; \
      e.textContent = text; \
      return e; };
  const many = (n, what) => n + ' ' + what + (n === 1 ? '' : 's');
  const show = () => {
    if (!index) build();
    const q = fold(input.value.trim()); list.textContent = ''; picked = -1; hits = [];
    input.removeAttribute('aria-activedescendant');
    if (!q) return close();
    const names = index.names.map(n => [rank(n, q), n]).filter(r => r[0] < 9)\
        .sort((a, b) => a[0] - b[0]);
    const texts = q.length > 1 ? index.texts.filter(t => t.key.includes(q)) : [];
    for (const [, n] of names.slice(0, 24)) hits.push({id: n.id});
    names.slice(0, 24).forEach(([, n], i) => {
      const li = span('li', '', ''); \
      li.append(span('span', 'what', n.kind), span('span', n.mono ? 'mono' : '', n.text)); \
      option(li, i);
    });
    texts.slice(0, 30).forEach(t => {
      const k = t.key.indexOf(q), from = Math.max(0, k - 50), li = span('li', '', '');
      li.append(span('span', 'what', t.where || 'text'), \
          (from ? '…' : '') + t.text.slice(from, k), \
          span('mark', '', t.text.slice(k, k + q.length)), \
          t.text.slice(k + q.length, k + 80) + '…');
      hits.push({id: t.id, e: t.e, q}); option(li, hits.length - 1);
    });
    count.textContent = hits.length \
        ? many(names.length, 'name') + ', ' + many(texts.length, 'place') + ' in the text' \
            + (names.length > 24 || texts.length > 30 ? '; the first are shown' : '') \
        : 'Nothing found';
    found.hidden = false; input.setAttribute('aria-expanded', 'true');
    if (hits.length) pick(0);
  };
  const option = (li, i) => { \
      li.id = 'option-' + i; \
      li.setAttribute('role', 'option'); \
      li.setAttribute('aria-selected', 'false'); \
      li.addEventListener('click', () => go(i)); \
      list.append(li); };
  const pick = i => {
    if (picked >= 0) list.children[picked].setAttribute('aria-selected', 'false');
    picked = i; \
    const li = list.children[i]; \
    li.setAttribute('aria-selected', 'true'); \
    li.scrollIntoView({block: 'nearest'});
    input.setAttribute('aria-activedescendant', li.id);
  };
  const close = () => { found.hidden = true; input.setAttribute('aria-expanded', 'false'); };
  const go = i => {
    const hit = hits[i], target = document.getElementById(hit.id); \
    close(); drawer(false); input.blur();
    location.hash = hit.id; target.scrollIntoView();
    if (!target.hasAttribute('tabindex')) target.tabIndex = -1;
    target.focus({preventScroll: true});
    if (window.Highlight && CSS.highlights) {
      CSS.highlights.delete('found');
      if (hit.e) {
        const ranges = [], chars = [], \
            walk = document.createTreeWalker(hit.e, NodeFilter.SHOW_TEXT);      \
            // a match may lie in several nodes
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
    if (e.key === 'ArrowDown' && hits.length) { \
        pick((picked + 1) % hits.length); e.preventDefault(); }
    else if (e.key === 'ArrowUp' && hits.length) { \
        pick((picked + hits.length - 1) % hits.length); e.preventDefault(); }
    else if (e.key === 'Enter' && picked >= 0) { go(picked); e.preventDefault(); }
    else if (e.key === 'Escape') { \
        if (found.hidden) input.value = ''; \
        close(); input.blur(); e.preventDefault(); e.stopPropagation(); }
  });
  addEventListener('keydown', e => {
    if (e.key === '/' && !e.ctrlKey && !e.metaKey && !e.altKey \
        && !/^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) { \
        input.focus(); input.select(); e.preventDefault(); }
    else if (e.key === 'Escape' && nav.classList.contains('open')) { drawer(false); menu.focus(); }
  });
  document.addEventListener('click', e => { if (!box.contains(e.target)) close(); });
  box.addEventListener('focusout', e => { \
      if (e.relatedTarget && !box.contains(e.relatedTarget)) close(); });
})();
""")


def make(source, glossary):
    return Book(source, glossary).render()


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def main():
    arguments = sys.argv[1:]
    check = "--check" in arguments
    if check:
        arguments.remove("--check")
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        sys.exit(__doc__)
    out = arguments[0] if arguments else BOOK
    page = make(read(SOURCE), read(GLOSSARY))
    if check:
        if not os.path.exists(out) or read(out) != page:
            sys.exit(f"{out} is not what {SOURCE} and {GLOSSARY} make: run make book")
        print(f"{out} is up to date")
        return
    with open(out, "w", encoding="utf-8", newline="\n") as f:
        f.write(page)
    print(f"{out}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
