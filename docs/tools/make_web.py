#!/usr/bin/env python3
"""Makes align.html: align as WebAssembly in one page that works by double click, offline.

    python3 docs/tools/make_web.py [--output align.html] [--page docs/web/page.html]

`make web` runs it. It compiles align.c with clang for WASI, takes the system calls that a browser
lacks from npm's @bjorn3/browser_wasi_shim (its version and checksum stand below; fetched once and
kept in docs/web/cache), and puts program, library, page and files into one file. The page's
stylesheets and scripts are those that page.html names; docs/web/README.md tells how it uses the
program. Needs clang, lld, wasi-libc, libclang-rt-dev-wasm32 (names of Debian's packages) and, the
first time, npm. WASI_CC: another compiler, for example "/opt/wasi-sdk/bin/clang".
"""

import argparse
import base64
import gzip
import hashlib
import io
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
WEB = ROOT / "docs" / "web"
LIMIT = 6 << 20
SHIM = "@bjorn3/browser_wasi_shim"
SHIM_VERSION = "0.4.2"
SHIM_SHA512 = (
    "/iHkCVUG3VbcbmEHn5iIUpIrh7a7WPiwZ3sHy4HZKZzB"
    "dSadwdddYDZAII2zBvQYV0Lfi8naZngPCN7WPHI/hA=="
)
# What the program reads, and what the page shows.
FILES = """tokenizer.bin LICENSE align.c docs/glossary.md docs/report.html docs/reviews.jsonl
    docs/reviews.LICENSE.txt docs/exercises.md docs/exercises.pt-BR.md
    docs/tools/exercises.json""".split()
# Nothing may be loaded from anywhere: what the page needs is in it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'wasm-unsafe-eval' blob:; worker-src blob:; "
    "style-src 'unsafe-inline'; img-src data: blob:; frame-src blob: data:; form-action 'none'; "
    "base-uri 'none'"
)


def compile_wasm(output):
    """align.c for WASI. The stack lies first, so that running out of it is an error and never
    overwrites data."""
    compiler = shlex.split(os.environ.get("WASI_CC", "clang"))
    flags = "--target=wasm32-wasi -O3 -msimd128 -D_WASI_EMULATED_SIGNAL -Wall -Wextra -Wshadow"
    link = "-lm -lwasi-emulated-signal -Wl,--stack-first,-z,stack-size=4194304,--strip-all"
    command = [*compiler, *flags.split(), str(ROOT / "align.c"), "-o", output, *link.split()]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"make_web: {compiler[0]}: not found; install clang, or set WASI_CC")
    if done.returncode:
        sys.exit(
            f"make_web: {shlex.join(command)}\n{done.stderr[:3000]}\nmake_web: align.c could not be"
            " compiled to WebAssembly; on Debian and Ubuntu this needs: apt-get install clang lld"
            " wasi-libc libclang-rt-dev-wasm32"
        )
    sys.stderr.write(done.stderr)


def fetch_shim():
    """The library's package, from the cache or from npm, with its checksum verified."""
    cached = WEB / "cache" / f"browser_wasi_shim-{SHIM_VERSION}.tgz"
    if not cached.exists():
        npm = shutil.which("npm")
        need = f"{SHIM} {SHIM_VERSION} is needed once; put its package into {cached}, or"
        if not npm:
            sys.exit(f"make_web: npm: not found; {need} install npm")
        with tempfile.TemporaryDirectory() as folder:
            command = [npm, "pack", "--loglevel", "error", f"{SHIM}@{SHIM_VERSION}"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            found = list(pathlib.Path(folder).glob("*.tgz"))
            if done.returncode or not found:
                last = " ".join(done.stderr.split())[-300:]
                sys.exit(f"make_web: npm pack failed: {last}; {need} try again with a network")
            cached.parent.mkdir(exist_ok=True)
            shutil.copy(found[0], cached.with_suffix(".tmp"))
            os.replace(cached.with_suffix(".tmp"), cached)
    data = cached.read_bytes()
    digest = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != SHIM_SHA512:
        sys.exit(
            f"make_web: {cached}: its SHA-512 is {digest}, expected {SHIM_SHA512}; remove the file"
        )
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar if m.isfile()}


