#!/usr/bin/env bash
# Builds that would give wrong numbers are refused, right ones are not; and a build starts and ends
# as a program should.
#     docs/tools/check_compilers.sh
# A compiler or tool that is not installed is passed over. Ends with 'N passed, N failed, N
# skipped'.
set -u
cd "$(dirname "$0")/../.."
work=$(mktemp -d "${TMPDIR:-/tmp}/check_compilers.XXXXXX")
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

# count WHAT STATUS: one case; what it said, in $work/said, where it failed
count() {
    if [ "$2" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $1"
        head -n 5 "$work/said"
    fi
}

installed() {                  # installed TOOL: or counts what is skipped
    command -v "$1" > /dev/null && return
    skipped=$((skipped + 1))
    echo "skipped: no $1"
    return 1
}

# refused WORDS COMMAND...: the compiler ends with one error that has the words
refused() {
    local words=$1
    shift
    installed "$1" || return
    ! "$@" -fsyntax-only align.c > "$work/said" 2>&1 &&
        [ "$(grep -c ' error: ' "$work/said")" = 1 ] &&
        grep ' error: ' "$work/said" | grep -q -e "$words"
    count "must be refused: $*" $?
}

accepted() {                   # accepted COMMAND...: the compiler says nothing
    installed "$1" || return
    "$@" -Wno-unknown-pragmas -fsyntax-only align.c > "$work/said" 2>&1 && [ ! -s "$work/said" ]
    count "must be accepted: $*" $?
}

tokens() {                     # tokens COMMAND...: the program runs and says only what it has to
    [ "$(echo "a film" | "$@" 2>&1)" = "64 2646 198" ]
}

runs() {                       # runs COMMAND...: the built program starts
    installed "$1" || return
    "$@" -w align.c -o "$work/align" -lm > "$work/said" 2>&1 &&
        tokens "$work/align" tokenize --tokenizer tokenizer.bin
    count "must run: $*" $?
}

# stops WORDS COMMAND...: it ends at once with one line that has the words
stops() {
    local words=$1
    shift
    installed "$1" || return
    "$@" -w align.c -o "$work/align" -lm > "$work/said" 2>&1 &&
        ! "$work/align" glossary > "$work/said" 2>&1 &&
        [ "$(wc -l < "$work/said")" = 1 ] && grep -q "this build is not right: $words" "$work/said"
    count "must end with \"$words\": $*" $?
}

# 1. Flags that change arithmetic. Of some clang tells nothing when it compiles; the program does
#    when it starts.
for flags in -Ofast -ffast-math "-O2 -ffinite-math-only"; do
    for compiler in gcc clang; do refused "leave out -Ofast" $compiler $flags; done
done
refused "leave out -Ofast" gcc -funsafe-math-optimizations
refused "leave out -Ofast" gcc -fassociative-math -fno-signed-zeros -fno-trapping-math
stops "the order of additions is changed" clang -O2 -funsafe-math-optimizations
stops "the order of additions is changed" clang -O2 -fassociative-math -fno-signed-zeros
stops "NaN or infinity pass for numbers" clang -O2 -fno-honor-nans
stops "NaN or infinity pass for numbers" clang -O2 -fno-honor-infinities
stops "numbers below 1.2e-38 become 0" gcc -O1 -Ofast -fno-fast-math
for compiler in gcc clang; do
    for flags in -O0 "-O3 -march=native" "-O2 -ffp-contract=fast" \
        "-O2 -std=c11 -ffp-contract=off"; do
        accepted $compiler $flags -fopenmp
    done
    runs $compiler -O2 -ffp-contract=fast -march=native -fopenmp
done
accepted gcc -mavx512fp16                        # FLT_EVAL_METHOD is 16 there: floats stay floats

# 2. Machines.
refused "add -msse2 -mfpmath=sse" gcc -mfpmath=387
refused "add -msse2 -mfpmath=sse" i686-linux-gnu-gcc
refused "add -msse2 -mfpmath=sse" i686-linux-gnu-gcc -msse -mfpmath=sse
refused "stores the lowest byte first" s390x-linux-gnu-gcc
accepted i686-linux-gnu-gcc -msse2 -mfpmath=sse
accepted aarch64-linux-gnu-gcc

# 3. Threads that fail at the same moment end the program once. Whatever exit() still does takes
#    time here.
cat > "$work/die.c" <<'C'
#define ALIGN_NO_MAIN
#include "align.c"
static void linger(void) { usleep(200000); }
int main(void) {
    atexit(linger);
    #pragma omp parallel
    die("a thread fails");
}
C
for compiler in gcc clang; do
    installed $compiler || continue
    $compiler -O1 -w -fopenmp -I. "$work/die.c" -o "$work/die" -lm > "$work/said" 2>&1
    OMP_NUM_THREADS=8 timeout 60 "$work/die" > "$work/said" 2>&1
    [ $? = 1 ] && [ "$(cat "$work/said")" = "align: a thread fails" ]
    count "8 threads that fail at once say one line: $compiler" $?
done

# 4. The program that takes care of how long OpenMP's threads spin is still the one that was
#    started: its name, its arguments, its files; valgrind and a loader run it; a debugger sees main
#    once; the runtime complains once.
unset GOMP_SPINCOUNT OMP_WAIT_POLICY KMP_BLOCKTIME
cp tokenizer.bin "$work"
for compiler in gcc clang; do
    installed $compiler || continue
    $compiler -O1 -g -w -fopenmp align.c -o "$work/align" -lm || continue
    ln -sf align "$work/another"
    for name in align another; do
        mkfifo "$work/fifo"
        (exec -a zero "$work/$name" tokenize "$work/fifo" > "$work/said" 2>&1) &
        started=$!
        exec 3> "$work/fifo"
        seen="$(cat /proc/$started/comm) $(tr '\0' ' ' < /proc/$started/cmdline)"
        echo "a film" >&3
        exec 3>&-
        wait $started && [ "$seen" = "$name zero tokenize $work/fifo " ] &&
            [ "$(cat "$work/said")" = "64 2646 198" ]
        count "$compiler: ps knows it as $name: $seen" $?
        rm "$work/fifo"
    done
    PATH=$work:$PATH tokens align tokenize
    count "$compiler: found along PATH" $?
    tokens env -i "$work/align" tokenize
    count "$compiler: without an environment" $?
    loader=$(ls /lib64/ld-linux-x86-64.so.2 /lib/ld-linux-aarch64.so.1 2> /dev/null | head -n 1)
    if installed "${loader:-ld-linux}"; then
        (cd / && tokens "$loader" "$work/align" tokenize)
        count "$compiler: by its loader" $?
    fi
    if installed valgrind; then
        echo "a film" | valgrind "$work/align" tokenize > "$work/said" 2>&1
        [ $? = 0 ] && grep -q "^64 2646 198$" "$work/said" &&
            grep -q "ERROR SUMMARY: 0 errors" "$work/said"
        count "$compiler: under valgrind" $?
    fi
    # clang's is not started again, and the line that it breaks at is in a loop
    if [ $compiler = gcc ] && installed gdb; then
        DEBUGINFOD_URLS= gdb -batch -nx -ex "break main" -ex run -ex continue \
            --args "$work/align" glossary KL > "$work/said" 2>&1
        [ "$(grep -c "^Breakpoint 1, main" "$work/said")" = 1 ] &&
            grep -q "exited normally" "$work/said"
        count "$compiler: gdb stops in main once" $?
    fi
    echo "a film" | OMP_SCHEDULE=nonsense "$work/align" tokenize > "$work/said" 2>&1
    [ "$(grep -ci "OMP_SCHEDULE" "$work/said")" -le 1 ] && grep -q "^64 2646 198$" "$work/said"
    count "$compiler: one complaint of a bad OMP_SCHEDULE" $?
done

# 5. It does so where it can: a thread that waits in gcc's OpenMP goes to sleep soon.
cat > "$work/spin.c" <<'C'
#define ALIGN_NO_MAIN
#include "align.c"
int main(void) { puts(getenv("GOMP_SPINCOUNT") ? getenv("GOMP_SPINCOUNT") : "none"); }
C
for more in "" -static -static-pie -flto "-ffunction-sections -Wl,--gc-sections"; do
    flags="-fopenmp${more:+ $more}"
    gcc -O0 -w $flags -I. "$work/spin.c" -o "$work/spin" -lm > "$work/said" 2>&1
    [ "$("$work/spin")" = 4000 ] && [ "$(GOMP_SPINCOUNT=7 "$work/spin")" = 7 ] &&
        [ "$(OMP_WAIT_POLICY=active "$work/spin")" = none ]
    count "spins briefly unless told otherwise: gcc $flags" $?
done

totals="$passed passed, $failed failed"
[ $skipped = 0 ] || totals="$totals, $skipped skipped"
echo "$totals"
[ $failed = 0 ] && [ $passed -gt 0 ]
