/* fuzz.c -- every reader of align.c, given broken files.
 *
 * A reader takes what somebody else wrote: a file, a folder, a command line. Here each gets valid
 * input that was mutated, hundreds of thousands of times, and must take it or refuse it in good
 * order:
 *   - no finding of the address and undefined-behaviour sanitizers;
 *   - no more than a second of processor time, no more memory than the input's own size justifies
 *     (struct FuzzReader);
 *   - a refusal is one line that names the file, of bounded length, without control bytes, whatever
 *     the file holds.
 * What is taken is also used: adapters are merged, texts encoded and decoded, states written and
 * read again.
 *
 * With clang, mutation is guided by coverage (libFuzzer); behind the reader's name stand
 * libFuzzer's flags and files:
 *     clang -g -O1 -DLIBFUZZER -fsanitize=fuzzer,address,undefined \
 *         -fno-sanitize-recover=undefined docs/tools/fuzz.c -o fuzz -lm
 *     ./fuzz safetensors -runs=200000 -detect_leaks=0
 * With any other compiler, blindly:
 *     cc -g -O1 -fsanitize=address,undefined \
 *         -fno-sanitize-recover=undefined docs/tools/fuzz.c -o fuzz -lm
 *     ./fuzz safetensors -runs=20000 -seed=1
 * docs/tools/fuzz.sh does either for all readers and prints a table. Run them in the folder of
 * align.c. An input of several files is stored as one: each but the last behind 4 bytes of its
 * length. Where a run ends in a finding, the files of that input are still in its folder.
 *
 * align.c is included as it is; macros give it memory that is counted, files that get closed, and
 * an exit that comes back here. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define ALIGN_NO_MAIN
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* Memory: each piece hangs on a list, so that what a refusal leaves can be freed, and counts
 * against the limit. */
enum { HELD_HEADER = 64 };
struct Held {
    struct Held *prev, *next;
    size_t size;
};

static struct Held held = {&held, &held, 0};
static bool counting; /* outside of a run nothing is counted, nothing freed at its end */
static size_t held_bytes, held_peak, held_limit;
static FILE *fuzz_stderr, *fuzz_stdout, *opened[64];
static jmp_buf refusal;
static int refusal_status;

static _Noreturn void finding(const char *what, size_t found, size_t limit) {
    fprintf(stderr, "fuzz: FINDING: %s: %zu, limit %zu\n", what, found, limit);
    abort();
}

static struct Held *held_of(void *memory) {
    return (struct Held *)((char *)memory - HELD_HEADER);
}

static void *fuzz_aligned_alloc(size_t alignment, size_t n) {
    void *block;
    if (counting && (n > held_limit || held_bytes + n > held_limit))
        finding("bytes of memory asked for", held_bytes + n, held_limit);
    if (posix_memalign(&block, alignment, alignment + n))
        return NULL;
    char *memory = (char *)block + alignment;
    struct Held *h = held_of(memory);
    *h = (struct Held){h, h, n};
    if (!counting)
        return memory;
    *h = (struct Held){&held, held.next, n};
    h->next->prev = held.next = h;
    held_bytes += n;
    if (held_bytes > held_peak)
        held_peak = held_bytes;
    return memory;
}

static void *fuzz_malloc(size_t n) {
    return fuzz_aligned_alloc(HELD_HEADER, n);
}

static void fuzz_free(void *memory) {
    if (!memory)
        return;
    struct Held *h = held_of(memory);
    if (h->next != h)
        held_bytes -= h->size;
    h->prev->next = h->next;
    h->next->prev = h->prev;
    free(h);
}

static void *fuzz_calloc(size_t count, size_t size) {
    void *memory = fuzz_malloc(count * size);
    return memory ? memset(memory, 0, count * size) : NULL;
}

static void *fuzz_realloc(void *memory, size_t n) {
    void *larger = fuzz_malloc(n);
    if (larger && memory)
        memcpy(larger, memory, held_of(memory)->size < n ? held_of(memory)->size : n);
    fuzz_free(memory);
    return larger;
}

static FILE *fuzz_fopen(const char *path, const char *mode) {
    FILE *file = fopen(path, mode);
    for (size_t i = 0; file && counting && i < sizeof opened / sizeof *opened; i++)
        if (!opened[i]) {
            opened[i] = file;
            break;
        }
    return file;
}

static int fuzz_fclose(FILE *file) {
    for (size_t i = 0; i < sizeof opened / sizeof *opened; i++)
        if (opened[i] == file)
            opened[i] = NULL;
    return fclose(file);
}

static _Noreturn void fuzz_exit(int status) {
    refusal_status = status;
    longjmp(refusal, 1);
}

#undef stderr
#undef stdout
#define stderr fuzz_stderr
#define stdout fuzz_stdout
#define printf(...) fprintf(fuzz_stdout, __VA_ARGS__)
#define putchar(c) fputc(c, fuzz_stdout)
#define puts(s) fprintf(fuzz_stdout, "%s\n", s)
#define exit(status) fuzz_exit(status)
#define signal(number, handler) ((void)(number), (void)(handler), SIG_DFL)
/* what ships is looked for in the current folder */
#define readlink(path, to, n) (*(to) = 0, (ssize_t) - 1)
#define fsync(descriptor) ((void)(descriptor), 0)
#define malloc(n) fuzz_malloc(n)
#define calloc(count, size) fuzz_calloc(count, size)
#define realloc(memory, n) fuzz_realloc(memory, n)
#define aligned_alloc(alignment, n) fuzz_aligned_alloc(HELD_HEADER, n)
#define free(memory) fuzz_free(memory)
#define fopen(path, mode) fuzz_fopen(path, mode)
#define fclose(file) fuzz_fclose(file)
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function" /* what only main() calls */
#endif
#include "../../align.c"
#undef exit
#undef stderr
#undef printf

enum { PARTS = 4, LARGEST_INPUT = 1 << 16, V = 300 };
enum PartKind { PART_TEXT, PART_BYTES, PART_JSON, PART_TENSORS };

/* A reader: what it runs, the files an input consists of, and `names`, one of which each refusal
 * must contain. It may hold `base` bytes, and `factor` more for each byte of the input: a "0," of
 * JSON is a node of 192 bytes under the sanitizers, where each piece of an arena is an allocation
 * of its own. */
struct FuzzReader {
    const char *name;
    void (*run)(const struct Text *parts);
    bool (*seed)(size_t k, struct Text *parts); /* valid input number k; false: there are no more */
    enum PartKind kind[PARTS];
    size_t count, base, factor;
    const char *names[2];
};

static struct Arena seeds;
static struct Tokenizer *tok;
static const struct GPT2Config CONFIG = {V, 8, 4, 1, 2, V - 1, V - 1, 1e-5f, V - 1, {0}};

