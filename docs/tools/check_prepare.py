#!/usr/bin/env python3
"""check_prepare.py -- prepare_imdb.py against a server on 127.0.0.1 and against broken files.

    python3 docs/tools/check_prepare.py [NAME...]      the cases whose names begin so; default: all

Each case is a run, or two, of prepare_imdb.py in a folder of its own: exit status, the one line of
the message, the files, and what the server was asked. Nothing leaves the machine: the proxy that
the runs are told to use for every other address refuses connections. Needs ./align; Python's
standard library alone. Ends with 'N passed, N failed'.
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
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 16,
    "n_embd": 8,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 16,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


# ---- The files -----------------------------------------------------------------------------------


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
                name = "aclImdb/%s/%s/%d_%d.txt" % (split, group, i, stars)
                yield name, " ".join(draw.choices(words, k=40)).encode()


GOOD = list(reviews())
OTHERS = [("aclImdb/README", b"x"), ("aclImdb/train/unsup/1_0.txt", b"no label")]
OTHERS += [("aclImdb/train/pos/.DS_Store", b"")]
ARCHIVE = tar(OTHERS + GOOD)
HALF = (len(ARCHIVE) + 1) // 2
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()
ONE_EACH = [("aclImdb/train/pos/1_9.txt", b"good"), ("aclImdb/train/neg/1_1.txt", b"bad")]


def gpt2_files(folder):
    """What `prepare_imdb.py gpt2` fetches, of a small random GPT-2.

    Spelt as the real one: names without a prefix, a mask among the tensors, keys in config.json
    that say nothing to align.
    """
    shape = "--n_layer 1 --n_head 2 --n_embd 8 --n_positions 16 --vocab_size 50257"
    data = ["--dataset_name", ROOT + "/docs/reviews.jsonl", "--output_dir", folder]
    command = [ROOT + "/align", "pretrain", *shape.split(), "--max_steps", "1", "--quiet", *data]
    subprocess.run(command, check=True)
    files = {}
    for name in ("vocab.json", "merges.txt", "model.safetensors"):
        with open(os.path.join(folder, name), "rb") as f:
            files[name] = f.read()
    weights = files["model.safetensors"]
    (length,) = struct.unpack("<Q", weights[:8])
    tensors, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    named = {name.replace("transformer.", ""): t for name, t in tensors.items()}
    place = [len(data), len(data) + 1024]
    named["h.0.attn.bias"] = {"dtype": "F32", "shape": [1, 1, 16, 16], "data_offsets": place}
    header = json.dumps(named).encode()
    files["model.safetensors"] = struct.pack("<Q", len(header)) + header + data + bytes(1024)
    files["config.json"] = json.dumps(GPT2_CONFIG, indent=2).encode()
    merges = files["merges.txt"].decode().split("\n")[1:-1]
    model = {"type": "BPE", "vocab": json.loads(files["vocab.json"]), "merges": merges}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model}
    files["tokenizer.json"] = json.dumps(tokenizer).encode()
    return files


# ---- The server ----------------------------------------------------------------------------------


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
        body = sent = data[start:]
        if (manner in ("cut", "slow", "norange") and first) or manner == "halves":
            sent = body[: (len(body) + 1) // 2]
        if manner == "empty":
            sent = b""
        extra = {}
        if start:
            extra["Content-Range"] = "bytes %d-%d/%d" % (start, len(data) - 1, len(data))
        length = None if manner == "nolength" else len(body)
        self.answer(206 if start else 200, sent, length, extra)
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


# ---- The cases -----------------------------------------------------------------------------------


class Case:
    """One scratch folder; expect() raises on what is not as it should be."""

    def __init__(self, name, server):
        self.name, self.server = name, server
        self.folder = tempfile.mkdtemp(prefix="check_prepare.")
        self.environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        nowhere = "http://127.0.0.1:%d" % closed_port()
        self.environment.update(https_proxy=nowhere, no_proxy="127.0.0.1", COLUMNS="100")

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
        text = self.read("imdb/%s.jsonl" % name).decode()
        return [json.loads(line) for line in text.split("\n") if line]

    def start(self, *args, **more):
        command = [sys.executable, os.path.join(ROOT, "prepare_imdb.py"), *args]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **more)

    def run(self, *args, status=0, says=""):
        """Runs it; a failure must be one line. Returns stderr."""
        pipe = subprocess.PIPE
        process = self.start(*args, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)
        out, err = (x.decode() for x in process.communicate(timeout=60))
        ended = process.returncode
        expect(ended == status, "exit %d: expected %d: %s" % (ended, status, err))
        broken = out or "Traceback" in err
        expect(not broken, "a traceback, or something on stdout: " + out + err)
        if status:
            last = err.rstrip("\n").split("\n")[-1]
            begins = last.startswith("prepare_imdb.py: ")
            expect(begins and len(last) < 500, "the last line: " + last)
            expect(": expected" in last, "the line does not say what was expected: " + last)
            last = last.replace(self.folder + "/", "")
            lines[self.name] = last.replace(":%d/" % self.server.server_port, ":PORT/")
        expect(re.search(says, err), "%r is not in: %s" % (says, err))
        return err

    def imdb(self, *args, **more):
        return self.run("imdb", "--source", *args, **more)

    def align(self, command):
        """Runs align, which must go well; what it prints."""
        p = subprocess.run([ROOT + "/align", *command], cwd=self.folder, capture_output=True)
        expect(p.returncode == 0, p.stderr.decode())
        return p.stdout

    def expect_asked(self, wanted):
        """wanted: the ranges that the server was asked for, or how often it was asked."""
        asked = self.server.asked[self.name]
        expect(wanted in (asked, len(asked)), "asked %s" % asked)

    def expect_left(self, *names, folder=""):
        left = os.listdir(os.path.join(self.folder, folder))
        expect(left == list(names), "left: %s" % left)


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
    expect(c.read("aclImdb_v1.tar.gz") == ARCHIVE, "another file")
    expect(len(c.rows()) == 600 and len(c.rows("test")) == 600, "other files")
    expect(not os.path.exists(c.folder + "/aclImdb_v1.tar.gz.part"), ".part is left")
    expect("\r" not in err and len(err.split("\n")) < 25, "progress that is no terminal's: " + err)
    expect(re.search(r"aclImdb_v1.tar.gz: 0.1 of 0.3 MB\n", err), "no progress: " + err)
    c.imdb(c.url("ok"), "--sha256", SHA256)
    c.expect_asked(1)  # what is there is not fetched again
    c.run("imdb")
    c.expect_asked(1)  # it takes the archive beside it
    expect(len(c.rows()) == 600, "other files")


def get_terminal(c):
    parent, child = pty.openpty()
    process = c.start("imdb", "--source", c.url("ok"), stderr=child)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # on Linux the end of a terminal is an error
        while True:
            shown += os.read(parent, 4096)
    over = b"\raclImdb_v1.tar.gz: " in shown
    expect(process.wait() == 0 and over, "no line that is written over: %r" % shown)
    expect(b"MB/s" in shown and len(shown.split(b"\n")) < 12, "%r" % shown)


def get_killed(c, how=signal.SIGKILL):
    process = c.start("imdb", "--source", c.url("slow"), stderr=subprocess.PIPE)
    part, end = c.folder + "/aclImdb_v1.tar.gz.part", time.time() + 20
    while (not os.path.exists(part) or os.path.getsize(part) < HALF // 2) and time.time() < end:
        time.sleep(0.02)
    process.send_signal(how)
    err = process.communicate(timeout=20)[1].decode()
    expect("Traceback" not in err, err)
    c.expect_left("aclImdb_v1.tar.gz.part")
    have = os.path.getsize(part)
    expect(have > 0, "an empty part")
    c.imdb(c.url("slow"), "--sha256", SHA256)
    c.expect_asked([None, "bytes=%d-" % have])
    expect(c.read("aclImdb_v1.tar.gz") == ARCHIVE, "another file")


def get_interrupted(c):
    get_killed(c, signal.SIGINT)


def get_cut(c):
    says = "ended after %d of %d bytes; trying again" % (HALF, len(ARCHIVE))
    c.imdb(c.url("cut"), "--sha256", SHA256, says=says)
    c.expect_asked([None, "bytes=%d-" % HALF])


def get_halves(c):
    # eight answers, each half of the rest: as long as bytes come it goes on
    c.server.files[c.name] = ARCHIVE[:200]
    c.imdb(c.url("halves", c.name), status=1, says="damaged or no .tar.gz|ends in the middle")
    expect(c.read(c.name) == ARCHIVE[:200], "another file")
    c.expect_asked(8)


def get_norange(c):
    c.imdb(c.url("norange"), "--sha256", SHA256)
    expect(c.server.asked[c.name][1] is not None, "no part was asked for")
    expect(c.read("aclImdb_v1.tar.gz") == ARCHIVE, "not begun anew")


def get_part_of_another(c):
    c.write("aclImdb_v1.tar.gz.part", bytes(1000))
    c.imdb(c.url("ok"), "--sha256", SHA256, status=1, says="damaged on the way, or another file")
    c.expect_left()
    c.imdb(c.url("ok"), "--sha256", SHA256)


def get_part_too_long(c):
    c.write("aclImdb_v1.tar.gz.part", bytes(len(ARCHIVE) + 1))
    c.imdb(c.url("ok"), "--sha256", SHA256)


def get_part_whole(c):
    c.write("aclImdb_v1.tar.gz.part", ARCHIVE)
    c.imdb(c.url("ok"), "--sha256", SHA256)
    c.expect_asked(["bytes=%d-" % len(ARCHIVE)])


def get_wrong_sum(c):
    says = "its sha256 is %s: expected 0000" % SHA256
    c.imdb(c.url("ok"), "--sha256", "0" * 64, status=1, says=says)
    c.expect_left()


def get_404(c):
    c.imdb(c.url("404"), status=1, says="HTTP 404 Not Found")
    c.expect_asked(1)


def get_500_then_success(c):
    c.imdb(c.url("500twice"), says="HTTP 500 .*; trying again")
    c.expect_asked(3)


def get_500(c):
    c.imdb(c.url("500"), status=1, says="HTTP 500")
    c.expect_asked(5)


def get_truncated(c):
    c.imdb(c.url("empty"), status=1, says=r"ended after 0 of %d bytes\): expected" % len(ARCHIVE))


def get_no_length(c):
    c.imdb(c.url("nolength"), "--sha256", SHA256)


def get_moved(c):
    c.imdb(c.url("moved"), "--sha256", SHA256)


def get_refused(c):
    says = r"no connection \(.*refused.*\).*--source|copy it to x.tar.gz"
    c.imdb("http://127.0.0.1:%d/x.tar.gz" % closed_port(), status=1, says=says)
    c.expect_left()


def get_default_without_network(c):
    says = r"https://ai.stanford.edu/\S+: no connection .*copy it to aclImdb_v1.tar.gz"
    c.run("imdb", status=1, says=says)


def get_page(c):
    c.imdb(c.url("page"), status=1, says="no .tar.gz archive")


def get_no_name(c):
    c.imdb("http://127.0.0.1:%d/" % c.server.server_port, status=1, says="names no file")


# GPT-2


def gpt2_whole(c):
    says = "next: ./align generate --model_name_or_path gpt2"
    c.run("gpt2", "--base_url", c.base("cut"), says=says)
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json"):
        expect(c.read("gpt2/" + name) == c.server.files[name], name + " differs")
    written = [
        c.align(["generate", "--quiet", "--prompt", "The film", "--model_name_or_path", folder])
        for folder in ("gpt2", c.server.origin)
    ]
    expect(written[0] == written[1], "it writes another text: %s" % written)
    c.write("text.jsonl", b'{"text": "The film is good."}\n')
    sft = "sft --dataset_name text.jsonl --model_name_or_path gpt2 --output_dir sft"
    c.align([*sft.split(), "--max_steps", "1", "--quiet"])
    asked = len(c.server.asked[c.name])
    c.run("gpt2", "--base_url", c.base("cut"), says="is there already")
    c.expect_asked(asked)


def gpt2_page(c):
    says = "no config.json: expected GPT-2's: check --base_url"
    c.run("gpt2", "--base_url", c.base("page"), status=1, says=says)
    c.expect_left(folder="gpt2")


def gpt2_weights_short(c):
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer.json"):
        c.server.files["short/" + name] = c.server.files[name]
    c.server.files["short/model.safetensors"] = c.server.files["model.safetensors"][:-1]
    says = "bytes that are no model.safetensors"
    c.run("gpt2", "--base_url", c.base("ok") + "/short", status=1, says=says)
    expect("model.safetensors" not in os.listdir(c.folder + "/gpt2"), "kept")


def gpt2_without_network(c):
    says = r"https://huggingface.co/openai-community/gpt2/\S+config.json: no connection"
    c.run("gpt2", status=1, says=says)


# Archives and folders


def archive_shipped_layout(c):
    c.imdb(c.write("a.tar.gz", ARCHIVE), "--max_reviews", "10")
    rows, pairs, prompts = (c.rows(name) for name in ("train", "pairs", "prompts"))
    expect(len(rows) == 10 and sum(r["label"] for r in rows) == 5, "other rows")
    expect(len(pairs) == 5, "other pairs")
    expect({r["score"] for r in rows} == {3.5, -3.5}, "other scores")
    begin = tuple(p["prompt"] for p in prompts)
    expect(all(r["text"].startswith(begin) for r in rows), "prompts that begin no review")


def archive_and_folder_alike(c):
    def files():
        return [c.read("imdb/%s.jsonl" % n) for n in ("train", "test", "pairs", "prompts")]

    c.imdb(c.write("a.tar.gz", ARCHIVE))
    first = files()
    for name, data in GOOD:
        os.makedirs(os.path.dirname(os.path.join(c.folder, name)), exist_ok=True)
        c.write(name, data)
    for source in ("aclImdb", "."):
        c.imdb(source)
        expect(first == files(), "differs from " + source)


def refused(says, members, name="a.tar.gz"):
    """An archive, its bytes or what it has beside two good reviews, that is refused so."""

    def case(c):
        data = members if isinstance(members, bytes) else tar(ONE_EACH + members)
        c.imdb(c.write(name, data), status=1, says=says)
        c.expect_left(name)

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


archive_parent = refused(
    r"\.\./train/pos/1_9.txt: a name that leaves", [("../train/pos/1_9.txt", b"x")]
)
archive_parent_within = refused("a name that leaves", [("aclImdb/../../x", b"x")])
archive_absolute = refused("a name that leaves", [("/tmp/train/pos/2_9.txt", b"x")])
archive_symlink = refused(
    "is a link or a folder", [link("aclImdb/train/pos/2_9.txt", "/etc/passwd", tarfile.SYMTYPE)]
)
archive_hard_link = refused(
    "is a link or a folder",
    [link("aclImdb/train/pos/2_9.txt", "aclImdb/train/pos/1_9.txt", tarfile.LNKTYPE)],
)
archive_huge_review = refused(
    "4294967296 bytes: expected a review", huge("aclImdb/train/pos/1_9.txt", 1 << 32)
)
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
archive_bad_name = refused(
    r"1_9\?\[31m.txt: no rating", [("aclImdb/train/pos/1_9\x1b[31m.txt", b"x")]
)


def archive_missing(c):
    c.imdb("nothing.tar.gz", status=1, says="nothing.tar.gz: there is no such file or folder")


def archive_wrong_sum(c):
    says = "its sha256 is %s: expected 1111" % SHA256
    c.imdb(c.write("a.tar.gz", ARCHIVE), "--sha256", "1" * 64, status=1, says=says)


# CSV


def table(says, data, *args, rows=None, name="IMDB Dataset.csv"):
    """A .csv that is taken, with these (text, label), or refused with this message."""

    def case(c):
        c.imdb(c.write(name, data), *args, status=rows is None, says=says)
        if rows is not None:
            found = sorted((r["text"], r["label"], r["score"]) for r in c.rows())
            wanted = sorted((text, label, 2 * label - 1) for text, label in rows)
            expect(found == wanted, "other rows: %s" % found[:5])

    return case


KAGGLE = (
    "review,sentiment\r\n"
    '"One of the ""best"", really.<br /><br />Two\nlines",positive\r\n'
    'Bad; 5" screen,negative\r\n'
)
ROWS = [('One of the "best", really.<br /><br />Two\nlines', 1), ('Bad; 5" screen', 0)]
csv_kaggle = table("", KAGGLE.encode(), rows=ROWS)
csv_bom = table("", b"\xef\xbb\xbf" + KAGGLE.encode(), rows=ROWS)
csv_utf16 = table("", KAGGLE.encode("utf-16"), rows=ROWS)
csv_unix_lines = table("", KAGGLE.replace("\r\n", "\n").encode(), rows=ROWS)
csv_semicolons = table(
    "", b'sentiment;review\npositive;"a;b"\nnegative;c, d\n', rows=[("a;b", 1), ("c, d", 0)]
)
csv_tabs = table("", b"text\tlabel\nx y\t1\nz\t0\n", rows=[("x y", 1), ("z", 0)], name="x.tsv")
csv_labels = table(
    "", b"Text,Label\na,pos\nb,neg\nc,True\nd,0\n", rows=[("a", 1), ("b", 0), ("c", 1), ("d", 0)]
)
csv_more_columns = table(
    "", b"id,review,sentiment,x\n1,a,positive,\n2,b,negative,\n", rows=[("a", 1), ("b", 0)]
)
csv_empty_rows = table(
    "", b"review,sentiment\n\n,\na,positive\n  ,negative\n\nb,negative\n", rows=[("a", 1), ("b", 0)]
)
csv_cp1252 = table(
    "",
    "review,sentiment\ncafé,positive\n“no”,negative\n".encode("cp1252"),
    "--encoding",
    "cp1252",
    rows=[("café", 1), ("“no”", 0)],
)
csv_cp1252_untold = table(
    ":2: is not utf-8.*--encoding", "review,sentiment\ncafé,positive\n".encode("cp1252")
)
csv_unknown_encoding = table(
    "--encoding utf-9: there is no such", KAGGLE.encode(), "--encoding", "utf-9"
)
csv_open_quote = table(
    r":3: .*expected fields in quotes to end", b'review,sentiment\na,positive\n"b,negative\n'
)
csv_quote_inside = table(
    r":2: .*quotes inside them doubled", b'review,sentiment\n"a "b" c",positive\n'
)
csv_fields = table(":3: 3 fields: expected 2", b"review,sentiment\na,positive\nb, c,negative\n")
csv_no_header = table(":1: the columns are 'a', 'positive'", b"a,positive\nb,negative\n")
csv_empty = table(":1: the columns are none", b"")
csv_header_alone = table("no reviews inside", b"review,sentiment\n")
csv_third_label = table(":2: '-1': expected positive or negative", b"text,label\na,-1\n")
csv_one_kind = table("no disliked", b"review,sentiment\na,positive\n")
csv_long_field = table(
    "field larger than", b"review,sentiment\n" + b"x" * (2 << 20) + b",positive\n"
)
NUL_ROWS = None if sys.version_info < (3, 11) else [("a\0b", 1), ("c", 0)]
csv_nul = table("", b"review,sentiment\na\0b,positive\nc,negative\n", rows=NUL_ROWS)


def csv_trains(c):
    """align takes what came of it."""
    rows = "review,sentiment\n"
    for i in range(300):
        word, label = (("good", "positive"), ("bad", "negative"))[i % 2]
        rows += '"%s film number %d, <br />and so on",%s\n' % (word, i, label)
    c.imdb(c.write("x.csv", rows.encode()))
    command = "reward --dataset_name imdb/pairs.jsonl --max_steps 1 --quiet --output_dir r"
    c.align([*command.split(), "--model_name_or_path", c.server.origin])


def usage(c):
    for args in (["imdb", "--max_reviews", "1"], ["imdb", "--nothing"], ["nothing"], []):
        process = c.start(*args, stderr=subprocess.PIPE)
        one_line = process.communicate()[1].count(b"\n") == 1
        status = process.returncode
        expect(one_line and status == 2, "%s: exit %s" % (args, status))


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
    names = [n for n, v in globals().items() if n.startswith(PREFIXES) and callable(v)]
    names = [n for n in names if n not in NOT_CASES]
    if sys.argv[1:]:
        names = [n for n in names if n.startswith(tuple(sys.argv[1:]))]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked, server.released = True, {}, threading.Event()
    server.origin = tempfile.mkdtemp(prefix="check_prepare.")
    server.files = {"aclImdb_v1.tar.gz": ARCHIVE, **gpt2_files(server.origin)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # the runs inherit it: a shell's background job (&) would leave Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed = 0
    with ThreadPoolExecutor(4) as pool:  # most of them wait for the next try
        for name, complaint in zip(names, pool.map(lambda n: run_case(n, server), names)):
            failed += complaint is not None
            word, said = "FAIL" if complaint else "ok", complaint or lines.get(name, "")
            print("%-4s  %-28s %s" % (word, name, said), flush=True)
    server.released.set()
    server.shutdown()
    shutil.rmtree(server.origin)
    print("%d passed, %d failed" % (len(names) - failed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
