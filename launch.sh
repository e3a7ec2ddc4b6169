#!/usr/bin/env bash
# Make .venv from the hash-checked lock when needed, then run: here, by SLURM, on TPU VMs, or as a Kubernetes Job.
set -euo pipefail
unset CDPATH
cd -P "$(dirname "${BASH_SOURCE[0]}")"
here=$PWD dry='' vars=()

use() {
  cat <<'E'
use: ./launch.sh VERB [--dry-run] ...            --dry-run prints what would be done and does nothing
  local [-n N] experiments.NAME [--key value ...]        one process with every device, or N with one device each
  list                                                   every experiment and the first line of its docstring
  test [pytest arguments]                                the default tests, at most four at a time
  check                                                  lint, format, types, and the default tests of what changed
  setup                                                  make .venv ready and stop
  slurm [--sbatch-option=value ...] experiments.NAME [...]         one task a node; the clone on a shared file system
  tpu TPU_NAME [--gcloud-option=value ...] experiments.NAME [...]  copies this clone to every worker and runs there
  k8s [--name=fm --image=fm_jax --nodes=1 --gpus=0] experiments.NAME [...]    a manifest for kubectl apply -f -
FM_PYTHON picks the Python (>= 3.11), FM_EXTRA the wheels (cpu, cuda12, cuda13 or tpu).
This script manages .venv: it recreates it whenever the lock, pyproject.toml, the Python or the wheels change.
E
}

die() { printf 'launch: %s\n' "$1" >&2; exit "${2:-2}"; }
show() { local line; printf -v line '%q ' "$@"; printf '%s\n' "${line% }"; }
do_it() { if [[ $dry ]]; then show "$@"; else "$@"; fi; }

find_python() {  # the first Python >= 3.11 that can make an environment; the one in .venv stands for its parent
  local tried=(.venv/bin/python python3 python3.14 python3.13 python3.12 python3.11) name parent
  [[ -z ${FM_PYTHON:-} ]] || tried=("$FM_PYTHON")
  for name in "${tried[@]}"; do
    parent=$("$name" -c 'import ensurepip, os, sys, venv
assert sys.version_info >= (3, 11)
within = os.path.realpath(os.path.dirname(os.path.dirname(sys.executable))) == sys.argv[1]
print(os.path.realpath(sys._base_executable) if within else "")' "$here/.venv" 2>/dev/null) || continue
    echo "${parent:-$name}"
    return
  done
  die "found no Python >= 3.11 with venv and ensurepip among ${tried[*]}; install one (Debian: python3-venv) or set FM_PYTHON"
}

find_extra() {  # CUDA 13 needs driver 580 and GPUs of compute capability 7.5 or more, CUDA 12 driver 525
  if [[ ${FM_EXTRA:-} ]]; then
    [[ $FM_EXTRA =~ ^(cpu|cuda12|cuda13|tpu)$ ]] || die "FM_EXTRA=$FM_EXTRA is unknown; use cpu, cuda12, cuda13 or tpu"
    echo "$FM_EXTRA"
  elif nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader | awk -F, '
      { driver = $1 + 0; if (NR == 1 || $2 + 0 < capability) capability = $2 + 0 }
      END { if (driver < 525) print "launch: NVIDIA driver " driver " is older than 525; using the CPU" > "/dev/stderr"
            print (driver < 525 ? "cpu" : driver >= 580 && capability >= 7.5 ? "cuda13" : "cuda12") }'
  elif [[ -e /dev/accel0 || -e /dev/vfio/0 ]] &&  # other hardware has these too: ask for a sign of a TPU VM
    { compgen -e TPU_ || grep -s Google /sys/class/dmi/id/product_name; } >/dev/null; then
    echo tpu
  else
    echo cpu
  fi
}

setup() {
  extra=$(find_extra)
  python=$(find_python)
  local locks=(requirements.lock) pip=(.venv/bin/python -m pip --disable-pip-version-check install -qq) stamp
  [[ $extra == cpu ]] || locks+=(".lock/$extra.txt")
  # One at a time: a cluster's nodes may all come here at once.
  if [[ ! $dry ]] && command -v flock >/dev/null; then exec 9>.venv.lock; flock 9 || true; fi
  stamp="$here $extra $("$python" -c 'import sys; print(*sys.version.split())')"
  stamp+=" $(cat pyproject.toml .lock/build.txt "${locks[@]}" | cksum)"
  if [[ ! -x .venv/bin/python || $(cat .venv/launch.stamp 2>/dev/null) != "$stamp" ]]; then
    echo "launch: creating .venv ($extra) with $python; this takes a minute or two, once" >&2
    # No right stamp, no trust: begin anew. setuptools comes first, so that nothing built here fetches a build backend.
    { do_it rm -rf .venv && do_it "$python" -m venv .venv &&
      do_it "${pip[@]}" --require-hashes -r .lock/build.txt &&
      do_it "${pip[@]}" --require-hashes --no-build-isolation "${locks[@]/#/--requirement=}" &&
      do_it "${pip[@]}" --no-deps --no-build-isolation -e .; } ||
      die "the setup failed, see above; fix the cause and run again (FM_PYTHON chooses another Python)" 5
    [[ $dry ]] || printf '%s\n' "$stamp" >.venv/launch.stamp
  fi
  exec 9>&-
  [[ $extra == cuda* ]] || return 0  # what follows goes to the run, beside what the user has set
  local flag=xla_gpu_enable_latency_hiding_scheduler  # an XLA flag that does not exist would end the process
  [[ ${XLA_FLAGS:-} == *$flag* ]] || vars+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--$flag=true")
  vars+=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.9}")
}