/* An empty part is a file that is not there. */
static const char *put(const char *path, struct Text text) {
    unlink(path);
    int file = text.length ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
    if (file >= 0 && write(file, text.data, text.length) == (ssize_t)text.length)
        close(file);
    return path;
}

static struct Text get(const char *path) {
    return read_file(&seeds, path);
}

static struct GPT2 *seed_model(void) {
    struct GPT2 *model = gpt2_new(CONFIG);
    gpt2_init(model, 1);
    return model;
}

static bool seed_from(const char *const *texts, size_t count, size_t k, struct Text *parts) {
    if (k < count)
        parts[0] = text_of(texts[k]);
    return k < count;
}

#define TEXTS(...)                                    \
    static const char *const texts[] = {__VA_ARGS__}; \
    return seed_from(texts, COUNT(texts), k, parts)

/* What a tokenizer encodes, it must decode to the same bytes, in its whole vocabulary and in a
 * smaller one. */
static void use_tokenizer(const struct Tokenizer *t, struct Text text) {
    struct Arena arena = {0};
    int *ids = arena_alloc(&arena, text.length + 1, sizeof *ids);
    size_t sizes[] = {t->vocab_size, MIN(t->vocab_size, (size_t)V)};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        size_t n = tokenizer_encode(t, text, sizes[i], ids);
        if (n > text.length || !text_equal(text, tokenizer_decode_all(t, &arena, ids, n, sizes[i])))
            finding("a text comes back changed; ids", n, text.length);
        for (size_t k = 0; k < n; k++)
            if (ids[k] < 0 || ids[k] >= endoftext_id(sizes[i]))
                finding("an id outside the vocabulary", (size_t)ids[k], sizes[i]);
    }
    arena_free(&arena);
}

/* tokenizer.bin with `merges` merges of neighbours: 0+1, 2+3 ..., then of merges. */
static struct Text made_tokenizer(size_t merges) {
    unsigned char *bytes = arena_zeros(&seeds, 1 << 16, 1), *to = bytes;
    size_t length[600] = {0};
#define PUT32(x)                                     \
    do {                                             \
        uint32_t value = (uint32_t)(x);              \
        for (int b = 0; b < 4; b++)                  \
            *to++ = (unsigned char)(value >> 8 * b); \
    } while (0)
    uint32_t header[4] = {TOKENIZER_MAGIC, TOKENIZER_VERSION, (uint32_t)(BYTE_TOKENS + merges + 1),
                          (uint32_t)(BYTE_TOKENS + merges)};
    for (int i = 0; i < 4; i++)
        PUT32(header[i]);
    to = bytes + 1024;
    unsigned char *token[600];
    for (size_t id = 0; id < BYTE_TOKENS + merges; id++) {
        size_t left = 2 * (id - BYTE_TOKENS), right = left + 1;
        length[id] = id < BYTE_TOKENS ? 1 : length[left] + length[right];
        *to++ = (unsigned char)length[id];
        token[id] = to;
        if (id < BYTE_TOKENS)
            *to++ = (unsigned char)id;
        else {
            memcpy(to, token[left], length[left]);
            memcpy(to + length[left], token[right], length[right]);
            to += length[id];
        }
    }
    *to++ = 0;
    PUT32(merges);
    for (size_t i = 0; i < merges; i++)
        PUT32(2 * i | (2 * i + 1) << 16);
    static const uint32_t ranges[] = {3,   'A', 'Z', 'a', 'z', 0xc0, 0x24f, 1,
                                      '0', '9', 2,   9,   13,  ' ',  ' '};
    for (size_t i = 0; i < COUNT(ranges); i++)
        PUT32(ranges[i]);
    return (struct Text){(char *)bytes, (size_t)(to - bytes)};
}

static void read_tokenizer(const struct Text *parts) {
    struct Arena arena = {0};
    struct Tokenizer *t = tokenizer_load(&arena, put("fuzzed/tokenizer.bin", parts[0]));
    use_tokenizer(t, text_of("I'm 42!  \tab ABCDEFGHIJ\xff\xc3\xa9 \xe2\x82"));
    arena_free(&arena);
}

static bool seed_tokenizer(size_t k, struct Text *parts) {
    parts[0] = made_tokenizer(k * 40);
    return k < 3;
}

/* JSON: the whole tree is walked, each string and number read. */
static double walk(const struct Json *json, int depth) {
    double sum = json->number + depth;
    if (depth > JSON_MAX_DEPTH + 1)
        finding("depth of a JSON tree", (size_t)depth, JSON_MAX_DEPTH);
    for (size_t i = 0; i < json->key.length; i++)
        sum += json->key.data[i];
    for (size_t i = 0; i < json->string.length; i++)
        sum += json->string.data[i];
    for (const struct Json *item = json->child; item; item = item->next)
        sum += walk(item, depth + 1);
    return sum;
}

static void read_json(const struct Text *parts) {
    struct Arena arena = {0};
    if (isnan(walk(json_read_file(&arena, put("fuzzed/any.json", parts[0])), 0)))
        finding("a number that is none", 0, 0);
    arena_free(&arena);
}

static bool seed_json(size_t k, struct Text *parts) {
    TEXTS("{\"a\": [1, -2.5e3, true, false, null, \"\\u00e9\\ud83d\\ude00 \\n"
          "\\\"\"], \"b\": {\"c\": [[[]]], \"d\": {}}}",
          "{}", "{\"x\": 18446744073709551615, \"y\": 1e308, \"z\": 0.1}");
}

/* JSON Lines, one reader for each shape. */
static void read_jsonl(const struct Text *parts, const unsigned *shapes, size_t count) {
    struct Arena arena = {0};
    struct Dataset *data = dataset_load(&arena, put("fuzzed/data.jsonl", parts[0]), shapes, count);
    for (size_t i = 0; i < data->n; i++) {
        struct Row *row = &data->rows[i];
        unsigned required = data->shape & (MAY_HAVE(1u) - 1);
        if ((row->has & required) != required)
            finding("a row without its shape", row->has, data->shape);
        if (!isfinite(row->score) || !isfinite(row->margin))
            finding("a score that is no number; row", i, data->n);
        if (data->shape & HAS_CHOSEN && !(row->has & HAS_PROMPT))
            split_implicit_prompt(row);
    }
    struct Rollout rollouts[2];
    struct GPT2 model = {.config = CONFIG};
    struct RolloutTrainer trainer = {
        .algorithm = ALGORITHM_GRPO,
        .model = &model,
        .batch_size = COUNT(rollouts),
        .num_generations = 1,
    };
    if (data->shape == SHAPE_ROLLOUT)
        replay_rollouts(data, 0, &trainer, &arena, rollouts);
    arena_free(&arena);
}

