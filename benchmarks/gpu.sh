#!/usr/bin/env bash
# Everything that needs a GPU, in one command, what matters most first:
#
#   benchmarks/gpu.sh [FOLDER [STEP...]]
#
# FOLDER: for what comes out (default: $OUT, else benchmarks/results); paths are taken from the
# repository's root. Steps, with the minutes that they should take on an H100 beside 16 cores
# (estimates; what a step took is printed after it):
#
#   tests 3       the kernels' tests that a GPU changes; where one fails, nothing else runs
#   sweep 15      the losses beside their rivals; the sizes of the goals (LOG.md) in the first 6
#   tune 3        candidate tiles of the kernels
#   plot 1        time and memory of the sweep
#   model 3       the towers on the GPU against the CPU, a rank of NCCL, attention by backend
#   train 8       the training step beside open_clip's; half of it is compilation
#   sanitize 6    compute-sanitizer on small shapes, at most 3 minutes a tool
#   resources 2   registers, spills and shared memory of every kernel
#   job 4         images and the whole job against the CPU's; only where it is named: needs DALI and
#                 DeepSpeed
#   loader 11     the loader beside its rivals; only where it is named: needs DALI and PHOTOS, a
#                 folder of photographs
#
# Where a command is cut at ten minutes, these are the calls, what matters most first (minutes):
#
#   tests model (6); sweep plot with SWEEP="--sizes 32768,65536" (5); train (8); tune resources (5);
#   job (4); sanitize (6 to 9); sweep with SWEEP="--sizes 8192,16384,4096" (6); the same with 131072
#   (4); loader with LOADER="--parts rivals reader" (7), then with LOADER="--parts gpu failures" (5)
#
# A step that fails lets the others run, and is named at the end. Every record is written as it
# comes, so a run that is cut keeps what it had. Environment: PYTHON, the interpreter (default:
# .venv's where there is one); RIVALS, a folder with the packages of rivals below (default: they are
# installed there by pip, where a package index answers); COMMIT, what the records name where git
# does not answer; SWEEP, TUNE, TRAIN and LOADER, options of those steps, such as
# SWEEP="--sizes 32768 --dims 768" where time is short.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-${OUT:-benchmarks/results}}")
shift || true
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests sweep tune plot model train sanitize resources)
mkdir -p "$folder"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
python=$(command -v "$python")
[[ $python == /* ]] || python=$PWD/$python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONUNBUFFERED=1

if ! (cd / && "$python" -c "import laclip.kernels") 2>/dev/null; then
  if ! "$python" -m pip install -q --no-build-isolation --no-deps -e . 2>"$work/build.log"; then
    echo "gpu.sh: laclip does not build here ($(tail -n 1 "$work/build.log"));" \
      "the kernels and the model do without its extension" >&2
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    # A package that is imported from the checkout has its kernels beside it, not in it.
    [ -e laclip/kernels ] || { ln -s ../kernels laclip/kernels && linked=$PWD/laclip/kernels; }
    trap 'rm -rf "$work" ${linked:+"$linked"}' EXIT
  fi
fi
"$python" - <<'CHECK'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu.sh: no GPU here. On a CPU: pytest tests/kernels; benchmarks/loss.py --device cpu")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
CHECK
rivals=${RIVALS:-$work/rivals}
if [ ! -d "$rivals" ]; then
  "$python" -m pip install -q --no-deps --retries 1 --timeout 15 --target "$rivals" \
    open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.2.13 inf-cl==1.2.1 \
    siglip-kernel==0.1.2 webdataset==0.2.86 braceexpand==0.1.7 ||
    echo "gpu.sh: no rivals here: only our own implementations are timed" >&2
fi
beside_rivals=(env PYTHONPATH="$(realpath -m "$rivals")${PYTHONPATH:+:$PYTHONPATH}" "$python")

spread=()
if "$python" -c "import xdist" 2>/dev/null; then spread=(-n 8); fi

tests() {
  "$python" -m pytest tests/kernels -q -p no:cacheprovider "${spread[@]}" \
    -k "test_accuracy or test_behaviour or test_inputs" | tee "$folder/gpu_tests.txt"
}

sweep() {
  "${beside_rivals[@]}" benchmarks/loss.py --out "$folder/loss_gpu.jsonl" ${SWEEP:-}
}

tune() {
  "$python" benchmarks/tune_loss.py --out "$folder/loss_tiles.jsonl" ${TUNE:-}
}

plot() {
  "$python" benchmarks/loss.py --out "$folder/loss_gpu.jsonl" --plot "$folder/loss_gpu.png"
}

model() {
  local code=0
  "$python" -m pytest tests/test_model_gpu.py tests/kernels/test_distributed.py -m gpu -q \
    -p no:cacheprovider | tee "$folder/gpu_model.txt" || code=1
  "$python" benchmarks/attention.py --out "$folder/attention_gpu.jsonl" || code=1
  return $code
}

train() {
  # open_clip needs torchvision and timm: where the environment lacks them, oracles.py brings them.
  local run=("${beside_rivals[@]}")
  "${run[@]}" -c "import open_clip" 2>/dev/null || run=("$python" requirements/oracles.py)
  "${run[@]}" benchmarks/train.py --seconds 5 --out "$folder/train_gpu.jsonl" ${TRAIN:-}
}

sanitize() {
  local tool sanitizer code=0
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  if [ ! -x "$sanitizer" ]; then
    echo "gpu.sh: compute-sanitizer is not installed (package cuda-sanitizer)" >&2
    return 1
  fi
  # Without PyTorch's cache each tensor is an allocation of its own. With it they are parts of one
  # of 2 MB, of which the tools see neither the tensors' ends nor what was never written.
  for tool in memcheck racecheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after 10 170 \
      "$sanitizer" --tool $tool --launch-timeout 0 --error-exitcode 9 "$python" -m pytest -q \
      -p no:cacheprovider tests/kernels/test_accuracy.py -k "twice and triton and 65-200" |
      tee "$folder/gpu_$tool.txt" || code=1
  done
  return $code
}

resources() {
  "$python" -m laclip.kernels.resources | tee "$folder/resources.md"
}

job() {
  "$python" -m pytest tests/test_images_gpu.py tests/test_train_gpu.py -q -p no:cacheprovider \
    "${spread[@]}" | tee "$folder/gpu_job.txt"
}

loader() {
  # The photographs stay for the next call.
  "${beside_rivals[@]}" benchmarks/loader.py --photos "${PHOTOS:?a folder of photographs}" \
    --work "${TMPDIR:-/tmp}/laclip_photos" --seconds 5 --out "$folder/loader_gpu.jsonl" \
    ${LOADER:-}
}

failed=()
for step in "${steps[@]}"; do
  case $step in
  tests | sweep | tune | plot | model | train | sanitize | resources | job | loader) ;;
  *)
    echo "gpu.sh: no step '$step'; there are tests, sweep, tune, plot, model, train, sanitize," \
      "resources, job, loader" >&2
    exit 2
    ;;
  esac
done
for step in "${steps[@]}"; do
  echo "== $step"
  SECONDS=0
  code=0
  "$step" || code=$?
  echo "== $step took $SECONDS s"
  [ $code -eq 0 ] || failed+=("$step")
  if [ "$step" = tests ] && [ $code -ne 0 ]; then break; fi
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu.sh: failed: ${failed[*]}" >&2
  exit 1
fi
