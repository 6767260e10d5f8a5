/* bench.c -- how fast this machine trains, generates, and takes PPO and DPO steps, with align.c.
 *
 *     make bench                                                    GPT-2 124M, 3.9 GB of memory
 *     make bench BENCH="--n_layer 2 --n_embd 128 --vocab_size 2048 --json"
 *     make bench BENCH="--per_device_train_batch_size 4 --max_length 256"        that step alone
 *
 * Each work is done once a round, in turn, for at least five rounds and some seconds; the first
 * round warms up, and of the others the best counts. Machines are shared: the best time says what
 * the program needs, the mean also what the neighbours took. Beside the works stands a limit: what
 * the register tile (align.c, chapter 9) does alone, its data in the first cache. Training's share
 * of it is what is worth improving. docs/performance.md has figures, docs/metrics.md explains
 * each key of --json.
 *
 * align.c is included as it is: its functions are static, and this file calls them directly. */
#define ALIGN_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function" /* the command line's, for one */
#include "../../align.c"

/* The flags, each named and read as align reads its own; see struct Flag. */
static const struct Flag BENCH_FLAGS[] = {
    {OF(config, n_layer), &KIND_COUNT, "", "blocks"},
    {OF(config, n_head), &KIND_COUNT, "", "attention heads"},
    {OF(config, n_embd), &KIND_COUNT, "", "width"},
    {OF(config, n_positions), &KIND_COUNT, "", "longest context, 80 or more"},
    {OF(config, vocab_size), &KIND_SIZE, "", "ids, the end token included"},
    {OF(train, per_device_train_batch_size), &KIND_BATCH, "",
     "only a training step, on so many rows"},
    {OF(train, max_length), &KIND_COUNT, "", "only a training step, rows so long"},
    {OF(ppo, batch_size), &KIND_COUNT, "", "queries of a PPO step"},
    {NAMED(json), &KIND_BOOL, "", "one JSON object"},
    {NAMED(quiet), &KIND_BOOL, "", "no progress on stderr"},
    {NAMED(help), &KIND_BOOL, "", "this list"},
};

/* What the works share. */
struct Bench {
    struct GPT2 *model, *ref_model;
    struct Arena arena;
    struct Rng rng;
    struct Trainer trainer;
    struct RolloutTrainer *ppo;
    size_t steps, weights; /* weights: GPT-2's own, without the value head that PPO adds */
};

/* One kind of work, on n texts, pairs or queries of at most `length` tokens; `tokens` of each are
 * trained on or generated, which is what its speed counts. */
struct BenchWork {
    const char *name, *key;
    void (*run)(struct Bench *, size_t n, size_t length);
    size_t n, length, tokens;
    double best; /* seconds of its fastest round; infinite: not run */
};

/* The limit: multiply-adds of the register tile alone, on all threads, its panels in the first
 * cache. Returns floating-point operations a second; a multiply-add is two. */
static double bench_peak(void) {
    enum { K = 128, REPEATS = 20000 };
    double begin = seconds_now();
#pragma omp parallel
    {
        float *panels = thread_scratch(SCRATCH_A, (8 + 32) * K + TILE_MAX, sizeof *panels);
        float *c = panels + (8 + 32) * K;
        memset(panels, 0, (8 + 32) * K * sizeof *panels);
        for (int i = 0; i < REPEATS; i++)
            kernel->tile(K, panels + 32 * K, panels, NULL, 0, c, kernel->NR);
    }
    double operations = 2.0 * (double)(kernel->MR * kernel->NR) * K * REPEATS;
    return operations * omp_get_max_threads() / (seconds_now() - begin);
}