static void read_text_rows(const struct Text *parts) {
    read_jsonl(parts, TEXT_SHAPES, COUNT(TEXT_SHAPES));
}

static void read_sft_rows(const struct Text *parts) {
    read_jsonl(parts, SFT_SHAPES, COUNT(SFT_SHAPES));
}

static void read_reward_rows(const struct Text *parts) {
    read_jsonl(parts, REWARD_SHAPES, COUNT(REWARD_SHAPES));
}

static void read_dpo_rows(const struct Text *parts) {
    read_jsonl(parts, DPO_SHAPES, COUNT(DPO_SHAPES));
}

static void read_labelled_rows(const struct Text *parts) {
    read_jsonl(parts, LABELLED_SHAPES, COUNT(LABELLED_SHAPES));
}

static void read_rated_rows(const struct Text *parts) {
    read_jsonl(parts, RATED_SHAPES, COUNT(RATED_SHAPES));
}

static void read_rollouts(const struct Text *parts) {
    read_jsonl(parts, ROLLOUT_SHAPES, COUNT(ROLLOUT_SHAPES));
}

static bool seed_jsonl(size_t k, struct Text *parts) {
    TEXTS("{\"text\": \"A good film.\"}\n"
          "{\"text\": \"A bad \\u00e9 one.\", \"label\": 0}\r\n\n"
          "{\"text\": \"\"}",
          "{\"text\": \"good\", \"label\": 1, \"score\": 0.5}\n"
          "{\"text\": \"bad\", \"label\": false, \"score\": -1e2, \"other\": [1, {}]}\n",
          "{\"prompt\": \"Is it\", \"completion\": \" good?\"}\n"
          "{\"prompt\": \"\", \"completion\": \"x\"}\n",
          "{\"prompt\": \"It is\", \"chosen\": \" good\", \"rejected\": \" bad\","
          " \"margin\": 0.5}\n"
          "{\"chosen\": \"It \\u00e9\", \"rejected\": \"It \\u00e8\"}\n",
          "\xef\xbb\xbf{\"query_ids\": [1, 2, 3], \"response_ids\": [4, 299], \"score\": 0.25}\n"
          "{\"query_ids\": [7], \"response_ids\": [0], \"score\": 3}\n");
}

/* Prompts, whole or cut from texts, as ids that fit the model's context. */
static void read_prompts(const struct Text *parts) {
    struct GPT2 model = {.config = CONFIG};
    struct Options o = default_options("ppo");
    o.model = &model;
    o.tok = tok;
    o.data = dataset_load(&o.arena, put("fuzzed/prompts.jsonl", parts[0]), PROMPT_SHAPES,
                          COUNT(PROMPT_SHAPES));
    struct Example *prompts = arena_alloc(&o.arena, o.data->n, sizeof *prompts);
    size_t n = encode_prompts(&o, prompts);
    for (size_t i = 0; i < n; i++)
        if (prompts[i].n == 0 || prompts[i].n >= CONFIG.n_positions)
            finding("tokens of a prompt", prompts[i].n, CONFIG.n_positions);
    arena_free(&o.arena);
}

static bool seed_prompts(size_t k, struct Text *parts) {
    TEXTS("{\"prompt\": \"A film\"}\n{\"prompt\": \"\"}\n{\"prompt\": \"It is\"}\n",
          "{\"text\": \"A good film, and a long one.\"}\n{\"text\": \"Bad.\"}\n");
}

/* A model's folder: config.json and weights in one file, or in several with an index. */
static void read_safetensors(const struct Text *parts) {
    put("fuzzed/model.safetensors", parts[0]);
    gpt2_free(gpt2_load("fuzzed"));
}

/* The numbers of the seed in half the bytes: only the header and the type change. */
static struct Text as_half(struct Text file, const char *dtype) {
    size_t header = (unsigned char)file.data[0] | (size_t)(unsigned char)file.data[1] << 8,
           used = 8;
    char *half = arena_zeros(&seeds, file.length, 1);
    for (const char *at = file.data + 8, *end = at + header; at < end;) {
        int skip = 0;
        size_t a, b;
        if (strncmp(at, "\"F32\"", 5) == 0) {
            used += (size_t)sprintf(half + used, "\"%s\"", dtype);
            at += 5;
        } else if (sscanf(at, "_offsets\":[%zu,%zu]%n", &a, &b, &skip) == 2 && skip) {
            used += (size_t)sprintf(half + used, "_offsets\":[%zu,%zu]", a / 2, b / 2);
            at += skip;
        } else
            half[used++] = *at++;
    }
    half[0] = (char)((used - 8) & 255);
    half[1] = (char)((used - 8) >> 8);
    return (struct Text){half, used + (file.length - 8 - header) / 2};
}

static bool seed_safetensors(size_t k, struct Text *parts) {
    struct GPT2 *model = seed_model();
    if (k == 1)
        reward_head_declare(model);
    if (k == 2)
        value_head_init(model, 1);
    model_save(model, "fuzzed", NULL);
    gpt2_free(model);
    parts[0] = get("fuzzed/model.safetensors");
    if (k >= 3)
        parts[0] = as_half(parts[0], k == 3 ? "BF16" : "F16");
    return k < 5;
}

static void read_index(const struct Text *parts) {
    put("fuzzed/model.safetensors", (struct Text){0});
    put("fuzzed/model.safetensors.index.json", parts[0]);
    put("fuzzed/a.safetensors", parts[1]);
    put("fuzzed/b.safetensors", parts[2]);
    gpt2_free(gpt2_load("fuzzed"));
}

static bool seed_index(size_t k, struct Text *parts) {
    struct GPT2 *model = seed_model();
    model_save(model, "fuzzed", NULL);
    safetensors_write("fuzzed", "a.safetensors", model->tensors, 7, "transformer.");
    safetensors_write("fuzzed", "b.safetensors", model->tensors + 7, model->tensor_count - 7,
                      "transformer.");
    gpt2_free(model);
    parts[0] = text_of("{\"metadata\": {\"total_size\": 5000}, \"weight_map\": "
                       "{\"transformer.wte.weight\": \"a.safetensors\", \"transformer.ln_f.bias\": "
                       "\"b.safetensors\", \"x\": \"a.safetensors\"}}");
    parts[1] = get("fuzzed/a.safetensors");
    parts[2] = get("fuzzed/b.safetensors");
    return k < 1;
}

static void read_config(const struct Text *parts) {
    put("fuzzed/config.json", parts[0]);
    struct GPT2 *model = gpt2_load("fuzzed");
    if (!(model->config.layer_norm_epsilon >= 0)
        || (size_t)model->config.eos_token_id >= model->config.vocab_size)
        finding("an end token outside the vocabulary", (size_t)model->config.eos_token_id, V);
    gpt2_free(model);
}

