#!/usr/bin/env python3
"""check_glossary.py [--run [OUT]]: does docs/glossary.md say what align.c and test_align.c have?

From the folder of align.c. A term passes when align.c has its tag [glossary: NAME] (the Portuguese
name, the English one or an alias), each function stands in the chapter stated, each test name
selects a test, the command and its flags exist, both definitions are there, and what it refers to
is a term. Where ../shared/glossary/glossario-pt.txt is there, the terms must be the course's. --run
OUT: runs every command of a Try line too, with ./align and the models of OUT (default out; `align
rlhf --output_dir OUT` makes them) in place of out/; a command that ends in "# needs X" runs where X
is there. Ends with 'N passed, N failed', exit 1 on failure.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

LABELS = ["Aliases", "English", "Português", "In align.c", "Test", "Try", "See also"]
COURSE = "../shared/glossary/glossario-pt.txt"
passed = failed = 0


def check(name, faults, note=""):
    """One check: it failed if there are faults."""
    global passed, failed
    if faults:
        failed += 1
    else:
        passed += 1
    if faults or note:
        text = ": " + "; ".join(faults) if faults else ""
        print(f"{'FAIL' if faults else 'ok  '}  {name}{text}{note}", flush=True)


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def glossary():
    """The terms in order: {Portuguese name: {"english name": ..., label: text}}."""
    terms, lines, beyond = {}, read("docs/glossary.md").split("\n"), False
    for i, line in enumerate(lines):
        if line.startswith("## "):
            beyond = line.startswith("## Beyond the course's list")
        if not line.startswith("### "):
            continue
        name, dot, english = line[4:].partition(" · ")
        term = {"english name": english, "beyond": beyond}
        faults = [] if dot else ["no ' · ' between two names"]
        for k, label in enumerate(LABELS):
            text = lines[i + 1 + k] if i + 1 + k < len(lines) else ""
            if not text.startswith(f"- {label}: "):
                faults.append(f"line {i + 2 + k}: expected '- {label}: '")
            term[label] = text[len(label) + 4 :].strip()
        if name in terms:
            faults.append("is there twice")
        if faults:
            check(f"format, line {i + 1}", faults)
        terms[name] = term
    return terms


def definitions(source):
    """{"name" or "struct name": chapters of its definitions}, by the lines that begin one."""
    chapter, found = 0, {}
    for line in source.split("\n"):
        if m := re.match(r" \* Chapter (\d+) - ", line):
            chapter = int(m[1])
        m = re.match(r"(struct \w+) \{", line)
        if not m and (line.endswith((")", ",")) or ") {" in line):
            m = re.match(r"[A-Za-z][^(]*[ *](\w+)\(", line)
        if m:
            found.setdefault(m[1], set()).add(chapter)
    return found


def course_names():
    """The first column of the course's table.

    A line that starts with a tab goes on with the definition above.
    """
    table = read(COURSE).split("Registro de Mudanças")[0]
    first = [line.split("\t")[0].strip() for line in table.split("\n") if "\t" in line]
    return [name for name in first if name and name != "Termo"]


def names_of(term, name):
    return {name, term["english name"], *term["Aliases"].split("; ")}


def check_code(text, found):
    faults = []
    if not re.fullmatch(r"chapter \d+(, `[^`]+`)+(; chapter \d+(, `[^`]+`)+)*", text):
        return [f"'In align.c: {text}' is not 'chapter N, `name`, ...; chapter M, ...'"]
    for part in text.split("; "):
        chapter = int(re.match(r"chapter (\d+)", part)[1])
        for name in re.findall(r"`([^`]+)`", part):
            if name not in found:
                faults.append(f"align.c has no {name}")
            elif chapter not in found[name]:
                faults.append(f"{name} is in chapter {min(found[name])}, not {chapter}")
    return faults


def check_tests(text, tests):
    names = re.findall(r"`([^`]+)`", text)
    if not names or " ".join(f"`{n}`" for n in names) != text:
        return [f"'Test: {text}' is not names in backticks with a space between"]
    idle = [name for name in names if not any(test.startswith(name) for test in tests)]
    return [f"{name} selects no test" for name in idle]


def check_command(text, commands, flags):
    m = re.fullmatch(r"`([^`]+)`", text)
    if not m:
        return [f"'Try: {text}' is no command in one pair of backticks"]
    called = re.findall(r"\./align (\w+)", m[1])
    faults = [f"there is no align {c}" for c in called if c not in commands]
    for call in re.findall(r"\./align [^&|;]*", m[1]):
        faults += [f"no command has --{f}" for f in re.findall(r" --(\w+)", call) if f not in flags]
    return faults


def check_terms(terms):
    source, test_source = read("align.c"), read("test_align.c")
    found, tags = definitions(source), set(re.findall(r"\[glossary: ([^\]]+)\]", source)) - {"TERM"}
    tests = re.findall(r'\{"(\w+)", test_\w+\}', test_source.partition("TESTS[] = {")[2])
    commands = set(re.findall(r'\{"(\w+)",\s*(?:"(?:[^"\\]|\\.)*"\s*)+,\s*command_\w+', source))
    flags = set(re.findall(r'\{(?:"|NAMED\(|OF\(\w+, )(\w+)', source))
    for name, term in terms.items():
        faults = [] if tags & names_of(term, name) else [f"align.c has no tag [glossary: {name}]"]
        faults += check_code(term["In align.c"], found)
        faults += check_tests(term["Test"], tests)
        faults += check_command(term["Try"], commands, flags)
        for label in ("English", "Português"):
            if len(term[label]) < 40:
                faults.append(f"the definition in {label} is empty")
        for other in term["See also"].split("; "):
            if other not in terms or other == name:
                faults.append(f"refers to '{other}', which is no term")
        check(name, faults)
    every = set().union(*(names_of(term, name) for name, term in terms.items()))
    check("tags", [f"[glossary: {tag}] in align.c is no term" for tag in sorted(tags - every)])
    if os.path.exists(COURSE):
        course = course_names()
        own = [name for name, term in terms.items() if not term["beyond"]]
        beyond = [name for name, term in terms.items() if term["beyond"]]
        faults = [f"'{n}' is missing" for n in course if n not in own]
        faults += [f"'{n}' is not the course's" for n in own if n not in course]
        faults += [f"'{n}' is one of the course's" for n in beyond if n in course]
        if len(course) != 53:
            faults.append(f"{COURSE} has {len(course)} terms")
        check("the course's terms", faults)


def here(what):
    return os.path.exists(what) or importlib.util.find_spec(what.split(".")[0]) is not None


def run_commands(terms, out):
    done = {}
    for name, term in terms.items():
        done.setdefault(term["Try"].strip("`"), []).append(name)
    for command, names in done.items():
        needs = re.search(r"# needs (\S+)$", command)
        if needs and not here(needs[1]):
            print(f"skip  {', '.join(names)}: needs {needs[1]}")
            continue
        begin, faults = time.time(), []
        try:
            result = subprocess.run(
                re.sub(r"(?<![\w/.-])out/", out.rstrip("/") + "/", command),
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=600,
            )
            if result.returncode:
                said = result.stderr.decode(errors="replace").strip()[-300:]
                faults = [f"exit {result.returncode}: {command}: {said}"]
        except subprocess.TimeoutExpired:
            faults = [f"ten minutes are not enough: {command}"]
        check(", ".join(names), faults, f" ({time.time() - begin:.1f} s)")


def run_broken():
    """./align glossary beside no glossary, and beside broken ones: exit 1, one line."""
    whole = read("docs/glossary.md")
    cases = {
        "missing": None,
        "empty": "",
        "no term": "# Glossary\n",
        "cut short": whole[: len(whole) // 2],
        "a line left out": re.sub(r"(?m)^- Test: .*\n", "", whole, count=1),
        "one name": re.sub(r"(?m)^(### .*) · ", r"\1 ", whole, count=1),
    }
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy("align", folder)
        os.mkdir(folder + "/docs")
        for name, text in cases.items():
            if text is not None:
                with open(folder + "/docs/glossary.md", "w", encoding="utf-8") as f:
                    f.write(text)
            command = [folder + "/align", "glossary", "DPO"]
            result = subprocess.run(command, cwd=folder, capture_output=True)
            status, said = result.returncode, result.stderr
            one_line = said.startswith(b"align: ") and said.count(b"\n") == 1
            got = f"expected exit 1 and one line, got exit {status} and {said[:200]!r}"
            good = status == 1 and not result.stdout and one_line
            check(f"glossary, {name}", [] if good else [got])


def main():
    arguments = sys.argv[1:]
    if arguments and (arguments[0] != "--run" or len(arguments) > 2):
        sys.exit(__doc__)
    terms = glossary()
    if not terms:
        sys.exit("docs/glossary.md has no term")
    check_terms(terms)
    if arguments:
        run_broken()
        run_commands(terms, arguments[1] if len(arguments) == 2 else "out")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
