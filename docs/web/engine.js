/* align in a page: docs/web/README.md says how it is used.
 *   const engine = await Engine.start(await Engine.assets());
 *   const {code, stdout} = await engine.run(["explain", "dpo", "--json"]);
 * The program runs in a worker (worker.js) with files in memory. The page has a copy of each file
 * as soon as the program has closed it, so that a stopped run loses nothing that was saved. */
"use strict";

class Engine {
  /* What make_web.py has put into the page: gzip, as base64. Returns the program's bytes, the
   * worker's source and the files that ship with align. */
  static async assets() {
    const files = {};
    for (const e of document.querySelectorAll("script[data-asset]"))
      files[e.dataset.asset] = await Engine.unpack(e.textContent);
    const {"align.wasm": wasm, "worker.js": worker, ...rest} = files;
    return {wasm, worker: new TextDecoder().decode(worker), files: rest};
  }

  static async unpack(base64) {
    const packed = Uint8Array.from(atob(base64.trim()), c => c.charCodeAt(0));
    const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(plain).arrayBuffer());
  }

  /* What this browser lacks, as a word for the page's texts; null: nothing. */
  static lacks() {
    if (typeof WebAssembly !== "object") return "wasm";
    // a function that does nothing but make a vector
    const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
    if (!WebAssembly.validate(Uint8Array.from(simd))) return "simd";
    if (typeof DecompressionStream !== "function") return "unpack";
    return typeof Worker === "function" ? null : "worker";
  }

  static async start(assets) {
    const engine = new Engine();
    engine.assets = assets;
    engine.spawn = assets.spawn || (source => {
      const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
      const worker = new Worker(url);
      URL.revokeObjectURL(url);
      return worker;
    });
    engine.module = await WebAssembly.compile(assets.wasm);
    engine.newWorker();
    for (const [path, data] of Object.entries(assets.files || {})) engine.write(path, data);
    return engine;
  }

  constructor() {
    this.files = new Map();      // path -> Uint8Array
    this.folders = new Set();    // those that may be empty
    this.memory = 0;             // bytes that the last run's program had at its end
    this.threads = 1;
    this.simd = true;
    this.canPause = typeof WebAssembly.Suspending === "function";
    this.paused = false;
    this.current = null;         // the run that goes on: its callbacks and what it has written
    this.waiting = Promise.resolve();
  }

  get running() {
    return this.current !== null;
  }

  newWorker() {
    this.worker = this.spawn(this.assets.worker);
    this.worker.onmessage = event => this.hear(event.data);
    this.worker.onerror = event => this.finish({code: 134, error: event.message || String(event)});
    this.worker.postMessage({module: this.module});
    for (const path of this.folders) this.worker.postMessage({write: path});
    for (const [path, data] of this.files) this.worker.postMessage({write: path, data});
  }

  /* ---- Files ------------------------------------------------------------------------------ */

  static clean(path) {
    return path.split("/").filter(part => part && part !== ".").join("/");
  }

  write(path, data) {
    path = Engine.clean(path);
    const bytes = typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
    this.files.set(path, bytes);
    this.worker.postMessage({write: path, data: bytes});
  }

  read(path) {
    return this.files.get(Engine.clean(path));
  }

  text(path) {
    const data = this.read(path);
    return data && new TextDecoder().decode(data);
  }

  /* The names in a folder: [{name, folder, size}], sorted. */
  list(dir = "") {
    const start = Engine.clean(dir) ? Engine.clean(dir) + "/" : "", names = new Map();
    const note = (path, data) => {
      if (!path.startsWith(start)) return;
      const [name, ...rest] = path.slice(start.length).split("/");
      names.set(name, {name, folder: rest.length > 0 || !data, size: rest.length || !data ? 0 : data.length});
    };
    for (const path of this.folders) note(path, null);
    for (const [path, data] of this.files) note(path, data);
    return [...names.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
  }

  forget(path) {
    path = Engine.clean(path);
    for (const known of [this.files, this.folders])
      for (const name of [...known.keys()])
        if (name === path || name.startsWith(path + "/")) known.delete(name);
  }

  move(from, to) {
    from = Engine.clean(from);
    to = Engine.clean(to);
    const there = name => (name === from ? to : to + name.slice(from.length));
    const inside = name => name === from || name.startsWith(from + "/");
    const files = [...this.files].filter(([name]) => inside(name));
    const folders = [...this.folders].filter(inside);
    this.forget(from);
    if (files.length === 1 && files[0][0] === from) this.files.delete(to);
    for (const [name, data] of files) this.files.set(there(name), data);
    for (const name of folders) this.folders.add(there(name));
  }

  remove(path) {
    this.forget(path);
    this.worker.postMessage({remove: Engine.clean(path)});
  }

  rename(from, to) {
    this.move(from, to);
    this.worker.postMessage({rename: [Engine.clean(from), Engine.clean(to)]});
  }

  /* ---- Runs ------------------------------------------------------------------------------- */

  /* Runs `align args...`. Runs wait for each other. options:
   *   stdin: text or bytes; input(): called when the program waits for a line, answers a promise
   *   of it (needs canPause; null ends the input)
   *   stdout(text), stderr(text), file(path): called as things come
   *   progress(event): what stderr says, read (progressReader); live: also samples and time left
   *   env: {NAME: value} */
  run(args, options = {}) {
    const result = this.waiting.then(() => this.begin(args, options));
    this.waiting = result.catch(() => {});
    return result;
  }

  begin(args, options) {
    return new Promise(done => {
      const env = {...(options.live ? {TERM: "web"} : {}), ...options.env};
      const reader = options.progress ? Engine.progressReader(options.progress) : null;
      this.current = {options, done, reader, stdout: [], stderr: [], begin: performance.now()};
      const stdin = options.input && this.canPause ? null
        : typeof options.stdin === "string" ? new TextEncoder().encode(options.stdin)
        : options.stdin || new Uint8Array();
      this.worker.postMessage({
        run: args.map(String),
        env: Object.entries(env).map(([name, value]) => `${name}=${value}`),
        stdin,
      });
    });
  }

  finish({code, seconds, memory, error, stopped = false}) {
    const run = this.current;
    if (!run) return;
    this.current = null;
    this.paused = false;
    if (memory) this.memory = memory;
    if (error) run.stderr.push(`align: ${error}\n`);
    if (run.reader) run.reader("\n");
    run.done({
      code, stopped,
      stdout: run.stdout.join(""),
      stderr: run.stderr.join(""),
      seconds: seconds === undefined ? (performance.now() - run.begin) / 1000 : seconds,
    });
  }

  async hear(message) {
    const run = this.current, options = run ? run.options : {};
    for (const kind of ["stdout", "stderr"])
      if (message[kind] !== undefined && run) {
        run[kind].push(message[kind]);
        if (options[kind]) options[kind](message[kind]);
        if (kind === "stderr" && run.reader) run.reader(message[kind]);
      }
    if (message.put !== undefined) {
      this.files.set(message.put, message.data);
      if (options.file) options.file(message.put);
    } else if (message.folder !== undefined) this.folders.add(message.folder);
    else if (message.remove !== undefined) this.forget(message.remove);
    else if (message.rename !== undefined) {
      this.move(...message.rename);
      if (options.file) options.file(message.rename[1]);
    } else if (message.asks) {
      const line = options.input ? await options.input() : null;
      const bytes = new TextEncoder().encode(line === null || line === undefined ? "" : line + "\n");
      this.worker.postMessage({input: bytes});
    } else if (message.done) this.finish(message.done);
  }

  /* Ends the run at once. Files that it had closed are kept; what it was writing is lost. */
  stop() {
    if (!this.current) return;
    this.worker.onmessage = this.worker.onerror = null;
    this.worker.terminate();
    this.newWorker();
    this.finish({code: 130, stopped: true});
  }

  /* Holds the program at its next step, and lets it go on. Only where canPause. */
  pause() {
    if (this.canPause && this.current) this.worker.postMessage({pause: this.paused = true});
  }

  resume() {
    if (this.paused) this.worker.postMessage({pause: this.paused = false});
  }

  /* ---- What a run says --------------------------------------------------------------------- */

  /* Reads stderr and calls back with
   *   {kind: "step", stage, step, total, left (seconds or null), metrics: {name: number}}
   *   {kind: "sample", prompt, text, score (or null)}     (only with `live`)
   *   {kind: "note", text}                                 any other line */
  static progressReader(callback) {
    let line = "";
    const number = /^[-+]?(\d+(\.\d*)?([eE][-+]?\d+)?|inf|nan)$/;
    const read = raw => {
      const text = raw.trimEnd();
      if (!text) return;
      const step = /^(.+?)(?:: step | \[=* *\] )(\d+)\/(\d+)  (?:(\d+):(\d\d) left  )?(.*)$/.exec(text);
      if (step) {
        const metrics = {}, words = step[6].split(/ +/);
        for (let i = 0; i + 1 < words.length; i += 2)
          if (number.test(words[i + 1])) metrics[words[i]] = Number(words[i + 1]);
        return callback({
          kind: "step", stage: step[1], step: Number(step[2]), total: Number(step[3]), metrics,
          left: step[4] === undefined ? null : 60 * Number(step[4]) + Number(step[5]),
        });
      }
      const sample = /^ {4}(?:([-+]\d+\.\d+) )? *(.*?)\|(.*)$/.exec(text);
      if (sample)
        return callback({
          kind: "sample", score: sample[1] ? Number(sample[1]) : null,
          prompt: sample[2].trim(), text: sample[3],
        });
      callback({kind: "note", text});
    };
    return text => {
      const lines = (line + text).split(/\r|\n|\x1b\[K/);
      line = lines.pop();
      lines.forEach(read);
    };
  }
}

/* ---- Zip: folders as one file ---------------------------------------------------------------- */

Engine.crc = bytes => {
  if (!Engine.crcTable)
    Engine.crcTable = Uint32Array.from({length: 256}, (_, n) => {
      for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
      return n;
    });
  let crc = -1;
  for (const byte of bytes) crc = Engine.crcTable[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
};

/* Files, not compressed (weights hardly shrink): local headers, then the directory of all. */
Engine.zip = files => {
  const pieces = [], directory = [];
  let at = 0;
  const add = piece => {
    pieces.push(piece);
    at += piece.length;
  };
  const record = (signature, fields) => {
    const bytes = new Uint8Array(4 + fields.reduce((sum, [size]) => sum + size, 0));
    const view = new DataView(bytes.buffer);
    view.setUint32(0, signature, true);
    let to = 4;
    for (const [size, value] of fields) {
      if (size === 2) view.setUint16(to, value, true);
      else view.setUint32(to, value, true);
      to += size;
    }
    return bytes;
  };
  for (const [path, data] of Object.entries(files)) {
    const name = new TextEncoder().encode(path);
    // version 2.0, names in UTF-8, stored, 1 January 1980, checksum, sizes, no extra field
    const common = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 33], [4, Engine.crc(data)],
      [4, data.length], [4, data.length], [2, name.length], [2, 0]];
    const start = at;
    add(record(0x04034b50, common));
    add(name);
    add(data);
    directory.push(record(0x02014b50, [[2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, start]]), name);
  }
  const first = at;
  directory.forEach(add);
  const count = directory.length / 2;
  add(record(0x06054b50, [[2, 0], [2, 0], [2, count], [2, count], [4, at - first], [4, first], [2, 0]]));
  const whole = new Uint8Array(at);
  at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
};

/* Any zip without encryption and of less than 4 GB: {path: bytes}. */
Engine.unzip = async bytes => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), files = {};
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("not a .zip file");
  let at = view.getUint32(end + 16, true);
  for (let n = view.getUint16(end + 10, true); n > 0; n--) {
    if (view.getUint32(at, true) !== 0x02014b50) throw new Error("the .zip file is damaged");
    const method = view.getUint16(at + 10, true), size = view.getUint32(at + 20, true);
    const nameLength = view.getUint16(at + 28, true), local = view.getUint32(at + 42, true);
    const path = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    const from = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    let data = bytes.slice(from, from + size);
    if (method === 8) {
      const plain = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
      data = new Uint8Array(await new Response(plain).arrayBuffer());
    } else if (method !== 0) throw new Error(`${path}: compressed in an unknown way`);
    if (Engine.crc(data) !== view.getUint32(at + 16, true)) throw new Error(`${path}: damaged`);
    if (!path.endsWith("/")) files[path] = data;
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return files;
};

if (typeof module !== "undefined") module.exports = {Engine};