static bool seed_config(size_t k, struct Text *parts) {
    struct GPT2 *model = seed_model();
    if (k == 1)
        reward_head_declare(model);
    model_save(model, "fuzzed", NULL);
    gpt2_free(model);
    parts[0] = get("fuzzed/config.json");
    return k < 2;
}

static void read_vocabulary(const struct Text *parts) {
    put("fuzzed/vocab.json", parts[0]);
    put("fuzzed/tokenizer.json", parts[1]);
    tokenizer_check_folder(tok, "fuzzed", V);
}

static bool seed_vocabulary(size_t k, struct Text *parts) {
    tokenizer_save(tok, "fuzzed", V);
    struct Text vocabulary = get("fuzzed/vocab.json");
    if (k == 0)
        parts[0] = vocabulary;
    if (k == 1)
        parts[1] =
            text_join(&seeds,
                      text_join(&seeds, text_of("{\"model\": {\"type\": \"BPE\", \"vocab\": "),
                                vocabulary),
                      text_of("}}"));
    return k < 2;
}

/* An adapter's folder, put to a model and folded into it. */
static void read_adapter(const struct Text *parts) {
    put("fuzzed/adapter_config.json", parts[0]);
    put("fuzzed/adapter_model.safetensors", parts[1]);
    put("fuzzed/model.safetensors", parts[2]);
    struct GPT2 *model = gpt2_new(CONFIG);
    adapter_load(model, "fuzzed");
    adapter_merge(model);
    gpt2_free(model);
}

static bool seed_adapter(size_t k, struct Text *parts) {
    struct GPT2 *model = seed_model();
    if (k == 1)
        reward_head_declare(model);
    if (k == 2)
        value_head_init(model, 1);
    adapter_new(model,
                (struct Adapter){.r = 2,
                                 .lora_alpha = 4,
                                 .target_modules = k ? "all-linear" : "c_attn mlp.c_proj",
                                 .use_rslora = k == 1},
                1);
    unlink("fuzzed/model.safetensors");
    model_save(model, "fuzzed", NULL);
    gpt2_free(model);
    parts[0] = get("fuzzed/adapter_config.json");
    parts[1] = get("fuzzed/adapter_model.safetensors");
    if (k == 2)
        parts[2] = get("fuzzed/model.safetensors");
    return k < 3;
}

/* A checkpoint: the log, weights, all else. */
struct Resumed {
    struct GPT2 *model;
    struct TrainingArguments args;
    struct TrainerState state;
    struct Rng rng;
    size_t place, rows;
    double running[3];
    struct Checkpoint checkpoint;
};

static void resumed_open(struct Resumed *r) {
    *r = (struct Resumed){.args = training_arguments(),
                          .rng = rng_seed(1, 1),
                          .place = 2,
                          .rows = 9};
    r->model = gpt2_new((struct GPT2Config){257, 2, 2, 1, 1, 256, 256, 1e-5f, 256, {0}});
    gpt2_make_trainable(r->model);
    r->args.output_dir = "fuzzed";
    r->args.resume_from_checkpoint = "fuzzed/checkpoint-4";
    r->checkpoint = checkpoint_new("sft", r->model, NULL, &r->args, &r->state);
    checkpoint_add_random(&r->checkpoint, "rng", &r->rng);
    checkpoint_add_sizes(&r->checkpoint, "place", &r->place, 1, 8);
    checkpoint_add_fixed(&r->checkpoint, "rows", r->rows, "the number of rows");
    checkpoint_add_doubles(&r->checkpoint, "running", r->running, COUNT(r->running));
}

static const char *const checkpoint_files[] = {"trainer_state.json", "model.safetensors",
                                               "optimizer.safetensors"};

static void read_checkpoint(const struct Text *parts) {
    struct Resumed r;
    char path[64];
    for (size_t i = 0; i < COUNT(checkpoint_files); i++) {
        snprintf(path, sizeof path, "fuzzed/checkpoint-4/%s", checkpoint_files[i]);
        put(path, parts[i]);
    }
    resumed_open(&r);
    checkpoint_resume(&r.checkpoint);
    if (r.place >= 9)
        finding("a place in the data that is not there", r.place, 9);
    checkpoint_save(&r.checkpoint); /* what was taken can be written again */
    gpt2_free(r.model);
    free(r.state.log_history);
}

static bool seed_checkpoint(size_t k, struct Text *parts) {
    struct Resumed r;
    char path[64];
    resumed_open(&r);
    struct LogEntry *entry = state_log(&r.state);
    log_value(entry, "loss", 2.5);
    log_value(entry, "rewards/margins", 1);
    r.state.global_step = 4;
    *log_at(&r.state.metrics, "loss") = (struct Metric){"loss", 1.5, 3};
    make_folder("fuzzed");
    checkpoint_save(&r.checkpoint);
    for (size_t i = 0; i < COUNT(checkpoint_files); i++) {
        snprintf(path, sizeof path, "fuzzed/checkpoint-4/%s", checkpoint_files[i]);
        parts[i] = get(path);
    }
    gpt2_free(r.model);
    free(r.state.log_history);
    return k < 1;
}

static void read_trainer_state(const struct Text *parts) {
    struct Arena arena = {0};
    struct TrainerState state = {0};
    struct TrainingArguments args = training_arguments();
    trainer_state_load(&state, &arena, put("fuzzed/trainer_state.json", parts[0]));
    trainer_state_save(&state, &args, "fuzzed/again");
    json_read_file(&arena, "fuzzed/again/trainer_state.json");
    free(state.log_history);
    arena_free(&arena);
}

static bool seed_trainer_state(size_t k, struct Text *parts) {
    struct Text files[PARTS];
    bool more = seed_checkpoint(k, files);
    make_folder("fuzzed/again");
    parts[0] = files[0];
    return more;
}

/* Any bytes as text; ids as text; texts in JSON Lines, as `align tokenize` takes them. */
static void read_bytes(const struct Text *parts) {
    use_tokenizer(tok, parts[0]);
}

static bool seed_bytes(size_t k, struct Text *parts) {
    TEXTS("It's a film, isn't it? 1234  \n\tend",
          "Ol\xc3\xa1, \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x98\x80 \xff\xfe\xc0\x80",
          "<|endoftext|> aaaaaaaaaaaaaaaaaaaa        ");
}

static void read_ids(const struct Text *parts) {
    struct Arena arena = {0};
    const char *path = put("fuzzed/ids.txt", parts[0]);
    if (parts[0].length)
        tokenize_decode(tok, read_file(&arena, path), V, path);
    arena_free(&arena);
}

static bool seed_ids(size_t k, struct Text *parts) {
    TEXTS("32 257 299\n0", "[1, 2,\t3]\r\n256");
}

