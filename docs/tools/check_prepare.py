#!/usr/bin/env python3
"""check_prepare.py -- prepare_imdb.py against a server on 127.0.0.1 and against broken files.

    python3 docs/tools/check_prepare.py [NAME...]      the cases whose names begin so; default: all. Needs ./align

Each case is a run, or two, of prepare_imdb.py in a folder of its own: exit status, the one line of the message, the
files, and what the server was asked. Nothing leaves the machine: the proxy that the runs are told to use for every
other address refuses connections. Python's standard library alone. Ends with 'N passed, N failed'.
"""
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
GPT2_CONFIG = {  # as the real one has it, but for the sizes
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257}


# ---- The files ------------------------------------------------------------------------------------------------------

def tar(members):
    """A .tar.gz of (name, bytes) or of finished TarInfo."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(name, tarfile.TarInfo):
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(raw.getvalue(), 1)


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def reviews(n=300):
    draw = random.Random(1)
    words = [draw.randbytes(4).hex() for _ in range(3000)]
    for i in range(n):
        for split in ("train", "test"):
            for group, stars in (("pos", 9), ("neg", 2)):
                yield "aclImdb/%s/%s/%d_%d.txt" % (split, group, i, stars), " ".join(draw.choices(words, k=40)).encode()


GOOD = list(reviews())
ARCHIVE = tar([("aclImdb/README", b"x"), ("aclImdb/train/unsup/1_0.txt", b"no label"), ("aclImdb/train/pos/.DS_Store", b"")] + GOOD)
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()
ONE_EACH = [("aclImdb/train/pos/1_9.txt", b"good"), ("aclImdb/train/neg/1_1.txt", b"bad")]


def gpt2_files(folder):
    """What `prepare_imdb.py gpt2` fetches, of a small random GPT-2, spelt as the real one: names without a prefix, a
    mask among the tensors, keys in config.json that say nothing to align."""
    shape = "--n_layer 1 --n_head 2 --n_embd 8 --n_positions 16 --vocab_size 50257 --max_steps 1 --quiet"
    subprocess.run([os.path.join(ROOT, "align"), "pretrain", *shape.split(), "--dataset_name",
                    os.path.join(ROOT, "docs/reviews.jsonl"), "--output_dir", folder], check=True)
    files = {name: open(os.path.join(folder, name), "rb").read() for name in ("vocab.json", "merges.txt", "model.safetensors")}
    length, = struct.unpack("<Q", files["model.safetensors"][:8])
    tensors, data = json.loads(files["model.safetensors"][8:8 + length]), files["model.safetensors"][8 + length:]
    named = {name.replace("transformer.", ""): t for name, t in tensors.items()}
    named["h.0.attn.bias"] = {"dtype": "F32", "shape": [1, 1, 16, 16], "data_offsets": [len(data), len(data) + 1024]}
    header = json.dumps(named).encode()
    files["model.safetensors"] = struct.pack("<Q", len(header)) + header + data + bytes(1024)
    files["config.json"] = json.dumps(GPT2_CONFIG, indent=2).encode()
    merges = files["merges.txt"].decode().split("\n")[1:-1]
    model = {"type": "BPE", "vocab": json.loads(files["vocab.json"]), "merges": merges}
    files["tokenizer.json"] = json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()
    return files


# ---- The server -----------------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    """/CASE/MANNER/NAME: the file NAME of self.server.files, in this manner."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        case, manner, name = self.path.strip("/").split("/", 2)
        asked = self.server.asked.setdefault(case, [])
        asked.append(self.headers.get("Range"))
        data, first = self.server.files.get(name), len(asked) == 1
        if manner == "404" or data is None:
            return self.send_error(404)
        if manner == "500" or (manner == "500twice" and len(asked) < 3):
            return self.send_error(500)
        if manner == "moved":
            return self.answer(302, b"", 0, {"Location": "/%s/ok/%s" % (case, name)})
        if manner == "page":
            return self.answer(200, b"<html>log in</html>", 19)
        start = re.match(r"bytes=(\d+)-$", self.headers.get("Range") or "")
        start = int(start.group(1)) if start and manner != "norange" else 0
        if start > len(data) or start == len(data) > 0:
            return self.answer(416, b"", 0, {"Content-Range": "bytes */%d" % len(data)})
        body = data[start:]
        sent = body[:(len(body) + 1) // 2] if (manner in ("cut", "slow", "norange") and first) or manner == "halves" else body
        if manner == "empty":
            sent = b""
        extra = {"Content-Range": "bytes %d-%d/%d" % (start, len(data) - 1, len(data))} if start else {}
        self.answer(206 if start else 200, sent, None if manner == "nolength" else len(body), extra)
        if manner == "slow" and first:
            self.wfile.flush()
            self.server.released.wait(20)

    def answer(self, status, body, length, headers={}):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)


