/* align.c -- train and align GPT-2 from scratch, in one file of C.
 *
 * =============================================================================================
 * Preface
 * =============================================================================================
 *
 * A language model writes what is likely. RLHF, reinforcement learning from human feedback, makes
 * it write what people like. [glossary: RLHF] The whole of it is one drawing:
 *
 *    texts --(15) pretrain, sft--> language model pi_ref ----copy----> policy pi
 *                                    |    "the reference"              |      ^
 *    human ratings or pairs          |                                 | sample (13): a rollout
 *        |                           |                                 v      |
 *        +--(16) reward--> reward model r(x, y) ----score----> "prompt x + response y"
 *        |                                                             |      |
 *        |                            r(x,y) - beta * KL(pi || pi_ref) |      |
 *        |                                                             v      |
 *        |                                          (17) PPO: raise what scored well
 *        |                                                                    |
 *        +----------------- pairs: chosen, rejected ---------> (18) DPO: the same optimum,
 *                                                              without sampling or r
 *
 * Numbers in brackets are chapters. Each chapter uses earlier ones only; what Part IV, the
 * machinery, gives to the others is declared where it is first needed.
 *
 *   Part I, the ideas                       Part II, the model
 *     1 Ground: errors, random numbers        7 Byte-pair encoding
 *     2 Probability                           8 Batches
 *     3 Preferences: Bradley-Terry            9 Matrix product
 *     4 Policy gradient: KL, GAE, PPO        10 Layers, forward and backward
 *     5 DPO and the closed form              11 GPT-2, its output layer and heads
 *     6 Choosing a token                     12 LoRA
 *                                            13 Writing: sampling, beam search
 *   Part III, training                      Part IV, the program
 *    14 Optimizer, schedule, Trainer         22 Files, JSON
 *    15 Language model, SFT                  23 Data sets, tokenizer.bin
 *    16 Reward model                         24 safetensors, model and adapter folders
 *    17 Rollouts, REINFORCE, PPO             25 Progress, logs, checkpoints
 *    18 DPO, collected preferences           26 Results
 *    19 Exact: a world to enumerate          27 Command line, main
 *    20 The whole course (rlhf)
 *
 * RLHF in 600 lines. Read these in order, each with its comment, and you have read the idea:
 *   softmax                 logits become probabilities                                  chapter 2
 *   kl_exact, kl_k1         how far two models are apart; the estimate from one token
 *   bradley_terry_pair      a preference becomes a loss: how a reward model learns       chapter 3
 *   reinforce_loss          a score becomes a gradient (read the essay above it)         chapter 4
 *   kl_reward               where the KL penalty meets a token
 *   gae_step                how a score at the end becomes an advantage at each token
 *   ppo_token_loss          why PPO clips, and where the gradient is zero
 *   exact_optimum           the best policy there is, in closed form                     chapter 5
 *   dpo_pair_loss           the same optimum from pairs alone
 *   ppo_step                the seven steps of PPO on a real model                       chapter 17
 * Other paths. What is a policy, a rollout, an omega? 2, 11, 13. How does a transformer learn at
 * all? 9, 10, 11, 15. By term: docs/glossary.md; each term is tagged [glossary: TERM] where it is
 * implemented, and `align glossary TERM` prints its entry.
 *
 * To step through:  make debug && gdb --args ./align_debug ppo ...   then   break ppo_token_loss,
 * run, p ratio, up, p *config, p model->h[0].attn.c_attn.weight.w[0]@8. docs/debugging.md has
 * guided tours.
 *
 * Symbols. One letter has one meaning, everywhere:
 *    B sequences of a batch    T tokens of one sequence    N all tokens of a batch, packed
 *    R rows of a batch that predict a token which counts in a loss
 *    C n_embd, the width       L n_layer                   NH n_head    HS = C/NH, a head's size
 *    V vocab_size
 * A matrix (M,N) is row-major: element (i,j) stands at i*N + j. The derivative of the loss by x is
 * called dx. Logarithms are natural, so log-probabilities, divergences and entropies are in nats.
 *
 * Papers
 *    [1] Radford 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
 *    [2] Vaswani 2017, Attention Is All You Need
 *    [3] Ba 2016, Layer Normalization
 *    [4] Ouyang 2022, Training language models to follow instructions with human feedback
 *    [5] Rafailov 2023, Direct Preference Optimization
 *    [6] Schulman 2017, Proximal Policy Optimization
 *    [7] Schulman 2016, High-Dimensional Continuous Control Using GAE
 *    [8] Loshchilov 2019, Decoupled Weight Decay Regularization (AdamW)
 *    [9] Bradley & Terry 1952, Rank Analysis of Incomplete Block Designs
 *   [10] Ziegler 2019, Fine-Tuning Language Models from Human Preferences
 *   [11] Sennrich 2016, Neural Machine Translation of Rare Words with Subword Units (BPE)
 *   [12] Holtzman 2020, The Curious Case of Neural Text Degeneration (top-p)
 *   [13] Azar 2023, A General Theoretical Paradigm to Understand Learning from Human
 *        Preferences (IPO)
 *   [14] Chowdhury 2024, Provably Robust DPO
 *   [15] Keskar 2019, CTRL (repetition penalty)
 *   [16] Goto & van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication
 *   [17] Dao 2022, FlashAttention
 *   [18] Hendrycks 2016, GELU
 *   [19] Williams 1992, Simple Statistical Gradient-Following Algorithms (REINFORCE)
 *   [20] Schulman 2020, Approximating KL Divergence (the k1 and k3 estimates)
 *   [21] Hu 2021, LoRA: Low-Rank Adaptation of Large Language Models
 *   [22] Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (rslora)
 *   [23] Ahmadian 2024, Back to Basics: Revisiting REINFORCE-Style Optimization (RLOO)
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE            /* realpath, clock_gettime, fsync under -std=c11 */
#endif
#define _FILE_OFFSET_BITS 64   /* files beyond 2 GB where long has 32 bits */

/* What this file assumes of a compiler and a machine beyond C11. Without it the program would be
 * built, run, and give wrong numbers. arithmetic_check tries at the start what no macro tells. */
#ifndef __GNUC__
#error "align.c needs gcc or clang: it uses their vectors, attributes and builtins"
#endif
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || __FINITE_MATH_ONLY__
#error \
    "align.c needs NaN, infinity and sums in the order written: leave out -Ofast, -ffast-math, \
-funsafe-math-optimizations, -fassociative-math and -ffinite-math-only; -O3 is as fast"
#endif
#if __FLT_EVAL_METHOD__ < 0 || __FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2
#error "align.c needs floats that are computed as floats, not in x87 registers: add -msse2 \
-mfpmath=sse"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "align.c needs a machine that stores the lowest byte first: its files are written so"
#endif
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else /* one thread; OpenMP's pragmas are comments */
#define omp_get_max_threads() 1
#define omp_in_parallel() 1
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#endif

/* Windows (mingw-w64) spells some of POSIX otherwise. What it lacks altogether is left out where
 * it is used, by #ifdef. */
#ifdef _WIN32
#include <direct.h>
#include <malloc.h>
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to,
                                                unsigned long flags);
__declspec(dllimport) unsigned long __stdcall GetModuleFileNameA(void *module, char *path,
                                                                 unsigned long size);
/* replace, write through */
static int rename_over(const char *from, const char *to) {
    return MoveFileExA(from, to, 1 | 8) ? 0 : (errno = EACCES, -1);
}
/* not known */
static size_t peak_rss_bytes(void) {
    return 0;
}
#define rename rename_over
#define mkdir(path, mode) _mkdir(path)
#define lstat stat
#define fsync _commit
#define aligned_alloc(boundary, size) _aligned_malloc(size, boundary)
#define aligned_free _aligned_free
#define PRINTF_FORMAT gnu_printf
#else
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#define aligned_free free
#define PRINTF_FORMAT printf
#ifdef __APPLE__
#include <mach-o/dyld.h>
enum { RSS_UNIT = 1 };
#else
enum { RSS_UNIT = 1024 };
#endif
static size_t peak_rss_bytes(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (size_t)usage.ru_maxrss * RSS_UNIT;
}
#endif

_Static_assert(sizeof(int) == 4 && FLT_MANT_DIG == 24 && DBL_MANT_DIG == 53,
               "align.c needs int of 32 bits, and float and double as IEEE 754 has them");

#define PRINTF_LIKE(f, a) __attribute__((format(PRINTF_FORMAT, f, a)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* =============================================================================================
 * Chapter 1 - Ground: errors, random numbers, arena, scratch
 *
 * What every later chapter stands on; a first reader may begin with chapter 2.
 *
 * Errors. There is one way to fail: CHECK(condition, "what, where, found and expected, what to
 * do") prints one line and ends the program with status 1. A wrong command line ends with status
 * 2.
 *
 * Random numbers. Everything random follows from --seed: the same seed gives the same bits.
 *
 * Memory. An arena hands out memory piece by piece and takes it all back at once: whoever opens
 * one frees everything in it with one call, and nothing is freed twice or forgotten. A training
 * loop empties its arena before each step.
 * ============================================================================================= */

static bool quiet; /* --quiet: no progress on stderr; errors are still said */
/* As the program was called, a shell word: command lines that are printed can be pasted. */
static const char *program_name = "align";
/* said behind an error: what a training that fails can go on from */
static char way_on[PATH_MAX + 80];
static const char *staged_folder; /* half written: goes with the program (chapter 22) */
static void folder_remove(const char *folder, const char *to);

/* How messages look on a terminal, and the clock: chapter 25. */
static void PRINTF_LIKE(2, 0)
    complain(const char *start, const char *format, va_list arguments, const char *end);
static void PRINTF_LIKE(1, 2) say(const char *format, ...); /* progress: not with --quiet */
static void PRINTF_LIKE(1, 2) warn(const char *format, ...); /* a note: always */
static double seconds_now(void);

/* Threads of a parallel loop may fail at the same moment, out of memory for example. The first one
 * to come here ends the program; the others wait until it has. */
static _Noreturn void PRINTF_LIKE(2, 3) die_with(int status, const char *format, ...) {
#pragma omp critical(die)
    {
        va_list arguments;
        va_start(arguments, format);
        fflush(stdout);
        complain("align: ", format, arguments, status == 1 ? way_on : "");
        va_end(arguments);
        if (staged_folder)
            folder_remove(staged_folder, NULL);
        exit(status);
    }
}

#define die(...) die_with(1, __VA_ARGS__)
#define die_usage(...) \
    die_with(2, __VA_ARGS__) /* what was typed is no command or flag: 2, as other tools do */
#define CHECK(condition, ...) \
    do {                      \
        if (!(condition))     \
            die(__VA_ARGS__); \
    } while (0)

/* Random numbers: xoshiro256++ of Blackman and Vigna, its state of four words filled by
 * splitmix64, as they advise. `stream` gives independent sequences of one seed (initial weights,
 * data order, sampling ...): drawing one number more in one of them leaves the others as they
 * were. */
struct Rng {
    uint64_t s[4];
};

static uint64_t splitmix64(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

enum RngStream {
    STREAM_INIT = 1,
    STREAM_ORDER,
    STREAM_SAMPLE,
    STREAM_SPLIT,
    STREAM_LENGTH,
    STREAM_CUT,
    STREAM_REWARD
};

static struct Rng rng_seed(uint64_t seed, uint64_t stream) {
    struct Rng rng;
    uint64_t state = seed ^ (stream * 0xd1342543de82ef95u);
    for (int i = 0; i < 4; i++)
        rng.s[i] = splitmix64(&state);
    return rng;
}

static uint64_t rotate_left(uint64_t x, int k) {
    return (x << k) | (x >> (64 - k));
}

static uint64_t rng_next(struct Rng *rng) {
    uint64_t *s = rng->s;
    uint64_t result = rotate_left(s[0] + s[3], 23) + s[0];
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

/* Uniform in [0, 1): 53 random bits, all that a double can hold. */
static double rng_uniform(struct Rng *rng) {
    return (double)(rng_next(rng) >> 11) * 0x1p-53;
}

/* A whole number in [0, n), n < 2^32: the upper half of a 32 x 32 bit product. */
static size_t rng_below(struct Rng *rng, size_t n) {
    return (size_t)(((rng_next(rng) >> 32) * (uint64_t)n) >> 32);
}

/* Standard normal, by Box and Muller: a uniform angle, and a radius whose square is exponential. */
static double rng_normal(struct Rng *rng) {
    double radius = sqrt(-2.0 * log(1.0 - rng_uniform(rng)));
    double angle = 6.283185307179586 * rng_uniform(rng);
    return radius * cos(angle);
}

/* Fisher and Yates: every order equally likely. */
static void rng_shuffle(struct Rng *rng, size_t *items, size_t n) {
    for (size_t i = n; i > 1; i--) {
        size_t j = rng_below(rng, i);
        size_t held = items[i - 1];
        items[i - 1] = items[j];
        items[j] = held;
    }
}

/* Arena: memory taken piece by piece, given back all at once. A reset merges the pieces into one
 * block: a training loop asks the system for memory in its first steps only. Under sanitizers
 * every piece is an allocation of its own: an overrun must not land unseen in a neighbour. */
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)          \
    || __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) \
    || __has_feature(memory_sanitizer)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

struct ArenaBlock {
    struct ArenaBlock *next;
    size_t size, used;
};
struct Arena {
    struct ArenaBlock *blocks;
    size_t next_size;
};
/* 64 bytes: a cache line, an AVX-512 vector */
enum { ARENA_PIECEWISE = SANITIZED, ARENA_ALIGN = 64, ARENA_HEADER = 64, ARENA_HUGE = 1 << 21 };

static void arena_free(struct Arena *arena) {
    while (arena->blocks) {
        struct ArenaBlock *block = arena->blocks;
        arena->blocks = block->next;
        aligned_free(block);
    }
}

static void arena_reset(struct Arena *arena) {
    if (arena->blocks && !arena->blocks->next && !ARENA_PIECEWISE) {
        arena->blocks->used = 0;
        return;
    }
    size_t total = 0;
    for (struct ArenaBlock *block = arena->blocks; block; block = block->next)
        total += block->size;
    arena_free(arena);
    arena->next_size = total;
}

static struct ArenaBlock *arena_block(size_t capacity) {
    size_t unit = capacity >= ARENA_HUGE ? ARENA_HUGE : ARENA_ALIGN;
    size_t whole = ARENA_HEADER + capacity;
    struct ArenaBlock *block = aligned_alloc(unit, (whole + unit - 1) / unit * unit);
    CHECK(block,
          "out of memory: %zu MB more were asked for; use a smaller model, batch or --max_length",
          capacity >> 20);
#ifdef MADV_HUGEPAGE
    /* pages of 2 MB: fewer addresses to look up */
    if (unit == ARENA_HUGE)
        madvise(block, whole / ARENA_HUGE * ARENA_HUGE, MADV_HUGEPAGE);
#endif
    *block = (struct ArenaBlock){.size = capacity};
    return block;
}

/* count pieces of `size` bytes, on a 64-byte boundary, not cleared; no memory ends the program. */
static void *arena_alloc(struct Arena *arena, size_t count, size_t size) {
    CHECK(size == 0 || count <= (SIZE_MAX / 4) / size,
          "out of memory: %zu x %zu bytes asked for; use a smaller model, batch or --max_length",
          count, size);
    size_t bytes = (count * size + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    struct ArenaBlock *block = arena->blocks;
    if (!block || block->size - block->used < bytes || ARENA_PIECEWISE) {
        /* a block of its own, behind the one that is being filled */
        bool large = bytes >= ARENA_HUGE && !arena->next_size;
        size_t capacity =
            large || ARENA_PIECEWISE ? bytes : MAX(bytes, MAX(arena->next_size, (size_t)1 << 18));
        block = arena_block(capacity);
        struct ArenaBlock **place = large && arena->blocks ? &arena->blocks->next : &arena->blocks;
        block->next = *place;
        *place = block;
        arena->next_size = 0;
    }
    void *piece = (char *)block + ARENA_HEADER + block->used;
    block->used += bytes;
    return piece;
}

static void *arena_zeros(struct Arena *arena, size_t count, size_t size) {
    void *piece = arena_alloc(arena, count, size);
    memset(piece, 0, count * size);
    return piece;
}

static float *arena_floats(struct Arena *arena, size_t count) {
    return arena_alloc(arena, count, sizeof(float));
}

/* 0 to n - 1: an order before it is shuffled. */
static size_t *arena_order(struct Arena *arena, size_t n) {
    size_t *order = arena_alloc(arena, n, sizeof *order);
    for (size_t i = 0; i < n; i++)
        order[i] = i;
    return order;
}

/* Each thread's own scratch memory, by purpose. It grows to the largest size asked for and stays.
 */
enum ScratchSlot { SCRATCH_A, SCRATCH_B, SCRATCH_SCORES, SCRATCH_ROW, SCRATCH_SLOTS };

static float *thread_scratch(enum ScratchSlot slot, size_t floats) {
    static _Thread_local struct ArenaBlock *slots[SCRATCH_SLOTS];
    if (!slots[slot] || slots[slot]->size < floats * sizeof(float)) {
        aligned_free(slots[slot]);
        slots[slot] = arena_block(floats * sizeof(float));
    }
    return (float *)((char *)slots[slot] + ARENA_HEADER);
}

/* =============================================================================================
 * Part I - The ideas
 *
 * The mathematics of the whole course, as functions of plain numbers and arrays: no model, no file
 * and no memory of their own. Whoever has read this part knows what softmax, KL, Bradley-Terry,
 * REINFORCE, GAE, PPO and DPO compute, why, and what each derivative is. The later parts only
 * call these functions: on a model's numbers (Part II) and again and again (Part III).
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 2 - Probability: sigmoid, softmax, entropy, KL
 *
 * How does a network's output become a probability, and how are two sets of probabilities
 * compared? A language model ends in V numbers, one for each token that could come next. They are
 * called logits, may have any size and sign, and only their differences matter. softmax turns
 * them into probabilities. All that RLHF does afterwards works with logarithms of probabilities:
 *
 *     prompt "The film is"      logits   softmax   log-probability
 *         " good"                 2.0     0.665        -0.41
 *         " long"                 1.0     0.245        -1.41
 *         " bad"                  0.0     0.090        -2.41
 *
 * Logarithms, because the probability of an answer is the product of its tokens' probabilities:
 * after a few hundred tokens it is smaller than any float, while its logarithm is a plain sum.
 *
 * What enters: logits (V). What leaves: probabilities (V), and numbers in nats. A nat is a natural
 * logarithm's unit: one nat more is a factor of e = 2.718 in probability.
 * ============================================================================================= */

/* sigmoid -- from log-odds to a probability.                    [glossary: Função sigmoide]
 *   sigmoid(x) = 1 / (1 + e^-x)
 * It is softmax for two choices whose logits differ by x: "how probable is the first one?"
 * The plain formula overflows for x = -800, where e^-x is infinite. So e is always raised to a
 * negative number, and for x < 0 the fraction is written with e^x instead: e^x / (1 + e^x).
 * By hand: sigmoid(0) = 0.5; sigmoid(2) = 1 / (1 + 0.1353) = 0.8808.             test: sigmoid */
static double sigmoid(double x) {
    double e = exp(-fabs(x));
    return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

/* log_sigmoid -- the logarithm of the above: the loss of every method that learns from pairs.
 *   log sigmoid(x) = -log(1 + e^-x)          d/dx log sigmoid(x) = sigmoid(-x)
 * Why not log(sigmoid(x))? For x = -800 the sigmoid is rounded to 0, whose logarithm is minus
 * infinity, and the pair that is most wrong would have no gradient. Here it is -800, as it should.
 * By hand: x = 0: -ln 2 = -0.6931; x = 2: ln 0.8808 = -0.1269.                    test: sigmoid */
static double log_sigmoid(double x) {
    return MIN(x, 0) - log1p(exp(-fabs(x)));
}

/* ---------------------------------------------------------------------------------------------
 * Rows of numbers, fast
 *
 * The next eight functions are the plain loops that they look like, written so that a compiler
 * can turn them into vector instructions: 16 numbers at a time, and e^x without a call. A first
 * reader can pass over them: row_max, row_sum, row_dot and row_exp do what they are called.
 * --------------------------------------------------------------------------------------------- */

/* WIDE: gcc compiles a function three times, for AVX-512, AVX2 and any x86-64, and the loader picks
 * the one that suits the processor (not under sanitizers, which start later than the loader). */
#if defined(__x86_64__) && defined(__GLIBC__) && !SANITIZED
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

/* The 32 bits of a float as a whole number, and back. */
static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* exp_fast -- e^x in float, without a branch, so that a loop over it becomes vector instructions
 * (libm's expf is a function call for each number).
 *   e^x = 2^n e^r,   n = round(x / ln 2),   r = x - n ln 2, which lies in [-0.35, 0.35]
 * 2^n is made by writing n into a float's exponent bits; e^r is its Taylor series up to r^7 / 7!.
 * Relative error below 2e-7 for |x| <= 87. Below -87 the result is 0, above 87 it is e^87.
 * Limits are tested on bits, as whole numbers: a comparison of floats would stay a branch.
 * By hand: x = 1: n = 1, r = 0.3069, e^r = 1.3591, times 2 = 2.7183.             test: exp_fast */
static inline float exp_fast(float x) {
    /* 1. |x| is cut at 87.0, whose bits are 0x42ae0000. Without the sign bit, the bits of floats
     *    have the order of the floats. */
    uint32_t sign = bits_of_float(x) & 0x80000000u;
    int32_t size = (int32_t)(bits_of_float(x) & 0x7fffffffu);
    int32_t limit = 0x42ae0000;
    float clamped = float_of_bits((uint32_t)(size < limit ? size : limit) | sign);

    /* 2. n: after 1.5 * 2^23 was added, a float has no bits left for a fraction. So the addition
     *    itself rounds, and n stands in the lowest bits of `shifted`. */
    float shifted = clamped * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;

    /* 3. r: ln 2 is subtracted in two parts, of which the first times n is exact. */
    float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float tail = 8.3333338e-3f + r * (1.3888889e-3f + r * 1.984127e-4f);
    float p = 1.6666667e-1f + r * (4.1666668e-2f + r * tail);
    p = 1.0f + r * (1.0f + r * (0.5f + r * p));

    /* 4. 2^n: a float's exponent is stored with 127 added, 23 bits from the right. */
    float two_to_n = float_of_bits((bits_of_float(shifted) + 127) << 23);

    /* 5. What was cut on the negative side is 0: its mask clears all bits. NaN stays NaN, by one
     *    pattern of bits, since arm64 and x86 make different ones. */
    uint32_t underflow = size > limit ? sign >> 31 : 0;
    uint32_t nan = (uint32_t) - (size > 0x7f800000) & 0x7fc00000u;
    return float_of_bits((bits_of_float(p * two_to_n) & (underflow - 1u)) | nan);
}

/* Sums and maxima are made in 16 lanes, which a vector instruction adds all at once. The code
 * fixes the order of additions, so the result has the same bits on every machine. */
enum { LANES = 16 };

/* A float's bits as a whole number that sorts as the float does (and back): of negative numbers
 * the magnitude is inverted, since a larger magnitude is a smaller number. */
static inline int32_t order_key(int32_t bits) {
    return bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1);
}

WIDE static float row_max(const float *x, size_t n) {
    int32_t lane[LANES];
    int32_t most = INT32_MIN;
    size_t i = 0;
    for (size_t j = 0; j < LANES; j++)
        lane[j] = INT32_MIN;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) {
            int32_t key = order_key((int32_t)bits_of_float(x[i + j]));
            lane[j] = key > lane[j] ? key : lane[j];
        }
    /* the lanes' maxima, and what is left of the row where its length is no multiple of 16 */
    for (size_t j = 0; j < LANES; j++)
        most = MAX(most, lane[j]);
    for (; i < n; i++)
        most = MAX(most, order_key((int32_t)bits_of_float(x[i])));
    return float_of_bits((uint32_t)order_key(most));
}

/* The 16 sums added up in pairs, as a tournament: 8, 4, 2, 1. */
static inline float lane_sum(float lane[LANES]) {
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t j = 0; j < half; j++)
            lane[j] += lane[j + half];
    return lane[0];
}

WIDE static float row_sum(const float *x, size_t n) {
    float lane[LANES] = {0};
    float result = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++)
            lane[j] += x[i + j];
    /* what is left where the length is no multiple of 16 */
    for (; i < n; i++)
        result += x[i];
    return result + lane_sum(lane);
}

WIDE static float row_dot(const float *x, const float *y, size_t n) {
    float lane[LANES] = {0};
    float result = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++)
            lane[j] += x[i + j] * y[i + j];
    /* what is left where the length is no multiple of 16 */
    for (; i < n; i++)
        result += x[i] * y[i];
    return result + lane_sum(lane);
}

/* y = e^(x - shift), number by number; returns the sum of y. */
WIDE static float row_exp(float *y, const float *x, float shift, size_t n) {
    for (size_t i = 0; i < n; i++)
        y[i] = exp_fast(x[i] - shift);
    return row_sum(y, n);
}

/* --------------------------------------------------------------------------------------------- */

/* argmax -- where the largest number stands: not the value but its index, the token's id.
 *                                                                [glossary: Argmax/Argmin]
 * Among equals the first. Greedy decoding is the argmax of the logits at each step: softmax keeps
 * the order, so there is no need for it.
 * By hand: argmax of (2.0, 5.0, 5.0) is 1.                                        test: softmax */
static size_t argmax(const float *x, size_t n) {
    float largest = row_max(x, n);
    for (size_t i = 0; i < n; i++)
        if (x[i] == largest)
            return i;
    /* NaN equals nothing, itself included */
    return 0;
}

/* softmax -- from logits to probabilities.                      [glossary: Função softmax]
 *   p_i = e^(x_i) / sum_j e^(x_j)
 * in, out  x (n): logits, then probabilities, each above 0 and together 1
 * returns  log_sum_exp of the logits that came in: log p_i = x_i - it
 * Adding a constant to all logits changes nothing. So the largest one is subtracted first: then
 * e^x cannot overflow, and the largest summand is 1.
 * By hand: (0, ln 3): e^x = 1 and 3, their sum 4, p = (0.25, 0.75).               test: softmax */
static float softmax(float *x, size_t n) {
    /* 1. the largest logit, and e^(x - largest) in place, with its sum */
    float largest = row_max(x, n);
    float total = row_exp(x, x, largest, n);

    /* 2. divided by the sum, they add up to 1 */
    float scale = 1.0f / total;
    for (size_t i = 0; i < n; i++)
        x[i] *= scale;

    /* 3. log of the sum without the shift: log(total * e^largest) */
    return largest + logf(total);
}

/* log_sum_exp -- log sum_i e^(x_i), in nats.                  [glossary: Função de partição]
 * The denominator of softmax, as a logarithm: the partition function of one token. With it every
 * log-probability is one subtraction, log softmax(x)_i = x_i - log_sum_exp(x), without a division
 * or the rounding of small probabilities. scratch: room for n numbers.
 * By hand: (0, ln 3): log 4 = 1.3863, so log p = (-1.3863, -0.2877).              test: softmax */
static float log_sum_exp(const float *x, size_t n, float *scratch) {
    float largest = row_max(x, n);
    return largest + logf(row_exp(scratch, x, largest, n));
}

/* entropy_of_logits -- how undecided a distribution is, from 0 (one token is certain) to log n
 * nats (all are equally probable).
 *   H = -sum_i p_i log p_i = lse - sum_i p_i x_i,   since log p_i = x_i - lse
 * in   logits x (n), lse = log_sum_exp(x)
 * Watched in RLHF: entropy that falls fast means that the policy has stopped to explore.
 * A logit of minus infinity, a token that was filtered out, adds nothing: p log p -> 0.
 * By hand: two equal logits 0: lse = ln 2, sum p x = 0, H = ln 2 = 0.6931.        test: entropy */
static double entropy_of_logits(const float *logits, float lse, size_t n) {
    double expected_logit = 0;
    for (size_t i = 0; i < n; i++)
        if (logits[i] > -INFINITY)
            expected_logit += (double)exp_fast(logits[i] - lse) * logits[i];
    return lse - expected_logit;
}

/* kl_exact -- how different two distributions over the next token are, in nats.
 *                                         [glossary: Divergência de Kullback-Leibler (KL)]
 *   KL(p || q) = sum_i p_i (log p_i - log q_i)
 * in   logits of p and of q (n), and log_sum_exp of each
 * Read it as a mean under p: if tokens are drawn from p, by how many nats does p on average find
 * them more probable than q does? It is 0 only where p and q agree, and never negative (but for
 * rounding). It is not symmetric: a token that p never draws costs nothing, however much q likes
 * it; a token that p draws and q excludes costs without limit. In RLHF p is the policy and q the
 * reference: what the policy writes must be something that the reference could have written.
 * By hand: p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3) = 0.1438.            test: kl */
static double kl_exact(const float *p_logits, float p_lse, const float *q_logits, float q_lse,
                       size_t n) {
    double kl = 0;
    for (size_t i = 0; i < n; i++) {
        float log_p = p_logits[i] - p_lse;
        float log_q = q_logits[i] - q_lse;
        kl += (double)exp_fast(log_p) * (log_p - log_q);
    }
    return kl;
}

/* kl_k1, kl_k3 -- KL(p || q) estimated from one token that was drawn from p [20].
 *                                         [glossary: Divergência de Kullback-Leibler (KL)]
 *   k1 = log p - log q          k3 = e^d - 1 - d,   d = log q - log p
 * The exact sum needs both distributions over the whole vocabulary; an estimate needs only the two
 * log-probabilities of the token that was drawn. Both are unbiased: averaged over tokens drawn
 * from p they give KL(p || q), k3 because the mean of e^d = q/p under p is 1.
 * Can KL be negative? The true one never, but k1 of one token is negative whenever q finds that
 * token more probable than p does. k3 is never negative and varies less. TRL's PPO uses k1 in the
 * reward, and so does align; GRPO uses k3.
 * By hand: p = 0.5, q = 0.25: k1 = ln 2 = 0.6931; d = -0.6931, k3 = 0.5 - 1 + 0.6931 = 0.1931.
 *                                                                                      test: kl */
static double kl_k1(double log_p, double log_q) {
    return log_p - log_q;
}

static double kl_k3(double log_p, double log_q) {
    double d = log_q - log_p;
    return expm1(d) - d;
}

/* sequence_logprob -- the log-probability of a whole answer: the course's omega.
 *                                                            [glossary: Função Omega (ω)]
 *   log pi(y|x) = sum_t log pi(y_t | x, y_1 .. y_t-1)
 * in   token_logprobs (n), nats: each token's log-probability, given all tokens before it
 * An answer is a chain of choices; the probability of the chain is the product of those of its
 * links, and the logarithm makes a sum of it. Longer answers have lower sums: what compares
 * answers of different lengths (DPO's IPO variant) divides by the length.
 * By hand: probabilities 0.5, 0.25: -0.6931 - 1.3863 = -2.0794 = ln 0.125.
 *                                                                                      test: kl */
static double sequence_logprob(const float *token_logprobs, size_t n) {
    double sum = 0;
    for (size_t t = 0; t < n; t++)
        sum += token_logprobs[t];
    return sum;
}

/* =============================================================================================
 * Chapter 3 - Preferences: Bradley-Terry, the sentiment classifier
 *                           [glossary: Função de recompensa] [glossary: Modelo Bradley-Terry]
 *
 * How does "I like this answer better" become a number that a program can raise? People do not
 * agree about "7 of 10", but they agree about "better" long before. Bradley and Terry's model [9]
 * gives each text a reward r, a number without unit, such that only differences count:
 *
 *     probability that a is preferred to b  =  sigmoid(r_a - r_b)
 *
 *     r_good = 2.0, r_bad = 0.5:   sigmoid(1.5) = 0.82: eight of ten readers prefer the first
 *
 * The rewards are a network's output. It is trained to make the preferences that people gave
 * probable: minus the logarithm of that probability is the loss of a pair.
 *
 * What enters: rewards of texts (a reward model's outputs) and who was preferred to whom. What
 * leaves: a loss in nats, and its derivative by each reward, from which the backward pass starts.
 * ============================================================================================= */

/* One comparison: where the two texts stand in a list, and how much better the chosen one must
 * at least be (the rater said "much better"; mostly 0). */
struct Pair {
    size_t chosen, rejected;
    double margin;
};

/* The comparisons of text i with those behind it: at most n - 1 - i. */
static size_t pairs_of_rating(const double *rating, size_t i, size_t n, double min_difference,
                              struct Pair *pairs) {
    size_t count = 0;
    for (size_t j = i + 1; j < n; j++) {
        /* too close to call: no comparison */
        if (rating[i] == rating[j] || fabs(rating[i] - rating[j]) < min_difference)
            continue;
        bool first_is_better = rating[i] > rating[j];
        pairs[count++] = (struct Pair){
            .chosen = first_is_better ? i : j,
            .rejected = first_is_better ? j : i,
        };
    }
    return count;
}

/* pairs_from_ratings -- ratings become comparisons.              [glossary: Coleta de dados]
 * in   rating (n): what people gave each text; min_difference: ratings closer than that are no
 *      clear preference, and make no pair
 * out  pairs: room for n (n - 1) / 2; returns how many there are
 * By hand: ratings 2, 0, 0.5 with min_difference 1: text 0 is preferred to 1 and to 2; between 1
 * and 2 nobody is sure. Two pairs.                                             test: data_pairs */
static size_t pairs_from_ratings(const double *rating, size_t n, double min_difference,
                                 struct Pair *pairs) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += pairs_of_rating(rating, i, n, min_difference, pairs + count);
    return count;
}

/* The loss of one pair, and its derivatives by the reward (or log-probability) of each side. */
struct PairLoss {
    double loss, dchosen, drejected;
};

/* bradley_terry_pair -- how badly two rewards explain that one text was preferred.
 *                                                    [glossary: Modelo Bradley-Terry]
 *   loss = -log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2     [9] [4]
 * in   chosen, rejected: the rewards; margin: see struct Pair; center: TRL's
 *      center_rewards_coefficient, mostly 0
 * The first term is the negative log-likelihood of what the rater said. Its derivative by the
 * difference is -sigmoid(-difference): -1/2 where the model is undecided, near 0 where it is
 * right and sure, near -1 where it is sure and wrong. The two sides are pushed apart equally.
 * The second term: since only differences count, all rewards could drift up or down together; it
 * pulls each pair's sum to zero, which gives the rewards a zero point.
 * By hand: 2.0 against 0.5: loss -log sigmoid(1.5) = 0.2014, dchosen -0.1824, drejected 0.1824;
 * with center 0.01: loss 0.2014 + 0.01 * 6.25 = 0.2639, dchosen -0.1324, drejected 0.2324.
 *                                                     test: bradley_terry, bradley_terry_gradient
 * gdb: break bradley_terry_pair */
static struct PairLoss bradley_terry_pair(double chosen, double rejected, double margin,
                                          double center) {
    /* 1. by how much the chosen text wins, and the sum that centering pulls to zero */
    double difference = chosen - rejected - margin;
    double sum = chosen + rejected;

    /* 2. the loss */
    double loss = -log_sigmoid(difference) + center * sum * sum;

    /* 3. its slopes: d/dx -log sigmoid(x) = -sigmoid(-x), and d/ds s^2 = 2 s. The chosen reward
     *    enters the difference with a plus sign, the rejected one with a minus sign. */
    double ddifference = -sigmoid(-difference);
    double dsum = 2 * center * sum;
    return (struct PairLoss){
        .loss = loss,
        .dchosen = ddifference + dsum,
        .drejected = -ddifference + dsum,
    };
}

/* bradley_terry_loss -- the mean over a batch's pairs.      [glossary: Modelo Bradley-Terry]
 * in   reward (texts); pairs (n), as indices into it; center as above
 * out  dreward (texts), set: d loss / d reward. A text that stands in several pairs collects the
 *      slopes of all of them; one in no pair gets 0.                       test: bradley_terry */
static double bradley_terry_loss(const float *reward, size_t texts, const struct Pair *pairs,
                                 size_t n, double center, float *dreward) {
    double loss = 0;
    for (size_t t = 0; t < texts; t++)
        dreward[t] = 0;
    for (size_t i = 0; i < n; i++) {
        const struct Pair *pair = &pairs[i];
        struct PairLoss one =
            bradley_terry_pair(reward[pair->chosen], reward[pair->rejected], pair->margin, center);
        /* each pair's share in the mean is 1 / n, in the loss and in its slopes */
        loss += one.loss;
        dreward[pair->chosen] += (float)(one.dchosen / (double)n);
        dreward[pair->rejected] += (float)(one.drejected / (double)n);
    }
    return loss / (double)n;
}

/* sentiment_loss -- a classifier of liked and disliked texts.
 *                                                     [glossary: Pontuação de sentimento]
 *   loss = -1/n sum_i [ label_i log sigmoid(r_i) + (1 - label_i) log sigmoid(-r_i) ]
 *   d loss / d r_i = (sigmoid(r_i) - label_i) / n
 * in   reward r (n), one text each; label (n): 1 liked, 0 disliked          out  dreward (n)
 * The binary cross-entropy: Bradley-Terry's sigmoid with r alone in place of a difference. So its
 * zero is not free: sigmoid(r) is the probability that the text is liked, which is what the
 * course's sentiment pipeline calls the score of POSITIVE. The slope is what was predicted less
 * what was true.
 * By hand: r = 2, label 0: -log sigmoid(-2) = 2.1269; slope sigmoid(2) = 0.8808.
 *                                                                          test: sentiment_loss */
static double sentiment_loss(const float *reward, const double *label, size_t n, float *dreward) {
    double loss = 0;
    for (size_t i = 0; i < n; i++) {
        double liked = label[i] * log_sigmoid(reward[i]);
        double disliked = (1 - label[i]) * log_sigmoid(-reward[i]);
        loss -= (liked + disliked) / (double)n;
        dreward[i] = (float)((sigmoid(reward[i]) - label[i]) / (double)n);
    }
    return loss;
}

/* =============================================================================================
 * Chapter 4 - Policy gradient: REINFORCE, rewards with a KL penalty, GAE, PPO
 *                                                       [glossary: Gradiente de política]
 *
 * How can a model learn from a score that it gets only after its answer is complete, from a judge
 * who cannot be differentiated? It answers, and is told how good the answer was; then it makes
 * good answers more probable and bad ones less. A model used so is a policy: pi(y|x) is the
 * probability that it answers y to the prompt x. What is to be raised is the objective
 *
 *     J(pi) = E_{y ~ pi} [ score(x, y) ] - beta KL(pi || pi_ref)               [10] [4]
 *                                                            [glossary: Função objetivo]
 *
 * The KL term holds the policy to the reference, the model before training: without it the policy
 * would find whatever nonsense fools the reward model. beta is the price of a nat of KL.
 *
 * The chapter goes one step at a time, each for a weakness of the one before:
 *   REINFORCE        score times grad log pi: right on average, but very noisy
 *   a baseline       subtract what was to be expected: the same gradient on average, less noise
 *   KL per token     the penalty is paid where the policy departs, token by token
 *   GAE              which token earned the score? a value head learns what to expect at each one
 *   PPO              use the same answers for several updates, but stop before they are stale
 *
 * One answer through the whole chapter (beta 0.2, score 1.0, gamma 1, lambda 0.95):
 *
 *     token            " very"   " good"     "."
 *     log pi            -1.20     -0.50    -0.10     what the policy that wrote it says
 *     log pi_ref        -1.70     -0.50    -0.20     what the reference says
 *     KL estimate        0.50      0.00     0.10     kl_k1
 *     reward            -0.10      0.00     0.98     kl_reward; the score, 1.0, joins the last one
 *     value              0.50      0.40     0.30     what the value head expected from here on
 *     delta             -0.20     -0.10     0.68     gae_step: reward + next value - value
 *     advantage          0.3187    0.546    0.68     gae_step: delta + 0.95 * next advantage
 *     return             0.8187    0.946    0.98     advantage + value: the value head's target
 *
 * What enters: log-probabilities, scores and values, one a token or one an answer. What leaves:
 * losses, and their derivatives by each log-probability and each value.
 * ============================================================================================= */

/* ---- Means and variances that several methods need ------------------------------------------ */

static double mean_of(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i];
    return sum / (double)n;
}

/* The variance of n values, estimated without bias: divided by n - 1, since the mean was taken
 * from the same values.         By hand: 1, 2, 6: mean 3, (4 + 1 + 9) / 2 = 7. */
static double unbiased_variance(const float *x, size_t n) {
    double mean = mean_of(x, n);
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (x[i] - mean) * (x[i] - mean);
    return n > 1 ? sum / (double)(n - 1) : 0;
}

/* Mean and variance of all scores ever seen, without keeping them. */
struct RunningMoments {
    double mean, var, std, count;
};

/* running_moments_update -- one more batch of n scores, by Chan's rule for merging two sets.
 * The merged squared deviations are those of both sets around their own means, plus what the
 * distance between the two means adds. TRL's RunningMoments.        test: ppo_scores_golden */
static void running_moments_update(struct RunningMoments *m, const float *x, size_t n) {
    /* 1. the batch by itself; its variance is divided by n, as those that are kept */
    double batch_mean = mean_of(x, n);
    double batch_var = n > 1 ? unbiased_variance(x, n) * (double)(n - 1) / (double)n : 0;

    /* 2. merged with what was seen before */
    double delta = batch_mean - m->mean;
    double total = m->count + (double)n;
    double spread =
        batch_var * (double)n + m->var * m->count + delta * delta * m->count * (double)n / total;
    m->mean += delta * (double)n / total;
    m->var = spread / total;
    m->std = sqrt(m->var * total / (total - 1));
    m->count = total;
}

/* whiten -- numbers of any size become numbers of mean 0 and variance 1.
 *   x = (x - mean) / sqrt(variance + 1e-8)
 * in, out  x (n)       shift_mean: false gives the old mean back afterwards, only the scale changes
 * Advantages of one scale need one learning rate, whatever the reward model's unit is.
 * Returns what a zero would have become: ppo_padding_advantage needs it.
 * By hand: 1, 2, 6: mean 3, variance 7: -0.7559, -0.3780, 1.1339.     test: ppo_whiten_golden */
static double whiten(float *x, size_t n, bool shift_mean) {
    double mean = mean_of(x, n);
    double scale = 1 / sqrt(unbiased_variance(x, n) + 1e-8);
    double back = shift_mean ? 0 : mean;
    for (size_t i = 0; i < n; i++)
        x[i] = (float)((x[i] - mean) * scale + back);
    return (0 - mean) * scale + back;
}

/* ---- REINFORCE ------------------------------------------------------------------------------ */

/* What is subtracted from an answer's reward before the policy is told how good it was. */
enum Baseline {
    BASELINE_NONE,
    BASELINE_MEAN,
    BASELINE_RLOO,
    BASELINES,
    BASELINE_VALUE_HEAD = BASELINES, /* PPO's: an expectation for every token, which is learnt */
};

/* REINFORCE [19] rests on one trick. J is a mean over answers that the policy draws; when the
 * weights change, it is their probabilities that change. So differentiate those:
 *                                                       [glossary: Truque da log-derivada]
 *     grad J = grad sum_y pi(y) R(y) = sum_y grad pi(y) R(y)
 *            = sum_y pi(y) grad log pi(y) R(y)         because grad pi = pi grad log pi
 *            = E_{y ~ pi} [ R(y) grad log pi(y) ]
 * In the last line the probabilities are weights of a mean again, so a few sampled answers give an
 * estimate. R is only evaluated, never differentiated: a program or a person may give it. With the
 * KL term inside, R(y) = score(y) - beta (log pi(y) - log pi_ref(y)); that R itself depends on the
 * weights adds nothing to the gradient, for the mean of grad log pi is 0. And for the same
 * reason a baseline b that does not depend on y may be subtracted: E[b grad log pi] = 0. The mean
 * gradient stays, its noise falls: all answers may score 100 or more, but those that score 104 are
 * to be raised, and those that score 101 lowered.
 *   none   b = 0
 *   mean   b = the mean R of all earlier steps
 *   rloo   b = the mean R of the other answers to the same prompt (leave one out)      [23] */

/* reinforce_advantages -- R(y_i) - b for n answers.         [glossary: Gradiente de política]
 * in   rewards (n): the R of each; answers to one prompt stand side by side, num_generations each;
 *      running_mean: for BASELINE_MEAN                                      out  advantages (n)
 * By hand: R = 1, 2, 6 of one prompt, rloo: 1 - (2 + 6) / 2 = -3, 2 - 3.5 = -1.5, 6 - 1.5 = 4.5.
 *                                                                    test: reinforce_advantages */
static void reinforce_advantages(enum Baseline baseline, const float *rewards, size_t n,
                                 size_t num_generations, double running_mean, float *advantages) {
    for (size_t i = 0; i < n; i++) {
        double b = 0;
        if (baseline == BASELINE_MEAN)
            b = running_mean;
        if (baseline == BASELINE_RLOO) {
            /* the sum over the prompt's answers, less this one, divided by how many are left */
            const float *group = rewards + i / num_generations * num_generations;
            double sum = mean_of(group, num_generations) * (double)num_generations;
            b = (sum - rewards[i]) / (double)(num_generations - 1);
        }
        advantages[i] = (float)(rewards[i] - b);
    }
}

/* reinforce_loss -- what is minimized so that J rises.
 *                                     [glossary: Ascensão de gradiente estocástico (SGA)]
 *   loss = -1/n sum_i A_i log pi(y_i)            d loss / d log pi(y_i) = -A_i / n
 * in   advantages A (n); logps (n): log pi of each whole answer, nats       out  dlogps (n)
 * An optimizer goes down, w -= lr grad loss; we want to go up, w += lr grad J. So the loss is the
 * objective with a minus sign. Its value means nothing, only its gradient does: A counts as a
 * constant, although it was computed from the policy's answer.
 * By hand: A = 4.5 and -3, log pi = -2 and -1: -(4.5 * -2 + -3 * -1) / 2 = 3; slopes -2.25, 1.5.
 *                                                                      test: reinforce_gradient */
static double reinforce_loss(const float *advantages, const double *logps, size_t n,
                             double *dlogps) {
    double loss = 0;
    for (size_t i = 0; i < n; i++) {
        loss -= advantages[i] * logps[i] / (double)n;
        dlogps[i] = -advantages[i] / (double)n;
    }
    return loss;
}

/* gradient_variance -- how noisy the estimate of a gradient is: what baselines are judged by.
 *   1 / (n (n - 1)) sum_i | A_i s_i - mean |^2,   the variance of a mean of n samples
 * in   advantages A (n); s (n,C): the gradient of log pi(y_i) by C of the weights
 * By hand: A = 1, 3 and s = 1, 1: products 1, 3, mean 2: (1 + 1) / (2 * 1) = 1.
 *                                                                    test: reinforce_advantages */
static double gradient_variance(const float *advantages, const float *s, size_t n, size_t C) {
    double total = 0;
    for (size_t c = 0; c < C; c++) {
        double mean = 0;
        for (size_t i = 0; i < n; i++)
            mean += (double)advantages[i] * s[i * C + c] / (double)n;
        for (size_t i = 0; i < n; i++)
            total += pow((double)advantages[i] * s[i * C + c] - mean, 2);
    }
    return n > 1 ? total / (double)n / (double)(n - 1) : NAN;
}

/* ---- Rewards with a KL penalty for each token ----------------------------------------------- */

/* PPOConfig of TRL 0.11, in its names.             [glossary: Classe de configuração PPO]
 * REINFORCE reads baseline, num_generations, batch_size and init_kl_coef of it. */
struct PPOConfig {
    enum Baseline baseline; /* PPO: BASELINE_VALUE_HEAD */
    size_t num_generations; /* answers to a prompt, one after the other */
    size_t batch_size; /* answers of a step */
    size_t mini_batch_size; /* answers of one forward and backward pass */
    size_t gradient_accumulation_steps;
    size_t ppo_epochs; /* how often the answers of a step are used */
    double init_kl_coef; /* beta at the start         [glossary: Parâmetro Beta (β)] */
    bool adap_kl_ctrl; /* let a controller change beta, */
    double target, horizon; /* towards this KL, in nats an answer; over so many answers */
    const char *kl_penalty; /* kl, abs, mse, full: see kl_penalty_token */
    double gamma, lam; /* discount and lambda of gae_step */
    double cliprange; /* of the ratio, in ppo_token_loss */
    double cliprange_value; /* of the value, in ppo_value_loss */
    double vf_coef; /* weight of the value loss beside the policy's */
    bool whiten_rewards; /* before GAE */
    bool use_score_scaling; /* divide scores by their running deviation */
    bool use_score_norm; /* and subtract their running mean first */
    double score_clip; /* scores beyond +- this are cut; 0: none */
    double ratio_threshold; /* a mini-batch whose mean ratio exceeds it is skipped */
    bool early_stopping; /* end a step's epochs when the policy has moved */
    double target_kl; /* by 1.5 times so many nats a token */
};

/* kl_penalty_token -- how far one token took the policy from the reference.
 *                                         [glossary: Divergência de Kullback-Leibler (KL)]
 *   kl    log pi - log pi_ref, kl_k1: unbiased, may be negative (the default)
 *   abs   its magnitude           mse   half its square, without a sign either
 *   full  the exact KL of the two distributions at this place; it comes in as `full`
 * By hand: -1.20 against -1.70: kl 0.50, abs 0.50, mse 0.125.     test: ppo_penalties_golden */
static float kl_penalty_token(const char *kind, float logprob, float ref_logprob, float full) {
    float difference = (float)kl_k1(logprob, ref_logprob);
    if (strcmp(kind, "abs") == 0)
        return fabsf(difference);
    if (strcmp(kind, "mse") == 0)
        return 0.5f * difference * difference;
    return strcmp(kind, "full") == 0 ? full : difference;
}

/* kl_reward -- the reward of a token for its divergence: what it costs, so negative as a rule.
 *                                                        [glossary: Parâmetro Beta (β)]
 *   reward_t = -beta kl_t           and at the answer's last token   + score
 * The score judges the whole answer, so it can only be given when it is complete: at the last
 * token. The penalty is known at each token, and is given there: GAE then knows which token
 * departed from the reference. How the score reaches the earlier tokens: gae_step.
 * By hand: beta 0.2: a divergence of 0.50 costs 0.10; one of -0.30 earns 0.06.
 *                                             test: ppo_advantages_golden; gdb: break kl_reward */
static float kl_reward(double kl_coef, float kl) {
    return (float)(-kl_coef * kl);
}

/* kl_controller_update -- beta is raised while the KL is above its target, lowered below it [10].
 *   beta = beta (1 + error samples / horizon),   error = clip(kl / target - 1, -0.2, 0.2)
 * in   kl: of this step, nats an answer; samples: how many answers it had
 * A fixed beta would have to be found by trial for each reward model; a KL of some nats means the
 * same for all of them.
 * By hand: beta 0.2, target 6, horizon 10000, 128 samples: KL 30 -> 0.2 (1 + 0.2 * 0.0128) =
 * 0.200512; KL 0 -> 0.199488.                                           test: ppo_kl_controller */
static double kl_controller_update(const struct PPOConfig *config, double kl_coef, double kl,
                                   size_t samples) {
    if (!config->adap_kl_ctrl)
        return kl_coef;
    double error = MAX(-0.2, MIN(0.2, kl / config->target - 1));
    return kl_coef * (1 + error * (double)samples / config->horizon);
}

/* ---- Generalized advantage estimation ------------------------------------------------------- */

/* gae_step -- the advantage of one token, given that of the token behind it [7].
 *   delta_t = reward_t + gamma value_{t+1} - value_t
 *   A_t     = delta_t + gamma lambda A_{t+1}                    [7] Eq. 16, as a recursion
 * value_t is what the value head expects, before token t is written, of all rewards from t on.
 * delta_t is the surprise that token t brought: the reward it earned and what is expected after
 * it, against what was expected before it. Behind the last token nothing is left to expect:
 * value 0, advantage 0.
 * This is how a score on the last token reaches the first: A_t contains delta_{t+1} times
 * gamma lambda, delta_{t+2} times its square, and so on. lambda chooses whom to believe: 0 leaves
 * delta_t alone, and with it the value head's opinion (little noise, but wrong while the head is);
 * 1 adds up all later rewards and ignores the head's opinion (right on average, but noisy).
 * By hand: the chapter's last token: delta = 0.98 + 0 - 0.3 = 0.68, A = 0.68. The one before it:
 * delta = 0 + 0.3 - 0.4 = -0.1, A = -0.1 + 0.95 * 0.68 = 0.546.
 *                                   test: gae_hand, ppo_advantages_golden; gdb: break gae_step */
static double gae_step(double reward, double value, double next_value, double next_advantage,
                       double gamma, double lam) {
    double delta = reward + gamma * next_value - value;
    return delta + gamma * lam * next_advantage;
}

/* gae -- advantages and returns of one answer of T tokens, from its last token to its first.
 * in   rewards, values (T); next_advantage: behind the last token, 0 (but see
 *      ppo_padding_advantage)
 * out  advantages (T): how much better each token was than the value head expected
 *      returns (T): advantage + value, what the value head should have said: its target
 *                                                         test: gae_hand, ppo_advantages_golden */
static void gae(const struct PPOConfig *config, size_t T, const float *rewards, const float *values,
                double next_advantage, float *advantages, float *returns) {
    double next_value = 0;
    for (size_t t = T; t-- > 0;) {
        double advantage =
            gae_step(rewards[t], values[t], next_value, next_advantage, config->gamma, config->lam);
        advantages[t] = (float)advantage;
        returns[t] = (float)(advantage + values[t]);
        /* the token before this one looks ahead to it */
        next_value = values[t];
        next_advantage = advantage;
    }
}

/* ppo_padding_advantage -- an oddity of TRL 0.11 with whiten_rewards, kept to equal its numbers.
 * There answers are padded to one length, the rewards behind a short answer's end are 0, and
 * whitening makes another number of that 0. GAE, coming from the right, then runs through
 * `padding` tokens of that reward before it reaches the answer: this is what it brings along.
 * Without whiten_rewards the padding's reward is 0 and so is this.   test: ppo_advantages_golden */
static double ppo_padding_advantage(const struct PPOConfig *config, double padding_reward,
                                    size_t padding) {
    double advantage = 0;
    for (size_t k = 0; k < padding; k++)
        advantage = padding_reward + config->gamma * config->lam * advantage;
    return advantage;
}

/* ---- PPO's two losses ----------------------------------------------------------------------- */

/* The policy's loss on one token. */
struct TokenLoss {
    double loss;
    double dlogprob; /* d loss / d logprob */
    double ratio; /* how many times likelier the token is than when it was sampled */
    bool is_clipped; /* the loss no longer depends on the ratio */
};

/* ppo_token_loss -- PPO's clipped objective for one token of an answer.
 *                                     [glossary: Otimização de política proximal (PPO)]
 * The token was sampled when its log-probability was old_logprob. Since then the policy has
 * moved, for the same answers serve several updates. How far may this one go on pushing the
 * token in the direction that its advantage A asks for?
 *   ratio = exp(logprob - old_logprob)
 *   loss  = max(-A ratio, -A clip(ratio, 1 - e, 1 + e)),   e = clip_range           [6] Eq. 7
 * Once the ratio has left [1 - e, 1 + e] in that direction, the loss no longer depends on it:
 * its slope is zero, and this token has had its share of this batch. Without the clip a single
 * lucky token could be made certain by a few updates on the same answer.
 * At the first update the policy is the one that sampled: every ratio is 1 and the loss is -A.
 * The A of a batch are whitened, so its mean loss is 0; its gradient is not.
 * in   log-probabilities in nats; advantage (whitened); clip_range, mostly 0.2
 * By hand: ratio 1.5, A = 2, e = 0.2: max(-3.0, -2.4) = -2.4, slope 0. With A = -2:
 * max(3.0, 2.4) = 3.0, slope 3.0: a bad token that became likelier is still pushed down.
 *                               test: ppo_token_loss, ppo_loss_golden; gdb: break ppo_token_loss */
static struct TokenLoss ppo_token_loss(double old_logprob, double logprob, double advantage,
                                       double clip_range) {
    /* 1. How many times likelier is the token now than when it was sampled? */
    double ratio = exp(logprob - old_logprob);

    /* 2. Two losses, of which the larger counts: an improvement is believed only as far as the
     *    clip range, a deterioration always. */
    double clipped_ratio = MAX(1 - clip_range, MIN(1 + clip_range, ratio));
    double plain_loss = -advantage * ratio;
    double clipped_loss = -advantage * clipped_ratio;
    bool is_clipped = clipped_loss > plain_loss;

    /* 3. d ratio / d logprob = ratio, so the plain loss is its own derivative. */
    double dlogprob = is_clipped ? 0 : plain_loss;
    return (struct TokenLoss){
        .loss = MAX(plain_loss, clipped_loss),
        .dlogprob = dlogprob,
        .ratio = ratio,
        .is_clipped = is_clipped,
    };
}

/* The value head's loss at one token. */
struct ValueLoss {
    double loss;
    double dvalue; /* d loss / d value */
    double squared_error; /* without the clip */
    bool is_clipped; /* the clipped error was the larger one */
};

/* ppo_value_loss -- half the squared error of the value head at one token.
 *                                     [glossary: AutoModelForCausalLMWithValueHead]
 *   clipped = clip(value, old_value - e, old_value + e),   e = clip_range
 *   loss    = 1/2 max((value - return)^2, (clipped - return)^2)
 * in   old_value: what the head said when the answer was written; value: what it says now;
 *      target_return: what it should have said (gae)
 * The clip is TRL's and OpenAI's: a head may move by e in one step and is then not pulled further.
 * By hand: old 0.5, value 0.9, return 1.0, e = 0.2: clipped 0.7, errors 0.01 and 0.09, loss
 * 0.045, slope 0: the clipped value does not depend on the value.
 *                                                        test: ppo_value_loss, ppo_loss_golden */
static struct ValueLoss ppo_value_loss(double old_value, double value, double target_return,
                                       double clip_range) {
    /* 1. the value, held near the old one */
    double clipped = MAX(old_value - clip_range, MIN(old_value + clip_range, value));

    /* 2. two squared errors, of which the larger counts */
    double error = value - target_return;
    double clipped_error = clipped - target_return;
    bool is_clipped = clipped_error * clipped_error > error * error;

    /* 3. The slope of half a square is the error. A value that was cut has none; one inside the
     *    range equals its clipped twin. */
    double dvalue = error;
    if (is_clipped)
        dvalue = value == clipped ? clipped_error : 0;
    return (struct ValueLoss){
        .loss = 0.5 * MAX(error * error, clipped_error * clipped_error),
        .dvalue = dvalue,
        .squared_error = error * error,
        .is_clipped = is_clipped,
    };
}

/* The R response tokens of a mini-batch, side by side: what was known when the answers were
 * written, what the policy says now, and, as ppo_loss leaves them, the losses and slopes. */
struct PPOTokens {
    size_t R;
    float *old_logprobs, *old_values, *advantages, *returns; /* (R) from the rollout */
    const float *logprobs, *values; /* (R) of the policy now */
    struct TokenLoss *policy; /* (R) of each token */
    struct ValueLoss *value; /* (R) likewise */
    float *dlogprobs, *dvalues; /* (R) d loss / d logprob, value */
};

/* The mean losses of a mini-batch. */
struct PPOLoss {
    double policy, value, total;
};

/* ppo_loss -- the loss of a mini-batch.       [glossary: Otimização de política proximal (PPO)]
 *   policy = mean over tokens of ppo_token_loss;   value = mean of ppo_value_loss
 *   total  = policy + vf_coef value
 * The mean is over all tokens of the mini-batch, so a long answer counts more than a short one.
 * out  tokens->policy, value, dlogprobs, dvalues     test: ppo_loss_golden, ppo_loss_gradient */
static struct PPOLoss ppo_loss(const struct PPOConfig *config, struct PPOTokens *tokens) {
    struct PPOLoss loss = {0};
    double n = (double)tokens->R;
    for (size_t t = 0; t < tokens->R; t++) {
        /* 1. the policy's loss; each token's share in the mean is 1 / n */
        struct TokenLoss policy = ppo_token_loss(tokens->old_logprobs[t], tokens->logprobs[t],
                                                 tokens->advantages[t], config->cliprange);
        loss.policy += policy.loss / n;
        tokens->policy[t] = policy;
        tokens->dlogprobs[t] = (float)(policy.dlogprob / n);

        /* 2. the value head's, with its weight */
        struct ValueLoss value = ppo_value_loss(tokens->old_values[t], tokens->values[t],
                                                tokens->returns[t], config->cliprange_value);
        loss.value += value.loss / n;
        tokens->value[t] = value;
        tokens->dvalues[t] = (float)(config->vf_coef * value.dvalue / n);
    }
    loss.total = loss.policy + config->vf_coef * loss.value;
    return loss;
}

/* =============================================================================================
 * Chapter 5 - DPO: the closed form, the reward it implies, the loss without a reward model
 *         [glossary: Otimização de preferência direta (DPO)] [glossary: Solução em forma fechada]
 *
 * Is all of chapter 4's machinery needed? Its objective J(pi) = E[r] - beta KL(pi || pi_ref) has a
 * maximum that can be written down:
 *
 *     pi*(y) = pi_ref(y) e^(r(y)/beta) / Z          Z = sum_y pi_ref(y) e^(r(y)/beta)    [5] Eq. 4
 *                                         [glossary: Distribuição ponderada por recompensa]
 *
 * the reference's answers, each weighted by its reward. With text it is of no direct use: Z, the
 * partition function, sums over all answers, and 20 tokens of GPT-2's vocabulary make 10^94. But
 * read it backwards: solved for the reward, it says that a policy *is* a reward model,
 *
 *     r(y) = beta log(pi*(y) / pi_ref(y)) + beta log Z                                   [5] Eq. 5
 *
 * and in Bradley-Terry's model only the difference of two rewards counts: beta log Z is in both and
 * cancels. So the pairs can train the policy itself: no reward model, no sampling, no value head.
 *
 *     reference         chosen -10.0    rejected -12.0        log-probabilities of whole answers
 *     policy            chosen  -8.0    rejected -13.0
 *     implied reward    0.1 * 2.0 = 0.2         0.1 * -1.0 = -0.1       beta = 0.1
 *     loss              -log sigmoid(0.2 + 0.1) = 0.5544                ln 2 = 0.6931 at the start
 *
 * What enters: log pi(y|x) of chosen and rejected answers under policy and reference, in nats,
 * each summed over the answer's tokens. What leaves: a loss and its derivatives by them.
 * ============================================================================================= */

/* exact_optimum -- the best policy, where all answers can be listed.
 *            [glossary: Distribuição ponderada por recompensa] [glossary: Função de partição]
 * in   ref_logps, r (n): log pi_ref(y) in nats and the reward of every answer; beta
 * out  optimum (n): log pi*(y);   returns log Z
 * Why can no policy do better? Put r = beta log Z + beta log(pi* / pi_ref) into J:
 *   J(pi) = E_pi[r] - beta E_pi[log(pi / pi_ref)]
 *         = beta log Z - beta E_pi[log(pi / pi*)] = beta log Z - beta KL(pi || pi*)
 * beta log Z does not depend on pi, and the KL is 0 for pi = pi* and above 0 for any other. So pi*
 * is the maximum, and J(pi*) = beta log Z.                                 [5] appendix A.1
 * By hand: pi_ref = (1/2, 1/2), r = (0, beta ln 3): Z = 1/2 + 3/2 = 2, pi* = (1/4, 3/4) and
 * J(pi*) = beta ln 2.                                                       test: exact_optimum */
static double exact_optimum(const double *ref_logps, const double *r, size_t n, double beta,
                            double *optimum) {
    /* 1. each answer's log-weight, and the largest of them, for the reason given at softmax */
    double largest = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        optimum[i] = ref_logps[i] + r[i] / beta;
        largest = MAX(largest, optimum[i]);
    }

    /* 2. log Z: the log-sum-exp of the weights, in double */
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += exp(optimum[i] - largest);

    /* 3. divided by Z, the weights are probabilities */
    for (size_t i = 0; i < n; i++)
        optimum[i] -= largest + log(sum);
    return largest + log(sum);
}

/* implied_reward -- what a policy says an answer is worth, up to a constant that all answers to
 * the prompt share: beta log(pi(y|x) / pi_ref(y|x)).      [glossary: Modelo de referência]
 * TRL logs it as rewards/chosen and rewards/rejected. Above 0 the answer became more probable than
 * it was.        By hand: beta 0.1, -8 against -10: 0.2.     [5] Eq. 5        test: dpo_hand */
static double implied_reward(double beta, double logp, double ref_logp) {
    return beta * (logp - ref_logp);
}

/* One side of a pair, the chosen or the rejected answer. */
struct DPOSide {
    double logp; /* log pi(y|x), nats, summed over the answer's tokens */
    double ref_logp; /* the same under the reference, which never changes */
    size_t length; /* how many tokens that are */
    double dlogp; /* out: d loss / d logp */
};

/* dpo_pair_loss -- Direct Preference Optimization, one pair.                    [glossary: DPO]
 *   logits = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
 *   loss   = -log sigmoid(beta logits)                                                [5] Eq. 7
 * This is Bradley-Terry's loss with the implied rewards in place of a reward model's. Its gradient:
 *   d loss / d logits        = -beta sigmoid(-beta logits)
 *   d loss / d logp_chosen   = d loss / d logits         raise the chosen answer,
 *   d loss / d logp_rejected = -d loss / d logits        lower the rejected one, by as much
 * weighted by sigmoid(-beta logits): how wrong the policy still is about this pair. A pair it has
 * learnt pulls no more. Without the reference the loss would ask for one thing only, to make the
 * chosen answer infinitely more probable; with it, to make it more probable *than it was*.
 * At the start policy and reference are the same: logits 0, loss ln 2 = 0.6931, whatever beta.
 * By hand: beta 0.1, chosen -8 (reference -10), rejected -13 (-12): logits 2 - (-1) = 3, loss
 * -log sigmoid(0.3) = 0.5544, dchosen -0.1 * sigmoid(-0.3) = -0.0426, drejected 0.0426.
 *                                       test: dpo_hand, dpo_golden; gdb: break dpo_pair_loss */
static struct PairLoss dpo_pair_loss(double beta, const struct DPOSide *chosen,
                                     const struct DPOSide *rejected) {
    /* 1. by how much each answer has become more probable than under the reference */
    double chosen_logratio = chosen->logp - chosen->ref_logp;
    double rejected_logratio = rejected->logp - rejected->ref_logp;

    /* 2. the difference of the implied rewards, in which beta log Z has cancelled */
    double logits = chosen_logratio - rejected_logratio;

    /* 3. Bradley-Terry's loss, and its slope by the chosen side's log-probability */
    double loss = -log_sigmoid(beta * logits);
    double dlogits = beta * -sigmoid(-(beta * logits));
    return (struct PairLoss){
        .loss = loss,
        .dchosen = dlogits,
        .drejected = -dlogits,
    };
}

/* ---- Variants ------------------------------------------------------------------------------- */

/* Names and order of TRL's loss_type. */
enum DPOLossType {
    DPO_SIGMOID,
    DPO_IPO,
    DPO_HINGE,
    DPO_ROBUST,
    DPO_SFT,
    DPO_LOSS_TYPES,
};

struct DPOConfig {
    double beta; /* [glossary: Parâmetro Beta (β)] */
    double label_smoothing; /* share of pairs that may be labelled the wrong way round */
    double weight[DPO_LOSS_TYPES]; /* of each loss; 0: not used (TRL: loss_type, loss_weights) */
};

/* dpo_smoothed_pair -- the pair might be labelled the wrong way round, with probability e.
 *   sigmoid  -(1-e) log sigmoid(s) - e log sigmoid(-s),   s = beta logits: conservative DPO,
 *            which stops at a finite margin (TRL 0.11; TRL 1.16 ignores e for this loss)
 *   robust   (-(1-e) log sigmoid(s) + e log sigmoid(-s)) / (1 - 2e): unbiased, as if no label
 *            had been wrong                                                               [14]
 * By hand: s = 0.3, e = 0.1: sigmoid 0.9 * 0.5544 + 0.1 * 0.8544 = 0.5844; robust
 * (0.9 * 0.5544 - 0.1 * 0.8544) / 0.8 = 0.5169.                     test: dpo_hand, dpo_golden */
static struct PairLoss dpo_smoothed_pair(double beta, double logits, double e, bool robust) {
    double s = beta * logits;
    double right = -(1 - e) * log_sigmoid(s);
    double wrong = e * log_sigmoid(-s);
    double scale = robust ? 1 / (1 - 2 * e) : 1;
    double loss = robust ? scale * (right + wrong) : right - wrong;

    /* d/ds log sigmoid(s) = sigmoid(-s) and d/ds log sigmoid(-s) = -sigmoid(s) */
    double dwrong = robust ? -e * sigmoid(s) : e * sigmoid(s);
    double ds = scale * (-(1 - e) * sigmoid(-s) + dwrong);
    return (struct PairLoss){
        .loss = loss,
        .dchosen = beta * ds,
        .drejected = -beta * ds,
    };
}

/* dpo_hinge_pair -- max(0, 1 - beta logits): a pair that is right by a margin of 1 is left alone.
 * By hand: s = 0.3: loss 0.7, slope -beta.                          test: dpo_golden */
static struct PairLoss dpo_hinge_pair(double beta, double logits) {
    double s = beta * logits;
    double ds = s < 1 ? -1 : 0;
    return (struct PairLoss){
        .loss = MAX(0, 1 - s),
        .dchosen = beta * ds,
        .drejected = -beta * ds,
    };
}

/* dpo_ipo_pair -- the logratios' difference is to be 1 / (2 beta), neither less nor more.
 *                                                                                  [13] Eq. 17
 *   loss = (chosen_logratio / n_chosen - rejected_logratio / n_rejected - 1 / (2 beta))^2
 * Where people always agree, the sigmoid's loss goes on falling for ever as the margin grows, and
 * beta holds nothing; a square has its minimum at a finite margin. Each side counts by token (TRL).
 * By hand: beta 0.1, logratios 2 (4 tokens) and -1 (2 tokens): 0.5 + 0.5 - 5 = -4, loss 16,
 * dchosen 2 * -4 / 4 = -2, drejected 2 * 4 / 2 = 4.                 test: dpo_hand, dpo_golden */
static struct PairLoss dpo_ipo_pair(double beta, const struct DPOSide *chosen,
                                    const struct DPOSide *rejected) {
    double chosen_length = (double)MAX((size_t)1, chosen->length);
    double rejected_length = (double)MAX((size_t)1, rejected->length);
    double chosen_mean = (chosen->logp - chosen->ref_logp) / chosen_length;
    double rejected_mean = (rejected->logp - rejected->ref_logp) / rejected_length;
    double distance = chosen_mean - rejected_mean - 1 / (2 * beta);
    return (struct PairLoss){
        .loss = distance * distance,
        .dchosen = 2 * distance / chosen_length,
        .drejected = -2 * distance / rejected_length,
    };
}

/* One pair under one of the losses. */
static struct PairLoss dpo_variant(const struct DPOConfig *config, enum DPOLossType type,
                                   const struct DPOSide *chosen, const struct DPOSide *rejected) {
    double e = config->label_smoothing;
    double chosen_logratio = chosen->logp - chosen->ref_logp;
    double logits = chosen_logratio - (rejected->logp - rejected->ref_logp);
    if (type == DPO_IPO)
        return dpo_ipo_pair(config->beta, chosen, rejected);
    if (type == DPO_HINGE)
        return dpo_hinge_pair(config->beta, logits);
    if (type == DPO_SIGMOID && e == 0)
        return dpo_pair_loss(config->beta, chosen, rejected);
    return dpo_smoothed_pair(config->beta, logits, e, type == DPO_ROBUST);
}

/* dpo_loss -- the mean over a batch of B pairs of the chosen loss, or of a weighted sum of several.
 * in   chosen, rejected (B)           out  the loss; chosen[b].dlogp, rejected[b].dlogp, set
 * Beside the losses of pairs, `sft` is the mean negative log-likelihood of all chosen tokens: with
 * a small weight it keeps the chosen answers probable, for DPO alone may lower both sides as long
 * as the rejected one falls faster.                                          test: dpo_golden */
static double dpo_loss(const struct DPOConfig *config, size_t B, struct DPOSide *chosen,
                       struct DPOSide *rejected) {
    double loss = 0;
    double chosen_tokens = 0;
    double sft_weight = config->weight[DPO_SFT];
    for (size_t b = 0; b < B; b++)
        chosen_tokens += (double)chosen[b].length;
    for (size_t b = 0; b < B; b++) {
        /* 1. the losses of the pair, each with its weight and its share in the mean */
        chosen[b].dlogp = 0;
        rejected[b].dlogp = 0;
        for (int type = 0; type < DPO_SFT; type++) {
            double weight = config->weight[type];
            if (weight == 0)
                continue;
            struct PairLoss pair =
                dpo_variant(config, (enum DPOLossType)type, &chosen[b], &rejected[b]);
            loss += weight * pair.loss / (double)B;
            chosen[b].dlogp += weight * pair.dchosen / (double)B;
            rejected[b].dlogp += weight * pair.drejected / (double)B;
        }

        /* 2. the likelihood of the chosen answer: a mean over tokens, not over pairs */
        if (sft_weight == 0 || chosen_tokens == 0)
            continue;
        loss += sft_weight * -chosen[b].logp / chosen_tokens;
        chosen[b].dlogp -= sft_weight / chosen_tokens;
    }
    return loss;
}

/* =============================================================================================
 * Chapter 6 - Choosing a token: temperature, top-k, top-p, penalties, one draw
 *                                               [glossary: Inferência] [glossary: Amostragem]
 *
 * The model has said how probable each token is. Which one is written? Always the most probable one
 * (greedy: the argmax) makes dull text that repeats itself; a draw from the whole distribution
 * now and then takes one of thousands of improbable tokens, and the sentence breaks. Between the
 * two stand the processors of this chapter. They work on the logits, in transformers' order:
 *
 *     logits of     " good"  " long"  " bad"  " the"
 *                      2.0      1.0      0.0    -2.0
 *     penalty 2        1.0      1.0      0.0    -2.0     " good" was there already: 2.0 / 2
 *     temperature 0.5  2.0      2.0      0.0    -4.0     divided by 0.5: differences double
 *     top-k 3          2.0      2.0      0.0    -inf     the three largest stay
 *     top-p 0.9        2.0      2.0     -inf    -inf     two hold 0.937 of the mass: enough
 *     softmax          0.5      0.5      0       0
 *     u = 0.7 draws " long": the running sum 0.5, 1.0 passes 0.7 there
 *
 * What enters: logits (V), and the ids written so far. What leaves: the id of the next token. A
 * logit of minus infinity means a probability of 0: the token is cut.
 * ============================================================================================= */

/* Of beam search: when to stop. */
enum EarlyStopping {
    STOP_FALSE,
    STOP_TRUE,
    STOP_NEVER,
};

/* transformers' GenerationConfig, the settings that are used here. */
struct GenerationConfig {
    size_t max_new_tokens, min_new_tokens; /* [glossary: Tokens máximos e mínimos] */
    size_t top_k, no_repeat_ngram_size; /* 0: not used */
    size_t num_return_sequences, num_beams; /* beams: 1 is none */
    double temperature, top_p; /* 1: not used */
    double repetition_penalty; /* 1: not used */
    double length_penalty; /* of beam search, likewise early_stopping */
    enum EarlyStopping early_stopping;
    bool do_sample; /* draw; else take the argmax */
};

/* process_repetition_penalty -- tokens that were written already become less likely [15].
 *                                                    [glossary: Penalidade de repetição]
 *   logit = logit / penalty where it is positive, logit * penalty where it is negative
 * Either way it falls, if the penalty is above 1. An id counts once, however often it occurred.
 * By hand: penalty 2: 3 -> 1.5 and -3 -> -6.                         test: generate_processors */
static void process_repetition_penalty(float *logits, size_t V, const int *ids, size_t n,
                                       double penalty) {
    char *seen = (char *)thread_scratch(SCRATCH_ROW, V / 4 + 1);
    memset(seen, 0, V);
    for (size_t i = 0; i < n; i++) {
        if (seen[ids[i]])
            continue;
        seen[ids[i]] = 1;
        float logit = logits[ids[i]];
        logits[ids[i]] = (float)(logit < 0 ? logit * penalty : logit / penalty);
    }
}

/* process_no_repeat_ngram -- no sequence of `ngram` tokens may occur twice.
 * The last ngram - 1 tokens are compared with every earlier place: where they stood before, the
 * token that followed them then is cut now.
 * By hand: ids 5 6 7 5 6, ngram 3: "5 6" stood before, 7 followed: 7 is cut.
 *                                                                    test: generate_processors */
static void process_no_repeat_ngram(float *logits, const int *ids, size_t n, size_t ngram) {
    if (n < ngram)
        return;
    const int *last = ids + n - (ngram - 1);
    for (size_t i = 0; i + ngram <= n; i++)
        if (memcmp(ids + i, last, (ngram - 1) * sizeof *ids) == 0)
            logits[ids[i + ngram - 1]] = -INFINITY;
}

/* kth_largest -- the k-th largest of n numbers, 1 <= k <= n, without sorting them: Hoare's
 * selection. What is larger than a pivot goes left, what is smaller right, and only the side that
 * holds the k-th place is looked at again: about 2n steps instead of n log n. x is left rearranged.
 * By hand: (3, 1, 2), k = 2: 2.                                              test: kth_largest */
static float kth_largest(float *x, size_t n, size_t k) {
    size_t low = 0;
    size_t high = n - 1;
    while (low < high) {
        /* 1. partition: two pointers walk towards each other and exchange what is on the wrong
         *    side of the pivot, until they meet */
        float pivot = x[low + (high - low) / 2];
        size_t i = low;
        size_t j = high;
        for (;; i++, j--) {
            while (x[i] > pivot)
                i++;
            while (x[j] < pivot)
                j--;
            if (i >= j)
                break;
            float larger = x[j];
            x[j] = x[i];
            x[i] = larger;
        }
        /* 2. the side with the k-th place */
        if (k - 1 <= j)
            high = j;
        else
            low = j + 1;
    }
    return x[k - 1];
}

/* process_top_k -- the k largest logits stay, and what equals the smallest of them.
 *                                                          [glossary: Amostragem top-k]
 * k is the same where the model is sure and where it is not: that is its weakness, and top-p's
 * reason to exist.
 * By hand: (3, 1, 2, 1), k = 2: the second largest is 2; 3 and 2 stay.
 *                                                                    test: generate_processors */
static void process_top_k(float *logits, size_t V, size_t k) {
    if (k >= V)
        return;
    float *copy = thread_scratch(SCRATCH_ROW, V);
    memcpy(copy, logits, V * sizeof *copy);
    float smallest_kept = kth_largest(copy, V, k);
    for (size_t v = 0; v < V; v++)
        if (logits[v] < smallest_kept)
            logits[v] = -INFINITY;
}

/* A token and its logit (or a beam and its score), for sorting. */
struct Candidate {
    float logit;
    int id;
};

/* Largest logit first; among equals the smaller id first. */
static int compare_candidates_down(const void *a, const void *b) {
    const struct Candidate *x = a;
    const struct Candidate *y = b;
    if (x->logit != y->logit)
        return (x->logit < y->logit) - (x->logit > y->logit);
    return (x->id > y->id) - (x->id < y->id);
}

/* The same for top-p, where of equal tokens the larger id comes first: so transformers cuts. */
static int compare_candidates_top_p(const void *a, const void *b) {
    const struct Candidate *x = a;
    const struct Candidate *y = b;
    if (x->logit != y->logit)
        return (x->logit < y->logit) - (x->logit > y->logit);
    return (x->id < y->id) - (x->id > y->id);
}

/* top_p_cut -- how many of the most probable tokens are needed to hold the mass p.
 * in   order (n): candidates, largest logit first; total: sum of e^(logit - largest)
 * Walks down from the top and adds up probabilities; a token stays if those above it hold less
 * than p. At least min_keep of the most probable tokens stay.
 * By hand: 0.5, 0.3, 0.2 and p = 0.7: 0 < 0.7 stays, 0.5 < 0.7 stays, 0.8 is enough: 2.
 *                                              test: generate_processors; gdb: break top_p_cut */
static size_t top_p_cut(const struct Candidate *order, size_t n, double total, double p,
                        size_t min_keep) {
    double above = 0;
    size_t kept = 0;
    while (kept < n && (kept < min_keep || above < p)) {
        above += exp((double)order[kept].logit - order[0].logit) / total;
        kept++;
    }
    return kept;
}

/* process_top_p -- nucleus sampling: the smallest set of most probable tokens whose mass reaches p
 * stays [12].                                              [glossary: Amostragem top-p]
 * Where the model is sure, that is one token or two; where it is not, hundreds.
 * in, out  logits (V); p in [0, 1); min_keep: so many stay in any case
 * By hand: probabilities 0.5, 0.3, 0.2 and p = 0.7: the first two.   test: generate_processors */
static void process_top_p(float *logits, size_t V, double p, size_t min_keep) {
    /* 1. the tokens that are left, most probable first */
    struct Candidate *order = (struct Candidate *)thread_scratch(SCRATCH_ROW, 2 * V);
    size_t n = 0;
    for (size_t v = 0; v < V; v++)
        if (logits[v] > -INFINITY)
            order[n++] = (struct Candidate){logits[v], (int)v};
    qsort(order, n, sizeof *order, compare_candidates_top_p);

    /* 2. the denominator of their softmax */
    double total = 0;
    for (size_t i = 0; i < n; i++)
        total += exp((double)order[i].logit - order[0].logit);

    /* 3. everything behind the cut goes */
    for (size_t i = top_p_cut(order, n, total, p, min_keep); i < n; i++)
        logits[order[i].id] = -INFINITY;
}

/* process_logits -- all processors, in transformers' order.
 * in, out  logits (V)      ids (n): prompt and what was written; new_tokens: how many of those are
 * new. Without do_sample only the first three act: temperature and the cuts keep the argmax.
 *                                                     test: generate_filters_golden */
static void process_logits(float *logits, size_t V, const struct GenerationConfig *config,
                           const int *ids, size_t n, size_t new_tokens, int end_token) {
    /* 1. what was written already */
    if (config->repetition_penalty != 1)
        process_repetition_penalty(logits, V, ids, n, config->repetition_penalty);
    if (config->no_repeat_ngram_size)
        process_no_repeat_ngram(logits, ids, n, config->no_repeat_ngram_size);

    /* 2. no end before the minimum length          [glossary: Tokens máximos e mínimos] */
    if (new_tokens < config->min_new_tokens)
        logits[end_token] = -INFINITY;
    if (!config->do_sample)
        return;

    /* 3. Temperature tau: logits / tau. Below 1 it sharpens the distribution, towards the argmax
     *    at 0; above 1 it flattens it.                  [glossary: Temperatura (τ)] */
    if (config->temperature != 1)
        for (size_t v = 0; v < V; v++)
            logits[v] = (float)(logits[v] / config->temperature);

    /* 4. the cuts; a beam that may end here needs a second token to go on with */
    size_t min_keep = config->num_beams > 1 ? 2 : 1;
    if (config->top_k)
        process_top_k(logits, V, MAX(config->top_k, min_keep));
    if (config->top_p < 1)
        process_top_p(logits, V, config->top_p, min_keep);
}

/* sample_token -- one draw from softmax(logits).                  [glossary: Amostragem]
 * A uniform number u in [0, 1) is drawn; probabilities are added up in the order of the ids, and
 * the token is the one at which the running sum passes u: a token of probability 0.3 owns 0.3 of
 * the line from 0 to 1. logits are probabilities afterwards.
 * By hand: p = (0.2, 0.5, 0.3), u = 0.6: 0.2, 0.7 > 0.6: id 1.     test: generate_distribution */
static int sample_token(float *logits, size_t V, struct Rng *rng) {
    softmax(logits, V);
    double u = rng_uniform(rng);
    double sum = 0;
    for (size_t v = 0; v < V; v++) {
        sum += logits[v];
        if (u < sum)
            return (int)v;
    }
    /* rounding left the sum a little under 1, and u fell into the gap */
    return (int)argmax(logits, V);
}

/* =============================================================================================
 * Part II - The model
 *
 * From text to numbers, from numbers to a distribution over the next token, and back to text.
 * After this part a reader knows what GPT-2 computes, layer by layer, forward and backward: there
 * is no step between a prompt and its continuation, or between a loss and the gradient of each
 * weight, that is not written out here.
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 7 - Byte-pair encoding         [glossary: Tokenização de conjunto de dados]
 *
 * How does text become numbers? GPT-2 [1] first cuts a text into words by a fixed rule, and then
 * builds each word up from its bytes by byte-pair encoding [11]. Its vocabulary was learnt by
 * starting from the 256 bytes and joining, again and again, the two neighbours that stood side by
 * side most often in a large text. To encode, the same joins ("merges") are made again, the one
 * that was learnt first always first:
 *
 *     "low"    l o w   ->   lo w   ->   low         merges "l"+"o", then "lo"+"w"
 *
 * The id of a merged token is 256 + the merge's rank. So "learnt first" is "lowest id", and the
 * first V - 1 ids are a vocabulary themselves, a smaller one: that is how a small model gets one.
 *
 * What enters: bytes, any bytes. What leaves: ids from 0 to V - 1, and back, exactly.
 * ============================================================================================= */

/* A piece of text with its length: data may hold any byte, NUL included. */
struct Text {
    const char *data;
    size_t length;
};

static struct Text text_of(const char *string) {
    return (struct Text){string, strlen(string)};
}
static bool text_equal(struct Text a, struct Text b) {
    return a.length == b.length && memcmp(a.data, b.data, a.length) == 0;
}

static struct Text text_join(struct Arena *arena, struct Text a, struct Text b) {
    char *both = arena_alloc(arena, a.length + b.length + 1, 1);
    if (a.length)
        memcpy(both, a.data, a.length);
    if (b.length)
        memcpy(both + a.length, b.data, b.length);
    both[a.length + b.length] = 0;
    return (struct Text){both, a.length + b.length};
}

static struct Text text_copy(struct Arena *arena, struct Text text) {
    return text_join(arena, text, (struct Text){0});
}

static char *PRINTF_LIKE(2, 3) arena_printf(struct Arena *arena, const char *format, ...) {
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, arguments);
    char *string = arena_alloc(arena, (size_t)length + 1, 1);
    vsnprintf(string, (size_t)length + 1, format, again);
    va_end(again);
    va_end(arguments);
    return string;
}

/* Room for at least one item more behind n of them, in an array that doubles as it fills and is
 * freed by its owner. */
static void *grow(void *items, size_t n, size_t *capacity, size_t size) {
    if (n < *capacity)
        return items;
    *capacity = MAX(2 * *capacity, (size_t)256);
    items = realloc(items, *capacity * size);
    CHECK(items, "out of memory: %zu MB asked for", *capacity * size >> 20);
    return items;
}

enum { TOKENIZER_MAGIC = 20240328, TOKENIZER_VERSION = 2, BYTE_TOKENS = 256 };
enum CharClass { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE };
enum { UNICODE_END = 0x110000, MERGE_SLOTS = 1 << 17 };

struct Tokenizer {
    char *path;
    size_t vocab_size; /* 50257 */
    int end_token; /* 50256, "<|endoftext|>" */
    struct Text *token; /* (vocab_size) the bytes of each id */
    int byte_token[256]; /* the id of each single byte */
    uint8_t *char_class; /* (UNICODE_END) enum CharClass of each code point */
    size_t merges;
    uint32_t *merge_pair; /* (merges) in order of rank: left id | right id << 16 */
    int *merge_id; /* (MERGE_SLOTS) hash table: a pair -> the id it makes; -1: an empty slot */
};

static size_t merge_slot(const struct Tokenizer *tok, uint32_t pair) {
    size_t slot = (pair * 2654435761u) >> 15; /* Knuth's multiplicative hash, upper 17 bits */
    while (tok->merge_id[slot] >= 0 && tok->merge_pair[tok->merge_id[slot] - BYTE_TOKENS] != pair)
        slot = (slot + 1) % MERGE_SLOTS;
    return slot;
}

/* The id that two neighbours make together, or -1. */
static int tokenizer_merge(const struct Tokenizer *tok, int left, int right) {
    return tok->merge_id[merge_slot(tok, (uint32_t)left | (uint32_t)right << 16)];
}

/* Length of the UTF-8 character that starts at text[i], its code point in *code; 0 if it is not
 * valid. */
static size_t utf8_read(const unsigned char *text, size_t n, uint32_t *code) {
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000}; /* below: an overlong form */
    unsigned char c = text[0];
    *code = c;
    if (c < 0x80)
        return 1;
    size_t length = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    if (c < 0xc2 || c > 0xf4 || n < length)
        return 0;
    *code = c & (0xffu >> (length + 1));
    for (size_t k = 1; k < length; k++) {
        if ((text[k] & 0xc0) != 0x80)
            return 0;
        *code = *code << 6 | (text[k] & 63);
    }
    return *code >= least[length] && *code < 0x110000 && (*code < 0xd800 || *code >= 0xe000)
               ? length
               : 0;
}

/* The layout of a vocabulary of V ids: those below this id are ordinary tokens, and this one is
 * spelt "<|endoftext|>": GPT-2's own if the vocabulary has it, else the last. Which token ends a
 * text is the model's configuration to say (eos_token_id); this id is only the default. */
static int endoftext_id(size_t vocab_size) {
    return (int)MIN(vocab_size, (size_t)50257) - 1;
}

/* Class and length of the character at text[i]. A byte that is no valid UTF-8 is a character of
 * class "other", and kept. */
static enum CharClass char_class_at(const struct Tokenizer *tok, const unsigned char *text,
                                    size_t i, size_t n, size_t *length) {
    uint32_t code;
    *length = utf8_read(text + i, n - i, &code);
    if (*length > 0)
        return (enum CharClass)tok->char_class[code];
    *length = 1;
    return CLASS_OTHER;
}

/* Where the word that starts at i ends. GPT-2's rule, as a regular expression tried left to right:
 *     's|'t|'re|'ve|'m|'ll|'d | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
 * By hand: "I'm  42!" -> "I", "'m", " ", " 42", "!": \s+(?!\S) leaves the last space to the next
 * word. test: tokenizer_words */
static size_t tokenizer_word_end(const struct Tokenizer *tok, const unsigned char *text, size_t i,
                                 size_t n) {
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t k = 0; k < COUNT(contractions) && text[i] == '\''; k++) {
        size_t length = strlen(contractions[k]);
        if (n - i >= length && memcmp(text + i, contractions[k], length) == 0)
            return i + length;
    }
    size_t length;
    size_t at = i;
    enum CharClass class = char_class_at(tok, text, at, n, &length);
    if (text[i] == ' ' && i + 1 < n) { /* " ?": a space joins the run behind it */
        enum CharClass next = char_class_at(tok, text, i + 1, n, &length);
        if (next == CLASS_SPACE)
            length = 1;
        else {
            class = next;
            at = i + 1;
        }
    }
    size_t last = at;
    for (at += length; at < n && char_class_at(tok, text, at, n, &length) == class; at += length)
        last = at;
    return class == CLASS_SPACE && at < n && last > i ? last : at;
}

/* Byte-pair encoding of one word. Its pieces form a linked list; neighbours that can merge wait
 * in a heap, lowest merged id first, then leftmost. Entries about pieces gone meanwhile are
 * skipped. n bytes take O(n log n), where rescanning for each merge would take O(n^2). */
/* id -1: merged into its left neighbour; prev, next -1: none */
struct Piece {
    int id;
    int32_t prev, next;
};
/* heap: merged id << 32 | left piece */
struct WordPieces {
    struct Piece *piece;
    uint64_t *heap;
    size_t heap_size;
};

static void heap_push(struct WordPieces *w, uint64_t entry) {
    size_t i = w->heap_size++;
    for (; i > 0 && entry < w->heap[(i - 1) / 2]; i = (i - 1) / 2)
        w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = entry;
}

static uint64_t heap_pop(struct WordPieces *w) {
    uint64_t top = w->heap[0];
    uint64_t last = w->heap[--w->heap_size];
    size_t i = 0;
    size_t n = w->heap_size;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && w->heap[child + 1] < w->heap[child])
            child++;
        if (w->heap[child] >= last)
            break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return top;
}

/* Offers the pair (at, next of at), unless its merge is outside the vocabulary. */
static void pieces_offer(const struct Tokenizer *tok, struct WordPieces *w, int32_t at,
                         int merge_limit) {
    if (at < 0 || w->piece[at].next < 0)
        return;
    int id = tokenizer_merge(tok, w->piece[at].id, w->piece[w->piece[at].next].id);
    if (id >= 0 && id < merge_limit)
        heap_push(w, (uint64_t)id << 32 | (uint32_t)at);
}

static size_t tokenizer_encode_word(const struct Tokenizer *tok, struct WordPieces *w,
                                    const unsigned char *word, size_t n, int merge_limit,
                                    int *out) {
    struct Piece *piece = w->piece;
    for (size_t i = 0; i < n; i++)
        piece[i] = (struct Piece){tok->byte_token[word[i]], (int32_t)i - 1,
                                  i + 1 < n ? (int32_t)i + 1 : -1};
    w->heap_size = 0;
    for (size_t i = 0; i + 1 < n; i++)
        pieces_offer(tok, w, (int32_t)i, merge_limit);
    while (w->heap_size > 0) {
        uint64_t top = heap_pop(w);
        int id = (int)(top >> 32);
        int32_t left = (int32_t)(top & 0xffffffff);
        int32_t right = piece[left].next;
        if (piece[left].id < 0 || right < 0
            || tokenizer_merge(tok, piece[left].id, piece[right].id) != id)
            continue;
        piece[left] = (struct Piece){id, piece[left].prev, piece[right].next};
        piece[right].id = -1;
        if (piece[left].next >= 0)
            piece[piece[left].next].prev = left;
        pieces_offer(tok, w, piece[left].prev, merge_limit);
        pieces_offer(tok, w, left, merge_limit);
    }
    size_t count = 0;
    for (int32_t i = 0; i >= 0; i = piece[i].next)
        out[count++] = piece[i].id;
    return count;
}

/* tokenizer_encode -- text to ids.                [glossary: Tokenização de conjunto de dados]
 * in   text: n bytes, valid UTF-8 or not; vocab_size: V of the model, ids 0 .. V-2 are used
 * out  ids: room for n of them (a token is at least a byte); returns how many
 * "<|endoftext|>" inside a text is ordinary text: data cannot forge an end.   test: tokenizer_* */
static size_t tokenizer_encode(const struct Tokenizer *tok, struct Text text, size_t vocab_size,
                               int *ids) {
    const unsigned char *bytes = (const unsigned char *)text.data;
    int merge_limit = endoftext_id(vocab_size);
    struct WordPieces w = {0};
    size_t count = 0;
    CHECK(text.length < INT32_MAX,
          "a text of %zu bytes is longer than the 2 GB that can be encoded at once", text.length);
    for (size_t i = 0, end; i < text.length; i = end) {
        end = tokenizer_word_end(tok, bytes, i, text.length);
        size_t n = end - i;
        /* n - 1 entries at first, 2 more for each of n - 1 merges */
        w.heap = (uint64_t *)thread_scratch(SCRATCH_A, 6 * n);
        w.piece = (struct Piece *)thread_scratch(SCRATCH_B, 3 * n);
        count += tokenizer_encode_word(tok, &w, bytes + i, n, merge_limit, ids + count);
    }
    return count;
}

static struct Text tokenizer_decode(const struct Tokenizer *tok, int id, size_t vocab_size) {
    if (id == endoftext_id(vocab_size))
        id = tok->end_token;
    /* the unused ids of a padded vocabulary */
    if (id < 0 || (size_t)id >= tok->vocab_size)
        return text_of("");
    return tok->token[id];
}

static struct Text tokenizer_decode_all(const struct Tokenizer *tok, struct Arena *arena,
                                        const int *ids, size_t n, size_t vocab_size) {
    size_t length = 0;
    for (size_t i = 0; i < n; i++)
        length += tokenizer_decode(tok, ids[i], vocab_size).length;
    char *text = arena_alloc(arena, length + 1, 1);
    char *to = text;
    for (size_t i = 0; i < n; i++) {
        struct Text piece = tokenizer_decode(tok, ids[i], vocab_size);
        memcpy(to, piece.data, piece.length);
        to += piece.length;
    }
    *to = 0;
    return (struct Text){text, length};
}

/* =============================================================================================
 * Chapter 8 - Batches: examples, collator, pairs, LengthSampler
 *                                                    [glossary: Conjunto de dados]
 *
 * What does the model see of a data set? Rows of text become examples (ids, and how many of them
 * are the prompt), and several examples become a batch. Texts have different lengths. TRL pads
 * them to a rectangle and masks the padding out again; here they are packed, one behind the other:
 *
 *     example 0: [5 6 7]      TRL:  5 6 7 .        here:  ids       5 6 7 8 9 4 3
 *     example 1: [8 9 4 3]          8 9 4 3               start     0     3       7
 *                                                         position  0 1 2 0 1 2 3
 *
 * What is not there costs nothing, and each fact has one place: where a sequence starts, which
 * position each token has, which rows must predict which token.
 *
 * What enters: ids of texts. What leaves: a batch: N tokens in a row, R rows with a target.
 * ============================================================================================= */

/* A shape: the fields that a row must have, and, 16 bits further on, those that are used if they
 * are there. What a row has besides is not looked at. */
#define MAY_HAVE(fields) ((fields) << 16)
enum Field {
    HAS_TEXT = 1,
    HAS_PROMPT = 2,
    HAS_COMPLETION = 4,
    HAS_CHOSEN = 8,
    HAS_REJECTED = 16,
    HAS_LABEL = 32,
    HAS_SCORE = 64,
    HAS_QUERY_IDS = 128,
    HAS_RESPONSE_IDS = 256,
    HAS_MARGIN = 512,
    SHAPE_TEXT = HAS_TEXT,
    SHAPE_PROMPT = HAS_PROMPT,
    SHAPE_PROMPT_COMPLETION = HAS_PROMPT | HAS_COMPLETION,
    SHAPE_PREFERENCE = HAS_CHOSEN | HAS_REJECTED | MAY_HAVE(HAS_PROMPT),
    SHAPE_MARGIN = SHAPE_PREFERENCE | MAY_HAVE(HAS_MARGIN), /* the same, where margins count */
    SHAPE_LABELLED = HAS_TEXT | HAS_LABEL,
    SHAPE_RATED = HAS_TEXT | HAS_SCORE,
    SHAPE_ROLLOUT = HAS_QUERY_IDS | HAS_RESPONSE_IDS | HAS_SCORE
};
static const char *const FIELD_NAMES[] = {"text",         "prompt", "completion", "chosen",
                                          "rejected",     "label",  "score",      "query_ids",
                                          "response_ids", "margin"};

struct Row {
    unsigned has; /* which of enum Field, used or not */
    struct Text text, prompt, completion, chosen, rejected;
    double score, margin, label;
    int *query_ids, *response_ids;
    size_t query_length, response_length;
};

struct Dataset {
    struct Row *rows;
    size_t n, capacity;
    unsigned shape;
    char *path;
    struct DataFile *files; /* of a folder; else the one file */
    size_t file_count;
};

/* Token ids of one training sequence; the first prompt_length of them are given, not learnt. */
struct Example {
    int *ids;
    size_t n, prompt_length;
};

/* Did the answer behind the prompt end by itself, in the policy's end token? */
static bool example_ended(const struct Example *e, int end_token) {
    return e->n > e->prompt_length && e->ids[e->n - 1] == end_token;
}

/* Puts the end token behind what is learnt, unless that ends in it already, as it can where the end
 * token is an ordinary one: so does TRL. The ids have room for it. */
static void example_end(struct Example *e, int end_token) {
    if (!example_ended(e, end_token))
        e->ids[e->n++] = end_token;
}

/* A text as ids, the model's end token behind it; with end_token NULL without one. */
static struct Example example_encode(struct Arena *arena, const struct Tokenizer *tok,
                                     struct Text text, size_t vocab_size, const int *end_token) {
    struct Example e = {0};
    int *ids = (int *)thread_scratch(SCRATCH_ROW, text.length + 1);
    e.n = tokenizer_encode(tok, text, vocab_size, ids);
    e.ids = memcpy(arena_alloc(arena, e.n + 1, sizeof *e.ids), ids, e.n * sizeof *ids);
    if (end_token)
        example_end(&e, *end_token);
    return e;
}

/* Prompt + completion as TRL: encoded as one, the end token behind it; the completion starts
 * where the ids stop to be the prompt's own. */
static struct Example example_prompt_completion(struct Arena *arena, const struct Tokenizer *tok,
                                                struct Text prompt, struct Text completion,
                                                size_t vocab_size, const int *end_token) {
    struct Arena scratch = {0};
    struct Example alone = example_encode(&scratch, tok, prompt, vocab_size, NULL);
    struct Text both = text_join(&scratch, prompt, completion);
    struct Example whole = example_encode(arena, tok, both, vocab_size, NULL);
    size_t *n = &whole.prompt_length;
    while (*n < alone.n && *n < whole.n && alone.ids[*n] == whole.ids[*n])
        ++*n;
    if (end_token)
        example_end(&whole, *end_token);
    arena_free(&scratch);
    return whole;
}

/* Texts without a prompt: the longest common prefix of whole characters, less a space at its
 * end, with which the completions then start. By hand: "It is good", "It is bad" -> prompt "It
 * is", completions " good" and " bad". */
static void split_implicit_prompt(struct Row *row) {
    size_t n = 0;
    while (n < row->chosen.length && n < row->rejected.length
           && row->chosen.data[n] == row->rejected.data[n])
        n++;
    /* behind a text stands a NUL */
    while (n > 0
           && ((row->chosen.data[n] & 0xc0) == 0x80 || (row->rejected.data[n] & 0xc0) == 0x80))
        n--;
    if (n > 0 && row->chosen.data[n - 1] == ' ')
        n--;
    row->prompt = (struct Text){row->chosen.data, n};
    row->chosen = (struct Text){row->chosen.data + n, row->chosen.length - n};
    row->rejected = (struct Text){row->rejected.data + n, row->rejected.length - n};
}

/* A batch, packed: sequence b has tokens start[b] .. start[b+1]-1; of its targets r =
 * target_start[b] .. [b+1]-1, target[r] is due at row[r]. */
struct Batch {
    size_t B, N, R, max_length; /* max_length: tokens of the longest sequence in the batch */
    size_t tokens; /* of the examples, whether or not the model reads the last ones */
    int *ids, *position; /* (N) */
    size_t *start, *target_start; /* (B+1) */
    int *row, *target; /* (R) */
    /* (B) or NULL: from row fork[b] on, sequence b goes on from its first shared[b] rows
     * (collate_pairs) */
    size_t *shared, *fork;
    struct KVCache *cache; /* in decoding: the past; else NULL */
    size_t *slot; /* (N) the sequence of the cache that a token belongs to */
};

/* A batch of B sequences without a token yet, and room for `tokens` of them. */
static struct Batch batch_new(struct Arena *arena, size_t B, size_t tokens) {
    return (struct Batch){
        .B = B,
        .tokens = tokens,
        .ids = arena_alloc(arena, tokens, sizeof(int)),
        .position = arena_alloc(arena, tokens, sizeof(int)),
        .row = arena_alloc(arena, tokens, sizeof(int)),
        .target = arena_alloc(arena, tokens, sizeof(int)),
        .start = arena_zeros(arena, B + 1, sizeof(size_t)),
        .target_start = arena_zeros(arena, B + 1, sizeof(size_t)),
    };
}

/* Tokens t0..t1-1 of a sequence become a batch's next rows. */
static void batch_append(struct Batch *batch, const int *ids, size_t t0, size_t t1) {
    for (size_t t = t0; t < t1; t++, batch->N++) {
        batch->ids[batch->N] = ids[t];
        batch->position[batch->N] = (int)t;
    }
}

/* collate -- sequences of different lengths into one batch.  [glossary: Função coladora] TRL's
 * collators pad to a rectangle (B, T_max), mask the padding and set the labels of prompts and
 * padding to -100, "ignore". Packing stores the same facts: `row`/`target` name the positions
 * whose label would not be -100. Position t predicts token t+1: a sequence's first token has no
 * row, and the last one predicts nothing, so it is left out of the model's input unless
 * READ_LAST asks for it (a reward is read there). By hand: ids [5 6 7 8] with a prompt of 2:
 * rows 1 and 2, targets 7 and 8.  test: collate */
enum LastToken { SKIP_LAST, READ_LAST };

static struct Batch collate(struct Arena *arena, const struct Example *examples, size_t B,
                            enum LastToken last) {
    size_t tokens = 0;
    for (size_t b = 0; b < B; b++)
        tokens += examples[b].n;
    struct Batch batch = batch_new(arena, B, tokens);
    for (size_t b = 0; b < B; b++) {
        const struct Example *e = &examples[b];
        for (size_t t = MAX(e->prompt_length, (size_t)1); t < e->n; t++) {
            batch.row[batch.R] = (int)(batch.N + t - 1);
            batch.target[batch.R++] = e->ids[t];
        }
        batch_append(&batch, e->ids, 0, e->n - (last == SKIP_LAST && e->n > 0));
        batch.start[b + 1] = batch.N;
        batch.target_start[b + 1] = batch.R;
        batch.max_length = MAX(batch.max_length, batch.N - batch.start[b]);
    }
    return batch;
}

/* collate_pairs -- 2B examples (all chosen first) in one batch in which the prompt of a pair is
 * computed once where that pays: prompt, chosen, rejected in one sequence, whose fork attention
 * knows; the rejected answer's rows see the prompt and themselves. It pays where the rows saved,
 * 24 C^2 multiplications a layer, outweigh the scores that are computed and thrown away, 4 C
 * each. Targets come in the order of the examples. By hand: prompt 2, answers of 3 and 4 tokens:
 * rows 2+2 and 3 instead of 4 + 5.  test: collate_pairs */
static struct Batch collate_pairs(struct Arena *arena, const struct Example *examples, size_t B,
                                  size_t C) {
    /* the targets stay, the rows are laid out anew */
    struct Batch batch = collate(arena, examples, 2 * B, SKIP_LAST);
    const size_t *from = batch.start;
    const size_t *target_start = batch.target_start;
    batch.start = arena_zeros(arena, 2 * B + 1, sizeof *batch.start);
    batch.shared = arena_zeros(arena, 2 * B, sizeof *batch.shared);
    batch.fork = arena_zeros(arena, 2 * B, sizeof *batch.fork);
    batch.N = batch.B = 0;
    for (size_t b = 0, at = 0; b < B; b++, at = batch.N) {
        size_t chosen = from[b + 1] - from[b];
        size_t rejected = from[B + b + 1] - from[B + b];
        size_t fork = at + chosen;
        size_t prompt = MIN(MIN(examples[b].prompt_length, chosen), rejected);
        if ((double)prompt * 6 * (double)C
            <= (double)(chosen - prompt) * (double)(rejected - prompt))
            prompt = 0;
        batch_append(&batch, examples[b].ids, 0, chosen);
        batch_append(&batch, examples[B + b].ids, prompt, rejected);
        batch.shared[batch.B] = prompt;
        batch.fork[batch.B] = chosen;
        if (prompt == 0)
            batch.start[++batch.B] = fork;
        batch.start[++batch.B] = batch.N;
        for (size_t r = target_start[b]; r < target_start[b + 1]; r++)
            batch.row[r] += (int)at - (int)from[b];
        for (size_t r = target_start[B + b]; r < target_start[B + b + 1]; r++) {
            size_t t = (size_t)batch.row[r] - from[B + b];
            batch.row[r] = (int)(t < prompt ? at + t : fork + t - prompt);
        }
    }
    return batch;
}

/* LengthSampler(min, max): a whole number in [min, max), as in TRL: (2, 8) gives 2 to 7, lest
 * the model learn one.  [glossary: LengthSampler] */
struct LengthSampler {
    size_t min_value, max_value;
};

static size_t length_sampler(const struct LengthSampler *s, struct Rng *rng) {
    return s->min_value + rng_below(rng, s->max_value - s->min_value);
}

/* =============================================================================================
 * Chapter 9 - Matrix product
 *
 * Why is this chapter here, and so long? Nine tenths of the time of every command is spent in one
 * operation, C += A B: y = x W, dx = dy W^T, dW = x^T dy. All three are one function, because it
 * takes each operand by two strides: element (i,k) of A stands at data[i*row + k*column], so a
 * transpose is the same memory with the strides exchanged. matmul_plain is the definition, in ten
 * lines. Everything else makes it a hundred times faster, and a test holds the two together.
 *
 * Why is the plain triple loop slow, and what helps [16]? It loads two numbers for each
 * multiplication, and the machine can do 16 multiplications in the time of one load from its
 * second cache.
 *   1. A register tile: MR x NR sums are kept in vector registers; each step of k loads MR + NR
 *      numbers and does MR * NR multiply-adds. That alone is the speed; the rest feeds it.
 *   2. Packing: A and B are copied into panels in the very order in which the tile reads them,
 *      whatever the strides.
 *   3. Blocks: KC steps of k at a time, so that one panel of B (NR columns, 48 KB) stays in the
 *      first or second cache while the panels of A pass by it.
 * All threads pack A together; then each takes panels of B, packs one for itself and fills the
 * columns of C under it. One thread sums an element of C, in the order of k: the same bits on any
 * number of threads. Figures: docs/performance.md.
 * ============================================================================================= */

enum { TILE_MAX = 8 * 32, KC = 384, BLOCK_ROWS = 1024 };

/* A tile: c (MR,NR) = start + sum over k of a[k][0..MR) * b[k][0..NR), packed panels. c and
 * start have rows c_row and start_row apart; start NULL counts as zeros, and may be c: that is
 * +=. */
struct Kernel {
    const char *name;
    size_t MR, NR;
    void (*tile)(size_t K, const float *a, const float *b, const float *start, size_t start_row,
                 float *c, size_t c_row);
    void (*few_rows)(float *y, const float *x, const float *weight, const float *bias, size_t N,
                     size_t in, size_t out, size_t columns);
};

/* Vectors: + and * on them are single instructions, a number times a vector multiplies each
 * lane, `_any` may stand at any address. Loops over sums are unrolled by order: only then does
 * gcc keep all of them in registers throughout. */
/* SSE, NEON: in every x86-64 and arm64 */
typedef float float4 __attribute__((vector_size(16))),
    float4_any __attribute__((vector_size(16), aligned(4)));
/* AVX */
typedef float float8 __attribute__((vector_size(32))),
    float8_any __attribute__((vector_size(32), aligned(4)));
/* AVX-512 */
typedef float float16 __attribute__((vector_size(64))),
    float16_any __attribute__((vector_size(64), aligned(4)));

static void tile_4x8(size_t K, const float *a, const float *b, const float *start, size_t start_row,
                     float *c, size_t c_row) {
    float4 sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] = start ? *(const float4_any *)(start + i * start_row + 4 * j) : (float4){0};
    for (size_t k = 0; k < K; k++, a += 4, b += 8) {
        float4 b0 = *(const float4 *)b;
        float4 b1 = *(const float4 *)(b + 4);
        for (int i = 0; i < 4; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
            *(float4_any *)(c + i * c_row + 4 * j) = sum[i][j];
}

/* A strip of columns of y = x W + bias for few rows, as in generation: packing W would cost more
 * than it saves. Eight rows of W at a time pass through the first cache and serve all rows of x;
 * the next eight are asked for meanwhile. Compiled beside each tile, for the same instructions: it
 * adds in the tile's order and, where there is a fused multiply-add, rounds where the tile does, so
 * both make the same bits.                                          test: few_rows, rows_company */
static inline __attribute__((always_inline)) void linear_few_rows(float *y, const float *x,
                                                                  const float *weight,
                                                                  const float *bias, size_t N,
                                                                  size_t in, size_t out,
                                                                  size_t columns) {
    for (size_t n = 0; n < N; n++)
        memcpy(y + n * out, bias, columns * sizeof *y);
    size_t k = 0;
    for (; k + 8 <= in; k += 8)
        for (size_t n = 0; n < N; n++) {
            for (size_t next = k + 8 + n; next < MIN(in, k + 16); next += N)
                for (size_t j = 0; j < MIN(columns, (size_t)384); j += 16)
                    __builtin_prefetch(weight + next * out + j);
            const float *a = x + n * in + k;
            const float *w = weight + k * out;
            const float *w1 = w + out;
            const float *w2 = w1 + out;
            const float *w3 = w2 + out;
            const float *w4 = w3 + out;
            const float *w5 = w4 + out;
            const float *w6 = w5 + out;
            const float *w7 = w6 + out;
            float *sum = y + n * out;
            for (size_t j = 0; j < columns; j++)
                sum[j] = sum[j] + a[0] * w[j] + a[1] * w1[j] + a[2] * w2[j] + a[3] * w3[j]
                         + a[4] * w4[j] + a[5] * w5[j] + a[6] * w6[j] + a[7] * w7[j];
        }
    for (; k < in; k++)
        for (size_t n = 0; n < N; n++)
            for (size_t j = 0; j < columns; j++)
                y[n * out + j] += x[n * in + k] * weight[k * out + j];
}

static void few_rows_plain(float *y, const float *x, const float *weight, const float *bias,
                           size_t N, size_t in, size_t out, size_t columns) {
    linear_few_rows(y, x, weight, bias, N, in, out, columns);
}

#if defined(__x86_64__)
/* 4 x 24: 12 of the 16 registers of AVX2 hold sums, 3 the columns of b, one the number of a. */
__attribute__((target("avx2,fma"))) static void tile_4x24(size_t K, const float *a, const float *b,
                                                          const float *start, size_t start_row,
                                                          float *c, size_t c_row) {
    float8 sum[4][3];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 3; j++)
            sum[i][j] = start ? *(const float8_any *)(start + i * start_row + 8 * j) : (float8){0};
    for (size_t k = 0; k < K; k++, a += 4, b += 24) {
        float8 b0 = *(const float8 *)b;
        float8 b1 = *(const float8 *)(b + 8);
        float8 b2 = *(const float8 *)(b + 16);
        for (int i = 0; i < 4; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
            sum[i][2] += a[i] * b2;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 3; j++)
            *(float8_any *)(c + i * c_row + 8 * j) = sum[i][j];
}

/* 8 x 32: 16 of the 32 registers of AVX-512 hold sums. Larger tiles are not faster, and 8
 * divides more batches. */
__attribute__((target("avx512f"))) static void tile_8x32(size_t K, const float *a, const float *b,
                                                         const float *start, size_t start_row,
                                                         float *c, size_t c_row) {
    float16 sum[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] =
                start ? *(const float16_any *)(start + i * start_row + 16 * j) : (float16){0};
    for (size_t k = 0; k < K; k++, a += 8, b += 32) {
        float16 b0 = *(const float16 *)b;
        float16 b1 = *(const float16 *)(b + 16);
        for (int i = 0; i < 8; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 2; j++)
            *(float16_any *)(c + i * c_row + 16 * j) = sum[i][j];
}

__attribute__((target("avx2,fma"))) static void few_rows_avx2(float *y, const float *x,
                                                              const float *weight,
                                                              const float *bias, size_t N,
                                                              size_t in, size_t out,
                                                              size_t columns) {
    linear_few_rows(y, x, weight, bias, N, in, out, columns);
}

__attribute__((target("avx512f,fma"))) static void few_rows_avx512(float *y, const float *x,
                                                                   const float *weight,
                                                                   const float *bias, size_t N,
                                                                   size_t in, size_t out,
                                                                   size_t columns) {
    linear_few_rows(y, x, weight, bias, N, in, out, columns);
}
#endif

static const struct Kernel KERNELS[] = {
    {"plain 4x8", 4, 8, tile_4x8, few_rows_plain},
#if defined(__x86_64__)
    {"avx2 4x24", 4, 24, tile_4x24, few_rows_avx2},
    {"avx512 8x32", 8, 32, tile_8x32, few_rows_avx512},
#endif
};
static const struct Kernel *kernel; /* NULL: matmul_plain */

/* Is kernel k the one that ALIGN_KERNEL asks for: by its place, its name or the name's first word?
 * "plain" alone stands for matmul_plain. */
static bool kernel_is_asked(size_t k, const char *asked) {
    const char *name = KERNELS[k].name;
    size_t word = strcspn(name, " ");
    bool by_place = strlen(asked) == 1 && (size_t)(*asked - '0') == k;
    return by_place || strcmp(asked, name) == 0
           || (strlen(asked) == word && strncmp(asked, name, word) == 0);
}

/* The widest tile this processor has, or a narrower one that the environment variable ALIGN_KERNEL
 * asks for: 0, 1, 2, avx2, avx512; "plain": none, matmul_plain.               test: kernel_choose
 */
static void kernel_choose(void) {
    size_t widest = 0;
    size_t chosen = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        widest = __builtin_cpu_supports("avx512f") ? 2 : 1;
#endif
    kernel = &KERNELS[widest];
    const char *asked = getenv("ALIGN_KERNEL");
    if (!asked || !*asked)
        return;
    kernel = NULL;
    if (strcmp(asked, "plain") == 0)
        return;
    char names[100] = "plain";
    for (size_t k = 0; k < COUNT(KERNELS); k++) {
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, ", %s", KERNELS[k].name);
    }
    while (chosen < COUNT(KERNELS) && !kernel_is_asked(chosen, asked))
        chosen++;
    CHECK(chosen < COUNT(KERNELS), "ALIGN_KERNEL=%s: there is no such kernel; there are %s", asked,
          names);
    kernel = &KERNELS[MIN(chosen, widest)];
    if (chosen > widest)
        warn("ALIGN_KERNEL=%s: this processor cannot run it; %s is used", asked, kernel->name);
}

/* Four lines of K consecutive numbers into four neighbouring columns of a panel: 4 x 4 at a
 * time, transposed in registers. shufflevector(x, y, ...) picks from the 8 numbers of x and y. */
static inline __attribute__((always_inline)) void pack_4_lines(float *panel, const float *from,
                                                               size_t line_stride, size_t K,
                                                               size_t width) {
    size_t k = 0;
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
    for (; k + 4 <= K; k += 4, from += 4) {
        float4 a = *(const float4_any *)from;
        float4 b = *(const float4_any *)(from + line_stride);
        float4 c = *(const float4_any *)(from + 2 * line_stride);
        float4 d = *(const float4_any *)(from + 3 * line_stride);
        float4 ab_01 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        float4 ab_23 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        float4 cd_01 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
        float4 cd_23 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        float4_any *to = (float4_any *)(panel + k * width);
        to[0] = __builtin_shufflevector(ab_01, cd_01, 0, 1, 4, 5);
        to[width / 4] = __builtin_shufflevector(ab_01, cd_01, 2, 3, 6, 7);
        to[2 * width / 4] = __builtin_shufflevector(ab_23, cd_23, 0, 1, 4, 5);
        to[3 * width / 4] = __builtin_shufflevector(ab_23, cd_23, 2, 3, 6, 7);
    }
#endif
    for (; k < K; k++, from++)
        for (size_t i = 0; i < 4; i++)
            panel[k * width + i] = from[i * line_stride];
}

/* Copies `n` <= width lines of K numbers into a panel: panel[k*width + i] = line i, step k;
 * missing lines are zeros. What comes next is asked for in advance: the lines are far apart, and
 * the processor's own foresight ends at a page of memory. */
WIDE static void pack_panel(float *panel, const float *from, size_t line_stride, size_t k_stride,
                            size_t n, size_t K, size_t width) {
    size_t i = 0;
    if (n == width && line_stride == 1) {
        for (size_t k = 0; k < K; k++) {
            for (i = 0; i < width; i += 16)
                __builtin_prefetch(from + (k + 32) * k_stride + i);
            /* of constant size: four instructions */
            if (width == 32)
                memcpy(panel + k * width, from + k * k_stride, 32 * sizeof *panel);
            else
                for (i = 0; i < width; i += 4)
                    memcpy(panel + k * width + i, from + k * k_stride + i, 4 * sizeof *panel);
        }
        return;
    }
    if (n < width)
        memset(panel, 0, K * width * sizeof *panel);
    for (; k_stride == 1 && i + 4 <= n; i += 4) {
        for (size_t j = i + 4; j < i + 8; j++)
            for (size_t k = 0; k < K; k += 16)
                __builtin_prefetch(from + j * line_stride + k);
        pack_4_lines(panel + i, from + i * line_stride, line_stride, K, width);
    }
    for (size_t k = 0; k < K; k++)
        for (size_t j = i; j < n; j++)
            panel[k * width + j] = from[j * line_stride + k * k_stride];
}

/* A matrix as seen by matmul: where it starts, the step to the next row, the step to the next
 * column. */
struct Matrix {
    const float *data;
    size_t row, column;
};

static struct Matrix matrix(const float *data, size_t columns) {
    return (struct Matrix){data, columns, 1};
}
static struct Matrix transposed(const float *data, size_t columns) {
    return (struct Matrix){data, 1, columns};
}

/* One panel of B, packed, times the panels of A for rows m0..m1: `columns` columns of C from
 * column n on. A tile that sticks out of C is made aside, from a copy of what it starts from,
 * and copied back: its sums are made by the very operations of a whole tile, so that a row of C
 * has the same bits wherever it stands and whatever rows are beside it. C's next rows are asked
 * for early where they are to be added to.  test: rows_company */
static void matmul_panel(float *c, size_t c_row, const float *start, size_t start_row,
                         const float *pack_a, const float *panel, size_t m0, size_t m1,
                         size_t columns, size_t K) {
    size_t MR = kernel->MR;
    size_t NR = kernel->NR;
    _Alignas(64) float aside[TILE_MAX];
    for (size_t m = m0; m < m1; m += MR) {
        const float *from = start ? start + m * start_row : NULL;
        for (size_t i = m + MR; from && i < MIN(m1, m + 2 * MR); i++)
            for (size_t j = 0; j < columns; j += 16)
                __builtin_prefetch(start + i * start_row + j, 1);
        if (m1 - m >= MR && columns == NR) {
            kernel->tile(K, pack_a + m * K, panel, from, start_row, c + m * c_row, c_row);
            continue;
        }
        size_t rows = MIN(MR, m1 - m);
        memset(aside, 0, sizeof aside); /* also where there is nothing of C */
        for (size_t i = 0; from && i < rows; i++)
            memcpy(aside + i * NR, from + i * start_row, columns * sizeof *c);
        kernel->tile(K, pack_a + m * K, panel, aside, NR, aside, NR);
        for (size_t i = 0; i < rows; i++)
            memcpy(c + (m + i) * c_row, aside + i * NR, columns * sizeof *c);
    }
}

/* One block of rows and of K. A task is a panel of B and a stretch of rows: fewer than all where
 * panels alone are too few. */
static void matmul_block(float *c, size_t c_row, const float *start, size_t start_row,
                         struct Matrix a, struct Matrix b, size_t M, size_t N, size_t K,
                         float *pack_a) {
    size_t MR = kernel->MR;
    size_t NR = kernel->NR;
    size_t panels = (N + NR - 1) / NR;
    size_t stretch = M;
    size_t tasks_wanted = 4 * (size_t)omp_get_max_threads();
    /* the same, alone: even a team of one thread costs a microsecond, and attention calls often */
    if ((double)M * (double)N * (double)K <= 2e5 || omp_in_parallel()) {
        float *panel = thread_scratch(SCRATCH_B, NR * KC);
        for (size_t m = 0; m < M; m += MR)
            pack_panel(pack_a + m * K, a.data + m * a.row, a.row, a.column, MIN(MR, M - m), K, MR);
        for (size_t n = 0; n < N; n += NR) {
            pack_panel(panel, b.data + n * b.column, b.column, b.row, MIN(NR, N - n), K, NR);
            matmul_panel(c + n, c_row, start ? start + n : NULL, start_row, pack_a, panel, 0, M,
                         MIN(NR, N - n), K);
        }
        return;
    }
    while (panels * ((M + stretch - 1) / stretch) < tasks_wanted && stretch > MR)
        stretch = (stretch / 2 + MR - 1) / MR * MR;
    size_t stretches = (M + stretch - 1) / stretch;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (size_t m = 0; m < M; m += MR)
            pack_panel(pack_a + m * K, a.data + m * a.row, a.row, a.column, MIN(MR, M - m), K, MR);
        float *panel = thread_scratch(SCRATCH_B, NR * KC);
#pragma omp for schedule(dynamic) nowait
        for (size_t task = 0; task < panels * stretches; task++) {
            size_t n = task / stretches * NR;
            size_t m = task % stretches * stretch;
            pack_panel(panel, b.data + n * b.column, b.column, b.row, MIN(NR, N - n), K, NR);
            matmul_panel(c + n, c_row, start ? start + n : NULL, start_row, pack_a, panel, m,
                         MIN(M, m + stretch), MIN(NR, N - n), K);
        }
    }
}

/* The definition, against which matmul is tested; ALIGN_KERNEL=plain runs everything on it. */
static void matmul_plain(float *c, size_t c_row, const float *start, size_t start_row,
                         struct Matrix a, struct Matrix b, size_t M, size_t N, size_t K) {
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            double sum = start ? start[i * start_row + j] : 0;
            for (size_t k = 0; k < K; k++)
                sum += (double)a.data[i * a.row + k * a.column] * b.data[k * b.row + j * b.column];
            c[i * c_row + j] = (float)sum;
        }
}

/* matmul -- C (M,N) = start + A (M,K) B (K,N); C's rows are c_row apart, start's start_row: 0
 * adds one row, a bias, to all; start = c adds to C; NULL is zero. Inside a parallel loop it
 * runs on the calling thread alone. By hand: [1 2; 3 4] [5; 6] = [17; 39].  test: matmul,
 * matmul_threads */
static void matmul(float *c, size_t c_row, const float *start, size_t start_row, struct Matrix a,
                   struct Matrix b, size_t M, size_t N, size_t K) {
    if (!kernel || K == 0) {
        matmul_plain(c, c_row, start, start_row, a, b, M, N, K);
        return;
    }
    float *pack_a =
        thread_scratch(SCRATCH_A, (MIN(M, (size_t)BLOCK_ROWS) + kernel->MR) * MIN(K, (size_t)KC));
    for (size_t m = 0; m < M; m += BLOCK_ROWS)
        for (size_t k = 0; k < K; k += KC) {
            struct Matrix a_block = {a.data + m * a.row + k * a.column, a.row, a.column};
            struct Matrix b_block = {b.data + k * b.row, b.row, b.column};
            float *block = c + m * c_row;
            const float *from = k > 0 ? block : start ? start + m * start_row : NULL;
            matmul_block(block, c_row, from, k > 0 ? c_row : start_row, a_block, b_block,
                         MIN(M - m, (size_t)BLOCK_ROWS), N, MIN(K - k, (size_t)KC), pack_a);
        }
}

/* =============================================================================================
 * Chapter 10 - Layers, forward and backward
 *
 * What does each layer compute, and how does blame flow back through it? A layer is a function y =
 * f(x, w). Its backward pass is given dy, the derivative of the loss by y, and must return the
 * derivatives by x and by the weights: the chain rule, one layer at a time, from the loss back to
 * the embedding. A forward pass stands beside its backward.
 *
 *     linear        y = x W + b             dx = dy W^T,  dW += x^T dy,  db += the sum of dy's rows
 *     layer norm    y = (x - mean) / std    what moved the mean and the deviation is subtracted
 *     gelu          y = x sigmoid(2u)       a soft switch: lets x pass where it is positive
 *     attention     y = softmax(q k) v      the only layer that mixes information across time
 *
 * One rule for all: dx is written (where a layer adds to it, the comment says so); the gradient of
 * weights is added to, so that several micro-batches accumulate into one step.
 *
 * What enters: activations (N,C), a row for each token of a batch. What leaves: the same shape.
 * ============================================================================================= */

/* A tensor: a named array of floats, up to two dimensions. One declaration gives its shape and
 * its name in a checkpoint; weights w, gradients d, AdamW's moments m, v follow. d, m, v are
 * NULL while nothing trains, and in a tensor frozen while others do: a backward pass skips it. */
struct Tensor {
    char name[64];
    size_t shape[2], ndim, n; /* n = product of the shape */
    /* weight decay applies: matrices yes, biases and layer norms no; its numbers came from a
     * file */
    bool decay, loaded;
    bool bits; /* no numbers to look at: any bits may stand in place of floats */
    float *w, *d, *m, *v;
};

/* out[r] = x . y_r, r < rows <= 4, the rows y_r y_row apart: four sums under way at once, where
 * one would wait for itself. */
WIDE static void row_dot_4(float *out, const float *x, const float *y, size_t y_row, size_t n,
                           size_t rows) {
    for (size_t r = 0; rows < 4 && r < rows; r++)
        out[r] = row_dot(x, y + r * y_row, n);
    if (rows < 4)
        return;
    float lane[4][LANES] = {{0}};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++)
            for (size_t r = 0; r < 4; r++)
                lane[r][j] += x[i + j] * y[r * y_row + i + j];
    for (; i < n; i++)
        for (size_t r = 0; r < 4; r++)
            lane[r][0] += x[i] * y[r * y_row + i];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; r++)
        out[r] = lane_sum(lane[r]);
}

enum { FEW_ROWS = 16, STRIP = 64 }; /* STRIP: columns whose sums over the rows one thread makes */

/* linear: y (N,out) = x (N,in) W (in,out) + bias (out). GPT-2's Conv1D: W as [in,out], not
 * torch's [out,in]. A row of y has the same bits however many rows are beside it, so a text's
 * score does not depend on its batch.  test: rows_company, reward_company */
static void linear_forward(float *y, const float *x, const float *weight, const float *bias,
                           size_t N, size_t in, size_t out) {
    if (N > FEW_ROWS || !kernel) {
        matmul(y, out, bias, 0, matrix(x, in), matrix(weight, out), N, out, in);
        return;
    }
    /* one row: the longest stretches */
    size_t threads = (size_t)omp_get_max_threads();
    size_t strip = N > 1 ? 384 : (out / threads + 15) / 16 * 16 + 16;
#pragma omp parallel for schedule(static) if (N * in * out > 50000)
    for (size_t j = 0; j < out; j += strip)
        kernel->few_rows(y + j, x, weight + j, bias + j, N, in, out, MIN(strip, out - j));
}

/* Adds the sum of the rows of dy (N,out), columns j0..j1, to dbias. */
static void bias_backward_strip(float *dbias, const float *dy, size_t N, size_t out, size_t j0,
                                size_t j1) {
    for (size_t n = 0; n < N; n++)
        for (size_t j = j0; j < j1; j++)
            dbias[j] += dy[n * out + j];
}

/* dx = dy W^T;  dW += x^T dy;  dbias += sum of dy's rows. NULL: dx where nothing below learns,
 * dW and dbias if frozen. */
static void linear_backward(float *dx, float *dweight, float *dbias, const float *dy,
                            const float *x, const float *weight, size_t N, size_t in, size_t out) {
    if (dx)
        matmul(dx, in, NULL, 0, matrix(dy, out), transposed(weight, out), N, in, out);
    if (dweight)
        matmul(dweight, out, dweight, out, transposed(x, in), matrix(dy, out), in, out, N);
    if (!dbias)
        return;
#pragma omp parallel for if (N * out > 50000)
    for (size_t j = 0; j < out; j += STRIP)
        bias_backward_strip(dbias, dy, N, out, j, MIN(out, j + STRIP));
}

/* layernorm: y = (x - mean) * rstd * weight + bias, row by row, rstd = 1/sqrt(variance + eps) [3].
 * mean, rstd (N) are kept for the backward pass. Why: without it, activations grow layer by layer.
 * By hand: x = (1, 3): mean 2, variance 1 -> (-1, 1).                          test: layernorm */
WIDE static void layernorm_row(float *y, float *mean, float *rstd, const float *x,
                               const float *weight, const float *bias, size_t C, float eps) {
    float m = row_sum(x, C) / (float)C;
    for (size_t c = 0; c < C; c++)
        y[c] = x[c] - m;
    float r = 1.0f / sqrtf(row_dot(y, y, C) / (float)C + eps);
    for (size_t c = 0; c < C; c++)
        y[c] = y[c] * r * weight[c] + bias[c];
    *mean = m;
    *rstd = r;
}

static void layernorm_forward(float *y, float *mean, float *rstd, const float *x,
                              const float *weight, const float *bias, size_t N, size_t C,
                              float eps) {
#pragma omp parallel for if (N * C > 20000)
    for (size_t n = 0; n < N; n++)
        layernorm_row(y + n * C, mean + n, rstd + n, x + n * C, weight, bias, C, eps);
}

/* With h = (x - mean) * rstd, g = dy * weight:  dx = rstd * (g - mean(g) - h * mean(g h)).
 * The two means are there because x moved the mean and the variance too. dx is ADDED to. */
WIDE static void layernorm_backward_row(float *dx, const float *dy, const float *x, float mean,
                                        float rstd, const float *weight, size_t C, float *g) {
    float *gh = g + C;
    for (size_t c = 0; c < C; c++) {
        g[c] = dy[c] * weight[c];
        gh[c] = g[c] * ((x[c] - mean) * rstd);
    }
    float mean_g = row_sum(g, C) / (float)C;
    float mean_gh = row_sum(gh, C) / (float)C;
    for (size_t c = 0; c < C; c++)
        dx[c] += rstd * (g[c] - mean_g - (x[c] - mean) * rstd * mean_gh);
}

static void layernorm_backward_strip(float *dweight, float *dbias, const float *dy, const float *x,
                                     const float *mean, const float *rstd, size_t N, size_t C,
                                     size_t c0, size_t c1) {
    for (size_t n = 0; n < N; n++)
        for (size_t c = c0; c < c1; c++) {
            dweight[c] += dy[n * C + c] * (x[n * C + c] - mean[n]) * rstd[n];
            dbias[c] += dy[n * C + c];
        }
}

static void layernorm_backward(float *dx, float *dweight, float *dbias, const float *dy,
                               const float *x, const float *mean, const float *rstd,
                               const float *weight, size_t N, size_t C) {
#pragma omp parallel for if (N * C > 20000)
    for (size_t n = 0; n < N; n++)
        layernorm_backward_row(dx + n * C, dy + n * C, x + n * C, mean[n], rstd[n], weight, C,
                               thread_scratch(SCRATCH_ROW, 2 * C));
    if (!dweight)
        return;
#pragma omp parallel for if (N * C > 20000)
    for (size_t c = 0; c < C; c += STRIP)
        layernorm_backward_strip(dweight, dbias, dy, x, mean, rstd, N, C, c, MIN(C, c + STRIP));
}

/* gelu, the tanh form that GPT-2 was trained with ("gelu_new") [18]:
 *   y = x/2 (1 + tanh(u)),  u = sqrt(2/pi) (x + 0.044715 x^3)
 * and because (1 + tanh u)/2 = sigmoid(2u), it is x * sigmoid(2u): one exponential.
 * By hand: 0 -> 0; large x -> x; -1 -> -0.1588.                                    test: gelu */
static inline float gelu_gate(float x) {
    float u2 = 1.5957691f * (x + 0.044715f * x * x * x);
    return 1.0f / (1.0f + exp_fast(-u2));
}

WIDE static void gelu_row(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * gelu_gate(x[i]);
}

/* y = x s, s = sigmoid(2u):  dy/dx = s + x s (1 - s) d(2u)/dx. dx comes in as dy, and is
 * multiplied by it. */
WIDE static void gelu_backward_row(float *dx, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float s = gelu_gate(x[i]);
        float slope = 1.5957691f * (1.0f + 3.0f * 0.044715f * x[i] * x[i]);
        dx[i] *= s + x[i] * s * (1.0f - s) * slope;
    }
}

static void gelu_forward(float *y, const float *x, size_t N, size_t C) {
#pragma omp parallel for if (N * C > 10000)
    for (size_t n = 0; n < N; n++)
        gelu_row(y + n * C, x + n * C, C);
}

static void gelu_backward(float *dx, const float *x, size_t N, size_t C) {
#pragma omp parallel for if (N * C > 10000)
    for (size_t n = 0; n < N; n++)
        gelu_backward_row(dx + n * C, x + n * C, C);
}

/* embedding: x (N,C) = wte[id] + wpe[position]: what the token is, and where it stands. */
static void embedding_forward(float *x, const struct Batch *batch, const float *wte,
                              const float *wpe, size_t C) {
#pragma omp parallel for if (batch->N * C > 50000)
    for (size_t n = 0; n < batch->N; n++)
        for (size_t c = 0; c < C; c++)
            x[n * C + c] =
                wte[(size_t)batch->ids[n] * C + c] + wpe[(size_t)batch->position[n] * C + c];
}

static void embedding_backward_strip(float *dwte, float *dwpe, const float *dx,
                                     const struct Batch *batch, size_t C, size_t c0, size_t c1) {
    for (size_t n = 0; n < batch->N; n++)
        for (size_t c = c0; c < c1; c++) {
            dwte[(size_t)batch->ids[n] * C + c] += dx[n * C + c];
            dwpe[(size_t)batch->position[n] * C + c] += dx[n * C + c];
        }
}

/* A token that stands in several places gets the sum of its gradients: rows in order, one thread
 * a strip. */
static void embedding_backward(float *dwte, float *dwpe, const float *dx, const struct Batch *batch,
                               size_t C) {
#pragma omp parallel for if (batch->N * C > 50000)
    for (size_t c = 0; c < C; c += STRIP)
        embedding_backward_strip(dwte, dwpe, dx, batch, C, c, MIN(C, c + STRIP));
}

/* attention -- causal multi-head self-attention [2], each sequence by itself.
 * in   qkv (N,3C): a row holds query, key and value of one token, NH heads of HS numbers each
 * out  out (N,C);  lse (N,NH): log sum_j e^(score_j), all that the backward pass needs to keep
 *   score_tj = q_t . k_j / sqrt(HS) for j <= t;  p_t = softmax(score_t);  out_t = sum_j p_tj v_j
 * A token looks back, never forward: that makes it a language model. The (T,T) matrix of p is
 * made ATTENTION_ROWS rows at a time, again in the backward pass [17]: memory grows with T, not
 * T^2.  test: attention, attention_gradient */
enum { ATTENTION_ROWS = 64 };

/* rows from fork on do not see shared .. fork-1 */
struct AttentionShape {
    size_t C, NH, HS;
    float scale;
    size_t shared, fork;
};

static struct AttentionShape attention_shape(size_t C, size_t NH) {
    return (struct AttentionShape){C, NH, C / NH, 1 / sqrtf((float)(C / NH)), 0, 0};
}

/* Scores of rows t0..t1 against keys 0..t1, scaled: p (t1-t0, t1). qkv points at this sequence
 * and head. */
static void attention_scores(float *p, const float *qkv, struct AttentionShape s, size_t t0,
                             size_t t1) {
    struct Matrix q = matrix(qkv + t0 * 3 * s.C, 3 * s.C);
    struct Matrix k_transposed = transposed(qkv + s.C, 3 * s.C);
    matmul(p, t1, NULL, 0, q, k_transposed, t1 - t0, t1, s.HS);
    for (size_t i = 0; i < (t1 - t0) * t1; i++)
        p[i] *= s.scale;
    for (size_t t = MAX(t0, s.fork); t < t1; t++)
        for (size_t j = s.shared; j < s.fork; j++)
            p[(t - t0) * t1 + j] = -INFINITY;
}

static void attention_forward_head(float *out, float *lse, const float *qkv,
                                   struct AttentionShape s, size_t T) {
    float *p = thread_scratch(SCRATCH_SCORES, ATTENTION_ROWS * T);
    for (size_t t0 = 0; t0 < T; t0 += ATTENTION_ROWS) {
        size_t t1 = MIN(T, t0 + ATTENTION_ROWS);
        attention_scores(p, qkv, s, t0, t1);
        for (size_t t = t0; t < t1; t++) {
            float *p_t = p + (t - t0) * t1;
            lse[t * s.NH] = softmax(p_t, t + 1);
            for (size_t j = t + 1; j < t1; j++)
                p_t[j] = 0; /* the future */
        }
        matmul(out + t0 * s.C, s.C, NULL, 0, matrix(p, t1), matrix(qkv + 2 * s.C, 3 * s.C), t1 - t0,
               s.HS, t1);
    }
}

static void attention_forward(float *out, float *lse, const float *qkv, const struct Batch *batch,
                              struct AttentionShape s) {
#pragma omp parallel for schedule(dynamic) firstprivate(s)
    for (size_t task = 0; task < batch->B * s.NH; task++) {
        size_t b = task / s.NH;
        size_t h = task % s.NH;
        size_t start = batch->start[b];
        if (batch->fork)
            s.shared = batch->shared[b], s.fork = batch->fork[b];
        attention_forward_head(out + start * s.C + h * s.HS, lse + start * s.NH + h,
                               qkv + start * 3 * s.C + h * s.HS, s, batch->start[b + 1] - start);
    }
}

/* out = P V and P = softmax(S), so, with row sums D_t = sum_c dout_tc out_tc = sum_j P_tj dP_tj:
 *   dV += P^T dout,   dP = dout V^T,   dS = P * (dP - D),   dQ = scale dS K,   dK += scale dS^T Q
 */
static void attention_backward_head(float *dqkv, const float *dout, const float *out,
                                    const float *lse, const float *qkv, struct AttentionShape s,
                                    size_t T) {
    size_t C3 = 3 * s.C;
    float *p = thread_scratch(SCRATCH_SCORES, 2 * ATTENTION_ROWS * T);
    float *dp = p + ATTENTION_ROWS * T;
    struct Matrix k = matrix(qkv + s.C, C3);
    struct Matrix v_transposed = transposed(qkv + 2 * s.C, C3);
    for (size_t t = 0; t < T; t++)
        for (size_t c = 0; c < s.HS; c++)
            dqkv[t * C3 + s.C + c] = dqkv[t * C3 + 2 * s.C + c] = 0;
    for (size_t t0 = 0; t0 < T; t0 += ATTENTION_ROWS) {
        size_t t1 = MIN(T, t0 + ATTENTION_ROWS);
        size_t rows = t1 - t0;
        attention_scores(p, qkv, s, t0, t1);
        matmul(dp, t1, NULL, 0, matrix(dout + t0 * s.C, s.C), v_transposed, rows, t1, s.HS);
        for (size_t t = t0; t < t1; t++) {
            float *p_t = p + (t - t0) * t1;
            float *dp_t = dp + (t - t0) * t1;
            float D = 0;
            for (size_t c = 0; c < s.HS; c++)
                D += dout[t * s.C + c] * out[t * s.C + c];
            for (size_t j = 0; j <= t; j++)
                p_t[j] = exp_fast(p_t[j] - lse[t * s.NH]);
            for (size_t j = 0; j <= t; j++)
                dp_t[j] = p_t[j] * (dp_t[j] - D) * s.scale;
            for (size_t j = t + 1; j < t1; j++)
                p_t[j] = dp_t[j] = 0;
        }
        matmul(dqkv + t0 * C3, C3, NULL, 0, matrix(dp, t1), k, rows, s.HS, t1);
        matmul(dqkv + s.C, C3, dqkv + s.C, C3, transposed(dp, t1), matrix(qkv + t0 * C3, C3), t1,
               s.HS, rows);
        matmul(dqkv + 2 * s.C, C3, dqkv + 2 * s.C, C3, transposed(p, t1),
               matrix(dout + t0 * s.C, s.C), t1, s.HS, rows);
    }
}

static void attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, const struct Batch *batch,
                               struct AttentionShape s) {
#pragma omp parallel for schedule(dynamic) firstprivate(s)
    for (size_t task = 0; task < batch->B * s.NH; task++) {
        size_t b = task / s.NH;
        size_t h = task % s.NH;
        size_t start = batch->start[b];
        size_t at = start * s.C + h * s.HS;
        if (batch->fork)
            s.shared = batch->shared[b], s.fork = batch->fork[b];
        attention_backward_head(dqkv + start * 3 * s.C + h * s.HS, dout + at, out + at,
                                lse + start * s.NH + h, qkv + start * 3 * s.C + h * s.HS, s,
                                batch->start[b + 1] - start);
    }
}

/* Keys and values of past tokens, kept while a text is written: a new token costs one row of
 * work (chapter 13). */
struct KVCache {
    size_t B, capacity; /* sequences; positions of each */
    float *k, *v; /* (L, B, capacity, C) */
    size_t *length; /* (B) positions filled */
};

/* One new token's query, head h, against the n cached positions of its sequence. */
WIDE static void attention_cached_head(float *out, const float *q, const float *k, const float *v,
                                       struct AttentionShape s, size_t n) {
    float *p = thread_scratch(SCRATCH_SCORES, n);
    for (size_t j = 0; j < n; j += 4)
        row_dot_4(p + j, q, k + j * s.C, s.C, s.HS, MIN((size_t)4, n - j));
    for (size_t j = 0; j < n; j++)
        p[j] *= s.scale;
    softmax(p, n);
    for (size_t c = 0; c < s.HS; c++)
        out[c] = 0;
    for (size_t j = 0; j < n; j++)
        for (size_t c = 0; c < s.HS; c++)
            out[c] += p[j] * v[j * s.C + c];
}

/* Stores the keys and values of a decoding batch, then attends. */
static void attention_cached(float *out, const float *qkv, const struct Batch *batch, size_t layer,
                             struct AttentionShape s) {
    struct KVCache *cache = batch->cache;
    for (size_t n = 0; n < batch->N; n++) {
        cache->length[batch->slot[n]] = (size_t)batch->position[n] + 1;
        size_t at =
            ((layer * cache->B + batch->slot[n]) * cache->capacity + (size_t)batch->position[n])
            * s.C;
        memcpy(cache->k + at, qkv + n * 3 * s.C + s.C, s.C * sizeof(float));
        memcpy(cache->v + at, qkv + n * 3 * s.C + 2 * s.C, s.C * sizeof(float));
    }
#pragma omp parallel for if (batch->N * s.NH > 16)
    for (size_t task = 0; task < batch->N * s.NH; task++) {
        size_t n = task / s.NH;
        size_t h = task % s.NH;
        size_t at = (layer * cache->B + batch->slot[n]) * cache->capacity * s.C + h * s.HS;
        attention_cached_head(out + n * s.C + h * s.HS, qkv + n * 3 * s.C + h * s.HS, cache->k + at,
                              cache->v + at, s, (size_t)batch->position[n] + 1);
    }
}

/* =============================================================================================
 * Chapter 11 - GPT-2, its output layer and its heads
 *                      [glossary: Modelo de linguagem] [glossary: AutoModelForCausalLM]
 *
 * What is a language model, in one formula? Each token becomes a vector (what it is, plus where it
 * stands), and n_layer blocks each add something to that vector, the residual stream:
 *
 *     x = wte[id] + wpe[position]                                            (N,C)
 *     x = x + attention(ln_1(x))     look at earlier tokens                  n_layer times      [1]
 *     x = x + mlp(ln_2(x))           think about what was seen
 *     hidden = ln_f(x)                                                       (N,C)
 *     logits = hidden wte^T          how well each token fits                (rows that ask, V)
 *
 * The output layer is the embedding again ("tied"). So wte gets its gradient in two ways, and they
 * are added up in one tensor: from the output layer (lm_head_backward: how should the vector of a
 * token that was predicted, or ought to have been, change?) and from the input
 * (embedding_backward: how should the vector of a token that was read change?).
 *
 * Two more heads read the hidden vector as one number. The reward head reads a whole text at its
 * last token: how good was it? The value head reads every position: how good will it become?
 *
 * The structs repeat transformers' module names: model->h[3].mlp.c_fc.weight is the tensor
 * "transformer.h.3.mlp.c_fc.weight" of a checkpoint.
 * ============================================================================================= */

/* From Part IV. check_finite ends the program where `value`, which is named by `what`, is NaN or
 * infinite, and says which weight or activation broke first; check_numbers does so for n numbers
 * that came from a forward pass over `batch`; first_not_finite tells where the first one is. */
struct GPT2;
static void check_finite(const struct GPT2 *model, const char *what, double value);
static void check_numbers(const struct GPT2 *model, struct Arena *arena, const struct Batch *batch,
                          const char *what, const float *x, size_t n);
static size_t first_not_finite(const float *x, size_t n);

/* Heads stand beside the transformer: "transformer.", where a prefix ends in it, is no part of
 * their names. */
static bool tensor_is_head(const struct Tensor *t) {
    return strncmp(t->name, "score.", 6) == 0 || strncmp(t->name, "v_head.", 7) == 0;
}

struct GPT2Config {
    size_t vocab_size, n_positions, n_embd, n_layer, n_head;
    int eos_token_id; /* the end token: behind each text, and where writing stops */
    int pad_token_id;
    float layer_norm_epsilon;
    int bos_token_id; /* what an empty prompt starts from */
    struct Text pad_token; /* the padding token's name, if it is none of GPT-2's tokens */
};

/* lora: chapter 12; n = 0: no adapter here */
struct Linear {
    struct Tensor weight, bias, lora_A, lora_B;
    float lora_scale;
};
struct LayerNorm {
    struct Tensor weight, bias;
};
struct Block {
    struct LayerNorm ln_1;
    struct {
        struct Linear c_attn, c_proj;
    } attn;
    struct LayerNorm ln_2;
    struct {
        struct Linear c_fc, c_proj;
    } mlp;
};

/* What adapter_config.json says (chapter 12), in PEFT's names; r = 0: the model has no adapter. */
struct Adapter {
    size_t r;
    double lora_alpha, lora_dropout;
    const char *target_modules, *base_model_name_or_path;
    /* pattern: target_modules is a regular expression, not a list of names */
    bool use_rslora, pattern;
    bool partial; /* exclude_modules, layers_to_transform: not all these */
};

/* What the forward pass keeps of one block for the backward pass. */
struct BlockActivations {
    float *x; /* (N,C) what entered */
    float *ln_1, *ln_1_mean, *ln_1_rstd; /* (N,C) (N) (N) */
    float *qkv, *att, *lse; /* (N,3C) (N,C) (N,NH) */
    float *mid; /* (N,C) x + attention */
    float *ln_2, *ln_2_mean, *ln_2_rstd;
    float *fc, *gelu; /* (N,4C) before and after the activation */
};

struct Activations {
    const struct Batch *batch;
    size_t N;
    struct BlockActivations *h; /* (L), or one that all share when nothing is kept */
    float *x, *ln_f, *ln_f_mean, *ln_f_rstd; /* (N,C) out of the last block; hidden = ln_f (N,C) */
};

struct GPT2 {
    struct GPT2Config config;
    struct Tensor wte, wpe;
    struct Block *h; /* (n_layer) */
    struct LayerNorm ln_f;
    struct Tensor score; /* reward head; n = 0: the model has none */
    struct Linear v_head; /* value head; likewise */
    struct Adapter adapter;
    const char *folder; /* it, or its adapter, was read from; NULL: from none */
    struct Tensor **tensors; /* all of the above, in a checkpoint's order */
    size_t tensor_count;
    /* the last backward pass, for check_finite; N = 0, NULL: none */
    struct {
        const char *task;
        size_t step;
        struct Activations acts;
    } trace;
    struct Arena arena;
};

static void tensor_declare(struct GPT2 *model, struct Tensor *tensor, const char *name, size_t rows,
                           size_t columns) {
    *tensor = (struct Tensor){{0},
                              {rows, columns},
                              columns ? 2 : 1,
                              rows * MAX(columns, (size_t)1),
                              .decay = columns != 0};
    snprintf(tensor->name, sizeof tensor->name, "%s", name);
    tensor->w = arena_zeros(&model->arena, tensor->n, sizeof(float));
    model->tensors[model->tensor_count++] = tensor;
}

/* name.weight and name.bias: a linear layer (in,out) of zeros, or, with out = 0, a layer norm of
 * ones. */
static void module_declare(struct GPT2 *model, struct Tensor *weight, struct Tensor *bias,
                           const char *name, size_t in, size_t out) {
    tensor_declare(model, weight, arena_printf(&model->arena, "%s.weight", name), in, out);
    tensor_declare(model, bias, arena_printf(&model->arena, "%s.bias", name), out ? out : in, 0);
    for (size_t i = 0; out == 0 && i < in; i++)
        weight->w[i] = 1;
}

static struct GPT2 *gpt2_new(struct GPT2Config config) {
    struct GPT2 *model = calloc(1, sizeof *model);
    CHECK(model, "out of memory");
    model->config = config;
    size_t C = config.n_embd;
    model->h = arena_zeros(&model->arena, config.n_layer, sizeof *model->h);
    model->tensors = arena_alloc(&model->arena, 20 * config.n_layer + 8, sizeof *model->tensors);
    tensor_declare(model, &model->wte, "wte.weight", config.vocab_size, C);
    tensor_declare(model, &model->wpe, "wpe.weight", config.n_positions, C);
    for (size_t l = 0; l < config.n_layer; l++) {
        struct Block *h = &model->h[l];
#define IN_BLOCK(part) \
    &h->part.weight, &h->part.bias, arena_printf(&model->arena, "h.%zu." #part, l)
        module_declare(model, IN_BLOCK(ln_1), C, 0);
        module_declare(model, IN_BLOCK(attn.c_attn), C, 3 * C);
        module_declare(model, IN_BLOCK(attn.c_proj), C, C);
        module_declare(model, IN_BLOCK(ln_2), C, 0);
        module_declare(model, IN_BLOCK(mlp.c_fc), C, 4 * C);
        module_declare(model, IN_BLOCK(mlp.c_proj), 4 * C, C);
#undef IN_BLOCK
    }
    module_declare(model, &model->ln_f.weight, &model->ln_f.bias, "ln_f", C, 0);
    return model;
}

static void gpt2_free(struct GPT2 *model) {
    if (!model)
        return;
    arena_free(&model->arena);
    free(model);
}

static void tensor_normal(struct Tensor *tensor, struct Rng *rng, double std) {
    for (size_t i = 0; i < tensor->n; i++)
        tensor->w[i] = (float)(std * rng_normal(rng));
}

/* U(-1/sqrt(in), 1/sqrt(in)), in = inputs: how torch starts a Linear (Kaiming). */
static void tensor_uniform(struct Tensor *tensor, struct Rng *rng, size_t in) {
    double bound = 1 / sqrt((double)in);
    for (size_t i = 0; i < tensor->n; i++)
        tensor->w[i] = (float)(bound * (2 * rng_uniform(rng) - 1));
}

/* All the numbers of a model. */
static size_t gpt2_parameters(const struct GPT2 *model) {
    size_t n = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        n += model->tensors[i]->n;
    return n;
}

/* GPT-2's start: N(0, 0.02) for matrices; the two projections that write to the residual stream
 * scaled by 1/sqrt(2 n_layer), so that its variance does not grow with depth; biases 0 [1]. */
static void gpt2_init(struct GPT2 *model, uint64_t seed) {
    struct Rng rng = rng_seed(seed, STREAM_INIT);
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        if (t->ndim == 2)
            tensor_normal(t, &rng,
                          strstr(t->name, "c_proj.weight")
                              ? 0.02 / sqrt(2.0 * (double)model->config.n_layer)
                              : 0.02);
    }
}

/* Gradients and AdamW's moments, all zero. With an adapter only it and the heads have them: the
 * rest is frozen. */
static void gpt2_make_trainable(struct GPT2 *model) {
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        if (t->d || (model->adapter.r && !strstr(t->name, ".lora_") && !tensor_is_head(t)))
            continue;
        t->d = arena_zeros(&model->arena, t->n, sizeof(float));
        t->m = arena_zeros(&model->arena, t->n, sizeof(float));
        t->v = arena_zeros(&model->arena, t->n, sizeof(float));
    }
}

/* A second model with the same weights: the reference model.  [glossary: Modelo de referência] */
static struct GPT2 *gpt2_copy(const struct GPT2 *model) {
    struct GPT2 *copy = gpt2_new(model->config);
    for (size_t i = 0; i < copy->tensor_count; i++)
        memcpy(copy->tensors[i]->w, model->tensors[i]->w, copy->tensors[i]->n * sizeof(float));
    return copy;
}

static void residual_add(float *sum, const float *x, size_t n) {
#pragma omp parallel for if (n > 100000)
    for (size_t i = 0; i < n; i++)
        sum[i] += x[i];
}

static void lora_forward(float *y, const float *x, const struct Linear *linear, size_t N);
static void lora_backward(float *dx, const float *dy, const float *x, struct Linear *linear,
                          size_t N);

/* A linear layer of the model and, where it has one, its adapter (chapter 12). */
static void module_forward(float *y, const float *x, const struct Linear *linear, size_t N) {
    linear_forward(y, x, linear->weight.w, linear->bias.w, N, linear->weight.shape[0],
                   linear->weight.shape[1]);
    if (linear->lora_A.n)
        lora_forward(y, x, linear, N);
}

static void module_backward(float *dx, const float *dy, const float *x, struct Linear *linear,
                            size_t N) {
    linear_backward(dx, linear->weight.d, linear->bias.d, dy, x, linear->weight.w, N,
                    linear->weight.shape[0], linear->weight.shape[1]);
    if (linear->lora_A.n)
        lora_backward(dx, dy, x, linear, N);
}

/* A block: from a->x (N,C) to `out` (N,C), the next block's x. */
static void block_forward(const struct GPT2 *model, size_t layer, struct BlockActivations *a,
                          const struct Batch *batch, float *out) {
    const struct Block *h = &model->h[layer];
    size_t N = batch->N;
    size_t C = model->config.n_embd;
    struct AttentionShape shape = attention_shape(C, model->config.n_head);
    layernorm_forward(a->ln_1, a->ln_1_mean, a->ln_1_rstd, a->x, h->ln_1.weight.w, h->ln_1.bias.w,
                      N, C, model->config.layer_norm_epsilon);
    module_forward(a->qkv, a->ln_1, &h->attn.c_attn, N);
    if (batch->cache)
        attention_cached(a->att, a->qkv, batch, layer, shape);
    else
        attention_forward(a->att, a->lse, a->qkv, batch, shape);
    module_forward(a->mid, a->att, &h->attn.c_proj, N);
    residual_add(a->mid, a->x, N * C);
    layernorm_forward(a->ln_2, a->ln_2_mean, a->ln_2_rstd, a->mid, h->ln_2.weight.w, h->ln_2.bias.w,
                      N, C, model->config.layer_norm_epsilon);
    module_forward(a->fc, a->ln_2, &h->mlp.c_fc, N);
    gelu_forward(a->gelu, a->fc, N, 4 * C);
    module_forward(out, a->gelu, &h->mlp.c_proj, N);
    residual_add(out, a->mid, N * C);
}

/* dx (N,C) holds the derivative of the loss by the block's output and becomes that by its input.
 * What was mid + mlp(ln_2(mid)) sends dx to both summands: dx itself, plus what comes back
 * through the mlp. */
static void block_backward(struct GPT2 *model, struct Block *h, const struct BlockActivations *a,
                           const struct Batch *batch, float *dx, float *dwide, float *dnarrow) {
    size_t N = batch->N;
    size_t C = model->config.n_embd;
    module_backward(dwide, dx, a->gelu, &h->mlp.c_proj, N);
    gelu_backward(dwide, a->fc, N, 4 * C);
    module_backward(dnarrow, dwide, a->ln_2, &h->mlp.c_fc, N);
    layernorm_backward(dx, h->ln_2.weight.d, h->ln_2.bias.d, dnarrow, a->mid, a->ln_2_mean,
                       a->ln_2_rstd, h->ln_2.weight.w, N, C);
    module_backward(dnarrow, dx, a->att, &h->attn.c_proj, N);
    attention_backward(dwide, dnarrow, a->att, a->lse, a->qkv, batch,
                       attention_shape(C, model->config.n_head));
    module_backward(dnarrow, dwide, a->ln_1, &h->attn.c_attn, N);
    layernorm_backward(dx, h->ln_1.weight.d, h->ln_1.bias.d, dnarrow, a->x, a->ln_1_mean,
                       a->ln_1_rstd, h->ln_1.weight.w, N, C);
}

/* gpt2_forward -- hidden states of a batch, activations.ln_f (N,C); in decoding of the new
 * tokens alone. [glossary: Inferência] keep: all activations stay for gpt2_backward; else one
 * block's worth is reused.  test: gpt2_golden, fixtures */
static struct Activations gpt2_forward(const struct GPT2 *model, struct Arena *arena,
                                       const struct Batch *batch, bool keep) {
    const struct GPT2Config *c = &model->config;
    size_t N = batch->N;
    size_t C = c->n_embd;
    size_t L = c->n_layer;
    CHECK(batch->max_length <= c->n_positions,
          "a sequence of %zu tokens does not fit the model's %zu positions (n_positions)",
          batch->max_length, c->n_positions);
    struct Activations acts = {
        .batch = batch,
        .N = N,
        .h = arena_alloc(arena, L, sizeof *acts.h),
        .x = arena_floats(arena, N * C),
        .ln_f = arena_floats(arena, N * C),
        .ln_f_mean = arena_floats(arena, N),
        .ln_f_rstd = arena_floats(arena, N),
    };
    for (size_t l = 0; l < L; l++)
        acts.h[l] = l > 0 && !keep ? acts.h[0]
                                   : (struct BlockActivations){
                                         .x = arena_floats(arena, N * C),
                                         .mid = arena_floats(arena, N * C),
                                         .ln_1 = arena_floats(arena, N * C),
                                         .ln_1_mean = arena_floats(arena, N),
                                         .ln_1_rstd = arena_floats(arena, N),
                                         .qkv = arena_floats(arena, N * 3 * C),
                                         .att = arena_floats(arena, N * C),
                                         .lse = arena_floats(arena, N * c->n_head),
                                         .ln_2 = arena_floats(arena, N * C),
                                         .ln_2_mean = arena_floats(arena, N),
                                         .ln_2_rstd = arena_floats(arena, N),
                                         .fc = arena_floats(arena, N * 4 * C),
                                         .gelu = arena_floats(arena, N * 4 * C),
                                     };
    embedding_forward(acts.h[0].x, batch, model->wte.w, model->wpe.w, C);
    for (size_t l = 0; l < L; l++)
        block_forward(model, l, &acts.h[l], batch, l + 1 < L ? acts.h[l + 1].x : acts.x);
    layernorm_forward(acts.ln_f, acts.ln_f_mean, acts.ln_f_rstd, acts.x, model->ln_f.weight.w,
                      model->ln_f.bias.w, N, C, c->layer_norm_epsilon);
    return acts;
}

/* gpt2_backward -- adds to the gradient of every weight that is not frozen; dhidden (N,C) = d
 * loss / d acts->ln_f. */
static void gpt2_backward(struct GPT2 *model, struct Arena *arena, const struct Activations *acts,
                          const float *dhidden) {
    const struct Batch *batch = acts->batch;
    size_t N = batch->N;
    size_t C = model->config.n_embd;
    float *dx = arena_zeros(arena, N * C, sizeof *dx);
    float *dwide = arena_floats(arena, N * 4 * C);
    float *dnarrow = arena_floats(arena, N * C);
    layernorm_backward(dx, model->ln_f.weight.d, model->ln_f.bias.d, dhidden, acts->x,
                       acts->ln_f_mean, acts->ln_f_rstd, model->ln_f.weight.w, N, C);
    for (size_t l = model->config.n_layer; l-- > 0;)
        block_backward(model, &model->h[l], &acts->h[l], batch, dx, dwide, dnarrow);
    if (model->wte.d)
        embedding_backward(model->wte.d, model->wpe.d, dx, batch, C);
    model->trace.acts = *acts;
}

/* Logits (n,V) = hidden (n,C) wte^T: the output layer. As in linear_forward, a row has the same
 * bits in any company. */
static void output_logits(const struct GPT2 *model, float *logits, const float *hidden, size_t n) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    matmul(logits, V, NULL, 0, matrix(hidden, C), transposed(model->wte.w, C), n, V, C);
}

/* The same while texts are written. Few rows: dot products in 16 lanes, each row of wte read once,
 * where matmul would first have to transpose it (for one row of GPT-2, 2.5 times the time). The
 * lanes add in another order than matmul.                        test: few_rows, generate_company
 */
static void decode_logits(const struct GPT2 *model, float *logits, const float *hidden, size_t n) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    if (n > FEW_ROWS || !kernel) {
        output_logits(model, logits, hidden, n);
        return;
    }
#pragma omp parallel for schedule(static) if (n * V * C > 50000)
    for (size_t v = 0; v < V; v += 4)
        for (size_t i = 0; i < n; i++) {
            const float *w = model->wte.w + v * C;
            for (size_t next = i * 4 * C / n; n > 1 && next < (i + 1) * 4 * C / n; next += 16)
                __builtin_prefetch(w + 4 * C + next);
            row_dot_4(logits + i * V + v, hidden + i * C, w, C, C, MIN((size_t)4, V - v));
        }
}

/* The output layer, for chosen rows. logits (R,V) can be the largest array of all (1024 rows of
 * GPT-2 are 206 MB), so rows pass in chunks of LM_HEAD_FLOATS logits; a few numbers a row stay,
 * and of a single chunk the logits too.
 *   logit_v = hidden . wte_v / temperature;  logprob = logit_target - lse
 *   d logprob / d logit_v = [v = target] - p_v */
enum { LM_HEAD_FLOATS = 1 << 25 };

struct LMHead {
    size_t R, chunk; /* rows; rows a chunk */
    const int *row, *target; /* (R) */
    float temperature;
    float *hidden; /* (R,C) gathered */
    float *logits; /* (chunk,V) */
    size_t logits_first; /* first row of the chunk that logits holds; R: none */
    /* (R) of the target; of the distribution, in nats; log sum e^logit */
    float *logprob, *entropy, *lse;
    float *mean_logit, *hit; /* (R) over the vocabulary; 1 if the target is the argmax */
    struct Activations acts; /* what it stands on */
};

static struct LMHead lm_head_new(const struct GPT2 *model, struct Arena *arena,
                                 const struct Activations *acts, const int *row, const int *target,
                                 size_t R, float temperature) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    size_t chunk = MIN(R, MAX((size_t)1, (size_t)LM_HEAD_FLOATS / V));
    struct LMHead head = {
        .R = R,
        .chunk = chunk,
        .row = row,
        .target = target,
        .temperature = temperature,
        .logits_first = R,
        .acts = *acts,
        .hidden = arena_floats(arena, R * C),
        .logits = arena_floats(arena, chunk * V),
        .logprob = arena_floats(arena, R),
        .entropy = arena_floats(arena, R),
        .lse = arena_floats(arena, R),
        .mean_logit = arena_floats(arena, R),
        .hit = arena_floats(arena, R),
    };
    for (size_t r = 0; r < R; r++)
        memcpy(head.hidden + r * C, acts->ln_f + (size_t)row[r] * C, C * sizeof(float));
    return head;
}

/* Logits of the chunk of rows that starts at `first`; returns how many rows it has. */
static size_t lm_head_logits(const struct GPT2 *model, struct LMHead *head, size_t first) {
    size_t n = MIN(head->chunk, head->R - first);
    if (head->logits_first == first)
        return n;
    output_logits(model, head->logits, head->hidden + first * model->config.n_embd, n);
    float scale = 1 / head->temperature;
#pragma omp parallel for if (scale != 1)
    for (size_t i = 0; i < (scale == 1 ? 0 : n * model->config.vocab_size); i++)
        head->logits[i] *= scale;
    head->logits_first = first;
    return n;
}

static void lm_head_row(struct LMHead *head, size_t r, const float *logits, size_t V) {
    float *e = thread_scratch(SCRATCH_ROW, V);
    float largest = row_max(logits, V);
    float total = row_exp(e, logits, largest, V);
    float expected = row_dot(e, logits, V) / total; /* sum_v p_v logit_v */
    head->lse[r] = largest + logf(total);
    head->logprob[r] = logits[head->target[r]] - head->lse[r];
    head->entropy[r] = head->lse[r] - expected;
    head->mean_logit[r] = row_sum(logits, V) / (float)V;
    head->hit[r] =
        logits[head->target[r]] == largest && argmax(logits, V) == (size_t)head->target[r];
}

/* Turns a row of logits into d loss / d logits, given g = d loss / d logprob. */
WIDE static void lm_head_backward_row(float *logits, float lse, int target, float g, size_t V) {
    for (size_t v = 0; v < V; v++)
        logits[v] = -g * exp_fast(logits[v] - lse);
    logits[target] += g;
}

/* One chunk after the other, forward and backward or one of them. dlogprob (R): d loss / d
 * logprob of each row, NULL: no backward pass, which adds to dhidden (N,C) and to wte's
 * gradient. */
static void lm_head_passes(const struct GPT2 *model, struct LMHead *head, bool forward,
                           const float *dlogprob, float *dhidden, struct Arena *arena) {
    size_t V = model->config.vocab_size;
    size_t C = model->config.n_embd;
    size_t n;
    for (size_t first = 0; first < head->R; first += n) {
        n = lm_head_logits(model, head, first);
#pragma omp parallel for schedule(dynamic, 4) if (forward)
        for (size_t i = 0; i < (forward ? n : 0); i++)
            lm_head_row(head, first + i, head->logits + i * V, V);
        if (!dlogprob)
            continue;
        head->logits_first = head->R; /* overwritten now */
#pragma omp parallel for schedule(dynamic, 4)
        for (size_t i = 0; i < n; i++)
            lm_head_backward_row(head->logits + i * V, head->lse[first + i],
                                 head->target[first + i], dlogprob[first + i] / head->temperature,
                                 V);
        float *drows = arena_floats(arena, n * C);
        matmul(drows, C, NULL, 0, matrix(head->logits, V), matrix(model->wte.w, C), n, C, V);
        if (model->wte.d)
            matmul(model->wte.d, C, model->wte.d, C, transposed(head->logits, V),
                   matrix(head->hidden + first * C, C), V, C, n);
        for (size_t i = 0; i < n; i++)
            for (size_t c = 0; c < C; c++)
                dhidden[(size_t)head->row[first + i] * C + c] += drows[i * C + c];
    }
}

/* One pass alone, for losses that need all log-probabilities before they know a gradient (DPO,
 * PPO). */
static void lm_head_forward(const struct GPT2 *model, struct LMHead *head) {
    lm_head_passes(model, head, true, NULL, NULL, NULL);
}

static void lm_head_backward(struct GPT2 *model, struct LMHead *head, const float *dlogprob,
                             float *dhidden, struct Arena *arena) {
    lm_head_passes(model, head, false, dlogprob, dhidden, arena);
}

/* A batch judged by a model that is not trained on it: the log-probability of each target. */
static struct LMHead batch_logprobs(const struct GPT2 *model, struct Arena *arena,
                                    const struct Batch *batch, double temperature, bool keep) {
    struct Activations acts = gpt2_forward(model, arena, batch, keep);
    struct LMHead head =
        lm_head_new(model, arena, &acts, batch->row, batch->target, batch->R, (float)temperature);
    lm_head_forward(model, &head);
    if (!keep)
        check_numbers(model, arena, batch,
                      model->trace.task ? "a log-probability"
                                        : "a log-probability under the frozen model",
                      head.logprob, head.R);
    return head;
}

/* Both at once for the cross-entropy, -logprob of each target times `weight`.  [glossary: Função
 * de perda] */
static void lm_head_cross_entropy(struct GPT2 *model, struct LMHead *head, float weight,
                                  float *dhidden, struct Arena *arena) {
    float *dlogprob = arena_floats(arena, head->R);
    for (size_t r = 0; r < head->R; r++)
        dlogprob[r] = -weight;
    lm_head_passes(model, head, true, dlogprob, dhidden, arena);
}

/* Log-probabilities of n completions under a model: summed over the target rows of each. */
static void sum_target_logps(const struct Batch *batch, size_t n, const float *token_logprobs,
                             double *logps) {
    for (size_t b = 0; b < n; b++)
        logps[b] = sequence_logprob(token_logprobs + batch->target_start[b],
                                    batch->target_start[b + 1] - batch->target_start[b]);
}

/* The way back: dlogps (n), d loss / d log pi(y_i), times weight, to each token of y_i and on
 * into the gradients. */
static void target_logps_backward(struct GPT2 *model, struct Arena *arena,
                                  const struct Batch *batch, struct LMHead *head, size_t n,
                                  const double *dlogps, double weight) {
    float *dlogprob = arena_floats(arena, batch->R);
    float *dhidden = arena_zeros(arena, batch->N * model->config.n_embd, sizeof *dhidden);
    for (size_t i = 0; i < n; i++)
        for (size_t r = batch->target_start[i]; r < batch->target_start[i + 1]; r++)
            dlogprob[r] = (float)(dlogps[i] * weight);
    lm_head_backward(model, head, dlogprob, dhidden, arena);
    gpt2_backward(model, arena, &head->acts, dhidden);
}

/* score.weight (1,C), no bias: GPT2ForSequenceClassification with one label. */
static struct Tensor *reward_head_declare(struct GPT2 *model) {
    if (!model->score.n)
        tensor_declare(model, &model->score, "score.weight", 1, model->config.n_embd);
    return &model->score;
}

/* v_head.summary (1,C) and bias, as in TRL.  [glossary: AutoModelForCausalLMWithValueHead] */
static struct Linear *value_head_declare(struct GPT2 *model) {
    if (model->v_head.weight.n)
        return &model->v_head;
    tensor_declare(model, &model->v_head.weight, "v_head.summary.weight", 1, model->config.n_embd);
    tensor_declare(model, &model->v_head.bias, "v_head.summary.bias", 1, 0);
    return &model->v_head;
}

/* A value head for a model without one, as torch starts a Linear. */
static void value_head_init(struct GPT2 *model, uint64_t seed) {
    if (model->v_head.weight.n)
        return;
    struct Rng rng = rng_seed(seed, STREAM_INIT);
    struct Linear *head = value_head_declare(model);
    tensor_uniform(&head->weight, &rng, model->config.n_embd);
    tensor_uniform(&head->bias, &rng, model->config.n_embd);
}

/* scalar_head: out_r = hidden[row_r] . weight (+ bias), R rows of hidden (N,C). */
static void scalar_head_forward(float *out, const float *hidden, const int *row, size_t R,
                                const struct Tensor *weight, const struct Tensor *bias) {
    size_t C = weight->n;
    for (size_t r = 0; r < R; r++)
        out[r] = row_dot(hidden + (size_t)row[r] * C, weight->w, C) + (bias ? bias->w[0] : 0);
}

/* dhidden[row_r] += dout_r weight;  dweight += sum_r dout_r hidden[row_r];  dbias += sum_r dout_r.
 */
static void scalar_head_backward(float *dhidden, const float *dout, const float *hidden,
                                 const int *row, size_t R, struct Tensor *weight,
                                 struct Tensor *bias) {
    size_t C = weight->n;
    for (size_t r = 0; r < R; r++) {
        for (size_t c = 0; c < C; c++) {
            dhidden[(size_t)row[r] * C + c] += dout[r] * weight->w[c];
            if (weight->d)
                weight->d[c] += dout[r] * hidden[(size_t)row[r] * C + c];
        }
        if (bias && bias->d)
            bias->d[0] += dout[r];
    }
}

/* Where a text's reward is read: its last token that is not padding, which for GPT-2 is the end
 * token. */
static void reward_rows(const struct Batch *batch, int pad_token_id, int *row) {
    for (size_t b = 0; b < batch->B; b++) {
        size_t last = batch->start[b + 1] - 1;
        while (last > batch->start[b] && batch->ids[last] == pad_token_id)
            last--;
        row[b] = (int)last;
    }
}

/* =============================================================================================
 * Chapter 12 - LoRA                       [glossary: Adaptação de baixo rank (LoRA)]
 *
 * Must all weights be trained? What fine-tuning changes in a matrix W (in,out) has low rank [21],
 * so learn only such a change, two thin matrices beside a frozen one:
 *
 *     y = x W + bias + scale (x A^T) B^T        A (r,in), B (out,r), scale = lora_alpha / r
 *
 * Gradients and AdamW's moments then exist for r (in + out) numbers instead of in * out: GPT-2
 * with r = 16 on c_attn trains 589,824 numbers beside 124 million. B starts at zero, so training
 * starts from the unchanged model; and the model without its adapter is the reference of PPO and
 * DPO, so no second copy is needed. At the end W + scale A^T B^T is a matrix again (`align
 * merge`).
 *
 * What enters: a frozen model. What leaves: an adapter, in PEFT's names.
 * ============================================================================================= */

/* lora_forward -- adds the adapter's share to y (N,out), x (N,in):  u = scale x A^T (N,r);  y +=
 * u B^T. By hand: x = (1, 2), A = (3, 4), B = (5), alpha 2, r 1: u = 22, y grows by 110.  test:
 * lora_hand */
static void lora_forward(float *y, const float *x, const struct Linear *linear, size_t N) {
    size_t r = linear->lora_A.shape[0];
    size_t in = linear->lora_A.shape[1];
    size_t out = linear->lora_B.shape[0];
    float *u = thread_scratch(SCRATCH_ROW, N * r);
    matmul(u, r, NULL, 0, matrix(x, in), transposed(linear->lora_A.w, in), N, r, in);
    for (size_t i = 0; i < N * r; i++)
        u[i] *= linear->lora_scale;
    matmul(y, out, y, out, matrix(u, r), transposed(linear->lora_B.w, r), N, out, r);
}

/* u is made again: it is r numbers a row. With g = scale dy B (N,r), what comes back through B:
 *   dB += dy^T u;   dA += g^T x;   dx += g A                                   test: lora_gradient
 */
static void lora_backward(float *dx, const float *dy, const float *x, struct Linear *linear,
                          size_t N) {
    struct Tensor *A = &linear->lora_A;
    struct Tensor *B = &linear->lora_B;
    size_t r = A->shape[0];
    size_t in = A->shape[1];
    size_t out = B->shape[0];
    float *u = thread_scratch(SCRATCH_ROW, 2 * N * r);
    float *g = u + N * r;
    matmul(u, r, NULL, 0, matrix(x, in), transposed(A->w, in), N, r, in);
    matmul(g, r, NULL, 0, matrix(dy, out), matrix(B->w, r), N, r, out);
    for (size_t i = 0; i < 2 * N * r; i++)
        u[i] *= linear->lora_scale;
    matmul(B->d, r, B->d, r, transposed(dy, out), matrix(u, r), out, r, N);
    matmul(A->d, in, A->d, in, transposed(g, r), matrix(x, in), r, in, N);
    matmul(dx, in, dx, in, matrix(g, r), matrix(A->w, in), N, in, r);
}

/* One of a list of names, separated by spaces or commas; returns its length, 0 at the end. */
static size_t next_name(const char **list) {
    *list += strspn(*list, " ,");
    return strcspn(*list, " ,");
}

/* PEFT's rule: a target takes each module whose dotted name is the target or ends in "." and the
 * target. By hand: "c_proj" takes h.0.attn.c_proj and h.0.mlp.c_proj, "mlp.c_proj" the second,
 * "proj" none.  test: lora_targets */
static bool lora_is_target(const char *module, const char *targets) {
    size_t length = strlen(module);
    for (size_t n; (n = next_name(&targets)) > 0; targets += n)
        if (n <= length && strncmp(module + length - n, targets, n) == 0
            && (n == length || module[length - n - 1] == '.'))
            return true;
    return false;
}

/* The linear layers that an adapter can be put to, 4 n_layer of them. */
static struct Linear *adaptable(const struct GPT2 *model, size_t i) {
    struct Block *h = &model->h[i / 4];
    struct Linear *const four[] = {&h->attn.c_attn, &h->attn.c_proj, &h->mlp.c_fc, &h->mlp.c_proj};
    return four[i % 4];
}

/* "h.0.attn.c_attn.weight" -> "transformer.h.0.attn.c_attn": the module's name in transformers. */
static const char *module_name(struct Arena *arena, const struct Linear *linear) {
    return arena_printf(arena, "transformer.%.*s",
                        (int)(strlen(linear->weight.name) - strlen(".weight")),
                        linear->weight.name);
}

/* Puts an adapter of zeros to a layer. rslora divides by sqrt(r): so the gradient keeps its size
 * at any r [22]. */
static void lora_declare(struct GPT2 *model, struct Linear *linear) {
    const struct Adapter *adapter = &model->adapter;
    const char *name = module_name(&model->arena, linear) + strlen("transformer.");
    tensor_declare(model, &linear->lora_A, arena_printf(&model->arena, "%s.lora_A.weight", name),
                   adapter->r, linear->weight.shape[0]);
    tensor_declare(model, &linear->lora_B, arena_printf(&model->arena, "%s.lora_B.weight", name),
                   linear->weight.shape[1], adapter->r);
    linear->lora_scale =
        (float)(adapter->lora_alpha
                / (adapter->use_rslora ? sqrt((double)adapter->r) : (double)adapter->r));
}

/* adapter_new -- as PEFT: A as torch starts a Linear, B zero.  test: lora_start */
static void adapter_new(struct GPT2 *model, struct Adapter adapter, uint64_t seed) {
    struct Rng rng = rng_seed(seed, STREAM_INIT + 200);
    if (strcmp(adapter.target_modules, "all-linear") == 0)
        adapter.target_modules = "c_attn c_fc c_proj";
    model->adapter = adapter;
    size_t before = model->tensor_count;
    for (size_t i = 0; i < 4 * model->config.n_layer; i++) {
        struct Linear *linear = adaptable(model, i);
        if (!lora_is_target(module_name(&model->arena, linear), adapter.target_modules))
            continue;
        lora_declare(model, linear);
        tensor_uniform(&linear->lora_A, &rng, linear->weight.shape[0]);
    }
    CHECK(model->tensor_count > before,
          "--lora_target_modules \"%s\": no linear layer of the model has such a name; there are "
          "c_attn, c_proj and c_fc "
          "(attn.c_proj, mlp.c_proj; all-linear: all)",
          adapter.target_modules);
}

/* adapter_merge -- W += scale A^T B^T: the adapter folded into its base, the same model up to
 * rounding. test: lora_merge */
static void adapter_merge(struct GPT2 *model) {
    size_t kept = 0;
    for (size_t i = 0; i < 4 * model->config.n_layer; i++) {
        struct Linear *linear = adaptable(model, i);
        struct Tensor *W = &linear->weight;
        struct Tensor *A = &linear->lora_A;
        struct Tensor *B = &linear->lora_B;
        size_t in = W->shape[0];
        size_t out = W->shape[1];
        size_t r = model->adapter.r;
        for (size_t k = 0; k < B->n; k++)
            B->w[k] *= linear->lora_scale;
        if (A->n)
            matmul(W->w, out, W->w, out, transposed(A->w, in), transposed(B->w, r), in, out, r);
        A->n = B->n = 0;
    }
    for (size_t i = 0; i < model->tensor_count; i++)
        if (model->tensors[i]->n)
            model->tensors[kept++] = model->tensors[i];
    model->tensor_count = kept;
    model->adapter.r = 0;
}

/* adapter_reference -- the start model, to measure the trained one against: the same tensors,
 * without adapters, or, to go on with an adapter (`frozen`), with a copy of it (TRL 1.16).
 * [glossary: Modelo de referência]  test: lora_reference */
static struct GPT2 *adapter_reference(const struct GPT2 *model, bool frozen) {
    struct GPT2 *ref = malloc(sizeof *ref);
    CHECK(ref, "out of memory");
    *ref = *model;
    ref->arena = (struct Arena){0};
    ref->tensor_count = 0; /* it owns nothing that could be trained or saved */
    ref->h = memcpy(arena_alloc(&ref->arena, model->config.n_layer, sizeof *ref->h), model->h,
                    model->config.n_layer * sizeof *ref->h);
    for (size_t i = 0; i < 4 * model->config.n_layer; i++) {
        struct Linear *linear = adaptable(ref, i);
        struct Tensor *pair[] = {&linear->lora_A, &linear->lora_B};
        for (int k = 0; k < 2; k++) {
            if (!frozen)
                pair[k]->n = 0;
            if (pair[k]->n)
                pair[k]->w = memcpy(arena_floats(&ref->arena, pair[k]->n), pair[k]->w,
                                    pair[k]->n * sizeof(float));
        }
    }
    return ref;
}

/* =============================================================================================
 * Chapter 13 - Writing: KV cache, sampling, beam search
 *                                               [glossary: Inferência] [glossary: Amostragem]
 *
 * How does a model that only ever predicts one token write a text? One token at a time: predict,
 * choose (chapter 6), append, predict again. To predict, attention needs the keys and values of
 * all earlier tokens; they are kept (the KV cache), so a new token costs one row of work instead
 * of a whole pass. Prompts of different lengths advance together; a sequence that has ended drops
 * out.
 *
 * Beam search looks for a whole sequence that is probable, instead of choosing greedily at each
 * step.
 *
 * What enters: prompts. What leaves: sequences, each up to and including its end token.
 * ============================================================================================= */

static struct GenerationConfig generation_config(void) {
    return (struct GenerationConfig){
        .max_new_tokens = 20,
        .top_k = 50,
        .num_return_sequences = 1,
        .num_beams = 1,
        .temperature = 1,
        .top_p = 1,
        .repetition_penalty = 1,
        .length_penalty = 1,
    };
}

static struct KVCache kv_cache_new(const struct GPT2 *model, struct Arena *arena, size_t B,
                                   size_t capacity) {
    size_t floats = model->config.n_layer * B * capacity * model->config.n_embd;
    return (struct KVCache){B, capacity, arena_floats(arena, floats), arena_floats(arena, floats),
                            arena_zeros(arena, B, sizeof(size_t))};
}

/* Sequence `slot` of a cache becomes a copy of sequence `from_slot` of another. */
static void kv_cache_copy(const struct GPT2 *model, struct KVCache *cache, size_t slot,
                          const struct KVCache *from, size_t from_slot) {
    size_t row = cache->capacity * model->config.n_embd;
    size_t used = from->length[from_slot] * model->config.n_embd;
    for (size_t l = 0; l < model->config.n_layer; l++) {
        memcpy(cache->k + (l * cache->B + slot) * row, from->k + (l * from->B + from_slot) * row,
               used * sizeof(float));
        memcpy(cache->v + (l * cache->B + slot) * row, from->v + (l * from->B + from_slot) * row,
               used * sizeof(float));
    }
    cache->length[slot] = from->length[from_slot];
}

/* A sequence being written: prompt, then what was generated. */
struct Sequence {
    int *ids;
    size_t n, prompt_length, max_length, slot; /* slot: its place in the KV cache */
    float score; /* of a beam: the log-probability of what was generated */
    bool finished;
    struct Rng rng;
};

static void sequence_extend(struct Sequence *s, float *logits, size_t V,
                            const struct GenerationConfig *config, int end_token) {
    process_logits(logits, V, config, s->ids, s->n, s->n - s->prompt_length, end_token);
    int id = config->do_sample ? sample_token(logits, V, &s->rng) : (int)argmax(logits, V);
    s->ids[s->n++] = id;
    s->finished = id == end_token || s->n >= s->max_length;
}

/* The rows that the next pass of the model needs: a sequence's prompt at first, its newest token
 * later. */
static struct Batch decode_batch(struct Arena *arena, struct Sequence **active, size_t count,
                                 struct KVCache *cache) {
    size_t N = 0;
    for (size_t i = 0; i < count; i++)
        N += active[i]->n - cache->length[active[i]->slot];
    struct Batch batch = batch_new(arena, count, N);
    batch.cache = cache;
    batch.slot = arena_alloc(arena, N, sizeof *batch.slot);
    for (size_t i = 0; i < count; i++) {
        batch_append(&batch, active[i]->ids, cache->length[active[i]->slot], active[i]->n);
        batch.start[i + 1] = batch.N;
        for (size_t n = batch.start[i]; n < batch.N; n++)
            batch.slot[n] = active[i]->slot;
    }
    return batch;
}

/* The logits (count,V) that the next token of each active sequence comes from. */
static float *generate_step(const struct GPT2 *model, struct Arena *arena, struct Sequence **active,
                            size_t count, struct KVCache *cache) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    struct Batch batch = decode_batch(arena, active, count, cache);
    float *hidden = gpt2_forward(model, arena, &batch, false).ln_f;
    float *last = arena_floats(arena, count * C);
    float *logits = arena_floats(arena, count * V);
    for (size_t i = 0; i < count; i++)
        memcpy(last + i * C, hidden + (batch.start[i + 1] - 1) * C, C * sizeof *last);
    decode_logits(model, logits, last, count);
    /* never, if all is well: look closer, sequence by sequence */
    for (size_t i = 0; i < count && first_not_finite(logits, count * V) < count * V; i++) {
        struct Batch again =
            collate(arena, &(struct Example){active[i]->ids, active[i]->n, 0}, 1, READ_LAST);
        check_numbers(model, arena, &again, "a logit of the next token", logits + i * V, V);
    }
    return logits;
}

static struct Sequence *beams_new(struct Arena *arena, size_t count, size_t max_length) {
    struct Sequence *beams = arena_zeros(arena, count, sizeof *beams);
    for (size_t i = 0; i < count; i++)
        beams[i] = (struct Sequence){.ids = arena_alloc(arena, max_length, sizeof(int)), .slot = i};
    return beams;
}

static void beam_set(struct Sequence *beam, const struct Sequence *from, int id, float score) {
    memcpy(beam->ids, from->ids, from->n * sizeof *beam->ids);
    beam->ids[from->n] = id;
    beam->n = from->n + 1;
    beam->score = score;
}

/* The `most` best of n scores, best first: (score, place). When sampling, `most` draws without
 * replacement from softmax(score), in the order drawn: the largest scores after Gumbel noise
 * -log(-log u) was added to each. */
static size_t beam_candidates(float *score, size_t n, size_t most, struct Rng *sample,
                              struct Arena *arena, struct Candidate *best) {
    float *key = arena_floats(arena, n);
    float *copy = arena_floats(arena, n);
    most = MIN(most, n);
    for (size_t i = 0; i < n; i++)
        key[i] = sample ? (float)(score[i] - log(-log(1 - rng_uniform(sample)))) : score[i];
    memcpy(copy, key, n * sizeof *copy);
    float least = kth_largest(copy, n, most);
    size_t count = 0;
    /* what ties with the last one comes in as far as there is room */
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < n && count < most; i++)
            if (key[i] > -INFINITY && (pass == 0 ? key[i] > least : key[i] == least))
                best[count++] = (struct Candidate){key[i], (int)i};
    qsort(best, count, sizeof *best, compare_candidates_down);
    for (size_t i = 0; i < count; i++)
        best[i].logit = score[best[i].id];
    return count;
}

/* Logits of running beams -> their score with each next token: log-probability so far plus log
 * softmax, processed. */
static void beam_scores(float *logits, const struct Sequence *running, size_t beams, size_t V,
                        size_t start, const struct GenerationConfig *config, int end_token) {
#pragma omp parallel for
    for (size_t b = 0; b < beams; b++) {
        float *row = logits + b * V;
        float lse = log_sum_exp(row, V, thread_scratch(SCRATCH_ROW, V));
        for (size_t v = 0; v < V; v++)
            row[v] -= lse;
        process_logits(row, V, config, running[b].ids, running[b].n, running[b].n - start,
                       end_token);
        for (size_t v = 0; v < V; v++)
            row[v] += running[b].score;
    }
}

/* A place of the pool that nothing has taken yet (n = 0) is beaten by any score. transformers marks
 * it with -1e9; with a length_penalty below 0 real scores are lower.  test: beam_search_negative */
static bool beam_beats(float score, const struct Sequence *finished) {
    return finished->n == 0 || score > finished->score;
}

/* A sequence that ended enters the pool, sorted best first, if its score beats the worst there. */
static void beam_finish(struct Sequence *pool, size_t K, const struct Sequence *from, int id,
                        float score) {
    if (!beam_beats(score, &pool[K - 1]))
        return;
    beam_set(&pool[K - 1], from, id, score);
    for (size_t i = K - 1; i > 0 && beam_beats(pool[i].score, &pool[i - 1]); i--) {
        struct Sequence better = pool[i];
        pool[i] = pool[i - 1];
        pool[i - 1] = better;
    }
}

/* beam_search -- the num_beams likeliest beginnings are continued side by side.  [glossary: Beam
 * search] Greedy decoding takes the likeliest token and can walk past the likeliest sequence.
 * Here each of K beams is continued with every token; of the K V continuations the best 2K are
 * looked at: those that end go, if among the first K, to a pool of K finished ones (score:
 * log-probability / length^length_penalty), and the best K of the rest run on. It stops when no
 * running beam can beat the worst of the pool at its present length, with early_stopping "never"
 * at the longest possible, with true as soon as the pool is full. Step by step as transformers 5
 * does it. sequences: num_return_sequences of them that hold the same prompt; they become the
 * best of the pool. By hand: after A, 0.6 B and 0.4 C; after AB at most 0.5, after AC 0.95:
 * greedy ends with ABx at 0.30, two beams with ACx at 0.38.  test: beam_search_golden,
 * beam_search_exhaustive */
static void beam_search(const struct GPT2 *model, struct Sequence *sequences,
                        const struct GenerationConfig *config) {
    struct Arena arena = {0};
    struct Arena step_arena = {0};
    size_t K = config->num_beams;
    size_t V = model->config.vocab_size;
    size_t start = sequences->n;
    size_t max_length = sequences->max_length;
    size_t beams = 1;
    int end_token = model->config.eos_token_id;
    struct Sequence *side[] = {beams_new(&arena, K, max_length), beams_new(&arena, K, max_length)};
    struct Sequence *running = side[0];
    struct Sequence *pool = beams_new(&arena, K, max_length);
    struct Sequence **active = arena_alloc(&arena, K, sizeof *active);
    struct KVCache cache[] = {kv_cache_new(model, &arena, K, max_length),
                              kv_cache_new(model, &arena, K, max_length)};
    struct Candidate *best = arena_alloc(&arena, 2 * K, sizeof *best);
    struct Candidate *going = arena_alloc(&arena, 2 * K, sizeof *going);
    memcpy(running->ids, sequences->ids, start * sizeof(int));
    running->n = start;
    bool hope = true;
    bool full = false;
    for (int now = 0;
         hope && !(full && config->early_stopping == STOP_TRUE) && running->n < max_length;
         now = !now) {
        arena_reset(&step_arena);
        for (size_t b = 0; b < beams; b++)
            active[b] = &running[b];
        float *score = generate_step(model, &step_arena, active, beams, &cache[now]);
        beam_scores(score, running, beams, V, start, config, end_token);
        size_t count =
            beam_candidates(score, beams * V, 2 * K, config->do_sample ? &sequences->rng : NULL,
                            &step_arena, best);
        size_t left = 0;
        size_t length = running[0].n + 1 - start;
        for (size_t i = 0; i < count; i++) {
            const struct Sequence *from = &running[(size_t)best[i].id / V];
            int id = (int)((size_t)best[i].id % V);
            if (id != end_token && from->n + 1 < max_length)
                going[left++] = best[i];
            else if (i < K)
                beam_finish(pool, K, from, id,
                            (float)(best[i].logit / pow((double)length, config->length_penalty)));
        }
        full = pool[K - 1].n > 0;
        if (left == 0)
            break;
        qsort(going, left, sizeof *going, compare_candidates_down);
        beams = MIN(left, K);
        for (size_t i = 0; i < beams; i++) {
            size_t from = (size_t)going[i].id / V;
            beam_set(&side[!now][i], &running[from], (int)((size_t)going[i].id % V),
                     going[i].logit);
            kv_cache_copy(model, &cache[!now], i, &cache[now], from);
        }
        running = side[!now];
        size_t hoped = config->early_stopping == STOP_NEVER && config->length_penalty > 0
                           ? max_length - start
                           : length;
        double best_score = running->score / pow((double)hoped, config->length_penalty);
        hope = !full || best_score > pool[K - 1].score;
    }
    for (size_t i = 0; i < config->num_return_sequences && pool[i].n; i++) {
        memcpy(sequences[i].ids, pool[i].ids, pool[i].n * sizeof(int));
        sequences[i].n = pool[i].n;
        sequences[i].finished = true;
    }
    arena_free(&arena);
    arena_free(&step_arena);
}

enum { GENERATE_TOGETHER = 64 }; /* sequences decoded in one batch: bounds the cache's memory */

/* generate -- writes every sequence to its end token or its max_length.  [glossary: Rollout]
 * sequences: ids with room for max_length, the prompt in place. Each has its own random numbers,
 * so what it becomes does not depend on who else is in the batch. One rounding is excepted:
 * while more than FEW_ROWS sequences are under way, the output layer adds in another order, and
 * a draw that falls between two roundings comes out otherwise. The same call always gives the
 * same answers.
 *                             test: generate_golden, generate_cache, generate_company */
static void generate(const struct GPT2 *model, struct Sequence *sequences, size_t n,
                     const struct GenerationConfig *config) {
    struct Arena arena = {0};
    struct Arena step_arena = {0};
    size_t V = model->config.vocab_size;
    for (size_t i = 0; config->num_beams > 1 && i < n; i += config->num_return_sequences)
        beam_search(model, sequences + i, config);
    for (size_t first = 0; config->num_beams == 1 && first < n; first += GENERATE_TOGETHER) {
        struct Sequence *active[GENERATE_TOGETHER];
        size_t count = 0;
        size_t capacity = 0;
        for (size_t i = first; i < MIN(n, first + GENERATE_TOGETHER); i++) {
            if (sequences[i].finished || sequences[i].n >= sequences[i].max_length)
                continue;
            sequences[i].slot = count;
            active[count++] = &sequences[i];
            capacity = MAX(capacity, sequences[i].max_length);
        }
        arena_reset(&arena);
        struct KVCache cache = kv_cache_new(model, &arena, count, capacity);
        for (size_t left; count > 0; count = left) {
            arena_reset(&step_arena);
            float *logits = generate_step(model, &step_arena, active, count, &cache);
#pragma omp parallel for schedule(dynamic) if (count > 1)
            for (size_t i = 0; i < count; i++)
                sequence_extend(active[i], logits + i * V, V, config, model->config.eos_token_id);
            left = 0;
            /* those that ended drop out */
            for (size_t i = 0; i < count; i++)
                if (!active[i]->finished)
                    active[left++] = active[i];
        }
    }
    arena_free(&arena);
    arena_free(&step_arena);
}

/* A sequence that starts with `n` ids and may grow by max_new tokens, as far as the context allows:
 * to one token more than it has, as in transformers, for the last one is never read.
 *                                                                         test: generate_context */
static struct Sequence sequence_start(struct Arena *arena, const int *ids, size_t n, size_t max_new,
                                      const struct GPT2 *model, struct Rng rng) {
    size_t max_length = MIN(n + max_new, model->config.n_positions + 1);
    struct Sequence s = {.n = n, .prompt_length = n, .max_length = max_length, .rng = rng};
    s.ids = memcpy(arena_alloc(arena, MAX(n, s.max_length), sizeof *s.ids), ids, n * sizeof *ids);
    return s;
}

/* Answers of a policy to n prompts, num_generations of each side by side; each takes one number
 * of rng, the seed of its own. Like a rollout an answer ends where the context does: it will be
 * trained on, last token and all. */
static struct Example *sample_answers(const struct GPT2 *policy, struct Arena *arena,
                                      const struct Example *prompts, size_t n,
                                      size_t num_generations,
                                      const struct GenerationConfig *generation, struct Rng *rng) {
    size_t total = n * num_generations;
    struct Sequence *sequences = arena_alloc(arena, total, sizeof *sequences);
    struct Example *answers = arena_alloc(arena, total, sizeof *answers);
    for (size_t i = 0; i < total; i++) {
        const struct Example *prompt = &prompts[i / num_generations];
        size_t room = policy->config.n_positions - prompt->n;
        struct Rng own = rng_seed(rng_next(rng), STREAM_SAMPLE);
        size_t max_new = MIN(generation->max_new_tokens, room);
        sequences[i] = sequence_start(arena, prompt->ids, prompt->n, max_new, policy, own);
    }
    generate(policy, sequences, total, generation);
    for (size_t i = 0; i < total; i++)
        answers[i] = (struct Example){sequences[i].ids, sequences[i].n, sequences[i].prompt_length};
    return answers;
}

/* =============================================================================================
 * Part III - Training
 *
 * The functions of Part I on the model of Part II, again and again. After this part a reader knows
 * how a language model, a reward model, a PPO policy and a DPO policy are made, in the order of
 * the course, and what each number in their logs means.
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 14 - Optimizer, schedule, Trainer                  [glossary: Otimização]
 *
 * How do gradients become better weights? The Trainer is transformers': epochs of shuffled
 * micro-batches, gradients accumulated over several of them and clipped, an AdamW step at a
 * scheduled learning rate, a log entry every few steps. What is trained, and on which loss, is the
 * business of a Task (chapters 15, 16, 18).
 *
 *     4 micro-batches of 8 rows      gradients add up       one step on 32 rows
 *     gradient norm 3.0, limit 1     divided by 3.0         one odd batch cannot throw weights far
 *     learning rate 5e-5, step 500 of 1000, linear          2.5e-5
 *
 * What enters: gradients. What leaves: weights, and a log of how it went.
 * ============================================================================================= */

/* What Part IV gives to this one. The log: an entry is a list of named numbers; state_log adds one
 * to the history, log_at finds (or makes) a number by its name, state_say shows an entry. */
struct LogEntry;
struct TrainerState;
static struct LogEntry *state_log(struct TrainerState *state);
static struct Metric *log_at(struct LogEntry *entry, const char *name);
static void log_value(struct LogEntry *entry, const char *name, double value);
static bool log_find(const struct LogEntry *entry, const char *name, double *value);
static const char *log_name(const char *prefix, struct Text name);
static void state_say(const struct TrainerState *state, const char *name,
                      const struct LogEntry *entry, bool plain);

/* Checkpoints: checkpoint_new and checkpoint_add say what a run's state is made of (_doubles:
 * must be finite; _fixed: must be the same when the run goes on); checkpoint_resume puts it
 * back, if the run is to go on; checkpoint_step saves when it is time. */
struct Checkpoint;
struct Saved;
struct TrainingArguments;
static struct Checkpoint checkpoint_new(const char *task, struct GPT2 *model,
                                        const struct Tokenizer *tok,
                                        const struct TrainingArguments *args,
                                        struct TrainerState *state);
static struct Saved *checkpoint_add(struct Checkpoint *c, const char *name, void *at, size_t n,
                                    uint64_t most);
static void checkpoint_add_doubles(struct Checkpoint *c, const char *name, void *at, size_t n);
static void checkpoint_add_fixed(struct Checkpoint *c, const char *name, void *at,
                                 const char *words);
static void checkpoint_resume(struct Checkpoint *c);
static void checkpoint_step(struct Checkpoint *c);

/* Files and folders: written beside their final place, moved onto it when complete. */
struct Output;
struct Rollout;
struct PPOTrainer;
static void make_folder(const char *path);
static void output_flush(struct Output *out);
static void output_close(struct Output *out);
static void model_replace(struct GPT2 *model, const char *folder, const struct Tokenizer *tok);
static void trainer_state_save(const struct TrainerState *s, const struct TrainingArguments *args,
                               const char *folder);
static void stats_write_line(FILE *file, const struct PPOTrainer *ppo);
static void rollouts_write(FILE *file, const struct Rollout *rollouts, size_t n);

/* Samples on a terminal: whether it is time for one, how wide it is, a text made fit for it. */
static bool progress_sampling(size_t step, size_t total);
static size_t terminal_columns(void);
static char *cut_text(char *text, size_t bytes);
static struct Text text_shown(struct Arena *arena, struct Text text, const char *kept);

/* A note, if training texts hold "<|endoftext|>", which is ordinary text here. */
static void warn_of_written_ends(const struct Dataset *data, const struct Tokenizer *tok);

/* An output file: written as PATH.tmp, moved onto PATH by output_close. With `keep`, what
 * PATH.tmp holds is there to be written over. */
struct Output {
    FILE *file;
    char path[PATH_MAX], tmp[PATH_MAX + 8];
};

static const char *const LOGS[] = {"stats_all.jsonl", "rollouts.jsonl"};

static volatile sig_atomic_t interrupted;

struct TrainingArguments {
    double learning_rate, adam_beta1, adam_beta2, adam_epsilon, weight_decay, max_grad_norm,
        num_train_epochs;
    double warmup_ratio; /* of the steps, where warmup_steps is 0 */
    size_t per_device_train_batch_size, gradient_accumulation_steps, max_steps, warmup_steps,
        logging_steps, eval_steps, max_length;
    size_t per_device_eval_batch_size;
    const char *lr_scheduler_type, *train_sampling_strategy, *optim;
    uint64_t seed;
    double lr_end; /* linear decay ends at this share of the learning rate */
    const char *output_dir, *resume_from_checkpoint; /* output_dir NULL: no checkpoints */
    size_t save_steps, save_total_limit; /* 0: none; all */
    size_t say_steps; /* plain progress lines; 0: one each log entry */
};

static struct TrainingArguments training_arguments(void) {
    return (struct TrainingArguments){
        .learning_rate = 5e-5,
        .adam_beta1 = 0.9,
        .adam_beta2 = 0.999,
        .adam_epsilon = 1e-8,
        .weight_decay = 0,
        .max_grad_norm = 1,
        .num_train_epochs = 3,
        .per_device_train_batch_size = 8,
        .gradient_accumulation_steps = 1,
        .logging_steps = 10,
        .max_length = 1024,
        .per_device_eval_batch_size = 8,
        .lr_scheduler_type = "linear",
        .train_sampling_strategy = "random",
        .optim = "adamw",
        .seed = 42,
        .save_steps = 500,
    };
}

/* sqrt(x): a guess of 1/sqrt(x) by halving the exponent, three Newton steps y (3 - x y^2)/2, one
 * for x y. Error < 2e-7; 0 -> 0.  test: sqrt_fast */
static inline float sqrt_fast(float x) {
    float y = float_of_bits(0x5f375a86 - (bits_of_float(x) >> 1));
    y *= 1.5f - 0.5f * x * y * y;
    y *= 1.5f - 0.5f * x * y * y;
    y *= 1.5f - 0.5f * x * y * y;
    float root = x * y;
    return root + 0.5f * y * (x - root * root);
}

enum { NORM_PIECES = 512, STEP_PIECE = 1 << 14 };

/* The length of the gradient as one vector, summed in pieces whose number is not that of the
 * threads: the same sum on any. */
static double gradient_norm(const struct GPT2 *model) {
    double total = 0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        const float *d = model->tensors[i]->d;
        if (!d)
            continue;
        size_t n = model->tensors[i]->n;
        size_t piece = (n + NORM_PIECES - 1) / NORM_PIECES;
        double part[NORM_PIECES];
        double sum = 0;
#pragma omp parallel for if (n > 100000)
        for (size_t p = 0; p < NORM_PIECES; p++)
            part[p] = row_dot(d + MIN(n, p * piece), d + MIN(n, p * piece),
                              MIN(n - MIN(n, p * piece), piece));
        for (size_t p = 0; p < NORM_PIECES; p++)
            sum += part[p];
        total += sum;
    }
    return sqrt(total);
}

/* adamw -- one step for n weights [8].
 *   m = beta1 m + (1 - beta1) d;      v = beta2 v + (1 - beta2) d^2
 *   w = w (1 - lr weight_decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
 * m is the gradient's running mean, v that of its square: the step is about lr in size whatever
 * the gradient's scale. The divisors undo the start at zero. With weight_decay 0 this is Adam. d
 * counts times `clip`, and is left zero. By hand: first step, no decay -> w moves by lr against
 * the sign of d.  test: adamw_golden */
/* rest = 1 - beta */
struct AdamStep {
    float lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, decay, clip;
};

WIDE static void adamw_piece(float *w, float *d, float *m, float *v, size_t n, struct AdamStep s) {
    for (size_t i = 0; i < n; i++) {
        float g = d[i] * s.clip;
        m[i] = s.beta1 * m[i] + s.rest1 * g;
        v[i] = s.beta2 * v[i] + s.rest2 * g * g;
        float step = s.lr * (m[i] * s.correction1) / (sqrt_fast(v[i] * s.correction2) + s.eps);
        w[i] = w[i] * s.decay - step;
        d[i] = 0;
    }
}

/* Stochastic gradient descent, w = w - lr (d + weight_decay w), as torch.optim.SGD: the plain
 * rule that AdamW refines. Ascent: the loss is the objective with a minus sign.  [glossary:
 * Ascensão de gradiente estocástico (SGA)] */
WIDE static void sgd_piece(float *w, float *d, size_t n, float lr, float weight_decay, float clip) {
    for (size_t i = 0; i < n; i++) {
        w[i] -= lr * (d[i] * clip + weight_decay * w[i]);
        d[i] = 0;
    }
}

/* One optimizer step, number t from 1, at learning rate lr. A gradient longer than max_grad_norm
 * (0: no limit) is shortened to that length, so that one odd batch cannot throw the weights far.
 * Returns the norm before. */
static double optimizer_step(struct GPT2 *model, const struct TrainingArguments *args, double lr,
                             size_t t) {
    double norm = gradient_norm(model);
    check_finite(model, "the gradient's norm", norm);
    double clip =
        args->max_grad_norm > 0 && norm > 0 ? MIN(1, args->max_grad_norm / (norm + 1e-6)) : 1;
    bool sgd = strcmp(args->optim, "sgd") == 0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *tensor = model->tensors[i];
        if (!tensor->d)
            continue;
        double weight_decay = tensor->decay ? args->weight_decay : 0;
        struct AdamStep s = {
            .lr = (float)lr,
            .beta1 = (float)args->adam_beta1,
            .beta2 = (float)args->adam_beta2,
            .eps = (float)args->adam_epsilon,
            .clip = (float)clip,
            .rest1 = (float)(1 - args->adam_beta1),
            .rest2 = (float)(1 - args->adam_beta2),
            .correction1 = (float)(1 / (1 - pow(args->adam_beta1, (double)t))),
            .correction2 = (float)(1 / (1 - pow(args->adam_beta2, (double)t))),
            .decay = (float)(1 - lr * weight_decay),
        };
#pragma omp parallel for if (tensor->n > 50000)
        for (size_t p = 0; p < tensor->n; p += STEP_PIECE) {
            size_t n = MIN(tensor->n - p, (size_t)STEP_PIECE);
            if (sgd)
                sgd_piece(tensor->w + p, tensor->d + p, n, (float)lr, (float)weight_decay,
                          (float)clip);
            else
                adamw_piece(tensor->w + p, tensor->d + p, tensor->m + p, tensor->v + p, n, s);
        }
    }
    model->trace.acts.N = 0; /* the activations are those of other weights now */
    return norm;
}

/* The share of the learning rate used in step number `step` (from 0) of `total`. Warm-up: from 0
 * up in warmup_steps, so that AdamW's averages fill before large steps are taken. Then linear to
 * 0 (or to lr_end), a half cosine to 0, or constant.  By hand: linear, 10 steps, warm-up 2: 0,
 * .5, 1, .875 */
static double schedule_factor(const struct TrainingArguments *args, size_t step, size_t total) {
    const char *type = args->lr_scheduler_type;
    double warmup =
        args->warmup_steps ? (double)args->warmup_steps : ceil(args->warmup_ratio * (double)total);
    double at = (double)step;
    double rest = MAX(1.0, (double)total - warmup);
    if (strcmp(type, "constant") == 0)
        return 1;
    if (at < warmup)
        return at / MAX(1.0, warmup);
    if (strcmp(type, "constant_with_warmup") == 0)
        return 1;
    double progress = MIN(1.0, (at - warmup) / rest);
    if (strcmp(type, "cosine") == 0)
        return 0.5 * (1 + cos(3.14159265358979323846 * progress));
    return args->lr_end + (1 - args->lr_end) * (1 - progress);
}

/* What the log holds: entries of named numbers, written as transformers' trainer_state.json. */
enum { MAX_METRICS = 48 };
struct Metric {
    const char *name;
    double value;
    size_t n;
}; /* n: of a mean, its units */
struct LogEntry {
    size_t n;
    struct Metric item[MAX_METRICS];
}; /* sorted by name */

/* trainer.state: where a training is.                                    [glossary: trainer.state]
 */
struct TrainerState {
    size_t global_step, max_steps, steps_per_epoch;
    double num_train_epochs;
    size_t num_tokens, samples; /* seen so far; a checkpoint takes these five as one piece */
    double total_loss, seconds, epoch; /* of all steps */
    struct LogEntry *log_history;
    size_t log_count, log_capacity;
    struct LogEntry metrics; /* sums since the last log entry */
};

/* Checkpoints: all that a run needs to go on as if it had never stopped, in a folder checkpoint-N.
 *   model.safetensors ...   the weights, as those of any model; of an adapter its two files
 *   optimizer.safetensors   exp_avg.* and exp_avg_sq.*: m and v of each tensor that trains;
 *     beside them, as tensors too,
 *                           random states, places in the data, running means, lengths of growing
 *                             logs: `saved` below
 *   trainer_state.json      which step this is, and the log so far
 * It is written as tmp-checkpoint-N, put on the disk and renamed, and renamed again before it is
 * removed: a folder called checkpoint-N is whole, whenever the plug was pulled.  test:
 * checkpoint_* */
struct Saved {
    struct Tensor tensor;
    const char *fixed; /* what must be as it was, in words; NULL: it may change */
    uint64_t fixed_value, most; /* whole numbers are at most `most` */
    size_t first_double; /* from this number on they are doubles */
};

struct Checkpoint {
    struct GPT2 *model;
    const struct Tokenizer *tok;
    const struct TrainingArguments *args;
    struct TrainerState *state;
    const char *task, *log_dir; /* log_dir: where the two logs grow that PPO writes */
    struct Output *logs; /* NULL: none */
    uint64_t log_bytes[2]; /* their lengths at the checkpoint */
    struct Saved saved[20];
    size_t count;
    size_t run; /* how many have begun in output_dir, with this one */
};

/* A Task is what is trained: a data set of `n` items and a loss over some of them. */
struct Trainer;
struct Task {
    const char *name;
    size_t n, eval_n;
    void *data;
    /* The loss of the items index[0..count), times `weight`, added to the gradient if `train` is
     * set. Reports metrics by trainer_metric. `eval`: the items are those held out; their loss
     * is one of the metrics. */
    double (*loss)(struct Trainer *trainer, const size_t *index, size_t count, double weight,
                   bool train, bool eval);
    /* Reports the metrics that take all held-out items to tell; may be NULL. */
    void (*evaluated)(struct Trainer *trainer);
    /* How many target tokens an item has, where a step's loss is a mean over tokens (SFT); else
     * NULL: over micro-batches. */
    size_t (*targets)(struct Trainer *trainer, size_t index);
    void (*new_epoch)(struct Trainer *trainer, size_t epoch); /* may be NULL */
    /* adds to a checkpoint what the task alone knows; may be NULL */
    void (*saved)(struct Trainer *trainer, struct Checkpoint *checkpoint);
    void (*sample)(struct Trainer *trainer); /* shows what the model writes; may be NULL */
};

struct Trainer {
    struct GPT2 *model;
    const struct Tokenizer *tok;
    struct TrainingArguments args;
    struct TrainerState state;
    struct Task task;
    struct LogEntry metrics; /* of this micro-batch, or of this evaluation: sums */
    struct Arena arena; /* emptied before every micro-batch */
};

/* trainer_metric -- a metric of a batch, or of all that is held out, is a mean over its units:
 * tokens, pairs or texts. A batch reports the sum over its units and how many they are: a mean
 * of batches' means would depend on how the units are dealt out to batches, and a small last
 * batch would count as much as a full one. By hand: losses 1, 2, 6 in batches of two and one: 9
 * / 3 = 3; the mean of the batches' means, 1.5 and 6, would be 3.75.  test: metric_units */
static void trainer_metric(struct Trainer *trainer, const char *name, double sum, size_t units) {
    struct Metric *metric = log_at(&trainer->metrics, name);
    metric->value += sum;
    metric->n += units;
}

/* In training TRL logs the plain mean of the micro-batches' means since the last entry: so here. */
static void trainer_add_means(struct Trainer *trainer) {
    const struct LogEntry *batch = &trainer->metrics;
    for (const struct Metric *m = batch->item; m < batch->item + batch->n; m++) {
        struct Metric *metric = log_at(&trainer->state.metrics, m->name);
        metric->value += m->value / (double)MAX((size_t)1, m->n);
        metric->n++;
    }
    trainer->metrics.n = 0;
}

/* The least, or the largest, of all values that are reported under a name. */
static void trainer_least(struct Trainer *trainer, const char *name, double value) {
    struct Metric *metric = log_at(&trainer->metrics, name);
    metric->value = metric->n ? MIN(metric->value, value) : value;
    metric->n = 1;
}

static void trainer_largest(struct Trainer *trainer, const char *name, double value) {
    struct Metric *metric = log_at(&trainer->metrics, name);
    metric->value = metric->n ? MAX(metric->value, value) : value;
    metric->n = 1;
}

/* The metrics' means go to a log entry, in evaluation under "eval_" and their names, and where
 * the training is. */
static void trainer_means(const struct TrainerState *state, const struct LogEntry *metrics,
                          struct LogEntry *entry, const char *prefix) {
    for (const struct Metric *m = metrics->item; m < metrics->item + metrics->n; m++)
        log_value(entry, *prefix ? log_name(prefix, text_of(m->name)) : m->name,
                  m->value / (double)m->n);
    log_value(entry, "epoch", state->epoch);
    log_value(entry, "step", (double)state->global_step);
}

/* Ctrl-C ends the evaluation after the last step early: the weights have yet to be saved. One
 * between steps is finished, as a step is: the checkpoint that is then saved holds its figures. */
static bool evaluation_interrupted(const struct TrainerState *state) {
    return interrupted && state->global_step == state->max_steps;
}

/* trainer_measure -- the loss and the other metrics over the held-out items, each a mean over its
 * units, whatever the batch size; no weight moves.                    test: eval_batch_size */
static struct LogEntry trainer_measure(struct Trainer *trainer) {
    struct TrainerState *state = &trainer->state;
    size_t n = trainer->task.eval_n;
    size_t batch = trainer->args.per_device_eval_batch_size;
    size_t num_tokens = state->num_tokens; /* those of the training */
    trainer->metrics.n = 0;
    double begin = seconds_now();
    for (size_t first = 0; first < n && !evaluation_interrupted(state); first += batch) {
        size_t index[4096];
        size_t count = MIN(MIN(batch, n - first), COUNT(index));
        for (size_t i = 0; i < count; i++)
            index[i] = first + i;
        arena_reset(&trainer->arena);
        trainer->task.loss(trainer, index, count, 1, false, true);
    }
    if (trainer->task.evaluated)
        trainer->task.evaluated(trainer);
    double seconds = seconds_now() - begin;
    struct LogEntry entry = {0};
    log_value(&entry, "eval_runtime", seconds);
    log_value(&entry, "eval_samples_per_second", (double)n / seconds);
    log_value(&entry, "eval_steps_per_second", ceil((double)n / (double)batch) / seconds);
    trainer_means(state, &trainer->metrics, &entry, "eval_");
    trainer->metrics.n = 0;
    state->num_tokens = num_tokens;
    return entry;
}

/* An evaluation in the course of a training, for its log. Returns the loss. */
static double trainer_evaluate(struct Trainer *trainer) {
    struct LogEntry entry = trainer_measure(trainer);
    double loss;
    if (evaluation_interrupted(&trainer->state))
        return NAN;
    *state_log(&trainer->state) = entry;
    state_say(&trainer->state, trainer->task.name, &entry, true);
    log_find(&entry, "eval_loss", &loss);
    return loss;
}

/* One optimizer step: gradients of the step's micro-batches, added up. Returns the step's loss. */
static double trainer_accumulate(struct Trainer *trainer, const size_t *order, size_t n) {
    const struct Task *task = &trainer->task;
    size_t micro = trainer->args.per_device_train_batch_size;
    size_t micro_batches = (n + micro - 1) / micro;
    size_t targets = 0;
    for (size_t i = 0; task->targets && i < n; i++)
        targets += task->targets(trainer, order[i]);
    double weight = 1 / (double)MAX((size_t)1, task->targets ? targets : micro_batches);
    double loss = 0;
    for (size_t first = 0; first < n; first += micro) {
        arena_reset(&trainer->arena);
        loss += task->loss(trainer, order + first, MIN(micro, n - first), weight, true, false);
        check_finite(trainer->model, "the loss", loss);
        trainer_add_means(trainer);
    }
    return loss;
}

/* After a step: a log entry when one is due, for the person a line, and on a terminal now and
 * then a sample. */
static void trainer_log(struct Trainer *trainer, double norm, double lr) {
    struct TrainerState *state = &trainer->state;
    struct LogEntry entry = {2, {{"grad_norm", norm, 0}, {"learning_rate", lr, 0}}};
    bool due = state->global_step % trainer->args.logging_steps == 0;
    if (state->num_tokens)
        log_value(&entry, "num_tokens", (double)state->num_tokens);
    trainer_means(state, &state->metrics, &entry, "");
    if (trainer->task.sample && progress_sampling(state->global_step, state->max_steps))
        trainer->task.sample(trainer);
    state_say(state, trainer->task.name, &entry,
              due
                  && (!trainer->args.say_steps
                      || state->global_step % trainer->args.say_steps == 0));
    if (!due)
        return;
    *state_log(state) = entry;
    state->metrics.n = 0;
}

static size_t *epoch_order(const struct TrainingArguments *args, struct Arena *arena, size_t n,
                           size_t epoch, enum RngStream stream) {
    size_t *order = arena_order(arena, n);
    struct Rng rng = rng_seed(args->seed + epoch, stream);
    if (strcmp(args->train_sampling_strategy, "sequential") != 0)
        rng_shuffle(&rng, order, n);
    return order;
}

/* trainer_train -- the whole training.  [glossary: Trainer.train()] Steps of an epoch =
 * ceil(micro-batches / accumulation), the last on what is left. max_steps, if given, decides
 * alone. By hand: 5 rows, one a micro-batch, accumulation 4: a step on 4 rows, then one on the
 * last row; `epoch` is 0.8, then 1.  test: trainer_epoch */
static void trainer_train(struct Trainer *trainer) {
    struct TrainingArguments *args = &trainer->args;
    struct TrainerState *state = &trainer->state;
    size_t per_step = args->per_device_train_batch_size * args->gradient_accumulation_steps;
    size_t n = trainer->task.n;
    CHECK(n > 0, "%s: nothing to train on", trainer->task.name);
    state->steps_per_epoch = (n + per_step - 1) / per_step;
    size_t batch_size = args->per_device_train_batch_size;
    size_t micro_batches = (n + batch_size - 1) / batch_size; /* of an epoch */
    state->max_steps = args->max_steps
                           ? args->max_steps
                           : (size_t)ceil(args->num_train_epochs * (double)state->steps_per_epoch);
    gpt2_make_trainable(trainer->model);
    struct Checkpoint checkpoint =
        checkpoint_new(trainer->task.name, trainer->model, trainer->tok, args, state);
    checkpoint_add_fixed(&checkpoint, "rows", &trainer->task.n, "the number of rows to train on");
    checkpoint_add_fixed(&checkpoint, "rows_per_step", &per_step,
                         "the number of rows in a step "
                         "(--per_device_train_batch_size times --gradient_accumulation_steps)");
    if (trainer->task.saved)
        trainer->task.saved(trainer, &checkpoint);
    checkpoint_resume(&checkpoint);
    state->num_train_epochs = ceil((double)state->max_steps / (double)state->steps_per_epoch);
    struct Arena order_arena = {0};
    double begin = seconds_now() - state->seconds;
    for (size_t epoch = state->global_step / state->steps_per_epoch;
         state->global_step < state->max_steps; epoch++) {
        arena_reset(&order_arena);
        size_t *order = epoch_order(args, &order_arena, n, epoch, STREAM_ORDER);
        if (trainer->task.new_epoch)
            trainer->task.new_epoch(trainer, epoch);
        for (size_t step = state->global_step % state->steps_per_epoch;
             step < state->steps_per_epoch && state->global_step < state->max_steps; step++) {
            size_t count = MIN(per_step, n - step * per_step);
            trainer->model->trace.task = trainer->task.name;
            trainer->model->trace.step = state->global_step + 1;
            double loss = trainer_accumulate(trainer, order + step * per_step, count);
            double lr =
                args->learning_rate * schedule_factor(args, state->global_step, state->max_steps);
            double norm = optimizer_step(trainer->model, args, lr, ++state->global_step);
            size_t done = MIN((step + 1) * args->gradient_accumulation_steps, micro_batches);
            state->epoch = (double)epoch + (double)done / (double)micro_batches;
            trainer_metric(trainer, "loss", loss, 1);
            trainer_add_means(trainer);
            state->total_loss += loss;
            state->samples += count;
            trainer_log(trainer, norm, lr);
            if (trainer->task.eval_n && args->eval_steps
                && state->global_step % args->eval_steps == 0)
                trainer_evaluate(trainer);
            state->seconds = seconds_now() - begin;
            checkpoint_step(&checkpoint);
        }
    }
    arena_free(&order_arena);
    double steps = (double)state->max_steps;
    double s = state->seconds;
    *state_log(state) =
        (struct LogEntry){7,
                          {{"epoch", state->epoch, 0},
                           {"step", (double)state->global_step, 0},
                           {"total_flos", 0, 0},
                           {"train_loss", state->total_loss / MAX(1, steps), 0},
                           {"train_runtime", s, 0},
                           {"train_samples_per_second", (double)state->samples / s, 0},
                           {"train_steps_per_second", steps / s, 0}}};
}

static void trainer_free(struct Trainer *trainer) {
    arena_free(&trainer->arena);
    free(trainer->state.log_history);
}

/* =============================================================================================
 * Chapter 15 - Language model: pretraining, SFT
 *
 * How does a model learn to write? From what people wrote. One loss serves both stages: the
 * cross-entropy of the next token, -log pi(x_t+1 | x_1..t), averaged over the tokens that count.
 * [glossary: Função de custo] Pretraining reads running text, and every token counts; supervised
 * fine-tuning reads examples, and of prompt + completion only the completion counts.
 * [glossary: Ajuste fino]
 *
 *     a new model     8.66 nats a token    (an even guess among 4097 tokens: ln 4097 = 8.32)
 *     trained         4.51 nats a token    perplexity e^4.51 = 91: as unsure as among 91 tokens
 * ============================================================================================= */

/* A sample, for a terminal: prompt, a bar, what the model wrote. */
static void sample_show(const struct Tokenizer *tok, const struct Example *e, size_t V,
                        const char *score) {
    struct Arena arena = {0};
    struct Text prompt = tokenizer_decode_all(tok, &arena, e->ids, e->prompt_length, V);
    struct Text answer =
        tokenizer_decode_all(tok, &arena, e->ids + e->prompt_length, e->n - e->prompt_length, V);
    char *line = arena_printf(&arena, "    %s%.*s |%.*s", score, (int)prompt.length, prompt.data,
                              (int)answer.length, answer.data);
    say("%s\n", cut_text(line, terminal_columns()));
    arena_free(&arena);
}

struct LanguageTask {
    struct Example *examples, *eval_examples;
    struct Example *texts; /* pretraining: whole texts, packed anew each epoch */
    size_t text_count, row_length;
    bool whole_texts; /* see pretrain_pack */
    struct Arena rows; /* this epoch's packed rows */
};

static double language_loss(struct Trainer *trainer, const size_t *index, size_t count,
                            double weight, bool train, bool eval) {
    struct LanguageTask *task = trainer->task.data;
    struct GPT2 *model = trainer->model;
    struct Arena *arena = &trainer->arena;
    struct Example *examples = arena_alloc(arena, count, sizeof *examples);
    for (size_t i = 0; i < count; i++)
        examples[i] = (eval ? task->eval_examples : task->examples)[index[i]];
    struct Batch batch = collate(arena, examples, count, SKIP_LAST);
    struct Activations acts = gpt2_forward(model, arena, &batch, train);
    struct LMHead head = lm_head_new(model, arena, &acts, batch.row, batch.target, batch.R, 1);
    if (train) {
        float *dhidden = arena_zeros(arena, batch.N * model->config.n_embd, sizeof *dhidden);
        lm_head_cross_entropy(model, &head, (float)weight, dhidden, arena);
        gpt2_backward(model, arena, &acts, dhidden);
    } else
        lm_head_forward(model, &head);
    trainer->state.num_tokens += batch.tokens;
    trainer_metric(trainer, "entropy", row_sum(head.entropy, batch.R), batch.R);
    trainer_metric(trainer, "mean_token_accuracy", row_sum(head.hit, batch.R), batch.R);
    double nll = -sequence_logprob(head.logprob, batch.R);
    if (eval)
        trainer_metric(trainer, "loss", nll, batch.R);
    return nll * weight;
}

/* What the Trainer divides a step's loss by: labels that are not ignored. The first token of a
 * text without a prompt counts although nothing predicts it: so transformers counts, and the
 * loss is a little smaller than a mean. Packed rows: what they predict. */
static size_t language_targets(struct Trainer *trainer, size_t index) {
    const struct Example *e = ((struct LanguageTask *)trainer->task.data)->examples + index;
    return e->n - e->prompt_length;
}

/* pretrain_pack -- texts joined by end tokens, cut into `count` rows that predict row_length
 * tokens each. A row has row_length + 1 tokens and the next row starts with its last one, so
 * every token is predicted once; what is left over is dropped. With whole_texts a row that would
 * start inside a text starts where that text starts (if a row can hold it): so the model learns,
 * at position 0, how texts begin, as a prompt does. Some tokens then count twice and the last
 * texts have to wait for an epoch. */
static struct Example *pretrain_pack(struct Arena *arena, const struct Example *texts,
                                     const size_t *order, size_t text_count, size_t row_length,
                                     bool whole_texts, size_t *count) {
    size_t total = 0;
    size_t at = 0;
    size_t text = 0;
    size_t text_start = 0;
    for (size_t i = 0; i < text_count; i++)
        total += texts[i].n;
    int *stream = arena_alloc(arena, total, sizeof *stream);
    for (size_t i = 0; i < text_count; at += texts[order[i++]].n)
        memcpy(stream + at, texts[order[i]].ids, texts[order[i]].n * sizeof *stream);
    *count = total ? (total - 1) / row_length : 0;
    struct Example *rows = arena_alloc(arena, *count, sizeof *rows);
    at = 0;
    for (size_t i = 0; i < *count; i++) {
        rows[i] = (struct Example){stream + at, row_length + 1, 1};
        size_t next = at + row_length;
        while (text_start + texts[order[text]].n <= next && text + 1 < text_count)
            text_start += texts[order[text++]].n;
        bool fits = texts[order[text]].n <= row_length + 1;
        at = whole_texts && fits && text_start > at ? text_start : next;
    }
    return rows;
}

/* Each epoch joins the texts in a new order, so that rows never repeat. */
static void pretrain_new_epoch(struct Trainer *trainer, size_t epoch) {
    struct LanguageTask *task = trainer->task.data;
    arena_reset(&task->rows);
    size_t *order = epoch_order(&trainer->args, &task->rows, task->text_count, epoch, STREAM_SPLIT);
    task->examples = pretrain_pack(&task->rows, task->texts, order, task->text_count,
                                   task->row_length, task->whole_texts, &trainer->task.n);
}

/* How the model goes on after the first words of the first text. */
static void language_sample(struct Trainer *trainer) {
    const struct Example *text = ((struct LanguageTask *)trainer->task.data)->texts;
    struct GenerationConfig sampling = {
        .max_new_tokens = 28,
        .do_sample = true,
        .num_beams = 1,
        .temperature = 0.7,
        .top_p = 1,
        .repetition_penalty = 1,
    };
    struct Example prompt = {text->ids, text->n > 3 ? 3 : 1, 0};
    struct Rng rng = rng_seed(trainer->args.seed, STREAM_SAMPLE);
    struct Example *answer =
        sample_answers(trainer->model, &trainer->arena, &prompt, 1, 1, &sampling, &rng);
    sample_show(trainer->tok, answer, trainer->model->config.vocab_size, "");
}

/* Sets up the task of a language model on texts that end in an end token. */
static struct LanguageTask *pretrain_task(struct Trainer *trainer, struct Arena *arena,
                                          struct Example *texts, size_t text_count,
                                          struct Example *eval_texts, size_t eval_count) {
    struct LanguageTask *task = arena_zeros(arena, 1, sizeof *task);
    size_t length = trainer->args.max_length;
    *task = (struct LanguageTask){.texts = texts, .text_count = text_count, .row_length = length};
    trainer->task = (struct Task){
        .name = "pretrain",
        .data = task,
        .loss = language_loss,
        .targets = language_targets,
        .new_epoch = pretrain_new_epoch,
        .sample = language_sample,
    };
    pretrain_new_epoch(trainer, 0);
    CHECK(trainer->task.n > 0,
          "pretrain: the texts have too few tokens, a row needs %zu; use more text or a smaller "
          "--max_length",
          length + 1);
    task->eval_examples = pretrain_pack(arena, eval_texts, arena_order(arena, eval_count),
                                        eval_count, length, false, &trainer->task.eval_n);
    return task;
}

/* Rows of a data set as SFT examples: TRL appends the end token, keeps the first max_length ids,
 * drops what then has no target. */
static struct Example *sft_examples(struct Trainer *trainer, struct Arena *arena,
                                    const struct Dataset *data, size_t *n) {
    struct Example *examples = arena_alloc(arena, data->n, sizeof *examples);
    size_t count = 0;
    size_t cut = 0;
    size_t V = trainer->model->config.vocab_size;
    const int *end_token = &trainer->model->config.eos_token_id;
    const struct Tokenizer *tok = trainer->tok;
    for (size_t i = 0; i < data->n; i++) {
        const struct Row *row = &data->rows[i];
        struct Example e =
            data->shape == SHAPE_TEXT
                ? example_encode(arena, tok, row->text, V, end_token)
                : example_prompt_completion(arena, tok, row->prompt, row->completion, V, end_token);
        cut += e.n > trainer->args.max_length;
        e.n = MIN(e.n, trainer->args.max_length);
        if (e.n > MAX((size_t)1, e.prompt_length))
            examples[count++] = e;
    }
    if (cut)
        warn("%s: %zu of %zu rows were cut to their first %zu tokens (--max_length)", data->path,
             cut, data->n, trainer->args.max_length);
    CHECK(count > 0, "%s: no row has a token to learn from", data->path);
    if (count < data->n)
        warn("%s: %zu of %zu rows have no token to learn from and are left out", data->path,
             data->n - count, data->n);
    *n = count;
    return examples;
}

static struct LanguageTask *sft_task(struct Trainer *trainer, struct Arena *arena,
                                     const struct Dataset *data, const struct Dataset *eval) {
    struct LanguageTask *task = arena_zeros(arena, 1, sizeof *task);
    trainer->task = (struct Task){
        .name = "sft",
        .data = task,
        .loss = language_loss,
        .targets = language_targets,
    };
    task->examples = sft_examples(trainer, arena, data, &trainer->task.n);
    if (eval)
        task->eval_examples = sft_examples(trainer, arena, eval, &trainer->task.eval_n);
    return task;
}

/* =============================================================================================
 * Chapter 16 - Reward model                        [glossary: Função de recompensa]
 *
 * How does a network learn what people prefer? Chapter 3's loss on its output: a language model
 * with one number in place of its logits, read at each text's last token. Pairs, ratings (from
 * which pairs are made within a batch) or labels (liked, disliked) can teach it.
 *
 *     loss at the start    ln 2 = 0.693: a guess            accuracy 0.5
 *     trained              0.81 of held-out pairs ordered as people did
 *
 * What enters: texts that people compared, rated or labelled. What leaves: a reward model, and
 * rewards of new texts in the form of the course's sentiment pipeline.
 * ============================================================================================= */

struct RewardTask {
    /* to learn from, held out; of pairs 2i chosen, 2i+1 rejected; rated or labelled: one a row */
    struct Example *texts[2];
    double *number[2]; /* a row's margin, rating or label */
    bool rated, labelled;
    double center, min_difference;
    float *eval_reward; /* rated: r of each held-out text */
    /* of texts cut to a random beginning, so that the model learns to judge unfinished ones */
    double prefix_share;
    struct Rng cut;
};

/* How n pairs are ordered; pairs NULL: n texts, labels are compared with the reward's sign. */
static void reward_metrics(struct Trainer *trainer, const float *reward, const struct Pair *pairs,
                           size_t n, const double *label) {
    double right = 0;
    double margin = 0;
    for (size_t i = 0; i < n; i++) {
        double difference = pairs ? (double)reward[pairs[i].chosen] - reward[pairs[i].rejected]
                            : label[i] > 0 ? reward[i]
                                           : -reward[i];
        right += difference > 0;
        margin += difference;
    }
    trainer_metric(trainer, "accuracy", right, n);
    if (pairs)
        trainer_metric(trainer, "margin", margin, n);
}

static void reward_text_metrics(struct Trainer *trainer, const float *reward, size_t texts) {
    for (size_t t = 0; t < texts; t++) {
        trainer_metric(trainer, "mean_reward", reward[t], 1);
        trainer_least(trainer, "min_reward", reward[t]);
        trainer_largest(trainer, "max_reward", reward[t]);
    }
}

/* reward_rated_evaluated -- loss and order of every pair of held-out rated texts, whatever batches
 * they were read in: compared within batches, another batch size would be other pairs.
 *                                                                     test: eval_batch_size */
static void reward_rated_evaluated(struct Trainer *trainer) {
    const struct RewardTask *task = trainer->task.data;
    size_t n = trainer->task.eval_n;
    struct Pair *pairs = arena_alloc(&trainer->arena, n, sizeof *pairs);
    float *dreward = arena_floats(&trainer->arena, n); /* not used: nothing trains here */
    for (size_t i = 0; i < n; i++) { /* all pairs at once need n^2 memory */
        size_t count = pairs_of_rating(task->number[1], i, n, task->min_difference, pairs);
        if (count == 0)
            continue;
        double loss = bradley_terry_loss(task->eval_reward, n, pairs, count, task->center, dreward);
        trainer_metric(trainer, "loss", loss * (double)count, count);
        reward_metrics(trainer, task->eval_reward, pairs, count, NULL);
    }
}

static double reward_loss(struct Trainer *trainer, const size_t *index, size_t count, double weight,
                          bool train, bool eval) {
    struct RewardTask *task = trainer->task.data;
    struct GPT2 *model = trainer->model;
    struct Arena *arena = &trainer->arena;
    size_t each = task->rated || task->labelled ? 1 : 2;
    size_t texts = each * count;
    size_t pair_count = count;
    struct Example *examples = arena_alloc(arena, texts, sizeof *examples);
    bool in_batch = task->rated && !eval; /* texts are compared within their batch */
    struct Pair *pairs = arena_alloc(arena, in_batch ? count * count : count, sizeof *pairs);
    double *rating = arena_alloc(arena, count, sizeof *rating);
    for (size_t i = 0; i < count; i++) {
        rating[i] = task->number[eval][index[i]];
        pairs[i] = (struct Pair){i, count + i, rating[i]};
    }
    for (size_t t = 0; t < texts; t++) {
        struct Example *e = &examples[t];
        *e = task->texts[eval][each * index[t % count] + t / count];
        bool cut = train && task->prefix_share > 0 && e->n > 10
                   && rng_uniform(&task->cut) < task->prefix_share;
        if (cut)
            e->n = 8 + rng_below(&task->cut, e->n - 8);
    }
    if (in_batch)
        pair_count = pairs_from_ratings(rating, count, task->min_difference, pairs);
    if (pair_count == 0)
        return 0; /* a last batch of like ratings teaches nothing */
    struct Batch batch = collate(arena, examples, texts, READ_LAST);
    struct Activations acts = gpt2_forward(model, arena, &batch, train);
    int *row = arena_alloc(arena, texts, sizeof *row);
    float *reward = arena_floats(arena, texts);
    float *dreward = arena_floats(arena, texts);
    reward_rows(&batch, model->config.pad_token_id, row);
    scalar_head_forward(reward, acts.ln_f, row, texts, &model->score, NULL);
    trainer->state.num_tokens += batch.tokens;
    reward_text_metrics(trainer, reward, texts);
    if (task->rated && eval) { /* reward_rated_evaluated compares them */
        for (size_t i = 0; i < count; i++)
            task->eval_reward[index[i]] = reward[i];
        return 0;
    }
    double loss = task->labelled
                      ? sentiment_loss(reward, rating, count, dreward)
                      : bradley_terry_loss(reward, texts, pairs, pair_count, task->center, dreward);
    reward_metrics(trainer, reward, task->labelled ? NULL : pairs, pair_count, rating);
    if (eval)
        trainer_metric(trainer, "loss", loss * (double)pair_count, pair_count);
    if (!train)
        return loss * weight;
    for (size_t t = 0; t < texts; t++)
        dreward[t] *= (float)weight;
    float *dhidden = arena_zeros(arena, batch.N * model->config.n_embd, sizeof *dhidden);
    scalar_head_backward(dhidden, dreward, acts.ln_f, row, texts, &model->score, NULL);
    gpt2_backward(model, arena, &acts, dhidden);
    return loss * weight;
}

/* Are the two sides of a pair the same tokens? Then nobody preferred anything. */
static bool is_equal_pair(const struct Example pair[2]) {
    if (pair[0].n != pair[1].n)
        return false;
    return memcmp(pair[0].ids, pair[1].ids, pair[0].n * sizeof *pair[0].ids) == 0;
}

/* What is left to learn from must hold something to compare. */
static void reward_check(const struct Dataset *data, const double *number, size_t count) {
    bool is_pairs = data->shape == SHAPE_MARGIN;
    CHECK(count >= (is_pairs ? 1u : 2u),
          "%s: %zu %s are left; a pair or two texts are needed to compare", data->path, count,
          is_pairs ? "pairs" : "texts");
    double least = number[0];
    double most = number[0];
    for (size_t i = 0; i < count; i++) {
        least = MIN(least, number[i]);
        most = MAX(most, number[i]);
    }
    CHECK(data->shape != SHAPE_RATED || most - least >= 1,
          "%s: no two ratings differ by 1 or more, so there is nothing to compare; they go from %g "
          "to %g",
          data->path, least, most);
    if (data->shape == SHAPE_LABELLED && least == most) {
        warn("%s: every label is %g: a model that always says so is right", data->path, least);
    }
}

/* Rows as texts with end tokens, two a preference, and numbers. Half a text is no fair comparison:
 * what exceeds max_length is dropped. So are pairs of equal sides, which TRL keeps: their loss has
 * no gradient, and no model can be right about them, so they would only lower the accuracy. */
static size_t reward_texts(struct Trainer *trainer, struct Arena *arena, const struct Dataset *data,
                           int held_out) {
    struct RewardTask *task = trainer->task.data;
    const struct GPT2Config *config = &trainer->model->config;
    size_t count = 0;
    size_t equal = 0;
    size_t each = data->shape == SHAPE_MARGIN ? 2 : 1;
    struct Example *texts = task->texts[held_out] =
        arena_alloc(arena, each * data->n, sizeof *texts);
    double *number = task->number[held_out] = arena_alloc(arena, data->n, sizeof *number);
    for (size_t i = 0; i < data->n; i++) {
        const struct Row *row = &data->rows[i];
        struct Example *e = texts + each * count;
        for (size_t k = 0; k < each; k++) {
            struct Text text = each == 1
                                   ? row->text
                                   : text_join(arena, row->prompt, k ? row->rejected : row->chosen);
            const int *end_token = &config->eos_token_id;
            e[k] = example_encode(arena, trainer->tok, text, config->vocab_size, end_token);
        }
        if (each == 2 && is_equal_pair(e)) {
            equal++;
            continue;
        }
        if (MAX(e[0].n, e[each - 1].n) > trainer->args.max_length)
            continue;
        number[count++] = each == 2                       ? row->margin
                          : data->shape == SHAPE_LABELLED ? row->label
                                                          : row->score;
    }
    const char *what = each == 2 ? "pairs" : "texts";
    size_t too_long = data->n - count - equal;
    if (too_long) {
        warn("%s: %zu of %zu %s dropped: longer than %zu tokens (--max_length)", data->path,
             too_long, data->n, what, trainer->args.max_length);
    }
    if (equal) {
        warn("%s: %zu of %zu pairs are left out: chosen and rejected are the same", data->path,
             equal, data->n);
    }
    reward_check(data, number, count);
    return count;
}

static void reward_saved(struct Trainer *trainer, struct Checkpoint *checkpoint) {
    checkpoint_add(checkpoint, "cut", ((struct RewardTask *)trainer->task.data)->cut.s, 4,
                   UINT64_MAX);
}

static struct RewardTask *reward_task(struct Trainer *trainer, struct Arena *arena,
                                      const struct Dataset *data, const struct Dataset *eval) {
    struct RewardTask *task = arena_zeros(arena, 1, sizeof *task);
    *task = (struct RewardTask){
        .rated = data->shape == SHAPE_RATED,
        .labelled = data->shape == SHAPE_LABELLED,
        .min_difference = 1,
    };
    task->cut = rng_seed(trainer->args.seed, STREAM_CUT);
    trainer->task =
        (struct Task){.name = "reward", .data = task, .loss = reward_loss, .saved = reward_saved};
    trainer->task.n = reward_texts(trainer, arena, data, 0);
    trainer->task.eval_n = eval ? reward_texts(trainer, arena, eval, 1) : 0;
    if (task->rated)
        trainer->task.evaluated = reward_rated_evaluated;
    if (task->rated)
        task->eval_reward = arena_floats(arena, trainer->task.eval_n);
    return task;
}

/* reward_score -- r of n token sequences; an empty one is read as an end token. [glossary:
 * Pipeline de análise de sentimentos] */
static void reward_score(const struct GPT2 *model, const struct Example *texts, size_t n,
                         float *reward) {
    enum { TOGETHER = 32 };
    struct Arena arena = {0};
    int end = model->config.eos_token_id;
    int row[TOGETHER];
    struct Example empty = {&end, 1, 0};
    for (size_t first = 0; first < n; first += TOGETHER) {
        struct Example batch_texts[TOGETHER];
        size_t count = MIN(n - first, (size_t)TOGETHER);
        for (size_t i = 0; i < count; i++)
            batch_texts[i] = texts[first + i].n ? texts[first + i] : empty;
        arena_reset(&arena);
        struct Batch batch = collate(&arena, batch_texts, count, READ_LAST);
        struct Activations acts = gpt2_forward(model, &arena, &batch, false);
        reward_rows(&batch, model->config.pad_token_id, row);
        scalar_head_forward(reward + first, acts.ln_f, row, count, &model->score, NULL);
        check_numbers(model, &arena, &batch, "the reward of a text", reward + first, count);
    }
    arena_free(&arena);
}

/* =============================================================================================
 * Chapter 17 - Rollouts, REINFORCE, PPO              [glossary: Gradiente de política]
 *
 * Chapter 4 on a real model. A step of PPO, as TRL 0.11 takes it:
 *
 *     rollouts     the policy answers batch_size prompts; the reward model scores the answers
 *     ppo_step     1. scores are scaled and cut
 *                  2. policy and reference read the answers: log-probabilities, values
 *                  3. kl_reward: each token pays for its divergence, the last one gets the score
 *                  4. gae: advantages and returns; advantages are whitened
 *                  5. ppo_epochs passes over mini-batches: ppo_loss, backward, one Adam step each
 *                  6. statistics, in TRL's names
 *                  7. the KL controller moves beta
 *
 * From PPO's loss to the gradient of wte, in the order of the calls:
 *
 *     ppo_token_loss -> ppo_loss -> lm_head_backward (wte, as output layer) -> gpt2_backward ->
 *     layernorm_backward -> block_backward -> linear_backward, attention_backward ->
 *     embedding_backward (wte, as embedding)
 *
 * What enters: a policy, a frozen reference, prompts and a scorer, or stored rollouts. What
 * leaves: a policy that scores higher and stays near the reference.
 * ============================================================================================= */

/* A rollout: what was asked, what the policy answered, how it scored.        [glossary: Rollout] */
struct Rollout {
    struct Example example;
    size_t response_length;
    float score;
};

/* What turns a response into a score: the reward model, on the text of query and response. */
struct Scorer {
    const struct GPT2 *reward_model;
    const struct Tokenizer *tok;
    double mean, std; /* score = (reward - mean) / std */
    size_t least_length; /* a response that ends sooner scores at most short_score */
    double short_score;
};

/* Scores n sequences of a policy (query and response together): decoded to text, without the
 * policy's end token, and read by the reward model, as the lab's pipeline does. The two models may
 * have different vocabularies and end tokens. */
static void scorer_score(const struct Scorer *scorer, struct Arena *arena,
                         const struct Example *sequences, size_t n, const struct GPT2Config *policy,
                         float *score) {
    struct Example *texts = arena_alloc(arena, n, sizeof *texts);
    const struct GPT2Config *reader = &scorer->reward_model->config;
    for (size_t i = 0; i < n; i++) {
        const struct Example *e = &sequences[i];
        size_t length = e->n - example_ended(e, policy->eos_token_id);
        size_t V = policy->vocab_size;
        struct Text text = tokenizer_decode_all(scorer->tok, arena, e->ids, length, V);
        texts[i] = example_encode(arena, scorer->tok, text, reader->vocab_size, NULL);
        texts[i].n = MIN(texts[i].n, reader->n_positions);
    }
    reward_score(scorer->reward_model, texts, n, score);
    for (size_t i = 0; i < n; i++) {
        const struct Example *e = &sequences[i];
        bool is_short = e->n - e->prompt_length < scorer->least_length;
        bool ended_soon = is_short && example_ended(e, policy->eos_token_id);
        score[i] = (float)((score[i] - scorer->mean) / scorer->std);
        if (ended_soon)
            score[i] = (float)MIN(score[i], scorer->short_score);
    }
}

/* Where rollouts come from: prompts that the policy answers and the scorer judges, or stored
 * ones.  [glossary: Rollout] */
struct RolloutSource {
    const struct Example *prompts;
    size_t n;
    size_t *order, at; /* a shuffled pass over the prompts, renewed at its end */
    size_t room; /* new tokens that the longest prompt leaves in the context */
    struct Rng shuffle, lengths, sample; /* in a checkpoint one piece */
    struct LengthSampler output_length;
    struct GenerationConfig generation;
    struct Scorer scorer;
    const struct Dataset *replay; /* stored rollouts, or NULL */
};

static struct PPOConfig ppo_config(void) {
    return (struct PPOConfig){
        .baseline = BASELINE_VALUE_HEAD,
        .num_generations = 1,
        .batch_size = 128,
        .mini_batch_size = 128,
        .gradient_accumulation_steps = 1,
        .ppo_epochs = 4,
        .init_kl_coef = 0.2,
        .target = 6,
        .horizon = 10000,
        .gamma = 1,
        .lam = 0.95,
        .cliprange = 0.2,
        .cliprange_value = 0.2,
        .vf_coef = 0.1,
        .ratio_threshold = 10,
        .target_kl = 1,
        .adap_kl_ctrl = true,
        .kl_penalty = "kl",
    };
}

/* A vector of stats_all; with `start`, n of them, response by response. */
struct StatsVector {
    const char *name;
    const float *x;
    size_t n;
    const size_t *start;
};

/* Everything a training on rollouts owns: PPO, or REINFORCE with one of the other baselines.
 * [glossary: Treinador PPO]; its model is the policy  [glossary: Política π] */
struct PPOTrainer {
    struct GPT2 *model, *ref_model; /* the policy with its value head; the reference */
    struct PPOConfig config;
    struct TrainingArguments args;
    const struct Tokenizer *tok; /* goes with the model into checkpoints */
    double temperature; /* divides the logits of both */
    double kl_coef;
    struct RunningMoments moments; /* of scores; REINFORCE: of the R of earlier steps */
    struct Rng order;
    size_t optimizer_steps, step, total_steps;
    const char *name; /* in progress lines */
    struct Arena arena, epoch_arena;
    struct LogEntry stats; /* of the last step: a line of stats_all, */
    struct StatsVector vectors[10]; /* and its vectors */
    size_t vector_count, updated;
    float *advantages, *ratio; /* (ppo_epochs R), `updated` so far: of each token in each update */
};

static struct PPOTrainer *ppo_trainer_new(struct GPT2 *model, struct GPT2 *ref_model,
                                          struct PPOConfig config, struct TrainingArguments args,
                                          double temperature) {
    struct PPOTrainer *ppo = calloc(1, sizeof *ppo);
    CHECK(ppo, "out of memory");
    if (config.baseline == BASELINE_VALUE_HEAD)
        value_head_init(model, args.seed);
    gpt2_make_trainable(model);
    *ppo = (struct PPOTrainer){
        .model = model,
        .ref_model = ref_model,
        .config = config,
        .args = args,
        .temperature = temperature,
        .kl_coef = config.init_kl_coef,
        .moments = {0, 1, 1, 1e-24},
        .name = config.baseline == BASELINE_VALUE_HEAD ? "ppo" : "reinforce",
        .order = rng_seed(args.seed, STREAM_ORDER),
    };
    return ppo;
}

static double ppo_learning_rate(const struct PPOTrainer *ppo) {
    return ppo->args.learning_rate * schedule_factor(&ppo->args, ppo->step, ppo->total_steps);
}

static void ppo_trainer_free(struct PPOTrainer *ppo) {
    arena_free(&ppo->arena);
    arena_free(&ppo->epoch_arena);
    free(ppo);
}

/* The policy answers batch_size prompts and is scored. */
static void collect_rollouts(const struct PPOTrainer *ppo, struct RolloutSource *source,
                             struct Arena *arena, struct Rollout *rollouts) {
    size_t n = ppo->config.batch_size;
    struct Sequence *sequences = arena_alloc(arena, n, sizeof *sequences);
    const struct Example *prompt = NULL;
    for (size_t i = 0; i < n; i++) {
        if (i % ppo->config.num_generations == 0) {
            if (source->at == source->n)
                rng_shuffle(&source->shuffle, source->order, source->n);
            source->at %= source->n;
            prompt = &source->prompts[source->order[source->at++]];
        }
        struct Rng own = rng_seed(rng_next(&source->sample), STREAM_SAMPLE);
        size_t drawn = length_sampler(&source->output_length, &source->lengths);
        size_t max_new = MIN(drawn, ppo->model->config.n_positions - prompt->n);
        sequences[i] = sequence_start(arena, prompt->ids, prompt->n, max_new, ppo->model, own);
    }
    generate(ppo->model, sequences, n, &source->generation);
    struct Example *examples = arena_alloc(arena, n, sizeof *examples);
    float *score = arena_floats(arena, n);
    for (size_t i = 0; i < n; i++)
        examples[i] =
            (struct Example){sequences[i].ids, sequences[i].n, sequences[i].prompt_length};
    scorer_score(&source->scorer, arena, examples, n, &ppo->model->config, score);
    for (size_t i = 0; i < n; i++)
        rollouts[i] =
            (struct Rollout){examples[i], examples[i].n - examples[i].prompt_length, score[i]};
}

/* Stored rollouts, batch_size of them a step, in file order, round and round. */
static void replay_rollouts(const struct Dataset *data, size_t step, const struct GPT2 *model,
                            struct Arena *arena, struct Rollout *rollouts, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const struct Row *row = &data->rows[(step * n + i) % data->n];
        size_t length = row->query_length + row->response_length;
        CHECK(row->query_length > 0 && row->response_length > 0,
              "%s: rollout %zu has an empty query or response", data->path,
              (step * n + i) % data->n + 1);
        CHECK(length <= model->config.n_positions,
              "%s: rollout %zu has %zu tokens, the model's context is %zu", data->path,
              (step * n + i) % data->n + 1, length, model->config.n_positions);
        int *ids = arena_alloc(arena, length, sizeof *ids);
        memcpy(ids, row->query_ids, row->query_length * sizeof *ids);
        memcpy(ids + row->query_length, row->response_ids, row->response_length * sizeof *ids);
        for (size_t t = 0; t < length; t++)
            CHECK((size_t)ids[t] < model->config.vocab_size,
                  "%s: token id %d is outside the model's vocabulary of %zu", data->path, ids[t],
                  model->config.vocab_size);
        rollouts[i] = (struct Rollout){{ids, length, row->query_length},
                                       row->response_length,
                                       (float)row->score};
    }
}

/* d log pi(y_i) / d ln_f.bias, (n,C): of all weights the ones whose gradient every answer's own
 * can be had for nothing, the sum of d log pi / d hidden over its tokens. On them the variance
 * is measured. */
static float *reinforce_scores(struct PPOTrainer *ppo, struct LMHead *head,
                               const struct Batch *batch) {
    struct GPT2 view = *ppo->model;
    size_t C = view.config.n_embd;
    float *ones = arena_floats(&ppo->arena, head->R);
    float *dhidden = arena_zeros(&ppo->arena, batch->N * C, sizeof(float));
    float *s = arena_zeros(&ppo->arena, batch->B * C, sizeof(float));
    view.wte.d = NULL; /* a look, no gradient */
    for (size_t i = 0; i < head->R; i++)
        ones[i] = 1;
    lm_head_backward(&view, head, ones, dhidden, &ppo->arena);
    for (size_t b = 0; b < batch->B; b++)
        for (size_t i = batch->start[b]; i < batch->start[b + 1]; i++)
            for (size_t c = 0; c < C; c++)
                s[b * C + c] += dhidden[i * C + c];
    return s;
}

/* reinforce_step -- one step up the gradient from batch_size fresh rollouts.  test:
 * reinforce_step */
static void reinforce_step(struct PPOTrainer *ppo, const struct Rollout *rollouts) {
    static const char *const variance[] = {"gradient_variance/none", "gradient_variance/mean",
                                           "gradient_variance/rloo"};
    struct Arena *arena = &ppo->arena;
    size_t n = ppo->config.batch_size;
    size_t each = ppo->config.num_generations;
    arena_reset(arena);
    struct Example *examples = arena_alloc(arena, n, sizeof *examples);
    double *logps = arena_alloc(arena, 3 * n, sizeof *logps);
    double *ref_logps = logps + n;
    double *dlogps = ref_logps + n;
    double kl = 0;
    double score = 0;
    double length = 0;
    for (size_t i = 0; i < n; i++)
        examples[i] = rollouts[i].example;
    struct Batch batch = collate(arena, examples, n, SKIP_LAST);
    struct LMHead head = batch_logprobs(ppo->model, arena, &batch, ppo->temperature, true);
    struct LMHead ref_head = batch_logprobs(ppo->ref_model, arena, &batch, ppo->temperature, false);
    float *rewards = arena_floats(arena, n);
    float *s = reinforce_scores(ppo, &head, &batch);
    float *advantages[BASELINES];
    sum_target_logps(&batch, n, head.logprob, logps);
    sum_target_logps(&batch, n, ref_head.logprob, ref_logps);
    for (size_t i = 0; i < n; i++) {
        /* R(y_i), what is maximized */
        rewards[i] = (float)(rollouts[i].score - ppo->kl_coef * (logps[i] - ref_logps[i]));
        kl += kl_k1(logps[i], ref_logps[i]) / (double)n;
        score += rollouts[i].score / (double)n;
        length += (double)rollouts[i].response_length / (double)n;
    }
    ppo->stats.n = 0;
    for (int b = 0; b < (each > 1 ? BASELINES : BASELINE_RLOO); b++) {
        advantages[b] = arena_floats(arena, n);
        reinforce_advantages(b, rewards, n, each, ppo->moments.mean, advantages[b]);
        log_value(&ppo->stats, variance[b],
                  gradient_variance(advantages[b], s, n, ppo->model->config.n_embd));
    }
    double loss = reinforce_loss(advantages[ppo->config.baseline], logps, n, dlogps);
    target_logps_backward(ppo->model, arena, &batch, &head, n, dlogps, 1);
    check_finite(ppo->model, "the loss", loss);
    double lr = ppo_learning_rate(ppo);
    double norm = optimizer_step(ppo->model, &ppo->args, lr, ++ppo->step);
    running_moments_update(&ppo->moments, rewards, n);
    const char *const names[] = {"loss", "grad_norm", "learning_rate", "reward",
                                 "kl",   "objective", "entropy",       "completions/mean_length"};
    double values[] = {loss,
                       norm,
                       lr,
                       score,
                       kl,
                       mean_of(rewards, n),
                       (double)row_sum(head.entropy, batch.R) / (double)batch.R,
                       length};
    for (size_t i = 0; i < COUNT(names); i++)
        log_value(&ppo->stats, names[i], values[i]);
}

/* A forward pass of the policy over rollouts: the one that judges them serves the first update
 * too, if that is of all of them. */
struct PPOForward {
    struct Batch batch;
    struct LMHead head;
    float *values;
};

/* What PPO knows of a batch, one number a response token: R in all, those of response b at
 * start[b] .. start[b+1]-1. */
struct PPOBatch {
    size_t B, R, *start;
    size_t *padding; /* (B) columns by which a TRL row would be padded at its end */
    bool fresh; /* forward is of the policy as it is: no step was taken since */
    struct PPOForward *forward;
    float *logprobs, *ref_logprobs, *values, *kl, *non_score_rewards, *rewards, *advantages,
        *returns;
};

/* Step 4 of ppo_step: advantages and returns of every answer; then the advantages of the whole
 * batch are whitened, so that their scale does not depend on the reward model's.
 * By hand: values .5 .4 .3, rewards -.1 0 .98, gamma 1, lambda .95: before whitening the advantages
 * are .3187 .546 .68.                                              test: ppo_advantages_golden */
static void ppo_advantages(const struct PPOConfig *config, struct PPOBatch *p) {
    double padding_reward = config->whiten_rewards ? whiten(p->rewards, p->R, false) : 0;
    for (size_t b = 0; b < p->B; b++) {
        size_t start = p->start[b];
        size_t T = p->start[b + 1] - start;
        double behind = ppo_padding_advantage(config, padding_reward, p->padding[b]);
        gae(config, T, p->rewards + start, p->values + start, behind, p->advantages + start,
            p->returns + start);
    }
    whiten(p->advantages, p->R, true);
}

/* The scalars of one mini-batch, averaged over all mini-batches of all epochs into stats_all. */
enum PPOStat {
    LOSS_POLICY,
    LOSS_VALUE,
    LOSS_TOTAL,
    POLICY_ENTROPY,
    POLICY_APPROXKL,
    POLICY_POLICYKL,
    POLICY_CLIPFRAC,
    POLICY_ADVANTAGES_MEAN,
    POLICY_RATIO,
    RETURNS_MEAN,
    RETURNS_VAR,
    VAL_VPRED,
    VAL_ERROR,
    VAL_CLIPFRAC,
    VAL_MEAN,
    VAL_VAR,
    PPO_STATS
};
static const char *const PPO_STAT_NAMES[PPO_STATS] =
    {"ppo/loss/policy",       "ppo/loss/value",
     "ppo/loss/total",        "ppo/policy/entropy",
     "ppo/policy/approxkl",   "ppo/policy/policykl",
     "ppo/policy/clipfrac",   "ppo/policy/advantages_mean",
     "ppo/policy/ratio_mean", "ppo/returns/mean",
     "ppo/returns/var",       "ppo/val/vpred",
     "ppo/val/error",         "ppo/val/clipfrac",
     "ppo/val/mean",          "ppo/val/var"};

/* Scores of a batch -> what the rewards are made of: running scale, then clip. */
static void ppo_process_scores(struct PPOTrainer *ppo, float *scores, size_t n) {
    const struct PPOConfig *c = &ppo->config;
    if (c->use_score_scaling) {
        running_moments_update(&ppo->moments, scores, n);
        double divisor = ppo->moments.std + 1.1920929e-07;
        double shift = c->use_score_norm ? ppo->moments.mean : 0;
        for (size_t i = 0; i < n; i++)
            scores[i] = (float)((scores[i] - shift) / divisor);
    }
    if (c->score_clip > 0)
        for (size_t i = 0; i < n; i++)
            scores[i] = (float)MAX(-c->score_clip, MIN(c->score_clip, scores[i]));
}

/* Exact KL(policy || reference) at each row, for kl_penalty "full": both logits, chunk by chunk. */
static void kl_full_rows(const struct GPT2 *model, struct LMHead *head,
                         const struct GPT2 *ref_model, struct LMHead *ref_head, float *kl) {
    size_t V = model->config.vocab_size;
    for (size_t first = 0; first < head->R; first += head->chunk) {
        size_t n = lm_head_logits(model, head, first);
        lm_head_logits(ref_model, ref_head, first);
#pragma omp parallel for
        for (size_t i = 0; i < n; i++)
            kl[first + i] = (float)kl_exact(head->logits + i * V, head->lse[first + i],
                                            ref_head->logits + i * V, ref_head->lse[first + i], V);
    }
}

static struct PPOForward *ppo_forward(struct PPOTrainer *ppo, struct Arena *arena,
                                      const struct Example *examples, size_t n, bool keep) {
    struct PPOForward *f = arena_alloc(arena, 1, sizeof *f);
    f->batch = collate(arena, examples, n, SKIP_LAST);
    f->head = batch_logprobs(ppo->model, arena, &f->batch, ppo->temperature, keep);
    f->values = arena_floats(arena, f->batch.R);
    scalar_head_forward(f->values, f->head.acts.ln_f, f->batch.row, f->batch.R,
                        &ppo->model->v_head.weight, &ppo->model->v_head.bias);
    return f;
}

/* Step 2 of ppo_step: one pass of policy and reference over queries and responses. */
static struct PPOBatch ppo_evaluate_rollouts(struct PPOTrainer *ppo,
                                             const struct Rollout *rollouts) {
    size_t B = ppo->config.batch_size;
    struct Arena *arena = &ppo->arena;
    struct Example *examples = arena_alloc(arena, B, sizeof *examples);
    for (size_t b = 0; b < B; b++)
        examples[b] = rollouts[b].example;
    bool fresh = ppo->config.mini_batch_size == B;
    struct PPOForward *f = ppo_forward(ppo, arena, examples, B, fresh);
    struct LMHead ref_head =
        batch_logprobs(ppo->ref_model, arena, &f->batch, ppo->temperature, false);
    struct PPOBatch p = {
        .B = B,
        .R = f->batch.R,
        .start = f->batch.target_start,
        .fresh = fresh,
        .forward = f,
        .values = f->values,
    };
    float **columns[] = {&p.logprobs, &p.kl,         &p.non_score_rewards,
                         &p.rewards,  &p.advantages, &p.returns};
    for (size_t i = 0; i < COUNT(columns); i++)
        *columns[i] = arena_floats(arena, p.R);
    if (strcmp(ppo->config.kl_penalty, "full") == 0)
        kl_full_rows(ppo->model, &f->head, ppo->ref_model, &ref_head, p.kl);
    memcpy(p.logprobs, f->head.logprob, p.R * sizeof(float));
    p.ref_logprobs = ref_head.logprob;
    p.padding = arena_alloc(arena, B, sizeof *p.padding);
    for (size_t b = 0; b < B; b++)
        p.padding[b] = f->batch.max_length + 1 - examples[b].n;
    return p;
}

/* Step 3 of ppo_step: the reward of every token. Each pays for its own divergence from the
 * reference; the last token of an answer gets the answer's score as well.
 *   reward_t = -beta kl_t,   reward_last += score                 test: ppo_penalties_golden */
static void ppo_rewards(const struct PPOTrainer *ppo, struct PPOBatch *p, const float *scores) {
    for (size_t t = 0; t < p->R; t++) {
        p->kl[t] =
            kl_penalty_token(ppo->config.kl_penalty, p->logprobs[t], p->ref_logprobs[t], p->kl[t]);
        p->non_score_rewards[t] = kl_reward(ppo->kl_coef, p->kl[t]);
        p->rewards[t] = p->non_score_rewards[t];
    }
    for (size_t b = 0; b < p->B; b++) {
        size_t last = p->start[b + 1] - 1;
        p->rewards[last] += scores[b];
    }
}

/* What is known of some answers of the batch, their tokens side by side.
 * member (count): which answers; logprobs, values: of the policy now */
static struct PPOTokens ppo_gather(struct Arena *arena, const struct PPOBatch *p,
                                   const size_t *member, size_t count,
                                   const struct PPOForward *forward) {
    size_t R = forward->batch.R;
    struct PPOTokens tokens = {
        .old_logprobs = arena_floats(arena, R),
        .old_values = arena_floats(arena, R),
        .advantages = arena_floats(arena, R),
        .returns = arena_floats(arena, R),
        .logprobs = forward->head.logprob,
        .values = forward->values,
        .policy = arena_alloc(arena, R, sizeof *tokens.policy),
        .value = arena_alloc(arena, R, sizeof *tokens.value),
        .dlogprobs = arena_floats(arena, R),
        .dvalues = arena_floats(arena, R),
    };
    for (size_t i = 0; i < count; i++)
        for (size_t t = p->start[member[i]]; t < p->start[member[i] + 1]; t++) {
            tokens.old_logprobs[tokens.R] = p->logprobs[t];
            tokens.old_values[tokens.R] = p->values[t];
            tokens.advantages[tokens.R] = p->advantages[t];
            tokens.returns[tokens.R] = p->returns[t];
            tokens.R++;
        }
    return tokens;
}

/* The statistics of a mini-batch in TRL's names: means over its tokens. */
static void ppo_statistics(const struct PPOTokens *tokens, struct PPOLoss loss,
                           double stats[PPO_STATS]) {
    double n = (double)tokens->R;
    for (int i = 0; i < PPO_STATS; i++)
        stats[i] = 0;
    stats[LOSS_POLICY] = loss.policy;
    stats[LOSS_VALUE] = loss.value;
    stats[LOSS_TOTAL] = loss.total;
    for (size_t t = 0; t < tokens->R; t++) {
        double log_ratio = (double)tokens->logprobs[t] - tokens->old_logprobs[t];
        stats[POLICY_APPROXKL] += 0.5 * log_ratio * log_ratio / n;
        stats[POLICY_POLICYKL] += -log_ratio / n;
        stats[POLICY_CLIPFRAC] += tokens->policy[t].is_clipped / n;
        stats[POLICY_ADVANTAGES_MEAN] += tokens->advantages[t] / n;
        stats[POLICY_RATIO] += tokens->policy[t].ratio / n;
        stats[RETURNS_MEAN] += tokens->returns[t] / n;
        stats[VAL_VPRED] += tokens->values[t] / n;
        stats[VAL_ERROR] += tokens->value[t].squared_error / n;
        stats[VAL_CLIPFRAC] += tokens->value[t].is_clipped / n;
        stats[VAL_MEAN] += tokens->old_values[t] / n;
    }
    /* variances need the means first */
    for (size_t t = 0; t < tokens->R && tokens->R > 1; t++) {
        double dreturn = tokens->returns[t] - stats[RETURNS_MEAN];
        double dvalue = tokens->old_values[t] - stats[VAL_MEAN];
        stats[RETURNS_VAR] += dreturn * dreturn / (n - 1);
        stats[VAL_VAR] += dvalue * dvalue / (n - 1);
    }
}

/* For stats_all: the advantage and the ratio of each token in each update. */
static void ppo_keep_ratios(struct PPOTrainer *ppo, const struct PPOTokens *tokens) {
    for (size_t t = 0; ppo->ratio && t < tokens->R; t++, ppo->updated++) {
        ppo->advantages[ppo->updated] = tokens->advantages[t];
        ppo->ratio[ppo->updated] = expf(tokens->logprobs[t] - tokens->old_logprobs[t]);
    }
}

/* Scales a mini-batch's slopes by its weight in the step; if the policy ran away, whose ratios are
 * then absurd on average, to nothing: the mini-batch is skipped, as in TRL. */
static void ppo_weigh(const struct PPOTrainer *ppo, struct PPOTokens *tokens, double weight,
                      double stats[PPO_STATS]) {
    bool absurd = stats[POLICY_RATIO] > ppo->config.ratio_threshold;
    if (absurd) {
        warn("ppo: step %zu: the mean probability ratio %.1f exceeds --ratio_threshold %.1f; this "
             "mini-batch is skipped",
             ppo->step, stats[POLICY_RATIO], ppo->config.ratio_threshold);
        stats[LOSS_POLICY] = stats[LOSS_VALUE] = stats[LOSS_TOTAL] = 0;
    }
    for (size_t t = 0; t < tokens->R; t++) {
        tokens->dlogprobs[t] = absurd ? 0 : (float)(tokens->dlogprobs[t] * weight);
        tokens->dvalues[t] = absurd ? 0 : (float)(tokens->dvalues[t] * weight);
    }
}

/* ppo_mini_batch -- forward and backward over some answers of the batch; gradients are added with
 * `weight`.       member (count): which answers         out  stats      test: ppo_gradient */
static void ppo_mini_batch(struct PPOTrainer *ppo, const struct Rollout *rollouts,
                           const struct PPOBatch *p, const size_t *member, size_t count,
                           double weight, double stats[PPO_STATS]) {
    struct GPT2 *model = ppo->model;
    struct Arena *arena = &ppo->epoch_arena;
    arena_reset(arena);

    /* 1. What does the policy say of these answers now? Before the first update of all answers at
     *    once, that is what it said when it wrote them: no second pass is needed. */
    struct Example *examples = arena_alloc(arena, count, sizeof *examples);
    for (size_t i = 0; i < count; i++)
        examples[i] = rollouts[member[i]].example;
    struct PPOForward *forward = p->forward;
    if (!p->fresh)
        forward = ppo_forward(ppo, arena, examples, count, true);

    /* 2. the loss of each token, and its slopes */
    struct PPOTokens tokens = ppo_gather(arena, p, member, count, forward);
    struct PPOLoss loss = ppo_loss(&ppo->config, &tokens);
    ppo_statistics(&tokens, loss, stats);
    stats[POLICY_ENTROPY] = (double)row_sum(forward->head.entropy, tokens.R) / (double)tokens.R;
    ppo_keep_ratios(ppo, &tokens);
    ppo_weigh(ppo, &tokens, weight, stats);

    /* 3. Back through the model: both heads stand on the same hidden vectors, so their slopes are
     *    added up in dhidden before the blocks are passed through once. */
    float *dhidden = arena_zeros(arena, forward->batch.N * model->config.n_embd, sizeof *dhidden);
    lm_head_backward(model, &forward->head, tokens.dlogprobs, dhidden, arena);
    scalar_head_backward(dhidden, tokens.dvalues, forward->head.acts.ln_f, forward->batch.row,
                         tokens.R, &model->v_head.weight, &model->v_head.bias);
    gpt2_backward(model, arena, &forward->head.acts, dhidden);
}

/* Step 5 of ppo_step: ppo_epochs passes over the batch, in mini-batches of a new order. Returns
 * how many; their statistics are summed. */
static size_t ppo_optimize(struct PPOTrainer *ppo, const struct Rollout *rollouts,
                           struct PPOBatch *p, double sums[PPO_STATS]) {
    const struct PPOConfig *c = &ppo->config;
    size_t B = c->batch_size;
    size_t *order = arena_alloc(&ppo->arena, B, sizeof *order);
    size_t mini_batches = 0;
    size_t per_step = c->mini_batch_size * c->gradient_accumulation_steps;
    double stats[PPO_STATS] = {0};
    ppo->advantages = arena_floats(&ppo->arena, c->ppo_epochs * p->R);
    ppo->ratio = arena_floats(&ppo->arena, c->ppo_epochs * p->R);
    ppo->updated = 0;
    for (size_t epoch = 0; epoch < c->ppo_epochs; epoch++) {
        for (size_t b = 0; b < B; b++)
            order[b] = b;
        /* one mini-batch of all: its order is only rounding */
        if (per_step < B)
            rng_shuffle(&ppo->order, order, B);
        for (size_t first = 0; first < B; first += per_step) {
            for (size_t mini = first; mini < first + per_step;
                 mini += c->mini_batch_size, mini_batches++) {
                ppo_mini_batch(ppo, rollouts, p, order + mini, c->mini_batch_size,
                               1 / (double)c->gradient_accumulation_steps, stats);
                check_finite(ppo->model, "the loss", stats[LOSS_TOTAL]);
                for (int i = 0; i < PPO_STATS; i++)
                    sums[i] += stats[i];
            }
            optimizer_step(ppo->model, &ppo->args, ppo_learning_rate(ppo), ++ppo->optimizer_steps);
            p->fresh = false;
        }
        /* the last mini-batch decides */
        if (c->early_stopping && stats[POLICY_POLICYKL] > 1.5 * c->target_kl)
            break;
    }
    return mini_batches;
}

static void stats_vector(struct PPOTrainer *ppo, const char *name, const float *x, size_t n,
                         const size_t *start) {
    ppo->vectors[ppo->vector_count++] = (struct StatsVector){name, x, n, start};
}

/* One number a rollout: mean, deviation, and all of them. */
static void stats_of(struct PPOTrainer *ppo, const char *mean_name, const char *std_name,
                     const char *name, const float *x, size_t n) {
    log_value(&ppo->stats, mean_name, mean_of(x, n));
    log_value(&ppo->stats, std_name, n > 1 ? sqrt(unbiased_variance(x, n)) : NAN);
    if (name)
        stats_vector(ppo, name, x, n, NULL);
}

/* Step 6: TRL's stats dictionary; of its padded matrices the response tokens are kept.
 * [glossary: Stats_all] */
static void ppo_record_stats(struct PPOTrainer *ppo, const struct Rollout *rollouts,
                             const struct PPOBatch *p, const float *scores,
                             const double sums[PPO_STATS], size_t mini_batches) {
    struct LogEntry *s = &ppo->stats;
    size_t B = p->B;
    float *query = arena_floats(&ppo->arena, B);
    float *response = arena_floats(&ppo->arena, B);
    float *reward = arena_floats(&ppo->arena, B);
    float *kl_dist = arena_zeros(&ppo->arena, B, sizeof *kl_dist);
    double kl = 0;
    double k3 = 0;
    double entropy = 0;
    double non_score = 0;
    for (size_t b = 0; b < B; b++) {
        reward[b] = rollouts[b].score;
        query[b] = (float)rollouts[b].example.prompt_length;
        response[b] = (float)rollouts[b].response_length;
        for (size_t t = p->start[b]; t < p->start[b + 1]; t++)
            kl_dist[b] += p->kl[t];
    }
    for (size_t t = 0; t < p->R; t++) {
        kl += p->kl[t] / (double)B;
        k3 += kl_k3(p->logprobs[t], p->ref_logprobs[t]) / (double)B;
        entropy -= p->logprobs[t] / (double)B;
        non_score += p->non_score_rewards[t] / (double)p->R;
    }
    s->n = ppo->vector_count = 0;
    const struct {
        const char *name;
        double value;
    } values[] = {{"objective/kl", kl},
                  {"objective/kl_k3", k3 /* not TRL's: the estimate that is never negative */},
                  {"objective/kl_coef", ppo->kl_coef},
                  {"objective/entropy", entropy},
                  {"ppo/mean_non_score_reward", non_score},
                  {"ppo/learning_rate", ppo_learning_rate(ppo)},
                  {"ppo/val/var_explained", 1 - sums[VAL_ERROR] / sums[RETURNS_VAR]}};
    for (size_t i = 0; i < COUNT(values); i++)
        log_value(s, values[i].name, values[i].value);
    stats_of(ppo, "env/reward_mean", "env/reward_std", "env/reward_dist", reward, B);
    stats_of(ppo, "ppo/mean_scores", "ppo/std_scores", NULL, scores, B);
    stats_of(ppo, "tokens/queries_len_mean", "tokens/queries_len_std", "tokens/queries_dist", query,
             B);
    stats_of(ppo, "tokens/responses_len_mean", "tokens/responses_len_std", "tokens/responses_dist",
             response, B);
    for (int i = 0; i < PPO_STATS; i++)
        if (i != POLICY_RATIO)
            log_value(s, PPO_STAT_NAMES[i], sums[i] / (double)mini_batches);
    stats_vector(ppo, "objective/kl_dist", kl_dist, B, NULL);
    stats_vector(ppo, "objective/logprobs", p->logprobs, B, p->start);
    stats_vector(ppo, "objective/ref_logprobs", p->ref_logprobs, B, p->start);
    stats_vector(ppo, "ppo/policy/advantages", ppo->advantages, ppo->updated, NULL);
    stats_vector(ppo, "ppo/policy/ratio", ppo->ratio, ppo->updated, NULL);
}

/* ppo_step -- PPOTrainer.step(queries, responses, scores).        [glossary: Treinador PPO]
 * rollouts: batch_size of them. Leaves ppo->stats.         test: ppo_step, check_fidelity ppo* */
static void ppo_step(struct PPOTrainer *ppo, const struct Rollout *rollouts) {
    size_t B = ppo->config.batch_size;
    double begin = seconds_now();
    double sums[PPO_STATS] = {0};
    arena_reset(&ppo->arena);
    float *scores = arena_floats(&ppo->arena, B);
    for (size_t b = 0; b < B; b++)
        scores[b] = rollouts[b].score;
    ppo_process_scores(ppo, scores, B); /* 1. scale and clip */
    struct PPOBatch p = ppo_evaluate_rollouts(ppo, rollouts); /* 2. log-probabilities, values */
    double evaluated = seconds_now();
    ppo_rewards(ppo, &p, scores); /* 3. penalty and score a token */
    double rewarded = seconds_now();
    ppo_advantages(&ppo->config, &p); /* 4. advantages and returns */
    double advantages = seconds_now();
    size_t mini_batches = ppo_optimize(ppo, rollouts, &p, sums); /* 5. epochs of clipped updates */
    double optimized = seconds_now();
    double kl;
    ppo_record_stats(ppo, rollouts, &p, scores, sums, mini_batches); /* 6. statistics */
    log_find(&ppo->stats, "objective/kl", &kl);
    ppo->kl_coef = kl_controller_update(&ppo->config, ppo->kl_coef, kl, B); /* 7. KL controller */
    ppo->step++;
    double end = seconds_now();
    double times[] = {evaluated - begin,      rewarded - evaluated, advantages - rewarded,
                      optimized - advantages, end - optimized,      end - begin};
    static const char *const names[] = {"time/ppo/forward_pass",       "time/ppo/compute_rewards",
                                        "time/ppo/compute_advantages", "time/ppo/optimize_step",
                                        "time/ppo/calc_stats",         "time/ppo/total"};
    for (size_t i = 0; i < COUNT(times); i++)
        log_value(&ppo->stats, names[i], times[i]);
}

/* ppo_train -- rollouts, step, log (to log_dir, or NULL), again, by PPO or REINFORCE.
 * [glossary: Treinador PPO] */
static void ppo_train(struct PPOTrainer *ppo, struct RolloutSource *source, size_t steps,
                      const char *log_dir, struct TrainerState *state) {
    struct Arena arena = {0};
    struct Output logs[2];
    size_t B = ppo->config.batch_size;
    size_t n = source->replay ? source->replay->n : source->n;
    state->max_steps = ppo->total_steps = steps;
    struct Checkpoint checkpoint =
        checkpoint_new(ppo->name, ppo->model, ppo->tok, &ppo->args, state);
    if (log_dir) {
        make_folder(log_dir);
        checkpoint.logs = logs;
        checkpoint.log_dir = log_dir;
        checkpoint_add(&checkpoint, "log_bytes", checkpoint.log_bytes, COUNT(LOGS), UINT64_MAX);
    }
    checkpoint_add_fixed(&checkpoint, "batch_size", &B, "--batch_size");
    checkpoint_add_doubles(&checkpoint, "kl_coef", &ppo->kl_coef, 1);
    size_t moments = sizeof ppo->moments / sizeof(double);
    checkpoint_add_doubles(&checkpoint, "moments", &ppo->moments, moments);
    checkpoint_add(&checkpoint, "optimizer_steps", &ppo->optimizer_steps, 1, UINT64_MAX);
    checkpoint_add(&checkpoint, "mini_batches", ppo->order.s, 4, UINT64_MAX);
    checkpoint_add_fixed(&checkpoint, "prompts", &source->n, "the number of prompts");
    checkpoint_add(&checkpoint, "order", source->order, source->n, source->n - 1);
    checkpoint_add(&checkpoint, "at", &source->at, 1, source->n);
    checkpoint_add(&checkpoint, "random", (char *)source + offsetof(struct RolloutSource, shuffle),
                   3 * 4, UINT64_MAX);
    checkpoint_resume(&checkpoint);
    ppo->step = state->global_step;
    while (ppo->step < steps) {
        arena_reset(&arena);
        double begin = seconds_now();
        struct Rollout *rollouts = arena_alloc(&arena, B, sizeof *rollouts);
        ppo->model->trace.task = ppo->name;
        ppo->model->trace.step = ppo->step + 1;
        if (source->replay)
            replay_rollouts(source->replay, ppo->step, ppo->model, &arena, rollouts, B);
        else
            collect_rollouts(ppo, source, &arena, rollouts);
        double rolled = seconds_now();
        if (ppo->config.baseline == BASELINE_VALUE_HEAD)
            ppo_step(ppo, rollouts);
        else
            reinforce_step(ppo, rollouts);
        if (log_dir) {
            log_value(&ppo->stats, "time/ppo/rollout", rolled - begin);
            stats_write_line(logs[0].file, ppo);
            rollouts_write(logs[1].file, rollouts, B);
            for (int i = 0; i < 2; i++)
                output_flush(&logs[i]);
        }
        state->global_step = ppo->step;
        state->epoch = (double)(ppo->step * B / ppo->config.num_generations) / (double)n;
        for (size_t b = 0; b < B; b++)
            state->num_tokens += rollouts[b].example.n;
        bool last = ppo->step == steps;
        bool log = ppo->step % ppo->args.logging_steps == 0 || last;
        const char *score = arena_printf(&arena, "%+.2f  ", rollouts->score);
        if (progress_sampling(ppo->step, steps))
            sample_show(ppo->tok, &rollouts->example, ppo->model->config.vocab_size, score);
        state_say(state, ppo->name, &ppo->stats,
                  ppo->args.say_steps ? ppo->step % ppo->args.say_steps == 0 || last : log);
        log_value(&ppo->stats, "step", (double)ppo->step);
        log_value(&ppo->stats, "epoch", state->epoch);
        if (log)
            *state_log(state) = ppo->stats;
        checkpoint_step(&checkpoint);
    }
    for (int i = 0; log_dir && i < 2; i++)
        output_close(&logs[i]);
    state->num_train_epochs = ceil(state->epoch);
    arena_free(&arena);
}

/* =============================================================================================
 * Chapter 18 - DPO, collected preferences
 *                              [glossary: Otimização de preferência direta (DPO)]
 *
 * Chapter 5 on a real model. The reference's log-probabilities never change, so they are computed
 * once for each pair; the policy's are computed at every step, and only they have a gradient. A
 * pair shares its prompt, which is computed once where that saves time.
 *
 * What enters: pairs of answers, one preferred; or a policy and a scorer, from whose answers pairs
 * are collected. What leaves: a policy that prefers as the pairs do.
 * ============================================================================================= */

struct DPOTask {
    struct DPOConfig config;
    struct GPT2 *ref_model;
    struct Example *pairs[2]; /* to learn from, held out; 2i chosen, 2i+1 rejected */
    double *ref_logps[2]; /* (2n) 0 until first needed: computed once, used in every epoch */
    double temperature;
    double eval_nll; /* of the held-out chosen answers, */
    size_t eval_tokens; /* and their tokens: the loss type sft is a mean over tokens */
};

/* Pairs as a batch: all chosen, then all rejected. slot (2B): where each stands among the pairs. */
static struct Batch dpo_batch(struct Arena *arena, const struct Example *pairs, const size_t *index,
                              size_t B, size_t C, size_t *slot) {
    struct Example *examples = arena_alloc(arena, 2 * B, sizeof *examples);
    for (size_t i = 0; i < 2 * B; i++) {
        slot[i] = 2 * index[i % B] + i / B;
        examples[i] = pairs[slot[i]];
    }
    return collate_pairs(arena, examples, B, C);
}

/* Puts the reference's log-probabilities of B pairs in the cache, if it lacks them. The arena
 * comes and goes empty. */
static void dpo_reference(struct DPOTask *task, struct Arena *arena, const struct Example *pairs,
                          const size_t *index, size_t B, double *cache) {
    bool known = true;
    for (size_t i = 0; i < B; i++)
        known = known && cache[2 * index[i]] != 0;
    if (known)
        return;
    size_t *slot = arena_alloc(arena, 2 * B, sizeof *slot);
    double *logps = arena_alloc(arena, 2 * B, sizeof *logps);
    struct Batch batch = dpo_batch(arena, pairs, index, B, task->ref_model->config.n_embd, slot);
    struct LMHead head = batch_logprobs(task->ref_model, arena, &batch, task->temperature, false);
    sum_target_logps(&batch, 2 * B, head.logprob, logps);
    for (size_t i = 0; i < 2 * B; i++)
        cache[slot[i]] = logps[i];
    arena_reset(arena);
}

/* TRL's metrics of B pairs: sums, and how many pairs or tokens they are sums over. */
static void dpo_metrics(struct Trainer *trainer, const struct DPOTask *task,
                        const struct Batch *batch, const struct LMHead *head, size_t B,
                        const struct DPOSide *chosen, const struct DPOSide *rejected) {
    double rewards_chosen = 0;
    double rewards_rejected = 0;
    double right = 0;
    double logps_chosen = 0;
    double logps_rejected = 0;
    for (size_t b = 0; b < B; b++) {
        double beta = task->config.beta;
        double reward_chosen = implied_reward(beta, chosen[b].logp, chosen[b].ref_logp);
        double reward_rejected = implied_reward(beta, rejected[b].logp, rejected[b].ref_logp);
        rewards_chosen += reward_chosen;
        rewards_rejected += reward_rejected;
        right += reward_chosen > reward_rejected;
        logps_chosen += chosen[b].logp;
        logps_rejected += rejected[b].logp;
    }
    /* tokens of chosen answers, then of rejected ones */
    size_t split = batch->target_start[B];
    size_t rest = batch->R - split;
    const struct {
        const char *name;
        double sum;
        size_t units;
    } metrics[] = {
        {"rewards/chosen", rewards_chosen, B},
        {"rewards/rejected", rewards_rejected, B},
        {"rewards/accuracies", right, B},
        {"rewards/margins", rewards_chosen - rewards_rejected, B},
        {"logps/chosen", logps_chosen, B},
        {"logps/rejected", logps_rejected, B},
        {"logits/chosen", row_sum(head->mean_logit, split), split},
        {"logits/rejected", row_sum(head->mean_logit + split, rest), rest},
        {"entropy", row_sum(head->entropy, batch->R), batch->R},
        {"mean_token_accuracy", row_sum(head->hit, split), split},
    };
    for (size_t i = 0; i < COUNT(metrics); i++)
        trainer_metric(trainer, metrics[i].name, metrics[i].sum, metrics[i].units);
}

/* The loss of held-out pairs is a mean over pairs, but its part of the loss type sft one over the
 * chosen answers' tokens: that is added by dpo_evaluated, when all of them are known. */
static void dpo_eval_loss(struct Trainer *trainer, struct DPOTask *task, size_t B,
                          struct DPOSide *chosen, struct DPOSide *rejected) {
    struct DPOConfig config = task->config;
    config.weight[DPO_SFT] = 0;
    double loss = dpo_loss(&config, B, chosen, rejected);
    trainer_metric(trainer, "loss", loss * (double)B, B);
    for (size_t b = 0; b < B; b++) {
        task->eval_nll -= chosen[b].logp;
        task->eval_tokens += chosen[b].length;
    }
}

static void dpo_evaluated(struct Trainer *trainer) {
    struct DPOTask *task = trainer->task.data;
    double nll = task->eval_nll / (double)MAX((size_t)1, task->eval_tokens);
    double pairs = (double)trainer->task.eval_n; /* the sum will be divided by them */
    trainer_metric(trainer, "loss", task->config.weight[DPO_SFT] * nll * pairs, 0);
    task->eval_nll = 0;
    task->eval_tokens = 0;
}

/* What DPO needs of 2B answers, the chosen ones first: their log-probabilities now, and the
 * reference's, from the cache. */
static struct DPOSide *dpo_sides(struct Arena *arena, const struct Batch *batch,
                                 const float *token_logprobs, const double *ref_logps, size_t B) {
    double *logps = arena_alloc(arena, 2 * B, sizeof *logps);
    struct DPOSide *sides = arena_alloc(arena, 2 * B, sizeof *sides);
    sum_target_logps(batch, 2 * B, token_logprobs, logps);
    for (size_t i = 0; i < 2 * B; i++)
        sides[i] = (struct DPOSide){
            .logp = logps[i],
            .ref_logp = ref_logps[i],
            .length = batch->target_start[i + 1] - batch->target_start[i],
        };
    return sides;
}

/* dpo_task_loss -- DPO's loss of some pairs, for the Trainer; in training with its gradient.
 *                                              test: dpo_model_gradient, check_fidelity dpo* */
static double dpo_task_loss(struct Trainer *trainer, const size_t *index, size_t B, double weight,
                            bool train, bool eval) {
    struct DPOTask *task = trainer->task.data;
    struct GPT2 *model = trainer->model;
    struct Arena *arena = &trainer->arena;
    const struct Example *pairs = task->pairs[eval];

    /* 1. the reference's log-probabilities: computed when a pair is seen for the first time */
    dpo_reference(task, arena, pairs, index, B, task->ref_logps[eval]);
    size_t *slot = arena_alloc(arena, 2 * B, sizeof *slot);
    struct Batch batch = dpo_batch(arena, pairs, index, B, model->config.n_embd, slot);
    double *ref_logps = arena_alloc(arena, 2 * B, sizeof *ref_logps);
    for (size_t i = 0; i < 2 * B; i++)
        ref_logps[i] = task->ref_logps[eval][slot[i]];

    /* 2. the policy's, and the loss */
    struct LMHead head = batch_logprobs(model, arena, &batch, task->temperature, train);
    struct DPOSide *chosen = dpo_sides(arena, &batch, head.logprob, ref_logps, B);
    struct DPOSide *rejected = chosen + B;
    if (eval)
        dpo_eval_loss(trainer, task, B, chosen, rejected);
    double loss = dpo_loss(&task->config, B, chosen, rejected);
    trainer->state.num_tokens += batch.tokens;
    dpo_metrics(trainer, task, &batch, &head, B, chosen, rejected);
    if (!train)
        return loss * weight;

    /* 3. the way back: each token of an answer gets the slope of the answer's log-probability */
    double *dlogps = arena_alloc(arena, 2 * B, sizeof *dlogps);
    for (size_t i = 0; i < 2 * B; i++)
        dlogps[i] = chosen[i].dlogp;
    target_logps_backward(model, arena, &batch, &head, 2 * B, dlogps, weight);
    return loss * weight;
}

/* The two sides of a pair, whole: prompt of its own or the answers' common beginning, end tokens,
 * one split for both, the shorter of the two common prefixes with the prompt's ids. */
static void dpo_pair_encode(const struct Trainer *trainer, struct Arena *arena, struct Row row,
                            struct Example pair[2]) {
    size_t V = trainer->model->config.vocab_size;
    const int *end_token = &trainer->model->config.eos_token_id;
    if (!(row.has & HAS_PROMPT))
        split_implicit_prompt(&row);
    pair[0] = example_prompt_completion(arena, trainer->tok, row.prompt, row.chosen, V, end_token);
    pair[1] =
        example_prompt_completion(arena, trainer->tok, row.prompt, row.rejected, V, end_token);
    size_t prompt_length = MIN(pair[0].prompt_length, pair[1].prompt_length);
    pair[0].prompt_length = pair[1].prompt_length = prompt_length;
}

/* How many of a data set's pairs could not be used as they are. */
struct PairCounts {
    size_t dropped, cut, equal, equal_by_cut;
};

static void dpo_pairs_say(const struct Dataset *data, size_t max_length, struct PairCounts n) {
    const char *path = data->path;
    if (n.dropped) {
        warn("%s: %zu of %zu pairs dropped: the prompt alone has %zu tokens or more (--max_length)",
             path, n.dropped, data->n, max_length);
    }
    if (n.cut) {
        warn("%s: %zu of %zu pairs were cut to their first %zu tokens (--max_length)", path, n.cut,
             data->n, max_length);
    }
    if (n.equal) {
        warn("%s: %zu of %zu pairs are left out: chosen and rejected are the same", path, n.equal,
             data->n);
    }
    if (n.equal_by_cut) {
        warn("%s: %zu of %zu pairs are left out: chosen and rejected are the same up to the cut at "
             "%zu tokens (--max_length)",
             path, n.equal_by_cut, data->n, max_length);
    }
}

/* TRL's preparation: pairs without a completion inside max_length are dropped; the rest keep their
 * first max_length ids. Ours alone: pairs whose sides are the same, in the data or since the cut,
 * are left out. Their loss is a constant (sigmoid: ln 2) and has no gradient; only the sft loss
 * learns from them, and with it they stay. */
static size_t dpo_pairs(const struct Trainer *trainer, struct Arena *arena,
                        const struct Dataset *data, const struct DPOConfig *config,
                        struct Example *pairs) {
    struct PairCounts counts = {0};
    size_t count = 0;
    size_t max_length = trainer->args.max_length;
    bool keeps_equal = config->weight[DPO_SFT] > 0;
    for (size_t i = 0; i < data->n; i++) {
        struct Example *pair = pairs + 2 * count;
        dpo_pair_encode(trainer, arena, data->rows[i], pair);
        if (pair[0].prompt_length >= max_length) {
            counts.dropped++;
            continue;
        }
        bool was_equal = is_equal_pair(pair);
        counts.cut += MAX(pair[0].n, pair[1].n) > max_length;
        pair[0].n = MIN(pair[0].n, max_length);
        pair[1].n = MIN(pair[1].n, max_length);
        if (keeps_equal || !is_equal_pair(pair)) {
            count++;
        } else if (was_equal) {
            counts.equal++;
        } else {
            counts.equal_by_cut++;
        }
    }
    dpo_pairs_say(data, max_length, counts);
    CHECK(count > 0, "%s: no pair is left", data->path);
    return count;
}

/* The reference's log-probabilities too: computed again beside other pairs they could differ in
 * the last bit. */
static void dpo_saved(struct Trainer *trainer, struct Checkpoint *checkpoint) {
    struct DPOTask *task = trainer->task.data;
    checkpoint_add_doubles(checkpoint, "ref_logps", task->ref_logps[0], 2 * trainer->task.n);
}

static struct DPOTask *dpo_task(struct Trainer *trainer, struct Arena *arena,
                                struct GPT2 *ref_model, struct DPOConfig config, double temperature,
                                struct Example *pairs, size_t n) {
    struct DPOTask *task = arena_zeros(arena, 1, sizeof *task);
    *task = (struct DPOTask){
        .config = config,
        .ref_model = ref_model,
        .pairs = {pairs},
        .temperature = temperature,
    };
    task->ref_logps[0] = arena_zeros(arena, 2 * n, sizeof **task->ref_logps);
    trainer->task = (struct Task){
        .name = "dpo",
        .n = n,
        .data = task,
        .loss = dpo_task_loss,
        .evaluated = dpo_evaluated,
        .saved = dpo_saved,
    };
    return task;
}

static bool same_answer(const struct Tokenizer *tok, struct Arena *arena, const struct Example *a,
                        const struct Example *b, const struct GPT2Config *policy);

/* collect_preferences -- data collection: several answers a prompt, compared, kept as pairs.
 * [glossary: Coleta de dados] Each prompt is answered num_generations times by `policy`; the
 * best answer by the scorer becomes chosen, the worst rejected. Two that read the same are no
 * pair, whatever their scores. Answers that ended before scorer->least_length tokens are left
 * out, and, with only_ended, those that did not end: cut-off text teaches a model to run on.
 * pairs: room for 2n examples, 2i chosen, 2i+1 rejected; returns how many pairs. */
static size_t collect_preferences(const struct GPT2 *policy, const struct Scorer *scorer,
                                  struct Arena *arena, const struct Example *prompts, size_t n,
                                  size_t num_generations, bool only_ended,
                                  const struct GenerationConfig *generation, struct Rng *rng,
                                  struct Example *pairs) {
    struct Example *answers =
        sample_answers(policy, arena, prompts, n, num_generations, generation, rng);
    float *score = arena_floats(arena, n * num_generations);
    size_t count = 0;
    scorer_score(scorer, arena, answers, n * num_generations, &policy->config, score);
    for (size_t i = 0; i < n; i++) {
        size_t best = SIZE_MAX;
        size_t worst = SIZE_MAX;
        for (size_t k = i * num_generations; k < (i + 1) * num_generations; k++) {
            size_t length = answers[k].n - answers[k].prompt_length;
            bool ended = example_ended(&answers[k], policy->config.eos_token_id);
            if ((only_ended && !ended) || length < scorer->least_length)
                continue;
            if (best == SIZE_MAX || score[k] > score[best])
                best = k;
            if (worst == SIZE_MAX || score[k] < score[worst])
                worst = k;
        }
        if (best == worst || score[best] <= score[worst])
            continue;
        if (same_answer(scorer->tok, arena, &answers[best], &answers[worst], &policy->config))
            continue;
        pairs[2 * count] = answers[best];
        pairs[2 * count++ + 1] = answers[worst];
    }
    return count;
}

/* What a policy wrote, without its end token: how many tokens, and as text. */
static size_t answer_length(const struct Example *answer, const struct GPT2Config *policy) {
    return answer->n - answer->prompt_length - example_ended(answer, policy->eos_token_id);
}

static struct Text answer_text(const struct Tokenizer *tok, struct Arena *arena,
                               const struct Example *answer, const struct GPT2Config *policy) {
    const int *ids = answer->ids + answer->prompt_length;
    return tokenizer_decode_all(tok, arena, ids, answer_length(answer, policy), policy->vocab_size);
}

/* Nothing can be learnt from a choice between two answers that look the same. */
static bool same_answer(const struct Tokenizer *tok, struct Arena *arena, const struct Example *a,
                        const struct Example *b, const struct GPT2Config *policy) {
    struct Text text_a = text_shown(arena, answer_text(tok, arena, a, policy), "");
    struct Text text_b = text_shown(arena, answer_text(tok, arena, b, policy), "");
    return text_equal(text_a, text_b);
}

/* =============================================================================================
 * Chapter 19 - Exact: a world small enough to enumerate
 *                                            [glossary: Solução em forma fechada]
 *
 * Do PPO, DPO and REINFORCE find what chapter 5 says is best? With text nobody can tell. So here
 * is a world so small that every answer can be written down: a few tokens, a few places. The best
 * policy is known by its formula, and how near to it each method comes is a sum over all answers:
 * nothing is estimated. The methods themselves see only samples, as with real text.
 *
 * What enters: a random reference and a random reward for every answer. What leaves: the optimum,
 * and KL and objective of what each method reached.
 * ============================================================================================= */

enum { EXACT_RESPONSES = 4096, EXACT_BATCH = 128 };
enum ExactPolicy {
    EXACT_REFERENCE,
    EXACT_OPTIMUM,
    EXACT_DPO,
    EXACT_PPO,
    EXACT_REINFORCE,
    EXACT_POLICIES
};
static const struct {
    const char *name;
    double learning_rate;
    size_t steps;
} EXACT[EXACT_POLICIES] = {{"reference", 0, 0},
                           {"optimum", 0, 0},
                           {"dpo", 8e-3, 250},
                           {"ppo", 2e-3, 400},
                           {"reinforce", 2e-3, 500}};

struct ExactWorld {
    size_t V, L, n; /* n = V^L responses, all of L tokens: there is no end token */
    struct Example *y; /* (n) the prompt, id 0, and i written in base V */
    double *r, *logps[EXACT_POLICIES]; /* (n) reward; log pi(y), nats */
    double beta, log_Z;
    struct GPT2 *ref_model;
    uint64_t seed;
};

/* KL(pi || pi*), E[r], KL(pi || pi_ref), J  [glossary: Função objetivo] */
struct ExactFigures {
    double kl_to_optimum, reward, kl, objective;
};
static struct ExactFigures exact_figures(const struct ExactWorld *w, const double *logps) {
    struct ExactFigures f = {0};
    for (size_t i = 0; i < w->n; i++) {
        double p = exp(logps[i]);
        f.kl_to_optimum += p * (logps[i] - w->logps[EXACT_OPTIMUM][i]);
        f.reward += p * w->r[i];
        f.kl += p * (logps[i] - w->logps[EXACT_REFERENCE][i]);
    }
    f.objective = f.reward - w->beta * f.kl;
    return f;
}

/* exact_dpo_loss -- chapter 5's loss, expected over all n^2 ordered pairs when each is judged by
 * someone who prefers as Bradley and Terry say (chapter 3): i to j with probability p_ij =
 * sigmoid(r_i - r_j). in  logps, ref_logps, r (n)  out  the loss;  dlogps (n): d loss / d log
 * pi(y_i) = d loss / d h_i
 *   h_i = log pi(y_i) - log pi_ref(y_i);   s_ij = beta (h_i - h_j)
 *   loss = 1/n^2 sum_ij -[p_ij log sigmoid(s_ij) + (1 - p_ij) log sigmoid(-s_ij)]   [5] Eq. 7,
 *     expected
 *   d loss / d h_i = 2 beta / n^2 sum_j (sigmoid(s_ij) - p_ij)   twice: the pair (j,i) pulls as
 *     (i,j) does
 * Least where s_ij = r_i - r_j for all pairs, that is beta h = r + a constant: pi*. The constant
 * is -beta log Z; in every pair it cancels, and so DPO needs no Z. By hand: pi = pi_ref: loss ln
 * 2; with r = (0, ln 3) the slope of h_1 is 2 beta/4 (1/2 - 3/4) = -beta/8.  test: exact_dpo_* */
static double exact_dpo_loss(const double *logps, const double *ref_logps, const double *r,
                             size_t n, double beta, double *dlogps) {
    double loss = 0;
    double pairs = (double)n * (double)n;
    for (size_t i = 0; i < n; i++) {
        dlogps[i] = 0;
        for (size_t j = 0; j < n; j++) {
            double p = sigmoid(r[i] - r[j]);
            double s = beta * (logps[i] - ref_logps[i] - logps[j] + ref_logps[j]);
            loss -= (p * log_sigmoid(s) + (1 - p) * log_sigmoid(-s)) / pairs;
            dlogps[i] += 2 * beta * (sigmoid(s) - p) / pairs;
        }
    }
    return loss;
}

/* All responses through a model: log pi(y) of each into logps (n), and in training DPO's
 * gradient into the weights. In float the probabilities add up to 1 within 1e-6; the optimum at
 * an infinite beta is the same policy, its sum 1. */
static void exact_pass(const struct ExactWorld *w, struct GPT2 *model, struct Arena *arena,
                       bool train, double *logps) {
    struct Batch batch = collate(arena, w->y, w->n, SKIP_LAST);
    struct LMHead head = batch_logprobs(model, arena, &batch, 1, train);
    sum_target_logps(&batch, w->n, head.logprob, logps);
    exact_optimum(logps, w->r, w->n, INFINITY, logps);
    if (!train)
        return;
    double *dlogps = arena_alloc(arena, w->n, sizeof *dlogps);
    exact_dpo_loss(logps, w->logps[EXACT_REFERENCE], w->r, w->n, w->beta, dlogps);
    target_logps_backward(model, arena, &batch, &head, w->n, dlogps, 1);
}

/* A reference, all responses, rewards from N(0, 1). GPT-2's own start, N(0, 0.02), makes all
 * responses about as likely; from N(0, 0.1) some are a hundred times likelier than others. The
 * end token's id, V, is none of the model's: nothing ends early. */
static struct ExactWorld *exact_world(struct Arena *arena, struct GPT2Config config, size_t L,
                                      uint64_t seed) {
    struct ExactWorld *w = arena_zeros(arena, 1, sizeof *w);
    *w = (struct ExactWorld){
        .V = config.vocab_size,
        .L = L,
        .n = (size_t)lround(pow((double)config.vocab_size, (double)L)),
        .seed = seed,
    };
    config.n_positions = L + 1;
    config.eos_token_id = (int)w->V; /* no token of the world has this id */
    w->ref_model = gpt2_new(config);
    struct Rng weights = rng_seed(seed, STREAM_INIT);
    struct Rng rewards = rng_seed(seed, STREAM_REWARD);
    for (size_t i = 0; i < w->ref_model->tensor_count; i++)
        if (w->ref_model->tensors[i]->ndim == 2)
            tensor_normal(w->ref_model->tensors[i], &weights, 0.1);
    for (int k = 0; k < EXACT_POLICIES; k++)
        w->logps[k] = arena_zeros(arena, w->n, sizeof(double));
    w->y = arena_alloc(arena, w->n, sizeof *w->y);
    w->r = arena_alloc(arena, w->n, sizeof *w->r);
    for (size_t i = 0; i < w->n; i++) {
        w->y[i] = (struct Example){arena_zeros(arena, L + 1, sizeof(int)), L + 1, 1};
        for (size_t t = L, rest = i; t > 0; t--, rest /= w->V)
            w->y[i].ids[t] = (int)(rest % w->V);
        w->r[i] = rng_normal(&rewards);
    }
    exact_pass(w, w->ref_model, arena, false, w->logps[EXACT_REFERENCE]);
    return w;
}

/* The policy answers EXACT_BATCH times; the score is the reward of what it said. */
static struct Rollout *exact_rollouts(const struct ExactWorld *w, const struct GPT2 *policy,
                                      struct Rng *rng, struct Arena *arena) {
    struct Rollout *rollouts = arena_alloc(arena, EXACT_BATCH, sizeof *rollouts);
    struct Sequence s[EXACT_BATCH];
    struct GenerationConfig sampling = {
        .do_sample = true,
        .num_beams = 1,
        .temperature = 1,
        .top_p = 1,
        .repetition_penalty = 1,
    };
    for (size_t i = 0; i < EXACT_BATCH; i++)
        s[i] = sequence_start(arena, w->y[0].ids, 1, w->L, policy,
                              rng_seed(rng_next(rng), STREAM_SAMPLE));
    generate(policy, s, EXACT_BATCH, &sampling);
    for (size_t i = 0; i < EXACT_BATCH; i++) {
        size_t y = 0;
        for (size_t t = 1; t <= w->L; t++)
            y = y * w->V + (size_t)s[i].ids[t];
        rollouts[i] = (struct Rollout){w->y[y], w->L, (float)w->r[y]};
    }
    return rollouts;
}

/* exact_train -- a copy of the reference, trained by one method. DPO takes all pairs in each
 * step: no noise. PPO and REINFORCE take chapter 17's own steps, a nat of KL at the fixed price
 * beta, all answers to the one prompt. */
static void exact_train(struct ExactWorld *w, enum ExactPolicy method) {
    struct Arena arena = {0};
    struct GPT2 *model = gpt2_copy(w->ref_model);
    struct Rng rng = rng_seed(w->seed, STREAM_SAMPLE);
    size_t steps = EXACT[method].steps;
    struct TrainingArguments args = training_arguments();
    args.learning_rate = EXACT[method].learning_rate;
    args.warmup_steps = 20; /* then down to 0, and with it the samples' noise */
    struct PPOConfig config = ppo_config();
    config.batch_size = config.mini_batch_size = config.num_generations = EXACT_BATCH;
    if (method == EXACT_REINFORCE)
        config.baseline = BASELINE_RLOO;
    config.ppo_epochs = 2;
    config.vf_coef = 0.5;
    config.init_kl_coef = w->beta;
    config.adap_kl_ctrl = false;
    struct PPOTrainer *ppo = ppo_trainer_new(model, w->ref_model, config, args, 1);
    ppo->total_steps = steps;
    for (size_t step = 0; step < steps; step++, arena_reset(&arena)) {
        if (method == EXACT_PPO)
            ppo_step(ppo, exact_rollouts(w, model, &rng, &arena));
        if (method == EXACT_REINFORCE)
            reinforce_step(ppo, exact_rollouts(w, model, &rng, &arena));
        if (method == EXACT_DPO)
            exact_pass(w, model, &arena, true, w->logps[method]);
        if (method == EXACT_DPO)
            optimizer_step(model, &args, args.learning_rate * schedule_factor(&args, step, steps),
                           step + 1);
    }
    exact_pass(w, model, &arena, false, w->logps[method]);
    say("exact: beta %g: %s: %zu steps, KL to the optimum %.5f nats\n", w->beta, EXACT[method].name,
        steps, exact_figures(w, w->logps[method]).kl_to_optimum);
    ppo_trainer_free(ppo);
    gpt2_free(model);
    arena_free(&arena);
}

/* The optimum at beta and the three trainings, which know nothing of one another: a thread for
 * each.  test: exact_run */
static void exact_run(struct ExactWorld *w, double beta) {
    w->beta = beta;
    w->log_Z = exact_optimum(w->logps[EXACT_REFERENCE], w->r, w->n, beta, w->logps[EXACT_OPTIMUM]);
#pragma omp parallel for schedule(dynamic, 1)
    for (int k = EXACT_REINFORCE; k >= EXACT_DPO; k--)
        exact_train(w, (enum ExactPolicy)k);
}

/* =============================================================================================
 * Chapter 20 - The whole course (rlhf)
 *             [glossary: Aprendizado por reforço a partir de feedback humano (RLHF)]
 *
 * Everything in one go. What enters: rated texts. What leaves: a language model trained from
 * nothing, a reward model of the raters' taste, two policies that please it, one by PPO and one by
 * DPO, and the measurements that say what each gained and what it cost. A tenth of the texts is
 * never trained on: all figures are taken there.
 * ============================================================================================= */

/* From chapter 26: what was measured, as files, as a page, and on the terminal. */
struct Course;
static void course_write(struct Course *course, double seconds);
static void report_write(const char *dir);
static void course_print(struct Course *course);

static int compare_u64(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Distinct word pairs / all word pairs of many texts: 1 if nothing repeats, near 0 for a model
 * that has one phrase left. Words are runs of letters and apostrophes, and each of . ! ? counts
 * as one. */
static double distinct_2(const struct Text *texts, size_t n) {
    size_t bytes = 0;
    size_t count = 0;
    size_t distinct = 0;
    for (size_t i = 0; i < n; i++)
        bytes += texts[i].length;
    uint64_t *pairs = malloc((bytes + 1) * sizeof *pairs);
    CHECK(pairs, "out of memory");
    for (size_t i = 0; i < n; i++) {
        uint64_t previous = 0;
        const unsigned char *text = (const unsigned char *)texts[i].data;
        for (size_t k = 0; k < texts[i].length;) {
            size_t first = k;
            uint64_t hash = 14695981039346656037u; /* FNV-1a of the word */
            while (k < texts[i].length && (isalpha(text[k]) || text[k] == '\''))
                k++;
            if (k == first && !memchr(".!?", text[k++], 3))
                continue;
            for (size_t c = first; c < k; c++)
                hash = (hash ^ (uint64_t)tolower(text[c])) * 1099511628211u;
            if (previous)
                pairs[count++] = previous * 31 + hash;
            previous = hash;
        }
    }
    qsort(pairs, count, sizeof *pairs, compare_u64);
    for (size_t i = 0; i < count; i++)
        distinct += i == 0 || pairs[i] != pairs[i - 1];
    free(pairs);
    return count ? (double)distinct / (double)count : 0;
}

/* Share of pairs of held-out texts, ratings min_difference or more apart, that the rewards order
 * rightly. */
static double pair_accuracy(const float *reward, const double *rating, size_t n,
                            double min_difference) {
    double right = 0;
    double total = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            if (rating[i] - rating[j] < min_difference)
                continue;
            total++;
            right += reward[i] > reward[j];
        }
    return total ? right / total : NAN;
}

/* KL(policy || reference) of whole responses, in nats, averaged: exact at each token, summed
 * over tokens. */
static double response_kl(const struct GPT2 *policy, const struct GPT2 *ref_model,
                          const struct Example *answers, size_t n, double temperature) {
    enum { TOGETHER = 32 };
    struct Arena arena = {0};
    double total = 0;
    for (size_t first = 0; first < n; first += TOGETHER) {
        arena_reset(&arena);
        struct Batch batch =
            collate(&arena, answers + first, MIN(n - first, (size_t)TOGETHER), SKIP_LAST);
        struct LMHead head = batch_logprobs(policy, &arena, &batch, temperature, false);
        struct LMHead ref_head = batch_logprobs(ref_model, &arena, &batch, temperature, false);
        float *kl = arena_floats(&arena, batch.R);
        kl_full_rows(policy, &head, ref_model, &ref_head, kl);
        for (size_t r = 0; r < batch.R; r++)
            total += kl[r];
    }
    arena_free(&arena);
    return total / (double)n;
}

/* A policy's answers to prompts: their reward, how far it went from the reference, how varied
 * and long they are. */
struct PolicyResult {
    const struct GPT2 *policy;
    struct Example *answers;
    struct Text *texts;
    float *reward;
    double mean_reward, kl, distinct_2, mean_length;
};

static struct PolicyResult policy_measure(const struct GPT2 *policy, const struct GPT2 *ref_model,
                                          const struct Scorer *scorer, struct Arena *arena,
                                          const struct Example *prompts, size_t n,
                                          const struct GenerationConfig *generation,
                                          uint64_t seed) {
    struct PolicyResult result = {
        .policy = policy,
        .texts = arena_alloc(arena, n, sizeof *result.texts),
        .reward = arena_floats(arena, n),
    };
    struct Rng rng = rng_seed(seed, STREAM_SAMPLE);
    result.answers = sample_answers(policy, arena, prompts, n, 1, generation, &rng);
    for (size_t i = 0; i < n; i++) {
        result.texts[i] = answer_text(scorer->tok, arena, &result.answers[i], &policy->config);
        size_t length = answer_length(&result.answers[i], &policy->config);
        result.mean_length += (double)length / (double)n;
    }
    struct Scorer plain = *scorer;
    plain.least_length = 0; /* the bare reward, no penalty for short answers */
    scorer_score(&plain, arena, result.answers, n, &policy->config, result.reward);
    result.mean_reward = mean_of(result.reward, n);
    result.distinct_2 = distinct_2(result.texts, n);
    if (ref_model)
        result.kl = response_kl(policy, ref_model, result.answers, n, generation->temperature);
    return result;
}

/* The course's settings, and all that its stages share. */
struct Course {
    struct Arena arena;
    const struct Tokenizer *tok;
    const char *output_dir, *command, *data;
    const char *tokenizer; /* --tokenizer, or NULL: found without being named */
    uint64_t seed;
    size_t pretrain_steps, reward_steps, ppo_steps, dpo_steps, vocab_size;
    double temperature, scale; /* of sampling; of learning rates: 1 for a new, narrow model */
    struct Example *train, *held_out; /* token ids of the rated texts, end token last */
    double *train_rating, *held_out_rating;
    size_t train_n, held_out_n;
    struct Example *prompts, *test_prompts; /* beginnings of train and of held-out texts */
    size_t prompt_n, test_n;
    struct GPT2 *language_model, *reward_model, *ppo, *dpo;
    struct Scorer scorer;
    float *held_out_reward;
    struct PolicyResult result[3]; /* before, ppo, dpo */
    double eval_loss_before, eval_loss_after, eval_accuracy;
};

enum {
    COURSE_VOCAB = 4097,
    COURSE_LAYERS = 2,
    COURSE_WIDTH = 128,
    COURSE_HEADS = 4,
    COURSE_POSITIONS = 64,
    COURSE_LONG_POSITIONS = 256,
    COURSE_TEST_PROMPTS = 256,
    COURSE_MAX_NEW = 28,
    COURSE_LEAST_LENGTH = 10,
    COURSE_PREFIX = 20,
    COURSE_TOKENS_A_STEP = 512
};

static const struct LengthSampler COURSE_PROMPT_LENGTH = {2, 8};

/* Beginnings of texts, 2 to 7 tokens long, never a whole text. */
static size_t course_prompts(const struct Example *texts, size_t n, size_t most, struct Rng *rng,
                             struct Example *prompts) {
    size_t count = 0;
    for (size_t i = 0; i < n && count < most; i++) {
        size_t length = length_sampler(&COURSE_PROMPT_LENGTH, rng);
        if (texts[i].n > length + 1)
            prompts[count++] = (struct Example){texts[i].ids, length, length};
    }
    return count;
}

/* Splits the texts, by seed: nine tenths to learn from, one tenth to measure on. */
static void course_split(struct Course *course, const struct Dataset *data) {
    struct Rng rng = rng_seed(course->seed, STREAM_SPLIT);
    size_t n = data->n;
    size_t *order = arena_order(&course->arena, n);
    course->data = data->path;
    rng_shuffle(&rng, order, n);
    course->held_out_n = n / 10;
    course->train_n = n - course->held_out_n;
    warn_of_written_ends(data, course->tok);
    CHECK(course->held_out_n >= 20,
          "%s: %zu rated texts; rlhf needs 200 or more, a tenth of them to measure on", data->path,
          n);
    struct Example *all = arena_alloc(&course->arena, n, sizeof *all);
    double *rating = arena_alloc(&course->arena, n, sizeof *rating);
    const int *end_token = &course->language_model->config.eos_token_id;
    size_t empty = 0;
    for (size_t i = 0; i < n; i++) {
        struct Text text = data->rows[order[i]].text;
        all[i] = example_encode(&course->arena, course->tok, text, course->vocab_size, end_token);
        rating[i] = data->rows[order[i]].score;
        empty += data->rows[order[i]].text.length == 0;
    }
    if (empty) {
        warn("%s: %zu of %zu texts are empty: no prompt is taken from them", data->path, empty, n);
    }
    course->held_out = all;
    course->held_out_rating = rating;
    course->train = all + course->held_out_n;
    course->train_rating = rating + course->held_out_n;
    course->prompts = arena_alloc(&course->arena, course->train_n, sizeof *course->prompts);
    course->test_prompts =
        arena_alloc(&course->arena, course->held_out_n, sizeof *course->test_prompts);
    course->prompt_n =
        course_prompts(course->train, course->train_n, course->train_n, &rng, course->prompts);
    course->test_n = course_prompts(course->held_out, course->held_out_n, COURSE_TEST_PROMPTS, &rng,
                                    course->test_prompts);
    CHECK(course->prompt_n > 0 && course->test_n > 0,
          "%s: its texts are too short to take prompts of 2 to 7 tokens from", data->path);
}

static struct Trainer course_trainer(struct Course *course, struct GPT2 *model,
                                     double learning_rate, size_t steps, size_t batch,
                                     size_t warmup) {
    struct Trainer trainer = {.model = model, .tok = course->tok, .args = training_arguments()};
    trainer.args.learning_rate = learning_rate * course->scale;
    trainer.args.max_steps = steps;
    trainer.args.per_device_train_batch_size = trainer.args.per_device_eval_batch_size = batch;
    trainer.args.warmup_steps = MIN(warmup, steps / 4);
    trainer.args.seed = course->seed;
    trainer.args.logging_steps = MAX((size_t)1, steps / 50);
    trainer.args.say_steps = MAX((size_t)1, steps / 8);
    trainer.args.eval_steps = steps / 3 + 1;
    trainer.args.max_length = model->config.n_positions;
    return trainer;
}

/* Saves what was trained, and its log. */
static void course_finish(struct Course *course, const char *name, struct Trainer *trainer) {
    char *folder = arena_printf(&course->arena, "%s/%s", course->output_dir, name);
    model_replace(trainer->model, folder, course->tok);
    trainer_state_save(&trainer->state, &trainer->args, folder);
    trainer_free(trainer);
}

static struct Example *course_cut(struct Course *course, const struct Example *texts, size_t n,
                                  size_t length) {
    struct Example *cut = arena_alloc(&course->arena, n, sizeof *cut);
    for (size_t i = 0; i < n; i++) {
        cut[i] = texts[i];
        cut[i].n = MIN(cut[i].n, length);
    }
    return cut;
}

static struct GenerationConfig course_generation(const struct Course *course,
                                                 size_t max_new_tokens) {
    struct GenerationConfig generation = generation_config();
    generation.do_sample = true;
    generation.temperature = course->temperature;
    generation.top_k = 0;
    generation.max_new_tokens = max_new_tokens;
    return generation;
}

/* Stage 1: a language model, from random weights or from a given folder's. */
static void course_language_model(struct Course *course, double learning_rate) {
    size_t rows = MAX((size_t)1, COURSE_TOKENS_A_STEP / course->language_model->config.n_positions);
    struct Trainer trainer = course_trainer(course, course->language_model, learning_rate,
                                            course->pretrain_steps, rows, 50);
    trainer.args.adam_beta2 = 0.99;
    trainer.args.weight_decay = 0.1;
    trainer.args.lr_end = 0.05;
    struct LanguageTask *task =
        pretrain_task(&trainer, &course->arena, course->train, course->train_n, course->held_out,
                      course->held_out_n);
    task->whole_texts = true;
    trainer.task.name = "1/4 language model";
    course->eval_loss_before = trainer_evaluate(&trainer);
    if (course->pretrain_steps)
        trainer_train(&trainer);
    course->eval_loss_after = trainer_evaluate(&trainer);
    course_finish(course, "language_model", &trainer);
    arena_free(&task->rows);
}

/* Stage 2: the raters' taste. Whole texts and beginnings of texts alike, for it will have to
 * judge both. */
static void course_reward_model(struct Course *course) {
    struct GPT2 *model = course->reward_model = gpt2_copy(course->language_model);
    reward_head_declare(model);
    struct Trainer trainer = course_trainer(course, model, 2e-3, course->reward_steps, 32, 20);
    size_t limit = model->config.n_positions;
    size_t n = course->held_out_n;
    struct RewardTask task = {
        .rated = true,
        .min_difference = 1,
        .prefix_share = 0.5,
        .cut = rng_seed(course->seed, STREAM_CUT),
        .number = {course->train_rating, course->held_out_rating},
        .texts = {course_cut(course, course->train, course->train_n, limit),
                  course_cut(course, course->held_out, n, limit)},
        .eval_reward = arena_floats(&course->arena, n),
    };
    trainer.task = (struct Task){
        .name = "2/4 reward model",
        .n = course->train_n,
        .eval_n = n,
        .data = &task,
        .loss = reward_loss,
    };
    trainer.task.evaluated = reward_rated_evaluated;
    if (course->reward_steps)
        trainer_train(&trainer);
    trainer_evaluate(&trainer);
    float *reward = course->held_out_reward = arena_floats(&course->arena, n);
    float *prefix_reward = arena_floats(&course->arena, n);
    reward_score(model, task.texts[1], n, reward);
    course->eval_accuracy = pair_accuracy(reward, course->held_out_rating, n, 1);
    say("%s: %.3f of held-out pairs ordered as people did\n", trainer.task.name,
        course->eval_accuracy);
    /* comparisons leave the reward's zero and unit open; real beginnings set them, */
    n = MIN(n, (size_t)1000);
    /* unseen: of learnt ones it is surer */
    reward_score(model, course_cut(course, course->held_out, n, COURSE_PREFIX), n, prefix_reward);
    double mean = mean_of(prefix_reward, n);
    double deviation = sqrt(unbiased_variance(prefix_reward, n));
    CHECK(deviation > 0,
          "the reward model gives every text the reward %g, from which no policy can learn; train "
          "it longer (--reward_steps)",
          mean);
    course->scorer = (struct Scorer){model, course->tok, mean, deviation, COURSE_LEAST_LENGTH, -2};
    course_finish(course, "reward_model", &trainer);
}

/* Stage 3: PPO. A score is the reward in standard deviations of real beginnings; answers that
 * end before 10 tokens score at most -2, or the policy learns that "the best." is safe. */
static void course_ppo(struct Course *course) {
    course->ppo = gpt2_copy(course->language_model);
    struct PPOConfig config = ppo_config();
    config.batch_size = config.mini_batch_size = 64;
    /* the controller steers beta so that every seed ends near 12 nats */
    config.init_kl_coef = 0.15;
    config.target = 12.5;
    config.horizon = 1280;
    struct Trainer trainer = course_trainer(course, course->ppo, 7e-4, course->ppo_steps, 8, 5);
    trainer.args.lr_end = 0.2;
    trainer.args.logging_steps = 1;
    trainer.args.max_grad_norm = 0;
    struct PPOTrainer *ppo = ppo_trainer_new(course->ppo, course->language_model, config,
                                             trainer.args, course->temperature);
    ppo->name = "3/4 ppo";
    ppo->tok = course->tok;
    size_t n = course->prompt_n;
    struct RolloutSource source = {
        .prompts = course->prompts,
        .n = n,
        .at = n,
        .order = arena_order(&course->arena, n),
        .shuffle = rng_seed(course->seed, STREAM_ORDER),
        .lengths = rng_seed(course->seed, STREAM_LENGTH),
        .sample = rng_seed(course->seed, STREAM_SAMPLE),
        .output_length = {16, 29},
        .generation = course_generation(course, 20),
        .scorer = course->scorer,
    };
    ppo_train(ppo, &source, course->ppo_steps,
              arena_printf(&course->arena, "%s/ppo", course->output_dir), &trainer.state);
    course_finish(course, "ppo", &trainer);
    ppo_trainer_free(ppo);
}

/* Stage 4: DPO, on pairs collected from the model's own answers. The likelihood of the chosen
 * answers, at weight 0.2, keeps the policy from lowering both sides and drifting into endless
 * text. */
static void course_dpo(struct Course *course) {
    enum { ANSWERS = 4, PAIRS_A_STEP = 16 };
    course->dpo = gpt2_copy(course->language_model);
    size_t n = MIN(course->prompt_n, course->dpo_steps * PAIRS_A_STEP / 2 + PAIRS_A_STEP);
    size_t tokens = 0;
    struct Example *pairs = arena_alloc(&course->arena, 2 * n, sizeof *pairs);
    struct GenerationConfig generation = course_generation(course, 40);
    for (size_t i = 0; i < course->train_n; i++)
        tokens += course->train[i].n;
    struct Rng rng = rng_seed(course->seed, STREAM_SAMPLE);
    /* an answer of 40 tokens can end one; it never ends a whole review */
    bool sentences = tokens / course->train_n < COURSE_POSITIONS;
    size_t count =
        collect_preferences(course->language_model, &course->scorer, &course->arena,
                            course->prompts, n, ANSWERS, sentences, &generation, &rng, pairs);
    say("4/4 dpo: %zu pairs collected from %zu answers\n", count, n * ANSWERS);
    CHECK(count > 0 || course->dpo_steps == 0, "no answer of the language model ended by itself, "
                                               "so no pair could be formed; train it longer "
                                               "(--pretrain_steps)");
    struct Trainer trainer =
        course_trainer(course, course->dpo, 6e-4, course->dpo_steps, PAIRS_A_STEP, 10);
    trainer.args.lr_end = 0.1;
    struct DPOConfig config = {.beta = 0.1, .weight = {[DPO_SIGMOID] = 1, [DPO_SFT] = 0.2}};
    dpo_task(&trainer, &course->arena, course->language_model, config, course->temperature, pairs,
             count);
    trainer.task.name = "4/4 dpo";
    if (course->dpo_steps)
        trainer_train(&trainer);
    course_finish(course, "dpo", &trainer);
}

static struct Text course_prompt(struct Course *course, size_t i) {
    return tokenizer_decode_all(course->tok, &course->arena, course->test_prompts[i].ids,
                                course->test_prompts[i].n, course->vocab_size);
}

/* rlhf -- the four stages, measured. `language_model` comes new or loaded, not yet trained on
 * these texts. */
static void course_run(struct Course *course, const struct Dataset *data,
                       struct GPT2 *language_model, double learning_rate) {
    double begin = seconds_now();
    course->language_model = language_model;
    course->vocab_size = language_model->config.vocab_size;
    make_folder(course->output_dir);
    course_split(course, data);
    say("%zu rated texts to learn from, %zu held out; %.2fM parameters; %d threads, kernel %s\n",
        course->train_n, course->held_out_n, (double)gpt2_parameters(language_model) / 1e6,
        omp_get_max_threads(), kernel ? kernel->name : "plain");
    course_language_model(course, learning_rate);
    void (*const stage[])(struct Course *) = {course_reward_model, course_ppo, course_dpo};
    struct GPT2 **const model[] = {&course->language_model, &course->ppo, &course->dpo};
    struct GenerationConfig generation = course_generation(course, COURSE_MAX_NEW);
    for (size_t k = 0; k < COUNT(stage); k++) { /* the same random numbers for each model */
        stage[k](course);
        course->result[k] =
            policy_measure(*model[k], course->language_model, &course->scorer, &course->arena,
                           course->test_prompts, course->test_n, &generation, course->seed + 1);
    }
    course_write(course, seconds_now() - begin);
    report_write(course->output_dir);
    course_print(course);
    for (size_t k = 0; k < COUNT(model); k++)
        gpt2_free(*model[k]);
    gpt2_free(course->reward_model);
    arena_free(&course->arena);
}

/* =============================================================================================
 * Part IV - The program
 *
 * Machinery: what a program needs around its mathematics. Nothing in it is about RLHF. After this
 * part a reader knows how models, data and checkpoints are read and written so that transformers,
 * TRL and PEFT understand them and no broken file or full disk loses anything, and how a command
 * line becomes a call of the functions above.
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 22 - Files, JSON
 *
 * What enters: files that somebody else wrote. Every length is checked before memory is asked for,
 * every offset before it is used. What leaves: a tree of JSON values. What is written goes to a
 * file beside its final place and is renamed when it is complete: after a power cut the old file
 * is intact.
 * ============================================================================================= */

static bool file_exists(const char *path) {
    struct stat s;
    return stat(path, &s) == 0;
}
static bool is_folder(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

/* Two names of one folder, however they are spelt, links followed. Windows numbers no folders:
 * there the spelling decides.                                                 test: same_folder */
static bool same_folder(const char *a, const char *b) {
    struct stat x, y;
    if (stat(a, &x) != 0 || stat(b, &y) != 0)
        return false;
    return x.st_dev == y.st_dev && x.st_ino == y.st_ino && (x.st_ino != 0 || strcmp(a, b) == 0);
}

/* Git LFS leaves three lines of text in the place of a large file that was not fetched. */
static void check_fetched(const char *path, const char *start, size_t n) {
    static const char pointer[] = "version https://git-lfs.github.com/";
    bool is_pointer = n >= strlen(pointer) && memcmp(start, pointer, strlen(pointer)) == 0;
    CHECK(!is_pointer, "%s: is a Git LFS pointer, not the file itself; fetch it: git lfs pull",
          path);
}

/* The whole of a file (or "-", standard input) with a NUL behind it. */
static struct Text read_file(struct Arena *arena, const char *path) {
    bool is_stdin = strcmp(path, "-") == 0;
    CHECK(is_stdin || !is_folder(path), "%s: is a folder, a file was expected", path);
    FILE *file = is_stdin ? stdin : fopen(path, "rb");
    CHECK(file, "%s: %s", path, strerror(errno));
    size_t used = 0;
    size_t capacity = 0;
    char *buffer = NULL;
    struct stat s;
    /* what is no file on a disk may be: /dev/zero */
    bool endless = fstat(fileno(file), &s) != 0 || !S_ISREG(s.st_mode);
    for (size_t got = 1; got > 0; used += got) {
        buffer = grow(buffer, used, &capacity, 1);
        got = fread(buffer + used, 1, capacity - used, file);
        CHECK(!endless || used + got < (size_t)1 << 30,
              "%s: has no end within 1 GB; more is read of a file only, not of a pipe or a device",
              path);
    }
    CHECK(!ferror(file), "%s: %s", path, strerror(errno));
    if (!is_stdin)
        fclose(file);
    if (!is_stdin)
        check_fetched(path, buffer, used);
    struct Text text = text_copy(arena, (struct Text){buffer, used});
    free(buffer);
    return text;
}

static struct Output output_begin(const char *folder, const char *name, bool keep) {
    struct Output out;
    int n = snprintf(out.path, sizeof out.path, "%s/%s", folder, name);
    CHECK(n > 0 && (size_t)n < sizeof out.path, "%s/%s: the path is too long", folder, name);
    snprintf(out.tmp, sizeof out.tmp, "%s.tmp", out.path);
    out.file = fopen(out.tmp, keep && file_exists(out.tmp) ? "r+b" : "wb");
    CHECK(out.file, "%s: cannot be written: %s", out.tmp, strerror(errno));
    return out;
}

static struct Output output_open(const char *folder, const char *name) {
    return output_begin(folder, name, false);
}

/* For a file that grows with the run: its end is too late to learn that the disk is full. */
static void output_flush(struct Output *out) {
    CHECK(fflush(out->file) == 0 && !ferror(out->file), "%s: writing failed: %s", out->tmp,
          strerror(errno));
}

/* Goes on with a file that grew in `beside`, NAME.tmp or finished, from `bytes` on. Written over
 * itself it stays: being killed here loses nothing. */
static struct Output output_resume(const char *folder, const char *name, const char *beside,
                                   size_t bytes) {
    char path[PATH_MAX + 8], chunk[1 << 14];
    struct stat s;
    FILE *earlier = NULL;
    for (int finished = 0; finished < 2 && !earlier; finished++) {
        int n = snprintf(path, sizeof path, "%s/%s%s", beside, name, finished ? "" : ".tmp");
        if (n < (int)sizeof path && stat(path, &s) == 0 && (uint64_t)s.st_size >= bytes)
            earlier = fopen(path, "rb");
    }
    if (!earlier)
        warn("%s/%s: lacks the %zu bytes of the steps before; it begins anew", beside, name, bytes);
    struct Output out = output_begin(folder, name, true);
    for (size_t n;
         earlier && bytes > 0 && (n = fread(chunk, 1, MIN(bytes, sizeof chunk), earlier)) > 0;
         bytes -= n)
        fwrite(chunk, 1, n, out.file);
    output_flush(&out);
    CHECK(ftruncate(fileno(out.file), ftello(out.file)) == 0, "%s: writing failed: %s", out.tmp,
          strerror(errno));
    if (earlier)
        fclose(earlier);
    return out;
}

static void output_close(struct Output *out) {
    bool good = fflush(out->file) == 0 && !ferror(out->file) && fsync(fileno(out->file)) == 0;
    int error = errno;
    good = fclose(out->file) == 0 && good;
    if (!good)
        remove(out->tmp);
    CHECK(good, "%s: writing failed: %s; what was there before is untouched", out->path,
          strerror(error));
    CHECK(rename(out->tmp, out->path) == 0, "%s: %s", out->path, strerror(errno));
}

/* mkdir -p */
static void make_folder(const char *path) {
    char part[PATH_MAX];
    CHECK(strlen(path) < sizeof part, "%.60s...: the path is too long", path);
    for (size_t i = 1; i <= strlen(path); i++) {
        if ((path[i] != '/' && path[i] != 0) || path[i - 1] == '/')
            continue;
        snprintf(part, i + 1, "%s", path);
        int error = mkdir(part, 0777) == 0 ? 0 : errno; /* is_folder sets errno anew */
        const char *reason = error == EEXIST ? "is a file, a folder was expected" : strerror(error);
        CHECK(error == 0 || is_folder(part), "%s: %s", part, reason);
    }
    CHECK(access(path, W_OK) == 0, "%s: cannot be written to: %s", path, strerror(errno));
}

/* Removes a folder and the files in it, as far as that can be done; with `to`, moves them there.
 * Files that belong together are written in a folder of their own, staged_folder, and moved when
 * all are on the disk: one that is full leaves all as it was. */
static void folder_remove(const char *folder, const char *to) {
    char path[PATH_MAX], target[PATH_MAX];
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        if (snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) >= (int)sizeof path
            || is_folder(path))
            continue;
        if (to)
            CHECK(snprintf(target, sizeof target, "%s/%s", to, entry->d_name) < (int)sizeof target
                      && rename(path, target) == 0,
                  "%s: %s", target, strerror(errno));
        else
            remove(path);
    }
    if (dir)
        closedir(dir);
    rmdir(folder);
}

/* Puts the names in a folder on the disk, as output_close puts a file's contents. */
static void folder_sync(const char *folder) {
    int fd = open(folder, O_RDONLY);
    if (fd < 0)
        return;
    fsync(fd);
    close(fd);
}

/* JSON (RFC 8259) as a tree. An object's members and an array's items hang on `child`, linked by
 * `next`, their count is `number`; a member carries its key. Strings are decoded to UTF-8; half
 * a surrogate pair, for which none exists, becomes U+FFFD. */
enum JsonType {
    JSON_NULL,
    JSON_FALSE,
    JSON_TRUE,
    JSON_NUMBER,
    JSON_STRING,
    JSON_ARRAY,
    JSON_OBJECT
};
struct Json {
    struct Json *child, *next;
    struct Text key, string;
    double number;
    enum JsonType type;
};

struct JsonParser {
    struct Arena *arena;
    const char *at, *end;
    const char *error;
    int depth;
};
enum { JSON_MAX_DEPTH = 64 };

static struct Json *json_fail(struct JsonParser *p, const char *error) {
    if (!p->error)
        p->error = error;
    return NULL;
}

/* As json_fail, but if what stands there belongs to a notation that is often taken for JSON, it
 * is named instead. */
static struct Json *json_expected(struct JsonParser *p, const char *error) {
    static const struct {
        const char *start, *error;
    } foreign[] = {
        {"NaN", "NaN is not JSON; write null, or leave the field out"},
        {"nan", "nan is not JSON; write null, or leave the field out"},
        {"Infinity", "Infinity is not JSON; write a number, or null"},
        {"-Infinity", "-Infinity is not JSON; write a number, or null"},
        {"inf", "inf is not JSON; write a number, or null"},
        {"-inf", "-inf is not JSON; write a number, or null"},
        {"None", "None is Python, JSON has null; in Python, write a row with json.dumps"},
        {"True", "True is Python, JSON has true; in Python, write a row with json.dumps"},
        {"False", "False is Python, JSON has false; in Python, write a row with json.dumps"},
        {"'", "a single quote, JSON has \" alone; in Python, write a row with json.dumps"},
        {"//", "a comment, JSON has none; take it out"},
        {"/*", "a comment, JSON has none; take it out"},
        {"#", "a comment, JSON has none; take it out"},
    };
    for (size_t i = 0; i < COUNT(foreign); i++) {
        size_t length = strlen(foreign[i].start);
        if ((size_t)(p->end - p->at) < length)
            continue;
        if (memcmp(p->at, foreign[i].start, length) == 0)
            return json_fail(p, foreign[i].error);
    }
    return json_fail(p, error);
}

static void json_space(struct JsonParser *p) {
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r'))
        p->at++;
}

static size_t utf8_write(char *to, uint32_t c) {
    static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    size_t length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t k = length; k-- > 1; c >>= 6)
        to[k] = (char)(0x80 | (c & 63));
    to[0] = (char)(lead[length] | c);
    return length;
}

/* Four hexadecimal digits, or -1. */
static int32_t json_hex4(const char *at, const char *end) {
    char digits[5] = "";
    memcpy(digits, at, MIN((size_t)(end - at), (size_t)4));
    return strspn(digits, "0123456789abcdefABCDEF") == 4 ? (int32_t)strtol(digits, NULL, 16) : -1;
}

/* After "\u": one code point, or -1; a high surrogate takes the low one that must follow it. */
static int32_t json_code_point(struct JsonParser *p) {
    int32_t c = json_hex4(p->at, p->end);
    int32_t low = -1;
    if (c >= 0)
        p->at += 4;
    if (c < 0xd800 || c > 0xdfff)
        return c;
    if (c < 0xdc00 && p->end - p->at >= 2 && memcmp(p->at, "\\u", 2) == 0)
        low = json_hex4(p->at + 2, p->end);
    if (low < 0xdc00 || low > 0xdfff)
        return 0xfffd;
    p->at += 6;
    return 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
}

/* A string, its opening quote already seen at p->at. Decoding never lengthens it. */
static bool json_string(struct JsonParser *p, struct Text *out) {
    static const char escapes[] = "\"\\/bfnrt";
    static const char meanings[] = "\"\\/\b\f\n\r\t";
    const char *close = p->at + 1;
    while (close < p->end && *close != '"')
        close += *close == '\\' ? 2 : 1;
    if (close >= p->end) {
        static const char error[] = "a string without its closing quote; a line break in it is \\n";
        return json_fail(p, error);
    }
    char *to = arena_alloc(p->arena, (size_t)(close - p->at), 1);
    char *start = to;
    for (p->at++; p->at < close;) {
        uint32_t c;
        size_t length = utf8_read((const unsigned char *)p->at, (size_t)(close - p->at), &c);
        if (length == 0)
            return json_fail(p, "a string that is not UTF-8; save the file as UTF-8");
        if (c < 0x20)
            return json_fail(p, "a control character inside a string");
        p->at += length;
        if (c == '\\') {
            const char *escape = memchr(escapes, *p->at, sizeof escapes - 1);
            if (!escape && *p->at != 'u')
                return json_fail(p, "an unknown escape after \\");
            p->at++;
            c = escape ? (uint32_t)meanings[escape - escapes] : (uint32_t)json_code_point(p);
            if (c == UINT32_MAX)
                return json_fail(p, "\\u without four hexadecimal digits");
        }
        to += utf8_write(to, c);
    }
    *to = 0;
    *out = (struct Text){start, (size_t)(to - start)};
    p->at = close + 1;
    return true;
}

/* [-] digits [. digits] [e digits]: narrower than strtod (no "+1", ".5", "0x1"). The digits stay
 * in `string`: a double holds 53 bits. */
static bool json_number(struct JsonParser *p, struct Json *node) {
    char copy[65] = "";
    char *end;
    memcpy(copy, p->at, MIN((size_t)(p->end - p->at), sizeof copy - 1));
    copy[strspn(copy, "+-.0123456789eE")] = 0;
    const char *first = copy + (*copy == '-');
    const char *point = strchr(copy, '.');
    bool is_octal = first[0] == '0' && isdigit((unsigned char)first[1]);
    bool is_number = isdigit((unsigned char)first[0]) && !is_octal;
    if (!is_number)
        return json_expected(p, "a value was expected");
    node->number = strtod(copy, &end);
    if (point && point < end && !isdigit((unsigned char)point[1]))
        return json_fail(p, "a number ends in its decimal point");
    if (*end == 'e' || *end == 'E')
        return json_fail(p, "a number without its exponent");
    if (end == copy + sizeof copy - 1)
        return json_fail(p, "a number of more than 63 characters");
    if (!isfinite(node->number))
        return json_fail(p, "a number beyond 1.8e308");
    node->string = (struct Text){p->at, (size_t)(end - copy)};
    p->at += end - copy;
    return true;
}

static struct Json *json_value(struct JsonParser *p);

/* The inside of [...] or {...}; p->at stands behind the opening bracket. */
static struct Json *json_container(struct JsonParser *p, struct Json *node, char close) {
    struct Json **tail = &node->child;
    json_space(p);
    if (p->at < p->end && *p->at == close) {
        p->at++;
        return node;
    }
    if (++p->depth > JSON_MAX_DEPTH)
        return json_fail(p, "brackets nested more than 64 deep");
    for (;;) {
        struct Text key = {0};
        json_space(p);
        if (close == '}') {
            bool is_name = p->at < p->end && *p->at == '"';
            if (!is_name)
                return json_expected(p, "a member's name in quotes was expected");
            if (!json_string(p, &key))
                return NULL;
            json_space(p);
            if (p->at >= p->end || *p->at++ != ':')
                return json_fail(p, "':' was expected after a member's name");
        }
        struct Json *item = json_value(p);
        if (!item)
            return NULL;
        item->key = key;
        *tail = item;
        tail = &item->next;
        node->number++;
        json_space(p);
        if (p->at < p->end && *p->at == ',') {
            p->at++;
            json_space(p);
            if (p->at >= p->end || *p->at != close)
                continue;
            return json_fail(p, "a comma before the closing bracket; take it out");
        }
        if (p->at < p->end && *p->at == close) {
            p->at++;
            p->depth--;
            return node;
        }
        bool is_object = close == '}';
        return json_expected(p, is_object ? "',' or '}' was expected" : "',' or ']' was expected");
    }
}

static struct Json *json_value(struct JsonParser *p) {
    json_space(p);
    if (p->at >= p->end)
        return json_fail(p, "it ends where a value was expected");
    struct Json *node = arena_zeros(p->arena, 1, sizeof *node);
    static const struct {
        const char *word;
        enum JsonType type;
    } words[] = {{"null", JSON_NULL}, {"false", JSON_FALSE}, {"true", JSON_TRUE}};
    for (size_t i = 0; i < COUNT(words); i++) {
        size_t length = strlen(words[i].word);
        if ((size_t)(p->end - p->at) < length || memcmp(p->at, words[i].word, length))
            continue;
        p->at += length;
        node->type = words[i].type;
        return node;
    }
    switch (*p->at) {
    case '"':
        node->type = JSON_STRING;
        return json_string(p, &node->string) ? node : NULL;
    case '[':
        node->type = JSON_ARRAY;
        p->at++;
        return json_container(p, node, ']');
    case '{':
        node->type = JSON_OBJECT;
        p->at++;
        return json_container(p, node, '}');
    default:
        node->type = JSON_NUMBER;
        return json_number(p, node) ? node : NULL;
    }
}

/* One JSON value and nothing behind it. On a mistake NULL, *error says what, *where the byte. */
static struct Json *json_parse(struct Arena *arena, struct Text text, const char **error,
                               size_t *where) {
    /* Windows' editors begin a file with it */
    bool has_mark = text.length >= 3 && memcmp(text.data, "\xef\xbb\xbf", 3) == 0;
    struct JsonParser p = {arena, text.data + 3 * has_mark, text.data + text.length, NULL, 0};
    struct Json *value = json_value(&p);
    json_space(&p);
    if (value && p.at != p.end) {
        bool is_comma = *p.at == ',';
        value = json_expected(&p, is_comma ? "a comma behind its end; take it out"
                                           : "something stands behind its end");
    }
    *error = p.error;
    *where = (size_t)(p.at - text.data);
    return value;
}

static struct Json *json_object(struct Arena *arena, struct Text text, const char *place,
                                const char *hint) {
    const char *error;
    size_t where;
    struct Json *json = json_parse(arena, text, &error, &where);
    CHECK(json, "%s: not JSON: %s (byte %zu)%s", place, error, where + 1, hint);
    CHECK(json->type == JSON_OBJECT, "%s: a JSON object {...} was expected", place);
    return json;
}

static struct Json *json_read_file(struct Arena *arena, const char *path) {
    return json_object(arena, read_file(arena, path), path, "");
}

/* A member by its name; of several with one name the last, as in Python. */
static struct Json *json_get(const struct Json *object, const char *key) {
    struct Json *found = NULL;
    for (struct Json *item = object && object->type == JSON_OBJECT ? object->child : NULL; item;
         item = item->next)
        if (text_equal(item->key, text_of(key)))
            found = item;
    return found;
}

/* A whole number from 0 to max; anything else is an error that names the place. */
static size_t json_size(const struct Json *json, size_t max, const char *path, const char *name) {
    CHECK(json && json->type == JSON_NUMBER && json->number >= 0 && json->number <= (double)max
              && json->number == floor(json->number),
          "%s: \"%s\" must be a whole number from 0 to %zu", path, name, max);
    return (size_t)json->number;
}

/* A model can write half a character; JSON is UTF-8, so such bytes become U+FFFD. `before` it,
 * its key say, goes first. */
static void json_write_string(FILE *file, const char *before, struct Text text) {
    static const char plain[] = "\"\\\n\r\t";
    static const char letters[] = "\"\\nrt";
    fprintf(file, "%s\"", before);
    for (size_t i = 0, length; i < text.length; i += length) {
        uint32_t c;
        const char *escape;
        length = utf8_read((const unsigned char *)text.data + i, text.length - i, &c);
        if (length == 0) {
            fputs("\xef\xbf\xbd", file);
            length = 1;
        } else if (c < 128 && c && (escape = strchr(plain, (int)c)))
            fprintf(file, "\\%c", letters[escape - plain]);
        else if (c < 0x20 || (c >= 0x7f && c < 0xa0))
            fprintf(file, "\\u%04x", (unsigned)c);
        else
            fwrite(text.data + i, 1, length, file);
    }
    fputc('"', file);
}

/* A model's text for a terminal or a pipe, as UTF-8: bytes that are no character become U+FFFD,
 * control characters other than those in `kept` spaces.                       test: text_shown */
static struct Text text_shown(struct Arena *arena, struct Text text, const char *kept) {
    char *to = arena_alloc(arena, 3 * text.length + 1, 1);
    size_t n = 0;
    for (size_t i = 0, length; i < text.length; i += MAX(length, (size_t)1)) {
        uint32_t c;
        length = utf8_read((const unsigned char *)text.data + i, text.length - i, &c);
        bool control = c < 32 || (c >= 127 && c < 160);
        if (length == 0)
            n += utf8_write(to + n, 0xfffd);
        else if (control && !(c && c < 32 && strchr(kept, (int)c)))
            to[n++] = ' ';
        else {
            memcpy(to + n, text.data + i, length);
            n += length;
        }
    }
    to[n] = 0;
    return (struct Text){to, n};
}

/* JSON has no NaN: null, Python's None. 9 digits bring any float back bit for bit. The text
 * stays until the eighth call: enough for one printf. */
static const char *json_number_text(double x) {
    static char texts[8][32];
    static size_t next;
    char *text = texts[next++ % COUNT(texts)];
    snprintf(text, sizeof texts[0], "%.9g", x);
    return isfinite(x) ? text : "null";
}

static void json_write_ids(FILE *file, const char *before, const int *ids, size_t n) {
    fprintf(file, "%s[", before);
    for (size_t i = 0; i < n; i++)
        fprintf(file, "%s%d", i ? ", " : "", ids[i]);
    fputc(']', file);
}

static void json_write_floats(FILE *file, const char *before, const float *x, size_t n) {
    fprintf(file, "%s[", before);
    for (size_t i = 0; i < n; i++)
        fprintf(file, "%s%s", i ? ", " : "", json_number_text(x[i]));
    fputc(']', file);
}

/* =============================================================================================
 * Chapter 23 - Data sets, tokenizer.bin            [glossary: Conjunto de dados]
 *
 * What enters: JSON Lines in TRL's shapes, one object a line, and llm.c's tokenizer.bin with the
 * merges behind it. What leaves: rows, and a tokenizer. A bad line is named by file and number.
 * ============================================================================================= */

/* A cursor over a binary file that refuses to leave it. */
struct Reader {
    const unsigned char *at, *end;
    const char *path;
};

static const unsigned char *reader_take(struct Reader *r, size_t n, const char *what) {
    CHECK((size_t)(r->end - r->at) >= n,
          "%s: ends inside its %s; make it again: python3 prepare_imdb.py tokenizer --source DIR "
          "(with encoder.json, vocab.bpe)",
          r->path, what);
    const unsigned char *start = r->at;
    r->at += n;
    return start;
}

static uint32_t reader_u32(struct Reader *r, const char *what) {
    const unsigned char *b = reader_take(r, 4, what);
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

/* tokenizer.bin: llm.c's (header; tokens, each a length byte and its bytes), then the merges,
 * and Unicode's letters, numbers, spaces as ranges. */
static struct Tokenizer *tokenizer_load(struct Arena *arena, const char *path) {
    struct Tokenizer *tok = arena_zeros(arena, 1, sizeof *tok);
    tok->path = arena_printf(arena, "%s", path);
    struct Text file = read_file(arena, path);
    struct Reader r = {(const unsigned char *)file.data,
                       (const unsigned char *)file.data + file.length, path};
    uint32_t header[256];
    for (size_t i = 0; i < 256; i++)
        header[i] = reader_u32(&r, "header");
    CHECK(header[0] == TOKENIZER_MAGIC && header[1] == TOKENIZER_VERSION,
          "%s: not a tokenizer.bin of version 2 (it starts with %u, %u); make one: python3 "
          "prepare_imdb.py tokenizer --source DIR",
          path, header[0], header[1]);
    tok->vocab_size = header[2];
    tok->end_token = (int)header[3];
    CHECK(tok->vocab_size > BYTE_TOKENS && tok->vocab_size <= 65536
              && header[3] == tok->vocab_size - 1,
          "%s: a vocabulary of %zu with end token %u; 257 to 65536 ids, the end token last, are "
          "read",
          path, tok->vocab_size, header[3]);
    tok->token = arena_alloc(arena, tok->vocab_size, sizeof *tok->token);
    for (size_t id = 0; id < tok->vocab_size; id++) {
        size_t length = *reader_take(&r, 1, "tokens");
        tok->token[id] = (struct Text){(const char *)reader_take(&r, length, "tokens"), length};
    }
    memset(tok->byte_token, -1, sizeof tok->byte_token);
    for (int id = 0; id < BYTE_TOKENS; id++) {
        int *byte = &tok->byte_token[(unsigned char)tok->token[id].data[0]];
        CHECK(tok->token[id].length == 1 && *byte < 0, "%s: id %d is not a single byte of its own",
              path, id);
        *byte = id;
    }
    tok->merges = reader_u32(&r, "merges");
    CHECK(tok->merges + BYTE_TOKENS + 1 == tok->vocab_size,
          "%s: %zu merges do not make a vocabulary of %zu", path, tok->merges, tok->vocab_size);
    tok->merge_pair = arena_alloc(arena, tok->merges, sizeof *tok->merge_pair);
    tok->merge_id = arena_alloc(arena, MERGE_SLOTS, sizeof *tok->merge_id);
    for (size_t i = 0; i < MERGE_SLOTS; i++)
        tok->merge_id[i] = -1;
    for (size_t i = 0; i < tok->merges; i++) {
        uint32_t pair = tok->merge_pair[i] = reader_u32(&r, "merges");
        uint32_t id = (uint32_t)(BYTE_TOKENS + i);
        CHECK((pair & 0xffff) < id && pair >> 16 < id,
              "%s: merge %zu uses an id that comes after it", path, i);
        struct Text left = tok->token[pair & 0xffff];
        struct Text right = tok->token[pair >> 16];
        struct Text both = tok->token[id];
        bool joined = both.length == left.length + right.length
                      && !memcmp(both.data, left.data, left.length)
                      && !memcmp(both.data + left.length, right.data, right.length);
        CHECK(joined, "%s: token %u is not what merge %zu makes", path, id, i);
        int *slot = &tok->merge_id[merge_slot(tok, pair)];
        CHECK(*slot < 0, "%s: merge %zu stands there twice", path, i);
        *slot = (int)id;
    }
    tok->char_class = arena_zeros(arena, UNICODE_END, 1);
    for (int class = CLASS_LETTER; class <= CLASS_SPACE; class ++) {
        for (uint32_t n = reader_u32(&r, "Unicode classes"), next = 0; n > 0; n--) {
            uint32_t first = reader_u32(&r, "Unicode classes");
            uint32_t last = reader_u32(&r, "Unicode "
                                           "classes");
            CHECK(first >= next && first <= last && last < UNICODE_END,
                  "%s: a Unicode range from %u to %u, after one that ends before %u", path, first,
                  last, next);
            memset(tok->char_class + first, class, last - first + 1);
            next = last + 1;
        }
    }
    return tok;
}

/* GPT-2's files show each byte as a printable character: itself, or 256 on for the first 33, the
 * 34 behind '~' and the soft hyphen. */
static struct Text token_as_unicode(struct Arena *arena, struct Text token) {
    char *text = arena_alloc(arena, token.length * 2 + 1, 1);
    char *to = text;
    for (size_t i = 0; i < token.length; i++) {
        uint32_t byte = (unsigned char)token.data[i];
        to += utf8_write(to, byte <= ' '                    ? 256 + byte
                             : byte >= 0x7f && byte <= 0xa0 ? 256 + 33 + (byte - 0x7f)
                             : byte == 0xad                 ? 256 + 33 + 34
                                                            : byte);
    }
    *to = 0;
    return (struct Text){text, (size_t)(to - text)};
}

/* vocab.json and merges.txt: what AutoTokenizer looks for beside a model, with the
 * tokenizer_config.json of tokenizer_config_save. */
static void tokenizer_save(const struct Tokenizer *tok, const char *folder, size_t vocab_size) {
    struct Arena arena = {0};
    size_t end = (size_t)endoftext_id(vocab_size);
    struct Output out = output_open(folder, "vocab.json");
    fputc('{', out.file);
    for (size_t id = 0; id < end; id++) {
        json_write_string(out.file, "", token_as_unicode(&arena, tok->token[id]));
        fprintf(out.file, ": %zu, ", id);
    }
    fprintf(out.file, "\"<|endoftext|>\": %zu}\n", end);
    output_close(&out);
    out = output_open(folder, "merges.txt");
    fputs("#version: 0.2\n", out.file);
    for (size_t i = 0; i + BYTE_TOKENS < end; i++) {
        struct Text left = token_as_unicode(&arena, tok->token[tok->merge_pair[i] & 0xffff]);
        struct Text right = token_as_unicode(&arena, tok->token[tok->merge_pair[i] >> 16]);
        fprintf(out.file, "%s %s\n", left.data, right.data);
    }
    output_close(&out);
    arena_free(&arena);
}

/* A model folder may bring its own vocabulary: refuse one whose ids mean other tokens than ours. */
static void tokenizer_check_folder(const struct Tokenizer *tok, const char *folder,
                                   size_t vocab_size) {
    struct Arena arena = {0};
    char *path = arena_printf(&arena, "%s/vocab.json", folder);
    char *other = arena_printf(&arena, "%s/tokenizer.json", folder);
    struct Json *vocab = NULL;
    if (file_exists(path))
        vocab = json_read_file(&arena, path);
    else if (file_exists(path = other))
        vocab = json_get(json_get(json_read_file(&arena, path), "model"), "vocab");
    CHECK((size_t)endoftext_id(vocab_size) < tok->vocab_size,
          "%s: has %zu ids, %s only %zu; another --tokenizer is needed", folder, vocab_size,
          tok->path, tok->vocab_size);
    CHECK(!vocab || vocab->type == JSON_OBJECT,
          "%s: its vocabulary is not an object {\"token\": id, ...}", path);
    for (struct Json *item = vocab ? vocab->child : NULL; item; item = item->next) {
        size_t id = json_size(item, 1 << 24, path, "an id of the vocabulary");
        if (id >= (size_t)endoftext_id(vocab_size))
            continue;
        struct Text ours = token_as_unicode(&arena, tok->token[id]);
        CHECK(text_equal(ours, item->key),
              "%s: id %zu is \"%s\" here, \"%s\" in %s: another vocabulary than GPT-2's; this "
              "model cannot be used",
              path, id, item->key.data, ours.data, tok->path);
    }
    arena_free(&arena);
}

/* Of a list of tokens, the names of those with ids from `first` to below `end`. transformers writes
 * {"name": id}, [{"id": id, "content": "name"}] or {"id": {"content": "name"}}. */
static void added_tokens_read(const struct Json *list, size_t first, size_t end,
                              struct Text *names) {
    for (const struct Json *item = list ? list->child : NULL; item; item = item->next) {
        const struct Json *id = item->type == JSON_NUMBER ? item : json_get(item, "id");
        const struct Json *content = json_get(item, "content");
        double number = id ? id->number : item->key.data ? strtod(item->key.data, NULL) : 0;
        if (number >= (double)first && number < (double)end)
            names[(size_t)number - first] = content ? content->string : item->key;
    }
}

/* The tokens that a model's folder adds behind GPT-2's own, ids `first` to `end` - 1: their names,
 * empty where an id only rounds up the vocabulary (50304 is a multiple of 64, 50257 is not). */
static struct Text *added_tokens(struct Arena *arena, const char *folder, size_t first,
                                 size_t end) {
    static const char *const lists[][2] = {{"vocab.json", NULL},
                                           {"added_tokens.json", NULL},
                                           {"tokenizer.json", "added_tokens"},
                                           {"tokenizer_config.json", "added_tokens_decoder"}};
    struct Text *names = arena_zeros(arena, end - first, sizeof *names);
    for (size_t i = 0; i < COUNT(lists) && first < end; i++) {
        const char *path = arena_printf(arena, "%s/%s", folder, lists[i][0]);
        if (!file_exists(path))
            continue;
        const struct Json *json = json_read_file(arena, path);
        added_tokens_read(lists[i][1] ? json_get(json, lists[i][1]) : json, first, end, names);
    }
    return names;
}

/* What the name of a file in a folder says about it: which split it belongs to, and how much that
 * counts beside the names of the other files. */
enum Split { SPLIT_NONE, SPLIT_TRAIN, SPLIT_VALIDATION, SPLIT_TEST };
enum SplitRank { RANK_FILE, RANK_FOLDER, RANK_SHARD, RANKS };

struct DataFile {
    const char *path, *name; /* name: the path inside the folder */
    enum Split split;
    enum SplitRank rank;
    bool is_read;
};

/* "chosen" + "rejected", or "text": what shapes are made of. */
static const char *shape_names(struct Arena *arena, const unsigned *shapes, size_t count) {
    const char *names = "";
    const char *joint = "";
    for (size_t s = 0; s < count; s++, joint = ", or ")
        for (size_t i = 0; i < COUNT(FIELD_NAMES); i++) {
            if (!(shapes[s] >> i & 1))
                continue;
            names = arena_printf(arena, "%s%s\"%s\"", names, joint, FIELD_NAMES[i]);
            joint = " + ";
        }
    return names;
}

static int *json_ids(struct Arena *arena, const struct Json *array, size_t *count,
                     const char *place) {
    CHECK(array->type == JSON_ARRAY, "%s: \"%s\" must hold token ids", place, array->key.data);
    *count = (size_t)array->number;
    int *ids = arena_alloc(arena, *count, sizeof *ids);
    int *to = ids;
    for (struct Json *item = array->child; item; item = item->next)
        *to++ = (int)json_size(item, (1 << 24) - 1, place, "a token id");
    return ids;
}

/* A place is "FILE:LINE"; the bytes of FILE, as printf's %.* takes them. */
static int path_bytes(const char *place) {
    return (int)(strrchr(place, ':') - place);
}

/* What to do about a line that is not JSON: the end of the message. */
static const char *line_hint(struct Arena *arena, struct Text line, size_t where, bool is_last,
                             const char *place) {
    bool low_first = line.length > 1 && memcmp(line.data, "\xff\xfe", 2) == 0;
    bool high_first = line.length > 1 && memcmp(line.data, "\xfe\xff", 2) == 0;
    if (low_first || high_first)
        return "; it is UTF-16, make it UTF-8: iconv -f UTF-16 -t UTF-8";
    if (*line.data != '{')
        return "; one object a line was expected: {\"text\": \"...\"}";
    if (is_last || where < line.length)
        return "";
    return arena_printf(arena,
                        "; the object goes on in the next line, it must be on one; "
                        "run: jq -c . '%.*s' > rows.jsonl",
                        path_bytes(place), place);
}

/* Text that is an array of messages with a role: the form that chat templates take. */
static bool is_chat(const struct Json *item) {
    return item && item->type == JSON_ARRAY && item->child && json_get(item->child, "role");
}

/* GPT-2 was trained without a chat template, so which text such messages are is the user's choice;
 * the command writes "role: content" lines. A prompt that is a string beside them repeats their
 * beginning and is left out, as TRL does. */
static void refuse_chat(const struct Json *item, const char *place) {
    static const char flatten[] =
        "python3 -c \"import json,sys; "
        "f=lambda v:''.join('%s: %s\\n'%(m['role'],m['content'])for m in v)"
        "if type(v)==list and v and type(v[0])==dict else v; "
        "[print(json.dumps({k.replace('messages','text'):f(v)for k,v in json.loads(l).items()"
        "if(k,type(v))!=('prompt',str)}))for l in sys.stdin]\"";
    if (!is_chat(item))
        return;
    die("%s: \"%s\" is a chat, a list of messages, a string was expected (GPT-2 has no chat "
        "template); flatten it: %s < '%.*s' > rows.jsonl",
        place, item->key.data, flatten, path_bytes(place), place);
}

/* Which of FIELD_NAMES a row has; null counts as absent. */
static unsigned json_fields(const struct Json *json) {
    unsigned has = 0;
    for (size_t i = 0; i < COUNT(FIELD_NAMES); i++) {
        const struct Json *item = json_get(json, FIELD_NAMES[i]);
        if (item && item->type != JSON_NULL)
            has |= 1u << i;
    }
    return has;
}

/* A row's score, margin or label; a label may be a truth value too. */
static double json_field_number(const struct Json *item, bool is_label, const char *place) {
    bool is_truth = is_label && (item->type == JSON_TRUE || item->type == JSON_FALSE);
    double number = is_truth ? item->type == JSON_TRUE : item->number;
    bool is_number = item->type == JSON_NUMBER && fabs(number) <= FLT_MAX;
    CHECK(is_truth || is_number, "%s: \"%s\" must be a number, at most 3.4e38", place,
          item->key.data);
    CHECK(!is_label || number == 0 || number == 1, "%s: \"label\" must be 0 or 1", place);
    return number;
}

/* One line's object into a row of this shape. Fields that the shape does not use are not judged:
 * `label` may say "pos" where texts alone are read. */
static struct Row dataset_row(struct Arena *keep, const struct Json *json, unsigned shape,
                              const char *place) {
    struct Row row = {.has = json_fields(json)};
    struct Text *texts[] = {&row.text, &row.prompt, &row.completion, &row.chosen, &row.rejected};
    unsigned used = row.has & (shape | shape >> 16);
    for (size_t i = 0; i < COUNT(FIELD_NAMES); i++) {
        const struct Json *item = json_get(json, FIELD_NAMES[i]);
        unsigned field = 1u << i;
        if (!(used & field))
            continue;
        if (i < COUNT(texts)) {
            refuse_chat(item, place);
            CHECK(item->type == JSON_STRING, "%s: \"%s\" must be a string", place, FIELD_NAMES[i]);
            *texts[i] = text_copy(keep, item->string);
        }
        if (field == HAS_QUERY_IDS) {
            row.query_ids = json_ids(keep, item, &row.query_length, place);
        }
        if (field == HAS_RESPONSE_IDS) {
            row.response_ids = json_ids(keep, item, &row.response_length, place);
        }
        if (field == HAS_LABEL)
            row.label = json_field_number(item, true, place);
        if (field == HAS_SCORE)
            row.score = json_field_number(item, false, place);
        if (field == HAS_MARGIN)
            row.margin = json_field_number(item, false, place);
    }
    return row;
}

/* The first of the shapes that a row fits; 0: none. */
static unsigned shape_of(unsigned has, const unsigned *shapes, size_t shape_count) {
    for (size_t i = 0; i < shape_count; i++) {
        unsigned required = shapes[i] & (MAY_HAVE(1u) - 1);
        if ((has & required) == required)
            return shapes[i];
    }
    return 0;
}

/* Is it a table, CSV or TSV? Its name says so, or a cell of its first line is a field's name. */
static bool is_table(struct Text file, const char *path) {
    const char *dot = strrchr(path, '.');
    if (dot && (strcmp(dot, ".csv") == 0 || strcmp(dot, ".tsv") == 0))
        return true;
    const char *cell = file.data;
    while (*cell && *cell != '\n') {
        if (*cell == '"')
            cell++;
        struct Text name = {cell, strcspn(cell, ",\t\"\r\n")};
        for (size_t i = 0; i < COUNT(FIELD_NAMES); i++) {
            if (text_equal(name, text_of(FIELD_NAMES[i])))
                return true;
        }
        cell += strcspn(cell, ",\t\n");
        if (*cell == ',' || *cell == '\t')
            cell++;
    }
    return false;
}

/* Other formats that data comes in, by their first bytes, and the command that makes JSON Lines of
 * a file: `before`, its path, `after`. Tables have no such bytes and stand last. */
#define PANDAS(reader) "python3 -c \"import pandas; pandas." reader "('"
#define PANDAS_END "').to_json('rows.jsonl', orient='records', lines=True)\""
static const struct Format {
    const char *start;
    size_t length;
    const char *name, *before, *after;
} FORMATS[] = {
    {"[", 1, "a JSON array",
     "python3 -c \"import json; [print(json.dumps(row)) for row in json.load(open('",
     "'))]\" > rows.jsonl"},
    {"PAR1", 4, "Parquet", PANDAS("read_parquet"), PANDAS_END},
    {"ARROW1", 6, "an Arrow file", PANDAS("read_feather"), PANDAS_END},
    {"\xff\xff\xff\xff", 4, "an Arrow stream (save_to_disk of datasets)",
     "python3 -c \"from datasets import Dataset; Dataset.from_file('",
     "').to_json('rows.jsonl')\""},
    {"\x1f\x8b", 2, "compressed by gzip", "gzip -dc '", "' > rows.jsonl"},
    {"\x28\xb5\x2f\xfd", 4, "compressed by zstd", "zstd -dc '", "' > rows.jsonl"},
    {"BZh", 3, "compressed by bzip2", "bzip2 -dc '", "' > rows.jsonl"},
    {"\xfd"
     "7zXZ",
     5, "compressed by xz", "xz -dc '", "' > rows.jsonl"},
    {"PK\x03\x04", 4, "a zip archive", "unzip -p '", "' > rows.jsonl"},
    {"", 0, "a table (TSV)", PANDAS("read_table"), PANDAS_END},
    {"", 0, "a table (CSV)", PANDAS("read_csv"), PANDAS_END},
};
enum { FORMAT_CSV = COUNT(FORMATS) - 1, FORMAT_TSV = FORMAT_CSV - 1 };

/* Data that is whole but in another format is refused by the format's name. */
static void refuse_other_formats(struct Text file, const char *path) {
    size_t format = 0;
    bool has_mark = file.length >= 3 && memcmp(file.data, "\xef\xbb\xbf", 3) == 0;
    file = (struct Text){file.data + 3 * has_mark, file.length - 3 * has_mark};
    size_t blank = strspn(file.data, " \t\r\n");
    file = (struct Text){file.data + blank, file.length - blank};
    while (format < FORMAT_TSV) {
        size_t length = FORMATS[format].length;
        if (file.length >= length && memcmp(file.data, FORMATS[format].start, length) == 0)
            break;
        format++;
    }
    if (format == FORMAT_TSV) {
        if (*file.data == '{' || !is_table(file, path))
            return;
        bool has_tab = file.data[strcspn(file.data, "\t\n")] == '\t';
        if (!has_tab)
            format = FORMAT_CSV;
    }
    die("%s: is %s, JSON Lines were expected; run: %s%s%s", path, FORMATS[format].name,
        FORMATS[format].before, path, FORMATS[format].after);
}

/* One line of a file as a JSON object, or the reason why it is none. */
static struct Json *dataset_line(struct Arena *scratch, struct Text line, bool is_last,
                                 const char *place) {
    const char *error;
    size_t where;
    struct Json *json = json_parse(scratch, line, &error, &where);
    if (!json) {
        const char *hint = line_hint(scratch, line, where, is_last, place);
        die("%s: not JSON: %s (byte %zu)%s", place, error, where + 1, hint);
    }
    CHECK(json->type == JSON_OBJECT, "%s: a JSON object {...} was expected", place);
    return json;
}

/* Why a row fits none of the shapes. */
static _Noreturn void refuse_shape(const struct Json *json, const unsigned *shapes,
                                   size_t shape_count, const char *place) {
    struct Arena arena = {0};
    unsigned has = json_fields(json);
    refuse_chat(json_get(json, "messages"), place);
    const char *wanted = shape_names(&arena, shapes, shape_count);
    const char *found = shape_names(&arena, &has, 1);
    die("%s: expected %s, found %s", place, wanted, *found ? found : "no field that is known");
}

static void dataset_append(struct Arena *arena, struct Dataset *data, struct Row row) {
    if (data->n == data->capacity) {
        data->capacity = MAX(2 * data->n, (size_t)256);
        struct Row *rows = arena_alloc(arena, data->capacity, sizeof *rows);
        data->rows = data->n ? memcpy(rows, data->rows, data->n * sizeof *rows) : rows;
    }
    data->rows[data->n++] = row;
}

/* Appends a file's rows, all of the first one's shape. If that is none of `shapes`: an error, or,
 * if `optional`, left out. */
static void dataset_add_file(struct Arena *arena, struct Dataset *data, struct DataFile *source,
                             const unsigned *shapes, size_t shape_count, bool optional) {
    struct Arena scratch = {0};
    struct Text file = read_file(&scratch, source->path);
    struct Arena line_arena = {0};
    const char *at = file.data;
    const char *end = file.data + file.length;
    refuse_other_formats(file, source->path);
    for (size_t line = 1; at < end; line++) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        if (!stop)
            stop = end;
        struct Text text = {at, (size_t)(stop - at)};
        at = stop + 1;
        if (strspn(text.data, " \t\r\v\f") == text.length)
            continue;
        const char *place = arena_printf(&line_arena, "%s:%zu", source->path, line);
        struct Json *json = dataset_line(&line_arena, text, at >= end, place);
        if (data->shape) { /* the first row has decided for all */
            shapes = &data->shape;
            shape_count = 1;
        }
        unsigned shape = shape_of(json_fields(json), shapes, shape_count);
        if (!shape && optional && !source->is_read)
            break;
        if (!shape)
            refuse_shape(json, shapes, shape_count, place);
        data->shape = shape;
        source->is_read = true;
        dataset_append(arena, data, dataset_row(arena, json, shape, place));
        arena_reset(&line_arena);
    }
    arena_free(&line_arena);
    arena_free(&scratch);
}

/* Do the first bytes of a name spell a word, in small or capital letters? */
static bool spells(const char *name, const char *word, size_t length) {
    if (strlen(word) != length)
        return false;
    for (size_t i = 0; i < length; i++) {
        if (tolower((unsigned char)name[i]) != word[i])
            return false;
    }
    return true;
}

/* The split that a word of a path, from `at` to `end`, names; of several the first of enum Split.
 * Words end where datasets' NON_WORDS_CHARS stand. */
static enum Split split_of_words(const char *at, const char *end) {
    static const char not_words[] = "-._ 0123456789/";
    static const struct {
        const char *word;
        enum Split split;
    } words[] = {
        {"train", SPLIT_TRAIN},      {"training", SPLIT_TRAIN}, {"validation", SPLIT_VALIDATION},
        {"valid", SPLIT_VALIDATION}, {"dev", SPLIT_VALIDATION}, {"val", SPLIT_VALIDATION},
        {"test", SPLIT_TEST},        {"testing", SPLIT_TEST},   {"eval", SPLIT_TEST},
        {"evaluation", SPLIT_TEST},
    };
    enum Split split = SPLIT_NONE;
    for (; at < end; at++) {
        size_t length = strcspn(at, not_words);
        for (size_t i = 0; i < COUNT(words); i++) {
            bool comes_first = !split || words[i].split < split;
            if (comes_first && spells(at, words[i].word, length))
                split = words[i].split;
        }
        at += length;
    }
    return split;
}

/* Is a file's name one of "train-00000-of-00002.jsonl"'s kind, as datasets writes large data? */
static bool is_shard_name(const char *name) {
    for (const char *of = strstr(name, "-of-"); of; of = strstr(of + 1, "-of-")) {
        if (of - name < 6 || of[-6] != '-')
            continue;
        if (strspn(of - 5, "0123456789") == 5 && strspn(of + 4, "0123456789") >= 5)
            return true;
    }
    return false;
}

/* data_file_split -- which file of a folder is which split, by its name, as datasets.load_dataset
 * decides it (data_files.py): shards in data/ count before folders that are called after a split,
 * these before files that are. Two things are ours, lest held-out rows be trained on: capital
 * letters make no difference, and a name with words of several splits counts once.
 * By hand: "train.jsonl" train; "dev/a.jsonl" validation; "tests.jsonl" none.
 *                                                                       test: data_splits */
static void data_file_split(struct DataFile *file) {
    const char *slash = strrchr(file->name, '/');
    const char *base = slash ? slash + 1 : file->name;
    bool is_in_data = base == file->name + 5 && strncmp(file->name, "data/", 5) == 0;
    enum Split of_folders = split_of_words(file->name, base);
    enum Split of_file = split_of_words(base, base + strlen(base));
    *file = (struct DataFile){file->path, file->name, .split = of_file, .rank = RANK_FILE};
    if (is_in_data && is_shard_name(base)) {
        file->rank = RANK_SHARD;
    } else if (of_folders) {
        file->split = of_folders;
        file->rank = RANK_FOLDER;
    }
}

static int compare_data_files(const void *a, const void *b) {
    return strcmp(((const struct DataFile *)a)->path, ((const struct DataFile *)b)->path);
}

enum { DATA_FILES_MOST = 256 };

/* Adds the *.jsonl of a folder and of the folders in it to data->files. As datasets does, it passes
 * over what is hidden, folders like __pycache__, and links to folders, which may lead back. */
static void dataset_list_files(struct Arena *arena, struct Dataset *data, const char *folder) {
    DIR *dir = opendir(folder);
    CHECK(dir, "%s: %s", folder, strerror(errno));
    for (struct dirent *entry; (entry = readdir(dir));) {
        const char *name = entry->d_name;
        size_t length = strlen(name);
        if (name[0] == '.')
            continue;
        const char *path = arena_printf(arena, "%s/%s", folder, name);
        if (is_folder(path)) {
            struct stat s;
            bool is_link = lstat(path, &s) != 0 || !S_ISDIR(s.st_mode);
            bool is_special = strncmp(name, "__", 2) == 0;
            if (!is_link && !is_special)
                dataset_list_files(arena, data, path);
            continue;
        }
        if (length <= 6 || strcmp(name + length - 6, ".jsonl") != 0)
            continue;
        CHECK(data->file_count < DATA_FILES_MOST,
              "%s: more than %d .jsonl files; join them: cat %s/*.jsonl > all.jsonl", data->path,
              DATA_FILES_MOST, folder);
        struct DataFile file = {.path = path, .name = path + strlen(data->path) + 1};
        data_file_split(&file);
        data->files[data->file_count++] = file;
    }
    closedir(dir);
}

/* "a.jsonl, b.jsonl and 3 more": the files of a folder that are read, or those that are not. */
static const char *data_file_names(struct Arena *arena, const struct Dataset *data, bool is_read) {
    enum { MOST = 8 };
    const char *names = "";
    size_t count = 0;
    for (size_t i = 0; i < data->file_count; i++) {
        if (data->files[i].is_read != is_read || count++ >= MOST)
            continue;
        names = arena_printf(arena, "%s%s%s", names, *names ? ", " : "", data->files[i].name);
    }
    return count > MOST ? arena_printf(arena, "%s and %zu more", names, count - MOST) : names;
}

static bool is_same_file(const char *a, const char *b) {
    struct stat one, other;
    if (stat(a, &one) != 0 || stat(b, &other) != 0)
        return false;
    if (one.st_ino == 0)
        return strcmp(a, b) == 0; /* Windows has no such number */
    return one.st_dev == other.st_dev && one.st_ino == other.st_ino;
}

/* Has a data set, if there is one, read this file? */
static bool is_read_by(const struct Dataset *data, const char *path) {
    for (size_t i = 0; data && i < data->file_count; i++) {
        if (data->files[i].is_read && is_same_file(data->files[i].path, path))
            return true;
    }
    return false;
}

/* Adds the files of a folder that belong to a split and have a shape: of those whose names say so
 * by one rank, the highest there is. What `training` has read is not added. */
static void dataset_add_split(struct Arena *arena, struct Dataset *data, enum Split split,
                              unsigned shape, const struct Dataset *training) {
    for (size_t rank = RANKS; rank-- > 0 && data->n == 0;) {
        for (size_t i = 0; i < data->file_count; i++) {
            struct DataFile *file = &data->files[i];
            bool is_wanted = file->split == split && file->rank == rank;
            if (!is_wanted || is_read_by(training, file->path))
                continue;
            dataset_add_file(arena, data, file, &shape, 1, true);
        }
    }
}

/* No file of a folder has what is wanted: why the first that might have had it has not, or what
 * there is instead. */
static _Noreturn void refuse_folder(struct Arena *arena, struct Dataset *data,
                                    const unsigned *shapes, size_t shape_count,
                                    const struct Dataset *training) {
    const char *files = data_file_names(arena, data, false);
    const char *wanted = shape_names(arena, shapes, shape_count);
    for (size_t i = 0; i < data->file_count; i++) {
        struct DataFile *file = &data->files[i];
        bool is_held_out = file->split == SPLIT_VALIDATION || file->split == SPLIT_TEST;
        if ((is_held_out && !training) || is_read_by(training, file->path))
            continue;
        dataset_add_file(arena, data, file, shapes, shape_count, false);
    }
    if (!*files)
        die("%s: no row with %s was found: no .jsonl file is there", data->path, wanted);
    if (training) {
        die("%s: no held-out row with %s was found: the training reads what is there (%s)",
            data->path, wanted, files);
    }
    die("%s: no row with %s was found but in held-out data (%s); name the file that is meant: %s",
        data->path, wanted, files, data->files[0].path);
}

/* Reads a folder: the rows of the best shape that any of its files has, of the first of the splits
 * that has such rows. Says which files these are if there are others. */
static void dataset_load_folder(struct Arena *arena, struct Dataset *data, const unsigned *shapes,
                                size_t shape_count, const struct Dataset *training) {
    static const enum Split to_train[] = {SPLIT_TRAIN, SPLIT_NONE};
    static const enum Split held_out[] = {SPLIT_VALIDATION, SPLIT_TEST, SPLIT_NONE, SPLIT_TRAIN};
    const enum Split *splits = training ? held_out : to_train;
    size_t split_count = training ? COUNT(held_out) : COUNT(to_train);
    data->files = arena_alloc(arena, DATA_FILES_MOST, sizeof *data->files);
    dataset_list_files(arena, data, data->path);
    /* A folder's own order is anybody's. */
    qsort(data->files, data->file_count, sizeof *data->files, compare_data_files);
    for (size_t s = 0; s < shape_count; s++) {
        for (size_t k = 0; k < split_count && data->n == 0; k++) {
            dataset_add_split(arena, data, splits[k], shapes[s], training);
        }
    }
    if (data->n == 0)
        refuse_folder(arena, data, shapes, shape_count, training);
    const char *read = data_file_names(arena, data, true);
    const char *left_out = data_file_names(arena, data, false);
    const char *purpose = training ? " as held-out data" : "";
    if (*left_out)
        warn("%s: read %s%s; left out %s", data->path, read, purpose, left_out);
}

static struct Dataset *dataset_open(struct Arena *arena, const char *path, const unsigned *shapes,
                                    size_t shape_count, const struct Dataset *training) {
    struct Dataset *data = arena_zeros(arena, 1, sizeof *data);
    data->path = arena_printf(arena, "%s", path);
    if (is_folder(path)) {
        dataset_load_folder(arena, data, shapes, shape_count, training);
        return data;
    }
    data->files = arena_zeros(arena, 1, sizeof *data->files);
    data->files[data->file_count++].path = data->path;
    dataset_add_file(arena, data, data->files, shapes, shape_count, false);
    const char *wanted = shape_names(arena, shapes, shape_count);
    CHECK(data->n > 0, "%s: no row with %s was found", path, wanted);
    return data;
}

static bool text_contains(struct Text text, struct Text word) {
    for (size_t i = 0; i + word.length <= text.length; i++) {
        const char *at = text.data + i;
        if (*at == *word.data && memcmp(at, word.data, word.length) == 0)
            return true;
    }
    return false;
}

/* Tutorials tell one to write "<|endoftext|>" behind each text. Here these are thirteen ordinary
 * characters, which the model would learn to write, and the end token is added behind them all the
 * same. One note a data set says so. */
static void warn_of_written_ends(const struct Dataset *data, const struct Tokenizer *tok) {
    struct Text name = tok->token[tok->end_token];
    unsigned used = data->shape;
    if ((used & SHAPE_PREFERENCE) == SHAPE_PREFERENCE)
        used |= HAS_PROMPT;
    size_t count = 0;
    for (size_t r = 0; r < data->n; r++) {
        const struct Row *row = &data->rows[r];
        struct Text texts[] = {row->text, row->prompt, row->completion, row->chosen, row->rejected};
        bool found = false;
        for (size_t i = 0; i < COUNT(texts); i++) /* in the order of enum Field */
            found = found || (used >> i & 1 && text_contains(texts[i], name));
        count += found;
    }
    if (count > 0)
        warn("%s: %zu of %zu rows contain \"%.*s\", which is ordinary text here; leave it out: the "
             "end token is added behind each text without it",
             data->path, count, data->n, (int)name.length, name.data);
}

/* dataset_load -- a JSON Lines file, or a folder of them.          [glossary: Conjunto de dados]
 * shapes: what the caller can use, best first. A folder stands for the files of its train split,
 * or, if no name says "train", for those whose names say nothing of a split.  test: data_splits */
static struct Dataset *dataset_load(struct Arena *arena, const char *path, const unsigned *shapes,
                                    size_t shape_count) {
    return dataset_open(arena, path, shapes, shape_count, NULL);
}

/* dataset_load_held_out -- rows to measure a training on, of the shape of the rows it learns from.
 * A folder stands for its validation split, else for its test split, else for all of it, but never
 * for a file that the training reads: a model that has seen the answers does well on them. */
static struct Dataset *dataset_load_held_out(struct Arena *arena, const char *path,
                                             const struct Dataset *training) {
    return dataset_open(arena, path, &training->shape, 1, training);
}

/* =============================================================================================
 * Chapter 24 - safetensors, model and adapter folders            [glossary: Hugging Face]
 *
 * A model is a folder that transformers reads: config.json and model.safetensors. An adapter is
 * one that PEFT reads. What enters: such folders, whoever wrote them; settings that would change
 * the mathematics are refused by name. What leaves: a model in memory, or a folder that is
 * replaced as a whole or not at all.
 * ============================================================================================= */

/* The place of the first of n numbers that is NaN or infinite; n: all are finite. */
static size_t first_not_finite(const float *x, size_t n) {
    for (size_t first = 0; first < n; first += 4096) {
        size_t end = MIN(n, first + 4096);
        int bad = 0;
        for (size_t i = first; i < end; i++)
            bad |= !(fabsf(x[i]) <= FLT_MAX);
        for (size_t i = first; bad && i < end; i++)
            if (!isfinite(x[i]))
                return i;
    }
    return n;
}

/* bfloat16 is the upper half of a float; float16 has 5 bits of exponent (bias 15) and 10 of
 * fraction, without a leading 1 below 2^-14. */
static float float_of_bf16(uint16_t half) {
    return float_of_bits((uint32_t)half << 16);
}

static float float_of_f16(uint16_t half) {
    int exponent = half >> 10 & 31;
    int fraction = half & 1023;
    float magnitude = exponent == 0    ? ldexpf((float)fraction, -24)
                      : exponent == 31 ? (fraction ? NAN : INFINITY)
                                       : ldexpf((float)(1024 + fraction), exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

/* safetensors: 8 bytes of header length, a JSON header {"name": {"dtype", "shape",
 * "data_offsets"}}, then the numbers. */
struct SafeTensors {
    FILE *file;
    char *path;
    struct Json *header;
    uint64_t data_start, data_size;
};

/* a tensor's bytes, counted from the header's end */
struct Span {
    uint64_t begin, end;
    const char *name;
};

/* by their middles, which empty ones have too */
static int compare_spans(const void *a, const void *b) {
    const struct Span *x = a;
    const struct Span *y = b;
    return (x->begin + x->end > y->begin + y->end) - (x->begin + x->end < y->begin + y->end);
}

static struct Span safetensors_span(const struct SafeTensors *st, const struct Json *entry) {
    const struct Json *dtype = json_get(entry, "dtype");
    const struct Json *shape = json_get(entry, "shape");
    const struct Json *offsets = json_get(entry, "data_offsets");
    CHECK(dtype && dtype->type == JSON_STRING && shape && shape->type == JSON_ARRAY && offsets
              && offsets->type == JSON_ARRAY && offsets->child && offsets->child->next,
          "%s: tensor %s lacks dtype, shape or data_offsets", st->path, entry->key.data);
    struct Span span = {json_size(offsets->child, SIZE_MAX / 4, st->path, "data_offsets"),
                        json_size(offsets->child->next, SIZE_MAX / 4, st->path, "data_offsets"),
                        entry->key.data};
    CHECK(span.begin <= span.end && span.end <= st->data_size,
          "%s: tensor %s: its bytes %llu to %llu leave the file's %llu; cut short?", st->path,
          span.name, (unsigned long long)span.begin, (unsigned long long)span.end,
          (unsigned long long)st->data_size);
    return span;
}

/* The size of a file of weights; 0 if it is none: safetensors_open says why. */
static uint64_t weights_size(const char *path) {
    char start[64];
    struct stat status;
    FILE *file = stat(path, &status) == 0 && S_ISREG(status.st_mode) ? fopen(path, "rb") : NULL;
    if (!file)
        return 0;
    check_fetched(path, start, fread(start, 1, sizeof start, file));
    fclose(file);
    return (uint64_t)status.st_size;
}

static struct SafeTensors safetensors_open(struct Arena *arena, const char *path) {
    struct SafeTensors st = {.path = arena_printf(arena, "%s", path)};
    struct stat status;
    CHECK(stat(path, &status) != 0 || S_ISREG(status.st_mode),
          "%s: is a folder, a pipe or a device; a file was expected", path);
    st.file = fopen(path, "rb");
    CHECK(st.file, "%s: %s", path, strerror(errno));
    uint64_t size = weights_size(path);
    unsigned char prefix[8];
    CHECK(fread(prefix, 1, 8, st.file) == 8,
          "%s: not a safetensors file: it has %llu bytes, fewer than its 8-byte prefix", path,
          (unsigned long long)size);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | prefix[i];
    CHECK(length >= 2 && length <= size - 8,
          "%s: not a safetensors file, or cut short: its header claims %llu bytes, %llu follow",
          path, (unsigned long long)length, (unsigned long long)(size - 8));
    char *text = arena_alloc(arena, (size_t)length + 1, 1);
    CHECK(fread(text, 1, (size_t)length, st.file) == length, "%s: cannot be read: %s", path,
          strerror(errno));
    st.header = json_object(arena, (struct Text){text, (size_t)length}, path, ", in its header");
    st.data_start = 8 + length;
    st.data_size = size - st.data_start;
    /* No two tensors share bytes, those that nobody reads included: the file would not be what
     * its writer meant. */
    struct Span *spans = arena_alloc(arena, (size_t)st.header->number + 1, sizeof *spans);
    struct Span *to = spans;
    for (struct Json *entry = st.header->child; entry; entry = entry->next)
        if (strcmp(entry->key.data, "__metadata__") != 0)
            *to++ = safetensors_span(&st, entry);
    qsort(spans, (size_t)(to - spans), sizeof *spans, compare_spans);
    for (struct Span *span = spans + 1; span < to; span++)
        CHECK(span->begin >= span[-1].end, "%s: tensors %s and %s share bytes", path, span[-1].name,
              span->name);
    return st;
}

static void safetensors_convert(float *to, const unsigned char *from, size_t n, const char *dtype) {
    if (strcmp(dtype, "F32") == 0) {
        memcpy(to, from, n * 4);
        return;
    }
    bool bf16 = strcmp(dtype, "BF16") == 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t half = (uint16_t)(from[2 * i] | from[2 * i + 1] << 8);
        to[i] = bf16 ? float_of_bf16(half) : float_of_f16(half);
    }
}

/* Reads one entry of the header into a tensor of ours, whose shape decides. */
static void safetensors_read(struct SafeTensors *st, const struct Json *entry,
                             struct Tensor *tensor) {
    struct Span span = safetensors_span(st, entry);
    const struct Json *shape = json_get(entry, "shape");
    const char *type = json_get(entry, "dtype")->string.data;
    size_t width = strcmp(type, "F32") == 0                                ? 4
                   : strcmp(type, "F16") == 0 || strcmp(type, "BF16") == 0 ? 2
                                                                           : 0;
    CHECK(width, "%s: tensor %s has type %.12s; F32, F16 and BF16 are read", st->path, tensor->name,
          type);
    char found[96] = "";
    size_t dims = 0;
    size_t used = 0;
    bool same = true;
    for (struct Json *item = shape->child; item; item = item->next, dims++) {
        double size = item->type == JSON_NUMBER ? item->number : -1;
        same = same && dims < tensor->ndim && size == (double)tensor->shape[dims];
        if (used < 60)
            used += (size_t)snprintf(found + used, sizeof found - used, "%s%.0f", dims ? ", " : "",
                                     size);
    }
    CHECK(same && dims == tensor->ndim,
          "%s: tensor %s: expected shape [%zu%s%.0zu], found [%s]; is the folder's config this "
          "file's?",
          st->path, tensor->name, tensor->shape[0], tensor->ndim == 2 ? ", " : "", tensor->shape[1],
          found);
    CHECK(span.end - span.begin == tensor->n * width,
          "%s: tensor %s: %llu bytes for %zu numbers of type %s", st->path, tensor->name,
          (unsigned long long)(span.end - span.begin), tensor->n, type);
    CHECK(fseeko(st->file, (off_t)(st->data_start + span.begin), SEEK_SET) == 0, "%s: %s", st->path,
          strerror(errno));
    unsigned char chunk[4 * 8192];
    for (size_t done = 0; done < tensor->n;) {
        size_t n = MIN(tensor->n - done, (size_t)8192);
        CHECK(fread(chunk, width, n, st->file) == n, "%s: tensor %s cannot be read: %s", st->path,
              tensor->name, ferror(st->file) ? strerror(errno) : "the file ends");
        safetensors_convert(tensor->w + done, chunk, n, type);
        const float *w = tensor->w + done;
        size_t bad = first_not_finite(w, n);
        bool moment = strncmp(tensor->name, "exp_avg", 7) == 0;
        while (moment && bad < n && isinf(w[bad])) /* an infinite one makes a step of 0 */
            bad += 1 + first_not_finite(w + bad + 1, n - bad - 1);
        CHECK(bad == n || tensor->bits,
              "%s: tensor %s: number %zu is %g, a finite one was expected; "
              "take an earlier checkpoint or a fresh copy of the file",
              st->path, tensor->name, done + bad, tensor->w[done + bad]);
        done += n;
    }
}

/* Writes tensors as F32, names prefixed, header padded to 8 bytes as the format asks.
 * metadata: what is added to the header's, as in JSON: ,"name":"value", or "". */
static void safetensors_write_with(const char *folder, const char *name, struct Tensor **tensors,
                                   size_t count, const char *prefix, const char *metadata) {
    struct Output out = output_open(folder, name);
    fwrite("\0\0\0\0\0\0\0", 1, 8, out.file); /* the header's length, when it is known */
    int begun = fprintf(out.file, "{\"__metadata__\":{\"format\":\"pt\"%s}", metadata);
    size_t length = (size_t)begun;
    size_t offset = 0;
    for (size_t i = 0; i < count; i++) {
        struct Tensor *t = tensors[i];
        size_t shorter = tensor_is_head(t) && *prefix ? strlen("transformer.") : 0;
        length += (size_t)fprintf(out.file,
                                  ",\"%.*s%s\":{\"dtype\":\"F32\",\"shape\":[%zu%s%.0zu],\"data_"
                                  "offsets\":[%zu,%zu]}",
                                  (int)(strlen(prefix) - shorter), prefix, t->name, t->shape[0],
                                  t->ndim == 2 ? "," : "", t->shape[1], offset, offset + 4 * t->n);
        offset += 4 * t->n;
    }
    length += (size_t)fprintf(out.file, "}%*s", (int)(7 - length % 8), "");
    for (size_t i = 0; i < count; i++)
        if (tensors[i]->n)
            fwrite(tensors[i]->w, 4, tensors[i]->n, out.file); /* not of NULL */
    fseeko(out.file, 0, SEEK_SET); /* unlike rewind() it keeps the mark of an error */
    for (int i = 0; i < 8; i++)
        fputc((int)((uint64_t)length >> 8 * i & 255), out.file);
    output_close(&out);
}

static void safetensors_write(const char *folder, const char *name, struct Tensor **tensors,
                              size_t count, const char *prefix) {
    safetensors_write_with(folder, name, tensors, count, prefix, "");
}

static void config_check(const struct GPT2Config *c, const char *path) {
    CHECK(c->n_embd > 0 && c->n_embd <= 1 << 16 && c->n_head > 0 && c->n_embd % c->n_head == 0,
          "%s: n_embd %zu must be a multiple of n_head %zu, at most 65536", path, c->n_embd,
          c->n_head);
    CHECK(c->n_layer > 0 && c->n_layer <= 1000, "%s: n_layer %zu; 1 to 1000 can be used", path,
          c->n_layer);
    CHECK(c->n_positions > 0 && c->n_positions <= 1 << 20,
          "%s: n_positions %zu; 1 to 1048576 can be used", path, c->n_positions);
    CHECK(c->vocab_size > BYTE_TOKENS && c->vocab_size <= 65536,
          "%s: vocab_size %zu; 257 to 65536 can be used", path, c->vocab_size);
}

static size_t config_size(const struct Json *config, const char *path, const char *name,
                          size_t fallback) {
    struct Json *item = json_get(config, name);
    return item && item->type != JSON_NULL ? json_size(item, 1 << 24, path, name) : fallback;
}

/* What an enum JsonType is called in a message. */
static const char *const JSON_TYPE_NAMES[] = {"null",     "false",  "true",     "a number",
                                              "a string", "a list", "an object"};

/* One of the special tokens of a config.json: its id, or `fallback` where it is absent or null. */
static int config_token_id(const struct Json *config, const char *path, const char *name,
                           size_t vocab_size, int fallback) {
    const struct Json *id = json_get(config, name);
    if (!id || id->type == JSON_NULL)
        return fallback;
    if (id->type == JSON_ARRAY) {
        CHECK(id->number == 1,
              "%s: \"%s\" lists %.0f ids, and one can be used; write it in place of the list", path,
              name, id->number);
        id = id->child;
    }
    bool is_number = id->type == JSON_NUMBER;
    double number = id->number;
    bool is_id = is_number && number >= 0 && number < (double)vocab_size && number == floor(number);
    const char *found = is_number ? json_number_text(number) : JSON_TYPE_NAMES[id->type];
    CHECK(is_id, "%s: \"%s\" must be the id of one token, 0 to %zu (vocab_size - 1), found %s",
          path, name, vocab_size - 1, found);
    return (int)number;
}

/* A setting that GPT2Config.attribute_map gives a second name.              test: config_names */
static size_t config_either(const struct Json *config, const char *path, const char *name,
                            const char *alias, size_t fallback) {
    const struct Json *item = json_get(config, name);
    bool named = item && item->type != JSON_NULL;
    size_t value = config_size(config, path, name, fallback);
    size_t other = config_size(config, path, alias, value);
    CHECK(!named || other == value,
          "%s: \"%s\" is %zu, but \"%s\", another name for it, is %zu; take one of them out", path,
          name, value, alias, other);
    return other;
}

/* Settings that change the mathematics are refused: what each may be, if it is not absent, null
 * or empty. */
struct Allowed {
    const char *name, *values[5];
};

static void config_refuse(const struct Json *config, const char *path,
                          const struct Allowed *allowed, size_t n) {
    for (const struct Allowed *a = allowed; a < allowed + n; a++) {
        const struct Json *setting = json_get(config, a->name);
        const struct Json *item = setting && setting->type >= JSON_ARRAY ? setting->child : setting;
        for (; item; item = item == setting ? NULL : item->next) {
            const char *word =
                item->type == JSON_STRING ? item->string.data : JSON_TYPE_NAMES[item->type];
            bool good = item->type == JSON_NULL;
            for (size_t k = 0; k < COUNT(a->values) && a->values[k]; k++)
                good = good || strcmp(word, a->values[k]) == 0;
            CHECK(good, "%s: \"%s\": %s is implemented, %s is not: it changes the mathematics",
                  path, a->name, a->values[0], word);
        }
    }
}

/* A folder's config.json. Several activations are gelu_new by another name, equal but for rounding.
 * `tied` says what "tie_word_embeddings" does: whether wte is to be the output layer too.
 *                                                              test: broken_config, config_names */
static struct GPT2Config config_load(const char *folder, bool *tied) {
    static const struct Allowed allowed[] = {{"model_type", {"gpt2"}},
                                             {"tie_word_embeddings", {"true", "false"}},
                                             {"activation_function",
                                              {"gelu_new", "gelu_pytorch_tanh", "gelu_fast",
                                               "gelu_python_tanh", "gelu_accurate"}},
                                             {"scale_attn_weights", {"true"}},
                                             {"scale_attn_by_inverse_layer_idx", {"false"}},
                                             {"add_cross_attention", {"false"}},
                                             {"pruned_heads", {"null"}},
                                             {"quantization_config", {"null"}}};
    struct Arena arena = {0};
    char *path = arena_printf(&arena, "%s/config.json", folder);
    CHECK(file_exists(folder) || errno != EACCES, "%s: %s", folder, strerror(errno));
    CHECK(file_exists(folder),
          "%s: no such folder; a model is a folder with config.json and model.safetensors", folder);
    CHECK(file_exists(path),
          "%s: no config.json inside; a model is a folder with config.json and model.safetensors",
          folder);
    struct Json *json = json_read_file(&arena, path);
    config_refuse(json, path, allowed, COUNT(allowed));
    struct GPT2Config c = {
        .vocab_size = config_size(json, path, "vocab_size", 50257),
        .n_positions = config_either(json, path, "n_positions", "max_position_embeddings",
                                     config_size(json, path, "n_ctx", 1024)),
        .n_embd = config_either(json, path, "n_embd", "hidden_size", 768),
        .n_layer = config_either(json, path, "n_layer", "num_hidden_layers", 12),
        .n_head = config_either(json, path, "n_head", "num_attention_heads", 12),
    };
    config_check(&c, path);
    size_t inner = config_size(json, path, "n_inner", 4 * c.n_embd);
    CHECK(inner == 4 * c.n_embd, "%s: n_inner %zu is not implemented; 4 * n_embd is", path, inner);
    struct Json *eps = json_get(json, "layer_norm_epsilon");
    CHECK(!eps || (eps->type == JSON_NUMBER && eps->number > 0 && eps->number <= 1),
          "%s: \"layer_norm_epsilon\" must be above 0, at most 1", path);
    c.layer_norm_epsilon = eps ? (float)eps->number : 1e-5f;
    int endoftext = endoftext_id(c.vocab_size);
    c.eos_token_id = config_token_id(json, path, "eos_token_id", c.vocab_size, endoftext);
    c.pad_token_id = config_token_id(json, path, "pad_token_id", c.vocab_size, c.eos_token_id);
    struct Json *bos = json_get(json, "bos_token_id"); /* 50256 unless transformers is told */
    bool beyond = bos && bos->type == JSON_NUMBER && bos->number >= (double)c.vocab_size;
    c.bos_token_id = endoftext;
    if (!beyond)
        c.bos_token_id = config_token_id(json, path, "bos_token_id", c.vocab_size, endoftext);
    const struct Json *tie = json_get(json, "tie_word_embeddings");
    *tied = !tie || tie->type != JSON_FALSE;
    arena_free(&arena);
    return c;
}

/* A tensor's name without what stands before it: "transformer." of a model with heads,
 * "pretrained_model." of TRL's value-head model, "base_model.model." of PEFT, "module." of
 * DataParallel, "_orig_mod." of torch.compile, in any order.
 * By hand: "module._orig_mod.transformer.h.0.ln_1.bias" -> "h.0.ln_1.bias".     test: bare_name */
static const char *bare_name(const char *name) {
    static const char *const prefixes[] = {"transformer.", "pretrained_model.", "base_model.model.",
                                           "module.", "_orig_mod."};
    for (size_t i = 0; i < COUNT(prefixes);) {
        size_t length = strlen(prefixes[i]);
        bool found = strncmp(name, prefixes[i], length) == 0;
        if (found)
            name += length;
        i = found ? 0 : i + 1;
    }
    return name;
}

/* The entry of a file's header for a tensor of this bare name; NULL: there is none. */
static struct Json *tensor_entry(const struct SafeTensors *st, const char *name) {
    struct Json *found = NULL;
    size_t length = strlen(name);
    for (struct Json *entry = st->header->child; entry; entry = entry->next) {
        const char *full = entry->key.data;
        size_t before = entry->key.length - MIN(entry->key.length, length);
        if (strcmp(full + before, name) != 0 || bare_name(full) != full + before)
            continue;
        CHECK(!found, "%s: tensors %s and %s are both %s; one of them was expected", st->path,
              found->key.data, entry->key.data, name);
        found = entry;
    }
    return found;
}

/* Reads a tensor, whatever stands before its name in the file. */
static bool tensor_load(struct SafeTensors *st, struct Tensor *tensor) {
    struct Json *entry = tensor_entry(st, tensor->name);
    if (!entry)
        return false;
    safetensors_read(st, entry, tensor);
    entry->number = 0; /* taken */
    return tensor->loaded = true;
}

/* The files that hold a model: one, or several named by an index, all inside the folder. */
static size_t model_files(struct Arena *arena, const char *folder, char **files, size_t most) {
    files[0] = arena_printf(arena, "%s/model.safetensors", folder);
    char *index = arena_printf(arena, "%s/model.safetensors.index.json", folder);
    CHECK(file_exists(files[0]) || file_exists(index),
          "%s: no model.safetensors inside; of a pytorch_model.bin make one with transformers: "
          "save_pretrained(FOLDER, safe_serialization=True)",
          folder);
    if (file_exists(files[0]))
        return 1;
    struct Json *map = json_get(json_read_file(arena, index), "weight_map");
    CHECK(map && map->type == JSON_OBJECT && map->child,
          "%s: no \"weight_map\" inside, or one that names no file", index);
    size_t count = 0;
    for (struct Json *item = map->child; item; item = item->next) {
        CHECK(item->type == JSON_STRING && item->string.length && !strchr(item->string.data, '/')
                  && !strchr(item->string.data, '\\'),
              "%s: \"%s\" must name a file of this folder", index, item->key.data);
        char *path = arena_printf(arena, "%s/%s", folder, item->string.data);
        size_t i = 0;
        while (i < count && strcmp(files[i], path) != 0)
            i++;
        CHECK(i < most, "%s: more than %zu files", index, most);
        files[i] = path;
        count = MAX(count, i + 1);
    }
    return count;
}

/* What a label's name says: 1 positive, -1 negative, 0 neither. */
static int label_sign(const char *name) {
    char start[4] = "";
    for (size_t i = 0; i < 3 && name[i]; i++)
        start[i] = (char)tolower((unsigned char)name[i]);
    if (strcmp(start, "pos") == 0 || strcmp(name, "LABEL_1") == 0)
        return 1;
    if (strcmp(start, "neg") == 0 || strcmp(name, "LABEL_0") == 0)
        return -1;
    return 0;
}

/* Which of the two labels that `file` has rows for is the positive one: what id2label of the
 * model's config.json says, and where that says nothing, label 1. */
static size_t positive_label(const char *folder, const char *file) {
    static const struct Allowed allowed[] = {{"problem_type", {"single_label_classification"}}};
    struct Arena arena = {0};
    char *path = arena_printf(&arena, "%s/config.json", folder ? folder : "");
    struct Json *json = folder && file_exists(path) ? json_read_file(&arena, path) : NULL;
    const char *name[2] = {"LABEL_0", "LABEL_1"};
    config_refuse(json, path, allowed, COUNT(allowed));
    for (size_t i = 0; i < 2; i++) {
        const struct Json *label = json_get(json_get(json, "id2label"), i ? "1" : "0");
        if (label && label->type == JSON_STRING)
            name[i] = label->string.data;
    }
    size_t positive = label_sign(name[0]) > label_sign(name[1]) ? 0 : 1;
    warn("%s: a classifier of two labels is read as a reward model: the reward is the logit of "
         "\"%s\" minus that of \"%s\"; saved again, it has one label",
         file, name[positive], name[1 - positive]);
    arena_free(&arena);
    return positive;
}

/* Two labels are transformers' default. The probability of one depends on the difference of their
 * logits alone, and that is the reward that a single row, w_1 - w_0, gives:
 *     P(label 1) = e^l_1 / (e^l_0 + e^l_1) = sigmoid(l_1 - l_0),  l_1 - l_0 = hidden . (w_1 - w_0)
 * By hand: w_0 = (1, 2), w_1 = (4, 1): the head is (3, -1).  test: two_labels, two_labels_golden */
static void reward_head_of_two(struct Tensor *score, struct SafeTensors *st, const char *folder) {
    struct Arena arena = {0};
    size_t C = score->n;
    struct Tensor both = {.name = "score.weight", .shape = {2, C}, .ndim = 2, .n = 2 * C};
    both.w = arena_floats(&arena, both.n);
    tensor_load(st, &both);
    size_t positive = positive_label(folder, st->path);
    for (size_t c = 0; c < C; c++)
        score->w[c] = both.w[positive * C + c] - both.w[(1 - positive) * C + c];
    score->loaded = true;
    arena_free(&arena);
}

/* Reads a file's reward head, if it has one. */
static void reward_head_load(struct GPT2 *model, struct SafeTensors *st, const char *folder) {
    const struct Json *entry = tensor_entry(st, "score.weight");
    const struct Json *shape = json_get(entry, "shape");
    if (!entry)
        return;
    size_t labels = shape->child ? json_size(shape->child, 1 << 24, st->path, "shape") : 0;
    CHECK(labels <= 2,
          "%s: score.weight has %zu labels; one is a reward, two are a classifier's "
          "negative and positive; more are not read",
          st->path, labels);
    CHECK(!tensor_entry(st, "score.bias"),
          "%s: has a score.bias; a GPT-2 classifier has none in "
          "transformers, which leaves it out; take it out of the file if that is meant",
          st->path);
    struct Tensor *score = reward_head_declare(model);
    if (labels == 2)
        reward_head_of_two(score, st, folder);
    else
        tensor_load(st, score);
}

/* What a model's files hold beside its tensors: an output layer, and what nothing takes. */
struct Beside {
    struct Arena arena;
    struct Tensor lm_head;
    size_t count; /* tensors that nothing takes */
    const char *first; /* the first of them; NULL: there is none */
};

/* Counts what is left of a file. GPT-2's causal masks, which old files hold, are no weights. */
static void beside_note(struct Beside *beside, const struct SafeTensors *st) {
    for (const struct Json *entry = st->header->child; entry; entry = entry->next) {
        const char *name = entry->key.data;
        const char *part = strstr(name, ".attn.");
        if (entry->number == 0 || strcmp(name, "__metadata__") == 0)
            continue;
        if (part && strcmp(part, ".attn.bias") == 0)
            continue;
        if (part && strcmp(part, ".attn.masked_bias") == 0)
            continue;
        if (beside->count++ == 0)
            beside->first = arena_printf(&beside->arena, "%s", name);
    }
}

/* A tensor of wte's shape under another name, to be compared with it. */
static struct Tensor tensor_like_wte(const struct GPT2 *model, struct Arena *arena,
                                     const char *name) {
    struct Tensor like = {.shape = {model->wte.shape[0], model->wte.shape[1]}, .ndim = 2};
    snprintf(like.name, sizeof like.name, "%s", name);
    like.n = model->wte.n;
    like.w = arena_floats(arena, like.n);
    return like;
}

/* Reads what a file has of a model's tensors; a head is declared where there is one. */
static void model_read(struct GPT2 *model, const char *path, struct Beside *beside) {
    struct Arena arena = {0};
    struct SafeTensors st = safetensors_open(&arena, path);
    reward_head_load(model, &st, model->folder);
    if (tensor_entry(&st, "v_head.summary.weight"))
        value_head_declare(model);
    for (size_t i = 0; i < model->tensor_count; i++) {
        if (model->tensors[i] != &model->score)
            tensor_load(&st, model->tensors[i]);
    }
    if (tensor_entry(&st, "lm_head.weight")) {
        beside->lm_head = tensor_like_wte(model, &beside->arena, "lm_head.weight");
        tensor_load(&st, &beside->lm_head);
    }
    beside_note(beside, &st);
    fclose(st.file);
    arena_free(&arena);
}

/* The place of the first number in which a tensor of wte's shape is not wte; n: it is equal. */
static size_t first_unlike_wte(const struct GPT2 *model, const struct Tensor *like) {
    size_t i = 0;
    while (i < like->n && like->w[i] == model->wte.w[i])
        i++;
    return i;
}

/* The output layer of GPT-2 is wte. A file may hold it once, under either name, or twice; a second
 * one with numbers of its own ("untied") is not implemented. A reward model has no use for one.
 *                                                                            test: output_layer */
static void output_layer_check(struct GPT2 *model, const struct Tensor *lm_head, bool tied,
                               const char *where) {
    struct Tensor *wte = &model->wte;
    bool both = lm_head->loaded && wte->loaded;
    CHECK(tied || both || (wte->loaded && model->score.n),
          "%s: \"tie_word_embeddings\" is false in config.json, but there is no %s: transformers "
          "would draw it at random; set it to true if wte is the output layer too",
          where, wte->loaded ? "lm_head.weight" : "wte.weight");
    if (!lm_head->loaded)
        return;
    if (!both)
        memcpy(wte->w, lm_head->w, wte->n * sizeof(float));
    wte->loaded = true;
    size_t i = first_unlike_wte(model, lm_head);
    CHECK(i == wte->n,
          "%s: lm_head.weight is not wte.weight (number %zu is %g, not %g): an output "
          "layer of its own is not implemented; take lm_head.weight out if wte is meant to be it, "
          "as in GPT-2",
          where, i, lm_head->w[i], wte->w[i]);
    if (!tied)
        warn("%s: \"tie_word_embeddings\" is false, but lm_head.weight equals wte.weight: they are "
             "one tensor here, in training and when saved",
             where);
}

/* `found`: a tensor that is there and that nothing takes, to show how names look; NULL: none. */
static void tensor_check_loaded(const struct Tensor *t, const char *where, const char *found) {
    CHECK(t->loaded, "%s: tensor %s is missing; expected shape [%zu%s%.0zu]%s%s", where, t->name,
          t->shape[0], t->ndim == 2 ? ", " : "", t->shape[1], found ? "; there is " : "",
          found ? found : "");
}

/* gpt2_load -- a model folder; heads are loaded where they are there.  [glossary:
 * AutoModelForCausalLM] */
static struct GPT2 *gpt2_load(const char *folder) {
    struct Arena arena = {0};
    char *files[1024];
    bool tied;
    struct GPT2Config c = config_load(folder, &tied);
    size_t file_count = model_files(&arena, folder, files, COUNT(files));
    size_t numbers =
        (c.vocab_size + c.n_positions) * c.n_embd + c.n_layer * 12 * c.n_embd * c.n_embd;
    size_t bytes = 0;
    for (size_t f = 0; f < file_count; f++)
        bytes += (size_t)weights_size(files[f]);
    CHECK(numbers <= bytes / 2 + (1 << 20),
          "%s: config.json describes %zu numbers, at least %zu MB; the weights have %zu MB; is it "
          "theirs, or are they cut short?",
          folder, numbers, numbers >> 19, bytes >> 20);
    CHECK(c.n_layer <= bytes / 512 + 64,
          "%s: config.json describes %zu layers, whose 12 tensors' names alone do not fit into the "
          "weights' %zu bytes; is it theirs?",
          folder, c.n_layer, bytes);
    struct GPT2 *model = gpt2_new(c);
    struct Beside beside = {0};
    model->folder = arena_printf(&model->arena, "%s", folder);
    for (size_t f = 0; f < file_count; f++)
        model_read(model, files[f], &beside);
    bool any = model->wte.loaded || beside.lm_head.loaded;
    if (any)
        output_layer_check(model, &beside.lm_head, tied, folder);
    for (size_t i = 0; i < model->tensor_count; i++) {
        tensor_check_loaded(model->tensors[i], folder, beside.first);
    }
    if (beside.count)
        warn("%s: tensors in its weights that config.json has no place for are not read: %zu, the "
             "first is %s",
             folder, beside.count, beside.first);
    arena_free(&beside.arena);
    arena_free(&arena);
    return model;
}

static void config_save(const struct GPT2 *model, const char *folder) {
    const struct GPT2Config *c = &model->config;
    bool classifier = model->score.n > 0;
    struct Output out = output_open(folder, "config.json");
    fprintf(out.file,
            "{\n  \"activation_function\": \"gelu_new\",\n  \"architectures\": [\"%s\"],\n  "
            "\"attn_pdrop\": 0.0,\n  \"bos_token_id\": %d,\n",
            classifier ? "GPT2ForSequenceClassification" : "GPT2LMHeadModel", c->bos_token_id);
    fprintf(out.file,
            "  \"dtype\": \"float32\",\n  \"embd_pdrop\": 0.0,\n  \"eos_token_id\": %d,\n",
            c->eos_token_id);
    if (classifier)
        fputs("  \"id2label\": {\"0\": \"LABEL_0\"},\n  \"label2id\": {\"LABEL_0\": 0},\n",
              out.file);
    fprintf(out.file,
            "  \"initializer_range\": 0.02,\n  \"layer_norm_epsilon\": %.7g,\n  \"model_type\": "
            "\"gpt2\",\n  \"n_ctx\": %zu,\n  \"n_embd\": %zu,\n  \"n_head\": %zu,\n  \"n_inner\": "
            "null,\n",
            c->layer_norm_epsilon, c->n_positions, c->n_embd, c->n_head);
    fprintf(out.file,
            "  \"n_layer\": %zu,\n  \"n_positions\": %zu,\n  \"pad_token_id\": %d,\n  "
            "\"resid_pdrop\": 0.0,\n  \"tie_word_embeddings\": true,\n  \"use_cache\": true,\n  "
            "\"vocab_size\": %zu\n}\n",
            c->n_layer, c->n_positions, c->pad_token_id, c->vocab_size);
    output_close(&out);
}

/* A special token as tokenizer_config.json names it, null where its id has no name. */
static void write_special_token(FILE *file, const char *before, const struct Tokenizer *tok,
                                const struct GPT2Config *c, int id) {
    struct Arena arena = {0};
    int endoftext = endoftext_id(c->vocab_size);
    struct Text name = id == c->pad_token_id ? c->pad_token : (struct Text){0};
    if (id == endoftext)
        name = text_of("<|endoftext|>");
    if (id < endoftext)
        name = token_as_unicode(&arena, tok->token[id]);
    if (name.length > 0)
        json_write_string(file, before, name);
    else
        fprintf(file, "%snull", before);
    arena_free(&arena);
}

/* tokenizer_config.json. transformers cuts a text at every special token before it encodes the
 * rest; where one of them is an ordinary token, split_special_tokens makes it encode texts as
 * GPT-2's tokenizer does. */
static void tokenizer_config_save(const struct Tokenizer *tok, const char *folder,
                                  const struct GPT2Config *c) {
    struct Output out = output_open(folder, "tokenizer_config.json");
    int lowest = MIN(c->bos_token_id, MIN(c->eos_token_id, c->pad_token_id));
    fputs("{\n  \"add_prefix_space\": false", out.file);
    if (c->pad_token.length > 0) {
        fprintf(out.file, ",\n  \"added_tokens_decoder\": {\"%d\": ", c->pad_token_id);
        json_write_string(out.file, "{\"content\": ", c->pad_token);
        fputs(", \"special\": true}}", out.file);
    }
    write_special_token(out.file, ",\n  \"bos_token\": ", tok, c, c->bos_token_id);
    write_special_token(out.file, ",\n  \"eos_token\": ", tok, c, c->eos_token_id);
    fprintf(out.file, ",\n  \"model_max_length\": %zu", c->n_positions);
    write_special_token(out.file, ",\n  \"pad_token\": ", tok, c, c->pad_token_id);
    if (lowest < endoftext_id(c->vocab_size))
        fputs(",\n  \"split_special_tokens\": true", out.file);
    fputs(",\n  \"tokenizer_class\": \"GPT2Tokenizer\"", out.file);
    fputs(",\n  \"unk_token\": \"<|endoftext|>\"\n}\n", out.file);
    output_close(&out);
}

/* adapter_config.json: r 8, lora_alpha 8 where it is silent, as PEFT. */
static struct Adapter adapter_config_load(struct Arena *arena, const char *folder) {
    static const struct Allowed allowed[] = {{"peft_type", {"LORA"}},
                                             {"bias", {"none"}},
                                             {"modules_to_save",
                                              {"score", "classifier", "lm_head", "wte"}},
                                             {"init_lora_weights",
                                              {"true", "false", "gaussian", "eva", "orthogonal"}},
                                             {"use_dora", {"false"}},
                                             {"use_qalora", {"false"}},
                                             {"use_bdlora", {"false"}},
                                             {"lora_bias", {"false"}},
                                             {"rank_pattern", {"null"}},
                                             {"alpha_pattern", {"null"}},
                                             {"layer_replication", {"null"}},
                                             {"target_parameters", {"null"}},
                                             {"trainable_token_indices", {"null"}},
                                             {"alora_invocation_tokens", {"null"}},
                                             {"arrow_config", {"null"}},
                                             {"kasa_config", {"null"}},
                                             {"velora_config", {"null"}},
                                             {"monteclora_config", {"null"}}};
    char *path = arena_printf(arena, "%s/adapter_config.json", folder);
    CHECK(file_exists(path),
          "%s: no adapter_config.json inside; an adapter is a folder with adapter_config.json and "
          "adapter_model.safetensors",
          folder);
    struct Json *json = json_read_file(arena, path);
    struct Json *alpha = json_get(json, "lora_alpha");
    struct Json *dropout = json_get(json, "lora_dropout");
    struct Json *rslora = json_get(json, "use_rslora");
    struct Json *targets = json_get(json, "target_modules");
    struct Json *base = json_get(json, "base_model_"
                                       "name_or_path");
    config_refuse(json, path, allowed, COUNT(allowed));
    struct Adapter adapter = {
        .r = config_size(json, path, "r", 8),
        .lora_alpha = alpha && alpha->type == JSON_NUMBER ? alpha->number : 8,
        .use_rslora = rslora && rslora->type == JSON_TRUE,
    };
    CHECK(adapter.r > 0, "%s: \"r\" must be 1 or more", path);
    adapter.lora_dropout = dropout && dropout->type == JSON_NUMBER ? dropout->number : 0;
    adapter.base_model_name_or_path = base && base->type == JSON_STRING ? base->string.data : NULL;
    adapter.pattern = targets && targets->type == JSON_STRING;
    const struct Json *without = json_get(json, "exclude_modules");
    const struct Json *layers = json_get(json, "layers_to_transform");
    adapter.partial = without && without->type != JSON_NULL;
    adapter.partial = adapter.partial || (layers && layers->type != JSON_NULL);
    adapter.target_modules = !targets || targets->type == JSON_NULL ? "c_attn"
                             : adapter.pattern                      ? targets->string.data
                                                                    : "";
    for (struct Json *item = targets && !adapter.pattern ? targets->child : NULL; item;
         item = item->next) {
        CHECK(item->type == JSON_STRING && strlen(adapter.target_modules) < 4096,
              "%s: \"target_modules\" must be a list of names, 4096 letters at most", path);
        adapter.target_modules =
            arena_printf(arena, "%s%s%s", adapter.target_modules,
                         *adapter.target_modules ? " " : "", item->string.data);
    }
    return adapter;
}

/* An adapter may hold a copy of the embedding, or of the output layer that is tied to it: an equal
 * one changes nothing, another one is not implemented. */
static void adapter_check_embedding(const struct GPT2 *model, struct SafeTensors *st,
                                    const char *name) {
    struct Arena arena = {0};
    if (!tensor_entry(st, name))
        return;
    struct Tensor copy = tensor_like_wte(model, &arena, name);
    tensor_load(st, &copy);
    size_t i = first_unlike_wte(model, &copy);
    CHECK(i == copy.n,
          "%s: tensor %s is not the base's wte.weight (number %zu is %g, not %g): an "
          "adapter with an embedding or output layer of its own is not implemented",
          st->path, name, i, copy.w[i], model->wte.w[i]);
    arena_free(&arena);
}

/* Whether an adapter takes a layer: one that names its layers must have them all; of one that
 * describes them, the file says which they are. */
static bool adapter_takes(struct Arena *arena, const struct Adapter *adapter,
                          const struct SafeTensors *st, const char *name) {
    bool names = !adapter->pattern && !adapter->partial;
    if (names)
        return lora_is_target(name, adapter->target_modules);
    return tensor_entry(st, arena_printf(arena, "%s.lora_A.weight", bare_name(name))) != NULL;
}

/* The value head that TRL puts beside an adapter, in a model file of its own. If that file is a
 * whole model, the adapter folded in, say, the rest of it must not replace the base. */
static void adapter_read_head(struct GPT2 *model, const char *folder) {
    struct Beside beside = {0};
    char *path = arena_printf(&beside.arena, "%s/model.safetensors", folder);
    char *pickle = arena_printf(&beside.arena, "%s/pytorch_model.bin", folder);
    if (file_exists(path)) {
        struct SafeTensors st = safetensors_open(&beside.arena, path);
        bool has_head = tensor_entry(&st, "v_head.summary.weight") != NULL;
        struct Linear *head = has_head ? value_head_declare(model) : NULL;
        if (has_head)
            tensor_load(&st, &head->weight);
        if (has_head && !tensor_load(&st, &head->bias))
            tensor_check_loaded(&head->bias, path, NULL);
        beside_note(&beside, &st);
        fclose(st.file);
        if (beside.count)
            warn("%s: beside an adapter only a value head is read of it; not read are %zu tensors, "
                 "the first is %s",
                 path, beside.count, beside.first);
    } else if (file_exists(pickle)) {
        warn("%s is not read: a value head in it is left out; make a model.safetensors of it",
             pickle);
    }
    arena_free(&beside.arena);
}

/* adapter_load -- puts the adapter of a folder to the layers that target_modules takes, or, if that
 * is a regular expression or has exceptions, that the file has tensors for. A tensor that no layer
 * takes is an error.                           test: lora_round_trip, lora_partial, lora_broken */
static void adapter_load(struct GPT2 *model, const char *folder) {
    struct Arena arena = {0};
    size_t numbers = 0;
    const char *taken = "";
    CHECK(!model->adapter.r, "%s: the model has an adapter already", folder);
    struct Adapter *adapter = &model->adapter;
    *adapter = adapter_config_load(&model->arena, folder);
    char *path = arena_printf(&arena, "%s/adapter_model.safetensors", folder);
    CHECK(file_exists(path),
          "%s: no adapter_model.safetensors inside (adapter_model.bin is not read)", folder);
    struct SafeTensors st = safetensors_open(&arena, path);
    for (size_t i = 0; i < 4 * model->config.n_layer; i++) {
        struct Linear *linear = adaptable(model, i);
        struct Tensor *pair[] = {&linear->lora_A, &linear->lora_B};
        const char *name = module_name(&arena, linear);
        if (!adapter_takes(&arena, adapter, &st, name))
            continue;
        numbers += adapter->r * (linear->weight.shape[0] + linear->weight.shape[1]);
        CHECK(numbers <= st.data_size / 2 + (1 << 16),
              "%s: its %llu bytes are too few for "
              "adapters of \"r\" %zu; is the folder's adapter_config.json this file's?",
              path, (unsigned long long)st.data_size, adapter->r);
        lora_declare(model, linear);
        if (adapter->partial)
            taken = arena_printf(&arena, "%s %s", taken, bare_name(name));
        for (int k = 0; k < 2; k++) {
            tensor_load(&st, pair[k]);
            tensor_check_loaded(pair[k], path, NULL);
        }
    }
    CHECK(numbers > 0,
          "%s: its target_modules take no layer of this model; c_attn, c_proj and c_fc can be "
          "adapted",
          folder);
    if (adapter->partial) { /* saved again, it names its layers one by one */
        adapter->target_modules = arena_printf(&model->arena, "%s", taken);
        adapter->pattern = adapter->partial = false;
    }
    reward_head_load(model, &st, model->folder);
    adapter_check_embedding(model, &st, "lm_head.weight");
    adapter_check_embedding(model, &st, "wte.weight");
    for (struct Json *item = st.header->child; item; item = item->next)
        CHECK(item->number == 0 || strcmp(item->key.data, "__metadata__") == 0,
              "%s: no layer of this model takes tensor %s; is it another model's?", path,
              item->key.data);
    fclose(st.file);
    adapter_read_head(model, folder);
    model->folder = arena_printf(&model->arena, "%s", folder);
    arena_free(&arena);
}

/* adapter_config.json, the fields that say something; PEFT fills in the others with the same
 * defaults. */
static void adapter_config_save(const struct GPT2 *model, const char *folder) {
    const struct Adapter *a = &model->adapter;
    struct Output out = output_open(folder, "adapter_config.json");
    fputs("{\n  \"base_model_name_or_path\": ", out.file);
    if (a->base_model_name_or_path)
        json_write_string(out.file, "", text_of(a->base_model_name_or_path));
    else
        fputs("null", out.file);
    fprintf(out.file,
            ",\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": true,\n  \"inference_mode\": true,\n  "
            "\"init_lora_weights\": true,\n  \"lora_alpha\": %.9g,\n  \"lora_dropout\": %.9g,\n",
            a->lora_alpha, a->lora_dropout);
    fprintf(out.file,
            "  \"modules_to_save\": %s,\n  \"peft_type\": \"LORA\",\n  \"r\": %zu,\n  "
            "\"target_modules\": %s",
            model->score.n ? "[\"classifier\", \"score\"]" : "null", a->r, a->pattern ? "" : "[");
    const char *target = a->target_modules;
    if (a->pattern)
        json_write_string(out.file, "", text_of(target));
    else
        for (size_t n, i = 0; (n = next_name(&target)) > 0; target += n, i++)
            fprintf(out.file, "%s\"%.*s\"", i ? ", " : "", (int)n, target);
    fprintf(out.file,
            "%s,\n  \"task_type\": \"%s\",\n  \"use_dora\": false,\n  \"use_rslora\": %s\n}\n",
            a->pattern ? "" : "]", model->score.n ? "SEQ_CLS" : "CAUSAL_LM",
            a->use_rslora ? "true" : "false");
    output_close(&out);
}

/* model_save -- the folder that transformers loads, or for an adapter PeftModel.from_pretrained,
 * a value head beside it; weights last: if they are new, all is.  [glossary: Hugging Face] */
static void model_save(struct GPT2 *model, const char *folder, const struct Tokenizer *tok) {
    struct Arena arena = {0};
    struct Tensor **tensors = arena_alloc(&arena, model->tensor_count, sizeof *tensors);
    struct Tensor *head[] = {&model->v_head.weight, &model->v_head.bias};
    size_t count = 0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        check_numbers(model, NULL, NULL, "a weight that was to be saved", t->w, t->n);
        /* the adapter, and PEFT's modules_to_save */
        if (strstr(t->name, ".lora_") || t == &model->score)
            tensors[count++] = t;
    }
    make_folder(folder);
    if (model->adapter.r)
        adapter_config_save(model, folder);
    else
        config_save(model, folder);
    if (tok) {
        tokenizer_save(tok, folder, model->config.vocab_size);
        tokenizer_config_save(tok, folder, &model->config);
    }
    if (model->adapter.r) {
        if (model->v_head.weight.n)
            safetensors_write(folder, "model.safetensors", head, 2, "");
        safetensors_write(folder, "adapter_model.safetensors", tensors, count,
                          "base_model.model.transformer.");
    } else
        safetensors_write(folder, "model.safetensors", model->tensors, model->tensor_count,
                          "transformer.");
    arena_free(&arena);
}

/* A folder's model is replaced as a whole or not at all. */
static void model_replace(struct GPT2 *model, const char *folder, const struct Tokenizer *tok) {
    struct Arena arena = {0};
    staged_folder = arena_printf(&arena, "%s/tmp-model", folder);
    model_save(model, staged_folder, tok);
    folder_remove(staged_folder, folder);
    staged_folder = NULL;
    folder_sync(folder);
    arena_free(&arena);
}

static void check_reward_model(const struct GPT2 *model, const char *folder) {
    CHECK(model->score.n, "%s: has no score.weight: it is no reward model; train one: align reward",
          folder);
}

/* A reward or value head has no place in what is to be made of the model: it is neither trained nor
 * saved.                                                                    test: heads_left_out */
static void tensor_remove(struct GPT2 *model, struct Tensor *tensor) {
    size_t kept = 0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        if (model->tensors[i] != tensor)
            model->tensors[kept++] = model->tensors[i];
    }
    model->tensor_count = kept;
    tensor->n = 0;
}

static void leave_out_reward_head(struct GPT2 *model) {
    if (!model->score.n)
        return;
    warn("%s: is a reward model; its head, score.weight, is left out, the language model below it "
         "is used",
         model->folder);
    tensor_remove(model, &model->score);
}

static void leave_out_value_head(struct GPT2 *model) {
    if (!model->v_head.weight.n)
        return;
    warn("%s: has a value head; it is left out, the language model below it is used",
         model->folder);
    tensor_remove(model, &model->v_head.weight);
    tensor_remove(model, &model->v_head.bias);
}

/* =============================================================================================
 * Chapter 25 - Progress, logs, checkpoints
 *
 * How a run talks to a person (one line on a terminal, renewed in place), to a program
 * (trainer_state.json in transformers' form), and to itself (checkpoints, from which it goes on as
 * if it had never stopped, bit for bit).
 * ============================================================================================= */

/* cut_text -- makes the text of a file or a model fit for a terminal, in place: at most `bytes`
 * bytes, whole characters, and '?' in place of control bytes, which could move the cursor or
 * change the colours.                                                       test: progress_cut */
static char *cut_text(char *text, size_t bytes) {
    size_t n = strlen(text);
    size_t i = 0;
    size_t length;
    for (uint32_t c; i < n; i += length) {
        length = utf8_read((unsigned char *)text + i, n - i, &c);
        /* 0 to 31, 127, and 128 to 159, which terminals obey as well; no UTF-8 has length 0 */
        bool plain = length > 0 && c >= 32 && (c < 127 || c >= 160);
        if (!plain) {
            length = MAX(length, (size_t)1);
            memset(text + i, '?', length);
        }
        /* half a character would show as a question mark of the terminal's own */
        if (i + length > bytes)
            break;
    }
    text[i] = 0;
    return text;
}

/* The line of progress on a terminal. While it is `open`, the cursor stands at its end: whatever
 * else is said must first clear it, and the line is drawn again below. */
static struct Progress {
    const char *name;
    double begin, drawn; /* seconds: the stage's first line, the last one */
    size_t step, total, first_step, first_tokens;
    bool open;
} progress_line;

static void progress_clear(void) {
    if (!progress_line.open)
        return;
    /* A stage that is complete keeps its line, to be read later. */
    bool complete = progress_line.total && progress_line.step == progress_line.total;
    fputs(complete ? "\n" : "\r\033[K", stderr);
    progress_line.open = false;
}

/* One line on stderr. A file can make a message long, a path or a key of a megabyte: then its
 * middle is left out. */
static void PRINTF_LIKE(2, 0)
    complain(const char *start, const char *format, va_list arguments, const char *end) {
    enum { SHOWN = 600 }; /* bytes kept at either end */
    char line[2 * PATH_MAX];
    vsnprintf(line, sizeof line, format, arguments);
    size_t n = strlen(cut_text(line, sizeof line));
    size_t head = MIN(n, (size_t)SHOWN);
    size_t tail = MAX(head, n - head);
    /* Neither cut may fall into a character: bytes 10xxxxxx continue one. */
    while (tail > head && (line[head] & 0xc0) == 0x80)
        head--;
    while (tail > head && (line[tail] & 0xc0) == 0x80)
        tail++;
    progress_clear();
    fprintf(stderr, "%s%.*s%s%s%s\n", start, (int)head, line, tail > head ? " ... " : "",
            line + tail, end);
}

static void PRINTF_LIKE(1, 2) say(const char *format, ...) {
    if (quiet)
        return;
    va_list arguments;
    va_start(arguments, format);
    progress_clear();
    vfprintf(stderr, format, arguments);
    va_end(arguments);
}

static void PRINTF_LIKE(1, 2) warn(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    complain("align: note: ", format, arguments, "");
    va_end(arguments);
}

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Where the running program lies, links followed. Files that ship with it are looked for there.
 * Every system has its own way to ask. */
static bool program_path(char path[PATH_MAX]) {
#if defined(_WIN32)
    size_t n = GetModuleFileNameA(NULL, path, PATH_MAX);
    for (char *c = path; c < path + n; c++)
        if (*c == '\\')
            *c = '/';
    return n > 0 && n < PATH_MAX;
#elif defined(__APPLE__)
    char raw[PATH_MAX];
    uint32_t size = sizeof raw;
    return _NSGetExecutablePath(raw, &size) == 0 && realpath(raw, path);
#elif defined(__linux__)
    /* As it was started. /proc/self/exe is the loader where that was asked to run the program. */
    const char *name = (const char *)getauxval(AT_EXECFN);
    return name && realpath(name, path);
#else
    ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 1);
    path[MAX(n, 0)] = 0;
    return n > 0;
#endif
}

/* shell_word -- a word as a POSIX shell reads it back, so that a command line which is printed can
 * be pasted: plain, or in single quotes. A quote inside cannot be escaped there: the quotes are
 * closed, \' is written, and they are opened again.
 * By hand: Ana's run -> 'Ana'\''s run'.                                       test: shell_word */
static const char *shell_word(struct Arena *arena, const char *word) {
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@%+"
                                "=:,./-";
    if (*word && !word[strspn(word, plain)])
        return word;
    /* the worst case: quotes only, four bytes each */
    char *quoted = arena_alloc(arena, 4 * strlen(word) + 3, 1);
    char *to = quoted;
    *to++ = '\'';
    for (; *word; word++) {
        if (*word == '\'')
            to += sprintf(to, "'\\'");
        *to++ = *word;
    }
    sprintf(to, "'");
    return quoted;
}

/* Is stderr a terminal that can renew a line in place? Elsewhere, in a file or a pipe, progress is
 * plain lines. Either way nobody but a person depends on it: the run is the same bit for bit. */
static bool progress_live(void) {
    return !quiet && isatty(STDERR_FILENO) && getenv("TERM") && strcmp(getenv("TERM"), "dumb") != 0;
}

/* Columns to use: one less than the terminal has, since some wrap a line that fills the last one.
 * Bytes are counted for columns: a character takes no more columns than it has bytes. */
static size_t terminal_columns(void) {
#ifdef TIOCGWINSZ
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1)
        return size.ws_col - 1u;
#endif
    return 79;
}

/* Says where a stage is. `due`: it is time for a log entry. Then a plain line is said; a
 * terminal's line is renewed then, at the stage's last step, and else ten times a second at most:
 * drawing must cost nothing beside a step. */
static void progress_say(const char *name, size_t step, size_t total, size_t tokens, bool due,
                         const char *metrics) {
    struct Progress *p = &progress_line;
    bool live = progress_live();
    double now = seconds_now();
    if (!live && due)
        say("%s: step %zu/%zu  %s\n", name, step, total, metrics);
    if (!live || (!due && step < total && now - p->drawn < 0.1))
        return;

    /* 1. A new stage begins a line, and its clock. A resumed one does not start at step 0. */
    if (p->name != name || step < p->step) {
        progress_clear();
        *p = (struct Progress){
            .name = name,
            .begin = now,
            .first_step = step,
            .first_tokens = tokens,
        };
    }
    p->drawn = now;
    p->step = step;
    p->total = total;
    p->open = true;

    /* 2. What is left, if the steps to come take as long as those of this run did. */
    double gone = now - p->begin;
    double steps_done = (double)MAX(step - p->first_step, (size_t)1);
    size_t left = (size_t)(gone * (double)(total - step) / steps_done);
    double speed = gone > 0 ? (double)(tokens - p->first_tokens) / gone : 0;

    /* 3. Over the old line, and whatever stands behind its new end is erased (ESC [ K). */
    char line[800];
    int tenths = total ? (int)(10 * step / total) : 0;
    snprintf(line, sizeof line, "%s [%-10.*s] %zu/%zu  %zu:%02zu left  %s  %.0f tokens/s", name,
             tenths, "==========", step, total, left / 60, left % 60, metrics, speed);
    fprintf(stderr, "\r%s\033[K", cut_text(line, terminal_columns()));
}

/* Now is the time for a sample: about eight times a stage. */
static bool progress_sampling(size_t step, size_t total) {
    return progress_live() && (step == 1 || step % MAX((size_t)1, total / 8) == 0);
}

/* If nothing was found before (`place` is empty) and x holds a number that is not finite: writes
 * to `place` what it is. x may be NULL: not computed. */
static void note_bad(char place[160], const char *what, const char *name, const float *x,
                     size_t n) {
    size_t i = *place || !x ? n : first_not_finite(x, n);
    if (i < n)
        snprintf(place, 160, "%s %s was the first to break (%s)", what, name,
                 isnan(x[i]) ? "NaN" : "infinite");
}

/* The same for what block l computed forward, in the order in which it did. */
static void note_bad_block(char place[160], const struct GPT2 *model, size_t l) {
    const struct Activations *acts = &model->trace.acts;
    const struct BlockActivations *a = &acts->h[l];
    size_t width = acts->N * model->config.n_embd;
    bool last = l + 1 == model->config.n_layer;
    const struct {
        const char *name;
        const float *x;
        size_t n;
    } outputs[] = {
        {"ln_1", a->ln_1, width},
        {"attn.c_attn", a->qkv, 3 * width},
        {"attn", a->att, width},
        {"attn.c_proj", a->mid, width},
        {"ln_2", a->ln_2, width},
        {"mlp.c_fc", a->fc, 4 * width},
        {"mlp.act", a->gelu, 4 * width},
        /* what a block gives is what the next one gets */
        {"mlp.c_proj", last ? acts->x : a[1].x, width},
    };
    for (size_t k = 0; k < COUNT(outputs); k++) {
        char name[64];
        snprintf(name, sizeof name, "h.%zu.%s", l, outputs[k].name);
        note_bad(place, "the output of", name, outputs[k].x, outputs[k].n);
    }
}

/* check_finite -- ends the run when a step's loss, its gradient's norm or a logit is NaN or
 * infinite, and names where that began. One NaN spreads to everything computed from it; so the
 * numbers are looked through in the order in which they are made, and the first that is found is
 * the culprit.                                                               test: bad_numbers */
static void check_finite(const struct GPT2 *model, const char *what, double value) {
    if (isfinite(value))
        return;
    const struct Activations *acts = &model->trace.acts;
    struct Tensor *const *tensors = model->tensors;
    char place[160] = "";
    char step[64] = "";

    /* 1. the weights: the step before took them there */
    for (size_t i = 0; i < model->tensor_count; i++)
        note_bad(place, "weight", tensors[i]->name, tensors[i]->w, tensors[i]->n);

    /* 2. the activations forward, if a forward pass has kept them */
    for (size_t l = 0; acts->N && l < model->config.n_layer; l++)
        note_bad_block(place, model, l);
    note_bad(place, "the output of", "ln_f", acts->ln_f, acts->N * model->config.n_embd);

    /* 3. the gradients backward, which is from the last tensor to the first */
    for (size_t i = model->tensor_count; strstr(what, "gradient") && i-- > 0;)
        note_bad(place, "the gradient of", tensors[i]->name, tensors[i]->d, tensors[i]->n);

    if (model->trace.task)
        snprintf(step, sizeof step, "%s: step %zu: ", model->trace.task, model->trace.step);
    die("%s%s is %s: %s; try a smaller --learning_rate, more --warmup_steps or --max_grad_norm 1%s",
        step, what, isnan(value) ? "NaN" : "infinite",
        *place ? place : "what the model holds is finite, but too large",
        model->trace.task ? ", and look at this step's data" : " where the model is trained");
}

/* The same for n numbers of a model that only writes or scores. Its forward pass keeps nothing: to
 * find where a number broke, the pass is made again and kept. batch NULL: only the weights are
 * looked through. */
static void check_numbers(const struct GPT2 *model, struct Arena *arena, const struct Batch *batch,
                          const char *what, const float *x, size_t n) {
    size_t i = first_not_finite(x, n);
    if (i == n)
        return;
    struct GPT2 traced = *model;
    if (batch)
        traced.trace.acts = gpt2_forward(model, arena, batch, true);
    check_finite(&traced, what, x[i]);
}

static struct LogEntry *state_log(struct TrainerState *state) {
    state->log_history = grow(state->log_history, state->log_count, &state->log_capacity,
                              sizeof *state->log_history);
    struct LogEntry *entry = &state->log_history[state->log_count++];
    entry->n = 0;
    return entry;
}

/* Names of metrics that are put together or read from a file. Logs point to them, so they are
 * kept as long as any log may be: to the program's end. */
static struct Arena log_names;

static const char *log_name(const char *prefix, struct Text name) {
    char *text =
        arena_printf(&log_names, "%s%.*s", prefix, (int)MIN(name.length, (size_t)100), name.data);
    /* It will stand in JSON between quotes. */
    for (char *c = text; *c; c++)
        if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ')
            *c = '_';
    return text;
}

/* The number of this name in an entry, which is sorted by name; a new one is 0. */
static struct Metric *log_at(struct LogEntry *entry, const char *name) {
    size_t at = 0;
    while (at < entry->n && strcmp(entry->item[at].name, name) < 0)
        at++;
    if (at < entry->n && strcmp(entry->item[at].name, name) == 0)
        return &entry->item[at];
    CHECK(entry->n < MAX_METRICS, "internal: more than %d metrics in a log entry", MAX_METRICS);
    memmove(&entry->item[at + 1], &entry->item[at], (entry->n - at) * sizeof *entry->item);
    entry->n++;
    entry->item[at] = (struct Metric){.name = name};
    return &entry->item[at];
}

static void log_value(struct LogEntry *entry, const char *name, double value) {
    log_at(entry, name)->value = value;
}

/* Returns whether an entry has a number of this name; *value: that number, else NaN. */
static bool log_find(const struct LogEntry *entry, const char *name, double *value) {
    *value = NAN;
    for (size_t i = 0; i < entry->n; i++)
        if (strcmp(entry->item[i].name, name) == 0) {
            *value = entry->item[i].value;
            return true;
        }
    return false;
}

/* The members of a JSON object, without its braces. */
static void log_write(FILE *file, const struct LogEntry *entry, const char *separator) {
    for (size_t i = 0; i < entry->n; i++)
        fprintf(file, "%s\"%s\": %s", i ? separator : "", entry->item[i].name,
                json_number_text(entry->item[i].value));
}

/* trainer_state.json as transformers' TrainerState writes it, its keys sorted: transformers and
 * whatever draws curves from this file finds all that it expects. */
static void trainer_state_save(const struct TrainerState *s, const struct TrainingArguments *args,
                               const char *folder) {
    struct Output out = output_open(folder, "trainer_state.json");
    FILE *f = out.file;
    /* 1. no best model: it is not looked for */
    fputs("{\n  \"best_global_step\": null,\n  \"best_metric\": null", f);
    fputs(",\n  \"best_model_checkpoint\": null", f);
    fprintf(f, ",\n  \"epoch\": %s", json_number_text(s->epoch));
    fprintf(f, ",\n  \"eval_steps\": %zu", args->eval_steps);
    fprintf(f, ",\n  \"global_step\": %zu", s->global_step);
    /* 2. one process does all; no hyper-parameters are searched for */
    fputs(",\n  \"is_hyper_param_search\": false,\n  \"is_local_process_zero\": true", f);
    fputs(",\n  \"is_world_process_zero\": true", f);
    /* 3. the log itself */
    fputs(",\n  \"log_history\": [", f);
    for (size_t i = 0; i < s->log_count; i++) {
        fputs(i ? ",\n    {\n      " : "\n    {\n      ", f);
        log_write(f, &s->log_history[i], ",\n      ");
        fputs("\n    }", f);
    }
    fprintf(f, "\n  ],\n  \"logging_steps\": %zu", args->logging_steps);
    fprintf(f, ",\n  \"max_steps\": %zu", s->max_steps);
    fprintf(f, ",\n  \"num_input_tokens_seen\": %zu", s->num_tokens);
    /* 4. whole epochs there: the one that is not complete counts */
    fprintf(f, ",\n  \"num_train_epochs\": %.0f", ceil(s->num_train_epochs));
    fprintf(f, ",\n  \"save_steps\": %zu", args->save_steps);
    fputs(",\n  \"stateful_callbacks\": {\"TrainerControl\": {\"args\": {}, \"attributes\": {}}}",
          f);
    fputs(",\n  \"total_flos\": 0", f);
    fprintf(f, ",\n  \"train_batch_size\": %zu", args->per_device_train_batch_size);
    fputs(",\n  \"trial_name\": null,\n  \"trial_params\": null\n}\n", f);
    output_close(&out);
}

/* Checkpoints. Beside the weights a run's state is numbers of 64 bits: counters, random
 * generators, running means. They are written to optimizer.safetensors as tensors of float32,
 * two for each: bit patterns, kept bit for bit and never looked at as floats. */
static struct Tensor tensor_of_bits(const char *group, const char *name, void *at, size_t n) {
    struct Tensor t = {.shape = {2 * n}, .ndim = 1, .n = 2 * n, .w = at, .bits = true};
    snprintf(t.name, sizeof t.name, "%.16s.%.44s", group, name);
    return t;
}

/* n whole numbers of at most `most`; UINT64_MAX: any 64 bits. */
static struct Saved *checkpoint_add(struct Checkpoint *c, const char *name, void *at, size_t n,
                                    uint64_t most) {
    if (c->count == COUNT(c->saved))
        die("internal: more than %zu things in a checkpoint", COUNT(c->saved));
    struct Saved *s = &c->saved[c->count++];
    *s = (struct Saved){
        .tensor = tensor_of_bits(c->task, name, at, n),
        .most = most,
        .first_double = n, /* none is a double */
    };
    return s;
}

static void checkpoint_add_doubles(struct Checkpoint *c, const char *name, void *at, size_t n) {
    checkpoint_add(c, name, at, n, UINT64_MAX)->first_double = 0;
}

/* One number that must be the same when the run goes on. words: what it is, for the message. */
static void checkpoint_add_fixed(struct Checkpoint *c, const char *name, void *at,
                                 const char *words) {
    struct Saved *s = checkpoint_add(c, name, at, 1, UINT64_MAX);
    s->fixed = words;
    memcpy(&s->fixed_value, at, sizeof s->fixed_value);
}

/* What every training saves: its seed, which must stay, and five numbers of the state's that
 * follow each other in it, the last three of them doubles. */
static struct Checkpoint checkpoint_new(const char *task, struct GPT2 *model,
                                        const struct Tokenizer *tok,
                                        const struct TrainingArguments *args,
                                        struct TrainerState *state) {
    struct Checkpoint c = {.model = model, .tok = tok, .args = args, .state = state, .task = task};
    checkpoint_add_fixed(&c, "seed", (void *)&args->seed, "--seed");
    void *progress = (char *)state + offsetof(struct TrainerState, num_tokens);
    checkpoint_add(&c, "progress", progress, 5, UINT64_MAX)->first_double = 2;
    return c;
}

/* Is this a checkpoint of the same run? Asked before the rest is read: with other data even the
 * tensors' sizes could differ. */
static void checkpoint_check_fixed(struct Checkpoint *c, struct SafeTensors *st, const char *from) {
    /* 1. Of the same task? Every task saves its seed under its own name: "sft.seed". */
    const char *own = c->saved[0].tensor.name;
    for (struct Json *item = st->header->child; item; item = item->next) {
        const char *dot = strchr(item->key.data, '.');
        bool other = dot && strcmp(dot, ".seed") == 0 && strcmp(item->key.data, own) != 0;
        CHECK(!other, "%s: is a checkpoint of %.*s; %s cannot go on from it", from,
              (int)MIN(dot - item->key.data, 16), item->key.data, c->task);
    }
    /* 2. With the same seed, data and sizes? What is loaded over each of them is the same. */
    for (struct Saved *s = c->saved; s < c->saved + c->count; s++) {
        uint64_t was;
        if (!s->fixed || !tensor_load(st, &s->tensor))
            continue;
        memcpy(&was, s->tensor.w, sizeof was);
        CHECK(was == s->fixed_value,
              "%s: %s is %llu, in the checkpoint's run it was %llu; give the data and flags that "
              "the run began with, or start over without --resume_from_checkpoint",
              from, s->fixed, (unsigned long long)s->fixed_value, (unsigned long long)was);
    }
}

/* What the message about a number says is to be done. */
#define DAMAGED "was expected; the file is damaged, take an earlier checkpoint"

/* Are a saved thing's numbers in range? Those of a broken file would go on as array indices. */
static void saved_check(const struct Saved *s, const char *path) {
    for (size_t i = 0; i < s->tensor.n / 2; i++) {
        double real;
        uint64_t bits;
        memcpy(&bits, (char *)s->tensor.w + 8 * i, sizeof bits);
        memcpy(&real, &bits, sizeof real);
        if (i >= s->first_double)
            CHECK(isfinite(real), "%s: %s: number %zu is %g, a finite one " DAMAGED, path,
                  s->tensor.name, i, real);
        else
            CHECK(bits <= s->most, "%s: %s: number %zu is %llu, at most %llu " DAMAGED, path,
                  s->tensor.name, i, (unsigned long long)bits, (unsigned long long)s->most);
    }
}

static void checkpoint_check_numbers(const struct Checkpoint *c, const char *path) {
    for (const struct Saved *s = c->saved; s < c->saved + c->count; s++)
        saved_check(s, path);
    const struct LogEntry *metrics = &c->state->metrics;
    for (const struct Metric *m = metrics->item; m < metrics->item + metrics->n; m++)
        CHECK(isfinite(m->value), "%s: metric.%s is %g, a finite number " DAMAGED, path, m->name,
              m->value);
}

/* The step and the log so far. The rest of the file only repeats flags. */
static void trainer_state_load(struct TrainerState *state, struct Arena *arena, const char *path) {
    struct Json *json = json_read_file(arena, path);
    struct Json *epoch = json_get(json, "epoch");
    struct Json *log = json_get(json, "log_history");
    CHECK(epoch && epoch->type == JSON_NUMBER && log && log->type == JSON_ARRAY,
          "%s: lacks \"epoch\" or \"log_history\"", path);
    state->global_step =
        json_size(json_get(json, "global_step"), SIZE_MAX / 2, path, "global_step");
    state->log_count = 0;
    for (struct Json *item = log->child; item; item = item->next) {
        struct LogEntry *entry = state_log(state);
        CHECK(item->type == JSON_OBJECT && item->child,
              "%s: \"log_history\": entry %zu is no object with numbers", path, state->log_count);
        for (struct Json *value = item->child; value; value = value->next) {
            CHECK(entry->n < MAX_METRICS, "%s: \"log_history\": an entry has more than %d numbers",
                  path, MAX_METRICS);
            /* null stands for what JSON cannot write: NaN */
            log_value(entry, log_name("", value->key),
                      value->type == JSON_NUMBER ? value->number : NAN);
        }
    }
}

/* All that a checkpoint holds, as tensors: first the `train` weights that train, which are the
 * model's file, then what is in optimizer.safetensors. */
struct Holding {
    struct Tensor **list;
    size_t train, count;
};

static struct Holding checkpoint_holding(struct Checkpoint *c, struct Arena *arena) {
    static const char *const prefixes[] = {"", "exp_avg.", "exp_avg_sq."};
    size_t n = c->model->tensor_count;
    struct LogEntry *metrics = &c->state->metrics;
    size_t most = 3 * n + c->count + metrics->n;
    struct Tensor *copy = arena_alloc(arena, most, sizeof *copy);
    struct Holding held = {arena_alloc(arena, most, sizeof *held.list), 0, 0};

    /* 1. The weights that train (those with a gradient), then AdamW's two moments of each. */
    for (size_t i = 0; i < 3 * n; i++) {
        const struct Tensor *t = c->model->tensors[i % n];
        if (!t->d)
            continue;
        struct Tensor *to = &copy[held.count++];
        *to = *t;
        to->w = (float *[]){t->w, t->m, t->v}[i / n];
        to->loaded = false;
        snprintf(to->name, sizeof to->name, "%s%.50s", prefixes[i / n], t->name);
        held.train += i < n;
    }

    /* 2. What the task has added, and the running means of metrics: value and n, side by side. */
    for (size_t i = 0; i < c->count; i++)
        copy[held.count++] = c->saved[i].tensor;
    for (struct Metric *m = metrics->item; m < metrics->item + metrics->n; m++) {
        void *numbers = (char *)m + offsetof(struct Metric, value);
        copy[held.count++] = tensor_of_bits("metric", m->name, numbers, 2);
    }
    for (size_t i = 0; i < held.count; i++)
        held.list[i] = &copy[i];
    return held;
}

/* How old a checkpoint is, by what it says itself: the number of its run in the folder, and its
 * step. Every run that begins there, anew or from a checkpoint, counts the number up; so a run
 * that starts over is newer than one that came further. The time of the files says nothing: they
 * may have been copied or restored. Checkpoints of older versions have no number: 0.
 *                                                                          test: checkpoint_age */
struct CheckpointAge {
    size_t run, step;
};

static bool checkpoint_older(struct CheckpointAge a, struct CheckpointAge b) {
    return a.run < b.run || (a.run == b.run && a.step < b.step);
}

/* Reads the age of the checkpoint that is the entry `name` of a folder. Returns false where the
 * entry is none. */
static bool checkpoint_age(const char *folder, const char *name, struct CheckpointAge *age) {
    char *end;
    char path[PATH_MAX];
    static const char header[] = "{\"__metadata__\":{\"format\":\"pt\",\"run\":\"%15zu\"";
    if (strncmp(name, "checkpoint-", 11) != 0)
        return false;
    *age = (struct CheckpointAge){0, strtoull(name + 11, &end, 10)};
    int length =
        snprintf(path, sizeof path, "%s/checkpoint-%zu/optimizer.safetensors", folder, age->step);
    FILE *file = *end || length >= (int)sizeof path ? NULL : fopen(path, "rb");
    if (!file)
        return false;
    /* The number stands at a fixed place: behind the header's length, first in the header. */
    bool numbered = fseeko(file, 8, SEEK_SET) == 0 && fscanf(file, header, &age->run) == 1;
    if (!numbered)
        age->run = 0;
    fclose(file);
    return true;
}

/* Returns how many checkpoint-N a folder has; *oldest, *newest: those two, if there is one. */
static size_t checkpoint_find(const char *folder, struct CheckpointAge *oldest,
                              struct CheckpointAge *newest) {
    DIR *dir = opendir(folder);
    size_t count = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        struct CheckpointAge age;
        if (!checkpoint_age(folder, entry->d_name, &age))
            continue;
        /* the first one found is both */
        if (count == 0 || checkpoint_older(age, *oldest))
            *oldest = age;
        if (count == 0 || checkpoint_older(*newest, age))
            *newest = age;
        count++;
    }
    if (dir)
        closedir(dir);
    return count;
}

/* Removes checkpoint-N, if it is there, and every tmp-checkpoint-*: what a run left that was
 * killed while it wrote or removed one. Renamed first: a removal that is interrupted leaves no
 * checkpoint that looks whole and lacks files. */
static bool checkpoint_remove(const char *folder, size_t n) {
    struct Arena arena = {0};
    const char *name = arena_printf(&arena, "%s/checkpoint-%zu", folder, n);
    const char *removed = arena_printf(&arena, "%s/tmp-checkpoint-%zu-old", folder, n);
    bool gone = rename(name, removed) == 0;
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir));)
        if (strncmp(entry->d_name, "tmp-checkpoint-", 15) == 0)
            folder_remove(arena_printf(&arena, "%s/%s", folder, entry->d_name), NULL);
    if (dir)
        closedir(dir);
    arena_free(&arena);
    return gone;
}

/* From here on every error says how to go on from this checkpoint. */
static void checkpoint_way_on(const char *folder) {
    snprintf(way_on, sizeof way_on,
             "; %.4000s is whole: --resume_from_checkpoint true goes on from it", folder);
}

/* Brings the logs that grow beside a run onto the disk and notes their lengths: a run that goes on
 * cuts off what was written after the checkpoint. */
static void checkpoint_flush_logs(struct Checkpoint *c) {
    for (size_t i = 0; c->logs && i < COUNT(LOGS); i++) {
        output_flush(&c->logs[i]);
        CHECK(fsync(fileno(c->logs[i].file)) == 0, "%s: writing failed: %s", c->logs[i].tmp,
              strerror(errno));
        c->log_bytes[i] = (uint64_t)ftello(c->logs[i].file);
    }
}

/* checkpoint_save -- writes checkpoint-N. At every moment a power cut leaves a whole checkpoint:
 * the new one is written beside its place, brought onto the disk, and only then renamed. */
static void checkpoint_save(struct Checkpoint *c) {
    struct Arena arena = {0};
    size_t step = c->state->global_step;
    const char *dir = c->args->output_dir;
    const char *staged = arena_printf(&arena, "%s/tmp-checkpoint-%zu", dir, step);
    const char *replaced = arena_printf(&arena, "%s-old", staged);
    const char *whole = arena_printf(&arena, "%s/checkpoint-%zu", dir, step);

    /* 1. The model, the optimizer's and the task's numbers, the log, under a temporary name. An
     *    error on the way removes that folder: the disk may be full. */
    checkpoint_flush_logs(c);
    staged_folder = staged;
    model_save(c->model, staged, c->tok);
    struct Holding held = checkpoint_holding(c, &arena);
    const char *run = arena_printf(&arena, ",\"run\":\"%zu\"", c->run);
    safetensors_write_with(staged, "optimizer.safetensors", held.list + held.train,
                           held.count - held.train, "", run);
    trainer_state_save(c->state, c->args, staged);
    folder_sync(staged);

    /* 2. Into its place. An earlier run may have left one of the same step; a folder that is not
     *    empty cannot be renamed over. */
    rename(whole, replaced);
    CHECK(rename(staged, whole) == 0, "%s: %s", whole, strerror(errno));
    staged_folder = NULL;
    folder_remove(replaced, NULL);
    folder_sync(dir);
    checkpoint_way_on(whole);

    /* 3. The oldest go, down to --save_total_limit. */
    struct CheckpointAge oldest;
    struct CheckpointAge newest;
    size_t limit = c->args->save_total_limit;
    while (limit && checkpoint_find(dir, &oldest, &newest) > limit)
        if (!checkpoint_remove(dir, oldest.step))
            break;
    arena_free(&arena);
}

/* The first Ctrl-C waits for the end of the step (checkpoint_step); a second one ends the program
 * at once. */
static void interrupt(int signal_number) {
    interrupted = 1;
    signal(signal_number, SIG_DFL);
}

/* Decides where a run starts: returns the folder to go on from, or NULL to start over. *newest:
 * the last checkpoint in output_dir. */
static const char *checkpoint_choose(const struct Checkpoint *c, struct Arena *arena,
                                     struct CheckpointAge *newest) {
    struct CheckpointAge oldest;
    const char *dir = c->args->output_dir;
    const char *from = c->args->resume_from_checkpoint;
    bool any = dir && checkpoint_find(dir, &oldest, newest) > 0;
    /* Starting over beside a checkpoint may be a slip: it is said, but done. */
    if (any && !from)
        warn("%s holds checkpoint-%zu of an earlier run; this one starts over "
             "(--resume_from_checkpoint true would go on)",
             dir, newest->step);
    if (!from || strcmp(from, "false") == 0)
        return NULL;
    if (!dir || strcmp(from, "true") != 0)
        return from;
    if (any)
        return arena_printf(arena, "%s/checkpoint-%zu", dir, newest->step);
    warn("%s: no whole checkpoint to resume from; starting over", dir);
    return NULL;
}

/* Reads a checkpoint's files over the run's state. */
static void checkpoint_load(struct Checkpoint *c, struct Arena *arena, const char *from) {
    static const char *const files[] = {"model.safetensors", "adapter_model.safetensors",
                                        "optimizer.safetensors"};
    struct LogEntry *metrics = &c->state->metrics;
    const char *path = arena_printf(arena, "%s/optimizer.safetensors", from);
    CHECK(file_exists(path),
          "--resume_from_checkpoint %s: no checkpoint is there (optimizer.safetensors); `true` "
          "takes the newest in --output_dir",
          from);

    /* 1. The log, and whether it is this run's at all. */
    trainer_state_load(c->state, arena, arena_printf(arena, "%s/trainer_state.json", from));
    struct SafeTensors st = safetensors_open(arena, path);
    checkpoint_check_fixed(c, &st, from);

    /* 2. Which running means it holds: so much room must be there for their numbers. */
    metrics->n = 0;
    for (struct Json *item = st.header->child; item && metrics->n < MAX_METRICS; item = item->next)
        if (strncmp(item->key.data, "metric.", 7) == 0)
            log_at(metrics, log_name("", text_of(item->key.data + 7)));
    fclose(st.file);

    /* 3. Each thing from whichever file has it; in the end none may be missing. */
    struct Holding held = checkpoint_holding(c, arena);
    for (size_t f = 0; f < COUNT(files); f++) {
        path = arena_printf(arena, "%s/%s", from, files[f]);
        if (!file_exists(path))
            continue;
        st = safetensors_open(arena, path);
        for (size_t i = 0; i < held.count; i++)
            tensor_load(&st, held.list[i]);
        fclose(st.file);
    }
    for (size_t i = 0; i < held.count; i++)
        CHECK(held.list[i]->loaded,
              "%s: holds no %s; are task, model and flags those of the run that was saved?", from,
              held.list[i]->name);
    checkpoint_check_numbers(c, path);
}

/* Says where the run goes on. Where no step is left, the run's length becomes the checkpoint's. */
static void checkpoint_say(struct Checkpoint *c, const char *from) {
    struct TrainerState *state = c->state;
    if (state->global_step < state->max_steps) {
        say("%s: going on after step %zu from %s\n", c->task, state->global_step, from);
        return;
    }
    warn("%s: %s is at step %zu, the run has %zu: no step is left to train; a longer run needs "
         "a larger --max_steps or --num_train_epochs",
         c->task, from, state->global_step, state->max_steps);
    state->max_steps = state->global_step;
}

/* checkpoint_resume -- puts back what a checkpoint holds, if the run is to go on from one, and
 * opens the logs. Everything a step depends on is in it, so the run ends with the same bits as one
 * that was never stopped. */
static void checkpoint_resume(struct Checkpoint *c) {
    struct Arena arena = {0};
    const char *dir = c->args->output_dir;
    if (c->args->warmup_steps > c->state->max_steps)
        warn("--warmup_steps %zu: the run has %zu steps; its learning rate never reaches "
             "--learning_rate",
             c->args->warmup_steps, c->state->max_steps);

    /* 1. Leftovers of a killed run go. From here on Ctrl-C waits for a step's end. */
    if (dir) {
        checkpoint_remove(dir, SIZE_MAX);
        signal(SIGINT, interrupt);
        signal(SIGTERM, interrupt);
    }

    /* 2. Start over, with new logs, or go on. */
    struct CheckpointAge newest = {0};
    const char *from = checkpoint_choose(c, &arena, &newest);
    c->run = newest.run + 1;
    if (from)
        checkpoint_load(c, &arena, from);
    for (size_t i = 0; c->logs && i < COUNT(LOGS); i++) {
        if (from)
            c->logs[i] =
                output_resume(dir, LOGS[i], arena_printf(&arena, "%s/..", from), c->log_bytes[i]);
        else
            c->logs[i] = output_open(c->log_dir, LOGS[i]);
    }

    /* 3. The newest in output_dir is what `true` would find again after an error. */
    if (from) {
        checkpoint_say(c, from);
        if (dir && strcmp(c->args->resume_from_checkpoint, "true") == 0)
            checkpoint_way_on(from);
    }
    arena_free(&arena);
}

/* After each step: saves when it is time; after Ctrl-C saves and ends the program. */
static void checkpoint_step(struct Checkpoint *c) {
    const struct TrainingArguments *args = c->args;
    bool due = args->save_steps && c->state->global_step % args->save_steps == 0;
    bool stop = interrupted && c->state->global_step < c->state->max_steps;
    if (!args->output_dir || !(due || stop))
        return;
    checkpoint_save(c);
    if (stop)
        die("%s: interrupted after step %zu of %zu", c->task, c->state->global_step,
            c->state->max_steps);
}

/* Those of an entry's numbers that a person follows, as progress. `plain`: a log entry is due. */
static void state_say(const struct TrainerState *state, const char *name,
                      const struct LogEntry *entry, bool plain) {
    /* The most important first: what has no room on the line is left out. */
    static const char *const shown[] = {
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
    char text[400] = "";
    for (size_t i = 0, used = 0; i < COUNT(shown); i++) {
        double value;
        if (!log_find(entry, shown[i], &value))
            continue;
        const char *gap = used ? "  " : "";
        int length = snprintf(text + used, sizeof text - used, "%s%s %.4g", gap, shown[i], value);
        used = MIN(used + (size_t)length, sizeof text - 1);
    }
    progress_say(name, state->global_step, state->max_steps, state->num_tokens, plain, text);
}

/* A step's line in stats_all.jsonl: numbers, then vectors. One with `start` is a list of lists, a
 * row for each answer; row b is x[start[b] .. start[b + 1]). */
static void stats_write_line(FILE *file, const struct PPOTrainer *ppo) {
    fputc('{', file);
    log_write(file, &ppo->stats, ", ");
    for (const struct StatsVector *v = ppo->vectors; v < ppo->vectors + ppo->vector_count; v++) {
        fprintf(file, ", \"%s\": ", v->name);
        if (!v->start)
            json_write_floats(file, "", v->x, v->n);
        for (size_t b = 0; v->start && b < v->n; b++)
            json_write_floats(file, b ? ", " : "[", v->x + v->start[b],
                              v->start[b + 1] - v->start[b]);
        if (v->start)
            fputc(']', file);
    }
    fputs("}\n", file);
}

/* rollouts.jsonl: what --rollouts replays. */
static void rollouts_write(FILE *file, const struct Rollout *rollouts, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const struct Example *e = &rollouts[i].example;
        json_write_ids(file, "{\"query_ids\": ", e->ids, e->prompt_length);
        json_write_ids(file, ", \"response_ids\": ", e->ids + e->prompt_length,
                       e->n - e->prompt_length);
        fprintf(file, ", \"score\": %s}\n", json_number_text(rollouts[i].score));
    }
}

/* =============================================================================================
 * Chapter 26 - Results: what the course prints and writes; the report
 *
 * What enters: what was measured, and a run's logs. What leaves: tables, summary.json,
 * samples.jsonl, report.json, and report.html, one file that opens from disk, on a phone, on
 * paper, by a screen reader, and holds no program.
 * ============================================================================================= */

/* What Hugging Face's sentiment pipeline returns for a text. [glossary: Lista de saídas do pipe]
 * [glossary: Pontuação de sentimento] */
static void write_pipe_outputs(FILE *file, double reward) {
    fprintf(file,
            "[{\"label\": \"POSITIVE\", \"score\": %s}, {\"label\": \"NEGATIVE\", \"score\": %s}]",
            json_number_text(sigmoid(reward)), json_number_text(sigmoid(-reward)));
}

/* A policy's row of exact's table. "of the way": how much of the way from the reference's
 * objective to the highest that there is. */
static void exact_print_row(const char *name, struct ExactFigures f, double ref, double max) {
    printf("%-10s %11.5f %8.4f %12.4f %8.4f %9.2f %%\n", name, f.kl_to_optimum, f.reward, f.kl,
           f.objective, 100 * (f.objective - ref) / (max - ref));
}

/* What the exact world knows, and what each training reached: as JSON, or as a table. */
static void exact_print(const struct ExactWorld *w, bool json) {
    double ref = exact_figures(w, w->logps[EXACT_REFERENCE]).objective;
    double max = w->beta * w->log_Z; /* chapter 5: no policy's objective is higher */
    if (json)
        printf("{\"beta\": %.9g, \"objective_ref\": %.9g, \"objective_max\": %.9g", w->beta, ref,
               max);
    else
        printf("%zu responses of %zu tokens; beta %g: Z %.5g, log Z %.4f; J of the reference %.4f, "
               "at most beta log Z = %.4f\n\n           KL(pi||pi*)     E[r]  KL(pi||ref)        J "
               " of the way\n",
               w->n, w->L, w->beta, exp(w->log_Z), w->log_Z, ref, max);
    /* The table also shows the reference and the optimum; they come before the trained ones. */
    for (int k = json ? EXACT_DPO : 0; k < EXACT_POLICIES; k++) {
        struct ExactFigures f = exact_figures(w, w->logps[k]);
        if (json)
            printf(", \"%s\": {\"kl_to_optimum\": %.9g, \"objective\": %.9g, \"reward\": %.9g, "
                   "\"kl\": %.9g}",
                   EXACT[k].name, f.kl_to_optimum, f.objective, f.reward, f.kl);
        else
            exact_print_row(EXACT[k].name, f, ref, max);
    }
    if (json)
        puts("}");
}

/* The stages of a report: the folder in rlhf's output_dir, and the metric by which a log is known
 * to be one's, of whatever command it is. The last stage that fits counts. */
enum Stage {
    STAGE_RUN,
    STAGE_LANGUAGE,
    STAGE_REWARD,
    STAGE_PPO,
    STAGE_DPO,
    STAGE_REINFORCE,
    STAGES
};
static const struct {
    const char *folder, *marker, *title, *about;
} STAGE[STAGES] = {{".", "", "", ""},
                   {"language_model", "loss", "Language model",
                    "It learns to predict the next token of what people wrote. All later stages "
                    "start from it."},
                   {"reward_model", "min_reward", "Reward model",
                    "It learns from ratings to give a text a number, the reward: the higher, the "
                    "better liked."},
                   {"ppo", "objective/kl", "PPO",
                    "The policy answers, the reward model scores; tokens that led to better scores "
                    "than expected become likelier."},
                   {"dpo", "rewards/margins", "DPO",
                    "The policy learns from pairs of answers, one chosen, one rejected: no reward "
                    "model, no sampling."},
                   {".", "gradient_variance/none", "REINFORCE",
                    "The policy answers and goes up the gradient of the reward as it stands, "
                    "without PPO's clip."}};

/* A figure: up to three metrics over steps. If its unit is a share in %, it is a histogram
 * instead, of lists of numbers in report.json. */
#define TRAINED {"training", "held out"}
static const struct Plot {
    enum Stage stage;
    const char *title, *unit, *metric[3], *label[3], *term, *about;
} PLOTS[] = {{STAGE_RUN,
              "Rewards of answers",
              "% of answers",
              {"before", "ppo", "dpo"},
              {"before", "PPO", "DPO"},
              "Função de recompensa · reward function",
              "Answers to held-out beginnings. A hill that moves right pleases more; one that also "
              "narrows says one thing again and again."},
             {STAGE_LANGUAGE,
              "Loss",
              "nats a token",
              {"loss", "eval_loss"},
              TRAINED,
              "Função de custo · cost function",
              "−log of the next token's probability. It falls as the model learns; held out far "
              "above training means learnt by heart."},
             {STAGE_REWARD,
              "Accuracy",
              "share of pairs",
              {"accuracy", "eval_accuracy"},
              TRAINED,
              "Modelo Bradley-Terry · Bradley-Terry model",
              "How often the text that people preferred got the higher reward. 0.5 is a guess; "
              "people disagree, so 1 is not to be expected."},
             {STAGE_REWARD,
              "Margin",
              "reward",
              {"margin", "eval_margin"},
              TRAINED,
              "Função sigmoide · sigmoid function",
              "Reward of the preferred text less the other's. At a margin of 2 the model is sure "
              "by σ(2) = 88 %."},
             {STAGE_REWARD,
              "Rewards of reviews",
              "% of reviews",
              {"liked", "disliked"},
              {"liked", "disliked"},
              "Pontuação de sentimento · sentiment score",
              "Held-out reviews that people liked, and that they did not. The less the hills "
              "overlap, the better the model tells them apart."},
             {STAGE_PPO,
              "Reward",
              "score",
              {"env/reward_mean"},
              {"mean"},
              "Rollout · rollout",
              "Mean score of a step's answers. It should rise, but alone it proves nothing: read "
              "it beside the KL, and read the samples."},
             {STAGE_PPO,
              "KL",
              "nats an answer",
              {"objective/kl"},
              {"KL"},
              "Divergência de Kullback-Leibler (KL) · Kullback-Leibler divergence (KL)",
              "How far the policy has left the reference. It starts at 0; the penalty β holds it "
              "near its target."},
             {STAGE_PPO,
              "Clip fraction",
              "share of tokens",
              {"ppo/policy/clipfrac"},
              {"clipped"},
              "Otimização de política proximal (PPO) · proximal policy optimization (PPO)",
              "Held back by the clip. Far above 0.3: lower the learning rate."},
             {STAGE_PPO,
              "Value loss",
              "score²",
              {"ppo/loss/value"},
              {"value loss"},
              "AutoModelForCausalLMWithValueHead",
              "Squared error of the value head. It falls as the head learns what an answer will "
              "bring."},
             {STAGE_DPO,
              "Rewards",
              "β nats",
              {"rewards/chosen", "rewards/rejected"},
              {"chosen", "rejected"},
              "Modelo de referência · reference model",
              "β times the log-ratio of policy and reference: above 0 an answer became likelier. "
              "Both falling: it forgets how to write."},
             {STAGE_DPO,
              "Margin",
              "β nats",
              {"rewards/margins", "eval_rewards/margins"},
              TRAINED,
              "Parâmetro Beta (β) · beta parameter (β)",
              "The chosen answer's reward less the rejected one's: what the loss widens. Above 5 "
              "the pairs have no more to teach."},
             {STAGE_REINFORCE,
              "Reward",
              "score",
              {"reward", "objective"},
              {"score", "objective"},
              "Função objetivo · objective function",
              "Mean score of a step's answers, and what is maximized: the score less β times the "
              "KL."}};

static const char REPORT_CSS[] =
    ":root{color-scheme:light "
    "dark;--mut:light-dark(#59616b,#a3abb5);--line:light-dark(#dde1e5,#3a4048)}body{font:1rem/1.55 "
    "system-ui,sans-serif;"
    "max-width:72rem;margin:auto;padding:1rem clamp(1rem,4vw,2.5rem) 4rem}h2{margin:3rem 0 "
    ".4rem;padding-top:.8rem;border-top:1px solid var(--line)}"
    "h3,h4{margin:0;font-size:1rem}p{margin:.4rem "
    "0;max-width:46rem}.mut,figcaption{color:var(--mut);font-size:.9rem}"
    "table{border-collapse:collapse;margin:.8rem "
    "0}th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;"
    "border-bottom:1px solid var(--line)}td{overflow-wrap:anywhere}.grid{--w:22rem;display:grid;"
    "gap:1rem "
    "2.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--w)),1fr));margin:1rem "
    "0}section .grid{--w:17rem}"
    "figure{margin:0;max-width:30rem}figure,section{break-inside:avoid}text{font:11px "
    "system-ui,sans-serif;fill:var(--mut)}.a{stroke:var(--line)}"
    ".l{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linecap:round}.h{fill:currentColor;"
    "fill-opacity:.14}"
    ".s0{color:light-dark(#0a5cc2,#74b6ff)}.s1{color:light-dark(#b3420a,#ff9e60);stroke-dasharray:"
    "6 4}"
    ".s2{color:light-dark(#23733a,#7ed391);stroke-dasharray:1 "
    "4}.t{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;line-height:1.8}"
    ".u1,.u2,.u3{--c:230,126,0;--s:solid}.d1,.d2,.d3{--c:59,130,246;--s:dashed}.t "
    "span{border-bottom:1px var(--s) rgb(var(--c));"
    "background:rgba(var(--c),.14)}.t .u2,.t .d2{border-width:2px;background:rgba(var(--c),.28)}.t "
    ".u3,.t .d3{border-width:3px;"
    "background:rgba(var(--c),.42)}@media print{:root{color-scheme:light}}";

/* Text of any bytes between two pieces of HTML. Markup in it stays text: a review that holds
 * <script> must not run. What is no UTF-8 becomes U+FFFD, the replacement character, and so do
 * control characters and those that turn the direction of writing (U+202A to 202E, 2066 to
 * 2069), with which a text could rearrange the page around it.               test: report_text */
static void html_text(FILE *file, const char *before, struct Text text, const char *after) {
    fputs(before, file);
    for (size_t i = 0, length; i < text.length; i += MAX(length, (size_t)1)) {
        uint32_t c;
        length = utf8_read((const unsigned char *)text.data + i, text.length - i, &c);
        /* tab and line ends are control characters that text needs */
        bool low = c < 32 && !memchr("\t\n\r", (int)c, 3);
        bool control = length && (low || (c >= 127 && c < 160));
        bool turns = (c >= 0x202a && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
        bool bad = length == 0 || control || turns;
        const char *entity = bad        ? "\xef\xbf\xbd"
                             : c == '&' ? "&amp;"
                             : c == '<' ? "&lt;"
                             : c == '"' ? "&quot;"
                                        : NULL;
        if (entity)
            fputs(entity, file);
        else
            fwrite(text.data + i, 1, length, file);
    }
    fputs(after, file);
}

/* What a page can show of a JSON value: NaN where there is no number, or one too large for an
 * axis; an empty text where there is no string. */
static double json_shown(const struct Json *json) {
    return json && json->type == JSON_NUMBER && fabs(json->number) < 1e30 ? json->number : NAN;
}
static struct Text json_words(const struct Json *json) {
    return json && json->type == JSON_STRING ? json->string : (struct Text){"", 0};
}
static const struct Json *json_first(const struct Json *list) {
    return list ? list->child : NULL;
}

/* axis_fit -- an axis for numbers from low to high: from one round number to another, in about
 * `most` steps of 1, 2 or 5 times a power of ten.
 * By hand: 0.13 to 0.87 in at most 5: 0 to 1 by 0.2. 8 to 8 in at most 4: 4 to 12 by 2.
 *                                                                           test: report_axis */
struct Axis {
    double low, step;
    int count;
};

static struct Axis axis_fit(double low, double high, int most) {
    if (low == 0 && high == 0)
        high = 1;
    /* 1. Numbers that are all the same get room on both sides, for a step of 0 is none. */
    double size = MAX(fabs(low), fabs(high));
    double pad = high - low > 1e-3 * size ? 0 : size / 2;

    /* 2. The step, rounded up to 1, 2, 5 or 10 times a power of ten. The 1e-9 here and below
     *    keep a number that is round but for its last bit from the next step. */
    double rough = (high - low + 2 * pad) / most;
    double power = pow(10, floor(log10(rough)));
    double times = rough / power * (1 - 1e-9);
    double step = power * (times <= 1 ? 1 : times <= 2 ? 2 : times <= 5 ? 5 : 10);

    /* 3. Whole steps that take in low and high. */
    double first = floor((low - pad) / step + 1e-9);
    double last = ceil((high + pad) / step - 1e-9);
    return (struct Axis){first * step, step, (int)MAX(1, last - first)};
}

struct Point {
    double x, y;
};
struct Curve {
    const char *label;
    struct Point *p;
    size_t n;
};

/* The axis that all curves share. low: what it must reach down to; INFINITY: only to the curves. */
static struct Axis curves_axis(const struct Curve *curves, size_t count, bool of_x, double low,
                               int most) {
    double high = -INFINITY;
    for (const struct Curve *c = curves; c < curves + count; c++)
        for (size_t i = 0; i < c->n; i++) {
            low = MIN(low, of_x ? c->p[i].x : c->p[i].y);
            high = MAX(high, of_x ? c->p[i].x : c->p[i].y);
        }
    return axis_fit(low, high, most);
}

/* A curve from JSON: of a log, `metric` over "step" where an entry has it; with metric NULL, of a
 * plain list, its numbers without a place. */
static struct Curve curve_read(struct Arena *arena, const struct Json *list, const char *metric,
                               const char *label) {
    size_t n = 0;
    for (const struct Json *item = json_first(list); item; item = item->next)
        n++;
    struct Curve curve = {label, arena_alloc(arena, n, sizeof *curve.p), 0};
    for (const struct Json *item = json_first(list); item; item = item->next) {
        double x = metric ? json_shown(json_get(item, "step")) : 0;
        double y = json_shown(metric ? json_get(item, metric) : item);
        if (!isnan(x) && !isnan(y))
            curve.p[curve.n++] = (struct Point){x, y};
    }
    return curve;
}

/* curve_stair -- values become the outline of their histogram: a stair whose heights are shares in
 * %, four of its steps to one of the axis. Two points a bin, its left and right upper corner, and
 * one at height 0 at either end.                                            test: report_stair */
static struct Curve curve_stair(struct Arena *arena, const struct Curve *values,
                                const struct Axis *axis) {
    size_t bins = 4 * (size_t)axis->count;
    size_t n = 2 * bins + 2;
    struct Curve stair = {values->label, arena_zeros(arena, n, sizeof *stair.p), n};
    for (size_t i = 0; i < n; i++)
        stair.p[i].x = axis->low + (double)(i / 2) * axis->step / 4;
    for (size_t i = 0; i < values->n; i++) {
        /* the last bin also takes what lies on its right edge */
        size_t bin = MIN(bins - 1, (size_t)(4 * (values->p[i].y - axis->low) / axis->step));
        stair.p[2 * bin + 1].y += 100 / (double)values->n;
        stair.p[2 * bin + 2].y = stair.p[2 * bin + 1].y;
    }
    return stair;
}

struct Report {
    FILE *file;
    struct Arena arena;
    const struct Json *run;
    size_t plots;
};
enum {
    PLOT_W = 360,
    PLOT_H = 218,
    PLOT_LEFT = 52,
    PLOT_TOP = 40,
    PLOT_RIGHT = PLOT_W - 24,
    PLOT_BOTTOM = PLOT_H - 32
};
static double plot_x(const struct Axis *x, double value) {
    return PLOT_LEFT + (value - x->low) / (x->step * x->count) * (PLOT_RIGHT - PLOT_LEFT);
}
static double plot_y(const struct Axis *y, double value) {
    return PLOT_BOTTOM - (value - y->low) / (y->step * y->count) * (PLOT_BOTTOM - PLOT_TOP);
}

/* An axis's steps: a short mark below and a number, or a line across the figure and a number. */
static void plot_axis(FILE *f, const struct Axis *axis, bool is_x) {
    for (int i = 0; i <= axis->count; i++) {
        double value = axis->low + i * axis->step;
        double x = is_x ? plot_x(axis, value) : PLOT_LEFT;
        double y = is_x ? PLOT_BOTTOM : plot_y(axis, value);
        fprintf(f, "<path class=\"a\" d=\"M%.1f %.1f%s%d\"/>", x, y, is_x ? "v" : "H",
                is_x ? 4 : PLOT_RIGHT);
        fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">", x - (is_x ? 0 : 5),
                y + (is_x ? 15 : 4), is_x ? "middle" : "end");
        fprintf(f, "%.6g</text>", fabs(value) < axis->step / 2 ? 0 : value);
    }
}

/* The curves of a figure that have a point: of report.json's lists, or of a log. Returns how many
 * there are. */
static size_t plot_curves(struct Report *r, const struct Plot *plot, const struct Json *log,
                          struct Curve c[3]) {
    bool histogram = *plot->unit == '%';
    size_t count = 0;
    for (size_t k = 0; k < 3 && plot->metric[k]; k++) {
        const char *name = plot->metric[k];
        const struct Json *numbers = histogram ? json_get(r->run, name) : log;
        c[count] = curve_read(&r->arena, numbers, histogram ? NULL : name, plot->label[k]);
        count += c[count].n > 0;
    }
    return count;
}

/* Gives a curve's label its number: of a histogram the mean, else the last value; and says the
 * curve in words, for those who listen. */
static void curve_describe(struct Report *r, struct Curve *c, bool histogram) {
    double sum = 0;
    for (size_t i = 0; i < c->n; i++)
        sum += c->p[i].y;
    if (histogram)
        c->label = arena_printf(&r->arena, "%s %+.2f", c->label, sum / (double)c->n);
    else
        c->label = arena_printf(&r->arena, "%s %.3g", c->label, c->p[c->n - 1].y);
    fprintf(r->file, "%s (%zu points from %.3g). ", c->label, c->n, c->p[0].y);
}

/* Draws curve k of a figure: its sample in the legend at `at`, and the line over axes x and y. The
 * last piece has no length, h0: round ends make a dot of it where the curve has one point only. */
static void plot_curve(FILE *f, const struct Curve *c, size_t k, double at, const char *class,
                       const struct Axis *x, const struct Axis *y) {
    fprintf(f, "\n<path class=\"l s%zu\" d=\"M%.0f 8h18\"/><text x=\"%.0f\" y=\"12\">%s</text>", k,
            at, at + 22, c->label);
    fprintf(f, "<path class=\"%s s%zu\" d=\"M", class, k);
    for (size_t i = 0; i < c->n; i++)
        fprintf(f, "%.1f %.1f ", plot_x(x, c->p[i].x), plot_y(y, c->p[i].y));
    fputs("h0\"/>", f);
}

/* One figure, if there is a number to show: curves over axes, as SVG. */
static void report_plot(struct Report *r, const struct Plot *plot, const struct Json *log) {
    FILE *f = r->file;
    bool histogram = *plot->unit == '%';
    struct Curve c[3];
    size_t count = plot_curves(r, plot, log, c);
    if (count == 0)
        return;

    /* 1. Title, and the figure in words. The x axis of a histogram are the values themselves;
     *    from here on its curve is the stair. */
    struct Axis x = curves_axis(c, count, !histogram, INFINITY, 5);
    fprintf(f, "<figure><h3>%s</h3>\n<svg viewBox=\"0 0 %d %d\" role=\"img\" ", plot->title, PLOT_W,
            PLOT_H);
    fprintf(f, "aria-label=\"%s, %s: ", plot->title, plot->unit);
    for (size_t k = 0; k < count; k++) {
        curve_describe(r, &c[k], histogram);
        if (histogram)
            c[k] = curve_stair(&r->arena, &c[k], &x);
    }

    /* 2. Axes and their units. Shares start at 0. */
    struct Axis y = curves_axis(c, count, false, histogram ? 0 : INFINITY, 4);
    fprintf(f,
            "\"><text x=\"2\" y=\"%d\">%s</text><text x=\"%d\" y=\"%d\" "
            "text-anchor=\"end\">%s</text>",
            PLOT_TOP - 11, plot->unit, PLOT_RIGHT, PLOT_H - 3, histogram ? "reward" : "step");
    plot_axis(f, &x, true);
    plot_axis(f, &y, false);

    /* 3. The curves; their labels stand in a row above, about 6 units a letter. */
    double at = 2;
    for (size_t k = 0; k < count; k++) {
        plot_curve(f, &c[k], k, at, histogram ? "l h" : "l", &x, &y);
        at += 36 + 6 * (double)strlen(c[k].label);
    }
    fprintf(f, "</svg>\n<figcaption>%s<br>Glossary: %s</figcaption></figure>\n", plot->about,
            plot->term);
    r->plots++;
}

static void report_plots(struct Report *r, enum Stage stage, const struct Json *log) {
    fputs("<div class=\"grid\">\n", r->file);
    for (size_t i = 0; i < COUNT(PLOTS); i++)
        if (PLOTS[i].stage == stage)
            report_plot(r, &PLOTS[i], log);
    fputs("</div>\n", r->file);
}

/* A model's answer, token by token, and how the training moved the log-probability of each: told
 * by underline, by colour and by a number, for not everybody sees all of them. */
static void report_answer(FILE *f, const char *name, const struct Json *answer) {
    const struct Json *ratio = json_first(json_get(answer, "logratio"));
    double sum = 0;
    fprintf(f, "<div><h4>%s</h4><p class=\"t\">", name);
    for (const struct Json *token = json_first(json_get(answer, "tokens")); token;
         token = token->next, ratio = ratio ? ratio->next : NULL) {
        double shown = json_shown(ratio);
        double x = isnan(shown) ? 0 : shown;
        double size = fabs(x);
        /* the levels of the legend in report_samples: 0.1, 1 and 3 nats */
        int level = (size >= 0.1) + (size >= 1) + (size >= 3);
        if (level)
            fprintf(f, "<span class=\"%c%d\" title=\"%+.2f nats\">", x > 0 ? 'u' : 'd', level, x);
        html_text(f, "", json_words(token), level ? "</span>" : "");
        sum += x;
    }
    if (answer)
        fprintf(f, "</p><p class=\"mut\">Reward %+.2f; in all %+.1f nats",
                json_shown(json_get(answer, "reward")), sum);
    fputs("</p></div>\n", f);
}

/* rlhf's part: samples side by side. */
static const char *const COURSE_MODEL[][2] = {{"before", "Before"}, {"ppo", "PPO"}, {"dpo", "DPO"}};

static void report_samples(FILE *f, const struct Json *samples) {
    /* 1. how to read them */
    fputs("<h2>Samples</h2>\n<p>Held-out beginnings, and how each model goes on. Underlined is "
          "what the training moved: <span class=\"t\">"
          "<span class=\"u1\">solid: likelier</span>, <span class=\"d1\">dashed: less "
          "likely</span></span>, thicker from 1 and from 3 nats; a nat is "
          "a factor of 2.7. Rest on a token for its number. A higher reward at a much higher KL "
          "and a much lower distinct-2 is no better text: the "
          "policy has found what pleases the reward model.</p>\n<p class=\"mut\">Glossary: Função "
          "Omega (ω) · omega function (ω)</p>\n",
          f);
    /* 2. a prompt, and the three models' answers side by side */
    for (const struct Json *sample = json_first(samples); sample; sample = sample->next) {
        html_text(f, "<section><h3 class=\"t\">", json_words(json_get(sample, "prompt")),
                  " …</h3><div class=\"grid\">\n");
        for (size_t k = 0; k < COUNT(COURSE_MODEL); k++)
            report_answer(f, COURSE_MODEL[k][1], json_get(sample, COURSE_MODEL[k][0]));
        fputs("</div></section>\n", f);
    }
}

/* A file of a run, or NULL where there is none. */
static struct Json *report_json(struct Arena *arena, const char *dir, const char *folder,
                                const char *name) {
    const char *path = arena_printf(arena, "%s/%s/%s", dir, folder, name);
    return file_exists(path) ? json_read_file(arena, path) : NULL;
}

static void report_head(struct Report *r) {
    FILE *f = r->file;
    /* 1. The page may load and run nothing, whatever a text in it says. */
    fprintf(f,
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>A run of "
            "align</title>\n"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
            "'unsafe-inline'\">\n"
            "<style>%s</style></head>\n<body><main><h1>A run of align</h1>\n<table>\n",
            REPORT_CSS);
    /* 2. What was run, on what, how long: report.json's facts. */
    const struct Json *fact = json_first(json_get(r->run, "facts"));
    for (; fact; fact = fact->next) {
        html_text(f, "<tr><th scope=\"row\">", fact->key, "<td>");
        html_text(f, "", json_words(fact), "</tr>\n");
    }
    fputs("</table>\n<p class=\"mut\">In plots, beside a curve’s name stands its last value, "
          "beside a histogram’s its mean. "
          "Terms: docs/glossary.md, or <code>align glossary TERM</code>.</p>\n",
          f);
}

/* The section of one log: which stage it is of, the metrics in it tell. */
static void report_stage(struct Report *r, const struct Json *log) {
    enum Stage stage = STAGE_RUN;
    for (int s = 1; log && s < STAGES; s++)
        if (curve_read(&r->arena, log, STAGE[s].marker, "").n)
            stage = (enum Stage)s;
    if (stage == STAGE_RUN)
        return;
    fprintf(r->file, "<h2>%s</h2>\n<p>%s</p>\n", STAGE[stage].title, STAGE[stage].about);
    report_plots(r, stage, log);
}

/* report_write -- makes DIR/report.html of the logs in DIR and in the folders of rlhf's stages:
 * one file without a program in it, which reads the same from a disk, years later.
 *                                                                           test: report_page */
static void report_write(const char *dir) {
    struct Report r = {0};
    const struct Json *log[STAGE_REINFORCE];
    bool any = false;

    /* 1. The logs that are there: DIR's own, and those of the stages' folders. */
    for (int k = 0; k < STAGE_REINFORCE; k++) {
        struct Json *state = report_json(&r.arena, dir, STAGE[k].folder, "trainer_state.json");
        log[k] = json_get(state, "log_history");
        any = any || log[k];
    }
    CHECK(any, "%s: no log of a run there (trainer_state.json); give the --output_dir of one", dir);
    r.run = report_json(&r.arena, dir, ".", "report.json");

    /* 2. What was done; the results of the whole run; each stage. */
    struct Output out = output_open(dir, "report.html");
    r.file = out.file;
    report_head(&r);
    report_plots(&r, STAGE_RUN, NULL);
    const struct Json *samples = json_get(r.run, "samples");
    if (samples)
        report_samples(r.file, samples);
    for (int k = 0; k < STAGE_REINFORCE; k++)
        report_stage(&r, log[k]);
    fprintf(r.file,
            "<p class=\"mut\">%s<code>align report DIR</code> makes this page "
            "again.</p>\n</main></body></html>\n",
            r.plots ? "" : "The logs hold no numbers to plot. ");
    output_close(&out);
    arena_free(&r.arena);
}

/* Begins report.json with what was done, in words. The caller adds what else it knows, and closes
 * the facts, the object and the file. */
static struct Output report_begin(const char *dir, const char *command, const char *data,
                                  const struct GPT2 *model, double seconds) {
    const struct GPT2Config *c = &model->config;
    struct Output out = output_open(dir, "report.json");
    json_write_string(out.file, "{\"facts\": {\n  \"Command\": ", text_of(command));
    json_write_string(out.file, ",\n  \"Data\": ", text_of(data));
    fprintf(out.file,
            ",\n  \"Model\": \"GPT-2: %.2f million weights, %zu layers, width %zu, %zu heads, "
            "context %zu, vocabulary %zu\",\n  \"Time\": "
            "\"%.0f seconds on %d threads, kernel %s, in %.0f MB of memory\"",
            (double)gpt2_parameters(model) / 1e6, c->n_layer, c->n_embd, c->n_head, c->n_positions,
            c->vocab_size, seconds, omp_get_max_threads(), kernel ? kernel->name : "plain",
            (double)peak_rss_bytes() / 1e6);
    return out;
}

/* An answer, its tokens, and what the training did to the log-probability of each: the policy's
 * less the language model's, at the temperature at which they write. */
static void course_write_answer(struct Course *course, FILE *f, const struct PolicyResult *r,
                                size_t i) {
    const struct Example *answer = &r->answers[i];
    struct Arena *arena = &course->arena;
    double temperature = course->temperature;
    /* 1. both models read the answer */
    struct Batch batch = collate(arena, answer, 1, SKIP_LAST);
    struct LMHead head = batch_logprobs(r->policy, arena, &batch, temperature, false);
    struct LMHead ref = batch_logprobs(course->language_model, arena, &batch, temperature, false);
    /* 2. its reward and tokens */
    fprintf(f, "{\"reward\": %s, \"tokens\": [", json_number_text(r->reward[i]));
    for (size_t t = answer->prompt_length; t < answer->n; t++)
        json_write_string(f, t > answer->prompt_length ? ", " : "",
                          tokenizer_decode(course->tok, answer->ids[t], course->vocab_size));
    /* 3. log pi - log pi_ref of each */
    for (size_t t = 0; t < batch.R; t++)
        head.logprob[t] -= ref.logprob[t];
    json_write_floats(f, "], \"logratio\": ", head.logprob, batch.R);
    fputc('}', f);
}

/* A prompt and each model's answer, as words (samples.jsonl) or token by token (report.json). */
static void course_write_sample(struct Course *course, FILE *f, size_t i, bool tokens) {
    json_write_string(f, "{\"prompt\": ", course_prompt(course, i));
    for (size_t k = 0; k < COUNT(course->result); k++) {
        fprintf(f, ", \"%s\": ", COURSE_MODEL[k][0]);
        if (tokens)
            course_write_answer(course, f, &course->result[k], i);
        else
            json_write_string(f, "", course->result[k].texts[i]);
    }
    fputc('}', f);
}

/* summary.json: the figures of a run, for programs. */
static void course_write_summary(const struct Course *course, double seconds) {
    struct Output out = output_open(course->output_dir, "summary.json");
    fprintf(out.file,
            "{\n  \"seconds\": %s,\n  \"language_model\": {\"eval_loss_before\": %s, "
            "\"eval_loss_after\": %s},\n",
            json_number_text(seconds), json_number_text(course->eval_loss_before),
            json_number_text(course->eval_loss_after));
    fprintf(out.file, "  \"reward_model\": {\"eval_accuracy\": %s},\n",
            json_number_text(course->eval_accuracy));
    for (size_t k = 0; k < COUNT(course->result); k++) {
        const struct PolicyResult *r = &course->result[k];
        fprintf(out.file, "  \"%s\": {", COURSE_MODEL[k][0]);
        /* result 0 is what the others are compared with */
        if (k)
            fprintf(out.file, "\"reward_before\": %s, \"reward_after\": %s, \"kl\": %s, ",
                    json_number_text(course->result[0].mean_reward),
                    json_number_text(r->mean_reward), json_number_text(r->kl));
        fprintf(out.file, "\"distinct_2\": %s, \"mean_length\": %s},\n",
                json_number_text(r->distinct_2), json_number_text(r->mean_length));
    }
    fprintf(out.file, "  \"peak_rss_bytes\": %zu\n}\n", peak_rss_bytes());
    output_close(&out);
}

/* The rewards of held-out reviews that people liked, or did not: a list in report.json. */
static void course_write_reviews(struct Course *course, FILE *f, const char *before, bool liked) {
    size_t count = 0;
    float *rewards = arena_floats(&course->arena, course->held_out_n);
    for (size_t i = 0; i < course->held_out_n; i++) {
        double rating = course->held_out_rating[i];
        if (liked ? rating > 0 : rating < 0)
            rewards[count++] = course->held_out_reward[i];
    }
    json_write_floats(f, before, rewards, count);
}

/* report.json: what report.html shows beside the logs. */
static void course_write_report(struct Course *course, double seconds) {
    struct Arena *arena = &course->arena;
    const char *data = arena_printf(arena, "%s: %zu rated texts to learn from, %zu held out",
                                    course->data, course->train_n, course->held_out_n);
    struct Output out =
        report_begin(course->output_dir, course->command, data, course->language_model, seconds);

    /* 1. Facts, in words; the last one closes their object. */
    for (size_t k = 0; k < COUNT(course->result); k++) {
        const struct PolicyResult *r = &course->result[k];
        fprintf(out.file,
                ",\n  \"%s\": \"reward %+.2f standard deviations of real reviews, KL %.1f nats an "
                "answer, distinct-2 (different word pairs / all) %.2f, %.1f tokens\"",
                COURSE_MODEL[k][1], r->mean_reward, r->kl, r->distinct_2, r->mean_length);
    }
    fputc('}', out.file);

    /* 2. Rewards, for the histograms. */
    for (size_t k = 0; k < COUNT(course->result); k++) {
        const char *before = arena_printf(arena, ",\n\"%s\": ", COURSE_MODEL[k][0]);
        json_write_floats(out.file, before, course->result[k].reward, course->test_n);
    }
    course_write_reviews(course, out.file, ",\n\"disliked\": ", false);
    course_write_reviews(course, out.file, ",\n\"liked\": ", true);

    /* 3. A few answers, token by token. */
    for (size_t i = 0; i < MIN(course->test_n, (size_t)8); i++) {
        fputs(i ? ",\n" : ",\n\"samples\": [\n", out.file);
        course_write_sample(course, out.file, i, true);
    }
    fputs("]}\n", out.file);
    output_close(&out);
}

/* What a run of the course leaves beside its models. */
static void course_write(struct Course *course, double seconds) {
    struct Output samples = output_open(course->output_dir, "samples.jsonl");
    for (size_t i = 0; i < course->test_n; i++) {
        course_write_sample(course, samples.file, i, false);
        fputc('\n', samples.file);
    }
    output_close(&samples);
    course_write_summary(course, seconds);
    course_write_report(course, seconds);
}

/* Text on one line of a terminal. */
static void print_plain(struct Text text) {
    struct Arena arena = {0};
    text = text_shown(&arena, text, "");
    fwrite(text.data, 1, text.length, stdout);
    arena_free(&arena);
}

/* What a run of the course says in the end. */
static void course_print(struct Course *course) {
    enum { SHOWN = 8 };
    const struct PolicyResult *r = course->result;
    struct Arena *arena = &course->arena;

    /* 1. Answers: the same beginnings for each model. */
    printf("\nEight held-out beginnings, continued by each model, with the reward of each:\n");
    for (size_t i = 0; i < MIN(course->test_n, (size_t)SHOWN); i++) {
        printf("\n  ");
        print_plain(course_prompt(course, i));
        printf(" ...\n");
        for (size_t k = 0; k < COUNT(course->result); k++) {
            printf("    %-7s%+5.2f  ", COURSE_MODEL[k][0], r[k].reward[i]);
            print_plain(r[k].texts[i]);
            putchar('\n');
        }
    }

    /* 2. Figures: the reward beside what it may have cost. */
    printf("\n%zu held-out beginnings   reward      KL  distinct-2  length\n", course->test_n);
    for (size_t k = 0; k < COUNT(course->result); k++)
        printf("  %-20s  %+8.2f%8.1f%12.2f%8.1f\n", COURSE_MODEL[k][0], r[k].mean_reward, r[k].kl,
               r[k].distinct_2, r[k].mean_length);

    /* 3. A command line to go on with, which a shell takes as it stands. */
    printf("\nThe models are in %s/{language_model,reward_model,ppo,dpo}. Try them:\n",
           course->output_dir);
    const char *policy = shell_word(arena, arena_printf(arena, "%s/ppo", course->output_dir));
    printf("  %s generate --model_name_or_path %s --prompt \"The film is\" --do_sample --top_k 0 "
           "--temperature %g",
           program_name, policy, course->temperature);
    if (course->tokenizer)
        printf(" --tokenizer %s", shell_word(arena, course->tokenizer));
    putchar('\n');
    printf("\nThe language model's answers scored %+.2f; after PPO they score %+.2f, after DPO "
           "%+.2f (standard deviations of the reward of "
           "real reviews).\n",
           r[0].mean_reward, r[1].mean_reward, r[2].mean_reward);
}

/* =============================================================================================
 * Chapter 27 - Command line, main
 *
 * One table of flags, one table of commands. A flag's name is transformers', TRL's or PEFT's.
 * ============================================================================================= */

enum { MOST_FLAGS = 160 };

struct Options {
    const char *model_name_or_path, *ref_model, *reward_model_path, *dataset_name, *eval_dataset,
        *tokenizer, *prompt, *rollouts, *loss_type, *loss_weights, *file;
    const char *peft_adapter, *baseline, *command; /* command: the command line */
    struct Adapter lora; /* of a new adapter */
    struct TrainingArguments train;
    struct PPOConfig ppo;
    struct GenerationConfig generation;
    struct GPT2Config config;
    struct DPOConfig dpo;
    double center_rewards_coefficient, begin; /* begin: when the command line was given */
    struct LengthSampler input_length, output_length;
    size_t pretrain_steps, reward_steps, ppo_steps, dpo_steps, top_n, max_samples;
    bool json, jsonl, decode, help, quiet, use_peft;
    bool given[MOST_FLAGS]; /* which of FLAGS the command line has */
    const char *passed_over; /* flags of other programs that are given, in a row */
    /* What a command opens and main closes. */
    struct Arena arena;
    struct Tokenizer *tok;
    struct GPT2 *model, *reference, *reward_model;
    struct Dataset *data, *eval;
};

/* Groups of flags; a command takes some of them. */
enum Group {
    G_MODEL = 1,
    G_DATA = 2,
    G_TRAIN = 4,
    G_NEW = 8,
    G_REF = 16,
    G_REWARD = 32,
    G_PPO = 64,
    G_DPO = 128,
    G_SAMPLE = 256,
    G_LENGTH = 512,
    G_PROMPT = 1024,
    G_NEXT = 2048,
    G_TOKENIZE = 4096,
    G_RLHF = 8192,
    G_OUT = 16384,
    G_SEED = 32768,
    G_RUN = 65536,
    G_JSON = 262144,
    G_PEFT = 1 << 20,
    G_LORA = 1 << 21,
    G_ROLL = 1 << 22,
    G_RLOO = 1 << 23,
    G_EXACT = 1 << 24,
    G_COLLECT = 1 << 25,
    G_EVAL = 1 << 26,
    G_WORDS = 1 << 27,
    G_FILES = G_OUT | G_SEED | G_DATA,
    G_TRAINING = G_FILES | G_TRAIN,
    G_TOOL = G_MODEL | G_PEFT | G_DATA,
    G_TUNING = G_TOOL | G_LORA | G_TRAINING,
    G_ALL = -1
};
/* What a flag's value may be: one of the names that its help lists; of numbers, whole ones up to
 * KIND_COUNT, the range is part of it. */
enum Kind {
    KIND_TEXT,
    KIND_STRING,
    KIND_NAME,
    KIND_LIST,
    KIND_BOOL,
    KIND_STOPPING,
    KIND_SEED,
    KIND_SIZE,
    KIND_STEPS,
    KIND_BATCH,
    KIND_COUNT,
    KIND_DOUBLE,
    KIND_POSITIVE,
    KIND_TEMPERATURE,
    KIND_EPOCHS,
    KIND_WEIGHT,
    KIND_WARMUP,
    KIND_SHARE,
    KIND_DECAY
};
static const struct {
    double least, most;
    const char *expected;
} RANGES[] = {[KIND_SEED] = {0, 0x1p64, "a whole number, 0 or more,"},
              [KIND_SIZE] = {0, 0x1p40, "a whole number, 0 to 2^40,"},
              [KIND_STEPS] = {0, 0x1p40, "a whole number, 0 to 2^40,"},
              [KIND_WARMUP] = {0, 0x1p40, "a number from 0 to 2^40"},
              [KIND_COUNT] = {1, 0x1p40, "a whole number, 1 to 2^40,"},
              [KIND_DOUBLE] = {-FLT_MAX, FLT_MAX, "a number"},
              [KIND_POSITIVE] = {FLT_MIN, FLT_MAX, "a number above 0"},
              [KIND_WEIGHT] = {0, FLT_MAX, "a number, 0 or more,"},
              [KIND_BATCH] = {1, 4096, "a whole number, 1 to 4096,"},
              [KIND_EPOCHS] = {FLT_MIN, 1e9, "a number above 0, at most 1e9,"},
              /* less takes the likeliest token as well, but overflows */
              [KIND_TEMPERATURE] = {1e-6, FLT_MAX, "a number, 1e-6 or more,"},
              [KIND_SHARE] = {0, 1, "a number from 0 to 1"},
              [KIND_DECAY] = {0, 1 - DBL_EPSILON / 2, "a number from 0 to below 1"}};
struct Flag {
    const char *name;
    enum Kind kind;
    size_t offset;
    int groups;
    const char *help;
};
#define AT(member) offsetof(struct Options, member)

/* A row that only --help reads: no command has it. */
#define HEADING(title) {"", KIND_TEXT, 0, 0, title},

static const struct Flag FLAGS[] = {
    HEADING("Models"){"model_name_or_path", KIND_STRING, AT(model_name_or_path), G_MODEL,
                      "folder of a model (config.json, model.safetensors)"},
    {"peft_adapter", KIND_STRING, AT(peft_adapter), G_PEFT,
     "folder of a LoRA adapter (adapter_config.json, adapter_model.safetensors): added to the "
     "model; training goes on with it"},
    {"ref_model", KIND_STRING, AT(ref_model), G_REF,
     "folder of the reference model; default: the start model"},
    {"reward_model_path", KIND_STRING, AT(reward_model_path), G_ROLL, "folder of a reward model"},
    HEADING("A new LoRA adapter"){"use_peft", KIND_BOOL, AT(use_peft), G_LORA,
                                  "train a new LoRA adapter instead of the model's weights"},
    {"lora_r", KIND_COUNT, AT(lora.r), G_LORA, "its rank"},
    {"lora_alpha", KIND_POSITIVE, AT(lora.lora_alpha), G_LORA, "its scale is lora_alpha / lora_r"},
    {"use_rslora", KIND_BOOL, AT(lora.use_rslora), G_LORA,
     "its scale is lora_alpha / sqrt(lora_r)"},
    {"lora_dropout", KIND_WEIGHT, AT(lora.lora_dropout), G_LORA, "only 0 is implemented"},
    {"lora_target_modules", KIND_LIST, AT(lora.target_modules), G_LORA,
     "layers that get it: c_attn (default), c_proj, c_fc; attn.c_proj, mlp.c_proj; all-linear"},
    HEADING("Data and output"){"dataset_name", KIND_STRING, AT(dataset_name), G_DATA,
                               "a .jsonl file, or a folder: its train split"},
    {"eval_dataset", KIND_STRING, AT(eval_dataset), G_RUN,
     "held-out data, same shapes; of a folder its validation split, else its test split"},
    {"output_dir", KIND_STRING, AT(train.output_dir), G_OUT, "folder for what is made"},
    {"tokenizer", KIND_STRING, AT(tokenizer), G_ALL,
     "tokenizer.bin; default: beside the program, then the current folder"},
    {"seed", KIND_SEED, AT(train.seed), G_SEED, "of all random numbers"},
    {"quiet", KIND_BOOL, AT(quiet), G_ALL, "no progress on stderr"},
    {"help", KIND_BOOL, AT(help), G_ALL, "this page; also -h"},
    HEADING("Training"){"learning_rate", KIND_WEIGHT, AT(train.learning_rate), G_TRAIN,
                        "at its highest"},
    {"lr_scheduler_type", KIND_NAME, AT(train.lr_scheduler_type), G_TRAIN,
     "linear, cosine, constant, constant_with_warmup"},
    {"warmup_steps", KIND_WARMUP, AT(train.warmup_steps), G_TRAIN,
     "steps over which the learning rate rises from 0; below 1: a share of all steps"},
    {"warmup_ratio", KIND_SHARE, AT(train.warmup_ratio), G_TRAIN,
     "the same as a share of all steps"},
    {"optim", KIND_NAME, AT(train.optim), G_TRAIN, "adamw, adamw_torch, adamw_torch_fused, sgd"},
    {"adam_beta1", KIND_DECAY, AT(train.adam_beta1), G_TRAIN,
     "decay of the gradient's running mean"},
    {"adam_beta2", KIND_DECAY, AT(train.adam_beta2), G_TRAIN,
     "decay of the squared gradient's running mean"},
    {"adam_epsilon", KIND_POSITIVE, AT(train.adam_epsilon), G_TRAIN, "added to its square root"},
    {"weight_decay", KIND_WEIGHT, AT(train.weight_decay), G_TRAIN,
     "on matrices; never on biases and layer norms"},
    {"max_grad_norm", KIND_WEIGHT, AT(train.max_grad_norm), G_TRAIN,
     "longer gradients are shortened to this; 0: no limit"},
    {"max_steps", KIND_STEPS, AT(train.max_steps), G_TRAIN,
     "optimizer (ppo: PPO) steps; overrides the epochs; 0 or -1: not set"},
    {"logging_steps", KIND_COUNT, AT(train.logging_steps), G_TRAIN, "steps between log entries"},
    {"save_steps", KIND_SIZE, AT(train.save_steps), G_TRAIN,
     "steps between checkpoints, folders checkpoint-N in --output_dir; 0: none"},
    {"save_total_limit", KIND_SIZE, AT(train.save_total_limit), G_TRAIN,
     "how many to keep; 0: all"},
    {"resume_from_checkpoint", KIND_STRING, AT(train.resume_from_checkpoint), G_TRAIN,
     "go on from a folder checkpoint-N; true: from the newest in --output_dir"},
    {"num_train_epochs", KIND_EPOCHS, AT(train.num_train_epochs), G_RUN, "passes over the data"},
    {"per_device_train_batch_size", KIND_BATCH, AT(train.per_device_train_batch_size), G_RUN,
     "rows (dpo, reward: pairs or rated texts) of a micro-batch"},
    {"per_device_eval_batch_size", KIND_BATCH, AT(train.per_device_eval_batch_size), G_RUN | G_EVAL,
     "rows of a batch in evaluation; no figure depends on it"},
    {"gradient_accumulation_steps", KIND_COUNT, AT(train.gradient_accumulation_steps), G_TRAIN,
     "micro-batches of an optimizer step"},
    {"eval_steps", KIND_SIZE, AT(train.eval_steps), G_RUN,
     "steps between evaluations; default: at the end"},
    {"max_length", KIND_COUNT, AT(train.max_length), G_RUN | G_LENGTH,
     "longest sequence in tokens"},
    {"train_sampling_strategy", KIND_NAME, AT(train.train_sampling_strategy), G_RUN,
     "random, sequential"},
    HEADING("A new model"){"n_layer", KIND_COUNT, AT(config.n_layer), G_NEW | G_EXACT,
                           "blocks of a new model"},
    {"n_head", KIND_COUNT, AT(config.n_head), G_NEW | G_EXACT, "attention heads"},
    {"n_embd", KIND_COUNT, AT(config.n_embd), G_NEW | G_EXACT, "width"},
    {"n_positions", KIND_COUNT, AT(config.n_positions), G_NEW, "longest context"},
    {"vocab_size", KIND_SIZE, AT(config.vocab_size), G_NEW | G_EXACT | G_TOKENIZE,
     "ids, the end token included (exact: 2 to 16, without one)"},
    HEADING("Objective"){"center_rewards_coefficient", KIND_WEIGHT, AT(center_rewards_coefficient),
                         G_REWARD, "weight of (r_chosen + r_rejected)^2"},
    {"beta", KIND_POSITIVE, AT(dpo.beta), G_DPO,
     "how strongly DPO holds to the reference; at 0 the pairs would not count"},
    {"beta", KIND_WEIGHT, AT(ppo.init_kl_coef), G_RLOO | G_EXACT,
     "price of a nat of KL(policy || reference)"},
    {"baseline", KIND_STRING, AT(baseline), G_RLOO,
     "subtracted from the reward: none, mean (of earlier steps), rloo (leave one out)"},
    {"num_generations", KIND_COUNT, AT(ppo.num_generations), G_RLOO | G_COLLECT,
     "answers to each prompt"},
    {"max_samples", KIND_SIZE, AT(max_samples), G_COLLECT | G_EVAL,
     "prompts used, from the first; 0: all"},
    {"loss_type", KIND_LIST, AT(loss_type), G_DPO | G_REWARD,
     "dpo: sigmoid, ipo, hinge, robust, sft, or several; reward: sigmoid (Bradley-Terry), bce (on "
     "text + label)"},
    {"loss_weights", KIND_LIST, AT(loss_weights), G_DPO, "a weight for each loss_type: 1 0.2"},
    {"label_smoothing", KIND_DECAY, AT(dpo.label_smoothing), G_DPO,
     "share of pairs thought to be labelled the wrong way round"},
    HEADING("PPO"){"rollouts", KIND_STRING, AT(rollouts), G_PPO,
                   "replay stored rollouts (query_ids, response_ids, score)"},
    {"batch_size", KIND_COUNT, AT(ppo.batch_size), G_PPO | G_RLOO, "rollouts of a step"},
    {"mini_batch_size", KIND_COUNT, AT(ppo.mini_batch_size), G_PPO,
     "rollouts of one forward and backward pass"},
    {"ppo_epochs", KIND_COUNT, AT(ppo.ppo_epochs), G_PPO, "passes over a batch of rollouts"},
    {"init_kl_coef", KIND_WEIGHT, AT(ppo.init_kl_coef), G_PPO, "beta: the price of a nat of KL"},
    {"adap_kl_ctrl", KIND_BOOL, AT(ppo.adap_kl_ctrl), G_PPO, "adapt it towards --target"},
    {"target", KIND_POSITIVE, AT(ppo.target), G_PPO, "KL that the controller aims at"},
    {"horizon", KIND_POSITIVE, AT(ppo.horizon), G_PPO, "samples over which it does"},
    {"kl_penalty", KIND_NAME, AT(ppo.kl_penalty), G_PPO, "kl, abs, mse, full"},
    {"gamma", KIND_SHARE, AT(ppo.gamma), G_PPO, "discount"},
    {"lam", KIND_SHARE, AT(ppo.lam), G_PPO, "lambda of GAE"},
    {"cliprange", KIND_WEIGHT, AT(ppo.cliprange), G_PPO, "of the probability ratio"},
    {"cliprange_value", KIND_WEIGHT, AT(ppo.cliprange_value), G_PPO, "of the value"},
    {"vf_coef", KIND_WEIGHT, AT(ppo.vf_coef), G_PPO, "weight of the value loss"},
    {"whiten_rewards", KIND_BOOL, AT(ppo.whiten_rewards), G_PPO,
     "whiten rewards before the advantages"},
    {"score_clip", KIND_WEIGHT, AT(ppo.score_clip), G_PPO, "limit scores to +-this"},
    {"use_score_scaling", KIND_BOOL, AT(ppo.use_score_scaling), G_PPO,
     "divide scores by their running deviation"},
    {"use_score_norm", KIND_BOOL, AT(ppo.use_score_norm), G_PPO, "and subtract their running mean"},
    {"ratio_threshold", KIND_POSITIVE, AT(ppo.ratio_threshold), G_PPO,
     "skip mini-batches whose mean ratio exceeds it"},
    {"early_stopping", KIND_BOOL, AT(ppo.early_stopping), G_PPO,
     "stop a step's epochs at 1.5 * target_kl"},
    {"target_kl", KIND_POSITIVE, AT(ppo.target_kl), G_PPO, "for early_stopping"},
    HEADING("Generation"){"input_min_text_length", KIND_COUNT, AT(input_length.min_value), G_ROLL,
                          "prompts cut from texts: shortest"},
    {"input_max_text_length", KIND_COUNT, AT(input_length.max_value), G_ROLL,
     "and longest plus one (LengthSampler)"},
    {"output_min_length", KIND_COUNT, AT(output_length.min_value), G_PPO | G_RLOO,
     "responses: shortest limit"},
    {"output_max_length", KIND_COUNT, AT(output_length.max_value), G_PPO | G_RLOO,
     "and longest plus one (LengthSampler)"},
    {"prompt", KIND_TEXT, AT(prompt), G_PROMPT, "text to continue"},
    {"temperature", KIND_TEMPERATURE, AT(generation.temperature),
     G_SAMPLE | G_NEXT | G_ROLL | G_RLHF | G_DPO,
     "divides the logits; towards 0 only the likeliest token is left"},
    {"top_k", KIND_SIZE, AT(generation.top_k), G_SAMPLE | G_NEXT | G_ROLL,
     "sample from the k likeliest; 0: all"},
    {"top_p", KIND_SHARE, AT(generation.top_p), G_SAMPLE | G_NEXT | G_ROLL,
     "sample from the likeliest that hold this mass"},
    {"repetition_penalty", KIND_POSITIVE, AT(generation.repetition_penalty), G_SAMPLE | G_NEXT,
     "above 1: ids already there become less likely"},
    {"no_repeat_ngram_size", KIND_SIZE, AT(generation.no_repeat_ngram_size), G_SAMPLE,
     "no n-gram twice"},
    {"max_new_tokens", KIND_COUNT, AT(generation.max_new_tokens),
     G_SAMPLE | G_COLLECT | G_EVAL | G_EXACT, "at most so many new tokens (exact: just so many)"},
    {"min_new_tokens", KIND_SIZE, AT(generation.min_new_tokens), G_SAMPLE, "at least so many"},
    {"num_beams", KIND_COUNT, AT(generation.num_beams), G_SAMPLE, "beam search with so many beams"},
    {"length_penalty", KIND_DOUBLE, AT(generation.length_penalty), G_SAMPLE,
     "beam search: above 0 favours longer sequences"},
    {"early_stopping", KIND_STOPPING, AT(generation.early_stopping), G_SAMPLE,
     "beam search: false, true or never"},
    {"do_sample", KIND_BOOL, AT(generation.do_sample), G_SAMPLE,
     "draw tokens instead of taking the likeliest"},
    {"num_return_sequences", KIND_COUNT, AT(generation.num_return_sequences), G_SAMPLE,
     "samples of each prompt"},
    HEADING("What is printed"){"top_n", KIND_COUNT, AT(top_n), G_NEXT, "rows of the table"},
    {"json", KIND_BOOL, AT(json), G_JSON, "one JSON object a line"},
    {"jsonl", KIND_BOOL, AT(jsonl), G_TOKENIZE, "{\"text\"} a line in, {\"input_ids\"} a line out"},
    {"decode", KIND_BOOL, AT(decode), G_TOKENIZE, "ids in, the exact bytes out"},
    HEADING("Steps of the stages"){"pretrain_steps", KIND_SIZE, AT(pretrain_steps), G_RLHF,
                                   "of the language model"},
    {"reward_steps", KIND_SIZE, AT(reward_steps), G_RLHF, "of the reward model"},
    {"ppo_steps", KIND_SIZE, AT(ppo_steps), G_RLHF, "of PPO"},
    {"dpo_steps", KIND_SIZE, AT(dpo_steps), G_RLHF, "of DPO"},
};

_Static_assert(COUNT(FLAGS) <= MOST_FLAGS, "Options must note which flags are given");

/* Flags of transformers, PEFT and TRL about what does not exist here, for the commands that train:
 * the values with which they change nothing (NULL: all), and why another is refused. */
static const struct {
    const char *name, *harmless, *why;
} PASSED_OVER[] =
    {{"bf16", "false", "align computes in float32"},
     {"fp16", "false", "align computes in float32"},
     {"tf32", NULL, NULL},
     {"torch_dtype", "float32, auto", "align computes in float32"},
     {"dtype", "float32, auto", "align computes in float32"},
     {"load_in_8bit", "false", "align computes in float32"},
     {"load_in_4bit", "false", "align computes in float32"},
     {"attn_implementation", NULL, NULL},
     {"gradient_checkpointing", NULL, NULL},
     {"use_cpu", NULL, NULL},
     {"use_cache", NULL, NULL},
     {"trust_remote_code", NULL, NULL},
     {"do_train", "true", "a training command trains"},
     {"do_eval", NULL, NULL},
     {"do_predict", "false", "align generate writes answers"},
     {"overwrite_output_dir", NULL, NULL},
     {"logging_dir", NULL, NULL},
     {"run_name", NULL, NULL},
     {"log_level", NULL, NULL},
     {"disable_tqdm", NULL, NULL},
     {"remove_unused_columns", NULL, NULL},
     {"report_to", "none, []", "the log is trainer_state.json, and report.html shows it"},
     {"push_to_hub", "false", "nothing is sent anywhere"},
     {"logging_strategy", "steps", "a log entry comes each --logging_steps"},
     {"save_strategy", "steps", "a checkpoint comes each --save_steps; 0: none"},
     {"eval_strategy", "steps, no", "an evaluation comes each --eval_steps and at the end"},
     {"load_best_model_at_end", "false", "the last model is saved, not the best"},
     {"save_safetensors", "true", "weights are written as safetensors"},
     {"packing", "false", "sft trains on a text a row; pretrain packs"},
     {"padding_free", NULL, NULL},
     {"group_by_length", "false", "--train_sampling_strategy is random or sequential"},
     {"dataloader_drop_last", "false", "the last batch of an epoch counts too"},
     {"dataloader_num_workers", NULL, NULL},
     {"dataloader_pin_memory", NULL, NULL},
     {"dataset_num_proc", NULL, NULL},
     {"optimize_cuda_cache", NULL, NULL},
     {"optimize_device_cache", NULL, NULL}};

/* What flags are called in other programs and versions, and here. The first one that the command
 * has is meant. */
static const char *const ALSO_CALLED[][2] = {{"lr", "learning_rate"},
                                             {"epochs", "num_train_epochs"},
                                             {"n_epochs", "num_train_epochs"},
                                             {"epochs", "ppo_epochs"},
                                             {"steps", "max_steps"},
                                             {"max_iters", "max_steps"},
                                             {"batch_size", "per_device_train_batch_size"},
                                             {"train_batch_size", "per_device_train_batch_size"},
                                             {"train_batch_size", "batch_size"},
                                             {"per_device_train_batch_size", "batch_size"},
                                             {"per_device_eval_batch_size", "per_device_train_"
                                                                            "batch_size"},
                                             {"backward_batch_size", "mini_batch_size"},
                                             {"kl_coef", "init_kl_coef"},
                                             {"kl_coef", "beta"},
                                             {"beta", "init_kl_coef"},
                                             {"sft_model_path", "model_name_or_path"},
                                             {"ref_model_name_or_path", "ref_model"},
                                             {"train_file", "dataset_name"},
                                             {"validation_file", "eval_dataset"},
                                             {"max_tokens", "max_new_tokens"},
                                             {"n_predict", "max_new_tokens"},
                                             {"max_tokens", "output_max_length"},
                                             {"max_new_tokens", "output_max_length"},
                                             {"response_length", "output_max_length"},
                                             {"max_completion_length", "output_max_length"},
                                             {"max_length", "max_new_tokens"},
                                             {"max_length", "output_max_length"},
                                             {"max_prompt_length", "input_max_text_length"},
                                             {"max_prompt_length", "max_length"},
                                             {"max_seq_length", "max_length"},
                                             {"block_size", "max_length"},
                                             {"n_ctx", "n_positions"},
                                             {"n_ctx", "max_length"},
                                             {"temp", "temperature"},
                                             {"repeat_penalty", "repetition_penalty"}};

/* A file that ships with the program: beside it, where `make install` puts it, or in the current
 * folder. */
static const char *shipped_file(struct Arena *arena, const char *name, const char *remedy) {
    char program[PATH_MAX];
    char *slash = program_path(program) ? strrchr(program, '/') : NULL;
    const char *path =
        slash ? arena_printf(arena, "%.*s/%s", (int)(slash - program), program, name) : name;
    if (slash && !file_exists(path)) {
        int folder = (int)(slash - program);
        path = arena_printf(arena, "%.*s/../share/align/%s", folder, program, name);
    }
    if (!file_exists(path))
        path = name;
    CHECK(file_exists(path), "%s is neither beside the program nor in the current folder; %s", name,
          remedy);
    return path;
}

static struct Tokenizer *load_tokenizer(struct Options *o) {
    static const char remedy[] = "name it with --tokenizer, or make it: python3 prepare_imdb.py "
                                 "tokenizer --source DIR";
    return o->tok = tokenizer_load(&o->arena,
                                   o->tokenizer ? o->tokenizer
                                                : shipped_file(&o->arena, "tokenizer.bin", remedy));
}

static bool is_adapter(const char *folder) {
    char path[PATH_MAX];
    return snprintf(path, sizeof path, "%s/adapter_config.json", folder) < (int)sizeof path
           && file_exists(path);
}

/* Ends the program if a flag is not given that the command cannot do without.
 * flags: their names in a list; all of them are strings. */
static void need(const struct Options *o, const char *flags) {
    for (size_t length; (length = next_name(&flags)) > 0; flags += length)
        for (size_t i = 0; i < COUNT(FLAGS); i++) {
            if (strlen(FLAGS[i].name) != length || strncmp(FLAGS[i].name, flags, length) != 0)
                continue;
            const char *value = *(const char *const *)((const char *)o + FLAGS[i].offset);
            if (!value)
                die_usage("--%s is needed; see --help", FLAGS[i].name);
        }
}

static bool given(const struct Options *o, const char *name) {
    for (size_t i = 0; i < COUNT(FLAGS); i++)
        if (o->given[i] && strcmp(FLAGS[i].name, name) == 0)
            return true;
    return false;
}

/* Says which flags of these (names in a list) are given: they change nothing, and why. */
static void note_idle(const struct Options *o, const char *flags, const char *why) {
    char line[400] = "";
    for (size_t length; (length = next_name(&flags)) > 0; flags += length) {
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)length, flags);
        size_t used = strlen(line);
        if (given(o, name))
            snprintf(line + used, sizeof line - used, "%s--%s", used ? ", " : "", name);
    }
    if (*line)
        warn("%s: no effect: %s", line, why);
}

/* config.json's special tokens against the tokens that tokenizer.bin has. A model may have more:
 * those that its folder names were trained for texts that cannot be encoded here, so they are
 * refused. A padding token, which no text holds, is kept under its name. Ids without a name only
 * round up the vocabulary. */
static void check_special_tokens(struct Options *o, const char *folder, struct GPT2Config *c) {
    struct Arena arena = {0};
    const struct Tokenizer *tok = o->tok;
    size_t end = (size_t)c->eos_token_id;
    size_t known = (size_t)endoftext_id(c->vocab_size) + 1;
    const struct Text *names = added_tokens(&arena, folder, known, c->vocab_size);
    /* 1. Texts end with the end token: it must be one that is known here. */
    CHECK(end < known || names[end - known].length == 0,
          "%s: its end token, id %zu, is \"%s\", an added token that %s lacks; this model cannot "
          "be "
          "used",
          folder, end, names[end - known].data, tok->path);
    CHECK(end < known,
          "%s: its end token, id %zu, is no token of %s; if its texts end with GPT-2's own, write "
          "\"eos_token_id\": %zu in config.json",
          folder, end, tok->path, known - 1);
    /* 2. Of the ids beyond tokenizer.bin's none may have a name, but for one that only pads. */
    for (size_t id = known; id < c->vocab_size; id++) {
        struct Text name = names[id - known];
        bool kept = id == known && id == (size_t)c->pad_token_id;
        const char *remedy = id > known ? ""
                                        : arena_printf(&arena,
                                                       "if it only pads, write \"pad_token_id\": "
                                                       "%zu in config.json, else ",
                                                       id);
        CHECK(kept || name.length == 0,
              "%s: id %zu is \"%s\", an added token that %s lacks; %sthis model cannot be used",
              folder, id, name.data, tok->path, remedy);
        if (kept)
            c->pad_token = text_copy(&o->arena, name);
    }
    /* 3. An ordinary word as the end token works, but is most likely a slip. */
    if (end + 1 < known)
        warn("%s: its end token, eos_token_id %zu, is the ordinary token \"%s\"; to this model a "
             "text ends wherever that token stands in it",
             folder, end, token_as_unicode(&arena, tok->token[end]).data);
    arena_free(&arena);
}

/* The folder of a model's own weights: of an adapter that of its base; NULL if it names none. */
static const char *base_folder(struct Options *o, const char *folder) {
    if (!is_adapter(folder))
        return folder;
    return adapter_config_load(&o->arena, folder).base_model_name_or_path;
}

/* A model's folder; or an adapter's: its base, the adapter folded in. */
static struct GPT2 *load_model(struct Options *o, const char *folder) {
    const char *base = base_folder(o, folder);
    CHECK(base == folder || (base && file_exists(base)),
          "%s: its base \"%s\" is not here (base_model_name_or_path in its adapter_config.json); "
          "give both: --model_name_or_path BASE --peft_adapter DIR",
          folder, base ? base : "");
    /* A tokenizer of its own that splits texts otherwise would feed the model ids that mean
     * something else: each folder that has one is checked. */
    struct GPT2 *model = gpt2_load(base);
    tokenizer_check_folder(o->tok, folder, model->config.vocab_size);
    check_special_tokens(o, base, &model->config);
    if (base != folder) {
        tokenizer_check_folder(o->tok, base, model->config.vocab_size);
        adapter_load(model, folder);
        adapter_merge(model);
    }
    return model;
}

/* A command's tokenizer and model, with --peft_adapter's adapter, for training or folded in; or
 * with a new one (--use_peft). */
static void open_model(struct Options *o, bool train) {
    need(o, "model_name_or_path");
    load_tokenizer(o);
    struct GPT2 *model = o->model = load_model(o, o->model_name_or_path);
    if (!o->use_peft && !o->peft_adapter)
        return;
    /* 1. An adapter on an adapter has no format of its own: which base would it be loaded on? */
    CHECK(!is_adapter(o->model_name_or_path),
          "--model_name_or_path %s: is itself an adapter, a base is needed here; fold it into its "
          "base first: align merge",
          o->model_name_or_path);
    if (o->use_peft)
        adapter_new(model, o->lora, o->train.seed);
    else
        adapter_load(model, o->peft_adapter);
    model->adapter.base_model_name_or_path = o->model_name_or_path;

    /* 2. To write or to score, W + BA is computed once, not at each product. */
    if (!train)
        adapter_merge(model);
    else if (model->adapter.lora_dropout > 0)
        warn("%s: lora_dropout %g is not applied: training here has no dropout", o->peft_adapter,
             model->adapter.lora_dropout);
}

/* --ref_model, or the start model: of an adapter without a second copy of the base. */
static void load_reference(struct Options *o) {
    const struct GPT2 *model = o->model;
    if (o->ref_model)
        o->reference = load_model(o, o->ref_model);
    else
        o->reference =
            model->adapter.r ? adapter_reference(model, o->peft_adapter != NULL) : gpt2_copy(model);
    CHECK(o->reference->config.vocab_size == model->config.vocab_size,
          "--ref_model %s has %zu ids, the model %zu", o->ref_model,
          o->reference->config.vocab_size, model->config.vocab_size);
}

/* Which of the names a flag's value is. */
static size_t choice(const char *flag, const char *value, const char *names) {
    const char *name = names;
    for (size_t length, i = 0; (length = next_name(&name)) > 0; name += length, i++)
        if (strlen(value) == length && strncmp(name, value, length) == 0)
            return i;
    die_usage("--%s \"%s\" is unknown; there are %s", flag, value, names);
}

static void open_data(struct Options *o, const unsigned *shapes, size_t count) {
    o->data = dataset_load(&o->arena, o->dataset_name, shapes, count);
    if (o->eval_dataset)
        o->eval = dataset_load_held_out(&o->arena, o->eval_dataset, o->data);
}

static void options_close(struct Options *o) {
    gpt2_free(o->model);
    gpt2_free(o->reference);
    gpt2_free(o->reward_model);
    arena_free(&o->arena);
}

static const unsigned TEXT_SHAPES[] = {SHAPE_TEXT},
                      SFT_SHAPES[] = {SHAPE_PROMPT_COMPLETION, SHAPE_TEXT},
                      DPO_SHAPES[] = {SHAPE_PREFERENCE},
                      REWARD_SHAPES[] = {SHAPE_MARGIN, SHAPE_RATED, SHAPE_LABELLED},
                      LABELLED_SHAPES[] = {SHAPE_LABELLED}, RATED_SHAPES[] = {SHAPE_RATED},
                      PROMPT_SHAPES[] = {SHAPE_PROMPT, SHAPE_TEXT},
                      ROLLOUT_SHAPES[] = {SHAPE_ROLLOUT};

static void tokenize_decode(const struct Tokenizer *tok, struct Text in, size_t V,
                            const char *path) {
    const char *at = in.data;
    for (size_t place = 1; (at += strspn(at, " \t\r\n\v\f,[]")) < in.data + in.length; place++) {
        char *end;
        long id = strtol(at, &end, 10);
        CHECK(end != at && id >= 0 && (size_t)id < V,
              "%s: number %zu (\"%.12s\") is no id from 0 to %zu", path, place, at, V - 1);
        struct Text piece = tokenizer_decode(tok, (int)id, V);
        fwrite(piece.data, 1, piece.length, stdout);
        at = end;
    }
}

static void command_tokenize(struct Options *o) {
    if (o->jsonl && o->decode)
        die_usage("--decode reads ids, --jsonl texts: give one of them");
    struct Tokenizer *tok = load_tokenizer(o);
    size_t V = o->config.vocab_size;
    CHECK(V > BYTE_TOKENS && V <= tok->vocab_size,
          "--vocab_size %zu: a vocabulary has 257 to %zu ids", V, tok->vocab_size);
    const char *path = o->file ? o->file : "-";
    struct Row plain = {0};
    if (o->jsonl)
        o->data = dataset_load(&o->arena, path, TEXT_SHAPES, 1);
    else
        plain.text = read_file(&o->arena, path);
    if (o->decode) {
        tokenize_decode(tok, plain.text, V, path);
        return;
    }
    /* Without --jsonl all the input is one text, line ends included. */
    for (size_t i = 0; i < (o->jsonl ? o->data->n : 1); i++) {
        struct Text text = o->jsonl ? o->data->rows[i].text : plain.text;
        struct Example e = example_encode(&o->arena, tok, text, V, NULL);
        if (o->jsonl)
            json_write_ids(stdout, "{\"input_ids\": ", e.ids, e.n);
        for (size_t k = 0; k < e.n && !o->jsonl; k++)
            printf("%s%d", k ? " " : "", e.ids[k]);
        puts(o->jsonl ? "}" : "");
    }
}

/* What a training starts from: model, data, and a Trainer whose task is to be set. */
static struct Trainer open_training(struct Options *o, const unsigned *shapes, size_t count) {
    if (!o->model)
        open_model(o, true);
    open_data(o, shapes, count);
    warn_of_written_ends(o->data, o->tok);
    if (o->eval)
        warn_of_written_ends(o->eval, o->tok);
    o->train.max_length = MIN(o->train.max_length, o->model->config.n_positions);
    return (struct Trainer){.model = o->model, .tok = o->tok, .args = o->train};
}

/* A run may write over a folder that it reads, as in transformers, since that is in memory by then;
 * but whoever gave both by mistake loses a model, so it is said. */
static void note_replaced(struct Options *o, const char *dir) {
    const struct {
        const char *flag, *folder;
    } inputs[] = {{"model_name_or_path", o->model_name_or_path},
                  {"peft_adapter", o->peft_adapter},
                  {"ref_model", o->ref_model},
                  {"reward_model_path", o->reward_model_path}};
    for (size_t i = 0; i < COUNT(inputs); i++) {
        const char *flag = inputs[i].flag;
        const char *folder = inputs[i].folder;
        /* the same folder under another name, by a link for one, counts too */
        const char *base = folder ? base_folder(o, folder) : NULL;
        if (folder && same_folder(dir, folder)) {
            warn("--output_dir %s is --%s: the model there will be replaced", dir, flag);
        } else if (base && same_folder(dir, base)) {
            warn("--output_dir %s is the base of the adapter --%s %s: the adapter will then stand "
                 "on other weights",
                 dir, flag, folder);
        }
    }
}

/* The folder for the result. One that holds a model cannot take an adapter too, nor the other
 * way round: which of them is meant? */
static void open_output_dir(struct Options *o) {
    const char *dir = o->train.output_dir;
    bool adapter = o->model->adapter.r > 0;
    make_folder(dir);
    /* with both files there a reader would take the folder for whichever it looks for first */
    CHECK(!file_exists(arena_printf(&o->arena, "%s/%s", dir,
                                    adapter ? "config.json" : "adapter_config.json")),
          "--output_dir %s: holds %s already; choose another folder for %s", dir,
          adapter ? "a model" : "an adapter", adapter ? "the adapter" : "the model");
    note_replaced(o, dir);
}

static void save_result(struct Options *o, const struct TrainerState *state) {
    model_replace(o->model, o->train.output_dir, o->tok);
    say("saved to %s\n", o->train.output_dir);
    trainer_state_save(state, &o->train, o->train.output_dir);

    /* The report: what was done, in words, and a page that shows it beside the log. */
    const char *data = arena_printf(&o->arena, "%s: %zu rows%s%s", o->data->path, o->data->n,
                                    o->eval ? "; held out: " : "", o->eval ? o->eval->path : "");
    struct Output out =
        report_begin(o->train.output_dir, o->command, data, o->model, seconds_now() - o->begin);
    fputs("}}\n", out.file);
    output_close(&out);
    report_write(o->train.output_dir);
    way_on[0] = 0; /* nothing is left to go on with */
    CHECK(!interrupted, "interrupted after the last step; the model is saved in %s%s",
          o->train.output_dir, o->eval ? ", its last evaluation may be missing (align eval)" : "");
}

/* Trains, evaluates, saves: what every training command ends with. */
static void finish_training(struct Options *o, struct Trainer *trainer) {
    open_output_dir(o);
    trainer_train(trainer);
    if (trainer->task.eval_n
        && !(o->train.eval_steps && trainer->state.global_step % o->train.eval_steps == 0))
        trainer_evaluate(trainer);
    save_result(o, &trainer->state);
    trainer_free(trainer);
}

/* Each row's text as ids, with the end token behind it unless that is NULL; of a longer text the
 * first `longest`. */
static struct Example *encode_texts(struct Options *o, const struct Dataset *data,
                                    const int *end_token, size_t longest) {
    if (!data)
        return NULL;
    struct Example *texts = arena_alloc(&o->arena, data->n, sizeof *texts);
    size_t cut = 0;
    for (size_t i = 0; i < data->n; i++) {
        texts[i] = example_encode(&o->arena, o->tok, data->rows[i].text,
                                  o->model->config.vocab_size, end_token);
        cut += texts[i].n > longest;
        texts[i].n = MIN(texts[i].n, longest);
    }
    /* once for all of them, not a line for each */
    if (cut)
        warn("%s: %zu of %zu texts are longer than %zu tokens; their first %zu are read",
             data->path, cut, data->n, longest, longest);
    return texts;
}

static void command_pretrain(struct Options *o) {
    need(o, "dataset_name, output_dir");
    /* 1. A new model of the sizes that the flags say, or one that is trained further. */
    o->config.bos_token_id = endoftext_id(o->config.vocab_size);
    o->config.eos_token_id = o->config.pad_token_id = o->config.bos_token_id;
    config_check(&o->config, "command line");
    load_tokenizer(o);
    o->model = o->model_name_or_path ? load_model(o, o->model_name_or_path) : gpt2_new(o->config);
    if (!o->model_name_or_path)
        gpt2_init(o->model, o->train.seed);
    leave_out_reward_head(o->model);
    leave_out_value_head(o->model);

    /* 2. Rows must fit its context. 1024 is the flag's default: not what the user asked for. */
    size_t n_positions = o->model->config.n_positions;
    CHECK(o->train.max_length <= n_positions || o->train.max_length == 1024,
          "--max_length %zu is longer than the model's context of %zu (--n_positions)",
          o->train.max_length, n_positions);

    /* 3. Texts, joined by end tokens and cut into rows. */
    struct Trainer trainer = open_training(o, TEXT_SHAPES, 1);
    const int *end_token = &o->model->config.eos_token_id;
    struct Example *texts = encode_texts(o, o->data, end_token, SIZE_MAX);
    struct Example *eval_texts = encode_texts(o, o->eval, end_token, SIZE_MAX);
    struct LanguageTask *task =
        pretrain_task(&trainer, &o->arena, texts, o->data->n, eval_texts, o->eval ? o->eval->n : 0);
    finish_training(o, &trainer);
    arena_free(&task->rows);
}

static void command_sft(struct Options *o) {
    need(o, "model_name_or_path, dataset_name, output_dir");
    struct Trainer trainer = open_training(o, SFT_SHAPES, COUNT(SFT_SHAPES));
    leave_out_reward_head(o->model);
    leave_out_value_head(o->model);
    sft_task(&trainer, &o->arena, o->data, o->eval);
    finish_training(o, &trainer);
}

static void command_reward(struct Options *o) {
    bool classifier = choice("loss_type", o->loss_type, "sigmoid, bce") == 1;
    need(o, "model_name_or_path, dataset_name, output_dir");
    struct Trainer trainer = open_training(o, classifier ? LABELLED_SHAPES : REWARD_SHAPES,
                                           classifier ? 1 : COUNT(REWARD_SHAPES));
    struct Rng rng = rng_seed(o->train.seed, STREAM_INIT);
    leave_out_value_head(o->model);
    if (!o->model->score.n)
        tensor_normal(reward_head_declare(o->model), &rng, 0.02);
    reward_task(&trainer, &o->arena, o->data, o->eval)->center = o->center_rewards_coefficient;
    finish_training(o, &trainer);
}

/* --loss_type "sigmoid sft" --loss_weights "1 0.2" into weights. */
static void parse_loss_types(struct Options *o) {
    const char *type = o->loss_type;
    const char *weight = o->loss_weights;
    double total = 0;
    for (size_t length; (length = next_name(&type)) > 0; type += length) {
        /* the order of enum DPOLossType */
        size_t k = choice("loss_type", text_copy(&o->arena, (struct Text){type, length}).data,
                          "sigmoid, ipo, hinge, robust, sft");
        char *end = NULL;
        o->dpo.weight[k] = weight ? strtod(weight + strspn(weight, " ,"), &end) : 1;
        /* a weight that is none or out of range leaves a rest, as one too many does: see below */
        if (weight)
            weight =
                end > weight && o->dpo.weight[k] >= 0 && o->dpo.weight[k] <= FLT_MAX ? end : "x";
        total += o->dpo.weight[k];
    }
    if (weight && weight[strspn(weight, " ,")])
        die_usage("--loss_weights \"%s\": a number, 0 or more, for each of --loss_type's names was "
                  "expected",
                  o->loss_weights);
    if (total == 0)
        die_usage("--loss_type \"%s\" --loss_weights \"%s\": no loss counts; nothing would be "
                  "learnt",
                  o->loss_type, o->loss_weights ? o->loss_weights : "");
}

static void command_dpo(struct Options *o) {
    parse_loss_types(o);
    CHECK(o->dpo.label_smoothing < 0.5,
          "--label_smoothing %g: a share of mislabelled pairs, from 0 to below 0.5",
          o->dpo.label_smoothing);
    need(o, "model_name_or_path, dataset_name, output_dir");
    struct Trainer trainer = open_training(o, DPO_SHAPES, 1);
    leave_out_reward_head(o->model);
    leave_out_value_head(o->model);

    /* 1. pi_ref is where the policy starts from, unless --ref_model says otherwise. */
    load_reference(o);

    /* 2. Pairs as ids, chosen and rejected in turn; those held out likewise, with room for the
     *    reference's log-probabilities. */
    struct Example *pairs = arena_alloc(&o->arena, 2 * o->data->n, sizeof *pairs);
    size_t n = dpo_pairs(&trainer, &o->arena, o->data, &o->dpo, pairs);
    struct DPOTask *task =
        dpo_task(&trainer, &o->arena, o->reference, o->dpo, o->generation.temperature, pairs, n);
    if (o->eval) {
        task->pairs[1] = arena_alloc(&o->arena, 2 * o->eval->n, sizeof *pairs);
        trainer.task.eval_n = dpo_pairs(&trainer, &o->arena, o->eval, &o->dpo, task->pairs[1]);
        task->ref_logps[1] = arena_zeros(&o->arena, 2 * trainer.task.eval_n, sizeof(double));
    }
    finish_training(o, &trainer);
}

/* Prompts to answer: rows with a prompt whole, texts cut to their first tokens by a LengthSampler.
 */
static size_t encode_prompts(struct Options *o, struct Example *prompts) {
    const struct Dataset *data = o->data;
    struct Rng rng = rng_seed(o->train.seed, STREAM_LENGTH);
    size_t count = 0;
    size_t empty = 0;
    size_t longest = o->model->config.n_positions - 1;
    for (size_t i = 0; i < data->n && (!o->max_samples || count < o->max_samples); i++) {
        bool whole = data->shape == SHAPE_PROMPT; /* else a text, of which the beginning is taken */
        struct Example e =
            example_encode(&o->arena, o->tok, whole ? data->rows[i].prompt : data->rows[i].text,
                           o->model->config.vocab_size, NULL);
        /* A number is drawn for an empty text too: the lengths stay those of their rows. */
        size_t drawn = whole ? e.n : length_sampler(&o->input_length, &rng);
        size_t length = MIN(e.n, drawn);
        CHECK(length <= longest,
              "%s: prompt %zu has %zu tokens; with a context of %zu at most %zu leave room for an "
              "answer",
              data->path, i + 1, length, o->model->config.n_positions, longest);
        if (length > 0)
            prompts[count++] = (struct Example){e.ids, length, length};
        else
            empty++;
    }
    CHECK(count > 0, "%s: every prompt is empty", data->path);
    if (empty) {
        warn("%s: %zu of %zu rows have no text to take a prompt from and are left out", data->path,
             empty, count + empty);
    }
    return count;
}

/* Where rollouts come from: prompts of the data set, answers of the model, rewards of the reward
 * model. */
static struct RolloutSource open_rollouts(struct Options *o) {
    const struct LengthSampler *in = &o->input_length;
    const struct LengthSampler *out = &o->output_length;
    CHECK(out->max_value > out->min_value,
          "--output_max_length %zu: more than --output_min_length, %zu, was expected",
          out->max_value, out->min_value);
    CHECK(in->max_value > in->min_value,
          "--input_max_text_length %zu: more than --input_min_text_length, %zu, was expected",
          in->max_value, in->min_value);

    /* 1. Random numbers for each purpose; rollouts are sampled, whatever --do_sample would say. */
    struct RolloutSource source = {
        .shuffle = rng_seed(o->train.seed, STREAM_ORDER + 100),
        .lengths = rng_seed(o->train.seed, STREAM_LENGTH + 100),
        .sample = rng_seed(o->train.seed, STREAM_SAMPLE),
        .output_length = o->output_length,
        .generation = o->generation,
    };
    source.generation.do_sample = true;

    /* 2. The judge. collect asks a person where there is none. */
    if (o->reward_model_path)
        o->reward_model = load_model(o, o->reward_model_path);
    if (o->reward_model)
        check_reward_model(o->reward_model, o->reward_model_path);
    source.scorer = (struct Scorer){.reward_model = o->reward_model, .tok = o->tok, .std = 1};

    /* 3. Prompts, and how many tokens the longest of them leaves of the context. */
    open_data(o, PROMPT_SHAPES, COUNT(PROMPT_SHAPES));
    if (o->data->shape == SHAPE_PROMPT)
        note_idle(o, "input_min_text_length, input_max_text_length",
                  "the data set's prompts are taken whole");
    struct Example *prompts = arena_alloc(&o->arena, o->data->n, sizeof *prompts);
    source.n = source.at = encode_prompts(o, prompts);
    source.prompts = prompts;
    source.room = o->model->config.n_positions;
    source.order = arena_order(&o->arena, source.n);
    for (size_t i = 0; i < source.n; i++)
        source.room = MIN(source.room, o->model->config.n_positions - prompts[i].n);
    return source;
}

/* Says, once a command, that the context may end an answer sooner than the flag does. `room`: new
 * tokens that the longest prompt leaves. */
static void note_full_context(const struct Options *o, size_t room, size_t max_new,
                              const char *flag) {
    if (room >= max_new)
        return;
    warn("%s asks for up to %zu new tokens; after the longest prompt the model's context of %zu "
         "(n_positions) has room for %zu",
         flag, max_new, o->model->config.n_positions, room);
}

/* Trains by PPO or REINFORCE on rollouts, new or stored, and saves: max_steps, or one pass. */
static void train_on_rollouts(struct Options *o, const char *log_dir) {
    need(o, "model_name_or_path");
    if (!o->rollouts)
        need(o, "reward_model_path, dataset_name");
    need(o, "output_dir");

    /* 1. Policy, reference, and where the result goes: asked before hours of work, not after. */
    open_model(o, true);
    leave_out_reward_head(o->model);
    if (o->ppo.baseline != BASELINE_VALUE_HEAD)
        leave_out_value_head(o->model);
    load_reference(o);
    open_output_dir(o);

    /* 2. Rollouts: stored ones, or prompts and a judge. */
    struct RolloutSource source = {0};
    if (o->rollouts)
        source.replay = o->data = dataset_load(&o->arena, o->rollouts, ROLLOUT_SHAPES, 1);
    else
        source = open_rollouts(o);
    size_t max_new = o->output_length.max_value - 1;
    if (!o->rollouts)
        note_full_context(o, source.room, max_new, "--output_max_length");

    /* 3. As many steps as --max_steps says, else each prompt (or stored rollout) once. */
    struct PPOTrainer *ppo =
        ppo_trainer_new(o->model, o->reference, o->ppo, o->train, o->generation.temperature);
    size_t n = o->rollouts ? o->data->n : source.n;
    size_t pass = MAX((size_t)1, n * o->ppo.num_generations / o->ppo.batch_size);
    struct TrainerState state = {0};
    ppo->tok = o->tok;
    ppo_train(ppo, &source, o->train.max_steps ? o->train.max_steps : pass, log_dir, &state);
    o->train.per_device_train_batch_size = o->ppo.batch_size;
    save_result(o, &state);
    free(state.log_history);
    ppo_trainer_free(ppo);
}

static void command_ppo(struct Options *o) {
    struct PPOConfig *c = &o->ppo;
    c->mini_batch_size = MIN(c->mini_batch_size, c->batch_size);
    c->gradient_accumulation_steps = o->train.gradient_accumulation_steps;
    /* Every mini-batch must be full: a product of both flags is not formed, it could overflow. */
    size_t part = c->batch_size / c->gradient_accumulation_steps;
    bool divides =
        c->batch_size % c->gradient_accumulation_steps == 0 && part % c->mini_batch_size == 0;
    CHECK(divides,
          "--batch_size %zu must be a multiple of --mini_batch_size %zu times "
          "--gradient_accumulation_steps %zu",
          c->batch_size, c->mini_batch_size, c->gradient_accumulation_steps);
    train_on_rollouts(o, o->train.output_dir);
}

static void command_reinforce(struct Options *o) {
    size_t n = o->ppo.batch_size;
    size_t each = o->ppo.num_generations;
    o->ppo.baseline = (enum Baseline)choice("baseline", o->baseline, "none, mean, rloo");
    CHECK(n % each == 0, "--batch_size %zu must be a multiple of --num_generations %zu", n, each);
    CHECK(each > 1 || o->ppo.baseline != BASELINE_RLOO, "--baseline rloo needs other answers to "
                                                        "the same prompt: --num_generations 2 or "
                                                        "more");
    train_on_rollouts(o, NULL);
}

/* A prompt's ids, at most `longest`; of an empty one bos_token_id, as in transformers: nothing said
 * yet, start a text. GPT-2's bos token is its end token. */
static struct Example prompt_encode(struct Options *o, struct Text prompt, size_t number,
                                    size_t longest) {
    struct Example e = example_encode(&o->arena, o->tok, prompt, o->model->config.vocab_size, NULL);
    CHECK(e.n <= longest,
          "prompt %zu has %zu tokens, the model's context is %zu (n_positions); shorten it", number,
          e.n, o->model->config.n_positions);
    return e.n ? e : (struct Example){&o->model->config.bos_token_id, 1, 1};
}

/* What transformers writes into every generation_config.json, or takes where a setting is missing.
 * NAN: it is not written unless somebody chose it. */
static const struct {
    const char *name;
    double usual;
} GENERATION_SETTINGS[] = {
    {"do_sample", 0},
    {"temperature", 1},
    {"top_k", 50},
    {"top_p", 1},
    {"repetition_penalty", 1},
    {"num_beams", 1},
    {"length_penalty", 1},
    {"early_stopping", 0},
    {"no_repeat_ngram_size", 0},
    {"min_length", 0},
    {"min_new_tokens", 0},
    {"max_length", 20},
    {"max_new_tokens", 20},
    {"num_return_sequences", 1},
    {"eos_token_id", 0},
    {"suppress_tokens", NAN},
    {"min_p", NAN},
    {"begin_suppress_tokens", NAN},
    {"bad_words_ids", NAN},
    {"forced_bos_token_id", NAN},
    {"forced_eos_token_id", NAN},
    {"typical_p", 1},
    {"stop_strings", NAN},
};

/* transformers takes its defaults from generation_config.json; here flags say all. A file that says
 * more than transformers writes for every model is named, so that nobody waits for what it says.
 *                                                                   test: docs/check_failures.py */
static void note_generation_config(struct Options *o) {
    const char *path = arena_printf(&o->arena, "%s/generation_config.json", o->model_name_or_path);
    const char *said = "";
    if (!file_exists(path))
        return;
    const struct Json *config = json_object(&o->arena, read_file(&o->arena, path), path, "");
    for (size_t i = 0; i < COUNT(GENERATION_SETTINGS); i++) {
        const char *name = GENERATION_SETTINGS[i].name;
        const struct Json *value = json_get(config, name);
        if (!value || value->type == JSON_NULL)
            continue;
        /* the end token is config.json's, and every model has its own */
        bool is_end = strcmp(name, "eos_token_id") == 0;
        double usual = is_end ? o->model->config.eos_token_id : GENERATION_SETTINGS[i].usual;
        double number = value->type == JSON_FALSE    ? 0
                        : value->type == JSON_NUMBER ? value->number
                                                     : NAN;
        /* NaN equals nothing: a list, a string or `true` is always named */
        if (number == usual)
            continue;
        said = arena_printf(&o->arena, "%s%s%s", said, *said ? ", " : "", name);
    }
    if (*said)
        warn("%s: %s: not read; say by flags what generate is to do", path, said);
}

/* A prompt's continuations as a line of JSON: the new ids and the new text of each. */
static void print_generation_json(struct Options *o, struct Text prompt, const struct Sequence *s,
                                  size_t n) {
    json_write_string(stdout, "{\"prompt\": ", prompt);
    for (size_t i = 0; i < n; i++)
        json_write_ids(stdout, i ? ", " : ", \"sequences\": [", s[i].ids + s[i].prompt_length,
                       s[i].n - s[i].prompt_length);
    for (size_t i = 0; i < n; i++) {
        struct Text text =
            tokenizer_decode_all(o->tok, &o->arena, s[i].ids + s[i].prompt_length,
                                 s[i].n - s[i].prompt_length, o->model->config.vocab_size);
        json_write_string(stdout, i ? ", " : "], \"texts\": [", text);
    }
    puts("]}");
}

/* Each continuation behind its prompt, as a person reads it: without the end token, and without
 * the bos token that stands for an empty prompt. */
static void print_generation(struct Options *o, struct Text prompt, const struct Sequence *s,
                             size_t n) {
    const struct GPT2Config *config = &o->model->config;
    for (size_t i = 0; i < n; i++) {
        bool ended = s[i].n > s[i].prompt_length && s[i].ids[s[i].n - 1] == config->eos_token_id;
        size_t first = prompt.length == 0;
        struct Text text = tokenizer_decode_all(o->tok, &o->arena, s[i].ids + first,
                                                s[i].n - ended - first, config->vocab_size);
        text = text_shown(&o->arena, text, "\n\t");
        fwrite(text.data, 1, text.length, stdout);
        puts("");
    }
}

static void command_generate(struct Options *o) {
    struct GenerationConfig *g = &o->generation;
    size_t each = g->num_return_sequences;
    CHECK(each == 1 || g->do_sample || g->num_beams > 1,
          "--num_return_sequences %zu: without --do_sample or --num_beams all of them would be the "
          "same",
          each);
    CHECK(g->num_beams == 1 || each <= g->num_beams,
          "--num_return_sequences %zu: %zu beams give at most as many", each, g->num_beams);
    need(o, "model_name_or_path");
    if (!o->prompt && !o->dataset_name)
        die_usage("--prompt, or --dataset_name, is needed; see --help");

    /* 1. The model, and one prompt or many. */
    open_model(o, false);
    leave_out_reward_head(o->model);
    CHECK(2 * g->num_beams <= MIN((size_t)256, o->model->config.vocab_size),
          "--num_beams %zu: 1 to 128 can be used", g->num_beams);
    struct Row typed = {.prompt = text_of(o->prompt ? o->prompt : "")};
    struct Dataset one = {.rows = &typed, .n = 1};
    if (!o->prompt)
        open_data(o, PROMPT_SHAPES, 1);
    const struct Dataset *data = o->data ? o->data : &one;

    /* 2. A sequence for each answer, with a random generator of its own: what is drawn for one
     *    does not depend on how the others go. */
    struct Sequence *sequences = arena_alloc(&o->arena, data->n * each, sizeof *sequences);
    struct Rng rng = rng_seed(o->train.seed, STREAM_SAMPLE);
    size_t room = o->model->config.n_positions;
    note_generation_config(o);
    for (size_t i = 0; i < data->n; i++) {
        struct Example e =
            prompt_encode(o, data->rows[i].prompt, i + 1, o->model->config.n_positions);
        room = MIN(room, o->model->config.n_positions + 1 - e.n);
        for (size_t k = 0; k < each; k++)
            sequences[i * each + k] =
                sequence_start(&o->arena, e.ids, e.n, g->max_new_tokens, o->model,
                               rng_seed(rng_next(&rng), STREAM_SAMPLE));
    }
    note_full_context(o, room, g->max_new_tokens, "--max_new_tokens");

    /* 3. All of them together: the weights are read once a token for all. */
    generate(o->model, sequences, data->n * each, g);
    for (size_t i = 0; i < data->n; i++) {
        if (o->json)
            print_generation_json(o, data->rows[i].prompt, &sequences[i * each], each);
        else
            print_generation(o, data->rows[i].prompt, &sequences[i * each], each);
    }
}

/* The distribution of the next token after a prompt. [glossary: Distribuição (em ML)] */
static void command_next(struct Options *o) {
    need(o, "model_name_or_path, prompt");
    open_model(o, false);
    leave_out_reward_head(o->model);
    struct Arena *arena = &o->arena;
    struct GPT2 *model = o->model;
    size_t V = model->config.vocab_size;
    size_t kept = 0;

    /* 1. The logits after the prompt's last token. */
    struct Example e = prompt_encode(o, text_of(o->prompt), 1, model->config.n_positions);
    struct Batch batch = collate(arena, &e, 1, READ_LAST);
    struct Activations acts = gpt2_forward(model, arena, &batch, false);
    float *p = arena_floats(arena, V);
    output_logits(model, p, acts.ln_f + (e.n - 1) * model->config.n_embd, 1);
    check_numbers(model, arena, &batch, "a logit of the next token", p, V);

    /* 2. What sampling would do to them, and the probabilities that are left. */
    o->generation.do_sample = true;
    process_logits(p, V, &o->generation, e.ids, e.n, 0, model->config.eos_token_id);
    double entropy = entropy_of_logits(p, log_sum_exp(p, V, arena_floats(arena, V)), V);
    softmax(p, V);

    /* 3. The kept ones, the likeliest first. */
    struct Candidate *top = arena_alloc(arena, V, sizeof *top);
    for (size_t v = 0; v < V; v++)
        if (p[v] > 0)
            top[kept++] = (struct Candidate){p[v], (int)v};
    qsort(top, kept, sizeof *top, compare_candidates_down);
    if (o->json)
        json_write_string(stdout, "{\"prompt\": ", text_of(o->prompt));
    if (o->json)
        printf(", \"kept\": %zu, \"top\": [", kept);
    else
        printf("   id  probability  token     (%zu of %zu tokens can follow; entropy %.3f nats)\n",
               kept, V, entropy);
    for (size_t i = 0; i < MIN(kept, o->top_n); i++) {
        printf(o->json ? "%s[%d, %.9g]" : "%s%5d  %11.6f  ",
               i == 0    ? ""
               : o->json ? ", "
                         : "\n",
               top[i].id, top[i].logit);
        if (!o->json)
            json_write_string(stdout, "", tokenizer_decode(o->tok, top[i].id, V));
    }
    puts(o->json ? "]}" : "");
}

/* A line of logprob: a text's ids, each one's log-probability but the first's, which nothing comes
 * before, and their sum over the completion; with --ref_model KL(model || reference) of the next
 * token at each position. */
static void print_logprob(struct Options *o, struct Arena *arena, const struct Example *e) {
    /* 1. A text without tokens has nothing to say. */
    if (e->n == 0) {
        printf("{\"input_ids\": [], \"token_logprobs\": [], \"logprob\": 0%s}\n",
               o->reference ? ", \"kl_to_ref_per_position\": []" : "");
        return;
    }

    /* 2. All positions predict. The last one has no target; its log-probability is not shown,
     *    but its distribution counts for the KL. */
    struct Batch batch = collate(arena, e, 1, READ_LAST);
    batch.R = e->n;
    for (size_t t = 0; t < e->n; t++) {
        batch.row[t] = (int)t;
        batch.target[t] = t + 1 < e->n ? e->ids[t + 1] : 0;
    }
    struct LMHead head = batch_logprobs(o->model, arena, &batch, 1, false);

    /* 3. Position t predicts token t + 1: the completion begins one before its first token. */
    size_t first = MAX((size_t)1, e->prompt_length) - 1;
    size_t scored = e->n > first + 1 ? e->n - 1 - first : 0;
    json_write_ids(stdout, "{\"input_ids\": ", e->ids, e->n);
    json_write_floats(stdout, ", \"token_logprobs\": ", head.logprob, e->n - 1);
    printf(", \"logprob\": %s", json_number_text(sequence_logprob(head.logprob + first, scored)));
    if (o->reference) {
        struct LMHead ref_head = batch_logprobs(o->reference, arena, &batch, 1, false);
        float *kl = arena_floats(arena, e->n);
        kl_full_rows(o->model, &head, o->reference, &ref_head, kl);
        json_write_floats(stdout, ", \"kl_to_ref_per_position\": ", kl, e->n);
    }
    fputs("}\n", stdout);
}

static void command_logprob(struct Options *o) {
    struct Arena arena = {0};
    need(o, "model_name_or_path, dataset_name");
    open_model(o, false);
    leave_out_reward_head(o->model);
    if (o->ref_model)
        load_reference(o);
    open_data(o, SFT_SHAPES, COUNT(SFT_SHAPES));
    const struct Dataset *data = o->data;
    size_t V = o->model->config.vocab_size;
    size_t cut = 0;
    /* what both models can read */
    size_t limit = MIN(o->train.max_length, o->model->config.n_positions);
    if (o->reference)
        limit = MIN(limit, o->reference->config.n_positions);
    for (size_t i = 0; i < data->n; i++) {
        const struct Row *row = &data->rows[i];
        arena_reset(&arena);
        struct Example e =
            data->shape == SHAPE_TEXT
                ? example_encode(&arena, o->tok, row->text, V, NULL)
                : example_prompt_completion(&arena, o->tok, row->prompt, row->completion, V, NULL);
        if (e.n > limit && !cut++)
            warn("%s: row %zu and perhaps others are longer than %zu tokens; their first %zu are "
                 "used",
                 data->path, i + 1, limit, limit);
        e.n = MIN(e.n, limit);
        e.prompt_length = MIN(e.prompt_length, e.n);
        print_logprob(o, &arena, &e);
    }
    arena_free(&arena);
}

/* What the course's sentiment pipeline says of each text. */
static void command_score(struct Options *o) {
    need(o, "model_name_or_path, dataset_name");
    open_model(o, false);
    check_reward_model(o->model, o->peft_adapter ? o->peft_adapter : o->model_name_or_path);
    open_data(o, TEXT_SHAPES, 1);
    /* the reward is read at the last token: no end token stands behind it */
    struct Example *texts =
        encode_texts(o, o->data, NULL, MIN(o->train.max_length, o->model->config.n_positions));
    float *reward = arena_floats(&o->arena, o->data->n);
    reward_score(o->model, texts, o->data->n, reward);
    for (size_t i = 0; i < o->data->n; i++) {
        json_write_string(stdout, "{\"text\": ", o->data->rows[i].text);
        printf(", \"reward\": %s, \"pipe_outputs\": ", json_number_text(reward[i]));
        write_pipe_outputs(stdout, reward[i]);
        fputs("}\n", stdout);
    }
}

/* Adds pairs to preferences.jsonl. They are on the disk before the next are asked for: a person's
 * work must not be lost. The file is written anew as a whole, so that it never ends in half a line.
 */
static void preferences_add(struct Options *o, const char *path, const struct Example *pairs,
                            size_t n) {
    struct Arena arena = {0};
    size_t V = o->model->config.vocab_size;
    /* 1. what was there */
    struct Text before = file_exists(path) ? read_file(&arena, path) : text_of("");
    struct Output out = output_open(o->train.output_dir, "preferences.jsonl");
    fwrite(before.data, 1, before.length, out.file);
    /* 2. the new ones: chosen and rejected in turn */
    for (const struct Example *chosen = pairs; chosen < pairs + 2 * n; chosen += 2) {
        json_write_string(out.file, "{\"prompt\": ",
                          tokenizer_decode_all(o->tok, &arena, chosen->ids, chosen->prompt_length,
                                               V));
        json_write_string(out.file,
                          ", \"chosen\": ", answer_text(o->tok, &arena, chosen, &o->model->config));
        json_write_string(out.file, ", \"rejected\": ",
                          answer_text(o->tok, &arena, chosen + 1, &o->model->config));
        fputs("}\n", out.file);
    }
    output_close(&out);
    arena_free(&arena);
}

/* Shows two answers and waits for a word: '1', '2', 's' (skip; equal ones are) or 'q' (stop; so
 * does the end of the input). */
static int ask_person(struct Options *o, const struct Example *answers, size_t number, size_t of) {
    char line[256];
    const struct GPT2Config *config = &o->model->config;
    size_t V = config->vocab_size;
    size_t n = answers->prompt_length;
    struct Text prompt = tokenizer_decode_all(o->tok, &o->arena, answers->ids, n, V);
    struct Text a = answer_text(o->tok, &o->arena, answers, config);
    struct Text b = answer_text(o->tok, &o->arena, answers + 1, config);
    /* between equal answers nobody can choose */
    if (same_answer(o->tok, &o->arena, answers, answers + 1, config))
        return 's';
    prompt = text_shown(&o->arena, prompt, "\n\t");
    a = text_shown(&o->arena, a, "\n\t");
    b = text_shown(&o->arena, b, "\n\t");
    fprintf(stderr, "\n%zu/%zu  %.*s ...\n  1: %.*s\n  2: %.*s\n", number, of, (int)prompt.length,
            prompt.data, (int)a.length, a.data, (int)b.length, b.data);
    for (;;) {
        fputs("Which is better? 1, 2, s to skip, q to stop: ", stderr);
        if (!fgets(line, sizeof line, stdin))
            return 'q';
        int c = tolower((unsigned char)line[strspn(line, " \t")]);
        if (c && strchr("12sq", c))
            return c;
    }
}

/* `collect` at work. In its folder judged.json holds the prompts that were judged, whether or not
 * they gave a pair, and how many of the pairs in preferences.jsonl came of them. Pairs are written
 * first: what a run that was killed wrote behind those is looked up before it is judged again. */
struct Collection {
    struct RolloutSource source;
    const char *path; /* of preferences.jsonl */
    struct Text *judged; /* prompts as they are shown, as often as they were judged */
    bool *passed_over; /* already taken for one of the data set's prompts */
    size_t judged_n, earlier; /* earlier: those of the runs before */
    size_t pairs, added; /* that they gave; that this run added */
    struct Rng rng;
    bool stop; /* enough for today */
};

/* Without preferences.jsonl a run begins anew; without judged.json, which older versions did not
 * write, every pair's prompt has been judged. */
static void judged_read(struct Options *o, struct Collection *c) {
    const struct Dataset *pairs = o->eval;
    const char *path = arena_printf(&o->arena, "%s/judged.json", o->train.output_dir);
    /* 1. From judged.json, or from the pairs themselves. */
    bool goes_on = file_exists(c->path) && file_exists(path);
    struct Json *json = goes_on ? json_read_file(&o->arena, path) : NULL;
    struct Json *list = json_get(json, "prompts");
    CHECK(!json || (list && list->type == JSON_ARRAY),
          "%s: a list \"prompts\" was expected; without this file every prompt in %s counts as "
          "judged",
          path, c->path);
    c->earlier = c->judged_n = json ? (size_t)list->number : pairs ? pairs->n : 0;
    c->judged = arena_alloc(&o->arena, c->earlier + c->source.n, sizeof *c->judged);
    c->passed_over = arena_zeros(&o->arena, c->earlier + 1, 1);
    c->pairs =
        json ? json_size(json_get(json, "pairs"), SIZE_MAX >> 12, path, "pairs") : c->earlier;

    /* 2. As they are shown: characters that a terminal cannot show make no difference. */
    struct Json *item = json ? list->child : NULL;
    for (size_t i = 0; i < c->earlier; i++, item = item ? item->next : NULL)
        c->judged[i] = text_shown(&o->arena, item ? item->string : pairs->rows[i].prompt, "");
}

static bool judged_before(struct Collection *c, struct Text prompt) {
    for (size_t k = 0; k < c->earlier; k++)
        if (!c->passed_over[k] && text_equal(c->judged[k], prompt))
            return c->passed_over[k] = true;
    return false;
}

static void judged_write(const struct Options *o, const struct Collection *c) {
    struct Output out = output_open(o->train.output_dir, "judged.json");
    fprintf(out.file, "{\"pairs\": %zu, \"prompts\": [", c->pairs);
    for (size_t i = 0; i < c->judged_n; i++)
        json_write_string(out.file, i ? ",\n" : "\n", c->judged[i]);
    fputs("]}\n", out.file);
    output_close(&out);
}

/* Whether a run that was killed before it could say so has written this pair already, whichever
 * side was chosen. */
static bool pair_written(struct Options *o, const struct Collection *c,
                         const struct Example *pair) {
    const struct GPT2Config *config = &o->model->config;
    size_t n = o->eval ? o->eval->n : 0;
    struct Text a = text_shown(&o->arena, answer_text(o->tok, &o->arena, pair, config), "");
    struct Text b = text_shown(&o->arena, answer_text(o->tok, &o->arena, pair + 1, config), "");
    /* The first c->pairs of the file are of prompts that judged.json names. */
    for (size_t i = c->pairs; i < n; i++) {
        struct Text chosen = text_shown(&o->arena, o->eval->rows[i].chosen, "");
        struct Text rejected = text_shown(&o->arena, o->eval->rows[i].rejected, "");
        bool same = text_equal(a, chosen) && text_equal(b, rejected);
        bool turned = text_equal(a, rejected) && text_equal(b, chosen);
        if (same || turned)
            return true;
    }
    return false;
}

/* The reward model judges `n` prompts. */
static void collect_scored(struct Options *o, struct Collection *c, const struct Example *prompts,
                           size_t n) {
    struct Example *pairs = arena_alloc(&o->arena, 2 * n, sizeof *pairs);
    size_t added = 0;
    size_t each = o->ppo.num_generations;
    size_t count = collect_preferences(o->model, &c->source.scorer, &o->arena, prompts, n, each,
                                       false, &c->source.generation, &c->rng, pairs);
    /* those that are in the file already count, but are not written again */
    for (size_t i = 0; i < count; i++) {
        if (pair_written(o, c, pairs + 2 * i))
            continue;
        memmove(pairs + 2 * added++, pairs + 2 * i, 2 * sizeof *pairs);
    }
    preferences_add(o, c->path, pairs, added);
    c->pairs += count;
    c->added += added;
}

/* A person judges the answers to one prompt, two at a time. */
static void collect_asked(struct Options *o, struct Collection *c, const struct Example *prompt,
                          size_t number, size_t of) {
    size_t each = o->ppo.num_generations;
    size_t pairs = 0;
    const struct Example *answers =
        sample_answers(o->model, &o->arena, prompt, 1, each, &c->source.generation, &c->rng);
    /* one with two, three with four: an answer that has none beside it is left out */
    for (size_t k = 0; k + 1 < each && !c->stop; k += 2) {
        bool written = pair_written(o, c, answers + k);
        int word = written ? 's' : ask_person(o, answers + k, number, of);
        c->stop = word == 'q';
        pairs += written || word == '1' || word == '2';
        if (word != '1' && word != '2')
            continue;
        struct Example pair[] = {answers[k + (word == '2')], answers[k + (word == '1')]};
        preferences_add(o, c->path, pair, 1);
        c->added++;
    }
    /* A prompt that was broken off is asked again; what it gave is then found by pair_written. */
    if (!c->stop)
        c->pairs += pairs;
}

/* Which of the prompts are still to be judged. shown (n), out: each prompt as a person sees it. */
static bool *collect_wanted(struct Options *o, struct Collection *c, struct Text *shown) {
    bool *wanted = arena_zeros(&o->arena, c->source.n, 1);
    for (size_t i = 0; i < c->source.n; i++) {
        const struct Example *e = &c->source.prompts[i];
        struct Text text =
            tokenizer_decode_all(o->tok, &o->arena, e->ids, e->n, o->model->config.vocab_size);
        shown[i] = text_shown(&o->arena, text, "");
        wanted[i] = !judged_before(c, shown[i]);
    }
    return wanted;
}

/* Has all `wanted` prompts judged: by the reward model in groups, by a person one by one. */
static void collect_all(struct Options *o, struct Collection *c, const struct Text *shown,
                        const bool *wanted) {
    enum { TOGETHER = 64 }; /* prompts: the same groups wherever an earlier run was stopped */
    size_t n = c->source.n;
    size_t each = o->ppo.num_generations;
    size_t left = 0;
    size_t asked = 0;
    size_t drawn = 0;
    for (size_t i = 0; i < n; i++)
        left += wanted[i];
    c->rng = c->source.sample;
    for (size_t i = 0, end; i < n && !c->stop; i = end) {
        /* 1. the next prompts that are wanted */
        end = i + 1;
        if (!wanted[i])
            continue;
        while (o->reward_model && end < n && end % TOGETHER && wanted[end])
            end++;

        /* 2. Each answer takes one random number. Those of the prompts that are passed over are
         *    drawn as well: this prompt's are what they would have been in one run. */
        for (; drawn < i * each; drawn++)
            rng_next(&c->rng);
        drawn = end * each;
        if (o->reward_model)
            collect_scored(o, c, c->source.prompts + i, end - i);
        else
            collect_asked(o, c, c->source.prompts + i, ++asked, left);

        /* 3. Pairs first, then the note that these prompts are done: see struct Collection. */
        if (c->stop)
            break;
        for (size_t k = i; k < end; k++)
            c->judged[c->judged_n++] = shown[k];
        judged_write(o, c);
    }
}

/* align collect -- data collection, the H in RLHF: a reward model or the person at the keyboard
 * compares answers, and their judgements are added to preferences.jsonl. A run that was stopped
 * goes on: what was judged is passed over, and every prompt's random numbers follow from its place
 * in the data set, so that the pairs are those of one run.  [glossary: Coleta de dados]
 *                                                             test: cli_collect, collect_resume */
static void command_collect(struct Options *o) {
    size_t each = o->ppo.num_generations;
    CHECK(each >= 2, "--num_generations %zu: 2 or more answers are needed to compare", each);
    need(o, "model_name_or_path, dataset_name, output_dir");
    open_model(o, false);
    leave_out_reward_head(o->model);
    struct Collection c = {.source = open_rollouts(o)};
    c.path = arena_printf(&o->arena, "%s/preferences.jsonl", o->train.output_dir);
    note_full_context(o, c.source.room, c.source.generation.max_new_tokens, "--max_new_tokens");
    make_folder(o->train.output_dir);

    /* 1. What earlier runs left. The file is there from the start, if only empty. */
    bool any = file_exists(c.path) && read_file(&o->arena, c.path).length > 0;
    if (any)
        o->eval = dataset_load(&o->arena, c.path, DPO_SHAPES, 1);
    judged_read(o, &c);
    if (!any)
        preferences_add(o, c.path, NULL, 0);

    /* 2. What is still to be judged. */
    struct Text *shown = arena_alloc(&o->arena, c.source.n, sizeof *shown);
    const bool *wanted = collect_wanted(o, &c, shown);
    collect_all(o, &c, shown, wanted);
    say("%zu pairs added to %s (%zu were there)\n", c.added, c.path, o->eval ? o->eval->n : 0);
}

/* align eval -- one JSON object. With --reward_model_path: what a policy's answers are worth,
 * its distance from --ref_model, how varied and long they are. With a reward head: how well it
 * orders pairs, rated or labelled texts. Else the mean negative log-likelihood a token, and its
 * exponential: perplexity, the number of equally likely tokens that would leave as much doubt. */
static void command_eval(struct Options *o) {
    struct LogEntry entry = {0};
    struct Trainer trainer = {0};
    need(o, "model_name_or_path, dataset_name");
    open_model(o, false);
    if (o->reward_model_path) {
        /* 1. A policy: its answers are what is measured. */
        leave_out_reward_head(o->model);
        if (o->ref_model)
            load_reference(o);
        struct RolloutSource source = open_rollouts(o);
        struct PolicyResult result =
            policy_measure(o->model, o->reference, &source.scorer, &o->arena, source.prompts,
                           source.n, &source.generation, o->train.seed);
        log_value(&entry, "reward", result.mean_reward);
        log_value(&entry, "reward_std", sqrt(unbiased_variance(result.reward, source.n)));
        log_value(&entry, "distinct_2", result.distinct_2);
        log_value(&entry, "mean_length", result.mean_length);
        log_value(&entry, "samples", (double)source.n);
        if (o->reference)
            log_value(&entry, "kl", result.kl);
    } else if (o->model->score.n) {
        /* 2. A reward model: as in training, on the data set as if it were held out. */
        trainer = open_training(o, REWARD_SHAPES, COUNT(REWARD_SHAPES));
        reward_task(&trainer, &o->arena, o->data, o->data);
        entry = trainer_measure(&trainer);
    } else {
        /* 3. A language model: the loss of the tokens that sft would train on. */
        trainer = open_training(o, SFT_SHAPES, COUNT(SFT_SHAPES));
        struct LanguageTask *task = sft_task(&trainer, &o->arena, o->data, NULL);
        double loss;
        double tokens = 0;
        task->eval_examples = task->examples;
        trainer.task.eval_n = trainer.task.n;
        struct LogEntry measured = trainer_measure(&trainer);
        log_find(&measured, "eval_loss", &loss);
        for (size_t i = 0; i < trainer.task.n; i++) {
            const struct Example *e = &task->examples[i];
            tokens += (double)(e->n - MAX((size_t)1, e->prompt_length));
        }
        log_value(&entry, "eval_loss", loss);
        log_value(&entry, "perplexity", exp(loss));
        log_value(&entry, "tokens", tokens);
    }
    putchar('{');
    log_write(stdout, &entry, ", ");
    puts("}");
    trainer_free(&trainer);
}

static void command_merge(struct Options *o) {
    if (!o->model_name_or_path || !(o->peft_adapter || is_adapter(o->model_name_or_path)))
        die_usage("merge needs an adapter: --model_name_or_path BASE --peft_adapter DIR, or its "
                  "folder as --model_name_or_path");
    need(o, "output_dir");
    const char *base = base_folder(o, o->model_name_or_path);
    const char *dir = o->train.output_dir;
    CHECK(!base || !same_folder(base, dir),
          "--output_dir %s: is the adapter's base; merged over "
          "it, the adapter would count twice from then on; choose another folder",
          dir);
    open_model(o, false);
    open_output_dir(o);
    model_replace(o->model, o->train.output_dir, o->tok);
}

/* A term of docs/glossary.md: a heading, then a line for each label. */
static const char *const TERM_LABELS[] = {"### ",           "- Aliases: ",
                                          "- English: ",    "- Portugu\xc3\xaas: ",
                                          "- In align.c: ", "- Test: ",
                                          "- Try: ",        "- See also: "};

/* Text as it is compared: small letters without accents, one space for all else and at both
 * ends; the names of a term, which semicolons or a dot divide, keep a semicolon.  By hand:
 * "Otimização; Top-p" -> " otimizacao ; top p ".  test: glossary_fold */
static const char *fold(struct Arena *arena, const char *text) {
    /* U+00C0 to U+00DF; small letters are 32 further on */
    static const char latin[] = "aaaaaaaceeeeiiiidnooooo ouuuuyps";
    char *folded = arena_zeros(arena, 3 * strlen(text) + 3, 1);
    char *to = folded;
    *to++ = ' ';
    for (const char *c = text; *c; c++) {
        bool dot = strncmp(c, "\xc2\xb7", 2) == 0;
        bool accented = *c == '\xc3' && c[1];
        c += dot || accented;
        int letter = dot ? ';' : accented ? latin[*c & 31] : tolower((unsigned char)*c);
        if (isalnum(letter) || letter >= 0x80)
            *to++ = (char)letter;
        else if (to[-1] != ' ')
            *to++ = ' ';
        if (letter == ';')
            to += sprintf(to, "; ");
    }
    if (to[-1] != ' ')
        *to = ' ';
    return folded;
}

/* edit_distance -- how few insertions, deletions and exchanges of a letter turn a into b (of which
 * 63 bytes count): to guess what a mistyped word meant. Row i holds the distances of a's first i
 * letters from each beginning of b; a row follows from the one above it.
 * By hand: "pretrian", "pretrain": two exchanges, 2. */
static size_t edit_distance(const char *a, const char *b) {
    size_t n = MIN(strlen(b), (size_t)63);
    size_t row[64];
    /* from nothing to j letters: j insertions */
    for (size_t j = 0; j <= n; j++)
        row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            /* exchange (or keep) a letter, or the better of a deletion and an insertion */
            size_t change = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            row[j + 1] = MIN(change, MIN(row[j], row[j + 1]) + 1);
        }
    }
    return row[n];
}

/* Ends the program unless a term with all its lines begins at line[i]. */
static void term_check(char **line, size_t lines, size_t i, const char *path) {
    for (size_t k = 0; k < COUNT(TERM_LABELS); k++) {
        bool good = i + k < lines
                    && strncmp(line[i + k], TERM_LABELS[k], strlen(TERM_LABELS[k])) == 0
                    && (k > 0 || strstr(line[i], " \xc2\xb7 "));
        CHECK(good,
              "%s: a line \"%s\" was expected under \"%s\"; the file's head says how a term is "
              "written",
              path, k ? TERM_LABELS[k] : "### Portuguese \xc2\xb7 English", line[i]);
    }
}

/* How far a folded query is from a term, of which line[0] is the heading: 0 it is a name of the
 * term; 1 words of one; else 2 + the fewest edits that make it the words somewhere in one. */
static size_t term_rank(struct Arena *arena, char **line, const char *query) {
    const char *names =
        fold(arena, arena_printf(arena, ";%s;%s;", line[0] + 4, line[1] + strlen(TERM_LABELS[1])));
    if (strstr(names, query))
        return strstr(names, arena_printf(arena, ";%s;", query)) ? 0 : 1;
    size_t rank = SIZE_MAX;
    for (const char *word = names; (word = strchr(word, ' ')); word++) {
        const char *words = arena_printf(arena, "%.*s ", (int)strlen(query) - 1, word);
        rank = MIN(rank, 2 + edit_distance(query, words));
    }
    return rank;
}

/* align glossary [TERM] -- the entry of the term; of several that fit equally well their names;
 * without TERM all names. */
static void command_glossary(struct Options *o) {
    const char *path =
        shipped_file(&o->arena, "docs/glossary.md", "run align in the folder it came in");
    const char *query = fold(&o->arena, o->file ? o->file : "");
    struct Text file = read_file(&o->arena, path);
    char **line = arena_alloc(&o->arena, file.length + 2, sizeof *line);
    size_t *rank = arena_alloc(&o->arena, file.length + 2, sizeof *rank);
    size_t lines = 0;
    size_t best = SIZE_MAX;
    size_t hits = 0;
    for (char *at = strtok((char *)file.data, "\n"); at; at = strtok(NULL, "\n"))
        line[lines++] = at;

    /* 1. How well each term fits, and how many fit best. Lines that are no heading never do. */
    for (size_t i = 0; i < lines; i++) {
        rank[i] = SIZE_MAX;
        if (strncmp(line[i], "### ", 4) != 0)
            continue;
        term_check(line, lines, i, path);
        rank[i] = term_rank(&o->arena, line + i, query);
        hits = rank[i] < best ? 1 : hits + (rank[i] == best);
        best = MIN(best, rank[i]);
    }
    CHECK(hits > 0, "%s: the file has no term", path);

    /* 2. One hit is printed whole; of several, and without TERM, the names under their headings.
     *    A folded query that is empty is one space. */
    if (query[1] && (hits > 1 || best > 1))
        puts(best > 1 ? "no term has this name; the nearest:" : "several terms fit:");
    for (size_t i = 0; i < lines; i++) {
        if (!query[1] && strncmp(line[i], "## ", 3) == 0)
            puts(line[i] + 3);
        if (rank[i] == best)
            printf("%s%s\n", hits > 1 ? "  " : "", line[i] + 4);
        for (size_t k = 1; k < COUNT(TERM_LABELS) && rank[i] == best && hits == 1; k++)
            puts(line[i + k]);
    }
}

/* Sentences fit a context of 64 tokens; for whole reviews a longer one is worth its time.
 * [glossary: Conjunto de dados IMDB] */
static size_t course_positions(const struct Dataset *data) {
    size_t bytes = 0;
    for (size_t i = 0; i < data->n; i++)
        bytes += data->rows[i].text.length;
    /* a token is about 4 bytes */
    return bytes / data->n > 4 * COURSE_POSITIONS ? COURSE_LONG_POSITIONS : COURSE_POSITIONS;
}

/* The course's own model, new: small enough for minutes on a CPU. */
static struct GPT2 *course_new_model(const struct Dataset *data, uint64_t seed) {
    struct GPT2 *model = gpt2_new((struct GPT2Config){
        .vocab_size = COURSE_VOCAB,
        .n_positions = course_positions(data),
        .n_embd = COURSE_WIDTH,
        .n_layer = COURSE_LAYERS,
        .n_head = COURSE_HEADS,
        .bos_token_id = COURSE_VOCAB - 1,
        .eos_token_id = COURSE_VOCAB - 1,
        .pad_token_id = COURSE_VOCAB - 1,
        .layer_norm_epsilon = 1e-5f,
    });
    gpt2_init(model, seed);
    /* GPT-2's 0.02 suits its width of 768; at 128 the blocks would drown so faint a token. */
    struct Rng rng = rng_seed(seed, STREAM_INIT + 100);
    tensor_normal(&model->wte, &rng, 0.06);
    return model;
}

static void command_rlhf(struct Options *o) {
    struct Tokenizer *tok = load_tokenizer(o);
    const char *path = o->dataset_name ? o->dataset_name
                                       : shipped_file(&o->arena, "docs/reviews.jsonl",
                                                      "name data with --dataset_name");
    struct Dataset *data = o->data = dataset_load(&o->arena, path, RATED_SHAPES, 1);
    struct Course course = {
        .tok = tok,
        .command = o->command,
        .output_dir = o->train.output_dir,
        .seed = o->train.seed,
        .temperature = o->generation.temperature,
        .scale = 1,
        .tokenizer = o->tokenizer,
        .pretrain_steps = o->pretrain_steps,
        .reward_steps = o->reward_steps,
        .ppo_steps = o->ppo_steps,
        .dpo_steps = o->dpo_steps,
    };

    /* 1. A new model; or one that was trained before, which is only tuned on these texts, in
     *    smaller steps the wider it is. */
    struct GPT2 *model;
    double learning_rate = 5e-3;
    if (o->model_name_or_path) {
        model = load_model(o, o->model_name_or_path);
        leave_out_reward_head(model);
        leave_out_value_head(model);
        course.scale = MIN(1, (double)COURSE_WIDTH / (double)model->config.n_embd);
        learning_rate = 5e-4;
    } else {
        model = course_new_model(data, o->train.seed);
    }

    /* 2. What cannot work, before it takes a minute to find out. */
    CHECK(o->reward_steps > 0 || model->score.n, "--reward_steps 0: an untrained reward model "
                                                 "gives every text the same reward; 1 or more "
                                                 "steps are needed");
    static const char *const results[] = {"language_model", "reward_model", "ppo", "dpo"};
    for (size_t i = 0; i < COUNT(results); i++)
        note_replaced(o, arena_printf(&o->arena, "%s/%s", course.output_dir, results[i]));
    CHECK(model->config.n_positions >= 48, "%s: a context of %zu tokens; rlhf needs 48 or more",
          o->model_name_or_path, model->config.n_positions);
    course_run(&course, data, model, learning_rate);
}

static void command_report(struct Options *o) {
    if (!o->file)
        die_usage("report: which run? align report DIR, the --output_dir of one");
    report_write(o->file);
    say("%s/report.html is written; open it in a browser\n", o->file);
}

static void command_exact(struct Options *o) {
    const struct GPT2Config *c = &o->config;
    size_t L = o->generation.max_new_tokens;
    double count = pow((double)c->vocab_size, (double)L);
    /* All responses are enumerated, and each is a row of a batch: the world must be small. */
    CHECK(o->ppo.init_kl_coef >= 1e-3 && o->ppo.init_kl_coef <= 1e3,
          "--beta %g: must be above 0, 0.001 to 1000", o->ppo.init_kl_coef);
    CHECK(c->vocab_size >= 2 && c->vocab_size <= 16, "--vocab_size %zu: 2 to 16 tokens",
          c->vocab_size);
    CHECK(L > 0 && count <= EXACT_RESPONSES,
          "--max_new_tokens %zu: %zu tokens make %.6g responses of this length, 2 to %d can be "
          "enumerated; use a shorter one",
          L, c->vocab_size, count, EXACT_RESPONSES);
    CHECK(c->n_layer > 0 && c->n_layer <= 100 && c->n_head > 0 && c->n_embd > 0 && c->n_embd <= 4096
              && c->n_embd % c->n_head == 0,
          "--n_embd %zu must be a multiple of --n_head %zu, at most 4096; --n_layer %zu: 1 to 100",
          c->n_embd, c->n_head, c->n_layer);
    struct ExactWorld *w = exact_world(&o->arena, *c, L, o->train.seed);
    o->reference = w->ref_model;
    exact_run(w, o->ppo.init_kl_coef);
    exact_print(w, o->json);
}

static const struct Command {
    const char *name, *what;
    void (*run)(struct Options *);
    int groups;
    const char *defaults[16];
} COMMANDS[] = {
    {"rlhf",
     "the whole course: language model, reward model, PPO, DPO",
     command_rlhf,
     G_RLHF | G_FILES | G_MODEL,
     {"temperature", "0.7", "output_dir", "out"}},
    {"tokenize",
     "[FILE]: text (or standard input) to ids; --decode: ids to text",
     command_tokenize,
     G_TOKENIZE | G_WORDS,
     {0}},
    {"pretrain",
     "a new language model from texts",
     command_pretrain,
     G_MODEL | G_TRAINING | G_RUN | G_NEW,
     {0}},
    {"sft",
     "supervised fine-tuning on text or prompt + completion",
     command_sft,
     G_TUNING | G_RUN,
     {"learning_rate", "2e-5"}},
    {"reward",
     "a reward model from pairs, or from rated or labelled texts",
     command_reward,
     G_TUNING | G_RUN | G_REWARD,
     {"learning_rate", "1e-4"}},
    {"ppo",
     "PPO with a value head (TRL 0.11's PPOTrainer)",
     command_ppo,
     G_TUNING | G_ROLL | G_PPO | G_REF,
     {"learning_rate", "1.41e-5", "max_grad_norm", "0", "lr_scheduler_type", "constant",
      "logging_steps", "1", "seed", "0"}},
    {"reinforce",
     "the plain policy gradient, with and without a baseline",
     command_reinforce,
     G_TUNING | G_ROLL | G_RLOO | G_REF,
     {"learning_rate", "1e-6", "logging_steps", "1", "beta", "0.05", "num_generations", "2"}},
    {"dpo",
     "direct preference optimization on prompt + chosen + rejected",
     command_dpo,
     G_TUNING | G_RUN | G_DPO | G_REF,
     {"learning_rate", "1e-6"}},
    {"exact",
     "a toy small enough to enumerate: the closed form, and what DPO, PPO, REINFORCE reach",
     command_exact,
     G_EXACT | G_SEED | G_JSON,
     {"vocab_size", "6", "n_embd", "32", "n_layer", "2", "n_head", "2", "max_new_tokens", "3",
      "beta", "1"}},
    {"generate",
     "continue a --prompt, or each of a data set",
     command_generate,
     G_TOOL | G_SEED | G_SAMPLE | G_PROMPT | G_JSON,
     {"top_k", "50"}},
    {"next",
     "the distribution of the next token after a --prompt",
     command_next,
     G_MODEL | G_PEFT | G_PROMPT | G_NEXT | G_JSON,
     {0}},
    {"logprob",
     "log-probabilities of tokens and sequences, KL to --ref_model",
     command_logprob,
     G_TOOL | G_REF | G_LENGTH,
     {0}},
    {"score",
     "the sentiment pipeline: reward and pipe_outputs of each text",
     command_score,
     G_TOOL | G_LENGTH,
     {0}},
    {"collect",
     "answers, compared by a reward model or by you",
     command_collect,
     G_TOOL | G_FILES | G_ROLL | G_COLLECT,
     {"num_generations", "2"}},
    {"eval",
     "perplexity, accuracy, or reward and KL",
     command_eval,
     G_TOOL | G_SEED | G_REF | G_ROLL | G_EVAL | G_LENGTH,
     {"max_samples", "256"}},
    {"merge",
     "a LoRA adapter folded into its base, saved as a model",
     command_merge,
     G_MODEL | G_PEFT | G_OUT,
     {0}},
    {"report", "DIR: report.html again, from a run's logs", command_report, G_WORDS, {0}},
    {"glossary",
     "[TERM]: the course's terms in Portuguese and English",
     command_glossary,
     G_WORDS,
     {0}},
};

static void print_commands(FILE *file) {
    fputs("align: train and align GPT-2 from scratch. Commands (--help on each):\n\n", file);
    for (size_t i = 0; i < COUNT(COMMANDS); i++)
        fprintf(file, "  %-10s %s\n", COMMANDS[i].name, COMMANDS[i].what);
    fprintf(file, "\n%s --version says what was built and how. Start with:  %s rlhf\n",
            program_name, program_name);
}

static const struct Command *find_command(const char *name) {
    const struct Command *nearest = COMMANDS;
    if (strcmp(name, "bench") == 0)
        die_usage("there is no command \"bench\"; `make bench` measures the speed "
                  "(docs/tools/bench.c)");
    for (size_t i = 0; i < COUNT(COMMANDS); i++)
        if (edit_distance(name, COMMANDS[i].name) < edit_distance(name, nearest->name))
            nearest = &COMMANDS[i];
    if (strcmp(name, nearest->name) != 0)
        die_usage("there is no command \"%s\"; the nearest is \"%s\" (all: %s --help)", name,
                  nearest->name, program_name);
    return nearest;
}

/* The command's flag of just this name, or NULL. */
static const struct Flag *exact_flag(const char *name, const struct Command *command) {
    for (size_t i = 0; i < COUNT(FLAGS); i++)
        if ((FLAGS[i].groups & command->groups) && strcmp(name, FLAGS[i].name) == 0)
            return &FLAGS[i];
    return NULL;
}

/* The command's flag for what other programs call so, or NULL. */
static const struct Flag *also_called(const char *name, const struct Command *command) {
    const struct Flag *flag = NULL;
    for (size_t i = 0; i < COUNT(ALSO_CALLED) && !flag; i++)
        if (strcmp(name, ALSO_CALLED[i][0]) == 0)
            flag = exact_flag(ALSO_CALLED[i][1], command);
    return flag;
}

/* Ends the program and names the flag that was perhaps meant: the one that other programs call so,
 * or else the one that is spelt most like it. */
static _Noreturn void die_unknown(const char *name, const struct Command *command) {
    const struct Flag *nearest = also_called(name, command);
    size_t least = nearest ? 0 : SIZE_MAX;
    for (size_t i = 0; i < COUNT(FLAGS); i++) {
        size_t distance = edit_distance(name, FLAGS[i].name);
        if (!(FLAGS[i].groups & command->groups) || distance >= least)
            continue;
        least = distance;
        nearest = &FLAGS[i];
    }
    die_usage("%s has no flag --%s; the nearest is --%s (all: %s %s --help)", command->name, name,
              nearest->name, program_name, command->name);
}

/* A flag by its name or the beginning of one that no other has, as Python's argparse takes it. */
static const struct Flag *find_flag(const char *name, const struct Command *command) {
    const struct Flag *found = exact_flag(name, command);
    char candidates[400] = "";
    size_t count = 0;
    if (found)
        return found;
    if (!*name)
        die_usage("%s: \"--\" is no flag; all: %s %s --help", command->name, program_name,
                  command->name);
    /* --lr would also be the beginning of --lr_scheduler_type: a name that other programs use is
     * never taken for one, it is refused with the name it has here. */
    for (size_t i = 0; i < COUNT(FLAGS) && !also_called(name, command); i++) {
        if (!(FLAGS[i].groups & command->groups) || strncmp(name, FLAGS[i].name, strlen(name)) != 0)
            continue;
        size_t used = strlen(candidates);
        snprintf(candidates + used, sizeof candidates - used, "%s--%s", count++ ? ", " : "",
                 FLAGS[i].name);
        found = &FLAGS[i];
    }
    if (count == 0)
        die_unknown(name, command);
    if (count > 1)
        die_usage("--%s: which of these is meant? %s", name, candidates);
    return found;
}

/* Reads a boolean as transformers' HfArgumentParser does, in large letters or small. Returns false
 * if the word is none. */
static bool parse_bool(const char *word, bool *value) {
    static const char *const words[] = {"false", "no", "n", "f", "0", "true", "yes", "y", "t", "1"};
    for (size_t k = 0; k < COUNT(words); k++) {
        size_t i = 0;
        while (word[i] && tolower((unsigned char)word[i]) == words[k][i])
            i++;
        if (word[i] || words[k][i])
            continue;
        *value = k >= COUNT(words) / 2;
        return true;
    }
    return false;
}

static _Noreturn void die_number(const struct Flag *flag, const char *value, double number) {
    double least = RANGES[flag->kind].least;
    double most = RANGES[flag->kind].most;
    bool too_small = number < least && (least < 0 || (least == (double)FLT_MIN && number > 0));
    bool beyond = most == (double)FLT_MAX && (number > most || too_small);
    char bounds[64] = "";
    if (beyond)
        snprintf(bounds, sizeof bounds, "; %.2g to %.2g can be used", least, most);
    die_usage("--%s %s: %s was expected%s (%s)", flag->name, value, RANGES[flag->kind].expected,
              bounds, flag->help);
}

/* Stores a number at `to`. */
static void parse_number(struct Options *o, const struct Flag *flag, const char *value) {
    void *to = (char *)o + flag->offset;
    char *end = NULL;
    bool whole = flag->kind <= KIND_COUNT;

    /* 1. Read it, all of it. strtoull would take "-3" and " 3"; strtod takes "nan", which no
     *    comparison below lets through. */
    if (flag->kind == KIND_STEPS && strcmp(value, "-1") == 0)
        value = "0"; /* HF's "not set" */
    errno = 0;
    unsigned long long size = strtoull(value, &end, 10);
    double number = whole ? (double)size : strtod(value, &end);
    bool read = !*end && (whole ? isdigit((unsigned char)*value) && !errno : end != value);
    if (!read)
        number = NAN;
    if (!(number >= RANGES[flag->kind].least && number <= RANGES[flag->kind].most))
        die_number(flag, value, number);

    /* 2. Store it as what the member of Options is. */
    if (flag->kind == KIND_SEED)
        *(uint64_t *)to = size;
    else if (whole)
        *(size_t *)to = (size_t)size;
    else if (flag->kind != KIND_WARMUP)
        *(double *)to = number;
    else { /* transformers 5: below 1 it is a ratio */
        *(size_t *)to = (size_t)number;
        if (number > 0 && number < 1)
            o->train.warmup_ratio = number;
    }
}

/* Stores a flag's value; NULL: it stands bare. */
static void parse_flag(struct Options *o, const struct Flag *flag, const char *value) {
    void *to = (char *)o + flag->offset;
    bool truth = true;
    /* 1. A bare boolean means true; one that stops a beam search has a third value. */
    if (flag->kind == KIND_BOOL || flag->kind == KIND_STOPPING) {
        bool never = flag->kind == KIND_STOPPING && value && strcmp(value, "never") == 0;
        const char *more = flag->kind == KIND_STOPPING ? " or never" : "";
        if (value && !never && !parse_bool(value, &truth))
            die_usage("--%s %s: true or false%s was expected", flag->name, value, more);
        if (flag->kind == KIND_BOOL)
            *(bool *)to = truth;
        else
            *(enum EarlyStopping *)to = never ? STOP_NEVER : truth ? STOP_TRUE : STOP_FALSE;
        return;
    }
    if (!value)
        die_usage("--%s needs a value (%s)", flag->name, flag->help);
    if (flag->kind > KIND_LIST) {
        parse_number(o, flag, value);
        return;
    }

    /* 2. A string. Only a prompt may be empty; a name must be one that the flag's help lists. */
    if (!value[strspn(value, " ,")] && flag->kind != KIND_TEXT)
        die_usage("--%s \"%s\" is empty; a value was expected (%s)", flag->name, value, flag->help);
    if (flag->kind == KIND_NAME)
        choice(flag->name, value, flag->help);
    *(const char **)to = value;
}

static bool is_flag(const char *word) {
    return strncmp(word, "--", 2) == 0 || strcmp(word, "-h") == 0;
}

/* Passes over a flag of another program that changes nothing here, with its values. Returns how
 * many arguments those are. */
static int pass_over(struct Options *o, size_t which, const char *value, char **rest) {
    const char *name = PASSED_OVER[which].name;
    int taken = 0;
    if (!value && *rest && !is_flag(*rest))
        value = rest[taken++];
    /* Each of its values must be one that changes nothing; "True" and "yes" are `true`. */
    do {
        const char *names = PASSED_OVER[which].harmless;
        bool truth = true;
        bool harmless = !names;
        bool boolean = !value || parse_bool(value, &truth);
        for (size_t length; !harmless && (length = next_name(&names)) > 0; names += length) {
            const char *harmless_value = text_copy(&o->arena, (struct Text){names, length}).data;
            const char *meant = !boolean ? value : truth ? "true" : "false";
            harmless =
                strcmp(meant, harmless_value) == 0 || (value && strcmp(value, harmless_value) == 0);
        }
        if (!harmless)
            die_usage("--%s %s cannot be had: %s; leave it out, or give %s", name,
                      value ? value : "true", PASSED_OVER[which].why, PASSED_OVER[which].harmless);
    } while (rest[taken] && !is_flag(rest[taken]) && (value = rest[taken++]));
    const char *before = o->passed_over ? arena_printf(&o->arena, "%s, ", o->passed_over) : "";
    o->passed_over = arena_printf(&o->arena, "%s--%s", before, name);
    return taken;
}

/* The next argument if it is the value of a flag, or NULL. Another flag is none; and behind a
 * boolean of a command that also takes words, only a word that must be a boolean is one. */
static const char *value_behind(const struct Flag *flag, const struct Command *command,
                                const char *next) {
    bool truth;
    if (!next || (is_flag(next) && !strchr(next, ' ')))
        return NULL;
    if (flag->kind != KIND_BOOL || !(command->groups & G_WORDS))
        return next;
    return strlen(next) >= strlen("true") && parse_bool(next, &truth) ? next : NULL;
}

/* Takes the flag that argv begins with: --name value, --name=value, a bare boolean or its
 * --no_name. Dashes in the name count as underscores. Returns how many further arguments it
 * took. */
static int take_flag(struct Options *o, const struct Command *command, char **argv) {
    size_t length = strcspn(argv[0] + 2, "=");
    char *name = arena_printf(&o->arena, "%.*s", (int)MIN(length, (size_t)60), argv[0] + 2);
    const char *value = argv[0][2 + length] ? argv[0] + 3 + length : NULL;
    bool equals = value != NULL;

    /* 1. --learning-rate is --learning_rate, and --no_do_sample is --do_sample false. */
    for (char *c = name; *c; c++)
        if (*c == '-')
            *c = '_';
    const struct Flag *flag = exact_flag(name, command);
    const struct Flag *negated =
        !flag && strncmp(name, "no_", 3) == 0 ? exact_flag(name + 3, command) : NULL;
    if (negated && negated->kind == KIND_BOOL) {
        if (equals)
            die_usage("--%s takes no value; give --%s true or false", name, negated->name);
        o->given[negated - FLAGS] = true;
        parse_flag(o, negated, "false");
        return 0;
    }

    /* 2. A training takes TRL's command lines: flags about what does not exist here pass. */
    for (size_t k = 0; k < COUNT(PASSED_OVER) && !flag && (command->groups & G_TRAIN); k++) {
        if (strcmp(name, PASSED_OVER[k].name) == 0)
            return pass_over(o, k, value, argv + 1);
        if (strncmp(name, "no_", 3) == 0 && strcmp(name + 3, PASSED_OVER[k].name) == 0)
            return pass_over(o, k, "false", (char *[]){NULL});
    }

    /* 3. One of the command's flags, perhaps cut short; its value is behind it or behind "=". */
    if (!flag)
        flag = find_flag(name, command);
    if (!equals)
        value = value_behind(flag, command, argv[1]);
    int taken = value && !equals;
    parse_flag(o, flag, value);
    o->given[flag - FLAGS] = true;
    if (flag->kind != KIND_LIST || equals)
        return taken;

    /* 4. A list goes on to the next flag: --loss_type sigmoid sft. */
    const char **list = (const char **)((char *)o + flag->offset);
    for (; argv[1 + taken] && !is_flag(argv[1 + taken]) && strlen(*list) < 1000; taken++)
        *list = arena_printf(&o->arena, "%s %s", *list, argv[1 + taken]);
    return taken;
}

/* A rule: if it holds, these flags (names in a list) change nothing, and why. */
struct IdleRule {
    bool holds;
    const char *flags, *why;
};

static void note_idle_rules(const struct Options *o, const struct IdleRule *rules, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (rules[i].holds)
            note_idle(o, rules[i].flags, rules[i].why);
}

/* Flags of a training that change nothing beside the others that are given. */
static void note_idle_training(const struct Options *o, const struct Command *command) {
    const struct TrainingArguments *train = &o->train;
    const struct PPOConfig *ppo = &o->ppo;
    const char *adapter = o->peft_adapter ? "--peft_adapter has its own"
                                          : "all weights are trained; for an adapter give "
                                            "--use_peft";
    bool smoothing = strstr(o->loss_type, "sigmoid") || strstr(o->loss_type, "robust");
    /* A flag that the command does not have is not given: such rules do no harm. */
    const struct IdleRule rules[] = {
        {!o->use_peft, "lora_r, lora_alpha, lora_dropout, lora_target_modules, use_rslora",
         adapter},
        {train->max_steps > 0, "num_train_epochs", "--max_steps decides"},
        {!o->eval_dataset, "eval_steps", "there is no --eval_dataset"},
        {strcmp(train->optim, "sgd") == 0, "adam_beta1, adam_beta2, adam_epsilon",
         "--optim sgd keeps no running means"},
        {strcmp(train->lr_scheduler_type, "constant") == 0, "warmup_steps, warmup_ratio",
         "--lr_scheduler_type constant has no warm-up, constant_with_warmup has"},
        {train->warmup_steps > 0, "warmup_ratio", "--warmup_steps decides"},
        {train->save_steps == 0, "save_total_limit", "--save_steps 0 leaves no checkpoints"},
        {o->model_name_or_path != NULL, "n_layer, n_head, n_embd, n_positions, vocab_size",
         "--model_name_or_path has its own"},
        {strcmp(o->loss_type, "bce") == 0, "center_rewards_coefficient",
         "--loss_type bce compares no pairs"},
        {!smoothing, "label_smoothing", "only the losses sigmoid and robust smooth labels"},
        {(command->groups & G_RLOO) != 0, "gradient_accumulation_steps",
         "reinforce takes a step on its whole batch"},
        {!ppo->adap_kl_ctrl, "horizon, target",
         "--adap_kl_ctrl false keeps the coefficient as it is"},
        {(command->groups & G_PPO) && !ppo->early_stopping, "target_kl",
         "--early_stopping is not given"},
        {!ppo->use_score_scaling, "use_score_norm", "--use_score_scaling is not given"},
        {o->rollouts != NULL,
         "reward_model_path, dataset_name, top_k, top_p, input_min_text_length, "
         "input_max_text_length, output_min_length, output_max_length",
         "--rollouts are replayed, none are sampled"},
    };
    note_idle_rules(o, rules, COUNT(rules));
}

/* The same for commands that write or measure. */
static void note_idle_tools(const struct Options *o, const struct Command *command) {
    const struct GenerationConfig *g = &o->generation;
    bool generates = (command->groups & G_SAMPLE) != 0;
    bool measures = (command->groups & G_EVAL) != 0;
    /* A flag that the command does not have is not given: such rules do no harm. */
    const struct IdleRule rules[] = {
        {generates && !g->do_sample, "temperature, top_k, top_p, seed",
         "without --do_sample nothing is drawn"},
        {generates && g->num_beams == 1, "length_penalty, early_stopping",
         "there are no beams (--num_beams)"},
        {generates && g->min_new_tokens > g->max_new_tokens, "min_new_tokens",
         "it is above --max_new_tokens, which ends the text"},
        {generates && o->prompt, "dataset_name", "--prompt is continued"},
        {measures && o->reward_model_path, "max_length", "answers end at --max_new_tokens"},
        {measures && !o->reward_model_path,
         "ref_model, seed, max_samples, max_new_tokens, temperature, top_k, top_p, "
         "input_min_text_length, input_max_text_length",
         "answers are written only for a --reward_model_path"},
    };
    note_idle_rules(o, rules, COUNT(rules));
}

static void take_word(struct Options *o, const struct Command *command, char *word) {
    bool room = command->run == command_glossary || !o->file;
    if (!(command->groups & G_WORDS) || !room)
        die_usage("%s: \"%s\" is no flag (flags start with --)", command->name, word);
    if (!o->file || strlen(o->file) < 1000)
        o->file = o->file ? arena_printf(&o->arena, "%s %s", o->file, word) : word;
}

static void parse_arguments(struct Options *o, const struct Command *command, int argc,
                            char **argv) {
    /* 1. The command line as a shell takes it, for report.json. */
    o->begin = seconds_now();
    o->command = program_name;
    for (int i = 1; i < argc; i++)
        o->command = arena_printf(&o->arena, "%s %s", o->command, shell_word(&o->arena, argv[i]));

    /* 2. Flags with their values, and words. */
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "-h") == 0)
            o->help = true;
        else if (is_flag(argv[i]))
            i += take_flag(o, command, argv + i);
        else
            take_word(o, command, argv[i]);
    }
    quiet = o->quiet;
    bool resume;
    const char **from = &o->train.resume_from_checkpoint;
    if (*from && parse_bool(*from, &resume))
        *from = resume ? "true" : NULL;
    if (o->help)
        return;

    /* 3. What cannot be together, and what changes nothing: no flag is ignored in silence. */
    if (o->use_peft && o->peft_adapter)
        die_usage("--use_peft starts a new adapter, --peft_adapter goes on with one: give one of "
                  "them");
    if (o->use_peft && o->lora.lora_dropout != 0)
        die_usage("--lora_dropout %g: only 0 is implemented; leave it out", o->lora.lora_dropout);
    if (o->use_peft && o->lora.r > 1 << 16)
        die_usage("--lora_r %zu: 1 to 65536 can be used", o->lora.r);
    if (o->passed_over)
        warn("%s: no effect in align", o->passed_over);
    note_idle_training(o, command);
    note_idle_tools(o, command);
}

/* What a command starts from: transformers' defaults, and its own in the table of commands, TRL's.
 */
static struct Options default_options(const char *name) {
    struct Options o = {
        .train = training_arguments(),
        .ppo = ppo_config(),
        .generation = generation_config(),
        .dpo = {.beta = 0.1},
        .loss_type = "sigmoid",
        .baseline = "rloo",
        .lora = {.r = 16, .lora_alpha = 32, .target_modules = "c_attn"},
        .top_n = 10,
        .config =
            {
                .vocab_size = 50257,
                .n_positions = 1024,
                .n_embd = 768,
                .n_layer = 12,
                .n_head = 12,
                .layer_norm_epsilon = 1e-5f,
            },
        .input_length = {2, 8},
        .output_length = {4, 16},
        .pretrain_steps = 2000,
        .reward_steps = 450,
        .ppo_steps = 85,
        .dpo_steps = 150,
    };
    /* transformers' top_k of 50 is generate's; what trains or measures samples from all tokens */
    const struct Command *command = find_command(name);
    o.generation.top_k = 0;
    for (const char *const *word = command->defaults; *word; word += 2)
        parse_flag(&o, find_flag(word[0], command), word[1]);
    return o;
}

/* A flag's value as it stands in Options, in words; "" for a string that is not set. */
static const char *flag_value(struct Options *o, const struct Flag *flag) {
    static const char *const stopping[] =
        {[STOP_FALSE] = "false", [STOP_TRUE] = "true", [STOP_NEVER] = "never"};
    const void *at = (const char *)o + flag->offset;
    /* as parse_flag and parse_number store them */
    if (flag->kind <= KIND_LIST)
        return *(const char *const *)at ? *(const char *const *)at : "";
    if (flag->kind == KIND_BOOL)
        return *(const bool *)at ? "true" : "false";
    if (flag->kind == KIND_STOPPING)
        return stopping[*(const enum EarlyStopping *)at];
    if (flag->kind == KIND_SEED)
        return arena_printf(&o->arena, "%llu", (unsigned long long)*(const uint64_t *)at);
    if (flag->kind <= KIND_COUNT || flag->kind == KIND_WARMUP)
        return arena_printf(&o->arena, "%zu", *(const size_t *)at);
    return arena_printf(&o->arena, "%g", *(const double *)at);
}

/* Prints words in lines of at most 100 columns; all but the first are indented by `indent`. */
static void print_wrapped(const char *text, size_t indent) {
    size_t column = indent;
    for (size_t length; *text; text += length + (text[length] == ' ')) {
        length = strcspn(text, " ");
        if (column > indent && column + 1 + length > 100) {
            printf("\n%*s", (int)indent, "");
            column = indent;
        }
        column += (size_t)printf("%s%.*s", column > indent ? " " : "", (int)length, text);
    }
    putchar('\n');
}

/* Prints each flag under its heading: its default, as the command has it, what it may be, and what
 * it is for. */
static void print_help(const struct Command *command) {
    enum { INDENT = 33 };
    struct Options defaults = default_options(command->name); /* the command's own are among them */
    const char *heading = NULL;
    printf("align %s -- ", command->name);
    print_wrapped(command->what, sizeof "align -- " - 1 + strlen(command->name));
    puts("\nIn [brackets]: the default. A boolean may stand bare, be --no_so or have a value. A "
         "name may be cut\n"
         "short as far as it fits one flag alone, and have dashes for underscores.");
    for (size_t i = 0; i < COUNT(FLAGS); i++) {
        const struct Flag *flag = &FLAGS[i];
        /* 1. A heading waits until a flag under it is one of the command's. */
        if (!*flag->name)
            heading = flag->help;
        if (!(flag->groups & command->groups))
            continue;
        if (heading)
            printf("\n%s\n", heading);
        heading = NULL;

        /* 2. [default] what is expected: what it is for. */
        const char *value = flag_value(&defaults, flag);
        const char *expected =
            flag->kind == KIND_BOOL ? "true or false" : RANGES[flag->kind].expected;
        if (!expected)
            expected = "";
        size_t length = strlen(expected);
        if (length && expected[length - 1] == ',')
            length--;
        const char *brackets = *value ? arena_printf(&defaults.arena, "[%s] ", value) : "";
        printf("  --%-*s", INDENT - 4, flag->name);
        print_wrapped(arena_printf(&defaults.arena, "%s%.*s%s%s", brackets, (int)length, expected,
                                   length ? ": " : "", flag->help),
                      INDENT);
    }
    options_close(&defaults);
}

static void print_version(void) {
    kernel_choose();
    puts("align 1.0");
#if defined(__clang__)
    printf("compiler: clang %d.%d.%d\n", __clang_major__, __clang_minor__, __clang_patchlevel__);
#elif defined(__GNUC__)
    printf("compiler: gcc %d.%d.%d\n", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
#ifdef _OPENMP
    printf("threads: %d (OpenMP)\n", omp_get_max_threads());
#else
    puts("threads: built without OpenMP: one thread");
#endif
    printf("kernel: %s\n", kernel ? kernel->name : "plain");
}

/* Answers what is asked about the program itself: --help, -h, help [COMMAND], --version. Returns
 * false if the command line is something else. */
static bool answer_about(int argc, char **argv) {
    const char *word = argc > 1 ? argv[1] : "help";
    bool help = strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0 || strcmp(word, "help") == 0;
    if (strcmp(word, "--version") == 0)
        print_version();
    else if (help && argc > 2)
        print_help(find_command(argv[2]));
    else if (help)
        print_commands(argc < 2 ? stderr : stdout);
    else
        return false;
    return true;
}

/* A thread that waits for others spins before it sleeps, GNU's OpenMP for milliseconds and LLVM's
 * for 200 of them. That is right on an idle machine. On a busy one it takes the time of the very
 * thread it waits for, and a run takes several times as long. So, unless the user has chosen, it
 * spins briefly. LLVM's OpenMP can be told by a call, GNU's only by the environment it starts with.
 */
#if defined(KMP_VERSION_MAJOR) && defined(__linux__)
static void openmp_spin_briefly(void) {
    if (!getenv("KMP_BLOCKTIME") && !getenv("OMP_WAIT_POLICY"))
        kmp_set_blocktime(0);
}
#else
static void openmp_spin_briefly(void) {
}
#endif

#if defined(_OPENMP) && !defined(KMP_VERSION_MAJOR) && defined(__GLIBC__) && !SANITIZED
/* The C library calls this before the constructors of the shared libraries, libgomp's among them:
 * the program starts again with one variable more before anything has happened. It does so only
 * if the name it was started by leads to the file that runs: under valgrind it does not. */
static void gomp_spin_briefly(int argc, char **argv, char **variables) {
    (void)argc;
    size_t n = 0;
    for (; variables[n]; n++) {
        bool is_count = strncmp(variables[n], "GOMP_SPINCOUNT=", 15) == 0;
        if (is_count || strncmp(variables[n], "OMP_WAIT_POLICY=", 16) == 0)
            return;
    }
    static char brief[] = "GOMP_SPINCOUNT=4000";

    /* 1. The kernel has loaded no loader. In a static program the environment can still be added
     *    to. A program that a loader was asked to run cannot be started again; this does nothing.
     */
    if (getauxval(AT_BASE) == 0) {
        putenv(brief);
        return;
    }

    /* 2. With the same name and arguments. Where that fails, it runs as it is. */
    const char *name = (const char *)getauxval(AT_EXECFN);
    struct stat named;
    struct stat running;
    if (stat(name, &named) != 0 || stat("/proc/self/exe", &running) != 0)
        return;
    if (named.st_dev != running.st_dev || named.st_ino != running.st_ino)
        return;
    char *with_brief[n + 2];
    memcpy(with_brief, variables, n * sizeof *variables);
    with_brief[n] = brief;
    with_brief[n + 1] = NULL;
    execve(name, argv, with_brief);
}

__attribute__((section(".preinit_array"),
               used)) static void (*const before_openmp)(int, char **, char **) = gomp_spin_briefly;
#endif

/* Is arithmetic what the file's head asks for? A compiler may define no macro for a flag, as clang
 * for -funsafe-math-optimizations and -fno-honor-nans, and -Ofast may be given when linking only:
 * the program then sets the smallest numbers to 0. `volatile`: not to be computed beforehand. */
static void arithmetic_check(void) {
    volatile float not_a_number = NAN;
    volatile float infinity = INFINITY;
    volatile float one = 1;
    volatile float least = FLT_MIN;
    float nan = not_a_number;
    float large = 0x1p24f * one;
    float small = 0.25f * one;
    float sum = large + small;
    /* 2^24 + 1/4 is 2^24 in float32, so the difference is 0; regrouped it would be 1/4. */
    const char *wrong = NULL;
    if (!isnan(nan) || nan == nan || !isinf(infinity))
        wrong = "NaN or infinity pass for numbers";
    else if (sum - large != 0)
        wrong = "the order of additions is changed";
    else if (least * 0.5f == 0)
        wrong = "numbers below 1.2e-38 become 0";
    CHECK(!wrong,
          "this build is not right: %s; build it without -Ofast, -ffast-math, "
          "-funsafe-math-optimizations and their like, in linking too; -O3 is as fast",
          wrong);
}

#ifndef ALIGN_NO_MAIN
int main(int argc, char **argv) {
    /* A closed standard stream leaves its number to the next file opened: messages would go into
     * a model. A file at its size limit is an error. */
#ifndef _WIN32
    /* read-only: what is printed still fails */
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) == -1 && open("/dev/null", O_RDONLY) != fd)
            exit(1);
    signal(SIGXFSZ, SIG_IGN);
#else
    _fmode = _O_BINARY;                              /* else line ends change on the way */
    for (int fd = 0; fd <= 2; fd++)
        _setmode(fd, _O_BINARY);
#endif
    openmp_spin_briefly();
    arithmetic_check();
    struct Arena words = {0};
    if (argc > 0 && *argv[0])
        program_name = shell_word(&words, argv[0]);
    if (!answer_about(argc, argv)) {
        const struct Command *command = find_command(argv[1]);
        struct Options o = default_options(command->name);
        parse_arguments(&o, command, argc, argv);
        if (o.help)
            print_help(command);
        else {
#ifndef _WIN32
            /* a training goes on when nobody reads its progress; a filter ends */
            if (command->groups & G_OUT)
                signal(SIGPIPE, SIG_IGN);
#endif
            kernel_choose();
            command->run(&o);
        }
        options_close(&o);
    }
    arena_free(&words);
    program_name = "align";
    errno = 0;
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "standard output: writing failed: %s",
          errno ? strerror(errno) : "what came out is not complete");
    return argc < 2 ? 2 : 0;
}
#endif
