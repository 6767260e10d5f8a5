/* test_align.c -- the tests of align.c.
 *
 *     make test                                    all of them
 *     ./test_align ppo tokenizer_words             those whose names start so
 *     ./test_align --fixtures ../shared/fixtures/tiny   with the models and expectations of a
 *       folder as well
 *
 * The program is included, not linked: a test calls any function of it. Groups follow its
 * chapters. What a test holds to what stands above it: values by hand; numbers that torch 2.13,
 * transformers 5.23 and TRL 0.11.4 computed; central differences; a plain program against the fast
 * one; one thread against several, bit for bit; a batch overfitted; broken files and their
 * messages.
 *
 * Numbers of torch, transformers and TRL are called golden: docs/tools/golden.py made them. Its
 * comments say by which formulas; "f32-f64" there says how exact a float can be.
 */
#define ALIGN_NO_MAIN
#include "align.c"
#include <utime.h>
#ifndef _WIN32
#include <sys/wait.h>
#else /* what Windows lacks; without fork() what ends the program is not tested there */
static void *memmem(const void *in, size_t n, const void *what, size_t length) {
    for (const char *at = in; at + length <= (const char *)in + n; at++)
        if (memcmp(at, what, length) == 0)
            return (void *)at;
    return NULL;
}
static char *strsep(char **rest, const char *marks) {
    char *word = *rest;
    char *end = word ? word + strcspn(word, marks) : NULL;
    *rest = end && *end ? end + 1 : NULL;
    if (end)
        *end = 0;
    return word;
}
static char *mkdtemp(char *name) {
    return _mktemp(name) && mkdir(name, 0700) == 0 ? name : NULL;
}
#endif

/* =============================================================================================
 * The harness
 * ============================================================================================= */

static const char *test_name; /* the test that runs */
static size_t failures; /* its failing checks */
static struct Arena test_arena; /* its memory, given back at its end */
static struct Rng test_rng; /* its random numbers, the same whatever ran before */
static const struct Tokenizer *tokenizer;
static const char *fixtures; /* --fixtures DIR */
static char folder[PATH_MAX - 64]; /* for temporary files */
/* fewer of the many cases: also by TEST_THIN=1, where each costs a hundred times as much */
static bool thin = SANITIZED;

/* Counts a failing check; true for the first ten of a test, which are printed. */
static bool failed(void) {
    return ++failures <= 10;
}

static void expect_close(const char *what, double got, double want, double tolerance) {
    bool same = got == want || (isnan(got) && isnan(want)) || fabs(got - want) <= tolerance;
    if (!same && failed())
        printf("%s: %s: expected %.9g, got %.9g, tolerance %.1e\n", test_name, what, want, got,
               tolerance);
}

/* Within tolerance of want, relative to want. */
static void expect_relative(const char *what, double got, double want, double tolerance) {
    expect_close(what, got, want, tolerance * fabs(want));
}

static void expect_doubles(const char *what, const double *got, const double *want, size_t n,
                           double tolerance) {
    for (size_t i = 0; i < n; i++) {
        if (fabs(got[i] - want[i]) <= tolerance || !failed())
            continue;
        printf("%s: %s[%zu]: expected %.9g, got %.9g, tolerance %.1e\n", test_name, what, i,
               want[i], got[i], tolerance);
    }
}

static double *widen(const float *x, size_t n) {
    double *wide = arena_alloc(&test_arena, n, sizeof *wide);
    for (size_t i = 0; i < n; i++)
        wide[i] = x[i];
    return wide;
}

static void expect_floats(const char *what, const float *got, const double *want, size_t n,
                          double tolerance) {
    expect_doubles(what, widen(got, n), want, n, tolerance);
}

static void expect_true(const char *what, bool condition) {
    if (!condition && failed())
        printf("%s: %s: expected true, got false\n", test_name, what);
}

static void expect_count(const char *what, size_t got, size_t want) {
    if (got != want && failed())
        printf("%s: %s: expected %zu, got %zu, tolerance 0\n", test_name, what, want, got);
}

static void expect_text(const char *what, struct Text got, const char *want) {
    bool same = got.length == strlen(want) && memcmp(got.data, want, got.length) == 0;
    if (!same && failed())
        printf("%s: %s: expected \"%s\", got \"%.*s\"\n", test_name, what, want, (int)got.length,
               got.data ? got.data : "");
}

static void expect_holds(const char *what, struct Text text, const char *part) {
    if (!strstr(text.data, part) && failed())
        printf("%s: %s: expected \"%s\" in \"%s\"\n", test_name, what, part, text.data);
}

static void expect_ids(const char *what, const int *got, size_t n, const int *want, size_t want_n) {
    if (n == want_n && (n == 0 || memcmp(got, want, n * sizeof *got) == 0))
        return;
    if (!failed())
        return;
    printf("%s: %s: expected", test_name, what);
    for (size_t i = 0; i < want_n; i++)
        printf(" %d", want[i]);
    printf(", got");
    for (size_t i = 0; i < n; i++)
        printf(" %d", got[i]);
    printf("\n");
}

static void expect_bits(const char *what, const float *got, const float *want, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (bits_of_float(got[i]) == bits_of_float(want[i]) || !failed())
            continue;
        printf("%s: %s[%zu]: expected the bits of %.9g, got %.9g\n", test_name, what, i, want[i],
               got[i]);
        return;
    }
}

static double slope_of(const double value[4], double h) {
    return (8 * (value[2] - value[1]) - (value[3] - value[0])) / (12 * h);
}

static const double SLOPE_STEPS[] = {-2, -1, 1, 2};

/* A loss as a function of a context that holds the weight which is moved. */
struct Slope {
    double (*loss)(void *context);
    void *context;
    double h;
};

static double slope_at(struct Slope f, float *weight) {
    double value[4];
    float held = *weight;
    for (int i = 0; i < 4; i++) {
        *weight = (float)(held + SLOPE_STEPS[i] * f.h);
        value[i] = f.loss(f.context);
    }
    *weight = held;
    return slope_of(value, f.h);
}

/* `samples` of the n gradients d (all, if n is not more) against slopes, relative to the
 * tensor's largest. */
static void expect_gradient(const char *what, struct Slope f, float *weight, const float *d,
                            size_t n, size_t samples, double tolerance) {
    double largest = 5e-3;
    samples = MIN(samples, thin ? (size_t)3 : samples);
    for (size_t i = 0; i < n; i++)
        largest = MAX(largest, fabs((double)d[i]));
    for (size_t k = 0; k < MIN(n, samples); k++) {
        size_t i = n <= samples ? k : rng_below(&test_rng, n);
        double slope = slope_at(f, weight + i);
        if (fabs(slope - d[i]) <= tolerance * largest || !failed())
            continue;
        printf("%s: d %s[%zu]: expected (central difference) %.6g, got %.6g, tolerance %.1e\n",
               test_name, what, i, slope, (double)d[i], tolerance * largest);
    }
}

static float *random_floats(size_t n, double scale) {
    float *x = arena_floats(&test_arena, n);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(scale * rng_normal(&test_rng));
    return x;
}

static double dot_product(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

static double norm_of(const float *x, size_t n) {
    return sqrt(dot_product(x, x, n));
}

static void use_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#endif
    (void)n;
}

#define formatted(...) arena_printf(&test_arena, __VA_ARGS__)

static const char *temporary(const char *name) {
    return formatted("%s/%s", folder, name);
}

static struct Text contents(const char *name) {
    return read_file(&test_arena, temporary(name));
}

static const char *write_bytes(const char *name, const void *bytes, size_t n) {
    const char *path = temporary(name);
    FILE *file = fopen(path, "wb");
    CHECK(file && fwrite(bytes, 1, n, file) == n && fclose(file) == 0, "%s: cannot be written",
          path);
    return path;
}

static const char *write_text(const char *name, const char *text) {
    return write_bytes(name, text, strlen(text));
}

/* JSON whose strings stand in single quotes, which need no backslash here. */
static const char *json_of(const char *text) {
    char *json = formatted("%s", text);
    for (char *c = json; *c; c++)
        if (*c == '\'')
            *c = '"';
    return json;
}

static const char *write_json(const char *name, const char *text) {
    return write_text(name, json_of(text));
}

/* stdout and stderr go to a file between these two; the second returns what was said. */
static int held_descriptor[2];

static void capture_begin(void) {
    fflush(stdout);
    for (int d = 0; d < 2; d++)
        held_descriptor[d] = dup(d + 1);
    int file = open(temporary("captured"), O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(file >= 0, "%s: cannot be written", temporary("captured"));
    for (int d = 0; d < 2; d++)
        dup2(file, d + 1);
    close(file);
}

static struct Text capture_end(void) {
    fflush(stdout);
    for (int d = 0; d < 2; d++) {
        dup2(held_descriptor[d], d + 1);
        close(held_descriptor[d]);
    }
    return contents("captured");
}

#if SANITIZED
/* Threads keep their scratch memory for life; OpenMP ends some when their number shrinks. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
    return "leak:thread_scratch";
}
#endif

#ifdef _WIN32
static void expect_end(const char *what, void (*body)(const void *), const void *argument,
                       int status, const char *message) {
    (void)what, (void)body, (void)argument, (void)status, (void)message;
}
static int run_apart(void (*body)(const void *), const void *argument, struct Text *said) {
    return *said = text_of(""), (void)body, (void)argument, 0;
}
static void limit_files(void) {
}
#define mkfifo(path, mode) 0
#define symlink(from, to) 0
enum { FORKS = false };
#else
/* A process of its own for what ends the program. It runs on one thread: OpenMP's do not survive
 * a fork. */
#if SANITIZED && defined(__GLIBC__)
/* what it leaves allocated is no leak of ours */
static void leave(int status, void *nothing) {
    (void)nothing;
    _exit(status);
}
#endif

static int run_apart(void (*body)(const void *), const void *argument, struct Text *said) {
    fflush(stdout);
    capture_begin();
    pid_t child = fork();
    if (child == 0) {
        use_threads(1);
#if SANITIZED && defined(__GLIBC__)
        on_exit(leave, NULL);
#endif
        body(argument);
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    *said = capture_end();
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

enum { FORKS = true };

/* No file can have more than 40,000 bytes from here on. */
static void limit_files(void) {
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &(struct rlimit){40000, 40000}) == 0, "no limit");
}

/* body(argument) must end the program with `status`, a line from align, and `message` in it. */
static void expect_end(const char *what, void (*body)(const void *), const void *argument,
                       int status, const char *message) {
    struct Text said;
    int got = run_apart(body, argument, &said);
    bool good = got == status && strstr(said.data, message) && strncmp(said.data, "align: ", 7) == 0
                && strchr(said.data, '\n') == said.data + said.length - 1;
    if (!good && failed())
        printf("%s: %s: expected exit %d and one line with \"%s\", got exit %d and \"%s\"\n",
               test_name, what, status, message, got, said.data);
}
#endif

/* A command line's words, "align" first: divided by spaces, but for those in '...'. @NAME is a file
 * of the temporary folder, @tokenizer.bin the tokenizer that is in use. */
static const char *const *words_of(const char *line) {
    const char **words = arena_zeros(&test_arena, strlen(line) / 2 + 3, sizeof *words);
    size_t n = 0;
    words[n++] = "align";
    for (const char *at = line; *at; at += strspn(at, " ")) {
        char *word = arena_zeros(&test_arena, strlen(at) + 1, 1);
        size_t length = 0;
        bool quoted = false;
        for (; *at && (quoted || *at != ' '); at++) {
            if (*at == '\'')
                quoted = !quoted;
            else
                word[length++] = *at;
        }
        bool is_tokenizer = strcmp(word, "@tokenizer.bin") == 0;
        words[n++] = is_tokenizer ? tokenizer->path : *word == '@' ? temporary(word + 1) : word;
    }
    return words;
}

/* The command line, as main() takes it apart. */
static void run_command(const void *argument) {
    char *const *argv = argument;
    int argc = 0;
    while (argv[argc])
        argc++;
    const struct Command *command = find_command(argv[1]);
    struct Options o = default_options(command->name);
    parse_arguments(&o, command, argc, (char **)argv);
    quiet = true;
    if (o.help) {
        print_help(command);
        options_close(&o);
        return;
    }
    check_needed(&o, command);
    command->run(&o);
    options_close(&o);
}

/* Models that the harness frees at a test's end, the last made first. */
static struct GPT2 *owned_models[300];
static size_t owned_count;

static struct GPT2 *owned(struct GPT2 *model) {
    CHECK(owned_count < COUNT(owned_models), "test_align: too many models");
    return owned_models[owned_count++] = model;
}

/* Models and batches. */
static void fill_random(struct GPT2 *model) {
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        bool norm = strstr(t->name, "ln_") && t->ndim == 1 && strstr(t->name, "weight");
        for (size_t k = 0; k < t->n; k++)
            t->w[k] = (float)((norm ? 1 : 0) + (t->ndim == 2 ? 0.3 : 0.1) * rng_normal(&test_rng));
    }
}

static struct GPT2 *empty_model(size_t V, size_t T, size_t C, size_t L, size_t NH) {
    int end_token = (int)V - 1;
    return owned(
        gpt2_new((struct GPT2Config){V, T, C, L, NH, end_token, end_token, 1e-5f, end_token, {0}}));
}

static struct GPT2 *random_model(size_t V, size_t T, size_t C, size_t L, size_t NH) {
    struct GPT2 *model = empty_model(V, T, C, L, NH);
    fill_random(model);
    return model;
}

/* A model as a training starts from: small weights. */
static struct GPT2 *new_model(size_t V, size_t T, size_t C, size_t L, size_t NH) {
    struct GPT2 *model = empty_model(V, T, C, L, NH);
    gpt2_init(model, 1);
    return model;
}

static struct Example random_example(size_t n, size_t prompt_length, size_t V) {
    struct Example e = {arena_alloc(&test_arena, n, sizeof(int)), n, prompt_length};
    for (size_t i = 0; i < n; i++)
        e.ids[i] = (int)rng_below(&test_rng, V - 1);
    return e;
}

static struct Example *random_examples(size_t count, size_t n, size_t prompt_length, size_t V) {
    struct Example *examples = arena_alloc(&test_arena, count, sizeof *examples);
    for (size_t i = 0; i < count; i++)
        examples[i] = random_example(n, prompt_length, V);
    return examples;
}

static struct Batch batch_of(const struct Example *examples, size_t n, enum LastToken last) {
    return collate(&test_arena, examples, n, last);
}

/* Gradients are zero after an optimizer step; a test that takes none clears them. */
static void gpt2_zero_grad(struct GPT2 *model) {
    for (size_t i = 0; i < model->tensor_count; i++)
        if (model->tensors[i]->d)
            memset(model->tensors[i]->d, 0, model->tensors[i]->n * sizeof(float));
}

static float *all_gradients(const struct GPT2 *model, size_t *n) {
    size_t at = 0;
    *n = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        *n += model->tensors[i]->n;
    float *all = arena_floats(&test_arena, *n);
    for (size_t i = 0; i < model->tensor_count; at += model->tensors[i++]->n)
        memcpy(all + at, model->tensors[i]->d, model->tensors[i]->n * sizeof *all);
    return all;
}

/* Logits (N,V) of all positions of a batch. */
static float *batch_logits(const struct GPT2 *model, const struct Batch *batch) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    struct Activations acts = gpt2_forward(model, &test_arena, batch, false);
    float *logits = arena_floats(&test_arena, batch->N * V);
    matmul(matrix(logits, batch->N, V), matrix(acts.ln_f, batch->N, C),
           transposed(matrix(model->wte.w, V, C)));
    return logits;
}

static struct Trainer trainer_of(struct GPT2 *model, double learning_rate, size_t steps,
                                 size_t batch_size) {
    struct Trainer trainer = {.model = model, .tok = tokenizer, .args = training_arguments()};
    trainer.args.learning_rate = learning_rate;
    trainer.args.max_steps = steps;
    trainer.args.per_device_train_batch_size = batch_size;
    trainer.args.logging_steps = 1;
    return trainer;
}

static struct LanguageTask *language_task(struct Trainer *trainer, struct Example *examples,
                                          size_t n) {
    struct LanguageTask *task = arena_zeros(&test_arena, 1, sizeof *task);
    task->examples[TO_LEARN] = task->examples[HELD_OUT] = examples;
    trainer->task = (struct Task){
        .name = "test",
        .n = n,
        .data = task,
        .loss = language_loss,
        .targets = language_targets,
    };
    return task;
}

static double logged(const struct Trainer *trainer, size_t entry, const char *name) {
    double value = NAN;
    if (entry < trainer->state.log_count)
        log_find(&trainer->state.log_history[entry], name, &value);
    return value;
}

/* All weights of a model in one row. */
static float *all_weights(const struct GPT2 *model, size_t *n) {
    *n = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        *n += model->tensors[i]->n;
    float *all = arena_floats(&test_arena, *n);
    float *to = all;
    for (size_t i = 0; i < model->tensor_count; to += model->tensors[i++]->n)
        memcpy(to, model->tensors[i]->w, model->tensors[i]->n * sizeof(float));
    return all;
}

static void expect_same_weights(const char *what, const struct GPT2 *got, const struct GPT2 *want) {
    size_t n, m;
    float *a = all_weights(got, &n);
    float *b = all_weights(want, &m);
    expect_count("numbers of weights", n, m);
    if (n == m)
        expect_bits(what, a, b, n);
}

/* =============================================================================================
 * What several chapters' tests use
 * ============================================================================================= */

static struct Json *parse(const char *text, const char **error) {
    size_t where;
    return json_parse(&test_arena, text_of(text), error, &where);
}

static size_t json_count(const struct Json *array) {
    size_t n = 0;
    for (struct Json *item = array->child; item; item = item->next)
        n++;
    return n;
}

static bool json_is_string(const struct Json *json, const char *string) {
    return json && json->type == JSON_STRING && text_equal(json->string, text_of(string));
}

/* The next line of a text, as JSON; NULL at its end. */
static struct Json *next_line(struct Text *file) {
    const char *error;
    const char *stop = memchr(file->data, '\n', file->length);
    size_t where;
    size_t length = stop ? (size_t)(stop - file->data) : file->length;
    struct Json *json =
        length ? json_parse(&test_arena, (struct Text){file->data, length}, &error, &where) : NULL;
    *file =
        (struct Text){file->data + length + (stop != NULL), file->length - length - (stop != NULL)};
    return json;
}

/* JSON with its first `from` replaced. */
static struct Text replaced(struct Text text, const char *from, const char *to) {
    from = json_of(from);
    char *at = memmem(text.data, text.length, from, strlen(from));
    CHECK(at, "test_align: no %s to replace", from);
    size_t before = (size_t)(at - text.data);
    struct Text start =
        text_join(&test_arena, (struct Text){text.data, before}, text_of(json_of(to)));
    return text_join(&test_arena, start,
                     (struct Text){at + strlen(from), text.length - before - strlen(from)});
}

static struct Dataset *dataset_of(const char *rows, const unsigned *shapes, size_t count) {
    return dataset_load(&test_arena, write_json("data.jsonl", rows), shapes, count);
}

static void load_one_model(const void *path) {
    owned(gpt2_load(path));
}

/* A small model in a folder of its own. */
static const char *saved_model(const char *name) {
    struct GPT2 *model = new_model(300, 24, 12, 1, 3);
    reward_head_declare(model);
    model_save(model, temporary(name), tokenizer);
    return temporary(name);
}

/* Runs a command of this program here, on a model and data in the temporary folder; returns what
 * it printed. */
static struct Text command_output(const char *line) {
    const char *const *words = words_of(formatted("%s --tokenizer @tokenizer.bin", line));
    capture_begin();
    run_command(words);
    return capture_end();
}

static struct Json *json_contents(const char *name) {
    return json_read_file(&test_arena, temporary(name));
}

/* What a run logged, from the trainer_state.json in its folder. */
static struct Json *log_history(const char *name) {
    return json_get(json_contents(formatted("%s/trainer_state.json", name)), "log_history");
}

/* What a command printed, one JSON value. */
static struct Json *json_output(const char *line) {
    const char *error;
    return parse(command_output(line).data, &error);
}

/* Texts and pairs for commands that train. */
static void write_films(void) {
    write_json("texts.jsonl", "{'text': 'A good film, and a fine one.'}\n"
                              "{'text': 'A bad film. It is dull and long.'}\n"
                              "{'text': '\xc3\xa9t\xc3\xa9 \\'quoted\\''}\n");
    write_json("pairs.jsonl", "{'prompt': 'A film', 'chosen': ' that is good', "
                              "'rejected': ' that is bad'}\n"
                              "{'prompt': 'It', 'chosen': ' is fine', 'rejected': ' is dull'}\n");
}

static float *narrow(const double *x, size_t n) {
    float *narrowed = arena_floats(&test_arena, n);
    for (size_t i = 0; i < n; i++)
        narrowed[i] = (float)x[i];
    return narrowed;
}

/* Tensor number k of the golden model: 0.3 sin(1.7 k + 0.61 i + 0.003 i i); layer norms 1 + a
 * third of it. */
static void golden_fill(struct Tensor *t, double k) {
    bool norm = strstr(t->name, "ln_") && strstr(t->name, "weight");
    for (size_t i = 0; i < t->n; i++) {
        double v = 0.3 * sin(1.7 * k + 0.61 * (double)i + 0.003 * (double)i * (double)i);
        t->w[i] = (float)(norm ? 1 + v / 3 : v);
    }
}

static struct GPT2 *golden_model(void) {
    struct GPT2 *model = empty_model(61, 16, 16, 2, 2);
    for (size_t k = 0; k < model->tensor_count; k++)
        golden_fill(model->tensors[k], (double)k);
    return model;
}

/* The golden sequences: 12 and 7 tokens, every one but the first predicted. */
static struct Example *golden_examples(void) {
    struct Example *examples = arena_alloc(&test_arena, 2, sizeof *examples);
    for (int b = 0; b < 2; b++) {
        examples[b] = (struct Example){arena_alloc(&test_arena, 12, sizeof(int)), b ? 7 : 12, 1};
        for (int t = 0; t < (b ? 7 : 12); t++)
            examples[b].ids[t] = (7 * t * t + 11 * t + 5 * b + 3) % 61;
    }
    return examples;
}

static struct GenerationConfig sampling(double temperature, size_t top_k, double top_p) {
    struct GenerationConfig config = generation_config();
    config.do_sample = true;
    config.temperature = temperature;
    config.top_k = top_k;
    config.top_p = top_p;
    return config;
}

/* =============================================================================================
 * Part I - The ideas
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 1 - Ground
 *
 * Memory that is given out in pieces must keep the pieces apart, and a random number generator
 * must give its authors' numbers: everything that is drawn later rests on it.
 * ============================================================================================= */

/* Pieces of an arena: aligned, disjoint, zeroed where asked; a reset merges the blocks into one. */
static void test_arena_pieces(void) {
    struct Arena arena = {0};
    unsigned char *piece[200];
    for (size_t round = 0; round < 3; round++) {
        for (size_t i = 0; i < COUNT(piece); i++) {
            piece[i] = arena_zeros(&arena, i * 37, 3);
            expect_true("on a 64-byte boundary", (uintptr_t)piece[i] % 64 == 0);
            for (size_t k = 0; k < i * 111; k++)
                if (piece[i][k]) {
                    expect_true("zeroed", false);
                    break;
                }
            memset(piece[i], (int)i, i * 111);
        }
        for (size_t i = 0; i < COUNT(piece); i++)
            for (size_t k = 0; k < i * 111; k++)
                if (piece[i][k] != (unsigned char)i) {
                    expect_true("untouched by its neighbours", false);
                    break;
                }
        arena_reset(&arena);
        if (ARENA_PIECEWISE)
            continue;
        if (round > 0)
            expect_true("one block after the first round",
                        arena.blocks && !arena.blocks->next && arena.blocks->used == 0);
    }
    expect_true("larger than any block", arena_alloc(&arena, 40, 1 << 20) != NULL);
    arena_free(&arena);
    expect_true("empty after arena_free", arena.blocks == NULL);
}

/* Texts in an arena keep their bytes, NUL included. */
static void test_arena_text(void) {
    struct Text a = {"a\0b", 3};
    struct Text joined = text_join(&test_arena, a, text_of("cd"));
    struct Text empty = {0};
    expect_true("joined", joined.length == 5 && memcmp(joined.data, "a\0bcd", 6) == 0);
    expect_text("with nothing", text_join(&test_arena, empty, text_of("x")), "x");
    expect_text("copy of nothing", text_copy(&test_arena, empty), "");
    expect_text("printf", text_of(formatted("%s-%d", "n", 7)), "n-7");
}

/* xoshiro256++ and splitmix64 give the numbers that their authors publish. */
static void test_rng_known(void) {
    struct Rng rng = {{1, 2, 3, 4}};
    static const uint64_t xoshiro[] = {41943041u, 58720359u, 3588806011781223u, 3591011842654386u,
                                       9228616714210784205u};
    for (size_t i = 0; i < COUNT(xoshiro); i++)
        expect_true("xoshiro256++ from 1, 2, 3, 4", rng_next(&rng) == xoshiro[i]);
    uint64_t state = 0;
    expect_true("splitmix64 from 0", splitmix64(&state) == 0xe220a8397b1dcdafu
                                         && splitmix64(&state) == 0x6e789e6aa1b965f4u);
    struct Rng a = rng_seed(1, STREAM_INIT);
    struct Rng b = rng_seed(1, STREAM_ORDER);
    struct Rng c = rng_seed(2, STREAM_INIT);
    uint64_t first = rng_next(&a);
    expect_true("streams and seeds differ", first != rng_next(&b) && first != rng_next(&c));
}

/* Means and variances of the distributions; shuffles are permutations, every place equally likely.
 */
static void test_rng_distributions(void) {
    enum { N = 40000 };
    double sum = 0;
    double square = 0;
    double normal = 0;
    double normal_square = 0;
    size_t below[7] = {0};
    size_t place[5] = {0};
    for (size_t i = 0; i < N; i++) {
        double u = rng_uniform(&test_rng);
        double z = rng_normal(&test_rng);
        expect_true("in [0, 1)", u >= 0 && u < 1);
        sum += u;
        square += u * u;
        normal += z;
        normal_square += z * z;
        below[rng_below(&test_rng, 7)]++;
        size_t items[5] = {0, 1, 2, 3, 4};
        size_t seen = 0;
        if (i % 4 == 0)
            rng_shuffle(&test_rng, items, 5);
        for (size_t k = 0; k < 5; k++)
            seen |= (size_t)1 << items[k];
        expect_count("a permutation", seen, 31);
        if (i % 4 == 0)
            place[items[0]]++;
    }
    expect_close("mean of uniform", sum / N, 0.5, 0.01);
    expect_close("second moment of uniform", square / N, 1.0 / 3, 0.01);
    expect_close("mean of normal", normal / N, 0, 0.025);
    expect_close("second moment of normal", normal_square / N, 1, 0.04);
    for (size_t k = 0; k < 7; k++)
        expect_close("share of each number below 7", (double)below[k] / N, 1.0 / 7, 0.01);
    for (size_t k = 0; k < 5; k++)
        expect_close("share of each first item", (double)place[k] / (N / 4.0), 0.2, 0.02);
}

/* =============================================================================================
 * Chapter 2 - Probability
 *
 * Each function by hand, against torch where torch has it, and where a plain formula would
 * overflow. The fast loops over rows are held to plain ones.
 * ============================================================================================= */

/* By hand, torch's log sigmoid, and extremes where the plain formula overflows. */
static void test_sigmoid(void) {
    expect_close("sigmoid(0)", sigmoid(0), 0.5, 0);
    expect_close("sigmoid(2)", sigmoid(2), 0.8808, 5e-5);
    expect_close("sigmoid(-2)", sigmoid(-2), 1 - sigmoid(2), 1e-15);
    expect_true("no overflow", sigmoid(-1000) == 0 && sigmoid(1000) == 1);
    expect_close("log sigmoid(0)", log_sigmoid(0), -log(2), 1e-15);
    expect_close("log sigmoid(2)", log_sigmoid(2), -0.1269, 5e-5);
    expect_close("log sigmoid(-800)", log_sigmoid(-800), -800, 0);
    static const double torch[][2] = {{-100, -100},          {-20, -20},
                                      {-1, -1.31326169},     {0, -0.693147181},
                                      {1, -0.313261688},     {20, -2.06115362e-09},
                                      {100, -3.72007598e-44}};
    for (size_t i = 0; i < COUNT(torch); i++)
        expect_relative("log sigmoid", log_sigmoid(torch[i][0]), torch[i][1], 1e-8);
}

/* By hand, torch's, and logits so large or small that e^x alone would not do. */
static void test_softmax(void) {
    float x[] = {0, logf(3)};
    float five[] = {1, 2, 3, 4, -1};
    float large[] = {1000, 1000, -INFINITY, -1000};
    float scratch[5];
    softmax(x, 2);
    expect_floats("[0, ln 3]", x, (double[]){0.25, 0.75}, 2, 1e-7);
    expect_close("log_sum_exp", log_sum_exp(five, 5, scratch), 4.44451897, 1e-6);
    softmax(five, 5);
    expect_floats("five, torch", five,
                  (double[]){0.0319201128, 0.0867678625, 0.235859504, 0.641132603, 0.0043199175}, 5,
                  1e-7);
    softmax(large, 4);
    expect_floats("large ones", large, (double[]){0.5, 0.5, 0, 0}, 4, 1e-7);
}

/* By hand, torch's and TRL's. */
static void test_entropy(void) {
    float two[] = {5, 5};
    float five[] = {1, 2, 3, 4, -1};
    float banned[] = {0, -INFINITY, 0};
    float scratch[7];
    expect_close("two equal logits", entropy_of_logits(two, log_sum_exp(two, 2, scratch), 2),
                 log(2), 1e-6);
    expect_close("five, torch", entropy_of_logits(five, log_sum_exp(five, 5, scratch), 5),
                 0.971274128, 1e-6);
    expect_close("with a banned one", entropy_of_logits(banned, log_sum_exp(banned, 3, scratch), 3),
                 log(2), 1e-6);
    static const double trl[24] = {1.46446431, 1.48964322, 1.45615435, 1.31341207, 1.31366122,
                                   1.2903558,  1.32972217, 1.46224737, 1.48970628, 1.45869637,
                                   1.31994045, 1.30396509, 1.29932439, 1.32318115, 1.45990467,
                                   1.48971915, 1.46110308, 1.32648385, 1.29472613, 1.30880988,
                                   1.31664169, 1.4574306,  1.48968089, 1.46338153};
    for (size_t row = 0; row < 24; row++) {
        float logits[7];
        for (size_t v = 0; v < 7; v++)
            logits[v] = (float)(2 * sin(0.1 + 0.77 * (double)(7 * row + v)));
        expect_close("TRL's entropy_from_logits",
                     entropy_of_logits(logits, log_sum_exp(logits, 7, scratch), 7), trl[row], 2e-6);
    }
}

/* By hand; zero between equals; the estimates k1 and k3; torch's divergence of two models. */
static void test_kl(void) {
    float p[] = {0, 0};
    float q[] = {0, logf(3)};
    float scratch[2];
    float p_lse = log_sum_exp(p, 2, scratch);
    float q_lse = log_sum_exp(q, 2, scratch);
    expect_close("(1/2, 1/2) || (1/4, 3/4)", kl_exact(p, p_lse, q, q_lse, 2),
                 log(2) / 2 + log(2.0 / 3) / 2, 1e-6);
    expect_close("that is", kl_exact(p, p_lse, q, q_lse, 2), 0.1438, 5e-5);
    expect_close("with itself", kl_exact(q, q_lse, q, q_lse, 2), 0, 0);
    float cut[] = {0, -INFINITY};
    expect_close("(1, 0) || (1/2, 1/2): a cut token adds nothing", kl_exact(cut, 0, p, p_lse, 2),
                 log(2), 1e-6);
    expect_close("k1", kl_k1(-1, -1.5), 0.5, 0);
    expect_close("k3", kl_k3(-1, -1.5), exp(-0.5) - 1 + 0.5, 1e-15);
    expect_close("mean of k1 under p",
                 (kl_k1(log(0.5), log(0.25)) + kl_k1(log(0.5), log(0.75))) / 2, 0.1438, 5e-5);
    expect_close("mean of k3 under p",
                 (kl_k3(log(0.5), log(0.25)) + kl_k3(log(0.5), log(0.75))) / 2, 0.1438, 5e-5);
    expect_close("sum of log-probabilities",
                 sequence_logprob((float[]){logf(0.5f), logf(0.25f)}, 2), -2.0794, 5e-5);
}

/* exp_fast against the C library's exp over its whole range, and at its ends. */
static void test_exp_fast(void) {
    double worst = 0;
    for (double x = -87; x <= 87; x += 0.000731)
        worst = MAX(worst, fabs(exp_fast((float)x) / exp((float)x) - 1));
    expect_true("worst relative error below 2e-7", worst < 2e-7);
    expect_true("e^0", exp_fast(0) == 1 && exp_fast(-0.0f) == 1);
    expect_true("below -87: 0",
                exp_fast(-87.01f) == 0 && exp_fast(-1e30f) == 0 && exp_fast(-INFINITY) == 0);
    expect_relative("above 87: e^87", exp_fast(1e30f), exp(87), 1e-6);
    expect_relative("at infinity too", exp_fast(INFINITY), exp(87), 1e-6);
}

/* Sums, maxima and products over rows of every length near the lanes' number, against plain loops.
 */
static void test_rows(void) {
    for (size_t n = 1; n < 70; n++) {
        float *x = random_floats(n, 3);
        float *y = random_floats(n, 1);
        float *e = random_floats(n, 1);
        float most = -INFINITY;
        double sum = 0;
        double exponentials = 0;
        for (size_t i = 0; i < n; i++) {
            most = MAX(most, x[i]);
            sum += x[i];
            exponentials += exp((double)x[i] - 1);
        }
        expect_close("row_max", row_max(x, n), most, 0);
        expect_true("argmax", x[argmax(x, n)] == most);
        expect_close("row_sum", row_sum(x, n), sum, 1e-4);
        expect_close("row_dot", row_dot(x, y, n), dot_product(x, y, n), 1e-4);
        expect_relative("row_exp", row_exp(e, x, 1, n), exponentials, 1e-6);
    }
}

/* The largest: the first among equals, among negative numbers, zeros and infinities. */
static void test_rows_argmax(void) {
    float equal[] = {-1, 2, 2, -3};
    float negative[] = {-5, -2, -9};
    float zeros[] = {-0.0f, 0.0f};
    float banned[] = {-INFINITY, -INFINITY, -7};
    expect_count("first among equals", argmax(equal, 4), 1);
    expect_close("all negative", row_max(negative, 3), -2, 0);
    expect_close("zeros", row_max(zeros, 2), 0, 0);
    expect_count("after infinities", argmax(banned, 3), 2);
}

/* =============================================================================================
 * Chapter 3 - Preferences
 *
 * Which ratings make a pair, and which are too close to call.
 * ============================================================================================= */

/* Who is preferred to whom, by hand. */
static void test_data_pairs(void) {
    struct Pair pairs[10];
    expect_count("pairs", pairs_from_ratings((double[]){2, 0, 0.5}, 3, 1, pairs), 2);
    expect_true("(0,1), (0,2)", pairs[0].chosen == 0 && pairs[0].rejected == 1
                                    && pairs[1].chosen == 0 && pairs[1].rejected == 2);
    expect_count("the later one is better", pairs_from_ratings((double[]){-1, 1}, 2, 2, pairs), 1);
    expect_true("(1,0)", pairs[0].chosen == 1 && pairs[0].rejected == 0 && pairs[0].margin == 0);
    expect_count("equal ratings never pair", pairs_from_ratings((double[]){1, 1, 1}, 3, 0, pairs),
                 0);
    expect_count("every pair", pairs_from_ratings((double[]){1, 2, 3, 4, 5}, 5, 0, pairs), 10);
}

/* =============================================================================================
 * Chapters 3 to 5 - Every loss of pairs, texts and tokens, in one table
 *
 * A row is a case: the numbers x that the loss is to be differentiated by, what else it takes, and
 * what must come out, the loss and its slope by each x. One loop compares them, and the slopes with
 * central differences. The row's first word is the test that runs it; `source` says who computed
 * the numbers.
 * ============================================================================================= */

struct LossCase {
    const char *test, *name, *source;
    double (*loss)(const struct LossCase *c, const double *x, double *dx);
    double x[18];
    size_t n;
    double want, slope[18];
    bool differences_alone; /* no loss and no slopes are given */
    double tolerance; /* of loss and slopes; 0: 1e-12 */
    double difference_tolerance; /* 0: 1e-8 */
    struct Pair pairs[4]; /* Bradley-Terry */
    size_t pair_count;
    double center;
    double labels[2]; /* sentiment */
    double old,
        target; /* PPO, for all tokens: the old log-probability or value; advantage, return */
    float advantages[2]; /* REINFORCE */
    struct GRPOConfig grpo; /* GRPO: x are a token's log ratio and its log-probability, in turn */
    struct DPOConfig config; /* DPO: x are the chosen answers, then the rejected ones */
    double ref[6];
    size_t lengths[6];
};

static double bradley_terry_case(const struct LossCase *c, const double *x, double *dx) {
    float d[COUNT(c->x)];
    double loss = bradley_terry_loss(narrow(x, c->n), c->n, c->pairs, c->pair_count, c->center, d);
    memcpy(dx, widen(d, c->n), c->n * sizeof *dx);
    return loss;
}

static double sentiment_case(const struct LossCase *c, const double *x, double *dx) {
    float d[COUNT(c->x)];
    double loss = sentiment_loss(narrow(x, c->n), c->labels, c->n, d);
    memcpy(dx, widen(d, c->n), c->n * sizeof *dx);
    return loss;
}

static double reinforce_case(const struct LossCase *c, const double *x, double *dx) {
    return reinforce_loss(c->advantages, x, c->n, dx);
}

/* The sum over a row's tokens. */
static double ppo_token_case(const struct LossCase *c, const double *x, double *dx) {
    double sum = 0;
    for (size_t t = 0; t < c->n; t++) {
        struct TokenLoss token = ppo_token_loss(c->old, x[t], c->target, 0.2);
        dx[t] = token.dlogprob;
        sum += token.loss;
    }
    return sum;
}

static double ppo_value_case(const struct LossCase *c, const double *x, double *dx) {
    double sum = 0;
    for (size_t t = 0; t < c->n; t++) {
        struct ValueLoss value = ppo_value_loss(c->old, x[t], c->target, 0.2);
        dx[t] = value.dvalue;
        sum += value.loss;
    }
    return sum;
}

/* The sum over a row's tokens; c->target is their advantage, c->ref[0] the reference's
 * log-probability of each. */
static double grpo_token_case(const struct LossCase *c, const double *x, double *dx) {
    double sum = 0;
    for (size_t i = 0; i < c->n; i += 2) {
        struct GRPOTokenLoss token =
            grpo_token_loss(&c->grpo, x[i], c->target, x[i + 1], c->ref[0]);
        dx[i] = token.dlog_ratio;
        dx[i + 1] = token.dlogprob;
        sum += token.loss;
    }
    return sum;
}

static double dpo_case(const struct LossCase *c, const double *x, double *dx) {
    struct DPOSide side[6];
    for (size_t i = 0; i < c->n; i++)
        side[i] = (struct DPOSide){.logp = x[i], .ref_logp = c->ref[i], .length = c->lengths[i]};
    double loss = dpo_loss(&c->config, c->n / 2, side, side + c->n / 2);
    for (size_t i = 0; i < c->n; i++)
        dx[i] = side[i].dlogp;
    return loss;
}

#define CASE(in_test, called, by, function, ...) \
    {.test = in_test, .name = called, .source = by, .loss = function, __VA_ARGS__}
#define INPUTS(...) .x = {__VA_ARGS__}, .n = sizeof(double[]){__VA_ARGS__} / sizeof(double)
#define GIVES(loss, ...) .want = (loss), .slope = {__VA_ARGS__}
#define PAIRS(...) \
    .pairs = {__VA_ARGS__}, .pair_count = sizeof(struct Pair[]){__VA_ARGS__} / sizeof(struct Pair)
#define RATIOS                                                                                 \
    INPUTS(-0.5, -0.43, -0.36, -0.29, -0.22, -0.15, -0.08, -0.01, 0.06, 0.13, 0.2, 0.27, 0.34, \
           0.41, 0.48),                                                                        \
        .differences_alone = true
#define GRPO(by_beta, corrected)   \
    .grpo = {.epsilon = 0.2,       \
             .epsilon_high = 0.28, \
             .beta = by_beta,      \
             .use_bias_correction_kl = corrected}
#define LOG_1_25 0.22314355131420976
#define LOG_1_5 0.40546510810816438
#define LOG_HALF -0.69314718055994531
#define GRPO_RATIOS                                                                              \
    INPUTS(-0.5, -2, -0.35, -1.5, -0.25, -1, -0.2, -0.5, -0.05, -3, 0.05, -0.8, 0.2, -1.2, 0.27, \
           -0.2, 0.45, -4),                                                                      \
        .ref = {-1.1}, .differences_alone = true
#define BETA(by_beta, ...) .config = {.beta = by_beta, .weight = {__VA_ARGS__}}
#define SMOOTHED .config.label_smoothing = 0.1
/* rewards are floats, and so are their slopes */
#define FLOATS .tolerance = 1e-7, .difference_tolerance = 1e-7
#define CHAPTER_5 INPUTS(-8, -13), .ref = {-10, -12}, .lengths = {4, 2}
#define TRL_PAIRS                                                                        \
    INPUTS(-12.5, -30.25, -8, -14, -25.5, -21.75),                                       \
        .ref = {-13.25, -29, -10.5, -13, -26.75, -9.25}, .lengths = {5, 11, 3, 4, 9, 6}, \
        .tolerance = 1e-6
#define UNMOVED(beta)                                                                 \
    CASE("dpo_hand", "policy = reference, beta " #beta ": ln 2", "by hand", dpo_case, \
         INPUTS(-10, -10), .ref = {-10, -10}, BETA(beta, [DPO_SIGMOID] = 1),          \
         GIVES(0.69314718055994531, -beta / 2, beta / 2))

static const struct LossCase LOSS_CASES[] = {
    CASE("bradley_terry", "2.0 against 0.5; one text in no pair", "by hand", bradley_terry_case,
         INPUTS(2, 0.5, 0.5), PAIRS({0, 1, 0}), GIVES(0.2014133, -0.1824255, 0.1824255, 0), FLOATS),
    CASE("bradley_terry", "centred with 0.01: 0.0625 more", "by hand", bradley_terry_case,
         INPUTS(2, 0.5), PAIRS({0, 1, 0}), .center = 0.01, GIVES(0.2639133, -0.1324255, 0.2324255),
         FLOATS),
    CASE("bradley_terry", "two pairs: the mean", "by hand", bradley_terry_case, INPUTS(2, 0.5, 0.5),
         PAIRS({0, 1, 0}, {1, 2, 0}), GIVES(0.4472802, -0.0912128, -0.1587872, 0.25), FLOATS),
    CASE("bradley_terry", "a margin of 1.5 makes it even: ln 2", "by hand", bradley_terry_case,
         INPUTS(2, 0.5), PAIRS({0, 1, 1.5}), GIVES(0.69314718, -0.5, 0.5), FLOATS),
    CASE("bradley_terry", "hopelessly wrong", "by hand", bradley_terry_case, INPUTS(-1000, 1000),
         PAIRS({0, 1, 0}), GIVES(2000, -1, 1), .tolerance = 1e-9),
    CASE("bradley_terry_gradient", "four pairs, margins, centred", "the formula in Python",
         bradley_terry_case, INPUTS(0.5, -1, 2, 0.25, 1),
         PAIRS({0, 1, 0}, {2, 0, 0.5}, {3, 2, 0}, {1, 3, 1}), .center = 0.03,
         GIVES(1.28471392, 0.05162897, -0.19930625, 0.21700285, 0.03567443, 0), FLOATS),

    CASE("sentiment_loss", "r = 0, liked: ln 2", "by hand", sentiment_case, INPUTS(0),
         .labels = {1}, GIVES(0.6931471806, -0.5), .tolerance = 1e-9),
    CASE("sentiment_loss", "r = 2, disliked: 2.1269; the mean of both", "by hand", sentiment_case,
         INPUTS(0, 2), .labels = {1, 0}, GIVES(1.4100376, -0.25, 0.4403985), FLOATS),
    CASE("sentiment_loss", "hopelessly wrong", "by hand", sentiment_case, INPUTS(-1000),
         .labels = {1}, GIVES(1000, -1), .tolerance = 1e-9),

    CASE("reinforce_loss", "a good answer and a bad one", "by hand", reinforce_case, INPUTS(-2, -1),
         .advantages = {4.5f, -3}, GIVES(3, -2.25, 1.5)),

    CASE("ppo_token_loss", "ratio 1.5, A = 2: clipped", "by hand", ppo_token_case,
         INPUTS(0.40546510810816438), .target = 2, GIVES(-2.4, 0)),
    CASE("ppo_token_loss", "ratio 1.5, A = -2: still pushed down", "by hand", ppo_token_case,
         INPUTS(0.40546510810816438), .target = -2, GIVES(3, 3)),
    CASE("ppo_token_loss", "at first: ratio 1, loss -A", "by hand", ppo_token_case, INPUTS(-3),
         .old = -3, .target = 0.7, GIVES(-0.7, -0.7)),
    CASE("ppo_token_loss", "ratios 0.6 to 1.6, A = 1", "central differences", ppo_token_case,
         RATIOS, .target = 1),
    CASE("ppo_token_loss", "ratios 0.6 to 1.6, A = -1", "central differences", ppo_token_case,
         RATIOS, .target = -1),

    CASE("ppo_value_loss", "0.4 above the old value: clipped", "by hand", ppo_value_case,
         INPUTS(0.9), .old = 0.5, .target = 1, GIVES(0.045, 0)),
    CASE("ppo_value_loss", "inside the range", "by hand", ppo_value_case, INPUTS(0.6), .old = 0.5,
         .target = 1, GIVES(0.08, -0.4)),
    CASE("ppo_value_loss", "values -0.95 to 0.92", "central differences", ppo_value_case,
         INPUTS(-0.95, -0.84, -0.73, -0.62, -0.51, -0.4, -0.29, -0.18, -0.07, 0.04, 0.15, 0.26,
                0.37, 0.48, 0.59, 0.7, 0.81, 0.92),
         .differences_alone = true, .old = 0.1, .target = 0.35),

    CASE("grpo_token_loss", "ratio 1.25, A = 2: not clipped", "by hand", grpo_token_case,
         INPUTS(LOG_1_25, -1), .target = 2, GRPO(0, false), GIVES(-2.5, -2.5, 0)),
    CASE("grpo_token_loss", "ratio 1.5, A = 2: clipped at 1.28", "by hand", grpo_token_case,
         INPUTS(LOG_1_5, -1), .target = 2, GRPO(0, false), GIVES(-2.56, 0, 0)),
    CASE("grpo_token_loss", "ratio 1.5, A = -2: still pushed down", "by hand", grpo_token_case,
         INPUTS(LOG_1_5, -1), .target = -2, GRPO(0, false), GIVES(3, 3, 0)),
    CASE("grpo_token_loss", "ratio 0.5, A = -2: clipped at 0.8", "by hand", grpo_token_case,
         INPUTS(LOG_HALF, -1), .target = -2, GRPO(0, false), GIVES(1.6, 0, 0)),
    CASE("grpo_token_loss", "with the KL", "by hand", grpo_token_case, INPUTS(LOG_1_5, -1),
         .target = 2, .ref = {-1.5}, GRPO(0.1, false), GIVES(-2.5493, 0, 0.0393),
         .tolerance = 5e-5),
    CASE("grpo_token_loss", "with the KL times the ratio", "by hand", grpo_token_case,
         INPUTS(LOG_1_5, -1), .target = 2, .ref = {-1.5}, GRPO(0.1, true),
         GIVES(-2.5440, 0.0160, 0.0590), .tolerance = 5e-5),
    CASE("grpo_token_loss", "ratios 0.6 to 1.6, A = 1", "central differences", grpo_token_case,
         GRPO_RATIOS, .target = 1, GRPO(0.1, false)),
    CASE("grpo_token_loss", "ratios 0.6 to 1.6, A = 1, corrected", "central differences",
         grpo_token_case, GRPO_RATIOS, .target = 1, GRPO(0.1, true)),
    CASE("grpo_token_loss", "ratios 0.6 to 1.6, A = -1", "central differences", grpo_token_case,
         GRPO_RATIOS, .target = -1, GRPO(0.1, false)),
    CASE("grpo_token_loss", "ratios 0.6 to 1.6, A = -1, corrected", "central differences",
         grpo_token_case, GRPO_RATIOS, .target = -1, GRPO(0.1, true)),

    CASE("dpo_hand", "chapter 5's pair", "by hand", dpo_case, CHAPTER_5,
         BETA(0.1, [DPO_SIGMOID] = 1), GIVES(0.5544, -0.0426, 0.0426), .tolerance = 5e-5),
    CASE("dpo_hand", "smoothed", "by hand", dpo_case, CHAPTER_5, BETA(0.1, [DPO_SIGMOID] = 1),
         SMOOTHED, GIVES(0.5844, -0.0326, 0.0326), .tolerance = 5e-5),
    CASE("dpo_hand", "robust", "by hand", dpo_case, CHAPTER_5, BETA(0.1, [DPO_ROBUST] = 1),
         SMOOTHED, GIVES(0.5169, -0.0551, 0.0551), .tolerance = 5e-5),
    CASE("dpo_hand", "hinge", "by hand", dpo_case, CHAPTER_5, BETA(0.1, [DPO_HINGE] = 1),
         GIVES(0.7, -0.1, 0.1)),
    CASE("dpo_hand", "ipo", "by hand", dpo_case, CHAPTER_5, BETA(0.1, [DPO_IPO] = 1),
         GIVES(16, -2, 4)),
    UNMOVED(0.01),
    UNMOVED(0.07),
    UNMOVED(0.49),
    UNMOVED(3.43),
    UNMOVED(7.0),
    CASE("dpo_hand", "hopelessly wrong", "by hand", dpo_case, INPUTS(-1000, 0),
         BETA(1, [DPO_SIGMOID] = 1), GIVES(1000, -1, 1)),

    CASE("dpo_golden", "sigmoid", "TRL, golden_dpo_sigmoid", dpo_case, TRL_PAIRS,
         BETA(0.1, [DPO_SIGMOID] = 1),
         GIVES(0.545607686, -0.0152120441, -0.018739216, -0.00608085049, 0.0152120441, 0.018739216,
               0.00608085049)),
    CASE("dpo_golden", "sigmoid, smoothed", "TRL, golden_dpo_sigmoid_smooth", dpo_case, TRL_PAIRS,
         BETA(0.1, [DPO_SIGMOID] = 1), SMOOTHED,
         GIVES(0.5931077, -0.0118787102, -0.0154058849, -0.00274751731, 0.0118787102, 0.0154058849,
               0.00274751731)),
    CASE("dpo_golden", "robust", "TRL, golden_dpo_robust", dpo_case, TRL_PAIRS,
         BETA(0.1, [DPO_ROBUST] = 1), SMOOTHED,
         GIVES(0.486232668, -0.0193787105, -0.0229058824, -0.0102475174, 0.0193787105, 0.0229058824,
               0.0102475174)),
    CASE("dpo_golden", "hinge", "TRL, golden_dpo_hinge", dpo_case, TRL_PAIRS,
         BETA(0.1, [DPO_HINGE] = 1),
         GIVES(0.691666663, -0.0333333351, -0.0333333351, 0, 0.0333333351, 0.0333333351, 0)),
    CASE("dpo_golden", "ipo", "TRL, golden_dpo_ipo", dpo_case, TRL_PAIRS, BETA(0.1, [DPO_IPO] = 1),
         GIVES(17.696434, -0.613333344, -0.318334877, -0.462963015, 0.766666651, 0.389075965,
               0.231481507)),
    CASE("dpo_golden", "sft", "TRL, golden_dpo_sft", dpo_case, TRL_PAIRS, BETA(0.1, [DPO_SFT] = 1),
         GIVES(2.67105269, -0.0526315793, -0.0526315793, -0.0526315793, 0, 0, 0)),
    CASE("dpo_golden", "sigmoid sft", "TRL, golden_dpo_sigmoid_sft", dpo_case, TRL_PAIRS,
         BETA(0.1, [DPO_SIGMOID] = 1, [DPO_SFT] = 0.5),
         GIVES(1.88113403, -0.0415278338, -0.0450550057, -0.0323966406, 0.0152120441, 0.018739216,
               0.00608085049)),
};

static void expect_loss(const struct LossCase *c) {
    const double h = 1.0 / 1024; /* a float can hold x + h */
    double tolerance = c->tolerance ? c->tolerance : 1e-12;
    double dx[COUNT(c->x)], unused[COUNT(c->x)], x[COUNT(c->x)];
    double loss = c->loss(c, c->x, dx);
    const char *what = formatted("%s (%s)", c->name, c->source);
    if (!c->differences_alone) {
        expect_close(what, loss, c->want, tolerance);
        expect_doubles(what, dx, c->slope, c->n, tolerance);
    }
    memcpy(x, c->x, sizeof x);
    for (size_t k = 0; k < c->n; k++) {
        double value[4];
        for (int i = 0; i < 4; i++) {
            x[k] = c->x[k] + SLOPE_STEPS[i] * h;
            value[i] = c->loss(c, x, unused);
        }
        x[k] = c->x[k];
        expect_close(formatted("%s: central difference %zu", c->name, k), dx[k], slope_of(value, h),
                     c->difference_tolerance ? c->difference_tolerance : 1e-8);
    }
}

static bool is_test(const char *name);

/* The rows of the test that runs. */
static void test_losses(void) {
    for (size_t i = 0; i < COUNT(LOSS_CASES); i++) {
        expect_true(LOSS_CASES[i].test, is_test(LOSS_CASES[i].test));
        if (strcmp(LOSS_CASES[i].test, test_name) == 0)
            expect_loss(&LOSS_CASES[i]);
    }
}

/* =============================================================================================
 * Chapter 4 - Policy gradient
 *
 * The parts of REINFORCE and PPO that are functions of numbers alone: whitening, baselines,
 * penalties, advantages, the losses. TRL's numbers are those of three answers of 6, 4 and 3
 * tokens.
 * ============================================================================================= */

static double golden_val(int i) {
    return 0.5 * sin(0.2 + 0.9 * i);
}

/* TRL's three rows of 8 positions: responses of 6, 4 and 3 tokens that start at columns 2, 1, 3.
 * golden.py prints all 24 numbers; here are the 13 of responses, side by side. */
static const size_t GOLDEN_START[] = {0, 6, 10, 13}, GOLDEN_COLUMN[] = {2, 1, 3};

/* The 13 entries of (3,8) that are response tokens, by a formula of the flat index. */
static float *packed_formula(double (*value)(int)) {
    float *x = arena_floats(&test_arena, 13);
    for (size_t b = 0, r = 0; b < 3; b++)
        for (size_t k = 0; k < GOLDEN_START[b + 1] - GOLDEN_START[b]; k++)
            x[r++] = (float)value((int)(8 * b + GOLDEN_COLUMN[b] + k));
    return x;
}

/* Masked mean, variance, whitening against TRL's. */
static void test_ppo_whiten_golden(void) {
    static const double mean = -0.105236657;
    static const double variance = 0.12100514;
    static const double whitened[] = {1.60952294,   0.646417081, -0.576937497, -1.13473034,
                                      -0.604835033, 0.611734331, 1.59928083,   0.622902572,
                                      -0.595929027, -1.13482654, -1.13451648,  -0.566839874,
                                      0.658756673};
    static const double mean_kept[] = {1.50428629,   0.541180432, -0.682174146, -1.23996699,
                                       -0.710071683, 0.506497681, 1.49404418,   0.517665923,
                                       -0.701165676, -1.24006319, -1.23975313,  -0.672076523,
                                       0.553520024};
    float *x = packed_formula(golden_val);
    float scores[] = {1.5f, -0.75f, 0.25f};
    expect_close("mean", mean_of(x, 13), mean, 1e-7);
    expect_close("variance", unbiased_variance(x, 13), variance, 1e-7);
    double zero = whiten(x, 13, true);
    expect_floats("whitened", x, whitened, 13, 2e-6);
    expect_close("a zero there", zero, -mean / sqrt(variance), 1e-5);
    x = packed_formula(golden_val);
    whiten(x, 13, false);
    expect_floats("mean kept", x, mean_kept, 13, 2e-6);
    whiten(scores, 3, true);
    expect_floats("three scores", scores, (double[]){1.03490973, -0.960987687, -0.0739221349}, 3,
                  1e-6);
    float one[] = {5};
    whiten(one, 1, true);
    expect_close("one number", one[0], 0, 0);
}

/* By hand: three answers to one prompt, then two to another. */
static void test_reinforce_advantages(void) {
    float rewards[] = {1, 2, 6, 0, 4, 5};
    float a[6];
    reinforce_advantages(BASELINE_NONE, rewards, 6, 3, 9, a);
    expect_floats("none", a, (double[]){1, 2, 6, 0, 4, 5}, 6, 0);
    reinforce_advantages(BASELINE_MEAN, rewards, 6, 3, 1.5, a);
    expect_floats("running mean 1.5", a, (double[]){-0.5, 0.5, 4.5, -1.5, 2.5, 3.5}, 6, 0);
    reinforce_advantages(BASELINE_RLOO, rewards, 6, 3, 9, a);
    expect_floats("leave one out", a, (double[]){-3, -1.5, 4.5, -4.5, 1.5, 3}, 6, 1e-6);
    expect_close("R: score less beta KL", reinforce_reward(1, 0.1, -8, -10), 0.8, 1e-12);
}

/* How noisy a gradient is, by hand. */
static void test_reinforce_advantages_variance(void) {
    float s[] = {1, 1, 2, 0};
    float wide[] = {1, 3};
    expect_close("variance by hand", gradient_variance(wide, s, 2, 1), 1, 1e-9);
    expect_close("two weights: (1,1), (6,0): (2.5^2 + 0.5^2) * 2 / 2",
                 gradient_variance(wide, s, 2, 2), 6.5, 1e-6);
    expect_close("a baseline that fits leaves none", gradient_variance((float[]){0, 0}, s, 2, 2), 0,
                 0);
}

static double golden_old(int i) {
    return -1.6 + 1.2 * sin(0.4 + 1.3 * i);
}
static double golden_ref(int i) {
    return -1.7 + 1.1 * sin(0.6 + 1.25 * i);
}

static struct PPOBatch golden_batch(void) {
    struct PPOBatch p = {
        .B = 3,
        .R = 13,
        .start = arena_alloc(&test_arena, 4, sizeof(size_t)),
        .padding = arena_alloc(&test_arena, 3, sizeof(size_t)),
    };
    memcpy(p.start, GOLDEN_START, sizeof GOLDEN_START);
    memcpy(p.padding, (size_t[]){0, 3, 2}, 3 * sizeof(size_t));
    p.logprobs = packed_formula(golden_old);
    p.ref_logprobs = packed_formula(golden_ref);
    p.values = packed_formula(golden_val);
    p.rewards =
        narrow((double[]){-0.0447210558, -0.00583171844, -0.00737466803, -0.0406970643,
                          -0.0323995724, 1.51447213, -0.0565480255, -0.085784696, -0.00794322509,
                          -0.677197397, -0.167293116, -0.14993149, 0.317258418},
               13);
    p.kl = random_floats(13, 1);
    p.non_score_rewards = random_floats(13, 1);
    p.advantages = random_floats(13, 1);
    p.returns = random_floats(13, 1);
    return p;
}

/* Penalties of every kind -> rewards, against TRL's compute_rewards. */
static void test_ppo_penalties_golden(void) {
    static const struct {
        const char *name;
        enum KLPenalty kind;
        double want[13];
    } kinds[] = {
        {"kl",
         KL_PENALTY_KL,
         {-0.0447210558, -0.00583171844, -0.00737466803, -0.0406970643, -0.0323995724, 1.51447213,
          -0.0565480255, -0.085784696, -0.00794322509, -0.677197397, -0.167293116, -0.14993149,
          0.317258418}},
        {"abs",
         KL_PENALTY_ABS,
         {-0.0447210558, -0.00583171844, -0.00737466803, -0.0406970643, -0.0323995724, 1.48552787,
          -0.0565480255, -0.085784696, -0.00794322509, -0.822802603, -0.167293116, -0.14993149,
          0.182741582}},
        {"mse",
         KL_PENALTY_MSE,
         {-0.0049999319, -8.50223514e-05, -0.000135964336, -0.0041406271, -0.00262433058,
          1.49947643, -0.00799419731, -0.0183975361, -0.000157737057, -0.76325053, -0.0699674711,
          -0.0561986268, 0.238690764}},
        {"full",
         KL_PENALTY_FULL,
         {-0.0918063447, -0.140480131, -0.440289229, -0.312611669, -0.51923573, 0.962782681,
          -0.512489557, -0.408486336, -0.2191315, -1.06922829, -0.21849966, -0.40566054,
          -0.262236834}},
    };
    struct PPOBatch p = golden_batch();
    for (size_t k = 0; k < 4; k++)
        for (size_t b = 0; b < 3; b++)
            for (size_t t = GOLDEN_START[b]; t < GOLDEN_START[b + 1]; t++) {
                size_t column = 8 * b + GOLDEN_COLUMN[b] + t - GOLDEN_START[b];
                float logits[7], ref[7], scratch[7];
                for (size_t v = 0; v < 7; v++) {
                    logits[v] = (float)(2 * sin(0.1 + 0.77 * (double)(7 * column + v)));
                    ref[v] = (float)(2 * sin(0.3 + 0.71 * (double)(7 * column + v)));
                }
                float full = (float)kl_exact(logits, log_sum_exp(logits, 7, scratch), ref,
                                             log_sum_exp(ref, 7, scratch), 7);
                double reward =
                    -0.2 * kl_penalty_token(kinds[k].kind, p.logprobs[t], p.ref_logprobs[t], full)
                    + (t + 1 == GOLDEN_START[b + 1] ? (double[]){1.5, -0.75, 0.25}[b] : 0);
                expect_close(kinds[k].name, reward, kinds[k].want[t], 2e-6);
            }
}

/* The controller's beta against TRL's, alone and one after another; off, it stays. */
static void test_ppo_kl_controller(void) {
    static const struct {
        double kl, from_0_2, in_sequence;
    } golden[] = {{0, 0.199488, 0.199488},
                  {6, 0.2, 0.199488},
                  {7, 0.200426667, 0.199913574},
                  {30, 0.200512, 0.200425353}};
    struct PPOConfig config = ppo_config();
    double beta = 0.2;
    for (size_t i = 0; i < COUNT(golden); i++) {
        beta = kl_controller_update(&config, beta, golden[i].kl, 128);
        expect_close("in sequence", beta, golden[i].in_sequence, 1e-9);
        expect_close("from 0.2", kl_controller_update(&config, 0.2, golden[i].kl, 128),
                     golden[i].from_0_2, 1e-9);
    }
    config.adap_kl_ctrl = false;
    expect_close("off", kl_controller_update(&config, 0.2, 30, 128), 0.2, 0);
}

/* Chapter 4's answer from its advantages to the slopes that go back into the model: the table that
 * opens the chapter. */
static void test_ppo_example(void) {
    float advantages[] = {0.3187f, 0.546f, 0.68f};
    whiten(advantages, 3, true);
    expect_floats("whitened", advantages, (double[]){-1.0742, 0.1703, 0.9039}, 3, 5e-5);

    struct PPOConfig config = ppo_config();
    struct TokenLoss policy[3];
    struct ValueLoss value[3];
    float dlogprobs[3];
    float dvalues[3];
    struct PPOTokens tokens = {
        .R = 3,
        .old_logprobs = (float[]){-1.2f, -0.5f, -0.1f},
        .logprobs = (float[]){-1.1f, -0.3f, -0.15f},
        .advantages = advantages,
        .old_values = (float[]){0.5f, 0.4f, 0.3f},
        .values = (float[]){0.6f, 0.65f, 0.4f},
        .returns = (float[]){0.8187f, 0.946f, 0.98f},
        .policy = policy,
        .value = value,
        .dlogprobs = dlogprobs,
        .dvalues = dvalues,
    };
    struct PPOLoss loss = ppo_loss(&config, &tokens);
    for (size_t t = 0; t < 3; t++) {
        expect_close("ratio", policy[t].ratio, (double[]){1.1052, 1.2214, 0.9512}[t], 5e-5);
        expect_close("loss", policy[t].loss, (double[]){1.1872, -0.2043, -0.8598}[t], 5e-5);
        expect_close("value loss", value[t].loss, (double[]){0.0239, 0.0599, 0.1682}[t], 5e-5);
    }
    expect_floats("slopes", dlogprobs, (double[]){0.3957, 0, -0.2866}, 3, 5e-5);
    expect_floats("the value head's", dvalues, (double[]){-0.0073, 0, -0.0193}, 3, 5e-5);
    expect_close("mean loss", loss.policy, (1.1872 - 0.2043 - 0.8598) / 3, 5e-5);
    expect_true("the second token is clipped", policy[1].is_clipped && !policy[0].is_clipped);
}

/* 1, 2, 6, then 7: the comment's example; the count begins above 0, as TRL's. */
static void test_running_moments(void) {
    struct RunningMoments m = {0, 1, 1e-24};
    running_moments_update(&m, (float[]){1, 2, 6}, 3);
    expect_close("mean of three", m.mean, 3, 1e-9);
    expect_close("variance of three", m.var, 14.0 / 3, 1e-9);
    running_moments_update(&m, (float[]){7}, 1);
    expect_close("mean of four", m.mean, 4, 1e-9);
    expect_close("variance of four", m.var, 6.5, 1e-9);
    expect_close("without bias", running_moments_std(&m), sqrt(26.0 / 3), 1e-9);
}

/* kl_reward's and gae_step's cases by hand, and the answer of chapter 4's essay. */
static void test_gae_hand(void) {
    static const float logprob[] = {-1.2f, -0.5f, -0.1f};
    static const float ref_logprob[] = {-1.7f, -0.5f, -0.2f};
    static const float values[] = {0.5f, 0.4f, 0.3f};
    struct PPOConfig config = ppo_config();
    float rewards[3];
    float advantages[3];
    float returns[3];
    for (size_t t = 0; t < 3; t++) {
        float kl = kl_penalty_token(KL_PENALTY_KL, logprob[t], ref_logprob[t], 0);
        rewards[t] = kl_reward(0.2, kl) + (t == 2 ? 1 : 0);
    }
    gae(&config, 3, rewards, values, 0, advantages, returns);
    expect_floats("rewards", rewards, (double[]){-0.1, 0, 0.98}, 3, 1e-6);
    expect_floats("advantages", advantages, (double[]){0.3187, 0.546, 0.68}, 3, 1e-6);
    expect_floats("returns", returns, (double[]){0.8187, 0.946, 0.98}, 3, 1e-6);
    expect_close("a negative divergence earns", kl_reward(0.2, -0.3f), 0.06, 1e-7);
    expect_close("abs", kl_penalty_token(KL_PENALTY_ABS, -1.7f, -1.2f, 0), 0.5, 1e-6);
    expect_close("mse", kl_penalty_token(KL_PENALTY_MSE, -1.2f, -1.7f, 0), 0.125, 1e-6);

    /* lambda 0: the surprise alone; lambda 1 with gamma 1: all later rewards less the value */
    expect_close("lambda 0", gae_step(0.1, 0.5, 0.7, 9, 1, 0), 0.3, 1e-12);
    config.lam = 1;
    gae(&config, 3, rewards, values, 0, advantages, returns);
    expect_floats("lambda 1", advantages, (double[]){0.38, 0.58, 0.68}, 3, 1e-6);
    expect_floats("lambda 1: returns", returns, (double[]){0.88, 0.98, 0.98}, 3, 1e-6);
    config.lam = 0;
    gae(&config, 3, rewards, values, 0, advantages, returns);
    expect_floats("lambda 0", advantages, (double[]){-0.2, -0.1, 0.68}, 3, 1e-6);

    /* without the penalty the score alone is left */
    config.lam = 0.95;
    gae(&config, 3, (float[]){0, 0, 1}, values, 0, advantages, returns);
    expect_floats("without KL", advantages, (double[]){0.4368, 0.565, 0.7}, 3, 6e-5);
}

static double golden_new(int i) {
    return golden_old(i) + 0.35 * sin(1 + 2.1 * i);
}
static double golden_newval(int i) {
    return golden_val(i) + 0.3 * cos(0.5 + 1.7 * i);
}

/* Beside losses and slopes, which the table has: what was clipped, ratio and error, by hand. */
static void test_ppo_token_loss_clipped(void) {
    struct TokenLoss up = ppo_token_loss(0, log(1.5), 2, 0.2);
    struct TokenLoss down = ppo_token_loss(0, log(1.5), -2, 0.2);
    expect_true("a good token is clipped, a bad one is not", up.is_clipped && !down.is_clipped);
    expect_close("ratio", up.ratio, 1.5, 1e-12);
}

static void test_ppo_value_loss_clipped(void) {
    struct ValueLoss cut = ppo_value_loss(0.5, 0.9, 1, 0.2);
    expect_true("clipped", cut.is_clipped && !ppo_value_loss(0.5, 0.6, 1, 0.2).is_clipped);
    expect_close("squared error", cut.squared_error, 0.01, 1e-12);
}

/* ppo_loss on R tokens of a batch, whose policy now says logprobs and values. */
static struct PPOTokens tokens_of(const struct PPOBatch *p, size_t R, const float *logprobs,
                                  const float *values) {
    return (struct PPOTokens){
        .R = R,
        .old_logprobs = p->logprobs,
        .old_values = p->values,
        .advantages = p->advantages,
        .returns = p->returns,
        .logprobs = logprobs,
        .values = values,
        .policy = arena_alloc(&test_arena, R, sizeof(struct TokenLoss)),
        .value = arena_alloc(&test_arena, R, sizeof(struct ValueLoss)),
        .dlogprobs = arena_floats(&test_arena, R),
        .dvalues = arena_floats(&test_arena, R),
    };
}

struct PPOCase {
    struct PPOConfig config;
    struct PPOTokens tokens;
};

static double ppo_case_loss(void *context) {
    struct PPOCase *c = context;
    return ppo_loss(&c->config, &c->tokens).total;
}

/* Central differences, tokens inside and outside the clips. */
static void test_ppo_loss_gradient(void) {
    struct PPOBatch p = golden_batch();
    float *logprobs = packed_formula(golden_new);
    float *values = packed_formula(golden_newval);
    struct PPOCase c = {ppo_config(), tokens_of(&p, 13, logprobs, values)};
    float dlogprobs[13];
    float dvalues[13];
    ppo_case_loss(&c);
    memcpy(dlogprobs, c.tokens.dlogprobs, sizeof dlogprobs);
    memcpy(dvalues, c.tokens.dvalues, sizeof dvalues);
    struct Slope f = {ppo_case_loss, &c, 1e-3};
    expect_gradient("log-probability", f, logprobs, dlogprobs, 13, 13, 1e-4);
    expect_gradient("value", f, values, dvalues, 13, 13, 1e-4);
}

/* By hand: three answers to one prompt; undivided, their advantages are 2/3 of rloo's. */
static void test_grpo_advantages(void) {
    struct GRPOConfig config = {.num_generations = 3};
    float scores[] = {1, 2, 6};
    float advantages[3], rloo[3];
    grpo_advantages(&config, scores, 3, advantages);
    expect_floats("divided", advantages, (double[]){-0.7559, -0.3780, 1.1339}, 3, 5e-5);
    config.scale_rewards = SCALE_REWARDS_NONE;
    grpo_advantages(&config, scores, 3, advantages);
    expect_floats("undivided", advantages, (double[]){-2, -1, 3}, 3, 0);
    reinforce_advantages(BASELINE_RLOO, scores, 3, 3, 0, rloo);
    for (size_t i = 0; i < 3; i++)
        expect_close("2/3 of rloo's", advantages[i], 2 * rloo[i] / 3, 1e-6);
}

/* A group without a score, one with a single score, one without a difference: all advantages 0. */
static void test_grpo_advantages_nothing(void) {
    struct GRPOConfig config = {.num_generations = 3};
    float scores[] = {NAN, NAN, NAN, NAN, 2, NAN, 0.5f, 0.5f, 0.5f};
    float advantages[9];
    for (int scale = SCALE_REWARDS_GROUP; scale <= SCALE_REWARDS_NONE; scale++) {
        config.scale_rewards = (enum ScaleRewards)scale;
        grpo_advantages(&config, scores, 9, advantages);
        expect_floats("nothing to learn", advantages, (double[9]){0}, 9, 0);
    }
    expect_true("no mean of no score", isnan(score_moments(scores, 3).mean));
    expect_true("no deviation of one", isnan(score_moments(scores + 3, 3).std));
    expect_close("the mean of one", score_moments(scores + 3, 3).mean, 2, 0);
}

/* Two groups of four, the sixth answer without a score, against TRL: the deviation of the group, of
 * the batch, and none. */
static void test_grpo_advantages_golden(void) {
    static const float scores[] = {1, 2, 6, 2, 0.5f, NAN, 0.5f, -1};
    static const double golden[][8] = {
        [SCALE_REWARDS_GROUP] = {-0.789192726, -0.338225454, 1.46564363, -0.338225454, 0.57728361,
                                 0, 0.57728361, -1.15456722},
        [SCALE_REWARDS_BATCH] = {-0.79304232, -0.33987528, 1.47279288, -0.33987528, 0.22658352, 0,
                                 0.22658352, -0.45316704},
        [SCALE_REWARDS_NONE] = {-1.75, -0.75, 3.25, -0.75, 0.5, 0, 0.5, -1},
    };
    float advantages[8];
    for (size_t scale = 0; scale < COUNT(golden); scale++) {
        struct GRPOConfig config = {
            .num_generations = 4,
            .scale_rewards = (enum ScaleRewards)scale,
        };
        grpo_advantages(&config, scores, 8, advantages);
        expect_floats("advantages", advantages, golden[scale], 8, 1e-7);
    }
}

/* Beside losses and slopes, which the table has: on which side the ratio has left the range. */
static void test_grpo_token_loss_clipped(void) {
    struct GRPOConfig config = {.epsilon = 0.2, .epsilon_high = 0.28};
    struct GRPOTokenLoss high = grpo_token_loss(&config, log(1.5), 2, -1, 0);
    struct GRPOTokenLoss low = grpo_token_loss(&config, log(0.5), -2, -1, 0);
    struct GRPOTokenLoss up = grpo_token_loss(&config, log(1.5), -2, -1, 0);
    struct GRPOTokenLoss down = grpo_token_loss(&config, log(0.5), 2, -1, 0);
    expect_true("high", high.is_high_clipped && !high.is_low_clipped);
    expect_true("low", low.is_low_clipped && !low.is_high_clipped);
    expect_true("where the slope is not 0, nothing is clipped",
                !up.is_low_clipped && !up.is_high_clipped && !down.is_low_clipped
                    && !down.is_high_clipped);
    expect_close("ratio", high.ratio, 1.5, 1e-12);
    expect_close("beta 0: the KL is shown", high.kl, exp(1) - 2, 1e-12);
    expect_close("and is no part of the loss", high.loss, -2.56, 1e-12);
    expect_close("or of its slope", high.dlogprob, 0, 0);
}

/* By hand: answers of 2 and 6 tokens, advantages 1 and -1, ratio 1. */
static void test_grpo_shares(void) {
    static const struct {
        enum GRPOLossType loss_type;
        double share[2], loss;
    } cases[] = {
        {GRPO_LOSS_GRPO, {1.0 / 4, 1.0 / 12}, 0},
        {GRPO_LOSS_BNPO, {1.0 / 8, 1.0 / 8}, 0.5},
        {GRPO_LOSS_DAPO, {1.0 / 8, 1.0 / 8}, 0.5},
        {GRPO_LOSS_DR_GRPO, {1.0 / 20, 1.0 / 20}, 0.2},
    };
    static const float logprobs[8] = {-1, -2, -1, -3, -2, -1, -4, -1};
    for (size_t c = 0; c < COUNT(cases); c++) {
        struct GRPOConfig config = {
            .max_completion_length = 10,
            .epsilon = 0.2,
            .epsilon_high = 0.2,
            .loss_type = cases[c].loss_type,
        };
        struct GRPOTokenLoss tokens[8];
        float dlogprobs[8];
        struct GRPOAnswer answers[2] = {
            {2, 1, logprobs, logprobs, NULL, tokens, dlogprobs},
            {6, -1, logprobs + 2, logprobs + 2, NULL, tokens + 2, dlogprobs + 2},
        };
        expect_close("loss", grpo_loss(&config, answers, 2, 8), cases[c].loss, 1e-12);
        expect_close("slope, first answer", dlogprobs[0], -cases[c].share[0], 1e-7);
        expect_close("slope, second answer", dlogprobs[7], cases[c].share[1], 1e-7);
    }
}

/* Four answers of 3, 1, 2 and 4 tokens: the batch of golden.py's part G. */
struct GRPOCase {
    struct GRPOConfig config;
    struct GRPOAnswer answers[4];
    struct GRPOTokenLoss tokens[10];
    float old_logprobs[10], logprobs[10], ref_logprobs[10], dlogprobs[10];
};

static struct GRPOCase *grpo_case(struct GRPOConfig config) {
    static const size_t lengths[] = {3, 1, 2, 4};
    static const double advantages[] = {0.9, -0.6, -1.3, 0.4};
    struct GRPOCase *c = arena_zeros(&test_arena, 1, sizeof *c);
    c->config = config;
    size_t first = 0;
    for (int b = 0; b < 4; b++) {
        for (int t = 0; t < (int)lengths[b]; t++) {
            c->old_logprobs[first + (size_t)t] = (float)golden_old(4 * b + t);
            c->ref_logprobs[first + (size_t)t] = (float)golden_ref(4 * b + t);
            c->logprobs[first + (size_t)t] = (float)golden_new(4 * b + t);
        }
        c->answers[b] = (struct GRPOAnswer){
            .length = lengths[b],
            .advantage = advantages[b],
            .old_logprobs = c->old_logprobs + first,
            .logprobs = c->logprobs + first,
            .ref_logprobs = config.beta > 0 ? c->ref_logprobs + first : NULL,
            .tokens = c->tokens + first,
            .dlogprobs = c->dlogprobs + first,
        };
        first += lengths[b];
    }
    return c;
}

static double grpo_case_loss(void *context) {
    struct GRPOCase *c = context;
    return grpo_loss(&c->config, c->answers, 4, 10);
}

/* Settings that change what a token's loss is. */
struct GRPOVariant {
    enum GRPOLossType loss_type;
    enum ImportanceSamplingLevel level;
    double beta;
    bool use_bias_correction_kl;
};

static struct GRPOConfig grpo_config(struct GRPOVariant variant) {
    return (struct GRPOConfig){
        .num_generations = 2,
        .num_iterations = 1,
        .max_completion_length = 5,
        .beta = variant.beta,
        .use_bias_correction_kl = variant.use_bias_correction_kl,
        .epsilon = 0.05,
        .epsilon_high = 0.07,
        .loss_type = variant.loss_type,
        .importance_sampling_level = variant.level,
    };
}

/* Loss and slopes against TRL. Where all answers are one micro-batch, dapo is bnpo. */
static void test_grpo_loss_golden(void) {
    static const struct {
        struct GRPOVariant variant;
        double loss, dlogprobs[10];
    } golden[] = {
        {{GRPO_LOSS_GRPO, IMPORTANCE_SAMPLING_TOKEN, 0, false},
         0.217596113,
         {0, -0.0760994747, -0.0550520447, 0.151306348, 0, 0.220159749, 0, -0.0247764509,
          -0.0185670135, 0}},
        {{GRPO_LOSS_BNPO, IMPORTANCE_SAMPLING_TOKEN, 0, false},
         -0.0484810279,
         {0, -0.0913193697, -0.0660624536, 0.0605225393, 0, 0.176127799, 0, -0.0396423215,
          -0.0297072216, 0}},
        {{GRPO_LOSS_DR_GRPO, IMPORTANCE_SAMPLING_TOKEN, 0, false},
         -0.024240514,
         {0, -0.0456596848, -0.0330312268, 0.0302612696, 0, 0.0880638996, 0, -0.0198211608,
          -0.0148536108, 0}},
        {{GRPO_LOSS_GRPO, IMPORTANCE_SAMPLING_TOKEN, 0.04, false},
         0.21978955,
         {0.000713101853, -0.0753695577, -0.0553499603, 0.151751579, -0.00220682837, 0.22237816,
          -0.000147842925, -0.0250623534, -0.0180031668, 0.00150641945}},
        {{GRPO_LOSS_BNPO, IMPORTANCE_SAMPLING_TOKEN, 0.04, false},
         -0.0459361177,
         {0.000855722224, -0.0904434692, -0.0664199523, 0.0607006314, -0.0017654627, 0.177902528,
          -0.00023654868, -0.0400997655, -0.0288050669, 0.00241027112}},
        {{GRPO_LOSS_DR_GRPO, IMPORTANCE_SAMPLING_TOKEN, 0.04, false},
         -0.0229680589,
         {0.000427861112, -0.0452217346, -0.0332099762, 0.0303503157, -0.000882731349, 0.088951264,
          -0.00011827434, -0.0200498827, -0.0144025334, 0.00120513556}},
        {{GRPO_LOSS_GRPO, IMPORTANCE_SAMPLING_TOKEN, 0.04, true},
         0.220244517,
         {0.00107715765, -0.0752635701, -0.0552614965, 0.151765761, -0.00134942329, 0.224132214,
          -0.000195164722, -0.0250447332, -0.0180924637, 0.00314315713}},
        {{GRPO_LOSS_BNPO, IMPORTANCE_SAMPLING_TOKEN, 0.04, true},
         -0.0453429563,
         {0.00129258918, -0.0903162841, -0.0663137958, 0.0607063044, -0.00107953863, 0.179305771,
          -0.000312263555, -0.0400715731, -0.0289479419, 0.0050290514}},
        {{GRPO_LOSS_DR_GRPO, IMPORTANCE_SAMPLING_TOKEN, 0.04, true},
         -0.0226714781,
         {0.000646294592, -0.0451581421, -0.0331568979, 0.0303531522, -0.000539769317, 0.0896528854,
          -0.000156131778, -0.0200357865, -0.014473971, 0.0025145257}},
        {{GRPO_LOSS_GRPO, IMPORTANCE_SAMPLING_SEQUENCE, 0, false},
         0.144342074,
         {-0.074996473, -0.074996473, -0.074996473, 0.151306348, 0.162512573, 0.162512573, 0, 0, 0,
          0}},
        {{GRPO_LOSS_BNPO, IMPORTANCE_SAMPLING_SEQUENCE, 0, false},
         -0.120644647,
         {-0.0899957676, -0.0899957676, -0.0899957676, 0.0605225393, 0.130010058, 0.130010058, 0, 0,
          0, 0}},
        {{GRPO_LOSS_DR_GRPO, IMPORTANCE_SAMPLING_SEQUENCE, 0, false},
         -0.0603223236,
         {-0.0449978838, -0.0449978838, -0.0449978838, 0.0302612696, 0.065005029, 0.065005029, 0, 0,
          0, 0}},
        {{GRPO_LOSS_GRPO, IMPORTANCE_SAMPLING_SEQUENCE, 0.04, false},
         0.146535512,
         {-0.0742833711, -0.0742665559, -0.0752943885, 0.151751579, 0.160305744, 0.164730983,
          -0.000147842925, -0.00028590247, 0.00056384673, 0.00150641945}},
        {{GRPO_LOSS_BNPO, IMPORTANCE_SAMPLING_SEQUENCE, 0.04, false},
         -0.118099737,
         {-0.0891400453, -0.0891198671, -0.0903532662, 0.0607006314, 0.128244595, 0.131784787,
          -0.00023654868, -0.000457443951, 0.000902154768, 0.00241027112}},
        {{GRPO_LOSS_DR_GRPO, IMPORTANCE_SAMPLING_SEQUENCE, 0.04, false},
         -0.0590498685,
         {-0.0445700227, -0.0445599335, -0.0451766331, 0.0303503157, 0.0641222977, 0.0658923934,
          -0.00011827434, -0.000228721976, 0.000451077384, 0.00120513556}},
        {{GRPO_LOSS_GRPO, IMPORTANCE_SAMPLING_SEQUENCE, 0.04, true},
         0.146607657,
         {-0.0742181593, -0.0742013449, -0.0752291292, 0.151765761, 0.160851886, 0.165277467,
          8.19951124e-05, -6.71687532e-05, 0.000850926955, 0.00186931211}},
        {{GRPO_LOSS_BNPO, IMPORTANCE_SAMPLING_SEQUENCE, 0.04, true},
         -0.117984475,
         {-0.0890617912, -0.0890416139, -0.090274955, 0.0607063044, 0.128681509, 0.132221974,
          0.00013119218, -0.000107470005, 0.00136148313, 0.00299089938}},
        {{GRPO_LOSS_DR_GRPO, IMPORTANCE_SAMPLING_SEQUENCE, 0.04, true},
         -0.0589922377,
         {-0.0445308956, -0.0445208069, -0.0451374775, 0.0303531522, 0.0643407543, 0.0661109869,
          6.559609e-05, -5.37350026e-05, 0.000680741564, 0.00149544969}},
    };
    for (size_t i = 0; i < 2 * COUNT(golden); i++) {
        struct GRPOVariant variant = golden[i / 2].variant;
        if (i % 2 == 1 && variant.loss_type == GRPO_LOSS_BNPO)
            variant.loss_type = GRPO_LOSS_DAPO;
        struct GRPOCase *c = grpo_case(grpo_config(variant));
        expect_close(formatted("loss of case %zu", i), grpo_case_loss(c), golden[i / 2].loss, 2e-9);
        expect_floats(formatted("slopes of case %zu", i), c->dlogprobs, golden[i / 2].dlogprobs, 10,
                      2e-8);
    }
}

/* Token by token against TRL: the KL, and what is clipped. */
static void test_grpo_loss_golden_tokens(void) {
    static const double kl[2][10] = {
        {0.0267795833, 0.0281731536, 0.00377083553, 0.00102158843, 0.0757746253, 0.142733349,
         0.00168258391, 0.00607985229, 0.0300488858, 0.320163097},
        {0.0359509157, 0.0285861625, 0.00276789608, 0.00103048543, 0.0559379364, 0.193379313,
         0.00228619537, 0.00602548648, 0.0223167227, 0.436236803},
    };
    static const bool low[10] = {[4] = true};
    static const bool high[10] = {[0] = true, [6] = true, [9] = true};
    for (int corrected = 0; corrected < 2; corrected++) {
        struct GRPOVariant variant = {GRPO_LOSS_BNPO, IMPORTANCE_SAMPLING_TOKEN, 0.04, corrected};
        struct GRPOCase *c = grpo_case(grpo_config(variant));
        grpo_case_loss(c);
        for (size_t t = 0; t < 10; t++) {
            expect_close(formatted("KL of token %zu", t), c->tokens[t].kl, kl[corrected][t], 1e-9);
            expect_true(formatted("token %zu: low", t), c->tokens[t].is_low_clipped == low[t]);
            expect_true(formatted("token %zu: high", t), c->tokens[t].is_high_clipped == high[t]);
        }
    }
}

/* Central differences by every log-probability, for every setting that changes the loss. */
static void test_grpo_gradient(void) {
    for (int i = 0; i < 24; i++) {
        struct GRPOVariant variant = {
            .loss_type = (enum GRPOLossType)(i % 4),
            .level = (enum ImportanceSamplingLevel)(i / 4 % 2),
            .beta = i < 8 ? 0 : 0.04,
            .use_bias_correction_kl = i >= 16,
        };
        struct GRPOCase *c = grpo_case(grpo_config(variant));
        float dlogprobs[10];
        grpo_case_loss(c);
        memcpy(dlogprobs, c->dlogprobs, sizeof dlogprobs);
        expect_gradient(formatted("log-probability, case %d", i),
                        (struct Slope){grpo_case_loss, c, 1.0 / 1024}, c->logprobs, dlogprobs, 10,
                        10, 1e-4);
    }
}

/* =============================================================================================
 * Chapter 5 - DPO
 *
 * The best policy in closed form by hand; DPO's loss and its variants by hand and against TRL.
 * ============================================================================================= */

/* By hand; rewards that e^x could not hold. */
static void test_exact_optimum(void) {
    double half[] = {log(0.5), log(0.5)};
    double r[] = {0, 0.7 * log(3)};
    double optimum[2], wide[5];
    double far[] = {0, 900, -900, 3, 1};
    double uneven[5];
    expect_close("log Z = log 2", exact_optimum(half, r, 2, 0.7, optimum), log(2), 1e-12);
    expect_close("pi* of the first", exp(optimum[0]), 0.25, 1e-12);
    expect_close("and of the second", exp(optimum[1]), 0.75, 1e-12);
    for (int i = 0; i < 5; i++)
        uneven[i] = log((i + 1) / 15.0);
    expect_close("rewards that e^ cannot hold", exact_optimum(uneven, far, 5, 0.5, wide),
                 1800 + log(2 / 15.0), 1e-9);
}

/* For any policy J + beta KL(pi || pi*) is beta log Z, and zero KL for pi* alone. */
static void test_exact_optimum_objective(void) {
    double uneven[5], other[5], wide[5];
    for (int i = 0; i < 5; i++) {
        uneven[i] = log((i + 1) / 15.0);
        other[i] = log((5 - i) / 15.0);
    }
    struct ExactWorld w = {
        .n = 5,
        .r = (double[]){0.3, -1, 2, 0.5, 0},
        .beta = 0.4,
        .logps = {uneven, wide},
    };
    w.log_Z = exact_optimum(uneven, w.r, 5, 0.4, wide);
    double *policies[] = {uneven, other, wide};
    double sum = 0;
    for (int k = 0; k < 3; k++) {
        struct ExactFigures f = exact_figures(&w, policies[k]);
        expect_close("J + beta KL(pi || pi*) = beta log Z", f.objective + 0.4 * f.kl_to_optimum,
                     0.4 * w.log_Z, 1e-12);
        expect_true("zero for pi* alone", (f.kl_to_optimum > 1e-3) == (k < 2));
    }
    for (int i = 0; i < 5; i++)
        sum += exp(wide[i]);
    expect_close("a distribution", sum, 1, 1e-12);
}

/* Chapter 5's pair: the reward that the policy implies, and the sums for the metrics. */
static void test_dpo_hand_sums(void) {
    struct DPOSide chosen = {.logp = -8, .ref_logp = -10, .length = 4};
    struct DPOSide rejected = {.logp = -13, .ref_logp = -12, .length = 2};
    struct DPOSums sums = dpo_sums(0.1, 1, &chosen, &rejected);
    expect_close("implied reward", implied_reward(0.1, -8, -10), 0.2, 1e-12);
    expect_doubles("dpo_sums",
                   (double[]){sums.rewards_chosen, sums.rewards_rejected, sums.right,
                              sums.logps_chosen, sums.logps_rejected},
                   (double[]){0.2, -0.1, 1, -8, -13}, 5, 1e-12);
}

/* =============================================================================================
 * Chapter 6 - Choosing a token
 *
 * Each processor of logits by hand, their order against transformers, and that tokens are drawn
 * as often as their probabilities say.
 * ============================================================================================= */

static int compare_down(const void *a, const void *b) {
    return (*(const float *)a < *(const float *)b) - (*(const float *)a > *(const float *)b);
}

/* The k-th largest against sorting, among equals and infinities too. */
static void test_kth_largest(void) {
    for (size_t n = 1; n < 60; n++)
        for (size_t k = 1; k <= n; k++) {
            float x[60], sorted[60];
            for (size_t i = 0; i < n; i++)
                x[i] = sorted[i] = n % 3 == 0                ? (float)rng_below(&test_rng, 4)
                                   : rng_below(&test_rng, 9) ? (float)rng_normal(&test_rng)
                                                             : -INFINITY;
            qsort(sorted, n, sizeof *sorted, compare_down);
            expect_true("k-th largest", kth_largest(x, n, k) == sorted[k - 1]);
        }
}

/* A repetition penalty counts once for each id. */
static void test_generate_processors(void) {
    float penalised[] = {3, -3, 1, 0};
    process_repetition_penalty(penalised, 4, (int[]){0, 1, 0, 0, 3}, 5, 2);
    expect_floats("penalty 2, once an id", penalised, (double[]){1.5, -6, 1, 0}, 4, 0);
}

/* No n-gram twice. */
static void test_generate_processors_ngram(void) {
    float ngram[] = {1, 2, 3, 4};
    process_no_repeat_ngram(ngram, (int[]){0, 1, 2, 0, 1, 3, 0, 1}, 8, 3);
    expect_true("0 1 was followed by 2 and 3",
                ngram[0] == 1 && ngram[1] == 2 && ngram[2] == -INFINITY && ngram[3] == -INFINITY);
    float single[] = {1, 2, 3, 4};
    process_no_repeat_ngram(single, (int[]){1, 3}, 2, 1);
    expect_true("1-grams: what was seen", single[0] == 1 && single[1] == -INFINITY && single[2] == 3
                                              && single[3] == -INFINITY);
    process_no_repeat_ngram(single, (int[]){0}, 1, 3);
    expect_true("shorter than an n-gram", single[0] == 1);
}

/* The k most probable, ties kept. */
static void test_generate_processors_top_k(void) {
    float tied[] = {1, 5, 3, 3, 2};
    process_top_k(tied, 5, 2);
    expect_true("top 2, a tie kept", tied[0] == -INFINITY && tied[1] == 5 && tied[2] == 3
                                         && tied[3] == 3 && tied[4] == -INFINITY);
    process_top_k(tied, 5, 9);
    expect_true("k above V", tied[2] == 3);
}

/* The most probable tokens that together have p. */
static void test_generate_processors_top_p(void) {
    float nucleus[] = {logf(0.2f), logf(0.5f), logf(0.3f)};
    float certain[] = {0, 30, -INFINITY};
    process_top_p(nucleus, 3, 0.7, 1);
    expect_true("0.5, 0.3, 0.2 with p 0.7",
                nucleus[0] == -INFINITY && nucleus[1] > -1 && nucleus[2] > -2);
    process_top_p(nucleus, 3, 0.3, 1);
    expect_true("the token that crosses p is kept", nucleus[1] > -1 && nucleus[2] == -INFINITY);
    float reached[] = {logf(0.5f), logf(0.3f), logf(0.2f)};
    process_top_p(reached, 3, 0.6, 1);
    expect_true("0.6: two, which hold 0.8", reached[1] > -2 && reached[2] == -INFINITY);
    float one[] = {logf(0.5f), logf(0.3f), logf(0.2f)};
    process_top_p(one, 3, 0.45, 1);
    expect_true("0.45: the first, which holds 0.5", one[0] > -1 && one[1] == -INFINITY);
    process_top_p(certain, 3, 1e-9, 1);
    expect_true("the likeliest always stays", certain[1] == 30 && certain[0] == -INFINITY);
}

/* min_new_tokens, then temperature, which greedy decoding ignores. */
static void test_generate_processors_order(void) {
    struct GenerationConfig config = sampling(2, 0, 1);
    config.min_new_tokens = 3;
    float logits[] = {1, 2, 4};
    process_logits(logits, 3, &config, NULL, 0, 2, 2);
    expect_true("no end before three tokens, then temperature",
                logits[0] == 0.5f && logits[1] == 1 && logits[2] == -INFINITY);
    config.do_sample = false;
    float greedy[] = {1, 2, 4};
    process_logits(greedy, 3, &config, NULL, 0, 3, 2);
    expect_true("greedy ignores temperature", greedy[0] == 1 && greedy[2] == 4);
}

/* The table of chapter 6's essay: two tokens are left, and u = 0.8 draws the second one. */
static void test_generate_example(void) {
    struct GenerationConfig config = sampling(0.5, 3, 0.9);
    config.repetition_penalty = 1.25;
    float logits[] = {2, 1, 0, -2};
    process_logits(logits, 4, &config, (int[]){0}, 1, 0, 4);
    expect_floats("logits", logits, (double[]){3.2, 2}, 2, 1e-6);
    expect_true("the others are cut", logits[2] == -INFINITY && logits[3] == -INFINITY);
    softmax(logits, 4);
    expect_floats("probabilities", logits, (double[]){0.769, 0.231, 0, 0}, 4, 5e-4);
}

/* What transformers keeps, and with what probabilities, by temperature .7, top_k 10, top_p .8
 * and a repetition penalty. */
static void test_generate_filters_golden(void) {
    static const struct {
        double repetition_penalty;
        size_t kept;
        struct {
            size_t id;
            double p;
        } token[7];
    } cases[] = {
        {1,
         6,
         {{52, 0.265662611},
          {38, 0.235709459},
          {20, 0.176489025},
          {31, 0.133381784},
          {15, 0.113244243},
          {4, 0.0755128339}}},
        {1.5,
         7,
         {{52, 0.286715627},
          {20, 0.190475285},
          {31, 0.143951923},
          {15, 0.122218527},
          {38, 0.0970358998},
          {4, 0.081497021},
          {33, 0.078105703}}},
    };
    struct GPT2 *model = golden_model();
    struct Example prompt = {golden_examples()[0].ids, 4, 4};
    struct Batch batch = batch_of(&prompt, 1, READ_LAST);
    for (size_t k = 0; k < COUNT(cases); k++) {
        struct GenerationConfig config = sampling(0.7, 10, 0.8);
        config.repetition_penalty = cases[k].repetition_penalty;
        float *p = batch_logits(model, &batch) + 3 * 61;
        size_t kept = 0;
        process_logits(p, 61, &config, prompt.ids, 4, 0, 60);
        softmax(p, 61);
        for (size_t v = 0; v < 61; v++)
            kept += p[v] > 0;
        expect_count("kept", kept, cases[k].kept);
        for (size_t i = 0; i < cases[k].kept; i++)
            expect_close("probability", p[cases[k].token[i].id], cases[k].token[i].p, 2e-6);
    }
}

/* Tokens come as often as their probabilities say; a banned one never. */
static void test_generate_distribution(void) {
    enum { N = 30000 };
    static const double p[] = {0.05, 0.4, 0, 0.25, 0.3};
    size_t count[5] = {0};
    for (size_t i = 0; i < N; i++) {
        float logits[5];
        for (size_t v = 0; v < 5; v++)
            logits[v] = p[v] > 0 ? (float)log(p[v]) + 7 : -INFINITY;
        count[sample_token(logits, 5, &test_rng)]++;
    }
    for (size_t v = 0; v < 5; v++)
        expect_close("share", (double)count[v] / N, p[v], 0.011 * (p[v] > 0));
}

/* =============================================================================================
 * Part II - The model
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 7 - Byte-pair encoding
 *
 * Where words end and how they merge: by hand, against GPT-2's own tokenizer, and against the
 * definition written plainly. Whatever the bytes, decoding gives them back.
 * ============================================================================================= */

/* Where words end, by hand (the first is the comment's own). '|' stands between words. */
static void test_tokenizer_words(void) {
    static const char *const cases[] = {
        "I|'m| | 42|!",
        "it|'s|n|'t|'ll",
        "'re|'ve|'d|'|Sx",
        "a| '|s",
        "  | x",
        "x| \n| y",
        "\n\n",
        "x|\n\n",
        "x|\n|\n|y",
        "a|\t|b",
        "12|ab|34",
        "a|.,!| ..|b",
        " ",
        "a|  ",
        "\xc3\xa9t\xc3\xa9| \xe4\xbd\xa0|!",
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char text[64];
        char got[128] = "";
        size_t n = 0;
        size_t used = 0;
        for (const char *c = cases[i]; *c; c++)
            if (*c != '|')
                text[n++] = *c;
        for (size_t at = 0, end; at < n; at = end) {
            end = tokenizer_word_end(tokenizer, (unsigned char *)text, at, n);
            used +=
                (size_t)sprintf(got + used, "%s%.*s", at ? "|" : "", (int)(end - at), text + at);
        }
        expect_text("words", text_of(got), cases[i]);
    }
}

static int *encode(struct Text text, size_t V, size_t *n) {
    int *ids = arena_alloc(&test_arena, text.length + 1, sizeof *ids);
    *n = tokenizer_encode(tokenizer, text, V, ids);
    return ids;
}

/* encode, then decode: the very bytes. */
static void expect_round_trip(const char *what, struct Text text, size_t V) {
    size_t n;
    int *ids = encode(text, V, &n);
    struct Text back = tokenizer_decode_all(tokenizer, &test_arena, ids, n, V);
    expect_true(what, back.length == text.length && memcmp(back.data, text.data, text.length) == 0);
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= endoftext_id(V)) {
            expect_true("every id below the end token", false);
            break;
        }
}

struct TextCase {
    const char *text;
    size_t length;
    const char *ids;
};
#define TEXT_CASE(text, ids) {text, sizeof text - 1, ids}

/* Texts of every kind and the ids of GPT-2's own tokenizer; half are from
 * shared/fixtures/tokenizer_cases. */
static const struct TextCase TEXT_CASES[] = {
    TEXT_CASE("\014)", "200 8"),
    TEXT_CASE("\342\200\203\360\235\227\202\314\202\342\200\213 "
              "\000\n\302\275e\352\265\255\357\270\217\360\237\221\247\n\n\346\274\242 "
              "12e\014b\001",
              "447 225 47728 245 224 136 224 9525 220 188 198 23141 68 166 113 255 37929 41840 100 "
              "198 198 162 120 95 1105 68 200 65 189"),
    TEXT_CASE("9\360\273\230\213\360\237\224\245Se\352\231\256", "24 172 119 246 233 8582 242 98 "
                                                                 "4653 166 247 106"),
    TEXT_CASE("\362\264\277\227\n\n\342\200\215\330\255- '\177? 12{", "174 112 123 245 198 198 447 "
                                                                      "235 148 255 12 705 221 30 "
                                                                      "1105 90"),
    TEXT_CASE("\303\250\360\237\207\2676\363\222\267\270\343\201\213\360\237\207\267",
              "14064 8582 229 115 21 175 240 115 116 27370 8582 229 115"),
    TEXT_CASE("\343\202\253\363\240\232\212 A", "21763 175 254 248 232 317"),
    TEXT_CASE("\340\245\207\314\201\343\201\252/\362\250\261\275", "24231 229 136 223 26945 14 174 "
                                                                   "101 109 121"),
    TEXT_CASE("\354\226\264 \343\203\212", "168 244 112 14524 232"),
    TEXT_CASE("\314\210C\000[", "136 230 34 188 58"),
    TEXT_CASE("\354\226\264^\303\261\n\303\274", "168 244 112 61 12654 198 9116"),
    TEXT_CASE("\360\220\215\210 '\346\274\242\314\247\015. 1 ' \355\225\234", "172 238 235 230 705 "
                                                                              "162 120 95 136 100 "
                                                                              "201 13 352 705 220 "
                                                                              "47991 250"),
    TEXT_CASE("\342\200\250`\n\n|g", "447 101 63 198 198 91 70"),
    TEXT_CASE("\330\247", "12919"),
    TEXT_CASE("\360\235\225\237d \302\275", "47728 243 253 67 25208"),
    TEXT_CASE("\360\237\224\245\360\235\227\202\360\237\207\267\343\200\200\314\247",
              "8582 242 98 47728 245 224 8582 229 115 5099 222 136 100"),
    TEXT_CASE("\343\200\200''s \360\237\221\251\001\360\222\200\200  "
              "'\343\201\213T\177j\357\273\277",
              "5099 222 7061 82 50169 102 189 172 240 222 222 220 705 27370 51 221 73 171 119 123"),
    TEXT_CASE("\001\345\255\227 12'", "189 27764 245 1105 6"),
    TEXT_CASE("\343\202\253\357\277\275 ", "21763 4210 220"),
    TEXT_CASE("\327\251's ", "50227 338 220"),
    TEXT_CASE("\342\205\247\360\235\224\230\363\245\213\262\001'e\302\240", "158 227 100 47728 242 "
                                                                            "246 175 98 233 110 "
                                                                            "189 6 68 1849"),
    TEXT_CASE("\314\247\342\200\203", "136 100 447 225"),
    TEXT_CASE("\342\200\203\015 \357\273\277\363\266\204\252%", "447 225 201 27332 119 123 175 114 "
                                                                "226 103 4"),
    TEXT_CASE("\342\200\213=\330\261\355\225\234\001h\355\225\234\361\231\241\267\303\237",
              "9525 28 26897 47991 250 189 71 47991 250 173 247 94 115 39683"),
    TEXT_CASE("Hello world", "15496 995"),
    TEXT_CASE("low", "9319"),
    TEXT_CASE("A lovely film", "32 14081 2646"),
    TEXT_CASE("I'm  42!", "40 1101 220 5433 0"),
    TEXT_CASE("it's we've they'll I'd don't you're 'tis", "270 338 356 1053 484 1183 314 1549 836 "
                                                          "470 345 821 705 48010"),
    TEXT_CASE("IT'S WE'VE", "2043 6 50 12887 6 6089"),
    TEXT_CASE("   three spaces", "220 220 1115 9029"),
    TEXT_CASE("trailing   ", "9535 4386 220 220 220"),
    TEXT_CASE("a\n\n\nb", "64 628 198 65"),
    TEXT_CASE("\t\ttabs\tand \t mix", "197 197 8658 82 197 392 220 197 5022"),
    TEXT_CASE(" ", "220"),
    TEXT_CASE("", ""),
    TEXT_CASE("<|endoftext|>", "27 91 437 1659 5239 91 29"),
    TEXT_CASE("don''t '' 's's", "9099 7061 83 10148 705 82 338"),
    TEXT_CASE("1234567890 3.14159", "10163 2231 30924 3829 513 13 1415 19707"),
    TEXT_CASE("$1,000.00 (50%)", "3 16 11 830 13 405 357 1120 4407"),
    TEXT_CASE("antidisestablishmentarianism", "415 29207 44390 3699 1042"),
    TEXT_CASE("caf\303\251 na\303\257ve \303\234ber", "66 1878 2634 41492 49363 527"),
    TEXT_CASE("\344\275\240\345\245\275\357\274\214\344\270\226\347\225\214", "19526 254 25001 121 "
                                                                              "171 120 234 10310 "
                                                                              "244 45911 234"),
    TEXT_CASE("\360\237\221\250\342\200\215\360\237\221\251\342\200\215\360\237\221\247 family",
              "41840 101 447 235 41840 102 447 235 41840 100 1641"),
    TEXT_CASE("\331\205\330\261\330\255\330\250\330\247", "25405 26897 148 255 39848 12919"),
    TEXT_CASE("e\314\201 \342\221\240\342\205\247\302\275", "68 136 223 2343 239 254 158 227 100 "
                                                            "23141"),
    TEXT_CASE("The film is good.<br /><br />", "464 2646 318 922 29847 1671 1220 6927 1671 11037"),
    TEXT_CASE("\302\240nbsp\342\200\203em", "1849 77 24145 447 225 368"),
    TEXT_CASE("def f(x):\n    return x**2\n", "4299 277 7 87 2599 198 220 220 220 1441 2124 1174 "
                                              "17 198"),
};

static void test_tokenizer_cases(void) {
    for (size_t i = 0; i < COUNT(TEXT_CASES); i++) {
        const struct TextCase *c = &TEXT_CASES[i];
        int want[64];
        size_t n = 0;
        size_t got_n;
        char *end;
        for (const char *at = c->ids; *at; at = end)
            want[n++] = (int)strtol(at, &end, 10);
        int *got = encode((struct Text){c->text, c->length}, 50257, &got_n);
        expect_ids(formatted("text %zu", i), got, got_n, want, n);
        expect_round_trip("decoded", (struct Text){c->text, c->length}, 50257);
    }
}

/* Invalid UTF-8 of every kind, and random bytes, come back byte for byte. */
static void test_tokenizer_bytes(void) {
    static const char *const bad[] = {
        "\x80",
        "\xff\xfe",
        "\xc0\xaf",
        "\xc1\xbf",
        "\xe0\x80\xaf",
        "\xe2\x82",
        "\xf0\x9f\x98",
        "\xed\xa0\x80",
        "\xf4\x90\x80\x80",
        "\xf8\x88\x80\x80\x80",
        "a\xe2\x28\xa1z",
        "\xc3",
        "x \xbf\xbf y",
        "\xf0\x80\x80\x80",
    };
    for (size_t i = 0; i < COUNT(bad); i++)
        expect_round_trip("invalid UTF-8", text_of(bad[i]), 50257);
    for (size_t round = 0; round < 60; round++) {
        size_t n = 1 + rng_below(&test_rng, 400);
        char *bytes = arena_alloc(&test_arena, n, 1);
        for (size_t i = 0; i < n; i++)
            bytes[i] = (char)(round % 2 ? rng_next(&test_rng) : 0x60 + rng_below(&test_rng, 0xa0));
        expect_round_trip("random bytes", (struct Text){bytes, n}, round % 3 ? 50257 : 700);
    }
}

/* A character's class and length; bytes that are no UTF-8 are one each, of no class. */
static void test_tokenizer_bytes_classes(void) {
    uint32_t code;
    size_t length = utf8_read((const unsigned char *)"\xc3\xa9", 2, &code);
    expect_count("two bytes", length, 2);
    expect_count("e with an acute accent", code, 0xe9);
    static const struct {
        const char *text;
        size_t length;
        enum CharClass class;
    } chars[] = {
        {"a", 1, CLASS_LETTER},
        {"7", 1, CLASS_NUMBER},
        {" ", 1, CLASS_SPACE},
        {"!", 1, CLASS_OTHER},
        {"\xc3\xa9", 2, CLASS_LETTER},
        {"\xc2\xa0", 2, CLASS_SPACE},
        {"\xe4\xbd\xa0", 3, CLASS_LETTER},
        {"\xe2\x85\xa7", 3, CLASS_NUMBER},
        {"\xf0\x9f\x98\x80", 4, CLASS_OTHER},
        {"\xf0\x90\x8d\x88", 4, CLASS_LETTER},
        {"\xc0\xa0", 1, CLASS_OTHER},
        {"\xe0\x81\xa1", 1, CLASS_OTHER},
        {"\xed\xa0\x80", 1, CLASS_OTHER},
        {"\xf4\x90\x80\x80", 1, CLASS_OTHER},
        {"\xe4\xbd", 1, CLASS_OTHER},
    };
    for (size_t i = 0; i < COUNT(chars); i++) {
        enum CharClass class = char_class_at(tokenizer, (const unsigned char *)chars[i].text, 0,
                                             strlen(chars[i].text), &length);
        expect_count("class", class, chars[i].class);
        expect_count("length", length, chars[i].length);
    }
}

/* The heap as its comments show it. */
static void test_tokenizer_heap(void) {
    uint64_t heap[3];
    struct WordPieces word = {.heap = heap};
    heap_push(&word, 7);
    heap_push(&word, 4);
    heap_push(&word, 9);
    expect_true("4, 7, 9", heap[0] == 4 && heap[1] == 7 && heap[2] == 9);
    expect_count("smallest", heap_pop(&word), 4);
    expect_true("7, 9 are left", word.heap_size == 2 && heap[0] == 7 && heap[1] == 9);
}

/* Byte-pair encoding by its definition: again and again, the leftmost pair of the lowest id. */
static size_t encode_plainly(const char *word, size_t n, int limit, int *ids) {
    for (size_t i = 0; i < n; i++)
        ids[i] = tokenizer->byte_token[(unsigned char)word[i]];
    for (;;) {
        int best = limit;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            int id = tokenizer_merge(tokenizer, ids[i], ids[i + 1]);
            if (id >= 0 && id < best) {
                best = id;
                at = i;
            }
        }
        if (best == limit)
            return n;
        ids[at] = best;
        memmove(ids + at + 1, ids + at + 2, (n - at - 2) * sizeof *ids);
        n--;
    }
}

/* The heap of merges against the definition, on words that merge much. */
static void test_tokenizer_plain(void) {
    for (size_t round = 0; round < 400; round++) {
        char word[80];
        int want[80];
        size_t n = 1 + rng_below(&test_rng, 79);
        size_t got_n;
        size_t V = round % 4 ? 50257 : 257 + rng_below(&test_rng, 3000);
        for (size_t i = 0; i < n; i++)
            word[i] = "eatinosrhl"[rng_below(&test_rng, round % 2 ? 10 : 2)];
        int *got = encode((struct Text){word, n}, V, &got_n);
        expect_ids("ids", got, got_n, want, encode_plainly(word, n, endoftext_id(V), want));
    }
}

/* A word of a million letters takes no quadratic time. */
static void test_tokenizer_long_word(void) {
    size_t n = 1000000;
    size_t count;
    char *word = arena_alloc(&test_arena, n, 1);
    memset(word, 'a', n);
    clock_t begin = clock();
    int *ids = encode((struct Text){word, n}, 50257, &count);
    double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
    expect_true("under a second", thin || seconds < 1);
    expect_true("250000 times aaaa, as GPT-2's own tokenizer",
                count == 250000 && ids[0] == 24794 && ids[count - 1] == 24794);
    expect_round_trip("decoded", (struct Text){word, n}, 50257);
}

/* A smaller vocabulary: ids below V - 1, exact decoding; the end token is never in a text, and
 * decodes to its name. */
static void test_tokenizer_small(void) {
    static const size_t sizes[] = {257, 258, 300, 1024, 4097, 50257};
    for (size_t i = 0; i < COUNT(sizes); i++) {
        for (size_t k = 0; k < COUNT(TEXT_CASES); k++)
            expect_round_trip("decoded", (struct Text){TEXT_CASES[k].text, TEXT_CASES[k].length},
                              sizes[i]);
        expect_count("end token", (size_t)endoftext_id(sizes[i]), sizes[i] - 1);
        expect_text("its text", tokenizer_decode(tokenizer, (int)sizes[i] - 1, sizes[i]),
                    "<|endoftext|>");
    }
    size_t n;
    int *ids = encode(text_of(" lovely"), 1025, &n);
    expect_ids("no token beyond 1023", ids, n, (int[]){300, 659, 306}, 3);
    expect_count("a padded vocabulary keeps GPT-2's end token", (size_t)endoftext_id(50304), 50256);
    expect_count("and its unused ids are empty", tokenizer_decode(tokenizer, 50300, 50304).length,
                 0);
}

/* =============================================================================================
 * Chapter 8 - Batches
 *
 * How texts become rows and targets, all by hand: prompts, ends, shared prompts, sampled
 * lengths.
 * ============================================================================================= */

/* The common beginning, in whole characters, less one space; the first is the comment's. */
static void test_data_implicit_prompt(void) {
    static const char *const cases[][5] = {
        {"It is good", "It is bad", "It is", " good", " bad"},
        {"same", "same", "same", "", ""},
        {"a", "ab", "a", "", "b"},
        {"x", "y", "", "x", "y"},
        {" a", " b", "", " a", " b"},
        {"caf\xc3\xa9", "caf\xc3\xa8", "caf", "\xc3\xa9", "\xc3\xa8"},
        {"\xf0\x9f\x98\x80", "\xf0\x9f\x98\x81", "", "\xf0\x9f\x98\x80", "\xf0\x9f\x98\x81"},
        {"a  b", "a  c", "a ", " b", " c"},
        {"word one", "word", "word", " one", ""},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct Row row = {.chosen = text_of(cases[i][0]), .rejected = text_of(cases[i][1])};
        split_implicit_prompt(&row);
        expect_text("prompt", row.prompt, cases[i][2]);
        expect_text("chosen", row.chosen, cases[i][3]);
        expect_text("rejected", row.rejected, cases[i][4]);
    }
}

/* Prompt and completion are encoded as one text; a merge across the seam belongs to the completion.
 */
static void test_data_prompt_completion(void) {
    int end_token = 50256;
    struct Arena *arena = &test_arena;
    struct Text hello = text_of("Hello");
    struct Text world = text_of(" world");
    struct Example e = example_prompt_completion(arena, tokenizer, hello, world, 50257, &end_token);
    expect_ids("ids", e.ids, e.n, (int[]){15496, 995, 50256}, 3);
    expect_count("prompt", e.prompt_length, 1);
    struct Text hello_wor = text_of("Hello wor");
    e = example_prompt_completion(arena, tokenizer, hello_wor, text_of("ld"), 50257, &end_token);
    expect_ids("merged over the seam", e.ids, e.n, (int[]){15496, 995, 50256}, 3);
    expect_count("split moved left", e.prompt_length, 1);
    e = example_prompt_completion(arena, tokenizer, text_of(""), hello, 50257, &end_token);
    expect_count("no prompt", e.prompt_length, 0);
    end_token = 1023;
    e = example_prompt_completion(arena, tokenizer, hello, text_of(""), 1024, &end_token);
    expect_true("nothing to say: the end token alone",
                e.n == e.prompt_length + 1 && e.ids[e.n - 1] == 1023);
    e = example_prompt_completion(arena, tokenizer, hello, world, 50257, NULL);
    expect_ids("without an end token", e.ids, e.n, (int[]){15496, 995}, 2);
}

/* Rows and targets of a packed batch by hand, with prompt, without, with an example of one token.
 */
static void test_collate(void) {
    struct Example examples[] = {{(int[]){5, 6, 7, 8}, 4, 2},
                                 {(int[]){9, 10, 11}, 3, 0},
                                 {(int[]){12}, 1, 1},
                                 {(int[]){13, 14}, 2, 2}};
    struct Batch batch = batch_of(examples, 4, SKIP_LAST);
    expect_ids("ids", batch.ids, batch.N, (int[]){5, 6, 7, 9, 10, 13}, 6);
    expect_ids("positions", batch.position, batch.N, (int[]){0, 1, 2, 0, 1, 0}, 6);
    expect_ids("rows", batch.row, batch.R, (int[]){1, 2, 3, 4}, 4);
    expect_ids("targets", batch.target, batch.R, (int[]){7, 8, 10, 11}, 4);
    static const size_t start[] = {0, 3, 5, 5, 6};
    static const size_t target_start[] = {0, 2, 4, 4, 4};
    for (size_t b = 0; b <= 4; b++) {
        expect_count("start", batch.start[b], start[b]);
        expect_count("target_start", batch.target_start[b], target_start[b]);
    }
    expect_count("longest", batch.max_length, 3);
    expect_count("tokens", batch.tokens, 10);
    batch = batch_of(examples, 4, READ_LAST);
    expect_ids("ids with the last ones", batch.ids, batch.N,
               (int[]){5, 6, 7, 8, 9, 10, 11, 12, 13, 14}, 10);
    expect_ids("the same targets", batch.target, batch.R, (int[]){7, 8, 10, 11}, 4);
    expect_count("longest", batch.max_length, 4);
}

/* A shared prompt by hand. */
static void test_collate_pairs(void) {
    struct Example pair[] = {{(int[]){1, 2, 3, 4, 5}, 5, 2}, {(int[]){1, 2, 6, 7, 8, 9}, 6, 2}};
    struct Batch batch = collate_pairs(&test_arena, pair, 1, 16);
    expect_ids("ids", batch.ids, batch.N, (int[]){1, 2, 3, 4, 6, 7, 8}, 7);
    expect_ids("positions", batch.position, batch.N, (int[]){0, 1, 2, 3, 2, 3, 4}, 7);
    expect_ids("rows", batch.row, batch.R, (int[]){1, 2, 3, 1, 4, 5, 6}, 7);
    expect_ids("targets", batch.target, batch.R, (int[]){3, 4, 5, 6, 7, 8, 9}, 7);
    expect_true("one forked sequence", batch.B == 1 && batch.shared[0] == 2 && batch.fork[0] == 4);
    pair[0].prompt_length = pair[1].prompt_length = 1;
    batch = collate_pairs(&test_arena, pair, 1, 1);
    expect_true("does not pay", batch.B == 2 && batch.shared[0] == 0 && batch.N == 9);
    expect_ids("rows apart", batch.row, batch.R, (int[]){0, 1, 2, 3, 4, 5, 6, 7, 8}, 9);
}

/* Log-probabilities of pairs that share a prompt equal those of sequences that do not, lengths
 * around the attention's blocks included. */
static void test_collate_pairs_logprobs(void) {
    struct GPT2 *model = random_model(40, 150, 32, 2, 2);
    static const size_t prompts[] = {5, 1, 60, 70, 9};
    static const size_t lengths[2][5] = {{9, 4, 90, 140, 10}, {7, 8, 70, 80, 10}};
    struct Example examples[10];
    for (size_t i = 0; i < 10; i++) {
        examples[i] = random_example(lengths[i / 5][i % 5], prompts[i % 5], 40);
        if (i >= 5)
            memcpy(examples[i].ids, examples[i - 5].ids, prompts[i % 5] * sizeof(int));
    }
    struct Batch forked = collate_pairs(&test_arena, examples, 5, 32);
    struct Batch plain = collate(&test_arena, examples, 10, SKIP_LAST);
    expect_true("fewer rows", forked.N < plain.N - 100 && forked.R == plain.R);
    struct LMHead forked_head = batch_logprobs(model, &test_arena, &forked, 1, false);
    struct LMHead plain_head = batch_logprobs(model, &test_arena, &plain, 1, false);
    expect_floats("log-probabilities", forked_head.logprob, widen(plain_head.logprob, plain.R),
                  plain.R, 2e-5);
}

/* LengthSampler(2, 8): 2 to 7, each as often as the others. */
static void test_data_length_sampler(void) {
    struct LengthSampler sampler = {2, 8};
    size_t count[10] = {0};
    for (size_t i = 0; i < 12000; i++)
        count[MIN(length_sampler(&sampler, &test_rng), (size_t)9)]++;
    for (size_t k = 0; k < 10; k++)
        expect_close("share of each length", (double)count[k] / 12000,
                     k >= 2 && k < 8 ? 1.0 / 6 : 0, k >= 2 && k < 8 ? 0.015 : 0);
}

/* =============================================================================================
 * Chapter 9 - Matrix product
 *
 * Every kernel of this machine against the definition, at sizes around the edges of its tiles;
 * the same bits on any number of threads.
 * ============================================================================================= */

static void choose_kernel(const void *asked) {
    static char variable[100];
    snprintf(variable, sizeof variable, "ALIGN_KERNEL=%s", (const char *)asked);
    putenv(variable);
    kernel_choose();
}

/* ALIGN_KERNEL: by place, by name, by the name's first word, "plain" for none; what is none of them
 * is refused. 4294967295 once read outside the table. */
static void test_kernel_choose(void) {
    static const char *const others[] = {
        "3", "-1", "00", "4294967295", "4294967296", " 0", "avx", "avx2 ", "AVX2", "plain ", "simd",
    };
    char *before = getenv("ALIGN_KERNEL");
    char *held = formatted("%s", before ? before : "");
    const struct Kernel *held_kernel = kernel;
    choose_kernel("");
    const struct Kernel *widest = kernel;
    for (const struct Kernel *k = KERNELS; k <= widest; k++) {
        char *word = formatted("%s", k->name);
        choose_kernel(formatted("%d", (int)(k - KERNELS)));
        expect_true("by place", kernel == k);
        choose_kernel(word);
        expect_true("by name", kernel == k);
        word[strcspn(word, " ")] = 0;
        choose_kernel(word);
        expect_true("by the first word", kernel == k);
    }
    choose_kernel("plain");
    expect_true("none", kernel == NULL);
    for (size_t i = 0; i < COUNT(others); i++)
        expect_end(others[i], choose_kernel, others[i], 1,
                   "there is no such kernel; there are plain, ");
    choose_kernel(held);
    kernel = held_kernel;
}

static void multiply_misfits(const void *columns) {
    float numbers[6] = {0};
    matmul(matrix(numbers, 2, 1), matrix(numbers, 2, *(const size_t *)columns),
           matrix(numbers, 2, 1));
}

/* By hand; shapes that do not fit. */
static void test_matmul(void) {
    float a[] = {1, 2, 3, 4};
    float b[] = {5, 6};
    float bias[] = {3};
    float c[2] = {100, 200};
    struct Matrix out = matrix(c, 2, 1);
    matmul(out, matrix(a, 2, 2), matrix(b, 2, 1));
    expect_floats("[1 2; 3 4] [5; 6]", c, (double[]){17, 39}, 2, 0);
    matmul_add(out, transposed(matrix(a, 2, 2)), matrix(b, 2, 1));
    expect_floats("+ [1 3; 2 4] [5; 6]", c, (double[]){40, 73}, 2, 0);
    matmul_bias(out, bias, matrix(a, 2, 2), matrix(b, 2, 1));
    expect_floats("[1 2; 3 4] [5; 6] + 3", c, (double[]){20, 42}, 2, 0);
    expect_end("shapes", multiply_misfits, (size_t[]){3}, 1,
               "matmul: (2,3) times (2,1) does not make (2,1)");
}

/* By hand: lines that are apart, lines that are neighbours, lines that are missing. */
static void test_pack_panel(void) {
    float lines[] = {1, 2, 3, 4, 5, 6};
    float panel[12];
    pack_panel(panel, matrix(lines, 2, 3), 4);
    expect_floats("two lines", panel, (double[]){1, 4, 0, 0, 2, 5, 0, 0, 3, 6, 0, 0}, 12, 0);
    float numbers[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    pack_panel(panel, transposed(matrix(numbers, 2, 4)), 4);
    expect_floats("four neighbours", panel, (double[]){1, 2, 3, 4, 5, 6, 7, 8}, 8, 0);
}

static const struct Kernel *widest_kernel; /* NULL under ALIGN_KERNEL=plain: nothing to compare */

/* A product by its definition and by every kernel this machine has, in the four transposed
 * forms, from zero, from C itself and from one row (a bias), between guards. */
static void compare_matmul(size_t M, size_t N, size_t K) {
    size_t c_row = N + 3;
    float *a = random_floats(M * K, 1);
    float *b = random_floats(K * N, 1);
    float *before = random_floats(M * c_row, 1);
    float *plain = arena_zeros(&test_arena, M * c_row, sizeof *plain);
    float *got = arena_floats(&test_arena, M * c_row);
    for (int form = 0; form < 4; form++) {
        struct Matrix left = form & 1 ? transposed(matrix(a, K, M)) : matrix(a, M, K);
        struct Matrix right = form & 2 ? transposed(matrix(b, N, K)) : matrix(b, K, N);
        struct Matrix product = {got, M, N, c_row, 1};
        matmul_plain((struct Matrix){plain, M, N, c_row, 1}, (struct Matrix){0}, left, right);
        for (int run = 0; widest_kernel && run < 3 * (int)(widest_kernel - KERNELS + 1); run++) {
            int from = run % 3;
            kernel = &KERNELS[run / 3];
            memcpy(got, before, M * c_row * sizeof *got);
            if (from == 0)
                matmul(product, left, right);
            else if (from == 1)
                matmul_add(product, left, right);
            else
                matmul_bias(product, before, left, right);
            double worst = 0;
            for (size_t i = 0; i < M; i++)
                for (size_t j = 0; j < c_row; j++) {
                    size_t at = i * c_row + j;
                    double start = from == 1 ? before[at] : from == 2 ? before[j] : 0;
                    worst = MAX(worst, fabs(got[at] - (j < N ? plain[at] + start : before[at])));
                }
            if (worst > 2e-6 + 4e-7 * (double)K && failed())
                printf("%s: kernel %s, form %d, from %d, M %zu, N %zu, K %zu: expected the plain "
                       "product, got %.2g beside it\n",
                       test_name, kernel->name, form, from, M, N, K, worst);
        }
    }
    kernel = widest_kernel;
}

/* Shapes around the tiles' and the blocks' edges. */
static void test_matmul_plain(void) {
    static const size_t ms[] = {1, 3, 5, 8, 15, 29, 70};
    static const size_t ns[] = {1, 7, 9, 24, 33, 70};
    static const size_t ks[] = {1, 7, 383, 384, 385, 900};
    widest_kernel = kernel;
    for (size_t n = 1; n <= 70; n += thin ? 3 : 1)
        compare_matmul((n * 37) % 70 + 1, n, 7);
    for (size_t i = 0; i < COUNT(ms); i++)
        for (size_t j = 0; j < COUNT(ns); j++)
            for (size_t k = 0; k < COUNT(ks); k++)
                if (!thin || (i + j + k) % 5 == 0)
                    compare_matmul(ms[i], ns[j], ks[k]);
    compare_matmul(2100, 3, 300); /* more rows than a packed block has */
    compare_matmul(5, 4200, 300); /* more columns */
    compare_matmul(2060, 4100, 2);
    kernel = NULL;
    float c[1];
    float a[] = {2};
    float b[] = {3};
    matmul_bias(matrix(c, 1, 1), b, matrix(a, 1, 1), matrix(b, 1, 1));
    expect_close("without a kernel", c[0], 9, 0);
    kernel = widest_kernel;
}

/* One, two and three threads: the same bits. */
static void test_matmul_threads(void) {
    size_t M = 333;
    size_t N = 777;
    size_t K = 300;
    float *a = random_floats(M * K, 1);
    float *b = random_floats(K * N, 1);
    float *c[4];
    for (int threads = 1; threads <= 3; threads++) {
        c[threads] = arena_floats(&test_arena, M * N);
        use_threads(threads);
        matmul(matrix(c[threads], M, N), matrix(a, M, K), matrix(b, K, N));
        expect_bits("product", c[threads], c[1], M * N);
    }
}

/* =============================================================================================
 * Chapter 10 - Layers
 *
 * Each layer by hand and against torch, its backward pass by central differences. A row has the
 * same bits whatever rows are beside it.
 * ============================================================================================= */

/* One token at two places, by hand. */
static void test_embedding(void) {
    float wte[] = {3, 4, 5, 6};
    float wpe[] = {0.5f, 0, 0, 0.5f};
    float dx[] = {1, 2, 3, 4};
    float dwte[4] = {0};
    float dwpe[4] = {0};
    float x[4];
    struct Batch batch = {.N = 2, .ids = (int[]){1, 1}, .position = (int[]){0, 1}};
    embedding_forward(x, &batch, wte, wpe, 2);
    expect_floats("x", x, (double[]){5.5, 6, 5, 6.5}, 4, 0);
    embedding_backward(dwte, dwpe, dx, &batch, 2);
    expect_floats("dwte", dwte, (double[]){0, 0, 4, 6}, 4, 0);
    expect_floats("dwpe", dwpe, (double[]){1, 2, 3, 4}, 4, 0);
}

/* A tensor of given numbers and gradient, (rows,columns) or, with columns = 0, (rows). */
static struct Tensor tensor_of(float *w, float *d, size_t rows, size_t columns) {
    return (struct Tensor){
        .shape = {rows, columns},
        .ndim = columns ? 2 : 1,
        .n = rows * MAX(columns, (size_t)1),
        .w = w,
        .d = d,
    };
}

/* One row, by hand, as at the head of the chapter. */
static void test_linear_hand(void) {
    float x[] = {1, 2};
    float w[] = {3, 4, 5, 6};
    float b[] = {7, 8};
    float dy[] = {1, -2};
    float y[2], dx[2];
    float dw[4] = {0};
    float db[2] = {0};
    struct Tensor weight = tensor_of(w, dw, 2, 2);
    struct Tensor bias = tensor_of(b, db, 2, 0);
    linear_forward(y, x, 1, &weight, &bias);
    expect_floats("y", y, (double[]){20, 24}, 2, 0);
    linear_backward(dx, dy, x, 1, &weight, &bias);
    expect_floats("dx", dx, (double[]){-5, -7}, 2, 0);
    expect_floats("dW", dw, (double[]){1, -2, 2, -4}, 4, 0);
    expect_floats("db", db, (double[]){1, -2}, 2, 0);
}

/* x W + b and its gradients against torch's (Conv1D). */
static void test_linear_golden(void) {
    float x[12], w[8], b[2], dy[6], y[6], dx[12];
    float dw[8] = {0};
    float db[2] = {0};
    for (int i = 0; i < 12; i++)
        x[i] = (float)sin(0.2 + 0.5 * i);
    for (int i = 0; i < 8; i++)
        w[i] = (float)cos(0.1 + 0.7 * i);
    for (int i = 0; i < 6; i++)
        dy[i] = (float)cos(0.3 + 1.1 * i);
    for (int i = 0; i < 2; i++)
        b[i] = (float)sin(1.0 + i);
    struct Tensor weight = tensor_of(w, dw, 4, 2);
    struct Tensor bias = tensor_of(b, db, 2, 0);
    linear_forward(y, x, 3, &weight, &bias);
    expect_floats("y", y,
                  (double[]){-0.217711497, 0.114072773, 1.94519666, 1.12312179, 0.982029507,
                             1.5265574},
                  6, 1e-6);
    linear_backward(dx, dy, x, 3, &weight, &bias);
    static const double golden_dx[] = {1.06898107,  -0.032448023, -1.08001126,  -0.334684841,
                                       -1.42191884, 0.47107267,   1.58205261,   0.0667212255,
                                       0.604620611, -0.522005538, -0.782068213, 0.256153777};
    expect_floats("dx", dx, golden_dx, 12, 1e-6);
    static const double golden_dw[] = {-0.447127995, -1.46305607,  0.285439726, -1.15921219,
                                       0.948121859,  -0.571552823, 1.37867068,  0.156042675};
    expect_floats("dW", dw, golden_dw, 8, 1e-6);
    expect_floats("db", db, (double[]){0.141804261, 0.158728212}, 2, 1e-6);
    linear_backward(dx, dy, x, 3, &weight, &bias);
    expect_close("dW is added to, dx is not", dw[0] + dx[0], 2 * golden_dw[0] + golden_dx[0], 2e-6);
}

/* What a layer's gradients are tested with: loss = sum of y times given dy. */
struct LayerCase {
    size_t N, in, out;
    float *x, *w, *b, *y, *dy, *mean, *rstd, *lse;
    struct Batch *batch;
};

static double linear_loss(void *context) {
    struct LayerCase *c = context;
    struct Tensor weight = tensor_of(c->w, NULL, c->in, c->out);
    struct Tensor bias = tensor_of(c->b, NULL, c->out, 0);
    linear_forward(c->y, c->x, c->N, &weight, &bias);
    return dot_product(c->y, c->dy, c->N * c->out);
}

/* Central differences, at widths beyond a strip of columns. */
static void test_linear_gradient(void) {
    struct LayerCase c = {.N = 9, .in = 21, .out = 130};
    c.x = random_floats(c.N * c.in, 1);
    c.w = random_floats(c.in * c.out, 0.3);
    c.b = random_floats(c.out, 1);
    c.y = random_floats(c.N * c.out, 1);
    c.dy = random_floats(c.N * c.out, 1);
    float *dx = random_floats(c.N * c.in, 1);
    float *dw = arena_zeros(&test_arena, c.in * c.out, 4);
    float *db = arena_zeros(&test_arena, c.out, 4);
    struct Tensor weight = tensor_of(c.w, dw, c.in, c.out);
    struct Tensor bias = tensor_of(c.b, db, c.out, 0);
    linear_backward(dx, c.dy, c.x, c.N, &weight, &bias);
    struct Slope f = {linear_loss, &c, 0.25};
    expect_gradient("x", f, c.x, dx, c.N * c.in, 60, 1e-4);
    expect_gradient("W", f, c.w, dw, c.in * c.out, 60, 1e-4);
    expect_gradient("b", f, c.b, db, c.out, 130, 1e-4);
    weight.d = NULL;
    linear_backward(dx, c.dy, c.x, c.N, &weight, &bias);
    expect_close("only the bias, added to", db[129], 2 * slope_at(f, c.b + 129), 1e-3);
}

/* Few rows and many give what the definition gives. */
static void test_few_rows(void) {
    static const size_t rows[] = {1, 2, 3, 8, FEW_ROWS, FEW_ROWS + 1};
    static const size_t ins[] = {1, 7, 8, 61};
    static const size_t outs[] = {1, 31, 800};
    for (size_t i = 0; i < COUNT(rows) * COUNT(ins) * COUNT(outs); i++) {
        size_t N = rows[i % 6];
        size_t in = ins[i / 6 % 4];
        size_t out = outs[i / 24];
        float *x = random_floats(N * in, 1);
        float *weight = random_floats(in * out, 1);
        float *bias = random_floats(out, 1);
        float *y = arena_floats(&test_arena, N * out + 1);
        float *plain = arena_floats(&test_arena, N * out);
        y[N * out] = 77;
        struct Tensor w = tensor_of(weight, NULL, in, out);
        struct Tensor b = tensor_of(bias, NULL, out, 0);
        linear_forward(y, x, N, &w, &b);
        matmul_plain(matrix(plain, N, out), (struct Matrix){bias, N, out, 0, 1}, matrix(x, N, in),
                     matrix(weight, in, out));
        expect_floats("rows times a matrix", y, widen(plain, N * out), N * out,
                      2e-6 + 4e-7 * (double)in);
        expect_true("nothing written behind", y[N * out] == 77);
    }
}

/* So do the logits of few and many hidden vectors. */
static void test_few_rows_logits(void) {
    static const size_t rows[] = {1, 2, 3, 8, FEW_ROWS, FEW_ROWS + 1};
    struct GPT2 *model = random_model(263, 8, 36, 1, 2);
    for (size_t i = 0; i < COUNT(rows); i++) {
        float *hidden = random_floats(rows[i] * 36, 1);
        float *logits = arena_floats(&test_arena, rows[i] * 263);
        float *plain = arena_floats(&test_arena, rows[i] * 263);
        output_logits(model, logits, hidden, rows[i]);
        matmul_plain(matrix(plain, rows[i], 263), (struct Matrix){0}, matrix(hidden, rows[i], 36),
                     transposed(matrix(model->wte.w, 263, 36)));
        expect_floats("logits", logits, widen(plain, rows[i] * 263), rows[i] * 263, 2e-5);
        decode_logits(model, logits, hidden, rows[i]);
        expect_floats("logits while a text is written", logits, widen(plain, rows[i] * 263),
                      rows[i] * 263, 2e-5);
    }
}

/* Every tile this machine has, then the definition: each in its turn is the kernel; false behind
 * the last. */
static bool next_kernel(void) {
    static size_t run;
    if (run == 0)
        widest_kernel = kernel;
    size_t tiles = widest_kernel ? (size_t)(widest_kernel - KERNELS) + 1 : 0;
    kernel = run < tiles ? &KERNELS[run] : run == tiles ? NULL : widest_kernel;
    run = run <= tiles ? run + 1 : 0;
    return run > 0;
}

/* Row by row, the first and the last of many rows have the bits they have in the company of all. */
static void expect_company(size_t in, size_t out) {
    enum { ROWS = 40 };
    float *x = random_floats(ROWS * in, 1);
    float *weight = random_floats(in * out, 1);
    float *bias = random_floats(out, 1);
    float *all = arena_floats(&test_arena, ROWS * out);
    float *some = arena_floats(&test_arena, ROWS * out);
    struct Tensor w = tensor_of(weight, NULL, in, out);
    struct Tensor b = tensor_of(bias, NULL, out, 0);
    matmul_bias(matrix(all, ROWS, out), bias, matrix(x, ROWS, in), matrix(weight, in, out));
    for (size_t n = 1; n < ROWS; n += n < FEW_ROWS + 2 ? 1 : 5) {
        linear_forward(some, x, n, &w, &b);
        expect_bits("the first rows", some, all, n * out);
        linear_forward(some, x + (ROWS - n) * in, n, &w, &b);
        expect_bits("the last rows", some, all + (ROWS - n) * out, n * out);
    }
}

/* A row of a linear layer has the same bits however many rows are beside it, on every kernel. */
static void test_rows_company(void) {
    static const size_t ins[] = {1, 7, 64, 390};
    static const size_t outs[] = {1, 13, 31, 96, 780};
    while (next_kernel())
        for (int threads = 1; threads <= 3; threads += 2) {
            use_threads(threads);
            for (size_t i = 0; i < COUNT(ins) * COUNT(outs); i++)
                expect_company(ins[i % COUNT(ins)], outs[i / COUNT(ins)]);
        }
}

/* By hand. */
static void test_layernorm(void) {
    float hand[] = {3, 3, 7, 7};
    float two[] = {2, 2, 2, 2};
    float half[] = {0.5f, 0.5f, 0.5f, 0.5f};
    float dhand[] = {4, 0, 0, 0};
    float dhand_x[4] = {0};
    float y[4], mean, rstd;
    struct Tensor weight = tensor_of(two, NULL, 4, 0);
    struct Tensor bias = tensor_of(half, NULL, 4, 0);
    struct LayerNormRows row = {1, hand, &mean, &rstd};
    layernorm_forward(y, row, &weight, &bias, 0);
    expect_floats("(3, 3, 7, 7)", y, (double[]){-1.5, -1.5, 2.5, 2.5}, 4, 1e-7);
    expect_true("mean 5, variance 4", mean == 5 && rstd == 0.5f);
    layernorm_backward(dhand_x, dhand, row, &weight, &bias);
    expect_floats("dx by hand", dhand_x, (double[]){2, -2, 0, 0}, 4, 1e-7);
}

/* Against torch. */
static void test_layernorm_golden(void) {
    float y[4], mean, rstd;
    float x[] = {1, 2, 4, 8};
    float w[] = {1, 0.5f, -1, 2};
    float b[] = {0, 0.1f, 0.2f, 0.3f};
    float dy[] = {1, -1, 2, 0.5f};
    float dx[4] = {10, 10, 10, 10};
    float dw[4] = {0};
    float db[4] = {0};
    struct Tensor weight = tensor_of(w, dw, 4, 0);
    struct Tensor bias = tensor_of(b, db, 4, 0);
    struct LayerNormRows row = {1, x, &mean, &rstd};
    layernorm_forward(y, row, &weight, &bias, 1e-5f);
    expect_floats("y", y, (double[]){-1.02575458, -0.226376454, 0.106749587, 3.47051415}, 4, 2e-6);
    layernorm_backward(dx, dy, row, &weight, &bias);
    for (int i = 0; i < 4; i++)
        expect_close("dx, added", dx[i] - 10,
                     (double[]){0.486523816, -0.0973048411, -0.70545966, 0.316240685}[i], 4e-6);
    expect_floats("dw", dw, (double[]){-1.02575458, 0.652752912, 0.186500832, 0.792628536}, 4,
                  2e-6);
    expect_floats("db", db, (double[]){1, -1, 2, 0.5}, 4, 2e-6);
}

static double layernorm_loss(void *context) {
    struct LayerCase *c = context;
    struct Tensor weight = tensor_of(c->w, NULL, c->out, 0);
    struct Tensor bias = tensor_of(c->b, NULL, c->out, 0);
    struct LayerNormRows rows = {c->N, c->x, c->mean, c->rstd};
    layernorm_forward(c->y, rows, &weight, &bias, 1e-5f);
    return dot_product(c->y, c->dy, c->N * c->out);
}

static void test_layernorm_gradient(void) {
    struct LayerCase c = {.N = 7, .out = 67};
    size_t n = c.N * c.out;
    c.x = random_floats(n, 1);
    c.w = random_floats(c.out, 1);
    c.b = random_floats(c.out, 1);
    c.y = random_floats(n, 1);
    c.dy = random_floats(n, 1);
    c.mean = random_floats(c.N, 1);
    c.rstd = random_floats(c.N, 1);
    float *dx = arena_zeros(&test_arena, n, 4);
    float *dw = arena_zeros(&test_arena, c.out, 4);
    float *db = arena_zeros(&test_arena, c.out, 4);
    layernorm_loss(&c);
    struct Tensor weight = tensor_of(c.w, dw, c.out, 0);
    struct Tensor bias = tensor_of(c.b, db, c.out, 0);
    struct LayerNormRows rows = {c.N, c.x, c.mean, c.rstd};
    layernorm_backward(dx, c.dy, rows, &weight, &bias);
    struct Slope f = {layernorm_loss, &c, 0.03};
    expect_gradient("x", f, c.x, dx, n, 100, 3e-4);
    expect_gradient("weight", f, c.w, dw, c.out, 67, 3e-4);
    expect_gradient("bias", f, c.b, db, c.out, 67, 3e-4);
}

/* Values and slopes of transformers' gelu_new. */
static void test_gelu(void) {
    static const struct {
        float x;
        double y, slope;
    } golden[] = {
        {-6, -8.43964898e-11, -7.70997601e-10},
        {-3, -0.00363739208, -0.0115841666},
        {-1, -0.158808009, -0.0829640838},
        {-0.5, -0.15428599, 0.132630096},
        {0, 0, 0.5},
        {0.5, 0.34571401, 0.867369904},
        {1, 0.841191991, 1.08296408},
        {3, 2.99636261, 1.01158417},
        {6, 6, 1},
    };
    float y;
    for (size_t i = 0; i < COUNT(golden); i++) {
        float dx = 1;
        gelu_forward(&y, &golden[i].x, 1, 1);
        gelu_backward(&dx, &golden[i].x, 1, 1);
        expect_close("y", y, golden[i].y, 1e-6);
        expect_close("slope", dx, golden[i].slope, 1e-6);
    }
}

/* Its ends, and the numbers of its comment. */
static void test_gelu_hand(void) {
    float y[7];
    float far[] = {0, 30, -30, 1e20f, -1e20f, -1, 2};
    gelu_row(y, far, 7);
    expect_floats("0, large, small", y, (double[]){0, 30, 0, 1e20f, 0}, 5, 1e-6);
    expect_floats("-1 and 2, by hand", y + 5, (double[]){-0.1588, 1.9546}, 2, 5e-5);
    float minus_one = -1;
    float slope = 1;
    gelu_backward_row(&slope, &minus_one, 1);
    expect_close("slope at -1, by hand", slope, -0.0830, 5e-5);
}

/* Over the whole range, against the tanh form in doubles. */
static void test_gelu_range(void) {
    double worst = 0;
    for (double v = -10; v <= 10; v += 0.00037) {
        float in = (float)v;
        float out;
        gelu_row(&out, &in, 1);
        worst = MAX(worst, fabs(out
                                - 0.5 * in
                                      * (1
                                         + tanh(sqrt(2 / 3.14159265358979323846)
                                                * (in + 0.044715 * pow(in, 3))))));
    }
    expect_true("within 2e-6 of the tanh form in doubles", worst < 2e-6);
}

static double gelu_loss(void *context) {
    struct LayerCase *c = context;
    gelu_forward(c->y, c->x, c->N, c->out);
    return dot_product(c->y, c->dy, c->N * c->out);
}

static void test_gelu_gradient(void) {
    struct LayerCase c = {
        .N = 2,
        .out = 53,
        .x = random_floats(106, 2),
        .y = random_floats(106, 1),
        .dy = random_floats(106, 1),
    };
    float *dx = random_floats(106, 1);
    memcpy(dx, c.dy, 106 * sizeof *dx);
    gelu_backward(dx, c.x, c.N, c.out);
    expect_gradient("x", (struct Slope){gelu_loss, &c, 0.03}, c.x, dx, 106, 106, 3e-4);
}

static struct Batch sequences_of(const size_t *length, size_t B) {
    struct Example *examples = arena_alloc(&test_arena, B, sizeof *examples);
    for (size_t b = 0; b < B; b++)
        examples[b] = random_example(length[b], 1, 30);
    return batch_of(examples, B, READ_LAST);
}

/* Two tokens, one head of size 1, by hand. */
static void test_attention_hand(void) {
    float qkv[] = {5, 0, 10, 1, logf(3), 20};
    float dout[] = {0, 4};
    float out[2], lse[2], dqkv[6];
    struct Batch two = sequences_of((size_t[]){2}, 1);
    attention_forward(out, lse, qkv, &two, attention_shape(1, 1));
    expect_floats("out", out, (double[]){10, 17.5}, 2, 1e-5);
    expect_floats("lse", lse, (double[]){0, log(4)}, 2, 1e-6);
    attention_backward(dqkv, dout, out, lse, qkv, &two, attention_shape(1, 1));
    expect_floats("dq, dk, dv of t = 0", dqkv, (double[]){0, -7.5, 1}, 3, 1e-5);
    expect_floats("and of t = 1", dqkv + 3, (double[]){7.5 * log(3), 7.5, 3}, 3, 1e-5);
}

/* Attention by its definition, in doubles: one sequence and head. */
static void attend_plainly(double *out, const float *qkv, size_t C, size_t HS, size_t T) {
    double *p = arena_alloc(&test_arena, T, sizeof *p);
    for (size_t t = 0; t < T; t++) {
        double total = 0;
        for (size_t j = 0; j <= t; j++)
            total += p[j] =
                exp(dot_product(qkv + t * 3 * C, qkv + j * 3 * C + C, HS) / sqrt((double)HS));
        for (size_t c = 0; c < HS; c++)
            out[t * C + c] = 0;
        for (size_t j = 0; j <= t; j++)
            for (size_t c = 0; c < HS; c++)
                out[t * C + c] += p[j] / total * qkv[j * 3 * C + 2 * C + c];
    }
}

/* Torch's values and gradients, queries, keys and values from formulas. */
static void test_attention_golden(void) {
    static const double golden_out[5][4] = {
        {0.745705187, 0.306575, -0.274824679, -0.800666809},
        {-0.0251077607, -0.124858941, -0.110579779, -0.0778156113},
        {0.136922313, -0.0687167318, -0.21676931, -0.218699261},
        {0.180635907, 0.144986601, -0.195263657, -0.381381868},
        {0.163522215, 0.455326275, 0.135781965, -0.669083843},
    };
    static const double golden_dq[5][4] = {
        {0, 0, 0, 0},
        {-0.820438415, -0.481762394, 0.2868383, 0.715507469},
        {0.643778864, 0.205401103, -0.357624596, -0.481980762},
        {-0.313900475, 0.212762823, 0.414880461, 0.0904204776},
        {0.0455781064, 0.152319302, 0.117335652, -0.189836731},
    };
    static const double golden_dk[5][4] = {
        {0.323346555, 0.748379149, 0.645062823, 0.11987897},
        {-0.449259074, -1.11602245, -0.96664639, -0.117048982},
        {0.291671301, 0.462882288, 0.25062775, -0.169028061},
        {-0.0164254602, -0.00846056393, 0.00824014646, 0.0167729597},
        {-0.149333321, -0.0867784263, 0.0627156705, 0.149425114},
    };
    static const double golden_dv[5][4] = {
        {1.1141733, 0.354209422, -0.620613206, -1.2189802},
        {-0.270751231, -0.0908806051, 0.144116967, 0.291695102},
        {-0.150459344, -0.0308386446, 0.107488365, 0.180614366},
        {-0.0291819625, -0.0171783036, 0.00524548116, 0.0244874261},
        {0.196731671, 0.0333801665, -0.150219307, -0.24269776},
    };
    float qkv[5 * 12], out[20], lse[5], dout[20], dqkv[60];
    for (int i = 0; i < 20; i++) {
        float *row = qkv + i / 4 * 12 + i % 4;
        row[0] = (float)sin(0.3 + 0.7 * i + 0.01 * i * i);
        row[4] = (float)sin(1.1 + 0.9 * i + 0.02 * i * i);
        row[8] = (float)sin(2.3 + 0.5 * i + 0.03 * i * i);
        dout[i] = (float)cos(0.4 + 0.8 * i);
    }
    struct Batch five = sequences_of((size_t[]){5}, 1);
    attention_forward(out, lse, qkv, &five, attention_shape(4, 1));
    expect_floats("out", out, golden_out[0], 20, 1e-6);
    attention_backward(dqkv, dout, out, lse, qkv, &five, attention_shape(4, 1));
    for (int i = 0; i < 20; i++) {
        expect_close("dq", dqkv[i / 4 * 12 + i % 4], golden_dq[i / 4][i % 4], 1e-6);
        expect_close("dk", dqkv[i / 4 * 12 + 4 + i % 4], golden_dk[i / 4][i % 4], 1e-6);
        expect_close("dv", dqkv[i / 4 * 12 + 8 + i % 4], golden_dv[i / 4][i % 4], 1e-6);
    }
}

/* Sequences longer than a block of rows, several heads, against the definition. */
static void test_attention(void) {
    static const size_t length[] = {150, 1, 64, 65};
    struct Batch batch = sequences_of(length, 4);
    size_t C = 24;
    size_t NH = 3;
    size_t HS = 8;
    size_t N = batch.N;
    float *x = random_floats(N * 3 * C, 1);
    float *got = arena_floats(&test_arena, N * C);
    float *got_lse = arena_floats(&test_arena, N * NH);
    double *want = arena_alloc(&test_arena, N * C, sizeof *want);
    attention_forward(got, got_lse, x, &batch, attention_shape(C, NH));
    for (size_t b = 0; b < 4; b++)
        for (size_t h = 0; h < NH; h++)
            attend_plainly(want + batch.start[b] * C + h * HS, x + batch.start[b] * 3 * C + h * HS,
                           C, HS, length[b]);
    expect_floats("against the definition", got, want, N * C, 3e-6);
}

static double attention_loss(void *context) {
    struct LayerCase *c = context;
    attention_forward(c->y, c->lse, c->x, c->batch, attention_shape(c->out, c->in));
    return dot_product(c->y, c->dy, c->N * c->out);
}

/* Central differences of queries, keys and values, over the edge of a block of 64 rows. */
static void test_attention_gradient(void) {
    struct Batch batch = sequences_of((size_t[]){71, 3}, 2);
    struct LayerCase c = {.N = 74, .in = 2, .out = 10, .batch = &batch};
    c.x = random_floats(c.N * 30, 1);
    c.y = random_floats(c.N * 10, 1);
    c.dy = random_floats(c.N * 10, 1);
    c.lse = random_floats(c.N * 2, 1);
    float *d = random_floats(c.N * 30, 1);
    attention_loss(&c);
    attention_backward(d, c.dy, c.y, c.lse, c.x, &batch, attention_shape(10, 2));
    struct Slope f = {attention_loss, &c, 0.05};
    expect_gradient("qkv, first rows", f, c.x, d, 30 * 10, 60, 3e-4);
    expect_gradient("qkv", f, c.x, d, 30 * 74, 120, 3e-4);
    expect_gradient("qkv, second sequence", f, c.x + 30 * 71, d + 30 * 71, 90, 90, 3e-4);
}

/* =============================================================================================
 * Chapter 11 - GPT-2, its output layer and its heads
 *
 * A tiny model against transformers, forward and backward; central differences through all of
 * it; batches packed and cut in other ways.
 * ============================================================================================= */

/* Weights start as GPT-2's: deviation 0.02, less for what writes to the residual stream; biases
 * 0, norms 1. */
static void test_gpt2_init(void) {
    struct GPT2 *model = new_model(300, 64, 64, 8, 4);
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        double rms = norm_of(t->w, t->n) / sqrt((double)t->n);
        double want = t->ndim == 2              ? strstr(t->name, "c_proj") ? 0.005 : 0.02
                      : strstr(t->name, "bias") ? 0
                                                : 1;
        expect_close(t->name, rms, want, 0.05 * want);
    }
    struct GPT2 *copy = owned(gpt2_copy(model));
    expect_same_weights("copy", copy, model);
}

/* Logits, log-sum-exps, log-probabilities and loss against transformers. */
static void test_gpt2_golden(void) {
    static const struct {
        size_t b, t, v;
        double want;
    } golden_logits[] = {
        {0, 0, 0, 0.315499783},  {0, 0, 60, 0.681127191},   {0, 5, 17, 0.387881666},
        {0, 11, 3, 0.551511884}, {0, 11, 42, -0.700909019}, {1, 0, 8, 1.49938715},
        {1, 3, 33, 1.02304161},  {1, 6, 60, 0.619625092},
    };
    static const double golden_lse[] = {4.42498302, 4.46406698, 4.41255903, 4.52674389, 4.48971748,
                                        4.48288488, 4.44061565, 4.458148,   4.59317207, 4.57946491,
                                        4.48779774, 4.46262646, 4.49447107, 4.44036627, 4.42413044,
                                        4.39093065, 4.46595526, 4.46355057, 4.48117018};
    static const double golden_logprobs[] = {-4.99166679, -6.63597775, -4.17347574, -4.54953051,
                                             -5.73810768, -4.80450535, -5.31365013, -4.92369366,
                                             -4.6966877,  -3.36197925, -2.99797797, -4.53631115,
                                             -4.4750886,  -6.29824066, -6.47846508, -5.0788269,
                                             -4.40522957};
    struct GPT2 *model = golden_model();
    struct Batch batch = batch_of(golden_examples(), 2, READ_LAST);
    float *logits = batch_logits(model, &batch);
    float scratch[61];
    for (size_t i = 0; i < COUNT(golden_logits); i++) {
        size_t row = batch.start[golden_logits[i].b] + golden_logits[i].t;
        expect_close("logit", logits[row * 61 + golden_logits[i].v], golden_logits[i].want, 5e-6);
    }
    for (size_t n = 0; n < 19; n++)
        expect_close("log_sum_exp", log_sum_exp(logits + n * 61, 61, scratch), golden_lse[n], 6e-6);
    struct LMHead head = batch_logprobs(model, &test_arena, &batch, 1, false);
    expect_count("targets", batch.R, 17);
    expect_floats("log-probability", head.logprob, golden_logprobs, 17, 1e-5);
    expect_close("loss", -sequence_logprob(head.logprob, 17) / 17, 4.9093771, 3e-6);
    for (size_t r = 0; r < 17; r++) {
        const float *row = logits + (size_t)batch.row[r] * 61;
        expect_close("entropy", head.entropy[r], entropy_of_logits(row, head.lse[r], 61), 5e-6);
        expect_close("mean logit", head.mean_logit[r], row_sum(row, 61) / 61, 1e-6);
        expect_true("hit", head.hit[r] == (argmax(row, 61) == (size_t)batch.target[r]));
    }
}

/* One row by hand: logits (0, ln 3), so p = (1/4, 3/4), target 1; and the sums of whole answers. */
static void test_lm_head_hand(void) {
    float numbers[5];
    struct LMHead head = {
        .target = (int[]){1},
        .lse = numbers,
        .logprob = numbers + 1,
        .entropy = numbers + 2,
        .mean_logit = numbers + 3,
        .hit = numbers + 4,
    };
    float logits[] = {0, logf(3)};
    lm_head_row(&head, 0, logits, 2);
    expect_floats("log-sum-exp, log-probability, entropy, mean logit, hit", numbers,
                  (double[]){1.3863, -0.2877, 0.5623, 0.5493, 1}, 5, 5e-5);
    lm_head_backward_row(logits, head.lse[0], 1, -2, 2);
    expect_floats("derivatives by the logits", logits, (double[]){0.5, -0.5}, 2, 1e-6);
    struct Batch batch = {.target_start = (size_t[]){0, 1, 3}};
    double logps[2];
    sum_target_logps(&batch, 2, (float[]){-1, -2, -3}, logps);
    expect_close("an answer of one token", logps[0], -1, 0);
    expect_close("an answer of two", logps[1], -5, 0);
}

/* A model of two tokens and width 2, to be trained. */
static struct GPT2 *two_token_model(void) {
    struct GPT2Config config = {
        .vocab_size = 2,
        .n_positions = 1,
        .n_embd = 2,
        .n_layer = 1,
        .n_head = 1,
        .eos_token_id = 1,
        .pad_token_id = -1,
        .layer_norm_epsilon = 1e-5f,
    };
    struct GPT2 *model = gpt2_new(config);
    gpt2_make_trainable(model);
    return model;
}

/* One row, from its log-probability's slope to wte and to the hidden state: by hand. */
static void test_lm_head_backward_hand(void) {
    struct GPT2 *model = two_token_model();
    memcpy(model->wte.w, (float[]){0, 0, logf(3), 0}, 4 * sizeof(float));

    float hidden[] = {1, 2};
    float dhidden[2] = {0};
    float dlogprob = -2;
    int row = 0;
    int target = 1;
    struct Activations acts = {.ln_f = hidden};
    struct LMHead head = lm_head_new(model, &test_arena, &acts, &row, &target, 1, 1);
    lm_head_forward(model, &head);
    lm_head_backward(model, &head, &dlogprob, dhidden, &test_arena);
    expect_floats("d wte", model->wte.d, (double[]){0.5, 1, -0.5, -1}, 4, 1e-6);
    expect_floats("d hidden", dhidden, (double[]){-0.5 * log(3), 0}, 2, 1e-6);
    gpt2_free(model);
}

/* Chapter 17's number, from PPO's slope to wte both ways, without blocks and norm: by hand. */
static void test_wte_hand(void) {
    struct GPT2 *model = two_token_model();
    memcpy(model->wte.w, (float[]){0, 0, 0.6952f, 0}, 4 * sizeof(float));
    memcpy(model->wpe.w, (float[]){0.3048f, 2}, 2 * sizeof(float));

    struct Batch batch = {.N = 1, .ids = (int[]){1}, .position = (int[]){0}};
    float hidden[2];
    embedding_forward(hidden, &batch, model->wte.w, model->wpe.w, 2);
    expect_floats("hidden", hidden, (double[]){1, 2}, 2, 1e-6);

    float dhidden[2] = {0};
    float dlogprob = 0.3957f;
    int row = 0;
    int target = 0;
    struct Activations acts = {.ln_f = hidden};
    struct LMHead head = lm_head_new(model, &test_arena, &acts, &row, &target, 1, 1);
    lm_head_forward(model, &head);
    expect_close("log pi", head.logprob[0], -1.1, 1e-4);
    lm_head_backward(model, &head, &dlogprob, dhidden, &test_arena);
    expect_floats("d wte, output", model->wte.d, (double[]){0.264, 0.528, -0.264, -0.528}, 4, 1e-4);
    expect_floats("d hidden", dhidden, (double[]){-0.1835, 0}, 2, 1e-4);
    embedding_backward(model->wte.d, model->wpe.d, dhidden, &batch, 2);
    expect_floats("d wte", model->wte.d, (double[]){0.264, 0.528, -0.4475, -0.528}, 4, 1e-4);
    gpt2_free(model);
}

/* The gradient of a batch's mean cross-entropy; chunk: rows of the output layer at once, 0: its own
 * choice. */
static struct LMHead cross_entropy_gradient(struct GPT2 *model, const struct Batch *batch,
                                            float temperature, float scale, size_t chunk) {
    struct Activations acts = gpt2_forward(model, &test_arena, batch, true);
    struct LMHead head =
        lm_head_new(model, &test_arena, &acts, batch->row, batch->target, batch->R, temperature);
    if (chunk)
        head.chunk = chunk;
    float *dhidden = arena_zeros(&test_arena, batch->N * model->config.n_embd, sizeof *dhidden);
    lm_head_cross_entropy(model, &head, scale, dhidden, &test_arena);
    gpt2_backward(model, &test_arena, &acts, dhidden);
    return head;
}

/* Norm and ends of every tensor's gradient against torch's. */
static void test_gpt2_gradient_golden(void) {
    static const struct {
        double norm, ends[4];
    } golden[] = {
        {1.34106719, {0.0140096601, 0.0382240415, -0.0437635072, -0.0211944971}},
        {0.688214421, {0.0231964141, 0.00233481731, 0, 0}},
        {0.156415701, {-0.0512597635, 0.00259381928, 0.00461913459, -0.00526909065}},
        {0.208438754, {0.116041444, -0.0859639496, -0.0607703142, 0.039005775}},
        {0.770673156, {0.0230030697, -0.000202904499, -0.0467500128, -0.0376477875}},
        {0.35108611, {0.000449372455, 0.00319855195, 0.0535002723, -0.00402795803}},
        {0.697219431, {0.039102789, 0.0282223336, 0.114623904, 0.00282348949}},
        {0.39914757, {0.08413326, -0.067441009, -0.0986377895, -0.0618059561}},
        {0.130233914, {-0.00937988888, -0.020181736, -0.0200131759, -0.016307883}},
        {0.175667286, {0.000932431314, -0.0275847483, -0.100541912, -0.0184533633}},
        {0.736602187, {0.00470054615, -0.0119896438, -0.00885186996, -0.00705449423}},
        {0.224149168, {0.0240963772, 0.0112637402, -0.0275587775, -0.0177149847}},
        {0.655698299, {-0.00423472701, -0.00510229589, 0.0241163056, -0.0105314963}},
        {0.170337006, {0.0063066287, -0.0515935868, 0.025675524, -0.0342572853}},
        {0.0729051754, {0.00118115474, -0.00661215233, 0.0332521237, 0.00786426198}},
        {0.107150771, {-0.0118944626, -0.0107830334, -0.014829088, -0.0166916288}},
        {0.600260258, {-0.000384738989, -0.000872198318, -0.0127929365, -0.00254147477}},
        {0.158166543, {0.00224440754, -0.00396429794, 0.011194814, 0.0286136921}},
        {0.524300575, {0.000714541122, 0.00653385837, 0.0122790402, -0.0119109703}},
        {0.153264239, {0.0134599563, -0.0413438454, 0.0312999487, -0.0231640767}},
        {0.104889669, {-0.00419140235, -0.0381934345, 0.0466098487, 0.00624612579}},
        {0.126633823, {-0.000273735845, -0.0109314462, -0.0171370022, -0.0168884508}},
        {0.49948433, {0.00268693734, 0.00228807237, -0.00176244148, -0.0119123533}},
        {0.130374819, {0.00164836994, -0.0198231861, -0.00156693277, 0.0201836955}},
        {0.400363952, {0.0143272104, 0.00912884157, 0.0089287078, -0.00624290109}},
        {0.12922436, {0.006825889, -0.028333459, 0.0160839558, -0.031427864}},
        {0.407696098, {0.0714445189, 0.0637056828, 0.325430393, 0.0916504338}},
        {0.262816101, {0.0251195636, 0.0331897065, -0.141107023, -0.103696443}},
    };
    struct GPT2 *model = golden_model();
    gpt2_make_trainable(model);
    struct Batch batch = batch_of(golden_examples(), 2, SKIP_LAST);
    cross_entropy_gradient(model, &batch, 1, 1.0f / 17, 0);
    expect_count("tensors", model->tensor_count, 28);
    for (size_t i = 0; i < 28; i++) {
        const struct Tensor *t = model->tensors[i];
        float ends[] = {t->d[0], t->d[1], t->d[t->n - 2], t->d[t->n - 1]};
        expect_relative(t->name, norm_of(t->d, t->n), golden[i].norm, 5e-6);
        expect_floats(t->name, ends, golden[i].ends, 4, 1.5e-6);
    }
    expect_close("all", gradient_norm(model), 2.49169612, 1e-5);
}

/* A model, a batch and how the output layer reads it. */
struct ModelCase {
    struct GPT2 *model;
    struct Batch batch;
    float temperature, *dlogprob;
    size_t chunk;
};

/* Sum of dlogprob times log-probability; backward: its gradient. */
static double model_loss(void *context) {
    struct ModelCase *c = context;
    struct Arena arena = {0};
    struct Activations acts = gpt2_forward(c->model, &arena, &c->batch, false);
    struct LMHead head = lm_head_new(c->model, &arena, &acts, c->batch.row, c->batch.target,
                                     c->batch.R, c->temperature);
    if (c->chunk)
        head.chunk = c->chunk;
    lm_head_forward(c->model, &head);
    double loss = dot_product(head.logprob, c->dlogprob, c->batch.R);
    arena_free(&arena);
    return loss;
}

static void model_gradient(struct ModelCase *c) {
    struct GPT2 *model = c->model;
    gpt2_make_trainable(model);
    gpt2_zero_grad(model);
    struct Activations acts = gpt2_forward(model, &test_arena, &c->batch, true);
    struct LMHead head = lm_head_new(model, &test_arena, &acts, c->batch.row, c->batch.target,
                                     c->batch.R, c->temperature);
    if (c->chunk)
        head.chunk = c->chunk;
    float *dhidden = arena_zeros(&test_arena, c->batch.N * model->config.n_embd, sizeof *dhidden);
    lm_head_forward(model, &head);
    lm_head_backward(model, &head, c->dlogprob, dhidden, &test_arena);
    gpt2_backward(model, &test_arena, &acts, dhidden);
}

static struct ModelCase model_case(float temperature, size_t chunk) {
    struct ModelCase c = {
        .model = random_model(37, 12, 8, 2, 2),
        .temperature = temperature,
        .chunk = chunk,
    };
    struct Example examples[] = {random_example(12, 1, 37), random_example(5, 3, 37),
                                 random_example(9, 1, 37)};
    c.batch = batch_of(examples, 3, SKIP_LAST);
    c.dlogprob = random_floats(c.batch.R, 0.3);
    return c;
}

/* Central differences through the whole model, several weights of every tensor: embedding,
 * blocks, tied output layer. */
static void test_gpt2_gradient(void) {
    struct ModelCase c = model_case(1, 0);
    model_gradient(&c);
    for (size_t i = 0; i < c.model->tensor_count; i++) {
        struct Tensor *t = c.model->tensors[i];
        expect_gradient(t->name, (struct Slope){model_loss, &c, 0.015}, t->w, t->d, t->n, 12, 2e-3);
    }
}

/* With a temperature, and with the output layer's rows in chunks of five. */
static void test_gpt2_chunks(void) {
    struct ModelCase c = model_case(0.7f, 5);
    struct ModelCase whole = c;
    whole.chunk = 0;
    model_gradient(&c);
    for (size_t i = 0; i < c.model->tensor_count; i += 5) {
        struct Tensor *t = c.model->tensors[i];
        expect_gradient(t->name, (struct Slope){model_loss, &c, 0.015}, t->w, t->d, t->n, 8, 2e-3);
    }
    expect_close("loss in one chunk", model_loss(&c), model_loss(&whole), 1e-5);
    float *wte = random_floats(c.model->wte.n, 1);
    memcpy(wte, c.model->wte.d, c.model->wte.n * sizeof *wte);
    model_gradient(&whole);
    expect_floats("wte's gradient in one chunk", wte, widen(c.model->wte.d, c.model->wte.n),
                  c.model->wte.n, 1e-5);
    /* cross_entropy: forward and backward chunk by chunk */
    for (size_t chunk = 1; chunk <= 4; chunk++) {
        gpt2_zero_grad(c.model);
        for (size_t r = 0; r < c.batch.R; r++)
            c.dlogprob[r] = -0.1f;
        cross_entropy_gradient(c.model, &c.batch, 0.7f, 0.1f, chunk == 4 ? c.batch.R : chunk);
        memcpy(wte, c.model->wte.d, c.model->wte.n * sizeof *wte);
        model_gradient(&whole);
        expect_floats("wte's gradient of the cross-entropy", wte,
                      widen(c.model->wte.d, c.model->wte.n), c.model->wte.n, 1e-5);
    }
}

/* A packed batch gives each sequence what it gets alone. */
static void test_gpt2_packed(void) {
    struct GPT2 *model = random_model(50, 80, 16, 2, 4);
    struct Example examples[] = {random_example(3, 1, 50), random_example(80, 1, 50),
                                 random_example(1, 1, 50), random_example(66, 1, 50)};
    struct Batch batch = batch_of(examples, 4, READ_LAST);
    float *together = batch_logits(model, &batch);
    for (size_t b = 0; b < 4; b++) {
        struct Batch one = batch_of(&examples[b], 1, READ_LAST);
        expect_floats("logits", together + batch.start[b] * 50,
                      widen(batch_logits(model, &one), examples[b].n * 50), examples[b].n * 50,
                      2e-5);
    }
}

struct HeadCase {
    float *hidden, *out, *dout;
    int *row;
    struct Linear head;
};

static double head_loss(void *context) {
    struct HeadCase *c = context;
    scalar_head_forward(c->out, c->hidden, c->row, 4, &c->head.weight, &c->head.bias);
    return dot_product(c->out, c->dout, 4);
}

/* By hand: hidden (2, 3), weight (0.5, -1), bias 4, dout 2. */
static void test_reward_head_gradient_hand(void) {
    float hidden[] = {2, 3};
    float weight[] = {0.5f, -1};
    float bias = 4;
    float out = 0;
    float dhidden[2] = {0};
    float dweight[2] = {0};
    float dbias = 0;
    struct Tensor w = {.n = 2, .w = weight, .d = dweight};
    struct Tensor b = {.n = 1, .w = &bias, .d = &dbias};
    int row = 0;
    scalar_head_forward(&out, hidden, &row, 1, &w, &b);
    expect_close("1 - 3 + 4", out, 2, 0);
    scalar_head_backward(dhidden, (float[]){2}, hidden, &row, 1, &w, &b);
    expect_floats("dhidden", dhidden, (double[]){1, -2}, 2, 0);
    expect_floats("dweight", dweight, (double[]){4, 6}, 2, 0);
    expect_close("dbias", dbias, 2, 0);
}

/* By central differences; a row that is read twice gets both gradients. */
static void test_reward_head_gradient(void) {
    struct HeadCase c = {random_floats(60, 1),
                         random_floats(4, 1),
                         random_floats(4, 1),
                         (int[]){4, 0, 2, 2},
                         {
                             .weight = {.n = 12, .w = random_floats(12, 1)},
                             .bias = {.n = 1, .w = random_floats(1, 1)},
                         }};
    c.head.weight.d = arena_zeros(&test_arena, 12, 4);
    c.head.bias.d = arena_zeros(&test_arena, 1, 4);
    float *dhidden = arena_zeros(&test_arena, 60, 4);
    scalar_head_backward(dhidden, c.dout, c.hidden, c.row, 4, &c.head.weight, &c.head.bias);
    struct Slope f = {head_loss, &c, 0.1};
    expect_gradient("hidden", f, c.hidden, dhidden, 60, 60, 1e-4);
    expect_gradient("weight", f, c.head.weight.w, c.head.weight.d, 12, 12, 1e-4);
    expect_gradient("bias", f, c.head.bias.w, c.head.bias.d, 1, 1, 1e-4);
}

/* A new value head is U(-1/sqrt(C), 1/sqrt(C)). */
static void test_value_head_init(void) {
    struct GPT2 *model = new_model(300, 8, 400, 1, 4);
    value_head_init(model, 3);
    double most = 0;
    double square = 0;
    for (size_t i = 0; i < 400; i++) {
        most = MAX(most, fabs(model->v_head.weight.w[i]));
        square += pow(model->v_head.weight.w[i], 2) / 400;
    }
    expect_true("within 1/20", most <= 0.05 && most > 0.048);
    expect_close("variance of a uniform distribution", square, 0.05 * 0.05 / 3, 1e-4);
}

static const double golden_rm_reward[2] = {1.91350985, 1.32131338};

/* A reward is read before the padding, also where an end token pads. */
static void test_reward_rows(void) {
    struct Example examples[] = {{(int[]){1, 2, 60, 60}, 4, 0},
                                 {(int[]){60, 3}, 2, 0},
                                 {(int[]){60, 60}, 2, 0},
                                 {(int[]){4}, 1, 0},
                                 {(int[]){5, 60, 6, 60}, 4, 0}};
    struct Batch batch = batch_of(examples, 5, READ_LAST);
    int row[5];
    reward_rows(&batch, 60, row);
    expect_ids("rows", row, 5, (int[]){1, 5, 6, 8, 11}, 5);
}

/* More texts than go together; an empty text is a lone end token. */
static void test_reward_rows_score(void) {
    struct GPT2 *model = golden_model();
    golden_fill(reward_head_declare(model), 100);
    struct Example *golden = golden_examples();
    struct Example texts[40];
    struct Example end = {(int[]){60}, 1, 0};
    for (size_t i = 0; i < 40; i++)
        texts[i] = golden[i % 2];
    texts[39] = (struct Example){NULL, 0, 0};
    float reward[40], lone;
    reward_score(model, texts, 40, reward);
    for (size_t i = 0; i < 39; i++)
        expect_close("more texts than go together", reward[i], golden_rm_reward[i % 2], 3e-6);
    reward_score(model, &end, 1, &lone);
    expect_close("empty text", reward[39], lone, 2e-6);
}

/* Rewards, Bradley-Terry loss and gradients against transformers' GPT2ForSequenceClassification. */
static void test_reward_golden(void) {
    struct GPT2 *model = golden_model();
    golden_fill(reward_head_declare(model), 100);
    gpt2_make_trainable(model);
    struct Batch batch = batch_of(golden_examples(), 2, READ_LAST);
    struct Activations acts = gpt2_forward(model, &test_arena, &batch, true);
    int row[2];
    float reward[2], dreward[2];
    float *dhidden = arena_zeros(&test_arena, batch.N * 16, sizeof *dhidden);
    reward_rows(&batch, 60, row);
    expect_ids("rows", row, 2, (int[]){11, 18}, 2);
    scalar_head_forward(reward, acts.ln_f, row, 2, &model->score, NULL);
    expect_floats("reward", reward, golden_rm_reward, 2, 3e-6);
    double loss = bradley_terry_loss(reward, 2, &(struct Pair){0, 1, 0}, 1, 0, dreward);
    expect_close("loss", loss, 0.440260053, 1e-6);
    scalar_head_backward(dhidden, dreward, acts.ln_f, row, 2, &model->score, NULL);
    gpt2_backward(model, &test_arena, &acts, dhidden);
    expect_relative("norm of score's gradient", norm_of(model->score.d, 16), 1.24609327, 5e-6);
    expect_floats("score's gradient", model->score.d,
                  (double[]){-0.104179293, -0.382685363, 0.298906446, -0.4691962}, 4, 3e-6);
    expect_relative("norm of wte's gradient", norm_of(model->wte.d, model->wte.n), 0.986561418,
                    5e-6);
    expect_relative("norm of wpe's gradient", norm_of(model->wpe.d, model->wpe.n), 1.01357591,
                    5e-6);
}

/* =============================================================================================
 * Chapter 12 - LoRA
 *
 * An adapter by hand and by central differences. It starts as its base to the bit, is merged
 * into it, and leaves it alone in training.
 * ============================================================================================= */

/* One row by hand: x = (1, 2), A = (3, 4), B = (5), scale 2; then every gradient for dy = 1; then
 * the adapter merged into W = (1, 1). */
static void test_lora_hand(void) {
    float A[] = {3, 4};
    float B[] = {5};
    float dA[2] = {0};
    float dB[1] = {0};
    float x[] = {1, 2};
    float y[] = {7};
    float dy[] = {1};
    float dx[] = {1, 1};
    struct Linear linear = {
        .lora_A = {.w = A, .d = dA, .shape = {1, 2}, .n = 2},
        .lora_B = {.w = B, .d = dB, .shape = {1, 1}, .n = 1},
        .lora_scale = 2,
    };
    lora_forward(y, x, &linear, 1);
    expect_close("7 + 2 * 5 * (3 + 8)", y[0], 117, 0);
    for (int pass = 1; pass <= 2; pass++) {
        lora_backward(dx, dy, x, &linear, 1);
        expect_floats("dA, added to", dA, (double[]){10 * pass, 20 * pass}, 2, 0);
        expect_close("dB, added to", dB[0], 22 * pass, 0);
        expect_floats("dx, added to", dx, (double[]){1 + 30 * pass, 1 + 40 * pass}, 2, 0);
    }
    float W[] = {1, 1};
    linear.weight = (struct Tensor){.w = W, .shape = {2, 1}, .n = 2};
    lora_merge(&linear);
    expect_floats("merged", W, (double[]){31, 41}, 2, 0);
    expect_true("no adapter is left", !linear.lora_A.n && !linear.lora_B.n);
}

/* A random model with a random adapter: no zero in B that would hide A. */
static void random_adapter(struct GPT2 *model, size_t r, const char *targets) {
    adapter_new(model,
                (struct Adapter){
                    .r = r,
                    .lora_alpha = 2 * (double)r,
                    .target_modules = targets,
                    .base_model_name_or_path = "base",
                },
                5);
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        for (size_t k = 0; strstr(t->name, ".lora_") && k < t->n; k++)
            t->w[k] = (float)(0.3 * rng_normal(&test_rng));
    }
}

static size_t trainable_count(const struct GPT2 *model) {
    size_t n = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        n += model->tensors[i]->d ? model->tensors[i]->n : 0;
    return n;
}

/* Which layers a target takes; the numbers of the course's labs at GPT-2's width, one layer of
 * twelve. */
static void test_lora_targets(void) {
    static const struct {
        const char *targets;
        bool taken[4];
    } cases[] = {
        {"c_attn", {1, 0, 0, 0}},
        {"c_proj", {0, 1, 0, 1}},
        {"mlp.c_proj", {0, 0, 0, 1}},
        {"c_fc,attn.c_proj", {0, 1, 1, 0}},
        {"proj", {0, 0, 0, 0}},
        {"attn", {0, 0, 0, 0}},
        {"transformer.h.0.mlp.c_fc", {0, 0, 1, 0}},
        {"h.1.mlp.c_fc", {0, 0, 0, 0}},
        {"x.transformer.h.0.mlp.c_fc", {0, 0, 0, 0}},
        {"", {0, 0, 0, 0}},
    };
    static const char *const modules[] = {
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        for (size_t k = 0; k < 4; k++)
            expect_true(cases[i].targets,
                        lora_is_target(modules[k], cases[i].targets) == cases[i].taken[k]);
    static const struct {
        const char *targets;
        size_t r, want;
    } labs[] = {
        {"c_proj c_attn", 4, 405504},
        {"attn.c_attn attn.c_proj", 8, 442368},
        {"c_attn", 16, 589824},
        {"all-linear", 1, 147456},
    };
    for (size_t i = 0; i < COUNT(labs); i++) {
        struct GPT2 *model = new_model(300, 4, 768, 1, 12);
        random_adapter(model, labs[i].r, labs[i].targets);
        gpt2_make_trainable(model);
        expect_count(labs[i].targets, 12 * trainable_count(model), labs[i].want);
    }
}

/* A starts as U(-1/sqrt(in), 1/sqrt(in)), B as zero. alpha / r, with rslora alpha / sqrt(r). */
static void test_lora_start(void) {
    struct GPT2 *model = random_model(37, 12, 64, 1, 2);
    adapter_new(model,
                (struct Adapter){
                    .r = 64,
                    .lora_alpha = 16,
                    .target_modules = "c_attn mlp.c_proj",
                    .use_rslora = true,
                },
                5);
    const struct Linear *wide = &model->h[0].mlp.c_proj;
    const struct Linear *rows[] = {&model->h[0].attn.c_attn, wide};
    for (int i = 0; i < 2; i++) {
        const struct Tensor *A = &rows[i]->lora_A;
        double bound = 1 / sqrt((double)A->shape[1]);
        double most = 0;
        for (size_t k = 0; k < A->n; k++)
            most = MAX(most, fabs(A->w[k]));
        expect_true("within the bound, and near it", most <= bound && most > 0.99 * bound);
        expect_relative("variance of a uniform distribution",
                        norm_of(A->w, A->n) * norm_of(A->w, A->n) / (double)A->n, bound * bound / 3,
                        0.05);
        expect_close("B", norm_of(rows[i]->lora_B.w, rows[i]->lora_B.n), 0, 0);
    }
    expect_true("shapes", wide->lora_A.shape[0] == 64 && wide->lora_A.shape[1] == 256
                              && wide->lora_B.shape[0] == 64 && wide->lora_B.shape[1] == 64
                              && !model->h[0].mlp.c_fc.lora_A.n);
    expect_close("rslora", wide->lora_scale, 16.0 / 8, 0);
    struct Adapter plain = {.r = 64, .lora_alpha = 16};
    expect_close("alpha / r", adapter_scale(&plain), 0.25, 0);
}

/* With B zero the model is the base to the bit. */
static void test_lora_start_bits(void) {
    struct GPT2 *model = random_model(37, 12, 64, 1, 2);
    struct GPT2 *base = owned(gpt2_copy(model));
    adapter_new(model,
                (struct Adapter){
                    .r = 64,
                    .lora_alpha = 16,
                    .target_modules = "c_attn mlp.c_proj",
                    .use_rslora = true,
                },
                5);
    struct Example e = random_example(12, 1, 37);
    struct Batch batch = batch_of(&e, 1, READ_LAST);
    expect_bits("the base's logits", batch_logits(model, &batch), batch_logits(base, &batch),
                12 * 37);
}

/* Central differences of every A and B through the whole model; nothing else has a gradient. */
static void test_lora_gradient(void) {
    struct ModelCase c = model_case(0.8f, 5);
    random_adapter(c.model, 3, "all-linear");
    model_gradient(&c);
    size_t adapted = 0;
    for (size_t i = 0; i < c.model->tensor_count; i++) {
        struct Tensor *t = c.model->tensors[i];
        expect_true(t->name, (t->d != NULL) == (strstr(t->name, ".lora_") != NULL)
                                 && (t->m != NULL) == (t->d != NULL)
                                 && (t->v != NULL) == (t->d != NULL));
        if (!t->d)
            continue;
        expect_gradient(t->name, (struct Slope){model_loss, &c, 0.015}, t->w, t->d, t->n, 12, 2e-3);
        expect_true("a gradient that is not zero", norm_of(t->d, t->n) > 1e-4);
        adapted++;
    }
    expect_count("A and B of four layers in two blocks", adapted, 16);
}

/* Folded into its base, an adapter computes the same: many rows, few rows, and decoded; the base
 * alone does not. */
static void test_lora_merge(void) {
    struct GPT2 *model = random_model(37, 24, 16, 2, 2);
    struct GPT2 *base = owned(gpt2_copy(model));
    random_adapter(model, 3, "c_attn c_fc mlp.c_proj");
    struct Example examples[] = {random_example(24, 1, 37), random_example(20, 1, 37)};
    struct Batch batch = batch_of(examples, 2, READ_LAST);
    struct Batch few = batch_of(examples + 1, 1, READ_LAST);
    struct GenerationConfig config = generation_config();
    struct Sequence s[2];
    float *on[2] = {batch_logits(model, &batch), batch_logits(model, &few)};
    float *plain = batch_logits(base, &batch);
    for (int merged = 0; merged < 2; merged++) {
        if (merged)
            adapter_merge(model);
        s[merged] = sequence_start(&test_arena, examples[0].ids, 4, 16, model, rng_seed(1, 1));
        generate(model, &s[merged], 1, &config);
    }
    float *off = batch_logits(model, &batch);
    float difference = 0;
    for (size_t i = 0; i < 44 * 37; i++)
        difference = MAX(difference, fabsf(off[i] - plain[i]));
    expect_true("an adapter that matters", difference > 0.5);
    expect_floats("merged", off, widen(on[0], 44 * 37), 44 * 37, 1e-4);
    expect_floats("merged, few rows", batch_logits(model, &few), widen(on[1], 20 * 37), 20 * 37,
                  1e-4);
    expect_ids("decoded", s[1].ids, s[1].n, s[0].ids, s[0].n);
    expect_true("no adapter is left", model->tensor_count == base->tensor_count && !model->adapter.r
                                          && !model->h[1].mlp.c_fc.lora_A.n);
}

/* The reference shares the base: of a new adapter it is the base to the bit, of one that goes on
 * a copy that stays. */
static void test_lora_reference(void) {
    struct GPT2 *model = random_model(37, 12, 8, 2, 2);
    struct GPT2 *base = owned(gpt2_copy(model));
    random_adapter(model, 3, "c_attn c_proj");
    struct GPT2 *off = owned(adapter_reference(model, false));
    struct GPT2 *frozen = owned(adapter_reference(model, true));
    struct Example e = random_example(12, 1, 37);
    struct Batch batch = batch_of(&e, 1, READ_LAST);
    float *start = batch_logits(model, &batch);
    for (size_t k = 0; k < model->h[1].attn.c_proj.lora_B.n; k++)
        model->h[1].attn.c_proj.lora_B.w[k] += (float)(k % 5);
    expect_true("one copy of the base",
                off->wte.w == model->wte.w
                    && frozen->h[1].mlp.c_fc.weight.w == model->h[1].mlp.c_fc.weight.w);
    expect_bits("adapter off", batch_logits(off, &batch), batch_logits(base, &batch), 12 * 37);
    expect_bits("frozen", batch_logits(frozen, &batch), start, 12 * 37);
    expect_true("the model has moved",
                fabsf(batch_logits(model, &batch)[100] - start[100]) > 1e-3f);
}

/* Training: the base stays to the bit, decay or not; adapter and reward head move; on one to
 * three threads the same. */
static void test_lora_frozen(void) {
    float *trained[4] = {NULL};
    size_t n = 0;
    size_t m = 0;
    for (int threads = 1; threads <= 3; threads++) {
        test_rng = rng_seed(7, 78);
        use_threads(threads);
        struct GPT2 *model = random_model(50, 40, 16, 2, 2);
        struct GPT2 *base = owned(gpt2_copy(model));
        struct Example examples[8];
        for (size_t i = 0; i < 8; i++)
            examples[i] = random_example(40, 1, 50);
        reward_head_declare(model);
        adapter_new(model,
                    (struct Adapter){.r = 4, .lora_alpha = 8, .target_modules = "c_attn c_proj"},
                    5);
        struct Trainer trainer = trainer_of(model, 1e-2, 4, 4);
        trainer.args.weight_decay = 0.1;
        struct RewardTask task = {.texts = {examples}, .number = {(double[]){0, 0, 0, 0}}};
        trainer.task = (struct Task){.name = "reward", .n = 4, .data = &task, .loss = reward_loss};
        trainer_train(&trainer);
        for (size_t i = 0; i < base->tensor_count; i++)
            expect_bits(base->tensors[i]->name, model->tensors[i]->w, base->tensors[i]->w,
                        base->tensors[i]->n);
        for (size_t i = base->tensor_count; i < model->tensor_count; i++)
            expect_true(model->tensors[i]->name,
                        norm_of(model->tensors[i]->w, model->tensors[i]->n) > 1e-3);
        trained[threads] = all_weights(model, &n);
        if (threads == 1)
            m = n;
        expect_bits("threads", trained[threads], trained[1], MIN(n, m));
        trainer_free(&trainer);
    }
}

/* =============================================================================================
 * Chapter 13 - Writing
 *
 * Texts by the KV cache against whole passes; greedy tokens and beams against transformers;
 * small beam searches against a search of everything.
 * ============================================================================================= */

/* The golden prompt of four tokens, to be continued by up to `more`. */
static struct Sequence golden_prompt(const struct GPT2 *model, size_t more) {
    return sequence_start(&test_arena, golden_examples()[0].ids, 4, more, model, rng_seed(1, 1));
}

/* Greedy tokens of transformers, with and without repetition penalty. */
static void test_generate_golden(void) {
    static const struct {
        double repetition_penalty;
        int ids[8];
    } cases[] = {{1, {52, 52, 52, 52, 52, 4, 4, 4}}, {1.5, {52, 52, 4, 48, 7, 44, 48, 48}}};
    struct GPT2 *model = golden_model();
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct GenerationConfig config = generation_config();
        struct Sequence s = golden_prompt(model, 8);
        config.repetition_penalty = cases[i].repetition_penalty;
        generate(model, &s, 1, &config);
        expect_ids("greedy", s.ids + 4, s.n - 4, cases[i].ids, 8);
    }
}

/* Hidden states by the KV cache, prompts of different lengths first and then token by token,
 * against the whole pass. */
static void test_generate_decode(void) {
    struct GPT2 *model = random_model(50, 70, 16, 2, 4);
    struct Example e[] = {random_example(70, 1, 50), random_example(12, 1, 50),
                          random_example(33, 1, 50)};
    struct Batch whole = batch_of(e, 3, READ_LAST);
    struct Activations acts = gpt2_forward(model, &test_arena, &whole, false);
    struct KVCache cache = kv_cache_new(model, &test_arena, 3, 70);
    struct Sequence s[3], *active[3];
    size_t fed[3] = {0};
    for (size_t step = 0; step < 70; step++) {
        size_t count = 0;
        size_t row = 0;
        for (size_t i = 0; i < 3; i++) {
            size_t n = MIN(e[i].n, step ? fed[i] + 1 : 3 + 4 * i);
            if (n == fed[i])
                continue;
            s[i] = (struct Sequence){.ids = e[i].ids, .n = n, .slot = i};
            active[count++] = &s[i];
        }
        struct Batch batch = decode_batch(&test_arena, active, count, &cache);
        float *hidden = gpt2_decode(model, &test_arena, &batch, &cache);
        for (size_t i = 0, b; i < count; i++)
            for (b = active[i]->slot; fed[b] < active[i]->n; fed[b]++, row++)
                expect_floats("hidden", hidden + row * 16,
                              widen(acts.ln_f + (whole.start[b] + fed[b]) * 16, 16), 16, 2e-5);
    }
}

/* Sampled texts with the cache against a whole pass for each token, alone and together, on one
 * to three threads. */
static void test_generate_cache(void) {
    struct GPT2 *model = random_model(50, 24, 16, 2, 2);
    struct GenerationConfig config = sampling(1.3, 20, 0.95);
    struct Sequence together[4][70], alone, plain;
    struct Example prompt[70];
    config.repetition_penalty = 1.2;
    for (size_t i = 0; i < 70; i++)
        prompt[i] = random_example(1 + i % 7, 0, 50);
    for (int threads = 1; threads <= 3; threads++) {
        use_threads(threads);
        for (size_t i = 0; i < 70; i++)
            together[threads][i] = sequence_start(&test_arena, prompt[i].ids, prompt[i].n, 5 + i,
                                                  model, rng_seed(i, STREAM_SAMPLE));
        generate(model, together[threads], 70, &config);
        for (size_t i = 0; i < 70; i++)
            expect_ids("on more threads", together[threads][i].ids, together[threads][i].n,
                       together[1][i].ids, together[1][i].n);
    }
    use_threads(1);
    for (size_t i = 0; i < 70; i += 3) {
        alone = sequence_start(&test_arena, prompt[i].ids, prompt[i].n, 5 + i, model,
                               rng_seed(i, STREAM_SAMPLE));
        plain = sequence_start(&test_arena, prompt[i].ids, prompt[i].n, 5 + i, model,
                               rng_seed(i, STREAM_SAMPLE));
        generate(model, &alone, 1, &config);
        while (!plain.finished) {
            struct Example so_far = {plain.ids, plain.n, 0};
            struct Batch batch = batch_of(&so_far, 1, READ_LAST);
            sequence_extend(&plain, batch_logits(model, &batch) + (plain.n - 1) * 50, 50, &config,
                            49);
        }
        expect_ids("alone", together[1][i].ids, together[1][i].n, alone.ids, alone.n);
        expect_ids("without a cache", together[1][i].ids, together[1][i].n, plain.ids, plain.n);
        bool ended = plain.ids[plain.n - 1] == 49 && plain.n > plain.prompt_length;
        expect_true("ends at the end token, its limit or one past the context",
                    ended || plain.n == MIN(prompt[i].n + 5 + i, (size_t)25));
    }
}

/* The next token's logits of one sequence, its prompt read and `again` tokens written, `others`
 * decoded beside it. */
static float *logits_in_company(const struct GPT2 *model, const struct Example *prompt,
                                size_t others, size_t again) {
    size_t count = others + 1;
    size_t V = model->config.vocab_size;
    struct KVCache cache = kv_cache_new(model, &test_arena, count, 40);
    struct Sequence *s = arena_alloc(&test_arena, count, sizeof *s);
    struct Sequence **active = arena_alloc(&test_arena, count, sizeof *active);
    for (size_t i = 0; i < count; i++) {
        s[i] = sequence_start(&test_arena, prompt[i].ids, prompt[i].n, 20, model, test_rng);
        s[i].slot = i;
        active[i] = &s[i];
    }
    float *logits = generate_step(model, &test_arena, active, count, &cache);
    for (size_t step = 0; step < again; step++) {
        for (size_t i = 0; i < count; i++)
            s[i].ids[s[i].n++] = (int)((i + step) % V);
        logits = generate_step(model, &test_arena, active, count, &cache);
    }
    return logits;
}

/* Up to FEW_ROWS sequences: the same bits in any company. More: the same but for the rounding of
 * the output layer. */
static void test_generate_company(void) {
    struct GPT2 *model = random_model(263, 48, 36, 2, 2);
    struct Example prompt[64];
    for (size_t i = 0; i < 64; i++)
        prompt[i] = random_example(1 + i * 5 % 23, 0, 263);
    prompt[0] = random_example(9, 0, 263);
    while (next_kernel())
        for (size_t again = 0; again < 4; again += 3) {
            float *alone = logits_in_company(model, prompt, 0, again);
            expect_bits("of two", logits_in_company(model, prompt, 1, again), alone, 263);
            expect_bits("of 16", logits_in_company(model, prompt, FEW_ROWS - 1, again), alone, 263);
            float *of_17 = logits_in_company(model, prompt, FEW_ROWS, again);
            expect_floats("of 17", of_17, widen(alone, 263), 263, 2e-5);
            expect_bits("of 64", logits_in_company(model, prompt, 63, again), of_17, 263);
        }
}

/* A prompt that fills the context is answered with one token, as in transformers; a shorter one
 * up to one past its end. */
static void test_generate_context(void) {
    struct GPT2 *model = random_model(50, 24, 16, 2, 2);
    model->config.eos_token_id = 50; /* none */
    struct Example prompt = random_example(24, 0, 50);
    for (size_t beams = 1; beams <= 3; beams += 2)
        for (int sample = 0; sample < 2; sample++)
            for (size_t n = 22; n <= 24; n++) {
                struct GenerationConfig config = generation_config();
                config.num_beams = beams;
                config.do_sample = sample;
                struct Sequence s =
                    sequence_start(&test_arena, prompt.ids, n, 9, model, rng_seed(1, 1));
                generate(model, &s, 1, &config);
                expect_count("tokens", s.n, 25);
                struct Example so_far = {s.ids, 24, 0};
                struct Batch batch = batch_of(&so_far, 1, READ_LAST);
                if (!sample && beams == 1)
                    expect_count("the likeliest", (size_t)s.ids[24],
                                 argmax(batch_logits(model, &batch) + (size_t)23 * 50, 50));
            }
}

/* The essay's two beams, from probabilities by hand: after A, B 0.6 and C 0.4; after B, x and y
 * alike; after C, x 0.95. */
static void test_beam_search_hand(void) {
    enum { A, B, C, X, Y, END, V };
    struct GPT2 *model = random_model(V, 16, 8, 1, 1);
    model->config.eos_token_id = END;
    struct GenerationConfig config = generation_config();
    config.num_beams = 2;
    struct Sequence prompt =
        sequence_start(&test_arena, (int[]){A}, 1, 2, model, rng_seed(1, STREAM_SAMPLE));
    struct BeamSearch search = beam_search_new(&test_arena, model, &prompt, &config);
    float first[V], second[2 * V];
    for (size_t v = 0; v < V; v++)
        first[v] = second[v] = second[V + v] = -INFINITY;
    first[B] = logf(0.6f);
    first[C] = logf(0.4f);
    second[X] = second[Y] = 0;
    second[V + X] = logf(0.95f);
    second[V + Y] = logf(0.05f);
    expect_true("goes on", beam_search_goes_on(&search));
    beam_advance(&search, &test_arena, first);
    expect_count("beams", search.running_count, 2);
    expect_ids("greedy's beam", search.running[0].ids, search.running[0].n, (int[]){A, B}, 2);
    expect_ids("the other one", search.running[1].ids, search.running[1].n, (int[]){A, C}, 2);
    expect_close("log 0.4", search.running[1].score, -0.9163, 1e-4);
    expect_true("goes on", beam_search_goes_on(&search));
    beam_advance(&search, &test_arena, second);
    expect_count("finished", search.finished_count, 2);
    expect_ids("best", search.finished[0].ids, search.finished[0].n, (int[]){A, C, X}, 3);
    expect_ids("second", search.finished[1].ids, search.finished[1].n, (int[]){A, B, X}, 3);
    expect_close("log 0.38 / 2", search.finished[0].score, -0.4838, 1e-4);
    expect_close("log 0.30 / 2", search.finished[1].score, -0.6020, 1e-4);
    expect_true("nothing is left", search.running_count == 0 && !beam_search_goes_on(&search));
}

/* transformers' three best of three beams, by length_penalty and early_stopping. */
static void test_beam_search_golden(void) {
    static const struct {
        const char *name;
        int end_token;
        double length_penalty;
        enum EarlyStopping early_stopping;
        size_t length[3];
        int ids[3][8];
    } cases[] = {
        {"no end",
         60,
         1,
         STOP_FALSE,
         {8, 8, 8},
         {{52, 52, 52, 52, 52, 48, 48, 48},
          {52, 52, 52, 52, 52, 4, 48, 48},
          {52, 52, 52, 52, 52, 4, 4, 4}}},
        {"end 4",
         4,
         1,
         STOP_FALSE,
         {8, 6, 8},
         {{52, 52, 52, 52, 52, 48, 48, 48},
          {52, 52, 52, 52, 52, 4},
          {52, 52, 52, 52, 52, 48, 48, 4}}},
        {"length_penalty 2",
         4,
         2,
         STOP_FALSE,
         {8, 8, 8},
         {{52, 52, 52, 52, 52, 48, 48, 48},
          {52, 52, 52, 52, 52, 48, 48, 4},
          {52, 52, 52, 52, 52, 44, 48, 48}}},
        {"length_penalty 0",
         4,
         0,
         STOP_FALSE,
         {3, 6, 7},
         {{52, 52, 4}, {52, 52, 52, 52, 52, 4}, {52, 52, 52, 52, 52, 48, 4}}},
        {"early_stopping",
         4,
         1,
         STOP_TRUE,
         {6, 7, 3},
         {{52, 52, 52, 52, 52, 4}, {52, 52, 52, 52, 52, 48, 4}, {52, 52, 4}}},
    };
    struct GPT2 *model = golden_model();
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct GenerationConfig config = generation_config();
        struct Sequence s[3];
        config.num_beams = config.num_return_sequences = 3;
        config.length_penalty = cases[i].length_penalty;
        config.early_stopping = cases[i].early_stopping;
        model->config.eos_token_id = cases[i].end_token;
        for (int k = 0; k < 3; k++)
            s[k] = golden_prompt(model, 8);
        generate(model, s, 3, &config);
        for (int k = 0; k < 3; k++)
            expect_ids(cases[i].name, s[k].ids + 4, s[k].n - 4, cases[i].ids[k],
                       cases[i].length[k]);
    }
}

/* With as many beams as there are sequences nothing is ever dropped: the best of all 125
 * responses of three tokens comes first, found here by scoring each alone. With one beam it is
 * greedy decoding. */
static void test_beam_search_exhaustive(void) {
    struct GPT2 *model = random_model(5, 8, 16, 2, 2);
    struct GenerationConfig config = generation_config();
    int prompt[] = {2};
    int best[4] = {2};
    int ids[4] = {2};
    double most = -INFINITY;
    model->config.eos_token_id = 5; /* none */
    for (int y = 0; y < 125; y++) {
        ids[1] = y / 25, ids[2] = y / 5 % 5, ids[3] = y % 5;
        struct Example e = {ids, 4, 1};
        struct Batch batch = batch_of(&e, 1, SKIP_LAST);
        struct LMHead head = batch_logprobs(model, &test_arena, &batch, 1, false);
        double logp = sequence_logprob(head.logprob, 3);
        if (logp > most)
            memcpy(best, ids, sizeof best), most = logp;
    }
    struct Sequence s = sequence_start(&test_arena, prompt, 1, 3, model, rng_seed(1, 1));
    struct Sequence greedy = s;
    greedy.ids = arena_alloc(&test_arena, 4, sizeof(int));
    greedy.ids[0] = 2;
    config.num_beams = 125;
    generate(model, &s, 1, &config);
    expect_ids("the likeliest response", s.ids, s.n, best, 4);
    config.num_beams = 1;
    generate(model, &greedy, 1, &config);
    s.n = 1;
    s.finished = false;
    beam_search(model, &s, &config);
    expect_ids("one beam is greedy", s.ids, s.n, greedy.ids, 4);
}

/* Scores below any that a place could be marked with: a long answer and a length_penalty below 0.
 */
static void test_beam_search_negative(void) {
    struct GPT2 *model = random_model(61, 128, 16, 2, 2);
    for (int stopping = STOP_FALSE; stopping <= STOP_NEVER; stopping++) {
        struct GenerationConfig config = generation_config();
        struct Sequence s[3];
        config.num_beams = config.num_return_sequences = 3;
        config.length_penalty = -5;
        config.early_stopping = (enum EarlyStopping)stopping;
        for (int k = 0; k < 3; k++)
            s[k] = golden_prompt(model, 100);
        model->config.eos_token_id = 61; /* none: all have 100 tokens */
        generate(model, s, 3, &config);
        for (int k = 0; k < 3; k++)
            expect_count("tokens", s[k].n, 104);
        expect_true("different ones", memcmp(s[0].ids, s[1].ids, 104 * sizeof(int))
                                          && memcmp(s[1].ids, s[2].ids, 104 * sizeof(int)));
    }
}

/* When the search ends: the cases of beam_search_goes_on's comment, and a pool with room. */
static void test_beam_search_stops(void) {
    static const struct {
        float score;
        enum EarlyStopping early_stopping;
        size_t finished;
        bool goes_on;
    } cases[] = {{-1.5f, STOP_FALSE, 1, true}, {-2.1f, STOP_FALSE, 1, false},
                 {-2.1f, STOP_NEVER, 1, true}, {-9.0f, STOP_NEVER, 1, false},
                 {-1.5f, STOP_TRUE, 1, false}, {-99.0f, STOP_FALSE, 0, true},
                 {-99.0f, STOP_TRUE, 0, true}};
    struct GPT2 *model = random_model(6, 16, 8, 1, 1);
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct GenerationConfig config = generation_config();
        config.early_stopping = cases[i].early_stopping;
        struct Sequence prompt =
            sequence_start(&test_arena, (int[]){1}, 1, 9, model, rng_seed(1, STREAM_SAMPLE));
        struct BeamSearch search = beam_search_new(&test_arena, model, &prompt, &config);
        search.running->n = 4;
        search.running->score = cases[i].score;
        search.finished->score = -0.6f;
        search.finished_count = cases[i].finished;
        expect_true(formatted("case %zu", i), beam_search_goes_on(&search) == cases[i].goes_on);
    }
}

/* Sampled beams: the first draw has softmax's probabilities, and nothing is drawn twice. */
static void test_beam_candidates(void) {
    float score[] = {logf(0.5f), -INFINITY, logf(0.2f), logf(0.3f)};
    struct Candidate best[4];
    struct Rng rng = rng_seed(3, 3);
    double first[4] = {0};
    expect_count("without sampling", beam_candidates(score, 4, 2, &test_arena, best), 2);
    expect_true("the two best, best first",
                best[0].id == 0 && best[1].id == 3 && best[0].value == score[0]);
    for (int i = 0; i < 20000; i++) {
        float *key = gumbel_keys(&test_arena, score, 4, &rng);
        size_t n = beam_candidates(key, 4, 4, &test_arena, best);
        expect_count("all that are possible", n, 3);
        first[best[0].id] += 1 / 20000.0;
        expect_true("each once", best[0].id != best[1].id && best[1].id != best[2].id
                                     && best[0].id != best[2].id);
    }
    expect_close("first draw", first[0], 0.5, 0.02);
    expect_close("first draw", first[2], 0.2, 0.02);
}

/* =============================================================================================
 * Part III - Training
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 14 - Optimizer, schedule, Trainer
 *
 * AdamW by hand and against torch, schedules against transformers; steps, epochs and means as
 * transformers counts them. No figure of an evaluation depends on how batches divide the rows.
 * ============================================================================================= */

/* sqrt_fast against the C library's sqrt over the normal numbers, and at zero. */
static void test_sqrt_fast(void) {
    double worst = 0;
    for (double x = 1.2e-38; x < 3e38; x *= 1.00007)
        worst = MAX(worst, fabs(sqrt_fast((float)x) / sqrt((float)x) - 1));
    expect_true("worst relative error below 2e-7", worst < 2e-7);
    expect_true("0 and 4", sqrt_fast(0) == 0 && fabsf(sqrt_fast(4) - 2) < 3e-7f);
    expect_true("below the normal numbers: small",
                sqrt_fast(1e-45f) >= 0 && sqrt_fast(1e-40f) < 1e-19f);
}

/* Two steps of one weight, the comment's numbers; and the factor of clipping. */
static void test_adamw_hand_comment(void) {
    struct Tensor t = {
        .name = "t",
        .n = 1,
        .ndim = 2,
        .w = (float[]){2},
        .d = (float[]){0.3f},
        .m = (float[]){0},
        .v = (float[]){0},
    };
    struct Tensor *tensors[] = {&t};
    struct GPT2 model = {.tensors = tensors, .tensor_count = 1};
    struct TrainingArguments args = training_arguments();
    args.weight_decay = 0.1;
    optimizer_step(&model, &args, 0.1, 1);
    expect_close("m after step 1", t.m[0], 0.03, 1e-8);
    expect_close("v after step 1", t.v[0], 0.00009, 1e-10);
    expect_close("w after step 1", t.w[0], 1.88, 1e-6);
    t.d[0] = -0.1f;
    optimizer_step(&model, &args, 0.1, 2);
    expect_close("m after step 2", t.m[0], 0.017, 1e-8);
    expect_close("v after step 2", t.v[0], 0.00009991, 1e-10);
    expect_close("w after step 2", t.w[0], 1.8212, 5e-5);
    expect_close("norm 3, limit 1", clip_factor(3, 1), 0.3333, 5e-5);
    expect_close("norm 0.5, limit 1", clip_factor(0.5, 1), 1, 0);
    expect_close("no limit", clip_factor(3, 0), 1, 0);
}

/* The first step by hand, decay and clipping by hand, and plain gradient descent. */
static void test_adamw_hand(void) {
    struct Tensor t = {
        .name = "t",
        .n = 2,
        .ndim = 2,
        .w = (float[]){1, -1},
        .d = (float[]){300, -400},
        .m = (float[]){0, 0},
        .v = (float[]){0, 0},
    };
    struct Tensor *tensors[] = {&t};
    struct GPT2 model = {.tensors = tensors, .tensor_count = 1};
    struct TrainingArguments args = training_arguments();
    expect_close("norm before clipping", optimizer_step(&model, &args, 0.1, 1), 500, 1e-3);
    expect_floats("first step: lr against the gradient's sign", t.w, (double[]){0.9, -0.9}, 2,
                  4e-6);
    expect_floats("m of the clipped gradient", t.m, (double[]){0.06, -0.08}, 2, 4e-6);
    expect_floats("v", t.v, (double[]){0.00036, 0.00064}, 2, 1e-8);
    expect_true("the gradient is used up", t.d[0] == 0 && t.d[1] == 0);
    args.weight_decay = 0.5;
    memcpy(t.d, (float[]){300, -400}, sizeof(float[2]));
    optimizer_step(&model, &args, 0.1, 2);
    expect_floats("second step with decay", t.w, (double[]){0.9 * 0.95 - 0.1, -0.9 * 0.95 + 0.1}, 2,
                  4e-6);
    t.ndim = 1; /* vectors do not decay */
    args.optim = OPTIM_SGD;
    args.max_grad_norm = 0;
    memcpy(t.d, (float[]){300, -400}, sizeof(float[2]));
    optimizer_step(&model, &args, 0.001, 3);
    expect_true("used up by sgd", t.d[0] == 0 && t.d[1] == 0);
    expect_floats("sgd", t.w, (double[]){0.755 - 0.3, -0.755 + 0.4}, 2, 4e-6);
    t.ndim = 2;
    args.max_grad_norm = 1;
    memcpy(t.d, (float[]){300, -400}, sizeof(float[2]));
    optimizer_step(&model, &args, 0.1, 4);
    expect_floats("sgd, clipped and decayed", t.w,
                  (double[]){0.455 * 0.95 - 0.06, -0.355 * 0.95 + 0.08}, 2, 4e-6);
}

/* Six steps with decay, clipping and warm-up: losses, norms, learning rates and weights of
 * torch's AdamW, by trainer_train. */
static void test_adamw_golden(void) {
    static const struct {
        double loss, norm, learning_rate;
    } golden[] = {
        {4.9093771, 2.49169612, 0},      {4.9093771, 2.49169612, 0.005},
        {4.33028555, 2.38877416, 0.01},  {3.71520281, 1.5375849, 0.0075},
        {3.44668412, 1.59040582, 0.005}, {3.25066376, 1.50263071, 0.0025},
    };
    struct GPT2 *model = golden_model();
    struct Trainer trainer = trainer_of(model, 0.01, 6, 2);
    trainer.args.weight_decay = 0.1;
    trainer.args.warmup_steps = 2;
    language_task(&trainer, golden_examples(), 2);
    trainer_train(&trainer);
    for (size_t i = 0; i < 6; i++) {
        expect_close("loss", logged(&trainer, i, "loss"), golden[i].loss, 2e-5);
        expect_close("norm before clipping", logged(&trainer, i, "grad_norm"), golden[i].norm,
                     5e-5);
        expect_close("learning rate", logged(&trainer, i, "learning_rate"), golden[i].learning_rate,
                     1e-12);
        expect_close("step", logged(&trainer, i, "step"), (double)i + 1, 0);
    }
    trainer.task.eval_n = 2;
    expect_close("loss after all", trainer_evaluate(&trainer), 3.146626, 2e-5);
    expect_floats("wte", model->wte.w,
                  (double[]){-0.0288252495, 0.143724903, 0.311980247, 0.312895834}, 4, 2e-6);
    expect_floats("ln_f", model->ln_f.weight.w,
                  (double[]){0.998051882, 1.0525403, 1.07128537, 1.06068206}, 4, 2e-6);
    trainer_free(&trainer);
}

/* transformers' schedules. */
static void test_schedule(void) {
    static const struct {
        const char *name;
        enum SchedulerType type;
        double want[11];
    } types[] = {
        {"linear",
         SCHEDULER_LINEAR,
         {0, 0.333333333, 0.666666667, 1, 0.857142857, 0.714285714, 0.571428571, 0.428571429,
          0.285714286, 0.142857143, 0}},
        {"cosine",
         SCHEDULER_COSINE,
         {0, 0.333333333, 0.666666667, 1, 0.950484434, 0.811744901, 0.611260467, 0.388739533,
          0.188255099, 0.049515566, 0}},
        {"constant", SCHEDULER_CONSTANT, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
        {"constant_with_warmup",
         SCHEDULER_CONSTANT_WITH_WARMUP,
         {0, 0.333333333, 0.666666667, 1, 1, 1, 1, 1, 1, 1, 1}},
    };
    struct TrainingArguments args = training_arguments();
    args.warmup_steps = 3;
    for (size_t i = 0; i < COUNT(types); i++) {
        args.lr_scheduler_type = types[i].type;
        for (size_t step = 0; step <= 10; step++)
            expect_close(types[i].name, schedule_factor(&args, step, 10), types[i].want[step],
                         1e-9);
    }
}

/* By hand: warm-up as steps or as a share of them, and where the rate ends. */
static void test_schedule_hand(void) {
    struct TrainingArguments args = training_arguments();
    args.warmup_steps = 2;
    for (size_t step = 0; step < 4; step++)
        expect_close("linear, 10 steps, warm-up 2", schedule_factor(&args, step, 10),
                     (double[]){0, 0.5, 1, 0.875}[step], 1e-12);
    args.lr_scheduler_type = SCHEDULER_COSINE;
    expect_close("cosine, a quarter of the way", schedule_factor(&args, 4, 10), 0.8536, 5e-5);
    args.lr_scheduler_type = SCHEDULER_LINEAR;
    args.warmup_steps = 0;
    args.warmup_ratio = 0.15;
    for (size_t step = 0; step < 4; step++)
        expect_close("a share of the steps, rounded up", schedule_factor(&args, step, 10),
                     (double[]){0, 0.5, 1, 0.875}[step], 1e-12);
    args.lr_end = 0.2;
    expect_close("lr_end", schedule_factor(&args, 10, 10), 0.2, 1e-12);
    expect_close("half way to lr_end", schedule_factor(&args, 6, 10), 0.6, 1e-12);
}

/* Steps and epochs of transformers: a smaller last batch, an accumulation's rest as a step. */
static void test_trainer_steps(void) {
    struct GPT2 *model = random_model(40, 16, 8, 1, 2);
    struct Example examples[11];
    for (size_t i = 0; i < 11; i++)
        examples[i] = random_example(3 + i, i % 3, 40);
    struct Trainer trainer = trainer_of(model, 0, 0, 2);
    trainer.args.gradient_accumulation_steps = 2;
    trainer.args.num_train_epochs = 2;
    language_task(&trainer, examples, 11);
    trainer_train(&trainer);
    expect_count("steps: 2 epochs of ceil(11 / 4)", trainer.state.global_step, 6);
    expect_close("epoch after step 2", logged(&trainer, 1, "epoch"), 2.0 / 3, 1e-12);
    expect_close("epoch at the end", trainer.state.epoch, 2, 0);
    expect_true("train_loss", isfinite(logged(&trainer, 6, "train_loss"))
                                  && isfinite(logged(&trainer, 6, "train_runtime")));
    trainer_free(&trainer);
}

/* Accumulated gradients are the batch's. */
static void test_trainer_steps_accumulate(void) {
    struct GPT2 *model = random_model(40, 16, 8, 1, 2);
    struct Example examples[11];
    for (size_t i = 0; i < 11; i++)
        examples[i] = random_example(3 + i, i % 3, 40);
    struct Trainer trainer = trainer_of(model, 0, 0, 2);
    language_task(&trainer, examples, 11);
    gpt2_make_trainable(model);
    size_t order[11], n;
    for (size_t i = 0; i < 11; i++)
        order[i] = 10 - i;
    double loss[2];
    float *gradient[2];
    for (int run = 0; run < 2; run++) {
        trainer.args.per_device_train_batch_size = run ? 3 : 11;
        gpt2_zero_grad(model);
        loss[run] = trainer_accumulate(&trainer, order, 11);
        gradient[run] = all_gradients(model, &n);
    }
    expect_close("loss in pieces", loss[1], loss[0], 1e-6);
    expect_floats("gradient in pieces", gradient[1], widen(gradient[0], n), n, 2e-6);
    trainer_free(&trainer);
}

/* A micro-batch weighs as many targets as it has, or, where a task has none, as many rows. */
static void test_trainer_steps_weight(void) {
    struct GPT2 *model = random_model(40, 16, 8, 1, 2);
    struct Trainer trainer = trainer_of(model, 0, 0, 1);
    struct Example two[] = {random_example(4, 1, 40), random_example(5, 0, 40)};
    language_task(&trainer, two, 2);
    expect_close("3 and 5 targets", micro_batch_weight(&trainer, (size_t[]){0, 1}, 2), 0.125, 0);
    trainer.task.targets = NULL;
    expect_close("two means", micro_batch_weight(&trainer, (size_t[]){0, 1}, 2), 0.5, 0);
}

/* The share of an epoch's micro-batches that is done, as transformers counts it: more of them are
 * compared by docs/tools/check_trainer.py. */
static void test_trainer_epoch(void) {
    static const struct {
        size_t rows, batch, accumulation, max_steps;
        double epoch[5];
    } cases[] = {
        {5, 1, 4, 0, {0.8, 1}},           {5, 2, 2, 0, {2.0 / 3, 1}}, {8, 2, 2, 3, {0.5, 1, 1.5}},
        {7, 2, 3, 4, {0.75, 1, 1.75, 2}}, {3, 8, 4, 2, {1, 2}},
    };
    struct GPT2 *model = random_model(40, 16, 8, 1, 2);
    struct Example *examples = random_examples(8, 4, 1, 40);
    for (size_t k = 0; k < COUNT(cases); k++) {
        struct Trainer trainer = trainer_of(model, 0, cases[k].max_steps, cases[k].batch);
        trainer.args.gradient_accumulation_steps = cases[k].accumulation;
        trainer.args.num_train_epochs = 1;
        language_task(&trainer, examples, cases[k].rows);
        trainer_train(&trainer);
        size_t steps = trainer.state.log_count - 1;
        for (size_t i = 0; i < steps; i++)
            expect_close("epoch", logged(&trainer, i, "epoch"), cases[k].epoch[i], 1e-12);
        expect_true("its last step", steps > 0 && cases[k].epoch[steps] == 0);
        trainer_free(&trainer);
    }
}

/* Two training steps of a model large enough for every parallel loop: one, two and three
 * threads, the same weights. */
static void test_trainer_threads(void) {
    struct Example examples[8];
    struct GPT2 *model[4] = {NULL};
    for (size_t i = 0; i < 8; i++)
        examples[i] = random_example(80, i % 2 ? 20 : 1, 1200);
    for (int threads = 1; threads <= 3; threads++) {
        model[threads] = new_model(1200, 128, 96, 2, 4);
        struct Trainer trainer = trainer_of(model[threads], 0.01, 2, 8);
        language_task(&trainer, examples, 8);
        use_threads(threads);
        trainer_train(&trainer);
        expect_same_weights("weights", model[threads], model[1]);
        trainer_free(&trainer);
    }
}

static double mean_in(const struct LogEntry *metrics, const char *name) {
    struct TrainerState state = {0};
    struct LogEntry entry = {0};
    double mean;
    trainer_means(&state, metrics, &entry, "");
    log_find(&entry, name, &mean);
    return mean;
}

/* An evaluation's metric is a mean over its units, however batches divide them, an extreme that of
 * all; a training's log has, as TRL's, the mean of micro-batches. */
static void test_metric_units(void) {
    for (int training = 0; training < 2; training++) {
        struct Trainer trainer = {0};
        const struct LogEntry *metrics = training ? &trainer.state.metrics : &trainer.metrics;
        trainer_metric(&trainer, "mean", 1 + 2, 2);
        trainer_least(&trainer, "least", 7);
        trainer_least(&trainer, "least", 5);
        trainer_largest(&trainer, "largest", -7);
        trainer_largest(&trainer, "largest", -6);
        if (training)
            trainer_add_means(&trainer);
        trainer_metric(&trainer, "mean", 6, 1);
        trainer_least(&trainer, "least", 6);
        trainer_largest(&trainer, "largest", -5);
        if (training)
            trainer_add_means(&trainer);
        expect_close("1, 2 and 6", mean_in(metrics, "mean"), training ? 3.75 : 3, 0);
        expect_close("least", mean_in(metrics, "least"), training ? 5.5 : 5, 0);
        expect_close("largest", mean_in(metrics, "largest"), training ? -5.5 : -5, 0);
    }
}

/* Seven held-out items in batches of 1 to 8: each figure is the same, but for rounding. */
static void expect_batch_size_alike(const char *what, struct Trainer *trainer) {
    struct LogEntry first = {0};
    for (size_t batch = 1; batch <= 8; batch++) {
        trainer->args.per_device_eval_batch_size = batch;
        struct LogEntry entry = trainer_evaluation_loop(trainer);
        if (batch == 1)
            first = entry;
        expect_count(what, entry.n, first.n);
        for (size_t i = 0; i < first.n; i++) {
            const char *name = first.item[i].name;
            const char *told = formatted("%s, batch %zu: %s", what, batch, name);
            bool clock = strstr(name, "second") || strstr(name, "runtime");
            if (!clock)
                expect_close(told, entry.item[i].value, first.item[i].value, 1e-5);
        }
    }
}

static double measured(struct Trainer *trainer, const char *name) {
    struct LogEntry entry = trainer_evaluation_loop(trainer);
    double value;
    log_find(&entry, name, &value);
    return value;
}

/* The share of the pairs i, j with rating_i - rating_j >= min_difference whose reward_i > reward_j:
 * what reward_rated_on_evaluate reports as accuracy, by another way. */
static double pair_accuracy(const float *reward, const double *rating, size_t n,
                            double min_difference) {
    double right = 0;
    double total = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            /* only pairs in which i was preferred: where j was, the pair comes up as (j, i) */
            if (rating[i] - rating[j] < min_difference)
                continue;
            total++;
            right += reward[i] > reward[j];
        }
    return total ? right / total : NAN;
}

/* transformers weights a batch's mean by its rows: what a long row is worth depends on its
 * neighbours. Here no figure does. */
static void test_eval_batch_size(void) {
    struct GPT2 *model = random_model(37, 20, 8, 2, 2);
    struct GPT2 *ref_model = owned(gpt2_copy(model));
    struct Example texts[14];
    double rating[7], label[7];
    double nll = 0;
    double tokens = 0;
    reward_head_declare(model);
    for (size_t i = 0; i < model->score.n; i++)
        model->score.w[i] = 0.3f * (float)i - 1;
    for (size_t i = 0; i < ref_model->wte.n; i++)
        ref_model->wte.w[i] *= 0.9f;
    for (size_t i = 0; i < 14; i++)
        texts[i] = random_example(4 + (5 * i) % 13, 2, 37);
    for (size_t i = 0; i < 7; i++) {
        rating[i] = (double[]){0, 3, 1, 1.5, 3, 0.5, 2}[i];
        label[i] = i % 3 == 0;
    }
    struct Trainer trainer = trainer_of(model, 0, 1, 4);
    language_task(&trainer, texts, 7);
    trainer.task.eval_n = 7;
    expect_batch_size_alike("sft", &trainer);
    for (size_t i = 0; i < 7; i++) {
        struct Batch batch = batch_of(texts + i, 1, SKIP_LAST);
        struct LMHead head = batch_logprobs(model, &test_arena, &batch, 1, false);
        nll -= sequence_logprob(head.logprob, batch.R);
        tokens += (double)batch.R;
    }
    expect_close("nats a token", trainer_evaluate(&trainer), nll / tokens, 1e-6);
    struct RewardTask task = {
        .texts = {texts, texts},
        .number = {rating, rating},
        .center = 0.02,
    };
    float reward[7];
    trainer.task = (struct Task){.name = "reward", .n = 7, .eval_n = 7, .data = &task};
    trainer.task.loss = reward_loss;
    expect_batch_size_alike("reward, pairs", &trainer);
    task.rated = true;
    task.eval_reward = arena_floats(&test_arena, 7);
    trainer.task.on_evaluate = reward_rated_on_evaluate;
    expect_batch_size_alike("reward, rated", &trainer);
    reward_score(model, texts, 7, reward);
    expect_close("every pair 1 or more apart", measured(&trainer, "eval_accuracy"),
                 pair_accuracy(reward, rating, 7, 1), 1e-12);
    double least = reward[0];
    for (size_t i = 1; i < 7; i++)
        least = MIN(least, reward[i]);
    expect_close("the least of all", measured(&trainer, "eval_min_reward"), least, 1e-6);
    task.rated = false;
    task.labelled = true;
    task.number[1] = label;
    trainer.task.on_evaluate = NULL;
    expect_batch_size_alike("reward, labelled", &trainer);
    struct DPOConfig config = {
        .beta = 0.2,
        .label_smoothing = 0.1,
        .weight = {1, 0.05, 0.5, 0.7, 0.3},
    };
    struct DPOTask *dpo = dpo_task(&trainer, &test_arena, ref_model, config, 0.8, texts, 7);
    dpo->pairs[1] = texts;
    dpo->ref_logps[1] = arena_zeros(&test_arena, 14, sizeof(double));
    trainer.task.eval_n = 7;
    expect_batch_size_alike("dpo", &trainer);
    trainer_free(&trainer);
}

/* Ctrl-C in the evaluation after the last step: it ends without a figure, the weights are saved. */
static void test_evaluation_interrupted(void) {
    struct GPT2 *model = random_model(40, 16, 8, 1, 2);
    struct Example *examples = random_examples(5, 6, 1, 40);
    struct Trainer trainer = trainer_of(model, 0, 2, 2);
    language_task(&trainer, examples, 5);
    trainer.task.eval_n = 5;
    trainer.args.eval_steps = 1;
    interrupted = 1;
    trainer_train(&trainer);
    expect_true("one between steps is finished", isfinite(logged(&trainer, 1, "eval_loss")));
    expect_true("one after the last step is not", isnan(trainer_evaluate(&trainer)));
    expect_count("nor logged: two steps, an evaluation, the totals", trainer.state.log_count, 4);
    interrupted = 0;
    expect_true("without Ctrl-C it is", isfinite(trainer_evaluate(&trainer)));
    expect_count("and logged", trainer.state.log_count, 5);
    trainer_free(&trainer);
}

/* Every number that is shown at once, as long as numbers get: the line is cut to its buffer. */
static void test_state_say(void) {
    static const char *const names[] = {
        "env/reward_mean",
        "objective/kl",
        "ppo/loss/total",
        "reward",
        "kl",
        "gradient_variance/none",
        "gradient_variance/mean",
        "gradient_variance/rloo",
        "loss",
        "eval_loss",
        "accuracy",
        "eval_accuracy",
        "margin",
        "rewards/margins",
        "rewards/accuracies",
        "grad_norm",
        "learning_rate",
    };
    struct TrainerState state = {.global_step = 1, .max_steps = 2};
    struct LogEntry entry = {0};
    for (size_t i = 0; i < COUNT(names); i++)
        log_value(&entry, names[i], -1.234e-300);
    capture_begin();
    quiet = false;
    state_say(&state, "test", &entry, true);
    quiet = true;
    struct Text said = capture_end();
    const char *beginning = "test: step 1/2  env/reward_mean -1.234e-300  objective/kl -1.234e-300";
    expect_holds("its beginning", said, beginning);
    expect_true("no longer than its buffer", said.length > 350 && said.length < 420);
}

/* =============================================================================================
 * Chapter 15 - Language model
 *
 * How texts are packed or cut into rows, the loss of a model that knows nothing, and four
 * sentences learnt by heart.
 * ============================================================================================= */

/* Packed rows predict every token of the joined texts once, but the first and what is left over;
 * held-out texts alike. With whole_texts a row starts where a text does, or goes on where the
 * last one ended, and leaves nothing out. */
static void test_language_pack(void) {
    struct Example texts[5];
    size_t total = 0;
    int stream[100];
    bool starts[100] = {false};
    for (size_t i = 0; i < 5; total += texts[i++].n) {
        starts[total] = true;
        texts[i] = random_example(3 + 7 * i, 0, 1000);
        memcpy(stream + total, texts[i].ids, texts[i].n * sizeof(int));
    }
    for (size_t length = 1; length < 40; length += 3) {
        struct Trainer trainer = {.args = training_arguments()};
        trainer.args.max_length = length;
        trainer.args.train_sampling_strategy = SAMPLING_SEQUENTIAL;
        struct LanguageTask *task = pretrain_task(&trainer, &test_arena, texts, 5, texts, 5, false);
        trainer.task.new_epoch(&trainer, 0);
        expect_count("rows", trainer.task.n, (total - 1) / length);
        expect_count("held-out rows", trainer.task.eval_n, (total - 1) / length);
        for (size_t i = 0; i < trainer.task.n; i++)
            for (int held_out = 0; held_out < 2; held_out++) {
                struct Batch batch = batch_of(task->examples[held_out] + i, 1, SKIP_LAST);
                expect_ids("ids", batch.ids, batch.N, stream + i * length, length);
                expect_ids("targets", batch.target, batch.R, stream + i * length + 1, length);
                expect_count("targets of a row", language_targets(&trainer, i), length);
            }
        task->whole_texts = true;
        trainer.task.new_epoch(&trainer, 0);
        for (size_t i = 0, last = 0; i < trainer.task.n; i++) {
            size_t at = (size_t)(task->examples[TO_LEARN][i].ids - task->examples[TO_LEARN][0].ids);
            expect_true("starts with a text or where the last row ended",
                        i == 0 || at == last + length
                            || (at > last && at < last + length && starts[at]));
            expect_ids("ids", task->examples[TO_LEARN][i].ids, task->examples[TO_LEARN][i].n,
                       stream + at, length + 1);
            last = at;
        }
        arena_free(&task->rows);
    }
}

/* SFT rows: end token, the first max_length ids, rows without a target dropped, with one note;
 * what counts in the loss. */
static void test_language_sft_rows(void) {
    struct GPT2 *model = new_model(1024, 32, 8, 1, 2);
    struct Trainer trainer = trainer_of(model, 0, 1, 4);
    trainer.args.max_length = 6;
    struct Dataset *data = dataset_of("{'prompt': 'a b c', 'completion': ' d'}\n{'prompt': 'a b c "
                                      "d e f g h', 'completion': ' i'}\n{'prompt': 'a', "
                                      "'completion': ' b c d e f g h i'}\n",
                                      SFT_SHAPES, COUNT(SFT_SHAPES));
    capture_begin();
    struct LanguageTask *task = sft_task(&trainer, &test_arena, data, NULL);
    struct Text said = capture_end();
    expect_holds("a note", said, "2 of 3 rows were cut to their first 6 tokens");
    expect_count("rows", trainer.task.n, 2);
    expect_true("the end token last", task->examples[TO_LEARN][0].n == 5
                                          && task->examples[TO_LEARN][0].ids[4] == 1023
                                          && task->examples[TO_LEARN][0].prompt_length == 3);
    expect_true("cut", task->examples[TO_LEARN][1].n == 6
                           && task->examples[TO_LEARN][1].prompt_length == 1);
    expect_count("completion tokens count", language_targets(&trainer, 0), 2);
    struct Example text =
        example_encode(&test_arena, tokenizer, text_of("a b"), 1024, &model->config.eos_token_id);
    task->examples[TO_LEARN][0] = text;
    expect_count("all tokens of a text", language_targets(&trainer, 0), 3);
}

/* A model of zeros knows nothing: its loss is ln V. */
static void test_language_hand(void) {
    struct GPT2 *model = empty_model(37, 12, 8, 2, 2);
    struct Example one = random_example(4, 2, 37);
    struct Trainer trainer = trainer_of(model, 0, 1, 1);
    for (size_t i = 0; i < model->tensor_count; i++)
        memset(model->tensors[i]->w, 0, model->tensors[i]->n * sizeof(float));
    language_task(&trainer, &one, 1);
    double loss = language_loss(&trainer, (size_t[]){0}, 1, 0.5, HELD_OUT);
    expect_close("ln 37", loss, log(37), 1e-6);
    trainer_free(&trainer);
}

/* Where rows of whole texts start. */
static void test_language_hand_rows(void) {
    struct Example texts[3];
    size_t lengths[] = {3, 4, 3};
    for (size_t i = 0; i < 3; i++)
        texts[i] = random_example(lengths[i], 0, 37);
    struct TextOrder order = {texts, (size_t[]){0, 1, 2}, 3};
    for (int whole = 0; whole < 2; whole++) {
        size_t count;
        struct Example *rows = pretrain_pack(&test_arena, &order, 4, whole, &count);
        expect_count("rows", count, 2);
        expect_count("second row", (size_t)(rows[1].ids - rows[0].ids), whole ? 3 : 4);
    }
}

/* A model learns four sentences by heart. */
static void test_language_overfit(void) {
    struct GPT2 *model = new_model(64, 16, 32, 2, 4);
    struct Example *examples = random_examples(4, 12, 2, 64);
    struct Trainer trainer = trainer_of(model, 1e-2, 80, 4);
    language_task(&trainer, examples, 4);
    trainer_train(&trainer);
    expect_close("loss at first: ln 64", logged(&trainer, 0, "loss"), log(64), 0.2);
    expect_true("loss at last below 0.1", logged(&trainer, 79, "loss") < 0.1);
    expect_close("every token hit", logged(&trainer, 79, "mean_token_accuracy"), 1, 0);
    trainer_free(&trainer);
}

/* =============================================================================================
 * Chapter 16 - Reward model
 *
 * Central differences of the whole reward model, what it logs, and a few texts that it learns to
 * order. A text's reward does not depend on its company.
 * ============================================================================================= */

/* A Task's loss of four items as a function of the weights, and its gradient: for central
 * differences. */
static double task_loss(void *context) {
    struct Trainer *trainer = context;
    size_t index[] = {2, 0, 1, 3};
    arena_reset(&trainer->arena);
    return trainer->task.loss(trainer, index, 4, 1, TO_LEARN);
}

static void expect_task_gradient(struct Trainer *trainer, double h) {
    struct GPT2 *model = trainer->model;
    size_t index[] = {2, 0, 1, 3};
    gpt2_make_trainable(model);
    gpt2_zero_grad(model);
    double loss = trainer->task.loss(trainer, index, 4, 0.5, TO_LEARN);
    expect_close("weighted loss", loss, 0.5 * task_loss(trainer), 1e-6);
    gpt2_zero_grad(model);
    trainer->task.loss(trainer, index, 4, 1, TO_LEARN);

    /* each loss of a difference quotient adds to the gradients, so they are copied first */
    float **d = arena_alloc(&test_arena, model->tensor_count, sizeof *d);
    for (size_t i = 0; i < model->tensor_count; i++) {
        const struct Tensor *t = model->tensors[i];
        d[i] = arena_floats(&test_arena, t->n);
        memcpy(d[i], t->d, t->n * sizeof *t->d);
    }
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        expect_gradient(t->name, (struct Slope){task_loss, trainer, h}, t->w, d[i], t->n, 5, 2e-3);
    }
}

/* Central differences of the whole reward model, for pairs with margins, rated and labelled texts.
 */
static void test_reward_gradient(void) {
    struct GPT2 *model = empty_model(37, 12, 8, 2, 2);
    reward_head_declare(model);
    fill_random(model);
    struct Example texts[8];
    for (size_t i = 0; i < 8; i++)
        texts[i] = random_example(2 + i, 0, 37);
    struct RewardTask task = {
        .texts = {texts},
        .number = {(double[]){0, 1, -1, 0.5}},
        .center = 0.02,
    };
    double ratings[] = {1, -1, 3, 0};
    double labels[] = {1, 0, 0, 1};
    for (int kind = 0; kind < 3; kind++) {
        struct Trainer trainer = trainer_of(model, 0, 1, 4);
        task.rated = kind == 1;
        task.labelled = kind == 2;
        if (kind)
            task.number[0] = task.labelled ? labels : ratings;
        trainer.task = (struct Task){.name = "reward", .n = 4, .data = &task, .loss = reward_loss};
        expect_task_gradient(&trainer, 0.01);
        trainer_free(&trainer);
    }
}

/* The comments' numbers; a tie is no win. */
static void test_reward_metrics(void) {
    struct Trainer pairs = {0};
    struct Trainer labels = {0};
    reward_pair_metrics(&pairs, (float[]){2, 0.5f, 0.5f}, (struct Pair[]){{0, 1, 0}, {1, 2, 0}}, 2);
    expect_close("accuracy", mean_in(&pairs.metrics, "accuracy"), 0.5, 0);
    expect_close("margin", mean_in(&pairs.metrics, "margin"), 0.75, 0);
    reward_label_metrics(&labels, (float[]){2, -1, -3}, (double[]){1, 1, 0}, 3);
    expect_close("labels", mean_in(&labels.metrics, "accuracy"), 2.0 / 3, 1e-12);
}

/* Pairs of equal sides are left out and counted: no model can be right about them. */
static void test_reward_equal_pairs(void) {
    struct GPT2 *model = new_model(1024, 16, 16, 1, 2);
    struct Trainer trainer = trainer_of(model, 0, 1, 4);
    reward_head_declare(model);
    struct Dataset *data = dataset_of("{'chosen': 'a b', 'rejected': 'a b'}\n"
                                      "{'chosen': 'a b', 'rejected': 'a c'}\n"
                                      "{'prompt': 'a', 'chosen': '', 'rejected': '', 'margin': "
                                      "1}\n",
                                      REWARD_SHAPES, COUNT(REWARD_SHAPES));
    capture_begin();
    struct RewardTask *task = reward_task(&trainer, &test_arena, data, data);
    struct Text said = capture_end();
    expect_true("one is left", trainer.task.n == 1 && trainer.task.eval_n == 1);
    expect_holds("counted", said, "2 of 3 pairs are left out: chosen and rejected are the same\n");
    expect_count("a b and the end", task->texts[0][0].n, 3);
    expect_true("two different sides", task->texts[0][0].ids[1] != task->texts[0][1].ids[1]);
    trainer_free(&trainer);
}

/* Six pairs from a file are ordered after a few steps, of rated texts and of preferences; too
 * long a pair is dropped. */
static void test_reward_overfit(void) {
    static const char *const data[] = {
        "{'text': 'good', 'score': 2}\n{'text': 'bad', 'score': 0}\n{'text': 'a fine film', "
        "'score': 3}\n{'text': 'dull', 'score': -1}\n",
        "{'prompt': 'It is', 'chosen': ' good', 'rejected': ' bad'}\n{'chosen': 'fine', "
        "'rejected': 'dull'}\n{'chosen': 'a b c d e f g h i j k l m n o p q', 'rejected': "
        "'x'}\n{'chosen': 'yes', 'rejected': 'no', 'margin': 1}\n",
        "{'text': 'good', 'label': 1}\n{'text': 'bad', 'label': 0}\n{'text': 'a fine film', "
        "'label': true}\n{'text': 'dull', 'label': false}\n",
    };
    for (int k = 0; k < 3; k++) {
        struct GPT2 *model = new_model(1024, 16, 16, 1, 2);
        reward_head_declare(model);
        struct Trainer trainer = trainer_of(model, 1e-2, 60, 4);
        struct Dataset *set = dataset_of(data[k], REWARD_SHAPES, COUNT(REWARD_SHAPES));
        capture_begin();
        trainer.args.max_length = 16;
        struct RewardTask *task = reward_task(&trainer, &test_arena, set, NULL);
        struct Text said = capture_end();
        expect_true("rated or not", task->rated == (k == 0) && task->labelled == (k == 2)
                                        && trainer.task.n == (k == 1 ? 3 : 4));
        expect_true("a note about the long pair",
                    k != 1 || strstr(said.data, "1 of 4 pairs dropped"));
        trainer_train(&trainer);
        expect_close("loss at first: ln 2", logged(&trainer, 0, "loss"),
                     k == 1 ? (2 * log(2) - log_sigmoid(-1)) / 3 : log(2), 1e-6);
        expect_close("loss at last", logged(&trainer, 59, "loss"), 0, 0.05);
        expect_close("accuracy", logged(&trainer, 59, "accuracy"), 1, 0);
        trainer_free(&trainer);
    }
}

/* One text's reward: alone, first, last and amid other texts, of its length and of others: the
 * same bits on every kernel. */
static void test_reward_company(void) {
    static const size_t lengths[] = {1, 3, 16, 17, 40, 90};
    struct GPT2 *model = random_model(61, 96, 36, 2, 2);
    struct Example others[70], texts[70], text;
    reward_head_declare(model);
    for (size_t c = 0; c < 36; c++)
        model->score.w[c] = (float)rng_normal(&test_rng);
    for (size_t i = 0; i < 70; i++)
        others[i] = random_example(1 + i * 7 % 60, 0, 61);
    while (next_kernel())
        for (int threads = 1; threads <= 3; threads += 2)
            for (size_t l = 0; l < COUNT(lengths); l++) {
                float alone, reward[70];
                use_threads(threads);
                text = random_example(lengths[l], 0, 61);
                reward_score(model, &text, 1, &alone);
                for (size_t n = 2; n <= 70; n += n < 6 ? 1 : 32)
                    for (size_t at = 0; at < n; at += n - 1 > 2 ? (n - 1) / 2 : 1) {
                        memcpy(texts, others, sizeof texts);
                        texts[at] = texts[n - 1 - at] = text;
                        reward_score(model, texts, n, reward);
                        expect_bits("in company", reward + at, &alone, 1);
                        expect_bits("from the other end", reward + n - 1 - at, &alone, 1);
                    }
            }
}

/* =============================================================================================
 * Chapter 17 - Rollouts, REINFORCE, PPO, GRPO
 *
 * The functions of chapter 4 on a model: each figure of a step by another way, gradients by
 * central differences, and a made-up reward that every method raises.
 * ============================================================================================= */

/* Running moments and what use_score_scaling, use_score_norm and score_clip make of scores,
 * against TRL. */
static void test_ppo_scores_golden(void) {
    static const struct {
        size_t n;
        float raw[4];
        double scaled[4], normed[4], moments[4];
    } batches[] = {
        {3,
         {1.5, -0.75, 0.25},
         {1.33059812, -0.665299058, 0.221766368},
         {1.03490961, -0.960987628, -0.0739221275},
         {0.333333343, 0.847222149, 1.12731242, 3}},
        {4,
         {2, 3, -1, 0.5},
         {1.36911535, 2.05367303, -0.684557676, 0.342278838},
         {0.831248581, 1.51580632, -1.22242439, -0.195587888},
         {0.785714269, 1.82908165, 1.46079719, 7}},
        {2,
         {-4, 1},
         {-1.95674026, 0.489185065},
         {-2.0926249, 0.353300303},
         {0.277777791, 3.71450639, 2.04421616, 9}},
    };
    for (int norm = 0; norm < 2; norm++) {
        struct RolloutTrainer ppo = {.ppo.config = ppo_config(), .moments = {0, 1, 1e-24}};
        ppo.ppo.config.use_score_scaling = true;
        ppo.ppo.config.use_score_norm = norm;
        for (size_t b = 0; b < COUNT(batches); b++) {
            float scores[4];
            memcpy(scores, batches[b].raw, sizeof scores);
            ppo_process_scores(&ppo, scores, batches[b].n);
            expect_floats("scores", scores, norm ? batches[b].normed : batches[b].scaled,
                          batches[b].n, 2e-6);
            expect_doubles("mean, var, std, count",
                           (double[]){ppo.moments.mean, ppo.moments.var,
                                      running_moments_std(&ppo.moments), ppo.moments.count},
                           batches[b].moments, 4, 2e-6);
        }
    }
}

static void test_ppo_scores_clipped(void) {
    struct RolloutTrainer ppo = {.ppo.config = ppo_config()};
    float scores[] = {-2, -0.5f, 0, 0.5f, 2};
    ppo.ppo.config.score_clip = 1;
    ppo_process_scores(&ppo, scores, 5);
    expect_floats("clipped", scores, (double[]){-1, -0.5, 0, 0.5, 1}, 5, 0);
}

/* By hand: chapter 4's answer, the score on its last token. */
static void test_ppo_rewards(void) {
    struct RolloutTrainer ppo = {.ppo.config = ppo_config(), .kl_coef = 0.2};
    float kl[3], non_score_rewards[3], rewards[3];
    struct PPOBatch p = {
        .B = 1,
        .R = 3,
        .start = (size_t[]){0, 3},
        .logprobs = (float[]){-1.2f, -0.5f, -0.1f},
        .ref_logprobs = (float[]){-1.7f, -0.5f, -0.2f},
        .kl = kl,
        .non_score_rewards = non_score_rewards,
        .rewards = rewards,
    };
    ppo_rewards(&ppo, &p, (float[]){1});
    expect_floats("divergence", kl, (double[]){0.5, 0, 0.1}, 3, 1e-6);
    expect_floats("penalty alone", non_score_rewards, (double[]){-0.1, 0, -0.02}, 3, 1e-6);
    expect_floats("with the score", rewards, (double[]){-0.1, 0, 0.98}, 3, 1e-6);
    expect_close("nats an answer", ppo_kl(&p), 0.6, 1e-6);
}

/* Advantages and returns of the rewards of golden_batch, against TRL; with whitened rewards their
 * padding counts too. */
static const struct {
    double gamma, lam;
    bool whiten;
    double advantages[13], returns[13];
} GOLDEN_ADVANTAGES[] = {
    {1,
     0.95,
     false,
     {0.062611647, 0.505497158, 1.02779174, 1.32773924, 1.26864195, 0.937929869, -1.76150739,
      -1.39676452, -0.88944155, -0.696923673, -0.031829413, -0.0392330885, -0.314511567},
     {1.0134089, 1.10752499, 1.18805599, 1.28466177, 1.41172695, 1.51447213, -0.757659793,
      -0.743877947, -0.676280499, -0.677197397, -0.0326370597, 0.157659858, 0.317258418}},
    {1,
     0.95,
     true,
     {0.346728981, 0.64479351, 0.96479857, 1.17585719, 1.22699451, 1.13995469, -1.55975509,
      -1.34622645, -1.04222095, -0.939777553, -0.267054588, -0.15713644, -0.186956972},
     {1.87021494, 2.10483313, 2.29085302, 2.50018239, 2.78224134, 3.03908944, -1.77690065,
      -1.7084589, -1.55144286, -1.54311943, -0.257345617, 0.15019384, 0.519536257}},
    {0.9,
     0.8,
     false,
     {-0.775093436, -0.213319331, 0.583800673, 1.22760308, 1.51499438, 1.53358424, -1.5433768,
      -1.25134909, -0.713518202, -0.585389912, 0.12079978, 0.191000685, -0.0897361115},
     {0.135626823, 0.220576972, 0.390938699, 0.678203344, 1.07738125, 1.51447213, -0.442293406,
      -0.56361866, -0.58552444, -0.677197397, -0.149152339, 0.10079965, 0.317258418}},
    {0.9,
     0.8,
     true,
     {-0.425515264, -0.00882489327, 0.538780928, 1.05213284, 1.47370958, 1.84628606, -1.28277695,
      -1.17165232, -0.916080356, -0.973914027, -0.181716666, 0.00538602797, 0.0441847295},
     {0.223608881, 0.468658566, 0.805425763, 1.32602906, 2.09723353, 3.03908944, -0.973345876,
      -1.15829039, -1.22648966, -1.49445951, -0.39153558, 0.0664004683, 0.546745539}},
};

static void test_ppo_advantages_golden(void) {
    for (size_t i = 0; i < COUNT(GOLDEN_ADVANTAGES); i++) {
        struct PPOConfig config = ppo_config();
        struct PPOBatch p = golden_batch();
        config.gamma = GOLDEN_ADVANTAGES[i].gamma;
        config.lam = GOLDEN_ADVANTAGES[i].lam;
        config.whiten_rewards = GOLDEN_ADVANTAGES[i].whiten;
        ppo_advantages(&config, &p);
        expect_floats("advantages", p.advantages, GOLDEN_ADVANTAGES[i].advantages, 13, 5e-6);
        expect_floats("returns", p.returns, GOLDEN_ADVANTAGES[i].returns, 13, 5e-6);
    }
}

/* golden.py's example of three tokens. */
static void test_ppo_advantages_golden_short(void) {
    struct PPOConfig config = ppo_config();
    float values[] = {0.5f, 0.4f, 0.3f};
    float rewards[] = {-0.1f, 0, 1};
    float advantages[3], returns[3];
    struct PPOBatch p = {
        .B = 1,
        .R = 3,
        .start = (size_t[]){0, 3},
        .padding = (size_t[]){0},
        .values = values,
        .rewards = rewards,
        .advantages = advantages,
        .returns = returns,
    };
    ppo_advantages(&config, &p);
    for (int t = 0; t < 3; t++)
        expect_close("A = return - V", returns[t] - values[t], (double[]){0.33675, 0.565, 0.7}[t],
                     1e-6);
    expect_floats("returns", returns, (double[]){0.836749971, 0.964999914, 1}, 3, 1e-6);
    expect_floats("whitened", advantages, (double[]){-1.07383966, 0.169290587, 0.904548705}, 3,
                  2e-6);
}

/* Loss, gradients and all scalars of the stats dictionary against TRL. */
static void test_ppo_loss_golden(void) {
    static const struct {
        const char *name;
        double want;
    } stats_of_trl[] = {
        {"objective/kl", 0.739985883},
        {"objective/entropy", 5.99289179},
        {"objective/kl_coef", 0.2},
        {"ppo/mean_non_score_reward", -0.034153197},
        {"ppo/mean_scores", 0.333333343},
        {"ppo/std_scores", 1.12731242},
        {"ppo/loss/policy", 0.0616399869},
        {"ppo/loss/value", 0.579016984},
        {"ppo/loss/total", 0.11954169},
        {"ppo/policy/entropy", 1.35618162},
        {"ppo/policy/approxkl", 0.0318978429},
        {"ppo/policy/policykl", -0.0233546682},
        {"ppo/policy/clipfrac", 0.307692319},
        {"ppo/policy/advantages_mean", 3.26679306e-08},
        {"ppo/returns/mean", 0.392855138},
        {"ppo/returns/var", 0.813801169},
        {"ppo/val/vpred", -0.120932974},
        {"ppo/val/error", 1.1224916},
        {"ppo/val/clipfrac", 0.230769232},
        {"ppo/val/mean", -0.105236657},
        {"ppo/val/var", 0.12100514},
        {"ppo/val/var_explained", -0.379319191},
        {"tokens/queries_len_mean", 3},
        {"tokens/queries_len_std", 1},
        {"tokens/responses_len_mean", 4.33333349},
        {"tokens/responses_len_std", 1.52752519},
    };
    static const struct {
        double dlogprob, dvalue;
    } golden[13] = {
        {-0.0035352814, -0.00597338378},
        {0, 0},
        {-0.0797494426, -0.0102781672},
        {-0.0751792565, -0.0158304796},
        {0, -0.0139595931},
        {-0.072349824, 0},
        {0.183580145, 0},
        {0.107111089, 0.00708580669},
        {0, 0.0049654711},
        {0.0728414357, 0.000298171333},
        {0.00239815633, -0.00316583272},
        {0, -0.00584292412},
        {0.0331404805, -0.00132195675},
    };
    struct RolloutTrainer ppo = {
        .ppo.config = ppo_config(),
        .kl_coef = 0.2,
        .args = training_arguments(),
        .total_steps = 1,
    };
    struct PPOBatch p = golden_batch();
    double stats[PPO_STATS];
    float scratch[7];
    p.advantages = narrow(GOLDEN_ADVANTAGES[0].advantages, 13);
    p.returns = narrow(GOLDEN_ADVANTAGES[0].returns, 13);
    struct PPOTokens tokens =
        tokens_of(&p, 13, packed_formula(golden_new), packed_formula(golden_newval));
    struct PPOLoss loss = ppo_loss(&ppo.ppo.config, &tokens);
    ppo_statistics(&tokens, loss, stats);
    expect_close("policy loss", loss.policy, 0.0616399869, 1e-6);
    expect_close("value loss", loss.value * 0.1, 0.0579016991, 1e-7);
    for (size_t i = 0; i < 13; i++) {
        expect_close("d log-probability", tokens.dlogprobs[i], golden[i].dlogprob, 2e-7);
        expect_close("d value", tokens.dvalues[i], golden[i].dvalue, 5e-8);
    }
    struct Rollout rollouts[3];
    for (size_t b = 0; b < 3; b++) {
        size_t length = GOLDEN_START[b + 1] - GOLDEN_START[b];
        size_t query = GOLDEN_COLUMN[b] + 1;
        rollouts[b] = (struct Rollout){{NULL, query + length, query}, 0};
        for (size_t k = 0; k < length; k++) {
            float logits[7];
            size_t row = 8 * b + GOLDEN_COLUMN[b] + k;
            for (size_t v = 0; v < 7; v++)
                logits[v] = (float)(2 * sin(0.1 + 0.77 * (double)(7 * row + v)));
            float lse = log_sum_exp(logits, 7, scratch);
            stats[POLICY_ENTROPY] += entropy_of_logits(logits, lse, 7) / 13;
        }
    }
    for (size_t t = 0; t < 13; t++) {
        p.kl[t] = kl_penalty_token(KL_PENALTY_KL, p.logprobs[t], p.ref_logprobs[t], 0);
        p.non_score_rewards[t] = kl_reward(0.2, p.kl[t]);
    }
    ppo_record_stats(&ppo, rollouts, &p, (float[]){1.5f, -0.75f, 0.25f}, stats, 1);
    for (size_t i = 0; i < COUNT(stats_of_trl); i++) {
        double value = NAN;
        log_find(&ppo.stats, stats_of_trl[i].name, &value);
        expect_close(stats_of_trl[i].name, value, stats_of_trl[i].want, 3e-6);
    }
    arena_free(&ppo.arena);
}

/* A policy, a slightly different reference and four rollouts: for what runs through the models. */
static struct RolloutTrainer *ppo_of(struct PPOConfig config, double learning_rate,
                                     struct Rollout *rollouts) {
    struct GPT2 *model = random_model(37, 14, 8, 2, 2);
    struct GPT2 *ref_model = owned(gpt2_copy(model));
    for (size_t i = 0; i < ref_model->tensor_count; i++)
        for (size_t k = 0; k < ref_model->tensors[i]->n; k++)
            ref_model->tensors[i]->w[k] *= 0.9f;
    struct TrainingArguments args = training_arguments();
    args.learning_rate = learning_rate;
    args.max_grad_norm = 0;
    args.lr_scheduler_type = SCHEDULER_CONSTANT;
    for (size_t i = 0; i < 4; i++) {
        size_t query = 2 + i % 3;
        size_t response = 3 + 2 * i;
        rollouts[i] = (struct Rollout){random_example(query + response, query, 37), (float)i - 1};
    }
    config.batch_size = 4;
    config.mini_batch_size = MIN(config.mini_batch_size, (size_t)4);
    return ppo_trainer_new(model, ref_model, config, args, 0.7);
}

struct PPOModelCase {
    struct RolloutTrainer *ppo;
    struct Rollout *rollouts;
    struct PPOBatch p;
};

static double ppo_model_loss(void *context) {
    struct PPOModelCase *c = context;
    double stats[PPO_STATS];
    ppo_mini_batch(c->ppo, c->rollouts, &c->p, (size_t[]){3, 0, 2}, 3, 1, stats);
    return stats[LOSS_TOTAL];
}

/* Central differences of a mini-batch's loss by the policy's weights and its value head's, three
 * of four rollouts. */
static void test_ppo_gradient(void) {
    struct Rollout rollouts[4];
    struct RolloutTrainer *ppo = ppo_of(ppo_config(), 0, rollouts);
    struct PPOModelCase c = {ppo, rollouts, ppo_evaluate_rollouts(ppo, rollouts)};
    ppo_rewards(ppo, &c.p, (float[]){-1, 0, 1, 2});
    c.p.fresh = false; /* the weights will be moved one by one */
    ppo_advantages(&ppo->ppo.config, &c.p);
    gpt2_zero_grad(ppo->model);
    ppo_model_loss(&c);
    float *d[32]; /* a copy: every pass adds to the gradients */
    for (size_t i = 0; i < ppo->model->tensor_count; i++)
        d[i] = narrow(widen(ppo->model->tensors[i]->d, ppo->model->tensors[i]->n),
                      ppo->model->tensors[i]->n);
    for (size_t i = 0; i < ppo->model->tensor_count; i++) {
        struct Tensor *t = ppo->model->tensors[i];
        expect_gradient(t->name, (struct Slope){ppo_model_loss, &c, 0.003}, t->w, d[i], t->n, 6,
                        4e-3);
    }
    rollout_trainer_free(ppo);
}

/* One step at learning rate 0: log-probabilities and rewards of the rollouts by way of logits;
 * ratio 1 and no clipping; stats, beta and the KL that they must have. */
static void test_ppo_step(void) {
    for (int full = 0; full < 2; full++) {
        struct Rollout rollouts[4];
        struct PPOConfig config = ppo_config();
        config.mini_batch_size = 2;
        config.kl_penalty = full ? KL_PENALTY_FULL : KL_PENALTY_KL;
        struct RolloutTrainer *ppo = ppo_of(config, 0, rollouts);
        struct PPOBatch p = ppo_evaluate_rollouts(ppo, rollouts);
        ppo_rewards(ppo, &p, (float[]){-1, 0, 1, 2});
        double kl = 0;
        for (size_t b = 0; b < 4; b++) {
            const struct Example *e = &rollouts[b].example;
            struct Batch batch = batch_of(e, 1, READ_LAST);
            float *logits = batch_logits(ppo->model, &batch);
            float *ref = batch_logits(ppo->ref_model, &batch);
            float scratch[37];
            for (size_t i = 0; i < e->n * 37; i++) {
                logits[i] /= 0.7f;
                ref[i] /= 0.7f;
            }
            expect_count("response", p.start[b + 1] - p.start[b], response_length(&rollouts[b]));
            expect_count("padding", p.padding[b], 11 - e->n);
            for (size_t k = 0; k < response_length(&rollouts[b]); k++) {
                size_t t = p.start[b] + k;
                size_t place = e->prompt_length - 1 + k;
                float *row = logits + place * 37;
                float *ref_row = ref + place * 37;
                float lse = log_sum_exp(row, 37, scratch);
                float ref_lse = log_sum_exp(ref_row, 37, scratch);
                double logp = row[e->ids[place + 1]] - lse;
                double ref_logp = ref_row[e->ids[place + 1]] - ref_lse;
                double penalty = full ? kl_exact(row, lse, ref_row, ref_lse, 37) : logp - ref_logp;
                expect_close("log-probability", p.logprobs[t], logp, 1e-5);
                expect_close("the reference's", p.ref_logprobs[t], ref_logp, 1e-5);
                expect_close("reward", p.rewards[t],
                             -0.2 * penalty
                                 + (k + 1 == response_length(&rollouts[b]) ? (double)b - 1 : 0),
                             1e-5);
                kl += penalty / 4;
            }
        }
        size_t n;
        float *before = all_weights(ppo->model, &n);
        ppo_step(ppo, rollouts);
        expect_bits("weights at learning rate 0", all_weights(ppo->model, &n), before, n);
        static const struct {
            const char *name;
            double want, tolerance;
        } stats[] = {
            {"ppo/policy/approxkl", 0, 1e-9},    {"ppo/policy/policykl", 0, 1e-5},
            {"ppo/policy/clipfrac", 0, 0},       {"ppo/val/clipfrac", 0, 0},
            {"ppo/mean_scores", 0.5, 0},         {"objective/kl_coef", 0.2, 0},
            {"tokens/responses_len_mean", 6, 0}, {"tokens/queries_len_mean", 2.75, 0},
        };
        double value;
        for (size_t i = 0; i < COUNT(stats); i++) {
            log_find(&ppo->stats, stats[i].name, &value);
            expect_close(stats[i].name, value, stats[i].want, stats[i].tolerance);
        }
        log_find(&ppo->stats, "objective/kl", &value);
        expect_close("objective/kl", value, kl, 1e-5);
        expect_close("beta for the next step", ppo->kl_coef,
                     kl_controller_update(&config, 0.2, kl, 4), 1e-7);
        expect_count("optimizer steps: 4 epochs of 2", ppo->ppo.optimizer_steps, 8);
        FILE *file = fopen(temporary("stats_all.jsonl"), "wb");
        stats_write_line(file, ppo);
        fclose(file);
        const char *error;
        struct Json *line = parse(contents("stats_all.jsonl").data, &error);
        struct Json *logprobs = json_get(line, "objective/logprobs");
        struct Json *dist = json_get(line, "objective/kl_dist");
        double kl_of_dist = 0;
        size_t b = 0;
        for (struct Json *item = dist->child; item; item = item->next)
            kl_of_dist += item->number / 4;
        expect_close("kl is the mean of kl_dist", kl_of_dist, kl, 1e-5);
        for (struct Json *item = logprobs->child; item; item = item->next, b++)
            expect_count("a log-probability a response token", json_count(item),
                         response_length(&rollouts[b]));
        expect_count("as many as responses", b, 4);
        expect_count("every token of every epoch", json_count(json_get(line, "ppo/policy/ratio")),
                     4 * 24);
        expect_count("its advantage", json_count(json_get(line, "ppo/policy/advantages")), 4 * 24);
        for (struct Json *item = json_get(line, "ppo/policy/ratio")->child; item; item = item->next)
            expect_close("at learning rate 0 the ratio is 1", item->number, 1, 1e-5);
        rollout_trainer_free(ppo);
    }
}

/* early_stopping ends the epochs of a policy that has moved. */
static void test_ppo_guards(void) {
    struct Rollout rollouts[4];
    struct PPOConfig config = ppo_config();
    config.early_stopping = true;
    config.target_kl = -100;
    config.mini_batch_size = 4;
    struct RolloutTrainer *ppo = ppo_of(config, 0.03, rollouts);
    ppo_step(ppo, rollouts);
    expect_count("one step, then stopped after the first epoch", ppo->ppo.optimizer_steps, 1);
    rollout_trainer_free(ppo);
}

/* ratio_threshold skips a mini-batch whose ratios have run away. */
static void test_ppo_guards_ratio(void) {
    struct Rollout rollouts[4];
    struct PPOConfig config = ppo_config();
    config.mini_batch_size = 4;
    config.ratio_threshold = 1e-3;
    struct RolloutTrainer *ppo = ppo_of(config, 0.01, rollouts);
    size_t n;
    float *before = all_weights(ppo->model, &n);
    capture_begin();
    ppo_step(ppo, rollouts);
    struct Text said = capture_end();
    expect_holds("a note", said, "exceeds --ratio_threshold");
    expect_bits("no gradient, no movement", all_weights(ppo->model, &n), before, n);
    double value;
    log_find(&ppo->stats, "ppo/loss/total", &value);
    expect_close("loss 0", value, 0, 0);
    rollout_trainer_free(ppo);
}

/* A step with mini-batches and accumulation on one, two and three threads: the same weights, bit
 * for bit. */
static void test_ppo_threads(void) {
    struct RolloutTrainer *ppo[4] = {NULL};
    struct PPOConfig config = ppo_config();
    config.batch_size = 8;
    config.mini_batch_size = config.gradient_accumulation_steps = config.ppo_epochs = 2;
    struct Rollout rollouts[8];
    for (size_t i = 0; i < 8; i++)
        rollouts[i] = (struct Rollout){random_example(60, 20, 600), (float)i};
    for (int threads = 1; threads <= 3; threads++) {
        struct GPT2 *model = new_model(600, 60, 64, 1, 4);
        use_threads(threads);
        ppo[threads] =
            ppo_trainer_new(model, owned(gpt2_copy(model)), config, training_arguments(), 1);
        ppo_step(ppo[threads], rollouts);
        expect_same_weights("weights", ppo[threads]->model, ppo[1]->model);
    }
    use_threads(1);
    for (int threads = 1; threads <= 3; threads++)
        rollout_trainer_free(ppo[threads]);
}

/* SHARE_B answers of six tokens to prompts of which `each` are alike, their score 4 times the
 * share of SHARE_TOKEN in them. Returns the mean share. */
enum { SHARE_B = 32, SHARE_TOKEN = 7 };
static double share_rollouts(const struct GPT2 *model, size_t step, size_t each,
                             struct Rollout rollouts[SHARE_B]) {
    struct GenerationConfig generation = sampling(1, 0, 1);
    struct Sequence s[SHARE_B];
    double mean = 0;
    for (size_t i = 0; i < SHARE_B; i++)
        s[i] = sequence_start(&test_arena, (int[]){(int)(i / each), 3}, 2, 6, model,
                              rng_seed(step * SHARE_B + i, STREAM_SAMPLE));
    generate(model, s, SHARE_B, &generation);
    for (size_t i = 0; i < SHARE_B; i++) {
        double share = 0;
        for (size_t t = 2; t < s[i].n; t++)
            share += (s[i].ids[t] == SHARE_TOKEN) / (double)(s[i].n - 2);
        mean += share / SHARE_B;
        rollouts[i] = (struct Rollout){{s[i].ids, s[i].n, 2}, (float)(4 * share)};
    }
    return mean;
}

/* A reward that the test makes up, the share of one token in the answer: PPO raises it. */
static void test_ppo_raises_reward(void) {
    enum { STEPS = 20 };
    struct GPT2 *model = new_model(40, 16, 32, 1, 2);
    struct GPT2 *ref_model = owned(gpt2_copy(model));
    struct TrainingArguments args = training_arguments();
    struct PPOConfig config = ppo_config();
    args.learning_rate = 4e-3;
    args.lr_scheduler_type = SCHEDULER_CONSTANT;
    config.batch_size = config.mini_batch_size = SHARE_B;
    config.init_kl_coef = 0.02;
    struct RolloutTrainer *ppo = ppo_trainer_new(model, ref_model, config, args, 1);
    double first = 0;
    double last = 0;
    double kl;
    for (size_t step = 0; step < STEPS; step++) {
        struct Rollout rollouts[SHARE_B];
        *(step == 0 ? &first : &last) = share_rollouts(model, step, 1, rollouts);
        ppo_step(ppo, rollouts);
    }
    log_find(&ppo->stats, "objective/kl", &kl);
    expect_close("share of the token at first", first, 1.0 / 40, 0.05);
    expect_close("and at last", last, 1, 0.4);
    expect_true("away from the reference", kl > 1);
    rollout_trainer_free(ppo);
}

/* Rollouts that are written are read back and replayed as they were. */
static void test_ppo_replay(void) {
    struct Rollout rollouts[3], back[5];
    for (size_t i = 0; i < 3; i++)
        rollouts[i] = (struct Rollout){random_example(5 + i, 2, 37), 0.1f * (float)i - 1};
    FILE *file = fopen(temporary("rollouts.jsonl"), "wb");
    rollouts_write(file, rollouts, 3);
    fclose(file);
    struct GPT2 *model = random_model(37, 14, 8, 1, 2);
    struct Dataset *data =
        dataset_load(&test_arena, temporary("rollouts.jsonl"), ROLLOUT_SHAPES, 1);
    struct RolloutTrainer trainer = {.algorithm = ALGORITHM_PPO,
                                     .model = model,
                                     .batch_size = 5,
                                     .num_generations = 1};
    replay_rollouts(data, 1, &trainer, &test_arena, back);
    for (size_t i = 0; i < 5; i++) {
        const struct Rollout *want = &rollouts[(5 + i) % 3];
        expect_ids("ids", back[i].example.ids, back[i].example.n, want->example.ids,
                   want->example.n);
        expect_count("response", response_length(&back[i]), response_length(want));
        expect_bits("score", &back[i].score, &want->score, 1);
    }
}

/* Every response of two tokens out of four, with its reward: 16 of them. */
enum { SMALL_V = 4, SMALL_RESPONSES = 16 };
struct SmallWorld {
    struct GPT2 *model;
    struct Example y[SMALL_RESPONSES];
    double reward[SMALL_RESPONSES], logps[SMALL_RESPONSES];
    struct Batch batch;
    struct Activations acts;
    struct LMHead head;
};

static struct SmallWorld small_world(void) {
    struct SmallWorld w = {.model = random_model(SMALL_V, 4, 8, 1, 2)};
    for (int i = 0; i < SMALL_RESPONSES; i++) {
        int *ids = arena_alloc(&test_arena, 3, sizeof *ids);
        ids[0] = 1, ids[1] = i / SMALL_V, ids[2] = i % SMALL_V;
        w.y[i] = (struct Example){ids, 3, 1};
        w.reward[i] = sin(1.7 * i);
    }
    return w;
}

/* J = sum_y pi(y) R(y), outright. */
static double small_objective(void *context) {
    struct SmallWorld *w = context;
    double J = 0;
    w->batch = batch_of(w->y, SMALL_RESPONSES, SKIP_LAST);
    w->acts = gpt2_forward(w->model, &test_arena, &w->batch, true);
    w->head =
        lm_head_new(w->model, &test_arena, &w->acts, w->batch.row, w->batch.target, w->batch.R, 1);
    lm_head_forward(w->model, &w->head);
    sum_target_logps(&w->batch, SMALL_RESPONSES, w->head.logprob, w->logps);
    for (int i = 0; i < SMALL_RESPONSES; i++)
        J += exp(w->logps[i]) * w->reward[i];
    return J;
}

/* The log-derivative trick: the mean of R grad log pi over all responses, weighted by their
 * probability, is the slope of J by central differences, with any constant baseline. */
static void test_reinforce_gradient(void) {
    struct SmallWorld w = small_world();
    gpt2_make_trainable(w.model);
    for (int baseline = 0; baseline < 2; baseline++) {
        float advantages[SMALL_RESPONSES], *d[32];
        double dlogps[SMALL_RESPONSES];
        small_objective(&w);
        gpt2_zero_grad(w.model);
        for (int i = 0; i < SMALL_RESPONSES; i++)
            advantages[i] =
                (float)(SMALL_RESPONSES * exp(w.logps[i]) * (w.reward[i] - 0.7 * baseline));
        reinforce_loss(advantages, w.logps, SMALL_RESPONSES, dlogps);
        float *dlogprob = arena_floats(&test_arena, w.batch.R);
        float *dhidden = arena_zeros(&test_arena, w.batch.N * 8, sizeof *dhidden);
        for (size_t i = 0; i < SMALL_RESPONSES; i++)
            /* up, not down */
            for (size_t t = w.batch.target_start[i]; t < w.batch.target_start[i + 1]; t++)
                dlogprob[t] = (float)-dlogps[i];
        lm_head_backward(w.model, &w.head, dlogprob, dhidden, &test_arena);
        gpt2_backward(w.model, &test_arena, &w.acts, dhidden);
        for (size_t i = 0; i < w.model->tensor_count; i++) {
            struct Tensor *t = w.model->tensors[i];
            d[i] = narrow(widen(t->d, t->n), t->n);
            expect_gradient(t->name, (struct Slope){small_objective, &w, 0.003}, t->w, d[i], t->n,
                            6, 4e-3);
        }
    }
}

/* reinforce_step without movement: what it logs, and each answer's own gradient of ln_f.bias by
 * central difference. */
static void test_reinforce_step(void) {
    struct Rollout rollouts[4];
    struct RolloutTrainer *ppo = ppo_of(ppo_config(), 0, rollouts);
    ppo->baseline = BASELINE_RLOO;
    ppo->num_generations = 2;
    ppo->kl_coef = 0.1;
    ppo->total_steps = 9;
    reinforce_step(ppo, rollouts);
    double value;
    double kl = 0;
    double R[4];
    const struct Example examples[] = {rollouts[0].example, rollouts[1].example,
                                       rollouts[2].example, rollouts[3].example};
    struct Batch batch = collate(&test_arena, examples, 4, SKIP_LAST);
    struct LMHead head = batch_logprobs(ppo->model, &test_arena, &batch, 0.7, false);
    struct LMHead ref_head = batch_logprobs(ppo->ref_model, &test_arena, &batch, 0.7, false);
    for (size_t i = 0; i < 4; i++) {
        size_t t = batch.target_start[i];
        size_t n = batch.target_start[i + 1] - t;
        double difference =
            sequence_logprob(head.logprob + t, n) - sequence_logprob(ref_head.logprob + t, n);
        kl += difference / 4;
        R[i] = rollouts[i].score - 0.1 * difference;
    }
    log_find(&ppo->stats, "kl", &value);
    expect_close("kl", value, kl, 1e-5);
    log_find(&ppo->stats, "objective", &value);
    expect_close("reward less beta KL", value, (R[0] + R[1] + R[2] + R[3]) / 4, 1e-5);
    expect_close("the running mean", ppo->moments.mean, value, 1e-6);
    float *s = answer_gradients(ppo, &head, &batch);
    float bias = ppo->model->ln_f.bias.w[3];
    double stirred = 0;
    for (size_t i = 0; i < ppo->model->wte.n; i++)
        stirred += fabs(ppo->model->wte.d[i]);
    expect_close("looking leaves no gradient", stirred, 0, 0);
    double logps[2][4];
    for (int side = 0; side < 2; side++) {
        ppo->model->ln_f.bias.w[3] = bias + (side ? 0.01f : -0.01f);
        struct LMHead moved = batch_logprobs(ppo->model, &test_arena, &batch, 0.7, false);
        sum_target_logps(&batch, 4, moved.logprob, logps[side]);
    }
    for (size_t i = 0; i < 4; i++)
        expect_close("d log pi / d ln_f.bias", s[i * 8 + 3], (logps[1][i] - logps[0][i]) / 0.02,
                     2e-3);
    rollout_trainer_free(ppo);
}

/* With any baseline REINFORCE raises the share of one token. */
static void test_reinforce_raises_reward(void) {
    enum { STEPS = 30 };
    for (int baseline = 0; baseline <= BASELINE_RLOO; baseline++) {
        struct GPT2 *model = new_model(40, 16, 32, 1, 2);
        struct GPT2 *ref_model = owned(gpt2_copy(model));
        struct ReinforceConfig config = {
            .baseline = (enum Baseline)baseline,
            .batch_size = SHARE_B,
            .num_generations = 4,
            .beta = 0.01,
        };
        struct TrainingArguments args = training_arguments();
        args.learning_rate = 1e-2;
        args.lr_scheduler_type = SCHEDULER_CONSTANT;
        struct RolloutTrainer *trainer = reinforce_trainer_new(model, ref_model, config, args, 1);
        trainer->total_steps = STEPS;
        double first = 0;
        double last = 0;
        for (size_t step = 0; step < STEPS; step++) {
            struct Rollout rollouts[SHARE_B];
            *(step == 0 ? &first : &last) = share_rollouts(model, step, 4, rollouts);
            reinforce_step(trainer, rollouts);
        }
        expect_true((const char *[]){"none", "mean", "rloo"}[baseline], first < 0.1 && last > 0.5);
        rollout_trainer_free(trainer);
    }
}

/* By hand: a scaled reward, and one of a response that ended too soon. */
static void test_scorer_scale(void) {
    struct Scorer scorer = {.mean = 2, .std = 0.5, .least_length = 4, .short_score = -2};
    struct GPT2Config policy = {.vocab_size = 9, .eos_token_id = 7};
    struct Example ended = {(int[]){1, 5, 5, 7}, 4, 1};
    struct Example cut = {(int[]){1, 5, 5, 5}, 4, 1};
    expect_close("ended after three tokens", scorer_scale(&scorer, &ended, &policy, 3.5f), -2, 0);
    expect_close("worse than that", scorer_scale(&scorer, &ended, &policy, 0.5f), -3, 0);
    expect_close("cut there by max_new_tokens", scorer_scale(&scorer, &cut, &policy, 3.5f), 3, 0);
    scorer.least_length = 3;
    expect_close("long enough", scorer_scale(&scorer, &ended, &policy, 3.5f), 3, 0);
}

/* With 25 steps every second one is shown, with 13 each; always the first and the last. */
static void test_ppo_trace_shows(void) {
    for (size_t step = 0; step < 25; step++)
        expect_count("of 25", ppo_trace_shows(step, 25), step % 2 == 0);
    for (size_t steps = 1; steps <= 200; steps++) {
        size_t shown = 0;
        for (size_t step = 0; step < steps; step++)
            shown += ppo_trace_shows(step, steps);
        expect_count("how many", shown, MIN(steps, (size_t)13));
        expect_true("the first", ppo_trace_shows(0, steps));
        expect_true("the last", ppo_trace_shows(steps - 1, steps));
    }
}

/* The judge's opinion after each token. A causal model's hidden state at a token has seen that
 * token and those before it, never later ones: the head, read at each, gives all in one pass. */
static void test_scorer_prefixes(void) {
    struct GPT2 *judge = random_model(300, 14, 8, 2, 2);
    tensor_normal(reward_head_declare(judge), &test_rng, 1);
    struct Scorer scorer = {
        .reward_model = judge,
        .tok = tokenizer,
        .mean = 0.1,
        .std = 0.5,
        .least_length = 99,
        .short_score = -2,
    };
    struct GPT2Config policy = {.vocab_size = 300, .eos_token_id = 299};
    struct Example e = example_encode(&test_arena, tokenizer, text_of("abc de fgh"), 300, NULL);
    float scores[16], reward[16];
    int row[16];
    for (int t = 0; t < 16; t++)
        row[t] = t;
    struct Batch batch = collate(&test_arena, &e, 1, READ_LAST);
    struct Activations acts = gpt2_forward(judge, &test_arena, &batch, false);
    scalar_head_forward(reward, acts.ln_f, row, e.n, &judge->score, NULL);
    e.prompt_length = 2;
    scorer_prefixes(&scorer, &test_arena, &e, &policy, scores);
    for (size_t n = e.prompt_length; n <= e.n; n++)
        expect_close("a beginning", scores[n - 2], (reward[n - 1] - 0.1) / 0.5, 1e-5);
    expect_true("they differ", fabsf(scores[0] - scores[1]) > 1e-3f);

    /* Of 64 beginnings every third is read, and the whole answer. */
    float many[64];
    e.ids = arena_zeros(&test_arena, 64, sizeof(int));
    for (int t = 0; t < 64; t++)
        e.ids[t] = 'a' + t % 7;
    e.n = 64;
    e.prompt_length = 1;
    scorer_prefixes(&scorer, &test_arena, &e, &policy, many);
    size_t read = 0;
    for (int t = 0; t < 64; t++)
        read += isfinite(many[t]) != 0;
    expect_count("how many are read", read, 22);
    expect_true("the first and the last", isfinite(many[0]) && isfinite(many[63]));
}

/* Number t of a list of trace.jsonl. */
static double trace_number(const struct Json *tokens, const char *name, size_t t) {
    struct Json *item = json_get(tokens, name)->child;
    while (t-- > 0)
        item = item->next;
    return item->number;
}

/* What an answer's tokens must be: the rewards are -beta kl and the score, advantages and returns
 * those of the recursion, whitened by the mean and deviation that are given. */
static void expect_trace_answer(struct Json *entry, struct Json *response, double beta) {
    struct Json *metrics = json_get(entry, "metrics");
    struct Json *tokens = json_get(response, "tokens");
    double mean = json_get(metrics, "advantage_mean")->number;
    double std = json_get(metrics, "advantage_std")->number;
    size_t n = json_count(json_get(tokens, "ids"));
    double advantage = 0;
    double next_value = 0;
    expect_count("its length", (size_t)json_get(response, "response_length")->number, n);
    expect_count("strings", json_count(json_get(tokens, "strings")), n);
    for (size_t t = n; t-- > 0;) {
        double old = trace_number(tokens, "old_log_probs", t);
        double kl = old - trace_number(tokens, "ref_log_probs", t);
        double reward = -beta * kl + (t == n - 1 ? json_get(response, "score")->number : 0);
        double value = trace_number(tokens, "values", t);
        expect_close("kl", trace_number(tokens, "token_kl", t), kl, 1e-5);
        expect_close("reward", trace_number(tokens, "rewards", t), reward, 1e-5);
        advantage = reward + next_value - value + 0.95 * advantage;
        next_value = value;
        double whitened = (advantage - mean) / std;
        double A = trace_number(tokens, "advantages", t);
        expect_close("return", trace_number(tokens, "returns", t), advantage + value, 1e-5);
        expect_close("whitened advantage", A, whitened, 1e-4);
        double ratio = exp(trace_number(tokens, "log_probs", t) - old);
        double objective = MIN(A * ratio, A * MAX(0.8, MIN(1.2, ratio)));
        expect_close("objective", trace_number(tokens, "token_objective", t), objective, 1e-5);
    }
}

/* The file of a step, read back: numbers that belong together, ratios that begin at 1 and go on
 * where the epoch before ended; the last of them is what the policy says afterwards. A step that is
 * not shown writes nothing. */
static void test_ppo_trace(void) {
    struct Rollout rollouts[4];
    struct PPOConfig config = ppo_config();
    config.mini_batch_size = 2;
    struct RolloutTrainer *ppo = ppo_of(config, 0.01, rollouts);
    ppo->tok = tokenizer;
    ppo->ppo.trace.is_wanted = true;
    ppo->total_steps = 100;
    FILE *file = fopen(temporary("trace.jsonl"), "w+b");
    ppo_step(ppo, rollouts);
    trace_write(file, ppo);
    float after[24];
    memcpy(after, ppo_evaluate_rollouts(ppo, rollouts).logprobs, sizeof after);
    ppo_step(ppo, rollouts);
    trace_write(file, ppo);
    rewind(file);
    char *line = NULL;
    size_t room = 0;
    size_t lines = 0;
    double before[24];
    for (; getline(&line, &room, file) > 0; lines++) {
        const char *error;
        struct Json *entry = parse(line, &error);
        if (lines == 0) {
            double lam = json_get(json_get(entry, "hparams"), "gae_lambda")->number;
            expect_close("lambda", lam, 0.95, 0);
            continue;
        }
        bool first = json_type(entry, "is_first_step_after_rollout_phase") == JSON_TRUE;
        expect_true("the first has ratio 1", first == (lines == 1));
        expect_count("epoch", (size_t)json_get(entry, "step")->number, lines - 1);
        size_t all = 0;
        for (struct Json *p = json_get(entry, "prompts")->child; p; p = p->next) {
            struct Json *response = json_get(p, "responses")->child;
            struct Json *tokens = json_get(response, "tokens");
            expect_trace_answer(entry, response, 0.2);
            for (size_t t = 0; t < json_count(json_get(tokens, "ids")); t++, all++) {
                const char *was = lines == 1 ? "old_log_probs" : "log_probs";
                double want = lines == 1 ? trace_number(tokens, was, t) : before[all];
                expect_close("where it was", trace_number(tokens, "log_probs", t), want, 1e-7);
                before[all] = trace_number(tokens, "new_log_probs", t);
            }
        }
        expect_count("tokens", all, 24);
    }
    expect_count("a header and four epochs of the first step", lines, 5);
    for (size_t i = 0; i < 24; i++)
        expect_close("what the policy says afterwards", before[i], after[i], 1e-5);
    free(line);
    fclose(file);
    rollout_trainer_free(ppo);
}

/* Four rollouts of 3, 5, 7 and 9 tokens, two to each prompt; a policy and a slightly different
 * reference. */
static struct RolloutTrainer *grpo_of(struct GRPOConfig config, struct TrainingArguments args,
                                      struct Rollout *rollouts) {
    static const float scores[] = {1, -0.5f, 2, 0.25f};
    struct GPT2 *model = random_model(37, 14, 8, 2, 2);
    struct GPT2 *ref_model = owned(gpt2_copy(model));
    for (size_t i = 0; i < ref_model->tensor_count; i++)
        for (size_t k = 0; k < ref_model->tensors[i]->n; k++)
            ref_model->tensors[i]->w[k] *= 0.9f;
    for (size_t i = 0; i < 4; i++) {
        size_t query = 2 + i / 2 * 2;
        size_t response = 3 + 2 * i;
        rollouts[i] = (struct Rollout){random_example(query + response, query, 37), scores[i]};
    }
    struct RolloutTrainer *trainer = grpo_trainer_new(model, ref_model, config, args, 0.7);
    trainer->total_steps = 100;
    return trainer;
}

/* A constant learning rate, and one micro-batch of four answers. */
static struct TrainingArguments grpo_arguments(double learning_rate) {
    struct TrainingArguments args = training_arguments();
    args.learning_rate = learning_rate;
    args.lr_scheduler_type = SCHEDULER_CONSTANT;
    args.per_device_train_batch_size = 4;
    args.gradient_accumulation_steps = 1;
    return args;
}

static double grpo_stat(const struct RolloutTrainer *trainer, const char *name) {
    double value = NAN;
    log_find(&trainer->stats, name, &value);
    return value;
}

struct GRPOModelCase {
    struct RolloutTrainer *trainer;
    struct Rollout *rollouts;
};

static double grpo_model_loss(void *context) {
    struct GRPOModelCase *c = context;
    return grpo_micro_batch(c->trainer, c->rollouts, 1, 3, 2);
}

/* Central differences of a micro-batch's loss by the policy's weights, three of four rollouts, at
 * the second update, when ratios are not 1. */
static void test_grpo_gradient_model(void) {
    static const struct GRPOVariant variants[] = {
        {GRPO_LOSS_DAPO, IMPORTANCE_SAMPLING_TOKEN, 0.5, false},
        {GRPO_LOSS_GRPO, IMPORTANCE_SAMPLING_SEQUENCE, 0.5, true},
    };
    for (size_t v = 0; v < COUNT(variants); v++) {
        struct Rollout rollouts[4];
        struct GRPOConfig config = grpo_config(variants[v]);
        config.num_iterations = 2;
        config.epsilon = config.epsilon_high = 0.4;
        struct RolloutTrainer *trainer = grpo_of(config, grpo_arguments(0), rollouts);
        grpo_step(trainer, rollouts);
        for (size_t t = 0; t < trainer->grpo_batch.R; t++)
            trainer->grpo_batch.logprobs[t] += (float)(0.3 * sin(2.1 * (double)t));
        gpt2_zero_grad(trainer->model);
        struct GRPOModelCase c = {trainer, rollouts};
        grpo_model_loss(&c);
        float *d[32]; /* a copy: every pass adds to the gradients */
        for (size_t i = 0; i < trainer->model->tensor_count; i++) {
            struct Tensor *t = trainer->model->tensors[i];
            d[i] = narrow(widen(t->d, t->n), t->n);
        }
        for (size_t i = 0; i < trainer->model->tensor_count; i++) {
            struct Tensor *t = trainer->model->tensors[i];
            expect_gradient(t->name, (struct Slope){grpo_model_loss, &c, 0.003}, t->w, d[i], t->n,
                            6, 4e-3);
        }
        rollout_trainer_free(trainer);
    }
}

/* By hand: beside a prompt of 7 tokens, one of 3 begins at position 4; but no answer goes beyond
 * the context. */
static void test_grpo_positions(void) {
    struct Rollout rollouts[] = {
        {random_example(5, 3, 37), 0},
        {random_example(9, 7, 37), 0},
    };
    static const int left[] = {4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
    static const int short_of_room[] = {3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 7};
    const struct Example examples[] = {rollouts[0].example, rollouts[1].example};
    struct Batch batch = batch_of(examples, 2, SKIP_LAST);
    grpo_pad_left(&batch, rollouts, 7, 9);
    expect_ids("beside a longer prompt", batch.position, batch.N, left, 12);
    rollouts[0].example.n = 6;
    batch = batch_of(examples, 2, SKIP_LAST);
    grpo_pad_left(&batch, rollouts, 7, 9);
    expect_ids("short of room", batch.position, batch.N, short_of_room, 12);
}

/* With padding_side right, answers are read where they were written; where all prompts have the
 * same length, left says the same. */
static void test_grpo_positions_right(void) {
    for (int unequal = 0; unequal < 2; unequal++) {
        double loss[2];
        for (int side = 0; side < 2; side++) {
            struct Rollout rollouts[4];
            struct GRPOConfig config = grpo_config((struct GRPOVariant){.beta = 1});
            config.padding_side = side ? PADDING_RIGHT : PADDING_LEFT;
            test_rng = rng_seed(7, STREAM_SAMPLE);
            struct RolloutTrainer *trainer = grpo_of(config, grpo_arguments(0), rollouts);
            for (size_t i = 0; i < 4; i++)
                rollouts[i].example.prompt_length = unequal ? 2 + i / 2 * 2 : 2;
            grpo_step(trainer, rollouts);
            loss[side] = grpo_stat(trainer, "entropy");
            rollout_trainer_free(trainer);
        }
        expect_true(unequal ? "unequal prompts" : "equal prompts", (loss[0] != loss[1]) == unequal);
    }
}

/* By hand: groups (1, 1) and (0, 4), the second answer of which has no end; then TRL's own figures
 * of the clip and the KL, from two micro-batches alike. */
static void test_grpo_logs(void) {
    struct GPT2Config policy = {.vocab_size = 9, .eos_token_id = 7};
    struct GPT2 model = {.config = policy};
    struct RolloutTrainer trainer = {.model = &model, .num_generations = 2};
    grpo_log_scores(&trainer, (float[]){1, 1, 0, 4}, 4);
    expect_close("reward", grpo_stat(&trainer, "reward"), 1.5, 0);
    expect_close("reward_std", grpo_stat(&trainer, "reward_std"), sqrt(3), 1e-7);
    expect_close("half teach nothing", grpo_stat(&trainer, "frac_reward_zero_std"), 0.5, 0);
    trainer.grpo.scale_rewards = SCALE_REWARDS_BATCH;
    grpo_log_scores(&trainer, (float[]){1, 1, 0, 4}, 4);
    expect_close("in a batch all teach", grpo_stat(&trainer, "frac_reward_zero_std"), 0, 0);
    grpo_log_scores(&trainer, (float[]){1, NAN, 0, 4}, 4);
    expect_close("without the one that has none", grpo_stat(&trainer, "reward"), 5.0 / 3, 1e-7);

    int ids[] = {1, 5, 5, 5, 5, 7};
    struct Rollout rollouts[] = {
        {{ids, 6, 1}, 0},
        {{ids, 5, 1}, 0},
        {{ids + 3, 3, 1}, 0},
    };
    grpo_log_lengths(&trainer, rollouts, 3);
    static const struct {
        const char *name;
        double want;
    } lengths[] = {
        {"completions/mean_length", 11.0 / 3},
        {"completions/min_length", 2},
        {"completions/max_length", 5},
        {"completions/mean_terminated_length", 3.5},
        {"completions/min_terminated_length", 2},
        {"completions/max_terminated_length", 5},
        {"completions/clipped_ratio", 1.0 / 3},
    };
    for (size_t i = 0; i < COUNT(lengths); i++)
        expect_close(lengths[i].name, grpo_stat(&trainer, lengths[i].name), lengths[i].want, 1e-6);
    grpo_log_lengths(&trainer, rollouts + 1, 1);
    expect_close("none ended", grpo_stat(&trainer, "completions/max_terminated_length"), 0, 0);
    arena_free(&trainer.arena);
}

/* The KL and what was clipped, of golden.py's batch, against TRL; two micro-batches alike. */
static void test_grpo_logs_golden(void) {
    static const char *const names[] = {"kl",
                                        "clip_ratio/low_mean",
                                        "clip_ratio/high_mean",
                                        "clip_ratio/region_mean",
                                        "clip_ratio/low_min",
                                        "clip_ratio/high_max"};
    static const struct {
        enum ImportanceSamplingLevel level;
        bool corrected;
        double want[6];
    } golden[] = {
        {IMPORTANCE_SAMPLING_TOKEN, false, {0.0636227554, 0.1, 0.3, 0.4, 0, 0.5}},
        {IMPORTANCE_SAMPLING_TOKEN, true, {0.0784517916, 0.1, 0.3, 0.4, 0, 0.5}},
        {IMPORTANCE_SAMPLING_SEQUENCE, false, {0.0636227554, 0, 0.25, 0.25, 0, 1}},
        {IMPORTANCE_SAMPLING_SEQUENCE, true, {0.0665042975, 0, 0.25, 0.25, 0, 1}},
    };
    for (size_t i = 0; i < COUNT(golden); i++) {
        struct GRPOVariant variant = {GRPO_LOSS_GRPO, golden[i].level, 0.04, golden[i].corrected};
        struct GRPOCase *c = grpo_case(grpo_config(variant));
        struct RolloutTrainer trainer = {.grpo = c->config};
        grpo_case_loss(c);
        for (int part = 0; part < 2; part++)
            grpo_metrics(&trainer, c->answers, 4, 25, 2);
        for (size_t k = 0; k < COUNT(names); k++)
            expect_close(names[k], grpo_stat(&trainer, names[k]), golden[i].want[k], 1e-8);
        expect_close("25 nats over 10 tokens", grpo_stat(&trainer, "entropy"), 2.5, 1e-12);
    }
}

/* A log entry: means over the steps that have a number, the last step's gradient norm. */
static void test_grpo_logs_window(void) {
    static const double reward[] = {2, NAN, 4};
    struct RolloutTrainer trainer = {.name = "grpo"};
    struct TrainerState state = {.num_tokens = 99};
    struct LogEntry entry = {0};
    for (int step = 0; step < 3; step++) {
        trainer.stats.n = 0;
        log_value(&trainer.stats, "reward", reward[step]);
        log_value(&trainer.stats, "reward_std", NAN);
        log_value(&trainer.stats, "kl", step);
        log_value(&trainer.stats, "grad_norm", 1 + step);
        if (step == 1)
            log_value(&trainer.stats, "completions/mean_length", 7);
        entry.n = 0;
        grpo_log_entry(&trainer, &state, &entry);
    }
    static const struct {
        const char *name;
        double want;
    } means[] = {
        {"reward", 3},      {"kl", 1}, {"grad_norm", 3}, {"completions/mean_length", 7},
        {"num_tokens", 99},
    };
    double value;
    for (size_t i = 0; i < COUNT(means); i++) {
        expect_true(means[i].name, log_find(&entry, means[i].name, &value));
        expect_close(means[i].name, value, means[i].want, 0);
    }
    expect_true("never a number", log_find(&entry, "reward_std", &value) && isnan(value));
}

/* A step that moves nothing: its loss, KL and entropy by way of the models; then two updates on the
 * same answers, which are compared with what the policy said before the first. */
static void test_grpo_step(void) {
    struct Rollout rollouts[4];
    struct GRPOConfig config =
        grpo_config((struct GRPOVariant){.loss_type = GRPO_LOSS_DAPO, .beta = 0.3});
    config.padding_side = PADDING_RIGHT;
    config.num_iterations = 2;
    struct RolloutTrainer *trainer = grpo_of(config, grpo_arguments(0), rollouts);
    size_t n;
    float *before = all_weights(trainer->model, &n);
    grpo_step(trainer, rollouts);
    expect_bits("weights at learning rate 0", all_weights(trainer->model, &n), before, n);

    /* by hand: 24 tokens; (1 + 0.5) / 2 = 0.75 above the mean of a group whose deviation is
     * 1.5 / sqrt(2); the longer answer is the worse one */
    double A[2] = {0.75 / (1.5 / sqrt(2) + 1e-4), 0.875 / (1.75 / sqrt(2) + 1e-4)};
    double loss = -(A[0] * (3 - 5) + A[1] * (7 - 9)) / 24;
    double kl = 0;
    for (size_t i = 0; i < 4; i++) {
        struct Batch batch = batch_of(&rollouts[i].example, 1, SKIP_LAST);
        struct LMHead head = batch_logprobs(trainer->model, &test_arena, &batch, 0.7, false);
        struct LMHead ref_head =
            batch_logprobs(trainer->ref_model, &test_arena, &batch, 0.7, false);
        for (size_t t = 0; t < batch.R; t++) {
            double d = (double)ref_head.logprob[t] - head.logprob[t];
            kl += (exp(d) - 1 - d) / 24;
        }
    }
    expect_close("kl", grpo_stat(trainer, "kl"), kl, 1e-6);
    expect_close("loss", grpo_stat(trainer, "loss"), loss + 0.3 * kl, 1e-6);
    expect_close("nothing clipped", grpo_stat(trainer, "clip_ratio/region_mean"), 0, 0);
    expect_true("a gradient nevertheless", grpo_stat(trainer, "grad_norm") > 0.01);

    float *old = narrow(widen(trainer->grpo_batch.logprobs, 24), 24);
    trainer->args.learning_rate = 0.03;
    grpo_step(trainer, rollouts);
    expect_bits("the same answers", trainer->grpo_batch.logprobs, old, 24);
    expect_true("their scores are logged once", isnan(grpo_stat(trainer, "reward")));
    grpo_step(trainer, rollouts);
    expect_true("new ones", fabsf(trainer->grpo_batch.logprobs[0] - old[0]) > 1e-4f);
    expect_close("compared with themselves", grpo_stat(trainer, "clip_ratio/region_mean"), 0, 0);
    grpo_step(trainer, rollouts);
    expect_true("and with those before", grpo_stat(trainer, "clip_ratio/region_mean") > 0);
    rollout_trainer_free(trainer);
}

/* Two micro-batches of unequal length: with dapo the same step as one batch, with bnpo another. */
static void test_grpo_step_accumulate(void) {
    static const struct {
        enum GRPOLossType loss_type;
        bool same;
    } cases[] = {{GRPO_LOSS_DAPO, true}, {GRPO_LOSS_BNPO, false}, {GRPO_LOSS_DR_GRPO, true}};
    for (size_t c = 0; c < COUNT(cases); c++) {
        double loss[2], grad_norm[2], weight[2];
        for (size_t parts = 1; parts <= 2; parts++) {
            struct Rollout rollouts[4];
            struct TrainingArguments args = grpo_arguments(0.05);
            args.optim = OPTIM_SGD;
            args.per_device_train_batch_size = 4 / parts;
            args.gradient_accumulation_steps = parts;
            test_rng = rng_seed(9, STREAM_SAMPLE);
            struct RolloutTrainer *trainer =
                grpo_of(grpo_config(
                            (struct GRPOVariant){.loss_type = cases[c].loss_type, .beta = 0.1}),
                        args, rollouts);
            grpo_step(trainer, rollouts);
            loss[parts - 1] = grpo_stat(trainer, "loss");
            grad_norm[parts - 1] = grpo_stat(trainer, "grad_norm");
            weight[parts - 1] = trainer->model->ln_f.bias.w[2];
            rollout_trainer_free(trainer);
        }
        bool is_same = fabs(loss[1] - loss[0]) < 1e-6 && fabs(weight[1] - weight[0]) < 1e-6
                       && fabs(grad_norm[1] / grad_norm[0] - 1) < 1e-5;
        expect_true(formatted("case %zu", c), is_same == cases[c].same);
    }
}

/* Two updates on the same answers, in two micro-batches each, on one, two and three threads: the
 * same weights, bit for bit. */
static void test_grpo_threads(void) {
    struct RolloutTrainer *trainer[4] = {NULL};
    struct GRPOConfig config = grpo_config((struct GRPOVariant){.beta = 0.1});
    config.num_iterations = 2;
    struct TrainingArguments args = grpo_arguments(0.01);
    args.gradient_accumulation_steps = 2;
    struct Rollout rollouts[8];
    for (size_t i = 0; i < 8; i++)
        rollouts[i] = (struct Rollout){random_example(60, 20, 600), (float)(i % 3)};
    for (int threads = 1; threads <= 3; threads++) {
        struct GPT2 *model = new_model(600, 60, 64, 1, 4);
        use_threads(threads);
        trainer[threads] = grpo_trainer_new(model, owned(gpt2_copy(model)), config, args, 1);
        trainer[threads]->total_steps = 9;
        grpo_step(trainer[threads], rollouts);
        grpo_step(trainer[threads], rollouts);
        expect_same_weights("weights", trainer[threads]->model, trainer[1]->model);
    }
    use_threads(1);
    for (int threads = 1; threads <= 3; threads++)
        rollout_trainer_free(trainer[threads]);
}

/* A reward that the test makes up, the share of one token in the answer: GRPO raises it. */
static void test_grpo_raises_reward(void) {
    enum { STEPS = 30 };
    struct GPT2 *model = new_model(40, 16, 32, 1, 2);
    struct GRPOConfig config = grpo_config((struct GRPOVariant){.loss_type = GRPO_LOSS_DAPO});
    config.num_generations = 4;
    config.epsilon = config.epsilon_high = 0.2;
    config.max_completion_length = 6;
    struct TrainingArguments args = grpo_arguments(1e-2);
    args.per_device_train_batch_size = SHARE_B;
    struct RolloutTrainer *trainer = grpo_trainer_new(model, NULL, config, args, 1);
    trainer->total_steps = STEPS;
    double first = 0;
    double last = 0;
    for (size_t step = 0; step < STEPS; step++) {
        struct Rollout rollouts[SHARE_B];
        *(step == 0 ? &first : &last) = share_rollouts(model, step, 4, rollouts);
        grpo_step(trainer, rollouts);
    }
    expect_close("share of the token at first", first, 1.0 / 40, 0.05);
    expect_close("and at last", last, 1, 0.4);
    rollout_trainer_free(trainer);
}

/* =============================================================================================
 * Chapter 18 - DPO, collected preferences
 *
 * DPO's loss through a model, and pairs from files as TRL prepares them. What an answer is, and
 * when two are the same.
 * ============================================================================================= */

/* Central differences through the model, all losses mixed; pairs of different lengths, with a
 * temperature. */
static void test_dpo_model_gradient(void) {
    struct GPT2 *model = random_model(37, 12, 8, 2, 2);
    struct GPT2 *ref_model = owned(gpt2_copy(model));
    for (size_t i = 0; i < ref_model->wte.n; i++)
        ref_model->wte.w[i] *= 0.9f;
    struct Example pairs[8];
    for (size_t i = 0; i < 8; i++)
        pairs[i] = random_example(4 + i, 2 + i / 4, 37);
    struct DPOConfig config = {
        .beta = 0.2,
        .label_smoothing = 0.1,
        .weight = {1, 0.05, 0.5, 0.7, 0.3},
    };
    struct Trainer trainer = trainer_of(model, 0, 1, 4);
    dpo_task(&trainer, &test_arena, ref_model, config, 0.8, pairs, 4);
    expect_task_gradient(&trainer, 0.005);
    trainer_free(&trainer);
}

/* Pairs from a file as TRL prepares them: a split for both sides, cut to max_length, a prompt
 * too long dropped with a note. */
static void test_dpo_pairs(void) {
    struct GPT2 *model = new_model(1024, 32, 8, 1, 2);
    struct Trainer trainer = trainer_of(model, 0, 1, 4);
    trainer.args.max_length = 6;
    struct Dataset *data = dataset_of("{'prompt': 'a b', 'chosen': ' c', 'rejected': ' d e f g h "
                                      "i'}\n{'chosen': 'a b c', 'rejected': 'a b d'}\n{'prompt': "
                                      "'a b c d e f g', 'chosen': ' x', 'rejected': ' y'}\n"
                                      "{'prompt': 'a the', 'chosen': 're', 'rejected': ' x'}\n",
                                      DPO_SHAPES, 1);
    struct Example pairs[8];
    capture_begin();
    struct DPOConfig config = {.beta = 0.1, .weight = {[DPO_SIGMOID] = 1}};
    size_t n = dpo_pairs(&trainer, &test_arena, data, &config, pairs);
    struct Text said = capture_end();
    expect_holds("a note", said, "1 of 4 pairs dropped");
    expect_count("pairs", n, 3);
    expect_true("prompt a b", pairs[0].prompt_length == 2 && pairs[0].n == 4
                                  && pairs[0].ids[3] == 1023 && pairs[1].n == 6
                                  && pairs[1].prompt_length == 2);
    expect_true("implied prompt a b",
                pairs[2].prompt_length == 2 && pairs[2].n == 4 && pairs[3].n == 4);
    expect_true("the shorter common prefix for both",
                pairs[4].prompt_length == 1 && pairs[5].prompt_length == 1);
    expect_holds("a note on the cut", said,
                 "1 of 4 pairs were cut to their first 6 tokens (--max_length)");
}

/* Pairs whose sides are the same, from the start or since the cut, teach nothing: left out and
 * counted. The sft loss learns from them: with it they stay. */
static void test_dpo_equal_pairs(void) {
    struct GPT2 *model = new_model(1024, 32, 8, 1, 2);
    struct Trainer trainer = trainer_of(model, 0, 1, 4);
    struct DPOConfig config = {.beta = 0.1, .weight = {[DPO_SIGMOID] = 1}};
    trainer.args.max_length = 4;
    struct Dataset *data =
        dataset_of("{'prompt': 'a', 'chosen': ' b', 'rejected': ' b'}\n"
                   "{'prompt': 'a', 'chosen': ' b c d e', 'rejected': ' b c d f'}\n"
                   "{'prompt': 'a', 'chosen': ' b c d e', 'rejected': ' b c d e'}\n"
                   "{'prompt': 'a', 'chosen': ' b', 'rejected': ' b c'}\n",
                   DPO_SHAPES, 1);
    struct Example pairs[8];
    capture_begin();
    size_t n = dpo_pairs(&trainer, &test_arena, data, &config, pairs);
    struct Text said = capture_end();
    expect_count("what is left", n, 1);
    expect_count("the last pair", pairs[1].n, 4);
    expect_holds("cut", said, "2 of 4 pairs were cut to their first 4 tokens (--max_length)");
    expect_holds("equal", said, "2 of 4 pairs are left out: chosen and rejected are the same\n");
    expect_holds("since the cut", said,
                 "1 of 4 pairs are left out: chosen and rejected are the same up to the cut at 4 "
                 "tokens (--max_length)\n");
    config.weight[DPO_SFT] = 0.2;
    capture_begin();
    expect_count("with the sft loss", dpo_pairs(&trainer, &test_arena, data, &config, pairs), 4);
    capture_end();
}

/* Training moves the margins of eight pairs apart; the loss starts at ln 2; the reference's
 * cache is filled once. */
static void test_dpo_overfit(void) {
    struct GPT2 *model = new_model(64, 16, 32, 1, 2);
    struct GPT2 *ref_model = owned(gpt2_copy(model));
    struct Example *pairs = random_examples(16, 10, 3, 64);
    for (size_t i = 0; i < 16; i += 2)
        memcpy(pairs[i + 1].ids, pairs[i].ids, 3 * sizeof(int));
    struct DPOConfig config = {.beta = 0.1, .weight = {[DPO_SIGMOID] = 1}};
    struct Trainer trainer = trainer_of(model, 5e-3, 20, 4);
    struct DPOTask *task = dpo_task(&trainer, &test_arena, ref_model, config, 1, pairs, 8);
    trainer_train(&trainer);
    expect_close("loss at first", logged(&trainer, 0, "loss"), log(2), 1e-6);
    expect_close("margin at first", logged(&trainer, 0, "rewards/margins"), 0, 1e-6);
    expect_true("margin at last above 1", logged(&trainer, 19, "rewards/margins") > 1);
    expect_close("every pair ordered", logged(&trainer, 19, "rewards/accuracies"), 1, 0);
    for (size_t i = 0; i < 16; i++)
        expect_close("the reference's log-probability: 7 tokens of 64", task->ref_logps[0][i],
                     -7 * log(64), 1);
    trainer_free(&trainer);
}

/* Wherever a text gets an end token it is the one of the model's configuration, here "." (13). */
static void test_data_end_token(void) {
    struct GPT2 *model = new_model(1024, 32, 8, 1, 2);
    struct Trainer trainer = trainer_of(model, 0, 1, 4);
    model->config.eos_token_id = 13;
    trainer.args.max_length = 32;
    const char *more = "{'prompt': 'a', 'completion': ' b'}\n{'prompt': 'a.', 'completion': ''}\n"
                       "{'prompt': 'a', 'completion': ' b.'}\n";
    struct Dataset *data = dataset_of(more, SFT_SHAPES, COUNT(SFT_SHAPES));
    struct Example *e = sft_task(&trainer, &test_arena, data, NULL)->examples[TO_LEARN];
    expect_ids("sft, prompt and completion", e->ids, e->n, (int[]){64, 275, 13}, 3);
    expect_ids("a prompt that ends in it", e[1].ids, e[1].n, (int[]){64, 13, 13}, 3);
    expect_ids("a completion that ends in it", e[2].ids, e[2].n, (int[]){64, 275, 13}, 3);
    data = dataset_of("{'text': 'a b'}\n", SFT_SHAPES, COUNT(SFT_SHAPES));
    e = sft_task(&trainer, &test_arena, data, NULL)->examples[TO_LEARN];
    expect_ids("sft, text", e->ids, e->n, (int[]){64, 275, 13}, 3);
    const char *pair = "{'prompt': 'a', 'chosen': ' b', 'rejected': ' c'}\n";
    data = dataset_of(pair, REWARD_SHAPES, COUNT(REWARD_SHAPES));
    struct DPOConfig config = {.beta = 0.1, .weight = {[DPO_SIGMOID] = 1}};
    struct Example pairs[2];
    dpo_pairs(&trainer, &test_arena, data, &config, pairs);
    expect_ids("dpo, chosen", pairs[0].ids, pairs[0].n, (int[]){64, 275, 13}, 3);
    expect_ids("dpo, rejected", pairs[1].ids, pairs[1].n, (int[]){64, 269, 13}, 3);
    struct RewardTask *task = reward_task(&trainer, &test_arena, data, NULL);
    expect_ids("reward", task->texts[0][1].ids, task->texts[0][1].n, (int[]){64, 269, 13}, 3);
}

/* An answer ends in its policy's end token, here "." (13). What is scored, counted and shown is the
 * text before it, a "." of the prompt included. The reward model's own end token does not matter.
 */
static void test_answer_end(void) {
    static const struct {
        int ids[3];
        size_t n, length;
        const char *answer, *text;
    } cases[] = {
        {{64, 275, 13}, 3, 1, " b", "a b"},
        {{64, 275, 399}, 3, 2, " b N", "a b N"},
        {{13, 13, 0}, 2, 0, "", "."},
    };
    struct GPT2 *reward_model = random_model(400, 16, 8, 1, 2);
    tensor_normal(reward_head_declare(reward_model), &test_rng, 1);
    struct Scorer scorer = {.reward_model = reward_model, .tok = tokenizer, .std = 1};
    scorer.short_score = -1e6;
    struct GPT2Config policy = {.vocab_size = 1024, .eos_token_id = 13};
    for (size_t i = 0; i < COUNT(cases); i++) {
        int ids[3];
        struct Example e = {memcpy(ids, cases[i].ids, sizeof ids), cases[i].n, 1};
        struct Text text = text_of(cases[i].text);
        struct Example read = example_encode(&test_arena, tokenizer, text, 400, NULL);
        float score, want;
        reward_score(reward_model, &read, 1, &want);
        scorer.least_length = 0;
        scorer_score(&scorer, &test_arena, &e, 1, &policy, NULL, &score);
        expect_close(cases[i].text, score, want, 0);
        scorer.least_length = 3;
        scorer_score(&scorer, &test_arena, &e, 1, &policy, NULL, &score);
        expect_close("ended too soon", score, ids[e.n - 1] == 13 ? -1e6 : want, 0);
        expect_count("tokens", answer_length(&e, &policy), cases[i].length);
        expect_text("answer", answer_text(tokenizer, &test_arena, &e, &policy), cases[i].answer);
    }
}

/* By hand: two judges, each of whom may have no score. */
static void test_weighted_score(void) {
    const double weight[] = {2, 0.5};
    expect_close("both", weighted_score(weight, 3, -4), 4, 0);
    expect_close("without the second", weighted_score(weight, 3, NAN), 6, 0);
    expect_close("without the first", weighted_score(weight, NAN, -4), -2, 0);
    expect_close("neither", weighted_score(weight, NAN, NAN), NAN, 0);
}

/* By hand, in groups of two: 1, none | none, none | 3, 5. */
static void test_score_missing(void) {
    float score[] = {1, NAN, NAN, NAN, 3, 5};
    float alone[] = {2, NAN, 6};
    float none[] = {NAN, NAN};
    expect_close("mean", score_moments((float[]){1, NAN, 4}, 3).mean, 2.5, 0);
    expect_close("mean of none", score_moments(none, 2).mean, NAN, 0);
    score_missing(score, 6, 2);
    expect_floats("groups of two", score, (double[]){1, 1, 3, 3, 3, 5}, 6, 0);
    score_missing(alone, 3, 1);
    expect_floats("alone", alone, (double[]){2, 4, 6}, 3, 0);
    capture_begin();
    score_missing(none, 2, 1);
    struct Text said = capture_end();
    expect_floats("none at all", none, (double[]){0, 0}, 2, 0);
    expect_holds("and it is said", said, "none of the 2 answers of this batch has a score");
}

#ifndef _WIN32
/* What a program, here a line of the shell, makes of `n` answers. */
static void judge(const char *script, size_t n, float *number) {
    struct Judged *answers = arena_zeros(&test_arena, n, sizeof *answers);
    for (size_t i = 0; i < n; i++) {
        answers[i].prompt = text_of(i ? "2 + 3 =" : "\"q\"");
        answers[i].completion = text_of(i ? " 5" : "\xc3\xa9\n");
        answers[i].others = text_of(i ? ", \"answer\": 5.0" : "");
    }
    const char *words[] = {"sh", "-c", script};
    struct RewardProgram *program = program_new(&test_arena, "sh -c x", 20);
    program->command = "judge";
    for (size_t i = 1; i < 3; i++)
        program->words[i] = (char *)words[i];
    if (strstr(script, "sleep"))
        program->timeout = 0.2;
    program_judge(program, answers, n, number);
}

static size_t open_descriptors(void) {
    size_t count = 0;
    for (int fd = 0; fd < 256; fd++)
        count += fcntl(fd, F_GETFD) != -1;
    return count;
}

/* A program reads the answers, and its numbers come back, whatever the order in which it reads and
 * writes; it leaves no process and no descriptor behind. */
static void test_program_judge(void) {
    enum { MANY = 3000 };
    float number[MANY];
    size_t before = open_descriptors();
    const char *asked = temporary("asked.jsonl");
    judge(arena_printf(&test_arena, "cat > '%s'; echo 0.5; echo null; echo -1e-3", asked), 3,
          number);
    expect_text("what it reads", read_file(&test_arena, asked),
                "{\"prompt\": \"\\\"q\\\"\", \"completion\": \"\xc3\xa9\\n\"}\n"
                "{\"prompt\": \"2 + 3 =\", \"completion\": \" 5\", \"answer\": 5.0}\n"
                "{\"prompt\": \"2 + 3 =\", \"completion\": \" 5\", \"answer\": 5.0}\n");
    expect_close("a number", number[0], 0.5, 0);
    expect_true("null", isnan(number[1]));
    expect_close("the third", number[2], -1e-3f, 0);

    /* more than a pipe holds, both ways; or nothing read at all */
    judge("i=0; while read -r line; do i=$((i+1)); echo $i; done", MANY, number);
    expect_close("the last of many", number[MANY - 1], MANY, 0);
    judge("yes 7 | head -n 3000; cat > /dev/null", MANY, number);
    expect_close("written before it is read", number[MANY - 1], 7, 0);
    judge("yes 8 | head -n 3000", MANY, number);
    expect_close("never read", number[MANY - 1], 8, 0);
    judge("printf '1\\r\\n 2 '", 2, number);
    expect_floats("no line break at the end", number, (double[]){1, 2}, 2, 0);
    judge("sleep 1000 & echo 4", 1, number);
    expect_close("a process is left in the background", number[0], 4, 0);
    expect_count("descriptors", open_descriptors(), before);
    expect_true("no child is left", waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
}

static void judge_two(const void *script) {
    float number[2];
    judge(script, 2, number);
}

/* What a program may do wrong, and what is said of it. */
static void test_program_judge_errors(void) {
    static const char *const cases[][2] = {
        {"echo 1", "judge: wrote 1 lines for 2 answers"},
        {"echo 1; echo 2; echo 3", "judge: wrote more than 2 lines for 2 answers, and was ended"},
        {"yes", "wrote more than 2 lines"},
        {"echo 1; echo good", "line 2 (of 2 answers) is no JSON: \"good\"; a number or null was"},
        {"echo 1; echo '[2]'", "line 2 (of 2 answers) is other JSON: \"[2]\""},
        {"echo '\"3\"'; echo 1", "line 1 (of 2 answers) is other JSON: \"\"3\"\""},
        {"echo 1,5; echo 1", "line 1 (of 2 answers) is no JSON: \"1,5\""},
        {"echo nan; echo 1", "line 1 (of 2 answers) is no JSON: \"nan\""},
        {"echo Infinity; echo 1", "is no JSON: \"Infinity\""},
        {"echo 1e99; echo 1", "is a number beyond 3.4e38: \"1e99\""},
        {"echo; echo 1", "line 1 (of 2 answers) is an empty line: \"\""},
        {"echo 1; head -c 61 /dev/zero | tr '\\0' x", ": "
                                                      "\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"},
        {"cat /dev/zero", "line 1 has no end within 65536 bytes"},
        {"echo 1; echo 2; exit 3", "ended with exit status 3, 0 was expected"},
        {"kill -9 $$", "was ended by signal 9"},
        {"sleep 1000", "was still running after 0.2 seconds, and was ended; give it more (--rew"},
        {"exec >&-; sleep 1000", "was still running after 0.2 seconds"},
        {"while :; do echo x >&2; : sleep; done 2>/dev/null", "was still running after 0.2"},
    };
    for (size_t i = 0; FORKS && i < COUNT(cases); i++)
        expect_end(cases[i][0], judge_two, cases[i][0], 1, cases[i][1]);
}

static void find_program(const void *command) {
    program_new(&test_arena, command, 1);
}

/* Which program is it? With a slash a path, else a name in PATH; a file whose path is the whole
 * command needs no quotes. */
static void test_program_find(void) {
    char *path = arena_printf(&test_arena, "%s/a \"jury's\" \xc3\xa4pfel.sh", folder);
    FILE *file = fopen(path, "w");
    fputs("#!/bin/sh\n", file);
    fclose(file);
    if (FORKS) {
        expect_end("not to be run", find_program, shell_word(&test_arena, path), 1,
                   "pfel.sh is no program that may be run; chmod +x it");
        expect_end("no file", find_program, "./nowhere 1", 1,
                   "--reward_command: ./nowhere: No such file");
        expect_end("no name", find_program, "no-such-judge 1", 1,
                   "there is no program \"no-such-judge\" in PATH");
        expect_end("a folder", find_program, "/tmp", 1, "/tmp is no program that may be run");
        expect_end("a quote", find_program, "sh 'x", 1, "a quote ' is not closed");
        expect_end("blanks", find_program, "  ", 1, "found only blanks");
    }
    chmod(path, 0755);
    struct RewardProgram *program = program_new(&test_arena, path, 1);
    expect_text("the whole command", text_of(program->words[0]), path);
    expect_true("no second word", !program->words[1]);
    program = program_new(&test_arena, "sh -c 'echo 1'", 1);
    expect_true("in PATH", program->words[0][0] == '/' && strstr(program->words[0], "/sh"));
    expect_text("its last word", text_of(program->words[2]), "echo 1");
}
#endif

/* By hand: words, quotes, backslashes. */
static void test_command_words(void) {
    static const char *const cases[][6] = {
        {"py 'a b' c\\ d \"\"", "py", "a b", "c d", ""},
        {" a\t b\n", "a", "b"},
        {"a'b c'\"d e\"f", "ab cd ef"},
        {"'\\' \"\\\"\" \\' x\\", "\\", "\"", "'", "x\\"},
        {"$HOME *;|& >x", "$HOME", "*;|&", ">x"},
        {"\xc3\xa4 '\xf0\x9f\x98\x80'", "\xc3\xa4", "\xf0\x9f\x98\x80"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char **words = command_words(&test_arena, cases[i][0]);
        size_t n = 0;
        for (; words[n] && n < 5 && cases[i][n + 1]; n++)
            expect_text(cases[i][0], text_of(words[n]), cases[i][n + 1]);
        expect_true("as many words", !words[n] && (n == 5 || !cases[i][n + 1]));
    }
}

/* A line that a program wrote: a number as JSON has it, or null. */
static void test_reward_line(void) {
    float number;
    expect_true("a number", !reward_line(&test_arena, text_of(" -1.5e2\r"), &number));
    expect_close("its value", number, -150, 0);
    expect_true("null", !reward_line(&test_arena, text_of("null"), &number) && isnan(number));
    static const char *const wrong[][2] = {
        {"", "an empty line"},
        {" \t", "an empty line"},
        {"1 2", "no JSON"},
        {"+1", "no JSON"},
        {"0x10", "no JSON"},
        {"true", "other JSON"},
        {"-4e38", "a number beyond 3.4e38"},
        {"1e999", "no JSON"},
    };
    for (size_t i = 0; i < COUNT(wrong); i++) {
        const char *fault = reward_line(&test_arena, text_of(wrong[i][0]), &number);
        expect_text(wrong[i][0], text_of(fault ? fault : "nothing"), wrong[i][1]);
    }
}

/* Two answers that read the same are no pair, though one has an end token and another score. */
static void test_collect_identical(void) {
    int prompt[] = {5};
    int same[] = {5, 40, 41};
    int ended[] = {5, 40, 41, 269};
    int broken[] = {5, 40, 188};
    int broken_too[] = {5, 40, 189};
    int other[] = {5, 40, 42};
    struct Example a = {same, 3, 1};
    struct Example b = {ended, 4, 1};
    struct Example c = {broken, 3, 1};
    struct Example d = {broken_too, 3, 1};
    struct Example e = {other, 3, 1};
    const struct GPT2Config config = {.vocab_size = 270, .eos_token_id = 269};
    expect_true("but for the end token", same_answer(tokenizer, &test_arena, &a, &b, &config));
    expect_true("as they are written: U+FFFD each",
                same_answer(tokenizer, &test_arena, &c, &d, &config));
    expect_true("another token", !same_answer(tokenizer, &test_arena, &a, &e, &config));
    struct GPT2 *policy = random_model(270, 32, 8, 1, 2);
    struct GPT2 *judge = random_model(270, 32, 8, 1, 2);
    reward_head_declare(judge);
    for (size_t i = 0; i < 8; i++)
        judge->score.w[i] = (float)i;
    struct Scorer scorer = {.reward_model = judge, .tok = tokenizer, .std = 1, .short_score = -9};
    struct GenerationConfig greedy = generation_config();
    struct Example prompts[20], pairs[40];
    for (size_t i = 0; i < 20; i++)
        prompts[i] = (struct Example){prompt, 1, 1};
    struct Rng rng = rng_seed(1, 1);
    struct PreferenceSource source = {
        .policy = policy,
        .generation = &greedy,
        .num_generations = 3,
        .scorer = &scorer,
    };
    expect_count("pairs of equal answers",
                 collect_preferences(&source, &test_arena, prompts, 20, &rng, pairs), 0);
}

/* =============================================================================================
 * Chapter 19 - Exact
 *
 * A world small enough to enumerate: its figures by hand, and three methods that come near the
 * optimum.
 * ============================================================================================= */

/* By hand: two answers, and a policy that prefers the better one. */
static void test_exact_figures(void) {
    double half[] = {log(0.5), log(0.5)};
    double policy[] = {log(0.25), log(0.75)};
    double optimum[2];
    struct ExactWorld w = {
        .n = 2,
        .r = (double[]){0, 2},
        .beta = 0.5,
        .logps = {half, optimum},
    };
    exact_optimum(half, w.r, 2, 0.5, optimum);
    struct ExactFigures f = exact_figures(&w, policy);
    expect_close("E[r]", f.reward, 1.5, 1e-12);
    expect_close("KL", f.kl, 0.1308, 1e-4);
    expect_close("J", f.objective, 1.4346, 1e-4);
}

/* By hand, and against all 27 triples of answers. Its KL stays below the bound. */
static void test_exact_best_of_n(void) {
    double ref[] = {log(0.25), log(0.75), 0};
    double logps[3];
    struct ExactWorld w = {.n = 2, .r = (double[]){1, 0}, .beta = 1, .logps = {ref, ref}};
    exact_best_of_n(&w, 2, logps);
    expect_close("the better of two", exp(logps[0]), 7 / 16.0, 1e-12);
    expect_close("the worse", exp(logps[1]), 9 / 16.0, 1e-12);
    expect_close("its KL", exact_figures(&w, logps).kl, 0.0830, 1e-4);
    expect_close("at most", best_of_n_kl(2), 0.1931, 1e-4);
    expect_close("one answer", best_of_n_kl(1), 0, 0);

    double p[] = {0.2, 0.3, 0.5};
    double want[3] = {0};
    w.n = 3;
    w.r = (double[]){0.4, -1, 2};
    for (int i = 0; i < 3; i++)
        ref[i] = log(p[i]);
    for (int t = 0; t < 27; t++) {
        int y[] = {t / 9, t / 3 % 3, t % 3};
        int best = w.r[y[1]] > w.r[y[0]] ? y[1] : y[0];
        best = w.r[y[2]] > w.r[best] ? y[2] : best;
        want[best] += p[y[0]] * p[y[1]] * p[y[2]];
    }
    exact_best_of_n(&w, 3, logps);
    for (int i = 0; i < 3; i++)
        expect_close("best of three", exp(logps[i]), want[i], 1e-12);
    expect_true("below the bound", exact_figures(&w, logps).kl < best_of_n_kl(3));
}

/* By hand: answers of two tokens out of two, one of which is rewarded; then answers of one token,
 * where GRPO's limit is the optimum itself. */
static void test_exact_grpo_limit(void) {
    double ref[] = {log(0.25), log(0.25), log(0.25), log(0.25)};
    double r[] = {0, 2, 0, 0};
    double optimum[4];
    double limit[4];
    struct ExactWorld w = {.V = 2, .T = 2, .n = 4, .r = r, .beta = 1, .logps = {ref, optimum}};
    struct Arena arena = {0};
    exact_grpo_limit(&w, &arena, limit);
    expect_close("first token", exp(limit[0]) + exp(limit[1]), 0.8534, 1e-4);
    expect_close("second after 0", exp(limit[1]) / (exp(limit[0]) + exp(limit[1])), 0.8808, 1e-4);
    expect_close("second after 1", exp(limit[2]) / (exp(limit[2]) + exp(limit[3])), 0.5, 1e-12);
    exact_optimum(ref, r, 4, 1, optimum);
    expect_close("the optimum's first token", exp(optimum[0]) + exp(optimum[1]), 0.8075, 1e-4);

    double skewed[] = {log(0.1), log(0.2), log(0.3), log(0.4)};
    w = (struct ExactWorld){.V = 4, .T = 1, .n = 4, .r = r, .beta = 0.7, .logps = {skewed}};
    exact_grpo_limit(&w, &arena, limit);
    exact_optimum(skewed, r, 4, 0.7, optimum);
    for (int i = 0; i < 4; i++)
        expect_close("one token: the optimum", limit[i], optimum[i], 1e-12);
    arena_free(&arena);
}

/* By hand; two prompts of four answers each. */
static void test_best_of_n(void) {
    float reward[] = {1, 3, 2, 0, 5, 5, -1, 4};
    expect_close("of 1", best_of_n(reward, 4, 1), 1.5, 0);
    expect_close("of 2", best_of_n(reward, 4, 2), 2.5, 0);
    expect_close("of 4", best_of_n(reward, 4, 4), 3, 0);
    expect_close("two prompts", best_of_n(reward, 8, 4), 4, 0);
    expect_close("one has none", best_of_n((float[]){NAN, 3, 1, NAN, NAN, NAN}, 6, 2), 2, 0);
}

/* By hand, and against all choices of n of seven rewards. */
static void test_best_of_n_expected(void) {
    float reward[] = {-3, -1, -1, 0, 2, 2.5f, 7};
    expect_close("2 of 3", best_of_n_expected((float[]){0, 1, 4}, 3, 2), 3, 1e-12);
    expect_close("1 of 1", best_of_n_expected(reward, 1, 1), -3, 0);
    for (size_t n = 1; n <= 7; n++) {
        double sum = 0;
        double choices = 0;
        for (unsigned set = 0; set < 1 << 7; set++) {
            float best = -FLT_MAX;
            size_t size = 0;
            for (size_t i = 0; i < 7; i++) {
                best = set >> i & 1 ? MAX(best, reward[i]) : best;
                size += set >> i & 1;
            }
            sum += size == n ? best : 0;
            choices += size == n;
        }
        expect_close("all choices", best_of_n_expected(reward, 7, n), sum / choices, 1e-12);
    }
}

/* By hand. */
static void test_exact_dpo_loss(void) {
    double ref[] = {log(0.5), log(0.5)};
    double r[] = {0, log(3)};
    double d[2];
    expect_close("pi = pi_ref: ln 2", exact_dpo_loss(ref, ref, r, 2, 0.8, d), log(2), 1e-12);
    expect_close("slope of the better one: -beta / 8", d[1], -0.1, 1e-12);
    expect_close("and of the other", d[0], 0.1, 1e-12);
}

/* No slope at pi*, and elsewhere the slopes of central differences. */
static void test_exact_dpo_loss_slopes(void) {
    double d[4], optimum[4], uneven[4];
    double r4[] = {1, -0.5, 0.2, 2};
    for (int i = 0; i < 4; i++)
        uneven[i] = log((i + 1) / 10.0);
    exact_optimum(uneven, r4, 4, 0.5, optimum);
    double least = exact_dpo_loss(optimum, uneven, r4, 4, 0.5, d);
    for (int i = 0; i < 4; i++)
        expect_close("no slope at pi*", d[i], 0, 1e-12);
    expect_true("the least loss", least < exact_dpo_loss(uneven, uneven, r4, 4, 0.5, d));
    for (int i = 0; i < 4; i++) {
        double up[4], down[4], unused[4];
        memcpy(up, uneven, sizeof up);
        memcpy(down, uneven, sizeof down);
        up[i] += 1e-4;
        down[i] -= 1e-4;
        expect_close("slope", d[i],
                     (exact_dpo_loss(up, uneven, r4, 4, 0.5, unused)
                      - exact_dpo_loss(down, uneven, r4, 4, 0.5, unused))
                         / 2e-4,
                     1e-7);
    }
}

/* The same through the whole model: DPO's expected loss by the weights of a policy that has left
 * the reference. */
static double exact_model_loss(void *context) {
    struct ExactWorld *w = context;
    double logps[32], dlogps[32];
    struct Batch batch;
    exact_logps(w, w->ref_model, &test_arena, &batch, false, logps);
    return exact_dpo_loss(logps, w->logps[EXACT_REFERENCE], w->r, w->n, w->beta, dlogps);
}

static void test_exact_dpo_gradient(void) {
    struct ExactWorld *w = exact_world(&test_arena,
                                       (struct GPT2Config){
                                           .vocab_size = 3,
                                           .n_embd = 8,
                                           .n_layer = 1,
                                           .n_head = 2,
                                           .layer_norm_epsilon = 1e-5f,
                                       },
                                       3, 5);
    owned(w->ref_model);
    double logps[27];
    double sum = 0;
    expect_count("3^3 responses", w->n, 27);
    for (size_t i = 0; i < w->n; i++)
        sum += exp(w->logps[EXACT_REFERENCE][i]);
    expect_close("their probabilities", sum, 1, 1e-6);
    expect_ids("response 14 is 1 1 2", w->y[14].ids, 4, (int[]){0, 1, 1, 2}, 4);
    fill_random(w->ref_model); /* another policy; logps[EXACT_REFERENCE] stays */
    w->beta = 0.7;
    gpt2_make_trainable(w->ref_model);
    exact_dpo_backward(w, w->ref_model, &test_arena, logps);
    for (size_t i = 0; i < w->ref_model->tensor_count; i++) {
        struct Tensor *t = w->ref_model->tensors[i];
        expect_gradient(t->name, (struct Slope){exact_model_loss, w, 0.003}, t->w, t->d, t->n, 6,
                        4e-3);
    }
}

/* A toy of 9 responses: all three methods come near the optimum. */
static void test_exact_run(void) {
    /* whole trainings: minutes where an instruction costs ten or a hundred */
    if (thin)
        return;
    struct Json *json = json_output("exact --vocab_size 3 --max_new_tokens 2 --n_embd 16 --n_layer "
                                    "1 --json");
    expect_close("beta", json_get(json, "beta")->number, 1, 0);
    expect_close("DPO", json_get(json_get(json, "dpo"), "kl_to_optimum")->number, 0, 1e-3);
    static const char *const methods[] = {"dpo", "ppo", "reinforce"};
    for (int k = 0; k < 3; k++) {
        struct Json *m = json_get(json, methods[k]);
        double share =
            (json_get(m, "objective")->number - json_get(json, "objective_ref")->number)
            / (json_get(json, "objective_max")->number - json_get(json, "objective_ref")->number);
        expect_true(methods[k], json_get(m, "kl_to_optimum") && share > 0.98 && share < 1 + 1e-6);
    }
    double to_limit = json_get(json, "grpo_kl_to_limit")->number;
    expect_close("GRPO: near its limit", to_limit, 0, 0.01);
    double best_of_2 = json_get(json_get(json, "best_of_2"), "kl")->number;
    expect_true("best of 2: its KL", best_of_2 > 0.05 && best_of_2 < best_of_n_kl(2));
}

/* =============================================================================================
 * Chapter 20 - The whole course
 *
 * What the course measures at its end.
 * ============================================================================================= */

/* Word pairs and pair accuracy by hand. */
static void test_evaluation(void) {
    struct Text same[] = {{"the film. The FILM.", 19}};
    struct Text none[] = {{"", 0}, {"one", 3}};
    expect_close("the-film film-. .-the the-film film-.", distinct_2(same, 1), 3.0 / 5, 1e-12);
    expect_close("no pair", distinct_2(none, 2), 0, 0);
    expect_close("two of three pairs ordered",
                 pair_accuracy((float[]){1, 3, 2}, (double[]){3, 2, 1}, 3, 1), 1.0 / 3, 1e-12);
    expect_close("far ones only", pair_accuracy((float[]){2, 3, 1}, (double[]){3, 2, 1}, 3, 2), 1,
                 0);
    expect_true("no pair that far", isnan(pair_accuracy((float[]){1, 2}, (double[]){1, 2}, 2, 5)));
}

/* Prompts and answers of the course end where a word does; by hand, in tokens. */
static void test_whole_words(void) {
    /* The| f|il|ms| are| dis|p|ir|ited, the end token of 1025 ids last */
    int ids[] = {464, 277, 346, 907, 389, 595, 79, 343, 863, 1024};
    static const struct {
        size_t n, prompt_length, length;
        const char *what;
    } cases[] = {
        {7, 1, 4, " f|il|ms| are, without | dis|p"},
        {10, 1, 9, "ended by itself"},
        {4, 1, 3, "a single word"},
        {5, 4, 1, "a single word of one token"},
    };
    struct GPT2Config policy = {.vocab_size = 1025, .eos_token_id = 1024};
    struct Course course = {.tok = tokenizer, .vocab_size = 1025};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct Example e = {ids, cases[i].n, cases[i].prompt_length};
        whole_words(tokenizer, &policy, &e);
        expect_count(cases[i].what, e.n - e.prompt_length, cases[i].length);
    }
    struct Example sentence = {(int[]){464, 389, 277, 346, 907, 13}, 6, 1};
    whole_words(tokenizer, &policy, &sentence);
    expect_count("| are| f|il|ms|.", sentence.n, 6);
    struct Example text = {ids, COUNT(ids), 0};
    expect_count("after | f: up to | are", prompt_end(&course, &text, 2), 4);
    expect_count("after |ms: there", prompt_end(&course, &text, 4), 4);
    expect_count("after | dis: back to it", prompt_end(&course, &text, 6), 5);
    struct Example one_word = {(int[]){464, 79, 343, 863, 79, 343, 863, 79, 343, 1024}, 10, 0};
    expect_count("no space at all", prompt_end(&course, &one_word, 2), 2);
}

/* The KL of a whole answer, and at each position, against transformers. */
static void test_evaluation_kl(void) {
    static const double golden_kl[] = {0.0143286111, 0.0267592594, 0.0317655057, 0.0250713639,
                                       0.0221926942, 0.0193744227, 0.0163947437, 0.0306888893,
                                       0.0400096476, 0.0412293561, 0.0266468395, 0.0250469036};
    struct GPT2 *model = golden_model();
    struct GPT2 *ref_model = golden_model();
    for (size_t i = 0; i < 28; i++)
        for (size_t k = 0; k < ref_model->tensors[i]->n; k++)
            ref_model->tensors[i]->w[k] *= 0.9f;
    struct Example answer = golden_examples()[0];
    double want = 0;
    answer.prompt_length = 4;
    for (size_t t = 3; t < 11; t++)
        want += golden_kl[t];
    expect_close("KL of an answer", response_kl(model, ref_model, &answer, 1, 1), want, 5e-6);
    struct Batch batch = batch_of(&answer, 1, READ_LAST);
    float *logits = batch_logits(model, &batch);
    float *ref = batch_logits(ref_model, &batch);
    float scratch[61];
    for (size_t t = 0; t < 12; t++)
        expect_close("KL at a position",
                     kl_exact(logits + 61 * t, log_sum_exp(logits + 61 * t, 61, scratch),
                              ref + 61 * t, log_sum_exp(ref + 61 * t, 61, scratch), 61),
                     golden_kl[t], 4e-6);
}

/* =============================================================================================
 * Chapter 21 - One example, number by number
 *
 * What explain prints, by hand and from real models; its errors; and the numbers that libraries
 * have for its example.
 * ============================================================================================= */

/* A list of numbers in what a topic printed. */
static void expect_list(const struct Json *object, const char *key, const double *want, size_t n,
                        double tolerance) {
    const struct Json *list = json_get(object, key);
    expect_count(key, list && list->type == JSON_ARRAY ? (size_t)list->number : 0, n);
    const struct Json *item = list ? list->child : NULL;
    for (size_t i = 0; i < n && item; i++, item = item->next)
        expect_close(key, item->number, want[i], tolerance);
}

static void expect_printed(const char *line, const char *part) {
    struct Text said = command_output(line);
    expect_true(formatted("%s prints %s", line, part), strstr(said.data, part) != NULL);
    for (const char *at = said.data; *at; at = line_after(at)) {
        size_t columns = 0;
        for (const char *c = at; *c && *c != '\n'; c++)
            columns += (*c & 0xc0) != 0x80;
        expect_true(formatted("%s: 80 columns: %.*s", line, (int)strcspn(at, "\n"), at),
                    columns <= 80);
    }
}

/* What the printing topics say, by hand; their lines, in both languages. */
static void test_explain_print(void) {
    const char *word = "explain bpe --tokenizer @tokenizer.bin";
    expect_printed(word, "rank  2390 -> token  2646  \" film\"");
    expect_printed("explain omega", "omega         -3.34   0.0354   omega         -3.69   0.0250");
    expect_printed("explain attention", "1.7225");
    expect_printed("explain lora", "W_merged     0.9000   0.1000   1.9500");
    expect_printed("explain adamw", "w     = w (1 - lr weight_decay) - step = 1.8800 * 0.99");
    expect_printed("explain beam", "\" fun.\"       -1.2040 -0.1054 = -1.3093   ends: -1.3093 / 2");
    expect_printed("explain backprop", "wte.d[\" is\"][0] = ");
    static const char *const topics[] = {"bpe",   "omega", "attention", "lora",
                                         "adamw", "beam",  "backprop"};
    for (size_t i = 0; i < COUNT(topics); i++)
        expect_printed(formatted("explain %s --language pt", topics[i]), "\n");
}

/* The numbers behind them, by formulas of their own. */
static void test_explain_numbers(void) {
    struct Json *said = json_output("explain attention --json");
    double e[] = {1, exp(4 / sqrt(2)), exp(2 / sqrt(2))};
    double total = e[0] + e[1] + e[2];
    expect_list(said, "p_2", (double[]){e[0] / total, e[1] / total, e[2] / total}, 3, 1e-6);
    expect_list(said, "out_2", (double[]){(2 * e[1] + e[2]) / total, (e[0] + e[2]) / total}, 2,
                1e-6);
    said = json_output("explain lora --json");
    expect_list(said, "y_after", (double[]){1.9, 1.1, 2.95}, 3, 1e-6);
    expect_list(said, "dA", (double[]){0, 0, 0}, 3, 0);
    expect_list(said, "dA_next", (double[]){-0.45, -0.9, -0.45}, 3, 1e-6);
    expect_list(said, "W_merged_0", (double[]){1 - 0.1, 0.1, 2 - 0.05}, 3, 1e-6);
    said = json_output("explain adamw --json");
    expect_list(said, "step_2",
                (double[]){-0.1, 0.017, 0.00009991, 0.089473684, 0.049979990, 0.040022, 1.821178},
                7, 1e-6);
    said = json_output("explain beam --json");
    expect_list(said, "best_2_1", (double[]){log(0.3 * 0.9) / 2}, 1, 1e-6);
    expect_list(said, "best_1_1", (double[]){log(0.5 * 0.45 * 0.5) / 3}, 1, 1e-6);
    expect_list(said, "best_2_2", (double[]){log(0.5 * 0.3 * 0.9) / 9}, 1, 1e-6);
    said = json_output("explain omega --json");
    expect_list(said, "omega", (double[]){-3.34, -3.69}, 2, 1e-6);
    expect_list(said, "sum", (double[]){1}, 1, 1e-6);
}

/* Both ways to wte add up, and to what the loss itself says. */
static void test_explain_backprop(void) {
    struct Json *wte = json_get(json_output("explain backprop --json"), "wte");
    double number[4] = {0};
    size_t n = 0;
    for (struct Json *item = wte ? wte->child : NULL; item && n < 4; item = item->next)
        number[n++] = item->number;
    expect_count("numbers", n, 4);
    expect_true("neither way is nothing", fabs(number[0]) > 0.01 && fabs(number[1]) > 0.01);
    expect_close("both", number[0] + number[1], number[2], 1e-6);
    expect_close("central difference", number[3], number[2], 1e-4);
}

/* A policy, a reference and a judge in folders of their own; two answers to "The film is". */
static struct Json *explained(const char *topic, const char *flags) {
    return json_output(formatted("explain %s --json --model_name_or_path @explained "
                                 "--prompt 'The film is' %s",
                                 topic, flags));
}

/* ppo's and dpo's numbers are those of batch_logprobs, ref_logprobs those of the reference. */
static void test_explain_models(void) {
    struct GPT2 *policy = random_model(300, 24, 12, 1, 3);
    struct GPT2 *ref = random_model(300, 24, 12, 1, 3);
    value_head_init(policy, 1);
    model_save(policy, temporary("explained"), tokenizer);
    model_save(ref, temporary("explained_ref"), tokenizer);
    saved_model("explained_judge");
    struct Example answer =
        example_prompt_completion(&test_arena, tokenizer, text_of("The film is"),
                                  text_of(" a lot of fun"), 300, NULL);
    struct Batch batch = collate(&test_arena, &answer, 1, SKIP_LAST);
    struct LMHead head = batch_logprobs(policy, &test_arena, &batch, 1, false);
    struct LMHead ref_head = batch_logprobs(ref, &test_arena, &batch, 1, false);
    double logprobs[24];
    double ref_logprobs[24];
    for (size_t r = 0; r < batch.R; r++) {
        logprobs[r] = head.logprob[r];
        ref_logprobs[r] = ref_head.logprob[r];
    }
    struct Json *ppo = explained("ppo", "--response ' a lot of fun' --ref_model @explained_ref "
                                        "--reward_model_path @explained_judge --learning_rate "
                                        "0.01");
    struct Json *first = json_get(ppo, "answers") ? json_get(ppo, "answers")->child : NULL;
    expect_list(first, "logprobs", logprobs, batch.R, 1e-6);
    expect_list(first, "ref_logprobs", ref_logprobs, batch.R, 1e-6);
    expect_true("the policy has moved",
                json_get(first, "new_logprobs")
                    && fabs(json_get(first, "new_logprobs")->child->number - logprobs[0]) > 1e-4);
    struct Json *dpo = explained("dpo", "--response ' a lot of fun' --ref_model @explained_ref");
    expect_list(dpo, "chosen_logprobs", logprobs, batch.R, 1e-6);
    expect_list(dpo, "ref_chosen_logprobs", ref_logprobs, batch.R, 1e-6);

    /* the text of each topic, whatever the models' numbers are */
    static const char *const lines[] = {"bpe", "attention", "softmax", "sampling", "dpo"};
    for (size_t i = 0; i < COUNT(lines); i++)
        expect_printed(formatted("explain %s --model_name_or_path @explained --prompt 'The film'",
                                 lines[i]),
                       "\n");
    static const char *const judged[] = {"reward", "reinforce", "gae", "ppo"};
    for (size_t i = 0; i < COUNT(judged); i++)
        expect_printed(formatted("explain %s --model_name_or_path @explained --prompt 'The film' "
                                 "--reward_model_path @explained_judge --language pt",
                                 judged[i]),
                       "\n");
    expect_printed("explain kl --model_name_or_path @explained --prompt 'The film' "
                   "--ref_model @explained_ref --top_n 3",
                   "\n");
}

/* A flag that is missing, or that the topic has no use for, is named. */
static void test_explain_model_flags(void) {
    static const struct {
        const char *line, *message;
        int status;
    } cases[] = {
        {"explain ppo --prompt x", "needs --model_name_or_path", 2},
        {"explain kl --model_name_or_path @m --prompt x", "--ref_model is needed", 2},
        {"explain gae --model_name_or_path @m --prompt x", "--reward_model_path is needed", 2},
        {"explain softmax --model_name_or_path @m", "--prompt is needed", 2},
        {"explain softmax --model_name_or_path @m --prompt x --rejected y", "no use for it", 2},
        {"explain lora --model_name_or_path @m --prompt x", "no table for real models", 2},
        {"explain bpe --prompt ''", "a word of 1 to 12 bytes", 1},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        expect_end(cases[i].line, run_command,
                   words_of(formatted("%s --tokenizer @tokenizer.bin", cases[i].line)),
                   cases[i].status, cases[i].message);
}

/* gae of the built-in example by hand, from the last token back: 0.4; 0.95 * 0.4 = 0.38;
 * 0.1 + 0.95 * 0.38 = 0.461; -0.074 + 0.95 * 0.461 = 0.36395. The ratio of " fun" is e^0.3. */
static void test_explain_example(void) {
    struct Json *said = json_output("explain gae --json");
    struct Json *first = json_get(said, "answers") ? json_get(said, "answers")->child : NULL;
    expect_list(first, "deltas", (double[]){-0.074, 0.1, 0, 0.4}, 4, 1e-6);
    expect_list(first, "raw_advantages", (double[]){0.36395, 0.461, 0.38, 0.4}, 4, 1e-6);
    expect_list(first, "returns", (double[]){0.76395, 0.761, 0.88, 0.9}, 4, 1e-6);
    said = json_output("explain ppo --json");
    first = json_get(said, "answers") ? json_get(said, "answers")->child : NULL;
    expect_list(first, "rewards", (double[]){0.026, -0.1, 0, 0.9}, 4, 1e-6);
    expect_list(first, "ratios", (double[]){exp(0.1), exp(0.1), exp(0.01), exp(0.3)}, 4, 1e-6);
    const struct Json *clipped =
        json_get(first, "clipped") ? json_get(first, "clipped")->child : NULL;
    for (size_t t = 0; clipped; t++, clipped = clipped->next)
        expect_true("only the last token is clipped", (clipped->type == JSON_TRUE) == (t == 3));
    /* the sampled token is where 0.6 lies: in the stretch of " a", which ends at 0.632 */
    expect_close("token", json_number_or(json_output("explain sampling --json"), "token", -1), 0,
                 0);
}

static const char *const EXAMPLE_TOPICS[] = {"softmax", "sampling", "kl",  "reward", "reinforce",
                                             "gae",     "ppo",      "dpo", "exact"};

/* What a topic prints is an example that gives the same again, and so is nothing at all. */
static void test_explain_again(void) {
    for (size_t i = 0; i < COUNT(EXAMPLE_TOPICS); i++) {
        const char *line = formatted("explain %s --json", EXAMPLE_TOPICS[i]);
        struct Text first = command_output(line);
        FILE *file = fopen(temporary("explain.json"), "w");
        fwrite(first.data, 1, first.length, file);
        fclose(file);
        struct Text again = command_output(formatted("%s --example @explain.json", line));
        expect_true(formatted("%s is a fixed point", line), text_equal(first, again));
        write_json("explain.json", "{}");
        again = command_output(formatted("%s --example @explain.json", line));
        expect_true(formatted("%s of {}", line), text_equal(first, again));
    }
}

/* The text in both languages; with numbers and names that are as wide as they may be. */
static void test_explain_text(void) {
    expect_printed("explain gae", "delta = -0.1 + 1 * 0.5 - 0.3 = 0.1");
    expect_printed("explain ppo", "= max(-1.1492, -1.0216) = -1.0216");
    expect_printed("explain ppo --language pt", "cortado");
    expect_printed("explain", "  gae        how a score");
    for (size_t i = 0; i < COUNT(EXAMPLE_TOPICS); i++) {
        expect_printed(formatted("explain %s", EXAMPLE_TOPICS[i]), "=");
        expect_printed(formatted("explain %s --language pt", EXAMPLE_TOPICS[i]), "=");
    }
    write_json("explain.json",
               "{'prompt': '\\u001b[31m a prompt that is a good deal longer than a terminal is "
               "wide',"
               "'answers': [{'tokens': ['\\u00e9\\u00e9\\u00e9\\u00e9\\u00e9\\u00e9\\u00e9\\u00e9"
               "\\u00e9\\u00e9\\u00e9\\u00e9'], 'score': -999999.5, 'logprobs': [-79.123456],"
               "'ref_logprobs': [-0.123456], 'values': [-123456.7], 'new_logprobs': [0],"
               "'new_values': [999999.5]}]}");
    expect_printed("explain ppo --example @explain.json", "answer 1");
}

/* An error names the file's field, and what was found. */
static void test_explain_errors(void) {
    static const struct {
        const char *topic, *json, *message;
    } cases[] = {
        {"softmax", "{'temprature': 1}", "temprature: explain softmax has no field"},
        {"softmax", "{'logits': 3}", "logits: a list [...] was expected; found: 3"},
        {"softmax", "{'logits': [1, 'x']}", "logits[1]: a number was expected, from -300 to 300"},
        {"softmax", "{'temperature': 0}", "temperature: a number was expected, from 0.001"},
        {"softmax", "{'logits': [1e300]}", "logits[0]: a number was expected"},
        {"softmax", "{'logits': [NaN]}", "NaN is not JSON"},
        {"sampling", "{'ids': [4]}", "ids: id 4; logits has 4 items"},
        {"sampling", "{'u': 1}", "u: a number was expected, from 0 to 0.999999999; found: 1"},
        {"sampling", "{'tokens': ['a']}", "tokens: 1 items; 4 were expected"},
        {"reinforce", "{'answers': [{'score': 'good'}]}", "answers[0].score: a number"},
        {"reinforce", "{'answers': [{}]}", "baseline: rloo compares"},
        {"gae", "{'answers': [{}, {'values': [1]}]}", "answers[1].values: 1 items; 4 were"},
        {"gae", "{'answers': [{}, {}, {}]}", "answers[2].rewards: is missing"},
        {"ppo", "{'answers': []}", "answers: an empty list"},
        {"ppo", "{'answers': [[]]}", "answers[0]: an object {...} was expected; found: a list"},
        {"exact", "{'ref_probabilities': [0.2, 0.2, 0.2]}", "they sum to 0.6; 1 was expected"},
        {"kl", "[]", "a JSON object"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        write_json("explain.json", cases[i].json);
        expect_end(cases[i].json, run_command,
                   words_of(formatted("explain %s --example @explain.json", cases[i].topic)), 1,
                   cases[i].message);
    }
    write_json("explain.json", "{}");
    expect_end("print only", run_command, words_of("explain lora --example @explain.json"), 2,
               "--example: explain lora has numbers of its own");
    expect_end("no topic", run_command, words_of("explain gea"), 2,
               "there is no topic \"gea\"; the nearest is \"gae\"");

    /* a list that no table could show, and weights that no double holds */
    const char *logits = "0";
    for (int i = 0; i < 1000; i++)
        logits = formatted("%s,0", logits);
    write_json("explain.json", formatted("{'logits': [%s]}", logits));
    expect_end("a long list", run_command, words_of("explain softmax --example @explain.json"), 1,
               "logits: 1001 items; at most 1000 can be explained");
    write_json("explain.json", "{'beta': 0.001}");
    expect_end("a small beta", run_command, words_of("explain exact --example @explain.json"), 1,
               "e^(reward / beta) is too large to be shown");
}

/* The example that align explain has built in, as TRL, torch and transformers compute it in double:
 * golden.py, part F, which also says what was given to them. docs/tools/check_explain.py reads the
 * numbers here, and holds what align explain --json prints, and its own formulas, to them. */

static const float golden_explain_logits[4] = {2, 1, 1.5f, 0.5f};

static const double golden_explain_softmax[4] = {0.455054234, 0.167405097, 0.276004345,
                                                 0.101536324};
static const double golden_explain_log_sum_exp = 2.78733867;
static const double golden_explain_entropy = 1.24505043;

/* torch's softmax, logsumexp and Categorical.entropy. */
static void test_explain_golden_softmax(void) {
    float p[4];
    memcpy(p, golden_explain_logits, sizeof p);
    float lse = softmax(p, 4);
    expect_floats("probabilities", p, golden_explain_softmax, 4, 1e-7);
    expect_close("log_sum_exp", lse, golden_explain_log_sum_exp, 1e-6);
    expect_close("entropy", entropy_of_logits(golden_explain_logits, lse, 4),
                 golden_explain_entropy, 1e-6);
    expect_count("argmax", argmax(golden_explain_logits, 4), 0);
}

static const double golden_explain_penalized[4] = {2.0, 1.0, 1.25, 0.5};
static const double golden_explain_scaled[4] = {2.85714286, 1.42857143, 1.78571429, 0.714285714};
static const double golden_explain_top_k[4] = {2.85714286, 1.42857143, 1.78571429, -INFINITY};
static const double golden_explain_top_p[4] = {2.85714286, 1.42857143, 1.78571429, -INFINITY};
static const double golden_explain_drawn[4] = {0.632043376, 0.15146985, 0.216486774, 0.0};
static const double golden_explain_tied[4] = {-INFINITY, -INFINITY, 0.0, 0.0};

/* Each processor of transformers, then all of them. */
static void test_explain_golden_sampling(void) {
    struct GenerationConfig config = sampling(0.7, 3, 0.9);
    float x[4];
    memcpy(x, golden_explain_logits, sizeof x);
    process_repetition_penalty(x, 4, (int[]){2}, 1, 1.2);
    expect_floats("penalty 1.2 for id 2", x, golden_explain_penalized, 4, 1e-6);
    for (size_t v = 0; v < 4; v++)
        expect_close("temperature 0.7", x[v] / 0.7, golden_explain_scaled[v], 1e-6);
    process_logits(x, 4, &config, NULL, 0, 0, 0);
    for (size_t v = 0; v < 4; v++)
        expect_close("what top-k and top-p leave", x[v], golden_explain_top_p[v], 1e-6);
    softmax(x, 4);
    expect_floats("their probabilities", x, golden_explain_drawn, 4, 2e-7);
    float tied[4] = {0};
    process_top_p(tied, 4, 0.5, 1);
    for (size_t v = 0; v < 4; v++)
        expect_close("of equal logits the later ones stay", tied[v], golden_explain_tied[v], 0);
    memcpy(x, (float[]){2 / 0.7f, 1 / 0.7f, 1.25f / 0.7f, 0.5f / 0.7f}, sizeof x);
    process_top_k(x, 4, 3);
    for (size_t v = 0; v < 4; v++)
        expect_close("top-k alone", x[v], golden_explain_top_k[v], 1e-6);
}

static const double golden_explain_kl = 0.0112439662;
static const double golden_explain_k1[4] = {-0.128206084, 0.0717939158, 0.0717939158, 0.371793916};
static const double golden_explain_k3[4] = {0.00858116825, 0.00251659909, 0.00251659909,
                                            0.061290238};
static const double golden_explain_mean_k3 = 0.0112439662;

/* torch's kl_divergence; the estimates from each token that could be drawn. */
static void test_explain_golden_kl(void) {
    static const float ref_logits[4] = {2, 0.8f, 1.3f, 0};
    float scratch[4];
    float p_lse = log_sum_exp(golden_explain_logits, 4, scratch);
    float q_lse = log_sum_exp(ref_logits, 4, scratch);
    double mean_k3 = 0;
    expect_close("kl", kl_exact(golden_explain_logits, p_lse, ref_logits, q_lse, 4),
                 golden_explain_kl, 5e-7);
    for (size_t v = 0; v < 4; v++) {
        double log_p = golden_explain_logits[v] - p_lse;
        double log_q = ref_logits[v] - q_lse;
        expect_close("k1", kl_k1(log_p, log_q), golden_explain_k1[v], 1e-6);
        expect_close("k3", kl_k3(log_p, log_q), golden_explain_k3[v], 1e-6);
        mean_k3 += exp(log_p) * kl_k3(log_p, log_q);
    }
    expect_close("the mean of k3", mean_k3, golden_explain_mean_k3, 1e-6);
    expect_close("is the KL", golden_explain_mean_k3, golden_explain_kl, 1e-10);
}

static const double golden_explain_reward[4] = {0.832018385, 0.183900741, -0.167981615,
                                                0.167981615};
static const double golden_explain_reward_margin[4] = {0.832018385, 0.288935325, -0.241739894,
                                                       0.257739894};

/* torch's logsigmoid, slopes by autograd. */
static void test_explain_golden_reward(void) {
    struct PairLoss plain = bradley_terry_pair(1, -0.6, 0, 0);
    struct PairLoss margin = bradley_terry_pair(1, -0.6, 0.5, 0.01);
    expect_doubles("no margin",
                   (double[]){sigmoid(1.6), plain.loss, plain.dchosen, plain.drejected},
                   golden_explain_reward, 4, 1e-8);
    expect_doubles("margin 0.5, centred with 0.01",
                   (double[]){sigmoid(1.6), margin.loss, margin.dchosen, margin.drejected},
                   golden_explain_reward_margin, 4, 1e-8);
}

static const float golden_explain_logprobs[8] = {-0.79f, -1.8f, -0.05f, -0.7f,
                                                 -1.79f, -0.6f, -0.8f,  -0.5f};
static const float golden_explain_ref_logprobs[8] = {-0.66f, -2.3f, -0.05f, -1.2f,
                                                     -1.86f, -0.7f, -0.7f,  -0.5f};

static const double golden_explain_reinforce_reward[2] = {0.826, -0.614};
static const double golden_explain_reinforce_advantage[2] = {1.44, -1.44};
static const double golden_explain_reinforce_loss = -0.252;
static const double golden_explain_reinforce_dlogps[2] = {-0.72, 0.72};

/* Leave one out as in TRL's RLOOTrainer, slopes by autograd. */
static void test_explain_golden_reinforce(void) {
    float rewards[2], advantages[2];
    double logps[2], dlogps[2];
    for (size_t b = 0; b < 2; b++) {
        logps[b] = sequence_logprob(golden_explain_logprobs + 4 * b, 4);
        double ref_logp = sequence_logprob(golden_explain_ref_logprobs + 4 * b, 4);
        rewards[b] = (float)reinforce_reward((double[]){1, -0.6}[b], 0.2, logps[b], ref_logp);
    }
    reinforce_advantages(BASELINE_RLOO, rewards, 2, 2, 0, advantages);
    double loss = reinforce_loss(advantages, logps, 2, dlogps);
    expect_floats("rewards", rewards, golden_explain_reinforce_reward, 2, 2e-7);
    expect_floats("advantages", advantages, golden_explain_reinforce_advantage, 2, 4e-7);
    expect_close("loss", loss, golden_explain_reinforce_loss, 1e-6);
    expect_doubles("slopes", dlogps, golden_explain_reinforce_dlogps, 2, 2e-7);
}

static const double golden_explain_ppo_kl[8] = {-0.13, 0.5, 0.0, 0.5, 0.07, 0.1, -0.1, 0.0};
static const double golden_explain_ppo_rewards[8] = {0.026,  -0.1,  0,    0.9,
                                                     -0.014, -0.02, 0.02, -0.6};
static const double golden_explain_ppo_raw_advantages[8] = {0.36395,   0.461,   0.38,  0.4,
                                                            -0.961925, -0.4715, -0.37, -0.2};
static const double golden_explain_ppo_returns[8] = {0.76395,   0.761,   0.88,  0.9,
                                                     -0.561925, -0.5715, -0.57, -0.6};
static const double golden_explain_ppo_advantages[8] = {0.783122307,  0.966808828, 0.81350014,
                                                        0.851354137,  -1.72636111, -0.798133783,
                                                        -0.606024748, -0.284265774};
static const double golden_explain_ppo_ratios[8] = {1.10517092,  1.10517092,  1.01005017,
                                                    1.34985881,  0.860707976, 0.951229425,
                                                    0.980198673, 1.0};
static const int golden_explain_ppo_clipped[8] = {0, 0, 0, 1, 0, 0, 0, 0};
static const double golden_explain_ppo_token_losses[8] = {-0.865483999, -1.068489,  -0.821675952,
                                                          -1.02162496,  1.48589278, 0.759208339,
                                                          0.594024654,  0.284265774};
static const double golden_explain_ppo_dlogprobs[8] = {-0.1081855,   -0.133561125, -0.102709494,
                                                       0.0,          0.185736597,  0.0949010424,
                                                       0.0742530818, 0.0355332217};
static const double golden_explain_ppo_value_losses[8] = {0.0492823013, 0.0844605,   0.0392, 0.02,
                                                          0.511996103,  0.088831125, 0.0512, 0.005};
static const double golden_explain_ppo_dvalues[8] = {-0.003924375, -0.0051375, -0.0035, 0.0,
                                                     0.0126490625, 0.00526875, 0.004,   0.00125};
static const double golden_explain_ppo_loss[3] = {-0.0817352967, 0.106246254, -0.0711106714};

/* compute_rewards, compute_advantages and loss of TRL's PPOTrainer. */
static void test_explain_golden_ppo(void) {
    struct RolloutTrainer ppo = {.ppo.config = ppo_config(), .kl_coef = 0.2};
    float column[5][8], raw_advantages[8];
    struct PPOBatch p = {
        .B = 2,
        .R = 8,
        .start = (size_t[]){0, 4, 8},
        .padding = (size_t[]){0, 0},
        .values = (float[]){0.4f, 0.3f, 0.5f, 0.5f, 0.4f, -0.1f, -0.2f, -0.4f},
        .kl = column[0],
        .non_score_rewards = column[1],
        .rewards = column[2],
        .advantages = column[3],
        .returns = column[4],
    };
    p.logprobs = memcpy(arena_floats(&test_arena, 8), golden_explain_logprobs,
                        sizeof golden_explain_logprobs);
    p.ref_logprobs = memcpy(arena_floats(&test_arena, 8), golden_explain_ref_logprobs,
                            sizeof golden_explain_ref_logprobs);
    ppo_rewards(&ppo, &p, (float[]){1, -0.6f});
    ppo_advantages(&ppo.ppo.config, &p);
    for (size_t t = 0; t < 8; t++)
        raw_advantages[t] = p.returns[t] - p.values[t];
    expect_floats("kl", p.kl, golden_explain_ppo_kl, 8, 2e-7);
    expect_floats("rewards", p.rewards, golden_explain_ppo_rewards, 8, 1e-7);
    expect_floats("raw advantages", raw_advantages, golden_explain_ppo_raw_advantages, 8, 3e-7);
    expect_floats("returns", p.returns, golden_explain_ppo_returns, 8, 3e-7);
    expect_floats("advantages", p.advantages, golden_explain_ppo_advantages, 8, 1e-6);

    static const float logprobs[] = {-0.69f, -1.7f, -0.04f, -0.4f, -1.94f, -0.65f, -0.82f, -0.5f};
    static const float values[] = {0.45f, 0.35f, 0.6f, 0.85f, 0.45f, -0.15f, -0.25f, -0.5f};
    struct PPOTokens tokens = tokens_of(&p, 8, logprobs, values);
    struct PPOLoss loss = ppo_loss(&ppo.ppo.config, &tokens);
    for (size_t t = 0; t < 8; t++) {
        expect_close("ratio", tokens.policy[t].ratio, golden_explain_ppo_ratios[t], 3e-7);
        expect_count("clipped", tokens.policy[t].is_clipped, (size_t)golden_explain_ppo_clipped[t]);
        expect_close("token loss", tokens.policy[t].loss, golden_explain_ppo_token_losses[t], 2e-6);
        expect_close("value loss", tokens.value[t].loss, golden_explain_ppo_value_losses[t], 5e-7);
    }
    expect_floats("d log-probability", tokens.dlogprobs, golden_explain_ppo_dlogprobs, 8, 2e-7);
    expect_floats("d value", tokens.dvalues, golden_explain_ppo_dvalues, 8, 1e-8);
    expect_doubles("losses", (double[]){loss.policy, loss.value, loss.total},
                   golden_explain_ppo_loss, 3, 1e-6);
}

static const double golden_explain_dpo[5] = {0.653946967, -0.048001066, 0.048001066, 0.087, 0.007};
static const double golden_explain_dpo_smoothed[5] = {0.661946967, -0.038001066, 0.038001066, 0.087,
                                                      0.007};

/* TRL's dpo_loss. */
static void test_explain_golden_dpo(void) {
    struct DPOSide side[2] = {{.length = 4}, {.length = 4}};
    for (size_t b = 0; b < 2; b++) {
        side[b].logp = sequence_logprob(golden_explain_logprobs + 4 * b, 4);
        side[b].ref_logp = sequence_logprob(golden_explain_ref_logprobs + 4 * b, 4);
    }
    struct DPOConfig config = {.beta = 0.1, .weight = {[DPO_SIGMOID] = 1}};
    for (int smoothed = 0; smoothed < 2; smoothed++) {
        config.label_smoothing = smoothed ? 0.1 : 0;
        double loss = dpo_loss(&config, 1, &side[0], &side[1]);
        expect_doubles(smoothed ? "label_smoothing 0.1" : "none",
                       (double[]){loss, side[0].dlogp, side[1].dlogp,
                                  implied_reward(0.1, side[0].logp, side[0].ref_logp),
                                  implied_reward(0.1, side[1].logp, side[1].ref_logp)},
                       smoothed ? golden_explain_dpo_smoothed : golden_explain_dpo, 5, 5e-8);
    }
}

static const double golden_explain_Z = 2.06816948;
static const double golden_explain_optimum[3] = {0.714550346, 0.0436899704, 0.241759684};
static const double golden_explain_objective_ref = 0.02;
static const double golden_explain_objective_max = 0.363331954;

/* torch's kl_divergence; the objective at the optimum. */
static void test_explain_golden_exact(void) {
    double ref_logps[] = {log(0.2), log(0.3), log(0.5)};
    double optimum[3];
    struct ExactWorld w = {
        .n = 3,
        .r = (double[]){1, -0.6, 0},
        .beta = 0.5,
        .logps = {ref_logps, optimum},
    };
    w.log_Z = exact_optimum(ref_logps, w.r, 3, 0.5, optimum);
    expect_close("Z", exp(w.log_Z), golden_explain_Z, 1e-8);
    for (size_t i = 0; i < 3; i++)
        expect_close("optimum", exp(optimum[i]), golden_explain_optimum[i], 1e-9);
    expect_close("objective of the reference", exact_figures(&w, ref_logps).objective,
                 golden_explain_objective_ref, 1e-9);
    expect_close("of the optimum", exact_figures(&w, optimum).objective,
                 golden_explain_objective_max, 1e-9);
}

/* =============================================================================================
 * Part IV - The program
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 22 - Files, JSON
 *
 * What is JSON is read and what is not is refused with a reason; what is written is read back.
 * ============================================================================================= */

/* Values, escapes and nesting by hand. */
static void test_json_values(void) {
    const char *error;
    struct Json *json = parse(" { \"a\" : [1, -2.5e3, true, null, "
                              "\"x\\n\\\"\\u00e9\\ud83d\\ude00\\/\"], \"b\":{\"c\":false}, "
                              "\"\":0.125 } ",
                              &error);
    expect_true("parses", json && json->type == JSON_OBJECT);
    if (!json)
        return;
    struct Json *item = json_get(json, "a")->child;
    expect_close("1", item->number, 1, 0);
    expect_close("-2.5e3", (item = item->next)->number, -2500, 0);
    expect_true("true", (item = item->next)->type == JSON_TRUE);
    expect_true("null", (item = item->next)->type == JSON_NULL);
    expect_text("escapes", (item = item->next)->string, "x\n\"\xc3\xa9\xf0\x9f\x98\x80/");
    expect_true("no sixth item", item->next == NULL);
    expect_true("false", json_get(json_get(json, "b"), "c")->type == JSON_FALSE);
    expect_close("empty key", json_get(json, "")->number, 0.125, 0);
    expect_true("missing key, and a key of no object",
                !json_get(json, "z") && !json_get(item, "a") && !json_get(NULL, "a"));
    expect_text("half a surrogate pair", parse("\"\\ud800x\\udc00\"", &error)->string,
                "\xef\xbf\xbdx\xef\xbf\xbd");
    expect_text("a high half before another escape", parse("\"\\ud83d\\u0041\"", &error)->string,
                "\xef\xbf\xbd"
                "A");
    struct Text nul = parse("\"a\\u0000b\"", &error)->string;
    expect_true("NUL inside", nul.length == 3 && memcmp(nul.data, "a\0b", 3) == 0);
    expect_true("empty containers", parse("[{}, [], \"\"]", &error) != NULL);
    char deep[200] = "";
    for (int i = 0; i < 64; i++) {
        deep[i] = '[';
        deep[65 + i] = ']';
    }
    deep[64] = '1';
    expect_true("64 deep", parse(deep, &error) != NULL);
}

/* What is no JSON is refused, with a word about what was expected. */
static void test_json_errors(void) {
    static const struct {
        const char *text, *error;
    } cases[] = {
        {"", "it ends"},
        {"{", "in quotes"},
        {"[1 2]", "',' or ']'"},
        {"{\"a\" 1}", "':'"},
        {"[1,]", "a comma before the closing bracket"},
        {"{\"a\":1,}", "a comma before the closing"},
        {"{\"a\":1 \"b\":2}", "',' or '}'"},
        {"\"abc", "closing quote"},
        {"\"ab\\", "closing quote"},
        {"\"a\\x\"", "unknown escape"},
        {"\"a\\u12g4\"", "hexadecimal"},
        {"\"\\u12\"", "hexadecimal"},
        {"\"a\nb\"", "control character"},
        {"01", "a value was expected"},
        {"+1", "a value was expected"},
        {".5", "a value was expected"},
        {"1.", "decimal point"},
        {"1e", "exponent"},
        {"-", "a value was expected"},
        {"0x10", "follows its end"},
        {"1e999", "beyond 1.8e308"},
        {"[-1e999]", "beyond 1.8e308"},
        {"\"caf\xe9\"", "not UTF-8"},
        {"{\"\xc0\x80\":1}", "not UTF-8"},
        {"\"\xed\xa0\x80\"", "not UTF-8"},
        {"nul", "a value was expected"},
        {"NaN", "NaN is not JSON; write null"},
        {"{\"a\":-Infinity}", "-Infinity is not JSON"},
        {"[nan]", "nan is not JSON"},
        {"[None]", "None is Python"},
        {"{\"a\":True}", "True is Python"},
        {"{'a':1}", "a single quote"},
        {"{\"a\":'b'}", "a single quote"},
        {"# a\n1", "a comment"},
        {"{// a\n}", "a comment"},
        {"{\"a\":1 /* b */}", "a comment"},
        {"1 // a", "a comment"},
        {"{\"a\":1},", "a comma follows its end; take it out"},
        {"\"a\nb", "a line break in it is \\n"},
        {"1 2", "follows its end"},
        {"{1:2}", "in quotes"},
        {"[", "it ends"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *error = NULL;
        struct Json *json = parse(cases[i].text, &error);
        bool good = !json && error && strstr(error, cases[i].error);
        if (!good && failed())
            printf("%s: '%s': expected no value and \"%s\", got %s and \"%s\"\n", test_name,
                   cases[i].text, cases[i].error, json ? "one" : "none", error ? error : "");
    }
    char deep[300];
    memset(deep, '[', 200);
    deep[200] = 0;
    const char *error = NULL;
    expect_true("200 brackets deep", !parse(deep, &error) && error && strstr(error, "nested"));
}

/* What is written is read back: every control character, and any float bit for bit. */
static void test_json_write(void) {
    char all[129];
    for (int i = 0; i < 128; i++)
        all[i] = (char)i;
    float numbers[] = {0.1f, -3.4028235e38f, 1.17549435e-38f, 1e-45f, 0, 16777215, -0.333333343f};
    FILE *file = fopen(temporary("written.json"), "wb");
    fputs("{\"text\": ", file);
    json_write_string(file, "", (struct Text){all, 128});
    for (size_t i = 0; i < COUNT(numbers); i++) {
        fprintf(file, ", \"%zu\": ", i);
        fputs(json_number_text(numbers[i]), file);
    }
    fputs(", \"half\": ", file);
    json_write_string(file, "", text_of("\xc3\xa9\xf0\x9f\x98"));
    fputs(", \"nan\": ", file);
    fputs(json_number_text(NAN), file);
    fputs(", \"ids\": ", file);
    json_write_ids(file, "", (int[]){1, 20, 300}, 3);
    fputs("}", file);
    fclose(file);
    struct Json *json = json_contents("written.json");
    struct Text text = json_get(json, "text")->string;
    expect_true("128 characters", text.length == 128 && memcmp(text.data, all, 128) == 0);
    for (size_t i = 0; i < COUNT(numbers); i++) {
        float back = (float)json_get(json, formatted("%zu", i))->number;
        expect_bits("number", &back, &numbers[i], 1);
    }
    expect_text("half a character as U+FFFD", json_get(json, "half")->string,
                "\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd");
    expect_true("NaN as null", json_get(json, "nan")->type == JSON_NULL);
    expect_text("9 digits", text_of(json_number_text(0.1f)), "0.100000001");
    expect_close("last id", json_get(json, "ids")->child->next->next->number, 300, 0);
}

/* UTF-8 whatever the bytes; control characters are spaces, but those that are wanted. */
static void test_text_shown(void) {
    static const struct {
        const char *text, *kept, *want;
    } cases[] = {
        {"caf\xc3\xa9 \xf0\x9f\x98\x80", "", "caf\xc3\xa9 \xf0\x9f\x98\x80"},
        {"a\xff"
         "b\xc3",
         "",
         "a\xef\xbf\xbd"
         "b\xef\xbf\xbd"},
        {"a\n\tb\r\x1b[0m\x7f", "\n\t", "a\n\tb  [0m "},
        {"a\nb", "", "a b"},
        {"\xc2\x9b"
         "1",
         "\n", " 1"},
        {"\xed\xa0\x80", "", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"", "", ""},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        expect_text(cases[i].want, text_shown(&test_arena, text_of(cases[i].text), cases[i].kept),
                    cases[i].want);
    expect_text("NUL", text_shown(&test_arena, (struct Text){"a\0b", 3}, "\n"), "a b");
}

/* read_file takes what is larger than its first buffer; an Output appears only when it is closed.
 */
static void test_files(void) {
    size_t n = 300001;
    char *bytes = arena_alloc(&test_arena, n, 1);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (char)rng_next(&test_rng);
    struct Text back = read_file(&test_arena, write_bytes("large", bytes, n));
    expect_true("300001 bytes", back.length == n && memcmp(back.data, bytes, n) == 0);
    make_folder(temporary("a/b//c"));
    make_folder(temporary("a/b"));
    struct Output out = output_open(temporary("a/b/c"), "file");
    fputs("whole", out.file);
    expect_true("not there yet", !file_exists(temporary("a/b/c/file")));
    output_close(&out);
    expect_text("there", contents("a/b/c/file"), "whole");
    expect_true("nothing left beside it", !file_exists(temporary("a/b/c/file.tmp")));
}

/* A log that grew on after the checkpoint loses what came later; finished or not, beside the
 * checkpoint or copied from elsewhere. */
static void test_output_resume(void) {
    struct Output out;
    for (int finished = 0; finished < 2; finished++)
        for (int elsewhere = 0; elsewhere < 2; elsewhere++) {
            make_folder(temporary("log"));
            make_folder(temporary("log2"));
            write_bytes(finished ? "log/a.jsonl" : "log/a.jsonl.tmp", "one\ntwo\nthree\n", 14);
            if (finished)
                write_bytes("log/a.jsonl.tmp", "on", 2); /* too short: of another run */
            out = output_resume(temporary(elsewhere ? "log2" : "log"), "a.jsonl", temporary("log"),
                                8);
            fputs("3\n", out.file);
            output_close(&out);
            expect_text("log",
                        read_file(&test_arena,
                                  temporary(elsewhere ? "log2/a.jsonl" : "log/a.jsonl")),
                        "one\ntwo\n3\n");
            remove(temporary("log/a.jsonl"));
            remove(temporary("log/a.jsonl.tmp"));
        }
}

/* =============================================================================================
 * Chapter 23 - Data sets, tokenizer.bin
 *
 * Every shape and layout of a data set that TRL and datasets take, what is said of files that
 * are not read, and what a broken line, another format or a broken tokenizer.bin is answered
 * with.
 * ============================================================================================= */

/* Every shape of TRL's, with byte order mark, blank lines, CRLF, nulls and fields that nobody
 * knows. */
static void test_data_shapes(void) {
    struct Dataset *data = dataset_of("\xef\xbb\xbf{'text': 'a', 'other': [1, {'text': 2}]}\r\n\n  "
                                      "\n{'text': 'b\\u0000'}",
                                      TEXT_SHAPES, 1);
    expect_count("rows", data->n, 2);
    expect_text("text", data->rows[0].text, "a");
    expect_count("bytes of text 2", data->rows[1].text.length, 2);
    data = dataset_of("{'prompt': 'p', 'completion': ' c', 'text': 't'}\n", SFT_SHAPES,
                      COUNT(SFT_SHAPES));
    expect_count("prompt + completion before text", data->shape, SHAPE_PROMPT_COMPLETION);
    expect_text("completion", data->rows[0].completion, " c");
    data = dataset_of("{'text': 't', 'prompt': null}\n", SFT_SHAPES, COUNT(SFT_SHAPES));
    expect_count("null is not there", data->rows[0].has, HAS_TEXT);
    expect_count("text", data->shape, SHAPE_TEXT);
    data = dataset_of("{'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'margin': 0.5}\n{'chosen': "
                      "'xc', 'rejected': 'xr'}\n",
                      REWARD_SHAPES, COUNT(REWARD_SHAPES));
    expect_true("prompt given, prompt implied",
                (data->rows[0].has & HAS_PROMPT) && !(data->rows[1].has & HAS_PROMPT));
    expect_close("margin", data->rows[0].margin, 0.5, 0);
    expect_close("no margin", data->rows[1].margin, 0, 0);
    expect_text("rejected", data->rows[1].rejected, "xr");
    static const unsigned labelled[] = {SHAPE_LABELLED};
    data = dataset_of("{'text': 'a', 'label': true}\n{'text': 'b', 'label': 0}\n", labelled, 1);
    expect_true("labels", data->rows[0].label == 1 && data->rows[1].label == 0);
    data = dataset_of("{'text': 'a', 'score': -1.5}\n", REWARD_SHAPES, COUNT(REWARD_SHAPES));
    expect_true("rated", data->shape == SHAPE_RATED && data->rows[0].score == -1.5);
    data = dataset_of("{'query_ids': [1, 2, 3], 'response_ids': [4, 50256], 'score': 2}\n",
                      ROLLOUT_SHAPES, 1);
    expect_ids("query", data->rows[0].query_ids, data->rows[0].query_length, (int[]){1, 2, 3}, 3);
    expect_ids("response", data->rows[0].response_ids, data->rows[0].response_length,
               (int[]){4, 50256}, 2);
}

static void load_one_comparison(const void *path) {
    dataset_load(&test_arena, path, REWARD_SHAPES, COUNT(REWARD_SHAPES));
}
static void load_one_label(const void *path) {
    dataset_load(&test_arena, path, LABELLED_SHAPES, 1);
}

/* Fields that a shape does not use are not judged, whatever they hold; those that it uses are. */
static void test_data_unused_fields(void) {
    struct Dataset *data =
        dataset_of("{'text': 'a', 'label': -1, 'score': '5 stars', 'margin': {}, 'prompt': 3}\n"
                   "{'text': 'b', 'label': 'pos', 'query_ids': 'none', 'response_ids': [-1]}\n",
                   SFT_SHAPES, COUNT(SFT_SHAPES));
    expect_count("texts", data->n, 2);
    expect_count("text alone", data->shape, SHAPE_TEXT);
    data = dataset_of("{'text': 'a', 'score': 1.5, 'label': 'pos'}\n", REWARD_SHAPES,
                      COUNT(REWARD_SHAPES));
    expect_close("a rating beside a label in words", data->rows[0].score, 1.5, 0);
    data = dataset_of("{'text': 'a', 'score': 'good', 'label': 1}\n", LABELLED_SHAPES, 1);
    expect_close("a label beside a rating in words", data->rows[0].label, 1, 0);
    const char *pair = "{'chosen': 'a', 'rejected': 'b', 'margin': 'wide', 'score': ''}\n";
    data = dataset_of(pair, DPO_SHAPES, 1);
    expect_count("dpo has no margins", data->n, 1);
    expect_end("reward has", load_one_comparison, write_json("data.jsonl", pair), 1,
               "data.jsonl:1: \"margin\" must be a number");
    expect_end("a second row", load_one_label,
               write_json("data.jsonl", "{'text': 'a', 'label': 1}\n{'text': 'a', 'label': 7}\n"),
               1, "data.jsonl:2: \"label\" must be 0 or 1");
}

/* A folder: files in order of their names, of one shape, held-out ones left out. */
static void test_data_folder(void) {
    make_folder(temporary("set"));
    write_json("set/b.jsonl", "{'text': '3'}\n");
    write_json("set/a.jsonl", "{'text': '1'}\n{'text': '2'}\n");
    write_json("set/c.jsonl", "{'chosen': 'c', 'rejected': 'r'}\n");
    write_json("set/test.jsonl", "{'text': 'held out'}\n");
    write_text("set/readme.txt", "no data");
    capture_begin();
    struct Dataset *data = dataset_load(&test_arena, temporary("set"), TEXT_SHAPES, 1);
    struct Dataset *pairs = dataset_load(&test_arena, temporary("set"), DPO_SHAPES, 1);
    capture_end();
    expect_count("texts", data->n, 3);
    for (size_t i = 0; i < data->n; i++)
        expect_text("in order", data->rows[i].text, (const char *[]){"1", "2", "3"}[i]);
    expect_count("pairs", pairs->n, 1);
}

/* Writes files, whose names semicolons divide, into a folder; each has one row, its name. */
static const char *folder_of_splits(const char *names, size_t number) {
    const char *root = temporary(formatted("splits%zu", number));
    make_folder(root);
    for (const char *at = names; *at; at += strspn(at, ";")) {
        size_t length = strcspn(at, ";");
        const char *name = formatted("splits%zu/%.*s", number, (int)length, at);
        const char *row = formatted("{\"text\": \"%.*s\"}\n", (int)length, at);
        const char *path = temporary(name);
        make_folder(formatted("%.*s", (int)(strrchr(path, '/') - path), path));
        write_text(name, row);
        at += length;
    }
    return root;
}

/* The texts of a data set, with semicolons between them. */
static const char *texts_of(const struct Dataset *data) {
    const char *texts = "";
    for (size_t i = 0; i < data->n; i++) {
        texts = formatted("%s%s%s", texts, i ? ";" : "", data->rows[i].text.data);
    }
    return texts;
}

/* The texts of a folder that are held out from those it trains on. */
static struct Text held_out_texts(const char *root, const struct Dataset *train) {
    return text_of(texts_of(dataset_load_held_out(&test_arena, root, train)));
}

/* Which files of a folder are trained on, and which are held out. The expected ones are the splits
 * train and validation (else test) of datasets.load_dataset 3.1.0 and 5.2.0, in the order of their
 * names; where it has no train split or reads a file twice, `ours` says so. */
static void test_data_splits(void) {
    static const struct {
        const char *files, *train, *held_out;
        bool ours;
    } cases[] = {
        {"train.jsonl;validation.jsonl", "train.jsonl", "validation.jsonl", false},
        {"train.jsonl;valid.jsonl", "train.jsonl", "valid.jsonl", false},
        {"train.jsonl;val.jsonl", "train.jsonl", "val.jsonl", false},
        {"train.jsonl;dev.jsonl", "train.jsonl", "dev.jsonl", false},
        {"train.jsonl;eval.jsonl", "train.jsonl", "eval.jsonl", false},
        {"train.jsonl;evaluation.jsonl", "train.jsonl", "evaluation.jsonl", false},
        {"train.jsonl;test.jsonl", "train.jsonl", "test.jsonl", false},
        {"train.jsonl;testing.jsonl", "train.jsonl", "testing.jsonl", false},
        {"train.jsonl;test.jsonl;val.jsonl", "train.jsonl", "val.jsonl", false},
        {"training.jsonl;data_test.jsonl", "training.jsonl", "data_test.jsonl", false},
        {"train-00000-of-00002.jsonl;train-00001-of-00002.jsonl;test-00000-of-00002.jsonl",
         "train-00000-of-00002.jsonl;train-00001-of-00002.jsonl", "test-00000-of-00002.jsonl",
         false},
        {"train2.jsonl;val2.jsonl", "train2.jsonl", "val2.jsonl", false},
        {"my train.jsonl;my val.jsonl", "my train.jsonl", "my val.jsonl", false},
        {"2024train.jsonl;2024test.jsonl", "2024train.jsonl", "2024test.jsonl", false},
        {"train.v1.jsonl;val.v1.jsonl", "train.v1.jsonl", "val.v1.jsonl", false},
        {"train.jsonl;dev-test.jsonl", "train.jsonl", "dev-test.jsonl", false},
        {"train.jsonl;extra.jsonl;test.jsonl", "train.jsonl", "test.jsonl", false},
        {"a_train.jsonl;train.jsonl;training.jsonl;dev.jsonl",
         "a_train.jsonl;train.jsonl;training.jsonl", "dev.jsonl", false},
        {"train/a.jsonl;test/a.jsonl", "train/a.jsonl", "test/a.jsonl", false},
        {"my-train-set/a.jsonl;dev_2/b.jsonl", "my-train-set/a.jsonl", "dev_2/b.jsonl", false},
        {"sub/train.jsonl;sub/dev.jsonl", "sub/train.jsonl", "sub/dev.jsonl", false},
        {"a/b/train/c/d.jsonl;a/b/test/c/d.jsonl", "a/b/train/c/d.jsonl", "a/b/test/c/d.jsonl",
         false},
        {"train/val.jsonl;val/train.jsonl", "train/val.jsonl", "val/train.jsonl", false},
        {"train/a.jsonl;old_train.jsonl;dev/a.jsonl", "train/a.jsonl", "dev/a.jsonl", false},
        {"train.jsonl/a.jsonl;b.jsonl;val/c.jsonl", "train.jsonl/a.jsonl", "val/c.jsonl", false},
        {"data/train-00000-of-00001.jsonl;data/test-00000-of-00001.jsonl;train_old.jsonl",
         "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", false},
        {"data/train-00000-of-00001-abc.jsonl;data/foo.jsonl;data/test-00000-of-00001-abc.jsonl",
         "data/train-00000-of-00001-abc.jsonl", "data/test-00000-of-00001-abc.jsonl", false},
        {"data/train-00000-of-00001.jsonl;train/a.jsonl;data/validation-00000-of-00001.jsonl",
         "data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl", false},
        {"__x__/train.jsonl;.y/train.jsonl;.train.jsonl;train.jsonl;test.jsonl", "train.jsonl",
         "test.jsonl", false},
        {"trainer.jsonl;tests.jsonl;testimonials.jsonl",
         "testimonials.jsonl;tests.jsonl;trainer.jsonl", NULL, false},
        {"pretrain.jsonl;posttest.jsonl", "posttest.jsonl;pretrain.jsonl", NULL, false},
        {"train+x.jsonl;test+x.jsonl", "test+x.jsonl;train+x.jsonl", NULL, false},
        {"a.jsonl;b.jsonl", "a.jsonl;b.jsonl", NULL, false},
        {"sub/a.jsonl;b.jsonl", "b.jsonl;sub/a.jsonl", NULL, false},
        {"a.jsonl;test.jsonl", "a.jsonl", "test.jsonl", true},
        {"train/a.jsonl;validation.jsonl", "train/a.jsonl", "validation.jsonl", true},
        {"train_test.jsonl;b.jsonl;test.jsonl", "train_test.jsonl", "test.jsonl", true},
        {"train_train.jsonl;dev.jsonl", "train_train.jsonl", "dev.jsonl", true},
        {"Train.jsonl;Validation.jsonl", "Train.jsonl", "Validation.jsonl", true},
        {"data/train_prefs-00000-of-00001.jsonl;data/test_prefs-00000-of-00001.jsonl",
         "data/train_prefs-00000-of-00001.jsonl", "data/test_prefs-00000-of-00001.jsonl", true},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *root = folder_of_splits(cases[i].files, i);
        capture_begin();
        struct Dataset *train = dataset_load(&test_arena, root, TEXT_SHAPES, 1);
        capture_end();
        expect_text(cases[i].files, text_of(texts_of(train)), cases[i].train);
        if (!cases[i].held_out)
            continue;
        capture_begin();
        struct Text held_out = held_out_texts(root, train);
        capture_end();
        expect_text(cases[i].files, held_out, cases[i].held_out);
    }
}

static void load_one_dataset(const void *path) {
    dataset_load(&test_arena, path, TEXT_SHAPES, 1);
}

static void load_folder_held_out(const void *path) {
    const struct Dataset *train = dataset_load(&test_arena, path, TEXT_SHAPES, 1);
    dataset_load_held_out(&test_arena, temporary("splits105"), train);
}

/* What is said of a folder's files: which are read and which are not; nothing if all are; what is
 * missing. A training's own rows are never held out. */
static void test_data_splits_said(void) {
    const char *root = folder_of_splits("train.jsonl;validation.jsonl;test.jsonl", 100);
    capture_begin();
    struct Dataset *train = dataset_load(&test_arena, root, TEXT_SHAPES, 1);
    dataset_load_held_out(&test_arena, root, train);
    struct Text said = capture_end();
    expect_holds("training", said,
                 "splits100: read train.jsonl; left out test.jsonl, validation.jsonl\n");
    expect_holds("held out", said,
                 "splits100: read validation.jsonl as held-out data; left out test.jsonl, "
                 "train.jsonl\n");
    capture_begin();
    dataset_load(&test_arena, folder_of_splits("a.jsonl;b.jsonl", 101), TEXT_SHAPES, 1);
    expect_count("nothing left out, nothing said", capture_end().length, 0);
    root = folder_of_splits("a.jsonl;b.jsonl", 100); /* now of one folder with the others */
    train = dataset_load(&test_arena, temporary("splits100/train.jsonl"), TEXT_SHAPES, 1);
    capture_begin();
    expect_text("one file of it trained on", held_out_texts(root, train), "validation.jsonl");
    train = dataset_load(&test_arena, temporary("splits101/a.jsonl"), TEXT_SHAPES, 1);
    expect_text("the rest of it", held_out_texts(temporary("splits101"), train), "b.jsonl");
    train = dataset_load(&test_arena, folder_of_splits("train.jsonl", 102), TEXT_SHAPES, 1);
    expect_text("a folder of its own", held_out_texts(folder_of_splits("train.jsonl", 103), train),
                "train.jsonl");
    capture_end();
    expect_end("only held-out files", load_one_dataset,
               folder_of_splits("test.jsonl;dev.jsonl", 104), 1,
               "splits104: no row with \"text\" was found but in held-out data (dev.jsonl, "
               "test.jsonl); name the file that is meant: ");
    folder_of_splits("only.jsonl", 105);
    expect_end("nothing is held out", load_folder_held_out, temporary("splits105"), 1,
               "splits105: no held-out row with \"text\" was found: the training reads what is "
               "there (only.jsonl)");
    write_json("splits105/only.jsonl", "{'prompt': 'a'}\n");
    expect_end("another shape", load_one_dataset, temporary("splits105"), 1,
               "only.jsonl:1: expected \"text\", found \"prompt\"");
}

/* A link to a folder may lead back: its files are not read a second time. */
static void test_data_splits_links(void) {
#ifndef _WIN32
    const char *root = folder_of_splits("train.jsonl;sub/train.jsonl", 110);
    bool is_linked = symlink(".", temporary("splits110/again")) == 0;
    expect_true("a link", is_linked && symlink("sub", temporary("splits110/other")) == 0);
    struct Dataset *data = dataset_load(&test_arena, root, TEXT_SHAPES, 1);
    expect_text("each file once", text_of(texts_of(data)), "sub/train.jsonl;train.jsonl");
#endif
}

/* A data set that writes the end token's name is told so once, with the number of rows that do.
 * Fields that the shape does not use, and parts of the name, do not count. */
static void test_data_written_ends(void) {
#define END "<|endoftext|>"
    static const struct {
        const char *rows;
        const unsigned *shapes;
        const char *note;
    } cases[] = {
        {"{'text': 'a" END "'}\n{'text': 'b'}\n{'text': '" END "c'}\n", TEXT_SHAPES,
         "2 of 3 rows contain \"" END "\""},
        {"{'text': 'a\\u0000" END "'}\n", TEXT_SHAPES, "1 of 1 rows contain"},
        {"{'prompt': 'a', 'completion': 'b" END "'}\n", SFT_SHAPES, "1 of 1 rows contain"},
        {"{'prompt': '" END "a', 'completion': 'b'}\n", SFT_SHAPES, "1 of 1 rows contain"},
        {"{'chosen': 'b', 'rejected': 'c" END "'}\n", DPO_SHAPES, "1 of 1 rows contain"},
        {"{'prompt': '" END "a', 'chosen': 'b', 'rejected': 'c'}\n", DPO_SHAPES,
         "1 of 1 rows contain"},
        {"{\"text\": \"<|endoftext| >\"}\n{\"text\": \"<|endoftext|\"}\n{\"text\": \"\"}\n",
         TEXT_SHAPES, NULL},
        {"{'text': 'a', 'completion': '" END "'}\n", TEXT_SHAPES, NULL},
    };
#undef END
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct Dataset *data = dataset_of(cases[i].rows, cases[i].shapes, 1);
        capture_begin();
        warn_of_written_ends(data, tokenizer);
        struct Text said = capture_end();
        bool good = cases[i].note ? strstr(said.data, cases[i].note) != NULL : said.length == 0;
        expect_true(cases[i].rows, good);
    }
}

/* Data in another format is refused by the format's name, with the command that converts it. */
static void test_data_formats(void) {
    static const char *const cases[][2] = {
        {"[{'text': 'a'}]\n", "data.jsonl: is a JSON array"},
        {"\xef\xbb\xbf\n [\n", "is a JSON array"},
        {"PAR1\x15", "is Parquet"},
        {"ARROW1", "is an Arrow file"},
        {"\xff\xff\xff\xff\x10", "is an Arrow stream"},
        {"\x1f\x8b\x08", "is compressed by gzip"},
        {"\x28\xb5\x2f\xfd\x04", "is compressed by zstd"},
        {"BZh91AY", "is compressed by bzip2"},
        {"\xfd"
         "7zXZ",
         "is compressed by xz"},
        {"PK\x03\x04", "is a zip archive"},
        {"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"},
        {"id,text\n1,good\n", "is a table (CSV)"},
        {"\xef\xbb\xbf'text','label'\r\n", "is a table (CSV)"},
        {"text\ngood\n", "is a table (CSV)"},
        {"label\ttext\n1\tgood\n", "is a table (TSV)"},
        {"A good, and fine, film.\n", "data.jsonl:1: not JSON: a value was expected (byte 1); one "
                                      "object a line"},
        {"{\n  'text': 'a'\n}\n", "data.jsonl:1: not JSON: a member's name in quotes was expected "
                                  "(byte 2); the object goes on in the next line"},
        {"{'text': 'a',\r\n 'label': 1}\n", "the object goes on in the next line, it must be on "
                                            "one; run: jq -c . "},
        {"{'text':\n 'a'}\n", "the object goes on in the next line"},
        {"{'messages': [{'role': 'user', 'content': 'Hi'}]}\n", "data.jsonl:1: \"messages\" is a "
                                                                "chat"},
        {"{'text': [{'role': 'user', 'content': 'Hi'}]}\n", "data.jsonl:1: \"text\" is a chat"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        expect_end(cases[i][0], load_one_dataset, write_json("data.jsonl", cases[i][0]), 1,
                   cases[i][1]);
    }
    const char *chat = "{'prompt': 'Hi', 'chosen': [{'role': 'user'}], 'rejected': []}\n";
    expect_end("a preference", load_one_comparison, write_json("data.jsonl", chat), 1,
               "data.jsonl:1: \"chosen\" is a chat, a list of messages, a string was expected "
               "(GPT-2 has no chat template); flatten it: python3 -c ");
    make_folder(temporary("chats"));
    write_json("chats/a.jsonl", "{'messages': [{'role': 'user', 'content': 'Hi'}]}\n");
    expect_end("a folder of chats", load_one_dataset, temporary("chats"), 1,
               "chats/a.jsonl:1: \"messages\" is a chat");
    expect_end("by its name", load_one_dataset, write_text("data.csv", "review;stars\n"), 1,
               "data.csv: is a table (CSV)");
}

static void load_one_rollout(const void *path) {
    dataset_load(&test_arena, path, ROLLOUT_SHAPES, 1);
}

/* Data: the line is named, with what was expected and found. */
static void test_broken_data(void) {
    static const char *const cases[][2] = {
        {"{'text': 'a'}\n\n{'text': 'b'\n", "data.jsonl:3: not JSON: ',' or '}' was expected"},
        {"{'text': 1}\n", "data.jsonl:1: \"text\" must be a string"},
        {"3\n", "data.jsonl:1: a JSON object"},
        {"{'prompt': 'a'}\n", "data.jsonl:1: expected \"text\", found \"prompt\""},
        {"{'text': 'a'}\n{'other': 'b'}\n", "data.jsonl:2: expected \"text\", found no field that "
                                            "is known"},
        {"", "no row with \"text\" was found"},
        {"\n \n", "no row with \"text\" was found"},
        {"{'text': 'a'} x", "something follows its end"},
        {"\xef\xbb\xbf{'text': 'a'}\r\n{'text': 3}\r\n", "data.jsonl:2: \"text\" must be a string"},
        {"{'text': 'a'}\n{'text': 'caf\xe9'}\n", "data.jsonl:2: not JSON: a string that is not "
                                                 "UTF-8; save the file as UTF-8 (byte 14)"},
        {"{'text': 'a', 'score': 1e999}", "a number beyond"},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        expect_end(cases[i][0], load_one_dataset, write_json("data.jsonl", cases[i][0]), 1,
                   cases[i][1]);
    expect_end("label", load_one_label, write_json("data.jsonl", "{'text': 'a', 'label': 2}"), 1,
               "\"label\" must be 0 or 1");
    expect_end("score", load_one_comparison,
               write_json("data.jsonl", "{'text': 'a', 'score': 'high'}"), 1,
               "\"score\" must be a number");
    const char *negative = "{'query_ids': [1, -2], 'response_ids': [], 'score': 1}";
    expect_end("id", load_one_rollout, write_json("data.jsonl", negative), 1,
               "\"a token id\" must be a whole number");
    const char *no_list = "{'query_ids': 1.5, 'response_ids': [], 'score': 1}";
    expect_end("ids", load_one_rollout, write_json("data.jsonl", no_list), 1,
               "\"query_ids\" must hold token ids");
    expect_end("no file", load_one_dataset, "/nowhere/data.jsonl", 1,
               "/nowhere/data.jsonl: No such file");
    make_folder(temporary("empty"));
    expect_end("an empty folder", load_one_dataset, temporary("empty"), 1,
               "no row with \"text\" was found");
}

/* vocab.json and merges.txt hold what GPT-2's hold: line 1 of the merges, a few entries; our own
 * files pass the check. */
static void test_tokenizer_save(void) {
    make_folder(temporary("vocabulary"));
    tokenizer_save(tokenizer, temporary("vocabulary"), 1024);
    struct Json *vocab = json_contents("vocabulary/vocab.json");
    size_t count = 0;
    for (struct Json *item = vocab->child; item; item = item->next)
        count++;
    expect_count("entries", count, 1024);
    expect_close("\"!\"", json_get(vocab, "!")->number, 0, 0);
    expect_close("\" the\"", json_get(vocab, "\xc4\xa0the")->number, 262, 0);
    expect_close("the newline", json_get(vocab, "\xc4\x8a")->number, 198, 0);
    expect_close("the end token", json_get(vocab, "<|endoftext|>")->number, 1023, 0);
    struct Text merges = contents("vocabulary/merges.txt");
    expect_true("first merges",
                strncmp(merges.data, "#version: 0.2\n\xc4\xa0 t\n\xc4\xa0 a\nh e\n", 26) == 0);
    size_t lines = 0;
    for (size_t i = 0; i < merges.length; i++)
        lines += merges.data[i] == '\n';
    expect_count("merges", lines, 1 + 1023 - 256);
    tokenizer_check_folder(tokenizer, temporary("vocabulary"), 1024);
}

static void load_one_tokenizer(const void *path) {
    tokenizer_load(&test_arena, path);
}

static void check_vocabulary(const void *tok) {
    tokenizer_check_folder(tok, "/nowhere", 50257);
}

/* tokenizer.bin: another magic, llm.c's version 1, cut short anywhere, merges that cannot be. */
static void test_broken_tokenizer(void) {
    struct Text file = read_file(&test_arena, tokenizer->path);
    char *bytes = arena_alloc(&test_arena, file.length, 1);
    static const struct {
        size_t at;
        char byte;
        const char *message;
    } edits[] = {
        {0, 1, "not a tokenizer.bin of version 2"},
        {4, 1, "not a tokenizer.bin of version 2"},
        {8, 0, "end token"},
        {10, 9, "end token"},
        {1024, 7, "id 0 is not a single byte of its own"},
    };
    for (size_t i = 0; i < COUNT(edits); i++) {
        memcpy(bytes, file.data, file.length);
        bytes[edits[i].at] = edits[i].byte;
        expect_end("tokenizer", load_one_tokenizer,
                   write_bytes("tokenizer.bin", bytes, file.length), 1, edits[i].message);
    }
    for (size_t n = 0; n < file.length; n += file.length / 9)
        expect_end("cut short", load_one_tokenizer, write_bytes("tokenizer.bin", file.data, n), 1,
                   "ends inside its");
    memcpy(bytes, file.data, file.length);
    /* the last ten ranges, Unicode's spaces */
    char *spaces = bytes + file.length - 10 * 8;
    char held[8];
    memcpy(held, spaces, 8);
    memcpy(spaces, spaces + 8, 8);
    memcpy(spaces + 8, held, 8);
    expect_end("ranges out of order", load_one_tokenizer,
               write_bytes("tokenizer.bin", bytes, file.length), 1,
               "a Unicode range from 9 to 13, after one that ends before 33");
    memcpy(bytes, file.data, file.length);
    memcpy((char *)memmem(bytes, file.length, "\4ence", 5) + 1, "enca", 4);
    expect_end("a token that its merge does not make", load_one_tokenizer,
               write_bytes("tokenizer.bin", bytes, file.length), 1, "is not what merge");
    struct Tokenizer small = *tokenizer;
    small.vocab_size = 300;
    expect_end("fewer ids than the model", check_vocabulary, &small, 1, "has 50257 ids, ");
    expect_end("last byte missing", load_one_tokenizer,
               write_bytes("tokenizer.bin", file.data, file.length - 1), 1,
               "ends inside its Unicode classes");
}

/* =============================================================================================
 * Chapter 24 - safetensors, model and adapter folders
 *
 * Models and adapters are written and read as transformers and PEFT do it, bit for bit and under
 * every name they use. Files that are broken, or would compute something else, are refused.
 * ============================================================================================= */

/* Half-precision numbers by hand: ones, halves, largest, smallest normal, subnormals, zeros,
 * infinities. */
static void test_safetensors_half(void) {
    static const struct {
        uint16_t bits;
        double value;
    } f16[] = {{0x3c00, 1},
               {0xc000, -2},
               {0x3800, 0.5},
               {0x3e00, 1.5},
               {0x7bff, 65504},
               {0x0400, 0x1p-14},
               {0x0001, 0x1p-24},
               {0x03ff, 1023 * 0x1p-24},
               {0x8200, -0x1p-15},
               {0, 0},
               {0x3555, 0.333251953125},
               {0x7c00, INFINITY},
               {0xfc00, -INFINITY},
               {0x7e01, NAN}};
    static const struct {
        uint16_t bits;
        double value;
    } bf16[] = {{0x3f80, 1},           {0xc000, -2},
                {0x3eab, 0.333984375}, {0x7f7f, 0x1.fep127},
                {0x0080, 0x1p-126},    {0x0001, 0x1p-133},
                {0x8001, -0x1p-133},   {0, 0},
                {0x7f80, INFINITY},    {0xff80, -INFINITY},
                {0x7fc0, NAN}};
    for (size_t i = 0; i < COUNT(f16); i++)
        expect_close("F16", float_of_f16(f16[i].bits), f16[i].value, 0);
    for (size_t i = 0; i < COUNT(bf16); i++)
        expect_close("BF16", float_of_bf16(bf16[i].bits), bf16[i].value, 0);
    expect_true("-0", signbit(float_of_f16(0x8000)) && signbit(float_of_bf16(0x8000)));
    unsigned char bytes[] = {0x00, 0x3c, 0x00, 0xc0};
    float x[2];
    safetensors_convert(x, bytes, 2, "F16");
    expect_true("little-endian", x[0] == 1 && x[1] == -2);
}

/* A written file is laid out as the format says, and read back bit for bit. */
static void test_safetensors_round_trip(void) {
    struct Tensor a = {.name = "wte.weight", .shape = {3, 10007}, .ndim = 2, .n = 30021};
    struct Tensor b = {.name = "v_head.summary.bias", .shape = {1}, .ndim = 1, .n = 1};
    struct Tensor *tensors[] = {&a, &b};
    a.w = random_floats(a.n, 1);
    b.w = random_floats(b.n, 1);
    safetensors_write(folder, "round.safetensors", tensors, 2, "transformer.");
    struct Text file = contents("round.safetensors");
    size_t length = 0;
    for (int i = 0; i < 8; i++)
        length |= (size_t)(unsigned char)file.data[i] << 8 * i;
    expect_count("data on an 8-byte boundary", length % 8, 0);
    expect_count("bytes of the file", file.length, 8 + length + 4 * (a.n + b.n));
    struct SafeTensors st = safetensors_open(&test_arena, temporary("round.safetensors"));
    struct Tensor read_a = a;
    struct Tensor read_b = b;
    read_a.w = random_floats(a.n, 1);
    read_b.w = random_floats(b.n, 1);
    expect_true("found with its prefix", tensor_load(&st, &read_a));
    expect_true("the head without",
                json_get(st.header, "v_head.summary.bias") && tensor_load(&st, &read_b));
    expect_bits("a", read_a.w, a.w, a.n);
    expect_bits("b", read_b.w, b.w, b.n);
    struct Tensor absent = {.name = "nobody", .shape = {1}, .ndim = 1, .n = 1, .w = b.w};
    expect_true("what is not there is not found", !tensor_load(&st, &absent));
    fclose(st.file);
}

/* Known prefixes, in any order, are no part of a tensor's name; others are. */
static void test_bare_name(void) {
    static const char *const cases[][2] = {
        {"wte.weight", "wte.weight"},
        {"transformer.wte.weight", "wte.weight"},
        {"module._orig_mod.transformer.h.0.ln_1.bias", "h.0.ln_1.bias"},
        {"_orig_mod.module.h.0.ln_1.bias", "h.0.ln_1.bias"},
        {"pretrained_model.transformer.h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.weight"},
        {"module.v_head.summary.bias", "v_head.summary.bias"},
        {"base_model.model._orig_mod.transformer.h.0.ln_1.bias", "h.0.ln_1.bias"},
        {"foo.wte.weight", "foo.wte.weight"},
        {"modules.wte.weight", "modules.wte.weight"},
        {"transformer.", ""},
        {"", ""},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        expect_text(cases[i][0], text_of(bare_name(cases[i][0])), cases[i][1]);
}

/* A model with all its heads, saved and loaded: the same bits and configuration. */
static void test_model_save(void) {
    struct GPT2 *model =
        owned(gpt2_new((struct GPT2Config){300, 24, 12, 2, 3, 299, 298, 1e-6f, 297, {0}}));
    reward_head_declare(model);
    value_head_declare(model);
    fill_random(model);
    model_save(model, temporary("saved"), tokenizer);
    struct GPT2 *loaded = owned(gpt2_load(temporary("saved")));
    expect_same_weights("weights", loaded, model);
    const struct GPT2Config *a = &loaded->config;
    const struct GPT2Config *b = &model->config;
    expect_true("sizes", a->vocab_size == b->vocab_size && a->n_positions == b->n_positions
                             && a->n_embd == b->n_embd && a->n_layer == b->n_layer
                             && a->n_head == b->n_head);
    expect_true("ids and epsilon", a->eos_token_id == 299 && a->pad_token_id == 298
                                       && a->bos_token_id == 297 && a->layer_norm_epsilon == 1e-6f);
    expect_true("both heads", loaded->score.n == 12 && loaded->v_head.weight.n == 12
                                  && loaded->v_head.bias.n == 1);
    tokenizer_check_folder(tokenizer, temporary("saved"), 300);
}

/* config.json's special tokens, absent, null, in a list of one; tokenizer_config.json gives each
 * the name that its id has. */
static void test_model_special_tokens(void) {
#define END "<|endoftext|>"
    static const struct {
        const char *json;
        int eos, pad, bos;
        const char *names[3];
        bool split;
    } cases[] = {
        {"\"vocab_size\": 300", 299, 299, 299, {END, END, END}, false},
        {"\"eos_token_id\": null, \"pad_token_id\": null, \"bos_token_id\": null",
         50256,
         50256,
         50256,
         {END, END, END},
         false},
        {"\"vocab_size\": 300, \"eos_token_id\": [13]", 13, 13, 299, {".", ".", END}, true},
        {"\"eos_token_id\": 198, \"pad_token_id\": 262, \"bos_token_id\": 0",
         198,
         262,
         0,
         {"\xc4\x8a", "\xc4\xa0the", "!"},
         true},
        {"\"vocab_size\": 300, \"bos_token_id\": 50256", 299, 299, 299, {END, END, END}, false},
        {"\"vocab_size\": 50300, \"bos_token_id\": 50299",
         50256,
         50256,
         50299,
         {END, END, NULL},
         false},
    };
#undef END
    make_folder(temporary("special"));
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *format = "{%s, \"n_embd\": 4, \"n_head\": 1}";
        struct Text text = text_of(formatted(format, cases[i].json));
        write_bytes("special/config.json", text.data, text.length);
        struct GPT2Config c = config_load(temporary("special"), &(bool){false});
        expect_count("end token", (size_t)c.eos_token_id, (size_t)cases[i].eos);
        expect_count("padding token", (size_t)c.pad_token_id, (size_t)cases[i].pad);
        expect_count("beginning token", (size_t)c.bos_token_id, (size_t)cases[i].bos);
        tokenizer_config_save(tokenizer, temporary("special"), &c);
        const char *path = temporary("special/tokenizer_config.json");
        struct Json *saved = json_read_file(&test_arena, path);
        static const char *const keys[] = {"eos_token", "pad_token", "bos_token"};
        for (size_t k = 0; k < COUNT(keys); k++) {
            struct Json *name = json_get(saved, keys[k]);
            const char *want = cases[i].names[k];
            expect_true(keys[k],
                        want ? json_is_string(name, want) : name && name->type == JSON_NULL);
        }
        bool split = json_get(saved, "split_special_tokens") != NULL;
        expect_true("split_special_tokens", split == cases[i].split);
        struct Json *class = json_get(saved, "tokenizer_class");
        expect_true("tokenizer_class", json_is_string(class, "GPT2Tokenizer"));
    }
}

/* The same model as transformers may write it: without prefix, in shards, in half precision,
 * with other tensors beside. */
static void test_gpt2_load(void) {
    struct GPT2 *model = empty_model(300, 24, 12, 2, 3);
    fill_random(model);
    for (size_t i = 0; i < model->tensor_count; i++) /* numbers that bfloat16 can hold */
        for (size_t k = 0; k < model->tensors[i]->n; k++)
            model->tensors[i]->w[k] =
                float_of_bits(bits_of_float(model->tensors[i]->w[k]) & 0xffff0000u);
    model_save(model, temporary("plain"), NULL);
    struct Tensor *extra[40];
    struct Tensor odd = {
        .name = "h.0.attn.bias",
        .shape = {2, 2},
        .ndim = 2,
        .n = 4,
        .w = random_floats(4, 1),
    };
    memcpy(extra, model->tensors, model->tensor_count * sizeof *extra);
    extra[model->tensor_count] = &odd;
    safetensors_write(temporary("plain"), "model.safetensors", extra, model->tensor_count + 1, "");
    struct GPT2 *loaded = owned(gpt2_load(temporary("plain")));
    expect_same_weights("without prefix", loaded, model);
    unlink(temporary("plain/model.safetensors"));
    safetensors_write(temporary("plain"), "a.safetensors", model->tensors, 5, "transformer.");
    safetensors_write(temporary("plain"), "b.safetensors", model->tensors + 5,
                      model->tensor_count - 5, "transformer.");
    write_json("plain/model.safetensors.index.json", "{'metadata': {}, 'weight_map': {'x': "
                                                     "'b.safetensors', 'y': 'a.safetensors', 'z': "
                                                     "'b.safetensors'}}");
    loaded = owned(gpt2_load(temporary("plain")));
    expect_same_weights("in shards", loaded, model);
    size_t n;
    size_t used = 0;
    float *all = all_weights(model, &n);
    unsigned char *file = arena_alloc(&test_arena, 8 + 8192 + 2 * n, 1);
    used = 8 + (size_t)sprintf((char *)file + 8, "{");
    for (size_t i = 0, offset = 0; i < model->tensor_count; offset += 2 * model->tensors[i++]->n) {
        struct Tensor *t = model->tensors[i];
        used +=
            (size_t)sprintf((char *)file + used, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%zu%s",
                            i ? "," : "", t->name, t->shape[0], t->ndim == 2 ? "," : "");
        if (t->ndim == 2)
            used += (size_t)sprintf((char *)file + used, "%zu", t->shape[1]);
        used += (size_t)sprintf((char *)file + used, "],\"data_offsets\":[%zu,%zu]}", offset,
                                offset + 2 * t->n);
    }
    used += (size_t)sprintf((char *)file + used, "}");
    for (int i = 0; i < 8; i++)
        file[i] = (unsigned char)((uint64_t)(used - 8) >> 8 * i);
    for (size_t i = 0; i < n; i++) {
        file[used++] = (unsigned char)(bits_of_float(all[i]) >> 16);
        file[used++] = (unsigned char)(bits_of_float(all[i]) >> 24);
    }
    write_bytes("plain/model.safetensors", file, used);
    loaded = owned(gpt2_load(temporary("plain")));
    expect_same_weights("in bfloat16", loaded, model);
}

/* A folder's config.json with `from` replaced, its weights from a list of tensors. */
static const char *odd_model(const char *name, struct Text config, const char *from, const char *to,
                             struct Tensor **tensors, size_t count, const char *prefix) {
    make_folder(temporary(name));
    struct Text text = replaced(config, from, to);
    write_bytes(formatted("%s/config.json", name), text.data, text.length);
    safetensors_write(temporary(name), "model.safetensors", tensors, count, prefix);
    return temporary(name);
}

/* gpt2_load, and what it says. */
static struct GPT2 *load_and_listen(const char *path, struct Text *said) {
    capture_begin();
    struct GPT2 *model = owned(gpt2_load(path));
    *said = capture_end();
    return model;
}

/* The output layer, as files hold it: once, under either of its names, or twice and equal. Of its
 * own it is refused, and so is one that transformers would draw at random. */
static void test_output_layer(void) {
    enum Holds { NOT, EQUAL, OTHER };
    static const struct {
        bool wte;
        enum Holds lm_head;
        const char *tie, *prefix, *message;
    } cases[] = {
        {true, NOT, "true", "transformer.", ""},
        {true, NOT, "null", "", ""},
        {true, EQUAL, "true", "transformer.", ""},
        {true, EQUAL, "null", "module.", ""},
        {false, EQUAL, "true", "transformer.", ""},
        {false, EQUAL, "null", "pretrained_model.transformer.", ""},
        {true, EQUAL, "false", "transformer.", "equals wte.weight: they are one tensor here"},
        {true, OTHER, "true", "transformer.", "lm_head.weight is not wte.weight (number 7 is "},
        {true, OTHER, "null", "_orig_mod.", "lm_head.weight is not wte.weight (number 7 is "},
        {true, OTHER, "false", "transformer.", "an output layer of its own is not implemented"},
        {true, NOT, "false", "transformer.", "is false in config.json, but there is no lm_head"},
        {false, EQUAL, "false", "transformer.", "is false in config.json, but there is no wte"},
        {false, NOT, "true", "transformer.", "wte.weight is missing; expected shape [300, 12]"},
    };
    struct GPT2 *model = new_model(300, 24, 12, 1, 3);
    struct GPT2 *loaded;
    struct Tensor lm_head = model->wte;
    struct Tensor *tensors[32];
    struct Text said;
    model_save(model, temporary("head"), NULL);
    struct Text config = contents("head/config.json");
    snprintf(lm_head.name, sizeof lm_head.name, "lm_head.weight");
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t count = 0;
        lm_head.w =
            memcpy(arena_floats(&test_arena, lm_head.n), model->wte.w, lm_head.n * sizeof(float));
        if (cases[i].lm_head == OTHER)
            lm_head.w[7] += 1;
        if (cases[i].lm_head != NOT)
            tensors[count++] = &lm_head;
        for (size_t k = cases[i].wte ? 0 : 1; k < model->tensor_count; k++)
            tensors[count++] = model->tensors[k];
        const char *tie = formatted("'tie_word_embeddings': %s", cases[i].tie);
        const char *path = odd_model("head", config, "'tie_word_embeddings': true", tie, tensors,
                                     count, cases[i].prefix);
        bool good = !*cases[i].message || strstr(cases[i].message, "equals");
        if (!good)
            expect_end(tie, load_one_model, path, 1, cases[i].message);
        if (!good)
            continue;
        loaded = load_and_listen(path, &said);
        expect_same_weights(tie, loaded, model);
        expect_true(tie, *cases[i].message ? strstr(said.data, cases[i].message) != NULL
                                           : said.length == 0);
    }
    unlink(temporary("head/model.safetensors"));
    safetensors_write(temporary("head"), "a.safetensors", tensors, 4, "");
    safetensors_write(temporary("head"), "b.safetensors", (struct Tensor *[]){&lm_head}, 1, "");
    write_json("head/model.safetensors.index.json", "{'weight_map': {'x': 'b.safetensors', 'y': "
                                                    "'a.safetensors'}}");
    write_bytes("head/config.json", config.data, config.length);
    expect_end("lm_head in one file, most of the rest missing", load_one_model, temporary("head"),
               1, "is missing");
    safetensors_write(temporary("head"), "a.safetensors", model->tensors, model->tensor_count, "");
    loaded = load_and_listen(temporary("head"), &said);
    expect_same_weights("wte and lm_head in two files", loaded, model);
    lm_head.w[3] = -lm_head.w[3];
    safetensors_write(temporary("head"), "b.safetensors", (struct Tensor *[]){&lm_head}, 1, "");
    expect_end("unlike, in two files", load_one_model, temporary("head"), 1,
               "lm_head.weight is not wte.weight (number 3 is ");
}

/* Settings by GPT2Config's other names; activations that are gelu_new by another; tensors that have
 * no place are named. */
static void test_config_names(void) {
    static const char *const edits[][3] = {
        {"'n_head': 3", "'num_attention_heads': 3", ""},
        {"'n_head': 3", "'n_head': null, 'num_attention_heads': 3", ""},
        {"'n_head': 3", "'n_head': 3, 'num_attention_heads': 3", ""},
        {"'n_embd': 12", "'hidden_size': 12", ""},
        {"'n_layer': 2", "'num_hidden_layers': 2", ""},
        {"'n_positions': 24", "'max_position_embeddings': 24", ""},
        {"  'n_positions': 24,", "", ""},
        {"'n_ctx': 24", "'n_ctx': 99", ""},
        {"'gelu_new'", "'gelu_pytorch_tanh'", ""},
        {"'gelu_new'", "'gelu_fast'", ""},
        {"'use_cache': true", "'reorder_and_upcast_attn': true, 'pruned_heads': {}", ""},
        {"'gelu_new'", "'gelu'", "gelu_new is implemented, gelu is not"},
        {"'gelu_new'", "'quick_gelu'", "quick_gelu is not"},
        {"'n_head': 3", "'n_head': 3, 'num_attention_heads': 4",
         "\"n_head\" is 3, but \"num_attention_heads\", another name for it, is 4"},
        {"'n_embd': 12", "'hidden_size': 24, 'n_embd': 12",
         "\"n_embd\" is 12, but \"hidden_size\""},
        {"'use_cache': true", "'scale_attn_by_inverse_layer_idx': true",
         "\"scale_attn_by_inverse_layer_idx\": false is implemented, true is not"},
        {"'use_cache': true", "'quantization_config': {'quant_method': 'gptq'}",
         "\"quantization_config\": null is implemented, gptq is not"},
        {"'use_cache': true", "'pruned_heads': {'0': [1]}",
         "\"pruned_heads\": null is implemented, a list is not"},
    };
    struct GPT2 *model = new_model(300, 24, 12, 2, 3);
    struct Text said;
    model_save(model, temporary("names"), NULL);
    struct Text config = contents("names/config.json");
    for (size_t i = 0; i < COUNT(edits); i++) {
        const char *path = odd_model("names", config, edits[i][0], edits[i][1], model->tensors,
                                     model->tensor_count, "transformer.");
        if (*edits[i][2])
            expect_end(edits[i][1], load_one_model, path, 1, edits[i][2]);
        if (*edits[i][2])
            continue;
        struct GPT2 *loaded = load_and_listen(path, &said);
        expect_same_weights(edits[i][1], loaded, model);
        expect_count("heads, positions", 100 * loaded->config.n_head + loaded->config.n_positions,
                     324);
        expect_text("nothing to say", said, "");
    }
    (void)(load_and_listen(odd_model("names", config, "'n_layer': 2", "'n_layer': 1",
                                     model->tensors, model->tensor_count, "transformer."),
                           &said));
    expect_holds("a block that config.json does not count", said,
                 "not read: 12, the first is transformer.h.1.ln_1.weight");
    expect_end("another prefix", load_one_model,
               odd_model("names", config, "12", "12", model->tensors, model->tensor_count,
                         "model.decoder."),
               1,
               "tensor wte.weight is missing; expected shape [300, 12]; there is "
               "model.decoder.wte.weight");
    struct Tensor *twice[40];
    struct Tensor again = model->wte;
    memcpy(twice + 1, model->tensors, model->tensor_count * sizeof *twice);
    snprintf(again.name, sizeof again.name, "module.wte.weight");
    twice[0] = &again;
    expect_end("one tensor under two names", load_one_model,
               odd_model("names", config, "12", "12", twice, model->tensor_count + 1,
                         "transformer."),
               1,
               "tensors transformer.module.wte.weight and transformer.wte.weight are both "
               "wte.weight");
}

/* Two labels' rows, in a file of their own, read into a model that `names` says the labels of. */
static struct Text read_two_labels(struct GPT2 *model, struct Tensor *rows, const char *settings) {
    make_folder(temporary("two"));
    write_text("two/config.json", settings);
    safetensors_write(temporary("two"), "score.safetensors", &rows, 1, "");
    struct SafeTensors st = safetensors_open(&test_arena, temporary("two/score.safetensors"));
    model->score.n = 0;
    capture_begin();
    reward_head_load(model, &st, temporary("two"));
    fclose(st.file);
    return capture_end();
}

static void load_odd_labels(const void *settings) {
    struct GPT2 *model = new_model(300, 24, 2, 1, 1);
    struct Tensor rows = {
        .name = "score.weight",
        .shape = {2, 2},
        .ndim = 2,
        .n = 4,
        .w = (float[]){1, 2, 4, 1},
    };
    read_two_labels(model, &rows, settings);
}

/* By hand: rows (1, 2) and (4, 1) are the head (3, -1), or (-3, 1) where the first label's name is
 * the positive one. */
static void test_two_labels(void) {
#define NAMES(zero, one) "{\"id2label\": {\"0\": \"" zero "\", \"1\": \"" one "\"}}"
    static const struct {
        const char *settings;
        float first;
    } cases[] = {
        {"{}", 3},
        {NAMES("NEGATIVE", "POSITIVE"), 3},
        {NAMES("POSITIVE", "NEGATIVE"), -3},
        {NAMES("pos", "neg"), -3},
        {NAMES("Positivo", "other"), -3},
        {NAMES("other", "negative"), -3},
        {NAMES("LABEL_1", "LABEL_0"), -3},
        {NAMES("ham", "spam"), 3},
        {"{\"id2label\": 7, \"problem_type\": null}", 3},
        {"{\"problem_type\": \"single_label_classification\"}", 3},
    };
#undef NAMES
    struct GPT2 *model = new_model(300, 24, 2, 1, 1);
    struct Tensor rows = {
        .name = "score.weight",
        .shape = {2, 2},
        .ndim = 2,
        .n = 4,
        .w = (float[]){1, 2, 4, 1},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct Text said = read_two_labels(model, &rows, cases[i].settings);
        expect_close(cases[i].settings, model->score.w[0], cases[i].first, 0);
        expect_close(cases[i].settings, model->score.w[1], -cases[i].first / 3, 0);
        expect_true("one note", strstr(said.data, "align: note: ") == said.data
                                    && strstr(said.data, "\n") == said.data + said.length - 1);
        if (i == 7)
            expect_holds("names that say nothing are said", said,
                         "the logit of \"spam\" minus that of \"ham\"");
    }
    expect_end("regression", load_odd_labels, "{\"problem_type\": \"regression\"}", 1,
               "\"problem_type\": single_label_classification is implemented, regression is not");
    expect_end("several labels at once", load_odd_labels,
               "{\"problem_type\": \"multi_label_classification\"}", 1,
               "multi_label_classification is not");
    model_save(model, temporary("labels"), NULL);
    struct Tensor three = {
        .name = "score.weight",
        .shape = {3, 2},
        .ndim = 2,
        .n = 6,
        .w = random_floats(6, 1),
    };
    struct Tensor bias = {
        .name = "score.bias",
        .shape = {2},
        .ndim = 1,
        .n = 2,
        .w = random_floats(2, 1),
    };
    safetensors_write(temporary("labels"), "model.safetensors", (struct Tensor *[]){&three}, 1, "");
    expect_end("three labels", load_one_model, temporary("labels"), 1,
               "score.weight has 3 labels; one is a reward, two are a classifier's");
    safetensors_write(temporary("labels"), "model.safetensors", (struct Tensor *[]){&rows, &bias},
                      2, "");
    expect_end("a bias", load_one_model, temporary("labels"), 1,
               "has a score.bias; a GPT-2 classifier has none");
}

/* The reward of a two-label classifier is the log-odds of the sentiment pipeline's softmax:
 * transformers' numbers. */
static void test_two_labels_golden(void) {
    static const struct {
        double logits[2], positive;
    } golden[] = {{{1.9135102, -0.475132018}, 0.0840428844},
                  {{1.32131326, -0.02512566}, 0.206453174}};
    struct GPT2 *model = golden_model();
    struct Tensor rows = {
        .name = "score.weight",
        .shape = {2, 16},
        .ndim = 2,
        .n = 32,
        .w = arena_floats(&test_arena, 32),
    };
    golden_fill(&rows, 100);
    struct Text said =
        read_two_labels(model, &rows, "{\"id2label\": {\"0\": \"LABEL_0\", \"1\": \"LABEL_1\"}}");
    expect_holds("said", said,
                 "the reward is the logit of \"LABEL_1\" minus that of \"LABEL_0\"; saved again, "
                 "it has one label");
    float reward[2];
    reward_score(model, golden_examples(), 2, reward);
    for (size_t i = 0; i < 2; i++) {
        expect_close("difference of the logits", reward[i],
                     golden[i].logits[1] - golden[i].logits[0], 6e-6);
        expect_close("the score of label 1", sigmoid(reward[i]), golden[i].positive, 1e-6);
    }
}

/* An adapter with both heads, saved and attached to its base again: the same bits under PEFT's
 * names. Where target_modules is a regular expression, the file's tensors say which layers it
 * takes. */
static void test_lora_round_trip(void) {
    for (int pattern = 0; pattern < 2; pattern++) {
        struct GPT2 *model = random_model(300, 12, 8, 2, 2);
        struct GPT2 *loaded = owned(gpt2_copy(model));
        const char *path = temporary(pattern ? "lora_pattern" : "lora");
        if (!pattern)
            tensor_normal(reward_head_declare(model), &test_rng, 1);
        if (!pattern)
            value_head_init(model, 3);
        random_adapter(model, 3, "attn.c_proj c_fc");
        model->adapter.use_rslora = true;
        model_save(model, path, pattern ? NULL : tokenizer);
        struct Json *config =
            json_read_file(&test_arena, formatted("%s/adapter_config.json", path));
        struct Json *targets = json_get(config, "target_modules");
        expect_true("adapter_config.json",
                    json_is_string(json_get(config, "peft_type"), "LORA")
                        && json_get(config, "r")->number == 3
                        && json_get(config, "lora_alpha")->number == 6
                        && json_get(config, "use_rslora")->type == JSON_TRUE
                        && json_get(config, "fan_in_fan_out")->type == JSON_TRUE
                        && json_is_string(json_get(config, "base_model_name_or_path"), "base")
                        && json_is_string(json_get(config, "task_type"),
                                          pattern ? "CAUSAL_LM" : "SEQ_CLS"));
        struct Json *saved = json_get(config, "modules_to_save");
        expect_true("target_modules", json_is_string(targets->child, "attn.c_proj")
                                          && json_is_string(targets->child->next, "c_fc"));
        if (pattern)
            expect_true("modules_to_save", saved->type == JSON_NULL);
        else
            expect_true("modules_to_save", json_is_string(saved->child->next, "score"));
        struct SafeTensors st =
            safetensors_open(&test_arena, formatted("%s/adapter_model.safetensors", path));
        size_t entries = 0;
        for (struct Json *item = st.header->child; item; item = item->next)
            entries++;
        fclose(st.file);
        expect_count("metadata, A and B of four layers, score", entries, pattern ? 9 : 10);
        expect_true("PEFT's names",
                    json_get(st.header, "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight")
                        && (json_get(st.header, "base_model.model.score.weight") != NULL)
                               == !pattern);
        if (pattern) {
            const char *name = "lora_pattern/adapter_config.json";
            struct Text text = read_file(&test_arena, temporary(name));
            text = replaced(text, "[\"attn.c_proj\", \"c_fc\"]", "\".*(attn\\\\.c_proj|fc)\"");
            write_bytes(name, text.data, text.length);
        }
        adapter_load(loaded, path);
        expect_count("tensors", loaded->tensor_count, model->tensor_count);
        for (size_t i = 0; i < 8; i++) {
            struct Linear *a = adaptable(loaded, i);
            struct Linear *b = adaptable(model, i);
            expect_count("adapted alike", a->lora_A.n, b->lora_A.n);
            expect_bits("A", a->lora_A.w, b->lora_A.w, b->lora_A.n);
            expect_bits("B", a->lora_B.w, b->lora_B.w, b->lora_B.n);
            if (b->lora_A.n)
                expect_close("6 / sqrt(3)", a->lora_scale, 6 / sqrt(3), 1e-6);
        }
        if (!pattern)
            expect_bits("score", loaded->score.w, model->score.w, 8);
        if (!pattern)
            expect_bits("value head", loaded->v_head.weight.w, model->v_head.weight.w, 8);
        expect_true("heads", pattern ? !loaded->score.n && !loaded->v_head.weight.n
                                     : loaded->v_head.bias.w[0] == model->v_head.bias.w[0]);
    }
}

struct AdapterCase {
    struct GPT2 *base;
    const char *path;
};

static void put_adapter(const void *argument) {
    const struct AdapterCase *c = argument;
    adapter_load(c->base, c->path);
}

static void load_one_adapter(const void *path) {
    struct GPT2 *model = new_model(300, 12, 8, 2, 2);
    adapter_load(model, path);
}

/* An adapter of the second block alone: exclude_modules or layers_to_transform leave it to the
 * file's tensors which layers it takes; saved again it names them one by one. With a copy of the
 * base's embedding it is read, with another one refused; of a whole model beside it only the value
 * head is read. */
static void test_lora_partial(void) {
    static const char *const settings[] = {
        "'layers_to_transform': [1], 'layers_pattern': 'h'",
        "'layers_to_transform': 1",
        "'exclude_modules': ['h.0.attn.c_attn']",
        "'exclude_modules': '.*h.0.*', 'rank_pattern': {}, 'alpha_pattern': {}",
    };
    struct GPT2 *model = random_model(300, 12, 8, 2, 2);
    struct GPT2 *base = owned(gpt2_copy(model));
    random_adapter(model, 3, "c_attn");
    struct Linear *first = &model->h[0].attn.c_attn;
    struct Linear *second = &model->h[1].attn.c_attn;
    tensor_remove(model, &first->lora_A);
    tensor_remove(model, &first->lora_B);
    model_save(model, temporary("partial"), NULL);
    struct Text config = contents("partial/adapter_config.json");
    expect_end("without a setting", load_one_adapter, temporary("partial"), 1,
               "tensor h.0.attn.c_attn.lora_A.weight is missing");
    for (size_t i = 0; i < COUNT(settings); i++) {
        struct Text text = replaced(config, "'r': 3", formatted("%s, 'r': 3", settings[i]));
        struct GPT2 *loaded = owned(gpt2_copy(base));
        struct GPT2 *again = owned(gpt2_copy(base));
        write_bytes("partial/adapter_config.json", text.data, text.length);
        adapter_load(loaded, temporary("partial"));
        expect_count(settings[i], loaded->h[0].attn.c_attn.lora_A.n, 0);
        expect_bits(settings[i], loaded->h[1].attn.c_attn.lora_A.w, second->lora_A.w,
                    second->lora_A.n);
        model_save(loaded, temporary("partial_again"), NULL);
        struct Json *targets =
            json_get(json_contents("partial_again/adapter_config.json"), "target_modules");
        expect_true("its layer by name",
                    targets->number == 1 && json_is_string(targets->child, "h.1.attn.c_attn"));
        adapter_load(again, temporary("partial_again"));
        expect_bits("saved and read again", again->h[1].attn.c_attn.lora_B.w, second->lora_B.w,
                    second->lora_B.n);
        expect_count("and no other", again->tensor_count, base->tensor_count + 2);
    }
    struct Tensor lm_head = base->wte;
    struct Tensor *tensors[] = {&second->lora_A, &second->lora_B, &lm_head, &base->wte};
    snprintf(lm_head.name, sizeof lm_head.name, "lm_head.weight");
    lm_head.w = memcpy(arena_floats(&test_arena, lm_head.n), lm_head.w, lm_head.n * sizeof(float));
    safetensors_write(temporary("partial"), "adapter_model.safetensors", tensors, 4,
                      "base_model.model.transformer.");
    struct GPT2 *loaded = owned(gpt2_copy(base));
    adapter_load(loaded, temporary("partial"));
    expect_count("with the base's embedding", loaded->tensor_count, base->tensor_count + 2);
    loaded = owned(gpt2_copy(base));
    struct GPT2 *other = random_model(300, 12, 8, 2, 2);
    value_head_init(other, 3);
    safetensors_write(temporary("partial"), "model.safetensors", other->tensors,
                      other->tensor_count, "transformer.");
    capture_begin();
    adapter_load(loaded, temporary("partial"));
    struct Text said = capture_end();
    for (size_t i = 0; i < base->tensor_count; i++)
        expect_bits("the base", loaded->tensors[i]->w, base->tensors[i]->w, base->tensors[i]->n);
    expect_bits("value head", loaded->v_head.weight.w, other->v_head.weight.w, 8);
    expect_holds("said", said, "beside an adapter only a value head is read");
    lm_head.w[2] += 1;
    safetensors_write(temporary("partial"), "adapter_model.safetensors", tensors, 3,
                      "base_model.model.transformer.");
    struct AdapterCase one = {base, temporary("partial")};
    expect_end("an output layer of its own", put_adapter, &one, 1,
               "tensor lm_head.weight is not the base's wte.weight (number 2 is ");
}

/* Adapters: settings that would compute something else, tensors that are missing, misshapen, or
 * of another model. */
static void test_lora_broken(void) {
    static const char *const edits[][3] = {
        {"'LORA'", "'IA3'", "\"peft_type\": LORA is implemented, IA3 is not"},
        {"'use_dora': false", "'use_dora': true",
         "\"use_dora\": false is implemented, true is not"},
        {"'r': 3", "'rank_pattern': {'c_fc': 2}, 'r': 3",
         "\"rank_pattern\": null is implemented, a number is not"},
        {"'r': 3", "'alpha_pattern': {'c_fc': 2}, 'r': 3",
         "\"alpha_pattern\": null is implemented, a number is not"},
        {"'bias': 'none'", "'bias': 'all'", "\"bias\": none is implemented, all is not"},
        {"'init_lora_weights': true", "'init_lora_weights': 'pissa'",
         "\"init_lora_weights\": true is implemented, pissa is not"},
        {"'modules_to_save': null", "'modules_to_save': ['ln_f']",
         "\"modules_to_save\": score is implemented, ln_f is not"},
        {"'r': 3", "'r': 0", "\"r\" must be 1 or more"},
        {"'r': 3", "'r': 2.5", "\"r\" must be a whole number"},
        {"'r': 3", "'r': 4", "lora_A.weight: expected shape [4, 8], found [3, 8]"},
        {"'c_fc']", "'c_fc', 'c_attn']",
         "attn.c_attn.lora_A.weight is missing; expected shape [3, 8]"},
        {", 'c_fc']", "]",
         "no layer of this model takes tensor "
         "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"},
        {"['attn.c_proj', 'c_fc']", "['q_proj']", "take no layer of this model"},
        {"'target_modules': [", "'target_modules': [1, ",
         "\"target_modules\" must be a list of names"},
        {"'r': 3", "'r': 16777216", "too few for adapters of \"r\" 16777216"},
    };
    struct GPT2 *model = new_model(300, 12, 8, 2, 2);
    random_adapter(model, 3, "attn.c_proj c_fc");
    model_save(model, temporary("odd_lora"), NULL);
    struct Text config = contents("odd_lora/adapter_config.json");
    for (size_t i = 0; i < COUNT(edits); i++) {
        struct Text text = replaced(config, edits[i][0], edits[i][1]);
        write_bytes("odd_lora/adapter_config.json", text.data, text.length);
        expect_end(edits[i][1], load_one_adapter, temporary("odd_lora"), 1, edits[i][2]);
    }
    write_bytes("odd_lora/adapter_config.json", config.data, config.length);
    const char *model_path = saved_model("lora_base");
    const void *next = words_of("next --model_name_or_path @odd_lora --prompt x --tokenizer "
                                "@tokenizer.bin");
    expect_end("no base", run_command, next, 1, "its base \"base\" is not here");
    expect_end("no adapter", load_one_adapter, model_path, 1, "no adapter_config.json inside");
    unlink(temporary("odd_lora/adapter_model.safetensors"));
    expect_end("no tensors", load_one_adapter, temporary("odd_lora"), 1,
               "no adapter_model.safetensors inside");
}

/* A Git LFS pointer in place of any file that is read. */
static void test_broken_lfs(void) {
    static const char pointer[] = "version https://git-lfs.github.com/spec/v1\noid "
                                  "sha256:4d7a\nsize 548105171\n";
    const char *path = saved_model("lfs");
    struct Text config = contents("lfs/config.json");
    write_text("lfs/config.json", pointer);
    expect_end("config.json", load_one_model, path, 1,
               "lfs/config.json: is a Git LFS pointer, not the file itself; fetch it: git lfs "
               "pull");
    write_bytes("lfs/config.json", config.data, config.length);
    write_text("lfs/model.safetensors", pointer);
    expect_end("weights", load_one_model, path, 1, "lfs/model.safetensors: is a Git LFS pointer");
    struct Text large = replaced(config, "'n_embd': 12", "'n_embd': 1200");
    write_bytes("lfs/config.json", large.data, large.length);
    expect_end("of a large model", load_one_model, path, 1,
               "lfs/model.safetensors: is a Git LFS pointer");
    unlink(temporary("lfs/model.safetensors"));
    write_json("lfs/model.safetensors.index.json", "{'weight_map': {'x': 'a.safetensors'}}");
    write_text("lfs/a.safetensors", pointer);
    expect_end("one file of several", load_one_model, path, 1,
               "lfs/a.safetensors: is a Git LFS pointer");
    expect_end("tokenizer.bin", load_one_tokenizer, write_text("lfs/tokenizer.bin", pointer), 1,
               "tokenizer.bin: is a Git LFS pointer");
    expect_end("data", load_one_dataset, write_text("lfs/data.jsonl", pointer), 1,
               "data.jsonl: is a Git LFS pointer");
}

/* Weights: cut short, of another shape, missing, of an unknown type, with a header that lies or
 * is none; shards elsewhere. */
static void test_broken_weights(void) {
    static const struct {
        const char *what, *from, *to, *message;
    } edits[] = {
        {"wrong shape", "'shape':[300,12]", "'shape':[301,12]",
         "tensor wte.weight: expected shape [300, 12], found [301, 12]"},
        {"transposed", "'shape':[12,36]", "'shape':[36,12]",
         "tensor h.0.attn.c_attn.weight: expected shape [12, 36], found [36, 12]"},
        {"one dimension too many", "'shape':[36]", "'shape':[36,1]",
         "tensor h.0.attn.c_attn.bias: expected shape [36], found [36, 1]"},
        {"missing", "'transformer.ln_f.bias'", "'transformer.ln_f.biax'",
         "tensor ln_f.bias is missing; expected shape [12]"},
        {"unknown type", "'F32'", "'I64'",
         "tensor wte.weight has type I64; F32, F16 and BF16 are read"},
        {"bytes and numbers disagree", "[0,14400]", "[0,14396]", "14396 bytes for 3600 numbers"},
        {"shared bytes", "[14400,15552]", "[14396,15548]",
         "tensors transformer.wte.weight and transformer.wpe.weight share bytes"},
        {"shared bytes of a tensor that is not read", "{'__metadata__'",
         "{'x':{'dtype':'U8','shape':[9],'data_offsets':[3,12]},'__metadata__'", "share bytes"},
        {"bytes outside", "[0,14400]", "[99999999,100014399]", "cut short?"},
        {"backwards", "[0,14400]", "[14400,0]", "cut short?"},
        {"negative", "[0,14400]", "[-4,14396]", "whole number"},
        {"no offsets", "'data_offsets'", "'data_offsetx'", "lacks dtype, shape or data_offsets"},
        {"no JSON", "{'__metadata__'", "('__metadata__'", "in its header"},
        {"no entry", "{'__metadata__'", "{'x':3,'__metadata__'", "tensor x lacks dtype"},
        {"a name that steers the terminal", "{'__metadata__'",
         "{'a\\u001b[31m\\n\\u009bb':3,'__metadata__'", "tensor a?[31m???b lacks dtype"},
    };
    const char *path = saved_model("broken");
    struct Text file = contents("broken/model.safetensors");
    size_t length = (unsigned char)file.data[0] | (size_t)(unsigned char)file.data[1] << 8;
    for (size_t i = 0; i < COUNT(edits); i++) {
        struct Text header =
            replaced((struct Text){file.data + 8, length}, edits[i].from, edits[i].to);
        unsigned char prefix[8] = {(unsigned char)header.length,
                                   (unsigned char)(header.length >> 8)};
        struct Text whole =
            text_join(&test_arena, text_join(&test_arena, (struct Text){(char *)prefix, 8}, header),
                      (struct Text){file.data + 8 + length, file.length - 8 - length});
        write_bytes("broken/model.safetensors", whole.data, whole.length);
        expect_end(edits[i].what, load_one_model, path, 1, edits[i].message);
    }
    write_bytes("broken/model.safetensors", file.data, file.length - 100);
    expect_end("truncated", load_one_model, path, 1, "cut short?");
    write_bytes("broken/model.safetensors", file.data, 500);
    expect_end("truncated in the header", load_one_model, path, 1,
               "or cut short: its header claims");
    write_bytes("broken/model.safetensors", file.data, 5);
    expect_end("five bytes", load_one_model, path, 1,
               "it has 5 bytes, fewer than its 8-byte prefix");
    write_bytes("broken/model.safetensors", "\0\0\0\0\0\0\0\x7f{}", 10);
    expect_end("a header of 9 * 10^18 bytes", load_one_model, path, 1,
               "header claims 9151314442816847872 bytes, 2 follow");
    unlink(temporary("broken/model.safetensors"));
    expect_true("a pipe is made", mkfifo(temporary("broken/model.safetensors"), 0600) == 0);
    expect_end("a pipe, which nobody writes to", load_one_model, path, 1,
               "model.safetensors: is a folder, a pipe or a device");
    unlink(temporary("broken/model.safetensors"));
    expect_end("no weights", load_one_model, path, 1, "no model.safetensors inside");
    static const struct {
        const char *index, *message;
    } indexes[] = {
        {"{'weight_map': {'a': '../x.safetensors'}}", "must name a file of this folder"},
        {"{'weight_map': {'a': 3}}", "must name a file of this folder"},
        {"{'weight_map': {}}", "names no file"},
        {"{}", "no \"weight_map\""},
        {"[", "not JSON"},
    };
    for (size_t i = 0; i < COUNT(indexes); i++) {
        write_json("broken/model.safetensors.index.json", indexes[i].index);
        expect_end("index", load_one_model, path, 1, indexes[i].message);
    }
}

/* A config.json that changes the mathematics, or cannot be. */
static void test_broken_config(void) {
    static const char *const edits[][3] = {
        {"'gelu_new'", "'relu'",
         "\"activation_function\": gelu_new is implemented, relu is not: it changes the "
         "mathematics"},
        {"'n_inner': null", "'n_inner': 100", "n_inner 100 is not implemented"},
        {"'n_head': 3", "'n_head': 5", "n_embd 12 must be a multiple of n_head 5"},
        {"'n_layer': 1", "'n_layer': 0", "n_layer 0"},
        {"'vocab_size': 300", "'vocab_size': 200", "vocab_size 200"},
        {"'n_embd': 12", "'n_embd': 12.5", "\"n_embd\" must be a whole number"},
        {"'tie_word_embeddings': true", "'tie_word_embeddings': 1",
         "\"tie_word_embeddings\": true is implemented, a number is not"},
        {"'use_cache': true", "'scale_attn_weights': false",
         "\"scale_attn_weights\": true is implemented, false is not"},
        {"'use_cache': true", "'add_cross_attention': true",
         "\"add_cross_attention\": false is implemented, true is not"},
        {"'model_type': 'gpt2'", "'model_type': 'llama'",
         "\"model_type\": gpt2 is implemented, llama is not"},
        {"'n_ctx'", "n_ctx", "not JSON"},
        {"'n_positions': 24", "'n_positions': 1000000",
         "config.json describes 12005328 numbers, at least 22 MB; the weights have 0 MB"},
        {"'n_layer': 1,", "'n_layer': 1000000000,", "\"n_layer\" must be a whole number"},
        {"'n_layer': 1,", "'n_layer': 500,", "config.json describes 500 layers"},
        {"'n_embd': 12", "'n_embd': 65535", "describes 51559268040 numbers"},
        {"'eos_token_id': 299", "'eos_token_id': 300",
         "\"eos_token_id\" must be the id of one token, 0 to 299 (vocab_size - 1), found 300"},
        {"'eos_token_id': 299", "'eos_token_id': -1", "found -1"},
        {"'eos_token_id': 299", "'eos_token_id': 1.5", "found 1.5"},
        {"'eos_token_id': 299", "'eos_token_id': '13'", "found a string"},
        {"'eos_token_id': 299", "'eos_token_id': [299, 13]",
         "\"eos_token_id\" lists 2 ids, and one can be used"},
        {"'eos_token_id': 299", "'eos_token_id': []", "lists 0 ids"},
        {"'eos_token_id': 299", "'eos_token_id': [[13]]", "found a list"},
        {"'pad_token_id': 299", "'pad_token_id': -1",
         "\"pad_token_id\" must be the id of one token, 0 to 299 (vocab_size - 1), found -1"},
        {"'pad_token_id': 299", "'pad_token_id': 300", "found 300"},
        {"'pad_token_id': 299", "'pad_token_id': [1, 2]", "\"pad_token_id\" lists 2 ids"},
        {"'bos_token_id': 299", "'bos_token_id': true",
         "\"bos_token_id\" must be the id of one token, 0 to 299 (vocab_size - 1), found true"},
        {"'layer_norm_epsilon': 1e-05", "'layer_norm_epsilon': -1",
         "\"layer_norm_epsilon\" must be"},
        {"'n_layer': 1,", "'n_layer': 1, 'n_layer': 2,", "tensor h.1.ln_1.weight is missing"},
    };
    const char *path = saved_model("odd");
    struct Text config = contents("odd/config.json");
    for (size_t i = 0; i < COUNT(edits); i++) {
        struct Text text = replaced(config, edits[i][0], edits[i][1]);
        write_bytes("odd/config.json", text.data, text.length);
        expect_end(edits[i][1], load_one_model, path, 1, edits[i][2]);
    }
    unlink(temporary("odd/config.json"));
    expect_end("no config.json", load_one_model, path, 1, "no config.json inside");
    expect_end("no folder", load_one_model, "/nowhere/at all", 1,
               "/nowhere/at all: no such folder");
    write_json("odd/vocab.json", "{'!': 0, 'x': 5}");
    write_bytes("odd/config.json", config.data, config.length);
    const void *next = words_of("next --model_name_or_path @odd --prompt x --tokenizer "
                                "@tokenizer.bin");
    expect_end("another vocabulary", run_command, next, 1, "id 5 is \"x\" here, \"&\" in");
    write_json("odd/vocab.json", "{'x\\u001b[2J': 5}");
    expect_end("a token that clears the screen", run_command, next, 1, "id 5 is \"x?[2J\" here");
    unlink(temporary("odd/vocab.json"));
    write_json("odd/tokenizer.json", "{'model': {'vocab': [['!', 0]]}}");
    expect_end("a vocabulary in a list", run_command, next, 1,
               "tokenizer.json: its vocabulary is not an object");
    write_bytes("odd/config.json", "\xef\xbb\xbf", 3);
    expect_end("nothing but a byte order mark", load_one_model, path, 1, "not JSON: it ends");
    struct Text marked = text_join(&test_arena, text_of("\xef\xbb\xbf"), config);
    struct Text said;
    write_bytes("odd/config.json", marked.data, marked.length);
    expect_count("with a byte order mark", (size_t)run_apart(load_one_model, path, &said), 0);
}

/* A model whose numbers break in some way, then what finds it. */
enum Breakage {
    BAD_FILE,
    BAD_SAVE,
    BAD_STEP,
    BAD_GRADIENT,
    BAD_ADAPTER,
    BAD_LOGIT,
    BAD_REWARD,
    BAD_REFERENCE,
    BAD_PPO
};

static void break_numbers(const void *argument) {
    enum Breakage kind = *(const enum Breakage *)argument;
    struct GPT2 *model = new_model(300, 24, 12, 2, 3);
    struct TrainingArguments args = training_arguments();
    struct Example text = random_example(10, 2, 300);
    struct LanguageTask task = {.examples = {[TO_LEARN] = &text}};
    struct Trainer trainer = {
        .model = model,
        .args = args,
        .task =
            {
                .name = "sft",
                .n = 1,
                .data = &task,
                .loss = language_loss,
                .targets = language_targets,
            },
    };
    if (kind == BAD_ADAPTER)
        adapter_new(model, (struct Adapter){.r = 2, .lora_alpha = 4, .target_modules = "c_attn"},
                    1);
    gpt2_make_trainable(model);
    if (kind == BAD_FILE) {
        model->h[1].mlp.c_fc.weight.w[500] = NAN;
        make_folder(temporary("bad_file"));
        config_save(model, temporary("bad_file"));
        safetensors_write(temporary("bad_file"), "model.safetensors", model->tensors,
                          model->tensor_count, "transformer.");
        owned(gpt2_load(temporary("bad_file")));
    } else if (kind == BAD_SAVE) {
        model->ln_f.bias.w[3] = -INFINITY;
        model_save(model, temporary("bad_save"), tokenizer);
    } else if (kind == BAD_STEP || kind == BAD_ADAPTER) {
        trainer.args.learning_rate = 1e30;
        trainer_train(&trainer);
    } else if (kind == BAD_GRADIENT) {
        model->trace.task = "sft";
        model->trace.step = 7;
        model->h[0].attn.c_attn.weight.d[3] = NAN;
        model->h[1].ln_2.weight.d[1] = INFINITY; /* made first: the gradient comes from the end */
        optimizer_step(model, &args, 1e-3, 7);
    } else if (kind == BAD_LOGIT) {
        struct GenerationConfig config = generation_config();
        for (size_t i = 0; i < 12; i++)
            model->ln_f.weight.w[i] = 3e38f;
        struct Sequence s = sequence_start(&test_arena, text.ids, 3, 4, model, test_rng);
        generate(model, &s, 1, &config);
    } else if (kind == BAD_REWARD) {
        float reward;
        for (size_t c = 0; c < 12; c++)
            reward_head_declare(model)->w[c] = c % 2 ? 3e38f : -3e38f;
        for (size_t i = 0; i < 12; i++)
            model->ln_f.weight.w[i] = 1e10f;
        reward_score(model, &text, 1, &reward);
    } else if (kind == BAD_REFERENCE) {
        struct Example pair[] = {text, random_example(9, 2, 300)};
        struct GPT2 *ref = owned(gpt2_copy(model));
        for (size_t i = 0; i < 12; i++)
            ref->ln_f.weight.w[i] = 3e38f;
        dpo_task(&trainer, &test_arena, ref, (struct DPOConfig){.beta = 0.1, .weight = {1}}, 1,
                 pair, 1);
        trainer_train(&trainer);
    } else if (kind == BAD_PPO) {
        struct Rollout rollouts[4];
        struct RolloutTrainer *ppo = ppo_of(ppo_config(), 1e30, rollouts);
        for (int step = 0; step < 2; step++)
            ppo_step(ppo, rollouts);
    }
}

/* NaN and infinities: in a file, in what would be saved, after a step that was far too large, in
 * gradients, in what is generated or judged. */
static void test_bad_numbers(void) {
    static const char *const messages[] = {
        [BAD_FILE] = "model.safetensors: tensor h.1.mlp.c_fc.weight: number 500 is nan, a finite "
                     "one was expected; take an earlier checkpoint",
        [BAD_SAVE] = "align: a weight that was to be saved is infinite: weight ln_f.bias was the "
                     "first to break (infinite)",
        [BAD_STEP] = "align: sft: step 2: the loss is NaN: the output of h.0.attn.c_attn was the "
                     "first to break (",
        [BAD_GRADIENT] = "align: sft: step 7: the gradient's norm is NaN: the gradient of "
                         "h.1.ln_2.weight was the first to break (infinite); try",
        [BAD_ADAPTER] = "align: sft: step 2: the loss is NaN: the output of h.0.attn was the first "
                        "to break (NaN); try",
        [BAD_LOGIT] = ": the output of ln_f was the first to break",
        [BAD_REWARD] = "the reward of a text is ",
        [BAD_REFERENCE] = "a log-probability under the frozen model is NaN: the output of ln_f was "
                          "the first to break",
        [BAD_PPO] = "the loss is NaN: the output of h.0.attn",
    };
    /* Whether a sum that overflows ends infinite or as NaN (infinity less infinity) depends on
     * its order: not said here. */
    for (enum Breakage kind = BAD_FILE; kind <= BAD_PPO; kind++)
        expect_end(messages[kind], break_numbers, &kind, 1, messages[kind]);
}

/* The first number that is not finite, or none. */
static void test_first_not_finite(void) {
    float x[5000] = {0};
    expect_count("all finite", first_not_finite(x, 5000), 5000);
    x[4999] = -INFINITY;
    expect_count("the last", first_not_finite(x, 5000), 4999);
    x[4096] = NAN;
    expect_count("the first of the second piece", first_not_finite(x, 5000), 4096);
    x[2] = -FLT_MAX;
    expect_count("the largest is finite", first_not_finite(x, 3), 3);
}

/* =============================================================================================
 * Chapter 25 - Progress, logs, checkpoints
 *
 * A run that goes on from a checkpoint ends as one that never stopped; what is no checkpoint of
 * it is refused, and a full disk destroys nothing that was there.
 * ============================================================================================= */

static void expect_cut(const char *what, const char *text, size_t columns, const char *want) {
    expect_text(what, text_of(cut_text(formatted("%s", text), columns)), want);
}

static void test_progress_cut(void) {
    expect_cut("shorter", "abc", 4, "abc");
    expect_cut("longer", "abcde", 4, "abcd");
    expect_cut("a whole last character", "aéié", 4, "aéi");
    expect_cut("none cut in half", "日本語", 5, "日");
    expect_cut("escape, newline, delete",
               "a\x1b[31m\n\x7f"
               "b",
               40, "a?[31m??b");
    expect_cut("C1 control in UTF-8",
               "a\xc2\x9b"
               "b",
               40, "a??b");
    expect_cut("half a character", "a\xc3", 40, "a?");
    expect_cut("no UTF-8", "\xff\xfe", 1, "?");
}

/* What trainer_state.json says is what the log holds, keys sorted; NaN is null. */
static void test_trainer_state(void) {
    struct TrainerState state = {
        .epoch = 0.5,
        .global_step = 3,
        .max_steps = 6,
        .num_train_epochs = 1.5,
    };
    struct TrainingArguments args = training_arguments();
    struct LogEntry *entry = state_log(&state);
    log_value(entry, "step", 3);
    log_value(entry, "loss", 0.1f);
    log_value(entry, "bad", NAN);
    trainer_state_save(&state, &args, folder);
    struct Json *json = json_contents("trainer_state.json");
    struct Json *item = json_get(json, "log_history")->child->child;
    expect_text("sorted", item->key, "bad");
    expect_true("NaN", item->type == JSON_NULL);
    expect_close("loss", item->next->number, 0.1f, 1e-9);
    expect_close("global_step", json_get(json, "global_step")->number, 3, 0);
    expect_close("epochs begun", json_get(json, "num_train_epochs")->number, 2, 0);
    free(state.log_history);
}

static size_t run_rows = 5, run_batch = 2;
static uint64_t run_seed = 42;
static const char *run_task = "test";

/* A run of 7 steps with checkpoints each 2, or what is left of it after checkpoint-`from`. */
static struct Trainer checkpointed_run(struct Example *examples, const char *dir, size_t from,
                                       size_t limit) {
    struct Trainer trainer = trainer_of(new_model(40, 16, 8, 1, 2), 0.01, 7, run_batch);
    trainer.args.logging_steps = 3;
    trainer.args.save_steps = 2;
    trainer.args.save_total_limit = limit;
    trainer.args.output_dir = dir;
    trainer.args.seed = run_seed;
    if (from)
        trainer.args.resume_from_checkpoint = formatted("%s/checkpoint-%zu", dir, from);
    language_task(&trainer, examples, run_rows);
    trainer.task.name = run_task;
    make_folder(dir);
    trainer_train(&trainer);
    return trainer;
}

/* A run that goes on from a checkpoint ends as one that never stopped: weights, and the log but
 * for the clock. Steps 3 to 5 lie across an epoch's end and a log entry. */
static void test_checkpoint_resume(void) {
    struct Example *examples = random_examples(5, 8, 1, 40);
    const char *dir = temporary("checkpoints");
    struct Trainer whole = checkpointed_run(examples, dir, 0, 0);
    for (size_t from = 2; from <= 6; from += 2) {
        struct Trainer rest = checkpointed_run(examples, dir, from, 0);
        expect_same_weights(formatted("from step %zu", from), rest.model, whole.model);
        expect_count("entries", rest.state.log_count, whole.state.log_count);
        for (size_t i = 0; i < whole.state.log_count; i++) {
            /* a log has 9 digits */
            expect_close("loss", logged(&rest, i, "loss"), logged(&whole, i, "loss"), 1e-8);
            expect_close("epoch", logged(&rest, i, "epoch"), logged(&whole, i, "epoch"), 1e-9);
        }
        expect_close("train_loss", logged(&rest, rest.state.log_count - 1, "train_loss"),
                     logged(&whole, whole.state.log_count - 1, "train_loss"), 0);
        trainer_free(&rest);
    }
    trainer_free(&whole);
}

/* Resumed where no step is left, at its end or before it: one note, the figures are the run's. */
static void test_checkpoint_complete(void) {
    struct Example *examples = random_examples(5, 8, 1, 40);
    const char *dir = temporary("complete");
    struct Trainer whole = checkpointed_run(examples, dir, 0, 0);
    for (size_t steps = 3; steps <= 6; steps += 3) {
        struct Trainer trainer = trainer_of(new_model(40, 16, 8, 1, 2), 0.01, steps, 2);
        trainer.args.output_dir = dir;
        trainer.args.resume_from_checkpoint = formatted("%s/checkpoint-6", dir);
        language_task(&trainer, examples, run_rows);
        capture_begin();
        trainer_train(&trainer);
        struct Text said = capture_end();
        double loss = 0;
        for (size_t i = 0; i < 2; i++)
            loss += 3 * logged(&whole, i, "loss"); /* 3 steps */
        const char *note = formatted("is at step 6, the run has %zu: no step is", steps);
        expect_holds("a note", said, note);
        expect_true("no other word", !strstr(said.data, "going on"));
        expect_count("max_steps", trainer.state.max_steps, 6);
        expect_count("global_step", trainer.state.global_step, 6);
        expect_close("epochs", trainer.state.num_train_epochs, 2, 0);
        expect_close("train_loss", logged(&trainer, 2, "train_loss"), loss / 6, 1e-8);
        double steps_done =
            logged(&trainer, 2, "train_steps_per_second") * logged(&trainer, 2, "train_runtime");
        expect_close("steps a second", steps_done, 6, 1e-6);
        trainer_free(&trainer);
    }
    trainer_free(&whole);
}

/* save_total_limit keeps those written last; what a killed run left half written or half removed
 * is taken away, and is no checkpoint. */
static void test_checkpoint_limit(void) {
    struct CheckpointAge oldest = {0};
    struct CheckpointAge newest = {0};
    struct Example *examples = random_examples(5, 6, 1, 40);
    const char *dir = temporary("limited");
    make_folder(temporary("limited/tmp-checkpoint-8"));
    write_bytes("limited/tmp-checkpoint-8/optimizer.safetensors", "{", 1);
    make_folder(temporary("limited/checkpoint-9")); /* without a state: none of ours */
    struct Trainer trainer = checkpointed_run(examples, dir, 0, 2);
    expect_count("how many", checkpoint_find(dir, &oldest, &newest), 2);
    expect_true("which", oldest.step == 4 && newest.step == 6);
    expect_true("not the first", !file_exists(temporary("limited/checkpoint-2")));
    expect_true("left over", !file_exists(temporary("limited/tmp-checkpoint-8"))
                                 && file_exists(temporary("limited/checkpoint-9")));
    trainer_free(&trainer);
}

/* A power cut between the two renames of checkpoint_save leaves the old checkpoint under a
 * temporary name: it is put back. */
static void test_checkpoint_clean(void) {
    const char *dir = temporary("cut_short");
    make_folder(temporary("cut_short/tmp-checkpoint-4"));
    make_folder(temporary("cut_short/tmp-checkpoint-4-old"));
    make_folder(temporary("cut_short/tmp-checkpoint-6-removed"));
    make_folder(temporary("cut_short/checkpoint-8"));
    make_folder(temporary("cut_short/tmp-checkpoint-8-old"));
    write_bytes("cut_short/tmp-checkpoint-4-old/old", "{", 1);
    checkpoint_clean(dir);
    expect_true("put back", file_exists(temporary("cut_short/checkpoint-4/old")));
    static const char *const gone[] = {"4", "4-old", "6-removed", "8-old"};
    for (size_t i = 0; i < COUNT(gone); i++) {
        const char *name = formatted("cut_short/tmp-checkpoint-%s", gone[i]);
        expect_true(gone[i], !file_exists(temporary(name)));
    }
}

/* Which checkpoint is older is told by what they hold: times, which a copy or a restored folder
 * loses, say nothing. Each run that begins in a folder, anew or from a checkpoint, is later than
 * all before it; checkpoints of old come first. */
static void test_checkpoint_age(void) {
    struct CheckpointAge oldest = {0};
    struct CheckpointAge newest = {0};
    struct Example *examples = random_examples(5, 6, 1, 40);
    const char *dir = temporary("aged");
    struct Trainer first = checkpointed_run(examples, dir, 0, 0);
    for (size_t step = 2; step <= 6; step += 2) {
        const char *file = formatted("%s/checkpoint-%zu/optimizer.safetensors", dir, step);
        time_t t = 9000 - (time_t)step;
        utime(file, &(struct utimbuf){t, t});
    }
    expect_count("how many", checkpoint_find(dir, &oldest, &newest), 3);
    expect_true("times say nothing", oldest.step == 2 && newest.step == 6 && newest.run == 1);
    /* A run goes on from the oldest: 4 and 6 are written anew. */
    struct Trainer second = checkpointed_run(examples, dir, 2, 0);
    checkpoint_find(dir, &oldest, &newest);
    expect_true("gone on from", oldest.run == 1 && oldest.step == 2);
    expect_true("gone on", newest.run == 2 && newest.step == 6);
    remove(temporary("aged/checkpoint-4/optimizer.safetensors"));
    /* A run starts over: its 1, 2 and 3 are later than 6. */
    struct Trainer third = trainer_of(new_model(40, 16, 8, 1, 2), 0.01, 3, 2);
    third.args.save_steps = 1;
    third.args.save_total_limit = 2;
    third.args.output_dir = dir;
    language_task(&third, examples, 5);
    capture_begin();
    trainer_train(&third);
    struct Text said = capture_end();
    expect_holds("the note", said, "aged holds checkpoint-6 of an earlier run; ");
    expect_count("two are left", checkpoint_find(dir, &oldest, &newest), 2);
    expect_true("its last but one", oldest.run == 3 && oldest.step == 2);
    expect_true("its last", newest.run == 3 && newest.step == 3);
    struct Text text = contents("aged/checkpoint-3/optimizer.safetensors");
    char *run = memmem(text.data, text.length, "\"run\"", 5);
    CHECK(run, "test_align: no number of the run");
    run[1] = 'x'; /* as a checkpoint of old, without a number */
    write_bytes("aged/checkpoint-3/optimizer.safetensors", text.data, text.length);
    checkpoint_find(dir, &oldest, &newest);
    expect_true("of old", oldest.run == 0 && oldest.step == 3 && newest.step == 2);
    struct Trainer last = checkpointed_run(examples, dir, 3, 0);
    expect_count("and it can be gone on from", last.state.global_step, 7);
    struct Trainer *trainers[] = {&first, &second, &third, &last};
    for (size_t i = 0; i < COUNT(trainers); i++) {
        trainer_free(trainers[i]);
    }
}

/* What is no checkpoint of this run is refused, with its place. argument: a file and a text in
 * it, and what to write there instead. */
static void resume_changed(const void *argument) {
    const char *const *change = argument;
    const char *dir = formatted("%s/changed%zu", folder, (size_t)change[3]);
    struct Example *examples = random_examples(5, 6, 1, 40);
    struct Trainer trainer = checkpointed_run(examples, dir, 0, 0);
    trainer_free(&trainer);
    const char *name = formatted("%s/checkpoint-4/%s", dir + strlen(folder) + 1, change[0]);
    struct Text text = read_file(&test_arena, temporary(name));
    text = change[1] ? replaced(text, change[1], change[2])
                     : (struct Text){text.data, text.length / 2};
    write_bytes(name, text.data, text.length);
    checkpointed_run(examples, dir, 4, 0);
}

/* A run that goes on with other data, or another seed. */
static void resume_other(const void *argument) {
    struct Example *examples = random_examples(6, 6, 1, 40);
    const char *dir = formatted("%s/other%zu", folder, (size_t)argument);
    checkpointed_run(examples, dir, 0, 0);
    if (strstr(argument, "to train on"))
        run_rows = 6;
    else if (strstr(argument, "in a step"))
        run_batch = 3;
    else if (strstr(argument, "is a checkpoint of"))
        run_task = "dpo";
    else
        run_seed = 43;
    checkpointed_run(examples, dir, 4, 0);
}

/* A number of 64 bits of a checkpoint is not finite. argument: its tensor's name and its place. */
static void resume_not_finite(const void *argument) {
    char name[40];
    size_t place;
    size_t header = 0;
    int read = sscanf(argument, "%39s %zu", name, &place);
    CHECK(read == 2, "test_align: %s", (const char *)argument);
    struct Example *examples = random_examples(5, 6, 1, 40);
    const char *dir = formatted("%s/not_finite_%s%zu", folder, name, place);
    const char *file = formatted("%s/checkpoint-4/optimizer.safetensors", dir + strlen(folder) + 1);
    checkpointed_run(examples, dir, 0, 0);
    struct Text text = read_file(&test_arena, temporary(file));
    for (int i = 7; i >= 0; i--)
        header = header << 8 | (unsigned char)text.data[i];
    const char *quoted = formatted("\"%s\"", name);
    const char *at = memmem(text.data, text.length, quoted, strlen(quoted));
    CHECK(at && (at = strstr(at, "\"data_offsets\":[")), "test_align: no %s", name);
    size_t offset = 8 + header + strtoull(at + 16, NULL, 10) + 8 * place;
    memcpy((char *)text.data + offset, &(double){NAN}, 8);
    write_bytes(file, text.data, text.length);
    checkpointed_run(examples, dir, 4, 0);
}

static void size_restored(const void *words) {
    size_t at = 0;
    struct Saved saved = {"at", &at, 1, SAVED_SIZE, .most = 5};
    saved_restore(&saved, words, "ck", "ppo.at");
}

static void double_restored(const void *words) {
    double kl_coef = 0;
    struct Saved saved = {.name = "kl_coef", .at = &kl_coef, .n = 1, .type = SAVED_DOUBLE};
    saved_restore(&saved, words, "ck", "ppo.kl_coef");
}

static void test_checkpoint_errors(void) {
    static const char *const changes[][4] = {
        {"optimizer.safetensors", "test.rows_per_step", "sfts.rows_per_step",
         "holds no test.rows_per_step; are task, model and flags"},
        {"optimizer.safetensors", "\"test.seed\":{\"dtype\":\"F32\",\"shape\":[2]",
         "\"test.seed\":{\"dtype\":\"F32\",\"shape\":[4]",
         "tensor test.seed: expected shape [2], found [4]"},
        {"trainer_state.json", "\"log_history\": [", "\"log_history\": [3, ",
         "\"log_history\": entry 1 is no object"},
        {"optimizer.safetensors", NULL, "", "optimizer.safetensors: tensor "},
        {"trainer_state.json", "\"log_history\"", "\"log\"", "lacks \"log_history\""},
        {"trainer_state.json", "\"global_step\": 4", "\"global_step\": -4",
         "\"global_step\" must be a whole number"},
        {"optimizer.safetensors", "exp_avg_sq.wte", "exp_avg_sq.wtx",
         "holds no exp_avg_sq.wte.weight"},
        {"model.safetensors", NULL, "", "cut short?"},
    };
    for (size_t i = 0; i < COUNT(changes); i++)
        expect_end(changes[i][3], resume_changed, changes[i], 1, changes[i][3]);
    static const char *const others[] = {
        "checkpoint-4: the number of rows to train on is 6, in the checkpoint's run it was 5; give "
        "the data and flags that the run began with, or start over",
        "checkpoint-4: the number of rows in a step (--per_device_train_batch_size times "
        "--gradient_accumulation_steps) is 3, in the checkpoint's run it was 2; give",
        "checkpoint-4: is a checkpoint of test; dpo cannot go on from it",
        "checkpoint-4: --seed is 43, in the checkpoint's run it was 42; give",
    };
    for (size_t i = 0; i < COUNT(others); i++)
        expect_end(others[i], resume_other, others[i], 1, others[i]);
    static const char *const numbers[][2] = {
        {"test.total_loss 0", "test.total_loss: number 0 is nan, a finite one was expected; the "
                              "file is damaged, take an earlier checkpoint"},
        {"test.epoch 0", "test.epoch: number 0 is nan, a finite one was expected"},
        {"metric.loss 0", "metric.loss is nan, a finite number was expected"},
        {"exp_avg.wte.weight 0", "tensor exp_avg.wte.weight: number 1 is nan, a finite one was "
                                 "expected; take an earlier"},
    };
    for (size_t i = 0; i < COUNT(numbers); i++)
        expect_end(numbers[i][1], resume_not_finite, numbers[i][0], 1, numbers[i][1]);
    expect_end("a place that is not there", size_restored, &(uint64_t){7}, 1,
               "ck: ppo.at: number 0 is 7, at most 5 was expected; the file is damaged");
    expect_end("no KL coefficient", double_restored, &(double){NAN}, 1,
               "ck: ppo.kl_coef: number 0 is nan, a finite one was expected");
}

/* A larger model on top of one that is there, where files can have only 40,000 bytes:
 * config.json and vocabulary fit, the weights do not. */
static void save_without_room(const void *path) {
    struct GPT2 *model = new_model(300, 24, 48, 1, 3);
    limit_files();
    model_replace(model, path, tokenizer);
}

/* A checkpoint and a log that do not fit. */
static void checkpoint_without_room(const void *path) {
    struct GPT2 *model = new_model(300, 24, 48, 1, 3);
    struct TrainingArguments args = training_arguments();
    struct TrainerState state = {.global_step = 20};
    args.output_dir = path;
    struct Checkpoint checkpoint = checkpoint_new("sft", model, tokenizer, &args, &state);
    gpt2_make_trainable(model);
    checkpoint_resume_hint(formatted("%s/checkpoint-10", folder));
    limit_files();
    checkpoint_save(&checkpoint);
}

static void log_without_room(const void *path) {
    struct Output log;
    limit_files();
    log = output_open(path, "log");
    for (size_t i = 0; i < 30000; i++)
        fputs("xyz\n", log.file);
    output_flush(&log);
}

/* What was there stays, nothing half written is left, and a checkpoint that is whole is named. */
static void test_full_disk(void) {
    const char *path = saved_model("full_disk");
    struct Text before = read_file(&test_arena, formatted("%s/config.json", path));
    expect_end("model", save_without_room, path, 1,
               "model.safetensors: writing failed: File too large; what was there before is "
               "untouched");
    expect_text("config.json is the old one",
                read_file(&test_arena, formatted("%s/config.json", path)), before.data);
    struct GPT2 *there = owned(gpt2_load(path));
    expect_count("width of the model that is there", there->config.n_embd, 12);
    expect_true("no config.json.tmp",
                !file_exists(formatted("%s/config.json.tmp", path))
                    && !file_exists(formatted("%s/model.safetensors.tmp", path)));
    expect_end("checkpoint", checkpoint_without_room, path, 1,
               "tmp-checkpoint-20/model.safetensors: writing failed: File too large; what was "
               "there before is untouched; ");
    expect_end("checkpoint", checkpoint_without_room, path, 1,
               "/checkpoint-10 is whole: --resume_from_checkpoint true goes on from it\n");
    expect_true("no tmp-checkpoint-20", !file_exists(formatted("%s/tmp-checkpoint-20", path))
                                            && !file_exists(formatted("%s/checkpoint-20", path)));
    expect_end("log", log_without_room, path, 1, "log.tmp: writing failed: File too large");
}

static void decode_text(const void *text) {
    const struct Text *ids = text;
    tokenize_decode(tokenizer, *ids, 300, "ids.txt");
}

static void die_of(const void *name) {
    die("%s: is wrong", (const char *)name);
}

/* A message is one clean line, however long the name or the file that it speaks of; ids behind a
 * NUL are not passed over. */
static void test_broken_messages(void) {
    static const struct Text nul = {"\0 1 2", 5};
    static const struct Text large = {"99999999999999999999", 20};
    expect_end("a NUL among ids", decode_text, &nul, 1,
               "ids.txt: number 1 (\"\") is no id from 0 to 299");
    expect_end("a large id", decode_text, &large, 1, "number 1 (\"999999999999\") is no id");
    char *name = arena_alloc(&test_arena, 5001, 1);
    memset(name, 'x', 5000);
    memcpy(name, "\33[2J\n\xc2\x9b", 7);
    name[5000] = 0;
    expect_end("a long name", die_of, name, 1, "xx: is wrong");
    struct Text said;
    run_apart(die_of, name, &said);
    expect_true("its start, its end, nothing that steers",
                !FORKS
                    || (said.length == 7 + 1200 + 5 + 1 + strlen(resume_hint)
                        && strstr(said.data, "align: ?[2J???xx") == said.data));
    const char *many[600] = {"align", "dpo", "--loss_type"};
    for (size_t i = 3; i < 590; i++)
        many[i] = "sigmoid";
    expect_end("a list without end", run_command, many, 2, "dpo: \"sigmoid\" is no flag");
    expect_text("names in a log", text_of(log_name("eval_", text_of("a\"b\\c\n"))), "eval_a_b_c_");
}

/* By hand: what `sh` makes of the word is the word. */
static void test_shell_word(void) {
    expect_text("plain", text_of(shell_word(&test_arena, "out/run-1.5,a=b:c@d%e+f_G")),
                "out/run-1.5,a=b:c@d%e+f_G");
    expect_text("an apostrophe and a space", text_of(shell_word(&test_arena, "Ana's run")),
                "'Ana'\\''s run'");
    expect_text("nothing", text_of(shell_word(&test_arena, "")), "''");
    expect_text("only apostrophes", text_of(shell_word(&test_arena, "\'\'")),
                "\'\'\\\'\'\'\\\'\'\'");
    expect_text("what a shell would expand", text_of(shell_word(&test_arena, "~/$x*\n\xc3\xa9")),
                "'~/$x*\n\xc3\xa9'");
}

/* =============================================================================================
 * Chapter 26 - Results
 *
 * The report of a run: its data, its page, and what is refused.
 * ============================================================================================= */

/* What a text could hold to leave the script element that it stands in, and to run there. */
#define HOSTILE "</script><!--<script>alert(1)</script>&amp;\xe2\x80\xa8\xe2\x80\xa9"

static void test_report_json(void) {
    FILE *file = fopen(temporary("embedded"), "wb");
    report_write_json(file, text_of("{\"" HOSTILE "\": \"\\u003c é日😀 \\\\<\"}"));
    fclose(file);
    struct Text got = read_file(&test_arena, temporary("embedded"));
    expect_text("escaped", got,
                "{\"\\u003c/script\\u003e\\u003c!--\\u003cscript\\u003ealert(1)"
                "\\u003c/script\\u003e\\u0026amp;\\u2028\\u2029\": "
                "\"\\u003c é日😀 \\\\\\u003c\"}");
    const char *error;
    struct Json *member = parse(got.data, &error)->child;
    expect_text("the same key", member->key, HOSTILE);
    expect_text("the same text", member->string, "< é日😀 \\<");
}

/* The page that ships with the program. */
static const char *shipped_page(void) {
    return shipped_path(&test_arena, "docs/report.html");
}

static void report_of(const void *dir) {
    report_write(&test_arena, dir, shipped_page());
}

static struct Text run_page(void) {
    return read_file(&test_arena, temporary("run/report.html"));
}

/* The step of a log's first entry, in the object that a page holds. */
static double first_step(const struct Json *object, const char *path) {
    const struct Json *log = json_get(json_get(object, path), "log_history");
    return json_number_or(log ? log->child : NULL, "step", NAN);
}

static void test_report_page(void) {
    const char *run = temporary("run");
    make_folder(temporary("run/ppo"));
    write_text("run/trainer_state.json", "\xef\xbb\xbf{\"log_history\": [{\"step\": 1}]}\n");
    write_text("run/ppo/trainer_state.json", "{\"log_history\": [{\"step\": 2, \"loss\": null}, 3, "
                                             "[1], {}]}");
    write_text("run/report.json", "{\"facts\": {\"Command\": \"" HOSTILE "\"}}");
    expect_true("no fault", report_write(&test_arena, run, shipped_page()) == NULL);

    /* 1. The page is the one that ships, but for what stands in the two places for the run. */
    struct Text page = run_page();
    struct Text shipped = read_file(&test_arena, shipped_page());
    const char *places[] = {"<div id=\"plain\">", "<script type=\"application/json\" id=\"run\">"};
    const char *closes[] = {"</div>", "</script>"};
    char *inside[2];
    char *at = arena_printf(&test_arena, "%s", page.data);
    const char *expected = shipped.data;
    for (int k = 0; k < 2; k++) {
        size_t head = (size_t)(strstr(expected, places[k]) - expected) + strlen(places[k]);
        expect_true("up to a place", strlen(at) > head && memcmp(at, expected, head) == 0);
        inside[k] = at + head;
        at = strstr(inside[k], closes[k]);
        CHECK(at, "test_align: the page's data have no end");
        expected += head;
    }
    expect_text("behind it", text_of(at), expected);
    *at = 0;
    char *data = inside[1];
    *strstr(inside[0], closes[0]) = 0;
    char *plain = inside[0];

    /* 2. There stand the files, and nothing that HTML could take for its own. */
    expect_true("no markup", !strpbrk(data, "<>&") && !strstr(data, "\xe2\x80\xa8"));
    const char *error;
    struct Json *object = parse(data, &error);
    CHECK(object, "the page's data: %s", error);
    expect_count("files", (size_t)object->number, 3);
    struct Json *facts = json_get(json_get(object, "report.json"), "facts");
    expect_text("a fact", json_get(facts, "Command")->string, HOSTILE);
    expect_close("the run's log", first_step(object, "trainer_state.json"), 1, 0);
    expect_close("a stage's log", first_step(object, "ppo/trainer_state.json"), 2, 0);

    /* 3. The same as tables: the fact's text is letters, a log has a row for each entry. */
    expect_true("a fact", strstr(plain, "<tr><th>Command</th><td>") != NULL);
    expect_true("no markup of the run's", !strstr(plain, "<!--") && !strstr(plain, "<script"));
    expect_true("a log", strstr(plain, "<h2>ppo/trainer_state.json</h2>\n<table><tr><th>step</th>"
                                       "<th>loss</th></tr>\n<tr><td>2</td><td></td></tr>")
                             != NULL);

    /* 4. A page that has a run already takes another one in its place. */
    write_bytes("filled.html", run_page().data, page.length);
    expect_true("no fault", report_write(&test_arena, run, temporary("filled.html")) == NULL);
    expect_text("filled again", run_page(), read_file(&test_arena, temporary("filled.html")).data);
}

/* What is wrong with the page is returned, for a training must not end over it; what is wrong with
 * the run ends the program. */
static void test_report_refusals(void) {
    const char *run = temporary("refused");
    make_folder(run);
    expect_end("no logs", report_of, run, 1, "refused: no log of a run there");
    expect_end("no folder", report_of, temporary("nowhere"), 1, "nowhere: no log of a run there");
    write_text("refused/trainer_state.json", "{\"log_history\": []}");
    write_text("refused/report.json", "{\"facts\": {\"a\": \"</script>\"}");
    expect_end("cut short", report_of, run, 1, "refused/report.json: not JSON");
    write_text("refused/report.json", "[]");
    expect_end("no object", report_of, run, 1, "refused/report.json: a JSON object");
    write_text("refused/report.json", "{}");
    expect_text("no page", text_of(report_write(&test_arena, run, NULL)),
                "docs/report.html is neither beside the program nor in the current folder");
    const char *page = write_text("page.html", "<html><script id=\"run\"></script></html>");
    expect_text("no place", text_of(report_write(&test_arena, run, page)),
                arena_printf(&test_arena, "%s: no place for a run (<div id=\"plain\"></div>)",
                             page));
    expect_true("nothing is written", !file_exists(temporary("refused/report.html")));
}

/* =============================================================================================
 * Chapter 27 - Command line
 *
 * What a user may type, rightly or wrongly, and every command on a tiny model, each on what the
 * one before made.
 * ============================================================================================= */

/* A command line that is refused: the exit status, and words of the message. */
struct Refusal {
    int status;
    const char *message, *line;
};

static void expect_refusal(const struct Refusal *refusal, const char *line) {
    expect_end(refusal->message, run_command, words_of(line), refusal->status, refusal->message);
}

/* What a user may type wrongly: exit 2 for the command line, 1 for what cannot be done, and the
 * nearest flag's name. */
static void test_cli_errors(void) {
#define NEEDED " --model_name_or_path x --dataset_name x --output_dir x"
    struct GPT2 *policy = new_model(300, 24, 12, 1, 3);
    model_save(policy, temporary("cli"), tokenizer);
    write_json("long.jsonl", "{'prompt': 'a b c d e f g h i j k l m n o p q r s t u v w x y z'}\n");
    static const struct Refusal cases[] = {
        {2, "generate has no flag --promt; the nearest is --prompt", "generate --promt x"},
        {2, "dpo has no flag --betta; the nearest is --beta", "dpo --betta=1"},
        {2, "\"x\" is no flag", "score x"},
        {2, "--max_new_tokens -3: a whole number", "generate --max_new_tokens -3"},
        {2, "--top_p much: a number from 0 to 1 was expected", "generate --top_p much"},
        {2, "--top_p nan: a number", "generate --top_p=nan"},
        {2, "--do_sample maybe: true or false", "generate --do_sample=maybe"},
        {2, "--seed needs a value", "generate --seed"},
        {2, "--lr_scheduler_type \"step\" is unknown", "sft --lr_scheduler_type step"},
        {2, "--optim \"adam\" is unknown", "sft --optim adam"},
        {2, "--kl_penalty \"js\" is unknown", "ppo --kl_penalty js --output_dir x"},
        {2, "--loss_type \"orpo\" is unknown", "dpo --loss_type 'sigmoid orpo'" NEEDED},
        {2, "for each of --loss_type's names",
         "dpo --loss_type 'sigmoid sft' --loss_weights 1" NEEDED},
        {2, "for each of --loss_type's names",
         "dpo --loss_type sigmoid --loss_weights '1 2'" NEEDED},
        {2, "for each of --loss_type's names", "dpo --loss_weights nan" NEEDED},
        {2, "--beta 0: a number above 0 was expected", "dpo --beta 0"},
        {2, "--beta -1: a number, 0 or more, was expected", "reinforce --beta -1"},
        {1, "--num_generations 1: an answer is compared",
         "grpo --reward_model_path x --num_generations 1" NEEDED},
        {1, "a multiple of --num_generations 8 was expected",
         "grpo --reward_model_path x --per_device_train_batch_size 12" NEEDED},
        {1, "a multiple of --num_iterations 3 was expected",
         "grpo --reward_model_path x --num_iterations 3 --save_steps 4" NEEDED},
        {1, "--label_smoothing 0.5", "dpo --label_smoothing 0.5" NEEDED},
        {2, "--temperature 0: a number, 1e-6 or more, was expected", "generate --temperature 0"},
        {2, "--temperature 1e-30: a number, 1e-6 or more,", "ppo --temperature 1e-30"},
        {2, "--learning_rate 1e39: a number, 0 or more, was", "sft --learning_rate 1e39"},
        {2, "--adam_beta1 1: a number from 0 to below 1", "sft --adam_beta1 1"},
        {2, "--gamma 1.01: a number from 0 to 1 was", "ppo --gamma 1.01"},
        {2, "--max_steps 1099511627777: a whole number, 0 to 2^40",
         "sft --max_steps 1099511627777"},
        {2, "--num_train_epochs 1e300: a number above 0, at most 1e9,",
         "sft --num_train_epochs 1e300"},
        {2, "--seed 18446744073709551616: a whole number", "sft --seed 18446744073709551616"},
        {2, "--num_train_epochs 1e30: a number above 0, at most 1e9,",
         "sft --num_train_epochs 1e30"},
        {2, "--per_device_train_batch_size 0: a whole number, 1 to 4096",
         "sft --per_device_train_batch_size 0"},
        {2, "--model_name_or_path is needed", "generate --prompt x --tokenizer @tokenizer.bin"},
        {1, "--max_new_tokens 5: 6 tokens make 7776 responses", "exact --max_new_tokens 5"},
        {1, "--beta 0: must be above 0", "exact --beta 0"},
        {1, "--vocab_size 17: 2 to 16", "exact --vocab_size 17"},
        {2, "--prompt, or --dataset_name, is needed",
         "generate --model_name_or_path @cli --tokenizer @tokenizer.bin"},
        {1, "40 tokens, the model's context is 24",
         "generate --model_name_or_path @cli --dataset_name @long.jsonl --tokenizer "
         "@tokenizer.bin"},
        {1, "--max_length 1024 is longer than the model's context of 24",
         "pretrain --max_length 1024 --model_name_or_path @cli --dataset_name @long.jsonl "
         "--output_dir @x --tokenizer @tokenizer.bin"},
        {1, "no tokenizer here",
         "generate --tokenizer 'no tokenizer here' --model_name_or_path @cli --prompt x"},
        {2, "--decode reads ids, --jsonl texts", "tokenize --jsonl --decode"},
        {2, "--loss_type \"\" is empty", "dpo --loss_type ''"},
        {2, "no loss counts", "dpo --loss_type sigmoid --loss_weights 0" NEEDED},
        {2, "--loss_type \" ,\" is empty", "dpo '--loss_type= ,'"},
        {2, "--loss_type \"\" is empty", "reward --loss_type ''"},
        {2, "--output_dir \"\" is empty", "sft --output_dir="},
        {2, "--output_dir is needed", "sft --model_name_or_path nowhere --dataset_name nowhere"},
        {2, "--dataset_name is needed", "dpo --model_name_or_path nowhere"},
        {2, "--reward_model_path, or --reward_command, is needed",
         "ppo --model_name_or_path nowhere --dataset_name nowhere"},
        {2, "--output_dir is needed", "ppo --model_name_or_path nowhere --rollouts nowhere"},
        {2, "--output_dir is needed",
         "collect --model_name_or_path nowhere --dataset_name nowhere"},
        {2, "--dataset_name is needed", "pretrain --n_layer 1"},
        {2, "--prompt is needed", "next --model_name_or_path nowhere"},
        {2, "--dataset_name is needed", "eval --model_name_or_path nowhere"},
        {1, "must be a multiple of --mini_batch_size 4294967296 times",
         "ppo --batch_size=4294967296 --mini_batch_size=4294967296 "
         "--gradient_accumulation_steps=4294967296 --reward_model_path x" NEEDED},
        {2, "was expected; 1.2e-38 to 3.4e+38 can be used", "next --repetition_penalty 1e39"},
        {2, "-3.4e+38 to 3.4e+38 can be used", "generate --length_penalty -1e308"},
        {2, "--output_dir needs a value", "sft --output_dir --quiet"},
        {2, "--use_peft perhaps: true or false", "sft --use_peft perhaps"},
        {2, "--no_use_peft takes no value", "sft --no_use_peft=true"},
        {2, "--l: which of these is meant? --lora_r, --lora_alpha", "dpo --l 1"},
        {2, "\"--\" is no flag", "dpo --"},
        {2, "--bf16 true is not supported: align computes in float32; leave it out, or give false",
         "sft --bf16"},
        {2, "--packing True is not supported", "sft --packing True"},
        {2, "--eval_strategy epoch is not supported: an evaluation comes each --eval_steps",
         "dpo --eval_strategy epoch"},
        {2, "--report_to wandb is not supported", "sft --report_to none wandb"},
        {2, "the nearest is --output_max_length", "ppo --max_new_tokens 5"},
        {2, "the nearest is --max_new_tokens", "generate --max_length 5"},
        {2, "the nearest is --learning_rate", "sft --lr 1"},
        {2, "the nearest is --per_device_train_batch_size", "sft --batch-size 1"},
        {2, "the nearest is --init_kl_coef", "ppo --kl_coef 1"},
        {2, "the nearest is --max_steps", "ppo --steps 1"},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        expect_refusal(&cases[i], cases[i].line);
#undef NEEDED
}

static void test_edit_distance(void) {
    expect_count("kitten, sitting", edit_distance("kitten", "sitting"), 3);
    expect_count("the same, and from nothing",
                 edit_distance("beta", "beta") + edit_distance("", "beta"), 4);
}

/* A command line, taken apart; what was said meanwhile, if `said` is asked for. */
static struct Options parse_line(const char *line, struct Text *said) {
    const char *const *words = words_of(line);
    const struct Command *command = find_command(words[1]);
    struct Options o = default_options(command->name);
    int n = 0;
    while (words[n])
        n++;
    if (said)
        capture_begin();
    parse_arguments(&o, command, n, (char **)words);
    if (said)
        *said = capture_end();
    quiet = true;
    return o;
}

/* The spellings that transformers' HfArgumentParser takes. */
static void test_cli_spelling(void) {
    static const char *const yes[] = {
        "sft --use_peft",     "sft --use_peft True", "sft --use_peft=TRUE",
        "sft --use_peft yes", "sft --use_peft y",    "sft --use_peft t",
        "sft --use_peft=1",   "sft --use-peft",      "sft --use_p true",
    };
    static const char *const no[] = {
        "sft --no_use_peft", "sft --no-use-peft", "sft --use_peft False", "sft --use_peft=no",
        "sft --use_peft n",  "sft --use_peft f",  "sft --use_peft 0",
    };
    for (size_t i = 0; i < COUNT(yes); i++) {
        struct Options o = parse_line(yes[i], NULL);
        expect_true(yes[i], o.use_peft && given(&o, "use_peft"));
        options_close(&o);
    }
    for (size_t i = 0; i < COUNT(no); i++) {
        struct Options o = parse_line(no[i], NULL);
        expect_true(no[i], !o.use_peft && given(&o, "use_peft"));
        options_close(&o);
    }
    struct Options o = parse_line("ppo --no_adap_kl_ctrl --learning-rate 1e-3 --max_steps -1 "
                                  "--optim adamw_torch --resume_from_checkpoint True --mini=4 "
                                  "--adam-eps=1e-3",
                                  NULL);
    expect_true("ppo", !o.ppo.adap_kl_ctrl && o.train.learning_rate == 1e-3
                           && o.train.max_steps == 0
                           && strcmp(o.train.resume_from_checkpoint, "true") == 0
                           && o.ppo.mini_batch_size == 4 && o.train.adam_epsilon == 1e-3);
    options_close(&o);
    o = parse_line("sft --warmup_steps 0.4 --resume_from_checkpoint=False", NULL);
    expect_true("a share of the steps", o.train.warmup_steps == 0 && o.train.warmup_ratio == 0.4
                                            && !o.train.resume_from_checkpoint);
    options_close(&o);
    o = parse_line("sft --warmup_ratio 0.1 --warmup_steps 0", NULL);
    expect_true("transformers 4", o.train.warmup_steps == 0 && o.train.warmup_ratio == 0.1);
    options_close(&o);
    o = parse_line("tokenize --decode 1", NULL);
    expect_true("a file whose name could be a boolean", o.decode && strcmp(o.file, "1") == 0);
    options_close(&o);
    o = parse_line("generate --prompt '' --early_stopping never -h", NULL);
    expect_true("an empty prompt, never, -h",
                *o.prompt == 0 && o.generation.early_stopping == STOP_NEVER && o.help);
    options_close(&o);
    o = parse_line("generate --prompt '-- said he' --do_sample", NULL);
    expect_true("a prompt that begins with dashes",
                strcmp(o.prompt, "-- said he") == 0 && o.generation.do_sample);
    options_close(&o);
}

static void expect_note(const char *note, const char *line) {
    struct Text said;
    struct Options o = parse_line(line, &said);
    bool one_line = said.length && strchr(said.data, '\n') == said.data + said.length - 1;
    bool good = *note ? one_line && strstr(said.data, note) : said.length == 0;
    if (!good && failed())
        printf("%s: %s: \"%s\" was expected, \"%s\" was said\n", test_name, line, note, said.data);
    options_close(&o);
}

/* Flags that change nothing are named, in one line a reason; those that do are not. */
static void test_cli_idle(void) {
    static const struct {
        const char *line, *note; /* "": nothing is said */
    } cases[] = {
        {"sft --bf16 False --report_to none --do_eval --eval-strategy no --logging_dir=x "
         "--overwrite_output_dir --tf32 1",
         "align: note: --bf16, --report_to, --do_eval, --eval_strategy, --logging_dir, "
         "--overwrite_output_dir, --tf32: no effect in align\n"},
        {"sft --no_packing --no-load_best-model-at-end", "align: note: --packing, "
                                                         "--load_best_model_at_end: no effect in "
                                                         "align\n"},
        {"dpo --lora_r 4 --lora-alpha 8 --use_rs", "--lora_r, --lora_alpha, --use_rslora: no "
                                                   "effect: all weights are trained"},
        {"sft --lora_r 4 --peft_adapter x", "--lora_r: no effect: --peft_adapter has its own"},
        {"sft --lora_r 4 --use_peft", ""},
        {"sft --num_train_epochs 2 --max_steps 3", "--num_train_epochs: no effect: --max_steps"},
        {"sft --num_train_epochs 2 --max_steps -1", ""},
        {"sft --eval_steps 2", "--eval_steps: no effect"},
        {"sft --adam_beta1 0.8 --optim sgd --adam_epsilon 1", "--adam_beta1, --adam_epsilon: no "
                                                              "effect"},
        {"sft --warmup_steps 5 --lr_scheduler_type constant", "--warmup_steps: no effect"},
        {"ppo --warmup_ratio 0.1", "--warmup_ratio: no effect: --lr_scheduler_type"},
        {"sft --warmup_ratio 0.1 --warmup_steps 5", "--warmup_ratio: no effect: --warmup_steps"},
        {"sft --save_steps 0 --save_total_limit 2", "--save_total_limit: no effect"},
        {"pretrain --n_layer 2 --vocab_size 300 --model_name_or_path x", "--n_layer, --vocab_size: "
                                                                         "no effect"},
        {"reward --center_rewards_coefficient 1 --loss_type bce", "--center_rewards_coefficient: "
                                                                  "no effect"},
        {"dpo --label_smoothing 0.1 --loss_type hinge sft", "--label_smoothing: no effect"},
        {"dpo --label_smoothing 0.1 --loss_type hinge robust", ""},
        {"reinforce --gradient_accumulation_steps 2", "--gradient_accumulation_steps: no effect"},
        {"ppo --adap_kl_ctrl false --target 2 --horizon 3", "--horizon, --target: no effect"},
        {"ppo --target_kl 2", "--target_kl: no effect"},
        {"ppo --target_kl 2 --early_stopping --target 3", ""},
        {"ppo --use_score_norm", "--use_score_norm: no effect"},
        {"ppo --rollouts x --reward_model_path y --dataset_name z --top_k 4 --output_max 9 "
         "--temperature 2",
         "--reward_model_path, --dataset_name, --top_k, --output_max_length: no effect"},
        {"generate --temperature 2 --top_k 4 --seed 1", "--temperature, --top_k, --seed: no "
                                                        "effect"},
        {"generate --temperature 2 --top_k 4 --do_sample", ""},
        {"generate --length_penalty 2 --early_stopping true", "--length_penalty, --early_stopping: "
                                                              "no effect"},
        {"generate --length_penalty 2 --num_beams 2", ""},
        {"generate --min_new_tokens 21", "--min_new_tokens: no effect"},
        {"generate --prompt a --dataset_name x", "--dataset_name: no effect: --prompt"},
        {"eval --max_length 9 --reward_model_path x", "--max_length: no effect"},
        {"eval --ref_model x --top_p 0.5 --max_samples 3", "--ref_model, --max_samples, --top_p: "
                                                           "no effect"},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        expect_note(cases[i].note, cases[i].line);
}

static struct Text answered(int argc, const char *a, const char *b) {
    capture_begin();
    bool answer = answer_about(argc, (char *[]){"align", (char *)a, (char *)b, NULL});
    struct Text said = capture_end();
    return answer ? said : text_of("");
}

/* What main answers itself. */
static void test_cli_about(void) {
    /* a kernel that ALIGN_KERNEL requests and this processor lacks is noted before the version */
    struct Text version = answered(2, "--version", NULL);
    expect_holds("--version", version, "align 1.0\n");
    expect_holds("--version", version, "\nkernel: ");
    expect_holds("--version", version, "\nthreads: ");
    expect_text("-h", answered(2, "-h", NULL), answered(2, "--help", NULL).data);
    expect_text("help", answered(2, "help", NULL), answered(1, NULL, NULL).data);
    expect_holds("help dpo", answered(3, "help", "dpo"), "align dpo -- ");
    expect_text("a command is something else", answered(2, "dpo", NULL), "");
}

/* Each --help names the command's own defaults, and fits 100 columns. */
static void test_cli_help(void) {
    for (size_t i = 0; i < COUNT(COMMANDS); i++) {
        capture_begin();
        print_help(&COMMANDS[i]);
        struct Text help = capture_end();
        for (const char *line = help.data; *line; line += strcspn(line, "\n") + 1)
            expect_true("100 columns", strcspn(line, "\n") <= 100);
        expect_holds("--quiet", help, "\n  --quiet                        [false] true or false: ");
        if (COMMANDS[i].run == command_dpo)
            expect_holds("dpo's learning rate, and its range", help,
                         "--learning_rate                [1e-06] a number, 0 or more: ");
        if (COMMANDS[i].run == command_sft)
            expect_holds("sft's learning rate", help, "--learning_rate                [2e-05] ");
        if (COMMANDS[i].run == command_generate)
            expect_holds("generate's top_k", help,
                         "--top_k                        [50] a whole number, 0 to 2^40: ");
    }
}

/* A row's other fields, byte by byte as its line has them, for a reward program. */
static void test_data_others(void) {
    static const char *const cases[][2] = {
        {"{'prompt': '3 + 4 =', 'answer': 7.0}", ", 'answer': 7.0"},
        {" { 'id':12345678901234567890 ,'prompt':'a','t':[1.50,{'a':'\\u00e9'}], 'completion':'b' "
         "}",
         ", 'id':12345678901234567890, 't':[1.50,{'a':'\\u00e9'}]"},
        {"{'prompt': 'x'}", ""},
        {"\xef\xbb\xbf{'text': 'x, y'}", ", 'text': 'x, y'"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *line = formatted("%s", cases[i][0]);
        struct Dataset *data = dataset_of(line, WHOLE_SHAPES, COUNT(WHOLE_SHAPES));
        char *want = arena_printf(&test_arena, "%s", cases[i][1]);
        for (char *c = want; *c; c++)
            *c = *c == '\'' ? '"' : *c;
        expect_text(cases[i][0], data->rows[0].others, want);
    }
}

/* Prompts cut from texts shorter than the sampled length end where the text does. */
static void test_encode_prompts(void) {
    struct Options o = default_options("ppo");
    struct Example prompts[64];
    char lines[64 * 16] = "";
    for (int i = 0; i < 64; i++)
        strcat(lines, "{'text': 'Hi'}\n");
    o.tok = (struct Tokenizer *)tokenizer;
    o.model = new_model(1024, 16, 8, 1, 2);
    o.data = dataset_of(lines, PROMPT_SHAPES, COUNT(PROMPT_SHAPES));
    expect_count("prompts", encode_prompts(&o, prompts), 64);
    for (int i = 0; i < 64; i++)
        expect_ids("H i", prompts[i].ids, prompts[i].n, (int[]){39, 72}, 2);
    const char *some_empty = "{'prompt': ''}\n{'prompt': 'Hi'}\n{'prompt': ''}\n";
    o.data = dataset_of(some_empty, PROMPT_SHAPES, COUNT(PROMPT_SHAPES));
    capture_begin();
    expect_count("empty prompts are left out", encode_prompts(&o, prompts), 1);
    struct Text said = capture_end();
    expect_holds("and counted", said,
                 "data.jsonl: 2 of 3 rows have no text to take a prompt from and are left out");
    arena_free(&o.arena);
}

/* Every training command on a tiny model, each on what the one before made; then the tools on
 * the result. */
static void test_cli_course(void) {
    write_films();
    static const char *const commands[] = {
        "pretrain --dataset_name @texts.jsonl --output_dir @lm --vocab_size 400 --n_layer 1 "
        "--n_head 2 --n_embd 8 --n_positions 32 --max_length 16 --max_steps 2 --logging_steps=1",
        "sft --model_name_or_path @lm --dataset_name @texts.jsonl --eval_dataset @texts.jsonl "
        "--output_dir @sft --num_train_epochs 2 --eval_steps 1 --lr_scheduler_type=cosine",
        "reward --model_name_or_path @sft --dataset_name @pairs.jsonl --eval_dataset @pairs.jsonl "
        "--output_dir @rm --center_rewards_coefficient 0.01",
        "ppo --model_name_or_path @sft --reward_model_path @rm --dataset_name @texts.jsonl "
        "--output_dir @ppo --batch_size 4 --mini_batch_size 2 --max_steps 2 --whiten_rewards "
        "--seed 3",
        "ppo --model_name_or_path @sft --rollouts @ppo/rollouts.jsonl --output_dir @replay "
        "--batch_size 4 --mini_batch_size 2 --max_steps 2 --whiten_rewards true --seed 3",
        "dpo --model_name_or_path @ppo --dataset_name @pairs.jsonl --eval_dataset @pairs.jsonl "
        "--output_dir @dpo --loss_type 'sigmoid sft' --loss_weights '1 0.2' --max_steps 2",
    };
    for (size_t i = 0; i < COUNT(commands); i++)
        command_output(commands[i]);
    struct GPT2 *ppo = owned(gpt2_load(temporary("ppo")));
    struct GPT2 *replay = owned(gpt2_load(temporary("replay")));
    expect_true("a value head", ppo->v_head.weight.n == 8);
    expect_same_weights("replayed rollouts", replay, ppo);
    expect_true("pretraining's log", json_get(log_history("lm")->child, "loss") != NULL);
    struct Json *json = json_output("generate --model_name_or_path @dpo --prompt 'A film' --json "
                                    "--do_sample "
                                    "--num_return_sequences 3 --max_new_tokens 4");
    expect_count("three sequences", json ? json_count(json_get(json, "sequences")) : 0, 3);
    json = json_output("next --model_name_or_path @dpo --prompt 'A film' --json --top_k 5 --top_n "
                       "3");
    expect_close("kept by top_k 5", json ? json_get(json, "kept")->number : NAN, 5, 0);
    expect_true("highest first",
                json
                    && json_get(json, "top")->child->child->next->number
                           >= json_get(json, "top")->child->next->child->next->number);
    struct Text out = command_output("logprob --model_name_or_path @dpo --ref_model @sft "
                                     "--dataset_name "
                                     "@texts.jsonl");
    json = next_line(&out);
    double sum = 0;
    double divergences = 0;
    double tokens = 0;
    for (struct Json *item = json ? json_get(json, "token_logprobs")->child : NULL; item;
         item = item->next, tokens++)
        sum += item->number;
    for (struct Json *item = json ? json_get(json, "kl_to_ref_per_position")->child : NULL; item;
         item = item->next)
        divergences++;
    expect_close("the sum of a text's log-probabilities",
                 json ? json_get(json, "logprob")->number : NAN, sum, 1e-5);
    expect_close("one divergence more than log-probabilities", divergences, tokens + 1, 0);
    out = command_output("score --model_name_or_path @rm --dataset_name @texts.jsonl");
    json = next_line(&out);
    struct Json *positive = json ? json_get(json, "pipe_outputs")->child : NULL;
    expect_true("POSITIVE first",
                positive && json_is_string(json_get(positive, "label"), "POSITIVE"));
    expect_close("sigmoid of the reward", positive ? json_get(positive, "score")->number : NAN,
                 json ? sigmoid(json_get(json, "reward")->number) : 0, 1e-8);
    out = command_output("tokenize --jsonl @texts.jsonl --vocab_size 258");
    expect_true("tokenize --jsonl: three lines",
                next_line(&out) && next_line(&out) && next_line(&out) && !next_line(&out));
    write_text("ids.txt", "[15496, 995]");
    expect_text("decode", command_output("tokenize --decode @ids.txt"), "Hello world");
    write_text("hello.txt", "Hello world");
    expect_text("encode", command_output("tokenize @hello.txt"), "15496 995\n");
    out = command_output("generate --help");
    expect_true("--help names the flags", strstr(out.data, "--repetition_penalty")
                                              && strstr(out.data, "--max_new_tokens")
                                              && !strstr(out.data, "--cliprange"));
    capture_begin();
    print_commands(stdout);
    out = capture_end();
    for (size_t i = 0; i < COUNT(COMMANDS); i++)
        expect_true(COMMANDS[i].name, strstr(out.data, COMMANDS[i].name));
}

/* A language model and a reward model to collect with, and four prompts. */
static void make_collectors(const char *training) {
    write_films();
    write_json("p.jsonl", "{'prompt': 'A film'}\n{'prompt': 'It'}\n"
                          "{'prompt': 'So'}\n{'prompt': 'We'}\n");
    write_json("rated.jsonl", "{'text': 'good', 'score': 2}\n{'text': 'bad', 'score': 0}\n"
                              "{'text': 'dull', 'score': -1}\n");
    command_output(formatted("pretrain --dataset_name @texts.jsonl --output_dir @c_lm "
                             "--n_layer 1 --n_head 2 --n_embd 8 --n_positions 32 %s",
                             training));
    command_output("reward --model_name_or_path @c_lm --dataset_name @rated.jsonl "
                   "--output_dir @c_rm --max_steps 3 --learning_rate 0.01");
}

/* A new reward head draws numbers of its own: with the seed of `pretrain`, and untrained, it was
 * once the first row of wte again, to the last bit. */
static void test_reward_head_stream(void) {
    make_collectors("--vocab_size 400 --max_length 16 --max_steps 1 --learning_rate 0");
    command_output("reward --model_name_or_path @c_lm --dataset_name @rated.jsonl "
                   "--output_dir @c_head --max_steps 1 --learning_rate 0");
    struct GPT2 *model = owned(gpt2_load(temporary("c_head")));
    size_t C = model->config.n_embd;
    expect_true("not wte's first row",
                memcmp(model->score.w, model->wte.w, C * sizeof(float)) != 0);
}

static const char SHORT_TRAINING[] = "--vocab_size 400 --max_length 16 --max_steps 60 "
                                     "--learning_rate "
                                     "0.03";

static struct Dataset *preferences_of(const char *name) {
    const char *path = temporary(formatted("%s/preferences.jsonl", name));
    return dataset_load(&test_arena, path, DPO_SHAPES, 1);
}

/* Standard input is a file with these keys, until keyboard_back. */
static int keyboard = -1;

static void type_keys(const char *keys) {
    write_text("keys.txt", keys);
    if (keyboard < 0)
        keyboard = dup(STDIN_FILENO);
    CHECK(freopen(temporary("keys.txt"), "r", stdin), "keys.txt");
}

static void keyboard_back(void) {
    dup2(keyboard, STDIN_FILENO);
    close(keyboard);
    keyboard = -1;
    clearerr(stdin);
}

/* collect, judged by a reward model. */
static void test_cli_collect(void) {
    make_collectors(SHORT_TRAINING);
    command_output("collect --model_name_or_path @c_lm --reward_model_path @c_rm --dataset_name "
                   "@p.jsonl --num_generations 3 --max_samples 3 --output_dir @c_pairs");
    struct Dataset *data = preferences_of("c_pairs");
    expect_count("a pair a prompt", data->n, 3);
    struct GPT2 *rm = owned(gpt2_load(temporary("c_rm")));
    for (size_t i = 0; i < data->n; i++) {
        float reward[2];
        struct Example texts[2];
        for (int side = 0; side < 2; side++)
            texts[side] =
                example_encode(&test_arena, tokenizer,
                               text_join(&test_arena, data->rows[i].prompt,
                                         side ? data->rows[i].rejected : data->rows[i].chosen),
                               400, NULL);
        texts[0].n = MIN(texts[0].n, (size_t)32);
        texts[1].n = MIN(texts[1].n, (size_t)32);
        reward_score(rm, texts, 2, reward);
        expect_true("the chosen one has the higher reward", reward[0] > reward[1]);
    }
}

/* collect from a keyboard that says 1, an unknown word, 2, skip, stop; a second run goes on behind
 * what is there. */
static void test_cli_collect_keys(void) {
    static const char line[] = "collect --model_name_or_path @c_lm --dataset_name @p.jsonl "
                               "--output_dir @c_mine";
    make_collectors(SHORT_TRAINING);
    type_keys("1\nwhat?\n 2\nS\nq\n");
    command_output(line);
    struct Dataset *data = preferences_of("c_mine");
    expect_count("two judgements", data->n, 2);
    struct GPT2 *lm = owned(gpt2_load(temporary("c_lm")));
    struct Options defaults = default_options("collect");
    struct GenerationConfig generation = defaults.generation;
    options_close(&defaults);
    generation.do_sample = true;
    struct Example prompt = example_encode(&test_arena, tokenizer, text_of("A film"), 400, NULL);
    prompt.prompt_length = prompt.n;
    struct Rng rng = rng_seed(42, STREAM_SAMPLE);
    struct Example *answers = sample_answers(lm, &test_arena, &prompt, 1, 2, &generation, &rng);
    expect_true("key 1 rejects the answer shown second",
                text_equal(data->rows[0].rejected,
                           answer_text(tokenizer, &test_arena, &answers[1], &lm->config)));
    struct Text first = text_copy(&test_arena, data->rows[0].chosen);
    struct Text second = text_copy(&test_arena, data->rows[1].chosen);
    struct Text lost = text_copy(&test_arena, data->rows[1].rejected);
    rewind(stdin);
    command_output(line);
    data = preferences_of("c_mine");
    expect_true("what was there stays", data->n == 3 && text_equal(data->rows[0].chosen, first)
                                            && text_equal(data->rows[1].chosen, second));
    expect_text("the third was skipped, the fourth is next", data->rows[2].prompt, "We");
    type_keys("2\n1\nq\n");
    command_output("collect --model_name_or_path @c_lm --dataset_name @p.jsonl --output_dir "
                   "@c_other");
    data = preferences_of("c_other");
    expect_true("the other way round", text_equal(data->rows[0].rejected, first)
                                           && text_equal(data->rows[1].rejected, second)
                                           && text_equal(data->rows[1].chosen, lost));
    keyboard_back();
}

static void test_cli_reinforce(void) {
    make_collectors(SHORT_TRAINING);
    command_output("reinforce --model_name_or_path @c_lm --reward_model_path @c_rm --dataset_name "
                   "@p.jsonl --batch_size 6 --num_generations 3 --max_steps 2 --use_peft "
                   "--output_dir @c_re");
    struct Json *entries = log_history("c_re");
    expect_true("the variances are logged",
                json_count(entries) == 2 && json_get(entries->child, "gradient_variance/rloo")
                    && json_get(entries->child, "gradient_variance/none"));
    expect_true("an adapter", is_adapter(temporary("c_re")));
}

/* A run of GRPO with two updates on the same answers, and what it leaves. */
static const char GRPO_RUN[] = "grpo --model_name_or_path @c_lm --per_device_train_batch_size 3 "
                               "--gradient_accumulation_steps 2 --num_generations 3 "
                               "--num_iterations 2 --beta 0.04 --learning_rate 0.01 "
                               "--max_completion_length 8 --logging_steps 3 --max_steps 6";

static void expect_same_file(const char *name, const char *in, const char *want_in) {
    struct Text got = contents(formatted("%s/%s", in, name));
    struct Text want = contents(formatted("%s/%s", want_in, name));
    expect_true(name, text_equal(got, want) && got.length > 0);
}

/* A live run, and its rollouts replayed: the same statistics and weights, bit for bit. */
static void test_cli_grpo(void) {
    make_collectors(SHORT_TRAINING);
    command_output(formatted("%s --reward_model_path @c_rm --dataset_name @p.jsonl "
                             "--output_dir @g_live",
                             GRPO_RUN));
    command_output(
        formatted("%s --rollouts @g_live/rollouts.jsonl --output_dir @g_again", GRPO_RUN));
    expect_same_file("model.safetensors", "g_again", "g_live");
    expect_same_file("stats_all.jsonl", "g_again", "g_live");
    expect_same_file("rollouts.jsonl", "g_again", "g_live");
    struct Json *entries = log_history("g_live");
    expect_count("entries: steps 3 and 6", json_count(entries), 2);
    struct Text stats = contents("g_live/stats_all.jsonl");
    double kl = 0;
    for (int step = 1; step <= 6; step++)
        kl += json_get(next_line(&stats), "kl")->number * (step > 3) / 3;
    struct Json *last = entries->child->next;
    expect_close("the mean of three steps", json_get(last, "kl")->number, kl, 1e-7);
    expect_close("3 of 2 passes: two prompts a batch of four", json_get(last, "epoch")->number, 1.5,
                 1e-9);
    entries = log_history("g_again");
    expect_close("one pass over the stored", json_get(entries->child->next, "epoch")->number, 1,
                 1e-9);
    struct Text rows = contents("g_live/rollouts.jsonl");
    size_t answers = 0;
    while (next_line(&rows))
        answers++;
    expect_count("three batches of six answers", answers, 18);
}

/* Stopped and resumed in the middle, a run leaves what one that never stopped leaves; its log
 * entries are at steps 3 and 6, its checkpoints at 2 and 4. */
static void test_cli_grpo_resume(void) {
    static const char *const names[] = {"model.safetensors", "stats_all.jsonl", "rollouts.jsonl"};
    make_collectors(SHORT_TRAINING);
    const char *run = formatted("%s --reward_model_path @c_rm --dataset_name @p.jsonl "
                                "--padding_side left --save_steps 2 --output_dir",
                                GRPO_RUN);
    command_output(formatted("%s @g_whole", run));
    command_output(formatted("%s @g_rest", run));
    for (int from = 2; from <= 4; from += 2) {
        command_output(
            formatted("%s @g_rest --resume_from_checkpoint @g_rest/checkpoint-%d", run, from));
        for (size_t i = 0; i < COUNT(names); i++)
            expect_same_file(names[i], "g_rest", "g_whole");
        struct Json *got = log_history("g_rest")->child;
        struct Json *want = log_history("g_whole")->child;
        for (; want && got; want = want->next, got = got->next)
            expect_close("kl", json_get(got, "kl")->number, json_get(want, "kl")->number, 0);
        expect_true("as many entries", !got && !want);
    }
    interrupted = 1;
    expect_end("stopped where the answers are used up", run_command,
               words_of(formatted("%s @g_stop --tokenizer @tokenizer.bin", run)), 1,
               "interrupted after step 2 of 6");
    interrupted = 0;
    expect_true("not before", !file_exists(temporary("g_stop/checkpoint-1")));
}

/* eval of a language model, of a reward model, and of a policy beside its reference. */
static void test_cli_eval(void) {
    make_collectors(SHORT_TRAINING);
    struct Json *eval = json_output("eval --model_name_or_path @c_lm --dataset_name @texts.jsonl");
    expect_close("perplexity", json_get(eval, "perplexity")->number,
                 exp(json_get(eval, "eval_loss")->number), 1e-4);
    struct Text lines = command_output("logprob --model_name_or_path @c_lm --dataset_name "
                                       "@texts.jsonl");
    double logprob = 0; /* logprob adds no end token, the loss does */
    for (struct Json *line; (line = next_line(&lines));)
        logprob += json_get(line, "logprob")->number;
    expect_true("the texts' tokens and their end tokens",
                json_get(eval, "eval_loss")->number * json_get(eval, "tokens")->number >= -logprob);
    eval = json_output("eval --model_name_or_path @c_rm --dataset_name @pairs.jsonl");
    expect_true("reward model: loss and accuracy",
                json_get(eval, "eval_accuracy") && json_get(eval, "eval_loss"));
    eval = json_output("eval --model_name_or_path @c_lm --ref_model @c_lm --reward_model_path "
                       "@c_rm --dataset_name @p.jsonl");
    expect_close("KL of a policy to itself", json_get(eval, "kl")->number, 0, 1e-9);
    expect_close("samples", json_get(eval, "samples")->number, 4, 0);
}

/* `collect` on the first `most` of p.jsonl's prompts, on keys or judged by c_rm, into a folder;
 * the pairs there afterwards. */
static struct Text collected(const char *to, int most, const char *keys) {
    if (keys)
        type_keys(keys);
    command_output(formatted("collect --model_name_or_path @c_lm --dataset_name @p.jsonl "
                             "--max_new_tokens 4 --num_generations 4 --max_samples %d "
                             "--output_dir @%s %s",
                             most, to, keys ? "--quiet" : "--reward_model_path @c_rm"));
    return read_file(&test_arena, temporary(formatted("%s/preferences.jsonl", to)));
}

/* A run that was stopped and begun again, wherever, gives the pairs of one run: prompts that
 * stand in the data set more than once, prompts without a pair, a kill between the two files. */
static void test_collect_resume(void) {
    enum { PROMPTS = 150 };
    make_collectors("--vocab_size 270 --max_steps 2");
    FILE *file = fopen(temporary("p.jsonl"), "wb");
    for (int i = 0; i < PROMPTS; i++)
        fprintf(file, "{\"prompt\": \"%s film\"}\n",
                i % 7   ? i % 3 ? "A" : "The"
                : i % 2 ? "My"
                        : "Our old");
    fclose(file);
    struct Text whole = collected("c_whole", 150, NULL);
    expect_true("there are pairs", whole.length > 5000);
    collected("c_parts", 64, NULL);
    struct Text judged = contents("c_parts/judged.json");
    collected("c_parts", 128, NULL);
    write_text("c_parts/judged.json", judged.data); /* killed before it could write this file */
    expect_true("what a killed run wrote is not written again",
                text_equal(collected("c_parts", 150, NULL), whole));
    expect_true("all is judged", text_equal(collected("c_parts", 150, NULL), whole));
    remove(temporary("c_parts/judged.json"));
    struct Text old = collected("c_parts", 150, NULL);
    expect_true("as an older version left it: what is there stays",
                old.length >= whole.length && memcmp(old.data, whole.data, whole.length) == 0);
    whole = collected("c_keys", 4, "1\n2\ns\ns\n2\n1\n1\n1\n");
    collected("c_half", 4, "1\n2\nq\n");
    collected("c_half", 4, "s\ns\n2\nq\n"); /* in the midst of a prompt */
    expect_true("at the keyboard too", text_equal(collected("c_half", 4, "1\n1\n1\n"), whole));
    collected("c_skip", 2, "s\ns\nq\n");
    struct Text second = collected("c_skip", 2, "1\n2\n");
    expect_true("skipped is judged", second.length > 0 && !strstr(second.data, "Our old film"));
    keyboard_back();
}

/* The commands: a new adapter by sft, reward, ppo and dpo; dpo that goes on with sft's; merged,
 * beside its base and as a model's folder it gives the same log-probabilities; a folder for the
 * one kind is not written by the other. */
static void test_cli_lora(void) {
    write_films();
    struct GPT2 *base = new_model(400, 32, 8, 1, 2);
    model_save(base, temporary("base"), tokenizer);
    static const char *const commands[] = {
        "sft --use_peft --dataset_name @texts.jsonl --lora_r 2 --lora_alpha=6 "
        "--lora_target_modules c_attn mlp.c_proj --use_rslora --output_dir @la_sft",
        "reward --use_peft --dataset_name @pairs.jsonl --output_dir @la_reward",
        "ppo --use_peft --reward_model_path @la_reward --dataset_name @texts.jsonl --batch_size 4 "
        "--mini_batch_size 2 --output_dir @la_ppo",
        "ppo --use_peft --rollouts @la_ppo/rollouts.jsonl --batch_size 4 --mini_batch_size 2 "
        "--output_dir @la_replay",
        "dpo --peft_adapter @la_sft --dataset_name @pairs.jsonl --logging_steps 1 --loss_type "
        "sigmoid ipo --loss_weights 1 0 --output_dir @la_dpo",
        "dpo --use_peft --dataset_name @pairs.jsonl --output_dir @la_new",
    };
    for (size_t i = 0; i < COUNT(commands); i++)
        command_output(formatted("%s --model_name_or_path @base --max_steps 3 --learning_rate "
                                 "0.05",
                                 commands[i]));
    command_output("merge --model_name_or_path @base --peft_adapter @la_dpo --output_dir "
                   "@la_merged");
    struct Text with = command_output("logprob --model_name_or_path @base --peft_adapter @la_dpo "
                                      "--dataset_name @texts.jsonl");
    expect_text("an adapter's folder as the model",
                command_output("logprob --model_name_or_path @la_dpo --dataset_name @texts.jsonl"),
                with.data);
    expect_text("merged",
                command_output("logprob --model_name_or_path @la_merged --dataset_name "
                               "@texts.jsonl"),
                with.data);
    struct Text alone = command_output("logprob --model_name_or_path @base --dataset_name "
                                       "@texts.jsonl");
    struct Text before = command_output("logprob --model_name_or_path @la_sft --dataset_name "
                                        "@texts.jsonl");
    expect_true("trained: not the base, not sft's adapter",
                strcmp(alone.data, with.data) != 0 && strcmp(before.data, with.data) != 0);
    const char *files[][2] = {
        {"@la_ppo/adapter_model.safetensors", "@la_replay/adapter_model.safetensors"},
        {"@la_ppo/model.safetensors", "@la_replay/model.safetensors"},
    };
    for (int i = 0; i < 2; i++) {
        struct Text a = read_file(&test_arena, temporary(files[i][0] + 1));
        struct Text b = read_file(&test_arena, temporary(files[i][1] + 1));
        expect_true("replayed rollouts",
                    a.length == b.length && memcmp(a.data, b.data, a.length) == 0);
    }
    struct Json *first = json_get(log_history("la_dpo")->child, "loss");
    expect_close("dpo starts at ln 2: the reference is sft's adapter", first ? first->number : NAN,
                 log(2), 1e-6);
    static const struct Refusal cases[] = {
        {2, "--lora_dropout 0.1: only 0 is implemented", "sft --use_peft --lora_dropout 0.1"},
        {2, "--lora_r 0", "sft --use_peft --lora_r 0"},
        {2, "give one of them", "sft --use_peft --peft_adapter @la_sft"},
        {1, "--lora_target_modules \"wte\": no linear layer",
         "sft --use_peft --lora_target_modules wte --dataset_name @texts.jsonl --output_dir @x"},
        {1, "holds a model already",
         "sft --use_peft --dataset_name @texts.jsonl --output_dir @base"},
        {1, "holds an adapter already", "sft --dataset_name @texts.jsonl --output_dir @la_sft"},
        {2, "merge needs an adapter", "merge --output_dir @x"},
        {1, "is itself an adapter",
         "sft --peft_adapter @la_sft --model_name_or_path @la_dpo --dataset_name @texts.jsonl "
         "--output_dir @x"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *model = strstr(cases[i].line, "@la_dpo") ? "" : "--model_name_or_path @base";
        const char *line = formatted("%s %s --tokenizer @tokenizer.bin", cases[i].line, model);
        expect_refusal(&cases[i], line);
    }
}

static struct Text trained_in_place(const char *from_and_to) {
    return command_output(formatted("sft --max_steps 1 --dataset_name @t.jsonl "
                                    "--model_name_or_path %s",
                                    from_and_to));
}

/* A folder under other spellings; merge over the adapter's base by any of them is refused, other
 * commands say what they replace. */
static void test_same_folder(void) {
    struct GPT2 *model = new_model(300, 24, 12, 1, 3);
    model_save(model, temporary("same_base"), tokenizer);
    random_adapter(model, 2, "c_attn");
    model->adapter.base_model_name_or_path = temporary("same_base");
    model_save(model, temporary("same_lora"), tokenizer);
    write_json("t.jsonl", "{'text': 'A film that is good, and a fine one.'}\n");
    expect_true("a link is made",
                !FORKS || symlink(temporary("same_base"), temporary("same_link")) == 0);
    static const char *const spellings[] = {
        "same_base", "same_base/", "./same_base", "same_lora/../same_base//.", "same_link",
    };
    for (size_t i = 0; i < COUNT(spellings) && FORKS; i++) {
        const char *name = spellings[i];
        expect_true(name, same_file(temporary(name), temporary("same_base"))
                              && !same_file(temporary(name), temporary("same_lora"))
                              && !same_file(temporary("nowhere"), temporary("nowhere")));
        static const char *const lines[] = {
            "merge --model_name_or_path @same_lora --output_dir @%s --tokenizer @tokenizer.bin",
            "merge --model_name_or_path @%s --peft_adapter @same_lora --output_dir @same_base "
            "--tokenizer @tokenizer.bin",
        };
        for (size_t k = 0; k < COUNT(lines); k++)
            expect_end(name, run_command, words_of(formatted(lines[k], name)), 1,
                       "is the adapter's base; merged over it, the adapter would count twice");
    }
    struct Text said = trained_in_place("@same_base --peft_adapter @same_lora --output_dir "
                                        "@same_lora/");
    expect_true("an adapter trained on in its place",
                strstr(said.data, "is --peft_adapter: the model there will be replaced") != NULL
                    && is_adapter(temporary("same_lora")));
    said = trained_in_place("@same_lora --output_dir @./same_base");
    expect_holds("the base of an adapter", said, "is the base of the adapter --model_name_or_path");
    said = trained_in_place("@same_base --output_dir @same_base");
    expect_holds("a model in its place", said,
                 "is --model_name_or_path: the model there will be replaced");
    said = trained_in_place("@same_base --output_dir @same_new");
    expect_true("nothing is replaced", !strstr(said.data, "replaced"));
}

/* The weights of a folder's model, and which heads it has. */
static float *saved_weights(const char *name, size_t *n, bool *reward_head, bool *value_head) {
    struct GPT2 *model = owned(gpt2_load(temporary(name)));
    float *all = all_weights(model, n);
    *reward_head = model->score.n > 0;
    *value_head = model->v_head.weight.n > 0;
    return all;
}

/* How often a command says that a head is left out. */
static size_t heads_left_out(const char *format, ...) {
    char line[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    struct Text said = command_output(line);
    size_t notes = 0;
    for (const char *at = said.data; (at = strstr(at, "is left out")); at++)
        notes++;
    return notes;
}

static void small_tokenizer_checked(const void *name) {
    tokenizer_check_size(&(struct Tokenizer){.path = "small.bin", .vocab_size = 300}, name, 50257);
}

/* A new model with more ids than the tokenizer is refused before it is trained. */
static void test_tokenizer_size(void) {
    expect_end("more ids than texts", small_tokenizer_checked, "the new model", 1,
               "the new model: has 50257 ids, small.bin only 300; another --tokenizer is needed");
}

/* From a model with both heads each command makes what it makes from the language model below them,
 * bit for bit; the heads that it has no use for are neither trained nor saved, and it says so.
 * reward goes on with the reward head, ppo with the value head, and a reference may be anything. */
static void test_heads_left_out(void) {
    static const struct {
        bool reward_head, value_head;
        size_t notes;
        const char *line;
    } cases[] = {
        {false, false, 2, "sft --dataset_name @h.jsonl"},
        {false, false, 2, "pretrain --max_length 8 --dataset_name @h.jsonl"},
        {false, false, 2, "dpo --dataset_name @h.jsonl --ref_model @h_both"},
        {true, false, 1, "reward --dataset_name @h.jsonl"},
        {false, true, 1,
         "ppo --dataset_name @h.jsonl --reward_model_path @h_both --batch_size 2 --mini_batch_size "
         "2"},
        {false, false, 2,
         "reinforce --dataset_name @h.jsonl --reward_model_path @h_both --batch_size 2"},
    };
    static const struct {
        size_t notes;
        const char *line;
    } tools[] = {
        {1, "generate --prompt x"},
        {1, "next --prompt x"},
        {1, "logprob --dataset_name @t.jsonl"},
        {1, "eval --dataset_name @h.jsonl --reward_model_path @h_both"},
        {0, "score --dataset_name @t.jsonl"},
        {0, "eval --dataset_name @h.jsonl"},
    };
    write_json("t.jsonl", "{'text': 'A film that is good, and a fine one.'}\n");
    write_json("h.jsonl", "{'text': 'A film that is good, and a fine one.', 'prompt': 'A film', "
                          "'chosen': ' that is good', 'rejected': ' that is bad'}\n");
    struct GPT2 *model = new_model(300, 24, 12, 1, 3);
    fill_random(model);
    tensor_normal(reward_head_declare(model), &test_rng, 1);
    value_head_init(model, 1);
    model_save(model, temporary("h_both"), tokenizer);
    model->tensor_count -= 3;
    model->score.n = 0;
    model_save(model, temporary("h_plain"), tokenizer);
    for (size_t i = 0; i < COUNT(cases); i++) {
        const char *what = cases[i].line;
        size_t n[2];
        float *all[2];
        bool heads[2][2];
        for (int both = 0; both < 2; both++) {
            const char *kind = both ? "both" : "plain";
            const char *out = formatted("h_out_%s", kind);
            expect_count(what,
                         heads_left_out("%s --model_name_or_path @h_%s --max_steps 2 "
                                        "--learning_rate 1e-3 --output_dir @%s",
                                        what, kind, out),
                         both ? cases[i].notes : 0);
            all[both] = saved_weights(out, &n[both], &heads[both][0], &heads[both][1]);
        }
        expect_true(what,
                    heads[1][0] == cases[i].reward_head && heads[1][1] == cases[i].value_head);
        if (!cases[i].reward_head && !cases[i].value_head) {
            expect_count(what, n[1], n[0]);
            expect_bits(what, all[1], all[0], MIN(n[0], n[1]));
        }
    }
    for (size_t i = 0; i < COUNT(tools); i++)
        expect_count(tools[i].line,
                     heads_left_out("%s --model_name_or_path @h_both", tools[i].line),
                     tools[i].notes);
}

/* Names as they are compared: accents, case, punctuation, what is no UTF-8. */
static void test_glossary_fold(void) {
    static const char *const cases[][2] = {
        {"Otimiza\xc3\xa7\xc3\xa3o; Top-p", " otimizacao ; top p "},
        {"  Trainer.train() ", " trainer train "},
        {"Par\xc3\x82METRO (\xce\xb2)", " parametro \xce\xb2 "},
        {"A \xc2\xb7 B;c", " a ; b ; c "},
        {"\xff(\xc3", " \xff \xc3 "},
        {"", " "},
        {"x\xe2\x80\x94y", " x\xe2\x80\x94y "},
    };
    for (size_t i = 0; i < COUNT(cases); i++)
        expect_text(cases[i][0], text_of(fold(&test_arena, cases[i][0])), cases[i][1]);
}

static struct Text glossary(const char *a, const char *b, const char *c) {
    capture_begin();
    run_command((const char *const[]){"align", "glossary", a, b, c, NULL});
    return capture_end();
}

/* What a user types, and how the answer begins: by either language, alias, without accents, a
 * beginning, a word, misspelt. */
static void test_glossary_find(void) {
#define NEAREST "no term has this name; the nearest:\n"
#define KL "Diverg\xc3\xaancia de Kullback-Leibler (KL) \xc2\xb7 "
#define DPO "Otimiza\xc3\xa7\xc3\xa3o de prefer\xc3\xaancia direta (DPO) \xc2\xb7 "
    static const char *const cases[][2] = {
        {"Diverg\xc3\xaancia de Kullback-Leibler (KL)", KL},
        {"DIVERGENCIA de kullback leibler", KL},
        {"kl", KL},
        {"Kullback-Leibler divergence", KL},
        {"leibler", KL},
        {"dpo", DPO},
        {"otimiza\xc3\xa7\xc3\xa3o de prefer\xc3\xaancia", DPO},
        {"coleta de dados", "Coleta de dados \xc2\xb7 "},
        {"top p", "Amostragem top-p \xc2\xb7 "},
        {"beam", "Beam search \xc2\xb7 "},
        {"trainer.train", "Trainer.train() \xc2\xb7 "},
        {"\xcf\x84", "Temperatura (\xcf\x84) \xc2\xb7 "},
        {"Tau", "Temperatura (\xcf\x84) \xc2\xb7 "},
        {"\xcf\x89", "Fun\xc3\xa7\xc3\xa3o Omega (\xcf\x89) \xc2\xb7 "},
        {"pi", "Pol\xc3\xadtica \xcf\x80 \xc2\xb7 "},
        {"kulback", NEAREST KL},
        {"divergencia de kullbak", NEAREST KL},
        {"fun\xc3\xa7\xc3\xa3o de recompenza", NEAREST "Fun\xc3\xa7\xc3\xa3o de recompensa "
                                                       "\xc2\xb7 reward function"},
        {"softmaks", NEAREST "Fun\xc3\xa7\xc3\xa3o softmax"},
        {"top", "several terms fit:\n  Amostragem top-k \xc2\xb7 top-k sampling\n  Amostragem "
                "top-p"},
        {"()", "Data and tokens"},
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct Text out = glossary(cases[i][0], NULL, NULL);
        out.length = MIN(out.length, strlen(cases[i][1]));
        expect_text(cases[i][0], out, cases[i][1]);
    }
    struct Text words = glossary("divergencia", "de", "kullback");
    struct Text whole = glossary("divergencia de kullback", NULL, NULL);
    expect_text("several words", words, whole.data);
    expect_true("what a term shows", strstr(words.data, "How far a distribution p")
                                         && strstr(words.data, "Qu\xc3\xa3o longe uma")
                                         && strstr(words.data, "\n- Test: `kl`\n")
                                         && strstr(words.data, "\n- Try: `./align explain kl && "
                                                               "head")
                                         && strstr(words.data, "\n- See also: "));
#undef NEAREST
#undef KL
#undef DPO
}

/* Any bytes, however many, are answered, and without control codes. */
static void test_glossary_find_odd(void) {
    char *odd = arena_alloc(&test_arena, 100000, 1);
    for (size_t i = 0; i < 99999; i++)
        odd[i] = (char)(1 + rng_below(&test_rng, 255));
    odd[99999] = 0;
    expect_true("any bytes, very long", glossary(odd, odd + 50000, "-").length > 0);
    for (const unsigned char *c =
             (const unsigned char *)glossary("\x1b[31mred\x07", NULL, NULL).data;
         *c; c++)
        expect_true("no control codes", *c >= 32 || *c == '\n');
}

/* Without a term all of them, a line each; each one found by both its names. */
static void test_glossary_terms(void) {
    struct Text all = glossary(NULL, NULL, NULL);
    size_t terms = 0;
    for (char *rest = (char *)all.data, *name; (name = strsep(&rest, "\n"));) {
        if (strncmp(name, "  ", 2) != 0)
            continue;
        char *english = strstr(name, " \xc2\xb7 ");
        struct Text by_english = glossary(english + 4, NULL, NULL);
        *english = 0;
        struct Text out = glossary(name + 2, NULL, NULL);
        expect_text(name, out, by_english.data);
        expect_true(name, strncmp(out.data, name + 2, strlen(name + 2)) == 0);
        terms++;
    }
    expect_count("terms", terms, 63);
}

/* =============================================================================================
 * Fixtures
 *
 * Models of transformers and what it computed for them (--fixtures DIR).
 * ============================================================================================= */

static const char *fixture(const char *name) {
    return formatted("%s/%s", fixtures, name);
}

/* A tensor's bytes and shape, whatever its type and number of dimensions. */
static void *fixture_tensor(struct SafeTensors *st, const char *name, size_t shape[3], size_t *n) {
    struct Json *entry = json_get(st->header, name);
    struct Json *offsets = json_get(entry, "data_offsets");
    CHECK(entry, "%s: no %s", st->path, name);
    size_t dims = 0;
    size_t begin = (size_t)offsets->child->number;
    size_t bytes = (size_t)offsets->child->next->number - begin;
    for (struct Json *item = json_get(entry, "shape")->child; item && dims < 3; item = item->next)
        shape[dims++] = (size_t)item->number;
    void *data = arena_alloc(&test_arena, bytes, 1);
    CHECK(fseeko(st->file, (off_t)(st->data_start + begin), SEEK_SET) == 0
              && fread(data, 1, bytes, st->file) == bytes,
          "%s: %s cannot be read", st->path, name);
    *n = bytes / 4;
    return data;
}

/* The length of the difference, relative to what is expected. */
static void expect_tensor(const char *what, const float *got, const float *want, size_t n,
                          double tolerance) {
    double difference = 0;
    for (size_t i = 0; i < n; i++)
        difference += pow((double)got[i] - want[i], 2);
    expect_close(what, sqrt(difference) / (norm_of(want, n) + 1e-12), 0, tolerance);
}

/* Logits, loss and every gradient of a batch (B,T). */
static void test_fixtures_gradient(void) {
    struct GPT2 *model = owned(gpt2_load(fixture("model")));
    struct SafeTensors st = safetensors_open(&test_arena, fixture("expected/"
                                                                  "forward_backward.safetensors"));
    size_t shape[3], n;
    size_t V = model->config.vocab_size;
    int *ids = fixture_tensor(&st, "input_ids", shape, &n);
    size_t B = shape[0];
    size_t T = shape[1];
    struct Example *examples = arena_alloc(&test_arena, B, sizeof *examples);
    for (size_t b = 0; b < B; b++)
        examples[b] = (struct Example){ids + b * T, T, 1};
    struct Batch batch = batch_of(examples, B, READ_LAST);
    float *logits = fixture_tensor(&st, "logits", shape, &n);
    expect_count("logits", n, B * T * V);
    expect_tensor("logits", batch_logits(model, &batch), logits, MIN(n, batch.N * V), 1e-4);
    gpt2_make_trainable(model);
    struct LMHead head = cross_entropy_gradient(model, &batch, 1, 1 / (float)batch.R, 0);
    expect_relative("loss", -sequence_logprob(head.logprob, batch.R) / (double)batch.R,
                    *(float *)fixture_tensor(&st, "loss", shape, &n), 1e-5);
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        float *want = fixture_tensor(&st, formatted("grad.transformer.%s", t->name), shape, &n);
        expect_count(t->name, n, t->n);
        expect_tensor(t->name, t->d, want, MIN(n, t->n), 1e-4);
    }
    fclose(st.file);
}

/* Log-probabilities of every token, for each form in which the model is stored. */
static void test_fixtures_logprob(void) {
    static const struct {
        const char *name;
        double tolerance;
    } models[] = {
        {"model", 5e-5},
        {"model_sharded", 5e-5},
        {"model_f16", 3e-2},
        {"model_bf16", 2e-1},
    };
    for (size_t m = 0; m < COUNT(models); m++) {
        if (!file_exists(fixture(models[m].name)))
            continue;
        struct GPT2 *model = owned(gpt2_load(fixture(models[m].name)));
        struct Text file = read_file(&test_arena, fixture("expected/logprob.jsonl"));
        size_t lines = 0;
        size_t V = model->config.vocab_size;
        for (struct Json *json; (json = next_line(&file)); lines++) {
            struct Example e = {0};
            size_t n;
            e.ids = json_ids(&test_arena, json_get(json, "input_ids"), &e.n, "fixture");
            int *ids = encode(json_get(json, "text")->string, V, &n);
            expect_ids("ids", ids, MIN(n, model->config.n_positions), e.ids, e.n);
            struct Batch batch = batch_of(&e, 1, SKIP_LAST);
            struct LMHead head = batch_logprobs(model, &test_arena, &batch, 1, false);
            size_t t = 0;
            for (struct Json *item = json_get(json, "token_logprobs")->child; item;
                 item = item->next, t++)
                expect_close(models[m].name, t < batch.R ? head.logprob[t] : NAN, item->number,
                             models[m].tolerance);
            expect_count("log-probabilities", batch.R, t);
        }
        expect_true("lines", lines > 0);
    }
}

static void test_fixtures_reward(void) {
    if (!file_exists(fixture("reward")))
        return;
    struct GPT2 *model = owned(gpt2_load(fixture("reward")));
    struct Text file = read_file(&test_arena, fixture("expected/reward_scores.jsonl"));
    size_t lines = 0;
    for (struct Json *json; (json = next_line(&file)); lines++) {
        struct Example e = example_encode(&test_arena, tokenizer, json_get(json, "text")->string,
                                          model->config.vocab_size, NULL);
        float reward;
        e.n = MIN(e.n, model->config.n_positions);
        reward_score(model, &e, 1, &reward);
        expect_close("reward", reward, json_get(json, "reward")->number, 5e-5);
    }
    expect_true("lines", lines > 0);
}

/* =============================================================================================
 * The table of tests, main
 * ============================================================================================= */

static const struct {
    const char *name;
    void (*run)(void);
} TESTS[] = {
    {"arena_pieces", test_arena_pieces},
    {"arena_text", test_arena_text},
    {"rng_known", test_rng_known},
    {"rng_distributions", test_rng_distributions},
    {"sigmoid", test_sigmoid},
    {"softmax", test_softmax},
    {"entropy", test_entropy},
    {"kl", test_kl},
    {"exp_fast", test_exp_fast},
    {"rows", test_rows},
    {"rows_argmax", test_rows_argmax},
    {"data_pairs", test_data_pairs},
    {"bradley_terry", test_losses},
    {"bradley_terry_gradient", test_losses},
    {"sentiment_loss", test_losses},
    {"reinforce_loss", test_losses},
    {"ppo_token_loss", test_losses},
    {"ppo_value_loss", test_losses},
    {"grpo_token_loss", test_losses},
    {"dpo_hand", test_losses},
    {"dpo_golden", test_losses},
    {"ppo_whiten_golden", test_ppo_whiten_golden},
    {"reinforce_advantages", test_reinforce_advantages},
    {"reinforce_advantages_variance", test_reinforce_advantages_variance},
    {"ppo_penalties_golden", test_ppo_penalties_golden},
    {"ppo_kl_controller", test_ppo_kl_controller},
    {"gae_hand", test_gae_hand},
    {"ppo_example", test_ppo_example},
    {"running_moments", test_running_moments},
    {"ppo_token_loss_clipped", test_ppo_token_loss_clipped},
    {"ppo_value_loss_clipped", test_ppo_value_loss_clipped},
    {"ppo_loss_gradient", test_ppo_loss_gradient},
    {"grpo_advantages", test_grpo_advantages},
    {"grpo_advantages_nothing", test_grpo_advantages_nothing},
    {"grpo_advantages_golden", test_grpo_advantages_golden},
    {"grpo_token_loss_clipped", test_grpo_token_loss_clipped},
    {"grpo_shares", test_grpo_shares},
    {"grpo_loss_golden", test_grpo_loss_golden},
    {"grpo_loss_golden_tokens", test_grpo_loss_golden_tokens},
    {"grpo_gradient", test_grpo_gradient},
    {"exact_optimum", test_exact_optimum},
    {"exact_optimum_objective", test_exact_optimum_objective},
    {"dpo_hand_sums", test_dpo_hand_sums},
    {"kth_largest", test_kth_largest},
    {"generate_processors", test_generate_processors},
    {"generate_processors_ngram", test_generate_processors_ngram},
    {"generate_processors_top_k", test_generate_processors_top_k},
    {"generate_processors_top_p", test_generate_processors_top_p},
    {"generate_processors_order", test_generate_processors_order},
    {"generate_example", test_generate_example},
    {"generate_filters_golden", test_generate_filters_golden},
    {"generate_distribution", test_generate_distribution},
    {"tokenizer_words", test_tokenizer_words},
    {"tokenizer_cases", test_tokenizer_cases},
    {"tokenizer_bytes", test_tokenizer_bytes},
    {"tokenizer_bytes_classes", test_tokenizer_bytes_classes},
    {"tokenizer_heap", test_tokenizer_heap},
    {"tokenizer_plain", test_tokenizer_plain},
    {"tokenizer_long_word", test_tokenizer_long_word},
    {"tokenizer_small", test_tokenizer_small},
    {"data_implicit_prompt", test_data_implicit_prompt},
    {"data_prompt_completion", test_data_prompt_completion},
    {"collate", test_collate},
    {"collate_pairs", test_collate_pairs},
    {"collate_pairs_logprobs", test_collate_pairs_logprobs},
    {"data_length_sampler", test_data_length_sampler},
    {"kernel_choose", test_kernel_choose},
    {"matmul", test_matmul},
    {"pack_panel", test_pack_panel},
    {"matmul_plain", test_matmul_plain},
    {"matmul_threads", test_matmul_threads},
    {"embedding", test_embedding},
    {"linear_hand", test_linear_hand},
    {"linear_golden", test_linear_golden},
    {"linear_gradient", test_linear_gradient},
    {"few_rows", test_few_rows},
    {"few_rows_logits", test_few_rows_logits},
    {"rows_company", test_rows_company},
    {"layernorm", test_layernorm},
    {"layernorm_golden", test_layernorm_golden},
    {"layernorm_gradient", test_layernorm_gradient},
    {"gelu", test_gelu},
    {"gelu_hand", test_gelu_hand},
    {"gelu_range", test_gelu_range},
    {"gelu_gradient", test_gelu_gradient},
    {"attention_hand", test_attention_hand},
    {"attention", test_attention},
    {"attention_golden", test_attention_golden},
    {"attention_gradient", test_attention_gradient},
    {"gpt2_init", test_gpt2_init},
    {"gpt2_golden", test_gpt2_golden},
    {"lm_head_hand", test_lm_head_hand},
    {"lm_head_backward_hand", test_lm_head_backward_hand},
    {"wte_hand", test_wte_hand},
    {"gpt2_gradient_golden", test_gpt2_gradient_golden},
    {"gpt2_gradient", test_gpt2_gradient},
    {"gpt2_chunks", test_gpt2_chunks},
    {"gpt2_packed", test_gpt2_packed},
    {"reward_head_gradient_hand", test_reward_head_gradient_hand},
    {"reward_head_gradient", test_reward_head_gradient},
    {"value_head_init", test_value_head_init},
    {"reward_rows", test_reward_rows},
    {"reward_rows_score", test_reward_rows_score},
    {"reward_golden", test_reward_golden},
    {"lora_hand", test_lora_hand},
    {"lora_targets", test_lora_targets},
    {"lora_start", test_lora_start},
    {"lora_start_bits", test_lora_start_bits},
    {"lora_gradient", test_lora_gradient},
    {"lora_merge", test_lora_merge},
    {"lora_reference", test_lora_reference},
    {"lora_frozen", test_lora_frozen},
    {"generate_golden", test_generate_golden},
    {"generate_decode", test_generate_decode},
    {"generate_cache", test_generate_cache},
    {"generate_company", test_generate_company},
    {"generate_context", test_generate_context},
    {"beam_search_hand", test_beam_search_hand},
    {"beam_search_golden", test_beam_search_golden},
    {"beam_search_exhaustive", test_beam_search_exhaustive},
    {"beam_search_negative", test_beam_search_negative},
    {"beam_search_stops", test_beam_search_stops},
    {"beam_candidates", test_beam_candidates},
    {"sqrt_fast", test_sqrt_fast},
    {"adamw_hand", test_adamw_hand},
    {"adamw_hand_comment", test_adamw_hand_comment},
    {"adamw_golden", test_adamw_golden},
    {"schedule", test_schedule},
    {"schedule_hand", test_schedule_hand},
    {"trainer_steps", test_trainer_steps},
    {"trainer_steps_accumulate", test_trainer_steps_accumulate},
    {"trainer_steps_weight", test_trainer_steps_weight},
    {"trainer_epoch", test_trainer_epoch},
    {"trainer_threads", test_trainer_threads},
    {"metric_units", test_metric_units},
    {"eval_batch_size", test_eval_batch_size},
    {"evaluation_interrupted", test_evaluation_interrupted},
    {"state_say", test_state_say},
    {"language_pack", test_language_pack},
    {"language_sft_rows", test_language_sft_rows},
    {"language_hand", test_language_hand},
    {"language_hand_rows", test_language_hand_rows},
    {"language_overfit", test_language_overfit},
    {"reward_gradient", test_reward_gradient},
    {"reward_metrics", test_reward_metrics},
    {"reward_equal_pairs", test_reward_equal_pairs},
    {"reward_overfit", test_reward_overfit},
    {"reward_company", test_reward_company},
    {"ppo_scores_golden", test_ppo_scores_golden},
    {"ppo_scores_clipped", test_ppo_scores_clipped},
    {"ppo_rewards", test_ppo_rewards},
    {"ppo_advantages_golden", test_ppo_advantages_golden},
    {"ppo_advantages_golden_short", test_ppo_advantages_golden_short},
    {"ppo_loss_golden", test_ppo_loss_golden},
    {"ppo_gradient", test_ppo_gradient},
    {"ppo_step", test_ppo_step},
    {"ppo_trace_shows", test_ppo_trace_shows},
    {"ppo_trace", test_ppo_trace},
    {"grpo_gradient_model", test_grpo_gradient_model},
    {"grpo_positions", test_grpo_positions},
    {"grpo_positions_right", test_grpo_positions_right},
    {"grpo_logs", test_grpo_logs},
    {"grpo_logs_golden", test_grpo_logs_golden},
    {"grpo_logs_window", test_grpo_logs_window},
    {"grpo_step", test_grpo_step},
    {"grpo_step_accumulate", test_grpo_step_accumulate},
    {"grpo_threads", test_grpo_threads},
    {"grpo_raises_reward", test_grpo_raises_reward},
    {"scorer_prefixes", test_scorer_prefixes},
    {"ppo_guards", test_ppo_guards},
    {"ppo_guards_ratio", test_ppo_guards_ratio},
    {"ppo_threads", test_ppo_threads},
    {"ppo_raises_reward", test_ppo_raises_reward},
    {"ppo_replay", test_ppo_replay},
    {"reinforce_gradient", test_reinforce_gradient},
    {"reinforce_step", test_reinforce_step},
    {"reinforce_raises_reward", test_reinforce_raises_reward},
    {"scorer_scale", test_scorer_scale},
    {"dpo_model_gradient", test_dpo_model_gradient},
    {"dpo_pairs", test_dpo_pairs},
    {"dpo_equal_pairs", test_dpo_equal_pairs},
    {"dpo_overfit", test_dpo_overfit},
    {"data_end_token", test_data_end_token},
    {"answer_end", test_answer_end},
    {"weighted_score", test_weighted_score},
    {"score_missing", test_score_missing},
    {"command_words", test_command_words},
    {"reward_line", test_reward_line},
#ifndef _WIN32
    {"program_judge", test_program_judge},
    {"program_judge_errors", test_program_judge_errors},
    {"program_find", test_program_find},
#endif
    {"collect_identical", test_collect_identical},
    {"exact_figures", test_exact_figures},
    {"exact_best_of_n", test_exact_best_of_n},
    {"exact_grpo_limit", test_exact_grpo_limit},
    {"exact_dpo_loss", test_exact_dpo_loss},
    {"exact_dpo_loss_slopes", test_exact_dpo_loss_slopes},
    {"exact_dpo_gradient", test_exact_dpo_gradient},
    {"exact_run", test_exact_run},
    {"best_of_n", test_best_of_n},
    {"best_of_n_expected", test_best_of_n_expected},
    {"evaluation", test_evaluation},
    {"whole_words", test_whole_words},
    {"evaluation_kl", test_evaluation_kl},
    {"explain_example", test_explain_example},
    {"explain_again", test_explain_again},
    {"explain_text", test_explain_text},
    {"explain_errors", test_explain_errors},
    {"explain_print", test_explain_print},
    {"explain_numbers", test_explain_numbers},
    {"explain_backprop", test_explain_backprop},
    {"explain_models", test_explain_models},
    {"explain_model_flags", test_explain_model_flags},
    {"explain_golden_softmax", test_explain_golden_softmax},
    {"explain_golden_sampling", test_explain_golden_sampling},
    {"explain_golden_kl", test_explain_golden_kl},
    {"explain_golden_reward", test_explain_golden_reward},
    {"explain_golden_reinforce", test_explain_golden_reinforce},
    {"explain_golden_ppo", test_explain_golden_ppo},
    {"explain_golden_dpo", test_explain_golden_dpo},
    {"explain_golden_exact", test_explain_golden_exact},
    {"json_values", test_json_values},
    {"json_errors", test_json_errors},
    {"json_write", test_json_write},
    {"text_shown", test_text_shown},
    {"files", test_files},
    {"output_resume", test_output_resume},
    {"data_shapes", test_data_shapes},
    {"data_unused_fields", test_data_unused_fields},
    {"data_folder", test_data_folder},
    {"data_others", test_data_others},
    {"data_splits", test_data_splits},
    {"data_splits_said", test_data_splits_said},
    {"data_splits_links", test_data_splits_links},
    {"data_written_ends", test_data_written_ends},
    {"data_formats", test_data_formats},
    {"broken_data", test_broken_data},
    {"tokenizer_save", test_tokenizer_save},
    {"broken_tokenizer", test_broken_tokenizer},
    {"safetensors_half", test_safetensors_half},
    {"safetensors_round_trip", test_safetensors_round_trip},
    {"bare_name", test_bare_name},
    {"model_save", test_model_save},
    {"model_special_tokens", test_model_special_tokens},
    {"gpt2_load", test_gpt2_load},
    {"output_layer", test_output_layer},
    {"config_names", test_config_names},
    {"two_labels", test_two_labels},
    {"two_labels_golden", test_two_labels_golden},
    {"lora_round_trip", test_lora_round_trip},
    {"lora_partial", test_lora_partial},
    {"lora_broken", test_lora_broken},
    {"broken_lfs", test_broken_lfs},
    {"broken_weights", test_broken_weights},
    {"broken_config", test_broken_config},
    {"bad_numbers", test_bad_numbers},
    {"first_not_finite", test_first_not_finite},
    {"progress_cut", test_progress_cut},
    {"trainer_state", test_trainer_state},
    {"checkpoint_resume", test_checkpoint_resume},
    {"checkpoint_complete", test_checkpoint_complete},
    {"checkpoint_limit", test_checkpoint_limit},
    {"checkpoint_clean", test_checkpoint_clean},
    {"checkpoint_age", test_checkpoint_age},
    {"checkpoint_errors", test_checkpoint_errors},
    {"full_disk", test_full_disk},
    {"broken_messages", test_broken_messages},
    {"shell_word", test_shell_word},
    {"report_json", test_report_json},
    {"report_page", test_report_page},
    {"report_refusals", test_report_refusals},
    {"cli_errors", test_cli_errors},
    {"edit_distance", test_edit_distance},
    {"cli_spelling", test_cli_spelling},
    {"cli_idle", test_cli_idle},
    {"cli_about", test_cli_about},
    {"cli_help", test_cli_help},
    {"reward_head_stream", test_reward_head_stream},
    {"encode_prompts", test_encode_prompts},
    {"cli_course", test_cli_course},
    {"cli_collect", test_cli_collect},
    {"cli_collect_keys", test_cli_collect_keys},
    {"cli_reinforce", test_cli_reinforce},
    {"cli_grpo", test_cli_grpo},
    {"cli_grpo_resume", test_cli_grpo_resume},
    {"cli_eval", test_cli_eval},
    {"collect_resume", test_collect_resume},
    {"cli_lora", test_cli_lora},
    {"same_folder", test_same_folder},
    {"tokenizer_size", test_tokenizer_size},
    {"heads_left_out", test_heads_left_out},
    {"glossary_fold", test_glossary_fold},
    {"glossary_find", test_glossary_find},
    {"glossary_find_odd", test_glossary_find_odd},
    {"glossary_terms", test_glossary_terms},
    {"fixtures_gradient", test_fixtures_gradient},
    {"fixtures_logprob", test_fixtures_logprob},
    {"fixtures_reward", test_fixtures_reward},
};

static bool is_test(const char *name) {
    for (size_t i = 0; i < COUNT(TESTS); i++)
        if (strcmp(TESTS[i].name, name) == 0)
            return true;
    return false;
}

static bool selected(const char *name, int argc, char **argv) {
    bool any = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--fixtures") == 0) {
            i++;
            continue;
        }
        any = true;
        if (strncmp(name, argv[i], strlen(argv[i])) == 0)
            return true;
    }
    return !any;
}

static void remove_folder(const char *path) {
    DIR *open = opendir(path);
    if (!open)
        return;
    for (struct dirent *entry; (entry = readdir(open));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        char *inner = arena_printf(&test_arena, "%s/%s", path, entry->d_name);
        if (is_folder(inner))
            remove_folder(inner);
        else
            unlink(inner);
    }
    closedir(open);
    rmdir(path);
}

static size_t passed, not_passed;
static pid_t own_process;

/* The last line, also when a test ends the program where it should not. */
static void finish(void) {
    if (getpid() != own_process)
        return; /* a child of run_apart */
    if (test_name)
        printf("FAILED %s: it ended the program\n", test_name);
    remove_folder(folder);
    arena_free(&test_arena);
    printf("%zu passed, %zu failed\n", passed, not_passed + (test_name != NULL));
}

int main(int argc, char **argv) {
    openmp_spin_briefly();
    arithmetic_check();
#ifdef _WIN32
    _fmode = _O_BINARY; /* as main does */
#endif
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.3900s/test_align.XXXXXX", base && *base ? base : "/tmp");
    for (char *c = folder; *c; c++)
        if (*c == '\\')
            *c = '/'; /* as Windows writes it */
    CHECK(mkdtemp(folder), "%s: %s", folder, strerror(errno));
    own_process = getpid();
    atexit(finish);
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], "--fixtures") == 0)
            fixtures = argv[i + 1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    kernel_choose();
    /* more only where threads are tested: small regions are slow on a busy machine */
    use_threads(1);
    quiet = true;
    struct Options options = default_options("generate");
    tokenizer = load_tokenizer(&options);
    thin = thin || getenv("TEST_THIN");
    bool slow = getenv("TEST_SECONDS") != NULL; /* says how long each test took */
    for (size_t i = 0; i < COUNT(TESTS); i++) {
        if (!selected(TESTS[i].name, argc, argv)
            || (!fixtures && strncmp(TESTS[i].name, "fixtures", 8) == 0))
            continue;
        double begin = seconds_now();
        test_name = TESTS[i].name;
        test_rng = rng_seed(7, 77);
        failures = 0;
        TESTS[i].run();
        if (failures)
            printf("FAILED %s: %zu checks\n", test_name, failures);
        *(failures ? &not_passed : &passed) += 1;
        if (slow)
            printf("%8.3f s  %s\n", seconds_now() - begin, test_name);
        while (owned_count)
            gpt2_free(owned_models[--owned_count]);
        use_threads(1);
        arena_free(&test_arena);
    }
    test_name = NULL;
    options_close(&options);
    return not_passed > 0;
}