# ---- The cases ------------------------------------------------------------------------------------------------------

class Case:
    """One scratch folder; expect() raises on what is not as it should be."""

    def __init__(self, name, server):
        self.name, self.server, self.folder = name, server, tempfile.mkdtemp(prefix="check_prepare.")
        self.environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        self.environment.update(https_proxy="http://127.0.0.1:%d" % closed_port(), no_proxy="127.0.0.1", COLUMNS="100")

    def url(self, manner, name="aclImdb_v1.tar.gz"):
        return "http://127.0.0.1:%d/%s/%s/%s" % (self.server.server_port, self.name, manner, name)

    def base(self, manner):
        return self.url(manner, "")[:-1]

    def write(self, name, data):
        with open(os.path.join(self.folder, name), "wb") as f:
            f.write(data)
        return name

    def read(self, name):
        with open(os.path.join(self.folder, name), "rb") as f:
            return f.read()

    def rows(self, name="train"):
        return [json.loads(line) for line in self.read("imdb/%s.jsonl" % name).decode().split("\n") if line]

    def start(self, *args, **more):
        return subprocess.Popen([sys.executable, os.path.join(ROOT, "prepare_imdb.py"), *args], cwd=self.folder,
                                env=self.environment, **more)

    def run(self, *args, status=0, says=""):
        """Runs it; a failure must be one line. Returns stderr."""
        process = self.start(*args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = (x.decode() for x in process.communicate(timeout=60))
        expect(process.returncode == status, "exit %d: expected %d: %s" % (process.returncode, status, err))
        expect(not out and "Traceback" not in err, "a traceback, or something on stdout: " + out + err)
        if status:
            last = err.rstrip("\n").split("\n")[-1]
            expect(last.startswith("prepare_imdb.py: ") and len(last) < 500, "the last line: " + last)
            expect(last.count(": expected") >= 1, "the line does not say what was expected: " + last)
            lines[self.name] = last.replace(self.folder + "/", "").replace(":%d/" % self.server.server_port, ":PORT/")
        expect(re.search(says, err), "%r is not in: %s" % (says, err))
        return err

    def imdb(self, *args, **more):
        return self.run("imdb", "--source", *args, **more)


def expect(condition, message):
    if not condition:
        raise AssertionError(message.strip()[-600:])


def closed_port():
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


lines = {}


# Downloads

def get_whole(c):
    err = c.imdb(c.url("ok"), "--sha256", SHA256, says="as expected")
    expect(c.read("aclImdb_v1.tar.gz") == ARCHIVE and len(c.rows()) == 600 and len(c.rows("test")) == 600, "other files")
    expect(not os.path.exists(c.folder + "/aclImdb_v1.tar.gz.part"), ".part is left")
    expect("\r" not in err and len(err.split("\n")) < 25, "progress that is no terminal's: " + err)
    expect(re.search(r"aclImdb_v1.tar.gz: 0.1 of 0.3 MB\n", err), "no progress: " + err)
    c.imdb(c.url("ok"), "--sha256", SHA256)
    expect(len(c.server.asked[c.name]) == 1, "fetched again what is there")
    c.run("imdb")
    expect(len(c.server.asked[c.name]) == 1 and len(c.rows()) == 600, "did not take the archive beside it")


def get_terminal(c):
    parent, child = pty.openpty()
    process = c.start("imdb", "--source", c.url("ok"), stderr=child)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):       # on Linux the end of a terminal is an error
        while True:
            shown += os.read(parent, 4096)
    expect(process.wait() == 0 and shown.count(b"\raclImdb_v1.tar.gz: ") >= 1, "no line that is written over: %r" % shown)
    expect(b"MB/s" in shown and len(shown.split(b"\n")) < 12, "%r" % shown)