/* What a reward program wrote for three answers. */
static void read_scores(const struct Text *parts) {
    struct RewardProgram program = {.command = "program"};
    float numbers[3];
    program_read(&program, parts[0], COUNT(numbers), numbers);
    for (size_t i = 0; i < COUNT(numbers); i++)
        if (isinf(numbers[i]))
            finding("an infinite score; number", i, 0);
}

static bool seed_scores(size_t k, struct Text *parts) {
    TEXTS("1\nnull\n-0.5e1", " 0.25\r\n 3 \nnull\n");
}

static void read_glossary(const struct Text *parts) {
    struct Options o = default_options("glossary");
    char word[200];
    snprintf(word, sizeof word, "%.*s", (int)MIN(parts[0].length, sizeof word - 1), parts[0].data);
    o.file = word;
    put("docs/glossary.md", parts[1]);
    command_glossary(&o);
    arena_free(&o.arena);
}

static bool seed_glossary(size_t k, struct Text *parts) {
    static const char *const words[] = {"perplexidade", "kl", "", "\xc3\x81GUA", "loss"};
    if (k < COUNT(words))
        parts[0] = text_of(words[k]);
    parts[1] = text_of("# Head\n\n"
                       "## Theme\n\n"
                       "### Perplexidade \xc2\xb7 perplexity\n"
                       "- Aliases: ppl; perplexity\n"
                       "- English: e to the loss.\n"
                       "- Portugu\xc3\xaas: e elevado \xc3\xa0 perda.\n"
                       "- In align.c: chapter 18, `command_eval`\n"
                       "- Test: `evaluation`\n"
                       "- Try: `./align eval`\n"
                       "- See also: KL\n\n"
                       "### KL \xc2\xb7 KL divergence\n"
                       "- Aliases: divergence\n"
                       "- English: How far.\n"
                       "- Portugu\xc3\xaas: Qu\xc3\xa3o longe.\n"
                       "- In align.c: chapter 5, `kl`; chapter 15, `struct KL`\n"
                       "- Test: `kl`\n"
                       "- Try: `./align eval`\n"
                       "- See also: Perplexidade\n");
    return k < COUNT(words);
}

/* A command line, one argument a line, as main() takes it; nothing runs. */
static void read_arguments(const struct Text *parts) {
    struct Arena arena = {0};
    char *argv[64] = {"align"}, *rest = (char *)text_copy(&arena, parts[0]).data;
    int argc = 1;
    while (argc < 63 && (argv[argc] = strsep(&rest, "\n")))
        argc++;
    const struct Command *command = &COMMANDS[0];
    for (size_t i = 0; i < COUNT(COMMANDS); i++)
        if (argc > 1 && strcmp(COMMANDS[i].name, argv[1]) == 0)
            command = &COMMANDS[i];
    struct Options o = default_options(command->name);
    parse_arguments(&o, command, argc, argv);
    if (o.help)
        print_help(command);
    if (command->run == command_dpo)
        parse_loss_types(&o);
    quiet = true;
    options_close(&o);
    arena_free(&arena);
}

/* For each command a line with all of its flags, and some with values that fit. */
static bool seed_arguments(size_t k, struct Text *parts) {
    TEXTS("dpo\n--beta\n0.1\n--loss_type\nsigmoid\nsft\n--loss_weights\n1\n0.2\n"
          "--model_name_or_path=x\n--seed\n7",
          "generate\n--do_sample\n--top_p=0.9\n--early_stopping\nnever\n--prompt\nx\n--json",
          "ppo\n--batch_size\n64\n--adap_kl_ctrl\nfalse\n--kl_penalty\nfull",
          "tokenize\nfile\n--jsonl", "glossary\nvalue\nhead", "sft\n--help",
          "reward\n--use_peft\n--lora_target_modules\nc_attn\nmlp.c_proj\n--lora_r\n4\n"
          "--learning_rate\n1e-4",
          "exact\n--beta\n0.5\n--n_layer\n2", "rlhf\n--ppo_steps\n3\n--quiet");
}

enum { KB = 1024, MB = 1024 * KB };
/* clang-format off */
static const struct FuzzReader READERS[] = {
    {"tokenizer", read_tokenizer, seed_tokenizer, {PART_BYTES}, 1, 4 * MB, 16,
     {"fuzzed/tokenizer.bin"}},
    {"json", read_json, seed_json, {PART_JSON}, 1, 256 * KB, 256, {"fuzzed/any.json"}},
    {"jsonl_text", read_text_rows, seed_jsonl, {PART_JSON}, 1, 256 * KB, 256,
     {"fuzzed/data.jsonl"}},
    {"jsonl_sft", read_sft_rows, seed_jsonl, {PART_JSON}, 1, 256 * KB, 256, {"fuzzed/data.jsonl"}},
    {"jsonl_reward", read_reward_rows, seed_jsonl, {PART_JSON}, 1, 256 * KB, 256,
     {"fuzzed/data.jsonl"}},
    {"jsonl_dpo", read_dpo_rows, seed_jsonl, {PART_JSON}, 1, 256 * KB, 256, {"fuzzed/data.jsonl"}},
    {"jsonl_labelled", read_labelled_rows, seed_jsonl, {PART_JSON}, 1, 256 * KB, 256,
     {"fuzzed/data.jsonl"}},
    {"jsonl_rated", read_rated_rows, seed_jsonl, {PART_JSON}, 1, 256 * KB, 256,
     {"fuzzed/data.jsonl"}},
    {"jsonl_rollouts", read_rollouts, seed_jsonl, {PART_JSON}, 1, 256 * KB, 256,
     {"fuzzed/data.jsonl"}},
    {"prompts", read_prompts, seed_prompts, {PART_JSON}, 1, 256 * KB, 256,
     {"fuzzed/prompts.jsonl"}},
    {"safetensors", read_safetensors, seed_safetensors, {PART_TENSORS}, 1, 1 * MB, 256, {"fuzzed"}},
    {"index", read_index, seed_index, {PART_JSON, PART_TENSORS, PART_TENSORS}, 3, 1 * MB, 256,
     {"fuzzed"}},
    {"config", read_config, seed_config, {PART_JSON}, 1, 8 * MB, 256, {"fuzzed"}},
    {"vocabulary", read_vocabulary, seed_vocabulary, {PART_JSON, PART_JSON}, 2, 256 * KB, 256,
     {"fuzzed/vocab.json", "fuzzed/tokenizer.json"}},
    {"adapter", read_adapter, seed_adapter, {PART_JSON, PART_TENSORS, PART_TENSORS}, 3, 8 * MB, 256,
     {"fuzzed"}},
    {"checkpoint", read_checkpoint, seed_checkpoint, {PART_JSON, PART_TENSORS, PART_TENSORS}, 3,
     1 * MB, 512, {"fuzzed/checkpoint-4"}},
    {"trainer_state", read_trainer_state, seed_trainer_state, {PART_JSON}, 1, 256 * KB, 512,
     {"fuzzed/trainer_state.json"}},
    {"text", read_bytes, seed_bytes, {PART_TEXT}, 1, 256 * KB, 256, {"nothing is refused"}},
    {"ids", read_ids, seed_ids, {PART_TEXT}, 1, 256 * KB, 16, {"fuzzed/ids.txt"}},
    {"scores", read_scores, seed_scores, {PART_TEXT}, 1, 256 * KB, 256, {"--reward_command"}},
    {"glossary", read_glossary, seed_glossary, {PART_TEXT, PART_TEXT}, 2, 256 * KB, 256,
     {"docs/glossary.md"}},
    {"arguments", read_arguments, seed_arguments, {PART_TEXT}, 1, 256 * KB, 64,
     {"--", "\" is no flag"}},
};
/* clang-format on */

