"use strict";
/* book.js -- what one can read beside a screen: the glossary's terms, functions of align.c, the
 * exercises' questions. All of it comes from the files in this page; each is read when it is first
 * asked for. */

function shipped(path) {
  return new TextDecoder().decode(app.assets.files[path]);
}

/* A value that is computed at its first use. */
function once(make) {
  let made;
  return () => made ??= make();
}

/* Markdown without links and emphasis; back quotes stay. */
function plainText(markdown) {
  return markdown.replace(/\[([^\]]+)\]\([^)]+\)/g, "$1").replaceAll("**", "");
}

/* docs/glossary.md: a term is a heading "Portuguese · English" and lines "- Name: text". */
const glossary = once(() => shipped("docs/glossary.md").split(/^### /m).slice(1).map(block => {
  const [pt, en] = block.split("\n")[0].split(" · ");
  const facts = Object.fromEntries([...block.matchAll(/^- ([^:\n]+): (.*)$/gm)]
    .map(([, name, text]) => [name, text]));
  return {
    en: { name: en, text: plainText(facts.English) },
    pt: { name: pt, text: plainText(facts["Português"]) },
    aliases: facts.Aliases ?? "",
    functions: [...facts["In align.c"].matchAll(/`(\w+)`/g)].map(match => match[1]),
  };
}));

/* align.c: the text of each function, with the comment above it, by its name. A definition begins in
 * column 1 and ends with a brace there; a prototype ends with a semicolon. */
const functions = once(() => {
  const found = new Map();
  const lines = shipped("align.c").split("\n");
  for (let i = 0; i < lines.length; i++) {
    const head = /^[a-z_][\w *]*?\b(\w+)\(/.exec(lines[i]);
    if (!head || lines[i].startsWith("typedef")) continue;
    let end = i;
    while (end < lines.length && !/[;{]$/.test(lines[end])) end++;
    if (!lines[end]?.endsWith("{")) continue;
    while (lines[end] !== "}") end++;
    let first = i;
    while (first > 0 && lines[i - 1].endsWith("*/") && !lines[first].startsWith("/*")) first--;
    if (!found.has(head[1])) found.set(head[1], lines.slice(first, end + 1).join("\n"));
    i = end;
  }
  return found;
});

/* P1, P2 ... of the exercises: which number to change, which to read, question and answer. */
const predictions = once(() => {
  const documents = { en: "docs/exercises.md", pt: "docs/exercises.pt-BR.md" };
  const { predict } = JSON.parse(shipped("docs/tools/exercises.json"));
  const list = Object.entries(predict).map(([name, change]) => ({ name, ...change }));
  for (const [code, path] of Object.entries(documents)) {
    // each name stands twice in the text: at the question, then at the answer
    const texts = [...shipped(path).matchAll(/^- \*\*(P\d+)\.\*\* (.*)$/gm)];
    for (const prediction of list) {
      const [question, answer] = texts.filter(([, name]) => name === prediction.name)
        .map(([, , text]) => plainText(text));
      // the topic stands above the question already
      const bare = question.replace(/^`explain \w+`[^:]*: /, "");
      prediction[code] = { question: bare[0].toUpperCase() + bare.slice(1), answer };
    }
  }
  return list;
});

// ---- Dialogs ------------------------------------------------------------------------------------

function showFunction(name) {
  byId("function-title").textContent = name;
  byId("function-text").textContent = functions().get(name);
  byId("function").showModal();
  byId("function-text").scrollTop = 0;
}

function functionButton(name) {
  return el("button", { type: "button", class: "function", click: () => showFunction(name) }, name);
}

function drawTerm(term) {
  const { name, text } = term[language];
  const known = term.functions.filter(one => functions().has(one));
  const code = known.length === 0 ? [] : [el("p", { class: "quiet" }, t("terms.code"),
    ...known.flatMap(one => [" ", functionButton(one)]))];
  return el("article", { class: "term" }, el("h3", {}, name),
    el("p", {}, ...withCode(text)), ...code);
}

/* Terms that have these letters in a name, else in the text. */
function findTerms(words) {
  const plain = text => text.normalize("NFD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const wanted = plain(words.trim());
  if (!wanted) return glossary();
  const has = text => plain(text).includes(wanted);
  const named = glossary().filter(term => has(`${term.en.name} ${term.pt.name} ${term.aliases}`));
  return named.length > 0 ? named : glossary().filter(term => has(term[language].text));
}

function showTerms(words = "") {
  byId("terms-find").value = words;
  drawTerms();
  if (!byId("terms").open) byId("terms").showModal();
  byId("terms").scrollTop = 0;
}

function drawTerms() {
  const found = findTerms(byId("terms-find").value);
  const sorted = [...found].sort((a, b) =>
    a[language].name.localeCompare(b[language].name, locale()));
  byId("terms-list").replaceChildren(
    ...sorted.length > 0 ? sorted.map(drawTerm) : [el("p", {}, t("terms.none"))]);
}

/* The line below a screen: terms and functions that belong to it. Terms are named as in English. */
function drawRead(id, terms, code) {
  const buttons = terms.map(name => {
    const term = glossary().find(({ en }) => en.name === name);
    if (!term) throw new Error(`the glossary has no term "${name}"`);
    const words = term[language].name;
    return el("button", { type: "button", class: "function",
      click: () => showTerms(words) }, words);
  });
  const named = code.map(name => {
    if (!functions().has(name)) throw new Error(`align.c has no function ${name}`);
    return functionButton(name);
  });
  const spaced = list => list.flatMap((item, i) => i ? [" · ", item] : [item]);
  byId(id).replaceChildren(t("read"), " ", ...spaced(buttons), el("br"),
    t("read.functions"), ": ", ...spaced(named));
}

function startBook() {
  byId("open-terms").addEventListener("click", () => showTerms());
  byId("terms-close").addEventListener("click", () => byId("terms").close());
  byId("terms-find").addEventListener("input", drawTerms);
  byId("function-close").addEventListener("click", () => byId("function").close());
}