/* n texts of random ids: what a text says does not change how long it takes. */
static struct Example *bench_texts(struct Bench *bench, size_t n, size_t length,
                                   size_t prompt_length) {
    struct Example *texts = arena_alloc(&bench->arena, n, sizeof *texts);
    for (size_t i = 0; i < n; i++) {
        texts[i] = (struct Example){arena_alloc(&bench->arena, length, sizeof(int)), length,
                                    prompt_length};
        for (size_t t = 0; t < length; t++)
            texts[i].ids[t] = (int)rng_below(&bench->rng, bench->model->config.vocab_size - 1);
    }
    return texts;
}

/* One step on n items of the trainer's task: forward, loss, backward, AdamW. */
static void bench_step(struct Bench *bench, size_t n) {
    bench->trainer.args.per_device_train_batch_size = n;
    trainer_accumulate(&bench->trainer, arena_order(&bench->arena, n), n);
    optimizer_step(bench->model, &bench->trainer.args, 1e-6, ++bench->steps);
}

static void bench_train(struct Bench *bench, size_t n, size_t length) {
    struct LanguageTask task = {.examples = {[TO_LEARN] = bench_texts(bench, n, length, 0)}};
    bench->trainer.task =
        (struct Task){.data = &task, .loss = language_loss, .targets = language_targets};
    bench_step(bench, n);
}

/* A DPO step: of the two texts of a pair the first 16 tokens, the prompt, are the same. */
static void bench_dpo(struct Bench *bench, size_t n, size_t length) {
    struct Example *pairs = bench_texts(bench, 2 * n, length, 16);
    for (size_t i = 0; i < 2 * n; i += 2)
        memcpy(pairs[i + 1].ids, pairs[i].ids, 16 * sizeof(int));
    dpo_task(&bench->trainer, &bench->arena, bench->ref_model,
             (struct DPOConfig){.beta = 0.1, .weight = {1}}, 1, pairs, n);
    bench_step(bench, n);
}

/* Exactly so many new tokens after each prompt. */
static struct Example *bench_answers(struct Bench *bench, struct Example *prompts, size_t n,
                                     size_t new_tokens, bool do_sample) {
    struct GenerationConfig generation = generation_config();
    generation.max_new_tokens = generation.min_new_tokens = new_tokens;
    generation.do_sample = do_sample;
    generation.top_k = 0;
    struct Rng rng = rng_seed(rng_next(&bench->rng), STREAM_SAMPLE);
    return sample_answers(bench->model, &bench->arena, prompts, n, 1, &generation, &rng);
}

static void bench_generate(struct Bench *bench, size_t n, size_t length) {
    bench_answers(bench, bench_texts(bench, n, 32, 0), n, length - 32, false);
}

/* A PPO step: queries of 2 to 7 tokens, 10 new tokens each, scores, 4 epochs of one mini-batch. */
static void bench_ppo(struct Bench *bench, size_t n, size_t length) {
    struct Rollout *rollouts = arena_alloc(&bench->arena, n, sizeof *rollouts);
    struct Example *queries = bench_texts(bench, n, 7, 0);
    for (size_t i = 0; i < n; i++)
        queries[i].n = 2 + i % 6;
    struct Example *answers = bench_answers(bench, queries, n, length - 7, true);
    for (size_t i = 0; i < n; i++)
        rollouts[i] = (struct Rollout){answers[i], (float)rng_normal(&bench->rng)};
    ppo_step(bench->ppo, rollouts);
}

/* The works of a whole bench. The last one's n is --batch_size. */
static struct BenchWork WORKS[] = {
    {"train 4 x 64", "train", bench_train, 4, 64, 64, INFINITY},
    {"train 16 x 64", "train_16x64", bench_train, 16, 64, 64, INFINITY},
    {"train 4 x 256", "train_4x256", bench_train, 4, 256, 256, INFINITY},
    {"train 1 x 1024", "train_1x1024", bench_train, 1, 1024, 1024, INFINITY},
    {"generate 48 after 32", "generate", bench_generate, 1, 80, 48, INFINITY},
    {"generate 16 x 48 after 32", "generate_batch", bench_generate, 16, 80, 48, INFINITY},
    {"dpo step, 4 pairs of 64", "dpo_step", bench_dpo, 4, 64, 128, INFINITY},
    {"ppo step, 4 epochs", "ppo_step", bench_ppo, 0, 17, 10, INFINITY},
};

