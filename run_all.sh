#!/usr/bin/env bash
# Sets up, runs every notebook at one scale, builds results/index.html. `./run_all.sh test` runs the
# checks. See --help.
# Keeps to bash 3.2, which is what macOS has.
set -euo pipefail

caller=$PWD
CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD
# `import model` finds this copy, whatever else is installed
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

usage() {
  cat <<'HELP'
./run_all.sh [options]    run the notebooks, write results/ and results/index.html
./run_all.sh figure NAME [options]    this notebook's figures alone, training only what they need
./run_all.sh test         ruff, the tests, and every notebook at its committed settings (nbval)

  --scale NAME      smoke, laptop (default), gpu-hour, gpt2-small, gpt2-medium, gpt2-large
  --only NOTEBOOK   only this one, e.g. lr_sweep; may be repeated
  -p NAME VALUE     a parameter, e.g. -p lrs 6e-4,6e-3, for those of the notebooks that have it; may
                    be repeated. Other parameters have a results folder of their own.
  --results DIR     where to write (default: results/ in the project, at other scales than laptop
                    results/scale-NAME)
  --jobs N          runs trained at a time, sharing the cores (default: one per core; one per GPU)
  --force           also redo finished notebooks
  --list            print one command per notebook and run nothing:
                      ./run_all.sh --list | tr '\n' '\0' | xargs -0 -n 1 -P 4 bash -c
                      bash -c "$(./run_all.sh --list | sed -n "${SLURM_ARRAY_TASK_ID}p")"
  --help            this text

At the paper's scales (gpt2-...) `figure` keeps only the checkpoints that the notebook's averages
need: it gives -p disk_budget 0. With -p disk_budget GB a run keeps as many more as fit. What does
not fit disk or memory is refused before it trains; -p force True trains all the same.

lr_sweep comes first, and the page is renewed after every notebook. Works in the active virtual or
conda environment, else in .venv, which it makes. A notebook is redone only when it, the code, the
corpus, the scale or its parameters changed. Ctrl-C loses at most the notebook in flight, and its
training resumes next time.
Exit status: 0 all well, 1 something failed, 2 bad usage, 130 interrupted.
HELP
}

fail() { # fail STATUS MESSAGE
  echo "error: $2" >&2
  exit "$1"
}

hash256() {
  if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

# --- environment and corpus ---

make_venv() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    "$python" -m venv .venv ||
      fail 1 "$python -m venv failed (Debian and Ubuntu: apt install python3-venv)"
    return
  done
  python=$(python3 --version 2>&1 || true)
  fail 1 "Python 3.11 or newer is needed, found $python; activate an environment with it"
}

# Does the environment hold what pyproject.toml asks for? One that somebody activated is then left
# as it is: its torch may have been built for their machine.
satisfied() {
  python3 - "$1" 2>/dev/null <<'PY'
import sys, tomllib
from importlib.metadata import version
from packaging.requirements import Requirement
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
more = sum(extras.values(), []) if sys.argv[1] == "test" else extras["notebooks"]
wanted = project["dependencies"] + more
wanted = [r for r in map(Requirement, wanted) if r.name != project["name"]]
sys.exit(not all(r.specifier.contains(version(r.name), prereleases=True) for r in wanted))
PY
}

# setup EXTRA: leaves an environment with that extra on PATH, and the default corpus under data/
setup() {
  local extra=$1 active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} key
  local env=${active:-$root/.venv}
  [[ -n $active || -x $env/bin/pip ]] || make_venv
  export PATH="$env/bin:$PATH"
  key=$(cat pyproject.toml constraints.txt | hash256)
  if ! grep -qsx "$extra $key" "$env/.lawa-lab" &&
    ! { [[ -n $active ]] && satisfied "$extra"; }; then
    echo "installing into $env (minutes, once)"
    python3 -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extra]" \
      </dev/null ||
      fail 1 "pip could not install .[$extra] into $env; its message is above"
    { # test includes notebooks
      [[ $extra == test ]] && echo "notebooks $key"
      echo "$extra $key"
    } >"$env/.lawa-lab"
  fi
  python3 data/stdlib/prepare.py </dev/null ||
    fail 1 "data/stdlib/prepare.py failed; its message is above"
}

# The jobs of a Slurm array start together: one sets up while the others wait (where there is no
# flock, they do not).
locked_setup() {
  if command -v flock >/dev/null; then flock 9 || true; fi
  setup "$1" 9>&-
} 9<>run_all.sh

# --- test ---

