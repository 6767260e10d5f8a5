/* The worker in which align runs: WebAssembly in its own thread, so that the page answers while a
 * model learns. make_web.py puts the library browser_wasi_shim in front of this text as `shim`;
 * it gives the program what an operating system would: arguments, streams, and files in memory.
 * What the program writes goes to the page at once, so that a run that is stopped loses nothing.
 *
 * in   {module}                          the compiled program, first
 *      {write: path, data}               a file, or {remove: path}, {rename: [from, to]}
 *      {run: args, env, stdin}           stdin: bytes, or null: the page is asked for each line
 *      {pause: true or false}, {input: bytes}    only where the engine can suspend a program (JSPI)
 * out  {stdout: text}, {stderr: text}, {put: path, data}, {remove: path}, {rename: [from, to]},
 *      {asks: true}, {done: {code, seconds, memory}} */
"use strict";
const {WASI, WASIProcExit, File, Directory, OpenFile, PreopenDirectory, ConsoleStdout, Fd, wasi} = shim;

const root = new PreopenDirectory("/", new Map());
let program;      // the compiled module
let paused = null;   // while paused: the function that lets the program go on
let pauseAsked = false;
let inputs = [];   // lines of the page for standard input, and the program that waits for one
let inputWaits = null;
const suspends = typeof WebAssembly.Suspending === "function";

/* ---- Files --------------------------------------------------------------------------------- */

// The library gives a directory no rights, which the C library of WASI takes at its word.
const everything = (1n << 30n) - 1n;
for (const kind of [PreopenDirectory, OpenFile, shim.OpenDirectory]) {
  const plain = kind.prototype.fd_fdstat_get;
  kind.prototype.fd_fdstat_get = function () {
    const answer = plain.call(this);
    if (answer.fdstat) answer.fdstat.fs_rights_base = answer.fdstat.fs_rights_inherited = everything;
    return answer;
  };
}

// The library copies a file whole at each write. This makes room ahead: a model is megabytes.
OpenFile.prototype.fd_write = function (data) {
  const at = Number(this.file_pos), end = at + data.byteLength, old = this.file.data;
  if (end > old.byteLength) {
    if (old.byteOffset + end <= old.buffer.byteLength) {
      this.file.data = new Uint8Array(old.buffer, old.byteOffset, end);
    } else {
      this.file.data = new Uint8Array(new ArrayBuffer(Math.max(4096, 2 * end)), 0, end);
      this.file.data.set(old);
    }
  }
  this.file.data.set(data, at);
  this.file_pos = BigInt(end);
  return {ret: 0, nwritten: data.byteLength};
};

const parts = path => path.split("/").filter(part => part && part !== ".");

// The folder of a path, made with all above it, and the path's last part.
function place(path, make) {
  const names = parts(path), name = names.pop();
  let dir = root.dir;
  for (const part of names) {
    if (!dir.contents.has(part)) {
      if (!make) return {dir: null, name};
      dir.contents.set(part, new Directory(new Map()));
    }
    dir = dir.contents.get(part);
    if (!dir.contents) return {dir: null, name};
  }
  return {dir, name};
}

function change(message) {
  if (message.write !== undefined) {
    const {dir, name} = place(message.write, true);
    if (dir && message.data) dir.contents.set(name, new File(message.data));
    else if (dir && !dir.contents.has(name)) dir.contents.set(name, new Directory(new Map()));
  } else if (message.remove !== undefined) {
    const {dir, name} = place(message.remove, false);
    if (dir) dir.contents.delete(name);
  } else if (message.rename !== undefined) {
    const from = place(message.rename[0], false);
    const entry = from.dir && from.dir.contents.get(from.name);
    if (!entry) return;
    from.dir.contents.delete(from.name);
    const to = place(message.rename[1], true);
    to.dir.contents.set(to.name, entry);
  }
}

/* ---- One run ------------------------------------------------------------------------------- */

// Bytes of a stream to text; a character that is cut in two waits for its other half.
function stream(kind) {
  const decoder = new TextDecoder("utf-8", {ignoreBOM: true});
  return new ConsoleStdout(bytes => {
    const text = decoder.decode(bytes, {stream: true});
    if (text) postMessage({[kind]: text});
  });
}

// Standard input that the page fills line by line, while the program waits.
class Keyboard extends Fd {
  fd_fdstat_get() {
    return {ret: 0, fdstat: new wasi.Fdstat(wasi.FILETYPE_CHARACTER_DEVICE, 0)};
  }
  fd_read(size) {
    if (!inputs.length) return {ret: 0, data: new Uint8Array()};
    const data = inputs[0].subarray(0, size);
    inputs[0] = inputs[0].subarray(size);
    if (!inputs[0].length) inputs.shift();
    return {ret: 0, data};
  }
}

const turn = new MessageChannel();
let turned = null, lastTurn = 0;
turn.port1.onmessage = () => turned();

