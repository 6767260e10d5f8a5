#!/usr/bin/env bash
# Everything that can find a fault, one after the other:
#     docs/tools/check_all.sh                    all of it (make check-all); long: fuzz.sh alone
#                                                runs 200,000 inputs a reader
#     docs/tools/check_all.sh valgrind tsan      those whose names start so
#     docs/tools/check_all.sh --list             names them
#     LONG_RUN_MINUTES=60 docs/tools/check_all.sh long_run
#     LOGS=DIR docs/tools/check_all.sh           keeps all that each of them says, DIR/NAME.log
# A row each: what, seconds, the last line it said. A tool that is not installed makes a skipped row
# that says how to get it; nothing is installed from here. Ends with 'N passed, N failed, N
# skipped'.
set -u
cd "$(dirname "$0")/../.."
work=$(mktemp -d "${TMPDIR:-/tmp}/check_all.XXXXXX")
trap 'rm -rf "$work"' EXIT
# Threads that wait sleep: under these tools, or on a busy machine, spinning starves the one they
# wait for.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}
shared=$(cd .. && pwd)/shared
logs=${LOGS:-$work}
passed=0 failed=0 skipped=0 missing=""
names=("$@")

wanted() {                     # wanted NAME: was it asked for?
    [ ${#names[@]} = 0 ] && return 0
    local n; for n in "${names[@]}"; do [[ $1 == "$n"* ]] && return 0; done
    return 1
}

check() {                      # check NAME "TOOL ..." COMMAND...: a row
    local name=$1 tools=$2 tool begin=$SECONDS; shift 2
    if [ "${names[0]:-}" = --list ]; then echo "$name"; return; fi
    wanted "$name" || return
    for tool in $tools; do
        [ -e "$tool" ] || command -v "$tool" > /dev/null && continue
        skipped=$((skipped + 1))
        missing="$missing $(package "$tool")"
        printf 'skip  %-16s        no %s: apt-get install %s\n' \
            "$name" "$tool" "$(package "$tool")"
        return
    done
    local log="$logs/$name.log"
    if "$@" > "$log" 2>&1; then
        passed=$((passed + 1))
        printf 'ok    %-16s %5d s  %s\n' "$name" $((SECONDS - begin)) "$(tail -n 1 "$log")"
    else
        failed=$((failed + 1))
        printf 'FAIL  %-16s %5d s\n' "$name" $((SECONDS - begin))
        tail -n "${LINES_SHOWN:-30}" "$log" | sed 's/^/      /'
    fi
}

package() {                    # the Debian package that a tool comes in
    case $1 in
        musl-gcc) echo musl-tools;;
        qemu-aarch64) echo qemu-user;;
        aarch64-linux-gnu-gcc) echo gcc-aarch64-linux-gnu libc6-dev-arm64-cross;;
        x86_64-w64-mingw32-gcc) echo gcc-mingw-w64-x86-64;;
        clang) echo clang libomp-dev;;
        *libarcher.so) echo libomp-dev;;
        */wine64) echo wine64;;
        *) echo "$1";;
    esac
}

build() { "$@" test_align.c -o "$work/test" -lm; }                     # build COMPILER FLAGS...
tests() { build "$@" && cp tokenizer.bin "$work" && "$work/test"; }     # and run

# Warnings: none, of either file, with and without OpenMP.
warnings() {
    local f mode said="$work/warnings"
    for f in align.c test_align.c; do
        for mode in "-O3 -fopenmp" "-O0" "-O2 -std=c11"; do
            if ! "$1" $mode -Wall -Wextra -Wshadow "$f" -o "$work/warn" -lm > "$said" 2>&1 ||
                [ -s "$said" ]; then
                cat "$said"
                return 1
            fi
        done
    done
    echo "no warning"
}
check warnings_gcc gcc warnings gcc
check warnings_clang clang warnings clang

# Compilers and optimisation levels.
for level in 0 1 2 3; do
    check gcc_O$level gcc tests gcc -O$level -fopenmp
    check clang_O$level clang tests clang -O$level -fopenmp