# Tests run on two workers, a file each at a time, since they share fixtures; notebooks use all
# cores by themselves.
run_tests() {
  local status=0
  python3 -m ruff check . </dev/null || status=1
  python3 -m pytest -n 2 --dist loadfile tests/ </dev/null || status=1
  python3 -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 notebooks/ \
    </dev/null || status=1
  return $status
}

# --- notebooks ---

# first what the others stand on; notebooks that are not listed come last
order='lr_sweep spacing_ablation averaging_baselines blend budget annealing model_size loss_spikes
  batch_and_rate pythia_replay'

has_parameter() { # has_parameter NOTEBOOK NAME
  grep -q "^ *\"$2: " "notebooks/$1.ipynb"
}

parameters_of() { # sets `options` to those of -p that a notebook has, "-p NAME VALUE ..."
  local i
  options=()
  for ((i = 0; i < ${#given[@]}; i += 2)); do
    if has_parameter "$1" "${given[i]}"; then
      options+=(-p "${given[i]}" "${given[i + 1]}")
    fi
  done
}

# folder_of NAME: what Lab calls the folder of its results with those parameters
folder_of() {
  if ((${#options[@]} == 0)); then
    echo "$1"
    return
  fi
  python3 - "$1" "${options[@]}" <<'PY'
import sys
from lab import results_name

def value(text):  # as papermill reads it
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False, "None": None}.get(text, text)

name, *words = sys.argv[1:]
print(results_name(name, dict(zip(words[1::3], map(value, words[2::3])))))
PY
}

# stamp_of NAME: what its result depends on: the notebook, the code (not the page's, which is built
# anew every time), the corpus, the parameters
stamp_of() {
  local code=(./*.py lab/*.py) kept=() file
  for file in "${code[@]}"; do
    [[ $file == lab/report.py ]] || kept+=("$file")
  done
  cat "notebooks/$1.ipynb" "${kept[@]}" data/stdlib/meta.json - <<<"$scale ${options[*]-}" |
    hash256
}

last_error() { # the last line of a log that names an error, else its last line
  local lines
  lines=$(sed $'s/\x1b\\[[0-9;]*m//g' "$1" | grep -v '^[[:space:]]*$') || true
  grep -E '^([A-Za-z_.]+(Error|Exception|Interrupt|Exit): .|Passed unknown)' <<<"$lines" |
    tail -n 1 | grep . || tail -n 1 <<<"$lines"
}

row() { table+=$(printf '%-28s %-7s %7s%s' "$1" "$2" "$3" "${4:+  $4}")$'\n'; }

# run_notebook NAME: adds a row to the table. papermill writes to a temporary name, so that no
# finished notebook is ever half written; it runs as a job of its own, so that Ctrl-C reaches it
# through on_signal only.
run_notebook() {
  local notebook=$1 name dir log stamp began=$SECONDS status=0
  parameters_of "$notebook"
  if ! name=$(folder_of "$notebook"); then
    row "$notebook" FAILED - "its parameters cannot be read; the message is above"
    failed=1
    return
  fi
  dir=$results/$name
  log=$dir/$name.log
  stamp=$(stamp_of "$notebook")
  if [[ -z $force && -f $dir/$name.ipynb && $stamp == "$(cat "$dir/.stamp" 2>/dev/null)" ]]; then
    row "$name" cached -
    return
  fi
  mkdir -p "$dir"
  rm -f "$dir/.stamp"
  partial=$dir/$name.partial.ipynb
  set -m
  python3 -m papermill "notebooks/$notebook.ipynb" "$partial" -p scale "$scale" \
    -p out "$results" ${options[@]+"${options[@]}"} -k python3 --no-progress-bar \
    --log-level WARNING --stdout-file - --stderr-file - </dev/null 2>"$log" &
  child=$!
  set +m
  wait $child || status=$?
  child=''
  # of a parameter that the notebook does not have papermill only warns: it would have run at
  # another scale
  if ((status == 0)) && ! grep -q 'Passed unknown parameter: scale' "$log"; then
    mv "$partial" "$dir/$name.ipynb"
    rm -f "$dir/$name.failed.ipynb" "$log"
    # only for reading
    python3 -m nbconvert --to html --log-level ERROR "$dir/$name.ipynb" </dev/null || true
    echo "$stamp" >"$dir/.stamp"
    row "$name" "done" $((SECONDS - began))
    page
    return
  fi
  failed=1
  row "$name" FAILED $((SECONDS - began)) "$(last_error "$log")"
  if [[ -f $partial ]]; then
    mv "$partial" "$dir/$name.failed.ipynb" && log=$dir/$name.failed.ipynb
  fi
  table+="  see $log"$'\n'
  page
}

page() { # the page so far
  python3 -m lab.report "$results" >/dev/null 2>&1 </dev/null || true
}

finish() { # the table and the page, also after Ctrl-C
  printf '\n%-28s %-7s %7s\n%s\n' notebook status seconds "$table"
  python3 -m lab.report "$results" >/dev/null && echo "open $results/index.html"
}

# shellcheck disable=SC2317 # reached by trap
on_signal() { # on_signal EXIT_STATUS
  trap '' INT TERM HUP
  if [[ -n $child ]]; then
    kill -INT -- "-$child" 2>/dev/null || true
    wait "$child" || true
    rm -f "$partial" "${partial%.partial.ipynb}.log"
    row "$(basename "$partial" .partial.ipynb)" stopped -
  fi
  finish || true
  echo "interrupted: the same command goes on from here" >&2
  exit "$1"
}

# --- command line ---

scale=laptop results='' force='' list='' figure='' only=() given=() options=()
names=() table='' failed=0 child='' partial=''
trap 'exit 130' INT

if [[ ${1:-} == test ]]; then
  [[ $# -eq 1 ]] || fail 2 "test takes no options, got '$2'; see ./run_all.sh --help"
  locked_setup test
  run_tests
  exit
fi

if [[ ${1:-} == figure ]]; then
  [[ -n ${2:-} && $2 != -* ]] || fail 2 "figure needs a notebook; see ./run_all.sh --help"
  figure=1 only=("$(basename "$2" .ipynb)")
  shift 2
fi

while (($#)); do
  case $1 in
    -p)
      [[ ${2:-} =~ ^[A-Za-z_][A-Za-z_0-9]*$ && $# -ge 3 ]] ||
        fail 2 "-p needs a name and a value; see ./run_all.sh --help"
      [[ $2 != scale && $2 != out ]] || fail 2 "-p $2: use --scale and --results"
      ;;
    --scale | --only | --results | --jobs)
      [[ -n ${2:-} && $2 != -* ]] || fail 2 "$1 needs a value; see ./run_all.sh --help"
      ;;
  esac
  case $1 in
    -p) given+=("$2" "$3") && shift 2 ;;
    --scale) scale=$2 && shift ;;
    --only) only+=("$(basename "$2" .ipynb)") && shift ;;
    --results) if [[ $2 == /* ]]; then results=$2; else results=$caller/$2; fi && shift ;;
    --jobs)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || fail 2 "--jobs must be a whole number of at least 1, got '$2'"
      export LAWA_JOBS=$2 && shift ;;
    --force) force=' --force' ;;
    --list) list=1 ;;
    --help | -h) usage && exit ;;
    *) fail 2 "unknown option '$1'; see ./run_all.sh --help" ;;
  esac
  shift
done

if [[ -z $results ]]; then
  results=$root/results
  [[ $scale == laptop ]] || results+=/scale-$scale
fi
for name in $order; do
  [[ -f notebooks/$name.ipynb ]] && names+=("$name")
done
for notebook in notebooks/*.ipynb; do
  name=$(basename "$notebook" .ipynb)
  [[ -f $notebook && " ${names[*]-} " != *" $name "* ]] && names+=("$name")
done
((${#names[@]})) || fail 2 "no notebooks in $root/notebooks"
for name in ${only[@]+"${only[@]}"}; do
  [[ -f notebooks/$name.ipynb ]] || fail 2 "no notebook '$name'; there are: ${names[*]}"
done
((${#only[@]})) && names=("${only[@]}")

if [[ -n $figure && $scale == gpt2-* && " ${given[*]-} " != *" disk_budget "* ]] &&
  has_parameter "${names[0]}" disk_budget; then
  given+=(disk_budget 0)
fi
for ((i = 0; i < ${#given[@]}; i += 2)); do
  for name in "${names[@]}"; do
    ! has_parameter "$name" "${given[i]}" || continue 2
  done
  fail 2 "-p ${given[i]}: no such parameter in ${names[*]}"
done

if [[ -n $list ]]; then
  for name in "${names[@]}"; do
    parameters_of "$name"
    printf '%q --scale %q --results %q --only %q%s%s' "$root/run_all.sh" "$scale" "$results" \
      "$name" "$force" "${LAWA_JOBS:+ --jobs $LAWA_JOBS}"
    ((${#options[@]} == 0)) || printf ' %q' "${options[@]}"
    echo
  done
  exit
fi

locked_setup notebooks
mkdir -p "$results"
trap 'on_signal 130' INT
trap 'on_signal 143' TERM HUP
for i in "${!names[@]}"; do
  echo "== ${names[i]} ($((i + 1)) of ${#names[@]}, scale $scale)"
  run_notebook "${names[i]}"
done
finish || failed=1
exit $failed
