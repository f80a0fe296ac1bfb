#!/usr/bin/env bash
# Checks and measures an accelerator in one call of at most nine minutes.
#
#   benchmarks/accelerator.sh [--quick] [--seconds=540] [--parts=PART,...] FOLDER
#
# The most valuable part comes first. Each has a process of its own and its share
# of the time; the others go on if it fails or takes longer, and a part without
# time left is skipped. FOLDER ($OUT by default) gets a JSON file from each part,
# the trace of a step, and log.txt: for each part a line with its outcome, its
# tables, and the last lines of its standard error.
#
# Needs JAX, Flax, optax, Orbax and PyTorch, and no network. ml_collections may
# be a wheel in the folder wheels/ instead. Python is $PYTHON, or python3.
set -u

usage() {
  echo "error: $1; usage: benchmarks/accelerator.sh [--quick]" \
    "[--seconds=540] [--parts=PART,...] FOLDER" >&2
  exit 2
}

all=train_step,end_to_end,large_batch,whole_large,checks,profile,population
quick=() seconds=540 parts=$all folder=${OUT:-}
for argument; do
  case $argument in
    --quick) quick=(--quick) ;;
    --seconds=*) seconds=${argument#*=} ;;
    --parts=*) parts=${argument#*=} ;;
    -*) usage "no flag is called $argument" ;;
    *) folder=$argument ;;
  esac
done
[ -n "$folder" ] || usage 'no folder is given'
[[ $seconds =~ ^[1-9][0-9]*$ ]] || usage "--seconds=$seconds is no number"
for part in ${parts//,/ }; do
  [[ ,$all, == *,$part,* ]] || usage "no part is called $part; parts: $all"
done
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
if ! "$python" -c 'import ml_collections' 2> /dev/null; then
  wheel=$(compgen -G "$PWD/wheels/ml_collections-*.whl" | tail -n 1)
  if [ -z "$wheel" ]; then
    echo "error: neither $python nor wheels/ has ml_collections; pip" \
      'download --no-deps --dest=wheels ml-collections' >&2
    exit 2
  fi
  # Python imports from a wheel as it is.
  export PYTHONPATH=$wheel${PYTHONPATH:+:$PYTHONPATH}
fi

log=$folder/log.txt
output=$(mktemp -d)
trap 'rm -rf "$output"' EXIT
status=0
# A part that has less time is skipped.
least=20
[ ${#quick[@]} = 0 ] || least=1

# Runs a part, for at most a number of 540 seconds.
measure() {  # PART SECONDS SCRIPT FLAG...
  local part=$1 limit=$(($2 * seconds / 540)) script=$3
  shift 3
  [[ ,$parts, == *,$part,* ]] || return
  local left=$((seconds - SECONDS)) start=$SECONDS outcome
  rm -f "$folder/$part.json"
  : > "$output/stdout"
  : > "$output/stderr"
  if ((left < least)); then
    outcome="skipped, as $((left > 0 ? left : 0)) s were left"
  else
    limit=$((limit < left ? limit : left))
    limit=$((limit < least ? least : limit))
    timeout --kill-after=5 $limit \
      "$python" "benchmarks/$script.py" "${quick[@]}" "$@" \
      --output="$folder/$part.json" > "$output/stdout" 2> "$output/stderr"
    local code=$? after=$((SECONDS - start))
    if ((code == 0)); then
      outcome="done after $after s"
    elif ((code == 124 || code == 137 && after >= limit)); then
      outcome="ended after $after s, as it took too long"
    else
      outcome="failed after $after s with exit status $code"
    fi
  fi
  [[ $outcome == done* ]] || status=1
  { echo "=== $part: $outcome" && cat "$output/stdout" \
    && tail -n 40 "$output/stderr"; } | tee -a "$log"
}

# PyTorch's default, and the variants that can be its fastest. Each compiles for
# up to a minute, so the large batch has fewer.
fastest='bf16 channels-last compiled graph'
variants=(--torch_variants="eager,TF32 channels-last graph,bf16 channels-last graph,$fastest")
large=(--torch_variants="eager,$fastest")
[ ${#quick[@]} = 0 ] || variants=() large=()
step=(train_step --without_plain --rounds=5 --seconds=0.7)
loop=(end_to_end --loop_only --cache=device --epochs=3)

measure train_step 130 "${step[@]}" --batch_sizes=64 "${variants[@]}"
measure end_to_end 60 "${loop[@]}"
measure large_batch 110 "${step[@]}" --batch_sizes=1024 "${large[@]}"
measure whole_large 60 "${loop[@]}" --batch_size=1024 --dtype=bfloat16
measure checks 120 accelerator_checks
measure profile 40 profile_step --batch_sizes=64
measure population 60 population --rounds=3 --seconds=1
exit $status