done
check serial gcc tests gcc -O2
check musl musl-gcc tests musl-gcc -O2 -static
# What must not be built, and how what is built starts.
check compilers "gcc clang gdb valgrind" docs/tools/check_compilers.sh
check makefile make docs/tools/check_make.sh

# Sanitizers. Frame pointers: by them the suppressed leak (thread_scratch, see test_align.c) is
# known. halt_on_error is what -fno-sanitize-recover does; leaks are looked for at the end of each
# process.
# sanitized COMPILER, in a shell of its own: what is exported ends there
sanitized() (
    export LSAN_OPTIONS=print_suppressions=0 UBSAN_OPTIONS=print_stacktrace=1
    export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1
    tests "$1" -g -O1 -fno-omit-frame-pointer -fopenmp -fsanitize=address,undefined,leak \
        -fno-sanitize-recover=all
)
for compiler in gcc clang; do
    check asan_$compiler $compiler sanitized $compiler
done

# The thread sanitizer knows pthreads. OpenMP's barriers it learns from libarcher, which comes with
# clang's libomp; gcc's libgomp has no such thing, and each of its barriers would be reported.
# ignore_noninstrumented_modules: libomp itself is not looked into. First the instrument is tried:
# it must find a race that is there, and none where there is a barrier.
archer=$(ls /usr/lib/llvm-*/lib/libarcher.so 2> /dev/null | tail -n 1)
tsan() {
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1 die_after_fork=0"
    export OMP_TOOL_LIBRARIES=$archer OMP_NUM_THREADS=4
    local flags="-g -O1 -fopenmp -fsanitize=thread"
    cat > "$work/race.c" <<'C'
#include <stdio.h>
int main(void) {
    int sum = 0, each[64] = {0};
#ifdef RACE
    #pragma omp parallel for
    for (int i = 0; i < 64; i++) sum += i;
#endif
    #pragma omp parallel for
    for (int i = 0; i < 64; i++) each[i] = i;
    #pragma omp parallel for
    for (int i = 0; i < 64; i++) each[63 - i] += 1;
    printf("%d %d\n", sum, each[0]);
    return 0;
}
C
    if ! clang $flags -DRACE "$work/race.c" -o "$work/race" || "$work/race" > /dev/null 2>&1; then
        echo "a race that is there was not found"
        return 1
    fi
    if ! clang $flags "$work/race.c" -o "$work/race" || ! "$work/race"; then
        echo "a race was found where a barrier is"
        return 1
    fi
    # `exact` trains three models, a thread for each
    tests clang $flags && clang $flags align.c -o "$work/align" -lm &&
        OMP_NUM_THREADS=3 "$work/align" exact --vocab_size 2 --max_new_tokens 1 \
            --n_layer 1 --n_head 1 --n_embd 4 --json
}
check tsan "clang ${archer:-/usr/lib/llvm-14/lib/libarcher.so}" tsan

# Memcheck, without OpenMP: libgomp never gives its threads' stacks back, which would be reported;
# threads are tsan's business. Valgrind's processor has no AVX-512, so kernel_choose and the
# loader's choice of WIDE functions take AVX2. Leaks are those of the process itself: its children
# are the tests of what ends the program, and that frees nothing.
memcheck() {
    build gcc -g -O2 && cp tokenizer.bin "$work" || return 1
    TEST_THIN=1 valgrind --quiet --error-exitcode=9 --child-silent-after-fork=yes \
        --leak-check=full --show-leak-kinds=definite,indirect,possible \
        --errors-for-leak-kinds=none "$work/test" > "$work/said" 2>&1
    local status=$?
    cat "$work/said"
    ! grep -q 'lost in loss record' "$work/said" && grep ' passed, ' "$work/said" &&
        [ $status = 0 ]
}
check valgrind "gcc valgrind" memcheck

# Static analysis. What is known and stays has its reason in docs/tools/findings.txt; what else is
# found, or no longer found, fails.

