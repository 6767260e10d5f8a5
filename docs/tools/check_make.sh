#!/usr/bin/env bash
# The Makefile: whose flags count, and where `make install` puts things.
#     docs/tools/check_make.sh
# In a copy, with a program of a few lines in align.c's place that says how it was built. Ends with
# 'N passed, N failed'.
set -u
cd "$(dirname "$0")/../.."
work=$(mktemp -d "${TMPDIR:-/tmp}/check_make.XXXXXX")
trap 'rm -rf "$work"' EXIT
unset CC CPPFLAGS CFLAGS LDFLAGS LDLIBS OPENMP PREFIX DESTDIR MAKEFLAGS MAKELEVEL
passed=0 failed=0

expect() {                     # expect WHAT WANTED GOT
    if [ "$2" = "$3" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'FAILED %s\n   expected: %s\n   got:      %s\n' "$1" "$2" "$3"
    fi
}

# 1. What is typed, and the program that comes of it.
mkdir "$work/small" && cp Makefile "$work/small" && cat > "$work/small/align.c" <<'C'
#include <stdio.h>
int main(void) {
#ifdef _OPENMP
    printf("openmp ");
#endif
#ifdef __OPTIMIZE__
    printf("optimized ");
#endif
#ifdef WORD
    printf("word ");
#endif
}
C
# built ENVIRONMENT... -- ARGUMENTS...: what the program says that make builds with these
built() {
    local environment=()
    while [ "$1" != -- ]; do environment+=("$1"); shift; done
    shift
    rm -f "$work/small/align"
    (cd "$work/small" &&
        env "${environment[@]}" make -s "$@" > log 2>&1 && ./align || tail -n 2 log)
}
expect "nothing chosen" "cc -O3 -fopenmp align.c -o align -lm" "$(cd "$work/small" && make -n)"
expect "nothing chosen, built" "openmp optimized " "$(built --)"
expect "CFLAGS in the environment" "openmp optimized " "$(built CFLAGS="-O2 -g" --)"
expect "CFLAGS on the command line" "openmp optimized " "$(built -- CFLAGS="-O2 -g")"
expect "the user's -O counts" "openmp " "$(built CFLAGS=-O0 --)"
expect "CFLAGS without -O" "openmp optimized " "$(built CFLAGS=-g --)"
expect "CFLAGS with -fopenmp" "openmp optimized " "$(built -- CFLAGS="-O3 -fopenmp -Wall -Wextra")"
expect "CPPFLAGS" "openmp optimized word " "$(built CPPFLAGS=-DWORD --)"
expect "a compiler with a flag" "openmp optimized " "$(built -- CC="gcc -g")"
expect "no OpenMP by choice" "optimized " "$(built -- OPENMP=)"
expect "no OpenMP by -fno-openmp" "optimized " "$(built CFLAGS=-fno-openmp --)"
if command -v clang > /dev/null; then expect "clang" "openmp optimized " "$(built -- CC=clang)"; fi
rm -f "$work/small/align"
expect "LDFLAGS and LDLIBS" "cc -O3 -fopenmp align.c -o align -Wl,-O1 -lpthread -lm" \
    "$(cd "$work/small" && LDFLAGS=-Wl,-O1 LDLIBS=-lpthread make -n)"
cat > "$work/small/plain_cc" <<'SH' && chmod +x "$work/small/plain_cc"
#!/bin/sh
case "$*" in *-fopenmp*) exit 1;; esac
exec gcc "$@"
SH
expect "a compiler without OpenMP" "optimized " "$(built -- CC=./plain_cc)"
expect "and says so" 1 "$(grep -c "has no OpenMP: align will run on one thread" "$work/small/log")"
expect "nothing is left behind" "" "$(cd "$work/small" && ls -A |
    grep -v -x -e Makefile -e align.c -e align -e log -e plain_cc)"

# 2. Installed: found from any folder, by a link, and after the whole tree has moved.
mkdir "$work/whole" "$work/whole/docs" && cp Makefile align.c tokenizer.bin LICENSE "$work/whole" &&
    cp docs/glossary.md docs/report.html docs/reviews.jsonl docs/reviews.LICENSE.txt \
        "$work/whole/docs"
made() { make -s -C "$work/whole" PREFIX=/opt/course "$@" > "$work/log" 2>&1 || cat "$work/log"; }
made install CFLAGS=-O0 DESTDIR="$work/a stage"
rm -rf "$work/whole/tokenizer.bin" "$work/whole/docs"
mv "$work/a stage" "$work/moved"
program=$work/moved/opt/course/bin/align
ln -s "$program" "$work/link"
expect "the files" "bin/align
share/align/LICENSE
share/align/docs/glossary.md
share/align/docs/report.html
share/align/docs/reviews.LICENSE.txt
share/align/docs/reviews.jsonl
share/align/tokenizer.bin" "$(cd "$work/moved/opt/course" && find . -type f | sed 's/^..//' |
    LC_ALL=C sort)"
expect "tokenizer.bin is found" "64 2646 198" "$(cd / && echo "a film" | "$program" tokenize 2>&1)"
expect "by a link" "64 2646 198" "$(cd / && echo "a film" | "$work/link" tokenize 2>&1)"
expect "the glossary is found" 1 "$(cd / && "$program" glossary KL 2>&1 | grep -c "Kullback")"
expect "the reviews are found" 1 "$(cd / && "$program" rlhf --model_name_or_path "$work/nothing" \
    2>&1 | grep -c "^align: $work/nothing")"
mkdir "$work/run" && echo '{"log_history": []}' > "$work/run/trainer_state.json"
expect "the report's page is found" 1 "$(cd / && "$program" report "$work/run" 2> /dev/null &&
    grep -c "^{\?.*\"log_history\": \[\]" "$work/run/report.html")"
mv "$work/moved" "$work/a stage"
cp docs/glossary.md "$work/a stage/opt/course/share/align/mine.md"
made uninstall DESTDIR="$work/a stage"
expect "uninstall leaves what is not its own" "./share/align/mine.md" \
    "$(cd "$work/a stage/opt/course" && find . -type f)"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
