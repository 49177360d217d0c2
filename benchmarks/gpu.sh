#!/usr/bin/env bash
# Everything that needs a GPU, in one command, safest step first:
#
#   benchmarks/gpu.sh [FOLDER [STEP...]]   steps: tests sanitize resources sweep tune plot model train loader
#
# Results go to FOLDER (default: $OUT, else benchmarks/results). PYTHON names the interpreter
# (default: .venv's where there is one); RIVALS a folder with open_clip, inf_cl and siglip_kernel
# (default: installed there by pip, where a package index answers); SWEEP options for the sweep, such
# as "--dims 768 --sizes 32768" where time is short. A failing test stops it all.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-${OUT:-benchmarks/results}}")
shift || true
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests sanitize resources sweep tune plot model train)
mkdir -p "$folder"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
python=$(command -v "$python")
[[ $python == /* ]] || python=$PWD/$python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! (cd / && "$python" -c "import laclip.kernels") 2>/dev/null; then
  if ! "$python" -m pip install -q --no-build-isolation --no-deps -e . 2>"$work/build.log"; then
    # The kernels need no compiled extension: a package of links will do.
    echo "gpu.sh: laclip does not build here ($(tail -n 1 "$work/build.log")); using links" >&2
    mkdir "$work/package" "$work/package/laclip"
    ln -s "$PWD"/laclip/* "$work/package/laclip/"
    ln -s "$PWD/kernels" "$work/package/laclip/kernels"
    export PYTHONPATH="$work/package${PYTHONPATH:+:$PYTHONPATH}"
  fi
fi
rivals=${RIVALS:-$work/rivals}
if [ ! -d "$rivals" ]; then
  "$python" -m pip install -q --no-deps --target "$rivals" \
    open_clip_torch==3.3.0 inf-cl==1.2.1 siglip-kernel==0.1.2 webdataset==1.0.2 braceexpand==0.1.7 ||
    echo "gpu.sh: no rivals here: only our own implementations are timed" >&2
fi
"$python" - <<'CHECK'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu.sh: no GPU here. On a CPU: pytest tests/kernels; benchmarks/loss.py --device cpu")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
CHECK

for step in "${steps[@]}"; do
  echo "== $step"
  case $step in
  tests)
    "$python" -m pytest tests/kernels -q -p no:cacheprovider | tee "$folder/gpu_tests.txt"
    ;;
  sanitize)
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if [ ! -x "$sanitizer" ]; then
      echo "gpu.sh: compute-sanitizer is not installed (package cuda-sanitizer)" >&2
      continue
    fi
    for tool in memcheck racecheck initcheck; do
      "$sanitizer" --tool $tool --error-exitcode 9 "$python" -m pytest -q -p no:cacheprovider \
        tests/kernels/test_accuracy.py -k "twice and triton and (63 or 65 or 127)" |
        tee "$folder/gpu_$tool.txt"
    done
    ;;
  resources)
    "$python" -m laclip.kernels.resources | tee "$folder/resources.md"
    ;;
  sweep)
    PYTHONPATH="$rivals${PYTHONPATH:+:$PYTHONPATH}" \
      "$python" benchmarks/loss.py --out "$folder/loss_gpu.jsonl" ${SWEEP:-}
    ;;
  tune)
    "$python" benchmarks/tune_loss.py --out "$folder/loss_tiles.jsonl"
    ;;
  plot)
    "$python" benchmarks/loss.py --out "$folder/loss_gpu.jsonl" --plot "$folder/loss_gpu.png"
    ;;
  model)
    "$python" -m pytest tests/test_model_gpu.py -q -p no:cacheprovider | tee "$folder/gpu_model.txt"
    "$python" benchmarks/attention.py --out "$folder/attention_gpu.jsonl"
    ;;
  train)
    "$python" requirements/oracles.py benchmarks/train.py --out "$folder/train_gpu.jsonl" ${TRAIN:-}
    ;;
  loader) # PHOTOS: a folder of photographs; needs the compiled extension
    PYTHONPATH="$rivals${PYTHONPATH:+:$PYTHONPATH}" "$python" benchmarks/loader.py \
      --photos "${PHOTOS:?a folder of photographs}" --work "$work/photos" \
      --out "$folder/loader_gpu.jsonl"
    ;;
  *)
    echo "gpu.sh: no step '$step'; there are tests, sanitize, resources, sweep, tune, plot, model," \
      "train, loader" >&2
    exit 2
    ;;
  esac
done