# explained TAG: findings "ID<tab>LINE<tab>MESSAGE" on stdin; those of findings.txt that are this
# tool's, TAG, match by id and a part of the line or the message.
explained() {
    awk -F '\t' -v tag="$1" '
        FILENAME == "docs/tools/findings.txt" {
            if (/^[# ]/) next      # a comment, or a reason that goes on
            split($0, f, / \| /)
            if (f[1] ~ /^-W/ ? tag != "gcc" : tag != "cppcheck") next
            id[++n] = f[1]
            part[n] = f[2]
            next
        }
        FILENAME == "align.c" { source[FNR] = $0; next }
        {
            known = 0
            for (i = 1; i <= n; i++)
                if ($1 == id[i] && index(source[$2] " " $3, part[i])) known = seen[i] = 1
            found++
            if (known) next
            bad++
            print "align.c:" $2 ": " $1 ": " $3
        }
        END {
            for (i = 1; i <= n; i++) {
                if (seen[i]) continue
                bad++
                print "docs/tools/findings.txt: not reported any more: " id[i] " | " part[i]
            }
            printf "%d findings, all explained in docs/tools/findings.txt\n", found
            exit bad > 0
        }' docs/tools/findings.txt align.c -
}
static() {
    cppcheck --quiet --std=c11 --enable=warning,performance,portability --max-configs=1 \
        --template='{id}\t{line}\t{message}' -D__GNUC__=12 -D__GLIBC__=2 -D__x86_64__=1 \
        -D__SSE2__=1 align.c > "$work/findings" 2>&1
    explained cppcheck < "$work/findings"
}
check cppcheck cppcheck static
# gcc's analyzer gives up on a file of this size before it has seen most of it, without a word. So
# it is shown a chapter at a time, the functions of the others declared only; and behind each stands
# a double free, which it must find.
planted='int planted(void) {
    char *planted = malloc(9);
    if (!planted || !fgets(planted, 9, stdin)) return 1;
    puts(planted);
    free(planted);
    free(planted);
    return 0;
}'
# chapter FROM TO: align.c with the functions of these lines, for the analyzer to begin at each
chapter() {
    awk -v from="$1" -v to="$2" '
        /^[A-Za-z_].*\) \{$/ {
            outside = FNR < from || FNR > to
            sub(/static (inline )?/, "")
            if (outside) {
                sub(/^__attribute__\(\(target\([^)]*\)\)\) |^WIDE /, "")
                sub(/ \{$/, ";")
            }
        }
        outside {
            print /;$/ && !inside ? $0 : ""
            inside = 1
            if (/^}/) outside = inside = 0
            next
        }
        { print }' align.c
    echo "$planted"
}
analyzer() {
    local starts=($(grep -n '^ \* Chapter ' align.c | cut -d : -f 1)) i
    local limits="--param analyzer-bb-explosion-factor=50"
    limits="$limits --param analyzer-max-enodes-per-program-point=32"
    local warning='^[^ ]*chapter.c:([0-9]+):.*warning: (.*) \[(-Wanalyzer[^]]*)\]$'
    rm -f "$work/found"
    for ((i = 1; i < ${#starts[@]}; i++)); do
        chapter "${starts[i]}" "${starts[i + 1]:-999999}" > "$work/chapter.c"
        if ! gcc -fanalyzer -O1 -fno-inline -fopenmp $limits -c "$work/chapter.c" \
            -o "$work/analyzed" 2> "$work/said"; then
            cat "$work/said"
            return 1
        fi
        sed -nE "s/$warning/\3\t\1\t\2/p" "$work/said" > "$work/findings"
        if ! grep -q 'double-.free.*planted' "$work/findings"; then
            echo "chapter $i: a double free that is there was not found"
            return 1
        fi
        grep -v planted "$work/findings" >> "$work/found"
    done
    sort -u "$work/found" | explained gcc
}
check fanalyzer gcc analyzer

# Other machines.
arm64() {
    build aarch64-linux-gnu-gcc -O2 -static && cp tokenizer.bin "$work" &&
        TEST_THIN=1 qemu-aarch64 "$work/test"
}
check arm64 "aarch64-linux-gnu-gcc qemu-aarch64" arm64
windows_build() {
    x86_64-w64-mingw32-gcc -O2 -fopenmp -static -Wall -Wextra -Wshadow -Werror align.c \
        -o "$work/align.exe" -lm && echo "no warning; align.exe is built"
}
check windows_build x86_64-w64-mingw32-gcc windows_build
wine=/usr/lib/wine/wine64
windows_tests() {              # those that end the program need fork() and are passed over
    local dir=$work/windows status
    build x86_64-w64-mingw32-gcc -O2 -fopenmp -static -Wall -Wextra -Werror || return 1
    mkdir -p "$dir/docs" && mv "$work/test.exe" "$dir" && cp tokenizer.bin align.c "$dir" &&
        cp docs/glossary.md docs/report.html docs/reviews.jsonl "$dir/docs" || return 1
    (cd "$dir" && TMPDIR=. TEST_THIN=1 WINEDEBUG=-all WINEPREFIX=$work/wine $wine test.exe) \
        > "$dir/said" 2>&1
    status=$?
    grep -v wine: "$dir/said" | grep -v ' passed, '
    grep ' passed, ' "$dir/said"
    [ $status = 0 ]
}
check windows_tests "x86_64-w64-mingw32-gcc $wine" windows_tests
tokenizes() {                  # tokenizes PROGRAM: does it find its tokenizer.bin?
    [ "$(echo "a film" | "$1" tokenize)" = "64 2646 198" ]
}
# No Mac is at hand. A compiler that refuses -fopenmp as Apple's does: make says so and goes on with
# one thread.
apple() {
    local dir=$work/apple
    mkdir -p "$dir/mach-o" && cp align.c tokenizer.bin Makefile "$dir" || return 1
    cat > "$dir/cc" <<'SH' && chmod +x "$dir/cc" || return 1
#!/bin/sh
for a in "$@"; do
    [ "$a" = -fopenmp ] || continue
    echo "clang: error: unsupported option '-fopenmp'" >&2
    exit 1
done
exec gcc "$@"
SH
    if ! PATH=$dir:$PATH make -C "$dir" align > "$dir/log" 2>&1 ||
        ! grep -q "brew install libomp" "$dir/log" || ldd "$dir/align" | grep -q gomp ||
        ! tokenizes "$dir/align"; then
        cat "$dir/log"
        return 1
    fi
    # Its branches in align.c, with a stand-in for the one header of macOS: the program finds its
    # files, also through a link from elsewhere.
    cat > "$dir/mach-o/dyld.h" <<'C' || return 1
static inline int _NSGetExecutablePath(char *path, uint32_t *size) {
    ssize_t n = readlink("/proc/self/exe", path, *size - 1);
    path[n > 0 ? n : 0] = 0;
    return n <= 0;
}
C
    gcc -U__linux__ -D__APPLE__ -I"$dir" -O1 -Wall -Wextra -Wshadow -Werror align.c \
        -o "$dir/align" -lm &&
        ln -s "$dir/align" "$work/linked" && (cd / && tokenizes "$work/linked") &&
        grep libomp "$dir/log"
}
check apple_cc gcc apple

# The program as a whole.
if [ ! -x align ] || [ align.c -nt align ]; then make align > /dev/null; fi
check threads python3 python3 docs/tools/check_threads.py
check resume python3 python3 docs/tools/check_resume.py
check failures python3 python3 docs/tools/check_failures.py
check fuzz clang bash docs/tools/fuzz.sh 200000
check fuzz_flags python3 python3 docs/tools/fuzz_flags.py --count 100000
[ -f "$shared/check_fidelity.py" ] && check fidelity python3 python3 "$shared/check_fidelity.py"
check long_run python3 python3 docs/tools/long_run.py "${LONG_RUN_MINUTES:-2}"

[ "${names[0]:-}" = --list ] && exit 0
[ -n "$missing" ] && missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ') &&
    echo "to run what was skipped: apt-get install $missing"
totals="$passed passed, $failed failed"
[ $skipped -gt 0 ] && totals="$totals, $skipped skipped"
echo "$totals"
[ $failed = 0 ] && [ $passed -gt 0 ]