/* For leaks the tests look: a refusal ends the program, and what it held. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "detect_leaks=0";
}

static const struct FuzzReader *reader;
static const struct Text *input; /* the parts of the run */
static struct Text valid_input[16];
static size_t valid_inputs;
static size_t executions, refusals;
static double slowest;
static char *said; /* what align.c wrote to stderr */
static size_t said_length;

static size_t unpack(const char *data, size_t size, struct Text *parts) {
    for (size_t i = 0; i + 1 < reader->count; i++) {
        uint32_t n = 0;
        if (size >= 4) {
            memcpy(&n, data, 4);
            data += 4;
            size -= 4;
        }
        parts[i] = (struct Text){data, MIN((size_t)n, size)};
        data += parts[i].length;
        size -= parts[i].length;
    }
    parts[reader->count - 1] = (struct Text){data, size};
    return reader->count;
}

static size_t pack(const struct Text *parts, char *to, size_t capacity) {
    size_t used = 0;
    for (size_t i = 0; i < reader->count; i++) {
        uint32_t n = (uint32_t)parts[i].length;
        if (used + n + 4 > capacity)
            return 0;
        if (i + 1 < reader->count) {
            memcpy(to + used, &n, 4);
            used += 4;
        }
        if (n)
            memcpy(to + used, parts[i].data, n);
        used += n;
    }
    return used;
}

/* A word of align.c's own in the message: one that no file brought. */
static bool says(const char *word) {
    bool brought = false;
    for (size_t i = 0; i < reader->count; i++)
        brought =
            brought
            || (input[i].length && memmem(input[i].data, input[i].length, word, strlen(word)));
    return !brought && memmem(said, said_length, word, strlen(word));
}

/* A refusal: status 1 (a command line: 2), one line, no control bytes, the file's name in it, no
 * longer than a screen. */
