#!/usr/bin/env python3
"""prepare_imdb.py -- turns downloaded files into the ones align reads. Python 3.8 or later, nothing to install.

    python3 prepare_imdb.py imdb       the IMDB film reviews -> imdb/*.jsonl, then ./align rlhf --dataset_name imdb
    python3 prepare_imdb.py tokenizer  GPT-2's vocabulary    -> tokenizer.bin         (shipped, no need to run it)
    python3 prepare_imdb.py reviews    rated film sentences  -> docs/reviews.jsonl    (shipped, no need to run it)

A new source of reviews is one more generator like `reviews_of_archive`; a new command is one more function
`command_...` and its lines in `parse_arguments`. Exit 0: done; 1: it could not be done; 2: wrong usage.
"""
import argparse
import gzip
import json
import os
import random
import re
import shlex
import struct
import sys
import tarfile
import zlib

TOKENIZER = os.path.join(os.path.dirname(os.path.realpath(__file__)), "tokenizer.bin")
IMDB_PAGE = "https://ai.stanford.edu/~amaas/data/sentiment/"
IMDB_NAMES = ("aclImdb_v1.tar.gz", "aclImdb")  # as downloaded, as unpacked


# ---- Errors and writing ---------------------------------------------------------------------------------------------

class Failure(Exception):
    """It could not be done. The message is one line: where, what was found, what was expected, what to do."""


def check(condition, message, *values):
    if not condition:
        raise Failure(message % values)


def say(message):
    """Messages go to stderr. A file name out of an archive may hold anything, so nothing unprintable gets through."""
    print("".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)


def read_source(path, expected):
    check(os.path.isfile(path), "%s: there is no file of this name: expected %s: check --source", path, expected)
    with open(path, "rb") as f:
        return f.read()


def to_text(data, where):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Failure("%s: byte %d is not UTF-8: expected UTF-8 text: restore, convert or remove it" % (where, e.start))


def write_files(files):
    """Writes {path: iterable of bytes}, all or none: each is written whole under another name beside its place and
    only then renamed. Whoever stops the program half-way finds the old files or none, but never half a file."""
    temporary = {path: "%s.tmp%d" % (path, os.getpid()) for path in files}
    try:
        for path, chunks in files.items():
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            check(not os.path.isdir(path), "%s: is a folder: expected a file to write: choose another --output", path)
            with open(temporary[path], "wb") as f:
                f.writelines(chunks)
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            if os.path.exists(path):
                os.remove(path)


# JSON allows these three inside a line, but Python's splitlines() and some editors break the line there, so they are
# written as \u escapes. A reader gets the same text back.
LINE_BREAKERS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def json_lines(rows):
    for row in rows:
        yield (json.dumps(row, ensure_ascii=False).translate(LINE_BREAKERS) + "\n").encode("utf-8")


# ---- tokenizer.bin: writing -----------------------------------------------------------------------------------------
#
#   256 int32    [0] magic, [1] version, [2] vocabulary size, [3] id of the end token, the rest 0     (llm.c's layout)
#   each token   one byte with its length, then its bytes, in the order of the ids                    (llm.c's layout)
#   uint32       number of merges; for each, in order: uint16 left id, uint16 right id                (align's own)
#   three times  letters, numbers, spaces: uint32 count; for each range: uint32 first, uint32 last    (align's own)
#
# All little-endian. llm.c only decodes and stops after the tokens; encoding also needs the merges, and the character
# classes that say where a text may be split.

MAGIC, VERSION = 20240328, 2
VOCAB_SIZE, END_ID, MERGES, END_TOKEN = 50257, 50256, 50000, "<|endoftext|>"
CLASSES = ("letter", "number", "space")