def get_killed(c, how=signal.SIGKILL):
    process = c.start("imdb", "--source", c.url("slow"), stderr=subprocess.PIPE)
    part, half, end = c.folder + "/aclImdb_v1.tar.gz.part", (len(ARCHIVE) + 1) // 2, time.time() + 20
    while (not os.path.exists(part) or os.path.getsize(part) < half // 2) and time.time() < end:
        time.sleep(0.02)
    process.send_signal(how)
    err = process.communicate(timeout=20)[1].decode()
    expect("Traceback" not in err and os.listdir(c.folder) == ["aclImdb_v1.tar.gz.part"], "left: %s %s" % (os.listdir(c.folder), err))
    have = os.path.getsize(part)
    c.imdb(c.url("slow"), "--sha256", SHA256)
    expect(c.server.asked[c.name] == [None, "bytes=%d-" % have] and have > 0, "asked %s" % c.server.asked[c.name])
    expect(c.read("aclImdb_v1.tar.gz") == ARCHIVE, "another file")


def get_interrupted(c):
    get_killed(c, signal.SIGINT)


def get_cut(c):
    c.imdb(c.url("cut"), "--sha256", SHA256, says="ended after %d of %d bytes; trying again" % ((len(ARCHIVE) + 1) // 2, len(ARCHIVE)))
    expect(c.server.asked[c.name] == [None, "bytes=%d-" % ((len(ARCHIVE) + 1) // 2)], "asked %s" % c.server.asked[c.name])


def get_halves(c):
    c.server.files[c.name] = ARCHIVE[:200]    # eight answers, each half of the rest: as long as bytes come it goes on
    c.imdb(c.url("halves", c.name), status=1, says="damaged or no .tar.gz|ends in the middle")
    expect(c.read(c.name) == ARCHIVE[:200] and len(c.server.asked[c.name]) == 8, "asked %s" % c.server.asked[c.name])


def get_norange(c):
    c.imdb(c.url("norange"), "--sha256", SHA256)
    expect(c.server.asked[c.name][1] is not None and c.read("aclImdb_v1.tar.gz") == ARCHIVE, "not begun anew")


def get_part_of_another(c):
    c.write("aclImdb_v1.tar.gz.part", bytes(1000))
    c.imdb(c.url("ok"), "--sha256", SHA256, status=1, says="damaged on the way, or another file")
    expect(os.listdir(c.folder) == [], "left: %s" % os.listdir(c.folder))
    c.imdb(c.url("ok"), "--sha256", SHA256)


def get_part_too_long(c):
    c.write("aclImdb_v1.tar.gz.part", bytes(len(ARCHIVE) + 1))
    c.imdb(c.url("ok"), "--sha256", SHA256)


def get_part_whole(c):
    c.write("aclImdb_v1.tar.gz.part", ARCHIVE)
    c.imdb(c.url("ok"), "--sha256", SHA256)
    expect(c.server.asked[c.name] == ["bytes=%d-" % len(ARCHIVE)], "asked %s" % c.server.asked[c.name])


def get_wrong_sum(c):
    c.imdb(c.url("ok"), "--sha256", "0" * 64, status=1, says="its sha256 is %s: expected 0000" % SHA256)
    expect(os.listdir(c.folder) == [], "left: %s" % os.listdir(c.folder))


def get_404(c):
    c.imdb(c.url("404"), status=1, says="HTTP 404 Not Found")
    expect(len(c.server.asked[c.name]) == 1, "asked again")


def get_500_then_success(c):
    c.imdb(c.url("500twice"), says="HTTP 500 .*; trying again")
    expect(len(c.server.asked[c.name]) == 3, "asked %s" % c.server.asked[c.name])


def get_500(c):
    c.imdb(c.url("500"), status=1, says="HTTP 500")
    expect(len(c.server.asked[c.name]) == 5, "asked %s" % c.server.asked[c.name])


def get_truncated(c):
    c.imdb(c.url("empty"), status=1, says=r"ended after 0 of %d bytes\): expected" % len(ARCHIVE))


def get_no_length(c):
    c.imdb(c.url("nolength"), "--sha256", SHA256)


def get_moved(c):
    c.imdb(c.url("moved"), "--sha256", SHA256)


def get_refused(c):
    c.imdb("http://127.0.0.1:%d/x.tar.gz" % closed_port(), status=1, says=r"no connection \(.*refused.*\).*--source|copy it to x.tar.gz")
    expect(os.listdir(c.folder) == [], "left: %s" % os.listdir(c.folder))


def get_default_without_network(c):
    c.run("imdb", status=1, says=r"https://ai.stanford.edu/\S+: no connection .*copy it to aclImdb_v1.tar.gz")


def get_page(c):
    c.imdb(c.url("page"), status=1, says="no .tar.gz archive")


def get_no_name(c):
    c.imdb("http://127.0.0.1:%d/" % c.server.server_port, status=1, says="names no file")


# GPT-2

def gpt2_whole(c):
    c.run("gpt2", "--base_url", c.base("cut"), says="next: ./align generate --model_name_or_path gpt2")
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json"):
        expect(c.read("gpt2/" + name) == c.server.files[name], name + " differs")
    args = ["generate", "--model_name_or_path", c.folder + "/gpt2", "--prompt", "The film", "--quiet"]
    ours = subprocess.run([ROOT + "/align", *args], capture_output=True)
    args[2] = c.server.origin
    expect(ours.returncode == 0 and ours.stdout == subprocess.run([ROOT + "/align", *args], capture_output=True).stdout, ours.stderr.decode())
    c.write("text.jsonl", b'{"text": "The film is good."}\n')
    sft = "sft --dataset_name text.jsonl --max_steps 1 --quiet --output_dir sft --model_name_or_path gpt2"
    p = subprocess.run([ROOT + "/align", *sft.split()], cwd=c.folder, capture_output=True)
    expect(p.returncode == 0, p.stderr.decode())
    asked = len(c.server.asked[c.name])
    c.run("gpt2", "--base_url", c.base("cut"), says="is there already")
    expect(len(c.server.asked[c.name]) == asked, "fetched again")


def gpt2_page(c):
    c.run("gpt2", "--base_url", c.base("page"), status=1, says="no config.json: expected GPT-2's: check --base_url")
    expect(os.listdir(c.folder + "/gpt2") == [], "left: %s" % os.listdir(c.folder + "/gpt2"))


def gpt2_weights_short(c):
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer.json"):
        c.server.files["short/" + name] = c.server.files[name]
    c.server.files["short/model.safetensors"] = c.server.files["model.safetensors"][:-1]
    c.run("gpt2", "--base_url", c.base("ok") + "/short", status=1, says="bytes that are no model.safetensors")
    expect("model.safetensors" not in os.listdir(c.folder + "/gpt2"), "kept")


def gpt2_without_network(c):
    c.run("gpt2", status=1, says=r"https://huggingface.co/openai-community/gpt2/\S+config.json: no connection")


# Archives and folders

def archive_shipped_layout(c):
    c.imdb(c.write("a.tar.gz", ARCHIVE), "--max_reviews", "10")
    expect(len(c.rows()) == 10 and sum(r["label"] for r in c.rows()) == 5 and len(c.rows("pairs")) == 5, "other rows")
    expect({r["score"] for r in c.rows()} == {3.5, -3.5}, "other scores")
    expect(all(r["text"].startswith(tuple(p["prompt"] for p in c.rows("prompts"))) for r in c.rows()), "prompts that begin no review")


def archive_and_folder_alike(c):
    c.imdb(c.write("a.tar.gz", ARCHIVE))
    first = [c.read("imdb/%s.jsonl" % n) for n in ("train", "test", "pairs", "prompts")]
    for name, data in GOOD:
        os.makedirs(os.path.dirname(os.path.join(c.folder, name)), exist_ok=True)
        c.write(name, data)
    for source in ("aclImdb", "."):
        c.imdb(source)
        expect(first == [c.read("imdb/%s.jsonl" % n) for n in ("train", "test", "pairs", "prompts")], "differs from " + source)


def refused(says, members, name="a.tar.gz"):
    def case(c):
        c.imdb(c.write(name, members if isinstance(members, bytes) else tar(ONE_EACH + members)), status=1, says=says)
        expect(os.listdir(c.folder) == [name], "left: %s" % os.listdir(c.folder))
    return case


def huge(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return gzip.compress(info.tobuf() + b"x" * 1024, 1)


def bomb():
    """4 GB of zeros behind a header, 4 MB packed: many members of gzip, one after the other."""
    info = tarfile.TarInfo("aclImdb/zeros")
    info.size = 1 << 26
    return gzip.compress(info.tobuf() + bytes(1 << 26), 6) * 60


archive_parent = refused(r"\.\./train/pos/1_9.txt: a name that leaves", [("../train/pos/1_9.txt", b"x")])
archive_parent_within = refused("a name that leaves", [("aclImdb/../../x", b"x")])
archive_absolute = refused("a name that leaves", [("/tmp/train/pos/2_9.txt", b"x")])
archive_symlink = refused("is a link or a folder", [link("aclImdb/train/pos/2_9.txt", "/etc/passwd", tarfile.SYMTYPE)])
archive_hard_link = refused("is a link or a folder", [link("aclImdb/train/pos/2_9.txt", "aclImdb/train/pos/1_9.txt", tarfile.LNKTYPE)])
archive_huge_review = refused("4294967296 bytes: expected a review", huge("aclImdb/train/pos/1_9.txt", 1 << 32))
archive_huge_member = refused("4294967296 bytes: expected a review", huge("aclImdb/other", 1 << 32))
archive_bomb = refused("unpacks to more than", bomb())
archive_cut = refused("ends in the middle", ARCHIVE[:-100])
archive_damaged = refused("damaged|ends in the middle", ARCHIVE[:2000] + b"????" + ARCHIVE[2004:])
archive_none = refused("no .tar.gz archive", b"this is text\n")
archive_empty_file = refused("no .tar.gz archive|no reviews|ends in the middle", b"")
archive_zip = refused("a .zip: unzip it first", b"PK\x03\x04" + bytes(100), "archive.zip")
archive_no_tar = refused("no .tar.gz archive", gzip.compress(b"text" * 1000))
archive_no_rating = refused("no rating in the file name", [("aclImdb/train/pos/one.txt", b"x")])
archive_no_reviews = refused("no reviews inside", tar([("README", b"x")]))
archive_one_kind = refused("no disliked", tar(ONE_EACH[:1]))
archive_latin1 = refused("byte 3 is not UTF-8", [("aclImdb/train/pos/3_9.txt", b"caf\xe9")])
archive_bad_name = refused(r"1_9\?\[31m.txt: no rating", [("aclImdb/train/pos/1_9\x1b[31m.txt", b"x")])


def archive_missing(c):
    c.imdb("nothing.tar.gz", status=1, says="nothing.tar.gz: there is no such file or folder")


def archive_wrong_sum(c):
    c.imdb(c.write("a.tar.gz", ARCHIVE), "--sha256", "1" * 64, status=1, says="its sha256 is %s: expected 1111" % SHA256)


# CSV

def table(says, data, *args, rows=None, name="IMDB Dataset.csv"):
    """A .csv that is taken, with these (text, label), or refused with this message."""
    def case(c):
        c.imdb(c.write(name, data), *args, status=rows is None, says=says)
        if rows is not None:
            expect(sorted((r["text"], r["label"], r["score"]) for r in c.rows()) == sorted((t, k, 2 * k - 1) for t, k in rows),
                   "other rows: %s" % c.rows()[:5])
    return case


KAGGLE = 'review,sentiment\r\n"One of the ""best"", really.<br /><br />Two\nlines",positive\r\nBad; 5" screen,negative\r\n'
ROWS = [('One of the "best", really.<br /><br />Two\nlines', 1), ('Bad; 5" screen', 0)]
csv_kaggle = table("", KAGGLE.encode(), rows=ROWS)
csv_bom = table("", b"\xef\xbb\xbf" + KAGGLE.encode(), rows=ROWS)
csv_utf16 = table("", KAGGLE.encode("utf-16"), rows=ROWS)
csv_unix_lines = table("", KAGGLE.replace("\r\n", "\n").encode(), rows=ROWS)
csv_semicolons = table("", b'sentiment;review\npositive;"a;b"\nnegative;c, d\n', rows=[("a;b", 1), ("c, d", 0)])
csv_tabs = table("", b"text\tlabel\nx y\t1\nz\t0\n", rows=[("x y", 1), ("z", 0)], name="x.tsv")
csv_labels = table("", b"Text,Label\na,pos\nb,neg\nc,True\nd,0\n", rows=[("a", 1), ("b", 0), ("c", 1), ("d", 0)])
csv_more_columns = table("", b"id,review,sentiment,x\n1,a,positive,\n2,b,negative,\n", rows=[("a", 1), ("b", 0)])
csv_empty_rows = table("", b"review,sentiment\n\n,\na,positive\n  ,negative\n\nb,negative\n", rows=[("a", 1), ("b", 0)])
csv_cp1252 = table("", "review,sentiment\ncafé,positive\n“no”,negative\n".encode("cp1252"), "--encoding", "cp1252", rows=[("café", 1), ("“no”", 0)])
csv_cp1252_untold = table(":2: is not utf-8.*--encoding", "review,sentiment\ncafé,positive\n".encode("cp1252"))
csv_unknown_encoding = table("--encoding utf-9: there is no such", KAGGLE.encode(), "--encoding", "utf-9")
csv_open_quote = table(r":3: .*expected fields in quotes to end", b'review,sentiment\na,positive\n"b,negative\n')
csv_quote_inside = table(r":2: .*quotes inside them doubled", b'review,sentiment\n"a "b" c",positive\n')
csv_fields = table(":3: 3 fields: expected 2", b"review,sentiment\na,positive\nb, c,negative\n")
csv_no_header = table(":1: the columns are 'a', 'positive'", b"a,positive\nb,negative\n")
csv_empty = table(":1: the columns are none", b"")
csv_header_alone = table("no reviews inside", b"review,sentiment\n")
csv_third_label = table(":2: '-1': expected positive or negative", b"text,label\na,-1\n")
csv_one_kind = table("no disliked", b"review,sentiment\na,positive\n")
csv_long_field = table("field larger than", b"review,sentiment\n" + b"x" * (2 << 20) + b",positive\n")
csv_nul = table("", b"review,sentiment\na\0b,positive\nc,negative\n") if sys.version_info < (3, 11) else \
    table("", b"review,sentiment\na\0b,positive\nc,negative\n", rows=[("a\0b", 1), ("c", 0)])


def csv_trains(c):
    """align takes what came of it."""
    rows = "".join('"%s film number %d, <br />and so on",%s\n' % (("good", "bad")[i % 2], i, ("positive", "negative")[i % 2]) for i in range(300))
    c.imdb(c.write("x.csv", ("review,sentiment\n" + rows).encode()))
    command = "reward --model_name_or_path %s --dataset_name imdb/pairs.jsonl --max_steps 1 --quiet --output_dir r" % c.server.origin
    p = subprocess.run([ROOT + "/align", *command.split()], cwd=c.folder, capture_output=True)
    expect(p.returncode == 0, p.stderr.decode())


def usage(c):
    for args in (["imdb", "--max_reviews", "1"], ["imdb", "--nothing"], ["nothing"], []):
        process = c.start(*args, stderr=subprocess.PIPE)
        expect(process.communicate()[1].count(b"\n") == 1 and process.returncode == 2, "%s: exit %s" % (args, process.returncode))


PREFIXES = ("get_", "gpt2_", "archive_", "csv_", "usage")
NOT_CASES = ("gpt2_files",)


def run_case(name, server):
    case = Case(name, server)
    try:
        globals()[name](case)
        return None
    except Exception as e:
        return "%s: %s" % (type(e).__name__, e)
    finally:
        shutil.rmtree(case.folder)


def main():
    names = [n for n, v in globals().items() if n.startswith(PREFIXES) and callable(v) and n not in NOT_CASES]
    names = [n for n in names if not sys.argv[1:] or n.startswith(tuple(sys.argv[1:]))]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked, server.released = True, {}, threading.Event()
    server.origin = tempfile.mkdtemp(prefix="check_prepare.")
    server.files = {"aclImdb_v1.tar.gz": ARCHIVE, **gpt2_files(server.origin)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    failed = 0
    with ThreadPoolExecutor(4) as pool:      # most of them wait for the next try
        for name, complaint in zip(names, pool.map(lambda n: run_case(n, server), names)):
            failed += complaint is not None
            print("%-4s  %-28s %s" % ("FAIL" if complaint else "ok", name, complaint or lines.get(name, "")), flush=True)
    server.released.set()
    server.shutdown()
    shutil.rmtree(server.origin)
    print("%d passed, %d failed" % (len(names) - failed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