static void check_refusal(void) {
    fflush(fuzz_stderr);
    bool named = false;
    for (size_t i = 0; i < COUNT(reader->names); i++)
        named = named
                || (reader->names[i]
                    && memmem(said, said_length, reader->names[i], strlen(reader->names[i])));
    const char *begin = memrchr(said, '\n', said_length - 1); /* notes may stand before it */
    size_t length = said_length - (begin ? (size_t)(begin + 1 - said) : 0);
    for (size_t i = 0; i < said_length; i++) {
        unsigned char c = (unsigned char)said[i];
        if ((c < ' ' && c != '\n') || c == 0x7f
            || (i && c >= 0x80 && c < 0xa0 && (unsigned char)said[i - 1] == 0xc2))
            goto bad;
    }
    if (named && length < 1400 && said[said_length - 1] == '\n'
        && strncmp(begin ? begin + 1 : said, "align: ", 7) == 0 && !says("internal")
        && !says("out of memory") && !says("(null)")
        && refusal_status == (reader->run == read_arguments ? 2 : 1))
        return;
bad:
    fprintf(stderr,
            "fuzz: FINDING: a refusal (status %d) that is not one clean line with \"%s\": %.*s\n",
            refusal_status, reader->names[0], (int)said_length, said);
    abort();
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run_one(const char *data, size_t size) {
    struct Text parts[PARTS] = {{0}};
    unpack(data, size, parts);
    input = parts;
    rewind(fuzz_stderr);
    executions++;
    held_bytes = 0;
    held_limit = reader->base + reader->factor * size;
    double begin = cpu_seconds();
    counting = true;
    if (setjmp(refusal) == 0)
        reader->run(parts);
    else {
        refusals++;
        check_refusal();
    }
    counting = false;
    while (held.next != &held)
        fuzz_free((char *)held.next + HELD_HEADER);
    for (size_t i = 0; i < COUNT(opened); i++)
        if (opened[i])
            fuzz_fclose(opened[i]);
    log_names = (struct Arena){0};
    double seconds = cpu_seconds() - begin;
    slowest = MAX(slowest, seconds);
    if (seconds > 1)
        finding("milliseconds for one input", (size_t)(1e3 * seconds), 1000);
}

/* Mutation: bytes, and the words of JSON. */
struct Edit {
    char *data;
    size_t size, capacity;
    struct Rng *rng;
};

/* Puts `n` bytes of `with` in the place of `cut` bytes at `at`, if they fit. */
static void edit_replace(struct Edit *e, size_t at, size_t cut, const void *with, size_t n) {
    if (at > e->size || cut > e->size - at || e->size - cut + n > e->capacity)
        return;
    memmove(e->data + at + n, e->data + at + cut, e->size - at - cut);
    if (n)
        memcpy(e->data + at, with, n);
    e->size += n - cut;
}

/* clang-format off */
static const char *const WORDS[] = {
    "0", "-1", "1", "2", "1e999", "-1e999", "1e-999", "0.5", "1.0", "2147483648", "4294967296",
    "9007199254740993", "18446744073709551615", "18446744073709551616", "1000000000", "16777216",
    "65536", "1048576", "null", "true", "false", "[]", "{}", "\"\"", "\"x\"", "[0,0]", "[4,0]",
    "[0]", "[0,4,8]", "[1e30]",
    "\"F32\"", "\"F16\"", "\"BF16\"", "\"I64\"", "\"F32\\u0000\"", "\"dtype\"", "\"shape\"",
    "\"data_offsets\"", "\"__metadata__\"", "\"transformer.wte.weight\"", "\"wpe.weight\"",
    "\"score.weight\"", "\"v_head.summary.weight\"", "\"v_head.summary.bias\"",
    "\"n_layer\"", "\"n_embd\"", "\"n_head\"", "\"n_positions\"", "\"vocab_size\"", "\"n_inner\"",
    "\"eos_token_id\"", "\"pad_token_id\"", "\"layer_norm_epsilon\"", "\"model_type\"",
    "\"activation_function\"", "\"tie_word_embeddings\"",
    "\"weight_map\"", "\"../a.safetensors\"", "\"/etc/passwd\"", "\"a\\u0000.safetensors\"",
    "\"..\"", "\".\"", "\"b.safetensors\"", "\"model\"", "\"vocab\"",
    "\"r\"", "\"lora_alpha\"", "\"target_modules\"", "\"c_attn\"", "\"c_proj\"", "\"c_fc\"",
    "\"use_dora\"", "\"bias\"", "\"modules_to_save\"", "\"init_lora_weights\"", "\"peft_type\"",
    "\"LORA\"", "\"base_model_name_or_path\"", "\"rank_pattern\"",
    "\"global_step\"", "\"epoch\"", "\"log_history\"", "\"metrics\"", "\"task\"", "\"sft\"",
    "\"rng\"", "\"place\"", "\"running\"",
    "\"text\"", "\"prompt\"", "\"completion\"", "\"chosen\"", "\"rejected\"", "\"label\"",
    "\"score\"", "\"margin\"", "\"query_ids\"", "\"response_ids\"",
    "\\u0000", "\\ud800", "\\udc00", "\\ud83d\\ude00", "\\u12", "\\x", "\\\\", "\\\"", "\n", "\r\n",
    "\xef\xbb\xbf", "\xff", "\xc3", "\xc0\x80", "\xc2\x9b\x33\x31m", "\x1b[31m", "\xed\xa0\x80",
    ",", ":", "\"", "}", "]", "{", "[", " ", "'s", "'re", "\xc2\xa0",
    "### ", " \xc2\xb7 ", "- Aliases: ", "- English: ", "- Portugu\xc3\xaas: ", "- In align.c: ",
    "- Test: ", "- Try: ", "- See also: ", "## ", "`", "; ", "chapter ", "struct ",
};
static const uint64_t NUMBERS[] = {
    0, 1, 255, 256, 65535, 65536, 0x7fffffff, 0x80000000, 0xffffffff,
    0x7fffffffffffffff, 0x8000000000000000, UINT64_MAX, UINT64_MAX - 7,
};
/* clang-format on */

/* Where the JSON word that starts at `at` ends: a string, a number, brackets with all inside, else
 * a byte. */
static size_t word_end(const struct Edit *e, size_t at) {
    size_t end = at, depth = 0;
    do {
        char c = e->data[end++];
        if (c == '"') {
            while (end < e->size && e->data[end] != '"')
                end += e->data[end] == '\\' ? 2 : 1;
            end = MIN(end + 1, e->size);
        } else if (c == '[' || c == '{')
            depth++;
        else if ((c == ']' || c == '}') && depth)
            depth--;
        else if (!depth)
            while (end < e->size && isalnum((unsigned char)c)
                   && (isalnum((unsigned char)e->data[end]) || e->data[end] == '.'))
                end++;
    } while (depth && end < e->size);
    return end;
}

static size_t word_start(const struct Edit *e) {
    size_t at = rng_below(e->rng, e->size), tries = 0;
    while (at > 0 && tries++ < 40 && !strchr(" ,:[{\n", e->data[at - 1]))
        at--;
    return at;
}

static void mutate_once(struct Edit *e) {
    struct Rng *rng = e->rng;
    if (e->size == 0)
        edit_replace(e, 0, 0, "{", 1);
    if (e->size == 0)
        return;
    size_t at = rng_below(rng, e->size), n = MIN(1 + rng_below(rng, 32), e->size - at),
           to = rng_below(rng, e->size);
    const char *word = WORDS[rng_below(rng, COUNT(WORDS))];
    char held_word[512];
    uint64_t number = NUMBERS[rng_below(rng, COUNT(NUMBERS))];
    if (reader->run == read_arguments && rng_below(rng, 2)) {
        snprintf(held_word, sizeof held_word, "\n--%s%s", FLAGS[rng_below(rng, COUNT(FLAGS))].name,
                 rng_below(rng, 2) ? "\n" : "=");
        word = held_word;
        if (rng_below(rng, 8) == 0)
            word = COMMANDS[rng_below(rng, COUNT(COMMANDS))].name;
    }
    switch (rng_below(rng, 14)) {
    case 0:
        e->data[at] ^= (char)(1 << rng_below(rng, 8));
        break;
    case 1:
        e->data[at] = (char)rng_next(rng);
        break;
    case 2:
        n = MIN((size_t)1 << rng_below(rng, 4), e->size - at);
        memcpy(e->data + at, &number, n);
        break;
    case 3:
        edit_replace(e, at, n, NULL, 0);
        break;
    case 4:
        n = MIN(n, sizeof held_word);
        memcpy(held_word, e->data + at, n);
        edit_replace(e, to, 0, held_word, n);
        break;
    case 5:
        if (rng_below(rng, 4) == 0)
            e->size = at;
        break;
    case 6:
        edit_replace(e, at, 0, word, strlen(word));
        break;
    case 7:
    case 8: /* another word, mostly a string for a string */
        at = word_start(e);
        for (int tries = 0; tries < 20 && (word[0] == '"') != (e->data[at] == '"'); tries++)
            word = WORDS[rng_below(rng, COUNT(WORDS))];
        edit_replace(e, at, word_end(e, at) - at, word, strlen(word));
        break;
    case 9:
    case 10: /* a word in the place of another one, or an item or member once more */
        at = word_start(e);
        n = word_end(e, at);
        bool again = rng_below(rng, 2);
        size_t value = n; /* of "key": value */
        while (value < e->size && strchr(": ", e->data[value]))
            value++;
        if (again && value < e->size && memchr(e->data + n, ':', value - n))
            n = word_end(e, value);
        n = MIN(n - at, sizeof held_word - 1);
        memcpy(held_word, e->data + at, n);
        if (again)
            held_word[n++] = ',';
        if (!again || rng_below(rng, 2))
            at = word_start(e);
        edit_replace(e, at, again ? 0 : word_end(e, at) - at, held_word, n);
        break;
    case 11:
        at = word_start(e);
        edit_replace(e, at, MIN(word_end(e, at) + rng_below(rng, 3), e->size) - at, NULL, 0);
        break;
    case 12:
        word = rng_below(rng, 2) ? "[" : "{\"a\":";
        for (size_t i = rng_below(rng, 100); i-- > 0;)
            edit_replace(e, at, 0, word, strlen(word));
        break;
    case 13:
        while (at < e->size && !isdigit((unsigned char)e->data[at]))
            at++;
        if (at < e->size)
            e->data[at] = (char)('0' + rng_below(rng, 10));
        break;
    }
}

#ifdef LIBFUZZER
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t capacity);
#endif