def byte_alphabet():
    """GPT-2's files spell each byte as one printable character: the 188 printable Latin-1 bytes stand for themselves,
    the 68 others, in order, for U+0100 and up. So a space (byte 32) is U+0120. Returns {character: byte}."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printable]
    return dict([(chr(b), b) for b in printable] + [(chr(256 + i), b) for i, b in enumerate(others)])


def read_json(path):
    expected = "GPT-2's vocabulary files and unicode_classes.json in one folder"
    try:
        value = json.loads(to_text(read_source(path, expected), path))
    except ValueError as e:
        raise Failure("%s: is not JSON (%s): expected %s: restore the file" % (path, e, expected))
    check(isinstance(value, dict), "%s: is no JSON object: expected %s: restore the file", path, expected)
    return value


def token_bytes(encoder, path):
    """encoder.json's {spelling: id} -> list of bytes, by id."""
    alphabet, spelling_of = byte_alphabet(), {i: spelling for spelling, i in encoder.items() if type(i) is int}
    check(len(encoder) == VOCAB_SIZE and all(i in spelling_of for i in range(VOCAB_SIZE)) and
          spelling_of[END_ID] == END_TOKEN, "%s: %d tokens: expected GPT-2's, ids 0 to %d, each once, the last one %s: "
          "restore the file", path, len(encoder), END_ID, END_TOKEN)
    for i in range(END_ID):
        check(0 < len(spelling_of[i]) < 256 and all(c in alphabet for c in spelling_of[i]), "%s: token %d is %r: "
              "expected 1 to 255 characters that stand for bytes: restore the file", path, i, spelling_of[i])
    return [bytes(alphabet[c] for c in spelling_of[i]) for i in range(END_ID)] + [END_TOKEN.encode()]


def merge_pairs(encoder, path):
    """vocab.bpe's lines 'left right' -> [(left id, right id)]. Merge i must make token 256+i: the file then need not
    say what a merge makes, and 'learnt earlier' is the same as 'smaller id'."""
    pairs = []
    for number, line in enumerate(to_text(read_source(path, "GPT-2's vocab.bpe"), path).split("\n"), 1):
        if number == 1 and line.startswith("#version") or not line:
            continue
        halves = line.split(" ")
        check(len(halves) == 2 and all(h in encoder for h in halves), "%s:%d: %r: expected two tokens of encoder.json "
              "with a space between: restore both files", path, number, line)
        made, expected = encoder.get("".join(halves)), 256 + len(pairs)
        check(made == expected, "%s:%d: merge %d makes token %s: expected %d: encoder.json and vocab.bpe must both be "
              "GPT-2's: restore both files", path, number, len(pairs), made, expected)
        pairs.append((encoder[halves[0]], encoder[halves[1]]))
    check(len(pairs) == MERGES, "%s: %d merges: expected %d: restore the file", path, len(pairs), MERGES)
    return pairs


