#!/usr/bin/env python3
"""prepare_imdb.py -- gets the files that align reads. Python 3.8 or later, nothing to install.

    python3 prepare_imdb.py imdb       the IMDB film reviews -> imdb/*.jsonl
                                       then ./align rlhf --dataset_name imdb
    python3 prepare_imdb.py gpt2       GPT-2's weights       -> gpt2/
                                       then ./align sft --model_name_or_path gpt2 ...
    python3 prepare_imdb.py tokenizer  GPT-2's vocabulary    -> tokenizer.bin
    python3 prepare_imdb.py reviews    rated film sentences  -> docs/reviews.jsonl

The last two are shipped: no need to run it. `imdb` takes an archive, a folder, a CSV or an address
(--source). Without one it looks for the archive and the folder here, and else downloads the
archive, 84 MB. An interrupted download goes on where it stopped. A new source of reviews is one
more generator like `reviews_of_csv`. Exit 0: done; 1: it could not be done; 2: wrong usage.
"""

import argparse
import csv
import gzip
import hashlib
import http.client
import io
import json
import os
import random
import re
import shlex
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib

IMDB_PAGE = "https://ai.stanford.edu/~amaas/data/sentiment/"
IMDB_NAMES = ("aclImdb_v1.tar.gz", "aclImdb")  # as downloaded, as unpacked
IMDB_MD5 = "7c2ac02c03563afcf9b574c7e56c153a"  # as torchtext and others give it
# GPT-2, 124 million weights: one revision of the page, and the SHA-256 of its files. The weights
# come last: a folder that has them has the rest.
GPT2_URL = (
    "https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e"
)
GPT2_SHA256 = {
    "config.json": "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4",
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "tokenizer.json": "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6",
    "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
}


# ---- Errors and writing --------------------------------------------------------------------------


class Failure(Exception):
    """It could not be done.

    The message is one line: where, what was found, what was expected, what to do.
    """


def check(condition, message):
    if not condition:
        raise Failure(message)


def say(message):
    """Messages go to stderr.

    A file name out of an archive may hold anything, so nothing unprintable gets through.
    """
    print("".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)


def read_source(path, expected):
    found = os.path.isfile(path)
    check(found, f"{path}: there is no file of this name: expected {expected}: check --source")
    with open(path, "rb") as f:
        return f.read()


def to_text(data, where):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        found = f"{where}: byte {e.start} is not UTF-8"
        raise Failure(f"{found}: expected UTF-8 text: restore, convert or remove it")


def write_files(files):
    """Writes {path: iterable of bytes}, all or none.

    Each is written whole under another name beside its place and only then renamed. Whoever stops
    the program half-way finds the old files or none, but never half a file.
    """
    temporary = {path: "%s.tmp%d" % (path, os.getpid()) for path in files}
    try:
        for path, chunks in files.items():
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            check(
                not os.path.isdir(path),
                f"{path}: is a folder: expected a file to write: choose another --output",
            )
            with open(temporary[path], "wb") as f:
                f.writelines(chunks)
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            if os.path.exists(path):
                os.remove(path)


# JSON allows these three inside a line, but Python's splitlines() and some editors break the line
# there, so they are written as \u escapes. A reader gets the same text back.
LINE_BREAKERS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def json_lines(rows):
    for row in rows:
        yield (json.dumps(row, ensure_ascii=False).translate(LINE_BREAKERS) + "\n").encode("utf-8")


# ---- Downloading ---------------------------------------------------------------------------------

ATTEMPTS, TIMEOUT, CHUNK = 5, 30, 1 << 16  # in a row without a new byte; seconds of silence; bytes


class Interrupted(Exception):
    """The connection failed in a way that may pass. `connected`: the server had answered."""

    def __init__(self, why, connected=True):
        super().__init__(str(getattr(why, "reason", None) or why) or type(why).__name__)
        self.connected = connected