static void mutate(struct Edit *e) {
#ifdef LIBFUZZER
    if (rng_below(e->rng, 3) == 0) {
        e->size = LLVMFuzzerMutate((uint8_t *)e->data, e->size, e->capacity);
        return;
    }
#endif
    for (size_t i = 1 + rng_below(e->rng, 3); i-- > 0;)
        mutate_once(e);
}

/* Of a safetensors file mostly the JSON header is edited, and its length in front put right. */
static void mutate_tensors(struct Edit *e) {
    static char header[2 * LARGEST_INPUT];
    uint64_t length = 0;
    if (e->size >= 8)
        memcpy(&length, e->data, 8);
    if (e->size < 8 || length > e->size - 8 || rng_below(e->rng, 4) == 0) {
        mutate(e);
        return;
    }
    memcpy(header, e->data + 8, length);
    struct Edit inside = {header, length, MIN(sizeof header, e->capacity - (e->size - length)),
                          e->rng};
    mutate(&inside);
    edit_replace(e, 8, length, header, inside.size);
    length = inside.size;
    memcpy(e->data, &length, 8);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed) {
    static char copy[2 * LARGEST_INPUT], edited[2 * LARGEST_INPUT];
    struct Rng rng = rng_seed(seed, 99);
    struct Text parts[PARTS] = {{0}}, valid = valid_input[rng_below(&rng, valid_inputs)];
    if (rng_below(&rng, 3) == 0 && valid.length <= capacity)
        memcpy(data, valid.data,
               size = valid.length); /* else refused input, easier to find, takes over */
    size = MIN(size, (size_t)LARGEST_INPUT);
    memcpy(copy, data, size);
    size_t part = rng_below(&rng, unpack(copy, size, parts));
    struct Edit edit = {edited, parts[part].length,
                        MIN(parts[part].length + MAX(capacity, size) - size, (size_t)LARGEST_INPUT),
                        &rng};
    memcpy(edited, parts[part].data, parts[part].length);
    if (reader->kind[part] == PART_TENSORS)
        mutate_tensors(&edit);
    else
        mutate(&edit);
    parts[part] = (struct Text){edited, edit.size};
    size_t packed = pack(parts, (char *)data, capacity);
    return packed ? packed : size;
}

static void print_totals(void) {
    fprintf(stderr,
            "fuzz: %s: %zu executions, %zu refused, slowest %.1f ms, most memory %zu bytes\n",
            reader->name, executions, refusals, 1e3 * slowest, held_peak);
}

/* The reader by its name, a folder of its own, and in it `corpus`, its seeds. */
static char *fuzz_open(const char *name) {
    for (size_t i = 0; i < COUNT(READERS); i++)
        if (name && strcmp(READERS[i].name, name) == 0)
            reader = &READERS[i];
    if (!reader) {
        for (size_t i = 0; i < COUNT(READERS); i++)
            fprintf(stderr, "%s%s", READERS[i].name, i + 1 < COUNT(READERS) ? " " : "\n");
        exit(2);
    }
    fuzz_stderr = open_memstream(&said, &said_length);
    fuzz_stdout = (fopen)("/dev/null", "w");
    quiet = true;
    kernel_choose();
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++)
        thread_scratch(slot, 1 << 20, sizeof(float)); /* it outlives a run */
    if (setjmp(refusal)) {
        fflush(fuzz_stderr);
        fprintf(stderr, "fuzz: the seeds cannot be made: %.*s\n", (int)said_length, said);
        exit(1);
    }
    tok = tokenizer_load(&seeds, "tokenizer.bin");
    char *folder = arena_printf(&seeds, "%s/fuzz-XXXXXX",
                                getenv("TMPDIR")          ? getenv("TMPDIR")
                                : file_exists("/dev/shm") ? "/dev/shm"
                                                          : "/tmp");
    static char bytes[2 * LARGEST_INPUT];
    CHECK(mkdtemp(folder) && chdir(folder) == 0, "%s: %s", folder, strerror(errno));
    make_folder("fuzzed");
    make_folder("corpus");
    make_folder("docs");
    for (size_t k = 0;; k++) {
        struct Text parts[PARTS] = {{0}};
        if (!reader->seed(k, parts))
            break;
        size_t n = pack(parts, bytes, sizeof bytes);
        put(arena_printf(&seeds, "corpus/seed%zu", k), (struct Text){bytes, n});
        valid_input[valid_inputs++] = text_copy(&seeds, (struct Text){bytes, n});
        run_one(bytes, n);
    }
    if (setjmp(refusal) == 0 && refusals && reader->seed != seed_jsonl)
        finding("valid seeds were refused", refusals, 0);
    executions = refusals = held_peak = 0;
    slowest = 0;
    atexit(print_totals);
    return arena_printf(&seeds, "%s/corpus", folder);
}

#ifdef LIBFUZZER
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    char *corpus = fuzz_open(*argc > 1 ? (*argv)[1] : NULL);
    char **arguments = fuzz_malloc((size_t)(*argc + 1) * sizeof *arguments);
    bool files = false;
    for (int i = 2; i < *argc; i++)
        files = files || (*argv)[i][0] != '-';
    int n = 0;
    for (int i = 0; i < *argc; i++)
        if (i != 1)
            arguments[n++] = (*argv)[i];
    if (!files)
        arguments[n++] = corpus;
    arguments[n] = NULL;
    *argc = n;
    *argv = arguments;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    run_one((const char *)data, size);
    return 0;
}
#else
int main(int argc, char **argv) {
    unsigned long runs = 20000, seed = 1;
    fuzz_open(argc > 1 ? argv[1] : NULL);
    for (int i = 2; i < argc; i++) {
        if (strncmp(argv[i], "-runs=", 6) == 0)
            runs = strtoul(argv[i] + 6, NULL, 10);
        else if (strncmp(argv[i], "-seed=", 6) == 0)
            seed = strtoul(argv[i] + 6, NULL, 10);
        else if (argv[i][0] != '-') {
            struct Text input = get(argv[i]);
            run_one(input.data, input.length);
            runs = 0;
        }
    }
    struct Rng rng = rng_seed(seed, 98);
    static char data[2 * LARGEST_INPUT];
    for (unsigned long k = 0; k < runs; k++) {
        struct Text from = valid_input[rng_below(&rng, valid_inputs)];
        size_t n = from.length;
        memcpy(data, from.data, n);
        for (size_t edits = 1 + rng_below(&rng, 4); edits-- > 0;)
            n = LLVMFuzzerCustomMutator((uint8_t *)data, n, LARGEST_INPUT,
                                        (unsigned)rng_next(&rng));
        run_one(data, n);
    }
    return 0;
}
#endif
