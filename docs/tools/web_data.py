#!/usr/bin/env python3
"""web_data.py [OUT]: what align.html shows of the documents and of align.c, as one JSON object.

From the folder of align.c; without OUT, to standard output. `terms`: the glossary, in both
languages. `functions`: the text of each function that the glossary, explain's topics or the page's
own scripts name, with the comment above it. `predict`: the questions and answers of the exercises.
A name that is not in align.c, or a question without an answer, is an error: nothing is left out in
silence.
"""

import json
import pathlib
import re
import subprocess
import sys

# The functions that screens name beside those of the glossary and of explain's texts.
NAMED = """course_run course_language_model course_reward_model course_ppo course_dpo
    reward_loss scalar_head_forward process_logits sample_token beam_search token_at
    collect_preferences dpo_loss command_rlhf model_save""".split()


def functions_of(source):
    """Every function of align.c: its text, from the comment above it to its closing brace."""
    found = {}
    lines = source.split("\n")
    for i, line in enumerate(lines):
        match = re.match(r"(?!typedef)[a-z_][\w *]*?\b(\w+)\(", line)
        if not match or line.startswith(("struct Checkpoint;", "return")):
            continue
        end = i
        while end < len(lines) and not re.search(r"[;{]$", lines[end]):
            end += 1
        if end == len(lines) or lines[end].endswith(";"):
            continue  # a prototype
        while lines[end] != "}":
            end += 1
        first = i
        if lines[i - 1].endswith("*/"):
            first = i - 1
            while not lines[first].startswith("/*"):
                first -= 1
        found[match[1]] = "\n".join(lines[first : end + 1])
    return found


def terms_of(glossary):
    """The glossary's terms, in its order."""
    terms = []
    for block in re.split(r"^### ", glossary, flags=re.M)[1:]:
        name_pt, name_en = block.split("\n", 1)[0].split(" · ")
        facts = dict(re.findall(r"^- ([^:]+): (.*)$", block, re.M))
        code = facts["In align.c"]
        terms.append(
            {
                "pt": {"name": name_pt, "text": plain(facts["Português"])},
                "en": {"name": name_en, "text": plain(facts["English"])},
                "aliases": [a.strip() for a in facts["Aliases"].split(";")],
                "functions": re.findall(r"`(\w+)`", code),
                "see": [s.strip() for s in facts["See also"].split(";")],
            }
        )
    return terms


def plain(text):
    """Markdown without its links; back quotes stay, the page shows them as code."""
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text).replace("**", "")


def questions_of(document):
    """P1 ... of the exercises, as {name: (question, answer)}; each stands twice in the text."""
    found = {}
    for name, text in re.findall(r"^- \*\*(P\d+)\.\*\* (.*)$", document, re.M):
        found.setdefault(name, []).append(plain(text))
    return found


def predictions():
    changes = json.loads(pathlib.Path("docs/tools/exercises.json").read_text())["predict"]
    languages = {"en": "docs/exercises.md", "pt": "docs/exercises.pt-BR.md"}
    texts = {k: questions_of(pathlib.Path(v).read_text()) for k, v in languages.items()}
    result = []
    for name, change in changes.items():
        entry = {"name": name, **change}
        for language, questions in texts.items():
            question, answer = questions[name]
            # the topic stands above the question on the page already
            question = re.sub(r"^`explain \w+`[^:]*: ", "", question)
            entry[language] = {
                "question": question[0].upper() + question[1:],
                "answer": answer,
            }
        result.append(entry)
    return result


def explained(program):
    """The words of all topics' texts, in which the page finds names of functions."""
    words = set()
    topics = subprocess.run([program, "explain"], capture_output=True, text=True, check=True)
    for topic in re.findall(r"^  (\w+) ", topics.stdout, re.M):
        text = subprocess.run([program, "explain", topic], capture_output=True, text=True)
        words |= set(re.findall(r"\b[a-z]\w*_\w+\b|\bsigmoid\b|\bsoftmax\b|\bwhiten\b|\bgae\b|\bargmax\b", text.stdout))
    return words


def web_data(program="./align"):
    source = pathlib.Path("align.c").read_text()
    functions = functions_of(source)
    terms = terms_of(pathlib.Path("docs/glossary.md").read_text())
    named = set(NAMED) | {name for term in terms for name in term["functions"]}
    missing = sorted(name for name in NAMED if name not in functions)
    if missing:
        raise SystemExit(f"web_data.py: align.c has no function {', '.join(missing)}")
    named |= explained(program) if pathlib.Path(program).exists() else set()
    return {
        "terms": terms,
        "functions": {name: functions[name] for name in sorted(named) if name in functions},
        "predict": predictions(),
    }


if __name__ == "__main__":
    text = json.dumps(web_data(), ensure_ascii=False, separators=(",", ":"))
    if len(sys.argv) > 1:
        pathlib.Path(sys.argv[1]).write_text(text)
    else:
        print(text)