def bundle_shim(package):
    """The library's modules as one object `shim`, for a worker that can import nothing. Each module
    becomes a function; what it exports is what the function returns."""
    parts = []
    for name in ("debug", "wasi_defs", "fd", "fs_mem", "wasi"):
        text = package[f"package/dist/{name}.js"]
        text = re.sub(r'import\*as (\w+) from"\./(\w+)\.js";', r"const \1=modules.\2;", text)
        text = re.sub(r'import\{([\w,]+)\}from"\./(\w+)\.js";', r"const {\1}=modules.\2;", text)
        exports = re.findall(r"\bexport (?:const|class|function) (\w+)", text)
        text = re.sub(r"\bexport (?=const|class|function)", "", text)
        for one in re.findall(r"\bexport\{(\w+) as default\};?", text):
            exports.append(one)
        text = re.sub(r"\bexport\{\w+ as default\};?", "", text)
        if re.search(r"\b(import|export)[ {*]", text):
            sys.exit(f"make_web: {SHIM}: {name}.js has an import or export of an unknown form")
        parts.append(f"modules.{name}=(()=>{{{text};return {{{','.join(exports)}}}}})();")
    licence = package["package/LICENSE-MIT"].strip().replace("*/", "* /")
    return (
        f"/* {SHIM} {SHIM_VERSION}, https://github.com/bjorn3/browser_wasi_shim\n\n{licence} */\n"
        "const shim=(()=>{const modules={};\n" + "\n".join(parts) + "\n"
        "return {...modules.fd,...modules.fs_mem,...modules.wasi,wasi:modules.wasi_defs}})();\n"
    )


def worker_source():
    return bundle_shim(fetch_shim()) + (WEB / "worker.js").read_text()


def asset(name, data):
    """Bytes as an element that no browser runs; compressed, since base64 adds a third."""
    text = base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()
    return f'<script type="text/plain" data-asset="{name}">{text}</script>\n'


def inline(page, folder):
    """The stylesheets and scripts that the page names, put into it."""

    def read(name):
        text = (folder / name).read_text()
        if "</script" in text or "</style" in text:
            sys.exit(f"make_web: {name}: holds </script or </style, which would end it too early")
        return text

    page = re.sub(
        r'<link rel="stylesheet" href="([\w.-]+)">',
        lambda m: f"<style>\n{read(m[1])}</style>",
        page,
    )
    return re.sub(
        r'<script src="([\w.-]+)"></script>', lambda m: f"<script>\n{read(m[1])}</script>", page
    )


def make(page_path, output):
    with tempfile.TemporaryDirectory() as folder:
        wasm = pathlib.Path(folder) / "align.wasm"
        compile_wasm(str(wasm))
        program = wasm.read_bytes()
    assets = asset("align.wasm", program) + asset("worker.js", worker_source().encode())
    assets += "".join(asset(name, (ROOT / name).read_bytes()) for name in FILES)
    page = page_path.read_text()
    for mark in ('<meta charset="utf-8">', "</body>"):
        if page.count(mark) != 1:
            sys.exit(f"make_web: {page_path}: needs {mark} once")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{policy}')
    # the page is drawn before the browser has read what follows its text
    first = page.find("<script")
    if first < 0:
        first = page.find("</body>")
    page = inline(page[:first] + "<!-- assets -->" + page[first:], page_path.parent)
    page = page.replace("<!-- assets -->", assets, 1)
    data = page.encode()
    if len(data) > LIMIT:
        sys.exit(f"make_web: {output}: {len(data)} bytes, at most {LIMIT} are allowed")
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, output)
    print(f"{output}: {len(data) / 1e6:.2f} MB, of which the program {len(program) / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "align.html")
    parser.add_argument("--page", type=pathlib.Path, default=WEB / "page.html")
    options = parser.parse_args()
    make(options.page, options.output)