experiments() {  # experiments [NAME]: the files of all experiments, or of those so named, the nearest to the top first; _NAME.py is a part of some
  find experiments -name "${1:-*}.py" ! -name '_*' | LC_ALL=C sort | awk -F/ '
    { lines[NR] = $0; depth[NR] = NF; if (NF > most) most = NF }
    END { for (d = 1; d <= most; d++) for (i = 1; i <= NR; i++) if (depth[i] == d) print lines[i] }'
}

list() {  # needs no environment: the first line of a module is the first of its docstring
  local file name
  while read -r file; do
    name=${file%.py}
    printf '%-46s %s\n' "${name//\//.}" "$(sed -n '1{s/^[rR]*"""//;s/"""[[:space:]]*$//;p;}' "$file")"
  done < <(experiments)
}

install_tools() {  # ruff and mypy at the locked versions, where .venv lacks them
  local tool have
  for tool in ruff mypy; do
    have=$(".venv/bin/$tool" --version 2>/dev/null) || have=''
    have=${have#"$tool "}
    grep -q "^$tool==${have%% *} " .lock/dev.txt && continue
    do_it .venv/bin/python -m pip --disable-pip-version-check install -qq --require-hashes --no-build-isolation \
      -r requirements.lock -r .lock/dev.txt || die "ruff and mypy could not be installed, see above" 5
    return
  done
}

changed_files() {  # files that differ from the commit where this branch left main, and files that are not in git yet
  local start=HEAD main
  git rev-parse -q --verify HEAD >/dev/null || die "check asks git what changed, but this is not a git repository" 2
  for main in main origin/main; do
    if git rev-parse -q --verify "$main" >/dev/null; then start=$(git merge-base HEAD "$main"); break; fi
  done
  git diff --name-only --no-renames "$start"
  git ls-files --others --exclude-standard
}

tests_of() {  # tests_of FILE: its own test, or the tests of the nearest folder: tests/ has the tree of fm_jax/
  local file=$1 name=${1##*/} folder=${1#fm_jax/} nearest=''
  case $file in
    *.md) echo tests/test_readme.py; return ;;
    .github/* | *.cff | .pre-commit-config.yaml) echo tests/test_project.py; return ;;
    launch.sh | pyproject.toml | requirements.lock | .lock/* | .ci/*)
      echo tests/test_launch.py; return ;;
    tests/*test_*.py) [[ ! -e $file ]] || echo "$file"; return ;;
    *.py) ;;
    *) return ;;
  esac
  [[ $file != fm_jax/models/* ]] || echo tests/test_every_model.py
  folder=/${folder#tests/}
  while [[ $folder ]]; do
    folder=${folder%/*}
    if [[ -e tests$folder/test_$name ]]; then echo "tests$folder/test_$name"; return; fi
    if [[ ! $nearest && -d tests$folder ]]; then nearest=tests$folder; fi
  done
  echo "$nearest"
}

run_check() {
  local files file tests=(tests/test_floors.py)
  files=$(changed_files)
  setup
  install_tools
  do_it .venv/bin/ruff check .
  do_it .venv/bin/ruff format --check .
  do_it .venv/bin/mypy
  while read -r file; do tests+=("$file"); done < <(while read -r file; do tests_of "$file"; done <<<"$files" | sort -u)
  do_it exec .venv/bin/python -m pytest "${tests[@]}"
}

check_module() {
  local path=${1:-} moved
  path=${path//.//}.py
  [[ ${1:-} =~ ^experiments(\.[A-Za-z0-9_]+)+$ ]] || { use >&2; die "expected experiments.NAME, got '${1:-}'"; }
  [[ ! -e $path ]] || return 0
  moved=$(experiments "${1##*.}")  # a name is used once, in whichever folder
  moved=${moved%.py}
  [[ ! $moved ]] || die "$1 has moved; use ${moved//\//.}"
  die "no such experiment: $path; run ./launch.sh list to see all"
}

wait_all() {  # wait_all PID...: the first failure ends the rest, TERM and after FM_GRACE seconds KILL, and is returned
  local pids=("$@") left pid code first=0 killed='' told='' deadline=''
  trap 'told=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT HUP
  while ((${#pids[@]})); do
    left=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then left+=("$pid"); continue; fi
      code=0; wait "$pid" || code=$?
      # 143: TERM came while Python was still starting, when there is nothing to save.
      [[ ! $told || $code != 143 ]] || code=75
      # Ended by a signal that is not ours (9: memory ran out; 6: the runtime missed a peer). What the others make of
      # it depends on who finds out first, so it counts for all.
      [[ $told ]] || ((code <= 128)) || killed=${killed:-$((code - 128))}
      ((first)) || first=$code
    done
    pids=(${left[@]+"${left[@]}"})
    if ((first)) && [[ ! $deadline ]]; then
      deadline=$((SECONDS + ${FM_GRACE:-10}))
      # 75 is "told to stop, and saved": the others are leaving too, and a second TERM would cut their saving short.
      if ((first != 75)) && [[ ! $told ]]; then told=1; kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true; fi
    fi
    if [[ $deadline ]] && ((SECONDS > deadline && ${#pids[@]})); then told=1; kill -KILL "${pids[@]}" 2>/dev/null || true; fi
    sleep 0.1 || true  # a signal to the whole process group ends this one too
  done
  [[ ! $killed ]] || die "signal $killed ended a process, and so the run; run the same command again to continue" 75
  return "$first"
}

run_local() {
  local n='' i pids=() command port
  if [[ ${1:-} == -n ]]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "-n needs a number of processes, got '${2:-}'"
    n=$2
    shift 2
  fi
  (($#)) || { list; return; }
  check_module "$@"
  setup
  [[ $n ]] || { do_it exec env ${vars[@]+"${vars[@]}"} .venv/bin/python -m "$@"; return; }
  port=$("$python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
  vars+=("FM_COORDINATOR_ADDRESS=127.0.0.1:$port" "FM_NUM_PROCESSES=$n")
  for ((i = 0; i < n; i++)); do
    # One device a process: two CPU devices a process can deadlock gloo in JAX 0.10 and 0.11.
    if [[ $extra == cuda* ]]; then one=FM_LOCAL_DEVICE_IDS=$i; else one=JAX_NUM_CPU_DEVICES=1; fi
    command=(env "${vars[@]}" "FM_PROCESS_ID=$i" "$one" .venv/bin/python -m "$@")
    if [[ $dry ]]; then show "${command[@]}"; continue; fi
    # A process group of its own: a signal to the launcher's group must reach a run once, by way of the launcher. A
    # second one means "at once".
    set -m
    "${command[@]}" & pids+=($!)
    set +m
  done
  [[ $dry ]] || wait_all "${pids[@]}"
}

slurm_script() {  # fm_jax reads each task's place among the others from SLURM itself
  cat <<E
#!/usr/bin/env bash
#SBATCH --job-name=${1##*.} --ntasks-per-node=1 --requeue --open-mode=append
#SBATCH --signal=TERM@120 --output=runs/slurm/%x-%j.out
set -euo pipefail
cd $(show "$here")
run=($(show ./launch.sh local "$@"))
E
  cat <<'E'
trap : TERM  # the signal is for the runs; these shells get it too, and wait
./launch.sh setup
export saved=runs/slurm/$SLURM_JOB_ID.saved
rm -f "$saved"
# 75 says "told to stop, and saved". To srun that is a good exit, or it would kill the tasks that are still saving.
srun --kill-on-bad-exit=1 --label bash -c 'trap : TERM
  "$@" || { code=$?; [[ $code == 75 ]] && touch "$saved" || exit "$code"; }' fm "${run[@]}"
[[ ! -e $saved ]] || scontrol requeue "$SLURM_JOB_ID"
E
}

run_slurm() {
  local options=() script
  while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
  check_module "$@"
  script=runs/slurm/${1##*.}.sbatch
  if [[ $dry ]]; then slurm_script "$@"; else mkdir -p runs/slurm; slurm_script "$@" >"$script"; fi
  do_it sbatch ${options[@]+"${options[@]}"} "$script"
}

run_tpu() {
  local name=${1:-} options=(--worker=all) tpu=(gcloud compute tpus tpu-vm) remote='mkdir -p fm_jax && cd fm_jax &&'
  [[ $name && $name != -* && $name != experiments.* ]] || { use >&2; die "expected the TPU's name, got '$name'"; }
  shift
  while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
  check_module "$@"
  do_it mkdir -p runs
  do_it tar -czf runs/clone.tgz --exclude=./.git --exclude='./.venv*' --exclude=./runs .
  do_it "${tpu[@]}" scp "${options[@]}" runs/clone.tgz "$name:fm_jax.tgz"
  remote+=" tar -xzf ../fm_jax.tgz && FM_EXTRA=tpu FM_DISTRIBUTED=auto $(show ./launch.sh local "$@")"
  do_it "${tpu[@]}" ssh "${options[@]}" "$name" --command="$remote"
}

run_k8s() {
  local name=fm image=fm_jax nodes=1 gpus=0 json
  while [[ ${1:-} == --* ]]; do
    [[ $1 =~ ^--(name|image|nodes|gpus)=(.+)$ ]] || die "k8s accepts --name=, --image=, --nodes= and --gpus=, got '$1'"
    printf -v "${BASH_REMATCH[1]}" '%s' "${BASH_REMATCH[2]}"
    shift
  done
  check_module "$@"
  [[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[0-9]+$ ]] || die "--nodes and --gpus must be numbers, got '$nodes' and '$gpus'"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]] || die "--name must be lower-case letters, digits and dashes, got '$name'"
  [[ ! ${FM_EXTRA:-} ]] || find_extra >/dev/null
  # Kubernetes reads $(NAME) in a command as a variable, and $$ as $
  json=$("$(find_python)" -c 'import json, sys; print(json.dumps([word.replace("$", "$$") for word in sys.argv[1:]]))' \
    "$image" ./launch.sh local "$@")
  [[ $json =~ ^\[(\"[^\"]*\"),\ (.*)\]$ ]] || die "--image must be a name without quotes, got '$image'"
  cat <<E
# The image's working directory is a clone in which ./launch.sh setup has run (with FM_EXTRA of its GPUs).
apiVersion: v1
kind: Service
metadata: {name: $name}
spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {batch.kubernetes.io/job-name: $name}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: $name}
spec:
  completionMode: Indexed
  completions: $nodes
  parallelism: $nodes
  backoffLimit: 0
  podFailurePolicy:  # 75: told to stop, and saved; run that pod again. Anything else ends the job.
    rules:
    - {action: Ignore, onExitCodes: {operator: In, values: [75]}}
    - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
  template:
    spec:
      restartPolicy: Never
      subdomain: $name
      terminationGracePeriodSeconds: 120
      volumes: [{name: shm, emptyDir: {medium: Memory}}]
      containers:
      - name: run
        image: ${BASH_REMATCH[1]}
        command: [${BASH_REMATCH[2]}]
        env:
        - {name: FM_COORDINATOR_ADDRESS, value: "$name-0.$name:29400"}
        - {name: FM_NUM_PROCESSES, value: "$nodes"}  # the id comes from JOB_COMPLETION_INDEX
        - {name: FM_EXTRA, value: "${FM_EXTRA:-}"}
        resources: {limits: {nvidia.com/gpu: $gpus}}
        volumeMounts: [{name: shm, mountPath: /dev/shm}]
E
}

verb=${1:-}
shift || true
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
case $verb in
  local | slurm | tpu | k8s) "run_$verb" "$@" ;;
  list) list ;;
  setup) setup ;;
  check) run_check ;;
  test) setup; do_it exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@" ;;
  -h | --help | help) use ;;
  *) use >&2; die "unknown verb '$verb'" ;;
esac