def class_ranges(classes, name, path):
    """One table of unicode_classes.json: [[first, last], ...] code points, both ends inside; returned sorted."""
    try:
        ranges = sorted((int(a), int(b)) for a, b in classes[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        ranges = []
    ends = [end for a, b in ranges for end in (a, b + 1)]
    check(ends and ends[0] >= 0 and ends[-1] <= 0x110000 and ends == sorted(ends) and all(a <= b for a, b in ranges),
          "%s: table %r: expected a list of [first, last] code points without overlap: restore the file", path, name)
    return ranges


def command_tokenizer(args):
    encoder_path, merges_path, classes_path = (
        os.path.join(args.source, name) for name in ("encoder.json", "vocab.bpe", "unicode_classes.json"))
    encoder = read_json(encoder_path)
    tokens, merges = token_bytes(encoder, encoder_path), merge_pairs(encoder, merges_path)
    classes = read_json(classes_path)
    chunks = [struct.pack("<256i", MAGIC, VERSION, VOCAB_SIZE, END_ID, *[0] * 252)]
    chunks += [bytes([len(token)]) + token for token in tokens]
    chunks += [struct.pack("<I", len(merges))] + [struct.pack("<HH", left, right) for left, right in merges]
    for name in CLASSES:
        ranges = class_ranges(classes, name, classes_path)
        chunks += [struct.pack("<I", len(ranges))] + [struct.pack("<II", first, last) for first, last in ranges]
    write_files({args.output: chunks})
    say("%s: %d tokens, %d merges, %d bytes" % (args.output, len(tokens), len(merges), sum(map(len, chunks))))


# ---- tokenizer.bin: reading, and byte pair encoding -----------------------------------------------------------------

class Tokenizer:
    """GPT-2's tokenizer in its plainest form; align.c has the fast one, with the same ids. Two steps: `pieces` cuts
    the text into words, numbers, signs and white space; `merge` joins the bytes of a piece, never across pieces."""

    def __init__(self, path):
        check(os.path.isfile(path), "%s: there is no such file: expected the tokenizer beside this script: restore it, "
              "or make it with 'python3 prepare_imdb.py tokenizer --source DIR'", path)
        with open(path, "rb") as f:
            data = f.read()
        try:
            self.parse(data)
        except (struct.error, LookupError, ValueError, re.error):
            raise Failure("%s: is cut short or another kind of file (%d bytes): expected align's tokenizer.bin with "
                          "merges and character classes: restore the file the project ships" % (path, len(data)))
        self.cache = {}

    def parse(self, data):
        magic, version, vocab_size, _ = struct.unpack_from("<4i", data)
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError("magic number or version")
        at, self.tokens = 1024, []
        for _ in range(vocab_size):
            self.tokens.append(data[at + 1:at + 1 + data[at]])
            at += 1 + data[at]
        self.id_of_byte = {self.tokens[i][0]: i for i in range(256)}  # ids 0..255: the bytes, in GPT-2's order
        count, = struct.unpack_from("<I", data, at)
        pairs = struct.unpack_from("<%dH" % (2 * count), data, at + 4)
        at += 4 + 4 * count
        self.merged = {pair: 256 + i for i, pair in enumerate(zip(pairs[::2], pairs[1::2]))}  # (left, right) -> id
        classes = []
        for _ in CLASSES:
            count, = struct.unpack_from("<I", data, at)
            ends = struct.unpack_from("<%dI" % (2 * count), data, at + 4)
            at += 4 + 8 * count
            classes.append("".join("\\U%08x-\\U%08x" % ends[i:i + 2] for i in range(0, 2 * count, 2)))
        # GPT-2's rule. Python's own re knows neither \p{L} nor \p{N}, so the classes are spelt out as ranges:
        #   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
        # \s+(?!\S) leaves the last space of a run to the word after it: "a   b" -> "a", "  ", " b".
        self.pieces = re.compile(
            "'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+".format(
                L=classes[0], N=classes[1], S=classes[2]))

    def merge(self, piece):
        """Starts from single bytes and joins, again and again, the pair that was learnt first (the smallest id),
        until no neighbours have a merge. By hand: ' the' -> ' ','t','h','e' -> ' t','h','e' -> ' t','he' -> ' the'."""
        ids = [self.id_of_byte[b] for b in piece.encode("utf-8")]
        while True:
            best = min((self.merged.get(pair, VOCAB_SIZE) for pair in zip(ids, ids[1:])), default=VOCAB_SIZE)
            if best == VOCAB_SIZE:
                return ids
            joined, i = [], 0
            while i < len(ids):
                hit = self.merged.get(tuple(ids[i:i + 2])) == best
                joined.append(best if hit else ids[i])
                i += 2 if hit else 1
            ids = joined

    def encode(self, text):
        ids = []
        for piece in self.pieces.findall(text):
            if piece not in self.cache:
                self.cache[piece] = self.merge(piece)
            ids += self.cache[piece]
        return ids

    def decode_bytes(self, ids):
        return b"".join(self.tokens[i] for i in ids)


# ---- The rated sentences: C.J. Hutto's VADER ground truth, each with the mean of up to 20 people's ratings ----------

def command_reviews(args):
    """Lines 'id <tab> mean rating <tab> text'. White space is tidied and nothing else: the carriage return at the end
    of a line goes, and every run of white space becomes one space. Such runs stand where a dash was taken out of the
    text ('all comics    even those'); one space keeps the model from learning the gap. Words, signs and the few
    '&amp;' stay as they are, and so do the two sentences that occur twice."""
    rows = []
    # Split at "\n" alone: Python's text mode would also break a line at a lone "\r", splitlines() at U+0085.
    for number, line in enumerate(read_source(args.source, "VADER's ratings of film sentences").split(b"\n"), 1):
        where = "%s:%d" % (args.source, number)
        if not line.strip():
            continue
        columns = to_text(line, where).split("\t")
        check(len(columns) == 3, "%s: %d columns: expected 3, separated by tabs (id, rating, text): give "
              "movieReviewSnippets_GroundTruth.txt to --source", where, len(columns))
        try:
            score = float(columns[1])
        except ValueError:
            score = float("nan")  # fails the comparison below
        check(-4 <= score <= 4, "%s: rating %r: expected a number from -4 to 4: correct the line", where, columns[1])
        text = " ".join(columns[2].split())
        check(text, "%s: no text: expected a sentence after the rating: correct the line", where)
        rows.append({"text": text, "score": score})
    check(rows, "%s: is empty: expected lines of id, rating and text: restore the file", args.source)
    write_files({args.output: json_lines(rows)})
    say("%s: %d rated sentences, %d of them liked" % (args.output, len(rows), sum(r["score"] > 0 for r in rows)))


# ---- IMDB: 25,000 reviews to train on and 25,000 to test with, a file each: {train,test}/{pos,neg}/<id>_<rating>.txt -
# A source is a generator of (split, group, file name, where it stands, bytes).

DOWNLOAD = "download aclImdb_v1.tar.gz (84,125,825 bytes) from " + IMDB_PAGE


def reviews_of_archive(path):
    """Reads the .tar.gz from front to back in memory. The names inside only tell what a file is; nothing is unpacked,
    so a name such as ../../x does no harm. 'unsup', the reviews without a label, matches no name and is passed over."""
    inside = re.compile(r"(?:^|/)(train|test)/(pos|neg)/([^/]+)$")
    try:
        # gzip.open, rather than tarfile's own unzipping, because it notices a missing end and a wrong checksum.
        with gzip.open(path, "rb") as unzipped:
            with tarfile.open(fileobj=unzipped, mode="r|") as archive:
                for member in archive:
                    found = inside.search(member.name)
                    if found and member.isfile():
                        yield found.groups() + (path + ":" + member.name, archive.extractfile(member).read())
            while unzipped.read(1 << 20):  # to the very end: the checksum comes last
                pass
    except EOFError:
        raise Failure("%s: ends in the middle, after %d bytes: expected a whole .tar.gz: %s again"
                      % (path, os.path.getsize(path), DOWNLOAD))
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, ValueError) as e:
        raise Failure("%s: is damaged or no .tar.gz archive (%s): expected aclImdb_v1.tar.gz or the folder unpacked "
                      "from it: %s" % (path, e, DOWNLOAD))


def reviews_of_folder(path):
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


def read_reviews(source):
    """{"train": [...], "test": [...]} of {"text", "label", "score"}, sorted by group and file name, so that the order
    does not depend on how an archive was packed or a disk lists its files. The text is byte for byte the file's, with
    '<br />' where the writer broke a line: the same texts as in Hugging Face's `imdb`."""
    reader = reviews_of_folder if os.path.isdir(source) else reviews_of_archive
    found = {"train": {}, "test": {}}
    for split, group, name, where, data in reader(source):
        if name.startswith("."):
            continue  # .DS_Store and the ._ files of macOS
        rating = re.match(r"[0-9]+_(10|[1-9])\.txt$", name)
        check(rating, "%s: no rating in the file name: expected <id>_<rating>.txt with a rating from 1 to 10: rename "
              "or remove the file", where)
        found[split][group, name] = {
            "text": to_text(data, where), "label": int(group == "pos"), "score": int(rating.group(1)) - 5.5}
    check(found["train"] or found["test"], "%s: no reviews inside: expected files named train/pos/<id>_<rating>.txt "
          "and so on: give aclImdb_v1.tar.gz or the folder aclImdb from %s", source, IMDB_PAGE)
    for group in ("pos", "neg"):
        check(any(key[0] == group for key in found["train"]), "%s: no reviews in train/%s: expected liked (pos) and "
              "disliked (neg) ones, to make pairs of: get the archive again from %s", source, group, IMDB_PAGE)
    return {split: [reviews[key] for key in sorted(reviews)] for split, reviews in found.items()}


def dice(seed, purpose):
    """A random stream for each purpose, so that a change to one output leaves the others as they were."""
    return random.Random("%d %s" % (seed, purpose))


def choose(reviews, most, rng):
    """In random order; with `most`, at most that many, as many liked as disliked ones."""
    rng.shuffle(reviews)
    if most is not None:
        liked, disliked = ([r for r in reviews if r["label"] == label] for label in (1, 0))
        reviews = liked[:(most + 1) // 2] + disliked[:most // 2]
        rng.shuffle(reviews)
    return reviews


def make_pairs(reviews, rng):
    """A liked review beside a disliked one, each in one pair at most. A text that was posted twice counts once."""
    liked = list(dict.fromkeys(r["text"] for r in reviews if r["label"]))
    disliked = list(dict.fromkeys(r["text"] for r in reviews if not r["label"]))
    rng.shuffle(liked)
    rng.shuffle(disliked)
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in zip(liked, disliked)]


PROMPT_MIN, PROMPT_END = 2, 8  # tokens; the end is excluded, as in the course's LengthSampler(2, 8): 2 to 7
PROMPT_CHARACTERS = 200        # far more than 7 tokens of a review, and encoding whole ones would take longer


def make_prompts(reviews, tokenizer, rng):
    """Beginnings of reviews, for the writer to go on from, cut where a token ends. A token may end inside a character
    of several bytes; such a beginning is no text and is left out, and so is one of white space alone."""
    prompts = []
    for review in reviews:
        length = rng.randrange(PROMPT_MIN, PROMPT_END)
        ids = tokenizer.encode(review["text"][:PROMPT_CHARACTERS])[:length]
        try:
            prompt = tokenizer.decode_bytes(ids).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if prompt.strip():
            prompts.append({"prompt": prompt})
    return prompts


def command_imdb(args):
    # What is quick to check comes first: reading the whole archive takes a while.
    source = args.source or next(filter(os.path.exists, IMDB_NAMES), None)
    check(source, "%s: no reviews found: expected %s or a folder %s: download the archive from %s into this folder, or "
          "pass it: 'prepare_imdb.py imdb --source PATH'", os.getcwd(), *IMDB_NAMES, IMDB_PAGE)
    check(os.path.exists(source), "%s: there is no such file or folder: expected aclImdb_v1.tar.gz or the folder "
          "aclImdb from %s: check the path given to --source", source, IMDB_PAGE)
    check(os.path.isdir(args.output) or not os.path.exists(args.output),
          "%s: is a file: expected a folder to write into: choose another --output", args.output)
    tokenizer = Tokenizer(TOKENIZER)
    say("reading %s ..." % source)
    reviews = read_reviews(source)
    train = choose(reviews["train"], args.max_reviews, dice(args.seed, "train"))
    test = choose(reviews["test"], args.max_reviews, dice(args.seed, "test"))
    files = {"train.jsonl": train, "test.jsonl": test, "pairs.jsonl": make_pairs(train, dice(args.seed, "pairs")),
             "prompts.jsonl": make_prompts(train, tokenizer, dice(args.seed, "prompts"))}
    write_files({os.path.join(args.output, name): json_lines(rows) for name, rows in files.items()})
    for name, rows in files.items():
        liked = " (%d liked)" % sum(r["label"] for r in rows) if rows and "label" in rows[0] else ""
        say("%s: %d lines%s" % (os.path.join(args.output, name), len(rows), liked))
    if not test:
        say("note: %s holds no test reviews; the archive from %s has 25,000" % (source, IMDB_PAGE))
    say("next: ./align rlhf --dataset_name %s" % shlex.quote(args.output))


# ---- The command line -----------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        say("%s: %s: see '%s --help'" % (self.prog, message, self.prog))
        sys.exit(2)


def parse_arguments(argv):
    parser = Parser(prog="prepare_imdb.py", description="Turns downloaded files into the ones align reads.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, run, description):
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(run=run)
        return sub

    p = imdb = command("imdb", command_imdb, "the IMDB film reviews -> {train,test,pairs,prompts}.jsonl")
    p.add_argument("--source", metavar="PATH", help="aclImdb_v1.tar.gz from %s or the folder unpacked from it "
                   "(default: the one in the current folder)" % IMDB_PAGE)
    p.add_argument("--output", metavar="DIR", default="imdb", help="folder to write into (default: imdb)")
    p.add_argument("--seed", metavar="N", type=int, default=42, help="decides order, pairs and prompts (default: 42)")
    p.add_argument("--max_reviews", metavar="N", type=int,
                   help="at most N training and N test reviews, half of them liked (default: all)")
    p = command("tokenizer", command_tokenizer, "GPT-2's vocabulary -> tokenizer.bin")
    p.add_argument("--source", metavar="DIR", required=True,
                   help="folder of encoder.json, vocab.bpe and unicode_classes.json")
    p.add_argument("--output", metavar="FILE", default="tokenizer.bin", help="file to write (default: tokenizer.bin)")
    p = command("reviews", command_reviews, "rated film sentences -> docs/reviews.jsonl")
    p.add_argument("--source", metavar="FILE", required=True, help="movieReviewSnippets_GroundTruth.txt of VADER")
    p.add_argument("--output", metavar="FILE", default="docs/reviews.jsonl",
                   help="file to write (default: docs/reviews.jsonl)")
    args = parser.parse_args(argv)
    if args.command == "imdb" and args.max_reviews is not None and args.max_reviews < 2:
        imdb.error("--max_reviews %d: expected 2 or more, a liked and a disliked review" % args.max_reviews)
    return args


def main():
    args = parse_arguments(sys.argv[1:])
    try:
        args.run(args)
        return 0
    except Failure as e:
        say("prepare_imdb.py: %s" % e)
    except OSError as e:  # no rights, disk full, a file where a folder should be, ...
        say("prepare_imdb.py: %s: %s: expected to read or write here: check the path, the rights and the free space"
            % (e.filename or "reading or writing", e.strerror or e))
    except KeyboardInterrupt:
        say("prepare_imdb.py: stopped; nothing was written")
    return 1


if __name__ == "__main__":
    sys.exit(main())