static const struct Flag *bench_flag(const char *word) {
    size_t length = strcspn(word + 2, "=");
    for (size_t i = 0; i < COUNT(BENCH_FLAGS); i++)
        if (strlen(BENCH_FLAGS[i].name) == length
            && strncmp(word + 2, BENCH_FLAGS[i].name, length) == 0)
            return &BENCH_FLAGS[i];
    die_usage("bench has no flag %s (all: make bench BENCH=--help)", word);
}

/* --name value, --name=value, or a bare boolean. Three sizes start as 0, which no command line can
 * give: not chosen. */
static struct Options bench_options(int argc, char **argv) {
    struct Options o = default_options("pretrain");
    o.train.per_device_train_batch_size = o.train.max_length = 0;
    o.ppo.batch_size = 0;
    for (int i = 1; i < argc; i++) {
        if (!is_flag(argv[i]) || argv[i][1] != '-')
            die_usage("bench: \"%s\" is no flag (all: make bench BENCH=--help)", argv[i]);
        const struct Flag *flag = bench_flag(argv[i]);
        const char *value = strchr(argv[i], '=');
        if (value)
            value++;
        else if (argv[i + 1] && !is_flag(argv[i + 1]))
            value = argv[++i];
        parse_flag(&o, flag, value);
    }
    quiet = o.quiet;
    return o;
}

static void bench_help(void) {
    puts("bench -- speed of training, generation, DPO and PPO here. make bench BENCH=\"FLAGS\":");
    for (size_t i = 0; i < COUNT(BENCH_FLAGS); i++)
        printf("  --%-29s%s\n", BENCH_FLAGS[i].name, BENCH_FLAGS[i].help);
}

/* Makes sizes fit each other, and refuses those with which a work could not be done. */
static void bench_check(struct Options *o) {
    size_t length = o->train.max_length;
    CHECK(kernel, "bench measures a kernel; ALIGN_KERNEL=plain has none");
    CHECK(o->ppo.batch_size <= 4096, "--batch_size %zu: 1 to 4096 queries", o->ppo.batch_size);
    if (o->config.n_embd % o->config.n_head)
        o->config.n_head = MAX((size_t)1, o->config.n_embd / 64);
    o->config.eos_token_id = o->config.pad_token_id = (int)o->config.vocab_size - 1;
    config_check(&o->config, "--n_layer, --n_head, --n_embd, --n_positions, --vocab_size");
    CHECK(length <= o->config.n_positions && length != 1 && o->config.n_positions >= 80,
          "--max_length %zu: 2 to --n_positions, %zu, which is 80 or more", length,
          o->config.n_positions);
}

/* All works, or only a training step of the user's size. Returns how many WORKS there are now. */
static size_t bench_choose(struct Options *o) {
    size_t n = o->train.per_device_train_batch_size;
    size_t length = o->train.max_length;
    if (n == 0 && length == 0) {
        if (o->ppo.batch_size == 0)
            o->ppo.batch_size = 16;
        WORKS[COUNT(WORKS) - 1].n = o->ppo.batch_size;
        return COUNT(WORKS);
    }
    if (o->ppo.batch_size > 0)
        warn("--batch_size: no effect: a training step alone is timed");
    WORKS[0].name = "train";
    WORKS[0].n = n ? n : 4;
    WORKS[0].length = WORKS[0].tokens = length ? length : 64;
    return 1;
}

