/* align.c -- train and align GPT-2 from scratch, in one file of C.
 *
 * =============================================================================================
 * Chapter 0 - Preface
 * =============================================================================================
 *
 * A language model reads a text as tokens, words and pieces of words, and gives each token that
 * could come next a probability: it writes what is likely. RLHF, reinforcement learning from human
 * feedback, makes it write what people like. [glossary: RLHF] One drawing shows all of it:
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
 * The policy is the model that is trained, the reference a copy of what it was; KL(pi || pi_ref),
 * the Kullback-Leibler divergence, says how far the one has moved from the other. SFT is supervised
 * fine-tuning, PPO proximal policy optimization, DPO direct preference optimization. Numbers in
 * parentheses are chapters. Each chapter builds on earlier ones; what it needs of later ones,
 * above all of Part IV, the machinery, is declared where it is first used.
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
 *    14 Optimizer, schedule, Trainer         21 Files, JSON
 *    15 Language model, SFT                  22 Data sets, tokenizer.bin
 *    16 Reward model                         23 safetensors, model and adapter folders
 *    17 Rollouts, REINFORCE, PPO             24 Progress, logs, checkpoints
 *    18 DPO, collected preferences           25 Results
 *    19 Exact: a world to enumerate          26 Command line, main
 *    20 The whole course (rlhf)
 *
 * RLHF in 600 lines. Read the essays that open chapters 2 to 5, then these functions in this
 * order, each with its comment. That is the whole idea:
 *   sigmoid, softmax        log-odds and logits become probabilities                     chapter 2
 *   kl_exact, kl_k1         how far apart two models are; the estimate from one token
 *   bradley_terry_pair      a preference becomes a loss: how a reward model learns       chapter 3
 *   reinforce_advantages    how good an answer was, against what was to be expected      chapter 4
 *   reinforce_loss          a score becomes a gradient (read the essay above it)
 *   kl_reward               what a token pays for leaving the reference
 *   gae_step, gae           how a score at the end becomes an advantage at each token
 *   ppo_token_loss          why PPO clips, and where the gradient is zero
 *   ppo_value_loss          how the value head learns what to expect
 *   exact_optimum           the best policy there is, in closed form                     chapter 5
 *   dpo_pair_loss           the same optimum from pairs alone
 *   ppo_rewards             where penalty and score reach the tokens of real answers     chapter 17
 *   ppo_step                the seven steps of PPO on a real model
 * Other paths. What is a policy, an omega, a rollout? Chapters 4, 2, 17. How does a transformer
 * learn at all? Chapters 9, 10, 11, 15. How does a gradient reach the embedding? The drawing that
 * opens chapter 17, then the functions it names. How is a token chosen? Chapter 6. By term:
 * [glossary: TERM] marks the place where a term is implemented. The terms are those of the course's
 * glossary, in Portuguese, and a few more; `align glossary TERM` prints an entry in both languages.
 *
 * What the comments refer to. TRL, transformers and PEFT are Hugging Face's libraries; this program
 * uses their names, formats and numbers. "By hand" is a case to check with a calculator. A "test:"
 * is in test_align.c, run by `./test_align NAME`: it checks the function against such a case, the
 * numbers of those libraries ("golden") or a difference quotient.
 *
 * To step through:  make debug && gdb --args ./align_debug exact   (it needs no data)   then
 * break ppo_token_loss, run, finish: gdb prints the token's loss, slope and ratio. At ppo_backward
 * there is a model: p model->h[0].attn.c_attn.weight.w[0]@8. docs/debugging.md has guided tours.
 *
 * Symbols. In shapes and loops a capital letter has one meaning (but in chapters 9 and 12, A, B, C,
 * M, N and K are the letters of matrix algebra):
 *    B sequences of a batch    T tokens of one sequence    N all tokens of a batch, packed
 *    R rows of a batch that predict a token which counts in a loss
 *    C n_embd, the width       L n_layer                   NH n_head    HS = C/NH, a head's size
 *    V vocab_size
 * Two small letters are used twice: model->h[l] is block l, as in transformers, and in attention
 * h is the number of a head; v is an id in a loop over the vocabulary, and in attention v_j is a
 * value vector, as q_t is a query and k_j a key.
 * Letters of a single formula (x, y, e, r, R(y)) are explained beside it. wte and wpe are GPT-2's
 * names for the matrices of its word (token) and word position embeddings. A matrix (M,N) is
 * row-major: element (i,j) is at i*N + j. "The derivative by x" is the partial derivative with
 * respect to x; that of the loss is called dx. Logarithms are natural, so log-probabilities,
 * divergences and entropies are in nats.
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

/* Windows (mingw-w64) has some of POSIX under other names: see the end of chapter 26. */
#ifdef _WIN32
#include <direct.h>
#include <malloc.h>
static int rename_over(const char *from, const char *to);
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
#endif
static size_t peak_rss_bytes(void); /* the most memory that the program has had */

#define PRINTF_LIKE(f, a) __attribute__((format(PRINTF_FORMAT, f, a)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* =============================================================================================
 * Part I - The ideas
 *
 * The mathematics of the whole course, as functions of plain numbers and arrays: no model, no file
 * and no memory of their own. After this part a reader knows what softmax, KL, Bradley-Terry,
 * REINFORCE, GAE, PPO and DPO compute, why, and what each derivative is. The later parts only
 * call these functions, on a model's numbers (Part II), again and again (Part III).
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 1 - Ground: errors, random numbers, arena, scratch
 *
 * Every later chapter builds on this one; a first reader may still begin with chapter 2.
 *
 * Errors. There is one way to fail: CHECK(condition, "what, where, found and expected, what to
 * do") prints one line and ends the program with status 1. An unknown command, flag or value ends
 * it with status 2.
 *
 * Random numbers. Everything random follows from --seed: the same seed gives the same bits.
 *
 * Memory. An arena hands out memory piece by piece and takes it all back at once: one call frees
 * everything in it, so nothing can be freed twice or forgotten. A training loop empties its arena
 * before each step.
 * ============================================================================================= */

static bool quiet; /* --quiet: no progress on stderr; errors are still printed */
/* How the program was called, quoted for the shell: the command lines it prints can be pasted. */
static const char *program_name = "align";
/* appended to error messages: how to resume a training that fails */
static char resume_hint[PATH_MAX + 80];
static const char *staged_folder; /* half written: deleted if the program fails (chapter 21) */
static void folder_delete(const char *folder);

/* How messages look on a terminal, and the clock: chapter 24. */
static void PRINTF_LIKE(2, 0)
    complain(const char *start, const char *format, va_list arguments, const char *end);
static void PRINTF_LIKE(1, 2) say(const char *format, ...); /* progress: not with --quiet */
static void PRINTF_LIKE(1, 2) warn(const char *format, ...); /* a note: always */
static double seconds_now(void);

/* Threads of a parallel loop may fail at the same moment, out of memory for example. The first to
 * arrive here ends the program; the others wait until it has. */
static _Noreturn void PRINTF_LIKE(2, 3) die_with(int status, const char *format, ...) {
#pragma omp critical(die)
    {
        va_list arguments;
        va_start(arguments, format);
        /* results still in stdout's buffer must appear before the error, not after it */
        fflush(stdout);
        complain("align: ", format, arguments, status == 1 ? resume_hint : "");
        va_end(arguments);
        /* a folder with some of its files missing must not be mistaken for a model */
        if (staged_folder)
            folder_delete(staged_folder);
        exit(status);
    }
}

#define die(...) die_with(1, __VA_ARGS__)
#define die_usage(...) \
    die_with(2, __VA_ARGS__) /* no such command or flag: status 2, as other tools use it */
#define CHECK(condition, ...) \
    do {                      \
        if (!(condition))     \
            die(__VA_ARGS__); \
    } while (0)

/* Random numbers: xoshiro256++ by Blackman and Vigna. Its state of four words is filled by
 * splitmix64, as they advise. `stream` gives independent sequences from one seed (initial weights,
 * data order, sampling ...): drawing one number more from one of them leaves the others
 * unchanged. */
struct Rng {
    uint64_t s[4];
};

static uint64_t splitmix64(uint64_t *state) {
    /* 1. The state is a mere counter with a fixed, odd step: it visits all 2^64 values. */
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    /* 2. Multiplications carry each bit to the left, shifts bring the upper bits back to the right:
     *    neighbouring states end up with nothing in common. */
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
    STREAM_REWARD,
    STREAM_PROMPT_ORDER = STREAM_ORDER + 100, /* of the command ppo's prompts */
    STREAM_ANSWER_LENGTH = STREAM_LENGTH + 100, /* of its answers; STREAM_LENGTH: of its prompts */
    STREAM_WTE = STREAM_INIT + 100,
    STREAM_ADAPTER = STREAM_INIT + 200
};

static struct Rng rng_seed(uint64_t seed, uint64_t stream) {
    /* The large odd factor keeps streams apart: with seed ^ stream alone, stream 2 of seed 1 and
     * stream 1 of seed 2 would be the same sequence. */
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
    /* 1. The result: sums and a rotation, which hide that the step below is linear (shifts and
     *    exclusive ors only). */
    uint64_t result = rotate_left(s[0] + s[3], 23) + s[0];

    /* 2. The next state. The sequence repeats only after 2^256 - 1 numbers. */
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate_left(s[3], 45);
    return result;
}

/* Uniform in [0, 1): 53 random bits, as many as a double's mantissa holds. */
static double rng_uniform(struct Rng *rng) {
    /* The upper 53 bits as an integer, times 2^-53. Dividing all 64 bits by 2^64 could round up to
     * 1.0, and a caller's log(1 - u) would be infinite. */
    return (double)(rng_next(rng) >> 11) * 0x1p-53;
}

/* A whole number in [0, n), n < 2^32: the upper half of a 32 x 32 bit product. */
static size_t rng_below(struct Rng *rng, size_t n) {
    /* x / 2^32 is uniform in [0, 1); times n and rounded down it is an index. `x % n` would do as
     * well, at the price of a division. */
    return (size_t)(((rng_next(rng) >> 32) * (uint64_t)n) >> 32);
}

/* Standard normal, by Box and Muller: a uniform angle, and a radius whose square is exponential. */
static double rng_normal(struct Rng *rng) {
    /* 1 - u is in (0, 1], so log 0 cannot occur. The square of the radius is -2 log u. */
    double radius = sqrt(-2.0 * log(1.0 - rng_uniform(rng)));
    double angle = 6.283185307179586 * rng_uniform(rng);
    return radius * cos(angle);
}

/* Fisher and Yates: every order is equally likely. */
static void rng_shuffle(struct Rng *rng, size_t *items, size_t n) {
    for (size_t i = n; i > 1; i--) {
        /* The last free place gets one of the i items that have no place yet. To draw j from all n
         * instead looks as fair, but makes some orders likelier than others. */
        size_t j = rng_below(rng, i);
        size_t held = items[i - 1];
        items[i - 1] = items[j];
        items[j] = held;
    }
}

/* Arena: memory taken piece by piece, given back all at once. A reset merges the blocks into one,
 * so a training loop asks the system for memory in its first steps only. Under sanitizers every
 * piece is a separate allocation: an overrun must not land unnoticed in a neighbour. */
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
    size_t next_size; /* of the next block, at least; 0: not set */
};
/* ARENA_ALIGN: 64 bytes are a cache line, and an AVX-512 vector. ARENA_HUGE: 2 MB, a huge page. */
enum { ARENA_PIECEWISE = SANITIZED, ARENA_ALIGN = 64, ARENA_HEADER = 64, ARENA_HUGE = 1 << 21 };

static void arena_free(struct Arena *arena) {
    while (arena->blocks) {
        struct ArenaBlock *block = arena->blocks;
        arena->blocks = block->next;
        aligned_free(block);
    }
}

static void arena_reset(struct Arena *arena) {
    /* 1. The usual case, from the second step on: a single block, already large enough. */
    if (arena->blocks && !arena->blocks->next && !ARENA_PIECEWISE) {
        arena->blocks->used = 0;
        return;
    }
    /* 2. Several blocks: the next one is to be as large as all of them together, so that another
     *    step like this one fits into it. */
    size_t total = 0;
    for (struct ArenaBlock *block = arena->blocks; block; block = block->next)
        total += block->size;
    arena_free(arena);
    arena->next_size = total;
}

static struct ArenaBlock *arena_block(size_t capacity) {
    /* C11's aligned_alloc wants a size that is a multiple of the alignment */
    size_t unit = capacity >= ARENA_HUGE ? ARENA_HUGE : ARENA_ALIGN;
    size_t whole = ARENA_HEADER + capacity;
    struct ArenaBlock *block = aligned_alloc(unit, (whole + unit - 1) / unit * unit);
    CHECK(block,
          "out of memory: %zu MB more were asked for; use a smaller model, batch or --max_length",
          capacity >> 20);
#ifdef MADV_HUGEPAGE
    /* A page of 2 MB needs one entry in the processor's address cache (TLB) instead of 512. */
    if (unit == ARENA_HUGE)
        madvise(block, whole / ARENA_HUGE * ARENA_HUGE, MADV_HUGEPAGE);
#endif
    *block = (struct ArenaBlock){.size = capacity};
    return block;
}

/* Memory for `count` items of `size` bytes, on a 64-byte boundary, not cleared. Running out of
 * memory ends the program. */
static void *arena_alloc(struct Arena *arena, size_t count, size_t size) {
    /* 1. Sizes come from files and flags. A product that overflowed would look like a small size,
     *    and the caller would write beyond its piece. */
    CHECK(size == 0 || count <= (SIZE_MAX / 4) / size,
          "out of memory: %zu x %zu bytes asked for; use a smaller model, batch or --max_length",
          count, size);

    /* 2. Rounded up to whole cache lines, so that the next piece begins on one as well. */
    size_t bytes = (count * size + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;

    /* 3. A new block if the current one has no room. A very large piece gets a block of its own,
     *    second in the list: the current block stays first and goes on being filled. */
    struct ArenaBlock *block = arena->blocks;
    if (!block || block->size - block->used < bytes || ARENA_PIECEWISE) {
        bool large = bytes >= ARENA_HUGE && !arena->next_size;
        size_t capacity =
            large || ARENA_PIECEWISE ? bytes : MAX(bytes, MAX(arena->next_size, (size_t)1 << 18));
        block = arena_block(capacity);
        struct ArenaBlock **place = large && arena->blocks ? &arena->blocks->next : &arena->blocks;
        block->next = *place;
        *place = block;
        arena->next_size = 0;
    }

    /* 4. The piece is the next free part of the block. */
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

/* The numbers 0 to n - 1: an order before it is shuffled. */
static size_t *arena_order(struct Arena *arena, size_t n) {
    size_t *order = arena_alloc(arena, n, sizeof *order);
    for (size_t i = 0; i < n; i++)
        order[i] = i;
    return order;
}

/* Each thread has scratch memory of its own, one piece for each purpose. It grows to the largest
 * size requested and is kept. */
enum ScratchSlot { SCRATCH_A, SCRATCH_B, SCRATCH_SCORES, SCRATCH_ROW, SCRATCH_SLOTS };

static void *thread_scratch(enum ScratchSlot slot, size_t count, size_t size) {
    /* The contents are lost when a slot grows, and overwritten by its next user: scratch is for one
     * function, or for a caller and what it fills on its behalf. */
    static _Thread_local struct ArenaBlock *slots[SCRATCH_SLOTS];
    if (!slots[slot] || slots[slot]->size < count * size) {
        aligned_free(slots[slot]);
        slots[slot] = arena_block(count * size);
    }
    return (char *)slots[slot] + ARENA_HEADER;
}

/* =============================================================================================
 * Chapter 2 - Probability: sigmoid, softmax, entropy, KL                     [glossary: Logit]
 *
 * How does a network's output become a probability, and how are two probability distributions
 * compared? A language model ends in V numbers, one for each token that could come next. They are
 * called logits; they may have any size and sign, and only their differences matter. softmax turns
 * them into probabilities. All that RLHF does afterwards works with logarithms of probabilities:
 *
 *     prompt "The film is"      logits   softmax   log-probability
 *         " good"                 2.0     0.665        -0.41
 *         " long"                 1.0     0.245        -1.41
 *         " bad"                  0.0     0.090        -2.41
 *
 * Why logarithms? The probability of an answer is the product of its tokens' probabilities. After
 * a few hundred tokens it is smaller than any float, while its logarithm is a plain sum.
 *
 * What enters: logits (V). What leaves: probabilities (V), and numbers in nats. The nat is the unit
 * of the natural logarithm: one nat more is a factor of e = 2.718 in probability.
 * ============================================================================================= */

/* sigmoid -- from log-odds to a probability.                    [glossary: Função sigmoide]
 *   sigmoid(x) = 1 / (1 + e^-x)
 * It is softmax for two choices whose logits differ by x: "how probable is the first one?"
 * The plain formula overflows for x = -800, where e^-x is infinite. So e is always raised to a
 * negative number, and for x < 0 the fraction is written with e^x instead: e^x / (1 + e^x).
 * By hand: sigmoid(0) = 0.5; sigmoid(2) = 1 / (1 + 0.1353) = 0.8808.             test: sigmoid */
static double sigmoid(double x) {
    /* e is in (0, 1] whatever x is: nothing overflows on either branch */
    double e = exp(-fabs(x));
    return x >= 0 ? 1 / (1 + e) : e / (1 + e);
}

/* log_sigmoid -- the logarithm of sigmoid: the loss of every method that learns from pairs.
 *   log sigmoid(x) = -log(1 + e^-x)          d/dx log sigmoid(x) = sigmoid(-x)
 * (the chain rule: 1 / sigmoid(x) times sigmoid's slope, sigmoid(x) sigmoid(-x))
 * Why not log(sigmoid(x))? For x = -800 the sigmoid rounds to 0, whose logarithm is minus
 * infinity: the loss of the pair that is most wrong would be infinite. Here it is 800, as it
 * should be.
 * By hand: x = 0: -ln 2 = -0.6931; x = 2: ln 0.8808 = -0.1269.                    test: sigmoid */
static double log_sigmoid(double x) {
    /* For x < 0: -log(1 + e^-x) = x - log(1 + e^x), hence the MIN. log1p(e) is log(1 + e), but
     * keeps the digits of a small e, which the sum 1 + e would lose. */
    return MIN(x, 0) - log1p(exp(-fabs(x)));
}

/* ---------------------------------------------------------------------------------------------
 * Rows of numbers, fast
 *
 * Sums and maxima over a row, and e^x, written so that a compiler can turn them into vector
 * instructions: 16 numbers at a time, and no function call for e^x. A first reader can skip them:
 * row_max, row_sum, row_dot and row_exp do what their names say.
 * --------------------------------------------------------------------------------------------- */

/* WIDE: gcc compiles a function three times, for AVX-512, AVX2 and any x86-64, and the loader picks
 * the version that suits the processor. (Not under sanitizers, which start after the loader.) */
#if defined(__x86_64__) && defined(__GLIBC__) && !SANITIZED
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

/* The 32 bits of a float as an integer, and back. */
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
 * 2^n comes from writing n into a float's exponent bits; e^r is its Taylor series up to r^7 / 7!.
 * Relative error below 2e-7 for |x| <= 87. Below -87 the result is 0, above 87 it is e^87.
 * Limits are tested on the bits, as integers: a comparison of floats would remain a branch.
 * By hand: x = 1: n = 1, r = 0.3069, e^r = 1.3591, times 2 = 2.7183.             test: exp_fast */
static inline float exp_fast(float x) {
    /* 1. |x| is limited to 87.0, whose bits are 0x42ae0000. Without their sign bits, floats sort
     *    like the integers with the same bits. */
    uint32_t sign = bits_of_float(x) & 0x80000000u;
    int32_t size = (int32_t)(bits_of_float(x) & 0x7fffffffu);
    int32_t limit = 0x42ae0000;
    float clamped = float_of_bits((uint32_t)(size < limit ? size : limit) | sign);

    /* 2. n: a float near 1.5 * 2^23 has no bits left for a fraction. So adding that number rounds
     *    to an integer, and n is in the lowest bits of `shifted`. */
    float shifted = clamped * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;

    /* 3. r, then its series from the highest power down. n ln 2 is subtracted in two parts: ln 2's
     *    upper part has so few bits that n times it is exact, and r keeps all its digits. */
    float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float tail = 8.3333338e-3f + r * (1.3888889e-3f + r * 1.984127e-4f);
    float p = 1.6666667e-1f + r * (4.1666668e-2f + r * tail);
    p = 1.0f + r * (1.0f + r * (0.5f + r * p));

    /* 4. 2^n: a float stores its exponent plus 127, starting at bit 23. */
    float two_to_n = float_of_bits((bits_of_float(shifted) + 127) << 23);

    /* 5. Below -87 the result is 0: the mask clears all bits. NaN stays NaN, always with the same
     *    bits, since arm64 and x86 would make different ones. */
    uint32_t underflow = size > limit ? sign >> 31 : 0;
    uint32_t nan = (uint32_t) - (size > 0x7f800000) & 0x7fc00000u;
    return float_of_bits((bits_of_float(p * two_to_n) & (underflow - 1u)) | nan);
}

/* Sums and maxima are computed in 16 lanes: lane j takes x[j], x[j + 16], x[j + 32] ..., and one
 * vector instruction serves all lanes at once. Where the length is no multiple of 16, a second loop
 * takes the rest. A compiler may not choose such an order by itself, since sums of floats in
 * another order round differently; with the order written down, a sum has the same bits on every
 * machine. */
enum { LANES = 16 };

/* A float's bits as an integer that sorts as the float does (and back). For negative numbers the
 * magnitude is inverted, since a larger magnitude is a smaller number. */
static inline int32_t order_key(int32_t bits) {
    return bits ^ (int32_t)((uint32_t)(bits >> 31) >> 1);
}

WIDE static float row_max(const float *x, size_t n) {
    /* 1. Integers are compared, which needs no branch. INT32_MIN is below every key. */
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
    /* 2. The largest of the lanes, then of the rest of the row. */
    for (size_t j = 0; j < LANES; j++)
        most = MAX(most, lane[j]);
    for (; i < n; i++)
        most = MAX(most, order_key((int32_t)bits_of_float(x[i])));
    return float_of_bits((uint32_t)order_key(most));
}

/* The 16 sums added up in pairs, as in a tournament: 16 become 8, 4, 2, 1. */
static inline float lane_sum(float lane[LANES]) {
    /* a lane's sum goes through 4 additions instead of up to 15: less rounding, less waiting */
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
    for (; i < n; i++)
        result += x[i];
    return result + lane_sum(lane);
}

WIDE static float row_dot(const float *x, const float *y, size_t n) {
    /* A single sum would have to wait for each addition before the next; 16 do not wait. */
    float lane[LANES] = {0};
    float result = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++)
            lane[j] += x[i + j] * y[i + j];
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

/* ---- Softmax, entropy, KL -------------------------------------------------------------------- */

/* argmax -- the index of the largest number (not its value): the token's id.
 *                                                                [glossary: Argmax/Argmin]
 * Of equal numbers the first one. Greedy decoding is the argmax of the logits at each step: softmax
 * keeps their order, so there is no need for it.
 * By hand: argmax of (2.0, 5.0, 5.0) is 1.                                        test: softmax */
static size_t argmax(const float *x, size_t n) {
    /* Two passes: finding the maximum is a vector loop, and the search stops at the first match. */
    float largest = row_max(x, n);
    for (size_t i = 0; i < n; i++)
        if (x[i] == largest)
            return i;
    /* only NaN gets here: it equals nothing, not even itself */
    return 0;
}

/* softmax -- from logits to probabilities.                      [glossary: Função softmax]
 *   p_i = e^(x_i) / sum_j e^(x_j)
 * in, out  x (n): logits, then probabilities, with the sum 1; one that was cut (-infinity) is 0
 * returns  log_sum_exp of the logits that came in: log p_i = x_i - that
 * Adding a constant to all logits changes nothing. So the largest one is subtracted first: then
 * e^x cannot overflow, and the largest summand is 1.
 * By hand: (0, ln 3): e^x = 1 and 3, their sum 4, p = (0.25, 0.75).               test: softmax */
static float softmax(float *x, size_t n) {
    /* 1. e^(x - largest) in place, and its sum. The shift cancels in the fraction: numerator and
     *    denominator are both divided by e^largest. */
    float largest = row_max(x, n);
    float total = row_exp(x, x, largest, n);

    /* 2. One division instead of n: multiplying is several times faster. */
    float scale = 1.0f / total;
    for (size_t i = 0; i < n; i++)
        x[i] *= scale;

    /* 3. The log of the sum, with the shift undone: log(total * e^largest). */
    return largest + logf(total);
}

/* log_sum_exp -- log sum_i e^(x_i), in nats.                  [glossary: Função de partição]
 * The denominator of softmax, as a logarithm: the partition function of one token. With it every
 * log-probability is one subtraction, log softmax(x)_i = x_i - log_sum_exp(x), without a division
 * or the rounding of small probabilities. scratch: room for n numbers.
 * By hand: (0, ln 3): log 4 = 1.3863, so log p = (-1.3863, -0.2877).              test: softmax */
static float log_sum_exp(const float *x, size_t n, float *scratch) {
    /* the shift of softmax, for the same reason: e^largest alone may overflow */
    float largest = row_max(x, n);
    return largest + logf(row_exp(scratch, x, largest, n));
}

/* entropy_of_logits -- how undecided a distribution is, from 0 (one token is certain) to log n
 * nats (all tokens are equally probable).
 *   H = -sum_i p_i log p_i = lse - sum_i p_i x_i,   since log p_i = x_i - lse
 * in   logits x (n), lse = log_sum_exp(x)
 * RLHF watches it: entropy that falls fast means that the policy has stopped exploring.
 * A token that was filtered out, with a logit of minus infinity, adds nothing: p log p -> 0.
 * By hand: two equal logits 0: lse = ln 2, sum p x = 0, H = ln 2 = 0.6931.        test: entropy */
static double entropy_of_logits(const float *logits, float lse, size_t n) {
    double expected_logit = 0;
    for (size_t i = 0; i < n; i++)
        /* p_i = e^(log p_i). Without the test, a filtered token would add 0 times minus infinity,
         * which is NaN. */
        if (logits[i] > -INFINITY)
            expected_logit += (double)exp_fast(logits[i] - lse) * logits[i];
    return lse - expected_logit;
}

/* kl_exact -- how different two distributions over the next token are, in nats.
 *                                         [glossary: Divergência de Kullback-Leibler (KL)]
 *   KL(p || q) = sum_i p_i (log p_i - log q_i)
 * in   logits of p and of q (n), and the log_sum_exp of each
 * Read it as a mean under p: if tokens are drawn from p, by how many nats are they on average more
 * probable under p than under q? It is 0 only where p and q agree, and never negative (apart from
 * rounding). It is not symmetric: a token that p never draws costs nothing, however much q likes
 * it; a token that p draws and q excludes costs without limit. In RLHF p is the policy and q the
 * reference: the policy should write only what the reference could have written.
 * By hand: p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3) = 0.1438.            test: kl */
static double kl_exact(const float *p_logits, float p_lse, const float *q_logits, float q_lse,
                       size_t n) {
    double kl = 0;
    for (size_t i = 0; i < n; i++) {
        /* p never draws it: 0, not 0 times minus infinity, which is NaN */
        if (p_logits[i] == -INFINITY)
            continue;
        /* log softmax of each, by one subtraction (see log_sum_exp) */
        float log_p = p_logits[i] - p_lse;
        float log_q = q_logits[i] - q_lse;
        /* by how much they differ, weighted by how often p writes the token */
        kl += (double)exp_fast(log_p) * (log_p - log_q);
    }
    return kl;
}

/* kl_k1, kl_k3 -- KL(p || q) estimated from one token that was drawn from p [20].
 *                                         [glossary: Divergência de Kullback-Leibler (KL)]
 *   k1 = log p - log q          k3 = e^d - 1 - d,   d = log q - log p
 * The exact sum needs both distributions over the whole vocabulary; an estimate needs only the two
 * log-probabilities of the token that was drawn. Both estimates are unbiased: averaged over tokens
 * drawn from p they give KL(p || q); for k3, the mean of -d is KL, that of e^d - 1 = q/p - 1 is 0.
 * Can KL be negative? The true one never is, but k1 of one token is negative whenever q finds that
 * token more probable than p does. k3 is never negative and varies less. TRL's PPO uses k1 in the
 * reward, and so does align; GRPO uses k3.
 * By hand: p = 0.5, q = 0.25: k1 = ln 2 = 0.6931; d = -0.6931, k3 = 0.5 - 1 + 0.6931 = 0.1931.
 *                                                                                      test: kl */
static double kl_k1(double log_p, double log_q) {
    return log_p - log_q;
}

static double kl_k3(double log_p, double log_q) {
    double d = log_q - log_p;
    /* expm1(d) is e^d - 1 without the rounding of e^d: for p = q the result must be 0, and close to
     * it d^2 / 2, which is far below the rounding of e^d. */
    return expm1(d) - d;
}

/* sequence_logprob -- the log-probability of a whole answer: the course's omega.
 *                            [glossary: Função Omega (ω)] [glossary: Log-probabilidade]
 *   log pi(y|x) = sum_t log pi(y_t | x, y_1 .. y_t-1)
 * in   token_logprobs (n), nats: each token's log-probability, given all tokens before it
 * An answer is a chain of choices. The probability of the chain is the product of the probabilities
 * of its links, and the logarithm turns it into a sum. Longer answers have lower sums: a method
 * that compares answers of different lengths (DPO's IPO variant) divides by the length.
 * By hand: probabilities 0.5, 0.25: -0.6931 - 1.3863 = -2.0794 = ln 0.125.
 *                                                                                      test: kl */
static double sequence_logprob(const float *token_logprobs, size_t n) {
    /* In double: a KL is a difference of two such sums, in which the rounding of hundreds of floats
     * would show. */
    double sum = 0;
    for (size_t t = 0; t < n; t++)
        sum += token_logprobs[t];
    return sum;
}

/* =============================================================================================
 * Chapter 3 - Preferences: Bradley-Terry, the sentiment classifier
 *                           [glossary: Função de recompensa] [glossary: Modelo Bradley-Terry]
 *
 * How does "I like this answer better" become a number that a program can raise? People rarely
 * agree about "7 out of 10", but they do agree about "better". Bradley and Terry's model [9]
 * gives each text a reward r, a number without a unit, of which only differences count:
 *
 *     probability that a is preferred to b  =  sigmoid(r_a - r_b)
 *
 *     r_good = 2.0, r_bad = 0.5:   sigmoid(1.5) = 0.82: eight readers in ten prefer the first
 *
 * The rewards are a network's output. The network is trained to make the preferences that people
 * gave probable: the loss of a pair is minus the logarithm of that probability.
 *
 * What enters: rewards of texts (a reward model's outputs) and who was preferred to whom. What
 * leaves: a loss in nats, and its derivative by each reward, from which the backward pass starts.
 * ============================================================================================= */

/* One comparison: the places of the two texts in a list, and by how much the chosen one's reward
 * must exceed the other (more than 0 if the rater said "much better"; usually 0). */
struct Pair {
    size_t chosen, rejected;
    double margin;
};

/* The comparisons of text i with the texts after it: at most n - 1 - i. */
static size_t pairs_of_rating(const double *rating, size_t i, size_t n, double min_difference,
                              struct Pair *pairs) {
    size_t count = 0;
    /* only j > i: each pair is compared once */
    for (size_t j = i + 1; j < n; j++) {
        /* Too close to call. Such a pair would teach the model noise. */
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
    /* n ratings give up to n (n - 1) / 2 comparisons: this is how one reader's work becomes much
     * training data */
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
 *      center_rewards_coefficient, usually 0
 * The first term is the negative log-likelihood of what the rater said. Its derivative by the
 * difference is -sigmoid(-difference): -1/2 where the model is undecided, near 0 where it is
 * sure and right, near -1 where it is sure and wrong. The two sides are pushed apart equally.
 * The second term: since only differences count, all rewards could drift up or down together. It
 * pulls each pair's sum towards zero, and so gives the rewards a zero point.
 * By hand: 2.0 against 0.5: loss -log sigmoid(1.5) = 0.2014, dchosen -0.1824, drejected 0.1824;
 * with center 0.01: loss 0.2014 + 0.01 * 6.25 = 0.2639, dchosen -0.1324, drejected 0.2324.
 *                                                     test: bradley_terry, bradley_terry_gradient
 * gdb: break bradley_terry_pair */
static struct PairLoss bradley_terry_pair(double chosen, double rejected, double margin,
                                          double center) {
    /* 1. The difference is what the rater's preference is about; the sum is what centering pulls
     *    to zero. */
    double difference = chosen - rejected - margin;
    double sum = chosen + rejected;

    /* 2. The loss. With a margin it is not enough to be right: a lead of just the margin still
     *    costs ln 2. */
    double loss = -log_sigmoid(difference) + center * sum * sum;

    /* 3. Its slopes: d/dx -log sigmoid(x) = -sigmoid(-x), and d/ds s^2 = 2 s. The chosen reward
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
 * out  dreward (texts), set: d loss / d reward. A text that occurs in several pairs collects the
 *      slopes of all of them; one that occurs in none gets 0.          test: bradley_terry */
static double bradley_terry_loss(const float *reward, size_t texts, const struct Pair *pairs,
                                 size_t n, double center, float *dreward) {
    /* 1. Zero first: below, slopes are added, since a text may occur in several pairs. */
    double loss = 0;
    for (size_t t = 0; t < texts; t++)
        dreward[t] = 0;

    /* 2. Pair by pair. Each contributes 1 / n to the mean, in the loss and in its slopes. */
    for (size_t i = 0; i < n; i++) {
        const struct Pair *pair = &pairs[i];
        struct PairLoss one =
            bradley_terry_pair(reward[pair->chosen], reward[pair->rejected], pair->margin, center);
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
 * The binary cross-entropy: Bradley-Terry's sigmoid, of r alone instead of a difference. So here
 * the zero point matters: sigmoid(r) is the probability that the text is liked, which the course's
 * sentiment pipeline calls the score of POSITIVE. The slope is the prediction minus the truth.
 * By hand: r = 2, label 0: -log sigmoid(-2) = 2.1269; slope sigmoid(2) = 0.8808.
 *                                                                          test: sentiment_loss */
static double sentiment_loss(const float *reward, const double *label, size_t n, float *dreward) {
    double loss = 0;
    for (size_t i = 0; i < n; i++) {
        /* a label of 1 keeps the first term, a label of 0 the second */
        double liked = label[i] * log_sigmoid(reward[i]);
        double disliked = (1 - label[i]) * log_sigmoid(-reward[i]);
        loss -= (liked + disliked) / (double)n;
        /* The two terms' slopes, -label sigmoid(-r) and (1 - label) sigmoid(r), add up to this. */
        dreward[i] = (float)((sigmoid(reward[i]) - label[i]) / (double)n);
    }
    return loss;
}

/* =============================================================================================
 * Chapter 4 - Policy gradient: REINFORCE, rewards with a KL penalty, GAE, PPO
 *                                                       [glossary: Gradiente de política]
 *
 * How can a model learn from a score that it gets only after its answer is complete, from a judge
 * who cannot be differentiated? It answers, learns how good the answer was, and then makes good
 * answers more probable and bad ones less. A model used in this way is a policy: pi(y|x) is the
 * probability that it answers y to the prompt x. Training is to raise the objective
 *
 *     J(pi) = E_{y ~ pi} [ score(x, y) ] - beta KL(pi || pi_ref)               [10] [4]
 *                                                            [glossary: Função objetivo]
 *
 * E_{y ~ pi} is the mean over answers y drawn from pi. An estimate of a mean is unbiased if it is
 * right on average, however far off each single one is. grad is the derivative by all weights.
 * The KL term ties the policy to the reference, the model before training: without it the policy
 * would find whatever nonsense fools the reward model. beta is the price of a nat of KL. The score
 * is the judge's; R(y) = score - beta (log pi(y) - log pi_ref(y)); a token's reward is its share
 * of R(y).
 *
 * The chapter goes one step at a time; each step mends a weakness of the one before:
 *   REINFORCE        score times grad log pi: unbiased, but very noisy
 *   a baseline       subtract what was expected anyway: still unbiased, less noise
 *   KL per token     the penalty is paid where the policy departs, token by token
 *   GAE              which token earned the score? A value head learns what to expect at each
 *                    token; a token's advantage is how much better than that things went
 *   PPO              use the same answers for several updates, but stop before they are outdated
 *
 * One answer through the whole chapter (beta 0.2, score 1.0, gamma 1, lambda 0.95, clip 0.2):
 *
 *     token            " very"   " good"     "."
 *     log pi            -1.20     -0.50    -0.10     of the policy that wrote it
 *     log pi_ref        -1.70     -0.50    -0.20     of the reference
 *     KL estimate        0.50      0.00     0.10     kl_k1
 *     reward            -0.10      0.00     0.98     kl_reward; the last includes the score, 1.0
 *     value              0.50      0.40     0.30     the value head's guess, made before the token,
 *                                                    of the sum of rewards from this token on
 *     delta             -0.20     -0.10     0.68     gae_step: reward + next value - value
 *     advantage          0.3187    0.546    0.68     gae_step: delta + 0.95 * next advantage
 *     return             0.8187    0.946    0.98     advantage + value: the value head's target
 *     whitened          -1.0742    0.1703   0.9039   whiten: the advantages with mean 0, variance 1
 *   and at a later update, when the policy has moved:
 *     log pi now        -1.10     -0.30    -0.15     " good" has become much more probable
 *     ratio              1.1052    1.2214   0.9512   ppo_token_loss: e^(log pi now - log pi)
 *     loss               1.1872   -0.2043  -0.8598   " good" counts as 1.2 times its advantage
 *     slope              0.3957    0       -0.2866   d loss / d log pi now, divided by 3: a mean
 *
 * The last line is what goes back into the model: " very" is to become less probable, "." more,
 * and " good" is not pushed any further by its own loss. It may still move, by other tokens'
 * gradients and Adam's momentum: its ratio, 1.2214, is beyond 1.2 already.
 * All three advantages are positive (two deltas are not, but the last surprise, 0.68, outweighs
 * them): why is " very" lowered? Whitening subtracts their mean, 0.515, and it was the least good.
 * A real batch has thousands of tokens, of good and of bad answers; with one answer alone the
 * example shows the arithmetic, but exaggerates.
 *
 * What enters: log-probabilities, scores and values, per token or per answer. What leaves:
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
    /* A second pass over x. One pass, sum x^2 - n mean^2, would subtract two large numbers that are
     * nearly equal, and lose their digits. */
    double mean = mean_of(x, n);
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (x[i] - mean) * (x[i] - mean);
    return n > 1 ? sum / (double)(n - 1) : 0;
}

/* whiten -- numbers of any size become numbers of mean 0 and variance 1.
 *   x = (x - mean) / sqrt(variance + 1e-8)
 * in, out  x (n)       shift_mean: false adds the old mean again, so that only the scale changes
 * Advantages on one scale need only one learning rate, whatever the reward model's unit is. And
 * some tokens of a batch are raised, others lowered: the worse of two good ones goes down.
 * (The mean that is subtracted contains each token's own advantage, as a baseline should not, see
 * reinforce_advantages; among thousands that hardly matters.) Returns what a zero would have
 * become.
 * By hand: 1, 2, 6: mean 3, variance 7: -0.7559, -0.3780, 1.1339.     test: ppo_whiten_golden */
static double whiten(float *x, size_t n, bool shift_mean) {
    /* Without the 1e-8, equal numbers, whose variance is 0, would become infinite or NaN. */
    double mean = mean_of(x, n);
    double scale = 1 / sqrt(unbiased_variance(x, n) + 1e-8);
    double back = shift_mean ? 0 : mean;
    for (size_t i = 0; i < n; i++)
        x[i] = (float)((x[i] - mean) * scale + back);
    return (0 - mean) * scale + back;
}

/* ---- REINFORCE ------------------------------------------------------------------------------ */

/* What is subtracted from an answer's reward before the policy learns from it. */
enum Baseline {
    BASELINE_NONE,
    BASELINE_MEAN,
    BASELINE_RLOO,
};

/* REINFORCE [19] rests on one trick. J is a mean over answers that the policy draws; when the
 * weights change, it is their probabilities that change. So differentiate those:
 *                                                       [glossary: Truque da log-derivada]
 *     grad J = grad sum_y pi(y) R(y) = sum_y grad pi(y) R(y)
 *            = sum_y pi(y) grad log pi(y) R(y)         because grad pi = pi grad log pi
 *            = E_{y ~ pi} [ R(y) grad log pi(y) ]
 * In the last line the probabilities are the weights of a mean again, so a few sampled answers give
 * an estimate. R is only evaluated, never differentiated: it may come from a program or a person.
 * With the KL term inside, R(y) = score(y) - beta (log pi(y) - log pi_ref(y)) depends on the
 * weights too: grad J has a second term, E[grad R] = -beta E[grad log pi]. But that is nothing:
 *     E_{y ~ pi} [ grad log pi(y) ] = sum_y grad pi(y) = grad 1 = 0
 * since probabilities always sum to 1. For the same reason a baseline b that does not depend on y
 * may be subtracted: E[b grad log pi] = 0. The mean gradient stays, its noise falls. If all
 * answers score 100 or more, those that score 104 should be raised, and those that score 101
 * lowered.
 *   none   b = 0
 *   mean   b = the mean R of all earlier steps
 *   rloo   b = the mean R of the other answers to the same prompt (leave one out)      [23] */

struct ReinforceConfig {
    enum Baseline baseline;
    size_t batch_size; /* answers of a step */
    size_t num_generations; /* answers to each prompt, side by side */
    double beta; /* the price of a nat of KL              [glossary: Parâmetro Beta (β)] */
};

/* reinforce_advantages -- R(y_i) - b for n answers.              [glossary: Linha de base]
 * in   rewards (n): the R of each; the num_generations answers to one prompt are neighbours;
 *      running_mean: for BASELINE_MEAN                                      out  advantages (n)
 * By hand: R = 1, 2, 6 of one prompt, rloo: 1 - (2 + 6) / 2 = -3, 2 - 3.5 = -1.5, 6 - 1.5 = 4.5.
 *                                                                    test: reinforce_advantages */
static void reinforce_advantages(enum Baseline baseline, const float *rewards, size_t n,
                                 size_t num_generations, double running_mean, float *advantages) {
    for (size_t i = 0; i < n; i++) {
        /* The expectation b must not contain this answer's own R, or E[b grad log pi] would not be
         * 0. All three keep to that: nothing, earlier steps, the other answers. */
        double b = 0;
        if (baseline == BASELINE_MEAN)
            b = running_mean;
        if (baseline == BASELINE_RLOO) {
            /* leave one out: the group's sum without this answer, divided by the others' number */
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
 * objective with a minus sign. Only its gradient means anything, not its value: A counts as a
 * constant, although it was computed from the policy's answer.
 * By hand: A = 4.5 and -3, log pi = -2 and -1: -(4.5 * -2 + -3 * -1) / 2 = 3; slopes -2.25, 1.5.
 *                                                      test: reinforce_loss, reinforce_gradient */
static double reinforce_loss(const float *advantages, const double *logps, size_t n,
                             double *dlogps) {
    double loss = 0;
    for (size_t i = 0; i < n; i++) {
        /* Linear in log pi, so the slope is the same wherever log pi is: nothing here stops an
         * update from going too far. PPO's clip does. */
        loss -= advantages[i] * logps[i] / (double)n;
        dlogps[i] = -advantages[i] / (double)n;
    }
    return loss;
}

/* ---- Rewards with a KL penalty for each token ----------------------------------------------- */

/* PPOConfig of TRL 0.11, in its names.             [glossary: Classe de configuração PPO] */
struct PPOConfig {
    size_t batch_size; /* answers of a step */
    size_t mini_batch_size; /* answers of one forward and backward pass */
    size_t gradient_accumulation_steps;
    size_t ppo_epochs; /* how often the answers of a step are used */
    double init_kl_coef; /* beta at the start         [glossary: Parâmetro Beta (β)] */
    bool adap_kl_ctrl; /* let a controller adapt beta: */
    double target, horizon; /* to this KL, in nats per answer; over about this many answers */
    /* how a token's divergence is measured: see kl_penalty_token */
    enum KLPenalty { KL_PENALTY_KL, KL_PENALTY_ABS, KL_PENALTY_MSE, KL_PENALTY_FULL } kl_penalty;
    double gamma, lam; /* discount and lambda of gae_step */
    double cliprange; /* of the ratio, in ppo_token_loss */
    double cliprange_value; /* of the value, in ppo_value_loss */
    double vf_coef; /* weight of the value loss in the total */
    bool whiten_rewards; /* before GAE */
    bool use_score_scaling; /* divide scores by their running standard deviation */
    bool use_score_norm; /* and subtract their running mean first */
    double score_clip; /* scores are limited to +- this; 0: no limit */
    double ratio_threshold; /* a mini-batch whose mean ratio exceeds it is skipped */
    bool early_stopping; /* end a step's epochs once the policy has moved too far: */
    double target_kl; /* by more than 1.5 times this, in nats per token */
};

/* kl_penalty_token -- how far one token took the policy from the reference.
 *                                         [glossary: Divergência de Kullback-Leibler (KL)]
 *   kl    log pi - log pi_ref, kl_k1: unbiased, may be negative (the default)
 *   abs   its magnitude           mse   half of kl squared; neither has a sign
 *   full  the exact KL of the two distributions at this position, given as `full`
 * By hand: -1.20 against -1.70: kl 0.50, abs 0.50, mse 0.125.     test: ppo_penalties_golden */
static float kl_penalty_token(enum KLPenalty kind, float logprob, float ref_logprob, float full) {
    float difference = (float)kl_k1(logprob, ref_logprob);
    /* Without a sign, a token also costs where the policy finds it less probable than the reference
     * does; with one, it earns there. Of the three estimates from the drawn token alone, only the
     * signed one has the KL as its mean. */
    if (kind == KL_PENALTY_ABS)
        return fabsf(difference);
    if (kind == KL_PENALTY_MSE)
        return 0.5f * difference * difference;
    return kind == KL_PENALTY_FULL ? full : difference;
}

/* kl_reward -- the reward of a token for its divergence: usually negative, since it is a cost.
 *                                                        [glossary: Parâmetro Beta (β)]
 *   reward_t = -beta kl_t           and at the answer's last token   + score
 * J's penalty is about whole answers; why may it be paid token by token? log pi(y|x) is a sum over
 * tokens, so log pi(y|x) - log pi_ref(y|x) = sum_t kl_t, whose mean over the policy's answers is
 * KL(pi || pi_ref). Each token pays its own term of the sum, where it departs. The score judges
 * the whole answer, so it can be given only once that is complete: at the last token
 * (ppo_rewards). How it reaches the earlier tokens: gae_step. The penalty is paid once, by the
 * policy that wrote the answers, and stays as it is while PPO uses them for several updates.
 * kl_coef is beta as it is now.
 * By hand: beta 0.2: a divergence of 0.50 costs 0.10; one of -0.30 earns 0.06.
 *                                             test: ppo_advantages_golden; gdb: break kl_reward */
static float kl_reward(double kl_coef, float kl) {
    /* A divergence costs, hence the minus sign. It counts as a number: no gradient flows through
     * the pi in it. For kl the missing term is 0 on average (see the essay on REINFORCE); for abs,
     * mse and full it is not, and is left out as in TRL. */
    return (float)(-kl_coef * kl);
}

/* kl_controller_update -- beta is raised while the KL is above its target, lowered below it [10].
 *   beta = beta (1 + error samples / horizon),   error = clip(kl / target - 1, -0.2, 0.2)
 * in   kl: this step's mean, nats per answer; samples: how many answers the step had
 * A fixed beta would have to be found by trial for each reward model, while a KL of some nats means
 * the same for all of them.
 * By hand: beta 0.2, target 6, horizon 10000, 128 samples: KL 30 -> 0.2 (1 + 0.2 * 0.0128) =
 * 0.200512; KL 0 -> 0.199488.                                           test: ppo_kl_controller */
static double kl_controller_update(const struct PPOConfig *config, double kl_coef, double kl,
                                   size_t samples) {
    if (!config->adap_kl_ctrl)
        return kl_coef;
    /* 1. The relative error, at most 20 %: one odd batch must not upset beta. */
    double error = MAX(-0.2, MIN(0.2, kl / config->target - 1));

    /* 2. Scaled by the batch's share of the horizon, so beta moves slowly: at the limit of 20 %, by
     *    a factor of about e^0.2 = 1.22 in `horizon` answers. */
    return kl_coef * (1 + error * (double)samples / config->horizon);
}

/* ---- Generalized advantage estimation ------------------------------------------------------- */

/* gae_step -- the advantage of one token, given that of the next [7].
 *           [glossary: Vantagem] [glossary: Estimativa generalizada de vantagem (GAE)]
 *   delta_t = reward_t + gamma value_{t+1} - value_t
 *   A_t     = delta_t + gamma lambda A_{t+1}                    [7] Eq. 16, as a recursion
 * value_t is what the value head expects, before token t is written, of all rewards from t on.
 * delta_t is the surprise that token t brought: the reward it earned and what is expected after
 * it, minus what was expected before it. After the last token nothing more comes, whether the
 * answer ended by itself or was cut off at its maximum length, as in TRL: value 0, advantage 0.
 * This is how a score on the last token reaches the first: A_t contains delta_{t+1} times
 * gamma lambda, delta_{t+2} times its square, and so on. In the example the score of 1.0 adds 1 to
 * the last token's advantage, 0.95 to the one before, 0.95^2 = 0.9025 to the first.
 * gamma discounts: a reward that comes k tokens later counts gamma^k times. Answers are short, so
 * RLHF leaves it at 1. lambda says how far to trust the value head. At 0, A_t is delta_t: what is
 * still to come is the head's next guess alone. That has little noise, but is wrong as long as the
 * head is, and earlier tokens learn of the score only as the head learns to expect it. At 1 (with
 * gamma 1), A_t is the sum of all rewards from t on, minus value_t: what the head says of later
 * positions has cancelled, and value_t is no more than a baseline (unbiased, but noisy). In the
 * chapter's example: -0.20 - 0.10 + 0.68 = 0.38 = (-0.10 + 0 + 0.98) - 0.50.
 * By hand: the chapter's last token: delta = 0.98 + 0 - 0.3 = 0.68, A = 0.68. The one before it:
 * delta = 0 + 0.3 - 0.4 = -0.1, A = -0.1 + 0.95 * 0.68 = 0.546.
 *                                   test: gae_hand, ppo_advantages_golden; gdb: break gae_step */
static double gae_step(double reward, double value, double next_value, double next_advantage,
                       double gamma, double lam) {
    /* 1. The surprise. A reward that was expected in full is no surprise: delta is 0. */
    double delta = reward + gamma * next_value - value;

    /* 2. Plus a share of all later surprises, already summed in next_advantage: token t may have
     *    made them possible. */
    return delta + gamma * lam * next_advantage;
}

/* gae -- advantages and returns of one answer of T tokens, from its last token to its first.
 * in   rewards, values (T); next_advantage: 0, except in ppo_padding_advantage's case
 * out  advantages (T): how much better each token was than the value head expected
 *      returns (T): advantage + value, the value head's target: its guess, corrected by the
 *      surprises that followed; at lambda 1 (gamma 1) it is the plain sum of rewards from t on
 *                                                         test: gae_hand, ppo_advantages_golden */
static void gae(const struct PPOConfig *config, size_t T, const float *rewards, const float *values,
                double next_advantage, float *advantages, float *returns) {
    /* From right to left, since A_t needs A_{t+1}. After the last token nothing is expected. */
    double next_value = 0;
    for (size_t t = T; t-- > 0;) {
        double advantage =
            gae_step(rewards[t], values[t], next_value, next_advantage, config->gamma, config->lam);
        advantages[t] = (float)advantage;
        /* in hindsight the value was off by the advantage */
        returns[t] = (float)(advantage + values[t]);
        /* what the token before this one needs to know of it */
        next_value = values[t];
        next_advantage = advantage;
    }
}

/* ---- PPO's two losses ----------------------------------------------------------------------- */

/* The policy's loss on one token. */
struct TokenLoss {
    double loss;
    double dlogprob; /* d loss / d logprob */
    double ratio; /* how many times as likely the token is as when it was sampled */
    bool is_clipped; /* the loss no longer depends on the ratio */
};

/* ppo_token_loss -- PPO's clipped objective for one token of an answer.
 *                                     [glossary: Otimização de política proximal (PPO)]
 *                                            [glossary: Razão de probabilidades e corte]
 * The token was sampled when its log-probability was old_logprob. Since then the policy has moved,
 * because the same answers serve several updates. How far may this one go on pushing the token in
 * the direction of its advantage A?
 *   ratio = exp(logprob - old_logprob)
 *   loss  = max(-A ratio, -A clip(ratio, 1 - e, 1 + e)),   e = clip_range           [6] Eq. 7
 * Once the ratio has left [1 - e, 1 + e] in the direction of A (above it where A > 0, below it
 * where A < 0), the loss no longer depends on it: the slope is zero, and this batch moves the token
 * no further. If it has left in the other direction, the token is still pulled back. Without the
 * clip, a few updates on the same answer could make one lucky token certain.
 * At the first update the policy is the one that sampled: every ratio is 1 and the loss is -A.
 * The advantages of a batch are whitened, so its mean loss is 0; its gradient is not.
 * in   log-probabilities in nats; advantage (whitened); clip_range, usually 0.2
 * By hand, e = 0.2 (slope: by logprob, which is the slope by ratio, times ratio):
 *                        A = 2                            A = -2
 *     ratio 1.5          max(-3.0, -2.4), slope 0         max(3.0, 2.4), slope 3.0
 *     ratio 0.5          max(-1.0, -1.6), slope -1.0      max(1.0, 1.6), slope 0
 *                               test: ppo_token_loss, ppo_loss_golden; gdb: break ppo_token_loss */
static struct TokenLoss ppo_token_loss(double old_logprob, double logprob, double advantage,
                                       double clip_range) {
    /* 1. How many times as likely is the token now as when it was sampled? */
    double ratio = exp(logprob - old_logprob);

    /* 2. The larger of two losses counts: an improvement is believed only as far as the clip range,
     *    a deterioration always. */
    double clipped_ratio = MAX(1 - clip_range, MIN(1 + clip_range, ratio));
    double plain_loss = -advantage * ratio;
    double clipped_loss = -advantage * clipped_ratio;
    bool is_clipped = clipped_loss > plain_loss;

    /* 3. d ratio / d logprob = ratio, so the plain loss is its own derivative. The clipped one is
     *    constant outside the range, and inside it the two are the same. */
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
 *             [glossary: AutoModelForCausalLMWithValueHead] [glossary: Função de valor]
 *   clipped = clip(value, old_value - clip_range, old_value + clip_range)
 *   loss    = 1/2 max((value - return)^2, (clipped - return)^2)
 * in   old_value: what the head said when the answer was written; value: what it says now;
 *      target_return: what it should have said (gae)
 * The clip is TRL's and OpenAI's: once the head has moved by clip_range towards the return, it is
 * not pulled further; if it has moved away from it, it is pulled back.
 * By hand: old 0.5, value 0.9, return 1.0, clip_range 0.2: clipped 0.7, squared errors 0.01 and
 * 0.09, loss 0.045, slope 0: the clipped value does not depend on the value.
 *                                                        test: ppo_value_loss, ppo_loss_golden */
static struct ValueLoss ppo_value_loss(double old_value, double value, double target_return,
                                       double clip_range) {
    /* 1. The value, kept near the old one as the policy's ratio is kept near 1. */
    double clipped = MAX(old_value - clip_range, MIN(old_value + clip_range, value));

    /* 2. The larger of two squared errors counts: moving further than clip_range earns nothing. */
    double error = value - target_return;
    double clipped_error = clipped - target_return;
    bool is_clipped = clipped_error * clipped_error > error * error;

    /* 3. The slope of half a square is the error. Where the clipped error is the larger one, the
     *    value is outside the range, and moving it changes nothing. */
    double dvalue = is_clipped ? 0 : error;
    return (struct ValueLoss){
        .loss = 0.5 * MAX(error * error, clipped_error * clipped_error),
        .dvalue = dvalue,
        .squared_error = error * error,
        .is_clipped = is_clipped,
    };
}

/* The R response tokens of a mini-batch in one row: what was known when the answers were
 * written, what the policy says now, and the losses and slopes that ppo_loss fills in. */
struct PPOTokens {
    size_t R;
    float *old_logprobs, *old_values, *advantages, *returns; /* (R) from the rollout */
    const float *logprobs, *values; /* (R) of the policy now */
    struct TokenLoss *policy; /* (R) each token's loss */
    struct ValueLoss *value; /* (R) the same for the value head */
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
    /* 1. Every token of every answer contributes 1 / n to the mean, hence to each slope. */
    for (size_t t = 0; t < tokens->R; t++) {
        /* 2. The policy's loss: it reaches the transformer through log pi of this one token. */
        struct TokenLoss policy = ppo_token_loss(tokens->old_logprobs[t], tokens->logprobs[t],
                                                 tokens->advantages[t], config->cliprange);
        loss.policy += policy.loss / n;
        tokens->policy[t] = policy;
        tokens->dlogprobs[t] = (float)(policy.dlogprob / n);

        /* 3. The value head's. Both losses go back into the same transformer; vf_coef keeps the
         *    value loss, whose size depends on the rewards' unit, from drowning the other. */
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
 *    [glossary: Otimização de preferência direta (DPO)] [glossary: Solução em forma fechada]
 *
 * Is all of chapter 4's machinery needed? The objective J(pi) = E[r] - beta KL(pi || pi_ref) has a
 * maximum that can be written down. For one prompt x, omitted here:
 *
 *     pi*(y) = pi_ref(y) e^(r(y)/beta) / Z          Z = sum_y pi_ref(y) e^(r(y)/beta)    [5] Eq. 4
 *                                         [glossary: Distribuição ponderada por recompensa]
 *
 * the reference's distribution, with each answer weighted by e^(reward / beta). For text it is of
 * no direct use: Z, the partition function, sums over all answers, of which there are 10^94 with
 * 20 tokens of GPT-2's vocabulary. But read backwards, solved for the reward, it is of great use:
 *
 *     r(y) = beta log(pi*(y) / pi_ref(y)) + beta log Z                                   [5] Eq. 5
 *
 * Any policy pi is the best one for some reward: for beta log(pi / pi_ref), plus a constant for
 * each prompt. So take that as the reward, put it into Bradley-Terry's loss, and train pi itself:
 * it is a reward model that is already its own best policy. Only the difference of two rewards
 * counts there; both answers of a pair, c chosen and d rejected, belong to the same prompt, so
 * beta log Z cancels: r(c) - r(d) = beta log(pi(c) / pi_ref(c)) - beta log(pi(d) / pi_ref(d)).
 * Pairs train the policy directly: no reward model, no sampling, no value head.
 *
 *     reference         chosen -10.0    rejected -12.0        log-probabilities of whole answers
 *     policy            chosen  -8.0    rejected -13.0
 *     implied reward    0.1 * 2.0 = 0.2         0.1 * -1.0 = -0.1       beta = 0.1
 *     loss              -log sigmoid(0.2 - (-0.1)) = 0.5544
 *
 * What enters: log pi(y|x) of chosen and rejected answers under policy and reference, in nats,
 * each summed over the answer's tokens. What leaves: a loss and its derivatives by them.
 * ============================================================================================= */

/* Divides n weights, given by their logarithms, by their sum: afterwards they are the logarithms of
 * probabilities. Returns the logarithm of the sum. */
static double normalize_logps(double *logps, size_t n) {
    /* 1. the largest is subtracted first, for the reason given at softmax */
    double largest = -INFINITY;
    for (size_t i = 0; i < n; i++)
        largest = MAX(largest, logps[i]);

    /* 2. log_sum_exp, in double */
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += exp(logps[i] - largest);
    for (size_t i = 0; i < n; i++)
        logps[i] -= largest + log(sum);
    return largest + log(sum);
}

/* exact_optimum -- the best policy, where all answers can be listed.
 *            [glossary: Distribuição ponderada por recompensa] [glossary: Função de partição]
 * in   ref_logps, r (n): log pi_ref(y) in nats and the reward of every answer; beta
 * out  optimum (n): log pi*(y);   returns log Z
 * Why can no policy do better? Substitute r = beta log Z + beta log(pi* / pi_ref) in J:
 *   J(pi) = E_pi[r] - beta E_pi[log(pi / pi_ref)]
 *         = beta log Z + beta E_pi[log(pi* / pi_ref) - log(pi / pi_ref)]
 *         = beta log Z - beta E_pi[log(pi / pi*)]                      pi_ref has cancelled
 *         = beta log Z - beta KL(pi || pi*)
 * beta log Z does not depend on pi, and the KL is 0 for pi = pi* and positive for any other. So pi*
 * is the maximum, and J(pi*) = beta log Z.                                 [5] appendix A.1
 * By hand: pi_ref = (1/2, 1/2), r = (0, beta ln 3): Z = 1/2 + 3/2 = 2, pi* = (1/4, 3/4) and
 * J(pi*) = beta ln 2.                                                       test: exact_optimum */
static double exact_optimum(const double *ref_logps, const double *r, size_t n, double beta,
                            double *optimum) {
    /* 1. Each answer's log-weight: log(pi_ref e^(r/beta)). */
    for (size_t i = 0; i < n; i++)
        optimum[i] = ref_logps[i] + r[i] / beta;

    /* 2. Divided by their sum, which is Z, the weights become probabilities. */
    return normalize_logps(optimum, n);
}

/* implied_reward -- what a policy says an answer is worth, up to a constant that all answers to
 * the prompt share: beta log(pi(y|x) / pi_ref(y|x)).      [glossary: Modelo de referência]
 * TRL logs it as rewards/chosen and rewards/rejected. It is positive if the answer has become more
 * probable.      By hand: beta 0.1, -8 against -10: 0.2.     [5] Eq. 5        test: dpo_hand */
static double implied_reward(double beta, double logp, double ref_logp) {
    /* without beta log Z: nobody can compute it, and in a difference it cancels anyway */
    return beta * (logp - ref_logp);
}

/* One side of a pair, the chosen or the rejected answer. */
struct DPOSide {
    double logp; /* log pi(y|x), nats, summed over the answer's tokens */
    double ref_logp; /* the same under the reference, which never changes */
    size_t length; /* how many tokens were summed */
    double dlogp; /* out: d loss / d logp */
};

/* dpo_pair_loss -- Direct Preference Optimization, one pair.                    [glossary: DPO]
 *   logits = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected)
 *   loss   = -log sigmoid(beta logits)                                                [5] Eq. 7
 * (`logits` is TRL's name for this one number; these are not chapter 2's logits.) This is
 * Bradley-Terry's loss with the implied rewards in place of a reward model's. By the slope of
 * log_sigmoid, its derivatives are
 *   d loss / d logits        = -beta sigmoid(-beta logits)
 *   d loss / d logp_chosen   = d loss / d logits      negative: a step downhill raises logp_chosen
 *   d loss / d logp_rejected = -d loss / d logits     positive: and lowers logp_rejected
 * By the policy's weights it is, by the chain rule,
 *   grad loss = -beta sigmoid(-beta logits) (grad logp_chosen - grad logp_rejected)
 * and since each logp is a sum over tokens, every token of the chosen answer gets dchosen, every
 * token of the rejected one drejected (target_logps_backward).
 * The sigmoid says how wrong the policy still is about this pair: a pair that it has learnt pulls
 * less and less. The reference is the zero point, but no limit: the loss goes on falling as
 * `logits` grows (dpo_ipo_pair has a limit). beta is a temperature: a small one lets the policy go
 * far before a pair is learnt, since `logits` has to reach about 1 / beta nats; a large one keeps
 * it near. At the start policy and reference agree: logits 0, loss ln 2 = 0.6931 for any beta.
 * By hand: beta 0.1, chosen -8 (reference -10), rejected -13 (-12): logits 2 - (-1) = 3, loss
 * -log sigmoid(0.3) = 0.5544, dchosen -0.1 * sigmoid(-0.3) = -0.0426, drejected 0.0426.
 *                                       test: dpo_hand, dpo_golden; gdb: break dpo_pair_loss */
static struct PairLoss dpo_pair_loss(double beta, const struct DPOSide *chosen,
                                     const struct DPOSide *rejected) {
    /* 1. By how much has each answer become more probable than under the reference? How probable it
     *    is in itself does not matter: a long answer may have -500 and a short one -20. */
    double chosen_logratio = chosen->logp - chosen->ref_logp;
    double rejected_logratio = rejected->logp - rejected->ref_logp;

    /* 2. The difference of the implied rewards (except for the factor beta), in which beta log Z
     *    has cancelled. */
    double logits = chosen_logratio - rejected_logratio;

    /* 3. Bradley-Terry's loss, and its slope by the chosen side's log-probability; the rejected
     *    side enters with a minus sign. A learnt pair has a large beta * logits, so the sigmoid is
     *    near 0 and the pair hardly pulls any more. */
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
    double label_smoothing; /* share of pairs whose labels may be swapped */
    double weight[DPO_LOSS_TYPES]; /* of each loss; 0: unused (TRL: loss_type, loss_weights) */
};

/* dpo_smoothed_pair -- DPO where chosen and rejected may have been swapped, with probability e.
 *   sigmoid  -(1-e) log sigmoid(s) - e log sigmoid(-s),   s = beta logits: conservative DPO,
 *            which stops at a finite margin (TRL 0.11; TRL 1.16 ignores e for this loss)
 *   robust   (-(1-e) log sigmoid(s) + e log sigmoid(-s)) / (1 - 2e): unbiased, as if no label
 *            had been wrong                                                               [14]
 * By hand: s = 0.3, e = 0.1: sigmoid 0.9 * 0.5544 + 0.1 * 0.8544 = 0.5844; robust
 * (0.9 * 0.5544 - 0.1 * 0.8544) / 0.8 = 0.5169.                     test: dpo_hand, dpo_golden */
static struct PairLoss dpo_smoothed_pair(double beta, double logits, double e, bool robust) {
    /* 1. The loss if the label is right, and if it is wrong, each weighted by its probability. */
    double s = beta * logits;
    double right = -(1 - e) * log_sigmoid(s);
    double wrong = -e * log_sigmoid(-s);

    /* 2. Conservative: their sum, a mean. Robust: the second is subtracted, and the scale makes up
     *    for that. Averaged over right and wrong labels, what the wrong ones add then cancels. */
    double scale = robust ? 1 / (1 - 2 * e) : 1;
    double loss = robust ? scale * (right - wrong) : right + wrong;

    /* 3. The slopes: d/ds log sigmoid(s) = sigmoid(-s) and d/ds log sigmoid(-s) = -sigmoid(s). */
    double dright = -(1 - e) * sigmoid(-s);
    double dwrong = e * sigmoid(s);
    double ds = robust ? scale * (dright - dwrong) : dright + dwrong;
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
    /* a sigmoid's slope only approaches 0, and pulls at learnt pairs for ever; this one stops */
    double ds = s < 1 ? -1 : 0;
    return (struct PairLoss){
        .loss = MAX(0, 1 - s),
        .dchosen = beta * ds,
        .drejected = -beta * ds,
    };
}

/* dpo_ipo_pair -- the difference of the log-ratios should be 1 / (2 beta), no less and no more.
 *                                                                                  [13] Eq. 17
 *   loss = (chosen_logratio / n_chosen - rejected_logratio / n_rejected - 1 / (2 beta))^2
 * Where people always agree, the sigmoid's loss goes on falling for ever as the margin grows,
 * whatever beta is; a square has its minimum at a finite margin. Each side is a mean over its
 * tokens, as in TRL.
 * By hand: beta 0.1, logratios 2 (4 tokens) and -1 (2 tokens): 0.5 + 0.5 - 5 = -4, loss 16,
 * dchosen 2 * -4 / 4 = -2, drejected 2 * 4 / 2 = 4.                 test: dpo_hand, dpo_golden */
static struct PairLoss dpo_ipo_pair(double beta, const struct DPOSide *chosen,
                                    const struct DPOSide *rejected) {
    /* 1. Each side's log-ratio per token, so that long answers do not count more. An answer that
     *    was cut away entirely has length 0: the MAX avoids 0 / 0. */
    double chosen_length = (double)MAX((size_t)1, chosen->length);
    double rejected_length = (double)MAX((size_t)1, rejected->length);
    double chosen_mean = (chosen->logp - chosen->ref_logp) / chosen_length;
    double rejected_mean = (rejected->logp - rejected->ref_logp) / rejected_length;

    /* 2. How far is the difference from where it should be? Beyond the target the slope changes its
     *    sign: the pair is pulled back. */
    double distance = chosen_mean - rejected_mean - 1 / (2 * beta);
    return (struct PairLoss){
        .loss = distance * distance,
        .dchosen = 2 * distance / chosen_length,
        .drejected = -2 * distance / rejected_length,
    };
}

/* The loss of one pair, of the given type. */
static struct PairLoss dpo_variant(const struct DPOConfig *config, enum DPOLossType type,
                                   const struct DPOSide *chosen, const struct DPOSide *rejected) {
    double e = config->label_smoothing;
    double chosen_logratio = chosen->logp - chosen->ref_logp;
    double rejected_logratio = rejected->logp - rejected->ref_logp;
    double logits = chosen_logratio - rejected_logratio;

    /* IPO needs both lengths, so it gets both sides; the others depend on the difference alone */
    if (type == DPO_IPO)
        return dpo_ipo_pair(config->beta, chosen, rejected);
    if (type == DPO_HINGE)
        return dpo_hinge_pair(config->beta, logits);

    /* a function of its own, though e = 0 below gives the same: it is the one to read and debug */
    if (type == DPO_SIGMOID && e == 0)
        return dpo_pair_loss(config->beta, chosen, rejected);
    return dpo_smoothed_pair(config->beta, logits, e, type == DPO_ROBUST);
}

/* dpo_loss -- the mean, over a batch of B pairs, of one type of loss or of a weighted sum of types.
 * in   chosen, rejected (B)           out  the loss; chosen[b].dlogp, rejected[b].dlogp, set
 * Besides the losses of pairs there is `sft`, the mean negative log-likelihood of all chosen
 * tokens. With a small weight it keeps the chosen answers probable, which DPO alone does not: it
 * may lower both sides, as long as the rejected one falls faster.            test: dpo_golden */
static double dpo_loss(const struct DPOConfig *config, size_t B, struct DPOSide *chosen,
                       struct DPOSide *rejected) {
    /* 1. The denominator of sft's mean: all chosen tokens of the batch. */
    double loss = 0;
    double chosen_tokens = 0;
    double sft_weight = config->weight[DPO_SFT];
    for (size_t b = 0; b < B; b++)
        chosen_tokens += (double)chosen[b].length;
    for (size_t b = 0; b < B; b++) {
        /* 2. The pair's losses, each with its weight, as a share 1 / B of the mean. Their slopes
         *    get the same factors. */
        chosen[b].dlogp = 0;
        rejected[b].dlogp = 0;
        for (int type = 0; type < DPO_LOSS_TYPES; type++) {
            double weight = config->weight[type];
            if (weight == 0 || type == DPO_SFT)
                continue;
            struct PairLoss pair =
                dpo_variant(config, (enum DPOLossType)type, &chosen[b], &rejected[b]);
            loss += weight * pair.loss / (double)B;
            chosen[b].dlogp += weight * pair.dchosen / (double)B;
            rejected[b].dlogp += weight * pair.drejected / (double)B;
        }

        /* 3. sft: a mean over tokens, not over pairs. It depends on the chosen side alone, and its
         *    slope never vanishes: there is always some likelihood to gain. */
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
 * The model has said how probable each token is. Which one is written? Always taking the most
 * probable one (greedy: the argmax) makes dull text that repeats itself; drawing from the whole
 * distribution takes, every now and then, one of thousands of improbable tokens, and the sentence
 * breaks. Between these two are the processors of this chapter. They change the logits, in the
 * order of transformers:
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
 * A token's mass is its probability. By default, PPO and REINFORCE draw their own answers without
 * any cut: their formulas are means over what the policy says, not over what a filter leaves of it.
 *
 * What enters: logits (V), and the ids written so far. What leaves: the id of the next token. A
 * logit of minus infinity means a probability of 0: the token is cut.
 * ============================================================================================= */

/* When beam search stops; see beam_search_goes_on. */
enum EarlyStopping {
    STOP_FALSE,
    STOP_TRUE,
    STOP_NEVER,
};

/* transformers' GenerationConfig: the settings that are used here. */
struct GenerationConfig {
    size_t max_new_tokens, min_new_tokens; /* [glossary: Tokens máximos e mínimos] */
    size_t top_k, no_repeat_ngram_size; /* 0: unused */
    size_t num_return_sequences, num_beams; /* one beam: no beam search */
    double temperature, top_p; /* 1: unused */
    double repetition_penalty; /* 1: unused */
    double length_penalty; /* for beam search, like early_stopping */
    enum EarlyStopping early_stopping;
    bool do_sample; /* draw a token; otherwise take the argmax */
};

/* process_repetition_penalty -- tokens that were already written become less likely [15].
 *                                                    [glossary: Penalidade de repetição]
 *   logit = logit / penalty where it is positive, logit * penalty where it is negative
 * Either way it falls, if the penalty is above 1. Each id is penalized once, however often it
 * occurred.
 * By hand: penalty 2: 3 -> 1.5 and -3 -> -6.                         test: generate_processors */
static void process_repetition_penalty(float *logits, size_t V, const int *ids, size_t n,
                                       double penalty) {
    /* A mark for each id already dealt with: without it, an id that occurred twice would be divided
     * twice. */
    char *seen = thread_scratch(SCRATCH_ROW, V, sizeof *seen);
    memset(seen, 0, V);
    for (size_t i = 0; i < n; i++) {
        if (seen[ids[i]])
            continue;
        seen[ids[i]] = 1;
        /* dividing a negative logit by a penalty above 1 would raise it, so it is multiplied */
        float logit = logits[ids[i]];
        logits[ids[i]] = (float)(logit < 0 ? logit * penalty : logit / penalty);
    }
}

/* process_no_repeat_ngram -- no sequence of `ngram` tokens may occur twice.
 * The last ngram - 1 tokens are compared with every earlier place: where the same tokens occurred,
 * the token that followed them there is cut here.
 * By hand: ids 5 6 7 5 6, ngram 3: "5 6" occurred before, and 7 followed: 7 is cut.
 *                                                                    test: generate_processors */
static void process_no_repeat_ngram(float *logits, const int *ids, size_t n, size_t ngram) {
    /* With fewer tokens there is no earlier n-gram to repeat, and `last` would point before ids. */
    if (n < ngram)
        return;
    const int *last = ids + n - (ngram - 1);
    /* i + ngram <= n: the place must have a token after it, which the last one has not yet */
    for (size_t i = 0; i + ngram <= n; i++)
        if (memcmp(ids + i, last, (ngram - 1) * sizeof *ids) == 0)
            logits[ids[i + ngram - 1]] = -INFINITY;
}

/* kth_largest -- the k-th largest of n numbers, 1 <= k <= n, without sorting them: Hoare's
 * selection. Numbers larger than a pivot go to the left, smaller ones to the right, and only the
 * side that contains place k is searched further: about 2n steps instead of n log n. x is left in
 * another order.
 * By hand: (3, 1, 2), k = 2: 2.                                              test: kth_largest */
static float kth_largest(float *x, size_t n, size_t k) {
    /* the k-th largest is always in x[low .. high], and every number to the left of it is larger or
     * equal, every number to the right smaller or equal */
    size_t low = 0;
    size_t high = n - 1;
    while (low < high) {
        /* 1. Partition: two indices walk towards each other and exchange what is on the wrong side
         *    of the pivot, until they meet. The pivot comes from the middle: taken from an end, it
         *    would split sorted numbers into 1 and n - 1, which takes n^2 steps. */
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
        /* 2. x[low .. j] has the larger numbers. Place k is k - 1, counted from 0. */
        if (k - 1 <= j)
            high = j;
        else
            low = j + 1;
    }
    return x[k - 1];
}

/* process_top_k -- keeps the k largest logits, and any that equal the smallest of them.
 *                                                          [glossary: Amostragem top-k]
 * k is the same whether the model is sure or not: that is its weakness, and the reason for top-p.
 * By hand: (3, 1, 2, 1), k = 2: the second largest is 2, so 3 and 2 stay.
 *                                                                    test: generate_processors */
static void process_top_k(float *logits, size_t V, size_t k) {
    /* 1. The k-th largest of a copy, since finding it changes the order: in logits, the place of a
     *    number is the token's id. */
    if (k >= V)
        return;
    float *copy = thread_scratch(SCRATCH_ROW, V, sizeof *copy);
    memcpy(copy, logits, V * sizeof *copy);
    float smallest_kept = kth_largest(copy, V, k);

    /* 2. Everything below it is cut. */
    for (size_t v = 0; v < V; v++)
        if (logits[v] < smallest_kept)
            logits[v] = -INFINITY;
}

/* Something to sort by a value: a token by its logit or probability, a beam by its score. */
struct Candidate {
    float value;
    int id;
};

/* Largest logit first; of equal logits the smaller id first. */
static int compare_candidates_down(const void *a, const void *b) {
    const struct Candidate *x = a;
    const struct Candidate *y = b;
    if (x->value != y->value)
        return (x->value < y->value) - (x->value > y->value);
    return (x->id > y->id) - (x->id < y->id);
}

/* The same for top-p, but of equal logits the larger id first. transformers sorts in ascending
 * order and removes from the front: of two tokens with equal logits the one with the smaller id
 * goes first. */
static int compare_candidates_top_p(const void *a, const void *b) {
    const struct Candidate *x = a;
    const struct Candidate *y = b;
    if (x->value != y->value)
        return (x->value < y->value) - (x->value > y->value);
    return (x->id < y->id) - (x->id > y->id);
}

/* top_p_cut -- how many of the most probable tokens are needed to hold the mass p.
 * in   order (n): candidates, largest logit first; total: sum of e^(logit - largest)
 * Walks down from the top and adds up probabilities; a token stays if those above it together have
 * a mass below p. At least min_keep of the most probable tokens stay.
 * By hand: 0.5, 0.3, 0.2 and p = 0.7: 0 < 0.7 stays, 0.5 < 0.7 stays, 0.8 is enough: 2 are kept.
 *                                              test: generate_processors; gdb: break top_p_cut */
static size_t top_p_cut(const struct Candidate *order, size_t n, double total, double p,
                        size_t min_keep) {
    double above = 0;
    size_t kept = 0;
    while (kept < n && (kept < min_keep || above < p)) {
        /* the test looks at `above` before this token is added: so the token that reaches p stays,
         * and so does the first one, even if it has more than p by itself */
        above += exp((double)order[kept].value - order[0].value) / total;
        kept++;
    }
    return kept;
}

/* process_top_p -- nucleus sampling: keeps the smallest set of most probable tokens whose mass
 * reaches p [12].                                          [glossary: Amostragem top-p]
 * Where the model is sure, these are one or two tokens; where it is not, hundreds.
 * in, out  logits (V); p in [0, 1); min_keep: at least this many stay
 * By hand: probabilities 0.5, 0.3, 0.2. p = 0.45: the first alone, which holds 0.5; p = 0.6: the
 * first two, which hold 0.8. A set that holds exactly p is enough, as in transformers (elsewhere
 * the mass must exceed p; only such a set tells the two apart).
 * What is left is divided by its mass in sample_token: 0.5, 0.3 become 0.625, 0.375.
 *                                                                     test: generate_processors */
static void process_top_p(float *logits, size_t V, double p, size_t min_keep) {
    /* 1. The tokens that are left, most probable first: here the order itself is needed, not one
     *    place in it as for top-k. */
    struct Candidate *order = thread_scratch(SCRATCH_ROW, V, sizeof *order);
    size_t n = 0;
    for (size_t v = 0; v < V; v++)
        if (logits[v] > -INFINITY)
            order[n++] = (struct Candidate){logits[v], (int)v};
    qsort(order, n, sizeof *order, compare_candidates_top_p);

    /* 2. The denominator of their softmax, over what earlier cuts have left: top-p's mass counts
     *    after top-k. */
    double total = 0;
    for (size_t i = 0; i < n; i++)
        total += exp((double)order[i].value - order[0].value);

    /* 3. Everything after the cut goes. The ids in `order` lead back to the places in logits. */
    for (size_t i = top_p_cut(order, n, total, p, min_keep); i < n; i++)
        logits[order[i].id] = -INFINITY;
}

/* process_logits -- all processors, in the order of transformers; sequence_extend (chapter 13)
 * calls it for each new token.
 * in, out  logits (V)      ids (n): the prompt and what was written; new_tokens: how many of them
 * were written. Without do_sample only steps 1 and 2 act: temperature and cuts keep the argmax.
 *                                                     test: generate_filters_golden */
static void process_logits(float *logits, size_t V, const struct GenerationConfig *config,
                           const int *ids, size_t n, size_t new_tokens, int end_token) {
    /* 1. Against repetition. These two can change the argmax, so they act without sampling, too. */
    if (config->repetition_penalty != 1)
        process_repetition_penalty(logits, V, ids, n, config->repetition_penalty);
    if (config->no_repeat_ngram_size)
        process_no_repeat_ngram(logits, ids, n, config->no_repeat_ngram_size);

    /* 2. No end token before the minimum length   [glossary: Tokens máximos e mínimos] */
    if (new_tokens < config->min_new_tokens)
        logits[end_token] = -INFINITY;
    if (!config->do_sample)
        return;

    /* 3. Temperature tau: logits / tau. Below 1 it sharpens the distribution, up to the argmax as
     *    tau goes to 0; above 1 it flattens it.         [glossary: Temperatura (τ)] */
    if (config->temperature != 1)
        for (size_t v = 0; v < V; v++)
            logits[v] = (float)(logits[v] / config->temperature);

    /* 4. The cuts. A beam (chapter 13) whose best token is the end token needs a second one to
     *    continue with. */
    size_t min_keep = config->num_beams > 1 ? 2 : 1;
    if (config->top_k)
        process_top_k(logits, V, MAX(config->top_k, min_keep));
    if (config->top_p < 1)
        process_top_p(logits, V, config->top_p, min_keep);
}

/* sample_token -- one draw from softmax(logits).                  [glossary: Amostragem]
 * A uniform number u in [0, 1) is drawn; probabilities are added up in the order of the ids, and
 * the token is the one at which the running sum passes u: a token of probability 0.3 owns 0.3 of
 * the line from 0 to 1. Afterwards `logits` holds probabilities.
 * By hand: p = (0.2, 0.5, 0.3), u = 0.6: 0.2, 0.7 > 0.6: id 1.     test: generate_distribution */
static int sample_token(float *logits, size_t V, struct Rng *rng) {
    /* 1. A point on the line from 0 to 1; each token owns a stretch as long as its probability. */
    softmax(logits, V);
    double u = rng_uniform(rng);

    /* 2. In whose stretch is it? A token that was cut owns none, so it is never drawn. */
    double sum = 0;
    for (size_t v = 0; v < V; v++) {
        sum += logits[v];
        if (u < sum)
            return (int)v;
    }
    /* rounding has left the sum slightly below 1, and u fell into the gap */
    return (int)argmax(logits, V);
}

/* =============================================================================================
 * Part II - The model
 *
 * From text to numbers, from numbers to a distribution over the next token, and back to text.
 * After this part a reader knows what GPT-2 computes, layer by layer, forward and backward: every
 * step between a prompt and its continuation, and between a loss and the gradient of each weight,
 * is written out here.
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 7 - Byte-pair encoding         [glossary: Tokenização de conjunto de dados]
 *
 * How does text become numbers? GPT-2 [1] first cuts a text into words by a fixed rule, and then
 * builds each word up from its bytes by byte-pair encoding [11]. Its vocabulary was learnt once,
 * from a large text: begin with the 256 bytes; find the two tokens that most often occur side by
 * side, and make them a new token; repeat this 50,000 times. Each of these joins is called a
 * merge, and its rank says when it was learnt. To encode a word, the merges are applied to it
 * again. If several are possible, the one that was learnt first comes first:
 *
 *     "low"    l o w   ->   l ow   ->   low         "o"+"w" has rank 66, "l"+"ow" rank 9063;
 *      ids   75 78 86     75 322        9319        "l"+"o" (rank 5183) never gets a turn
 *
 * The id of a merged token is 256 + its merge's rank. So "learnt first" is "lowest id"; and since
 * a merge only uses ids below its own, the first V - 1 ids form a complete vocabulary by
 * themselves. This gives a small model a small vocabulary that need not be learnt. The last id of
 * any such vocabulary is its end token.
 *
 * What enters: any bytes. What leaves: ids from 0 to V - 1, from which the same bytes come back.
 * ============================================================================================= */

/* ---- Texts and arrays that grow ------------------------------------------------------------- */

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

/* a followed by b, in new memory of the arena. A NUL follows that the length does not count, so
 * that C's own functions can read the text. */
static struct Text text_join(struct Arena *arena, struct Text a, struct Text b) {
    char *both = arena_alloc(arena, a.length + b.length + 1, 1);
    /* the data of an empty text may be NULL, which memcpy does not accept */
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

/* sprintf into new memory of the arena, just large enough for the result. */
static char *PRINTF_LIKE(2, 3) arena_printf(struct Arena *arena, const char *format, ...) {
    /* Formatted twice: once into nothing, to learn the length, and once for good. Reading a va_list
     * uses it up, so the second time needs a copy. */
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

/* Makes sure that an array of n items has room for one more. If it has not, its capacity is
 * doubled, so that only about n items are copied in all while it grows to n. The array comes from
 * malloc, not from an arena; its owner frees it.
 * in, out  capacity: the number of items there is room for; size: bytes of an item */
static void *grow(void *items, size_t n, size_t *capacity, size_t size) {
    if (n < *capacity)
        return items;
    /* growing by one each time would copy everything for every new item: n^2 / 2 copies */
    *capacity = MAX(2 * *capacity, (size_t)256);
    items = realloc(items, *capacity * size);
    CHECK(items, "out of memory: %zu MB asked for", *capacity * size >> 20);
    return items;
}

/* ---- The vocabulary ------------------------------------------------------------------------- */

/* TOKENIZER_MAGIC and _VERSION are the first numbers of tokenizer.bin (chapter 22). The first 256
 * ids of a vocabulary are the bytes, but in GPT-2's own order: byte_token of struct Tokenizer. */
enum { TOKENIZER_MAGIC = 20240328, TOKENIZER_VERSION = 2, BYTE_TOKENS = 256 };
/* The classes of characters that GPT-2's rule for words distinguishes. */
enum CharClass { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE };
/* UNICODE_END: every code point is below it. MERGE_SLOTS: 2^17 places for 50,000 merges, so that a
 * search in the hash table ends after one or two steps. */
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

/* The slot of a pair in the hash table merge_id or, if the pair is no merge, the empty slot where
 * the search for it ended. */
static size_t merge_slot(const struct Tokenizer *tok, uint32_t pair) {
    /* Knuth's multiplicative hash: the product with 2^32 / golden ratio, modulo 2^32, spreads
     * similar pairs; its upper 17 bits are the slot */
    size_t slot = (pair * 2654435761u) >> 15;
    /* a slot taken by another pair: try the next one */
    while (tok->merge_id[slot] >= 0 && tok->merge_pair[tok->merge_id[slot] - BYTE_TOKENS] != pair)
        slot = (slot + 1) % MERGE_SLOTS;
    return slot;
}

/* The id of the token that two neighbours merge into, or -1 if there is no such merge. */
static int tokenizer_merge(const struct Tokenizer *tok, int left, int right) {
    return tok->merge_id[merge_slot(tok, (uint32_t)left | (uint32_t)right << 16)];
}

/* The end token's id in a vocabulary of V ids: the ids below it are ordinary tokens, and it is
 * spelt "<|endoftext|>". If the vocabulary includes GPT-2's own (50256), it is that, otherwise the
 * last id. This is only the default: the model's configuration decides which token ends a text
 * (eos_token_id).
 * By hand: V = 1025: 1024. V = 50304, padded to a multiple of 64: 50256.  test: tokenizer_small */
static int endoftext_id(size_t vocab_size) {
    return (int)MIN(vocab_size, (size_t)50257) - 1;
}

/* ---- From text to words --------------------------------------------------------------------- */

/* utf8_read -- one character of UTF-8: its length in bytes, 1 to 4, and its code point in *code.
 * Returns 0 if the bytes are not valid UTF-8.
 * in   text: the character starts at its first byte; n >= 1: how many bytes are left
 * The leading ones of the first byte tell how many bytes there are (0 one, 110 two, 1110 three,
 * 11110 four); its other bits are the upper bits of the code point. Each further byte is 10 and six
 * more bits.
 * By hand: c3 a9 is 110'00011 10'101001: 00011'101001 = e9, "e" with an acute accent.
 *                                                                        test: tokenizer_bytes */
static size_t utf8_read(const unsigned char *text, size_t n, uint32_t *code) {
    /* the smallest code point that needs 2, 3, 4 bytes */
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char first = text[0];
    *code = first;
    if (first < 0x80)
        return 1;

    /* 1. The length. Bytes 80 to bf continue a character and cannot start one; c0 and c1 could only
     *    spell ASCII in two bytes; f5 and above would be beyond the last code point. */
    size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || n < length)
        return 0;

    /* 2. The first byte without its leading ones, then six bits from each of the next bytes. */
    *code = first & (0xffu >> (length + 1));
    for (size_t k = 1; k < length; k++) {
        if ((text[k] & 0xc0) != 0x80)
            return 0;
        *code = *code << 6 | (text[k] & 63);
    }

    /* 3. Each character has one spelling, the shortest; and d800 to dfff are no characters but the
     *    halves of UTF-16's pairs. */
    bool is_shortest = *code >= smallest[length];
    bool is_surrogate = *code >= 0xd800 && *code < 0xe000;
    return is_shortest && !is_surrogate && *code < UNICODE_END ? length : 0;
}

/* Class and length of the character at text[i]. A byte that is not valid UTF-8 counts as a
 * character of class "other": no text is refused, and no byte is lost. */
static enum CharClass char_class_at(const struct Tokenizer *tok, const unsigned char *text,
                                    size_t i, size_t n, size_t *length) {
    uint32_t code;
    *length = utf8_read(text + i, n - i, &code);
    if (*length > 0)
        return (enum CharClass)tok->char_class[code];
    /* not UTF-8: skip this byte alone, since the next one may start a character */
    *length = 1;
    return CLASS_OTHER;
}

/* The length of the contraction ('s 't 're 've 'm 'll 'd) that the text starts with; 0 if none. */
static size_t contraction_length(const unsigned char *text, size_t n) {
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t k = 0; k < COUNT(contractions); k++) {
        /* As in GPT-2's rule, lower case only, whatever follows: not "'S", but "'s" in "'sx". */
        size_t length = strlen(contractions[k]);
        if (n >= length && memcmp(text, contractions[k], length) == 0)
            return length;
    }
    return 0;
}

/* tokenizer_word_end -- where the word that starts at i ends. Merges never cross this border:
 * otherwise "dog.", "dog!" and "dog?" would each become a token. GPT-2's rule, as a regular
 * expression whose alternatives are tried from left to right (\p{L} letters, \p{N} numbers, \s
 * spaces):
 *     's|'t|'re|'ve|'m|'ll|'d | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
 * In words: a run of one class, with a space in front of it if there is one. So the usual space
 * belongs to the word after it, and " film" is one token anywhere in a sentence.
 * By hand: "I'm  42!" -> "I", "'m", " ", " 42", "!": of two spaces the last one goes with 42.
 *                                                                        test: tokenizer_words */
static size_t tokenizer_word_end(const struct Tokenizer *tok, const unsigned char *text, size_t i,
                                 size_t n) {
    /* 1. 's, 't and so on */
    size_t contraction = contraction_length(text + i, n - i);
    if (contraction > 0)
        return i + contraction;

    /* 2. The class of the run is that of its first character, after one optional space (" ?" in the
     *    rule) in front of another class. */
    size_t length;
    size_t at = i;
    enum CharClass class = char_class_at(tok, text, at, n, &length);
    if (text[i] == ' ' && i + 1 < n) {
        size_t next_length;
        enum CharClass next = char_class_at(tok, text, i + 1, n, &next_length);
        if (next != CLASS_SPACE) {
            class = next;
            at = i + 1;
            length = next_length;
        }
    }

    /* 3. To the end of the run; `last` is where its last character starts. */
    size_t last = at;
    for (at += length; at < n && char_class_at(tok, text, at, n, &length) == class; at += length)
        last = at;

    /* 4. \s+(?!\S): a run of spaces in front of a word leaves its last space to that word, unless
     *    it is the only one. */
    return class == CLASS_SPACE && at < n && last > i ? last : at;
}

/* ---- From a word to tokens ------------------------------------------------------------------ */

/* A word while it is being encoded: a linked list of pieces, initially its bytes, and a heap of the
 * merges that are possible. Each entry of the heap is merged id << 32 | left piece: so the smallest
 * entry is the merge that was learnt first and, among equals, the leftmost.
 *
 * A merge makes others impossible, whose entries remain in the heap. Searching for them would be
 * slow; instead each entry is checked when its turn comes, and a stale one is skipped. So a word of
 * n bytes takes O(n log n) steps. Searching the whole word before each merge would take O(n^2),
 * which is too long for a million letters without a space.           test: tokenizer_long_word */
struct Piece {
    int id; /* -1: merged into its left neighbour */
    int32_t prev, next; /* -1: none */
};
struct WordPieces {
    const struct Tokenizer *tok;
    int merge_limit; /* merges into this id or a later one are outside the vocabulary */
    struct Piece *piece;
    uint64_t *heap;
    size_t heap_size;
};

/* A binary heap: entry i is not larger than its children, 2i + 1 and 2i + 2; so the smallest is
 * entry 0. By hand: push 7, 4, 9: (4, 7, 9).                                test: tokenizer_heap */
static void heap_push(struct WordPieces *word, uint64_t entry) {
    /* from the new place at the end upwards: each larger parent moves down by one level */
    size_t i = word->heap_size++;
    for (; i > 0 && entry < word->heap[(i - 1) / 2]; i = (i - 1) / 2)
        word->heap[i] = word->heap[(i - 1) / 2];
    word->heap[i] = entry;
}

/* Removes the smallest entry and returns it.
 * By hand: (4, 7, 9) gives 4 and leaves (7, 9).                             test: tokenizer_heap */
static uint64_t heap_pop(struct WordPieces *word) {
    uint64_t smallest = word->heap[0];
    /* The heap is shorter by one, so its last entry needs a new place. From the gap at the top
     * downwards: the smaller child moves up, until the last entry fits into the gap. */
    uint64_t last = word->heap[--word->heap_size];
    size_t n = word->heap_size;
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        /* the smaller child, since it becomes the other one's parent */
        if (child + 1 < n && word->heap[child + 1] < word->heap[child])
            child++;
        if (word->heap[child] >= last)
            break;
        word->heap[i] = word->heap[child];
    }
    word->heap[i] = last;
    return smallest;
}

/* Puts the merge of piece `left` with the next one into the heap, if there is such a merge and the
 * vocabulary includes it. left -1: there is no piece. */
static void pieces_offer(struct WordPieces *word, int32_t left) {
    /* 1. At either end of the word there is no pair. */
    if (left < 0 || word->piece[left].next < 0)
        return;

    /* 2. The entry names the place and the merged id. When its turn comes, the id shows whether the
     *    same two pieces are still there. */
    int right_id = word->piece[word->piece[left].next].id;
    int id = tokenizer_merge(word->tok, word->piece[left].id, right_id);
    if (id >= 0 && id < word->merge_limit)
        heap_push(word, (uint64_t)id << 32 | (uint32_t)left);
}

/* Joins piece `left` and the next one into the token `id`, unless the entry is stale: one of the
 * two has merged with another piece since the pair entered the heap. */
static void pieces_merge(struct WordPieces *word, int32_t left, int id) {
    /* 1. Stale? Then the two no longer make this id, or one of them is gone. */
    struct Piece *piece = word->piece;
    int32_t right = piece[left].next;
    if (piece[left].id < 0 || right < 0
        || tokenizer_merge(word->tok, piece[left].id, piece[right].id) != id)
        return;

    /* 2. The left piece becomes both, and the right one leaves the list. */
    piece[left].id = id;
    piece[left].next = piece[right].next;
    piece[right].id = -1;
    if (piece[left].next >= 0)
        piece[piece[left].next].prev = left;

    /* 3. The new piece may merge with its neighbour on either side. */
    pieces_offer(word, piece[left].prev);
    pieces_offer(word, left);
}

/* tokenizer_encode_word -- byte-pair encoding of one word [11].
 * in   bytes (n); word: with room for n pieces and 3n heap entries
 * out  ids: room for n; returns how many there are
 * By hand: " lovely": " l" (300), "ve" (303), "ly" (306), "ove" (659), " love" (1842), at last
 * " lovely" (14081). With V = 1025 it stops at 300 659 306, since 1842 is outside.
 * docs/debugging.md has a tour through it.
 *            test: tokenizer_cases, tokenizer_small, tokenizer_plain; gdb: break pieces_merge */
static size_t tokenizer_encode_word(struct WordPieces *word, const unsigned char *bytes, size_t n,
                                    int *ids) {
    /* 1. One piece for each byte, and every pair of neighbours that can merge. */
    struct Piece *piece = word->piece;
    for (size_t i = 0; i < n; i++)
        piece[i] = (struct Piece){
            .id = word->tok->byte_token[bytes[i]],
            .prev = (int32_t)i - 1,
            .next = i + 1 < n ? (int32_t)i + 1 : -1,
        };
    word->heap_size = 0;
    for (size_t i = 0; i + 1 < n; i++)
        pieces_offer(word, (int32_t)i);

    /* 2. The merge that was learnt first, again and again, until none is left: in this order the
     *    vocabulary was learnt, so in this order its tokens are found. */
    while (word->heap_size > 0) {
        uint64_t entry = heap_pop(word);
        pieces_merge(word, (int32_t)(entry & 0xffffffff), (int)(entry >> 32));
    }

    /* 3. What remains in the list are the tokens. The first is always piece 0, since a piece only
     *    ever merges into its left neighbour. */
    size_t count = 0;
    for (int32_t i = 0; i >= 0; i = piece[i].next)
        ids[count++] = piece[i].id;
    return count;
}

/* tokenizer_encode -- text to ids.                [glossary: Tokenização de conjunto de dados]
 * in   text: n bytes, valid UTF-8 or not; vocab_size: V of the model
 * out  ids: room for n of them, since a token has at least one byte; returns how many there are.
 *      All are below the end token's id.
 * "<|endoftext|>" inside a text is ordinary text, seven tokens: no text can fake its own end.
 * By hand: "Hello world" -> "Hello" (15496), " world" (995).                 test: tokenizer_* */
static size_t tokenizer_encode(const struct Tokenizer *tok, struct Text text, size_t vocab_size,
                               int *ids) {
    const unsigned char *bytes = (const unsigned char *)text.data;
    struct WordPieces word = {.tok = tok, .merge_limit = endoftext_id(vocab_size)};
    size_t count = 0;
    /* struct Piece numbers pieces with an int32_t */
    CHECK(text.length < INT32_MAX,
          "a text of %zu bytes is longer than the 2 GB that can be encoded at once", text.length);
    for (size_t i = 0, end; i < text.length; i = end) {
        /* 1. The next word. Words are encoded separately: no merge crosses their borders. */
        end = tokenizer_word_end(tok, bytes, i, text.length);
        size_t n = end - i;

        /* 2. Memory. The heap: n - 1 pairs at first, and two more for each of at most n - 1
         *    merges, so 3n entries suffice; a piece for each byte. */
        word.heap = thread_scratch(SCRATCH_A, 3 * n, sizeof *word.heap);
        word.piece = thread_scratch(SCRATCH_B, n, sizeof *word.piece);

        /* 3. Its tokens, after those of the words before it. */
        count += tokenizer_encode_word(&word, bytes + i, n, ids + count);
    }
    return count;
}

/* ---- And back ------------------------------------------------------------------------------- */

/* The bytes of a token in a vocabulary of vocab_size ids. They may be only a part of a character:
 * the text is valid UTF-8 again once the tokens are joined. */
static struct Text tokenizer_decode(const struct Tokenizer *tok, int id, size_t vocab_size) {
    /* the id of a small vocabulary's end token is an ordinary token in the large one */
    if (id == endoftext_id(vocab_size))
        id = tok->end_token;
    /* the unused ids of a padded vocabulary */
    if (id < 0 || (size_t)id >= tok->vocab_size)
        return text_of("");
    return tok->token[id];
}

/* The text of n ids: the bytes of all tokens, joined.
 *                                                         test: tokenizer_cases, tokenizer_bytes */
static struct Text tokenizer_decode_all(const struct Tokenizer *tok, struct Arena *arena,
                                        const int *ids, size_t n, size_t vocab_size) {
    /* 1. The length first, so that the arena gives one piece of the right size. */
    size_t length = 0;
    for (size_t i = 0; i < n; i++)
        length += tokenizer_decode(tok, ids[i], vocab_size).length;

    /* 2. The bytes, and a NUL for C's own functions. */
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
 * are the prompt), and several examples become a batch. Texts differ in length. TRL pads them to a
 * rectangle and then masks the padding; here they are packed, each right after the one before:
 *
 *     example 0: [5 6 7]      TRL:  5 6 7 .        here:  ids       5 6 7 8 9 4 3
 *     example 1: [8 9 4 3]          8 9 4 3               start     0     3       7
 *                                                         position  0 1 2 0 1 2 3
 *
 * There is no padding to compute, and each fact is stored in one place: where a sequence starts,
 * which position each token has, which rows must predict which token.
 *
 * What enters: ids of texts. What leaves: a batch of N tokens, and R targets to predict.
 * ============================================================================================= */

/* ---- Rows of a data set --------------------------------------------------------------------- */

/* The fields that a row of a data set may have, one bit each. A shape says what a method needs:
 * the fields that each row must have and, 16 bits further up, those that are used if present. Any
 * other field of a row is ignored. */
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
    SHAPE_MARGIN = SHAPE_PREFERENCE | MAY_HAVE(HAS_MARGIN), /* the same, for losses with a margin */
    SHAPE_LABELLED = HAS_TEXT | HAS_LABEL,
    SHAPE_RATED = HAS_TEXT | HAS_SCORE,
    SHAPE_ROLLOUT = HAS_QUERY_IDS | HAS_RESPONSE_IDS | HAS_SCORE
};
/* Their names in a file, in the order of the bits. */
static const char *const FIELD_NAMES[] = {"text",         "prompt", "completion", "chosen",
                                          "rejected",     "label",  "score",      "query_ids",
                                          "response_ids", "margin"};

struct Row {
    unsigned has; /* a bit for each field that the row has, used or not */
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
    struct DataFile *files; /* the files of a folder, or the one file */
    size_t file_count;
};

/* ---- Examples: rows as ids ------------------------------------------------------------------ */

/* Token ids of one training sequence; the first prompt_length of them are given, not learnt. */
struct Example {
    int *ids;
    size_t n, prompt_length;
};

/* Did the answer end by itself, with the policy's end token? */
static bool example_ended(const struct Example *e, int end_token) {
    return e->n > e->prompt_length && e->ids[e->n - 1] == end_token;
}

/* Appends the end token to what is learnt: that is how a model learns to stop. As in TRL, no second
 * one follows if the answer already ends with it, which can happen if the end token is an ordinary
 * one, "." for instance. The ids must have room for it.                    test: data_end_token */
static void example_end(struct Example *e, int end_token) {
    if (!example_ended(e, end_token))
        e->ids[e->n++] = end_token;
}

/* A text as ids, all of them learnt, followed by the model's end token, or by none if end_token is
 * NULL. Either way there is room for one more id. */
static struct Example example_encode(struct Arena *arena, const struct Tokenizer *tok,
                                     struct Text text, size_t vocab_size, const int *end_token) {
    /* Encoded into scratch, because the number of ids is known only afterwards: a text has no more
     * ids than bytes. */
    struct Example e = {0};
    int *ids = thread_scratch(SCRATCH_ROW, text.length + 1, sizeof *ids);
    e.n = tokenizer_encode(tok, text, vocab_size, ids);
    /* room for one more: a caller may append an end token later */
    e.ids = memcpy(arena_alloc(arena, e.n + 1, sizeof *e.ids), ids, e.n * sizeof *ids);
    if (end_token)
        example_end(&e, *end_token);
    return e;
}

/* example_prompt_completion -- prompt and completion as one example, as TRL makes it.
 * They are encoded as one text, since that is what the model reads when it is used: encoded
 * separately, a token might be cut in two at the seam. The completion starts at the first id that
 * differs from the ids of the prompt alone. So a token that spans the seam belongs to the
 * completion, and is learnt.
 * By hand: "Hello wor" + "ld": together "Hello" " world", the prompt alone "Hello" " wor": the ids
 * agree on one token, so the prompt is "Hello".                     test: data_prompt_completion */
static struct Example example_prompt_completion(struct Arena *arena, const struct Tokenizer *tok,
                                                struct Text prompt, struct Text completion,
                                                size_t vocab_size, const int *end_token) {
    /* 1. The prompt alone, and the whole. Only the whole is kept. */
    struct Arena scratch = {0};
    struct Example alone = example_encode(&scratch, tok, prompt, vocab_size, NULL);
    struct Text both = text_join(&scratch, prompt, completion);
    struct Example whole = example_encode(arena, tok, both, vocab_size, NULL);

    /* 2. What the two have in common at the start is the prompt. */
    size_t shared = 0;
    while (shared < alone.n && shared < whole.n && alone.ids[shared] == whole.ids[shared])
        shared++;
    whole.prompt_length = shared;

    /* 3. The end token only now: whether it is needed depends on where the completion starts. */
    if (end_token)
        example_end(&whole, *end_token);
    arena_free(&scratch);
    return whole;
}

/* split_implicit_prompt -- finds the prompt of a preference that has none: its two texts are whole
 * conversations, and their common beginning is the prompt. As in TRL, a space at the prompt's end
 * goes to the answers, since GPT-2's words begin with their space.
 * in, out  row: chosen and rejected are shortened, prompt is set; all point into the old texts.
 * By hand: "It is good" and "It is bad": prompt "It is", answers " good" and " bad".
 *                                                                     test: data_implicit_prompt */
static void split_implicit_prompt(struct Row *row) {
    /* 1. The longest common beginning, in bytes. */
    size_t n = 0;
    while (n < row->chosen.length && n < row->rejected.length
           && row->chosen.data[n] == row->rejected.data[n])
        n++;

    /* 2. It must end between two characters, but two accented letters may share their first byte.
     *    So while the byte after the cut continues a character (10......), the cut moves left. At
     *    the end of a text, that byte is the NUL that follows each text. */
    while (n > 0
           && ((row->chosen.data[n] & 0xc0) == 0x80 || (row->rejected.data[n] & 0xc0) == 0x80))
        n--;

    /* 3. The space goes to the answers. Cutting moves pointers; no text is copied. */
    if (n > 0 && row->chosen.data[n - 1] == ' ')
        n--;
    row->prompt = (struct Text){row->chosen.data, n};
    row->chosen = (struct Text){row->chosen.data + n, row->chosen.length - n};
    row->rejected = (struct Text){row->rejected.data + n, row->rejected.length - n};
}

/* ---- Batches: examples side by side --------------------------------------------------------- */

/* B sequences, packed into N rows of tokens; R of these rows must predict something, and row[r] and
 * target[r] say which and what. The two examples of the chapter's essay, with prompts of 1 and 2
 * tokens, and without each last token, which predicts nothing:
 *
 *     n          0  1  2  3  4
 *     ids        5  6  8  9  4       start         0  2  5    sequence 1 is rows 2 to 4
 *     position   0  1  0  1  2
 *                |  |     |  |
 *     must       v  v     v  v       r             0  1  2  3
 *     predict    6  7     4  3       row           0  1  3  4    row 3, the 9, must predict
 *                                    target        6  7  4  3    the 4 after it
 *                                    target_start  0  2  4       sequence 1 has r = 2 and 3
 *
 * "Must predict 6" means only that log pi of 6 is computed there. In PPO 6 is what the policy
 * wrote, and may be about to become less likely. Row 2, the 8, predicts nothing: the token after
 * it, 9, belongs to the prompt. Losses are computed for R targets, in arrays without gaps; `row`
 * leads back to the hidden state of each. */
struct Batch {
    size_t B, N, R, max_length; /* max_length: of the longest text, in positions */
    size_t tokens; /* of the examples, whether or not the model reads their last ones */
    int *ids, *position; /* (N) */
    size_t *start; /* (B+1) sequence b has the rows start[b] .. start[b+1]-1 */
    size_t *target_start; /* (B+1) its targets are target_start[b] .. target_start[b+1]-1; of a
                           * batch of pairs, whose answers may share a sequence, answer by answer */
    int *row, *target; /* (R) row[r] must predict the id target[r] */
    /* (B) or NULL. From its row fork[b] on, sequence b is a second answer to its first shared[b]
     * tokens: see collate_pairs. */
    size_t *shared, *fork;
};

/* A batch for B sequences and at most `tokens` rows; it has no rows yet. */
static struct Batch batch_new(struct Arena *arena, size_t B, size_t tokens) {
    return (struct Batch){
        .B = B,
        .tokens = tokens,
        /* what each row is: a token and its position */
        .ids = arena_alloc(arena, tokens, sizeof(int)),
        .position = arena_alloc(arena, tokens, sizeof(int)),
        /* which rows must predict what: never more targets than tokens */
        .row = arena_alloc(arena, tokens, sizeof(int)),
        .target = arena_alloc(arena, tokens, sizeof(int)),
        /* cleared: sequence 0 starts at row 0, and its targets at target 0 */
        .start = arena_zeros(arena, B + 1, sizeof(size_t)),
        .target_start = arena_zeros(arena, B + 1, sizeof(size_t)),
    };
}

/* Tokens first to end - 1 of a sequence become the next rows of the batch. */
static void batch_append(struct Batch *batch, const int *ids, size_t first, size_t end) {
    for (size_t t = first; t < end; t++, batch->N++) {
        /* the position counts from the start of the text, not of the batch */
        batch->ids[batch->N] = ids[t];
        batch->position[batch->N] = (int)t;
    }
}

/* Is the last token of a sequence read? A language model predicts nothing from it and can skip it;
 * a reward is read there. */
enum LastToken { SKIP_LAST, READ_LAST };

/* Example e becomes sequence b of the batch, after those already there. */
static void collate_example(struct Batch *batch, size_t b, const struct Example *e,
                            enum LastToken last) {
    /* 1. The targets: each token after the prompt; the row before it must predict it. The first
     *    token of a text is never a target, since there is no row before it. */
    for (size_t t = MAX(e->prompt_length, (size_t)1); t < e->n; t++) {
        batch->row[batch->R] = (int)(batch->N + t - 1);
        batch->target[batch->R] = e->ids[t];
        batch->R++;
    }

    /* 2. The rows. They come after the targets, which count from the old N. */
    bool skips_one = last == SKIP_LAST && e->n > 0;
    batch_append(batch, e->ids, 0, e->n - skips_one);

    /* 3. Where the next sequence starts. */
    batch->start[b + 1] = batch->N;
    batch->target_start[b + 1] = batch->R;
    batch->max_length = MAX(batch->max_length, batch->N - batch->start[b]);
}

/* collate -- examples of different lengths into one batch.       [glossary: Função coladora]
 * in   examples (B)
 * TRL's collators pad to a rectangle (B, longest), mask the padding, and give prompts and padding
 * the label -100, "ignore". Packing stores the same facts: `row` lists the rows whose label would
 * not be -100, and `target` their labels.
 * By hand: ids [5 6 7 8] with a prompt of 2: the rows are 5 6 7 (8 predicts nothing); row 1, the 6,
 * must predict 7, and row 2 must predict 8.                                        test: collate */
static struct Batch collate(struct Arena *arena, const struct Example *examples, size_t B,
                            enum LastToken last) {
    /* 1. Room for all tokens: the number of rows, and of targets, is never larger. */
    size_t tokens = 0;
    for (size_t b = 0; b < B; b++)
        tokens += examples[b].n;
    struct Batch batch = batch_new(arena, B, tokens);

    /* 2. Packed without gaps: only `start` separates them, and attention respects it. */
    for (size_t b = 0; b < B; b++)
        collate_example(&batch, b, &examples[b], last);
    return batch;
}

/* ---- Pairs: one prompt, two answers --------------------------------------------------------- */

/* How many tokens at the start of a pair to compute only once: its prompt, or none if that does not
 * pay.
 * in   rows of each answer with its prompt; C: the model's width
 * Sharing saves `prompt` rows, with 24 C^2 operations each in every layer. But the two answers
 * are then in one sequence, and attention, which works in blocks, computes scores between them
 * that are thrown away: 4 C operations for each pair of rows. So it pays if
 *   24 C^2 prompt > 4 C (chosen - prompt) (rejected - prompt)
 * By hand: prompt 2, rows 4 and 5, C 16: 2 * 6 * 16 = 192 > 2 * 3 = 6: it pays. Prompt 1, C 1: 6
 * is less than 3 * 4 = 12: it does not.                                      test: collate_pairs */
static size_t shared_prompt(size_t prompt, size_t chosen_rows, size_t rejected_rows, size_t C) {
    /* with an empty answer there are fewer rows than prompt tokens: the last is not read */
    prompt = MIN(MIN(prompt, chosen_rows), rejected_rows);
    /* both sides divided by 4 C */
    double saved = (double)prompt * 6 * (double)C;
    double wasted = (double)(chosen_rows - prompt) * (double)(rejected_rows - prompt);
    return saved <= wasted ? 0 : prompt;
}

/* Where the tokens of an example are in a batch: the first `prompt` of them from row prompt_start
 * on, the rest from row answer_start on. */
struct Placement {
    size_t prompt, prompt_start, answer_start;
};

/* The targets of example i of a plain batch, for the rows where its tokens are now. */
static void move_targets(struct Batch *batch, const struct Batch *plain, size_t i,
                         struct Placement place) {
    for (size_t r = plain->target_start[i]; r < plain->target_start[i + 1]; r++) {
        /* token t of the example still predicts the same target; only its row has changed */
        size_t t = (size_t)plain->row[r] - plain->start[i];
        batch->row[r] = (int)(t < place.prompt ? place.prompt_start + t
                                               : place.answer_start + t - place.prompt);
    }
}

/* Pair b: example b of the plain batch is the chosen one, example B + b the rejected one. */
static void collate_pair(struct Batch *batch, const struct Batch *plain,
                         const struct Example *examples, size_t B, size_t b, size_t C) {
    const struct Example *chosen = &examples[b];
    const struct Example *rejected = &examples[B + b];
    size_t chosen_rows = plain->start[b + 1] - plain->start[b];
    size_t rejected_rows = plain->start[B + b + 1] - plain->start[B + b];
    size_t prompt = shared_prompt(chosen->prompt_length, chosen_rows, rejected_rows, C);

    /* 1. The rows: prompt, chosen answer, then the rejected answer without its prompt. */
    size_t start = batch->N;
    size_t fork = start + chosen_rows;
    batch_append(batch, chosen->ids, 0, chosen_rows);
    batch_append(batch, rejected->ids, prompt, rejected_rows);

    /* 2. One sequence that forks; or, if nothing is shared, two of the usual kind. */
    batch->shared[batch->B] = prompt;
    batch->fork[batch->B] = chosen_rows;
    if (prompt == 0)
        batch->start[++batch->B] = fork;
    batch->start[++batch->B] = batch->N;

    /* 3. The last row of a shared prompt predicts the first token of both answers. */
    move_targets(batch, plain, b, (struct Placement){prompt, start, start + prompt});
    move_targets(batch, plain, B + b, (struct Placement){prompt, start, fork});
}

/* collate_pairs -- 2B examples, the B chosen ones first, in one batch in which the prompt of a pair
 * is computed only once, if that pays. The layout is
 *     prompt | chosen answer | rejected answer             one sequence, `fork` at the second bar
 * The rejected answer has the positions that follow the prompt's, and attention lets it see the
 * prompt and itself but not the chosen answer: the results are those of two separate sequences.
 * in   examples (2B); C: the model's width
 * out  targets in the order of the examples, whatever the order of their rows
 * By hand: prompt 2, answers of 3 and 4 tokens: 2 + 2 + 3 rows (no last tokens) instead of 4 + 5.
 *                                                                            test: collate_pairs */
static struct Batch collate_pairs(struct Arena *arena, const struct Example *examples, size_t B,
                                  size_t C) {
    /* 1. A plain batch first: its targets stay as they are, its rows are laid out anew. The two
     *    batches share their arrays, since each entry of `row` is read before it is overwritten;
     *    only `start` is needed in both versions at once. */
    const struct Batch plain = collate(arena, examples, 2 * B, SKIP_LAST);
    struct Batch batch = plain;
    batch.start = arena_zeros(arena, 2 * B + 1, sizeof *batch.start);
    batch.shared = arena_zeros(arena, 2 * B, sizeof *batch.shared);
    batch.fork = arena_zeros(arena, 2 * B, sizeof *batch.fork);
    batch.N = 0;
    batch.B = 0;

    /* 2. Pair by pair: one sequence each, or two. */
    for (size_t b = 0; b < B; b++)
        collate_pair(&batch, &plain, examples, B, b, C);
    return batch;
}

/* ---- Lengths -------------------------------------------------------------------------------- */

/* LengthSampler(min, max): an integer in [min, max), as in TRL: (2, 8) gives 2 to 7. Prompts and
 * answers vary in length, because a policy that always saw one length would learn that length.
 *                                 [glossary: LengthSampler]            test: data_length_sampler */
struct LengthSampler {
    size_t min_value, max_value;
};

static size_t length_sampler(const struct LengthSampler *s, struct Rng *rng) {
    return s->min_value + rng_below(rng, s->max_value - s->min_value);
}

/* =============================================================================================
 * Chapter 9 - Matrix product
 *
 * Why is this chapter here, and so long? Every training spends nine tenths of its time in one
 * operation, the product of two matrices. A linear layer needs it in three forms:
 *
 *     y  = x W        (N,out)  = (N,in)  (in,out)     forward
 *     dx = dy W^T     (N,in)   = (N,out) (out,in)     backward, to the layer below
 *     dW = x^T dy     (in,out) = (in,N)  (N,out)      backward, to the layer's own weights
 *
 * One function does all three, because a matrix here is a view of memory that knows its shape and
 * two strides: how far it is to the next row and to the next column. So transposing moves nothing:
 *
 *     memory 1 2 3 4 5 6      matrix (2,3), strides 3 and 1:          1 2 3
 *                                                                     4 5 6
 *                             transposed (3,2), strides 1 and 3:      1 4
 *                                                                     2 5
 *                                                                     3 6
 *
 * What to read. The definition takes ten lines; the rest makes it a hundred times faster, and
 * tests compare the two.
 *   first reading    struct Matrix, transposed, matrix_block, matmul_plain; then, at the end of the
 *                    chapter, the comments of matmul, matmul_add and matmul_bias. Later chapters
 *                    need no more than this.
 *   for the speed    tile_4x8, pack_panel, matmul_tile, matmul_panel, matmul_block, matmul_from, in
 *                    this order: from the innermost loop outwards.
 *   never needed     the two wider tiles (tile_4x8 again, with longer vectors), few_rows and
 *                    add_eight_rows, the choice of a kernel, the details of packing.
 *
 * Why is the plain triple loop slow, and what helps [16]? It loads two numbers for each
 * multiplication, and a processor can do 16 multiplications in the time that one load from its
 * second cache takes.
 *   1. A register tile: MR x NR sums stay in vector registers; each step of k loads MR + NR
 *      numbers and does MR * NR multiplications. This is where the speed comes from; the rest
 *      keeps it supplied.
 *   2. Packing: A and B are copied into panels, in exactly the order in which the tile reads them,
 *      whatever their strides are.
 *   3. Blocks: KC steps of k at a time, so that one panel of B (NR columns, 48 KB) stays in the
 *      first or second cache while the panels of A pass by it.
 * All threads pack A together. Then each of them takes panels of B, packs one and computes the
 * columns of C that belong to it. An element of C is summed by one thread, in the order of k, so
 * any number of threads gives the same bits. For the same reason, no chapter lets two threads add
 * to one number. Figures: docs/performance.md.
 *
 * What enters: views of A (M,K) and B (K,N). What leaves: C (M,N).
 * ============================================================================================= */

/* ---- Views ---------------------------------------------------------------------------------- */

/* A matrix to read from. Element (i,j) is data[i * row_stride + j * column_stride]. A row stride of
 * 0 repeats one row (a bias); a matrix without data is one of zeros. */
struct Matrix {
    const float *data;
    size_t rows, columns;
    size_t row_stride, column_stride;
};

/* A matrix to write to. The numbers of a row are neighbours. */
struct MatrixOut {
    float *data;
    size_t rows, columns;
    size_t row_stride;
};

static struct Matrix matrix(const float *data, size_t rows, size_t columns) {
    return (struct Matrix){data, rows, columns, columns, 1};
}

static struct MatrixOut matrix_out(float *data, size_t rows, size_t columns) {
    return (struct MatrixOut){data, rows, columns, columns};
}

static struct Matrix transposed(struct Matrix m) {
    /* rows and columns change places, and so do their strides */
    return (struct Matrix){m.data, m.columns, m.rows, m.column_stride, m.row_stride};
}

/* A matrix that was written, as one to read from. */
static struct Matrix readable(struct MatrixOut m) {
    return (struct Matrix){m.data, m.rows, m.columns, m.row_stride, 1};
}

/* The part of a matrix from (row, column) on: `rows` rows and `columns` columns, or as many as
 * there are. */
static struct Matrix matrix_block(struct Matrix m, size_t row, size_t column, size_t rows,
                                  size_t columns) {
    /* a matrix of zeros has no data to point into */
    if (m.data)
        m.data += row * m.row_stride + column * m.column_stride;
    /* the blocks at the lower and right edges may be smaller */
    m.rows = MIN(rows, m.rows - row);
    m.columns = MIN(columns, m.columns - column);
    return m;
}

static struct MatrixOut matrix_out_block(struct MatrixOut m, size_t row, size_t column, size_t rows,
                                         size_t columns) {
    /* as above; the column stride is 1 */
    m.data += row * m.row_stride + column;
    m.rows = MIN(rows, m.rows - row);
    m.columns = MIN(columns, m.columns - column);
    return m;
}

/* matmul_plain -- C = start + A B by its definition:  C_ij = start_ij + sum_k A_ik B_kj.
 * Sums are in double. matmul is tested against it, and ALIGN_KERNEL=plain runs everything on it:
 * use that to step through a product.                                       test: matmul_plain */
static void matmul_plain(struct MatrixOut c, struct Matrix start, struct Matrix a,
                         struct Matrix b) {
    for (size_t i = 0; i < c.rows; i++)
        for (size_t j = 0; j < c.columns; j++) {
            /* In double: each of thousands of float additions would round, and a definition should
             * be more exact than what is compared with it. */
            double sum = start.data ? start.data[i * start.row_stride + j] : 0;

            /* Row i of A times column j of B. In the usual layout each step of k takes the
             * next number of A but jumps a whole row in B: the slow part. */
            for (size_t k = 0; k < a.columns; k++)
                sum += (double)a.data[i * a.row_stride + k * a.column_stride]
                       * b.data[k * b.row_stride + j * b.column_stride];
            c.data[i * c.row_stride + j] = (float)sum;
        }
}

/* ---- Register tiles ------------------------------------------------------------------------- */

/* KC steps of k and BLOCK_ROWS rows of A make a block; TILE_MAX: numbers in the largest tile. */
enum { TILE_MAX = 8 * 32, KC = 384, BLOCK_ROWS = 1024 };

/* The innermost loops, for one kind of processor.
 * tile: c (MR,NR) = start + the sum over K steps of the products a_i b_j, from packed panels:
 * step k reads MR numbers at a + k * MR and NR numbers at b + k * NR. The rows of c are c_row
 * numbers apart, those of start start_row. start = NULL counts as zeros; start = c adds to c.
 * few_rows: y (N,columns) = x (N,in) W (in,columns) + bias (columns), see linear_few_rows. */
struct Kernel {
    const char *name;
    size_t MR, NR;
    void (*tile)(size_t K, const float *a, const float *b, const float *start, size_t start_row,
                 float *c, size_t c_row);
    void (*few_rows)(struct MatrixOut y, struct Matrix x, struct Matrix weight, const float *bias);
};

/* Vectors of 4 numbers (SSE and NEON: in every x86-64 and arm64), of 8 (AVX) and of 16 (AVX-512).
 * Their sums and products are single instructions, and a number times a vector multiplies each of
 * its lanes. A type whose name ends in _any may be at any address, the others only at multiples
 * of their size. */
typedef float float4 __attribute__((vector_size(16)));
typedef float float8 __attribute__((vector_size(32)));
typedef float float16 __attribute__((vector_size(64)));
typedef float float4_any __attribute__((vector_size(16), aligned(4)));
typedef float float8_any __attribute__((vector_size(32), aligned(4)));
typedef float float16_any __attribute__((vector_size(64), aligned(4)));

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* 4 x 8 sums, in 8 vectors: 8 of the 16 registers of SSE hold them.
 * The three tiles differ only in the width of their vectors. A type fixes that width, so each tile
 * is written out. The outer loops over the sums carry an unroll pragma: gcc keeps an array in
 * registers only if every index into it is a constant. */
static void tile_4x8(size_t K, const float *a, const float *b, const float *start, size_t start_row,
                     float *c, size_t c_row) {
    /* 1. What the sums start from: zeros, a bias or C itself. */
    float4 sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] = start ? *(const float4_any *)(start + i * start_row + 4 * j) : (float4){0};

    /* 2. Step k adds the products of every number in column a_k (4) with every number in row b_k
     *    (8). 12 numbers are loaded for 32 multiplications. */
    for (size_t k = 0; k < K; k++, a += 4, b += 8) {
        float4 b0 = *(const float4 *)b;
        float4 b1 = *(const float4 *)(b + 4);
        for (int i = 0; i < 4; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }

    /* 3. Only now do the sums go to memory: once for K steps. */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
            *(float4_any *)(c + i * c_row + 4 * j) = sum[i][j];
}

/* Adds eight rows of W, each times its number of x, to a row of y: `x` points at the eight numbers,
 * `weight` at the first of the rows, which are `stride` apart. The sum is computed from left to
 * right, like a tile's, one k after the other. */
static ALWAYS_INLINE void add_eight_rows(float *y, const float *x, const float *weight,
                                         size_t stride, size_t columns) {
    /* Eight rows in one pass over y: y is loaded and stored once for eight multiplications; row by
     * row it would be once for each. */
    const float *w1 = weight + stride;
    const float *w2 = w1 + stride;
    const float *w3 = w2 + stride;
    const float *w4 = w3 + stride;
    const float *w5 = w4 + stride;
    const float *w6 = w5 + stride;
    const float *w7 = w6 + stride;
    for (size_t j = 0; j < columns; j++)
        y[j] = y[j] + x[0] * weight[j] + x[1] * w1[j] + x[2] * w2[j] + x[3] * w3[j] + x[4] * w4[j]
               + x[5] * w5[j] + x[6] * w6[j] + x[7] * w7[j];
}

/* linear_few_rows -- a strip of columns of y = x W + bias for few rows of x, as in generation,
 * where there is one row at a time: packing W would cost more than it saves.
 * in   x (N,in), weight (in,columns), bias (columns)      out  y (N,columns)
 * It is compiled once for each tile, with the same instructions. It adds in the tile's order and,
 * where there is a fused multiply-add, rounds where the tile rounds, so both give the same bits.
 *                                                                 test: few_rows, rows_company */
static ALWAYS_INLINE void linear_few_rows(struct MatrixOut y, struct Matrix x, struct Matrix weight,
                                          const float *bias) {
    size_t N = x.rows;
    size_t in = x.columns;
    size_t columns = y.columns;
    size_t stride = weight.row_stride;

    /* 1. The bias: y itself holds the sums. A strip of y is small enough for the first cache, which
     *    does for it what registers do for a tile. */
    for (size_t n = 0; n < N; n++)
        memcpy(y.data + n * y.row_stride, bias, columns * sizeof *bias);

    /* 2. Eight rows of W serve all rows of x while they are in the first cache. Meanwhile the next
     *    eight are prefetched, a share of them with each row of x. */
    size_t k = 0;
    for (; k + 8 <= in; k += 8)
        for (size_t n = 0; n < N; n++) {
            for (size_t next = k + 8 + n; next < MIN(in, k + 16); next += N)
                for (size_t j = 0; j < MIN(columns, (size_t)384); j += 16)
                    __builtin_prefetch(weight.data + next * stride + j);
            add_eight_rows(y.data + n * y.row_stride, x.data + n * x.row_stride + k,
                           weight.data + k * stride, stride, columns);
        }

    /* 3. The rest, if the number of W's rows is no multiple of 8. */
    for (; k < in; k++)
        for (size_t n = 0; n < N; n++)
            for (size_t j = 0; j < columns; j++)
                y.data[n * y.row_stride + j] +=
                    x.data[n * x.row_stride + k] * weight.data[k * stride + j];
}

static void few_rows_base(struct MatrixOut y, struct Matrix x, struct Matrix weight,
                          const float *bias) {
    /* inlined here, and so compiled with the instructions that every processor has */
    linear_few_rows(y, x, weight, bias);
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,fma")))

/* 4 x 24: of the 16 registers of AVX2, 12 hold sums, 3 hold a row of b, and one holds a number of
 * a. For the steps see tile_4x8. */
AVX2 static void tile_4x24(size_t K, const float *a, const float *b, const float *start,
                           size_t start_row, float *c, size_t c_row) {
    /* 1. The start. The loops are unrolled so that each sum[i][j] is a register. */
    float8 sum[4][3];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 3; j++)
            sum[i][j] = start ? *(const float8_any *)(start + i * start_row + 8 * j) : (float8){0};

    /* 2. 28 numbers are loaded for 96 multiplications: more than three multiplications for each
     *    load, where the plain triple loop has two loads for each multiplication. */
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

/* 8 x 32: of the 32 registers of AVX-512, 16 hold sums. Larger tiles are no faster, and more batch
 * sizes are multiples of 8 than of a larger number. */
AVX512 static void tile_8x32(size_t K, const float *a, const float *b, const float *start,
                             size_t start_row, float *c, size_t c_row) {
    float16 sum[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] =
                start ? *(const float16_any *)(start + i * start_row + 16 * j) : (float16){0};

    /* 40 numbers are loaded for 256 multiplications: each vector of a row of b serves eight sums */
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

AVX2 static void few_rows_avx2(struct MatrixOut y, struct Matrix x, struct Matrix weight,
                               const float *bias) {
    /* the same source, inlined here and so compiled to AVX2 and fused multiply-adds */
    linear_few_rows(y, x, weight, bias);
}

AVX512 static void few_rows_avx512(struct MatrixOut y, struct Matrix x, struct Matrix weight,
                                   const float *bias) {
    linear_few_rows(y, x, weight, bias);
}
#endif

static const struct Kernel KERNELS[] = {
    {"base 4x8", 4, 8, tile_4x8, few_rows_base},
#if defined(__x86_64__)
    {"avx2 4x24", 4, 24, tile_4x24, few_rows_avx2},
    {"avx512 8x32", 8, 32, tile_8x32, few_rows_avx512},
#endif
};
static const struct Kernel *kernel; /* the one in use; NULL: matmul_plain */

/* The widest kernel that this processor can run, as an index into KERNELS. */
static size_t kernel_widest(void) {
#if defined(__x86_64__)
    /* Asked at run time: the program may have been compiled on another processor. */
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return __builtin_cpu_supports("avx512f") ? 2 : 1;
#endif
    return 0;
}

/* Does ALIGN_KERNEL, given as `asked`, mean kernel k: by its index, its name or the name's first
 * word? */
static bool kernel_is_asked(size_t k, const char *asked) {
    const char *name = KERNELS[k].name;
    size_t word = strcspn(name, " ");
    /* a single digit: strtoul would accept "00" and " 0" for the first kernel, too */
    bool by_place = strlen(asked) == 1 && (size_t)(*asked - '0') == k;
    return by_place || strcmp(asked, name) == 0
           || (strlen(asked) == word && strncmp(asked, name, word) == 0);
}

/* The index in KERNELS of the requested kernel. If there is none, the program ends with a list of
 * those that exist. */
static size_t kernel_by_name(const char *asked) {
    char names[100] = "plain";
    for (size_t k = 0; k < COUNT(KERNELS); k++) {
        if (kernel_is_asked(k, asked))
            return k;
        /* not this one: collect its name for the message */
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, ", %s", KERNELS[k].name);
    }
    die("ALIGN_KERNEL=%s: there is no such kernel; there are %s", asked, names);
}

/* kernel_choose -- sets `kernel` to the widest that this processor can run, or to the one that the
 * environment variable ALIGN_KERNEL requests: base, avx2 or avx512, or 0, 1, 2; "plain" for none,
 * which leaves matmul_plain. Kernels round differently: to reproduce the bits of another machine,
 * request its kernel.                                                        test: kernel_choose */
static void kernel_choose(void) {
    size_t widest = kernel_widest();
    const char *asked = getenv("ALIGN_KERNEL");
    /* 1. No request: the fastest. An empty variable counts as none. */
    kernel = &KERNELS[widest];
    if (!asked || !*asked)
        return;

    /* 2. No kernel at all. */
    if (strcmp(asked, "plain") == 0) {
        kernel = NULL;
        return;
    }

    /* 3. A kernel by name. If this processor lacks its instructions, the first of them would kill
     *    the program without a message: so the widest possible is taken, with a warning. */
    size_t chosen = kernel_by_name(asked);
    kernel = &KERNELS[MIN(chosen, widest)];
    if (chosen > widest)
        warn("ALIGN_KERNEL=%s: this processor cannot run it; %s is used", asked, kernel->name);
}

/* ---- Packing -------------------------------------------------------------------------------- */

/* Four lines of K consecutive numbers become four neighbouring columns of a panel that is `width`
 * numbers wide: 4 x 4 numbers at a time are transposed in registers. */
static ALWAYS_INLINE void pack_4_lines(float *panel, const float *from, size_t line_stride,
                                       size_t K, size_t width) {
    size_t k = 0;
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
    for (; k + 4 <= K; k += 4, from += 4) {
        /* 1. four numbers of each line: a0 a1 a2 a3, b0 b1 b2 b3, ... */
        float4 a = *(const float4_any *)from;
        float4 b = *(const float4_any *)(from + line_stride);
        float4 c = *(const float4_any *)(from + 2 * line_stride);
        float4 d = *(const float4_any *)(from + 3 * line_stride);

        /* 2. a0 b0 a1 b1 and so on. shufflevector(x, y, ...) picks numbers by their index, where 0
         *    to 3 are those of x and 4 to 7 those of y. */
        float4 ab_01 = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        float4 ab_23 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        float4 cd_01 = __builtin_shufflevector(c, d, 0, 4, 1, 5);
        float4 cd_23 = __builtin_shufflevector(c, d, 2, 6, 3, 7);

        /* 3. a0 b0 c0 d0 for step k, a1 b1 c1 d1 for step k + 1, ... */
        float4_any *to = (float4_any *)(panel + k * width);
        to[0] = __builtin_shufflevector(ab_01, cd_01, 0, 1, 4, 5);
        to[width / 4] = __builtin_shufflevector(ab_01, cd_01, 2, 3, 6, 7);
        to[2 * width / 4] = __builtin_shufflevector(ab_23, cd_23, 0, 1, 4, 5);
        to[3 * width / 4] = __builtin_shufflevector(ab_23, cd_23, 2, 3, 6, 7);
    }
#endif
    /* the remaining steps, or all of them if the compiler has no shufflevector */
    for (; k < K; k++, from++)
        for (size_t i = 0; i < 4; i++)
            panel[k * width + i] = from[i * line_stride];
}

/* A whole panel whose lines are neighbours in memory (x^T of dW, W of y): step k is a copy of
 * `width` numbers. The steps are far apart, and the processor's own prefetcher stops at the end of
 * a memory page. So the data of 32 steps later is prefetched here. */
WIDE static void pack_neighbours(float *panel, struct Matrix lines, size_t width) {
    for (size_t k = 0; k < lines.columns; k++) {
        const float *from = lines.data + k * lines.column_stride;
        for (size_t i = 0; i < width; i += 16)
            __builtin_prefetch(from + 32 * lines.column_stride + i);
        /* A copy of constant size is a few instructions, one of variable size a function call. So
         * the widest panel has a copy of its own; the other widths are multiples of 4. */
        if (width == 32)
            memcpy(panel + k * width, from, 32 * sizeof *panel);
        else
            for (size_t i = 0; i < width; i += 4)
                memcpy(panel + k * width + i, from + i, 4 * sizeof *panel);
    }
}

/* Any other panel: with fewer lines than its width, or with lines that are apart in memory. */
WIDE static void pack_lines(float *panel, struct Matrix lines, size_t width) {
    size_t K = lines.columns;
    size_t stride = lines.row_stride;
    size_t i = 0;

    /* 1. Missing lines are zeros: the tile computes with them, though nobody reads the result. */
    if (lines.rows < width)
        memset(panel, 0, K * width * sizeof *panel);

    /* 2. Lines of consecutive numbers: four at a time, while the next four are prefetched. */
    for (; lines.column_stride == 1 && i + 4 <= lines.rows; i += 4) {
        for (size_t next = i + 4; next < i + 8; next++)
            for (size_t k = 0; k < K; k += 16)
                __builtin_prefetch(lines.data + next * stride + k);
        pack_4_lines(panel + i, lines.data + i * stride, stride, K, width);
    }

    /* 3. The rest, number by number. */
    for (size_t k = 0; k < K; k++)
        for (size_t line = i; line < lines.rows; line++)
            panel[k * width + line] = lines.data[line * stride + k * lines.column_stride];
}

/* pack_panel -- copies lines (n,K), n <= width, into the order in which a tile reads them:
 * panel[k * width + i] = line i, step k. The lines are rows of A or columns of B.
 * By hand: lines 1 2 3 and 4 5 6, width 4: 1 4 0 0, 2 5 0 0, 3 6 0 0.          test: pack_panel */
static void pack_panel(float *panel, struct Matrix lines, size_t width) {
    /* Nearly all panels are of one of two kinds: the lines are neighbours and their steps apart, or
     * the lines are apart and their steps neighbours. */
    if (lines.rows == width && lines.row_stride == 1)
        pack_neighbours(panel, lines, width);
    else
        pack_lines(panel, lines, width);
}

/* ---- Blocks --------------------------------------------------------------------------------- */

/* C = start + A B in progress, for one block: at most BLOCK_ROWS rows of A and KC steps of k. */
struct Product {
    struct MatrixOut c; /* (M,N) */
    struct Matrix start; /* (M,N); may be c itself */
    struct Matrix a, b; /* (M,K) (K,N) */
    float *packed_a; /* A's panels, in order: that of row m begins at m * K */
};

/* Packs MR rows of A, from row m on. */
static void pack_a_panel(const struct Product *product, size_t m) {
    size_t K = product->a.columns;
    /* all rows before m are packed before it, each as K numbers */
    pack_panel(product->packed_a + m * K, matrix_block(product->a, m, 0, kernel->MR, K),
               kernel->MR);
}

/* A tile that extends beyond C is computed aside, from a copy of what it starts from, and the part
 * that belongs to C is copied back. The operations are those of a whole tile, so a row of C has the
 * same bits wherever it is and whatever rows are next to it.                test: rows_company */
static void matmul_tile_aside(struct MatrixOut c, struct Matrix start, const float *a,
                              const float *panel, size_t K) {
    size_t NR = kernel->NR;
    size_t row_bytes = c.columns * sizeof *c.data;
    _Alignas(64) float aside[TILE_MAX];

    /* 1. What the tile starts from. The rest is set to 0: the tile computes with it, too, and
     *    memory may happen to hold numbers on which processors are slow (denormal ones). */
    memset(aside, 0, sizeof aside);
    for (size_t i = 0; start.data && i < c.rows; i++)
        memcpy(aside + i * NR, start.data + i * start.row_stride, row_bytes);

    /* 2. The whole tile; the part that belongs to C is copied back. */
    kernel->tile(K, a, panel, aside, NR, aside, NR);
    for (size_t i = 0; i < c.rows; i++)
        memcpy(c.data + i * c.row_stride, aside + i * NR, row_bytes);
}

/* The tile of C at (m,n): a packed panel of A times a packed panel of B. */
static void matmul_tile(const struct Product *product, const float *panel, size_t m, size_t n) {
    size_t K = product->a.columns;
    /* the packed panel of A for these rows, and the tile's part of start and C */
    const float *a = product->packed_a + m * K;
    struct Matrix start = matrix_block(product->start, m, n, kernel->MR, kernel->NR);
    struct MatrixOut c = matrix_out_block(product->c, m, n, kernel->MR, kernel->NR);
    /* at the lower and right edges of C, the block is smaller than a tile */
    if (c.rows == kernel->MR && c.columns == kernel->NR)
        kernel->tile(K, a, panel, start.data, start.row_stride, c.data, c.row_stride);
    else
        matmul_tile_aside(c, start, a, panel, K);
}

/* Prefetches the rows that the next tile starts from, which will be read and then written. */
static void prefetch_start(const struct Product *product, size_t m, size_t n) {
    struct Matrix next = matrix_block(product->start, m, n, kernel->MR, kernel->NR);
    /* one request per cache line, of 16 floats */
    for (size_t i = 0; next.data && i < next.rows; i++)
        for (size_t j = 0; j < next.columns; j += 16)
            __builtin_prefetch(next.data + i * next.row_stride + j, 1);
}

/* One task of a thread: packs the panel of B at column n and multiplies it by rows m0 to m1 - 1 of
 * A. The panel stays in a near cache while the panels of A pass by. */
static void matmul_panel(const struct Product *product, size_t n, size_t m0, size_t m1) {
    size_t MR = kernel->MR;
    size_t NR = kernel->NR;
    size_t K = product->a.columns;
    float *panel = thread_scratch(SCRATCH_B, NR * KC, sizeof *panel);
    /* 1. NR columns of B. A panel's lines are rows, so B is transposed, which moves nothing. */
    pack_panel(panel, transposed(matrix_block(product->b, 0, n, K, NR)), NR);

    /* 2. The tiles of these columns, from top to bottom. While one is computed, memory delivers
     *    what the next one starts from. */
    for (size_t m = m0; m < m1; m += MR) {
        if (m + MR < m1)
            prefetch_start(product, m + MR, n);
        matmul_tile(product, panel, m, n);
    }
}

/* A block computed by the calling thread alone. */
static void matmul_block_alone(const struct Product *product) {
    /* all of A, then B panel by panel: each panel of A is read once for each panel of B */
    for (size_t m = 0; m < product->c.rows; m += kernel->MR)
        pack_a_panel(product, m);
    for (size_t n = 0; n < product->c.columns; n += kernel->NR)
        matmul_panel(product, n, 0, product->c.rows);
}

/* How many rows of C a task has: all M, or fewer, so that each thread gets about four tasks and
 * none waits long for the last one. */
static size_t rows_per_task(size_t M, size_t panels) {
    size_t MR = kernel->MR;
    size_t rows = M;
    /* four each: if another program delays a thread, the others take over its remaining tasks */
    size_t tasks_wanted = 4 * (size_t)omp_get_max_threads();
    while (panels * ((M + rows - 1) / rows) < tasks_wanted && rows > MR)
        /* half as many, rounded up to whole tiles */
        rows = (rows / 2 + MR - 1) / MR * MR;
    return rows;
}

/* A block computed by all threads. */
static void matmul_block(const struct Product *product) {
    size_t M = product->c.rows;
    size_t N = product->c.columns;

    /* 1. Small products stay on this thread: starting a team costs microseconds (see chapter 10 on
     *    such thresholds), and attention makes many small products. Inside a parallel loop the
     *    other threads are busy anyway. */
    double multiplications = (double)M * (double)N * (double)product->a.columns;
    if (multiplications <= 2e5 || omp_in_parallel()) {
        matmul_block_alone(product);
        return;
    }

    /* 2. A task is a panel of B and a range of rows; `stretches` ranges cover M. */
    size_t panels = (N + kernel->NR - 1) / kernel->NR;
    size_t rows = rows_per_task(M, panels);
    size_t stretches = (M + rows - 1) / rows;
#pragma omp parallel
    {
        /* 3. All threads pack A. After this loop each one waits for the others: a tile may need
         *    what another thread has packed. */
#pragma omp for schedule(static)
        for (size_t m = 0; m < M; m += kernel->MR) {
            pack_a_panel(product, m);
        }

        /* 4. A thread that is done takes the next task; neighbouring tasks share B's panel. */
#pragma omp for schedule(dynamic) nowait
        for (size_t task = 0; task < panels * stretches; task++) {
            size_t m = task % stretches * rows;
            matmul_panel(product, task / stretches * kernel->NR, m, MIN(M, m + rows));
        }
    }
}

/* matmul_from -- C = start + A B, block by block; the three functions below call it.
 * in   start (M,N), a (M,K), b (K,N)          out  c (M,N)                    test: matmul_plain */
static void matmul_from(struct MatrixOut c, struct Matrix start, struct Matrix a, struct Matrix b) {
    /* 1. (M,K) times (K,N) makes (M,N). Views that do not fit would read and write beyond their
     *    memory, and the results would be wrong without any sign of it. */
    CHECK(a.rows == c.rows && b.columns == c.columns && a.columns == b.rows,
          "matmul: (%zu,%zu) times (%zu,%zu) does not make (%zu,%zu); this is a fault of align",
          a.rows, a.columns, b.rows, b.columns, c.rows, c.columns);

    /* 2. The definition, if ALIGN_KERNEL requests it, and also for an empty sum (K = 0): C is then
     *    `start`, but the loop below would write nothing. */
    if (!kernel || a.columns == 0) {
        matmul_plain(c, start, a, b);
        return;
    }

    /* 3. Room for the packed rows of A of one block, the last panel filled up with zeros. */
    size_t block_rows = MIN(c.rows, (size_t)BLOCK_ROWS) + kernel->MR;
    float *packed_a =
        thread_scratch(SCRATCH_A, block_rows * MIN(a.columns, (size_t)KC), sizeof *packed_a);
    for (size_t m = 0; m < c.rows; m += BLOCK_ROWS)
        for (size_t k = 0; k < a.columns; k += KC) {
            /* 4. The first KC steps begin with `start`; each later block adds to what the earlier
             *    ones have left in C. */
            struct MatrixOut c_block = matrix_out_block(c, m, 0, BLOCK_ROWS, c.columns);
            struct Matrix first_start = matrix_block(start, m, 0, BLOCK_ROWS, c.columns);
            struct Product product = {
                .c = c_block,
                .start = k == 0 ? first_start : readable(c_block),
                .a = matrix_block(a, m, k, BLOCK_ROWS, KC),
                .b = matrix_block(b, k, 0, KC, b.columns),
                .packed_a = packed_a,
            };
            matmul_block(&product);
        }
}

/* matmul -- C = A B.                         in  a (M,K), b (K,N)              out  c (M,N)
 * C must not overlap A or B. Inside a parallel loop it runs on the calling thread alone.
 * By hand: [1 2; 3 4] [5; 6] = [1*5 + 2*6; 3*5 + 4*6] = [17; 39].   test: matmul, matmul_threads */
static void matmul(struct MatrixOut c, struct Matrix a, struct Matrix b) {
    /* a matrix of zeros to start from: a shape without data */
    matmul_from(c, (struct Matrix){.rows = c.rows, .columns = c.columns}, a, b);
}

/* matmul_add -- C += A B: this is how the gradients of several micro-batches add up.
 * By hand: to the [17; 39] above [1 3; 2 4] [5; 6] = [23; 34]: [40; 73].            test: matmul */
static void matmul_add(struct MatrixOut c, struct Matrix a, struct Matrix b) {
    /* start and result are the same memory: a tile reads its part before it writes it */
    matmul_from(c, readable(c), a, b);
}

/* matmul_bias -- C = A B, with bias (N) added to each row.
 * By hand: [1 2; 3 4] [5; 6] and the bias 3: [20; 42].                             test: matmul */
static void matmul_bias(struct MatrixOut c, const float *bias, struct Matrix a, struct Matrix b) {
    /* a row stride of 0: every row of C starts from the same bias */
    struct Matrix bias_rows = {bias, c.rows, c.columns, 0, 1};
    matmul_from(c, bias_rows, a, b);
}

/* =============================================================================================
 * Chapter 10 - Layers, forward and backward
 *
 * What does each layer compute, and how does blame flow back through it? A layer is a function
 * y = f(x, weights). Its backward pass is given dy, the derivative of the loss by y, and must
 * return the derivatives by x and by the weights. This is the chain rule, applied layer by layer,
 * from the loss back to the embedding. Each forward pass has its backward pass next to it.
 *
 *     linear        y = x W + b             dx = dy W^T,  dW += x^T dy,  db += the sum of dy's rows
 *     layer norm    y = (x - mean) / std    dx = (dy - mean(dy) - y mean(dy y)) / std
 *     gelu          y = x sigmoid(1.5958 (x + 0.0447 x^3))    a soft switch: lets x pass where it
 *                                                             is positive
 *     embedding     y = wte[id] + wpe[t]    dx goes to the two rows that were read
 *     attention     y = softmax(q k) v      the only layer that mixes information across time
 *
 *     x = (1, 2), W = [3 4; 5 6], b = (7, 8):    y  = (1*3 + 2*5 + 7, 1*4 + 2*6 + 8) = (20, 24)
 *     given dy = (1, -2):                        dx = (3 - 8, 5 - 12) = (-5, -7)
 *                                                dW = [1 -2; 2 -4],   db = (1, -2)
 *
 * dx is overwritten, unless a layer's comment says that it adds to it. Gradients of weights are
 * added to, so that several micro-batches accumulate into one step.
 *
 * Threads. `omp parallel for if (work > limit)` starts a team of threads only for enough work: the
 * start and the wait for the last thread cost some microseconds, the time of 10,000 to 100,000
 * simple operations. The limits differ because the work per counted number does: gelu's includes
 * an exponential (10,000); layer norm goes over each row several times (20,000); embedding, bias
 * and products of few rows do one operation on numbers that must be fetched (50,000), the residual
 * sum one addition of neighbours (100,000); matmul, which has to share its packing as well, starts
 * at 200,000 multiplications. They need not be exact: any limit gives the same bits.
 *
 * What enters: activations (N,C), a row for each token of a batch. What leaves: the same shape.
 * ============================================================================================= */

/* A tensor: a named array of floats, with one dimension or two. Its declaration (chapter 11) gives
 * it a shape and its name in a checkpoint. Next to its numbers w are their gradient d and AdamW's
 * moments m and v, of the same shape. d, m and v are NULL while nothing is trained, and in a tensor
 * that is frozen while others are trained: a backward pass then skips it. */
struct Tensor {
    char name[64];
    size_t shape[2], ndim, n; /* n: the product of the shape */
    bool loaded; /* its numbers came from a file */
    bool bits; /* its numbers are never used: any bits may be there instead of floats */
    float *w, *d, *m, *v;
};

/* FEW_ROWS: with at most this many rows of x, a linear layer needs no packing. STRIP: how many
 * columns one thread sums over all rows. */
enum { FEW_ROWS = 16, STRIP = 64 };

/* ---- Linear --------------------------------------------------------------------------------- */

/* row_dot_4 -- out[r] = x . y_r for rows r < `rows` <= 4 of y, which are y_row numbers apart.
 * Four sums are in progress at once: a single one would have to wait for its own last addition.
 *                                                                               test: few_rows */
WIDE static void row_dot_4(float *out, const float *x, const float *y, size_t y_row, size_t n,
                           size_t rows) {
    /* fewer than four, at the end of a matrix: one by one, with the same additions */
    if (rows < 4) {
        for (size_t r = 0; r < rows; r++)
            out[r] = row_dot(x, y + r * y_row, n);
        return;
    }
    /* 1. 16 lanes for each of the four, as in row_dot. Each load of x serves four rows. */
    float lane[4][LANES] = {{0}};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++)
            for (size_t r = 0; r < 4; r++)
                lane[r][j] += x[i + j] * y[r * y_row + i + j];

    for (; i < n; i++) {
        for (size_t r = 0; r < 4; r++)
            lane[r][0] += x[i] * y[r * y_row + i];
    }

    /* 2. The sum of the 16 lanes, for each of the four. */
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; r++)
        out[r] = lane_sum(lane[r]);
}

/* linear_forward -- new numbers for each token, as weighted sums of its old ones.
 *   y = x W + bias
 * in   x (N,in), weight (in,out), bias (out)         out  y (N,out)
 * This is GPT-2's Conv1D: its W is (in,out), where torch's Linear has (out,in). A row of y has the
 * same bits however many rows are next to it, so a text's score does not depend on its batch.
 * By hand: the chapter's example: (1, 2) [3 4; 5 6] + (7, 8) = (20, 24).
 *                                     test: linear_hand, linear_golden, few_rows, rows_company */
static void linear_forward(float *y, const float *x, size_t N, const struct Tensor *weight,
                           const struct Tensor *bias) {
    size_t in = weight->shape[0];
    size_t out = weight->shape[1];
    struct MatrixOut all_y = matrix_out(y, N, out);
    struct Matrix all_x = matrix(x, N, in);
    struct Matrix all_weight = matrix(weight->w, in, out);
    /* 1. Many rows: a matrix product, which starts from the bias. */
    if (N > FEW_ROWS || !kernel) {
        matmul_bias(all_y, bias->w, all_x, all_weight);
        return;
    }

    /* 2. Few rows: each thread computes strips of columns. For a single row the strips are as long
     *    as possible: most of the time goes into reading W, once, and long stretches of memory are
     *    read faster. */
    size_t threads = (size_t)omp_get_max_threads();
    size_t strip = N > 1 ? 384 : (out / threads + 15) / 16 * 16 + 16;
#pragma omp parallel for schedule(static) if (N * in * out > 50000)
    for (size_t j = 0; j < out; j += strip)
        kernel->few_rows(matrix_out_block(all_y, 0, j, N, strip), all_x,
                         matrix_block(all_weight, 0, j, in, strip), bias->w + j);
}

/* Columns j0..j1-1 of dbias += the sum of dy's rows. One thread sums a whole column. */
static void bias_backward_strip(float *dbias, struct Matrix dy, size_t j0, size_t j1) {
    /* row by row, not column by column, since the numbers of a row are neighbours in memory */
    for (size_t n = 0; n < dy.rows; n++)
        for (size_t j = j0; j < j1; j++)
            dbias[j] += dy.data[n * dy.row_stride + j];
}

/* linear_backward -- what a linear layer passes down, and the gradients of its weights.
 *   dx = dy W^T         dW += x^T dy         dbias += the sum of dy's rows
 * in   dy (N,out), x (N,in)       out  dx (N,in), written; weight->d (in,out), bias->d (out)
 * y_j = sum_i x_i W_ij + b_j: so x_i is to blame for each y_j in proportion to W_ij, W_ij in
 * proportion to x_i, and b_j for all of it.
 * By hand: the chapter's example: dx (-5, -7), dW [1 -2; 2 -4], db (1, -2).
 *                                              test: linear_hand, linear_golden, linear_gradient */
static void linear_backward(float *dx, const float *dy, const float *x, size_t N,
                            struct Tensor *weight, struct Tensor *bias) {
    size_t in = weight->shape[0];
    size_t out = weight->shape[1];
    struct Matrix all_dy = matrix(dy, N, out);

    /* 1. To the layer below. This is needed even if the weights are frozen. */
    matmul(matrix_out(dx, N, in), all_dy, transposed(matrix(weight->w, in, out)));

    /* 2. To the weights: x^T dy sums, over all tokens, input i times the blame of output j. */
    if (weight->d)
        matmul_add(matrix_out(weight->d, in, out), transposed(matrix(x, N, in)), all_dy);

    /* 3. To the bias: each thread has a strip of columns, so no two add to the same number. */
    if (!bias->d)
        return;
#pragma omp parallel for if (N * out > 50000)
    for (size_t j = 0; j < out; j += STRIP)
        bias_backward_strip(bias->d, all_dy, j, MIN(out, j + STRIP));
}

/* ---- Layer norm ----------------------------------------------------------------------------- */

/* The input of a layer norm, and what it keeps of each row for the backward pass. */
struct LayerNormRows {
    size_t N;
    const float *x; /* (N,C) */
    float *mean; /* (N) */
    float *rstd; /* (N) 1 / standard deviation */
};

/* layernorm_row -- one token's numbers, shifted and scaled to mean 0 and deviation 1 [3].
 *   xhat = (x - mean) rstd,   rstd = 1 / sqrt(variance + eps)      y = xhat weight + bias
 * in   x (C), weight, bias (C)           out  y (C), mean, rstd
 * Without it activations would grow from layer to layer, and rows of large numbers would learn at
 * another pace than rows of small ones. weight and bias let each column have a scale and a shift
 * again, where that helps.
 * By hand: x = (3, 3, 7, 7), weight 2, bias 0.5, eps 0: mean 5, variance 4, rstd 0.5,
 * xhat = (-1, -1, 1, 1), y = (-1.5, -1.5, 2.5, 2.5).                            test: layernorm */
WIDE static void layernorm_row(float *y, float *mean, float *rstd, const float *x,
                               const struct Tensor *weight, const struct Tensor *bias, float eps) {
    size_t C = weight->n;
    const float *w = weight->w;
    const float *b = bias->w;

    /* 1. Subtract the mean; y holds the differences for now. */
    float m = row_sum(x, C) / (float)C;
    for (size_t c = 0; c < C; c++)
        y[c] = x[c] - m;

    /* 2. The variance, from the differences: the mean of squares minus the square of the mean would
     *    lose all its digits where the mean is large. eps keeps the division finite in a row of
     *    equal numbers, whose variance is 0. */
    float r = 1.0f / sqrtf(row_dot(y, y, C) / (float)C + eps);
    for (size_t c = 0; c < C; c++)
        y[c] = y[c] * r * w[c] + b[c];

    /* 3. Two numbers per row are kept; the backward pass recomputes xhat from x and them. */
    *mean = m;
    *rstd = r;
}

static void layernorm_forward(float *y, struct LayerNormRows rows, const struct Tensor *weight,
                              const struct Tensor *bias, float eps) {
    size_t C = weight->n;
    /* each row by itself: a layer norm never mixes tokens */
#pragma omp parallel for if (rows.N * C > 20000)
    for (size_t n = 0; n < rows.N; n++)
        layernorm_row(y + n * C, rows.mean + n, rows.rstd + n, rows.x + n * C, weight, bias, eps);
}

/* layernorm_backward_row -- the derivative by one token's numbers, ADDED to dx: in GPT-2 x goes
 * through the layer norm and also around it, and dx already has the derivative of the way around.
 *   g = dy weight         dx += rstd (g - mean(g) - xhat mean(g xhat))
 * in   dy, x (C), mean, rstd          in, out  dx (C)
 * rstd g alone would be right if mean and rstd were constants. But each x moves them, too. Two
 * changes of all x leave y as it is, so dx must have no part along them: to add a constant to all
 * (hence the mean of g is subtracted), and to stretch all away from their mean (hence the multiple
 * of xhat that is contained in g).
 * By hand: the example above with dy = (4, 0, 0, 0): g = (8, 0, 0, 0), mean(g) = 2,
 * mean(g xhat) = -2: dx += 0.5 (8 - 2 - 2, -2 - 2, -2 + 2, -2 + 2) = (2, -2, 0, 0).
 *                                                           test: layernorm, layernorm_gradient */
WIDE static void layernorm_backward_row(float *dx, const float *dy, const float *x, float mean,
                                        float rstd, const struct Tensor *weight) {
    size_t C = weight->n;
    const float *w = weight->w;

    /* 1. Back through weight: g = d loss / d xhat. Scratch for g and g xhat, C floats each. */
    float *g = thread_scratch(SCRATCH_ROW, 2 * C, sizeof *g);
    float *gh = g + C;
    for (size_t c = 0; c < C; c++) {
        g[c] = dy[c] * w[c];
        gh[c] = g[c] * ((x[c] - mean) * rstd);
    }

    /* 2. How much of g only moves the mean of x, and how much only moves its deviation? */
    float mean_g = row_sum(g, C) / (float)C;
    float mean_gh = row_sum(gh, C) / (float)C;

    /* 3. Both are subtracted, and rstd is the slope of what remains. */
    for (size_t c = 0; c < C; c++)
        dx[c] += rstd * (g[c] - mean_g - (x[c] - mean) * rstd * mean_gh);
}

/* Columns c0..c1-1 of dweight += the sum over rows of dy xhat, of dbias += the sum of dy. */
static void layernorm_backward_strip(float *dweight, float *dbias, struct Matrix dy,
                                     struct LayerNormRows rows, size_t c0, size_t c1) {
    for (size_t n = 0; n < rows.N; n++) {
        const float *dy_n = dy.data + n * dy.row_stride;
        const float *x_n = rows.x + n * dy.row_stride;
        /* y = xhat weight + bias: slope xhat by the weight (recomputed here), 1 by the bias */
        for (size_t c = c0; c < c1; c++) {
            dweight[c] += dy_n[c] * (x_n[c] - rows.mean[n]) * rows.rstd[n];
            dbias[c] += dy_n[c];
        }
    }
}

/* layernorm_backward -- all tokens.   in  dy (N,C), rows as the forward pass left them
 * out  dx (N,C), added to; weight->d, bias->d (C)           test: layernorm, layernorm_gradient */
static void layernorm_backward(float *dx, const float *dy, struct LayerNormRows rows,
                               struct Tensor *weight, struct Tensor *bias) {
    size_t N = rows.N;
    size_t C = weight->n;

    /* 1. dx: the rows are independent of each other, so any thread may take any of them. */
#pragma omp parallel for if (N * C > 20000)
    for (size_t n = 0; n < N; n++)
        layernorm_backward_row(dx + n * C, dy + n * C, rows.x + n * C, rows.mean[n], rows.rstd[n],
                               weight);

    /* 2. Weight and bias: sums over rows, so threads share the columns, as for linear's bias. A
     *    frozen layer has nothing to learn. */
    if (!weight->d)
        return;
#pragma omp parallel for if (N * C > 20000)
    for (size_t c = 0; c < C; c += STRIP)
        layernorm_backward_strip(weight->d, bias->d, matrix(dy, N, C), rows, c, MIN(C, c + STRIP));
}

/* ---- Gelu ----------------------------------------------------------------------------------- */

/* gelu -- the activation between a block's two wide layers, in the tanh form that GPT-2 was trained
 * with ("gelu_new") [18].
 *   y = x/2 (1 + tanh(u)),   u = sqrt(2/pi) (x + 0.044715 x^3)
 * Since (1 + tanh u) / 2 = sigmoid(2u), this is x sigmoid(2u), with a single exponential. The
 * sigmoid is the gate: near 1 for large x, which pass; near 0 for very negative x, which do not.
 * Unlike max(0, x) it also has a slope for negative x. 1.5957691 is 2 sqrt(2/pi).
 * By hand: x = 2: 2u = 1.5958 * 2.3577 = 3.7624, gate 0.9773, y = 1.9546; x = -1: y = -0.1588.
 *                                                                                    test: gelu */
static inline float gelu_gate(float x) {
    /* 2u, then its sigmoid by the plain formula: exp_fast cannot overflow, so neither can this */
    float u2 = 1.5957691f * (x + 0.044715f * x * x * x);
    return 1.0f / (1.0f + exp_fast(-u2));
}

WIDE static void gelu_row(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] * gelu_gate(x[i]);
}

/* gelu_backward_row -- dx contains dy on entry, and is multiplied by the slope.
 *   y = x s,  s = sigmoid(2u):      dy/dx = s + x s (1 - s) d(2u)/dx
 * By hand: x = -1: s = 0.1588, d(2u)/dx = 1.5958 (1 + 0.1341) = 1.8098: slope
 * 0.1588 - 0.1588 * 0.8412 * 1.8098 = -0.0830.                       test: gelu, gelu_gradient */
WIDE static void gelu_backward_row(float *dx, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float s = gelu_gate(x[i]);
        float slope = 1.5957691f * (1.0f + 3.0f * 0.044715f * x[i] * x[i]);
        /* the product rule: x by itself, and x inside its gate */
        dx[i] *= s + x[i] * s * (1.0f - s) * slope;
    }
}

static void gelu_forward(float *y, const float *x, size_t N, size_t C) {
    /* number by number: rows serve only to divide the work */
#pragma omp parallel for if (N * C > 10000)
    for (size_t n = 0; n < N; n++)
        gelu_row(y + n * C, x + n * C, C);
}

static void gelu_backward(float *dx, const float *x, size_t N, size_t C) {
    /* x is gelu's input. Its output would not do: gelu first falls and then rises, so two different
     * x can have the same y. */
#pragma omp parallel for if (N * C > 10000)
    for (size_t n = 0; n < N; n++)
        gelu_backward_row(dx + n * C, x + n * C, C);
}

/* ---- Embedding ------------------------------------------------------------------------------ */

/* One token: what it is, plus its place. */
static void embedding_row(float *x, const float *token, const float *position, size_t C) {
    for (size_t c = 0; c < C; c++)
        x[c] = token[c] + position[c];
}

/* embedding_forward -- tokens become numbers: x (N,C) = wte[id] + wpe[position].
 * in   the batch's ids and positions (N); wte (V,C), wpe (n_positions,C)
 * Both vectors are learnt. Without wpe the model could not tell "dog bites man" from "man bites
 * dog": attention sums over the tokens it sees, in whatever order they come.
 * By hand: id 1 at positions 0, 1; wte[1] = (5, 6), wpe = (0.5, 0), (0, 0.5): (5.5, 6), (5, 6.5).
 *                                                                               test: embedding */
static void embedding_forward(float *x, const struct Batch *batch, const float *wte,
                              const float *wpe, size_t C) {
    /* A look-up in two tables. A row that is 1 at `id` and 0 elsewhere, times wte, would give the
     * same with V times the work. */
#pragma omp parallel for if (batch->N * C > 50000)
    for (size_t n = 0; n < batch->N; n++)
        embedding_row(x + n * C, wte + (size_t)batch->ids[n] * C,
                      wpe + (size_t)batch->position[n] * C, C);
}

/* Columns c0..c1-1 of all tokens' gradients, added to the table rows that were read. */
static void embedding_backward_strip(float *dwte, float *dwpe, const float *dx,
                                     const struct Batch *batch, size_t C, size_t c0, size_t c1) {
    /* one thread goes through all tokens in order, so each sum has one order */
    for (size_t n = 0; n < batch->N; n++) {
        float *dtoken = dwte + (size_t)batch->ids[n] * C;
        float *dposition = dwpe + (size_t)batch->position[n] * C;
        /* added, since other tokens, and wte's other use as the output layer, contribute too */
        for (size_t c = c0; c < c1; c++) {
            dtoken[c] += dx[n * C + c];
            dposition[c] += dx[n * C + c];
        }
    }
}

/* embedding_backward -- how should the vector of a token that was read change? A sum has slope 1 by
 * both its summands, so dx goes to both; a token that occurs in several places gets the sum.
 * Threads share the columns, not the tokens: two tokens with one id would write to the same row.
 * By hand: the example above with dx = (1, 2), (3, 4): dwte[1] += (4, 6), dwpe += (1, 2), (3, 4).
 *                                                                               test: embedding */
static void embedding_backward(float *dwte, float *dwpe, const float *dx, const struct Batch *batch,
                               size_t C) {
    /* STRIP, 64 columns, is four cache lines: with smaller pieces, several threads would write to
     * one line and wait for each other */
#pragma omp parallel for if (batch->N * C > 50000)
    for (size_t c = 0; c < C; c += STRIP)
        embedding_backward_strip(dwte, dwpe, dx, batch, C, c, MIN(C, c + STRIP));
}

/* ---- Attention ------------------------------------------------------------------------------
 *
 * Causal multi-head self-attention [2] Eq. 1, for each sequence separately. Each token has three
 * vectors in each head: a query q (what am I looking for?), a key k (what do I have?) and a value v
 * (what do I say?). A token compares its query with the keys of all tokens up to itself, and takes
 * the mean of their values, weighted by how well the keys fit:
 *
 *     pass 1  scores      score_tj = q_t . k_j / sqrt(HS)                 (T,T) in each head
 *     pass 2  mask        j > t, the future, does not count
 *     pass 3  softmax     p_t = softmax(score_t)                          lse_t is kept
 *     pass 4  mixture     out_t = sum_j p_tj v_j                          (T,HS)
 *
 * A token looks back, never forward. That makes it a language model, and lets all T positions be
 * trained at once. The division by sqrt(HS) keeps scores near 1 in size, whatever the size of the
 * head; without it softmax would pick a single key from the start, and hardly learn.
 *
 * The matrix of all p, (T,T), never exists as a whole: it is computed ATTENTION_ROWS rows at a time
 * and recomputed in the backward pass, for which lse is enough [17]. So memory grows with T, not
 * with its square. In the formulas below P is a block of its rows; `query`, `key` and `value` are
 * the vectors of a head as matrices (T,HS), as in struct AttentionHead.
 *
 *     HS = 1, two tokens: q = (5, 1), k = (0, ln 3), v = (10, 20)
 *     t = 0 sees only itself:       p = (1),           out = 10                     lse = 0
 *     t = 1 scores 1*0 and 1*ln 3:  p = (0.25, 0.75),  out = 2.5 + 15 = 17.5        lse = ln 4
 * --------------------------------------------------------------------------------------------- */

enum { ATTENTION_ROWS = 64 };

struct AttentionShape {
    size_t C, NH, HS;
    float scale; /* 1 / sqrt(HS) */
};

static struct AttentionShape attention_shape(size_t C, size_t NH) {
    size_t HS = C / NH;
    return (struct AttentionShape){C, NH, HS, 1 / sqrtf((float)HS)};
}

/* One head of one sequence of T tokens. */
struct AttentionHead {
    size_t T, HS, NH;
    size_t h; /* the head's number, 0 to NH - 1; model->h, the blocks, is something else */
    size_t row, column; /* in arrays (N,C): the sequence's first row, the head's first column */
    struct Matrix query, key, value; /* (T,HS) each, views of qkv */
    float scale;
    /* Rows from fork on do not see rows shared..fork-1: there are two answers after one prompt
     * (collate_pairs). fork = shared: nothing is hidden. */
    size_t shared, fork;
};

/* Head h of sequence b in a batch; task = b * NH + h. A row of qkv (N,3C) has a token's queries of
 * all heads, then its keys, then its values. */
static struct AttentionHead attention_head(const float *qkv, const struct Batch *batch,
                                           struct AttentionShape shape, size_t task) {
    size_t C = shape.C;
    size_t HS = shape.HS;
    /* 1. Which rows belong to the sequence, and which columns to the head? */
    size_t b = task / shape.NH;
    size_t start = batch->start[b];
    size_t T = batch->start[b + 1] - start;
    size_t h = task % shape.NH;
    size_t column = h * HS;

    /* 2. The views: queries are in columns 0 to C - 1, keys from C on, values from 2C on, with the
     *    NH heads side by side in each. Nothing is copied: a head's rows are 3C numbers apart. */
    struct Matrix all = matrix(qkv, batch->N, 3 * C);
    return (struct AttentionHead){
        .T = T,
        .HS = HS,
        .NH = shape.NH,
        .h = h,
        .row = start,
        .column = column,
        .query = matrix_block(all, start, column, T, HS),
        .key = matrix_block(all, start, C + column, T, HS),
        .value = matrix_block(all, start, 2 * C + column, T, HS),
        .scale = shape.scale,
        /* only batches of pairs have forks */
        .shared = batch->fork ? batch->shared[b] : 0,
        .fork = batch->fork ? batch->fork[b] : 0,
    };
}

/* attention_scores -- passes 1 and 2 for the queries t0..t1-1: out p (t1 - t0, t1), a row for each
 * query, a column for each key that one of them may see. The future inside the last columns is
 * left to pass 3, which reads only t + 1 numbers of row t.      test: attention, collate_pairs */
static void attention_scores(float *p, const struct AttentionHead *head, size_t t0, size_t t1) {
    /* pass 1: the scores, query key^T / sqrt(HS). One product for all t1 - t0 queries computes some
     * scores of the future in vain, but runs at the speed of matmul. */
    struct Matrix query = matrix_block(head->query, t0, 0, t1 - t0, head->HS);
    struct Matrix key = matrix_block(head->key, 0, 0, t1, head->HS);
    matmul(matrix_out(p, t1 - t0, t1), query, transposed(key));
    for (size_t i = 0; i < (t1 - t0) * t1; i++)
        p[i] *= head->scale;

    /* pass 2, of a pair of answers: e^-inf = 0, as if the chosen answer had never been written. The
     * mask of the future needs no numbers: pass 3 stops at the query's own key. */
    for (size_t t = MAX(t0, head->fork); t < t1; t++)
        for (size_t j = head->shared; j < head->fork; j++)
            p[(t - t0) * t1 + j] = -INFINITY;
}

/* The index in lse (N,NH) for row t of a head's sequence. */
static size_t lse_place(const struct AttentionHead *head, size_t t) {
    return (head->row + t) * head->NH + head->h;
}

/* The head's part of an array (N,C), to write to: T rows, HS columns. */
static struct MatrixOut head_columns(struct MatrixOut all, const struct AttentionHead *head) {
    return matrix_out_block(all, head->row, head->column, head->T, head->HS);
}

/* attention_softmax -- pass 3 for query t: p (t1) contains scores on entry and probabilities
 * afterwards. Returns the scores' log-sum-exp.                                 test: attention */
static float attention_softmax(float *p, size_t t, size_t t1) {
    /* Only t + 1 numbers, the keys up to the query's own: that is the mask of the future. */
    float lse = softmax(p, t + 1);
    /* The future gets weight 0: pass 4, a matrix product, would read what pass 1 has left there. */
    for (size_t j = t + 1; j < t1; j++)
        p[j] = 0;
    return lse;
}

/* attention_forward_head -- the four passes, ATTENTION_ROWS queries at a time.
 * out  the head's columns of out (N,C) and its numbers in lse (N,NH): log sum_j e^(score_tj), all
 *      that the backward pass needs to recompute p
 *                             test: attention_hand, attention; gdb: break attention_forward_head */
static void attention_forward_head(struct MatrixOut out, float *lse,
                                   const struct AttentionHead *head) {
    /* Blocks of queries: a thread needs memory for only one block of p, (ATTENTION_ROWS,T). A block
     * includes all keys of its rows, so one softmax per row is final. */
    size_t T = head->T;
    struct MatrixOut mixture = head_columns(out, head);
    float *p = thread_scratch(SCRATCH_SCORES, ATTENTION_ROWS * T, sizeof *p);
    for (size_t t0 = 0; t0 < T; t0 += ATTENTION_ROWS) {
        size_t t1 = MIN(T, t0 + ATTENTION_ROWS);

        /* passes 1 and 2: p becomes the masked scores (t1 - t0, t1) */
        attention_scores(p, head, t0, t1);

        /* pass 3: each row becomes probabilities */
        for (size_t t = t0; t < t1; t++)
            lse[lse_place(head, t)] = attention_softmax(p + (t - t0) * t1, t, t1);

        /* pass 4: the mixture  out = P value,  (rows,t1) times (t1,HS) */
        matmul(matrix_out_block(mixture, t0, 0, t1 - t0, head->HS), matrix(p, t1 - t0, t1),
               matrix_block(head->value, 0, 0, t1, head->HS));
    }
}

/* attention_forward -- all heads of all sequences; each is a separate task, for any thread.
 * in   qkv (N,3C)       out  out (N,C), lse (N,NH)                             test: attention */
static void attention_forward(float *out, float *lse, const float *qkv, const struct Batch *batch,
                              struct AttentionShape shape) {
    struct MatrixOut all_out = matrix_out(out, batch->N, shape.C);
    /* dynamic: a long sequence takes far longer than a short one, so with equal shares some threads
     * would be idle */
#pragma omp parallel for schedule(dynamic)
    for (size_t task = 0; task < batch->B * shape.NH; task++) {
        struct AttentionHead head = attention_head(qkv, batch, shape, task);
        attention_forward_head(all_out, lse, &head);
    }
}

/* Pass 3 recomputed for query t, from scores p (t1): softmax(score) = e^(score - lse). */
static void attention_softmax_again(float *p, float lse, size_t t, size_t t1) {
    /* with lse known, there is no maximum and no sum to find */
    for (size_t j = 0; j <= t; j++)
        p[j] = exp_fast(p[j] - lse);
    /* the future, as in the forward pass */
    for (size_t j = t + 1; j < t1; j++)
        p[j] = 0;
}

/* attention_softmax_backward -- back through passes 3 to 1 for query t: from the probabilities to
 * the products q_t . k_j.
 *   ds_j = p_j (dp_j - D),   D = sum_j p_j dp_j = dout . out             [17] Appendix B.2
 *   d loss / d (q_t . k_j) = scale ds_j
 * in   p (t1), the row's probabilities; dout, out (HS)
 * in, out  dp (t1): d loss / d p_j, then d loss / d (q_t . k_j)
 * D is the mean of dp under p. Probabilities add up to 1, so what one gains the others lose: only a
 * dp above the mean is worth raising. D needs no sum over T tokens, since out is the mean of the
 * values under p.
 * By hand: the example's t = 1 with dout = 4: dp = (40, 80), D = 4 * 17.5 = 70,
 * ds = (0.25 * -30, 0.75 * 10) = (-7.5, 7.5); scale is 1.    test: attention_hand */
static void attention_softmax_backward(float *dp, const float *p, const float *dout,
                                       const float *out, const struct AttentionHead *head, size_t t,
                                       size_t t1) {
    /* 1. D = dout . out: HS products instead of t + 1. */
    float D = 0;
    for (size_t c = 0; c < head->HS; c++)
        D += dout[c] * out[c];
    /* 2. Back through softmax, and through the scale of pass 1. */
    for (size_t j = 0; j <= t; j++)
        dp[j] = p[j] * (dp[j] - D) * head->scale;
    /* 3. The mask: no score of the future was used, so none has a derivative. */
    for (size_t j = t + 1; j < t1; j++)
        dp[j] = 0;
}

/* The gradient of one head: views of dqkv, (T,HS) each. */
struct AttentionGradient {
    struct MatrixOut query, key, value;
};

static struct AttentionGradient attention_gradient(float *dqkv, const struct Batch *batch,
                                                   struct AttentionShape shape,
                                                   const struct AttentionHead *head) {
    size_t C = shape.C;
    struct MatrixOut all = matrix_out(dqkv, batch->N, 3 * C);
    /* dqkv has the layout of qkv: the gradient of each number is at the number's own place, and the
     * linear layer below takes all three parts as a single dy */
    return (struct AttentionGradient){
        .query = matrix_out_block(all, head->row, head->column, head->T, head->HS),
        .key = matrix_out_block(all, head->row, C + head->column, head->T, head->HS),
        .value = matrix_out_block(all, head->row, 2 * C + head->column, head->T, head->HS),
    };
}

static void matrix_clear(struct MatrixOut m) {
    for (size_t i = 0; i < m.rows; i++)
        memset(m.data + i * m.row_stride, 0, m.columns * sizeof *m.data);
}

/* attention_backward_head -- the four passes in reverse, ATTENTION_ROWS queries at a time.
 *   pass 4, out = P value:              dvalue += P^T dout       dP = dout value^T
 *   pass 3, P = softmax(S):             dS_tj = P_tj (dP_tj - D_t)   attention_softmax_backward
 *   pass 2, the mask:                   what was not seen has P = 0, so dS = 0
 *   pass 1, S = scale query key^T:      dquery = scale dS key    dkey += scale dS^T query
 * For one query t, written as loops over the keys j <= t that it sees:
 *     dv_j += p_j dout                        a value learns in proportion to its weight
 *     dp_j  = dout . v_j                      what a larger p_j would do to the loss
 *     D     = sum_j p_j dp_j
 *     ds_j  = p_j (dp_j - D)                  softmax: what one key gains, the others lose
 *     dq   += scale ds_j k_j,   dk_j += scale ds_j q
 * in   dout, out (T,HS), views; lse (N,NH)      out  d->query, d->key, d->value (T,HS), written
 * All later queries read a key and a value, so their gradients are sums over the blocks of rows.
 * By hand: the example with dout = (0, 4): dvalue = (0.25 * 4, 0.75 * 4) = (1, 3); dS as above:
 * with q_1, the second query: dq_1 = 7.5 ln 3 = 8.2396, dkey = (-7.5 q_1, 7.5 q_1) = (-7.5, 7.5).
 *                                           test: attention_hand, attention, attention_gradient */
static void attention_backward_head(const struct AttentionGradient *d, struct Matrix dout,
                                    struct Matrix out, const float *lse,
                                    const struct AttentionHead *head) {
    size_t T = head->T;
    size_t HS = head->HS;

    /* Scratch for p and dp of a block, (ATTENTION_ROWS,T) each. Keys and values start from 0, since
     * every block adds to them; a query belongs to one block. */
    float *p = thread_scratch(SCRATCH_SCORES, 2 * ATTENTION_ROWS * T, sizeof *p);
    float *dp = p + ATTENTION_ROWS * T;
    matrix_clear(d->key);
    matrix_clear(d->value);
    for (size_t t0 = 0; t0 < T; t0 += ATTENTION_ROWS) {
        size_t t1 = MIN(T, t0 + ATTENTION_ROWS);
        size_t rows = t1 - t0;
        struct Matrix dout_rows = matrix_block(dout, t0, 0, rows, HS);

        /* Passes 1 to 3 again, since p was not kept: five products where four would do, but no
         * matrix (T,T) in memory for each head of each layer. */
        attention_scores(p, head, t0, t1);
        for (size_t t = t0; t < t1; t++)
            attention_softmax_again(p + (t - t0) * t1, lse[lse_place(head, t)], t, t1);

        /* Back through pass 4: a value learns from each query in proportion to its weight there. */
        matmul_add(matrix_out_block(d->value, 0, 0, t1, HS), transposed(matrix(p, rows, t1)),
                   dout_rows);
        matmul(matrix_out(dp, rows, t1), dout_rows,
               transposed(matrix_block(head->value, 0, 0, t1, HS)));

        /* Back through passes 3 and 2, row by row: dp becomes dS times the scale. */
        for (size_t t = t0; t < t1; t++)
            attention_softmax_backward(dp + (t - t0) * t1, p + (t - t0) * t1,
                                       dout.data + t * dout.row_stride,
                                       out.data + t * out.row_stride, head, t, t1);

        /* Back through pass 1: a score's derivative by the query is the key, and by the key the
         * query. */
        matmul(matrix_out_block(d->query, t0, 0, rows, HS), matrix(dp, rows, t1),
               matrix_block(head->key, 0, 0, t1, HS));
        matmul_add(matrix_out_block(d->key, 0, 0, t1, HS), transposed(matrix(dp, rows, t1)),
                   matrix_block(head->query, t0, 0, rows, HS));
    }
}

/* attention_backward -- all heads of all sequences; each writes to its own columns of dqkv.
 * in   dout, out (N,C), lse (N,NH), qkv (N,3C)       out  dqkv (N,3C), written
 *                                                           test: attention, attention_gradient */
static void attention_backward(float *dqkv, const float *dout, const float *out, const float *lse,
                               const float *qkv, const struct Batch *batch,
                               struct AttentionShape shape) {
    struct Matrix all_dout = matrix(dout, batch->N, shape.C);
    struct Matrix all_out = matrix(out, batch->N, shape.C);
    /* no two tasks write to the same place: each has its own rows and columns of dqkv */
#pragma omp parallel for schedule(dynamic)
    for (size_t task = 0; task < batch->B * shape.NH; task++) {
        struct AttentionHead head = attention_head(qkv, batch, shape, task);
        /* dqkv, dout and out, each as the part that belongs to this head */
        struct AttentionGradient d = attention_gradient(dqkv, batch, shape, &head);
        attention_backward_head(&d, matrix_block(all_dout, head.row, head.column, head.T, head.HS),
                                matrix_block(all_out, head.row, head.column, head.T, head.HS), lse,
                                &head);
    }
}

/* ---- Attention while a text is written ------------------------------------------------------ */

/* Keys and values of earlier tokens, kept while texts are written. They never change, since an
 * earlier token does not see later ones; so a new token costs one row of work instead of T rows
 * (chapter 13). */
struct KVCache {
    size_t B, capacity; /* sequences; positions that each has room for */
    float *k, *v; /* (L, B, capacity, C) */
    size_t *length; /* (B) how many positions are filled */
    const size_t *slot; /* (N) of a batch of new tokens: the sequence that each row belongs to */
};

/* The index in k and v of a layer's numbers for one position of a sequence. */
static size_t kv_cache_place(const struct KVCache *cache, size_t layer, size_t sequence,
                             size_t position, size_t C) {
    return ((layer * cache->B + sequence) * cache->capacity + position) * C;
}

/* Stores the keys and values of token n of a batch in the cache. */
static void kv_cache_store(struct KVCache *cache, const struct Batch *batch, size_t n,
                           const float *qkv, size_t layer, size_t C) {
    size_t position = (size_t)batch->position[n];
    size_t place = kv_cache_place(cache, layer, cache->slot[n], position, C);
    /* All heads at once: in a row of qkv their keys are neighbours, followed by their values. The
     * query is not kept, since no later token needs it. */
    const float *key = qkv + n * 3 * C + C;
    const float *value = key + C;
    memcpy(cache->k + place, key, C * sizeof *key);
    memcpy(cache->v + place, value, C * sizeof *value);
    cache->length[cache->slot[n]] = position + 1;
}

/* What head h of token n sees: its own query, and the keys and values of its sequence up to and
 * including itself, from the cache. */
static struct AttentionHead attention_cached_view(const struct KVCache *cache, const float *qkv,
                                                  const struct Batch *batch, size_t layer,
                                                  struct AttentionShape shape, size_t n, size_t h) {
    /* 1. A token at position t sees t + 1 keys, its own included. */
    size_t C = shape.C;
    size_t T = (size_t)batch->position[n] + 1;
    size_t column = h * shape.HS;

    /* 2. From the sequence's position 0 in the cache on, each position has a row of C numbers. The
     *    query comes from qkv: only keys and values are in the cache. */
    size_t place = kv_cache_place(cache, layer, cache->slot[n], 0, C);
    return (struct AttentionHead){
        .T = T,
        .HS = shape.HS,
        .NH = shape.NH,
        .h = h,
        .row = n,
        .column = column,
        .query = matrix_block(matrix(qkv, batch->N, 3 * C), n, column, 1, shape.HS),
        .key = matrix_block(matrix(cache->k + place, T, C), 0, column, T, shape.HS),
        .value = matrix_block(matrix(cache->v + place, T, C), 0, column, T, shape.HS),
        .scale = shape.scale,
    };
}

/* attention_cached_head -- the four passes for a single query, the newest. It may see all there is,
 * so there is nothing to mask.         out  out (HS)           test: generate_cache, few_rows */
WIDE static void attention_cached_head(float *out, const struct AttentionHead *head) {
    size_t T = head->T;
    size_t HS = head->HS;
    float *p = thread_scratch(SCRATCH_SCORES, T, sizeof *p);

    /* pass 1: the scores, four keys at a time. A matmul of one row would spend its time packing. */
    const float *key = head->key.data;
    size_t stride = head->key.row_stride;
    for (size_t j = 0; j < T; j += 4)
        row_dot_4(p + j, head->query.data, key + j * stride, stride, HS, MIN((size_t)4, T - j));
    for (size_t j = 0; j < T; j++)
        p[j] *= head->scale;

    /* pass 3: softmax, over all T: the newest token has no future */
    softmax(p, T);

    /* pass 4: the mixture, one value after another: each is HS neighbouring numbers */
    const float *value = head->value.data;
    for (size_t c = 0; c < HS; c++)
        out[c] = 0;
    for (size_t j = 0; j < T; j++)
        for (size_t c = 0; c < HS; c++)
            out[c] += p[j] * value[j * stride + c];
}

/* attention_cached -- attention while a text is written: the rows are only the new tokens.
 * in   qkv (N,3C)       out  out (N,C); the cache grows by the new keys and values
 * First all tokens are stored, then all look: a row may be one of several new tokens of a
 * sequence, each of which sees those before it.                             test: generate_cache */
static void attention_cached(float *out, const float *qkv, const struct Batch *batch,
                             struct KVCache *cache, size_t layer, struct AttentionShape shape) {
    /* 1. Store the new keys and values. */
    for (size_t n = 0; n < batch->N; n++) {
        kv_cache_store(cache, batch, n, qkv, layer, shape.C);
    }

    /* 2. Each head of each new token is a task. With 16 tasks or fewer, as for one token of one
     *    text, a team of threads would not pay. */
#pragma omp parallel for if (batch->N * shape.NH > 16)
    for (size_t task = 0; task < batch->N * shape.NH; task++) {
        size_t n = task / shape.NH;
        size_t h = task % shape.NH;
        struct AttentionHead head = attention_cached_view(cache, qkv, batch, layer, shape, n, h);
        attention_cached_head(out + n * shape.C + head.column, &head);
    }
}

/* =============================================================================================
 * Chapter 11 - GPT-2, its output layer and its heads
 *                      [glossary: Modelo de linguagem] [glossary: AutoModelForCausalLM]
 *
 * What is a language model, in one formula? Each token becomes a vector (what it is, plus its
 * place), and n_layer blocks each add something to that vector, the residual stream:
 *
 *     x = wte[id] + wpe[position]                                            (N,C)
 *     x = x + attention(ln_1(x))     look at earlier tokens                  n_layer times      [1]
 *     x = x + mlp(ln_2(x))           think about what was seen
 *     hidden = ln_f(x)                                                       (N,C)
 *     logits = hidden wte^T          how well each token fits                (rows that predict, V)
 *
 * The smallest GPT-2 has V = 50257, C = 768, 12 blocks, 12 heads and 1024 positions. That makes
 * 124,439,808 numbers: 85.1 million in the blocks, 38.6 million in wte, 0.8 million in wpe.
 *
 * The output layer is the embedding again ("tied") [2, Section 3.4]. So wte gets its gradient in
 * two ways, and one tensor collects both: from the output layer (lm_head_backward: how should the
 * vectors of all V tokens change, since each had a logit?) and from the input (embedding_backward:
 * how should the vectors of the tokens that were read change?).
 *
 * Two more output layers, called heads (not attention's), turn a hidden vector into one number. The
 * reward head reads a whole text at its last token: how good was it? The value head reads every
 * position: how good will it become?
 *
 * The structs repeat transformers' module names: model->h[3].mlp.c_fc.weight is the tensor
 * "transformer.h.3.mlp.c_fc.weight" of a checkpoint.
 *
 * What enters: a batch of token ids (N). What leaves: hidden vectors (N,C) and, for selected rows,
 * log-probabilities (R), in nats, rewards or values, without a unit.
 * ============================================================================================= */

/* From Part IV. check_finite ends the program if `value`, which the message calls `what`, is NaN or
 * infinite, and names the weight or activation that broke first; check_numbers does so for n
 * numbers that came from a forward pass over `batch`; first_not_finite returns the index of the
 * first such number, or n. */
struct GPT2;
static void check_finite(const struct GPT2 *model, const char *what, double value);
static void check_numbers(const struct GPT2 *model, struct Arena *arena, const struct Batch *batch,
                          const char *what, const float *x, size_t n);
static size_t first_not_finite(const float *x, size_t n);

/* ---- What a model consists of --------------------------------------------------------------- */

/* The two heads are not part of the transformer: in a checkpoint where all other names begin with
 * "transformer.", theirs do not. */
static bool tensor_is_head(const struct Tensor *t) {
    return strncmp(t->name, "score.", 6) == 0 || strncmp(t->name, "v_head.", 7) == 0;
}

/* config.json, in transformers' names. */
struct GPT2Config {
    size_t vocab_size; /* V */
    size_t n_positions; /* tokens of the longest sequence: wpe has a row for each position */
    size_t n_embd; /* C */
    size_t n_layer; /* L */
    size_t n_head; /* NH */
    int eos_token_id; /* the end token: after each text, and where writing stops */
    int pad_token_id;
    float layer_norm_epsilon;
    int bos_token_id; /* what an empty prompt starts from */
    struct Text pad_token; /* the padding token's name, if it is none of GPT-2's tokens */
};

/* weight (in,out), bias (out). lora_A.n = 0 means that the layer has no adapter (chapter 12). */
struct Linear {
    struct Tensor weight, bias, lora_A, lora_B;
    float lora_scale;
};
/* weight (C), bias (C) */
struct LayerNorm {
    struct Tensor weight, bias;
};
struct Block {
    struct LayerNorm ln_1;
    struct {
        struct Linear c_attn, c_proj; /* (C,3C): query, key, value; (C,C) */
    } attn;
    struct LayerNorm ln_2;
    struct {
        struct Linear c_fc, c_proj; /* (C,4C); (4C,C) */
    } mlp;
};

/* What adapter_config.json says (chapter 12), in PEFT's names. */
struct Adapter {
    size_t r; /* the rank; 0: the model has no adapter */
    double lora_alpha;
    double lora_dropout;
    const char *target_modules; /* names of the layers that it adapts */
    const char *base_model_name_or_path;
    bool use_rslora; /* see adapter_scale */
    bool
        partial; /* which of these layers is for the file's tensors to say: a pattern, exceptions */
};

/* What the forward pass keeps of one block for the backward pass. */
struct BlockActivations {
    float *x; /* (N,C) the block's input */
    float *ln_1, *ln_1_mean, *ln_1_rstd; /* (N,C) (N) (N) */
    float *qkv, *att, *lse; /* (N,3C) (N,C) (N,NH) */
    float *mid; /* (N,C) x + attention */
    float *ln_2, *ln_2_mean, *ln_2_rstd; /* (N,C) (N) (N) */
    float *fc, *gelu; /* (N,4C) before and after the activation */
};

/* What the forward pass keeps of the whole model. */
struct Activations {
    struct Batch batch; /* what was read; its arrays are not copied */
    struct BlockActivations *h; /* (L) the blocks; all use the first's memory if nothing is kept */
    float *x; /* (N,C) the last block's output */
    float *ln_f, *ln_f_mean, *ln_f_rstd; /* (N,C) (N) (N); ln_f is the hidden state */
};

struct GPT2 {
    struct GPT2Config config;
    struct Tensor wte; /* (V,C) a vector for each token: the embedding and the output layer */
    struct Tensor wpe; /* (n_positions,C) a vector for each position */
    struct Block *h; /* (L) the blocks: h is transformers' name for them */
    struct LayerNorm ln_f;
    struct Tensor score; /* (1,C) the reward head; n = 0: the model has none */
    struct Linear v_head; /* (1,C) the value head; weight.n = 0: the model has none */
    struct Adapter adapter;
    const char *folder; /* where it, or its adapter, was read from; NULL: nowhere */
    struct Tensor **tensors; /* all of the above, in a checkpoint's order */
    size_t tensor_count;
    /* where training is, for check_finite. task NULL: the model is not being trained */
    struct {
        const char *task;
        size_t step;
        bool has_acts; /* there is a backward pass to look at: */
        struct Activations acts;
    } trace;
    struct Arena arena;
};

/* ---- Making a model ------------------------------------------------------------------------- */

/* A tensor (rows,columns) of zeros, or a vector (rows) if columns is 0. */
static void tensor_declare(struct GPT2 *model, struct Tensor *tensor, const char *name, size_t rows,
                           size_t columns) {
    /* 1. its shape and name */
    *tensor = (struct Tensor){
        .shape = {rows, columns},
        .ndim = columns ? 2 : 1,
        .n = rows * MAX(columns, (size_t)1),
    };
    snprintf(tensor->name, sizeof tensor->name, "%s", name);

    /* 2. The numbers themselves, and an entry in the list that the optimizer and checkpoints go
     *    through. Gradients come only if it is trained: gpt2_make_trainable. */
    tensor->w = arena_zeros(&model->arena, tensor->n, sizeof(float));
    model->tensors[model->tensor_count++] = tensor;
}

/* name.weight (in,out) and name.bias (out), zeros. */
static void linear_declare(struct GPT2 *model, struct Linear *linear, const char *name, size_t in,
                           size_t out) {
    struct Arena *arena = &model->arena;
    tensor_declare(model, &linear->weight, arena_printf(arena, "%s.weight", name), in, out);
    tensor_declare(model, &linear->bias, arena_printf(arena, "%s.bias", name), out, 0);
}

/* name.weight (C), ones, and name.bias (C), zeros. */
static void layernorm_declare(struct GPT2 *model, struct LayerNorm *norm, const char *name,
                              size_t C) {
    struct Arena *arena = &model->arena;
    tensor_declare(model, &norm->weight, arena_printf(arena, "%s.weight", name), C, 0);
    tensor_declare(model, &norm->bias, arena_printf(arena, "%s.bias", name), C, 0);
    /* times one, plus zero: at first a layer norm only normalizes */
    for (size_t c = 0; c < C; c++)
        norm->weight.w[c] = 1;
}

static void block_declare(struct GPT2 *model, size_t layer) {
    struct Block *h = &model->h[layer];
    struct Arena *arena = &model->arena;
    size_t C = model->config.n_embd;

    /* 1. Attention: c_attn makes query, key and value of a token; c_proj mixes what the heads found
     *    into one vector. */
    layernorm_declare(model, &h->ln_1, arena_printf(arena, "h.%zu.ln_1", layer), C);
    const char *c_attn = arena_printf(arena, "h.%zu.attn.c_attn", layer);
    linear_declare(model, &h->attn.c_attn, c_attn, C, 3 * C);
    const char *attn_c_proj = arena_printf(arena, "h.%zu.attn.c_proj", layer);
    linear_declare(model, &h->attn.c_proj, attn_c_proj, C, C);

    /* 2. The mlp: four times as wide inside, where the activation decides what passes. */
    layernorm_declare(model, &h->ln_2, arena_printf(arena, "h.%zu.ln_2", layer), C);
    const char *c_fc = arena_printf(arena, "h.%zu.mlp.c_fc", layer);
    linear_declare(model, &h->mlp.c_fc, c_fc, C, 4 * C);
    const char *mlp_c_proj = arena_printf(arena, "h.%zu.mlp.c_proj", layer);
    linear_declare(model, &h->mlp.c_proj, mlp_c_proj, 4 * C, C);
}

/* A model without heads, adapter or gradients. Its matrices are zero: gpt2_init or a file fills
 * them. */
static struct GPT2 *gpt2_new(struct GPT2Config config) {
    struct GPT2 *model = calloc(1, sizeof *model);
    CHECK(model, "out of memory");
    model->config = config;
    size_t C = config.n_embd;
    model->h = arena_zeros(&model->arena, config.n_layer, sizeof *model->h);

    /* A block has 12 tensors, and 8 more if its four linear layers are adapted; besides the blocks
     * there are wte, wpe, two tensors of ln_f and three of the heads. */
    model->tensors = arena_alloc(&model->arena, 20 * config.n_layer + 8, sizeof *model->tensors);

    /* In the order of transformers' state_dict. gpt2_init draws random numbers in this order, too:
     * another order would give another model for the same seed. */
    tensor_declare(model, &model->wte, "wte.weight", config.vocab_size, C);
    tensor_declare(model, &model->wpe, "wpe.weight", config.n_positions, C);
    for (size_t l = 0; l < config.n_layer; l++)
        block_declare(model, l);
    layernorm_declare(model, &model->ln_f, "ln_f", C);
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

/* Uniform in (-1/sqrt(in), 1/sqrt(in)), in = the layer's number of inputs: torch's start of a
 * Linear (Kaiming). The output is a sum of `in` products, so the more there are, the smaller each
 * must be if the sum is to keep its size.
 * By hand: 400 inputs: within 0.05, variance 0.05^2 / 3.              test: reward_head_gradient */
static void tensor_uniform(struct Tensor *tensor, struct Rng *rng, size_t in) {
    double bound = 1 / sqrt((double)in);
    for (size_t i = 0; i < tensor->n; i++)
        tensor->w[i] = (float)(bound * (2 * rng_uniform(rng) - 1));
}

/* The number of parameters of a model. */
static size_t gpt2_parameters(const struct GPT2 *model) {
    size_t n = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        n += model->tensors[i]->n;
    return n;
}

/* gpt2_init -- GPT-2's start [1, Section 2.3].
 *   matrices from N(0, 0.02^2), those that write to the residual stream from
 *   N(0, (0.02 / sqrt(2 n_layer))^2); biases 0, layer norms 1, as gpt2_new left them
 * By hand: 8 layers: 0.02 / sqrt(16) = 0.005.                                   test: gpt2_init */
static void gpt2_init(struct GPT2 *model, uint64_t seed) {
    struct Rng rng = rng_seed(seed, STREAM_INIT);

    /* Two layers of each block, both called c_proj, add to the residual stream: 2 n_layer
     * summands. If they were as large as the others, the stream's variance would grow with the
     * depth. With each divided by sqrt(2 n_layer), the variance of their sum is that of one. */
    double residual_std = 0.02 / sqrt(2.0 * (double)model->config.n_layer);
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        /* biases and layer norms keep their zeros and ones */
        if (t->ndim != 2)
            continue;
        bool writes_to_stream = strstr(t->name, "c_proj.weight") != NULL;
        tensor_normal(t, &rng, writes_to_stream ? residual_std : 0.02);
    }
}

/* With an adapter, only the adapter and the heads learn: the base is frozen. */
static bool tensor_learns(const struct GPT2 *model, const struct Tensor *t) {
    return !model->adapter.r || strstr(t->name, ".lora_") || tensor_is_head(t);
}

/* Memory for gradients and AdamW's moments, all zero: three more numbers for each weight. */
static void gpt2_make_trainable(struct GPT2 *model) {
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        /* This is where weights are frozen: every backward pass and the optimizer skip a tensor
         * whose d is NULL. A tensor that was trained before already has its d. */
        if (t->d || !tensor_learns(model, t))
            continue;
        t->d = arena_zeros(&model->arena, t->n, sizeof(float));
        t->m = arena_zeros(&model->arena, t->n, sizeof(float));
        t->v = arena_zeros(&model->arena, t->n, sizeof(float));
    }
}

/* A second model with the same weights, but without heads and adapter: a reference that does not
 * change while the first one is trained.                  [glossary: Modelo de referência] */
static struct GPT2 *gpt2_copy(const struct GPT2 *model) {
    struct GPT2 *copy = gpt2_new(model->config);
    /* both lists begin with what gpt2_new declares; heads and adapters come after that */
    for (size_t i = 0; i < copy->tensor_count; i++)
        memcpy(copy->tensors[i]->w, model->tensors[i]->w, copy->tensors[i]->n * sizeof(float));
    return copy;
}

/* ---- Forward and backward through the blocks ------------------------------------------------ */

static void residual_add_row(float *sum, const float *x, size_t C) {
    for (size_t c = 0; c < C; c++)
        sum[c] += x[c];
}

/* sum += x, both (N,C). There is no backward function: a sum passes its derivative unchanged to
 * each of its summands. */
static void residual_add(float *sum, const float *x, size_t N, size_t C) {
#pragma omp parallel for if (N * C > 100000)
    for (size_t n = 0; n < N; n++)
        residual_add_row(sum + n * C, x + n * C, C);
}

static void lora_forward(float *y, const float *x, const struct Linear *linear, size_t N);
static void lora_backward(float *dx, const float *dy, const float *x, struct Linear *linear,
                          size_t N);

/* A linear layer of the model, from x (N,in) to y (N,out), plus what its adapter adds to y, if it
 * has one (chapter 12). */
static void module_forward(float *y, const float *x, const struct Linear *linear, size_t N) {
    linear_forward(y, x, N, &linear->weight, &linear->bias);
    /* the adapter adds to y, so the base layer comes first */
    if (linear->lora_A.n)
        lora_forward(y, x, linear, N);
}

/* From dy (N,out) to dx (N,in), which is overwritten; the gradients of the weights are added to. */
static void module_backward(float *dx, const float *dy, const float *x, struct Linear *linear,
                            size_t N) {
    /* A frozen layer, whose d is NULL, learns nothing but passes dx on: the adapters of earlier
     * layers need it. */
    linear_backward(dx, dy, x, N, &linear->weight, &linear->bias);
    if (linear->lora_A.n)
        lora_backward(dx, dy, x, linear, N);
}

/* block_forward -- one block: from a->x (N,C) to `out` (N,C), which is the next block's x.
 *   mid = x + attention(ln_1(x))          out = mid + mlp(ln_2(mid))          [1, Section 2.3]
 * Each layer adds to the stream instead of replacing it. So a block that has learnt nothing yet
 * does no harm, and on the way back the derivative reaches the first block without having been
 * multiplied by the weights of all the others.
 * in   model, layer: which block; batch     out  a: all that block_backward needs
 *                                                test: gpt2_golden; gdb: break block_forward */
static void block_forward(const struct GPT2 *model, size_t layer, struct BlockActivations *a,
                          const struct Batch *batch, struct KVCache *cache, float *out) {
    const struct Block *h = &model->h[layer];
    size_t N = batch->N;
    size_t C = model->config.n_embd;
    struct AttentionShape shape = attention_shape(C, model->config.n_head);

    /* 1. Query, key and value of each token, from its normalized vector. The norm comes before the
     *    layer, not after the sum as in [2]: the stream itself is never rescaled. */
    layernorm_forward(a->ln_1, (struct LayerNormRows){N, a->x, a->ln_1_mean, a->ln_1_rstd},
                      &h->ln_1.weight, &h->ln_1.bias, model->config.layer_norm_epsilon);
    module_forward(a->qkv, a->ln_1, &h->attn.c_attn, N);

    /* 2. Attention: each token gathers from those before it. While a text is being written they are
     *    not in the batch, but their keys and values are in the cache. */
    if (cache)
        attention_cached(a->att, a->qkv, batch, cache, layer, shape);
    else
        attention_forward(a->att, a->lse, a->qkv, batch, shape);

    /* 3. What was gathered is added to the stream. The sum is a tensor of its own, since the
     *    backward pass needs x itself. */
    module_forward(a->mid, a->att, &h->attn.c_proj, N);
    residual_add(a->mid, a->x, N, C);

    /* 4. The mlp works on each token by itself, and its result is added, too. It is four times as
     *    wide as the stream: gelu lets each of these numbers pass or not, and c_proj leads back to
     *    C. Two thirds of a block's weights are here. */
    layernorm_forward(a->ln_2, (struct LayerNormRows){N, a->mid, a->ln_2_mean, a->ln_2_rstd},
                      &h->ln_2.weight, &h->ln_2.bias, model->config.layer_norm_epsilon);
    module_forward(a->fc, a->ln_2, &h->mlp.c_fc, N);
    gelu_forward(a->gelu, a->fc, N, 4 * C);
    module_forward(out, a->gelu, &h->mlp.c_proj, N);
    residual_add(out, a->mid, N, C);
}

/* block_backward -- the same block from its end to its start.
 * in, out  dx (N,C): the derivative of the loss by the block's output becomes that by its input
 * scratch  dwide (N,4C), dnarrow (N,C)
 * out = mid + mlp(ln_2(mid)) passes its derivative to both summands. The share of `mid` is dx
 * itself, which simply stays; what comes back through the mlp is added to it, which is why
 * layernorm_backward adds to dx. The same then happens with x and the attention.
 *                                                                           test: gpt2_gradient */
static void block_backward(struct GPT2 *model, struct Block *h, const struct BlockActivations *a,
                           const struct Batch *batch, float *dx, float *dwide, float *dnarrow) {
    size_t N = batch->N;
    size_t C = model->config.n_embd;

    /* 1. Back through the mlp. Each of the two scratch arrays serves one tensor after another:
     *      dwide     d gelu, then d fc, then (3C of its 4C) d qkv
     *      dnarrow   d ln_2, then d att, then d ln_1 */
    module_backward(dwide, dx, a->gelu, &h->mlp.c_proj, N);
    gelu_backward(dwide, a->fc, N, 4 * C);
    module_backward(dnarrow, dwide, a->ln_2, &h->mlp.c_fc, N);

    /* 2. dx is d out and becomes d mid: its own share stays, the mlp's is added. That is the whole
     *    backward pass of the sum `out = mid + ...`. */
    layernorm_backward(dx, dnarrow, (struct LayerNormRows){N, a->mid, a->ln_2_mean, a->ln_2_rstd},
                       &h->ln_2.weight, &h->ln_2.bias);

    /* 3. Back through the attention, from dx, which is now d mid. */
    module_backward(dnarrow, dx, a->att, &h->attn.c_proj, N);
    attention_backward(dwide, dnarrow, a->att, a->lse, a->qkv, batch,
                       attention_shape(C, model->config.n_head));
    module_backward(dnarrow, dwide, a->ln_1, &h->attn.c_attn, N);

    /* 4. dx becomes d x, likewise: its own share stays, the attention's is added. */
    layernorm_backward(dx, dnarrow, (struct LayerNormRows){N, a->x, a->ln_1_mean, a->ln_1_rstd},
                       &h->ln_1.weight, &h->ln_1.bias);
}

static struct BlockActivations block_activations_new(struct Arena *arena, size_t N, size_t C,
                                                     size_t NH) {
    return (struct BlockActivations){
        /* attention: the normalized x, its mean and deviation, and what attention makes of it;
         * of each softmax only one number, lse */
        .x = arena_floats(arena, N * C),
        .ln_1 = arena_floats(arena, N * C),
        .ln_1_mean = arena_floats(arena, N),
        .ln_1_rstd = arena_floats(arena, N),
        .qkv = arena_floats(arena, N * 3 * C),
        .att = arena_floats(arena, N * C),
        .lse = arena_floats(arena, N * NH),
        /* the mlp: gelu's slope depends on its input fc, so that is kept as well as its output */
        .mid = arena_floats(arena, N * C),
        .ln_2 = arena_floats(arena, N * C),
        .ln_2_mean = arena_floats(arena, N),
        .ln_2_rstd = arena_floats(arena, N),
        .fc = arena_floats(arena, N * 4 * C),
        .gelu = arena_floats(arena, N * 4 * C),
    };
}

/* Memory for a forward pass: about 16 N C numbers per block. keep: a backward pass will follow. */
static struct Activations activations_new(const struct GPT2 *model, struct Arena *arena,
                                          const struct Batch *batch, bool keep) {
    size_t N = batch->N;
    size_t C = model->config.n_embd;
    size_t L = model->config.n_layer;
    struct Activations acts = {
        .batch = *batch,
        .h = arena_alloc(arena, L, sizeof *acts.h),
        .x = arena_floats(arena, N * C),
        .ln_f = arena_floats(arena, N * C),
        .ln_f_mean = arena_floats(arena, N),
        .ln_f_rstd = arena_floats(arena, N),
    };
    /* A backward pass needs what every block computed. Without one, all blocks overwrite the memory
     * of the first. Its x is then also where it writes `out`, which does no harm: a block has read
     * its x for the last time before it writes. */
    for (size_t l = 0; l < L; l++) {
        bool own = keep || l == 0;
        acts.h[l] = own ? block_activations_new(arena, N, C, model->config.n_head) : acts.h[0];
    }
    return acts;
}

/* The layers, from ids to hidden states. cache: while a text is written, what was computed of its
 * earlier tokens; otherwise NULL. keep: a backward pass will follow. */
static struct Activations gpt2_layers(const struct GPT2 *model, struct Arena *arena,
                                      const struct Batch *batch, struct KVCache *cache, bool keep) {
    const struct GPT2Config *c = &model->config;
    size_t N = batch->N;
    size_t C = c->n_embd;
    size_t L = c->n_layer;
    /* wpe has a row for each of n_positions, and no more */
    CHECK(batch->max_length <= c->n_positions,
          "a sequence of %zu tokens does not fit the model's %zu positions (n_positions)",
          batch->max_length, c->n_positions);
    struct Activations acts = activations_new(model, arena, batch, keep);

    /* 1. Tokens and positions become vectors: the stream begins. */
    embedding_forward(acts.h[0].x, batch, model->wte.w, model->wpe.w, C);

    /* 2. Each block adds to the stream and writes it to where the next block reads; the last one
     *    writes to where the final norm reads. */
    for (size_t l = 0; l < L; l++) {
        float *out = l + 1 < L ? acts.h[l + 1].x : acts.x;
        block_forward(model, l, &acts.h[l], batch, cache, out);
    }

    /* 3. The stream is now a sum of 2 L + 1 vectors, and large; it is normalized once more before
     *    the heads read it. */
    layernorm_forward(acts.ln_f, (struct LayerNormRows){N, acts.x, acts.ln_f_mean, acts.ln_f_rstd},
                      &model->ln_f.weight, &model->ln_f.bias, c->layer_norm_epsilon);
    return acts;
}

/* gpt2_forward -- what the model makes of each token of a batch: its hidden state, (N,C), in
 * activations.ln_f.                                                [glossary: Inferência]
 * in   batch: N tokens of B sequences
 *      keep: a backward pass will follow, so the activations of all blocks are kept
 * The hidden state of token t depends on the tokens up to t and on no later one. So a single pass
 * over a text gives the prediction at each of its positions: reading a text takes far less time
 * than writing one, where each token needs a pass of its own.       test: gpt2_golden, fixtures */
static struct Activations gpt2_forward(const struct GPT2 *model, struct Arena *arena,
                                       const struct Batch *batch, bool keep) {
    return gpt2_layers(model, arena, batch, NULL, keep);
}

/* gpt2_decode -- the same for new tokens of texts that are being written: the keys and values of
 * the earlier ones come from the cache, and theirs are added to it. Returns the new tokens' hidden
 * states (N,C).                                               test: generate_cache, few_rows */
static float *gpt2_decode(const struct GPT2 *model, struct Arena *arena, const struct Batch *batch,
                          struct KVCache *cache) {
    return gpt2_layers(model, arena, batch, cache, false).ln_f;
}

/* gpt2_backward -- from the hidden states back to the embedding.
 * in   acts: what gpt2_forward kept; dhidden (N,C): d loss / d acts->ln_f, the sum of what all
 *      heads have returned
 * out  added to the gradient d of every weight that is not frozen
 *                                                     test: gpt2_gradient, gpt2_gradient_golden */
static void gpt2_backward(struct GPT2 *model, struct Arena *arena, const struct Activations *acts,
                          const float *dhidden) {
    const struct Batch *batch = &acts->batch;
    size_t N = batch->N;
    size_t C = model->config.n_embd;
    /* zeros, because layernorm_backward adds to dx */
    float *dx = arena_zeros(arena, N * C, sizeof *dx);
    float *dwide = arena_floats(arena, N * 4 * C);
    float *dnarrow = arena_floats(arena, N * C);

    /* 1. The steps of the forward pass in reverse; dx is the stream's derivative all the way. */
    layernorm_backward(dx, dhidden,
                       (struct LayerNormRows){N, acts->x, acts->ln_f_mean, acts->ln_f_rstd},
                       &model->ln_f.weight, &model->ln_f.bias);
    for (size_t l = model->config.n_layer; l-- > 0;)
        block_backward(model, &model->h[l], &acts->h[l], batch, dx, dwide, dnarrow);

    /* 2. wte's gradient, the second of two ways: as the embedding. Each token that was read gets
     *    what has arrived at its positions. The first way, as the output layer, is in
     *    lm_head_backward_chunk; both add to wte.d. Under LoRA wte is frozen, and d is NULL. */
    if (model->wte.d)
        embedding_backward(model->wte.d, model->wpe.d, dx, batch, C);

    /* 3. If a number later proves to be NaN or infinite, check_finite searches these. */
    model->trace.acts = *acts;
    model->trace.has_acts = true;
}

/* ---- The output layer ----------------------------------------------------------------------- */

/* output_logits -- logits (n,V) = hidden (n,C) wte^T. As in linear_forward, a row of logits has the
 * same bits however many rows are next to it.                                    test: few_rows */
static void output_logits(const struct GPT2 *model, float *logits, const float *hidden, size_t n) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    /* A token's logit is the dot product of the hidden vector with the token's own vector: the
     * more they point the same way, the better the token fits. */
    matmul(matrix_out(logits, n, V), matrix(hidden, n, C), transposed(matrix(model->wte.w, V, C)));
}

/* The logits of tokens v .. v+3, for n <= FEW_ROWS hidden vectors: four rows of wte come from
 * memory once and serve all n. */
static void decode_logits_4(const struct GPT2 *model, float *logits, const float *hidden, size_t n,
                            size_t v) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    const float *w = model->wte.w + v * C;
    for (size_t i = 0; i < n; i++) {
        /* Meanwhile the next four rows are prefetched, a part with each hidden vector. With one
         * vector, wte is read straight through, which the processor foresees by itself. */
        for (size_t next = i * 4 * C / n; n > 1 && next < (i + 1) * 4 * C / n; next += 16)
            __builtin_prefetch(w + 4 * C + next);
        row_dot_4(logits + i * V + v, hidden + i * C, w, C, C, MIN((size_t)4, V - v));
    }
}

/* decode_logits -- output_logits while texts are written, when the rows are few.
 * Then most of the time goes into reading wte. matmul would first transpose it into its panels,
 * which only pays for many rows: for one row of GPT-2 that takes 2.5 times as long as dot products
 * that read wte once, as it is. Their 16 lanes add up in another order than matmul does, so the
 * last bits of the two differ.                                test: few_rows, generate_company */
static void decode_logits(const struct GPT2 *model, float *logits, const float *hidden, size_t n) {
    size_t V = model->config.vocab_size;
    /* many rows; or ALIGN_KERNEL=plain, where everything runs on matmul's definition */
    if (n > FEW_ROWS || !kernel) {
        output_logits(model, logits, hidden, n);
        return;
    }
#pragma omp parallel for schedule(static) if (n * V * model->config.n_embd > 50000)
    for (size_t v = 0; v < V; v += 4)
        decode_logits_4(model, logits, hidden, n, v);
}

/* The output layer for the rows of a batch that predict a target.
 *
 * Its logits (R,V) can be the largest array of all: for 1024 rows GPT-2's take 206 MB. So the rows
 * are processed in chunks of at most LM_HEAD_FLOATS logits. A few numbers of each row are kept
 * (struct LMHead); its logits are overwritten by the next chunk's, and the backward pass recomputes
 * them, unless all rows are one chunk: then they are still there. */
enum { LM_HEAD_FLOATS = 1 << 25 };

struct LMHead {
    size_t R; /* rows */
    size_t chunk; /* rows of a chunk */
    const int *row; /* (R) which token of the batch predicts */
    const int *target; /* (R) the id whose log-probability is wanted: the text's next token */
    float temperature; /* logits are divided by it: the policy is judged as it was sampled */
    float *hidden; /* (R,C) hidden states of these rows, gathered */
    float *logits; /* (chunk,V) */
    size_t logits_first; /* the first row of the chunk that is in logits; R: none is */
    float *logprob; /* (R) of the target, nats */
    float *entropy; /* (R) of the distribution over the vocabulary, nats */
    float *lse; /* (R) log_sum_exp of the logits */
    float *mean_logit; /* (R) over the vocabulary */
    float *hit; /* (R) 1 where the target is the argmax, else 0 */
    struct Activations acts; /* the forward pass that the hidden states come from */
};

/* The output layer on top of a finished forward pass; nothing is computed yet.
 * in   acts: of gpt2_forward; row, target (R): which tokens of the batch predict, and what */
static struct LMHead lm_head_new(const struct GPT2 *model, struct Arena *arena,
                                 const struct Activations *acts, const int *row, const int *target,
                                 size_t R, float temperature) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;
    /* at least one row, even if a single row of the vocabulary exceeds the limit */
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
    /* The rows that predict are scattered over the batch (prompts predict nothing that counts);
     * gathered, they are one matrix. */
    for (size_t r = 0; r < R; r++)
        memcpy(head.hidden + r * C, acts->ln_f + (size_t)row[r] * C, C * sizeof(float));
    return head;
}

static void scale_row(float *x, float scale, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] *= scale;
}

/* Computes the logits of the chunk of rows that starts at `first`, unless head->logits still has
 * them; returns how many rows the chunk has. */
static size_t lm_head_logits(const struct GPT2 *model, struct LMHead *head, size_t first) {
    size_t V = model->config.vocab_size;
    size_t n = MIN(head->chunk, head->R - first);
    if (head->logits_first == first)
        return n;
    output_logits(model, head->logits, head->hidden + first * model->config.n_embd, n);
    head->logits_first = first;

    /* Divided by the temperature, if there is one. A policy that writes at temperature 0.7 draws
     * its tokens from softmax(logits / 0.7), so that is where their log-probabilities come from. */
    float scale = 1 / head->temperature;
    if (scale == 1)
        return n;
#pragma omp parallel for
    for (size_t i = 0; i < n; i++)
        scale_row(head->logits + i * V, scale, V);
    return n;
}

/* lm_head_row -- what is kept of one row of logits (V).
 *   logprob = logit_target - lse          entropy = lse - sum_v p_v logit_v
 * These are log_sum_exp and entropy_of_logits of chapter 2, from one pass over e^logit: the row is
 * as long as the vocabulary, and there are many.
 * By hand: logits (0, ln 3), target 1: p = (0.25, 0.75), lse = ln 4 = 1.3863, logprob ln 0.75 =
 * -0.2877, entropy ln 4 - 0.75 ln 3 = 0.5623, mean logit 0.5493, a hit.      test: lm_head_hand */
static void lm_head_row(struct LMHead *head, size_t r, const float *logits, size_t V) {
    /* 1. e^(logit - largest), and their sum: the denominator of softmax. */
    float *e = thread_scratch(SCRATCH_ROW, V, sizeof *e);
    float largest = row_max(logits, V);
    float total = row_exp(e, logits, largest, V);
    float lse = largest + logf(total);

    /* 2. The target's log-probability, and the entropy of the whole distribution. */
    int target = head->target[r];
    float expected_logit = row_dot(e, logits, V) / total;
    head->lse[r] = lse;
    head->logprob[r] = logits[target] - lse;
    head->entropy[r] = lse - expected_logit;

    /* 3. What is only logged: DPO's mean logit, and whether greedy decoding would have written the
     *    target. argmax takes the first of equal logits, so it must be consulted only if the
     *    target's logit equals the largest. */
    head->mean_logit[r] = row_sum(logits, V) / (float)V;
    head->hit[r] = logits[target] == largest && argmax(logits, V) == (size_t)target;
}

/* lm_head_backward_row -- a row of logits (V) becomes the derivative of the loss by them.
 *   logprob = logit_target - log sum_v e^(logit_v)
 *   d logprob / d logit_v = [v = target] - p_v,     times dlogprob = d loss / d logprob
 * where [v = target] is 1 for the target and 0 for all others, and p_v is the derivative of the
 * second term: d log sum e^logit / d logit_v = e^(logit_v) / sum.
 * Raising the target's logit raises its log-probability, the more so the less probable it was;
 * raising any other logit lowers it, by as much as that token is probable. The slopes of a row add
 * up to zero.
 * By hand: p = (0.25, 0.75), target 1, dlogprob -2 (its log-probability is to rise): 0.5, -0.5.
 *                                                                            test: lm_head_hand */
WIDE static void lm_head_backward_row(float *logits, float lse, int target, float dlogprob,
                                      size_t V) {
    /* p_v = e^(logit_v - lse): with lse known, softmax's sum need not be recomputed */
    for (size_t v = 0; v < V; v++)
        logits[v] = -dlogprob * exp_fast(logits[v] - lse);
    /* the one token for which [v = target] is 1 */
    logits[target] += dlogprob;
}

/* One chunk of rows, forward. */
static void lm_head_forward_chunk(const struct GPT2 *model, struct LMHead *head, size_t first) {
    size_t V = model->config.vocab_size;
    size_t n = lm_head_logits(model, head, first);
    /* rows are independent, so any thread may take the next four */
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t i = 0; i < n; i++)
        lm_head_row(head, first + i, head->logits + i * V, V);
}

/* One chunk of rows, backward. dlogprob (R): d loss / d logprob of each row. Added to: dhidden
 * (N,C) and wte's gradient.
 * By hand: one row, hidden (1, 2); wte has two tokens, (0, 0) and (ln 3, 0). Then the logits are 0
 * and ln 3, p = (0.25, 0.75). Target 1 and dlogprob -2 give d logits (0.5, -0.5), and so
 *   d wte    (0.5, 1) and (-0.5, -1)      each token's slope times hidden
 *   d hidden (-0.5 ln 3, 0)               the tokens' vectors, each times its slope
 *                                                                  test: lm_head_backward_hand */
static void lm_head_backward_chunk(struct GPT2 *model, struct LMHead *head, size_t first,
                                   const float *dlogprob, float *dhidden, struct Arena *arena) {
    size_t V = model->config.vocab_size;
    size_t C = model->config.n_embd;
    size_t n = lm_head_logits(model, head, first);

    /* 1. Logits become their derivatives in place; from now on head has no logits. The model's own
     *    logits were divided by the temperature, so the derivatives by them are, too. */
    head->logits_first = head->R;
#pragma omp parallel for schedule(dynamic, 4)
    for (size_t i = 0; i < n; i++)
        lm_head_backward_row(head->logits + i * V, head->lse[first + i], head->target[first + i],
                             dlogprob[first + i] / head->temperature, V);

    /* 2. d hidden = d logits wte,  (n,V) times (V,C): what goes back through the model. */
    float *drows = arena_floats(arena, n * C);
    matmul(matrix_out(drows, n, C), matrix(head->logits, n, V), matrix(model->wte.w, V, C));

    /* 3. wte's gradient, the first of two ways: as the output layer, d wte += d logits^T hidden.
     *    Every token of the vocabulary gets a share, since each had a logit. The second way, as the
     *    embedding of the tokens that were read, comes at the end of gpt2_backward. */
    if (model->wte.d)
        matmul_add(matrix_out(model->wte.d, V, C), transposed(matrix(head->logits, n, V)),
                   matrix(head->hidden + first * C, n, C));

    /* 4. Back to the rows' places in the batch; added, since another head may have contributed to
     *    the same hidden state. */
    for (size_t i = 0; i < n; i++)
        residual_add_row(dhidden + (size_t)head->row[first + i] * C, drows + i * C, C);
}

/* lm_head_forward -- the log-probability of each row's target, and the other numbers of struct
 * LMHead. It is separate from the backward pass for losses that must know all log-probabilities
 * before any gradient is known: DPO compares two whole answers, and PPO skips a mini-batch whose
 * mean ratio is too large.                                                   test: gpt2_golden */
static void lm_head_forward(const struct GPT2 *model, struct LMHead *head) {
    for (size_t first = 0; first < head->R; first += head->chunk)
        lm_head_forward_chunk(model, head, first);
}

/* lm_head_backward -- after lm_head_forward: from d loss / d logprob, dlogprob (R), to the hidden
 * states, dhidden (N,C), and to wte's gradient; both are added to.
 *                           test: gpt2_gradient, gpt2_chunks; gdb: break lm_head_backward */
static void lm_head_backward(struct GPT2 *model, struct LMHead *head, const float *dlogprob,
                             float *dhidden, struct Arena *arena) {
    for (size_t first = 0; first < head->R; first += head->chunk)
        lm_head_backward_chunk(model, head, first, dlogprob, dhidden, arena);
}

/* lm_head_cross_entropy -- forward and backward at once, for the loss of a language model.
 *                                                              [glossary: Função de perda]
 *   loss = -weight sum_r logprob_r          d loss / d logprob_r = -weight
 * in   weight: 1 / (number of targets) for their mean
 * out  head: as after lm_head_forward; dhidden (N,C) and wte's gradient, added to
 *                                                       test: gpt2_chunks, gpt2_gradient_golden */
static void lm_head_cross_entropy(struct GPT2 *model, struct LMHead *head, float weight,
                                  float *dhidden, struct Arena *arena) {
    /* 1. The slope is the same for every row: it is known before any log-probability is. */
    float *dlogprob = arena_floats(arena, head->R);
    for (size_t r = 0; r < head->R; r++)
        dlogprob[r] = -weight;

    /* 2. So each chunk goes forward and back at once, while its logits exist. Two passes over all
     *    rows would compute all logits twice, and no other product of the model is as large. */
    for (size_t first = 0; first < head->R; first += head->chunk) {
        lm_head_forward_chunk(model, head, first);
        lm_head_backward_chunk(model, head, first, dlogprob, dhidden, arena);
    }
}

/* batch_logprobs -- one forward pass: how probable does this model find each target of the batch?
 * PPO, REINFORCE and DPO all begin here, once with the model that is trained and once with the
 * frozen reference.
 * in   keep: the model is being trained on this batch, so its activations are kept for the backward
 *      pass; false: it only judges */
static struct LMHead batch_logprobs(const struct GPT2 *model, struct Arena *arena,
                                    const struct Batch *batch, double temperature, bool keep) {
    /* 1. All tokens go through the blocks, then those that predict through the output layer. */
    struct Activations acts = gpt2_forward(model, arena, batch, keep);
    struct LMHead head =
        lm_head_new(model, arena, &acts, batch->row, batch->target, batch->R, (float)temperature);
    lm_head_forward(model, &head);

    /* 2. A model that only judges has no loss that would reveal a NaN, so its numbers are checked
     *    here; for a model in training, check_finite checks the loss computed from them. Only a
     *    model in training has a task. */
    if (!keep)
        check_numbers(model, arena, batch,
                      model->trace.task ? "a log-probability"
                                        : "a log-probability under the frozen model",
                      head.logprob, head.R);
    return head;
}

/* sum_target_logps -- log pi(y_i) of each whole answer, from those of its tokens.
 * in   token_logprobs (R), those of answer b from batch->target_start[b] on     out  logps (n)
 * By hand: tokens -1, -2, -3; the first answer has one, the second two: -1, -5.
 *                                                                            test: lm_head_hand */
static void sum_target_logps(const struct Batch *batch, size_t n, const float *token_logprobs,
                             double *logps) {
    for (size_t b = 0; b < n; b++)
        logps[b] = sequence_logprob(token_logprobs + batch->target_start[b],
                                    batch->target_start[b + 1] - batch->target_start[b]);
}

/* target_logps_backward -- sum_target_logps backward, and on through the whole model.
 * in   dlogps (n): d loss / d log pi(y_i); weight: the batch's share in the step's loss
 * log pi(y_i) is the sum over the tokens of y_i, so each of them gets the same derivative: in
 * chapter 5's pair -0.0426 each token of the chosen answer, 0.0426 each of the rejected one. */
static void target_logps_backward(struct GPT2 *model, struct Arena *arena,
                                  const struct Batch *batch, struct LMHead *head, size_t n,
                                  const double *dlogps, double weight) {
    /* 1. To the tokens of each answer. */
    float *dlogprob = arena_floats(arena, batch->R);
    for (size_t i = 0; i < n; i++)
        for (size_t r = batch->target_start[i]; r < batch->target_start[i + 1]; r++)
            dlogprob[r] = (float)(dlogps[i] * weight);

    /* 2. To the hidden states: zero in all rows that predict no target. */
    float *dhidden = arena_zeros(arena, batch->N * model->config.n_embd, sizeof *dhidden);
    lm_head_backward(model, head, dlogprob, dhidden, arena);

    /* 3. Through the blocks, to every gradient. */
    gpt2_backward(model, arena, &head->acts, dhidden);
}

/* ---- Heads that give one number ------------------------------------------------------------- */

/* The reward head, declared if the model has none yet: score.weight (1,C), as
 * GPT2ForSequenceClassification with one label has it. */
static struct Tensor *reward_head_declare(struct GPT2 *model) {
    /* no bias: it would add the same to all rewards, of which only differences count */
    if (!model->score.n)
        tensor_declare(model, &model->score, "score.weight", 1, model->config.n_embd);
    return &model->score;
}

/* The value head, declared if the model has none yet: v_head.summary.weight (1,C) and .bias, as in
 * TRL.                                    [glossary: AutoModelForCausalLMWithValueHead] */
static struct Linear *value_head_declare(struct GPT2 *model) {
    if (model->v_head.weight.n)
        return &model->v_head;
    /* with a bias: a value estimates the return itself, not a difference */
    tensor_declare(model, &model->v_head.weight, "v_head.summary.weight", 1, model->config.n_embd);
    tensor_declare(model, &model->v_head.bias, "v_head.summary.bias", 1, 0);
    return &model->v_head;
}

/* A new value head, initialized as torch does a Linear, for a model that came without one. */
static void value_head_init(struct GPT2 *model, uint64_t seed) {
    /* a head that was trained before is kept */
    if (model->v_head.weight.n)
        return;
    struct Rng rng = rng_seed(seed, STREAM_INIT);
    struct Linear *head = value_head_declare(model);
    /* the same bound for weight and bias, from the number of inputs, as in torch */
    tensor_uniform(&head->weight, &rng, model->config.n_embd);
    tensor_uniform(&head->bias, &rng, model->config.n_embd);
}

/* scalar_head_forward -- one number for each of R rows: the reward head and the value head.
 *   out_r = hidden[row_r] . weight + bias
 * in   hidden (N,C); row (R): which of its rows are read; weight (1,C); bias (1), or NULL for none
 * out  out (R)
 * By hand: hidden (2, 3), weight (0.5, -1), bias 4: 1 - 3 + 4 = 2.   test: reward_head_gradient */
static void scalar_head_forward(float *out, const float *hidden, const int *row, size_t R,
                                const struct Tensor *weight, const struct Tensor *bias) {
    size_t C = weight->n;
    for (size_t r = 0; r < R; r++)
        out[r] = row_dot(hidden + (size_t)row[r] * C, weight->w, C) + (bias ? bias->w[0] : 0);
}

/* One row of scalar_head_backward: dhidden (C) and the weight's gradient are added to. */
static void scalar_head_backward_row(float *dhidden, float dout, const float *hidden,
                                     struct Tensor *weight) {
    /* out = sum_c hidden_c weight_c: each factor's slope is the other factor. dhidden is added to,
     * since the output layer and another head may contribute to the same hidden state. */
    for (size_t c = 0; c < weight->n; c++)
        dhidden[c] += dout * weight->w[c];
    /* a frozen head learns nothing, but has passed the derivative on */
    if (!weight->d)
        return;
    for (size_t c = 0; c < weight->n; c++)
        weight->d[c] += dout * hidden[c];
}

/* scalar_head_backward -- dout (R), the derivative of the loss by each number, back to the hidden
 * states and the head's weights; all are added to.
 *   dhidden[row_r] += dout_r weight;  dweight += sum_r dout_r hidden[row_r];  dbias += sum_r dout_r
 * By hand: as above with dout 2: dhidden (1, -2), dweight (4, 6), dbias 2.
 *                                                                    test: reward_head_gradient */
static void scalar_head_backward(float *dhidden, const float *dout, const float *hidden,
                                 const int *row, size_t R, struct Tensor *weight,
                                 struct Tensor *bias) {
    size_t C = weight->n;
    for (size_t r = 0; r < R; r++) {
        /* not in parallel: two r may read the same row */
        size_t at = (size_t)row[r] * C;
        scalar_head_backward_row(dhidden + at, dout[r], hidden + at, weight);
        if (bias && bias->d)
            bias->d[0] += dout[r];
    }
}

/* The last token of text b that is not padding, as a row of the batch. */
static size_t reward_row(const struct Batch *batch, size_t b, int pad_token_id) {
    size_t last = batch->start[b + 1] - 1;
    /* GPT-2 pads with its end token, so an end token after the text is skipped as well. A text of
     * nothing but padding is read at its first token. */
    while (last > batch->start[b] && batch->ids[last] == pad_token_id)
        last--;
    return last;
}

/* reward_rows -- the row at which the reward of each of B texts is read, row (B).
 * Attention looks back only: the last token is the one position whose hidden state has seen all of
 * the text. Padding after it is not part of the text, and must not change its reward.
 * By hand: with padding token 60, the texts (1, 2, 60, 60) and (60, 3) are read at rows 1 and 5.
 *                                                                             test: reward_rows */
static void reward_rows(const struct Batch *batch, int pad_token_id, int *row) {
    for (size_t b = 0; b < batch->B; b++)
        row[b] = (int)reward_row(batch, b, pad_token_id);
}

/* =============================================================================================
 * Chapter 12 - LoRA                       [glossary: Adaptação de baixo rank (LoRA)]
 *
 * Must all weights be trained? The change that fine-tuning makes to a matrix W (in,out) has low
 * rank [21]. So learn only such a change: two thin matrices beside a frozen one,
 *
 *     y = x W + bias + scale (x A^T) B^T        A (r,in), B (out,r), scale = lora_alpha / r
 *
 * Gradients and AdamW's moments are then needed for r (in + out) numbers instead of in * out: GPT-2
 * with r = 16 on c_attn trains 12 * 16 * (768 + 2304) = 589,824 numbers beside 124 million. B
 * starts at zero, so training starts from the unchanged model; and the model without its adapter is
 * the reference of PPO and DPO, so no second copy is needed. At the end `align merge` adds
 * scale A^T B^T to W: a single matrix again.
 *
 * Letters of this chapter: r is the rank (elsewhere a reward or a row); A and B are the two
 * matrices (elsewhere an advantage and the number of sequences).
 *
 * What enters: a frozen model. What leaves: an adapter, in PEFT's names.
 * ============================================================================================= */

/* lora_forward -- adds the adapter's share to what the frozen layer has computed [21, Eq. 3].
 *                                              [glossary: Adaptação de baixo rank (LoRA)]
 *   u = scale x A^T          y += u B^T
 * in   x (N,in); linear: A (r,in), B (out,r)          in, out  y (N,out)
 * By hand: x = (1, 2), A = (3, 4), B = (5), scale 2: u = 2 (3 + 8) = 22, y grows by 22 * 5 = 110.
 *                                                       test: lora_hand; gdb: break lora_forward */
static void lora_forward(float *y, const float *x, const struct Linear *linear, size_t N) {
    size_t r = linear->lora_A.shape[0];
    size_t in = linear->lora_A.shape[1];
    size_t out = linear->lora_B.shape[0];

    /* 1. Down to r numbers per row. The order of the products matters: if A^T B^T were multiplied
     *    first, it would be as large as W, and so would the work. The scale is applied here, where
     *    there are fewest numbers. */
    float *u = thread_scratch(SCRATCH_ROW, N * r, sizeof *u);
    matmul(matrix_out(u, N, r), matrix(x, N, in), transposed(matrix(linear->lora_A.w, r, in)));
    for (size_t i = 0; i < N * r; i++)
        u[i] *= linear->lora_scale;

    /* 2. And up again to out numbers, added to what W has given. */
    matmul_add(matrix_out(y, N, out), matrix(u, N, r),
               transposed(matrix(linear->lora_B.w, out, r)));
}

/* lora_backward -- lora_forward in reverse. y = ... + u B^T, u = scale x A^T; with g = scale dy B
 * (N,r), the derivative that comes back through B:
 *   dB += dy^T u          dA += g^T x          dx += g A
 * in   dy (N,out), x (N,in)     added to: dx (N,in), which already has the frozen layer's share,
 *      and the gradients of A and B
 * By hand: as above with dy = 1: g = 2 * 5 = 10, dB = 22, dA = (10, 20), dx grows by (30, 40).
 *                                                               test: lora_hand, lora_gradient */
static void lora_backward(float *dx, const float *dy, const float *x, struct Linear *linear,
                          size_t N) {
    struct Tensor *A = &linear->lora_A;
    struct Tensor *B = &linear->lora_B;
    size_t r = A->shape[0];
    size_t in = A->shape[1];
    size_t out = B->shape[0];

    /* 1. u is recomputed instead of being kept, since it is only r numbers per row. g comes after
     *    it in memory, so one loop scales both. */
    float *u = thread_scratch(SCRATCH_ROW, 2 * N * r, sizeof *u);
    float *g = u + N * r;
    matmul(matrix_out(u, N, r), matrix(x, N, in), transposed(matrix(A->w, r, in)));
    matmul(matrix_out(g, N, r), matrix(dy, N, out), matrix(B->w, out, r));
    for (size_t i = 0; i < 2 * N * r; i++)
        u[i] *= linear->lora_scale;

    /* 2. The adapter's own gradients. At the start B is zero, hence g too, and only B learns; from
     *    the second step on both do. If A also started at zero, u and g would be zero for ever, and
     *    nothing would be learnt. */
    matmul_add(matrix_out(B->d, out, r), transposed(matrix(dy, N, out)), matrix(u, N, r));
    matmul_add(matrix_out(A->d, r, in), transposed(matrix(g, N, r)), matrix(x, N, in));

    /* 3. What goes on to the previous layer: added, since x went into both W and A. */
    matmul_add(matrix_out(dx, N, in), matrix(g, N, r), matrix(A->w, r, in));
}

/* ---- Which layers have an adapter ----------------------------------------------------------- */

/* Walks through a list of names, separated by spaces or commas: moves *list to the next name and
 * returns its length, or 0 at the end. The caller moves past the name. */
static size_t next_name(const char **list) {
    *list += strspn(*list, " ,");
    return strcspn(*list, " ,");
}

/* Does the dotted name `module` end with the first n characters of `target`, and does this ending
 * start at the name's beginning or after a dot? */
static bool target_takes(const char *target, size_t n, const char *module) {
    /* the end is compared, so that a target can be as short as "c_proj" */
    size_t length = strlen(module);
    if (n > length || strncmp(module + length - n, target, n) != 0)
        return false;
    /* whole parts only: "proj" does not take h.0.mlp.c_proj, where "c_" precedes it */
    return n == length || module[length - n - 1] == '.';
}

/* lora_is_target -- does one of the targets take this module? PEFT's rule: a target takes each
 * module whose dotted name is the target or ends in "." and the target.
 * By hand: "c_proj" takes h.0.attn.c_proj and h.0.mlp.c_proj; "mlp.c_proj" the second alone;
 * "proj" none.                                                              test: lora_targets */
static bool lora_is_target(const char *module, const char *targets) {
    /* one matching target is enough */
    for (size_t n; (n = next_name(&targets)) > 0; targets += n)
        if (target_takes(targets, n, module))
            return true;
    return false;
}

/* The i-th linear layer that can have an adapter, i < 4 n_layer: all but the output layer, which is
 * also the embedding. */
static struct Linear *adaptable(const struct GPT2 *model, size_t i) {
    /* four in each block, in a checkpoint's order */
    struct Block *h = &model->h[i / 4];
    struct Linear *const four[] = {&h->attn.c_attn, &h->attn.c_proj, &h->mlp.c_fc, &h->mlp.c_proj};
    return four[i % 4];
}

/* The layer's name in transformers: if its weight is "h.0.attn.c_attn.weight", the name is
 * "transformer.h.0.attn.c_attn". */
static const char *module_name(struct Arena *arena, const struct Linear *linear) {
    return arena_printf(arena, "transformer.%.*s",
                        (int)(strlen(linear->weight.name) - strlen(".weight")),
                        linear->weight.name);
}

/* ---- Adding, merging and removing an adapter ------------------------------------------------ */

/* adapter_scale -- the factor of the adapter's share.
 *   lora_alpha / r [21, Section 4.1]          with rslora: lora_alpha / sqrt(r) [22]
 * By hand: alpha 16, r 64: 16 / 64 = 0.25; with rslora 16 / 8 = 2.            test: lora_start */
static float adapter_scale(const struct Adapter *adapter) {
    /* The scale exists so that one learning rate suits every rank. But A^T B^T is a sum of r
     * products with different signs, so it grows with sqrt(r), not with r: divided by r, an adapter
     * of large rank learns more slowly. rslora divides by sqrt(r) instead. */
    double r = (double)adapter->r;
    return (float)(adapter->lora_alpha / (adapter->use_rslora ? sqrt(r) : r));
}

/* Gives a layer an adapter with the rank and scale of model->adapter; A and B are zero. */
static void lora_declare(struct GPT2 *model, struct Linear *linear) {
    struct Arena *arena = &model->arena;
    size_t r = model->adapter.r;
    size_t in = linear->weight.shape[0];
    size_t out = linear->weight.shape[1];
    /* a model's tensors are named without "transformer.", which some checkpoints omit */
    const char *name = module_name(arena, linear) + strlen("transformer.");
    tensor_declare(model, &linear->lora_A, arena_printf(arena, "%s.lora_A.weight", name), r, in);
    tensor_declare(model, &linear->lora_B, arena_printf(arena, "%s.lora_B.weight", name), out, r);
    linear->lora_scale = adapter_scale(&model->adapter);
}

/* adapter_new -- a new adapter on every layer that target_modules selects.
 * As in PEFT, A is initialized as torch does a Linear, and B is zero.          test: lora_start */
static void adapter_new(struct GPT2 *model, struct Adapter adapter, uint64_t seed) {
    /* not STREAM_INIT itself, from which the heads draw: A would repeat their weights */
    struct Rng rng = rng_seed(seed, STREAM_ADAPTER);
    if (strcmp(adapter.target_modules, "all-linear") == 0)
        adapter.target_modules = "c_attn c_fc c_proj";
    model->adapter = adapter;
    size_t before = model->tensor_count;

    /* The frozen layers do not change; each selected one gets an A and a B of its own. */
    for (size_t i = 0; i < 4 * model->config.n_layer; i++) {
        struct Linear *linear = adaptable(model, i);
        if (!lora_is_target(module_name(&model->arena, linear), adapter.target_modules))
            continue;
        lora_declare(model, linear);
        /* A random, B zero: their product is zero, so the model equals its base to the last bit;
         * yet B has a gradient at once, since x A^T is not zero */
        tensor_uniform(&linear->lora_A, &rng, linear->weight.shape[0]);
    }
    /* names that select no layer must be a typing error: the training would change nothing */
    CHECK(model->tensor_count > before,
          "--lora_target_modules \"%s\": no linear layer of the model has such a name; there are "
          "c_attn, c_proj and c_fc "
          "(attn.c_proj, mlp.c_proj; all-linear: all)",
          adapter.target_modules);
}

/* Removes a layer's adapter: from now on it computes what it did without one. */
static void lora_remove(struct Linear *linear) {
    /* module_forward looks at this n; the memory itself belongs to the model's arena */
    linear->lora_A.n = 0;
    linear->lora_B.n = 0;
}

/* lora_merge -- the adapter of one layer folded into its weight, and gone.
 *   W += A^T (scale B)^T,     for x W + (x A^T) (scale B)^T = x (W + A^T (scale B)^T)
 * By hand: W = (1, 1), A = (3, 4), B = (5), scale 2: W = (1 + 30, 1 + 40); x = (1, 2) gives
 * 31 + 82 = 113, as before: 3 + 110.                                 test: lora_hand, lora_merge */
static void lora_merge(struct Linear *linear) {
    struct Tensor *W = &linear->weight;
    struct Tensor *A = &linear->lora_A;
    struct Tensor *B = &linear->lora_B;
    if (!A->n)
        return;
    size_t in = W->shape[0];
    size_t out = W->shape[1];
    size_t r = A->shape[0];

    /* 1. The scale goes into B, which is not needed afterwards. */
    for (size_t k = 0; k < B->n; k++)
        B->w[k] *= linear->lora_scale;

    /* 2. A^T (in,r) times B^T (r,out) has W's shape, and is added to it. The product that training
     *    avoids is computed once. */
    matmul_add(matrix_out(W->w, in, out), transposed(matrix(A->w, r, in)),
               transposed(matrix(B->w, out, r)));
    lora_remove(linear);
}

/* What is empty leaves the list of a model's tensors: it is neither trained nor saved any more. */
static void drop_empty_tensors(struct GPT2 *model) {
    /* the others move up, in their order */
    size_t kept = 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        if (model->tensors[i]->n)
            model->tensors[kept++] = model->tensors[i];
    model->tensor_count = kept;
}

/* adapter_merge -- folds the whole adapter into its base: the same model up to rounding, as fast as
 * one without an adapter, and a checkpoint that any program reads.             test: lora_merge */
static void adapter_merge(struct GPT2 *model) {
    for (size_t i = 0; i < 4 * model->config.n_layer; i++)
        lora_merge(adaptable(model, i));

    /* A and B are empty now, and must not be saved */
    drop_empty_tensors(model);
    model->adapter.r = 0;
}

/* Gives the layer its own copy of A and B, which training the other model does not change. */
static void lora_own_copy(struct Arena *arena, struct Linear *linear) {
    struct Tensor *A = &linear->lora_A;
    struct Tensor *B = &linear->lora_B;
    if (!A->n)
        return;
    A->w = memcpy(arena_floats(arena, A->n), A->w, A->n * sizeof(float));
    B->w = memcpy(arena_floats(arena, B->n), B->w, B->n * sizeof(float));
}

/* adapter_reference -- the model as it was before training, to measure the trained one against.
 *                                                          [glossary: Modelo de referência]
 * Only the adapter and a head are trained, so all other tensors are shared with the model: GPT-2's
 * reference does not cost another 500 MB.
 * in   keeps_adapter: false if the adapter is new: the start was the model without it; true if an
 *      existing adapter is trained further: the start is a copy of it as it is now (TRL 1.16)
 *                                                                          test: lora_reference */
static struct GPT2 *adapter_reference(const struct GPT2 *model, bool keeps_adapter) {
    size_t L = model->config.n_layer;
    struct GPT2 *ref = malloc(sizeof *ref);
    CHECK(ref, "out of memory");

    /* 1. The same tensors, in a struct that owns none of them: it is never trained or saved. */
    *ref = *model;
    ref->arena = (struct Arena){0};
    ref->tensor_count = 0;

    /* 2. The blocks' structs are copied, since what they say about A and B is about to change. */
    struct Block *blocks = arena_alloc(&ref->arena, L, sizeof *blocks);
    ref->h = memcpy(blocks, model->h, L * sizeof *blocks);
    for (size_t i = 0; i < 4 * L; i++) {
        struct Linear *linear = adaptable(ref, i);
        /* an existing adapter was part of the start; a new one was not */
        if (keeps_adapter)
            lora_own_copy(&ref->arena, linear);
        else
            lora_remove(linear);
    }
    return ref;
}

/* =============================================================================================
 * Chapter 13 - Writing: KV cache, sampling, beam search
 *                                               [glossary: Inferência] [glossary: Amostragem]
 *
 * How does a model that only ever predicts one token write a text? One token at a time: predict,
 * choose (chapter 6), append, predict again. To predict, attention needs the keys and values of
 * all earlier tokens. They never change, so they are kept, in the KV cache. Then a new token costs
 * one row of work instead of a whole pass. Two prompts, side by side:
 *
 *     pass 1   rows A B C, D    the prompts, whole; their last tokens predict E and F
 *     pass 2   rows E, F        the cache has what precedes them; they predict G and the end token
 *     pass 3   row  G           F was followed by the end token: its sequence has left the batch
 *
 * Greedy decoding takes the most probable token at each step. It can miss the most probable
 * sequence, because the best token now may lead to worse ones later:
 *
 *              .-- B 0.6 --.-- x 0.5      A B x   0.6 * 0.5  = 0.30   greedy: B, then x
 *          A --|           '-- y 0.5      A B y   0.6 * 0.5  = 0.30
 *              '-- C 0.4 --.-- x 0.95     A C x   0.4 * 0.95 = 0.38   two beams keep C alive
 *                          '-- y 0.05     A C y   0.4 * 0.05 = 0.02
 *
 * Beam search keeps the K best beginnings instead of one, here K = 2, and continues them side by
 * side. It finds A C x. With as many beams as there are sequences it would find the best of all.
 * RLHF does not use it: to learn, a policy must also try what it finds improbable.
 *
 * What enters: prompts. What leaves: sequences, each up to and including its end token.
 * ============================================================================================= */

/* transformers' defaults: greedy, at most 20 tokens. top_k counts only if do_sample is set. */
static struct GenerationConfig generation_config(void) {
    return (struct GenerationConfig){
        .max_new_tokens = 20,
        .top_k = 50,
        .num_return_sequences = 1,
        .num_beams = 1,
        /* 1: logits and distribution stay as they are */
        .temperature = 1,
        .top_p = 1,
        .repetition_penalty = 1,
        /* beams are compared by their mean log-probability per token */
        .length_penalty = 1,
    };
}

/* ---- The KV cache --------------------------------------------------------------------------- */

/* An empty cache for B sequences of at most `capacity` tokens: keys and values (L,B,capacity,C). */
static struct KVCache kv_cache_new(const struct GPT2 *model, struct Arena *arena, size_t B,
                                   size_t capacity) {
    /* Room for the longest text is taken at once, since a cache that grew would have to be copied.
     * GPT-2 small, 64 sequences of 64 tokens: 12 * 64 * 64 * 768 floats are 151 MB, for the keys
     * and again for the values. */
    size_t floats = model->config.n_layer * B * capacity * model->config.n_embd;
    return (struct KVCache){
        .B = B,
        .capacity = capacity,
        .k = arena_floats(arena, floats),
        .v = arena_floats(arena, floats),
        /* nothing is filled yet: this makes decode_batch start with the whole prompt */
        .length = arena_zeros(arena, B, sizeof(size_t)),
    };
}

/* Sequence `slot` of a cache becomes a copy of sequence `from_slot` of another cache of the same
 * capacity. A beam that is continued in two ways needs its past twice. */
static void kv_cache_copy(const struct GPT2 *model, struct KVCache *cache, size_t slot,
                          const struct KVCache *from, size_t from_slot) {
    size_t C = model->config.n_embd;
    size_t used = from->length[from_slot] * C;
    for (size_t l = 0; l < model->config.n_layer; l++) {
        /* a sequence's past is in L places, one for each layer; only its filled part is copied */
        size_t to = kv_cache_place(cache, l, slot, 0, C);
        size_t source = kv_cache_place(from, l, from_slot, 0, C);
        memcpy(cache->k + to, from->k + source, used * sizeof(float));
        memcpy(cache->v + to, from->v + source, used * sizeof(float));
    }
    cache->length[slot] = from->length[from_slot];
}

/* ---- One token for each sequence ------------------------------------------------------------ */

/* A sequence that is being written: the prompt, then what was generated. */
struct Sequence {
    int *ids; /* with room for max_length */
    size_t n, prompt_length, max_length;
    size_t slot; /* its number in the KV cache */
    float score; /* of a beam: the log-probability of what was generated, nats */
    bool finished;
    struct Rng rng; /* its own, so that its neighbours' draws do not matter */
};

/* sequence_extend -- chooses the next token and appends it.    [glossary: Argmax/Argmin]
 * in   logits (V) of the next token; they are changed
 * The end token is appended like any other, because what is learnt from includes it.
 *                                          test: generate_golden; gdb: break sequence_extend */
static void sequence_extend(struct Sequence *s, float *logits, size_t V,
                            const struct GenerationConfig *config, int end_token) {
    /* 1. Penalties, temperature and cuts (chapter 6). */
    process_logits(logits, V, config, s->ids, s->n, s->n - s->prompt_length, end_token);

    /* 2. The token: drawn, or the most probable one. */
    int id = config->do_sample ? sample_token(logits, V, &s->rng) : (int)argmax(logits, V);
    s->ids[s->n] = id;
    s->n++;

    /* 3. Finished, by its own choice or for lack of room? */
    s->finished = id == end_token || s->n >= s->max_length;
}

/* The rows for the next pass of the model: of each sequence, the tokens that are not in the cache
 * yet. At first these are the whole prompt, later only the newest token.
 *                                                                         test: generate_decode */
static struct Batch decode_batch(struct Arena *arena, struct Sequence **active, size_t count,
                                 struct KVCache *cache) {
    /* 1. How many rows? */
    size_t N = 0;
    for (size_t i = 0; i < count; i++)
        N += active[i]->n - cache->length[active[i]->slot];

    /* 2. The rows, with positions counted from the start of the text, not of the batch; and for
     *    each row, the sequence of the cache in which attention finds its past. */
    struct Batch batch = batch_new(arena, count, N);
    size_t *slot = arena_alloc(arena, N, sizeof *slot);
    cache->slot = slot;
    for (size_t i = 0; i < count; i++) {
        const struct Sequence *s = active[i];
        batch_append(&batch, s->ids, cache->length[s->slot], s->n);
        batch.start[i + 1] = batch.N;
        for (size_t n = batch.start[i]; n < batch.N; n++)
            slot[n] = s->slot;
    }
    return batch;
}

/* Ends the program if a logit is infinite or NaN, and names the layer where that began. The pass
 * with the cache has not kept what this takes, so each sequence is computed again as a whole. */
static void check_next_logits(const struct GPT2 *model, struct Arena *arena,
                              struct Sequence **active, size_t count, const float *logits) {
    /* 1. Almost always, all are finite. */
    size_t V = model->config.vocab_size;
    if (first_not_finite(logits, count * V) == count * V)
        return;

    /* 2. Otherwise with all activations kept, as in training: check_numbers searches them. */
    for (size_t i = 0; i < count; i++) {
        struct Example whole = {active[i]->ids, active[i]->n, 0};
        struct Batch batch = collate(arena, &whole, 1, READ_LAST);
        check_numbers(model, arena, &batch, "a logit of the next token", logits + i * V, V);
    }
}

/* generate_step -- one pass of the model: logits (count,V) for each active sequence's next token.
 * in, out  cache: it has the tokens that were read before, and afterwards all of them
 *                                                                        test: generate_company */
static float *generate_step(const struct GPT2 *model, struct Arena *arena, struct Sequence **active,
                            size_t count, struct KVCache *cache) {
    size_t C = model->config.n_embd;
    size_t V = model->config.vocab_size;

    /* 1. The new tokens go through all layers, and leave their keys and values in the cache. */
    struct Batch batch = decode_batch(arena, active, count, cache);
    float *hidden = gpt2_decode(model, arena, &batch, cache);

    /* 2. Only the last row of each sequence predicts something that is not known yet. The output
     *    layer is the most expensive one, so it gets those rows alone. */
    float *last = arena_floats(arena, count * C);
    float *logits = arena_floats(arena, count * V);
    for (size_t i = 0; i < count; i++)
        memcpy(last + i * C, hidden + (batch.start[i + 1] - 1) * C, C * sizeof *last);
    decode_logits(model, logits, last, count);

    /* 3. A NaN by itself would not stop anything: argmax and the draw still return some token. */
    check_next_logits(model, arena, active, count, logits);
    return logits;
}

/* ---- Beam search ---------------------------------------------------------------------------- */

/* A search in progress, with K = config->num_beams. Running beams have equal lengths, and their
 * score is the log-probability of what was generated; that of a finished beam is divided by
 * length^length_penalty. A step reads `running` and writes `next`; then the two, and their caches,
 * change places. */
struct BeamSearch {
    const struct GPT2 *model;
    const struct GenerationConfig *config;
    struct Rng *rng; /* for do_sample */
    size_t prompt_length, max_length;
    struct Sequence *running, *next; /* (K) each */
    size_t running_count; /* 1 at first, then usually K, 0 when none is left */
    struct KVCache cache, next_cache;
    struct Sequence *finished; /* (K) the pool of finished beams, best first */
    size_t finished_count;
    struct Candidate *going_on; /* (2K) of this step: continuations that do not end */
    size_t going_on_count;
};

/* `count` sequences without a token, each with its own number in the cache. */
static struct Sequence *beams_new(struct Arena *arena, size_t count, size_t max_length) {
    /* beam i keeps slot i; it is the text in the slot that changes */
    struct Sequence *beams = arena_zeros(arena, count, sizeof *beams);
    for (size_t i = 0; i < count; i++)
        beams[i] = (struct Sequence){.ids = arena_alloc(arena, max_length, sizeof(int)), .slot = i};
    return beams;
}

/* A search that has one running beam: the prompt. */
static struct BeamSearch beam_search_new(struct Arena *arena, const struct GPT2 *model,
                                         struct Sequence *prompt,
                                         const struct GenerationConfig *config) {
    size_t K = config->num_beams;
    struct BeamSearch search = {
        .model = model,
        .config = config,
        .rng = &prompt->rng,
        .prompt_length = prompt->n,
        .max_length = prompt->max_length,
        .running = beams_new(arena, K, prompt->max_length),
        .next = beams_new(arena, K, prompt->max_length),
        .running_count = 1,
        /* two caches: while the next step's beams are written, this step's are still read */
        .cache = kv_cache_new(model, arena, K, prompt->max_length),
        .next_cache = kv_cache_new(model, arena, K, prompt->max_length),
        .finished = beams_new(arena, K, prompt->max_length),
        .going_on = arena_alloc(arena, 2 * K, sizeof(struct Candidate)),
    };
    /* Its score is 0: the prompt is given, so its probability does not count. There is one such
     * beam, not K: K equal ones would all be continued in the same way. */
    memcpy(search.running->ids, prompt->ids, prompt->n * sizeof(int));
    search.running->n = prompt->n;
    return search;
}

/* A beam becomes `from` plus one token. It keeps its own place in the cache. */
static void beam_set(struct Sequence *beam, const struct Sequence *from, int id, float score) {
    memcpy(beam->ids, from->ids, from->n * sizeof *beam->ids);
    beam->ids[from->n] = id;
    /* not the whole struct: the beam's ids and slot are its own */
    beam->n = from->n + 1;
    beam->score = score;
}

/* beam_score -- from the logits (V) of a beam's next token to the scores of its V continuations:
 *   score(beam + v) = score(beam) + log softmax(logits)_v
 * The processors act on the log-probabilities, in transformers' order: so what top-k cuts gets the
 * score minus infinity, and the rest is not normalized again to the sum 1.
 * By hand: A C has log 0.4 = -0.9163, x follows with 0.95: -0.9163 - 0.0513 = -0.9676 = log 0.38.
 *                                                                        test: beam_search_hand */
static void beam_score(const struct BeamSearch *search, const struct Sequence *beam,
                       float *logits) {
    /* 1. Log softmax: scores of different beams can only be compared as log-probabilities. */
    size_t V = search->model->config.vocab_size;
    float lse = log_sum_exp(logits, V, thread_scratch(SCRATCH_ROW, V, sizeof(float)));
    for (size_t v = 0; v < V; v++)
        logits[v] -= lse;

    /* 2. The processors, and the score so far. */
    process_logits(logits, V, search->config, beam->ids, beam->n, beam->n - search->prompt_length,
                   search->model->config.eos_token_id);
    for (size_t v = 0; v < V; v++)
        logits[v] += beam->score;
}

/* gumbel_keys -- random keys for n scores whose order is a draw without replacement: the largest
 * key is a draw from softmax(score), the second largest a draw from the rest, and so on.
 *   key = score + Gumbel noise,   noise = -log(-log u), u uniform in (0, 1]
 * So sampled beams differ from each other; drawn with replacement, several could be equal.
 * By hand: scores log (0.5, 0.2, 0.3): the first has the largest key in half of all draws.
 *                                                                         test: beam_candidates */
static float *gumbel_keys(struct Arena *arena, const float *score, size_t n, struct Rng *rng) {
    float *key = arena_floats(arena, n);
    /* 1 - u, since rng_uniform may return 0, which has no logarithm, but never 1 */
    for (size_t i = 0; i < n; i++)
        key[i] = (float)(score[i] - log(-log(1 - rng_uniform(rng))));
    return key;
}

/* beam_candidates -- the indices of the `most` largest keys, largest first.
 * in   key (n); for sampling the keys are noisy, otherwise they are the scores
 * out  best: room for `most`; returns how many there are: keys of minus infinity are left out
 * By hand: keys log (0.5, 0, 0.2, 0.3), most 2: indices 0 and 3.          test: beam_candidates */
static size_t beam_candidates(const float *key, size_t n, size_t most, struct Arena *arena,
                              struct Candidate *best) {
    /* 1. The smallest key that gets in. K V keys are too many to sort, but selection is fast. */
    float *copy = arena_floats(arena, n);
    memcpy(copy, key, n * sizeof *copy);
    most = MIN(most, n);
    float threshold = kth_largest(copy, n, most);

    /* 2. Larger keys get in for certain, equal ones as long as there is room. */
    size_t count = 0;
    for (size_t i = 0; i < n && count < most; i++)
        if (key[i] > threshold)
            best[count++] = (struct Candidate){key[i], (int)i};
    for (size_t i = 0; i < n && count < most && threshold > -INFINITY; i++)
        if (key[i] == threshold)
            best[count++] = (struct Candidate){key[i], (int)i};

    /* 3. Only these few are sorted. */
    qsort(best, count, sizeof *best, compare_candidates_down);
    return count;
}

/* beam_finish -- puts a sequence that has ended into the pool of the K best, if it is good enough.
 * in   beam, and the token that ended it; score: log-probability / length^length_penalty */
static void beam_finish(struct BeamSearch *search, const struct Sequence *beam, int id,
                        float score) {
    /* 1. The last place of the pool: free, or taken from a worse sequence. */
    struct Sequence *pool = search->finished;
    if (search->finished_count < search->config->num_beams)
        search->finished_count++;
    else if (!(score > pool[search->finished_count - 1].score))
        return;
    size_t place = search->finished_count - 1;
    beam_set(&pool[place], beam, id, score);

    /* 2. Up past all that are worse. Whole structs are swapped, so the memory of the ids moves
     *    along with its owner. */
    for (; place > 0 && pool[place].score > pool[place - 1].score; place--) {
        struct Sequence better = pool[place];
        pool[place] = pool[place - 1];
        pool[place - 1] = better;
    }
}

/* beam_sort_out -- one of the step's 2K best continuations: does it end, or does it go on?
 * in   rank: 0 for the best. A continuation that ends counts only if it is among the best K. Why
 *      then look at 2K? Each beam can end in one way only, so at most K of them end, and at least
 *      K go on.
 * The score of one that ends is divided by length^length_penalty: each token lowers the sum, so
 * without it the shortest answer would win.
 * By hand: A C x: -0.9676 / 2^1 = -0.4838; A B x: -1.2040 / 2 = -0.6020.  test: beam_search_hand */
static void beam_sort_out(struct BeamSearch *search, const struct Candidate *candidate,
                          size_t rank) {
    /* 1. Which beam, and which token? The candidate's id is beam * V + token. */
    const struct GPT2Config *model = &search->model->config;
    const struct Sequence *beam = &search->running[(size_t)candidate->id / model->vocab_size];
    int id = (int)((size_t)candidate->id % model->vocab_size);

    /* 2. Neither the end token nor the last one there is room for: it goes on, with the plain sum
     *    as its score. Running beams have equal lengths, so no penalty is needed among them. */
    if (id != model->eos_token_id && beam->n + 1 < search->max_length) {
        search->going_on[search->going_on_count++] = *candidate;
        return;
    }

    /* 3. It ends. */
    if (rank >= search->config->num_beams)
        return;
    double length = (double)(beam->n + 1 - search->prompt_length);
    double divisor = pow(length, search->config->length_penalty);
    beam_finish(search, beam, id, (float)(candidate->value / divisor));
}

/* beam_continue -- the K best continuations that go on become the running beams. Several may come
 * from one beam and none from another, so each takes a copy of its past along. */
static void beam_continue(struct BeamSearch *search) {
    /* 1. Best first; when sampling, they are still in the order in which they were drawn. */
    qsort(search->going_on, search->going_on_count, sizeof *search->going_on,
          compare_candidates_down);

    /* 2. They are written to `next`, since the beams they continue are still read. */
    size_t V = search->model->config.vocab_size;
    search->running_count = MIN(search->going_on_count, search->config->num_beams);
    for (size_t i = 0; i < search->running_count; i++) {
        struct Candidate best = search->going_on[i];
        size_t from = (size_t)best.id / V;
        /* text and cache together, or attention would see the keys of another text */
        beam_set(&search->next[i], &search->running[from], (int)((size_t)best.id % V), best.value);
        kv_cache_copy(search->model, &search->next_cache, i, &search->cache, from);
    }

    /* 3. `next` and `running` change places. */
    struct Sequence *beams = search->running;
    struct KVCache cache = search->cache;
    search->running = search->next;
    search->cache = search->next_cache;
    search->next = beams;
    search->next_cache = cache;
}

/* beam_advance -- one step of the search, from what the model predicts for each beam.
 * in   logits (running,V) of each running beam's next token; they become scores
 *                                        test: beam_search_hand; gdb: break beam_advance */
static void beam_advance(struct BeamSearch *search, struct Arena *arena, float *logits) {
    size_t K = search->config->num_beams;
    size_t V = search->model->config.vocab_size;
    size_t n = search->running_count * V;

    /* 1. Scores for all continuations of all beams. */
    float *score = logits;
    /* each beam is a row of V numbers; without a threshold, since V is large */
#pragma omp parallel for
    for (size_t b = 0; b < search->running_count; b++)
        beam_score(search, &search->running[b], score + b * V);

    /* 2. The best 2K. Noise, if any, only decides which these are: from here on each counts with
     *    its true score. */
    float *key = search->config->do_sample ? gumbel_keys(arena, score, n, search->rng) : score;
    struct Candidate *best = arena_alloc(arena, 2 * K, sizeof *best);
    size_t count = beam_candidates(key, n, 2 * K, arena, best);
    for (size_t i = 0; i < count; i++)
        best[i].value = score[best[i].id];

    /* 3. Those that end go to the pool, the best K of the others go on. */
    search->going_on_count = 0;
    for (size_t i = 0; i < count; i++)
        beam_sort_out(search, &best[i], i);
    beam_continue(search);
}

/* beam_search_goes_on -- can a running beam still beat the worst of the pool?
 * This can only be estimated, since nobody knows how long the beam will become. As in transformers,
 * the best running beam is judged as if it ended now. With early_stopping "never" and a positive
 * length_penalty, which favours long answers, it is judged as if it reached the maximum length
 * without its sum falling any further. With early_stopping true, a full pool is enough to stop.
 * By hand: the worst of the pool has -0.6, a running beam of 3 tokens -1.5: -1.5 / 3 = -0.5 is
 * better, so the search goes on. With -2.1 it would not: -0.7. But if it may have 9 tokens,
 * "never" judges -2.1 / 9 = -0.23, and goes on.                         test: beam_search_stops */
static bool beam_search_goes_on(const struct BeamSearch *search) {
    const struct GenerationConfig *config = search->config;
    const struct Sequence *best = search->running;
    /* 1. Nothing runs, or there is no more room. */
    if (search->running_count == 0 || best->n >= search->max_length)
        return false;
    /* 2. There is a free place in the pool: anything that ends is welcome. */
    if (search->finished_count < config->num_beams)
        return true;
    if (config->early_stopping == STOP_TRUE)
        return false;

    /* 3. The pool is full: what could the best running beam reach, and would it get the last place?
     *    Beams are sorted, so no other one can reach more. */
    bool as_long_as_allowed = config->early_stopping == STOP_NEVER && config->length_penalty > 0;
    size_t end = as_long_as_allowed ? search->max_length : best->n;
    double length = (double)(end - search->prompt_length);
    double attainable = best->score / pow(length, config->length_penalty);
    return attainable > search->finished[search->finished_count - 1].score;
}

/* beam_search -- looks for the sequence that is most probable as a whole.
 *                                                              [glossary: Beam search]
 * in, out  sequences: num_return_sequences of them, all holding the same prompt; they become the
 *          best of the pool, best first
 * Each of the K running beams is continued with each of the V tokens; the best of these K V
 * continuations go on, or are finished. The chapter's essay has a case by hand. The steps are those
 * of transformers 5.
 *     test: beam_search_hand, beam_search_golden, beam_search_exhaustive, beam_search_negative */
static void beam_search(const struct GPT2 *model, struct Sequence *sequences,
                        const struct GenerationConfig *config) {
    struct Arena arena = {0};
    struct Arena step_arena = {0};
    struct BeamSearch search = beam_search_new(&arena, model, &sequences[0], config);
    struct Sequence **active = arena_alloc(&arena, config->num_beams, sizeof *active);

    /* 1. The model's logits, then one step, until nothing better can be expected. In the first step
     *    the one beam is the prompt; afterwards each beam adds one row to its cache. */
    while (beam_search_goes_on(&search)) {
        arena_reset(&step_arena);
        for (size_t b = 0; b < search.running_count; b++)
            active[b] = &search.running[b];
        float *logits =
            generate_step(model, &step_arena, active, search.running_count, &search.cache);
        beam_advance(&search, &step_arena, logits);
    }

    /* 2. The best of the pool. */
    size_t wanted = MIN(config->num_return_sequences, search.finished_count);
    for (size_t i = 0; i < wanted; i++) {
        /* the ids are copied, since the pool's memory is freed with the search */
        const struct Sequence *found = &search.finished[i];
        memcpy(sequences[i].ids, found->ids, found->n * sizeof(int));
        sequences[i].n = found->n;
        sequences[i].finished = true;
    }
    arena_free(&arena);
    arena_free(&step_arena);
}

/* ---- Many sequences ------------------------------------------------------------------------- */

enum { GENERATE_TOGETHER = 64 }; /* sequences decoded in one batch: bounds the cache's memory */

/* The unfinished ones of n sequences; each gets a number in the cache. */
static size_t active_sequences(struct Sequence *sequences, size_t n, struct Sequence **active) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        /* a prompt that leaves no room is its own answer */
        if (sequences[i].finished || sequences[i].n >= sequences[i].max_length)
            continue;
        sequences[i].slot = count;
        active[count++] = &sequences[i];
    }
    return count;
}

/* Moves the unfinished sequences together, in their order, and returns how many there are. Their
 * places in the cache stay the same. */
static size_t drop_finished(struct Sequence **active, size_t count) {
    /* left <= i: only entries that have been looked at are overwritten */
    size_t left = 0;
    for (size_t i = 0; i < count; i++)
        if (!active[i]->finished)
            active[left++] = active[i];
    return left;
}

/* Writes up to GENERATE_TOGETHER sequences, side by side, to their ends. */
static void generate_together(const struct GPT2 *model, struct Sequence *sequences, size_t n,
                              const struct GenerationConfig *config) {
    /* 1. A cache for the longest that any of them may become. */
    struct Arena arena = {0};
    struct Arena step_arena = {0};
    struct Sequence *active[GENERATE_TOGETHER];
    size_t count = active_sequences(sequences, n, active);
    size_t capacity = 0;
    for (size_t i = 0; i < count; i++)
        capacity = MAX(capacity, active[i]->max_length);
    struct KVCache cache = kv_cache_new(model, &arena, count, capacity);

    /* 2. One token for each at a time. Sequences that have ended drop out and cost nothing more. */
    size_t V = model->config.vocab_size;
    while (count > 0) {
        /* a step's activations are freed with the step: what later steps need is in the cache */
        arena_reset(&step_arena);
        float *logits = generate_step(model, &step_arena, active, count, &cache);
        /* in any order, since each draws from its own random numbers */
#pragma omp parallel for schedule(dynamic) if (count > 1)
        for (size_t i = 0; i < count; i++)
            sequence_extend(active[i], logits + i * V, V, config, model->config.eos_token_id);
        count = drop_finished(active, count);
    }
    arena_free(&arena);
    arena_free(&step_arena);
}

/* generate -- writes every sequence to its end token or its max_length.   [glossary: Rollout]
 * in, out  sequences (n): the prompt in place, and room for max_length ids. For beam search,
 *          num_return_sequences with the same prompt are neighbours.
 * The same call always gives the same answers, on any number of threads. Each sequence has its own
 * random numbers, so its batch does not matter either, with one exception: while more than FEW_ROWS
 * sequences are being written, the output layer adds in another order. A draw that falls between
 * the two roundings then comes out differently.
 *                                     test: generate_golden, generate_cache, generate_company */
static void generate(const struct GPT2 *model, struct Sequence *sequences, size_t n,
                     const struct GenerationConfig *config) {
    /* 1. Beam search: one search for each prompt, whose K beams are its batch. */
    if (config->num_beams > 1) {
        for (size_t i = 0; i < n; i += config->num_return_sequences)
            beam_search(model, sequences + i, config);
        return;
    }

    /* 2. Otherwise in groups of 64: large enough that the weights, read from memory once a step,
     *    serve many rows; small enough that the caches fit in memory. */
    for (size_t first = 0; first < n; first += GENERATE_TOGETHER) {
        size_t together = MIN(n - first, (size_t)GENERATE_TOGETHER);
        generate_together(model, sequences + first, together, config);
    }
}

/* A sequence that starts with a prompt of n ids and may grow by max_new tokens, as far as the
 * context allows. It may become one token longer than the context, as in transformers: the last
 * token is written but never read.         [glossary: Tokens máximos e mínimos]
 * By hand: a context of 24 and a prompt of 22: 3 new tokens at most.      test: generate_context */
static struct Sequence sequence_start(struct Arena *arena, const int *ids, size_t n, size_t max_new,
                                      const struct GPT2 *model, struct Rng rng) {
    /* + 1: the last token is never read, so it needs no position */
    size_t max_length = MIN(n + max_new, model->config.n_positions + 1);
    struct Sequence s = {.n = n, .prompt_length = n, .max_length = max_length, .rng = rng};
    /* a copy with room to grow, since several answers may start from one prompt */
    s.ids = memcpy(arena_alloc(arena, MAX(n, s.max_length), sizeof *s.ids), ids, n * sizeof *ids);
    return s;
}

/* Sequences that were written become examples to learn from. */
static struct Example *sequences_as_examples(struct Arena *arena, const struct Sequence *sequences,
                                             size_t n) {
    struct Example *examples = arena_alloc(arena, n, sizeof *examples);
    for (size_t i = 0; i < n; i++)
        examples[i] =
            (struct Example){sequences[i].ids, sequences[i].n, sequences[i].prompt_length};
    return examples;
}

/* sample_answers -- a policy's answers to n prompts, num_generations to each, side by side.
 * in, out  rng: each answer takes one number from it as the seed of its own random numbers, so the
 *          k-th answer does not change if others become longer
 * out      (n num_generations) examples whose prompt_length is that of the prompt
 * Here an answer ends at the end of the context, not one token later: it will be trained on, and
 * then its last token is read, too. */
static struct Example *sample_answers(const struct GPT2 *policy, struct Arena *arena,
                                      const struct Example *prompts, size_t n,
                                      size_t num_generations,
                                      const struct GenerationConfig *generation, struct Rng *rng) {
    /* 1. Each answer starts as its prompt. */
    size_t total = n * num_generations;
    struct Sequence *sequences = arena_alloc(arena, total, sizeof *sequences);
    for (size_t i = 0; i < total; i++) {
        const struct Example *prompt = &prompts[i / num_generations];
        size_t room = policy->config.n_positions - prompt->n;
        /* Room: what the prompt leaves of the context. The seed is drawn here, in order, whatever
         * is drawn later while writing. */
        struct Rng own = rng_seed(rng_next(rng), STREAM_SAMPLE);
        size_t max_new = MIN(generation->max_new_tokens, room);
        sequences[i] = sequence_start(arena, prompt->ids, prompt->n, max_new, policy, own);
    }

    /* 2. The answers are written, all side by side. */
    generate(policy, sequences, total, generation);
    return sequences_as_examples(arena, sequences, total);
}

/* =============================================================================================
 * Part III - Training
 *
 * The functions of Part I, applied to the model of Part II thousands of times. After this part a
 * reader knows how a language model, a reward model, a PPO policy and a DPO policy are trained, in
 * the order of the course, and what each number in their logs means.
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 14 - Optimizer, schedule, Trainer                  [glossary: Otimização]
 *
 * How do gradients become better weights? The backward pass has computed, for every weight, how
 * much the loss would change if the weight did: the gradient. A step moves all weights a little
 * way against it, and training is thousands of such steps. The Trainer works as transformers' does:
 *
 *     for each epoch (one pass through the data, in a new order):
 *         for each step:
 *             accumulate    forward and backward over some micro-batches; their gradients add up
 *             clip          a gradient that is too long is shortened
 *             step          AdamW moves the weights, at a scheduled learning rate
 *             log, evaluate, save        whichever is due
 *
 * A step in numbers:
 *     4 micro-batches of 8 rows      gradients add up       one step on 32 rows, memory for 8
 *     gradient norm 3.0, limit 1     times 1/3              one odd batch cannot throw weights far
 *     learning rate 5e-5, step 500 of 1000, linear          2.5e-5
 *
 * A Task says what is trained, and on which loss: chapters 15 (language model), 16 (reward model)
 * and 18 (DPO) each define one. PPO (chapter 17) has a loop of its own around optimizer_step.
 *
 * What enters: a model, a Task, TrainingArguments. What leaves: the model with trained weights, and
 * a log of the training.
 * ============================================================================================= */

/* ---- What this part uses of Part IV --------------------------------------------------------- */

/* The log. An entry is a list of named numbers. state_log adds an empty entry to the history;
 * log_at finds a number in an entry by its name, or adds it; state_say shows an entry on the
 * terminal. */
struct LogEntry;
struct TrainerState;
static struct LogEntry *state_log(struct TrainerState *state);
static struct Metric *log_at(struct LogEntry *entry, const char *name);
static void log_value(struct LogEntry *entry, const char *name, double value);
static bool log_find(const struct LogEntry *entry, const char *name, double *value);
static const char *log_name(const char *prefix, struct Text name);
static void state_say(const struct TrainerState *state, const char *name,
                      const struct LogEntry *entry, bool plain);

/* Checkpoints. checkpoint_new and checkpoint_add_... say what a run's state consists of (_sizes:
 * whole numbers, each at most `most`; _doubles: numbers that must be finite; _random: a generator;
 * _fixed: a number that must be the same when the run is resumed, `words` name it in a message).
 * checkpoint_resume restores the saved state, if the run is to resume from one; checkpoint_step
 * saves a checkpoint when one is due. */
struct Checkpoint;
struct TrainingArguments;
static struct Checkpoint checkpoint_new(const char *task, struct GPT2 *model,
                                        const struct Tokenizer *tok,
                                        const struct TrainingArguments *args,
                                        struct TrainerState *state);
static void checkpoint_add_sizes(struct Checkpoint *c, const char *name, size_t *at, size_t n,
                                 size_t most);
static void checkpoint_add_doubles(struct Checkpoint *c, const char *name, double *at, size_t n);
static void checkpoint_add_random(struct Checkpoint *c, const char *name, struct Rng *rng);
static void checkpoint_add_fixed(struct Checkpoint *c, const char *name, uint64_t value,
                                 const char *words);
static void checkpoint_resume(struct Checkpoint *c);
static void checkpoint_step(struct Checkpoint *c);

/* Files and folders. Each is written under a temporary name, and renamed when it is complete. */
struct Output;
struct Rollout;
struct RolloutTrainer;
static void make_folder(const char *path);
static void output_flush(struct Output *out);
static void output_close(struct Output *out);
static void model_replace(struct GPT2 *model, const char *folder, const struct Tokenizer *tok);
static void trainer_state_save(const struct TrainerState *s, const struct TrainingArguments *args,
                               const char *folder);
static void stats_write_line(FILE *file, const struct RolloutTrainer *trainer);
static void rollouts_write(FILE *file, const struct Rollout *rollouts, size_t n);
static void trace_write(FILE *file, const struct RolloutTrainer *trainer);

/* Samples on a terminal: is it time for one, how wide is the terminal, and a text made safe to
 * print there. */
static bool progress_sampling(size_t step, size_t total);
static size_t terminal_columns(void);
static char *cut_text(char *text, size_t bytes);
static struct Text text_shown(struct Arena *arena, struct Text text, const char *kept);

/* Prints a note if training texts contain the letters "<|endoftext|>": here they are ordinary text,
 * not an end token. */
static void warn_of_written_ends(const struct Dataset *data, const struct Tokenizer *tok);

/* A note that n of a data set's rows (or texts, or pairs) were not used as they are, and why; none
 * if n is 0. Silence would hide that a run learns from only a part of its data. */
static void PRINTF_LIKE(4, 5)
    note_rows(const struct Dataset *data, size_t n, const char *rows, const char *format, ...);

/* An output file: written as PATH.tmp, and moved onto PATH by output_close. */
struct Output {
    FILE *file;
    char path[PATH_MAX], tmp[PATH_MAX + 8];
};

/* The logs of a run of PPO, which grow with each step. */
enum { LOG_STATS, LOG_ROLLOUTS, LOG_TRACE, LOG_FILES };
static const char *const LOGS[LOG_FILES] = {"stats_all.jsonl", "rollouts.jsonl", "trace.jsonl"};

/* Set by Ctrl-C. Training then stops where it can be resumed, never in the middle of a step. */
static volatile sig_atomic_t interrupted;

/* ---- Settings ------------------------------------------------------------------------------- */

/* How the learning rate changes during a training: see schedule_factor. */
enum SchedulerType {
    SCHEDULER_LINEAR,
    SCHEDULER_COSINE,
    SCHEDULER_CONSTANT,
    SCHEDULER_CONSTANT_WITH_WARMUP
};

/* The optimizer. transformers has several names for AdamW, which stand for the same formula. */
enum Optim { OPTIM_ADAMW, OPTIM_ADAMW_TORCH, OPTIM_ADAMW_TORCH_FUSED, OPTIM_SGD };

/* The order of the rows in an epoch: shuffled, or as they stand in the data set. */
enum SamplingStrategy { SAMPLING_RANDOM, SAMPLING_SEQUENTIAL };

/* TrainingArguments of transformers, in its names. */
struct TrainingArguments {
    double learning_rate; /* the highest; see schedule_factor */
    double adam_beta1, adam_beta2, adam_epsilon, weight_decay; /* see adamw_piece */
    double max_grad_norm; /* see clip_factor; 0: no limit */
    double num_train_epochs; /* may be fractional; max_steps, if given, overrides it */
    double warmup_ratio; /* a share of all steps; used where warmup_steps is 0 */
    size_t per_device_train_batch_size; /* rows per micro-batch: one forward, one backward */
    size_t gradient_accumulation_steps; /* micro-batches per step */
    size_t max_steps, warmup_steps;
    size_t logging_steps, eval_steps; /* steps per log entry, steps per evaluation */
    size_t max_length; /* the most tokens a row may have */
    size_t per_device_eval_batch_size;
    enum SchedulerType lr_scheduler_type;
    enum SamplingStrategy train_sampling_strategy;
    enum Optim optim;
    uint64_t seed;
    double lr_end; /* linear decay ends at this share of the learning rate */
    const char *output_dir, *resume_from_checkpoint; /* output_dir NULL: no checkpoints */
    size_t save_steps, save_total_limit; /* 0: save none; keep all */
    size_t say_steps; /* steps per plain progress line; 0: one line per log entry */
};

static struct TrainingArguments training_arguments(void) {
    /* The defaults of transformers and TRL, so that flags copied from a script that uses those have
     * the same effect here. */
    return (struct TrainingArguments){
        .learning_rate = 5e-5,
        /* AdamW: means over about 10 and 1000 steps */
        .adam_beta1 = 0.9,
        .adam_beta2 = 0.999,
        .adam_epsilon = 1e-8,
        .weight_decay = 0,
        .max_grad_norm = 1,
        /* how long to train, and on how many rows at once */
        .num_train_epochs = 3,
        .per_device_train_batch_size = 8,
        .gradient_accumulation_steps = 1,
        .logging_steps = 10,
        .max_length = 1024,
        .per_device_eval_batch_size = 8,
        .lr_scheduler_type = SCHEDULER_LINEAR,
        .train_sampling_strategy = SAMPLING_RANDOM,
        .optim = OPTIM_ADAMW,
        .seed = 42,
        .save_steps = 500,
    };
}

/* ---- Optimizer ------------------------------------------------------------------------------ */

/* sqrt_fast -- the square root of x >= 0 without a division, so that the compiler turns a loop over
 * it into vector multiplications.
 *   y -> y (3 - x y^2) / 2      Newton's method for 1 / sqrt(x); each step doubles the right digits
 * Relative error below 2e-7; 0 gives 0.
 * By hand: x = 4: guess 0.4831, then 0.49915, 0.499998, 0.5; times x: 2.         test: sqrt_fast */
static inline float sqrt_fast(float x) {
    /* 1. A guess at 1 / sqrt(x), 4 % off at most. A float's bits, read as an integer, are nearly
     *    its logarithm; a constant minus half of them is the logarithm of x^(-1/2). */
    float y = float_of_bits(0x5f375a86 - (bits_of_float(x) >> 1));

    /* 2. three steps of Newton's method */
    y *= 1.5f - 0.5f * x * y * y;
    y *= 1.5f - 0.5f * x * y * y;
    y *= 1.5f - 0.5f * x * y * y;

    /* 3. sqrt(x) = x / sqrt(x), and one more step to recover what rounding lost in that product */
    float root = x * y;
    return root + 0.5f * y * (x - root * root);
}

/* Work is divided into pieces that do not depend on the number of threads: sums are then added in
 * the same order, and have the same bits, on any machine. */
enum { NORM_PIECES = 512, STEP_PIECE = 1 << 14 };

/* The sum of squares over piece number `piece` of a gradient of n numbers. */
static double square_sum_piece(const float *d, size_t n, size_t piece) {
    size_t length = (n + NORM_PIECES - 1) / NORM_PIECES;
    /* in a small tensor the last pieces are empty: the two MINs give them length 0 */
    size_t first = MIN(n, piece * length);
    return row_dot(d + first, d + first, MIN(n - first, length));
}

/* The sum of squares over a tensor's gradient: the pieces in parallel, their sums one by one. */
static double square_sum(const float *d, size_t n) {
    double part[NORM_PIECES];
    double sum = 0;
    /* 1. Each piece has a slot of its own: no two threads add to the same number. */
#pragma omp parallel for if (n > 100000)
    for (size_t piece = 0; piece < NORM_PIECES; piece++)
        part[piece] = square_sum_piece(d, n, piece);
    /* 2. Added in order, since a floating-point sum depends on it. An OpenMP reduction would give
     *    different last bits with a different number of threads. */
    for (size_t piece = 0; piece < NORM_PIECES; piece++)
        sum += part[piece];
    return sum;
}

/* gradient_norm -- the length of the gradient, all weights' derivatives seen as one vector.
 *   norm = sqrt(sum of squares over all tensors that train)
 * The log shows it as grad_norm. It says how steep the loss is here; a sudden peak means that the
 * batch was an odd one.
 * By hand: derivatives 300 and -400: 500.                       test: adamw_hand, gpt2_golden */
static double gradient_norm(const struct GPT2 *model) {
    /* one root, of the sum over all tensors: clipping each by itself would turn the gradient */
    double total = 0;
    for (size_t i = 0; i < model->tensor_count; i++) {
        /* a frozen tensor (LoRA's base) has no gradient */
        const struct Tensor *tensor = model->tensors[i];
        if (tensor->d)
            total += square_sum(tensor->d, tensor->n);
    }
    return sqrt(total);
}

/* clip_factor -- the factor that shortens the gradient to a length of max_grad_norm at most.
 *   factor = min(1, max_grad_norm / (norm + 1e-6))          the 1e-6 is torch's clip_grad_norm_
 * All derivatives are multiplied by the same number: the gradient keeps its direction. Without a
 * limit one odd batch, whose gradient is a hundred times as long as usual, would dominate AdamW's
 * running means for many steps. max_grad_norm 0: no limit.
 * By hand: norm 3, limit 1: 0.3333; norm 0.5, limit 1: 1.                     test: adamw_hand */
static double clip_factor(double norm, double max_grad_norm) {
    if (max_grad_norm <= 0 || norm <= 0)
        return 1;
    return MIN(1, max_grad_norm / (norm + 1e-6));
}

/* The constants of one optimizer step, the same for all weights of a tensor. */
struct OptimizerStep {
    bool is_sgd; /* plain gradient descent instead of AdamW */
    float lr; /* of this step */
    float clip; /* clip_factor */
    float weight_decay; /* 0 for biases and layer norms */
    float decay_factor; /* 1 - lr weight_decay: what decay leaves of a weight */
    float beta1, beta2; /* the weights of the old m and v in the new ones */
    float one_minus_beta1, one_minus_beta2; /* the weights of the gradient and of its square */
    float correction1, correction2; /* 1 / (1 - beta^t): make up for the start at zero */
    float eps; /* keeps the divisor above 0 */
};

/* optimizer_step_of -- the constants of step number t, from 1, for a tensor with this weight decay.
 * They are computed in double and then rounded: in float, 1 - 0.999 is off in its fifth digit. */
static struct OptimizerStep optimizer_step_of(const struct TrainingArguments *args, double lr,
                                              size_t t, double clip, double weight_decay) {
    return (struct OptimizerStep){
        /* used by both rules */
        .is_sgd = args->optim == OPTIM_SGD,
        .lr = (float)lr,
        .clip = (float)clip,
        .weight_decay = (float)weight_decay,
        /* AdamW: the decay per step, the two running means, and what makes them true means */
        .decay_factor = (float)(1 - lr * weight_decay),
        .beta1 = (float)args->adam_beta1,
        .beta2 = (float)args->adam_beta2,
        .one_minus_beta1 = (float)(1 - args->adam_beta1),
        .one_minus_beta2 = (float)(1 - args->adam_beta2),
        .correction1 = (float)(1 / (1 - pow(args->adam_beta1, (double)t))),
        .correction2 = (float)(1 / (1 - pow(args->adam_beta2, (double)t))),
        .eps = (float)args->adam_epsilon,
    };
}

/* adamw_piece -- one step of AdamW for n weights.                       [8] Algorithm 2
 *   m = beta1 m + (1 - beta1) g             g: the clipped gradient
 *   v = beta2 v + (1 - beta2) g^2
 *   m_hat = m / (1 - beta1^t),   v_hat = v / (1 - beta2^t)              t: the step, from 1
 *   w = w (1 - lr weight_decay) - lr m_hat / (sqrt(v_hat) + eps)
 * Plain gradient descent, w -= lr g, has two weaknesses; each of two running means ("moments")
 * mends one.
 *   m, the running mean of gradients (over about 10 steps with beta1 0.9). The gradient of one
 * batch is noisy. What the batches disagree about cancels in m; what they agree about stays.
 *   v, the running mean of squares (over about 1000 steps with beta2 0.999). One lr cannot suit
 * all weights: the gradient of a layer norm's gain may be a thousand times that of a rare
 * token's embedding. Divided by sqrt(v), each weight is measured against its own usual gradient.
 * So the step is about lr in size where the batches agree (|m_hat| = sqrt(v_hat)), and smaller
 * where they do not, whatever the scale of the loss.
 *   The correction. Both means start at 0, so the first step has m = 0.1 g and v = 0.001 g^2: both
 * are too small, and |m| / sqrt(v) is 3.2 instead of 1. Dividing by 1 - beta^t, the total weight of
 * the gradients seen so far, makes them true means from the first step on.
 *   The decay is decoupled (the W of AdamW): it is outside the fraction, and pulls every weight
 * towards 0 by the same share in each step. Added to the gradient instead, as in Adam with an L2
 * penalty, it would be divided by sqrt(v) too, and the weights with the largest gradients would
 * decay least. With weight_decay 0 this is Adam.
 * in, out  w, m, v (n)       in  d (n), the gradient; it is set to 0 for the next step
 * By hand: w = 2, lr 0.1, decay 0.1, gradients 0.3, then -0.1:
 *   t = 1: m 0.03, v 0.00009; m_hat 0.3, sqrt(v_hat) 0.3; w = 2 * 0.99 - 0.1 = 1.88
 *   t = 2: m 0.017, v 0.00009991; m_hat 0.0895, sqrt(v_hat) 0.2236; w = 1.8612 - 0.0400 = 1.8212
 * The second gradient points the other way, yet the weight keeps falling, only more slowly.
 *                            test: adamw_hand, adamw_golden; gdb: break tensor_step_piece */
WIDE static void adamw_piece(float *w, float *d, float *m, float *v, size_t n,
                             struct OptimizerStep s) {
    for (size_t i = 0; i < n; i++) {
        /* 1. the two moments take in the new gradient */
        float g = d[i] * s.clip;
        m[i] = s.beta1 * m[i] + s.one_minus_beta1 * g;
        v[i] = s.beta2 * v[i] + s.one_minus_beta2 * g * g;

        /* 2. corrected for their start at zero */
        float m_hat = m[i] * s.correction1;
        float v_hat = v[i] * s.correction2;

        /* 3. the weight decays, and moves by its mean gradient over that gradient's usual size */
        float step = s.lr * m_hat / (sqrt_fast(v_hat) + s.eps);
        w[i] = w[i] * s.decay_factor - step;

        /* 4. the next step's micro-batches add up from zero */
        d[i] = 0;
    }
}

/* sgd_piece -- one step of stochastic gradient descent for n weights, as torch.optim.SGD: the plain
 * rule that AdamW refines.       [glossary: Ascensão de gradiente estocástico (SGA)]
 *   w = w - lr (g + weight_decay w)
 * Ascent on an objective is descent on its negative, the loss.
 * By hand: w = 0.755, g = 300, lr 0.001, no decay: 0.455.                      test: adamw_hand */
WIDE static void sgd_piece(float *w, float *d, size_t n, struct OptimizerStep s) {
    for (size_t i = 0; i < n; i++) {
        /* Here the decay is coupled: a part of the gradient, the slope of weight_decay w^2 / 2. */
        w[i] -= s.lr * (d[i] * s.clip + s.weight_decay * w[i]);
        d[i] = 0;
    }
}

/* One step for the piece of a tensor that begins at index `first`. */
static void tensor_step_piece(struct Tensor *tensor, size_t first,
                              const struct OptimizerStep *step) {
    size_t n = MIN(tensor->n - first, (size_t)STEP_PIECE);
    float *w = tensor->w + first;
    float *d = tensor->d + first;
    /* *step is passed by value: the compiler then knows that writing w cannot change the constants,
     * and vectorizes the loop. */
    if (step->is_sgd)
        sgd_piece(w, d, n, *step);
    else
        adamw_piece(w, d, tensor->m + first, tensor->v + first, n, *step);
}

/* One step for every weight of a tensor, the pieces in parallel. */
static void tensor_step(struct Tensor *tensor, const struct OptimizerStep *step) {
    /* no weight's step depends on another's, so the order of the pieces does not matter */
#pragma omp parallel for if (tensor->n > 50000)
    for (size_t first = 0; first < tensor->n; first += STEP_PIECE)
        tensor_step_piece(tensor, first, step);
}

/* optimizer_step -- one step for all weights that train; their gradients are 0 afterwards.
 * in   lr: the learning rate of this step; t: its number, from 1 (for AdamW's correction)
 * Returns the gradient's norm before it was clipped.           test: adamw_hand, adamw_golden */
static double optimizer_step(struct GPT2 *model, const struct TrainingArguments *args, double lr,
                             size_t t) {
    /* 1. The gradient's length. NaN or infinity would spoil every weight, so it ends the run. */
    double norm = gradient_norm(model);
    check_finite(model, "the gradient's norm", norm);

    /* 2. Clip: only the factor is computed here. The next pass over the weights applies it. */
    double clip = clip_factor(norm, args->max_grad_norm);

    /* 3. Step. Matrices decay. Biases and the gains of layer norms do not, as in transformers:
     *    they have a natural size (a gain's is 1), from which a pull to 0 would drive them. */
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *tensor = model->tensors[i];
        if (!tensor->d)
            continue;
        double weight_decay = tensor->ndim == 2 ? args->weight_decay : 0;
        struct OptimizerStep step = optimizer_step_of(args, lr, t, clip, weight_decay);
        tensor_step(tensor, &step);
    }

    /* 4. The activations kept for error messages belong to the old weights: forget them. */
    model->trace.has_acts = false;
    return norm;
}

/* ---- Schedule ------------------------------------------------------------------------------- */

/* schedule_factor -- the share of the learning rate that step number `step` (from 0) of `total`
 * uses.
 *   warm-up     step / warmup_steps: from 0 up to 1. AdamW's means rest on few gradients so far,
 *               and large steps based on so few might lead anywhere.
 *   linear      then down in a straight line to 0 (or to the share lr_end)
 *   cosine      then down along half a cosine: slow at the top, slow again at the bottom
 *   constant    1 from the first step on; constant_with_warmup: 1 after the warm-up
 * The rate falls because large steps approach a minimum fast but jump around it; small ones settle.
 * By hand: 10 steps, warm-up 2: linear 0, 0.5, 1, 0.875; cosine at step 4: a quarter of the way,
 * 0.5 (1 + cos 45 degrees) = 0.8536.                                             test: schedule */
static double schedule_factor(const struct TrainingArguments *args, size_t step, size_t total) {
    enum SchedulerType type = args->lr_scheduler_type;
    if (type == SCHEDULER_CONSTANT)
        return 1;

    /* 1. the warm-up, given in steps or as a share of all steps */
    double warmup =
        args->warmup_steps ? (double)args->warmup_steps : ceil(args->warmup_ratio * (double)total);
    double at = (double)step;
    if (at < warmup)
        return at / MAX(1.0, warmup);
    if (type == SCHEDULER_CONSTANT_WITH_WARMUP)
        return 1;

    /* 2. progress from the end of the warm-up, 0, to the end of the training, 1 */
    double decay_steps = MAX(1.0, (double)total - warmup);
    double progress = MIN(1.0, (at - warmup) / decay_steps);

    /* 3. the way down */
    if (type == SCHEDULER_COSINE)
        return 0.5 * (1 + cos(3.14159265358979323846 * progress));
    return args->lr_end + (1 - args->lr_end) * (1 - progress);
}

/* ---- Log and checkpoint --------------------------------------------------------------------- */

enum { MAX_METRICS = 48 };

/* A named number in the log. While a mean is being formed, value is the sum of n units so far. */
struct Metric {
    const char *name;
    double value;
    size_t n;
};

/* One entry of the log, as in transformers' trainer_state.json. */
struct LogEntry {
    size_t n;
    struct Metric item[MAX_METRICS]; /* sorted by name */
};

/* trainer.state: how far a training has come.                    [glossary: trainer.state] */
struct TrainerState {
    size_t global_step; /* steps done */
    size_t max_steps, steps_per_epoch;
    double num_train_epochs;
    /* over all steps so far */
    size_t num_tokens, samples;
    double total_loss, seconds, epoch;
    struct LogEntry *log_history;
    size_t log_count, log_capacity;
    struct LogEntry metrics; /* sums since the last log entry */
};

/* Checkpoints: all that a run needs to go on as if it had never stopped, in a folder checkpoint-N.
 *   model.safetensors ...   the weights, saved like any model's; for an adapter, its two files
 *   optimizer.safetensors   exp_avg.* and exp_avg_sq.*: m and v of each tensor that trains; and,
 *                           also as tensors, what `saved` lists: random states, positions in the
 *                           data, running means, lengths of the logs that grow
 *   trainer_state.json      which step this is, and the log so far
 * The folder is written as tmp-checkpoint-N, flushed to disk and renamed; before it is deleted, it
 * gets a temporary name again. So a folder called checkpoint-N is complete, even after a power cut.
 *                                                                        test: checkpoint_* */
struct Saved {
    const char *name;
    void *at; /* where the run keeps these numbers, n of them */
    size_t n;
    enum SavedType { SAVED_SIZE, SAVED_DOUBLE, SAVED_WORD, SAVED_FIXED } type;
    uint64_t most; /* of sizes */
    uint64_t value; /* of a fixed one, which is not kept anywhere */
    const char *words; /* its name for a message */
};

struct Checkpoint {
    struct GPT2 *model;
    const struct Tokenizer *tok;
    const struct TrainingArguments *args;
    struct TrainerState *state;
    const char *task, *log_dir; /* log_dir: the folder of PPO's logs */
    struct Output *logs; /* NULL: none */
    size_t log_bytes[LOG_FILES]; /* their lengths at the checkpoint */
    struct Saved saved[24];
    size_t count;
    size_t run; /* how many runs have begun in output_dir, this one included */
};

/* ---- Task and Trainer ----------------------------------------------------------------------- */
/* Which of a Task's items: those to learn from, or those held out. Tasks keep both, in arrays of
 * two that this enum indexes. */
enum Items { TO_LEARN, HELD_OUT };

/* A Task defines what is learnt: a data set of `n` items, and a loss on any of them. An item is a
 * row of tokens, a pair or a rated text; only the Task knows which. */
struct Trainer;
struct Task {
    const char *name;
    size_t n, eval_n;
    void *data;
    /* The loss of the items index[0..count), times `weight`. TO_LEARN: its gradient is added to the
     * model's. HELD_OUT: the loss is reported as a metric, through trainer_metric. */
    double (*loss)(struct Trainer *trainer, const size_t *index, size_t count, double weight,
                   enum Items from);
    /* The functions below may be NULL. */
    /* Reports the metrics that need all held-out items at once. */
    void (*evaluated)(struct Trainer *trainer);
    /* How many target tokens an item has, if a step's loss is a mean over tokens (chapter 15).
     * NULL: it is a mean over micro-batches. */
    size_t (*targets)(struct Trainer *trainer, size_t index);
    /* Prepares the data of an epoch. */
    void (*new_epoch)(struct Trainer *trainer, size_t epoch);
    /* Adds the Task's own state to a checkpoint. */
    void (*saved)(struct Trainer *trainer, struct Checkpoint *checkpoint);
    /* Shows on the terminal what the model writes at this point. */
    void (*sample)(struct Trainer *trainer);
    /* Measures what a loss cannot tell, at each evaluation. */
    void (*measure)(struct Trainer *trainer);
    void *measure_data;
};

struct Trainer {
    struct GPT2 *model;
    const struct Tokenizer *tok;
    struct TrainingArguments args;
    struct TrainerState state;
    struct Task task;
    size_t rows_per_step; /* of a full step: micro-batch size times accumulation */
    struct LogEntry metrics; /* of this micro-batch, or of this evaluation: sums */
    struct Arena arena; /* emptied before every micro-batch */
};

/* ---- Metrics -------------------------------------------------------------------------------- */

/* trainer_metric -- adds the sum of a metric over `units` units: tokens, pairs or texts.
 * The metric of a batch, or of all held-out data, is the sum divided by the units. A mean of the
 * batches' means would be a different number: it would depend on how the units fall into batches,
 * and a small last batch would count as much as a full one.
 * By hand: losses 1, 2 | 6 in two batches: (3 + 6) / (2 + 1) = 3; the mean of the batches' means,
 * 1.5 and 6, would be 3.75.                                              test: metric_units */
static void trainer_metric(struct Trainer *trainer, const char *name, double sum, size_t units) {
    /* a name that is new to the entry starts with a sum of 0 over 0 units */
    struct Metric *metric = log_at(&trainer->metrics, name);
    metric->value += sum;
    metric->n += units;
}

/* trainer_add_means -- a micro-batch is complete: its means join those since the last log entry.
 * Here the plain mean of the micro-batches' means is formed (3.75 above), as in TRL's training
 * log, so that the two logs agree.                                       test: metric_units */
static void trainer_add_means(struct Trainer *trainer) {
    const struct LogEntry *batch = &trainer->metrics;
    for (const struct Metric *m = batch->item; m < batch->item + batch->n; m++) {
        /* the micro-batch's mean counts as one unit of the mean that will be logged */
        struct Metric *metric = log_at(&trainer->state.metrics, m->name);
        metric->value += m->value / (double)MAX((size_t)1, m->n);
        metric->n++;
    }
    trainer->metrics.n = 0;
}

/* The smallest, and below the largest, of all values reported under a name. */
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

/* Sums become means, in a log entry that also says where the training is. For an evaluation, the
 * names get the prefix "eval_". */
static void trainer_means(const struct TrainerState *state, const struct LogEntry *metrics,
                          struct LogEntry *entry, const char *prefix) {
    /* 1. the metrics; 0 units would make NaN, which the log writes as null */
    for (const struct Metric *m = metrics->item; m < metrics->item + metrics->n; m++)
        log_value(entry, *prefix ? log_name(prefix, text_of(m->name)) : m->name,
                  m->value / (double)m->n);
    /* 2. where the training is, so that the entry can be plotted as a point of a curve */
    log_value(entry, "epoch", state->epoch);
    log_value(entry, "step", (double)state->global_step);
}

/* ---- Evaluation ----------------------------------------------------------------------------- */

/* Should the evaluation end early? After Ctrl-C, one that follows the last step does, since the
 * weights have yet to be saved. One between two steps is finished, as a step would be: the
 * checkpoint that is then saved contains its figures. */
static bool evaluation_interrupted(const struct TrainerState *state) {
    return interrupted && state->global_step == state->max_steps;
}

/* trainer_measure -- the loss and the other metrics over the held-out items, each a mean over its
 * units, whatever the batch size; no weight moves.
 * Held-out items were never trained on: what the model does well there, it has understood rather
 * than learnt by heart.                                               test: eval_batch_size */
static struct LogEntry trainer_measure(struct Trainer *trainer) {
    struct TrainerState *state = &trainer->state;
    size_t n = trainer->task.eval_n;
    size_t batch = trainer->args.per_device_eval_batch_size;

    /* 1. the metrics' sums, batch by batch in file order; then those that need all items at once */
    struct Arena order_arena = {0};
    size_t *order = arena_order(&order_arena, n);
    size_t num_tokens = state->num_tokens;
    double begin = seconds_now();
    trainer->metrics.n = 0;
    for (size_t first = 0; first < n && !evaluation_interrupted(state); first += batch) {
        /* weight 1: metrics are summed here and divided at the end */
        arena_reset(&trainer->arena);
        trainer->task.loss(trainer, order + first, MIN(batch, n - first), 1, HELD_OUT);
    }
    if (trainer->task.evaluated && !evaluation_interrupted(state))
        trainer->task.evaluated(trainer);

    /* 2. how fast it went, and the means */
    double seconds = seconds_now() - begin;
    struct LogEntry entry = {0};
    log_value(&entry, "eval_runtime", seconds);
    log_value(&entry, "eval_samples_per_second", (double)n / seconds);
    log_value(&entry, "eval_steps_per_second", ceil((double)n / (double)batch) / seconds);
    trainer_means(state, &trainer->metrics, &entry, "eval_");

    /* 3. The training must not notice: it counts only the tokens that it learnt from. */
    trainer->metrics.n = 0;
    state->num_tokens = num_tokens;
    arena_free(&order_arena);
    return entry;
}

/* An evaluation during training: it is logged and shown. Returns the loss, or NaN if Ctrl-C ended
 * it: a loss on some of the held-out items cannot be compared with one on all of them. */
static double trainer_evaluate(struct Trainer *trainer) {
    struct LogEntry entry = trainer_measure(trainer);
    double loss;
    /* 1. an incomplete one is not logged */
    if (evaluation_interrupted(&trainer->state))
        return NAN;

    /* 2. An entry of its own. Plotted beside the training loss, it shows overfitting: from the
     *    point where the held-out loss rises while the training loss keeps falling. */
    *state_log(&trainer->state) = entry;
    state_say(&trainer->state, trainer->task.name, &entry, true);
    log_find(&entry, "eval_loss", &loss);
    return loss;
}

/* What is due at each eval_steps. */
static void trainer_examine(struct Trainer *trainer) {
    if (trainer->task.eval_n)
        trainer_evaluate(trainer);
    if (trainer->task.measure)
        trainer->task.measure(trainer);
}

/* ---- Training ------------------------------------------------------------------------------- */

/* How many micro-batches hold n rows; the last may be smaller. */
static size_t micro_batches_of(const struct TrainingArguments *args, size_t n) {
    size_t size = args->per_device_train_batch_size;
    return (n + size - 1) / size;
}

/* micro_batch_weight -- the factor of each micro-batch's loss in the step's sum.
 * If a Task counts targets, its loss is a sum over tokens, and the step's loss is the mean: the
 * factor is 1 / the number of targets in the whole step. Dividing each micro-batch by its own
 * number would make a token in a short text count more than one in a long text. Otherwise the loss
 * of a micro-batch is already a mean, and the step's loss is the mean of these.
 * By hand: micro-batches of 3 and 5 targets: 1/8 each; of a Task without targets: 1/2 each.
 *                                                                       test: trainer_steps */
static double micro_batch_weight(struct Trainer *trainer, const size_t *order, size_t n) {
    const struct Task *task = &trainer->task;
    /* 1. losses that are means: 1 / the number of micro-batches */
    if (!task->targets)
        return 1 / (double)MAX((size_t)1, micro_batches_of(&trainer->args, n));
    /* 2. losses that are sums: all targets of the step, known before its first micro-batch runs */
    size_t targets = 0;
    for (size_t i = 0; i < n; i++)
        targets += task->targets(trainer, order[i]);
    return 1 / (double)MAX((size_t)1, targets);
}

/* trainer_accumulate -- the gradient of one step over n rows, micro-batch by micro-batch.
 *                                                  [glossary: Acumulação de gradiente]
 * The activations of a micro-batch are what fills memory. Once its gradient has been added to the
 * sum, the next micro-batch reuses that memory. For a loss that is a mean over tokens, the sum is
 * the gradient of one large batch, except for rounding.
 * in   order (n): which rows of the Task                      out  the gradients; returns the loss
 *                                                                       test: trainer_steps */
static double trainer_accumulate(struct Trainer *trainer, const size_t *order, size_t n) {
    size_t size = trainer->args.per_device_train_batch_size;
    double weight = micro_batch_weight(trainer, order, n);
    double loss = 0;
    /* the gradients are 0 here: the last optimizer step left them so */
    for (size_t first = 0; first < n; first += size) {
        /* 1. forward, loss, backward, in the memory of the micro-batch before */
        arena_reset(&trainer->arena);
        trainer->model->trace.has_acts = false;
        size_t count = MIN(size, n - first);
        loss += trainer->task.loss(trainer, order + first, count, weight, TO_LEARN);

        /* 2. a loss that is NaN or infinite ends the run before it reaches a weight */
        check_finite(trainer->model, "the loss", loss);
        trainer_add_means(trainer);
    }
    return loss;
}

/* After a step: a log entry if one is due, a progress line and, on a terminal, now and then a
 * sample. */
static void trainer_log(struct Trainer *trainer, double norm, double lr) {
    struct TrainerState *state = &trainer->state;
    const struct TrainingArguments *args = &trainer->args;

    /* 1. the entry: means over the steps since the last one */
    struct LogEntry entry = {2, {{"grad_norm", norm, 0}, {"learning_rate", lr, 0}}};
    if (state->num_tokens)
        log_value(&entry, "num_tokens", (double)state->num_tokens);
    trainer_means(state, &state->metrics, &entry, "");

    /* 2. what a person sees: a terminal's line is redrawn at each step, plain lines are rarer */
    if (trainer->task.sample && progress_sampling(state->global_step, state->max_steps))
        trainer->task.sample(trainer);
    bool is_due = state->global_step % args->logging_steps == 0;
    bool says_line = !args->say_steps || state->global_step % args->say_steps == 0;
    state_say(state, trainer->task.name, &entry, is_due && says_line);

    /* 3. what the log keeps; the means start over */
    if (!is_due)
        return;
    *state_log(state) = entry;
    state->metrics.n = 0;
}

/* The order of an epoch's n rows. It depends on the seed and the epoch alone: a resumed run
 * shuffles exactly as the interrupted one would have. */
static size_t *epoch_order(const struct TrainingArguments *args, struct Arena *arena, size_t n,
                           size_t epoch, enum RngStream stream) {
    size_t *order = arena_order(arena, n);
    /* Unshuffled, a sorted file (all good reviews, then all bad ones) would show each step only one
     * kind, and the model would remember best what it saw last. */
    struct Rng rng = rng_seed(args->seed + epoch, stream);
    if (args->train_sampling_strategy == SAMPLING_RANDOM)
        rng_shuffle(&rng, order, n);
    return order;
}

/* trainer_plan -- how many steps, of how many rows.
 *   steps of an epoch = ceil(rows / rows of a step): the last step takes what is left
 *   max_steps         = num_train_epochs times that, unless it is given
 * By hand: 11 rows, micro-batches of 2, accumulation 2, 2 epochs: ceil(11 / 4) = 3 steps per
 * epoch, 6 steps.                                                       test: trainer_steps */
static void trainer_plan(struct Trainer *trainer) {
    const struct TrainingArguments *args = &trainer->args;
    struct TrainerState *state = &trainer->state;
    size_t n = trainer->task.n;
    CHECK(n > 0, "%s: nothing to train on", trainer->task.name);

    /* 1. rows of a step, steps of an epoch (rounded up) */
    trainer->rows_per_step = args->per_device_train_batch_size * args->gradient_accumulation_steps;
    state->steps_per_epoch = (n + trainer->rows_per_step - 1) / trainer->rows_per_step;

    /* 2. the length of the training, which the schedule must know from its first step on */
    state->max_steps = args->max_steps;
    if (!args->max_steps)
        state->max_steps = (size_t)ceil(args->num_train_epochs * (double)state->steps_per_epoch);
}

/* trainer_begin -- all that comes before the first step. Returns what its checkpoints contain. */
static struct Checkpoint trainer_begin(struct Trainer *trainer) {
    struct TrainerState *state = &trainer->state;

    /* 1. how many steps; memory for gradients, m and v */
    trainer_plan(trainer);
    gpt2_make_trainable(trainer->model);

    /* 2. What a checkpoint of this training contains. The number of rows must be the same when the
     *    run is resumed: otherwise "step 300" would be a different place in the data. */
    struct Checkpoint checkpoint =
        checkpoint_new(trainer->task.name, trainer->model, trainer->tok, &trainer->args, state);
    checkpoint_add_fixed(&checkpoint, "rows", trainer->task.n, "the number of rows to train on");
    checkpoint_add_fixed(&checkpoint, "rows_per_step", trainer->rows_per_step,
                         "the number of rows in a step "
                         "(--per_device_train_batch_size times --gradient_accumulation_steps)");
    if (trainer->task.saved)
        trainer->task.saved(trainer, &checkpoint);

    /* 3. If the run is resumed: weights, m, v and log as they were then. A checkpoint from beyond
     *    max_steps raises max_steps to its own step, and nothing is left to do. */
    checkpoint_resume(&checkpoint);
    state->num_train_epochs = ceil((double)state->max_steps / (double)state->steps_per_epoch);
    return checkpoint;
}

/* trainer_advance -- records a finished step on `rows` rows in the state and the log.
 * The fraction of an epoch is counted in micro-batches, as in transformers.
 * By hand: 5 rows, micro-batches of 1, accumulation 4: a step on 4 rows, then one on the last row:
 * epoch is 0.8, then 1.                                                 test: trainer_epoch */
static void trainer_advance(struct Trainer *trainer, size_t epoch, size_t step, size_t rows,
                            double loss) {
    struct TrainerState *state = &trainer->state;
    /* 1. the position in the data: epochs, and the share of this one's micro-batches */
    size_t all = micro_batches_of(&trainer->args, trainer->task.n);
    size_t done = MIN((step + 1) * trainer->args.gradient_accumulation_steps, all);
    state->epoch = (double)epoch + (double)done / (double)all;

    /* 2. sums over the whole training, for its last log entry */
    state->total_loss += loss;
    state->samples += rows;

    /* 3. the step's loss, as one unit of the mean since the last entry */
    trainer_metric(trainer, "loss", loss, 1);
    trainer_add_means(trainer);
}

/* The last entry of the log: the training as a whole, in transformers' names. */
static void trainer_log_end(struct TrainerState *state) {
    double steps = (double)state->max_steps;
    /* of all runs that led here, if the training was resumed */
    double seconds = state->seconds;
    struct LogEntry *entry = state_log(state);
    log_value(entry, "epoch", state->epoch);
    log_value(entry, "step", (double)state->global_step);
    /* transformers' estimate of operations: the name is kept for programs that look for it */
    log_value(entry, "total_flos", 0);
    log_value(entry, "train_loss", state->total_loss / MAX(1, steps));
    log_value(entry, "train_runtime", seconds);
    log_value(entry, "train_samples_per_second", (double)state->samples / seconds);
    log_value(entry, "train_steps_per_second", steps / seconds);
}

/* trainer_train -- the whole training.                          [glossary: Trainer.train()]
 * in   trainer: model, arguments, Task             out  the model's weights; trainer->state's log
 *                                test: trainer_steps, adamw_golden; gdb: break trainer_advance */
static void trainer_train(struct Trainer *trainer) {
    const struct TrainingArguments *args = &trainer->args;
    struct TrainerState *state = &trainer->state;
    struct Arena order_arena = {0};

    /* 1. how many steps, and from where */
    struct Checkpoint checkpoint = trainer_begin(trainer);
    double begin = seconds_now() - state->seconds;

    /* 2. Epochs: each takes every row once, in an order of its own. A resumed run may begin in the
     *    middle of one. */
    size_t epoch = state->global_step / state->steps_per_epoch;
    for (; state->global_step < state->max_steps; epoch++) {
        arena_reset(&order_arena);
        size_t *order = epoch_order(args, &order_arena, trainer->task.n, epoch, STREAM_ORDER);
        if (trainer->task.new_epoch)
            trainer->task.new_epoch(trainer, epoch);

        size_t step = state->global_step % state->steps_per_epoch;
        for (; step < state->steps_per_epoch && state->global_step < state->max_steps; step++) {
            /* 3. accumulate the step's rows, forward and backward; `trace` is for error messages */
            size_t first = step * trainer->rows_per_step;
            size_t rows = MIN(trainer->rows_per_step, trainer->task.n - first);
            trainer->model->trace.task = trainer->task.name;
            trainer->model->trace.step = state->global_step + 1;
            double loss = trainer_accumulate(trainer, order + first, rows);

            /* 4. clip, and step at the scheduled learning rate */
            double share = schedule_factor(args, state->global_step, state->max_steps);
            double lr = args->learning_rate * share;
            double norm = optimizer_step(trainer->model, args, lr, ++state->global_step);

            /* 5. log */
            trainer_advance(trainer, epoch, step, rows, loss);
            trainer_log(trainer, norm, lr);

            /* 6. evaluate on held-out items */
            if (args->eval_steps && state->global_step % args->eval_steps == 0)
                trainer_examine(trainer);

            /* 7. save; after Ctrl-C the program ends here */
            state->seconds = seconds_now() - begin;
            checkpoint_step(&checkpoint);
        }
    }
    arena_free(&order_arena);
    trainer_log_end(state);
}

static void trainer_free(struct Trainer *trainer) {
    arena_free(&trainer->arena);
    free(trainer->state.log_history);
}

/* =============================================================================================
 * Chapter 15 - Language model: pretraining, SFT
 *
 * How does a model learn to write? From what people wrote. One loss serves both stages, the
 * cross-entropy of the next token, a mean over the tokens that count [1]:
 *
 *     loss = mean of -log pi(x_t+1 | x_1 ... x_t)                [glossary: Função de custo]
 *
 * Pretraining reads running text, and every token counts: the model learns the language. Supervised
 * fine-tuning (SFT) reads examples of a prompt and its completion, and only the completion counts:
 * the model learns to answer, not to ask.                        [glossary: Ajuste fino]
 *
 *     prompt + completion   "The film is"   " a"  " joy"  end
 *     counts in SFT              no          yes   yes    yes
 *
 *     a new model     8.66 nats per token  (an even guess among 4097 tokens: ln 4097 = 8.32)
 *     trained         4.51 nats per token  perplexity e^4.51 = 91: as unsure as among 91 tokens
 *                                                                 [glossary: Perplexidade]
 *
 * What enters: texts, or prompts with completions. What leaves: a language model, which is the
 * reference and the starting point of all that follows.
 * ============================================================================================= */

/* Shows a sample on a terminal: the prompt, a bar, what the model wrote. */
static void sample_show(const struct Tokenizer *tok, const struct Example *e, size_t V,
                        const char *score) {
    struct Arena arena = {0};
    /* 1. decoded in two parts, so that the bar is exactly where the model took over */
    const int *answer_ids = e->ids + e->prompt_length;
    struct Text prompt = tokenizer_decode_all(tok, &arena, e->ids, e->prompt_length, V);
    struct Text answer = tokenizer_decode_all(tok, &arena, answer_ids, e->n - e->prompt_length, V);
    char *line = arena_printf(&arena, "    %s%.*s |%.*s", score, (int)prompt.length, prompt.data,
                              (int)answer.length, answer.data);
    /* 2. One line. A model may write anything: cut_text removes the control bytes, which could
     *    clear the terminal or move its cursor. */
    say("%s\n", cut_text(line, terminal_columns()));
    arena_free(&arena);
}

/* The data of a language model's Task. */
struct LanguageTask {
    struct Example *examples[2]; /* to learn from, held out: see enum Items */
    /* pretraining: the whole texts, which each epoch cuts into other examples */
    struct Example *texts;
    size_t text_count, row_length;
    bool whole_texts; /* see pretrain_pack */
    struct Arena rows; /* this epoch's packed rows */
};

/* The batch of some of the task's items. */
static struct Batch language_batch(struct Trainer *trainer, const size_t *index, size_t count,
                                   enum Items from) {
    const struct LanguageTask *task = trainer->task.data;
    struct Example *examples = arena_alloc(&trainer->arena, count, sizeof *examples);
    /* 1. the items side by side; pointers and lengths are copied, the ids stay where they are */
    for (size_t i = 0; i < count; i++)
        examples[i] = task->examples[from][index[i]];
    /* 2. packed; the last token of a row predicts nothing, so the model need not read it */
    return collate(&trainer->arena, examples, count, SKIP_LAST);
}

/* What is logged besides the loss, as means over the R predicted tokens: how undecided the model is
 * (entropy, nats), and how often its first choice was the token that came. */
static void language_metrics(struct Trainer *trainer, const struct Batch *batch,
                             const struct LMHead *head) {
    trainer->state.num_tokens += batch->tokens;
    /* sums over the R predicted tokens, whose number differs from one micro-batch to the next */
    trainer_metric(trainer, "entropy", row_sum(head->entropy, batch->R), batch->R);
    trainer_metric(trainer, "mean_token_accuracy", row_sum(head->hit, batch->R), batch->R);
}

/* language_loss -- the cross-entropy of a micro-batch: the Task's loss of pretraining and SFT.
 *                                                          [glossary: Função de custo]
 *   loss = weight * sum_r -log pi(target_r | all before it)              [1] Section 2
 * in   index (count): which items; weight: 1 / the step's targets, so that the micro-batches add up
 *      to a mean over the tokens of the step
 * Each summand is the negative log-likelihood of a token that a person wrote: 0 if the model was
 * certain of it, unbounded if it thought it impossible. Lowering the sum raises the probability of
 * the text as a whole, which is the product of its tokens' probabilities.
 * The derivative by the logits is softmax - 1 at the target and softmax elsewhere, times the
 * weight: lm_head_cross_entropy (chapter 11).
 * By hand: a model whose weights are all 0 finds 37 tokens equally probable: each target costs
 * ln 37 = 3.6109; two of them with weight 1/2: 3.6109.
 *                                test: language_hand, language_overfit, eval_batch_size */
static double language_loss(struct Trainer *trainer, const size_t *index, size_t count,
                            double weight, enum Items from) {
    struct GPT2 *model = trainer->model;
    struct Arena *arena = &trainer->arena;
    bool learns = from == TO_LEARN;

    /* 1. Forward, up to the hidden states from which the targets are predicted: row r of the head
     *    is at the token before target r. */
    struct Batch batch = language_batch(trainer, index, count, from);
    struct Activations acts = gpt2_forward(model, arena, &batch, learns);
    struct LMHead head = lm_head_new(model, arena, &acts, batch.row, batch.target, batch.R, 1);

    /* 2. The output layer. In training its backward pass runs with it: all logits (R,V) would be
     *    the largest tensor of all, so they are computed in chunks, used at once and not kept. */
    if (learns) {
        float *dhidden = arena_zeros(arena, batch.N * model->config.n_embd, sizeof *dhidden);
        lm_head_cross_entropy(model, &head, (float)weight, dhidden, arena);
        gpt2_backward(model, arena, &acts, dhidden);
    } else {
        lm_head_forward(model, &head);
    }

    /* 3. what is reported; the loss of held-out items is a metric like the others */
    language_metrics(trainer, &batch, &head);
    double negative_log_likelihood = -sequence_logprob(head.logprob, batch.R);
    if (!learns)
        trainer_metric(trainer, "loss", negative_log_likelihood, batch.R);
    return negative_log_likelihood * weight;
}

/* language_targets -- how many labels of an item are not ignored: the Trainer divides a step's loss
 * by their number.
 * As in transformers, the first token of a text without a prompt is counted although nothing
 * predicts it, which makes the loss a little smaller than the mean. Packed rows have a prompt of
 * one token, so theirs is a true mean.
 * By hand: a text of 3 tokens: 3; prompt of 3, completion of 2: 2.     test: language_sft_rows */
static size_t language_targets(struct Trainer *trainer, size_t index) {
    const struct LanguageTask *task = trainer->task.data;
    const struct Example *e = &task->examples[TO_LEARN][index];
    /* n counts the prompt too, whose labels are ignored */
    return e->n - e->prompt_length;
}

/* ---- Pretraining: running text in rows of equal length -------------------------------------- */

/* Some texts, in the order in which they are joined. */
struct TextOrder {
    const struct Example *texts;
    const size_t *order;
    size_t count;
};

/* All ids of the texts, one text after another; `total` is their number. */
static int *texts_join(struct Arena *arena, const struct TextOrder *texts, size_t *total) {
    /* 1. room for all */
    *total = 0;
    for (size_t i = 0; i < texts->count; i++)
        *total += texts->texts[i].n;
    int *stream = arena_alloc(arena, *total, sizeof *stream);

    /* 2. One text after another. Each ends in an end token, from which the model learns that what
     *    follows has nothing to do with what came before. */
    size_t at = 0;
    for (size_t i = 0; i < texts->count; i++) {
        const struct Example *text = &texts->texts[texts->order[i]];
        memcpy(stream + at, text->ids, text->n * sizeof *stream);
        at += text->n;
    }
    return stream;
}

/* A text in the stream: its index in the order, and where it starts. */
struct TextPlace {
    size_t text, start;
};

/* whole_text_start -- where a row starts that is due at `next`, if texts are to be kept whole.
 * in, out  place: a text that starts at or before `next`; on return, the text that contains `next`
 * Returns that text's start, if a row of `room` tokens can hold the text and the previous row,
 * which starts at `last`, starts earlier. Otherwise `next`, in the middle of the text.
 *                                                            test: language_pack */
static size_t whole_text_start(const struct TextOrder *texts, struct TextPlace *place, size_t last,
                               size_t next, size_t room) {
    /* 1. On to the text that contains `next`. Rows only move forward, so place does too. */
    size_t n = texts->texts[texts->order[place->text]].n;
    while (place->start + n <= next && place->text + 1 < texts->count) {
        place->start += n;
        n = texts->texts[texts->order[++place->text]].n;
    }

    /* 2. Back to its start. Without moves_on, all further rows would start there too. */
    bool fits = n <= room;
    bool moves_on = place->start > last;
    return fits && moves_on ? place->start : next;
}

/* pretrain_pack -- texts joined by end tokens, cut into `count` rows that predict row_length
 * tokens each. Every forward pass then has the same size and no padding.
 * A row has row_length + 1 tokens, and the next row starts with its last one, so every token but
 * the first is predicted once. What does not fill a row at the end is dropped.
 * With whole_texts, a row that would start inside a text starts where that text does, if a row can
 * hold the text: the model then sees texts begin at position 0, as prompts do. Some tokens count
 * twice as a result, and the last texts have to wait for another epoch.
 * By hand: texts of 3, 4 and 3 tokens, row_length 4: (10 - 1) / 4 = 2 rows, which start at 0 and 4;
 * with whole_texts at 0 and 3, where the second text starts.             test: language_pack */
static struct Example *pretrain_pack(struct Arena *arena, const struct TextOrder *texts,
                                     size_t row_length, bool whole_texts, size_t *count) {
    /* 1. one stream of ids, and how many rows it fills */
    size_t total;
    int *stream = texts_join(arena, texts, &total);
    *count = total ? (total - 1) / row_length : 0;

    /* 2. The rows point into the stream. The first token of each counts as its prompt: it was the
     *    last target of the row before. */
    struct Example *rows = arena_alloc(arena, *count, sizeof *rows);
    struct TextPlace place = {0};
    size_t at = 0;
    for (size_t i = 0; i < *count; i++) {
        rows[i] = (struct Example){.ids = stream + at, .n = row_length + 1, .prompt_length = 1};
        size_t next = at + row_length;
        at = whole_texts ? whole_text_start(texts, &place, at, next, row_length + 1) : next;
    }
    return rows;
}

/* Each epoch joins the texts in a new order. The rows are then cut in other places and seldom come
 * twice: there is less to learn by heart. */
static void pretrain_new_epoch(struct Trainer *trainer, size_t epoch) {
    struct LanguageTask *task = trainer->task.data;
    /* 1. Drop the last epoch's rows, and draw an order for the texts. The Trainer will shuffle the
     *    rows as well, with random numbers from another stream. */
    arena_reset(&task->rows);
    size_t *order = epoch_order(&trainer->args, &task->rows, task->text_count, epoch, STREAM_SPLIT);
    struct TextOrder texts = {task->texts, order, task->text_count};

    /* 2. The number of rows depends only on that of tokens, so it is the same in each epoch. */
    task->examples[TO_LEARN] =
        pretrain_pack(&task->rows, &texts, task->row_length, task->whole_texts, &trainer->task.n);
}

/* Shows how the model, as trained so far, continues the first words of the first text. */
static void language_sample(struct Trainer *trainer) {
    const struct LanguageTask *task = trainer->task.data;
    const struct Example *text = task->texts;
    /* 1. about a line of text, sampled a little on the safe side */
    struct GenerationConfig sampling = generation_config();
    sampling.do_sample = true;
    sampling.max_new_tokens = 28;
    sampling.temperature = 0.7;
    sampling.top_k = 0;
    struct Example prompt = {.ids = text->ids, .n = text->n > 3 ? 3 : 1};

    /* 2. The same prompt and the same random numbers each time: only the model changes. They come
     *    from a generator of their own, so a run that is watched trains like one that is not. */
    struct Rng rng = rng_seed(trainer->args.seed, STREAM_SAMPLE);
    struct Example *answer =
        sample_answers(trainer->model, &trainer->arena, &prompt, 1, 1, &sampling, &rng);
    sample_show(trainer->tok, answer, trainer->model->config.vocab_size, "");
}

/* pretrain_task -- makes pretraining the trainer's Task, on texts that each end in an end token. */
static struct LanguageTask *pretrain_task(struct Trainer *trainer, struct Arena *arena,
                                          struct Example *texts, size_t text_count,
                                          struct Example *eval_texts, size_t eval_count) {
    struct LanguageTask *task = arena_zeros(arena, 1, sizeof *task);
    size_t length = trainer->args.max_length;

    /* 1. what is trained, and how */
    *task = (struct LanguageTask){.texts = texts, .text_count = text_count, .row_length = length};
    trainer->task = (struct Task){
        .name = "pretrain",
        .data = task,
        .loss = language_loss,
        .targets = language_targets,
        .new_epoch = pretrain_new_epoch,
        .sample = language_sample,
    };

    /* 2. The first epoch's rows are packed now: the Trainer plans its steps from their number. */
    pretrain_new_epoch(trainer, 0);
    CHECK(trainer->task.n > 0,
          "pretrain: the texts have too few tokens, a row needs %zu; use more text or a smaller "
          "--max_length",
          length + 1);

    /* 3. the held-out rows: always the same, each token once, so that losses can be compared */
    struct TextOrder held_out = {eval_texts, arena_order(arena, eval_count), eval_count};
    task->examples[HELD_OUT] =
        pretrain_pack(arena, &held_out, length, false, &trainer->task.eval_n);
    return task;
}

/* ---- SFT: examples of what to write --------------------------------------------------------- */

/* A row of the data set as TRL prepares it, followed by the end token: the model has to learn where
 * an answer ends, or it will never stop. */
static struct Example sft_example(const struct Trainer *trainer, struct Arena *arena,
                                  const struct Dataset *data, const struct Row *row) {
    size_t V = trainer->model->config.vocab_size;
    const int *end_token = &trainer->model->config.eos_token_id;
    /* a text without a prompt: all of it counts */
    if (data->shape == SHAPE_TEXT)
        return example_encode(arena, trainer->tok, row->text, V, end_token);
    /* encoded as one text, as the model will see it; only the completion's ids count */
    return example_prompt_completion(arena, trainer->tok, row->prompt, row->completion, V,
                                     end_token);
}

/* sft_examples -- the rows of a data set as examples; n: how many are left.
 * As in TRL, a row keeps its first max_length ids. If its prompt alone fills them, no target is
 * left, and the row is dropped.                                        test: language_sft_rows */
static struct Example *sft_examples(struct Trainer *trainer, struct Arena *arena,
                                    const struct Dataset *data, size_t *n) {
    struct Example *examples = arena_alloc(arena, data->n, sizeof *examples);
    size_t max_length = trainer->args.max_length;
    size_t count = 0;
    size_t cut = 0;
    for (size_t i = 0; i < data->n; i++) {
        /* 1. The row as ids, the first max_length of them. It is the answer's end that is cut off:
         *    an answer without its question would teach nothing. */
        struct Example e = sft_example(trainer, arena, data, &data->rows[i]);
        cut += e.n > max_length;
        e.n = MIN(e.n, max_length);

        /* 2. Does a token that counts remain? The very first is never predicted, prompt or not. */
        if (e.n > MAX((size_t)1, e.prompt_length))
            examples[count++] = e;
    }

    /* 3. A cut answer has lost its end token: the model is not taught to stop there. */
    note_rows(data, cut, "rows", "were cut to their first %zu tokens (--max_length)", max_length);
    CHECK(count > 0, "%s: no row has a token to learn from", data->path);
    note_rows(data, data->n - count, "rows", "have no token to learn from and are left out");
    *n = count;
    return examples;
}

/* sft_task -- makes SFT the trainer's Task, on texts or on prompts with completions. */
static struct LanguageTask *sft_task(struct Trainer *trainer, struct Arena *arena,
                                     const struct Dataset *data, const struct Dataset *eval) {
    struct LanguageTask *task = arena_zeros(arena, 1, sizeof *task);
    trainer->task = (struct Task){
        .name = "sft",
        .data = task,
        .loss = language_loss,
        .targets = language_targets,
    };
    /* Unlike in pretraining, nothing is joined or cut into rows of one length: each example keeps
     * its own beginning, and no answer is torn in two. */
    task->examples[TO_LEARN] = sft_examples(trainer, arena, data, &trainer->task.n);
    if (eval)
        task->examples[HELD_OUT] = sft_examples(trainer, arena, eval, &trainer->task.eval_n);
    return task;
}

/* =============================================================================================
 * Chapter 16 - Reward model                        [glossary: Função de recompensa]
 *
 * How does a network learn what people prefer? It is a language model with one number in place of
 * its V logits, read at each text's last token, which has seen the whole text. Chapter 3's losses
 * judge that number. Three kinds of data can teach it:
 *
 *     pairs      "a joy" was preferred to "a mess"      bradley_terry_loss on the two rewards
 *     ratings    8 and 3 out of 10                      compared within a batch: a pair
 *     labels     liked, disliked                        sentiment_loss on each reward
 *
 *     loss at the start    ln 2 = 0.693: a guess            accuracy 0.5
 *     trained              0.81 of held-out pairs ordered as people did
 *
 * A language model is the place to start: it already knows what the words mean, and has only to
 * learn what people like.
 *
 * What enters: texts that people compared, rated or labelled. What leaves: a reward model, and
 * rewards of new texts in the form of the course's sentiment pipeline.
 * ============================================================================================= */

/* The data of a reward model's Task; arrays of two are indexed by enum Items. */
struct RewardTask {
    struct Example *texts[2]; /* pairs: 2i chosen, 2i + 1 rejected; otherwise one per item */
    double *number[2]; /* an item's margin, rating or label */
    bool rated, labelled; /* neither: pairs */
    double center; /* TRL's center_rewards_coefficient, see bradley_terry_pair */
    double min_difference; /* ratings closer than this make no pair */
    float *eval_reward; /* rated: the reward of each held-out text */
    double prefix_share; /* the share of texts that reward_cut cuts to a random beginning */
    struct Rng cut;
};

/* ---- Metrics -------------------------------------------------------------------------------- */

/* reward_pair_metrics -- how well rewards order n pairs: in what share of them the chosen text wins
 * (accuracy; a tie is no win), and by how much on average (margin).
 * By hand: rewards 2, 0.5, 0.5; text 0 preferred to text 1, and 1 to 2: accuracy 1 / 2, margin
 * (1.5 + 0) / 2 = 0.75.                                                 test: reward_metrics */
static void reward_pair_metrics(struct Trainer *trainer, const float *reward,
                                const struct Pair *pairs, size_t n) {
    double right = 0;
    double margin = 0;
    /* order is all that pairs can teach: a reward by itself means nothing */
    for (size_t i = 0; i < n; i++) {
        /* the pair's own margin is left out: it is a demand of the loss, not part of the order */
        double difference = (double)reward[pairs[i].chosen] - reward[pairs[i].rejected];
        right += difference > 0;
        margin += difference;
    }
    trainer_metric(trainer, "accuracy", right, n);
    trainer_metric(trainer, "margin", margin, n);
}

/* For labelled texts: the share whose reward has the sign of the label.
 * By hand: rewards 2 (liked), -1 (liked), -3 (disliked): 2 of 3.         test: reward_metrics */
static void reward_label_metrics(struct Trainer *trainer, const float *reward, const double *label,
                                 size_t n) {
    double right = 0;
    /* a reward above 0 is a probability above 1/2: sigmoid(0) = 0.5 */
    for (size_t i = 0; i < n; i++)
        right += label[i] > 0 ? reward[i] > 0 : reward[i] < 0;
    trainer_metric(trainer, "accuracy", right, n);
}

/* The rewards themselves, for all kinds of data: with pairs, nothing but `center` keeps them from
 * drifting, and these numbers show whether they do. */
static void reward_text_metrics(struct Trainer *trainer, const float *reward, size_t texts) {
    for (size_t t = 0; t < texts; t++) {
        /* one unit each: the mean is over texts, whatever the batches */
        trainer_metric(trainer, "mean_reward", reward[t], 1);
        trainer_least(trainer, "min_reward", reward[t]);
        trainer_largest(trainer, "max_reward", reward[t]);
    }
}

/* reward_rated_evaluated -- loss and order of every pair of held-out rated texts.
 * In training, ratings are compared within a micro-batch. Here every text is compared with every
 * other, whichever batches they were read in: otherwise another batch size would mean other pairs,
 * and the losses could not be compared.                               test: eval_batch_size */
static void reward_rated_evaluated(struct Trainer *trainer) {
    const struct RewardTask *task = trainer->task.data;
    const float *reward = task->eval_reward;
    size_t n = trainer->task.eval_n;
    struct Pair *pairs = arena_alloc(&trainer->arena, n, sizeof *pairs);
    float *dreward = arena_floats(&trainer->arena, n); /* not used: nothing trains here */
    for (size_t i = 0; i < n; i++) {
        /* 1. One text against those after it. All pairs at once would take n^2 memory. */
        size_t count = pairs_of_rating(task->number[HELD_OUT], i, n, task->min_difference, pairs);
        if (count == 0)
            continue;

        /* 2. bradley_terry_loss is a mean over this text's pairs. Their sum is reported, so that
         *    each pair counts the same in the mean over all. */
        double loss = bradley_terry_loss(reward, n, pairs, count, task->center, dreward);
        trainer_metric(trainer, "loss", loss * (double)count, count);
        reward_pair_metrics(trainer, reward, pairs, count);
    }
}

/* ---- Rewards of texts, and the way back ----------------------------------------------------- */

/* A forward pass of the reward model over some texts. */
struct RewardPass {
    struct Activations acts;
    size_t texts;
    int *row; /* (texts) where the reward of each is read */
    float *reward; /* (texts) */
};

/* reward_forward -- the rewards of some texts.
 *   reward = w . h    h (C): the hidden state at the text's last token (reward_row), w: the head
 * A token sees only itself and what comes before it, so only the last one has seen the whole text.
 * It must be read, unlike in a language model: READ_LAST. `keep`: a backward pass will follow.
 *                                                   test: reward_golden, reward_rows */
static struct RewardPass reward_forward(const struct GPT2 *model, struct Arena *arena,
                                        const struct Example *texts, size_t n, bool keep) {
    /* 1. the texts, packed, through the model */
    struct Batch batch = collate(arena, texts, n, READ_LAST);
    struct RewardPass pass = {.texts = n, .acts = gpt2_forward(model, arena, &batch, keep)};

    /* 2. Where each text's last token is, padding not counted, and the reward there. The head has
     *    no bias, which would only add the same number to all rewards. */
    pass.row = arena_alloc(arena, n, sizeof *pass.row);
    pass.reward = arena_floats(arena, n);
    reward_rows(&batch, model->config.pad_token_id, pass.row);
    scalar_head_forward(pass.reward, pass.acts.ln_f, pass.row, n, &model->score, NULL);
    return pass;
}

/* reward_backward -- from d loss / d reward to the gradient of every weight.
 * in   dreward (texts), which is multiplied by `weight`      out  the model's gradients
 * Of the N hidden states only those at which a reward was read have a slope: the rest start at 0,
 * and attention carries the slope back to the earlier tokens.           test: reward_gradient */
static void reward_backward(struct GPT2 *model, struct Arena *arena, const struct RewardPass *pass,
                            float *dreward, double weight) {
    /* 1. the micro-batch's share of the step, before the slopes reach any gradient */
    for (size_t t = 0; t < pass->texts; t++)
        dreward[t] *= (float)weight;

    /* 2. through the head: its own gradient, and that of the hidden states it read */
    float *dhidden = arena_zeros(arena, pass->acts.batch.N * model->config.n_embd, sizeof *dhidden);
    scalar_head_backward(dhidden, dreward, pass->acts.ln_f, pass->row, pass->texts, &model->score,
                         NULL);

    /* 3. through the transformer, as from any other head */
    gpt2_backward(model, arena, &pass->acts, dhidden);
}

/* ---- The loss of a micro-batch -------------------------------------------------------------- */

/* The texts of a micro-batch, and how they are to be compared. */
struct RewardBatch {
    struct Example *examples; /* (texts); of pairs: all chosen ones, then all rejected ones */
    size_t texts;
    double *number; /* (count) of each item: margin, rating or label */
    struct Pair *pairs; /* (pair_count) indices into examples; unused for labelled texts */
    size_t pair_count; /* for labelled texts, the number of texts */
};

/* Cuts some texts to a random beginning of 8 tokens or more. In PPO this model will judge answers
 * that a token limit has cut off; one that had only ever seen whole texts would judge them by their
 * missing end. */
static void reward_cut(struct RewardTask *task, struct Example *text) {
    /* 1. only if the task wants it, and never a text that is short already */
    if (task->prefix_share <= 0 || text->n <= 10)
        return;
    /* 2. this one? then any length from 8 to n - 1 is equally likely */
    if (rng_uniform(&task->cut) < task->prefix_share)
        text->n = 8 + rng_below(&task->cut, text->n - 8);
}

/* Pairs as the data has them: all chosen texts, then all rejected ones, so that item i compares
 * text i with text count + i. Its number is the margin. */
static struct RewardBatch reward_batch_of_pairs(struct Trainer *trainer, const size_t *index,
                                                size_t count, enum Items from) {
    const struct RewardTask *task = trainer->task.data;
    struct Arena *arena = &trainer->arena;
    struct RewardBatch items = {
        .texts = 2 * count,
        .pair_count = count,
        .examples = arena_alloc(arena, 2 * count, sizeof *items.examples),
        .number = arena_alloc(arena, count, sizeof *items.number),
        .pairs = arena_alloc(arena, count, sizeof *items.pairs),
    };
    /* Whole texts, never cut as rated ones may be: the cut could fall before the place where the
     * two answers begin to differ. */
    for (size_t i = 0; i < count; i++) {
        /* the two sides of an item are neighbours in the task's list */
        items.examples[i] = task->texts[from][2 * index[i]];
        items.examples[count + i] = task->texts[from][2 * index[i] + 1];
        items.number[i] = task->number[from][index[i]];
        items.pairs[i] = (struct Pair){i, count + i, items.number[i]};
    }
    return items;
}

/* Single texts, rated or labelled. To learn from ratings, each text is compared with every other: 8
 * texts give up to 28 comparisons for the price of 8 forward passes. Held-out ratings are compared
 * by reward_rated_evaluated, once all rewards are known. */
static struct RewardBatch reward_batch_of_texts(struct Trainer *trainer, const size_t *index,
                                                size_t count, enum Items from) {
    struct RewardTask *task = trainer->task.data;
    struct Arena *arena = &trainer->arena;
    struct RewardBatch items = {
        .texts = count,
        .pair_count = count,
        .examples = arena_alloc(arena, count, sizeof *items.examples),
        .number = arena_alloc(arena, count, sizeof *items.number),
    };

    /* 1. each text with its rating or label; held-out texts are never cut, so that their figures
     *    do not depend on chance */
    for (size_t i = 0; i < count; i++) {
        items.examples[i] = task->texts[from][index[i]];
        items.number[i] = task->number[from][index[i]];
        if (from == TO_LEARN)
            reward_cut(task, &items.examples[i]);
    }

    /* 2. Ratings become pairs, except those closer than min_difference: raters are not that exact.
     *    There is room for more pairs than count texts can make. */
    if (task->rated && from == TO_LEARN) {
        items.pairs = arena_alloc(arena, count * count, sizeof *items.pairs);
        items.pair_count =
            pairs_from_ratings(items.number, count, task->min_difference, items.pairs);
    }
    return items;
}

/* The loss of a micro-batch by its rewards, with its metrics.     out  dreward (texts) */
static double reward_compare(struct Trainer *trainer, const struct RewardBatch *items,
                             const float *reward, float *dreward) {
    const struct RewardTask *task = trainer->task.data;
    /* 1. each text by itself, if people said "liked" or "disliked" */
    if (task->labelled) {
        reward_label_metrics(trainer, reward, items->number, items->texts);
        return sentiment_loss(reward, items->number, items->texts, dreward);
    }

    /* 2. text against text, whether people compared them or their ratings do */
    reward_pair_metrics(trainer, reward, items->pairs, items->pair_count);
    return bradley_terry_loss(reward, items->texts, items->pairs, items->pair_count, task->center,
                              dreward);
}

/* reward_loss -- the reward model's loss on a micro-batch: its Task's loss.
 *                              [glossary: Função de recompensa] [glossary: Modelo Bradley-Terry]
 *   loss = weight * mean over pairs of -log sigmoid(r_chosen - r_rejected - margin)      [4] Eq. 1
 * in   index (count): which items; weight: the micro-batch's share in the step
 * Both sides of a pair go through the model in one batch. Their slopes are opposite, so what the
 * two texts have in common (the prompt) hardly moves, and what tells them apart does.
 * By hand: a head of zeros gives every text the reward 0. Of three pairs one has the margin 1:
 * (ln 2 + ln 2 - log sigmoid(-1)) / 3 = (0.6931 + 0.6931 + 1.3133) / 3 = 0.8999.
 *                                             test: reward_overfit, reward_gradient
 * gdb: break bradley_terry_pair */
static double reward_loss(struct Trainer *trainer, const size_t *index, size_t count, double weight,
                          enum Items from) {
    struct RewardTask *task = trainer->task.data;
    struct Arena *arena = &trainer->arena;
    bool learns = from == TO_LEARN;

    /* 1. Texts and comparisons. A batch of equal ratings has none, and teaches nothing. */
    bool is_single = task->rated || task->labelled;
    struct RewardBatch items = is_single ? reward_batch_of_texts(trainer, index, count, from)
                                         : reward_batch_of_pairs(trainer, index, count, from);
    if (items.pair_count == 0)
        return 0;

    /* 2. Their rewards. In training the activations are kept: the backward pass needs them. */
    struct RewardPass pass =
        reward_forward(trainer->model, arena, items.examples, items.texts, learns);
    trainer->state.num_tokens += pass.acts.batch.tokens;
    reward_text_metrics(trainer, pass.reward, items.texts);

    /* 3. Held-out ratings have no loss yet: their rewards wait for reward_rated_evaluated. */
    if (task->rated && !learns) {
        for (size_t i = 0; i < count; i++)
            task->eval_reward[index[i]] = pass.reward[i];
        return 0;
    }

    /* 4. The loss, and its slope by each reward. A metric takes the sum over pairs: the Trainer
     *    divides by the number of all held-out ones. */
    float *dreward = arena_floats(arena, items.texts);
    double loss = reward_compare(trainer, &items, pass.reward, dreward);
    if (!learns)
        trainer_metric(trainer, "loss", loss * (double)items.pair_count, items.pair_count);

    /* 5. the way back to the weights */
    if (learns)
        reward_backward(trainer->model, arena, &pass, dreward, weight);
    return loss * weight;
}

/* ---- Data ----------------------------------------------------------------------------------- */

/* Are the two sides of a pair the same tokens? Then nobody preferred anything. */
static bool is_equal_pair(const struct Example pair[2]) {
    /* ids, not letters: they are what the model reads */
    if (pair[0].n != pair[1].n)
        return false;
    return memcmp(pair[0].ids, pair[1].ids, pair[0].n * sizeof *pair[0].ids) == 0;
}

/* Ends the program if what is left of a data set offers nothing to compare: it would train for
 * hours and learn nothing. */
static void reward_check(const struct Dataset *data, const double *number, size_t count) {
    /* 1. Enough items: a pair is a comparison by itself, single texts must be two at least. */
    bool is_pairs = data->shape == SHAPE_MARGIN;
    CHECK(count >= (is_pairs ? 1u : 2u),
          "%s: %zu %s are left; a pair or two texts are needed to compare", data->path, count,
          is_pairs ? "pairs" : "texts");

    /* 2. Ratings that differ enough for one pair at least. It suffices to look at the extremes: if
     *    these two texts make no pair, no two do. */
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

    /* 3. Labels of both kinds: with one kind the loss falls to 0, and nothing is learnt. That may
     *    be intended, in a test for example, so it is a note and not an error. */
    if (data->shape == SHAPE_LABELLED && least == most)
        warn("%s: every label is %g: a model that always says so is right", data->path, least);
}

/* A row of the data set as one text, or as the two of a pair (prompt + answer), each followed by
 * the end token: where a text ends is part of what is judged. (Where the end token is the padding
 * token too, as in GPT-2, reward_row skips it.)
 * Returns how many texts there are. */
static size_t reward_row_encode(const struct Trainer *trainer, struct Arena *arena,
                                const struct Dataset *data, const struct Row *row,
                                struct Example *texts) {
    size_t V = trainer->model->config.vocab_size;
    const int *end_token = &trainer->model->config.eos_token_id;

    /* 1. a text that was rated or labelled */
    if (data->shape != SHAPE_MARGIN) {
        texts[0] = example_encode(arena, trainer->tok, row->text, V, end_token);
        return 1;
    }

    /* 2. A pair: each answer after the prompt, since an answer that is good to one question may be
     *    bad to another. Without a prompt, each is judged alone. */
    struct Text chosen = text_join(arena, row->prompt, row->chosen);
    struct Text rejected = text_join(arena, row->prompt, row->rejected);
    texts[0] = example_encode(arena, trainer->tok, chosen, V, end_token);
    texts[1] = example_encode(arena, trainer->tok, rejected, V, end_token);
    return 2;
}

/* The number that comes with a row: what people said about the text, or how clear their preference
 * was. */
static double reward_row_number(const struct Dataset *data, const struct Row *row) {
    /* in a pair without a margin it is 0: "better", by however little */
    if (data->shape == SHAPE_MARGIN)
        return row->margin;
    return data->shape == SHAPE_LABELLED ? row->label : row->score;
}

/* reward_texts -- the rows of a data set as the task's texts and numbers; returns how many items.
 * What exceeds max_length is dropped, because half a text cannot be compared fairly. So are pairs
 * with equal sides, which TRL keeps: their loss has no gradient, and no model can be right about
 * them, so they would only lower the accuracy.      test: reward_equal_pairs, reward_overfit */
static size_t reward_texts(struct Trainer *trainer, struct Arena *arena, const struct Dataset *data,
                           enum Items into) {
    struct RewardTask *task = trainer->task.data;
    size_t max_length = trainer->args.max_length;
    size_t count = 0;
    size_t too_long = 0;
    size_t equal = 0;
    struct Example *next = arena_alloc(arena, 2 * data->n, sizeof *next);
    double *number = arena_alloc(arena, data->n, sizeof *number);
    task->texts[into] = next;
    task->number[into] = number;
    for (size_t i = 0; i < data->n; i++) {
        /* 1. encoded into the place of the next item */
        const struct Row *row = &data->rows[i];
        size_t each = reward_row_encode(trainer, arena, data, row, next);

        /* 2. Can it be used? Of a pair, both sides must fit. */
        if (each == 2 && is_equal_pair(next)) {
            equal++;
        } else if (MAX(next[0].n, next[each - 1].n) > max_length) {
            too_long++;
        } else {
            /* 3. Then it stays; otherwise the next row overwrites it. */
            number[count++] = reward_row_number(data, row);
            next += each;
        }
    }
    const char *items = data->shape == SHAPE_MARGIN ? "pairs" : "texts";
    note_rows(data, too_long, items, "dropped: longer than %zu tokens (--max_length)", max_length);
    note_rows(data, equal, "pairs", "are left out: chosen and rejected are the same");
    reward_check(data, number, count);
    return count;
}

/* A checkpoint also needs the state of the random cuts. */
static void reward_saved(struct Trainer *trainer, struct Checkpoint *checkpoint) {
    struct RewardTask *task = trainer->task.data;
    checkpoint_add_random(checkpoint, "cut", &task->cut);
}

/* reward_task -- makes a reward model the trainer's Task, on pairs, rated or labelled texts. */
static struct RewardTask *reward_task(struct Trainer *trainer, struct Arena *arena,
                                      const struct Dataset *data, const struct Dataset *eval) {
    struct RewardTask *task = arena_zeros(arena, 1, sizeof *task);
    /* 1. The kind of data, which the fields of its rows tell. Texts are not cut here (prefix_share
     *    0): only the course needs a model that can judge cut answers. */
    *task = (struct RewardTask){
        .rated = data->shape == SHAPE_RATED,
        .labelled = data->shape == SHAPE_LABELLED,
        .min_difference = 1,
        .cut = rng_seed(trainer->args.seed, STREAM_CUT),
    };
    trainer->task = (struct Task){
        .name = "reward",
        .data = task,
        .loss = reward_loss,
        .saved = reward_saved,
    };

    /* 2. the texts, those to learn from and those held out */
    trainer->task.n = reward_texts(trainer, arena, data, TO_LEARN);
    trainer->task.eval_n = eval ? reward_texts(trainer, arena, eval, HELD_OUT) : 0;

    /* 3. Of other data each batch yields its own metrics; see reward_rated_evaluated. */
    if (task->rated) {
        trainer->task.evaluated = reward_rated_evaluated;
        task->eval_reward = arena_floats(arena, trainer->task.eval_n);
    }
    return task;
}

/* ---- Use ------------------------------------------------------------------------------------ */

/* Texts that go through the reward model at once. */
enum { SCORED_TOGETHER = 32 };

/* The rewards of at most SCORED_TOGETHER texts. An empty text is replaced by an end token, since a
 * reward must be read at some token. */
static void reward_score_batch(const struct GPT2 *model, struct Arena *arena,
                               const struct Example *texts, size_t n, float *reward) {
    int end_token = model->config.eos_token_id;
    struct Example empty = {.ids = &end_token, .n = 1};
    struct Example batch_texts[SCORED_TOGETHER];
    /* 1. the texts; no backward pass will follow, so no activations are kept (keep is false) */
    for (size_t i = 0; i < n; i++)
        batch_texts[i] = texts[i].n ? texts[i] : empty;
    struct RewardPass pass = reward_forward(model, arena, batch_texts, n, false);
    memcpy(reward, pass.reward, n * sizeof *reward);

    /* 2. One NaN among the rewards would make every advantage of PPO's batch NaN, since they are
     *    whitened together: better to end here. */
    check_numbers(model, arena, &pass.acts.batch, "the reward of a text", reward, n);
}

/* reward_score -- the rewards of n token sequences.
 *                                       [glossary: Pipeline de análise de sentimentos]
 * out  reward (n): without unit or bounds; only comparisons between them mean anything (but with a
 *      model trained on labels, sigmoid(reward) is the probability that the text is liked)
 * A text's reward does not depend on which others are scored with it.
 *                                                           test: reward_golden, reward_company */
static void reward_score(const struct GPT2 *model, const struct Example *texts, size_t n,
                         float *reward) {
    struct Arena arena = {0};
    for (size_t first = 0; first < n; first += SCORED_TOGETHER) {
        /* Some at a time: the activations of a batch are what takes memory here. Short texts next
         * to long ones cost nothing extra, because batches are packed, not padded. */
        arena_reset(&arena);
        size_t count = MIN(n - first, (size_t)SCORED_TOGETHER);
        reward_score_batch(model, &arena, texts + first, count, reward + first);
    }
    arena_free(&arena);
}

/* =============================================================================================
 * Chapter 17 - Rollouts, REINFORCE, PPO              [glossary: Gradiente de política]
 *
 * Chapter 4 on a real model: how does a language model learn from the scores of its own answers?
 * A step of PPO, as TRL 0.11 takes it:
 *
 *     rollouts     the policy answers batch_size prompts; the reward model scores the answers
 *     ppo_step     1. scores are scaled and clipped, if the options say so
 *                  2. policy and reference read the answers: log-probabilities, values
 *                  3. kl_reward: each token pays for its divergence, the last one gets the score
 *                  4. gae: advantages and returns; advantages are whitened
 *                  5. ppo_epochs passes over mini-batches: ppo_loss, backward, Adam steps
 *                  6. statistics, in TRL's names
 *                  7. the KL controller moves beta
 *
 * The path of the derivative from PPO's loss to wte:
 *
 *     ppo_loss               dlogprobs (R) of ppo_token_loss, dvalues (R) of ppo_value_loss;
 *                            ppo_weigh then multiplies them by the mini-batch's share of the step
 *       ppo_backward         calls all that follow
 *         lm_head_backward       d logits, row by row (lm_head_backward_row) -> wte.d as the output
 *                                layer; dhidden (N,C)
 *         scalar_head_backward   dhidden += dvalue times the value head's weights
 *         gpt2_backward          dhidden (N,C) -> dx (N,C), the derivative of the stream
 *           layernorm_backward       ln_f, and twice in each block
 *           block_backward           n_layer times: dx of its output becomes dx of its input
 *             module_backward            -> linear_backward: the weights' gradients
 *             gelu_backward, attention_backward
 *           embedding_backward       dx of each position -> wte.d of the token that was read there
 *     optimizer_step         wte.d moves wte.w
 *
 * One number both ways. Chapter 4's " very" has dlogprob 0.3957 and now p = e^-1.10 = 0.3329. Let
 * the vocabulary be " very", with the vector (0, 0) in wte, and one other token, with (0.6952, 0);
 * let the model have no blocks and no layer norm, and let it have read the other token, with
 * (0.3048, 2) in wpe: hidden = (1, 2), logits 0 and 0.6952, p = 0.3329 and 0.6671.
 *   d logits     0.3957 (1 - 0.3329) = 0.2640 for " very", 0.3957 (0 - 0.6671) = -0.2640
 *   output       d logit times hidden: wte.d gets (0.2640, 0.5280) for " very", (-0.2640, -0.5280)
 *                for the other
 *   d hidden     sum of d logit times wte: -0.2640 (0.6952, 0) = (-0.1835, 0), which is dx here
 *   embedding    the other was read, so wte.d gets dx for it too: (-0.4475, -0.5280) in all
 * A step down, against wte.d, lowers the logit of " very".                         test: wte_hand
 *
 * Which tokens' vectors in wte get a gradient? As the output layer, those of the whole vocabulary,
 * from each position that predicts a token of an answer (none from a clipped one, whose slope is
 * 0). As the embedding, those of the tokens that were read: the prompts' too, since the answers'
 * positions attended to them, but not at an answer's last position, which is predicted and never
 * read.
 *
 * The numbers of a step, for 128 answers of 20 tokens each: B = 128 scores, one per answer, become
 * R = 2560 rewards, advantages and returns, one per token. With four epochs of one mini-batch each,
 * the weights move four times before the policy writes again.
 *
 * What enters: a policy, a frozen reference, prompts and a scorer, or stored rollouts. What
 * leaves: a policy that scores higher and stays near the reference.
 * ============================================================================================= */

/* ---- Rollouts ------------------------------------------------------------------------------- */

/* A rollout: what was asked, what the policy answered, how it scored.        [glossary: Rollout] */
struct Rollout {
    struct Example example; /* query and response together */
    size_t response_length; /* tokens */
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

/* A sequence of the policy's tokens, in the tokens of the reward model: converted through text, as
 * in the lab's pipeline, since the two models may have different vocabularies and end tokens. The
 * policy's end token is left out: it is no part of the text that is judged. */
static struct Example scorer_text(const struct Scorer *scorer, struct Arena *arena,
                                  const struct Example *sequence, const struct GPT2Config *policy) {
    const struct GPT2Config *judge = &scorer->reward_model->config;
    size_t length = sequence->n - example_ended(sequence, policy->eos_token_id);
    /* no end token (NULL): whether cut off or finished, an answer is judged at its last word */
    struct Text text =
        tokenizer_decode_all(scorer->tok, arena, sequence->ids, length, policy->vocab_size);
    struct Example judged = example_encode(arena, scorer->tok, text, judge->vocab_size, NULL);

    /* what does not fit into the judge's context is not judged */
    judged.n = MIN(judged.n, judge->n_positions);
    return judged;
}

/* scorer_scale -- a reward on the scale of scores.
 *   score = (reward - mean) / std;   at most short_score, if the response ended too soon
 * If mean and std are those of the rewards of real texts, a score of 1 means: one standard
 * deviation better than these. Short answers are limited because reward models tend to love "the
 * best.": a policy that may stop there never learns to write more.
 * By hand: reward 3.5, mean 2, std 0.5: score 3; after fewer than least_length tokens, with
 * short_score -2: -2.                                                    test: scorer_scale */
static float scorer_scale(const struct Scorer *scorer, const struct Example *sequence,
                          const struct GPT2Config *policy, float reward) {
    float score = (float)((reward - scorer->mean) / scorer->std);

    /* An answer that was cut off at its token limit did not choose to be short: only one that ended
     * by itself is penalized. */
    bool is_short = sequence->n - sequence->prompt_length < scorer->least_length;
    if (is_short && example_ended(sequence, policy->eos_token_id))
        return (float)MIN(score, scorer->short_score);
    return score;
}

/* scorer_score -- the score of each of n sequences of a policy.
 *                                                  [glossary: Função de recompensa]
 * in   sequences (n): query and response; policy: the model that wrote them    out  score (n) */
static void scorer_score(const struct Scorer *scorer, struct Arena *arena,
                         const struct Example *sequences, size_t n, const struct GPT2Config *policy,
                         float *score) {
    /* 1. The reward model reads the text, query included: an answer is good or bad only as an
     *    answer to something. */
    struct Example *texts = arena_alloc(arena, n, sizeof *texts);
    for (size_t i = 0; i < n; i++)
        texts[i] = scorer_text(scorer, arena, &sequences[i], policy);

    /* 2. all texts through the reward model together, then each reward on the scale of scores */
    reward_score(scorer->reward_model, texts, n, score);
    for (size_t i = 0; i < n; i++)
        score[i] = scorer_scale(scorer, &sequences[i], policy, score[i]);
}

/* scorer_prefixes -- how the judge's mind changes while it reads: the score that an answer would
 * have had, had it ended after each of its tokens. Each beginning is a text of its own; of a long
 * answer some 32 are read, or they would cost more than the training.
 * in   sequence: query and response; policy: the model that wrote them
 * out  score (response tokens + 1): the first is of the query alone, the last of the whole answer;
 *      NaN where none was read. Bare: without the penalty for short answers.
 *                                                                        test: scorer_prefixes */
static void scorer_prefixes(const struct Scorer *scorer, struct Arena *arena,
                            const struct Example *sequence, const struct GPT2Config *policy,
                            float *score) {
    /* 1. the beginnings: the same ids, of which fewer count */
    struct Scorer bare = *scorer;
    bare.least_length = 0;
    size_t n = sequence->n - sequence->prompt_length + 1;
    size_t stride = n / 32 + 1;
    size_t count = 0;
    struct Example *beginnings = arena_alloc(arena, n, sizeof *beginnings);
    for (size_t t = 0; t < n; t++) {
        score[t] = NAN;
        beginnings[count] = *sequence;
        beginnings[count].n = sequence->prompt_length + t;
        count += t % stride == 0 || t + 1 == n;
    }

    /* 2. all of them judged together, each score at the length of its beginning */
    float *read = arena_floats(arena, count);
    scorer_score(&bare, arena, beginnings, count, policy, read);
    for (size_t i = 0; i < count; i++)
        score[beginnings[i].n - sequence->prompt_length] = read[i];
}

/* Where rollouts come from: prompts that the policy answers and the scorer judges, or stored
 * ones.  [glossary: Rollout] */
struct RolloutSource {
    const struct Example *prompts;
    size_t n;
    size_t *order, at; /* a shuffled pass over the prompts, and the next one's place in it */
    size_t room; /* how many new tokens the context can hold after the longest prompt */
    struct Rng shuffle, lengths, sample; /* a checkpoint saves their states */
    struct LengthSampler output_length;
    struct GenerationConfig generation;
    struct Scorer scorer;
    const struct Dataset *replay; /* stored rollouts, or NULL */
};

/* PPOConfig's defaults: TRL 0.11's.                [glossary: Classe de configuração PPO] */
static struct PPOConfig ppo_config(void) {
    return (struct PPOConfig){
        /* how much is learnt from at once, and how often */
        .batch_size = 128,
        .mini_batch_size = 128,
        .gradient_accumulation_steps = 1,
        .ppo_epochs = 4,

        /* the price of a nat of KL, and its controller */
        .init_kl_coef = 0.2,
        .adap_kl_ctrl = true,
        .target = 6,
        .horizon = 10000,
        .kl_penalty = KL_PENALTY_KL,

        /* advantages, and the losses */
        .gamma = 1,
        .lam = 0.95,
        .cliprange = 0.2,
        .cliprange_value = 0.2,
        .vf_coef = 0.1,

        /* when to give up on a mini-batch, or on a step's epochs (if early_stopping is set) */
        .ratio_threshold = 10,
        .target_kl = 1,
    };
}

/* A vector of stats_all: n numbers, or with `start` n lists of numbers, one list per response. */
struct StatsVector {
    const char *name;
    const float *x;
    size_t n;
    const size_t *start;
};

/* Mean and variance of all scores ever seen, without keeping them. */
struct RunningMoments {
    double mean, var, std, count;
};

/* running_moments_update -- one more batch of n scores, by Chan's rule for merging two sets.
 * The merged squared deviations are those of both sets around their own means, plus what the
 * distance between the two means adds. TRL's RunningMoments.
 * By hand: 1, 2, 6 were seen (mean 3, squared deviations 4 + 1 + 9 = 14), now comes 7: the mean is
 * 4, the squared deviations 14 + 0 + 4^2 * 3 * 1 / 4 = 26, var 6.5.
 *                                                  test: running_moments, ppo_scores_golden */
static void running_moments_update(struct RunningMoments *m, const float *x, size_t n) {
    /* 1. The batch by itself. Like the running variance, its own is divided by n, not by n - 1. */
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

/* What trace.jsonl shows of a step, number by number: the first answers of its batch. It is written
 * beside the algorithm, and changes nothing in it. Only some steps are shown: ppo_trace_shows. */
struct PPOTrace {
    bool is_wanted; /* this run writes the file */
    const struct Scorer *scorer; /* NULL: the rollouts are stored ones */
    size_t answers; /* how many of this step; 0: it is not shown */
    const struct Rollout *rollouts; /* (answers) */
    const float *scores; /* (answers) after ppo_process_scores */
    const struct PPOBatch *batch; /* the whole step's */
    size_t R, epochs; /* tokens of these answers; epochs so far */
    float *logprobs; /* (epochs + 1, R) of the policy that wrote them, then after each epoch */
    double advantage_mean, advantage_std; /* of the whole batch, before whitening */
};

/* PPO's own part of a trainer on rollouts.                      [glossary: Treinador PPO] */
struct PPOTrainer {
    struct PPOConfig config;
    size_t optimizer_steps; /* a step of PPO takes several of them */
    struct Rng order; /* shuffles the answers into mini-batches */
    struct Arena epoch_arena; /* of one mini-batch */
    struct StatsVector vectors[10]; /* of a line of stats_all, what is no single number */
    size_t vector_count;
    float *advantages, *ratio; /* (ppo_epochs R) of each token in each update; NULL: not kept */
    size_t updated; /* how many of them are filled in */
    struct PPOTrace trace;
};

enum Algorithm { ALGORITHM_PPO, ALGORITHM_REINFORCE };

/* Everything that a training on rollouts owns; its model is the policy. [glossary: Política π] */
struct RolloutTrainer {
    enum Algorithm algorithm;
    const char *name; /* in progress lines */
    struct GPT2 *model, *ref_model; /* the policy; what it was before training */
    struct TrainingArguments args;
    const struct Tokenizer *tok; /* saved with the model in checkpoints */
    double temperature; /* divides the logits of both */
    double kl_coef; /* beta, now */
    size_t batch_size, num_generations; /* answers of a step, of which so many to each prompt */
    struct RunningMoments moments; /* PPO: of scores; REINFORCE: of R, for BASELINE_MEAN */
    size_t step, total_steps;
    struct Arena arena; /* of one step */
    struct LogEntry stats; /* of the last step: a line of the log */
    enum Baseline baseline; /* of REINFORCE */
    struct PPOTrainer ppo;
};

/* What both algorithms need. `ref_model` is the policy before training, and is never changed.
 * temperature: that of sampling. Log-probabilities are computed at it too, since they must be those
 * of the distribution from which the answers were drawn. */
static struct RolloutTrainer *rollout_trainer_new(struct GPT2 *model, struct GPT2 *ref_model,
                                                  struct TrainingArguments args,
                                                  double temperature) {
    /* not in an arena: the trainer outlives every step, and owns the arenas that hold one */
    struct RolloutTrainer *trainer = calloc(1, sizeof *trainer);
    CHECK(trainer, "out of memory");
    *trainer = (struct RolloutTrainer){
        .model = model,
        .ref_model = ref_model,
        .args = args,
        .temperature = temperature,
        .moments = {0, 1, 1, 1e-24}, /* nothing seen yet; as in TRL, the count is not quite 0 */
    };
    /* memory for the policy's gradients and AdamW's moments; the reference needs neither */
    gpt2_make_trainable(model);
    return trainer;
}

/* A trainer for PPO; a model without a value head gets a new one. */
static struct RolloutTrainer *ppo_trainer_new(struct GPT2 *model, struct GPT2 *ref_model,
                                              struct PPOConfig config,
                                              struct TrainingArguments args, double temperature) {
    /* 1. the head first, so that it gets a gradient too */
    value_head_init(model, args.seed);
    struct RolloutTrainer *trainer = rollout_trainer_new(model, ref_model, args, temperature);
    trainer->algorithm = ALGORITHM_PPO;
    trainer->name = "ppo";
    trainer->kl_coef = config.init_kl_coef;

    /* 2. one answer to each prompt: GAE compares tokens with the value head's guess, not answers
     *    with each other */
    trainer->batch_size = config.batch_size;
    trainer->num_generations = 1;
    trainer->ppo.config = config;
    trainer->ppo.order = rng_seed(args.seed, STREAM_ORDER);
    return trainer;
}

/* A trainer for REINFORCE. Its baselines are computed from rewards: it needs no head. */
static struct RolloutTrainer *reinforce_trainer_new(struct GPT2 *model, struct GPT2 *ref_model,
                                                    struct ReinforceConfig config,
                                                    struct TrainingArguments args,
                                                    double temperature) {
    struct RolloutTrainer *trainer = rollout_trainer_new(model, ref_model, args, temperature);
    trainer->algorithm = ALGORITHM_REINFORCE;
    trainer->name = "reinforce";
    trainer->kl_coef = config.beta;
    trainer->batch_size = config.batch_size;
    trainer->num_generations = config.num_generations;
    trainer->baseline = config.baseline;
    return trainer;
}

static double rollout_learning_rate(const struct RolloutTrainer *trainer) {
    return trainer->args.learning_rate
           * schedule_factor(&trainer->args, trainer->step, trainer->total_steps);
}

static void rollout_trainer_free(struct RolloutTrainer *trainer) {
    arena_free(&trainer->arena);
    arena_free(&trainer->ppo.epoch_arena);
    free(trainer);
}

/* The next prompt of a shuffled pass over all of them; after the last one a new pass begins, in
 * another order. */
static const struct Example *rollout_prompt(struct RolloutSource *source) {
    /* Every prompt comes once before any comes twice, as in an epoch of a data set. */
    if (source->at == source->n)
        rng_shuffle(&source->shuffle, source->order, source->n);
    source->at %= source->n;
    return &source->prompts[source->order[source->at++]];
}

/* A response that is yet to be written: with random numbers of its own, so that it does not depend
 * on when the others end, and with a length limit drawn for it, as in the lab. With one limit for
 * all, the policy would learn to please at that length only. */
static struct Sequence rollout_start(const struct RolloutTrainer *trainer,
                                     struct RolloutSource *source, struct Arena *arena,
                                     const struct Example *prompt) {
    /* one number from the common stream seeds the answer's own generator */
    struct Rng own = rng_seed(rng_next(&source->sample), STREAM_SAMPLE);
    size_t drawn = length_sampler(&source->output_length, &source->lengths);

    /* the context sets a limit too: there are no position embeddings beyond it */
    size_t max_new = MIN(drawn, trainer->model->config.n_positions - prompt->n);
    return sequence_start(arena, prompt->ids, prompt->n, max_new, trainer->model, own);
}

/* collect_rollouts -- batch_size scored answers of the policy; num_generations of them, side by
 * side, answer the same prompt.                                        [glossary: Rollout]
 * out  rollouts (batch_size), in `arena` */
static void collect_rollouts(const struct RolloutTrainer *trainer, struct RolloutSource *source,
                             struct Arena *arena, struct Rollout *rollouts) {
    size_t n = trainer->batch_size;

    /* 1. Prompts are drawn, then answered all together: each step of generation reads the weights
     *    from memory once, however many answers are being written. */
    struct Sequence *sequences = arena_alloc(arena, n, sizeof *sequences);
    const struct Example *prompt = NULL;
    for (size_t i = 0; i < n; i++) {
        /* a new prompt, or the same one again: the rloo baseline compares answers to one prompt */
        if (i % trainer->num_generations == 0)
            prompt = rollout_prompt(source);
        sequences[i] = rollout_start(trainer, source, arena, prompt);
    }
    generate(trainer->model, sequences, n, &source->generation);

    /* 2. One score for each answer as a whole: chapter 4 is about how it reaches the tokens. */
    struct Example *examples = sequences_as_examples(arena, sequences, n);
    float *score = arena_floats(arena, n);
    scorer_score(&source->scorer, arena, examples, n, &trainer->model->config, score);
    for (size_t i = 0; i < n; i++)
        rollouts[i] =
            (struct Rollout){examples[i], examples[i].n - examples[i].prompt_length, score[i]};
}

/* One stored rollout, number `index` from 0. A file may come from another model, or from a person:
 * everything that training relies on is checked. */
static struct Rollout replay_rollout(const struct Dataset *data, size_t index,
                                     const struct GPT2 *model, struct Arena *arena) {
    const struct Row *row = &data->rows[index];

    /* 1. Without a query, no token predicts the first one of the response; without a response,
     *    there is nothing to learn. Both are stored as tokens, not as text: decoded and encoded
     *    again, they might be different ones. The old log-probabilities are not in the file; step 2
     *    of ppo_step computes them. */
    size_t length = row->query_length + row->response_length;
    CHECK(row->query_length > 0 && row->response_length > 0,
          "%s: rollout %zu has an empty query or response", data->path, index + 1);
    CHECK(length <= model->config.n_positions,
          "%s: rollout %zu has %zu tokens, the model's context is %zu", data->path, index + 1,
          length, model->config.n_positions);

    /* 2. Query and response as one sequence. An id beyond the vocabulary would be read as an
     *    embedding from outside wte. */
    int *ids = arena_alloc(arena, length, sizeof *ids);
    memcpy(ids, row->query_ids, row->query_length * sizeof *ids);
    memcpy(ids + row->query_length, row->response_ids, row->response_length * sizeof *ids);
    for (size_t t = 0; t < length; t++)
        CHECK((size_t)ids[t] < model->config.vocab_size,
              "%s: token id %d is outside the model's vocabulary of %zu", data->path, ids[t],
              model->config.vocab_size);
    return (struct Rollout){
        .example = {ids, length, row->query_length},
        .response_length = row->response_length,
        .score = (float)row->score,
    };
}

/* The n stored rollouts of step number `step` (from 0), in file order; after the last one the first
 * follows again. With them another program, such as TRL, can repeat a step.
 *                                                                         test: ppo_replay */
static void replay_rollouts(const struct Dataset *data, size_t step, const struct GPT2 *model,
                            struct Arena *arena, struct Rollout *rollouts, size_t n) {
    for (size_t i = 0; i < n; i++)
        rollouts[i] = replay_rollout(data, (step * n + i) % data->n, model, arena);
}

/* The texts of n rollouts, for collate. */
static struct Example *rollout_examples(struct Arena *arena, const struct Rollout *rollouts,
                                        size_t n) {
    struct Example *examples = arena_alloc(arena, n, sizeof *examples);
    for (size_t i = 0; i < n; i++)
        examples[i] = rollouts[i].example;
    return examples;
}

/* ---- REINFORCE ------------------------------------------------------------------------------ */

/* What is known of a step's n answers. */
struct ReinforceBatch {
    struct Batch batch;
    struct LMHead head; /* of the policy, kept for the backward pass */
    double *logps, *ref_logps; /* (n) log pi(y_i), log pi_ref(y_i): of whole answers, nats */
    float *rewards; /* (n) R(y_i) */
};

/* reinforce_reward -- R(y): what is to be as large as possible on average (chapter 4).
 *   R(y) = score(y) - beta (log pi(y) - log pi_ref(y))
 * PPO spreads the penalty over the tokens (kl_reward); REINFORCE takes the answer as a whole.
 * By hand: score 1, beta 0.1, log pi -8, log pi_ref -10: 1 - 0.1 * 2 = 0.8.
 *                                                                 test: reinforce_advantages */
static double reinforce_reward(double score, double kl_coef, double logp, double ref_logp) {
    return score - kl_coef * (logp - ref_logp);
}

/* Policy and reference read the answers; with the scores, this gives R of each. */
static struct ReinforceBatch reinforce_evaluate(struct RolloutTrainer *trainer,
                                                const struct Rollout *rollouts) {
    struct Arena *arena = &trainer->arena;
    size_t n = trainer->batch_size;
    struct ReinforceBatch r = {
        .batch = collate(arena, rollout_examples(arena, rollouts, n), n, SKIP_LAST),
        .logps = arena_alloc(arena, n, sizeof *r.logps),
        .ref_logps = arena_alloc(arena, n, sizeof *r.ref_logps),
        .rewards = arena_floats(arena, n),
    };

    /* The policy's activations are kept for its backward pass. The reference has none. */
    r.head = batch_logprobs(trainer->model, arena, &r.batch, trainer->temperature, true);
    struct LMHead ref_head =
        batch_logprobs(trainer->ref_model, arena, &r.batch, trainer->temperature, false);

    /* of whole answers: sums over their tokens */
    sum_target_logps(&r.batch, n, r.head.logprob, r.logps);
    sum_target_logps(&r.batch, n, ref_head.logprob, r.ref_logps);
    for (size_t i = 0; i < n; i++)
        /* beta log(pi / pi_ref) is a number here: no gradient goes through it */
        r.rewards[i] = (float)reinforce_reward(rollouts[i].score, trainer->kl_coef, r.logps[i],
                                               r.ref_logps[i]);
    return r;
}

/* answer_gradients -- the gradient of log pi(y_i) for each answer by itself, by the C weights of
 * ln_f.bias.                                                  [glossary: Gradiente de política]
 *   s_i = d log pi(y_i) / d ln_f.bias = sum over the positions t of answer i of
 *         d log pi(y_i) / d hidden_t
 * out  s (B,C)
 * gradient_variance asks how much the answers' gradients differ. A backward pass cannot tell, as it
 * leaves only their sum, and one pass per answer would be slow. But for one tensor the separate
 * gradients are nearly free. The bias of the last layer norm is added to the hidden vector of every
 * position, so its gradient is the sum of theirs; and these come out of the output layer's backward
 * pass, before it enters any block. So the variance is that of only C weights: enough to compare
 * baselines, since all are judged by the same weights.
 *                                                                       test: reinforce_step */
static float *answer_gradients(struct RolloutTrainer *trainer, struct LMHead *head,
                               const struct Batch *batch) {
    size_t C = trainer->model->config.n_embd;
    float *dhidden = arena_zeros(&trainer->arena, batch->N * C, sizeof(float));
    float *s = arena_zeros(&trainer->arena, batch->B * C, sizeof(float));

    /* 1. log pi(y_i) is the sum of its tokens' log-probabilities: the slope by each of them is 1 */
    float *ones = arena_floats(&trainer->arena, head->R);
    for (size_t i = 0; i < head->R; i++)
        ones[i] = 1;

    /* 2. The output layer's backward pass, on a copy of the model's struct in which wte has no
     *    gradient: what is measured here must not be learnt from. */
    struct GPT2 view = *trainer->model;
    view.wte.d = NULL;
    lm_head_backward(&view, head, ones, dhidden, &trainer->arena);

    /* 3. the sum over each answer's own positions; those that predict nothing hold zeros */
    for (size_t b = 0; b < batch->B; b++)
        for (size_t i = batch->start[b]; i < batch->start[b + 1]; i++)
            for (size_t c = 0; c < C; c++)
                s[b * C + c] += dhidden[i * C + c];
    return s;
}

/* gradient_variance -- how noisy a gradient's estimate is: baselines are judged by it.
 *   1 / (n (n - 1)) sum_i | A_i s_i - mean |^2,   the variance of a mean of n samples
 * in   advantages A (n); s (n,C): the gradient of log pi(y_i) by C of the weights
 * By hand: A = 1, 3 and s = 1, 1: products 1, 3, mean 2: (1 + 1) / (2 * 1) = 1.
 *                                                                    test: reinforce_advantages */
static double gradient_variance(const float *advantages, const float *s, size_t n, size_t C) {
    double total = 0;
    for (size_t c = 0; c < C; c++) {
        /* 1. For weight c: the mean over answers, which is the gradient's estimate. */
        double mean = 0;
        for (size_t i = 0; i < n; i++)
            mean += (double)advantages[i] * s[i * C + c] / (double)n;
        /* 2. How far each single answer is from it. A good baseline makes this small and leaves
         *    the mean as it is. */
        for (size_t i = 0; i < n; i++)
            total += pow((double)advantages[i] * s[i * C + c] - mean, 2);
    }
    return n > 1 ? total / (double)n / (double)(n - 1) : NAN;
}

/* Logs how noisy the step's gradient would be with each baseline. The answers are the same for all,
 * so the numbers can be compared. rloo needs several answers per prompt. */
static void reinforce_log_variances(struct RolloutTrainer *trainer, struct ReinforceBatch *r) {
    static const char *const names[] = {"gradient_variance/none", "gradient_variance/mean",
                                        "gradient_variance/rloo"};
    /* 1. the gradients of log pi(y_i), once for all baselines */
    size_t n = trainer->batch_size;
    size_t num_generations = trainer->num_generations;
    const float *s = answer_gradients(trainer, &r->head, &r->batch);
    float *advantages = arena_floats(&trainer->arena, n);
    int count = num_generations > 1 ? BASELINE_RLOO + 1 : BASELINE_RLOO;

    /* 2. A baseline only changes the factors A_i of the gradients s_i. "mean" uses the running mean
     *    of R before this step, whichever baseline the run itself has. */
    for (int b = 0; b < count; b++) {
        reinforce_advantages((enum Baseline)b, r->rewards, n, num_generations,
                             trainer->moments.mean, advantages);
        log_value(&trainer->stats, names[b],
                  gradient_variance(advantages, s, n, trainer->model->config.n_embd));
    }
}

/* Logs means over the step's answers; `objective` is the estimate of J. */
static void reinforce_log(struct RolloutTrainer *trainer, const struct Rollout *rollouts,
                          const struct ReinforceBatch *r) {
    size_t n = trainer->batch_size;
    /* 1. Means over answers. kl is the k1 estimate, so chance may take it below 0. */
    double kl = 0;
    double score = 0;
    double length = 0;
    for (size_t i = 0; i < n; i++) {
        kl += kl_k1(r->logps[i], r->ref_logps[i]) / (double)n;
        score += rollouts[i].score / (double)n;
        length += (double)rollouts[i].response_length / (double)n;
    }

    /* 2. A mean over tokens: how undecided the policy was. Near 0, all answers to a prompt are
     *    alike, and there is nothing left to compare. */
    double entropy = (double)row_sum(r->head.entropy, r->batch.R) / (double)r->batch.R;
    log_value(&trainer->stats, "kl", kl);
    log_value(&trainer->stats, "reward", score);
    log_value(&trainer->stats, "objective", mean_of(r->rewards, n));
    log_value(&trainer->stats, "entropy", entropy);
    log_value(&trainer->stats, "completions/mean_length", length);
}

/* reinforce_step -- one step up the gradient of J, from batch_size new rollouts.
 *              [glossary: Gradiente de política] [glossary: Truque da log-derivada]
 * The rollouts are used once. After the step the policy is a different one, and they are not its
 * answers: PPO's ratio and clip are there to use them again.            test: reinforce_step */
static void reinforce_step(struct RolloutTrainer *trainer, const struct Rollout *rollouts) {
    struct Arena *arena = &trainer->arena;
    size_t n = trainer->batch_size;
    arena_reset(arena);
    trainer->stats.n = 0;

    /* 1. log-probabilities of the answers, and R of each */
    struct ReinforceBatch r = reinforce_evaluate(trainer, rollouts);
    reinforce_log_variances(trainer, &r);

    /* 2. R minus the baseline. The running mean is that of earlier steps, and updated only
     *    afterwards: if it contained these answers, it would bias their gradient. */
    float *advantages = arena_floats(arena, n);
    reinforce_advantages(trainer->baseline, r.rewards, n, trainer->num_generations,
                         trainer->moments.mean, advantages);
    running_moments_update(&trainer->moments, r.rewards, n);

    /* 3. the loss; its slope by each log pi(y_i) goes back through the model */
    double *dlogps = arena_alloc(arena, n, sizeof *dlogps);
    double loss = reinforce_loss(advantages, r.logps, n, dlogps);
    target_logps_backward(trainer->model, arena, &r.batch, &r.head, n, dlogps, 1);
    check_finite(trainer->model, "the loss", loss);

    /* 4. All weights move. */
    double learning_rate = rollout_learning_rate(trainer);
    double grad_norm =
        optimizer_step(trainer->model, &trainer->args, learning_rate, ++trainer->step);

    /* 5. what is shown of it */
    log_value(&trainer->stats, "loss", loss);
    log_value(&trainer->stats, "grad_norm", grad_norm);
    log_value(&trainer->stats, "learning_rate", learning_rate);
    reinforce_log(trainer, rollouts, &r);
}

/* ---- PPO: what a step knows ----------------------------------------------------------------- */

/* A forward pass of the policy over some answers. */
struct PPOForward {
    struct Batch batch;
    struct LMHead head; /* the log-probability of each response token */
    float *values; /* (R) what the value head says before each of them */
};

/* What PPO knows of a step's answers: B of them, and one number for each response token, R in all.
 * Those of answer b are at start[b] .. start[b+1]-1, without padding between answers. */
struct PPOBatch {
    size_t B, R, *start;
    size_t *padding; /* (B) how many padding tokens TRL would put after each answer */
    float *logprobs, *ref_logprobs; /* (R) of policy and reference, when the answers were written */
    float *values; /* (R) of the value head, likewise */
    float *kl; /* (R) kl_penalty_token of each token */
    float *non_score_rewards, *rewards; /* (R) the penalty alone; with the score at the end */
    float *advantages, *returns; /* (R) of gae */
    struct PPOForward *forward; /* of the policy that wrote the answers */
    bool fresh; /* forward can serve the next update: it has all answers, and no weight has moved */
};

/* ---- PPO, step 1: scores -------------------------------------------------------------------- */

/* ppo_process_scores -- the scores of a step, before they become rewards. Both options are off by
 * default; they are for a reward model whose scale is unknown or drifts.
 *   use_score_scaling  score / std, and with use_score_norm (score - mean) / std, where mean and
 *                      std are those of all scores so far, this step's included
 *   score_clip         then at most that far from 0, so that no single answer dominates the step
 * in, out  scores (n)
 * By hand: score_clip 1: -2 becomes -1, 0.5 stays 0.5.                   test: ppo_scores_golden */
static void ppo_process_scores(struct RolloutTrainer *trainer, float *scores, size_t n) {
    const struct PPOConfig *config = &trainer->ppo.config;
    /* 1. Scaling. The moments take in this step's scores first, and then these are divided. */
    if (config->use_score_scaling) {
        running_moments_update(&trainer->moments, scores, n);
        /* torch's float epsilon: equal scores must not be divided by 0 */
        double divisor = trainer->moments.std + 1.1920929e-07;
        double shift = config->use_score_norm ? trainer->moments.mean : 0;
        for (size_t i = 0; i < n; i++)
            scores[i] = (float)((scores[i] - shift) / divisor);
    }

    /* 2. the limit, on the scale of the scaled scores */
    if (config->score_clip > 0)
        for (size_t i = 0; i < n; i++)
            scores[i] = (float)MAX(-config->score_clip, MIN(config->score_clip, scores[i]));
}

/* ---- PPO, step 2: policy and reference read the answers ------------------------------------- */

/* The exact KL(policy || reference) of one row: number `row` of the chunk that begins at first. */
static double kl_full_row(const struct LMHead *head, const struct LMHead *ref_head, size_t first,
                          size_t row, size_t V) {
    return kl_exact(head->logits + row * V, head->lse[first + row], ref_head->logits + row * V,
                    ref_head->lse[first + row], V);
}

/* The exact KL(policy || reference) at each of head->R rows, for kl_penalty "full". It takes both
 * models' logits, V per row, which the heads never hold all at once: they are recomputed chunk by
 * chunk.                     out  kl (R), nats                     test: ppo_penalties_golden */
static void kl_full_rows(const struct GPT2 *model, struct LMHead *head,
                         const struct GPT2 *ref_model, struct LMHead *ref_head, float *kl) {
    size_t V = model->config.vocab_size;
    for (size_t first = 0; first < head->R; first += head->chunk) {
        /* a chunk of both heads' logits, for the same rows: 2 n V floats at once, not 2 R V */
        size_t n = lm_head_logits(model, head, first);
        lm_head_logits(ref_model, ref_head, first);
#pragma omp parallel for
        for (size_t i = 0; i < n; i++)
            kl[first + i] = (float)kl_full_row(head, ref_head, first, i, V);
    }
}

/* One pass of the policy: log-probabilities, entropies and values of n answers. keep: whether to
 * keep the activations for a backward pass. The output layer and the value head read the same
 * hidden vectors, so values cost no second pass.
 *                                          [glossary: AutoModelForCausalLMWithValueHead] */
static struct PPOForward *ppo_forward(struct RolloutTrainer *trainer, struct Arena *arena,
                                      const struct Example *examples, size_t n, bool keep) {
    struct PPOForward *forward = arena_alloc(arena, 1, sizeof *forward);
    /* only rows that predict a response token count: the query was not the policy's choice */
    forward->batch = collate(arena, examples, n, SKIP_LAST);
    forward->head =
        batch_logprobs(trainer->model, arena, &forward->batch, trainer->temperature, keep);

    /* one value for each row that predicts a token: what to expect before that token is known */
    forward->values = arena_floats(arena, forward->batch.R);
    scalar_head_forward(forward->values, forward->head.acts.ln_f, forward->batch.row,
                        forward->batch.R, &trainer->model->v_head.weight,
                        &trainer->model->v_head.bias);
    return forward;
}

/* Room for what later steps compute, one number per response token. */
static void ppo_batch_columns(struct PPOBatch *p, struct Arena *arena) {
    p->kl = arena_floats(arena, p->R);
    p->non_score_rewards = arena_floats(arena, p->R);
    p->rewards = arena_floats(arena, p->R);
    p->advantages = arena_floats(arena, p->R);
    p->returns = arena_floats(arena, p->R);
}

/* Step 2 of ppo_step: the policy and the reference each read queries and responses once. This gives
 * the old log-probabilities and values, which stay fixed while the policy moves on.
 *                                                      [glossary: Modelo de referência] */
static struct PPOBatch ppo_evaluate_rollouts(struct RolloutTrainer *trainer,
                                             const struct Rollout *rollouts) {
    size_t B = trainer->batch_size;
    struct Arena *arena = &trainer->arena;
    struct Example *examples = rollout_examples(arena, rollouts, B);

    /* 1. If one mini-batch is the whole batch, this pass serves the first update too, so its
     *    activations are kept. */
    bool fresh = trainer->ppo.config.mini_batch_size == B;
    struct PPOForward *forward = ppo_forward(trainer, arena, examples, B, fresh);
    struct LMHead ref_head =
        batch_logprobs(trainer->ref_model, arena, &forward->batch, trainer->temperature, false);

    /* The old log-probabilities are those of this pass, not those of sampling: top-k and other
     * filters may have changed the latter, and a ratio must compare like with like. */
    struct PPOBatch p = {
        .B = B,
        .R = forward->batch.R,
        .start = forward->batch.target_start,
        .padding = arena_alloc(arena, B, sizeof *p.padding),
        .logprobs = forward->head.logprob,
        .ref_logprobs = ref_head.logprob,
        .values = forward->values,
        .forward = forward,
        .fresh = fresh,
    };

    /* 2. The exact KL takes both models' output layers, which are at hand only here. */
    ppo_batch_columns(&p, arena);
    if (trainer->ppo.config.kl_penalty == KL_PENALTY_FULL)
        kl_full_rows(trainer->model, &forward->head, trainer->ref_model, &ref_head, p.kl);

    /* 3. TRL's rows are as long as the longest sequence of the batch (ppo_padding_advantage) */
    for (size_t b = 0; b < B; b++)
        p.padding[b] = forward->batch.max_length + 1 - examples[b].n;
    return p;
}

/* ---- PPO, steps 3 and 4: rewards and advantages --------------------------------------------- */

/* ppo_rewards -- step 3 of ppo_step: the reward of every token.   [glossary: Parâmetro Beta (β)]
 *   reward_t = -beta kl_t,   and at an answer's last token   reward_last += score
 * in   scores (B), one per answer; p->logprobs, ref_logprobs (R); for kl_penalty "full" p->kl (R)
 * out  p->kl, non_score_rewards, rewards (R)
 * By hand: chapter 4's answer, log pi -1.2, -0.5, -0.1 against -1.7, -0.5, -0.2, beta 0.2 and
 * score 1: -0.2 * (0.5, 0, 0.1) + (0, 0, 1) = -0.10, 0, 0.98.
 *                                          test: ppo_rewards, ppo_penalties_golden, ppo_step */
static void ppo_rewards(const struct RolloutTrainer *trainer, struct PPOBatch *p,
                        const float *scores) {
    /* 1. each token pays for its own divergence from the reference */
    for (size_t t = 0; t < p->R; t++) {
        /* for "full", kl[t] has been computed already, and is returned as it is */
        p->kl[t] = kl_penalty_token(trainer->ppo.config.kl_penalty, p->logprobs[t],
                                    p->ref_logprobs[t], p->kl[t]);
        /* kept apart for the log: what the divergence alone cost */
        p->non_score_rewards[t] = kl_reward(trainer->kl_coef, p->kl[t]);
        p->rewards[t] = p->non_score_rewards[t];
    }

    /* 2. The score, at the answer's last token: it judges a text that was not complete before. If
     *    the answer ended by itself, that is the end token, which the judge does not read. */
    for (size_t b = 0; b < p->B; b++) {
        size_t last = p->start[b + 1] - 1;
        p->rewards[last] += scores[b];
    }
}

/* ppo_padding_advantage -- an oddity of TRL 0.11 with whiten_rewards, reproduced here so that the
 * numbers agree. TRL pads answers to one length. The rewards after a short answer's end are 0, and
 * whitening turns that 0 into another number. GAE, coming from the right, then passes `padding`
 * tokens with that reward before it reaches the answer: this is the advantage it brings along.
 * Without whiten_rewards the padding's reward is 0 and so is this.   test: ppo_advantages_golden */
static double ppo_padding_advantage(const struct PPOConfig *config, double padding_reward,
                                    size_t padding) {
    double advantage = 0;
    for (size_t k = 0; k < padding; k++)
        advantage = padding_reward + config->gamma * config->lam * advantage;
    return advantage;
}

/* ppo_advantages -- step 4 of ppo_step: how much better each token was than expected.
 *                                                  [glossary: Gradiente de política]
 * in   p->rewards, values (R)          out  p->advantages, returns (R)
 * gae goes through each answer from its end. Then the advantages of the whole batch are whitened
 * together: about half of the tokens are raised and half lowered, and the learning rate need not
 * fit the reward model's scale. Returns are not whitened: the value head has to learn real rewards.
 * By hand: chapter 4's answer, rewards -0.1, 0, 0.98, values 0.5, 0.4, 0.3: gae gives 0.3187,
 * 0.546, 0.68, whitened -1.0742, 0.1703, 0.9039; returns 0.8187, 0.946, 0.98.
 *                                                   test: ppo_example, ppo_advantages_golden */
static void ppo_advantages(const struct PPOConfig *config, struct PPOBatch *p) {
    /* 1. an option, off by default: rewards are scaled to variance 1, and keep their mean */
    double padding_reward = 0;
    if (config->whiten_rewards)
        padding_reward = whiten(p->rewards, p->R, false);

    /* 2. each answer by itself: nothing is expected after its end, except for TRL's padding */
    for (size_t b = 0; b < p->B; b++) {
        size_t start = p->start[b];
        size_t T = p->start[b + 1] - start;
        double behind = ppo_padding_advantage(config, padding_reward, p->padding[b]);
        gae(config, T, p->rewards + start, p->values + start, behind, p->advantages + start,
            p->returns + start);
    }

    /* 3. The whole batch together: if each answer were whitened by itself, a good one could not
     *    be told from a bad one. */
    whiten(p->advantages, p->R, true);
}

/* ---- PPO, statistics of an update ----------------------------------------------------------- */

/* The scalars of one mini-batch; stats_all has their means over all mini-batches of all epochs. */
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
static const char *const PPO_STAT_NAMES[PPO_STATS] = {
    [LOSS_POLICY] = "ppo/loss/policy",
    [LOSS_VALUE] = "ppo/loss/value",
    [LOSS_TOTAL] = "ppo/loss/total",
    [POLICY_ENTROPY] = "ppo/policy/entropy",
    [POLICY_APPROXKL] = "ppo/policy/approxkl",
    [POLICY_POLICYKL] = "ppo/policy/policykl",
    [POLICY_CLIPFRAC] = "ppo/policy/clipfrac",
    [POLICY_ADVANTAGES_MEAN] = "ppo/policy/advantages_mean",
    [POLICY_RATIO] = "ppo/policy/ratio_mean",
    [RETURNS_MEAN] = "ppo/returns/mean",
    [RETURNS_VAR] = "ppo/returns/var",
    [VAL_VPRED] = "ppo/val/vpred",
    [VAL_ERROR] = "ppo/val/error",
    [VAL_CLIPFRAC] = "ppo/val/clipfrac",
    [VAL_MEAN] = "ppo/val/mean",
    [VAL_VAR] = "ppo/val/var",
};

/* ppo_statistics -- what a mini-batch's update looks like, in TRL's names: means over its tokens.
 *   policykl  mean of old_logprob - logprob: how far the policy has moved since it wrote the
 *             answers, in nats per token; not to be confused with the KL to the reference
 *   approxkl  mean of half its square: another estimate of the same, never negative
 *   clipfrac  share of tokens that were clipped; far above 0.2, steps are too large
 *   vpred, val/mean   mean value now, and when the answers were written
 * out  stats, except POLICY_ENTROPY, which takes the logits           test: ppo_loss_golden */
static void ppo_statistics(const struct PPOTokens *tokens, struct PPOLoss loss,
                           double stats[PPO_STATS]) {
    /* most of what follows adds up from 0; the entropy is filled in by the caller */
    double n = (double)tokens->R;
    for (int i = 0; i < PPO_STATS; i++)
        stats[i] = 0;
    /* the losses are means already */
    stats[LOSS_POLICY] = loss.policy;
    stats[LOSS_VALUE] = loss.value;
    stats[LOSS_TOTAL] = loss.total;

    /* 1. means over the tokens */
    for (size_t t = 0; t < tokens->R; t++) {
        /* log of the ratio: above 0 if the token has become more probable since it was written */
        double log_ratio = (double)tokens->logprobs[t] - tokens->old_logprobs[t];
        stats[POLICY_APPROXKL] += 0.5 * log_ratio * log_ratio / n;
        stats[POLICY_POLICYKL] += -log_ratio / n;
        stats[POLICY_CLIPFRAC] += tokens->policy[t].is_clipped / n;
        stats[POLICY_ADVANTAGES_MEAN] += tokens->advantages[t] / n;
        stats[POLICY_RATIO] += tokens->policy[t].ratio / n;
        /* returns next to values: has the head found their scale? */
        stats[RETURNS_MEAN] += tokens->returns[t] / n;
        stats[VAL_VPRED] += tokens->values[t] / n;
        stats[VAL_ERROR] += tokens->value[t].squared_error / n;
        stats[VAL_CLIPFRAC] += tokens->value[t].is_clipped / n;
        stats[VAL_MEAN] += tokens->old_values[t] / n;
    }

    /* 2. variances, which need the means first; one token has none */
    for (size_t t = 0; t < tokens->R && tokens->R > 1; t++) {
        double dreturn = tokens->returns[t] - stats[RETURNS_MEAN];
        double dvalue = tokens->old_values[t] - stats[VAL_MEAN];
        stats[RETURNS_VAR] += dreturn * dreturn / (n - 1);
        stats[VAL_VAR] += dvalue * dvalue / (n - 1);
    }
}

/* For stats_all: the advantage and the ratio of each token in each update. They are kept only where
 * the caller has made room for them, as ppo_optimize does. */
static void ppo_keep_ratios(struct RolloutTrainer *trainer, const struct PPOTokens *tokens) {
    if (!trainer->ppo.ratio)
        return;
    /* as in TRL's log: one list, with the tokens of all updates of the step in turn */
    for (size_t t = 0; t < tokens->R; t++) {
        trainer->ppo.advantages[trainer->ppo.updated] = tokens->advantages[t];
        trainer->ppo.ratio[trainer->ppo.updated] =
            expf(tokens->logprobs[t] - tokens->old_logprobs[t]);
        trainer->ppo.updated++;
    }
}

/* ---- PPO, beside the step: some answers for trace.jsonl -------------------------------------- */

/* A step is shown if it is the first or the last of the run, or one of TRACE_STEPS in all that are
 * evenly spaced. Of each, as many answers as make TRACE_TOKENS tokens over all its epochs. With
 * rlhf's defaults the file then has less than 2 MB. */
enum { TRACE_STEPS = 13, TRACE_TOKENS = 640 };

/* By hand: of 25 steps every second one, 0, 2 .. 24; of 13 or fewer each one.
 *                                                                        test: ppo_trace_shows */
static bool ppo_trace_shows(size_t step, size_t steps) {
    /* with one interval to each pair of neighbours: does one begin here? */
    size_t intervals = TRACE_STEPS - 1;
    size_t last = MAX(steps, (size_t)2) - 1;
    return step == 0 || step * intervals / last != (step - 1) * intervals / last;
}

/* Steps 1 to 4 of ppo_step are done: chooses the answers that are shown, and keeps what is known of
 * them. All of it lies in the step's arena until the next step. */
static void ppo_trace_begin(struct RolloutTrainer *trainer, const struct Rollout *rollouts,
                            const struct PPOBatch *p, const float *scores) {
    struct PPOTrace *trace = &trainer->ppo.trace;
    size_t epochs = trainer->ppo.config.ppo_epochs;
    trace->answers = 0;
    if (!trace->is_wanted || !ppo_trace_shows(trainer->step, trainer->total_steps))
        return;

    /* 1. at least one answer, however long */
    size_t n = 1;
    while (n < p->B && p->start[n + 1] * epochs <= TRACE_TOKENS)
        n++;
    trace->answers = n;
    trace->R = p->start[n];
    trace->epochs = 0;
    trace->rollouts = rollouts;
    trace->scores = scores;
    struct PPOBatch *kept = arena_alloc(&trainer->arena, 1, sizeof *kept);
    *kept = *p;
    trace->batch = kept;

    /* 2. Before the first epoch the policy is the one that wrote them. */
    trace->logprobs = arena_floats(&trainer->arena, (epochs + 1) * trace->R);
    memcpy(trace->logprobs, p->logprobs, trace->R * sizeof *trace->logprobs);

    /* 3. gae's advantages, which whitening has overwritten: each is return - value. A reader who
     *    has only some of the answers needs the whole batch's mean and deviation. */
    float *advantages = arena_floats(&trainer->arena, p->R);
    for (size_t t = 0; t < p->R; t++)
        advantages[t] = p->returns[t] - p->values[t];
    trace->advantage_mean = mean_of(advantages, p->R);
    trace->advantage_std = sqrt(unbiased_variance(advantages, p->R));
}

/* An epoch is done: what does the policy say of these answers now? */
static void ppo_trace_epoch(struct RolloutTrainer *trainer) {
    struct PPOTrace *trace = &trainer->ppo.trace;
    if (trace->answers == 0)
        return;
    struct Arena arena = {0};
    struct Example *examples = rollout_examples(&arena, trace->rollouts, trace->answers);
    struct PPOForward *now = ppo_forward(trainer, &arena, examples, trace->answers, false);
    trace->epochs++;
    memcpy(trace->logprobs + trace->epochs * trace->R, now->head.logprob,
           trace->R * sizeof *trace->logprobs);
    arena_free(&arena);
}

/* ---- PPO, step 5: updates ------------------------------------------------------------------- */

/* The tokens of some answers in one row: what was known of them when they were written, next to
 * what the policy says now.      in   member (count): which answers of the batch, in this order
 * `forward` is a pass over the same answers in the same order: token t is the same in both. */
static struct PPOTokens ppo_gather(struct Arena *arena, const struct PPOBatch *p,
                                   const size_t *member, size_t count,
                                   const struct PPOForward *forward) {
    size_t R = forward->batch.R;
    struct PPOTokens tokens = {
        /* from the rollout: copied, since the members are scattered over the batch */
        .old_logprobs = arena_floats(arena, R),
        .old_values = arena_floats(arena, R),
        .advantages = arena_floats(arena, R),
        .returns = arena_floats(arena, R),
        /* what the policy says now */
        .logprobs = forward->head.logprob,
        .values = forward->values,
        /* room for what ppo_loss computes from both */
        .policy = arena_alloc(arena, R, sizeof *tokens.policy),
        .value = arena_alloc(arena, R, sizeof *tokens.value),
        .dlogprobs = arena_floats(arena, R),
        .dvalues = arena_floats(arena, R),
    };

    /* tokens.R grows from 0 to R as answer after answer is copied */
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

/* ppo_weigh -- multiplies the slopes of a mini-batch by its weight in the optimizer's step, or sets
 * them to 0 if the policy ran away. A mean ratio above ratio_threshold means that it has gone so
 * far that the old policy's answers say nothing about it: as in TRL, the mini-batch is skipped.
 * in, out  tokens->dlogprobs, dvalues (R); stats                          test: ppo_guards */
static void ppo_weigh(const struct RolloutTrainer *trainer, struct PPOTokens *tokens, double weight,
                      double stats[PPO_STATS]) {
    /* 1. Do these answers still say anything about this policy? */
    bool is_skipped = stats[POLICY_RATIO] > trainer->ppo.config.ratio_threshold;
    if (is_skipped) {
        warn("ppo: step %zu: the mean probability ratio %.1f exceeds --ratio_threshold %.1f; this "
             "mini-batch is skipped",
             trainer->step, stats[POLICY_RATIO], trainer->ppo.config.ratio_threshold);
        stats[LOSS_POLICY] = 0;
        stats[LOSS_VALUE] = 0;
        stats[LOSS_TOTAL] = 0;
    }

    /* 2. The weight. A skipped slope is set to 0, not multiplied by 0: if it has become infinite,
     *    the product would be NaN. */
    for (size_t t = 0; t < tokens->R; t++) {
        tokens->dlogprobs[t] = is_skipped ? 0 : (float)(tokens->dlogprobs[t] * weight);
        tokens->dvalues[t] = is_skipped ? 0 : (float)(tokens->dvalues[t] * weight);
    }
}

/* Back through the model. The output layer and the value head read the same hidden vectors: their
 * gradients add up in dhidden (N,C), and one pass through the blocks serves both. */
static void ppo_backward(struct GPT2 *model, struct Arena *arena, struct PPOForward *forward,
                         const struct PPOTokens *tokens) {
    /* d loss / d hidden, from both heads; rows that predict nothing stay 0 */
    float *dhidden = arena_zeros(arena, forward->batch.N * model->config.n_embd, sizeof *dhidden);
    lm_head_backward(model, &forward->head, tokens->dlogprobs, dhidden, arena);
    scalar_head_backward(dhidden, tokens->dvalues, forward->head.acts.ln_f, forward->batch.row,
                         tokens->R, &model->v_head.weight, &model->v_head.bias);

    /* from the last block to the embeddings: here the policy's weights get their gradients */
    gpt2_backward(model, arena, &forward->head.acts, dhidden);
}

/* ppo_mini_batch -- forward and backward over some answers of the batch.
 *                                     [glossary: Otimização de política proximal (PPO)]
 * in   member (count): which answers; weight: of their gradient in the optimizer's step
 * out  stats; gradients are added to the model's                        test: ppo_gradient */
static void ppo_mini_batch(struct RolloutTrainer *trainer, const struct Rollout *rollouts,
                           const struct PPOBatch *p, const size_t *member, size_t count,
                           double weight, double stats[PPO_STATS]) {
    /* The arena holds one mini-batch's activations: they are by far the largest part of memory,
     * and mini_batch_size decides how large. */
    struct Arena *arena = &trainer->ppo.epoch_arena;
    arena_reset(arena);
    trainer->model->trace.has_acts = false; /* those of the mini-batch before */

    /* 1. What does the policy say of these answers now? Before any weight has moved, that is what
     *    step 2 of ppo_step found: if the mini-batch has all answers, no second pass is needed. */
    struct Example *examples = arena_alloc(arena, count, sizeof *examples);
    for (size_t i = 0; i < count; i++)
        examples[i] = rollouts[member[i]].example;
    struct PPOForward *forward = p->forward;
    if (!p->fresh)
        forward = ppo_forward(trainer, arena, examples, count, true);

    /* 2. The loss of each token, and its slopes by log-probability and value. What was known when
     *    the answers were written (old log-probabilities, advantages, returns) is constant. */
    struct PPOTokens tokens = ppo_gather(arena, p, member, count, forward);
    struct PPOLoss loss = ppo_loss(&trainer->ppo.config, &tokens);

    /* 3. The statistics come first: by the mean ratio, ppo_weigh decides about the slopes. */
    ppo_statistics(&tokens, loss, stats);
    stats[POLICY_ENTROPY] = (double)row_sum(forward->head.entropy, tokens.R) / (double)tokens.R;
    ppo_keep_ratios(trainer, &tokens);

    /* 4. The slopes, weighted, go back through the model. */
    ppo_weigh(trainer, &tokens, weight, stats);
    ppo_backward(trainer->model, arena, forward, &tokens);
}

/* ppo_update -- one step of the optimizer, on gradient_accumulation_steps mini-batches of answers.
 * The weights move once, by the mean of their gradients, as if they had been one larger mini-batch,
 * for which there may be no memory.
 * in   member: which answers, mini-batch after mini-batch
 * out  stats: of the last mini-batch; sums: those of each are added */
static void ppo_update(struct RolloutTrainer *trainer, const struct Rollout *rollouts,
                       struct PPOBatch *p, const size_t *member, double stats[PPO_STATS],
                       double sums[PPO_STATS]) {
    size_t accumulation = trainer->ppo.config.gradient_accumulation_steps;
    size_t count = trainer->ppo.config.mini_batch_size;
    /* 1. gradients add up in the model; a loss that is NaN ends the run before a weight moves */
    for (size_t i = 0; i < accumulation; i++) {
        ppo_mini_batch(trainer, rollouts, p, member + i * count, count, 1 / (double)accumulation,
                       stats);
        check_finite(trainer->model, "the loss", stats[LOSS_TOTAL]);
        for (int k = 0; k < PPO_STATS; k++)
            sums[k] += stats[k];
    }

    /* 2. the weights move, and the gradients are 0 again */
    optimizer_step(trainer->model, &trainer->args, rollout_learning_rate(trainer),
                   ++trainer->ppo.optimizer_steps);

    /* from now on this is not the policy that wrote the answers: each update needs its own pass */
    p->fresh = false;
}

/* ppo_optimize -- step 5 of ppo_step: ppo_epochs passes over the batch, in mini-batches that are
 * shuffled anew each time.                                              [6] Algorithm 1
 * Writing answers is the expensive part of a step, so each batch of them is used several times; the
 * clip in ppo_token_loss limits how far the policy may move meanwhile.
 * out  sums: the statistics of all mini-batches, added up; returns how many those were
 *                                                             test: ppo_step, ppo_threads */
static size_t ppo_optimize(struct RolloutTrainer *trainer, const struct Rollout *rollouts,
                           struct PPOBatch *p, double sums[PPO_STATS]) {
    const struct PPOConfig *config = &trainer->ppo.config;
    size_t B = config->batch_size;
    size_t per_update = config->mini_batch_size * config->gradient_accumulation_steps;
    size_t mini_batches = 0;
    double stats[PPO_STATS] = {0};

    /* mini-batches consist of whole answers, not of tokens: the model reads sequences */
    size_t *order = arena_alloc(&trainer->arena, B, sizeof *order);

    /* for the log: each token's advantage and ratio in each epoch */
    trainer->ppo.advantages = arena_floats(&trainer->arena, config->ppo_epochs * p->R);
    trainer->ppo.ratio = arena_floats(&trainer->arena, config->ppo_epochs * p->R);
    trainer->ppo.updated = 0;
    for (size_t epoch = 0; epoch < config->ppo_epochs; epoch++) {
        /* 1. A new order, if there are several updates: one on all answers has the same gradient
         *    in any order. */
        for (size_t b = 0; b < B; b++)
            order[b] = b;
        if (per_update < B)
            rng_shuffle(&trainer->ppo.order, order, B);

        /* 2. one update of the weights for each part of that order */
        for (size_t first = 0; first < B; first += per_update) {
            ppo_update(trainer, rollouts, p, order + first, stats, sums);
            mini_batches += config->gradient_accumulation_steps;
        }

        ppo_trace_epoch(trainer);

        /* 3. Has the policy moved too far from the one that wrote these answers to learn more from
         *    them? As in TRL, the last mini-batch decides. */
        if (config->early_stopping && stats[POLICY_POLICYKL] > 1.5 * config->target_kl)
            break;
    }
    return mini_batches;
}

/* ---- PPO, step 6: statistics of a step ------------------------------------------------------ */

/* ppo_kl -- the divergence from the reference, in nats per answer: the sum of p->kl over an
 * answer's tokens, averaged over the B answers. TRL's objective/kl, which the controller steers. */
static double ppo_kl(const struct PPOBatch *p) {
    double kl = 0;
    for (size_t t = 0; t < p->R; t++)
        kl += p->kl[t] / (double)p->B;
    return kl;
}

static void stats_vector(struct RolloutTrainer *trainer, const char *name, const float *x, size_t n,
                         const size_t *start) {
    trainer->ppo.vectors[trainer->ppo.vector_count++] = (struct StatsVector){name, x, n, start};
}

/* Logs the mean and the standard deviation of n numbers, one per rollout. */
static void stats_mean_std(struct RolloutTrainer *trainer, const char *mean_name,
                           const char *std_name, const float *x, size_t n) {
    log_value(&trainer->stats, mean_name, mean_of(x, n));
    log_value(&trainer->stats, std_name, n > 1 ? sqrt(unbiased_variance(x, n)) : NAN);
}

/* Logs what the rollouts were: scores before and after ppo_process_scores, lengths of queries and
 * responses. */
static void ppo_record_rollouts(struct RolloutTrainer *trainer, const struct Rollout *rollouts,
                                const float *scores, size_t B) {
    /* 1. per rollout, one number of each kind; float, like all the log's vectors */
    float *query = arena_floats(&trainer->arena, B);
    float *response = arena_floats(&trainer->arena, B);
    float *reward = arena_floats(&trainer->arena, B);
    for (size_t b = 0; b < B; b++) {
        reward[b] = rollouts[b].score;
        query[b] = (float)rollouts[b].example.prompt_length;
        response[b] = (float)rollouts[b].response_length;
    }

    /* 2. Means and deviations, and the numbers they summarize: only these show, for example, that
     *    half of the answers score well and half badly. */
    stats_mean_std(trainer, "env/reward_mean", "env/reward_std", reward, B);
    stats_mean_std(trainer, "ppo/mean_scores", "ppo/std_scores", scores, B);
    stats_mean_std(trainer, "tokens/queries_len_mean", "tokens/queries_len_std", query, B);
    stats_mean_std(trainer, "tokens/responses_len_mean", "tokens/responses_len_std", response, B);
    stats_vector(trainer, "env/reward_dist", reward, B, NULL);
    stats_vector(trainer, "tokens/queries_dist", query, B, NULL);
    stats_vector(trainer, "tokens/responses_dist", response, B, NULL);
}

/* Logs how far the policy was from the reference when it wrote the answers. The entropy is here an
 * estimate from the tokens drawn, -log pi summed over an answer. kl_k3, the estimate that is never
 * negative, is not in TRL's log. */
static void ppo_record_objective(struct RolloutTrainer *trainer, const struct PPOBatch *p) {
    /* 1. As in TRL, KL and entropy are sums over an answer's tokens, averaged over the B answers;
     *    the reward without the score is averaged over tokens. */
    double k3 = 0;
    double entropy = 0;
    double non_score_reward = 0;
    for (size_t t = 0; t < p->R; t++) {
        k3 += kl_k3(p->logprobs[t], p->ref_logprobs[t]) / (double)p->B;
        entropy -= p->logprobs[t] / (double)p->B;
        non_score_reward += p->non_score_rewards[t] / (double)p->R;
    }

    /* 2. the divergence of each answer by itself; their mean is objective/kl */
    float *kl_dist = arena_zeros(&trainer->arena, p->B, sizeof *kl_dist);
    for (size_t b = 0; b < p->B; b++)
        for (size_t t = p->start[b]; t < p->start[b + 1]; t++)
            kl_dist[b] += p->kl[t];

    /* 3. kl_coef is the beta that these rewards were computed with: step 7 has yet to move it */
    log_value(&trainer->stats, "objective/kl", ppo_kl(p));
    log_value(&trainer->stats, "objective/kl_k3", k3);
    log_value(&trainer->stats, "objective/kl_coef", trainer->kl_coef);
    log_value(&trainer->stats, "objective/entropy", entropy);
    log_value(&trainer->stats, "ppo/mean_non_score_reward", non_score_reward);
    stats_vector(trainer, "objective/kl_dist", kl_dist, p->B, NULL);
    stats_vector(trainer, "objective/logprobs", p->logprobs, p->B, p->start);
    stats_vector(trainer, "objective/ref_logprobs", p->ref_logprobs, p->B, p->start);
}

/* ppo_record_stats -- step 6 of ppo_step: TRL's stats dictionary. Of its matrices, which TRL pads,
 * only the response tokens are kept.                              [glossary: Stats_all]
 * in   sums: ppo_statistics of all mini-batches, added up
 * out  trainer->stats, vectors                                           test: ppo_loss_golden */
static void ppo_record_stats(struct RolloutTrainer *trainer, const struct Rollout *rollouts,
                             const struct PPOBatch *p, const float *scores,
                             const double sums[PPO_STATS], size_t mini_batches) {
    /* drop the last step's numbers */
    trainer->stats.n = 0;
    trainer->ppo.vector_count = 0;

    /* 1. what was written, and how far from the reference */
    ppo_record_rollouts(trainer, rollouts, scores, p->B);
    ppo_record_objective(trainer, p);

    /* 2. What was learnt: means over all mini-batches. var_explained is the share of the returns'
     *    variance that the value head predicted: 1 if all of it, 0 or less if a constant would have
     *    done as well. */
    for (int i = 0; i < PPO_STATS; i++)
        if (i != POLICY_RATIO)
            log_value(&trainer->stats, PPO_STAT_NAMES[i], sums[i] / (double)mini_batches);
    log_value(&trainer->stats, "ppo/val/var_explained", 1 - sums[VAL_ERROR] / sums[RETURNS_VAR]);
    log_value(&trainer->stats, "ppo/learning_rate", rollout_learning_rate(trainer));
    stats_vector(trainer, "ppo/policy/advantages", trainer->ppo.advantages, trainer->ppo.updated,
                 NULL);
    stats_vector(trainer, "ppo/policy/ratio", trainer->ppo.ratio, trainer->ppo.updated, NULL);
}

/* The parts of a step whose time is logged, each from the end of the one before it. */
enum PPOLap { LAP_FORWARD, LAP_REWARDS, LAP_ADVANTAGES, LAP_OPTIMIZE, LAP_STATS, PPO_LAPS };

struct PPOClock {
    double begin, last; /* seconds_now */
    double lap[PPO_LAPS]; /* seconds */
};

/* This part of the step is done: how long did it take? */
static void ppo_lap(struct PPOClock *clock, enum PPOLap lap) {
    double now = seconds_now();
    clock->lap[lap] = now - clock->last;
    clock->last = now;
}

/* Logs the times, in TRL's names. */
static void ppo_record_times(struct RolloutTrainer *trainer, const struct PPOClock *clock) {
    log_value(&trainer->stats, "time/ppo/forward_pass", clock->lap[LAP_FORWARD]);
    log_value(&trainer->stats, "time/ppo/compute_rewards", clock->lap[LAP_REWARDS]);
    log_value(&trainer->stats, "time/ppo/compute_advantages", clock->lap[LAP_ADVANTAGES]);
    log_value(&trainer->stats, "time/ppo/optimize_step", clock->lap[LAP_OPTIMIZE]);
    log_value(&trainer->stats, "time/ppo/calc_stats", clock->lap[LAP_STATS]);
    log_value(&trainer->stats, "time/ppo/total", clock->last - clock->begin);
}

/* ---- PPO: the step -------------------------------------------------------------------------- */

/* ppo_step -- the whole of PPO: from batch_size rollouts to a better policy.
 *                 [glossary: Treinador PPO] [glossary: Otimização de política proximal (PPO)]
 * in   rollouts (batch_size): answers of the policy as it is now, with their scores
 * out  the policy's weights, trainer->kl_coef; trainer->stats and vectors, for the log
 * TRL's PPOTrainer.step(queries, responses, scores). Chapter 4 explains step 3 at kl_reward, 4 at
 * gae_step, 5 at ppo_token_loss and ppo_value_loss, 7 at kl_controller_update.
 *             test: ppo_step, ppo_raises_reward, check_fidelity ppo*; gdb: break ppo_step */
static void ppo_step(struct RolloutTrainer *trainer, const struct Rollout *rollouts) {
    size_t B = trainer->batch_size;
    arena_reset(&trainer->arena);

    /* 1. How good was each answer? One number per answer. */
    float *scores = arena_floats(&trainer->arena, B);
    for (size_t b = 0; b < B; b++)
        scores[b] = rollouts[b].score;
    ppo_process_scores(trainer, scores, B);
    struct PPOClock clock = {.begin = seconds_now()};
    clock.last = clock.begin;

    /* 2. Policy and reference read the answers. From here on there are numbers per token: its
     *    log-probability under both, and what the value head expected before it. */
    struct PPOBatch p = ppo_evaluate_rollouts(trainer, rollouts);
    ppo_lap(&clock, LAP_FORWARD);

    /* 3. J, token by token: the price of leaving the reference, and the score. */
    ppo_rewards(trainer, &p, scores);
    ppo_lap(&clock, LAP_REWARDS);

    /* 4. Which token earned it? Advantages for the policy, returns for the value head. */
    ppo_advantages(&trainer->ppo.config, &p);
    ppo_trace_begin(trainer, rollouts, &p, scores);
    ppo_lap(&clock, LAP_ADVANTAGES);

    /* 5. Several epochs of updates on the same answers. Only here do weights move. */
    double sums[PPO_STATS] = {0};
    size_t mini_batches = ppo_optimize(trainer, rollouts, &p, sums);
    ppo_lap(&clock, LAP_OPTIMIZE);

    /* 6. What happened, for the log. */
    ppo_record_stats(trainer, rollouts, &p, scores, sums, mini_batches);

    /* 7. Was the policy farther from the reference than its target? Then a nat of KL costs more
     *    in the next step. */
    trainer->kl_coef = kl_controller_update(&trainer->ppo.config, trainer->kl_coef, ppo_kl(&p), B);
    trainer->step++;
    ppo_lap(&clock, LAP_STATS);
    ppo_record_times(trainer, &clock);
}

/* ---- The training --------------------------------------------------------------------------- */

/* What a run on rollouts needs to go on as if it had never stopped, besides weights and optimizer:
 * beta, moments, counters, and its place among the prompts and in each stream of random numbers.
 * A checkpoint stores pointers into ppo and source, so neither may move until the run ends.
 *                                                                       test: checkpoint_* */
static void rollout_checkpoint(struct Checkpoint *checkpoint, struct RolloutTrainer *trainer,
                               struct RolloutSource *source) {
    /* 1. The trainer. _fixed: with another batch size, a step would be another number of prompts,
     *    and `at` would not be where the step count says. */
    double *moments = (double *)&trainer->moments; /* a struct of doubles */
    checkpoint_add_fixed(checkpoint, "batch_size", trainer->batch_size, "--batch_size");
    checkpoint_add_doubles(checkpoint, "kl_coef", &trainer->kl_coef, 1);
    checkpoint_add_doubles(checkpoint, "moments", moments,
                           sizeof trainer->moments / sizeof *moments);
    checkpoint_add_sizes(checkpoint, "optimizer_steps", &trainer->ppo.optimizer_steps, 1, SIZE_MAX);
    checkpoint_add_random(checkpoint, "mini_batches", &trainer->ppo.order);

    /* 2. The prompts. */
    checkpoint_add_fixed(checkpoint, "prompts", source->n, "the number of prompts");
    checkpoint_add_sizes(checkpoint, "order", source->order, source->n, source->n - 1);
    checkpoint_add_sizes(checkpoint, "at", &source->at, 1, source->n);
    checkpoint_add_random(checkpoint, "shuffle", &source->shuffle);
    checkpoint_add_random(checkpoint, "lengths", &source->lengths);
    checkpoint_add_random(checkpoint, "sample", &source->sample);
}

/* Each step adds one line to stats_all.jsonl, batch_size lines to rollouts.jsonl and, if it is
 * shown, one line an epoch to trace.jsonl. They are flushed, so that a run can be watched and a
 * checkpoint knows how long they are. */
static void rollout_write_logs(struct RolloutTrainer *trainer, struct Output *logs,
                               const struct Rollout *rollouts, double rollout_seconds) {
    /* how long writing the answers took, only the caller knows */
    log_value(&trainer->stats, "time/ppo/rollout", rollout_seconds);
    stats_write_line(logs[LOG_STATS].file, trainer);
    rollouts_write(logs[LOG_ROLLOUTS].file, rollouts, trainer->batch_size);
    trace_write(logs[LOG_TRACE].file, trainer);
    for (int i = 0; i < LOG_FILES; i++)
        output_flush(&logs[i]);
}

/* After a step: a progress line; every logging_steps, and after the last step, an entry in the log
 * history; and on a terminal, now and then, the first answer with its score. */
static void rollout_report(struct RolloutTrainer *trainer, struct TrainerState *state,
                           struct Arena *arena, const struct Rollout *rollouts) {
    /* 1. Is an entry of the history due, and a line on the terminal? */
    bool is_last = trainer->step == state->max_steps;
    bool is_due = trainer->step % trainer->args.logging_steps == 0 || is_last;
    bool is_said = is_due;
    if (trainer->args.say_steps)
        is_said = trainer->step % trainer->args.say_steps == 0 || is_last;

    /* 2. for the person: what the policy writes tells more than its mean reward */
    const char *score = arena_printf(arena, "%+.2f  ", rollouts->score);
    if (progress_sampling(trainer->step, state->max_steps))
        sample_show(trainer->tok, &rollouts->example, trainer->model->config.vocab_size, score);
    state_say(state, trainer->name, &trainer->stats, is_said);

    /* 3. For the files. step and epoch are added only now: the progress line counts by itself. */
    log_value(&trainer->stats, "step", (double)trainer->step);
    log_value(&trainer->stats, "epoch", state->epoch);
    if (is_due)
        *state_log(state) = trainer->stats;
}

/* Where the training is: an epoch is a pass over the n prompts, or over the n stored rollouts. */
static void rollout_count(const struct RolloutTrainer *trainer, struct TrainerState *state,
                          const struct Rollout *rollouts, size_t n) {
    size_t B = trainer->batch_size;
    state->global_step = trainer->step;
    /* batch_size answers belong to batch_size / num_generations prompts */
    state->epoch = (double)(trainer->step * B / trainer->num_generations) / (double)n;
    for (size_t b = 0; b < B; b++)
        state->num_tokens += rollouts[b].example.n;
}

/* One step of the training: get rollouts, and learn from them.
 * in   logs: the files of LOGS, or NULL       out  rollouts (batch_size), in `arena` */
static void rollout_train_step(struct RolloutTrainer *trainer, struct RolloutSource *source,
                               struct Arena *arena, struct Output *logs, struct Rollout *rollouts) {
    double begin = seconds_now();

    /* named by the message if a number turns out to be NaN or infinite */
    trainer->model->trace.task = trainer->name;
    trainer->model->trace.step = trainer->step + 1;

    /* 1. The policy, as it is now, answers; or stored answers take the place of its own. */
    if (source->replay)
        replay_rollouts(source->replay, trainer->step, trainer->model, arena, rollouts,
                        trainer->batch_size);
    else
        collect_rollouts(trainer, source, arena, rollouts);
    double rollout_seconds = seconds_now() - begin;

    /* 2. It learns from them. */
    if (trainer->algorithm == ALGORITHM_PPO)
        ppo_step(trainer, rollouts);
    else
        reinforce_step(trainer, rollouts);
    if (logs)
        rollout_write_logs(trainer, logs, rollouts, rollout_seconds);
}

/* rollout_train -- the whole training, by PPO or REINFORCE.         [glossary: Treinador PPO]
 * in   source: where rollouts come from; steps: how many; log_dir: for the
 *      files of LOGS, or NULL                      out  the policy's weights; state, its history
 *                                                            test: ppo_replay, checkpoint_* */
static void rollout_train(struct RolloutTrainer *trainer, struct RolloutSource *source,
                          size_t steps, const char *log_dir, struct TrainerState *state) {
    struct Arena arena = {0};
    struct Output logs[LOG_FILES];
    /* epochs are counted in prompts, or in stored rollouts */
    size_t n = source->replay ? source->replay->n : source->n;
    state->max_steps = steps;
    trainer->total_steps = steps;

    /* 1. from the start, or from where an earlier run stopped */
    struct Checkpoint checkpoint =
        checkpoint_new(trainer->name, trainer->model, trainer->tok, &trainer->args, state);

    /* The logs grow with each step. A resumed run cuts them to their length at the checkpoint,
     * or the steps after it would be logged twice. */
    if (log_dir) {
        make_folder(log_dir);
        checkpoint.logs = logs;
        checkpoint.log_dir = log_dir;
        trainer->ppo.trace.is_wanted = true;
        trainer->ppo.trace.scorer = source->replay ? NULL : &source->scorer;
        checkpoint_add_sizes(&checkpoint, "log_bytes", checkpoint.log_bytes, COUNT(LOGS), SIZE_MAX);
    }
    rollout_checkpoint(&checkpoint, trainer, source);
    checkpoint_resume(&checkpoint);
    trainer->step = state->global_step;
    while (trainer->step < steps) {
        /* 2. rollouts, and a step of PPO or REINFORCE on them; the last ones are forgotten */
        arena_reset(&arena);
        struct Rollout *rollouts = arena_alloc(&arena, trainer->batch_size, sizeof *rollouts);
        rollout_train_step(trainer, source, &arena, log_dir ? logs : NULL, rollouts);

        /* 3. count the step, then report it */
        rollout_count(trainer, state, rollouts, n);
        rollout_report(trainer, state, &arena, rollouts);

        /* 4. a checkpoint if one is due; after Ctrl-C the program ends here */
        checkpoint_step(&checkpoint);
    }

    /* 5. the logs are complete, and get their final names */
    for (int i = 0; log_dir && i < LOG_FILES; i++)
        output_close(&logs[i]);
    state->num_train_epochs = ceil(state->epoch);
    arena_free(&arena);
}

/* =============================================================================================
 * Chapter 18 - DPO, collected preferences
 *                              [glossary: Otimização de preferência direta (DPO)]
 *
 * Chapter 5 on a real model: how does a policy learn from pairs alone? Each pair takes four
 * log-probabilities of whole answers: chosen and rejected, under the policy and the reference.
 *
 *                   chosen answer         rejected answer
 *     reference        -10.0                   -12.0           computed once, then remembered
 *     policy            -8.0                   -13.0           at every step, with a gradient
 *     loss          -log sigmoid(0.1 * (2 - (-1))) = 0.5544    dpo_pair_loss
 *
 * The reference never changes, so its log-probabilities are computed only when a pair is seen for
 * the first time. The two answers of a pair share a prompt; where that saves time, the model reads
 * it once for both.
 *
 * What enters: pairs of answers, one of them preferred; or a policy and a scorer, from whose
 * answers pairs are collected. What leaves: a policy that prefers as the pairs do.
 * ============================================================================================= */

/* What the Trainer of chapter 14 knows of DPO; arrays of two are indexed by enum Items. */
struct DPOTask {
    struct DPOConfig config;
    struct GPT2 *ref_model;
    struct Example *pairs[2]; /* pair i: 2i chosen, 2i+1 rejected */
    double *ref_logps[2]; /* (2n) of the reference; 0 until first needed */
    double temperature; /* divides the logits of both models */
    double eval_nll; /* -log pi of the held-out chosen answers, summed */
    size_t eval_tokens; /* how many tokens those have: the loss type sft is a mean over tokens */
};

/* ---- One batch of pairs --------------------------------------------------------------------- */

/* B pairs as a batch of 2B sequences: all chosen ones, then all rejected ones. C: the model's
 * width, by which collate_pairs decides whether sharing the prompts pays.
 * in   index (B): which pairs     out  slot (2B): the index of each sequence in `pairs` */
static struct Batch dpo_batch(struct Arena *arena, const struct Example *pairs, const size_t *index,
                              size_t B, size_t C, size_t *slot) {
    struct Example *examples = arena_alloc(arena, 2 * B, sizeof *examples);
    /* Sides b and B + b are a pair, and the rows of each kind are adjacent: the metrics can take
     * means over the chosen ones alone. */
    for (size_t i = 0; i < 2 * B; i++) {
        /* i / B is 0 for the chosen side, 1 for the rejected one */
        slot[i] = 2 * index[i % B] + i / B;
        examples[i] = pairs[slot[i]];
    }
    return collate_pairs(arena, examples, B, C);
}

/* Whether the reference has judged all of B pairs. The log-probability of an answer is below 0, so
 * a 0 means that it has not been computed yet. (An answer cut down to nothing has 0: computed each
 * time, it costs a little and changes nothing.) */
static bool dpo_reference_known(const double *ref_logps, const size_t *index, size_t B) {
    for (size_t i = 0; i < B; i++)
        /* the chosen side tells for both: they are always computed together */
        if (ref_logps[2 * index[i]] == 0)
            return false;
    return true;
}

/* dpo_reference -- the reference's log-probabilities of B pairs.  [glossary: Modelo de referência]
 * in, out  ref_logps (2n): of all pairs; those of the B are computed, if one of them is missing
 * Computed once and used in every epoch: otherwise each step would run a second model to get
 * numbers that are known already. The arena is empty before and after, so that the activations of
 * the two models are never in memory together.                     test: dpo_model_gradient */
static void dpo_reference(struct DPOTask *task, struct Arena *arena, const struct Example *pairs,
                          const size_t *index, size_t B, double *ref_logps) {
    if (dpo_reference_known(ref_logps, index, B))
        return;

    /* 1. One pass over both sides. It keeps no activations, since the reference is not trained. */
    size_t *slot = arena_alloc(arena, 2 * B, sizeof *slot);
    double *logps = arena_alloc(arena, 2 * B, sizeof *logps);
    struct Batch batch = dpo_batch(arena, pairs, index, B, task->ref_model->config.n_embd, slot);
    struct LMHead head = batch_logprobs(task->ref_model, arena, &batch, task->temperature, false);
    sum_target_logps(&batch, 2 * B, head.logprob, logps);

    /* 2. from the batch's order back to that of the pairs: the next epoch shuffles them anew */
    for (size_t i = 0; i < 2 * B; i++)
        ref_logps[slot[i]] = logps[i];
    arena_reset(arena);
}

/* What dpo_loss needs of 2B answers, the chosen ones first.
 * in   token_logprobs (R): the policy's, one per token; ref_logps (2B): the reference's, one per
 *      answer, in the batch's order
 * returns 2B sides: chosen ones, then rejected ones */
static struct DPOSide *dpo_sides(struct Arena *arena, const struct Batch *batch,
                                 const float *token_logprobs, const double *ref_logps, size_t B) {
    /* 1. log pi(y|x) of each answer: the sum of its tokens' log-probabilities */
    double *logps = arena_alloc(arena, 2 * B, sizeof *logps);
    struct DPOSide *sides = arena_alloc(arena, 2 * B, sizeof *sides);
    sum_target_logps(batch, 2 * B, token_logprobs, logps);

    /* 2. next to the reference's, and the length, by which the loss types ipo and sft divide */
    for (size_t i = 0; i < 2 * B; i++)
        sides[i] = (struct DPOSide){
            .logp = logps[i],
            .ref_logp = ref_logps[i],
            .length = batch->target_start[i + 1] - batch->target_start[i],
        };
    return sides;
}

/* ---- Metrics -------------------------------------------------------------------------------- */

/* Sums over B pairs, for the metrics of dpo_metrics. */
struct DPOSums {
    double rewards_chosen, rewards_rejected; /* implied_reward */
    double right; /* pairs whose chosen answer has the larger implied reward */
    double logps_chosen, logps_rejected; /* nats */
};

/* By hand: chapter 5's pair, beta 0.1, chosen -8 (reference -10), rejected -13 (-12): implied
 * rewards 0.2 and -0.1, so the policy orders it correctly; log pi -8 and -13.    test: dpo_hand */
static struct DPOSums dpo_sums(double beta, size_t B, const struct DPOSide *chosen,
                               const struct DPOSide *rejected) {
    struct DPOSums sums = {0};
    for (size_t b = 0; b < B; b++) {
        /* what the policy, read as a reward model, says of the two answers (chapter 5) */
        double reward_chosen = implied_reward(beta, chosen[b].logp, chosen[b].ref_logp);
        double reward_rejected = implied_reward(beta, rejected[b].logp, rejected[b].ref_logp);
        sums.rewards_chosen += reward_chosen;
        sums.rewards_rejected += reward_rejected;
        /* equal rewards do not count: at the start, policy and reference agree on every pair */
        sums.right += reward_chosen > reward_rejected;
        /* these tell what the margin hides: whether both answers have become less probable */
        sums.logps_chosen += chosen[b].logp;
        sums.logps_rejected += rejected[b].logp;
    }
    return sums;
}

/* dpo_metrics -- what TRL logs of DPO: sums over B pairs or their tokens, and how many those are.
 *   rewards/chosen     implied reward: beta times the rise of log pi; rewards/rejected likewise
 *   rewards/accuracies share of pairs whose chosen answer has the larger implied reward
 *   rewards/margins    chosen minus rejected: what the loss enlarges
 *   logps/chosen       log pi of whole answers; logps/rejected likewise. If logps/chosen falls too,
 *                      the policy unlearns good answers with the bad ones: see the loss type sft
 *                                                                     test: dpo_model_gradient */
static void dpo_metrics(struct Trainer *trainer, double beta, const struct Batch *batch,
                        const struct LMHead *head, size_t B, const struct DPOSide *sides) {
    struct DPOSums sums = dpo_sums(beta, B, sides, sides + B);

    /* 1. The two halves differ in tokens. Token accuracy is taken on the chosen half alone: nobody
     *    wants the policy to predict rejected answers. */
    size_t chosen_rows = batch->target_start[B];
    size_t rejected_rows = batch->R - chosen_rows;
    const struct {
        const char *name;
        double sum;
        size_t units;
    } metrics[] = {
        {"rewards/chosen", sums.rewards_chosen, B},
        {"rewards/rejected", sums.rewards_rejected, B},
        {"rewards/accuracies", sums.right, B},
        {"rewards/margins", sums.rewards_chosen - sums.rewards_rejected, B},
        {"logps/chosen", sums.logps_chosen, B},
        {"logps/rejected", sums.logps_rejected, B},
        {"logits/chosen", row_sum(head->mean_logit, chosen_rows), chosen_rows},
        {"logits/rejected", row_sum(head->mean_logit + chosen_rows, rejected_rows), rejected_rows},
        {"entropy", row_sum(head->entropy, batch->R), batch->R},
        {"mean_token_accuracy", row_sum(head->hit, chosen_rows), chosen_rows},
    };

    /* 2. Sums and counts, not means, for the reason that trainer_metric gives. Those of pairs and
     *    those of tokens have different counts. */
    for (size_t i = 0; i < COUNT(metrics); i++)
        trainer_metric(trainer, metrics[i].name, metrics[i].sum, metrics[i].units);
}

/* The loss of held-out pairs, as a metric. It is a mean over pairs, except for the part of the loss
 * type sft, which is a mean over the tokens of all chosen answers. The sum of that part is
 * collected here, and dpo_evaluated adds its mean when all batches are done. */
static void dpo_eval_loss(struct Trainer *trainer, struct DPOTask *task, size_t B,
                          struct DPOSide *sides) {
    /* 1. the part that is a mean over pairs: a copy of the settings, without sft */
    struct DPOConfig config = task->config;
    config.weight[DPO_SFT] = 0;
    double loss = dpo_loss(&config, B, sides, sides + B);
    trainer_metric(trainer, "loss", loss * (double)B, B);

    /* 2. the negative log-likelihood of chosen answers, summed over all batches so far */
    for (size_t b = 0; b < B; b++) {
        task->eval_nll -= sides[b].logp;
        task->eval_tokens += sides[b].length;
    }
}

/* All held-out pairs have been seen: the part of the loss type sft joins their loss. */
static void dpo_evaluated(struct Trainer *trainer) {
    struct DPOTask *task = trainer->task.data;
    double nll = task->eval_nll / (double)MAX((size_t)1, task->eval_tokens);
    double pairs = (double)trainer->task.eval_n;
    /* 0 more units: the Trainer will divide the sum by the pairs counted so far, so this mean is
     * multiplied by their number */
    trainer_metric(trainer, "loss", task->config.weight[DPO_SFT] * nll * pairs, 0);

    /* the next evaluation starts from 0 */
    task->eval_nll = 0;
    task->eval_tokens = 0;
}

/* ---- The task ------------------------------------------------------------------------------- */

/* dpo_task_loss -- DPO's loss of B pairs, for the Trainer; in training with its gradient.
 *                                                        [glossary: DPO]
 * in   index (B): which pairs; weight: of their loss in the step
 *                                 test: dpo_model_gradient, check_fidelity dpo* */
static double dpo_task_loss(struct Trainer *trainer, const size_t *index, size_t B, double weight,
                            enum Items from) {
    struct DPOTask *task = trainer->task.data;
    struct GPT2 *model = trainer->model;
    struct Arena *arena = &trainer->arena;
    const struct Example *pairs = task->pairs[from];

    /* 1. The reference's log-probabilities, computed or remembered, in the batch's order. This
     *    comes first because dpo_reference empties the arena. */
    dpo_reference(task, arena, pairs, index, B, task->ref_logps[from]);
    size_t *slot = arena_alloc(arena, 2 * B, sizeof *slot);
    struct Batch batch = dpo_batch(arena, pairs, index, B, model->config.n_embd, slot);
    double *ref_logps = arena_alloc(arena, 2 * B, sizeof *ref_logps);
    for (size_t i = 0; i < 2 * B; i++)
        ref_logps[i] = task->ref_logps[from][slot[i]];

    /* 2. The policy's. Chosen answers are sides 0 to B-1; rejected ones follow. */
    bool learns = from == TO_LEARN;
    struct LMHead head = batch_logprobs(model, arena, &batch, task->temperature, learns);
    struct DPOSide *sides = dpo_sides(arena, &batch, head.logprob, ref_logps, B);
    trainer->state.num_tokens += batch.tokens;
    dpo_metrics(trainer, task->config.beta, &batch, &head, B, sides);

    /* 3. The loss. For held-out pairs it is a metric like the others, and no gradient follows. */
    if (!learns) {
        dpo_eval_loss(trainer, task, B, sides);
        return 0;
    }
    double loss = dpo_loss(&task->config, B, sides, sides + B);

    /* 4. The backward pass. An answer's log-probability is the sum of its tokens', so each token
     *    gets the answer's slope. */
    double *dlogps = arena_alloc(arena, 2 * B, sizeof *dlogps);
    for (size_t i = 0; i < 2 * B; i++)
        dlogps[i] = sides[i].dlogp;
    target_logps_backward(model, arena, &batch, &head, 2 * B, dlogps, weight);
    return loss * weight;
}

/* The two sides of a pair as tokens: prompt, answer, end token. A row without a prompt of its own
 * has an implicit one: the beginning that its two texts have in common. Both sides must be split at
 * the same token, or the loss would compare answers to different prompts. Where a token spans the
 * end of the prompt, the two may disagree; then the shorter common prefix counts. */
static void dpo_pair_encode(const struct Trainer *trainer, struct Arena *arena, struct Row row,
                            struct Example pair[2]) {
    size_t V = trainer->model->config.vocab_size;
    const int *end_token = &trainer->model->config.eos_token_id;
    /* 1. The prompt, from which an answer's first token is predicted. Its own tokens are no
     *    targets: it was not the policy that chose them. */
    if (!(row.has & HAS_PROMPT))
        split_implicit_prompt(&row);

    /* 2. both sides as whole sequences */
    pair[0] = example_prompt_completion(arena, trainer->tok, row.prompt, row.chosen, V, end_token);
    pair[1] =
        example_prompt_completion(arena, trainer->tok, row.prompt, row.rejected, V, end_token);

    /* 3. One split for both. A token that spans the border then belongs to the answer. */
    size_t prompt_length = MIN(pair[0].prompt_length, pair[1].prompt_length);
    pair[0].prompt_length = prompt_length;
    pair[1].prompt_length = prompt_length;
}

/* How many of a data set's pairs could not be used as they are. */
struct PairCounts {
    size_t dropped, cut, equal, equal_by_cut;
};

/* Cuts a pair to max_length tokens, and returns whether it can be learnt from; if not, or if it was
 * cut, it is counted in `counts`. */
static bool dpo_pair_fit(struct Example pair[2], size_t max_length, bool keeps_equal,
                         struct PairCounts *counts) {
    /* 1. As in TRL, the end is cut off: a pair with no room for an answer is of no use. */
    if (pair[0].prompt_length >= max_length) {
        counts->dropped++;
        return false;
    }
    /* asked before the cut, so that the message can tell what made the sides equal */
    bool was_equal = is_equal_pair(pair);
    /* a cut pair is still used: one cut answer can be preferred to another */
    counts->cut += MAX(pair[0].n, pair[1].n) > max_length;
    pair[0].n = MIN(pair[0].n, max_length);
    pair[1].n = MIN(pair[1].n, max_length);

    /* 2. Unlike TRL: a pair whose sides are equal, in the data or since the cut, is dropped. It has
     *    a constant loss (sigmoid: ln 2) and no gradient. Only the loss type sft learns from it. */
    if (keeps_equal || !is_equal_pair(pair))
        return true;
    if (was_equal)
        counts->equal++;
    else
        counts->equal_by_cut++;
    return false;
}

/* dpo_pairs -- a data set's pairs as tokens; those that cannot be used are left out and counted.
 * out  pairs (2 data->n): room for all; returns how many pairs there are         test: dpo_pairs */
static size_t dpo_pairs(const struct Trainer *trainer, struct Arena *arena,
                        const struct Dataset *data, const struct DPOConfig *config,
                        struct Example *pairs) {
    struct PairCounts counts = {0};
    size_t max_length = trainer->args.max_length;
    bool keeps_equal = config->weight[DPO_SFT] > 0;
    size_t count = 0;
    /* 1. each pair as tokens, cut to length, kept if it teaches anything */
    for (size_t i = 0; i < data->n; i++) {
        /* a pair that is not kept is overwritten by the next one */
        struct Example *pair = pairs + 2 * count;
        dpo_pair_encode(trainer, arena, data->rows[i], pair);
        if (dpo_pair_fit(pair, max_length, keeps_equal, &counts))
            count++;
    }

    /* 2. What was too long, a larger --max_length would keep. */
    note_rows(data, counts.dropped, "pairs",
              "dropped: the prompt alone has %zu tokens or more (--max_length)", max_length);
    note_rows(data, counts.cut, "pairs", "were cut to their first %zu tokens (--max_length)",
              max_length);

    /* 3. Equal sides: in the data, only other data would help; by the cut, a larger limit would. */
    note_rows(data, counts.equal, "pairs", "are left out: chosen and rejected are the same");
    note_rows(data, counts.equal_by_cut, "pairs",
              "are left out: chosen and rejected are the same up to the cut at %zu tokens "
              "(--max_length)",
              max_length);
    CHECK(count > 0, "%s: no pair is left", data->path);
    return count;
}

/* A checkpoint also contains the reference's log-probabilities. Recomputed after a resume, next to
 * other pairs in the batch, they could differ in the last bit, and so could the whole run. */
static void dpo_saved(struct Trainer *trainer, struct Checkpoint *checkpoint) {
    struct DPOTask *task = trainer->task.data;
    checkpoint_add_doubles(checkpoint, "ref_logps", task->ref_logps[TO_LEARN], 2 * trainer->task.n);
}

/* DPO as the Trainer's task, on n pairs (2n examples). */
static struct DPOTask *dpo_task(struct Trainer *trainer, struct Arena *arena,
                                struct GPT2 *ref_model, struct DPOConfig config, double temperature,
                                struct Example *pairs, size_t n) {
    struct DPOTask *task = arena_zeros(arena, 1, sizeof *task);
    *task = (struct DPOTask){
        .config = config,
        .ref_model = ref_model,
        .pairs = {[TO_LEARN] = pairs}, /* held-out ones are added by the caller, if there are any */
        .temperature = temperature,
    };

    /* all 0, which means not computed yet: a run of a few steps then never pays for pairs that it
     * does not reach */
    task->ref_logps[TO_LEARN] = arena_zeros(arena, 2 * n, sizeof **task->ref_logps);

    /* what the Trainer calls: for a batch, after an evaluation, for a checkpoint */
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

/* ---- Collected preferences ------------------------------------------------------------------ */

/* What a policy wrote, without its end token: how many tokens, and as text. */
static size_t answer_length(const struct Example *answer, const struct GPT2Config *policy) {
    return answer->n - answer->prompt_length - example_ended(answer, policy->eos_token_id);
}

static struct Text answer_text(const struct Tokenizer *tok, struct Arena *arena,
                               const struct Example *answer, const struct GPT2Config *policy) {
    const int *ids = answer->ids + answer->prompt_length;
    return tokenizer_decode_all(tok, arena, ids, answer_length(answer, policy), policy->vocab_size);
}

/* Whether two answers look the same, so that a choice between them would teach nothing. */
static bool same_answer(const struct Tokenizer *tok, struct Arena *arena, const struct Example *a,
                        const struct Example *b, const struct GPT2Config *policy) {
    /* as a person would see them: different bytes that look alike are no choice either */
    struct Text text_a = text_shown(arena, answer_text(tok, arena, a, policy), "");
    struct Text text_b = text_shown(arena, answer_text(tok, arena, b, policy), "");
    return text_equal(text_a, text_b);
}

/* Who answers, and who judges, when preferences are collected.    [glossary: Coleta de dados] */
struct PreferenceSource {
    const struct GPT2 *policy;
    const struct GenerationConfig *generation;
    size_t num_generations; /* answers to each prompt */
    const struct Scorer *scorer;
    bool only_ended; /* leave out answers that did not end: they teach the policy not to stop */
};

/* The places of the best and the worst answer in a list. */
struct BestWorst {
    bool found;
    size_t best, worst;
};

/* The answers with the highest and the lowest score among those to one prompt, which are answers
 * `first` to first + num_generations - 1. An answer shorter than scorer->least_length tokens does
 * not count: if it ended there, its score is the scorer's penalty, not a judgement. */
static struct BestWorst best_and_worst(const struct PreferenceSource *source,
                                       const struct Example *answers, const float *score,
                                       size_t first) {
    struct BestWorst place = {0};
    /* one pass for both: the first answer that counts is the best and the worst so far */
    for (size_t k = first; k < first + source->num_generations; k++) {
        /* the length includes the end token, as in scorer_scale */
        size_t length = answers[k].n - answers[k].prompt_length;
        bool ended = example_ended(&answers[k], source->policy->config.eos_token_id);
        if ((source->only_ended && !ended) || length < source->scorer->least_length)
            continue;

        /* among equal scores, the first one */
        if (!place.found || score[k] > score[place.best])
            place.best = k;
        if (!place.found || score[k] < score[place.worst])
            place.worst = k;
        place.found = true;
    }
    return place;
}

/* collect_preferences -- data collection: several answers to each prompt, compared, kept as pairs.
 *                                                                [glossary: Coleta de dados]
 * in   prompts (n); rng: for sampling
 * out  pairs: room for 2n examples, 2i chosen, 2i+1 rejected; returns how many pairs
 * The best answer becomes chosen, the worst rejected: of all pairs that a prompt's answers could
 * make, this is the one on which judges would agree most. A prompt whose answers all score the
 * same, or read the same, gives no pair.       test: collect_identical, collect_resume */
static size_t collect_preferences(const struct PreferenceSource *source, struct Arena *arena,
                                  const struct Example *prompts, size_t n, struct Rng *rng,
                                  struct Example *pairs) {
    const struct GPT2 *policy = source->policy;
    const struct Tokenizer *tok = source->scorer->tok;
    size_t num_generations = source->num_generations;

    /* 1. All answers at once, those to one prompt side by side, and their scores. They share a
     *    prompt, so a difference in score is one between answers, not between questions. */
    struct Example *answers =
        sample_answers(policy, arena, prompts, n, num_generations, source->generation, rng);
    float *score = arena_floats(arena, n * num_generations);
    scorer_score(source->scorer, arena, answers, n * num_generations, &policy->config, score);

    /* 2. a pair from each prompt, if its answers differ */
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        struct BestWorst place = best_and_worst(source, answers, score, i * num_generations);
        const struct Example *best = &answers[place.best];
        const struct Example *worst = &answers[place.worst];
        /* No answer that counts, or all equally good: nothing is preferred. (If none was found,
         * best and worst point to answer 0, and are not used.) */
        if (!place.found || score[place.best] <= score[place.worst])
            continue;
        /* the same text can score differently if its tokens differ */
        if (same_answer(tok, arena, best, worst, &policy->config))
            continue;
        /* pointers and lengths are copied; the ids stay in the arena */
        pairs[2 * count] = *best;
        pairs[2 * count + 1] = *worst;
        count++;
    }
    return count;
}

/* =============================================================================================
 * Chapter 19 - Exact: a world small enough to enumerate
 *                                            [glossary: Solução em forma fechada]
 *
 * Do PPO, DPO and REINFORCE find what chapter 5 says is best? With real text nobody can tell. So
 * here is a world so small that every answer can be written down: a few tokens, a few positions.
 * With 3 tokens and 2 positions there are 9 answers. The best policy is known from its formula, and
 * how close each method comes to it is a sum over all answers: nothing is estimated. PPO and
 * REINFORCE themselves see only samples, as with real text; DPO, which samples nothing, sees all
 * pairs.
 *
 * What enters: a random reference and a random reward for every answer. What leaves: the optimum,
 * and for the policy that each method reached, its KL to the optimum and its objective.
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

/* The policies that are compared; the last three are trained. */
static const struct {
    const char *name;
    double learning_rate;
    size_t steps;
} EXACT[EXACT_POLICIES] = {
    [EXACT_REFERENCE] = {"reference", 0, 0},
    [EXACT_OPTIMUM] = {"optimum", 0, 0},
    [EXACT_DPO] = {"dpo", 8e-3, 250},
    [EXACT_PPO] = {"ppo", 2e-3, 400},
    [EXACT_REINFORCE] = {"reinforce", 2e-3, 500},
};

/* The world: all its responses, with the reward of each and its probability under each policy. */
struct ExactWorld {
    size_t V, T, n; /* n = V^T responses, each of T tokens: there is no end token */
    struct Example *y; /* (n) the prompt, id 0, and i written in base V */
    double *r; /* (n) reward */
    double *logps[EXACT_POLICIES]; /* (n) log pi(y), nats */
    double beta, log_Z;
    struct GPT2 *ref_model;
    uint64_t seed;
};

/* What a policy is worth. */
struct ExactFigures {
    double kl_to_optimum; /* KL(pi || pi*), nats: 0 for the optimum alone */
    double reward; /* E[r] */
    double kl; /* KL(pi || pi_ref), nats */
    double objective; /* J */
};

/* exact_figures -- what a policy is worth, from sums over all n responses, not from samples.
 *                                                      [glossary: Função objetivo]
 *   E[r] = sum_y pi(y) r(y);   KL(pi || q) = sum_y pi(y) (log pi(y) - log q(y))
 *   J    = E[r] - beta KL(pi || pi_ref)
 * in   logps (n): log pi(y) of the policy
 * By hand: pi_ref = (1/2, 1/2), r = (0, 2), beta 0.5, pi = (1/4, 3/4): E[r] = 1.5,
 * KL = ln 2 - 0.5623 = 0.1308, J = 1.5 - 0.0654 = 1.4346. For any policy,
 * J + beta KL(pi || pi*) = beta log Z.                             test: exact_figures,
 * exact_optimum */
static struct ExactFigures exact_figures(const struct ExactWorld *w, const double *logps) {
    struct ExactFigures f = {0};
    for (size_t i = 0; i < w->n; i++) {
        /* every figure is a mean under the policy: each answer counts with its probability */
        double p = exp(logps[i]);
        f.kl_to_optimum += p * (logps[i] - w->logps[EXACT_OPTIMUM][i]);
        f.reward += p * w->r[i];
        f.kl += p * (logps[i] - w->logps[EXACT_REFERENCE][i]);
    }

    /* J: what the policy earns, minus the price of having moved */
    f.objective = f.reward - w->beta * f.kl;
    return f;
}

/* best_of_n_kl -- how far the best of n answers is from the reference, at most, nats.
 *   KL(pi_n || pi_ref) <= log n - (n - 1) / n
 * It comes near the bound where every single answer is improbable, as those of a language model
 * are. In a world of few answers the same one often wins, and the KL is smaller.
 * By hand: n = 1: 0; n = 2: 0.6931 - 0.5 = 0.1931.                       test: exact_best_of_n */
static double best_of_n_kl(size_t n) {
    return log((double)n) - (double)(n - 1) / (double)n;
}

/* exact_best_of_n -- a policy without any training: the reference answers n times, and the answer
 * with the highest reward counts.
 *   pi_n(y) = F(y)^n - G(y)^n      F: probability of a reward of at most r(y), G: of a lower one
 * for the best of n has at most this reward exactly if all n have.
 * in   n: answers, of which one counts      out  logps (w->n): log pi_n(y)
 * By hand: pi_ref = (1/4, 3/4), r = (1, 0), best of 2: 1 - (3/4)^2 = 7/16 and 9/16; its KL to the
 * reference is 0.0830, best_of_n_kl 0.1931.
 *                                                                        test: exact_best_of_n */
static void exact_best_of_n(const struct ExactWorld *w, size_t n, double *logps) {
    const double *ref_logps = w->logps[EXACT_REFERENCE];
    for (size_t i = 0; i < w->n; i++) {
        /* 1. the probability of a lower reward; rewards are drawn from N(0, 1), and no two agree */
        double lower = 0;
        for (size_t j = 0; j < w->n; j++)
            lower += w->r[j] < w->r[i] ? exp(ref_logps[j]) : 0;

        /* 2. all n have at most this reward, but not all a lower one */
        double p = pow(lower + exp(ref_logps[i]), (double)n) - pow(lower, (double)n);
        logps[i] = log(MAX(p, DBL_MIN));
    }
}

/* exact_dpo_loss -- DPO's loss, expected over all pairs of answers.
 *                                                      [glossary: Solução em forma fechada]
 * Each of the n^2 ordered pairs is judged by someone whose preferences follow Bradley and Terry
 * (chapter 3): answer i is preferred to answer j with probability p_ij = sigmoid(r_i - r_j).
 *   h_i  = log pi(y_i) - log pi_ref(y_i);   s_ij = beta (h_i - h_j)
 *   loss = 1/n^2 sum_ij -[p_ij log sigmoid(s_ij) + (1 - p_ij) log sigmoid(-s_ij)]
 *                                                                      [5] Eq. 7, expected
 *   d loss / d h_i = 2 beta / n^2 sum_j (sigmoid(s_ij) - p_ij)
 * (the 2 because h_i is in the pair (i,j) and in the pair (j,i), and both have the same slope).
 * in   logps, ref_logps, r (n)      out  dlogps (n): d loss / d log pi(y_i) = d loss / d h_i
 * The slope is 0 where s_ij = r_i - r_j for all pairs, that is, where beta h = r + a constant: at
 * pi*. The constant is -beta log Z. It cancels in every pair, which is why DPO needs no Z.
 * By hand: pi = pi_ref: loss ln 2; with r = (0, ln 3), beta 0.8: the slope of the second answer is
 * 2 * 0.8 / 4 * (1/2 - 3/4) = -0.1.             test: exact_dpo_loss, exact_dpo_gradient */
static double exact_dpo_loss(const double *logps, const double *ref_logps, const double *r,
                             size_t n, double beta, double *dlogps) {
    double loss = 0;
    /* pairs (i,i) are counted too: their loss is ln 2 and their slope 0 */
    double pairs = (double)n * (double)n;
    for (size_t i = 0; i < n; i++) {
        dlogps[i] = 0;
        for (size_t j = 0; j < n; j++) {
            /* 1. what the judge prefers, and what the policy implies; both depend on differences,
             *    so a constant added to all rewards would change nothing */
            double p = sigmoid(r[i] - r[j]);
            double s = beta * (logps[i] - ref_logps[i] - logps[j] + ref_logps[j]);

            /* 2. the cross-entropy of the two, and its slope: their difference */
            loss -= (p * log_sigmoid(s) + (1 - p) * log_sigmoid(-s)) / pairs;
            dlogps[i] += 2 * beta * (sigmoid(s) - p) / pairs;
        }
    }
    return loss;
}

/* log pi(y) of all responses under a model, into logps (n). keep: whether to keep the activations
 * for a backward pass. `batch` must outlive the head that is returned. */
static struct LMHead exact_logps(const struct ExactWorld *w, const struct GPT2 *model,
                                 struct Arena *arena, struct Batch *batch, bool keep,
                                 double *logps) {
    /* the same code that reads texts: what is tested here is what trains on them */
    *batch = collate(arena, w->y, w->n, SKIP_LAST);
    struct LMHead head = batch_logprobs(model, arena, batch, 1, keep);
    sum_target_logps(batch, w->n, head.logprob, logps);

    /* The model computes in float, so its probabilities add up to 1 only within 1e-6; a KL of 1e-7
     * would be lost in that. */
    normalize_logps(logps, w->n);
    return head;
}

/* Adds the gradient of exact_dpo_loss to the model's.   out  logps (n): what it says at present */
static void exact_dpo_backward(const struct ExactWorld *w, struct GPT2 *model, struct Arena *arena,
                               double *logps) {
    /* 1. what the policy says of every answer now */
    struct Batch batch;
    struct LMHead head = exact_logps(w, model, arena, &batch, true, logps);

    /* 2. the slope by each answer's log-probability, and back through the model */
    double *dlogps = arena_alloc(arena, w->n, sizeof *dlogps);
    exact_dpo_loss(logps, w->logps[EXACT_REFERENCE], w->r, w->n, w->beta, dlogps);
    target_logps_backward(model, arena, &batch, &head, w->n, dlogps, 1);
}

/* Response number i: the prompt, token 0, then the T digits of i in base V, the most significant
 * first.                 By hand: V 3, T 3: 14 = 1 * 9 + 1 * 3 + 2 is 1 1 2.
 *                                                                  test: exact_dpo_gradient */
static struct Example exact_response(struct Arena *arena, size_t V, size_t T, size_t i) {
    struct Example y = {arena_zeros(arena, T + 1, sizeof(int)), T + 1, 1};
    /* from the last digit to the first, since each division takes off the last one */
    for (size_t t = T; t > 0; t--) {
        y.ids[t] = (int)(i % V);
        i /= V;
    }
    return y;
}

/* The inverse: the number of the response that these tokens, prompt included, are. */
static size_t exact_number(const struct ExactWorld *w, const int *ids) {
    size_t i = 0;
    for (size_t t = 1; t <= w->T; t++)
        i = i * w->V + (size_t)ids[t];
    return i;
}

/* The reference: a GPT-2 with random weights. With its usual initial weights, from N(0, 0.02), all
 * responses would be about equally likely; with weights from N(0, 0.1) some are a hundred times as
 * likely as others, and the optimum must weigh that against their rewards. */
static struct GPT2 *exact_reference(struct GPT2Config config, size_t T, uint64_t seed) {
    /* the prompt's token and T more: the longest sequence in this world */
    config.n_positions = T + 1;
    config.eos_token_id = (int)config.vocab_size; /* no token has this id: nothing ends early */
    struct GPT2 *model = gpt2_new(config);

    /* matrices alone: biases stay 0 and layer norms 1 */
    struct Rng rng = rng_seed(seed, STREAM_INIT);
    for (size_t i = 0; i < model->tensor_count; i++)
        if (model->tensors[i]->ndim == 2)
            tensor_normal(model->tensors[i], &rng, 0.1);
    return model;
}

/* exact_world -- a reference, all responses, and a reward from N(0, 1) for each.
 * in   config: vocab_size and the model's sizes; T: tokens of a response */
static struct ExactWorld *exact_world(struct Arena *arena, struct GPT2Config config, size_t T,
                                      uint64_t seed) {
    struct ExactWorld *w = arena_zeros(arena, 1, sizeof *w);
    /* V values for each of T digits; pow may be off by a rounding error, hence lround */
    size_t n = (size_t)lround(pow((double)config.vocab_size, (double)T));
    *w = (struct ExactWorld){
        .V = config.vocab_size,
        .T = T,
        .n = n,
        .y = arena_alloc(arena, n, sizeof *w->y),
        .r = arena_alloc(arena, n, sizeof *w->r),
        .ref_model = exact_reference(config, T, seed),
        .seed = seed,
    };

    /* 1. responses and rewards */
    struct Rng rng = rng_seed(seed, STREAM_REWARD);
    for (size_t i = 0; i < n; i++) {
        /* rewards without any pattern: only trying an answer shows how good it is */
        w->y[i] = exact_response(arena, w->V, T, i);
        w->r[i] = rng_normal(&rng);
    }

    /* 2. how probable each is under the reference; the other policies do not exist yet */
    for (int k = 0; k < EXACT_POLICIES; k++)
        w->logps[k] = arena_zeros(arena, n, sizeof(double));
    struct Batch batch;
    exact_logps(w, w->ref_model, arena, &batch, false, w->logps[EXACT_REFERENCE]);
    return w;
}

/* The policy answers EXACT_BATCH times; the score is the reward of what it said, looked up. */
static struct Rollout *exact_rollouts(const struct ExactWorld *w, const struct GPT2 *policy,
                                      struct Rng *rng, struct Arena *arena) {
    struct Rollout *rollouts = arena_alloc(arena, EXACT_BATCH, sizeof *rollouts);
    struct Sequence sequences[EXACT_BATCH];

    /* Sampled from the policy's own distribution, with no filter: only such answers give an
     * unbiased estimate of its gradient. */
    struct GenerationConfig sampling = generation_config();
    sampling.do_sample = true;
    sampling.top_k = 0;
    for (size_t i = 0; i < EXACT_BATCH; i++) {
        /* all from the one prompt, token 0; only the random numbers differ */
        struct Rng own = rng_seed(rng_next(rng), STREAM_SAMPLE);
        sequences[i] = sequence_start(arena, w->y[0].ids, 1, w->T, policy, own);
    }
    generate(policy, sequences, EXACT_BATCH, &sampling);
    for (size_t i = 0; i < EXACT_BATCH; i++) {
        /* the tokens are the answer's number in base V, so no search is needed */
        size_t k = exact_number(w, sequences[i].ids);
        rollouts[i] = (struct Rollout){w->y[k], w->T, (float)w->r[k]};
    }
    return rollouts;
}

/* DPO, on all n^2 pairs in each step: the gradient is exact, without noise. */
static void exact_train_dpo(const struct ExactWorld *w, struct GPT2 *model,
                            const struct TrainingArguments *args) {
    struct Arena arena = {0};
    /* each step's log-probabilities go where exact_train will put the final ones */
    size_t steps = EXACT[EXACT_DPO].steps;
    double *logps = w->logps[EXACT_DPO];
    gpt2_make_trainable(model);
    for (size_t step = 0; step < steps; step++) {
        arena_reset(&arena);
        exact_dpo_backward(w, model, &arena, logps);
        double learning_rate = args->learning_rate * schedule_factor(args, step, steps);
        /* The schedule counts steps from 0, AdamW from 1: its correction divides by 1 - beta^t,
         * which is 0 for t = 0. */
        optimizer_step(model, args, learning_rate, step + 1);
    }
    arena_free(&arena);
}

/* PPO or REINFORCE, by chapter 17's own step functions. */
static void exact_train_rollouts(const struct ExactWorld *w, struct GPT2 *model,
                                 const struct TrainingArguments *args, enum ExactPolicy method) {
    struct Arena arena = {0};
    struct RolloutTrainer *trainer;
    if (method == EXACT_REINFORCE) {
        /* all answers are to the one prompt: each is compared with all others */
        struct ReinforceConfig config = {BASELINE_RLOO, EXACT_BATCH, EXACT_BATCH, w->beta};
        trainer = reinforce_trainer_new(model, w->ref_model, config, *args, 1);
    } else {
        struct PPOConfig config = ppo_config();
        config.batch_size = EXACT_BATCH;
        config.mini_batch_size = EXACT_BATCH;

        /* Beta is fixed: the optimum that both are compared with is that of this beta, and a
         * controller would lead them to another one's. */
        config.init_kl_coef = w->beta;
        config.adap_kl_ctrl = false;

        /* each batch is used twice; the value head, which starts at random, learns faster than
         * usual */
        config.ppo_epochs = 2;
        config.vf_coef = 0.5;
        trainer = ppo_trainer_new(model, w->ref_model, config, *args, 1);
    }
    trainer->total_steps = EXACT[method].steps;

    struct Rng rng = rng_seed(w->seed, STREAM_SAMPLE);
    for (size_t step = 0; step < trainer->total_steps; step++) {
        /* on-policy: each step learns from new answers, since the last ones are another policy's */
        arena_reset(&arena);
        struct Rollout *rollouts = exact_rollouts(w, model, &rng, &arena);
        if (method == EXACT_PPO)
            ppo_step(trainer, rollouts);
        else
            reinforce_step(trainer, rollouts);
    }
    rollout_trainer_free(trainer);
    arena_free(&arena);
}

/* exact_train -- a copy of the reference, trained by one method.
 * out  w->logps[method]: what it says of all responses afterwards */
static void exact_train(struct ExactWorld *w, enum ExactPolicy method) {
    struct GPT2 *model = gpt2_copy(w->ref_model);
    struct TrainingArguments args = training_arguments();
    args.learning_rate = EXACT[method].learning_rate;

    /* Then linearly down to 0: smaller and smaller steps average out the noise of the samples. */
    args.warmup_steps = 20;
    if (method == EXACT_DPO)
        exact_train_dpo(w, model, &args);
    else
        exact_train_rollouts(w, model, &args, method);

    /* the verdict: over all responses, however few of them the method has seen */
    struct Arena arena = {0};
    struct Batch batch;
    exact_logps(w, model, &arena, &batch, false, w->logps[method]);
    arena_free(&arena);
    gpt2_free(model);
    /* 0 nats would be the optimum itself */
    say("exact: beta %g: %s: %zu steps, KL to the optimum %.5f nats\n", w->beta, EXACT[method].name,
        EXACT[method].steps, exact_figures(w, w->logps[method]).kl_to_optimum);
}

/* exact_run -- the optimum at beta, and the three trainings.                  test: exact_run */
static void exact_run(struct ExactWorld *w, double beta) {
    /* 1. The optimum by its formula, from the reference and the rewards alone. log Z is kept,
     *    because beta log Z is the largest J that any policy can have. */
    w->beta = beta;
    w->log_Z = exact_optimum(w->logps[EXACT_REFERENCE], w->r, w->n, beta, w->logps[EXACT_OPTIMUM]);

    /* 2. The three trainings share nothing that they write, so each gets a thread. The one with the
     *    most steps starts first. */
#pragma omp parallel for schedule(dynamic, 1)
    for (int k = EXACT_REINFORCE; k >= EXACT_DPO; k--)
        exact_train(w, (enum ExactPolicy)k);
}

/* =============================================================================================
 * Chapter 20 - The whole course (rlhf)
 *             [glossary: Aprendizado por reforço a partir de feedback humano (RLHF)]
 *
 * Does it all work together? This chapter runs the whole drawing of the preface, in minutes, and
 * measures the result:
 *
 *     rated texts -> 1 language model, from nothing -> 2 reward model -> 3 PPO -> 4 DPO
 *                         |  "before"                       |              |         |
 *                         +------ the same held-out prompts, one scorer, four numbers each ------+
 *
 * What enters: rated texts. What leaves: a language model, a reward model of the raters' taste, two
 * policies that please it, one trained by PPO and one by DPO, and figures: what each policy gained
 * (reward) and at what cost (KL to the reference, variety, length). A tenth of the texts is never
 * trained on: all figures are measured there.
 * ============================================================================================= */

/* From chapter 25: the results, as files, as a web page, and on the terminal. */
struct Course;
static void course_write(struct Course *course, double seconds);
static void report_at_end(struct Arena *arena, const char *dir);
static void course_print(struct Course *course);

/* ---- What is measured ------------------------------------------------------------------------ */

static int compare_u64(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static bool is_word_byte(unsigned char byte) {
    /* bytes, not characters: an accented letter separates words, but does so in all texts alike */
    return isalpha(byte) || byte == '\'';
}

/* Finds the next word of a text from byte *at on, and moves *at to its end. A word is a run of
 * letters and apostrophes; each of . ! ? is a word too, so that the ends of sentences count. The
 * word is returned as a number, a hash that ignores case: counting needs no more. */
static bool next_word(struct Text text, size_t *at, uint64_t *word) {
    const unsigned char *bytes = (const unsigned char *)text.data;
    /* 1. skip what is not part of a word */
    size_t first = *at;
    while (first < text.length && !is_word_byte(bytes[first]) && !memchr(".!?", bytes[first], 3))
        first++;
    if (first == text.length)
        return false;

    /* 2. find its end: a mark is one byte long, a run of letters as long as it lasts */
    size_t end = first;
    while (end < text.length && is_word_byte(bytes[end]))
        end++;
    end = MAX(end, first + 1);

    /* 3. Its number, by FNV-1a: for each byte, mix it in, then multiply by a prime, which spreads
     *    it over all bits. */
    *word = 14695981039346656037u;
    for (size_t i = first; i < end; i++)
        *word = (*word ^ (uint64_t)tolower(bytes[i])) * 1099511628211u;
    *at = end;
    return true;
}

/* The pairs of adjacent words of a text, as numbers; returns how many there are. */
static size_t word_pairs(struct Text text, uint64_t *pairs) {
    size_t count = 0;
    size_t at = 0;
    uint64_t word;
    uint64_t previous;
    /* The first word has no predecessor: pairs do not extend from one text to the next. */
    if (!next_word(text, &at, &previous))
        return 0;
    while (next_word(text, &at, &word)) {
        pairs[count++] = previous * 31 + word; /* not symmetric: "a b" is not "b a" */
        previous = word;
    }
    return count;
}

/* distinct_2 -- how varied the answers of a policy are, all of them together.
 *   distinct word pairs / all word pairs:   1 if none repeats, near 0 for one phrase repeated
 * A policy that has found one answer that the reward model likes may give it to every prompt: its
 * mean reward is high, and only a measure like this one reveals that it says nothing else.
 * in   texts (n)        returns a share; 0 if there is no pair at all
 * By hand: "the film. The FILM." has the pairs the-film, film-., .-the, the-film, film-.: three
 * distinct ones of five, 0.6.                                             test: evaluation */
static double distinct_2(const struct Text *texts, size_t n) {
    struct Arena arena = {0};
    size_t bytes = 0;
    size_t count = 0;
    size_t distinct = 0;
    /* 1. all pairs of all texts: no text has more pairs than bytes */
    for (size_t i = 0; i < n; i++)
        bytes += texts[i].length;
    uint64_t *pairs = arena_alloc(&arena, bytes + 1, sizeof *pairs);
    for (size_t i = 0; i < n; i++)
        count += word_pairs(texts[i], pairs + count);

    /* 2. sorted, equal pairs are adjacent, and the first of each run counts */
    qsort(pairs, count, sizeof *pairs, compare_u64);
    for (size_t i = 0; i < count; i++)
        distinct += i == 0 || pairs[i] != pairs[i - 1];
    arena_free(&arena);
    return count ? (double)distinct / (double)count : 0;
}

/* response_kl -- how far the policy has gone from the reference: KL(policy || reference) of whole
 * responses, in nats, averaged over n of them.
 *                                         [glossary: Divergência de Kullback-Leibler (KL)]
 *   1/n sum_i sum_t KL(pi(. | x_i, y_i,<t) || pi_ref(. | x_i, y_i,<t))
 * The answers y_i were sampled from the policy. At each token the divergence between the two
 * distributions is computed exactly (kl_exact), whereas PPO estimates it from the one token that
 * was drawn: the mean is the same, with less noise.
 * in   answers (n), prompts included; temperature: at which they were sampled   test: evaluation */
static double response_kl(const struct GPT2 *policy, const struct GPT2 *ref_model,
                          const struct Example *answers, size_t n, double temperature) {
    enum { TOGETHER = 32 }; /* bounds the memory, whatever n is */
    struct Arena arena = {0};
    double total = 0;
    for (size_t first = 0; first < n; first += TOGETHER) {
        arena_reset(&arena);
        /* 1. both models read the same answers; the prompt's tokens are no targets */
        struct Batch batch =
            collate(&arena, answers + first, MIN(n - first, (size_t)TOGETHER), SKIP_LAST);
        struct LMHead head = batch_logprobs(policy, &arena, &batch, temperature, false);
        struct LMHead ref_head = batch_logprobs(ref_model, &arena, &batch, temperature, false);

        /* 2. the divergence at each token of the answers, summed: that of an answer is the sum of
         *    its tokens', as its log-probability is */
        float *kl = arena_floats(&arena, batch.R);
        kl_full_rows(policy, &head, ref_model, &ref_head, kl);
        for (size_t r = 0; r < batch.R; r++)
            total += kl[r];
    }
    arena_free(&arena);
    return total / (double)n;
}

/* The examination that policies sit: the same prompts, sampling and scorer for all. Their KL is
 * measured from ref_model; NULL: it is not measured. */
struct Examination {
    const struct GPT2 *ref_model;
    const struct Scorer *scorer;
    const struct Example *prompts;
    size_t n;
    struct GenerationConfig generation;
    uint64_t seed;
};

/* A policy's answers to the prompts: their reward, how far it went from the reference, how varied
 * and long they are. */
struct PolicyResult {
    const struct GPT2 *policy;
    struct Example *answers;
    struct Text *texts;
    float *reward;
    double mean_reward, kl, distinct_2, mean_length;
};

/* policy_measure -- one policy's examination. Four numbers belong together: a reward that rose
 * means little if the KL is large, the answers are all alike, or they have become very short. */
static struct PolicyResult policy_measure(const struct GPT2 *policy, const struct Examination *exam,
                                          struct Arena *arena) {
    size_t n = exam->n;
    struct PolicyResult result = {
        .policy = policy,
        .texts = arena_alloc(arena, n, sizeof *result.texts),
        .reward = arena_floats(arena, n),
    };
    /* 1. One answer to each prompt. The examination's seed gives every policy the same random
     *    numbers, so differences are due to the policies. */
    struct Rng rng = rng_seed(exam->seed, STREAM_SAMPLE);
    result.answers = sample_answers(policy, arena, exam->prompts, n, 1, &exam->generation, &rng);

    /* 2. the answers as text, and their mean length in tokens, end token not counted */
    for (size_t i = 0; i < n; i++) {
        result.texts[i] =
            answer_text(exam->scorer->tok, arena, &result.answers[i], &policy->config);
        size_t length = answer_length(&result.answers[i], &policy->config);
        result.mean_length += (double)length / (double)n;
    }

    /* 3. the bare reward: the penalty for short answers is a device of training */
    struct Scorer plain = *exam->scorer;
    plain.least_length = 0;
    scorer_score(&plain, arena, result.answers, n, &policy->config, result.reward);
    result.mean_reward = mean_of(result.reward, n);

    /* 4. what the reward has cost */
    result.distinct_2 = distinct_2(result.texts, n);
    if (exam->ref_model)
        result.kl =
            response_kl(policy, exam->ref_model, result.answers, n, exam->generation.temperature);
    return result;
}

/* ---- The four stages ------------------------------------------------------------------------- */

/* The course's settings, and all that its stages share. */
struct Course {
    struct Arena arena;
    const struct Tokenizer *tok;
    const char *output_dir, *command, *data;
    const char *tokenizer; /* --tokenizer, or NULL if it was found by itself */
    uint64_t seed;
    size_t pretrain_steps, reward_steps, ppo_steps, dpo_steps, vocab_size;
    double temperature; /* of all sampling */
    double scale; /* of learning rates: 1 for a new, narrow model */
    struct Example *train, *held_out; /* token ids of the rated texts, end token last */
    double *train_rating, *held_out_rating;
    size_t train_n, held_out_n;
    struct Example *prompts, *test_prompts; /* beginnings of train and of held-out texts */
    size_t prompt_n, test_n;
    struct GPT2 *language_model, *reward_model, *ppo, *dpo;
    struct Scorer scorer;
    float *held_out_reward;
    struct PolicyResult result[3]; /* before, ppo, dpo */
    float *best_of; /* (COURSE_BEST_OF) mean reward of the best of 1, 2, 4 .. answers, at n - 1 */
    double eval_loss_before, eval_loss_after, eval_accuracy;
};

/* Chosen so that the whole course takes minutes on a laptop and every stage visibly learns. */
enum {
    COURSE_VOCAB = 4097, /* 256 bytes, 3840 merges, the end token */
    COURSE_LAYERS = 2,
    COURSE_WIDTH = 128,
    COURSE_HEADS = 4,
    COURSE_POSITIONS = 64, /* the context where the texts are sentences, */
    COURSE_LONG_POSITIONS = 256, /* and where they are whole reviews */
    COURSE_TEST_PROMPTS = 256,
    COURSE_FEW_PROMPTS = 64, /* of these, for measurements on the way */
    COURSE_BEST_OF = 16, /* answers to a prompt, of which the best counts */
    COURSE_MAX_NEW = 28, /* tokens of an answer in an examination */
    COURSE_LEAST_LENGTH = 10, /* an answer that ends with fewer tokens is penalized */
    COURSE_PREFIX = 20, /* tokens of the beginnings by which rewards are scaled: course_scorer */
    COURSE_TOKENS_A_STEP = 512 /* in the language model's training */
};

static const struct LengthSampler COURSE_PROMPT_LENGTH = {2, 8};

/* Prompts: the beginnings of texts, 2 to 7 tokens, never a whole text; one per text, and no more
 * than `most`. Returns how many. */
static size_t course_prompts(const struct Example *texts, size_t n, size_t most, struct Rng *rng,
                             struct Example *prompts) {
    /* in the order of the texts, which the split has shuffled already */
    size_t count = 0;
    for (size_t i = 0; i < n && count < most; i++) {
        /* drawn for every text, even one that is too short: otherwise a short text would shift the
         * lengths of all that follow */
        size_t length = length_sampler(&COURSE_PROMPT_LENGTH, rng);
        /* the ids are shared with the text; all of them are prompt (prompt_length), since nothing
         * is to be learnt from them */
        if (texts[i].n > length + 1)
            prompts[count++] = (struct Example){texts[i].ids, length, length};
    }
    return count;
}

/* The rated texts as ids, in the given order: first those held out, a tenth, then those to learn
 * from. */
static void course_encode(struct Course *course, const struct Dataset *data, const size_t *order) {
    size_t n = data->n;
    size_t empty = 0;
    struct Example *all = arena_alloc(&course->arena, n, sizeof *all);
    double *rating = arena_alloc(&course->arena, n, sizeof *rating);
    /* the model's own end token, which need not be GPT-2's */
    const int *end_token = &course->language_model->config.eos_token_id;
    for (size_t i = 0; i < n; i++) {
        const struct Row *row = &data->rows[order[i]];
        /* followed by the end token, from which the model learns where a text ends */
        all[i] =
            example_encode(&course->arena, course->tok, row->text, course->vocab_size, end_token);
        rating[i] = row->score;
        empty += row->text.length == 0;
    }
    /* empty texts stay in the data, as an end token alone */
    note_rows(data, empty, "texts", "are empty: no prompt is taken from them");
    /* one list for both parts, in the order drawn */
    course->held_out = all;
    course->held_out_rating = rating;
    course->train = all + course->held_out_n;
    course->train_rating = rating + course->held_out_n;
}

/* course_split -- nine tenths of the texts to learn from, one tenth to measure on, by the seed.
 * [glossary: Conjunto de dados] All four stages use the same split. If each drew its own, the
 * reward model would be measured on texts that the language model knows by heart. */
static void course_split(struct Course *course, const struct Dataset *data) {
    struct Arena *arena = &course->arena;
    /* 1. A random order: files are often sorted, all positive texts first. */
    struct Rng rng = rng_seed(course->seed, STREAM_SPLIT);
    size_t *order = arena_order(arena, data->n);
    rng_shuffle(&rng, order, data->n);

    /* 2. The first tenth of it is held out. */
    course->data = data->path;
    course->held_out_n = data->n / 10;
    course->train_n = data->n - course->held_out_n;
    warn_of_written_ends(data, course->tok);
    CHECK(course->held_out_n >= 20,
          "%s: %zu rated texts; rlhf needs 200 or more, a tenth of them to measure on", data->path,
          data->n);
    course_encode(course, data, order);

    /* 3. Prompts from both parts: those that policies practise on, and those of the examination. */
    course->prompts = arena_alloc(arena, course->train_n, sizeof *course->prompts);
    course->prompt_n =
        course_prompts(course->train, course->train_n, course->train_n, &rng, course->prompts);
    course->test_prompts = arena_alloc(arena, course->held_out_n, sizeof *course->test_prompts);
    course->test_n = course_prompts(course->held_out, course->held_out_n, COURSE_TEST_PROMPTS, &rng,
                                    course->test_prompts);
    CHECK(course->prompt_n > 0 && course->test_n > 0,
          "%s: its texts are too short to take prompts of 2 to 7 tokens from", data->path);
}

/* What the trainers of the four stages have in common. `batch`: rows per step. */
static struct Trainer course_trainer(struct Course *course, struct GPT2 *model,
                                     double learning_rate, size_t steps, size_t batch,
                                     size_t warmup) {
    /* transformers' defaults, except for what follows */
    struct Trainer trainer = {.model = model, .tok = course->tok, .args = training_arguments()};
    trainer.args.learning_rate = learning_rate * course->scale;
    trainer.args.max_steps = steps;
    trainer.args.per_device_train_batch_size = trainer.args.per_device_eval_batch_size = batch;
    /* even a trial of a few steps should learn something: warm up for a quarter of them at most */
    trainer.args.warmup_steps = MIN(warmup, steps / 4);
    trainer.args.seed = course->seed;
    /* however many steps there are: about 50 points for the report's curves, 8 lines to read, and
     * two evaluations on the way */
    trainer.args.logging_steps = MAX((size_t)1, steps / 50);
    trainer.args.say_steps = MAX((size_t)1, steps / 8);
    trainer.args.eval_steps = steps / 3 + 1;
    trainer.args.max_length = model->config.n_positions;
    return trainer;
}

/* Saves what was trained, and its log. */
static void course_finish(struct Course *course, const char *name, struct Trainer *trainer) {
    /* each model in a folder of its own, in the form that every other command takes: it can be
     * sampled, compared and trained further */
    char *folder = arena_printf(&course->arena, "%s/%s", course->output_dir, name);
    model_replace(trainer->model, folder, course->tok);
    trainer_state_save(&trainer->state, &trainer->args, folder);
    trainer_free(trainer);
}

/* Copies of the texts, cut to `length` tokens where they are longer; the ids are shared. */
static struct Example *course_cut(struct Course *course, const struct Example *texts, size_t n,
                                  size_t length) {
    struct Example *cut = arena_alloc(&course->arena, n, sizeof *cut);
    for (size_t i = 0; i < n; i++) {
        /* the end is cut off: policies' answers are beginnings of texts too */
        cut[i] = texts[i];
        cut[i].n = MIN(cut[i].n, length);
    }
    return cut;
}

/* Plain sampling: without top-k, so that what is written follows the policy's own probabilities. */
static struct GenerationConfig course_generation(const struct Course *course,
                                                 size_t max_new_tokens) {
    /* The same temperature in training and in examinations: sampled at another one, it would not be
     * the policy that was trained. */
    struct GenerationConfig generation = generation_config();
    generation.do_sample = true;
    generation.temperature = course->temperature;
    generation.top_k = 0;
    generation.max_new_tokens = max_new_tokens;
    return generation;
}

/* Stage 1: a language model, from random weights or from those of a given folder. It is the start
 * of both policies, and their reference. */
static void course_language_model(struct Course *course, double learning_rate) {
    /* 1. Rows fill the context; the longer they are, the fewer a step has, for as many tokens. */
    size_t rows = MAX((size_t)1, COURSE_TOKENS_A_STEP / course->language_model->config.n_positions);
    struct Trainer trainer = course_trainer(course, course->language_model, learning_rate,
                                            course->pretrain_steps, rows, 50);

    /* 2. In a run this short, AdamW averages squared gradients over 100 steps, not 1000: otherwise
     *    the large ones of the beginning would keep its steps small to the end. Weights decay, so
     *    that fewer texts are learnt by heart. */
    trainer.args.adam_beta2 = 0.99;
    trainer.args.weight_decay = 0.1;
    /* the learning rate ends at a twentieth, not at 0, where the last steps would teach nothing */
    trainer.args.lr_end = 0.05;
    struct LanguageTask *task =
        pretrain_task(&trainer, &course->arena, course->train, course->train_n, course->held_out,
                      course->held_out_n);
    task->whole_texts = true;
    trainer.task.name = "1/4 language model";

    /* 3. What does it learn? The loss on held-out texts, before and after. */
    course->eval_loss_before = trainer_evaluate(&trainer);
    if (course->pretrain_steps)
        trainer_train(&trainer);
    course->eval_loss_after = trainer_evaluate(&trainer);
    course_finish(course, "language_model", &trainer);
    arena_free(&task->rows);
}

/* course_scorer -- turns rewards into scores: score = (reward - mean) / std.
 * Bradley and Terry's loss sees only differences of rewards (chapter 3): chance decides where a
 * reward model has its zero, and its unit depends on how long it was trained. So the mean and the
 * standard deviation of real texts' rewards become the zero and the unit: a score of 0 means "as
 * good as what people write", and one price of a nat of KL suits every reward model. The texts are
 * held-out ones, because the reward model is surer of those that it was trained on, and are cut to
 * about the length of a policy's answer. */
static void course_scorer(struct Course *course) {
    const struct GPT2 *model = course->reward_model;
    /* 1. What does the reward model say of beginnings of real texts? */
    size_t n = MIN(course->held_out_n, (size_t)1000); /* plenty for a mean */
    float *reward = arena_floats(&course->arena, n);
    reward_score(model, course_cut(course, course->held_out, n, COURSE_PREFIX), n, reward);

    /* 2. The new zero and unit. If all rewards are the same, there is no unit to divide by, and
     *    nothing that a policy could learn. */
    double mean = mean_of(reward, n);
    double deviation = sqrt(unbiased_variance(reward, n));
    CHECK(deviation > 0,
          "the reward model gives every text the reward %g, from which no policy can learn; train "
          "it longer (--reward_steps)",
          mean);

    /* 3. An answer that ends before COURSE_LEAST_LENGTH tokens scores -2 at most: two deviations
     *    below what people write, less than almost any text gets. */
    course->scorer = (struct Scorer){model, course->tok, mean, deviation, COURSE_LEAST_LENGTH, -2};
}

/* Stage 2: the raters' taste.                            [glossary: Função de recompensa] */
static void course_reward_model(struct Course *course) {
    /* 1. The language model with a new head: it knows what words mean, and has yet to learn which
     *    of them please. */
    struct GPT2 *model = course->reward_model = gpt2_copy(course->language_model);
    reward_head_declare(model);
    /* Learning rates here and below were found by trial. A model this small takes larger steps than
     * GPT-2, for which TRL's defaults are 1e-4 here, 1.41e-5 for PPO and 1e-6 for DPO. */
    struct Trainer trainer = course_trainer(course, model, 2e-3, course->reward_steps, 32, 20);
    size_t limit = model->config.n_positions;
    size_t n = course->held_out_n;

    /* 2. It learns from pairs of texts whose ratings are a point or more apart. Half of the texts
     *    are cut to a random beginning: see reward_cut. */
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

    /* 3. How many held-out pairs does it order as the raters did? Pairs that the raters themselves
     *    found nearly equal would measure their noise: min_difference leaves them out. */
    trainer_evaluate(&trainer);
    const struct TrainerState *state = &trainer.state;
    log_find(&state->log_history[state->log_count - 1], "eval_accuracy", &course->eval_accuracy);
    course->held_out_reward = task.eval_reward;
    say("%s: %.3f of held-out pairs ordered as people did\n", trainer.task.name,
        course->eval_accuracy);

    /* 4. Its rewards become scores. */
    course_scorer(course);
    course_finish(course, "reward_model", &trainer);
}

/* Where PPO's answers come from: all prompts, shuffled. Order, lengths and tokens are drawn from
 * three streams of random numbers: another length changes no order. */
static struct RolloutSource course_rollouts(struct Course *course) {
    size_t n = course->prompt_n;
    /* Each answer has a limit of its own, 16 to 28 tokens (rollout_start says why). at = n, the end
     * of a pass: drawing the first prompt starts a new, shuffled one. */
    return (struct RolloutSource){
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
}

/* Stage 3: PPO.                       [glossary: Otimização de política proximal (PPO)] */
static void course_ppo(struct Course *course) {
    course->ppo = gpt2_copy(course->language_model);
    struct PPOConfig config = ppo_config();
    config.batch_size = config.mini_batch_size = 64;
    /* 1. No single beta suits the reward model of every seed. The controller adapts it so that each
     *    run ends near 12 nats: enough to please, and still the language of the texts. */
    config.init_kl_coef = 0.15;
    config.target = 12.5;
    config.horizon = 1280;

    /* 2. Each step is logged, since there are few of them. As in TRL, gradients are not clipped:
     *    the clip of the ratio bounds what a step can do. */
    struct Trainer trainer = course_trainer(course, course->ppo, 7e-4, course->ppo_steps, 8, 5);
    trainer.args.lr_end = 0.2;
    trainer.args.logging_steps = 1;
    trainer.args.max_grad_norm = 0;
    struct RolloutTrainer *ppo = ppo_trainer_new(course->ppo, course->language_model, config,
                                                 trainer.args, course->temperature);
    ppo->name = "3/4 ppo";
    ppo->tok = course->tok;

    /* 3. Answer, score, learn: chapter 17. */
    struct RolloutSource source = course_rollouts(course);
    rollout_train(ppo, &source, course->ppo_steps,
                  arena_printf(&course->arena, "%s/ppo", course->output_dir), &trainer.state);
    course_finish(course, "ppo", &trainer);
    rollout_trainer_free(ppo);
}

/* Collects pairs from the language model's own answers, with the scorer in the place of a person.
 * [glossary: Coleta de dados] pairs: room for 2n examples; returns how many pairs. */
static size_t course_collect(struct Course *course, size_t n, struct Example *pairs) {
    enum { ANSWERS = 4 };
    size_t tokens = 0;
    for (size_t i = 0; i < course->train_n; i++)
        tokens += course->train[i].n;
    /* Where texts are sentences, answers that did not end are left out (struct PreferenceSource
     * says why). Where they are whole reviews, answers hardly ever end within 40 tokens, and no
     * pair would be left. */
    bool only_ended = tokens / course->train_n < COURSE_POSITIONS;
    /* The policy's own answers, sampled: pairs of texts that it would never write would teach it
     * less about which to prefer of those that it does write. */
    struct GenerationConfig generation = course_generation(course, 40);
    struct Rng rng = rng_seed(course->seed, STREAM_SAMPLE);
    struct PreferenceSource source = {
        .policy = course->language_model,
        .generation = &generation,
        .num_generations = ANSWERS,
        .scorer = &course->scorer,
        .only_ended = only_ended,
    };
    size_t count = collect_preferences(&source, &course->arena, course->prompts, n, &rng, pairs);
    say("4/4 dpo: %zu pairs collected from %zu answers\n", count, n * ANSWERS);
    static const char none[] = "no two of the language model's answers to a prompt could be told "
                               "apart, or none ended by itself, so no pair could be formed; train "
                               "it longer (--pretrain_steps)";
    CHECK(count > 0 || course->dpo_steps == 0, "%s", none);
    return count;
}

/* The examination that policies sit, with the first n of its prompts. */
static struct Examination course_examination(const struct Course *course, size_t n) {
    return (struct Examination){
        .ref_model = course->language_model,
        .scorer = &course->scorer,
        .prompts = course->test_prompts,
        .n = MIN(n, course->test_n),
        .generation = course_generation(course, COURSE_MAX_NEW),
        .seed = course->seed + 1, /* not the random numbers used in training */
    };
}

/* best_of_n -- the mean reward of the best of n answers to one prompt.
 * in   reward (count): answers to the same prompt side by side, a multiple of n of them. Groups of
 *      n are disjoint, so each answer is used once.
 * By hand: rewards 1, 3, 2, 0: best of 1: 1.5; of 2: (3 + 2) / 2; of 4: 3.    test: best_of_n */
static float best_of_n(const float *reward, size_t count, size_t n) {
    double sum = 0;
    for (size_t first = 0; first + n <= count; first += n) {
        float best = reward[first];
        for (size_t i = first; i < first + n; i++)
            best = MAX(best, reward[i]);
        sum += best;
    }
    return (float)(sum / (double)(count / n));
}

/* How much reward is to be had without any training? The language model answers each prompt
 * COURSE_BEST_OF times, and the best of n answers counts. */
static void course_best_of_n(struct Course *course) {
    struct Arena arena = {0};
    struct Examination exam = course_examination(course, COURSE_FEW_PROMPTS);

    /* 1. each prompt COURSE_BEST_OF times in a row */
    struct Example *prompts = arena_alloc(&arena, exam.n * COURSE_BEST_OF, sizeof *prompts);
    for (size_t i = 0; i < exam.n * COURSE_BEST_OF; i++)
        prompts[i] = exam.prompts[i / COURSE_BEST_OF];
    exam.prompts = prompts;
    exam.n *= COURSE_BEST_OF;

    /* 2. Their rewards. The KL need not be measured: best_of_n_kl bounds it. */
    exam.ref_model = NULL;
    struct PolicyResult result = policy_measure(course->language_model, &exam, &arena);
    course->best_of = arena_floats(&course->arena, COURSE_BEST_OF);
    for (size_t n = 1; n <= COURSE_BEST_OF; n *= 2)
        course->best_of[n - 1] = best_of_n(result.reward, exam.n, n);
    arena_free(&arena);
}

/* DPO on its way: what has it gained so far, and at what cost? */
static void course_measure(struct Trainer *trainer) {
    struct Arena arena = {0};
    struct Examination exam = course_examination(trainer->task.measure_data, COURSE_FEW_PROMPTS);
    struct PolicyResult result = policy_measure(trainer->model, &exam, &arena);
    struct LogEntry *entry = state_log(&trainer->state);
    log_value(entry, "eval_reward", result.mean_reward);
    log_value(entry, "eval_kl", result.kl);
    log_value(entry, "epoch", trainer->state.epoch);
    log_value(entry, "step", (double)trainer->state.global_step);
    arena_free(&arena);
}

/* Stage 4: DPO.                     [glossary: Otimização de preferência direta (DPO)] */
static void course_dpo(struct Course *course) {
    enum { PAIRS_A_STEP = 16 };
    /* It starts where PPO did, and with the same scorer, so that the two can be compared. */
    course->dpo = gpt2_copy(course->language_model);
    /* 1. Prompts for half as many pairs as the steps will use, so that each pair is used about
     *    twice, and some to spare, since not every prompt gives a pair. */
    size_t n = MIN(course->prompt_n, course->dpo_steps * PAIRS_A_STEP / 2 + PAIRS_A_STEP);
    struct Example *pairs = arena_alloc(&course->arena, 2 * n, sizeof *pairs);
    size_t count = course_collect(course, n, pairs);

    /* 2. DPO's loss only wants chosen and rejected to be apart: it can lower both, and the policy
     *    drifts into endless text. The loss type sft, with weight 0.2, keeps the chosen answers
     *    probable. */
    struct DPOConfig config = {.beta = 0.1, .weight = {[DPO_SIGMOID] = 1, [DPO_SFT] = 0.2}};
    struct Trainer trainer =
        course_trainer(course, course->dpo, 6e-4, course->dpo_steps, PAIRS_A_STEP, 10);
    trainer.args.lr_end = 0.1;
    dpo_task(&trainer, &course->arena, course->language_model, config, course->temperature, pairs,
             count);
    trainer.task.name = "4/4 dpo";
    /* 3. measured on its way, so that reward and KL can be seen beside those of PPO's steps */
    trainer.task.measure = course_measure;
    trainer.task.measure_data = course;
    trainer.args.eval_steps = MAX((size_t)1, course->dpo_steps / 6);
    if (course->dpo_steps)
        trainer_train(&trainer);
    course_finish(course, "dpo", &trainer);
}

/* A prompt of the examination, as text. */
static struct Text course_prompt(struct Course *course, size_t i) {
    return tokenizer_decode_all(course->tok, &course->arena, course->test_prompts[i].ids,
                                course->test_prompts[i].n, course->vocab_size);
}

/* course_run -- the four stages, measured: what `align rlhf` does.
 *             [glossary: Aprendizado por reforço a partir de feedback humano (RLHF)]
 * in   language_model: new or loaded, not yet trained on these texts; learning_rate: of stage 1
 * out  folders of the four models, summary, samples and report in output_dir    test: cli_course */
static void course_run(struct Course *course, const struct Dataset *data,
                       struct GPT2 *language_model, double learning_rate) {
    double begin = seconds_now();
    course->language_model = language_model;
    course->vocab_size = language_model->config.vocab_size;
    /* a folder that cannot be written to ends the run now, not when the first model is saved */
    make_folder(course->output_dir);
    course_split(course, data);
    say("%zu rated texts to learn from, %zu held out; %.2fM parameters; %d threads, kernel %s\n",
        course->train_n, course->held_out_n, (double)gpt2_parameters(language_model) / 1e6,
        omp_get_max_threads(), kernel ? kernel->name : "plain");

    /* 1. The language model first: all other models start as copies of it. */
    course_language_model(course, learning_rate);

    /* 2. The three other stages. After each, a policy sits its examination. After the first of
     *    them, which makes scores possible, it is the language model itself: that is "before". */
    void (*const stage[])(struct Course *) = {course_reward_model, course_ppo, course_dpo};
    struct GPT2 **const policy[] = {&course->language_model, &course->ppo, &course->dpo};
    for (size_t k = 0; k < COUNT(stage); k++) {
        stage[k](course);
        struct Examination exam = course_examination(course, course->test_n);
        course->result[k] = policy_measure(*policy[k], &exam, &course->arena);
    }

    /* 3. What would the best of n of its answers have reached, without PPO and DPO? */
    course_best_of_n(course);

    /* 4. What came of it: chapter 25. */
    course_write(course, seconds_now() - begin);
    report_at_end(&course->arena, course->output_dir);
    course_print(course);

    /* 5. The arena is freed last: everything above points into it. */
    for (size_t k = 0; k < COUNT(policy); k++)
        gpt2_free(*policy[k]);
    gpt2_free(course->reward_model);
    arena_free(&course->arena);
}

/* =============================================================================================
 * Part IV - The program
 *
 * Machinery: what a program needs around its mathematics. After this part a reader knows how
 * models, data and checkpoints are read and written so that transformers, TRL and PEFT understand
 * them and neither a broken file nor a full disk loses anything, and how a command line becomes a
 * call of the functions above.
 * ============================================================================================= */

/* =============================================================================================
 * Chapter 21 - Files, JSON
 *
 * How does a program read files that may be wrong, and write files so that nothing is lost? What
 * it reads was written by somebody else: every length is checked before memory is allocated, every
 * offset before it is used, and an error names the file, the place, what was expected and what to
 * do. What it writes goes into a temporary file in the same folder, which is renamed once it is
 * complete: a power cut leaves the old file intact.
 *
 * A line of JSON such as {"text": "good", "score": 4} becomes a tree, an object with two members:
 *
 *     object, number 2 --child--> string "good", key "text" --next--> number 4, key "score"
 * ============================================================================================= */

/* ---- Files ----------------------------------------------------------------------------------- */

static bool file_exists(const char *path) {
    struct stat s;
    return stat(path, &s) == 0;
}

static bool is_folder(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

/* Do two paths lead to the same file or folder, however they are spelt, links followed? Windows
 * gives its files no inode numbers: there the spelling decides.               test: same_folder */
static bool same_file(const char *a, const char *b) {
    struct stat x, y;
    if (stat(a, &x) != 0 || stat(b, &y) != 0)
        return false;
    return x.st_dev == y.st_dev && x.st_ino == y.st_ino && (x.st_ino != 0 || strcmp(a, b) == 0);
}

static bool text_starts(struct Text text, const char *word) {
    size_t length = strlen(word);
    return text.length >= length && memcmp(text.data, word, length) == 0;
}

/* Git LFS leaves three lines of text, a pointer, in place of a large file that was not fetched.
 * Models and data are often cloned without git-lfs installed; the pointer would be refused as a
 * broken file, and nobody would know why. */
static void check_fetched(const char *path, struct Text start) {
    CHECK(!text_starts(start, "version https://git-lfs.github.com/"),
          "%s: is a Git LFS pointer, not the file itself; fetch it: git lfs pull", path);
}

/* A whole file (or, for "-", standard input), followed by a NUL. */
static struct Text read_file(struct Arena *arena, const char *path) {
    /* 1. A folder can be opened too; reading it would then fail with an obscure message. */
    bool is_stdin = strcmp(path, "-") == 0;
    CHECK(is_stdin || !is_folder(path), "%s: is a folder, a file was expected", path);
    FILE *file = is_stdin ? stdin : fopen(path, "rb");
    CHECK(file, "%s: %s", path, strerror(errno));

    /* 2. Read until it ends, since a pipe cannot tell its size. What is not a file on a disk may
     *    never end (/dev/zero): give up before memory is full. */
    struct stat s;
    bool endless = fstat(fileno(file), &s) != 0 || !S_ISREG(s.st_mode);
    size_t used = 0;
    size_t capacity = 0;
    char *buffer = NULL;
    for (size_t got = 1; got > 0; used += got) {
        buffer = grow(buffer, used, &capacity, 1);
        got = fread(buffer + used, 1, capacity - used, file);
        CHECK(!endless || used + got < (size_t)1 << 30,
              "%s: has no end within 1 GB; more is read of a file only, not of a pipe or a device",
              path);
    }
    CHECK(!ferror(file), "%s: %s", path, strerror(errno));
    if (!is_stdin) {
        fclose(file);
        check_fetched(path, (struct Text){buffer, used});
    }
    struct Text text = text_copy(arena, (struct Text){buffer, used});
    free(buffer);
    return text;
}

/* Begins to write a file: into NAME.tmp, which output_close renames to NAME. keep: what an earlier
 * run left in NAME.tmp is not erased. */
static struct Output output_begin(const char *folder, const char *name, bool keep) {
    /* the user may have typed a path of any length; cut short, it would name another file */
    struct Output out;
    int n = snprintf(out.path, sizeof out.path, "%s/%s", folder, name);
    CHECK(n > 0 && (size_t)n < sizeof out.path, "%s/%s: the path is too long", folder, name);
    snprintf(out.tmp, sizeof out.tmp, "%s.tmp", out.path);
    /* r+b writes over what is there and leaves the rest, wb empties the file */
    out.file = fopen(out.tmp, keep && file_exists(out.tmp) ? "r+b" : "wb");
    CHECK(out.file, "%s: cannot be written: %s", out.tmp, strerror(errno));
    return out;
}

static struct Output output_open(const char *folder, const char *name) {
    return output_begin(folder, name, false);
}

/* For a file that grows during a run: when it is closed, it is too late to learn that the disk is
 * full. */
static void output_flush(struct Output *out) {
    CHECK(fflush(out->file) == 0 && !ferror(out->file), "%s: writing failed: %s", out->tmp,
          strerror(errno));
}

/* Continues a log that an earlier run wrote in the folder `beside`, finished or still NAME.tmp:
 * keeps its first `bytes` and drops what was logged after the checkpoint from which the run
 * resumes.                                                                test: output_resume */
static struct Output output_resume(const char *folder, const char *name, const char *beside,
                                   size_t bytes) {
    char path[PATH_MAX + 8], chunk[1 << 14];
    struct stat s;
    FILE *earlier = NULL;
    /* 1. Find the log. A run that was killed left NAME.tmp, which is newer than any NAME. */
    for (int finished = 0; finished < 2 && !earlier; finished++) {
        int n = snprintf(path, sizeof path, "%s/%s%s", beside, name, finished ? "" : ".tmp");
        if (n < (int)sizeof path && stat(path, &s) == 0 && (uint64_t)s.st_size >= bytes)
            earlier = fopen(path, "rb");
    }
    if (!earlier)
        warn("%s/%s: lacks the %zu bytes of the steps before; it begins anew", beside, name, bytes);

    /* 2. Copy what is kept. Source and target may be the same file: then each byte is overwritten
     *    by itself, and a run that is killed here loses nothing. */
    struct Output out = output_begin(folder, name, true);
    size_t n = 1;
    for (; earlier && bytes > 0 && n > 0; bytes -= n) {
        n = fread(chunk, 1, MIN(bytes, sizeof chunk), earlier);
        fwrite(chunk, 1, n, out.file);
    }
    output_flush(&out);

    /* 3. Cut off the rest. */
    CHECK(ftruncate(fileno(out.file), ftello(out.file)) == 0, "%s: writing failed: %s", out.tmp,
          strerror(errno));
    if (earlier)
        fclose(earlier);
    return out;
}

/* Puts a file on the disk and gives it its name, in this order: if the name reached the disk before
 * the contents, a power cut could leave an empty file under it. */
static void output_close(struct Output *out) {
    /* 1. All of it goes to the disk. Any of these calls may be the first to report that the disk
     *    is full, so each is checked; the file is closed whether or not one failed. */
    bool good = fflush(out->file) == 0 && !ferror(out->file) && fsync(fileno(out->file)) == 0;
    int error = errno;
    good = fclose(out->file) == 0 && good;

    /* 2. An incomplete file is removed; an older one of this name stays. */
    if (!good)
        remove(out->tmp);
    CHECK(good, "%s: writing failed: %s; what was there before is untouched", out->path,
          strerror(error));

    /* 3. The renaming is a single step, which nobody can see half done. */
    CHECK(rename(out->tmp, out->path) == 0, "%s: %s", out->path, strerror(errno));
}

/* mkdir -p: makes a folder, and any folders above it that are missing. */
static void make_folder(const char *path) {
    char part[PATH_MAX];
    CHECK(strlen(path) < sizeof part, "%.60s...: the path is too long", path);
    /* from the left: a folder can be made only where the one above it exists */
    for (size_t i = 1; i <= strlen(path); i++) {
        /* a part ends at a slash or at the end; of several slashes in a row the first counts */
        if ((path[i] != '/' && path[i] != 0) || path[i - 1] == '/')
            continue;
        snprintf(part, i + 1, "%s", path);
        int error = mkdir(part, 0777) == 0 ? 0 : errno; /* is_folder overwrites errno */
        const char *reason = error == EEXIST ? "is a file, a folder was expected" : strerror(error);
        CHECK(error == 0 || is_folder(part), "%s: %s", part, reason);
    }
    CHECK(access(path, W_OK) == 0, "%s: cannot be written to: %s", path, strerror(errno));
}

/* Deletes a folder and the files in it, as far as possible. die_with calls it, so it uses no arena,
 * and never fails. */
static void folder_delete(const char *folder) {
    char path[PATH_MAX];
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        int length = snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        /* "." and ".." are folders as well */
        if (length < (int)sizeof path && !is_folder(path))
            remove(path);
    }
    if (dir)
        closedir(dir);
    rmdir(folder);
}

/* Does a file's name end in .safetensors? Such files hold weights. */
static bool is_weights_file(const char *name) {
    const char *point = strrchr(name, '.');
    return point && strcmp(point, ".safetensors") == 0;
}

/* Moves a folder's files into another folder, over files of the same name: the files with weights,
 * or all others. */
static void folder_move_files(const char *folder, const char *to, bool weights) {
    char path[PATH_MAX], target[PATH_MAX];
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        const char *name = entry->d_name;
        int length = snprintf(path, sizeof path, "%s/%s", folder, name);
        if (length >= (int)sizeof path || is_folder(path) || is_weights_file(name) != weights)
            continue;
        length = snprintf(target, sizeof target, "%s/%s", to, name);
        CHECK(length < (int)sizeof target && rename(path, target) == 0, "%s: %s", target,
              strerror(errno));
    }
    if (dir)
        closedir(dir);
}

/* Puts the names in a folder on the disk, as output_close puts a file's contents there. */
static void folder_sync(const char *folder) {
    /* Windows cannot open a folder, and does not need this */
    int fd = open(folder, O_RDONLY);
    if (fd < 0)
        return;
    fsync(fd);
    close(fd);
}

/* ---- JSON ------------------------------------------------------------------------------------ */

/* JSON (RFC 8259) as a tree. `child` is the first of an object's members or an array's items,
 * `next` is the following one, and `number` says how many there are; a member carries its key.
 * Strings are decoded to UTF-8; half a character (json_code_point) becomes U+FFFD. */
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
    bool is_taken; /* in a safetensors header: this tensor has been read (chapter 23) */
};

/* It reads a copy that ends in a NUL, so that one more character can always be read and C's string
 * functions stop at the end. */
struct JsonParser {
    struct Arena *arena;
    const char *at, *end;
    const char *error;
    int depth;
};
enum { JSON_MAX_DEPTH = 64 };

/* Keeps the first error: later ones are its consequences. */
static struct Json *json_fail(struct JsonParser *p, const char *error) {
    if (!p->error)
        p->error = error;
    return NULL;
}

/* As json_fail, but if the text at this place is from a notation that is often taken for JSON, the
 * error names that instead. */
static struct Json *json_expected(struct JsonParser *p, const char *error) {
    static const char *const foreign[][2] = {
        {"NaN", "NaN is not JSON; write null, or leave the field out"},
        {"nan", "nan is not JSON; write null, or leave the field out"},
        {"Infinity", "Infinity is not JSON; write a number, or null"},
        {"-Infinity", "-Infinity is not JSON; write a number, or null"},
        {"None", "None is Python, JSON has null; in Python, write a row with json.dumps"},
        {"True", "True is Python, JSON has true; in Python, write a row with json.dumps"},
        {"False", "False is Python, JSON has false; in Python, write a row with json.dumps"},
        {"'", "a single quote, JSON has \" alone; in Python, write a row with json.dumps"},
        {"//", "a comment, JSON has none; take it out"},
        {"/*", "a comment, JSON has none; take it out"},
        {"#", "a comment, JSON has none; take it out"},
    };
    /* the order does not matter: none of them is the beginning of another */
    for (size_t i = 0; i < COUNT(foreign); i++)
        if (strncmp(p->at, foreign[i][0], strlen(foreign[i][0])) == 0)
            return json_fail(p, foreign[i][1]);
    return json_fail(p, error);
}

static void json_space(struct JsonParser *p) {
    p->at += strspn(p->at, " \t\n\r");
}

/* Takes this character if it comes next, spaces skipped. */
static bool json_take(struct JsonParser *p, char c) {
    json_space(p);
    bool found = *p->at == c;
    p->at += found;
    return found;
}

/* Writes a code point as 1 to 4 bytes of UTF-8: 6 bits in each byte but the first, which holds a
 * mark of the length and the remaining bits. Returns the length. */
static size_t utf8_write(char *to, uint32_t c) {
    static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    size_t length = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t k = length; k-- > 1; c >>= 6)
        to[k] = (char)(0x80 | (c & 63));
    to[0] = (char)(lead[length] | c);
    return length;
}

/* The value of four hexadecimal digits, or -1 if there are fewer. */
static int32_t json_hex4(const char *at) {
    char digits[5] = "";
    if (strspn(at, "0123456789abcdefABCDEF") < 4)
        return -1;
    return (int32_t)strtol(memcpy(digits, at, 4), NULL, 16);
}

/* Reads what follows "\u": a code point, or -1 on an error. Those above U+FFFF are written as two
 * halves, a high surrogate (D800 to DBFF) and a low one (DC00 to DFFF).
 * By hand: \ud83d\ude00 is 10000 + (3d << 10) + 200 = U+1F600, a face. */
static int32_t json_code_point(struct JsonParser *p) {
    int32_t c = json_hex4(p->at);
    p->at += c >= 0 ? 4 : 0;
    /* most characters come whole; an error (-1) is passed on */
    if (c < 0xd800 || c > 0xdfff)
        return c;
    /* a high half needs the low one after it; any other half is no character */
    bool is_high = c < 0xdc00 && p->at[0] == '\\' && p->at[1] == 'u';
    int32_t low = is_high ? json_hex4(p->at + 2) : -1;
    if (low < 0xdc00 || low > 0xdfff)
        return 0xfffd;
    /* ten bits from each half */
    p->at += 6;
    return 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
}

/* Reads what follows "\": the character that the escape stands for. */
static bool json_escape(struct JsonParser *p, uint32_t *c) {
    static const char escapes[] = "\"\\/bfnrt";
    static const char meanings[] = "\"\\/\b\f\n\r\t";
    const char *escape = memchr(escapes, *p->at, sizeof escapes - 1);
    if (!escape && *p->at != 'u')
        return json_fail(p, "an unknown escape after \\");
    p->at++;
    *c = escape ? (uint32_t)meanings[escape - escapes] : (uint32_t)json_code_point(p);
    return *c != UINT32_MAX || json_fail(p, "\\u without four hexadecimal digits");
}

/* A string; p->at is at its opening quote. */
static bool json_string(struct JsonParser *p, struct Text *out) {
    /* 1. Where does it end? An escaped quote does not end it. */
    const char *close = p->at + 1;
    while (*close && *close != '"')
        close += *close == '\\' && close[1] ? 2 : 1;
    if (*close != '"')
        return json_fail(p, "a string without its closing quote; a line break in it is \\n");

    /* 2. Decoding never makes a string longer. */
    char *start = arena_alloc(p->arena, (size_t)(close - p->at), 1);
    char *to = start;

    /* 3. Check each character: from here on the program relies on valid UTF-8. */
    for (p->at++; p->at < close;) {
        uint32_t c;
        size_t length = utf8_read((const unsigned char *)p->at, (size_t)(close - p->at), &c);
        if (length == 0)
            return json_fail(p, "a string that is not UTF-8; save the file as UTF-8");
        if (c < 0x20)
            return json_fail(p, "a control character inside a string");
        p->at += length;
        if (c == '\\' && !json_escape(p, &c))
            return false;
        to += utf8_write(to, c);
    }
    *to = 0;
    *out = (struct Text){start, (size_t)(to - start)};
    p->at = close + 1;
    return true;
}

/* [-] digits [. digits] [e [+-] digits]: stricter than strtod, which accepts "+1", ".5" and "0x1"
 * too. The digits are kept in `string`: a double has 53 bits, and a whole number may need more. */
static bool json_number(struct JsonParser *p, struct Json *node) {
    static const char digits[] = "0123456789";
    /* 1. The whole part. JSON forbids 012, which C would take for octal. */
    const char *at = p->at + (*p->at == '-');
    size_t whole = strspn(at, digits);
    if (whole == 0 || (whole > 1 && *at == '0'))
        return json_expected(p, "a value was expected");
    at += whole;

    /* 2. A fraction and an exponent may follow; each needs digits of its own. */
    if (*at == '.') {
        if (!isdigit((unsigned char)*++at))
            return json_fail(p, "a number ends in its decimal point");
        at += strspn(at, digits);
    }
    if (*at == 'e' || *at == 'E') {
        at++;
        at += *at == '+' || *at == '-';
        if (!isdigit((unsigned char)*at))
            return json_fail(p, "a number without its exponent");
        at += strspn(at, digits);
    }

    /* 3. The value. strtod turns 1e999 into infinity, which JSON does not have. */
    node->number = strtod(p->at, NULL);
    if (!isfinite(node->number))
        return json_fail(p, "a number beyond 1.8e308");
    node->string = (struct Text){p->at, (size_t)(at - p->at)};
    p->at = at;
    return true;
}

static struct Json *json_value(struct JsonParser *p);

/* The inside of [...] or {...}; p->at is just after the opening bracket. */
static struct Json *json_container(struct JsonParser *p, struct Json *node, char close) {
    bool is_object = close == '}';
    struct Json **tail = &node->child;
    if (json_take(p, close))
        return node;
    /* json_value calls this function again: a file of nothing but brackets must not exhaust the
     * stack */
    if (++p->depth > JSON_MAX_DEPTH)
        return json_fail(p, "brackets nested more than 64 deep");
    do {
        /* 1. A member has a name. */
        struct Text key = {0};
        json_space(p);
        if (*p->at == close)
            return json_fail(p, "a comma before the closing bracket; take it out");
        if (is_object) {
            if (*p->at != '"')
                return json_expected(p, "a member's name in quotes was expected");
            if (!json_string(p, &key))
                return NULL;
            if (!json_take(p, ':'))
                return json_fail(p, "':' was expected after a member's name");
        }

        /* 2. The value, possibly another container. An error in it has been noted already. */
        struct Json *item = json_value(p);
        if (!item)
            return NULL;
        item->key = key;
        *tail = item;
        tail = &item->next;
        node->number++;
    } while (json_take(p, ','));

    /* 3. Without another comma, it must end here. */
    p->depth--;
    if (json_take(p, close))
        return node;
    return json_expected(p, is_object ? "',' or '}' was expected" : "',' or ']' was expected");
}

/* Any value: its first character tells its type. */
static struct Json *json_value(struct JsonParser *p) {
    static const char *const words[] =
        {[JSON_NULL] = "null", [JSON_FALSE] = "false", [JSON_TRUE] = "true"};
    json_space(p);
    if (p->at >= p->end)
        return json_fail(p, "it ends where a value was expected");
    struct Json *node = arena_zeros(p->arena, 1, sizeof *node);

    /* 1. One of the three words. */
    for (size_t type = 0; type < COUNT(words); type++) {
        if (strncmp(p->at, words[type], strlen(words[type])) != 0)
            continue;
        p->at += strlen(words[type]);
        node->type = (enum JsonType)type;
        return node;
    }

    /* 2. A string or a container. */
    if (*p->at == '"') {
        node->type = JSON_STRING;
        return json_string(p, &node->string) ? node : NULL;
    }
    if (*p->at == '[' || *p->at == '{') {
        bool is_object = *p->at++ == '{';
        node->type = is_object ? JSON_OBJECT : JSON_ARRAY;
        return json_container(p, node, is_object ? '}' : ']');
    }
    /* 3. Anything else is a number, or json_number says why it is not one. */
    node->type = JSON_NUMBER;
    return json_number(p, node) ? node : NULL;
}

/* A text without the byte order mark (U+FEFF) with which Windows editors begin a file. */
static struct Text text_without_mark(struct Text text) {
    size_t mark = text_starts(text, "\xef\xbb\xbf") ? 3 : 0;
    return (struct Text){text.data + mark, text.length - mark};
}

/* One JSON value and nothing after it. On an error it returns NULL; *error says what is wrong,
 * *where at which byte. */
static struct Json *json_parse(struct Arena *arena, struct Text text, const char **error,
                               size_t *where) {
    /* 1. The value, read from a copy that ends in a NUL. */
    text = text_copy(arena, text);
    const char *start = text_without_mark(text).data;
    struct JsonParser p = {.arena = arena, .at = start, .end = text.data + text.length};
    struct Json *value = json_value(&p);
    json_space(&p);

    /* 2. Nothing may follow: two objects on a line mean that a line break was lost. */
    if (value && p.at != p.end) {
        bool is_comma = *p.at == ',';
        value = json_expected(&p, is_comma ? "a comma follows its end; take it out"
                                           : "something follows its end");
    }

    /* 3. The place is counted from the text's first byte, the byte order mark included. */
    *error = p.error;
    *where = (size_t)(p.at - text.data);
    return value;
}

/* Parses a text that must be one JSON object, or ends the program: `place` tells where the text is
 * from, `hint`, at the end of the message, what may help. */
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

/* A member by its name; of several with the same name the last, as in Python. */
static struct Json *json_get(const struct Json *object, const char *key) {
    /* NULL, or anything that is not an object, has no members: so calls can be nested unchecked */
    struct Json *found = NULL;
    for (struct Json *item = object && object->type == JSON_OBJECT ? object->child : NULL; item;
         item = item->next)
        if (text_equal(item->key, text_of(key)))
            found = item;
    return found;
}

/* A member's type; an absent one counts as null, as it does in transformers and PEFT. */
static enum JsonType json_type(const struct Json *object, const char *key) {
    const struct Json *item = json_get(object, key);
    return item ? item->type : JSON_NULL;
}

/* A member's number or text; `fallback` if it is absent or of another type. */
static double json_number_or(const struct Json *object, const char *key, double fallback) {
    return json_type(object, key) == JSON_NUMBER ? json_get(object, key)->number : fallback;
}

static const char *json_text_or(const struct Json *object, const char *key, const char *fallback) {
    return json_type(object, key) == JSON_STRING ? json_get(object, key)->string.data : fallback;
}

/* A whole number from 0 to max; anything else ends the program. */
static size_t json_size(const struct Json *json, size_t max, const char *path, const char *name) {
    /* a double holds whole numbers up to 2^53 exactly: no real size comes near that */
    CHECK(json && json->type == JSON_NUMBER && json->number >= 0 && json->number <= (double)max
              && json->number == floor(json->number),
          "%s: \"%s\" must be a whole number from 0 to %zu", path, name, max);
    return (size_t)json->number;
}

/* Takes the next character off a text that may be anything, for example a model's answer, which can
 * end in half a character. A byte that belongs to no character counts as U+FFFD. */
static uint32_t text_take(struct Text *text) {
    uint32_t c;
    size_t length = utf8_read((const unsigned char *)text->data, text->length, &c);
    size_t taken = MAX(length, (size_t)1);
    *text = (struct Text){text->data + taken, text->length - taken};
    return length > 0 ? c : 0xfffd;
}

/* Characters that would steer a terminal: 0 to 31, 127, and 128 to 159. */
static bool is_control(uint32_t c) {
    return c < 32 || (c >= 127 && c < 160);
}

/* Writes `before`, for example the key, then the text in quotes.                test: json_write */
static void json_write_string(FILE *file, const char *before, struct Text text) {
    static const char plain[] = "\"\\\n\r\t";
    static const char letters[] = "\"\\nrt";
    fprintf(file, "%s\"", before);
    while (text.length > 0) {
        char bytes[4];
        uint32_t c = text_take(&text);
        const char *escape = c > 0 && c < 128 ? strchr(plain, (int)c) : NULL;
        if (escape)
            fprintf(file, "\\%c", letters[escape - plain]);
        else if (is_control(c)) /* JSON forbids those below 32 in a string */
            fprintf(file, "\\u%04x", (unsigned)c);
        else
            fwrite(bytes, 1, utf8_write(bytes, c), file);
    }
    fputc('"', file);
}

/* A model's text for a terminal or a pipe, as UTF-8: bytes that belong to no character become
 * U+FFFD, control characters become spaces unless they are in `kept`.          test: text_shown */
static struct Text text_shown(struct Arena *arena, struct Text text, const char *kept) {
    char *to = arena_alloc(arena, 3 * text.length + 1, 1); /* U+FFFD has three bytes */
    size_t n = 0;
    while (text.length > 0) {
        uint32_t c = text_take(&text);
        /* `c &&`: strchr would find the NUL at the end of `kept` */
        bool is_kept = c && c < 128 && strchr(kept, (int)c);
        n += utf8_write(to + n, is_control(c) && !is_kept ? ' ' : c);
    }
    to[n] = 0;
    return (struct Text){to, n};
}

/* A number as JSON. NaN and infinity, which JSON lacks, become null, Python's None. 9 digits are
 * enough to read any float back bit for bit.
 * By hand: 0.1f comes out as 0.100000001, and is read back as 0.1f.             test: json_write */
static const char *json_number_into(char text[32], double x) {
    snprintf(text, 32, "%.9g", x);
    return isfinite(x) ? text : "null";
}
/* The same for an argument of printf; the text lives as long as the caller's block. */
#define json_number_text(x) json_number_into((char[32]){0}, x)

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

/* shell_word -- a word in a form that a POSIX shell reads back, so that a printed command line can
 * be pasted: plain, or in single quotes. A single quote cannot be escaped inside these: they are
 * closed, \' is written, and they are opened again.
 * By hand: Ana's run -> 'Ana'\''s run'.                                       test: shell_word */
static const char *shell_word(struct Arena *arena, const char *word) {
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_@%+"
                                "=:,./-";
    if (*word && !word[strspn(word, plain)])
        return word;
    /* the worst case: nothing but quotes, which take four bytes each */
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

/* =============================================================================================
 * Chapter 22 - Data sets, tokenizer.bin            [glossary: Conjunto de dados]
 *
 * Which rows does a training see if it is given a file, or a folder whose files somebody else has
 * named? What enters: JSON Lines in TRL's shapes, one object a line,
 *
 *     {"prompt": "The film", "chosen": " moved me.", "rejected": " is a film."}      preferences
 *     {"text": "The film moved me.", "score": 4}                                     rated texts
 *
 * and llm.c's tokenizer.bin, with the merges appended. What leaves: rows, all of one shape, and a
 * tokenizer. An error in a line names the file and the line's number. Data in another format and
 * chats are refused with the command that converts them, a folder without suitable rows with the
 * reason.
 * ============================================================================================= */

/* How to make a tokenizer.bin, for messages. */
#define MAKE_TOKENIZER \
    "python3 prepare_imdb.py tokenizer --source DIR (with encoder.json, vocab.bpe)"

/* ---- tokenizer.bin -------------------------------------------------------------------------- */

/* Takes the next n bytes off a file, or ends the program if it has fewer. `what`: what these bytes
 * are, for the message. */
static const unsigned char *tokenizer_take(const struct Tokenizer *tok, struct Text *rest, size_t n,
                                           const char *what) {
    CHECK(rest->length >= n, "%s: ends inside its %s; make it again: " MAKE_TOKENIZER, tok->path,
          what);
    const char *start = rest->data;
    *rest = (struct Text){start + n, rest->length - n};
    return (const unsigned char *)start;
}

static uint32_t tokenizer_u32(const struct Tokenizer *tok, struct Text *rest, const char *what) {
    const unsigned char *b = tokenizer_take(tok, rest, 4, what);
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

/* llm.c's header: 256 words, of which only four are used. */
static void tokenizer_read_header(struct Tokenizer *tok, struct Text *rest) {
    uint32_t header[256];
    for (size_t i = 0; i < COUNT(header); i++)
        header[i] = tokenizer_u32(tok, rest, "header");
    CHECK(header[0] == TOKENIZER_MAGIC && header[1] == TOKENIZER_VERSION,
          "%s: not a tokenizer.bin of version 2 (it starts with %u, %u); make one: " MAKE_TOKENIZER,
          tok->path, header[0], header[1]);
    /* The merges store an id in 16 bits: there can be at most 65536. */
    tok->vocab_size = header[2];
    tok->end_token = (int)header[3];
    CHECK(tok->vocab_size > BYTE_TOKENS && tok->vocab_size <= 65536
              && header[3] == tok->vocab_size - 1,
          "%s: has %zu ids and end token %u; 257 to 65536 ids, the end token last, are read",
          tok->path, tok->vocab_size, header[3]);
}

/* The tokens: for each its length, one byte, then its bytes. The first 256 are the single bytes, in
 * GPT-2's own order. */
static void tokenizer_read_tokens(struct Tokenizer *tok, struct Text *rest, struct Arena *arena) {
    tok->token = arena_alloc(arena, tok->vocab_size, sizeof *tok->token);
    for (size_t id = 0; id < tok->vocab_size; id++) {
        size_t length = *tokenizer_take(tok, rest, 1, "tokens");
        const unsigned char *bytes = tokenizer_take(tok, rest, length, "tokens");
        tok->token[id] = (struct Text){(const char *)bytes, length};
    }
    /* Encoding starts from single bytes, so each must have an id, whatever the text. 256 different
     * bytes are all of them. */
    memset(tok->byte_token, -1, sizeof tok->byte_token);
    for (int id = 0; id < BYTE_TOKENS; id++) {
        int *byte = &tok->byte_token[(unsigned char)tok->token[id].data[0]];
        CHECK(tok->token[id].length == 1 && *byte < 0, "%s: id %d is not a single byte of its own",
              tok->path, id);
        *byte = id;
    }
}

/* The merges, and the hash table in which encoding looks up a pair. Merge i makes the token
 * BYTE_TOKENS + i from two earlier ones. */
static void tokenizer_read_merges(struct Tokenizer *tok, struct Text *rest, struct Arena *arena) {
    struct Arena scratch = {0};
    /* 1. Each merge makes one token. With the bytes and the end token these are the whole
     *    vocabulary, so the file states the vocabulary's size twice. */
    tok->merges = tokenizer_u32(tok, rest, "merges");
    CHECK(tok->merges + BYTE_TOKENS + 1 == tok->vocab_size,
          "%s: %zu merges do not make a vocabulary of %zu", tok->path, tok->merges,
          tok->vocab_size);
    tok->merge_pair = arena_alloc(arena, tok->merges, sizeof *tok->merge_pair);
    tok->merge_id = arena_alloc(arena, MERGE_SLOTS, sizeof *tok->merge_id);
    memset(tok->merge_id, -1, MERGE_SLOTS * sizeof *tok->merge_id);
    for (size_t i = 0; i < tok->merges; i++) {
        uint32_t pair = tok->merge_pair[i] = tokenizer_u32(tok, rest, "merges");
        size_t id = BYTE_TOKENS + i;
        size_t left = pair & 0xffff;
        size_t right = pair >> 16;

        /* 2. The file also says twice what the token is. Both must agree, or a text that is
         *    encoded and decoded would come out as another. */
        bool agree =
            left < id && right < id
            && text_equal(text_join(&scratch, tok->token[left], tok->token[right]), tok->token[id]);
        CHECK(agree, "%s: token %zu is not what merge %zu makes", tok->path, id, i);
        tok->merge_id[merge_slot(tok, pair)] = (int)id;
        arena_reset(&scratch);
    }
    arena_free(&scratch);
}

/* Unicode's letters, numbers and spaces: for each class the number of ranges, then the ranges in
 * ascending order. */
static void tokenizer_read_classes(struct Tokenizer *tok, struct Text *rest, struct Arena *arena) {
    static const char what[] = "Unicode classes";
    tok->char_class = arena_zeros(arena, UNICODE_END, 1);
    /* all characters in none of the ranges are CLASS_OTHER, 0 */
    for (int class = CLASS_LETTER; class <= CLASS_SPACE; class ++) {
        for (uint32_t n = tokenizer_u32(tok, rest, what), next = 0; n > 0; n--) {
            uint32_t first = tokenizer_u32(tok, rest, what);
            uint32_t last = tokenizer_u32(tok, rest, what);
            /* ranges of one class that overlap or are out of order mean a damaged file */
            CHECK(first >= next && first <= last && last < UNICODE_END,
                  "%s: a Unicode range from %u to %u, after one that ends before %u", tok->path,
                  first, last, next);
            memset(tok->char_class + first, class, last - first + 1);
            next = last + 1;
        }
    }
}

/* tokenizer.bin: first what llm.c's has (header, tokens), then what encoding needs in addition: the
 * merges, and which characters are letters, numbers and spaces.          test: broken_tokenizer */
static struct Tokenizer *tokenizer_load(struct Arena *arena, const char *path) {
    struct Tokenizer *tok = arena_zeros(arena, 1, sizeof *tok);
    tok->path = arena_printf(arena, "%s", path);
    struct Text rest = read_file(arena, path);
    /* each part needs the earlier ones: the header counts the tokens, and the merges are checked
     * against these */
    tokenizer_read_header(tok, &rest);
    tokenizer_read_tokens(tok, &rest, arena);
    tokenizer_read_merges(tok, &rest, arena);
    tokenizer_read_classes(tok, &rest, arena);
    return tok;
}

/* GPT-2's files show each byte as a printable character. Most bytes are one in Latin-1; the others
 * are numbered from U+0100: the first 33, then the 34 after '~', and finally the soft hyphen.
 * By hand: a space, 32, becomes U+0120, so " the" is written "Ġthe".      test: tokenizer_save */
static struct Text token_as_unicode(struct Arena *arena, struct Text token) {
    /* no character below U+0800 takes more than two bytes of UTF-8 */
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

/* vocab.json and merges.txt: what AutoTokenizer looks for next to a model, besides the
 * tokenizer_config.json that tokenizer_config_save writes. A model with a smaller vocabulary has
 * only the first of our ids; it gets those, and the merges that make them.
 *                                                                         test: tokenizer_save */
static void tokenizer_save(const struct Tokenizer *tok, const char *folder, size_t vocab_size) {
    struct Arena arena = {0};
    size_t end = (size_t)endoftext_id(vocab_size);
    /* 1. {"token": id, ...}, the end token last */
    struct Output out = output_open(folder, "vocab.json");
    fputc('{', out.file);
    for (size_t id = 0; id < end; id++) {
        json_write_string(out.file, "", token_as_unicode(&arena, tok->token[id]));
        fprintf(out.file, ": %zu, ", id);
    }
    fprintf(out.file, "\"<|endoftext|>\": %zu}\n", end);
    output_close(&out);

    /* 2. a line for each merge, the most frequent pair first: a merge's line is its rank */
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

/* Every id of a model up to the end of text must be one of the tokenizer's. Ids beyond, which round
 * up the size of a vocabulary, have no text. */
static void tokenizer_check_size(const struct Tokenizer *tok, const char *model,
                                 size_t vocab_size) {
    CHECK((size_t)endoftext_id(vocab_size) < tok->vocab_size,
          "%s: has %zu ids, %s only %zu; another --tokenizer is needed", model, vocab_size,
          tok->path, tok->vocab_size);
}

/* A model folder may bring its own vocabulary. If its ids mean other tokens than ours, it is
 * refused: to that model, our ids would spell a different text. */
static void tokenizer_check_folder(const struct Tokenizer *tok, const char *folder,
                                   size_t vocab_size) {
    struct Arena arena = {0};
    size_t end = (size_t)endoftext_id(vocab_size);
    tokenizer_check_size(tok, folder, vocab_size);
    /* 1. the vocabulary, in one of two files, the older and the newer form; there may be neither */
    const char *path = arena_printf(&arena, "%s/vocab.json", folder);
    const char *newer = arena_printf(&arena, "%s/tokenizer.json", folder);
    struct Json *vocab = NULL;
    if (file_exists(path))
        vocab = json_read_file(&arena, path);
    else if (file_exists(path = newer))
        vocab = json_get(json_get(json_read_file(&arena, path), "model"), "vocab");
    CHECK(!vocab || vocab->type == JSON_OBJECT,
          "%s: its vocabulary is not an object {\"token\": id, ...}", path);

    /* 2. token by token; added_tokens reads those after GPT-2's own */
    for (struct Json *item = vocab ? vocab->child : NULL; item; item = item->next) {
        size_t id = json_size(item, 1 << 24, path, "an id of the vocabulary");
        struct Text ours = id < end ? token_as_unicode(&arena, tok->token[id]) : item->key;
        CHECK(text_equal(ours, item->key),
              "%s: id %zu is \"%s\" here, \"%s\" in %s: another vocabulary than GPT-2's; this "
              "model cannot be used",
              path, id, item->key.data, ours.data, tok->path);
    }
    arena_free(&arena);
}

/* The tokens that a model's folder adds to GPT-2's own, ids `first` to `end` - 1: their names,
 * empty where an id only rounds up the vocabulary (50304 is a multiple of 64, 50257 is not).
 * transformers lists them as {"name": id}, [{"id": id, "content": "name"}] or
 * {"id": {"content": "name"}}. */
static struct Text *added_tokens(struct Arena *arena, const char *folder, size_t first,
                                 size_t end) {
    static const char *const lists[][2] = {{"vocab.json", NULL},
                                           {"added_tokens.json", NULL},
                                           {"tokenizer.json", "added_tokens"},
                                           {"tokenizer_config.json", "added_tokens_decoder"}};
    /* Each of these files may name some of them, or be missing. If two name the same id, the later
     * one, the newer form, counts. */
    struct Text *names = arena_zeros(arena, end - first, sizeof *names);
    for (size_t i = 0; i < COUNT(lists) && first < end; i++) {
        const char *path = arena_printf(arena, "%s/%s", folder, lists[i][0]);
        const struct Json *list = file_exists(path) ? json_read_file(arena, path) : NULL;
        if (lists[i][1])
            list = json_get(list, lists[i][1]);
        for (const struct Json *item = list ? list->child : NULL; item; item = item->next) {
            /* of the three forms the first has a number as its item, the third the id as its key */
            const struct Json *id = item->type == JSON_NUMBER ? item : json_get(item, "id");
            const struct Json *content = json_get(item, "content");
            double number = id ? id->number : item->key.data ? strtod(item->key.data, NULL) : 0;
            if (number >= (double)first && number < (double)end)
                names[(size_t)number - first] = content ? content->string : item->key;
        }
    }
    return names;
}

/* What a file's name, with its path inside the data folder, says: to which split the file belongs,
 * and how much that counts against the names of other files. */
enum Split { SPLIT_NONE, SPLIT_TRAIN, SPLIT_VALIDATION, SPLIT_TEST, SPLITS };
enum SplitRank { RANK_FILE, RANK_FOLDER, RANK_SHARD, RANKS };

struct DataFile {
    const char *path, *name; /* name: the path inside the folder */
    enum Split split;
    enum SplitRank rank;
    bool is_read;
};

/* The shapes that rows may have, best first. */
struct Shapes {
    const unsigned *list;
    size_t n;
};

/* ---- Rows ----------------------------------------------------------------------------------- */

/* The fields of shapes, for a message:  "chosen" + "rejected", or "text" */
static const char *shape_names(struct Arena *arena, struct Shapes shapes) {
    /* the next joint is " + " inside a shape and ", or " between two */
    const char *names = "";
    const char *joint = "";
    for (size_t s = 0; s < shapes.n; s++, joint = ", or ")
        for (size_t i = 0; i < COUNT(FIELD_NAMES); i++) {
            if (!(shapes.list[s] >> i & 1))
                continue;
            names = arena_printf(arena, "%s%s\"%s\"", names, joint, FIELD_NAMES[i]);
            joint = " + ";
        }
    return names;
}

static int *json_ids(struct Arena *arena, const struct Json *array, size_t *count,
                     const char *place) {
    /* an object has a count and children too, but only an array's children are ids */
    CHECK(array->type == JSON_ARRAY, "%s: \"%s\" must hold token ids", place, array->key.data);
    *count = (size_t)array->number;
    int *ids = arena_alloc(arena, *count, sizeof *ids);
    int *to = ids;
    for (struct Json *item = array->child; item; item = item->next)
        /* no vocabulary has 2^24 ids; the caller checks whether the model has this one */
        *to++ = (int)json_size(item, (1 << 24) - 1, place, "a token id");
    return ids;
}

/* The file in a place FILE:LINE, quoted for the shell. */
static const char *path_of_place(struct Arena *arena, const char *place) {
    struct Text path = {place, (size_t)(strrchr(place, ':') - place)};
    return shell_word(arena, text_copy(arena, path).data);
}

/* Ends the program if a field that should be a string is a chat, an array of messages with roles.
 * GPT-2 was trained without a chat template, so the user decides how messages become text; the
 * command in the message writes "role: content" lines. If a row also has a prompt that is a string,
 * that repeats the beginning of its chats, and the command leaves it out, as TRL does. */
static void refuse_chat(const struct Json *item, const char *place) {
    /* 1. One command for all shapes: chats become text, all other fields stay. */
    static const char flatten[] =
        "python3 -c \"import json,sys; "
        "f=lambda v:''.join('%s: %s\\n'%(m['role'],m['content'])for m in v)"
        "if type(v)==list and v and type(v[0])==dict else v; "
        "[print(json.dumps({k.replace('messages','text'):f(v)for k,v in json.loads(l).items()"
        "if(k,type(v))!=('prompt',str)}))for l in sys.stdin]\"";
    bool is_chat = item && item->type == JSON_ARRAY && json_get(item->child, "role");

    /* 2. The message names the field, and gives the command for this very file. */
    struct Arena arena = {0};
    if (is_chat)
        die("%s: \"%s\" is a chat, a list of messages, a string was expected (GPT-2 has no chat "
            "template); flatten it: %s < %s > rows.jsonl",
            place, item->key.data, flatten, path_of_place(&arena, place));
}

/* Which of FIELD_NAMES a row has; null counts as absent. */
static unsigned json_fields(const struct Json *json) {
    unsigned has = 0;
    for (size_t i = 0; i < COUNT(FIELD_NAMES); i++)
        if (json_type(json, FIELD_NAMES[i]) != JSON_NULL)
            has |= 1u << i;
    return has;
}

/* A row's score, margin or label; a label may also be true or false. */
static double json_field_number(const struct Json *item, bool is_label, const char *place) {
    double number = is_label && item->type == JSON_TRUE ? 1 : item->number;
    bool is_truth = is_label && (item->type == JSON_TRUE || item->type == JSON_FALSE);
    /* rewards are floats: a larger number would become infinite */
    CHECK(is_truth || (item->type == JSON_NUMBER && fabs(number) <= FLT_MAX),
          "%s: \"%s\" must be a number, at most 3.4e38", place, item->key.data);
    CHECK(!is_label || number == 0 || number == 1, "%s: \"label\" must be 0 or 1", place);
    return number;
}

/* Turns one line's object into a row of this shape. Fields that the shape does not use are not
 * checked: `label` may be "pos" where only texts are read. */
static struct Row dataset_row(struct Arena *keep, const struct Json *json, unsigned shape,
                              const char *place) {
    struct Row row = {.has = json_fields(json)};
    /* where the texts go, in the order of enum Field */
    struct Text *texts[] = {&row.text, &row.prompt, &row.completion, &row.chosen, &row.rejected};
    unsigned used = row.has & (shape | shape >> 16); /* what it must have, and may have */
    for (size_t i = 0; i < COUNT(FIELD_NAMES); i++) {
        const struct Json *item = json_get(json, FIELD_NAMES[i]);
        unsigned field = 1u << i;
        if (!(used & field))
            continue;
        if (i < COUNT(texts)) {
            refuse_chat(item, place);
            CHECK(item->type == JSON_STRING, "%s: \"%s\" must be a string", place, FIELD_NAMES[i]);
            *texts[i] = text_copy(keep, item->string);
        } else if (field == HAS_QUERY_IDS)
            row.query_ids = json_ids(keep, item, &row.query_length, place);
        else if (field == HAS_RESPONSE_IDS)
            row.response_ids = json_ids(keep, item, &row.response_length, place);
        else if (field == HAS_LABEL)
            row.label = json_field_number(item, true, place);
        else if (field == HAS_SCORE)
            row.score = json_field_number(item, false, place);
        else
            row.margin = json_field_number(item, false, place);
    }
    return row;
}

/* The first of the shapes that a row fits, or 0. */
static unsigned shape_of(unsigned has, struct Shapes shapes) {
    for (size_t i = 0; i < shapes.n; i++) {
        /* the lower 16 bits: what a row must have */
        unsigned required = shapes.list[i] & (MAY_HAVE(1u) - 1);
        if ((has & required) == required)
            return shapes.list[i];
    }
    return 0;
}

/* ---- Formats that are not JSON Lines -------------------------------------------------------- */

/* Is this file a table, CSV or TSV? Its name says so, or a cell of its first line is the name of
 * one of our fields. */
static bool is_table(struct Text file, const char *path) {
    const char *dot = strrchr(path, '.');
    if (dot && (strcmp(dot, ".csv") == 0 || strcmp(dot, ".tsv") == 0))
        return true;
    const char *cell = file.data;
    while (*cell && *cell != '\n') {
        struct Text name = {cell, strcspn(cell, ",\t\"\r\n")};
        for (size_t i = 0; i < COUNT(FIELD_NAMES); i++)
            if (text_equal(name, text_of(FIELD_NAMES[i])))
                return true;
        /* on to the next cell, which may be in quotes */
        cell += name.length;
        cell += strspn(cell, ",\t\"\r");
    }
    return false;
}

/* Other formats in which data comes, by their first bytes, and the command that turns a file, whose
 * name follows, into JSON Lines. Tables have no such bytes and come last. */
#define PANDAS(reader)                                                                      \
    "python3 -c \"import pandas,sys; print(pandas." reader "(sys.argv[1]).to_json(orient='" \
    "records', lines=True), end='')\""
static const struct Format {
    const char *start, *name, *command;
} FORMATS[] = {
    {"[", "a JSON array",
     "python3 -c \"import json,sys; [print(json.dumps(row)) for row in json.load(open("
     "sys.argv[1]))]\""},
    {"PAR1", "Parquet", PANDAS("read_parquet")},
    {"ARROW1", "an Arrow file", PANDAS("read_feather")},
    {"\xff\xff\xff\xff", "an Arrow stream (save_to_disk of datasets)",
     "python3 -c \"import json,sys; from datasets import Dataset; [print(json.dumps(row)) for row "
     "in Dataset.from_file(sys.argv[1])]\""},
    {"\x1f\x8b", "compressed by gzip", "gzip -dc"},
    {"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -dc"},
    {"BZh", "compressed by bzip2", "bzip2 -dc"},
    {"\3757zXZ", "compressed by xz", "xz -dc"},
    {"PK\x03\x04", "a zip archive", "unzip -p"},
    {"", "a table (TSV)", PANDAS("read_table")},
    {"", "a table (CSV)", PANDAS("read_csv")},
};
enum { FORMAT_CSV = COUNT(FORMATS) - 1, FORMAT_TSV = FORMAT_CSV - 1 };

/* Ends the program if a file is in another format, which the message names. */
static void refuse_other_formats(struct Text file, const char *path) {
    /* 1. Look at its first bytes, after any blanks. */
    size_t format = 0;
    file = text_without_mark(file);
    size_t blank = strspn(file.data, " \t\r\n");
    file = (struct Text){file.data + blank, file.length - blank};
    while (format < FORMAT_TSV && !text_starts(file, FORMATS[format].start))
        format++;

    /* 2. None of those formats: JSON Lines begin with a brace, a table with the names of its
     *    columns. Anything else is left to the parser, which says what is wrong in the first
     *    line. */
    if (format == FORMAT_TSV) {
        if (*file.data == '{' || !is_table(file, path))
            return;
        bool has_tab = file.data[strcspn(file.data, "\t\n")] == '\t';
        format = has_tab ? FORMAT_TSV : FORMAT_CSV;
    }
    struct Arena arena = {0};
    die("%s: is %s, JSON Lines were expected; run: %s %s > rows.jsonl", path, FORMATS[format].name,
        FORMATS[format].command, shell_word(&arena, path));
}

/* ---- Files ---------------------------------------------------------------------------------- */

/* Parses one line of a file, which must be a JSON object; if it is not, the message says what may
 * help. */
static struct Json *dataset_line(struct Arena *scratch, struct Text line, bool is_last,
                                 const char *place) {
    const char *error;
    const char *hint = "";
    size_t where;
    struct Json *json = json_parse(scratch, line, &error, &where);
    if (json && json->type == JSON_OBJECT)
        return json;
    /* a UTF-16 file begins with U+FEFF, in the file's byte order */
    if (text_starts(line, "\xff\xfe") || text_starts(line, "\xfe\xff"))
        hint = "; it is UTF-16, make it UTF-8: iconv -f UTF-16 -t UTF-8";
    else if (*line.data != '{')
        hint = "; one object a line was expected: {\"text\": \"...\"}";
    else if (!is_last && where >= line.length)
        /* an object that is still open at the end of its line was laid out over several lines */
        hint = arena_printf(scratch,
                            "; the object goes on in the next line, it must be on one; "
                            "run: jq -c . %s > rows.jsonl",
                            path_of_place(scratch, place));
    return json_object(scratch, line, place, hint);
}

/* Ends the program and says why a row fits none of the shapes. */
static _Noreturn void refuse_shape(const struct Json *json, struct Shapes shapes,
                                   const char *place) {
    struct Arena arena = {0};
    unsigned has = json_fields(json);
    refuse_chat(json_get(json, "messages"), place);
    const char *wanted = shape_names(&arena, shapes);
    const char *found = shape_names(&arena, (struct Shapes){&has, 1});
    die("%s: expected %s, found %s", place, wanted, *found ? found : "no field that is known");
}

static void dataset_append(struct Arena *arena, struct Dataset *data, struct Row row) {
    if (data->n == data->capacity) {
        /* memory from an arena cannot grow in place, so the rows move to a block twice as large */
        data->capacity = MAX(2 * data->n, (size_t)256);
        struct Row *rows = arena_alloc(arena, data->capacity, sizeof *rows);
        data->rows = data->n ? memcpy(rows, data->rows, data->n * sizeof *rows) : rows;
    }
    data->rows[data->n++] = row;
}

/* Appends a file's rows. All must have the shape of the data set's first row, which may have any of
 * `shapes`. A row that does not fit ends the program, unless it is the first of an optional file:
 * then the file is left out. */
static void dataset_add_file(struct Arena *arena, struct Dataset *data, struct DataFile *source,
                             struct Shapes shapes, bool optional) {
    struct Arena scratch = {0};
    struct Arena line_arena = {0};
    struct Text file = read_file(&scratch, source->path);
    const char *at = file.data;
    const char *end = file.data + file.length;
    refuse_other_formats(file, source->path);
    for (size_t line = 1; at < end; line++) {
        /* 1. A line. Empty ones count, so that a message has the line number that an editor
         *    shows. */
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        if (!stop)
            stop = end;
        struct Text text = {at, (size_t)(stop - at)};
        at = stop + 1;
        if (strspn(text.data, " \t\r\v\f") == text.length)
            continue;
        const char *place = arena_printf(&line_arena, "%s:%zu", source->path, line);
        struct Json *json = dataset_line(&line_arena, text, at >= end, place);

        /* 2. Its shape. The first row of a data set takes the best that it fits; all others must
         *    have the same, since rows must not lose their prompt in the middle of a data set. */
        if (data->shape)
            shapes = (struct Shapes){&data->shape, 1};
        unsigned shape = shape_of(json_fields(json), shapes);
        if (!shape && optional && !source->is_read)
            break;
        if (!shape)
            refuse_shape(json, shapes, place);

        /* 3. It becomes a row. */
        data->shape = shape;
        source->is_read = true;
        dataset_append(arena, data, dataset_row(arena, json, shape, place));
        arena_reset(&line_arena);
    }
    arena_free(&line_arena);
    arena_free(&scratch);
}

/* ---- The splits of a folder ----------------------------------------------------------------- */

/* The split that is named by a word between `at` and `end`, a part of a path, in upper or lower
 * case; of several splits the first in enum Split. The characters that separate words are
 * NON_WORDS_CHARS in datasets. */
static enum Split split_of_words(const char *at, const char *end) {
    static const char *const names[SPLITS] = {
        [SPLIT_TRAIN] = "train training",
        [SPLIT_VALIDATION] = "validation valid dev val",
        [SPLIT_TEST] = "test testing eval evaluation",
    };
    for (enum Split split = SPLIT_TRAIN; split < SPLITS; split++)
        for (const char *word = at; word < end; word++) {
            /* only a whole word counts: "tests" names no split */
            size_t length = strcspn(word, "-._ 0123456789/");
            const char *name = names[split];
            for (size_t n; (n = next_name(&name)) > 0; name += n)
                if (n == length && strncasecmp(word, name, n) == 0)
                    return split;
            word += length;
        }
    return SPLIT_NONE;
}

/* Is this the name of a shard, such as "train-00000-of-00002.jsonl", one of the files into which
 * datasets divides large data? */
static bool is_shard_name(const char *name) {
    static const char digits[] = "0123456789";
    /* before "-of-" a hyphen and five digits, after it five digits or more */
    for (const char *of = strstr(name, "-of-"); of; of = strstr(of + 1, "-of-"))
        if (of - name >= 6 && of[-6] == '-' && strspn(of - 5, digits) == 5
            && strspn(of + 4, digits) >= 5)
            return true;
    return false;
}

/* data_file_split -- to which split a file of a folder belongs, by its name, as decided by
 * datasets.load_dataset (data_files.py): shards in data/ take precedence over folders named after a
 * split, and these over files named after one. Two rules are our own, lest held-out rows be trained
 * on: upper and lower case are the same, and a name that has words of several splits counts for one
 * split only.
 * By hand: "train.jsonl" train; "dev/a.jsonl" validation; "tests.jsonl" none.
 *                                                                       test: data_splits */
static void data_file_split(struct DataFile *file) {
    const char *slash = strrchr(file->name, '/');
    const char *base = slash ? slash + 1 : file->name;
    bool is_in_data = base == file->name + 5 && strncmp(file->name, "data/", 5) == 0;
    enum Split of_folders = split_of_words(file->name, base);
    /* the file's own name counts only if no folder above it names a split */
    file->split = of_folders ? of_folders : split_of_words(base, base + strlen(base));
    file->rank = of_folders                          ? RANK_FOLDER
                 : is_in_data && is_shard_name(base) ? RANK_SHARD
                                                     : RANK_FILE;
}

static int compare_data_files(const void *a, const void *b) {
    return strcmp(((const struct DataFile *)a)->path, ((const struct DataFile *)b)->path);
}

enum { DATA_FILES_MOST = 256 };

/* Adds the *.jsonl files of a folder and its subfolders to data->files. As datasets does, it skips
 * hidden files and folders, folders like __pycache__, and links to folders, which may form a
 * loop. */
static void dataset_list_files(struct Arena *arena, struct Dataset *data, const char *folder) {
    DIR *dir = opendir(folder);
    CHECK(dir, "%s: %s", folder, strerror(errno));
    for (struct dirent *entry; (entry = readdir(dir));) {
        const char *name = entry->d_name;
        const char *path = arena_printf(arena, "%s/%s", folder, name);
        const char *dot = strrchr(name, '.');
        struct stat s;
        if (name[0] == '.' || lstat(path, &s) != 0)
            continue;
        /* 1. a folder: the files in it */
        if (S_ISDIR(s.st_mode) && strncmp(name, "__", 2) != 0)
            dataset_list_files(arena, data, path);
        if (is_folder(path) || !dot || strcmp(dot, ".jsonl") != 0)
            continue;

        /* 2. a file of rows: the path inside the data folder tells its split */
        CHECK(data->file_count < DATA_FILES_MOST,
              "%s: more than %d .jsonl files; join some of them", data->path, DATA_FILES_MOST);
        struct DataFile file = {.path = path, .name = path + strlen(data->path) + 1};
        data_file_split(&file);
        data->files[data->file_count++] = file;
    }
    closedir(dir);
}

/* "a.jsonl, b.jsonl and 3 more": the files of a folder that have been read, or have not. */
static const char *data_file_names(struct Arena *arena, const struct Dataset *data, bool is_read) {
    enum { MOST = 8 };
    const char *names = "";
    size_t count = 0;
    for (size_t i = 0; i < data->file_count; i++) {
        /* a long list would hide what the message is about */
        if (data->files[i].is_read != is_read || count++ >= MOST)
            continue;
        names = arena_printf(arena, "%s%s%s", names, *names ? ", " : "", data->files[i].name);
    }
    return count > MOST ? arena_printf(arena, "%s and %zu more", names, count - MOST) : names;
}

/* ---- A data set ----------------------------------------------------------------------------- */

/* Has a data set, if there is one, read this file? */
static bool is_read_by(const struct Dataset *data, const char *path) {
    for (size_t i = 0; data && i < data->file_count; i++) {
        if (data->files[i].is_read && same_file(data->files[i].path, path))
            return true;
    }
    return false;
}

/* Adds the files of a folder that belong to a split and have rows of a shape. Only files of one
 * rank are added, the highest that gives any rows, and none that `training` has read. */
static void dataset_add_split(struct Arena *arena, struct Dataset *data, enum Split split,
                              unsigned shape, const struct Dataset *training) {
    for (size_t rank = RANKS; rank-- > 0 && data->n == 0;)
        for (size_t i = 0; i < data->file_count; i++) {
            struct DataFile *file = &data->files[i];
            bool is_wanted = file->split == split && file->rank == rank;
            if (is_wanted && !is_read_by(training, file->path))
                dataset_add_file(arena, data, file, (struct Shapes){&shape, 1}, true);
        }
}

/* Ends the program: no file of a folder has suitable rows. The message says why the first file
 * that might have had them has none, or what is there instead. */
static _Noreturn void refuse_folder(struct Arena *arena, struct Dataset *data, struct Shapes shapes,
                                    const struct Dataset *training) {
    /* none has been read, so these are all the files of the folder */
    const char *files = data_file_names(arena, data, false);
    const char *wanted = shape_names(arena, shapes);
    /* 1. Try each file that might have been read, this time not as an optional one: its first row
     *    ends the program with the reason. A file without rows does not. */
    for (size_t i = 0; i < data->file_count; i++) {
        struct DataFile *file = &data->files[i];
        bool is_held_out = file->split == SPLIT_VALIDATION || file->split == SPLIT_TEST;
        if ((is_held_out && !training) || is_read_by(training, file->path))
            continue;
        dataset_add_file(arena, data, file, shapes, false);
    }

    /* 2. There was no such row. */
    CHECK(*files, "%s: no row with %s was found: no .jsonl file is there", data->path, wanted);
    CHECK(!training, "%s: no held-out row with %s was found: the training reads what is there (%s)",
          data->path, wanted, files);
    die("%s: no row with %s was found but in held-out data (%s); name the file that is meant: %s",
        data->path, wanted, files, data->files[0].path);
}

/* Reads a file or a folder. From a folder it takes the best shape that any file of the allowed
 * splits has, and the rows of that shape from the first split that has any. If there are other
 * files, a note says which were read. */
static struct Dataset *dataset_open(struct Arena *arena, const char *path, struct Shapes shapes,
                                    const struct Dataset *training) {
    static const enum Split to_train[] = {SPLIT_TRAIN, SPLIT_NONE};
    static const enum Split held_out[] = {SPLIT_VALIDATION, SPLIT_TEST, SPLIT_NONE, SPLIT_TRAIN};
    const enum Split *splits = training ? held_out : to_train;
    size_t split_count = training ? COUNT(held_out) : COUNT(to_train);
    struct Dataset *data = arena_zeros(arena, 1, sizeof *data);
    data->path = arena_printf(arena, "%s", path);
    data->files = arena_zeros(arena, DATA_FILES_MOST, sizeof *data->files);
    /* 1. A single file is read whatever its name says: the user has named it. */
    if (!is_folder(path)) {
        data->files[data->file_count++].path = data->path;
        dataset_add_file(arena, data, data->files, shapes, false);
        CHECK(data->n > 0, "%s: no row with %s was found", path, shape_names(arena, shapes));
        return data;
    }

    /* 2. A folder's files are sorted, since the order in which the system lists them differs from
     *    machine to machine. Shape comes before split: if "data.jsonl" has pairs, DPO wants those,
     *    whatever texts "train.jsonl" may have. */
    dataset_list_files(arena, data, data->path);
    qsort(data->files, data->file_count, sizeof *data->files, compare_data_files);
    for (size_t s = 0; s < shapes.n; s++)
        for (size_t k = 0; k < split_count && data->n == 0; k++)
            dataset_add_split(arena, data, splits[k], shapes.list[s], training);
    if (data->n == 0)
        refuse_folder(arena, data, shapes, training);

    /* 3. A choice was made for the user, who should know about it. */
    const char *left_out = data_file_names(arena, data, false);
    if (*left_out)
        warn("%s: read %s%s; left out %s", path, data_file_names(arena, data, true),
             training ? " as held-out data" : "", left_out);
    return data;
}

static bool text_contains(struct Text text, struct Text word) {
    for (size_t i = 0; i + word.length <= text.length; i++)
        if (memcmp(text.data + i, word.data, word.length) == 0)
            return true;
    return false;
}

static void PRINTF_LIKE(4, 5)
    note_rows(const struct Dataset *data, size_t n, const char *rows, const char *format, ...) {
    if (n == 0)
        return;
    char why[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    warn("%s: %zu of %zu %s %s", data->path, n, data->n, rows, why);
}

/* Some tutorials say to write "<|endoftext|>" after each text. Here these are thirteen ordinary
 * characters, which the model would learn to write, and the end token would still be added after
 * them. One note for each data set says so.                            test: data_written_ends */
static void warn_of_written_ends(const struct Dataset *data, const struct Tokenizer *tok) {
    struct Text name = tok->token[tok->end_token];
    /* Look only at the fields that are used. A pair's prompt is used if there is one. */
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
    note_rows(data, count, "rows",
              "contain \"%.*s\", which is ordinary text here; leave it out: the end token is added "
              "after each text anyway",
              (int)name.length, name.data);
}

/* dataset_load -- a JSON Lines file, or a folder of them.          [glossary: Conjunto de dados]
 * shapes: what the caller can use, best first. A folder stands for its train split, or, if that has
 * no such rows, for the files whose names name no split.                      test: data_splits */
static struct Dataset *dataset_load(struct Arena *arena, const char *path, const unsigned *shapes,
                                    size_t shape_count) {
    return dataset_open(arena, path, (struct Shapes){shapes, shape_count}, NULL);
}

/* dataset_load_held_out -- the rows on which a training is measured, of the same shape as those it
 * learns from. A folder stands for its validation split, else for its test split, else for the
 * files that name no split, else for its train split, but never for a file that the training reads:
 * a model that has seen the answers does well on them. */
static struct Dataset *dataset_load_held_out(struct Arena *arena, const char *path,
                                             const struct Dataset *training) {
    return dataset_open(arena, path, (struct Shapes){&training->shape, 1}, training);
}

/* =============================================================================================
 * Chapter 23 - safetensors, model and adapter folders            [glossary: Hugging Face]
 *
 * How are models exchanged with transformers and PEFT? A model is a folder that transformers reads:
 * config.json and model.safetensors. An adapter is one that PEFT reads. What enters: such folders,
 * whoever wrote them; settings that would change the mathematics are refused by name. What leaves:
 * a model in memory, or a folder in which no file is replaced before all the new ones are complete.
 * ============================================================================================= */

/* The index of the first of n numbers that is NaN or infinite; n if all are finite. */
static size_t first_not_finite(const float *x, size_t n) {
    for (size_t first = 0; first < n; first += 4096) {
        size_t end = MIN(n, first + 4096);
        int bad = 0;
        /* no early exit, so that compilers can vectorize the loop; NaN fails any comparison */
        for (size_t i = first; i < end; i++)
            bad |= !(fabsf(x[i]) <= FLT_MAX);
        for (size_t i = first; bad && i < end; i++)
            if (!isfinite(x[i]))
                return i;
    }
    return n;
}

/* 16-bit numbers. bfloat16 is the upper half of a float: the same range, but 8 bits of precision.
 * float16 has 5 bits of exponent (bias 15) and 10 of fraction; below 2^-14 it has no leading 1.
 * By hand: 0x3e00 is exponent 15, fraction 512: (1024 + 512) 2^(15 - 25) = 1.5.
 *                                                                       test: safetensors_half */
static float float_of_bf16(uint16_t half) {
    return float_of_bits((uint32_t)half << 16);
}

static float float_of_f16(uint16_t half) {
    int exponent = half >> 10 & 31;
    int fraction = half & 1023;
    /* Exponent 0: fraction / 2^10 times 2^-14. Exponent 31: infinity, or NaN if there is a
     * fraction. Otherwise add the 1 before the point, which is not stored. */
    float magnitude = exponent == 0    ? ldexpf((float)fraction, -24)
                      : exponent == 31 ? (fraction ? NAN : INFINITY)
                                       : ldexpf((float)(1024 + fraction), exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

/* A safetensors file: the header's length in 8 bytes, a JSON header {"name": {"dtype", "shape",
 * "data_offsets"}}, then the numbers. */
struct SafeTensors {
    FILE *file;
    char *path;
    struct Json *header;
    uint64_t data_start, data_size;
};

/* ---- safetensors files ---------------------------------------------------------------------- */

/* Where a tensor's bytes are, counted from the end of the header. */
struct Span {
    uint64_t begin, end;
    const char *name;
};

/* Orders spans by their middles: an empty tensor, which begins where it ends, has one too. */
static int compare_spans(const void *a, const void *b) {
    const struct Span *x = a;
    const struct Span *y = b;
    return (x->begin + x->end > y->begin + y->end) - (x->begin + x->end < y->begin + y->end);
}

/* Where the numbers of a header's entry are; the entry is checked. */
static struct Span safetensors_span(const struct SafeTensors *st, const struct Json *entry) {
    const struct Json *offsets = json_get(entry, "data_offsets");
    CHECK(json_type(entry, "dtype") == JSON_STRING && json_type(entry, "shape") == JSON_ARRAY
              && offsets && offsets->type == JSON_ARRAY && offsets->child && offsets->child->next,
          "%s: tensor %s lacks dtype, shape or data_offsets", st->path, entry->key.data);
    struct Span span = {json_size(offsets->child, SIZE_MAX / 4, st->path, "data_offsets"),
                        json_size(offsets->child->next, SIZE_MAX / 4, st->path, "data_offsets"),
                        entry->key.data};
    /* before anything is read there, or memory allocated for it */
    CHECK(span.begin <= span.end && span.end <= st->data_size,
          "%s: tensor %s: its bytes %llu to %llu leave the file's %llu; cut short?", st->path,
          span.name, (unsigned long long)span.begin, (unsigned long long)span.end,
          (unsigned long long)st->data_size);
    return span;
}

/* Ends the program if two tensors share bytes, even tensors that nobody reads: the file is then not
 * what its writer meant. */
static void safetensors_check_overlap(const struct SafeTensors *st, struct Arena *arena) {
    struct Span *spans = arena_alloc(arena, (size_t)st->header->number + 1, sizeof *spans);
    struct Span *end = spans;
    for (struct Json *entry = st->header->child; entry; entry = entry->next) {
        /* the only entry that is not a tensor */
        entry->is_taken = text_equal(entry->key, text_of("__metadata__"));
        if (!entry->is_taken)
            *end++ = safetensors_span(st, entry);
    }
    /* once they are sorted, if any two overlap, two neighbours do */
    qsort(spans, (size_t)(end - spans), sizeof *spans, compare_spans);
    for (struct Span *span = spans + 1; span < end; span++)
        CHECK(span->begin >= span[-1].end, "%s: tensors %s and %s share bytes", st->path,
              span[-1].name, span->name);
}

/* Opens a file and reads its header; the numbers are read only when needed. */
static struct SafeTensors safetensors_open(struct Arena *arena, const char *path) {
    struct SafeTensors st = {.path = arena_printf(arena, "%s", path)};
    struct stat status;
    /* opening a pipe would wait for a writer, so only a file on a disk is opened */
    CHECK(stat(path, &status) != 0 || S_ISREG(status.st_mode),
          "%s: is a folder, a pipe or a device; a file was expected", path);
    st.file = fopen(path, "rb");
    CHECK(st.file, "%s: %s", path, strerror(errno));

    /* 1. The header's length, which is checked against the file's before it is used. */
    char start[64];
    size_t n = fread(start, 1, sizeof start, st.file);
    check_fetched(path, (struct Text){start, n});
    CHECK(n >= 8, "%s: not a safetensors file: it has %zu bytes, fewer than its 8-byte prefix",
          path, n);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | (unsigned char)start[i];
    uint64_t behind = (uint64_t)status.st_size - 8;
    CHECK(length >= 2 && length <= behind,
          "%s: not a safetensors file, or cut short: its header claims %llu bytes, %llu follow",
          path, (unsigned long long)length, (unsigned long long)behind);

    /* 2. The header, and whether what it says of the tensors is possible. */
    char *text = arena_alloc(arena, (size_t)length, 1);
    CHECK(fseeko(st.file, 8, SEEK_SET) == 0 && fread(text, 1, (size_t)length, st.file) == length,
          "%s: cannot be read: %s", path, strerror(errno));
    st.header = json_object(arena, (struct Text){text, (size_t)length}, path, ", in its header");
    st.data_start = 8 + length;
    st.data_size = behind - length;
    safetensors_check_overlap(&st, arena);
    return st;
}

static void safetensors_convert(float *to, const unsigned char *from, size_t n, const char *dtype) {
    if (strcmp(dtype, "F32") == 0) {
        memcpy(to, from, n * 4);
        return;
    }
    bool bf16 = strcmp(dtype, "BF16") == 0;
    for (size_t i = 0; i < n; i++) {
        /* byte by byte: a buffer of bytes need not be aligned for 16-bit numbers */
        uint16_t half = (uint16_t)(from[2 * i] | from[2 * i + 1] << 8);
        to[i] = bf16 ? float_of_bf16(half) : float_of_f16(half);
    }
}

/* "300, 12": a tensor's shape for a message. */
static const char *tensor_shape(char text[48], const struct Tensor *t) {
    snprintf(text, 48, "%zu%s%.0zu", t->shape[0], t->ndim == 2 ? ", " : "", t->shape[1]);
    return text;
}

/* An entry must have the shape of the tensor, which follows from the configuration. */
static void safetensors_check_shape(const struct SafeTensors *st, const struct Json *entry,
                                    const struct Tensor *tensor) {
    char expected[48], found[96] = "";
    size_t used = 0;
    tensor_shape(expected, tensor);
    /* both are compared as text, which the message needs anyway; a long shape is cut */
    for (struct Json *item = json_get(entry, "shape")->child; item && used < 60; item = item->next)
        used += (size_t)snprintf(found + used, sizeof found - used, "%s%.15g", used ? ", " : "",
                                 item->type == JSON_NUMBER ? item->number : NAN);
    CHECK(strcmp(found, expected) == 0,
          "%s: tensor %s: expected shape [%s], found [%s]; is the folder's config this file's?",
          st->path, tensor->name, expected, found);
}

/* Checks that numbers `first` to first + n - 1 of a tensor are finite. A single NaN would spread to
 * all activations, and after one step to all weights. */
static void safetensors_check_finite(const struct SafeTensors *st, const struct Tensor *tensor,
                                     size_t first, size_t n) {
    /* a tensor of bits holds no floats, but counters and random states */
    if (tensor->bits)
        return;
    const float *w = tensor->w + first;
    size_t bad = first_not_finite(w, n);
    /* AdamW's mean of squared gradients may overflow to infinity: its step is then 0 */
    bool is_moment = strncmp(tensor->name, "exp_avg", 7) == 0;
    while (is_moment && bad < n && isinf(w[bad]))
        bad += 1 + first_not_finite(w + bad + 1, n - bad - 1);
    CHECK(bad == n,
          "%s: tensor %s: number %zu is %g, a finite one was expected; "
          "take an earlier checkpoint or a fresh copy of the file",
          st->path, tensor->name, first + bad, w[bad]);
}

/* Reads one entry of the header into a tensor, whose shape the entry must have.
 *                                             test: safetensors_round_trip, safetensors_half */
static void safetensors_read(struct SafeTensors *st, struct Json *entry, struct Tensor *tensor) {
    /* 1. Are these the right numbers, of a type that can be read, and all of them? */
    struct Span span = safetensors_span(st, entry);
    const char *type = json_get(entry, "dtype")->string.data;
    bool is_half = strcmp(type, "F16") == 0 || strcmp(type, "BF16") == 0;
    size_t width = is_half ? 2 : 4;
    CHECK(is_half || strcmp(type, "F32") == 0,
          "%s: tensor %s has type %.12s; F32, F16 and BF16 are read", st->path, tensor->name, type);
    safetensors_check_shape(st, entry, tensor);
    CHECK(span.end - span.begin == tensor->n * width,
          "%s: tensor %s: %llu bytes for %zu numbers of type %s", st->path, tensor->name,
          (unsigned long long)(span.end - span.begin), tensor->n, type);
    CHECK(fseeko(st->file, (off_t)(st->data_start + span.begin), SEEK_SET) == 0, "%s: %s", st->path,
          strerror(errno));

    /* 2. Read them in chunks, each converted to floats, so that a tensor of 16-bit numbers is never
     *    in memory twice. */
    unsigned char chunk[4 * 8192];
    for (size_t n, done = 0; done < tensor->n; done += n) {
        n = MIN(tensor->n - done, (size_t)8192);
        CHECK(fread(chunk, width, n, st->file) == n, "%s: tensor %s cannot be read: %s", st->path,
              tensor->name, ferror(st->file) ? strerror(errno) : "the file ends");
        safetensors_convert(tensor->w + done, chunk, n, type);
        safetensors_check_finite(st, tensor, done, n);
    }
    entry->is_taken = true;
    tensor->loaded = true;
}

/* Writes tensors as F32, with `prefix` before their names, and the header padded to a multiple of 8
 * bytes as the format requires. metadata: what is added to the header's __metadata__, as JSON:
 * ,"name":"value" or "". */
static void safetensors_write_with(const char *folder, const char *name, struct Tensor **tensors,
                                   size_t count, const char *prefix, const char *metadata) {
    struct Output out = output_open(folder, name);
    /* 1. Room for the header's length, which is not known yet. */
    fwrite("\0\0\0\0\0\0\0", 1, 8, out.file);

    /* 2. The header: what each tensor is called, and where its numbers will be. A head is not part
     *    of the transformer, so its prefix lacks that word. */
    size_t length = (size_t)fprintf(out.file, "{\"__metadata__\":{\"format\":\"pt\"%s}", metadata);
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

    /* 3. The numbers. An empty tensor may have no memory at all. */
    for (size_t i = 0; i < count; i++)
        if (tensors[i]->n)
            fwrite(tensors[i]->w, 4, tensors[i]->n, out.file);

    /* 4. The length. fseeko, unlike rewind, keeps the stream's error flag, which output_close
     *    checks. */
    fseeko(out.file, 0, SEEK_SET);
    for (int i = 0; i < 8; i++)
        fputc((int)((uint64_t)length >> 8 * i & 255), out.file);
    output_close(&out);
}

static void safetensors_write(const char *folder, const char *name, struct Tensor **tensors,
                              size_t count, const char *prefix) {
    safetensors_write_with(folder, name, tensors, count, prefix, "");
}

/* ---- config.json ---------------------------------------------------------------------------- */

static void config_check(const struct GPT2Config *c, const char *path) {
    /* The limits are far above any GPT-2's sizes, but low enough that no product of sizes can
     * overflow. The heads of attention share the width equally. */
    CHECK(c->n_embd > 0 && c->n_embd <= 1 << 16 && c->n_head > 0 && c->n_embd % c->n_head == 0,
          "%s: n_embd %zu must be a multiple of n_head %zu, at most 65536", path, c->n_embd,
          c->n_head);
    CHECK(c->n_layer > 0 && c->n_layer <= 1000, "%s: n_layer %zu; 1 to 1000 can be used", path,
          c->n_layer);
    CHECK(c->n_positions > 0 && c->n_positions <= 1 << 20,
          "%s: n_positions %zu; 1 to 1048576 can be used", path, c->n_positions);
    /* every text can be written only with an id for each byte, and one for the end token */
    CHECK(c->vocab_size > BYTE_TOKENS && c->vocab_size <= 65536,
          "%s: vocab_size %zu; 257 to 65536 can be used", path, c->vocab_size);
}

/* A setting that is a whole number; if it is absent or null, transformers' default, `fallback`. */
static size_t config_size(const struct Json *config, const char *path, const char *name,
                          size_t fallback) {
    bool is_set = json_type(config, name) != JSON_NULL;
    return is_set ? json_size(json_get(config, name), 1 << 24, path, name) : fallback;
}

/* The names of enum JsonType, for messages. */
static const char *const JSON_TYPE_NAMES[] = {"null",     "false",  "true",     "a number",
                                              "a string", "a list", "an object"};

/* The id of one of a config.json's special tokens; `fallback` if it is absent or null. */
static int config_token_id(const struct Json *config, const char *path, const char *name,
                           size_t vocab_size, int fallback) {
    const struct Json *id = json_get(config, name);
    if (!id || id->type == JSON_NULL)
        return fallback;
    /* newer models may list several end tokens */
    bool is_list = id->type == JSON_ARRAY;
    CHECK(!is_list || id->number == 1,
          "%s: \"%s\" lists %.0f ids, and one can be used; write it in place of the list", path,
          name, id->number);
    id = is_list ? id->child : id;
    bool is_number = id->type == JSON_NUMBER;
    bool is_id = is_number && id->number >= 0 && id->number < (double)vocab_size
                 && id->number == floor(id->number);
    struct Text found = is_number ? id->string : text_of(JSON_TYPE_NAMES[id->type]);
    CHECK(is_id, "%s: \"%s\" must be the id of one token, 0 to %zu (vocab_size - 1), found %.*s",
          path, name, vocab_size - 1, (int)found.length, found.data);
    return (int)id->number;
}

/* A setting for which GPT2Config.attribute_map has a second name. If both are set they must agree:
 * there is no telling which was meant.                                       test: config_names */
static size_t config_either(const struct Json *config, const char *path, const char *name,
                            const char *alias, size_t fallback) {
    size_t value = config_size(config, path, name, fallback);
    size_t other = config_size(config, path, alias, value);
    CHECK(json_type(config, name) == JSON_NULL || other == value,
          "%s: \"%s\" is %zu, but \"%s\", another name for it, is %zu; take one of them out", path,
          name, value, alias, other);
    return other;
}

/* The values that are allowed for settings that change the mathematics. All others are refused,
 * except that a setting may be absent, null or empty. */
struct Allowed {
    const char *name, *values[5];
};
static const struct Allowed GPT2_ALLOWED[] = {
    {"model_type", {"gpt2"}},
    {"tie_word_embeddings", {"true", "false"}},
    {"activation_function",
     {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"}},
    {"scale_attn_weights", {"true"}},
    {"scale_attn_by_inverse_layer_idx", {"false"}},
    {"add_cross_attention", {"false"}},
    {"pruned_heads", {"null"}},
    {"quantization_config", {"null"}},
};
static const struct Allowed CLASSIFIER_ALLOWED[] = {
    {"problem_type", {"single_label_classification"}},
};
static const struct Allowed LORA_ALLOWED[] = {
    {"peft_type", {"LORA"}},
    {"bias", {"none"}},
    {"modules_to_save", {"score", "classifier", "lm_head", "wte"}},
    {"init_lora_weights", {"true", "false", "gaussian", "eva", "orthogonal"}},
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
    {"monteclora_config", {"null"}},
};

static void config_refuse(const struct Json *config, const char *path,
                          const struct Allowed *allowed, size_t n) {
    for (const struct Allowed *a = allowed; a < allowed + n; a++) {
        /* in a list or an object every item must be allowed, otherwise the value itself */
        const struct Json *item = json_get(config, a->name);
        bool is_list = item && item->type >= JSON_ARRAY;
        for (item = is_list ? item->child : item; item; item = is_list ? item->next : NULL) {
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

/* Reads a folder's config.json. Several activations are gelu_new under another name, equal except
 * for rounding. *tied becomes "tie_word_embeddings": whether wte is also the output layer.
 *                                                              test: broken_config, config_names */
static struct GPT2Config config_load(const char *folder, bool *tied) {
    /* 1. Is it a model's folder at all? */
    struct Arena arena = {0};
    char *path = arena_printf(&arena, "%s/config.json", folder);
    CHECK(file_exists(folder) || errno != EACCES, "%s: %s", folder, strerror(errno));
    CHECK(file_exists(path), "%s: %s; a model is a folder with config.json and model.safetensors",
          folder, file_exists(folder) ? "no config.json inside" : "no such folder");

    /* 2. Is it GPT-2 in the form that is implemented here? */
    struct Json *json = json_read_file(&arena, path);
    config_refuse(json, path, GPT2_ALLOWED, COUNT(GPT2_ALLOWED));

    /* 3. The sizes. The defaults are those of the smallest GPT-2. */
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
    bool has_epsilon = json_type(json, "layer_norm_epsilon") != JSON_NULL;
    double epsilon = json_number_or(json, "layer_norm_epsilon", has_epsilon ? NAN : 1e-5);
    CHECK(epsilon > 0 && epsilon <= 1, "%s: \"layer_norm_epsilon\" must be above 0, at most 1",
          path);
    c.layer_norm_epsilon = (float)epsilon;

    /* 4. The special tokens. GPT-2 has none for the beginning of a text: by default transformers
     *    writes 50256 there, even where the vocabulary is smaller. */
    size_t V = c.vocab_size;
    int endoftext = endoftext_id(V);
    bool beyond = json_number_or(json, "bos_token_id", 0) >= (double)V;
    c.eos_token_id = config_token_id(json, path, "eos_token_id", V, endoftext);
    c.pad_token_id = config_token_id(json, path, "pad_token_id", V, c.eos_token_id);
    c.bos_token_id = beyond ? endoftext : config_token_id(json, path, "bos_token_id", V, endoftext);
    *tied = json_type(json, "tie_word_embeddings") != JSON_FALSE;
    arena_free(&arena);
    return c;
}

/* ---- Reading a model ------------------------------------------------------------------------ */

/* A tensor's name without its prefixes: "transformer." from a model with heads, "pretrained_model."
 * from TRL's value-head model, "base_model.model." from PEFT, "module." from DataParallel,
 * "_orig_mod." from torch.compile, in any order.
 * By hand: "module._orig_mod.transformer.h.0.ln_1.bias" -> "h.0.ln_1.bias".     test: bare_name */
static const char *bare_name(const char *name) {
    static const char *const prefixes[] = {"transformer.", "pretrained_model.", "base_model.model.",
                                           "module.", "_orig_mod."};
    for (size_t i = 0; i < COUNT(prefixes);) {
        size_t length = strlen(prefixes[i]);
        /* after each one, start over: they come in any order and number */
        bool found = strncmp(name, prefixes[i], length) == 0;
        if (found)
            name += length;
        i = found ? 0 : i + 1;
    }
    return name;
}

/* The entry of a file's header whose bare name is `name`, or NULL. */
static struct Json *tensor_entry(const struct SafeTensors *st, const char *name) {
    struct Json *found = NULL;
    for (struct Json *entry = st->header->child; entry; entry = entry->next) {
        if (strcmp(bare_name(entry->key.data), name) != 0)
            continue;
        CHECK(!found, "%s: tensors %s and %s are both %s; one of them was expected", st->path,
              found->key.data, entry->key.data, name);
        found = entry;
    }
    return found;
}

/* Reads a tensor, whatever prefixes its name has in the file. Returns false if it is not there. */
static bool tensor_load(struct SafeTensors *st, struct Tensor *tensor) {
    struct Json *entry = tensor_entry(st, tensor->name);
    if (entry)
        safetensors_read(st, entry, tensor);
    return entry != NULL;
}

/* The largest number of files that a model may be in: all are open at once. */
enum { MODEL_FILES = 100 };

/* Opens the files that hold a model and returns their number: one file, or several that an index
 * names, all in the model's folder. */
static size_t model_files(struct Arena *arena, const char *folder, struct SafeTensors *files) {
    char *single = arena_printf(arena, "%s/model.safetensors", folder);
    char *index = arena_printf(arena, "%s/model.safetensors.index.json", folder);
    CHECK(file_exists(single) || file_exists(index),
          "%s: no model.safetensors inside; of a pytorch_model.bin make one with transformers: "
          "save_pretrained(FOLDER, safe_serialization=True)",
          folder);
    if (file_exists(single)) {
        files[0] = safetensors_open(arena, single);
        return 1;
    }
    struct Json *map = json_get(json_read_file(arena, index), "weight_map");
    CHECK(map && map->type == JSON_OBJECT && map->child,
          "%s: no \"weight_map\" inside, or one that names no file", index);
    size_t count = 0;
    for (struct Json *item = map->child; item; item = item->next) {
        /* 1. The index names each tensor's file. A path that leads out of the folder is refused:
         *    the author of a model must not choose which files of this machine are read. */
        CHECK(item->type == JSON_STRING && item->string.length
                  && !strpbrk(item->string.data, "/\\"),
              "%s: \"%s\" must name a file of this folder", index, item->key.data);
        char *path = arena_printf(arena, "%s/%s", folder, item->string.data);

        /* 2. Each file is named once for each of its tensors, but opened only once. */
        size_t i = 0;
        while (i < count && strcmp(files[i].path, path) != 0)
            i++;
        CHECK(i < MODEL_FILES, "%s: more than %d files", index, MODEL_FILES);
        if (i == count)
            files[count++] = safetensors_open(arena, path);
    }
    return count;
}

/* What a label's name means: 1 positive, -1 negative, 0 neither. */
static int label_sign(const char *name) {
    if (strncasecmp(name, "pos", 3) == 0 || strcmp(name, "LABEL_1") == 0)
        return 1;
    return strncasecmp(name, "neg", 3) == 0 || strcmp(name, "LABEL_0") == 0 ? -1 : 0;
}

/* Which of the two labels of a classifier in `file` is the positive one, according to id2label in
 * the model's config.json; if that does not tell, label 1. */
static size_t positive_label(const char *folder, const char *file) {
    struct Arena arena = {0};
    char *path = arena_printf(&arena, "%s/config.json", folder ? folder : "");
    struct Json *json = folder && file_exists(path) ? json_read_file(&arena, path) : NULL;
    config_refuse(json, path, CLASSIFIER_ALLOWED, COUNT(CLASSIFIER_ALLOWED));
    /* without names, the labels have those that transformers gives them */
    const struct Json *names = json_get(json, "id2label");
    const char *name[] = {json_text_or(names, "0", "LABEL_0"), json_text_or(names, "1", "LABEL_1")};
    size_t positive = label_sign(name[0]) > label_sign(name[1]) ? 0 : 1;
    /* worth a note each time: with the labels swapped, training would raise what people dislike */
    warn("%s: a classifier of two labels is read as a reward model: the reward is the logit of "
         "\"%s\" minus that of \"%s\"; saved again, it has one label",
         file, name[positive], name[1 - positive]);
    arena_free(&arena);
    return positive;
}

/* Reads a file's reward head, if it has one: for one label, or for two, transformers' default. With
 * two labels the probability of either depends only on the difference of their logits, which a head
 * of a single row, w_1 - w_0, gives as the reward:
 *     P(label 1) = e^l_1 / (e^l_0 + e^l_1) = sigmoid(l_1 - l_0),  l_1 - l_0 = hidden . (w_1 - w_0)
 * By hand: w_0 = (1, 2), w_1 = (4, 1): the head is (3, -1).  test: two_labels, two_labels_golden */
static void reward_head_load(struct GPT2 *model, struct SafeTensors *st, const char *folder) {
    const struct Json *entry = tensor_entry(st, "score.weight");
    const struct Json *shape = json_get(entry, "shape");
    if (!entry)
        return;
    /* 1. One row of weights for each label. Leaving out a bias silently would change the rewards
     *    that were trained. */
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
    if (labels != 2) {
        tensor_load(st, score); /* refuses a shape that is not a head's */
        return;
    }

    /* 2. Read both rows; the head keeps their difference. */
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

/* How many tensors of a file have not been read; *first becomes the name of the first of them,
 * unless it is set already. GPT-2's causal masks, which old files contain, do not count: ones on
 * and below the diagonal, and the number -10000, add nothing to the mathematics. */
static size_t tensors_left(const struct SafeTensors *st, const char **first) {
    size_t count = 0;
    for (const struct Json *entry = st->header->child; entry; entry = entry->next) {
        const char *name = entry->key.data;
        const char *part = strstr(name, ".attn.");
        bool is_mask =
            part && (strcmp(part, ".attn.bias") == 0 || strcmp(part, ".attn.masked_bias") == 0);
        if (entry->is_taken || is_mask)
            continue;
        if (!*first)
            *first = name;
        count++;
    }
    return count;
}

/* A file may hold wte a second time, as the output layer that is tied to it. An exact copy changes
 * nothing; anything else is an output layer of its own, which is not implemented.
 * where, what, why: the parts of the message. */
static void check_copy_of_wte(const struct GPT2 *model, struct SafeTensors *st, const char *name,
                              const char *where, const char *what, const char *why) {
    struct Arena arena = {0};
    const struct Tensor *wte = &model->wte;
    /* it is read like any other tensor, so that it counts as read, and then compared */
    struct Tensor copy = *wte;
    snprintf(copy.name, sizeof copy.name, "%s", name);
    copy.w = arena_floats(&arena, copy.n);
    size_t i = tensor_load(st, &copy) ? 0 : copy.n;
    while (i < copy.n && copy.w[i] == wte->w[i])
        i++;
    CHECK(i == copy.n, "%s: %s (number %zu is %g, not %g): %s", where, what, i, copy.w[i],
          wte->w[i], why);
    arena_free(&arena);
}

/* Reads those of a model's tensors that a file has. If it has a head, the model gets one. */
static void model_read(struct GPT2 *model, struct SafeTensors *st) {
    /* heads first: once declared, the value head is one of the model's tensors */
    reward_head_load(model, st, model->folder);
    if (tensor_entry(st, "v_head.summary.weight"))
        value_head_declare(model);
    for (size_t i = 0; i < model->tensor_count; i++)
        if (model->tensors[i] != &model->score)
            tensor_load(st, model->tensors[i]);
}

/* GPT-2's output layer is wte. Files may hold it once, under either name, or twice; an output layer
 * with numbers of its own ("untied") is not implemented. A reward model needs no output layer.
 *                                                                            test: output_layer */
static void output_layer_load(struct GPT2 *model, struct SafeTensors *files, size_t count,
                              bool tied) {
    struct Tensor *wte = &model->wte;
    struct SafeTensors *st = NULL;
    for (size_t f = 0; f < count; f++)
        if (tensor_entry(&files[f], "lm_head.weight"))
            st = &files[f];

    /* 1. Untied, although one of the two is missing? */
    CHECK(tied || (wte->loaded && (st || model->score.n)),
          "%s: \"tie_word_embeddings\" is false in config.json, but there is no %s: transformers "
          "would draw it at random; set it to true if wte is the output layer too",
          model->folder, wte->loaded ? "lm_head.weight" : "wte.weight");
    if (!st)
        return;

    /* 2. If the only one has the output layer's name, it becomes wte. If both are there, they must
     *    be equal. */
    if (!wte->loaded)
        safetensors_read(st, tensor_entry(st, "lm_head.weight"), wte);
    else
        check_copy_of_wte(model, st, "lm_head.weight", model->folder,
                          "lm_head.weight is not wte.weight",
                          "an output layer of its own is not implemented; take lm_head.weight out "
                          "if wte is meant to be it, as in GPT-2");
    if (!tied)
        warn("%s: \"tie_word_embeddings\" is false, but lm_head.weight equals wte.weight: they are "
             "one tensor here, in training and when saved",
             model->folder);
}

/* Ends the program if a tensor was not in the files. found: the name of one that nothing has read,
 * to show what names the files have; or NULL. */
static void tensor_check_loaded(const struct Tensor *t, const char *where, const char *found) {
    CHECK(t->loaded, "%s: tensor %s is missing; expected shape [%s]%s%s", where, t->name,
          tensor_shape((char[48]){0}, t), found ? "; there is " : "", found ? found : "");
}

/* Can these files hold a model of these sizes? Checked before any memory is allocated: a
 * config.json with sizes a thousand times too large could otherwise bring the machine to a halt. */
static void config_check_files(const struct GPT2Config *c, const char *folder,
                               const struct SafeTensors *files, size_t count) {
    /* a number takes at least two bytes; the rest is allowance */
    size_t numbers =
        (c->vocab_size + c->n_positions) * c->n_embd + c->n_layer * 12 * c->n_embd * c->n_embd;
    size_t bytes = 0;
    for (size_t f = 0; f < count; f++)
        bytes += (size_t)(files[f].data_start + files[f].data_size);
    CHECK(numbers <= bytes / 2 + (1 << 20),
          "%s: config.json describes %zu numbers, at least %zu MB; the weights have %zu MB; is it "
          "theirs, or are they cut short?",
          folder, numbers, numbers >> 19, bytes >> 20);
    /* even narrow layers cost memory: a struct each, and names */
    CHECK(c->n_layer <= bytes / 512 + 64,
          "%s: config.json describes %zu layers, more than the weights' %zu bytes can hold; is it "
          "theirs?",
          folder, c->n_layer, bytes);
}

/* gpt2_load -- loads a model folder, with the heads that it has.
 *                                             [glossary: AutoModelForCausalLM]  test: gpt2_load */
static struct GPT2 *gpt2_load(const char *folder) {
    struct Arena arena = {0};
    struct SafeTensors files[MODEL_FILES];
    bool tied;
    /* 1. What does the folder say it holds? */
    struct GPT2Config c = config_load(folder, &tied);
    size_t count = model_files(&arena, folder, files);
    config_check_files(&c, folder, files, count);

    /* 2. A model of these sizes, and what the files have for it. */
    struct GPT2 *model = gpt2_new(c);
    model->folder = arena_printf(&model->arena, "%s", folder);
    for (size_t f = 0; f < count; f++)
        model_read(model, &files[f]);
    output_layer_load(model, files, count, tied);

    /* 3. Is everything there? With a missing tensor left at zero it would be a different model. */
    const char *first = NULL;
    size_t left = 0;
    for (size_t f = 0; f < count; f++) {
        left += tensors_left(&files[f], &first);
        fclose(files[f].file);
    }
    for (size_t i = 0; i < model->tensor_count; i++)
        tensor_check_loaded(model->tensors[i], folder, first);
    if (left > 0)
        warn("%s: tensors in its weights that config.json has no place for are not read: %zu, the "
             "first is %s",
             folder, left, first);
    arena_free(&arena);
    return model;
}

/* ---- Writing a model ------------------------------------------------------------------------ */

/* Writes config.json as transformers does, nearly all keys in alphabetical order. */
static void config_save(const struct GPT2 *model, const char *folder) {
    const struct GPT2Config *c = &model->config;
    bool classifier = model->score.n > 0;
    struct Output out = output_open(folder, "config.json");
    /* 1. "architectures" names the class of the model */
    fprintf(out.file,
            "{\n  \"activation_function\": \"gelu_new\",\n  \"architectures\": [\"%s\"],\n"
            "  \"attn_pdrop\": 0.0,\n  \"bos_token_id\": %d,\n  \"dtype\": \"float32\",\n"
            "  \"embd_pdrop\": 0.0,\n  \"eos_token_id\": %d,\n",
            classifier ? "GPT2ForSequenceClassification" : "GPT2LMHeadModel", c->bos_token_id,
            c->eos_token_id);

    /* 2. one label; with transformers' default of two, the head would not fit */
    if (classifier)
        fputs("  \"id2label\": {\"0\": \"LABEL_0\"},\n  \"label2id\": {\"LABEL_0\": 0},\n",
              out.file);

    /* 3. the sizes; no dropout was used; wte is also the output layer */
    fprintf(out.file,
            "  \"initializer_range\": 0.02,\n  \"layer_norm_epsilon\": %.7g,\n"
            "  \"model_type\": \"gpt2\",\n  \"n_ctx\": %zu,\n  \"n_embd\": %zu,\n"
            "  \"n_head\": %zu,\n  \"n_inner\": null,\n  \"n_layer\": %zu,\n"
            "  \"n_positions\": %zu,\n  \"pad_token_id\": %d,\n  \"resid_pdrop\": 0.0,\n"
            "  \"tie_word_embeddings\": true,\n  \"use_cache\": true,\n  \"vocab_size\": %zu\n}\n",
            c->layer_norm_epsilon, c->n_positions, c->n_embd, c->n_head, c->n_layer, c->n_positions,
            c->pad_token_id, c->vocab_size);
    output_close(&out);
}

/* Writes a special token as tokenizer_config.json names it: <|endoftext|>, an ordinary token, or
 * the padding token's own name. An id that only rounds up the vocabulary has no name: null. */
static void write_special_token(FILE *file, const char *before, const struct Tokenizer *tok,
                                const struct GPT2Config *c, int id) {
    struct Arena arena = {0};
    int endoftext = endoftext_id(c->vocab_size);
    struct Text name = id == c->pad_token_id ? c->pad_token : (struct Text){0};
    if (id <= endoftext)
        name =
            id == endoftext ? text_of("<|endoftext|>") : token_as_unicode(&arena, tok->token[id]);
    if (name.length > 0)
        json_write_string(file, before, name);
    else
        fprintf(file, "%snull", before);
    arena_free(&arena);
}

/* Writes tokenizer_config.json. Before it encodes a text, transformers cuts it at every special
 * token. If one of these is an ordinary token, that would change the encoding;
 * split_special_tokens prevents it.                             test: model_special_tokens */
static void tokenizer_config_save(const struct Tokenizer *tok, const char *folder,
                                  const struct GPT2Config *c) {
    struct Output out = output_open(folder, "tokenizer_config.json");
    int lowest = MIN(c->bos_token_id, MIN(c->eos_token_id, c->pad_token_id));
    fputs("{\n  \"add_prefix_space\": false", out.file);
    /* the name of a padding token that is not GPT-2's is here, not in vocab.json */
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

/* ---- Adapters -------------------------------------------------------------------------------- */

/* Reads adapter_config.json. Where it says nothing, r and lora_alpha are 8, as in PEFT.
 *                                            [glossary: Adaptação de baixo rank (LoRA)] */
static struct Adapter adapter_config_load(struct Arena *arena, const char *folder) {
    char *path = arena_printf(arena, "%s/adapter_config.json", folder);
    CHECK(file_exists(path),
          "%s: no adapter_config.json inside; an adapter is a folder with adapter_config.json and "
          "adapter_model.safetensors",
          folder);
    /* 1. PEFT has many kinds of adapters, and many variants of LoRA; one is implemented. */
    struct Json *json = json_read_file(arena, path);
    config_refuse(json, path, LORA_ALLOWED, COUNT(LORA_ALLOWED));
    const struct Json *targets = json_get(json, "target_modules");
    struct Adapter adapter = {
        .r = config_size(json, path, "r", 8),
        .lora_alpha = json_number_or(json, "lora_alpha", 8),
        .lora_dropout = json_number_or(json, "lora_dropout", 0),
        .use_rslora = json_type(json, "use_rslora") == JSON_TRUE,
        .base_model_name_or_path = json_text_or(json, "base_model_name_or_path", NULL),
        .target_modules = json_type(json, "target_modules") == JSON_NULL ? "c_attn" : "",
        /* a regular expression, or exceptions: then the file's tensors tell which layers */
        .partial = json_type(json, "target_modules") == JSON_STRING
                   || json_type(json, "exclude_modules") != JSON_NULL
                   || json_type(json, "layers_to_transform") != JSON_NULL,
    };
    CHECK(adapter.r > 0, "%s: \"r\" must be 1 or more", path);

    /* 2. The layers that it adapts: a list of names, kept as words with spaces in between. */
    for (const struct Json *item = targets ? targets->child : NULL; item; item = item->next) {
        CHECK(item->type == JSON_STRING && strlen(adapter.target_modules) < 4096,
              "%s: \"target_modules\" must be a list of names, 4096 letters at most", path);
        adapter.target_modules =
            arena_printf(arena, "%s %s", adapter.target_modules, item->string.data);
    }
    return adapter;
}

/* Reads the value head that TRL saves next to an adapter, in a model.safetensors of its own. That
 * file may be a whole model, for example one into which the adapter was merged. The rest of it is
 * not read: the adapter would be added a second time. */
static void adapter_read_head(struct GPT2 *model, const char *folder) {
    struct Arena arena = {0};
    const char *first = NULL;
    char *path = arena_printf(&arena, "%s/model.safetensors", folder);
    char *pickle = arena_printf(&arena, "%s/pytorch_model.bin", folder);
    if (file_exists(path)) {
        /* 1. The head: weight and bias. */
        struct SafeTensors st = safetensors_open(&arena, path);
        if (tensor_entry(&st, "v_head.summary.weight")) {
            struct Linear *head = value_head_declare(model);
            tensor_load(&st, &head->weight);
            tensor_load(&st, &head->bias);
            tensor_check_loaded(&head->bias, path, NULL);
        }

        /* 2. A note about anything else there. */
        size_t left = tensors_left(&st, &first);
        if (left > 0)
            warn("%s: beside an adapter only a value head is read of it; not read are %zu tensors, "
                 "the first is %s",
                 path, left, first);
        fclose(st.file);
    } else if (file_exists(pickle)) {
        warn("%s is not read: a value head in it is left out; make a model.safetensors of it",
             pickle);
    }
    arena_free(&arena);
}

/* Reads the adapters of all layers that have one. */
static void adapter_load_layers(struct GPT2 *model, const char *folder, struct SafeTensors *st) {
    struct Arena *arena = &model->arena;
    struct Adapter *adapter = &model->adapter;
    size_t numbers = 0;
    const char *taken = "";
    for (size_t i = 0; i < 4 * model->config.n_layer; i++) {
        /* 1. Does this layer have one? An adapter that names its layers must have them all; where
         *    it describes them, by a pattern or with exceptions, the tensors tell. */
        struct Linear *linear = adaptable(model, i);
        const char *name = module_name(arena, linear);
        const char *A = arena_printf(arena, "%s.lora_A.weight", bare_name(name));
        if (adapter->partial ? !tensor_entry(st, A)
                             : !lora_is_target(name, adapter->target_modules))
            continue;

        /* 2. Before memory is allocated: can the file hold so many numbers? */
        numbers += adapter->r * (linear->weight.shape[0] + linear->weight.shape[1]);
        CHECK(numbers <= st->data_size / 2 + (1 << 16),
              "%s: its %llu bytes are too few for "
              "adapters of \"r\" %zu; is the folder's adapter_config.json this file's?",
              st->path, (unsigned long long)st->data_size, adapter->r);

        /* 3. Both halves must be there: with A or B left at 0, the adapter would silently be
         *    none. */
        lora_declare(model, linear);
        struct Tensor *pair[] = {&linear->lora_A, &linear->lora_B};
        for (size_t k = 0; k < COUNT(pair); k++) {
            tensor_load(st, pair[k]);
            tensor_check_loaded(pair[k], st->path, NULL);
        }
        taken = arena_printf(arena, "%s %s", taken, bare_name(name));
    }
    CHECK(numbers > 0,
          "%s: its target_modules take no layer of this model; c_attn, c_proj and c_fc can be "
          "adapted",
          folder);
    /* from here on the adapter names its layers one by one, also when it is saved again */
    if (adapter->partial)
        adapter->target_modules = taken;
    adapter->partial = false;
}

/* adapter_load -- attaches a folder's adapter to the layers that target_modules names, or, if that
 * is a regular expression or has exceptions, to those for which the file has tensors. A tensor that
 * belongs to no layer is an error.             test: lora_round_trip, lora_partial, lora_broken */
static void adapter_load(struct GPT2 *model, const char *folder) {
    static const char own[] = "an adapter with an embedding or output layer of its own is not "
                              "implemented";
    struct Arena arena = {0};
    CHECK(!model->adapter.r, "%s: the model has an adapter already", folder);
    model->adapter = adapter_config_load(&model->arena, folder);
    char *path = arena_printf(&arena, "%s/adapter_model.safetensors", folder);
    CHECK(file_exists(path),
          "%s: no adapter_model.safetensors inside (adapter_model.bin is not read)", folder);

    /* 1. The layers' adapters, and a reward model's head. */
    struct SafeTensors st = safetensors_open(&arena, path);
    adapter_load_layers(model, folder, &st);
    reward_head_load(model, &st, model->folder);

    /* 2. Nothing may be left over: a model with half of an adapter is a different model. */
    check_copy_of_wte(model, &st, "lm_head.weight", path,
                      "tensor lm_head.weight is not the base's wte.weight", own);
    check_copy_of_wte(model, &st, "wte.weight", path,
                      "tensor wte.weight is not the base's wte.weight", own);
    const char *first = NULL;
    CHECK(tensors_left(&st, &first) == 0,
          "%s: no layer of this model takes tensor %s; is it another model's?", path, first);
    fclose(st.file);

    /* 3. A value head, from a file of its own. */
    adapter_read_head(model, folder);
    model->folder = arena_printf(&model->arena, "%s", folder);
    arena_free(&arena);
}

/* Writes adapter_config.json: only the fields that matter here. PEFT fills in the others. */
static void adapter_config_save(const struct GPT2 *model, const char *folder) {
    const struct Adapter *a = &model->adapter;
    struct Output out = output_open(folder, "adapter_config.json");
    /* 1. The model to which it belongs, which PEFT loads first. */
    fputs("{\n  \"base_model_name_or_path\": ", out.file);
    if (a->base_model_name_or_path)
        json_write_string(out.file, "", text_of(a->base_model_name_or_path));
    else
        fputs("null", out.file);

    /* 2. What it is. GPT-2's layers are stored transposed, as transformers' Conv1D:
     *    fan_in_fan_out tells PEFT so. A reward model's head is saved whole, as PEFT saves what is
     *    in modules_to_save. */
    fprintf(out.file,
            ",\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": true,\n  \"inference_mode\": true,\n  "
            "\"init_lora_weights\": true,\n  \"lora_alpha\": %.9g,\n  \"lora_dropout\": %.9g,\n",
            a->lora_alpha, a->lora_dropout);
    fprintf(out.file,
            "  \"modules_to_save\": %s,\n  \"peft_type\": \"LORA\",\n  \"r\": %zu,\n  "
            "\"target_modules\": [",
            model->score.n ? "[\"classifier\", \"score\"]" : "null", a->r);

    /* 3. The layers that it adapts. */
    const char *target = a->target_modules;
    for (size_t n, i = 0; (n = next_name(&target)) > 0; target += n, i++)
        fprintf(out.file, "%s\"%.*s\"", i ? ", " : "", (int)n, target);
    fprintf(out.file,
            "],\n  \"task_type\": \"%s\",\n  \"use_dora\": false,\n  \"use_rslora\": %s\n}\n",
            model->score.n ? "SEQ_CLS" : "CAUSAL_LM", a->use_rslora ? "true" : "false");
    output_close(&out);
}

/* ---- A model's folder ----------------------------------------------------------------------- */

/* model_save -- writes the folder that transformers loads, or, of a model with an adapter, one with
 * the adapter alone, which PeftModel.from_pretrained loads, and a value head next to it.
 *                                                  [glossary: Hugging Face]  test: model_save */
static void model_save(struct GPT2 *model, const char *folder, const struct Tokenizer *tok) {
    struct Arena arena = {0};
    struct Tensor **tensors = arena_alloc(&arena, model->tensor_count, sizeof *tensors);
    struct Tensor *head[] = {&model->v_head.weight, &model->v_head.bias};
    size_t count = 0;
    /* 1. A NaN must not be saved over a good model. Of a model with an adapter, pick the tensors
     *    that are not the base's: LoRA's, and PEFT's modules_to_save. */
    for (size_t i = 0; i < model->tensor_count; i++) {
        struct Tensor *t = model->tensors[i];
        check_numbers(model, NULL, NULL, "a weight that was to be saved", t->w, t->n);
        if (strstr(t->name, ".lora_") || t == &model->score)
            tensors[count++] = t;
    }

    /* 2. The files that describe it. */
    make_folder(folder);
    if (model->adapter.r)
        adapter_config_save(model, folder);
    else
        config_save(model, folder);
    if (tok) {
        tokenizer_save(tok, folder, model->config.vocab_size);
        tokenizer_config_save(tok, folder, &model->config);
    }

    /* 3. The weights come last: if they are there, so is everything else. */
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

/* Saves a model where there may be another one, whose files are replaced only once all of the new
 * ones are complete. */
static void model_replace(struct GPT2 *model, const char *folder, const struct Tokenizer *tok) {
    struct Arena arena = {0};
    /* 1. Write all files into a folder inside this one, so on the same disk: renaming them is then
     *    enough. If the program fails meanwhile, die_with removes that folder, and the old model is
     *    untouched. */
    staged_folder = arena_printf(&arena, "%s/tmp-model", folder);
    folder_delete(staged_folder); /* what a killed run may have left there */
    model_save(model, staged_folder, tok);

    /* 2. All are complete: move them into place, one by one, the weights last. Only what stops it
     *    between two of these renames can leave files of both models; from here on die_with must
     *    not remove the rest of the new one. */
    const char *complete = staged_folder;
    staged_folder = NULL;
    folder_move_files(complete, folder, false);
    folder_move_files(complete, folder, true);
    folder_delete(complete);

    /* 3. An adapter's value head has a file of its own, which must not outlive it. */
    if (model->adapter.r && !model->v_head.weight.n)
        remove(arena_printf(&arena, "%s/model.safetensors", folder));
    folder_sync(folder);
    arena_free(&arena);
}

static void check_reward_model(const struct GPT2 *model, const char *folder) {
    CHECK(model->score.n, "%s: has no score.weight: it is no reward model; train one: align reward",
          folder);
}

/* Takes a tensor out of a model, so that it is no longer trained or saved: a reward or value head
 * that has no place in what the model is to become.                         test: heads_left_out */
static void tensor_remove(struct GPT2 *model, struct Tensor *tensor) {
    tensor->n = 0;
    drop_empty_tensors(model);
}

static void leave_out_reward_head(struct GPT2 *model) {
    /* worth a note: the user may have meant another folder */
    if (model->score.n)
        warn("%s: is a reward model; its head, score.weight, is left out, the language model below "
             "it is used",
             model->folder);
    tensor_remove(model, &model->score);
}

static void leave_out_value_head(struct GPT2 *model) {
    if (model->v_head.weight.n)
        warn("%s: has a value head; it is left out, the language model below it is used",
             model->folder);
    tensor_remove(model, &model->v_head.weight);
    tensor_remove(model, &model->v_head.bias);
}

static void leave_out_heads(struct GPT2 *model) {
    leave_out_reward_head(model);
    leave_out_value_head(model);
}

/* =============================================================================================
 * Chapter 24 - Progress, logs, checkpoints
 *
 * How a run reports to a person (one line on a terminal, redrawn in place), to other programs
 * (trainer_state.json in transformers' form), and to itself (checkpoints, from which it resumes as
 * if it had never stopped, bit for bit).
 * ============================================================================================= */

/* ---- Messages ------------------------------------------------------------------------------- */

/* cut_text -- makes text from a file or a model safe for a terminal, in place: at most `bytes`
 * bytes, only whole characters, and '?' for control bytes, which could move the cursor or change
 * the colours.                                                              test: progress_cut */
static char *cut_text(char *text, size_t bytes) {
    struct Text rest = text_of(text);
    size_t i = 0;
    while (rest.length > 0) {
        uint32_t c = text_take(&rest);
        size_t length = (size_t)(rest.data - text) - i;
        /* U+FFFD of one byte is no character of the text: text_take's word for a wrong byte */
        if (is_control(c) || (c == 0xfffd && length == 1))
            memset(text + i, '?', length);
        /* half a character would appear as some replacement sign of the terminal's */
        if (i + length > bytes)
            break;
        i += length;
    }
    text[i] = 0;
    return text;
}

/* The progress line on a terminal. While it is `open`, the cursor is at its end: any other output
 * must first clear it, and the line is then redrawn below. */
static struct Progress {
    const char *name;
    double begin, drawn; /* seconds_now at the stage's first line, and at its latest */
    size_t step, total, first_step, first_tokens;
    bool open;
} progress_line;

static void progress_clear(void) {
    if (!progress_line.open)
        return;
    /* The line of a complete stage stays, to be read later. */
    bool complete = progress_line.total && progress_line.step == progress_line.total;
    fputs(complete ? "\n" : "\r\033[K", stderr);
    progress_line.open = false;
}

/* Prints one line on stderr. A file can make a message very long, with a key of a megabyte for
 * example: then its middle is left out. */
static void PRINTF_LIKE(2, 0)
    complain(const char *start, const char *format, va_list arguments, const char *end) {
    enum { SHOWN = 600 }; /* bytes kept at either end */
    char line[2 * PATH_MAX];
    vsnprintf(line, sizeof line, format, arguments);
    size_t n = strlen(cut_text(line, sizeof line));
    size_t head = MIN(n, (size_t)SHOWN);
    size_t tail = MAX(head, n - head);
    /* Neither cut may fall inside a character: in UTF-8, bytes 10xxxxxx continue one. */
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

/* ---- Progress ------------------------------------------------------------------------------- */

/* Is stderr a terminal on which a line can be redrawn in place? In a file or a pipe, progress is
 * plain lines. Either way it is only for reading: the run is the same, bit for bit. */
static bool progress_live(void) {
    return !quiet && isatty(STDERR_FILENO) && getenv("TERM") && strcmp(getenv("TERM"), "dumb") != 0;
}

/* The number of columns to use: one less than the terminal has, since some terminals wrap a line
 * that fills the last one. Callers compare it with bytes, which is safe: a character takes no more
 * columns than it has bytes. */
static size_t terminal_columns(void) {
#ifdef TIOCGWINSZ
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1)
        return size.ws_col - 1u;
#endif
    return 79;
}

/* Shows how far a stage has come. `due`: it is time for a log entry. A plain line is printed only
 * then. A terminal's line is redrawn then, at the stage's last step, and otherwise at most ten
 * times a second: next to a step, drawing must cost nothing. */
static void progress_say(const char *name, size_t step, size_t total, size_t tokens, bool due,
                         const char *metrics) {
    struct Progress *p = &progress_line;
    bool live = progress_live();
    double now = seconds_now();
    if (!live && due)
        say("%s: step %zu/%zu  %s\n", name, step, total, metrics);
    if (!live || (!due && step < total && now - p->drawn < 0.1))
        return;

    /* 1. A new stage starts a line and a clock. first_step: a resumed one does not start at 0. */
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

    /* 2. The time left, if the remaining steps take as long as those of this run so far. */
    double gone = now - p->begin;
    double steps_done = (double)MAX(step - p->first_step, (size_t)1);
    size_t left = (size_t)(gone * (double)(total - step) / steps_done);
    double speed = gone > 0 ? (double)(tokens - p->first_tokens) / gone : 0;

    /* 3. Written over the old line; what remains of that after the new end is erased (ESC [ K). */
    char line[800];
    int tenths = total ? (int)(10 * step / total) : 0;
    snprintf(line, sizeof line, "%s [%-10.*s] %zu/%zu  %zu:%02zu left  %s  %.0f tokens/s", name,
             tenths, "==========", step, total, left / 60, left % 60, metrics, speed);
    fprintf(stderr, "\r%s\033[K", cut_text(line, terminal_columns()));
}

/* Is it time for a sample? About eight times per stage. */
static bool progress_sampling(size_t step, size_t total) {
    return progress_live() && (step == 1 || step % MAX((size_t)1, total / 8) == 0);
}

/* ---- Numbers that are not finite ------------------------------------------------------------ */

/* If nothing has been found yet (`place` is empty) and x has a number that is not finite, describes
 * it in `place`. x may be NULL: not computed. */
static void note_bad(char place[160], const char *what, const char *name, const float *x,
                     size_t n) {
    size_t i = *place || !x ? n : first_not_finite(x, n);
    if (i < n)
        snprintf(place, 160, "%s %s was the first to break (%s)", what, name,
                 isnan(x[i]) ? "NaN" : "infinite");
}

/* The same for what block l computed in the forward pass, in the order of computation. */
static void note_bad_block(char place[160], const struct GPT2 *model, size_t l) {
    const struct Activations *acts = &model->trace.acts;
    const struct BlockActivations *a = &acts->h[l];
    size_t width = acts->batch.N * model->config.n_embd;
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
        /* a block's output is the next one's input, and is kept there */
        {"mlp.c_proj", last ? acts->x : a[1].x, width},
    };
    for (size_t k = 0; k < COUNT(outputs); k++) {
        char name[64];
        snprintf(name, sizeof name, "h.%zu.%s", l, outputs[k].name);
        note_bad(place, "the output of", name, outputs[k].x, outputs[k].n);
    }
}

/* check_finite -- ends the run if a step's loss, its gradient's norm or a logit is NaN or infinite,
 * and says where that began. A NaN spreads to everything computed from it, so the tensors are
 * searched in the order of computation, and the first that has one is the culprit.
 *                                                                            test: bad_numbers */
static void check_finite(const struct GPT2 *model, const char *what, double value) {
    if (isfinite(value))
        return;
    const struct Activations *acts = &model->trace.acts;
    struct Tensor *const *tensors = model->tensors;
    char place[160] = "";
    char step[64] = "";

    /* 1. the weights, which the previous step may have spoilt */
    for (size_t i = 0; i < model->tensor_count; i++)
        note_bad(place, "weight", tensors[i]->name, tensors[i]->w, tensors[i]->n);

    /* 2. the activations, in forward order, if a forward pass has kept them */
    for (size_t l = 0; model->trace.has_acts && l < model->config.n_layer; l++)
        note_bad_block(place, model, l);
    if (model->trace.has_acts)
        note_bad(place, "the output of", "ln_f", acts->ln_f, acts->batch.N * model->config.n_embd);

    /* 3. the gradients, in backward order: from the last tensor to the first */
    for (size_t i = model->tensor_count; i-- > 0;)
        note_bad(place, "the gradient of", tensors[i]->name, tensors[i]->d, tensors[i]->n);

    if (model->trace.task)
        snprintf(step, sizeof step, "%s: step %zu: ", model->trace.task, model->trace.step);
    die("%s%s is %s: %s; try a smaller --learning_rate, more --warmup_steps or --max_grad_norm 1%s",
        step, what, isnan(value) ? "NaN" : "infinite",
        *place ? place : "what the model holds is finite, but too large",
        model->trace.task ? ", and look at this step's data" : " where the model is trained");
}

/* The same for n numbers from a model that only writes or scores. Its forward pass keeps nothing,
 * so it is repeated, this time keeping the activations, to find where a number broke. batch NULL:
 * only the weights are searched. */
static void check_numbers(const struct GPT2 *model, struct Arena *arena, const struct Batch *batch,
                          const char *what, const float *x, size_t n) {
    size_t i = first_not_finite(x, n);
    if (i == n)
        return;
    struct GPT2 traced = *model;
    if (batch) {
        traced.trace.acts = gpt2_forward(model, arena, batch, true);
        traced.trace.has_acts = true;
    }
    check_finite(&traced, what, x[i]);
}

/* ---- The log -------------------------------------------------------------------------------- */

static struct LogEntry *state_log(struct TrainerState *state) {
    state->log_history = grow(state->log_history, state->log_count, &state->log_capacity,
                              sizeof *state->log_history);
    struct LogEntry *entry = &state->log_history[state->log_count++];
    entry->n = 0;
    return entry;
}

/* Names of metrics that are composed at run time or read from a file. Logs point to them, so they
 * live as long as any log may: to the end of the program. */
static struct Arena log_names;

static const char *log_name(const char *prefix, struct Text name) {
    char *text =
        arena_printf(&log_names, "%s%.*s", prefix, (int)MIN(name.length, (size_t)100), name.data);
    /* It will be written to JSON between quotes, without escapes. */
    for (char *c = text; *c; c++)
        if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ')
            *c = '_';
    return text;
}

/* The number of this name in an entry, which is kept sorted by name; a new one is added as 0. */
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

/* Returns whether an entry has a number of this name; *value: that number, or NaN. */
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

/* trainer_state.json as transformers' TrainerState writes it, with sorted keys: transformers, and
 * programs that plot curves from this file, find all that they expect. */
static void trainer_state_save(const struct TrainerState *s, const struct TrainingArguments *args,
                               const char *folder) {
    struct Output out = output_open(folder, "trainer_state.json");
    FILE *f = out.file;
    /* 1. no best model: nothing here looks for one */
    fputs("{\n  \"best_global_step\": null,\n  \"best_metric\": null", f);
    fputs(",\n  \"best_model_checkpoint\": null", f);
    fprintf(f, ",\n  \"epoch\": %s", json_number_text(s->epoch));
    fprintf(f, ",\n  \"eval_steps\": %zu", args->eval_steps);
    fprintf(f, ",\n  \"global_step\": %zu", s->global_step);
    /* 2. one process does everything, and no hyper-parameters are searched */
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
    /* 4. transformers has a whole number here: an epoch begun counts as one */
    fprintf(f, ",\n  \"num_train_epochs\": %.0f", ceil(s->num_train_epochs));
    fprintf(f, ",\n  \"save_steps\": %zu", args->save_steps);
    fputs(",\n  \"stateful_callbacks\": {\"TrainerControl\": {\"args\": {}, \"attributes\": {}}}",
          f);
    fputs(",\n  \"total_flos\": 0", f);
    fprintf(f, ",\n  \"train_batch_size\": %zu", args->per_device_train_batch_size);
    fputs(",\n  \"trial_name\": null,\n  \"trial_params\": null\n}\n", f);
    output_close(&out);
}

/* ---- What a checkpoint holds ---------------------------------------------------------------- */

/* Apart from the weights, a run's state consists of 64-bit numbers: counters, random generators,
 * running means. They are written to optimizer.safetensors as float32 tensors, two floats per
 * number: bit patterns, copied bit for bit and never interpreted as floats. */
static struct Tensor tensor_of_bits(const char *group, const char *name, uint64_t *words,
                                    size_t n) {
    struct Tensor t = {.shape = {2 * n}, .ndim = 1, .n = 2 * n, .w = (void *)words, .bits = true};
    snprintf(t.name, sizeof t.name, "%.16s.%.44s", group, name);
    return t;
}

static void checkpoint_add(struct Checkpoint *c, struct Saved saved) {
    if (c->count == COUNT(c->saved))
        die("internal: more than %zu things in a checkpoint", COUNT(c->saved));
    c->saved[c->count++] = saved;
}

static void checkpoint_add_sizes(struct Checkpoint *c, const char *name, size_t *at, size_t n,
                                 size_t most) {
    checkpoint_add(c, (struct Saved){name, at, n, SAVED_SIZE, .most = most});
}

static void checkpoint_add_doubles(struct Checkpoint *c, const char *name, double *at, size_t n) {
    checkpoint_add(c, (struct Saved){.name = name, .at = at, .n = n, .type = SAVED_DOUBLE});
}

/* A generator's state is four words of any value. */
static void checkpoint_add_random(struct Checkpoint *c, const char *name, struct Rng *rng) {
    checkpoint_add(c, (struct Saved){.name = name, .at = rng->s, .n = 4, .type = SAVED_WORD});
}

static void checkpoint_add_fixed(struct Checkpoint *c, const char *name, uint64_t value,
                                 const char *words) {
    checkpoint_add(c, (struct Saved){name, NULL, 1, SAVED_FIXED, .value = value, .words = words});
}

/* What every training saves: its seed, which must not change, and how far it has come. */
static struct Checkpoint checkpoint_new(const char *task, struct GPT2 *model,
                                        const struct Tokenizer *tok,
                                        const struct TrainingArguments *args,
                                        struct TrainerState *state) {
    struct Checkpoint c = {.model = model, .tok = tok, .args = args, .state = state, .task = task};
    checkpoint_add_fixed(&c, "seed", args->seed, "--seed");
    checkpoint_add_sizes(&c, "num_tokens", &state->num_tokens, 1, SIZE_MAX);
    checkpoint_add_sizes(&c, "samples", &state->samples, 1, SIZE_MAX);
    checkpoint_add_doubles(&c, "total_loss", &state->total_loss, 1);
    checkpoint_add_doubles(&c, "seconds", &state->seconds, 1);
    checkpoint_add_doubles(&c, "epoch", &state->epoch, 1);
    return c;
}

/* Is this a checkpoint of the same run? Checked before the rest is read, because with other data
 * even the sizes of tensors could differ. */
static void checkpoint_check_fixed(const struct Checkpoint *c, struct SafeTensors *st,
                                   const char *from) {
    /* 1. The same task? Every task saves its seed under its own name, such as "sft.seed". */
    char own[64];
    snprintf(own, sizeof own, "%.16s.seed", c->task);
    for (struct Json *item = st->header->child; item; item = item->next) {
        const char *dot = strchr(item->key.data, '.');
        bool other = dot && strcmp(dot, ".seed") == 0 && strcmp(item->key.data, own) != 0;
        CHECK(!other, "%s: is a checkpoint of %.*s; %s cannot go on from it", from,
              (int)MIN(dot - item->key.data, 16), item->key.data, c->task);
    }
    /* 2. The same seed, data and sizes? */
    for (const struct Saved *s = c->saved; s < c->saved + c->count; s++) {
        uint64_t was;
        struct Tensor tensor = tensor_of_bits(c->task, s->name, &was, 1);
        if (s->type != SAVED_FIXED || !tensor_load(st, &tensor))
            continue;
        CHECK(was == s->value,
              "%s: %s is %llu, in the checkpoint's run it was %llu; give the data and flags that "
              "the run began with, or start over without --resume_from_checkpoint",
              from, s->words, (unsigned long long)s->value, (unsigned long long)was);
    }
}

/* The run's numbers as 64-bit words. */
static void saved_store(const struct Saved *s, uint64_t *words) {
    if (s->type == SAVED_FIXED)
        *words = s->value;
    else if (s->type == SAVED_SIZE)
        for (size_t i = 0; i < s->n; i++)
            words[i] = ((const size_t *)s->at)[i];
    else
        memcpy(words, s->at, s->n * sizeof *words);
}

/* The end of a message about a number that is out of range. */
#define DAMAGED "was expected; the file is damaged, take an earlier checkpoint"

/* Back from a file's words to the run's numbers, if they are in range: some are array indices. */
static void saved_restore(const struct Saved *s, const uint64_t *words, const char *path,
                          const char *name) {
    for (size_t i = 0; i < s->n; i++) {
        double real;
        memcpy(&real, &words[i], sizeof real);
        CHECK(s->type != SAVED_DOUBLE || isfinite(real),
              "%s: %s: number %zu is %g, a finite one " DAMAGED, path, name, i, real);
        CHECK(s->type != SAVED_SIZE || words[i] <= s->most,
              "%s: %s: number %zu is %llu, at most %llu " DAMAGED, path, name, i,
              (unsigned long long)words[i], (unsigned long long)s->most);
        if (s->type == SAVED_SIZE)
            ((size_t *)s->at)[i] = (size_t)words[i];
    }
    if (s->type == SAVED_DOUBLE || s->type == SAVED_WORD)
        memcpy(s->at, words, s->n * sizeof *words);
}

/* Reads the step and the log so far. The rest of the file only repeats flags. */
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
            /* JSON has no NaN: the log has null in its place */
            log_value(entry, log_name("", value->key),
                      value->type == JSON_NUMBER ? value->number : NAN);
        }
    }
}

/* All that a checkpoint contains, as tensors: first the `train` tensors of weights that train,
 * which are in the model's file, then those in optimizer.safetensors; of these the last are copies
 * of the run's numbers, from index `numbers` on: Saved after Saved, then metric after metric. */
struct Holding {
    struct Tensor **list;
    size_t train, numbers, count;
};

static struct Holding checkpoint_holding(struct Checkpoint *c, struct Arena *arena) {
    static const char *const prefixes[] = {"", "exp_avg.", "exp_avg_sq."};
    size_t n = c->model->tensor_count;
    struct LogEntry *metrics = &c->state->metrics;
    size_t most = 3 * n + c->count + metrics->n;
    struct Tensor *copy = arena_alloc(arena, most, sizeof *copy);
    struct Holding held = {.list = arena_alloc(arena, most, sizeof *held.list)};

    /* 1. The weights that train (those with a gradient), then AdamW's moments: every m, every v. */
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
    held.numbers = held.count;
    for (const struct Saved *s = c->saved; s < c->saved + c->count; s++) {
        uint64_t *words = arena_alloc(arena, s->n, sizeof *words);
        saved_store(s, words);
        copy[held.count++] = tensor_of_bits(c->task, s->name, words, s->n);
    }
    for (const struct Metric *m = metrics->item; m < metrics->item + metrics->n; m++) {
        uint64_t *words = arena_alloc(arena, 2, sizeof *words);
        memcpy(words, &m->value, sizeof m->value);
        words[1] = m->n;
        copy[held.count++] = tensor_of_bits("metric", m->name, words, 2);
    }
    for (size_t i = 0; i < held.count; i++)
        held.list[i] = &copy[i];
    return held;
}

/* Puts the numbers that were loaded from a file back into the run. */
static void checkpoint_restore(struct Checkpoint *c, const struct Holding *held, const char *path) {
    struct Tensor **list = held->list + held->numbers;
    for (const struct Saved *s = c->saved; s < c->saved + c->count; s++, list++)
        saved_restore(s, (const void *)(*list)->w, path, (*list)->name);
    struct LogEntry *metrics = &c->state->metrics;
    for (struct Metric *m = metrics->item; m < metrics->item + metrics->n; m++, list++) {
        const uint64_t *words = (const void *)(*list)->w;
        memcpy(&m->value, words, sizeof m->value);
        m->n = (size_t)words[1];
        CHECK(isfinite(m->value), "%s: metric.%s is %g, a finite number " DAMAGED, path, m->name,
              m->value);
    }
}

/* How old a checkpoint is, by its own account: the number of its run in the folder, and its step.
 * Every run that begins there, anew or from a checkpoint, gets the next number, so the checkpoints
 * of a run that starts over are newer than those of an earlier run that got further. The files'
 * times do not count: files may have been copied or restored. Checkpoints of older versions have no
 * number: 0.
 *                                                                          test: checkpoint_age */
struct CheckpointAge {
    size_t run, step;
};

/* ---- Which checkpoint is the newest --------------------------------------------------------- */

static bool checkpoint_older(struct CheckpointAge a, struct CheckpointAge b) {
    return a.run < b.run || (a.run == b.run && a.step < b.step);
}

/* Reads the age of the entry `name` of a folder. Returns false if that is not a checkpoint with an
 * optimizer.safetensors. */
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
    /* The number is at a fixed place: first in the header, which follows its 8-byte length. */
    bool numbered = fseeko(file, 8, SEEK_SET) == 0 && fscanf(file, header, &age->run) == 1;
    if (!numbered)
        age->run = 0;
    fclose(file);
    return true;
}

/* Returns how many checkpoints a folder has; *oldest, *newest: their ages, if there are any. */
static size_t checkpoint_find(const char *folder, struct CheckpointAge *oldest,
                              struct CheckpointAge *newest) {
    DIR *dir = opendir(folder);
    size_t count = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        struct CheckpointAge age;
        if (!checkpoint_age(folder, entry->d_name, &age))
            continue;
        /* the first one found is both the oldest and the newest so far */
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

/* ---- Saving a checkpoint -------------------------------------------------------------------- */

/* Cleans up after a run that was killed while it wrote or deleted a checkpoint. Such a folder has a
 * temporary name. It is deleted, unless it is an old checkpoint-N that had been moved aside for a
 * new one which did not get its name: then it is put back.               test: checkpoint_clean */
static void checkpoint_clean(const char *folder) {
    struct Arena arena = {0};
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        const char *left = arena_printf(&arena, "%s/%s", folder, entry->d_name);
        size_t n = 0;
        int end = 0;
        if (strncmp(entry->d_name, "tmp-checkpoint-", 15) != 0)
            continue;
        /* %n is reached only if all that precedes it fits */
        sscanf(entry->d_name, "tmp-checkpoint-%zu-old%n", &n, &end);
        const char *whole = arena_printf(&arena, "%s/checkpoint-%zu", folder, n);
        bool is_old = end > 0 && !entry->d_name[end];
        if (!is_old || file_exists(whole) || rename(left, whole) != 0)
            folder_delete(left);
    }
    if (dir)
        closedir(dir);
    arena_free(&arena);
}

/* Deletes checkpoint-N. It is renamed first, so that an interrupted deletion never leaves a
 * checkpoint that looks complete and lacks files. */
static bool checkpoint_remove(const char *folder, size_t n) {
    struct Arena arena = {0};
    const char *removed = arena_printf(&arena, "%s/tmp-checkpoint-%zu-removed", folder, n);
    bool gone = rename(arena_printf(&arena, "%s/checkpoint-%zu", folder, n), removed) == 0;
    folder_delete(removed);
    arena_free(&arena);
    return gone;
}

/* From here on, every error message says how to resume from this checkpoint. */
static void checkpoint_resume_hint(const char *folder) {
    snprintf(resume_hint, sizeof resume_hint,
             "; %.4000s is whole: --resume_from_checkpoint true goes on from it", folder);
}

/* Flushes the run's growing logs to disk and notes their lengths: a resumed run cuts off what was
 * written after the checkpoint. */
static void checkpoint_flush_logs(struct Checkpoint *c) {
    for (size_t i = 0; c->logs && i < COUNT(LOGS); i++) {
        output_flush(&c->logs[i]);
        CHECK(fsync(fileno(c->logs[i].file)) == 0, "%s: writing failed: %s", c->logs[i].tmp,
              strerror(errno));
        c->log_bytes[i] = (size_t)ftello(c->logs[i].file);
    }
}

/* checkpoint_save -- writes checkpoint-N. A power cut at any moment leaves no checkpoint that lacks
 * something: it is written under a temporary name, flushed to disk, and only then renamed. */
static void checkpoint_save(struct Checkpoint *c) {
    struct Arena arena = {0};
    size_t step = c->state->global_step;
    const char *dir = c->args->output_dir;
    const char *staged = arena_printf(&arena, "%s/tmp-checkpoint-%zu", dir, step);
    const char *replaced = arena_printf(&arena, "%s-old", staged);
    const char *whole = arena_printf(&arena, "%s/checkpoint-%zu", dir, step);

    /* 1. The model, the optimizer's and the task's numbers, and the log, under a temporary name.
     *    staged_folder: an error on the way deletes that folder, since the disk may be full. */
    checkpoint_flush_logs(c);
    staged_folder = staged;
    model_save(c->model, staged, c->tok);
    struct Holding held = checkpoint_holding(c, &arena);
    const char *run = arena_printf(&arena, ",\"run\":\"%zu\"", c->run);
    safetensors_write_with(staged, "optimizer.safetensors", held.list + held.train,
                           held.count - held.train, "", run);
    trainer_state_save(c->state, c->args, staged);
    folder_sync(staged);

    /* 2. Into its place. An earlier run may have left a checkpoint of the same step, and a folder
     *    cannot be renamed onto one that is not empty: the old one is moved out of the way. */
    rename(whole, replaced);
    CHECK(rename(staged, whole) == 0, "%s: %s", whole, strerror(errno));
    staged_folder = NULL;
    folder_delete(replaced);
    folder_sync(dir);
    checkpoint_resume_hint(whole);

    /* 3. Delete the oldest until --save_total_limit are left. */
    struct CheckpointAge oldest;
    struct CheckpointAge newest;
    size_t limit = c->args->save_total_limit;
    while (limit && checkpoint_find(dir, &oldest, &newest) > limit)
        if (!checkpoint_remove(dir, oldest.step))
            break;
    arena_free(&arena);
}

/* ---- Resuming from a checkpoint ------------------------------------------------------------- */

/* The first Ctrl-C waits for the end of the step (checkpoint_step); a second one ends the program
 * at once. */
static void interrupt(int signal_number) {
    interrupted = 1;
    signal(signal_number, SIG_DFL);
}

/* Decides where a run starts: returns the folder to resume from, or NULL to start over. *newest:
 * the newest checkpoint in output_dir. */
static const char *checkpoint_choose(const struct Checkpoint *c, struct Arena *arena,
                                     struct CheckpointAge *newest) {
    struct CheckpointAge oldest;
    const char *dir = c->args->output_dir;
    const char *from = c->args->resume_from_checkpoint;
    bool any = dir && checkpoint_find(dir, &oldest, newest) > 0;
    /* Starting over in a folder with checkpoints may be a slip: the user is told, not stopped. */
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

/* Reads a checkpoint's files into the run's state. */
static void checkpoint_load(struct Checkpoint *c, struct Arena *arena, const char *from) {
    static const char *const files[] = {"model.safetensors", "adapter_model.safetensors",
                                        "optimizer.safetensors"};
    struct LogEntry *metrics = &c->state->metrics;
    const char *path = arena_printf(arena, "%s/optimizer.safetensors", from);
    CHECK(file_exists(path),
          "--resume_from_checkpoint %s: no checkpoint is there (optimizer.safetensors); `true` "
          "takes the newest in --output_dir",
          from);

    /* 1. The step and the log; then whether the checkpoint is of this run at all. */
    trainer_state_load(c->state, arena, arena_printf(arena, "%s/trainer_state.json", from));
    struct SafeTensors st = safetensors_open(arena, path);
    checkpoint_check_fixed(c, &st, from);

    /* 2. The names of its running means: each needs a place into which its numbers are loaded. */
    metrics->n = 0;
    for (struct Json *item = st.header->child; item && metrics->n < MAX_METRICS; item = item->next)
        if (strncmp(item->key.data, "metric.", 7) == 0)
            log_at(metrics, log_name("", text_of(item->key.data + 7)));
    fclose(st.file);

    /* 3. Each tensor from whichever file has it; in the end none may be missing. */
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
    checkpoint_restore(c, &held, path);
}

/* Says where the run resumes. If no step is left, the checkpoint's step becomes its length. */
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

/* checkpoint_resume -- restores what a checkpoint contains, if the run is to resume from one, and
 * opens the logs. A checkpoint has everything that a step depends on, so the run ends with the same
 * bits as one that was never stopped. */
static void checkpoint_resume(struct Checkpoint *c) {
    struct Arena arena = {0};
    const char *dir = c->args->output_dir;
    if (c->args->warmup_steps > c->state->max_steps)
        warn("--warmup_steps %zu: the run has %zu steps; its learning rate never reaches "
             "--learning_rate",
             c->args->warmup_steps, c->state->max_steps);

    /* 1. Tidy up after a killed run. From here on, Ctrl-C waits for the end of a step. */
    if (dir) {
        checkpoint_clean(dir);
        signal(SIGINT, interrupt);
        signal(SIGTERM, interrupt);
    }

    /* 2. Start over with new logs, or resume and cut the old ones to their length at that time. */
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

    /* 3. The hint in error messages promises that `true` resumes from this checkpoint: so it is
     *    given only if the checkpoint was found that way. */
    if (from) {
        checkpoint_say(c, from);
        if (dir && strcmp(c->args->resume_from_checkpoint, "true") == 0)
            checkpoint_resume_hint(from);
    }
    arena_free(&arena);
}

/* After each step: saves a checkpoint if one is due; after Ctrl-C, saves one and ends the run. */
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

/* ---- What is said and written for each step ------------------------------------------------- */

/* Shows the numbers of an entry that a person follows, as progress. `plain`: a log entry is due. */
static void state_say(const struct TrainerState *state, const char *name,
                      const struct LogEntry *entry, bool plain) {
    /* The most important come first: what does not fit on the line is left out. */
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

/* A step's line in stats_all.jsonl: numbers, then vectors. A vector with `start` is written as a
 * list of lists, one per answer; that of answer b is x[start[b] .. start[b + 1]). */
static void stats_write_line(FILE *file, const struct RolloutTrainer *trainer) {
    fputc('{', file);
    log_write(file, &trainer->stats, ", ");
    for (const struct StatsVector *v = trainer->ppo.vectors;
         v < trainer->ppo.vectors + trainer->ppo.vector_count; v++) {
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

/* trace.jsonl's first line: what was run, with which settings. */
static void trace_write_header(FILE *file, const struct RolloutTrainer *trainer) {
    const struct PPOConfig *c = &trainer->ppo.config;
    fprintf(file,
            "{\"type\": \"header\", \"algorithm\": \"ppo\", \"totalSteps\": %zu, \"hparams\": "
            "{\"ppo_epochs\": %zu, \"batch_size\": %zu, \"group_size\": 1, \"gamma\": %.9g, "
            "\"gae_lambda\": %.9g, \"clip_eps\": %.9g, \"vf_coef\": %.9g, \"kl_coef\": %.9g, "
            "\"learning_rate\": %.9g, \"temperature\": %.9g, \"whiten_rewards\": %s}}\n",
            trainer->total_steps, c->ppo_epochs, c->batch_size, c->gamma, c->lam, c->cliprange,
            c->vf_coef, c->init_kl_coef, trainer->args.learning_rate, trainer->temperature,
            c->whiten_rewards ? "true" : "false");
}

/* The numbers of a step, under the names that unipo knows. */
static void trace_write_metrics(FILE *file, const struct RolloutTrainer *trainer) {
    static const char *const names[][2] = {
        {"reward", "env/reward_mean"},
        {"kl", "objective/kl"},
        {"kl_coef", "objective/kl_coef"},
        {"policy_loss", "ppo/loss/policy"},
        {"value_loss", "ppo/loss/value"},
        {"entropy", "ppo/policy/entropy"},
        {"clip_fraction", "ppo/policy/clipfrac"},
    };
    const struct PPOTrace *trace = &trainer->ppo.trace;
    double value;
    log_find(&trainer->stats, "ppo/loss/policy", &value);
    fprintf(file, "\"metrics\": {\"policy_objective\": %s", json_number_text(-value));
    for (size_t i = 0; i < COUNT(names); i++) {
        log_find(&trainer->stats, names[i][1], &value);
        fprintf(file, ", \"%s\": %s", names[i][0], json_number_text(value));
    }
    fprintf(file, ", \"advantage_mean\": %s, \"advantage_std\": %s}",
            json_number_text(trace->advantage_mean), json_number_text(trace->advantage_std));
}

/* The numbers of an answer's tokens, n from `start` on in the batch, in one epoch. */
static void trace_write_tokens(FILE *file, const struct RolloutTrainer *trainer, size_t start,
                               size_t n, size_t epoch) {
    const struct PPOTrace *trace = &trainer->ppo.trace;
    const struct PPOBatch *p = trace->batch;
    const float *logprobs = trace->logprobs + epoch * trace->R;
    struct Arena arena = {0};
    /* what the epoch raises: minus PPO's loss */
    float *objective = arena_floats(&arena, trace->R);
    for (size_t t = start; t < start + n; t++)
        objective[t] = -(float)ppo_token_loss(p->logprobs[t], logprobs[t], p->advantages[t],
                                              trainer->ppo.config.cliprange)
                            .loss;
    const struct {
        const char *name;
        const float *x;
    } columns[] = {
        {"log_probs", logprobs},        {"new_log_probs", logprobs + trace->R},
        {"old_log_probs", p->logprobs}, {"ref_log_probs", p->ref_logprobs},
        {"values", p->values},          {"advantages", p->advantages},
        {"returns", p->returns},        {"token_kl", p->kl},
        {"rewards", p->rewards},        {"token_objective", objective},
    };
    for (size_t i = 0; i < COUNT(columns); i++) {
        fprintf(file, ", \"%s\": ", columns[i].name);
        json_write_floats(file, "", columns[i].x + start, n);
    }
    arena_free(&arena);
}

/* One answer in one epoch. */
static void trace_write_answer(FILE *file, const struct RolloutTrainer *trainer, size_t b,
                               size_t epoch) {
    const struct PPOTrace *trace = &trainer->ppo.trace;
    const struct GPT2Config *config = &trainer->model->config;
    const struct Example *e = &trace->rollouts[b].example;
    struct Arena arena = {0};
    size_t start = trace->batch->start[b];
    size_t n = trace->batch->start[b + 1] - start;
    const int *ids = e->ids + e->prompt_length;

    /* 1. the answer as a whole: prompt and text, its score as it was given and as it was used */
    json_write_string(file, b ? ", {\"prompt\": " : "{\"prompt\": ",
                      tokenizer_decode_all(trainer->tok, &arena, e->ids, e->prompt_length,
                                           config->vocab_size));
    fprintf(file,
            ", \"responses\": [{\"id\": \"step%zu_answer%zu\", \"reward\": %s, \"score\": %s, ",
            trainer->step, b, json_number_text(trace->rollouts[b].score),
            json_number_text(trace->scores[b]));
    fprintf(file, "\"advantage\": %s, ",
            json_number_text(mean_of(trace->batch->advantages + start, n)));
    json_write_string(file, "\"response_text\": ", answer_text(trainer->tok, &arena, e, config));
    fprintf(file, ", \"response_length\": %zu, ", n);

    /* 2. once a step: what the judge thought on the way */
    if (epoch == 0 && trace->scorer) {
        float *score = arena_floats(&arena, n + 1);
        scorer_prefixes(trace->scorer, &arena, e, config, score);
        json_write_floats(file, "\"prefix_rewards\": ", score, n + 1);
        fputs(", ", file);
    }

    /* 3. token by token */
    json_write_ids(file, "\"tokens\": {\"ids\": ", ids, n);
    for (size_t t = 0; t < n; t++)
        json_write_string(file, t ? ", " : ", \"strings\": [",
                          tokenizer_decode(trainer->tok, ids[t], config->vocab_size));
    fputc(']', file);
    trace_write_tokens(file, trainer, start, n, epoch);
    fputs("}}]}", file);
    arena_free(&arena);
}

/* The lines of a step in trace.jsonl, one an epoch, in the form that poloclub/unipo's viewer reads
 * (its docs/canonical_schema.json, as JSON lines). It wants an entry for each update: `step` counts
 * epochs over the whole run, ppo_step says which step of PPO they belong to.   test: ppo_trace */
static void trace_write(FILE *file, const struct RolloutTrainer *trainer) {
    const struct PPOTrace *trace = &trainer->ppo.trace;
    if (trace->answers == 0)
        return;
    /* a log of earlier steps, which a resumed run has kept, has its header already */
    if (ftello(file) == 0)
        trace_write_header(file, trainer);
    for (size_t epoch = 0; epoch < trace->epochs; epoch++) {
        fprintf(file,
                "{\"type\": \"step\", \"step\": %zu, \"ppo_step\": %zu, "
                "\"is_first_step_after_rollout_phase\": %s, ",
                (trainer->step - 1) * trainer->ppo.config.ppo_epochs + epoch, trainer->step,
                epoch == 0 ? "true" : "false");
        trace_write_metrics(file, trainer);
        fputs(", \"prompts\": [", file);
        for (size_t b = 0; b < trace->answers; b++)
            trace_write_answer(file, trainer, b, epoch);
        fputs("]}\n", file);
    }
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
 * Chapter 25 - Results: what the course prints and writes; the report
 *
 * What has a run achieved, and how can people and programs see it? What enters: measurements and a
 * run's logs. What leaves: tables, summary.json, samples.jsonl, report.json, and report.html, which
 * is docs/report.html, a page that draws a run, with the run's files inserted. How it looks is up
 * to the page; this chapter supplies the data.
 * ============================================================================================= */

/* ---- Tables --------------------------------------------------------------------------------- */

/* Writes what Hugging Face's sentiment pipeline returns for a text.
 *                 [glossary: Lista de saídas do pipe]  [glossary: Pontuação de sentimento] */
static void write_pipe_outputs(FILE *file, double reward) {
    fprintf(file,
            "[{\"label\": \"POSITIVE\", \"score\": %s}, {\"label\": \"NEGATIVE\", \"score\": %s}]",
            json_number_text(sigmoid(reward)), json_number_text(sigmoid(-reward)));
}

/* Prints a policy's row of exact's table. "of the way": what share of the way from the reference's
 * objective to the highest possible one the policy has come. */
static void exact_print_row(const char *name, struct ExactFigures f, double ref, double max) {
    printf("%-10s %11.5f %8.4f %12.4f %8.4f %9.2f %%\n", name, f.kl_to_optimum, f.reward, f.kl,
           f.objective, 100 * (f.objective - ref) / (max - ref));
}

/* Prints what the best of n answers reaches, the bound of its KL last. */
static void exact_print_best(const struct ExactWorld *w, double ref, double max) {
    struct Arena arena = {0};
    double *logps = arena_alloc(&arena, w->n, sizeof *logps);
    for (size_t n = 2; n <= 16; n *= 2) {
        exact_best_of_n(w, n, logps);
        exact_print_row(arena_printf(&arena, "best of %zu", n), exact_figures(w, logps), ref, max);
    }
    printf("\nThe KL of the best of n is at most log n - (n - 1) / n:");
    for (size_t n = 2; n <= 16; n *= 2)
        printf(" %.4f", best_of_n_kl(n));
    putchar('\n');
    arena_free(&arena);
}

/* Prints the exact world's closed form, and what each training reached, as JSON or as a table. */
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
               w->n, w->T, w->beta, exp(w->log_Z), w->log_Z, ref, max);
    /* The table begins with the reference and the optimum; JSON has only the trained policies. */
    for (int k = json ? EXACT_DPO : 0; k < EXACT_POLICIES; k++) {
        struct ExactFigures f = exact_figures(w, w->logps[k]);
        if (json)
            printf(", \"%s\": {\"kl_to_optimum\": %.9g, \"objective\": %.9g, \"reward\": %.9g, "
                   "\"kl\": %.9g}",
                   EXACT[k].name, f.kl_to_optimum, f.objective, f.reward, f.kl);
        else
            exact_print_row(EXACT[k].name, f, ref, max);
    }
    if (json) {
        puts("}");
        return;
    }
    exact_print_best(w, ref, max);
}

/* From chapter 26: a file that ships with the program, or NULL. */
static const char *shipped_path(struct Arena *arena, const char *name);

/* The models that the course compares: their names in its files, and in headings. */
static const char *const COURSE_MODEL[][2] = {{"before", "Before"}, {"ppo", "PPO"}, {"dpo", "DPO"}};

/* The files of a run that its page shows, those that exist: of the run itself, and of the stages of
 * rlhf. */
static const char *const REPORT_FILE[] = {
    "report.json",
    "trainer_state.json",
    "language_model/trainer_state.json",
    "reward_model/trainer_state.json",
    "ppo/trainer_state.json",
    "dpo/trainer_state.json",
    "trace.jsonl",
    "ppo/trace.jsonl",
};

/* ---- The report ----------------------------------------------------------------------------- */

/* Writes JSON for the inside of a page's <script> element. A browser that reads HTML knows nothing
 * of JSON: it ends the element at the first </script>, even one in a string. But in a string JSON
 * has a second way to write a character, and the characters that mean something in HTML, < > and &,
 * occur only in strings. So do U+2028 and U+2029, which end a line in older JavaScript.
 * By hand: {"a": "</script>"} becomes {"a": "\u003c/script\u003e"}.          test: report_json */
static void report_write_json(FILE *file, struct Text json) {
    while (json.length > 0) {
        const char *at = json.data;
        uint32_t c = text_take(&json);
        if (c == '<' || c == '>' || c == '&' || c == 0x2028 || c == 0x2029)
            fprintf(file, "\\u%04x", (unsigned)c);
        else
            fwrite(at, 1, (size_t)(json.data - at), file);
    }
}

/* Writes a text into a page: no character in it is markup, or steers a screen. */
static void report_write_text(FILE *file, struct Text text) {
    while (text.length > 0) {
        char bytes[4];
        uint32_t c = text_take(&text);
        bool turns = (c >= 0x202a && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
        if (c == '<' || c == '>' || c == '&')
            fprintf(file, "&#%u;", (unsigned)c);
        else
            fwrite(bytes, 1, utf8_write(bytes, is_control(c) || turns ? ' ' : c), file);
    }
}

static void report_write_plain(FILE *file, const struct Json *json);

/* An object, as a table: a row for each member. */
static void report_write_object(FILE *file, const struct Json *object) {
    fputs("<table>", file);
    for (const struct Json *item = object->child; item; item = item->next) {
        fputs("<tr><th>", file);
        report_write_text(file, item->key);
        fputs("</th><td>", file);
        report_write_plain(file, item);
        fputs("</td></tr>\n", file);
    }
    fputs("</table>\n", file);
}

/* A list of objects, as a table: a row for each, a column for each name that occurs. */
static void report_write_rows(FILE *file, const struct Json *list) {
    const struct Json *column[64]; /* the first member of each name */
    size_t n = 0;
    for (const struct Json *row = list->child; row; row = row->next) {
        if (row->type != JSON_OBJECT)
            continue;
        for (const struct Json *item = row->child; item && n < COUNT(column); item = item->next) {
            size_t k = 0;
            while (k < n && !text_equal(column[k]->key, item->key))
                k++;
            column[n] = item;
            n += k == n;
        }
    }
    fputs("<table><tr>", file);
    for (size_t k = 0; k < n; k++) {
        fputs("<th>", file);
        report_write_text(file, column[k]->key);
        fputs("</th>", file);
    }
    for (const struct Json *row = list->child; row; row = row->next) {
        fputs("</tr>\n<tr>", file);
        for (size_t k = 0; k < n; k++) {
            const struct Json *item =
                row->type == JSON_OBJECT ? json_get(row, column[k]->key.data) : NULL;
            fputs("<td>", file);
            if (item)
                report_write_plain(file, item);
            fputs("</td>", file);
        }
    }
    fputs("</tr></table>\n", file);
}

/* Any JSON, for a reader without scripts; of a list, numbers are divided by commas, and texts, the
 * tokens of an answer, are written one after another. */
static void report_write_plain(FILE *file, const struct Json *json) {
    bool is_list = json->type == JSON_ARRAY;
    if (json->type == JSON_STRING)
        report_write_text(file, json->string);
    else if (json->type == JSON_NUMBER)
        fprintf(file, "%.6g", json->number);
    else if (json->type == JSON_OBJECT)
        report_write_object(file, json);
    else if (is_list && json->child && json->child->type == JSON_OBJECT)
        report_write_rows(file, json);
    else
        for (const struct Json *item = json->child; item; item = item->next) {
            report_write_plain(file, item);
            if (item->next && item->type == JSON_NUMBER)
                fputs(", ", file);
        }
}

/* A file of a run: its text, and what it says; a log of JSON lines has its text alone. */
struct ReportFile {
    const char *name;
    struct Text text;
    const struct Json *json;
};

/* The next line of a file of JSON lines, taken off its text; empty lines are skipped. */
static bool report_line(struct Text *file, struct Text *line) {
    while (file->length > 0) {
        const char *end = memchr(file->data, '\n', file->length);
        size_t length = end ? (size_t)(end - file->data) : file->length;
        *line = (struct Text){file->data, length};
        file->data += MIN(length + 1, file->length);
        file->length -= MIN(length + 1, file->length);
        if (length > 0)
            return true;
    }
    return false;
}

/* Reads a file. It must be one JSON object, and each line of a file of JSON lines must be one: a
 * broken one would make the page unreadable. */
static struct ReportFile report_read(struct Arena *arena, const char *dir, const char *name) {
    const char *path = arena_printf(arena, "%s/%s", dir, name);
    struct ReportFile file = {.name = name};
    if (!file_exists(path))
        return file;
    file.text = text_without_mark(read_file(arena, path));
    if (!strstr(name, ".jsonl")) {
        file.json = json_object(arena, file.text, path, "");
        return file;
    }
    struct Text line;
    struct Text text = file.text;
    for (size_t number = 1; report_line(&text, &line); number++)
        json_object(arena, line, path, arena_printf(arena, ":%zu", number));
    return file;
}

/* Writes the run's files for the page's script: one JSON object, each file under its name, JSON
 * lines as a list. */
static void report_write_data(FILE *out, const struct ReportFile *file, size_t n) {
    const char *before = "{";
    for (size_t i = 0; i < n; i++) {
        struct Text text = file[i].text;
        struct Text line;
        if (!text.data)
            continue;
        fprintf(out, "%s\"%s\": ", before, file[i].name);
        before = ",\n";
        if (file[i].json) {
            report_write_json(out, text);
            continue;
        }
        fputc('[', out);
        for (const char *comma = ""; report_line(&text, &line); comma = ",\n") {
            fputs(comma, out);
            report_write_json(out, line);
        }
        fputc(']', out);
    }
    fputc('}', out);
}

/* Writes them for a reader without scripts: the report's tables, then each log's. */
static void report_write_tables(FILE *out, const struct ReportFile *file, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (!file[i].json)
            continue;
        const struct Json *log = json_get(file[i].json, "log_history");
        fprintf(out, "<h2>%s</h2>\n", file[i].name);
        report_write_plain(out, log ? log : file[i].json);
    }
}

/* A place in the page: what stands between two tags, and is replaced. */
struct ReportPlace {
    const char *begin, *end;
    const char *fault; /* NULL, or what is wrong with the page */
};

/* Finds it in the page's text from `from` on. */
static struct ReportPlace report_place(struct Arena *arena, const char *path, const char *from,
                                       const char *mark, const char *close) {
    const char *begin = strstr(from, mark);
    const char *end = begin ? strstr(begin, close) : NULL;
    if (!end)
        return (struct ReportPlace){
            .fault = arena_printf(arena, "%s: no place for a run (%s%s)", path, mark, close)};
    return (struct ReportPlace){begin + strlen(mark), end, NULL};
}

/* report_write -- makes DIR/report.html: the page that ships with the program, with a JSON object
 * inserted that holds each file of the run under its path, and the same as tables for a reader
 * without scripts. The page needs no other file and no network, so years later it still looks the
 * same. Returns NULL, or what is wrong with the page.                       test: report_page */
static const char *report_write(struct Arena *arena, const char *dir, const char *page_path) {
    struct ReportFile file[COUNT(REPORT_FILE)];
    bool any_log = false;

    /* 1. The page, and the two places in it for a run. If there is one already, it is replaced. */
    if (!page_path)
        return "docs/report.html is neither beside the program nor in the current folder";
    struct Text page = read_file(arena, page_path);
    struct ReportPlace plain =
        report_place(arena, page_path, page.data, "<div id=\"plain\">", "</div>");
    if (plain.fault)
        return plain.fault;
    struct ReportPlace data =
        report_place(arena, page_path, plain.end, "<script type=\"application/json\" id=\"run\">",
                     "</script>");
    if (data.fault)
        return data.fault;

    /* 2. the files */
    for (size_t i = 0; i < COUNT(file); i++) {
        file[i] = report_read(arena, dir, REPORT_FILE[i]);
        any_log = any_log || (file[i].json && json_get(file[i].json, "log_history"));
    }
    CHECK(any_log, "%s: no log of a run there (trainer_state.json); give the --output_dir of one",
          dir);

    /* 3. The page up to each place, what belongs there, and the rest. */
    struct Output out = output_open(dir, "report.html");
    fwrite(page.data, 1, (size_t)(plain.begin - page.data), out.file);
    report_write_tables(out.file, file, COUNT(file));
    fwrite(plain.end, 1, (size_t)(data.begin - plain.end), out.file);
    report_write_data(out.file, file, COUNT(file));
    fwrite(data.end, 1, page.length - (size_t)(data.end - page.data), out.file);
    output_close(&out);
    return NULL;
}

/* Makes the page of a training that has just been saved. If it cannot, it only says so: the
 * training must not fail because of a page. */
static void report_at_end(struct Arena *arena, const char *dir) {
    const char *fault = report_write(arena, dir, shipped_path(arena, "docs/report.html"));
    if (fault)
        warn("%s: %s/report.html is not written; report.json and the logs (trainer_state.json) are "
             "there, and with docs/report.html in its place %s report %s makes the page",
             fault, dir, program_name, shell_word(arena, dir));
}

/* Begins report.json with what was done, in words. The caller adds more, and closes the facts, the
 * object and the file. */
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

/* ---- The results of the course -------------------------------------------------------------- */

/* Writes an answer's reward, its tokens, and how the training changed the log-probability of each:
 * the policy's minus the language model's, at the temperature of sampling. */
static void course_write_answer(struct Course *course, FILE *f, const struct PolicyResult *r,
                                size_t i) {
    const struct Example *answer = &r->answers[i];
    struct Arena *arena = &course->arena;
    double temperature = course->temperature;
    /* 1. both models compute the answer's log-probabilities */
    struct Batch batch = collate(arena, answer, 1, SKIP_LAST);
    struct LMHead head = batch_logprobs(r->policy, arena, &batch, temperature, false);
    struct LMHead ref = batch_logprobs(course->language_model, arena, &batch, temperature, false);
    /* 2. its reward and tokens */
    fprintf(f, "{\"reward\": %s, \"tokens\": [", json_number_text(r->reward[i]));
    for (size_t t = answer->prompt_length; t < answer->n; t++)
        json_write_string(f, t > answer->prompt_length ? ", " : "",
                          tokenizer_decode(course->tok, answer->ids[t], course->vocab_size));
    /* 3. log pi - log pi_ref of each token */
    for (size_t t = 0; t < batch.R; t++)
        head.logprob[t] -= ref.logprob[t];
    json_write_floats(f, "], \"logratio\": ", head.logprob, batch.R);
    fputc('}', f);
}

/* Writes a prompt and each model's answer, as text (samples.jsonl) or by tokens (report.json). */
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

/* Writes summary.json, a run's figures for other programs. */
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
        /* the others are compared with result 0, the language model from which they started */
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

/* Writes the rewards of the held-out reviews that are rated above 0 (liked) or below: a list in
 * report.json. */
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

/* Writes report.json: what report.html shows besides the logs. */
static void course_write_report(struct Course *course, double seconds) {
    struct Arena *arena = &course->arena;
    const char *data = arena_printf(arena, "%s: %zu rated texts to learn from, %zu held out",
                                    course->data, course->train_n, course->held_out_n);
    struct Output out =
        report_begin(course->output_dir, course->command, data, course->language_model, seconds);

    /* 1. Facts, in words: after those of report_begin, a line for each model. */
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

    /* 3. The language model's best of n, where training begins to pay. */
    for (size_t n = 1; n <= COURSE_BEST_OF; n *= 2)
        fprintf(out.file, "%s{\"n\": %zu, \"reward\": %s, \"kl\": %s}",
                n == 1 ? ",\n\"best_of_n\": [" : ", ", n, json_number_text(course->best_of[n - 1]),
                json_number_text(best_of_n_kl(n)));
    fputc(']', out.file);

    /* 4. A few answers, token by token. */
    for (size_t i = 0; i < MIN(course->test_n, (size_t)8); i++) {
        fputs(i ? ",\n" : ",\n\"samples\": [\n", out.file);
        course_write_sample(course, out.file, i, true);
    }
    fputs("]}\n", out.file);
    output_close(&out);
}

/* Writes what a run of the course leaves besides its models. */
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

/* Prints a text that is safe for a terminal, all on one line. */
static void print_plain(struct Text text) {
    struct Arena arena = {0};
    text = text_shown(&arena, text, "");
    fwrite(text.data, 1, text.length, stdout);
    arena_free(&arena);
}

/* Prints the results at the end of a run of the course. */
static void course_print(struct Course *course) {
    enum { SHOWN = 8 };
    const struct PolicyResult *r = course->result;
    struct Arena *arena = &course->arena;

    /* 1. Answers of each model to the same beginnings. */
    printf("\nHeld-out beginnings, continued by each model, with the reward of each:\n");
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

    /* 2. Figures: the reward, next to what it may have cost. */
    printf("\n%zu held-out beginnings   reward      KL  distinct-2  length\n", course->test_n);
    for (size_t k = 0; k < COUNT(course->result); k++)
        printf("  %-20s  %+8.2f%8.1f%12.2f%8.1f\n", COURSE_MODEL[k][0], r[k].mean_reward, r[k].kl,
               r[k].distinct_2, r[k].mean_length);

    /* 3. A command line to go on with, quoted so that it can be pasted into a shell. */
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
 * Chapter 26 - Command line, main
 *
 * How does a command line become a call? Through one table of flags and one table of commands. The
 * flags have the names that transformers, TRL or PEFT give them, where they have one.
 *     ./align dpo --beta 0.5 --model_name_or_path m --dataset_name pairs.jsonl --output_dir out
 * find_command finds dpo's row in COMMANDS, and default_options fills struct Options with dpo's
 * defaults. Two flags are called --beta; take_flag finds the one whose row names dpo. parse_flag
 * checks that 0.5 is a number above 0 and stores it in the member of Options that the row names.
 * note_idle_flags says which flags have no effect, check_needed ends the program if one is missing;
 * then command_dpo runs, and Options is all that it knows.
 * ============================================================================================= */

/* ---- Options -------------------------------------------------------------------------------- */

enum { MOST_FLAGS = 160 };

struct Options {
    const char *model_name_or_path, *ref_model, *reward_model_path, *dataset_name, *eval_dataset,
        *tokenizer, *prompt, *rollouts, *loss_type, *loss_weights, *file;
    const char *peft_adapter, *command; /* command: the command line */
    struct Adapter lora; /* of a new adapter */
    struct TrainingArguments train;
    struct PPOConfig ppo;
    struct ReinforceConfig reinforce;
    struct GenerationConfig generation;
    struct GPT2Config config;
    struct DPOConfig dpo;
    double center_rewards_coefficient, begin; /* begin: when the command line was given */
    struct LengthSampler input_length, output_length;
    size_t pretrain_steps, reward_steps, ppo_steps, dpo_steps, top_n, max_samples;
    bool json, jsonl, decode, help, quiet, use_peft;
    bool given[MOST_FLAGS]; /* which of FLAGS are on the command line */
    const char *passed_over; /* a list: flags of other programs on the command line */
    /* What a command opens, and main closes. */
    struct Arena arena;
    struct Tokenizer *tok;
    struct GPT2 *model, *reference, *reward_model;
    struct Dataset *data, *eval;
};

/* Lists of commands, for flags that several commands have. */
#define BATCH_TRAINING "pretrain, sft, reward, dpo"
#define TUNING "sft, reward, ppo, reinforce, dpo"
#define TRAINING "pretrain, " TUNING
#define TOOLS "generate, logprob, score, collect, eval"
#define SAMPLING "ppo, reinforce, collect, eval"
#define WITH_ADAPTER TUNING ", " TOOLS ", next, merge"
#define WITH_MODEL "rlhf, pretrain, " WITH_ADAPTER
#define WITH_DATA "rlhf, " TRAINING ", " TOOLS
#define WITH_OUTPUT "rlhf, collect, merge, " TRAINING
#define WITH_SEED "rlhf, exact, generate, collect, eval, " TRAINING
#define WITH_REFERENCE "ppo, reinforce, dpo, logprob, eval"
#define WITH_WORDS "tokenize, report, glossary" /* arguments that are not flags: a file, a term */
#define ALL_COMMANDS WITH_MODEL ", exact, " WITH_WORDS

/* ---- Flags ---------------------------------------------------------------------------------- */

/* How a flag's value is read and stored. */
enum Type {
    TYPE_STRING,
    TYPE_TEXT, /* a string that may be empty */
    TYPE_LIST, /* all words up to the next flag, as one string */
    TYPE_CHOICE, /* one of the names in `expected`, stored as its place there: an enum */
    TYPE_BOOL,
    TYPE_STOPPING, /* enum EarlyStopping: a boolean or "never" */
    TYPE_SEED, /* uint64_t; all other whole numbers are size_t */
    TYPE_SIZE,
    TYPE_STEPS, /* -1 means "not set", as in transformers, and is stored as 0 */
    TYPE_WARMUP, /* a number below 1 is a share, and is stored in warmup_ratio */
    TYPE_DOUBLE
};

/* What a flag's value may be: the range of a number, and `expected`, the same in words. */
struct Kind {
    enum Type type;
    double least, most;
    const char *expected;
};
static const struct Kind KIND_STRING = {TYPE_STRING, 0, 0, ""};
static const struct Kind KIND_TEXT = {TYPE_TEXT, 0, 0, ""};
static const struct Kind KIND_LIST = {TYPE_LIST, 0, 0, ""};
/* the names in the order of enum SchedulerType, Optim, SamplingStrategy, KLPenalty, Baseline */
static const struct Kind KIND_SCHEDULER = {TYPE_CHOICE, 0, 0,
                                           "linear, cosine, constant, constant_with_warmup"};
static const struct Kind KIND_OPTIM = {TYPE_CHOICE, 0, 0,
                                       "adamw, adamw_torch, adamw_torch_fused, sgd"};
static const struct Kind KIND_ROW_ORDER = {TYPE_CHOICE, 0, 0, "random, sequential"};
static const struct Kind KIND_KL_PENALTY = {TYPE_CHOICE, 0, 0, "kl, abs, mse, full"};
static const struct Kind KIND_BASELINE = {TYPE_CHOICE, 0, 0, "none, mean, rloo"};
static const struct Kind KIND_BOOL = {TYPE_BOOL, 0, 0, "true or false"};
static const struct Kind KIND_STOPPING = {TYPE_STOPPING, 0, 0, "true or false or never"};
static const struct Kind KIND_SEED = {TYPE_SEED, 0, 0x1p64, "a whole number, 0 or more"};
static const struct Kind KIND_SIZE = {TYPE_SIZE, 0, 0x1p40, "a whole number, 0 to 2^40"};
static const struct Kind KIND_STEPS = {TYPE_STEPS, 0, 0x1p40, "a whole number, 0 to 2^40"};
static const struct Kind KIND_COUNT = {TYPE_SIZE, 1, 0x1p40, "a whole number, 1 to 2^40"};
static const struct Kind KIND_BATCH = {TYPE_SIZE, 1, 4096, "a whole number, 1 to 4096"};
static const struct Kind KIND_WARMUP = {TYPE_WARMUP, 0, 0x1p40, "a number from 0 to 2^40"};
static const struct Kind KIND_DOUBLE = {TYPE_DOUBLE, -FLT_MAX, FLT_MAX, "a number"};
static const struct Kind KIND_POSITIVE = {TYPE_DOUBLE, FLT_MIN, FLT_MAX, "a number above 0"};
static const struct Kind KIND_WEIGHT = {TYPE_DOUBLE, 0, FLT_MAX, "a number, 0 or more"};
static const struct Kind KIND_SHARE = {TYPE_DOUBLE, 0, 1, "a number from 0 to 1"};
static const struct Kind KIND_DECAY = {TYPE_DOUBLE, 0, 1 - DBL_EPSILON / 2,
                                       "a number from 0 to below 1"};
static const struct Kind KIND_EPOCHS = {TYPE_DOUBLE, FLT_MIN, 1e9, "a number above 0, at most 1e9"};
/* a lower one would also take the likeliest token, but the logits would overflow */
static const struct Kind KIND_TEMPERATURE = {TYPE_DOUBLE, 1e-6, FLT_MAX, "a number, 1e-6 or more"};

struct Flag {
    const char *name;
    size_t offset; /* of its value in struct Options */
    const struct Kind *kind;
    const char *commands; /* those that have the flag */
    const char *help;
};

/* A flag's name and place. Most have the name of their member of Options, or of a struct in it. */
#define AT(member) offsetof(struct Options, member)
#define NAMED(member) #member, AT(member)
#define OF(part, member) #member, AT(part.member)

/* A row that is only for --help: no command has it. */
#define HEADING(title) {"", 0, &KIND_TEXT, "", title}

static const struct Flag FLAGS[] = {
    HEADING("Models"),
    {NAMED(model_name_or_path), &KIND_STRING, WITH_MODEL,
     "folder of a model (config.json, model.safetensors)"},
    {NAMED(peft_adapter), &KIND_STRING, WITH_ADAPTER,
     "folder of a LoRA adapter (adapter_config.json, adapter_model.safetensors): added to the "
     "model; training goes on with it"},
    {NAMED(ref_model), &KIND_STRING, WITH_REFERENCE,
     "folder of the reference model; default: the start model"},
    {NAMED(reward_model_path), &KIND_STRING, SAMPLING, "folder of a reward model"},
    HEADING("A new LoRA adapter"),
    {NAMED(use_peft), &KIND_BOOL, TUNING,
     "train a new LoRA adapter instead of the model's weights"},
    {"lora_r", AT(lora.r), &KIND_COUNT, TUNING, "its rank"},
    {OF(lora, lora_alpha), &KIND_POSITIVE, TUNING, "its scale is lora_alpha / lora_r"},
    {OF(lora, use_rslora), &KIND_BOOL, TUNING, "its scale is lora_alpha / sqrt(lora_r)"},
    {OF(lora, lora_dropout), &KIND_WEIGHT, TUNING, "only 0 is implemented"},
    {"lora_target_modules", AT(lora.target_modules), &KIND_LIST, TUNING,
     "layers that get it: c_attn (default), c_proj, c_fc; attn.c_proj, mlp.c_proj; all-linear"},
    HEADING("Data and output"),
    {NAMED(dataset_name), &KIND_STRING, WITH_DATA, "a .jsonl file, or a folder: its train split"},
    {NAMED(eval_dataset), &KIND_STRING, BATCH_TRAINING,
     "held-out data, same shapes; for a folder: its validation split, or else its test split"},
    {OF(train, output_dir), &KIND_STRING, WITH_OUTPUT, "folder for what is made"},
    {NAMED(tokenizer), &KIND_STRING, ALL_COMMANDS,
     "tokenizer.bin; default: beside the program, then the current folder"},
    {OF(train, seed), &KIND_SEED, WITH_SEED, "of all random numbers"},
    {NAMED(quiet), &KIND_BOOL, ALL_COMMANDS, "no progress on stderr"},
    {NAMED(help), &KIND_BOOL, ALL_COMMANDS, "this page; also -h"},
    HEADING("Training"),
    {OF(train, learning_rate), &KIND_WEIGHT, TRAINING, "at its highest"},
    {OF(train, lr_scheduler_type), &KIND_SCHEDULER, TRAINING, ""},
    {OF(train, warmup_steps), &KIND_WARMUP, TRAINING,
     "steps over which the learning rate rises from 0; below 1: a share of all steps"},
    {OF(train, warmup_ratio), &KIND_SHARE, TRAINING, "the same as a share of all steps"},
    {OF(train, optim), &KIND_OPTIM, TRAINING, ""},
    {OF(train, adam_beta1), &KIND_DECAY, TRAINING, "decay of the gradient's running mean"},
    {OF(train, adam_beta2), &KIND_DECAY, TRAINING, "decay of the squared gradient's running mean"},
    {OF(train, adam_epsilon), &KIND_POSITIVE, TRAINING, "added to its square root"},
    {OF(train, weight_decay), &KIND_WEIGHT, TRAINING,
     "on matrices; never on biases and layer norms"},
    {OF(train, max_grad_norm), &KIND_WEIGHT, TRAINING,
     "longer gradients are shortened to this; 0: no limit"},
    {OF(train, max_steps), &KIND_STEPS, TRAINING,
     "optimizer (ppo: PPO) steps; overrides the epochs; 0 or -1: not set"},
    {OF(train, logging_steps), &KIND_COUNT, TRAINING, "steps between log entries"},
    {OF(train, save_steps), &KIND_SIZE, TRAINING,
     "steps between checkpoints, folders checkpoint-N in --output_dir; 0: none"},
    {OF(train, save_total_limit), &KIND_SIZE, TRAINING, "how many to keep; 0: all"},
    {OF(train, resume_from_checkpoint), &KIND_STRING, TRAINING,
     "go on from a folder checkpoint-N; true: from the newest in --output_dir"},
    {OF(train, num_train_epochs), &KIND_EPOCHS, BATCH_TRAINING, "passes over the data"},
    {OF(train, per_device_train_batch_size), &KIND_BATCH, BATCH_TRAINING,
     "rows (dpo, reward: pairs or rated texts) of a micro-batch"},
    {OF(train, per_device_eval_batch_size), &KIND_BATCH, BATCH_TRAINING ", eval",
     "rows of a batch in evaluation; no figure depends on it"},
    {OF(train, gradient_accumulation_steps), &KIND_COUNT, TRAINING,
     "micro-batches of an optimizer step"},
    {OF(train, eval_steps), &KIND_SIZE, BATCH_TRAINING,
     "steps between evaluations; default: at the end"},
    {OF(train, max_length), &KIND_COUNT, BATCH_TRAINING ", logprob, score, eval",
     "longest sequence in tokens"},
    {OF(train, train_sampling_strategy), &KIND_ROW_ORDER, BATCH_TRAINING, ""},
    HEADING("A new model"),
    {OF(config, n_layer), &KIND_COUNT, "pretrain, exact", "blocks of a new model"},
    {OF(config, n_head), &KIND_COUNT, "pretrain, exact", "attention heads"},
    {OF(config, n_embd), &KIND_COUNT, "pretrain, exact", "width"},
    {OF(config, n_positions), &KIND_COUNT, "pretrain", "longest context"},
    {OF(config, vocab_size), &KIND_SIZE, "pretrain, exact, tokenize",
     "ids, the end token included (exact: 2 to 16, without one)"},
    HEADING("Objective"),
    {NAMED(center_rewards_coefficient), &KIND_WEIGHT, "reward",
     "weight of (r_chosen + r_rejected)^2"},
    {OF(dpo, beta), &KIND_POSITIVE, "dpo",
     "how strongly DPO holds to the reference; at 0 the pairs would not count"},
    {"beta", AT(reinforce.beta), &KIND_WEIGHT, "reinforce, exact",
     "price of a nat of KL(policy || reference)"},
    {OF(reinforce, baseline), &KIND_BASELINE, "reinforce",
     "subtracted from the reward; mean: of earlier steps, rloo: leave one out"},
    {OF(reinforce, num_generations), &KIND_COUNT, "reinforce, collect", "answers to each prompt"},
    {NAMED(max_samples), &KIND_SIZE, "collect, eval", "prompts used, from the first; 0: all"},
    {NAMED(loss_type), &KIND_LIST, "dpo, reward",
     "dpo: sigmoid, ipo, hinge, robust, sft, or several; reward: sigmoid (Bradley-Terry), bce (on "
     "text + label)"},
    {NAMED(loss_weights), &KIND_LIST, "dpo", "a weight for each loss_type: 1 0.2"},
    {OF(dpo, label_smoothing), &KIND_DECAY, "dpo",
     "share of pairs thought to be labelled the wrong way round"},
    HEADING("PPO"),
    {NAMED(rollouts), &KIND_STRING, "ppo",
     "replay stored rollouts (query_ids, response_ids, score)"},
    {OF(ppo, batch_size), &KIND_COUNT, "ppo", "rollouts of a step"},
    {OF(reinforce, batch_size), &KIND_COUNT, "reinforce", "rollouts of a step"},
    {OF(ppo, mini_batch_size), &KIND_COUNT, "ppo", "rollouts of one forward and backward pass"},
    {OF(ppo, ppo_epochs), &KIND_COUNT, "ppo", "passes over a batch of rollouts"},
    {OF(ppo, init_kl_coef), &KIND_WEIGHT, "ppo", "beta: the price of a nat of KL"},
    {OF(ppo, adap_kl_ctrl), &KIND_BOOL, "ppo", "adapt it towards --target"},
    {OF(ppo, target), &KIND_POSITIVE, "ppo", "KL that the controller aims at"},
    {OF(ppo, horizon), &KIND_POSITIVE, "ppo", "samples over which it does"},
    {OF(ppo, kl_penalty), &KIND_KL_PENALTY, "ppo", ""},
    {OF(ppo, gamma), &KIND_SHARE, "ppo", "discount"},
    {OF(ppo, lam), &KIND_SHARE, "ppo", "lambda of GAE"},
    {OF(ppo, cliprange), &KIND_WEIGHT, "ppo", "of the probability ratio"},
    {OF(ppo, cliprange_value), &KIND_WEIGHT, "ppo", "of the value"},
    {OF(ppo, vf_coef), &KIND_WEIGHT, "ppo", "weight of the value loss"},
    {OF(ppo, whiten_rewards), &KIND_BOOL, "ppo", "whiten rewards before the advantages"},
    {OF(ppo, score_clip), &KIND_WEIGHT, "ppo", "limit scores to +-this"},
    {OF(ppo, use_score_scaling), &KIND_BOOL, "ppo", "divide scores by their running deviation"},
    {OF(ppo, use_score_norm), &KIND_BOOL, "ppo", "and subtract their running mean"},
    {OF(ppo, ratio_threshold), &KIND_POSITIVE, "ppo",
     "skip mini-batches whose mean ratio exceeds it"},
    {OF(ppo, early_stopping), &KIND_BOOL, "ppo", "stop a step's epochs at 1.5 * target_kl"},
    {OF(ppo, target_kl), &KIND_POSITIVE, "ppo", "for early_stopping"},
    HEADING("Generation"),
    {"input_min_text_length", AT(input_length.min_value), &KIND_COUNT, SAMPLING,
     "prompts cut from texts: shortest"},
    {"input_max_text_length", AT(input_length.max_value), &KIND_COUNT, SAMPLING,
     "and longest plus one (LengthSampler)"},
    {"output_min_length", AT(output_length.min_value), &KIND_COUNT, "ppo, reinforce",
     "responses: shortest limit"},
    {"output_max_length", AT(output_length.max_value), &KIND_COUNT, "ppo, reinforce",
     "and longest plus one (LengthSampler)"},
    {NAMED(prompt), &KIND_TEXT, "generate, next", "text to continue"},
    {OF(generation, temperature), &KIND_TEMPERATURE, "generate, next, " SAMPLING ", rlhf, dpo",
     "divides the logits; towards 0 only the likeliest token is left"},
    {OF(generation, top_k), &KIND_SIZE, "generate, next, " SAMPLING,
     "sample from the k likeliest; 0: all"},
    {OF(generation, top_p), &KIND_SHARE, "generate, next, " SAMPLING,
     "sample from the likeliest that hold this mass"},
    {OF(generation, repetition_penalty), &KIND_POSITIVE, "generate, next",
     "above 1: ids already there become less likely"},
    {OF(generation, no_repeat_ngram_size), &KIND_SIZE, "generate", "no n-gram twice"},
    {OF(generation, max_new_tokens), &KIND_COUNT, "generate, collect, eval, exact",
     "at most so many new tokens (exact: just so many)"},
    {OF(generation, min_new_tokens), &KIND_SIZE, "generate", "at least so many"},
    {OF(generation, num_beams), &KIND_COUNT, "generate", "beam search with so many beams"},
    {OF(generation, length_penalty), &KIND_DOUBLE, "generate",
     "beam search: above 0 favours longer sequences"},
    {OF(generation, early_stopping), &KIND_STOPPING, "generate", "when a beam search ends"},
    {OF(generation, do_sample), &KIND_BOOL, "generate",
     "draw tokens instead of taking the likeliest"},
    {OF(generation, num_return_sequences), &KIND_COUNT, "generate", "samples of each prompt"},
    HEADING("What is printed"),
    {NAMED(top_n), &KIND_COUNT, "next", "rows of the table"},
    {NAMED(json), &KIND_BOOL, "exact, generate, next", "one JSON object a line"},
    {NAMED(jsonl), &KIND_BOOL, "tokenize", "{\"text\"} a line in, {\"input_ids\"} a line out"},
    {NAMED(decode), &KIND_BOOL, "tokenize", "ids in, the exact bytes out"},
    HEADING("Steps of the stages"),
    {NAMED(pretrain_steps), &KIND_SIZE, "rlhf", "of the language model"},
    {NAMED(reward_steps), &KIND_SIZE, "rlhf", "of the reward model"},
    {NAMED(ppo_steps), &KIND_SIZE, "rlhf", "of PPO"},
    {NAMED(dpo_steps), &KIND_SIZE, "rlhf", "of DPO"},
};

_Static_assert(COUNT(FLAGS) <= MOST_FLAGS, "Options must note which flags are given");

/* Flags of transformers, PEFT and TRL for features that do not exist here. The commands that train
 * accept them with the values that change nothing (NULL: all); `why` others are refused. */
static const struct PassedOver {
    const char *names, *harmless, *why;
} PASSED_OVER[] = {
    {"tf32, attn_implementation, gradient_checkpointing, use_cpu, use_cache, trust_remote_code",
     NULL, NULL},
    {"do_eval, overwrite_output_dir, logging_dir, run_name, log_level, disable_tqdm", NULL, NULL},
    {"remove_unused_columns, padding_free, dataloader_num_workers, dataloader_pin_memory", NULL,
     NULL},
    {"dataset_num_proc, optimize_cuda_cache, optimize_device_cache", NULL, NULL},
    {"bf16, fp16, load_in_8bit, load_in_4bit", "false", "align computes in float32"},
    {"torch_dtype, dtype", "float32, auto", "align computes in float32"},
    {"do_train", "true", "a training command trains"},
    {"do_predict", "false", "align generate writes answers"},
    {"report_to", "none, []", "the log is trainer_state.json, and report.html shows it"},
    {"push_to_hub", "false", "nothing is sent anywhere"},
    {"logging_strategy", "steps", "a log entry comes each --logging_steps"},
    {"save_strategy", "steps", "a checkpoint comes each --save_steps; 0: none"},
    {"eval_strategy", "steps, no", "an evaluation comes each --eval_steps and at the end"},
    {"load_best_model_at_end", "false", "the last model is saved, not the best"},
    {"save_safetensors", "true", "weights are written as safetensors"},
    {"packing", "false", "sft trains on a text a row; pretrain packs"},
    {"group_by_length", "false", "--train_sampling_strategy is random or sequential"},
    {"dataloader_drop_last", "false", "the last batch of an epoch counts too"},
};

/* What a flag is called in other programs and versions. If a name is in several rows, the first row
 * counts whose flag the command has. */
static const struct {
    const char *here, *elsewhere;
} ALSO_CALLED[] = {
    {"learning_rate", "lr"},
    {"num_train_epochs", "epochs, n_epochs"},
    {"ppo_epochs", "epochs"},
    {"max_steps", "steps, max_iters"},
    {"per_device_train_batch_size", "batch_size, train_batch_size, per_device_eval_batch_size"},
    {"batch_size", "train_batch_size, per_device_train_batch_size"},
    {"mini_batch_size", "backward_batch_size"},
    {"init_kl_coef", "kl_coef, beta"},
    {"beta", "kl_coef"},
    {"model_name_or_path", "sft_model_path"},
    {"ref_model", "ref_model_name_or_path"},
    {"dataset_name", "train_file"},
    {"eval_dataset", "validation_file"},
    {"max_new_tokens", "max_tokens, n_predict, max_length"},
    {"output_max_length", "max_tokens, max_new_tokens, max_length, response_length"},
    {"output_max_length", "max_completion_length"},
    {"input_max_text_length", "max_prompt_length"},
    {"n_positions", "n_ctx"},
    {"max_length", "max_prompt_length, max_seq_length, block_size, n_ctx"},
    {"temperature", "temp"},
    {"repetition_penalty", "repeat_penalty"},
};

/* ---- Lists of names ------------------------------------------------------------------------- */

/* The list with `name` added at its end. */
static const char *list_add(struct Arena *arena, const char *list, const char *name) {
    return arena_printf(arena, "%s%s%s", list, *list ? ", " : "", name);
}

/* Takes the next name off a list; NULL if there is none. */
static const char *take_name(struct Arena *arena, const char **list) {
    size_t length = next_name(list);
    const char *name = length ? text_copy(arena, (struct Text){*list, length}).data : NULL;
    *list += length;
    return name;
}

static bool list_has(const char *list, const char *name) {
    for (size_t length; (length = next_name(&list)) > 0; list += length)
        if (strlen(name) == length && strncmp(list, name, length) == 0)
            return true;
    return false;
}

static bool program_path(char path[PATH_MAX]);

/* ---- Opening models and data ---------------------------------------------------------------- */

/* The path of a file that ships with the program. It may be next to the program, in the folder to
 * which `make install` copies it, or in the current folder; NULL if it is in none of these. */
static const char *shipped_path(struct Arena *arena, const char *name) {
    static const char *const folders[] = {"", "../share/align/"};
    char program[PATH_MAX];
    char *slash = program_path(program) ? strrchr(program, '/') : NULL;
    for (size_t i = 0; slash && i < COUNT(folders); i++) {
        slash[1] = 0;
        const char *path = arena_printf(arena, "%s%s%s", program, folders[i], name);
        if (file_exists(path))
            return path;
    }
    return file_exists(name) ? name : NULL;
}

/* The same; if there is no such file, the program ends. */
static const char *shipped_file(struct Arena *arena, const char *name, const char *remedy) {
    const char *path = shipped_path(arena, name);
    CHECK(path, "%s is neither beside the program nor in the current folder; %s", name, remedy);
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

static bool given(const struct Options *o, const char *name) {
    for (size_t i = 0; i < COUNT(FLAGS); i++)
        if (o->given[i] && strcmp(FLAGS[i].name, name) == 0)
            return true;
    return false;
}

/* If `idle`, notes which of these flags (names in a list) are on the command line, and why they
 * have no effect there. */
static void note_idle(struct Options *o, bool idle, const char *flags, const char *why) {
    const char *found = "";
    for (const char *name; idle && (name = take_name(&o->arena, &flags));)
        if (given(o, name))
            found = list_add(&o->arena, found, arena_printf(&o->arena, "--%s", name));
    if (*found)
        warn("%s: no effect: %s", found, why);
}

/* Checks config.json's special tokens against the tokens of tokenizer.bin. A model may have more
 * ids than that. If its folder names them, they were in training texts that cannot be encoded here,
 * and the model is refused. A padding token, which is in no text, is kept under its name. Ids
 * without a name only round up the vocabulary. */
static void check_special_tokens(struct Options *o, const char *folder, struct GPT2Config *c) {
    struct Arena arena = {0};
    const struct Tokenizer *tok = o->tok;
    size_t end = (size_t)c->eos_token_id;
    size_t known = (size_t)endoftext_id(c->vocab_size) + 1;
    const struct Text *names = added_tokens(&arena, folder, known, c->vocab_size);
    const char *remedy =
        arena_printf(&arena, "if it only pads, write \"pad_token_id\": %zu in config.json, else ",
                     known);
    /* 1. Texts end with the end token, so it must be in tokenizer.bin. */
    CHECK(end < known || names[end - known].length == 0,
          "%s: its end token, id %zu, is \"%s\", an added token that %s lacks; this model cannot "
          "be used",
          folder, end, names[end - known].data, tok->path);
    CHECK(end < known,
          "%s: its end token, id %zu, is no token of %s; if its texts end with GPT-2's own, write "
          "\"eos_token_id\": %zu in config.json",
          folder, end, tok->path, known - 1);
    /* 2. No id beyond tokenizer.bin's may have a name, except that the first may be for padding. */
    for (size_t id = known; id < c->vocab_size; id++) {
        struct Text name = names[id - known];
        bool kept = id == known && id == (size_t)c->pad_token_id;
        CHECK(kept || name.length == 0,
              "%s: id %zu is \"%s\", an added token that %s lacks; %sthis model cannot be used",
              folder, id, name.data, tok->path, id == known ? remedy : "");
        if (kept)
            c->pad_token = text_copy(&o->arena, name);
    }
    /* 3. An ordinary token as the end token works, but is most likely a mistake. */
    if (end + 1 < known)
        warn("%s: its end token, eos_token_id %zu, is the ordinary token \"%s\"; to this model a "
             "text ends wherever it contains that token",
             folder, end, token_as_unicode(&arena, tok->token[end]).data);
    arena_free(&arena);
}

/* The folder of a model's own weights. For an adapter this is its base; NULL if it names none. */
static const char *base_folder(struct Options *o, const char *folder) {
    if (!is_adapter(folder))
        return folder;
    return adapter_config_load(&o->arena, folder).base_model_name_or_path;
}

/* Loads a model's folder, or an adapter's: then the model is its base with the adapter merged. */
static struct GPT2 *load_model(struct Options *o, const char *folder) {
    const char *base = base_folder(o, folder);
    CHECK(base == folder || (base && file_exists(base)),
          "%s: its base \"%s\" is not here (base_model_name_or_path in its adapter_config.json); "
          "give both: --model_name_or_path BASE --peft_adapter DIR",
          folder, base ? base : "");
    /* A folder may have a tokenizer of its own. If its ids mean other tokens, the model would be
     * fed wrong ones: each folder is checked. */
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

/* Opens a command's tokenizer and model, with the adapter of --peft_adapter, or a new one
 * (--use_peft). Unless it is to be trained, the adapter is merged into the model. */
static void open_model(struct Options *o, bool train) {
    load_tokenizer(o);
    struct GPT2 *model = o->model = load_model(o, o->model_name_or_path);
    if (!o->use_peft && !o->peft_adapter)
        return;
    /* 1. An adapter on top of an adapter cannot be saved: no format says which base it needs. */
    CHECK(!is_adapter(o->model_name_or_path),
          "--model_name_or_path %s: is itself an adapter, a base is needed here; fold it into its "
          "base first: align merge",
          o->model_name_or_path);
    if (o->use_peft)
        adapter_new(model, o->lora, o->train.seed);
    else
        adapter_load(model, o->peft_adapter);
    model->adapter.base_model_name_or_path = o->model_name_or_path;

    /* 2. Without training, W + BA is computed once instead of in each forward pass. */
    if (!train)
        adapter_merge(model);
    else if (model->adapter.lora_dropout > 0)
        warn("%s: lora_dropout %g is not applied: training here has no dropout", o->peft_adapter,
             model->adapter.lora_dropout);
}

/* Loads --ref_model, or else takes the model as it is before training. If an adapter is trained,
 * that shares the base's weights with the policy. */
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

/* The index of a flag's value among `names`; if it is none of them, the program ends. */
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

/* Which rows a command takes: the first of these shapes that the data set has. */
static const unsigned TEXT_SHAPES[] = {SHAPE_TEXT};
static const unsigned SFT_SHAPES[] = {SHAPE_PROMPT_COMPLETION, SHAPE_TEXT};
static const unsigned DPO_SHAPES[] = {SHAPE_PREFERENCE};
static const unsigned REWARD_SHAPES[] = {SHAPE_MARGIN, SHAPE_RATED, SHAPE_LABELLED};
static const unsigned LABELLED_SHAPES[] = {SHAPE_LABELLED};
static const unsigned RATED_SHAPES[] = {SHAPE_RATED};
static const unsigned PROMPT_SHAPES[] = {SHAPE_PROMPT, SHAPE_TEXT};
static const unsigned ROLLOUT_SHAPES[] = {SHAPE_ROLLOUT};

/* ---- Commands: tokenize --------------------------------------------------------------------- */

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
    /* 1. The vocabulary. A model with a smaller one has only the first of the tokenizer's ids. */
    if (o->jsonl && o->decode)
        die_usage("--decode reads ids, --jsonl texts: give one of them");
    struct Tokenizer *tok = load_tokenizer(o);
    size_t V = o->config.vocab_size;
    CHECK(V > BYTE_TOKENS && V <= tok->vocab_size,
          "--vocab_size %zu: a vocabulary has 257 to %zu ids", V, tok->vocab_size);
    const char *path = o->file ? o->file : "-";

    /* 2. --jsonl: one text in each line. */
    if (o->jsonl) {
        o->data = dataset_load(&o->arena, path, TEXT_SHAPES, 1);
        for (size_t i = 0; i < o->data->n; i++) {
            struct Example e = example_encode(&o->arena, tok, o->data->rows[i].text, V, NULL);
            json_write_ids(stdout, "{\"input_ids\": ", e.ids, e.n);
            puts("}");
        }
        return;
    }

    /* 3. Otherwise the whole input is one text, line breaks included, or a list of ids. */
    struct Text text = read_file(&o->arena, path);
    if (o->decode) {
        tokenize_decode(tok, text, V, path);
        return;
    }
    struct Example e = example_encode(&o->arena, tok, text, V, NULL);
    for (size_t k = 0; k < e.n; k++)
        printf("%s%d", k ? " " : "", e.ids[k]);
    putchar('\n');
}

/* ---- Commands: trainings -------------------------------------------------------------------- */

/* Opens what a training starts from: model, data, and a Trainer, whose task the caller sets. */
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

/* As in transformers, a run may overwrite a folder that it reads, since the model is in memory by
 * then. But whoever did not mean to would lose a model, so there is a note. */
static void note_replaced(struct Options *o, const char *dir) {
    for (size_t i = 0; i < COUNT(FLAGS); i++) {
        const char *flag = FLAGS[i].name;
        if (!list_has("model_name_or_path, peft_adapter, ref_model, reward_model_path", flag))
            continue;
        const char *folder = *(const char **)((char *)o + FLAGS[i].offset);
        /* the same folder under another name, for example a link, counts too */
        const char *base = folder ? base_folder(o, folder) : NULL;
        if (folder && same_file(dir, folder)) {
            warn("--output_dir %s is --%s: the model there will be replaced", dir, flag);
        } else if (base && same_file(dir, base)) {
            warn("--output_dir %s is the base of the adapter --%s %s: the adapter will then stand "
                 "on other weights",
                 dir, flag, folder);
        }
    }
}

/* Makes the folder for the result. A folder that holds a model cannot also hold an adapter, or the
 * other way round. */
static void open_output_dir(struct Options *o) {
    const char *dir = o->train.output_dir;
    bool adapter = o->model->adapter.r > 0;
    make_folder(dir);
    /* a reader of such a folder would take whichever it looks for first */
    CHECK(!file_exists(arena_printf(&o->arena, "%s/%s", dir,
                                    adapter ? "config.json" : "adapter_config.json")),
          "--output_dir %s: holds %s already; choose another folder for %s", dir,
          adapter ? "a model" : "an adapter", adapter ? "the adapter" : "the model");
    note_replaced(o, dir);
}

static void save_result(struct Options *o, const struct TrainerState *state) {
    /* 1. The model first: it is what hours of work have made. */
    model_replace(o->model, o->train.output_dir, o->tok);
    say("saved to %s\n", o->train.output_dir);
    trainer_state_save(state, &o->train, o->train.output_dir);

    /* 2. The report: what was done, in words, and a page that shows it with the log. */
    const char *data = arena_printf(&o->arena, "%s: %zu rows%s%s", o->data->path, o->data->n,
                                    o->eval ? "; held out: " : "", o->eval ? o->eval->path : "");
    struct Output out =
        report_begin(o->train.output_dir, o->command, data, o->model, seconds_now() - o->begin);
    fputs("}}\n", out.file);
    output_close(&out);
    report_at_end(&o->arena, o->train.output_dir);
    resume_hint[0] = 0; /* nothing is left to resume */
    CHECK(!interrupted, "interrupted after the last step; the model is saved in %s%s",
          o->train.output_dir, o->eval ? ", its last evaluation may be missing (align eval)" : "");
}

/* Trains, evaluates, saves: how pretrain, sft, reward and dpo end. */
static void finish_training(struct Options *o, struct Trainer *trainer) {
    open_output_dir(o);
    trainer_train(trainer);
    /* unless the last step was evaluated already */
    if (trainer->task.eval_n
        && !(o->train.eval_steps && trainer->state.global_step % o->train.eval_steps == 0))
        trainer_evaluate(trainer);
    save_result(o, &trainer->state);
    trainer_free(trainer);
}

/* Each row's text as ids, followed by the end token unless that is NULL; of a longer text only the
 * first `longest` ids. */
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
    /* one note for all of them */
    note_rows(data, cut, "texts", "are longer than %zu tokens; their first %zu are read", longest,
              longest);
    return texts;
}

static void command_pretrain(struct Options *o) {
    /* 1. A new model with the sizes that the flags give, or an existing one to train further. */
    o->config.bos_token_id = endoftext_id(o->config.vocab_size);
    o->config.eos_token_id = o->config.pad_token_id = o->config.bos_token_id;
    config_check(&o->config, "command line");
    load_tokenizer(o);
    if (o->model_name_or_path) {
        o->model = load_model(o, o->model_name_or_path);
    } else {
        tokenizer_check_size(o->tok, "the new model (--vocab_size)", o->config.vocab_size);
        o->model = gpt2_new(o->config);
        gpt2_init(o->model, o->train.seed);
    }
    leave_out_heads(o->model);

    /* 2. Rows must fit the model's context. The default length is reduced to it, but not a length
     *    that the user has chosen. */
    size_t n_positions = o->model->config.n_positions;
    CHECK(o->train.max_length <= n_positions || !given(o, "max_length"),
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
    struct Trainer trainer = open_training(o, SFT_SHAPES, COUNT(SFT_SHAPES));
    leave_out_heads(o->model);
    sft_task(&trainer, &o->arena, o->data, o->eval);
    finish_training(o, &trainer);
}

static void command_reward(struct Options *o) {
    bool classifier = choice("loss_type", o->loss_type, "sigmoid, bce") == 1;
    struct Trainer trainer = open_training(o, classifier ? LABELLED_SHAPES : REWARD_SHAPES,
                                           classifier ? 1 : COUNT(REWARD_SHAPES));
    struct Rng rng = rng_seed(o->train.seed, STREAM_INIT);
    leave_out_value_head(o->model);
    if (!o->model->score.n)
        tensor_normal(reward_head_declare(o->model), &rng, 0.02);
    reward_task(&trainer, &o->arena, o->data, o->eval)->center = o->center_rewards_coefficient;
    finish_training(o, &trainer);
}

/* Turns --loss_type "sigmoid sft" --loss_weights "1 0.2" into the weight of each loss. */
static void parse_loss_types(struct Options *o) {
    const char *types = o->loss_type;
    const char *weights = o->loss_weights;
    bool fit = true;
    double total = 0;
    for (const char *type; (type = take_name(&o->arena, &types));) {
        /* the order of enum DPOLossType */
        size_t k = choice("loss_type", type, "sigmoid, ipo, hinge, robust, sft");
        /* a number for each name, with nothing after it; without --loss_weights each is 1 */
        const char *word = weights ? take_name(&o->arena, &weights) : "1";
        char *end = NULL;
        double weight = word ? strtod(word, &end) : NAN;
        fit = fit && weight >= 0 && weight <= FLT_MAX && !*end;
        o->dpo.weight[k] = weight;
        total += weight;
    }
    if (!fit || (weights && take_name(&o->arena, &weights)))
        die_usage("--loss_weights \"%s\": a number, 0 or more, for each of --loss_type's names was "
                  "expected",
                  o->loss_weights);
    if (total == 0)
        die_usage("--loss_type \"%s\" --loss_weights \"%s\": no loss counts; nothing would be "
                  "learnt",
                  o->loss_type, o->loss_weights);
}

static void command_dpo(struct Options *o) {
    parse_loss_types(o);
    CHECK(o->dpo.label_smoothing < 0.5,
          "--label_smoothing %g: a share of mislabelled pairs, from 0 to below 0.5",
          o->dpo.label_smoothing);
    struct Trainer trainer = open_training(o, DPO_SHAPES, 1);
    leave_out_heads(o->model);

    /* 1. pi_ref is the policy before training, unless --ref_model names another. */
    load_reference(o);

    /* 2. Pairs as ids, chosen and rejected in turn. The same for held-out pairs, which also need
     *    room for the reference's log-probabilities. */
    struct Example *pairs = arena_alloc(&o->arena, 2 * o->data->n, sizeof *pairs);
    size_t n = dpo_pairs(&trainer, &o->arena, o->data, &o->dpo, pairs);
    struct DPOTask *task =
        dpo_task(&trainer, &o->arena, o->reference, o->dpo, o->generation.temperature, pairs, n);
    if (o->eval) {
        task->pairs[HELD_OUT] = arena_alloc(&o->arena, 2 * o->eval->n, sizeof *pairs);
        trainer.task.eval_n =
            dpo_pairs(&trainer, &o->arena, o->eval, &o->dpo, task->pairs[HELD_OUT]);
        task->ref_logps[HELD_OUT] = arena_zeros(&o->arena, 2 * trainer.task.eval_n, sizeof(double));
    }
    finish_training(o, &trainer);
}

/* ---- Commands: trainings on rollouts -------------------------------------------------------- */

/* Encodes the prompts to answer and returns their number. A row's prompt is taken whole, of a text
 * only the beginning, as many tokens as a LengthSampler draws. */
static size_t encode_prompts(struct Options *o, struct Example *prompts) {
    const struct Dataset *data = o->data;
    struct Rng rng = rng_seed(o->train.seed, STREAM_LENGTH);
    size_t count = 0;
    size_t empty = 0;
    size_t longest = o->model->config.n_positions - 1;
    for (size_t i = 0; i < data->n && (!o->max_samples || count < o->max_samples); i++) {
        /* 1. The row's ids. */
        bool whole = data->shape == SHAPE_PROMPT;
        struct Example e =
            example_encode(&o->arena, o->tok, whole ? data->rows[i].prompt : data->rows[i].text,
                           o->model->config.vocab_size, NULL);
        /* 2. How many of them? A number is drawn even for an empty text, so that the other texts'
         *    lengths do not depend on it. */
        size_t drawn = whole ? e.n : length_sampler(&o->input_length, &rng);
        size_t length = MIN(e.n, drawn);
        CHECK(length <= longest,
              "%s: prompt %zu has %zu tokens; with a context of %zu at most %zu leave room for an "
              "answer",
              data->path, i + 1, length, o->model->config.n_positions, longest);

        /* 3. A prompt without tokens would give the model nothing to continue. */
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

/* Opens what rollouts come from: the data set's prompts, the model's answers, the reward model's
 * rewards. */
static struct RolloutSource open_rollouts(struct Options *o) {
    const struct LengthSampler *in = &o->input_length;
    const struct LengthSampler *out = &o->output_length;
    CHECK(out->max_value > out->min_value,
          "--output_max_length %zu: more than --output_min_length, %zu, was expected",
          out->max_value, out->min_value);
    CHECK(in->max_value > in->min_value,
          "--input_max_text_length %zu: more than --input_min_text_length, %zu, was expected",
          in->max_value, in->min_value);

    /* 1. Random numbers for each purpose. Rollouts are always sampled. */
    struct RolloutSource source = {
        .shuffle = rng_seed(o->train.seed, STREAM_PROMPT_ORDER),
        .lengths = rng_seed(o->train.seed, STREAM_ANSWER_LENGTH),
        .sample = rng_seed(o->train.seed, STREAM_SAMPLE),
        .output_length = o->output_length,
        .generation = o->generation,
    };
    source.generation.do_sample = true;

    /* 2. The reward model. Without one, collect asks a person. */
    if (o->reward_model_path) {
        o->reward_model = load_model(o, o->reward_model_path);
        check_reward_model(o->reward_model, o->reward_model_path);
    }
    source.scorer = (struct Scorer){.reward_model = o->reward_model, .tok = o->tok, .std = 1};

    /* 3. Prompts, and how many tokens of the context the longest of them leaves. */
    open_data(o, PROMPT_SHAPES, COUNT(PROMPT_SHAPES));
    note_idle(o, o->data->shape == SHAPE_PROMPT, "input_min_text_length, input_max_text_length",
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

/* Notes, once for a command, that the context may end an answer before the flag does. room: how
 * many new tokens fit after the longest prompt. */
static void note_full_context(const struct Options *o, size_t room, size_t max_new,
                              const char *flag) {
    if (room >= max_new)
        return;
    warn("%s asks for up to %zu new tokens; after the longest prompt the model's context of %zu "
         "(n_positions) has room for %zu",
         flag, max_new, o->model->config.n_positions, room);
}

/* Trains by PPO or REINFORCE on new or stored rollouts, and saves the model. */
static void train_on_rollouts(struct Options *o, enum Algorithm algorithm) {
    /* 1. Policy, reference, and the folder for the result: if that cannot be written to, we learn
     *    it before hours of work, not after. */
    open_model(o, true);
    leave_out_reward_head(o->model);
    if (algorithm == ALGORITHM_REINFORCE)
        leave_out_value_head(o->model);
    load_reference(o);
    open_output_dir(o);

    /* 2. Rollouts: stored ones, or prompts and a reward model. */
    struct RolloutSource source = {0};
    if (o->rollouts) {
        source.replay = o->data = dataset_load(&o->arena, o->rollouts, ROLLOUT_SHAPES, 1);
    } else {
        source = open_rollouts(o);
        note_full_context(o, source.room, o->output_length.max_value - 1, "--output_max_length");
    }

    /* 3. As many steps as --max_steps says, or else one pass over the prompts or stored
     *    rollouts. */
    double temperature = o->generation.temperature;
    struct RolloutTrainer *trainer =
        algorithm == ALGORITHM_PPO
            ? ppo_trainer_new(o->model, o->reference, o->ppo, o->train, temperature)
            : reinforce_trainer_new(o->model, o->reference, o->reinforce, o->train, temperature);
    trainer->tok = o->tok;
    size_t n = o->rollouts ? o->data->n : source.n;
    size_t pass = MAX((size_t)1, n * trainer->num_generations / trainer->batch_size);
    size_t steps = o->train.max_steps ? o->train.max_steps : pass;
    /* becomes train_batch_size in trainer_state.json, in checkpoints and at the end */
    trainer->args.per_device_train_batch_size = trainer->batch_size;
    o->train.per_device_train_batch_size = trainer->batch_size;
    struct TrainerState state = {0};
    const char *log_dir = algorithm == ALGORITHM_PPO ? o->train.output_dir : NULL;
    rollout_train(trainer, &source, steps, log_dir, &state);
    save_result(o, &state);
    free(state.log_history);
    rollout_trainer_free(trainer);
}

static void command_ppo(struct Options *o) {
    struct PPOConfig *c = &o->ppo;
    c->mini_batch_size = MIN(c->mini_batch_size, c->batch_size);
    c->gradient_accumulation_steps = o->train.gradient_accumulation_steps;
    /* Every mini-batch must be full. Multiplying the two flags could overflow. */
    size_t part = c->batch_size / c->gradient_accumulation_steps;
    bool divides =
        c->batch_size % c->gradient_accumulation_steps == 0 && part % c->mini_batch_size == 0;
    CHECK(divides,
          "--batch_size %zu must be a multiple of --mini_batch_size %zu times "
          "--gradient_accumulation_steps %zu",
          c->batch_size, c->mini_batch_size, c->gradient_accumulation_steps);
    train_on_rollouts(o, ALGORITHM_PPO);
}

static void command_reinforce(struct Options *o) {
    struct ReinforceConfig *c = &o->reinforce;
    CHECK(c->batch_size % c->num_generations == 0,
          "--batch_size %zu must be a multiple of --num_generations %zu", c->batch_size,
          c->num_generations);
    CHECK(c->num_generations > 1 || c->baseline != BASELINE_RLOO, "--baseline rloo needs other "
                                                                  "answers to the same prompt: "
                                                                  "--num_generations 2 or more");
    train_on_rollouts(o, ALGORITHM_REINFORCE);
}

/* ---- Commands: writing ---------------------------------------------------------------------- */

/* A prompt's ids. An empty prompt becomes bos_token_id, as in transformers, which starts a new
 * text: GPT-2's bos token is its end token. */
static struct Example prompt_encode(struct Options *o, struct Text prompt, size_t number) {
    struct Example e = example_encode(&o->arena, o->tok, prompt, o->model->config.vocab_size, NULL);
    CHECK(e.n <= o->model->config.n_positions,
          "prompt %zu has %zu tokens, the model's context is %zu (n_positions); shorten it", number,
          e.n, o->model->config.n_positions);
    return e.n ? e : (struct Example){&o->model->config.bos_token_id, 1, 1};
}

/* The values that transformers writes into every generation_config.json, or assumes for a missing
 * setting. NAN: it writes these only if somebody has chosen them. */
static const struct {
    double usual;
    const char *names;
} GENERATION_SETTINGS[] = {
    {0, "do_sample, early_stopping, no_repeat_ngram_size, min_length, min_new_tokens"},
    {1, "temperature, top_p, repetition_penalty, num_beams, length_penalty, num_return_sequences"},
    {1, "typical_p"},
    {20, "max_length, max_new_tokens"},
    {50, "top_k"},
    {NAN, "suppress_tokens, min_p, begin_suppress_tokens, bad_words_ids, stop_strings"},
    {NAN, "forced_bos_token_id, forced_eos_token_id, eos_token_id"},
};

/* Is this setting of generation_config.json anything but transformers' usual one? */
static bool setting_unusual(const struct Json *item, const struct GPT2Config *model) {
    double number = item->type == JSON_FALSE ? 0 : item->type == JSON_NUMBER ? item->number : NAN;
    /* the end token may repeat config.json's */
    if (strcmp(item->key.data, "eos_token_id") == 0 && number == model->eos_token_id)
        return false;
    /* NaN equals nothing: a list, a string or `true` is always unusual */
    for (size_t k = 0; k < COUNT(GENERATION_SETTINGS); k++)
        if (list_has(GENERATION_SETTINGS[k].names, item->key.data))
            return item->type != JSON_NULL && number != GENERATION_SETTINGS[k].usual;
    return false;
}

/* transformers takes its defaults from generation_config.json; here flags decide everything. If the
 * file has unusual settings, a note says that they have no effect.
 *                                                            test: docs/tools/check_failures.py */
static void note_generation_config(struct Options *o) {
    const char *path = arena_printf(&o->arena, "%s/generation_config.json", o->model_name_or_path);
    const char *said = "";
    if (!file_exists(path))
        return;
    const struct Json *config = json_object(&o->arena, read_file(&o->arena, path), path, "");
    for (const struct Json *item = config->child; item; item = item->next)
        if (setting_unusual(item, &o->model->config))
            said = list_add(&o->arena, said, item->key.data);
    if (*said)
        warn("%s: %s: not read; say by flags what generate is to do", path, said);
}

/* Prints a prompt's continuations as a line of JSON: the new ids and the new text of each. */
static void print_generation_json(struct Options *o, struct Text prompt, const struct Sequence *s,
                                  size_t n) {
    json_write_string(stdout, "{\"prompt\": ", prompt);
    for (size_t i = 0; i < n; i++) {
        size_t from = s[i].prompt_length;
        json_write_ids(stdout, i ? ", " : ", \"sequences\": [", s[i].ids + from, s[i].n - from);
    }
    for (size_t i = 0; i < n; i++) {
        size_t from = s[i].prompt_length;
        struct Text text = tokenizer_decode_all(o->tok, &o->arena, s[i].ids + from, s[i].n - from,
                                                o->model->config.vocab_size);
        json_write_string(stdout, i ? ", " : "], \"texts\": [", text);
    }
    puts("]}");
}

/* Prints each continuation after its prompt, for a person to read: without the end token, and
 * without the bos token that takes the place of an empty prompt. */
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

    /* 2. A sequence for each answer, with its own random numbers: the draws for one do not depend
     *    on the others. */
    struct Sequence *sequences = arena_alloc(&o->arena, data->n * each, sizeof *sequences);
    struct Rng rng = rng_seed(o->train.seed, STREAM_SAMPLE);
    size_t room = o->model->config.n_positions;
    note_generation_config(o);
    for (size_t i = 0; i < data->n; i++) {
        struct Example e = prompt_encode(o, data->rows[i].prompt, i + 1);
        room = MIN(room, o->model->config.n_positions + 1 - e.n);
        for (size_t k = 0; k < each; k++)
            sequences[i * each + k] =
                sequence_start(&o->arena, e.ids, e.n, g->max_new_tokens, o->model,
                               rng_seed(rng_next(&rng), STREAM_SAMPLE));
    }
    note_full_context(o, room, g->max_new_tokens, "--max_new_tokens");

    /* 3. Write all of them together, so that each step reads the weights once for all. */
    generate(o->model, sequences, data->n * each, g);
    for (size_t i = 0; i < data->n; i++) {
        if (o->json)
            print_generation_json(o, data->rows[i].prompt, &sequences[i * each], each);
        else
            print_generation(o, data->rows[i].prompt, &sequences[i * each], each);
    }
}

/* Prints the tokens that can follow a prompt, the likeliest first. */
static void print_next_json(struct Options *o, const struct Candidate *top, size_t kept) {
    json_write_string(stdout, "{\"prompt\": ", text_of(o->prompt));
    printf(", \"kept\": %zu, \"top\": [", kept);
    for (size_t i = 0; i < MIN(kept, o->top_n); i++)
        printf("%s[%d, %.9g]", i ? ", " : "", top[i].id, top[i].value);
    puts("]}");
}

static void print_next_table(struct Options *o, const struct Candidate *top, size_t kept,
                             double entropy) {
    size_t V = o->model->config.vocab_size;
    printf("   id  probability  token     (%zu of %zu tokens can follow; entropy %.3f nats)\n",
           kept, V, entropy);
    for (size_t i = 0; i < MIN(kept, o->top_n); i++) {
        printf("%5d  %11.6f  ", top[i].id, top[i].value);
        json_write_string(stdout, "", tokenizer_decode(o->tok, top[i].id, V));
        putchar('\n');
    }
}

/* align next -- the distribution of the next token after a prompt.
 *                                                          [glossary: Distribuição (em ML)] */
static void command_next(struct Options *o) {
    open_model(o, false);
    leave_out_reward_head(o->model);
    struct Arena *arena = &o->arena;
    struct GPT2 *model = o->model;
    size_t V = model->config.vocab_size;
    size_t kept = 0;

    /* 1. The logits after the prompt's last token. */
    struct Example e = prompt_encode(o, text_of(o->prompt), 1);
    struct Batch batch = collate(arena, &e, 1, READ_LAST);
    struct Activations acts = gpt2_forward(model, arena, &batch, false);
    float *p = arena_floats(arena, V);
    output_logits(model, p, acts.ln_f + (e.n - 1) * model->config.n_embd, 1);
    check_numbers(model, arena, &batch, "a logit of the next token", p, V);

    /* 2. Process them as sampling does, and turn what is left into probabilities. */
    o->generation.do_sample = true;
    process_logits(p, V, &o->generation, e.ids, e.n, 0, model->config.eos_token_id);
    double entropy = entropy_of_logits(p, log_sum_exp(p, V, arena_floats(arena, V)), V);
    softmax(p, V);

    /* 3. The tokens that can follow, the likeliest first. */
    struct Candidate *top = arena_alloc(arena, V, sizeof *top);
    for (size_t v = 0; v < V; v++)
        if (p[v] > 0)
            top[kept++] = (struct Candidate){p[v], (int)v};
    qsort(top, kept, sizeof *top, compare_candidates_down);
    if (o->json)
        print_next_json(o, top, kept);
    else
        print_next_table(o, top, kept, entropy);
}

/* ---- Commands: judging texts ---------------------------------------------------------------- */

/* Prints a line of logprob: a text's ids; the log-probability of each but the first, which nothing
 * predicts; their sum over the completion; and, with --ref_model, KL(model || reference) of the
 * next token at each position. */
static void print_logprob(struct Options *o, struct Arena *arena, const struct Example *e) {
    /* 1. A text without tokens has no probabilities. */
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

    /* 3. Position t predicts token t + 1, so the completion's log-probabilities begin one position
     *    before its first token. */
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
    /* 1. The model, perhaps a reference, and the texts. */
    struct Arena arena = {0};
    open_model(o, false);
    leave_out_reward_head(o->model);
    if (o->ref_model)
        load_reference(o);
    open_data(o, SFT_SHAPES, COUNT(SFT_SHAPES));
    const struct Dataset *data = o->data;
    size_t V = o->model->config.vocab_size;
    size_t cut = 0;
    /* 2. The length that both models can read. */
    size_t limit = MIN(o->train.max_length, o->model->config.n_positions);
    if (o->reference)
        limit = MIN(limit, o->reference->config.n_positions);

    /* 3. A line for each row, long ones cut. */
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

/* align score -- what the course's sentiment pipeline says of each text. */
static void command_score(struct Options *o) {
    open_model(o, false);
    check_reward_model(o->model, o->peft_adapter ? o->peft_adapter : o->model_name_or_path);
    open_data(o, TEXT_SHAPES, 1);
    /* the reward is read at the text's last token, so no end token is added */
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

/* The state of `collect`. It makes preferences.jsonl; judged.json next to it lists the prompts that
 * are done, with or without a pair, after which a later run begins. judged.json is written second:
 * if the run is killed between the two, the last prompts are judged again, with the same random
 * numbers, and a pair that is in the file is not added twice. */
struct Collection {
    struct RolloutSource source;
    const char *path; /* of preferences.jsonl */
    struct Text *shown; /* (source.n) the prompts, as a person sees them */
    size_t begin, done; /* how many prompts were judged before this run, and are now */
    struct Row *pairs; /* those in preferences.jsonl, as a person sees them */
    size_t n, added; /* how many these are, and how many of them this run has added */
    struct Rng rng;
};

/* ---- Commands: collecting preferences ------------------------------------------------------- */

/* A pair as texts: answers[0] is the chosen one, answers[1] the rejected one. */
static struct Row pair_row(struct Options *o, const struct Example *answers) {
    const struct GPT2Config *config = &o->model->config;
    size_t n = answers->prompt_length;
    return (struct Row){
        .prompt = tokenizer_decode_all(o->tok, &o->arena, answers->ids, n, config->vocab_size),
        .chosen = answer_text(o->tok, &o->arena, &answers[0], config),
        .rejected = answer_text(o->tok, &o->arena, &answers[1], config),
    };
}

/* A pair as a terminal shows it. Texts that differ only in what a terminal cannot show become the
 * same. */
static struct Row pair_shown(struct Options *o, struct Row pair, const char *kept) {
    pair.prompt = text_shown(&o->arena, pair.prompt, kept);
    pair.chosen = text_shown(&o->arena, pair.chosen, kept);
    pair.rejected = text_shown(&o->arena, pair.rejected, kept);
    return pair;
}

/* Is this pair in preferences.jsonl, whichever side was chosen? */
static bool pair_known(const struct Collection *c, struct Row pair) {
    for (size_t i = 0; i < c->n; i++) {
        const struct Row *old = &c->pairs[i];
        bool same =
            text_equal(pair.chosen, old->chosen) && text_equal(pair.rejected, old->rejected);
        bool turned =
            text_equal(pair.chosen, old->rejected) && text_equal(pair.rejected, old->chosen);
        if (text_equal(pair.prompt, old->prompt) && (same || turned))
            return true;
    }
    return false;
}

/* Adds pairs, chosen and rejected in turn, to preferences.jsonl, except those that are there. They
 * are on the disk before the next ones are judged: a person's work must not be lost. The whole file
 * is rewritten, so that it never ends in half a line. */
static void preferences_add(struct Options *o, struct Collection *c, const struct Example *answers,
                            size_t n) {
    struct Arena arena = {0};
    struct Text before = file_exists(c->path) ? read_file(&arena, c->path) : text_of("");
    struct Output out = output_open(o->train.output_dir, "preferences.jsonl");
    fwrite(before.data, 1, before.length, out.file);
    for (size_t i = 0; i < n; i++) {
        struct Row pair = pair_row(o, &answers[2 * i]);
        struct Row shown = pair_shown(o, pair, "");
        if (pair_known(c, shown))
            continue;
        json_write_string(out.file, "{\"prompt\": ", pair.prompt);
        json_write_string(out.file, ", \"chosen\": ", pair.chosen);
        json_write_string(out.file, ", \"rejected\": ", pair.rejected);
        fputs("}\n", out.file);
        c->pairs[c->n++] = shown;
        c->added++;
    }
    output_close(&out);
    arena_free(&arena);
}

/* Reads what earlier runs have left: the pairs, and how many of the first prompts are judged. */
static void collection_read(struct Options *o, struct Collection *c) {
    const char *path = arena_printf(&o->arena, "%s/judged.json", o->train.output_dir);
    bool begun = file_exists(c->path);
    bool any = begun && read_file(&o->arena, c->path).length > 0;
    /* 1. The pairs. A prompt gives at most half as many as it has answers. */
    struct Dataset *pairs = any ? dataset_load(&o->arena, c->path, DPO_SHAPES, 1) : NULL;
    size_t old = pairs ? pairs->n : 0;
    size_t most = old + c->source.n * o->reinforce.num_generations / 2;
    c->pairs = arena_alloc(&o->arena, most, sizeof *c->pairs);
    for (; c->n < old; c->n++)
        c->pairs[c->n] = pair_shown(o, pairs->rows[c->n], "");

    /* 2. The prompts. The list counts as far as it agrees with this data set's prompts. */
    struct Json *json = begun && file_exists(path) ? json_read_file(&o->arena, path) : NULL;
    struct Json *list = json_get(json, "prompts");
    CHECK(!json || (list && list->type == JSON_ARRAY),
          "%s: a list \"prompts\" was expected; without this file all prompts are judged again",
          path);
    const struct Json *item = list ? list->child : NULL;
    for (; item && c->done < c->source.n; item = item->next, c->done++)
        if (!text_equal(item->string, c->shown[c->done]))
            break;
    c->begin = c->done;
}

static void judged_write(const struct Options *o, const struct Collection *c) {
    struct Output out = output_open(o->train.output_dir, "judged.json");
    fputs("{\"prompts\": [", out.file);
    for (size_t i = 0; i < c->done; i++)
        json_write_string(out.file, i ? ",\n" : "\n", c->shown[i]);
    fputs("]}\n", out.file);
    output_close(&out);
}

/* Lets the reward model judge the answers to `n` prompts. */
static void collect_scored(struct Options *o, struct Collection *c, const struct Example *prompts,
                           size_t n) {
    struct Example *pairs = arena_alloc(&o->arena, 2 * n, sizeof *pairs);
    struct PreferenceSource source = {
        .policy = o->model,
        .generation = &c->source.generation,
        .num_generations = o->reinforce.num_generations,
        .scorer = &c->source.scorer,
    };
    size_t count = collect_preferences(&source, &o->arena, prompts, n, &c->rng, pairs);
    preferences_add(o, c, pairs, count);
}

/* Shows two answers and asks for '1', '2', 's' (skip) or 'q' (stop), which it returns. The end of
 * the input counts as 'q'. */
static int ask_person(const struct Collection *c, struct Row pair) {
    char line[256];
    fprintf(stderr, "\n%zu/%zu  %.*s ...\n  1: %.*s\n  2: %.*s\n", c->done - c->begin + 1,
            c->source.n - c->begin, (int)pair.prompt.length, pair.prompt.data,
            (int)pair.chosen.length, pair.chosen.data, (int)pair.rejected.length,
            pair.rejected.data);
    for (;;) {
        fputs("Which is better? 1, 2, s to skip, q to stop: ", stderr);
        if (!fgets(line, sizeof line, stdin))
            return 'q';
        int word = tolower((unsigned char)line[strspn(line, " \t")]);
        if (word && strchr("12sq", word))
            return word;
    }
}

/* Lets a person judge the answers to one prompt, two at a time; the last of an odd number is left
 * out. Returns false if the person wants to stop: a later run begins this prompt again. */
static bool collect_asked(struct Options *o, struct Collection *c, const struct Example *prompt) {
    size_t each = o->reinforce.num_generations;
    const struct Example *answers =
        sample_answers(o->model, &o->arena, prompt, 1, each, &c->source.generation, &c->rng);
    for (size_t k = 0; k + 1 < each; k += 2) {
        struct Row pair = pair_row(o, &answers[k]);
        struct Row shown = pair_shown(o, pair, "");
        /* nobody can choose between equal answers, and no question is asked twice */
        if (text_equal(shown.chosen, shown.rejected) || pair_known(c, shown))
            continue;
        int word = ask_person(c, pair_shown(o, pair, "\n\t"));
        if (word == 'q')
            return false;
        if (word == 's')
            continue;
        struct Example chosen_first[] = {answers[k + (word == '2')], answers[k + (word == '1')]};
        preferences_add(o, c, chosen_first, 1);
    }
    return true;
}

/* align collect -- data collection, the H in RLHF: a reward model or the person at the keyboard
 * compares answers, and the judgements are added to preferences.jsonl. A run that was stopped can
 * be continued: prompts that are judged are skipped, and each prompt's random numbers depend only
 * on its place in the data set, so the pairs are those of a single run.
 *                                                                  [glossary: Coleta de dados]
 *                                                             test: cli_collect, collect_resume */
static void command_collect(struct Options *o) {
    enum { TOGETHER = 64 }; /* prompts that a reward model judges at once */
    size_t each = o->reinforce.num_generations;
    CHECK(each >= 2, "--num_generations %zu: 2 or more answers are needed to compare", each);
    open_model(o, false);
    leave_out_reward_head(o->model);
    struct Collection c = {.source = open_rollouts(o)};
    c.path = arena_printf(&o->arena, "%s/preferences.jsonl", o->train.output_dir);
    note_full_context(o, c.source.room, c.source.generation.max_new_tokens, "--max_new_tokens");
    make_folder(o->train.output_dir);

    /* 1. What earlier runs have left. preferences.jsonl is written even if there is no pair yet. */
    size_t n = c.source.n;
    c.shown = arena_alloc(&o->arena, n, sizeof *c.shown);
    for (size_t i = 0; i < n; i++) {
        const struct Example *e = &c.source.prompts[i];
        c.shown[i] = text_shown(&o->arena,
                                tokenizer_decode_all(o->tok, &o->arena, e->ids, e->n,
                                                     o->model->config.vocab_size),
                                "");
    }
    collection_read(o, &c);
    size_t were_there = c.n;
    preferences_add(o, &c, NULL, 0);

    /* 2. Each answer takes one random number from this generator. Those of skipped prompts are
     *    drawn too, so that the others get the same ones as in a single run. */
    c.rng = c.source.sample;
    for (size_t i = 0; i < c.done * each; i++)
        rng_next(&c.rng);

    /* 3. The remaining prompts: one by one for a person, in groups for a reward model, since that
     *    is faster. Where a group begins must not depend on where an earlier run stopped: in other
     *    groups the numbers could differ in the last bit. */
    while (c.done < n) {
        const struct Example *prompts = c.source.prompts + c.done;
        size_t together = o->reward_model ? MIN(n - c.done, TOGETHER - c.done % TOGETHER) : 1;
        if (o->reward_model)
            collect_scored(o, &c, prompts, together);
        else if (!collect_asked(o, &c, prompts))
            break;
        c.done += together;
        judged_write(o, &c);
    }
    say("%zu pairs added to %s (%zu were there)\n", c.added, c.path, were_there);
}

/* ---- Commands: eval, merge ------------------------------------------------------------------ */

/* Measures a policy by its answers. */
static void eval_policy(struct Options *o, struct LogEntry *entry) {
    leave_out_reward_head(o->model);
    if (o->ref_model)
        load_reference(o);
    struct RolloutSource source = open_rollouts(o);
    struct Examination exam = {
        .ref_model = o->reference,
        .scorer = &source.scorer,
        .prompts = source.prompts,
        .n = source.n,
        .generation = source.generation,
        .seed = o->train.seed,
    };
    struct PolicyResult result = policy_measure(o->model, &exam, &o->arena);
    log_value(entry, "reward", result.mean_reward);
    log_value(entry, "reward_std", sqrt(unbiased_variance(result.reward, source.n)));
    log_value(entry, "distinct_2", result.distinct_2);
    log_value(entry, "mean_length", result.mean_length);
    log_value(entry, "samples", (double)source.n);
    if (o->reference)
        log_value(entry, "kl", result.kl);
}

/* Measures a language model by its loss on the tokens on which sft would train. */
static void eval_language(struct Options *o, struct Trainer *trainer, struct LogEntry *entry) {
    *trainer = open_training(o, SFT_SHAPES, COUNT(SFT_SHAPES));
    struct LanguageTask *task = sft_task(trainer, &o->arena, o->data, NULL);
    task->examples[HELD_OUT] = task->examples[TO_LEARN];
    trainer->task.eval_n = trainer->task.n;
    struct LogEntry measured = trainer_measure(trainer);
    double loss;
    log_find(&measured, "eval_loss", &loss);

    /* tokens that count in the loss: neither a prompt's, nor a text's first, which nothing
     * predicts */
    double tokens = 0;
    for (size_t i = 0; i < trainer->task.n; i++) {
        const struct Example *e = &task->examples[TO_LEARN][i];
        tokens += (double)(e->n - MAX((size_t)1, e->prompt_length));
    }
    log_value(entry, "eval_loss", loss);
    log_value(entry, "perplexity", exp(loss));
    log_value(entry, "tokens", tokens);
}

/* align eval -- prints one JSON object. With --reward_model_path: the mean reward of a policy's
 * answers, how varied and how long these are, and the policy's distance from --ref_model. For a
 * model with a reward head: how well it orders pairs, rated or labelled texts. Otherwise: the mean
 * negative log-likelihood of a token and its exponential, the perplexity, which is the number of
 * equally likely tokens that would leave as much doubt. */
static void command_eval(struct Options *o) {
    struct LogEntry entry = {0};
    struct Trainer trainer = {0};
    open_model(o, false);
    if (o->reward_model_path) {
        eval_policy(o, &entry);
    } else if (o->model->score.n) {
        /* a reward model: as training measures held-out data */
        trainer = open_training(o, REWARD_SHAPES, COUNT(REWARD_SHAPES));
        reward_task(&trainer, &o->arena, o->data, o->data);
        entry = trainer_measure(&trainer);
    } else {
        eval_language(o, &trainer, &entry);
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
    const char *base = base_folder(o, o->model_name_or_path);
    const char *dir = o->train.output_dir;
    CHECK(!base || !same_file(base, dir),
          "--output_dir %s: is the adapter's base; merged over "
          "it, the adapter would count twice from then on; choose another folder",
          dir);
    open_model(o, false);
    open_output_dir(o);
    model_replace(o->model, o->train.output_dir, o->tok);
}

/* ---- Commands: the glossary ----------------------------------------------------------------- */

/* edit_distance -- the smallest number of insertions, deletions and substitutions of a letter that
 * turn a into b (of which 63 bytes count): to guess what a mistyped word was meant to be. Row i
 * holds the distances of a's first i letters from each beginning of b; only the row before it is
 * needed to compute it.
 * By hand: "pretrian", "pretrain": two substitutions, so 2. */
static size_t edit_distance(const char *a, const char *b) {
    size_t n = MIN(strlen(b), (size_t)63);
    size_t row[64];
    /* row 0: from nothing to j letters takes j insertions */
    for (size_t j = 0; j <= n; j++)
        row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t diagonal = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            /* substitute (or keep) a letter, or the better of a deletion and an insertion */
            size_t change = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            row[j + 1] = MIN(change, MIN(row[j], row[j + 1]) + 1);
        }
    }
    return row[n];
}

/* A text in the form in which texts are compared: digits, and letters in lower case without their
 * accents, with one space in place of anything else and at both ends. The names of a term are
 * separated by semicolons or a centred dot; both become a semicolon.
 * By hand: "Otimização; Top-p" -> " otimizacao ; top p ".                 test: glossary_fold */
static const char *fold(struct Arena *arena, const char *text) {
    /* U+00C0 to U+00DF; the lower-case letters are 32 further on */
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

static const char *line_after(const char *line) {
    line += strcspn(line, "\n");
    return line + (*line == '\n');
}

/* The length of an entry of docs/glossary.md; `term` is just after its "### ". Ends the program if
 * the entry does not have the eight lines that the head of the file describes. */
static size_t term_length(const char *term, const char *path) {
    size_t lines = 0;
    const char *end = term;
    for (; *end && *end != '\n'; lines++)
        end = line_after(end);
    size_t heading = strcspn(term, "\n");
    const char *dot = strstr(term, " \xc2\xb7 ");
    bool good = dot && dot < term + heading && strncmp(term + heading, "\n- Aliases: ", 12) == 0;
    CHECK(good && lines == 8, "%s: \"%.*s\" is no term; the file's head says how one is written",
          path, (int)MIN(heading, (size_t)100), term);
    return (size_t)(end - term);
}

/* How badly a folded query fits a term's names, those in its heading and its aliases: 0 if it is
 * one of them, 1 if it is some whole words of one, else 2 + the number of edits that turn it into
 * an equally long part of them that begins with a word. */
static size_t term_rank(struct Arena *arena, const char *term, const char *query) {
    int heading = (int)strcspn(term, "\n");
    const char *aliases = term + heading + strlen("\n- Aliases: ");
    const char *names = fold(arena, arena_printf(arena, ";%.*s;%.*s;", heading, term,
                                                 (int)strcspn(aliases, "\n"), aliases));
    if (strstr(names, query))
        return strstr(names, arena_printf(arena, ";%s;", query)) ? 0 : 1;
    size_t rank = SIZE_MAX;
    for (const char *word = names; (word = strchr(word, ' ')); word++) {
        const char *words = arena_printf(arena, "%.*s ", (int)strlen(query) - 1, word);
        rank = MIN(rank, 2 + edit_distance(query, words));
    }
    return rank;
}

/* align glossary [TERM] -- prints the term's entry; if several terms fit equally well, their names;
 * without TERM all names. */
static void command_glossary(struct Options *o) {
    const char *path =
        shipped_file(&o->arena, "docs/glossary.md", "run align in the folder it came in");
    const char *text = read_file(&o->arena, path).data;
    const char *query = fold(&o->arena, o->file ? o->file : "");
    bool all = !query[1]; /* folded, nothing is one space */
    size_t best = SIZE_MAX;
    size_t hits = 0;

    /* 1. The best rank, and how many terms have it. */
    for (const char *line = text; *line; line = line_after(line)) {
        if (strncmp(line, "### ", 4) != 0)
            continue;
        term_length(line + 4, path);
        size_t rank = term_rank(&o->arena, line + 4, query);
        hits = rank < best ? 1 : hits + (rank == best);
        best = MIN(best, rank);
    }
    CHECK(hits > 0, "%s: the file has no term", path);
    if (!all && (hits > 1 || best > 1))
        puts(best > 1 ? "no term has this name; the nearest:" : "several terms fit:");

    /* 2. A single hit is printed whole; otherwise only names, without TERM under the headings. */
    for (const char *line = text; *line; line = line_after(line)) {
        if (all && strncmp(line, "## ", 3) == 0)
            printf("%.*s\n", (int)strcspn(line, "\n") - 3, line + 3);
        if (strncmp(line, "### ", 4) != 0 || term_rank(&o->arena, line + 4, query) != best)
            continue;
        if (hits > 1)
            printf("  %.*s\n", (int)strcspn(line, "\n") - 4, line + 4);
        else
            fwrite(line + 4, 1, term_length(line + 4, path), stdout);
    }
}

/* ---- Commands: rlhf, report, exact ---------------------------------------------------------- */

/* A context of 64 tokens is enough for sentences; whole reviews are worth the time of a longer one.
 * [glossary: Conjunto de dados IMDB] */
static size_t course_positions(const struct Dataset *data) {
    size_t bytes = 0;
    for (size_t i = 0; i < data->n; i++)
        bytes += data->rows[i].text.length;
    /* a token is about 4 bytes */
    return bytes / data->n > 4 * COURSE_POSITIONS ? COURSE_LONG_POSITIONS : COURSE_POSITIONS;
}

/* A new model of the course's own size: small enough to be trained on a CPU in minutes. */
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
    /* GPT-2's 0.02 suits its width of 768; at 128, embeddings as small as that would be drowned out
     * by what the blocks add to them. */
    struct Rng rng = rng_seed(seed, STREAM_WTE);
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

    /* 1. A new model, or an existing one, which is only tuned on these texts, with steps that are
     *    smaller the wider it is. */
    struct GPT2 *model;
    double learning_rate = 5e-3;
    if (o->model_name_or_path) {
        model = load_model(o, o->model_name_or_path);
        leave_out_heads(model);
        course.scale = MIN(1, (double)COURSE_WIDTH / (double)model->config.n_embd);
        learning_rate = 5e-4;
    } else {
        tokenizer_check_size(tok, "rlhf's new model", COURSE_VOCAB);
        model = course_new_model(data, o->train.seed);
    }

    /* 2. Refuse now what would fail only after minutes of training. */
    static const char untrained[] = "--reward_steps 0: an untrained reward model gives every text "
                                    "the same reward; 1 or more steps are needed";
    CHECK(o->reward_steps > 0, "%s", untrained);
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
    const char *page =
        shipped_file(&o->arena, "docs/report.html", "run align in the folder it came in");
    const char *fault = report_write(&o->arena, o->file, page);
    CHECK(!fault, "%s", fault);
    say("%s/report.html is written; open it in a browser\n", o->file);
}

static void command_exact(struct Options *o) {
    const struct GPT2Config *c = &o->config;
    size_t L = o->generation.max_new_tokens;
    double count = pow((double)c->vocab_size, (double)L);
    /* All responses are enumerated, each as a row of a batch, so the world must be small. */
    CHECK(o->reinforce.beta >= 1e-3 && o->reinforce.beta <= 1e3,
          "--beta %g: must be above 0, 0.001 to 1000", o->reinforce.beta);
    CHECK(c->vocab_size >= 2 && c->vocab_size <= 16, "--vocab_size %zu: 2 to 16 tokens",
          c->vocab_size);
    CHECK(L > 0 && count <= EXACT_RESPONSES,
          "--max_new_tokens %zu: %zu tokens make %.6g responses of this length, 2 to %d can be "
          "enumerated; use a shorter one",
          L, c->vocab_size, count, EXACT_RESPONSES);
    CHECK(c->n_layer <= 100 && c->n_embd <= 4096 && c->n_embd % c->n_head == 0,
          "--n_embd %zu must be a multiple of --n_head %zu, at most 4096; --n_layer %zu: 1 to 100",
          c->n_embd, c->n_head, c->n_layer);
    struct ExactWorld *w = exact_world(&o->arena, *c, L, o->train.seed);
    o->reference = w->ref_model;
    exact_run(w, o->reinforce.beta);
    exact_print(w, o->json);
}

/* ---- The commands --------------------------------------------------------------------------- */

static const struct Command {
    const char *name, *what;
    void (*run)(struct Options *);
    const char *needs; /* the flags that must be given */
    const char *defaults; /* those that are the command's own: a name, a value, ... */
} COMMANDS[] = {
    {"rlhf", "the whole course: language model, reward model, PPO, DPO", command_rlhf, "",
     "temperature 0.7, output_dir out, pretrain_steps 2000, reward_steps 450, ppo_steps 85, "
     "dpo_steps 150"},
    {"tokenize", "[FILE]: text (or standard input) to ids; --decode: ids to text", command_tokenize,
     "", "vocab_size 50257"},
    {"pretrain", "a new language model from texts", command_pretrain, "dataset_name, output_dir",
     "vocab_size 50257, n_positions 1024, n_embd 768, n_layer 12, n_head 12"},
    {"sft", "supervised fine-tuning on text or prompt + completion", command_sft,
     "model_name_or_path, dataset_name, output_dir", "learning_rate 2e-5"},
    {"reward", "a reward model from pairs, or from rated or labelled texts", command_reward,
     "model_name_or_path, dataset_name, output_dir", "learning_rate 1e-4"},
    {"ppo", "PPO with a value head (TRL 0.11's PPOTrainer)", command_ppo,
     "model_name_or_path, reward_model_path, dataset_name, output_dir",
     "learning_rate 1.41e-5, max_grad_norm 0, lr_scheduler_type constant, logging_steps 1, seed 0"},
    {"reinforce", "the plain policy gradient, with and without a baseline", command_reinforce,
     "model_name_or_path, reward_model_path, dataset_name, output_dir",
     "learning_rate 1e-6, logging_steps 1, beta 0.05, num_generations 2, baseline rloo"},
    {"dpo", "direct preference optimization on prompt + chosen + rejected", command_dpo,
     "model_name_or_path, dataset_name, output_dir", "learning_rate 1e-6, beta 0.1"},
    {"exact",
     "a toy small enough to enumerate: the closed form, and what DPO, PPO, REINFORCE reach",
     command_exact, "", "vocab_size 6, n_embd 32, n_layer 2, n_head 2, max_new_tokens 3, beta 1"},
    {"generate", "continue a --prompt, or each of a data set", command_generate,
     "model_name_or_path", "top_k 50"},
    {"next", "the distribution of the next token after a --prompt", command_next,
     "model_name_or_path, prompt", "top_n 10"},
    {"logprob", "log-probabilities of tokens and sequences, KL to --ref_model", command_logprob,
     "model_name_or_path, dataset_name", ""},
    {"score", "the sentiment pipeline: reward and pipe_outputs of each text", command_score,
     "model_name_or_path, dataset_name", ""},
    {"collect", "answers, compared by a reward model or by you", command_collect,
     "model_name_or_path, dataset_name, output_dir", "num_generations 2"},
    {"eval", "perplexity, accuracy, or reward and KL", command_eval,
     "model_name_or_path, dataset_name", "max_samples 256"},
    {"merge", "a LoRA adapter folded into its base, saved as a model", command_merge, "output_dir",
     ""},
    {"report", "DIR: report.html again, from a run's logs", command_report, "", ""},
    {"glossary", "[TERM]: the course's terms in Portuguese and English", command_glossary, "", ""},
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
    for (size_t i = 0; i < COUNT(COMMANDS); i++)
        if (edit_distance(name, COMMANDS[i].name) < edit_distance(name, nearest->name))
            nearest = &COMMANDS[i];
    if (strcmp(name, nearest->name) != 0)
        die_usage("there is no command \"%s\"; the nearest is \"%s\" (all: %s --help)", name,
                  nearest->name, program_name);
    return nearest;
}

/* ---- Parsing a command line ----------------------------------------------------------------- */

/* The command's flag of exactly this name, or NULL. */
static const struct Flag *exact_flag(const char *name, const struct Command *command) {
    for (size_t i = 0; i < COUNT(FLAGS); i++)
        if (list_has(FLAGS[i].commands, command->name) && strcmp(name, FLAGS[i].name) == 0)
            return &FLAGS[i];
    return NULL;
}

/* Finds a flag by the beginning of its name if no other flag begins so, as Python's argparse does.
 * If there is none, the program ends and suggests the flag that other programs call by this name,
 * or else the one that is spelt most like it. */
static const struct Flag *find_flag(struct Arena *arena, const char *name,
                                    const struct Command *command) {
    const char *candidates = "";
    size_t count = 0;
    if (!*name)
        die_usage("%s: \"--\" is no flag; all: %s %s --help", command->name, program_name,
                  command->name);

    /* 1. A name that other programs use is never taken for a beginning: --lr is the beginning of
     *    --lr_scheduler_type, but means --learning_rate. */
    const struct Flag *nearest = NULL;
    for (size_t i = 0; i < COUNT(ALSO_CALLED) && !nearest; i++)
        if (list_has(ALSO_CALLED[i].elsewhere, name))
            nearest = exact_flag(ALSO_CALLED[i].here, command);
    bool elsewhere = nearest != NULL;
    size_t least = elsewhere ? 0 : SIZE_MAX;

    /* 2. Flags that begin so, which are nearer than any that is only spelt alike. */
    for (size_t i = 0; i < COUNT(FLAGS); i++) {
        const struct Flag *flag = &FLAGS[i];
        if (!list_has(flag->commands, command->name))
            continue;
        bool begins = !elsewhere && strncmp(name, flag->name, strlen(name)) == 0;
        size_t distance = begins ? 0 : 1 + edit_distance(name, flag->name);
        if (begins)
            candidates = list_add(arena, candidates, arena_printf(arena, "--%s", flag->name));
        count += begins;
        if (distance >= least)
            continue;
        least = distance;
        nearest = flag;
    }
    if (count > 1)
        die_usage("--%s: which of these is meant? %s", name, candidates);
    if (count == 0)
        die_usage("%s has no flag --%s; the nearest is --%s (all: %s %s --help)", command->name,
                  name, nearest->name, program_name, command->name);
    return nearest;
}

/* Reads a boolean as transformers' HfArgumentParser does, in upper or lower case. Returns false if
 * the word is not a boolean. */
static bool parse_bool(const char *word, bool *value) {
    char small[8] = "";
    for (size_t i = 0; word[i] && i + 1 < sizeof small; i++)
        small[i] = (char)tolower((unsigned char)word[i]);
    *value = list_has("true yes y t 1", small);
    return strlen(word) < sizeof small && (*value || list_has("false no n f 0", small));
}

/* Ends the program because a flag's value is not what was expected. */
static _Noreturn void die_value(const struct Flag *flag, const char *value, const char *bounds) {
    const char *expected = flag->kind->expected;
    die_usage("--%s %s: %s%s was expected%s (%s)", flag->name, value, expected,
              strchr(expected, ',') ? "," : "", bounds, flag->help);
}

/* Checks a number and stores it in the type of its member of Options. */
static void parse_number(struct Options *o, const struct Flag *flag, const char *value) {
    void *to = (char *)o + flag->offset;
    const struct Kind *kind = flag->kind;
    bool warmup = kind->type == TYPE_WARMUP;
    bool whole = kind->type != TYPE_DOUBLE && !warmup;
    char bounds[64] = "";
    char *end = NULL;

    /* 1. Read it, up to the word's end. strtoull accepts "-3" and " 3", so the first character must
     *    be a digit. strtod accepts "nan", which fails the comparisons below. */
    if (kind->type == TYPE_STEPS && strcmp(value, "-1") == 0)
        value = "0";
    errno = 0;
    unsigned long long size = strtoull(value, &end, 10);
    double number = whole ? (double)size : strtod(value, &end);
    bool read = !*end && (whole ? isdigit((unsigned char)*value) && !errno : end != value);

    /* 2. "a number above 0" does not tell what is wrong with 1e99, which no float can hold: then
     *    the message gives the bounds too. */
    if (read && !whole && (fabs(number) > FLT_MAX || (number > 0 && number < FLT_MIN)))
        snprintf(bounds, sizeof bounds, "; %.2g to %.2g can be used", kind->least, kind->most);
    if (!read || !(number >= kind->least && number <= kind->most))
        die_value(flag, value, bounds);

    /* 3. Store it. As in transformers 5, a warm-up below 1 is a share of the steps. */
    if (warmup && number > 0 && number < 1)
        o->train.warmup_ratio = number;
    if (kind->type == TYPE_SEED)
        *(uint64_t *)to = size;
    else if (kind->type == TYPE_DOUBLE)
        *(double *)to = number;
    else
        *(size_t *)to = whole ? (size_t)size : (size_t)number;
}

/* Checks and stores a flag's value, which is NULL if the flag is bare. */
static void parse_flag(struct Options *o, const struct Flag *flag, const char *value) {
    void *to = (char *)o + flag->offset;
    enum Type type = flag->kind->type;
    const char *meaning = *flag->help ? flag->help : flag->kind->expected;
    bool boolean = type == TYPE_BOOL || type == TYPE_STOPPING;
    bool truth = true;

    /* 1. A bare boolean is true; early_stopping has a third value. */
    bool never = type == TYPE_STOPPING && value && strcmp(value, "never") == 0;
    if (boolean && value && !never && !parse_bool(value, &truth))
        die_value(flag, value, "");

    /* 2. All others need a value, which may be empty only for a text. */
    bool is_word = type == TYPE_STRING || type == TYPE_LIST || type == TYPE_CHOICE;
    if (!boolean && !value)
        die_usage("--%s needs a value (%s)", flag->name, meaning);
    if (is_word && !value[strspn(value, " ,")])
        die_usage("--%s \"%s\" is empty; a value was expected (%s)", flag->name, value, meaning);

    /* 3. Store it. */
    if (type == TYPE_BOOL)
        *(bool *)to = truth;
    else if (type == TYPE_STOPPING)
        *(enum EarlyStopping *)to = never ? STOP_NEVER : truth ? STOP_TRUE : STOP_FALSE;
    else if (type == TYPE_CHOICE)
        *(int *)to = (int)choice(flag->name, value, flag->kind->expected);
    else if (is_word || type == TYPE_TEXT)
        *(const char **)to = value;
    else
        parse_number(o, flag, value);
}

static bool is_flag(const char *word) {
    return strncmp(word, "--", 2) == 0 || strcmp(word, "-h") == 0;
}

/* Skips a flag of another program that changes nothing here, and its values. Returns how many
 * arguments these values are. */
static int pass_over(struct Options *o, const struct PassedOver *flag, const char *name,
                     const char *value, char **rest) {
    int taken = 0;
    if (!value && *rest && !is_flag(*rest))
        value = rest[taken++];
    /* Each value must be one that changes nothing; "True" and "yes" count as `true`. */
    for (;; value = rest[taken++]) {
        bool truth = true;
        bool boolean = !value || parse_bool(value, &truth);
        bool harmless = !flag->harmless || (value && list_has(flag->harmless, value))
                        || (boolean && list_has(flag->harmless, truth ? "true" : "false"));
        if (!harmless)
            die_usage("--%s %s is not supported: %s; leave it out, or give %s", name,
                      value ? value : "true", flag->why, flag->harmless);
        if (!rest[taken] || is_flag(rest[taken]))
            break;
    }
    o->passed_over = list_add(&o->arena, o->passed_over, arena_printf(&o->arena, "--%s", name));
    return taken;
}

/* The next argument if it is this flag's value, otherwise NULL. Another flag is never a value. If
 * the command also takes words, a boolean takes only "true" or "false", in upper or lower case, so
 * that all other words are left to the command. */
static const char *value_after(const struct Flag *flag, const struct Command *command,
                               const char *next) {
    bool truth;
    if (!next || (is_flag(next) && !strchr(next, ' ')))
        return NULL;
    if (flag->kind->type != TYPE_BOOL || !list_has(WITH_WORDS, command->name))
        return next;
    return strlen(next) >= strlen("true") && parse_bool(next, &truth) ? next : NULL;
}

/* Takes the flag with which argv begins: --name value, --name=value, a bare boolean or --no_name,
 * its negation. Dashes in the name count as underscores. Returns how many further arguments it
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
    const char *positive = strncmp(name, "no_", 3) == 0 ? name + 3 : name;
    const struct Flag *flag = exact_flag(name, command);
    const struct Flag *negated = flag ? NULL : exact_flag(positive, command);
    if (negated && negated->kind->type == TYPE_BOOL) {
        if (equals)
            die_usage("--%s takes no value; give --%s true or false", name, negated->name);
        o->given[negated - FLAGS] = true;
        parse_flag(o, negated, "false");
        return 0;
    }

    /* 2. Training accepts TRL's command lines: flags for features that do not exist here pass. */
    for (size_t k = 0; k < COUNT(PASSED_OVER) && !flag && list_has(TRAINING, command->name); k++) {
        if (list_has(PASSED_OVER[k].names, name))
            return pass_over(o, &PASSED_OVER[k], name, value, argv + 1);
        if (list_has(PASSED_OVER[k].names, positive))
            return pass_over(o, &PASSED_OVER[k], positive, "false", (char *[]){NULL});
    }

    /* 3. One of the command's flags, perhaps abbreviated; its value is the next word or after
     *    "=". */
    if (!flag)
        flag = find_flag(&o->arena, name, command);
    if (!equals)
        value = value_after(flag, command, argv[1]);
    int taken = value && !equals;
    parse_flag(o, flag, value);
    o->given[flag - FLAGS] = true;
    if (flag->kind->type != TYPE_LIST || equals)
        return taken;

    /* 4. A list takes all words up to the next flag: --loss_type sigmoid sft. */
    const char **list = (const char **)((char *)o + flag->offset);
    for (; argv[1 + taken] && !is_flag(argv[1 + taken]) && strlen(*list) < 1000; taken++)
        *list = arena_printf(&o->arena, "%s %s", *list, argv[1 + taken]);
    return taken;
}

/* ---- Flags without effect ------------------------------------------------------------------- */

/* Notes each flag that has no effect together with the other flags given, and why. */
static void note_idle_flags(struct Options *o, const struct Command *command) {
    const struct TrainingArguments *train = &o->train;
    const struct GenerationConfig *g = &o->generation;
    bool generates = command->run == command_generate;
    bool smoothing = strstr(o->loss_type, "sigmoid") || strstr(o->loss_type, "robust");
    const char *fresh = "reward_model_path, dataset_name, top_k, top_p, input_min_text_length, "
                        "input_max_text_length, output_min_length, output_max_length";
    const char *answers = "ref_model, seed, max_samples, max_new_tokens, temperature, top_k, "
                          "top_p, "
                          "input_min_text_length, input_max_text_length";

    /* 1. What is trained, and on what. */
    note_idle(o, !o->use_peft, "lora_r, lora_alpha, lora_dropout, lora_target_modules, use_rslora",
              o->peft_adapter ? "--peft_adapter has its own"
                              : "all weights are trained; for an adapter give --use_peft");
    note_idle(o, o->model_name_or_path, "n_layer, n_head, n_embd, n_positions, vocab_size",
              "--model_name_or_path has its own");
    note_idle(o, !o->eval_dataset, "eval_steps", "there is no --eval_dataset");
    note_idle(o, o->rollouts, fresh, "--rollouts are replayed, none are sampled");

    /* 2. How it is trained, and with what objective. */
    note_idle(o, train->max_steps > 0, "num_train_epochs", "--max_steps decides");
    note_idle(o, train->optim == OPTIM_SGD, "adam_beta1, adam_beta2, adam_epsilon",
              "--optim sgd keeps no running means");
    note_idle(o, train->lr_scheduler_type == SCHEDULER_CONSTANT, "warmup_steps, warmup_ratio",
              "--lr_scheduler_type constant has no warm-up, constant_with_warmup has");
    note_idle(o, train->warmup_steps > 0, "warmup_ratio", "--warmup_steps decides");
    note_idle(o, !train->save_steps, "save_total_limit", "--save_steps 0 leaves no checkpoints");
    note_idle(o, strcmp(o->loss_type, "bce") == 0, "center_rewards_coefficient",
              "--loss_type bce compares no pairs");
    note_idle(o, !smoothing, "label_smoothing", "only the losses sigmoid and robust smooth labels");
    note_idle(o, command->run == command_reinforce, "gradient_accumulation_steps",
              "reinforce takes a step on its whole batch");
    note_idle(o, !o->ppo.adap_kl_ctrl, "horizon, target",
              "--adap_kl_ctrl false keeps the coefficient as it is");
    note_idle(o, !o->ppo.early_stopping, "target_kl", "--early_stopping is not given");
    note_idle(o, !o->ppo.use_score_scaling, "use_score_norm", "--use_score_scaling is not given");

    /* 3. What text is generated. */
    note_idle(o, generates && !g->do_sample, "temperature, top_k, top_p, seed",
              "without --do_sample nothing is drawn");
    note_idle(o, generates && g->num_beams == 1, "length_penalty, early_stopping",
              "there are no beams (--num_beams)");
    note_idle(o, g->min_new_tokens > g->max_new_tokens, "min_new_tokens",
              "it is above --max_new_tokens, which ends the text");
    note_idle(o, o->prompt, "dataset_name", "--prompt is continued");
    note_idle(o, o->reward_model_path, "max_length", "answers end at --max_new_tokens");
    note_idle(o, command->run == command_eval && !o->reward_model_path, answers,
              "answers are written only for a --reward_model_path");
}

/* Takes an argument that is not a flag: a file or a folder, or a word of glossary's term. */
static void take_word(struct Options *o, const struct Command *command, char *word) {
    bool several = command->run == command_glossary;
    if (!list_has(WITH_WORDS, command->name) || (o->file && !several))
        die_usage("%s: \"%s\" is no flag (flags start with --)", command->name, word);
    if (!o->file || strlen(o->file) < 1000)
        o->file = o->file ? arena_printf(&o->arena, "%s %s", o->file, word) : word;
}

static void parse_arguments(struct Options *o, const struct Command *command, int argc,
                            char **argv) {
    /* 1. The command line, quoted for a shell, for report.json. */
    o->begin = seconds_now();
    o->command = program_name;
    for (int i = 1; i < argc; i++)
        o->command = arena_printf(&o->arena, "%s %s", o->command, shell_word(&o->arena, argv[i]));

    /* 2. Flags with their values, and other words. */
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

    /* 3. Refuse what contradicts itself, and note what has no effect: no flag is ignored in
     *    silence. */
    if (o->use_peft && o->peft_adapter)
        die_usage("--use_peft starts a new adapter, --peft_adapter goes on with one: give one of "
                  "them");
    if (o->use_peft && o->lora.lora_dropout != 0)
        die_usage("--lora_dropout %g: only 0 is implemented; leave it out", o->lora.lora_dropout);
    if (o->use_peft && o->lora.r > 1 << 16)
        die_usage("--lora_r %zu: 1 to 65536 can be used", o->lora.r);
    if (*o->passed_over)
        warn("%s: no effect in align", o->passed_over);
    note_idle_flags(o, command);
}

/* Ends the program if a flag that the command needs is missing. Stored rollouts bring their own
 * prompts and rewards. */
static void check_needed(struct Options *o, const struct Command *command) {
    const char *needs = command->needs;
    for (const char *name; (name = take_name(&o->arena, &needs));) {
        bool stored = o->rollouts && list_has("reward_model_path, dataset_name", name);
        if (!stored && !given(o, name))
            die_usage("--%s is needed; see --help", name);
    }
}

/* A command's defaults: those of transformers and TRL, then the command's own, from COMMANDS. */
static struct Options default_options(const char *name) {
    struct Options o = {
        .train = training_arguments(),
        .ppo = ppo_config(),
        .reinforce = {.batch_size = 128, .num_generations = 1},
        .generation = generation_config(),
        .loss_type = "sigmoid",
        .passed_over = "",
        .lora = {.r = 16, .lora_alpha = 32, .target_modules = "c_attn"},
        .config = {.layer_norm_epsilon = 1e-5f},
        .input_length = {2, 8},
        .output_length = {4, 16},
    };
    /* only generate has transformers' top_k of 50; all other commands sample from all tokens */
    o.generation.top_k = 0;
    const struct Command *command = find_command(name);
    const char *defaults = command->defaults;
    for (const char *flag; (flag = take_name(&o.arena, &defaults));)
        parse_flag(&o, exact_flag(flag, command), take_name(&o.arena, &defaults));
    return o;
}

/* ---- Help ----------------------------------------------------------------------------------- */

/* A flag's value in Options, as text; "" for a string that is not set. */
static const char *flag_value(struct Options *o, const struct Flag *flag) {
    static const char *const stopping[] =
        {[STOP_FALSE] = "false", [STOP_TRUE] = "true", [STOP_NEVER] = "never"};
    const void *at = (const char *)o + flag->offset;
    const char *names = flag->kind->expected;
    switch (flag->kind->type) {
    case TYPE_STRING:
    case TYPE_TEXT:
    case TYPE_LIST:
        return *(const char *const *)at ? *(const char *const *)at : "";
    case TYPE_CHOICE:
        for (int i = *(const int *)at; i > 0; i--)
            take_name(&o->arena, &names);
        return take_name(&o->arena, &names);
    case TYPE_BOOL:
        return *(const bool *)at ? "true" : "false";
    case TYPE_STOPPING:
        return stopping[*(const enum EarlyStopping *)at];
    case TYPE_SEED:
        return arena_printf(&o->arena, "%llu", (unsigned long long)*(const uint64_t *)at);
    case TYPE_DOUBLE:
        return arena_printf(&o->arena, "%g", *(const double *)at);
    default:
        return arena_printf(&o->arena, "%zu", *(const size_t *)at);
    }
}

/* Prints words in lines of at most 100 columns. `indent`: the column where the first line begins,
 * to which all others are indented. */
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

/* Prints each of a command's flags under its heading: the command's default, what values it may
 * have, and what it is for. */
static void print_help(const struct Command *command) {
    enum { INDENT = 33 };
    struct Options defaults = default_options(command->name);
    const char *heading = NULL;
    printf("align %s -- ", command->name);
    print_wrapped(command->what, sizeof "align -- " - 1 + strlen(command->name));
    puts("\nIn [brackets]: the default. A boolean may stand bare, be --no_so or have a value. A "
         "name may be cut\n"
         "short as far as it fits one flag alone, and have dashes for underscores.");
    for (size_t i = 0; i < COUNT(FLAGS); i++) {
        const struct Flag *flag = &FLAGS[i];
        /* 1. A heading is printed only when the command has a flag under it. */
        if (!*flag->name)
            heading = flag->help;
        if (!list_has(flag->commands, command->name))
            continue;
        if (heading)
            printf("\n%s\n", heading);
        heading = NULL;

        /* 2. [default] what is expected: what it is for. */
        const char *value = flag_value(&defaults, flag);
        const char *expected = flag->kind->expected;
        printf("  --%-*s", INDENT - 4, flag->name);
        const char *colon = *expected && *flag->help ? ": " : "";
        print_wrapped(arena_printf(&defaults.arena, "%s%s%s%s%s%s", *value ? "[" : "", value,
                                   *value ? "] " : "", expected, colon, flag->help),
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

/* Answers questions about the program itself: --help, -h, help [COMMAND], --version, or no argument
 * at all. Returns false if the command line is anything else. */
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

/* ---- How idle threads wait ------------------------------------------------------------------ */

/* A thread that waits for others spins before it sleeps, for some milliseconds with GNU's OpenMP,
 * for 200 with LLVM's. That is right on an idle machine. On a busy one it uses up the time of the
 * very thread for which it waits, and a run takes several times as long. So threads spin only
 * briefly, unless the user has chosen. LLVM's OpenMP has a function for this; GNU's reads it only
 * from the environment, when the program starts. */
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
/* The C library calls this before the constructors of the shared libraries, libgomp's among them.
 * It restarts the program with one more environment variable before anything else has happened, but
 * only if the name by which the program was started leads to the file that runs: under valgrind it
 * does not. */
static void gomp_spin_briefly(int argc, char **argv, char **variables) {
    (void)argc;
    size_t n = 0;
    for (; variables[n]; n++) {
        bool is_count = strncmp(variables[n], "GOMP_SPINCOUNT=", 15) == 0;
        if (is_count || strncmp(variables[n], "OMP_WAIT_POLICY=", 16) == 0)
            return;
    }
    static char brief[] = "GOMP_SPINCOUNT=4000";

    /* 1. The kernel has not loaded a loader. If the program is static, the environment can still be
     *    changed. If the user ran the loader with the program as its argument, that has no effect,
     *    and a restart is impossible: threads then spin as long as usual. */
    if (getauxval(AT_BASE) == 0) {
        putenv(brief);
        return;
    }

    /* 2. Restart with the same name and arguments. If that fails, the program just goes on. */
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

/* ---- What differs between systems ------------------------------------------------------------ */

#ifdef _WIN32
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to,
                                                unsigned long flags);
__declspec(dllimport) unsigned long __stdcall GetModuleFileNameA(void *module, char *path,
                                                                 unsigned long size);

/* rename() on Windows fails if there is a file of the new name. */
static int rename_over(const char *from, const char *to) {
    /* 1: replace it; 8: return when it is on the disk */
    return MoveFileExA(from, to, 1 | 8) ? 0 : (errno = EACCES, -1);
}

static size_t peak_rss_bytes(void) {
    return 0; /* not known */
}
#else
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

/* The path of the running program, links followed: the files that ship with it are searched for
 * next to it. Each system has its own way of asking. */
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
    /* the name by which it was started; /proc/self/exe may be the loader, if that was run with the
     * program as its argument */
    const char *name = (const char *)getauxval(AT_EXECFN);
    return name && realpath(name, path);
#else
    ssize_t n = readlink("/proc/self/exe", path, PATH_MAX - 1);
    path[MAX(n, 0)] = 0;
    return n > 0;
#endif
}

/* What this file assumes of compiler and machine beyond C11. Without these checks the program could
 * be built, run, and give wrong numbers. At the start, arithmetic_check tests what no macro
 * tells. */
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

_Static_assert(sizeof(int) == 4 && FLT_MANT_DIG == 24 && DBL_MANT_DIG == 53,
               "align.c needs int of 32 bits, and float and double as IEEE 754 has them");

/* Does arithmetic work as required above? Some flags define no macro, such as clang's
 * -funsafe-math-optimizations and -fno-honor-nans, and -Ofast may be given only when linking: the
 * program then sets the smallest numbers to 0. `volatile` keeps the compiler from computing the
 * results in advance. */
static void arithmetic_check(void) {
    volatile float not_a_number = NAN;
    volatile float infinity = INFINITY;
    volatile float one = 1;
    volatile float least = FLT_MIN;
    float nan = not_a_number;
    float large = 0x1p24f * one;
    float small = 0.25f * one;
    float sum = large + small;
    /* in float32 2^24 + 1/4 is 2^24, so sum - large is 0; regrouped it would be 1/4 */
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
    /* 1. If a standard stream is closed, the next file that is opened gets its number, and messages
     *    would be written into a model. A file at its size limit must be an error, not a signal. */
#ifndef _WIN32
    /* read-only, so that printing still fails */
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) == -1 && open("/dev/null", O_RDONLY) != fd)
            exit(1);
    signal(SIGXFSZ, SIG_IGN);
#else
    _fmode = _O_BINARY; /* or Windows would change the line ends */
    for (int fd = 0; fd <= 2; fd++)
        _setmode(fd, _O_BINARY);
#endif
    openmp_spin_briefly();
    arithmetic_check();

    /* 2. Run the command. */
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
            /* a training goes on although nobody reads its output any more; a filter ends */
            if (list_has(WITH_OUTPUT, command->name))
                signal(SIGPIPE, SIG_IGN);
#endif
            check_needed(&o, command);
            kernel_choose();
            command->run(&o);
        }
        options_close(&o);
    }
    arena_free(&words);
    program_name = "align";

    /* 3. Output that could not be written, for example to a full disk, is an error. */
    errno = 0;
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "standard output: writing failed: %s",
          errno ? strerror(errno) : "what came out is not complete");
    return argc < 2 ? 2 : 0;
}
#endif
