#!/usr/bin/env bash
# fuzz.sh [EXECUTIONS [READER...]]: gives each reader of align.c (docs/tools/fuzz.c says how and
# which) so many broken inputs, 1000 if not said, and prints a table. With clang and its libFuzzer
# mutation follows coverage; else it is blind. SEED=N: another run. Inputs that end in a finding
# stay in fuzz-findings/. Ends with 'N passed, N failed', exit 1 on failure.
set -u
cd "$(dirname "$0")/../.."
executions=${1:-1000}
shift
work=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)/fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT

build() {                      # build COMPILER FLAGS...
    "$@" -g -O1 -fno-sanitize-recover=undefined docs/tools/fuzz.c -o "$work/fuzz" -lm \
        2> "$work/build"
}

if build clang -DLIBFUZZER -fsanitize=fuzzer,address,undefined; then
    echo "guided by coverage (libFuzzer), seed ${SEED:-1}"
elif build ${CC:-cc} -fsanitize=address,undefined; then
    echo "no libFuzzer here: blind mutation, seed ${SEED:-1}"
else
    cat "$work/build"
    exit 1
fi
[ $# -gt 0 ] || set -- $("$work/fuzz" 2>&1)
passed=0 failed=0
limits="-max_len=16384 -len_control=0 -timeout=20 -malloc_limit_mb=256 -rss_limit_mb=4096"
numbers='\([0-9]*\) executions, \([0-9]*\) refused, slowest \([0-9.]*\) ms, most memory \([0-9]*\)'
printf '%-16s%11s%8s%10s%10s%9s%12s%13s%10s\n' \
    reader executions edges features refused seconds "slowest ms" "memory KB" findings
for reader in "$@"; do
    mkdir -p "$work/$reader" "$work/found"
    begin=$(date +%s.%N)
    TMPDIR="$work/$reader" "$work/fuzz" "$reader" "-runs=$executions" "-seed=${SEED:-1}" $limits \
        "-artifact_prefix=$work/found/$reader-" -verbosity=1 > "$work/log" 2>&1
    status=$?
    seconds=$(echo "$begin $(date +%s.%N)" | awk '{ printf "%.1f", $2 - $1 }')
    coverage=$(grep -ao 'cov: [0-9]* ft: [0-9]*' "$work/log" | tail -n 1 | awk '{ print $2, $4 }')
    totals=$(grep -a '^fuzz: .* executions' "$work/log" | tail -n 1 |
        sed "s/.*: $numbers.*/\1 \2 \3 \4/")
    findings=$((status != 0))
    failed=$((failed + findings))
    passed=$((passed + 1 - findings))
    echo "$reader $seconds $findings ${coverage:-- -} ${totals:-? 0 ? 0}" | awk '{
        refused = $6 > 0 ? 100 * $7 / $6 : 0
        printf "%-16s%11s%8s%10s%9.1f%%%9s%12s%13.0f%10s\n",
            $1, $6, $4, $5, refused, $2, $8, $9 / 1024, $3 }'
    if [ $status != 0 ]; then
        grep -aE 'FINDING|ERROR|runtime error|align.c:' "$work/log" | head -n 12
        mkdir -p fuzz-findings
        cp -r "$work/found/." "$work/$reader"/fuzz-*/fuzzed fuzz-findings/ 2> /dev/null
    fi
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