class Progress:
    """How far a download is.

    On a terminal one line that is written over, elsewhere a line each tenth.
    """

    def __init__(self, name, have, total):
        self.name, self.first, self.total = name, have, total
        self.begin = self.shown = time.time()
        self.tenth = self.tenth_of(have)

    def tenth_of(self, have):
        return 10 * have // self.total if self.total else have // 10000000

    def show(self, have, end=False):
        now = time.time()
        speed = (have - self.first) / max(now - self.begin, 1e-3)
        of = " of %.1f" % (self.total / 1e6) if self.total else ""
        line = "%s: %.1f%s MB" % (self.name, have / 1e6, of)
        if sys.stderr.isatty() and (end or now - self.shown > 0.1):
            line += ", %.1f MB/s" % (speed / 1e6)
            if self.total and speed and not end:
                line += ", %.0f s left" % ((self.total - have) / speed)
            sys.stderr.write("\r%s\033[K%s" % (line, "\n" if end else ""))
            sys.stderr.flush()
            self.shown = now
        elif not sys.stderr.isatty() and self.tenth_of(have) > self.tenth:
            self.tenth = self.tenth_of(have)
            say(line)


def fetch(url, part):
    """Appends to the file `part` what it lacks of `url`.

    A server that does not know Range sends all, and the file begins anew. Raises Interrupted where
    another try may help.
    """
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "prepare_imdb.py", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = "bytes=%d-" % have
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        # nothing lies behind what is here: it is whole, or of another file
        if e.code == 416 and have:
            if e.headers.get("Content-Range") != "bytes */%d" % have:
                os.remove(part)
                raise Interrupted("the file there is another than the one begun")
            return
        if e.code in (408, 429) or e.code >= 500:
            raise Interrupted("HTTP %d %s" % (e.code, e.msg))
        raise Failure("%s: HTTP %d %s: expected the file: check the address" % (url, e.code, e.msg))
    except (OSError, http.client.HTTPException) as e:
        raise Interrupted(e, connected=False)
    with response:
        there = response.geturl()
        check(
            there.startswith("https:") or not url.startswith("https:"),
            f"{url}: leads to {there}: expected https to the end: do not trust it",
        )
        begins = response.headers.get("Content-Range", "").startswith("bytes %d-" % have)
        goes_on = response.status == 206 and begins
        have = have if goes_on else 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        progress = Progress(os.path.basename(part)[: -len(".part")], have, total)
        with open(part, "ab" if goes_on else "wb") as f:
            while True:
                try:
                    chunk = response.read(CHUNK)
                except (OSError, http.client.HTTPException) as e:
                    raise Interrupted(e)
                if not chunk:
                    break
                f.write(chunk)
                have += len(chunk)
                progress.show(have)
        if total is not None and have != total:
            raise Interrupted("the answer ended after %d of %d bytes" % (have, total))
        progress.show(have, end=True)


def verify(path, algorithm, expected, advice):
    digest = hashlib.new(algorithm)
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(1 << 20), b""):
            digest.update(chunk)
    found = digest.hexdigest()
    check(
        not expected or found == expected.lower(),
        f"{path}: its {algorithm} is {found}: expected {expected}: {advice}",
    )
    return found


def download(url, path, algorithm="sha256", expected=None, look=None):
    """Fetches url to path.part, which the next run goes on from, and renames it.

    Before that it checks the sum and what `look` does.
    """
    part, failures = path + ".part", 0
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    while True:
        before = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            fetch(url, part)
            break
        except Interrupted as e:
            grown = os.path.exists(part) and os.path.getsize(part) > before
            failures = 1 if grown else failures + 1
            hopeless = not e.connected and failures == 1 and not before
            problem = "the connection failed" if e.connected else "no connection"
            check(
                failures < ATTEMPTS and not hopeless,
                f"{url}: {problem} ({e}): expected the file: check the network and run this again"
                " (it goes on where it stopped), or download the file elsewhere and copy it to"
                f" {path}",
            )
            say("%s: %s; trying again" % (url, e))
            time.sleep(min(0.25 * 2**failures, 8))
    advice = "damaged on the way, or another file: run this again"
    try:
        found = verify(part, algorithm, expected, advice)
        if look:
            look(part)
    except Failure:
        os.remove(part)
        raise
    os.replace(part, path)
    known = ", as expected" if expected else ""
    say("%s: %d bytes, %s %s%s" % (path, os.path.getsize(path), algorithm, found, known))


