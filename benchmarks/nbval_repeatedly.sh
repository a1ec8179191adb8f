#!/usr/bin/env bash
# nbval of all notebooks many times in a row: a line a round, and a closing line; exit status 1 where any round failed.
#
#   benchmarks/nbval_repeatedly.sh [-b] [-j JOBS] [ROUNDS [NOTEBOOK ...]]
#
# -b keeps the machine busy meanwhile, with as many loops as it has processors. Each round has a cache of its own, since a
# cached result is not computed; downloads are kept. `make nbval` calls it in the environment that it needs.
set -uo pipefail
cd "$(dirname "$0")/.."
busy="" jobs=2
while getopts bj: option; do
    case $option in
    b) busy=yes ;;
    j) jobs=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
rounds=${1:-20}
shift $(($# > 0))
[[ $rounds =~ ^[1-9][0-9]*$ ]] || { echo "ROUNDS: got '$rounds', expected a whole number from 1" >&2; exit 2; }
[ $# -gt 0 ] || set -- notebooks

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/lib${PYTHONPATH:+:$PYTHONPATH}"
kept=$(python -c 'from compressible.runtime import paths; print(paths.cache_dir() / "data")') || exit 2
work=$(mktemp -d)
loops=()
finish() {
    [ ${#loops[@]} -eq 0 ] || kill "${loops[@]}" 2>/dev/null
    rm -rf "$work/cache" "$work/figures"
}
trap finish EXIT
if [ -n "$busy" ]; then
    for _ in $(seq "$(nproc)"); do
        while :; do :; done &
        loops+=($!)
    done
fi

mkdir -p "$kept"
failed=0
for round in $(seq "$rounds"); do
    rm -rf "$work/cache" "$work/figures"
    mkdir -p "$work/cache"
    ln -s "$kept" "$work/cache/data"
    began=$SECONDS log=$work/round-$round.txt
    COMPRESSIBLE_CACHE=$work/cache COMPRESSIBLE_FIGURES=$work/figures python -m pytest "$@" -q --nbval \
        --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-kernel-startup-timeout 180 \
        -p no:cacheprovider -n "$jobs" --dist loadfile >"$log" 2>&1
    status=$?
    echo "round $round of $rounds${busy:+, busy}: $(tail -n 1 "$log" | sed 's/ in [0-9.]*s.*//; s/=//g'), $((SECONDS - began)) s"
    if [ $status -ne 0 ]; then
        failed=$((failed + 1))
        grep -E '^(FAILED|ERROR)' "$log"
    fi
done
echo "$rounds rounds${busy:+ on a busy machine}, $failed failed, $SECONDS s in all; logs: $work"
[ "$failed" -eq 0 ]
