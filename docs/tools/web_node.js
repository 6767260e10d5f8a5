/* align.html's program and worker in Node, without a browser: for docs/tools/check_web.py.
 *   node docs/tools/web_node.js align.html [FOLDER]
 * FOLDER's files are those the program sees; those it writes come back there. Reads one JSON array
 * of arguments a line from stdin, runs them in order, and writes a JSON line for each:
 * {code, stdout, stderr, seconds, memory}. An object {args, env, stdin} does instead of an array.
 */
"use strict";
const fs = require("fs");
const path = require("path");
const {Worker} = require("worker_threads");
const {Engine} = require("../web/engine.js");

// A browser's worker talks by postMessage and onmessage; Node's by a port.
const AS_IN_A_BROWSER = `
  const {parentPort} = require("worker_threads");
  globalThis.self = globalThis;
  self.postMessage = (message, transfer) => parentPort.postMessage(message, transfer);
  parentPort.on("message", data => self.onmessage({data}));
`;

function spawn(source) {
  const worker = new Worker(AS_IN_A_BROWSER + source, {eval: true}), ends = {};
  worker.on("message", data => ends.onmessage({data}));
  worker.on("error", error => ends.onerror && ends.onerror({message: String(error)}));
  ends.postMessage = (message, transfer) => worker.postMessage(message, transfer);
  ends.terminate = () => worker.terminate();
  return ends;
}

function* filesBelow(folder, inside = "") {
  for (const entry of fs.readdirSync(path.join(folder, inside), {withFileTypes: true})) {
    const name = path.posix.join(inside, entry.name);
    if (entry.isDirectory()) yield* filesBelow(folder, name);
    else yield name;
  }
}

async function main([page, folder]) {
  const html = fs.readFileSync(page, "utf8"), files = {};
  const asset = /<script type="text\/plain" data-asset="(.*?)">(.*?)<\/script>/gs;
  for (const [, name, base64] of html.matchAll(asset)) files[name] = await Engine.unpack(base64);
  const {"align.wasm": wasm, "worker.js": worker, ...rest} = files;
  const source = new TextDecoder().decode(worker);
  const engine = await Engine.start({wasm, worker: source, files: rest, spawn});
  const given = new Map();
  if (folder)
    for (const name of filesBelow(folder)) {
      engine.write(name, fs.readFileSync(path.join(folder, name)));
      given.set(name, engine.read(name));
    }
  for (const line of fs.readFileSync(0, "utf8").split("\n").filter(Boolean)) {
    const job = JSON.parse(line), {args, ...options} = Array.isArray(job) ? {args: job} : job;
    const result = await engine.run(args, options);
    console.log(JSON.stringify({...result, memory: engine.memory}));
  }
  for (const [name, data] of folder ? engine.files : []) {
    if (given.get(name) === data || name in rest) continue;
    fs.mkdirSync(path.dirname(path.join(folder, name)), {recursive: true});
    fs.writeFileSync(path.join(folder, name), data);
  }
  engine.worker.terminate();
}

main(process.argv.slice(2)).catch(error => {
  console.error(error);
  process.exit(1);
});