def look_at_gpt2(part):
    """Says no to what has the right address but is not the file.

    Such as a page of a network that asks to log in.
    """
    name, size = os.path.basename(part)[: -len(".part")], os.path.getsize(part)
    try:
        with open(part, "rb") as f:
            if name == "merges.txt":
                whole = f.read(8) == b"#version"
            elif name == "model.safetensors":
                # 8 bytes: the header's length; the header, JSON; the tensors
                header = f.read(min(struct.unpack("<Q", f.read(8))[0], 100 << 20))
                tensors = json.loads(header.decode())
                tensors.pop("__metadata__", None)
                end = max(t["data_offsets"][1] for t in tensors.values())
                whole = 8 + len(header) + end == size
            else:
                whole = isinstance(json.load(f), dict)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError):
        whole = False
    found = f"{part}: {size} bytes that are no {name}"
    check(whole, f"{found}: expected GPT-2's: check --base_url and run this again")


def command_gpt2(args):
    for name, sha256 in GPT2_SHA256.items():
        path = os.path.join(args.output, name)
        if os.path.exists(path):
            say("%s: is there already" % path)
            continue
        known = sha256 if args.base_url == GPT2_URL else None
        download(args.base_url.rstrip("/") + "/" + name, path, "sha256", known, look_at_gpt2)
    folder = shlex.quote(args.output)
    say("next: ./align generate --model_name_or_path %s --prompt 'The film is'" % folder)


# ---- tokenizer.bin: writing ----------------------------------------------------------------------
#
#   256 int32    [0] magic, [1] version, [2] vocabulary size, [3] id of the end token, the rest 0
#   each token   one byte with its length, then its bytes, in the order of the ids
#   uint32       number of merges; for each, in order: uint16 left id, uint16 right id
#   three times  letters, numbers, spaces: uint32 count; for each range: uint32 first, uint32 last
#
# The first two are llm.c's layout, the others align's own. All little-endian. llm.c only decodes
# and stops after the tokens; encoding also needs the merges, and the character classes that say
# where a text may be split.

MAGIC, VERSION = 20240328, 2
VOCAB_SIZE, END_ID, MERGES, END_TOKEN = 50257, 50256, 50000, "<|endoftext|>"
CLASSES = ("letter", "number", "space")


def byte_alphabet():
    """{character: byte}: GPT-2's files spell each byte as one printable character.

    The 188 printable Latin-1 bytes stand for themselves, the 68 others, in order, for U+0100 and
    up. So a space (byte 32) is U+0120.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    alphabet.update((chr(256 + i), b) for i, b in enumerate(others))
    return alphabet


def read_json(path):
    expected = "GPT-2's vocabulary files and unicode_classes.json in one folder"
    try:
        value = json.loads(to_text(read_source(path, expected), path))
    except ValueError as e:
        raise Failure("%s: is not JSON (%s): expected %s: restore the file" % (path, e, expected))
    check(
        isinstance(value, dict),
        f"{path}: is no JSON object: expected {expected}: restore the file",
    )
    return value


def token_bytes(encoder, path):
    """encoder.json's {spelling: id} -> list of bytes, by id."""
    alphabet = byte_alphabet()
    spelling_of = {i: spelling for spelling, i in encoder.items() if type(i) is int}
    once = len(encoder) == VOCAB_SIZE and all(i in spelling_of for i in range(VOCAB_SIZE))
    check(
        once and spelling_of[END_ID] == END_TOKEN,
        f"{path}: {len(encoder)} tokens: expected GPT-2's, ids 0 to {END_ID}, each once,"
        f" the last one {END_TOKEN}: restore the file",
    )
    tokens = []
    for i in range(END_ID):
        spelling = spelling_of[i]
        check(
            0 < len(spelling) < 256 and all(c in alphabet for c in spelling),
            f"{path}: token {i} is {spelling!r}:"
            " expected 1 to 255 characters that stand for bytes: restore the file",
        )
        tokens.append(bytes(alphabet[c] for c in spelling))
    return tokens + [END_TOKEN.encode()]