/* A model of random weights, and what trains it; for all works also a reference and PPO. */
static struct Bench bench_open(struct Options *o, bool all) {
    struct Bench bench = {
        .model = o->model = gpt2_new(o->config),
        .rng = rng_seed(42, STREAM_SAMPLE),
        .trainer.args = training_arguments(),
    };
    bench.trainer.model = bench.model;
    gpt2_init(bench.model, 42);
    gpt2_make_trainable(bench.model);
    bench.weights = gpt2_parameters(bench.model);
    if (!all)
        return bench;
    o->ppo.mini_batch_size = o->ppo.batch_size;
    o->ppo.ratio_threshold = INFINITY; /* no mini-batch is skipped: all rounds do the same work */
    bench.ref_model = o->reference = gpt2_copy(bench.model);
    bench.ppo = ppo_trainer_new(bench.model, bench.ref_model, o->ppo, bench.trainer.args, 1);
    bench.ppo->args.learning_rate = 1e-6;
    bench.ppo->total_steps = 1000;
    return bench;
}

/* Does each work once a round and notes its best time. Returns the highest limit seen: it is
 * measured before each work, as the machine's speed drifts. */
static double bench_rounds(struct Bench *bench, size_t count) {
    double peak = 0;
    double begin = seconds_now();
    for (int round = 0; round < 5 || (seconds_now() - begin < 15 && round < 100); round++) {
        if (round < 5)
            say("bench: round %d\n", round + 1);
        for (struct BenchWork *work = WORKS; work < WORKS + count; work++) {
            if (work->length > bench->model->config.n_positions)
                continue;
            peak = MAX(peak, bench_peak());
            arena_reset(&bench->arena);
            double start = seconds_now();
            work->run(bench, work->n, work->length);
            if (round > 0)
                work->best = MIN(work->best, seconds_now() - start);
        }
    }
    return peak;
}

/* One work's line of the table, or its keys. Training multiplies and adds each weight but wpe's
 * 2 times forward and 4 times backward for every token: 6 operations a weight. */
static void bench_print_work(const struct BenchWork *work, double operations, double peak,
                             bool json) {
    double speed = (double)(work->n * work->tokens) / work->best;
    double share = operations * speed / peak;
    bool train = work->run == bench_train;
    if (json) {
        printf(", \"%s_seconds\": %.9g, \"%s_tokens_per_second\": %.9g", work->key, work->best,
               work->key, speed);
        if (train)
            printf(", \"%s_share_of_limit\": %.4g", work->key, share);
    } else {
        printf("\n%-28s%10.4f%12.1f", work->name, work->best, speed);
        if (train)
            printf("%16.0f %%", 100 * share);
    }
}

static void bench_print(const struct Bench *bench, size_t count, double peak, bool json) {
    double operations = 6 * (double)(bench->weights - bench->model->wpe.n);
    printf(json ? "{\"threads\": %d, \"kernel\": \"%s\", \"parameters\": %zu, \"peak_gflops\": "
                  "%.9g, \"peak_rss_bytes\": %zu"
                : "%d threads, kernel %s; %zu weights; %.0f GFLOP/s multiplied and added; peak "
                  "memory %zu bytes\n\n",
           omp_get_max_threads(), kernel->name, bench->weights, peak / 1e9, peak_rss_bytes());
    if (!json)
        printf("%-28s%10s%12s%18s", "", "seconds", "tokens/s", "share of limit");
    for (size_t k = 0; k < count; k++)
        if (isfinite(WORKS[k].best))
            bench_print_work(&WORKS[k], operations, peak, json);
    puts(json ? "}" : "");
}

int main(int argc, char **argv) {
    openmp_spin_briefly();
    arithmetic_check();
    kernel_choose();
    struct Options o = bench_options(argc, argv);
    if (o.help) {
        bench_help();
        return 0;
    }
    bench_check(&o);
    size_t count = bench_choose(&o);
    struct Bench bench = bench_open(&o, count > 1);
    double peak = bench_rounds(&bench, count);
    bench_print(&bench, count, peak, o.json);
    if (bench.ppo)
        rollout_trainer_free(bench.ppo);
    trainer_free(&bench.trainer);
    arena_free(&bench.arena);
    options_close(&o);
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "standard output: writing failed");
    return 0;
}