// Lets the worker read its messages, and waits while the page wants a pause.
async function takeBreath() {
  await new Promise(done => {
    turned = done;
    turn.port2.postMessage(0);
  });
  if (pauseAsked) await new Promise(done => (paused = done));
  lastTurn = performance.now();
}

function imports(wasiRun) {
  const calls = {...wasiRun.wasiImport};
  const open = new Map();   // descriptor -> {path, dirty}
  const memory = () => wasiRun.inst.exports.memory.buffer;
  const text = (at, length) => parts(new TextDecoder().decode(new Uint8Array(memory(), at, length).slice())).join("/");
  const put = fd => {
    const it = open.get(fd);
    if (!it || !it.dirty || !wasiRun.fds[fd]) return;
    it.dirty = false;
    const data = wasiRun.fds[fd].file.data.slice();
    postMessage({put: it.path, data}, [data.buffer]);
  };
  const watch = (name, before, after) => {
    const plain = calls[name];
    calls[name] = (...a) => {
      if (before) before(...a);
      const code = plain(...a);
      if (after && code === 0) after(...a);
      return code;
    };
  };
  watch("path_open", null, (dirfd, flags, path, length, oflags, rights, inherited, fdflags, result) => {
    const fd = new DataView(memory()).getUint32(result, true);
    if (rights & BigInt(wasi.RIGHTS_FD_WRITE) && wasiRun.fds[fd].file)
      open.set(fd, {path: text(path, length), dirty: Boolean(oflags & (wasi.OFLAGS_CREAT | wasi.OFLAGS_TRUNC))});
  });
  const touch = fd => open.has(fd) && (open.get(fd).dirty = true);
  watch("fd_write", null, touch);
  watch("fd_pwrite", null, touch);
  watch("fd_filestat_set_size", null, touch);
  watch("fd_sync", put);
  watch("fd_datasync", put);
  watch("fd_close", fd => {
    put(fd);
    open.delete(fd);
  });
  watch("path_create_directory", null, (fd, path, length) => postMessage({folder: text(path, length)}));
  watch("path_unlink_file", null, (fd, path, length) => postMessage({remove: text(path, length)}));
  watch("path_remove_directory", null, (fd, path, length) => postMessage({remove: text(path, length)}));
  watch("path_rename", null, (fd, from, fromLength, toFd, to, toLength) => {
    for (const it of open.values())
      if (it.path === text(from, fromLength)) it.path = text(to, toLength);
    postMessage({rename: [text(from, fromLength), text(to, toLength)]});
  });
  if (suspends) {
    /* The program can be held in a call: at the clock, which training asks at each step, and at
     * standard input. Ten times a second it lets the worker read its messages. */
    const clock = calls.clock_time_get, read = calls.fd_read;
    calls.clock_time_get = new WebAssembly.Suspending((...a) =>
      performance.now() - lastTurn < 100 ? clock(...a) : takeBreath().then(() => clock(...a)));
    calls.fd_read = new WebAssembly.Suspending((fd, ...a) => {
      if (fd !== 0 || !(wasiRun.fds[0] instanceof Keyboard) || inputs.length) return read(fd, ...a);
      postMessage({asks: true});
      return new Promise(done => (inputWaits = done)).then(() => read(fd, ...a));
    });
  }
  return {wasi_snapshot_preview1: calls};
}

async function run({run: args, env, stdin}) {
  inputs = [];
  lastTurn = performance.now();
  const begin = performance.now();
  const input = stdin || !suspends ? new OpenFile(new File(stdin || new Uint8Array())) : new Keyboard();
  const fds = [input, stream("stdout"), stream("stderr"), root];
  const wasiRun = new WASI(["align", ...args], env, fds, {debug: false});
  let code = 0, instance = null;
  try {
    instance = await WebAssembly.instantiate(program, imports(wasiRun));
    wasiRun.inst = instance;
    const start = instance.exports._start;
    await (suspends ? WebAssembly.promising(start)() : start());
  } catch (error) {
    if (error instanceof WASIProcExit) code = error.code;
    else {
      // The program broke off: a fault of it, or the engine is out of memory or stack.
      code = 134;
      postMessage({stderr: `align: the program broke off: ${error && error.message || error}\n`});
    }
  }
  const memory = instance ? instance.exports.memory.buffer.byteLength : 0;
  postMessage({done: {code, seconds: (performance.now() - begin) / 1000, memory}});
}

self.onmessage = ({data}) => {
  if (data.module) program = data.module;
  else if (data.run) run(data);
  else if (data.pause !== undefined) {
    pauseAsked = data.pause;
    if (!pauseAsked && paused) paused();
    paused = null;
  } else if (data.input !== undefined) {
    if (data.input.length) inputs.push(data.input);
    if (inputWaits) inputWaits();
    inputWaits = null;
  } else change(data);
};