def merge_pairs(encoder, path):
    """vocab.bpe's lines 'left right' -> [(left id, right id)].

    Merge i must make token 256+i: the file then need not say what a merge makes, and 'learnt
    earlier' is the same as 'smaller id'.
    """
    pairs = []
    lines = to_text(read_source(path, "GPT-2's vocab.bpe"), path).split("\n")
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith("#version") or not line:
            continue
        halves = line.split(" ")
        check(
            len(halves) == 2 and all(h in encoder for h in halves),
            f"{path}:{number}: {line!r}: expected two tokens of encoder.json"
            " with a space between: restore both files",
        )
        made, expected = encoder.get("".join(halves)), 256 + len(pairs)
        check(
            made == expected,
            f"{path}:{number}: merge {len(pairs)} makes token {made}: expected {expected}:"
            " encoder.json and vocab.bpe must both be GPT-2's: restore both files",
        )
        pairs.append((encoder[halves[0]], encoder[halves[1]]))
    found = len(pairs)
    check(found == MERGES, f"{path}: {found} merges: expected {MERGES}: restore the file")
    return pairs


def class_ranges(classes, name, path):
    """One table of unicode_classes.json: [[first, last], ...], sorted.

    These are code points, both ends inside.
    """
    try:
        ranges = sorted((int(a), int(b)) for a, b in classes[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        ranges = []
    ends = [end for a, b in ranges for end in (a, b + 1)]
    apart = ends == sorted(ends) and all(a <= b for a, b in ranges)
    check(
        ends and ends[0] >= 0 and ends[-1] <= 0x110000 and apart,
        f"{path}: table {name!r}: expected a list of [first, last] code points without overlap:"
        " restore the file",
    )
    return ranges


def command_tokenizer(args):
    names = ("encoder.json", "vocab.bpe", "unicode_classes.json")
    encoder_path, merges_path, classes_path = (os.path.join(args.source, name) for name in names)
    encoder = read_json(encoder_path)
    tokens, merges = token_bytes(encoder, encoder_path), merge_pairs(encoder, merges_path)
    classes = read_json(classes_path)
    chunks = [struct.pack("<256i", MAGIC, VERSION, VOCAB_SIZE, END_ID, *[0] * 252)]
    chunks += [bytes([len(token)]) + token for token in tokens]
    chunks.append(struct.pack("<I", len(merges)))
    chunks += [struct.pack("<HH", left, right) for left, right in merges]
    for name in CLASSES:
        ranges = class_ranges(classes, name, classes_path)
        chunks.append(struct.pack("<I", len(ranges)))
        chunks += [struct.pack("<II", first, last) for first, last in ranges]
    write_files({args.output: chunks})
    size = sum(map(len, chunks))
    say("%s: %d tokens, %d merges, %d bytes" % (args.output, len(tokens), len(merges), size))


# ---- The rated sentences -------------------------------------------------------------------------
#
# C.J. Hutto's VADER ground truth, each with the mean of up to 20 people's ratings, -4 to 4.


def command_reviews(args):
    """Lines 'id <tab> mean rating <tab> text'.

    White space is tidied and nothing else: the carriage return at the end of a line goes, and every
    run of white space becomes one space. Such runs stand where a dash was taken out of the text
    ('all comics even those'); one space keeps the model from learning the gap. Words, signs and the
    few '&amp;' stay as they are, and so do the two sentences that occur twice.
    """
    rows = []
    # Split at "\n" alone: Python's text mode would also break a line at a lone "\r", splitlines()
    # at U+0085.
    lines = read_source(args.source, "VADER's ratings of film sentences").split(b"\n")
    for number, line in enumerate(lines, 1):
        where = "%s:%d" % (args.source, number)
        if not line.strip():
            continue
        columns = to_text(line, where).split("\t")
        check(
            len(columns) == 3,
            f"{where}: {len(columns)} columns: expected 3, separated by tabs (id, rating, text):"
            " give movieReviewSnippets_GroundTruth.txt to --source",
        )
        rating = columns[1]
        try:
            score = float(rating)
        except ValueError:
            score = float("nan")  # fails the comparison below
        check(
            -4 <= score <= 4,
            f"{where}: rating {rating!r}: expected a number from -4 to 4: correct the line",
        )
        text = " ".join(columns[2].split())
        check(text, f"{where}: no text: expected a sentence after the rating: correct the line")
        rows.append({"text": text, "score": score})
    expected = "expected lines of id, rating and text"
    check(rows, f"{args.source}: is empty: {expected}: restore the file")
    write_files({args.output: json_lines(rows)})
    liked = sum(r["score"] > 0 for r in rows)
    say("%s: %d rated sentences, %d of them liked" % (args.output, len(rows), liked))


# ---- IMDB ----------------------------------------------------------------------------------------
#
# 25,000 reviews to train on and 25,000 to test with, a file each:
# {train,test}/{pos,neg}/<id>_<rating>.txt
# A source is a generator of (split, its place in the order, {"text", "label", "score"}).

DOWNLOAD = "download aclImdb_v1.tar.gz (84,125,825 bytes) from " + IMDB_PAGE
# bytes: 70, 1.5 and 3 times what the real archive has
REVIEW_MAX, MEMBER_MAX, ALL_MAX = 1 << 20, 1 << 26, 1 << 30


class Limited:
    """A file to read that refuses to grow beyond all measure.

    A few kilobytes of gzip can hold gigabytes.
    """

    def __init__(self, file, path):
        self.file, self.path, self.total = file, path, 0

    def read(self, size):
        data = self.file.read(size)
        self.total += len(data)
        found = f"{self.path}: unpacks to more than {ALL_MAX} bytes"
        check(self.total <= ALL_MAX, f"{found}: expected the reviews: {DOWNLOAD}")
        return data


def review_in(member, path, inside):
    """(split, group, name, where) of a member of an archive, or None: it is no review."""
    found, where = inside.search(member.name), path + ":" + member.name
    within = ".." not in member.name.split("/") and not member.name.startswith("/")
    check(within, f"{where}: a name that leaves its folder: expected the reviews: {DOWNLOAD}")
    check(
        member.size <= (REVIEW_MAX if found else MEMBER_MAX),
        f"{where}: {member.size} bytes: expected a review: {DOWNLOAD}",
    )
    if not found:
        return None
    check(member.isfile(), f"{where}: is a link or a folder: expected a file: {DOWNLOAD}")
    return found.groups() + (where,)


def files_of_archive(path):
    """Reads the .tar.gz from front to back in memory.

    The names inside only tell what a file is; nothing is unpacked. 'unsup', the reviews without a
    label, matches no name and is passed over.
    """
    inside = re.compile(r"(?:^|/)(train|test)/(pos|neg)/([^/]+)$")
    try:
        # gzip.open, rather than tarfile's own unzipping, because it notices a missing end and a
        # wrong checksum.
        with gzip.open(path, "rb") as unzipped:
            limited = Limited(unzipped, path)
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in archive:
                    place = review_in(member, path, inside)
                    if place:
                        yield place + (archive.extractfile(member).read(),)
            while limited.read(1 << 20):  # to the very end: the checksum comes last
                pass
    except EOFError:
        found = f"{path}: ends in the middle, after {os.path.getsize(path)} bytes"
        raise Failure(f"{found}: expected a whole .tar.gz: {DOWNLOAD} again")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, ValueError) as e:
        raise Failure(
            f"{path}: is damaged or no .tar.gz archive ({e}): expected aclImdb_v1.tar.gz,"
            f" the folder unpacked from it or a .csv (a .zip: unzip it first): {DOWNLOAD}"
        )


def files_of_folder(path):
    if not any(os.path.isdir(os.path.join(path, split)) for split in ("train", "test")):
        path = os.path.join(path, "aclImdb")  # the folder above it was given
    for split in ("train", "test"):
        for group in ("pos", "neg"):
            folder = os.path.join(path, split, group)
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                where = os.path.join(folder, name)
                if os.path.isfile(where):
                    with open(where, "rb") as f:
                        yield split, group, name, where, f.read()


def reviews_of_files(files):
    """Sorted by group and file name: the order must not depend on an archive's or a disk's.

    The text is byte for byte the file's, with '<br />' where the writer broke a line: the same
    texts as in Hugging Face's `imdb`.
    """
    for split, group, name, where, data in files:
        if name.startswith("."):
            continue  # .DS_Store and the ._ files of macOS
        rating = re.match(r"[0-9]+_(10|[1-9])\.txt$", name)
        check(
            rating,
            f"{where}: no rating in the file name: expected <id>_<rating>.txt with a rating"
            " from 1 to 10: rename or remove the file",
        )
        review = {"text": to_text(data, where), "label": int(group == "pos")}
        review["score"] = int(rating.group(1)) - 5.5
        yield split, (group, name), review


LABELS = dict.fromkeys(("positive", "pos", "1", "true"), 1)
LABELS.update(dict.fromkeys(("negative", "neg", "0", "false"), 0))


def reviews_of_csv(path, encoding):
    """A table with a header: a column review or text, a column sentiment or label.

    So Kaggle's 'IMDB Dataset.csv' has it. It has no ratings: the score is 1 or -1. Fields are
    separated by what the header has most of: , ; | or a tab.
    """
    data = read_source(path, "a .csv of reviews")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    try:
        text = data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except UnicodeDecodeError as e:
        found = "%s:%d: is not %s" % (path, data.count(b"\n", 0, e.start) + 1, encoding)
        raise Failure(f"{found}: expected text: give its --encoding, such as cp1252")
    except LookupError:
        found = f"--encoding {encoding}: there is no such encoding"
        raise Failure(f"{found}: expected utf-8, cp1252, latin-1 ...")
    csv.field_size_limit(REVIEW_MAX)
    separator = max(",;\t|", key=text.split("\n", 1)[0].count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = [name.strip().lower() for name in next(table, [])]
        texts = next((i for i, name in enumerate(names) if name in ("review", "text")), None)
        labels = next((i for i, name in enumerate(names) if name in ("sentiment", "label")), None)
        columns = ", ".join(map(repr, names)) or "none"
        check(
            texts is not None and labels is not None,
            f"{path}:1: the columns are {columns}: expected a header with review and"
            " sentiment (or text and label): add it",
        )
        for number, row in enumerate(table):
            where = "%s:%d" % (path, table.line_num)
            if not any(field.strip() for field in row):
                continue
            check(
                len(row) == len(names),
                f"{where}: {len(row)} fields: expected {len(names)}, as in the header:"
                " put a field with a separator inside in quotes",
            )
            label = LABELS.get(row[labels].strip().lower())
            check(
                label is not None,
                f"{where}: {row[labels]!r}: expected positive or negative: correct the line",
            )
            if row[texts].strip():
                yield "train", number, {"text": row[texts], "label": label, "score": 2 * label - 1}
    except csv.Error as e:
        raise Failure(
            f"{path}:{table.line_num}: {e}: expected fields in quotes to end,"
            " and quotes inside them doubled: correct it"
        )


def read_reviews(source, encoding):
    """{"train": [...], "test": [...]} of {"text", "label", "score"}.

    In an order that is always the same.
    """
    if source.lower().endswith((".csv", ".tsv")):
        rows = reviews_of_csv(source, encoding)
    elif os.path.isdir(source):
        rows = reviews_of_files(files_of_folder(source))
    else:
        rows = reviews_of_files(files_of_archive(source))
    found = {"train": {}, "test": {}}
    for split, key, review in rows:
        found[split][key] = review
    check(
        found["train"] or found["test"],
        f"{source}: no reviews inside: expected files named train/pos/<id>_<rating>.txt"
        f" and so on, or rows of a .csv: {DOWNLOAD}",
    )
    for label, word in ((1, "liked (pos)"), (0, "disliked (neg)")):
        check(
            any(review["label"] == label for review in found["train"].values()),
            f"{source}: no {word} reviews to train on:"
            f" expected both kinds, to make pairs of: {DOWNLOAD}",
        )
    return {split: [reviews[key] for key in sorted(reviews)] for split, reviews in found.items()}


def dice(seed, purpose):
    """A random stream for each purpose: a change to one output leaves the others as they were."""
    return random.Random("%d %s" % (seed, purpose))


def choose(reviews, most, rng):
    """In random order; with `most`, at most that many, as many liked as disliked ones."""
    rng.shuffle(reviews)
    if most is not None:
        liked, disliked = ([r for r in reviews if r["label"] == label] for label in (1, 0))
        reviews = liked[: (most + 1) // 2] + disliked[: most // 2]
        rng.shuffle(reviews)
    return reviews


def make_pairs(reviews, rng):
    """A liked review beside a disliked one, each in one pair at most.

    A text that was posted twice counts once.
    """
    liked = list(dict.fromkeys(r["text"] for r in reviews if r["label"]))
    disliked = list(dict.fromkeys(r["text"] for r in reviews if not r["label"]))
    rng.shuffle(liked)
    rng.shuffle(disliked)
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(liked, disliked)]


# Words, numbers, signs and white space, as GPT-2's tokenizer cuts a text first: a token never
# crosses such a cut.
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def make_prompts(reviews, rng):
    """Beginnings of reviews, for the writer to go on from.

    Of 2 to 7 pieces, as the course's LengthSampler(2, 8) draws.
    """
    prompts = []
    for review in reviews:
        pieces = PIECES.findall(review["text"][:400])
        beginning = "".join(pieces[: rng.randrange(2, 8)])
        if beginning.strip():
            prompts.append({"prompt": beginning})
    return prompts


def find_reviews(args):
    """The path of the reviews, after a download where --source is an address or nothing is here."""
    address = IMDB_PAGE + IMDB_NAMES[0]
    source = args.source or next(filter(os.path.exists, IMDB_NAMES), address)
    known = ("sha256", args.sha256)
    if source == address and not args.sha256:
        known = ("md5", IMDB_MD5)
    if re.match("https?://", source):
        path = os.path.basename(urllib.parse.urlsplit(source).path)
        check(
            path.strip("."),
            f"{source}: names no file: expected an address that ends in one: check --source",
        )
        if not os.path.exists(path):
            say("downloading %s to %s" % (source, path))
            download(source, path, *known)
            return path
        source = path
    check(
        os.path.exists(source),
        f"{source}: there is no such file or folder: expected aclImdb_v1.tar.gz or the folder"
        f" aclImdb from {IMDB_PAGE}, or a .csv: check the path given to --source",
    )
    if known[1] and os.path.isfile(source):
        verify(source, *known, "%s or check the sum" % DOWNLOAD)
    return source


def command_imdb(args):
    # What is quick to check comes first: reading the whole archive takes a while.
    check(
        os.path.isdir(args.output) or not os.path.exists(args.output),
        f"{args.output}: is a file: expected a folder to write into: choose another --output",
    )
    source = find_reviews(args)
    say("reading %s ..." % source)
    reviews = read_reviews(source, args.encoding)
    train = choose(reviews["train"], args.max_reviews, dice(args.seed, "train"))
    test = choose(reviews["test"], args.max_reviews, dice(args.seed, "test"))
    files = {
        "train.jsonl": train,
        "test.jsonl": test,
        "pairs.jsonl": make_pairs(train, dice(args.seed, "pairs")),
        "prompts.jsonl": make_prompts(train, dice(args.seed, "prompts")),
    }
    write_files({os.path.join(args.output, name): json_lines(rows) for name, rows in files.items()})
    for name, rows in files.items():
        liked = " (%d liked)" % sum(r["label"] for r in rows) if rows and "label" in rows[0] else ""
        say("%s: %d lines%s" % (os.path.join(args.output, name), len(rows), liked))
    if not test:
        say("note: %s holds no test reviews; the archive from %s has 25,000" % (source, IMDB_PAGE))
    say("next: ./align rlhf --dataset_name %s" % shlex.quote(args.output))


# ---- The command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        say("%s: %s: see '%s --help'" % (self.prog, message, self.prog))
        sys.exit(2)


def parse_arguments(argv):
    parser = Parser(prog="prepare_imdb.py", description="Gets the files that align reads.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, run, description):
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(run=run)
        return sub

    what = "the IMDB film reviews -> {train,test,pairs,prompts}.jsonl"
    p = imdb = command("imdb", command_imdb, what)
    p.add_argument(
        "--source",
        metavar="PATH",
        help="aclImdb_v1.tar.gz, the folder unpacked from it, a .csv with review and sentiment,"
        f" or an address (default: what is in this folder, else from {IMDB_PAGE})",
    )
    p.add_argument(
        "--sha256",
        metavar="HEX",
        help="what the file's SHA-256 must be (default: the real archive's md5)",
    )
    p.add_argument("--encoding", metavar="NAME", default="utf-8", help="of a .csv (default: utf-8)")
    p.add_argument(
        "--output", metavar="DIR", default="imdb", help="folder to write into (default: imdb)"
    )
    p.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=42,
        help="decides order, pairs and prompts (default: 42)",
    )
    p.add_argument(
        "--max_reviews",
        metavar="N",
        type=int,
        help="at most N training and N test reviews, half of them liked (default: all)",
    )
    what = "downloads GPT-2's weights, 548 MB -> a folder for --model_name_or_path"
    p = command("gpt2", command_gpt2, what)
    p.add_argument(
        "--output", metavar="DIR", default="gpt2", help="folder to write into (default: gpt2)"
    )
    p.add_argument(
        "--base_url",
        metavar="URL",
        default=GPT2_URL,
        help="where the files are (default: %s)" % GPT2_URL,
    )
    p = command("tokenizer", command_tokenizer, "GPT-2's vocabulary -> tokenizer.bin")
    p.add_argument(
        "--source",
        metavar="DIR",
        required=True,
        help="folder of encoder.json, vocab.bpe and unicode_classes.json",
    )
    p.add_argument(
        "--output",
        metavar="FILE",
        default="tokenizer.bin",
        help="file to write (default: tokenizer.bin)",
    )
    p = command("reviews", command_reviews, "rated film sentences -> docs/reviews.jsonl")
    p.add_argument(
        "--source",
        metavar="FILE",
        required=True,
        help="movieReviewSnippets_GroundTruth.txt of VADER",
    )
    p.add_argument(
        "--output",
        metavar="FILE",
        default="docs/reviews.jsonl",
        help="file to write (default: docs/reviews.jsonl)",
    )
    args = parser.parse_args(argv)
    if args.command == "imdb" and args.max_reviews is not None and args.max_reviews < 2:
        found = f"--max_reviews {args.max_reviews}"
        imdb.error(f"{found}: expected 2 or more, a liked and a disliked review")
    return args


def main():
    args = parse_arguments(sys.argv[1:])
    try:
        args.run(args)
        return 0
    except Failure as e:
        say("prepare_imdb.py: %s" % e)
    except OSError as e:  # no rights, disk full, a file where a folder should be, ...
        where, found = e.filename or "reading or writing", e.strerror or e
        say(
            f"prepare_imdb.py: {where}: {found}: expected to read or write here:"
            " check the path, the rights and the free space"
        )
    except KeyboardInterrupt:
        say(
            "prepare_imdb.py: stopped; nothing was written but, of a download, what came;"
            " run it again to go on"
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
